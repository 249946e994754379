---@meta

-- coflow.meta: declarations of what is written in C, for editors and readers. Never loaded.
--
-- The functions written in Lua have theirs beside them: flow.call, ExecutionContext.run and wrap, AsyncLocal:run in
-- context.lua, Task:continue_with in task.lua, flow.main in main.lua, and so on (init.lua).
--
-- What holds everywhere: time is in seconds. A wrong type or range, a negative time or NaN, raises Lua's usual
-- "bad argument" string; everything else raises an error object (coflow.Error). A `token` is always optional.
-- "Waits" means: suspends the calling task; outside every task it drives the event loop until the wait is over.
-- What waits raises InvalidOperation, and starts nothing, where Lua cannot yield (a comparator of table.sort, a
-- coroutine made by coroutine.create inside a task …).
--
-- SPDX-License-Identifier: MIT

---@class coflow
local flow = {}

-- Running ---------------------------------------------------------------------------------------

---Runs `fn` as the root task and drives the event loop until that task is complete.
---Tasks that are not complete by then stay as they are, for a later `run`.
---Raises: what `fn` raises. InvalidOperation inside a task or a callback; when nothing is left alive that could
---ever complete the task (the message says which task waits where); when `flow.loop.stop` was called.
---Source: asyncio.run; .NET's async Main.
---@param fn function
---@param ... any arguments of `fn`
---@return any ... what `fn` returns
function flow.run(fn, ...) end

---Starts `fn` as a new task on a later turn, under the execution context of now. Never runs it at once.
---Source: .NET Task.Run, on the one thread there is.
---@param fn function
---@param ... any arguments of `fn`
---@return coflow.Task
function flow.spawn(fn, ...) end

---Makes an async function of `fn`: called, it starts `fn` at once as a task, runs it up to its first wait, and
---returns the task. It never raises: an error faults the task. What `fn` does to async locals stays in the task.
---A deep recursion of such calls may suspend the caller while the callee starts.
---Source: .NET's async methods.
---@param fn function
---@return fun(...): coflow.Task
function flow.async(fn) end

---Waits until `x` is complete. A complete task returns at once, without suspending.
---Cancellation: ends the wait, not the task.
---Raises: the task's error, the same value each time. InvalidOperation if the task would await itself, directly or
---round a circle; the message has the names.
---@param x coflow.Awaitable
---@param token? coflow.CancellationToken
---@return any ... the task's values
function flow.await(x, token) end

---Waits as `await` does, and returns the outcome instead of raising it. Counts as observing a failure.
---Cancellation: ends the wait, and is raised.
---@param x coflow.Awaitable
---@param token? coflow.CancellationToken
---@return boolean ok
---@return any ... the task's values, or its error
function flow.try_await(x, token) end

---`pcall`, except that it lets an OperationCanceled through while the ambient token is canceled.
---For loops that go on after errors: with plain `pcall` such a loop would not end when its scope is canceled.
---@param fn function
---@param ... any arguments of `fn`
---@return boolean ok
---@return any ... what `fn` returns, or its error
function flow.pcall(fn, ...) end

---Lets everything else that is ready run first. Always suspends.
---Source: .NET Task.Yield; asyncio.sleep(0).
function flow.yield() end

---Waits for `seconds`; never less, and more when the loop is busy. 0 returns at once, without suspending;
---`math.huge` waits for the token only.
---Cancellation: ends at once with OperationCanceled; a token canceled before the call wins over 0 seconds.
---@param seconds number
---@param token? coflow.CancellationToken
function flow.sleep(seconds, token) end

---A task that completes after `seconds`, never earlier. 0 is already complete; `math.huge` waits for the token only.
---Cancellation: the task becomes canceled; a token canceled before the call wins over 0 seconds.
---Source: .NET Task.Delay.
---@param seconds number
---@param token? coflow.CancellationToken
---@return coflow.Task
function flow.delay(seconds, token) end

---The running task; nil outside every task.
---@return coflow.Task?
function flow.current_task() end

---The ambient token: that of the innermost `with_timeout`, `with_cancellation` or task group that the task is in,
---else the task's own. It is linked to the one that the task was started under. `CancellationToken.none` outside
---every task and under `shield`.
---@return coflow.CancellationToken
function flow.cancellation_token() end

---Seconds left to the nearest deadline that the task is under; nil when there is none.
---@return number?
function flow.deadline() end

---Whether a task runs here and could be suspended at this point.
---@return boolean
function flow.is_awaitable_here() end

-- Tasks made of others ----------------------------------------------------------------------------

---A task that ends when all of its inputs have ended, whatever fails.
---Its result is one new table, with each input's first value under the same key; for a list and for arguments `n` is
---set. The same task twice counts twice. Without inputs it is already complete. A table is copied at the call.
---Fails: any input faulted: faulted with an Aggregate, whose `inner_exceptions` stand in input order and of which
---`await` raises the first. Else any canceled: canceled, with the first one's error.
---Raises: at once, if an input is not awaitable (the message names its key).
---Source: .NET Task.WhenAll.
---@param ... coflow.Awaitable|table<any, coflow.Awaitable> or one table of them: a list (`n` counts) or any keys
---@return coflow.Task
function flow.when_all(...) end

---A task that ends with the first of its inputs to end, however it ended; several complete: the first in input order.
---Its values are that task and its key. It is never faulted, leaves nothing registered on the others, and does not
---observe them.
---Raises: Argument if there is no input.
---Source: .NET Task.WhenAny.
---@param ... coflow.Awaitable|table<any, coflow.Awaitable>
---@return coflow.Task
function flow.when_any(...) end

---Iterates over tasks in order of completion, faulted and canceled ones included:
---`for task, key in flow.when_each(tasks) do`. Those complete at the call come first, in input order.
---Leaving the loop early leaves the other tasks running.
---Raises: at once, if an element is not awaitable.
---Source: .NET Task.WhenEach.
---@param ... coflow.Awaitable|table<any, coflow.Awaitable> as when_all takes them
---@return fun(): coflow.Task, any
function flow.when_each(...) end

---Waits for all: the direct form of `when_all`. Returns the first values one by one; for a table with keys, the table.
---Raises: the one error as it is, or an Aggregate when several failed.
---@param ... coflow.Awaitable|table<any, coflow.Awaitable>
---@return any ...
function flow.await_all(...) end

---Waits for the first to end: the direct form of `when_any`.
---Raises: Argument if there is no input; never what that task failed with.
---@param ... coflow.Awaitable|table<any, coflow.Awaitable>
---@return coflow.Task first
---@return any key
function flow.await_any(...) end

-- Task ------------------------------------------------------------------------------------------

---What `await` takes: a task, or a value whose metatable has `__await`, a function `(x) -> Task`.
---@alias coflow.Awaitable coflow.Task|{ __await: fun(x: any): coflow.Task }

---@alias coflow.TaskStatus
---| "created"                # made by Task.new, not started
---| "waiting_to_run"         # queued
---| "running"                # on the stack
---| "waiting_for_activation" # suspended, or an operation in flight
---| "ran_to_completion"
---| "faulted"
---| "canceled"

---Something that ends once: with values, with an error (faulted), or with an OperationCanceled (canceled).
---A faulted task that nobody observed is reported when it is collected (`flow.on_unobserved_exception`). So is, as
---TaskAbandoned, a task that waits for what nothing alive can complete; its `<close>` variables run.
---Source: .NET Task.
---@class coflow.Task
---@field status coflow.TaskStatus
---@field is_completed boolean whether it ended, in whatever way
---@field is_completed_successfully boolean
---@field is_faulted boolean
---@field is_canceled boolean
---@field result any its first value; raises as `await`, or InvalidOperation while it is not complete
---@field exception any what it failed with (`when_all`: an Aggregate), which is now observed; nil if not faulted
---@field id integer unique among the tasks of this state
---@field name string may be set; by default where its function is defined ("file:line"; for one of the library
---its module, "coflow.net"), or its kind ("delay" …)
---@field continue_with fun(self: coflow.Task, fn: function, options?: table): coflow.Task see task.lua
---@field configure_await fun(self: coflow.Task, captures: boolean): coflow.ConfiguredTask see task.lua
local Task = {}

---Waits for it: `flow.await(task, token)`.
---@param token? coflow.CancellationToken
---@return any ... its values
function Task:await(token) end

---Waits for its outcome: `flow.try_await(task, token)`.
---@param token? coflow.CancellationToken
---@return boolean ok
---@return any ... its values, or its error
function Task:try_await(token) end

