-- coflow.scheduler: TaskScheduler, SynchronizationContext and spawn_on.
--
-- What runs a task is C's business (schedule.c); here are the two classes and the schedulers that come with
-- the library. Those are made of three moves with a task that was queued: run it now (core.try_execute), let the
-- loop run it on a later turn (core.release), or keep it. Two private methods of a scheduler tell it more:
-- `_joined(task)` when a task starts on it unqueued (a hot one inside one of its tasks), `_ended(task)` when
-- a task that was given to it is over, however it ended.
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"

-- Synchronization contexts ------------------------------------------------------------------------

---Where the code that runs under it wants to go on after each wait: a point of a host's frame, say.
---@class coflow.SynchronizationContext
---@field post fun(self: coflow.SynchronizationContext, fn: function) takes `fn` along, to be called later, once
---@field send fun(self: coflow.SynchronizationContext, fn: function) calls `fn` before it returns
local Context = { __name = "coflow.SynchronizationContext" }
Context.__index = Context

-- A context without a `post` of its own has this one, and counts as none for whoever awaits under it.
function Context:post(fn)
  core.check_function(2, fn)
  core.spawn(fn)
end

function Context:send(fn)
  core.check_function(2, fn)
  fn()
end

local SynchronizationContext = {}

-- What is wrong with the table of functions given to `new`, or nil.
local function problem(options, known)
  for key, value in pairs(core.check_options(1, options, known)) do
    if type(value) ~= "function" then return key .. " must be a function" end
  end
end

local context_fields = { post = true, send = true }

---A context whose `post(self, fn)` is told of every continuation of the code that runs under it: it is called once
---for each, with no task running, and must not wait. `fn()` goes on with the task, up to its next wait; called again
---it does nothing. An error in `post` faults that task with it (its `<close>` variables run, without waiting).
---`send` may be left out: it then calls `fn`. Without a `post` it is the plain context: nothing is posted there.
---Source: .NET SynchronizationContext.
---@param options? { post?: function, send?: function }
---@return coflow.SynchronizationContext
function SynchronizationContext.new(options)
  if options == nil then options = {} end
  local message = problem(options, context_fields)
  if message then core.argument_error(1, message) end
  return setmetatable({ post = options.post, send = options.send, _plain = not options.post }, Context)
end

---The synchronization context of the running task, or of the code outside every task; nil if there is none.
---@return coflow.SynchronizationContext?
function SynchronizationContext.current()
  return core.synchronization_context()
end

---Makes `context` (nil: none) the current one, from here on: whatever this task awaits next goes on there. It belongs
---to the task, not to the execution context: an async function starts with that of its caller and keeps its own
---writes, `spawn` starts without one; `flow.call`, `ExecutionContext.run` and `enter` put it back.
---Source: .NET SynchronizationContext.SetSynchronizationContext.
---@param context coflow.SynchronizationContext?
function SynchronizationContext.set(context)
  if context ~= nil and getmetatable(context) ~= Context then
    core.argument_error(1, "coflow.SynchronizationContext or nil expected, got " .. type(context))
  end
  core.set_synchronization_context(context)
end

-- Schedulers --------------------------------------------------------------------------------------

---What runs tasks: the loop (`TaskScheduler.default`), or somebody who takes them from `queue_task`.
---@class coflow.TaskScheduler
---@field queue_task fun(self: coflow.TaskScheduler, task: coflow.Task)
local Scheduler = { __name = "coflow.TaskScheduler" }
Scheduler.__index = Scheduler

local TaskScheduler = {}

local scheduler_fields = { queue_task = true }

---A scheduler whose `queue_task(self, task)` is told of the start and of each continuation of a task that was given to
---it (`spawn_on`, `task:start`, `continue_with`): it keeps the task and has it run by `try_execute_task`, at once or
---later. It is called with no task running and must not wait. An error in it faults the task (its `<close>` variables
---run, without waiting); `spawn_on` and `start`, when they called it, raise it too. A task that it drops is reported as
---TaskAbandoned when it is collected.
---Fields of your own can be assigned to the object.
---Source: .NET TaskScheduler.
---@param options { queue_task: fun(self: coflow.TaskScheduler, task: coflow.Task) }
---@return coflow.TaskScheduler
function TaskScheduler.new(options)
  local message = problem(options, scheduler_fields)
  if not message and not (options and options.queue_task) then message = "queue_task is missing" end
  if message then core.argument_error(1, message) end
  return setmetatable({ queue_task = options.queue_task }, Scheduler)
end

