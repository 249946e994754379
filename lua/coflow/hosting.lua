-- coflow.hosting: a host: services that are started in order, run until something asks them to stop, and are stopped
-- in reverse.
--
-- Who runs where. Each start, what runs in the background, and each stop, is a detached task: its life is the host's
-- business, not that of who happened to start it. So what a service starts in its `start`, say a server, is under no
-- ambient token of the starter: a signal that cancels flow.main's, or the end of a deadline, leaves it alone until the
-- service's `stop` has its turn. The start itself is another matter: whoever starts the host waits for it, and while
-- they do, what cancels them, or asks the host to stop, cancels the start, and with it what it has started so far.
-- A start that fails cancels that, too: nobody would stop it. The stopping as a whole is one such task, which all who
-- stop the host, or wait for it, await: it runs once and to its end, whoever gives up waiting.
--
-- A request to stop is not the stopping: a signal, a token or the failure of a service only completes `_asked`, which
-- may happen in callbacks and from inside the services. host:run waits for it, and then stops the host.
--
-- States: "created", "starting", "started" (also when the start has failed), "stopping", "stopped"; one way only.
--
-- Source: .NET's generic host. There a service that blocks at its start delays the others, and so does one that does
-- not listen when it is to stop; and a background service's failure reaches nobody.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local arguments = require "coflow.arguments"
local closing = require "coflow.closing"
local under = require "coflow.under_token"

local errors = core.errors

-- A task for fn(...), out of reach of the caller's token, in its context. `over(task)` is called in the end.
local function detached(over, named, fn, ...)
  return core.detached({ _ended = function(_, task) if over then over(task) end end }, named, fn, ...)
end

-- The same, started, on a later turn.
local function start_detached(over, named, fn, ...)
  local task = detached(over, named, fn, ...)
  core.launch(task)
  return task
end

local function await_end(task)
  core.await_any(task) -- which raises nothing of what the task raised, and does not observe it
end

-- Whether the task was over within that time.
local function ends_within(seconds, task)
  if task.is_completed then return true end
  if seconds > 0 then
    pcall(function()
      local _ <close> = core.open_timeout(seconds, await_end)
      await_end(task)
    end)
  end
  return task.is_completed
end

-- Background services -----------------------------------------------------------------------------

---A service that runs in the background, from the start of its host until it is to stop.
---@class coflow.BackgroundService
---@field execute_task coflow.Task? what it runs, once it has been started
local Background = {}

local background_class = { __name = "coflow.BackgroundService", __index = Background }

local function check_background(self)
  if getmetatable(self) ~= background_class then core.refuse_self(background_class, self) end
end

local function check_background_stop(self, token)
  check_background(self)
  arguments.check_token(2, token)
end

-- In the task of the service: its token is the stopping token.
local function execute(service)
  local token = core.cancellation_token()
  if service._table then return service._table:execute(token) end
  return service._fn(token)
end

---Starts it, on a later turn, and does not wait: whatever it does delays nobody. It runs in the context captured now.
---Raises: InvalidOperation if it runs already.
function Background:start()
  check_background(self)
  if self.execute_task and not self.execute_task.is_completed then
    error(errors.InvalidOperation("the BackgroundService has been started already"), 0)
  end
  self._stopping = false
  local fn = self._table and self._table.execute or self._fn
  self.execute_task = start_detached(self._over, fn, execute, self)
end

---Cancels the stopping token, and waits until the service has ended, or `token` is canceled: it raises nothing
---because the service does not listen, nor what the service raised. Before the start it does nothing.
---Cancellation: ends the wait; a token that is canceled already only says that there is to be none.
---Raises: an Aggregate of what callbacks of the stopping token raised, when it has waited.
---Source: .NET BackgroundService.StopAsync.
---@param token? coflow.CancellationToken
function Background:stop(token)
  check_background_stop(self, token)
  local task = self.execute_task
  if not task then return end
  local waits = not task.is_completed and core.current_task() ~= task
  if waits then core.check_here() end
  self._stopping = true
  local ok, problems = pcall(core.cancel, task, "the service is to stop")
  if waits and not task.is_completed then
    local waited, err = pcall(core.await_with, core.when_any(task), token)
    if not waited and not errors.is(err, "OperationCanceled") then error(err, 0) end
  end
  if not ok then error(problems, 0) end
