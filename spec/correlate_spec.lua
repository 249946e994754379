--[[
The main example, run as its users run it: a process of its own, judged by its exit code and by what it prints.

Nothing here depends on how fast the machine is. Where a number could (how many requests the time limit cuts off on a
busy machine), the spec checks what must hold at any speed: that the parts add up, that no line is astray.
]]

local interpreter = os.getenv("LUA") or arg and arg[-1] or "lua5.4"
local root = debug.getinfo(1, "S").source:match("^@(.*)spec/[^/]*$") or ""
local script, data = root .. "examples/correlate.lua", root .. "examples/data/access.log"

local function quote(s)
  return "'" .. s:gsub("'", "'\\''") .. "'"
end

-- Runs the example and returns all it printed (both streams) and its exit code. The child finds modules where this
-- process does, whether that was said in the environment or to busted.
local function correlate(arguments, input)
  local command = ("LUA_PATH_5_4=%s LUA_CPATH_5_4=%s %s %s %s 2>&1"):format(
    quote(package.path), quote(package.cpath), interpreter, quote(script), arguments)
  local file
  if input then
    file = os.tmpname()
    local f <close> = assert(io.open(file, "wb"))
    f:write(input)
    command = command .. " < " .. quote(file)
  end
  local pipe = assert(io.popen(command))
  local output = pipe:read("a")
  local _, how, code = pipe:close()
  if file then os.remove(file) end
  assert.equal("exit", how, output)
  return output, code
end

-- The summary as a table: { requests = "298", ok = …, strays = "0", … }.
local function summary(output)
  local rows = {}
  for name, value in output:match("\nSummary\n(.*)"):gmatch("  +(%l[%l ]-)  +(%S[^\n]*)") do rows[name] = value end
  return rows
end

local function line(host, user, request, status, bytes)
  return ('%s - %s [11/Jun/2024:10:00:00 +0200] "%s HTTP/1.1" %s %s\n'):format(host, user, request, status, bytes)
end

local ALICE = line("192.0.2.1", "alice", "GET /a", 200, 100)
local BOB = line("198.51.100.200", "bob", "GET /bob", 200, 200)

