-- coflow.group: structured concurrency: task_group and race. The group itself is C (src/group.c); here is its
-- call, and what comes out of it when not all went well.
--
-- The body runs under xpcall, so that a group whose cancellation interrupts its own body can still return the
-- winner's values. That costs one of Lua's nested C calls, so past DEPTH groups in one task the body is called
-- plainly: then such an interruption comes out of task_group as OperationCanceled. All else is the same.
--
-- Source: trio's nurseries, Kotlin's scopes; errors as in .NET's Task.WhenAll.
-- SPDX-License-Identifier: MIT

local arguments = require "coflow.arguments"
local closing = require "coflow.closing"
local core = require "coflow.core"
local under = require "coflow.under_token"

local errors = core.errors

local DEPTH = 32

-- The errors that were raised independently of each other: of those that tasks have from one another, the first.
-- Gives the list, how many there are, and the task of the last one, if it was one's. A body that failed stands as
-- false among the failed tasks.
local function own_failures(failed, policy, body_error, body_root)
  local list, n, last = {}, 0, nil
  local roots, added = {}, {}
  local rootless = {} -- errors of tasks that were stopped where they stood: these themselves tell where they are from
  local function add(err, root, task)
    if root and roots[root] then return end
    if root then roots[root] = true end
    if type(err) == "table" then
      if added[err] and (rootless[err] or not root) then return end
      added[err] = true
    end
    n = n + 1
    list[n], last = err, task
  end
  for _, task in ipairs(failed or {}) do
    if not task then
      add(body_error, body_root)
    elseif task.is_faulted then
      local root, observed = core.failure_root(task), core.is_observed(task)
      local err = task.exception -- which observes it
      if not root and type(err) == "table" then rootless[err] = true end
      if policy ~= "supervise" or not observed then -- else somebody has dealt with it
        add(err, root, task)
      end
    end
  end
  return list, n, last
end

-- Raises what the ended group ends with, or returns its winner, if it has one.
local function conclude(group, ok, body_error, body_root)
  local policy, failed, winner, canceled, had_children = core.take_group_state(group)
  local failures, n, task = own_failures(failed, policy, body_error, body_root)
  if winner then return winner end
  if n > 1 or (n == 1 and policy == "first_success" and task) then
    local message = n == 1 and "a task of the group failed" or n .. " tasks of the group failed"
    error(errors.Aggregate(message, { inner_exceptions = core.mark_count(failures, n) }), 0)
  elseif n == 1 then
    if task then core.await(task) end -- raises its error, and goes on with its traceback
    error(failures[1], 0)
  end
  core.throw_if_canceled() -- from outside
  if canceled then return end
  if not ok then error(body_error, 0) end
  if policy == "first_success" and had_children then
    error(errors.OperationCanceled("no task of the group succeeded: all were canceled"), 0)
  end
end

local function finish(group, ok, ...)
  if ok then
    if core.join_group(group, true) then return ... end
    local winner = conclude(group, true)
    if winner then return winner:results() end
    return ...
  end
  local err = ...
  local root = core.failure_root(nil, err)
  core.join_group(group, false, err)
  local winner = conclude(group, false, err, root)
  if winner then return winner:results() end
end

-- Where the body is called plainly, an error comes here.
core.on_group_close(function(group, err)
  if core.group_ended(group) then return end
  if core.closed_by_user(group) then
    error(errors.InvalidOperation(
      "a task group is not for others to close: task_group does, when its function returns"), 0)
  end
  local root = core.failure_root(nil, err)
  core.join_group(group, false, err)
  conclude(group, false, err, root)
end)

-- Opening ------------------------------------------------------------------------------------------

local known_options = { limit = true, policy = true, grace = true }
local policies = { fail_fast = 0, supervise = 1, first_success = 2 }

local function call_plainly(group, fn)
  local _ <close> = group
  return finish(group, true, fn(group))
end

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
  if type(fn) == "table" and core.is_callable(options) and not core.is_callable(fn) then
    core.argument_error(1, "function expected, got table: options come second")
  end
  core.check_function(1, fn)
  options = core.check_options(2, options, known_options)
  local limit, policy, grace = options.limit, options.policy, options.grace
  if policy == nil then policy = "fail_fast" end
  if limit ~= nil and not arguments.is_count(limit, 1) then
    core.argument_error(2, "limit must be a positive integer")
  elseif not policies[policy] then
    core.argument_error(2, "policy must be \"fail_fast\", \"supervise\" or \"first_success\"")
  elseif grace ~= nil and not arguments.is_seconds(grace) then
    core.argument_error(2, "grace must be a number of seconds, not negative")
  end
  local group, depth = core.open_group(limit, policies[policy], grace)
  local _ <close> = group
  if depth <= DEPTH then return finish(group, xpcall(fn, core.trace_handler, group)) end
  return closing(call_plainly, group, fn)
end

local function run_race(fns, n, limit, token)
  local _ <close> = under.blame(token)
  local _ <close> = under.open(token)
  core.throw_if_canceled()
  return task_group(function(group)
    for i = 1, n do group:spawn(fns[i]) end
  end, { policy = "first_success", limit = limit })
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
  local n = #fns
  if n == 0 and type(options) == "table" and #options > 0 then
    core.argument_error(1, "list of functions expected: options come second")
  end
  options = core.check_options(2, options, race_options)
  for i = 1, n do
    if not core.is_callable(fns[i]) then
      core.argument_error(1, ("element %d is not a function (a %s value)"):format(i, type(fns[i])))
    end
  end
  if n == 0 then error(errors.Argument("race needs at least one function"), 2) end
  local limit, token = options.limit, options.token
  if limit ~= nil and not arguments.is_count(limit, 1) then
    core.argument_error(2, "limit must be a positive integer")
  end
  if token ~= nil and not core.is_token(token) then
    core.argument_error(2, "token must be a CancellationToken")
  end
  if not core.current_task() then
    error(errors.InvalidOperation(
      "race outside every task: run the program with flow.run(fn), and use it in there"), 0)
  end
  return closing(run_race, fns, n, limit, token)
end

return { task_group = task_group, race = race }
