--[[
service.lua - a service under load: requests by the hundred at the same time, and each log line knows whose it is.

A request is a line with a method and a path in it, as each line of an access log has; so is the answer: "200 r0042
GET /health". Run without options it sends itself what is in a log, over 200 connections that are all open at once,
tells how fast that was, and checks that no log line carries another request's id. Then it stops, as a service
should: what was asked is answered, and the exit code is 0.

    lua5.4 examples/service.lua                      (this is `make run`)
    lua5.4 examples/service.lua --listen 8080        and in another terminal: nc 127.0.0.1 8080

SPDX-License-Identifier: MIT
]]

local flow = require "coflow"

local USAGE = [[
usage: lua5.4 examples/service.lua [--break-flow] [path]
       lua5.4 examples/service.lua [--break-flow] --listen PORT
  path           the lines to send (default: examples/data/access.log)
  --listen PORT  serve others on 127.0.0.1 until SIGINT or SIGTERM; 0: a port that is free
  --break-flow   plant a handler that runs under another request's context; the check must then fail
exit code: 0 if every log line carried its own request's id, 1 if not, 2 if it could not start]]

local CLIENTS, ROUNDS = 200, 10 -- connections, and how often they send the log between them
local TIME_LIMIT = 0.5          -- seconds for a request
local BYTES_PER_SECOND = 4e8    -- how fast the storage is: the sizes in the log become waiting times

local function complain(text, ...) io.stderr:write("service: ", text:format(...), "\n") end

-- ---- The log: who is speaking is read from the flow ---------------------------------------------------------

local request_id = flow.AsyncLocal("request_id")
local journal = {}

local function print_line(line) -- requests may hold anything; a terminal should not be sent it
  print(("  %s  %s"):format(line.id, (line.text:gsub("%c", "?"))))
end

local function keep_line(line) journal[#journal + 1] = line end
local write_line = print_line

-- `request` is evidence for the check at the end, not a way to find the id.
local function log(request, text, ...)
  write_line { id = request_id.value, request = request, text = text:format(...) }
end

-- ---- The handlers: none of them is given an id --------------------------------------------------------------

local function read_profile(request)
  flow.sleep(0.001)
  log(request, "profile of %s", request.user)
  return "dear " .. request.user
end

local function read_page(request)
  flow.sleep(request.bytes / BYTES_PER_SECOND)
  log(request, "%d bytes of %s", request.bytes, request.path)
  return request.path:rep(10)
end

-- What only computes holds up everybody, unless it lets the others go first now and then.
local function digest(text)
  local sum = 0
  for i = 1, 1000 do
    sum = (sum * 31 + text:byte(i % #text + 1)) & 0x7fffffff
    if i % 250 == 0 then flow.yield() end
  end
  return sum
end

local function handle(request)
  local profile, page = flow.await_all(flow.spawn(read_profile, request), flow.spawn(read_page, request))
  log(request, "digest %08x", digest(profile .. page))
  return 200
end

-- What --break-flow plants: a handler that keeps its first caller's context and runs everybody else in it, as a
-- connection pool does that is created on behalf of one request and calls back on behalf of all.
local function keep_first_context(handler)
  local first
  return function(...)
    first = first or flow.ExecutionContext.capture()
    return first:run(handler, ...)
  end
end

-- ---- Around the handlers ------------------------------------------------------------------------------------

local app = flow.pipeline.new()

app:use(function(request, next)                  -- the outermost, and the only one to set the id
  request_id.value = request.id
  log(request, "%s %s", request.method, request.path)
  local status = next()
  log(request, "answered with %d", status)
  return status
end)

app:use(function(request, next)                  -- a limit of time, and errors become answers
  local ok, status = flow.pcall(flow.with_timeout, TIME_LIMIT, next)
  if ok then return status end
  log(request, "failed: %s", status)
  return flow.errors.is(status, "Timeout") and 504 or 500
end)

app:use(function(request, next)                  -- not calling next ends the way here
  if request.path == "-" then return 400 end
  if request.path:find("^/admin") and request.user == "-" then return 403 end
  return next()
end)

app:run(handle)
local answer = app:build()

-- ---- The server ---------------------------------------------------------------------------------------------

local count = 0

-- "GET /health" will do; the user and the size are where the Common Log Format has them.
local function parse(line)
  count = count + 1
  local method, path = line:match("(%u+) (/%S*)")
  return {
    id = ("r%04d"):format(count), method = method or "-", path = path or "-",
    user = line:match("^%S+ %S+ (%S+) %[") or "-", bytes = tonumber(line:match(" (%d+)$")) or 0,
  }
end

-- One connection. `stopping` interrupts it between two requests when the listener stops, never within one.
local function converse(stream, stopping)
  while true do
    local ok, line = flow.pcall(stream.read_line, stream, nil, stopping)
    if not ok or not line then return end        -- it is to stop, or nobody is there any more
    local request = parse(line)
    stream:write(("%d %s %s %s\n"):format(answer(request), request.id, request.method, request.path))
  end
end

-- Serves until its host stops it. The shield lets the requests that have come end in peace, within the grace.
local function server(listener)
  return flow.BackgroundService(function(stopping)
    stopping:register(function() listener:stop() end)
    flow.shield(listener.serve, listener, converse, {
      grace = 5,
      on_error = function(err) complain("%s", err) end,
    })
  end)
end

-- ---- The load, the check and the report ---------------------------------------------------------------------

-- Asks for what `next_line` gives, each time as soon as it has the answer, until there is no more.
local function client(port, all_here, next_line, results)
  local stream <close> = flow.net.connect("127.0.0.1", port)
  all_here:signal_and_wait()
  for line in next_line do
    local asked = flow.loop.now()
    stream:write(line, "\n")
    local reply = assert(stream:read_line(), "the service has closed the connection")
    table.insert(results.latencies, flow.loop.now() - asked)
    local status, what = reply:match("^(%d+) r%d+ (.+)$")
    results.answers[status] = (results.answers[status] or 0) + 1
    if what ~= (line:match("%u+ /%S*") or "- -") then results.mistaken = results.mistaken + 1 end
  end
end

local function drive(port, lines)
  local results, sent = { latencies = {}, answers = {}, mistaken = 0 }, 0
  local function next_line()
    sent = sent + 1
    return sent <= ROUNDS * #lines and lines[(sent - 1) % #lines + 1] or nil
  end
  local all_here, started = flow.Barrier(CLIENTS), flow.loop.now()
  flow.task_group(function(group)
    for _ = 1, CLIENTS do group:spawn(client, port, all_here, next_line, results) end
  end)
  results.seconds = flow.loop.now() - started
  return results
end

local function report(results)
  local from, strays, example = #journal // 2, 0, nil
  print(("The log, lines %d to %d"):format(from, from + 5))
  for i, line in ipairs(journal) do
    if i >= from and i < from + 6 then print_line(line) end
    if line.id ~= line.request.id then strays, example = strays + 1, example or line end
  end

  print("\nSummary")
  local function row(name, text, ...) print(("  %-14s %s"):format(name, text:format(...))) end
  local latencies, answers = results.latencies, {}
  table.sort(latencies)
  local function quantile(q) return latencies[math.ceil(q * #latencies)] * 1000 end
  for status, n in pairs(results.answers) do table.insert(answers, ("%s: %d"):format(status, n)) end
  table.sort(answers)
  row("requests", "%d over %d connections in %.2f s, %.0f requests/s", #latencies, CLIENTS, results.seconds,
    #latencies / results.seconds)
  row("latency", "half within %.1f ms, 90%% %.1f ms, 99%% %.1f ms, all %.1f ms", quantile(0.5), quantile(0.9),
    quantile(0.99), quantile(1))
  row("answers", "%s", table.concat(answers, ", "))
  row("mistaken", "%d", results.mistaken)
  row("log lines", "%d", #journal)
  row("strays", "%d", strays)
  if example then
    print(("\nThe check FAILED: %q of %s was logged under %s."):format(example.text, example.request.id, example.id))
  else
    print("\nEvery log line carried its own request's id.")
  end
  return strays == 0 and results.mistaken == 0
end

-- ---- The program --------------------------------------------------------------------------------------------

-- What the command line says: { path =, port =, break_flow = }, or nil.
local function options_of(...)
  local options, words = { path = "examples/data/access.log" }, { ... }
  while words[1] do
    local word = table.remove(words, 1)
    if word == "--break-flow" then
      options.break_flow = true
    elseif word == "--listen" then
      local port = math.tointeger(tonumber(table.remove(words, 1)))
      if not port or port < 0 or port > 65535 then return complain("--listen needs a port, 0 to 65535\n%s", USAGE) end
      options.port = port
    elseif word:find("^%-") then
      return complain("unknown option %s\n%s", word, USAGE)
    else
      options.path = word
    end
  end
  return options
end

local function lines_of(path)
  local ok, text = flow.pcall(flow.fs.read_file, path)
  if not ok then return complain("%s", text.message) end
  local lines = {}
  for line in text:gmatch("[^\r\n]+") do table.insert(lines, line) end
  if #lines == 0 then return complain("%s: nothing to send", path) end
  return lines
end

local function main(...)
  local options = options_of(...)
  local lines = options and (options.port and {} or lines_of(options.path))
  if not lines then return 2 end
  local ok, listener = pcall(flow.net.listen, "127.0.0.1", options.port or 0)
  if not ok then
    complain("%s", listener.message)
    return 2
  end
  if options.break_flow then read_page = keep_first_context(read_page) end

  local host <close> = flow.Host { shutdown_timeout = 10 }
  host:add(server(listener))
  if options.port then
    io.stdout:setvbuf("line")
    print(("listening on port %d; try: nc 127.0.0.1 %d"):format(listener.port, listener.port))
    host:run() -- until a signal comes
    print(("stopped after %d requests"):format(count))
    return 0
  end
  write_line = keep_line
  host:start()
  local results = drive(listener.port, lines)
  host:stop()
  return report(results) and 0 or 1
end

os.exit(flow.main(main, ...), true)

--> The log, lines ... to ...
-->   r...
-->   r...
-->   r...
-->   r...
-->   r...
-->   r...
-->
--> Summary
-->   requests       3010 over 200 connections in ... s, ... requests/s
-->   latency        half within ... ms, 90% ... ms, 99% ... ms, all ... ms
-->   answers        200: ..., 400: 30, 403: 20, 504: ...
-->   mistaken       0
-->   log lines      ...
-->   strays         0
-->
--> Every log line carried its own request's id.
