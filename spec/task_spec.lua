-- Task: its properties and methods, tasks that are born complete, delay and sleep.

local flow = require "coflow"
local helper = require "spec.helper"

local Task = flow.Task
local in_task, recorder, raised, raises = helper.in_task, helper.recorder, helper.raised, helper.raises
local in_order = helper.in_order
local is_error, slowly, here = helper.is_error, helper.slowly, helper.here

-- One task in each of the final states.
local function succeeded(...) return Task.from_result(...) end
local function faulted(value) return Task.from_exception(value) end
local function canceled() return Task.from_canceled(flow.CancellationToken.canceled) end

describe("task.status", function()
  it("follows the life of a task", in_order(function()
    local log, note = recorder()
    local gate = flow.TaskCompletionSource()
    local task
    task = Task.new(function()
      note(task.status)
      gate.task:await()
      note(task.status)
    end)
    note(task.status)
    task:start()
    note(task.status)
    flow.yield()
    note(task.status)
    gate:set_result()
    task:await()
    note(task.status)
    assert.same({
      "created", "waiting_to_run", "running", "waiting_for_activation", "running", "ran_to_completion",
    }, log)
  end))

  it("is waiting_for_activation for an operation in flight and for a source's task", in_task(function()
    local gate = flow.TaskCompletionSource()
    local tasks = {
      gate.task, flow.delay(1), flow.when_all(gate.task), flow.when_any(gate.task), gate.task:wait_async(5),
    }
    for _, task in ipairs(tasks) do
      assert.equal("waiting_for_activation", task.status)
      assert.is_false(task.is_completed)
    end
    gate:set_result()
    flow.await_all(tasks)
  end))

  it("goes with the four booleans", in_task(function()
    local gate = flow.TaskCompletionSource()
    local queued = flow.spawn(function() end)
    local cases = {
      { queued, "waiting_to_run", false, false, false, false },
      { gate.task, "waiting_for_activation", false, false, false, false },
      { flow.current_task(), "running", false, false, false, false },
      { Task.new(print), "created", false, false, false, false },
      { succeeded(), "ran_to_completion", true, true, false, false },
      { faulted("boom"), "faulted", true, false, true, false },
      { canceled(), "canceled", true, false, false, true },
    }
    for _, case in ipairs(cases) do
      local task = case[1]
      assert.same({ table.unpack(case, 2) }, {
        task.status, task.is_completed, task.is_completed_successfully, task.is_faulted, task.is_canceled,
      })
    end
    pcall(flow.await, cases[6][1])
    gate:set_result()
    queued:await()
  end))

  it("and the other properties cannot be assigned", in_task(function()
    local task = succeeded(5)
    for _, property in ipairs { "status", "is_completed", "is_faulted", "result", "exception", "id" } do
      local before = task[property]
      assert.is_false((pcall(function() task[property] = "mine" end)), property)
      assert.equal(before, task[property])
    end
  end))
end)

describe("task.result and task:results()", function()
  it("are the first and all values", in_task(function()
    local task = flow.spawn(slowly, nil, 2, nil)
    task:await()
    assert.is_nil(task.result)
    assert.same({ n = 3, nil, 2, nil }, table.pack(task:results()))
    assert.equal("a", succeeded("a", "b").result)
    assert.is_nil(succeeded().result)
    assert.equal(0, select("#", succeeded():results()))
  end))

  it("never block: InvalidOperation while the task is not complete", in_task(function()
    local gate = flow.TaskCompletionSource()
    local queued = flow.spawn(function() end)
    for _, task in ipairs { gate.task, queued, flow.current_task(), Task.new(print) } do
      raises("InvalidOperation", function() return task.result end)
      raises("InvalidOperation", task.results, task)
    end
    gate:set_result()
    queued:await()
  end))

  it("raise as await does", in_task(function()
    local value = {}
    for _, task in ipairs { faulted(value), canceled() } do
      local err = raised(flow.await, task)
      assert.equal(err, raised(function() return task.result end))
      assert.equal(err, raised(task.results, task))
    end
  end))
end)

