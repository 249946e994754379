-- coflow.group: structured concurrency: task_group and race.
--
-- A group is a scope of the task that calls task_group (src/scope.c) in which the children start. When a child
-- ends, a to-be-closed variable at the bottom of its body tells the group, while the child is still running:
-- so the first failure cancels the others at once, on the failing child's stack. What the group must know of
-- a child beyond that it reads from the task when all have ended.
--
-- The body runs under xpcall, so that a group whose cancellation interrupts its own body can still return the
-- winner's values. That costs one of Lua's nested C calls, so past DEPTH groups in one task the body is called
-- plainly: then such an interruption comes out of task_group as OperationCanceled. All else is the same.
--
-- Source: trio's nurseries, Kotlin's scopes; errors as in .NET's Task.WhenAll.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"

local errors = core.errors
local is_error = errors.is

local DEPTH = 32

---@class coflow.TaskGroup
---@field token coflow.CancellationToken canceled with the group
---@field is_stopping boolean `stop` has been called
local Group = {}

local properties = {
  token = function(group) return core.scope_token(group._scope) end,
  is_stopping = function(group) return group._stopping or false end,
}

local class = { __name = "coflow.TaskGroup", __metatable = false }

function class.__index(group, key)
  local method = Group[key]
  if method ~= nil then return method end
  local property = properties[key]
  return property and property(group)
end

local function check(group)
  if getmetatable(group) ~= false or not rawget(group, "_scope") then
    core.argument_error(1, "coflow.TaskGroup expected, got " .. type(group))
  end
end

-- Cancels the group's token. Errors of callbacks have no caller here.
local function cancel(group, reason)
  local ok, err = pcall(core.cancel_scope, group._scope, reason)
  if not ok then core.report(err) end
end

-- Children -----------------------------------------------------------------------------------------

local function start_next(group)
  local queue = group._queue
  if not queue or group._first > #queue then return end
  local task = queue[group._first]
  queue[group._first] = false
  group._first = group._first + 1
  if group._first > #queue then group._queue, group._first = nil, nil end
  group._running = group._running + 1
  core.start_queued(task)
end

-- A slot is free. With nothing left to run, whoever waits for the end goes on.
local function leave(group)
  group._running = group._running - 1
  if group._queue then start_next(group) end
  if group._running == 0 and group._idle then group._idle:try_set_result() end
end

-- Runs on the child's stack when its body has been left, by whatever way; nothing can suspend in between
-- `returned` and this.
local function child_ended(ending, err)
  local group = ending.group
  local returned = group._returned
  group._returned = false
  if not returned and not is_error(err, "OperationCanceled") then
    table.insert(group._failed, core.current_task())
    if group._policy == "fail_fast" then cancel(group, "a task of the group failed") end
  elseif returned and group._policy == "first_success" and not group._winner then
    group._winner = core.current_task()
    cancel(group, "another task of the group succeeded")
  end
  leave(group)
end

local ending_class = { __close = child_ended }

local function returned(group, ...)
  group._returned = true
  return ...
end

local function child(group, fn, ...)
  local _ <close> = group._ending
  return returned(group, fn(...))
end

-- Queued children of a canceled group never start.
local function discard_queue(group)
  local queue, first = group._queue, group._first
  group._queue, group._first = nil, nil
  if not queue then return end
  for i = first, #queue do core.discard_queued(queue[i]) end
end

---Starts `fn(...)` as a child of the group, in the current execution context; over `limit` it waits its turn.
---Never suspends.
---Raises: InvalidOperation once the group has ended.
---@param fn function
---@return coflow.Task
function Group:spawn(fn, ...)
  check(self)
  core.check_function(2, fn)
  if self._ended then
    error(errors.InvalidOperation("the task group has ended: no task can be started in it"), 2)
  end
  if self._running < self._limit then
    local task = core.spawn_in(self._scope, fn, true, child, self, fn, ...)
    self._children = true
    self._running = self._running + 1
    return task
  end
  local task = core.spawn_in(self._scope, fn, false, child, self, fn, ...)
  if not self._queue then
    self._queue, self._first = {}, 1
    if not self._registration then
      self._registration = core.scope_token(self._scope):unsafe_register(discard_queue, self)
    end
  end
  if core.scope_canceled(self._scope) then
    core.discard_queued(task)
  else
    table.insert(self._queue, task)
  end
  return task
