-- flow.run, flow.main, flow.loop, top-level await, and the order of what is ready.

local flow = require "coflow"
local helper = require "spec.helper"

local in_task, recorder, raised, raises = helper.in_task, helper.recorder, helper.raised, helper.raises
local in_order = helper.in_order
local is_error, child, output = helper.is_error, helper.child, helper.output

describe("flow.run", function()
  it("gives its function the arguments and returns all of its values", function()
    local got = table.pack(flow.run(function(...)
      return select("#", ...), ...
    end, 1, nil, "three", nil))
    assert.same({ n = 5, 4, 1, nil, "three", nil }, got)
    assert.equal(0, select("#", flow.run(function() end)))
  end)

  it("returns the values of a function that was suspended", function()
    local got = table.pack(flow.run(function()
      flow.yield()
      return nil, flow.await(flow.spawn(function() return "x", nil end))
    end))
    assert.same({ n = 3, nil, "x", nil }, got)
  end)

  it("raises its function's error", function()
    local value = {}
    assert.equal(value, raised(flow.run, function()
      flow.yield()
      error(value)
    end))
  end)

  it("raises the OperationCanceled that its function ended with", function()
    local canceled = flow.errors.OperationCanceled("enough")
    assert.equal(canceled, raised(flow.run, function() error(canceled) end))
  end)

  it("can be called again, after a success and after an error", function()
    assert.equal(1, flow.run(function() return 1 end))
    assert.equal("x", raised(flow.run, function() error("x", 0) end))
    assert.equal(2, flow.run(function() return 2 end))
  end)

  it("leaves the other tasks where they are, for a later run", function()
    local log, note = recorder()
    local gate = flow.TaskCompletionSource()
    local other
    flow.run(function()
      other = flow.spawn(function()
        note("starts")
        gate.task:await()
        note("ends")
      end)
      flow.yield()
      note("root ends")
    end)
    assert.equal("waiting_for_activation", other.status)
    gate:set_result()
    assert.same({ "starts", "root ends" }, log)
    flow.run(function()
      other:await()
      note("second root ends")
    end)
    assert.same({ "starts", "root ends", "ends", "second root ends" }, log)
  end)

  it("starts once, here or in a later run, what was only queued when the root ended", function()
    local log, note = recorder()
    flow.run(function() flow.spawn(note, "late") end)
    flow.run(flow.yield)
    assert.same({ "late" }, log)
  end)

  it("starts what was spawned before it", function()
    local log, note = recorder()
    local task = flow.spawn(note, "spawned outside")
    assert.same({}, log)
    flow.run(function()
      task:await()
      note("root")
    end)
    assert.same({ "spawned outside", "root" }, log)
  end)

  it("has a root task, and none outside", function()
    assert.is_nil(flow.current_task())
    local root = flow.run(flow.current_task)
    assert.equal("ran_to_completion", root.status)
    assert.is_nil(flow.current_task())
    raised(flow.run, error)
    assert.is_nil(flow.current_task())
  end)

  it("works in a plain coroutine and in callbacks of C, outside every task", function()
    local function answer()
      return flow.run(function() return helper.slowly("it") end)
    end
    assert.equal("it", coroutine.wrap(answer)())
    assert.equal("it", (string.gsub("x", "x", answer)))
  end)

  it("is refused in a task, with the advice to await", in_task(function()
    local never = false
    local function attempt()
      return raises("InvalidOperation", flow.run, function() never = true end)
    end
    is_error("InvalidOperation", attempt(), "await")
    is_error("InvalidOperation", flow.spawn(attempt):await(), "await")
    is_error("InvalidOperation", flow.async(attempt)().result, "await")
    is_error("InvalidOperation", coroutine.wrap(attempt)(), "await")
    flow.yield()
    assert.is_false(never)
  end))

  it("raises InvalidOperation when nothing can complete its task, and can be called again", function()
    assert.equal("false true true\nagain\n", output [[
      local flow = require "coflow"
      local gate = flow.TaskCompletionSource()
      local ok, err = pcall(flow.run, function() gate.task:await() end)
      print(("%s %s %s"):format(ok, flow.errors.is(err, "InvalidOperation"), #err.message > 0))
      print(flow.run(function() return "again" end))
    ]])
  end)

  it("raises InvalidOperation when several tasks wait and none can go on", function()
    assert.equal("false true\n", output [[
      local flow = require "coflow"
      local gate = flow.TaskCompletionSource()
      local ok, err = pcall(flow.run, function()
        local other = flow.spawn(function() gate.task:await() end)
        flow.yield()
        flow.await_all(other, gate.task)
      end)
      print(("%s %s"):format(ok, flow.errors.is(err, "InvalidOperation")))
    ]])
  end)

  it("raises InvalidOperation once the last timer that was alive has passed", function()
    assert.equal("slept\nfalse true\n", output [[
      local flow = require "coflow"
      local gate = flow.TaskCompletionSource()
      local ok, err = pcall(flow.run, function()
        flow.spawn(function() flow.sleep(0.001) print("slept") end)
        gate.task:await()
      end)
      print(("%s %s"):format(ok, flow.errors.is(err, "InvalidOperation")))
    ]])
  end)

  it("resumes a hung root in a later run, once somebody completes what it awaits", function()
    assert.equal("false\nroot goes on with 7\n", output [[
      local flow = require "coflow"
      local gate = flow.TaskCompletionSource()
      print((pcall(flow.run, function() print("root goes on with " .. gate.task:await()) end)))
      gate:set_result(7)
      flow.run(function() flow.yield() flow.yield() end)
    ]])
  end)
end)

describe("the state", function()
  it("closes in a task that exits, and runs the <close> variables of parked tasks", function()
    for _, exit in ipairs {
      "os.exit(3, true)",
      "coroutine.wrap(os.exit)(3, true)",
      "string.gsub('x', 'x', function() os.exit(3, true) end)",
      "local s = flow.CancellationTokenSource() s.token:register(os.exit, 3, true) s:cancel()",
    } do
      local result = child(([[
        local flow = require "coflow"
        flow.run(function()
          flow.spawn(flow.sleep, 600)
          flow.async(function()
            local _ <close> = setmetatable({}, { __close = function() print("closed") end })
            flow.sleep(600)
          end)()
          flow.yield()
          %s
        end)
      ]]):format(exit))
      assert.same({ 3, "closed\n", "" }, { result.code, result.out, result.err }, exit)
    end
  end)

  it("may load the library again, as test runners do, and goes on with the same loop", function()
    local printed = output [[
      local function load_again()
        for name in pairs(package.loaded) do
          if name:find("^coflow") then package.loaded[name] = nil end
        end
        return require "coflow"
      end
      for round = 1, 2 do
        local flow = load_again()
        local loc = flow.AsyncLocal("user")
        local early = flow.spawn(function() flow.yield() return "it" end)
        flow.run(function()
          if round == 1 then
            local ok, err = pcall(flow.await, flow.Task.from_exception(flow.errors.Timeout("late")))
            local values = flow.when_all { early, flow.delay(0) }:await()
            print(not ok and flow.errors.is(err, "Timeout"), values[1], flow.call(function() return 1 end))
          else
            local empty = flow.ExecutionContext.capture()
            loc.value = "outer"
            local inner = flow.ExecutionContext.run(empty, function()
              loc.value = "inner"
              flow.yield()
              return loc.value
            end)
            print(empty:get(loc) == nil, inner, loc.value)
          end
        end)
      end
    ]]
    assert.equal("true it 1\ntrue inner outer\n", (printed:gsub("\t", " ")))
  end)
end)

describe("flow.main", function()
  -- The exit code, with the standard error, of a script whose `main` has this body.
  local function main(body, ...)
    return child(([[
      local flow = require "coflow"
      local function main(...)
        %s
      end
      os.exit(flow.main(main%s), true)
    ]]):format(body, (", %q"):rep(select("#", ...)):format(...)))
  end

  it("returns 0 for a function that returns, whatever it returns besides an integer", function()
    assert.equal(0, flow.main(function() end))
    assert.equal(0, flow.main(function() return "text" end))
    assert.equal(0, flow.main(function() flow.yield() return nil, 3 end))
  end)

  it("returns the integer that its function returned", function()
    assert.equal(7, flow.main(function() return 7 end))
    assert.equal(0, flow.main(function() return 0 end))
    assert.equal(8, flow.main(function() return 8.0 end))
    assert.equal(3, main("flow.yield() return 3").code)
  end)

  it("returns 1 also for an error that has no text", function()
    local result = main([[error(setmetatable({}, { __tostring = function() error("no text") end }))]])
    assert.equal(1, result.code)
    assert.truthy(result.err:find("(an error whose __tostring fails)", 1, true))
    assert.truthy(result.err:find("in function 'error'", 1, true), result.err)
  end)

  it("shows an Aggregate that is among its own errors", function()
    local result = main([[
      local err = flow.errors.Aggregate("round")
      err.inner_exceptions = { err, err }
      error(err, 0)
    ]])
    assert.equal(1, result.code)
    local shown = "Aggregate: round\n  1. Aggregate: round\n  2. Aggregate: round\n"
    assert.truthy(result.err:find(shown, 1, true), result.err)
  end)

  it("passes its arguments on", function()
    local result = main("print(select('#', ...), ...)", "one", 2)
    assert.same({ 0, "2\tone\t2\n", "" }, { result.code, result.out, result.err })
  end)

  it("returns 1 after an error, with the async traceback on standard error", function()
    local result = main [[
      local function inner() flow.yield() error("boom") end
      flow.await(flow.spawn(inner))
    ]]
    assert.equal(1, result.code)
    assert.equal("", result.out)
    local name = result.file:match("[^/]+$")
    assert.truthy(result.err:find(name .. ":3: boom", 1, true), result.err)
    local inner = result.err:find(name .. ":3:", result.err:find("boom", 1, true), true)
    local outer = result.err:find(name .. ":4:", 1, true)
    assert.truthy(inner and outer and inner < outer, result.err)
  end)

  it("returns 1 after a cancellation that no signal has asked for, and tells where it was", function()
    local result = main "flow.current_task():cancel('enough') flow.sleep(1)"
    assert.equal(1, result.code)
    assert.truthy(result.err:find("OperationCanceled: the operation was canceled: enough", 1, true), result.err)
    assert.truthy(result.err:find(result.file .. ":3:", 1, true), result.err)
  end)

  it("returns 1 after an error object, and writes its text", function()
    local result = main "error(flow.errors.Timeout('too late'))"
    assert.equal(1, result.code)
    assert.truthy(result.err:find("Timeout: too late", 1, true), result.err)
  end)

  it("returns 1 after an error whose value is nil or a bare table", function()
    for _, value in ipairs { "nil", "{}", "setmetatable({}, {__tostring = error})" } do
      local result = main("error(" .. value .. ")")
      assert.equal(1, result.code)
      assert.truthy(#result.err > 0)
    end
  end)

  it("returns 1 when nothing can complete its task: its own signal handles do not count", function()
    local result = main "flow.TaskCompletionSource().task:await()"
    assert.equal(1, result.code)
    assert.truthy(result.err:find("InvalidOperation", 1, true), result.err)
  end)

  it("returns 128 + the signal after SIGTERM or SIGINT, with <close> variables run", function()
    for name, number in pairs { INT = 2, TERM = 15 } do
      local result = main(([[
        local _ <close> = setmetatable({}, { __close = function() print("closed") end })
        io.popen("kill -%s $PPID"):close()
        flow.sleep(600)
      ]]):format(name))
      assert.same({ 128 + number, "closed\n" }, { result.code, result.out }, result.err)
    end
  end)

  it("is canceled by a signal though tasks are ready all the time", function()
    local result = main [[
      io.popen("kill -TERM $PPID"):close()
      while true do flow.yield() end
    ]]
    assert.equal(143, result.code)
  end)

  it("tells of a deadlock as run does", function()
    local result = main [[
      flow.TaskCompletionSource().task:await()
    ]]
    assert.equal(1, select(2, result.err:gsub("\n\ttask ", "")), result.err)
    assert.is_nil(result.err:find("unobserved", 1, true), result.err)
  end)

  it("reports what nobody has observed though the state is not closed", function()
    local result = child [[
      local flow = require "coflow"
      local code = flow.main(function()
        flow.spawn(error, "lost")
        kept = flow.spawn(error, "kept")
        flow.yield()
      end)
      io.stderr:write("exit\n")
      os.exit(code)
    ]]
    assert.equal(0, result.code)
    local before = result.err:match("^(.*)exit\n")
    assert.equal(1, select(2, before:gsub("unobserved error", "")), before)
    assert.truthy(before:find("lost", 1, true), before)
  end)

  it("ends the process at a second signal", function()
    local result = main [[
      local function signal() io.popen("kill -TERM $PPID"):close() end
      signal()
      pcall(flow.sleep, 600)
      signal()
      flow.sleep(600, flow.CancellationToken.none)
      print("not reached")
    ]]
    assert.same({ 143, "" }, { result.code, result.out })
  end)

  it("ends the process at a second signal though it computes for ever", function()
    local result = main [[
      io.popen("kill -INT $PPID"):close()
      io.popen("kill -INT $PPID"):close()
      while true do end
    ]]
    assert.equal(130, result.code)
  end)

  it("runs nothing in a task: InvalidOperation, raised or as its failure", function()
    local result = child [[
      local flow = require "coflow"
      print(flow.run(function()
        local ok, answer = pcall(flow.main, function() print("not reached") end)
        return not ok and flow.errors.is(answer, "InvalidOperation") and 1 or answer
      end))
    ]]
    assert.same({ 0, "1\n" }, { result.code, result.out }, result.err)
  end)
end)

describe("flow.loop", function()
  it("runs until nothing is left alive", function()
    assert.equal("a\nb\nc\nend\nalive: false\n", output [[
      local flow = require "coflow"
      flow.spawn(function()
        print("a") flow.yield() print("b") flow.sleep(0.001) print("c")
      end)
      flow.loop.run("default")
      print("end")
      print("alive: " .. tostring(flow.loop.is_alive()))
    ]])
  end)

  it("returns from a default run when tasks wait for what nobody alive can complete", function()
    assert.equal("waits\nend\n", output [[
      local flow = require "coflow"
      local gate = flow.TaskCompletionSource()
      flow.spawn(function() print("waits") gate.task:await() end)
      flow.loop.run("default")
      print("end")
    ]])
  end)

  it("does what is ready and does not wait in a nowait run", function()
    assert.equal("ready\nfalse\n", output [[
      local flow = require "coflow"
      local delay = flow.delay(600)
      flow.spawn(print, "ready")
      flow.loop.run("nowait")
      print(delay.is_completed)
    ]])
  end)

  it("waits for something to happen in a single run", function()
    assert.equal("done\n", output [[
      local flow = require "coflow"
      local delay = flow.delay(0.001)
      repeat flow.loop.run("once") until delay.is_completed
      print("done")
    ]])
  end)

  it("stops a run at the request of a task, and goes on in the next one", function()
    assert.equal("stops\nreturned\ngoes on\n", output [[
      local flow = require "coflow"
      local source = flow.CancellationTokenSource()
      flow.delay(600, source.token)
      flow.spawn(function()
        print("stops")
        flow.loop.stop()
        flow.sleep(0.001)
        print("goes on")
        source:cancel()
      end)
      flow.loop.run("default")
      print("returned")
      flow.loop.run("default")
    ]])
  end)

  it("is alive while a task is ready or a timer is armed", function()
    assert.equal("false true false true false\n", output [[
      local flow = require "coflow"
      local states = { flow.loop.is_alive() }
      flow.spawn(function() end)
      states[2] = flow.loop.is_alive()
      flow.loop.run("default")
      states[3] = flow.loop.is_alive()
      local source = flow.CancellationTokenSource()
      flow.delay(600, source.token)
      states[4] = flow.loop.is_alive()
      source:cancel()
      flow.loop.run("default")
      states[5] = flow.loop.is_alive()
      for i = 1, 5 do states[i] = tostring(states[i]) end
      print(table.concat(states, " "))
    ]])
  end)

  it("tells a host how long it may wait: to the next deadline, not at all while a task is ready", function()
    assert.equal("true\n0.0\n", output [[
      local flow = require "coflow"
      flow.delay(600)
      flow.loop.run("nowait")
      local timeout = flow.loop.timeout()
      print(timeout > 0 and timeout <= 600)
      flow.spawn(function() end)
      print(flow.loop.timeout() + 0.0)
    ]])
  end)

  it("has a descriptor for a foreign loop", function()
    local fd = flow.loop.backend_fd()
    assert.equal("integer", math.type(fd))
    assert.is_true(fd >= 0)
  end)

  it("tells the time in seconds, which never goes back", function()
    local before = flow.loop.now()
    assert.equal("number", type(before))
    for _ = 1, 100 do
      local now = flow.loop.now()
      assert.is_true(now >= before)
      before = now
    end
  end)

  it("tells virtual time under a virtual clock", in_task(function(clock)
    local start = flow.loop.now()
    assert.equal(clock:now(), start)
    flow.sleep(1000)
    assert.equal(1000, flow.loop.now() - start)
    assert.equal(clock:now(), flow.loop.now())
  end))

  it("fires in one turn what is due at once, and runs what is ready then", function()
    for _, mode in ipairs { "once", "nowait" } do
      local log, note = recorder()
      flow.run(function()
        flow.spawn(note, "before")
        local source = flow.CancellationTokenSource()
        source:cancel_after(0) -- which the end of this run leaves behind
      end)
      local _ <close> = flow.Timer(note, 0)
      flow.spawn(note, "after")
      flow.loop.run(mode)
      assert.same({ "before", "after", "" }, log)
      flow.Timer(note, 0):dispose()
      assert.is_false(flow.loop.is_alive())
      assert.is_nil(flow.loop.timeout())
    end
  end)

  it("is not run inside a task", in_task(function()
    for _, mode in ipairs { "default", "once", "nowait" } do
      raises("InvalidOperation", flow.loop.run, mode)
    end
  end))
end)

describe("top-level await", function()
  it("drives the loop until the task is complete, and returns its values", function()
    assert.is_nil(flow.current_task())
    local task = flow.spawn(function(...)
      flow.yield()
      return ...
    end, 1, nil, 3, nil)
    assert.same({ n = 4, 1, nil, 3, nil }, table.pack(flow.await(task)))
    assert.same({ n = 4, 1, nil, 3, nil }, table.pack(task:await()))
  end)

  it("raises the task's error, and its cancellation", function()
    local value = {}
    assert.equal(value, raised(flow.await, flow.spawn(error, value)))
    local canceled = flow.errors.OperationCanceled("enough")
    assert.equal(canceled, raised(flow.await, flow.spawn(error, canceled)))
  end)

  it("gives outcomes to try_await", function()
    assert.same({ n = 2, true, 5 }, table.pack(flow.try_await(flow.spawn(function() return 5 end))))
    assert.same({ n = 2, false, "x" }, table.pack(flow.try_await(flow.spawn(error, "x", 0))))
  end)

  it("returns at once for a complete task, without a turn of the loop", function()
    local log, note = recorder()
    local task = flow.spawn(note, "queued")
    assert.equal(5, flow.await(flow.Task.from_result(5)))
    assert.same({}, log)
    task:await()
    assert.same({ "queued" }, log)
  end)

  it("lets every direct-style operation drive the loop", function()
    local log, note = recorder()
    local function queue(name)
      return flow.spawn(note, name)
    end
    queue("yield")
    flow.yield()
    queue("sleep")
    flow.sleep(0.001)
    flow.await_all(queue("await_all"))
    local first = queue("await_any")
    assert.equal(first, (flow.await_any(first)))
    for task, key in flow.when_each { queue("when_each") } do
      note(task.status, key)
    end
    assert.same({ "yield", "sleep", "await_all", "await_any", "when_each", "ran_to_completion 1" }, log)
  end)

  it("works between runs", function()
    local gate = flow.TaskCompletionSource()
    local other
    flow.run(function()
      other = flow.spawn(function() return gate.task:await() + 1 end)
      flow.yield()
    end)
    gate:set_result(1)
    assert.equal(2, flow.await(other))
  end)

  it("raises InvalidOperation when nothing can complete the task", function()
    assert.equal("false true\nfalse true\nfalse true\n", output [[
      local flow = require "coflow"
      local gate = flow.TaskCompletionSource()
      for _, attempt in ipairs { flow.await, flow.try_await, flow.await_all } do
        local ok, err = pcall(attempt, gate.task)
        print(("%s %s"):format(ok, flow.errors.is(err, "InvalidOperation")))
      end
    ]])
  end)
end)

describe("the current task", function()
  it("is the one that runs, also after others have run", in_task(function()
    local root = flow.current_task()
    local inner
    local task = flow.spawn(function()
      inner = flow.current_task()
      flow.yield()
      assert.equal(inner, flow.current_task())
    end)
    task:await()
    assert.equal(task, inner)
    assert.equal(root, flow.current_task())
  end))

  it("can suspend in its body, under pcall and in metamethods", in_task(function()
    assert.is_true(flow.is_awaitable_here())
    assert.is_true(select(2, pcall(flow.is_awaitable_here)))
    local object = setmetatable({}, { __index = function() return flow.is_awaitable_here() end })
    assert.is_true(object.field)
  end))

  it("cannot suspend where Lua cannot yield", in_task(function()
    local answers = {}
    local function ask()
      answers[#answers + 1] = flow.is_awaitable_here()
    end
    table.sort({ 2, 1 }, function(a, b) ask() return a < b end)
    string.gsub("x", "x", function() ask() end)
    coroutine.wrap(ask)()
    xpcall(error, ask)
    local count = #answers
    assert.is_true(count >= 4)
    for i = 1, count do
      assert.is_false(answers[i])
    end
  end))
end)

describe("the ready queue", function()
  it("is first in, first out", in_order(function()
    local log, note = recorder()
    local tasks = {}
    for i = 1, 5 do
      tasks[i] = flow.spawn(note, i)
    end
    note("queued")
    flow.await_all(tasks)
    assert.same({ "queued", "1", "2", "3", "4", "5" }, log)
  end))

  it("gives each of the tasks that yield its turn", in_order(function()
    local log, note = recorder()
    local tasks = {}
    for _, name in ipairs { "a", "b", "c" } do
      tasks[#tasks + 1] = flow.spawn(function()
        for i = 1, 3 do
          note(name .. i)
          flow.yield()
        end
      end)
    end
    flow.await_all(tasks)
    assert.same({ "a1", "b1", "c1", "a2", "b2", "c2", "a3", "b3", "c3" }, log)
  end))

  it("lets everything else that is ready run before a task that yields goes on", in_order(function()
    local log, note = recorder()
    local tasks = { flow.spawn(note, "a"), flow.spawn(note, "b") }
    note("before")
    flow.yield()
    note("after")
    flow.await_all(tasks)
    assert.same({ "before", "a", "b", "after" }, log)
  end))

  it("suspends a task that yields also when nothing else is ready", in_task(function()
    local log, note = recorder()
    local task = flow.async(function()
      note("in")
      flow.yield()
      note("resumed")
    end)()
    note("out", task.is_completed)
    task:await()
    assert.same({ "in", "out false", "resumed" }, log)
    assert.equal(flow.yield, flow.Task.yield)
  end))

  it("has a waiter come after what the awaited task itself made ready", in_order(function()
    local log, note = recorder()
    local task = flow.spawn(function()
      flow.spawn(note, "made ready")
      note("ends")
    end)
    task:await()
    note("waiter")
    assert.same({ "ends", "made ready", "waiter" }, log)
  end))

  it("never runs a waiter on the stack of the one that completes the task", in_order(function()
    local log, note = recorder()
    local gate = flow.TaskCompletionSource()
    local tasks = {}
    for i = 1, 3 do
      tasks[i] = flow.async(function()
        note(i, "got", gate.task:await())
      end)()
    end
    gate:set_result("it")
    note("completed")
    local late = flow.spawn(note, "late")
    flow.await_all(tasks)
    late:await()
    assert.same({ "completed", "1 got it", "2 got it", "3 got it", "late" }, log)
  end))

  it("does not starve timers, however many tasks are ready", function()
    local passed = flow.run(function()
      local delay = flow.delay(0.005)
      local stop = false
      local others = {}
      for i = 1, 10 do
        others[i] = flow.spawn(function()
          while not stop do
            flow.yield()
          end
        end)
      end
      local limit = os.clock() + 20
      while not delay.is_completed and os.clock() < limit do
        flow.yield()
      end
      stop = true
      flow.await_all(others)
      return delay.is_completed
    end)
    assert.is_true(passed)
  end)

  it("is not starved by timers", function()
    local turns = flow.run(function()
      local turns = 0
      local other = flow.spawn(function()
        for _ = 1, 100 do
          turns = turns + 1
          flow.yield()
        end
      end)
      for _ = 1, 10000 do
        flow.sleep(1e-9)
        if other.is_completed then
          break
        end
      end
      return turns
    end)
    assert.equal(100, turns)
  end)
end)

describe("the report of a deadlock", function()
  before_each(function() flow.on_unobserved_exception(false) end)

  after_each(function() -- what waits for ever is no affair of the specs that follow
    for _ = 1, 3 do
      collectgarbage()
      flow.run(flow.yield)
    end
    flow.on_unobserved_exception(nil)
  end)

  local function never() flow.TaskCompletionSource().task:await() end

  -- The lines of the report that name this task.
  local function told(name, fn, ...)
    local err = raised(flow.run, function(...)
      flow.current_task().name = name
      fn(...)
    end, ...)
    is_error("InvalidOperation", err, "deadlock")
    local lines = {}
    for line in err.message:gmatch("[^\n]+") do
      if line:find("task '" .. name .. "'", 1, true) then lines[#lines + 1] = line:match("^\t(.*)") end
    end
    return table.concat(lines, "\n")
  end

  it("names the group whose tasks it waits for, not a promise", function()
    assert.matches("^task 'of a group' waits for the tasks of its group at spec/run_spec.lua:%d+$",
      told("of a group", function() flow.task_group(function(group) group:spawn(never) end) end))
    assert.matches("^task 'in a group' waits for 'promise' at ", told("in a group", function()
      flow.task_group(function(group)
        group:spawn(function() end)
        never()
      end)
    end))
    local stopped
    assert.matches("^task 'to stop' waits for 'wait_stopping' at ", told("to stop", function()
      flow.task_group(function(group)
        stopped = group
        group:wait_stopping()
      end)
    end))
    stopped:stop()
  end)

  it("shows circles through combinators, direct ones and tasks, waits and continuations", function()
    local n = 0
    local function circle(inner, outer)
      n = n + 1 -- those of the circles before are told of, too
      local err = raised(flow.run, function()
        local a, b
        a = flow.spawn(function() inner(b) end)
        b = flow.spawn(function() outer(a) end)
        a.name, b.name = "A" .. n, "B" .. n
        flow.current_task().name = "root"
        a:await()
      end)
      local lines = {}
      for line in err.message:gmatch("\n\ttask ([^\n]*)") do
        line = line:gsub(" at spec.*", "")
        if line:find("[AB]" .. n) and not line:find("^'root'") then lines[#lines + 1] = line end
      end
      table.sort(lines)
      return (table.concat(lines, "; "):gsub("([AB])%d", "%1"))
    end
    local function await_when_all(task) flow.when_all(task):await() end
    assert.equal("'A' waits for 'when_all' of 'B'; 'B' waits for 'when_any' of 'A'",
      circle(flow.await_all, flow.await_any))
    assert.equal("'A' waits for 'when_all' of 'B'; 'B' waits for 'wait_async' of ('when_any' of 'A')",
      circle(await_when_all, function(task) flow.when_any(task):wait_async(math.huge):await() end))
    assert.equal("'A' waits for 'when_all' of 'B'; 'B' waits for 'print'; 'print' is to run after 'A'",
      circle(await_when_all, function(task) task:continue_with(print):await() end))
    local sources = {}
    for i = 1, 10 do sources[i] = flow.TaskCompletionSource() end
    sources[3]:set_result()
    local several = { flow.when_any(sources[1].task), sources[3].task, sources[4].task }
    assert.equal("'A' waits for 'when_any' of 'B', 'promise', 'promise', 'promise' and 6 more; " ..
      "'B' waits for 'when_all' of 'A', ('when_any' of 'promise'), 'promise'",
      circle(function(task)
        local tasks = { task }
        for _, source in ipairs(sources) do
          if not source.task.is_completed then tasks[#tasks + 1] = source.task end
        end
        flow.await_any(tasks)
      end, function(task) flow.when_all(task, table.unpack(several)):await() end))
  end)

  it("names the circles, and tells tasks of one name apart", function()
    local function take(first, second)
      local _ <close> = first:lock()
      flow.yield()
      local _ <close> = second:lock()
    end
    local x, y = flow.Lock(), flow.Lock()
    local err = raised(flow.run, function()
      flow.current_task().name = "root"
      flow.await_all(flow.spawn(take, x, y), flow.spawn(take, y, x))
    end)
    local name = "'spec/run_spec.lua:%d+' "
    local first, second, third, fourth = err.message:match("\n\ttask " .. name .. "%((#%d+)%) waits for coflow.Lock, "
      .. "held by " .. name .. "%((#%d+)%), at [^\n]+\n\tcircle: " .. name .. "%((#%d+)%) waits for " .. name
      .. "%((#%d+)%), which waits for " .. name)
    assert.truthy(first, err.message)
    assert.not_equal(first, second)
    assert.same({ [first] = true, [second] = true }, { [third] = true, [fourth] = true })
  end)

  it("names ten circles, and how many more there are", function()
    local function take(first, second)
      local _ <close> = first:lock()
      flow.yield()
      local _ <close> = second:lock()
    end
    local kept = {}
    local err = raised(flow.run, function()
      for i = 1, 12 do
        local x, y = flow.Lock(), flow.Lock()
        kept[2 * i - 1], kept[2 * i] = flow.spawn(take, x, y), flow.spawn(take, y, x)
      end
      flow.await_all(kept)
    end)
    assert.equal(10, select(2, err.message:gsub("\n\tcircle: ", "")))
    assert.matches("\n\t… and 2 more circles$", err.message)
    assert.equal(24, #kept)
  end)

  it("begins with the task that was run, however many wait besides", function()
    local kept = {}
    local err = raised(flow.run, function()
      for i = 1, 50 do kept[i] = flow.spawn(never) end
      flow.yield()
      flow.current_task().name = "root"
      never()
    end)
    assert.matches("^deadlock: [^\n]+\n\ttask 'root' waits for 'promise' at ", err.message)
    assert.matches("\n\t… and %d+ more$", err.message)
    assert.equal(50, #kept)
  end)

  it("comes with tracebacks that go once round such a circle", function()
    local task
    raised(flow.run, function()
      task = flow.spawn(function() flow.when_all(task):await() end)
      task.name = "round"
      task:await()
    end)
    local text = task:traceback()
    assert.matches("awaited by task 'round' again: a circle$", text)
    assert.equal(2, select(2, text:gsub("task 'round'", "")))
  end)

  it("names tasks of the library by its modules, and no line of it", function()
    local cache = flow.AsyncCache()
    local report = told("caller", function() cache:get_or_add("key", never) end)
    assert.matches("^task 'caller' waits for 'spec/run_spec.lua:%d+' at spec/run_spec.lua:%d+$", report)
    local err = raised(flow.run, function()
      local host = flow.Host()
      host:add { start = never }
      local task = host:start_async()
      assert.equal("coflow.hosting", task.name)
      task:await()
    end)
    assert.is_nil(err.message:find("lua/coflow/", 1, true), err.message)
    assert.matches("\n\ttask 'coflow.hosting' waits for 'when_any' of 'spec/run_spec.lua:%d+' %(#%d+%)\n", err.message)
  end)
end)

describe("an operation at the top level that cannot end", function()
  local none = flow.CancellationToken.none

  -- Fails as a deadlock, told where it was asked for; returns the message.
  local function stuck(...)
    local err = raised(...)
    is_error("InvalidOperation", err, "deadlock")
    return err.message
  end

  it("waits for nothing any more: what comes is for others", function()
    local channel, meeting = flow.Channel.unbounded(), flow.Channel.bounded(0)
    local semaphore, event = flow.Semaphore(0), flow.AutoResetEvent()
    for _, token in ipairs { false, none, flow.CancellationTokenSource().token } do
      token = token or nil
      stuck(channel.read, channel, token)
      stuck(meeting.write, meeting, "a ghost", token)
      stuck(semaphore.wait, semaphore, nil, token)
      stuck(event.wait, event, nil, token)
      stuck(flow.channel.select, { { channel, "read" }, token = token })
    end
    channel:write("for whoever asks")
    assert.equal("for whoever asks", channel:try_read())
    assert.is_nil(meeting:try_read())
    semaphore:release()
    assert.equal(1, semaphore.current_count)
    event:set()
    assert.is_true(event.is_set)
    flow.run(flow.yield)
    assert.equal(1, semaphore.current_count)
  end)

  it("is named by who asked for it", function()
    local channel = flow.Channel.unbounded()
    assert.matches("task 'spec/run_spec.lua:%d+' waits for coflow.Channel$", stuck(function()
      channel:read()
    end))
  end)
end)

describe("an operation at the top level that was granted what it asked for before the loop was stopped", function()
  it("returns it", function()
    local channel, semaphore, lock = flow.Channel.bounded(4), flow.Semaphore(0), flow.Lock()
    local function stop_after(fn, ...)
      flow.spawn(function(...)
        flow.yield()
        fn(...)
        flow.loop.stop()
      end, ...)
    end
    stop_after(channel.write, channel, "an item")
    assert.equal("an item", channel:read())
    stop_after(semaphore.release, semaphore)
    assert.is_true(semaphore:wait())
    local holder = flow.spawn(function()
      local _ <close> = lock:lock()
      for _ = 1, 3 do flow.yield() end
      flow.loop.stop()
    end)
    flow.run(flow.yield)
    assert.is_nil(lock:try_lock())
    lock:lock():dispose()
    assert(lock:try_lock(), "the lock was lost"):dispose()
    assert.is_true(holder.is_completed)
  end)
end)

describe("a finalizer that uses the library while the state closes", function()
  it("may do so after os.exit in a task", function()
    assert.equal("done\n", output [[
      local flow = require "coflow"
      local loc = flow.AsyncLocal()
      local kept = setmetatable({}, { __gc = function()
        pcall(flow.spawn, print)
        pcall(loc.get, loc)
        pcall(loc.set, loc, 3)
        pcall(flow.ExecutionContext.capture)
        print "done"
      end })
      flow.run(function()
        loc.value = 1
        flow.yield()
        os.exit(kept and 0, true)
      end)
    ]])
  end)

  it("may do so when the library has been closed: it was there before", function()
    assert.equal("done\n", output [[
      local timer, source
      local kept = setmetatable({}, { __gc = function()
        timer:dispose()
        source:cancel()
        print "done"
      end })
      local flow = require "coflow"
      timer, source = flow.Timer(print, 100), flow.CancellationTokenSource(100)
      assert(kept)
    ]])
  end)
end)
