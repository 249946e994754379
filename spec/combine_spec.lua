-- when_all, when_any, when_each and their direct forms.

local flow = require "coflow"
local helper = require "spec.helper"

local Task = flow.Task
local in_task, recorder, raised, raises = helper.in_task, helper.recorder, helper.raised, helper.raises
local in_order = helper.in_order
local inner = helper.inner

-- A task that ends after so many seconds, with the values.
local function after(seconds, ...)
  return flow.spawn(function(...)
    flow.sleep(seconds)
    return ...
  end, ...)
end

-- A task that raises `err` after so many seconds.
local function failing(seconds, err)
  return flow.spawn(function()
    flow.sleep(seconds)
    error(err, 0)
  end)
end

local function stop(message)
  return flow.errors.OperationCanceled(message)
end

describe("when_all", function()
  it("takes awaitables as arguments, an array or a table with any keys", in_task(function()
    assert.same({ n = 2, "a", "b" }, flow.when_all(after(2, "a"), after(1, "b")):await())
    assert.same({ n = 2, "a", "b" }, flow.when_all({ after(2, "a"), after(1, "b") }):await())
    local key = {}
    local got = flow.when_all({ user = after(2, "a"), [key] = after(1, "b"), [2.5] = after(1, "c") }):await()
    assert.equal("a", got.user)
    assert.equal("b", got[key])
    assert.equal("c", got[2.5])
    assert.same({ user = 1, orders = 2 }, flow.when_all({ user = after(1, 1), orders = after(2, 2) }):await())
    assert.equal(flow.when_all, Task.when_all)
  end))

  it("gives one new table with each task's first value", in_task(function()
    local input = { after(1, "a", "dropped"), after(1), after(1, nil, "dropped"), after(1, false) }
    local got = table.pack(flow.when_all(input):await())
    assert.equal(1, got.n)
    assert.same({ n = 4, "a", nil, nil, false }, got[1])
    assert.not_equal(input, got[1])
  end))

  it("counts an array by its n", in_task(function()
    local task = after(1, "a")
    assert.same({ n = 1, "a" }, flow.when_all({ n = 1, task, flow.current_task() }):await())
    assert.same({ n = 1, "a" }, flow.when_all({ n = 1.0, task, flow.current_task() }):await())
    assert.same({ n = 0 }, flow.when_all({ n = 0 }):await())
    assert.same({ n = 1, "a" }, flow.when_all(table.pack(task)):await())
  end))

  it("is complete at once when its input is empty or complete", in_task(function()
    for _, task in ipairs { flow.when_all(), flow.when_all({}) } do
      assert.equal("ran_to_completion", task.status)
      assert.same({ n = 0 }, task.result)
    end
    local done = flow.when_all(Task.from_result(1), Task.completed_task)
    assert.equal("ran_to_completion", done.status)
    assert.same({ n = 2, 1, nil }, done.result)
  end))

  it("counts the same task each time", in_task(function()
    local task = after(1, "a")
    assert.same({ n = 3, "a", "a", "a" }, flow.when_all(task, task, task):await())
    local bad = failing(1, "boom")
    local all = flow.when_all(bad, bad)
    assert.equal("boom", raised(flow.await, all))
    assert.same({ "boom", "boom" }, inner(all.exception))
  end))

  it("copies its input at the call", in_task(function()
    local input = { after(1, "a"), after(2, "b") }
    local all = flow.when_all(input)
    input[1], input[2], input[3], input.x = nil, after(1, "other"), after(1), 42
    assert.same({ n = 2, "a", "b" }, all:await())
  end))

  it("waits for all, whatever fails", in_task(function(clock)
    local start = clock:now()
    local all = flow.when_all(after(3), failing(1, "boom"), after(5))
    flow.sleep(2)
    assert.is_false(all.is_completed)
    assert.equal("boom", raised(flow.await, all))
    assert.equal(5, clock:now() - start)
  end))

  it("faults with an Aggregate in input order, and raises the first", in_task(function()
    local first, second = { "first" }, { "second" }
    local all = flow.when_all(after(1), failing(3, first), failing(2, second))
    assert.equal(first, raised(flow.await, all))
    assert.equal("faulted", all.status)
    assert.equal(2, #inner(all.exception))
    assert.is_true(rawequal(first, all.exception.inner_exceptions[1]))
    assert.is_true(rawequal(second, all.exception.inner_exceptions[2]))
    assert.equal(all.exception, all.exception)
    assert.equal(first, raised(function() return all.result end))
  end))

  it("faults with an Aggregate also for one error", in_task(function()
    local all = flow.when_all { a = failing(1, "boom"), b = after(1) }
    assert.equal("boom", raised(flow.await, all))
    assert.same({ "boom" }, inner(all.exception))
  end))

  it("lays the aggregates of inner when_all tasks side by side", in_task(function()
    local below = flow.when_all(failing(3, "b"), failing(1, "c"))
    local all = flow.when_all(failing(2, "a"), below, failing(1, "d"))
    assert.equal("a", raised(flow.await, all))
    assert.same({ "a", "b", "c", "d" }, inner(all.exception))
  end))

  it("keeps an Aggregate that a task raised itself as it is", in_task(function()
    local mine = flow.errors.Aggregate("mine", { inner_exceptions = { "x", "y" } })
    local all = flow.when_all(failing(1, mine), failing(1, "z"))
    assert.equal(mine, raised(flow.await, all))
    assert.equal(2, #inner(all.exception))
    assert.equal(mine, all.exception.inner_exceptions[1])
  end))

  it("raises an error of nil", in_task(function()
    local all = flow.when_all(after(1), Task.from_exception(nil))
    assert.same({ n = 2, false, nil }, table.pack(all:try_await()))
    assert.equal("faulted", all.status)
  end))

  it("is canceled when a task was and none failed, with the first error in input order", in_task(function()
    local first, second = stop("first"), stop("second")
    local all = flow.when_all(after(1), failing(3, first), failing(2, second))
    assert.is_true(rawequal(first, raised(flow.await, all)))
    assert.equal("canceled", all.status)
    assert.is_nil(all.exception)
  end))

  it("is faulted when a task failed and another was canceled", in_task(function()
    local all = flow.when_all(failing(1, stop("first")), failing(2, "boom"))
    assert.equal("boom", raised(flow.await, all))
    assert.equal("faulted", all.status)
    assert.same({ "boom" }, inner(all.exception))
  end))

  it("names the element that is not awaitable, at once", in_task(function()
    local task = Task.completed_task
    local cases = {
      { function() local _ = flow.when_all({ task, 42 }) end, "2" },
      { function() local _ = flow.when_all({ n = 3, task }) end, "2" },
      { function() local _ = flow.when_all({ user = task, orders = {} }) end, "orders" },
      { function() local _ = flow.when_all(task, task, "x") end, "3" },
      { function() local _ = flow.when_all(task, nil, task) end, "2" },
      { function() local _ = flow.when_all(nil) end, "1" },
      { function() local _ = flow.when_all(42) end, "1" },
    }
    for i, case in ipairs(cases) do
      local err = raised(case[1])
      assert.equal("string", type(err), "case " .. i)
      assert.truthy(err:find("bad argument #%d+ to 'when_all'"), err)
      assert.truthy(err:match("bad argument.*$"):find(case[2], 1, true), err)
    end
  end))

  it("serves 100,000 tasks", in_task(function()
    local gate = flow.TaskCompletionSource()
    local input = {}
    local count = helper.many(100000)
    for i = 1, count do
      input[i] = gate.task
    end
    local all = flow.when_all(input)
    gate:set_result("it")
    local results = all:await()
    assert.same({ count, "it", "it" }, { results.n, results[1], results[count] })
  end))

  it("nests 10,000 deep", in_task(function()
    local gate = flow.TaskCompletionSource()
    local task = gate.task
    for _ = 1, helper.many(10000) do
      task = flow.when_all(task)
    end
    gate:set_exception("boom")
    assert.equal("boom", raised(flow.await, task))
    assert.same({ "boom" }, inner(task.exception))
  end))
end)

describe("when_any", function()
  it("gives the task that was first and its key", in_task(function(clock)
    local start = clock:now()
    local slow, quick = after(2, "slow"), after(1, "quick")
    assert.same({ n = 2, quick, 2 }, table.pack(flow.when_any(slow, quick):await()))
    assert.equal(1, clock:now() - start)
    assert.same({ n = 2, quick, 2 }, table.pack(flow.when_any({ slow, quick }):await()))
    assert.same({ n = 2, quick, "q" }, table.pack(flow.when_any({ s = slow, q = quick }):await()))
    assert.equal(flow.when_any, Task.when_any)
    slow:await()
  end))

  it("gives a first one that failed or was canceled, and does not fail itself", in_task(function()
    local slow = after(5)
    for _, err in ipairs { "boom", stop("enough") } do
      local bad = failing(1, err)
      local any = flow.when_any(slow, bad)
      local first, key = any:await()
      assert.equal(bad, first)
      assert.equal(2, key)
      assert.equal("ran_to_completion", any.status)
      assert.equal(err, raised(flow.await, bad))
    end
    slow:await()
  end))

  it("prefers the first in input order of those that are complete already", in_task(function()
    local gate = flow.TaskCompletionSource()
    local a, b = Task.from_result("a"), Task.from_result("b")
    local any = flow.when_any(gate.task, b, a)
    assert.equal("ran_to_completion", any.status)
    assert.same({ n = 2, b, 2 }, table.pack(any:await()))
    gate:set_result()
  end))

  it("gives the one that was completed first, not the first in the input", in_task(function()
    local a, b = flow.TaskCompletionSource(), flow.TaskCompletionSource()
    local any = flow.when_any(a.task, b.task)
    b:set_result()
    a:set_result()
    assert.equal(b.task, (any:await()))
  end))

  it("of nothing is an Argument error", in_task(function()
    raises("Argument", flow.when_any)
    raises("Argument", flow.when_any, {})
    raises("Argument", flow.when_any, { n = 0 })
  end))

  it("names the element that is not awaitable, at once", in_task(function()
    local task = Task.completed_task
    for _, attempt in ipairs {
      function() local _ = flow.when_any({ task, 42 }) end,
      function() local _ = flow.when_any(task, 42) end,
      function() local _ = flow.when_any(task, nil) end,
    } do
      local err = raised(attempt)
      assert.truthy(err:match("bad argument #%d+ to 'when_any'.*$"):find("2", 1, true), err)
    end
  end))

  it("leaves the others running", in_task(function()
    local log, note = recorder()
    local others = {}
    for i = 2, 3 do
      others[i - 1] = flow.spawn(function()
        flow.sleep(i)
        note(i)
      end)
    end
    flow.when_any(after(1), table.unpack(others)):await()
    note("any")
    flow.await_all(others)
    assert.same({ "any", "2", "3" }, log)
  end))

  it("leaves nothing registered on a task that lives on", in_task(function()
    local gate = flow.TaskCompletionSource()
    local grown = helper.growth(100, helper.many(5000), function()
      flow.when_any(gate.task, flow.delay(1)):await()
    end)
    assert.is_true(grown < 50, ("%.0f KB more"):format(grown))
    gate:set_result()
  end))

  it("takes the same task twice", in_task(function()
    local task = after(1)
    assert.same({ n = 2, task, 1 }, table.pack(flow.when_any(task, task):await()))
  end))
end)

describe("when_each", function()
  it("iterates in order of completion, with the keys", in_task(function(clock)
    local log, note = recorder()
    local start = clock:now()
    local tasks = { after(3, "a"), after(1, "b"), after(2, "c") }
    for task, key in flow.when_each(tasks) do
      assert.equal(tasks[key], task)
      note(key, task.result, clock:now() - start == ({ 3, 1, 2 })[key])
    end
    assert.same({ "2 b true", "3 c true", "1 a true" }, log)
    assert.equal(flow.when_each, Task.when_each)
  end))

  it("ends for all that pull from the same iterator", in_task(function()
    local keys, next, completed = {}, flow.when_each { after(1, "a"), after(2, "b"), after(3, "c") }
    local function pull()
      for _, key in next, completed do keys[#keys + 1] = key end
    end
    flow.await_all(flow.spawn(pull), flow.spawn(pull))
    assert.same({ 1, 2, 3 }, keys)
  end))

  it("gives first those that are complete, in input order, without suspending", in_task(function()
    local log, note = recorder()
    local queued = flow.spawn(note, "queued")
    local gate = flow.TaskCompletionSource()
    for _, key in flow.when_each { gate.task, Task.from_result(1), Task.from_result(2) } do
      note(key)
      if key == 3 then
        gate:set_result()
        break
      end
    end
    queued:await()
    assert.same({ "2", "3", "queued" }, log)
  end))

  it("gives faulted and canceled tasks as items", in_task(function()
    local log, note = recorder()
    local tasks = { failing(2, "boom"), failing(1, stop("enough")), after(3) }
    for task in flow.when_each(tasks) do
      note(task.status)
    end
    assert.same({ "canceled", "faulted", "ran_to_completion" }, log)
  end))

  it("takes a table with any keys", in_task(function()
    local log, note = recorder()
    for task, key in flow.when_each { a = after(2, 1), b = after(1, 2) } do
      note(key, task.result)
    end
    assert.same({ "b 2", "a 1" }, log)
  end))

  it("iterates over nothing", in_task(function()
    for _ in flow.when_each {} do
      error("an item of nothing")
    end
  end))

  it("keeps the order of completion while its body suspends", in_task(function()
    local log, note = recorder()
    for _, key in flow.when_each { after(2), after(1), after(3) } do
      flow.sleep(5)
      note(key)
    end
    assert.same({ "2", "1", "3" }, log)
  end))

  it("leaves the others running when it is left early", in_task(function()
    local log, note = recorder()
    local slow = flow.spawn(function()
      flow.sleep(2)
      note("slow")
    end)
    for task, key in flow.when_each { slow, after(1) } do
      note(key)
      if task.is_completed then
        break
      end
    end
    slow:await()
    assert.same({ "2", "slow" }, log)
  end))

  it("leaves nothing registered on a task that lives on when it is left early", in_task(function()
    local gate = flow.TaskCompletionSource()
    local grown = helper.growth(100, helper.many(5000), function()
      for task in flow.when_each { gate.task, flow.delay(1) } do
        if task.is_completed then
          break
        end
      end
    end)
    assert.is_true(grown < 50, ("%.0f KB more"):format(grown))
    gate:set_result()
  end))

  it("says how its iterator is used where it gets no state", in_task(function()
    local use = "the state of a when_each iteration expected: for task, key in flow.when_each(tasks) do"
    local iterator = flow.when_each { Task.completed_task }
    for _, wrong in ipairs {
      function() return iterator() end,
      function() return iterator(Task.completed_task) end,
      function() return iterator("x") end,
      function() for _ in iterator do end end,
    } do
      local err = raised(wrong)
      assert.truthy(err:find(use, 1, true), err)
      assert.matches("combine_spec.lua:%d+: bad argument #1 to '[%w ]+' %(", err)
    end
    for task in flow.when_each { Task.completed_task } do assert.equal(Task.completed_task, task) end
  end))

  it("names the element that is not awaitable, at the call", in_task(function()
    local err = raised(function()
      local _ = flow.when_each { Task.completed_task, 42 }
    end)
    assert.truthy(err:match("bad argument #1 to 'when_each'.*$"):find("2", 1, true), err)
    assert.equal(helper.here(-3), err:match("[^/]*:%d+"))
  end))
end)

describe("await_all", function()
  it("gives the first values one by one", in_task(function(clock)
    local start = clock:now()
    local got = table.pack(flow.await_all(after(2, "a", "dropped"), after(1), after(3, false), after(1, nil)))
    assert.same({ n = 4, "a", nil, false, nil }, got)
    assert.equal(3, clock:now() - start)
    assert.same({ n = 2, 1, 2 }, table.pack(flow.await_all { after(1, 1), after(1, 2) }))
    assert.equal(0, select("#", flow.await_all()))
    assert.equal(0, select("#", flow.await_all {}))
  end))

  it("gives the table for a table with keys", in_task(function()
    local got = table.pack(flow.await_all { user = after(1, 1), orders = after(2, 2) })
    assert.same({ n = 1, { user = 1, orders = 2 } }, got)
  end))

  it("does not suspend for complete tasks", in_task(function()
    local log, note = recorder()
    local queued = flow.spawn(note, "queued")
    note(flow.await_all(Task.from_result(1), Task.from_result(2)))
    queued:await()
    assert.same({ "1 2", "queued" }, log)
  end))

  it("raises the one error as it is, after all have ended", in_task(function(clock)
    local start = clock:now()
    local value = {}
    assert.is_true(rawequal(value, raised(flow.await_all, failing(1, value), after(3))))
    assert.equal(3, clock:now() - start)
  end))

  it("raises an Aggregate in input order when several failed", in_task(function()
    local err = raised(flow.await_all, failing(2, "a"), after(1), failing(1, "b"))
    assert.same({ "a", "b" }, inner(err))
  end))

  it("raises the cancellation when none failed, and else the failure", in_task(function()
    local canceled = stop("enough")
    assert.equal(canceled, raised(flow.await_all, after(1), failing(1, canceled), failing(1, stop("other"))))
    assert.equal("boom", raised(flow.await_all, failing(1, canceled), failing(2, "boom")))
  end))

  it("gives 200 values one by one", in_task(function()
    local tasks = {}
    for i = 1, 200 do
      tasks[i] = after(1, i)
    end
    local got = table.pack(flow.await_all(tasks))
    assert.same({ 200, 1, 200 }, { got.n, got[1], got[200] })
  end))
end)

describe("await_any", function()
  it("gives the first task and its key", in_task(function()
    local slow, quick = after(2), after(1)
    assert.same({ n = 2, quick, 2 }, table.pack(flow.await_any(slow, quick)))
    assert.same({ n = 2, quick, "q" }, table.pack(flow.await_any { s = slow, q = quick }))
    slow:await()
  end))

  it("does not raise the first task's error", in_task(function()
    local bad = failing(1, "boom")
    local slow = after(2)
    assert.equal(bad, (flow.await_any(slow, bad)))
    assert.equal("boom", raised(flow.await, bad))
    slow:await()
  end))

  it("does not suspend when one is complete", in_task(function()
    local log, note = recorder()
    local queued = flow.spawn(note, "queued")
    local _, key = flow.await_any(queued, Task.completed_task)
    note(key)
    queued:await()
    assert.same({ "2", "queued" }, log)
  end))

  it("of nothing is an Argument error", in_task(function()
    raises("Argument", flow.await_any)
    raises("Argument", flow.await_any, {})
  end))
end)

-- So many completion sources, and the list of their tasks.
local function gates(n)
  local sources, tasks = {}, {}
  for i = 1, n do
    sources[i] = flow.TaskCompletionSource()
    tasks[i] = sources[i].task
  end
  return sources, tasks
end

-- Inputs in numbers that take different ways inside: few, many, and so many that they need a task of their own.
local SIZES = helper.many(1, 0) == 1 and { 2, 8, 9, 60, 128, 129, 300 } or { 2, 9, 20 }

describe("a direct wait for several", function()
  after_each(function() flow.on_unobserved_exception(false) end)

  it("works with any number of inputs, as arguments, in a list, and by keys", in_task(function()
    for _, n in ipairs(SIZES) do
      for last = 1, n, math.max(1, n - 1) do
        local sources, tasks = gates(n)
        flow.spawn(sources[last].set_result, sources[last], "it")
        assert.same({ n = 2, tasks[last], last }, table.pack(flow.await_any(tasks)))
        sources, tasks = gates(n)
        flow.spawn(sources[last].set_result, sources[last], "it")
        assert.same({ n = 2, tasks[last], last }, table.pack(flow.await_any(table.unpack(tasks))))
        local keyed = {}
        for i = 1, n do keyed["k" .. i] = tasks[i] end
        assert.same({ n = 2, tasks[last], "k" .. last }, table.pack(flow.await_any(keyed)))
      end
      local sources, tasks = gates(n)
      flow.spawn(function()
        for i = n, 1, -1 do
          sources[i]:set_result(i)
          if i % 5 == 0 then flow.yield() end
        end
      end)
      local got = table.pack(flow.await_all(tasks))
      assert.same({ n, 1, n }, { got.n, got[1], got[n] })
      local keyed = {}
      for i = 1, n do keyed["k" .. i] = tasks[i] end
      local by_key = flow.await_all(keyed)
      for i = 1, n do assert.equal(i, by_key["k" .. i]) end
    end
  end))

  it("takes a list in its order however its table was filled", in_task(function()
    for _, n in ipairs { 3, 7, 20 } do
      local sources, tasks = gates(n)
      local backwards = { extra = true }
      for i = n, 1, -1 do backwards[i] = tasks[i] end
      backwards.extra = nil
      flow.spawn(function()
        for i = 1, n do sources[i]:set_result(i) end
      end)
      local got = table.pack(flow.await_all(backwards))
      for i = 1, n do assert.equal(i, got[i]) end
      assert.equal(n, got.n)
      local first, key = flow.await_any(backwards)
      assert.equal(tasks[1], first)
      assert.equal(1, key)
    end
  end))

  it("takes a table with holes by its keys", in_task(function()
    local _, tasks = gates(2)
    local done = Task.from_result("done")
    for _, any in ipairs { flow.await_any, function(t) return flow.when_any(t):await() end } do
      assert.same({ n = 2, done, "x" }, table.pack(any { nil, tasks[1], x = done }))
      assert.same({ n = 2, done, 3 }, table.pack(any { tasks[1], nil, done }))
    end
    assert.same({ [2] = "done", x = "done" }, (flow.await_all { nil, done, x = done }))
    assert.same({ [2] = "done", x = "done" }, flow.when_all({ nil, done, x = done }):await())
  end))

  it("copies its input at the call", in_task(function()
    for _, n in ipairs { 2, 20 } do
      local sources, tasks = gates(n)
      local input = table.move(tasks, 1, n, 1, {})
      flow.spawn(function()
        for i = 1, n do input[i] = 42 end
        collectgarbage()
        for i = 1, n do sources[i]:set_result(i) end
      end)
      assert.equal(n, select("#", flow.await_all(input)))
      sources, tasks = gates(n)
      input = table.move(tasks, 1, n, 1, {})
      flow.spawn(function()
        for i = 1, n do input[i] = nil end
        collectgarbage()
        sources[n]:set_result()
      end)
      assert.equal(tasks[n], (flow.await_any(input)))
    end
  end))

  it("does not keep the table that it was given", in_task(function()
    for _, n in ipairs { 2, 20 } do
      local sources, tasks = gates(n)
      local given = setmetatable({}, { __mode = "v" })
      local function start()
        local input = table.move(tasks, 1, n, 1, {})
        given[1] = input
        return flow.spawn(flow.await_any, input)
      end
      local waiter = start()
      flow.yield()
      helper.collect()
      assert.is_nil(given[1])
      sources[1]:set_result()
      waiter:await()
    end
  end))

  it("wakes the waiters of a task in the order they came, whatever they wait with", in_order(function()
    local log, note = recorder()
    local sources, tasks = gates(20)
    for round = 1, 4 do
      for i = #log, 1, -1 do log[i] = nil end
      sources[1], tasks[20] = flow.TaskCompletionSource(), flow.spawn(flow.yield)
      tasks[1] = sources[1].task
      local waits = {
        function() flow.await_any(tasks) end,
        function() flow.await(tasks[1]) end,
        function() flow.await_any(tasks[1], tasks[2]) end,
        function() flow.await_all(tasks[1], tasks[1]) end,
        function() flow.await_any(tasks) end,
      }
      flow.await_any(tasks)
      tasks[20] = nil
      local running = {}
      for i, wait in ipairs(waits) do
        running[i] = flow.async(function()
          wait()
          note(i)
        end)()
      end
      sources[1]:set_result()
      flow.await_all(running)
      assert.same({ "1", "2", "3", "4", "5" }, log, "round " .. round)
    end
  end))

  it("leaves nothing registered on tasks that live on", in_task(function()
    for _, n in ipairs { 1, 2, 30 } do
      local _, tasks = gates(n)
      local grown = helper.growth(helper.many(100, 5), helper.many(1000, 10), function()
        tasks[n + 1] = flow.spawn(flow.yield)
        flow.await_any(tasks)
        tasks[n + 1] = nil
        pcall(flow.with_timeout, 1, flow.await_any, tasks)
        pcall(flow.with_timeout, 1, flow.await_all, tasks)
      end)
      assert.is_true(grown < 100, ("%.0f KB more with %d"):format(grown, n))
    end
  end))

  it("keeps no waiter alive by tasks that it had waited for before", in_task(function()
    for _, n in ipairs { 3, 40 } do
      local reports = {}
      flow.on_unobserved_exception(function(err) reports[#reports + 1] = err end)
      local sources, tasks = gates(n)
      local function often()
        for _ = 1, 5 do
          tasks[n + 1] = flow.spawn(flow.yield)
          flow.await_any(tasks)
        end
        tasks[n + 1] = nil
      end
      local function lost()
        local _, them = gates(n)
        flow.await_any(them)
      end
      local function start()
        flow.spawn(function()
          often()
          lost()
        end)
        for _ = 1, 30 do flow.yield() end
        flow.spawn(often):await()
        flow.spawn(lost)
        for _ = 1, 30 do flow.yield() end
      end
      start()
      helper.collect()
      assert.same({ 2, true, true },
        { #reports, flow.errors.is(reports[1], "TaskAbandoned"), flow.errors.is(reports[2], "TaskAbandoned") })
      flow.spawn(function() for i = 1, n do sources[i]:set_result(i) end end)
      assert.equal(n, select("#", flow.await_all(tasks)))
    end
  end))

  it("keeps nothing of an ended wait alive by the losers", in_task(function()
    for _, n in ipairs { 2, 40 } do
      local sources, tasks = gates(n)
      local gone = setmetatable({}, { __mode = "k" })
      local function work()
        for _ = 1, 4 do
          tasks[n + 1] = flow.spawn(flow.yield)
          flow.await_any(tasks)
        end
        local value = {}
        gone[value], gone[flow.current_task()] = true, true
        tasks[n + 1] = flow.spawn(flow.yield)
        flow.await_any(tasks)
        return value
      end
      flow.spawn(work):await()
      tasks[n + 1] = nil
      helper.collect()
      assert.is_nil(next(gone))
      sources[1]:set_result()
    end
  end))

  it("withdraws when it is interrupted", in_task(function()
    for _, n in ipairs { 2, 30, 200 } do
      local sources, tasks = gates(n)
      for _, wait in ipairs { flow.await_any, flow.await_all, flow.await_any, flow.await_any } do
        for _ = 1, 3 do
          raises("Timeout", flow.with_timeout, 1, wait, tasks)
        end
      end
      local log, note = recorder()
      local waiter = flow.spawn(function()
        note(select("#", flow.await_all(tasks)))
      end)
      flow.yield()
      for i = 1, n do sources[i]:set_result(i) end
      waiter:await()
      assert.same({ tostring(n) }, log)
    end
  end))

  it("is interrupted once, also when an input completes before it goes on", in_order(function()
    for _, n in ipairs { 2, 30 } do
      local sources, tasks = gates(n)
      local waiter = flow.spawn(function()
        raises("OperationCanceled", flow.await_any, tasks)
        raises("OperationCanceled", flow.await_any, sources[2].task, sources[2].task)
        assert.equal(tasks[1], (flow.await_any(tasks)))
      end)
      flow.yield()
      waiter:cancel("enough")
      sources[1]:set_result()
      waiter:await()
      local other = flow.spawn(flow.await_any, tasks)
      flow.yield()
      assert.equal(tasks[1], (other:await()))
    end
  end))

  local closed = {}

  it("survives that somebody closes its coroutine", in_order(function()
    for _, n in ipairs { 2, 30 } do
      for _, wait in ipairs { flow.await_any, flow.await_all } do
        local sources, tasks = gates(n)
        for _ = 1, 3 do
          tasks[n + 1] = flow.spawn(flow.yield)
          flow.await_any(tasks)
        end
        tasks[n + 1] = nil
        local held = {}
        closed[#closed + 1] = flow.spawn(function()
          held.co = coroutine.running()
          wait(tasks)
        end)
        flow.yield()
        flow.on_unobserved_exception(function() end)
        coroutine.close(held.co)
        held.co = nil
        helper.collect()
        for i = n, 2, -1 do
          sources[i], tasks[i] = nil, nil
        end
        helper.collect()
        local delay = flow.delay(1)
        local other = flow.spawn(flow.await_any, tasks[1], delay)
        flow.yield()
        sources[1]:set_result("it")
        assert.equal(tasks[1], (other:await()))
        delay:cancel()
        helper.collect()
      end
    end
  end))

  it("tells what it waits for", in_order(function()
    local sources, tasks = gates(2)
    local waiter = flow.spawn(function() flow.await_any(tasks) end)
    waiter.name = "waiter"
    flow.yield()
    assert.truthy(waiter:traceback():find("waiter", 1, true))
    assert.truthy(tasks[2]:traceback():find("awaited by task 'when_any'", 1, true))
    assert.truthy(tasks[2]:traceback():find("awaited by task 'waiter'", 1, true))
    sources[1]:set_result()
    waiter:await()
  end))

  it("may begin where a finalizer completes an input", in_task(function()
    local sources, tasks, left
    local function garbage()
      setmetatable({}, { __gc = function()
        if left == 0 then return end
        left = left - 1
        sources[3 + left]:try_set_result(left)
        garbage()
      end })
    end
    for _, wait in ipairs { flow.await_any, flow.await_all, flow.await_any } do
      sources, tasks = gates(20)
      for i = 1, 20 do -- all have a waiter, so that the next one creates a table of them
        flow.spawn(flow.try_await, tasks[i])
      end
      flow.yield()
      left = 3
      garbage()
      local driver = flow.spawn(function()
        while left > 0 do
          collectgarbage()
          flow.sleep(1)
        end
        for i = 1, 20 do sources[i]:try_set_result(i) end
      end)
      local got = table.pack(wait(tasks))
      if wait == flow.await_any then
        assert.is_true(got[1].is_completed)
        assert.equal(tasks[got[2]], got[1])
      else
        assert.same({ 20, 1, 0, 20 }, { got.n, got[1], got[3], got[20] })
      end
      driver:await()
    end
  end))

  it("gives what a simple model gives, over and over", in_task(function()
    local seed = 4711
    local function random(n)
      seed = (seed * 1103515245 + 12345) % 2 ^ 31
      return seed // 65536 % n + 1
    end
    local sources, tasks = gates(40)
    local waits, ended = 0, false
    local function waiter(rounds)
      for _ = 1, rounds do
        local size = ({ 1, 3, 8, 9, 20, 40 })[random(6)]
        local set, keys, from = {}, {}, random(40)
        for i = 1, size do set[i] = tasks[(from + i) % 40 + 1] end
        if random(4) == 1 then set[#set + 1] = set[1] end
        for i, task in ipairs(set) do keys[i] = task end
        local how = random(5)
        if how == 1 then
          pcall(flow.with_timeout, 1, flow.await_any, set)
        elseif how == 2 then
          pcall(flow.with_timeout, 2, flow.await_all, set)
        else
          local pending = true
          for _, task in ipairs(set) do pending = pending and not task.is_completed end
          local task, key = flow.await_any(set)
          assert.equal(keys[key], task)
          assert.is_true(task.is_completed)
          if not pending then
            for i = 1, key - 1 do assert.is_false(keys[i].is_completed) end
          end
        end
        waits = waits + 1
      end
    end
    local waiters = {}
    local rounds = helper.many(60, 6)
    for i = 1, 6 do waiters[i] = flow.spawn(waiter, rounds) end
    local driver = flow.spawn(function()
      while not ended do
        local i = random(40)
        sources[i]:try_set_result(i)
        if random(3) == 1 then
          sources[i] = flow.TaskCompletionSource()
          tasks[i] = sources[i].task
        end
        if random(20) == 1 then collectgarbage() end
        flow.sleep(random(10) / 10)
      end
    end)
    flow.await_all(waiters)
    ended = true
    driver:await()
    assert.equal(6 * rounds, waits)
  end))
end)

describe("combinators together", function()
  it("nest", in_task(function()
    local any = flow.when_any(after(2, "a"), after(1, "b"))
    local got = flow.when_all({ flow.when_all(after(1, 1), after(2, 2)), any, after(3, 3) }):await()
    assert.same({ n = 2, 1, 2 }, got[1])
    assert.equal("b", got[2].result)
    assert.equal(3, got[3])
  end))

  it("take a task that awaits them, where others can still end the wait", in_task(function()
    local gate = flow.TaskCompletionSource()
    local task
    task = flow.spawn(function()
      local first = flow.await_any(task, gate.task)
      return first == gate.task
    end)
    flow.yield()
    gate:set_result()
    assert.is_true(task:await())
  end))
end)
