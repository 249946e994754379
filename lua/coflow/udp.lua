-- The part of coflow.net about UDP: names of hosts, sends that wait. The sockets are in C (udp.c).
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local arguments = require "coflow.arguments"

local functions = core.open_udp()

local open, family_of = functions.open, functions.family
local udp_connect, udp_receive, try_send, wait_writable =
  functions.connect, functions.receive, functions.try_send, functions.wait_writable
local UdpSocket = core.methods "coflow.UdpSocket"

local is_integer = arguments.is_integer
local check_token, token_last = arguments.check_token, arguments.token_last
local is_host, check_host, check_port, families, address_of, is_closed_error -- of net.lua

local net = {}

local udp_options = {
  host = true, port = true, family = true, reuse_address = true, reuse_port = true, ipv6_only = true, broadcast = true,
}

local function check_udp(options, token)
  options, token = token_last(options, token)
  options = core.check_options(1, options, udp_options)
  local host, port, family = options.host, options.port, options.family
  if host ~= nil and not is_host(host) then
    core.argument_error(1, "host must be a name or an address")
  elseif port ~= nil and not is_integer(port, 0, 65535) then
    core.argument_error(1, "port must be the number of a port")
  elseif family ~= nil and not families[family] then
    core.argument_error(1, "family must be \"ipv4\", \"ipv6\" or \"any\"")
  end
  check_token(2, token)
  return {
    host = host or (family == "ipv6" and "::" or "0.0.0.0"),
    port = port or 0,
    family = family,
    reuse_address = options.reuse_address,
    reuse_port = options.reuse_port,
    ipv6_only = options.ipv6_only,
    broadcast = options.broadcast,
  }, token
end

local function udp(o, token)
  core.throw_if_canceled(token)
  local address = address_of(o.host, o.family, token)
  local socket = open(address, o.port, o.reuse_address, o.reuse_port, o.ipv6_only)
  if o.broadcast then socket:broadcast() end
  return socket
end

---A UDP socket, bound to an address of this host: by default to all of them, by IPv4, and a free port (`socket.port`).
---With `host = "::"` it speaks IPv6 and, unless `ipv6_only`, IPv4 as well. With a numeric host it never suspends.
---Raises: IO (EADDRINUSE …).
---@param options? { host?: string, port?: integer, family?: "ipv4"|"ipv6"|"any", reuse_address?: boolean,
---  reuse_port?: boolean, ipv6_only?: boolean, broadcast?: boolean }
---@param token? coflow.CancellationToken
---@return coflow.UdpSocket
function net.udp(options, token)
  return udp(check_udp(options, token))
end

local udp_async = core.async(udp)

---@param options? table
---@param token? coflow.CancellationToken
---@return coflow.Task
function net.udp_async(options, token)
  return udp_async(check_udp(options, token))
end

local function send(socket, data, host, port, token)
  local address = host and address_of(host, family_of(socket), token)
  if try_send(socket, data, address, port, token) then return true end
  repeat
    wait_writable(socket, token)
  until try_send(socket, data, address, port, token, true)
  return true
end

-- send(data), (data, "host:port") or (data, host, port), and a token behind it
local function check_send(self, data, host, port, token)
  core.check_class(1, self, "coflow.UdpSocket")
  if type(data) ~= "string" and type(data) ~= "number" then core.argument_error(2, "string expected") end
  port, token = token_last(port, token)
  if port == nil then host, token = token_last(host, token) end
  if host == nil then
    if port ~= nil then core.argument_error(3, "a host expected") end
  else
    check_host(3, host)
    if port == nil then
      local name, number = host:match("^%[(.+)%]:(%d+)$")
      if not name then name, number = host:match("^([^:]+):(%d+)$") end
      port = math.tointeger(tonumber(number))
      if not name or not is_integer(port, 1, 65535) then
        core.argument_error(3, "an address and a port, or \"address:port\", expected")
      end
      host = name
    else
      check_port(4, port, 1)
    end
  end
  check_token(5, token)
  return data, host, port, token
