-- What strangers, finalizers and handlers do at awkward moments: they close the coroutine of a task, cancel, or ask,
-- in the midst of something else.

local flow = require "coflow"
local helper = require "spec.helper"

local in_order, collect, recorder = helper.in_order, helper.collect, helper.recorder
local closed = "somebody has closed the coroutine"

local function never() return flow.TaskCompletionSource().task end

local function told(ok, err)
  assert.is_false(ok)
  assert.truthy(tostring(err):find(closed, 1, true), err)
end

-- The coroutine of a task that has ended, which is the next one's.
local function used_before()
  local kept
  flow.spawn(function() kept = coroutine.running() end):await()
  return kept
end

-- A body that leaves a child behind in a group, where it waits for what never comes.
local function leaving(seconds, ended)
  return function()
    flow.task_group(function(group)
      group:spawn(function()
        flow.shield(flow.sleep, seconds)
        ended()
      end)
      flow.yield()
      flow.shield(function() never():await() end)
    end)
  end
end

describe("a group whose owner is abandoned", function()
  before_each(function() flow.on_unobserved_exception(false) end)
  after_each(function() flow.on_unobserved_exception(nil) end)

  it("waits for nobody, and its children end as they like", in_order(function()
    local ended = false
    local victim = flow.spawn(leaving(20, function() ended = true end))
    flow.sleep(1)
    victim:cancel()
    victim = nil -- luacheck: ignore
    for _ = 1, 3 do
      collect()
      flow.sleep(1)
    end
    flow.sleep(30)
    collect()
    assert.is_true(ended)
  end))

  it("leaves the group that it was in as it was", in_order(function()
    local inner, outer = false, false
    local task = flow.spawn(flow.task_group, function(around)
      around:spawn(leaving(5, function() inner = true end))
      around:spawn(function()
        flow.shield(flow.sleep, 30)
        outer = true
      end)
      flow.sleep(100)
    end, { policy = "supervise" })
    flow.sleep(1)
    task:cancel()
    for _ = 1, 3 do
      collect()
      flow.sleep(0.5)
    end
    assert.is_false((task:try_await()))
    assert.is_true(inner and outer)
  end))
end)

