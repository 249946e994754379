--[[
correlate.lua - every log line knows which request it belongs to, though nobody tells it.

Reads an access log in the Common Log Format and serves each of its lines again, all at once, each in a task of its
own. The request's id and user are put into async locals once, in `serve`. The handlers below it (authenticate, load,
render) take no id, wait, start parts that run side by side, and still log with the right one: what a task sets flows
into whatever it calls and starts, and nowhere else.

Whether that held is not taken on trust. `log` also files what its caller was working on, an ordinary argument that
the flow cannot touch, and `audit` compares the two for every line. The exit code is 0 only if all of them agree.

The idea is in the first half, which ends with `serve`; the second half reads the input, checks and reports.

    lua5.4 examples/correlate.lua [--all] [--break-flow] [path | -]

SPDX-License-Identifier: MIT
]]

local flow = require "coflow"

local USAGE = [[
usage: lua5.4 examples/correlate.lua [--all] [--break-flow] [path | -]
  path          an access log in the Common Log Format; - is standard input (default: examples/data/access.log)
  --all         print every log line as it is written, not only an excerpt
  --break-flow  plant a handler that runs under another request's context; the check must then fail
exit code: 0 if every log line carried its own request's id and user, else 1]]

local BYTES_PER_SECOND = 4e6 -- how fast a mirror sends: the sizes in the log become waiting times

-- ---- The log: who is speaking is read from the flow ---------------------------------------------------------

local request_id = flow.AsyncLocal("request_id")
local user = flow.AsyncLocal("user")

local journal = {} -- every line, in the order written
local started -- when the requests were handed out, on the loop's clock
local show_all = false

local function print_line(line)
  local id, name = line.id or "no id", line.user or "no user"
  print(("  %7.1f ms  %-6s %-7s %-13s %s"):format(line.at * 1000, id, name, line.step, line.text))
end

-- `entry` is evidence for the audit, not a way to find the id: it has none.
local function log(entry, step, text, ...)
  local line = { id = request_id.value, user = user.value, step = step, text = text:format(...) }
  line.entry, line.at = entry, flow.loop.now() - started
  journal[#journal + 1] = line
  if show_all then print_line(line) end
end

-- ---- The handlers, innermost first: none of them is given an id -----------------------------------------------

local function render(entry, page, token)
  flow.sleep(0.002, token)
  if entry.status == 500 then error("cannot render " .. entry.path) end
  log(entry, "render", "%d, %d bytes from %s for %s", entry.status, entry.bytes, page.body, page.profile)
end

-- An async function: calling it starts a task, which inherits the caller's async locals as they are now.
local read_profile = flow.async(function(entry, token)
  flow.sleep(0.003 + #entry.path / 10000, token)
  if entry.status > 500 then error(("the profile service answers %d"):format(entry.status)) end
  log(entry, "load.profile", "%s", entry.user == "-" and "a guest" or "a customer")
  return entry.user == "-" and "a guest" or entry.user
end)

local read_mirror = flow.async(function(entry, mirror, distance, token)
  flow.sleep(distance + entry.bytes / BYTES_PER_SECOND, token)
  log(entry, "load.mirror", "%s has sent %d bytes", mirror, entry.bytes)
  return mirror
end)

-- Two mirrors, and the first to answer wins. The loser is told to stop through a source linked to the caller's token.
local read_nearest = flow.async(function(entry, token)
  local contest <close> = flow.CancellationTokenSource.linked(token)
  local east, west = 0.004, 0.009
  if #entry.host % 2 == 0 then east, west = west, east end
  local winner = flow.await_any(
    read_mirror(entry, "east", east, contest.token),
    read_mirror(entry, "west", west, contest.token))
  contest:cancel("the other mirror was first")
  return winner:await()
end)

local function load_page(entry, token)
  -- Both parts run side by side; the table that comes back has the same keys.
  local page = flow.await(flow.when_all { profile = read_profile(entry, token), body = read_nearest(entry, token) })
  log(entry, "load", entry.status == 404 and "no such page" or "page and profile are here")
  render(entry, page, token)
  return "ok"
end

local function authenticate(entry, token)
  flow.sleep(0.002 + #entry.host / 5000, token)
  if entry.status == 401 or entry.status == 403 then
    log(entry, "authenticate", "refused (%d)", entry.status)
    return "denied"
  end
  log(entry, "authenticate", entry.user == "-" and "anonymous" or "known")
  local outcome = load_page(entry, token)
  log(entry, "authenticate", "session closed") -- many awaits later: the same id
  return outcome
end

-- The body of a request's task, and the only place that sets the async locals. Nothing has to be put back: they
-- belong to this task and end with it. An error faults the task; a cut-off makes it "canceled".
local function serve(entry, id, time_limit)
  request_id.value, user.value = id, entry.user
  local limit <close> = flow.CancellationTokenSource()
  limit:cancel_after(time_limit)
  log(entry, "serve", "%s %s from %s", entry.method, entry.path, entry.host)
  return authenticate(entry, limit.token)
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

-- ---- The input ------------------------------------------------------------------------------------------------

local function complain(message, ...)
  io.stderr:write("correlate: ", message:format(...), "\n")
end

-- host ident user [date] "request" status bytes; what may follow (the Combined format's extras) is ignored.
local COMMON_LOG_FORMAT = '^(%S+) %S+ (%S+) %[[^%]]+%] "(.-)" (%d%d%d) (%S+)'

local function parse(text)
  local host, name, request, status, bytes = text:match(COMMON_LOG_FORMAT)
  if not host or not (bytes == "-" or bytes:find("^%d+$") and #bytes < 16) then return nil end
  local method, path = request:match("^(%S+) (%S+)")
  return {
    host = host, user = name, method = method or "-", path = path or request,
    status = tonumber(status), bytes = tonumber(bytes) or 0,
  }
end

-- The entries of the log at `path`, and how many lines were none; or nil if it cannot be read. Says what is wrong.
local function read_entries(path)
  local file, no_file = io.stdin, nil
  if path ~= "-" then file, no_file = io.open(path, "rb") end
  if not file then return complain("cannot open %s", no_file) end
  local content, no_content = file:read("a")
  if not content then return complain("cannot read %s: %s", path, no_content) end
  local entries, skipped, number = {}, 0, 0
  for text in (content .. "\n"):gmatch("(.-)\r?\n") do
    number = number + 1
    text = text:gsub("%c", "?") -- a log may hold anything; a terminal should not be sent it
    local entry = parse(text)
    if entry then
      entries[#entries + 1] = entry
    elseif text:find("%S") then
      skipped = skipped + 1
      complain("line %d is not in the Common Log Format, skipped: %.60s", number, text)
    end
  end
  return entries, skipped
end

-- ---- The check, and the report --------------------------------------------------------------------------------

-- The lines whose id or user is not that of the request their writer worked on, and how many requests were heard.
-- `ids` was made before any of them ran and entries travel as plain arguments, so no broken flow can make both agree.
local function audit(ids)
  local strays, heard, voices = {}, {}, 0
  for _, line in ipairs(journal) do
    local entry, id = line.entry, ids[line.entry]
    if line.id ~= id or line.user ~= entry.user then
      strays[#strays + 1] = ("%s of %s (user %s) was logged under %s (user %s)"):format(
        line.step, id, entry.user, line.id or "no id", line.user or "none")
    elseif not heard[id] then
      heard[id], voices = true, voices + 1
    end
  end
  return strays, voices
end

local function print_list(title, list)
  if #list == 0 then return end
  print(("\n%s (%d)"):format(title, #list))
  for i = 1, math.min(#list, 12) do print("  " .. list[i]) end
  if #list > 12 then print(("  and %d more"):format(#list - 12)) end
end

local function print_excerpt()
  local from = math.max(1, #journal // 2 - 10)
  local to = math.min(#journal, from + 19)
  print(("\nThe log as it was written, lines %d to %d of %d (--all shows every line)"):format(from, to, #journal))
  for i = from, to do print_line(journal[i]) end
end

-- Looking for one id finds a request's whole story, from whichever tasks it was told.
local function print_failure(task)
  print(("\nAll that %s logged, and the async traceback of its failure"):format(task.name))
  for _, line in ipairs(journal) do
    if line.id == task.name then print_line(line) end
  end
  local report = ("%s\n%s"):format(task.exception, task:traceback())
  print("  " .. report:gsub("\n", "\n  "))
end

-- Serves all entries at once; true if every log line proved to be where it belongs.
local function replay(entries, skipped)
  local tasks, ids = {}, {}
  local time_limit = 1 + #entries / 10000 -- seconds; they share one thread, so more of them are slower
  started = flow.loop.now()
  for i, entry in ipairs(entries) do
    ids[entry] = ("r%04d"):format(i)
    tasks[i] = flow.spawn(serve, entry, ids[entry], time_limit)
    tasks[i].name = ids[entry] -- for tracebacks
  end

  local outcomes = { ok = {}, denied = {}, failed = {}, cut_off = {} }
  local first_failure, unexpected, time_in_requests = math.huge, 0, 0
  for task, i in flow.when_each(tasks) do -- in the order in which they end, however they end
    local entry = entries[i]
    local outcome = task.is_canceled and "cut_off" or task.is_faulted and "failed" or task.result
    table.insert(outcomes[outcome], ("%s  %-7s %s %s"):format(ids[entry], entry.user, entry.method, entry.path))
    time_in_requests = time_in_requests + flow.loop.now() - started
    if task.is_faulted then
      first_failure = math.min(first_failure, i)
      if entry.status < 500 then unexpected = unexpected + 1 end -- an error that the input does not call for
    end
  end
  local elapsed = flow.loop.now() - started
  local strays, voices = audit(ids)

  if not show_all then print_excerpt() end
  if tasks[first_failure] then print_failure(tasks[first_failure]) end
  print_list("Failed", outcomes.failed)
  print_list(("Cut off after %.2f s"):format(time_limit), outcomes.cut_off)
  print_list("Strays: lines that carry another request's id or user", strays)

  print("\nSummary")
  local function row(name, value, ...) print(("  %-18s %s"):format(name, tostring(value):format(...))) end
  row("requests", #entries)
  for _, name in ipairs { "ok", "denied", "failed", "cut_off" } do row("  " .. name:gsub("_", " "), #outcomes[name]) end
  row("input skipped", skipped)
  row("time", "%.2f s for %.1f s of requests, %.0f requests/s", elapsed, time_in_requests, #entries / elapsed)
  row("log lines checked", #journal)
  row("requests heard", "%d of %d", voices, #entries)
  row("strays", #strays)
  row("unexpected errors", unexpected)
  return #strays == 0 and voices == #entries and unexpected == 0
end

local function main(...)
  local path, options = "examples/data/access.log", { ["--all"] = false, ["--break-flow"] = false, ["--help"] = false }
  for _, word in ipairs { ... } do
    if options[word] ~= nil then
      options[word] = true
    elseif word:find("^%-.") then
      complain("unknown option %s\n%s", word, USAGE)
      return 1
    else
      path = word
    end
  end
  if options["--help"] then print(USAGE) return 0 end
  show_all = options["--all"]
  if options["--break-flow"] then read_profile = keep_first_context(read_profile) end

  local entries, skipped = read_entries(path)
  if not entries then return 1 end
  if #entries == 0 then -- a check of nothing proves nothing
    complain("%s: no request in it", path)
    return 1
  end

  print(("%d requests, all at once"):format(#entries))
  local intact = replay(entries, skipped)
  print(intact and "\nEvery log line carried its own request's id and user."
    or "\nThe check FAILED: see the strays and the errors above.")
  return intact and 0 or 1
end

os.exit(flow.main(main, ...), true)
