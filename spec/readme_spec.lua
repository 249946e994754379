-- The README and the small examples, run as their readers run them: each in a process of its own.
--
-- In every block of Lua, and in the examples, a comment that begins with `-->` is what is printed: the text
-- after `--> `, a line each, from top to bottom, whether it stands behind code or on a line of its own. In it
-- `...` stands for anything. A program must print exactly that, end with 0 (or the code that is given here) and write
-- nothing to standard error.
--
-- They sleep on the real clock, for times that a reader does not notice. So one that prints something else has two
-- more tries: a machine that has stood still meanwhile may have changed the order.

local helper = require "spec.helper"

local root = debug.getinfo(1, "S").source:match("^@(.*)spec/[^/]*$") or ""

local function read(path)
  local file <close> = assert(io.open(root .. path, "rb"))
  return file:read("a")
end

-- What the comments of a program say that it prints.
local function promised(code)
  local lines = {}
  for line in code:gmatch("[^\n]+") do
    local text = line:match("%-%->%s?(.*)$")
    if text then lines[#lines + 1] = text end
  end
  return table.concat(lines, "\n")
end

-- What it prints. `name` is the file that it believes to be in: tracebacks have it.
local function printed(code, name, exit_code)
  local result = helper.child(("assert(load(%q, %q))()"):format(code, "@" .. name))
  if result.code ~= (exit_code or 0) or result.err ~= "" then
    error(("the program ended with %d: %s%s"):format(result.code, result.out, result.err), 0)
  end
  return (result.out:gsub("\n$", ""))
end

local function check(code, name, exit_code)
  local expected, output = promised(code), nil
  local pattern = expected:gsub("%p", "%%%0"):gsub("%%%.%%%.%%%.", "[^\n]*")
  for _ = 1, 3 do
    output = printed(code, name, exit_code)
    if output:find("^" .. pattern .. "$") then return end
  end
  assert.equal(expected, output)
end

-- The blocks of Markdown in that language: { { heading =, line =, code = }, … }
local function blocks(text, language)
  local found, number, heading, block = {}, 0, "the first screen", nil
  for line in (text .. "\n"):gmatch("(.-)\r?\n") do
    number = number + 1
    local fence = line:match("^```(.*)$")
    if block and fence then
      block.code = table.concat(block, "\n") .. "\n"
      if block.language == language then found[#found + 1] = block end
      block = nil
    elseif fence then
      block = { language = fence, heading = heading, line = number }
    elseif block then
      block[#block + 1] = line
    else
      heading = line:match("^##+ (.+)$") or heading
    end
  end
  assert(not block, "a block of code is not closed")
  return found
end

describe("README.md", function()
  local text = read("README.md")
  local programs = blocks(text, "lua")

  it("has its programs in blocks that this spec finds", function()
    local _, count = text:gsub("\n```lua\n", "")
    assert.equal(count, #programs)
    assert.is_true(count >= 10)
  end)

  local stressed = os.getenv("COFLOW_GC_STRESS") -- which is for the sake of what is in C: some are enough
  for i, block in ipairs(programs) do
    if stressed and i % 4 ~= 0 then goto continue end
    it(("prints what it says it prints: %s, line %d"):format(block.heading, block.line), function()
      assert.not_equal("", promised(block.code)) -- a program that shows nothing teaches nothing
      check(block.code, "example.lua")
    end)
    ::continue::
  end

  it("names only files that are there", function()
    local count = 0
    for path in text:gmatch("[`(]([%w_]+/[%w_/.]+%.%w+)[`)]") do
      read(path)
      count = count + 1
    end
    for name in text:gmatch("`([%l_]+%.[ch])`") do
      read("src/" .. name)
      count = count + 1
    end
    assert.is_true(count >= 15)
  end)

  it("tours functions that are there", function()
    local sources, count = {}, 0
    for name in text:gmatch("`(src/[%l_]+%.c)`") do sources[#sources + 1] = read(name) end
    local code = table.concat(sources)
    for name in text:match("\n## A tour.*"):gmatch("`(%l+_[%l_]+)`") do
      if not read("lua/coflow/init.lua"):find(name, 1, true) then
        assert.truthy(code:find("%f[%w_]" .. name .. "%("), name .. " is not a function of src/")
        count = count + 1
      end
    end
    assert.is_true(count >= 10)
  end)

  it("names only fields that are there", function()
    local flow = require "coflow"
    for path in text:gmatch("%f[%w_]flow%.([%a_][%w_.]*)") do
      local value = flow
      for key in path:gmatch("[%w_]+") do value = value and value[key] end
      assert.is_true(value ~= nil, "flow." .. path .. " does not exist")
    end
  end)
end)

describe("examples", function()
  local exit_codes = { ["crawler.lua"] = 1 } -- it has found dead links
  -- Each of these has a spec of its own, over smaller input.
  local long = os.getenv("COFLOW_GC_STRESS") and { ["pipeline.lua"] = true, ["service.lua"] = true } or {}

  for _, name in ipairs { "hello.lua", "cancel.lua", "locals.lua", "frame_loop.lua", "generator.lua", "middleware.lua",
    "timeout.lua", "group.lua", "host.lua", "pipeline.lua", "crawler.lua", "service.lua" } do
    it("print what they say they print: " .. name, function()
      if long[name] then return end
      local code = read("examples/" .. name)
      assert.not_equal("", promised(code))
      check(code, name, exit_codes[name])
    end)
  end
end)

describe("examples/virtual_time_spec.lua", function()
  it("is a spec that passes", function()
    local output = helper.busted(root .. "examples/virtual_time_spec.lua")
    assert.truthy(output:find("5 successes / 0 failures / 0 errors / 0 pending", 1, true), output)
  end)
end)

describe("this spec", function()
  it("sees a program that prints something else, fails, complains or does not compile", function()
    assert.has_error(function() check("print(1) --> 2\n", "x.lua") end)
    assert.has_error(function() check("print(1) --> 1\nprint(2)\n", "x.lua") end)
    assert.has_error(function() check("print(1) --> 1\nerror('no')\n", "x.lua") end)
    assert.has_error(function() check("io.stderr:write('no')\n", "x.lua") end)
    assert.has_error(function() check("print(1 --> 1\n", "x.lua") end)
    assert.has_error(function() check("print(12, 3) --> 1...4\n", "x.lua") end)
    assert.has_error(function() check("print('a\\nb') --> a...\n", "x.lua") end)
    assert.has_error(function() check("print(1) --> 1\n", "x.lua", 1) end)
    check("print(1) --> 1\nos.exit(1, true)\n", "x.lua", 1)
    check("print(1) --> 1\n--> 2\nprint(2)\n", "x.lua")
    check("print(12, 3) --> 1...3\n", "x.lua")
  end)
end)

describe("coflow.meta", function()
  local path = "lua/coflow/meta.lua"
  local records = { -- tables, without a class
    Error = true, AsyncLocalOptions = true, ValueChanged = true, SelectOptions = true, Stat = true, Change = true,
  }

  -- "Class.name" of all that it declares, static or not; just "name" for what `flow` has itself.
  local function declared()
    local names, class = {}, nil
    for line in read(path):gmatch("[^\n]+") do
      class = line:match("^%-%-%-@class coflow%.(%w+)") or class
      local field = line:match("^%-%-%-@field ([%w_]+)")
      if field and not records[class] then names[class:gsub("Statics$", "") .. "." .. field] = true end
      local owner, name = line:match("^function ([%w_.]+)[.:]([%w_]+)%(")
      if owner then names[(owner .. "."):gsub("^flow%.", "") .. name] = true end
    end
    return names
  end

  it("is valid Lua, and does nothing", function()
    assert.truthy(read(path):find("^%-%-%-@meta\n"))
    assert.has_no_error(assert(loadfile(root .. path)))
  end)

  -- The last names of all functions that have a docstring in a Lua file of the library.
  local function documented()
    local names = {}
    for file in read("rockspec/coflow-scm-1.rockspec"):gmatch('"(lua/[^"]+)"') do
      local before = ""
      for line in read(file):gmatch("[^\n]+") do
        local name = line:match("^%s*local function ([%w_]+)%(") or line:match("^%s*function [%w_.:]-([%w_]+)%(")
          or line:match("^%s*[%w_.]-([%w_]+) = [%w_.]+%(")
          or line:find("^return [%w_.]+%(") and file:match("([%w_]+)%.lua$")
        if name and before:find("^%s*%-%-%-") then names[name] = true end
        before = line
      end
    end
    return names
  end

  it("declares every public function that is not declared where it is written in Lua", function()
    local flow, core = require "coflow", require "coflow.core"
    local names, beside, missing = declared(), documented(), {}
    local function want(name)
      local last = name:match("[%w_]+$")
      if not names[name] and not beside[last] and not beside[last:gsub("_async$", "")] then
        missing[#missing + 1] = name
      end
    end
    assert(flow.call and flow.when_each and flow.with_timeout and flow.main and flow.task_group) -- loads them
    assert(flow.ExecutionContext.run and flow.channel and flow.fs and flow.dns and flow.net.udp and flow.Timer
      and flow.process and flow.stdio)
    for key, value in pairs(flow) do
      if type(value) == "function" and not key:find("^%u") then
        want(key)
      elseif type(value) == "table" then
        for name, field in pairs(value) do
          if type(field) == "function" and not name:find("^[%u_]") then want(key .. "." .. name) end
        end
      end
    end
    for _, class in ipairs { "Task", "TaskCompletionSource", "AsyncLocal", "ExecutionContext", "Scope",
      "CancellationTokenSource", "CancellationToken", "CancellationTokenRegistration", "ChannelReader",
      "ChannelWriter", "Timer", "PeriodicTimer", "File", "Watcher",
      "Stream", "Listener", "Process", "UdpSocket" } do
      for name in pairs(core.methods("coflow." .. class)) do want(class .. "." .. name) end
    end
    table.sort(missing)
    assert.same({}, missing)
  end)

  it("declares only what is there", function()
    local flow, core = require "coflow", require "coflow.core"
    assert(flow.net)
    local source = flow.CancellationTokenSource()
    source:cancel("a reason to be read")
    local scope <close> = flow.AsyncLocal():with(1)
    local channel = flow.Channel.unbounded()
    local file <close> = flow.fs.open("/dev/null")
    local watcher <close> = flow.fs.watch("/")
    local listener <close> = flow.net.listen("127.0.0.1", 0)
    local stream <close> = flow.net.connect("127.0.0.1", listener.port)
    local child <close> = flow.process.spawn { args = { "cat" }, stdin = "pipe", stdout = "pipe", stderr = "pipe" }
    local socket <close> = flow.net.udp()
    socket:connect("127.0.0.1", listener.port)
    local objects = {
      Task = flow.Task.from_exception("an exception to be read"),
      TaskCompletionSource = flow.TaskCompletionSource(),
      AsyncLocal = flow.AsyncLocal { name = "x", default = 1 },
      ExecutionContext = flow.ExecutionContext.capture(),
      Scope = scope,
      CancellationTokenSource = source,
      CancellationToken = source.token,
      CancellationTokenRegistration = flow.CancellationToken.none:register(print),
      Timer = flow.Timer(print, math.huge),
      PeriodicTimer = flow.PeriodicTimer(1),
      Channel = channel,
      ChannelReader = channel.reader,
      ChannelWriter = channel.writer,
      Semaphore = flow.Semaphore(1),
      Key = flow.Lock():lock(),
      Lock = flow.Lock(),
      ReaderWriterLock = flow.ReaderWriterLock(),
      ManualResetEvent = flow.ManualResetEvent(),
      AutoResetEvent = flow.AutoResetEvent(),
      CountdownEvent = flow.CountdownEvent(1),
      Condition = flow.Condition(flow.Lock()),
      Barrier = flow.Barrier(1),
      File = file,
      Watcher = watcher,
      Stream = stream,
      Listener = listener,
      Process = child,
      UdpSocket = socket,
    }
    local function has(object, key)
      local ok, value = pcall(function() return object[key] end)
      return not ok or value ~= nil -- the result of a faulted task raises: it is there
    end
    local wrong, count = {}, 0
    for name in pairs(declared()) do
      local owner, key = name:match("^(%w+)%.(.+)$")
      local known, class = pcall(core.methods, "coflow." .. (owner or ""))
      local there = not owner and flow[name] ~= nil
        or type(flow[owner]) == "table" and has(flow[owner], key) or objects[owner] and has(objects[owner], key)
        or known and class[key] ~= nil
      if not there then wrong[#wrong + 1] = name end
      count = count + 1
    end
    table.sort(wrong)
    assert.same({}, wrong)
    assert.is_true(count > 100)
  end)
end)
