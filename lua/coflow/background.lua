-- coflow.background: a queue of jobs that outlive whoever hands them in.
--
--     requests ──enqueue──▶ waiting ──▶ queued ──▶ running
--                           for room    capacity   workers
--
-- A job is a task of its own, made at once, in the context of whoever enqueues it, but detached from their token
-- and deadline (core.detached): a request that ends takes no background work with it. It moves on when there is
-- room: at the end of another job, of which its task tells the queue (`_ended`), or when one is canceled before its
-- start. Nobody overtakes: who finds others waiting waits behind them.
--
-- Who holds what: the queue holds the jobs that have not started, and is held while there are any, for they are
-- work to be done. A running job lives as any task does (the queue knows it weakly), and holds its queue.
--
-- Invariants: entries[task] is there from `add` to the start of the job, or its end before; then running[task].
--             used == the number of jobs between start and end; queued == the length of the list `jobs`.
-- Every call of core may run finalizers of users, which may come here: no state is in between then.
--
-- Source: .NET's queued background services, whose capacity and order these are.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local arguments = require "coflow.arguments"

local errors = core.errors

---@class coflow.BackgroundQueue
local Queue = {}

local class = { __name = "coflow.BackgroundQueue", __index = Queue }

local held = {} -- luacheck: ignore 241 (queue -> true: being in it is all)

-- Lists: circular, each entry in one at most --------------------------------------------------------

local function new_list()
  local list = {}
  list.next, list.prev = list, list
  return list
end

local function append(list, entry)
  local last = list.prev
  entry.next, entry.prev, entry.list = list, last, list
  last.next, list.prev = entry, entry
end

local function unlink(entry)
  local next, prev = entry.next, entry.prev
  next.prev, prev.next = prev, next
  entry.next, entry.prev, entry.list = nil, nil, nil
end

local function first(list)
  local entry = list.next
  return entry ~= list and entry or nil
end

-- The course of a job -------------------------------------------------------------------------------

local function check(self)
  if getmetatable(self) ~= class then core.refuse_self(class, self) end
end

local function throw_disposed()
  error(errors.ObjectDisposed("the BackgroundQueue has been disposed: it takes no jobs any more"), 0)
end

local function is_idle(self)
  return self._used == 0 and not first(self._jobs) and not first(self._waiting)
end

-- Whether the next job could be queued, or start.
local function has_room(self)
  return self._queued < self._capacity or (self._used < self._workers and self._queued == 0)
end

-- Moves on whoever there is room for.
local function admit(self)
  while not self._disposed do
    local job, waiting = first(self._jobs), first(self._waiting)
    if job and self._used < self._workers then
      unlink(job)
      self._queued = self._queued - 1
      self._used = self._used + 1
      self._started = self._started + 1
      self._running[job.task] = self._started
      self._entries[job.task] = nil
      core.launch(job.task)
    elseif waiting and waiting.parked and not core.is_awaited(waiting.place.task) then
      unlink(waiting) -- its enqueuer was interrupted, and is about to leave
      core.cancel(waiting.task)
    elseif waiting and has_room(self) then
      unlink(waiting)
      append(self._jobs, waiting)
      self._queued = self._queued + 1
      if waiting.place then waiting.place:set_result(true) end
    else
      break
    end
  end
  held[self] = (first(self._jobs) or first(self._waiting)) and true or nil
  local idle = self._idle
  if idle and is_idle(self) then
    self._idle = nil
    idle:set_result()
  end
end

-- Called by the kernel when a job is over, however it ended.
local function ended(self, task)
  local entry = self._entries[task]
  if entry then -- it never started
    self._entries[task] = nil
    if entry.list == self._jobs then self._queued = self._queued - 1 end
    if entry.list then unlink(entry) end
  elseif self._running[task] then
    self._running[task] = nil
    self._used = self._used - 1
  end -- else it was given up before anybody knew it
  admit(self)
  if self._forgotten[task] and task.is_faulted and not core.is_observed(task) then
    core.report(task.exception, task)
  end
end

-- A new entry, in no list yet.
local function new_entry(self, fn, ...)
  if self._disposed then throw_disposed() end
  return { task = core.detached(self, nil, fn, ...) }
end

-- Puts it where it belongs: to be called with nothing created since the state was looked at.
local function add(self, entry, waits)
  if self._disposed then
    core.cancel(entry.task)
    throw_disposed()
  end
  self._entries[entry.task] = entry
  if waits then
    append(self._waiting, entry)
  else
    append(self._jobs, entry)
    self._queued = self._queued + 1
  end
  admit(self)
end

local leaving = {}
function leaving.__close(guard) -- the enqueuer has left before there was room
  local entry = guard.entry
  if entry.list == guard.queue._waiting then core.cancel(entry.task, "its enqueuer has given up") end
end

local function enqueue(self, token, fn, ...)
  core.throw_if_canceled(token)
  local entry = new_entry(self, fn, ...)
  local guard
  while not guard and (first(self._waiting) or not has_room(self)) do
    entry.place = core.TaskCompletionSource()
    entry.place.task.name = "a place in the queue"
    guard = setmetatable({ queue = self, entry = entry }, leaving)
  end
  add(self, entry, guard ~= nil)
  if guard then
    local _ <close> = guard
    local on = entry.place.task
    if token and token.can_be_canceled then
      on, token = core.wait_async(on, nil, token), nil
    end
    entry.parked = on ~= entry.place.task or core.current_task() ~= nil -- from here on it is awaited, or left
    if not core.await_with(on, token) then throw_disposed() end
  end
  return entry.task
