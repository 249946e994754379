-- Misuse: every public function and method, called with missing, wrong and hostile arguments, answers with
-- an error that names what is wrong, and leaves its objects as they were.

local flow = require "coflow"
local helper = require "spec.helper"

local in_task = helper.in_task

-- The names that a case may use, made anew for each group of cases.
local function objects()
  local o = setmetatable({}, { __index = _G })
  o.flow, o.Task, o.errors = flow, flow.Task, flow.errors
  o.gate = flow.TaskCompletionSource()
  o.task, o.done, o.cold = o.gate.task, flow.Task.completed_task, flow.Task.new(print)
  o.source = flow.CancellationTokenSource()
  o.token, o.none, o.canceled = o.source.token, flow.CancellationToken.none, flow.CancellationToken.canceled
  o.registration = o.token:register(print)
  o.loc = flow.AsyncLocal("user")
  o.Context, o.context = flow.ExecutionContext, flow.ExecutionContext.capture()
  o.file, o.co, o.fn = io.stdout, coroutine.create(print), function() end
  o.nan, o.huge = 0 / 0, math.huge
  o.hostile = setmetatable({}, {
    __index = error, __len = error, __pairs = error, __tostring = error, __name = 42,
  })
  return o
end

-- Checks that the objects are as `objects` made them.
local function check_unharmed(o)
  assert.equal("waiting_for_activation", o.task.status)
  assert.equal("created", o.cold.status)
  assert.is_false(o.token.is_cancellation_requested)
  assert.is_true(o.registration:unregister())
  assert.is_nil(o.loc.value)
  o.source:dispose()
  o.gate:set_result()
end

-- Whether `err` is what was expected of the function `name`: the number of a bad argument, "self" for a
-- method's object, "text" for any message, the name of an error object, or a list of such.
local function is_answer(err, expected, name)
  if type(expected) == "table" then
    for _, one in ipairs(expected) do
      if is_answer(err, one, name) then
        return true
      end
    end
    return false
  elseif type(expected) == "string" and flow.errors.is(err, expected) then
    return true
  elseif type(err) ~= "string" then
    return false
  elseif expected == "self" and err:find(("calling '[^']*%s' on bad self"):format(name)) then
    return true
  end
  local number = expected == "self" and 1 or expected
  return expected == "text" or err:find(("bad argument #%s to '[^']*%s' %%("):format(number, name)) ~= nil
end

-- What is wrong with the answer to `code`, or nil. `word`, if any, must be in the message.
local function complaint(code, o, expected, word)
  local ok, err = pcall(assert(load(code, "=case", "t", o)))
  if ok then
    return code .. ": no error"
  end
  local name = code:match("[.:]([%a_][%w_]*)%s*[%({]")
  if not is_answer(err, expected, name) or word and not tostring(err):find(word, 1, true) then
    return ("%s: %s"):format(code, tostring(err))
  end
end

