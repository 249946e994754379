-- Ambient cancellation: with_timeout, with_cancellation, shield, task:cancel, the ambient token and deadline.

local flow = require "coflow"
local helper = require "spec.helper"
local support = require "spec.support.flow_support"

local in_task, recorder, closing = support.in_task, helper.recorder, helper.closing
local in_order = helper.in_order
local raises, bad_argument, raised = helper.raises, support.bad_argument, helper.raised
local with_reports, collect, many = support.with_reports, helper.collect, helper.many
local is_canceled = function(err) return helper.is_error("OperationCanceled", err) end

-- What suspends until something interrupts it: name -> function.
local function never() return flow.TaskCompletionSource().task end
local waits = {
  await = function() flow.await(never()) end,
  try_await = function() flow.try_await(never()) end,
  ["sleep for ever"] = function() flow.sleep(math.huge) end,
  ["a long sleep"] = function() flow.sleep(1e6) end,
  ["a sleep with a token"] = function()
    local source <close> = flow.CancellationTokenSource()
    flow.sleep(1e6, source.token)
  end,
  ["a delay"] = function() flow.delay(1e6):await() end,
  ["wait_async"] = function() never():wait_async():await() end,
  ["await_all"] = function() flow.await_all(never(), never()) end,
  ["await_any"] = function() flow.await_any(never(), never()) end,
  ["when_each"] = function() for _ in flow.when_each { never(), never() } do error("an item") end end,
  ["the wait for a token"] = function()
    local source <close> = flow.CancellationTokenSource()
    source.token:wait()
  end,
  ["wait_async of a token"] = function()
    local source <close> = flow.CancellationTokenSource()
    source.token:wait_async():await()
  end,
  ["a child"] = function() flow.spawn(flow.sleep, 1e6):await() end,
  ["a hot child"] = function() flow.async(flow.sleep)(1e6):await() end,
  ["a group"] = function() flow.task_group(function(group) group:spawn(flow.sleep, 1e6) end) end,
  ["a group that stops"] = function() flow.task_group(function(group) group:wait_stopping() end) end,
  ["a race"] = function() flow.race { function() flow.sleep(1e6) end } end,
  ["a nested scope"] = function() flow.with_timeout(1e7, flow.sleep, 1e6) end,
  ["a yield, again and again"] = function() while true do flow.sleep(0.01) flow.yield() end end,
  ["a continuation"] = function() never():continue_with(print):await() end,
}

describe("with_timeout", function()
  it("passes arguments and all values, nil included", in_task(function()
    local values = table.pack(flow.with_timeout(1, function(...) return ... end, 1, nil, 3, nil))
    assert.same({ n = 4, 1, nil, 3, nil }, values)
    assert.same({ n = 0 }, table.pack(flow.with_timeout(1, function() end)))
    assert.equal(7, flow.with_timeout(nil, function() return 7 end))
    assert.equal(7, flow.with_timeout(math.huge, function() return 7 end))
  end))

  for name, wait in pairs(waits) do
    it("ends at its deadline: " .. name, in_task(function(clock)
      local start, cleaned = clock:now(), 0
      local err = raises("Timeout", flow.with_timeout, 2, function()
        local _ <close> = closing(function(e)
          is_canceled(e)
          cleaned = cleaned + 1
        end)
        wait()
      end)
      assert.truthy(err.message:find("2"))
      assert.equal(start + 2, clock:now())
      assert.equal(1, cleaned)
      assert.is_nil(flow.deadline())
      flow.sleep(1) -- free of it
    end))
  end

  it("raises the body's own error as it is, before and after the deadline", in_task(function()
    local mine = {}
    assert.equal(mine, raised(flow.with_timeout, 1, function() error(mine) end))
    assert.equal(mine, raised(flow.with_timeout, 1, function()
      pcall(flow.sleep, 5)
      error(mine)
    end))
    local ok, err = pcall(flow.with_timeout, 1, function() error(nil) end)
    assert.is_false(ok)
    assert.is_nil(err)
  end))

  it("returns what a body returns that swallows the cancellation", in_task(function(clock)
    local start = clock:now()
    assert.equal("late", flow.with_timeout(1, function()
      assert.is_false(pcall(flow.sleep, 5))
      return "late"
    end))
    assert.equal(start + 1, clock:now())
  end))

  it("turns any OperationCanceled after its deadline into Timeout", in_task(function()
    raises("Timeout", flow.with_timeout, 1, function()
      pcall(flow.sleep, 5)
      error(flow.errors.OperationCanceled("my own"), 0)
    end)
    local mine = flow.errors.OperationCanceled("my own")
    assert.equal(mine, raised(flow.with_timeout, 1, error, mine, 0)) -- before it
  end))

  it("calls nothing for 0, and says Timeout, or that an outer scope is canceled", in_task(function()
    raises("Timeout", flow.with_timeout, 0, error, "was called")
    flow.spawn(function()
      flow.current_task():cancel("why")
      assert.equal("why", raises("OperationCanceled", flow.with_timeout, 0, error, "was called").reason)
    end):await()
  end))

  it("lets the nearest deadline win, and only the scope whose deadline it is say Timeout",
    in_task(function(clock)
      local log, note = recorder()
      local function scope(seconds, name, fn)
        local ok, err = pcall(flow.with_timeout, seconds, fn)
        note(clock:now(), name, ok, not ok and err.name)
        if not ok then error(err, 0) end
      end
      raises("Timeout", scope, 1, "outer", function() scope(5, "inner", function() flow.sleep(9) end) end)
      scope(5, "outer", function()
        raises("Timeout", scope, 1, "inner", function() flow.sleep(9) end)
        flow.sleep(1)
      end)
      raises("Timeout", scope, 2, "outer", function()
        raises("Timeout", scope, 1, "inner", function() flow.sleep(9) end)
        flow.sleep(9)
      end)
      assert.same({
        "1.0 inner false OperationCanceled", "1.0 outer false Timeout",
        "2.0 inner false Timeout", "3.0 outer true false",
        "4.0 inner false Timeout", "5.0 outer false Timeout",
      }, log)
    end))

  it("does not say Timeout for an earlier cancellation from outside", in_task(function(clock)
    local inner
    local task = flow.spawn(function()
      flow.with_timeout(2, function()
        local ok, err = pcall(flow.sleep, 9)
        inner = err
        flow.shield(flow.sleep, 5) -- its own deadline passes meanwhile
        assert.is_false(ok)
        error(err, 0)
      end)
    end)
    flow.sleep(1)
    assert.is_true(task:cancel("from outside"))
    local err = raises("OperationCanceled", task.await, task)
    assert.equal(inner, err)
    assert.equal("from outside", inner.reason)
    assert.is_true(task.is_canceled)
    assert.equal(6, clock:now())
  end))

  it("is level-triggered: each new suspension raises at once", in_task(function(clock)
    raises("Timeout", flow.with_timeout, 1, function()
      pcall(flow.sleep, 9)
      for _ = 1, 3 do
        for name, wait in pairs(waits) do
          assert.is_false(pcall(wait), name)
          assert.equal(1, clock:now(), name)
        end
        raises("OperationCanceled", flow.yield)
        raises("OperationCanceled", flow.sleep, 0)
      end
      flow.yield()
    end)
    flow.sleep(1) -- the children start, and end
  end))

  it("takes no notice where nothing suspends, nor of a task that is complete", in_task(function()
    assert.equal(5, flow.with_timeout(1, function()
      pcall(flow.sleep, 2)
      assert.is_true(flow.cancellation_token().is_cancellation_requested)
      assert.equal(3, flow.await(flow.Task.from_result(3)))
      return 5
    end))
  end))

  it("leaves no timer and no deadline behind when it ends early", in_task(function(clock)
    for _ = 1, 10 do flow.with_timeout(100, flow.sleep, 0.1) end
    for _ = 1, 10 do pcall(flow.with_timeout, 100, error, "x") end
    assert.is_false(flow.loop.is_alive())
    assert.is_true(math.abs(clock:now() - 1) < 1e-9)
  end))

  it("ends a wait that comes at the very deadline once, losing nothing", in_task(function()
    local source = flow.TaskCompletionSource()
    local setter = flow.spawn(function()
      flow.sleep(1)
      source:set_result("value")
    end)
    local ok, value = pcall(flow.with_timeout, 1, flow.await, source.task)
    assert.is_true(ok and value == "value" or not ok and value.name == "Timeout")
    setter:await()
    assert.equal("value", source.task:await())
  end))

  it("nests 10,000 deep: values, errors, deadlines and cancellation", in_task(function()
    local depth = many(10000)
    local function nested(n, fn)
      if n == 0 then return fn() end
      local value = flow.with_timeout(n % 2 == 0 and 100 + n or nil, nested, n - 1, fn)
      return value
    end
    assert.equal(102, nested(depth, flow.deadline))
    assert.equal("mine", raised(nested, depth, function() error("mine", 0) end))
    raises("Timeout", nested, depth, function() flow.sleep(1e6) end)
    local task = flow.spawn(nested, depth, function() flow.sleep(50) end)
    flow.sleep(1)
    task:cancel("enough")
    assert.equal("enough", raises("OperationCanceled", task.await, task).reason)
  end))

end)