end

-- What scripts call ---------------------------------------------------------------------------------

local known_enqueue_options = { token = true }

-- The token among the options, and from where on the job is: at fn, or behind the options.
local function check_enqueue(self, fn, ...)
  check(self)
  if type(fn) ~= "table" or core.is_callable(fn) then
    core.check_function(2, fn)
    return nil, false
  end
  local token = core.check_options(2, fn, known_enqueue_options).token
  if token ~= nil and not core.is_token(token) then
    core.argument_error(2, "token must be a CancellationToken")
  end
  core.check_function(3, (...))
  return token, true
end

---Hands in `fn(...)`, to be run by the queue, and returns its task: once it is queued, or running. While
---`capacity` jobs are queued it waits for room, first come, first served. The job runs in the context captured
---now, under no token and no deadline but its own: only `task:cancel()` and `dispose` cancel it, before its
---start at once.
---Cancellation: ends the wait for room; the job is not queued then.
---Raises: ObjectDisposed, also while it waits.
---@overload fun(self: coflow.BackgroundQueue, options: { token?: coflow.CancellationToken }, fn: function, ...):
---coflow.Task
---@param fn function
---@return coflow.Task
function Queue:enqueue(fn, ...)
  local token, has_options = check_enqueue(self, fn, ...)
  if has_options then return enqueue(self, token, ...) end
  return enqueue(self, nil, fn, ...)
end

Queue.enqueue_async = arguments.twin(Queue.enqueue, check_enqueue)

---Hands in `fn(...)` and never waits: while the queue is full the job waits for room by itself, in its turn.
---Nobody has its task, so an error in it is reported as unobserved as soon as it ends.
---Raises: ObjectDisposed.
---@param fn function
function Queue:fire_and_forget(fn, ...)
  check(self)
  core.check_function(2, fn)
  local entry = new_entry(self, fn, ...)
  self._forgotten[entry.task] = true
  add(self, entry, first(self._waiting) ~= nil or not has_room(self))
end

local function check_drain(self, token)
  check(self)
  arguments.check_token(2, token)
end

---Waits until the queue is idle: all that has been handed in has ended, and what was handed in meanwhile.
---It raises nothing of what the jobs raised, and does not observe it.
---Cancellation: ends the wait only.
---Raises: InvalidOperation in a job of this queue, which would wait for itself.
---@param token? coflow.CancellationToken
function Queue:drain(token)
  check_drain(self, token)
  core.throw_if_canceled(token)
  local me = core.current_task()
  if me and self._running[me] then
    error(errors.InvalidOperation("a job cannot drain its own queue: it would wait for itself"), 0)
  end
  if is_idle(self) then return end
  if not self._idle then
    local idle = core.TaskCompletionSource()
    idle.task.name = "the end of all jobs"
    self._idle = self._idle or idle
  end
  if is_idle(self) then return end -- a finalizer has been here
  core.await_with(self._idle.task, token)
end

Queue.drain_async = arguments.twin(Queue.drain, check_drain)

---Ends the queue, without waiting: jobs that have not started never do, and end canceled; those that run are
---canceled. Whoever waits for room gets ObjectDisposed, and so does whoever comes later. `drain` may be called
---afterwards, to wait for the end of those that still run. Disposing twice is harmless.
---Errors in callbacks of the jobs' tokens are reported as unobserved.
function Queue:dispose()
  check(self)
  if self._disposed then return end
  self._disposed = true
  local tasks, places, running = {}, {}, {}
  for _, list in ipairs { self._waiting, self._jobs } do
    local entry = first(list)
    while entry and entry ~= list do
      tasks[#tasks + 1] = entry.task
      if list == self._waiting then places[#places + 1] = entry.place end
      entry = entry.next
    end
  end
  for task in pairs(self._running) do running[#running + 1] = task end
  table.sort(running, function(a, b) return self._running[a] < self._running[b] end)
  table.move(running, 1, #running, #tasks + 1, tasks)
  for _, place in ipairs(places) do place:try_set_result(false) end
  for _, task in ipairs(tasks) do
    local ok, err = pcall(core.cancel, task, "the BackgroundQueue was disposed")
    if not ok then core.report(err) end
  end
  admit(self)
end

class.__close = Queue.dispose

local known_options = { capacity = true, workers = true }

---A queue of background jobs.
---@param options? { capacity?: integer, workers?: integer } capacity: how many jobs may be queued besides those
---that run (no limit by default; 0: `enqueue` waits until its job can start); workers: how many run at a time, 1
---by default, suspended ones too
---@return coflow.BackgroundQueue
local function new(options)
  options = core.check_options(1, options, known_options)
  local capacity, workers = options.capacity or math.huge, options.workers or 1
  if not arguments.is_count(capacity, 0) then
    core.argument_error(1, "capacity must be an integer, at least 0")
  elseif not arguments.is_count(workers, 1) then
    core.argument_error(1, "workers must be an integer, at least 1")
  end
  return setmetatable({
    _capacity = capacity,
    _workers = workers,
    _entries = {},
    _running = setmetatable({}, { __mode = "k" }), -- task -> its number among those started
    _forgotten = setmetatable({}, { __mode = "k" }), -- task -> true: nobody has it
    _started = 0,
    _jobs = new_list(),
    _waiting = new_list(),
    _queued = 0,
    _used = 0,
    _disposed = false,
    _ended = ended,
  }, class)
end

return { BackgroundQueue = new }