---All its values.
---Raises: what `await` raises; InvalidOperation while it is not complete. It never waits.
---@return any ...
function Task:results() end

---Drives the loop until it is complete or `timeout` has passed. At the top level only. Raises and observes no failure.
---Cancellation: raises OperationCanceled; the task goes on.
---Raises: InvalidOperation inside a task, which would block the loop.
---Source: .NET Task.Wait, which raises the failure.
---@param timeout? number seconds; nil or `math.huge`: no limit
---@param token? coflow.CancellationToken
---@return boolean complete true however it ended; false after the timeout
function Task:wait(timeout, token) end

---Cancels the ambient token that the task's own code sees: its waits, those of what it has started, and the
---callbacks registered there. Cooperative: the task ends when its code lets the error through. A task that has
---not started yet starts, and meets the cancellation at its first suspension.
---
---On the task of an operation (`delay`, any `x_async`) it cancels the operation; on those of `when_all`,
---`when_any` and `wait_async` that task, whose inputs go on; on a completion source's nothing.
---Raises: an Aggregate of the errors of callbacks, when all have run.
---@param reason? any becomes `.reason` of the error
---@return boolean whether it was not canceled, or complete, before
function Task:cancel(reason) end

---A task that ends as this one does, but no later than `timeout`: then it is faulted with Timeout.
---This one goes on. A complete task wins over a canceled token, and that over a timeout of 0.
---Cancellation: the new task becomes canceled.
---Source: .NET Task.WaitAsync.
---@param timeout? number seconds; nil or `math.huge`: no limit
---@param token? coflow.CancellationToken
---@return coflow.Task
function Task:wait_async(timeout, token) end

---The async traceback: where it stands or failed, innermost frame first, then the tasks that await it.
---Of a canceled task: the place where it was canceled.
---@return string
function Task:traceback() end

---Queues a task made by `Task.new`, on that scheduler.
---Raises: InvalidOperation if it was started before; what the scheduler's `queue_task` raises.
---@param scheduler? coflow.TaskScheduler nil: the default one
---@return coflow.Task self
function Task:start(scheduler) end

---Starts a task made by `Task.new` at once, up to its first wait. It goes on on that scheduler.
---Raises: InvalidOperation if it was started before; never what the task fails with.
---@param scheduler? coflow.TaskScheduler nil: that of the caller, as for an async function
---@return coflow.Task self
function Task:run_synchronously(scheduler) end

---What `task:configure_await` returns: to be awaited, alone or among others (`when_all` …).
---@class coflow.ConfiguredTask

---The static side of TaskScheduler; its functions are in scheduler.lua.
---@class coflow.TaskSchedulerStatics
---@field default coflow.TaskScheduler the loop, first in first out; `try_execute_task` of it gives false

---As `spawn`, on that scheduler: `fn` starts when it says so. What `fn` spawns runs on the default scheduler.
---Raises: what the scheduler's `queue_task` raises; the task is faulted with it.
---Source: .NET TaskFactory.StartNew with a scheduler.
---@param scheduler coflow.TaskScheduler
---@param fn function
---@param ... any arguments of `fn`
---@return coflow.Task
function flow.spawn_on(scheduler, fn, ...) end

---The static side of Task. `run`, `yield`, `delay`, `when_all`, `when_any` and `when_each` are those of `flow`.
---@class coflow.TaskStatics
---@field run fun(fn: function, ...): coflow.Task
---@field yield fun()
---@field delay fun(seconds: number, token?: coflow.CancellationToken): coflow.Task
---@field when_all fun(...): coflow.Task
---@field when_any fun(...): coflow.Task
---@field when_each fun(...): fun(): coflow.Task, any
---@field completed_task coflow.Task complete, without values
flow.Task = {}

---A cold task: it starts when told (`start`, `run_synchronously`), under the context of now.
---@param fn function
---@param ... any arguments of `fn`
---@return coflow.Task
function flow.Task.new(fn, ...) end

---A task that is complete with these values.
---@param ... any
---@return coflow.Task
function flow.Task.from_result(...) end

---A task that is faulted with `err`, also for an OperationCanceled.
---@param err any nil is a legal error value, but must be given
---@return coflow.Task
function flow.Task.from_exception(err) end

---A task that is canceled.
---Raises: Argument unless `token` is canceled.
---@param token coflow.CancellationToken
---@return coflow.Task
function flow.Task.from_canceled(token) end

---A task to be completed by hand: for callbacks, and for handing a value from one task to others.
---Whoever waits for the task is queued, never run by the call that completes it.
---Source: .NET TaskCompletionSource, with RunContinuationsAsynchronously.
---@class coflow.TaskCompletionSource
---@field task coflow.Task
local TaskCompletionSource = {}

---@return coflow.TaskCompletionSource
function flow.TaskCompletionSource() end

---Completes the task with these values.
---Raises: InvalidOperation if it is complete.
---@param ... any
function TaskCompletionSource:set_result(...) end

---Completes the task unless it is complete.
---@param ... any
---@return boolean done
function TaskCompletionSource:try_set_result(...) end

---Makes the task faulted, also for an OperationCanceled. nil is a legal error value.
---Raises: InvalidOperation if it is complete.
---@param err any
function TaskCompletionSource:set_exception(err) end

---Makes the task faulted unless it is complete.
---@param err any
---@return boolean done
function TaskCompletionSource:try_set_exception(err) end

---Makes the task canceled; `token` is what its error names.
---Raises: InvalidOperation if it is complete.
---@param token? coflow.CancellationToken
function TaskCompletionSource:set_canceled(token) end

---Makes the task canceled unless it is complete.
---@param token? coflow.CancellationToken
---@return boolean done
function TaskCompletionSource:try_set_canceled(token) end

-- Timers ------------------------------------------------------------------------------------------

---Starts a task now and then, until it is disposed: `local timer <close> = flow.Timer(fn, due, period)`.
---While it is armed the loop keeps it, so the program need not; an armed one keeps `flow.loop.run` from ending.
---@class coflow.Timer
local Timer = {}

---Runs `fn`, without arguments, as a task of its own after `due` seconds, then every `period` seconds. It runs in
---the execution context and under the cancellation of whoever makes the timer; what one tick writes to async
---locals, the next does not see. A tick does not wait for the task of the one before. When the program was busy for
---longer than a period there is one tick for all that were missed, and the next one keeps to the grid.
---Cancellation: the timer goes on; its tasks end at their first wait, until the scope that was canceled has ended:
---then they are under the next one outside.
---Raises: nothing from `fn`: an error in it is reported as that of any task that nobody observes.
---Source: .NET System.Threading.Timer.
---@param fn function
---@param due number seconds; 0: on a later turn; math.huge: not before `change`
---@param period? number seconds; nil, 0 or math.huge: once
---@return coflow.Timer
function flow.Timer(fn, due, period) end

---Sets both times anew, from now on. A tick that was due, but whose task has not started, is taken back.
---@param due number seconds; math.huge: not armed
---@param period? number seconds; nil, 0 or math.huge: once
---@return boolean done false if it has been disposed
function Timer:change(due, period) end

---Ends it, and lets go of its function. No task is started from here on; those that run go on. A second time is
---harmless.
function Timer:dispose() end

---A clock to be waited for: `while timer:wait_for_next_tick() do … end`. It runs nothing, keeps nothing alive and
---has no context. The first tick is one period after it was made.
---@class coflow.PeriodicTimer
---@field period number seconds, may be set: the next tick is one new period from then, also for who waits already
local PeriodicTimer = {}

---Source: .NET PeriodicTimer.
---@param period number seconds, > 0
---@return coflow.PeriodicTimer
function flow.PeriodicTimer(period) end

---Waits for the next tick. Ticks that have passed since the last one count as one, for which this does not wait.
---Cancellation: raises OperationCanceled and takes no tick; later waits are not affected.
---Raises: InvalidOperation while another wait for the same timer has not returned; that comes before cancellation.
---@param token? coflow.CancellationToken
---@return boolean tick false if it has been disposed
function PeriodicTimer:wait_for_next_tick(token) end

---The same as a task.
---Cancellation: the task becomes canceled.
---Raises: InvalidOperation, at once, while there is another wait for the same timer.
---@param token? coflow.CancellationToken
---@return coflow.Task
function PeriodicTimer:wait_for_next_tick_async(token) end

---Ends it: who waits gets false, and so does whoever waits later. A second time is harmless.
function PeriodicTimer:dispose() end

-- Async locals and execution contexts -------------------------------------------------------------

