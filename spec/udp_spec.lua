-- spec/udp_spec.lua - UDP on the real clock, loopback and free ports only. The deadline ends a broken run.
-- SPDX-License-Identifier: MIT

local flow = require "coflow"
local helper = require "spec.helper"
local support = require "spec.support.io_support"
local testing = require "coflow.testing"

local net = flow.net
local many = helper.many

local LIMIT = 50 -- seconds

local function in_task(fn)
  return support.in_task(function() flow.with_timeout(LIMIT, fn) end)
end

local function socket(options)
  options = options or {}
  options.host = options.host or "127.0.0.1"
  return net.udp(options)
end

local function has_ipv6()
  local ok, s = pcall(net.udp, { host = "::1" })
  if ok then s:close() end
  return ok
end

describe("net.udp", function()
  it("makes a socket with a free port, which knows its address", in_task(function()
    local s <close> = net.udp()
    assert.is_true(s.port > 0)
    assert.equal("0.0.0.0:" .. s.port, s.local_address)
    assert.is_nil(s.peer_address)
    assert.is_false(s.is_closed)
    assert.equal("coflow.UdpSocket", tostring(s))
    local t <close> = flow.await(net.udp_async { host = "localhost", family = "ipv4", port = 0 })
    assert.equal("127.0.0.1:" .. t.port, t.local_address)
    s:close()
    assert.is_true(s.is_closed)
    assert.is_nil(s.port)
    assert.is_nil(s.local_address)
    assert.equal("coflow.UdpSocket (closed)", tostring(s))
  end))

  it("binds where it is told, if it may", in_task(function()
    local a <close> = socket()
    local err = support.io_error("EADDRINUSE", socket, { port = a.port })
    assert.equal("bind", err.syscall)
    assert.equal(a.local_address, err.path)
    support.io_error("EADDRNOTAVAIL", socket, { host = "192.0.2.1" })
    local b <close> = socket { reuse_port = true }
    local c <close> = socket { reuse_port = true, port = b.port }
    assert.equal(b.port, c.port)
    local d <close> = socket { reuse_address = true }
    local e <close> = socket { reuse_address = true, port = d.port }
    assert.equal(d.port, e.port)
    helper.raises("IO", net.udp, { host = "no-such-host.invalid" })
  end))

  it("refuses wrong arguments", in_task(function()
    local s <close> = socket()
    for _, case in ipairs {
      { net.udp, 1 }, { net.udp, { host = "" } }, { net.udp, { host = 1 } }, { net.udp, { port = 65536 } },
      { net.udp, { port = 1.5 } }, { net.udp, { family = 4 } }, { net.udp, { size = 1 } }, { net.udp, nil, 1 },
      { net.udp_async, { host = 1 } }, { s.send, s }, { s.send, s, {} }, { s.send, s, "x", "h" },
      { s.send, s, "x", "" },
      { s.send, s, "x", "h", 0 }, { s.send, s, "x", "h", 65536 }, { s.send, s, "x", nil, 1 }, { s.send, s, "x", 1, 1 },
      { s.send, s, "x", "h:0" }, { s.send, s, "x", "::1:1" }, { s.send, s, "x", "h", 1, 1 }, { s.send, 1, "x" },
      { s.send_async, s, "x", "h" }, { s.receive, s, 1 }, { s.receive_async, s, 1 }, { s.receive, 1 },
      { s.connect, s, "h" }, { s.connect, s, "", 1 }, { s.connect, s, "h", 0 }, { s.connect_async, s, "h" },
      { s.ttl, s, 0 }, { s.ttl, s, 256 }, { s.multicast_ttl, s, -1 }, { s.join, s, "h" }, { s.iterate, s, 1 },
    } do
      assert.matches("bad argument #%d to", helper.raised(table.unpack(case, 1, 6)))
    end
  end))

  it("works outside every task", function()
    local a, b = socket(), socket()
    a:send("from outside", "127.0.0.1", b.port)
    local data, from = b:receive()
    assert.equal("from outside", data)
    assert.equal(a.local_address, from)
    a:close()
    b:close()
  end)
end)