describe("task.exception", function()
  it("is the error value of a faulted task", in_order(function()
    local value = {}
    local task = flow.spawn(error, value)
    assert.is_nil(task.exception)
    flow.yield()
    assert.is_true(rawequal(value, task.exception))
  end))

  it("is nil for any other task", in_task(function()
    local gate = flow.TaskCompletionSource()
    for _, task in ipairs { gate.task, succeeded("x"), canceled(), Task.new(print), flow.current_task() } do
      assert.is_nil(task.exception)
    end
    gate:set_result()
  end))
end)

describe("task.id", function()
  it("is an integer of its own, which stays", in_task(function()
    local seen = {}
    for _ = 1, 100 do
      local task = flow.spawn(slowly)
      local id = task.id
      assert.equal("integer", math.type(id))
      assert.is_nil(seen[id])
      seen[id] = true
      task:await()
      assert.equal(id, task.id)
    end
  end))
end)

describe("task.name", function()
  it("is the name of a function of C", in_task(function()
    assert.equal("coflow.sleep", flow.spawn(flow.sleep, 1).name)
    assert.equal("string.rep", flow.spawn(string.rep, "x", 2).name)
    assert.equal("print", flow.Task.new(print).name)
    assert.equal("[C]", flow.Task.new(string.gmatch("x", "x")).name)
    flow.sleep(1)
  end))

  it("is a string: anything else is a bad argument", in_task(function()
    local task = flow.spawn(function() end)
    local line = here(1)
    local err = helper.raised(function() task.name = 5 end)
    assert.equal("bad argument #1 to 'name' (string expected, got number)", err:match("bad argument.*"))
    assert.truthy(err:find(line, 1, true), err)
    task:await()
  end))

  it("is by default the function's name or its file and line", in_task(function()
    local line = here(1)
    local task = flow.spawn(function() end)
    assert.truthy(task.name:find(line, 1, true), task.name)
    task:await()
    local function baptized() end
    local function_line = here(-1)
    local named = flow.async(baptized)()
    assert.truthy(named.name:find("baptized", 1, true) or named.name:find(function_line, 1, true), named.name)
  end))

  it("can be set, at any time", in_task(function()
    local task = flow.spawn(slowly)
    task.name = "worker"
    assert.equal("worker", task.name)
    task:await()
    assert.equal("worker", task.name)
    task.name = "done"
    assert.equal("done", task.name)
  end))

  it("is refused when it is not a string, and stays", in_task(function()
    local task = succeeded()
    task.name = "worker"
    for _, value in ipairs { {}, true, print } do
      assert.is_false((pcall(function() task.name = value end)))
      assert.equal("worker", task.name)
    end
  end))

  it("is beside what tostring tells: that it is a task", in_task(function()
    assert.truthy(tostring(succeeded()):find("Task", 1, true))
  end))
end)