-- Runs the cases, each { code, expected, word }, and reports all that are answered badly.
local function check(cases)
  local o = objects()
  local complaints = {}
  for _, case in ipairs(cases) do
    complaints[#complaints + 1] = complaint(case[1], o, case[2], case[3])
  end
  assert.equal("", table.concat(complaints, "\n"))
  check_unharmed(o)
end

-- One case for each of `values` as the argument that takes the place of %s in `code`; "" is none.
local function each(code, values, expected, word)
  local cases = {}
  for i, value in ipairs(values) do
    cases[i] = { (code:format(value):gsub(", %)", ")")), expected, word }
  end
  return cases
end

local function join(...)
  local all = {}
  for _, cases in ipairs { ... } do
    table.move(cases, 1, #cases, #all + 1, all)
  end
  return all
end

local NOT_FUNCTIONS = { "", "nil", "42", "'x'", "true", "{}", "task", "token", "file", "co", "hostile" }
local NOT_AWAITABLE = {
  "", "nil", "42", "'x'", "true", "{}", "fn", "token", "source", "gate", "file", "co", "hostile",
  "setmetatable({}, { __await = 42 })", "setmetatable({}, { __await = {} })",
}
local NOT_SELF = { "", "nil", "42", "'x'", "true", "{}", "fn", "file", "co", "hostile" }
local NOT_TOKENS = { "42", "'x'", "true", "{}", "fn", "source", "task", "file", "hostile" }
local NOT_TIMES = { "nan", "-1", "-1e-9", "-huge", "'x'", "true", "{}", "fn", "token", "file" }

-- Calls each of the methods with a dot, on everything that is not its object.
local function on_others(object, methods, others)
  local cases = {}
  for _, method in ipairs(methods) do
    for _, value in ipairs(NOT_SELF) do
      cases[#cases + 1] = { ("%s.%s(%s)"):format(object, method, value), "self" }
    end
    for _, value in ipairs(others) do
      cases[#cases + 1] = { ("%s.%s(%s)"):format(object, method, value), "self" }
    end
  end
  return cases
end

describe("misuse of functions outside every task", function()
  it("is answered by run and main", function()
    check(join(each("flow.run(%s)", NOT_FUNCTIONS, 1), each("flow.main(%s)", NOT_FUNCTIONS, 1)))
  end)

  it("is answered by spawn, async, await and delay as inside one", function()
    check {
      { "flow.spawn(42)", 1 }, { "flow.async(42)", 1 }, { "flow.await(42)", 1 }, { "flow.delay(-1)", 1 },
      { "flow.sleep(nan)", 1 }, { "flow.await_all(task, 42)", 2 }, { "flow.await_any()", "Argument" },
    }
  end)

  it("is answered by task:wait", function()
    check(join(
      each("task:wait(%s)", NOT_TIMES, 1), each("done:wait(%s)", NOT_TIMES, 1),
      each("task:wait(0, %s)", NOT_TOKENS, 2), each("task:wait(nil, %s)", NOT_TOKENS, 2)
    ))
  end)

  it("is answered by the loop", function()
    check(join(
      each("flow.loop.run(%s)", { "42", "'bogus'", "'Default'", "{}", "true", "fn" }, 1),
      { { "flow.loop.run('bogus')", 1, "bogus" } }
    ))
  end)
end)

describe("misuse", function()
  for _, name in ipairs { "spawn", "async", "call", "Task.run", "Task.new" } do
    it("is answered by " .. name, in_task(function()
      check(each("flow." .. name .. "(%s)", NOT_FUNCTIONS, 1))
    end))
  end

  it("is answered by flow.pcall", in_task(function()
    check { { "flow.pcall()", 1 } }
  end))

  for _, name in ipairs { "await", "try_await" } do
    it("is answered by " .. name, in_task(function()
      check(join(
        each("flow." .. name .. "(%s)", NOT_AWAITABLE, 1),
        each("flow." .. name .. "(%s)", { "{ task, done }", "{ done }", "{ user = done }" }, 1, "when_all")
      ))
    end))
  end

  for _, name in ipairs { "when_all", "when_any", "await_all", "await_any" } do
    it("is answered by " .. name, in_task(function()
      local one = "flow." .. name .. "(%s)"
      check(join(
        each(one, { "nil", "42", "'x'", "true", "fn", "token", "source", "gate", "file", "co" }, 1),
        each(one, { "{ 42 }", "{ done, {} }", "{ { done } }", "{ nil, done, n = 2 }", "{ false }" }, 1),
        each(one, { "{ n = 1 }", "{ done, n = -1 }", "{ done, n = 1.5 }", "{ done, n = 'x' }" }, 1),
        each(one, { "{ n = 1e15 }", "{ n = math.maxinteger }" }, 1),
        each(one, { "{ user = 42 }", "{ user = done, orders = fn }", "{ user = done, [1] = 42 }" }, 1),
        each("flow." .. name .. "(done, %s)", { "nil", "42", "'x'", "{}", "{ done }", "file" }, 2)
      ))
    end))
  end

  it("is answered by when_each", in_task(function()
    check(join(
      each("flow.when_each(%s)", { "", "nil", "42", "'x'", "true", "fn", "file", "co" }, 1),
      each("flow.when_each(%s)", { "{ 42 }", "{ done, {} }", "{ nil, done, n = 2 }", "{ n = 1e15 }" }, 1),
      each("flow.when_each(%s)", { "{ user = 42 }" }, 1, "user")
    ))
  end))

  for _, name in ipairs { "sleep", "delay", "Task.delay" } do
    it("is answered by " .. name, in_task(function()
      check(join(
        each("flow." .. name .. "(%s)", NOT_TIMES, 1),
        each("flow." .. name .. "(%s)", { "", "nil" }, 1),
        each("flow." .. name .. "(1, %s)", NOT_TOKENS, 2),
        each("flow." .. name .. "(0, %s)", NOT_TOKENS, 2)
      ))
    end))
  end

  it("is answered by on_unobserved_exception", in_task(function()
    check(each("flow.on_unobserved_exception(%s)", { "42", "'x'", "true", "{}", "task", "file" }, 1))
  end))

  it("is answered by the errors", in_task(function()
    check(join(
      each("errors.Timeout(%s)", { "{}", "true", "fn", "task" }, 1),
      each("errors.Timeout('late', %s)", { "42", "'x'", "true", "fn", "task" }, 2),
      each("errors.is(done, %s)", { "", "nil", "{}", "true", "fn" }, 2)
    ))
  end))
end)

describe("misuse of a task", function()
  local METHODS = {
    "await", "try_await", "results", "wait", "wait_async", "continue_with", "traceback", "start",
    "run_synchronously",
  }

  it("is answered by its methods on other objects", in_task(function()
    check(on_others("task", METHODS, { "token", "source", "gate", "loc", "context", "registration" }))
  end))

  it("is answered by wait_async, complete or not", in_task(function()
    for _, object in ipairs { "task", "done" } do
      check(join(
        each(object .. ":wait_async(%s)", NOT_TIMES, 1),
        each(object .. ":wait_async(1, %s)", NOT_TOKENS, 2),
        each(object .. ":wait_async(nil, %s)", NOT_TOKENS, 2)
      ))
    end
  end))

  it("is answered by continue_with", in_task(function()
    check(join(
      each("task:continue_with(%s)", NOT_FUNCTIONS, 1),
      each("task:continue_with(fn, %s)", { "42", "'any'", "true", "fn", "token" }, 2),
      {
        { "task:continue_with(fn, { onn = 'any' })", 2, "onn" },
        { "task:continue_with(fn, { on = 'any', bogus = 1 })", 2, "bogus" },
        { "task:continue_with(fn, { [42] = 1 })", 2, "42" },
        { "task:continue_with(fn, { on = 'never' })", 2, "on" },
        { "task:continue_with(fn, { on = 42 })", 2, "on" },
        { "task:continue_with(fn, { token = 42 })", 2, "token" },
        { "task:continue_with(fn, { token = source })", 2, "token" },
      }
    ))
  end))

  it("is answered by start and run_synchronously", in_task(function()
    check {
      { "task:start()", "InvalidOperation" }, { "task:run_synchronously()", "InvalidOperation" },
      { "done:start()", "InvalidOperation" }, { "done:run_synchronously()", "InvalidOperation" },
    }
  end))

  it("is answered by wait inside a task", in_task(function()
    check { { "task:wait()", "InvalidOperation" }, { "task:wait(0)", "InvalidOperation" } }
  end))

  it("is answered by assignments", in_task(function()
    check {
      { "task.name = {}", "text", "name" }, { "task.name = true", "text", "name" },
      { "task.status = 'faulted'", "text", "status" }, { "task.result = 42", "text", "result" },
      { "task.bogus = 42", "text", "bogus" }, { "task[42] = 42", "text", "42" },
    }
  end))

  it("is answered by the functions that make complete tasks", in_task(function()
    check(join(
      each("Task.from_canceled(%s)", NOT_TOKENS, 1),
      each("Task.from_canceled(%s)", { "", "nil" }, { 1, "Argument" }),
      each("Task.from_canceled(%s)", { "none", "token" }, "Argument")
    ))
  end))
end)

describe("misuse of a completion source", function()
  local METHODS = {
    "set_result", "set_exception", "set_canceled",
    "try_set_result", "try_set_exception", "try_set_canceled",
  }

  it("is answered by its methods on other objects", in_task(function()
    check(on_others("gate", METHODS, { "task", "done", "token", "source", "loc", "context" }))
  end))

  it("is answered by set_canceled, and the task stays pending", in_task(function()
    check(join(
      each("gate:set_canceled(%s)", NOT_TOKENS, 1), each("gate:try_set_canceled(%s)", NOT_TOKENS, 1)
    ))
  end))

  it("is answered when it is completed twice", in_task(function()
    local o = objects()
    o.gate:set_result(5)
    for _, code in ipairs { "gate:set_result()", "gate:set_exception(1)", "gate:set_canceled()" } do
      assert.is_nil(complaint(code, o, "InvalidOperation"))
    end
    assert.equal(5, o.task.result)
    o.source:dispose()
  end))

  it("is answered by assignments", in_task(function()
    check { { "gate.task = done", "text" }, { "gate.bogus = 42", "text" } }
  end))
end)

describe("misuse of an async local", function()
  it("is answered by its maker", in_task(function()
    check(join(
      each("flow.AsyncLocal(%s)", { "true", "fn", "task", "file" }, 1),
      {
        { "flow.AsyncLocal { bogus = 1 }", 1, "bogus" }, { "flow.AsyncLocal { name = {} }", 1, "name" },
        { "flow.AsyncLocal { value_changed = 42 }", 1, "value_changed" },
        { "flow.AsyncLocal { flow = 'never' }", 1, "flow" },
      }
    ))
  end))

  it("is answered by its methods on other objects, and by assignments", in_task(function()
    check(join(
      on_others("loc", { "get", "set", "with" }, { "task", "token", "source", "gate", "context" }),
      { { "loc.bogus = 42", "text", "value" } }
    ))
  end))
end)

describe("misuse of an execution context", function()
  it("is answered by its functions", in_task(function()
    local not_contexts = { "42", "'x'", "true", "{}", "task", "loc", "file" }
    check(join(
      each("Context.run(%s, fn)", not_contexts, 1), each("Context.restore(%s)", not_contexts, 1),
      each("Context.run(context, %s)", NOT_FUNCTIONS, 2), each("context:run(%s)", NOT_FUNCTIONS, 1),
      each("Context.wrap(%s)", NOT_FUNCTIONS, 1),
      each("context:get(%s)", { "", "nil", "42", "'user'", "{}", "task", "file" }, 1),
      {
        { "Context.run(nil, fn)", "InvalidOperation" }, { "Context.restore(nil)", "InvalidOperation" },
        { "Context.restore_flow()", "InvalidOperation" },
      }
    ))
  end))

  it("is answered by its methods on other objects", in_task(function()
    local cases = on_others("context", { "enter", "get" }, { "task", "token", "source", "gate", "loc" })
    for _, case in ipairs(cases) do
      if case[1]:find("enter%(n?i?l?%)") then
        case[2] = { "self", "InvalidOperation" } -- as restore(nil)
      end
    end
    check(cases)
  end))
end)

describe("misuse of cancellation", function()
  it("is answered by the maker of sources", in_task(function()
    check(join(
      each("flow.CancellationTokenSource(%s)", NOT_TIMES, 1),
      each("flow.CancellationTokenSource.linked(%s)", NOT_TOKENS, 1),
      each("flow.CancellationTokenSource.linked(token, %s)", NOT_TOKENS, 2),
      { { "flow.CancellationTokenSource.linked(token, nil)", 2 } }
    ))
  end))

  it("is answered by a source's methods", in_task(function()
    check(join(
      each("source:cancel_after(%s)", NOT_TIMES, 1),
      each("source:cancel('enough', %s)", { "42", "'x'", "true", "fn" }, 2),
      { { "source:cancel('enough', { throw = true })", 2, "throw" } },
      on_others("source", {
        "cancel", "cancel_async", "cancel_after", "try_reset", "dispose",
      }, { "task", "token", "gate", "loc", "context", "registration" })
    ))
  end))

  it("is answered by a disposed source", in_task(function()
    local o = objects()
    o.source:dispose()
    for _, code in ipairs { "source:cancel()", "source:cancel_after(1)", "source:try_reset()" } do
      assert.is_nil(complaint(code, o, "ObjectDisposed"))
    end
    assert.is_false(o.token.is_cancellation_requested)
    o.gate:set_result()
  end))

  it("is answered by a token's methods, also those of none and of a canceled one", in_task(function()
    check(join(
      each("token:register(%s)", NOT_FUNCTIONS, 1), each("token:unsafe_register(%s)", NOT_FUNCTIONS, 1),
      each("none:register(%s)", NOT_FUNCTIONS, 1), each("canceled:register(%s)", NOT_FUNCTIONS, 1),
      on_others("token", {
        "throw_if_cancellation_requested", "register", "unsafe_register", "wait",
      }, { "task", "source", "gate", "loc", "context", "registration" }),
      on_others("registration", { "unregister", "dispose" }, { "task", "token", "source", "gate" })
    ))
  end))
end)

-- In a process of its own: a crash costs one test and shows which.
local FUZZ = [[
local flow = require "coflow"
local seed, rounds = %d, %d
math.randomseed(seed)
flow.on_unobserved_exception(false)

local function objects()
  local gate, source = flow.TaskCompletionSource(), flow.CancellationTokenSource()
  local loc = flow.AsyncLocal()
  return {
    gate, gate.task, source, source.token, source.token:register(function() end), loc, loc:with(1),
    flow.ExecutionContext.capture(), flow.ExecutionContext.suppress_flow(), flow.Task.new(function() end),
    flow.delay(1000), flow.spawn(function() end), flow.when_all(gate.task), flow.when_any(gate.task),
    flow.CancellationTokenSource.linked(source.token), flow.Task.from_exception("boom"),
    flow.Task.from_canceled(flow.CancellationToken.canceled), flow.CancellationToken.none,
    flow.async(function() gate.task:await() end)(), flow.errors.Timeout("late"),
  }
end

local PLAIN = {
  true, false, 0, 1, -1, 2, 0.5, 0/0, 1/0, -1/0, 2^53, 2^63, math.maxinteger, math.mininteger, "", "x", "any",
  ("x"):rep(1000), "status", "task", "value", {}, { n = -1 }, { n = 1e15 }, { 1, 2 }, { on = 1 },
  io.stdout, function() end, error, coroutine.yield, coroutine.create(function() end),
  function() return flow.current_task():await() end,
  setmetatable({}, { __await = error }), setmetatable({}, { __index = error }),
  setmetatable({}, {
    __await = function(x) return x end, __close = error, __gc = error, __name = "coflow.Task",
  }),
}

local FUNCTIONS = {
  "run", "main", "spawn", "async", "call", "await", "try_await", "pcall", "await_all", "await_any",
  "yield", "sleep", "delay", "when_all", "when_any", "when_each", "current_task", "is_awaitable_here",
  "AsyncLocal", "CancellationTokenSource", "TaskCompletionSource",
}
local MEMBERS = {
  "await", "try_await", "results", "wait", "wait_async", "continue_with", "traceback", "start",
  "run_synchronously", "set_result", "set_exception", "set_canceled", "try_set_result",
  "try_set_exception", "try_set_canceled", "get", "set", "with", "enter", "run", "undo", "dispose",
  "unregister", "register", "unsafe_register",
  "throw_if_cancellation_requested", "cancel", "cancel_async", "cancel_after", "try_reset",
}

local pool, list
local function refill()
  pool, list = objects(), {}
  for _, name in ipairs(FUNCTIONS) do
    list[#list + 1] = flow[name]
  end
  for _, class in ipairs { flow.Task, flow.ExecutionContext, flow.CancellationTokenSource, flow.errors } do
    for _, name in ipairs {
      "new", "from_result", "from_exception", "from_canceled", "capture", "run", "restore", "wrap",
      "suppress_flow", "restore_flow", "is_flow_suppressed", "linked", "is", "Timeout",
    } do
      local ok, fn = pcall(function() return class[name] end)
      list[#list + 1] = ok and fn or nil
    end
  end
  for _, object in ipairs(pool) do
    for _, name in ipairs(MEMBERS) do
      local ok, fn = pcall(function() return object[name] end)
      list[#list + 1] = ok and fn or nil
    end
    local events = {}
    for event, fn in pairs(debug.getmetatable(object)) do
      -- Only `debug` reaches finalizers: the one way in that is not ours to guard.
      events[#events + 1] = event ~= "__gc" and type(fn) == "function" and event or nil
    end
    table.sort(events) -- the order of pairs differs from run to run
    for _, event in ipairs(events) do
      list[#list + 1] = debug.getmetatable(object)[event]
    end
  end
end

local function any()
  if math.random() < 0.5 then
    return pool[math.random(#pool)]
  end
  return PLAIN[math.random(#PLAIN)]
end

local function attempt()
  local count = math.random(0, 4)
  local arguments = { any(), any(), any(), any() }
  local got = table.pack(pcall(list[math.random(#list)], table.unpack(arguments, 1, count)))
  if not got[1] and type(got[2]) == "string" and got[2]:find("coflow[^:]*%%.lua:%%d+: attempt to") then
    print("not guarded: " .. got[2])
  elseif got[1] and type(got[2]) == "function" then
    pcall(got[2], any(), any())
  end
end

flow.run(function()
  for _ = 1, rounds do
    refill()
    -- In a plain coroutine nothing can suspend; in tasks of their own some wait for ever.
    local co = coroutine.create(function()
      for _ = 1, 300 do attempt() end
    end)
    repeat
      assert(coroutine.resume(co))
    until coroutine.status(co) == "dead"
    for _ = 1, 200 do flow.spawn(attempt) end
    for _ = 1, 5 do flow.yield() end
    collectgarbage()
  end
end)
pool, list = nil, nil
collectgarbage()
print("survived")
os.exit(0, true)
]]

describe("calls with anything", function()
  for seed = 1, helper.many(5, 3) do
    it("neither crash nor fail for want of a check, seed " .. seed, function()
      local result = helper.child(FUZZ:format(seed, helper.many(40, 8)))
      assert.equal("survived\n", result.out, ("exit code %d: %s"):format(result.code, result.err))
      assert.equal(0, result.code, result.err)
    end)
  end
end)

describe("the coroutine of a task", function()
  it("crashes nothing when others resume or close it", function()
    assert.equal("survived\n", helper.output [[
      local flow = require "coflow"
      flow.on_unobserved_exception(false)
      local function nothing() end
      for _, use in ipairs {
        coroutine.resume, coroutine.close, coroutine.status, debug.traceback,
        function(co) coroutine.resume(co, 1, 2) coroutine.close(co) end,
        function(co) return flow.spawn(coroutine.close, co) end,
      } do
        flow.run(function()
          local gate, parked, queued, done = flow.TaskCompletionSource(), nil, nil, nil
          flow.async(function() done = coroutine.running() end)()
          flow.async(function()
            parked = coroutine.running()
            local _ <close> = setmetatable({}, { __close = nothing })
            gate.task:await()
          end)()
          flow.async(function() queued = coroutine.running() flow.yield() end)()
          for _, co in ipairs { parked, queued, done } do pcall(use, co) end
          local tasks = {}
          for i = 1, 10 do
            tasks[i] = flow.spawn(function() pcall(use, done) flow.yield() end)
          end
          gate:set_result()
          for i = 1, 10 do flow.yield() pcall(use, parked) end
          collectgarbage()
        end)
      end
      print("survived")
    ]])
  end)

  it("runs on in nobody else's hands", helper.in_order(function()
    local kept, log, note = nil, helper.recorder()
    local task = flow.spawn(function()
      kept = coroutine.running()
      for i = 1, 3 do
        note(i, flow.current_task().name)
        flow.yield()
      end
    end)
    task.name = "victim"
    flow.yield()
    for _ = 1, 5 do assert.is_true(coroutine.resume(kept, task, 0, 1e9)) end
    note("tried")
    task:await()
    assert.same({ "1 victim", "tried", "2 victim", "3 victim" }, log)
  end))

  it("is told to be closed also while it waits for a hot start far down", function()
    assert.equal("9\n", helper.output [[
      local flow = require "coflow"
      local told
      flow.on_unobserved_exception(function(err) told = err.message end)
      local function nest(n)
        return flow.async(function()
          local me = coroutine.running()
          if n < 20 then
            nest(n + 1)
          else
            flow.async(function() coroutine.close(me) end)()
          end
        end)()
      end
      flow.run(function()
        nest(1)
        collectgarbage()
        flow.yield()
        assert(flow.spawn(function() return 9 end):await() == 9)
      end)
      collectgarbage()
      flow.run(flow.yield)
      assert(told:find("somebody has closed the coroutine", 1, true), told)
      print(9)
    ]])
  end)
end)

describe("the coroutine of a root task", function()
  it("is told to be closed while it waits, also if nothing else is alive, or much is", function()
    for _, beside in ipairs { function() end, function() flow.sleep(1e6) end } do
      local ok, err = pcall(flow.testing.run, function()
        local other = flow.spawn(beside)
        local root = coroutine.running()
        local source = flow.TaskCompletionSource()
        flow.spawn(function()
          coroutine.close(root)
          other:cancel()
          source:set_result(4)
        end)
        return source.task:await()
      end)
      assert.is_false(ok)
      assert.truthy(tostring(err):find("somebody has closed the coroutine", 1, true), err)
    end
  end)
end)

describe("a task", function()
  it("starts without the hook of one that had its coroutine before", helper.in_task(function()
    local calls, usual = 0, debug.gethook() -- make check has one
    for _ = 1, 3 do
      flow.spawn(function()
        assert.equal(usual, (debug.gethook()))
        debug.sethook(function() calls = calls + 1 end, "l")
      end):await()
    end
    local before = calls
    flow.spawn(function()
      local n = 0
      for i = 1, 10 do n = n + i end
      return n
    end):await()
    assert.equal(before, calls)
  end))

  it("keeps its hook to itself when whoever starts others has one as well", helper.in_task(function()
    local count, lines = debug.gethook(), 0
    if count then return end -- make check has one, which must stay
    for _ = 1, 3 do
      flow.spawn(function() debug.sethook(function() lines = lines + 1 end, "l") end):await()
    end
    local before = lines
    flow.spawn(function()
      debug.sethook(function() end, "", 1000000)
      flow.spawn(function()
        local x = 1
        x = x + 1
        return x
      end):await()
      debug.sethook()
    end):await()
    assert.equal(before, lines)
  end))

  it("whose stack is changed by debug.setlocal fails", helper.in_task(function()
    local kept
    local task = flow.spawn(function()
      kept = coroutine.running()
      flow.yield()
    end)
    flow.yield()
    for level = 0, 3 do
      for i = 1, 6 do pcall(debug.setlocal, kept, level, i, nil) end
    end
    local ok, err = flow.try_await(task)
    assert.is_true(ok or tostring(err):find("has changed the stack", 1, true) ~= nil, err)
  end))
end)

describe("the coroutine of a task that has ended", function()
  local kept

  -- A task that ends, whose coroutine is the next one's.
  local function keep()
    flow.await(flow.spawn(function() kept = coroutine.running() end))
  end

  it("is dead when it is resumed", helper.in_task(function()
    keep()
    assert.same({ false, "cannot resume dead coroutine" }, { coroutine.resume(kept) })
    assert.equal(1, flow.await(flow.spawn(function() return 1 end)))
  end))

  it("starts no other task either in a program that does nothing else of the kind", function()
    assert.equal("true waiting_to_run 1 3\n", helper.output [[
      local flow = require "coflow"
      local kept
      flow.run(function()
        flow.spawn(function() kept = coroutine.running() end):await()
        local task = flow.spawn(function(...) return ... end, 1, 2, 3)
        local ok = coroutine.resume(kept, "stranger", 2)
        coroutine.resume(kept)
        local status = task.status
        local a, _, c = task:await()
        print(("%s %s %s %s"):format(ok, status, a, c))
      end)
    ]])
  end)

  it("keeps no values that are given to it, and takes none away", helper.in_task(function()
    keep()
    local weak = setmetatable({ {} }, { __mode = "v" })
    local task = flow.spawn(function(...) return select("#", ...), ... end, nil, nil)
    assert.is_true(coroutine.resume(kept, weak[1], table.unpack({}, 1, 200)))
    collectgarbage()
    assert.is_nil(weak[1])
    assert.same({ n = 3, 2 }, table.pack(task:await()))
  end))

  it("is dead when its own task is given to it", helper.in_task(function()
    local task = flow.spawn(function() kept = coroutine.running() end)
    task:await()
    assert.same({ false, "cannot resume dead coroutine" }, { coroutine.resume(kept, task, task) })
    assert.same({ false, "cannot resume dead coroutine" }, { coroutine.resume(kept, task, task) })
    assert.equal(1, flow.spawn(function() return 1 end):await())
  end))

  it("starts no other task when it is resumed", helper.in_task(function()
    keep()
    local n = 0
    local task = flow.spawn(function(...)
      n = n + 1
      flow.yield()
      return ...
    end, 1, nil, 3)
    for _ = 1, 3 do coroutine.resume(kept, "stranger") end
    assert.equal(0, n)
    assert.equal("waiting_to_run", task.status)
    assert.same({ 1, nil, 3 }, { flow.await(task) })
    assert.equal(1, n)
  end))

  for how, start in pairs {
    queued = function(fn) return flow.spawn(fn) end,
    cold = function(fn) return flow.Task.new(fn) end,
    continuation = function(fn) return flow.TaskCompletionSource().task:continue_with(fn) end,
    scheduled = function(fn) return flow.spawn_on(flow.TaskScheduler.limited(1), fn) end,
  } do
    for look, await in pairs {
      await = flow.try_await,
      when_all = function(task) return flow.try_await(flow.when_all(task)) end,
      await_any = function(task)
        return flow.try_await((flow.await_any(task, flow.TaskCompletionSource().task)))
      end,
      start = function(task)
        local ok, err = pcall(task.start, task)
        return ok, task.exception and err
      end,
      status = function(task) return task.status ~= "faulted" and "running" or false, task.exception end,
    } do
      if look ~= "start" or how == "cold" then
        it(("takes a %s task with it when it is closed, which is told: %s"):format(how, look), helper.in_task(function()
          keep()
          local task = start(function() end)
          coroutine.close(kept)
          local ok, err = await(task)
          if ok == "running" then ok, err = flow.try_await(task) end
          assert.is_false(ok)
          local why = look == "start" and "" or "somebody has closed the coroutine of task"
          helper.is_error("InvalidOperation", err, why)
        end))
      end
    end
  end

  for _, limit in ipairs { 1, 2 } do
    it("fails a group when it is closed and a child's, limit " .. limit, helper.in_task(function()
      local err = helper.raised(flow.task_group, function(group)
        group:spawn(flow.sleep, 1)
        keep()
        group:spawn(function() end)
        coroutine.close(kept)
      end, { limit = limit })
      helper.is_error("InvalidOperation", err, "somebody has closed")
    end))
  end
end)

describe("finalizers and metamethods", function()
  it("called by hand, on their own objects and on others, crash nothing", function()
    assert.equal("survived\n", helper.output [[
      local flow = require "coflow"
      flow.on_unobserved_exception(false)
      local function fn() end
      local function make()
        local gate, source = flow.TaskCompletionSource(), flow.CancellationTokenSource(5)
        local loc = flow.AsyncLocal()
        return {
          gate, gate.task, source, source.token, source.token:register(fn), loc, loc:with(1),
          flow.ExecutionContext.capture(), flow.ExecutionContext.suppress_flow(), flow.delay(5),
          flow.Task.new(fn), flow.CancellationTokenSource.linked(source.token),
          flow.async(function() gate.task:await() end)(), flow.when_all(gate.task),
          io.tmpfile(), {}, "x", 42,
        }
      end
      flow.run(function()
        for _, owner in ipairs(make()) do
          for _, event in pairs(debug.getmetatable(owner) or {}) do
            if type(event) == "function" then
              for _, object in ipairs(make()) do
                pcall(event, object)
                pcall(event, object, "task")
                pcall(event, object, 42, nil)
                pcall(event, object)
              end
              pcall(event)
            end
          end
        end
        flow.yield()
      end)
      collectgarbage()
      print("survived")
      os.exit(0, true)
    ]])
  end)

  it("of users may close the coroutine of a task, which fails or is let go", function()
    assert.equal("InvalidOperation\tfaulted\nsurvived\n", helper.output [[
      local flow = require "coflow"
      flow.on_unobserved_exception(false)
      flow.run(function()
        local open = {}
        local function park(wait)
          return flow.spawn(function()
            open[#open + 1] = coroutine.running()
            wait()
          end)
        end
        local gate = flow.TaskCompletionSource()
        park(function() gate.task:await() end)
        park(function() flow.sleep(math.huge) end)
        park(function() flow.with_timeout(60, function() flow.await_any(gate.task, flow.delay(60)) end) end)
        local timed = park(function() flow.with_timeout(60, function() gate.task:await() end) end)
        flow.yield()
        for i = 1, #open do coroutine.close(open[i]) end
        open = nil
        for _ = 1, 3 do collectgarbage() flow.yield() end
        print(select(2, timed:try_await()).name, timed.status)
        for _ = 1, 100 do flow.await_all(flow.spawn(flow.yield), flow.spawn(flow.yield)) end
        gate:set_result()
      end)
      collectgarbage()
      print("survived")
    ]])
  end)

  it("of users may use the library, whenever the collector runs them", function()
    assert.equal("survived\n", helper.output [[
      local flow = require "coflow"
      flow.on_unobserved_exception(false)
      collectgarbage("incremental", 1, 1000, 63) -- a whole cycle at each step
      math.randomseed(42)
      local source, loc = flow.CancellationTokenSource(), flow.AsyncLocal()
      local function fn() end
      local uses = {
        function() flow.spawn(flow.yield) end,
        function() flow.async(function() flow.sleep(1e-6) end)() end,
        function() flow.Task.new(fn):start() end,
        function() flow.Task.new(fn):run_synchronously() end,
        function() flow.delay(1e-6):continue_with(fn) end,
        function() flow.delay(1e-3):wait_async(1e-6, source.token) end,
        function() flow.when_all(flow.delay(1e-6), flow.when_any { flow.Task.completed_task }) end,
        function() flow.TaskCompletionSource():try_set_result(1, 2) end,
        function() flow.async(function() flow.TaskCompletionSource().task:await() end)() end,
        function() source.token:register(fn) source.token:register(fn):unregister() end,
        function() flow.CancellationTokenSource.linked(source.token):cancel() end,
        function() local old = source source = flow.CancellationTokenSource(1e-6) old:cancel() end,
        function() loc.value = {} end,
        function() local _ <close> = loc:with({}) flow.spawn(fn) end,
        function() local _ <close> = flow.ExecutionContext.suppress_flow() flow.spawn(fn) end,
        function() flow.call(function() loc.value = 1 end) end,
        function() flow.async(error)("boom") end,
        function() flow.run(fn) end, function() flow.yield() end, function() flow.loop.run("once") end,
      }
      local finalizers, inside = 2000, 0
      local function use()
        pcall(uses[math.random(#uses)])
      end
      local function arm()
        setmetatable({}, { __gc = function()
          finalizers = finalizers - 1
          if finalizers > 0 then
            inside = inside + 1
            if inside < 4 then use() use() end
            inside = inside - 1
            arm()
          end
        end })
      end
      arm() arm() arm()
      flow.run(function()
        local tasks = {}
        for i = 1, 20 do
          tasks[i] = flow.spawn(function()
            for _ = 1, 10 do use() flow.yield() flow.sleep(1e-6) end
          end)
        end
        flow.await_all(tasks)
      end)
      finalizers = 0
      collectgarbage()
      print("survived")
      os.exit(0, true)
    ]])
  end)

  it("of users may wait and set deadlines while others do, and no wait is lost", function()
    assert.equal("survived\n", helper.output [[
      local flow = require "coflow"
      local testing = require "coflow.testing"
      collectgarbage("incremental", 1, 1000, 63) -- a whole cycle at each step
      math.randomseed(42)
      local armed, gate, started, ended = false, nil, 0, 0
      local function await(task)
        started = started + 1
        flow.async(function() pcall(task.await, task) ended = ended + 1 end)()
      end
      local kinds = {
        function() await(gate.task) end,
        function() await(gate.task:continue_with(function() end)) end,
        function() await(gate.task:wait_async(5)) end,
        function(token) await(gate.task:wait_async(1, token)) end,
        function() await(flow.when_all(gate.task, gate.task)) end,
        function() await(flow.when_any(gate.task, flow.delay(5))) end,
        function(token) await(flow.delay(1, token)) end,
        function(token) await(flow.async(flow.sleep)(1, token)) end,
        function() await(flow.delay(9, flow.CancellationTokenSource(1).token)) end,
      }
      local function arm()
        setmetatable({}, { __gc = function()
          if armed then kinds[math.random(#kinds)]() arm() end
        end })
      end
      testing.run(function()
        for round = 1, 40 do
          gate, started, ended = flow.TaskCompletionSource(), 0, 0
          local source = flow.CancellationTokenSource()
          armed = true
          arm()
          for _ = 1, math.random(1, 60) do kinds[math.random(#kinds)](source.token) end
          armed = false
          if round % 2 == 0 then gate:set_result() else flow.sleep(2) gate:set_result() end
          flow.sleep(10)
          assert(started == ended, ("round %d: %d of %d ended"):format(round, ended, started))
        end
      end)
      print("survived")
    ]])
  end)

  it("of users may do anything in the middle of anything else", function()
    assert.equal("survived\n", helper.output [[
      local flow = require "coflow"
      local testing = require "coflow.testing"
      flow.on_unobserved_exception(false)
      collectgarbage("incremental", 1, 1000, 63) -- a whole cycle at each step
      local gate, source, token, started, ended
      local loc, watched = flow.AsyncLocal("user"), flow.AsyncLocal { value_changed = function() end }
      local context = flow.ExecutionContext.capture()
      -- The functions are made beforehand: making them would let the finalizer run too early.
      local function fn() end
      local function later() started = started + 1 flow.sleep(1) ended = ended + 1 end
      local finish = flow.async(function(task) pcall(task.await, task) ended = ended + 1 end)
      local function await(task) started = started + 1 finish(task) end
      local sleeping = flow.async(function()
        started = started + 1
        pcall(flow.sleep, 2, token)
        ended = ended + 1
      end)
      local operations = {
        function() token:register(fn) end,
        function() token:register(fn, 1, 2) end,
        function() token:register(fn):unregister() end,
        function() source:cancel("enough") end,
        function() await(source:cancel_async()) end,
        function() source:cancel_after(1) end,
        function() source:try_reset() end,
        function() source:dispose() end,
        function() flow.CancellationTokenSource.linked(token, token) end,
        function() flow.CancellationTokenSource.linked(token):cancel() end,
        function() flow.CancellationTokenSource(1).token:register(fn) end,
        function() await(flow.delay(1)) end,
        function() await(flow.delay(1, token)) end,
        function() sleeping() end,
        function() await(gate.task) end,
        function() await(gate.task:wait_async(1)) end,
        function() await(gate.task:wait_async(5, token)) end,
        function() await(gate.task:continue_with(fn)) end,
        function() await(gate.task:continue_with(fn, { token = token })) end,
        function() await(flow.when_all(gate.task, gate.task)) end,
        function() await(flow.when_all { a = gate.task, b = flow.delay(1) }) end,
        function() await(flow.when_any(gate.task, flow.delay(5))) end,
        function() gate:try_set_result(1, 2) end,
        function() gate:try_set_exception("boom") end,
        function() gate:try_set_canceled(token) end,
        function() flow.spawn(later) end,
        function() flow.Task.new(later):start() end,
        function() flow.Task.new(later):run_synchronously() end,
        function() loc.value, watched.value = started, started end,
        function() local _ <close> = loc:with(started) end,
        function() context:run(fn) end,
        function() flow.call(fn) end,
        function() local _ <close> = flow.ExecutionContext.suppress_flow() flow.spawn(later) end,
        function() gate.task.name = "gate" return gate.task.id, gate.task:traceback() end,
        function() flow.async(error)("boom") end,
        function() finish(flow.TaskCompletionSource().task) end,
        function() collectgarbage() end,
      }
      local finalizer, left, busy = nil, 0, false
      local metatable = {}
      metatable.__gc = function()
        if left > 0 and not busy then
          left = left - 1
          busy = true
          pcall(finalizer)
          busy = false
          setmetatable({}, metatable)
        end
      end
      testing.run(function()
        for i, operation in ipairs(operations) do
          for j = 1, #operations do
            for times = 1, 3 do
              gate, source, started, ended = flow.TaskCompletionSource(), flow.CancellationTokenSource(), 0, 0
              token = source.token
              finalizer, left = operations[j], times
              setmetatable({}, metatable)
              flow.call(pcall, operation)
              flow.call(pcall, operation)
              left = 0
              gate:try_set_result()
              flow.sleep(10)
              if started ~= ended then print(i, j, times, "started", started, "ended", ended) end
            end
          end
        end
      end)
      print("survived")
    ]])
  end)

  it("of pairs over a context take no other arguments", function()
    assert.equal("survived\n", helper.output [[
      local flow = require "coflow"
      local loc = flow.AsyncLocal("user")
      loc.value = 1
      local context = flow.ExecutionContext.capture()
      local step, state, control = pairs(context)
      for _, value in ipairs { 42, "x", false, {}, io.stdout, loc, flow.Task.completed_task } do
        pcall(step, value, control)
        pcall(step, state, value)
        pcall(step, context, value)
      end
      pcall(step)
      print("survived")
    ]])
  end)

  it("are blamed by their own name where one of ours calls what the user gave", in_task(function()
    local calls = {
      ["Channel.bounded"] = function() return flow.Channel.bounded(-1) end,
      ["TaskScheduler.limited"] = function() return flow.TaskScheduler.limited(0) end,
      ["net.connect"] = function() return flow.net.connect("127.0.0.1", 1, 5) end,
      ["process.run"] = function() return flow.process.run({ "true" }, 5) end,
      ["stream.from"] = function() return flow.stream.from(5) end,
    }
    local ways = {
      function(fn) flow.with_timeout(1, fn) end,
      function(fn) flow.shield(fn) end,
      function(fn) flow.shield({ grace = 1 }, fn) end,
      function(fn) flow.call(fn) end,
      function(fn) flow.with_cancellation(flow.CancellationToken.none, fn) end,
    }
    for name, fn in pairs(calls) do
      for _, way in ipairs(ways) do
        local err = helper.raised(way, fn)
        assert.matches("^[^:]*misuse_spec.lua:%d+: bad argument #%d to 'coflow." .. name:gsub("%.", "%%.") .. "'", err)
      end
    end
    assert.matches("bad argument #1 to 'coflow.Channel.bounded'",
      helper.raised(flow.with_timeout, 1, flow.Channel.bounded, -1))
  end))

  it("of classes may be called without the class", in_task(function()
    local call = getmetatable(flow.CancellationTokenSource).__call
    assert.is_false(call().is_cancellation_requested)
  end))

  it("are not reached by getmetatable of other modules' userdata", in_task(function()
    assert.is_false(flow.errors.is(io.stdout, "IO"))
    assert.is_nil(debug.getmetatable(io.stdout).__await)
  end))
end)
