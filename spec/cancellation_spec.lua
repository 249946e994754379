-- Cancellation: sources, tokens, registrations and links. Callbacks run inside cancel, newest first.

local flow = require "coflow"
local support = require "spec.support.flow_support"

local in_task, many = support.in_task, support.many
local in_order = support.in_order
local raises, bad_argument = support.raises, support.bad_argument
local recorder, weak, alive = support.recorder, support.weak, support.alive
local Source, Token = flow.CancellationTokenSource, flow.CancellationToken
local is = flow.errors.is

local function nothing() end
local function fails_with(problem) return function() error(problem, 0) end end

describe("a cancellation source", function()
  it("is not canceled at first", in_task(function()
    local source <close> = Source()
    assert.is_false(source.is_cancellation_requested)
    assert.is_false(source.token.is_cancellation_requested)
    assert.is_true(source.token.can_be_canceled)
    assert.is_nil(source.token.reason)
    source.token:throw_if_cancellation_requested()
  end))

  it("tells its token that it was canceled, and why", in_task(function()
    local reason = {}
    local source <close> = Source()
    source:cancel(reason)
    assert.is_true(source.is_cancellation_requested)
    assert.is_true(source.token.is_cancellation_requested)
    assert.is_true(source.token.can_be_canceled)
    assert.equal(reason, source.token.reason)
  end))

  it("takes any value as the reason", in_task(function()
    for _, reason in ipairs { 1, "text", true, false, {}, print } do
      local source <close> = Source()
      source:cancel(reason)
      assert.equal(reason, source.token.reason)
      local err = raises("OperationCanceled", function()
        source.token:throw_if_cancellation_requested()
      end)
      assert.equal(reason, err.reason)
      assert.equal("string", type(tostring(err)))
    end
  end))

  it("may be canceled without a reason", in_task(function()
    local source <close> = Source()
    source:cancel()
    assert.is_true(source.token.is_cancellation_requested)
    assert.is_nil(source.token.reason)
  end))

  it("makes throw_if_cancellation_requested raise an error that carries token and reason",
    in_task(function()
      local source <close> = Source()
      source:cancel("enough")
      local err = raises("OperationCanceled", function()
        source.token:throw_if_cancellation_requested()
      end)
      assert.equal(source.token, err.token)
      assert.equal(source.token, err.cause)
      assert.equal("enough", err.reason)
      assert.equal("OperationCanceled: " .. err.message, tostring(err))
    end))

  it("has one token; two sources have different ones", in_task(function()
    local one <close> = Source()
    local other <close> = Source()
    assert.equal(one.token, one.token)
    assert.are_not.equal(one.token, other.token)
    assert.are_not.equal(one.token, Token.none)
  end))

  it("keeps the first reason; a second cancel does nothing", in_task(function()
    local count = 0
    local source <close> = Source()
    source.token:register(function() count = count + 1 end)
    source:cancel("first")
    source:cancel("second")
    assert.equal("first", source.token.reason)
    assert.equal(1, count)
  end))

  it("works outside every task", function()
    local events, record = recorder()
    local source <close> = Source()
    source.token:register(record, "ran")
    source:cancel("why")
    assert.same({ "ran" }, events)
    assert.equal("why", source.token.reason)
  end)

  it("is canceled at birth when its delay is 0", in_task(function()
    local source <close> = Source(0)
    assert.is_true(source.is_cancellation_requested)
    assert.is_true(source.token.is_cancellation_requested)
  end))

  it("cancels itself after its delay, and never with math.huge or nil", in_task(function(clock)
    local source <close> = Source(5)
    local endless <close> = Source(math.huge)
    local unlimited <close> = Source(nil)
    local events, record = recorder()
    source.token:register(function() record(clock:now()) end)
    local start = clock:now()
    flow.sleep(4)
    assert.is_false(source.is_cancellation_requested)
    flow.sleep(2)
    assert.is_true(source.is_cancellation_requested)
    assert.same({ start + 5 }, events)
    flow.sleep(1e6)
    assert.is_false(endless.is_cancellation_requested)
    assert.is_false(unlimited.is_cancellation_requested)
  end))

  it("refuses a delay that is no time", function()
    bad_argument(1, "Source", function() local _ = Source(-1) end)
    bad_argument(1, "Source", function() local _ = Source(0 / 0) end)
    bad_argument(1, "Source", function() local _ = Source("soon") end)
    bad_argument(1, "Source", function() local _ = Source {} end)
  end)

  it("refuses unknown options of cancel by name, and is not canceled then", in_task(function()
    local source <close> = Source()
    bad_argument(2, "cancel", function() source:cancel("x", { throw_on_first = true }) end,
      "throw_on_first")
    bad_argument(2, "cancel", function() source:cancel("x", 1) end)
    assert.is_false(source.is_cancellation_requested)
  end))

  it("has methods that refuse a wrong self", function()
    local source <close> = Source()
    bad_argument(1, "cancel", function() source.cancel({}) end)
    bad_argument(1, "cancel_after", function() source.cancel_after(nil, 1) end)
    bad_argument(1, "register", function() source.token.register(source, nothing) end)
  end)
end)