describe("closing the coroutine of a task", function()
  it("that waits in a queue of its group fails the group, awaited or not", in_order(function()
    for _, awaited in ipairs { true, false } do
      local kept = {}
      for _ = 1, 3 do flow.spawn(function() kept[#kept + 1] = coroutine.running() flow.sleep(1) end) end
      flow.sleep(2)
      told(pcall(flow.task_group, function(group)
        group:spawn(flow.sleep, 1)
        local queued = group:spawn(function() end)
        local waiter = awaited and flow.async(function() return queued:try_await() end)()
        flow.yield()
        for _, co in ipairs(kept) do
          if select(2, debug.getlocal(co, 0, 2)) == queued then coroutine.close(co) end
        end
        if waiter then told(waiter:await()) end
      end, { limit = 1 }))
    end
  end))

  it("in queue_task, which raises then, fails it once", in_order(function()
    local kept, n = nil, 0
    local scheduler = flow.TaskScheduler.new { queue_task = function(self, task)
      n = n + 1
      if n == 1 then return self:try_execute_task(task) end
      coroutine.close(kept)
      error("no", 0)
    end }
    local reported
    flow.on_unobserved_exception(function(err) reported = err end)
    local task = flow.spawn_on(scheduler, function()
      kept = coroutine.running()
      flow.sleep(1)
    end)
    told(task:try_await())
    flow.sleep(1)
    flow.on_unobserved_exception(nil)
    assert.equal("no", reported)
  end))

  it("gives its place in a limited scheduler to the next one", in_order(function()
    flow.on_unobserved_exception(false)
    local scheduler, kept = flow.TaskScheduler.limited(1), nil
    flow.spawn_on(scheduler, function()
      kept = coroutine.running()
      never():await()
    end)
    flow.sleep(1)
    coroutine.close(kept)
    kept = nil -- luacheck: ignore
    assert.equal("second", flow.spawn_on(scheduler, function() return "second" end):await())
    collect()
    flow.on_unobserved_exception(nil)
  end))

  it("and dropping it reaches who awaits a task that has not started", in_order(function()
    local kept = used_before()
    local task = flow.spawn(function() return 1 end)
    local waiter = flow.async(function() return task:try_await() end)()
    coroutine.close(kept)
    kept = nil -- luacheck: ignore
    collect()
    for _ = 1, 100 do coroutine.create(print) end
    told(waiter:await())
  end))
end)

describe("a handler that is called as a task is entered", function()
  local armed
  local function local_with(handler)
    return flow.AsyncLocal { value_changed = function(change)
      if armed and change.context_changed then
        armed = false
        handler()
      end
    end }
  end

  it("may resume its coroutine: it starts when it is its turn", in_order(function()
    local kept, resumed
    local loc = local_with(function() resumed = coroutine.resume(kept) end)
    loc.value = 1
    kept = used_before()
    local task = flow.spawn(function() return "ran", coroutine.running() == kept end)
    loc.value = 2
    armed = true
    assert.same({ "ran", true }, { task:await() })
    assert.is_true(resumed)
  end))

  it("may close its coroutine, which is told", in_order(function()
    local kept
    local log, note = recorder()
    local loc = local_with(function() coroutine.close(kept) end)
    loc.value = 1
    local task = flow.spawn(function()
      local _ <close> = helper.closing(function() note("closed") end)
      kept = coroutine.running()
      flow.yield()
      note("went on")
    end)
    loc.value = 2
    flow.yield()
    armed = true
    told(task:try_await())
    assert.same({ "closed" }, log)
  end))

  it("cannot suspend it, and is told so", in_order(function()
    local errors = {}
    local seen = flow.AsyncLocal { value_changed = function(args)
      if args.context_changed then errors[#errors + 1] = tostring(select(2, pcall(flow.yield))) end
    end }
    local task = flow.spawn(function()
      seen:set(1)
      flow.yield()
    end)
    flow.yield() -- it has set it, and we are entered
    task:await() -- it is entered, and left
    assert.equal(3, #errors)
    for _, err in ipairs(errors) do assert.truthy(err:find("inside a value_changed handler", 1, true), err) end
  end))

  it("may ask for its traceback", in_order(function()
    local text
    local loc = local_with(function() text = flow.current_task():traceback() end)
    loc.value = 1
    local task = flow.spawn(flow.yield)
    loc.value = 2
    armed = true
    task:await()
    assert.truthy(text:find("in task", 1, true), text)
  end))
end)

describe("a finalizer", function()
  -- Runs fn(arm) some times: what it arms, { __gc = finalizer }, is called by the next thing that is created.
  local function next_creation(fn)
    return in_order(function()
      collectgarbage("generational")
      for _ = 1, 10 do
        fn(function(class)
          collectgarbage("stop")
          setmetatable({}, class)
          collectgarbage("restart")
        end)
      end
      collectgarbage("incremental")
    end)
  end

  it("that starts a cold task while it is started starts it, or is refused", next_creation(function(arm)
    local scheduler = flow.TaskScheduler.new { queue_task = function(self, task) self:try_execute_task(task) end }
    local runs, started, other = 0, 0, nil
    local task = flow.Task.new(function()
      runs = runs + 1
      flow.yield()
    end)
    local called
    local class = { __gc = function()
      called = true
      if pcall(task.start, task) then
        started = started + 1
        other = flow.spawn(function() return "other" end)
      end
    end }
    local start = task.start
    arm(class)
    if pcall(start, task, scheduler) then started = started + 1 end
    assert.is_true(called)
    task:await()
    assert.equal(1, started)
    assert.equal(1, runs)
    if other then assert.equal("other", other:await()) end
  end))

  it("that completes an input while await_any begins to wait wakes it", next_creation(function(arm)
    local a, b = flow.TaskCompletionSource(), flow.TaskCompletionSource()
    local first, second = a.task, b.task
    flow.async(function() first:await() end)() -- others wait, too: to join them takes memory
    flow.async(function() second:await() end)()
    local class, await_any = { __gc = function() b:try_set_result(1) end }, flow.await_any
    local task = flow.spawn(function()
      arm(class)
      return (await_any(first, second))
    end)
    assert.equal(second, task:await())
    a:set_result()
  end))
end)

describe("a finalizer that completes what is collected along with it", function()
  local function complete(held) held[1]:set_result("done") end

  it("starts a continuation of it", in_order(function()
    local ran = 0
    for _ = 1, 20 do
      local source = flow.TaskCompletionSource()
      source.task:continue_with(function() ran = ran + 1 end)
      setmetatable({ source }, { __gc = complete })
    end
    collect()
    flow.yield()
    collect()
    flow.yield()
    assert.equal(20, ran)
  end))

  it("wakes who waits for it", in_order(function()
    local ran = 0
    for _ = 1, 20 do
      local source = flow.TaskCompletionSource()
      flow.spawn(function()
        setmetatable({ source }, { __gc = complete })
        assert.equal("done", source.task:await())
        ran = ran + 1
      end)
    end
    flow.yield()
    collect()
    flow.yield()
    collect()
    flow.yield()
    assert.equal(20, ran)
  end))
end)

describe("the handler of unobserved exceptions", function()
  it("writes to nobody's context", function()
    local loc = flow.AsyncLocal()
    flow.on_unobserved_exception(function()
      loc.value = "leak"
      flow.ExecutionContext.suppress_flow()
    end)
    flow.run(function()
      flow.spawn(error, "x")
      flow.yield()
      flow.yield()
    end)
    collect()
    flow.on_unobserved_exception(nil)
    assert.is_nil(loc.value)
    assert.is_false(flow.ExecutionContext.is_flow_suppressed())
  end)
end)

describe("an error that ends a coroutine of Lua's own", function()
  local loc = flow.AsyncLocal()
  local ways = {
    ["loc:run"] = function(fn) return loc:run("in", fn) end,
    ["context:run"] = function(fn) return flow.ExecutionContext.capture():run(fn) end,
    ["wrap"] = function(fn) return flow.ExecutionContext.wrap(fn)() end,
    ["flow.call"] = function(fn) return flow.call(fn) end,
  }

  local function each_way(fn)
    for name, call in pairs(ways) do
      loc:set("out")
      fn(function(body) return coroutine.create(function() return call(body) end) end, name)
      assert.equal("out", loc:get(), name)
    end
    loc:set(nil)
  end

  local function specs()
    each_way(function(create, name) -- raised at once
      local err = {}
      local co = create(function()
        loc:set("changed")
        error(err)
      end)
      local ok, raised = coroutine.resume(co)
      assert.is_false(ok)
      assert.equal(err, raised, name)
    end)
    each_way(function(create, name) -- after a yield
      local co = create(function()
        loc:set("changed")
        assert.equal(2, coroutine.yield(1))
        error()
      end)
      assert.same({ true, 1 }, { coroutine.resume(co) }, name)
      assert.same({ false }, { coroutine.resume(co, 2) }, name)
    end)
    each_way(function(create, name) -- no error
      local co = create(function() return 1, nil, 3 end)
      assert.same(table.pack(true, 1, nil, 3), table.pack(coroutine.resume(co)), name)
    end)
  end

  it("leaves the context as it was, in a task", in_order(specs))
  it("leaves the context as it was, outside every task", specs)
end)

describe("the state of a loop over when_each", function()
  it("cannot be awaited, nor canceled", in_order(function()
    local _, state, _, closing <close> = flow.when_each { never() } -- luacheck: ignore closing
    for _, wait in ipairs { flow.await, flow.try_await, flow.when_all, flow.await_any, flow.when_any,
      function(t) return t:wait_async(1) end, function(t) return t:continue_with(print) end,
      function(t) return t:cancel() end } do
      local ok, err = pcall(wait, state)
      assert.is_false(ok)
      assert.truthy(tostring(err):find("when_each", 1, true), err)
    end
  end))
end)