end

---Cancels the group's token: its children, and its body.
---@param reason? any
---@return boolean whether it was not canceled before
function Group:cancel(reason)
  check(self)
  if self._ended then return false end
  return core.cancel_scope(self._scope, reason)
end

---Asks the group to end: `is_stopping` becomes true, `wait_stopping` returns, and after the group's `grace`
---(without one, at once) it is canceled. Returns at once.
function Group:stop()
  check(self)
  if self._stopping or self._ended then return end
  self._stopping = true
  if self._stop_source then self._stop_source:try_set_result() end
  if self._grace then
    core.arm_scope(self._scope, self._grace)
  else
    core.cancel_scope(self._scope, "the task group was stopped")
  end
end

---Suspends until `stop` is called.
---Cancellation: ends the wait only.
function Group:wait_stopping()
  check(self)
  if self._stopping then return end
  if not self._stop_source then self._stop_source = core.TaskCompletionSource() end
  core.await(self._stop_source.task)
end

-- The end ------------------------------------------------------------------------------------------

-- The errors that were raised independently of each other: of those that tasks have from one another, the first.
local function own_failures(group)
  local list, roots = {}, {}
  local function add(err, root, task)
    if root and roots[root] then return end
    if root then roots[root] = true end
    list.n = (list.n or 0) + 1
    list[list.n] = err
    list.task = task
  end
  for _, failure in ipairs(group._failed) do
    if failure == group then
      add(group._body_error, group._body_root)
    elseif failure.is_faulted then
      local root = core.failure_root(failure)
      local observed = core.is_observed(failure)
      if group._policy ~= "supervise" or not observed then
        add(failure.exception, root, failure)
      elseif root then
        roots[root] = true -- somebody has dealt with it
      end
    end
  end
  return list
end

-- The error that the group ends with, as { error } or { task = the child that failed }, or nil. `canceled`: by
-- code of its own.
local function outcome(group, canceled, body_canceled)
  local failures = own_failures(group) -- which have been observed by that
  if group._winner then return nil end
  if failures.n and group._policy == "first_success" or (failures.n or 0) > 1 then
    local message = failures.n == 1 and "a task of the group failed" or failures.n .. " tasks of the group failed"
    return { errors.Aggregate(message, { inner_exceptions = failures }) }
  elseif failures.n then
    return { failures[1], task = failures.task }
  end
  local ok, outer = pcall(core.throw_if_canceled)
  if not ok then return { outer } end
  if canceled then return nil end
  if body_canceled then return { group._body_error } end
  if group._policy == "first_success" and group._children then
    return { errors.OperationCanceled("no task of the group succeeded: all were canceled") }
  end
end

-- The body has been left, by the error `err` if `failed`. Waits for all children, whatever comes; raises what
-- the group ends with, if it ends with an error.
local function join(group, failed, err)
  local canceled = core.scope_canceled(group._scope)
  local body_canceled = failed and is_error(err, "OperationCanceled")
  if failed then
    group._body_error, group._body_root = err, core.failure_root()
    if not body_canceled then table.insert(group._failed, group) end
    cancel(group, "the body of the task group was left by an error")
  end
  if group._running > 0 and core.is_awaitable_here() then
    group._idle = core.TaskCompletionSource()
    local _ <close> = core.open_shield()
    core.await(group._idle.task)
  end
  canceled = canceled or (not failed and core.scope_canceled(group._scope))
  group._ended = true
  core.close_scope(group._scope)
  local raise = outcome(group, canceled, body_canceled)
  if not raise then return end
  if raise.task then core.await(raise.task) end -- raises its error, and its traceback goes on here
  error(raise[1], 0)
