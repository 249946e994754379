--[[
The main example, run as its users run it: a process of its own, judged by its exit code and by what it prints, and,
with --listen, by what it says to a client.

Nothing here depends on how fast the machine is: on a slow one more requests are cut off, and answered with 504.
]]

local flow = require "coflow"

local program = require "spec.support.program"

local root = debug.getinfo(1, "S").source:match("^@(.*)spec/[^/]*$") or ""
local script, data = root .. "examples/service.lua", root .. "examples/data/access.log"
local quote = program.quote

local function service(arguments) return program.run(script, arguments) end

-- The summary as a table: { requests = "3010 over …", strays = "0", … }.
local function summary(output)
  local rows = {}
  for name, value in output:match("\nSummary\n(.*)"):gmatch("  +(%l[%l ]-)  +(%S[^\n]*)") do rows[name] = value end
  return rows
end

-- A file with these lines; it is removed by `finally`.
local function file_of(text)
  local path = os.tmpname()
  finally(function() os.remove(path) end)
  local file <close> = assert(io.open(path, "wb"))
  file:write(text)
  return path
end

local function line(user, request, status, bytes)
  return ('192.0.2.1 - %s [11/Jun/2024:10:00:00 +0200] "%s HTTP/1.1" %s %s\n'):format(user, request, status, bytes)
end

-- How many requests had which answer.
local function answers(rows)
  local counts, total = {}, 0
  for status, n in rows.answers:gmatch("(%d+): (%d+)") do
    counts[status], total = math.tointeger(n), total + n
  end
  return counts, total
end

describe("examples/service.lua", function()
  it("serves the log that comes with it over 200 connections and finds no line astray", function()
    local output, code = service(quote(data))
    assert.equal(0, code, output)
    local rows = summary(output)
    assert.truthy(rows.requests:find("^3010 over 200 connections in "), output)
    assert.truthy(rows.latency:find("^half within [%d.]+ ms, 90%% [%d.]+ ms, 99%% [%d.]+ ms, all [%d.]+ ms$"), output)
    local counts, total = answers(rows)
    assert.equal(3010, total)
    assert.equal(30, counts["400"]) -- three lines in the log are no requests
    assert.is_true(counts["504"] >= 20) -- two ask for more than can be read in the time
    assert.equal("0", rows.mistaken)
    assert.equal("0", rows.strays)
    assert.is_true(rows["log lines"] + 0 >= 2 * 3010)
    assert.truthy(output:find("\nEvery log line carried its own request's id.\n", 1, true), output)
  end)

  it("reads that log by default, from the directory above examples", function()
    if root ~= "" then return pending("the specs run from elsewhere") end
    local output, code = service("")
    assert.equal(0, code, output)
    assert.truthy(summary(output).requests:find("^3010 "), output)
  end)

  it("answers what is none, what is not allowed, and what takes too long", function()
    local huge = line("bob", "GET /huge", 200, 100000000000000)
    local path = file_of(line("-", "GET /admin", 200, 1) .. "nonsense\n" .. huge)
    local output, code = service(quote(path))
    assert.equal(0, code, output)
    assert.same({ ["400"] = 10, ["403"] = 10, ["504"] = 10 }, (answers(summary(output))))
    assert.equal("0", summary(output).strays)
  end)

  describe("with a handler that breaks the flow on purpose", function()
    it("fails, and shows a line that went astray", function()
      local output, code = service("--break-flow " .. quote(file_of(line("bob", "GET /a", 200, 7))))
      assert.equal(1, code, output)
      assert.equal("9", summary(output).strays) -- of ten requests the first is served under its own
      assert.truthy(output:find('The check FAILED: "7 bytes of /a" of r%d+ was logged under r0001.'), output)
      assert.falsy(output:find("Every log line", 1, true), output)
    end)
  end)

  describe("with --listen", function()
    -- Starts it on a free port: program.start's table, with `connect()`.
    local function listening()
      local running = program.start(script, "--listen 0")
      finally(running.finish)
      local first = running.read()
      local port = math.tointeger(first:match("^listening on port (%d+); try: nc 127.0.0.1 %d+$"))
      assert.truthy(port, first)
      function running.connect() return flow.net.connect("127.0.0.1", port) end
      return running
    end

    for _, signal in ipairs { "TERM", "INT" } do
      it("serves real clients, each line under an id of its own, until SIG" .. signal, function()
        local running = listening()
        flow.run(function()
          local idle <close> = running.connect()
          local busy <close> = running.connect()
          busy:write("GET /health\n")
          assert.equal("200 r0001 GET /health", busy:read_line())
          busy:write("hello?\r\n", line("-", "GET /admin", 200, 1))
          assert.equal("400 r0002 - -", busy:read_line())
          assert.equal("403 r0003 GET /admin", busy:read_line())
          idle:write("GET /\27[2J\n")
          assert.equal("200 r0004 GET /\27[2J", idle:read_line())
          for _, expected in ipairs { "GET /health", "0 bytes of /health", "profile of -" } do
            assert.equal("  r0001  " .. expected, running.read())
          end
          running.kill(signal)
          assert.is_nil(idle:read_line()) -- the connections are closed, and not broken
          assert.is_nil(busy:read_line())
        end)
        local rest, code = running.finish()
        assert.equal(0, code, rest)
        assert.truthy(rest:find("\nstopped after 4 requests\n$"), rest)
        assert.falsy(rest:find("\27", 1, true), rest)
      end)
    end

    it("answers what was asked before the signal", function()
      local running = listening()
      flow.run(function()
        local client <close> = running.connect()
        client:write(line("bob", "GET /slow", 200, 100000000))
        assert.equal("  r0001  GET /slow", running.read()) -- so it is at work
        running.kill("TERM")
        assert.truthy(client:read_line():find("^%d+ r0001 GET /slow$"))
        assert.is_nil(client:read_line())
      end)
      local rest, code = running.finish()
      assert.equal(0, code, rest)
      assert.truthy(rest:find("\n  r0001  answered with %d+\nstopped after 1 requests\n$"), rest)
    end)

    it("explains a port that is taken", function()
      local listener <close> = flow.net.listen("127.0.0.1", 0)
      local output, code = service("--listen " .. listener.port)
      assert.equal(2, code, output)
      local expected = "service: listen '127.0.0.1:%d': address already in use (EADDRINUSE)\n"
      assert.equal(expected:format(listener.port), output)
    end)

    it("explains a port that is none", function()
      for _, port in ipairs { "", "x", "-1", "65536", "80.5" } do
        local output, code = service("--listen " .. port)
        assert.equal(2, code, output)
        assert.truthy(output:find("^service: %-%-listen needs a port, 0 to 65535\nusage: "), output)
      end
    end)
  end)

  it("explains an option it does not know, a file that is not there, and one with nothing in it", function()
    local output, code = service("--brake-flow")
    assert.equal(2, code)
    assert.truthy(output:find("^service: unknown option %-%-brake%-flow\nusage: "), output)
    output, code = service("no/such/access.log")
    assert.equal(2, code)
    assert.equal("service: open 'no/such/access.log': no such file or directory (ENOENT)\n", output)
    output, code = service(root == "" and "." or quote(root))
    assert.equal(2, code)
    assert.truthy(output:find("^service: read '.*directory"), output)
    output, code = service("/dev/null") -- a check of nothing proves nothing
    assert.equal(2, code)
    assert.equal("service: /dev/null: nothing to send\n", output)
  end)
end)
