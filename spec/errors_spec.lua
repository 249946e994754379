-- flow.errors, the errors that the library raises, and values that users raise.

local flow = require "coflow"
local testing = require "coflow.testing"
local helper = require "spec.helper"

local errors = flow.errors
local in_task, raised, raises = helper.in_task, helper.raised, helper.raises

local NAMES = {
  "OperationCanceled", "Timeout", "Aggregate", "ObjectDisposed", "InvalidOperation", "Argument",
  "SemaphoreFull", "ChannelClosed", "TaskAbandoned", "BrokenCircuit", "BulkheadRejected",
  "RateLimitRejected", "IO", "Worker",
}

describe("an error object", function()
  for _, name in ipairs(NAMES) do
    it("of the name " .. name .. " has its name, message, fields and text", function()
      local extra = {}
      local err = errors[name]("it broke", { code = "E1", extra = extra })
      assert.equal("table", type(err))
      assert.equal(name, err.name)
      assert.equal("it broke", err.message)
      assert.equal("E1", err.code)
      assert.equal(extra, err.extra)
      assert.equal(name .. ": it broke", tostring(err))
      assert.is_true(errors.is(err, name))
    end)
  end

  it("is known by its own name only", function()
    for _, name in ipairs(NAMES) do
      for _, other in ipairs(NAMES) do
        assert.equal(name == other, errors.is(errors[name]("it broke"), other))
      end
    end
  end)

  it("is not any other value, whatever it looks like", function()
    local look_alike = { name = "Timeout", message = "late" }
    local values = table.pack(nil, false, true, 42, "Timeout", "Timeout: late", {}, look_alike, print,
      io.stdout, coroutine.create(print),
      flow.Task.completed_task, setmetatable({}, { __index = look_alike }))
    for i = 1, values.n do
      assert.is_false(errors.is(values[i], "Timeout"), "value " .. i)
    end
  end)

  it("is tested without calling into a hostile value", function()
    local hostile = setmetatable({}, { __index = function() error("touched") end, __name = "Timeout" })
    assert.is_false(errors.is(hostile, "Timeout"))
  end)

  it("is a new one at each call", function()
    assert.is_false(rawequal(errors.Timeout("late"), errors.Timeout("late")))
  end)

  it("works without fields", function()
    local err = errors.InvalidOperation("not now")
    assert.equal("InvalidOperation: not now", tostring(err))
    assert.is_nil(err.token)
  end)

  it("is joined to a string as its text", function()
    local err = flow.errors.IO("no such file")
    assert.equal("failed: IO: no such file", "failed: " .. err)
    assert.equal("IO: no such file!", err .. "!")
  end)

  it("prints as its text when it ends a script", function()
    local result = helper.child [[
      local flow = require "coflow"
      error(flow.errors.Timeout("too late"))
    ]]
    assert.equal(1, result.code)
    assert.truthy(result.err:find("Timeout: too late", 1, true))
  end)
end)

describe("errors of the library", function()
  it("carry the token, its reason and the token canceled first", function()
    local source = flow.CancellationTokenSource()
    source:cancel("enough")
    local token = source.token
    local err = raises("OperationCanceled", token.throw_if_cancellation_requested, token)
    assert.equal(token, err.token)
    assert.equal("enough", err.reason)
    assert.equal(token, err.cause)
  end)

  it("carry the linked token, and as their cause the parent that was canceled", function()
    local parent = flow.CancellationTokenSource()
    local bystander <close> = flow.CancellationTokenSource()
    local linked = flow.CancellationTokenSource.linked(bystander.token, parent.token)
    parent:cancel("enough")
    local token = linked.token
    local err = raises("OperationCanceled", token.throw_if_cancellation_requested, token)
    assert.equal(token, err.token)
    assert.equal(parent.token, err.cause)
    assert.equal("enough", err.reason)
  end)

  it("carry the token given to a direct-style operation", in_task(function()
    local source = flow.CancellationTokenSource()
    source:cancel(404)
    local err = raises("OperationCanceled", flow.sleep, 1, source.token)
    assert.equal(source.token, err.token)
    assert.equal(404, err.reason)
  end))

  it("aggregate what several tasks raised", in_task(function()
    local first, second = { "first" }, { "second" }
    local both = flow.when_all(flow.Task.from_exception(first), flow.Task.from_exception(second))
    assert.equal(first, raised(flow.await, both))
    assert.same({ first, second }, helper.inner(both.exception))
    assert.equal(first, both.exception.inner_exceptions[1])
  end))

  it("are plain strings for a bad argument", function()
    local err = raised(function()
      local _ = flow.delay(-1)
    end)
    assert.equal("string", type(err))
    assert.truthy(err:find("bad argument #1 to 'delay' (", 1, true))
  end)

  it("blame the caller's line for a bad argument", function()
    local line
    local err = raised(function()
      line = helper.here(1)
      local _ = flow.spawn(42)
    end)
    assert.truthy(err:find(line .. ": bad argument #1 to 'spawn'", 1, true), err)
  end)
end)

