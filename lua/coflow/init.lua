-- coflow: async and await for Lua coroutines, on libuv.
--
-- The kernel is C (coflow.core); this file gives it its public shape and adds what is best said in
-- Lua: the functions that call others (so that they cost no C call level and may suspend), and the
-- modules loaded at first use.
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"

---@class coflow
local flow = {
  errors = core.errors,
  loop = core.loop,
  run = core.run,
  spawn = core.spawn,
  async = core.async,
  await = core.await,
  try_await = core.try_await,
  pcall = core.pcall,
  yield = core.yield,
  sleep = core.sleep,
  delay = core.delay,
  when_all = core.when_all,
  when_any = core.when_any,
  await_all = core.await_all,
  await_any = core.await_any,
  current_task = core.current_task,
  is_awaitable_here = core.is_awaitable_here,
  on_unobserved_exception = core.on_unobserved_exception,
  TaskCompletionSource = core.TaskCompletionSource,
  AsyncLocal = core.AsyncLocal,
}

-- Execution contexts --------------------------------------------------------------------------

local ExecutionContext = {
  capture = core.capture,
  restore = core.restore,
  suppress_flow = core.suppress_flow,
  restore_flow = core.restore_flow,
  is_flow_suppressed = core.is_flow_suppressed,
}
flow.ExecutionContext = ExecutionContext

---Calls `fn` under `context`; what it changes stays inside. May suspend.
---Raises: InvalidOperation if `context` is nil (it was captured while the flow was suppressed).
---Source: .NET ExecutionContext.Run.
---@param context coflow.ExecutionContext
---@param fn function
---@return any ... what `fn` returns
function ExecutionContext.run(context, fn, ...)
  if context ~= nil then core.check_class(1, context, "coflow.ExecutionContext") end
  core.check_function(2, fn)
  local _ <close> = core.enter(context)
  return fn(...)
end

-- wrapper -> true: wrapping twice keeps the first context
local wrapped = setmetatable({}, { __mode = "k" })

---`fn` bound to the context captured now (to the empty one while the flow is suppressed).
---@param fn function
---@return function
function ExecutionContext.wrap(fn)
  core.check_function(1, fn)
  if wrapped[fn] then return fn end
  local context = core.capture() or core.empty_context
  local function wrapper(...)
    local _ <close> = core.enter(context)
    return fn(...)
  end
  wrapped[wrapper] = true
  return wrapper
end

core.methods("coflow.ExecutionContext").run = ExecutionContext.run

---Calls `fn` on the current task with the isolation of an async function: whatever it does to the
---execution context is undone when it returns or fails. May suspend.
---@param fn function
---@return any ... what `fn` returns
function flow.call(fn, ...)
  core.check_function(1, fn)
  local _ <close> = core.isolate()
  return fn(...)
end

local AsyncLocal = core.methods("coflow.AsyncLocal")

---Calls `fn` with the value set, and puts the old one back on return and on error. May suspend.
---@param value any
---@param fn function
---@return any ... what `fn` returns
function AsyncLocal:run(value, fn, ...)
  core.check_class(1, self, "coflow.AsyncLocal")
  core.check_function(3, fn)
  local _ <close> = self:with(value)
  return fn(...)
end

-- Tasks -----------------------------------------------------------------------------------------

local Task = {
  new = core.new,
  run = core.spawn,
  yield = core.yield,
  delay = core.delay,
  when_all = core.when_all,
  when_any = core.when_any,
  from_result = core.from_result,
  from_exception = core.from_exception,
  from_canceled = core.from_canceled,
  completed_task = core.from_result(),
}
flow.Task = Task

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
Task.when_each = flow.when_each

local task_methods = core.methods("coflow.Task")
task_methods.await = core.await
task_methods.try_await = core.try_await
task_methods.start = core.start
task_methods.run_synchronously = core.run_synchronously
task_methods.wait = core.wait
task_methods.wait_async = core.wait_async
core.methods("coflow.ConfiguredTask").await = core.await
core.methods("coflow.ConfiguredTask").try_await = core.try_await

---An awaitable for this task. With `false`, whoever awaits it leaves its synchronization context and its scheduler
---for good, should it have to wait: it goes on in the loop's own turn. With `true` it awaits as the task itself does.
---Source: .NET Task.ConfigureAwait.
---@param continue_on_captured_context boolean
---@return coflow.ConfiguredTask
function task_methods:configure_await(continue_on_captured_context)
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
function task_methods:continue_with(fn, options)
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
      error(flow.errors.OperationCanceled("the task did not end as the continuation asks"), 0)
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

