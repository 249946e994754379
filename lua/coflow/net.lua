-- coflow.net: TCP, pipes and UDP. Streams, listeners and sockets are in C (handle.c, uvstream.c, listener.c, tcp.c,
-- udp.c); here, and for UDP in udp.lua, is what is best said in Lua: names of hosts, iterating, copying, serving.
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local arguments = require "coflow.arguments"
local closing = require "coflow.closing"
local under = require "coflow.under_token"
local resolve = require("coflow.dns").resolve -- now: later there may be no descriptor to read it with
local task_group = require("coflow.group").task_group
require "coflow.scope" -- now as well

local net = core.open_net()

local connect_address, listen_address, listen_pipe = net.connect_address, net.listen_address, net.listen_pipe
local is_address, report_failure, name_after = net.is_address, net.report_failure, core.name_after
local when_closed = net.when_closed
local Stream, Listener = core.methods "coflow.Stream", core.methods "coflow.Listener"

local BACKLOG = 1024
local PAUSE = 0.1 -- seconds, before a listener that has no descriptors left asks again

local is_integer, is_count, is_seconds = arguments.is_integer, arguments.is_count, arguments.is_seconds
local check_token, token_last = arguments.check_token, arguments.token_last

-- Whether it could be the name or the address of a host. The system would end it at a zero byte.
local function is_host(value) return type(value) == "string" and value ~= "" and not value:find("\0", 1, true) end

local function check_host(n, host)
  if is_host(host) then return end
  local expected = "name or address of a host"
  if type(host) ~= "string" then core.type_error(n, expected, host) end
  core.argument_error(n, ("%s expected, got %s"):format(expected,
    host == "" and "an empty string" or "a string with a zero byte"))
end

local function check_port(n, port, least)
  if is_integer(port, least, 65535) then return end
  local expected = ("number of a port, from %d to 65535,"):format(least)
  if type(port) ~= "number" then core.type_error(n, expected, port) end
  core.argument_error(n, ("%s expected, got %s"):format(expected, port))
end

local function check_place(host, port, least)
  check_host(1, host)
  check_port(2, port, least)
end

-- Connecting and listening -------------------------------------------------------------------------

-- The numeric addresses of a host.
local function addresses_of(host, family, token)
  if is_address(host) and (family or "any") == "any" then return { host } end
  return resolve(host, { family = family }, token)
end

-- The first one.
local function address_of(host, family, token)
  return is_address(host) and host or addresses_of(host, family, token)[1]
end

local families = { ipv4 = true, ipv6 = true, any = true }
local connect_options = { family = true }

local function check_connect(host, port, options, token)
  check_place(host, port, 1)
  options, token = token_last(options, token)
  options = core.check_options(3, options, connect_options)
  if options.family ~= nil and not families[options.family] then
    core.argument_error(3, "family must be \"ipv4\", \"ipv6\" or \"any\"")
  end
  check_token(4, token)
  return options.family, token
end

local function connect(host, port, family, token)
  local first
  for _, address in ipairs(addresses_of(host, family, token)) do
    local ok, stream = core.pcall(connect_address, address, port, token)
    if ok then return stream end
    if not core.errors.is(stream, "IO") then error(stream, 0) end
    first = first or stream
  end
  error(first, 0)
end