-- Ways by which an error can travel: each calls `fn`, which raises, and lets what comes out of it pass.
local WAYS = {
  ["a spawned task"] = function(fn) flow.await(flow.spawn(fn)) end,
  ["a spawned task that suspended before"] = function(fn)
    flow.await(flow.spawn(function()
      flow.yield()
      fn()
    end))
  end,
  ["an async function"] = function(fn) flow.await(flow.async(fn)()) end,
  ["a task's result"] = function(fn) return flow.async(fn)().result end,
  ["a cold task"] = function(fn)
    local task = flow.Task.new(fn)
    task:start()
    task:await()
  end,
  ["flow.call"] = function(fn) flow.call(fn) end,
  ["flow.await_all"] = function(fn) flow.await_all(flow.spawn(fn), flow.delay(1)) end,
  ["when_all"] = function(fn) flow.await(flow.when_all { flow.spawn(fn), flow.delay(1) }) end,
  ["wait_async"] = function(fn) flow.await(flow.spawn(fn):wait_async(10)) end,
  ["continue_with"] = function(fn) flow.await(flow.Task.completed_task:continue_with(fn)) end,
  ["three tasks that await each other"] = function(fn)
    flow.await(flow.spawn(function()
      flow.await(flow.spawn(function()
        flow.await(flow.spawn(fn))
      end))
    end))
  end,
  ["a completion source"] = function(fn)
    local source = flow.TaskCompletionSource()
    source:set_exception(select(2, pcall(fn)))
    flow.await(source.task)
  end,
}

