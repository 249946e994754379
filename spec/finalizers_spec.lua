-- Finalizers that come at the very moment: any allocation may run them, in the midst of anything, and they may use the
-- whole API. (In spec/awkward_spec.lua are some that come with what they are collected with.)

local flow = require "coflow"
local helper = require "spec.helper"
local finalizers = require "spec.support.finalizers"

local in_order, collect, closing = helper.in_order, helper.collect, helper.closing
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

describe("an operation that lands", function()
  local kinds = {
    ["a delay"] = function(token) return flow.delay(100, token) end,
    ["a wait for a semaphore"] = function(token) return flow.Semaphore(0):wait_async(nil, token) end,
    ["a wait for a task"] = function(token) return never():wait_async(100, token) end,
    ["a wait for a tick"] = function(token)
      return flow.PeriodicTimer(10):wait_for_next_tick_async(token)
    end,
  }
  for name, start in pairs(kinds) do
    it(("as it was canceled is not canceled again: %s"):format(name), in_order(function()
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
        first, operations = nil, nil
        collect()
      end)
    end))
  end
end)

describe("a combination that lands", function()
  it("from a table is not canceled any more", in_order(function()
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
  it("a cold task that is run meanwhile is in time or not", in_order(function()
    sweep(function(at)
      local task = flow.Task.new(function() return 1 end)
      local cancel, run, ran = task.cancel, task.run_synchronously, nil
      at(function() ran = pcall(run, task) end, cancel, task)
      if not ran then task:start() end
      assert.equal(1, task:await()) -- it has not looked
      task = nil -- luacheck: ignore
      collect()
      look_at_scopes()
    end)
  end))

  it("a task that its scheduler runs meanwhile does not reach it", in_order(function()
    local scheduler = flow.TaskScheduler.new { queue_task = function() end }
    sweep(function(at)
      local task = flow.spawn_on(scheduler, function() return 1 end)
      flow.yield()
      local cancel, run, ran = task.cancel, scheduler.try_execute_task, false
      at(function() ran = run(scheduler, task) end, cancel, task)
      scheduler:try_execute_task(task)
      assert.is_true((task:try_await()) or not ran)
      task = nil -- luacheck: ignore
      collect()
      look_at_scopes()
    end)
  end))

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
      owner, close, group = nil, nil, nil
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
      if ended and not ok then helper.is_error("InvalidOperation", result, "the task group has ended") end
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
  -- start(at, scheduler, new) makes a task by new(), which runs: then the scheduler has its place still, and the task is
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

  for way, act in pairs { ["run at once"] = "run_synchronously", ["started"] = "start" } do
    it("takes no place in the scheduler that it is given to, " .. way, places(function(at, scheduler, new)
      local task = new()
      local run, go = task.run_synchronously, task[act]
      at(function() pcall(go, task) end, pcall, run, task, scheduler)
      task:await()
    end))

    it("takes no place in the scheduler that it would inherit, " .. way, places(function(at, scheduler, new)
      flow.spawn_on(scheduler, function()
        local task = new()
        local run, go = task.run_synchronously, task[act]
        at(function() pcall(go, task) end, pcall, run, task)
        return task
      end):await():await()
    end))
  end
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
