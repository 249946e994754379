-- Finalizers that come at the very moment: any allocation may run them, in the midst of anything, and they may use the
-- whole API. (In spec/awkward_spec.lua are some that come with what they are collected with.)

local flow = require "coflow"
local testing = require "coflow.testing"
local helper = require "spec.helper"
local finalizers = require "spec.support.finalizers"

local in_order, collect = helper.in_order, helper.collect
local sweep = finalizers.sweep

local function never() return flow.TaskCompletionSource().task end

local function told(ok, err)
  assert.is_false(ok)
  assert.truthy(tostring(err):find("somebody has closed the coroutine", 1, true), err)
end

-- A task that waits for what never comes, and a function that closes its coroutine.
local function victim(body)
  local co
  local task = flow.async(function()
    co = coroutine.running()
    if body then body() else never():await() end
  end)()
  return task, function() coroutine.close(co) end
end

-- The coroutine of a task is closed: all scopes are looked through for those that are its own.
local function look_at_scopes()
  local task, close = victim()
  close()
  told(task:try_await())
end

describe("a continuation that its token calls off", function()
  it("may have its coroutine, that of an earlier task, closed in the midst of it", in_order(function()
    sweep(function(at)
      local gate, threads, tasks = flow.TaskCompletionSource(), {}, {}
      for i = 1, 2 do
        tasks[i] = flow.spawn(function()
          threads[i] = coroutine.running()
          gate.task:await()
        end)
      end
      flow.yield()
      gate:set_result()
      for i = 1, 2 do tasks[i]:await() end
      local source, status, close = flow.CancellationTokenSource(), coroutine.status, coroutine.close
      for i = 1, 2 do tasks[i] = never():continue_with(print, { token = source.token }) end
      at(function()
        for i = 1, 2 do if status(threads[i]) == "suspended" then close(threads[i]) end end
      end, source.cancel, source)
      for i = 1, 2 do assert.is_false((tasks[i]:try_await())) end
    end)
  end))
end)

describe("an operation that lands", function()
  local kinds = {
    ["a delay"] = function(token) return flow.delay(100, token) end,
    ["a wait for a semaphore"] = function(token) return flow.Semaphore(0):wait_async(nil, token) end,
    ["a wait for a task"] = function(token) return never():wait_async(100, token) end,
    ["a wait for a tick"] = function(token)
      return flow.PeriodicTimer(10):wait_for_next_tick_async(token)
    end,
  }
  -- a test would want the timer to be disposed of, and whoever can do that has the operation
  local function outside_tests(fn) return function() flow.run(fn) end end
  for name, start in pairs(kinds) do
    local body = name == "a wait for a tick" and outside_tests or in_order
    it(("as it was canceled is not canceled again: %s"):format(name), body(function()
      sweep(function(at)
        local source = flow.CancellationTokenSource()
        local operations, by_itself = {}, nil
        for i = 1, 5 do operations[i] = start(source.token) end
        local first = operations[1]
        local cancel, by_token = first.cancel, source.cancel
        operations[1] = nil
        at(function() -- and then nobody has it but the loop
          by_itself = cancel(first)
          if by_itself then operations[1] = first end
          first = nil
        end, by_token, source)
        first = first or operations[1]
        if by_itself then assert.is_nil(select(2, first:try_await()).token) end
        for i = 2, 5 do assert.equal("canceled", operations[i].status) end
        first, operations = nil, nil -- luacheck: ignore
        collect()
      end)
    end))
  end
end)

describe("a combination", function()
  it("from a table that lands is not canceled any more", in_order(function()
    sweep(function(at)
      local source = flow.TaskCompletionSource()
      local all = flow.when_all { a = source.task }
      local cancel, canceled, status = all.cancel, nil, nil
      local waiter = flow.async(function() return all:try_await() end)()
      at(function()
        canceled = cancel(all)
        status = all.status
      end, source.set_result, source, 1)
      assert.equal(not canceled, (waiter:await()))
      if status then assert.equal(canceled and "canceled" or all.status, all.status) end
    end)
  end))

  for name, combine in pairs {
    when_any = function(task) return flow.when_any(task) end,
    when_all = function(task) return flow.when_all(task) end,
    ["when_all from a table"] = function(task) return flow.when_all { a = task } end,
  } do
    it("while it is canceled has been canceled or not, as is told: " .. name, in_order(function()
      sweep(function(at)
        local source = flow.TaskCompletionSource()
        local complete, completed = source.set_result, false
        local combination = combine(source.task)
        local canceled = at(function()
          completed = true
          complete(source, 1)
        end, combination.cancel, combination)
        helper.settle()
        assert.is_true(completed or canceled)
        assert.equal(canceled and "canceled" or "ran_to_completion", combination.status)
      end)
    end))
  end

  it("gives its outcome to a wait for it that a finalizer cancels", in_order(function()
    sweep(function(at)
      local source = flow.TaskCompletionSource()
      local any = flow.when_any { source.task }
      local wait = any:wait_async(1)
      local cancel, canceled = wait.cancel, nil
      at(function() canceled = cancel(wait) end, source.set_result, source, 1)
      assert.equal(not canceled, (wait:try_await()))
    end)
  end))
end)