describe("a value raised by user code", function()
  local printable = setmetatable({}, { __tostring = function() return "x" end })
  local values = table.pack("boom", "", 42, 0.5, false, true, {}, printable, print, io.stdout,
    coroutine.create(print), errors.Timeout("mine"), nil)
  for way, travel in pairs(WAYS) do
    it("comes unchanged through " .. way, in_task(function()
      for i = 1, values.n do
        local ok, err = pcall(travel, function() error(values[i], 0) end)
        assert.is_false(ok)
        assert.is_true(rawequal(values[i], err), ("value %d came out as %s"):format(i, tostring(err)))
      end
    end))
  end

  it("comes unchanged out of flow.run and testing.run", function()
    for _, run in ipairs { flow.run, testing.run } do
      for i = 1, values.n do
        local ok, err = pcall(run, function() error(values[i], 0) end, { seed = false })
        assert.is_false(ok)
        assert.is_true(rawequal(values[i], err), ("value %d came out as %s"):format(i, tostring(err)))
      end
    end
  end)

  it("keeps Lua's own position in its text, and nothing more", in_task(function()
    local line
    local task = flow.spawn(function()
      line = helper.here(1)
      error("boom")
    end)
    local err = raised(flow.await, task)
    assert.equal(line .. ": boom", err:match("[^/]+$"))
  end))

  it("gets no field and no metatable from the traceback that is kept beside it", in_task(function()
    local value = {}
    local task = flow.spawn(error, value)
    assert.equal(value, raised(flow.await, task))
    assert.is_nil(next(value))
    assert.is_nil(getmetatable(value))
    assert.equal("string", type(task:traceback()))
  end))

  it("is the same each time that it is awaited", in_task(function()
    local value = {}
    local task = flow.spawn(error, value)
    for _ = 1, 3 do
      assert.is_true(rawequal(value, raised(flow.await, task)))
    end
    assert.is_true(rawequal(value, task.exception))
  end))

  it("leaves the library's own frames out", helper.in_task(function()
    local task = flow.spawn(function()
      flow.task_group(function(group) group:spawn(function() error("x") end) end)
    end)
    task:try_await()
    assert.is_nil(task:traceback():find("coflow/group.lua", 1, true))
    assert.truthy(task:traceback():find("spec/errors_spec.lua", 1, true))
  end))

  it("leaves them out whichever module is required first", function()
    for _, first in ipairs { "coflow.group", "coflow.core", "coflow.testing" } do
      local out = helper.output(([[
        require %q
        local task_group, core = require("coflow.group").task_group, require "coflow.core"
        require "coflow"
        core.run(function()
          local task = core.spawn(function()
            task_group(function(group) group:spawn(error, "x") end)
          end)
          task:try_await()
          print(task:traceback())
        end)
      ]]):format(first))
      assert.truthy(out:find("awaited by", 1, true), out)
      assert.is_nil(out:find("coflow/", 1, true), out)
    end
    assert.is_nil(helper.output([[
      local task_group, core = require("coflow.group").task_group, require "coflow.core"
      core.run(function()
        local task = core.spawn(task_group, function(group) group:spawn(error, "x") end)
        core.try_await(task)
        print(task:traceback())
      end)
    ]]):find("coflow/", 1, true))
  end)

  it("tell for an unknown option which ones there are", function()
    local _, err = pcall(flow.AsyncLocal, { nam = "x" })
    assert.truthy(err:find("(unknown option 'nam': known are default, flow, name, value_changed)", 1, true), err)
    _, err = pcall(flow.task_group, function() end, { limt = 2 })
    assert.truthy(err:find("(unknown option 'limt': known are grace, limit, policy)", 1, true), err)
    err = helper.raised(flow.channel.select, { flow.delay(0), timout = 1 })
    assert.truthy(err:find("(unknown option 'timout': known are timeout, token)", 1, true), err)
  end)

  it("names the public function in an argument error, whoever calls it", function()
    assert.equal("bad argument #1 to 'coflow.with_timeout' (seconds must not be negative)",
      select(2, pcall(flow.with_timeout, -1, print)))
  end)
end)

describe("what is told of a task in functions of the library", function()
  it("has the line of the user where it was canceled, or none", in_task(function()
    local source = flow.CancellationTokenSource()
    local listener <close> = flow.net.listen("127.0.0.1", 0)
    local line
    local served = listener:serve_async(print, source.token)
    local task = flow.spawn(function()
      line = helper.here(1)
      listener:iterate(source.token)()
    end)
    flow.yield()
    flow.yield()
    source:cancel()
    assert.is_false((served:try_await()))
    assert.is_false((task:try_await()))
    assert.is_nil(served:traceback():find("lua/coflow/", 1, true), served:traceback())
    assert.is_nil(task:traceback():find("lua/coflow/", 1, true), task:traceback())
    assert.truthy(task:traceback():find(line .. ": canceled here", 1, true), task:traceback())
  end))

  it("has the line of the user where it was collected, or none", function()
    local told = {}
    flow.on_unobserved_exception(function(err) told[#told + 1] = tostring(err) end)
    flow.run(function()
      flow.AsyncCache():get_or_add_async("key", function() flow.TaskCompletionSource().task:await() end)
      flow.sleep(0.001)
    end)
    for _ = 1, 3 do
      collectgarbage()
      flow.run(flow.yield)
    end
    flow.on_unobserved_exception(nil)
    table.sort(told)
    assert.equal(2, #told)
    assert.matches("^TaskAbandoned: task 'coflow.cache' was collected while it waited: nothing alive", told[1])
    local place = "spec/errors_spec.lua:%d+"
    assert.matches(("^TaskAbandoned: task '%s' was collected while it waited at %s: "):format(place, place), told[2])
  end)
end)