---Connects to a TCP server. The addresses of a host are tried in the order of the resolver.
---The stream sends small writes at once (`stream:nodelay(false)` for Nagle's algorithm).
---Cancellation: closes the socket.
---Raises: IO: that of the first address, when none answers.
---@param host string a name or a numeric address
---@param port integer
---@param options? { family?: "ipv4"|"ipv6"|"any" }
---@param token? coflow.CancellationToken
---@return coflow.Stream
function net.connect(host, port, options, token)
  return connect(host, port, check_connect(host, port, options, token))
end

local connect_async = core.async(connect)

---@param host string
---@param port integer
---@param options? table
---@param token? coflow.CancellationToken
---@return coflow.Task
function net.connect_async(host, port, options, token)
  return connect_async(host, port, check_connect(host, port, options, token))
end

local listen_options = { backlog = true, reuse_port = true }

local function check_backlog(n, options)
  local backlog = options.backlog
  if backlog ~= nil and not is_integer(backlog, 1, 65535) then
    core.argument_error(n, "backlog must be a number of connections")
  end
  return backlog or BACKLOG
end

local function check_listen(host, port, options, token)
  check_place(host, port, 0)
  options, token = token_last(options, token)
  options = core.check_options(3, options, listen_options)
  local backlog = check_backlog(3, options)
  check_token(4, token)
  return backlog, options.reuse_port, token
end

local function listen(host, port, backlog, reuse_port, token)
  core.throw_if_canceled(token)
  return listen_address(address_of(host, nil, token), port, backlog, reuse_port)
end

---Listens for TCP connections at the first address of the host; port 0: one that is free (`listener.port`). With a
---numeric address it never suspends.
---Cancellation: ends the search for the address of a host; canceled before, it binds nothing.
---@param host string
---@param port integer
---@param options? { backlog?: integer, reuse_port?: boolean } backlog: connections that the system keeps (1024)
---@param token? coflow.CancellationToken
---@return coflow.Listener
function net.listen(host, port, options, token)
  return listen(host, port, check_listen(host, port, options, token))
end

local listen_async = core.async(listen)

---@param host string
---@param port integer
---@param options? table
---@param token? coflow.CancellationToken
---@return coflow.Task
function net.listen_async(host, port, options, token)
  return listen_async(host, port, check_listen(host, port, options, token))
end

---Listens at a path of the file system, which is removed when the listener is closed.
---Raises: IO with code EADDRINUSE if something is there.
---@param path string
---@param options? { backlog?: integer }
---@return coflow.Listener
function net.listen_pipe(path, options)
  if type(path) ~= "string" or path == "" or path:find("\0", 1, true) then
    core.argument_error(1, "a path expected")
  end
  options = core.check_options(2, options, { backlog = true })
  return listen_pipe(path, check_backlog(2, options))
end

net.connect_address, net.connect_address_async, net.listen_address = nil, nil, nil
net.is_address, net.report_failure, net.when_closed = nil, nil, nil

-- Streams ------------------------------------------------------------------------------------------

---Iterates over the lines, without their ends: `for line in stream:lines() do`. What follows the last end is a line.
---Leaving the loop early loses nothing.
---Cancellation: raises at the next line; no byte is lost.
---Raises: IO with code EMSGSIZE at a line of more than `max` bytes (1 MiB by default).
---@param max? integer
---@param token? coflow.CancellationToken
---@return fun(): string?
function Stream:lines(max, token)
  core.check_class(1, self, "coflow.Stream")
  max, token = token_last(max, token)
  if max ~= nil and not is_count(max, 1) then
    core.argument_error(2, "max must be a number of bytes")
  end
  check_token(3, token)
  local read_line = self.read_line
  return function() return read_line(self, max, token) end
end

local function copy(from, to, token)
  local count = 0
  while true do
    local chunk = from:read(nil, token)
    if chunk == nil then return count end
    if token == nil then to:write(chunk) else to:write(chunk, token) end
    count = count + #chunk
  end
end

local function check_copy(self, to, token)
  core.check_class(1, self, "coflow.Stream")
  if (type(to) ~= "table" and type(to) ~= "userdata") or not core.is_callable(to.write) then
    core.argument_error(2, "something to write to expected")
  end
  check_token(3, token)
end

---Writes all that comes, up to the end, to `other`, no faster than it takes it; leaves both open.
---Cancellation: what was read is written or lost; all else is still to be read.
---@param other coflow.Stream or anything else with `write`
---@param token? coflow.CancellationToken
---@return integer bytes
function Stream:copy_to(other, token)
  check_copy(self, other, token)
  return copy(self, other, token)
end

local copy_async = core.async(copy)

---@param other coflow.Stream
---@param token? coflow.CancellationToken
---@return coflow.Task
function Stream:copy_to_async(other, token)
  check_copy(self, other, token)
  return copy_async(self, other, token)
end

-- Listeners ----------------------------------------------------------------------------------------

local function is_closed_error(listener, err)
  return listener.is_closed and (core.errors.is(err, "ObjectDisposed")
    or core.errors.is(err, "IO") and err.code == "ECANCELED")
end

---Iterates over the connections: `for stream in listener:iterate() do`; ends when the listener is closed.
---Cancellation: raises; no connection is lost.
---@param token? coflow.CancellationToken
---@return fun(): coflow.Stream?
function Listener:iterate(token)
  core.check_class(1, self, "coflow.Listener")
  check_token(2, token)
  return function()
    local ok, stream = core.pcall(self.accept, self, token)
    if ok then return stream end
    if not is_closed_error(self, stream) then error(stream, 0) end
  end
end

-- listener -> what its `serve` knows: group, running, stopping (a source, whose token the connections get), and free: a
-- completion source, while it waits for a connection to end
local serving = setmetatable({}, { __mode = "k" })

local leaving = {
  __close = function(guard)
    local state = guard.state
    state.running = state.running - 1
    if state.free then state.free:try_set_result() end
  end,
}

local function talk(fn, stream, stopping)
  local s <close> = stream -- after an error what was not sent is dropped, else it is
  fn(s, stopping)
end

-- An error of on_error itself is told as one that nobody observes.
local function tell(state, err, stream)
  local ok, failure = xpcall(state.on_error, core.trace_handler, err, stream)
  if not ok and not core.errors.is(failure, "OperationCanceled") then report_failure(failure) end
end

local function connection(state, fn, stream)
  local _ <close> = setmetatable({ state = state }, leaving)
  local ok, err = xpcall(talk, core.trace_handler, fn, stream, state.stopping.token)
  if not ok and not core.errors.is(err, "OperationCanceled") then tell(state, err, stream) end
end

-- No connection is begun any more, and those that are may end within the grace. What callbacks of the token raise is
-- returned, as from pcall.
local function wind_down(state, why)
  if state.stopping.is_cancellation_requested then return true end
  local ok, err = pcall(state.stopping.cancel, state.stopping, "the listener is stopping")
  if state.free then state.free:try_set_result() end
  if state.group and (state.grace or 0) > 0 then
    state.group:stop()
  elseif state.group then
    state.group:cancel(why)
  end
  return ok, err
end

local function accept_all(listener, state, group, fn, max)
  local short = false
  while not state.stopping.is_cancellation_requested do
    if state.running >= max then
      state.free = core.TaskCompletionSource()
      state.free.task.name = "the end of a connection"
      core.await(state.free.task)
      state.free = nil
    else
      local ok, stream = core.pcall(listener.accept, listener)
      if ok then
        short = false
        state.running = state.running + 1
        name_after(group:spawn(connection, state, fn, stream), fn)
      elseif is_closed_error(listener, stream) then
        return
      elseif core.errors.is(stream, "IO") then -- the system is short of something: EMFILE, ENFILE, ENOBUFS …
        if not short then tell(state, stream) end -- once, until it is over
        short = true
        core.sleep(PAUSE)
      else
        error(stream, 0)
      end
    end
  end
end

local function serve_all(listener, fn, max, grace, on_error)
  if serving[listener] then
    error(core.errors.InvalidOperation("serve: this listener is served already"), 0)
  end
  local state = { running = 0, stopping = core.call_source(), grace = grace, on_error = on_error }
  serving[listener] = state
  when_closed(listener, function()
    local ok, err = wind_down(state, "the listener was closed")
    if not ok then report_failure(err) end
  end)
  local _ <close> = setmetatable({}, {
    __close = function()
      serving[listener] = nil
      when_closed(listener, nil)
      state.stopping:dispose()
    end,
  })
  task_group(function(group)
    state.group = group
    accept_all(listener, state, group, fn, max)
  end, { policy = "supervise", grace = grace })
end

local function serve(listener, fn, max, grace, on_error, token)
  core.check_here()
  if not core.current_task() then return core.run(serve, listener, fn, max, grace, on_error, token) end
  core.throw_if_canceled(token)
  if not token then return closing(serve_all, listener, fn, max, grace, on_error) end
  closing(under.call, token, function() serve_all(listener, fn, max, grace, on_error) end)
end

local serve_options = { max_connections = true, grace = true, on_error = true }

local function check_serve(self, fn, options, token)
  core.check_class(1, self, "coflow.Listener")
  core.check_function(2, fn)
  options, token = token_last(options, token)
  options = core.check_options(3, options, serve_options)
  local max, grace, on_error = options.max_connections, options.grace, options.on_error
  if max ~= nil and not is_count(max, 1) then
    core.argument_error(3, "max_connections must be a positive integer")
  elseif grace ~= nil and not is_seconds(grace) then
    core.argument_error(3, "grace must be a number of seconds, not negative")
  elseif on_error ~= nil and not core.is_callable(on_error) then
    core.argument_error(3, "on_error must be a function")
  end
  check_token(4, token)
  return max or math.huge, grace, on_error or report_failure, token
end

---Calls `fn(stream, stopping)` in a task of its own for each connection, and closes the stream when it returns.
---`stopping` is a token that `listener:stop()` cancels: `stream:read_line(nil, stopping)` waits for a next request no
---longer than that. Returns when `stop` or `close` has been called and the last connection has ended, for which it has
---`grace` seconds either way. An error in a connection ends that one only: it is told to `on_error(err, stream)`, by
---default to the handler of `on_unobserved_exception`, as is what `on_error` itself raises. So is a want of descriptors
---(`IO` with code EMFILE, without a stream); then connections wait until some are free. One that ends canceled (by a
---token of yours that it reads with) has not failed, and is told to nobody.
---Cancellation: cancels the connections, and raises when they have ended. The listener stays open. Canceled before
---the call: accepts nothing.
---@param fn fun(stream: coflow.Stream, stopping: coflow.CancellationToken)
---@param options? { max_connections?: integer, grace?: number, on_error?: fun(err: any, stream?: coflow.Stream) }
---max_connections: at the same time; the others wait. grace: seconds for the connections to end after `stop`, or
---`close`, before they are canceled; none: at once.
---@param token? coflow.CancellationToken
function Listener:serve(fn, options, token)
  serve(self, fn, check_serve(self, fn, options, token))
end

local serve_async = core.async(serve)

---@param fn fun(stream: coflow.Stream, stopping: coflow.CancellationToken)
---@param options? table
---@param token? coflow.CancellationToken
---@return coflow.Task
function Listener:serve_async(fn, options, token)
  return serve_async(self, fn, check_serve(self, fn, options, token))
end

---Closes the listener and cancels the token that its connections got; those that `serve` has begun may end within its
---`grace`. Returns at once: `serve` returns when they have ended.
---Raises: an Aggregate of the errors of callbacks of that token.
function Listener:stop()
  core.check_class(1, self, "coflow.Listener")
  local state = serving[self]
  if state then when_closed(self, nil) end
  self:close()
  if not state then return end
  local ok, err = wind_down(state, "the listener was stopped")
  if not ok then error(err, 0) end
end

-- UDP: udp.lua, when it is first used ---------------------------------------------------------------

local shared = {
  is_host = is_host, check_host = check_host, check_port = check_port, families = families,
  address_of = address_of, is_closed_error = is_closed_error,
}

return setmetatable(net, {
  __index = function(_, key)
    if key ~= "udp" and key ~= "udp_async" then return nil end
    for name, fn in pairs(core.require "udp"(shared)) do net[name] = fn end
    return rawget(net, key)
  end,
})