describe("task:traceback()", function()
  it("of a suspended task leads from where it stands outwards, with file and line", in_order(function()
    local gate = flow.TaskCompletionSource()
    local lines = {}
    local function inner()
      lines[1] = here(1)
      gate.task:await()
    end
    local first = flow.spawn(function()
      lines[2] = here(1)
      inner()
      return 1
    end)
    local second = flow.spawn(function()
      lines[3] = here(1)
      first:await()
      return 1
    end)
    local third = flow.spawn(function()
      lines[4] = here(1)
      second:await()
      return 1
    end)
    flow.yield()
    local text = first:traceback()
    assert.equal("string", type(text))
    local at = 1
    for i = 1, 4 do
      local found = text:find(lines[i], at, true)
      assert.truthy(found, ("%s does not follow in:\n%s"):format(lines[i], text))
      at = found
    end
    gate:set_result()
    third:await()
  end))

  it("of a faulted task begins where it failed", in_task(function()
    local line, outer
    local function fail()
      line = here(1)
      error("boom")
    end
    local task = flow.spawn(function()
      slowly()
      outer = here(1)
      fail()
      return 1
    end)
    pcall(flow.await, task)
    local text = task:traceback()
    local inner_at, outer_at = text:find(line, 1, true), text:find(outer, 1, true)
    assert.truthy(inner_at and outer_at and inner_at < outer_at, text)
  end))

  it("of a chain of many leaves out those in the middle", in_task(function()
    local line
    local function fail()
      line = here(1)
      error("boom")
    end
    local task = flow.spawn(fail)
    for _ = 1, 100 do
      local before = task
      task = flow.spawn(function() return (before:await()) end)
      task.name = "outer"
    end
    pcall(flow.await, task)
    local text = task:traceback()
    local at = text:find(line, 1, true)
    assert.truthy(at and at < 200, text)
    assert.truthy(text:find("(61 tasks left out)", 1, true), text)
    assert.equal(40, select(2, text:gsub(" task '", "")))
  end))

  it("of one that failed with nil begins where it was raised, too", in_task(function()
    local line
    local task = flow.spawn(function()
      local inner = flow.spawn(function()
        line = here(1)
        error()
      end)
      inner:await()
    end)
    pcall(flow.await, task)
    assert.truthy(task:traceback():find(line, 1, true), task:traceback())
  end))

  it("of a Timeout tells where the wait stood, and what opened the scope", in_task(function()
    local lines = {}
    local function wait()
      lines[1] = here(1)
      flow.sleep(60)
    end
    local task = flow.spawn(function()
      lines[2] = here(1)
      flow.with_timeout(1, wait)
    end)
    pcall(flow.await, task)
    helper.is_error("Timeout", task.exception)
    local text = task:traceback()
    local first, second = text:find(lines[1], 1, true), text:find(lines[2], 1, true)
    assert.truthy(first and second and first < second, text)
  end))

  it("is a string for a task in any state", in_task(function()
    local queued = flow.spawn(slowly)
    local gate = flow.TaskCompletionSource()
    local failed = faulted("boom")
    local tasks = {
      queued, gate.task, succeeded(), failed, canceled(), Task.new(print), flow.current_task(),
      flow.when_all(queued),
    }
    for _, task in ipairs(tasks) do
      assert.equal("string", type(task:traceback()))
    end
    pcall(flow.await, failed)
    gate:set_result()
    queued:await()
  end))

  it("of a circle of waits through combinators ends", in_task(function()
    local gate = flow.TaskCompletionSource()
    local a, b
    a = flow.spawn(function() return flow.await_any(b, gate.task) end)
    b = flow.spawn(function() return flow.await_any(a, gate.task) end)
    slowly()
    assert.equal("string", type(a:traceback()))
    gate:set_result()
    flow.await_all(a, b)
  end))
end)