describe("the deadline", function()
  it("is the time left to the nearest, nil under a shield and outside", in_task(function()
    assert.is_nil(flow.deadline())
    flow.with_timeout(10, function()
      assert.equal(10, flow.deadline())
      flow.with_timeout(20, function() assert.equal(10, flow.deadline()) end)
      flow.with_timeout(5, function()
        flow.sleep(1)
        assert.equal(4, flow.deadline())
        flow.shield(function() assert.is_nil(flow.deadline()) end)
        flow.shield({ grace = 2 }, function() assert.equal(2, flow.deadline()) end)
        assert.equal(4, flow.spawn(flow.deadline):await())
      end)
      assert.equal(9, flow.deadline())
    end)
  end))

  it("is never negative", in_task(function()
    pcall(flow.with_timeout, 1, function()
      flow.shield(flow.sleep, 3)
      assert.equal(0, flow.deadline())
    end)
  end))

  it("is nil outside every task, and in a callback there", function()
    assert.is_nil(flow.deadline())
    assert.equal(flow.CancellationToken.none, flow.cancellation_token())
  end)
end)

describe("the ambient token", function()
  it("is the task's own: the same each time, canceled by task:cancel", in_order(function()
    local task = flow.spawn(function()
      local token = flow.cancellation_token()
      assert.equal(token, flow.cancellation_token())
      assert.is_true(token.can_be_canceled)
      assert.is_false(token.is_cancellation_requested)
      local err = raised(flow.sleep, 9)
      assert.equal(token, err.token)
      assert.equal(token, err.cause)
      assert.equal("the reason", err.reason)
      assert.equal("the reason", token.reason)
      assert.is_true(token.is_cancellation_requested)
      error(err, 0)
    end)
    flow.yield()
    assert.is_true(task:cancel("the reason"))
    assert.is_false(task:cancel("another"))
    assert.equal("the reason", raises("OperationCanceled", task.await, task).reason)
  end))

  it("is another one in each scope and each task, canceled with those above, not below", in_task(function()
    local outer, inner, child
    local task = flow.spawn(function()
      outer = flow.cancellation_token()
      child = flow.spawn(function()
        child = flow.cancellation_token()
        local err = raised(flow.sleep, 9)
        assert.equal(child, err.token)
        assert.equal(outer, err.cause)
      end)
      flow.with_timeout(50, function()
        inner = flow.cancellation_token()
        local err = raised(flow.sleep, 9)
        assert.equal(inner, err.token)
        assert.equal(outer, err.cause)
        assert.equal(5, err.reason)
      end)
      assert.is_false(rawequal(outer, inner) or rawequal(inner, child))
    end)
    flow.sleep(1)
    task:cancel(5)
    task:await()
    assert.is_true(outer.is_cancellation_requested and inner.is_cancellation_requested)
    flow.yield()
    assert.is_true(child.is_cancellation_requested)
  end))

  it("of an ended scope stays as it was, and harmless", in_task(function()
    local token
    flow.with_timeout(5, function() token = flow.cancellation_token() end)
    flow.sleep(10)
    assert.is_false(token.is_cancellation_requested)
    local registration = token:register(error)
    assert.is_true(registration:unregister())
    local source <close> = flow.CancellationTokenSource.linked(token)
    assert.is_false(source.is_cancellation_requested)
  end))

  it("runs callbacks newest first, in the context of their registration", in_order(function()
    local log, note = recorder()
    local where = flow.AsyncLocal()
    local task = flow.spawn(function()
      where.value = "task"
      flow.cancellation_token():register(function() note("outer", where.value) end)
      flow.with_timeout(9, function()
        where.value = "inside"
        flow.cancellation_token():register(note, "first")
        flow.cancellation_token():register(function() note("second", where.value) end)
        flow.sleep(9)
      end)
    end)
    flow.yield()
    task:cancel()
    assert.equal(3, #log)
    table.sort(log)
    assert.same({ "first", "outer task", "second inside" }, log)
    assert.is_false(flow.try_await(task))
  end))

  it("gives the errors of callbacks to who cancels, as one Aggregate; all run", in_order(function()
    local log, note = recorder()
    local task = flow.spawn(function()
      flow.cancellation_token():register(error, "a", 0)
      flow.cancellation_token():register(note, "b")
      flow.cancellation_token():register(error, "c", 0)
      flow.sleep(9)
    end)
    flow.yield()
    assert.same({ "c", "a" }, helper.inner(raised(task.cancel, task)))
    assert.same({ "b" }, log)
    assert.is_false(task:cancel())
    raises("OperationCanceled", task.await, task)
  end))

  it("is a Timeout for the message handler of xpcall, too, and for what it makes of it", in_task(function()
    local function named(err) return flow.errors.is(err, "Timeout") and "late" or err end
    local function boxed(err) return { err } end
    local function sleeper() flow.with_timeout(1, flow.sleep, 9) end
    local function deep() flow.with_timeout(1, function() flow.with_timeout(5, flow.sleep, 9) end) end
    for _, fn in ipairs { sleeper, deep } do
      assert.equal("late", select(2, xpcall(fn, named)))
      assert.is_true(flow.errors.is(select(2, xpcall(fn, boxed))[1], "Timeout"))
      assert.matches("^Timeout: ", select(2, xpcall(fn, tostring)))
      assert.equal("late", select(3, xpcall(xpcall, named, fn, named)))
    end
  end))

  it("is no Timeout where somebody has caught it, and raised something else", in_task(function()
    local function raising() flow.with_timeout(1, function()
      pcall(flow.sleep, 9)
      error("mine", 0)
    end) end
    local function handled() flow.with_timeout(1, function()
      error(select(2, xpcall(flow.sleep, tostring, 9)), 0)
    end) end
    assert.equal("mine", select(2, xpcall(raising, tostring)))
    assert.matches("^OperationCanceled: ", select(2, xpcall(handled, tostring)))
    assert.equal("mine", select(2, pcall(raising)))
  end))

  it("runs its callbacks in the order of equal deadlines, between those of sources", in_order(function()
    local log, note = recorder()
    local first = flow.CancellationTokenSource(1)
    first.token:register(note, "first")
    local scope = flow.spawn(flow.with_timeout, 1, function()
      flow.cancellation_token():register(note, "scope")
      flow.sleep(9)
    end)
    flow.yield()
    local last = flow.CancellationTokenSource(1)
    last.token:register(note, "last")
    raises("Timeout", flow.await, scope)
    flow.sleep(1)
    assert.same({ "first", "scope", "last" }, log)
  end))

  it("reports the errors of callbacks that a deadline runs", in_task(function()
    with_reports(function(reports)
      raises("Timeout", flow.with_timeout, 1, function()
        flow.cancellation_token():register(error, "x", 0)
        flow.sleep(9)
      end)
      flow.yield()
      assert.equal(1, #reports)
      assert.same({ "x" }, helper.inner(reports[1].err))
      assert.is_nil(reports[1].task)
    end)
  end))

  it("has callbacks that start tasks, cancel other scopes, close things, raise and unregister", in_order(function()
    local log, note = recorder()
    local second = flow.spawn(function()
      local _ <close> = closing(function() note("second closed") end)
      flow.sleep(9)
    end)
    local first = flow.spawn(function()
      local token = flow.cancellation_token()
      local early = token:register(note, "never")
      token:register(function()
        early:unregister()
        second:cancel("by the first")
        flow.spawn(note, "started")
        local co = coroutine.create(function()
          local _ <close> = closing(function() note("coroutine closed") end)
          coroutine.yield()
        end)
        coroutine.resume(co)
        coroutine.close(co)
        helper.is_error("InvalidOperation", raised(flow.sleep, 1))
      end)
      flow.sleep(9)
    end)
    flow.yield()
    first:cancel()
    assert.is_false(flow.try_await(first))
    local ok, err = flow.try_await(second)
    assert.is_false(ok)
    assert.equal("by the first", err.reason)
    flow.yield()
    table.sort(log)
    assert.same({ "coroutine closed", "second closed", "started" }, log)
  end))

  it("can be waited for, by the task itself as well", in_task(function()
    local task = flow.spawn(function()
      flow.cancellation_token():wait()
      flow.with_timeout(5, function() flow.cancellation_token():wait() end)
      return "told"
    end)
    flow.sleep(1)
    task:cancel()
    assert.equal("told", task:await())
  end))

  it("wakes a wait that is told by a deadline", in_task(function(clock)
    assert.equal("told", flow.with_timeout(2, function()
      flow.cancellation_token():wait()
      return "told"
    end))
    assert.equal(2, clock:now())
  end))

  it("registers at once, and takes linked sources along", in_order(function()
    local source
    local task = flow.spawn(function()
      source = flow.CancellationTokenSource.linked(flow.cancellation_token())
      flow.sleep(9)
    end)
    flow.yield()
    task:cancel("r")
    assert.is_true(source.is_cancellation_requested)
    assert.equal("r", source.token.reason)
    local called
    source.token:register(function() called = true end)
    assert.is_true(called)
    flow.try_await(task)
    source:dispose()
  end))
end)

describe("with_cancellation", function()
  it("adds a token to the ambient one", in_task(function()
    local source <close> = flow.CancellationTokenSource()
    local task = flow.spawn(function()
      local err = raised(flow.with_cancellation, source.token, function()
        local e = raised(flow.sleep, 9)
        assert.equal(flow.cancellation_token(), e.token)
        assert.equal(source.token, e.cause)
        assert.equal("why", e.reason)
        raises("OperationCanceled", flow.sleep, 0)
        error(e, 0)
      end)
      is_canceled(err)
      flow.sleep(1) -- free of it
      return "went on"
    end)
    flow.yield()
    source:cancel("why")
    assert.equal("went on", task:await())
    local own = flow.spawn(flow.with_cancellation, flow.CancellationToken.none, flow.sleep, 9)
    flow.yield()
    own:cancel()
    raises("OperationCanceled", own.await, own)
  end))

  it("calls nothing under a token that is canceled already, and raises with that token", in_task(function()
    local source <close> = flow.CancellationTokenSource()
    source:cancel("early")
    local err = raises("OperationCanceled", flow.with_cancellation, source.token, error, "was called")
    assert.equal(source.token, err.token)
    assert.equal("early", err.reason)
    raises("OperationCanceled", flow.with_cancellation, flow.CancellationToken.canceled, error, "called")
  end))

  it("passes values, nil included, and errors", in_task(function()
    local source <close> = flow.CancellationTokenSource()
    assert.same({ n = 3, nil, 2, nil }, table.pack(flow.with_cancellation(source.token,
      function(...) return ... end, nil, 2, nil)))
    assert.equal("x", raised(flow.with_cancellation, source.token, error, "x", 0))
  end))

  it("leaves nothing registered on the token", in_task(function()
    local source <close> = flow.CancellationTokenSource()
    local weak = support.weak()
    for i = 1, 20 do
      flow.with_cancellation(source.token, function() weak[i] = flow.cancellation_token() end)
    end
    assert.equal(0, support.alive(weak))
    source:cancel()
    flow.sleep(1)
  end))

  it("never says Timeout", in_task(function()
    local source <close> = flow.CancellationTokenSource(1)
    raises("OperationCanceled", flow.with_cancellation, source.token, flow.sleep, 9)
    local second <close> = flow.CancellationTokenSource(1)
    raises("OperationCanceled", flow.with_timeout, 5, flow.with_cancellation, second.token, flow.sleep, 9)
  end))

  it("takes a disposed source as one that never cancels", in_task(function()
    local source = flow.CancellationTokenSource()
    local token = source.token
    source:dispose()
    assert.equal(1, flow.with_cancellation(token, function()
      flow.sleep(1)
      return 1
    end))
  end))

  it("nests 10,000 deep", in_task(function()
    local source <close> = flow.CancellationTokenSource()
    local function nested(n)
      if n == 0 then return flow.sleep(9) end
      local value = flow.with_cancellation(source.token, nested, n - 1)
      return value
    end
    local task = flow.spawn(nested, many(10000))
    flow.sleep(1)
    source:cancel("all")
    assert.equal("all", raises("OperationCanceled", task.await, task).reason)
  end))
end)

describe("shield", function()
  it("hides token and deadline, and passes values and errors", in_task(function(clock)
    local task = flow.spawn(function()
      local ok = pcall(flow.sleep, 9)
      assert.is_false(ok)
      assert.equal(3, select("#", flow.shield(function(...)
        assert.equal(flow.CancellationToken.none, flow.cancellation_token())
        assert.is_nil(flow.deadline())
        flow.sleep(2)
        flow.yield()
        flow.spawn(flow.sleep, 1):await()
        return ...
      end, 1, nil, nil)))
      assert.equal("x", raised(flow.shield, error, "x", 0))
      local function count(...) return select("#", ...) end -- no argument more than it was given
      assert.equal(0, flow.shield(count))
      assert.equal(0, flow.shield({ grace = 1 }, count))
      raises("OperationCanceled", flow.yield)
    end)
    flow.sleep(1)
    task:cancel()
    task:await()
    assert.equal(4, clock:now())
  end))

  it("keeps a wait inside going that a cancellation meets", in_task(function(clock)
    local task = flow.spawn(function()
      flow.with_timeout(1, function()
        flow.shield(flow.sleep, 5)
        flow.sleep(1)
      end)
    end)
    raises("Timeout", task.await, task)
    assert.equal(5, clock:now())
  end))

  it("is bounded by its grace, and raises OperationCanceled after it, never Timeout", in_task(function(clock)
    local err = raises("OperationCanceled", flow.shield, { grace = 2 }, function()
      local token = flow.cancellation_token()
      assert.is_true(token.can_be_canceled)
      local e = raised(flow.sleep, 9)
      assert.equal(token, e.token)
      raises("OperationCanceled", flow.yield)
      error(e, 0)
    end)
    is_canceled(err)
    assert.equal(2, clock:now())
    raises("OperationCanceled", flow.shield, { grace = 0 }, flow.sleep, 1)
    assert.equal(2, clock:now())
    assert.equal(5, flow.shield({ grace = math.huge }, function() return 5 end))
    assert.equal(6, flow.shield({}, function() return 6 end))
    flow.sleep(1)
  end))

  it("lets <close> handlers await while a cancellation unwinds", in_task(function(clock)
    local log, note = recorder()
    raises("Timeout", flow.with_timeout, 1, function()
      local _ <close> = closing(function()
        raises("OperationCanceled", flow.sleep, 1)
        flow.shield(flow.sleep, 2)
        note("outer", clock:now())
      end)
      local _ <close> = closing(function()
        flow.shield({ grace = 1 }, function()
          raises("OperationCanceled", flow.sleep, 5)
        end)
        note("inner", clock:now())
      end)
      flow.sleep(9)
    end)
    assert.same({ "inner 2.0", "outer 4.0" }, log)
  end))

  it("holds scopes of its own inside", in_task(function(clock)
    local task = flow.spawn(function()
      pcall(flow.sleep, 9)
      return flow.shield(function()
        raises("Timeout", flow.with_timeout, 1, flow.sleep, 9)
        return flow.task_group(function(group)
          local child = group:spawn(function()
            flow.sleep(1)
            return "from a group"
          end)
          return child:await()
        end)
      end)
    end)
    flow.yield()
    task:cancel()
    assert.equal("from a group", task:await())
    assert.equal(2, clock:now())
  end))

  it("nests 10,000 deep", in_task(function()
    local function nested(n)
      if n == 0 then return flow.cancellation_token() end
      local value = flow.shield(nested, n - 1)
      return value
    end
    assert.equal(flow.CancellationToken.none, nested(many(10000)))
  end))
end)

describe("task:cancel", function()
  it("is true if new, false for a task that is complete or a completion source's", in_task(function()
    assert.is_false(flow.Task.from_result(1):cancel())
    assert.is_false(flow.TaskCompletionSource().task:cancel())
    local task = flow.spawn(flow.sleep, 9)
    assert.is_true(task:cancel())
    assert.is_false(task:cancel())
    raises("OperationCanceled", task.await, task)
    assert.is_false(task:cancel())
    assert.equal("canceled", task.status)
    assert.is_nil(task.exception)
  end))

  it("lets a task that has not started start, and meet it at its first suspension", in_order(function()
    local log, note = recorder()
    local function body(name)
      note(name, "started")
      local _ <close> = closing(function() note(name, "closed") end)
      flow.yield()
      note(name, "went on")
    end
    local queued = flow.spawn(body, "queued")
    queued:cancel("q")
    local cold = flow.Task.new(body, "cold")
    assert.is_true(cold:cancel("c"))
    assert.equal("created", cold.status)
    cold:start()
    local other = flow.Task.new(body, "other")
    other:cancel()
    other:run_synchronously()
    for _, task in ipairs { queued, cold, other } do raises("OperationCanceled", task.await, task) end
    assert.same({ "other started", "other closed", "queued started", "queued closed", "cold started",
      "cold closed" }, log)
  end))

  it("reaches what a task started, and not what started it", in_task(function()
    local grandchild, child
    local task = flow.spawn(function()
      child = flow.spawn(function()
        grandchild = flow.spawn(flow.sleep, 9)
        flow.sleep(9)
      end)
      flow.sleep(9)
    end)
    local free = flow.spawn(function()
      flow.sleep(1)
      return "free"
    end)
    flow.sleep(0.5)
    task:cancel("r")
    for _, t in ipairs { task, child, grandchild } do
      assert.equal("r", raises("OperationCanceled", t.await, t).reason)
    end
    assert.equal("free", free:await())
  end))

  it("from inside: the next suspension raises", in_task(function()
    local task = flow.spawn(function()
      assert.is_true(flow.current_task():cancel("mine"))
      assert.is_true(flow.cancellation_token().is_cancellation_requested)
      assert.equal("mine", raised(flow.yield).reason)
      return 1
    end)
    assert.equal(1, task:await())
  end))

  it("cancels operations, and leaves their inputs", in_task(function()
    local source = flow.TaskCompletionSource()
    local list = { flow.delay(9), source.task:wait_async(9), flow.when_all(source.task),
      flow.when_any(source.task), source.task:wait_async() }
    for i, task in ipairs(list) do
      assert.is_true(task:cancel("r"), "operation " .. i)
      assert.is_false(task:cancel("r"), "operation " .. i)
      assert.equal("r", raises("OperationCanceled", task.await, task).reason)
      assert.is_true(task.is_canceled)
    end
    assert.is_false(flow.loop.is_alive())
    source:set_result(1)
    assert.equal(1, source.task:await())
  end))

  it("loses no value that came first", in_order(function()
    local source = flow.TaskCompletionSource()
    local got
    local task = flow.spawn(function()
      got = source.task:await()
      flow.yield()
    end)
    flow.yield()
    source:set_result("value")
    task:cancel()
    raises("OperationCanceled", task.await, task)
    assert.equal("value", got)
    -- and the other way round
    local second = flow.TaskCompletionSource()
    local late = flow.spawn(flow.await, second.task)
    flow.yield()
    late:cancel()
    second:set_result("kept")
    raises("OperationCanceled", late.await, late)
    assert.equal("kept", second.task:await())
  end))

  it("meets a body that swallows it with pcall, not with flow.pcall", in_task(function()
    local count = 0
    local stubborn = flow.spawn(function()
      for _ = 1, 100 do
        pcall(flow.sleep, 9)
        count = count + 1
      end
      return "returned"
    end)
    local polite = flow.spawn(function()
      flow.pcall(flow.sleep, 9)
      error("not reached")
    end)
    flow.yield()
    stubborn:cancel()
    polite:cancel()
    assert.equal("returned", stubborn:await())
    assert.equal(100, count)
    raises("OperationCanceled", polite.await, polite)
  end))

  it("during an await that runs its task in place", in_task(function()
    local task
    task = flow.spawn(function()
      local child = flow.spawn(function()
        task:cancel("by my child")
        return "child"
      end)
      local ok, err = pcall(flow.await, child)
      assert.is_false(ok)
      assert.equal("by my child", err.reason)
      assert.equal("child", child:await())
      return "done"
    end)
    assert.equal("done", task:await())
  end))

  it("in the depth of async functions that call each other", in_task(function()
    local depth, closed, root = many(2000), 0, nil
    local down
    down = flow.async(function(n)
      local _ <close> = closing(function() closed = closed + 1 end)
      if n == 0 then
        root:cancel("at the bottom")
        flow.yield()
        error("not reached")
      end
      down(n - 1):await()
    end)
    root = flow.Task.new(function() down(depth):await() end)
    root:start()
    assert.equal("at the bottom", raises("OperationCanceled", root.await, root).reason)
    assert.equal(depth + 1, closed)
  end))

  it("from a value_changed handler, a finalizer and a <close> handler", in_task(function()
    local victims = {}
    for i = 1, 3 do victims[i] = flow.spawn(flow.sleep, 9) end
    flow.yield()
    local watched = flow.AsyncLocal { value_changed = function() victims[1]:cancel(1) end }
    watched.value = 1
    setmetatable({}, { __gc = function() victims[2]:cancel(2) end })
    collect()
    do
      local _ <close> = closing(function() victims[3]:cancel(3) end)
    end
    for i = 1, 3 do
      assert.equal(i, raises("OperationCanceled", victims[i].await, victims[i]).reason)
    end
    watched.value = nil
  end))

  it("of the running task from its own finalizers and handlers", in_task(function()
    local task = flow.spawn(function()
      local me = flow.current_task()
      setmetatable({}, { __gc = function() me:cancel("finalized") end })
      for _ = 1, 10 do
        collectgarbage()
        if flow.cancellation_token().is_cancellation_requested then break end
      end
      flow.sleep(1)
    end)
    assert.equal("finalized", raises("OperationCanceled", task.await, task).reason)
  end))

  it("leaves a finished task in a canceled scope alone, without a busy loop", in_task(function(clock)
    local child
    local task = flow.spawn(function()
      child = flow.spawn(function() return "done before" end)
      pcall(flow.sleep, 9)
      flow.shield(flow.sleep, 3)
    end)
    flow.sleep(1)
    task:cancel()
    task:await()
    assert.equal("done before", child:await())
    assert.equal(4, clock:now())
    assert.is_false(flow.loop.is_alive())
  end))
end)

describe("none", function()
  local none = flow.CancellationToken.none

  it("opts an operation out of the ambient token", in_task(function(clock)
    local source <close> = flow.CancellationTokenSource(3)
    local task = flow.spawn(function()
      flow.current_task():cancel()
      flow.sleep(1, none)
      raises("OperationCanceled", flow.sleep, 1)
      flow.sleep(0, none)
      local delay = flow.delay(9, none)
      raises("OperationCanceled", delay.await, delay)
      assert.equal("waiting_for_activation", delay.status)
      delay:cancel()
      source.token:wait(none)
      raises("OperationCanceled", flow.yield)
      return clock:now()
    end)
    assert.equal(3, task:await())
  end))

  it("also when the cancellation comes while it waits", in_task(function(clock)
    local source <close> = flow.CancellationTokenSource(4)
    local task = flow.spawn(function()
      flow.sleep(2, none)
      source.token:wait(none)
      return clock:now()
    end)
    flow.sleep(1)
    task:cancel()
    assert.equal(4, task:await())
    local waiting = flow.spawn(function()
      local source_task = flow.delay(2, none):wait_async(5, none)
      flow.current_task():cancel()
      raises("OperationCanceled", source_task.await, source_task)
      return source_task
    end):await()
    waiting:await()
  end))
end)

describe("what was started inside a scope and outlives it", function()
  it("is free of the ended scope's deadline and token", in_task(function(clock)
    local source <close> = flow.CancellationTokenSource()
    local function start() return flow.spawn(function()
      flow.sleep(5)
      return flow.deadline()
    end) end
    local list = { flow.with_timeout(1, start), flow.with_cancellation(source.token, start), flow.shield(start),
      flow.shield({ grace = 1 }, start) }
    source:cancel()
    for _, task in ipairs(list) do assert.is_nil(task:await()) end
    assert.equal(5, clock:now())
  end))

  it("stays under the outer token and deadline", in_task(function(clock)
    local inner
    raises("Timeout", flow.with_timeout, 3, function()
      inner = flow.with_timeout(1, flow.async(function()
        local deeper = flow.spawn(function() flow.sleep(9) end)
        assert.equal(1, flow.deadline())
        flow.sleep(0.5)
        assert.equal(2.5, flow.deadline())
        deeper:await()
      end))
      inner:await()
    end)
    raises("OperationCanceled", inner.await, inner)
    assert.equal(3, clock:now())
  end))

  it("stays canceled if the scope was", in_task(function()
    local child
    raises("Timeout", flow.with_timeout, 1, function()
      child = flow.spawn(function()
        pcall(flow.sleep, 9)
        flow.shield(flow.sleep, 5)
        flow.sleep(1)
      end)
      flow.sleep(9)
    end)
    raises("OperationCanceled", child.await, child)
  end))

  it("holds operations to the same", in_task(function(clock)
    local delay = flow.with_timeout(1, flow.delay, 5)
    local wait = flow.with_timeout(1, delay.wait_async, delay, 9)
    local continuation = flow.with_timeout(1, delay.continue_with, delay, function()
      flow.sleep(1)
      return "continued"
    end)
    delay:await()
    wait:await()
    assert.equal("continued", continuation:await())
    assert.equal(6, clock:now())
  end))

  it("is detached under suppress_flow", in_task(function()
    local child
    local task = flow.spawn(function()
      local _ <close> = flow.ExecutionContext.suppress_flow()
      child = flow.spawn(function()
        flow.sleep(2)
        return "free"
      end)
      flow.sleep(9)
    end)
    flow.sleep(1)
    task:cancel()
    raises("OperationCanceled", task.await, task)
    assert.equal("free", child:await())
  end))

  -- How the memory in use grows over the last of these generations, each started by the one before.
  local function growth(generations, step)
    local done, marks = flow.TaskCompletionSource(), {}
    local function generation(n)
      if n == 0 then return done:set_result() end
      step(function() return flow.spawn(generation, n - 1) end)
      if n % (generations // 5) == 0 then
        collectgarbage()
        collectgarbage()
        marks[#marks + 1] = collectgarbage("count")
      end
    end
    flow.spawn(generation, generations)
    done.task:await()
    flow.sleep(0.1)
    return marks[#marks] - marks[2]
  end

  local steps = {
    ["plain"] = function(start) start() end,
    ["a token asked for"] = function(start)
      flow.cancellation_token()
      start()
    end,
    ["with_timeout"] = function(start) flow.with_timeout(10, start) end,
    ["with_timeout that goes on"] = function(start)
      flow.with_timeout(10, function()
        start()
        flow.yield()
        flow.yield()
      end)
    end,
    ["with_cancellation"] = function(start)
      local source <close> = flow.CancellationTokenSource()
      flow.with_cancellation(source.token, start)
    end,
    ["shield"] = function(start) flow.shield(start) end,
    ["task_group"] = function(start) flow.task_group(start) end,
    ["a child of its own"] = function(start)
      flow.spawn(flow.yield)
      start()
    end,
    ["an operation"] = function(start)
      flow.delay(0.001):await()
      start()
    end,
    ["a continuation"] = function(start) flow.Task.completed_task:continue_with(start) end,
    ["an async function"] = function(start) flow.async(start)() end,
    ["a cold task"] = function(start) flow.Task.new(start):start() end,
  }
  for name, step in pairs(steps) do
    it("leaves a small tree after many generations: " .. name, in_task(function()
      local grown = growth(many(name == "plain" and 100000 or 20000, 500), step)
      assert.is_true(grown < 60, name .. " grew by " .. grown .. " KB")
    end))
  end
end)

describe("a parked task", function()
  -- Runs fn(park), where park(wait, ...) starts a task that parks; returns how many of them were reported.
  local function reported(fn)
    local count
    with_reports(function(reports)
      fn()
      collect()
      count = 0
      for _, report in ipairs(reports) do
        if flow.errors.is(report.err, "TaskAbandoned") then count = count + 1 end
      end
    end)
    return count
  end
  local function park()
    local _ <close> = closing(function() end)
    never():await()
  end

  it("is not kept by a token, ambient or given", in_task(function()
    local source <close> = flow.CancellationTokenSource()
    assert.equal(5, reported(function()
      flow.spawn(park)
      flow.spawn(flow.with_cancellation, source.token, park)
      flow.spawn(flow.sleep, math.huge)
      flow.spawn(flow.sleep, math.huge, source.token)
      flow.spawn(function() never():wait_async(nil, source.token):await() end)
      flow.yield()
      flow.yield()
    end))
  end))

  it("is kept by a deadline above it until that passes", in_task(function()
    local log, note = recorder()
    assert.equal(0, reported(function()
      flow.spawn(function()
        local _, err = pcall(flow.with_timeout, 5, park)
        note(err.name)
      end)
      flow.yield()
      collect()
    end))
    flow.sleep(10)
    assert.same({ "Timeout" }, log)
    assert.equal(0, reported(function()
      flow.spawn(function()
        flow.with_timeout(5, function() flow.await(flow.spawn(park)) end)
      end)
      flow.yield()
      flow.yield()
    end))
    flow.sleep(10)
  end))

  it("is kept by cancel_after armed before it parked, and after", in_task(function()
    local before, after = flow.CancellationTokenSource(), flow.CancellationTokenSource()
    local linked = flow.CancellationTokenSource.linked(flow.CancellationTokenSource.linked(after.token).token)
    before:cancel_after(5)
    local log, note = recorder()
    local held = {} -- until the deadline is armed
    local function start(token, name, wait, ...)
      local arguments = table.pack(...)
      held[#held + 1] = flow.spawn(function()
        local ok = pcall(flow.with_cancellation, token, wait, table.unpack(arguments, 1, arguments.n))
        note(name, ok)
      end)
    end
    assert.equal(0, reported(function()
      start(before.token, "before", park)
      start(after.token, "after", park)
      start(linked.token, "linked", park)
      start(flow.CancellationToken.none, "sleep", flow.sleep, math.huge, linked.token)
      start(flow.CancellationToken.none, "wait", function() never():wait_async(nil, linked.token):await() end)
      flow.yield()
      flow.yield()
      after:cancel_after(6)
      held = {}
    end))
    flow.sleep(10)
    table.sort(log)
    assert.same({ "after false", "before false", "linked false", "sleep false", "wait false" }, log)
    linked:dispose()
  end))

  it("is kept until the deadline that has passed has reached it", in_task(function()
    local log, note = recorder()
    local source = flow.CancellationTokenSource(5)
    local linked = flow.CancellationTokenSource.linked(source.token)
    source.token:register(collectgarbage) -- runs before the linked one is canceled
    assert.equal(0, reported(function()
      flow.spawn(function() note((pcall(flow.with_cancellation, linked.token, park))) end)
      flow.spawn(function() note((pcall(flow.sleep, math.huge, linked.token))) end)
      flow.spawn(function()
        raises("Timeout", flow.with_timeout, 5, function()
          local own = flow.CancellationTokenSource.linked(flow.cancellation_token())
          flow.cancellation_token():register(collectgarbage)
          local _ <close> = flow.ExecutionContext.suppress_flow()
          flow.spawn(function() note((pcall(flow.with_cancellation, own.token, park))) end)
          flow.sleep(9)
        end)
      end)
      flow.sleep(10)
    end))
    assert.same({ "false", "false", "false" }, log)
    linked:dispose()
  end))

  it("is let go when the deadline is disarmed", in_task(function()
    local source = flow.CancellationTokenSource(50)
    local linked = flow.CancellationTokenSource.linked(source.token)
    assert.equal(0, reported(function()
      flow.spawn(flow.with_cancellation, source.token, park)
      flow.spawn(flow.with_cancellation, linked.token, park)
      flow.spawn(flow.with_cancellation, linked.token, function() flow.await(flow.spawn(park)) end)
      flow.spawn(flow.sleep, math.huge, linked.token)
      flow.spawn(function() never():wait_async(nil, linked.token):await() end)
      flow.yield()
      flow.yield()
    end))
    assert.equal(6, reported(function() source:cancel_after(math.huge) end))
    linked:dispose()
    source:dispose()
  end))

  it("is let go when it is armed and disarmed many times, or the source is disposed", in_task(function()
    local source = flow.CancellationTokenSource()
    assert.equal(0, reported(function()
      local held = flow.spawn(flow.with_cancellation, source.token, park)
      flow.yield()
      for i = 1, 5 do
        source:cancel_after(i)
        source:cancel_after(math.huge)
      end
      source:cancel_after(50)
      assert.is_false(held.is_completed)
    end))
    assert.equal(1, reported(function() source:dispose() end))
  end))

  it("is kept as long as one of two deadlines is armed", in_task(function()
    local a, b = flow.CancellationTokenSource(50), flow.CancellationTokenSource(60)
    assert.equal(0, reported(function()
      flow.spawn(flow.with_cancellation, a.token, flow.with_cancellation, b.token, park)
      flow.spawn(flow.with_cancellation, b.token, flow.with_cancellation, a.token, park)
      flow.yield()
      a:cancel_after(math.huge)
    end))
    assert.equal(2, reported(function() b:cancel_after(math.huge) end))
    a:dispose()
    b:dispose()
  end))

  it("is let go when the scope that kept it ends", in_task(function()
    assert.equal(1, reported(function()
      flow.with_timeout(50, function()
        flow.spawn(park)
        flow.yield()
        collect()
      end)
    end))
    assert.equal(1, reported(function()
      flow.with_timeout(50, function() flow.spawn(flow.shield, park) end)
      flow.yield()
    end))
  end))

  it("that is abandoned inside scopes runs its <close> handlers, and leaves none", in_task(function()
    local log, note = recorder()
    assert.equal(1, reported(function()
      flow.spawn(function()
        local _ <close> = closing(function() note("outer", flow.deadline()) end)
        flow.with_cancellation(flow.CancellationToken.none, function()
          flow.shield(function()
            local _ <close> = closing(function() note("inner", (pcall(flow.sleep, 1))) end)
            never():await()
          end)
        end)
      end)
      flow.yield()
    end))
    flow.yield()
    assert.same({ "inner false", "outer nil" }, log)
  end))

  it("continues with a token that is armed, not with one that is not", in_task(function()
    local source <close> = flow.CancellationTokenSource()
    local weak = support.weak()
    weak[1] = never():continue_with(print, { token = source.token })
    collect()
    assert.equal(0, support.alive(weak))
    local armed <close> = flow.CancellationTokenSource(5)
    local task = never():continue_with(print, { token = armed.token })
    raises("OperationCanceled", task.await, task)
  end))
end)

describe("scopes in plain coroutines", function()
  local plain = require("coflow.coroutine").uninstall and coroutine

  it("are refused, since a yield would leave them open in whoever goes on", in_task(function()
    local source = flow.CancellationTokenSource()
    local uses = {
      with_timeout = function() flow.with_timeout(10, plain.yield) end,
      with_cancellation = function() flow.with_cancellation(source.token, plain.yield) end,
      shield = function() flow.shield(plain.yield) end,
    }
    for name, use in pairs(uses) do
      local ok, err = plain.resume(plain.create(use))
      assert.is_false(ok)
      helper.is_error("InvalidOperation", err, name, "coflow.coroutine")
    end
    assert.is_nil(flow.deadline())
    assert.is_false(plain.resume(plain.create(function() flow.task_group(plain.yield) end)))
  end))

  it("are allowed again in the task, and in coroutines of ours", in_task(function()
    assert.equal(1, flow.with_timeout(10, function() return 1 end))
    local wrapped = flow.coroutine.wrap(function() return flow.with_timeout(10, function() return 2 end) end)
    assert.equal(2, wrapped())
  end))
end)

describe("the end of the state", function()
  it("finds scopes open, with tasks in them", function()
    assert.equal("ran\n", helper.output [[
      local flow = require "coflow"
      local source = flow.CancellationTokenSource(1000)
      flow.run(function()
        flow.spawn(flow.with_timeout, 1000, function()
          flow.with_cancellation(source.token, function()
            flow.cancellation_token():register(print, "callback")
            flow.shield(flow.task_group, function(group)
              for _ = 1, 5 do group:spawn(flow.with_timeout, 500, flow.sleep, math.huge) end
              local _ <close> = setmetatable({}, { __close = function() pcall(flow.sleep, 1) end })
              flow.sleep(1e6)
            end, { limit = 2 })
          end)
        end)
        flow.spawn(function() flow.TaskCompletionSource().task:await() end):cancel()
        flow.yield()
        flow.yield()
      end)
      print("ran")
    ]])
  end)

  it("comes by os.exit inside scopes, with and without closing it", function()
    for _, close in ipairs { "true", "false" } do
      assert.equal("", helper.output([[
        local flow = require "coflow"
        flow.run(function()
          flow.with_timeout(10, function()
            flow.shield({ grace = 5 }, function()
              flow.task_group(function(group)
                group:spawn(flow.sleep, 9)
                group:spawn(function()
                  local _ <close> = setmetatable({}, { __close = function() group:cancel() end })
                  flow.cancellation_token():register(function() end)
                  os.exit(0, ]] .. close .. [[)
                end)
              end, { limit = 2 })
            end)
          end)
        end)
      ]]))
    end
  end)

  it("comes while a canceled tree unwinds", function()
    assert.equal("closing\n", helper.output [[
      local flow = require "coflow"
      flow.run(function()
        local task = flow.spawn(function()
          local _ <close> = setmetatable({}, { __close = function()
            print("closing")
            flow.shield(flow.sleep, 100)
          end })
          flow.sleep(100)
        end)
        flow.yield()
        task:cancel()
        flow.yield()
        flow.yield()
      end)
    ]])
  end)
end)

describe("misuse", function()
  local source = flow.CancellationTokenSource()

  it("of arguments names the function, the argument and the option", in_task(function()
    local function f() end
    bad_argument(2, "with_timeout", function() flow.with_timeout() end, "function")
    bad_argument(2, "with_timeout", function() flow.with_timeout(1) end, "function")
    bad_argument(2, "with_timeout", function() flow.with_timeout(1, {}) end, "function")
    bad_argument(1, "with_timeout", function() flow.with_timeout(-1, f) end, "negative")
    bad_argument(1, "with_timeout", function() flow.with_timeout(0 / 0, f) end, "NaN")
    bad_argument(1, "with_timeout", function() flow.with_timeout({}, f) end, "number")
    bad_argument(1, "with_timeout", function() flow.with_timeout(f) end, "number")
    bad_argument(1, "with_cancellation", function() flow.with_cancellation() end, "CancellationToken")
    bad_argument(1, "with_cancellation", function() flow.with_cancellation(source, f) end, "CancellationToken")
    bad_argument(2, "with_cancellation", function() flow.with_cancellation(source.token) end, "function")
    bad_argument(1, "shield", function() flow.shield() end, "function")
    bad_argument(1, "shield", function() flow.shield(5) end, "function")
    bad_argument(2, "shield", function() flow.shield({}) end, "function")
    bad_argument(1, "shield", function() flow.shield({ grace = -1 }, f) end, "seconds, not negative")
    bad_argument(1, "shield", function() flow.shield({ grace = 0 / 0 }, f) end, "grace")
    bad_argument(1, "shield", function() flow.shield({ grace = "x" }, f) end, "grace")
    bad_argument(1, "shield", function() flow.shield({ seconds = 1 }, f) end, "seconds")
    bad_argument(1, "cancel", function() flow.current_task().cancel() end, "Task")
    bad_argument(1, "cancel", function() flow.current_task().cancel({}) end, "Task")
    assert.is_nil(flow.deadline())
    assert.equal(1, flow.shield(setmetatable({}, { __call = function() return 1 end })))
    assert.equal(1, flow.with_timeout(1, setmetatable({}, { __call = function() return 1 end })))
  end))

  it("outside tasks names flow.run", function()
    local function f() end
    for _, call in ipairs {
      function() flow.with_timeout(1, f) end,
      function() flow.with_timeout(0, f) end,
      function() flow.with_timeout(nil, f) end,
      function() flow.with_cancellation(source.token, f) end,
      function() flow.with_cancellation(flow.CancellationToken.canceled, f) end,
      function() flow.with_cancellation(flow.CancellationToken.none, f) end,
      function() flow.shield(f) end,
      function() flow.shield({ grace = 1 }, f) end,
    } do
      assert.truthy(raises("InvalidOperation", call).message:find("flow.run", 1, true))
    end
  end)
end)

describe("the memory of scopes", function()
  it("is given back, canceled or not, by a task that goes on", in_task(function()
    local n = many(200, 20)
    local grown = helper.growth(2 * n, n, function(i)
      pcall(flow.with_timeout, 1, flow.sleep, i % 2 == 0 and 2 or 0.5)
      pcall(flow.shield, { grace = 1 }, flow.sleep, i % 2 == 0 and 2 or 0.5)
      local source <close> = flow.CancellationTokenSource(1)
      pcall(flow.with_cancellation, source.token, flow.sleep, i % 2 == 0 and 2 or 0.5)
      pcall(flow.with_timeout, 1, flow.with_timeout, 2, function()
        local child = flow.spawn(flow.sleep, 9)
        flow.cancellation_token():register(function() end)
        flow.sleep(i % 2 == 0 and 3 or 0.5)
        child:cancel()
      end)
    end)
    assert.is_true(grown < 10, grown)
  end))

  -- They stayed for ever: canceled, the scope held the token for whose collection it waited.
  it("is given back where one that has ended is canceled from above while its token lives", in_task(function()
    local source <close> = flow.CancellationTokenSource()
    local n = many(200, 20)
    local grown = helper.growth(2 * n, n, function()
      pcall(flow.task_group, function(group)
        flow.with_cancellation(source.token, flow.cancellation_token)
        group:cancel()
      end)
      local task = flow.spawn(function()
        flow.with_timeout(9, function() return flow.cancellation_token() end)
        flow.current_task():cancel()
      end)
      flow.try_await(task)
    end)
    assert.is_true(grown < 10, grown)
  end))
end)

-- At the end, because the coroutines that they leave make each collection slower for a while.
describe("the cancellation", function()
  it("of a tree 100,000 deep", in_task(function()
    local depth, ended = many(100000, 400), 0
    local function node(n)
      local _ <close> = closing(function() ended = ended + 1 end)
      if n == 0 then flow.sleep(1e6) else flow.spawn(node, n - 1):await() end
    end
    local task = flow.spawn(node, depth)
    flow.sleep(1)
    task:cancel("all")
    assert.equal("all", raises("OperationCanceled", task.await, task).reason)
    flow.sleep(1)
    assert.equal(depth + 1, ended)
  end))

  it("of 100,000 children", in_task(function()
    local width, ended = many(100000), 0
    local task = flow.spawn(function()
      for _ = 1, width do
        flow.spawn(function()
          local _ <close> = closing(function() ended = ended + 1 end)
          flow.sleep(1e6)
        end)
      end
      flow.sleep(9)
    end)
    flow.sleep(1)
    task:cancel()
    raises("OperationCanceled", task.await, task)
    flow.sleep(1)
    assert.equal(width, ended)
  end))
end)

describe("a cancellation at an awkward moment", function()
  it("when what was awaited has just ended in place counts at the next wait", in_order(function()
    local log, note = recorder()
    local task
    local loc = flow.AsyncLocal { value_changed = function(change)
      if change.context_changed and task then
        local it = task
        task = nil
        it:cancel("in a handler")
      end
    end }
    local victim = flow.spawn(function()
      loc.value = 1
      task = flow.current_task()
      flow.spawn(function() loc.value = 2 end):await()
      note("goes on")
      flow.yield()
      note("not here")
    end)
    assert.equal("in a handler", raises("OperationCanceled", victim.await, victim).reason)
    assert.same({ "goes on" }, log)
  end))

  it("by a finalizer while a second waiter joins the first ends the wait", in_task(function()
    collectgarbage("generational")
    for _ = 1, 10 do
      local gate, source, called = flow.TaskCompletionSource(), flow.CancellationTokenSource(), false
      local task = gate.task
      local first = flow.async(function() return task:await() end)()
      local await = task.await
      flow.spawn(function()
        flow.yield()
        source:cancel()
      end)
      raises("OperationCanceled", flow.with_cancellation, source.token, function()
        local class = { __gc = function()
          called = true
          source:cancel()
        end }
        collectgarbage("stop")
        setmetatable({}, class)
        collectgarbage("restart") -- the finalizer is called by the next thing that is created: room for two
        await(task)
      end)
      assert.is_true(called or os.getenv("COFLOW_GC_STRESS") ~= nil) -- where the collector has a pace of its own
      gate:set_result(1)
      assert.equal(1, first:await())
    end
    collectgarbage("incremental")
  end))

  it("does not find a wait deaf that was refused before", in_task(function()
    local none = flow.CancellationToken.none
    local cache = flow.AsyncCache()
    cache:get_or_add("key", function()
      raises("InvalidOperation", cache.get_or_add, cache, "key", function() end, none) -- it awaits itself
      raises("Timeout", flow.with_timeout, 1, flow.sleep, 10)
    end)
    assert.equal(1, flow.loop.now())
  end))
end)

describe("the end of a coroutine that has died of an error in a scope", function()
  it("leaves the scopes alone that others have opened since", in_task(function()
    local dead = flow.coroutine.create(function() flow.with_timeout(10, error, "boom", 0) end)
    assert.same({ false, "boom" }, { flow.coroutine.resume(dead) })
    raises("Timeout", flow.with_timeout, 1, function()
      flow.coroutine.close(dead)
      assert.equal(1, flow.deadline())
      flow.sleep(5)
    end)
    assert.equal(1, flow.loop.now())
  end))
end)
