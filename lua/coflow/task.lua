-- coflow.task: flow.when_each and Task:continue_with. Loaded when one of them is first used (init.lua).
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"

---@class coflow
local flow = {}

local closing_each = { __close = function(each) core.each_close(each.state) end }

---Iterates over tasks in order of completion, faulted and canceled ones included:
---`for task, key in flow.when_each(tasks) do`. Those complete at the call come first, in input order.
---Leaving the loop early leaves the other tasks running.
---Raises: at once, if an element is not awaitable.
---Source: .NET Task.WhenEach.
---@param tasks table awaitables: a list (`n` counts) or any keys
---@return fun(): coflow.Task, any
function flow.when_each(...)
  local next, state = core.when_each(...)
  return next, state, nil, setmetatable({ state = state }, closing_each)
end
local Task = core.methods("coflow.Task")
local continuation_options = { on = true, token = true }
local met = {
  any = function() return true end,
  success = function(task) return task.is_completed_successfully end,
  fault = function(task) return task.is_faulted end,
  cancel = function(task) return task.is_canceled end,
}

---A task that calls `fn(task)` once this one is complete, in the context captured now.
---Cancellation: `token` cancels it before it starts, never this task.
---@param fn fun(task: coflow.Task): ...
---@param options? { on?: "any"|"success"|"fault"|"cancel", token?: coflow.CancellationToken }
---@return coflow.Task
function Task:continue_with(fn, options)
  core.check_class(1, self, "coflow.Task")
  core.check_function(2, fn)
  options = core.check_options(3, options, continuation_options)
  local condition = met[options.on or "any"]
  if not condition then
    core.argument_error(3, "on must be \"any\", \"success\", \"fault\" or \"cancel\"")
  end
  if options.token ~= nil and not core.is_token(options.token) then
    core.argument_error(3, "token must be a CancellationToken")
  end
  return (core.continuation(self, function(task, token)
    if token then token:throw_if_cancellation_requested() end
    if not condition(task) then
      error(core.errors.OperationCanceled("the task did not end as the continuation asks"), 0)
    end
    return fn(task)
  end, options.token, fn))
end

return flow