describe("a token", function()
  it("of a task that is asked for while it is made is one", in_order(function()
    sweep(function(at)
      local first, second
      local ask = flow.cancellation_token
      local task = flow.async(function()
        first = at(function() second = ask() end, ask)
        never():await()
      end)()
      assert.is_true(second == nil or first == second)
      task:cancel()
      assert.is_true(first.is_cancellation_requested)
      assert.is_false((task:try_await()))
    end)
  end))

  it("of a group that is asked for while it is made is one", in_order(function()
    sweep(function(at)
      local first, second
      flow.spawn(flow.task_group, function(group) -- in a task of its own, which holds no tokens yet
        local function ask() return group.token end
        first = at(function() second = ask() end, ask)
        assert.is_true(second == nil or first == second)
      end):await()
      first = nil -- luacheck: ignore
      collect()
      if second then assert.is_false(second.is_cancellation_requested) end
      second = nil
      collect()
    end)
  end))

  it("that is reset while it is followed is followed or not", in_order(function()
    sweep(function(at)
      local source = flow.CancellationTokenSource()
      local link, token, reset = flow.CancellationTokenSource.linked, source.token, source.try_reset
      token:register(function() end) -- so that it has a list
      local was_reset = false
      local linked = at(function() was_reset = reset(source) end, link, token)
      source:cancel()
      assert.is_true(was_reset or linked.is_cancellation_requested)
    end)
  end))
end)

describe("canceling", function()
  -- In states of their own, where the scope that the task gets is the first: the finalizer runs as it is made. `make`
  -- gives a task that returns 1, and a function that runs it.
  local function as_it_runs(make)
    for n = 1, 3 do
      helper.output(([[
        local flow = require "coflow"
        local finalizers = require "spec.support.finalizers"
        local function body() return 1 end
        local function round()
          local function make()
            %s
          end
          local task, run = make()
          local cancel, ran = task.cancel, false
          finalizers.at(%d, function()
            run()
            ran = true
          end, cancel, task)
          assert(not ran or task:await() == 1)
        end
        round()
        collectgarbage()
        collectgarbage()
        local co -- a task's coroutine is closed: all scopes are looked through for its own
        flow.async(function()
          co = coroutine.running()
          flow.TaskCompletionSource().task:await()
        end)()
        flow.on_unobserved_exception(false)
        assert(coroutine.close(co))
      ]]):format(make, n))
    end
  end

  it("a cold task that is run meanwhile leaves nothing of it", function()
    as_it_runs [[
      local task = flow.Task.new(body)
      local run = task.run_synchronously
      return task, function() run(task) end
    ]]
  end)

  it("a task that its scheduler runs meanwhile leaves nothing of it", function()
    as_it_runs [[
      local scheduler = flow.TaskScheduler.new { queue_task = function() end }
      local task = flow.spawn_on(scheduler, body)
      return task, function() scheduler:try_execute_task(task) end
    ]]
  end)

  it("a group whose owner is closed meanwhile cancels nobody else", in_order(function()
    sweep(function(at)
      local group
      local owner, close = victim(function()
        flow.task_group(function(g)
          group = g
          never():await()
        end)
      end)
      local closed = false
      at(function()
        closed = true
        close()
      end, group.cancel, group)
      local ok, err = owner:try_await()
      if closed then told(ok, err) else assert.is_true(ok) end
      owner, close, group = nil, nil, nil -- luacheck: ignore
      collect()
      look_at_scopes()
    end)
  end))
end)

describe("a group", function()
  -- Outside every task, so that a finalizer may run the loop.
  local function sweep_end(ask)
    sweep(function(at)
      local group
      local source = flow.TaskCompletionSource()
      local owner = flow.async(function()
        flow.task_group(function(g)
          group = g
          source.task:await()
        end)
      end)()
      local complete, turn, ended = source.set_result, flow.loop.run, false
      local ok, result = at(function()
        complete(source)
        turn "nowait"
        turn "nowait"
        ended = owner.is_completed
      end, pcall, ask, group, group.spawn)
      if ended and not ok then helper.is_error("InvalidOperation", result, "group has ended") end
      source:try_set_result()
      flow.run(owner.await, owner)
      if ok and result.await then result:await() end
      group, result = nil, nil -- luacheck: ignore
      collectgarbage()
      collectgarbage()
    end)
  end

  it("that ends while a task is started in it refuses it, or has it", function()
    sweep_end(function(group, spawn) return spawn(group, tostring, 1) end)
  end)

  it("that ends while its token is made has one", function()
    sweep_end(function(group) return group.token end)
  end)
end)