describe("examples/correlate.lua", function()
  it("serves the log that comes with it and finds no line astray", function()
    local output, code = correlate(quote(data))
    assert.equal(0, code, output)
    local rows = summary(output)
    assert.equal("298", rows.requests)
    assert.equal("298 of 298", rows["requests heard"])
    assert.equal("3", rows["input skipped"])
    assert.equal("0", rows.strays)
    assert.equal("0", rows["unexpected errors"])
    assert.equal(298, rows.ok + rows.denied + rows.failed + rows["cut off"])
    assert.is_true(rows["log lines checked"] + 0 >= 298)
    for _, number in ipairs { 74, 163, 238 } do
      assert.truthy(output:find(("line %d is not in the Common Log Format"):format(number), 1, true), output)
    end
  end)

  it("reads that log by default, from the directory above examples", function()
    if root ~= "" then return pending("the specs run from elsewhere") end
    local output, code = correlate("")
    assert.equal(0, code, output)
    assert.equal("298", summary(output).requests)
  end)

  it("reads standard input as -", function()
    local output, code = correlate("-", ALICE .. BOB)
    assert.equal(0, code, output)
    local rows = summary(output)
    assert.equal("2", rows.requests)
    assert.equal("2", rows.ok)
    assert.equal("0", rows["input skipped"])
  end)

  it("prints with --all every line that it checks, each under the id of its request", function()
    local output, code = correlate("--all -", ALICE .. BOB)
    assert.equal(0, code, output)
    local printed, steps = 0, {}
    for id, user, step in output:gmatch("ms  (r%d+) +(%S+) +(%S+)") do
      printed = printed + 1
      local who = id .. " " .. user
      if step ~= "load.mirror" then steps[who] = (steps[who] or 0) + 1 end -- the slower one may be as fast
    end
    assert.equal(summary(output)["log lines checked"], tostring(printed))
    assert.same({ ["r0001 alice"] = 6, ["r0002 bob"] = 6 }, steps)
  end)

  it("lets authenticate turn away what the log says was refused", function()
    local output, code = correlate("--all -", ALICE .. line("192.0.2.1", "-", "GET /admin", 403, 99))
    assert.equal(0, code, output)
    assert.equal("1", summary(output).denied)
    assert.truthy(output:find("r0002  -       authenticate  refused (403)", 1, true), output)
  end)

  it("cuts off what takes too long, and only that", function()
    local output, code = correlate("-", ALICE .. line("192.0.2.1", "bob", "GET /huge.iso", 200, 999999999999999))
    assert.equal(0, code, output)
    assert.equal("1", summary(output)["cut off"])
    assert.equal("1", summary(output).ok)
    assert.truthy(output:find("\nCut off after 1.00 s (1)\n  r0002  bob     GET /huge.iso\n", 1, true), output)
  end)

  describe("when a request fails", function()
    -- The report of the one failing request must hold these, in this order.
    local function reports(status, expected)
      local output, code = correlate("-", ALICE .. line("192.0.2.1", "bob", "GET /broken", status, 10))
      assert.equal(0, code, output)
      assert.equal("1", summary(output).failed)
      local report = output:match("\nAll that r0002 logged.-\n(.-)\n\n")
      local from = 1
      for _, text in ipairs(expected) do
        local at = report:find(text, from, true)
        assert.truthy(at, ("%q is missing, or out of order, in:\n%s"):format(text, report))
        from = at
      end
      assert.falsy(report:find("r0001", 1, true), report)
    end

    it("prints the lines that it wrote, the error, and the traceback, innermost frame first", function()
      reports(500, { "r0002  bob     serve", "r0002  bob     load.profile", "cannot render /broken",
        "in task 'r0002'", "in upvalue 'render'", "in upvalue 'load_page'", "in upvalue 'authenticate'" })
    end)

    it("follows the traceback from the part that failed to the request that awaits it", function()
      reports(502, { "r0002  bob     serve", "the profile service answers 502", "in task", "in function 'error'",
        "awaited by task 'r0002'", "in upvalue 'load_page'", "in upvalue 'authenticate'" })
    end)
  end)

  describe("with a handler that breaks the flow on purpose", function()
    it("fails, and says which line went astray", function()
      local output, code = correlate("--break-flow -", ALICE .. BOB)
      assert.equal(1, code, output)
      local stray = "load.profile of r0002 (user bob) was logged under r0001 (user alice)"
      assert.truthy(output:find(stray, 1, true), output)
      assert.equal("1", summary(output).strays)
      assert.truthy(output:find("The check FAILED", 1, true))
    end)

    it("fails on the log that comes with it", function()
      local output, code = correlate("--break-flow " .. quote(data))
      assert.equal(1, code, output)
      assert.is_true(summary(output).strays + 0 > 0)
    end)
  end)

  describe("given bad input", function()
    it("names the lines it cannot read, skips them and goes on", function()
      local bad = ALICE .. "\n" .. "nonsense\n" .. line("192.0.2.1", "eve", "GET /", 200, "-5")
        .. "\27[2J" .. ("x"):rep(5000) .. "\0\n" .. BOB:gsub("\n", "\r\n") .. BOB:sub(1, -20)
      local output, code = correlate("-", bad)
      assert.equal(0, code, output)
      local rows = summary(output)
      assert.equal("2", rows.requests)
      assert.equal("4", rows["input skipped"])
      local numbers = {}
      for number in output:gmatch("line (%d+) is not in the Common Log Format") do numbers[#numbers + 1] = number end
      assert.same({ "3", "4", "5", "7" }, numbers)
      assert.falsy(output:find("\27", 1, true))
    end)

    it("takes odd but correct lines: no size, no request, quotes, a missing final newline", function()
      local output, code = correlate("-", line("2001:db8::1", "-", "HEAD /", 304, "-")
        .. '192.0.2.1 - - [11/Jun/2024:10:00:00 +0200] "-" 408 -\n'
        .. line("192.0.2.1", "-", 'GET /?q=\\"x\\"', 200, 7):sub(1, -2))
      assert.equal(0, code, output)
      assert.equal("3", summary(output).requests)
    end)

    it("says that a file is missing", function()
      local output, code = correlate("no/such/access.log")
      assert.equal(1, code)
      assert.truthy(output:find("^correlate: cannot open no/such/access.log: No such file"), output)
      assert.falsy(output:find("traceback", 1, true))
    end)

    it("says that a directory is no log", function()
      local output, code = correlate(root == "" and "." or quote(root))
      assert.equal(1, code)
      assert.truthy(output:find("^correlate: cannot read .*directory"), output)
    end)

    it("does not pass when there was nothing to check", function()
      local output, code = correlate("-", "nonsense\n")
      assert.equal(1, code)
      assert.truthy(output:find("no request in it", 1, true), output)
    end)

    it("names an option it does not know", function()
      local output, code = correlate("--brake-flow")
      assert.equal(1, code)
      assert.truthy(output:find("unknown option --brake-flow", 1, true), output)
    end)
  end)
end)
