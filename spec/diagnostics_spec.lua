-- coflow.diagnostics: what a program is doing.
-- SPDX-License-Identifier: MIT

local flow = require "coflow"
local diagnostics = require "coflow.diagnostics"
local helper = require "spec.helper"

local in_order, here, recorder = helper.in_order, helper.here, helper.recorder

local function named(name, task)
  task.name = name
  return task
end

local function spawn(name, fn, ...) return named(name, flow.spawn(fn, ...)) end

-- Without the ids, and the places shortened to the names of their files.
local function plain(text)
  return (text:gsub(" %(#%d+%)", ""):gsub("[^%s]*/([%w_]+%.lua)", "%1"))
end

local function lines_of(text)
  local lines = {}
  for line in text:gmatch "[^\n]+" do lines[#lines + 1] = line end
  return lines
end

-- The report's lines that tell of a circle.
local function circles()
  local found = {}
  for _, line in ipairs(lines_of(plain(diagnostics.hang_report()))) do
    if line:find "^circle" then found[#found + 1] = line end
  end
  return found
end

-- Cancels what it was given.
local function canceling(...)
  local tasks = { ... }
  return helper.closing(function()
    for _, task in ipairs(tasks) do task:cancel() end
    for _, task in ipairs(tasks) do task:try_await() end
  end)
end

describe("tasks()", function()
  it("has those that have not ended, whoever started them first", in_order(function()
    local main = flow.current_task()
    local gate = flow.TaskCompletionSource()
    local inner
    local outer = spawn("outer", function()
      inner = flow.spawn(flow.await, gate.task)
      inner:await()
    end)
    local done = flow.spawn(function() end)
    done:await()
    assert.same({ main, outer, inner }, diagnostics.tasks())
    gate:set_result()
    outer:await()
    assert.same({ main }, diagnostics.tasks())
  end))

  it("has those that have not been started, and those that failed no more", in_order(function()
    local cold, failed = flow.Task.new(type, 1), flow.spawn(error, "no")
    failed:try_await()
    local queued = flow.spawn(function() end)
    local seen = {}
    for _, task in ipairs(diagnostics.tasks()) do seen[task] = task.status end
    assert.equal("created", seen[cold])
    assert.equal("waiting_to_run", seen[queued])
    assert.equal("running", seen[flow.current_task()])
    assert.is_nil(seen[failed])
    flow.when_all(cold:start(), queued):await()
  end))

  it("has no operations, which have no function to run", in_order(function()
    local delay = flow.delay(1)
    local all = flow.when_all(delay)
    assert.same({ flow.current_task() }, diagnostics.tasks())
    all:await()
  end))

  it("is empty outside every task", function()
    assert.same({}, diagnostics.tasks())
  end)

  it("keeps no task alive", in_order(function()
    local weak = setmetatable({}, { __mode = "v" })
    do
      local channel = flow.Channel.unbounded()
      flow.on_unobserved_exception(false)
      weak[1] = flow.spawn(function() channel:read() end)
      flow.yield()
      assert.equal(2, #diagnostics.tasks())
      diagnostics.dump()
      diagnostics.hang_report()
    end
    for _ = 1, 3 do
      collectgarbage()
      flow.yield()
    end
    flow.on_unobserved_exception(nil)
    assert.is_nil(weak[1])
    assert.equal(1, #diagnostics.tasks())
  end))

  it("takes ten thousand", in_order(function()
    local gate, n = flow.TaskCompletionSource(), helper.many(10000, 10)
    local tasks = {}
    for i = 1, n do tasks[i] = flow.spawn(flow.await, gate.task) end
    flow.yield()
    assert.equal(n + 1, #diagnostics.tasks())
    assert.equal(n + 2, #lines_of(diagnostics.dump()))
    assert.equal(2, #lines_of(diagnostics.hang_report()))
    gate:set_result()
    flow.when_all(tasks):await()
  end))
end)

describe("dump()", function()
  it("tells where each waits, on what, and for how long, as a tree", in_order(function()
    named("main", flow.current_task())
    local channel, place = flow.Channel.unbounded(), nil
    local parent = spawn("parent", function()
      flow.task_group(function(group)
        named("reader", group:spawn(function() place = here() channel:read() end))
        named("sleeper", group:spawn(function() flow.sleep(3) end))
      end)
    end)
    flow.sleep(2)
    local cold = named("cold", flow.Task.new(type, 1))
    local queued = spawn("queued", function() end)
    local text = plain(diagnostics.dump())
    assert.equal("6 tasks", lines_of(text)[1])
    assert.matches("\n└─ 'main' is running\n", text)
    place = place:gsub("%W", "%%%0")
    assert.matches("   │  ├─ 'reader' waits for coflow.Channel at " .. place .. ", for 2.000 s\n", text)
    assert.matches("   │  └─ 'sleeper' sleeps at diagnostics_spec.lua:%d+, for 2.000 s\n", text)
    assert.matches("─ 'parent' waits for the tasks of its group at diagnostics_spec.lua:%d+, for 2.000 s\n", text)
    assert.matches("─ 'cold' has not been started", text)
    assert.matches("─ 'queued' is to start", text)
    channel:complete()
    flow.when_all(parent, queued, cold:start()):await()
  end))

  it("has the id by which a program can look for it", in_order(function()
    local task = named("me", flow.current_task())
    assert.matches("'me' (#" .. task.id .. ") is running", diagnostics.dump(), 1, true)
  end))

  it("tells of one that is ready that it is", in_order(function()
    local gate = flow.TaskCompletionSource()
    local task = spawn("woken", flow.await, gate.task)
    flow.yield()
    gate:set_result()
    assert.matches("'woken' is ready", plain(diagnostics.dump()))
    task:await()
  end))

  it("has a task that is in a shield where it was started, and what it starts there below it", in_order(function()
    local gate = flow.TaskCompletionSource()
    local task = spawn("outer", function()
      flow.shield(function()
        spawn("inner", flow.await, gate.task):await()
      end)
    end)
    named("main", flow.current_task())
    flow.sleep(1)
    assert.matches("^3 tasks\n└─ 'main' is running\n   └─ 'outer' waits for 'inner' at [^\n]+\n      └─ 'inner' waits",
      plain(diagnostics.dump()))
    gate:set_result()
    task:await()
  end))

  it("takes a tree as deep as tasks may be", in_order(function()
    local depth, gate, reached = helper.many(100000, 15), flow.TaskCompletionSource(), flow.TaskCompletionSource()
    local descend
    descend = flow.async(function(n)
      if n > 0 then return descend(n - 1):await() end
      reached:set_result()
      gate.task:await()
    end)
    local task = descend(depth)
    reached.task:await()
    assert.equal(depth + 2, #diagnostics.tasks())
    assert.equal(depth + 3, #lines_of(diagnostics.dump()))
    gate:set_result()
    task:await()
  end))

  it("is indented as deep as tasks start tasks, within reason", in_order(function()
    local depth, gate = helper.many(1000, 45), flow.TaskCompletionSource()
    local function descend(n)
      if n == 0 then return gate.task:await() end
      return flow.spawn(descend, n - 1):await()
    end
    local task = flow.spawn(descend, depth)
    for _ = 1, depth do flow.yield() end
    local text = diagnostics.dump()
    assert.equal(depth + 3, #lines_of(text))
    assert.is_true(#text < depth * 300)
    gate:set_result()
    task:await()
  end))

  it("says so where there is none", function()
    assert.equal("0 tasks", diagnostics.dump())
  end)
end)

describe("hang_report()", function()
  it("says so where none waits", in_order(function()
    local cold = flow.Task.new(type, 1)
    assert.equal("no task waits", diagnostics.hang_report())
    cold:start():await()
  end))

  it("has one line for those of a name that wait for the same", in_order(function()
    local channel, place = flow.Channel.unbounded(), nil
    local function read()
      place = here() channel:read()
    end
    local tasks = {}
    for i = 1, 5 do tasks[i] = spawn("worker", read) end
    flow.sleep(1)
    assert.equal("5 tasks wait:\n  'worker' and 4 more of that name wait for coflow.Channel at " .. place,
      plain(diagnostics.hang_report()))
    channel:complete()
    flow.when_all(tasks):await()
  end))

  it("has lines of their own for those that wait for another thing", in_order(function()
    local tasks, channels = {}, {}
    local function read(channel) channel:read() end
    for i = 1, 3 do
      channels[i] = flow.Channel.unbounded()
      tasks[i] = spawn("worker", read, channels[i])
    end
    flow.sleep(1)
    assert.equal(4, #lines_of(diagnostics.hang_report()))
    for i = 1, 3 do channels[i]:complete() end
    flow.when_all(tasks):await()
    local gate = flow.TaskCompletionSource()
    local function descend(n)
      if n == 0 then return gate.task:await() end
      return flow.spawn(descend, n - 1):await()
    end
    local task = flow.spawn(descend, 10)
    flow.sleep(1)
    assert.equal(12, #lines_of(diagnostics.hang_report()))
    gate:set_result()
    task:await()
  end))

  it("has none that is ready", in_order(function()
    local gate = flow.TaskCompletionSource()
    local task = spawn("woken", flow.await, gate.task)
    flow.yield()
    gate:set_result()
    assert.equal("no task waits", diagnostics.hang_report())
    task:await()
  end))

  it("tells of a continuation, and of an operation on what it waits for", in_order(function()
    local condition = flow.Semaphore(0)
    local task = spawn("waiter", function() condition:wait_async():await() end)
    local after = named("after", task:continue_with(function() end))
    flow.sleep(1)
    local text = plain(diagnostics.hang_report())
    assert.matches("'waiter' waits for coflow.Semaphore at diagnostics_spec.lua:%d+, for 1.000 s", text)
    assert.matches("'after' is to run after 'waiter'\n", text .. "\n")
    condition:release()
    after:await()
  end))

  it("names who has the lock that is waited for", in_order(function()
    local lock, gate = flow.Lock(), flow.TaskCompletionSource()
    local holder = spawn("holder", function() lock:run(flow.await, gate.task) end)
    local waiter = spawn("waiter", function() lock:run(function() end) end)
    flow.sleep(1)
    local text = plain(diagnostics.hang_report())
    assert.matches("'waiter' waits for coflow.Lock, held by 'holder', at diagnostics_spec.lua", text)
    assert.same({}, circles())
    gate:set_result()
    flow.when_all(holder, waiter):await()
  end))

  it("tells of a lock whose holder has ended without giving it back", in_order(function()
    local lock = flow.Lock()
    local forgetful = spawn("forgetful", function() lock:lock() end)
    forgetful:await()
    local waiter = spawn("waiter", function() lock:lock() end)
    local _ <close> = canceling(waiter)
    flow.sleep(1)
    assert.matches("held by 'forgetful' (which has ended), at", plain(diagnostics.hang_report()), 1, true)
  end))

  it("names all that read", in_order(function()
    local lock, gate = flow.ReaderWriterLock(), flow.TaskCompletionSource()
    local function read()
      local _ <close> = lock:read_lock()
      gate.task:await()
    end
    local a, b = spawn("a", read), spawn("b", read)
    flow.sleep(1)
    local writer = spawn("writer", function()
      local _ <close> = lock:write_lock()
    end)
    flow.sleep(1)
    assert.matches("'writer' waits for coflow.ReaderWriterLock, held by '[ab]' and '[ab]', at",
      plain(diagnostics.hang_report()))
    gate:set_result()
    flow.when_all(a, b, writer):await()
  end))
end)

describe("circles", function()
  -- Takes one lock, then the other, in direct style or by an operation.
  local function taker(async)
    return function(first, second)
      local _ <close> = first:lock()
      flow.yield() flow.yield()
      local _ <close> = async and second:lock_async():await() or second:lock()
    end
  end

  for what, take in pairs { ["two locks"] = taker(false), ["operations on locks"] = taker(true) } do
    it("are found through " .. what, in_order(function()
      local x, y = flow.Lock(), flow.Lock()
      local a, b = spawn("a", take, x, y), spawn("b", take, y, x)
      local _ <close> = canceling(a, b)
      flow.sleep(1)
      assert.same({ "circle: 'a' waits for 'b', which waits for 'a'" }, circles())
    end))
  end

  it("are found through when_all and await_all", helper.in_task(function()
    for _, all in ipairs { function(...) return flow.when_all(...):await() end, flow.await_all } do
      local a, b
      a = spawn("a", function() flow.yield() all(flow.delay(9), b) end)
      b = spawn("b", function() flow.yield() all(flow.delay(9), a) end)
      local _ <close> = canceling(a, b)
      flow.sleep(1)
      assert.equal(1, #circles())
      assert.matches("^circle: '[ab]' waits for '[ab]', which waits for '[ab]'$", circles()[1])
    end
  end))

  it("go by what a when_all waits for yet, not by the results that it has", helper.in_task(function()
    local gate = flow.TaskCompletionSource()
    local waiter
    local function give(value) return function() return value end end
    local pending = spawn("pending", flow.await, gate.task)
    for _, value in ipairs { 1, "x", io.stdout, {}, flow.Lock(), false } do
      waiter = spawn("waiter", function()
        flow.when_all(flow.spawn(give(value)), pending, flow.spawn(function() return waiter end)):await()
      end)
      flow.sleep(1)
      assert.same({}, circles())
      assert.matches("'waiter' waits for 'when_all' of 'pending' at", plain(diagnostics.hang_report()))
    end
    gate:set_result()
    waiter:await()
    flow.sleep(1)
  end))

  it("are found through a task group whose child waits for its owner", helper.in_task(function()
    local lock = flow.Lock()
    local owner = spawn("owner", function()
      local _ <close> = lock:lock()
      flow.task_group(function(group)
        named("child", group:spawn(function()
          local _ <close> = lock:lock()
        end))
      end)
    end)
    local _ <close> = canceling(owner)
    flow.sleep(1)
    assert.same({ "circle: 'owner' waits for 'child', which waits for 'owner'" }, circles())
  end))

  it("are none of groups in groups, whose owners are children", helper.in_task(function()
    local gate = flow.TaskCompletionSource()
    local function nest(n)
      if n == 0 then return gate.task:await() end
      flow.task_group(function(group)
        for _ = 1, 2 do group:spawn(nest, n - 1) end
      end)
    end
    local task = flow.spawn(nest, 4)
    flow.sleep(1)
    assert.same({}, circles())
    assert.matches("waits for the tasks of its group", diagnostics.hang_report())
    gate:set_result()
    task:await()
  end))

  it("are found through a wait with a timeout, which ends some day", in_order(function()
    local a, b
    a = spawn("a", function() flow.yield() b:wait_async(9):await() end)
    b = spawn("b", function() flow.yield() a:wait_async(9):await() end)
    local _ <close> = canceling(a, b)
    flow.sleep(1)
    assert.equal(1, #circles())
  end))

  it("are found each on its own", in_order(function()
    local take, tasks = taker(false), {}
    for i = 1, 3 do
      local x, y = flow.Lock(), flow.Lock()
      tasks[#tasks + 1] = spawn("a" .. i, take, x, y)
      tasks[#tasks + 1] = spawn("b" .. i, take, y, x)
    end
    local _ <close> = canceling(table.unpack(tasks))
    flow.sleep(1)
    assert.equal(3, #circles())
  end))

  it("are found through a continuation, and through the one task that is left of several", helper.in_task(function()
    local ways = {
      function(task) task:continue_with(function() end):await() end,
      function(task) flow.when_all(task:continue_with(function() end)):await() end,
      function(task) flow.when_any(task):await() end,
      function(task) flow.await_any(task) end,
    }
    for _, way in ipairs(ways) do
      local a, b
      a = spawn("a", function() flow.sleep(0.1) way(b) end)
      b = spawn("b", function() flow.sleep(0.1) flow.when_all(a):await() end)
      local _ <close> = canceling(a, b)
      flow.sleep(1)
      assert.equal(1, #circles())
    end
  end))

  it("are one for a knot, of which no more is named than can be read", in_order(function()
    local tasks, n = {}, helper.many(200, 6)
    for i = 1, n do
      tasks[i] = spawn("t" .. i, function()
        flow.yield()
        local others = {}
        for k = 1, n do others[#others + 1] = k ~= i and tasks[k] or nil end
        flow.await_all(others)
      end)
    end
    local _ <close> = canceling(table.unpack(tasks))
    flow.sleep(1)
    assert.equal(1, #circles())
    assert.is_true(#diagnostics.hang_report() < 300 * n)
  end))

  it("are none where one of several is enough", helper.in_task(function()
    for _, any in ipairs { function(...) return flow.when_any(...):await() end, flow.await_any } do
      local a, b
      a = spawn("a", function() flow.yield() any(flow.delay(2), b) end)
      b = spawn("b", function() flow.yield() any(flow.delay(2), a) end)
      flow.sleep(1)
      assert.same({}, circles())
      flow.when_all(a, b):await()
    end
  end))

  it("are none in a long chain", in_order(function()
    local last = flow.TaskCompletionSource().task
    local gate = last
    local source = flow.TaskCompletionSource()
    last = spawn("0", flow.await, source.task)
    for i = 1, helper.many(2000, 10) do last = spawn(tostring(i), flow.await, last) end
    flow.sleep(1)
    assert.same({}, circles())
    source:set_result()
    last:await()
    assert.is_false(gate.is_completed)
  end))

  it("stand in the error of a deadlock as who holds what", function()
    local x, y = flow.Lock(), flow.Lock()
    local function take(first, second)
      local _ <close> = first:lock()
      flow.yield()
      local _ <close> = second:lock()
    end
    flow.on_unobserved_exception(false)
    local err = helper.raised(flow.run, function()
      local a, b = spawn("a", take, x, y), spawn("b", take, y, x)
      flow.when_all(a, b):await()
    end)
    helper.is_error("InvalidOperation", err, "task 'a' waits for coflow.Lock, held by 'b', at",
      "task 'b' waits for coflow.Lock, held by 'a', at")
    for _, task in ipairs(diagnostics.tasks()) do task:cancel() end
    flow.run(flow.yield)
    flow.on_unobserved_exception(nil)
    assert.same({}, diagnostics.tasks())
  end)
end)

-- In processes of their own: each allocation collects all that there is.
describe("a finalizer in the midst of a report", function()
  local function sweep(acts)
    if os.getenv "COFLOW_GC_STRESS" then return end -- each allocation does so there
    assert.equal("done\n", helper.output(([[
      package.path = %q
      local flow = require "coflow"
      local diagnostics = require "coflow.diagnostics"
      local finalizers = require "spec.support.finalizers"
      local ways = { flow.await_all, flow.await_any }
      ways[3] = function(...) flow.when_all(...):await() end
      ways[4] = function(...) flow.when_any(...):await() end
      ways[5] = function(task) task:wait_async():await() end
      ways[6] = function(task) flow.task_group(function(group) group:spawn(flow.await, task) end) end
      for _, way in ipairs(ways) do
        finalizers.sweep(function(at)
          flow.run(function()
            local gate, inner = flow.TaskCompletionSource(), nil
            local x = flow.spawn(flow.await, gate.task)
            x.name = "x"
            local waiter = flow.spawn(way, x)
            flow.yield() flow.yield()
            local outer = at(function() %s end, diagnostics.hang_report)
            assert(outer:find "waits for 'promise'")
            %s
            gate:set_result()
            waiter:try_await()
            x:await()
          end)
        end, 80)
      end
      print "done"
    ]]):format(package.path, table.unpack(acts))))
  end

  it("may end the wait that it is about", function()
    sweep { "waiter:cancel()", "" }
  end)

  it("may make one of its own, and both have all ids", function()
    sweep { "inner = diagnostics.dump()", [[
      assert(not outer:find "'x' [^(]", outer)
      assert(not inner or not inner:find "'x' [^(]", inner)
    ]] }
  end)
end)

describe("on_blocked", function()
  after_each(function() diagnostics.on_blocked(nil) end)

  -- Every step takes longer than no time at all.
  it("tells who kept the loop, and for how long", in_order(function()
    local log = {}
    local task = spawn("busy", function() end)
    diagnostics.on_blocked(0, function(who, seconds) log[#log + 1] = { who, seconds } end)
    task:await()
    flow.sleep(1)
    diagnostics.on_blocked(nil)
    local seen
    for _, entry in ipairs(log) do
      if entry[1] == task then seen = entry[2] end
    end
    assert.is_true(seen > 0)
  end))

  it("tells nothing of those that took less", in_order(function()
    local told = 0
    diagnostics.on_blocked(math.huge, function() told = told + 1 end)
    flow.spawn(function() end):await()
    flow.yield()
    assert.equal(0, told)
  end))

  it("calls it outside every task, where tasks can be started", in_order(function()
    local me, started, refused = flow.current_task(), nil, nil
    diagnostics.on_blocked(0, function()
      diagnostics.on_blocked(nil)
      assert.not_equal(me, flow.current_task())
      refused = helper.raised(flow.sleep, 1)
      started = flow.spawn(function() return "from it" end)
    end)
    flow.sleep(1)
    helper.is_error("InvalidOperation", refused, "inside a callback")
    assert.equal("from it", started:await())
  end))

  it("tells what it raises to the handler of unobserved exceptions", in_order(function()
    local seen
    flow.on_unobserved_exception(function(err, task) seen = { err, task } end)
    diagnostics.on_blocked(0, function()
      diagnostics.on_blocked(nil)
      error("in it", 0)
    end)
    flow.sleep(1)
    flow.on_unobserved_exception(nil)
    assert.same({ "in it" }, seen)
  end))

  it("has one function at a time, and none after nil", in_order(function()
    local log, note = recorder()
    diagnostics.on_blocked(0, function() note("first") end)
    diagnostics.on_blocked(0, function() note("second") end)
    flow.sleep(1)
    diagnostics.on_blocked(nil)
    local n = #log
    assert.is_true(n > 0)
    flow.sleep(1)
    assert.equal(n, #log)
    for _, event in ipairs(log) do assert.equal("second", event) end
  end))

  it("knows those that start hot, and have ended", in_order(function()
    local tasks, told = {}, {}
    diagnostics.on_blocked(0, function(task) told[task] = true end)
    local start = flow.async(function(n) return n end)
    for i = 1, 5 do tasks[i] = named("hot" .. i, start(i)) end
    flow.sleep(1)
    for i = 1, 5 do assert.is_true(told[tasks[i]]) end
  end))

  it("tells of all, however many at a time", in_order(function()
    local told = 0
    diagnostics.on_blocked(0, function() told = told + 1 end)
    local start = flow.async(function() end)
    local n = helper.many(1000, 20)
    for _ = 1, n do start() end
    flow.sleep(1)
    assert.is_true(told >= n)
  end))

  it("tells at once of whom its own function has made late, but not for ever", in_order(function()
    local told, start = 0, flow.async(function() end)
    local done = flow.spawn(function() end)
    diagnostics.on_blocked(0, function()
      told = told + 1
      start()
    end)
    done:await()
    flow.sleep(1)
    diagnostics.on_blocked(nil)
    assert.is_true(told >= 10)
  end))

  it("goes by the limit that there is when it tells", in_order(function()
    local told = false
    diagnostics.on_blocked(0, function() told = true end)
    flow.spawn(function() diagnostics.on_blocked(math.huge, function() told = true end) end):await()
    flow.sleep(1)
    assert.is_false(told)
  end))

  it("refuses what is no limit, and no function", in_order(function()
    local name = "to 'coflow.diagnostics.on_blocked' %("
    for _, limit in ipairs { -1, 0 / 0, "1" } do
      local err = helper.raised(diagnostics.on_blocked, limit, print)
      assert.matches("bad argument #1 " .. name .. "seconds, not negative", err)
    end
    assert.matches("bad argument #2 " .. name .. "function", helper.raised(diagnostics.on_blocked, 1))
  end))
end)

-- Reads JSON as the trace has it: objects, one list, strings, numbers.
local function parse(text)
  local at = 1
  local value
  local function skip() at = text:match("^%s*()", at) end
  local function expect(char)
    skip()
    assert.equal(char, text:sub(at, at), "at " .. at)
    at = at + 1
  end
  local function items(close, read)
    skip()
    if text:sub(at, at) == close then at = at + 1 return end
    repeat
      read()
      skip()
      local char = text:sub(at, at)
      at = at + 1
      assert.is_true(char == "," or char == close, "at " .. at)
    until char == close
  end
  local function string()
    expect '"'
    local result = {}
    while text:sub(at, at) ~= '"' do
      local escape = text:match('^\\u(%x%x%x%x)', at)
      if escape then
        result[#result + 1], at = utf8.char(tonumber(escape, 16)), at + 6
      elseif text:sub(at, at) == "\\" then
        result[#result + 1], at = text:sub(at + 1, at + 1), at + 2
      else
        assert.is_true(text:byte(at) >= 32)
        result[#result + 1], at = text:sub(at, at), at + 1
      end
    end
    at = at + 1
    return table.concat(result)
  end
  function value()
    skip()
    local char, result = text:sub(at, at), {}
    if char == "{" then
      at = at + 1
      items("}", function()
        local key = string()
        expect ":"
        result[key] = value()
      end)
      return result
    elseif char == "[" then
      at = at + 1
      items("]", function() result[#result + 1] = value() end)
      return result
    elseif char == '"' then
      return string()
    end
    local number = text:match("^-?%d+%.?%d*", at)
    at = at + #number
    return tonumber(number)
  end
  local result = value()
  skip()
  assert.equal(#text + 1, at)
  return result
end

local function read_file(path)
  local file <close> = assert(io.open(path))
  return file:read "a"
end

-- A path for a trace, which is removed.
local function trace_path()
  local path = os.tmpname()
  return path, helper.closing(function() os.remove(path) end)
end

-- The events of each task, by its id: "b name", "e name"; and the names of the slices in order.
local function by_task(events)
  local tasks, slices = {}, {}
  for _, event in ipairs(events) do
    if event.ph == "X" then
      slices[#slices + 1] = event.name
      assert.is_true(event.dur >= 0 and event.ts >= 0)
    else
      tasks[event.id] = tasks[event.id] or {}
      table.insert(tasks[event.id], event.ph .. " " .. event.name)
    end
  end
  return tasks, slices
end

describe("a trace", function()
  local function collect() -- in a few steps, which all come into the trace
    for _ = 1, 3 do
      collectgarbage()
      flow.sleep(1)
    end
  end

  it("has the life, the waits and the steps of each task", in_order(function()
    local path, _ <close> = trace_path()
    local trace = diagnostics.trace(path)
    local task = spawn("job", function()
      flow.sleep(1)
      flow.yield()
    end)
    task:await()
    trace:dispose()
    local tasks, slices = by_task(parse(read_file(path)))
    assert.same({ "b job", "b wait", "e wait", "b wait", "e wait", "e job" }, tasks[task.id])
    local steps = 0
    for _, name in ipairs(slices) do
      if name == "job" then steps = steps + 1 end
    end
    assert.equal(3, steps)
  end))

  it("begins with the task that begins it, and those that wait then", in_order(function()
    local path, _ <close> = trace_path()
    local me = named("me", flow.current_task())
    local other = spawn("other", flow.yield)
    flow.yield()
    local trace = diagnostics.trace(path)
    flow.yield() flow.yield()
    trace:dispose()
    local tasks = by_task(parse(read_file(path)))
    assert.equal("b me", tasks[me.id][1])
    assert.same({ "b other", "e other" }, tasks[other.id])
  end))

  it("escapes names", in_order(function()
    local path, _ <close> = trace_path()
    local name = "a \"quoted\" \\ name\n\t\1 – done"
    do
      local _ <close> = diagnostics.trace(path)
      spawn(name, function() end):await()
    end
    local tasks = by_task(parse(read_file(path)))
    local seen = false
    for _, events in pairs(tasks) do seen = seen or events[1] == "b " .. name end
    assert.is_true(seen)
  end))

  it("has no bytes that are no UTF-8", in_order(function()
    local path, _ <close> = trace_path()
    do
      local _ <close> = diagnostics.trace(path)
      spawn("a\xff\xc3b\xe2\x82\u{20ac}\u{1f600}\xf0\x9f", function() end):await()
    end
    local text = read_file(path)
    assert.truthy(utf8.len(text))
    assert.truthy(text:find('"a\\ufffd\\ufffdb\\ufffd\\ufffd€😀\\ufffd\\ufffd"', 1, true))
  end))

  it("is an empty list of a program that does nothing", function()
    local path, _ <close> = trace_path()
    diagnostics.trace(path):dispose()
    assert.same({}, parse(read_file(path)))
  end)

  it("is complete when the state closes, though nobody has it", function()
    local path, _ <close> = trace_path()
    helper.output(([[
      local flow = require "coflow"
      flow.diagnostics.trace(%q)
      collectgarbage() collectgarbage()
      flow.run(function() flow.spawn(flow.yield):await() end)
      flow.spawn(print) -- never
    ]]):format(path))
    local tasks = by_task(parse(read_file(path)))
    local n = 0
    for _, events in pairs(tasks) do
      n = n + 1
      assert.equal("e", events[#events]:sub(1, 1))
    end
    assert.equal(2, n)
  end)

  it("is one at a time, closed once or more often", in_order(function()
    local path, _ <close> = trace_path()
    local trace = diagnostics.trace(path)
    helper.is_error("InvalidOperation", helper.raised(diagnostics.trace, path), path)
    trace:dispose()
    local second = diagnostics.trace(path)
    trace:dispose()
    helper.raises("InvalidOperation", diagnostics.trace, path)
    second:dispose()
    second:dispose()
  end))

  it("tells what is wrong with its path", in_order(function()
    local err = helper.raises("IO", diagnostics.trace, "/nowhere/at/all.json")
    assert.equal("ENOENT", err.code)
    assert.equal("/nowhere/at/all.json", err.path)
    local name = "to 'coflow.diagnostics.trace' %("
    assert.matches("bad argument #1 " .. name .. "string expected", helper.raised(diagnostics.trace, 5))
    assert.matches("bad argument #1 " .. name .. ".*zero", helper.raised(diagnostics.trace, "a\0b"))
    local trace <close> = diagnostics.trace("/dev/null")
    assert.matches("Trace:dispose", helper.raised(trace.dispose))
  end))

  it("survives the end of a task that nobody has, in the hands of a stranger", in_order(function()
    local path, _ <close> = trace_path()
    do
      local _ <close> = diagnostics.trace(path)
      local cos = {}
      flow.spawn(function()
        cos[1] = coroutine.running()
        flow.Channel.unbounded():read()
      end)
      flow.sleep(1)
      flow.on_unobserved_exception(false)
      coroutine.close(table.remove(cos))
      collect()
      flow.on_unobserved_exception(nil)
    end
    assert.is_true(#parse(read_file(path)) > 0)
  end))

  it("has the end of those that end while they wait", in_order(function()
    local path, _ <close> = trace_path()
    local abandoned, strange
    do
      local _ <close> = diagnostics.trace(path)
      strange = flow.spawn(coroutine.yield)
      strange:try_await()
      do
        local channel = flow.Channel.unbounded()
        local task = flow.spawn(function() channel:read() end)
        flow.sleep(1)
        abandoned = task.id
      end
      flow.on_unobserved_exception(false)
      collect()
      flow.on_unobserved_exception(nil)
    end
    local tasks = by_task(parse(read_file(path)))
    for _, id in ipairs { abandoned, strange.id } do
      local open = {}
      for _, event in ipairs(tasks[id]) do
        local phase, name = event:match("^(.) (.*)$")
        if phase == "b" then
          open[#open + 1] = name
        else
          assert.equal(table.remove(open), name)
        end
      end
      assert.same({}, open)
    end
  end))

  it("tells that it could not be written", in_order(function()
    local full = io.open("/dev/full", "w")
    if not full then return end
    full:close()
    local trace = diagnostics.trace("/dev/full")
    flow.yield()
    local err = helper.raises("IO", trace.dispose, trace)
    assert.equal("/dev/full", err.path)
    assert.equal("ENOSPC", err.code)
    assert.equal("write", err.syscall)
    diagnostics.trace("/dev/null"):dispose()
  end))
end)

describe("metrics()", function()
  it("counts what is there", in_order(function()
    local gate = flow.TaskCompletionSource()
    local waiting = flow.spawn(flow.await, gate.task)
    flow.yield()
    local queued, delay = flow.spawn(function() end), flow.delay(1)
    local metrics = diagnostics.metrics()
    assert.equal(3, metrics.tasks)
    assert.equal(1, metrics.waiting)
    assert.equal(1, metrics.ready)
    assert.equal(1, metrics.deadlines)
    assert.equal(0, metrics.requests)
    assert.equal(0, metrics.handles)
    assert.equal(0, metrics.processes)
    assert.is_true(metrics.memory > 0 and math.type(metrics.memory) == "integer")
    gate:set_result()
    flow.when_all(waiting, queued, delay):await()
  end))

  it("can be asked for in a finalizer, and while the state closes", function()
    assert.equal("1 0\n1 0\n", helper.output [[
      local flow = require "coflow"
      local function show()
        local metrics = flow.diagnostics.metrics()
        print(metrics.tasks, metrics.ready)
      end
      local function finalized() return setmetatable({}, { __gc = show }) end
      flow.run(function()
        finalized()
        collectgarbage()
      end)
      local channel = flow.Channel.unbounded()
      flow.loop.run("nowait", flow.spawn(function()
        local _ <close> = setmetatable({}, { __close = show })
        channel:read()
      end))
    ]]:gsub("\t", " "))
  end)

  it("counts tasks and steps", in_order(function()
    local before = diagnostics.metrics()
    local tasks = {}
    for i = 1, 10 do
      tasks[i] = flow.spawn(function() flow.yield() flow.yield() end)
    end
    flow.when_all(tasks):await()
    local after = diagnostics.metrics()
    assert.equal(10, after.started - before.started)
    assert.equal(31, after.steps - before.steps) -- and one of this task
    assert.is_true(after.busy > before.busy)
    assert.is_true(after.elapsed > before.elapsed)
    assert.is_true(after.utilization >= 0 and after.utilization <= 1)
  end))
end)
