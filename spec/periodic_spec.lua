-- Timer and PeriodicTimer, in virtual time.

local flow = require "coflow"
local testing = require "coflow.testing"
local helper = require "spec.helper"
local support = require "spec.support.flow_support"

local in_task, in_order, many = support.in_task, helper.in_order, support.many
local raises, bad_argument, with_reports = support.raises, support.bad_argument, support.with_reports
local recorder, weak, alive, collect = support.recorder, support.weak, support.alive, support.collect
local Timer, PeriodicTimer = flow.Timer, flow.PeriodicTimer
local Source, Token = flow.CancellationTokenSource, flow.CancellationToken
local is = flow.errors.is

local function nothing() end

describe("Timer", function()
  it("ticks under the next scope outside once the one that it was made in has ended", in_task(function()
    local outcomes, timer
    local function make(seconds)
      timer = Timer(function() outcomes[#outcomes + 1] = (pcall(flow.sleep, 0.25)) end, 1, 1)
      flow.sleep(seconds)
    end
    local function ticks(n, scope, ...)
      outcomes = {}
      pcall(scope, ...)
      while #outcomes < n do flow.sleep(1) end
      timer:dispose()
      return outcomes
    end
    assert.same({ true, true, true }, ticks(3, flow.with_timeout, 9, make, 1.5))
    assert.same({ true, true, true }, ticks(3, flow.with_timeout, 1.5, make, 9))
    local source = Source(1.5)
    assert.same({ true, true, true }, ticks(3, flow.with_cancellation, source.token, make, 9))
    assert.same({ true, true, true }, ticks(3, flow.with_timeout, 1.5, flow.task_group, function(group)
      group:spawn(flow.with_timeout, 9, make, 9):await()
    end))
    local outer = Source(2.5) -- this one is canceled before it ends
    assert.same({ true, true, false, false, false, true }, ticks(6, flow.with_cancellation, outer.token, function()
      pcall(flow.with_timeout, 1.5, make, 9)
      local _ <close> = helper.closing(function() flow.shield(flow.sleep, 3) end)
      flow.sleep(9)
    end))
  end))

  it("runs its function once, as a task, when it is due", in_task(function(clock)
    local events, record = recorder()
    local start, root = clock:now(), flow.current_task()
    local timer <close> = Timer(function(...)
      assert.not_equal(root, flow.current_task())
      record(clock:now() - start .. " with " .. select("#", ...))
      flow.sleep(1) -- it may wait
      record(clock:now() - start)
    end, 2.5)
    record "made"
    flow.sleep(100)
    assert.same({ "made", "2.5 with 0", 3.5 }, events)
    assert.is_true(timer:change(math.huge))
  end))

  it("of 0 is due at once, but not before this turn is over", in_task(function(clock)
    local events, record = recorder()
    local start = clock:now()
    local _ <close> = Timer(function() record("tick at " .. clock:now() - start) end, 0)
    record "made"
    flow.sleep(1)
    assert.same({ "made", "tick at 0.0" }, events)
  end))

  it("of math.huge is not armed until it is changed", in_task(function(clock)
    local count, start = 0, clock:now()
    local timer <close> = Timer(function() count = count + 1 end, math.huge)
    assert.is_false(flow.loop.is_alive())
    flow.sleep(1e6)
    assert.equal(0, count)
    assert.is_true(timer:change(5))
    assert.is_true(flow.loop.is_alive())
    flow.sleep(5)
    clock:settle()
    assert.equal(1, count)
    assert.equal(start + 1e6 + 5, clock:now())
  end))

  it("with a period ticks at due, then once a period", in_task(function(clock)
    local events, record = recorder()
    local start = clock:now()
    local timer <close> = Timer(function() record(clock:now() - start) end, 0.5, 2)
    flow.sleep(7)
    assert.same({ 0.5, 2.5, 4.5, 6.5 }, events)
    timer:dispose()
    flow.sleep(10)
    assert.equal(4, #events)
  end))

  it("with a period of 0 or math.huge ticks once", in_task(function()
    local count = 0
    local function tick() count = count + 1 end
    local zero <close> = Timer(tick, 1, 0)
    local huge <close> = Timer(tick, 1, math.huge)
    flow.sleep(10)
    assert.equal(2, count)
    assert.is_true(zero:change(1, 0) and huge:change(1, math.huge))
    flow.sleep(10)
    assert.equal(4, count)
  end))

  it("does not wait for its function: ticks overlap", in_task(function(clock)
    local events, record = recorder()
    local start, n = clock:now(), 0
    local timer <close> = Timer(function()
      n = n + 1
      local mine = n
      record(("%d begins at %g"):format(mine, clock:now() - start))
      flow.sleep(2.5)
      record(("%d ends at %g"):format(mine, clock:now() - start))
    end, 1, 1)
    flow.sleep(3.75)
    timer:dispose()
    flow.sleep(10)
    assert.same({ "1 begins at 1", "2 begins at 2", "3 begins at 3", "1 ends at 3.5", "2 ends at 4.5",
      "3 ends at 5.5" }, events)
  end))

  it("goes on with the next tick to come after a delay of the program, and keeps to its grid", function()
    -- in real time: the loop is blocked over many periods
    flow.run(function()
      local now, start, ticks = flow.loop.now, flow.loop.now(), {}
      local timer <close> = Timer(function() ticks[#ticks + 1] = now() - start end, 0.002, 0.002)
      while now() - start < 0.0405 do assert.equal(0, #ticks) end
      repeat flow.sleep(0.001) until #ticks >= 3
      timer:dispose()
      for i = 2, #ticks do assert.is_true(ticks[i] >= 0.0405 - 1e-9) end
    end)
  end)

  it("with a period too short for the clock goes on all the same", in_task(function(clock)
    local count, start = 0, clock:now()
    flow.sleep(1000)
    local timer
    timer = Timer(function()
      count = count + 1
      if count == 10 then timer:dispose() end
    end, 1e-300, 1e-300)
    flow.sleep(1)
    assert.equal(10, count)
    assert.is_true(clock:now() - start < 1002)
  end))

  it("fires equal deadlines in the order they were set, among all that waits", in_order(function()
    local events, record = recorder()
    local tasks = {}
    for i = 1, 40 do
      if i % 4 == 0 then
        Timer(function() record(i) end, 5)
      elseif i % 4 == 1 then
        tasks[#tasks + 1] = flow.spawn(function()
          flow.sleep(5)
          record(i)
        end)
        flow.yield()
      elseif i % 4 == 2 then
        local source = Source(5)
        source.token:register(function() record(i) end)
      else
        tasks[#tasks + 1] = flow.spawn(function()
          flow.delay(5):await()
          record(i)
        end)
        flow.yield()
      end
    end
    flow.sleep(6)
    for _, task in ipairs(tasks) do task:await() end
    local expected = {}
    for i = 1, 40 do expected[i] = i end
    assert.same(expected, events)
  end))

  it("counts as set anew by change, for the order of equal deadlines", in_order(function()
    local events, record = recorder()
    local a <close> = Timer(function() record "a" end, 3)
    local b <close> = Timer(function() record "b" end, 3)
    local c <close> = Timer(function() record "c" end, 7)
    a:change(3)
    c:change(3)
    flow.sleep(4)
    assert.same({ "b", "a", "c" }, events)
    assert.is_true(b:change(math.huge))
  end))

  it("runs in the context captured at creation, on every tick; writes do not carry on", in_task(function()
    local loc, events, record = flow.AsyncLocal(), recorder()
    loc.value = "creation"
    local timer <close> = Timer(function()
      record(loc.value)
      loc.value = "written in a tick"
      flow.sleep(0.1)
      record(loc.value)
    end, 1, 1)
    loc.value = "later"
    flow.sleep(2.5)
    timer:change(1, 1)
    flow.sleep(1.5)
    assert.same({ "creation", "written in a tick", "creation", "written in a tick", "creation",
      "written in a tick" }, events)
    assert.equal("later", loc.value)
  end))

  it("has the context of each of several made in one task", in_order(function()
    local loc, events, record = flow.AsyncLocal(), recorder()
    for i = 1, 3 do
      loc.value = i
      Timer(function() record(loc.value) end, 1)
      Timer(function() record(loc.value) end, 2)
    end
    loc.value = nil
    Timer(function() record(tostring(loc.value)) end, 3)
    flow.sleep(4)
    assert.same({ 1, 2, 3, 1, 2, 3, "nil" }, events)
  end))

  it("has the empty context when made while the flow is suppressed", in_task(function()
    local loc, seen, token = flow.AsyncLocal(), "nothing", nil
    loc.value = "here"
    do
      local _ <close> = flow.ExecutionContext.suppress_flow()
      Timer(function() seen, token = loc.value, flow.cancellation_token() end, 1)
    end
    local source = flow.spawn(flow.sleep, 0)
    flow.sleep(2)
    assert.is_nil(seen)
    assert.not_equal(flow.cancellation_token(), token)
    source:await()
  end))

  it("lets go of its function and its context when it is disposed", in_task(function()
    local loc, seen = flow.AsyncLocal(), weak()
    local timer
    flow.call(function()
      seen[1] = {}
      loc.value = seen[1]
      seen[2] = function() return seen end
      timer = Timer(seen[2], 10)
    end)
    assert.equal(2, alive(seen))
    timer:dispose()
    assert.equal(0, alive(seen))
    assert.is_false(timer:change(1))
  end))

  it("starts its tasks in the scope of whoever made it, while that lasts", in_task(function()
    local events, record = recorder()
    local timer
    local owner = flow.spawn(function()
      timer = Timer(function()
        record(flow.cancellation_token().is_cancellation_requested)
        local ok, err = pcall(flow.sleep, 100)
        record(ok or err.name)
      end, 1, 5)
      flow.sleep(3)
      flow.sleep(1000)
    end)
    flow.sleep(2)
    owner:cancel()
    owner:try_await()
    flow.sleep(5) -- the second tick, at 6
    timer:dispose()
    flow.sleep(200)
    assert.same({ false, "OperationCanceled", false, true }, events)
  end))

  it("is under what is above, after its maker has ended", in_task(function()
    local events, record = recorder()
    local timer
    local group = flow.spawn(function()
      flow.with_timeout(1, function()
        timer = Timer(function()
          local ok, err = pcall(flow.sleep, 1000)
          record(ok or err.name)
        end, 5)
      end) -- left before its time: the timer is under the outer scope only
      flow.sleep(1000)
    end)
    flow.sleep(10)
    assert.same({}, events)
    group:cancel()
    group:try_await()
    flow.sleep(1)
    assert.same({ "OperationCanceled" }, events)
    timer:dispose()
  end))

  it("may be re-armed long after its maker and its scope have ended", in_task(function()
    local fired = 0
    local timer = flow.spawn(function()
      return flow.with_timeout(5, function()
        return Timer(function()
          flow.sleep(1)
          fired = fired + 1
        end, math.huge)
      end)
    end):await()
    collect()
    flow.sleep(100)
    for _ = 1, 100 do -- other tasks, whose scopes take the places of those that are free
      flow.spawn(flow.with_timeout, 1, flow.yield):await()
    end
    timer:change(1)
    flow.sleep(3)
    assert.equal(1, fired)
    timer:dispose()
  end))

  it("reports the error of a tick as an unobserved exception, and ticks on", function()
    with_reports(function(reports)
      testing.run(function()
        local count = 0
        local timer <close> = Timer(function()
          count = count + 1
          error("tick " .. count, 0)
        end, 1, 1)
        flow.sleep(3.5)
        timer:dispose()
        helper.collect()
      end)
      collect()
      table.sort(reports, function(a, b) return a.err < b.err end)
      assert.equal(3, #reports)
      for i = 1, 3 do assert.equal("tick " .. i, reports[i].err) end
    end)
  end)

  it("names its tasks after its function", in_task(function()
    local name
    local line = debug.getinfo(1, "l").currentline + 1
    local _ <close> = Timer(function() name = flow.current_task().name end, 1)
    flow.sleep(2)
    assert.truthy(name:find("periodic_spec.lua:" .. line, 1, true))
  end))

  describe("disposed", function()
    it("fires no more; disposing again does nothing; change returns false", in_task(function()
      local count = 0
      local timer = Timer(function() count = count + 1 end, 1, 1)
      flow.sleep(1.5)
      assert.is_nil(timer:dispose())
      timer:dispose()
      assert.is_false(timer:change(1, 1))
      assert.is_false(timer:change(math.huge))
      flow.sleep(10)
      assert.equal(1, count)
      assert.is_false(flow.loop.is_alive())
    end))

    it("inside its own function ends it, and the function goes on", in_task(function()
      local events, record = recorder()
      local timer
      timer = Timer(function()
        timer:dispose()
        flow.sleep(5)
        record "went on"
      end, 1, 1)
      flow.sleep(10)
      assert.same({ "went on" }, events)
    end))

    it("when it is due but has not started does not start", in_order(function()
      local events, record = recorder()
      local timers = {}
      local first <close> = Timer(function()
        record "first"
        for _, timer in ipairs(timers) do timer:dispose() end
      end, 1)
      for i = 1, 3 do timers[i] = Timer(function() record(i) end, 1, 1) end
      flow.sleep(5)
      assert.same({ "first" }, events)
      assert.is_true(first:change(math.huge))
    end))

    it("by <close>, also when an error leaves the block", in_task(function()
      local count = 0
      pcall(function()
        local _ <close> = Timer(function() count = count + 1 end, 1, 1)
        flow.sleep(2.5)
        error "out"
      end)
      flow.sleep(10)
      assert.equal(2, count)
    end))
  end)

  it("changed when it is due but has not started: only the new time counts", in_order(function(clock)
    local events, record = recorder()
    local start, timer = clock:now(), nil
    local _ <close> = Timer(function()
      timer:change(2)
    end, 1)
    timer = Timer(function() record(clock:now() - start) end, 1)
    flow.sleep(10)
    assert.same({ 3.0 }, events)
    timer:dispose()
  end))

  it("changed over and over leaves nothing behind, and fires once", in_task(function()
    local count = 0
    local timer <close> = Timer(function() count = count + 1 end, 10)
    collect()
    for i = 1, 100 do timer:change(10 + i % 7) end
    local before = collectgarbage "count"
    for i = 1, many(100000, 1000) do timer:change(10 + i % 7, i % 3) end
    assert.is_true(collectgarbage "count" - before < 16)
    timer:change(1)
    flow.sleep(100)
    assert.equal(1, count)
  end))

  it("is held while it is armed, and is garbage when it is not", in_task(function()
    local fired, seen = 0, weak()
    seen[1] = Timer(function() fired = fired + 1 end, 1)
    seen[2] = Timer(function() return seen[2] end, math.huge)
    seen[3] = Timer(nothing, 5, 5)
    seen[4] = Timer(nothing, 5)
    seen[4]:change(math.huge)
    assert.equal(2, alive(seen))
    flow.sleep(2)
    assert.equal(1, fired)
    flow.yield()
    assert.equal(1, alive(seen))
    seen[3]:dispose()
    assert.equal(0, alive(seen))
  end))

  it("that refers to itself in its function is garbage after its tick", in_task(function()
    local seen = weak()
    do
      local timer
      timer = Timer(function() return timer end, 1)
      seen[1] = timer
    end
    flow.sleep(2)
    flow.yield()
    assert.equal(0, alive(seen))
  end))

  it("completes what a root task waits for: no deadlock", function()
    assert.equal("done", testing.run(function()
      local source = flow.TaskCompletionSource()
      Timer(function() source:set_result "done" end, 3600)
      return source.task:await()
    end))
  end)

  it("works outside every task", function()
    local count = 0
    local timer = Timer(function() count = count + 1 end, 0.001)
    flow.run(function() while count == 0 do flow.sleep(0.001) end end)
    assert.equal(1, count)
    assert.is_true(timer:change(0, 0))
    flow.loop.run()
    assert.equal(2, count)
    timer:dispose()
  end)

  it("works inside pcall, a metamethod and a coroutine of Lua's own", in_task(function()
    local count = 0
    local function make() return Timer(function() count = count + 1 end, 1) end
    local _, a = pcall(make)
    local b = setmetatable({}, { __index = function() return make() end }).timer
    local c = coroutine.wrap(make)()
    flow.sleep(2)
    assert.equal(3, count)
    for _, timer in ipairs { a, b, c } do timer:dispose() end
  end))

  it("may be made, changed and disposed by finalizers", in_task(function()
    local events, record = recorder()
    local late = Timer(function() record "late" end, 1000)
    for i = 1, 20 do
      setmetatable({}, { __gc = function()
        Timer(function() record(i) end, 1 + i)
        late:change(500)
      end })
    end
    for i = 1, 200 do Timer(nothing, i) end
    collect()
    flow.sleep(300)
    assert.equal(20, #events)
    late:dispose()
  end))

  it("refuses what is no function, no due time, no period", in_task(function()
    bad_argument(1, "Timer", function() local _ = Timer(nil, 1) end, "function")
    bad_argument(1, "Timer", function() local _ = Timer({}, 1) end, "function")
    bad_argument(2, "Timer", function() local _ = Timer(nothing) end, "number")
    bad_argument(2, "Timer", function() local _ = Timer(nothing, -1) end, "negative")
    bad_argument(2, "Timer", function() local _ = Timer(nothing, 0 / 0) end, "NaN")
    bad_argument(3, "Timer", function() local _ = Timer(nothing, 1, -1) end, "negative")
    bad_argument(3, "Timer", function() local _ = Timer(nothing, 1, "x") end, "number")
    local timer <close> = Timer(nothing, 1)
    bad_argument(1, "change", function() timer:change() end, "number")
    bad_argument(1, "change", function() timer:change(-1) end, "negative")
    bad_argument(2, "change", function() timer:change(1, 0 / 0) end, "NaN")
    assert.is_false((pcall(timer.dispose, {})))
    assert.is_false((pcall(function() timer.period = 1 end)))
    local called = setmetatable({}, { __call = function(self) self.called = true end })
    local _ <close> = Timer(called, 0.5)
    flow.sleep(0.75)
    assert.is_true(called.called)
  end))
end)

describe("many timers", function()
  it("fire in order of their deadlines, equal ones in the order they were set", in_order(function(clock)
    local N = many(200000, 2000)
    local random, last, last_i, fired, wrong = support.random(3), -1, 0, 0, nil
    local start = clock:now()
    local due = {}
    for i = 1, N do
      due[i] = (random(1000) - 1) * 0.37
      local seconds = due[i]
      Timer(function()
        fired = fired + 1
        if seconds == last and i < last_i then wrong = "equal deadlines out of order" end
        if seconds < last then wrong = "out of order" end
        if clock:now() ~= start + seconds then wrong = "not at its time" end
        last, last_i = seconds, i
      end, seconds)
    end
    flow.sleep(1000)
    assert.is_nil(wrong)
    assert.equal(N, fired)
  end))

  it("all due at one instant are disposed by the first of them", in_task(function()
    local N = many(200000, 2000)
    local timers, count = {}, 0
    local function tick()
      count = count + 1
      for i = 1, N do timers[i]:dispose() end
    end
    for i = 1, N do timers[i] = Timer(tick, 3600) end
    flow.sleep(4000)
    assert.equal(1, count)
    assert.is_false(flow.loop.is_alive())
  end))

  it("a million, canceled in any order, leave nothing", in_task(function()
    local N = many(1000000, 2000)
    local timers, random = {}, support.random(5)
    for i = 1, N do timers[i] = Timer(error, 100 + random(1000000) / 64) end
    for _, i in ipairs(support.shuffled(N, random)) do timers[i]:dispose() end
    assert.is_false(flow.loop.is_alive())
    assert.is_nil(flow.loop.timeout())
  end))
end)

describe("PeriodicTimer", function()
  it("ticks first one full period after creation, then once a period", in_task(function(clock)
    local start, timer = clock:now(), PeriodicTimer(2)
    for i = 1, 4 do
      assert.is_true(timer:wait_for_next_tick())
      assert.equal(start + 2 * i, clock:now())
    end
    timer:dispose()
  end))

  it("makes one pending tick of any number that were missed, and keeps to its grid", in_task(function(clock)
    local start, timer <close> = clock:now(), PeriodicTimer(1)
    flow.sleep(3.5)
    assert.is_true(timer:wait_for_next_tick()) -- at once
    assert.equal(start + 3.5, clock:now())
    assert.is_true(timer:wait_for_next_tick())
    assert.equal(start + 4, clock:now())
    flow.sleep(2) -- exactly on a tick: it is pending
    assert.is_true(timer:wait_for_next_tick())
    assert.equal(start + 6, clock:now())
    assert.is_true(timer:wait_for_next_tick())
    assert.equal(start + 7, clock:now())
  end))

  it("has a task as well: wait_for_next_tick_async", in_task(function(clock)
    local start, timer = clock:now(), PeriodicTimer(1)
    local task = timer:wait_for_next_tick_async()
    assert.equal("waiting_for_activation", task.status)
    assert.equal("wait_for_next_tick", task.name)
    assert.same({ true, n = 1 }, table.pack(task:await()))
    assert.equal(start + 1, clock:now())
    flow.sleep(5)
    assert.is_true(timer:wait_for_next_tick_async().is_completed_successfully) -- a pending tick
    task = timer:wait_for_next_tick_async()
    timer:dispose()
    assert.is_true(task.is_completed_successfully)
    assert.is_false(task.result)
    assert.is_false(timer:wait_for_next_tick_async().result)
  end))

  it("has one waiter at a time; the first one is not harmed", in_order(function(clock)
    local events, record = recorder()
    local start, timer <close> = clock:now(), PeriodicTimer(1)
    local waiter = flow.spawn(function()
      record(timer:wait_for_next_tick())
      record(clock:now() - start)
    end)
    flow.yield()
    raises("InvalidOperation", timer.wait_for_next_tick, timer)
    raises("InvalidOperation", timer.wait_for_next_tick_async, timer)
    raises("InvalidOperation", timer.wait_for_next_tick, timer, Token.canceled) -- before the token
    raises("InvalidOperation", timer.wait_for_next_tick_async, timer, Token.canceled)
    waiter:await()
    assert.same({ true, 1.0 }, events)
    local task = timer:wait_for_next_tick_async()
    raises("InvalidOperation", timer.wait_for_next_tick, timer)
    assert.is_true(task:await())
    assert.equal(start + 2, clock:now())
  end))

  it("is a waiter's until the wait returns", in_order(function()
    local events, record = recorder()
    local timer <close> = PeriodicTimer(1)
    local early = flow.spawn(function()
      flow.sleep(1)
      local ok, err = pcall(timer.wait_for_next_tick, timer)
      record(ok or err.name)
    end)
    flow.yield()
    local waiter = flow.spawn(function() record(timer:wait_for_next_tick()) end)
    early:await()
    waiter:await()
    assert.same({ "InvalidOperation", true }, events)
    assert.is_true(timer:wait_for_next_tick())
  end))

  describe("canceled", function()
    it("before: raises, and consumes no tick", in_task(function(clock)
      local timer <close> = PeriodicTimer(1)
      flow.sleep(1.5)
      local err = raises("OperationCanceled", timer.wait_for_next_tick, timer, Token.canceled)
      assert.equal(Token.canceled, err.token)
      assert.is_true(timer:wait_for_next_tick_async(Token.canceled).is_canceled)
      local now = clock:now()
      assert.is_true(timer:wait_for_next_tick())
      assert.equal(now, clock:now())
    end))

    it("during: ends that wait only, and consumes no tick", in_task(function(clock)
      local start, timer <close>, source = clock:now(), PeriodicTimer(2), Source(1)
      local err = raises("OperationCanceled", timer.wait_for_next_tick, timer, source.token)
      assert.equal(source.token, err.token)
      assert.equal(start + 1, clock:now())
      assert.is_true(timer:wait_for_next_tick(Source().token))
      assert.equal(start + 2, clock:now())
      source = Source(1)
      local task = timer:wait_for_next_tick_async(source.token)
      err = raises("OperationCanceled", task.await, task)
      assert.equal(source.token, err.token)
      assert.is_true(timer:wait_for_next_tick())
      assert.equal(start + 4, clock:now())
    end))

    it("after: changes nothing", in_task(function()
      local timer <close>, source = PeriodicTimer(1), Source()
      local task = timer:wait_for_next_tick_async(source.token)
      assert.is_true(timer and task:await())
      assert.is_true(timer:wait_for_next_tick(source.token))
      source:cancel()
      assert.is_true(task.result)
      flow.yield()
    end))

    it("by the ambient token, by task:cancel, by a timeout around it", in_task(function(clock)
      local start, timer <close> = clock:now(), PeriodicTimer(10)
      raises("Timeout", flow.with_timeout, 1, timer.wait_for_next_tick, timer)
      raises("Timeout", flow.with_timeout, 1, function() return timer:wait_for_next_tick_async():await() end)
      assert.equal(start + 2, clock:now())
      local task = flow.spawn(timer.wait_for_next_tick, timer)
      flow.yield()
      task:cancel "enough"
      assert.equal("enough", select(2, task:try_await()).reason)
      task = timer:wait_for_next_tick_async()
      assert.is_true(task:cancel("why not"))
      assert.is_true(task.is_canceled)
      assert.equal("why not", select(2, task:try_await()).reason)
      assert.is_true(timer:wait_for_next_tick())
      assert.equal(start + 10, clock:now())
    end))

    it("not when it was given `none`", in_task(function(clock)
      local start, timer <close> = clock:now(), PeriodicTimer(10)
      local task = flow.spawn(function()
        local direct = timer:wait_for_next_tick(Token.none)
        return direct, timer:wait_for_next_tick_async(Token.none)
      end)
      flow.yield()
      task:cancel()
      local direct, other = task:await()
      assert.is_true(direct)
      assert.is_true(other:await())
      assert.equal(start + 20, clock:now())
    end))

    it("at the instant of the tick, if that deadline was set first: of a scope, or of a token", in_order(function(clock)
      local start, timer <close> = clock:now(), PeriodicTimer(1)
      raises("Timeout", flow.with_timeout, 1, timer.wait_for_next_tick, timer)
      assert.is_true(timer:wait_for_next_tick()) -- that tick is still there
      assert.equal(start + 1, clock:now())
      local source = Source(1)
      raises("OperationCanceled", timer.wait_for_next_tick, timer, source.token)
      assert.is_true(timer:wait_for_next_tick()) -- the same
      assert.equal(start + 2, clock:now())
      local waiter = flow.async(timer.wait_for_next_tick)(timer, flow.CancellationToken.none)
      source = Source(1)
      flow.sleep(1)
      assert.is_true(source.is_cancellation_requested)
      assert.is_true(waiter:await())
    end))
  end)

  describe("disposed", function()
    it("makes the outstanding wait return false, and every later one", in_task(function(clock)
      local start, timer = clock:now(), PeriodicTimer(10)
      local waiter = flow.spawn(timer.wait_for_next_tick, timer)
      flow.sleep(1)
      timer:dispose()
      timer:dispose()
      assert.is_false(waiter:await())
      assert.equal(start + 1, clock:now())
      assert.is_false(timer:wait_for_next_tick())
      raises("OperationCanceled", timer.wait_for_next_tick, timer, Token.canceled)
      assert.is_false(flow.loop.is_alive())
    end))

    it("voids a pending tick, and one that has woken its waiter already", in_order(function()
      local timer = PeriodicTimer(1)
      flow.sleep(5)
      timer:dispose()
      assert.is_false(timer:wait_for_next_tick())
      local other = PeriodicTimer(1)
      local killer = flow.spawn(function()
        flow.sleep(1)
        other:dispose()
      end)
      flow.yield()
      assert.is_false(other:wait_for_next_tick())
      killer:await()
    end))

    it("by <close>", in_task(function()
      local waiter
      do
        local timer <close> = PeriodicTimer(1)
        waiter = flow.spawn(timer.wait_for_next_tick, timer)
        flow.yield()
      end
      assert.is_false(waiter:await())
    end))

    it("inside its own loop", in_task(function()
      local timer, count = PeriodicTimer(1), 0
      while timer:wait_for_next_tick() do
        count = count + 1
        if count == 3 then timer:dispose() end
      end
      assert.equal(3, count)
    end))
  end)

  describe("period", function()
    it("is read and set; the next tick is one new period from then", in_task(function(clock)
      local start, timer <close> = clock:now(), PeriodicTimer(10)
      assert.equal(10, timer.period)
      flow.sleep(1)
      timer.period = 2
      assert.equal(2, timer.period)
      assert.is_true(timer:wait_for_next_tick())
      assert.equal(start + 3, clock:now())
      assert.is_true(timer:wait_for_next_tick())
      assert.equal(start + 5, clock:now())
    end))

    it("takes effect at once for an outstanding wait, longer, shorter, never and back", in_task(function(clock)
      for _, wait in ipairs { "wait_for_next_tick", "wait_for_next_tick_async" } do
        local start, timer <close> = clock:now(), PeriodicTimer(10)
        local waiter = flow.spawn(function()
          local result = timer[wait](timer)
          return result == true or result:await()
        end)
        flow.sleep(9)
        timer.period = 100
        flow.sleep(9)
        timer.period = math.huge
        flow.sleep(1e6)
        collect()
        assert.equal("waiting_for_activation", waiter.status)
        timer.period = 0.5
        assert.is_true(waiter:await())
        assert.equal(start + 18 + 1e6 + 0.5, clock:now())
      end
    end))

    it("set keeps a tick that is pending", in_task(function(clock)
      local timer <close> = PeriodicTimer(1)
      flow.sleep(2)
      timer.period = 50
      local now = clock:now()
      assert.is_true(timer:wait_for_next_tick())
      assert.equal(now, clock:now())
      assert.is_true(timer:wait_for_next_tick())
      assert.equal(now + 50, clock:now())
    end))

    it("set between a tick and the return of its waiter makes no second tick", in_task(function(clock)
      local timer <close> = PeriodicTimer(1)
      local setter = flow.spawn(function()
        flow.sleep(1)
        timer.period = 5
      end)
      flow.yield()
      assert.is_true(timer:wait_for_next_tick())
      local now = clock:now()
      assert.is_true(timer:wait_for_next_tick())
      assert.equal(now + 5, clock:now())
      setter:await()
    end))

    it("refuses what is no period, and keeps the old one", in_task(function()
      bad_argument(1, "PeriodicTimer", function() local _ = PeriodicTimer() end, "number")
      bad_argument(1, "PeriodicTimer", function() local _ = PeriodicTimer(0) end, "greater than 0")
      bad_argument(1, "PeriodicTimer", function() local _ = PeriodicTimer(-1) end, "greater than 0")
      bad_argument(1, "PeriodicTimer", function() local _ = PeriodicTimer(0 / 0) end, "greater than 0")
      local timer = PeriodicTimer(3)
      for _, wrong in ipairs { 0, -1, 0 / 0, "x", {} } do
        local ok, err = pcall(function() timer.period = wrong end)
        assert.is_false(ok)
        local what = type(wrong) == "number" and "a period must be greater than 0 seconds"
          or "number expected, got " .. type(wrong)
        assert.truthy(err:find(helper.here(-4) .. ": bad argument #1 to 'period' (" .. what .. ")", 1, true), err)
        assert.equal(3, timer.period)
      end
      assert.is_false((pcall(function() timer.other = 1 end)))
      timer:dispose()
      raises("ObjectDisposed", function() timer.period = 1 end)
      assert.equal(3, timer.period)
    end))

    it("set over and over leaves nothing behind", in_task(function()
      local timer <close> = PeriodicTimer(10)
      local waiter = flow.spawn(timer.wait_for_next_tick, timer)
      flow.yield()
      collect()
      local before = collectgarbage "count"
      for i = 1, many(100000, 1000) do timer.period = 10 + i % 5 end
      assert.is_true(collectgarbage "count" - before < 16)
      assert.is_true(waiter:await())
      assert.is_false(flow.loop.is_alive())
    end))
  end)

  it("captures no context: the waiter keeps its own", in_task(function()
    local loc, seen = flow.AsyncLocal(), weak()
    local timer
    flow.call(function()
      seen[1] = {}
      loc.value = seen[1]
      timer = PeriodicTimer(1)
    end)
    assert.equal(0, alive(seen))
    loc.value = "the waiter's"
    timer:wait_for_next_tick()
    timer:dispose()
    assert.equal("the waiter's", loc.value)
  end))

  it("that nobody waits for is garbage, and does not keep the loop alive", function()
    flow.run(function()
      local seen = weak()
      seen[1] = PeriodicTimer(1)
      assert.is_false(flow.loop.is_alive())
      assert.equal(0, alive(seen))
    end)
  end)

  it("is kept alive by an outstanding wait", in_task(function()
    local events, record = recorder()
    for _, wait in ipairs { "wait_for_next_tick", "wait_for_next_tick_async" } do
      flow.spawn(function()
        local timer <close> = PeriodicTimer(10)
        local result = timer[wait](timer)
        if result ~= true then result = result:await() end
        record(result)
      end)
    end
    flow.sleep(5)
    collect()
    flow.sleep(6)
    assert.same({ true, true }, events)
  end))

  it("of math.huge that nobody can end is abandoned with its waiter", function()
    with_reports(function(reports)
      testing.run(function()
        local closed = 0
        for _, wait in ipairs { "wait_for_next_tick", "wait_for_next_tick_async" } do
          flow.spawn(function()
            local timer <close> = PeriodicTimer(math.huge)
            local _ <close> = helper.closing(function() closed = closed + 1 end)
            local result = timer[wait](timer)
            return result == true or result:await()
          end)
        end
        flow.yield()
        helper.collect()
        helper.collect()
        assert.equal(2, closed)
      end)
      assert.equal(2, #reports)
      for i = 1, 2 do assert.is_true(is(reports[i].err, "TaskAbandoned")) end
    end)
  end)

  it("waits at the top level too", function()
    local timer <close> = PeriodicTimer(0.002)
    assert.is_true(timer:wait_for_next_tick())
    assert.is_true(timer:wait_for_next_tick())
    assert.is_true(timer:wait_for_next_tick_async():await())
    assert.is_false(flow.loop.is_alive())
  end)

  it("works inside pcall, an iterator and a metamethod", in_task(function(clock)
    local start, timer = clock:now(), PeriodicTimer(1)
    assert.same({ true, true }, { pcall(timer.wait_for_next_tick, timer) })
    local ticks = 0
    for _ in function() return timer:wait_for_next_tick() end do
      ticks = ticks + 1
      if ticks == 3 then break end
    end
    local lazy = setmetatable({}, { __index = function() return timer:wait_for_next_tick() end })
    assert.is_true(lazy.tick)
    assert.equal(start + 5, clock:now())
    timer:dispose()
  end))

  it("is waited for inside a generator made by coflow.coroutine: the task waits", in_task(function(clock)
    local start, timer, seen = clock:now(), PeriodicTimer(1), {}
    local ticks = flow.coroutine.wrap(function()
      while timer:wait_for_next_tick() do flow.coroutine.yield(clock:now() - start) end
    end)
    for time in ticks do
      seen[#seen + 1] = time
      if time >= 3 then timer:dispose() end
    end
    assert.same({ 1.0, 2.0, 3.0 }, seen)
  end))

  it("is refused where Lua cannot yield, and has no waiter then", in_task(function()
    local timer <close> = PeriodicTimer(1)
    raises("InvalidOperation", table.sort, { 1, 2 }, function() return timer:wait_for_next_tick() end)
    raises("InvalidOperation", coroutine.wrap(timer.wait_for_next_tick), timer)
    assert.is_true(timer:wait_for_next_tick())
  end))

  it("whose waiter's coroutine was closed by somebody takes another one", in_order(function()
    local timer <close> = PeriodicTimer(1)
    local thread
    local victim = flow.spawn(function()
      thread = coroutine.running()
      timer:wait_for_next_tick()
    end)
    flow.yield()
    coroutine.close(thread)
    victim:try_await()
    assert.is_true(timer:wait_for_next_tick())
  end))

  it("refuses what is no token", in_task(function()
    local timer <close> = PeriodicTimer(1)
    bad_argument(1, "wait_for_next_tick", function() timer:wait_for_next_tick(1) end, "Token")
    bad_argument(1, "wait_for_next_tick_async", function() timer:wait_for_next_tick_async {} end, "Token")
    assert.is_false((pcall(timer.wait_for_next_tick, {})))
    assert.is_true(timer:wait_for_next_tick())
  end))

  it("is told by the drift of a thousand ticks: none", in_task(function(clock)
    local start, timer <close> = clock:now(), PeriodicTimer(0.25)
    for i = 1, many(1000) do
      timer:wait_for_next_tick()
      assert.equal(start + i * 0.25, clock:now())
    end
  end))
end)

describe("a state that closes", function()
  it("with 1000 timers armed and ticks pending ends in peace", function()
    assert.equal("closing\n", helper.output [[
      local flow = require "coflow"
      for i = 1, 1000 do flow.Timer(print, 1000 + i, i) end
      flow.run(function()
        for _ = 1, 100 do
          local timer = flow.PeriodicTimer(500)
          flow.spawn(timer.wait_for_next_tick, timer)
          flow.PeriodicTimer(500):wait_for_next_tick_async()
        end
        for _ = 1, 300 do flow.Timer(print, 0) end
        io.write "closing\n" -- the root task ends: the timers that are due have no turn any more
      end)
    ]])
  end)

  it("by os.exit inside a tick", function()
    local result = helper.child [[
      local flow = require "coflow"
      flow.run(function()
        for i = 1, 1000 do flow.Timer(error, 50 + i) end
        flow.Timer(function() os.exit(7, true) end, 0)
        for i = 1, 1000 do flow.Timer(error, 0, i) end
        flow.sleep(10)
      end)
    ]]
    assert.same({ 7, "", "" }, { result.code, result.out, result.err })
  end)
end)

describe("a PeriodicTimer whose waiter somebody has closed", function()
  it("has room for another one", in_order(function()
    local timer <close> = PeriodicTimer(math.huge) -- nothing but the coroutine holds who waits for it
    local kept
    local task = flow.spawn(function()
      kept = coroutine.running()
      timer:wait_for_next_tick()
    end)
    flow.yield()
    coroutine.close(kept)
    timer.period = 1
    assert.is_true(timer:wait_for_next_tick())
    raises("InvalidOperation", task.await, task)
  end))
end)
