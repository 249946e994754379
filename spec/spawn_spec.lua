-- Starting tasks: spawn, async functions, call, cold tasks; and how deep all of it may go.

local flow = require "coflow"
local helper = require "spec.helper"

local Task = flow.Task
local in_task, recorder, raised, raises = helper.in_task, helper.recorder, helper.raised, helper.raises
local in_order = helper.in_order
local slowly = helper.slowly

describe("flow.spawn", function()
  it("starts its function on a later turn, in the order of the calls", in_order(function()
    local log, note = recorder()
    local a, b = flow.spawn(note, "a"), flow.spawn(note, "b")
    note(a.status, b.status)
    b:await()
    note(a.status, b.status)
    assert.same({ "waiting_to_run waiting_to_run", "a", "b", "ran_to_completion ran_to_completion" }, log)
  end))

  it("passes every argument and completes with every value", in_task(function()
    local task = flow.spawn(function(...) return select("#", ...), ... end, nil, 2, nil)
    assert.same({ n = 4, 3, nil, 2, nil }, table.pack(task:await()))
    assert.equal(0, select("#", flow.spawn(function() end):await()))
  end))

  it("gives a faulted task for an error", in_order(function()
    local value = {}
    local task = flow.spawn(error, value)
    flow.yield()
    assert.equal("faulted", task.status)
    assert.equal(value, raised(flow.await, task))
  end))

  it("gives a canceled task for an OperationCanceled, whatever its token", in_order(function()
    local canceled = flow.errors.OperationCanceled("enough")
    local task = flow.spawn(error, canceled)
    flow.yield()
    assert.equal("canceled", task.status)
    assert.equal(canceled, raised(flow.await, task))
  end))

  it("is also Task.run", in_task(function()
    assert.equal(flow.spawn, Task.run)
    assert.equal(5, Task.run(function() return 5 end):await())
  end))

  it("runs its function as the task that it returned", in_task(function()
    local root = flow.current_task()
    local task = flow.spawn(function()
      slowly()
      return flow.current_task()
    end)
    local found = task:await()
    assert.equal(task, found)
    assert.not_equal(root, found)
  end))

  it("starts under the values that were current at the call, and keeps its own writes", in_task(function()
    local log, note = recorder()
    local user = flow.AsyncLocal("user")
    user.value = "parent"
    local task = flow.spawn(function()
      note("starts with", user.value)
      user.value = "child"
      slowly()
      note("goes on with", user.value)
    end)
    user.value = "parent, later"
    task:await()
    note("parent has", user.value)
    assert.same({ "starts with parent", "goes on with child", "parent has parent, later" }, log)
  end))

  it("starts from inside a callback that cannot suspend", in_task(function()
    local tasks = {}
    string.gsub("abc", ".", function(letter)
      tasks[#tasks + 1] = flow.spawn(function()
        slowly()
        return letter
      end)
    end)
    assert.same({ n = 3, "a", "b", "c" }, table.pack(flow.await_all(tasks)))
  end))

  it("starts a function written in C", in_task(function()
    assert.equal("ABC", flow.spawn(string.upper, "abc"):await())
    assert.equal("done", flow.spawn(flow.await, flow.spawn(function() return "done" end)):await())
  end))

  it("runs 10,000 tasks at the same time", in_task(function()
    local n, tasks = helper.many(10000), {}
    for i = 1, n do
      tasks[i] = flow.spawn(slowly, i)
    end
    local results = flow.when_all(tasks):await()
    assert.equal(n, results.n)
    for i = 1, n do
      if results[i] ~= i then
        assert.equal(i, results[i])
      end
    end
  end))
end)

