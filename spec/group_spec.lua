-- Structured concurrency: task_group with its policies, limit and graceful stop, and race.

local flow = require "coflow"
local helper = require "spec.helper"
local support = require "spec.support.flow_support"

local in_task, recorder, closing = support.in_task, helper.recorder, helper.closing
local in_order = helper.in_order
local raises, bad_argument, raised, inner = helper.raises, support.bad_argument, helper.raised, helper.inner
local with_reports, collect, many = support.with_reports, helper.collect, helper.many

local function fail(err, seconds)
  if seconds then flow.sleep(seconds) end
  error(err, 0)
end

local function after(seconds, ...)
  flow.sleep(seconds)
  return ...
end

-- A body that ends with `err` only after `seconds` of clean-up, whatever interrupts it.
local function slow_end(seconds, err)
  local _ <close> = closing(function()
    flow.shield(flow.sleep, seconds)
    if err then error(err, 0) end
  end)
  flow.sleep(1e6)
end

describe("task_group", function()
  it("returns the body's values, nil included, once every child has ended", in_task(function(clock)
    local task
    local values = table.pack(flow.task_group(function(group)
      task = group:spawn(after, 3, "child")
      assert.equal("waiting_to_run", task.status)
      group:spawn(after, 1)
      return 1, nil, 3, nil
    end))
    assert.same({ n = 4, 1, nil, 3, nil }, values)
    assert.equal(3, clock:now())
    assert.equal("child", task.result)
    assert.same({ n = 0 }, table.pack(flow.task_group(function() end)))
    assert.equal(1, flow.task_group(setmetatable({}, { __call = function() return 1 end })))
  end))

  it("passes arguments to children, and their results by their tasks", in_task(function()
    assert.equal(6, flow.task_group(function(group)
      local a = group:spawn(function(...) return select("#", ...) end, nil, 2, nil)
      local b = group:spawn(after, 1, 3)
      return a:await() + b:await()
    end))
  end))

  it("never suspends in spawn, and starts children in order", in_order(function()
    local log, note = recorder()
    flow.task_group(function(group)
      for i = 1, 3 do group:spawn(note, i) end
      note("body")
    end)
    assert.same({ "body", "1", "2", "3" }, log)
  end))

  it("starts children in the current execution context", in_task(function()
    local where = flow.AsyncLocal()
    where.value = "outside"
    flow.task_group(function(group)
      where.value = "body"
      local child = group:spawn(function()
        local before = where.value
        where.value = "child"
        return before
      end)
      assert.equal("body", child:await())
      assert.equal("body", where.value)
    end)
  end))

  it("waits for what children spawn into it, at any depth", in_task(function(clock)
    local ended = 0
    flow.task_group(function(group)
      local function grow(n)
        flow.sleep(0.5)
        if n > 0 then
          group:spawn(grow, n - 1)
          group:spawn(grow, n - 1)
        end
        ended = ended + 1
      end
      group:spawn(grow, 5)
    end)
    assert.equal(63, ended)
    assert.equal(3, clock:now())
  end))

  it("does not wait for what children start otherwise", in_task(function(clock)
    local other
    flow.task_group(function(group)
      group:spawn(function() other = flow.spawn(after, 9, "later") end)
    end)
    assert.equal(0, clock:now())
    assert.equal("later", other:await())
  end))

  it("takes children from other tasks, up to its end", in_order(function(clock)
    local group
    local host = flow.spawn(flow.task_group, function(g)
      group = g
      g:spawn(after, 1)
    end)
    flow.yield()
    flow.yield()
    local log, note = recorder()
    local other = flow.spawn(function()
      flow.sleep(1) -- just when the last child has ended
      local child = group:spawn(function()
        flow.sleep(2)
        note("child", host.is_completed)
      end)
      child:await()
    end)
    host:await()
    note("host", clock:now())
    other:await()
    table.sort(log)
    assert.same({ "child false", "host 3.0" }, log)
  end))

  it("refuses children after its end, and leaves its methods harmless", in_task(function()
    local group, token
    flow.task_group(function(g)
      group = g
      token = g.token
    end)
    helper.is_error("InvalidOperation", raised(group.spawn, group, print), "ended")
    assert.is_false(group:cancel())
    group:stop()
    assert.is_false(group.is_stopping)
    assert.equal(token, group.token)
    assert.is_false(token.is_cancellation_requested)
  end))

  it("has a token after its end, also if nobody asked before", in_task(function()
    local calm, canceled
    flow.task_group(function(group) calm = group end)
    flow.task_group(function(group)
      canceled = group
      group:cancel("why")
    end)
    assert.is_false(calm.token.is_cancellation_requested)
    assert.is_true(canceled.token.is_cancellation_requested)
    assert.equal("why", canceled.token.reason)
    assert.equal(canceled.token, canceled.token)
    helper.is_error("InvalidOperation", raised(canceled.spawn, canceled, print))
  end))

  it("is the ambient scope of its body and children", in_task(function()
    flow.task_group(function(group)
      assert.equal(group.token, flow.cancellation_token())
      assert.equal(group.token, group.token)
      local child = group:spawn(function()
        local token = flow.cancellation_token()
        local err = raised(flow.sleep, 9)
        assert.equal(token, err.token)
        assert.equal(group.token, err.cause)
        assert.equal("enough", err.reason)
      end)
      flow.yield()
      group:cancel("enough")
      flow.shield(child.await, child)
    end)
  end))
end)