describe("callbacks", function()
  it("run inside cancel, last registered first, with the flag already up", in_task(function()
    local events, record = recorder()
    local source <close> = Source()
    for i = 1, 4 do
      source.token:register(function()
        record(i)
        assert.is_true(source.is_cancellation_requested)
        assert.is_true(source.token.is_cancellation_requested)
        assert.equal("why", source.token.reason)
      end)
    end
    record("before")
    source:cancel("why")
    record("after")
    assert.same({ "before", 4, 3, 2, 1, "after" }, events)
  end))

  it("get the arguments given to register, nil included", in_task(function()
    local got = {}
    local source <close> = Source()
    local function keep(...) got[#got + 1] = table.pack(...) end
    source.token:register(keep, 1, nil, "three")
    source.token:unsafe_register(keep, nil, 2)
    source:cancel()
    assert.same({ nil, 2 }, { got[1][1], got[1][2] })
    assert.same({ 1, nil, "three" }, { got[2][1], got[2][2], got[2][3] })
  end))

  it("run in the context of their registration, those of unsafe_register in the canceler's",
    in_task(function()
      local loc = flow.AsyncLocal()
      local events, record = recorder()
      local source <close> = Source()
      for _, value in ipairs { "one", "two" } do
        loc.value = value
        source.token:register(function()
          record(loc.value)
          loc.value = "private"
        end)
      end
      source.token:unsafe_register(function() record(loc.value) end)
      loc.value = "canceler"
      source:cancel()
      assert.same({ "canceler", "two", "one" }, events)
      assert.equal("canceler", loc.value)
    end))

  it("run at once when the token is already canceled, and their registration is inert",
    in_task(function()
      local events, record = recorder()
      local source <close> = Source()
      source:cancel()
      local registration = source.token:register(record, "inline")
      source.token:unsafe_register(record, "unsafe")
      record("after")
      assert.same({ "inline", "unsafe", "after" }, events)
      assert.is_false(registration:unregister())
      registration:dispose()
    end))

  it("that run at once give their error to the caller as it is", in_task(function()
    local problem = {}
    local source <close> = Source()
    source:cancel()
    local _, err = pcall(function() source.token:register(fails_with(problem)) end)
    assert.equal(problem, err)
  end))

  it("registered by a callback run at once too", in_task(function()
    local events, record = recorder()
    local source <close> = Source()
    source.token:register(record, "first registered")
    source.token:register(function()
      record("enter")
      source.token:register(record, "inline")
      record("leave")
    end)
    source:cancel()
    assert.same({ "enter", "inline", "leave", "first registered" }, events)
  end))

  it("all run, and their errors come out as one Aggregate in the order they ran",
    in_task(function()
      local events, record = recorder()
      local problem = { "a table" }
      local source <close> = Source()
      source.token:register(function()
        record(1)
        error(problem)
      end)
      source.token:register(record, 2)
      source.token:register(function()
        record(3)
        error("a string", 0)
      end)
      local err = raises("Aggregate", function() source:cancel() end)
      assert.same({ 3, 2, 1 }, events)
      assert.equal(2, #err.inner_exceptions)
      assert.equal("a string", err.inner_exceptions[1])
      assert.equal(problem, err.inner_exceptions[2])
      assert.is_true(source.is_cancellation_requested)
    end))

  it("that fail alone come out as an Aggregate too, and only once", in_task(function()
    local problem = {}
    local source <close> = Source()
    source.token:register(fails_with(problem))
    local err = raises("Aggregate", function() source:cancel() end)
    assert.equal(1, #err.inner_exceptions)
    assert.equal(problem, err.inner_exceptions[1])
    source:cancel()
  end))

  it("do not go on after the first error with throw_on_first_exception", in_task(function()
    local events, record = recorder()
    local problem = {}
    local source <close> = Source()
    source.token:register(record, "never")
    source.token:register(fails_with(problem))
    source.token:register(record, "ran")
    local _, err = pcall(source.cancel, source, "why", { throw_on_first_exception = true })
    assert.equal(problem, err)
    assert.is_true(source.is_cancellation_requested)
    assert.equal("why", source.token.reason)
    source:cancel()
    assert.same({ "ran" }, events)
  end))

  it("that are dropped with throw_on_first_exception leave no scope uncanceled", in_task(function()
    local source, other = Source(), Source()
    local linked = Source.linked(source.token)
    local waits = {}
    for i = 1, 3 do
      waits[i] = flow.spawn(flow.with_cancellation, source.token, flow.with_cancellation, other.token, flow.sleep, 9)
    end
    flow.yield()
    raises("OperationCanceled", flow.with_cancellation, source.token, function()
      source.token:register(fails_with "first")
      local ran = {}
      flow.cancellation_token():register(function() ran[1] = true end)
      source.token:register(fails_with "last")
      local ok, err = pcall(source.cancel, source, "why", { throw_on_first_exception = true })
      assert.same({ false, "last" }, { ok, err })
      assert.is_true(flow.cancellation_token().is_cancellation_requested)
      assert.same({}, ran)
      flow.sleep(1)
    end)
    for i = 1, 3 do assert.equal("why", raises("OperationCanceled", flow.await, waits[i]).reason) end
    assert.is_false(linked.is_cancellation_requested) -- as in .NET
  end))

  it("of a linked source come as their Aggregate, with throw_on_first_exception too", in_task(function()
    local log, note = recorder()
    local parent <close> = Source()
    parent.token:register(note, "parent's, registered first")
    local child <close> = Source.linked(parent.token)
    child.token:register(error, "first", 0)
    child.token:register(error, "second", 0)
    local ok, err = pcall(parent.cancel, parent, nil, { throw_on_first_exception = true })
    assert.is_false(ok)
    assert.same({ "second", "first" }, err.inner_exceptions)
    assert.same({}, log)
    assert.is_true(child.is_cancellation_requested)
  end))

  it("all run with throw_on_first_exception when none fails", in_task(function()
    local events, record = recorder()
    local source <close> = Source()
    for i = 1, 3 do source.token:register(record, i) end
    source:cancel(nil, { throw_on_first_exception = true })
    assert.same({ 3, 2, 1 }, events)
  end))

  it("may cancel again, which does nothing", in_task(function()
    local events, record = recorder()
    local source <close> = Source()
    source.token:register(record, "last")
    source.token:register(function()
      record("enter")
      source:cancel("again")
      record("leave")
    end)
    source:cancel("first")
    assert.same({ "enter", "leave", "last" }, events)
    assert.equal("first", source.token.reason)
  end))

  it("may cancel other sources, whose callbacks then run inside", in_task(function()
    local events, record = recorder()
    local sources = { Source(), Source(), Source() }
    for i, source in ipairs(sources) do
      source.token:register(function()
        record("enter " .. i)
        if sources[i + 1] then sources[i + 1]:cancel("chain") end
        record("leave " .. i)
      end)
    end
    sources[1]:cancel()
    assert.same({ "enter 1", "enter 2", "enter 3", "leave 3", "leave 2", "leave 1" }, events)
    assert.equal("chain", sources[3].token.reason)
    for _, source in ipairs(sources) do source:dispose() end
  end))

  it("may be the same function several times, each registration for itself", in_task(function()
    local count = 0
    local function callback() count = count + 1 end
    local source <close> = Source()
    source.token:register(callback)
    local second = source.token:register(callback)
    source.token:register(callback)
    assert.is_true(second:unregister())
    source:cancel()
    assert.equal(2, count)
  end))

  it("may unregister one that has not run yet, which then never runs", in_task(function()
    local events, record = recorder()
    local source <close> = Source()
    local earliest = source.token:register(record, "earliest")
    local early = source.token:register(record, "early")
    source.token:register(record, "kept")
    source.token:register(function()
      record(tostring(early:unregister()))
      earliest:dispose()
    end)
    source:cancel()
    assert.same({ "true", "kept" }, events)
    assert.is_false(early:unregister())
    assert.is_false(earliest:unregister())
  end))

  it("may dispose their own registration, which is too late to be unregistered", in_task(function()
    local events, record = recorder()
    local source <close> = Source()
    source.token:register(record, "earlier")
    local own
    own = source.token:register(function()
      record(own:unregister())
      own:dispose()
    end)
    source:cancel()
    assert.same({ false, "earlier" }, events)
  end))

  it("may dispose the source", in_task(function()
    local source = Source()
    local ran = false
    source.token:register(function()
      ran = true
      source:dispose()
    end)
    source:cancel()
    assert.is_true(ran)
    assert.is_true(source.is_cancellation_requested)
  end))

  for _, registering in ipairs { "register", "unsafe_register" } do
    it("of " .. registering .. " that would suspend are refused", in_task(function()
      local events, record = recorder()
      local source <close> = Source()
      source.token[registering](source.token, record, "others run")
      source.token[registering](source.token, function()
        record("enter")
        flow.yield()
        record("unreachable")
      end)
      source.token[registering](source.token, function() flow.sleep(1) end)
      local err = raises("Aggregate", function() source:cancel() end)
      assert.equal(2, #err.inner_exceptions)
      assert.is_true(is(err.inner_exceptions[1], "InvalidOperation"))
      assert.is_true(is(err.inner_exceptions[2], "InvalidOperation"))
      assert.same({ "enter", "others run" }, events)
    end))
  end

  it("that would suspend are refused when they run at once", in_task(function()
    raises("InvalidOperation", function() Token.canceled:register(flow.yield) end)
    flow.yield()
  end))

  it("may await what is already complete, and start tasks", in_task(function()
    local events, record = recorder()
    local source <close> = Source()
    local task
    source.token:register(function()
      record(flow.await(flow.Task.from_result("complete")))
      task = flow.spawn(function()
        flow.yield()
        record("task")
      end)
    end)
    source:cancel()
    record("canceled")
    task:await()
    assert.same({ "complete", "canceled", "task" }, events)
  end))

  it("must be functions, also on a token that is never canceled", function()
    local source <close> = Source()
    for _, token in ipairs { source.token, Token.none, Token.canceled } do
      for _, method in ipairs { "register", "unsafe_register" } do
        local which = token[method]
        assert.is_false((pcall(which, token, nil)))
        assert.is_false((pcall(which, token, 42)))
        assert.is_false((pcall(which, token, "f")))
      end
      bad_argument(1, "register", function() token:register() end)
      bad_argument(1, "unsafe_register", function() token:unsafe_register({}) end)
    end
  end)

  it("run 100,000 strong, newest first", in_task(function()
    local n = many(100000)
    local expected, wrong = n, 0
    local source <close> = Source()
    local function callback(i)
      if i ~= expected then wrong = wrong + 1 end
      expected = i - 1
    end
    for i = 1, n do source.token:register(callback, i) end
    source:cancel()
    assert.equal(0, wrong)
    assert.equal(0, expected)
  end))
end)

describe("a registration", function()
  it("unregisters once, and its callback never runs", in_task(function()
    local events, record = recorder()
    local source <close> = Source()
    local registration = source.token:register(record, "gone")
    source.token:register(record, "stays")
    assert.is_true(registration:unregister())
    assert.is_false(registration:unregister())
    source:cancel()
    assert.is_false(registration:unregister())
    assert.same({ "stays" }, events)
  end))

  it("is removed by dispose, twice is harmless", in_task(function()
    local source <close> = Source()
    local ran = false
    local registration = source.token:register(function() ran = true end)
    registration:dispose()
    registration:dispose()
    assert.is_false(registration:unregister())
    source:cancel()
    assert.is_false(ran)
  end))

  it("ends with its block", in_task(function()
    local events, record = recorder()
    local source <close> = Source()
    do
      local _ <close> = source.token:register(record, "inside")
    end
    source.token:register(record, "outside")
    source:cancel()
    assert.same({ "outside" }, events)
  end))

  it("is inert after its callback ran", in_task(function()
    local source <close> = Source()
    local registration = source.token:register(nothing)
    source:cancel()
    assert.is_false(registration:unregister())
    registration:dispose()
  end))

  it("leaves nothing of the callback behind once it is gone, in whatever order", in_task(function()
    local callbacks, registrations = weak(), {}
    local source <close> = Source()
    for i = 1, 300 do
      local function callback() return i end
      callbacks[i], registrations[i] = callback, source.token:register(callback)
    end
    assert.equal(300, alive(callbacks))
    local order = support.shuffled(300, support.random(7))
    for i = 1, 150 do assert.is_true(registrations[order[i]]:unregister()) end
    assert.equal(150, alive(callbacks))
    source:cancel()
    assert.equal(0, alive(callbacks))
    assert.equal(300, #registrations)
  end))

  it("leaves the list of a token that lives long, while older ones stay", in_task(function()
    local source <close> = Source()
    local token, all, open = source.token, weak(), {}
    token:register(nothing)
    for i = 1, 1000 do -- ten at a time, the oldest goes first: never the last one of the list
      open[#open + 1] = token:register(nothing)
      all[i] = open[#open]
      if #open > 10 then table.remove(open, 1):unregister() end
    end
    assert.is_true(alive(all) < 100)
    assert.equal(10, #open)
  end))

  it("of a linked source leaves that list as well", in_task(function()
    local source <close> = Source()
    local all, open = weak(), {}
    source.token:register(nothing)
    for i = 1, 1000 do
      open[#open + 1] = Source.linked(source.token)
      open[#open].token:register(nothing)
      all[i] = open[#open].token
      if #open > 10 then table.remove(open, 1):dispose() end
    end
    local registered = collectgarbage("count")
    for _ = 1, 10000 do
      open[#open + 1] = Source.linked(source.token)
      table.remove(open, 1):dispose()
    end
    assert.is_true(alive(all) < 100)
    assert.is_true(collectgarbage("count") - registered < 100)
  end))

  it("stays in force when nobody keeps it", in_task(function()
    local events, record = recorder()
    local source <close> = Source()
    source.token:register(record, "ran")
    support.collect()
    source:cancel()
    assert.same({ "ran" }, events)
  end))

  it("is freed with its source, although they refer to each other", in_task(function()
    local values = weak()
    flow.call(function()
      local source = Source()
      local registration
      registration = source.token:register(function() return source, registration end)
      values[1], values[2] = source, registration
    end)
    assert.equal(0, alive(values))
  end))
end)

describe("CancellationToken.none", function()
  it("is never canceled", in_task(function()
    assert.is_false(Token.none.can_be_canceled)
    assert.is_false(Token.none.is_cancellation_requested)
    assert.is_nil(Token.none.reason)
    assert.equal(Token.none, Token.none)
    Token.none:throw_if_cancellation_requested()
  end))

  it("gives inert registrations, all equal", in_task(function()
    local ran = false
    local one = Token.none:register(function() ran = true end)
    local two = Token.none:unsafe_register(nothing)
    assert.is_false(one:unregister())
    one:dispose()
    assert.equal(one, two)
    assert.is_false(ran)
  end))
end)

describe("CancellationToken.canceled", function()
  it("is canceled from the start", in_task(function()
    assert.is_true(Token.canceled.is_cancellation_requested)
    assert.is_true(Token.canceled.can_be_canceled)
    assert.equal(Token.canceled, Token.canceled)
    assert.are_not.equal(Token.none, Token.canceled)
    local err = raises("OperationCanceled", function()
      Token.canceled:throw_if_cancellation_requested()
    end)
    assert.equal(Token.canceled, err.token)
  end))

  it("runs callbacks at once, and gives inert registrations", in_task(function()
    local events, record = recorder()
    local registration = Token.canceled:register(record, "ran")
    assert.same({ "ran" }, events)
    assert.is_false(registration:unregister())
    assert.equal(registration, Token.canceled:register(nothing))
  end))
end)

describe("a disposed source", function()
  it("was not canceled by it, and drops its callbacks", in_task(function()
    local events, record = recorder()
    local source = Source()
    local token = source.token
    local registration = token:register(record, "never")
    source:dispose()
    source:dispose()
    assert.is_false(source.is_cancellation_requested)
    assert.is_false(token.is_cancellation_requested)
    assert.is_false(registration:unregister())
    registration:dispose()
    assert.same({}, events)
  end))

  it("refuses cancel, cancel_after and try_reset", in_task(function()
    local source = Source()
    source:dispose()
    raises("ObjectDisposed", function() source:cancel() end)
    raises("ObjectDisposed", function() source:cancel_after(1) end)
    raises("ObjectDisposed", function() source:try_reset() end)
    assert.is_false(source.is_cancellation_requested)
  end))

  it("refuses cancel also when it had been canceled before", in_task(function()
    local source = Source()
    source:cancel()
    source:dispose()
    raises("ObjectDisposed", function() source:cancel() end)
    assert.is_true(source.is_cancellation_requested)
  end))

  it("has no token any more", in_task(function()
    local source = Source()
    source:dispose()
    raises("ObjectDisposed", function() return source.token end)
  end))

  it("gives a faulted task for cancel_async", in_task(function()
    local source = Source()
    source:dispose()
    local task = source:cancel_async()
    assert.is_true(task.is_faulted)
    assert.is_true(is(task.exception, "ObjectDisposed"))
  end))

  it("leaves tokens handed out before usable and harmless", in_task(function()
    local source = Source()
    local token = source.token
    source:dispose()
    local ran = false
    token:register(function() ran = true end):dispose()
    token:register(function() ran = true end)
    token:throw_if_cancellation_requested()
    local linked <close> = Source.linked(token)
    assert.is_false(linked.is_cancellation_requested)
    linked:cancel()
    assert.is_false(token.is_cancellation_requested)
    assert.is_false(ran)
  end))

  it("stops its timer", in_task(function(clock)
    local source = Source(5)
    local ran = false
    source.token:register(function() ran = true end)
    source:cancel_after(6)
    source:dispose()
    flow.sleep(10)
    assert.is_false(ran)
    assert.is_false(source.is_cancellation_requested)
    assert.is_true(clock:now() >= 10)
  end))

  it("that drops the callbacks of cancel_async does not leave its task pending", in_task(function()
    local source = Source()
    source.token:register(nothing)
    local task = source:cancel_async()
    source:dispose()
    task:try_await()
    assert.is_true(task.is_completed)
    assert.is_true(source.is_cancellation_requested)
  end))

  it("is what the end of its block leaves", in_task(function()
    local kept
    do
      local source <close> = Source(3)
      kept = source
    end
    raises("ObjectDisposed", function() kept:cancel() end)
  end))
end)

describe("cancel_after", function()
  local function canceled_at(source, clock)
    local at = {}
    source.token:register(function() at[1] = clock:now() end)
    return at
  end

  it("cancels after that time", in_task(function(clock)
    local source <close> = Source()
    local at, start = canceled_at(source, clock), clock:now()
    source:cancel_after(2.5)
    flow.sleep(10)
    assert.same({ start + 2.5 }, at)
    assert.is_true(source.is_cancellation_requested)
  end))

  it("of 0 cancels on a later turn, not at once", in_task(function(clock)
    local source <close> = Source()
    local at, start = canceled_at(source, clock), clock:now()
    source:cancel_after(0)
    assert.is_false(source.is_cancellation_requested)
    source.token:wait()
    assert.same({ start }, at)
  end))

  it("of 0 cancels when those that are ready have had a turn, however many go on", in_order(function()
    local done = false
    for _ = 1, 3 do flow.spawn(function() while not done do flow.yield() end end) end
    local source <close> = Source()
    source:cancel_after(0)
    flow.yield()
    assert.is_true(source.is_cancellation_requested)
    local ticked
    flow.Timer(function() ticked = true end, 0)
    flow.yield()
    flow.yield()
    assert.is_true(ticked)
    done = true
  end))

  it("replaces the earlier deadline, with a later or a sooner one", in_task(function(clock)
    local later <close>, sooner = Source(2), Source()
    local start = clock:now()
    local at_later, at_sooner = canceled_at(later, clock), canceled_at(sooner, clock)
    sooner:cancel_after(8)
    flow.sleep(1)
    later:cancel_after(4)
    sooner:cancel_after(1)
    flow.sleep(20)
    assert.same({ start + 5 }, at_later)
    assert.same({ start + 2 }, at_sooner)
    sooner:dispose()
  end))

  it("disarms with math.huge", in_order(function()
    local source <close> = Source(2)
    source:cancel_after(math.huge)
    flow.sleep(10)
    assert.is_false(source.is_cancellation_requested)
    source:cancel_after(1)
    flow.sleep(1)
    flow.yield()
    assert.is_true(source.is_cancellation_requested)
  end))

  it("fires although nobody keeps the source", in_task(function()
    local events, record = recorder()
    local token = Source(1).token
    Source(2).token:register(record, "ran")
    support.collect()
    flow.sleep(3)
    assert.is_true(token.is_cancellation_requested)
    assert.same({ "ran" }, events)
  end))

  it("does nothing once canceled", in_task(function()
    local source <close> = Source()
    local count = 0
    source.token:register(function() count = count + 1 end)
    source:cancel("first")
    source:cancel_after(1)
    flow.sleep(5)
    assert.equal(1, count)
    assert.equal("first", source.token.reason)
  end))

  it("is overtaken by cancel", in_task(function()
    local source <close> = Source(5)
    local count = 0
    source.token:register(function() count = count + 1 end)
    source:cancel("by hand")
    flow.sleep(10)
    assert.equal(1, count)
    assert.equal("by hand", source.token.reason)
  end))

  it("refuses what is no time, and keeps the deadline", in_task(function()
    local source <close> = Source(2)
    bad_argument(1, "cancel_after", function() source:cancel_after(-1) end)
    bad_argument(1, "cancel_after", function() source:cancel_after(0 / 0) end)
    bad_argument(1, "cancel_after", function() source:cancel_after("later") end)
    flow.sleep(3)
    assert.is_true(source.is_cancellation_requested)
  end))

  it("fires equal deadlines in the order they were set", in_order(function()
    local sources = {}
    local events, record = recorder()
    for i = 1, 20 do
      sources[i] = Source()
      sources[i].token:register(record, i)
    end
    local order = support.shuffled(20, support.random(3))
    for _, i in ipairs(order) do sources[i]:cancel_after(1) end
    flow.sleep(2)
    assert.same(order, events)
    for _, source in ipairs(sources) do source:dispose() end
  end))

  it("does what the first of equal deadlines brings before the next one ends a wait", in_order(function()
    local semaphore, source = flow.Semaphore(0), Source(1)
    source.token:register(function() semaphore:release() end)
    assert.is_true(semaphore:wait(1))
    assert.equal(0, semaphore.current_count)
    local sleeper = flow.async(function()
      flow.sleep(1)
      return "done"
    end)()
    assert.equal("done", sleeper:wait_async(1):await())
    sleeper = flow.async(flow.sleep)(1)
    assert.equal(sleeper, (flow.await_any(sleeper, flow.delay(1))))
    sleeper = flow.async(flow.sleep)(1)
    flow.with_timeout(1, flow.await, sleeper)
    raises("Timeout", flow.with_timeout, 1, flow.sleep, 1)
  end))

  it("fires equal deadlines in that order also when others are linked to one", in_order(function()
    local events, record = recorder()
    local first, second = Source(1), Source(1)
    first.token:register(record, "first")
    second.token:register(record, "second")
    local third = Source(1)
    third.token:register(record, "third")
    local scope = flow.spawn(flow.with_cancellation, second.token, flow.sleep, 5)
    local linked <close> = Source.linked(second.token)
    linked.token:register(record, "linked")
    scope:try_await()
    flow.sleep(1)
    assert.same({ "first", "linked", "second", "third" }, events)
  end))

  it("has the errors of its callbacks reported, with task nil, and runs them all", function()
    support.with_reports(function(reports)
      in_task(function()
        local events, record = recorder()
        local problem = {}
        local source <close> = Source(1)
        source.token:register(record, "first registered")
        source.token:register(fails_with(problem))
        flow.sleep(2)
        assert.same({ "first registered" }, events)
        assert.equal(1, #reports)
        assert.is_nil(reports[1].task)
        local err = reports[1].err
        assert.equal(problem, is(err, "Aggregate") and err.inner_exceptions[1] or err)
      end)()
    end)
  end)
end)

describe("a callback that a value_changed handler unregisters just before it", function()
  it("does not run, and the others do", in_task(function()
    for _, arguments in ipairs { {}, { 1, 2 } } do
      local source, events, registration = Source(), {}, nil
      source.token:register(function() events[#events + 1] = "other" end)
      local loc = flow.AsyncLocal { value_changed = function()
        if registration then events[#events + 1] = registration:unregister() end
      end }
      loc:set(1)
      local made = source.token:register(function() events[#events + 1] = "run" end, table.unpack(arguments))
      loc:set(2)
      registration = made
      source:cancel()
      registration = nil
      assert.is_true(events[1])
      for _, event in ipairs(events) do assert.not_equal("run", event) end
      assert.equal("other", events[#events] == false and events[#events - 1] or events[#events])
      assert.equal(2, loc:get())
    end
  end))
end)

describe("try_reset", function()
  it("is false for a canceled source, which stays canceled", in_task(function()
    local source <close> = Source()
    source:cancel("why")
    assert.is_false(source:try_reset())
    assert.is_true(source.is_cancellation_requested)
    assert.equal("why", source.token.reason)
  end))

  it("disarms the timer", in_task(function()
    local source <close> = Source(2)
    flow.sleep(1)
    assert.is_true(source:try_reset())
    flow.sleep(5)
    assert.is_false(source.is_cancellation_requested)
  end))

  it("is false in a callback", in_task(function()
    local source <close> = Source()
    local answer
    source.token:register(function() answer = source:try_reset() end)
    source:cancel()
    assert.is_false(answer)
    assert.is_true(source.is_cancellation_requested)
  end))

  it("is false when the timer has fired", in_task(function()
    local source <close> = Source(2)
    flow.sleep(3)
    assert.is_false(source:try_reset())
  end))

  it("removes the callbacks, whose registrations are then inert", in_task(function()
    local events, record = recorder()
    local source <close> = Source()
    local old = source.token:register(record, "old")
    assert.is_true(source:try_reset())
    assert.is_false(old:unregister())
    source.token:register(record, "new")
    assert.is_false(old:unregister())
    old:dispose()
    source:cancel()
    assert.same({ "new" }, events)
  end))

  it("lets go of what waits with the token: the next cancellation is somebody else's", in_task(function()
    local source <close> = Source(9)
    local token, channel = source.token, flow.Channel.unbounded()
    local delay, read = flow.delay(5, token), channel:read_async(token)
    local sleeper = flow.async(flow.sleep)(5, token)
    local scope = flow.async(flow.with_cancellation)(token, flow.sleep, 5)
    assert.is_true(source:try_reset())
    source:cancel()
    flow.yield()
    for _, task in ipairs { delay, read, sleeper, scope } do assert.is_false(task.is_completed) end
    channel:write("kept")
    assert.equal("kept", read:await())
    flow.await_all(delay, sleeper, scope)
    raises("OperationCanceled", flow.sleep, 1, token)
  end))

  it("keeps the token valid, and can be repeated", in_task(function()
    local source <close> = Source()
    local token = source.token
    for _ = 1, 3 do assert.is_true(source:try_reset()) end
    assert.equal(token, source.token)
    source:cancel_after(1)
    assert.is_true(source:try_reset())
    source:cancel("later")
    assert.is_true(token.is_cancellation_requested)
    assert.equal("later", token.reason)
  end))
end)

describe("a linked source", function()
  it("is canceled with any of its parents, and carries the reason", in_task(function()
    for i = 1, 3 do
      local parents = { Source(), Source(), Source() }
      local linked = Source.linked(parents[1].token, parents[2].token, parents[3].token)
      assert.is_false(linked.is_cancellation_requested)
      parents[i]:cancel("reason " .. i)
      assert.is_true(linked.is_cancellation_requested)
      assert.is_true(linked.token.is_cancellation_requested)
      assert.equal("reason " .. i, linked.token.reason)
      for _, source in ipairs(parents) do source:dispose() end
      linked:dispose()
    end
  end))

  it("leaves its parents alone when it is canceled itself", in_task(function()
    local parent <close> = Source()
    local linked <close> = Source.linked(parent.token)
    linked:cancel("mine")
    assert.is_false(parent.is_cancellation_requested)
    parent:cancel("later")
    assert.equal("mine", linked.token.reason)
  end))

  it("raises with its own token, and names the token canceled first as the cause",
    in_task(function()
      local root <close> = Source()
      local middle <close> = Source.linked(root.token)
      local linked <close> = Source.linked(Token.none, middle.token)
      root:cancel("root's reason")
      local err = raises("OperationCanceled", function()
        linked.token:throw_if_cancellation_requested()
      end)
      assert.equal(linked.token, err.token)
      assert.equal(root.token, err.cause)
      assert.equal("root's reason", err.reason)
    end))

  it("runs its callbacks inside the parent's cancel, at its place among the parent's",
    in_task(function()
      local events, record = recorder()
      local parent <close> = Source()
      parent.token:register(record, "before the link")
      local linked <close> = Source.linked(parent.token)
      linked.token:register(record, "linked 1")
      linked.token:register(record, "linked 2")
      parent.token:register(record, "after the link")
      parent:cancel()
      record("done")
      assert.same({ "after the link", "linked 2", "linked 1", "before the link", "done" }, events)
    end))

  it("adds its callbacks' errors to the parent's, in one flat Aggregate", in_task(function()
    local parent <close> = Source()
    parent.token:register(fails_with("parent 1"))
    local linked <close> = Source.linked(parent.token)
    linked.token:register(fails_with("linked 1"))
    local deeper <close> = Source.linked(linked.token)
    deeper.token:register(fails_with("deeper"))
    linked.token:register(fails_with("linked 2"))
    parent.token:register(fails_with("parent 2"))
    local err = raises("Aggregate", function() parent:cancel() end)
    local inner = table.move(err.inner_exceptions, 1, #err.inner_exceptions, 1, {})
    assert.equal("parent 2", inner[1])
    assert.equal("parent 1", inner[5])
    assert.same({ "parent 2", "linked 2", "deeper", "linked 1", "parent 1" }, inner)
  end))

  it("is born canceled when a parent already is, at any depth", in_task(function()
    local root <close> = Source()
    local middle <close> = Source.linked(root.token)
    root:cancel("why")
    local one <close> = Source.linked(Token.none, middle.token)
    local two <close> = Source.linked(one.token)
    local three <close> = Source.linked(Token.canceled)
    assert.is_true(one.is_cancellation_requested)
    assert.is_true(two.is_cancellation_requested)
    assert.is_true(three.is_cancellation_requested)
    assert.equal("why", two.token.reason)
    local err = raises("OperationCanceled", function()
      two.token:throw_if_cancellation_requested()
    end)
    assert.equal(root.token, err.cause)
  end))

  it("is not canceled by the end of a parent, and survives it", in_task(function()
    local first, second = Source(), Source()
    local linked = Source.linked(first.token, second.token)
    first:dispose()
    assert.is_false(linked.is_cancellation_requested)
    second:cancel()
    assert.is_true(linked.is_cancellation_requested)
    linked:dispose()
    second:dispose()
  end))

  it("hears nothing any more once it is disposed", in_task(function()
    local parent <close> = Source()
    local linked = Source.linked(parent.token)
    local ran = false
    linked.token:register(function() ran = true end)
    linked:dispose()
    linked:dispose()
    parent:cancel()
    assert.is_false(ran)
    assert.is_false(linked.is_cancellation_requested)
  end))

  it("may be disposed by a callback of its parent, or of a sibling, that runs before", in_task(function()
    local events, record = recorder()
    local parent <close> = Source()
    local first <close> = Source.linked(parent.token)
    local second <close> = Source.linked(parent.token)
    local third <close> = Source.linked(parent.token)
    local fourth <close> = Source.linked(parent.token)
    first.token:register(record, "first")
    second.token:register(record, "second")
    fourth.token:register(record, "fourth")
    third.token:register(function()
      record("third")
      second:dispose()
    end)
    parent.token:register(function() fourth:dispose() end)
    parent:cancel()
    assert.same({ "third", "first" }, events)
    assert.is_false(second.is_cancellation_requested)
    assert.is_false(fourth.is_cancellation_requested)
  end))

  it("may be canceled by a callback of its parent, and keeps that reason", in_task(function()
    local events, record = recorder()
    local parent <close> = Source()
    local linked <close> = Source.linked(parent.token)
    linked.token:register(record, "once")
    parent.token:register(function() linked:cancel("its own") end)
    parent:cancel("the parent's")
    assert.same({ "once" }, events)
    assert.equal("its own", linked.token.reason)
  end))

  it("is born canceled when made by a callback of its parent", in_task(function()
    local parent <close> = Source()
    local born
    parent.token:register(function()
      local linked <close> = Source.linked(parent.token)
      born = linked.is_cancellation_requested
    end)
    parent:cancel()
    assert.is_true(born)
  end))

  it("need not be kept: its token is canceled and its callbacks run", in_task(function()
    local events, record = recorder()
    local parent <close> = Source()
    local token = Source.linked(parent.token).token
    Source.linked(Source.linked(parent.token).token).token:register(record, "deep")
    Source.linked(parent.token).token:register(record, "near")
    support.collect()
    parent:cancel()
    assert.is_true(token.is_cancellation_requested)
    assert.same({ "near", "deep" }, events)
  end))

  it("keeps hearing a parent that nobody keeps and whose timer runs", in_task(function()
    local linked <close> = Source.linked(Source(1).token)
    support.collect()
    flow.sleep(2)
    assert.is_true(linked.is_cancellation_requested)
  end))

  it("holds no memory in its parents once it is disposed", in_task(function()
    local values = weak()
    local parent <close>, other = Source(), Source()
    for i = 1, 1000 do
      local linked = Source.linked(parent.token, other.token)
      local function callback() return i end
      linked.token:register(callback)
      values[3 * i], values[3 * i + 1], values[3 * i + 2] = linked, linked.token, callback
      linked:dispose()
    end
    assert.equal(0, alive(values))
    other:dispose()
  end))

  it("counts a parent given twice once", in_task(function()
    local parent <close> = Source()
    local linked <close> = Source.linked(parent.token, parent.token)
    local count = 0
    linked.token:register(function() count = count + 1 end)
    parent:cancel()
    assert.equal(1, count)
  end))

  it("ignores parents that cannot be canceled", in_task(function()
    local parent <close> = Source()
    local alone <close> = Source.linked(Token.none)
    local linked <close> = Source.linked(Token.none, parent.token, Token.none)
    parent:cancel()
    assert.is_true(linked.is_cancellation_requested)
    assert.is_false(alone.is_cancellation_requested)
    assert.is_true(alone.token.can_be_canceled)
    alone:cancel()
    assert.is_true(alone.token.is_cancellation_requested)
  end))

  it("refuses no parents at all, and what is no token", in_task(function()
    local source <close> = Source()
    assert.is_false((pcall(Source.linked)))
    bad_argument(1, "linked", function() local _ = Source.linked(42) end)
    bad_argument(1, "linked", function() local _ = Source.linked(source) end)
    bad_argument(2, "linked", function() local _ = Source.linked(source.token, {}) end)
    source:cancel()
  end))

  it("has a deadline of its own that leaves the parent alone", in_task(function()
    local parent <close> = Source()
    local linked <close> = Source.linked(parent.token)
    linked:cancel_after(1)
    flow.sleep(2)
    assert.is_true(linked.is_cancellation_requested)
    assert.is_false(parent.is_cancellation_requested)
  end))

  it("is canceled at the end of a chain of 100,000", in_task(function()
    local events, record = recorder()
    local n, chain = many(100000), { Source() }
    for i = 2, n do chain[i] = Source.linked(chain[i - 1].token) end
    for i = n // 10, n, n // 10 do chain[i].token:register(record, i) end
    chain[1]:cancel("why")
    assert.is_true(chain[n].is_cancellation_requested)
    assert.equal("why", chain[n].token.reason)
    assert.equal(10, #events)
    local err = raises("OperationCanceled", function()
      chain[n].token:throw_if_cancellation_requested()
    end)
    assert.equal(chain[1].token, err.cause)
    local late <close> = Source.linked(chain[n].token)
    assert.is_true(late.is_cancellation_requested)
    for i = 1, n do chain[i]:dispose() end
  end))

  it("can be the end of a chain of 100,000 that is dropped without a word", in_task(function()
    local values = weak()
    flow.call(function()
      local last = Source()
      for i = 1, many(100000) do
        last = Source.linked(last.token)
        if i % 100 == 0 then values[i // 100] = last end
      end
    end)
    assert.equal(0, alive(values))
  end))

  it("can be one of 10,000 of one parent", in_task(function()
    local parent <close> = Source()
    local n, children, count = many(10000), {}, 0
    for i = 1, n do
      children[i] = Source.linked(parent.token)
      children[i].token:register(function() count = count + 1 end)
    end
    for i = 1, n, 2 do children[i]:dispose() end
    parent:cancel()
    assert.equal(n // 2, count)
    assert.is_false(children[1].is_cancellation_requested)
    assert.is_true(children[2].is_cancellation_requested)
  end))
end)

describe("cancel_async", function()
  it("raises the flag at once and runs the callbacks later, newest first", in_task(function()
    local events, record = recorder()
    local source <close> = Source()
    for i = 1, 3 do source.token:register(record, i) end
    local task = source:cancel_async("why")
    assert.is_true(source.is_cancellation_requested)
    assert.equal("why", source.token.reason)
    record("returned")
    assert.is_false(task.is_completed)
    task:await()
    record("awaited")
    assert.same({ "returned", 3, 2, 1, "awaited" }, events)
  end))

  it("is complete at once without callbacks, and when canceled before", in_task(function()
    local source <close> = Source()
    local first = source:cancel_async()
    assert.is_true(first.is_completed_successfully)
    local second = source:cancel_async("late")
    assert.is_true(second.is_completed_successfully)
    assert.is_nil(source.token.reason)
  end))

  it("faults its task with one Aggregate when callbacks fail", in_task(function()
    local source <close> = Source()
    source.token:register(fails_with("one"))
    source.token:register(fails_with("two"))
    local ok, err = source:cancel_async():try_await()
    assert.is_false(ok)
    assert.is_true(is(err, "Aggregate"))
    assert.same({ "two", "one" }, { table.unpack(err.inner_exceptions) })
  end))

  it("ends the waits under the token, and cancels linked sources", in_task(function(clock)
    local source <close> = Source()
    local linked <close> = Source.linked(source.token)
    local start = clock:now()
    local sleeper = flow.spawn(function()
      return raises("OperationCanceled", flow.sleep, 100, linked.token).reason
    end)
    flow.yield()
    source:cancel_async("why"):await()
    assert.is_true(linked.is_cancellation_requested)
    assert.equal("why", sleeper:await())
    assert.equal(start, clock:now())
  end))

  it("lets callbacks registered before it has run the others run at once", in_task(function()
    local events, record = recorder()
    local source <close> = Source()
    source.token:register(record, "earlier")
    local task = source:cancel_async()
    source.token:register(record, "at once")
    task:await()
    assert.same({ "at once", "earlier" }, events)
  end))

  it("runs callbacks in the context of their registration", in_task(function()
    local loc = flow.AsyncLocal()
    local events, record = recorder()
    local source <close> = Source()
    loc.value = "registered"
    source.token:register(function() record(loc.value) end)
    loc.value = "canceler"
    source:cancel_async():await()
    assert.same({ "registered" }, events)
    assert.equal("canceler", loc.value)
  end))
end)

describe("token:wait", function()
  it("returns once the token is canceled, without an error", in_task(function(clock)
    local events, record = recorder()
    local source <close> = Source()
    local start = clock:now()
    local waiter = flow.spawn(function()
      source.token:wait()
      record(("woken at %g"):format(clock:now() - start))
    end)
    flow.sleep(2)
    source:cancel()
    record("canceled")
    waiter:await()
    assert.same({ "canceled", "woken at 2" }, events)
  end))

  it("returns at once when the token is already canceled", in_task(function()
    local other = false
    flow.spawn(function() other = true end)
    Token.canceled:wait()
    assert.is_false(other)
    flow.yield()
  end))

  it("wakes every waiter", in_task(function()
    local source <close> = Source(1)
    local count, tasks = 0, {}
    for i = 1, 100 do
      tasks[i] = flow.spawn(function()
        source.token:wait()
        count = count + 1
      end)
    end
    for i = 1, 100 do tasks[i]:await() end
    assert.equal(100, count)
  end))

  it("has a twin that returns a task", in_task(function()
    local source <close> = Source()
    local task = source.token:wait_async()
    assert.is_false(task.is_completed)
    source:cancel()
    task:await()
    assert.is_true(task.is_completed_successfully)
    assert.is_true(source.token:wait_async().is_completed_successfully)
  end))

  it("ends with OperationCanceled when another token given to it is canceled", in_task(function()
    local source <close>, stop = Source(), Source(1)
    local err = raises("OperationCanceled", function() source.token:wait(stop.token) end)
    assert.equal(stop.token, err.token)
    assert.is_false(source.is_cancellation_requested)
    raises("OperationCanceled", function() source.token:wait(stop.token) end)
    assert.is_true(source.token:wait_async(stop.token).is_canceled)
    stop:dispose()
  end))

  it("leaves nothing behind on a token that lives long", in_task(function()
    local tasks = weak()
    local source <close> = Source()
    for i = 1, 100 do
      local stop <close> = Source()
      tasks[i] = source.token:wait_async(stop.token)
      stop:cancel()
      tasks[i]:try_await()
    end
    assert.equal(0, alive(tasks))
  end))

  it("refuses what is no token", in_task(function()
    bad_argument(1, "wait", function() Token.canceled:wait(42) end)
    bad_argument(1, "wait_async", function() Token.canceled:wait_async({}) end)
  end))
end)
