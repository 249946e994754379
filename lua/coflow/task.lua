-- coflow.task: Task:continue_with and Task:configure_await. Loaded when one of them is first used (init.lua).
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"

local Task = core.methods("coflow.Task")

---An awaitable for this task. With `false`, whoever awaits it leaves its synchronization context and its scheduler
---for good, should it have to wait: it goes on in the loop's own turn. With `true` it awaits as the task itself does.
---Source: .NET Task.ConfigureAwait.
---@param continue_on_captured_context boolean
---@return coflow.ConfiguredTask
function Task:configure_await(continue_on_captured_context)
  core.check_class(1, self, "coflow.Task")
  if type(continue_on_captured_context) ~= "boolean" then
    core.argument_error(2, "boolean expected, got " .. type(continue_on_captured_context))
  end
  return core.configure_await(self, continue_on_captured_context)
end

local continuation_options = { on = true, token = true, scheduler = true }
local met = {
  any = function() return true end,
  success = function(task) return task.is_completed_successfully end,
  fault = function(task) return task.is_faulted end,
  cancel = function(task) return task.is_canceled end,
}

---A task that calls `fn(task)` once this one is complete, in the context captured now.
---With a `scheduler` it is queued there then; without one it runs on the default scheduler, wherever it was made.
---Cancellation: `token` cancels it before it starts (without asking the scheduler), never this task.
---@param fn fun(task: coflow.Task): ...
---@param options? { on?: "any"|"success"|"fault"|"cancel", token?: coflow.CancellationToken,
---  scheduler?: coflow.TaskScheduler }
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
  local scheduler, registration = options.scheduler, nil
  if scheduler ~= nil and not core.is_scheduler(scheduler) then
    core.argument_error(3, "scheduler must be a TaskScheduler")
  end
  local continuation = core.continuation(self, function(task, token)
    if registration then registration:unregister() end
    if token then token:throw_if_cancellation_requested() end
    if not condition(task) then
      error(core.errors.OperationCanceled("the task did not end as the continuation asks"), 0)
    end
    return fn(task)
  end, options.token, fn, scheduler)
  if scheduler and options.token then -- while it is queued there, the token reaches it through us
    local weak = setmetatable({ continuation }, { __mode = "v" })
    registration = options.token:unsafe_register(function()
      if weak[1] then core.recall(weak[1]) end
    end)
  end
  return continuation
end

return {}
