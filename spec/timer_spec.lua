-- Time: sleep, delay, the timeouts of wait_async, and the loop's clock; all of it virtual.

local flow = require "coflow"
local testing = require "coflow.testing"
local support = require "spec.support.flow_support"

local in_task, many = support.in_task, support.many
local in_order = support.in_order
local raises, bad_argument = support.raises, support.bad_argument
local recorder, weak, alive = support.recorder, support.weak, support.alive
local Source, Token = flow.CancellationTokenSource, flow.CancellationToken
local is = flow.errors.is

local function count_of(list)
  local count = 0
  for _ in pairs(list) do count = count + 1 end
  return count
end

describe("sleep", function()
  it("moves the clock, however short it is", in_task(function(clock)
    flow.sleep(0.3)
    local tokens, last = 0, clock:now() -- as a bucket would be filled: rounding leaves it just short of 1
    while tokens < 1 do
      flow.sleep((1 - tokens) / 3)
      tokens = tokens + (clock:now() - last) * 3
      last = clock:now()
    end
    local before = clock:now()
    flow.sleep(1e-300)
    assert.is_true(clock:now() > before and clock:now() < before + 1e-9)
  end))

  it("takes the time it is told, exactly", in_task(function(clock)
    for _, seconds in ipairs { 1, 0.5, 2.25, 3600, 86400 * 365 } do
      local start = clock:now()
      flow.sleep(seconds)
      assert.equal(start + seconds, clock:now())
    end
  end))

  it("is never early, also for times that are no binary fractions", in_task(function(clock)
    local random = support.random(11)
    for _ = 1, many(500) do
      local seconds, start = random(1000000) / 999983, clock:now()
      flow.sleep(seconds)
      local elapsed = clock:now() - start
      assert.is_true(elapsed >= seconds - 1e-9 and elapsed <= seconds + 1e-3)
    end
  end))

  it("takes tiny times without getting stuck", in_task(function(clock)
    local start = clock:now()
    for _ = 1, 10 do flow.sleep(1e-9) end
    flow.sleep(1e-300)
    assert.is_true(clock:now() - start < 0.1)
  end))

  it("of 0 does not suspend", in_task(function(clock)
    local other, start = false, clock:now()
    local task = flow.spawn(function() other = true end)
    flow.sleep(0)
    flow.sleep(0.0)
    assert.is_false(other)
    assert.equal(start, clock:now())
    task:await()
  end))

  it("lets others run meanwhile, in order of their deadlines", in_task(function(clock)
    local events, record = recorder()
    local start, tasks = clock:now(), {}
    for i, seconds in ipairs { 3, 1, 2 } do
      tasks[i] = flow.spawn(function()
        flow.sleep(seconds)
        record(("%g at %g"):format(seconds, clock:now() - start))
      end)
    end
    for _, task in ipairs(tasks) do task:await() end
    assert.same({ "1 at 1", "2 at 2", "3 at 3" }, events)
  end))

  it("wakes equal deadlines in the order they were set", in_order(function()
    local events, record = recorder()
    local tasks = {}
    for i = 1, 200 do
      tasks[i] = flow.spawn(function()
        flow.sleep(1)
        record(i)
      end)
    end
    for _, task in ipairs(tasks) do task:await() end
    for i = 1, 200 do assert.equal(i, events[i]) end
  end))

  it("wakes equal deadlines in the order they were set, also when set at different times",
    in_order(function()
      local events, record = recorder()
      local function sleeper(name, first, second)
        return flow.spawn(function()
          flow.sleep(first)
          flow.sleep(second)
          record(name)
        end)
      end
      local tasks = { sleeper("c", 3, 1), sleeper("a", 1, 3), sleeper("d", 3.5, 0.5),
        sleeper("b", 2, 2) }
      for _, task in ipairs(tasks) do task:await() end
      assert.same({ "a", "b", "c", "d" }, events)
    end))

  it("may be set by whoever was woken at the same instant", in_order(function(clock)
    local events, record = recorder()
    local start, tasks = clock:now(), {}
    for i = 1, 3 do
      tasks[i] = flow.spawn(function()
        for round = 1, 3 do
          flow.sleep(1)
          record(("%d at %g"):format(i, clock:now() - start))
          assert.equal(start + round, clock:now())
        end
      end)
    end
    for _, task in ipairs(tasks) do task:await() end
    assert.same({ "1 at 1", "2 at 1", "3 at 1", "1 at 2", "2 at 2", "3 at 2", "1 at 3", "2 at 3",
      "3 at 3" }, events)
  end))

  it("raises at once when its token is canceled already, for 0 too", in_task(function(clock)
    local source <close> = Source()
    local start = clock:now()
    source:cancel("why")
    for _, seconds in ipairs { 0, 5, math.huge } do
      local err = raises("OperationCanceled", flow.sleep, seconds, source.token)
      assert.equal(source.token, err.token)
      assert.equal("why", err.reason)
    end
    assert.equal(start, clock:now())
  end))

  it("ends when its token is canceled, at that time, on a later turn", in_task(function(clock)
    local events, record = recorder()
    local source <close> = Source()
    local start = clock:now()
    local task = flow.spawn(function()
      local err = raises("OperationCanceled", flow.sleep, 100, source.token)
      assert.equal(source.token, err.token)
      record(("canceled at %g"):format(clock:now() - start))
    end)
    flow.sleep(2)
    source:cancel()
    record("after cancel")
    task:await()
    flow.sleep(1)
    assert.equal(start + 3, clock:now())
    assert.same({ "after cancel", "canceled at 2" }, events)
  end))

  it("is not touched by a cancel after its end", in_task(function()
    local source <close> = Source()
    flow.sleep(1, source.token)
    source:cancel()
    flow.sleep(1)
  end))

  it("ends normally when its deadline was set before the token's of the same instant",
    in_order(function()
      local source <close> = Source()
      local task = flow.spawn(flow.sleep, 1, source.token)
      flow.yield()
      source:cancel_after(1)
      task:await()
    end))

  it("is canceled when the token's deadline of the same instant was set before", in_order(function()
    local source <close> = Source(1)
    raises("OperationCanceled", flow.sleep, 1, source.token)
    raises("OperationCanceled", flow.await, flow.delay(1, Source(1).token))
  end))

  it("of math.huge waits for its token", in_task(function(clock)
    local source <close> = Source(1e9)
    local start = clock:now()
    raises("OperationCanceled", flow.sleep, math.huge, source.token)
    assert.equal(start + 1e9, clock:now())
  end))

  it("takes any finite time, however long, and is not early by overflow", in_task(function()
    for _, seconds in ipairs { 1e10, 1e15, 2.0 ^ 53, 2.0 ^ 63, 2.0 ^ 64, 1e20, 1e300 } do
      local source <close> = Source(1000)
      raises("OperationCanceled", flow.sleep, seconds, source.token)
    end
  end))

  it("refuses what is no time, and what is no token", in_task(function()
    bad_argument(1, "sleep", function() flow.sleep() end)
    bad_argument(1, "sleep", function() flow.sleep(nil) end)
    bad_argument(1, "sleep", function() flow.sleep(-1) end)
    bad_argument(1, "sleep", function() flow.sleep(-math.huge) end)
    bad_argument(1, "sleep", function() flow.sleep(0 / 0) end)
    bad_argument(1, "sleep", function() flow.sleep("a while") end)
    bad_argument(1, "sleep", function() flow.sleep({}) end)
    bad_argument(2, "sleep", function() flow.sleep(1, 42) end)
    bad_argument(2, "sleep", function() flow.sleep(1, {}) end)
    bad_argument(2, "sleep", function() flow.sleep(0, "token") end)
  end))

  it("works outside every task when there is nothing to wait for", function()
    flow.sleep(0)
    local err = raises("OperationCanceled", flow.sleep, 10, Token.canceled)
    assert.equal(Token.canceled, err.token)
  end)

  it("moves no time while anything is ready", in_task(function(clock)
    local start, rounds = clock:now(), 0
    local sleeper = flow.spawn(flow.sleep, 1)
    local turns = many(1000)
    for _ = 1, turns do
      flow.yield()
      rounds = rounds + 1
      assert.equal(start, clock:now())
    end
    sleeper:await()
    assert.equal(start + 1, clock:now())
    assert.equal(turns, rounds)
  end))
end)