describe("task:wait", function()
  it("drives the loop at top level until the task is complete: true whatever the outcome", function()
    local stop = flow.errors.OperationCanceled("enough")
    local tasks = { flow.spawn(slowly), flow.spawn(error, "boom"), flow.spawn(error, stop) }
    for i, status in ipairs { "ran_to_completion", "faulted", "canceled" } do
      assert.is_true(tasks[i]:wait())
      assert.equal(status, tasks[i].status)
      assert.is_true(tasks[i]:wait(0))
    end
    assert.equal("boom", tasks[2].exception)
  end)

  it("is false after its timeout, and at once for 0", function()
    local log, note = recorder()
    local gate = flow.TaskCompletionSource()
    assert.is_false(gate.task:wait(0))
    local task = flow.spawn(function()
      note("runs")
      gate.task:await()
    end)
    assert.is_false(task:wait(0.001))
    assert.same({ "runs" }, log)
    gate:set_result()
    assert.is_true(task:wait(math.huge))
  end)

  it("raises OperationCanceled with its token, but a complete task wins over it", function()
    local source = flow.CancellationTokenSource()
    local gate = flow.TaskCompletionSource()
    flow.spawn(source.cancel, source, "enough")
    local err = raises("OperationCanceled", gate.task.wait, gate.task, nil, source.token)
    assert.equal(source.token, err.token)
    raises("OperationCanceled", gate.task.wait, gate.task, 0, source.token)
    gate:set_result()
    assert.is_true(gate.task:wait(nil, source.token))
  end)

  it("is refused in a task", in_task(function()
    local task = flow.spawn(slowly)
    raises("InvalidOperation", task.wait, task)
    raises("InvalidOperation", task.wait, task, 0)
    task:await()
  end))

  it("raises InvalidOperation when nothing can complete the task", function()
    assert.equal("false true\n", helper.output [[
      local flow = require "coflow"
      local gate = flow.TaskCompletionSource()
      local ok, err = pcall(gate.task.wait, gate.task)
      print(("%s %s"):format(ok, flow.errors.is(err, "InvalidOperation")))
    ]])
  end)
end)

describe("task:wait_async", function()
  it("completes as the task does", in_task(function()
    local value = {}
    local stop = flow.errors.OperationCanceled("enough")
    local a = flow.spawn(slowly, 1, nil, 3):wait_async(10)
    local b = flow.spawn(error, value):wait_async(10)
    local c = flow.spawn(error, stop):wait_async(10)
    assert.same({ n = 3, 1, nil, 3 }, table.pack(a:await()))
    assert.equal(value, raised(flow.await, b))
    assert.equal(stop, raised(flow.await, c))
    assert.same({ "ran_to_completion", "faulted", "canceled" }, { a.status, b.status, c.status })
  end))

  it("leaves no timer behind when the task is first", in_task(function(clock)
    local start = clock:now()
    local source = flow.CancellationTokenSource()
    assert.equal(5, flow.spawn(slowly, 5):wait_async(1000, source.token):await())
    assert.equal(start, clock:now())
  end))

  it("faults with Timeout exactly at its deadline; the task goes on", in_task(function(clock)
    local start = clock:now()
    local task = flow.spawn(function()
      flow.sleep(10)
      return "late"
    end)
    local wait = task:wait_async(2.5)
    is_error("Timeout", raised(flow.await, wait))
    assert.equal("faulted", wait.status)
    assert.equal(2.5, clock:now() - start)
    assert.equal("late", task:await())
    assert.equal(10, clock:now() - start)
  end))

  it("is canceled with its token; the task goes on", in_task(function(clock)
    local start = clock:now()
    local source = flow.CancellationTokenSource(3)
    local task = flow.delay(10)
    local wait = task:wait_async(nil, source.token)
    local err = raises("OperationCanceled", flow.await, wait)
    assert.equal("canceled", wait.status)
    assert.equal(source.token, err.token)
    assert.equal(3, clock:now() - start)
    task:await()
    assert.equal(10, clock:now() - start)
  end))

  it("prefers a complete task to a canceled token and to a timeout of 0", in_task(function()
    local token = flow.CancellationToken.canceled
    assert.equal(5, succeeded(5):wait_async(0, token):await())
    local value = {}
    assert.equal(value, raised(flow.await, faulted(value):wait_async(0, token)))
  end))

  it("prefers a canceled token to a timeout of 0", in_task(function()
    local gate = flow.TaskCompletionSource()
    local wait = gate.task:wait_async(0, flow.CancellationToken.canceled)
    assert.equal("canceled", wait.status)
    is_error("Timeout", raised(flow.await, gate.task:wait_async(0)))
    gate:set_result()
  end))

  it("waits without a limit for nil and math.huge", in_task(function(clock)
    local start = clock:now()
    local task = flow.delay(1e9)
    flow.await_all(task:wait_async(), task:wait_async(nil), task:wait_async(math.huge))
    assert.equal(1e9, clock:now() - start)
  end))

  it("leaves no registration behind in a token that lives on", in_task(function()
    local source = flow.CancellationTokenSource()
    for _ = 1, 100 do
      flow.spawn(slowly):wait_async(nil, source.token):await()
    end
    source:cancel()
    slowly()
  end))

  it("leaves no continuation behind in a task that lives on", in_task(function()
    local gate = flow.TaskCompletionSource()
    local grown = helper.growth(100, helper.many(2000), function()
      pcall(flow.await, gate.task:wait_async(0.001))
    end)
    assert.is_true(grown < 50, ("%.0f KB more"):format(grown))
    gate:set_result()
  end))

  it("can be canceled and time out at the same instant without harm", in_task(function()
    local gate = flow.TaskCompletionSource()
    local source = flow.CancellationTokenSource(1)
    local wait = gate.task:wait_async(1, source.token)
    local err = raised(flow.await, wait)
    assert.is_true(flow.errors.is(err, "OperationCanceled") or flow.errors.is(err, "Timeout"))
    gate:set_result()
  end))
end)