end

---Cancels the stopping token, and does not wait.
function Background:dispose()
  check_background(self)
  local task = self.execute_task
  if not task or task.is_completed then return end
  self._stopping = true
  local ok, problems = pcall(core.cancel, task, "the service was disposed")
  if not ok then core.report(problems) end
end

background_class.__close = Background.dispose

Background.stop_async = arguments.twin(Background.stop, check_background_stop)

---A service of which `fn(stopping_token)`, or `execute(self, stopping_token)` of a table, runs in the background. The
---stopping token is its ambient one as well: when the service is to stop, whatever it waits for is interrupted, unless
---it waits under `flow.shield`. That it returns does not stop the host; that it fails does, unless the host is
---told otherwise.
---@param service fun(stopping_token: coflow.CancellationToken)|table
---@return coflow.BackgroundService
local function background_service(service)
  if core.is_callable(service) then return setmetatable({ _fn = service }, background_class) end
  if type(service) ~= "table" or not core.is_callable(service.execute) then
    core.argument_error(1, "function, or table with a function 'execute', expected, got " .. type(service))
  end
  return setmetatable({ _table = service }, background_class)
end

-- The host -----------------------------------------------------------------------------------------

---@class coflow.Host
local Host = {}

local host_class = { __name = "coflow.Host", __index = Host }

local function check(self)
  if getmetatable(self) ~= host_class then core.refuse_self(host_class, self) end
end

-- For all that waits.
local function check_wait(self, token)
  check(self)
  arguments.check_token(2, token)
end

-- From anywhere: the host is to stop.
local function ask_to_stop(self, reason)
  if not self._asked:try_set_result(reason) then return end
  local ok, problems = pcall(self._starting.cancel, self._starting, reason)
  if not ok then core.report(problems) end
end

local function is_asked(self) return self._asked.task.is_completed end

