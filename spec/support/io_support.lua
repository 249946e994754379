-- io_support.lua - what the specs of files and names share: bodies that run on the real clock and leave no
-- descriptor behind, a directory for each, pipes with names.

local assert = require "luassert"
local flow = require "coflow"
local helper = require "spec.helper"

local fs, Source = flow.fs, flow.CancellationTokenSource
local support = {}

-- libuv's loop has one descriptor for all that is watched, and one for the first child, from now on
fs.watch("/"):close()
flow.run(flow.process.run, { "true" })

---How many descriptors this process has open.
function support.descriptors()
  local n = 0
  for _ in fs.scandir("/proc/self/fd") do n = n + 1 end
  return n
end

local function settle()
  flow.loop.run() -- until libuv has let go of what was canceled, too
  collectgarbage()
  collectgarbage()
  flow.loop.run()
end

---A test body: `fn(dir)` as the root task, on the real clock, with a new directory. What it leaves in flight ends
---before the descriptors are counted.
function support.in_task(fn)
  return function()
    local dir = fs.mkdtemp(os.tmpname() .. ".d")
    os.remove((dir:gsub("%.d......$", "")))
    settle()
    local before = support.descriptors()
    local ok, err = pcall(flow.run, fn, dir)
    settle()
    os.execute("rm -rf '" .. dir .. "'")
    if not ok then error(err, 0) end
    assert.equal(before, support.descriptors(), "descriptors are left open")
    assert.is_false(flow.loop.is_alive(), "something is left alive")
  end
end

---Keeps the loop busy until it is closed: libuv is asked after 256 turns, and what has come then lands after those who
---are ready. `wait(n)` of the value waits about that long, for one of many n until just then.
function support.spinning()
  local spinning = { on = true }
  for _ = 1, 3 do
    flow.spawn(function()
      while spinning.on do flow.yield() end
    end)
  end
  function spinning.wait(n)
    for _ = 1, 40 + n % 60 do flow.yield() end
  end
  return setmetatable(spinning, { __close = function() spinning.on = false end })
end

---Until the value is closed, the collector runs whenever an allocation lets it, and with it, the k-th time, the
---finalizer `fn()`: a spec that tries each k has it called at every point where C makes something.
function support.at_collection(k, fn)
  local on, n = true, 0
  local function litter()
    setmetatable({}, { __gc = function()
      if not on then return end
      n = n + 1
      if n == k then fn() else litter() end
    end })
  end
  local mode = collectgarbage("incremental", 1, 1000, 63)
  collectgarbage() -- from now on
  litter()
  return setmetatable({}, { __close = function()
    on = false
    collectgarbage("incremental", 200, 100, 13)
    collectgarbage(mode)
  end })
end

---Cancels `start(token)` at every point of its landing where C makes something: `check(ok, result, round)` is told how
---each ended. Some were canceled, and some were not.
function support.canceled_while_landing(start, check)
  local canceled, rounds = 0, 24
  for k = 1, rounds do
    local source = Source()
    local task = start(source.token, k)
    local ok, result
    do
      local _ <close> = support.at_collection(k, function() source:cancel() end)
      ok, result = task:try_await()
    end
    if not ok and flow.errors.is(result, "OperationCanceled") then canceled = canceled + 1 end
    check(ok, result, k)
  end
  assert.is_true(canceled > 0 and canceled < rounds or os.getenv("COFLOW_GC_STRESS") ~= nil, canceled)
end

---The path of a new pipe in `dir`.
function support.fifo(dir)
  local path = dir .. "/fifo"
  assert(os.execute("mkfifo '" .. path .. "'"))
  return path
end

---Opens both ends of a new pipe: a value that closes them, reader, writer.
function support.pipe(dir)
  local path = support.fifo(dir)
  local reader = fs.open(path)
  local writer = fs.open(path, "w")
  return setmetatable({}, { __close = function()
    reader:close()
    writer:close()
  end }), reader, writer
end

function support.content(path)
  local file <close> = assert(io.open(path, "rb"))
  return file:read("a")
end

function support.put(path, data)
  local file <close> = assert(io.open(path, "wb"))
  file:write(data)
end

---The names in a directory, sorted.
function support.names(dir)
  local names = {}
  for name in fs.scandir(dir) do names[#names + 1] = name end
  table.sort(names)
  return names
end

---Calls fn(...), which must raise Lua's own `bad argument` with `word` in it.
function support.bad_argument(word, fn, ...)
  local err = helper.raised(fn, ...)
  assert.equal("string", type(err), tostring(err))
  assert.truthy(err:find("bad argument", 1, true), err)
  assert.truthy(err:find(word, 1, true), err)
end

---Calls fn(...), which must raise an IO error with that code; returns it.
function support.io_error(code, fn, ...)
  local ok, err = pcall(fn, ...)
  if ok then error(code .. " expected, but nothing was raised", 2) end
  if not flow.errors.is(err, "IO") or err.code ~= code then
    error(("the IO error %s expected, got: %s"):format(code, tostring(err)), 2)
  end
  return err
end

return support