---`flow`: whether values flow to tasks and callbacks ("task", the default), stay with the task that set them ("none"),
---or are to cross into workers too ("thread", for a later release; needs a name).
---@class coflow.AsyncLocalOptions
---@field name? string for debugging
---@field default? any what reads where nothing was set
---@field value_changed? fun(args: coflow.ValueChanged)
---@field flow? "task"|"none"|"thread"

---@class coflow.ValueChanged
---@field previous_value any
---@field current_value any
---@field context_changed boolean true: another context became current; false: the value was set

---A value that flows: a task reads what was current where it was started.
---Setting it affects the task from here on and what it starts from here on: not its parent, not tasks already started,
---not contexts already captured. A plain function called by the task is the task; an async function is not.
---Source: .NET AsyncLocal<T>.
---@class coflow.AsyncLocal
---@field value any the value in the current context, or the default; may be set, as by `set`
---@field name? string
---@field run fun(self: coflow.AsyncLocal, value: any, fn: function, ...): ... see context.lua
local AsyncLocal = {}

---A new async local.
---Raises: an argument error that names an unknown option.
---@param options? string|coflow.AsyncLocalOptions its name, or options
---@return coflow.AsyncLocal
function flow.AsyncLocal(options) end

---The value in the current context, or the default.
---@return any
function AsyncLocal:get() end

---Sets the value for the current task from here on. nil removes it; a raw-equal value is a complete no-op.
---Raises: what the local's `value_changed` raises, with the new value in place.
---@param value any
function AsyncLocal:set(value) end

---Sets the value for the rest of the block: `local _ <close> = loc:with(value)`. Puts back this local only.
---@param value any
---@return coflow.Scope
function AsyncLocal:with(value) end

---What `with`, `enter` and `suppress_flow` return: undoes its effect when closed.
---Those of the same coroutine that were opened later and never closed end with it, and undo nothing any more.
---@class coflow.Scope
local Scope = {}

---Undoes it now. A second time is harmless.
---Raises: InvalidOperation out of order, from another task or coroutine, or in a callback of a token
---from outside it or the reverse; nothing is changed then.
function Scope:dispose() end

---The same as `dispose`; the name is for `suppress_flow`.
---Raises: as `dispose`; InvalidOperation also if the flow was restored otherwise, or in a `flow.call` begun since,
---which would suppress it again.
function Scope:undo() end

---An immutable snapshot of all async locals that flow. `pairs(context)` gives locals and values, for debugging.
---`spawn`, async functions, `continue_with` and `token:register` take the current one along by themselves.
---Source: .NET ExecutionContext.
---@class coflow.ExecutionContext
---@field run fun(self: coflow.ExecutionContext, fn: function, ...): ... see context.lua
local ExecutionContext = {}

---The value that `loc` has in this context, or its default.
---@param loc coflow.AsyncLocal
---@return any
function ExecutionContext:get(loc) end

---Makes it current for the rest of the block: `local _ <close> = context:enter()`. What is set inside stays inside.
---@return coflow.Scope
function ExecutionContext:enter() end

---@class coflow.ExecutionContextStatics
---@field run fun(context: coflow.ExecutionContext, fn: function, ...): ... see context.lua
---@field wrap fun(fn: function): function see context.lua
flow.ExecutionContext = {}

---A snapshot of the current context; nil while the flow is suppressed. Two with no change between are equal.
---@return coflow.ExecutionContext?
function flow.ExecutionContext.capture() end

---Makes `context` that of the current task, for good.
---Raises: InvalidOperation if it is nil.
---@param context coflow.ExecutionContext
function flow.ExecutionContext.restore(context) end

---Stops the flow, until the block ends or `undo` is called: what is started or registered gets the empty context.
---The task itself still reads and sets its own values. A second one inside is inert; no child inherits it.
---@return coflow.Scope
function flow.ExecutionContext.suppress_flow() end

---Lets the flow go on.
---Raises: InvalidOperation if it is not suppressed.
function flow.ExecutionContext.restore_flow() end

---@return boolean
function flow.ExecutionContext.is_flow_suppressed() end

-- Cancellation ------------------------------------------------------------------------------------

---The right to cancel; its token is the news of it. A to-be-closed value: closing it disposes of it.
---Source: .NET CancellationTokenSource.
---@class coflow.CancellationTokenSource
---@field token coflow.CancellationToken raises ObjectDisposed after `dispose`
---@field is_cancellation_requested boolean
local CancellationTokenSource = {}

---A source that cancels itself after `delay` seconds; 0: canceled at birth; nil or `math.huge`: not by itself.
---@class coflow.CancellationTokenSourceStatics
---@overload fun(delay?: number): coflow.CancellationTokenSource
flow.CancellationTokenSource = {}

---A source that is canceled with the first of these tokens, and by itself. Dispose of it when its work is done:
---then it holds no memory in them.
---@param token coflow.CancellationToken
---@param ... coflow.CancellationToken
---@return coflow.CancellationTokenSource
function flow.CancellationTokenSource.linked(token, ...) end

---Cancels: waits under the token are woken, and the callbacks have run when this returns, last registered first.
---The first reason wins; a second cancel does nothing. A callback's error does not stop the others.
---Raises: an Aggregate of the errors of callbacks, in that order; with `throw_on_first_exception` the first one, and
---the other callbacks are dropped. ObjectDisposed after `dispose`.
---@param reason? any kept in `token.reason` and in the error; a string also becomes part of its message
---@param options? { throw_on_first_exception?: boolean }
function CancellationTokenSource:cancel(reason, options) end

---Cancels now, and runs the callbacks on a later turn.
---@param reason? any
---@return coflow.Task done complete when the callbacks have run; faulted with what `cancel` would raise
function CancellationTokenSource:cancel_async(reason) end

---Cancels after `seconds`, in place of an earlier deadline; `math.huge`: not any more; 0: on a later turn.
---Errors of callbacks then go to the handler of unobserved exceptions.
---Raises: ObjectDisposed after `dispose`.
---@param seconds number
function CancellationTokenSource:cancel_after(seconds) end

---Makes the source fit for reuse: drops its deadline and registrations. Not after a cancellation.
---Raises: ObjectDisposed after `dispose`.
---@return boolean done false if it has been canceled
function CancellationTokenSource:try_reset() end

---Drops the deadline, the registrations and the links. This is not canceling: its token stays as it is, and harmless.
function CancellationTokenSource:dispose() end

---What is handed to those who may be asked to stop.
---Source: .NET CancellationToken.
---@class coflow.CancellationToken
---@field is_cancellation_requested boolean
---@field can_be_canceled boolean false for `none` only
---@field reason any what was given to `cancel`
local CancellationToken = {}

---Raises OperationCanceled if it is canceled; else does nothing. For loops that compute.
function CancellationToken:throw_if_cancellation_requested() end

---Calls `fn(...)` when it is canceled, in the context of now. On a canceled token: at once, its error to the caller.
---The callback must not wait (InvalidOperation): it may start a task. It may unregister itself and others.
---@param fn function
---@param ... any arguments of `fn`
---@return coflow.CancellationTokenRegistration
function CancellationToken:register(fn, ...) end

---As `register`, but the callback runs in the canceler's context.
---@param fn function
---@param ... any arguments of `fn`
---@return coflow.CancellationTokenRegistration
function CancellationToken:unsafe_register(fn, ...) end

---Waits until it is canceled, and then returns.
---Cancellation: by `token`, another one; raises OperationCanceled.
---@param token? coflow.CancellationToken
function CancellationToken:wait(token) end

---A task that completes when it is canceled.
---@param token? coflow.CancellationToken
---@return coflow.Task
function CancellationToken:wait_async(token) end

---@class coflow.CancellationTokenStatics
---@field none coflow.CancellationToken never canceled; registering on it costs nothing
---@field canceled coflow.CancellationToken canceled at birth
flow.CancellationToken = {}

---A callback on a token. A to-be-closed value: closing it unregisters it.
---@class coflow.CancellationTokenRegistration
local CancellationTokenRegistration = {}

---Takes the callback off the token.
---@return boolean pending true if it will now never run
function CancellationTokenRegistration:unregister() end

---The same, without a value. A second time is harmless.
function CancellationTokenRegistration:dispose() end

-- Coroutines --------------------------------------------------------------------------------------
--
-- flow.coroutine, or require "coflow.coroutine": see the head of that file. install and uninstall are there.

---@class coflow.coroutine
flow.coroutine = {}