-- A background service has ended.
local function over(self, service, task)
  local stopping = service._stopping or self._state == "stopped"
  if task.is_completed_successfully or (task.is_canceled and stopping) then return end
  if self._failure == "ignore" then
    if task.is_faulted and not core.is_observed(task) then core.report(task.exception, task) end
  elseif self._state ~= "stopped" then
    self._failed[#self._failed + 1] = task
    ask_to_stop(self, "a service of the host has failed")
  end
end

local service_functions = { "start", "stop", "execute", "dispose" }

-- What is wrong with a service, or nil.
local function problem(service)
  if type(service) == "function" then
    return "service expected, got function: BackgroundService(fn) makes one of it"
  elseif type(service) ~= "table" then
    return "service expected, got " .. type(service)
  end
  local count = 0
  for i, name in ipairs(service_functions) do
    local fn = service[name]
    if fn ~= nil and not core.is_callable(fn) then
      return ("'%s' of a service must be a function, not a %s value"):format(name, type(fn))
    end
    if fn ~= nil and i <= 3 then count = count + 1 end
  end
  if count == 0 then return "the service has none of the functions 'start', 'stop' and 'execute'" end
end

---Adds a service: a table with `start(self, token)` and `stop(self, token)`, either of which may be missing; or with
---`execute(self, stopping_token)`, which then runs as in a BackgroundService, between the two. The same service counts
---once. A service with a `dispose` is disposed of when the host is.
---Raises: InvalidOperation once the host has been started.
---@param service table|coflow.BackgroundService
---@return coflow.Host self
function Host:add(service)
  check(self)
  local wrong = problem(service)
  if wrong then core.argument_error(2, wrong) end
  if self._state ~= "created" then
    error(errors.InvalidOperation("the host has been started: it takes no services any more"), 0)
  end
  if self._known[service] then return self end
  self._known[service] = true
  local background = getmetatable(service) == background_class and service
  if not background and service.execute ~= nil then background = background_service(service) end
  if background then background._over = function(task) over(self, background, task) end end
  self._services[#self._services + 1] = { service = service, background = background }
  return self
end

-- One service: what it runs in the background, then what it has of its own.
local function stop_service(entry)
  local service, background = entry.service, entry.background
  local token = core.cancellation_token()
  local ok, problems = true, nil
  if background then ok, problems = pcall(background.stop, background, token) end
  if service ~= background and service.stop then service:stop(token) end
  if not ok then error(problems, 0) end
end

-- Starting.

-- A start that does not return takes along what it has started: those tasks are under the token of its task.
local ending_service_start = {}
function ending_service_start.__close(guard)
  if guard.returned then return end
  local ok, problems = pcall(core.cancel, guard.task, "the service has not started")
  if not ok then core.report(problems) end
end

-- In a task of its own, so what a start changes in the context counts for what it starts, and for nobody else.
local function start_in_task(self, entry)
  core.throw_if_canceled()
  local guard <close> = setmetatable({ task = core.current_task() }, ending_service_start)
  local service, background = entry.service, entry.background
  if service ~= background and service.start then service:start(core.cancellation_token()) end
  if self._state == "stopped" then -- without it: it took too long to start, and is stopped by itself
    start_detached(nil, service.stop, stop_service, entry)
  else
    self._started[#self._started + 1] = entry
  end
  guard.returned = true
  core.throw_if_canceled()
  if background then background:start() end
end

-- Waits for its end, whatever comes: a cancellation of the starter is one of the start.
local function start_service(self, entry)
  local task = detached(nil, entry.service.start, start_in_task, self, entry)
  self._start = { service = entry.service, task = task }
  core.launch(task, true)
  if not task.is_completed then
    local waited, err = pcall(await_end, task)
    if not waited then
      local ok, problems = pcall(core.cancel, task, core.cancellation_token().reason)
      if not ok then core.report(problems) end
      if not errors.is(err, "OperationCanceled") then error(err, 0) end
      local _ <close> = core.open_shield()
      await_end(task)
    end
  end
  if task.is_canceled then core.throw_if_canceled() end -- by ours
  core.await(task)
end

local function start_services(self, token)
  local _ <close> = under.blame(token)
  local _ <close> = under.open(token)
  local _ <close> = core.open_linked(self._starting.token, start_services)
  for _, entry in ipairs(self._services) do
    core.throw_if_canceled()
    start_service(self, entry)
  end
  core.throw_if_canceled()
end

local ending_start = {}
function ending_start.__close(guard)
  local self = guard.host
  if self._state == "starting" then self._state = "started" end
  self._start_over:set_result()
end

local function start(self, token)
  if self._state ~= "created" then
    error(errors.InvalidOperation("the host has been started already: a host runs once"), 0)
  end
  local _ <close> = setmetatable({ host = self }, ending_start)
  self._state = "starting"
  start_services(self, token)
end

---Starts the services, in the order in which they were added, each once the one before has started.
---Each start runs in a task of its own, and what it starts is under no token of the caller: it lives until the
---service's `stop` ends it.
---Cancellation: reaches the service that is being started, by its token and its waits, and what it has started; no
---other is started then.
---Raises: what the start of a service raised, as it is. No other service is started then, and those that have been
---are left to `host:stop()`. OperationCanceled when the host was asked to stop meanwhile. InvalidOperation the
---second time: a host runs once.
---@param token? coflow.CancellationToken
function Host:start(token)
  check_wait(self, token)
  core.check_here()
  if not core.current_task() then return core.run(Host.start, self, token) end
  core.throw_if_canceled(token)
  closing(start, self, token)
end

Host.start_async = arguments.twin(Host.start, check_wait)

-- Stopping.

-- What the host ends with: its failures, in the order in which they came.
local function conclude(failed)
  if #failed == 1 then core.await(failed[1]) end -- raises its error, and goes on with its traceback
  if #failed == 0 then return end
  local list = {}
  for i, task in ipairs(failed) do
    local _, err = core.try_await(task)
    list[i] = err
  end
  core.mark_count(list, #failed)
  error(errors.Aggregate(#failed .. " services of the host failed", { inner_exceptions = list }), 0)
end

local function name_of(service)
  local name = rawget(service, "name")
  return type(name) == "string" and ("service '%s'"):format(name) or "a service"
end

local function stop_services(self)
  local timeout = self._shutdown_timeout
  if not ends_within(timeout, self._start_over.task) then
    local hung = self._start
    core.report(errors.Timeout(("the host was to stop, but the start of %s went on for %g s")
      :format(hung and name_of(hung.service) or "a service", timeout)), hung and hung.task)
  end
  local stops = {}
  while #self._started > 0 do -- one whose start comes back meanwhile, too
    local late = false
    repeat
      local entry = table.remove(self._started)
      local task = start_detached(nil, entry.service.stop, stop_service, entry)
      local stop = { task = task, entry = entry }
      stops[#stops + 1] = stop
      if not ends_within(timeout, task) then
        stop.late = true
        local ok, problems = pcall(core.cancel, task, "the shutdown timeout of the host has passed")
        if not ok then core.report(problems) end
        late = true
      end
    until #self._started == 0
    if late then core.yield() end -- those that listen have ended then
  end
  for _, stop in ipairs(stops) do
    local task, entry = stop.task, stop.entry
    local running = entry.background and entry.background.execute_task -- nil: its start was canceled before
    if task.is_faulted then
      self._failed[#self._failed + 1] = task
    elseif not task.is_completed or (running and not running.is_completed) or (stop.late and task.is_canceled) then
      local hung = task.is_completed and running or task
      core.report(errors.Timeout(("%s did not stop within %g s"):format(name_of(entry.service), timeout)), hung)
    end
  end
  self._state = "stopped"
  conclude(self._failed)
end

-- The task that stops the host.
local function stopping(self)
  ask_to_stop(self, "the host is to stop")
  if not self._stop then
    local task = core.detached({}, Host.stop, stop_services, self)
    if not self._stop then
      self._state = "stopping"
      self._stop = task
      core.launch(task)
    end
  end
  return self._stop
end

---Stops the services that were started, in reverse order, each once the one before has stopped. A `stop` that takes
---longer than the shutdown timeout is left alone: its token is canceled, and the next one's turn comes. Its own
---token is what cancels it; the caller's token and deadline only end the caller's wait.
---Before the start it does nothing; a second call waits for the same end.
---Cancellation: ends the wait; the stopping goes on. Canceled before the call: raises, and begins no stopping.
---Raises: what the services raised that failed, in the background or when they were stopped: one as it is, several
---as an Aggregate, in the order in which it happened. A service that was canceled has not failed. One that does
---not stop in time is reported as unobserved, with the task that still runs, or was canceled before its end.
---@param token? coflow.CancellationToken
function Host:stop(token)
  check_wait(self, token)
  if self._state == "created" then return end
  if self._state == "stopped" then return self._stop:results() end
  core.check_here()
  if not self._stop then core.throw_if_canceled(token) end
  core.await_with(stopping(self), token)
end

Host.stop_async = arguments.twin(Host.stop, check_wait)

---Disposes of the services that have a `dispose`, in reverse order; a background service's cancels its stopping token.
---It waits for nothing: `host:stop()` comes before. Errors are reported as unobserved. Twice is harmless.
function Host:dispose()
  check(self)
  if self._disposed then return end
  self._disposed = true
  for i = #self._services, 1, -1 do
    local entry = self._services[i]
    if entry.background then entry.background:dispose() end
    if entry.service ~= entry.background and entry.service.dispose then
      local ok, err = pcall(entry.service.dispose, entry.service)
      if not ok then core.report(err) end
    end
  end
end

host_class.__close = Host.dispose

-- Running.

-- Waits for the first signal, after which they are the system's again, or for the end of the run.
local function watch_signals(self, catcher)
  local _ <close> = catcher
  core.await(catcher:wait())
  if catcher:take() then ask_to_stop(self, "interrupted by a signal") end
end

-- Its start has failed: what runs in the background ends, though nobody is stopped.
local function give_up(self)
  local _ <close> = core.open_shield()
  self:dispose()
  for _, entry in ipairs(self._services) do
    local task = entry.background and entry.background.execute_task
    if task then ends_within(self._shutdown_timeout, task) end
  end
end

-- The end of a run, when the catcher has been closed.
local ending_run = {}
function ending_run.__close(guard)
  guard.host._running = false
  guard.host:dispose()
  pcall(function() -- in a task that is being abandoned nobody can wait
    local _ <close> = core.open_shield()
    await_end(guard.watcher)
  end)
end

local function run(self, token)
  self._running = true
  local guard <close> = setmetatable({ host = self }, ending_run)
  local signals = core.signals()
  local catcher <close> = core.catch(true, signals.SIGINT, signals.SIGTERM)
  guard.watcher = start_detached(nil, watch_signals, watch_signals, self, catcher)
  if self._state == "created" then
    local ok, err = xpcall(start, core.trace_handler, self, token)
    local asked = is_asked(self) or not pcall(core.throw_if_canceled, token)
    if not ok and not asked then
      give_up(self)
      error(err, 0)
    elseif not ok and not errors.is(err, "OperationCanceled") then
      self._failed[#self._failed + 1] = core.from_exception(err)
    end
  end
  if not is_asked(self) then pcall(core.await_with, self._asked.task, token) end
  local task = stopping(self)
  do
    local _ <close> = core.open_shield()
    core.await(task)
  end
end

---Starts the host, unless it has been started, waits until it is to stop, stops it, and disposes of it. It is to
---stop when SIGINT or SIGTERM comes, when a background service fails, when somebody calls `host:stop()`, and when
---`token` or the ambient token is canceled: however it was asked, and also while it starts, the stopping takes its
---time, out of reach of these tokens, bounded by the shutdown timeout of each service. A second signal ends the
---process.
---Cancellation: a request to stop, after which it returns. Canceled before the call: raises, and starts nothing.
---Raises: what the start of a service raised (then background services are canceled, nobody else is stopped); what
---services raised that failed, as `host:stop()`. InvalidOperation while it runs already, when it has run, also if
---its start has failed, and when it has been stopped: a host runs once.
---@param token? coflow.CancellationToken
function Host:run(token)
  check_wait(self, token)
  core.check_here()
  if not core.current_task() then return core.run(Host.run, self, token) end
  core.throw_if_canceled(token)
  if self._state == "stopped" then
    error(errors.InvalidOperation("the host has been stopped: a host runs once"), 0)
  elseif self._running then
    error(errors.InvalidOperation("the host runs already"), 0)
  elseif self._running == false then
    error(errors.InvalidOperation("the host has run already: a host runs once"), 0)
  end
  closing(run, self, token)
end

Host.run_async = arguments.twin(Host.run, check_wait)

local known_options = { shutdown_timeout = true, failure = true }

---A host for services.
---@param options? { shutdown_timeout?: number, failure?: "stop_host"|"ignore" } shutdown_timeout: seconds that each
---service has to stop, 30 by default, math.huge: no limit; failure: what a background service that fails does:
---"stop_host", which then raises its error, or "ignore": the error is reported as unobserved, the others go on
---@return coflow.Host
local function new_host(options)
  options = core.check_options(1, options, known_options)
  local timeout, failure = options.shutdown_timeout or 30, options.failure or "stop_host"
  if not arguments.is_seconds(timeout) then
    core.argument_error(1, "shutdown_timeout must be a number of seconds, not negative")
  elseif failure ~= "stop_host" and failure ~= "ignore" then
    core.argument_error(1, "failure must be \"stop_host\" or \"ignore\"")
  end
  local asked, start_over = core.TaskCompletionSource(), core.TaskCompletionSource()
  asked.task.name, start_over.task.name = "a request to stop", "the end of the start"
  return setmetatable({
    _state = "created",
    _shutdown_timeout = timeout,
    _failure = failure,
    _services = {}, -- { service =, background = or nil } in the order of their start
    _known = {}, -- service -> true
    _started = {}, -- those of them that have started, and whose stop has not begun
    _failed = {}, -- tasks
    _asked = asked, -- to stop
    _starting = core.call_source(nil), -- canceled when it is to stop, for who starts it
    _start_over = start_over,
    _running = nil, -- true during `run`, then false
    _start = nil, -- the last start of a service: { service =, task = }
  }, host_class)
end

return { Host = new_host, BackgroundService = background_service }