describe("a task that is run by a finalizer", function()
  -- start(at, scheduler, new) makes a task by new(), which runs: then the scheduler has its place, and the task is
  -- collected.
  local function places(start)
    return in_order(function()
      local scheduler = flow.TaskScheduler.limited(1)
      sweep(function(at)
        local runs = 0
        local weak = setmetatable({}, { __mode = "v" })
        start(at, scheduler, function()
          weak[1] = flow.Task.new(function() runs = runs + 1 end)
          return weak[1]
        end)
        assert.equal(1, runs)
        collect()
        assert.is_nil(weak[1])
        assert.equal("place", flow.spawn_on(scheduler, function() return "place" end):await())
      end)
    end)
  end

  it("takes no place in the scheduler that it is given to", places(function(at, scheduler, new)
    local task = new()
    local run = task.run_synchronously
    at(function() pcall(run, task) end, pcall, run, task, scheduler)
    task:await()
  end))

  it("takes no place in the scheduler that it would inherit", places(function(at, scheduler, new)
    flow.spawn_on(scheduler, function()
      local task = new()
      local run = task.run_synchronously
      at(function() pcall(run, task) end, pcall, run, task)
      return task
    end):await():await()
  end))
end)

describe("a finalizer that closes the coroutine of a task", function()
  it("whose continuation is being posted ends it", in_order(function()
    sweep(function(at)
      local posted
      local context = flow.SynchronizationContext.new { post = function(_, fn) posted = fn end }
      local source = flow.TaskCompletionSource()
      local closed = false
      local task, close = victim(function()
        flow.SynchronizationContext.set(context)
        source.task:await()
      end)
      source:set_result()
      at(function()
        closed = true
        close()
      end, flow.yield)
      flow.yield()
      if posted then posted() end
      if closed then told(task:try_await()) else task:await() end
      task, close, posted = nil, nil, nil -- luacheck: ignore
      collect()
      for _ = 1, 100 do coroutine.create(print) end
      flow.yield()
    end)
  end))

  it("whose time is over tells it the one or the other", in_order(function()
    sweep(function(at)
      local task, close = victim(function() flow.with_timeout(1, function() never():await() end) end)
      local closed = false
      at(function()
        closed = true
        close()
      end, flow.sleep, 2)
      local ok, err = task:try_await()
      assert.is_false(ok)
      if not flow.errors.is(err, "Timeout") then
        assert.is_true(closed)
        told(ok, err)
      end
      task, close = nil, nil -- luacheck: ignore
      collect()
      look_at_scopes()
    end)
  end))
end)

describe("a finalizer that changes the context", function()
  local value = flow.AsyncLocal()
  local shown = flow.AsyncLocal { value_changed = function() end }
  local captured = flow.ExecutionContext.capture()
  local ways = {
    ["by an AsyncLocal"] = function() value:set({}) end,
    ["by one with a handler"] = function() shown:set({}) end,
    ["for a while"] = function() return value:with({}) end,
    ["as a whole"] = function() flow.ExecutionContext.restore(captured) end,
  }
  for name, change in pairs(ways) do
    it("while a scheduler learns that a task has ended breaks nothing, " .. name, in_order(function()
      local limited = flow.TaskScheduler.limited(2)
      local direct = flow.TaskScheduler.new { queue_task = function(self, task) self:try_execute_task(task) end }
      for _, scheduler in ipairs { limited, direct } do
        finalizers.always(change, function()
          local tasks = {}
          for i = 1, 3 do
            tasks[i] = flow.spawn_on(scheduler, function()
              flow.yield()
              value:set(i)
              return i
            end)
          end
          for i = 1, 3 do assert.equal(i, tasks[i]:await()) end
        end)
      end
      value:set(nil)
      shown:set(nil)
    end))
  end
end)

