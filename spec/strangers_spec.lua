-- What strangers do to a task while its coroutine is being closed, and what errors do that are raised while others are
-- reported. Nobody should do such things; but who does is told, and nothing breaks.

local flow = require "coflow"
local helper = require "spec.helper"

local in_order, recorder = helper.in_order, helper.recorder
local closed = "somebody has closed the coroutine"

local function told(ok, err)
  assert.is_false(ok)
  assert.truthy(tostring(err):find(closed, 1, true), err)
end

describe("a <close> variable of a task whose coroutine is being closed", function()
  before_each(function() flow.on_unobserved_exception(false) end)
  after_each(function() flow.on_unobserved_exception(nil) end)

  -- Closes, outside every task, the coroutine of one that waits for source.task, and is told. Its <close> variable
  -- calls drive(task, source): returns what that has returned or raised.
  local function while_closing(drive, start)
    local source, outcome, co, task = flow.TaskCompletionSource(), nil, nil, nil
    task = (start or function(body) return flow.async(body)() end)(function()
      co = coroutine.running()
      local _ <close> = helper.closing(function() outcome = table.pack(pcall(drive, task, source)) end)
      source.task:await()
      error("it has gone on")
    end)
    assert.is_true(coroutine.close(co))
    flow.loop.run "nowait"
    told(task:try_await())
    return table.unpack(outcome, 1, outcome.n)
  end

  it("may run the loop, in which what the task waits for is completed", function()
    assert.is_true(while_closing(function(_, source)
      flow.run(function()
        source:set_result()
        flow.yield()
      end)
    end))
  end)

  it("may run one turn of the loop", function()
    assert.is_true(while_closing(function(_, source)
      source:set_result()
      flow.loop.run "nowait"
    end))
  end)

  it("cannot wait for the task: nothing would end it meanwhile", function()
    local ok, err = while_closing(function(task, source)
      source:set_result()
      task:await()
    end)
    assert.is_false(ok)
    helper.is_error("InvalidOperation", err, "deadlock")
  end)

  it("cannot run it by its scheduler", function()
    local direct, queued = true, nil
    local scheduler = flow.TaskScheduler.new { queue_task = function(self, task)
      if direct then self:try_execute_task(task) else queued = task end
    end }
    local ok = while_closing(function(task, source)
      direct = false
      source:set_result()
      flow.loop.run "nowait"
      scheduler:try_execute_task(task)
    end, function(body)
      local task = flow.spawn_on(scheduler, body)
      flow.loop.run "nowait"
      return task
    end)
    assert.is_true(ok)
    assert.is_not_nil(queued)
  end)

  it("learns that a loop hangs, of other tasks", function()
    local ok, err = while_closing(function()
      flow.run(function() flow.TaskCompletionSource().task:await() end)
    end)
    assert.is_false(ok)
    helper.is_error("InvalidOperation", err, "deadlock")
  end)
end)

describe("closing a task's coroutine", function()
  it("while it is all that waits for who closes it, leaves the wait to others", in_order(function()
    local log, note = recorder()
    local on, co
    on = flow.spawn(function()
      coroutine.close(co) -- of the first waiter
      flow.async(function() note("another got", on:await()) end)()
      return "it"
    end)
    local first = flow.async(function()
      co = coroutine.running()
      on:await()
    end)()
    assert.equal("it", on:await()) -- which runs it in place
    told(first:try_await())
    helper.settle()
    assert.same({ "another got it" }, log)
  end))

  it("may collect what is garbage, but not the token that the wait has been given", function()
    for name, wait in pairs {
      sleep = function(token) flow.sleep(100, token) end,
      wait_for_next_tick = function(token) flow.PeriodicTimer(100):wait_for_next_tick(token) end,
    } do
      local weak, held, co = setmetatable({}, { __mode = "v" }), nil, nil
      local task = flow.async(function()
        co = coroutine.running()
        local _ <close> = helper.closing(function()
          collectgarbage()
          held = weak.token ~= nil -- as long as the sleeper is in its list
        end)
        local token = flow.CancellationTokenSource().token -- which nothing else holds
        weak.token = token
        wait(token)
      end)()
      collectgarbage()
      assert.is_true(coroutine.close(co))
      assert.is_true(held, name)
      told(task:try_await())
    end
  end)

  it("cancels the children of its groups, whether anybody has asked for their token", in_order(function()
    local co, child
    local forever = flow.TaskCompletionSource().task
    local owner = flow.async(function()
      co = coroutine.running()
      flow.task_group(function(group)
        child = group:spawn(forever.await, forever)
        forever:await()
      end)
    end)()
    flow.yield()
    assert.is_false((coroutine.close(co))) -- the group cannot wait for its children
    told(owner:try_await())
    helper.is_error("OperationCanceled", select(2, child:try_await()))
  end))
end)

