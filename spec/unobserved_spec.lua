-- Errors that nobody observed, and parked tasks that nothing can ever complete.

local flow = require "coflow"
local helper = require "spec.helper"

local Task = flow.Task
local in_task, recorder, raised = helper.in_task, helper.recorder, helper.raised
local in_order = helper.in_order
local is_error, slowly, closing = helper.is_error, helper.slowly, helper.closing
local here, collect, watch = helper.here, helper.collect, helper.reports

-- Runs `fn` so that what it made can be collected, and lets the reports come.
local function drop(fn)
  fn()
  collect()
end

local function fail(value)
  return flow.async(function() error(value, 0) end)()
end

describe("a faulted task that nobody observed", function()
  after_each(function() flow.on_unobserved_exception(false) end)

  it("is reported once, when it is collected", in_task(function()
    local reports = watch()
    local value = {}
    local id
    local function scope()
      local task = fail(value)
      task.name = "doomed"
      id = task.id
      collect()
      assert.same({}, reports)
      assert.equal("faulted", task.status)
    end
    drop(scope)
    assert.equal(1, #reports)
    assert.is_true(rawequal(value, reports[1].err))
    local task = reports[1].task
    assert.same({ "doomed", id, "faulted" }, { task.name, task.id, task.status })
    assert.equal(value, task.exception)
    reports[1].task = nil
    collect()
    assert.equal(1, #reports)
  end))

  local MAKERS = {
    ["a spawned task"] = function(value)
      flow.spawn(error, value, 0)
      slowly()
    end,
    ["a task that suspended before"] = function(value)
      flow.async(function()
        slowly()
        error(value, 0)
      end)()
      slowly()
      slowly()
    end,
    ["a cold task"] = function(value) Task.new(error, value, 0):run_synchronously() end,
    ["from_exception"] = function(value) Task.from_exception(value) end,
    ["a completion source"] = function(value) flow.TaskCompletionSource():set_exception(value) end,
    ["a continuation"] = function(value)
      Task.completed_task:continue_with(function() error(value, 0) end)
      slowly()
    end,
    ["wait_async"] = function(value)
      fail(value):wait_async()
      slowly()
    end,
  }
  for what, make in pairs(MAKERS) do
    it("is reported once when it was made by " .. what, in_order(function()
      local reports = watch()
      for _, value in ipairs { "boom", { "a table" }, false } do
        drop(function() make(value) end)
        assert.equal(1, #reports)
        assert.equal(value, reports[1].err)
        reports[1] = nil
      end
    end))
  end

  it("is reported also when its error is nil", in_task(function()
    local called, err, task = 0, nil, nil
    flow.on_unobserved_exception(function(...)
      called = called + 1
      err, task = ...
    end)
    drop(function() fail(nil) end)
    assert.equal(1, called)
    assert.is_nil(err)
    assert.equal("faulted", task.status)
  end))

  it("is reported with its traceback at hand", in_task(function()
    local reports = watch()
    local line
    drop(function()
      flow.async(function()
        line = here(1)
        error("boom")
      end)()
    end)
    assert.truthy(reports[1].task:traceback():find(line, 1, true))
  end))

  local OBSERVERS = {
    await = function(task) pcall(flow.await, task) end,
    ["task:await"] = function(task) pcall(task.await, task) end,
    try_await = function(task) flow.try_await(task) end,
    exception = function(task) return task.exception end,
    result = function(task) pcall(function() return task.result end) end,
    results = function(task) pcall(task.results, task) end,
    ["wait_async, when it passed the outcome on,"] = function(task) task:wait_async(5):try_await() end,
    when_all = function(task) flow.when_all(task):try_await() end,
    await_all = function(task) pcall(flow.await_all, task, flow.delay(1)) end,
    when_each = function(task)
      for each in flow.when_each { task } do
        assert.equal(task, each)
      end
    end,
    continue_with = function(task) task:continue_with(function() end):await() end,
  }
  for how, observe in pairs(OBSERVERS) do
    it("is not reported: " .. how .. " observes", in_order(function()
      local reports = watch()
      drop(function() observe(fail("faulted at once")) end)
      drop(function()
        local task = flow.spawn(error, "faulted on a later turn", 0)
        slowly()
        observe(task)
      end)
      assert.same({}, reports)
    end))
  end

  for _, how in ipairs { "await", "try_await", "when_all", "await_all", "when_each", "continue_with" } do
    it("is not reported: " .. how .. " observes also when it waits before the failure", in_task(function()
      local reports = watch()
      drop(function() OBSERVERS[how](flow.spawn(error, "boom", 0)) end)
      assert.same({}, reports)
    end))
  end

  local OTHERS = {
    status = function(task) return task.status, task.is_faulted, task.is_completed, task.is_canceled end,
    name = function(task) return task.name, task.id, tostring(task) end,
    traceback = function(task) return task:traceback() end,
    when_any = function(task) return flow.when_any(task):await() end,
    await_any = function(task) return flow.await_any(task, Task.completed_task) end,
  }
  for how, look in pairs(OTHERS) do
    it("is reported: " .. how .. " does not observe", in_task(function()
      local reports = watch()
      drop(function() look(fail("boom")) end)
      assert.equal(1, #reports)
      assert.equal("boom", reports[1].err)
    end))
  end

  it("is reported: a wait_async that ended before does not observe", in_task(function()
    local reports = watch()
    drop(function()
      local task = flow.spawn(function()
        flow.sleep(5)
        error("late", 0)
      end)
      is_error("Timeout", select(2, task:wait_async(1):try_await()))
      flow.sleep(10)
    end)
    assert.equal(1, #reports)
    assert.equal("late", reports[1].err)
  end))

  it("is reported after task:wait, which does not observe", function()
    local reports = watch()
    drop(function() assert.is_true(fail("boom"):wait()) end)
    assert.equal(1, #reports)
  end)

  it("is reported as a loser of when_any, which others do not observe", in_task(function()
    local reports = watch()
    drop(function()
      local winner = flow.spawn(slowly)
      local loser = flow.spawn(function()
        flow.sleep(1)
        error("lost", 0)
      end)
      assert.equal(winner, (flow.when_any(loser, winner):await()))
      flow.sleep(2)
    end)
    assert.equal(1, #reports)
    assert.equal("lost", reports[1].err)
  end))

  it("is reported for a when_all task, not for its inputs", in_task(function()
    local reports = watch()
    drop(function() flow.when_all(fail("a"), fail("b")) end)
    assert.equal(1, #reports)
    assert.same({ "a", "b" }, helper.inner(reports[1].err))
  end))

  it("is reported for each of many", in_task(function()
    local reports = watch()
    drop(function()
      for i = 1, 100 do
        fail(i)
      end
    end)
    local sum = 0
    for _, report in ipairs(reports) do
      sum = sum + report.err
    end
    assert.same({ 100, 5050 }, { #reports, sum })
  end))

  it("is not confused with a canceled one, which is never reported", in_task(function()
    local reports = watch()
    drop(function()
      Task.from_canceled(flow.CancellationToken.canceled)
      flow.TaskCompletionSource():set_canceled()
      flow.async(error)(flow.errors.OperationCanceled("enough"))
      flow.delay(1, flow.CancellationToken.canceled)
    end)
    assert.same({}, reports)
  end))

  it("goes to the handler that was set last", in_task(function()
    local first = watch()
    local second = watch()
    drop(function() fail("boom") end)
    assert.same({ 0, 1 }, { #first, #second })
  end))

  it("goes to nobody when reports are off", in_task(function()
    local reports = watch()
    flow.on_unobserved_exception(false)
    drop(function() fail("boom") end)
    assert.same({}, reports)
    reports = watch()
    collect()
    assert.same({}, reports)
  end))

  it("may be kept and observed by the handler, and is not reported again", in_task(function()
    local count, kept = 0, nil
    flow.on_unobserved_exception(function(_, task)
      count, kept = count + 1, task
    end)
    drop(function() fail("boom") end)
    assert.equal("boom", kept.exception)
    kept = nil
    collect()
    assert.same({ 1 }, { count, kept })
  end))

  it("harms nobody when the handler raises", function()
    assert.equal("called\nstill here\n", helper.child([[
      local flow = require "coflow"
      flow.on_unobserved_exception(function() print("called") error("in the handler") end)
      flow.run(function()
        flow.async(error)("boom")
        for _ = 1, 3 do collectgarbage() flow.yield() end
        print("still here")
      end)
    ]]).out)
  end)
end)

describe("the default handler", function()
  it("shows what is in an Aggregate, and in a table", function()
    local err = helper.child([[
      local flow = require "coflow"
      flow.run(function()
        local function fail(err) return function() error(err, 0) end end
        flow.spawn(flow.await_all, flow.spawn(fail("no db")), flow.spawn(fail { code = 5 }))
        flow.sleep(0.001)
      end)
    ]]).err
    local report = "error in task 'coflow.await_all': Aggregate: 2 tasks failed\n  1. no db\n  2. table: "
    assert.truthy(err:find(report, 1, true), err)
    assert.truthy(err:find(" { code = 5 }\n", 1, true), err)
  end)

  it("writes the error and its async traceback to standard error", function()
    local result = helper.child [[
      local flow = require "coflow"
      flow.run(function()
        flow.spawn(function()
          flow.yield()
          error("boom")
        end)
        for _ = 1, 5 do flow.yield() collectgarbage() end
        io.stderr:write("-- end of main\n")
      end)
    ]]
    assert.equal(0, result.code)
    assert.equal("", result.out)
    local name = result.file:match("[^/]+$")
    local message = result.err:find(name .. ":5: boom", 1, true)
    assert.truthy(message, result.err)
    assert.truthy(result.err:find(name .. ":5:", message + #name + 3, true), "no traceback in " .. result.err)
    assert.truthy(result.err:find("-- end of main", message, true), result.err)
  end)

  it("writes a text with zero bytes whole, wherever it comes from", function()
    -- once it was cut at the first one
    local result = helper.child [[
      local flow = require "coflow"
      local errors = flow.errors
      flow.run(function()
        flow.spawn(error, "text\0of a string")
        flow.spawn(error, { key = "text\0of a field" })
        flow.spawn(error, setmetatable({}, { __tostring = function() return "text\0of tostring" end }))
        flow.spawn(error, errors.IO("text\0of an error"))
        flow.spawn(error, errors.Aggregate("text\0of many", { inner_exceptions = { "text\0of one" } }))
        flow.yield()
        local source = flow.CancellationTokenSource()
        source.token:register(function() error("text\0of a callback", 0) end)
        source:cancel_after(0.001)
        flow.sleep(0.002)
        collectgarbage()
      end)
      flow.on_unobserved_exception(function() error("text\0of the handler", 0) end)
      flow.run(function() flow.spawn(error, "x") flow.yield() collectgarbage() end)
      local code = flow.main(function() error("text\0of main", 0) end)
      io.stdout:write(code, " ", tostring(errors.IO("text\0of tostring")))
    ]]
    for _, text in ipairs {
      "a string", "a field }", "tostring", "an error", "many", "one", "a callback", "the handler", "main",
    } do
      assert.truthy(result.err:find("text\0of " .. text .. "\n", 1, true), text .. ": " .. result.err)
    end
    assert.equal("1 IO: text\0of tostring", result.out)
  end)

  it("writes once about a task that is still there when the state closes", function()
    local script = [[
      local flow = require "coflow"
      task = flow.async(function() error(flow.errors.Timeout("too late")) end)()
      %s
    ]]
    for _, ending in ipairs { "", "os.exit(0, true)", "collectgarbage() flow.yield()" } do
      local result = helper.child(script:format(ending))
      assert.equal(0, result.code)
      local _, count = result.err:gsub("Timeout: too late", "")
      assert.equal(1, count, result.err)
    end
  end)

  it("does nothing about what was observed, is parked or was switched off", function()
    assert.equal("", helper.output [[
      local flow = require "coflow"
      observed = flow.async(error)("observed")
      pcall(flow.await, observed)
      gate = flow.TaskCompletionSource()
      parked = flow.async(function() gate.task:await() end)()
      sleeping = flow.spawn(flow.sleep, 600)
      flow.yield()
      queued = flow.spawn(error, "never started")
      canceled = flow.async(error)(flow.errors.OperationCanceled("enough"))
    ]])
    assert.equal("", helper.output [[
      local flow = require "coflow"
      flow.on_unobserved_exception(false)
      task = flow.async(error)("boom")
    ]])
  end)

  it("gives way to a handler, also when the state closes", function()
    assert.equal("boom faulted\n", helper.output [[
      local flow = require "coflow"
      flow.on_unobserved_exception(function(err, task) print(err .. " " .. task.status) end)
      task = flow.async(error)("boom")
    ]])
  end)

  it("survives error values that cannot be printed", function()
    local result = helper.child [[
      local flow = require "coflow"
      flow.async(error)(setmetatable({}, { __tostring = function() error("no text") end }))
      flow.async(error)(setmetatable({}, { __tostring = function() return 42 end }))
      flow.async(error)(nil)
      flow.async(error)({})
      flow.async(error)("\0\255 bytes")
      flow.run(function() for _ = 1, 3 do collectgarbage() flow.yield() end print("fine") end)
    ]]
    assert.same({ 0, "fine\n" }, { result.code, result.out })
  end)
end)

describe("a parked task that nothing alive can ever complete", function()
  after_each(function() flow.on_unobserved_exception(false) end)

  it("is reported as TaskAbandoned with the place where it waits", in_task(function()
    local reports = watch()
    local line
    drop(function()
      flow.async(function()
        line = here(1)
        flow.TaskCompletionSource().task:await()
      end)().name = "orphan"
    end)
    assert.equal(1, #reports)
    is_error("TaskAbandoned", reports[1].err, line)
    assert.equal("orphan", reports[1].task.name)
    collect()
    assert.equal(1, #reports)
  end))

  it("has its <close> variables run, innermost first, on a later turn and once", in_task(function()
    watch()
    local log, note = recorder()
    local function park()
      flow.async(function()
        local _ <close> = closing(function(err) note("outer", err) end)
        local _ <close> = closing(function(err) note("inner", err) end)
        flow.TaskCompletionSource().task:await()
        note("resumed")
      end)()
    end
    park()
    collectgarbage()
    collectgarbage()
    assert.same({}, log)
    collect()
    assert.same({ "inner nil", "outer nil" }, log)
  end))

  it("cannot suspend in its <close> variables, which all run nevertheless", in_task(function()
    watch()
    local log, note = recorder()
    drop(function()
      flow.async(function()
        local _ <close> = closing(function() note("outer") end)
        local _ <close> = closing(function()
          note("inner", flow.errors.is(raised(flow.yield), "InvalidOperation"))
        end)
        flow.TaskCompletionSource().task:await()
      end)()
    end)
    assert.same({ "inner true", "outer" }, log)
  end))

  it("may be parked in whatever the library has for waiting", in_task(function()
    local reports = watch()
    local function gate() return flow.TaskCompletionSource().task end
    local waits = {
      function() flow.await(gate()) end,
      function() flow.try_await(gate()) end,
      function() pcall(pcall, flow.await, gate()) end,
      function() flow.await_all(gate(), Task.completed_task) end,
      function() flow.await_any(gate(), gate()) end,
      function() for _ in flow.when_each { gate() } do slowly() end end,
      function() flow.when_all({ a = gate() }):await() end,
      function() gate():wait_async():await() end,
      function() gate():continue_with(print):await() end,
      function() flow.call(flow.await, gate()) end,
      function() Task.new(print):await() end,
    }
    for i, wait in ipairs(waits) do
      drop(function() flow.async(wait)() end)
      assert.is_true(#reports >= 1, "wait " .. i)
      for k, report in ipairs(reports) do
        is_error("TaskAbandoned", report.err)
        reports[k] = nil
      end
    end
  end))

  it("takes with it the tasks that await it", in_task(function()
    local log, note = recorder()
    watch()
    drop(function()
      local inner = flow.async(function()
        local _ <close> = closing(function() note("inner") end)
        flow.TaskCompletionSource().task:await()
      end)()
      flow.async(function()
        local _ <close> = closing(function() note("outer") end)
        inner:await()
      end)()
    end)
    table.sort(log)
    assert.same({ "inner", "outer" }, log)
  end))

  it("takes with it the continuations, waits and combinators upon it", function()
    assert.equal("survived\n", helper.output [[
      local flow = require "coflow"
      flow.on_unobserved_exception(false)
      local function park()
        local gate = flow.TaskCompletionSource()
        local task = flow.async(function() gate.task:await() end)()
        task:continue_with(print)
        task:wait_async(nil, flow.CancellationTokenSource().token)
        flow.when_all(task, gate.task)
        flow.when_any(task, gate.task)
        flow.spawn(function() for _ in flow.when_each { task } do print("an item") end end)
      end
      flow.run(function()
        for _ = 1, 20 do park() end
        for _ = 1, 4 do flow.yield() collectgarbage() end
      end)
      print("survived")
    ]])
  end)

  it("is collected although its own body holds what could complete it", in_task(function()
    local reports = watch()
    drop(function()
      flow.async(function()
        local own = flow.TaskCompletionSource()
        own.task:await()
        own:set_result()
      end)()
    end)
    assert.equal(1, #reports)
  end))

  it("is kept by whoever holds what it awaits", in_order(function()
    local reports = watch()
    local log, note = recorder()
    local gate = flow.TaskCompletionSource()
    drop(function()
      flow.async(function()
        note("got", gate.task:await())
      end)()
    end)
    assert.same({}, reports)
    gate:set_result("it")
    slowly()
    assert.same({ "got it" }, log)
  end))

  it("is kept while it sleeps, is queued or awaits one that does", in_task(function()
    local reports = watch()
    local log, note = recorder()
    drop(function()
      flow.spawn(function()
        flow.sleep(5)
        note("slept")
      end)
      local inner = flow.spawn(function()
        flow.delay(6):await()
        note("delay is over")
      end)
      flow.spawn(function()
        inner:await()
        note("inner is over")
      end)
      flow.spawn(note, "queued")
    end)
    flow.sleep(10)
    assert.same({}, reports)
    assert.same({ "queued", "slept", "delay is over", "inner is over" }, log)
  end))

  it("is kept by an armed deadline over its wait", in_task(function()
    local reports = watch()
    local log, note = recorder()
    drop(function()
      flow.async(function()
        note(raised(flow.await, flow.TaskCompletionSource().task:wait_async(5)).name)
      end)()
    end)
    assert.same({}, reports)
    flow.sleep(10)
    assert.same({ "Timeout" }, log)
  end))

  local WAITS = {
    wait_async = function(token) flow.TaskCompletionSource().task:wait_async(nil, token):await() end,
    delay = function(token) flow.delay(math.huge, token):await() end,
    sleep = function(token) flow.sleep(math.huge, token) end,
    continue_with = function(token)
      flow.TaskCompletionSource().task:continue_with(print, { token = token }):await()
    end,
  }
  for what, wait in pairs(WAITS) do
    it("is kept in " .. what .. " by a source that is going to cancel it", in_task(function()
      local reports = watch()
      local log, note = recorder()
      drop(function()
        flow.async(function()
          local source = flow.CancellationTokenSource()
          source:cancel_after(5)
          note(raised(wait, source.token).name)
        end)()
        flow.async(function() note(raised(wait, flow.CancellationTokenSource(6).token).name) end)()
      end)
      assert.same({}, reports)
      flow.sleep(10)
      assert.same({ "OperationCanceled", "OperationCanceled" }, log)
    end))

    it("ends once in " .. what .. ", given up or canceled, when only a token is left", in_order(function()
      local reports = watch()
      local log, note = recorder()
      local source = flow.CancellationTokenSource()
      drop(function()
        flow.async(function()
          local _ <close> = closing(function() note("closed") end)
          wait(source.token)
        end)()
      end)
      local abandoned = #reports > 0
      if abandoned then
        is_error("TaskAbandoned", reports[1].err)
        assert.same({ "closed" }, log)
      end
      source:cancel()
      collect()
      assert.same({ "closed" }, log)
      assert.equal(abandoned, #reports > 0)
    end))
  end

  it("may close objects of ours that were collected with it", in_order(function()
    watch()
    local log, note = recorder()
    local loc = flow.AsyncLocal("user")
    drop(function()
      for _ = 1, 20 do
        flow.async(function()
          local source <close> = flow.CancellationTokenSource(600)
          local linked <close> = flow.CancellationTokenSource.linked(source.token)
          local _ <close> = closing(function() note("closed") end)
          local _ <close> = loc:with("inner")
          local _ <close> = flow.ExecutionContext.suppress_flow()
          local _ <close> = linked.token:register(print)
          source:cancel_after(math.huge)
          flow.TaskCompletionSource().task:await()
        end)()
      end
    end)
    assert.equal(20, #log)
    assert.is_nil(loc.value)
  end))

  it("is not reported when the state closes, and nothing crashes then", function()
    assert.equal("end\n", helper.output [[
      local flow = require "coflow"
      collectgarbage("stop")
      gate = flow.TaskCompletionSource()
      for i = 1, 10 do
        flow.async(function()
          local source <close> = flow.CancellationTokenSource(600)
          local _ <close> = source.token:register(print)
          gate.task:await()
        end)()
        flow.async(function() flow.TaskCompletionSource().task:await() end)()
        flow.spawn(flow.sleep, 600)
      end
      flow.yield()
      print("end")
    ]])
  end)

  it("goes to nobody when reports are off, but its <close> variables run", in_task(function()
    flow.on_unobserved_exception(false)
    local log, note = recorder()
    drop(function()
      flow.async(function()
        local _ <close> = closing(function() note("closed") end)
        flow.TaskCompletionSource().task:await()
      end)()
    end)
    assert.same({ "closed" }, log)
  end))

  it("never is one whose task object alone was dropped", in_task(function()
    local reports = watch()
    local weak = setmetatable({}, { __mode = "k" })
    local gate = flow.TaskCompletionSource()
    drop(function() weak[flow.async(function() gate.task:await() end)()] = true end)
    assert.same({}, reports)
    assert.truthy(next(weak))
    gate:set_result()
    drop(slowly)
    assert.is_nil(next(weak))
  end))
end)
