local flow = require "coflow"
local helper = require "spec.helper"

local in_task, recorder, raises, raised = helper.in_task, helper.recorder, helper.raises, helper.raised
local in_order = helper.in_order

-- A service that notes what is done with it and when; `what.start` and `what.stop` are seconds or functions.
local function service(note, name, what)
  what = what or {}
  local function act(verb)
    return function(self, token)
      note(verb, name, flow.loop.now())
      local action = what[verb]
      if type(action) == "function" then return action(self, token) end
      flow.sleep(action or 0)
    end
  end
  return { name = name, start = act("start"), stop = act("stop") }
end

-- What is reported as unobserved while fn runs.
local function reports(fn)
  local list = {}
  flow.on_unobserved_exception(function(err) list[#list + 1] = err end)
  local _ <close> = helper.closing(function() flow.on_unobserved_exception(nil) end)
  fn()
  helper.collect()
  return list
end

local function start_host(options, ...)
  local host = flow.Host(options)
  for _, s in ipairs { ... } do host:add(s) end
  host:start()
  return host
end

describe("Host", function()
  it("starts services in order, one after the other, and stops them in reverse", in_task(function()
    local log, note = recorder()
    local host = start_host(nil, service(note, "a", { start = 1, stop = 1 }),
      service(note, "b", { start = 2, stop = 2 }), service(note, "c"))
    note("started", flow.loop.now())
    host:stop()
    note("stopped", flow.loop.now())
    assert.same({ "start a 0.0", "start b 1.0", "start c 3.0", "started 3.0", "stop c 3.0", "stop b 3.0", "stop a 5.0",
      "stopped 6.0" }, log)
  end))

  it("says nothing of services that merely stand when the state closes", function()
    assert.equal("", helper.output [[
      local flow = require "coflow"
      flow.run(function()
        host = flow.Host { failure = "ignore" }
        host:add(flow.BackgroundService(function() flow.sleep(10) end))
        host:start()
        flow.sleep(0.001)
      end)
    ]])
  end)

  it("raises the ambient token's error when that cancels its start", in_task(function()
    local host, token = flow.Host(), nil
    host:add { start = function() flow.sleep(9) end }
    local task = flow.spawn(function()
      token = flow.cancellation_token()
      host:start()
    end)
    flow.sleep(1)
    task:cancel("enough")
    local err = raises("OperationCanceled", flow.await, task)
    assert.same({ token, "enough" }, { err.token, err.reason })
    host:stop()
  end))

  it("is done with a start in which a coroutine has died: it can be stopped", in_task(function(clock)
    local log, note = recorder()
    local host = flow.Host():add(service(note, "a")):add { start = function() flow.sleep(9) end }
    local co = flow.coroutine.create(function() flow.with_timeout(1, host.start, host) end)
    helper.is_error("Timeout", select(2, flow.coroutine.resume(co)))
    assert.same({}, reports(function() host:stop() end))
    assert.same({ "start a 0.0", "stop a 1.0" }, log)
    assert.equal(1, clock:now())
  end))

  it("takes services with a start or a stop only, and each once", in_task(function()
    local log, note = recorder()
    local host = flow.Host()
    local both = service(note, "both")
    assert.equal(host, host:add { start = function() note("only start") end })
    host:add { stop = function() note("only stop") end }
    host:add(both):add(both)
    host:start()
    host:stop()
    assert.same({ "only start", "start both 0.0", "stop both 0.0", "only stop" }, log)
  end))

  it("runs once, and takes no services then", in_task(function()
    local log, note = recorder()
    local host = start_host(nil, service(note, "a"))
    raises("InvalidOperation", host.start, host)
    raises("InvalidOperation", host.add, host, { start = print })
    host:stop()
    host:stop()
    raises("InvalidOperation", host.start, host)
    assert.same({ "start a 0.0", "stop a 0.0" }, log)
  end))

  it("does nothing when it is stopped before its start", in_task(function()
    local log, note = recorder()
    local host = flow.Host():add(service(note, "a"))
    host:stop()
    assert.same({}, log)
    host:start()
    host:stop()
    assert.same({ "start a 0.0", "stop a 0.0" }, log)
  end))

  it("raises the failure of a start as it is, starts no more, and stops nobody", in_task(function()
    local log, note = recorder()
    local failure = {}
    local host = flow.Host():add(service(note, "a")):add(service(note, "b", { start = function() error(failure) end }))
      :add(service(note, "c"))
    assert.equal(failure, raised(host.start, host))
    assert.same({ "start a 0.0", "start b 0.0" }, log)
    host:stop() -- those that were started are left to this
    assert.same({ "start a 0.0", "start b 0.0", "stop a 0.0" }, log)
  end))

  it("gives the start a token that the caller's tokens cancel", in_task(function()
    local log, note = recorder()
    local function listens(_, token)
      local _ <close> = helper.closing(function() note("canceled", token.is_cancellation_requested) end)
      flow.sleep(100)
    end
    local function host() return flow.Host():add(service(note, "a", { start = listens })):add(service(note, "b")) end
    raises("Timeout", flow.with_timeout, 1, function() host():start() end)
    raises("OperationCanceled", function() host():start(flow.CancellationTokenSource(1).token) end)
    raises("OperationCanceled", function() host():start(flow.CancellationToken.canceled) end)
    assert.same({ "start a 0.0", "canceled true", "start a 1.0", "canceled true" }, log)
    local opted_out = flow.Host():add(service(note, "c", { start = 3 }))
    flow.with_timeout(1, function() opted_out:start(flow.CancellationToken.none) end)
    assert.equal(5, flow.loop.now())
  end))

  it("keeps what a start has started out of reach of the starter's tokens", in_task(function()
    local log, note = recorder()
    local host = flow.Host():add {
      start = function(self)
        self.gate = flow.ManualResetEvent(false)
        self.task = flow.spawn(function()
          self.gate:wait()
          note("drained", flow.loop.now(), flow.deadline())
        end)
      end,
      stop = function(self)
        flow.sleep(1)
        self.gate:set()
        self.task:await()
      end,
    }
    flow.with_timeout(5, host.run, host)
    local source = flow.CancellationTokenSource()
    host = flow.Host():add { start = function(self) self.task = flow.delay(3) end, stop = function(self)
      self.task:await()
      note("waited", flow.loop.now())
    end }
    flow.with_cancellation(source.token, function()
      host:start(source.token)
      source:cancel()
    end)
    host:stop()
    assert.same({ "drained 6.0 nil", "waited 9.0" }, log)
  end))

  it("cancels what a start has started that fails, or is canceled", in_order(function()
    local log, note = recorder()
    local function begin(name)
      flow.spawn(function()
        local _ <close> = helper.closing(function() note(name, flow.loop.now()) end)
        flow.sleep(100)
      end)
    end
    local failure = {}
    local host = flow.Host():add { start = function()
      begin "of the one that fails"
      flow.sleep(1)
      error(failure)
    end }
    assert.equal(failure, raised(host.start, host))
    flow.yield()
    host = flow.Host():add { start = function(_, token)
      begin "of the one that is canceled"
      local ok = pcall(flow.sleep, 50)
      note("slept", ok, token.is_cancellation_requested, token.reason)
      flow.shield(flow.sleep, 2) -- which the starter waits for
      token:throw_if_cancellation_requested()
    end, stop = function() note "not reached" end }
    local starting = host:start_async()
    flow.sleep(1)
    starting:cancel("no time")
    assert.equal("no time", raises("OperationCanceled", flow.await, starting).reason)
    assert.equal(4, flow.loop.now())
    host:stop()
    assert.same({ "of the one that fails 1.0", "slept false true no time", "of the one that is canceled 2.0" }, log)
  end))

  it("keeps what a start does to the context from everybody else", in_order(function()
    local loc = flow.AsyncLocal()
    local seen = {}
    loc.value = "caller"
    local host = start_host(nil,
      { start = function() loc.value = "first" end },
      { start = function() seen[1] = loc.value end },
      { start = function() loc.value = "third" end, execute = function() seen[2] = loc.value end })
    flow.yield()
    assert.equal("caller", loc.value)
    assert.same({ "caller", "third" }, seen)
    host:stop()
  end))

  it("goes on stopping when one fails; one failure comes out as it is", in_task(function()
    local log, note = recorder()
    local failure = {}
    local host = start_host(nil, service(note, "a"), service(note, "b", { stop = function() error(failure) end }),
      service(note, "c"))
    assert.equal(failure, raised(host.stop, host))
    assert.same({ "stop c 0.0", "stop b 0.0", "stop a 0.0" }, table.move(log, 4, 6, 1, {}))
    assert.equal(failure, raised(host.stop, host)) -- the same end, for whoever asks
  end))

  it("raises several failures together, in their order", in_task(function()
    local _, note = recorder()
    local host = start_host(nil, service(note, "a", { stop = function() error("of a", 0) end }), service(note, "b"),
      service(note, "c", { stop = function() error("of c", 0) end }),
      flow.BackgroundService(function() error("of d", 0) end))
    flow.yield()
    assert.same({ "of d", "of c", "of a" }, helper.inner(raised(host.stop, host)))
  end))

  it("does not count a canceled stop as a failure", in_task(function()
    local host = start_host(nil, { stop = function() error(flow.errors.OperationCanceled("mine")) end })
    host:stop()
  end))

  describe("with a shutdown timeout", function()
    it("cancels the token of a stop that takes longer, and goes on to the next", in_order(function()
      local log, note = recorder()
      local host = start_host({ shutdown_timeout = 5 }, service(note, "a", { stop = 4 }),
        service(note, "listens", { stop = function(_, token)
          token:wait()
          note("heard", flow.loop.now())
        end }),
        service(note, "sleeps", { stop = 100 }))
      local list = reports(function() host:stop() end)
      assert.equal(1, #list) -- what listens, and ends when it is told, has not been cut off
      helper.is_error("Timeout", list[1], "service 'sleeps' did not stop within 5 s")
      assert.same({ "stop sleeps 0.0", "stop listens 5.0", "heard 10.0", "stop a 10.0" }, table.move(log, 4, 7, 1, {}))
      assert.equal(14, flow.loop.now())
    end))

    it("reports a service that does not stop at all, by name", in_task(function()
      local log, note = recorder()
      local gate = flow.TaskCompletionSource()
      local host = start_host({ shutdown_timeout = 5 }, service(note, "good"), service(note, "deaf", { stop = function()
        flow.shield(flow.await, gate.task)
      end }))
      local list = reports(function() host:stop() end)
      assert.equal(1, #list)
      helper.is_error("Timeout", list[1], "service 'deaf' did not stop within 5 s")
      assert.same({ "stop deaf 0.0", "stop good 5.0" }, table.move(log, 3, 4, 1, {}))
      gate:set_result()
    end))

    it("reports, where nobody has asked for reports, which service it is about and where it hangs", function()
      local result = helper.child [[
        local flow = require "coflow"
        flow.run(function()
          local host = flow.Host { shutdown_timeout = 0.01 }
          local gate = flow.TaskCompletionSource()
          host:add { name = "deaf", stop = function() flow.shield(flow.await, gate.task) end }
          host:add(flow.BackgroundService(function() flow.shield(flow.await, gate.task) end))
          host:start()
          flow.yield()
          host:stop()
          gate:set_result()
        end)
      ]]
      assert.equal(0, result.code)
      local first, second = result.err:match("^(.+)\n(coflow: .*)$")
      assert.truthy(first:find("': Timeout: a service did not stop within 0.01 s\n", 1, true), first)
      assert.truthy(first:find(result.file .. ":6:", 1, true), first)
      assert.truthy(second:find("': Timeout: service 'deaf' did not stop within 0.01 s\n", 1, true), second)
      assert.truthy(second:find(result.file .. ":5:", 1, true), second)
    end)

    it("raises what a late stop raises when it is canceled", in_order(function()
      local host = start_host({ shutdown_timeout = 1 }, { stop = function()
        pcall(flow.sleep, 100)
        error("not saved", 0)
      end })
      assert.equal("not saved", raised(host.stop, host))
    end))

    it("of 0 cancels at once, of math.huge never", in_task(function()
      local log, note = recorder()
      local host = start_host({ shutdown_timeout = 0 }, service(note, "a", { stop = 7 }))
      assert.equal(1, #reports(function() host:stop() end))
      assert.equal(0, flow.loop.now())
      start_host({ shutdown_timeout = math.huge }, service(note, "b", { stop = 1e6 })):stop()
      assert.equal(1e6, flow.loop.now())
      host = start_host(nil, service(note, "c", { stop = 100 }))
      assert.equal(1, #reports(function() host:stop() end))
      assert.equal(1e6 + 30, flow.loop.now()) -- unless told otherwise: 30 seconds
      assert.equal(6, #log)
    end))
  end)

  it("stops once, to the end, whoever waits and whoever gives up", in_task(function()
    local log, note = recorder()
    local host = start_host(nil, service(note, "a", { stop = 5 }), service(note, "b", { stop = 5 }))
    raises("Timeout", flow.with_timeout, 1, host.stop, host)
    raises("OperationCanceled", host.stop, host, flow.CancellationTokenSource(1).token)
    local one, two = host:stop_async(), host:stop_async()
    flow.await_all(one, two)
    assert.equal(10, flow.loop.now())
    assert.same({ "stop b 0.0", "stop a 5.0" }, table.move(log, 3, 4, 1, {}))
  end))

  it("stopped while it starts, gives up the start and stops what was started", in_task(function()
    local log, note = recorder()
    local host = flow.Host():add(service(note, "a")):add(service(note, "b", { start = 100 })):add(service(note, "c"))
    local starting = host:start_async()
    flow.sleep(1)
    host:stop()
    raises("OperationCanceled", flow.await, starting)
    assert.same({ "start a 0.0", "start b 0.0", "stop a 1.0" }, log)
  end))

  it("stopped while a start hangs, goes on without it after the timeout", in_task(function()
    local log, note = recorder()
    local gate = flow.TaskCompletionSource()
    local host = flow.Host { shutdown_timeout = 5 }:add(service(note, "a"))
    host:add { start = function() flow.shield(flow.await, gate.task) end, execute = function() note("never") end }
    local starting = host:start_async()
    flow.sleep(1)
    local list = reports(function() host:stop() end)
    helper.is_error("Timeout", list[1], "the start of a service went on for 5 s")
    assert.same({ "start a 0.0", "stop a 6.0" }, log)
    gate:set_result()
    raises("OperationCanceled", flow.await, starting)
    assert.equal(2, #log)
  end))

  it("stops a service of which only its start has come about, not its work", in_task(function()
    local log, note = recorder()
    local host = flow.Host()
    host:add { start = function() flow.shield(flow.sleep, 2) end, execute = function() note("never") end,
      stop = function() note("stop", flow.loop.now()) end }
    local starting = host:start_async()
    flow.sleep(1)
    host:stop()
    raises("OperationCanceled", flow.await, starting)
    assert.same({ "stop 2.0" }, log)
  end))

  it("stops also what has started while it stops the others, or later still", in_task(function()
    -- After 6 s the host goes on without c, and stops b until 8 s.
    for seconds, stopped in pairs { [2.5] = 2.5, [7] = 8, [99] = 99 } do
      local log, note = recorder()
      local host = flow.Host { shutdown_timeout = 5 }
      host:add(service(note, "a")):add(service(note, "b", { stop = 2 }))
      host:add { start = function() flow.shield(flow.sleep, seconds) note("start c") end,
        stop = function() note("stop c", flow.loop.now()) end }
      local before = flow.loop.now()
      local starting = host:start_async()
      flow.sleep(1)
      local list = reports(function() host:stop() end)
      flow.try_await(starting)
      flow.sleep(1)
      assert.equal(seconds > 6 and 1 or 0, #list)
      assert.truthy(table.concat(log, " "):find("stop c " .. before + stopped, 1, true), table.concat(log, " "))
    end
  end))

  it("canceled before it stops begins no stopping; what runs already it joins", in_task(function()
    local log, note = recorder()
    local host = start_host(nil, service(note, "a", { stop = 1 }))
    raises("OperationCanceled", host.stop, host, flow.CancellationToken.canceled)
    raises("Timeout", flow.with_timeout, 1, function() pcall(flow.sleep, 2) host:stop() end)
    helper.settle()
    assert.same({ "start a 0.0" }, log)
    host:stop()
    host:stop(flow.CancellationToken.canceled) -- it is over
    assert.same({ "start a 0.0", "stop a 1.0" }, log)
  end))

  it("changes nothing where nobody can wait", in_task(function()
    local log, note = recorder()
    local host = flow.Host():add(service(note, "a"))
    helper.refused_where_nobody_waits(host.start, host)
    helper.refused_where_nobody_waits(host.run, host)
    note("refused")
    host:start()
    helper.refused_where_nobody_waits(host.stop, host)
    helper.settle()
    note("refused")
    host:stop()
    assert.same({ "refused", "start a 4.0", "refused", "stop a 6.0" }, log)
  end))

  it("may be stopped by a service, from its start, its work and its stop", in_task(function()
    local log, note = recorder()
    local host
    host = flow.Host { shutdown_timeout = 5 }:add(service(note, "a", { start = function() host:stop() end }))
    raises("OperationCanceled", host.start, host)
    host:stop()
    host = flow.Host { shutdown_timeout = 5 }:add(flow.BackgroundService(function()
      local _ <close> = helper.closing(function() note("worked until", flow.loop.now()) end)
      flow.sleep(1)
      host:stop()
    end))
    host:run()
    host = start_host({ shutdown_timeout = 5 }, service(note, "b", { stop = function() host:stop() end }))
    assert.equal(1, #reports(function() host:stop() end))
    assert.same({ "start a 0.0", "worked until 1.0", "start b 1.0", "stop b 1.0" }, log)
    assert.equal(6, flow.loop.now()) -- a stop that waits for itself is one that hangs
  end))

  it("works outside every task", function()
    local log, note = recorder()
    local host = flow.Host():add(service(note, "a")):add(flow.BackgroundService(function(token) token:wait() end))
    host:start()
    host:stop()
    host:dispose()
    assert.truthy(log[1]:find("start a"))
    assert.truthy(log[2]:find("stop a"))
    host = flow.Host():add(flow.BackgroundService(function() error("fails", 0) end))
    assert.equal("fails", raised(host.run, host))
    assert.is_false(flow.loop.is_alive())
  end)

  it("refuses wrong arguments, at their caller", in_task(function()
    local host = flow.Host()
    local function refuses(message, fn)
      local err = raised(fn)
      assert.equal("string", type(err))
      assert.truthy(err:find(message, 1, true), err)
    end
    refuses("shutdown_timeout must be a number of seconds, not negative", function()
      flow.Host { shutdown_timeout = -1 }
    end)
    refuses("shutdown_timeout must be a number", function() flow.Host { shutdown_timeout = 0 / 0 } end)
    refuses("failure must be", function() flow.Host { failure = "crash" } end)
    refuses("unknown option 'timeout'", function() flow.Host { timeout = 1 } end)
    refuses("bad argument #1 to 'add' (service expected, got function: BackgroundService(fn) makes one of it)",
      function() host:add(print) end)
    refuses("the service has none of the functions", function() host:add {} end)
    refuses("'stop' of a service must be a function", function() host:add { start = print, stop = 1 } end)
    refuses("bad argument #1 to 'start'", function() host:start(1) end)
    refuses("bad argument #1 to 'stop'", function() host:stop(1) end)
    refuses("bad argument #1 to 'run'", function() host:run(1) end)
    refuses("bad argument #1 to 'run' (coflow.Host expected", function() host.run() end)
    refuses("bad argument #1 to 'BackgroundService'", function() flow.BackgroundService(1) end)
    refuses("bad argument #1 to 'BackgroundService'", function() flow.BackgroundService {} end)
    refuses(helper.here(1), function()
      host:add(1)
    end)
  end))

  it("takes a service that can be called, too", in_task(function()
    local started = 0
    local class = setmetatable({ start = function() started = started + 1 end }, { __call = error })
    local host = flow.Host():add(class)
    host:start()
    host:stop()
    assert.equal(1, started)
  end))
end)

describe("BackgroundService", function()
  it("never delays the start, and is stopped by its token", in_order(function()
    local log, note = recorder()
    local host = start_host(nil, service(note, "a"), flow.BackgroundService(function(token)
      note("runs")
      assert.equal(token, flow.cancellation_token())
      token:wait()
      note("stops")
    end), service(note, "b"))
    note("started")
    flow.yield()
    host:stop()
    assert.same({ "start a 0.0", "start b 0.0", "started", "runs", "stop b 0.0", "stops", "stop a 0.0" }, log)
  end))

  it("may be a table, with or without a start and a stop of its own", in_order(function()
    local log, note = recorder()
    local function worker(name)
      return { name = name, execute = function(self, token)
        note("runs", self.name)
        token:wait()
        flow.shield(flow.sleep, 1)
        note("ends", self.name)
      end }
    end
    local whole = worker("whole")
    whole.start = function(self) note("start", self.name) flow.sleep(1) end
    whole.stop = function(self) note("stop", self.name) end
    local host = start_host(nil, flow.BackgroundService(worker("wrapped")), worker("plain"), whole)
    flow.yield()
    host:stop()
    assert.same({ "start whole", "runs wrapped", "runs plain", "runs whole", "ends whole", "stop whole", "ends plain",
      "ends wrapped" }, log)
  end))

  it("is free of the token and the deadline of whoever starts the host", in_task(function()
    local _, note = recorder()
    local deadline = {}
    local host = flow.Host():add(service(note, "a")):add(flow.BackgroundService(function(token)
      deadline[1] = flow.deadline()
      flow.sleep(10)
      deadline[2] = token.is_cancellation_requested
    end))
    flow.with_timeout(1, host.start, host)
    flow.sleep(20)
    assert.same({ nil, false }, deadline)
    host:stop()
  end))

  it("does not stop the host when it returns", in_task(function()
    local log, note = recorder()
    local host = flow.Host():add(flow.BackgroundService(function() note("done") end))
    host:run(flow.CancellationTokenSource(3).token)
    assert.same({ "done" }, log)
    assert.equal(3, flow.loop.now())
  end))

  it("may ignore its cancellation: stop does not raise, but the host reports it", in_order(function()
    local gate = flow.TaskCompletionSource()
    local background = flow.BackgroundService(function() flow.shield(flow.await, gate.task) end)
    local host = start_host({ shutdown_timeout = 2 }, background)
    flow.yield()
    local list = reports(function() host:stop() end)
    assert.equal(2, flow.loop.now())
    helper.is_error("Timeout", list[1], "did not stop within 2 s")
    gate:set_result()
    flow.yield()
    flow.yield()
    assert.is_true(background.execute_task.is_completed)
  end))

  it("raises what callbacks of its token raise, when it has ended", in_order(function()
    local log, note = recorder()
    local host = start_host(nil, service(note, "a"), flow.BackgroundService(function(token)
      token:register(error, "first")
      token:register(error, "second")
      local _ <close> = helper.closing(function()
        flow.shield(flow.sleep, 1)
        note("ended")
      end)
      token:wait()
    end))
    flow.yield()
    assert.same({ "second", "first" }, helper.inner(raised(host.stop, host)))
    assert.same({ "start a 0.0", "ended", "stop a 1.0" }, log)
  end))

  it("is not canceled by a stop where nobody can wait", in_task(function()
    local background = flow.BackgroundService(function() flow.sleep(100) end)
    background:start()
    helper.refused_where_nobody_waits(background.stop, background)
    assert.is_false(background.execute_task.is_completed)
    background:stop()
    assert.is_true(background.execute_task.is_canceled)
  end))

  it("can be used without a host", in_task(function()
    local log, note = recorder()
    local background = flow.BackgroundService(function(token)
      note("runs")
      token:wait()
    end)
    background:stop()
    background:dispose()
    background:start()
    raises("InvalidOperation", background.start, background)
    flow.yield()
    background:stop()
    assert.is_true(background.execute_task.is_completed_successfully)
    background:start()
    flow.yield()
    background:dispose()
    flow.await(background.execute_task)
    assert.same({ "runs", "runs" }, log)
    local deaf = flow.BackgroundService(function() flow.shield(flow.sleep, 5) end)
    deaf:start()
    flow.yield()
    deaf:stop(flow.CancellationTokenSource(1).token)
    assert.equal(1, flow.loop.now())
    flow.with_timeout(1, deaf.stop, deaf) -- swallowed: it raises nothing because the service does not listen
    assert.equal(2, flow.loop.now())
    flow.await(deaf.execute_task)
  end))
end)

describe("host:run", function()
  it("runs once, also when the start has failed", in_task(function()
    local host = flow.Host():add { start = function() error("no start", 0) end }
    assert.equal("no start", raised(host.run, host))
    helper.is_error("InvalidOperation", raised(host.run, host), "has run already")
    host:stop()
    helper.is_error("InvalidOperation", raised(host.run, host), "has been stopped")
  end))

  it("is over, and leaves nothing open, when a coroutine dies of it", in_task(function()
    local log, note = recorder()
    local host = flow.Host():add {
      start = function() error("no start", 0) end,
      dispose = function() note("disposed") end,
    }
    local co = flow.coroutine.create(function() host:run() end)
    assert.same({ false, "no start" }, { flow.coroutine.resume(co) })
    assert.same({ "disposed" }, log)
    helper.is_error("InvalidOperation", raised(host.run, host), "has run already")
  end))

  it("starts, waits for a token, stops, disposes, and returns", in_task(function()
    local log, note = recorder()
    local a = service(note, "a")
    a.dispose = function() note("dispose a") end
    local host = flow.Host():add(a):add(service(note, "b"))
    assert.equal(0, select("#", host:run(flow.CancellationTokenSource(5).token)))
    assert.same({ "start a 0.0", "start b 0.0", "stop b 5.0", "stop a 5.0", "dispose a" }, log)
    host:dispose()
    assert.equal(5, #log)
  end))

  it("takes an ambient cancellation for a request, and stops out of its reach", in_task(function()
    local log, note = recorder()
    local host = flow.Host():add(service(note, "a", { stop = 10 }))
    flow.with_timeout(3, function()
      host:run()
      note("returned", flow.loop.now())
    end)
    local task = flow.spawn(function() flow.Host():add(service(note, "b", { stop = 10 })):run() return "done" end)
    flow.sleep(1)
    task:cancel()
    assert.equal("done", flow.await(task))
    assert.same({ "start a 0.0", "stop a 3.0", "returned 13.0", "start b 13.0", "stop b 14.0" }, log)
    assert.equal(24, flow.loop.now())
  end))

  it("starts nothing under a token that is canceled", in_task(function()
    local log, note = recorder()
    local host = flow.Host():add(service(note, "a"))
    raises("OperationCanceled", host.run, host, flow.CancellationToken.canceled)
    assert.same({}, log)
  end))

  it("opts out of both tokens with `none`", in_task(function()
    local log, note = recorder()
    local host = flow.Host():add(service(note, "a", { start = 3 }))
    flow.spawn(function()
      flow.sleep(10)
      host:stop()
    end)
    flow.with_timeout(1, host.run, host, flow.CancellationToken.none)
    assert.same({ "start a 0.0", "stop a 10.0" }, log)
  end))

  it("asked to stop while it starts, stops what was started, and returns", in_task(function()
    local log, note = recorder()
    local host = flow.Host():add(service(note, "a", { stop = 2 })):add(service(note, "b", { start = 100 }))
      :add(service(note, "c"))
    host:run(flow.CancellationTokenSource(4).token)
    assert.same({ "start a 0.0", "start b 0.0", "stop a 4.0" }, log)
    assert.equal(6, flow.loop.now())
    local failing = flow.Host():add(service(note, "d")):add { start = function()
      pcall(flow.sleep, 100)
      error("half a start", 0)
    end }
    assert.equal("half a start", raised(failing.run, failing, flow.CancellationTokenSource(1).token))
    assert.equal("stop d 7.0", log[#log])
  end))

  it("returns when somebody stops the host, at its end", in_task(function()
    local log, note = recorder()
    local host = flow.Host():add(service(note, "a", { stop = 5 }))
    local task = host:run_async()
    flow.sleep(1)
    flow.spawn(function() host:stop() end)
    flow.await(task)
    assert.same({ "start a 0.0", "stop a 1.0" }, log)
    assert.equal(6, flow.loop.now())
  end))

  it("raises the failure of a start, ends what runs in the background, and stops nobody", in_task(function()
    local log, note = recorder()
    local host = flow.Host():add(service(note, "a")):add(flow.BackgroundService(function(token)
      token:wait()
      flow.shield(flow.sleep, 2)
      note("ended", flow.loop.now())
    end)):add(service(note, "b", { start = function()
      flow.sleep(1)
      error("no port", 0)
    end }))
    assert.equal("no port", raised(host.run, host))
    assert.same({ "start a 0.0", "start b 0.0", "ended 3.0" }, log)
  end))

  it("stops the host when a service fails, and raises its failure, as it is", in_task(function()
    local log, note = recorder()
    local failure = {}
    local host = flow.Host():add(service(note, "a")):add(flow.BackgroundService(function()
      flow.sleep(5)
      error(failure)
    end)):add(flow.BackgroundService(function(token)
      token:wait()
      note("the other", flow.loop.now())
    end))
    local task = host:run_async()
    assert.equal(failure, raised(flow.await, task))
    assert.same({ "start a 0.0", "the other 5.0", "stop a 5.0" }, log)
    assert.truthy(task:traceback():find(helper.here(-10), 1, true), task:traceback())
  end))

  it("stops when a service fails during the start", in_task(function()
    local log, note = recorder()
    local host = flow.Host():add(flow.BackgroundService(function() error("early", 0) end))
      :add(service(note, "a", { start = 10 })):add(service(note, "b"))
    assert.equal("early", raised(host.run, host))
    assert.same({ "start a 0.0" }, log)
    assert.equal(0, flow.loop.now())
  end))

  it("raises several failures as an Aggregate, those while it stops included", in_task(function()
    local host = flow.Host():add { stop = function() error("stop", 0) end }
      :add(flow.BackgroundService(function(token)
        token:wait()
        error("second", 0)
      end))
      :add(flow.BackgroundService(function() error("first", 0) end))
    assert.same({ "first", "second", "stop" }, helper.inner(raised(host.run, host)))
  end))

  it("takes a cancellation for a failure only while nobody stops it", in_task(function()
    local background = flow.BackgroundService(function() flow.sleep(100) end)
    local host = flow.Host():add(background)
    flow.spawn(function()
      flow.sleep(1)
      background.execute_task:cancel("by hand")
    end)
    assert.equal("by hand", raises("OperationCanceled", host.run, host).reason)
    flow.Host():add(flow.BackgroundService(function() flow.sleep(100) end)):run(flow.CancellationTokenSource(1).token)
  end))

  it("goes on when told to ignore failures, which are reported", in_task(function()
    local log, note = recorder()
    local host = flow.Host { failure = "ignore" }:add(service(note, "a"))
      :add(flow.BackgroundService(function() error("ignored", 0) end))
    local list = reports(function() host:run(flow.CancellationTokenSource(5).token) end)
    assert.same({ "ignored" }, list)
    assert.same({ "start a 0.0", "stop a 5.0" }, log)
  end))

  it("runs once at a time, and a host that was started goes on", in_task(function()
    local log, note = recorder()
    local host = start_host(nil, service(note, "a"))
    flow.sleep(1)
    local task = host:run_async(flow.CancellationTokenSource(1).token)
    raises("InvalidOperation", host.run, host)
    flow.await(task)
    assert.same({ "start a 0.0", "stop a 2.0" }, log)
  end))

  it("refuses a host that has been stopped", in_task(function()
    local log, note = recorder()
    local host = start_host(nil, service(note, "a"))
    host:stop()
    helper.is_error("InvalidOperation", raised(host.run, host), "a host runs once")
    host = flow.Host():add(service(note, "b"))
    host:run(flow.CancellationTokenSource(1).token)
    helper.is_error("InvalidOperation", raised(host.run, host), "a host runs once")
    host = start_host(nil, service(note, "c", { stop = 3 }))
    local stopping = host:stop_async()
    host:run() -- the stop under way is its end
    assert.equal(4, flow.loop.now())
    flow.await(stopping)
    assert.equal(6, #log)
  end))

  it("leaves nobody's failure unreported when nobody runs the host", in_task(function()
    local list = reports(function()
      start_host(nil, flow.BackgroundService(function() error("alone", 0) end))
      flow.yield()
    end)
    assert.same({ "alone" }, list)
  end))
end)

-- On the real clock, in a process of its own, which sends the signal to itself.
describe("a host that gets a signal", function()
  local body = [[
    local flow = require "coflow"
    local function send()
      os.execute("kill -TERM $PPID")
    end
    local function slow(name, seconds)
      return { start = function() print("start " .. name) end, stop = function()
        print("stop " .. name)
        flow.sleep(seconds or 0.001)
        print("stopped " .. name)
      end }
    end
  ]]

  local function run(code)
    local result = helper.child(body .. code)
    return result.out, result.code, result.err
  end

  it("ends at a second one though a service computes for ever", function()
    local _, code = run [[
      local host = flow.Host()
      host:add(flow.BackgroundService(function()
        send()
        send()
        while true do end
      end))
      flow.run(host.run, host)
    ]]
    assert.equal(143, code)
  end)

  it("stops, and returns", function()
    local out, code, err = run [[
      local host = flow.Host():add(slow "a"):add(slow "b")
      host:add(flow.BackgroundService(function()
        send()
        flow.sleep(20)
      end))
      flow.run(host.run, host)
      print("returned", flow.loop.is_alive())
    ]]
    assert.equal("start a\nstart b\nstop b\nstopped b\nstop a\nstopped a\nreturned\tfalse\n", out)
    assert.equal("0", tostring(code) .. err)
  end)

  it("stops while it starts", function()
    local out, code, err = run [[
      local host = flow.Host():add(slow "a"):add { start = function()
        send()
        flow.sleep(20)
      end }
      host:run()
    ]]
    assert.equal("start a\nstop a\nstopped a\n", out)
    assert.equal("0", tostring(code) .. err)
  end)

  it("stops gracefully inside flow.main, whose exit code says that all is well", function()
    local out, code, err = run [[
      os.exit(flow.main(function()
        local host = flow.Host():add(slow("a", 0.05))
        host:add(flow.BackgroundService(function()
          send()
          flow.sleep(20)
        end))
        host:run()
        print("returned")
      end), true)
    ]]
    assert.equal("start a\nstop a\nstopped a\nreturned\n", out)
    assert.equal("0", tostring(code) .. err)
  end)

  it("has the signal for itself in flow.main, which goes on behind it", function()
    local out, code, err = run [[
      io.stdout:setvbuf("no")
      os.exit(flow.main(function()
        local host = flow.Host():add(slow("a", 0.01))
        flow.spawn(send)
        host:run()
        flow.sleep(0.01)
        print("awake", flow.cancellation_token().is_cancellation_requested)
        send()
        flow.sleep(20)
        print("not reached")
      end), true)
    ]]
    assert.equal("start a\nstop a\nstopped a\nawake\tfalse\n", out)
    assert.equal(143, code, err)
  end)

  it("lets services that started a server serve on in flow.main until they are stopped", function()
    local out, code, err = run [[
      os.exit(flow.main(function()
        local listener = flow.net.listen("127.0.0.1", 0)
        local client <close> = flow.net.connect("127.0.0.1", listener.port)
        local host = flow.Host { shutdown_timeout = 30 }
        host:add {
          start = function(self)
            self.serving = listener:serve_async(function(stream)
              for line in stream:lines() do
                send()
                flow.sleep(0.05)
                stream:write("done ", line, "\n")
              end
            end, { grace = 30 })
          end,
          stop = function(self)
            print("stop", self.serving.is_completed)
            listener:stop()
            self.serving:await()
          end,
        }
        local asking = flow.spawn(flow.shield, function()
          client:write("work\n")
          print(client:read_line())
          client:close()
        end)
        host:run()
        asking:await()
      end), true)
    ]]
    assert.equal("stop\tfalse\ndone work\n", out)
    assert.equal("0", tostring(code) .. err)
  end)

  it("ends flow.main with 1 and a traceback when a service fails", function()
    local out, code, err = run [[
      os.exit(flow.main(function()
        flow.Host():add(slow "a"):add(flow.BackgroundService(function() error("no disk", 0) end)):run()
      end), true)
    ]]
    assert.equal("start a\nstop a\nstopped a\n", out)
    assert.equal(1, code)
    assert.truthy(err:find("no disk", 1, true))
  end)

  for _, how in ipairs { "flow.run(main)", "flow.main(main)" } do
    it("is ended by a second one: " .. how, function()
      local out, code = run([[
        local function main()
          local host = flow.Host():add { stop = function()
            print("stopping")
            io.stdout:flush()
            flow.sleep(0.01)
            send()
            flow.sleep(20)
          end }
          host:add(flow.BackgroundService(send))
          host:run()
          print("not reached")
        end
        ]] .. how)
      assert.equal("stopping\n", out)
      assert.equal(128 + 15, code)
    end)
  end

  it("leaves the signals to the system when it has run", function()
    local out, code = run [[
      flow.run(function() flow.Host():run(flow.CancellationTokenSource(0.001).token) end)
      print("returned")
      io.stdout:flush()
      os.execute("kill -TERM $PPID; sleep 20")
    ]]
    assert.equal("returned\n", out)
    assert.equal(128 + 15, code)
  end)
end)