---A coroutine of `fn`, a Lua thread like any other. It runs in the execution context of now, and what it changes
---there stays its own; with `context = "caller"` in that of whoever resumes it.
---Raises: what is no table in place of `options` is ignored, as Lua's own does; an unknown option is an error.
---Source: Lua's coroutine.create; .NET's iterators have no context of their own.
---@param fn function
---@param options? { context?: "caller" }
---@return thread
function flow.coroutine.create(fn, options) end

---A function that resumes a new coroutine of `fn`, returns what that yields, and raises its errors. Unlike with Lua's
---own, `<close>` variables that an error closes in it may await.
---@param fn function
---@param options? { context?: "caller" }
---@return fun(...): ...
function flow.coroutine.wrap(fn, options) end

---Goes on with a coroutine until it yields or ends. An await in there suspends the calling task meanwhile.
---Cancellation: is raised in the coroutine, where it waits.
---@param co thread
---@param ... any
---@return boolean ok
---@return any ... what it yielded or returned, or the error
function flow.coroutine.resume(co, ...) end

---Suspends the running coroutine: its resume returns these values.
---Raises: InvalidOperation, and does not yield, out of a scope (`with`, `enter` …) that is open in a coroutine made
---with `context = "caller"`: it would stay open in the caller. The message names both places. In the body of a task,
---outside every coroutine, it faults the task.
---@param ... any
---@return any ... what the next resume is given
function flow.coroutine.yield(...) end

---@param co thread
---@return "running"|"suspended"|"normal"|"dead" # "normal" also while a task is suspended in it
function flow.coroutine.status(co) end

---Closes a coroutine that is suspended or dead, and its `<close>` variables, which cannot await here.
---Raises: if it is running, or a task is suspended in it.
---@param co thread
---@return boolean ok
---@return any err
function flow.coroutine.close(co) end

---@return thread co the running coroutine
---@return boolean main
function flow.coroutine.running() end

---@param co? thread
---@return boolean
function flow.coroutine.isyieldable(co) end

-- Channels ----------------------------------------------------------------------------------------

---The half of a channel that takes items out. Waiters are served in order of arrival, and each is handed its item:
---one that comes later never overtakes. An item handed to a task is that task's, even if it is canceled before it runs.
---@class coflow.ChannelReader
---@field count integer items that are buffered; 0 for a rendezvous
---@field completion coflow.Task complete once the channel is complete *and* drained; fails as it was completed
local ChannelReader = {}

---Takes the next item; waits for one. nil when the channel is complete and drained. Any value but nil is an item,
---false included.
---Cancellation: takes no item; a token canceled before the call wins over items that are there.
---Raises: ChannelClosed, with the error in `inner`, once a channel completed with an error is drained; completed
---with an OperationCanceled: that one.
---Source: .NET ChannelReader.ReadAsync, which raises at a clean end too.
---@param token? coflow.CancellationToken
---@return any? item
function ChannelReader:read(token) end

---@param token? coflow.CancellationToken
---@return coflow.Task
function ChannelReader:read_async(token) end

---As `read_batch`. An operation that has to wait completes with the one item that ends its wait.
---@param max? integer
---@param token? coflow.CancellationToken
---@return coflow.Task
function ChannelReader:read_batch_async(max, token) end

---Takes the next item if there is one; nil if not. Never waits, and asks no token.
---@return any? item
function ChannelReader:try_read() end

---The next item, which stays where it is; nil if none is buffered (always, for a rendezvous).
---@return any? item
function ChannelReader:peek() end

---Waits until there may be an item: true, and then another reader may be faster. false at the end.
---Whoever reads is served before those who only asked.
---Raises: the error that the channel was completed with, as it is.
---Source: .NET ChannelReader.WaitToReadAsync.
---@param token? coflow.CancellationToken
---@return boolean
function ChannelReader:wait_to_read(token) end

---@param token? coflow.CancellationToken
---@return coflow.Task
function ChannelReader:wait_to_read_async(token) end

---`for item in channel:iterate() do`: takes items up to the end. Leaving the loop leaves the others in the channel.
---Raises: in the loop, the error that the channel was completed with, as it is.
---Source: .NET ChannelReader.ReadAllAsync.
---@param token? coflow.CancellationToken
---@return fun(): any
function ChannelReader:iterate(token) end

---The half of a channel that puts items in.
---@class coflow.ChannelWriter
local ChannelWriter = {}

---Puts an item in; waits while there is no room (in a rendezvous: until it is taken), unless the channel drops.
---Cancellation: takes the item back; a token canceled before the call wins over room that is there.
---Raises: ChannelClosed once the channel is complete, with its error in `inner`. Blocked writers are told so too.
---Source: .NET ChannelWriter.WriteAsync.
---@param item any not nil
---@param token? coflow.CancellationToken
---@return true
function ChannelWriter:write(item, token) end

---@param item any not nil
---@param token? coflow.CancellationToken
---@return coflow.Task
function ChannelWriter:write_async(item, token) end

---Puts an item in if that is possible at once. Never waits, and asks no token.
---@param item any not nil
---@return boolean success
function ChannelWriter:try_write(item) end

---Waits until there may be room: true, and then another writer may be faster. false once the channel is complete.
---Raises: the error that the channel was completed with, as it is.
---@param token? coflow.CancellationToken
---@return boolean
function ChannelWriter:wait_to_write(token) end

---@param token? coflow.CancellationToken
---@return coflow.Task
function ChannelWriter:wait_to_write_async(token) end

---No more items will be written. Those that are there can still be read; blocked writers fail; then readers see the
---end, or `err`. An OperationCanceled makes the end a cancellation.
---Raises: ChannelClosed the second time.
---Source: .NET ChannelWriter.Complete.
---@param err? any
function ChannelWriter:complete(err) end

---The same; false if the channel was complete before.
---@param err? any
---@return boolean first
function ChannelWriter:try_complete(err) end

---@class coflow.Channel: coflow.ChannelReader, coflow.ChannelWriter
---@field reader coflow.ChannelReader
---@field writer coflow.ChannelWriter

---@class coflow.channel
---@field Channel coflow.ChannelStatics
flow.channel = {}

---@class coflow.SelectOptions
---@field timeout? number seconds
---@field token? coflow.CancellationToken

---Waits for the first of several clauses, and does only that one: `{ channel, "read" }`, `{ channel, "write", item }`,
---or a task (any awaitable). What is there already is taken in the order of the list; then it is whichever comes first.
---The others are as if they had never been asked.
---Cancellation: does none of them.
---Raises: what its clause would: a failed task's error, ChannelClosed of a write to a complete channel.
---Source: Go's select; the order among what is ready is that of the list.
---@param clauses table with `timeout` and `token` beside the list
---@param token? coflow.CancellationToken if the table has none
---@return integer? index of the clause; nil after the timeout
---@return any value the item, true for a write, the task's first value; "timeout"
function flow.channel.select(clauses, token) end

---@param clauses table
---@param token? coflow.CancellationToken
---@return coflow.Task
function flow.channel.select_async(clauses, token) end
-- Coordination (coflow.sync) ----------------------------------------------------------------------

-- What holds for all of these. Who asks gets what is there at once, unless others wait already; else it waits its
-- turn: first come, first served, and what is handed to a waiter is its own from then on, so that nobody who comes
-- later can take it. Nothing runs inside the call that hands over.
-- Cancellation: a canceled token comes before what is there. A waiter that is canceled has taken nothing; one that
-- has been handed something returns with it, and its next wait raises.
-- A timeout is in seconds; nil or math.huge: none; 0 never waits. When it has passed the wait returns false.
-- After `dispose` (or `<close>`) those who wait, and whoever comes, get ObjectDisposed.
-- Each waiting method has an _async form, which returns a task of the same result.

---A number of slots. Any task may release what another one took. `semaphore:run(fn, ...)` calls a function in one
---(sync.lua).
---Source: .NET SemaphoreSlim; there the order of waiters is open, and disposing leaves them waiting for ever.
---@class coflow.Semaphore
---@field current_count integer how many slots are free
local Semaphore = {}

---@param initial integer free slots, 0 or more
---@param max? integer the most there can be; none unless given
---@return coflow.Semaphore
function flow.Semaphore(initial, max) end

---Waits for a slot and takes it.
---@param timeout? number
---@param token? coflow.CancellationToken
---@return boolean taken false: the time has passed
function Semaphore:wait(timeout, token) end

---@param timeout? number
---@param token? coflow.CancellationToken
---@return coflow.Task
function Semaphore:wait_async(timeout, token) end