end

local function finish(group, ok, ...)
  join(group, not ok, (...))
  if group._winner then return group._winner:results() end
  if ok then return ... end
end

function class.__close(group, err)
  if not group._ended then join(group, not group._returned_plainly, err) end
end

local function returned_plainly(group, ...)
  group._returned_plainly = true
  return ...
end

-- Opening ------------------------------------------------------------------------------------------

local known_options = { limit = true, policy = true, grace = true }
local policies = { fail_fast = true, supervise = true, first_success = true }

---Calls `fn(group)`, and returns its values once every task that was started with `group:spawn` has ended: none
---outlives the call, whatever happens. The first failure, of a child or of `fn`, cancels `group.token`, under
---which all of them run.
---Raises: that failure, or an Aggregate when several failed on their own. A child that ends canceled has not
---failed. InvalidOperation outside every task.
---Cancellation: the ambient token cancels the group; its error comes out when all have ended.
---Source: trio's nurseries.
---@param fn fun(group: coflow.TaskGroup): ...
---@param options? { limit?: integer, policy?: "fail_fast"|"supervise"|"first_success", grace?: number }
---limit: children at the same time. policy "supervise": a child's failure cancels nobody, and what nobody
---observed is raised at the end; "first_success": the first child to succeed gives the result and cancels the
---rest. grace: seconds between `group:stop()` and the cancellation.
---@return any ...
local function task_group(fn, options)
  core.check_function(1, fn)
  options = core.check_options(2, options, known_options)
  local limit, policy, grace = options.limit, options.policy or "fail_fast", options.grace
  if limit ~= nil and not (math.type(limit) == "integer" and limit >= 1) and limit ~= math.huge then
    core.argument_error(2, "limit must be a positive integer")
  elseif not policies[policy] then
    core.argument_error(2, "policy must be \"fail_fast\", \"supervise\" or \"first_success\"")
  elseif grace ~= nil and not (type(grace) == "number" and grace >= 0) then
    core.argument_error(2, "grace must be a number of seconds")
  end
  local scope, depth = core.open_group()
  local group <close> = setmetatable({
    _scope = scope,
    _limit = limit or math.huge,
    _policy = policy,
    _grace = grace ~= 0 and grace or nil,
    _running = 0,
    _failed = {},
  }, class)
  group._ending = setmetatable({ group = group }, ending_class)
  if depth <= DEPTH then return finish(group, xpcall(fn, core.trace_handler, group)) end
  return finish(group, true, returned_plainly(group, fn(group)))
end

local race_options = { limit = true, token = true }

---Runs the functions as children and returns the values of the first one that succeeds, once the others, which
---it cancels, have ended.
---Raises: an Aggregate when all failed. Argument for an empty list.
---Cancellation: cancels the functions.
---@param fns function[]
---@param options? { limit?: integer, token?: coflow.CancellationToken }
---@return any ...
local function race(fns, options)
  if type(fns) ~= "table" then core.argument_error(1, "list of functions expected, got " .. type(fns)) end
  options = core.check_options(2, options, race_options)
  local n = #fns
  for i = 1, n do
    if not core.is_callable(fns[i]) then
      core.argument_error(1, ("element %d is not a function (a %s value)"):format(i, type(fns[i])))
    end
  end
  if n == 0 then error(errors.Argument("race needs at least one function"), 2) end
  local token = options.token
  if token ~= nil and not core.is_token(token) then
    core.argument_error(2, "token must be a CancellationToken")
  end
  local _ <close> = token and core.open_linked(token, race) or nil
  return task_group(function(group)
    for i = 1, n do group:spawn(fns[i]) end
  end, { policy = "first_success", limit = options.limit })
end

return { task_group = task_group, race = race }
