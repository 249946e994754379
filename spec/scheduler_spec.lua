-- Schedulers and synchronization contexts: who runs a task, when, and what happens when nobody does.

local flow = require "coflow"
local helper = require "spec.helper"

local Task, TaskScheduler, SynchronizationContext = flow.Task, flow.TaskScheduler, flow.SynchronizationContext
local in_task, recorder, raised, raises = helper.in_task, helper.recorder, helper.raised, helper.raises
local in_order = helper.in_order
local is_error, slowly, closing = helper.is_error, helper.slowly, helper.closing
local collect, settle, many, watch = helper.collect, helper.settle, helper.many, helper.reports

-- A scheduler that keeps its tasks; `run` executes what is queued now, `drain` all, letting the loop run between.
local function keeper()
  local queue = {}
  local scheduler = TaskScheduler.new { queue_task = function(_, task) queue[#queue + 1] = task end }
  local function run()
    local now = table.move(queue, 1, #queue, 1, {})
    for i = #queue, 1, -1 do queue[i] = nil end
    for _, task in ipairs(now) do assert.is_true(scheduler:try_execute_task(task)) end
    return #now
  end
  local function drain()
    repeat settle() until run() == 0
  end
  return scheduler, queue, run, drain
end

-- A synchronization context that keeps what is posted, and the same two functions.
local function poster()
  local queue = {}
  local context = SynchronizationContext.new { post = function(_, fn) queue[#queue + 1] = fn end }
  local function run()
    local now = table.move(queue, 1, #queue, 1, {})
    for i = #queue, 1, -1 do queue[i] = nil end
    for _, fn in ipairs(now) do fn() end
    return #now
  end
  local function drain()
    repeat settle() until run() == 0
  end
  return context, queue, run, drain
end

local function inline()
  return TaskScheduler.new { queue_task = function(self, task) self:try_execute_task(task) end }
end

before_each(function() -- what other specs left in the hands of their schedulers is not ours
  flow.on_unobserved_exception(false)
  flow.run(collect)
end)

after_each(function()
  flow.on_unobserved_exception(false)
  SynchronizationContext.set(nil)
end)

describe("a scheduler", function()
  it("is told of the start and of each continuation, by a call with no task running", in_order(function()
    local log, note = recorder()
    local scheduler
    scheduler = TaskScheduler.new {
      queue_task = function(self, task)
        note("queue", task.status, flow.current_task(), rawequal(self, scheduler), TaskScheduler.current() == self)
        self[#self + 1] = task
      end,
    }
    local function run()
      local task = table.remove(scheduler, 1)
      note("execute", scheduler:try_execute_task(task))
    end
    local task = flow.spawn_on(scheduler, function(...)
      note("start", TaskScheduler.current() == scheduler, ...)
      flow.yield()
      note("yielded")
      flow.sleep(1)
      note("slept")
      return "result"
    end, 1, nil, 3)
    note("spawned", task.status)
    run()
    note("suspended", task.status)
    flow.yield()
    run()
    flow.sleep(1)
    flow.yield()
    assert.equal(1, #scheduler)
    run()
    assert.same({
      "queue waiting_to_run nil true false", "spawned waiting_to_run",
      "start true 1 nil 3", "execute true", "suspended waiting_for_activation",
      "queue waiting_for_activation nil true false", "yielded", "execute true",
      "queue waiting_for_activation nil true false", "slept", "execute true",
    }, log)
    assert.equal("result", task:await())
    assert.is_true(TaskScheduler.current() == TaskScheduler.default)
  end))

  it("gets continuations in the order in which the tasks became ready", in_order(function()
    local scheduler, _, _, drain = keeper()
    local log, note = recorder()
    local source = flow.TaskCompletionSource()
    for i = 1, 3 do
      flow.spawn_on(scheduler, function()
        source.task:await()
        note(i)
        flow.yield()
        note(i)
      end)
    end
    drain()
    source:set_result()
    note("set")
    drain()
    assert.same({ "set", "1", "2", "3", "1", "2", "3" }, log)
  end))

  it("goes on at once after an await of a complete task", in_task(function()
    local scheduler, queue, run = keeper()
    local task = flow.spawn_on(scheduler, function()
      flow.await(Task.completed_task)
      flow.await(Task.from_result(1):configure_await(false))
      return TaskScheduler.current() == scheduler
    end)
    run()
    assert.equal(0, #queue)
    assert.is_true(task.result)
  end))

  it("is not jumped by an await that could run its task in place", in_order(function()
    local scheduler, queue, run, drain = keeper()
    local log, note = recorder()
    local child = flow.spawn_on(scheduler, note, "child")
    flow.spawn(function()
      child:await()
      note("awaited")
    end)
    flow.yield()
    assert.same({}, log)
    drain()
    assert.same({ "child", "awaited" }, log)
    local parent = flow.spawn_on(scheduler, function()
      flow.spawn(note, "plain"):await() -- the only task that is ready
      note("parent")
    end)
    run()
    flow.yield()
    flow.yield()
    note(#queue)
    run()
    assert.same({ "child", "awaited", "plain", "1", "parent" }, log)
    assert.is_true(parent.is_completed)
  end))

  it("does not get what its tasks spawn, but what they start hot", in_order(function()
    local scheduler, queue, run, drain = keeper()
    local log, note = recorder()
    local function name() return TaskScheduler.current() == scheduler and "ours" or "default" end
    local task = flow.spawn_on(scheduler, function()
      local spawned = flow.spawn(function()
        note("spawned", name())
        flow.yield()
        note("spawned", name())
      end)
      local hot = flow.async(function()
        note("hot", name())
        flow.yield()
        note("hot", name())
      end)()
      local cold = Task.new(function()
        note("cold", name())
        flow.yield()
        note("cold", name())
      end):run_synchronously()
      local continuation = Task.completed_task:continue_with(function() note("continuation", name()) end)
      flow.await_all(spawned, hot, cold, continuation)
    end)
    run()
    assert.same({ "hot ours", "cold ours" }, log)
    settle()
    assert.same({ "spawned default", "continuation default", "spawned default" }, table.move(log, 3, #log, 1, {}))
    assert.equal(2, #queue)
    drain()
    assert.same({ "hot ours", "cold ours" }, table.move(log, 6, #log, 1, {}))
    assert.is_true(task.is_completed_successfully)
  end))

  it("starts cold tasks and continuations that are given to it", in_task(function()
    local scheduler, queue, run, drain = keeper()
    local log, note = recorder()
    local cold = Task.new(note, "cold")
    assert.equal(cold, cold:start(scheduler))
    assert.equal("waiting_to_run", cold.status)
    local again = raises("InvalidOperation", cold.start, cold, scheduler)
    assert.truthy(again.message:find("started before", 1, true))
    run()
    local source = flow.TaskCompletionSource()
    local after = source.task:continue_with(function(task)
      note("after", task.result, TaskScheduler.current() == scheduler)
      flow.yield()
      note("later")
    end, { scheduler = scheduler })
    settle()
    assert.equal(0, #queue)
    assert.equal("waiting_for_activation", after.status)
    source:set_result(7)
    settle()
    assert.equal("waiting_to_run", after.status)
    drain()
    assert.same({ "cold", "after 7 true", "later" }, log)
    assert.is_true(after.is_completed_successfully)
  end))

  it("runs a task synchronously on request, and gets the rest of it", in_order(function()
    local scheduler, queue, run = keeper()
    local log, note = recorder()
    local task = Task.new(function()
      note(TaskScheduler.current() == scheduler)
      flow.yield()
      note(TaskScheduler.current() == scheduler)
    end):run_synchronously(scheduler)
    assert.same({ "true" }, log)
    flow.yield()
    assert.equal(1, #queue)
    run()
    assert.same({ "true", "true" }, log)
    assert.is_true(task.is_completed)
  end))

  it("may be the default one, which is as if none was given", in_order(function()
    local log, note = recorder()
    flow.spawn(note, "a")
    local b = flow.spawn_on(TaskScheduler.default, note, "b")
    local c = Task.new(note, "c"):start(TaskScheduler.default)
    Task.completed_task:continue_with(function() note("d") end, { scheduler = TaskScheduler.default })
    assert.is_false(TaskScheduler.default:try_execute_task(b))
    flow.yield()
    assert.same({ "a", "b", "c", "d" }, log)
    assert.is_true(c.is_completed)
    assert.is_true(TaskScheduler.current() == TaskScheduler.default)
  end))

  it("shows nobody's async locals, and keeps those that it sets to itself", in_task(function()
    local loc = flow.AsyncLocal()
    local seen = {}
    local scheduler
    scheduler = TaskScheduler.new {
      queue_task = function(_, task)
        seen[#seen + 1] = loc.value or "none"
        loc.value = "queue"
        flow.ExecutionContext.suppress_flow()
        SynchronizationContext.set((poster()))
        scheduler:try_execute_task(task)
      end,
    }
    loc.value = "mine"
    local task = flow.spawn_on(scheduler, function()
      local before = loc.value
      loc.value = "task"
      flow.yield()
      return before, loc.value, SynchronizationContext.current()
    end)
    assert.equal("mine", loc.value)
    assert.same({ "mine", "task" }, { task:await() })
    assert.same({ "none", "none" }, seen)
    assert.equal("mine", loc.value)
    assert.is_nil(SynchronizationContext.current())
  end))

  it("forgets a task that is complete, and is forgotten by it", in_order(function()
    local kept = setmetatable({}, { __mode = "v" })
    local task
    local function scope()
      local scheduler, _, _, drain = keeper()
      kept.scheduler = scheduler
      task = flow.spawn_on(scheduler, function() slowly() end)
      drain()
    end
    scope()
    assert.is_true(task.is_completed)
    collect()
    assert.is_nil(kept.scheduler)
  end))
end)

describe("try_execute_task", function()
  it("gives false for a task that is not queued there", in_order(function()
    local scheduler, queue, run, drain = keeper()
    local other = keeper()
    local plain, cold = flow.spawn(slowly), Task.new(slowly)
    local task = flow.spawn_on(scheduler, function() flow.await(plain) end)
    assert.is_false(other:try_execute_task(task))
    assert.is_false(scheduler:try_execute_task(plain))
    assert.is_false(scheduler:try_execute_task(cold))
    assert.is_false(scheduler:try_execute_task(Task.completed_task))
    assert.is_false(scheduler:try_execute_task(flow.delay(0)))
    assert.is_false(scheduler:try_execute_task(flow.current_task()))
    run()
    assert.is_false(scheduler:try_execute_task(task)) -- parked
    plain:await()
    drain()
    assert.is_true(task.is_completed)
    assert.is_false(scheduler:try_execute_task(task))
    assert.equal(0, #queue)
  end))

  it("runs nothing twice, not even a later continuation", in_order(function()
    local log, note = recorder()
    local scheduler, queue, run = keeper()
    local task = flow.spawn_on(scheduler, function()
      note("start")
      note("itself", scheduler:try_execute_task(flow.current_task()))
      flow.yield()
      note("on")
    end)
    run()
    assert.is_false(scheduler:try_execute_task(task)) -- ready, but not queued yet
    flow.yield()
    assert.is_true(scheduler:try_execute_task(task))
    assert.is_false(scheduler:try_execute_task(queue[1]))
    assert.same({ "start", "itself false", "on" }, log)
  end))

  it("works in queue_task, in a task, in another coroutine, and outside the loop", function()
    local log, note = recorder()
    local function body(place)
      note(place, flow.current_task().name)
      flow.yield()
      note(place, "later")
      return place
    end
    local inlined = inline()
    local scheduler, queue = keeper()
    local function take() return table.remove(queue, 1) end
    helper.in_order(function()
      local task = flow.spawn_on(inlined, body, "queue_task")
      assert.same({ "queue_task " .. task.name }, log)
      assert.equal("queue_task", task:await())

      flow.spawn_on(scheduler, body, "task")
      assert.is_true(scheduler:try_execute_task(take()))
      flow.yield()
      flow.spawn(function() scheduler:try_execute_task(take()) end):await()

      flow.spawn_on(scheduler, body, "coroutine")
      for _ = 1, 2 do
        assert.is_true(coroutine.wrap(function() return scheduler:try_execute_task(take()) end)())
        flow.yield()
      end
    end)()
    local task = flow.spawn_on(scheduler, body, "outside")
    assert.is_true(scheduler:try_execute_task(take()))
    flow.loop.run("nowait")
    assert.is_true(scheduler:try_execute_task(take()))
    assert.equal("outside", task.result)
    local name = task.name
    assert.same({ "queue_task " .. name, "queue_task later", "task " .. name, "task later",
      "coroutine " .. name, "coroutine later", "outside " .. name, "outside later" }, log)
  end)

  it("nests as deep as it likes", in_task(function()
    local scheduler, queue = keeper()
    local function nested(n)
      if n == 0 then return 0 end
      local task = flow.spawn_on(scheduler, nested, n - 1)
      assert.is_true(scheduler:try_execute_task(table.remove(queue)))
      return 1 + task.result
    end
    assert.equal(150, (function() -- completes while its caller waits on the stack
      local task = flow.spawn_on(scheduler, nested, 150)
      assert.is_true(scheduler:try_execute_task(table.remove(queue)))
      return task.result
    end)())
    local starts = 0
    local through = TaskScheduler.new {
      queue_task = function(self, task)
        if task.status == "waiting_to_run" then starts = starts + 1 end
        self:try_execute_task(task)
      end,
    }
    local function awaiting(n)
      return n == 0 and 0 or 1 + flow.await(flow.spawn_on(through, awaiting, n - 1))
    end
    local depth = many(1000)
    assert.equal(depth, flow.await(flow.spawn_on(through, awaiting, depth)))
    assert.equal(depth + 1, starts)
  end))

  it("refuses what is no scheduler and no task", in_task(function()
    local scheduler = keeper()
    local task = flow.spawn(slowly)
    assert.truthy(raised(scheduler.try_execute_task, {}, task):find("TaskScheduler expected, got table", 1, true))
    assert.truthy(raised(scheduler.try_execute_task, scheduler, {}):find("Task expected, got table", 1, true))
    assert.truthy(raised(scheduler.try_execute_task, scheduler):find("Task expected", 1, true))
  end))
end)

describe("an error in queue_task", function()
  it("faults the task that is given, and is raised by the call that gave it", in_task(function()
    local value = {}
    local reports = watch()
    local refused
    local scheduler = TaskScheduler.new {
      queue_task = function(_, task)
        refused = task
        error(value, 0)
      end,
    }
    local started = false
    local function body() started = true end
    assert.is_true(rawequal(value, raised(flow.spawn_on, scheduler, body)))
    assert.equal("faulted", refused.status)
    assert.truthy(refused.name:find("scheduler_spec.lua:", 1, true))
    assert.is_true(rawequal(value, raised(refused.await, refused)))
    local cold = Task.new(body)
    assert.is_true(rawequal(value, raised(cold.start, cold, scheduler)))
    assert.equal("faulted", cold.status)
    assert.equal(value, cold.exception)
    assert.is_false(scheduler:try_execute_task(cold))
    assert.is_false(started)
    refused, cold = nil, nil -- luacheck: ignore 311
    collect()
    assert.same({}, reports) -- the caller has seen it
  end))

  it("faults a continuation where it waits, and closes what it has open", in_order(function()
    local log, note = recorder()
    local accept = true
    local scheduler
    scheduler = TaskScheduler.new {
      queue_task = function(self, task)
        if not accept then error("full", 0) end
        self:try_execute_task(task)
      end,
    }
    local task = flow.spawn_on(scheduler, function()
      local _ <close> = closing(function(err) note("closed", err) end)
      pcall(flow.yield)
      note("never")
    end)
    accept = false
    flow.yield()
    assert.equal("faulted", task.status)
    assert.equal("full", raised(task.await, task))
    assert.same({ "closed nil" }, log) -- as by coroutine.close
    local after = Task.completed_task:continue_with(function() note("never") end, { scheduler = scheduler })
    assert.equal("full", raised(after.await, after))
    assert.same({ "closed nil" }, log)
  end))

  it("does not reach a task that it has run before", in_task(function()
    local reports = watch()
    local scheduler = TaskScheduler.new {
      queue_task = function(self, task)
        self:try_execute_task(task)
        error("late", 0)
      end,
    }
    local task
    assert.equal("late", raised(flow.spawn_on, scheduler, function()
      task = flow.current_task()
      flow.yield()
      return "done"
    end))
    assert.equal("done", task:await())
    assert.same({ "late" }, { reports[1].err, reports[1].task }) -- that of the continuation has no caller
    assert.equal(1, #reports)
  end))

  it("may be an attempt to wait there", in_task(function()
    local scheduler = TaskScheduler.new { queue_task = function() flow.yield() end }
    is_error("InvalidOperation", raised(flow.spawn_on, scheduler, slowly), "callback", "flow.spawn")
    local driving = TaskScheduler.new { queue_task = function() flow.run(slowly) end }
    is_error("InvalidOperation", raised(flow.spawn_on, driving, slowly), "callback")
  end))

  it("is also that there is none any more", in_task(function()
    local scheduler = keeper()
    scheduler.queue_task = nil
    assert.truthy(raised(flow.spawn_on, scheduler, slowly):find("nil value", 1, true))
  end))
end)

describe("a task in the hands of a scheduler", function()
  it("lives as long as the scheduler holds it", in_order(function()
    local scheduler, queue, _, drain = keeper()
    local ran = 0
    flow.spawn_on(scheduler, function()
      flow.yield()
      collect()
      ran = ran + 1
    end)
    local reports = watch()
    collect()
    assert.equal(1, #queue)
    drain()
    assert.equal(1, ran)
    assert.same({}, reports)
  end))

  it("is abandoned, reported and closed when the scheduler drops it", in_order(function()
    local reports = watch()
    local log, note = recorder()
    local dropped = 0
    local function scope()
      local scheduler = TaskScheduler.new {
        queue_task = function(self, task)
          if task.status == "waiting_to_run" and task.name ~= "never started" then
            self:try_execute_task(task)
          else
            dropped = dropped + 1
          end
        end,
      }
      local task = flow.spawn_on(scheduler, function()
        local _ <close> = closing(function(err) note("closed", err) end)
        flow.yield()
        note("never")
      end)
      task.name = "started"
      local cold = Task.new(function() note("never") end)
      cold.name = "never started"
      cold:start(scheduler)
      flow.yield()
    end
    scope()
    assert.equal(2, dropped)
    collect()
    assert.same({ "closed nil" }, log)
    assert.equal(2, #reports)
    table.sort(reports, function(a, b) return a.task.name < b.task.name end)
    is_error("TaskAbandoned", reports[1].err, "never started", "before it started", "dropped it")
    is_error("TaskAbandoned", reports[2].err, "'started'", "scheduler_spec.lua:", "dropped it")
    assert.same({ "faulted", "faulted" }, { reports[1].task.status, reports[2].task.status })
  end))

  it("is not run by a finalizer after the collector gave it up", in_task(function()
    local reports = watch()
    local results = {}
    local alive = {} -- luacheck: ignore 241
    local function scope()
      local scheduler = keeper()
      for i = 1, 3 do
        local task = flow.spawn_on(scheduler, function() error("must not run") end)
        alive[i] = setmetatable({}, { __gc = function()
          results[#results + 1] = tostring(scheduler:try_execute_task(task))
        end })
      end
    end
    scope()
    alive = nil
    collect()
    assert.same({ "false", "false", "false" }, results)
    assert.equal(3, #reports)
    for _, report in ipairs(reports) do is_error("TaskAbandoned", report.err, "before it started") end
  end))

  it("is named by the report of a deadlock", function()
    local scheduler, queue = keeper()
    local context = poster()
    local queued = flow.spawn_on(scheduler, slowly)
    queued.name = "queued"
    local err = raised(flow.run, function() queued:await() end)
    is_error("InvalidOperation", err, "deadlock", "'queued' waits to be run by its scheduler", "not started",
      "waits for 'queued'")
    is_error("InvalidOperation", raised(flow.await, queued), "deadlock", "'queued'")
    err = raised(flow.run, function()
      SynchronizationContext.set(context)
      flow.current_task().name = "posted"
      flow.yield()
    end)
    is_error("InvalidOperation", err, "deadlock", "'posted' waits to be run by", "scheduler_spec.lua:")
    assert.equal(1, #queue)
  end)

  it("does not hold up a host that turns the loop", function()
    local scheduler, _, run = keeper()
    local task = flow.spawn_on(scheduler, function()
      flow.yield()
      return "done"
    end)
    local turns = 0
    while not task.is_completed do
      flow.loop.run("nowait")
      run()
      turns = turns + 1
      assert.is_true(turns < 10)
    end
    assert.equal("done", task.result)
  end)

  it("lets go without a word when the state closes, or runs in a finalizer then", function()
    local out = helper.output [[
      local flow = require "coflow"
      local kept = {}
      local scheduler = flow.TaskScheduler.new { queue_task = function(_, task) kept[#kept + 1] = task end }
      local context = flow.SynchronizationContext.new { post = function(_, fn) kept[#kept + 1] = fn end }
      flow.spawn_on(scheduler, function() end)
      flow.spawn_on(scheduler, function()
        local _ <close> = setmetatable({}, { __close = function() print "closed" end })
        flow.yield()
      end)
      scheduler:try_execute_task(kept[2])
      flow.async(function()
        flow.SynchronizationContext.set(context)
        local _ <close> = setmetatable({}, { __close = function() print "closed" end })
        flow.yield()
      end)()
      flow.loop.run("nowait")
      setmetatable({}, { __gc = function()
        for _, x in ipairs(kept) do
          if type(x) == "function" then x() else scheduler:try_execute_task(x) end
        end
      end })
      assert(#kept == 4)
    ]]
    assert.equal("closed\nclosed\n", out)
  end)
end)

describe("a token", function()
  it("cancels a continuation before it starts, also one that is queued, without the scheduler", in_order(function()
    local scheduler, queue = keeper()
    local log, note = recorder()
    local function continue(task, token)
      return task:continue_with(function() note("ran") end, { scheduler = scheduler, token = token })
    end
    local source, parked = flow.CancellationTokenSource(), flow.TaskCompletionSource()
    local waiting = continue(parked.task, source.token)
    local queued = continue(Task.completed_task, source.token)
    settle()
    assert.equal(1, #queue)
    source:cancel()
    settle()
    assert.same({ "canceled", "canceled" }, { waiting.status, queued.status })
    assert.is_false(scheduler:try_execute_task(queued))
    local late = continue(Task.completed_task, source.token)
    settle()
    assert.equal("canceled", late.status)
    assert.equal(1, #queue)
    assert.same({}, log)
  end))

  it("does nothing to a continuation that has started, and is free of it then", in_order(function()
    local scheduler, _, run, drain = keeper()
    local source = flow.CancellationTokenSource()
    local task = Task.completed_task:continue_with(function()
      flow.yield()
      return "done"
    end, { scheduler = scheduler, token = source.token })
    settle()
    run()
    source:cancel()
    drain()
    assert.equal("done", task.result)
  end))

  it("given to a wait ends it, and the scheduler runs what follows", in_order(function()
    local scheduler, queue, run, drain = keeper()
    local source = flow.CancellationTokenSource()
    local task = flow.spawn_on(scheduler, function()
      local ok, err = pcall(flow.sleep, 10, source.token)
      return ok, err.name, TaskScheduler.current() == scheduler
    end)
    run()
    source:cancel()
    flow.yield()
    assert.equal(1, #queue)
    source:cancel()
    drain()
    assert.same({ false, "OperationCanceled", true }, { task:await() })
  end))
end)

describe("the ambient token", function()
  it("reaches a task that is handed over at its next wait", in_task(function()
    local scheduler, queue, run = keeper()
    local log, note = recorder()
    local task = flow.spawn_on(scheduler, function()
      note("start")
      note(flow.spawn(slowly, "value"):await())
      note(pcall(flow.yield))
      flow.yield()
    end)
    assert.is_true(task:cancel())
    flow.sleep(1)
    assert.same({}, log) -- it still starts, and nobody else starts it
    run()
    assert.same({ "start" }, log)
    assert.equal("canceled", task.status)

    log[1] = nil
    task = flow.spawn_on(scheduler, function()
      note(flow.spawn(slowly, "value"):await())
      note(pcall(flow.yield))
      flow.yield()
    end)
    run()
    flow.sleep(1)
    assert.equal(1, #queue)
    task:cancel("enough") -- it has been woken, by what it awaited
    flow.sleep(1)
    assert.equal(1, #queue)
    assert.same({}, log)
    run()
    assert.equal("value", log[1])
    assert.truthy(log[2]:find("false OperationCanceled", 1, true))
    assert.equal("canceled", task.status)
  end))

  it("wakes a task that waits, and its scheduler runs it", in_order(function()
    local scheduler, queue, run = keeper()
    local task = flow.spawn_on(scheduler, function()
      local ok, err = pcall(flow.with_timeout, 1, flow.sleep, 10)
      return ok, err.name, TaskScheduler.current() == scheduler
    end)
    run()
    flow.sleep(2)
    assert.equal(1, #queue)
    run()
    assert.same({ false, "Timeout", true }, { task:await() })
    local context, posts, run_posts = poster()
    local posted = flow.async(function()
      SynchronizationContext.set(context)
      flow.sleep(10)
    end)()
    posted:cancel()
    flow.yield()
    assert.equal(1, #posts)
    run_posts()
    assert.equal("canceled", posted.status)
  end))

  it("is the one under which the task was given to its scheduler", in_order(function()
    local scheduler, _, run, drain = keeper()
    local token
    local task = flow.with_timeout(1, function()
      token = flow.cancellation_token()
      return flow.spawn_on(scheduler, function()
        flow.sleep(10)
        return "done"
      end)
    end)
    run()
    flow.sleep(20)
    drain()
    assert.equal("done", task.result) -- the deadline ended with its scope
    assert.is_false(token.is_cancellation_requested)
    local group_task
    local err = raised(flow.task_group, function(group)
      group_task = flow.spawn_on(scheduler, flow.sleep, 10)
      run()
      group:spawn(error, "failed", 0)
    end)
    assert.equal("failed", err)
    drain()
    assert.equal("canceled", group_task.status)
  end))
end)

describe("a synchronization context", function()
  it("is posted each continuation once, and the task goes on when what was posted is called", in_order(function()
    local log, note = recorder()
    local queue = {}
    local context
    context = SynchronizationContext.new {
      post = function(self, fn)
        note("post", rawequal(self, context), flow.current_task(), type(fn))
        queue[#queue + 1] = fn
      end,
    }
    local task = flow.async(function()
      SynchronizationContext.set(context)
      note("set", SynchronizationContext.current() == context)
      flow.spawn(slowly):await()
      note("awaited", SynchronizationContext.current() == context)
      flow.sleep(1)
      note("slept")
      return 1, 2
    end)()
    note("caller", SynchronizationContext.current())
    settle()
    settle()
    assert.equal(1, #queue)
    assert.equal("waiting_for_activation", task.status)
    assert.equal(0, select("#", queue[1]()))
    flow.sleep(1)
    flow.yield()
    queue[2]()
    assert.same({ "set true", "caller nil", "post true nil function", "awaited true",
      "post true nil function", "slept" }, log)
    assert.same({ 1, 2 }, { task:await() })
  end))

  it("does nothing when it calls what was posted again, or late", in_order(function()
    local context, queue = poster()
    local count = 0
    local task = flow.async(function()
      SynchronizationContext.set(context)
      for _ = 1, 3 do
        flow.yield()
        count = count + 1
      end
    end)()
    for i = 1, 3 do
      flow.yield()
      assert.equal(i, #queue)
      for k = 1, i - 1 do queue[k]() end
      assert.equal(i - 1, count)
      queue[i]()
      for k = 1, i do queue[k]() end
      assert.equal(i, count)
    end
    assert.is_true(task.is_completed)
    for k = 1, 3 do queue[k]() end
    assert.equal(3, count)
  end))

  it("is not passed by when the awaited task could be run in place", in_task(function()
    local context, queue, run = poster()
    local task = flow.spawn(function()
      SynchronizationContext.set(context)
      return flow.spawn(function() return "child" end):await() -- the only task that is ready
    end)
    flow.sleep(1)
    assert.equal(1, #queue)
    run()
    assert.equal("child", task.result)
    local scheduler, tasks = keeper()
    local waiting = flow.spawn(function()
      return Task.completed_task:continue_with(function() return "continued" end, { scheduler = scheduler }):await()
    end)
    flow.sleep(1)
    assert.equal(1, #tasks)
    assert.is_true(scheduler:try_execute_task(tasks[1]))
    assert.equal("continued", waiting:await())
  end))

  it("may call what is posted at once, or ask somebody else to", in_task(function()
    local log, note = recorder()
    local function body(context)
      SynchronizationContext.set(context)
      note("a", flow.spawn(slowly, "x"):await())
      flow.yield()
      note("b")
    end
    local at_once = SynchronizationContext.new { post = function(_, fn) fn() end }
    flow.async(body)(at_once):await()
    local spawning = SynchronizationContext.new { post = function(_, fn) flow.spawn(fn) end }
    flow.async(body)(spawning):await()
    assert.same({ "a x", "b", "a x", "b" }, log)
  end))

  it("goes on at once after an await of a complete task", in_task(function()
    local context, queue = poster()
    local task = flow.async(function()
      SynchronizationContext.set(context)
      flow.await(Task.completed_task)
      flow.await(Task.completed_task:configure_await(false))
      return SynchronizationContext.current() == context
    end)()
    assert.is_true(task.result)
    assert.equal(0, #queue)
  end))

  it("is left for good by an await configured so", in_order(function()
    local context, queue, run = poster()
    local log, note = recorder()
    local function wait() return flow.spawn(slowly, "value") end
    local task = flow.async(function()
      SynchronizationContext.set(context)
      note(flow.await(wait():configure_await(true)), SynchronizationContext.current() == context)
      note(flow.await(wait():configure_await(false)), SynchronizationContext.current())
      flow.yield()
      SynchronizationContext.set(context)
      note(flow.try_await(wait():configure_await(false)))
      SynchronizationContext.set(context)
      local failing = flow.spawn(function() error("failed", 0) end)
      note(pcall(flow.await, failing:configure_await(false)))
      note(SynchronizationContext.current())
      return flow.when_all(wait():configure_await(false)):await()[1]
    end)()
    for _ = 1, 4 do slowly() end
    assert.equal(1, #queue)
    run()
    for _ = 1, 20 do flow.yield() end
    assert.equal(0, #queue)
    assert.same({ "value true", "value nil", "true value", "false failed", "nil" }, log)
    assert.equal("value", task.result)
  end))

  it("is kept when such an await is refused", in_task(function()
    local context = poster()
    local task
    task = flow.spawn(function()
      SynchronizationContext.set(context)
      local err = raised(flow.await, task:configure_await(false))
      is_error("InvalidOperation", err, "cannot await itself")
      local other = flow.spawn(slowly):configure_await(false)
      table.sort({ 2, 1 }, function()
        is_error("InvalidOperation", raised(flow.await, other), "sort")
      end)
      return SynchronizationContext.current() == context
    end)
    assert.is_true(task:await())
  end))

  it("belongs to the task that set it: async functions start with it, spawned tasks do not", in_order(function()
    local context, other = poster(), poster()
    local log, note = recorder()
    local function name()
      local current = SynchronizationContext.current()
      return current == context and "context" or current == other and "other" or "none"
    end
    local function body(place)
      note(place, name())
      SynchronizationContext.set(other)
    end
    SynchronizationContext.set(context)
    flow.async(body)("async")
    note("after", name())
    Task.new(body, "synchronous"):run_synchronously()
    note("after", name())
    body("plain")
    note("after", name())
    SynchronizationContext.set(nil)
    SynchronizationContext.set(context)
    local spawned, continuation = flow.spawn(body, "spawned"), Task.completed_task:continue_with(function()
      body("continuation")
    end)
    SynchronizationContext.set(nil)
    flow.await_all(spawned, continuation)
    note("end", name())
    assert.same({ "async context", "after context", "synchronous context", "after context", "plain context",
      "after other", "spawned none", "continuation none", "end none" }, log)
  end))

  it("is put back by call, run and enter, also on an error", in_task(function()
    local context, other = poster(), poster()
    local captured = flow.ExecutionContext.capture()
    local function current() return SynchronizationContext.current() end
    for _, outer in ipairs { context, false } do
      SynchronizationContext.set(outer or nil)
      local before = current()
      local function set()
        assert.equal(before, current()) -- no part of an execution context: it is as it was
        SynchronizationContext.set(other)
        assert.equal(other, current())
      end
      local function fail()
        set()
        error("failed", 0)
      end
      flow.call(set)
      assert.equal(before, current())
      assert.equal("failed", raised(flow.call, fail))
      assert.equal(before, current())
      captured:run(set)
      assert.equal(before, current())
      assert.equal("failed", raised(flow.ExecutionContext.run, captured, fail))
      assert.equal(before, current())
      do
        local _ <close> = captured:enter()
        set()
      end
      assert.equal(before, current())
      flow.ExecutionContext.wrap(set)()
      assert.equal(before, current())
      SynchronizationContext.set(nil)
    end
    SynchronizationContext.set(other)
    flow.ExecutionContext.restore(captured)
    assert.equal(other, current())
    SynchronizationContext.set(nil)
  end))

  it("outside every task is that of the async functions started there", function()
    local context, queue, run = poster()
    SynchronizationContext.set(context)
    local task = flow.async(function()
      flow.yield()
      return SynchronizationContext.current() == context
    end)()
    assert.is_nil(flow.run(SynchronizationContext.current))
    assert.equal(1, #queue)
    run()
    assert.is_true(task.result)
    assert.equal(context, SynchronizationContext.current())
    SynchronizationContext.set(nil)
    assert.is_nil(SynchronizationContext.current())
  end)

  it("counts as none when it is the plain one", in_order(function()
    local plain = SynchronizationContext.new()
    local log, note = recorder()
    local task = flow.async(function()
      SynchronizationContext.set(plain)
      note(SynchronizationContext.current() == plain)
      flow.yield()
      note(SynchronizationContext.current() == plain)
    end)()
    task:await()
    plain:post(function() note("posted") end)
    plain:send(function() note("sent") end)
    flow.yield()
    assert.same({ "true", "true", "sent", "posted" }, log)
  end))

  it("comes before the scheduler for continuations", in_order(function()
    local context, posts, run_posts = poster()
    local scheduler, queue, run = keeper()
    local task = flow.spawn_on(scheduler, function()
      SynchronizationContext.set(context)
      flow.yield()
      SynchronizationContext.set(nil)
      flow.yield()
      return TaskScheduler.current() == scheduler
    end)
    run()
    flow.yield()
    assert.same({ 1, 0 }, { #posts, #queue })
    run_posts()
    flow.yield()
    assert.same({ 0, 1 }, { #posts, #queue })
    run()
    assert.is_true(task.result)
  end))

  it("fails the task that it refuses to be posted", in_order(function()
    local value = {}
    local context = SynchronizationContext.new { post = function() error(value, 0) end }
    local log, note = recorder()
    local task = flow.async(function()
      SynchronizationContext.set(context)
      local _ <close> = closing(function(err) note("closed", err) end)
      flow.yield()
      note("never")
    end)()
    flow.yield()
    assert.equal("faulted", task.status)
    assert.is_true(rawequal(value, raised(task.await, task)))
    assert.same({ "closed nil" }, log)
  end))

  it("that drops what was posted abandons the task", in_task(function()
    local reports = watch()
    local log, note = recorder()
    local function scope()
      flow.async(function()
        SynchronizationContext.set(SynchronizationContext.new { post = function() end })
        local _ <close> = closing(function() note("closed") end)
        flow.yield()
      end)()
      flow.yield()
    end
    scope()
    collect()
    assert.same({ "closed" }, log)
    assert.equal(1, #reports)
    is_error("TaskAbandoned", reports[1].err, "scheduler_spec.lua:", "synchronization context has dropped it")
  end))

  it("that holds what was posted holds the task", in_task(function()
    local reports = watch()
    local context, queue, run = poster()
    local done = false
    flow.async(function()
      SynchronizationContext.set(context)
      flow.yield()
      done = true
    end)()
    flow.yield()
    collect()
    assert.equal(1, #queue)
    run()
    assert.is_true(done)
    assert.same({}, reports)
  end))

  it("is forgotten by a task that is complete", in_task(function()
    local kept = setmetatable({}, { __mode = "v" })
    local task
    local function scope()
      kept.context = poster()
      task = flow.async(function() SynchronizationContext.set(kept.context) end)()
    end
    scope()
    assert.is_true(task.is_completed)
    collect()
    assert.is_nil(kept.context)
  end))

  it("makes a scheduler that runs tasks there", in_order(function()
    local context, queue, run, drain = poster()
    raises("InvalidOperation", TaskScheduler.from_current_synchronization_context)
    SynchronizationContext.set(context)
    local scheduler = TaskScheduler.from_current_synchronization_context()
    SynchronizationContext.set(nil)
    local task = flow.spawn_on(scheduler, function()
      local there = SynchronizationContext.current() == context and TaskScheduler.current() == scheduler
      local before = #queue
      Task.new(function() there = there and TaskScheduler.current() == scheduler end):run_synchronously()
      there = there and #queue == before
      flow.yield()
      return there and SynchronizationContext.current() == context
    end)
    assert.equal(1, #queue)
    run()
    flow.yield()
    assert.equal(1, #queue)
    drain()
    assert.is_true(task.result)
    local after = Task.completed_task:continue_with(SynchronizationContext.current, { scheduler = scheduler })
    drain()
    assert.equal(context, after.result)
  end))
end)

describe("TaskScheduler.limited", function()
  -- Runs `count` tasks that suspend on it; the events, and the highest number between start and end.
  local function crowd(scheduler, count, body)
    local inside, most, tasks = 0, 0, {}
    for i = 1, count do
      tasks[i] = flow.spawn_on(scheduler, function()
        inside = inside + 1
        most = math.max(most, inside)
        local _ <close> = closing(function() inside = inside - 1 end)
        return body(i)
      end)
    end
    flow.when_all(tasks):try_await()
    assert.equal(0, inside)
    return most, tasks
  end

  it("has at most so many tasks between start and end, and starts them in order", in_order(function()
    for limit = 1, 4 do
      local log, note = recorder()
      local most = crowd(TaskScheduler.limited(limit), 9, function(i)
        note(i)
        flow.sleep(1)
        flow.yield()
      end)
      assert.equal(limit, most)
      assert.equal("1 2 3 4 5 6 7 8 9", table.concat(log, " "))
    end
    assert.equal(3, (crowd(TaskScheduler.limited(7), 3, slowly)))
  end))

  it("starts nothing at once", in_order(function()
    local log, note = recorder()
    local task = flow.spawn_on(TaskScheduler.limited(1), note, "started")
    assert.same({}, log)
    assert.equal("waiting_to_run", task.status)
    flow.yield()
    assert.same({ "started" }, log)
  end))

  it("frees the place of a task that fails, is canceled or is abandoned", in_order(function()
    local reports = watch()
    local limited = TaskScheduler.limited(1)
    local most, tasks = crowd(limited, 3, function(i)
      settle()
      if i == 1 then error("failed", 0) end
      if i == 2 then error(flow.errors.OperationCanceled("canceled"), 0) end
      return i
    end)
    assert.equal(1, most)
    assert.same({ "faulted", "canceled", "ran_to_completion" },
      { tasks[1].status, tasks[2].status, tasks[3].status })
    local held = { flow.TaskCompletionSource() }
    flow.spawn_on(limited, function() held[1].task:await() end)
    local after = flow.spawn_on(limited, function() return "after" end)
    settle()
    assert.equal("waiting_to_run", after.status)
    held[1] = nil
    collect()
    is_error("TaskAbandoned", reports[#reports].err)
    assert.equal("after", after:await())
  end))

  it("is not forgotten while tasks wait for it", in_order(function()
    local ran = 0
    local function scope()
      local limited = TaskScheduler.limited(1)
      flow.spawn_on(limited, function() flow.TaskCompletionSource().task:await() end)
      for _ = 1, 3 do flow.spawn_on(limited, function() ran = ran + 1 end) end
    end
    scope()
    settle()
    collect()
    settle()
    assert.equal(3, ran)
  end))

  it("keeps its limit when its tasks queue more, and may wait for them if there is room", in_task(function()
    local limited = TaskScheduler.limited(2)
    local inside, most = 0, 0
    local nested
    nested = function(n)
      inside = inside + 1
      most = math.max(most, inside)
      flow.yield()
      local children = {}
      for i = 1, n do children[i] = flow.spawn_on(limited, nested, n - 1) end
      flow.yield()
      inside = inside - 1
      return children
    end
    local function all(task)
      for _, child in ipairs(task:await()) do all(child) end
    end
    all(flow.spawn_on(limited, nested, 4))
    assert.equal(2, most)
    assert.equal(0, inside)
    assert.equal("inner", flow.spawn_on(limited, function()
      return flow.spawn_on(limited, slowly, "inner"):await()
    end):await())
  end))

  it("lets the async functions that its tasks call go on beside them, and counts them", in_task(function()
    local limited = TaskScheduler.limited(1)
    local log, note = recorder()
    local release = flow.TaskCompletionSource()
    local first = flow.spawn_on(limited, function()
      note("hot", flow.async(slowly)("done"):await())
      flow.async(function()
        release.task:await()
        note("outlived")
      end)()
      note("first")
    end)
    local second = flow.spawn_on(limited, note, "second")
    first:await()
    settle()
    assert.equal("waiting_to_run", second.status)
    release:set_result()
    second:await()
    assert.same({ "hot done", "first", "outlived", "second" }, log)
  end))

  it("forgets a continuation that was canceled while it waited", in_task(function()
    local concurrent, exclusive = TaskScheduler.concurrent_exclusive_pair()
    local gate, source = flow.TaskCompletionSource(), flow.CancellationTokenSource()
    local reading = flow.spawn_on(concurrent, function() gate.task:await() end)
    settle()
    local writing = Task.completed_task:continue_with(print, { scheduler = exclusive, token = source.token })
    settle()
    local reading_too = flow.spawn_on(concurrent, function() return "let in" end)
    settle()
    assert.equal("waiting_to_run", reading_too.status)
    source:cancel()
    assert.equal("let in", reading_too:await())
    assert.equal("canceled", writing.status)
    assert.is_false(reading.is_completed)
    gate:set_result()
    reading:await()
  end))

  it("keeps the place of a task that has left it by configure_await", in_task(function()
    local limited = TaskScheduler.limited(1)
    local first = flow.spawn_on(limited, function()
      flow.await(flow.spawn(slowly):configure_await(false))
      local left = TaskScheduler.current() == TaskScheduler.default
      flow.sleep(1)
      return left
    end)
    local second = flow.spawn_on(limited, function() return first.is_completed end)
    assert.is_true(second:await())
    assert.is_true(first:await())
  end))
end)

describe("TaskScheduler.concurrent_exclusive_pair", function()
  it("runs readers together and writers alone, in order of arrival", in_order(function()
    local concurrent, exclusive = TaskScheduler.concurrent_exclusive_pair()
    local log, note = recorder()
    local readers, writers = 0, 0
    local function read(name)
      readers = readers + 1
      assert.equal(0, writers)
      note(name)
      flow.sleep(1)
      note(name, "ends with", readers, "inside")
      readers = readers - 1
    end
    local function write(name)
      writers = writers + 1
      assert.same({ 0, 1 }, { readers, writers })
      note(name)
      flow.sleep(1)
      note(name, "ends")
      writers = writers - 1
    end
    local tasks = {}
    local function spawn(scheduler, ...) tasks[#tasks + 1] = flow.spawn_on(scheduler, ...) end
    spawn(concurrent, read, "r1")
    spawn(concurrent, read, "r2")
    spawn(exclusive, write, "w1")
    spawn(exclusive, write, "w2")
    spawn(concurrent, read, "r3")
    spawn(concurrent, read, "r4")
    spawn(exclusive, write, "w3")
    flow.when_all(tasks):await()
    assert.same({ "r1", "r2", "r1 ends with 2 inside", "r2 ends with 1 inside", "w1", "w1 ends", "w2", "w2 ends",
      "r3", "r4", "r3 ends with 2 inside", "r4 ends with 1 inside", "w3", "w3 ends" }, log)
  end))
end)

describe("arguments", function()
  local function says(pattern, fn, ...)
    local err = raised(fn, ...)
    assert.equal("string", type(err))
    assert.truthy(err:find(pattern, 1, true), err)
  end

  it("are checked before anything is done", in_task(function()
    local scheduler = keeper()
    says("bad argument #1 to 'spawn_on' (coflow.TaskScheduler expected, got table)", function()
      flow.spawn_on({}, print)
    end)
    says("bad argument #2 to 'spawn_on'", function() flow.spawn_on(scheduler) end)
    local cold = Task.new(print)
    says("coflow.TaskScheduler expected, got number", function() cold:start(1) end)
    says("coflow.TaskScheduler expected", function() cold:run_synchronously({}) end)
    assert.equal("created", cold.status)
    says("scheduler must be a TaskScheduler", function() cold:continue_with(print, { scheduler = {} }) end)
    says("boolean expected, got nil", function() cold:configure_await() end)
    says("unknown option 'queue'", function() TaskScheduler.new { queue_task = print, queue = {} } end)
    says("queue_task must be a function", function() TaskScheduler.new { queue_task = 1 } end)
    says("queue_task is missing", function() TaskScheduler.new {} end)
    says("bad argument #1 to 'new' (queue_task is missing)", function() TaskScheduler.new() end)
    says("unknown option 'sned'", function() SynchronizationContext.new { sned = print } end)
    says("post must be a function", function() SynchronizationContext.new { post = "x" } end)
    says("SynchronizationContext or nil expected, got number", function() SynchronizationContext.set(1) end)
    says("SynchronizationContext or nil expected", function() SynchronizationContext.set { post = print } end)
    assert.equal("ran", flow.spawn_on(TaskScheduler.limited(2.0), function() return "ran" end):await())
    says("integer expected, got float", function() TaskScheduler.limited(1.5) end)
    says("integer expected, got nil", function() TaskScheduler.limited() end)
    says("at least 1", function() TaskScheduler.limited(0) end)
    says("function expected", function() SynchronizationContext.new():post() end)
  end))
end)