---Gives slots back, first to those who wait.
---Raises: SemaphoreFull if there would be more than the maximum; then nothing is released.
---@param n? integer 1 unless given
---@return integer before how many were free
function Semaphore:release(n) end

function Semaphore:dispose() end

---What taking a lock gives. A to-be-closed value: closing it, in whichever task, opens the lock, once: a second
---time frees nothing. A key that is lost keeps its lock.
---@class coflow.Key
local Key = {}

function Key:dispose() end

---One task at a time. Not re-entrant. `lock:run(fn, ...)` calls a function while it is held (sync.lua).
---Source: AsyncEx AsyncLock.
---@class coflow.Lock
local Lock = {}

---@return coflow.Lock
function flow.Lock() end

---Waits for the lock and takes it: `local _ <close> = lock:lock()`.
---Raises: InvalidOperation if the calling task has it already, and would wait for itself. (Not for a lock that it
---took by an operation, since that may be another task's.)
---@param token? coflow.CancellationToken
---@return coflow.Key
function Lock:lock(token) end

---A task of the key. Whoever drops it without a look leaves the lock closed.
---@param token? coflow.CancellationToken
---@return coflow.Task
function Lock:lock_async(token) end

---@return coflow.Key? key nil: it is taken, or others wait for it
function Lock:try_lock() end

function Lock:dispose() end

---Any number of readers, or one writer. Writers come first: while one waits no reader gets in, and when a writer
---leaves the next writer follows. If the last waiting writer gives up, the readers behind it get in at once.
---A task that has it, also for reading, and would wait for itself gets InvalidOperation.
---Source: AsyncEx AsyncReaderWriterLock.
---@class coflow.ReaderWriterLock
local ReaderWriterLock = {}

---@return coflow.ReaderWriterLock
function flow.ReaderWriterLock() end

---@param token? coflow.CancellationToken
---@return coflow.Key
function ReaderWriterLock:read_lock(token) end

---@param token? coflow.CancellationToken
---@return coflow.Task
function ReaderWriterLock:read_lock_async(token) end

---@return coflow.Key?
function ReaderWriterLock:try_read_lock() end

---@param token? coflow.CancellationToken
---@return coflow.Key
function ReaderWriterLock:write_lock(token) end

---@param token? coflow.CancellationToken
---@return coflow.Task
function ReaderWriterLock:write_lock_async(token) end

---@return coflow.Key?
function ReaderWriterLock:try_write_lock() end

function ReaderWriterLock:dispose() end

---A gate: while it is set nobody waits.
---Source: .NET ManualResetEventSlim.
---@class coflow.ManualResetEvent
---@field is_set boolean
local ManualResetEvent = {}

---@param set? boolean
---@return coflow.ManualResetEvent
function flow.ManualResetEvent(set) end

---Lets through all who wait, also when `reset` follows at once, and whoever comes until then.
function ManualResetEvent:set() end

function ManualResetEvent:reset() end

---@param timeout? number
---@param token? coflow.CancellationToken
---@return boolean set
function ManualResetEvent:wait(timeout, token) end

---@param timeout? number
---@param token? coflow.CancellationToken
---@return coflow.Task
function ManualResetEvent:wait_async(timeout, token) end

function ManualResetEvent:dispose() end

---A turnstile: each `set` lets one through; several while nobody waits count as one.
---Source: .NET AutoResetEvent.
---@class coflow.AutoResetEvent
---@field is_set boolean
local AutoResetEvent = {}

---@param set? boolean
---@return coflow.AutoResetEvent
function flow.AutoResetEvent(set) end

function AutoResetEvent:set() end

function AutoResetEvent:reset() end

---@param timeout? number
---@param token? coflow.CancellationToken
---@return boolean set
function AutoResetEvent:wait(timeout, token) end

---@param timeout? number
---@param token? coflow.CancellationToken
---@return coflow.Task
function AutoResetEvent:wait_async(timeout, token) end

function AutoResetEvent:dispose() end

---Open once as many signals have come as it was made for, and then for good.
---Source: .NET CountdownEvent, without its reset.
---@class coflow.CountdownEvent
---@field current_count integer signals still to come
---@field is_set boolean there are none
local CountdownEvent = {}

---@param n integer 0 or more
---@return coflow.CountdownEvent
function flow.CountdownEvent(n) end

---Raises: InvalidOperation if fewer are to come; then nothing is changed.
---@param n? integer 1 unless given
---@return boolean last true if it is open now
function CountdownEvent:signal(n) end

---Raises: InvalidOperation at zero.
---@param n? integer 1 unless given
function CountdownEvent:add(n) end

---@param timeout? number
---@param token? coflow.CancellationToken
---@return boolean set
function CountdownEvent:wait(timeout, token) end

---@param timeout? number
---@param token? coflow.CancellationToken
---@return coflow.Task
function CountdownEvent:wait_async(timeout, token) end

function CountdownEvent:dispose() end

---Where tasks that hold a lock wait until another one tells them that something has changed. `wait_async`: sync.lua.
---Source: .NET Monitor.Wait and Pulse; AsyncEx AsyncConditionVariable.
---@class coflow.Condition
local Condition = {}

---@param lock coflow.Lock
---@return coflow.Condition
function flow.Condition(lock) end

---Opens the lock, waits to be notified, and takes the lock again; the key that the caller has is good again then.
---Whatever it waited for may have changed meanwhile: `while not ready do condition:wait() end`.
---Cancellation: ends the wait for the notification, not that for the lock, which the caller holds in any case. Who
---has been notified returns, canceled or not: no notification is lost.
---Raises: InvalidOperation unless the calling task holds the lock. ObjectDisposed, without the lock, if that is
---disposed.
---@param token? coflow.CancellationToken
---@return boolean true
function Condition:wait(token) end

---Wakes those who have waited longest; with nobody there it is lost. The lock need not be held.
---@param n? integer 1 unless given
---@return integer woken
function Condition:notify(n) end

---@return integer woken
function Condition:notify_all() end

function Condition:dispose() end

---Where `n` tasks wait for each other, again and again.
---Source: .NET Barrier, without its post-phase action.
---@class coflow.Barrier
---@field participant_count integer
---@field participants_remaining integer how many the phase still waits for
---@field current_phase_number integer from 0
local Barrier = {}

---@param n integer 1 or more
---@return coflow.Barrier
function flow.Barrier(n) end

---Waits until `n` tasks have come; the last one does not wait.
---Cancellation: takes the signal back: the phase needs one more again.
---@param token? coflow.CancellationToken
---@return integer phase the number of the one that has ended
function Barrier:signal_and_wait(token) end

---@param token? coflow.CancellationToken
---@return coflow.Task
function Barrier:signal_and_wait_async(token) end

function Barrier:dispose() end

-- Files and names ---------------------------------------------------------------------------------

---Files and directories. Each operation is done by a thread of libuv's pool (four of them, unless UV_THREADPOOL_SIZE
---says otherwise) and suspends the calling task only; its `_async` twin takes the same arguments and returns a task
---of its results. Paths are strings of any bytes but zero; permissions are integers. The token may stand in place of
---what may be left out before it: `fs.remove(path, token)`. What holds for all:
---
---Cancellation: ends the wait at once. One that no thread has begun is never done; one that is being done stops
---between two system calls, and what it brings late is released. What it has changed by then is changed.
---A thread in the middle of a system call (a dead network mount) cannot be stopped: it is busy until that
---returns, and delays the end of the state by two seconds at most.
---Raises: IO, with `code` ("ENOENT"), `syscall` and `path`.
---@class coflow.fs
flow.fs = {}

---Opens a file. `mode` is Lua's: "r" (the default), "w", "a", each with "+" to read and write; "x" after "w" or "a"
---refuses a file that is there. Close it, best by `local file <close> = …`.
---A FIFO is opened for reading at once (the first read waits for a writer); for writing this waits for a reader.
---Whoever waits for the other end of a FIFO, or at a terminal or a device, keeps a thread of the pool until it comes or
---the wait is canceled: an open, a read, a write. As many as there are threads hold up all others.
---Source: fopen.
---@param path string
---@param mode? string
---@param token? coflow.CancellationToken
---@return coflow.File
function flow.fs.open(path, mode, token) end

---`open` as a task.
---@return coflow.Task
function flow.fs.open_async(path, mode, token) end

---All that is in a file.
---@param path string
---@param token? coflow.CancellationToken
---@return string
function flow.fs.read_file(path, token) end

---`read_file` as a task.
---@return coflow.Task
function flow.fs.read_file_async(path, token) end