describe("task:continue_with", function()
  it("runs its function with the task, on a later turn", in_task(function()
    local log, note = recorder()
    local task = succeeded(5)
    local after = task:continue_with(function(...)
      note("continues", select("#", ...), ... == task)
      return slowly((...).result + 1), nil
    end)
    note(after.status ~= "ran_to_completion")
    assert.same({ n = 2, 6, nil }, table.pack(after:await()))
    assert.same({ "true", "continues 1 true" }, log)
  end))

  it("runs in the order of registration, after every outcome", in_order(function()
    local log, note = recorder()
    local gate = flow.TaskCompletionSource()
    local tasks = {}
    for i = 1, 3 do
      tasks[i] = gate.task:continue_with(function(t) note(i, t.status) end)
    end
    gate:set_exception("boom")
    note("set")
    flow.await_all(tasks)
    assert.same({ "set", "1 faulted", "2 faulted", "3 faulted" }, log)
  end))

  it("faults with its function's error, and is canceled by an OperationCanceled in it", in_task(function()
    local value = {}
    local task = succeeded():continue_with(function() error(value) end)
    assert.equal(value, raised(flow.await, task))
    local stopped = succeeded():continue_with(function() error(flow.errors.OperationCanceled("enough")) end)
    raises("OperationCanceled", flow.await, stopped)
    assert.is_true(stopped.is_canceled)
  end))

  it("is canceled when its condition is not met", in_task(function()
    local outcomes = { success = succeeded(5), fault = faulted("boom"), cancel = canceled() }
    for outcome, task in pairs(outcomes) do
      for _, on in ipairs { "any", "success", "fault", "cancel" } do
        local ran = false
        local after = task:continue_with(function() ran = true end, { on = on })
        local ok, err = after:try_await()
        local met = on == "any" or on == outcome
        assert.equal(met, ran)
        assert.equal(met, ok)
        assert.equal(not met, after.is_canceled)
        if not met then
          is_error("OperationCanceled", err)
        end
      end
    end
    outcomes.fault:try_await()
  end))

  it("is canceled at once by a token that was canceled before, though the task is pending", in_task(function()
    local gate, source = flow.TaskCompletionSource(), flow.CancellationTokenSource()
    source:cancel("too late")
    local ran = false
    local after = gate.task:continue_with(function() ran = true end, { token = source.token })
    local _, err = after:try_await()
    assert.is_true(flow.errors.is(err, "OperationCanceled"))
    assert.equal("too late", err.reason)
    assert.is_false(ran)
    gate:set_result()
  end))

  it("is canceled by its token before it starts, also while the task is pending", in_task(function()
    local ran = false
    local gate = flow.TaskCompletionSource()
    local source = flow.CancellationTokenSource()
    local after = gate.task:continue_with(function() ran = true end, { token = source.token })
    local then_, name = after:continue_with(function(task) return task.status end), after.name
    source:cancel()
    assert.equal("canceled", after.status)
    assert.equal(name, after.name)
    local err = raises("OperationCanceled", flow.await, after)
    assert.equal(source.token, err.token)
    assert.equal("canceled", then_:await())
    assert.is_false(gate.task.is_completed)
    gate:set_result()
    local late = gate.task:continue_with(function() ran = true end, { token = source.token })
    raises("OperationCanceled", flow.await, late)
    assert.is_false(ran)
  end))

  it("runs after a wait_async that its own token has canceled", in_task(function()
    local source = flow.CancellationTokenSource()
    local waiting = flow.TaskCompletionSource().task:wait_async(9, source.token)
    local after = waiting:continue_with(function(task) return task.status end)
    source:cancel()
    assert.equal("canceled", after:await())
  end))

  it("is not canceled by its token once it runs", in_task(function()
    local source = flow.CancellationTokenSource()
    local after = succeeded():continue_with(function()
      source:cancel()
      return slowly("done")
    end, { token = source.token })
    assert.equal("done", after:await())
  end))

  it("runs in the context captured at the call, with its own writes", in_task(function()
    local loc = flow.AsyncLocal()
    local gate = flow.TaskCompletionSource()
    loc.value = "registered"
    local after = gate.task:continue_with(function()
      local seen = loc.value
      loc.value = "continuation's"
      return seen
    end)
    loc.value = "later"
    gate:set_result()
    assert.equal("registered", after:await())
    assert.equal("later", loc.value)
  end))

  it("makes chains", in_task(function()
    local function increment(task) return task.result + 1 end
    local task = succeeded(0)
    local n = helper.many(1000)
    for _ = 1, n do
      task = task:continue_with(increment)
    end
    assert.equal(n, task:await())
  end))
end)