end

---Sends one datagram: to `host` and `port`, to an address as `receive` gives it ("127.0.0.1:53"), or without either to
---the peer of `connect`. Suspends while the system's buffer is full, or to find a host by its name.
---Cancellation: nothing is sent.
---Raises: IO (EMSGSIZE past 65,507 bytes, EDESTADDRREQ without a peer, ENETUNREACH …; ECONNREFUSED of a peer that
---has answered so to an earlier one); ECANCELED if another task closes the socket; ObjectDisposed once it is closed.
---@param data string
---@param host? string
---@param port? integer
---@param token? coflow.CancellationToken
---@return true
function UdpSocket:send(data, host, port, token)
  return send(self, check_send(self, data, host, port, token))
end

local send_async = core.async(send)

---@param data string
---@param host? string
---@param port? integer
---@param token? coflow.CancellationToken
---@return coflow.Task
function UdpSocket:send_async(data, host, port, token)
  return send_async(self, check_send(self, data, host, port, token))
end

local function receive(socket, token)
  local datagram = udp_receive(socket, token)
  return datagram[1], datagram[2]
end

---The next datagram, whole ("" for an empty one), and the address of its sender. Datagrams that nobody asks for wait in
---the system, which drops those that come when its buffer is full. Several tasks may wait: first in, first out.
---Cancellation: no datagram is lost.
---Raises: IO: ECONNREFUSED of a peer that has answered so; ECANCELED if another task closes the socket; ObjectDisposed
---once it is closed.
---@param token? coflow.CancellationToken
---@return string data
---@return string address "127.0.0.1:53", "[::1]:53"
function UdpSocket:receive(token)
  core.check_class(1, self, "coflow.UdpSocket")
  check_token(2, token)
  return receive(self, token)
end

local receive_async = core.async(receive)

---@param token? coflow.CancellationToken
---@return coflow.Task
function UdpSocket:receive_async(token)
  core.check_class(1, self, "coflow.UdpSocket")
  check_token(2, token)
  return receive_async(self, token)
end

---Iterates over the datagrams: `for data, address in socket:iterate() do`; ends when the socket is closed.
---Cancellation: raises; no datagram is lost.
---@param token? coflow.CancellationToken
---@return fun(): string?, string?
function UdpSocket:iterate(token)
  core.check_class(1, self, "coflow.UdpSocket")
  check_token(2, token)
  return function()
    local ok, data, address = core.pcall(receive, self, token)
    if ok then return data, address end
    if not is_closed_error(self, data) then error(data, 0) end
  end
end

local function connect_udp(socket, host, port, token)
  core.throw_if_canceled(token)
  udp_connect(socket, address_of(host, family_of(socket), token), port)
end

local function check_peer(self, host, port, token)
  core.check_class(1, self, "coflow.UdpSocket")
  check_host(2, host)
  check_port(3, port, 1)
  check_token(4, token)
end

---Names the one peer that `send` without an address sends to, and from which alone datagrams are received. Nothing is
---sent. Suspends only to find a host by its name.
---@param host string
---@param port integer
---@param token? coflow.CancellationToken
function UdpSocket:connect(host, port, token)
  check_peer(self, host, port, token)
  connect_udp(self, host, port, token)
end

local connect_udp_async = core.async(connect_udp)

---@param host string
---@param port integer
---@param token? coflow.CancellationToken
---@return coflow.Task
function UdpSocket:connect_async(host, port, token)
  check_peer(self, host, port, token)
  return connect_udp_async(self, host, port, token)
end

---Has no peer any more.
function UdpSocket:disconnect()
  core.check_class(1, self, "coflow.UdpSocket")
  udp_connect(self)
end

---Called by net.lua, with what it shares; returns the functions for coflow.net.
return function(shared)
  is_host, families = shared.is_host, shared.families
  check_host, check_port = shared.check_host, shared.check_port
  address_of, is_closed_error = shared.address_of, shared.is_closed_error
  return net
end