---Makes `data` all that is in a file, which is created if need be. `append`: adds it at the end instead.
---`atomic`: writes a new file beside it, synchronizes that and puts it in its place, so that at every instant, also
---after a crash, the file is whole, the old one or the new one; its permissions stay, and a symbolic link stays one. A
---process killed in the middle may leave a file ".coflow-…" there; a failure or a cancellation leaves none.
---@param path string
---@param data string
---@param options? { atomic?: boolean, append?: boolean }
---@param token? coflow.CancellationToken
function flow.fs.write_file(path, data, options, token) end

---`write_file` as a task.
---@return coflow.Task
function flow.fs.write_file_async(path, data, options, token) end

---What is known of a file, or of what a link points to.
---@param path string
---@param token? coflow.CancellationToken
---@return coflow.Stat
function flow.fs.stat(path, token) end

---`stat` as a task.
---@return coflow.Task
function flow.fs.stat_async(path, token) end

---What is known of a file, or of the link itself.
---@param path string
---@param token? coflow.CancellationToken
---@return coflow.Stat
function flow.fs.lstat(path, token) end

---`lstat` as a task.
---@return coflow.Task
function flow.fs.lstat_async(path, token) end

---Whether a file is there and may be read ("r"), written ("w"), executed ("x"): any of these, or none.
---A refusal is an answer, not an error.
---@param path string
---@param how? string
---@param token? coflow.CancellationToken
---@return boolean ok
---@return string? code
function flow.fs.access(path, how, token) end

---`access` as a task.
---@return coflow.Task
function flow.fs.access_async(path, how, token) end

---Sets permissions.
---@param path string
---@param mode integer
---@param token? coflow.CancellationToken
function flow.fs.chmod(path, mode, token) end

---`chmod` as a task.
---@return coflow.Task
function flow.fs.chmod_async(path, mode, token) end

---Cuts a file, or fills it up with zeros.
---@param path string
---@param size integer bytes
---@param token? coflow.CancellationToken
function flow.fs.truncate(path, size, token) end

---`truncate` as a task.
---@return coflow.Task
function flow.fs.truncate_async(path, size, token) end

---Makes `path` a symbolic link.
---@param target string
---@param path string
---@param token? coflow.CancellationToken
function flow.fs.symlink(target, path, token) end

---`symlink` as a task.
---@return coflow.Task
function flow.fs.symlink_async(target, path, token) end

---Where a symbolic link points to.
---@param path string
---@param token? coflow.CancellationToken
---@return string
function flow.fs.readlink(path, token) end

---`readlink` as a task.
---@return coflow.Task
function flow.fs.readlink_async(path, token) end

---The absolute path without links, "." and "..".
---@param path string
---@param token? coflow.CancellationToken
---@return string
function flow.fs.realpath(path, token) end

---`realpath` as a task.
---@return coflow.Task
function flow.fs.realpath_async(path, token) end

---The entries of a directory, sorted: `for name, type in flow.fs.scandir(path) do`. All are read before the first is
---told. "unknown" where the file system does not say.
---@param path string
---@param token? coflow.CancellationToken
---@return fun(): string?, coflow.FileType
function flow.fs.scandir(path, token) end

---`scandir` by its other name.
---@param path string
---@param token? coflow.CancellationToken
---@return fun(): string?, string?
function flow.fs.read_dir(path, token) end

---`scandir` as a task.
---@return coflow.Task
function flow.fs.scandir_async(path, token) end

---Makes a directory. `recursive`: and those above that are missing; then one that is there already is no failure.
---@param path string
---@param options? { recursive?: boolean, mode?: integer }
---@param token? coflow.CancellationToken
function flow.fs.mkdir(path, options, token) end

---`mkdir` as a task.
---@return coflow.Task
function flow.fs.mkdir_async(path, options, token) end

---Makes a directory with a new name that begins so, for its user only; returns its path.
---@param prefix string
---@param token? coflow.CancellationToken
---@return string
function flow.fs.mkdtemp(prefix, token) end

---`mkdtemp` as a task.
---@return coflow.Task
function flow.fs.mkdtemp_async(prefix, token) end

---Renames, and replaces what is at `to`.
---@param from string
---@param to string
---@param token? coflow.CancellationToken
function flow.fs.rename(from, to, token) end

---`rename` as a task.
---@return coflow.Task
function flow.fs.rename_async(from, to, token) end

---Removes a file or an empty directory. `recursive`: and all that is below; links are not followed.
---@param path string
---@param options? { recursive?: boolean }
---@param token? coflow.CancellationToken
function flow.fs.remove(path, options, token) end

---`remove` as a task.
---@return coflow.Task
function flow.fs.remove_async(path, options, token) end

---Copies what is in a file, and its permissions. A failure or a cancellation removes what was copied by then.
---@param from string
---@param to string
---@param token? coflow.CancellationToken
function flow.fs.copy(from, to, token) end

---`copy` as a task.
---@return coflow.Task
function flow.fs.copy_async(from, to, token) end

---Tells of changes of a file, or of the entries of a directory, from now on. Close it.
---Raises: IO, at once.
---@param path string
---@return coflow.Watcher
function flow.fs.watch(path) end

---@alias coflow.FileType "file"|"directory"|"link"|"fifo"|"socket"|"char"|"block"|"unknown"

---@class coflow.Stat
---@field type coflow.FileType
---@field size integer bytes
---@field mode integer permissions
---@field uid integer
---@field gid integer
---@field ino integer
---@field dev integer
---@field nlink integer
---@field blocks integer of 512 bytes
---@field atime number seconds since 1970; so are the other times
---@field mtime number
---@field ctime number
---@field birthtime number

---An open file. What several tasks ask of it is done one after another, in that order. The position is the file's
---own (after "a" writes go to the end all the same), and moves when an operation succeeds. What was read ahead is not
---read again: changes that others make to these bytes are not seen until the file is sought.
---A canceled read loses nothing. A canceled write may have been done in part; it may be repeated in its place.
---A file that was given to a program shares its position with that, both ways, so that they write, or read, one after
---the other; a write to it that is canceled may have moved the position, as one after "a" has.
---Raises: ObjectDisposed after `close`.
---@class coflow.File
---@field path string
---@field is_closed boolean
local File = {}

---At most `max` bytes, as soon as there are any; nil at the end. 0 bytes are "".
---@param max? integer 65536 unless given
---@param token? coflow.CancellationToken
---@return string?
function File:read(max, token) end

---`read` as a task.
---@return coflow.Task
function File:read_async(max, token) end

---All bytes up to the end, "" at the end.
---Raises: IO with code "EMSGSIZE" if there are more than `max`; nothing is lost.
---@param max? integer
---@param token? coflow.CancellationToken
---@return string
function File:read_all(max, token) end

---`read_all` as a task.
---@return coflow.Task
function File:read_all_async(max, token) end

---The next line, without its "\n"; nil at the end.
---Raises: IO with code "EMSGSIZE" if it is longer than `max`; nothing is lost.
---@param max? integer
---@param token? coflow.CancellationToken
---@return string?
function File:read_line(max, token) end

---`read_line` as a task.
---@return coflow.Task
function File:read_line_async(max, token) end

---Writes strings and numbers, all of them; a token may follow. Returns the file.
---Raises: IO (ENOSPC …; EPIPE: nobody reads that FIFO any more; SIGPIPE is ignored unless the program handles it).
---@param ... string|number|coflow.CancellationToken
---@return coflow.File
function File:write(...) end

---`write` as a task.
---@return coflow.Task
function File:write_async(...) end

---Moves the position, and returns it, from the start; by default it stays.
---Raises: IO with code "ESPIPE" for what has no positions, "EINVAL" before the start.
---Source: Lua's file:seek.
---@param whence? "set"|"cur"|"end"
---@param offset? integer
---@param token? coflow.CancellationToken
---@return integer
function File:seek(whence, offset, token) end

---`seek` as a task.
---@return coflow.Task
function File:seek_async(whence, offset, token) end

---Returns when what was written is on the device.
---@param token? coflow.CancellationToken
function File:sync(token) end

---`sync` as a task.
---@return coflow.Task
function File:sync_async(token) end

---What is known of the file.
---@param token? coflow.CancellationToken
---@return coflow.Stat
function File:stat(token) end

---`stat` as a task.
---@return coflow.Task
function File:stat_async(token) end

---Cuts the file, or fills it up with zeros. The position stays.
---@param size integer bytes
---@param token? coflow.CancellationToken
function File:truncate(size, token) end

---`truncate` as a task.
---@return coflow.Task
function File:truncate_async(size, token) end

