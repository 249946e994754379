-- coflow.resilience: retry, timeout, circuit_breaker, bulkhead, rate_limiter, hedging, fallback, pipeline.
-- SPDX-License-Identifier: MIT

local flow = require "coflow"
local testing = require "coflow.testing"
local helper = require "spec.helper"
local support = require "spec.support.flow_support"

local in_task, raises, recorder, raised = support.in_task, helper.raises, helper.recorder, helper.raised
local resilience = flow.resilience
local now = flow.loop.now

local function fail(err) error(err, 0) end

-- A function that fails its first `n` calls with "failure 1" …, then returns the number of the call.
local function failing(n, note)
  local calls = 0
  return function()
    calls = calls + 1
    if note then note(calls, now()) end
    if calls <= n then error("failure " .. calls, 0) end
    return calls
  end
end

-- The delays that on_retry is told of, until the strategy gives up.
local function delays_of(options)
  local delays = {}
  options.on_retry = function(args) delays[#delays + 1] = args.delay end
  pcall(resilience.retry(options).execute, resilience.retry(options), fail)
  return delays
end

-- `strategy:execute(fn)` under a token that is canceled already.
local function execute_canceled(strategy, fn)
  local source = flow.CancellationTokenSource()
  return flow.with_cancellation(source.token, function()
    source:cancel()
    return strategy:execute(fn)
  end)
end

-- A time, and a later one, such that the sum of the first and of their difference is earlier than the second.
local AWAKE, DUE = 0.38055933644729018, 0.96438765326478759
assert(AWAKE + (DUE - AWAKE) < DUE)

-- A source of "random" numbers that gives those in the list, over and over.
local function random_from(list)
  local i = 0
  return function()
    i = i % #list + 1
    return list[i]
  end
end

local function in_order(events)
  table.sort(events, function(a, b) return a.at < b.at end)
  return events
end

describe("retry", function()
  it("makes three more attempts, two seconds apart, and lets the last error out as it is", in_task(function()
    local log, note = recorder()
    local errs = { {}, {}, {}, {} }
    local calls = 0
    local err = raised(function()
      resilience.retry():execute(function()
        calls = calls + 1
        note(calls, now())
        error(errs[calls])
      end)
    end)
    assert.equal(errs[4], err)
    assert.same({ "1 0.0", "2 2.0", "3 4.0", "4 6.0" }, log)
    assert.equal(6, now())
  end))

  it("returns all values of the first attempt that succeeds, and passes the arguments to each", in_task(function()
    local attempts = failing(2)
    local result = table.pack(resilience.retry {}:execute(function(...)
      local call = attempts()
      return call, nil, select("#", ...), (...)
    end, "a", nil))
    assert.same({ 3, nil, 2, "a", n = 4 }, result)
    assert.equal(4, now())
  end))

  it("counts the delays exactly", in_task(function()
    assert.same({ 0.5, 0.5, 0.5, 0.5 }, delays_of { delay = 0.5, max_retry_attempts = 4 })
    assert.same({ 1.5, 3, 4.5, 6 }, delays_of { delay = 1.5, backoff = "linear", max_retry_attempts = 4 })
    assert.same({ 1.5, 3, 6, 12, 24 }, delays_of { delay = 1.5, backoff = "exponential", max_retry_attempts = 5 })
    assert.equal(2 + 15 + 46.5, now())
  end))

  it("caps computed delays at max_delay", in_task(function()
    assert.same({ 1, 2, 3, 3 }, delays_of { delay = 1, backoff = "linear", max_delay = 3, max_retry_attempts = 4 })
    assert.same({ 1, 2, 2.5 }, delays_of { delay = 1, backoff = "exponential", max_delay = 2.5 })
    assert.same({ 0.5 }, delays_of { delay = 1, max_delay = 0.5, max_retry_attempts = 1 })
    assert.same({ 1, 1, 1 }, delays_of { delay = 1, use_jitter = true, random = random_from { 1 }, max_delay = 1 })
  end))

  it("keeps to max_delay where integers end", in_task(function()
    for _, delay in ipairs { 1e18, 1 << 60 } do
      assert.same({ 5, 5, 5, 5, 5, 5, 5, 5, 5, 5 },
        delays_of { delay = delay, backoff = "linear", max_delay = 5, max_retry_attempts = 10 })
    end
  end))

  it("keeps to max_delay where powers of two end", in_task(function()
    local n = helper.many(1200, 1100)
    for _, use_jitter in ipairs { false, true } do
      local delays = delays_of {
        delay = 1, backoff = "exponential", use_jitter = use_jitter, max_retry_attempts = n, max_delay = 8,
        random = function() return 0.5 end,
      }
      assert.equal(n, #delays)
      for i = 10, n do assert.equal(8, delays[i]) end
    end
    local longest
    local strategy = resilience.retry {
      backoff = "exponential", max_retry_attempts = n, use_jitter = true,
      on_retry = function(args) longest = args.delay end,
      delay_generator = function(args) if args.attempt_number < n - 1 then return 0 end end,
    }
    raises("Timeout", flow.with_timeout, 1e9, strategy.execute, strategy, fail)
    assert.equal(math.huge, longest)
  end))

  it("never delays with a base of 0, but lets others and deadlines have their turn", helper.in_order(function()
    local log, note = recorder()
    for _, backoff in ipairs { "constant", "linear", "exponential" } do
      assert.same({ 0, 0, 0 }, delays_of { delay = 0, backoff = backoff, use_jitter = true })
    end
    local n = helper.many(1200, 1100)
    local delays = delays_of { delay = 0, backoff = "exponential", max_retry_attempts = n }
    assert.equal(n, #delays)
    assert.equal(0, delays[n])
    local other = flow.spawn(note, "other")
    resilience.retry { delay = 0 }:execute(failing(3, note))
    assert.same({ "1 0.0", "other", "2 0.0", "3 0.0", "4 0.0" }, log)
    other:await()
    local for_ever = resilience.retry { delay = 0, max_retry_attempts = math.huge }
    local source = flow.CancellationTokenSource()
    flow.spawn(source.cancel, source)
    raises("OperationCanceled", flow.with_cancellation, source.token, for_ever.execute, for_ever, error)
    local plain = coroutine.wrap(function() -- where nothing can suspend it goes on
      return pcall(resilience.retry({ delay = 0 }).execute, resilience.retry { delay = 0 }, failing(9, note))
    end)
    assert.is_false((plain()))
  end))

  it("varies constant and linear delays by a quarter", in_task(function()
    local random = random_from { 0, 0.5, 1 }
    assert.same({ 3, 4, 5 }, delays_of { delay = 4, use_jitter = true, random = random })
    assert.same({ 3, 8, 15 }, delays_of { delay = 4, use_jitter = true, random = random, backoff = "linear" })
    for _, delay in ipairs(delays_of { delay = 4, use_jitter = true, max_retry_attempts = 50 }) do
      assert.is_true(delay >= 3 and delay <= 5)
    end
  end))

  it("spreads exponential delays along a curve", in_task(function()
    local function curve(t)
      local x = math.sqrt(4 * t)
      return 2 ^ t * (math.exp(x) - math.exp(-x)) / (math.exp(x) + math.exp(-x)) / 1.4
    end
    local random, list = support.random(7), {}
    for i = 1, 12 do list[i] = random(1000) / 1000 end
    local delays = delays_of {
      delay = 3, backoff = "exponential", use_jitter = true, max_retry_attempts = 12, random = random_from(list),
    }
    local sum, seen = 0, {}
    for i, delay in ipairs(delays) do
      assert.is_true(delay > 0)
      assert.is_nil(seen[delay])
      seen[delay] = true
      sum = sum + delay
      assert.is_true(math.abs(sum - 3 * curve(i - 1 + list[i])) < 1e-9 * sum)
    end
    assert.equal(12, #delays)
  end))

  it("has no exponential delay of 0, whatever the random numbers", in_task(function()
    for _, number in ipairs { 0, 1 } do
      local options = { delay = 1, backoff = "exponential", use_jitter = true, random = function() return number end }
      local delays = delays_of(options)
      assert.equal(3, #delays)
      for _, delay in ipairs(delays) do assert.is_true(delay > 0) end
    end
  end))

  it("takes its delays from a generator, uncapped, and its own where that gives none", in_task(function()
    local log, note = recorder()
    local given = { 10, -1, nil, 0, -math.huge, n = 5 }
    local problem = {}
    local delays = delays_of {
      delay = 1, backoff = "linear", max_delay = 4, max_retry_attempts = 5,
      delay_generator = function(args)
        note(args.attempt_number, args.error == problem)
        return given[args.attempt_number + 1]
      end,
    }
    assert.same({ 10, 2, 3, 0, 4 }, delays)
    assert.same({ "0 false", "1 false", "2 false", "3 false", "4 false" }, log)
    local strategy = resilience.retry { delay_generator = function() return "1" end }
    helper.is_error("InvalidOperation", raised(strategy.execute, strategy, fail), "delay_generator", "string")
    strategy = resilience.retry { delay_generator = function() return 0 / 0 end } -- once like a negative one
    helper.is_error("InvalidOperation", raised(strategy.execute, strategy, fail), "delay_generator", "NaN")
  end))

  it("refuses what a source of jitter must not give", in_task(function()
    local wrong = { ["a string"] = "1", ["-1"] = -1, ["1.5"] = 1.5, ["a table"] = {} }
    wrong[tostring(0 / 0)] = 0 / 0
    for _, backoff in ipairs { "constant", "exponential" } do
      for word, number in pairs(wrong) do
        local function random() return number end
        local strategy = resilience.retry { use_jitter = true, backoff = backoff, random = random }
        local err = raised(strategy.execute, strategy, fail)
        helper.is_error("InvalidOperation", err, "random must return a number from 0 to 1, not " .. word)
      end
    end
  end))

  it("tells on_retry before each delay, not after the last attempt", in_task(function()
    local log, note = recorder()
    local strategy = resilience.retry {
      delay = 1, max_retry_attempts = 2,
      on_retry = function(args)
        note("retry", args.attempt_number, args.delay, args.error, now())
        flow.sleep(0.5)
      end,
    }
    assert.equal("failure 3", raised(strategy.execute, strategy, failing(3, note)))
    assert.same({ "1 0.0", "retry 0 1 failure 1 0.0", "2 1.5", "retry 1 1 failure 2 1.5", "3 3.0" }, log)
  end))

  it("lets errors of the callbacks out", in_task(function()
    for _, name in ipairs { "on_retry", "should_handle", "delay_generator" } do
      local problem = {}
      local strategy = resilience.retry { [name] = function() error(problem) end }
      assert.equal(problem, raised(strategy.execute, strategy, fail))
    end
  end))

  it("retries only after what should_handle accepts", in_task(function()
    local strategy = resilience.retry { delay = 1, should_handle = function(err) return err ~= "failure 2" end }
    assert.equal("failure 2", raised(strategy.execute, strategy, failing(3)))
    assert.equal(1, now())
  end))

  it("retries after nil, and lets it out", in_task(function()
    local calls = 0
    local ok, err = pcall(resilience.retry().execute, resilience.retry(), function() calls = calls + 1 error(nil) end)
    assert.is_false(ok)
    assert.is_nil(err)
    assert.equal(4, calls)
  end))

  it("lets an OperationCanceled out, whatever should_handle says", in_task(function()
    local canceled = flow.errors.OperationCanceled("mine")
    local calls, asked = 0, 0
    local function fn() calls = calls + 1 error(canceled) end
    local strategy = resilience.retry()
    assert.equal(canceled, raised(strategy.execute, strategy, fn))
    assert.equal(1, calls)
    strategy = resilience.retry { should_handle = function() asked = asked + 1 return true end }
    assert.equal(canceled, raised(strategy.execute, strategy, fn))
    assert.same({ 2, 0 }, { calls, asked })
  end))

  it("retries after the Timeout of a strategy further in", in_task(function()
    local calls = 0
    local strategy = resilience.pipeline {
      resilience.retry { should_handle = function(err) return flow.errors.is(err, "Timeout") end },
      resilience.timeout { seconds = 1 },
    }
    raises("Timeout", strategy.execute, strategy, function() calls = calls + 1 flow.sleep(9) end)
    assert.equal(4, calls)
  end))

  it("is canceled at any time", in_task(function()
    local calls, retries = 0, 0
    local strategy = resilience.retry {
      should_handle = function() return true end, on_retry = function() retries = retries + 1 end,
    }
    local function fn()
      calls = calls + 1
      flow.sleep(1)
      error("failure", 0)
    end
    raises("OperationCanceled", execute_canceled, strategy, fn)
    assert.equal(0, calls)
    local counts = { [0.5] = { 1, 0 }, [1.5] = { 1, 1 }, [3.5] = { 2, 1 }, [4.5] = { 2, 2 }, [9.5] = { 4, 3 } }
    for at, expected in pairs(counts) do
      calls, retries = 0, 0
      local started = now()
      local source = flow.CancellationTokenSource(at)
      local err = raises("OperationCanceled", flow.with_cancellation, source.token, strategy.execute, strategy, fn)
      assert.is_true(err.token == source.token or err.cause == source.token)
      assert.equal(at, now() - started)
      assert.same(expected, { calls, retries })
    end
  end))

  it("looks at the token after on_retry, when an attempt has failed in spite of it", in_task(function()
    for _, delay in ipairs { 0, 1 } do
      local source, told, calls = flow.CancellationTokenSource(), 0, 0
      local strategy = resilience.retry { delay = delay, on_retry = function() told = told + 1 end }
      raises("OperationCanceled", flow.with_cancellation, source.token, strategy.execute, strategy, function()
        calls = calls + 1
        source:cancel()
        error("failure", 0)
      end)
      assert.equal(1, told)
      assert.equal(1, calls)
    end
    assert.equal(0, now())
  end))

  it("returns the values of an attempt that succeeds in spite of a cancellation", in_task(function()
    local source = flow.CancellationTokenSource()
    assert.equal(1, flow.with_cancellation(source.token, function()
      return resilience.retry():execute(function() source:cancel() return 1 end)
    end))
  end))

  it("goes on for ever when told to", in_task(function()
    local strategy = resilience.retry { max_retry_attempts = math.huge, delay = 1 }
    assert.equal(101, strategy:execute(failing(100)))
    assert.equal(100, now())
    assert.equal(1, resilience.retry { max_retry_attempts = 0 }:execute(failing(0)))
    assert.equal("failure 1", raised(function() resilience.retry { max_retry_attempts = 0 }:execute(failing(1)) end))
    assert.equal(100, now())
  end))

  it("keeps what an attempt does to async locals inside", in_task(function()
    local loc, seen = flow.AsyncLocal { default = 0 }, {}
    local strategy = resilience.retry { max_retry_attempts = 2, delay = 0, on_retry = function() loc.value = -1 end }
    pcall(strategy.execute, strategy, function()
      seen[#seen + 1] = loc.value
      loc.value = #seen
      error("failure", 0)
    end)
    assert.same({ 0, 0, 0 }, seen)
    assert.equal(0, loc.value)
  end))

  it("keeps the traceback of an error that it lets out", in_task(function()
    local function refuse() error("refused") end -- this line
    local here = helper.here(-1)
    for _, options in ipairs { { max_retry_attempts = 0 }, { should_handle = function() return false end } } do
      local task = resilience.retry(options):execute_async(function() refuse() end)
      assert.is_false(task:try_await())
      assert.is_truthy(task:traceback():find(here, 1, true))
    end
  end))
end)

describe("timeout", function()
  it("cancels a call when its time has passed", in_task(function()
    local log, note = recorder()
    local strategy = resilience.timeout { seconds = 2 }
    raises("Timeout", strategy.execute, strategy, function()
      local _ <close> = helper.closing(function(err) note(err.name, now()) end)
      flow.sleep(3)
    end)
    assert.same({ "OperationCanceled 2.0" }, log)
    assert.same({ 1, nil, 2, n = 3 }, table.pack(strategy:execute(function(...) return ... end, 1, nil, 2)))
  end))

  it("returns what a call returns that will not be stopped", in_task(function()
    assert.equal("late", resilience.timeout { seconds = 1 }:execute(function()
      pcall(flow.sleep, 2)
      return "late"
    end))
    assert.equal(1, now())
  end))

  it("knows no limit without seconds, and calls nothing with none", in_task(function()
    for _, options in ipairs { {}, { seconds = math.huge } } do
      assert.equal(1, resilience.timeout(options):execute(function() flow.sleep(1e6) return 1 end))
    end
    local called = false
    local strategy = resilience.timeout { seconds = 0 }
    raises("Timeout", strategy.execute, strategy, function() called = true end)
    assert.is_false(called)
  end))

  it("leaves an outer cancellation and other errors as they are", in_task(function()
    local strategy = resilience.timeout { seconds = 2 }
    local source = flow.CancellationTokenSource(1)
    raises("OperationCanceled", flow.with_cancellation, source.token, strategy.execute, strategy, flow.sleep, 9)
    assert.equal("other", raised(strategy.execute, strategy, fail, "other"))
    assert.equal(1, now())
  end))

  it("is a failure for the strategies around it", helper.in_order(function()
    local calls = 0
    local strategy = resilience.pipeline { resilience.retry { delay = 1 }, resilience.timeout { seconds = 2 } }
    assert.equal(3, strategy:execute(function()
      calls = calls + 1
      flow.sleep(4 - calls)
      return calls
    end))
    assert.equal(2 + 1 + 2 + 1 + 1, now())
  end))
end)

describe("circuit_breaker", function()
  -- Calls that end at once, one after the other: "+" succeeds, "-" fails.
  local function run(breaker, calls)
    for call in calls:gmatch(".") do
      pcall(breaker.execute, breaker, function() if call == "-" then error("bad", 0) end end)
    end
    return breaker.state
  end

  it("opens when enough calls have been made and enough of them failed", in_task(function()
    local function new() return resilience.circuit_breaker { minimum_throughput = 4 } end
    assert.equal("closed", run(new(), "---"))
    assert.equal("open", run(new(), "----"))
    assert.equal("open", run(new(), "++--"))
    assert.equal("closed", run(new(), "+++--"))
    assert.equal("open", run(new(), "+++---"))
    assert.equal("closed", run(new(), "--++")) -- only a failure opens it
    assert.equal("closed", run(resilience.circuit_breaker {}, "---------"))
    assert.equal("open", run(resilience.circuit_breaker {}, "----------"))
    assert.equal("open", run(resilience.circuit_breaker { failure_ratio = 0.3 }, "+++++++---"))
    assert.equal("closed", run(resilience.circuit_breaker { failure_ratio = 0.3 }, "++++++++---"))
  end))

  it("refuses calls while it is open, and says for how long", in_task(function()
    local breaker = resilience.circuit_breaker { minimum_throughput = 1 }
    local problem, called = {}, false
    assert.equal(problem, raised(breaker.execute, breaker, fail, problem))
    flow.sleep(1.5)
    local err = raises("BrokenCircuit", breaker.execute, breaker, function() called = true end)
    assert.equal(3.5, err.retry_after)
    assert.equal(problem, err.inner)
    assert.is_false(called)
    assert.equal("open", breaker.state)
    flow.sleep(3.5)
    assert.equal("half_open", breaker.state)
  end))

  it("lets somebody in who has slept for retry_after, to the last bit of the clock", in_task(function()
    local breaker = resilience.circuit_breaker { minimum_throughput = 1, break_duration = DUE }
    run(breaker, "-")
    flow.sleep(AWAKE)
    flow.sleep(raises("BrokenCircuit", breaker.execute, breaker, fail).retry_after)
    assert.is_true(now() < DUE)
    assert.equal("closed", run(breaker, "+"))
  end))

  it("lets one call try when the break is over: success closes it, with nothing counted", in_task(function()
    local breaker = resilience.circuit_breaker { minimum_throughput = 2, break_duration = 5 }
    run(breaker, "--")
    flow.sleep(5)
    local probe = breaker:execute_async(function() flow.sleep(2) return "up" end)
    assert.equal("half_open", breaker.state)
    flow.sleep(1)
    local err = raises("BrokenCircuit", breaker.execute, breaker, print)
    assert.equal(5, err.retry_after)
    assert.equal("up", probe:await())
    assert.equal("closed", breaker.state)
    assert.equal("closed", run(breaker, "-"))
    assert.equal("open", run(breaker, "-"))
  end))

  it("opens again when that call fails", in_task(function()
    local breaker = resilience.circuit_breaker { minimum_throughput = 2, break_duration = 5 }
    run(breaker, "--")
    flow.sleep(7)
    assert.equal("bad", raised(breaker.execute, breaker, function() flow.sleep(1) fail("bad") end))
    assert.equal("open", breaker.state)
    flow.sleep(4.75)
    assert.equal(0.25, raises("BrokenCircuit", breaker.execute, breaker, print).retry_after)
    flow.sleep(0.25)
    assert.equal("closed", run(breaker, "+"))
  end))

  it("forgets what is longer ago than the sampling duration", in_task(function()
    local breaker = resilience.circuit_breaker { minimum_throughput = 3, sampling_duration = 10 }
    run(breaker, "--")
    flow.sleep(10)
    assert.equal("closed", run(breaker, "--"))
    flow.sleep(8.5)
    assert.equal("open", run(breaker, "-"))
    breaker = resilience.circuit_breaker { minimum_throughput = 3, sampling_duration = 10 }
    for _ = 1, 40 do -- two in ten seconds, always
      assert.equal("closed", run(breaker, "-"))
      flow.sleep(5)
    end
    breaker = resilience.circuit_breaker { minimum_throughput = 12, sampling_duration = 10 }
    for _ = 1, 11 do
      assert.equal("closed", run(breaker, "-"))
      flow.sleep(0.9)
    end
    assert.equal("open", run(breaker, "-"))
    breaker = resilience.circuit_breaker { minimum_throughput = 3, sampling_duration = math.huge }
    run(breaker, "--")
    flow.sleep(1e9)
    assert.equal("open", run(breaker, "-"))
  end))

  it("has a state that cannot be assigned", in_task(function()
    local breaker = resilience.circuit_breaker { minimum_throughput = 2 }
    for _, state in ipairs { "closed", "open" } do
      local line = helper.here(1)
      local _, err = pcall(function() breaker.state = "isolated" end)
      local expected = line .. ": field 'state' of a coflow.resilience.circuit_breaker cannot be assigned"
      assert.truthy(err:find(expected, 1, true), err)
      assert.equal(state, breaker.state)
      run(breaker, "--")
    end
  end))

  it("counts errors that should_handle does not want as successes", in_task(function()
    local breaker = resilience.circuit_breaker {
      minimum_throughput = 2, should_handle = function(err) return err ~= "not found" end,
    }
    pcall(breaker.execute, breaker, fail, "not found")
    pcall(breaker.execute, breaker, fail, "not found")
    assert.equal("closed", breaker.state)
    assert.equal("open", run(breaker, "--"))
    flow.sleep(5)
    assert.equal("not found", raised(breaker.execute, breaker, fail, "not found"))
    assert.equal("closed", breaker.state)
  end))

  it("counts a failure with nil", in_task(function()
    local breaker = resilience.circuit_breaker { minimum_throughput = 1 }
    local ok, err = pcall(breaker.execute, breaker, error)
    assert.is_false(ok)
    assert.is_nil(err)
    assert.equal("open", breaker.state)
  end))

  it("counts nothing for a call that is canceled, and tries again after such a one", in_task(function()
    local breaker = resilience.circuit_breaker { minimum_throughput = 1, should_handle = function() return true end }
    raises("Timeout", flow.with_timeout, 1, breaker.execute, breaker, flow.sleep, 9)
    assert.equal("closed", breaker.state)
    run(breaker, "-")
    flow.sleep(5)
    raises("Timeout", flow.with_timeout, 1, breaker.execute, breaker, flow.sleep, 9)
    assert.equal("half_open", breaker.state)
    raises("OperationCanceled", execute_canceled, breaker, print)
    assert.equal("half_open", breaker.state)
    assert.equal("closed", run(breaker, "+"))
    for _, should_handle in ipairs { function() return true end, false } do
      breaker = resilience.circuit_breaker { minimum_throughput = 1, should_handle = should_handle or nil }
      pcall(breaker.execute, breaker, fail, flow.errors.OperationCanceled("mine"))
      assert.equal("closed", breaker.state)
      assert.equal("open", run(breaker, "-"))
      flow.sleep(5)
      pcall(breaker.execute, breaker, fail, flow.errors.OperationCanceled("mine"))
      assert.equal("half_open", breaker.state)
    end
  end))

  it("is not kept half open by a call that was abandoned", helper.in_order(function()
    local breaker = resilience.circuit_breaker { minimum_throughput = 1 }
    run(breaker, "-")
    flow.sleep(5)
    support.with_reports(function(reports)
      flow.spawn(function()
        breaker:execute(function() flow.await(flow.TaskCompletionSource().task) end)
      end)
      flow.yield()
      raises("BrokenCircuit", breaker.execute, breaker, print)
      helper.collect()
      assert.equal("TaskAbandoned", reports[1].err.name)
    end)
    assert.equal("half_open", breaker.state)
    assert.equal("closed", run(breaker, "+"))
  end))

  it("takes no account of calls that began before the break", in_task(function()
    local asked = 0
    local breaker = resilience.circuit_breaker {
      minimum_throughput = 2, break_duration = 5, should_handle = function() asked = asked + 1 return true end,
    }
    local good = breaker:execute_async(flow.sleep, 6)
    local bad = breaker:execute_async(function() flow.sleep(7) fail("late") end)
    run(breaker, "--")
    good:await()
    assert.equal("half_open", breaker.state)
    local probe = breaker:execute_async(flow.sleep, 2)
    assert.equal("late", raised(flow.await, bad))
    assert.equal("half_open", breaker.state)
    raises("BrokenCircuit", breaker.execute, breaker, print)
    probe:await()
    assert.equal("closed", breaker.state)
    assert.equal(2, asked)
  end))

  it("gives way when should_handle raises, and counts nothing", in_task(function()
    local problem, angry = {}, true
    local breaker = resilience.circuit_breaker {
      minimum_throughput = 1, should_handle = function() if angry then error(problem) end return true end,
    }
    assert.equal(problem, raised(breaker.execute, breaker, fail))
    assert.equal("closed", breaker.state)
    angry = false
    run(breaker, "-")
    flow.sleep(5)
    angry = true
    assert.equal(problem, raised(breaker.execute, breaker, fail))
    assert.equal("half_open", breaker.state)
    assert.equal("closed", run(breaker, "+"))
  end))

  it("waits for a should_handle that suspends, and is not confused by what happens meanwhile", in_task(function()
    local breaker = resilience.circuit_breaker {
      minimum_throughput = 1, should_handle = function(err) if err == "slow" then flow.sleep(10) end return true end,
    }
    local slow = breaker:execute_async(fail, "slow")
    breaker:reset()
    run(breaker, "-")
    flow.sleep(5)
    local probe = breaker:execute_async(flow.sleep, 10)
    assert.equal("slow", raised(flow.await, slow))
    assert.equal("half_open", breaker.state)
    raises("BrokenCircuit", breaker.execute, breaker, print)
    probe:await()
    assert.equal("closed", breaker.state)
  end))

  it("is held open by isolate, until reset", in_task(function()
    local breaker = resilience.circuit_breaker { minimum_throughput = 1 }
    local under_way = breaker:execute_async(flow.sleep, 1)
    breaker:isolate()
    assert.equal("isolated", breaker.state)
    under_way:await()
    flow.sleep(100)
    local err = raises("BrokenCircuit", breaker.execute, breaker, print)
    assert.is_nil(err.retry_after)
    breaker:reset()
    assert.equal("closed", breaker.state)
    run(breaker, "-")
    breaker:reset()
    assert.equal("closed", run(breaker, "+"))
    assert.has_error(function() breaker.reset({}) end)
    assert.has_error(function() breaker.isolate() end)
  end))
end)

-- What should happen to calls that come, stay, and lose patience at these times. `earliest(call)`: when the next one
-- may start, given those that did, of which `started(call, at)` is told. In a first-come, first-served line nobody's
-- fate depends on those behind, so it is found out one by one.
local function predict(calls, may_wait, earliest, started)
  local leaving, fates = {}, {} -- when each one left the line
  for i, call in ipairs(calls) do
    local waiting = 0
    for j = 1, i - 1 do
      if leaving[j] > call.at then waiting = waiting + 1 end
    end
    local at = math.max(call.at, earliest())
    leaving[i] = call.at
    if at > call.at and waiting >= may_wait then
      fates[i] = ("rejected %.6f"):format(call.at)
    elseif at > call.at + call.patience then
      leaving[i] = call.at + call.patience
      fates[i] = ("gave up %.6f"):format(leaving[i])
    else
      leaving[i] = at
      fates[i] = ("started %.6f"):format(at)
      started(call, at)
    end
  end
  return fates
end

-- What does happen.
local function observe(strategy, calls, rejection)
  local fates, tasks = {}, {}
  for i, call in ipairs(calls) do
    tasks[i] = flow.spawn(function()
      flow.sleep(call.at - now())
      local started = false
      local ok, err = pcall(flow.with_timeout, call.patience, strategy.execute, strategy, function()
        started = true
        fates[i] = ("started %.6f"):format(now())
        flow.shield(flow.sleep, call.stay)
      end)
      if started then return end
      assert(not ok)
      fates[i] = (flow.errors.is(err, rejection) and "rejected" or "gave up") .. (" %.6f"):format(now())
      if flow.errors.is(err, "Timeout") == flow.errors.is(err, rejection) then error(err, 0) end
    end)
  end
  flow.when_all(tasks):await()
  return fates
end

-- Calls at random times, no two events at the same.
local function random_calls(random, n, spread, patience)
  local calls = {}
  for i = 1, n do
    calls[i] = {
      at = random(math.floor(spread * 1024)) / 1024 + i / 2 ^ 20,
      patience = random(patience * 1024) / 1024 + i / 2 ^ 21 + 2 ^ -30,
      stay = random(2048) / 1024 + i / 2 ^ 22,
    }
  end
  return in_order(calls)
end

describe("bulkhead", function()
  it("lets so many run, so many wait, and refuses the rest", helper.in_order(function()
    local log, note = recorder()
    local bulkhead = resilience.bulkhead { max_concurrency = 2, max_queue = 2 }
    local tasks = {}
    for i = 1, 5 do
      tasks[i] = flow.spawn(function()
        local ok, err = pcall(bulkhead.execute, bulkhead, function()
          note(i, "starts", now())
          flow.sleep(1)
          return i
        end)
        if not ok then note(i, err.name, now()) end
      end)
    end
    flow.when_all(tasks):await()
    assert.same({
      "1 starts 0.0", "2 starts 0.0", "5 BulkheadRejected 0.0", "3 starts 1.0", "4 starts 1.0",
    }, log)
  end))

  it("queues nobody unless told to, and gives its place back after errors", in_task(function()
    local bulkhead = resilience.bulkhead { max_concurrency = 1 }
    local held = bulkhead:execute_async(flow.sleep, 1)
    raises("BulkheadRejected", bulkhead.execute, bulkhead, print)
    held:await()
    local problem = {}
    assert.equal(problem, raised(bulkhead.execute, bulkhead, fail, problem))
    raises("Timeout", flow.with_timeout, 1, bulkhead.execute, bulkhead, flow.sleep, 9)
    assert.same({ 1, nil, n = 2 }, table.pack(bulkhead:execute(function(...) return ... end, 1, nil)))
  end))

  it("lets nobody overtake", in_task(function()
    local log, note = recorder()
    local bulkhead = resilience.bulkhead { max_concurrency = 1, max_queue = math.huge }
    local first = bulkhead:execute_async(flow.sleep, 1)
    local second = flow.spawn(bulkhead.execute, bulkhead, note, "second")
    flow.yield()
    first:continue_with(function() bulkhead:execute(note, "newcomer") end):await()
    second:await()
    assert.same({ "second", "newcomer" }, log)
  end))

  it("passes a place on that was handed to somebody who is canceled at that moment", in_task(function()
    local log, note = recorder()
    local bulkhead = resilience.bulkhead { max_concurrency = 1, max_queue = 5 }
    local tasks = {}
    local first = flow.async(function()
      bulkhead:execute(flow.sleep, 1)
      note("the place is the second one's") -- which has not run since
      tasks[2]:cancel()
      tasks[3]:cancel()
    end)()
    for i = 2, 4 do tasks[i] = bulkhead:execute_async(note, i) end
    first:await()
    tasks[4]:await()
    raises("OperationCanceled", flow.await, tasks[2])
    raises("OperationCanceled", flow.await, tasks[3])
    bulkhead:execute(note, 5)
    assert.same({ "the place is the second one's", "4", "5" }, log)
  end))

  it("is left by waiters that are canceled, wherever they stand", in_task(function()
    for gone = 2, 5 do
      local log, note = recorder()
      local bulkhead = resilience.bulkhead { max_concurrency = 1, max_queue = 4 }
      local tasks = {}
      for i = 1, 5 do
        tasks[i] = bulkhead:execute_async(function() note(i) flow.sleep(1) end)
      end
      tasks[gone]:cancel()
      raises("OperationCanceled", flow.await, tasks[gone])
      tasks[6] = bulkhead:execute_async(note, 6) -- there is room again
      for i = 1, 6 do if i ~= gone then tasks[i]:await() end end
      local expected = { "1", "2", "3", "4", "5", "6" }
      table.remove(expected, gone)
      assert.same(expected, log)
    end
  end))

  it("starts nothing under a canceled token", in_task(function()
    local bulkhead, called = resilience.bulkhead { max_concurrency = 1 }, false
    raises("OperationCanceled", execute_canceled, bulkhead, function() called = true end)
    assert.is_false(called)
    bulkhead:execute(function() called = true end)
    assert.is_true(called)
  end))

  it("gets its places back from tasks that were abandoned", helper.in_order(function()
    local bulkhead = resilience.bulkhead { max_concurrency = 1, max_queue = 1 }
    support.with_reports(function(reports)
      flow.spawn(function()
        bulkhead:execute(function() flow.await(flow.TaskCompletionSource().task) end)
      end)
      flow.yield()
      local ran = false
      local waiting = bulkhead:execute_async(function() ran = true end)
      assert.is_false(ran)
      helper.collect()
      assert.equal("TaskAbandoned", reports[1].err.name)
      waiting:await()
      assert.is_true(ran)
    end)
  end))

  it("serves those who wait in order, whoever leaves", in_task(function()
    local random = support.random(11)
    local seen = {}
    for round = 1, helper.many(60, 4) do
      local places, may_wait = random(4), random(6) - 1
      local calls = random_calls(random, helper.many(40, 15), 12 / places, 3)
      local base = now()
      for _, call in ipairs(calls) do call.at = call.at + base end
      local free_at = {}
      for i = 1, places do free_at[i] = 0 end
      local expected = predict(calls, may_wait, function()
        table.sort(free_at)
        return free_at[1]
      end, function(call, at)
        free_at[1] = at + call.stay
      end)
      local strategy = resilience.bulkhead { max_concurrency = places, max_queue = may_wait }
      local fates = observe(strategy, calls, "BulkheadRejected")
      for _, fate in ipairs(fates) do seen[fate:match("^(.-) %S+$")] = true end
      assert.same(expected, fates, "round " .. round)
      base = now()
      for _ = 1, places do assert.equal(1, strategy:execute(function() return 1 end)) end
      assert.equal(base, now())
    end
    assert.same({ started = true, rejected = true, ["gave up"] = true }, seen)
  end))
end)

describe("rate_limiter", function()
  it("knows numbers whose product is no integer", in_task(function()
    local seconds = 1 << 61
    for _, kind in ipairs { "token_bucket", "sliding_window" } do
      local limiter = resilience.rate_limiter { permits = 3, per = seconds, kind = kind, queue_limit = 6 }
      local calls = {}
      for i = 1, 9 do calls[i] = limiter:execute_async(flow.loop.now) end
      local first = calls[3]:await()
      assert.equal(2.0 ^ 61, calls[6]:await() - first)
      assert.equal(2.0 ^ 62, calls[9]:await() - first)
    end
  end))

  -- The times at which n calls start that come together.
  local function starts(limiter, n)
    local times, tasks, base = {}, {}, now()
    for i = 1, n do
      tasks[i] = limiter:execute_async(function() times[i] = now() - base end)
    end
    flow.when_all(tasks):await()
    return times
  end

  it("gives permits out of a bucket that fills evenly", in_task(function()
    local limiter = resilience.rate_limiter { permits = 2, per = 1, queue_limit = 10 }
    assert.same({ 0, 0, 0.5, 1, 1.5, 2 }, starts(limiter, 6))
    flow.sleep(0.75) -- one and a half permits
    assert.same({ 0, 0.25, 0.75 }, starts(limiter, 3))
    flow.sleep(100) -- no more than two
    assert.same({ 0, 0, 0.5 }, starts(limiter, 3))
  end))

  it("gives permits out again `per` after each was taken, in a sliding window", in_task(function()
    local limiter = resilience.rate_limiter { permits = 2, per = 1, queue_limit = 10, kind = "sliding_window" }
    assert.same({ 0 }, starts(limiter, 1))
    flow.sleep(0.25)
    assert.same({ 0, 0.75, 1, 1.75, 2 }, starts(limiter, 5))
    flow.sleep(100)
    assert.same({ 0, 0, 1, 1, 2 }, starts(limiter, 5))
  end))

  it("does not sum up errors of rounding", in_task(function()
    local limiter = resilience.rate_limiter { permits = 10, per = 1, queue_limit = 200 }
    local times = starts(limiter, 110)
    for i = 10, 110 do assert.is_true(math.abs(times[i] - (i - 10) / 10) < 1e-12) end
  end))

  it("refuses when no permit is there and no more may wait, and says for how long", in_task(function()
    local calls = 0
    local function count() calls = calls + 1 end
    local limiter = resilience.rate_limiter { permits = 2, per = 1 }
    limiter:execute(count)
    limiter:execute(count)
    flow.sleep(0.125)
    assert.equal(0.375, raises("RateLimitRejected", limiter.execute, limiter, count).retry_after)
    flow.sleep(0.375)
    limiter:execute(count)
    assert.equal(0.5, raises("RateLimitRejected", limiter.execute, limiter, count).retry_after)
    assert.equal(3, calls)

    for kind, retry_after in pairs { token_bucket = 1.25, sliding_window = 1.75 } do
      limiter = resilience.rate_limiter { permits = 2, per = 1, queue_limit = 2, kind = kind }
      limiter:execute(count)
      limiter:execute(count)
      local waiting = limiter:execute_async(count)
      flow.sleep(0.25)
      local other = limiter:execute_async(count)
      assert.equal(retry_after, raises("RateLimitRejected", limiter.execute, limiter, count).retry_after)
      waiting:await()
      other:await()
    end
  end))

  for _, kind in ipairs { "token_bucket", "sliding_window" } do
    it("lets somebody in who has slept for retry_after, to the last bit of the clock: " .. kind, in_task(function()
      local limiter = resilience.rate_limiter { permits = 1, per = DUE, kind = kind }
      limiter:execute(function() end)
      flow.sleep(AWAKE)
      flow.sleep(raises("RateLimitRejected", limiter.execute, limiter, fail).retry_after)
      assert.is_true(now() < DUE)
      assert.equal(1, limiter:execute(function() return 1 end))
      raises("RateLimitRejected", limiter.execute, limiter, fail)
    end))
  end

  it("takes no permit for a call that is canceled while it waits", in_task(function()
    for _, kind in ipairs { "token_bucket", "sliding_window" } do
      for gone = 1, 3 do
        local limiter = resilience.rate_limiter { permits = 1, per = 1, queue_limit = 3, kind = kind }
        local log, note = recorder()
        local base = now()
        local tasks = {}
        limiter:execute(note, "first")
        for i = 1, 3 do
          tasks[i] = limiter:execute_async(function() note(i, now() - base) end)
        end
        raises("RateLimitRejected", limiter.execute, limiter, note)
        flow.sleep(0.5)
        tasks[gone]:cancel()
        raises("OperationCanceled", flow.await, tasks[gone])
        tasks[4] = limiter:execute_async(function() note(4, now() - base) end)
        for i = 1, 4 do if i ~= gone then tasks[i]:await() end end
        local expected, at = { "first" }, 0
        for i = 1, 4 do
          if i ~= gone then
            at = at + 1
            expected[#expected + 1] = ("%d %.1f"):format(i, at)
          end
        end
        assert.same(expected, log)
      end
    end
  end))

  it("passes on what is due to somebody who is canceled at that moment", helper.in_order(function()
    for order = 1, 2 do
      local log, note = recorder()
      local limiter = resilience.rate_limiter { permits = 1, per = 1, queue_limit = 3 }
      local base = now()
      local first, second, third
      local function cancel() first:cancel() end
      limiter:execute(note, "start")
      -- a timer due at the same instant, set before or after the waiter's own
      local canceling = order == 1 and flow.spawn(function() flow.sleep(1) cancel() end)
      flow.yield()
      first = limiter:execute_async(note, "first")
      canceling = canceling or flow.spawn(function() flow.sleep(1) cancel() end)
      second = limiter:execute_async(note, "second")
      third = limiter:execute_async(note, "third")
      canceling:await()
      second:await()
      third:await()
      local ok, err = first:try_await()
      if ok then
        assert.same({ "start", "first", "second", "third" }, log)
      else
        helper.is_error("OperationCanceled", err)
        assert.same({ "start", "second", "third" }, log)
      end
      assert.equal(ok and 3 or 2, now() - base)
      if order == 1 then assert.is_false(ok) end
    end
  end))

  it("lets nobody overtake", in_task(function()
    local log, note = recorder()
    local limiter = resilience.rate_limiter { permits = 1, per = 1, queue_limit = 5 }
    limiter:execute(note, "first")
    local newcomer = flow.spawn(function()
      flow.sleep(1) -- awake at the same instant as the waiter, before it
      limiter:execute(note, "newcomer")
    end)
    flow.yield()
    local waiter = limiter:execute_async(note, "waiter")
    newcomer:await()
    waiter:await()
    assert.same({ "first", "waiter", "newcomer" }, log)
    assert.equal(2, now())
  end))

  it("starts nothing under a canceled token, and takes no permit", in_task(function()
    local limiter = resilience.rate_limiter { permits = 1, per = 1 }
    raises("OperationCanceled", execute_canceled, limiter, fail)
    assert.equal(1, limiter:execute(function() return 1 end))
  end))

  it("serves those who wait in order, whoever leaves", in_task(function()
    local random = support.random(23)
    local seen = {}
    for round = 1, helper.many(60, 4) do
      local permits, may_wait = random(4), random(6) - 1
      local kind = round % 2 == 0 and "token_bucket" or "sliding_window"
      local per = permits * random(64) / 64
      local calls = random_calls(random, helper.many(40, 15), 25 * per / permits, 3)
      local base = now()
      for _, call in ipairs(calls) do call.at = call.at + base end
      local full_at, taken = 0, {} -- when the bucket will be full; when permits were taken
      local expected = predict(calls, may_wait, function()
        if kind == "token_bucket" then return full_at - (permits - 1) * per / permits end
        return taken[#taken - permits + 1] and taken[#taken - permits + 1] + per or 0
      end, function(_, at)
        full_at = math.max(full_at, at) + per / permits
        taken[#taken + 1] = at
      end)
      local strategy = resilience.rate_limiter { permits = permits, per = per, queue_limit = may_wait, kind = kind }
      local fates = observe(strategy, calls, "RateLimitRejected")
      for _, fate in ipairs(fates) do seen[fate:match("^(.-) %S+$")] = true end
      assert.same(expected, fates, "round " .. round)
    end
    assert.same({ started = true, rejected = true, ["gave up"] = true }, seen)
  end))
end)

describe("the line of bulkhead and rate_limiter", function()
  -- Everything happens at full seconds: coming, giving up, handing over, leaving. Whatever comes first then, nobody
  -- overtakes, and in the end nothing is lost.
  local function crowd(new, most)
    return function()
      testing.explore(function()
        local strategy, came, running, started = new(), 0, 0, {}
        local random, crowded = support.random(17), false
        local tasks = {}
        for i = 1, 30 do
          local at, patience, stay = random(10), random(6), random(3) - 1
          tasks[i] = flow.spawn(function()
            flow.sleep(at)
            came = came + 1
            local number = came
            pcall(flow.with_timeout, patience, strategy.execute, strategy, function()
              started[#started + 1] = number
              running = running + 1
              crowded = crowded or running > most
              local _ <close> = helper.closing(function() running = running - 1 end)
              flow.sleep(stay)
            end)
          end)
        end
        flow.await_all(tasks)
        assert.equal(0, running)
        assert.is_false(crowded)
        assert.is_true(#started >= 8)
        for i = 2, #started do assert.is_true(started[i - 1] < started[i], "somebody has overtaken") end
        flow.sleep(10)
        assert.equal(1, flow.with_timeout(0.1, strategy.execute, strategy, function() return 1 end))
      end, { runs = helper.many(100, 5) })
    end
  end

  it("holds under any order of events: bulkhead", crowd(function()
    return resilience.bulkhead { max_concurrency = 1, max_queue = 20 }
  end, 1))

  for _, kind in ipairs { "token_bucket", "sliding_window" } do
    it("holds under any order of events: " .. kind, crowd(function()
      return resilience.rate_limiter { permits = 2, per = 2, queue_limit = 20, kind = kind }
    end, math.huge))
  end
end)

describe("hedging", function()
  it("starts further attempts while there is no answer, and takes the first", helper.in_order(function()
    local log, note = recorder()
    local strategy = resilience.hedging { delay = 1, max_hedged_attempts = 2 }
    local calls = 0
    local result = table.pack(strategy:execute(function(...)
      calls = calls + 1
      local call = calls
      note("start", call, now())
      local _ <close> = helper.closing(function(err) note("end", call, now(), err and err.name) end)
      flow.sleep(({ 9, 9, 1.5 })[call])
      return call, nil, ...
    end, "a", nil))
    assert.same({ 3, nil, "a", nil, n = 4 }, result)
    assert.same({
      "start 1 0.0", "start 2 1.0", "start 3 2.0", "end 3 3.5 nil", "end 1 3.5 OperationCanceled",
      "end 2 3.5 OperationCanceled",
    }, log)
  end))

  it("asks once where the first answer is quick", in_task(function()
    local calls = 0
    assert.equal(1, resilience.hedging():execute(function() calls = calls + 1 flow.sleep(1.9) return calls end))
    assert.equal(1, calls)
    assert.equal(1.9, now())
    assert.equal(2, resilience.hedging():execute(function()
      calls = calls + 1
      flow.sleep(calls == 2 and 2.5 or 9)
      return calls - 1
    end))
  end))

  it("starts the next attempt at once when one has failed", in_task(function()
    local log, note = recorder()
    local strategy = resilience.hedging { delay = 10, max_hedged_attempts = 3 }
    local attempts = failing(3, note)
    assert.equal(4, strategy:execute(function() flow.sleep(1) return attempts() end))
    assert.same({ "1 1.0", "2 2.0", "3 3.0", "4 4.0" }, log)
    strategy = resilience.hedging { delay = math.huge, max_hedged_attempts = 1 }
    assert.equal(2, strategy:execute(failing(1)))
    assert.equal(5, strategy:execute(function() flow.sleep(1000) return 5 end))
  end))

  it("starts one attempt for each that has failed, also when these are several at once", in_task(function()
    local starts = {}
    local strategy = resilience.hedging { delay = 2, max_hedged_attempts = 4 }
    strategy:execute(function()
      starts[#starts + 1] = now()
      if #starts <= 2 then flow.sleep(3 - now()) fail() end
      flow.sleep(3)
    end)
    assert.same({ 0, 2, 3, 3, 5 }, starts)
  end))

  it("takes the first of two answers that come at the same time", helper.in_order(function()
    local calls = 0
    assert.equal(1, resilience.hedging { delay = 1 }:execute(function()
      calls = calls + 1
      local call = calls
      flow.sleep(3 - now())
      return call
    end))
    assert.equal(2, calls)
  end))

  it("counts the delay anew from each attempt", in_task(function()
    local starts = {}
    local strategy = resilience.hedging { delay = 2, max_hedged_attempts = 3 }
    strategy:execute(function()
      starts[#starts + 1] = now()
      if #starts == 1 then flow.sleep(1) fail("first") end
      flow.sleep(4.5)
    end)
    assert.same({ 0, 1, 3, 5 }, starts)
  end))

  it("lets the last error out, as it is, when all have failed", in_task(function()
    local errs = { {}, {}, {} }
    local strategy = resilience.hedging { delay = 1, max_hedged_attempts = 2 }
    local calls = 0
    support.with_reports(function(reports)
      assert.equal(errs[2], raised(strategy.execute, strategy, function()
        calls = calls + 1
        local call = calls
        flow.sleep(({ 4, 4.5, 1 })[call])
        error(errs[call])
      end))
      helper.collect()
      assert.same({}, reports)
    end)
    assert.equal(5.5, now())
    local ok, err = pcall(strategy.execute, strategy, error)
    assert.is_false(ok)
    assert.is_nil(err)
  end))

  it("starts all at once with a delay of 0", in_task(function()
    local starts = {}
    assert.equal(3, resilience.hedging { delay = 0, max_hedged_attempts = 4 }:execute(function()
      starts[#starts + 1] = now()
      local call = #starts
      flow.sleep(call == 3 and 1 or 2)
      return call
    end))
    assert.same({ 0, 0, 0, 0, 0 }, starts)
  end))

  it("does not begin an attempt that comes too late", in_task(function()
    local calls = 0
    local strategy = resilience.hedging { delay = 0, max_hedged_attempts = 1 }
    assert.equal(1, strategy:execute(function() calls = calls + 1 return calls end))
    assert.equal(1, calls)
  end))

  it("ends with an error that should_handle does not want", in_task(function()
    local ended = 0
    local strategy = resilience.hedging {
      delay = 1, max_hedged_attempts = 5, should_handle = function(err) return err ~= "final" end,
    }
    local calls = 0
    assert.equal("final", raised(strategy.execute, strategy, function()
      calls = calls + 1
      local _ <close> = helper.closing(function() ended = ended + 1 end)
      if calls == 2 then flow.sleep(0.5) error("final", 0) end
      flow.sleep(9)
    end))
    assert.equal(2, calls)
    assert.equal(2, ended)
    assert.equal(1.5, now())
    local canceled = flow.errors.OperationCanceled("mine")
    for _, should_handle in ipairs { function() return true end, false } do
      strategy = resilience.hedging { delay = 1, should_handle = should_handle or nil }
      calls = 0
      assert.equal(canceled, raised(strategy.execute, strategy, function() calls = calls + 1 error(canceled) end))
      assert.equal(1, calls)
    end
    assert.equal(1.5, now())
  end))

  it("waits for the end of the losers, whose errors are theirs", in_task(function()
    local calls = 0
    local strategy = resilience.hedging { delay = 1 }
    support.with_reports(function(reports)
      assert.same({ 2, nil, n = 2 }, table.pack(strategy:execute(function()
        calls = calls + 1
        if calls == 2 then return 2, nil end
        local _ <close> = helper.closing(function()
          flow.shield(flow.sleep, 3)
          error("in clean-up", 0)
        end)
        flow.sleep(9)
      end)))
      assert.equal(4, now())
      helper.collect()
      assert.same({}, reports)
    end)
  end))

  it("returns the winner's values though it is canceled while it waits for the losers", in_task(function()
    local calls = 0
    local strategy = resilience.hedging { delay = 1 }
    assert.equal(2, flow.with_timeout(2, strategy.execute, strategy, function()
      calls = calls + 1
      if calls == 2 then return 2 end
      local _ <close> = helper.closing(function() flow.shield(flow.sleep, 3) end)
      flow.sleep(9)
    end))
    assert.equal(4, now())
  end))

  it("cancels all attempts when it is canceled, and waits for them", helper.in_order(function()
    local log, note = recorder()
    local strategy = resilience.hedging { delay = 1, max_hedged_attempts = 5 }
    local calls = 0
    raises("Timeout", flow.with_timeout, 1.5, strategy.execute, strategy, function()
      calls = calls + 1
      local call = calls
      local _ <close> = helper.closing(function(err)
        flow.shield(flow.sleep, 1)
        note(call, err.name, now())
      end)
      flow.sleep(9)
    end)
    assert.same({ "1 OperationCanceled 2.5", "2 OperationCanceled 2.5" }, log)
    assert.equal(2.5, now())
    raises("OperationCanceled", execute_canceled, strategy, fail)
  end))

  -- The end of its own wait beats a token, so that it took no notice of the token, and span for ever.
  it("ends when it is canceled in the turn in which an attempt fails", in_task(function()
    for turns = 0, 3 do
      local gate, calls = flow.TaskCompletionSource(), 0
      local strategy = resilience.hedging { delay = math.huge }
      local task = strategy:execute_async(function()
        calls = calls + 1
        if calls == 1 then gate.task:await() end
        flow.sleep(100)
      end)
      flow.sleep(1)
      gate:set_exception("failed")
      for _ = 1, turns do flow.yield() end
      task:cancel()
      raises("OperationCanceled", flow.await, task)
    end
    assert.equal(4, now())
  end))

  it("ends when it is canceled in the turn in which its delay has passed", in_task(function()
    for turns = 0, 3 do
      local strategy = resilience.hedging { delay = 1 }
      local task = strategy:execute_async(flow.sleep, 100)
      flow.sleep(1)
      for _ = 1, turns do flow.yield() end
      task:cancel()
      raises("OperationCanceled", flow.await, task)
    end
    assert.equal(4, now())
  end))

  it("ends when its own should_handle cancels it", in_task(function()
    local task
    local strategy = resilience.hedging {
      delay = math.huge,
      should_handle = function()
        task:cancel()
        return true
      end,
    }
    task = strategy:execute_async(function()
      flow.yield()
      error("failed", 0)
    end)
    raises("OperationCanceled", flow.await, task)
  end))

  it("takes the largest of integers for the number of attempts", in_task(function()
    local strategy = resilience.hedging { delay = math.huge, max_hedged_attempts = math.maxinteger }
    assert.equal("called", strategy:execute(function() return "called" end))
  end))

  it("runs each attempt in the caller's context, and keeps its changes apart", in_task(function()
    local loc, seen = flow.AsyncLocal(), {}
    loc.value = "caller"
    resilience.hedging { delay = 1 }:execute(function()
      seen[#seen + 1] = loc.value
      loc.value = "attempt"
      flow.sleep(5)
    end)
    assert.same({ "caller", "caller" }, seen)
    assert.equal("caller", loc.value)
  end))

  it("gives its attempts names", in_task(function()
    local names = {}
    resilience.hedging { delay = 1 }:execute(function()
      names[#names + 1] = flow.current_task().name
      flow.sleep(2)
    end)
    assert.same({ "hedged attempt 1", "hedged attempt 2" }, names)
  end))

  it("reports errors of the losers' cancellation callbacks", in_task(function()
    local calls = 0
    support.with_reports(function(reports)
      assert.equal(2, resilience.hedging { delay = 1 }:execute(function()
        calls = calls + 1
        if calls == 2 then return 2 end
        local _ <close> = flow.cancellation_token():register(fail, "in a callback")
        flow.sleep(9)
      end))
      assert.equal(1, #reports)
    end)
  end))

  it("leaves nothing running where nothing can wait", in_task(function()
    local calls = 0
    local strategy = resilience.hedging()
    local ok, err = pcall(table.sort, { 2, 1 }, function()
      strategy:execute(function() calls = calls + 1 end)
    end)
    assert.is_false(ok)
    helper.is_error("InvalidOperation", err)
    flow.sleep(10)
    assert.equal(0, calls)
  end))
end)

describe("fallback", function()
  it("replaces a call that has failed", in_task(function()
    local problem, seen = {}, nil
    local strategy = resilience.fallback {
      action = function(err)
        seen = err
        flow.sleep(1)
        return "other", nil
      end,
    }
    assert.same({ "other", nil, n = 2 }, table.pack(strategy:execute(fail, problem)))
    assert.equal(problem, seen)
    assert.equal(1, now())
    assert.same({ nil, "good", n = 2 }, table.pack(strategy:execute(function(...) return ... end, nil, "good")))
    assert.equal(1, now())
  end))

  it("lets out what should_handle does not want, and what the action raises", in_task(function()
    local calls = 0
    local strategy = resilience.fallback {
      action = function(err) calls = calls + 1 error(err, 0) end,
      should_handle = function(err) return err == "mine" end,
    }
    assert.equal("other", raised(strategy.execute, strategy, fail, "other"))
    assert.equal(0, calls)
    assert.equal("mine", raised(strategy.execute, strategy, fail, "mine"))
    assert.equal(1, calls)
  end))

  it("does not replace a cancellation", in_task(function()
    local function one() return 1 end
    local strategy = resilience.fallback { action = one, should_handle = one }
    raises("Timeout", flow.with_timeout, 1, strategy.execute, strategy, flow.sleep, 9)
    raises("OperationCanceled", execute_canceled, strategy, print)
    local canceled = flow.errors.OperationCanceled("mine")
    assert.equal(canceled, raised(strategy.execute, strategy, fail, canceled))
    strategy = resilience.fallback { action = one }
    assert.equal(canceled, raised(strategy.execute, strategy, fail, canceled))
  end))

  it("shows the action none of the async locals that the call has set", in_task(function()
    local loc, seen = flow.AsyncLocal { default = "outside" }, nil
    resilience.fallback { action = function() seen = loc.value loc.value = 2 end }:execute(function()
      loc.value = "inside"
      fail()
    end)
    assert.equal("outside", seen)
    assert.equal("outside", loc.value)
  end))
end)

describe("pipeline", function()
  local function noting(note, name)
    return {
      execute = function(self, fn, ...)
        assert(self.name == name)
        note(name, "in", ...)
        return (function(...) note(name, "out", ...) return ... end)(fn(...))
      end,
      name = name,
    }
  end

  it("puts strategies into each other, outermost first, and takes any object with execute", in_task(function()
    local log, note = recorder()
    local object = setmetatable({}, { __index = noting(note, "b") })
    local strategy = resilience.pipeline { noting(note, "a"), object, resilience.retry() }
    assert.same({ 1, nil, n = 2 }, table.pack(strategy:execute(function(...) note("fn") return ... end, 1, nil)))
    local _ = log
    assert.same({ "a in", "b in", "fn", "b out 1 nil", "a out 1 nil" }, {
      log[1]:sub(1, 4), log[2]:sub(1, 4), log[3], log[4], log[5],
    })
  end))

  it("is a strategy itself, and calls the function where there are none", in_task(function()
    local inner = resilience.pipeline { resilience.retry { delay = 1 } }
    local outer = resilience.pipeline { resilience.fallback { action = function(err) return err end }, inner }
    assert.equal("failure 4", outer:execute(failing(4)))
    assert.equal(3, now())
    assert.same({ nil, 2, n = 2 }, table.pack(resilience.pipeline {}:execute(function(...) return ... end, nil, 2)))
  end))

  it("is as it was when it was made", in_task(function()
    local list = { resilience.retry { delay = 0 } }
    local strategy = resilience.pipeline(list)
    list[1], list[2] = resilience.fallback { action = fail }, 5
    assert.equal(2, strategy:execute(failing(1)))
  end))

  it("makes retry count what the strategies inside refuse", in_task(function()
    local breaker = resilience.circuit_breaker { minimum_throughput = 1, break_duration = 3 }
    local strategy = resilience.pipeline {
      resilience.retry {
        delay_generator = function(args) return type(args.error) == "table" and args.error.retry_after end,
      },
      breaker,
    }
    assert.equal(2, strategy:execute(failing(1)))
    assert.equal(3, now()) -- failed, waited two seconds, was refused, waited one, succeeded
    local limited = resilience.pipeline {
      resilience.retry { delay = 0, max_retry_attempts = 4 },
      resilience.rate_limiter { permits = 1, per = 1, queue_limit = 1 },
    }
    assert.equal(5, limited:execute(failing(4)))
    assert.equal(7, now())
  end))

  it("holds a place of an inner bulkhead only while an attempt runs, of an outer one all the time", in_task(function()
    local function others(first, second)
      local strategy = resilience.pipeline { first, second }
      local running = strategy:execute_async(failing(1))
      local ok = pcall(strategy.execute, strategy, function() end)
      running:await()
      return ok
    end
    assert.is_true(others(resilience.retry(), resilience.bulkhead { max_concurrency = 1 }))
    assert.is_false(others(resilience.bulkhead { max_concurrency = 1 }, resilience.retry()))
  end))

  it("ends a whole pipeline at an outer timeout, wherever it is", in_task(function()
    local limiter = resilience.rate_limiter { permits = 1, per = 10, queue_limit = 5 }
    local bulkhead = resilience.bulkhead { max_concurrency = 1, max_queue = 5 }
    local strategy = resilience.pipeline {
      resilience.timeout { seconds = 4 }, resilience.retry { delay = 1 }, limiter, bulkhead, resilience.hedging(),
    }
    raises("Timeout", strategy.execute, strategy, fail)
    assert.equal(4, now())
    local held = bulkhead:execute_async(flow.sleep, 100)
    flow.sleep(20)
    raises("Timeout", strategy.execute, strategy, fail)
    held:await()
    assert.equal(1, bulkhead:execute(function() return 1 end))
  end))

  it("is canceled at every point without losing a place or a permit", in_task(function()
    local limiter = resilience.rate_limiter { permits = 1, per = 1, queue_limit = 100, kind = "sliding_window" }
    local bulkhead = resilience.bulkhead { max_concurrency = 1, max_queue = 100 }
    local breaker = resilience.circuit_breaker { minimum_throughput = 1000 }
    local running, most = 0, 0
    local strategy = resilience.pipeline {
      resilience.retry { delay = 0.5 }, breaker, limiter, bulkhead, resilience.hedging { delay = 0.25 },
      resilience.timeout { seconds = 0.75 },
    }
    local tasks = {}
    for i = 1, 200 do
      tasks[i] = flow.spawn(function()
        flow.sleep(i / 7)
        pcall(flow.with_timeout, i % 23 / 8 + 0.01, strategy.execute, strategy, function()
          running = running + 1
          most = math.max(most, running)
          local _ <close> = helper.closing(function() running = running - 1 end)
          flow.sleep(i % 11 / 10)
          if i % 3 == 0 then error("failure", 0) end
        end)
      end)
    end
    flow.when_all(tasks):await()
    assert.equal(0, running)
    assert.equal(2, most) -- in the one place, two by hedging
    flow.sleep(1)
    local base = now()
    assert.equal(1, strategy:execute(function() return 1 end))
    assert.equal(base, now())
    raises("Timeout", flow.with_timeout, 0.5, limiter.execute, limiter, print)
  end))

  it("may be a hundred strategies deep", in_task(function()
    local strategy = resilience.retry { delay = 1, max_retry_attempts = 1 }
    for i = 1, 100 do
      strategy = resilience.pipeline {
        i % 2 == 0 and resilience.bulkhead { max_concurrency = 1 } or resilience.timeout { seconds = 10 }, strategy,
      }
    end
    assert.equal(2, strategy:execute(failing(1)))
  end))
end)

describe("a strategy", function()
  local function all()
    return {
      resilience.retry { delay = 0 }, resilience.timeout { seconds = 9 }, resilience.circuit_breaker {},
      resilience.bulkhead { max_concurrency = 2 }, resilience.rate_limiter { permits = 1000, per = 1 },
      resilience.hedging {}, resilience.fallback { action = fail }, resilience.pipeline {},
    }
  end

  it("gives all values, and errors of any kind, as they are", in_task(function()
    for _, strategy in ipairs(all()) do
      assert.same({ 1, nil, "x", nil, n = 4 }, table.pack(strategy:execute(helper.slowly, 1, nil, "x", nil)))
      local task = strategy:execute_async(helper.slowly, 1, nil)
      assert.same({ 1, nil, n = 2 }, table.pack(task:await()))
      for _, problem in ipairs { "text", {}, 5, flow.errors.InvalidOperation("no") } do
        local ok, err = pcall(strategy.execute, strategy, function() flow.yield() error(problem, 0) end)
        assert.is_false(ok)
        assert.equal(problem, err)
      end
    end
  end))

  it("takes any callable value", in_task(function()
    local callable = setmetatable({}, { __call = function(_, ...) return ... end })
    for _, strategy in ipairs(all()) do assert.equal(3, strategy:execute(callable, 3)) end
  end))

  it("calls nothing under a canceled token", in_task(function()
    for _, strategy in ipairs(all()) do
      raises("OperationCanceled", execute_canceled, strategy, fail)
      local task = flow.with_cancellation(flow.CancellationTokenSource().token, function()
        local started = strategy:execute_async(flow.sleep, 100)
        started:cancel("enough")
        return started
      end)
      raises("OperationCanceled", flow.await, task)
      assert.equal(0, now())
    end
  end))

  it("keeps the changes of async locals inside", in_task(function()
    local loc = flow.AsyncLocal { default = 0 }
    for _, strategy in ipairs(all()) do
      strategy:execute(function() loc.value = 1 end)
      assert.equal(0, loc.value)
    end
  end))

  it("drives the loop outside every task", function()
    for _, strategy in ipairs(all()) do
      assert.same({ 1, nil, n = 2 }, table.pack(strategy:execute(helper.slowly, 1, nil)))
      assert.equal(1, strategy:execute_async(helper.slowly, 1):await())
      assert.is_false(pcall(strategy.execute, strategy, fail))
    end
  end)

  it("is garbage when nobody has it any more", in_task(function()
    local weak, strategies = setmetatable({}, { __mode = "v" }), all()
    for i, strategy in ipairs(strategies) do
      strategy:execute(helper.slowly)
      pcall(flow.with_timeout, 1, strategy.execute, strategy, flow.sleep, 2)
      weak[i] = strategy
    end
    assert.equal(8, #strategies)
    strategies = nil -- luacheck: ignore
    helper.collect()
    assert.is_nil(next(weak))
  end))

  it("leaves nobody in line where nothing can wait", in_task(function()
    for _, strategy in ipairs {
      resilience.bulkhead { max_concurrency = 1, max_queue = 1 },
      resilience.rate_limiter { permits = 1, per = 1, queue_limit = 1 },
    } do
      local held = strategy:execute_async(flow.sleep, 1)
      local ok, err = pcall(table.sort, { 2, 1 }, function() return strategy:execute(fail) end)
      assert.is_false(ok)
      helper.is_error("InvalidOperation", err)
      assert.equal(1, strategy:execute(function() return 1 end)) -- waits in line, where there is room for one
      held:await()
    end
  end))

  it("refuses bad options, by name", in_task(function()
    local function option(name, options, word)
      local err = raised(function()
        local new = resilience[name]
        new(options)
      end)
      assert.is_truthy(err:find("resilience_spec.lua:%d+: bad argument #1 to 'new' %("), err)
      assert.is_truthy(err:find(word, 1, true), err)
    end
    local nan = 0 / 0
    local seconds = { -1, nan, "1", {}, false }
    local bad = {
      retry = {
        max_retry_attempts = { -1, 1.5, nan, "3" }, delay = { -1, nan, math.huge, "2" }, max_delay = seconds,
        backoff = { "Linear", 1, "" }, use_jitter = { 1, "yes" }, delay_generator = { 1, {} }, should_handle = { 1 },
        on_retry = { "print" }, random = { 0.5 },
      },
      timeout = { seconds = seconds },
      circuit_breaker = {
        failure_ratio = { -0.1, 1.1, nan, "1" }, sampling_duration = { 0, -1, nan, "1" },
        minimum_throughput = { 0, 1.5, "1" }, break_duration = { -1, nan }, should_handle = { 1 },
      },
      bulkhead = { max_concurrency = { 0, 1.5, nan, "1", false }, max_queue = { -1, 0.5, "1" } },
      rate_limiter = {
        permits = { 0, 1.5, math.huge, "1" }, per = { 0, -1, nan, math.huge, "1" }, queue_limit = { -1, 0.5 },
        kind = { "bucket", 1 },
      },
      hedging = { delay = seconds, max_hedged_attempts = { -1, 0.5, math.huge, "1" }, should_handle = { 1 } },
      fallback = { action = { 1, "x", false }, should_handle = { 1 } },
    }
    local good = {
      bulkhead = { max_concurrency = 1 }, rate_limiter = { permits = 1, per = 1 }, fallback = { action = print },
    }
    for name, options in pairs(bad) do
      for key, values in pairs(options) do
        for _, value in ipairs(values) do
          local given = { [key] = value }
          for other, other_value in pairs(good[name] or {}) do
            if given[other] == nil then given[other] = other_value end
          end
          option(name, given, key .. " must be ")
        end
      end
      option(name, { nonsense = 1 }, "unknown option 'nonsense'")
      option(name, { 1 }, "unknown option '1'")
      option(name, "text", "table of options expected")
    end
    option("bulkhead", nil, "max_concurrency must be")
    option("rate_limiter", { permits = 1 }, "per must be")
    option("rate_limiter", { per = 1 }, "permits must be")
    option("fallback", {}, "action must be")
    assert.is_table(resilience.bulkhead { max_concurrency = 2.0 })
  end))

  it("refuses what is no strategy in a pipeline", in_task(function()
    local function refused(strategies, word)
      support.bad_argument(1, "pipeline", function()
        local _ = resilience.pipeline(strategies)
      end, word)
    end
    refused(nil, "list of strategies expected, got no value")
    refused("x", "list of strategies expected")
    for _, strategy in ipairs(all()) do
      refused(strategy, "list of strategies expected, got a strategy: pipeline { outermost, …, innermost }")
    end
    refused({ resilience.retry(), 5 }, "element 2 is no strategy (a number value")
    refused({ "text" }, "element 1 is no strategy")
    refused({ { execute = 1 } }, "element 1")
    refused({ io.stdout }, "element 1")
    refused({ setmetatable({}, { __index = fail }) }, "element 1")
    refused({ retry = resilience.retry() }, "not at 'retry'")
    refused({ [3] = resilience.retry() }, "not at '3'")
  end))

  it("refuses what is no function, and another self", in_task(function()
    for _, strategy in ipairs(all()) do
      support.bad_argument(1, "execute", function() strategy:execute() end, "function expected")
      support.bad_argument(1, "execute", function() strategy:execute(5) end, "function expected")
      assert.is_false(pcall(strategy.execute, {}, print))
      assert.is_false(pcall(strategy.execute))
      support.bad_argument(1, "execute_async", function() strategy:execute_async(5) end, "function expected")
    end
    local err = raised(function() resilience.retry().execute(resilience.bulkhead { max_concurrency = 1 }, print) end)
    assert.is_truthy(err:find("bad argument #1 to 'execute' (coflow.resilience.retry expected, got "
      .. "coflow.resilience.bulkhead: use ':' to call a method)", 1, true))
  end))
end)
