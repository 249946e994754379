-- coflow.testing: virtual time, seeds, what a test leaves behind, fake clocks, and busted's `it`.

local flow = require "coflow"
local testing = require "coflow.testing"
local helper = require "spec.helper"

local recorder, raised, is_error, closing = helper.recorder, helper.raised, helper.is_error, helper.closing
local raises = helper.raises

-- What fn(...) writes to io.stderr, and how it ends: text, ok, values.
local function with_stderr(fn, ...)
  local real, text = io.stderr, {}
  rawset(io, "stderr", { write = function(_, ...) text[#text + 1] = table.concat({ ... }) end })
  local outcome = table.pack(pcall(fn, ...))
  rawset(io, "stderr", real)
  return table.concat(text), table.unpack(outcome, 1, outcome.n)
end

local function refuses(word, fn, ...)
  local err = raised(fn, ...)
  assert.equal("string", type(err))
  assert.truthy(err:find("bad argument", 1, true), err)
  assert.truthy(err:find(word, 1, true), err)
end

local function nothing() end

-- This spec says itself which seeds it wants.
local getenv = os.getenv
setup(function()
  rawset(os, "getenv", function(name) return name ~= "COFLOW_SEED" and getenv(name) or nil end)
end)
teardown(function() rawset(os, "getenv", getenv) end)

describe("testing.run", function()
  it("gives fn a clock, starts it at 0 or start_time, and returns what fn returns", function()
    assert.same({ 0, nil, "b", n = 3 }, table.pack(testing.run(function(clock) return clock:now(), nil, "b" end)))
    assert.equal(50, testing.run(function(clock) return clock:now() end, { start_time = 50 }))
    assert.equal(1.5e9 + 0.25, testing.run(function(clock)
      flow.sleep(0.25)
      return clock:now()
    end, { start_time = 1.5e9 }))
  end)

  it("jumps to the next deadline, exactly, once nothing is ready", function()
    local log, note = recorder()
    testing.run(function(clock)
      local tasks = {}
      for _, seconds in ipairs { 86400, 0.125, 3600 } do
        tasks[#tasks + 1] = flow.spawn(function()
          flow.sleep(seconds)
          for _ = 1, 300 do flow.yield() end -- more than a slice of ready tasks
          note(clock:now() == seconds)
        end)
      end
      flow.await_all(tasks)
    end)
    assert.same({ "true", "true", "true" }, log)
  end)

  it("raises the very value that fn raises, and a deadlock", function()
    local value = {}
    assert.equal(value, raised(testing.run, function() error(value) end))
    assert.is_nil((raised(testing.run, function() error(nil) end, { seed = false })))
    is_error("InvalidOperation",
      raised(testing.run, function() flow.await(flow.TaskCompletionSource().task) end), "deadlock")
    is_error("InvalidOperation", raised(testing.run, function() flow.loop.stop() flow.yield() end), "stopped")
  end)

  it("puts real time back, however it ends", function()
    local before = flow.loop.now()
    testing.run(nothing, { start_time = 1e15 })
    pcall(testing.run, error, { start_time = 1e15 })
    pcall(testing.run, function() flow.await(flow.TaskCompletionSource().task) end, { start_time = 1e15 })
    local now = flow.loop.now()
    assert.is_true(now >= before and now < before + 1e6)
  end)

  it("refuses options that make no sense, and then runs nothing", function()
    local function never() error("it ran") end
    refuses("'sed'", testing.run, never, { sed = 1 })
    refuses("seed", testing.run, never, { seed = 1.5 })
    refuses("seed", testing.run, never, { seed = "1" })
    refuses("start_time", testing.run, never, { start_time = -1 })
    refuses("start_time", testing.run, never, { start_time = 0 / 0 })
    refuses("start_time", testing.run, never, { start_time = math.huge })
    refuses("start_time", testing.run, never, { start_time = "0" })
    refuses("autojump_threshold", testing.run, never, { autojump_threshold = -1 })
    refuses("autojump_threshold", testing.run, never, { autojump_threshold = true })
    refuses("time_provider", testing.run, never, { time_provider = {} })
    refuses("start_time", testing.run, never, { time_provider = testing.FakeTimeProvider(), start_time = 1 })
    refuses("function", testing.run, nil)
    refuses("table", testing.run, never, 1)
    assert.equal(0, testing.run(function(clock) return clock:now() end))
  end)

  it("is refused inside a task and inside a callback, and leaves the outer clock alone", function()
    testing.run(function(clock)
      flow.sleep(1)
      is_error("InvalidOperation", raised(testing.run, nothing), "inside a task")
      local source <close> = flow.CancellationTokenSource()
      local err
      source.token:register(function() err = raised(testing.run, nothing, { start_time = 9 }) end)
      source:cancel_after(1)
      flow.sleep(2)
      is_error("InvalidOperation", err)
      assert.equal(3, clock:now())
      assert.equal("task", (flow.spawn(function() return "task" end):await()))
    end)
  end)

  it("keeps the time that deadlines from before have left, and gives it back", function()
    local task = flow.delay(1000)
    local source <close> = flow.CancellationTokenSource(5000)
    testing.run(function(clock)
      flow.sleep(999)
      assert.is_false(task.is_completed)
      flow.sleep(2)
      assert.is_true(task.is_completed)
      assert.equal(1001, clock:now())
    end)
    assert.is_false(source.is_cancellation_requested)
    local left = flow.loop.timeout()
    assert.is_true(left > 3990 and left < 4000, left)
  end)

  it("keeps the time that Timers, PeriodicTimers and scopes from before have left, and gives it back", function()
    local periodic, count = flow.PeriodicTimer(1000), 0
    local timer = flow.Timer(function() count = count + 1 end, 1000, 1000)
    local tick, left = flow.spawn(periodic.wait_for_next_tick, periodic), nil
    local gates = { flow.TaskCompletionSource(), flow.TaskCompletionSource() }
    local limited = flow.spawn(flow.with_timeout, 5000, function()
      for _, gate in ipairs(gates) do
        gate.task:await()
        left = flow.deadline()
      end
    end)
    testing.run(function(clock)
      flow.sleep(999)
      assert.equal(0, count)
      assert.is_false(tick.is_completed)
      flow.sleep(2)
      assert.equal(1, count)
      assert.is_true(tick.result)
      flow.sleep(1000)
      assert.equal(2, count)
      gates[1]:set_result()
      flow.sleep(0.5)
      assert.is_true(left > 2990 and left <= 2999, left)
      assert.is_true(periodic:wait_for_next_tick())
      assert.equal(2001.5, clock:now()) -- it was pending
    end)
    gates[2]:set_result()
    limited:await()
    assert.is_true(left > 2990 and left <= 2998.5, left)
    timer:dispose()
    tick = periodic:wait_for_next_tick_async()
    left = flow.loop.timeout()
    assert.is_true(left > 990 and left <= 998.5, left)
    periodic:dispose()
    assert.is_false(tick.result)
    assert.is_false(flow.loop.is_alive())
  end)

  it("settles what is ready without letting time pass", function()
    testing.run(function(clock)
      local log, note = recorder()
      local task = flow.spawn(function()
        for i = 1, 3 do
          flow.yield()
          note(i)
        end
        flow.sleep(1)
        note("slept")
      end)
      clock:settle()
      assert.same({ "1", "2", "3" }, log)
      assert.equal(0, clock:now())
      task:await()
    end)
  end)

  it("lets several settle: one at a time, the last one first, and each after all others", function()
    local log, note = recorder()
    testing.run(function(clock)
      local tasks = {}
      for i = 1, 2 do
        tasks[i] = flow.spawn(function()
          clock:settle()
          note("settled", i)
          for _ = 1, 3 do flow.yield() end
          note("went on", i)
        end)
      end
      flow.await_all(tasks)
    end, { seed = false })
    assert.same({ "settled 2", "went on 2", "settled 1", "went on 1" }, log)
  end)
end)

describe("what a test leaves behind", function()
  local line, kept

  -- what is left, the words that the message must have
  local cases = {
    ["a sleeping task"] = { function()
      line = helper.here(1)
      kept = flow.spawn(function() flow.sleep(10) end)
      kept.name = "sleeper"
    end, "task 'sleeper' sleeps" },
    ["a task that waits for another one"] = { function()
      local source = flow.TaskCompletionSource()
      source.task.name = "the gate"
      line = helper.here(1)
      kept = flow.spawn(function() flow.await(source.task) end)
    end, "waits for 'the gate'" },
    ["a task that waits for ever"] = { function()
      line = helper.here(1)
      kept = flow.spawn(flow.sleep, math.huge)
    end, "waits for ever" },
    ["a task started hot"] = { function()
      local hot = flow.async(function() flow.sleep(1) end)
      line = helper.here(1)
      kept = hot()
    end, "sleeps" },
    ["a task of Task.new that was started"] = { function()
      line = helper.here(1)
      kept = flow.Task.new(function() flow.sleep(1) end)
      kept:start()
    end, "sleeps" },
    ["a task that is ready for ever"] = { function()
      line = helper.here(1)
      kept = flow.spawn(function() while true do flow.yield() end end)
    end, "is ready" },
    ["a continuation that was started"] = { function()
      line = helper.here(1)
      kept = flow.Task.completed_task:continue_with(function() flow.sleep(1) end)
    end, "sleeps" },
    ["a task made by one that is gone"] = { function()
      flow.await(flow.spawn(function()
        line = helper.here(1)
        kept = flow.spawn(function() flow.sleep(1) end)
      end))
    end, "sleeps" },
    ["a delay"] = { function()
      line = helper.here(1)
      kept = flow.delay(10)
    end, "timer 'delay', due in 10.0 s" },
    ["the timeout of a wait"] = { function()
      line = helper.here(1)
      kept = flow.TaskCompletionSource().task:wait_async(10)
    end, "timer 'wait_async', due in 10.0 s" },
    ["the deadline of a source"] = { function()
      line = helper.here(1)
      kept = flow.CancellationTokenSource(10)
    end, "timer 'cancel_after', due in 10.0 s" },
    ["a Timer"] = { function()
      line = helper.here(1)
      kept = flow.Timer(nothing, 10)
    end, "a Timer, due in 10.0 s" },
    ["a Timer with a period"] = { function()
      line = helper.here(1)
      kept = flow.Timer(nothing, 0, 4)
      flow.sleep(1)
    end, "a Timer, due in 3.0 s" },
    ["a task that a Timer has started"] = { function()
      line = helper.here(1)
      kept = flow.Timer(function() flow.sleep(10) end, 1)
      flow.sleep(2)
    end, "sleeps" },
    ["a wait for the tick of a PeriodicTimer"] = { function()
      local timer = flow.PeriodicTimer(10)
      line = helper.here(1)
      kept = timer:wait_for_next_tick_async()
    end, "timer 'wait_for_next_tick', due in 10.0 s", 2 },
  }

  for _, use in ipairs { function() end, function(timer) timer:wait_for_next_tick() end } do
    it("fails it: a PeriodicTimer that is not disposed of", function()
      is_error("InvalidOperation", raised(testing.run, function()
        line = helper.here(1)
        kept = flow.PeriodicTimer(10)
        use(kept)
      end), "an open coflow.PeriodicTimer", "made at ", line)
      assert.is_false(kept:wait_for_next_tick()) -- it is now
      kept = nil
      testing.run(function()
        local timer <close> = flow.PeriodicTimer(10)
        use(timer)
      end)
      for _, collect in ipairs { nothing, helper.collect } do -- nobody can dispose of that one
        is_error("InvalidOperation", raised(testing.run, function()
          line = helper.here(1)
          use(flow.PeriodicTimer(10))
          collect()
        end), "an open coflow.PeriodicTimer", "made at ", line)
      end
    end)
  end

  it("fails it: what a task of the library has started, which says where that was made", function()
    local err = is_error("InvalidOperation", raised(testing.run, function()
      kept = flow.Host()
      kept:add { start = function() end, execute = function() flow.sleep(100) end }
      line = helper.here(1)
      kept:start()
    end), "left something behind", "sleeps at ", "made at ", line)
    assert.is_nil(err.message:find("lua/coflow/", 1, true), err.message)
    err = is_error("InvalidOperation", raised(testing.run, function()
      kept = flow.net.listen("127.0.0.1", 0)
      line = helper.here(1)
      kept = { kept, kept:serve_async(function() end, nil, flow.CancellationTokenSource().token) }
      flow.yield()
    end), "task 'coflow.net' waits for coflow.Listener, made at ", line)
    assert.is_nil(err.message:find("lua/coflow/", 1, true), err.message)
    kept = nil
  end)

  it("fails it: an open file", function()
    local path = os.tmpname()
    local opened_at
    local err = raised(testing.run, function()
      flow.yield()
      opened_at = helper.here(1)
      kept = flow.fs.open(path)
    end)
    is_error("InvalidOperation", err, "an open coflow.File", path, opened_at)
    assert.is_true(kept.is_closed)
    kept = nil
    testing.run(function() flow.fs.open(path):close() end)
    is_error("InvalidOperation", raised(testing.run, function() flow.fs.open(path) end),
      "a coflow.File '" .. path .. "' that was open when it was collected")
    testing.run(nothing)
    os.remove(path)
  end)

  for when, collect in pairs {
    ["before it ends"] = "collectgarbage() collectgarbage() flow.yield()", afterwards = "",
  } do
    -- once the collector decided: a task that it found during the test was reported only, and the test passed
    it("fails it: a task that nothing could ever wake, told once, though it is collected " .. when, function()
      local output = helper.child(([[
        local flow = require "coflow"
        print(pcall(require("coflow.testing").run, function()
          flow.spawn(function()
            local _ <close> = setmetatable({}, { __close = function() print("closed") end })
            flow.await(flow.TaskCompletionSource().task)
          end)
          flow.yield()
          %s
        end))
      ]]):format(collect))
      local out = output.out:gsub("closed\n", "", 1)
      assert.matches("^false\tInvalidOperation: the test has left something behind:\n"
        .. "\ttask '[^\n]*lua:3'[^\n]* at [^\n]*lua:5, made at [^\n]*lua:3\n$", out)
    end)
  end

  it("is told to the handler of unobserved exceptions instead, if there is one: a task that is collected", function()
    local reports = helper.reports()
    testing.run(function()
      flow.spawn(function() flow.await(flow.TaskCompletionSource().task) end)
      flow.yield()
      helper.collect()
    end)
    flow.on_unobserved_exception(nil)
    assert.equal(1, #reports)
    is_error("TaskAbandoned", reports[1].err)
  end)

  for what, case in pairs(cases) do
    it("fails it: " .. what .. ", and is gone before the next test", function()
      local err = is_error("InvalidOperation", raised(testing.run, case[1]), "left something behind", case[2],
        "made at ", line)
      local _, lines = err.message:gsub("\n", "")
      assert.equal(case[3] or 1, lines, err.message)
      assert.is_false(flow.loop.is_alive())
      if kept.status then
        assert.is_true(kept.is_completed)
        assert.is_true(flow.errors.is(raised(flow.await, kept), kept.is_canceled and "OperationCanceled"
          or "TaskAbandoned"))
      elseif kept.change then
        assert.is_true(kept:change(20)) -- still of use
        assert.is_true(flow.loop.is_alive())
        kept:dispose()
      else
        assert.is_false(kept.is_cancellation_requested)
        kept:cancel_after(20) -- still of use
        assert.is_true(flow.loop.is_alive())
        kept:dispose()
      end
      kept = nil
      testing.run(function() flow.sleep(100) end)
    end)
  end

  it("is named thing by thing, but not more than a screen of them", function()
    local err = raised(testing.run, function()
      for i = 1, 40 do flow.spawn(flow.sleep, i) end
    end)
    is_error("InvalidOperation", err, "and 10 more")
    local _, lines = err.message:gsub("\n", "")
    assert.equal(31, lines)
    assert.is_false(flow.loop.is_alive())
  end)

  it("is not what is ready when fn returns, nor what that does while no time passes", function()
    local log, note = recorder()
    testing.run(function()
      flow.spawn(function()
        for _ = 1, 1000 do flow.yield() end
        flow.await(flow.spawn(note, "inner"))
        note("outer")
      end)
      local source = flow.CancellationTokenSource()
      source.token:register(note, "canceled")
      source:cancel_after(0)
    end)
    table.sort(log)
    assert.same({ "canceled", "inner", "outer" }, log)
  end)

  it("is not what was there before, nor what was never started", function()
    local gate = flow.TaskCompletionSource()
    local before, cold = flow.spawn(function() return flow.await(gate.task) end), nil
    local timer = flow.delay(1e6)
    testing.run(function()
      flow.yield()
      cold = flow.Task.new(nothing)
      gate.task:continue_with(nothing)
    end)
    assert.equal("created", cold.status)
    assert.is_false(before.is_completed)
    assert.is_false(timer.is_completed)
    gate:set_result("kept")
    assert.equal("kept", before:await())
    testing.run(function() flow.sleep(1e6) end)
    assert.is_true(timer.is_completed)
  end)

  it("gives way to the error of fn, and is gone all the same", function()
    local value, closed = {}, false
    assert.equal(value, raised(testing.run, function()
      flow.spawn(function()
        local _ <close> = closing(function() closed = true end)
        flow.sleep(10)
      end)
      flow.yield()
      flow.yield()
      error(value)
    end, { seed = false }))
    assert.is_true(closed)
    assert.is_false(flow.loop.is_alive())
  end)

  it("is the task of fn too after a deadlock", function()
    local closed
    is_error("InvalidOperation", raised(testing.run, function()
      local _ <close> = closing(function() closed = true end)
      flow.await(flow.TaskCompletionSource().task)
    end), "deadlock")
    assert.is_true(closed)
  end)

  it("runs its <close> variables, and what these leave is gone as well", function()
    local log, note = recorder()
    local function leave(depth)
      flow.spawn(function()
        local _ <close> = closing(function()
          note(depth)
          if depth < 5 then leave(depth + 1) end
        end)
        flow.sleep(1)
      end)
    end
    is_error("InvalidOperation", raised(testing.run, function() leave(1) end), "sleeps")
    assert.same({ "1", "2", "3", "4", "5" }, log)
    assert.is_false(flow.loop.is_alive())
  end)

  it("reports nothing as unobserved: it has been told", function()
    local output = helper.child([[
      local flow = require "coflow"
      local testing = require "coflow.testing"
      print(pcall(testing.run, function()
        local tasks = {}
        for i = 1, 3 do tasks[i] = flow.spawn(flow.sleep, i) end
        flow.when_all(tasks)
        flow.spawn(function() flow.await(tasks[1]) end)
      end, { seed = false }))
      collectgarbage()
      collectgarbage()
    ]])
    assert.equal("", output.err)
    assert.equal(0, output.code)
    assert.truthy(output.out:find("left something behind", 1, true), output.out)
  end)

  it("is found again and again, and costs no memory once it is gone", function()
    local function leave()
      pcall(testing.run, function()
        for i = 1, 20 do flow.spawn(flow.sleep, i) end
        kept = flow.delay(5)
      end)
    end
    for _ = 1, 10 do leave() end
    collectgarbage()
    collectgarbage()
    local before = collectgarbage("count")
    for _ = 1, helper.many(100, 10) do leave() end
    kept = nil
    collectgarbage()
    collectgarbage()
    assert.is_true(collectgarbage("count") - before < 20)
  end)

  it("is all that is inside of scopes, whose deadlines go with it", function()
    local err = is_error("InvalidOperation", raised(testing.run, function()
      kept = flow.spawn(function()
        flow.with_timeout(50, function()
          flow.task_group(function(group)
            group:spawn(function() flow.sleep(10) end)
            group:spawn(function() flow.shield(function() flow.sleep(20) end) end)
            group:spawn(function() flow.await(flow.TaskCompletionSource().task) end)
          end)
        end)
      end)
      flow.sleep(1)
    end), "sleeps", "waits for 'promise'")
    local _, lines = err.message:gsub("\n", "")
    assert.equal(4, lines, err.message)
    assert.is_true(kept.is_faulted)
    assert.is_false(flow.loop.is_alive())
    kept = nil
  end)

  it("ends the waits of tasks from before with TaskAbandoned", function()
    local inner
    local gate = flow.TaskCompletionSource()
    local before = flow.spawn(function()
      flow.await(gate.task)
      return raised(flow.await, inner)
    end)
    is_error("InvalidOperation", raised(testing.run, function()
      inner = flow.spawn(flow.sleep, 5)
      gate:set_result()
    end))
    is_error("TaskAbandoned", before:await())
  end)
end)

describe("a seed", function()
  -- the order in which n tasks run that take turns, as a string
  local function course(seed, n, turns)
    local log, note = recorder()
    testing.run(function()
      local tasks = {}
      for i = 1, n or 5 do
        tasks[i] = flow.spawn(function()
          for turn = 1, turns or 3 do
            note(i, turn)
            if i % 2 == 0 then flow.yield() else flow.sleep(turn) end
          end
        end)
      end
      flow.await_all(tasks)
    end, { seed = seed })
    return table.concat(log, ", ")
  end

  it("gives the same course every time, also in another process", function()
    for seed = 1, 10 do assert.equal(course(seed), course(seed)) end
    for _, seed in ipairs { 0, -1, math.maxinteger, math.mininteger, 7.0 } do
      assert.equal(course(seed), course(seed))
    end
    local script = [[
      local flow = require "coflow"
      local testing = require "coflow.testing"
      for i = 1, tonumber(os.getenv("EXTRA") or 0) do _G["x" .. i] = {} end
      testing.run(function()
        local tasks = {}
        for i = 1, 20 do
          tasks[i] = flow.spawn(function()
            flow.sleep(i % 3)
            io.write(i, " ")
          end)
        end
        flow.await_all(tasks)
      end, { seed = 3 })
    ]]
    assert.equal(helper.output(script), helper.output("collectgarbage('generational') local t = {}\n"
      .. "for i = 1, 1e4 do t[i] = {} end math.randomseed(5)\n" .. script))
  end)

  it("is heeded by nothing that user code may seed", function()
    math.randomseed(1)
    local first = course(5)
    math.randomseed(2)
    assert.equal(first, course(5))
  end)

  it("gives every order of a few tasks, as often as any other", function()
    local counts, kinds = {}, 0
    for seed = 1, helper.many(1200, 600) do
      local order = course(seed, 3, 1):gsub(" 1", "")
      if not counts[order] then counts[order], kinds = 0, kinds + 1 end
      counts[order] = counts[order] + 1
    end
    assert.equal(6, kinds)
    for order, count in pairs(counts) do
      assert.is_true(count > helper.many(1200, 600) / 12, order .. " came up only " .. count .. " times")
    end
  end)

  it("is FIFO without one, as in production, and with false", function()
    local expected = "1 1, 2 1, 3 1, 4 1, 5 1, 2 2, 4 2, 2 3, 4 3, 1 2, 3 2, 5 2, 1 3, 3 3, 5 3"
    assert.equal(expected, course(false))
    assert.equal(expected, course(nil))
  end)

  it("lets nobody starve", function()
    for seed = 1, 5 do
      local runs, patient = 0, nil
      testing.run(function()
        local done = false
        local function busy()
          while not done do
            runs = runs + 1
            flow.yield()
          end
        end
        local tasks = {}
        for i = 1, 100 do tasks[i] = flow.spawn(busy) end
        flow.spawn(function() patient = runs end)
        for i = 101, 200 do tasks[i] = flow.spawn(busy) end
        while not patient do flow.yield() end
        done = true
        flow.await_all(tasks)
      end, { seed = seed })
      assert.is_true(patient < 200 * 300)
    end
  end)

  it("does not take the square of the number of ready tasks", function()
    local n, sum = helper.many(100000, 2000), 0
    testing.run(function()
      for i = 1, n do flow.spawn(function() sum = sum + i end) end
      flow.yield()
    end, { seed = 1 })
    assert.equal(n * (n + 1) // 2, sum)
  end)

  it("shuffles deadlines that are equal, and no others", function()
    local orders = {}
    for seed = 1, 40 do
      local log, note = recorder()
      testing.run(function()
        local sources = {}
        for i = 1, 3 do
          sources[i] = flow.CancellationTokenSource(i == 3 and 2 or 1)
          sources[i].token:register(note, i)
        end
        flow.sleep(3)
      end, { seed = seed })
      orders[table.concat(log, " ")] = true
    end
    assert.same({ ["1 2 3"] = true, ["2 1 3"] = true }, orders)
  end)

  it("does not let a task overtake what it awaits, or a later deadline an earlier one", function()
    testing.explore(function(clock)
      local log, note = recorder()
      local tasks = {}
      for i = 1, 5 do
        tasks[i] = flow.spawn(function()
          if i > 1 then flow.await(tasks[i - 1]) end
          note(i)
          flow.sleep((6 - i) / 10)
          note("slept", i, clock:now() >= (6 - i) / 10)
        end)
      end
      flow.await_all(tasks)
      assert.same({ "1", "slept 1 true", "2", "slept 2 true", "3", "slept 3 true", "4", "slept 4 true",
        "5", "slept 5 true" }, log)
    end, { runs = 30 })
  end)

  it("is told when the test fails: on standard error; an error of the test stays as it is", function()
    local text, ok, err = with_stderr(testing.run, function() error("boom", 0) end, { seed = 42 })
    assert.is_false(ok)
    assert.equal("boom", err)
    assert.truthy(text:find("seed 42", 1, true), text)
    local value = flow.errors.IO("gone")
    text, ok, err = with_stderr(testing.run, function() error(value) end, { seed = 43 })
    assert.same({ false, true }, { ok, rawequal(value, err) })
    assert.equal("gone", err.message)
    assert.truthy(text:find("seed = 43", 1, true), text)
    text, ok, err = with_stderr(testing.run, function() flow.delay(1) end, { seed = 44 })
    assert.is_false(ok)
    is_error("InvalidOperation", err, "left something behind", "seed 44")
    assert.truthy(text:find("seed = 44", 1, true), text)
    for seed, clock in pairs { [45] = false, [-46] = testing.FakeTimeProvider() } do -- which had no seed in it
      text, ok, err = with_stderr(testing.run, function()
        flow.await(flow.TaskCompletionSource().task)
      end, { seed = seed, time_provider = clock or nil })
      assert.is_false(ok)
      is_error("InvalidOperation", err, "deadlock: ", ("\n\t(seed %d)"):format(seed))
      assert.truthy(text:find("seed = " .. seed, 1, true), text)
    end
    err = raised(testing.run, function() flow.await(flow.TaskCompletionSource().task) end, { seed = false })
    assert.is_nil(is_error("InvalidOperation", err, "deadlock: ").message:find("seed", 1, true))
    assert.equal("", (with_stderr(testing.run, function() error("boom") end, { seed = false })))
    assert.equal("", (with_stderr(testing.run, nothing, { seed = 1 })))
  end)

  it("comes from COFLOW_SEED, if there is none and not false", function()
    local script = [[
      local flow = require "coflow"
      local testing = require "coflow.testing"
      local function course(seed)
        local log = {}
        local ok, err = pcall(testing.run, function()
          for i = 1, 9 do flow.spawn(function() log[#log + 1] = i end) end
          flow.sleep(1)
        end, { seed = seed })
        if not ok then log[1] = tostring(err) end
        return table.concat(log, " ")
      end
      print(course(nil) == course(12), course(false) == "1 2 3 4 5 6 7 8 9", course(nil) == course(13))
      print(course(nil))
      local seeds = {}
      pcall(testing.explore, function(clock) seeds[#seeds + 1] = clock.seed end, { runs = 2 })
      print(table.concat(seeds, " "))
    ]]
    local path = os.tmpname()
    local file <close> = assert(io.open(path, "w"))
    file:write(script)
    file:flush()
    local function lines(seed)
      local pipe <close> = io.popen(("COFLOW_SEED=%s %s %s"):format(seed, os.getenv("LUA") or "lua5.4", path))
      return pipe:read("l"), pipe:read("l"), pipe:read("l")
    end
    local same, _, seeds = lines("12")
    assert.equal("true\ttrue\tfalse", same)
    assert.equal("12 13", seeds)
    local _, fifo, none = lines("''")
    assert.equal("1 2 3 4 5 6 7 8 9", fifo)
    assert.equal("1 2", none)
    local _, message = lines("often")
    assert.truthy(message:find("COFLOW_SEED", 1, true), message)
    os.remove(path)
  end)
end)

describe("a seed", function()
  it("is that of math.random, too, which has other numbers again behind the test", function()
    local function draw() return math.random(1 << 30), math.random(1 << 30) end
    local first = { testing.run(draw, { seed = 5 }) }
    local between = draw()
    assert.same(first, { testing.run(draw, { seed = 5 }) })
    assert.not_equal(between, draw())
    assert.not_same(first, { testing.run(draw, { seed = 6 }) })
    local delays = {}
    for i = 1, 2 do
      testing.run(function(clock)
        assert.equal(7, clock.seed)
        local retry = flow.resilience.retry { delay = 1, backoff = "exponential", use_jitter = true }
        pcall(retry.execute, retry, error, "no")
        delays[i] = clock:now()
      end, { seed = 7 })
    end
    assert.equal(delays[1], delays[2])
    testing.run(function(clock) assert.is_nil(clock.seed) end, { seed = false })
  end)

  it("is told with the name of the test that busted knows", function()
    local test
    rawset(_G, "it", function(_, fn) test = fn end)
    testing.it("deposits", { seed = 9 }, function() error("no", 0) end)
    rawset(_G, "it", nil)
    local text, ok = with_stderr(test)
    assert.is_false(ok)
    assert.truthy(text:find("coflow.testing: 'deposits' failed under seed 9; ", 1, true), text)
  end)
end)

describe("testing.explore", function()
  it("runs fn under that many seeds, 100 by default", function()
    local count, orders = 0, {}
    local function fn(clock)
      assert.equal(0, clock:now())
      count = count + 1
      local log, note = recorder()
      for i = 1, 3 do flow.spawn(note, i) end
      flow.sleep(1)
      orders[table.concat(log)] = true
    end
    testing.explore(fn)
    assert.equal(100, count)
    testing.explore(fn, { runs = 7 })
    assert.equal(107, count)
    local kinds = 0
    for _ in pairs(orders) do kinds = kinds + 1 end
    assert.equal(6, kinds)
  end)

  -- A lost update: wrong in most orders, right in that of production.
  local function race()
    local balance = 0
    local function deposit(n)
      local before = balance
      if n == 1 then flow.yield() end
      balance = before + n
    end
    local a = flow.spawn(deposit, 2)
    local b = flow.spawn(deposit, 1)
    flow.await_all(a, b)
    if balance ~= 3 then error("balance " .. balance, 0) end
  end

  it("finds what one order in some shows, ends there, and tells the seed that shows it again", function()
    testing.run(race, { seed = false })
    local runs = 0
    local text, ok, err = with_stderr(testing.explore, function()
      runs = runs + 1
      race()
    end, { seed = 1 })
    assert.is_false(ok)
    local seed = tonumber(text:match("seed = (%d+)"))
    assert.equal(runs, seed)
    assert.is_true(runs < 100)
    assert.truthy(err:find("^balance %d$"), err)
    local _, _, again = with_stderr(testing.run, race, { seed = seed })
    assert.equal(err, again)
  end)

  it("takes the other options, and refuses what makes no sense", function()
    local starts, seeds = {}, 0
    testing.explore(function(clock) starts[#starts + 1] = clock:now() end, { runs = 2, start_time = 5 })
    assert.same({ 5, 5 }, starts)
    local text, _, err = with_stderr(testing.explore, function()
      seeds = seeds + 1
      if seeds == 3 then error("third", 0) end
    end, { seed = 1000 })
    assert.equal("third", err)
    assert.truthy(text:find("seed = 1002", 1, true), text)
    local runs = 0
    text = with_stderr(testing.explore, function()
      runs = runs + 1
      if runs == 2 then error("second", 0) end
    end, { seed = math.maxinteger, runs = 2 })
    assert.equal(2, runs)
    assert.truthy(text:find("seed = " .. math.mininteger, 1, true), text)
    refuses("'run'", testing.explore, nothing, { run = 1 })
    refuses("runs", testing.explore, nothing, { runs = 0 })
    refuses("runs", testing.explore, nothing, { runs = 1.5 })
    refuses("seed", testing.explore, nothing, { seed = 0.5 })
    refuses("'time_provider'", testing.explore, nothing, { time_provider = testing.FakeTimeProvider() })
    refuses("function", testing.explore, 1)
  end)
end)

describe("a coroutine of Lua's own that dies in testing.run", function()
  it("leaves no virtual time behind", function()
    local co = coroutine.create(function() testing.run(error, { seed = false }) end)
    assert.is_false((coroutine.resume(co)))
    assert.equal(0, testing.run(function(clock) return clock:now() end))
    assert.equal("dead", coroutine.status(co))
  end)
end)

describe("a FakeTimeProvider", function()
  -- fn(p, note) under the fake clock, which starts at 0; returns what was noted.
  local function fake(fn, seed)
    local log, note = recorder()
    local p = testing.FakeTimeProvider()
    testing.run(function(clock)
      assert.equal(p, clock)
      fn(p, note)
    end, { time_provider = p, seed = seed })
    return log
  end

  it("starts at 0 or start_time, and keeps its time between runs", function()
    assert.equal(0, testing.FakeTimeProvider():now())
    local p = testing.FakeTimeProvider { start_time = 2.5 }
    for i = 1, 2 do
      testing.run(function()
        assert.equal(p:now(), flow.loop.now())
        p:advance(10)
      end, { time_provider = p })
      assert.equal(2.5 + 10 * i, p:now())
    end
    refuses("start_time", testing.FakeTimeProvider, { start_time = -1 })
    refuses("'start'", testing.FakeTimeProvider, { start = 1 })
  end)

  it("stands still until it is advanced", function()
    assert.same({ "0.0 false", "9.0 false", "10.0 true" }, fake(function(p, note)
      local task = flow.delay(10)
      for _ = 1, 100 do flow.yield() end
      p:settle()
      note(p:now(), task.is_completed)
      p:advance(9)
      note(p:now(), task.is_completed)
      p:advance(1) -- including the target
      note(p:now(), task.is_completed)
    end))
  end)

  it("steps to each due time, at which whoever is woken reads it, and settles in between", function()
    assert.same({ "c 0.5", "a 1.0", "b 1.0", "c 1.0", "c 1.5", "a 2.0", "d 2.0", "c 2.0", "now 2.25", "c 2.5" },
      fake(function(p, note)
        local tasks = {
          flow.spawn(function()
            for _ = 1, 2 do
              flow.sleep(1)
              note("a", p:now())
            end
          end),
          flow.spawn(function()
            flow.sleep(1)
            note("b", p:now())
            flow.yield()
            flow.sleep(1) -- set at 1.0: due at 2.0, within the same advance
            note("d", p:now())
          end),
          flow.spawn(function()
            for _ = 1, 5 do
              flow.sleep(0.5)
              note("c", p:now())
            end
          end),
        }
        p:advance(2.25)
        note("now", p:now())
        p:advance(0.25)
        flow.await_all(tasks)
      end, false))
  end)

  it("drives the timeouts of sources and waits as well", function()
    assert.same({ "canceled at 3", "Timeout at 5" }, fake(function(p, note)
      local source <close> = flow.CancellationTokenSource(3)
      source.token:register(function() note("canceled at", p:now() // 1 | 0) end)
      local task = flow.spawn(function()
        local err = raised(flow.await, flow.TaskCompletionSource().task:wait_async(5))
        note(err.name, "at", p:now() // 1 | 0)
      end)
      p:advance(100)
      task:await()
    end))
  end)

  it("goes to its target though nothing is due, by nothing at all too", function()
    fake(function(p)
      p:advance(0)
      assert.equal(0, p:now())
      p:advance(1e9)
      assert.equal(1e9, p:now())
      local task = flow.spawn(nothing)
      p:advance(0)
      assert.is_true(task.is_completed)
    end)
  end)

  it("settles before the first step, so that what was started just now sets its deadlines first", function()
    assert.same({ "woken at 1.0" }, fake(function(p, note)
      local task = flow.spawn(function()
        flow.sleep(1)
        note("woken at", p:now())
      end)
      p:advance(1)
      assert.is_true(task.is_completed)
    end))
  end)

  -- once an advance inside another one returned at once, with the clock where it was
  it("is advanced inside another advance, which returns when it stands at its own target", function()
    assert.same({
      "inner at 1.0", "outer at 2.0", "after 2.0", "four at 4.0", "after it 6.0", "late at 7.0", "end 12.0",
    }, fake(function(p, note)
      flow.spawn(function()
        flow.sleep(1)
        note("inner at", p:now())
        p:advance(5)
        note("after it", p:now())
      end)
      for name, seconds in pairs { late = 7, four = 4 } do
        flow.spawn(function()
          flow.sleep(seconds)
          note(name, "at", p:now())
        end)
      end
      p:advance(2)
      note("outer at", p:now())
      flow.spawn(note, "after", p:now())
      p:advance(10)
      note("end", p:now())
    end))
  end)

  it("lets an advance inside another one go on when the test waits, or ends", function()
    local p = testing.FakeTimeProvider()
    local log, note = recorder()
    local function inner()
      flow.sleep(1)
      p:advance(2)
      note("inner", p:now())
    end
    testing.run(function()
      local task = flow.spawn(inner)
      p:advance(1)
      note("outer", p:now())
      task:await()
    end, { time_provider = p })
    assert.same({ "outer 1.0", "inner 3.0" }, log)
    testing.run(function()
      flow.spawn(inner)
      flow.spawn(p.advance, p, 9)
      p:advance(1)
      note("outer", p:now())
    end, { time_provider = p })
    assert.same({ "outer 1.0", "inner 3.0", "outer 4.0", "inner 4.0" }, log)
    assert.equal("mine", raised(testing.run, function() -- however busy others are
      local done = false
      flow.spawn(function() while not done do flow.yield() end end)
      flow.spawn(p.advance, p, 9)
      flow.yield()
      error("mine", 0)
    end, { time_provider = p }))
    testing.run(function() flow.spawn(p.advance, p, 9) end, { time_provider = p }) -- begun when the test has ended
    is_error("InvalidOperation", raised(testing.run, function()
      flow.spawn(function() while true do p:advance(1) end end)
      flow.yield()
    end, { time_provider = p }), "left something behind")
    assert.equal(4, p:now())
    local ticks = 0
    testing.run(function() -- each tick takes the time to the next one
      local _ <close> = flow.Timer(function()
        ticks = ticks + 1
        p:advance(1)
      end, 1, 1)
      p:advance(1)
      assert.equal(5, p:now())
    end, { time_provider = p })
    assert.equal(1, ticks)
    assert.equal(5, p:now())
  end)

  it("is advanced by several tasks, each of which goes on at its own target", function()
    assert.same({ "root 0.0", "b 3.0", "c 4.0", "d 4.0", "a 5.0", "e 5.0" }, fake(function(p, note)
      local function go(name, seconds)
        p:advance(seconds)
        note(name, p:now())
      end
      local a, b, c = flow.spawn(go, "a", 5), flow.spawn(go, "b", 3), flow.spawn(function()
        flow.sleep(4)
        note("c", p:now())
        flow.spawn(note, "d", p:now())
      end)
      go("root", 0)
      flow.await_all(a, b, c)
      flow.spawn(note, "e", p:now())
      p:settle()
    end))
  end)

  it("is advanced also by what runs last, at the target itself", function()
    assert.same({ "1.0", "1.0", "3.0" }, fake(function(p, note)
      local task = flow.spawn(function()
        flow.sleep(1)
        note(p:now())
        p:advance(2)
      end)
      p:advance(1)
      note(p:now())
      task:await()
      note(p:now())
    end))
  end)

  it("goes on for the others when the advance that leads, or any other, is canceled", function()
    assert.same({ "lead 1.0", "second 2.0", "third 3.0" }, fake(function(p, note)
      local function go(name, seconds, limit)
        local ok = pcall(flow.with_timeout, limit, p.advance, p, seconds)
        note(name, p:now())
        return ok
      end
      local list = {
        flow.spawn(go, "lead", 9, 1), flow.spawn(go, "second", 8, 2), flow.spawn(go, "third", 3, 10),
      }
      assert.same({ false, false, true }, { flow.await_all(table.unpack(list)) })
      assert.equal(3, p:now())
    end))
  end)

  it("stands while anybody settles, also when somebody else advances it", function()
    assert.same({ "settled 0.0", "advanced 5.0" }, fake(function(p, note)
      local settling = flow.spawn(function()
        p:settle()
        note("settled", p:now())
      end)
      flow.yield()
      p:advance(5)
      note("advanced", p:now())
      settling:await()
    end))
  end)

  it("is not advanced in a callback, which cannot wait for that", function()
    fake(function(p)
      local err
      local source = flow.CancellationTokenSource(1)
      source.token:register(function() err = raised(p.advance, p, 5) end)
      p:advance(2)
      is_error("InvalidOperation", err, "callback")
      assert.equal(2, p:now())
    end)
  end)

  it("settles inside a task that an advance woke, before that one goes on", function()
    assert.same({ "inner 1.0", "settled 1.0", "next 2.0" }, fake(function(p, note)
      flow.spawn(function()
        flow.sleep(1)
        flow.spawn(note, "inner", p:now())
        p:settle()
        note("settled", p:now())
      end)
      flow.spawn(function()
        flow.sleep(2)
        note("next", p:now())
      end)
      p:advance(2)
    end))
  end)

  it("serves again after an advance that a deadlock or an error cut off", function()
    local p = testing.FakeTimeProvider()
    is_error("InvalidOperation", raised(testing.run, function()
      flow.spawn(function()
        flow.sleep(1)
        flow.loop.stop()
        flow.yield()
      end)
      p:advance(5)
    end, { time_provider = p }))
    testing.run(function()
      local before = p:now()
      p:advance(5)
      assert.equal(before + 5, p:now())
    end, { time_provider = p })
  end)

  it("refuses to go back, or nowhere", function()
    fake(function(p)
      for _, seconds in ipairs { -1, -math.huge, math.huge, 0 / 0 } do
        refuses("'advance'", function() p:advance(seconds) end)
      end
      refuses("#1", function() p:advance("1") end)
      refuses("no value", function() p:advance() end)
      assert.equal(0, p:now())
      assert.truthy(raised(p.advance, nil, 1))
      assert.truthy(raised(p.now))
    end)
  end)

  it("refuses to move while it is not installed", function()
    local p = testing.FakeTimeProvider()
    is_error("InvalidOperation", raised(p.advance, p, 1), "time_provider")
    is_error("InvalidOperation", raised(p.settle, p), "time_provider")
    testing.run(function()
      is_error("InvalidOperation", raised(p.advance, p, 1), "time_provider")
      is_error("InvalidOperation", raised(p.settle, p), "time_provider")
    end)
    flow.run(function() is_error("InvalidOperation", raised(p.advance, p, 1), "time_provider") end)
    assert.equal(0, p:now())
  end)

  it("is refused where a task cannot suspend, and moves nothing", function()
    fake(function(p)
      local err
      table.sort({ 1, 2 }, function(a, b)
        err = err or raised(p.advance, p, 1)
        return a < b
      end)
      is_error("InvalidOperation", err, "cannot suspend")
      assert.equal(0, p:now())
      p:advance(1)
      assert.equal(1, p:now())
    end)
  end)

  it("has no target left when a coroutine dies in an advance", function()
    fake(function(p)
      local plain = coroutine.create(function() p:advance(1) end)
      assert.is_false((coroutine.resume(plain)))
      p:advance(2)
      assert.equal(2, p:now())
      local ours = flow.coroutine.create(function() flow.with_timeout(1, p.advance, p, 9) end)
      is_error("Timeout", select(2, flow.coroutine.resume(ours)))
      p:advance(5)
      assert.equal(8, p:now())
    end)
  end)

  it("makes a deadlock of a wait that it alone could end, and says so", function()
    local err = raised(fake, function() flow.sleep(5) end)
    is_error("InvalidOperation", err, "the fake clock never advances", "testing_spec.lua")
    is_error("InvalidOperation", raised(fake, function()
      flow.await(flow.TaskCompletionSource().task)
    end), "deadlock")
  end)

  it("finds what is left behind, as any clock does", function()
    local err = raised(fake, function(p)
      flow.spawn(flow.sleep, 10)
      p:advance(4)
    end)
    is_error("InvalidOperation", err, "left something behind", "sleeps")
  end)

  it("takes a seed", function()
    local orders = {}
    for seed = 1, 40 do
      orders[table.concat(fake(function(p, note)
        for i = 1, 3 do
          flow.spawn(function()
            flow.sleep(1)
            note(i)
          end)
        end
        p:advance(1)
      end, seed))] = true
    end
    local kinds = 0
    for _ in pairs(orders) do kinds = kinds + 1 end
    assert.equal(6, kinds)
  end)
end)

describe("what happens outside", function()
  local outside

  setup(function()
    local library = os.tmpname()
    os.remove(library)
    library = library .. ".so"
    local command = ("%s -std=c11 -D_GNU_SOURCE -shared -fPIC -Isrc $(sh .ci/find lua-cflags) $(sh .ci/find uv-cflags) "
      .. "spec/support/outside.c -o %s $(sh .ci/find uv-libs)"):format(os.getenv("CC") or "cc", library)
    assert(os.execute(command))
    local core = require "coflow.core"
    flow.loop.backend_fd() -- opens the loop
    outside = assert(package.loadlib(library, "luaopen_outside"))(core.run)
    os.remove(library)
  end)

  for what, start in pairs {
    ["a job of the pool"] = function() return outside.work(30) end,
    ["a file operation"] = function() return outside.stat() end,
    ["a process"] = function() return outside.process("0.03") end,
  } do
    it("holds the clock back until its end: " .. what, function()
      testing.run(function(clock)
        local thing = start()
        flow.sleep(3600)
        assert.is_true(outside.done(thing))
        assert.equal(3600, clock:now())
      end, { autojump_threshold = 0 })
    end)

    it("is waited for by a fake clock that settles: " .. what, function()
      local p = testing.FakeTimeProvider()
      testing.run(function()
        local thing = start()
        p:advance(1)
        assert.is_true(outside.done(thing))
      end, { time_provider = p })
    end)
  end

  it("holds the clock back for the threshold, if it may never come: a socket", function()
    testing.run(function(clock)
      local socket = outside.listen()
      flow.sleep(3600)
      assert.equal(3600, clock:now())
      local soon, late = outside.timer(10), outside.timer(1e9)
      flow.sleep(1)
      assert.is_true(outside.done(soon)) -- it came within the threshold
      assert.is_false(outside.done(late))
      outside.close(socket)
      outside.close(late)
    end, { autojump_threshold = 0.05 })
  end)

  describe("a FIFO of coflow.fs, where nobody may ever come,", function()
    local fs = flow.fs
    local path
    before_each(function()
      path = os.tmpname()
      os.remove(path)
      assert(os.execute("mkfifo " .. path))
    end)
    after_each(function() os.remove(path) end)

    -- once these held the clock back for ever, as a file operation does that will certainly end
    it("holds the clock back for the threshold", function()
      testing.run(function(clock)
        local file <close> = fs.open(path, "r+")
        raises("Timeout", flow.with_timeout, 5, file.read, file)
        assert.equal(5, clock:now())
        raises("Timeout", flow.with_timeout, 5, file.write, file, ("x"):rep(1 << 20))
        assert.equal(10, clock:now())
        file:close()
        raises("Timeout", flow.with_timeout, 5, fs.open, path, "w")
        flow.sleep(1) -- until its thread has left, which it certainly will
        raises("Timeout", flow.with_timeout, 5, fs.read_file, path)
        raises("Timeout", flow.with_timeout, 5, fs.copy, path, path .. "-copy")
        assert.equal(26, clock:now())
      end)
      os.remove(path .. "-copy")
    end)

    it("lets a fake clock settle", function()
      local p = testing.FakeTimeProvider()
      testing.run(function()
        local file <close> = fs.open(path, "r+")
        local reading = file:read_async()
        p:advance(1)
        assert.is_false(reading.is_completed)
        file:write_async("x") -- which waits for its turn
        file:close()
      end, { time_provider = p })
    end)

    it("holds back neither the clock nor what waits for a thread, when there are many", function()
      testing.run(function(clock)
        local files, tasks = {}, {}
        for i = 1, 10 do files[i] = fs.open(path, "r+") end
        for i = 1, 10 do
          tasks[i] = flow.spawn(function() raises("Timeout", flow.with_timeout, 5, files[i].read, files[i]) end)
        end
        flow.yield()
        fs.stat("/")
        assert.equal(5, clock:now()) -- then the threads came back
        flow.await_all(tasks)
        for i = 1, 10 do files[i]:close() end
      end, { autojump_threshold = 0.05, seed = false })
    end)

    it("is waited for when somebody comes", function()
      testing.run(function(clock)
        local file <close> = fs.open(path, "r+")
        local reading = file:read_async()
        file:stat_async() -- which is behind it
        local writer <close> = fs.open(path, "w")
        writer:write("hello")
        flow.sleep(1)
        assert.is_true(reading.is_completed)
        assert.equal("hello", reading.result)
        assert.equal(1, clock:now())
      end, { autojump_threshold = 0.3 })
    end)
  end)

  it("does not hold the clock back at all with a threshold of 0", function()
    testing.run(function()
      local late = outside.timer(1e9)
      for _ = 1, 100 do flow.sleep(1) end
      outside.close(late)
    end, { autojump_threshold = 0 })
  end)

  it("is no quiet when the loop never waits", function()
    testing.run(function(clock)
      local spinning = outside.spin()
      flow.sleep(5)
      assert.equal(5, clock:now())
      outside.close(spinning)
    end)
  end)

  -- A timer of libuv's that was due at once was forgotten when something else was open: the wait for events
  -- came after it, and had no end.
  it("does not make a short sleep endless, in real time", function()
    local socket = outside.listen()
    flow.run(function()
      for i = 1, helper.many(1000, 50) do flow.sleep((i % 100) * 1e-8) end
    end)
    outside.close(socket)
    flow.loop.run("nowait")
  end)

  it("ends a wait without any deadline in real time, as in production", function()
    testing.run(function(clock)
      local timer = outside.timer(5)
      is_error("InvalidOperation", raised(testing.run, nothing))
      local waiter = flow.spawn(function()
        while not outside.done(timer) do clock:settle() end
      end)
      waiter:await()
      assert.equal(0, clock:now())
    end)
  end)

  it("does not need a fake clock to move, and does not end it as a deadlock", function()
    local p = testing.FakeTimeProvider()
    local thing
    is_error("InvalidOperation", raised(testing.run, function()
      thing = outside.work(10)
      flow.sleep(5)
    end, { time_provider = p }), "never advances")
    assert.is_true(outside.done(thing)) -- only then
  end)

  describe("that is ours and idle", function()
    local kept, line

    local function connect()
      local listener <close> = flow.net.listen("127.0.0.1", 0)
      local accepted = listener:accept_async()
      local _ <close> = flow.net.connect("127.0.0.1", listener.port)
      return flow.await(accepted)
    end

    local directory = os.tmpname():match("^(.*)/") or "."
    local cases = {
      ["a listener"] = { function()
        line = helper.here(1)
        kept = flow.net.listen("127.0.0.1", 0)
      end, "an open coflow.Listener (tcp)" },
      ["a listener on a pipe"] = { function()
        local path = os.tmpname()
        os.remove(path)
        line = helper.here(1)
        kept = flow.net.listen_pipe(path)
      end, "an open coflow.Listener (pipe)" },
      ["a connection"] = { function()
        local listener <close> = flow.net.listen("127.0.0.1", 0)
        line = helper.here(1)
        kept = flow.net.connect("127.0.0.1", listener.port)
      end, "an open coflow.Stream (tcp)" },
      ["a UDP socket"] = { function()
        line = helper.here(1)
        kept = flow.net.udp({ host = "127.0.0.1" })
      end, "an open coflow.UdpSocket" },
      ["a listener that is read from by somebody who is left, too"] = { function()
        line = helper.here(1)
        kept = flow.net.listen("127.0.0.1", 0)
        flow.spawn(function() kept:accept() end)
        flow.yield()
      end, "task '" },
    }

    for what, case in pairs(cases) do
      it("fails it: " .. what .. ", which is closed then", function()
        local err = is_error("InvalidOperation", raised(testing.run, case[1]), "left something behind", case[2],
          "made at ", line)
        assert.is_true(kept.is_closed, err.message)
        assert.is_false(flow.loop.is_alive())
        kept = nil
        testing.run(nothing)
      end)
    end

    it("fails it: a watcher of files, which is closed then", function()
      local watcher
      is_error("InvalidOperation", raised(testing.run, function() watcher = flow.fs.watch(directory) end),
        "left something behind", "an open coflow.Watcher '" .. directory .. "'")
      assert.is_nil(watcher:next())
      watcher:dispose()
      testing.run(nothing)
    end)

    for _, collects in ipairs { true, false } do
      it("fails it also when nobody refers to it any more" .. (collects and ", and it is collected" or ""), function()
        for _, what in ipairs { "a listener", "a listener on a pipe", "a connection", "a UDP socket" } do
          local case = cases[what]
          local err = raised(testing.run, function()
            case[1]()
            kept = nil
            if not collects then return end
            for _ = 1, 2 do collectgarbage() end
          end)
          local text = case[2]:gsub("^an open (.*)$", "a %1 that was open when it was collected")
          is_error("InvalidOperation", err, "left something behind:\n\t" .. text, "made at ", line)
          local _, lines = err.message:gsub("\n", "")
          assert.equal(1, lines, err.message)
          assert.is_false(flow.loop.is_alive())
          testing.run(nothing)
        end
        local err = raised(testing.run, function()
          line = helper.here(1)
          flow.fs.watch(directory)
          if collects then collectgarbage() end
        end)
        is_error("InvalidOperation", err, "a coflow.Watcher '" .. directory .. "' that was open when it was collected",
          "made at ", line)
        testing.run(nothing)
      end)
    end

    it("does not fail it where the library has opened, and given up, something itself", function()
      testing.run(function()
        local listener <close> = flow.net.listen("127.0.0.1", 0)
        local port = listener.port
        raised(flow.net.listen, "127.0.0.1", port)
        raised(flow.net.connect, "127.0.0.1", 1)
        raised(flow.net.connect, "127.0.0.1", port, flow.CancellationToken.canceled)
        raised(flow.with_timeout, 1, listener.accept, listener)
        local source = flow.CancellationTokenSource()
        local task = flow.net.connect_async("127.0.0.1", port, source.token)
        source:cancel()
        task:try_await()
        raised(flow.net.connect_pipe, "/no/such/pipe")
        raised(flow.net.listen_pipe, "/no/such/pipe")
        raised(flow.fs.open, "/no/such/file")
        raised(flow.fs.watch, "/no/such/file")
        raised(flow.process.spawn, { args = { "no-such-program" }, stdin = "pipe", stdout = "pipe", stderr = "pipe" })
        assert.equal("x", (flow.process.run({ "cat" }, "x")))
        flow.process.spawn { args = { "true" } }:wait()
        flow.fs.read_file("/dev/null")
        assert.is_string(flow.fs.scandir(directory)())
        raised(flow.net.udp, { host = "192.0.2.1" })
        for _ = 1, 2 do collectgarbage() end
      end)
    end)

    it("does not fail it when it was there before, or was closed, or is only being closed", function()
      kept = flow.run(connect)
      testing.run(nothing)
      local before = { flow.net.listen("127.0.0.1", 0) }
      testing.run(function()
        kept:close()
        table.remove(before)
        for _ = 1, 2 do collectgarbage() end
        flow.stdio.stderr:flush() -- everybody's, made when it is first used
        local _ <close> = flow.net.listen("127.0.0.1", 0)
        connect():close()
      end)
    end)

    it("is told among all that is left, each with its place", function()
      local all = {}
      local err = raised(testing.run, function()
        for i = 1, 3 do all[i] = flow.net.listen("127.0.0.1", 0) end
        kept = flow.spawn(flow.sleep, 10)
      end)
      local _, lines = err.message:gsub("\n", "")
      assert.equal(4, lines, err.message)
      for i = 1, 3 do assert.is_true(all[i].is_closed) end
    end)
  end)

  it("is found when a handle is left open, and not when it was open before", function()
    local before = outside.listen()
    local socket
    is_error("InvalidOperation", raised(testing.run, function() socket = outside.listen() end),
      "an open tcp handle")
    testing.run(nothing)
    outside.close(socket)
    testing.run(function() outside.close(outside.listen()) end)
    outside.close(before)
    testing.run(nothing)
    assert.is_false(flow.loop.run("nowait"))
  end)
end)

describe("testing.it", function()
  local with_clock = testing.it
  local ran = {}

  with_clock("runs its function under testing.run", function(clock)
    flow.sleep(3600)
    ran.plain = clock:now()
  end)

  with_clock("takes the options of testing.run", { start_time = 7 }, function(clock)
    ran.options = clock:now()
  end)

  it("has run those above", function()
    assert.same({ plain = 3600, options = 7 }, ran)
  end)

  it("uses a global `it`, and says so when there is none", function()
    local script = [[
      local flow = require "coflow"
      local it = require("coflow.testing").it
      print(pcall(it, "x", function() end))
      local tests = {}
      function _G.it(name, fn) tests[#tests + 1] = { name, fn } end
      it("sleeps", function(clock) flow.sleep(60) print(clock:now()) end)
      it("leaks", { seed = false }, function() flow.delay(1) end)
      for _, test in ipairs(tests) do print(test[1], pcall(test[2])) end
    ]]
    local output = helper.output(script)
    assert.truthy(output:find("^false\tInvalidOperation: testing.it: there is no `it` here"), output)
    assert.truthy(output:find("60.0\nsleeps\ttrue\nleaks\tfalse\tInvalidOperation", 1, true), output)
  end)

  it("refuses what makes no sense when it is called, not when it runs", function()
    refuses("#2", function() testing.it("x") end)
    refuses("#2", function() testing.it("x", 1) end)
    refuses("'sed'", function() testing.it("x", { sed = 1 }, nothing) end)
    refuses("runs", function() testing.it("x", { runs = false }, nothing) end)
    refuses("#3", function() testing.it("x", {}, 1) end)
  end)

  it("explores when it is told how many runs", function()
    local body
    local real = rawget(_G, "it")
    rawset(_G, "it", function(_, fn) body = fn end)
    local seeds = 0
    testing.it("x", { runs = 5 }, function() seeds = seeds + 1 end)
    refuses("'time_provider'", function()
      testing.it("x", { runs = 5, time_provider = testing.FakeTimeProvider() }, nothing)
    end)
    rawset(_G, "it", real)
    body()
    assert.equal(5, seeds)
  end)

  it("is placed by busted where it is written", function()
    local path = os.tmpname()
    os.remove(path)
    path = path .. "_spec.lua"
    local file = assert(io.open(path, "w"))
    file:write("local it = require('coflow.testing').it\n", "it('fails', function() error('boom') end)\n")
    file:close()
    local output = helper.busted(path)
    os.remove(path)
    assert.equal("2", output:match("_spec.lua @ (%d+)"), output)
  end)
end)