---Closes the file after all that was begun before. Closing twice is harmless. `<close>` does the same; it waits
---where that is possible, and leaves the error alone that it meets.
---Cancellation: is not heard, so that no descriptor is left open.
function File:close() end

---`close` as a task.
---@return coflow.Task
function File:close_async() end

---Another name of `close`.
function File:dispose() end

---`dispose` as a task.
---@return coflow.Task
function File:dispose_async() end

---Changes that were told since, up to 4096 that nobody has asked for; `kind` "overflow" stands for what came after.
---It keeps the event loop alive only while somebody waits for a change.
---@class coflow.Watcher
local Watcher = {}

---@class coflow.Change
---@field kind "rename"|"change"|"overflow" "rename": an entry came, went, or has another name
---@field name? string of the entry

---The next change; nil once it is closed. Each change is told to one waiter, first come, first served.
---Cancellation: no change is lost.
---@param token? coflow.CancellationToken
---@return coflow.Change?
function Watcher:next(token) end

---`next` as a task.
---@return coflow.Task
function Watcher:next_async(token) end

---Ends it, and the waits for it. Never suspends; closing twice is harmless. `<close>` does the same.
function Watcher:close() end

---Another name of `close`.
function Watcher:dispose() end

---Names and addresses, by the resolver of the system, in threads of the pool.
---Cancellation: ends the wait at once; the answer is dropped.
---Raises: IO, with `code` ("EAI_NONAME"), `syscall` and `host`.
---@class coflow.dns
flow.dns = {}

---The addresses of a host, in the resolver's order, each once.
---@param host string a name or a numeric address
---@param options? { family?: "ipv4"|"ipv6"|"any"|4|6 }
---@param token? coflow.CancellationToken
---@return string[]
function flow.dns.resolve(host, options, token) end

---`resolve` as a task.
---@return coflow.Task
function flow.dns.resolve_async(host, options, token) end

---The name of the host with that numeric address.
---@param address string
---@param token? coflow.CancellationToken
---@return string
function flow.dns.reverse(address, token) end

---`reverse` as a task.
---@return coflow.Task
function flow.dns.reverse_async(address, token) end

-- Streams and listeners (coflow.net) ----------------------------------------------------------------
--
-- flow.net, or require "coflow.net": connect, listen, listen_pipe and what iterates, copies and serves are there.

---@class coflow.net
flow.net = {}

---Connects to a pipe: a socket with a path in the file system.
---Cancellation: closes the socket.
---Raises: IO, with the path.
---@param path string
---@param token? coflow.CancellationToken
---@return coflow.Stream
function flow.net.connect_pipe(path, token) end

---@param path string
---@param token? coflow.CancellationToken
---@return coflow.Task
function flow.net.connect_pipe_async(path, token) end

---A connection, TCP or a pipe, or a standard stream. One task reads at a time; a second one is refused with
---InvalidOperation, the first unharmed. Any number may write: each write is sent whole, in the order of the calls, and
---while one is suspended the others wait behind it. Whatever waits on a stream is under the ambient token, and ends at
---once when that is canceled; a token of its own may stand in place of what may be left out before it:
---`stream:read(token)`. One that is forgotten is closed when it is collected.
---@class coflow.Stream
---@field local_address string? "127.0.0.1:80", "[fe80::1%eth0]:80", or the path of a pipe; nil once it is closed
---@field peer_address string? the same, of the other end
---@field is_closed boolean
local Stream = {}

---What has come, as soon as there is something; nil at the end.
---Cancellation: no byte is lost, the next read gets it. This holds for all that reads.
---Raises: IO with the code of the system (ECONNRESET …), after what came before; with code ECANCELED if another task
---closes the stream meanwhile; ObjectDisposed once it is closed; InvalidOperation while another task reads.
---@param max? integer bytes
---@param token? coflow.CancellationToken
---@return string? data
function Stream:read(max, token) end

---@param max? integer
---@param token? coflow.CancellationToken
---@return coflow.Task
function Stream:read_async(max, token) end

---Just so many bytes; nil at a clean end.
---Raises: IO with code EOF if the stream ends in the middle; what has come is still there for another read.
---@param n integer
---@param token? coflow.CancellationToken
---@return string? data
function Stream:read_exactly(n, token) end

---@param n integer
---@param token? coflow.CancellationToken
---@return coflow.Task
function Stream:read_exactly_async(n, token) end

---The next line, without its end: \n or \r\n. What follows the last end is a line; then nil.
---Raises: IO with code EMSGSIZE for a line of more than `max` bytes, which stays where it is.
---@param max? integer bytes, 1 MiB by default; math.huge: no limit
---@param token? coflow.CancellationToken
---@return string? line
function Stream:read_line(max, token) end

---@param max? integer
---@param token? coflow.CancellationToken
---@return coflow.Task
function Stream:read_line_async(max, token) end

---All up to the delimiter, without it; nil at a clean end.
---Raises: IO with code EOF if the stream ends without it, EMSGSIZE past `max` bytes; nothing is lost.
---@param delimiter string not empty
---@param max? integer bytes, 1 MiB by default; math.huge: no limit
---@param token? coflow.CancellationToken
---@return string? data
function Stream:read_until(delimiter, max, token) end

---@param delimiter string
---@param max? integer
---@param token? coflow.CancellationToken
---@return coflow.Task
function Stream:read_until_async(delimiter, max, token) end

---All up to the end of the stream; "" when there is nothing.
---Raises: IO with code EMSGSIZE past `max` bytes; nothing is lost.
---@param max? integer bytes, 64 MiB by default; math.huge: no limit
---@param token? coflow.CancellationToken
---@return string data
function Stream:read_all(max, token) end

---@param max? integer
---@param token? coflow.CancellationToken
---@return coflow.Task
function Stream:read_all_async(max, token) end

---Writes the strings, in one go, and a token if that is the last argument. Returns when the system has taken them,
---or no more than 64 KiB wait for it; else it suspends until only 16 KiB do. To standard output and error it returns
---when the system has taken them; what was printed before is first.
---Cancellation: nothing is sent if libuv has not begun with it, which it has not while another one is before it. If it
---has, the stream is broken and closed: `written` in the error, and in the IO errors with code ECANCELED that all later
---use raises, tells how many bytes of it the system took. So does `written` in the error of a suspended write whose
---stream is closed, or fails.
---A loop of writes lets others have their turn, also while the system takes all: now and then one suspends that has
---been done, which no cancellation takes back.
---Raises: IO (EPIPE, ECONNRESET …); InvalidOperation after `shutdown`.
---@param ... string|number|coflow.CancellationToken
---@return true
function Stream:write(...) end

---The same as a task. To cancel an `await` of it says nothing of the write, which goes on: look at the task, or give
---the token to the write.
---@param ... string|number|coflow.CancellationToken
---@return coflow.Task
function Stream:write_async(...) end

---Suspends until the system has taken all that was written.
---Raises: the IO error that writing has met.
---@param token? coflow.CancellationToken
---@return true
function Stream:flush(token) end

---@param token? coflow.CancellationToken
---@return coflow.Task
function Stream:flush_async(token) end

---Ends this direction once all that was written is sent, by writes that are suspended as well: the peer reads up to the
---end, and may go on writing. Of standard output: print and its like have nobody to write to, either.
---Cancellation: ends the wait only; under a token that is canceled already nothing is begun.
---@param token? coflow.CancellationToken
---@return true
function Stream:shutdown(token) end

---@param token? coflow.CancellationToken
---@return coflow.Task
function Stream:shutdown_async(token) end

---Closes the stream for everybody at once, and suspends until all that was written is sent, by operations
---(`write_async`) as well. Tasks that read, or are suspended in `write`, get an IO error with code ECANCELED; if such a
---write was half sent, nothing more is. A second time is harmless.
---As a `<close>` variable it is closed so, or disposed while an error unwinds. A standard stream leaves its descriptor
---to print and its like.
---Cancellation: what has not been sent is dropped.
---Raises: IO if bytes whose `write` had returned could not be sent, unless that was raised to somebody before.
---@param token? coflow.CancellationToken
---@return true
function Stream:close(token) end

---@param token? coflow.CancellationToken
---@return coflow.Task
function Stream:close_async(token) end

---Closes it at once; what the system has not taken is dropped. Never suspends.
function Stream:dispose() end

---The same, and a TCP peer gets ECONNRESET instead of an end.
function Stream:abort() end

---Whether small writes go out at once (the default here) or wait for earlier ones to be acknowledged.
---Raises: InvalidOperation for a pipe.
---@param on? boolean true by default
function Stream:nodelay(on) end