describe("delay", function()
  it("is a task that completes after that time", in_task(function(clock)
    local start = clock:now()
    local task = flow.delay(2.5)
    assert.is_false(task.is_completed)
    assert.equal("waiting_for_activation", task.status)
    flow.sleep(2)
    assert.is_false(task.is_completed)
    assert.equal(0, select("#", task:await()))
    assert.equal(start + 2.5, clock:now())
    assert.equal("ran_to_completion", task.status)
  end))

  it("is also called Task.delay", in_task(function(clock)
    local start = clock:now()
    flow.Task.delay(1):await()
    assert.equal(start + 1, clock:now())
  end))

  it("of 0 is complete already", in_task(function()
    assert.is_true(flow.delay(0).is_completed_successfully)
    assert.is_true(flow.delay(0, Token.none).is_completed_successfully)
  end))

  it("runs from its start, not from the await", in_task(function(clock)
    local start = clock:now()
    local one, two, three = flow.delay(1), flow.delay(2), flow.delay(3)
    three:await()
    two:await()
    one:await()
    assert.equal(start + 3, clock:now())
  end))

  it("is canceled at once by a canceled token, for 0 too", in_task(function()
    local source <close> = Source()
    source:cancel("why")
    for _, seconds in ipairs { 0, 5 } do
      local task = flow.delay(seconds, source.token)
      assert.is_true(task.is_canceled)
      assert.is_nil(task.exception)
      local err = raises("OperationCanceled", flow.await, task)
      assert.equal(source.token, err.token)
      assert.equal("why", err.reason)
      assert.equal(err, raises("OperationCanceled", flow.await, task))
    end
  end))

  it("is canceled with its token, and runs no waiter inside cancel", in_task(function(clock)
    local events, record = recorder()
    local source <close> = Source()
    local start = clock:now()
    local task = flow.delay(100, source.token)
    local waiter = flow.spawn(function()
      record(tostring(task:try_await()))
    end)
    flow.yield()
    source:cancel()
    record("after cancel")
    waiter:await()
    assert.equal("canceled", task.status)
    assert.same({ "after cancel", "false" }, events)
    assert.equal(start, clock:now())
  end))

  it("stays complete when its token is canceled later", in_task(function()
    local source <close> = Source()
    local task = flow.delay(1, source.token)
    task:await()
    source:cancel()
    assert.is_true(task.is_completed_successfully)
  end))

  it("of math.huge is pending until it is canceled", in_task(function()
    local source <close> = Source()
    local task = flow.delay(math.huge, source.token)
    flow.sleep(1e9)
    assert.is_false(task.is_completed)
    source:cancel()
    assert.is_false((task:try_await()))
    assert.is_true(task.is_canceled)
  end))

  it("has many waiters, woken in the order they came", in_order(function()
    local events, record = recorder()
    local delay, tasks = flow.delay(1), {}
    for i = 1, 10 do
      tasks[i] = flow.spawn(function()
        delay:await()
        record(i)
      end)
    end
    for _, task in ipairs(tasks) do task:await() end
    assert.same({ 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 }, events)
  end))

  it("leaves nothing on a token that lives long", in_task(function()
    local tasks = weak()
    local source <close> = Source()
    for i = 1, 100 do
      tasks[i] = flow.delay(i / 100, source.token)
    end
    flow.sleep(2)
    assert.equal(0, alive(tasks))
  end))

  it("refuses what is no time, and what is no token", in_task(function()
    for _, delay in ipairs { flow.delay, flow.Task.delay } do
      bad_argument(1, "delay", function() delay() end)
      bad_argument(1, "delay", function() delay(nil) end)
      bad_argument(1, "delay", function() delay(-0.001) end)
      bad_argument(1, "delay", function() delay(0 / 0) end)
      bad_argument(1, "delay", function() delay({}) end)
      bad_argument(2, "delay", function() delay(1, {}) end)
      bad_argument(2, "delay", function() delay(1, true) end)
    end
  end))
end)