describe("what a task waits for that a stranger has closed", function()
  before_each(function() flow.on_unobserved_exception(false) end)
  after_each(function() flow.on_unobserved_exception(nil) end)

  -- A task runs wait(token); it has been closed, and what would have been its, another one gets.
  local function closed_in(wait)
    local co
    local task = flow.async(function()
      co = coroutine.running()
      wait(flow.CancellationTokenSource().token)
    end)()
    assert.equal("waiting_for_activation", task.status)
    assert.is_true(coroutine.close(co))
    return task
  end

  it("goes to the next reader of a channel, though it had a token", in_order(function()
    local channel = flow.Channel.unbounded()
    local task = closed_in(function(token) channel:read(token) end)
    local next_one = channel:read_async()
    channel:write("item")
    assert.equal("item", next_one:await())
    told(task:try_await())
  end))

  it("is an operation's if the operation is somebody else's as well", in_order(function()
    local none = flow.CancellationToken.none
    for _, how in ipairs { flow.when_any, flow.when_all, function(op) return op:wait_async(5) end } do
      local semaphore = flow.Semaphore(0)
      local op = semaphore:wait_async()
      local first = flow.async(op.await)(op, none)
      local second = how(op, flow.delay(0))
      semaphore:release()
      first:await()
      second:await()
      assert.equal(0, semaphore.current_count)
    end
    local semaphore, co = flow.Semaphore(0), nil
    local op = semaphore:wait_async()
    local task = flow.async(function()
      co = coroutine.running()
      op:await(none)
    end)()
    coroutine.close(co)
    semaphore:release()
    assert.is_true(op:await())
    assert.equal(0, semaphore.current_count)
    told(task:try_await())
  end))

  it("stays in the channel when nobody else reads", in_order(function()
    local channel = flow.Channel.bounded(1)
    closed_in(function(token) channel:read(token) end)
    channel:write("item")
    assert.equal("item", channel:try_read())
    channel:write("kept")
    closed_in(function(token) channel:write("dropped", token) end)
    assert.equal("kept", channel:read())
    assert.is_nil((channel:try_read()))
  end))

  it("stays where it was for a select", in_order(function()
    local a, b = flow.Channel.unbounded(), flow.Channel.unbounded()
    closed_in(function(token) flow.channel.select { { a, "read" }, { b, "read" }, token = token } end)
    a:write(1)
    b:write(2)
    assert.equal(1, a:try_read())
    assert.equal(2, b:try_read())
  end))

  it("is no slot of a semaphore, no lock and no notification", in_order(function()
    local semaphore, lock = flow.Semaphore(0), flow.Lock()
    closed_in(function(token) semaphore:wait(nil, token) end)
    semaphore:release()
    assert.equal(1, semaphore.current_count)
    do
      local _ <close> = lock:lock()
      closed_in(function(token) lock:lock(token) end)
    end
    local key = lock:try_lock()
    assert.truthy(key)
    key:dispose()
    local condition, heard = flow.Condition(lock), false
    closed_in(function(token)
      local _ <close> = lock:lock()
      condition:wait(token)
    end)
    flow.async(function()
      local _ <close> = lock:lock()
      condition:wait()
      heard = true
    end)()
    flow.yield()
    condition:notify(1)
    flow.yield()
    flow.yield()
    assert.is_true(heard)
  end))
end)

