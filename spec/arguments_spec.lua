-- coflow.arguments, and what all public functions have in common: who is blamed for a wrong argument, where the token
-- may stand, and what one that is canceled before the call does.
-- SPDX-License-Identifier: MIT

local flow = require "coflow"
local helper = require "spec.helper"

local raises, raised = helper.raises, helper.raised
local Token = flow.CancellationToken

-- The body of a test on the real clock, with things to call functions on.
local function with_things(fn)
  return function()
    flow.run(function()
      local listener <close> = flow.net.listen("127.0.0.1", 0)
      local client <close> = flow.net.connect("127.0.0.1", listener.port)
      local stream <close> = listener:accept()
      local udp <close> = flow.net.udp()
      local file <close> = flow.fs.open("/dev/null", "r+")
      local child <close> = flow.process.spawn { args = { "sleep", "100" } }
      fn {
        flow = flow, net = flow.net, fs = flow.fs, dns = flow.dns, process = flow.process, signal = flow.signal,
        parallel = flow.parallel, listener = listener, client = client, stream = stream, udp = udp, file = file,
        child = child, lazy = flow.AsyncLazy(function() end), cache = flow.AsyncCache(), host = flow.Host(),
        queue = flow.BackgroundQueue(), items = flow.stream.from {}, retry = flow.resilience.retry(),
        service = flow.BackgroundService(function() end), print = print, path = os.tmpname(),
      }
    end)
  end
end

-- Runs a line of Lua whose names are those of `things`, and `token`.
local function call(things, line, token)
  local env = setmetatable({ token = token }, { __index = things })
  return assert(load("local value = " .. line .. " return value", "=line", "t", env))()
end