describe("a datagram", function()
  it("comes whole, with its sender's address, to which one can answer", in_task(function()
    local a <close> = socket()
    local b <close> = socket()
    assert.is_true(a:send("question", "127.0.0.1", b.port))
    local data, from = b:receive()
    assert.equal("question", data)
    assert.equal(a.local_address, from)
    b:send("answer", from)
    assert.same({ "answer", b.local_address }, { a:receive() })
  end))

  it("may be empty, or hold 65,507 bytes, but no more", in_task(function()
    local a <close> = socket()
    local b <close> = socket()
    local big = ("0123456789"):rep(6550) .. "0123456"
    for _, data in ipairs { "", big, "x", big, "" } do
      a:send(data, b.local_address)
      assert.is_true(b:receive() == data)
    end
    local err = support.io_error("EMSGSIZE", a.send, a, big .. "x", b.local_address)
    assert.equal("send", err.syscall)
    assert.equal(b.local_address, err.path)
    a:send("binary\0\r\n\255", b.local_address)
    assert.equal("binary\0\r\n\255", b:receive())
    a:send(12, b.local_address)
    assert.equal("12", b:receive())
  end))

  it("goes to a host by its name", in_task(function()
    local a <close> = socket()
    local b <close> = socket()
    a:send("x", "localhost", b.port)
    assert.equal("x", b:receive())
    assert.is_true(flow.await(a:send_async("y", "localhost", b.port)))
    assert.equal("y", b:receive())
    helper.raises("IO", a.send, a, "x", "no-such-host.invalid", 1)
  end))

  it("goes by IPv6 where there is some, and by IPv4 from the same socket", in_task(function()
    if not has_ipv6() then return end
    local both <close> = net.udp { host = "::" }
    local v4 <close> = socket()
    local v6 <close> = net.udp { host = "::1" }
    v4:send("four", "127.0.0.1", both.port)
    assert.same({ "four", v4.local_address }, { both:receive() })
    v6:send("six", "::1", both.port)
    assert.same({ "six", v6.local_address }, { both:receive() })
    both:send("to four", v4.local_address)
    assert.same({ "to four", "127.0.0.1:" .. both.port }, { v4:receive() })
    both:send("to six", v6.local_address)
    assert.same({ "to six", "[::1]:" .. both.port }, { v6:receive() })
    both:connect("127.0.0.1", v4.port)
    assert.equal(v4.local_address, both.peer_address)
    local only <close> = net.udp { host = "::", ipv6_only = true }
    helper.raises("IO", only.send, only, "x", v4.local_address)
    helper.raises("IO", v4.send, v4, "x", v6.local_address)
    only:ttl(2)
    only:multicast_ttl(2)
    only:multicast_loop(false)
    only:multicast_interface("lo")
    local same = net.udp { family = "ipv6" }
    assert.equal("[::]:" .. same.port, same.local_address)
    same:close()
  end))
end)

