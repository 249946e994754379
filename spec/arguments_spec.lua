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
