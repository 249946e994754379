-- TaskCompletionSource: each way to complete its task, once.

local flow = require "coflow"
local helper = require "spec.helper"

local in_task, recorder, raised, raises = helper.in_task, helper.recorder, helper.raised, helper.raises
local in_order = helper.in_order
local slowly = helper.slowly

-- How to complete a source, and the status that it gives.
local WAYS = {
  result = { status = "ran_to_completion", value = 5 },
  exception = { status = "faulted", value = "boom" },
  canceled = { status = "canceled" },
}

describe("TaskCompletionSource", function()
  it("gives a task that is pending, always the same one", in_task(function()
    local source = flow.TaskCompletionSource()
    assert.equal("waiting_for_activation", source.task.status)
    assert.is_true(rawequal(source.task, source.task))
    assert.not_equal(source.task, flow.TaskCompletionSource().task)
    source:set_result()
  end))

  it("completes its task with every value", in_task(function()
    local source = flow.TaskCompletionSource()
    source:set_result(1, nil, 3, nil)
    assert.equal("ran_to_completion", source.task.status)
    assert.same({ n = 4, 1, nil, 3, nil }, table.pack(source.task:await()))
    local empty = flow.TaskCompletionSource()
    empty:set_result()
    assert.equal(0, select("#", empty.task:await()))
  end))

  it("faults its task with any value, nil included", in_task(function()
    local values = table.pack("boom", {}, false, 42, nil)
    for i = 1, values.n do
      local source = flow.TaskCompletionSource()
      source:set_exception(values[i])
      assert.equal("faulted", source.task.status)
      assert.same({ n = 2, false, values[i] }, table.pack(source.task:try_await()))
      assert.is_true(rawequal(values[i], source.task.exception))
    end
  end))

  it("faults its task also with an OperationCanceled", in_task(function()
    local err = flow.errors.OperationCanceled("enough")
    for _, how in ipairs { "set_exception", "try_set_exception" } do
      local source = flow.TaskCompletionSource()
      source[how](source, err)
      assert.equal("faulted", source.task.status)
      assert.equal(err, raised(flow.await, source.task))
      assert.equal(err, source.task.exception)
    end
  end))

  it("cancels its task, with the token, canceled or not, or without one", in_task(function()
    local tokens = { flow.CancellationTokenSource().token, flow.CancellationToken.canceled, false }
    for i, token in ipairs(tokens) do
      for _, how in ipairs { "set_canceled", "try_set_canceled" } do
        local source = flow.TaskCompletionSource()
        source[how](source, token or nil)
        assert.equal("canceled", source.task.status)
        assert.is_nil(source.task.exception)
        local err = raises("OperationCanceled", flow.await, source.task)
        if i < 3 then
          assert.equal(token, err.token)
        end
        assert.equal(err, raised(flow.await, source.task))
      end
    end
  end))

  for first, outcome in pairs(WAYS) do
    it("keeps its " .. first .. " when it is completed again", in_task(function()
      local source = flow.TaskCompletionSource()
      source["set_" .. first](source, outcome.value)
      for second in pairs(WAYS) do
        raises("InvalidOperation", source["set_" .. second], source, nil)
        assert.is_false(source["try_set_" .. second](source, nil))
      end
      assert.equal(outcome.status, source.task.status)
      local ok, value = source.task:try_await()
      assert.equal(first == "result", ok)
      if outcome.value then
        assert.equal(outcome.value, value)
      end
    end))

    it("tells whether try_set_" .. first .. " was first", in_task(function()
      local source = flow.TaskCompletionSource()
      assert.is_true(source["try_set_" .. first](source, outcome.value))
      assert.is_false(source["try_set_" .. first](source, nil))
      assert.equal(outcome.status, source.task.status)
      local ok, value = source.task:try_await()
      assert.equal(first == "result", ok)
      if outcome.value then
        assert.equal(outcome.value, value)
      end
    end))
  end

  it("queues the waiters in order and runs none of them itself", in_order(function()
    local log, note = recorder()
    local source = flow.TaskCompletionSource()
    local tasks = {}
    for i = 1, 3 do
      tasks[i] = flow.async(function()
        note(i, source.task:await())
      end)()
    end
    note(source:try_set_result("it"))
    note(source.task.status)
    flow.await_all(tasks)
    assert.same({ "true", "ran_to_completion", "1 it", "2 it", "3 it" }, log)
  end))

  it("wakes combinators, waits and continuations without running them itself", in_task(function()
    local log, note = recorder()
    local source = flow.TaskCompletionSource()
    local tasks = {
      flow.when_all(source.task):continue_with(function() note("when_all") end),
      flow.when_any(source.task):continue_with(function() note("when_any") end),
      source.task:wait_async(5):continue_with(function() note("wait_async") end),
      source.task:continue_with(function() note("continue_with") end),
    }
    source:set_result()
    note("set")
    flow.await_all(tasks)
    assert.equal("set", log[1])
    table.sort(log)
    assert.same({ "continue_with", "set", "wait_async", "when_all", "when_any" }, log)
  end))

  it("may be completed outside every task", function()
    local source = flow.TaskCompletionSource()
    local waiter = flow.async(function() return source.task:await() end)()
    source:set_result(5)
    assert.is_false(waiter.is_completed)
    assert.equal(5, flow.await(waiter))
  end)

  it("may be completed by a task, a timer's end, a cancellation callback or a __gc", in_task(function()
    local by_task, by_callback, by_gc =
      flow.TaskCompletionSource(), flow.TaskCompletionSource(), flow.TaskCompletionSource()
    flow.spawn(function()
      flow.sleep(1)
      by_task:set_result("task")
    end)
    local canceler = flow.CancellationTokenSource(2)
    canceler.token:register(function() by_callback:set_result("callback") end)
    do
      local _ = setmetatable({}, { __gc = function() by_gc:try_set_result("gc") end })
    end
    helper.collect()
    assert.same({ n = 3, "task", "callback", "gc" }, flow.when_all {
      by_task.task, by_callback.task, by_gc.task,
    }:await())
  end))

  it("may be dropped by its maker while its task is awaited by a holder of the task", in_task(function()
    local function make()
      local source = flow.TaskCompletionSource()
      return source.task, function() source:set_result("it") end
    end
    local task, complete = make()
    collectgarbage()
    local waiter = flow.spawn(function() return task:await() end)
    flow.yield()
    complete()
    assert.equal("it", waiter:await())
  end))

  it("refuses what is no token, also when it is complete", in_task(function()
    local source = flow.TaskCompletionSource()
    for _ = 1, 2 do
      local err = helper.raised(function() source:set_canceled(5) end)
      assert.truthy(tostring(err):find("bad argument #1 to 'set_canceled'", 1, true), err)
      err = helper.raised(function() source:try_set_canceled(5) end)
      assert.truthy(tostring(err):find("bad argument #1 to 'try_set_canceled'", 1, true), err)
      source:try_set_result()
    end
  end))

  it("drops what it completed with once the task is gone", in_task(function()
    local weak = setmetatable({}, { __mode = "v" })
    local function scope()
      local source = flow.TaskCompletionSource()
      weak[1] = {}
      source:set_result(weak[1])
      assert.equal(weak[1], source.task:await())
      slowly()
    end
    scope()
    helper.collect()
    assert.is_nil(weak[1])
  end))
end)
