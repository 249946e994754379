-- coflow.lazy and coflow.cache: one call of a factory for all who ask.
-- SPDX-License-Identifier: MIT

local flow = require "coflow"
local helper = require "spec.helper"

local in_task, raises, raised = helper.in_task, helper.raises, helper.raised
local in_order = helper.in_order
local Token = flow.CancellationToken

local function counting(fn)
  local calls = 0
  return function(...)
    calls = calls + 1
    return fn(calls, ...)
  end, function() return calls end
end

local function slow(seconds)
  return counting(function(call)
    flow.sleep(seconds or 1)
    return "value " .. call, nil
  end)
end

describe("an AsyncLazy", function()
  it("can be awaited", in_task(function()
    local lazy = flow.AsyncLazy((slow()))
    assert.same({ "value 1", nil, n = 2 }, table.pack(flow.await(lazy)))
    assert.same({ { "value 1", n = 1 }, n = 1 }, table.pack(flow.when_all(lazy):await()))
    local _, err = flow.try_await(flow.AsyncLazy(function() error("no", 0) end))
    assert.equal("no", err)
  end))

  it("lets go of its factory once there is a value", in_task(function()
    local weak = setmetatable({}, { __mode = "k" })
    local function make(options)
      local held = {}
      weak[held] = true
      return flow.AsyncLazy(function() return type(held) end, options)
    end
    local lazies = { make(), make { retry_on_failure = true } }
    for _, lazy in ipairs(lazies) do
      lazy:get()
      lazy:get()
    end
    helper.collect()
    assert.is_nil(next(weak))
    assert.equal("table", lazies[1]:get())
  end))

  it("refuses a retry_on_failure that is no boolean", function()
    local ok, err = pcall(function() return flow.AsyncLazy(print, { retry_on_failure = 1 }) end)
    assert.is_false(ok)
    assert.truthy(err:find("retry_on_failure must be true or false", 1, true), err)
  end)

  it("calls its factory at the first get, once for all", in_task(function()
    local factory, calls = slow()
    local lazy = flow.AsyncLazy(factory)
    flow.yield()
    assert.equal(0, calls())
    assert.is_false(lazy.is_value_created)
    local a, b = lazy:get_async(), lazy:get_async()
    assert.same({ "value 1", nil, n = 2 }, table.pack(lazy:get()))
    assert.is_true(lazy.is_value_created)
    local line = helper.here(1)
    local _, err = pcall(function() lazy.is_value_created = false end)
    assert.truthy(err:find(line .. ": field 'is_value_created' of an AsyncLazy cannot be assigned", 1, true), err)
    assert.is_true(lazy.is_value_created)
    assert.equal("value 1", (a:await()))
    assert.equal("value 1", (b:await()))
    assert.equal("value 1", (lazy:get()))
    assert.equal(1, calls())
  end))

  it("keeps a failure, the same value for all", in_task(function()
    local problem = {}
    local factory, calls = counting(function() flow.yield() error(problem) end)
    local lazy = flow.AsyncLazy(factory)
    local joined = lazy:get_async()
    assert.equal(problem, raised(lazy.get, lazy))
    assert.equal(problem, raised(flow.await, joined))
    assert.equal(problem, raised(lazy.get, lazy))
    assert.equal(1, calls())
    assert.is_false(lazy.is_value_created)
  end))

  it("calls again after a failure when told to, for those that come later", in_task(function()
    local factory, calls = counting(function(call)
      flow.sleep(1)
      if call == 1 then error("first", 0) end
      return call
    end)
    local lazy = flow.AsyncLazy(factory, { retry_on_failure = true })
    local joined = lazy:get_async()
    assert.equal("first", raised(lazy.get, lazy))
    assert.equal("first", raised(flow.await, joined))
    assert.equal(2, lazy:get())
    assert.equal(2, lazy:get())
    assert.equal(2, calls())
  end))

  it("ends only the wait of a caller that is canceled", in_task(function()
    local factory, calls = slow(3)
    local lazy = flow.AsyncLazy(factory)
    local other = lazy:get_async()
    raises("Timeout", flow.with_timeout, 1, lazy.get, lazy)
    local source = flow.CancellationTokenSource(1)
    assert.equal(source.token, raises("OperationCanceled", lazy.get, lazy, source.token).token)
    assert.equal("value 1", (other:await()))
    assert.equal(1, calls())
  end))

  it("cancels the factory when the last caller has left, and keeps nothing of that", in_order(function()
    local log, note = helper.recorder()
    local factory = counting(function(call)
      local _ <close> = helper.closing(function(err) note("end", call, err and err.name) end)
      flow.sleep(5)
      return call
    end)
    local lazy = flow.AsyncLazy(factory)
    local other = flow.spawn(function() return pcall(flow.with_timeout, 1, lazy.get, lazy) end)
    raises("Timeout", flow.with_timeout, 2, lazy.get, lazy)
    other:await()
    flow.yield()
    assert.same({ "end 1 OperationCanceled" }, log)
    assert.equal(2, lazy:get())
  end))

  it("joins nobody to a factory that is being given up", in_task(function()
    local factory = counting(function(call)
      local _ <close> = helper.closing(function() flow.shield(flow.sleep, 1) end)
      flow.sleep(5)
      return call
    end)
    local lazy = flow.AsyncLazy(factory)
    raises("Timeout", flow.with_timeout, 1, lazy.get, lazy)
    assert.equal(2, lazy:get())
  end))

  it("has no value when the factory returns after it was given up", in_task(function()
    local calls = 0
    local lazy = flow.AsyncLazy(function()
      calls = calls + 1
      pcall(flow.sleep, 1)
      return calls
    end)
    raises("Timeout", flow.with_timeout, 0.5, lazy.get, lazy)
    helper.settle()
    assert.is_false(lazy.is_value_created)
    assert.equal(2, lazy:get())
    assert.is_true(lazy.is_value_created)
  end))

  it("calls nothing where nobody can wait, but has what is there", in_task(function()
    local factory, calls = slow()
    local lazy = flow.AsyncLazy(factory)
    helper.refused_where_nobody_waits(lazy.get, lazy)
    helper.settle()
    assert.equal(0, calls())
    assert.equal("value 1", (lazy:get()))
    assert.equal("value 1", ("x"):gsub("x", function() return (lazy:get()) end))
  end))

  it("counts no caller whose coroutine has died", in_task(function()
    for _, library in ipairs { coroutine, flow.coroutine } do
      local canceled = false
      local lazy = flow.AsyncLazy(function()
        local _ <close> = helper.closing(function() canceled = true end)
        flow.sleep(100)
      end)
      local first = lazy:get_async()
      local source <close> = flow.CancellationTokenSource(1)
      local co = library.create(function() lazy:get(source.token) end)
      flow.yield()
      assert.is_false((library.resume(co)))
      helper.settle()
      assert.is_false(canceled)
      first:cancel()
      helper.settle()
      assert.is_true(canceled)
    end
  end))

  it("hides every caller's context and deadline from the factory", in_task(function()
    local loc = flow.AsyncLocal()
    loc.value = "caller"
    local seen, deadline
    local lazy = flow.AsyncLazy(function()
      flow.yield()
      seen, deadline = loc.value, flow.deadline()
      return 1
    end)
    assert.equal(1, flow.with_timeout(10, lazy.get, lazy))
    assert.is_nil(seen)
    assert.is_nil(deadline)
    local weak = setmetatable({}, { __mode = "v" })
    loc.value = {}
    weak[1] = loc.value
    lazy = flow.AsyncLazy(function() return 1 end)
    lazy:get()
    loc.value = nil
    collectgarbage()
    assert.is_nil(weak[1])
  end))

  it("starts nothing under a canceled token, but has what is there", in_task(function()
    local factory, calls = slow()
    local lazy = flow.AsyncLazy(factory)
    raises("OperationCanceled", lazy.get, lazy, Token.canceled)
    assert.equal(0, calls())
    lazy:get()
    assert.equal("value 1", (lazy:get(Token.canceled)))
  end))

  it("tells a factory that asks for its own value", in_task(function()
    local lazy
    lazy = flow.AsyncLazy(function() return lazy:get() end)
    raises("InvalidOperation", lazy.get, lazy)
  end))

  it("refuses bad arguments", function()
    assert.has_error(function() flow.AsyncLazy() end)
    assert.has_error(function() flow.AsyncLazy(print, { retry = true }) end)
    assert.has_error(function() flow.AsyncLazy(print):get(1) end)
    assert.has_error(function() flow.AsyncLazy(print).get({}) end)
  end)
end)