describe("a task made complete", function()
  it("by from_result has every value", in_task(function()
    local task = Task.from_result(1, nil, 3, nil)
    assert.equal("ran_to_completion", task.status)
    assert.same({ n = 4, 1, nil, 3, nil }, table.pack(task:await()))
    assert.equal(0, select("#", Task.from_result():await()))
  end))

  it("by from_exception has that very error, nil and OperationCanceled included", in_task(function()
    local values = table.pack("boom", {}, false, flow.errors.OperationCanceled("enough"), nil)
    for i = 1, values.n do
      local task = Task.from_exception(values[i])
      assert.equal("faulted", task.status)
      assert.is_true(rawequal(values[i], task.exception))
      assert.same({ n = 2, false, values[i] }, table.pack(task:try_await()))
    end
  end))

  it("by from_canceled has an OperationCanceled with that token", in_task(function()
    local source = flow.CancellationTokenSource()
    source:cancel("enough")
    local task = Task.from_canceled(source.token)
    assert.equal("canceled", task.status)
    local err = raises("OperationCanceled", flow.await, task)
    assert.same({ source.token, "enough" }, { err.token, err.reason })
    assert.equal(err, raised(flow.await, task))
  end))

  it("by from_canceled needs a canceled token", in_task(function()
    local source = flow.CancellationTokenSource()
    raises("Argument", Task.from_canceled, source.token)
    raises("Argument", Task.from_canceled, flow.CancellationToken.none)
  end))

  it("is ready in Task.completed_task", in_task(function()
    assert.equal("ran_to_completion", Task.completed_task.status)
    assert.is_nil(Task.completed_task:await())
    assert.is_nil(Task.completed_task.result)
  end))
end)