describe("the first failure", function()
  it("of a child cancels the others and the body, waits for all, and comes out as it is", in_task(function(clock)
    local mine, log, note = {}, recorder()
    local err = raised(flow.task_group, function(group)
      group:spawn(fail, mine, 1)
      group:spawn(function()
        local _ <close> = closing(function()
          flow.shield(flow.sleep, 2)
          note("child", clock:now())
        end)
        flow.sleep(9)
      end)
      local _ <close> = closing(function() note("body", clock:now()) end)
      flow.sleep(9)
    end)
    assert.equal(mine, err)
    assert.same({ "body 1.0", "child 3.0" }, log)
  end))

  it("of the body does the same", in_task(function(clock)
    local mine = {}
    local child
    assert.equal(mine, raised(flow.task_group, function(group)
      child = group:spawn(slow_end, 2)
      flow.sleep(1)
      error(mine)
    end))
    assert.is_true(child.is_canceled)
    assert.equal(3, clock:now())
  end))

  it("may be nil, false or an error object", in_task(function()
    for _, who in ipairs { "child", "body" } do
      for _, value in ipairs { false, "nil", flow.errors.Timeout("x"), flow.errors.InvalidOperation("y") } do
        if value == "nil" then value = nil end
        local ok, err = pcall(flow.task_group, function(group)
          if who == "body" then error(value, 0) end
          group:spawn(error, value, 0)
          flow.sleep(9)
        end)
        assert.is_false(ok)
        assert.equal(value, err)
      end
    end
  end))

  it("cancels at once, on the failing child's stack", in_order(function()
    local log, note = recorder()
    pcall(flow.task_group, function(group)
      group:spawn(function()
        flow.yield()
        note("fails")
        error("x", 0)
      end)
      group:spawn(function()
        for i = 1, 9 do
          note("turn", i)
          flow.yield()
        end
      end)
    end)
    assert.same({ "turn 1", "fails", "turn 2" }, log) -- it was ready by then
  end))

  it("and others that come while it ends make an Aggregate, in order of time", in_task(function()
    local err = raised(flow.task_group, function(group)
      group:spawn(slow_end, 2, "third")
      group:spawn(slow_end, 1, "second")
      group:spawn(fail, "first", 1)
      group:spawn(slow_end, 5)
    end)
    assert.same({ "first", "second", "third" }, inner(err))
    err = raised(flow.task_group, function(group)
      group:spawn(slow_end, 1, "child")
      flow.yield()
      flow.yield()
      error("body", 0)
    end)
    assert.same({ "body", "child" }, inner(err))
    err = raised(flow.task_group, function(group)
      group:spawn(fail, "child", 1)
      slow_end(1, "body")
    end)
    assert.same({ "child", "body" }, inner(err))
  end))

  it("counts once where tasks have it from each other", in_task(function()
    local mine = {}
    assert.equal(mine, raised(flow.task_group, function(group)
      local first = group:spawn(fail, mine, 1)
      local second = group:spawn(flow.await, first)
      group:spawn(flow.await, second)
      group:spawn(flow.await, first)
    end, { policy = "supervise" }))
    assert.equal(mine, raised(flow.task_group, function(group)
      flow.await(group:spawn(flow.await, group:spawn(fail, mine)))
    end))
    assert.equal("x", raised(flow.task_group, function(group)
      group:spawn(fail, "x"):await()
    end))
  end))

  it("counts once where a task was stopped because it yielded, at once or later", in_task(function()
    for _, before in ipairs { function() end, flow.yield, function() flow.sleep(1) end } do
      raises("InvalidOperation", flow.task_group, function(group)
        local child = group:spawn(function()
          before()
          coroutine.yield()
        end)
        group:spawn(flow.await, child)
        child:await()
      end)
      raises("InvalidOperation", flow.task_group, function(group)
        local child = group:spawn(function()
          before()
          coroutine.yield()
        end)
        for _ = 1, 2 do group:spawn(flow.await, child) end
      end, { policy = "supervise" })
    end
  end))

  it("counts twice where two raised the same value on their own", in_task(function()
    local mine = {}
    local err = raised(flow.task_group, function(group)
      group:spawn(fail, mine)
      group:spawn(fail, mine)
    end)
    local list = inner(err)
    assert.equal(2, #list)
    assert.equal(mine, list[1])
    assert.equal(mine, list[2])
  end))

  it("is told from those that <close> handlers see on the way", in_task(function()
    local other = flow.spawn(fail, "seen on the way")
    flow.yield()
    local function fail_seeing_others(err)
      local _ <close> = closing(function() pcall(flow.await, other) end)
      error(err, 0)
    end
    local child
    local err = raised(flow.task_group, function(group)
      child = group:spawn(fail_seeing_others, "the child's")
      group:spawn(slow_end, 1, "another")
      local ok, first = pcall(flow.await, child)
      assert.is_false(ok)
      assert.equal("OperationCanceled", first.name)
      flow.shield(function() pcall(flow.await, child) end)
      fail_seeing_others("the body's")
    end)
    assert.same({ "the child's", "the body's", "another" }, inner(err))
    assert.truthy(child:traceback():find("in function 'error'", 1, true), child:traceback())
    assert.equal("same", raised(flow.task_group, function(group)
      child = group:spawn(fail, "same", 1)
      flow.shield(function()
        local _ <close> = closing(function() pcall(flow.await, other) end)
        flow.await(child)
      end)
    end))
  end))

  it("is observed, and so are all others", in_task(function()
    with_reports(function(reports)
      pcall(flow.task_group, function(group)
        group:spawn(fail, "a")
        group:spawn(fail, "b")
      end)
      pcall(flow.task_group, function(group) group:spawn(fail, "c") end)
      collect()
      assert.equal(0, #reports, tostring(reports[1] and reports[1].err))
    end)
  end))

  it("keeps the async traceback of the child", in_task(function()
    local task = flow.spawn(flow.task_group, function(group)
      group:spawn(function()
        flow.yield()
        error("here")
      end)
    end)
    assert.is_false(flow.try_await(task))
    assert.truthy(task:traceback():find("group_spec.lua", 1, true))
  end))
end)

describe("a canceled child", function()
  it("has not failed", in_task(function(clock)
    assert.equal("fine", flow.task_group(function(group)
      local a = group:spawn(flow.sleep, 9)
      local source <close> = flow.CancellationTokenSource(1)
      local b = group:spawn(flow.sleep, 9, source.token)
      local c = group:spawn(fail, flow.errors.OperationCanceled("mine"))
      flow.yield()
      a:cancel()
      for _, t in ipairs { a, b, c } do raises("OperationCanceled", t.await, t) end
      group:spawn(after, 1)
      return "fine"
    end))
    assert.equal(2, clock:now())
  end))

  it("may be the host's only company under a shield", in_task(function(clock)
    local value = flow.task_group(function(group)
      local child = group:spawn(slow_end, 3)
      return flow.shield(function()
        flow.yield()
        child:cancel()
        assert.is_false(flow.try_await(child))
        return clock:now()
      end)
    end)
    assert.equal(3, value)
  end))

  it("cancels its group before the body goes on", in_order(function()
    local log, note = recorder()
    flow.task_group(function(group)
      group:spawn(function()
        group:cancel("by a child")
        note("child goes on")
        flow.yield()
        note("not reached")
      end)
      local ok, err = pcall(flow.yield)
      note("body", ok, not ok and err.reason)
      local late = group:spawn(function()
        note("late starts")
        flow.yield()
        note("not reached")
      end)
      note(late.status)
    end)
    assert.same({ "child goes on", "body true false", "waiting_to_run", "late starts" }, log)
  end))

  it("that is hot cancels its group before anybody knows it", in_task(function()
    local seen
    assert.equal("value", flow.task_group(function(group)
      flow.async(function() group:cancel("hot") end)()
      seen = group:spawn(flow.yield)
      return "value"
    end))
    assert.is_true(seen.is_canceled)
  end))

  it("or grandchild may cancel the group", in_task(function(clock)
    local ended = 0
    local values = table.pack(flow.task_group(function(group)
      group:spawn(function()
        local _ <close> = closing(function() ended = ended + 1 end)
        flow.spawn(function()
          local _ <close> = closing(function() ended = ended + 1 end)
          flow.sleep(1)
          assert.is_true(group:cancel("by a grandchild"))
          assert.is_false(group:cancel("again"))
          flow.sleep(9)
        end)
        flow.sleep(9)
      end)
      return "kept"
    end))
    assert.same({ n = 1, "kept" }, values)
    assert.equal(1, clock:now())
    flow.yield()
    assert.equal(2, ended)
  end))
end)

describe("a group that its own code canceled", function()
  it("returns the body's values, or nothing when the body was cut short", in_task(function()
    assert.equal("v", flow.task_group(function(group)
      group:spawn(flow.sleep, 9)
      group:cancel()
      return "v"
    end))
    assert.equal("v", flow.task_group(function(group)
      group:spawn(function()
        flow.sleep(1)
        group:cancel()
      end)
      pcall(flow.sleep, 9)
      return "v"
    end))
    assert.same({ n = 0 }, table.pack(flow.task_group(function(group)
      group:cancel()
      flow.sleep(1)
    end)))
  end))

  it("raises what failed on its own", in_task(function()
    assert.equal("own", raised(flow.task_group, function(group)
      group:spawn(slow_end, 1, "own")
      flow.yield()
      group:cancel()
    end))
  end))

  it("tells errors of callbacks to who canceled it", in_task(function()
    flow.task_group(function(group)
      group.token:register(error, "callback", 0)
      assert.same({ "callback" }, inner(raised(group.cancel, group)))
    end)
  end))

  it("reports errors of callbacks that a failure runs", in_task(function()
    with_reports(function(reports)
      assert.equal("failure", raised(flow.task_group, function(group)
        group.token:register(error, "callback", 0)
        group:spawn(fail, "failure")
        flow.sleep(9)
      end))
      assert.equal(1, #reports)
      assert.same({ "callback" }, inner(reports[1].err))
    end)
  end))
end)

describe("an outer cancellation", function()
  it("cancels the group, and comes out when all have ended", in_task(function(clock)
    local task = flow.spawn(flow.task_group, function(group)
      group:spawn(slow_end, 2)
      flow.sleep(9)
    end)
    flow.sleep(1)
    task:cancel("outer")
    assert.equal("outer", raises("OperationCanceled", task.await, task).reason)
    assert.equal(3, clock:now())
  end))

  it("is not swallowed by a body that returns", in_task(function(clock)
    raises("Timeout", flow.with_timeout, 1, function()
      flow.task_group(function(group)
        group:spawn(slow_end, 2)
        pcall(flow.sleep, 9)
        return "swallowed"
      end)
      error("not reached")
    end)
    assert.equal(3, clock:now())
  end))

  it("while the group waits for its children is not swallowed", in_task(function(clock)
    raises("Timeout", flow.with_timeout, 1, function()
      flow.task_group(function(group)
        group:spawn(slow_end, 2)
        return "returned"
      end)
      error("not reached")
    end)
    assert.equal(3, clock:now())
  end))

  it("while the group tears down is not swallowed", in_task(function(clock)
    local task = flow.spawn(function()
      raises("Timeout", flow.with_timeout, 2, flow.task_group, function(group)
        group:spawn(slow_end, 3)
        flow.sleep(1)
        group:cancel("own")
        return "returned"
      end)
      return clock:now()
    end)
    assert.equal(4, task:await())
  end))

  it("yields only to a failure", in_task(function()
    assert.equal("failure", raised(flow.with_timeout, 2, flow.task_group, function(group)
      group:spawn(slow_end, 3, "failure")
      flow.sleep(9)
    end))
    assert.equal("failure", raised(flow.with_timeout, 2, flow.task_group, function(group)
      group:spawn(slow_end, 5)
      group:spawn(fail, "failure", 1)
      flow.sleep(9)
    end))
  end))

  it("by a token, by a deadline in the body, and not through a shield", in_task(function(clock)
    local source <close> = flow.CancellationTokenSource(1)
    raises("OperationCanceled", flow.with_cancellation, source.token, flow.task_group, function(group)
      group:spawn(flow.sleep, 9)
    end)
    assert.equal(1, clock:now())
    raises("Timeout", flow.task_group, function(group)
      group:spawn(flow.sleep, 9)
      flow.with_timeout(1, flow.sleep, 9) -- a failure of the body
    end)
    assert.equal(2, clock:now())
    assert.equal("shielded", flow.with_timeout(1, flow.shield, flow.task_group, function(group)
      group:spawn(after, 3)
      return "shielded"
    end))
    assert.equal(5, clock:now())
  end))

  it("before the group begins does not stop its body, but its suspensions", in_task(function()
    local task = flow.spawn(function()
      flow.current_task():cancel("before")
      local log, note = recorder()
      local ok, err = pcall(flow.task_group, function(group)
        assert.is_true(group.token.is_cancellation_requested)
        group:spawn(note, "child")
        note("body")
        return 1
      end)
      assert.is_false(ok)
      assert.equal("before", err.reason)
      return log
    end)
    assert.same({ "body", "child" }, task:await())
  end))
end)

describe("the limit", function()
  it("queues children over it, in order", in_order(function(clock)
    local log, note = recorder()
    local running, most = 0, 0
    flow.task_group(function(group)
      for i = 1, 7 do
        local task = group:spawn(function()
          running = running + 1
          most = math.max(most, running)
          note(i, clock:now())
          flow.sleep(1)
          running = running - 1
        end)
        assert.equal("waiting_to_run", task.status)
      end
    end, { limit = 3 })
    assert.equal(3, most)
    assert.same({ "1 0.0", "2 0.0", "3 0.0", "4 1.0", "5 1.0", "6 1.0", "7 2.0" }, log)
  end))

  it("never starts queued children of a canceled group, however it was canceled", in_task(function()
    local ways = {
      own = function(group)
        flow.sleep(1)
        group:cancel()
      end,
      ["a failing child"] = function(group) group:spawn(print) end,
      ["a failing body"] = function()
        flow.sleep(1)
        error("x", 0)
      end,
      ["a deadline"] = function() flow.sleep(1e6) end,
      ["the outer task"] = function(_, host)
        flow.sleep(1)
        host:cancel()
      end,
      stop = function(group)
        flow.sleep(1)
        group:stop()
      end,
    }
    for name, way in pairs(ways) do
      local started, queued = 0, {}
      local host
      host = flow.spawn(flow.with_timeout, 2, flow.task_group, function(group)
        local first = name == "a failing child" and fail or flow.sleep
        group:spawn(first, name == "a failing child" and "x" or 1e6, 1)
        for i = 1, 5 do queued[i] = group:spawn(function() started = started + 1 end) end
        way(group, host)
      end, { limit = 1 })
      flow.try_await(host)
      assert.equal(0, started, name)
      for _, task in ipairs(queued) do
        assert.is_true(task.is_canceled, name)
        raises("OperationCanceled", task.await, task)
      end
      assert.is_true(host.is_completed)
    end
  end))

  it("discards children that are spawned over it in a canceled group", in_order(function()
    flow.task_group(function(group)
      local first = group:spawn(slow_end, 1)
      group:spawn(print, "never")
      flow.yield()
      group:cancel("why")
      local late = group:spawn(print, "never")
      assert.is_true(late.is_canceled)
      assert.equal("why", raises("OperationCanceled", late.await, late).reason)
      assert.equal("waiting_for_activation", first.status)
    end, { limit = 1 })
  end))

  it("ends a queued child that was canceled before, with its group", in_task(function()
    local task
    flow.task_group(function(group)
      group:spawn(after, 2)
      task = group:spawn(function() error("has started") end)
      task:cancel("early")
      group:cancel("all")
    end, { limit = 1 })
    assert.equal("canceled", task.status)
  end))

  it("lets a queued child be awaited, and be canceled", in_task(function()
    flow.task_group(function(group)
      group:spawn(after, 2)
      local a = group:spawn(flow.yield)
      local b = group:spawn(function() return "b" end)
      a:cancel("early")
      assert.equal("b", b:await())
      assert.equal("early", raises("OperationCanceled", a.await, a).reason)
    end, { limit = 1 })
  end))

  it("is obeyed by children that spawn and fail", in_task(function()
    local running, most, failed = 0, 0, 0
    local function work(group, n)
      running = running + 1
      most = math.max(most, running)
      local _ <close> = closing(function() running = running - 1 end)
      if n > 0 then
        group:spawn(work, group, n - 1)
        group:spawn(work, group, n - 1)
      end
      flow.yield()
      failed = failed + 1
      error(n, 0)
    end
    local err = raised(flow.task_group, function(group)
      group:spawn(work, group, 5)
    end, { limit = 2, policy = "supervise" })
    assert.equal(63, failed)
    assert.equal(63, #inner(err))
    assert.equal(2, most)
  end))

  it("holds 10,000 children", in_task(function()
    local ended, n = 0, many(10000)
    flow.task_group(function(group)
      for _ = 1, n do
        group:spawn(function()
          flow.yield()
          ended = ended + 1
        end)
      end
    end, { limit = 7 })
    assert.equal(n, ended)
  end))

  it("may be math.huge, or a float without a fraction", in_task(function()
    assert.equal(1, flow.task_group(function() return 1 end, { limit = math.huge }))
    assert.equal(1, flow.task_group(function() return 1 end, { limit = 2.0 }))
  end))
end)

describe("supervise", function()
  local options = { policy = "supervise" }

  it("cancels nobody for a child, and raises what nobody observed", in_task(function(clock)
    local err = raised(flow.task_group, function(group)
      group:spawn(fail, "a", 2)
      group:spawn(fail, "b", 1)
      local c = group:spawn(fail, "c")
      assert.equal("c", raised(c.await, c))
      group:spawn(after, 5)
    end, options)
    assert.same({ "b", "a" }, inner(err))
    assert.equal(5, clock:now())
    assert.equal("a", raised(flow.task_group, function(group) group:spawn(fail, "a") end, options))
  end))

  it("returns the body's values when all failures were observed", in_order(function()
    assert.equal("fine", flow.task_group(function(group)
      local a, b = group:spawn(fail, "a"), group:spawn(fail, "b")
      flow.try_await(a)
      flow.yield()
      assert.equal("b", b.exception)
      return "fine"
    end, options))
  end))

  it("raises a failure that only a child of it has seen, once; and that of the body", in_task(function()
    assert.equal("body", raised(flow.task_group, function(group)
      group:spawn(after, 9)
      flow.sleep(1)
      error("body", 0)
    end, options))
    assert.equal("a", raised(flow.task_group, function(group)
      local a = group:spawn(fail, "a")
      group:spawn(flow.await, a)
      flow.yield()
    end, options))
  end))

  it("lets children go on after a failure, and the outer cancellation through", in_task(function(clock)
    raises("Timeout", flow.with_timeout, 2, flow.task_group, function(group)
      local bad = group:spawn(fail, "x")
      flow.try_await(bad)
      flow.sleep(9)
    end, options)
    assert.equal(2, clock:now())
  end))
end)

describe("first_success", function()
  local options = { policy = "first_success" }

  it("returns the winner's values, nil included, and cancels the rest and the body", in_task(function(clock)
    local closed = 0
    local values = table.pack(flow.task_group(function(group)
      group:spawn(fail, "x")
      group:spawn(after, 2, "winner", nil, 3, nil)
      group:spawn(function()
        local _ <close> = closing(function()
          flow.shield(flow.sleep, 1)
          closed = closed + 1
        end)
        flow.sleep(9)
      end)
      local _ <close> = closing(function() closed = closed + 1 end)
      flow.sleep(9)
    end, options))
    assert.same({ n = 4, "winner", nil, 3, nil }, values)
    assert.equal(2, closed)
    assert.equal(3, clock:now())
  end))

  it("does so while the body goes on, fails or returns something else", in_task(function()
    assert.equal("child", flow.task_group(function(group)
      group:spawn(after, 1, "child")
      return "body"
    end, options))
    assert.equal("child", flow.task_group(function(group)
      group:spawn(after, 1, "child")
      pcall(flow.sleep, 9)
      error("body", 0)
    end, options))
    assert.equal("child", flow.task_group(function(group)
      group:spawn(after, 1, "child")
      group:spawn(slow_end, 2, "too late")
    end, options))
  end))

  it("raises an Aggregate when all failed, also of one; the body is one of them", in_task(function()
    local err = raised(flow.task_group, function(group)
      group:spawn(fail, "b", 2)
      group:spawn(fail, "a", 1)
    end, options)
    assert.same({ "a", "b" }, inner(err))
    assert.same({ "a" }, inner(raised(flow.task_group, function(group) group:spawn(fail, "a") end, options)))
  end))

  it("fails with a body that fails before any child has succeeded", in_task(function()
    assert.equal("body", raised(flow.task_group, function(group)
      group:spawn(function()
        pcall(flow.sleep, 9)
        return "too late"
      end)
      flow.yield()
      error("body", 0)
    end, options))
  end))

  it("returns the body's values when there are no children", in_task(function()
    assert.equal("body", flow.task_group(function() return "body" end, options))
  end))

  it("keeps the winner whatever happens meanwhile", in_task(function(clock)
    assert.equal("winner", flow.with_timeout(2, flow.task_group, function(group)
      group:spawn(after, 1, "winner")
      group:spawn(slow_end, 4)
    end, options))
    assert.equal(5, clock:now())
  end))

  it("takes the first by time when two end at the same time", in_order(function()
    for _ = 1, 3 do
      assert.equal("a", flow.task_group(function(group)
        group:spawn(after, 1, "a")
        group:spawn(after, 1, "b")
      end, options))
    end
  end))

  it("does not take a discarded or canceled child for a winner", in_task(function()
    raises("OperationCanceled", flow.with_timeout, 5, flow.task_group, function(group)
      local a = group:spawn(flow.sleep, 9)
      flow.yield()
      a:cancel()
    end, options)
  end))
end)

describe("stop", function()
  it("without a grace cancels at once", in_task(function(clock)
    assert.equal("v", flow.task_group(function(group)
      group:spawn(flow.sleep, 9)
      flow.sleep(1)
      assert.is_false(group.is_stopping)
      group:stop()
      assert.is_true(group.is_stopping)
      assert.is_true(group.token.is_cancellation_requested)
      group:stop()
      return "v"
    end))
    assert.equal(1, clock:now())
  end))

  it("is waited for until a token is canceled, too", in_task(function()
    flow.task_group(function(group)
      local source = flow.CancellationTokenSource(1)
      local err = raises("OperationCanceled", group.wait_stopping, group, source.token)
      assert.equal(source.token, err.token)
      raises("OperationCanceled", group.wait_stopping, group, flow.CancellationToken.canceled)
      group:stop()
      raises("OperationCanceled", group.wait_stopping, group, flow.CancellationToken.canceled)
      group:wait_stopping(flow.CancellationToken.none)
      bad_argument(1, "wait_stopping", function() group:wait_stopping(5) end, "CancellationToken")
    end)
  end))

  it("is not waited for once the group has ended", in_task(function()
    local ended
    flow.task_group(function(group) ended = group end)
    raises("InvalidOperation", ended.wait_stopping, ended)
  end))

  it("with a grace wakes wait_stopping, and cancels only after it", in_order(function(clock)
    local log, note = recorder()
    local value = flow.task_group(function(group)
      for i = 1, 2 do
        group:spawn(function()
          group:wait_stopping()
          note("polite", i, clock:now())
        end)
      end
      group:spawn(function()
        local ok = pcall(flow.sleep, 99)
        note("stubborn", ok, clock:now())
      end)
      flow.sleep(1)
      assert.is_nil(flow.deadline())
      group:stop()
      assert.is_true(group.is_stopping)
      assert.is_false(group.token.is_cancellation_requested)
      assert.equal(3, flow.deadline())
      group:wait_stopping() -- returns at once
      return "v"
    end, { grace = 3 })
    assert.equal("v", value)
    assert.same({ "polite 1 1.0", "polite 2 1.0", "stubborn false 4.0" }, log)
    assert.is_nil(flow.deadline())
    flow.sleep(9)
  end))

  it("ends before the grace when all are done, leaving no timer", in_task(function(clock)
    flow.task_group(function(group)
      group:spawn(group.wait_stopping, group)
      flow.sleep(1)
      group:stop()
    end, { grace = 100 })
    assert.equal(1, clock:now())
    assert.is_false(flow.loop.is_alive())
  end))

  it("from a child, from outside, twice, with a grace without end", in_task(function(clock)
    local group
    local host = flow.spawn(flow.task_group, function(g)
      group = g
      g:spawn(function()
        g:wait_stopping()
        flow.sleep(50)
      end)
      return "v"
    end, { grace = math.huge })
    flow.sleep(1)
    group:stop()
    group:stop()
    assert.equal("v", host:await())
    assert.equal(51, clock:now())
    assert.is_true(group.is_stopping)
  end))

  it("says OperationCanceled, not Timeout, to a body that the grace cuts short", in_task(function(clock)
    assert.same({ n = 0 }, table.pack(flow.task_group(function(group)
      group:stop()
      flow.sleep(9)
    end, { grace = 1 })))
    assert.equal(1, clock:now())
  end))

  it("does not undo an outer deadline that comes during the grace", in_task(function(clock)
    raises("Timeout", flow.with_timeout, 2, flow.task_group, function(group)
      group:stop()
      flow.sleep(9)
    end, { grace = 5 })
    assert.equal(2, clock:now())
  end))

  it("leaves a waiter for it to the cancellation", in_task(function()
    flow.task_group(function(group)
      local waiter = group:spawn(group.wait_stopping, group)
      flow.yield()
      group:cancel()
      raises("OperationCanceled", function() flow.shield(waiter.await, waiter) end)
    end)
  end))
end)

describe("groups in groups", function()
  it("end inside out, and pass failures outwards", in_task(function(clock)
    local log, note = recorder()
    assert.equal("deep", raised(flow.task_group, function(outer)
      outer:spawn(slow_end, 3)
      outer:spawn(function()
        local _ <close> = closing(function() note("inner host", clock:now()) end)
        flow.task_group(function(middle)
          middle:spawn(slow_end, 2)
          middle:spawn(function()
            flow.task_group(function(deep) deep:spawn(fail, "deep", 1) end)
          end)
        end)
      end)
    end))
    assert.same({ "inner host 3.0" }, log)
    assert.equal(6, clock:now())
  end))

  it("nest 10,000 deep: values, errors, a cancellation", in_task(function()
    local depth, started = many(10000), 0
    local function nested(n, fn)
      if n == 0 then return fn() end
      local value = flow.task_group(function(group)
        group:spawn(function()
          started = started + 1
          flow.yield()
        end)
        return nested(n - 1, fn)
      end)
      return value
    end
    assert.equal("value", nested(depth, function() return "value" end))
    assert.equal(depth, started)
    assert.equal("mine", raised(nested, depth, function() error("mine", 0) end))
    raises("Timeout", flow.with_timeout, 1, nested, depth, function() flow.sleep(9) end)
    local task = flow.spawn(nested, depth, function() flow.sleep(9) end)
    flow.sleep(1)
    task:cancel("all")
    assert.equal("all", raises("OperationCanceled", task.await, task).reason)
  end))

  it("in a chain of children 2,000 long are canceled as one", in_task(function()
    local depth, ended = many(2000), 0
    local function link(n)
      local _ <close> = closing(function() ended = ended + 1 end)
      if n == 0 then return flow.sleep(99) end
      flow.task_group(function(group) group:spawn(link, n - 1) end)
    end
    local task = flow.spawn(link, depth)
    flow.sleep(1)
    task:cancel()
    raises("OperationCanceled", task.await, task)
    assert.equal(depth + 1, ended)
    assert.equal("bottom", raised(flow.task_group, function(group)
      local function down(n)
        if n == 0 then error("bottom", 0) end
        flow.task_group(function(g) g:spawn(down, n - 1) end)
      end
      group:spawn(down, depth)
    end))
  end))

  it("let a child of the inner one spawn into the outer", in_task(function(clock)
    local child
    flow.task_group(function(outer)
      raises("Timeout", flow.with_timeout, 1, flow.task_group, function(group)
        group:spawn(function()
          child = outer:spawn(after, 5, "outer's")
          flow.sleep(9)
        end)
      end)
      assert.equal(1, clock:now())
    end)
    assert.equal("outer's", child.result)
    assert.equal(5, clock:now())
  end))
end)

describe("an abandoned child", function()
  it("fails the group, which goes on", in_task(function()
    with_reports(function(reports)
      local host = flow.spawn(flow.task_group, function(group)
        group:spawn(function() flow.TaskCompletionSource().task:await() end)
        group:spawn(flow.sleep, 50)
      end)
      flow.yield()
      flow.yield()
      collect()
      flow.yield()
      assert.equal("TaskAbandoned", raised(host.await, host).name)
      for _, report in ipairs(reports) do assert.equal("TaskAbandoned", report.err.name) end
    end)
  end))

  it("and its group are reported when nothing can wake them", in_task(function()
    with_reports(function(reports)
      local weak = support.weak()
      weak[1] = flow.spawn(flow.task_group, function(group)
        group:spawn(function() flow.TaskCompletionSource().task:await() end)
      end)
      flow.yield()
      flow.yield()
      flow.yield()
      collect()
      collect()
      assert.equal(0, support.alive(weak))
      assert.is_true(#reports >= 1)
    end)
  end))

  it("in a group under a deadline is kept until that", in_task(function(clock)
    with_reports(function(reports)
      local host = flow.spawn(flow.with_timeout, 5, flow.task_group, function(group)
        group:spawn(function() flow.TaskCompletionSource().task:await() end)
      end)
      flow.sleep(1)
      collect()
      raises("Timeout", host.await, host)
      assert.equal(5, clock:now())
      assert.equal(0, #reports)
    end)
  end))

  it("under the grace of a stop is kept until that", in_task(function(clock)
    with_reports(function(reports)
      local group
      local host = flow.spawn(flow.task_group, function(g)
        group = g
        g:spawn(function() flow.TaskCompletionSource().task:await() end)
        g:stop()
        return "v"
      end, { grace = 5 })
      flow.yield()
      collect()
      assert.equal("v", host:await())
      assert.equal(5, clock:now())
      assert.equal(0, #reports)
      assert.is_true(group.is_stopping)
    end)
  end))
end)

describe("a group that hangs", function()
  it("with a queue is collected, with all that waits in it", in_task(function()
    with_reports(function(reports)
      for round = 1, many(20, 3) do
        local weak, closed = support.weak(), 0
        weak[1] = flow.spawn(flow.task_group, function(group)
          for i = 1, 3 do
            group:spawn(function()
              local _ <close> = closing(function() closed = closed + 1 end)
              local queued = group:spawn(flow.yield)
              if i == round % 3 then group:spawn(print, "never") end
              queued:await()
            end)
          end
          local _ <close> = closing(function() closed = closed + 1 end)
          flow.TaskCompletionSource().task:await()
        end, { limit = round % 2 + 1, policy = round % 5 > 0 and "supervise" or nil })
        flow.sleep(1)
        collect()
        collect()
        assert.equal(0, support.alive(weak))
        assert.equal(round % 2 + 2, closed)
      end
      assert.is_true(#reports > 0)
    end)
  end))
end)

describe("a group opened in a plain coroutine, or where Lua cannot yield,", function()
  it("is refused, as it could not wait for its children", in_task(function()
    local function open() flow.task_group(function() error("was called") end) end
    local err = raises("InvalidOperation", coroutine.wrap(open))
    assert.truthy(err.message:find("coroutine", 1, true))
    err = raises("InvalidOperation", string.gsub, "x", "x", open)
    assert.truthy(err.message:find("where Lua cannot yield", 1, true))
    raises("InvalidOperation", coroutine.wrap(flow.race), { flow.yield })
    assert.is_nil(flow.deadline())
  end))
end)

describe("the memory of groups", function()
  it("is given back", in_task(function()
    local n = many(300, 20)
    local grown = helper.growth(2 * n, n, function(i)
      pcall(flow.task_group, function(group)
        group:spawn(flow.yield)
        group:spawn(i % 3 == 0 and error or flow.yield, "x")
        group:spawn(flow.sleep, 0.1)
        if i % 5 == 0 then group:cancel() end
      end, { limit = i % 2 == 0 and 1 or nil, grace = 1 })
      pcall(flow.race, { function() flow.sleep(1) end, flow.yield })
    end)
    assert.is_true(grown < 20, grown)
  end))

  -- The group held its failed children, these their tokens, these the scopes, and these the group.
  it("is given back when children that have asked for their token fail", in_task(function()
    local function child()
      flow.cancellation_token()
      error("x", 0)
    end
    local n = many(200, 20)
    local grown = helper.growth(2 * n, n, function(i)
      pcall(flow.task_group, function(group)
        for _ = 1, 3 do group:spawn(child) end
      end, { policy = i % 2 == 0 and "supervise" or "fail_fast" })
    end)
    assert.is_true(grown < 20, grown)
  end))
end)

describe("race", function()
  it("returns the values of the first to succeed, cancels the others and waits for their end", in_task(function(clock)
    local closed = 0
    local values = table.pack(flow.race {
      function() return after(2, "a", nil, 3) end,
      function() fail("x", 1) end,
      function()
        local _ <close> = closing(function()
          flow.shield(flow.sleep, 1)
          closed = closed + 1
        end)
        flow.sleep(9)
      end,
    })
    assert.same({ n = 3, "a", nil, 3 }, values)
    assert.equal(1, closed)
    assert.equal(3, clock:now())
    assert.same({ n = 0 }, table.pack(flow.race { function() end }))
  end))

  it("calls nothing under an ambient token that has been canceled", in_task(function()
    local ran = false
    local task = flow.spawn(function()
      flow.current_task():cancel("enough")
      flow.race { function() ran = true end }
    end)
    assert.equal("enough", raises("OperationCanceled", flow.await, task).reason)
    assert.is_false(ran)
  end))

  it("tells the token that it was given in a coroutine that dies of it, too", in_task(function()
    local source <close> = flow.CancellationTokenSource(1)
    local co = flow.coroutine.create(function()
      flow.race({ function() flow.sleep(9) end }, { token = source.token })
    end)
    local _, err = flow.coroutine.resume(co)
    assert.equal(source.token, helper.is_error("OperationCanceled", err).token)
  end))

  it("raises an Aggregate when all failed", in_task(function()
    local err = raised(flow.race, { function() fail("b", 2) end, function() fail("a", 1) end })
    assert.same({ "a", "b" }, inner(err))
  end))

  it("keeps the winner's values, whatever happens meanwhile", in_task(function(clock)
    local source <close> = flow.CancellationTokenSource(2)
    local task = flow.spawn(flow.race, {
      function() return after(1, "winner") end,
      function() slow_end(3, "too late") end,
    }, { token = source.token })
    flow.sleep(1.5)
    task:cancel("outer")
    assert.equal("winner", task:await())
    assert.equal(4, clock:now())
  end))

  it("is canceled by the ambient token and the one that it is given", in_task(function(clock)
    raises("Timeout", flow.with_timeout, 1, flow.race, { function() flow.sleep(9) end })
    local source <close> = flow.CancellationTokenSource(1)
    raises("OperationCanceled", flow.race, { function() flow.sleep(9) end }, { token = source.token })
    local ran
    raises("OperationCanceled", flow.race, { function() ran = true end }, { token = source.token })
    assert.is_nil(ran)
    assert.equal(2, clock:now())
    assert.equal(1, flow.race({ function() return 1 end }, { token = flow.CancellationToken.none }))
  end))

  it("takes limit, and callable objects", in_task(function(clock)
    local list = {}
    for i = 1, 4 do list[i] = function() fail(i, 1) end end
    list[5] = setmetatable({}, { __call = function() return "last" end })
    assert.equal("last", flow.race(list, { limit = 2 }))
    assert.equal(2, clock:now())
  end))

  it("in a race", in_task(function(clock)
    assert.equal("fast", flow.race {
      function() return flow.race { function() return after(3, "slow") end } end,
      function() return flow.race { function() fail("x") end, function() return after(1, "fast") end } end,
    })
    assert.equal(1, clock:now())
  end))
end)

describe("misuse", function()
  local function f() end

  it("of arguments and options names them", in_task(function()
    bad_argument(1, "task_group", function() flow.task_group() end, "function")
    bad_argument(1, "task_group", function() flow.task_group({}) end, "function")
    bad_argument(1, "task_group", function() flow.task_group({ limit = 2 }, f) end, "options come second")
    bad_argument(2, "task_group", function() flow.task_group(f, 3) end, "options")
    bad_argument(2, "task_group", function() flow.task_group(f, { limits = 3 }) end, "limits")
    for _, limit in ipairs { 0, -1, 1.5, 0 / 0, "3", true } do
      bad_argument(2, "task_group", function() flow.task_group(f, { limit = limit }) end, "limit")
      bad_argument(2, "race", function() flow.race({ f }, { limit = limit }) end, "limit")
    end
    for _, policy in ipairs { "x", 1, true, false } do
      bad_argument(2, "task_group", function() flow.task_group(f, { policy = policy }) end, "policy")
    end
    for _, grace in ipairs { -1, 0 / 0, "1" } do
      bad_argument(2, "task_group", function() flow.task_group(f, { grace = grace }) end, "grace")
    end
    bad_argument(1, "race", function() flow.race() end, "list")
    bad_argument(1, "race", function() flow.race(f) end, "list")
    bad_argument(1, "race", function() flow.race({ limit = 2 }, { f }) end, "options come second")
    bad_argument(1, "race", function() flow.race { f, 1 } end, "2")
    bad_argument(2, "race", function() flow.race({ f }, 3) end, "options")
    bad_argument(2, "race", function() flow.race({ f }, { tokens = 1 }) end, "tokens")
    bad_argument(2, "race", function() flow.race({ f }, { token = 1 }) end, "token")
    helper.is_error("Argument", raised(flow.race, {}))
    assert.is_nil(flow.deadline())
  end))

  it("of methods names them, and leaves the group as it was", in_task(function()
    assert.equal("v", flow.task_group(function(group)
      bad_argument(2, "spawn", function() group.spawn(group) end, "function")
      bad_argument(1, "spawn", function() group:spawn(5) end, "function")
      for _, bad in ipairs { 5, "x", {}, flow.current_task(), false } do
        bad_argument(1, "spawn", function() group.spawn(bad, f) end, "TaskGroup")
        bad_argument(1, "cancel", function() group.cancel(bad) end, "TaskGroup")
        bad_argument(1, "stop", function() group.stop(bad) end, "TaskGroup")
        bad_argument(1, "wait_stopping", function() group.wait_stopping(bad) end, "TaskGroup")
      end
      assert.is_nil(group.nothing)
      assert.is_false(group.is_stopping)
      group:spawn(f)
      return "v"
    end))
  end))

  it("outside tasks names flow.run", function()
    for _, call in ipairs { function() flow.task_group(f) end, function() flow.race { f } end,
      function() flow.race({ f }, { token = flow.CancellationToken.canceled }) end } do
      assert.truthy(raises("InvalidOperation", call).message:find("flow.run", 1, true))
    end
  end)
end)

describe("a group that others close", function()
  local function closed_in(group)
    local _ <close> = group
    flow.yield()
  end

  it("is left as it is: it is for task_group to close it", in_task(function()
    local message = "task_group does, when its function returns"
    helper.is_error("InvalidOperation", raised(flow.task_group, function(group)
      group:spawn(closed_in, group)
      flow.sleep(1)
    end), message)
    helper.is_error("InvalidOperation", raised(flow.task_group, function(group) closed_in(group) end), message)
    local value = flow.task_group(function(group)
      helper.is_error("InvalidOperation", raised(closed_in, group), message)
      return group:spawn(function() return "alive" end):await()
    end)
    assert.equal("alive", value)
  end))

  it("tells who waits for its stop from outside when it has ended", in_task(function()
    local group, gate = nil, flow.TaskCompletionSource()
    local outside = flow.spawn(function()
      gate.task:await()
      return pcall(group.wait_stopping, group)
    end)
    flow.task_group(function(g)
      group = g
      gate:set_result()
      flow.sleep(1)
    end)
    local ok, err = outside:await()
    assert.is_false(ok)
    helper.is_error("InvalidOperation", err, "it will never be stopped")
  end))
end)

describe("a child", function()
  it("that returns as much as a stack holds does not keep its group waiting", function()
    local most = 1000000
    helper.in_task(function()
      flow.spawn(function()
        while not pcall(table.unpack, {}, 1, most) do most = most - 1 end
      end):await()
    end)()
    local failed = 0
    for less = 0, 40, 4 do
      local ok, err = pcall(flow.run, flow.task_group, function(group)
        group:spawn(function() return table.unpack({}, 1, most - less) end)
      end)
      if not ok then
        failed = failed + 1
        assert.truthy(tostring(err):find("stack overflow", 1, true), err)
      end
    end
    assert.is_true(failed > 0 and failed < 11)
  end)
end)

describe("a group deep down, in a coroutine that dies of an error", function()
  -- Calls fn(g) in a group, in the coroutine, below more others than catch errors; returns the group.
  local function dead_group(fn)
    local group
    local function nest(n)
      if n > 0 then return flow.task_group(function() return nest(n - 1) end) end
      local co = flow.coroutine.create(function()
        flow.task_group(function(g)
          group = g
          if fn then fn(g) end
          error("boom", 0)
        end)
      end)
      assert.same({ false, "boom" }, { flow.coroutine.resume(co) })
    end
    nest(33)
    collectgarbage()
    collectgarbage()
    return group
  end

  it("is closed: none of its tasks outlives it", in_task(function()
    local child
    dead_group(function(g) child = g:spawn(flow.sleep, 1) end)
    assert.is_true(child.is_canceled)
    assert.equal(0, flow.loop.now())
  end))

  it("has ended, for all that know it", in_task(function()
    local group = dead_group()
    raises("InvalidOperation", group.spawn, group, error, "it has run")
    assert.is_true(group.token.is_cancellation_requested)
    group:stop()
    group:cancel()
  end))

  it("can be collected, and its token after it", in_task(function()
    local token = dead_group().token
    collect()
    assert.is_true(token.is_cancellation_requested)
    token = nil -- luacheck: ignore 311
    collect()
  end))
end)