describe("an async function", function()
  it("runs at once, up to its first suspension", in_task(function()
    local log, note = recorder()
    local gate = flow.TaskCompletionSource()
    local fn = flow.async(function(name)
      note(name, "starts")
      gate.task:await()
      note(name, "goes on")
      return name
    end)
    note("before")
    local task = fn("a")
    note("after", task.status)
    gate:set_result()
    assert.equal("a", task:await())
    assert.same({ "before", "a starts", "after waiting_for_activation", "a goes on" }, log)
  end))

  it("gives a task that is already complete when it does not suspend", in_task(function()
    local task = flow.async(function(...) return ... end)(1, nil, 3, nil)
    assert.equal("ran_to_completion", task.status)
    assert.same({ n = 4, 1, nil, 3, nil }, table.pack(task:results()))
  end))

  it("does not suspend at an await of a complete task", in_task(function()
    local task = flow.async(function() return flow.await(Task.from_result(5)) + 1 end)()
    assert.equal(6, task.result)
  end))

  it("never raises: its error faults the task", in_task(function()
    for _, value in ipairs { "boom", {}, false } do
      local task = flow.async(function() error(value, 0) end)()
      assert.equal("faulted", task.status)
      assert.equal(value, task.exception)
    end
    local task = flow.async(error)()
    assert.equal("faulted", task.status)
    assert.is_nil(task.exception)
    assert.same({ n = 2, false, nil }, table.pack(task:try_await()))
  end))

  it("never raises: an OperationCanceled cancels the task", in_task(function()
    local task = flow.async(error)(flow.errors.OperationCanceled("enough"))
    assert.equal("canceled", task.status)
    raises("OperationCanceled", flow.await, task)
  end))

  it("gives a new task at each call", in_task(function()
    local fn = flow.async(function(v) return v end)
    local a, b = fn(1), fn(2)
    assert.not_equal(a, b)
    assert.same({ 1, 2 }, { a.result, b.result })
  end))

  it("is the current task while it runs, and its caller is again when it suspends or ends", in_task(function()
    local root = flow.current_task()
    local seen = {}
    local task = flow.async(function()
      seen[1] = flow.current_task()
      flow.yield()
      seen[2] = flow.current_task()
    end)()
    assert.equal(root, flow.current_task())
    task:await()
    assert.equal(root, flow.current_task())
    assert.same({ task, task }, seen)
  end))

  it("shows as running while it is on the stack, as its caller does", in_task(function()
    local root = flow.current_task()
    local inner, outer = flow.async(function() return flow.current_task().status, root.status end)():await()
    assert.same({ "running", "running" }, { inner, outer })
  end))

  it("keeps what it does to async locals from its caller, suspended or not", in_task(function()
    local log, note = recorder()
    local loc = flow.AsyncLocal()
    loc.value = 0
    local inner = flow.async(function(suspend)
      note("inner has", loc.value)
      loc.value = 2
      if suspend then
        flow.yield()
        note("inner still has", loc.value)
      end
    end)
    local outer = flow.async(function(suspend)
      loc.value = 1
      local task = inner(suspend)
      note("outer has", loc.value)
      task:await()
      note("outer has", loc.value)
    end)
    outer(false):await()
    note("root has", loc.value)
    outer(true):await()
    note("root has", loc.value)
    assert.same({
      "inner has 1", "outer has 1", "outer has 1", "root has 0",
      "inner has 1", "outer has 1", "inner still has 2", "outer has 1", "root has 0",
    }, log)
  end))

  it("keeps what it does to async locals from its caller when it raises", in_task(function()
    local loc = flow.AsyncLocal()
    local task = flow.async(function()
      loc.value = "inner"
      error("boom")
    end)()
    assert.is_nil(loc.value)
    assert.is_false((task:try_await()))
  end))

  it("starts, and may suspend, also inside callbacks that cannot", in_order(function()
    local log, note = recorder()
    local fn = flow.async(function(name)
      note(name, "starts")
      flow.yield()
      note(name, "ends")
    end)
    local tasks = {}
    string.gsub("ab", ".", function(name)
      tasks[#tasks + 1] = fn(name)
      note("back from", name)
    end)
    flow.await_all(tasks)
    assert.same({ "a starts", "back from a", "b starts", "back from b", "a ends", "b ends" }, log)
  end))

  it("starts at once outside every task too", function()
    local log, note = recorder()
    local gate = flow.TaskCompletionSource()
    local task = flow.async(function()
      note("starts")
      gate.task:await()
      note("ends")
      return 5
    end)()
    note(task.status)
    gate:set_result()
    assert.equal(5, flow.await(task))
    assert.same({ "starts", "waiting_for_activation", "ends" }, log)
  end)

  it("serves as a method", in_task(function()
    local Account = { deposit = flow.async(function(self, sum)
      flow.yield()
      self.balance = self.balance + sum
      return self.balance
    end) }
    Account.__index = Account
    local account = setmetatable({ balance = 1 }, Account)
    assert.equal(3, account:deposit(2):await())
  end))
end)

describe("flow.call", function()
  it("calls on the current task, with every argument and value", in_task(function()
    local root = flow.current_task()
    local got = table.pack(flow.call(function(...)
      assert.equal(root, flow.current_task())
      slowly()
      assert.equal(root, flow.current_task())
      return select("#", ...), ...
    end, nil, 2, nil))
    assert.same({ n = 4, 3, nil, 2, nil }, got)
  end))

  it("puts the context back on return", in_task(function()
    local loc = flow.AsyncLocal()
    loc.value = "outer"
    local seen = flow.call(function()
      local before = loc.value
      loc.value = "inner"
      slowly()
      return before .. ", " .. loc.value
    end)
    assert.equal("outer, inner", seen)
    assert.equal("outer", loc.value)
  end))

  it("puts the context back on an error, which comes out unchanged", in_task(function()
    local loc = flow.AsyncLocal()
    local value = {}
    for _, suspend in ipairs { slowly, type } do
      assert.equal(value, raised(flow.call, function()
        loc.value = "inner"
        suspend(loc)
        error(value)
      end))
      assert.is_nil(loc.value)
    end
  end))

  it("puts the context back on a cancellation", in_task(function(clock)
    local loc = flow.AsyncLocal()
    local source = flow.CancellationTokenSource(2)
    raises("OperationCanceled", flow.call, function()
      loc.value = "inner"
      flow.sleep(10, source.token)
    end)
    assert.is_nil(loc.value)
    assert.equal(2, clock:now())
  end))

  it("nests 10,000 deep, suspended at the bottom or not", in_task(function()
    local deep, loc = helper.many(10000), flow.AsyncLocal()
    local function nest(n, bottom)
      loc.value = n
      if n == 0 then
        bottom()
        return 0
      end
      return 1 + flow.call(nest, n - 1, bottom)
    end
    for _, bottom in ipairs { slowly, type } do
      loc.value = "outer"
      assert.equal(deep, flow.call(nest, deep, function() bottom(loc) end))
      assert.equal("outer", loc.value)
    end
  end))

  it("lets an error out of 10,000 nested calls", in_task(function()
    local value = {}
    local function nest(n)
      if n == 0 then
        error(value)
      end
      flow.call(nest, n - 1)
    end
    assert.equal(value, raised(nest, helper.many(10000)))
  end))
end)

describe("a cold task", function()
  it("does not run before it is started", in_task(function()
    local log, note = recorder()
    local task = Task.new(note, "runs")
    flow.yield()
    note(task.status)
    task:start()
    note(task.status)
    task:await()
    note(task.status)
    assert.same({ "created", "waiting_to_run", "runs", "ran_to_completion" }, log)
  end))

  it("passes every argument and completes with every value", in_task(function()
    local task = Task.new(function(...) return select("#", ...), ... end, nil, 2, nil)
    task:start()
    assert.same({ n = 4, 3, nil, 2, nil }, table.pack(task:await()))
  end))

  it("takes its place at the end of the ready queue when it is started", in_order(function()
    local log, note = recorder()
    local cold = Task.new(note, "cold")
    local a = flow.spawn(note, "a")
    cold:start()
    local b = flow.spawn(note, "b")
    flow.await_all(b, a, cold)
    assert.same({ "a", "cold", "b" }, log)
  end))

  it("may be awaited before it is started", in_order(function()
    local cold = Task.new(function() return 5 end)
    local waiter = flow.spawn(function() return cold:await() end)
    flow.yield()
    assert.equal("waiting_for_activation", waiter.status)
    cold:start()
    assert.equal(5, waiter:await())
  end))

  it("faults and cancels as any task does", in_task(function()
    local faulted = Task.new(error, "boom", 0)
    local canceled = Task.new(error, flow.errors.OperationCanceled("enough"))
    faulted:start()
    canceled:start()
    assert.equal("boom", raised(flow.await, faulted))
    raises("OperationCanceled", flow.await, canceled)
    assert.same({ "faulted", "canceled" }, { faulted.status, canceled.status })
  end))

  it("runs at once by run_synchronously", in_task(function()
    local log, note = recorder()
    local task = Task.new(function()
      note("runs", flow.current_task().status)
      return 5
    end)
    task:run_synchronously()
    note(task.status)
    assert.equal(5, task.result)
    assert.same({ "runs running", "ran_to_completion" }, log)
  end))

  it("runs up to its first suspension by run_synchronously", in_task(function()
    local log, note = recorder()
    local gate = flow.TaskCompletionSource()
    local task = Task.new(function()
      note("starts")
      gate.task:await()
      note("ends")
    end)
    task:run_synchronously()
    note(task.status)
    gate:set_result()
    task:await()
    assert.same({ "starts", "waiting_for_activation", "ends" }, log)
  end))

  it("keeps its error to itself in run_synchronously", in_task(function()
    local value = {}
    local task = Task.new(error, value)
    task:run_synchronously()
    assert.equal("faulted", task.status)
    assert.equal(value, task.exception)
  end))

  it("is started once only", in_task(function()
    local log, note = recorder()
    local function cold(how)
      local task = Task.new(note, how)
      task[how](task)
      return task
    end
    for _, how in ipairs { "start", "run_synchronously" } do
      local task = cold(how)
      for _ = 1, 2 do
        raises("InvalidOperation", task.start, task)
        raises("InvalidOperation", task.run_synchronously, task)
        task:await()
      end
    end
    assert.same({ "start", "run_synchronously" }, log)
  end))

  it("is the only kind that can be started", in_task(function()
    local gate = flow.TaskCompletionSource()
    local tasks = {
      flow.spawn(function() end), flow.async(function() end)(), flow.async(flow.yield)(), flow.delay(1),
      Task.completed_task, gate.task, flow.current_task(),
    }
    for _, task in ipairs(tasks) do
      local status = task.status
      raises("InvalidOperation", task.start, task)
      raises("InvalidOperation", task.run_synchronously, task)
      assert.equal(status, task.status)
    end
    gate:set_result()
    flow.await_all(tasks[1], tasks[3], tasks[4])
  end))

  it("may be started from inside another, and outside every task", function()
    local log, note = recorder()
    local inner = Task.new(note, "inner")
    local outer = Task.new(function()
      inner:start()
      note("outer")
    end)
    outer:start()
    assert.same({}, log)
    flow.await_all(outer, inner)
    assert.same({ "outer", "inner" }, log)
  end)

  it("that is never started leaves nothing behind", in_task(function()
    Task.new(error, "never")
    helper.collect()
  end))
end)

describe("a task's stack", function()
  it("overflows into an error that faults the task", in_task(function()
    local function descend() return 1 + descend() end
    local function descend_in_c() return (string.gsub("x", "x", descend_in_c)) end
    for _, fn in ipairs { descend, descend_in_c } do
      local task = flow.spawn(fn)
      assert.truthy(tostring(raised(flow.await, task)):find("stack overflow", 1, true))
      assert.equal("faulted", task.status)
    end
  end))

  it("takes and gives 100,000 values at once", in_task(function()
    local values = {}
    for i = 1, 100000 do
      values[i] = i
    end
    local function echo(...)
      flow.yield()
      return ...
    end
    local gate = flow.TaskCompletionSource()
    gate:set_result(table.unpack(values))
    local function check(...)
      assert.equal(100000, select("#", ...))
      assert.equal(100000, (select(-1, ...)))
    end
    check(flow.spawn(echo, table.unpack(values)):await())
    check(flow.async(echo)(table.unpack(values)):await())
    check(flow.call(echo, table.unpack(values)))
    check(Task.from_result(table.unpack(values)):results())
    check(gate.task:await())
    check(select(2, flow.try_await(gate.task)))
  end))
end)

describe("depth", function()
  local DEEP = helper.many(100000)

  it("of 100,000 async functions that call each other recursively is no limit", in_task(function()
    local function start(bottom)
      local descend
      descend = flow.async(function(n)
        if n == 0 then
          bottom()
          return 0
        end
        return descend(n - 1):await() + 1
      end)
      return descend(DEEP)
    end
    assert.equal(DEEP, start(function() end):await())
    assert.equal(DEEP, start(flow.yield):await())
  end))

  it("of 100,000 async functions lets the error at the bottom out, unchanged", in_task(function()
    local value = {}
    local descend
    descend = flow.async(function(n)
      if n == 0 then
        error(value)
      end
      return descend(n - 1):await()
    end)
    local task = descend(DEEP)
    assert.equal(value, raised(flow.await, task))
    assert.equal("faulted", task.status)
  end))

  it("of 100,000 hot starts that do not wait for each other is no limit", in_task(function()
    local ended = 0
    local last
    local descend
    descend = flow.async(function(n)
      if n > 0 then
        last = descend(n - 1)
      end
      ended = ended + 1
    end)
    local first = descend(DEEP)
    first:await()
    last:await()
    for _ = 1, 3 do
      flow.yield()
    end
    assert.equal(DEEP + 1, ended)
  end))

  it("of a chain of 100,000 tasks each awaiting the next is no limit", in_task(function()
    local gate = flow.TaskCompletionSource()
    local increment = flow.async(function(task) return task:await() + 1 end)
    local task = gate.task
    for _ = 1, DEEP do
      task = increment(task)
    end
    gate:set_result(0)
    assert.equal(DEEP, task:await())
  end))

  it("of 100,000 tasks each spawning and awaiting the next is no limit", in_task(function()
    local function descend(n)
      if n == 0 then
        return 0
      end
      return flow.spawn(descend, n - 1):await() + 1
    end
    assert.equal(DEEP, flow.spawn(descend, DEEP):await())
  end))
end)