describe("an AsyncCache", function()
  it("whose values live no time makes one call for those who wait at the same time", in_task(function()
    local factory, calls = counting(function()
      flow.sleep(1)
      return "v"
    end)
    local cache = flow.AsyncCache { time_to_live = 0 }
    for n = 1, 2 do
      local all = {}
      for i = 1, 3 do all[i] = flow.spawn(cache.get_or_add, cache, "k", factory) end
      assert.same({ "v", "v", "v" }, { flow.await_all(all) })
      assert.equal(n, calls())
    end
  end))

  it("calls the factory once for each key, however many ask", in_task(function()
    local factory, calls = counting(function(_, key)
      flow.sleep(1)
      return key .. "!", 2
    end)
    local cache = flow.AsyncCache()
    local tasks = {}
    for i = 1, helper.many(10000) do tasks[i] = flow.spawn(cache.get_or_add, cache, "k", factory) end
    for _, value in ipairs(flow.when_all(tasks):await()) do assert.equal("k!", value) end
    assert.same({ "k!", 2, n = 2 }, table.pack(cache:get_or_add("k", error)))
    assert.equal("j!", (cache:get_or_add("j", factory)))
    assert.equal(2, calls())
  end))

  it("keeps no failure", in_task(function()
    local factory = counting(function(call)
      flow.yield()
      if call == 1 then error("first", 0) end
      return call
    end)
    local cache = flow.AsyncCache()
    assert.equal("first", raised(cache.get_or_add, cache, 1, factory))
    assert.equal(2, cache:get_or_add(1, factory))
  end))

  it("makes a value anew after its time to live", in_task(function()
    local factory = counting(function(call) return call end)
    local cache = flow.AsyncCache { time_to_live = 10 }
    assert.equal(1, cache:get_or_add("k", factory))
    flow.sleep(9.5)
    assert.equal(1, cache:get_or_add("k", factory))
    flow.sleep(0.5)
    assert.equal(2, cache:get_or_add("k", factory))
  end))

  it("lets go of what has expired at the next use", in_task(function()
    local cache = flow.AsyncCache { time_to_live = 1 }
    local weak = setmetatable({}, { __mode = "v" })
    cache:get_or_add("k", function() weak[1] = {} return weak[1] end)
    collectgarbage()
    assert.is_table(weak[1])
    flow.sleep(1)
    cache:get_or_add("other", function() return 1 end)
    collectgarbage()
    assert.is_nil(weak[1])
  end))

  it("calls nothing where nobody can wait, but has what is there", in_task(function()
    local factory, calls = slow()
    local cache = flow.AsyncCache()
    helper.refused_where_nobody_waits(cache.get_or_add, cache, "k", factory)
    helper.settle()
    assert.equal(0, calls())
    assert.equal("value 1", (cache:get_or_add("k", factory)))
    assert.equal("value 1", ("x"):gsub("x", function() return (cache:get_or_add("k", factory)) end))
  end))

  it("evicts what was used longest ago", in_task(function()
    local cache = flow.AsyncCache { max_entries = 2.0 }
    local made = {}
    local function factory(key)
      made[#made + 1] = key
      return key
    end
    for _, key in ipairs { "a", "b", "a", "c", "a", "b" } do cache:get_or_add(key, factory) end
    assert.same({ "a", "b", "c", "b" }, made)
  end))

  it("evicts nothing that is good for what has expired but was used later", in_task(function()
    local cache = flow.AsyncCache { max_entries = 2, time_to_live = 10 }
    local function get(key, seconds)
      return (cache:get_or_add(key, function()
        flow.sleep(seconds)
        return key .. " at " .. flow.loop.now()
      end))
    end
    get("old", 0)
    flow.sleep(5)
    local good = get("good", 0)
    get("old", 0)
    get("new", 5) -- "old" expires meanwhile
    assert.equal(good, get("good", 0))
  end))

  it("does not invalidate what has expired", in_task(function()
    local cache = flow.AsyncCache { time_to_live = 1 }
    cache:get_or_add("k", function() return 1 end)
    flow.sleep(1)
    assert.is_false(cache:invalidate("k"))
  end))

  it("forgets what is invalidated, but still serves those who wait for it", in_task(function()
    local factory = slow(2)
    local cache = flow.AsyncCache()
    local first = cache:get_or_add_async("k", factory)
    flow.sleep(1)
    assert.is_true(cache:invalidate("k"))
    assert.is_false(cache:invalidate("k"))
    local second = cache:get_or_add_async("k", factory)
    assert.equal("value 1", (first:await()))
    assert.equal("value 2", (second:await()))
    assert.equal("value 2", (cache:get_or_add("k", error)))
    cache:clear()
    assert.equal("value 3", (cache:get_or_add("k", factory)))
  end))

  it("ends only the wait of a caller that is canceled, and the factory with the last one", in_order(function()
    local ended = 0
    local factory = counting(function(call)
      local _ <close> = helper.closing(function(err) ended = ended + (err and 1 or 0) end)
      flow.sleep(5)
      return call
    end)
    local cache = flow.AsyncCache()
    local other = cache:get_or_add_async("k", factory)
    raises("Timeout", flow.with_timeout, 1, cache.get_or_add, cache, "k", factory)
    assert.equal(1, other:await())
    raises("Timeout", flow.with_timeout, 1, cache.get_or_add, cache, "j", factory)
    flow.yield()
    assert.equal(1, ended)
    assert.equal(3, cache:get_or_add("j", factory))
  end))

  it("names the factory's task after the factory, as a lazy does", in_task(function()
    local function name() return flow.current_task().name end
    local there = helper.here(-1)
    assert.truthy(flow.AsyncLazy(name):get():find(there, 1, true))
    assert.truthy(flow.AsyncCache():get_or_add("key", name):find(there, 1, true))
    local callable = setmetatable({}, { __call = name })
    assert.is_string(flow.AsyncCache():get_or_add("key", callable))
  end))

  it("keeps neither the context nor the token of whoever made an entry", in_task(function()
    local loc, cache = flow.AsyncLocal(), flow.AsyncCache()
    local weak = setmetatable({}, { __mode = "v" })
    do
      local value, source = {}, flow.CancellationTokenSource()
      weak[1], weak[2] = value, source
      loc.value = value
      cache:get_or_add("k", function() flow.yield() return loc.value == nil end, source.token)
    end
    loc.value = nil
    collectgarbage()
    collectgarbage()
    assert.is_nil(weak[1])
    assert.is_nil(weak[2])
    assert.is_true(cache:get_or_add("k", error))
  end))

  it("refuses bad arguments", in_task(function()
    local cache = flow.AsyncCache()
    assert.has_error(function() cache:get_or_add(nil, print) end)
    assert.has_error(function() cache:get_or_add(0 / 0, print) end)
    assert.has_error(function() cache:get_or_add("k") end)
    assert.has_error(function() cache:get_or_add("k", print, "token") end)
    assert.has_error(function() flow.AsyncCache { time_to_live = -1 } end)
    assert.has_error(function() flow.AsyncCache { max_entries = 1.5 } end)
    assert.has_error(function() flow.AsyncCache { max_entries = 0.0 } end)
    assert.has_error(function() flow.AsyncCache { max_entries = "2" } end)
    assert.has_error(function() flow.AsyncCache { size = 1 } end)
  end))
end)

describe("a finalizer that asks for a value while somebody else begins to make it", function()
  -- The collector comes at another point of the call each time round.
  local function each_moment(fn)
    return in_task(function()
      collectgarbage("generational")
      for n = 1, helper.many(60, 5) do
        local asked
        fn(function(ask)
          collectgarbage("stop")
          for _ = 1, n * 30 do local _ = {} end
          setmetatable({}, { __gc = function() asked = ask() end })
          collectgarbage("restart")
        end,
          function() if asked then asked:await() end end)
        asked = nil
      end
      collectgarbage("incremental")
    end)
  end

  it("joins the call of a lazy's factory", each_moment(function(finalized, wait)
    local calls = 0
    local lazy = flow.AsyncLazy(function()
      calls = calls + 1
      return calls
    end)
    finalized(function() return lazy:get_async() end)
    local value = lazy:get() -- nothing is made between
    assert.equal(1, value)
    wait()
    assert.equal(1, calls)
  end))

  it("joins the call of a cache's factory", each_moment(function(finalized, wait)
    local calls, cache = 0, flow.AsyncCache { max_entries = 1 }
    local function factory()
      calls = calls + 1
      return calls
    end
    finalized(function() return cache:get_or_add_async("key", factory) end)
    local value = cache:get_or_add("key", factory)
    assert.equal(1, value)
    wait()
    assert.equal(1, calls)
    cache:invalidate("key")
    cache:get_or_add("other", factory) -- there is room for it
    assert.equal(2, cache:get_or_add("other", factory))
  end))
end)