describe("a wait_async without time", function()
  it("is over, or canceled by a finalizer meanwhile", in_order(function()
    sweep(function(at)
      local source, cancellation = flow.TaskCompletionSource(), flow.CancellationTokenSource()
      local on, token, cancel = source.task, cancellation.token, cancellation.cancel
      local canceled = false
      local wait = at(function()
        canceled = true
        cancel(cancellation)
      end, on.wait_async, on, 0, token)
      local ok, err = flow.try_await(wait)
      assert.is_false(ok)
      assert.is_true(canceled or wait.status == "faulted")
      helper.is_error(wait.status == "faulted" and "Timeout" or "OperationCanceled", err)
    end)
  end))
end)

describe("a prioritized channel", function()
  it("puts an item in its place among those that a finalizer leaves", in_order(function()
    local armed = false
    -- Where a stack grows the collector runs, if it has reason to: for each depth the stack grows at another place.
    for depth = 0, 70 do
      local garbage = {}
      local channel = flow.Channel.prioritized { comparer = function(a, b)
        if armed then for _ = 1, 200 do garbage[#garbage + 1] = true end end
        return a < b
      end }
      channel:write(5)
      local read, items = channel.try_read, {}
      local arguments = {}
      for i = 1, depth do arguments[i] = i end
      local co = coroutine.create(function(...) return channel:try_write(7), ... end)
      armed = true
      local ok, written = finalizers.at(1, function() items[#items + 1] = read(channel) end,
        coroutine.resume, co, table.unpack(arguments))
      armed = false
      assert.is_true(ok and written, written)
      for _ = 1, channel.count do items[#items + 1] = channel:read() end
      table.sort(items)
      assert.same({ 5, 7 }, items)
    end
  end))
end)

describe("the report of what a test has left", function()
  it("tells of timers that end while it is made", function()
    for n = 1, 12 do
      local delays, over, k = {}, false, 0
      local ok, err = finalizers.when(function()
        if over then k = k + 1 end
        return k == n
      end, function()
        for i = 1, 3 do delays[i]:cancel() end
      end, pcall, testing.run, function()
        for i = 1, 3 do delays[i] = flow.delay(5) end
        flow.spawn(function() over = true end)
      end, { seed = false })
      if not ok then helper.is_error("InvalidOperation", err, "has left something behind") end
    end
    assert.is_false(flow.loop.is_alive())
  end)
end)

describe("a condition", function()
  -- What opens its lock settles an operation, whose when_all makes a table: there the finalizer acts. Now and then the
  -- collector is late, and it acts when all is done, or never: not what is meant.
  local function try(act)
    local lock = flow.Lock()
    local condition, source = flow.Condition(lock), flow.CancellationTokenSource()
    local acted_in
    local waiter
    waiter = flow.spawn(function()
      local _ <close> = lock:lock()
      local next_owner = lock:lock_async()
      next_owner:continue_with(function(operation) operation.result:dispose() end)
      local keyed = flow.when_all { a = next_owner }
      local ok, err = finalizers.when(function() return next_owner.is_completed end, function()
        acted_in = flow.current_task()
        act(condition, source)
      end, pcall, condition.wait, condition, source.token)
      keyed:await()
      return ok, err
    end)
    flow.spawn(function()
      for _ = 1, 10 do flow.yield() end
      act(condition, source)
    end)
    local ok, err = waiter:await()
    return acted_in == waiter, ok, err
  end

  local function while_it_begins(act)
    for _ = 1, 20 do
      local meant, ok, err = try(act)
      if meant then return ok, err end
    end
    error("no finalizer came in time")
  end

  it("is notified before its wait has begun", in_order(function()
    assert.is_true((while_it_begins(function(condition) condition:notify_all() end)))
  end))

  it("is disposed before its wait has begun", in_order(function()
    local ok, err = while_it_begins(function(condition) condition:dispose() end)
    assert.is_false(ok)
    helper.is_error("ObjectDisposed", err)
  end))

  it("is canceled before its wait has begun", in_order(function()
    local ok, err = while_it_begins(function(_, source) source:cancel() end)
    assert.is_false(ok)
    helper.is_error("OperationCanceled", err)
  end))
end)

describe("a channel", function()
  local N = 2000

  -- At the next item its table shrinks.
  local function has_been_full(channel)
    for i = 1, N do channel:write(i) end
    for _ = 1, N do channel:read() end
    channel:write(1)
    channel:read()
  end

  -- ask(channel) in a scope that a finalizer cancels at each allocation in turn, after prepare(channel).
  local function sweep_canceled(new, ask, prepare)
    sweep(function(at)
      local channel = new()
      local source = flow.CancellationTokenSource()
      local acted = false
      local task = flow.spawn(flow.with_cancellation, source.token, function()
        return at(function()
          acted = true
          if prepare then prepare(channel) end
          source:cancel()
        end, pcall, ask, channel)
      end)
      helper.settle()
      local ended = task.is_completed
      if acted then
        assert.is_true(ended)
      elseif not ended then
        source:cancel()
      end
      task:try_await()
    end)
  end

  it("of no capacity does not wait for a writer in a scope that is canceled as it tells of itself", in_order(function()
    sweep_canceled(function()
      local channel = flow.Channel.bounded(0)
      local announced = channel:wait_to_write_async()
      flow.async(function() flow.when_all({ a = announced }):await() end)()
      return channel
    end, function(channel) channel:read() end)
  end))

  it("that a finalizer fills does not wait for a place in a scope that it cancels", in_order(function()
    sweep_canceled(function()
      local channel = flow.Channel.bounded(N)
      has_been_full(channel)
      return channel
    end, function(channel) channel:write("x") end, function(channel)
      while channel:try_write("y") do end -- luacheck: ignore
    end)
  end))

  it("that a finalizer fills is not waited for by an operation that it cancels", in_order(function()
    sweep(function(at)
      local channel, source = flow.Channel.bounded(N), flow.CancellationTokenSource()
      has_been_full(channel)
      local token, acted = source.token, false
      local write = at(function()
        acted = true
        while channel:try_write("y") do end -- luacheck: ignore
        source:cancel()
      end, channel.write_async, channel, "x", token)
      assert.is_true(write.is_completed)
      local ok, err = write:try_await()
      if not ok then helper.is_error("OperationCanceled", err) end
      assert.is_true(acted or ok)
    end)
  end))

  it("that a finalizer fills is not waited for by a select that it cancels", in_order(function()
    sweep(function(at)
      local channel, source = flow.Channel.bounded(N), flow.CancellationTokenSource()
      has_been_full(channel)
      local acted = false
      local select = at(function()
        acted = true
        while channel:try_write("y") do end -- luacheck: ignore
        source:cancel()
      end, flow.channel.select_async, { { channel, "write", "x" }, token = source.token })
      assert.is_true(select.is_completed)
      local ok, err = select:try_await()
      if not ok then helper.is_error("OperationCanceled", err) end
      assert.is_true(acted or ok)
    end)
  end))

  it("that finalizers empty and fill meanwhile is not waited for by a select that they cancel", in_order(function()
    sweep(function(at) -- to be full when it is asked first, and to shrink when it is asked again
      local channel, source = flow.Channel.bounded(N), flow.CancellationTokenSource()
      local completion = flow.TaskCompletionSource()
      for i = 1, N do channel:write(i) end
      local other = flow.async(function() completion.task:await() end)() -- the second waiter takes a table
      local read, write = channel.try_read, channel.try_write
      local cancel, complete = source.cancel, completion.set_result
      local canceled = false
      local select = at({
        function()
          for _ = 1, N do read(channel) end
          write(channel, 1)
          read(channel)
        end,
        function()
          canceled = true
          cancel(source)
          while write(channel, "y") do end -- luacheck: ignore
        end,
        function()
          canceled = false -- a complete task beats a canceled token
          complete(completion, "done")
        end,
      }, flow.channel.select_async, { completion.task, { channel, "write", "x" }, token = source.token })
      if canceled then assert.equal("canceled", select.status) end
      completion:try_set_result()
      other:await()
      select:try_await()
    end)
  end))
end)

describe("those whose turn has come together", function()
  -- first is settled, which lands a when_all: there act() is called, in the midst of the others.
  local function in_the_midst(wait, act, wake, object)
    local source = flow.CancellationTokenSource()
    local token, late, acted = source.token, nil, false
    local first = wait(object)
    local all = flow.when_all { a = first }
    local second, third = wait(object, token), wait(object, token)
    local result = finalizers.when(function() return first.is_completed end, function()
      acted = true
      source:cancel()
      if act then act(object) end
      late = wait(object)
    end, wake, object)
    assert.is_true(acted)
    all:await()
    return late, second, third, result
  end

  local function arrive(barrier, token) return barrier:signal_and_wait_async(token) end
  local function wait(event, token) return event:wait_async(nil, token) end

  it("at a barrier leave its next phase to who comes meanwhile", in_order(function()
    local barrier, remaining = flow.Barrier(4), nil
    local late, second, third, last = in_the_midst(arrive, function(b) remaining = b.participants_remaining end,
      arrive, barrier)
    assert.equal(0, last:await())
    assert.equal("canceled", second.status)
    assert.equal("canceled", third.status)
    assert.equal(1, barrier.current_phase_number)
    assert.equal(4, remaining)
    assert.equal(3, barrier.participants_remaining)
    for _ = 1, 3 do arrive(barrier) end
    assert.equal(1, late:await())
  end))

  it("at a ManualResetEvent are not joined by who comes after a reset", in_order(function()
    local event = flow.ManualResetEvent()
    local late = in_the_midst(wait, event.reset, event.set, event)
    assert.is_false(event.is_set)
    assert.is_false(late.is_completed)
    event:set()
    late:await()
  end))
end)

describe("a read", function()
  local net = require "coflow.net"
  local rest = ("ello"):rep(20) -- a long string is made, not found
  local ways = {
    ["a scope"] = function(stream, token, at)
      return flow.with_cancellation(token, function() return at(stream.read, stream) end)
    end,
    ["its token"] = function(stream, token, at) return at(stream.read, stream, nil, token) end,
    ["the token of an operation"] = function(stream, token, at)
      return at(stream.read_async, stream, nil, token):await()
    end,
  }
  for name, read in pairs(ways) do
    it("that a finalizer forestalls, and cancels by " .. name .. ", waits for nothing", function()
      flow.run(function()
        local listener <close> = net.listen("127.0.0.1", 0)
        sweep(function(at)
          local client <close> = net.connect("127.0.0.1", listener.port)
          local server <close> = listener:accept()
          client:write("h" .. rest)
          server:read_exactly(1) -- the rest is there
          local source = flow.CancellationTokenSource()
          local taken
          local task = flow.spawn(read, server, source.token, function(f, ...)
            return at(function()
              taken = server:read_async()
              source:cancel()
            end, f, ...)
          end)
          helper.settle()
          client:write("!")
          local ok, result = task:try_await()
          if ok then -- it had it before
            assert.equal(rest, result)
          else
            helper.is_error("OperationCanceled", result)
            assert.equal(rest, taken:await())
          end
        end)
      end)
    end)
  end
end)

describe("a finalizer at the end of the state", function()
  -- A program that ends with tasks which wait, with `<close>` variables; the first object that it has made is finalized
  -- after them, by what runs in `last`.
  local function program(wait, last)
    return helper.output(([[
      local flow = require "coflow"
      local source, tasks = flow.TaskCompletionSource(), {}
      kept = setmetatable({}, { __gc = function()
        %s
        io.write(tostring(flow.run(function() return "ran" end)))
      end })
      flow.run(function()
        for i = 1, 40 do -- more than the coroutines that are ready for use
          local closer = setmetatable({}, { __close = function() end })
          tasks[i] = flow.spawn(function()
            local _ <close> = closer
            %s
          end)
        end
        flow.yield()
      end)
      local from = os.clock()
      repeat until os.clock() - from > 0.01
      os.exit(0, true)
    ]]):format(last, wait))
  end

  it("may complete what the tasks have waited for", function()
    assert.equal("ran", program("source.task:await()", "source:set_result()"))
    assert.equal("ran", program("flow.when_any(source.task):await()", "source:set_result()"))
  end)

  it("may cancel them", function()
    assert.equal("ran", program("source.task:await()", "tasks[1]:cancel()"))
    assert.equal("ran", program("flow.sleep(0.005)", "tasks[1]:cancel()"))
  end)

  it("may run the loop when their time is over, or their turn", function()
    assert.equal("ran", program("flow.sleep(0.005)", ""))
    assert.equal("ran", program("while true do flow.yield() end", ""))
  end)

  -- The same for one task that does body().
  local function with_task(body)
    return helper.output(([[
      local flow = require "coflow"
      local function finally(fn) return setmetatable({}, { __gc = fn }) end
      kept = finally(function() flow.run(function() io.write "ran" end) end)
      flow.run(function()
        task = flow.spawn(function() %s end)
        flow.sleep(0.01)
      end)
      os.exit(0, true)
    ]]):format(body))
  end

  it("comes after the <close> variables of tasks", function()
    assert.equal("closed ran", with_task [[
      local _ <close> = setmetatable({}, { __close = function() io.write "closed " end })
      while true do flow.sleep(0.001) end
    ]])
  end)

  it("may run the loop where tasks had coroutines and streams of their own", function()
    assert.equal("ran", with_task [[
      local generate = flow.coroutine.wrap(function()
        while true do
          flow.sleep(0.001)
          flow.coroutine.yield(1)
        end
      end)
      while true do generate() end
    ]])
    assert.equal("ran", with_task [[
      local items = flow.stream.new(function(emit)
        while true do
          flow.sleep(0.001)
          emit(1)
        end
      end):iterate()
      while true do items() end
    ]])
  end)

  it("may start tasks, that others run", function()
    assert.equal("spawned ran", with_task [[
      local _ = finally(function() flow.spawn(function() io.write "spawned " end) end)
      while true do flow.sleep(0.001) end
    ]])
  end)
end)

describe("after the end of the library", function()
  local path = os.tmpname()
  teardown(function() os.remove(path) end)

  -- What a program prints as its state closes, at the end of the script and by os.exit in a task: a finalizer runs
  -- `open` while the library is open yet; that of an object from before it was loaded runs `use`, last of all. (In the
  -- former it may run the loop, which it may not below a task.)
  local function ended(open, use, exits)
    for _, exit in ipairs(exits or { "", "os.exit(0, true)" }) do
      local result = helper.output(([[
        local flow, core
        local path, things = %q, {}
        local function finally(fn)
          return setmetatable({}, { __gc = function()
            local ok, err = pcall(fn)
            io.write(ok and "ok " or err)
          end })
        end
        local function refused(fn, ...) -- luacheck: ignore
          local ok, err = pcall(fn, ...)
          err = tostring(err)
          if ok or not err:find("the library has been closed", 1, true) then error(err, 2) end
        end
        local first = finally(function() %s end)
        flow, core = require "coflow", require "coflow.core"
        local second = finally(function() %s end)
        flow.run(function()
          flow.yield()
          %s
        end)
      ]]):format(path, use, open, exit))
      assert.equal("ok ok ", result, exit)
    end
  end

  it("nothing is begun that nobody would end", function()
    ended([[
      for _, name in ipairs { "fs", "net", "process", "signal", "dns" } do
        things[name] = require("coflow." .. name)
      end
      things.semaphore, things.periodic = flow.Semaphore(0), flow.PeriodicTimer(1)
      things.source = flow.CancellationTokenSource()
    ]], [[
      refused(flow.spawn, print)
      refused(flow.async(print))
      refused(flow.run, print)
      refused(flow.loop.run, "nowait")
      refused(flow.loop.backend_fd)
      refused(flow.delay, 1)
      refused(flow.Timer, print, 1)
      refused(flow.CancellationTokenSource, 1)
      refused(things.source.cancel_after, things.source, 1)
      refused(things.semaphore.wait_async, things.semaphore, 1)
      refused(things.periodic.wait_for_next_tick_async, things.periodic)
      refused(things.fs.open_async, path)
      refused(things.fs.watch, ".")
      refused(things.net.listen, "127.0.0.1", 0)
      refused(things.net.connect_async, "127.0.0.1", 1)
      refused(things.process.spawn, { args = { "true" } })
      refused(things.dns.resolve_async, "127.0.0.1")
      refused(things.signal.wait_async, "SIGUSR1")
      refused(core.watch_signals, true)
      assert(not flow.loop.is_alive())
    ]])
  end)

  it("whatever is used that was open before harms nothing", function()
    ended([[
      local net = flow.net
      local listener, socket, file, watcher, stream, child
      flow.run(function()
        listener, socket = net.listen("127.0.0.1", 0), net.udp()
        stream, file, watcher = net.connect("127.0.0.1", listener.port), flow.fs.open(path), flow.fs.watch "."
        child = flow.process.spawn { args = { "true" }, stdout = "pipe" }
      end)
      local source, periodic = flow.CancellationTokenSource(100), flow.PeriodicTimer(1)
      local timer, channel = flow.Timer(print, 1, 1), flow.Channel.bounded(1)
      local sleeper = flow.spawn(flow.sleep, 100)
      things = {
        function() flow.loop.run() end, function() flow.loop.stop() end, function() flow.loop.timeout() end,
        function() flow.sleep(1) end, function() flow.yield() end, function() sleeper:await() end,
        function() sleeper:cancel() end, function() sleeper:wait(1) end, function() source.token:wait() end,
        function() source:try_reset() end, function() source:cancel() end, function() timer:change(1, 1) end,
        function() periodic.period = 2 end, function() periodic:wait_for_next_tick() end, function() channel:read() end,
        function() flow.channel.select { { channel, "read" }, timeout = 1 } end,
        function() flow.with_timeout(1, flow.sleep, 2) end, function() flow.task_group(print) end,
        function() flow.testing.run(print) end, function() flow.main(print) end,
        function() stream:write "x" end, function() stream:read() end, function() stream:close() end,
        function() socket:send("x", "127.0.0.1", 9) end, function() socket:receive() end, function() socket:close() end,
        function() listener:accept() end, function() listener:serve(print) end, function() listener:stop() end,
        function() file:read() end, function() file:close() end, function() watcher:next() end,
        function() child:wait() end, function() child:kill() end, function() child:close() end,
      }
    ]], [[
      io.stderr:close() -- flow.main tells of errors
      for _, use in ipairs(things) do
        pcall(use)
        pcall(flow.run, use)
      end
    ]], { "" })
  end)

  it("a task from before may run, in a coroutine that is dropped", function()
    ended("", "assert(not pcall(flow.Task.new, print))")
    ended("things.task = flow.Task.new(function() return 1 end)", [[
      things.task:run_synchronously()
      assert(things.task.result == 1)
    ]])
  end)

  it("files that finalizers opened are closed", function()
    ended([[
      things.file = flow.fs.open(path)
      local busy = flow.fs.open("/proc/self/maps")
      things.task = busy:read_all_async()
    ]], [[
      local pipe <close> = io.popen "ls -l /proc/$PPID/fd"
      local all = pipe:read "a"
      assert(not all:find(path, 1, true) and not all:find("self/maps", 1, true), all)
      assert(things.file.is_closed and not pcall(things.file.read, things.file))
    ]], { "" })
  end)

  it("listeners that finalizers opened are closed, and their files gone", function()
    ended([[
      os.remove(path)
      things.listener = flow.net.listen_pipe(path)
      things.task = things.listener:accept_async()
    ]], [[
      assert(things.listener.is_closed and things.listener.local_address == nil)
      assert(not io.open(path) and not os.rename(path, path))
      things.listener:close()
    ]])
  end)

  it("streams and sockets that finalizers opened are closed", function()
    ended([[
      local listener = flow.net.listen("127.0.0.1", 0)
      things.accepted, things.socket = listener:accept_async(), flow.net.udp()
      things.stream = flow.net.connect_async("127.0.0.1", listener.port):await()
      things.stream:write_async(("x"):rep(1e7))
      things.stream:read_async()
      things.socket:receive_async()
    ]], [[
      assert(things.stream.is_closed and things.socket.is_closed)
      assert(not pcall(things.stream.write, things.stream, "x"))
      things.stream:close()
      things.socket:close()
    ]], { "" })
  end)

  it("watchers and catchers of signals are closed, whoever made them", function()
    local make = [[
      things.watcher, things.catcher = flow.fs.watch ".", core.catch(10)
      things.change, things.signal = things.watcher:next_async(), things.catcher:wait()
    ]]
    local use = [[
      things.watcher:close()
      local caught <close> = things.catcher
      refused(core.catch, 10)
    ]]
    ended(make, use)
    ended("", ("refused(core.catch, 10)"))
  end)

  it("children that finalizers started have ended, or are not ours", function()
    ended([[
      things.child = flow.process.spawn { args = { "sleep", "100" }, grace = 0 }
      things.detached = flow.process.spawn { args = { "sleep", "0.1" }, detached = true }
      things.wait = things.detached:wait_async()
    ]], [[
      for _, process in ipairs { things.child, things.detached } do
        assert(not process.is_running and not process:kill())
      end
    ]])
  end)
end)

describe("a task that a finalizer completes", function()
  it("while a select polls its channels ends that select", in_order(function()
    sweep(function(at) -- the channel is to be full when it is asked first, and to shrink when it is asked again
      local N = 2000
      local channel, completion = flow.Channel.bounded(N), flow.TaskCompletionSource()
      for i = 1, N do channel:write(i) end
      local read, write = channel.try_read, channel.try_write
      local complete, task = completion.set_result, completion.task
      local other = flow.async(task.await)(task) -- the second waiter takes a table
      local select = at({
        function()
          for _ = 1, N do read(channel) end
          write(channel, 1)
          read(channel)
        end,
        function()
          for i = 1, N do write(channel, i) end
          complete(completion, "done")
        end,
      }, flow.channel.select_async, { task, { channel, "write", "x" } })
      flow.yield()
      assert.is_true(select.is_completed or not task.is_completed)
      select:cancel()
      completion:try_set_result()
      other:await()
    end)
  end))
end)

describe("the end of a group", function()
  it("that a finalizer brings about is told who is about to wait for its stop", in_order(function()
    flow.on_unobserved_exception(false)
    sweep(function(at)
      local group, co, began
      local completion = flow.TaskCompletionSource()
      local owner = flow.async(function()
        co = coroutine.running()
        flow.task_group(function(g)
          group = g
          completion.task:await()
        end)
      end)()
      local close, wait = coroutine.close, group.wait_stopping
      local waiter = flow.async(function()
        at(function()
          if not began then close(co) end
        end, wait, group)
      end)()
      began = true
      completion:set_result()
      local ok, err = waiter:try_await()
      assert.is_false(ok)
      helper.is_error("InvalidOperation", err, "it will never be stopped")
      owner:try_await()
    end)
    flow.on_unobserved_exception(nil)
  end))
end)
