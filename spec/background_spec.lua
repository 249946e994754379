local flow = require "coflow"
local helper = require "spec.helper"

local in_task, recorder, raises, raised = helper.in_task, helper.recorder, helper.raises, helper.raised
local in_order = helper.in_order

-- A job that notes its start and its end, and takes `seconds` in between.
local function jobs(note)
  return function(name, seconds)
    note("start", name)
    flow.sleep(seconds or 1)
    note("end", name)
    return name
  end
end

describe("BackgroundQueue", function()
  it("runs jobs one by one, in the order in which they came", in_task(function()
    local log, note = recorder()
    local queue <close> = flow.BackgroundQueue()
    local job = jobs(note)
    for _, name in ipairs { "a", "b", "c" } do queue:enqueue(job, name) end
    assert.same({}, log)
    queue:drain()
    assert.same({ "start a", "end a", "start b", "end b", "start c", "end c" }, log)
  end))

  it("runs as many at a time as it has workers, suspended ones counted", in_order(function(clock)
    local log, note = recorder()
    local queue <close> = flow.BackgroundQueue { workers = 2 }
    local job = jobs(note)
    queue:enqueue(job, "a", 3)
    queue:enqueue(job, "b", 1)
    queue:enqueue(job, "c", 1)
    queue:enqueue(job, "d", 1)
    queue:drain()
    assert.same({ "start a", "start b", "end b", "start c", "end c", "start d", "end a", "end d" }, log)
    assert.equal(3, clock:now())
  end))

  it("gives the job's own task", in_task(function()
    local queue <close> = flow.BackgroundQueue()
    local function double(...) return select("#", ...), ... end
    local first = queue:enqueue(flow.sleep, 1)
    local task = queue:enqueue(double, 1, nil)
    assert.equal("waiting_to_run", task.status)
    flow.await(first)
    assert.same({ 2, 1, nil, n = 3 }, table.pack(flow.await(task)))
    assert.equal("ran_to_completion", task.status)
    local failing = queue:enqueue(function()
      error("out of order", 0)
    end)
    local line = helper.here(-2)
    assert.equal("out of order", raised(flow.await, failing))
    assert.equal("faulted", failing.status)
    assert.truthy(failing:traceback():find(line, 1, true))
    assert.truthy(failing.name:find(helper.here(-7), 1, true))
  end))

  it("waits for room while `capacity` jobs are queued, and returns in the order of arrival", in_order(function(clock)
    local log, note = recorder()
    local queue <close> = flow.BackgroundQueue { capacity = 1 }
    local function hand_in(name)
      queue:enqueue(flow.sleep, 10)
      note(name, clock:now())
    end
    flow.await_all(flow.spawn(hand_in, "runs"), flow.spawn(hand_in, "queued"), flow.spawn(hand_in, "first"),
      flow.spawn(hand_in, "second"))
    assert.same({ "runs 0.0", "queued 0.0", "first 10.0", "second 20.0" }, log)
    queue:drain()
    assert.equal(40, clock:now())
  end))

  it("lets nobody overtake those who wait", in_order(function()
    local log, note = recorder()
    local queue <close> = flow.BackgroundQueue { capacity = 1 }
    queue:enqueue(flow.sleep, 1)
    queue:enqueue(flow.sleep, 1)
    flow.spawn(function() queue:enqueue(note, "waited") end)
    flow.yield()
    queue:fire_and_forget(note, "forgotten")
    flow.sleep(1) -- there is room for one, and it is the first one's
    queue:enqueue(note, "newcomer")
    queue:drain()
    assert.same({ "waited", "forgotten", "newcomer" }, log)
  end))

  it("with capacity 0 hands a job to a worker that is free", in_task(function(clock)
    local queue <close> = flow.BackgroundQueue { capacity = 0 }
    queue:enqueue(flow.sleep, 5)
    assert.equal(0, clock:now())
    queue:enqueue(flow.sleep, 5)
    assert.equal(5, clock:now())
    queue:drain()
    assert.equal(10, clock:now())
  end))

  it("runs a job in the context of whoever enqueued it, also after a wait", in_task(function()
    local user = flow.AsyncLocal()
    local queue <close> = flow.BackgroundQueue { capacity = 1 }
    local seen = {}
    local function job()
      seen[#seen + 1] = user.value
      user.value = "the job's own"
      flow.sleep(1)
    end
    for _, name in ipairs { "ann", "bob", "cid", "dan" } do
      flow.call(function()
        user.value = name
        queue:enqueue(job)
      end)
    end
    user.value = "eve"
    queue:fire_and_forget(job)
    local async = queue:enqueue_async(job)
    user.value = "later"
    flow.await(async)
    queue:drain()
    assert.same({ "ann", "bob", "cid", "dan", "eve", "eve" }, seen)
    assert.equal("later", user.value)
  end))

  it("lets neither the token nor the deadline of the enqueuer reach a job", in_order(function(clock)
    local queue <close> = flow.BackgroundQueue()
    local log, note = recorder()
    local request = flow.spawn(function()
      flow.with_timeout(1, function()
        queue:enqueue(function()
          note("deadline", flow.deadline())
          flow.sleep(5)
          note("done", flow.cancellation_token().is_cancellation_requested)
        end)
        flow.sleep(3)
      end)
    end)
    helper.is_error("Timeout", raised(flow.await, request))
    local other = flow.spawn(function()
      queue:enqueue(flow.sleep, 1)
      queue:enqueue(note, "after a cancellation")
      flow.sleep(100)
    end)
    flow.yield()
    other:cancel()
    queue:drain()
    assert.same({ "deadline nil", "done false", "after a cancellation" }, log)
    assert.equal(6, clock:now())
    assert.is_true(other.is_canceled)
  end))

  it("ends a wait for room with the enqueuer's tokens, and forgets the job", in_task(function(clock)
    local log, note = recorder()
    local queue <close> = flow.BackgroundQueue { capacity = 1 }
    local source = flow.CancellationTokenSource(2)
    queue:enqueue(flow.sleep, 10)
    queue:enqueue(flow.sleep, 10)
    local err = raises("OperationCanceled", queue.enqueue, queue, { token = source.token }, note, "never")
    assert.equal(source.token, err.token)
    assert.equal(2, clock:now())
    raises("Timeout", flow.with_timeout, 2, queue.enqueue, queue, note, "never")
    assert.equal(4, clock:now())
    raises("OperationCanceled", queue.enqueue, queue, { token = source.token }, note, "never")
    flow.with_timeout(1, function() -- `none` opts out of the ambient one
      queue:enqueue({ token = flow.CancellationToken.none }, note, "opted out")
    end)
    assert.equal(10, clock:now())
    queue:drain()
    assert.same({ "opted out" }, log)
  end))

  it("refuses at once under a token that is canceled, though there is room", in_task(function()
    local queue <close> = flow.BackgroundQueue()
    local log, note = recorder()
    raises("OperationCanceled", queue.enqueue, queue, { token = flow.CancellationToken.canceled }, note, "never")
    local task = flow.spawn(function() queue:enqueue(note, "never") end)
    task:cancel()
    task:try_await()
    queue:drain()
    assert.same({}, log)
  end))

  it("gives the place of one that gives up to the next", in_task(function()
    local log, note = recorder()
    local queue <close> = flow.BackgroundQueue { capacity = 1 }
    queue:enqueue(flow.sleep, 1)
    queue:enqueue(note, "queued")
    local leaver = flow.spawn(function() queue:enqueue(note, "leaver") end)
    local stayer = flow.spawn(function() queue:enqueue(note, "stayer") end)
    flow.yield()
    leaver:cancel()
    flow.await(stayer)
    queue:drain()
    assert.same({ "queued", "stayer" }, log)
  end))

  it("frees the place of a job that is canceled before its start", in_task(function(clock)
    local log, note = recorder()
    local queue <close> = flow.BackgroundQueue { capacity = 1 }
    queue:enqueue(flow.sleep, 9)
    local queued = queue:enqueue(note, "never")
    local waiter = flow.spawn(function() queue:enqueue(note, "next") end)
    flow.yield()
    assert.is_true(queued:cancel("not needed"))
    assert.is_true(queued.is_canceled)
    flow.await(waiter)
    assert.equal(0, clock:now())
    assert.truthy(raises("OperationCanceled", flow.await, queued).message:find("not needed", 1, true))
    queue:drain()
    assert.same({ "next" }, log)
  end))

  it("goes on after jobs that fail, are canceled or are abandoned", in_task(function()
    local log, note = recorder()
    local abandoned
    flow.on_unobserved_exception(function(err) abandoned = err end)
    local queue <close> = flow.BackgroundQueue()
    local failing = queue:enqueue(error, "fails")
    local canceled = queue:enqueue(function() flow.current_task():cancel() flow.yield() end)
    queue:enqueue(function() flow.TaskCompletionSource().task:await() end)
    queue:enqueue(note, "last")
    failing:try_await()
    canceled:try_await()
    flow.yield()
    for _ = 1, 3 do helper.collect() end
    queue:drain()
    flow.on_unobserved_exception(nil)
    helper.is_error("TaskAbandoned", abandoned)
    assert.same({ "last" }, log)
  end))

  it("runs those behind a job that is abandoned, though nobody has the queue", in_task(function()
    local log, note = recorder()
    local abandoned
    flow.on_unobserved_exception(function(err) abandoned = err end)
    do
      local queue = flow.BackgroundQueue()
      queue:fire_and_forget(function() flow.TaskCompletionSource().task:await() end)
      queue:fire_and_forget(note, "behind")
      flow.yield()
    end
    for _ = 1, 3 do helper.collect() end
    flow.on_unobserved_exception(nil)
    helper.is_error("TaskAbandoned", abandoned)
    assert.same({ "behind" }, log)
  end))

  it("forgets the job of one that gives up at once, not when there is room", in_task(function()
    local queue <close> = flow.BackgroundQueue { capacity = 1 }
    queue:enqueue(flow.sleep, 100)
    queue:enqueue(flow.sleep, 100)
    local weak = setmetatable({}, { __mode = "v" })
    local function try()
      local job = function() return weak end
      weak[1] = job
      raises("Timeout", flow.with_timeout, 1, queue.enqueue, queue, job)
    end
    try()
    helper.collect()
    assert.is_nil(weak[1])
  end))

  it("is held while jobs wait for their start, not longer", in_task(function()
    local log, note = recorder()
    local weak = setmetatable({}, { __mode = "v" })
    do
      local queue = flow.BackgroundQueue()
      weak[1] = queue
      queue:enqueue(flow.sleep, 1)
      queue:enqueue(note, "ran")
    end
    helper.collect()
    assert.is_not_nil(weak[1])
    flow.sleep(2)
    helper.collect()
    assert.same({ "ran" }, log)
    assert.is_nil(weak[1])
  end))

  describe("fire_and_forget", function()
    it("never waits, not even where nobody can", in_task(function(clock)
      local log, note = recorder()
      local queue <close> = flow.BackgroundQueue { capacity = 1 }
      local list = { 3, 1, 2 }
      table.sort(list, function(a, b)
        if #log < 3 then
          note("forgotten")
          queue:fire_and_forget(flow.sleep, 1)
        end
        return a < b
      end)
      for _ = #log + 1, 5 do queue:fire_and_forget(flow.sleep, 1) end
      assert.equal(0, clock:now())
      queue:drain()
      assert.equal(5, clock:now())
    end))

    it("reports an error when the job ends, once, and no other outcome", in_task(function()
      local log, note = recorder()
      flow.on_unobserved_exception(function(err, task) note(err, task.status) end)
      local queue <close> = flow.BackgroundQueue()
      queue:fire_and_forget(function() error("lost", 0) end)
      queue:fire_and_forget(function() flow.current_task():cancel() flow.yield() end)
      queue:fire_and_forget(tostring, nil)
      queue:fire_and_forget(error)
      queue:drain()
      assert.same({ "lost faulted", "nil faulted" }, log)
      helper.collect()
      assert.same(2, #log)
      flow.on_unobserved_exception(nil)
    end))

    it("works outside every task", function()
      local log, note = recorder()
      local queue = flow.BackgroundQueue()
      queue:fire_and_forget(note, "a")
      local task = queue:enqueue(note, "b")
      queue:fire_and_forget(note, "c")
      assert.same({}, log)
      queue:drain()
      assert.same({ "a", "b", "c" }, log)
      assert.is_true(task.is_completed_successfully)
      queue:dispose()
    end)
  end)

  describe("drain", function()
    it("raises nothing and observes nothing", in_task(function()
      local unobserved
      flow.on_unobserved_exception(function(err) unobserved = err end)
      local queue <close> = flow.BackgroundQueue()
      local kept = { queue:enqueue(function() error("nobody looks", 0) end) }
      queue:drain()
      assert.equal("faulted", kept[1].status)
      assert.is_nil(unobserved)
      kept[1] = nil
      helper.collect()
      assert.equal("nobody looks", unobserved)
      flow.on_unobserved_exception(nil)
    end))

    it("waits for what jobs hand in, and for those who wait for room", in_task(function()
      local log, note = recorder()
      local queue <close> = flow.BackgroundQueue { capacity = 1, workers = 2 }
      queue:enqueue(function()
        flow.sleep(1)
        queue:enqueue(note, "from a job")
      end)
      queue:enqueue(flow.sleep, 5)
      queue:enqueue(note, "queued")
      flow.spawn(function() queue:enqueue(note, "waited") end)
      flow.yield()
      queue:drain()
      table.sort(log)
      assert.same({ "from a job", "queued", "waited" }, log)
      queue:drain() -- idle: at once
    end))

    it("ends with its token, and leaves the jobs alone", in_task(function(clock)
      local queue <close> = flow.BackgroundQueue()
      local task = queue:enqueue(flow.sleep, 5)
      raises("Timeout", flow.with_timeout, 1, queue.drain, queue)
      raises("OperationCanceled", queue.drain, queue, flow.CancellationTokenSource(1).token)
      assert.equal(2, clock:now())
      flow.await(flow.when_all(queue:drain_async(), queue:drain_async()))
      assert.equal(5, clock:now())
      assert.is_true(task.is_completed_successfully)
    end))

    it("is refused in a job of the queue", in_task(function()
      local queue <close> = flow.BackgroundQueue()
      local task = queue:enqueue(function() queue:drain() end)
      raises("InvalidOperation", flow.await, task)
    end))
  end)

  describe("dispose", function()
    it("cancels what runs and what is queued, and wakes those who wait", in_task(function(clock)
      local log, note = recorder()
      local queue = flow.BackgroundQueue { capacity = 1 }
      local running = queue:enqueue(function()
        local _ <close> = helper.closing(function() note("cleaned up") end)
        flow.sleep(100)
      end)
      local queued = queue:enqueue(note, "never")
      local waiting = flow.spawn(function() queue:enqueue(note, "never") end)
      queue:fire_and_forget(note, "never")
      flow.yield()
      queue:dispose()
      assert.is_true(queued.is_canceled)
      raises("ObjectDisposed", flow.await, waiting)
      raises("ObjectDisposed", queue.enqueue, queue, note)
      raises("ObjectDisposed", queue.fire_and_forget, queue, note)
      queue:drain()
      assert.is_true(running.is_canceled)
      queue:dispose()
      queue:drain()
      assert.same({ "cleaned up" }, log)
      assert.equal(0, clock:now())
    end))

    it("does not wait for a job that cleans up; drain does", in_task(function(clock)
      local queue = flow.BackgroundQueue { workers = 2 }
      queue:enqueue(function()
        local _ <close> = helper.closing(function() flow.shield(flow.sleep, 3) end)
        flow.sleep(100)
      end)
      flow.yield()
      queue:dispose()
      assert.equal(0, clock:now())
      queue:drain()
      assert.equal(3, clock:now())
    end))

    it("is what <close> does; a job may do it to its own queue", in_task(function()
      local task
      do
        local queue <close> = flow.BackgroundQueue()
        task = queue:enqueue(flow.sleep, 100)
      end
      raises("OperationCanceled", flow.await, task)
      local queue = flow.BackgroundQueue()
      local own = queue:enqueue(function()
        queue:dispose()
        flow.sleep(1)
      end)
      local after = queue:enqueue(flow.sleep, 1)
      queue:drain()
      assert.is_true(own.is_canceled)
      assert.is_true(after.is_canceled)
    end))

    it("cancels in order, whatever callbacks raise, and reports that", in_order(function()
      local log, note = recorder()
      flow.on_unobserved_exception(function(err) note("reported", err) end)
      local queue = flow.BackgroundQueue { workers = 3 }
      for i = 1, 3 do
        queue:enqueue(function()
          flow.cancellation_token():register(function()
            note("canceled", i)
            if i == 2 then error("a callback", 0) end
          end)
          flow.sleep(10)
        end)
      end
      flow.yield()
      queue:dispose()
      queue:drain()
      flow.on_unobserved_exception(nil)
      assert.equal("canceled 1", log[1])
      assert.equal("canceled 2", log[2])
      assert.truthy(log[3]:find("^reported Aggregate.*"))
      assert.equal("canceled 3", log[4])
      assert.equal(4, #log)
    end))
  end)

  it("refuses wrong arguments, at their caller", in_task(function()
    local queue <close> = flow.BackgroundQueue()
    local function refuses(message, fn, ...)
      local err = raised(fn, ...)
      assert.equal("string", type(err))
      assert.truthy(err:find(message, 1, true), err)
    end
    for _, options in ipairs { { capacity = -1 }, { capacity = 1.5 }, { capacity = "1" }, { workers = 0 },
      { workers = 0 / 0 }, { capacity = 0 / 0 } } do
      refuses("bad argument #1 to 'BackgroundQueue'", function() flow.BackgroundQueue(options) end)
    end
    refuses("unknown option 'size'", flow.BackgroundQueue, { size = 1 })
    refuses("bad argument #1 to 'enqueue'", function() queue:enqueue(1) end)
    refuses("unknown option 'tokens'", function() queue:enqueue({ tokens = 1 }, print) end)
    refuses("token must be a CancellationToken", function() queue:enqueue({ token = 1 }, print) end)
    refuses("bad argument #2 to 'enqueue'", function() queue:enqueue({}, 1) end)
    refuses("bad argument #1 to 'fire_and_forget'", function() queue:fire_and_forget() end)
    refuses("bad argument #1 to 'drain'", function() queue:drain(1) end)
    refuses("bad argument #1 to 'drain' (coflow.BackgroundQueue expected", function() queue.drain({}) end)
    refuses(helper.here(1), function()
      queue:drain(1)
    end)
    flow.BackgroundQueue { capacity = math.huge, workers = math.huge }
  end))

  it("takes 10,000 jobs that each hand in the next", in_task(function()
    local n, left = helper.many(10000), 0
    local queue <close> = flow.BackgroundQueue { capacity = 1 }
    local function job()
      left = left + 1
      if left < n then queue:fire_and_forget(job) end
    end
    queue:enqueue(job)
    queue:drain()
    assert.equal(n, left)
  end))

  it("loses and doubles nothing, whoever comes and goes", function()
    local testing = require "coflow.testing"
    testing.explore(function()
      local queue = flow.BackgroundQueue { capacity = 2, workers = 2 }
      local ran, accepted, most, now = {}, {}, 0, 0
      local function job(i)
        ran[i] = (ran[i] or 0) + 1
        now = now + 1
        most = math.max(most, now)
        flow.sleep(i % 3)
        now = now - 1
      end
      flow.task_group(function(group)
        for i = 1, 20 do
          local task = group:spawn(function()
            flow.sleep(i % 4)
            queue:enqueue(job, i)
            accepted[i] = 1
          end)
          if i % 5 == 0 then group:spawn(function() flow.sleep(i % 6) task:cancel() end) end
        end
      end)
      queue:drain()
      assert.same(accepted, ran)
      assert.equal(2, most)
    end, { runs = helper.many(100, 3) })
  end)

  it("says nothing of jobs that merely stand when the state closes", function()
    for _, exit in ipairs { "", "os.exit(0, true)" } do
      assert.equal("closed", helper.output(([[
        local flow = require "coflow"
        local queue = flow.BackgroundQueue()
        flow.run(function()
          queue:fire_and_forget(function()
            local _ <close> = setmetatable({}, { __close = function() io.write "closed" end })
            flow.sleep(10)
          end)
          queue:fire_and_forget(print, "never started")
          flow.sleep(0.001)
          %s
        end)
      ]]):format(exit)))
    end
  end)

  it("stays whole while finalizers of users use it", in_task(function()
    local queue <close> = flow.BackgroundQueue { capacity = 3, workers = 2 }
    local ran, handed_in = 0, 0
    local function job() ran = ran + 1 end
    for i = 1, 200 do
      setmetatable({}, { __gc = function()
        handed_in = handed_in + 1
        queue:fire_and_forget(job)
      end })
      handed_in = handed_in + 1
      queue:enqueue(job)
      if i % 20 == 0 then collectgarbage() end
    end
    helper.collect()
    queue:drain()
    assert.equal(handed_in, ran)
    assert.equal(400, ran)
  end))
end)