---Has the system ask a silent peer from time to time whether it is there.
---@param seconds number|false 1 to 32767 seconds of silence
function Stream:keepalive(seconds) end

---Waits for connections. Those that nobody accepts wait in the system's queue, also when descriptors run out. It
---does not keep the loop alive unless somebody accepts.
---@class coflow.Listener
---@field port integer? nil for a pipe, and once it is closed
---@field local_address string?
---@field is_closed boolean
local Listener = {}

---The next connection. Several tasks may wait: first in, first out.
---Cancellation: no connection is lost.
---Raises: IO with code EMFILE or ENFILE when there are no descriptors left: ask again later. IO with code ECANCELED if
---another task closes the listener meanwhile; ObjectDisposed once it is closed.
---@param token? coflow.CancellationToken
---@return coflow.Stream
function Listener:accept(token) end

---@param token? coflow.CancellationToken
---@return coflow.Task
function Listener:accept_async(token) end

---Stops listening; connections that were accepted go on. A second time is harmless.
function Listener:close() end

---The same.
function Listener:dispose() end

-- Processes (coflow.process) -------------------------------------------------------------------------
--
-- flow.process, or require "coflow.process": spawn, run, and what waits for a process and ends it are there.

---A program that was started by `spawn`. One that is forgotten goes on, with its pipes closed, and leaves no zombie; so
---that none is forgotten, `local p <close> = process.spawn { … }`. Those that run when the state closes are ended, but
---for those that are detached: SIGTERM, after a second SIGKILL.
---@class coflow.Process
---@field pid integer
---@field stdin coflow.Stream? to write to, if it was given a pipe; `close` it, or `shutdown`: its input ends
---@field stdout coflow.Stream? to read from
---@field stderr coflow.Stream?
---@field is_running boolean
---@field is_detached boolean
local Process = {}

---Sends it a signal, and does not wait. Nothing else follows: that is `close`.
---Raises: IO with code EPERM, if it is somebody else's now.
---@param signal? string "SIGTERM" by default
---@return boolean sent false: it had ended
function Process:kill(signal) end
---Sends and receives datagrams: coflow.net's `udp` makes one. `send`, `receive`, `iterate`, `connect` and `disconnect`
---are in udp.lua. It does not keep the loop alive unless somebody waits. One that is forgotten is closed when it is
---collected.
---@class coflow.UdpSocket
---@field port integer? nil once it is closed
---@field local_address string? "127.0.0.1:53", "[::1]:53"
---@field peer_address string? the same, of the peer of `connect`
---@field is_closed boolean
local UdpSocket = {}

---Whether it may send to broadcast addresses.
---Raises: ObjectDisposed once it is closed, and IO. This holds for all options.
---@param on? boolean true by default
function UdpSocket:broadcast(on) end

---How many hops a datagram may take.
---@param hops integer 1 to 255
function UdpSocket:ttl(hops) end

---The same, of datagrams to groups: 1 by default, which keeps them in the local network; 0: on this host.
---@param hops integer 0 to 255
function UdpSocket:multicast_ttl(hops) end

---Whether this host hears what it sends to groups that it has joined.
---@param on? boolean true by default
function UdpSocket:multicast_loop(on) end

---By which interface datagrams to groups leave.
---@param name? string "eth0"; nil: the system's choice
function UdpSocket:multicast_interface(name) end

---Receives what is sent to the group, too, by the interface of that name, or by one of the system's choice.
---@param group string a numeric address
---@param interface? string
function UdpSocket:join(group, interface) end

---Does so no more.
---@param group string
---@param interface? string
function UdpSocket:leave(group, interface) end

---Closes it at once; other tasks that wait on it get an IO error with code ECANCELED. A second time is harmless.
function UdpSocket:close() end

---The same.
function UdpSocket:dispose() end

-- The loop ----------------------------------------------------------------------------------------

---The event loop itself, for those who drive it by hand.
---@class coflow.loop
flow.loop = {}

---Drives the loop without a root task: until nothing is left alive ("default"), for one turn that may wait for an
---event ("once"), or for one that does not wait ("nowait").
---Raises: InvalidOperation inside a task or a callback.
---@param mode? "default"|"once"|"nowait"
---@return boolean alive whether something is left
function flow.loop.run(mode) end

---Makes the run in progress end after the current task: `flow.run` raises InvalidOperation, `loop.run` returns.
function flow.loop.stop() end

---Monotonic time in seconds, from an arbitrary start; virtual under `coflow.testing`.
---@return number
function flow.loop.now() end

---Whether a task is ready or something is in flight.
---@return boolean
function flow.loop.is_alive() end

---The descriptor that becomes readable when libuv has something to do, for foreign loops. Timers do not show in it.
---@return integer
function flow.loop.backend_fd() end

---How long a foreign loop may sleep: seconds to the next deadline, 0 if a task is ready, nil if there is neither.
---@return number?
function flow.loop.timeout() end

-- Errors ------------------------------------------------------------------------------------------

---An error object; `tostring` gives "Name: message". What user code raises travels unchanged, whatever it is.
---@class coflow.Error
---@field name string
---@field message string
---@field token? coflow.CancellationToken of OperationCanceled: the token that the operation was given
---@field reason? any of OperationCanceled
---@field cause? coflow.CancellationToken of OperationCanceled: the token that was canceled first
---@field inner_exceptions? any[] of Aggregate

---Makers of error objects: `errors.Timeout(message, fields)`; `fields` are copied into the object.
---Some names are for parts that come in later releases.
---@class coflow.errors
flow.errors = {}

---Whether `value` is an error object of that name; false for every other value.
---@param value any
---@param name string
---@return boolean
function flow.errors.is(value, name) end

---A task or an operation was asked to stop. A task whose function ends with it is canceled.
---@param message? string
---@param fields? table
---@return coflow.Error
function flow.errors.OperationCanceled(message, fields) end

---A deadline passed before the work was done.
---@param message? string
---@param fields? table
---@return coflow.Error
function flow.errors.Timeout(message, fields) end

---Several errors at once, in `inner_exceptions`.
---@param message? string
---@param fields? table
---@return coflow.Error
function flow.errors.Aggregate(message, fields) end

---The object has been disposed of.
---@param message? string
---@param fields? table
---@return coflow.Error
function flow.errors.ObjectDisposed(message, fields) end

---Not now, or not here; the message says what to do instead.
---@param message? string
---@param fields? table
---@return coflow.Error
function flow.errors.InvalidOperation(message, fields) end

---An argument of the right type that makes no sense.
---@param message? string
---@param fields? table
---@return coflow.Error
function flow.errors.Argument(message, fields) end

---A semaphore was released too often.
---@param message? string
---@param fields? table
---@return coflow.Error
function flow.errors.SemaphoreFull(message, fields) end

---A channel is complete.
---@param message? string
---@param fields? table
---@return coflow.Error
function flow.errors.ChannelClosed(message, fields) end

---A task was collected while it waited for what nothing alive could complete.
---@param message? string
---@param fields? table
---@return coflow.Error
function flow.errors.TaskAbandoned(message, fields) end

---A circuit breaker is open.
---@param message? string
---@param fields? table
---@return coflow.Error
function flow.errors.BrokenCircuit(message, fields) end

---A bulkhead is full.
---@param message? string
---@param fields? table
---@return coflow.Error
function flow.errors.BulkheadRejected(message, fields) end

---A rate limiter has no permit left.
---@param message? string
---@param fields? table
---@return coflow.Error
function flow.errors.RateLimitRejected(message, fields) end

---The system refused an operation; `code` says why ("ECONNREFUSED" …).
---@param message? string
---@param fields? table
---@return coflow.Error
function flow.errors.IO(message, fields) end

---A worker failed; `traceback` is that of its state.
---@param message? string
---@param fields? table
---@return coflow.Error
function flow.errors.Worker(message, fields) end

---Sets who is told of errors that nobody observed: `handler(err, task)`.
---Once per task, when it is collected or when the state closes. `task` is nil for callbacks that have no caller, as
---those of a source's deadline. nil: the default, which writes the error and its traceback to standard error.
---false: nobody. Observing is: `await`, `try_await`, `exception`, `result`, `wait_async` that passed the outcome on,
---`when_all`, `when_each`, `continue_with`. Not: `status`, `when_any`.
---Source: .NET TaskScheduler.UnobservedTaskException.
---@param handler (fun(err: any, task: coflow.Task?))|false|nil
function flow.on_unobserved_exception(handler) end

return flow