describe("what only the stack held that a stranger has closed", function()
  before_each(function() flow.on_unobserved_exception(false) end)
  after_each(function() flow.on_unobserved_exception(nil) end)

  local function never() return flow.TaskCompletionSource().task end
  local function collect() -- with no turn of the loop
    collectgarbage()
    collectgarbage()
  end

  -- A task that waits, in a coroutine of ours within scope(), for such a thing; that coroutine is closed now.
  local function start(scope)
    local inner
    local task = flow.async(scope)(flow.coroutine.wrap(function()
      inner = coroutine.running()
      never():await()
    end))
    assert.is_true(coroutine.close(inner))
    return task
  end

  it("is waited for no more by a task that is canceled", in_order(function()
    local task = start(flow.call)
    collect()
    assert.is_true(task:cancel())
    told(task:try_await())
  end))

  it("is waited for no more by a task that is out of time", in_order(function()
    local task = start(function(wait) flow.with_timeout(1, wait) end)
    collect()
    told(task:try_await())
    assert.equal(1, flow.loop.now())
  end))

  it("is waited for no more by a task that is collected", in_order(function()
    local unwound = false
    start(function(wait)
      local _ <close> = helper.closing(function() unwound = true end)
      wait()
    end)
    helper.collect()
    assert.is_true(unwound)
  end))

  it("is looked for in no circle of tasks, and in no report of a hang", function()
    local task = start(flow.call)
    collect()
    assert.truthy(task:traceback():find("(waiting)", 1, true))
    local root = flow.async(function()
      local waits <const> = flow.current_task()
      flow.async(function() waits:await() end)() -- else nobody looks
      task:await()
    end)()
    helper.is_error("InvalidOperation", select(2, pcall(flow.await, root)), "deadlock")
  end)

  local ways = {
    ["leaves a group"] = function(body) flow.task_group(body) end,
    ["cancels itself as it is closed"] = function(body)
      local me <const> = flow.current_task()
      local _ <close> = helper.closing(function()
        collect()
        me:cancel()
      end)
      body()
    end,
    ["waited for any of them"] = function()
      flow.task_group(function()
        local _ <close> = helper.closing(collect)
        flow.await_any(never(), never())
      end)
    end,
  }
  for name, way in pairs(ways) do
    it("is waited for no more by a task that " .. name, in_order(function()
      local co
      local task = flow.async(function()
        co = coroutine.running()
        way(function()
          local _ <close> = helper.closing(collect)
          never():await()
        end)
      end)()
      coroutine.close(co)
      told(task:try_await())
    end))
  end
end)

describe("a finalizer that closes a coroutine of flow.coroutine", function()
  it("which has failed leaves its error as it was", function()
    helper.output [[ -- by itself: here little else is allocated
      local flow = require "coflow"
      local finalizers = require "spec.support.finalizers"
      local close = coroutine.close
      flow.run(function()
        finalizers.sweep(function(at)
          local failure, co, unwound = {}, nil, false
          local call = flow.coroutine.wrap(function()
            co = coroutine.running()
            local _ <close> = setmetatable({}, { __close = function() unwound = true end })
            error(failure)
          end)
          local ok, err = at(function() close(co) end, pcall, call)
          assert(not ok and err == failure and unwound)
        end)
      end)
    ]]
  end)
end)

describe("an error in a value_changed handler", function()
  after_each(function() flow.on_unobserved_exception(nil) end)

  it("as the context changes is reported once, not for the report of itself", function()
    local switches, reports, ENOUGH = 0, 0, 1000
    local armed = true
    flow.on_unobserved_exception(function() reports = reports + 1 end)
    local loc = flow.AsyncLocal { value_changed = function(change)
      if not armed or not change.context_changed then return end
      switches = switches + 1
      if switches < ENOUGH then error("handler", 0) end -- else it would go on for ever
    end }
    loc.value = 1
    flow.run(function()
      flow.spawn(function()
        loc.value = 3
        flow.yield()
      end)
      loc.value = 2
      flow.yield()
      flow.yield()
    end)
    armed = false
    loc.value = nil
    assert.equal(switches, reports)
    assert.is_true(switches > 1 and switches < 20, switches)
  end)

  it("that each report brings about is written, and no more than a few times", function()
    local result = helper.child [[
      local flow = require "coflow"
      local n = 0
      local loc = flow.AsyncLocal { value_changed = function(change)
        if change.context_changed and n < 1000 then error("again", 0) end -- else it would go on for ever
      end }
      flow.on_unobserved_exception(function()
        n = n + 1
        loc.value = n -- and the context is put back
      end)
      flow.Task.from_exception("x")
      collectgarbage()
      flow.run(flow.yield)
      print(n)
    ]]
    assert.equal(0, result.code, result.err)
    assert.is_true(tonumber(result.out) < 20, result.out)
    assert.equal("coflow: error while errors are reported: again\n", result.err)
  end)
end)