describe("10,000 delays", function()
  local N = many(10000)

  it("end in order of their deadlines, equal ones in the order they were set",
    in_order(function(clock)
      local random, expected, got, tasks = support.random(42), {}, {}, {}
      local start = clock:now()
      for i = 1, N do
        local due = random(500) / 4
        expected[i] = { due = due, i = i }
        tasks[i] = flow.spawn(function()
          flow.sleep(due)
          got[#got + 1] = i
          if clock:now() ~= start + due then error("woken at the wrong time") end
        end)
      end
      for i = 1, N do tasks[i]:await() end
      table.sort(expected, function(a, b)
        if a.due ~= b.due then return a.due < b.due end
        return a.i < b.i
      end)
      for n = 1, N do
        if got[n] ~= expected[n].i then error(("wake-up %d is %d"):format(n, got[n])) end
      end
      assert.equal(start + expected[N].due, clock:now())
    end))

  it("leave nothing when half of them are canceled in any order", in_task(function(clock)
    local random, sources, tasks = support.random(43), {}, {}
    for i = 1, N do
      sources[i] = Source()
      tasks[i] = flow.delay(1 + random(1000) / 8, sources[i].token)
    end
    local start, order = clock:now(), support.shuffled(N, random)
    for n = 1, N // 2 do sources[order[n]]:cancel() end
    local last = 0
    for n = N // 2 + 1, N do
      tasks[order[n]]:await()
      last = clock:now()
    end
    for n = 1, N // 2 do assert.is_true(tasks[order[n]].is_canceled) end
    assert.is_true(last <= start + 126)
    for _, source in ipairs(sources) do source:dispose() end
  end))

  it("that are dropped do not outlive their deadlines", in_task(function()
    local tasks = weak()
    for i = 1, N do tasks[i] = flow.delay(i / N) end
    assert.equal(N, count_of(tasks))
    flow.sleep(2)
    assert.equal(0, alive(tasks))
  end))
end)

describe("wait_async", function()
  local gate
  before_each(function() gate = flow.TaskCompletionSource() end)

  it("completes as its task does, with all its values", in_task(function(clock)
    local start = clock:now()
    local wait = gate.task:wait_async(10)
    flow.sleep(1)
    gate:set_result(1, nil, 3, nil)
    assert.same({ 1, nil, 3, nil, n = 4 }, table.pack(wait:await()))
    assert.equal(start + 1, clock:now())
  end))

  it("faults as its task does, with the same error", in_task(function()
    local problem = {}
    local wait = gate.task:wait_async(10)
    gate:set_exception(problem)
    assert.same({ false, problem }, { wait:try_await() })
    assert.is_true(wait.is_faulted)
    assert.equal(problem, select(2, gate.task:wait_async():try_await()))
  end))

  it("is canceled as its task is", in_task(function()
    local wait = gate.task:wait_async(10)
    gate:set_canceled(Token.canceled)
    local err = raises("OperationCanceled", flow.await, wait)
    assert.is_true(wait.is_canceled)
    assert.equal(Token.canceled, err.token)
  end))

  it("faults with Timeout when the time is over, and its task goes on", in_task(function(clock)
    local start = clock:now()
    local wait = gate.task:wait_async(2)
    raises("Timeout", flow.await, wait)
    assert.is_true(wait.is_faulted)
    assert.equal(start + 2, clock:now())
    assert.is_false(gate.task.is_completed)
    gate:set_result("late")
    assert.equal("late", gate.task:await())
    assert.is_true(wait.is_faulted)
  end))

  it("is canceled with its token, and its task goes on", in_task(function(clock)
    local source <close> = Source(1)
    local start = clock:now()
    local wait = gate.task:wait_async(5, source.token)
    local err = raises("OperationCanceled", flow.await, wait)
    assert.equal(source.token, err.token)
    assert.is_true(wait.is_canceled)
    assert.equal(start + 1, clock:now())
    assert.is_false(gate.task.is_completed)
    gate:set_result()
  end))

  it("of a complete task is complete, whatever timeout and token say", in_task(function()
    gate:set_result("value")
    assert.equal("value", gate.task:wait_async(0, Token.canceled):await())
    assert.is_true(gate.task:wait_async(0).is_completed_successfully)
    assert.is_true(gate.task:wait_async(nil, Token.canceled).is_completed_successfully)
  end))

  it("is canceled rather than timed out when the token is canceled already", in_task(function()
    local wait = gate.task:wait_async(0, Token.canceled)
    assert.is_true(wait.is_canceled)
    gate:set_result()
  end))

  it("of 0 times out at once", in_task(function(clock)
    local start = clock:now()
    raises("Timeout", flow.await, gate.task:wait_async(0))
    assert.equal(start, clock:now())
    gate:set_result()
  end))

  it("has no limit with nil and math.huge", in_task(function()
    local one, two = gate.task:wait_async(), gate.task:wait_async(math.huge, Token.none)
    flow.sleep(1e9)
    assert.is_false(one.is_completed or two.is_completed)
    gate:set_result("at last")
    assert.same({ "at last", "at last" }, { one:await(), two:await() })
  end))

  it("lets its task win that completes at the same instant, when that was set first",
    in_order(function()
      local delay = flow.delay(1)
      local wait = delay:wait_async(1)
      wait:await()
    end))

  it("leaves no timer behind", function()
    local finish
    testing.run(function(clock)
      gate.task:wait_async(1e6)
      local source <close> = Source()
      gate.task:wait_async(2e6, source.token)
      flow.sleep(1)
      source:cancel()
      gate:set_result()
      flow.yield()
      finish = clock:now()
    end)
    assert.is_true(finish <= 1)
  end)

  it("leaves nothing on a task and a token that live long", in_task(function()
    local waits = weak()
    local source <close> = Source()
    for i = 1, 100 do
      waits[i] = gate.task:wait_async(1, source.token)
      assert.is_false((waits[i]:try_await()))
    end
    assert.equal(0, alive(waits))
    gate:set_result()
  end))

  it("refuses what is no time, for a complete task too", in_task(function()
    bad_argument(1, "wait_async", function() gate.task:wait_async(-1) end)
    gate:set_result()
    bad_argument(1, "wait_async", function() gate.task:wait_async(-1) end)
    bad_argument(1, "wait_async", function() gate.task:wait_async(0 / 0) end)
    bad_argument(1, "wait_async", function() gate.task:wait_async("x") end)
    bad_argument(2, "wait_async", function() gate.task:wait_async(1, {}) end)
  end))

  it("observes the error only when it passed it on", function()
    support.with_reports(function(reports)
      in_task(function()
        local problem = {}
        flow.call(function()
          local failing = flow.async(function()
            flow.sleep(2)
            error(problem)
          end)()
          local _, err = failing:wait_async(1):try_await()
          assert.is_true(is(err, "Timeout"))
        end)
        flow.sleep(5)
        support.collect()
        flow.yield()
        assert.equal(1, #reports)
        assert.equal(problem, reports[1].err)
      end)()
    end)
  end)
end)

describe("a wait for a token", function()
  local gate = flow.TaskCompletionSource()
  local waits = {
    { "sleep(math.huge)", function(token) flow.sleep(math.huge, token) end },
    { "sleep(1e12)", function(token) flow.sleep(1e12, token) end },
    { "delay(math.huge)", function(token) flow.delay(math.huge, token):await() end },
    { "wait_async()", function(token) gate.task:wait_async(nil, token):await() end },
    { "token:wait()", function(token)
      token:wait()
      token:throw_if_cancellation_requested()
    end },
  }

  for _, each in ipairs(waits) do
    local name, wait = each[1], each[2]
    it("by " .. name .. " is not given up while somebody holds its task", in_order(function()
      local source <close> = Source()
      local task = flow.spawn(wait, source.token)
      flow.yield()
      support.collect()
      flow.yield()
      support.collect()
      flow.yield()
      assert.equal("waiting_for_activation", task.status)
      source:cancel("why")
      local _, err = task:try_await()
      assert.is_true(is(err, "OperationCanceled"))
      assert.equal("why", err.reason)
    end))

    it("by " .. name .. " is held by the armed deadline of its source alone", in_task(function(clock)
      local ended
      flow.spawn(function()
        local source <close> = Source(1000)
        local _, err = pcall(wait, source.token)
        ended = tostring(is(err, "OperationCanceled")) .. " at " .. ("%g"):format(clock:now())
      end)
      for _ = 1, 3 do
        flow.yield()
        support.collect()
      end
      flow.sleep(2000)
      assert.equal("true at 1000", ended)
    end))
  end

  it("is given up with that, whatever its callbacks refer to", in_order(function()
    for name, wait in pairs {
      sleep = waits[1][2],
      wait_for_next_tick = function(token)
        local timer <close> = flow.PeriodicTimer(math.huge)
        timer:wait_for_next_tick(token)
      end,
    } do
      support.with_reports(function(reports)
        flow.spawn(function()
          local source, me = Source(), flow.current_task()
          source.token:register(function() return me end)
          wait(source.token)
        end)
        for _ = 1, 3 do
          flow.yield()
          support.collect()
        end
        assert.equal(1, #reports, name)
        assert.is_true(is(reports[1].err, "TaskAbandoned"))
      end)
    end
  end))
end)

describe("flow.loop", function()
  it("tells the virtual time under a virtual clock", in_task(function(clock)
    local start = flow.loop.now()
    assert.equal(clock:now(), start)
    flow.sleep(12.5)
    assert.equal(start + 12.5, flow.loop.now())
    assert.equal(clock:now(), flow.loop.now())
  end))

  it("keeps its virtual time when a second clock inside is refused", in_task(function(clock)
    flow.sleep(1)
    local start = clock:now()
    raises("InvalidOperation", testing.run, function() end)
    assert.equal(start, flow.loop.now())
    flow.sleep(1000)
    assert.equal(start + 1000, clock:now())
  end))

  it("tells a time that never goes back", function()
    local last = flow.loop.now()
    assert.equal("number", type(last))
    flow.run(function()
      for _ = 1, 100 do
        flow.yield()
        local now = flow.loop.now()
        assert.is_true(now >= last)
        last = now
      end
    end)
  end)

  it("tells how long it may wait: not longer than to the next deadline", function()
    flow.run(function()
      local source <close> = Source()
      local far, near = flow.delay(600, source.token), flow.delay(300, source.token)
      local timeout = flow.loop.timeout()
      assert.is_true(timeout >= 0 and timeout <= 300.1)
      source:cancel()
      assert.is_true(far.is_canceled and near.is_canceled)
    end)
  end)

  it("is alive while a delay is pending", function()
    local source <close> = Source()
    local delay = flow.delay(600, source.token)
    assert.is_true(flow.loop.is_alive())
    source:cancel()
    flow.run(function() delay:try_await() end)
    assert.is_false(flow.loop.is_alive())
  end)
end)
