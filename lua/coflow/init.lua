-- coflow: async and await for Lua coroutines, on libuv.
--
-- The kernel is C (coflow.core); this file gives it its public shape. What is best said in Lua, the functions
-- that call others (so that they cost no C call level and may suspend) and whole modules, is compiled when
-- it is first used: to compile it all would take longer than a short script runs. `late` says what comes from where.
--
-- SPDX-License-Identifier: MIT

if _VERSION ~= "Lua 5.4" then
  error("coflow is for Lua 5.4, and this is " .. _VERSION .. " (busted: busted --lua=lua5.4 …)", 0)
end

local core = require "coflow.core"
local take, late = core.take, core.late

---@class coflow
local flow = take([[errors loop run spawn async await try_await pcall yield sleep delay when_all when_any when_each
  await_all await_any current_task is_awaitable_here on_unobserved_exception cancellation_token deadline
  AsyncLocal TaskCompletionSource]], {})

flow.ExecutionContext = late(
  take("capture restore suppress_flow restore_flow is_flow_suppressed", {}),
  "run=context wrap=context")
late(core.methods "coflow.ExecutionContext", "run=context")
late(core.methods "coflow.AsyncLocal", "run=context")

flow.Task = take("new yield delay when_all when_any when_each from_result from_exception from_canceled", {
  run = core.spawn,
  completed_task = core.from_result(),
})
late(
  take("await try_await start run_synchronously wait wait_async cancel", core.methods "coflow.Task"),
  "continue_with=task configure_await=task")

flow.CancellationToken = take("none canceled", {})
flow.CancellationTokenSource = setmetatable({ linked = core.linked_source }, {
  __call = core.call_source,
})

return late(flow, [[
  call=context Timer=core PeriodicTimer=core with_cancellation=scope
  with_timeout=scope shield=scope main=main task_group=group race=group TaskScheduler=scheduler
  SynchronizationContext=scheduler spawn_on=scheduler lazy=lazy AsyncLazy=lazy cache=cache
  AsyncCache=cache async_state=async_state AsyncState=async_state pipeline=pipeline
  coroutine=coroutine channel=channel Channel=channel resilience=resilience testing=testing
  sync=sync Semaphore=sync Lock=sync ReaderWriterLock=sync ManualResetEvent=sync
  AutoResetEvent=sync CountdownEvent=sync Condition=sync Barrier=sync background=background
  BackgroundQueue=background hosting=hosting Host=hosting BackgroundService=hosting signal=signal
  stream=stream parallel=parallel fs=fs dns=dns net=net process=process stdio=stdio diagnostics=diagnostics
]])