describe("an _async twin", function()
  it("raises what is wrong with its arguments at the call, which it blames by name and number", with_things(function(o)
    for line, n in pairs {
      ["items:to_table_async(5)"] = 1,
      ["items:reduce_async(5)"] = 1,
      ["items:reduce_async(print, 0, 5)"] = 3,
      ["items:for_each_async(5)"] = 1,
      ["items:for_each_async(print, 5)"] = 2,
      ["items.for_each_async(5)"] = 1,
      ["lazy:get_async(5)"] = 1,
      ["lazy.get_async(5)"] = 1,
      ["cache:get_or_add_async(nil, print)"] = 1,
      ["cache:get_or_add_async(1)"] = 2,
      ["cache:get_or_add_async(1, print, 5)"] = 3,
      ["queue:drain_async(5)"] = 1,
      ["queue:enqueue_async(5)"] = 1,
      ["queue:enqueue_async({ token = token }, 5)"] = 2,
      ["host:run_async(5)"] = 1,
      ["host:start_async(5)"] = 1,
      ["host:stop_async(5)"] = 1,
      ["host.stop_async(5)"] = 1,
      ["service:stop_async(5)"] = 1,
      ["retry:execute_async(5)"] = 1,
      ["parallel.for_each_async(5, print)"] = 1,
      ["parallel.for_each_async({}, 5)"] = 2,
      ["parallel.for_each_async({}, nil, 5)"] = 3,
      ["parallel.map_async({}, { degree = 1 }, print)"] = 2,
      ["signal.wait_async('SIGKILL')"] = 1,
      ["signal.wait_async('SIGUSR1', 5)"] = 2,
      ["listener:serve_async(5)"] = 1,
      ["listener:serve_async(print, 5)"] = 2,
      ["listener:serve_async(print, nil, 5)"] = 3,
      ["net.listen_async('127.0.0.1', 0, nil, 5)"] = 4,
    } do
      local message = ("line:1: bad argument #%d to '%s' ("):format(n, line:match("[.:]([%w_]+)"))
      local err = raised(call, o, line)
      assert.equal("string", type(err), line)
      assert.equal(message, err:sub(1, #message), err)
    end
  end))
end)

describe("a token that is canceled", function()
  -- Behind all other arguments, and in place of those that may be left out.
  it("starts nothing, wherever it may stand, in direct style and in the twin", with_things(function(o)
    local function refuses(line)
      local err = raises("OperationCanceled", call, o, line, Token.canceled)
      assert.equal(Token.canceled, err.token, line)
      local twin = line:gsub("([%w_]+)%(", "%1_async(", 1)
      local task = call(o, twin, Token.canceled)
      assert.is_true(task.is_canceled, twin)
    end
    for _, line in ipairs {
      "listener:serve(print, nil, token)", "listener:serve(print, token)", "listener:accept(token)",
      "net.listen('127.0.0.1', 0, nil, token)", "net.listen('127.0.0.1', 0, token)",
      "net.listen('localhost', 0, token)",
      "net.connect('127.0.0.1', 1, nil, token)", "net.connect('127.0.0.1', 1, token)",
      "net.udp(nil, token)", "net.udp(token)", "udp:connect('127.0.0.1', 1, token)",
      "udp:send('x', token)", "udp:send('x', '127.0.0.1:1', token)", "udp:send('x', '127.0.0.1', 1, token)",
      "udp:receive(token)", "dns.resolve('127.0.0.1', nil, token)", "dns.resolve('127.0.0.1', token)",
      "stream:read(token)", "stream:read(nil, token)", "stream:read_exactly(1, token)", "stream:read_line(token)",
      "stream:read_until('x', token)", "stream:read_until('x', nil, token)", "stream:read_all(token)",
      "stream:write('x', token)", "stream:copy_to(client, token)",
      "fs.open(path, token)", "fs.open(path, 'r', token)", "fs.access(path, token)", "fs.mkdir('/x/y', token)",
      "fs.write_file(path, 'x', token)", "fs.write_file(path, 'x', nil, token)",
      "fs.remove(path, token)", "fs.remove(path, nil, token)",
      "file:read(token)", "file:read(1, token)", "file:read_line(token)", "file:read_all(token)",
      "file:seek(token)", "file:seek('set', token)", "file:seek('set', 0, token)", "file:write('x', token)",
      "process.run({ 'no-such-program' }, token)", "process.run({ 'no-such-program' }, 'x', token)",
      "process.run({ 'no-such-program' }, 'x', nil, token)",
      "child:wait(token)", "signal.wait('SIGUSR1', token)",
    } do
      refuses(line)
    end
    assert.is_true(o.child.is_running)
    assert.equal("", flow.fs.read_file(o.path))
    raises("OperationCanceled", call, o, "stream:lines(token)()", Token.canceled)
    raises("OperationCanceled", call, o, "stream:lines(nil, token)()", Token.canceled)
    raises("OperationCanceled", call, o, "file:lines(token)()", Token.canceled)
    os.remove(o.path)
  end))

  it("is opted out of with `none`, in place of what may be left out as well", with_things(function(o)
    local source = flow.CancellationTokenSource()
    local function within(line) return call(o, line, Token.none) end
    local ok, err = pcall(flow.with_cancellation, source.token, function()
      source:cancel()
      local server <close> = within("net.listen('localhost', 0, token)")
      assert.is_truthy(server.port > 0)
      within("fs.write_file(path, 'a line', token)")
      within("fs.open(path, token)"):dispose()
      assert.equal("x", within("process.run({ 'cat' }, 'x', token)"))
      within("udp:connect('127.0.0.1', 1, token)")
      within("net.udp(token)"):close()
      within("fs.remove(path, token)")
      flow.cancellation_token():throw_if_cancellation_requested()
    end)
    assert.is_false(ok)
    helper.is_error("OperationCanceled", err)
  end))
end)

describe("an ambient token that is canceled", function()
  it("counts for what binds an address, too", with_things(function(o)
    local source = flow.CancellationTokenSource()
    pcall(flow.with_cancellation, source.token, function()
      source:cancel()
      for _, line in ipairs { "net.listen('127.0.0.1', 0)", "net.udp()", "udp:connect('127.0.0.1', 1)" } do
        assert.equal(flow.cancellation_token(), raises("OperationCanceled", call, o, line).token)
      end
    end)
  end))
end)

describe("a host with a zero byte", function()
  it("is refused, and nothing looks for the part before it", with_things(function(o)
    for line, n in pairs {
      ["net.listen('127.0.0.1\\0evil', 0)"] = 1,
      ["net.listen_async('127.0.0.1\\0evil', 0)"] = 1,
      ["net.connect('127.0.0.1\\0evil', 1)"] = 1,
      ["net.connect('localhost\\0evil', 1)"] = 1,
      ["net.udp({ host = '127.0.0.1\\0evil' })"] = 1,
      ["udp:connect('127.0.0.1\\0evil', 1)"] = 1,
      ["udp:send('x', '127.0.0.1\\0evil', 1)"] = 2,
      ["udp:send('x', '127.0.0.1\\0evil:1')"] = 2,
    } do
      local message = ("line:1: bad argument #%d to '%s' ("):format(n, line:match("[.:]([%w_]+)"))
      local err = raised(call, o, line)
      assert.equal(message, err:sub(1, #message), err)
    end
  end))
end)

describe("a method that is called with a dot", function()
  -- Each with no argument, and with one that is none of its class.
  local function said(o, object, method)
    for _, given in ipairs { "", "5" } do
      local err = raised(call, o, ("%s.%s(%s)"):format(object, method, given))
      local message = ("line:1: bad argument #1 to '%s' ("):format(method)
      assert.equal(message, tostring(err):sub(1, #message), err)
      local hint = "expected, got %s: use ':' to call a method)"
      local got = given == "" and "no value" or "number"
      assert.truthy(err:find(hint:format(got), 1, true) or given == "" and err:find(hint:format("nil"), 1, true), err)
    end
  end

  it("says so, whatever the class is written in", with_things(function(o)
    o.task, o.channel = flow.spawn(math.abs, 1), flow.Channel.unbounded()
    o.semaphore, o.lock = flow.Semaphore(1), flow.Lock()
    o.source, o.gate, o.loc = flow.CancellationTokenSource(), flow.TaskCompletionSource(), flow.AsyncLocal("x")
    o.token, o.timer, o.periodic = o.source.token, flow.Timer(print, math.huge), flow.PeriodicTimer(1)
    o.event, o.countdown, o.barrier = flow.ManualResetEvent(), flow.CountdownEvent(1), flow.Barrier(1)
    o.condition, o.scheduler = flow.Condition(o.lock), flow.TaskScheduler.limited(1)
    o.app, o.state, o.clock = flow.pipeline.new(), flow.AsyncState(), flow.testing.FakeTimeProvider()
    o.context = o.state:context("x")
    o.breaker, o.watcher = flow.resilience.circuit_breaker(), flow.fs.watch("/tmp")
    for object, methods in pairs {
      task = "cancel wait wait_async results traceback continue_with configure_await start",
      channel = "write read try_read iterate complete write_async", semaphore = "wait release", lock = "lock run",
      source = "cancel cancel_after dispose", gate = "set_result", loc = "set get run with", token = "register wait",
      timer = "change dispose", periodic = "wait_for_next_tick", event = "set wait", countdown = "signal",
      barrier = "signal_and_wait", condition = "wait notify", scheduler = "try_execute_task", app = "use run build",
      state = "initialize context", context = "get set", clock = "advance now", breaker = "execute isolate",
      listener = "accept serve serve_async iterate stop close", stream = "read write lines copy_to",
      items = "map for_each to_table iterate for_each_async", udp = "send receive", file = "read lines",
      child = "wait kill", lazy = "get", cache = "get_or_add invalidate", host = "run add start_async",
      service = "start", queue = "enqueue drain", retry = "execute execute_async", watcher = "next iterate",
    } do
      for method in methods:gmatch("%S+") do said(o, object, method) end
    end
    flow.task_group(function(group)
      o.group = group
      for method in ("spawn cancel stop wait_stopping"):gmatch("%S+") do said(o, "group", method) end
    end)
    o.watcher:dispose()
    o.timer:dispose()
    o.periodic:dispose()
    o.source:dispose()
    o.task:await()
  end))

  it("says so of await, which is a function, too, when it gets nothing", with_things(function(o)
    o.task = flow.spawn(math.abs, 1)
    for _, line in ipairs { "task.await()", "task.try_await()" } do
      assert.matches("got no value: task:await%(%), or flow.await%(task%)", raised(call, o, line))
    end
    assert.matches("Task or awaitable expected, got number%)", raised(call, o, "flow.await(5)"))
    o.task:await()
  end))

  it("does not say so of what is no method, or has its object", with_things(function(o)
    o.task, o.borrowed = flow.spawn(math.abs, 1), setmetatable({}, { __index = o.flow.Channel.unbounded() })
    for _, line in ipairs {
      "flow.Task.from_canceled(5)", "flow.ExecutionContext.run(5, print)", "flow.with_cancellation(5, print)",
      "task:wait('x')", "items:map(5)", "items.map(items, 5)", "queue:enqueue(5)", "flow.sleep('x')",
    } do
      local err = raised(call, o, line)
      assert.equal("string", type(err), line)
      assert.is_nil(err:find("use ':'", 1, true), err)
    end
    o.task:await()
  end))
end)

describe("a function of ours that is given to one of ours", function()
  it("is blamed by its own name, on the line of the user", with_things(function(o)
    o.loc, o.channel, o.semaphore = flow.AsyncLocal("x"), flow.Channel.unbounded(), flow.Semaphore(1)
    for line, name in pairs {
      ["flow.call(flow.sleep, 'x')"] = "#1 to 'coflow.sleep'",
      ["flow.with_timeout(1, flow.sleep, 'x')"] = "#1 to 'coflow.sleep'",
      ["flow.shield(flow.sleep, 'x')"] = "#1 to 'coflow.sleep'",
      ["flow.shield({ grace = 1 }, flow.sleep, -1)"] = "#1 to 'coflow.sleep'",
      ["loc:run(1, flow.sleep, 'x')"] = "#1 to 'coflow.sleep'",
      ["flow.call(flow.await, 5)"] = "#1 to 'coflow.await'",
      ["flow.call(semaphore.wait, semaphore, 'x')"] = "#2 to 'coflow.Semaphore:wait'",
      ["flow.call(channel.write, 5)"] = "#1 to 'coflow.Channel:write'",
      ["flow.call(channel.write, channel)"] = "#2 to 'coflow.Channel:write'",
      ["flow.call(cache.get_or_add, cache, 1)"] = "#3 to 'coflow.AsyncCache:get_or_add'",
      ["flow.call(cache.get_or_add, 1)"] = "#1 to 'coflow.AsyncCache:get_or_add'",
      ["flow.call(items.map, items)"] = "#2 to 'coflow.Stream:map'",
      ["flow.call(items.for_each_async, items)"] = "#2 to 'coflow.Stream:for_each_async'",
      ["flow.call(retry.execute, 5)"] = "#1 to 'coflow.resilience.retry:execute'",
      ["flow.call(flow.net.connect, 5)"] = "#1 to 'coflow.net.connect'",
    } do
      local err = raised(call, o, line)
      local message = "line:1: bad argument " .. name .. " ("
      assert.equal(message, tostring(err):sub(1, #message), err)
    end
  end))

  it("is blamed by its own name where C calls it", with_things(function(o)
    o.channel, o.semaphore, o.spawn = flow.Channel.unbounded(), flow.Semaphore(1), function(...)
      return flow.spawn(...):await()
    end
    o.raised = function(...) error(raised(...), 0) end
    for line, name in pairs {
      ["spawn(channel.write, 1)"] = "#1 to 'coflow.Channel:write'",
      ["spawn(channel.write, channel)"] = "#2 to 'coflow.Channel:write'",
      ["spawn(semaphore.wait, semaphore, 'x')"] = "#2 to 'coflow.Semaphore:wait'",
      ["spawn(cache.get_or_add, cache, 1)"] = "#3 to 'coflow.AsyncCache:get_or_add'",
      ["spawn(cache.get_or_add, 1)"] = "#1 to 'coflow.AsyncCache:get_or_add'",
      ["spawn(items.map, items, 5)"] = "#2 to 'coflow.Stream:map'",
      ["spawn(host.run, host, 5)"] = "#2 to 'coflow.Host:run'",
      ["spawn(retry.execute, retry)"] = "#2 to 'coflow.resilience.retry:execute'",
      ["raised(channel.write, 1)"] = "#1 to 'coflow.Channel:write'",
      ["spawn(flow.sleep, 'x')"] = "#1 to 'coflow.sleep'",
    } do
      local err = raised(call, o, line)
      assert.truthy(err:find("bad argument " .. name .. " (", 1, true), err)
    end
    assert.matches("got number: a method takes its object first%)$", raised(call, o, "spawn(channel.write, 1)"))
    assert.equal("coflow.Channel:write", o.flow.spawn(o.channel.write, o.channel, 1).name)
  end))

  it("is blamed by that of its module, which may be no field of coflow yet", function()
    local select, module = require "coflow.channel".select, rawget(flow, "channel")
    finally(function() rawset(flow, "channel", module) end)
    rawset(flow, "channel", nil)
    assert.matches("#1 to 'coflow%.channel%.select' ", raised(select, 5))
    assert.matches("#1 to 'coflow%.channel%.select' ", raised(flow.call, select, 5))
    assert.matches("#1 to 'string%.rep' ", raised(string.rep))
  end)
end)