task_methods.cancel = core.cancel

-- Cancellation ------------------------------------------------------------------------------------

flow.CancellationToken = { none = core.none, canceled = core.canceled }

flow.CancellationTokenSource = setmetatable({ linked = core.linked_source }, {
  __call = core.call_source,
})

flow.cancellation_token = core.cancellation_token
flow.deadline = core.deadline

---Calls `fn` with the ambient token linked to `token`, so that both cancel it; `none` adds nothing. What `fn`
---starts and leaves running stays under the outer token only. May suspend.
---Cancellation: a token already canceled raises without calling `fn`.
---Raises: InvalidOperation outside every task.
---@param token coflow.CancellationToken
---@param fn function
---@return any ... what `fn` returns
function flow.with_cancellation(token, fn, ...)
  local _ <close> = core.open_linked(token, fn)
  return fn(...)
end

---Calls `fn` and cancels the ambient token after `seconds`: every wait inside ends then, and each new one. The
---nearest deadline wins. Where `fn` computes without a wait nothing interrupts it. May suspend.
---Raises: Timeout if the deadline passed before any outer cancellation, and `fn` ended with an OperationCanceled;
---any other error comes out as it is. 0 never calls `fn`. InvalidOperation outside every task.
---Source: trio.fail_after.
---@param seconds number? nil or math.huge: no limit
---@param fn function
---@return any ... what `fn` returns
function flow.with_timeout(seconds, fn, ...)
  local _ <close> = core.open_timeout(seconds, fn)
  return fn(...)
end

local shield_options = { grace = true }

---Calls `fn` with the ambient token and deadline hidden: for clean-up that must await. May suspend.
---Raises: InvalidOperation outside every task.
---Source: trio's shielded scopes.
---@overload fun(fn: function, ...): ...
---@param options { grace?: number } seconds after which waits in it are canceled after all
---@param fn function
---@return any ... what `fn` returns
function flow.shield(options, fn, ...)
  if type(options) ~= "table" or core.is_callable(options) then
    core.check_function(1, options)
    local _ <close> = core.open_shield()
    return options(fn, ...)
  end
  local grace = core.check_options(1, options, shield_options).grace
  core.check_function(2, fn)
  if grace ~= nil and not (type(grace) == "number" and grace >= 0) then
    core.argument_error(1, "grace must be a number of seconds")
  end
  local _ <close> = core.open_shield(grace)
  return fn(...)
end

-- Scripts -----------------------------------------------------------------------------------------

---Runs `fn` as a program. SIGINT and SIGTERM cancel its ambient token, so that it can clean up; a second one
---ends the process. An error is written to standard error with its async traceback.
---Use: `os.exit(flow.main(main), true)`.
---@param fn function
---@return integer exit code: 0, 1, 128 + the signal, or the integer that `fn` returned
function flow.main(fn, ...)
  core.check_function(1, fn)
  if core.current_task() then
    error(flow.errors.InvalidOperation("main inside a task would block the event loop: call the function"), 0)
  end
  local task = core.spawn(fn, ...)
  core.watch_signals(true)
  local ok, result = pcall(core.await, task)
  core.watch_signals(false)
  local signal = not ok and not task.is_completed and flow.errors.is(result, "OperationCanceled") and result.signal
  if signal then
    local canceled, problems = pcall(core.cancel, task, result.message)
    if not canceled then core.report(problems) end
    ok, result = pcall(core.await, task)
  end
  if ok then return math.type(result) == "integer" and result or 0 end
  if signal and flow.errors.is(result, "OperationCanceled") then return 128 + signal end
  io.stderr:write(tostring(result), "\n")
  if task.is_faulted then io.stderr:write(task:traceback(), "\n") end
  return 1
end

-- What is loaded at first use: flow.x is the module coflow.x, its classes and functions are flow's as well.
local lazy = {
  task_group = "group", race = "group",
  TaskScheduler = "scheduler", SynchronizationContext = "scheduler", spawn_on = "scheduler",
  AsyncLazy = "lazy", AsyncCache = "cache", AsyncState = "async_state",
  lazy = "lazy", cache = "cache", async_state = "async_state", pipeline = "pipeline",
}

return setmetatable(flow, {
  __index = function(_, key)
    local name = lazy[key]
    if not name then return nil end
    local module = require("coflow." .. name)
    local value = key == name and module or module[key]
    rawset(flow, key, value)
    return value
  end,
})