---Runs `task`, which was queued in this scheduler, at once: up to its next wait, or its end.
---From deep inside other tasks (50 levels that Lua cannot leave) the loop runs it, on a later turn.
---@param task coflow.Task
---@return boolean # false: it is not queued here (any more)
function Scheduler:try_execute_task(task)
  if not core.is_scheduler(self) then core.refuse_self(Scheduler, self) end
  core.check_class(2, task, "coflow.Task")
  return core.try_execute(self, task)
end

TaskScheduler.default = setmetatable({ _default = true }, Scheduler)

---The scheduler of the running task. A hot async function runs on that of its caller; `spawn` on the default one.
---@return coflow.TaskScheduler
function TaskScheduler.current()
  return core.current_scheduler() or TaskScheduler.default
end

---A scheduler whose tasks start, and go on, where the current synchronization context posts them.
---Raises: InvalidOperation if there is none.
---Source: .NET TaskScheduler.FromCurrentSynchronizationContext.
---@return coflow.TaskScheduler
function TaskScheduler.from_current_synchronization_context()
  local context = core.synchronization_context()
  if not context then
    error(core.errors.InvalidOperation("there is no current synchronization context here"), 0)
  end
  local scheduler = TaskScheduler.new {
    queue_task = function(self, task)
      context:post(function() core.try_execute(self, task) end)
    end,
  }
  scheduler._context = context -- that of its tasks
  return scheduler
end

-- A gate lets tasks in, first come, first served, as long as what they weigh together is within its capacity.
-- A task is inside from its start to its end. What starts inside hot is inside too, whatever it weighs: its caller
-- may be waiting for it. Tasks that wait at a gate are work to be done, though nobody may remember the scheduler:
-- the gate is held as long as there are any.
--
-- Invariant: used == the sum of inside; waiting[first .. last] are { task, scheduler, weight }.
-- Every call of core may run finalizers of users, which may come here: no state is in between then.
local Gate = {}
Gate.__index = Gate
local held = {} -- luacheck: ignore 241 (gate -> true: being in it is all)

local function new_gate(capacity)
  return setmetatable({ capacity = capacity, used = 0, inside = setmetatable({}, { __mode = "k" }),
    waiting = {}, first = 1, last = 0 }, Gate)
end

-- Lets in whom there is room for; whoever was canceled or has gone makes way.
function Gate:admit()
  while self.first <= self.last do
    local entry = self.waiting[self.first]
    local task, scheduler, weight = entry[1], entry[2], entry[3]
    local queued = core.is_queued(scheduler, task)
    if queued and self.used + weight > self.capacity then return end
    self.waiting[self.first] = nil
    self.first = self.first + 1
    if self.first > self.last then held[self] = nil end
    if queued then
      self.inside[task] = weight
      self.used = self.used + weight
      core.release(scheduler, task)
    end
  end
end

-- A scheduler that leads through the gate.
function Gate:scheduler(weight)
  local gate = self
  local scheduler = TaskScheduler.new {
    queue_task = function(scheduler, task)
      if gate.inside[task] then
        core.try_execute(scheduler, task) -- a continuation
        return
      end
      local entry = { task, scheduler, weight }
      gate.waiting[gate.last + 1] = entry
      gate.last = gate.last + 1
      held[gate] = true
      gate:admit()
    end,
  }

  function scheduler:_joined(task)
    if gate.inside[task] then return end
    gate.inside[task] = weight
    gate.used = gate.used + weight
  end

  function scheduler:_ended(task)
    local was = gate.inside[task]
    if was then
      gate.inside[task] = nil
      gate.used = gate.used - was
    end
    gate:admit()
  end

  return scheduler
end

---A scheduler with at most `n` tasks between start and end at a time, suspended ones too; the others wait their turn.
---A hot async function called by one of them belongs to it: it starts at once, and counts until it ends.
---@param n integer at least 1
---@return coflow.TaskScheduler
function TaskScheduler.limited(n)
  local limit = type(n) == "number" and math.tointeger(n)
  if not limit then core.argument_error(1, "integer expected, got " .. (math.type(n) or type(n))) end
  if limit < 1 then core.argument_error(1, "at least 1 task must be able to run") end
  return new_gate(limit):scheduler(1)
end

local ALL <const> = 1 << 31

---Two schedulers: tasks of the first run at the same time as each other, one of the second only while no other
---task of either is between its start and its end. In order of arrival: a waiting exclusive task lets no later
---concurrent one pass.
---Source: .NET ConcurrentExclusiveSchedulerPair; there a suspended task counts for nothing.
---@return coflow.TaskScheduler concurrent
---@return coflow.TaskScheduler exclusive
function TaskScheduler.concurrent_exclusive_pair()
  local gate = new_gate(ALL)
  return gate:scheduler(1), gate:scheduler(ALL)
end

return {
  SynchronizationContext = SynchronizationContext,
  TaskScheduler = TaskScheduler,
  spawn_on = core.spawn_on,
}
