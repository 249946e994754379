-- coflow.sync: semaphores, locks, events, conditions and barriers between tasks.
--
-- They are C (src/sync.c and the files of its classes; declared in meta.lua). Here: what calls a function of the
-- user, so that it costs no C call level and may suspend, and the one operation that is a task of its own.
--
-- Source: .NET's System.Threading; the locks are AsyncEx's.
-- SPDX-License-Identifier: MIT

local arguments = require "coflow.arguments"
local closing = require "coflow.closing"
local core = require "coflow.core"

local enter_lock = core.enter_lock

local sync = core.sync()
local Lock = core.methods("coflow.Lock")
local Semaphore = core.methods("coflow.Semaphore")
local Condition = core.methods("coflow.Condition")

local function run_locked(key, fn, ...)
  local _ <close> = key
  return fn(...)
end

---Calls `fn` while the lock is held, and opens it on return and on error. May suspend.
---Raises: as `lock`; what `fn` raises.
---@param fn function
---@return any ... what `fn` returns
function Lock:run(fn, ...)
  return closing(run_locked, enter_lock(self, fn), fn, ...)
end

---Starts `run`, as a task.
---@param fn function
---@return coflow.Task
Lock.run_async = arguments.twin(Lock.run, function(self, fn)
  core.check_class(1, self, "coflow.Lock")
  core.check_function(2, fn)
end)

-- A slot, to be given back: unless the semaphore has been disposed meanwhile.
local slot = {}
function slot.__close(taken)
  local ok, err = pcall(taken.semaphore.release, taken.semaphore)
  if not ok and not core.errors.is(err, "ObjectDisposed") then error(err, 0) end
end

local function run_in_slot(taken, fn, ...)
  local _ <close> = taken
  return fn(...)
end

local function check_run(self, fn)
  core.check_class(1, self, "coflow.Semaphore")
  core.check_function(2, fn)
end

---Waits for a slot, calls `fn`, and gives the slot back on return and on error. May suspend.
---Raises: as `wait`; what `fn` raises; SemaphoreFull if somebody has released the slot meanwhile.
---@param fn function
---@return any ... what `fn` returns
function Semaphore:run(fn, ...)
  check_run(self, fn)
  local taken = setmetatable({ semaphore = self }, slot) -- first: nothing fails between taking it and holding it
  self:wait()
  return closing(run_in_slot, taken, fn, ...)
end

---Starts `run`, as a task.
---@param fn function
---@return coflow.Task
Semaphore.run_async = arguments.twin(Semaphore.run, check_run)

local wait_in_task = core.async(function(condition, token, owner)
  local notified = core.condition_wait(condition, token, owner)
  return notified
end)

---Starts `wait`: the lock is open at once, and taken again when the task is complete, canceled included. Until
---then whoever started it does not hold the lock.
---Cancellation: ends the wait for the notification, not that for the lock.
---Raises: at once, as `wait`, but for a cancellation.
---@param token? coflow.CancellationToken
---@return coflow.Task
function Condition:wait_async(token)
  local owner = core.check_condition(self, token)
  local _ <close> = token == core.none and core.suppress_flow() or nil -- under no ambient token
  local task = wait_in_task(self, token, owner)
  task.name = "condition wait"
  return task
end

return sync