describe("receiving", function()
  it("tells and takes link-local addresses with their interface, where there is one", in_task(function()
    local ok, interfaces = pcall(flow.fs.read_file, "/proc/net/if_inet6")
    local digits, name = (ok and interfaces or ""):match("(fe80%x+) %x+ %x+ %x+ %x+ +(%S+)")
    if not digits then return pending("no link-local address here") end
    local here = digits:gsub("%x%x%x%x", "%0:"):sub(1, -2) .. "%" .. name
    local a <close> = net.udp { host = here }
    local b <close> = net.udp { host = here }
    assert.equal("%" .. name .. "]:" .. a.port, a.local_address:match("%%.*"))
    a:send("ping", b.local_address)
    local data, from = b:receive()
    assert.same({ "ping", a.local_address }, { data, from }) -- it used to be without the interface
    b:send("pong", from)
    assert.equal("pong", (a:receive()))
    local listener <close> = net.listen(here, 0)
    local client <close> = net.connect(here, listener.port)
    assert.equal(listener.local_address, client.peer_address)
  end))

  it("is served in the order of asking", in_task(function()
    local a <close> = socket()
    local b <close> = socket()
    local log, note = helper.recorder()
    local tasks = {}
    for i = 1, 3 do tasks[i] = flow.spawn(function() note(i, (b:receive())) end) end
    flow.yield()
    for i = 1, 3 do a:send("d" .. i, b.local_address) end
    flow.await_all(tasks)
    assert.same({ "1 d1", "2 d2", "3 d3" }, log)
  end))

  it("takes from the system only what somebody asks for", in_task(function()
    local a <close> = socket()
    local b <close> = socket()
    for i = 1, 20 do a:send(tostring(i), b.local_address) end
    assert.equal("1", b:receive())
    local tasks = {}
    for i = 2, 20 do tasks[i] = b:receive_async() end
    for i = 2, 20 do assert.equal(tostring(i), (flow.await(tasks[i]))) end
    local last = b:receive_async()
    flow.yield()
    assert.is_false(last.is_completed)
    last:cancel()
    helper.raises("OperationCanceled", flow.await, last)
  end))

  it("leaves what does not fit to the system to drop, and goes on", in_task(function()
    local a <close> = socket()
    local b <close> = socket()
    local n = many(2000, 800)
    for i = 1, n do a:send(("%05d"):format(i) .. ("x"):rep(2000), b.local_address) end
    local got = 0
    while true do -- the kernel delivers on loopback before `send` returns
      local task = b:receive_async()
      if not task.is_completed then
        task:cancel()
        break
      end
      got = got + 1
      assert.equal(("%05d"):format(got), flow.await(task):sub(1, 5))
    end
    assert.is_true(got > 1 and got < n, got)
    a:send("next", b.local_address)
    assert.equal("next", b:receive())
  end))

  it("that is canceled loses no datagram", in_task(function()
    local a <close> = socket()
    local b <close> = socket()
    helper.raises("Timeout", flow.with_timeout, 0.001, b.receive, b)
    local source = flow.CancellationTokenSource()
    local one, two = b:receive_async(source.token), flow.spawn(b.receive, b)
    flow.yield()
    source:cancel()
    two:cancel()
    helper.raises("OperationCanceled", flow.await, one)
    helper.raises("OperationCanceled", flow.await, two)
    a:send("here", b.local_address)
    helper.raises("OperationCanceled", b.receive, b, source.token)
    assert.equal("here", b:receive())
  end))

  it("that is canceled at any moment loses no datagram, and doubles none", in_task(function()
    local a <close> = socket()
    local b <close> = socket()
    local spinning <close> = support.spinning()
    local got, sent = {}, many(300, 60)
    for i = 1, sent do
      local task = flow.spawn(b.receive, b)
      flow.yield()
      if i % 2 == 0 then spinning.wait(i) end
      a:send(tostring(i), b.local_address)
      if i % 3 == 0 then spinning.wait(i) end
      task:cancel()
      local ok, data = flow.try_await(task)
      if ok then got[#got + 1] = data end
    end
    while #got < sent do got[#got + 1] = b:receive() end
    for i = 1, sent do assert.equal(tostring(i), got[i]) end
    local rest = b:receive_async()
    spinning.wait(1)
    assert.is_false(rest.is_completed)
    rest:cancel()
  end))

  it("by a coroutine that somebody has closed takes no datagram", in_task(function()
    local a <close> = socket()
    local b <close> = socket()
    local co
    flow.on_unobserved_exception(false)
    local task = flow.spawn(function()
      co = coroutine.running()
      b:receive()
    end)
    flow.yield()
    coroutine.close(co)
    a:send("for somebody else", b.local_address)
    for _ = 1, 3 do flow.sleep(0.001) end
    assert.equal("for somebody else", b:receive())
    flow.try_await(task)
    flow.on_unobserved_exception(nil)
  end))

  it("iterates until the socket is closed", in_task(function()
    local a <close> = socket()
    local b <close> = socket()
    local log, note = helper.recorder()
    local task = flow.spawn(function()
      for data, from in b:iterate() do note(data, from == a.local_address) end
      note("closed")
    end)
    a:send("one", b.local_address)
    a:send("", b.local_address)
    while #log < 2 do flow.sleep(0.001) end
    b:close()
    flow.await(task)
    assert.same({ "one true", " true", "closed" }, log)
    for _ in b:iterate() do error("closed") end
    local source = flow.CancellationTokenSource()
    source:cancel()
    helper.raises("OperationCanceled", a:iterate(source.token))
  end))

  it("survives finalizers that receive as well", in_task(function()
    local a <close> = socket()
    local b <close> = socket()
    local got, running = {}, true
    local function again()
      setmetatable({}, { __gc = function()
        if not running then return end
        again()
        local task = b:receive_async()
        if task.is_completed then got[#got + 1] = flow.await(task) else task:cancel() end
      end })
    end
    again()
    local n = many(300, 60)
    for i = 1, n do
      a:send(("%04d"):format(i), b.local_address)
      if i % 10 == 0 then
        for _ = 1, 5 do
          local task = b:receive_async()
          if not task.is_completed then task:cancel() break end
          got[#got + 1] = flow.await(task)
        end
        collectgarbage()
      end
    end
    running = false
    while #got < n do got[#got + 1] = b:receive() end
    table.sort(got)
    for i = 1, n do assert.equal(("%04d"):format(i), got[i]) end
  end))
end)

describe("a connected socket", function()
  it("sends to its peer, and hears it alone", in_task(function()
    local a <close> = socket()
    local b <close> = socket()
    local c <close> = socket()
    support.io_error("EDESTADDRREQ", a.send, a, "nobody")
    a:connect("localhost", b.port)
    assert.equal(b.local_address, a.peer_address)
    a:send("to peer")
    assert.equal("to peer", b:receive())
    c:send("from others", a.local_address)
    b:send("from peer", a.local_address)
    assert.equal("from peer", a:receive())
    flow.await(a:connect_async("127.0.0.1", c.port))
    assert.equal(c.local_address, a.peer_address)
    local address = a.local_address
    a:disconnect()
    a:disconnect()
    assert.is_nil(a.peer_address)
    assert.equal(address, a.local_address)
    c:send("from others", "127.0.0.1", a.port)
    assert.equal("from others", a:receive())
  end))

  it("tells that nobody is there, to who receives", in_task(function()
    local a <close> = socket()
    local b = socket()
    a:connect("127.0.0.1", b.port)
    local port = b.port
    b:close()
    local waiting = a:receive_async()
    flow.yield()
    a:send("is anybody there")
    local err = support.io_error("ECONNREFUSED", flow.await, waiting)
    assert.equal("receive", err.syscall)
    local c <close> = socket { port = port }
    waiting = a:receive_async() -- it goes on
    a:send("again")
    c:send("yes", a.local_address)
    assert.equal("again", c:receive())
    assert.equal("yes", (flow.await(waiting)))
  end))

  it("tells that nobody is there, to who sends", in_task(function()
    local a <close> = socket()
    local b = socket()
    a:connect("127.0.0.1", b.port)
    b:close()
    a:send("1")
    support.io_error("ECONNREFUSED", a.send, a, "2")
    a:send("3")
    support.io_error("ECONNREFUSED", a.receive, a)
  end))
end)

describe("closing", function()
  it("ends what waits with an IO error", in_task(function()
    local a <close> = socket()
    local waiting, awaited = flow.spawn(a.receive, a), a:receive_async()
    flow.yield()
    a:close()
    a:close()
    a:dispose()
    support.io_error("ECANCELED", flow.await, waiting)
    support.io_error("ECANCELED", flow.await, awaited)
    helper.raises("ObjectDisposed", a.receive, a)
    helper.raises("ObjectDisposed", flow.await, a:receive_async())
    helper.raises("ObjectDisposed", a.send, a, "x", "127.0.0.1", 9)
    helper.raises("ObjectDisposed", a.connect, a, "127.0.0.1", 9)
    for _, name in ipairs { "broadcast", "multicast_loop" } do helper.raises("ObjectDisposed", a[name], a) end
    helper.raises("ObjectDisposed", a.ttl, a, 1)
  end))

  it("happens when it is forgotten, but not while somebody waits", in_task(function()
    local before = #support.names("/proc/self/fd")
    for _ = 1, 3 do socket():send("x", "127.0.0.1", 9) end
    helper.collect()
    flow.sleep(0.001)
    assert.equal(before, #support.names("/proc/self/fd"))
    local a <close> = socket()
    local address
    local task = flow.spawn(function()
      local s <close> = socket()
      address = s.local_address
      return (s:receive())
    end)
    flow.yield()
    helper.collect()
    a:send("still there", address)
    assert.equal("still there", flow.await(task))
  end))

  it("happens at the end of the state, whoever waits", function()
    assert.equal("waits\n", helper.output [[
      local flow = require "coflow"
      flow.run(function()
        local s = flow.net.udp { host = "127.0.0.1" }
        flow.spawn(s.receive, s)
        s:receive_async()
        flow.yield()
        print "waits"
      end)
    ]])
  end)

  it("does not keep the loop alive when nobody waits", support.in_task(function()
    local a <close> = socket()
    assert.is_false(flow.loop.is_alive())
    local task = a:receive_async()
    assert.is_true(flow.loop.is_alive())
    task:cancel()
    flow.try_await(task)
    assert.is_false(flow.loop.is_alive())
  end))
end)

describe("options", function()
  it("allow broadcasts, once told", in_task(function()
    local a <close> = net.udp()
    support.io_error("EACCES", a.send, a, "x", "255.255.255.255", 9)
    a:broadcast()
    a:broadcast(false)
    support.io_error("EACCES", a.send, a, "x", "255.255.255.255", 9)
    local b <close> = net.udp { broadcast = true }
    local ok, err = pcall(b.send, b, "x", "255.255.255.255", 9)
    assert.is_true(ok or err.code ~= "EACCES") -- there may be no network
  end))

  it("join and leave groups", in_task(function()
    local a <close> = net.udp { reuse_address = true }
    local b <close> = net.udp()
    a:join("239.255.1.2", "lo")
    b:multicast_interface("lo")
    b:multicast_loop()
    b:multicast_ttl(0)
    b:ttl(3)
    b:send("to the group", "239.255.1.2", a.port)
    assert.equal("to the group", a:receive())
    support.io_error("EADDRINUSE", a.join, a, "239.255.1.2", "lo")
    a:leave("239.255.1.2", "lo")
    support.io_error("EADDRNOTAVAIL", a.leave, a, "239.255.1.2", "lo")
    support.io_error("ENODEV", a.join, a, "239.255.1.2", "no-such-interface")
    support.io_error("EINVAL", a.join, a, "127.0.0.1", "lo")
    b:send("to nobody", "239.255.1.2", a.port)
    b:send("to one", "127.0.0.1", a.port)
    assert.equal("to one", a:receive())
  end))
end)

describe("sending", function()
  local swap -- swap(port): the socket with that port becomes one whose buffer is soon full

  setup(function()
    local library = os.tmpname()
    os.remove(library)
    library = library .. ".so"
    assert(os.execute(("%s -std=c11 -D_GNU_SOURCE -shared -fPIC $(sh .ci/find lua-cflags) "
      .. "spec/support/full.c -o %s"):format(os.getenv("CC") or "cc", library)))
    swap = assert(package.loadlib(library, "luaopen_full"))()
    os.remove(library)
  end)

  -- A socket whose buffer is full, and a function that takes the first datagram out of it.
  local function full()
    local s = socket()
    local drain, done = swap(s.port)
    local n = 0
    while true do
      local task = s:send_async("fill")
      flow.yield() -- one that is sent may come to its end a turn later
      if not task.is_completed then
        task:cancel()
        return s, drain, done, n
      end
      flow.await(task)
      n = n + 1
    end
  end

  it("waits while the system's buffer is full, in turn", in_task(function()
    local s <close>, drain, done, n = full()
    assert.is_true(n > 0)
    local log, note = helper.recorder()
    local tasks = {}
    for i = 1, 3 do
      tasks[i] = flow.spawn(function()
        s:send("d" .. i)
        note(i)
      end)
    end
    flow.yield()
    local late = s:send_async("late")
    for _ = 1, n do assert.equal("fill", drain()) end
    flow.await_all(tasks)
    flow.await(late)
    assert.same({ "1", "2", "3" }, log)
    for i = 1, 3 do assert.equal("d" .. i, drain()) end
    assert.equal("late", drain())
    assert.is_nil(drain())
    done()
  end))

  it("that is canceled sends nothing", in_task(function()
    local s <close>, drain, done, n = full()
    local source = flow.CancellationTokenSource()
    local one, two = s:send_async("never", source.token), flow.spawn(s.send, s, "never")
    flow.yield()
    source:cancel()
    two:cancel()
    helper.raises("OperationCanceled", flow.await, one)
    helper.raises("OperationCanceled", flow.await, two)
    helper.raises("OperationCanceled", s.send, s, "never", source.token)
    for _ = 1, n do assert.equal("fill", drain()) end
    s:send("sent", flow.CancellationToken.none)
    assert.equal("sent", drain())
    assert.is_nil(drain())
    done()
  end))

  it("ends with an IO error when another task closes the socket", in_task(function()
    local s <close>, _, done = full()
    local one = flow.spawn(s.send, s, "never")
    flow.yield()
    s:close()
    support.io_error("ECANCELED", flow.await, one)
    done()
  end))
end)

describe("under virtual time", function()
  it("a socket that waits holds the clock back for the threshold only", helper.in_task(function(clock)
    local a <close> = socket()
    local task = a:receive_async()
    flow.sleep(3600)
    assert.equal(3600, clock:now())
    task:cancel()
  end))

  it("a datagram comes before the clock moves", helper.in_task(function(clock)
    local a <close> = socket()
    local b <close> = socket()
    local task = b:receive_async()
    local late = flow.delay(3600)
    a:send("x", b.local_address)
    assert.equal(task, flow.await_any(task, late))
    assert.equal(0, clock:now())
    late:cancel()
  end))

  it("one that is left waiting fails the test", function()
    local err = helper.raises("InvalidOperation", testing.run, function() socket():receive_async() end)
    assert.matches("an open coflow.UdpSocket", err.message)
    helper.collect()
    flow.loop.run()
  end)
end)