describe("flow.delay", function()
  it("completes after exactly its time under a virtual clock, with no value", in_task(function(clock)
    local start = clock:now()
    for _, seconds in ipairs { 0.25, 1, 1.5, 86400 * 365 } do
      local before = clock:now()
      local task = flow.delay(seconds)
      assert.equal("waiting_for_activation", task.status)
      assert.equal(0, select("#", task:await()))
      assert.equal(before + seconds, clock:now())
    end
    assert.is_true(clock:now() > start)
    assert.equal(flow.delay, Task.delay)
  end))

  it("of 0 is already complete", in_task(function()
    assert.equal("ran_to_completion", flow.delay(0).status)
  end))

  it("wakes in order of the deadlines, and equal ones in the order they were set", in_order(function()
    local log, note = recorder()
    local tasks = {}
    for i, seconds in ipairs { 3, 1, 2, 1, 3, 1 } do
      tasks[i] = flow.spawn(function()
        flow.sleep(seconds)
        note(seconds, i)
      end)
    end
    flow.await_all(tasks)
    assert.same({ "1 2", "1 4", "1 6", "2 3", "3 1", "3 5" }, log)
  end))

  it("comes first when its deadline was set first, before a scope, a token or a sleep", in_order(function()
    local function at_once(fn, ...) return flow.async(fn)(...) end
    local log, note = recorder()
    local delay = flow.delay(1)
    at_once(function()
      delay:await()
      note("delay")
    end)
    local sleeper = at_once(function()
      flow.sleep(1)
      note("sleep")
    end)
    local scoped = at_once(flow.with_timeout, 1, delay.await, delay)
    local source = flow.CancellationTokenSource(1)
    local waiting = delay:wait_async(nil, source.token)
    scoped:await()
    waiting:await()
    sleeper:await()
    assert.same({ "delay", "sleep" }, log)
    local late = flow.CancellationTokenSource(1)
    raises("OperationCanceled", flow.await, flow.delay(1):wait_async(nil, late.token))
  end))

  it("is canceled by its token, before, also for 0, and during", in_task(function(clock)
    local start = clock:now()
    local source = flow.CancellationTokenSource(1)
    local during = flow.delay(5, source.token)
    local err = raises("OperationCanceled", flow.await, during)
    assert.equal(source.token, err.token)
    assert.equal(1, clock:now() - start)
    for _, seconds in ipairs { 0, 5 } do
      local before = flow.delay(seconds, source.token)
      assert.equal("canceled", before.status)
      assert.equal(source.token, raises("OperationCanceled", flow.await, before).token)
      assert.equal(source.token, raises("OperationCanceled", flow.sleep, seconds, source.token).token)
    end
    assert.equal(1, clock:now() - start)
  end))

  it("stays complete when its token is canceled afterwards", in_task(function()
    local source = flow.CancellationTokenSource()
    local task = flow.delay(1, source.token)
    task:await()
    source:cancel()
    slowly()
    assert.equal("ran_to_completion", task.status)
  end))

  it("of math.huge ends by its token only", in_task(function(clock)
    local start = clock:now()
    local source = flow.CancellationTokenSource(100)
    raises("OperationCanceled", flow.sleep, math.huge, source.token)
    assert.equal(100, clock:now() - start)
  end))

  it("serves 10,000 at the same time", in_task(function(clock)
    local start = clock:now()
    local n, tasks = helper.many(10000), {}
    for i = 1, n do
      tasks[i] = flow.delay((i * 7919) % 100 + 1)
    end
    local last = 0
    local count = 0
    for _ in flow.when_each(tasks) do
      local now = clock:now()
      assert(now >= last)
      last, count = now, count + 1
    end
    assert.same({ n, 100 }, { count, last - start })
  end))
end)

describe("flow.sleep", function()
  it("suspends for its time and returns nothing", in_task(function(clock)
    local start = clock:now()
    assert.equal(0, select("#", flow.sleep(1.25)))
    assert.equal(1.25, clock:now() - start)
  end))

  it("lets others sleep at the same time", in_task(function(clock)
    local start = clock:now()
    flow.await_all(flow.spawn(flow.sleep, 3), flow.spawn(flow.sleep, 2), flow.spawn(flow.sleep, 3))
    assert.equal(3, clock:now() - start)
  end))
end)
