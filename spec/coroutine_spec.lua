-- flow.coroutine. First what it has in common with Lua's own: the same programs, run with either library, inside
-- a task and outside, must tell the same. Then what is more: awaits that pass through, contexts, refusals.

local flow = require "coflow"
local helper = require "spec.helper"

local co = flow.coroutine
local in_task, recorder, closing = helper.in_task, helper.recorder, helper.closing
local raised, is_error, raises, here = helper.raised, helper.is_error, helper.raises, helper.here
local collect, many = helper.collect, helper.many

-- A generator of 1 … n that suspends the task before each.
local function counter(n, lib)
  lib = lib or co
  return lib.wrap(function()
    for i = 1, n do
      flow.sleep(0.1)
      lib.yield(i)
    end
  end)
end

-- The same through `depth` more generators, each of which suspends the task as well.
local function nested(depth, n)
  if depth == 0 then return counter(n) end
  return co.wrap(function()
    for i in nested(depth - 1, n) do
      flow.yield()
      co.yield(i)
    end
  end)
end

local function list(iterator, ...)
  local found = {}
  for value in iterator, ... do found[#found + 1] = value end
  return found
end

-- Programs ----------------------------------------------------------------------------------------
--
-- Each gets a library and a function that notes an event.

local programs = {}

programs["pass values in and out"] = function(lib, note)
  local c = lib.create(function(...)
    note("start", select("#", ...), ...)
    note("first", lib.yield(1, nil, 3, nil))
    note("second", lib.yield())
    return "the", "end", nil
  end)
  note(lib.resume(c, "a", nil))
  note(lib.resume(c, "b", nil, "c"))
  note(lib.resume(c))
  note(lib.resume(c))
  local w = lib.wrap(function(a) while a do a = lib.yield(a * 2) end return "done" end)
  note(w(1)) note(w(2)) note(w()) note(pcall(w))
end

programs["tell their status"] = function(lib, note)
  local outer, inner
  inner = lib.create(function()
    note(lib.status(inner), lib.status(outer))
    note(lib.resume(outer))
    note(lib.resume(inner))
    lib.yield()
  end)
  outer = lib.create(function()
    note(lib.resume(inner))
    note(lib.status(inner), lib.status(outer))
    lib.yield()
    error("gone")
  end)
  note(lib.status(outer), lib.status(inner))
  note(lib.resume(outer))
  note(lib.status(outer), lib.status(inner))
  note(lib.resume(outer))
  note(lib.status(outer), lib.resume(outer))
  note(lib.resume(inner))
  note(lib.status(inner), lib.resume(inner))
  local self
  self = lib.wrap(function() return pcall(self) end)
  note(self())
end

programs["raise their errors as they are"] = function(lib, note)
  local object = setmetatable({}, { __tostring = function() return "object" end })
  for _, value in ipairs { "text", 42, object, false, 4.5 } do
    local ok, err = lib.resume(lib.create(function() error(value) end))
    note(ok, rawequal(err, value), err)
    ok, err = pcall(lib.wrap(function() lib.yield() end))
    note(ok, err)
    ok, err = pcall(lib.wrap(function() error(value) end))
    note(ok, rawequal(err, value), err)
    ok, err = pcall(lib.wrap(function() error(value, 0) end))
    note(ok, err)
    ok, err = pcall(lib.wrap(function() error(value, 2) end))
    note(ok, err)
  end
  note(lib.resume(lib.create(function() error() end)))
  note(pcall(lib.wrap(function() error(nil) end)))
  local function deep(n)
    return lib.wrap(function() if n == 0 then error("deep") end deep(n - 1)() end)
  end
  note(pcall(deep(3)))
  note(pcall(function() local w = deep(1) w() end))
  note(pcall(lib.wrap(function() local x = nil; return x.field end)))
  note(pcall(string.rep, lib.wrap(function() end)))
end

programs["close their variables when wrapped and failed, not when resumed"] = function(lib, note)
  local function body(name, raising)
    return function()
      local _ <close> = closing(function(err) note(name, "a", err) end)
      local _ <close> = closing(function(err)
        note(name, "b", err, lib.isyieldable(), pcall(lib.yield, 1))
        note(pcall(lib.wrap(function() lib.yield(lib.isyieldable()) end)))
        if raising then error(raising, 0) end
      end)
      lib.yield(name)
      error(name .. " failed", 0)
    end
  end
  local w = lib.wrap(body("wrapped"))
  note(w()) note(pcall(w)) note(pcall(w))
  w = lib.wrap(body("replaced", "another"))
  note(w()) note(pcall(w)) note(pcall(w))
  w = lib.wrap(body("nil", false))
  note(w()) note(pcall(w))
  local c = lib.create(body("resumed"))
  note(lib.resume(c)) note(lib.resume(c)) note(lib.status(c))
  note(lib.close(c)) note(lib.close(c)) note(lib.status(c))
  c = lib.create(body("resumed and replaced", "another"))
  note(lib.resume(c)) note(lib.resume(c)) note(lib.close(c)) note(lib.close(c))
end

programs["are closed"] = function(lib, note)
  local c = lib.create(print)
  note(lib.close(c), lib.status(c)) note(lib.resume(c))
  c = lib.create(function() end)
  lib.resume(c)
  note(lib.close(c))
  c = lib.create(function()
    local _ <close> = closing(function(err)
      note("closed", err, lib.status(c), lib.running() == c)
      note(pcall(lib.yield, 1))
    end)
    local _ <close> = closing(function() error("raised", 0) end)
    local _ <close> = closing(function(err) note("first", err) error("lost", 0) end)
    lib.yield()
  end)
  lib.resume(c)
  note(lib.close(c))
  note(lib.close(c), lib.status(c))
  c = lib.create(function() return pcall(lib.close, c) end)
  note(lib.resume(c))
  local outer
  outer = lib.create(function()
    return lib.resume(lib.create(function() return pcall(lib.close, outer) end))
  end)
  note(lib.resume(outer))
  note(pcall(lib.close, (lib.running())))
end

programs["yield from anywhere that Lua can"] = function(lib, note)
  local object = setmetatable({}, {
    __index = function(_, key) return lib.yield("index " .. key) end,
    __newindex = function(_, key, value) note(lib.yield("newindex " .. key), value) end,
    __call = function(_, ...) return lib.yield("call", ...) end,
    __add = function() return lib.yield("add") end,
    __concat = function() return lib.yield("concat") end,
    __lt = function() return lib.yield("lt") end,
    __eq = function() return lib.yield("eq") end,
    __len = function() return lib.yield("len") end,
    __unm = function() return lib.yield("unm") end,
    __close = function(_, err) note("close", err, lib.yield("close")) end,
  })
  local c = lib.create(function()
    note(object.x, object + 1, 1 .. object, object < object, object == setmetatable({}, getmetatable(object)))
    object.y = 2
    note(#object, -object, object(1, 2))
    note(pcall(lib.yield, "pcall"))
    note(pcall(function() error(lib.yield("pcall and error"), 0) end))
    note(xpcall(function() lib.yield("xpcall") error("x", 0) end, function(e) return "handled " .. e end))
    note(select(2, pcall(pcall, pcall, lib.yield, "pcalls")))
    for value in function() return lib.yield("iterator") end do note("got", value) end
    do local _ <close> = object end
    note(pcall(function() local _ <close> = object error("unwinding", 0) end))
    return (function() return lib.yield("tail") end)()
  end)
  local n = 0
  repeat
    n = n + 1
    note(n, lib.resume(c, n < 30 and n % 4 ~= 0 and n or nil))
  until lib.status(c) == "dead" or n > 60
end

programs["refuse to yield where Lua cannot"] = function(lib, note)
  note(lib.resume(lib.create(function() table.sort({ 1, 2, 3 }, lib.yield) end)))
  note(lib.resume(lib.create(function() return (("x"):gsub("x", lib.yield)) end)))
  note(lib.resume(lib.create(function() return pcall(table.sort, { 1, 2, 3 }, function() lib.yield() end) end)))
  note(lib.isyieldable(lib.create(print)))
  note(lib.resume(lib.create(function() return lib.isyieldable() end)))
  note(lib.resume(lib.create(function()
    local inside
    table.sort({ 1, 2 }, function() inside = lib.isyieldable() end)
    return inside, lib.isyieldable((lib.running()))
  end)))
end

programs["overflow their stacks"] = function(lib, note)
  local function recurse() return 1 + recurse() end
  local function told(ok, err) note(ok, tostring(err):match("stack overflow"), #tostring(err) < 1000) end
  told(lib.resume(lib.create(recurse)))
  told(pcall(lib.wrap(function() local _ <close> = closing(function() note("closed") end) recurse() end)))
  local text = setmetatable({}, {})
  getmetatable(text).__index = function(t, k) return t[k + 1] end
  told(pcall(lib.wrap(function() return text[1] end)))
  told(lib.resume(lib.create(function() return pcall(lib.wrap(function() return text[1] end)) end)))
end

programs["know which one runs"] = function(lib, note)
  local c
  c = lib.create(function()
    local running, main = lib.running()
    note(running == c, main, type(c), tostring(c) == tostring(running))
    lib.wrap(function() note(lib.running() == c) end)()
    table.sort({ 1, 2 }, function() note("sort", lib.running() == c, select(2, lib.running())) end)
  end)
  note(lib.resume(c))
  note(lib.isyieldable(), select(2, lib.running()), type(lib.running()))
end

programs["refuse wrong arguments"] = function(lib, note)
  for _, name in ipairs { "create", "wrap", "resume", "status", "close", "isyieldable" } do
    for _, value in ipairs { 1, "x", {}, true, print } do
      if not (value == print and (name == "create" or name == "wrap")) then
        note(name, pcall(lib[name], value))
      end
    end
    note(name, pcall(lib[name], nil))
    if name ~= "isyieldable" then note(name, pcall(lib[name])) end
  end
  note(pcall(function() local x = 1; lib.resume(x) end))
  note(pcall(function() lib.wrap(1) end))
  note(type(lib.create(print, 1, 2)), type(lib.wrap(print, "x")))
end

programs["show themselves to the debug library"] = function(lib, note)
  local c = lib.create(function(argument)
    local value = 10
    lib.yield(argument)
    error("here" .. value)
  end)
  lib.resume(c, "a")
  note((debug.traceback(c):gsub("'[%w.]*yield'", "yield")))
  note(debug.getlocal(c, 1, 1)) note(debug.getlocal(c, 1, 2))
  note(debug.setlocal(c, 1, 2, 11))
  note(debug.getinfo(c, 1, "l").currentline, debug.getinfo(c, 2))
  note(lib.resume(c))
  note((debug.traceback(c)))
  note(debug.traceback(lib.create(print)))
end

programs["take any number of values"] = function(lib, note)
  local function count(...) return select("#", ...) end
  for _, n in ipairs { 0, 1, 100, 10000 } do
    local c = lib.create(function(...) return lib.yield(...) end)
    note(n, count(lib.resume(c, table.unpack({}, 1, n))), count(lib.resume(c, table.unpack({}, 1, n))))
  end
  local c = lib.create(function() lib.yield(table.unpack({}, 1, 990000)) return "still alive" end)
  local function crowded() return lib.resume(c) end
  note((function(...) return crowded(), select("#", ...) end)(table.unpack({}, 1, 20000)))
  note(lib.status(c))
  note(lib.resume(c))
end

local deepest = {}

programs["nest as deep as the C stack lets them"] = function(lib, note)
  local depth
  local function down()
    depth = depth + 1
    lib.wrap(down)()
  end
  for round = 1, 2 do -- the first error in a coroutine costs a level, in any library
    depth = 0
    local ok, err = pcall(down)
    note(round, ok, type(err), err:match("C stack overflow"))
  end
  deepest[lib] = depth
  local c
  local function again() return lib.resume(c) end
  c = lib.create(again)
  note(again())
end

programs["compute"] = function(lib, note)
  local function filter(p, g)
    return lib.wrap(function()
      for n in g do
        if n % p ~= 0 then lib.yield(n) end
      end
    end)
  end
  local g, primes = lib.wrap(function() for n = 2, 60 do lib.yield(n) end end), {}
  for n in g do
    primes[#primes + 1] = n
    g = filter(n, g)
    if n > 7 then break end
  end
  note(table.concat(primes, " "), table.concat(list(g), " "))
  local function permute(a, n)
    if n == 0 then lib.yield(table.concat(a)) end
    for i = 1, n do
      a[n], a[i] = a[i], a[n]
      permute(a, n - 1)
      a[n], a[i] = a[i], a[n]
    end
  end
  note(table.concat(list(lib.wrap(function() permute({ "a", "b", "c", "d" }, 4) end)), ","))
  local function walk(tree)
    if tree then walk(tree[1]) lib.yield(tree.key) walk(tree[2]) end
  end
  local function merge(a, b)
    local x, y = a(), b()
    while x or y do
      if not y or (x and x < y) then lib.yield(x) x = a() else lib.yield(y) y = b() end
    end
  end
  local function leaves(t) return lib.wrap(function() walk(t) end) end
  local left, right = { { key = 1 }, { key = 5 }, key = 3 }, { nil, { key = 6 }, key = 4 }
  note(table.concat(list(lib.wrap(function() merge(leaves(left), leaves(right)) end)), " "))
end

programs["go on after recovered errors"] = function(lib, note)
  local c = lib.create(function()
    for i = 1, 3 do
      note(pcall(function()
        local _ <close> = closing(function(err) note("closed", i, err) end)
        lib.yield(i)
        error({ i })
      end))
      note(pcall(lib.wrap(function() lib.yield() end)))
      note(pcall(error))
    end
    return lib.resume(lib.create(function() lib.yield(pcall(error, "inner", 0)) end))
  end)
  repeat note(lib.resume(c)) until lib.status(c) == "dead"
end

programs["mix with those of the other library"] = function(lib, note)
  local other = lib == coroutine and co or coroutine
  local c
  c = other.create(function(a)
    note(a, other.status(c), other.yield("theirs"))
    note(lib.yield("ours"))
    error("both")
  end)
  note(lib.resume(c, 1)) note(lib.status(c)) note(lib.resume(c, 2)) note(lib.isyieldable(c))
  note(other.resume(c, 3)) note(lib.status(c)) note(lib.resume(c)) note(lib.close(c))
  local g = lib.create(function() other.yield(1) lib.yield(2) end)
  note(other.resume(g)) note(other.resume(g)) note(other.status(g)) note(other.close(g)) note(lib.status(g))
end

local function told(program, lib)
  local events = {}
  program(lib, function(...)
    local event = table.pack(...)
    for i = 1, event.n do
      local kind = type(event[i])
      event[i] = (kind == "table" or kind == "function" or kind == "thread") and
        not (getmetatable(event[i]) or {}).__tostring and kind or tostring(event[i])
    end
    events[#events + 1] = table.concat(event, " "):gsub("'coflow%.coroutine%.", "'coroutine.")
  end)
  return events
end

describe("flow.coroutine and Lua's own coroutines", function()
  local names = {}
  for name in pairs(programs) do names[#names + 1] = name end
  table.sort(names)
  for _, name in ipairs(names) do
    it(name, function()
      local expected = told(programs[name], coroutine)
      assert.is_true(#expected > 0)
      assert.same(expected, told(programs[name], co))
    end)

    it(name .. ", in a task", in_task(function()
      assert.same(told(programs[name], coroutine), told(programs[name], co))
    end))
  end

  it("nest as deep, but for the one level that takes the first step in a wrapped one", function()
    for lib in pairs { [co] = 1, [coroutine] = 2 } do
      told(programs["nest as deep as the C stack lets them"], lib)
    end
    assert.is_true(deepest[co] >= deepest[coroutine] - 1)
  end)

  it("have the same functions", function()
    for name in pairs(coroutine) do assert.is_function(co[name], name) end
  end)

  it("differ in the options of create and wrap, which are checked", function()
    for _, make in ipairs { co.create, co.wrap } do
      assert.truthy(raised(make, print, { contxt = 1 }):find("contxt", 1, true))
      assert.truthy(raised(make, print, { context = "callers" }):find("context", 1, true))
      assert.truthy(raised(make, print, { context = 1 }):find("bad argument #2", 1, true))
    end
  end)
end)

-- Awaiting ----------------------------------------------------------------------------------------

describe("an await in a generator", function()
  it("suspends the task, not the generator", in_task(function(clock)
    local log, note = recorder()
    local other = flow.spawn(function()
      flow.sleep(0.05)
      for i = 1, 3 do
        note("other", i)
        flow.sleep(0.1)
      end
    end)
    for i in counter(3) do note("item", i) end
    other:await()
    assert.same({ "other 1", "item 1", "other 2", "item 2", "other 3", "item 3" }, log)
    assert.is_true(clock.now() < 0.4)
  end))

  it("passes through any number of generators", in_task(function()
    for _, depth in ipairs { 1, 2, 3, 10, 50 } do
      assert.same({ 1, 2, 3 }, list(nested(depth, 3)))
    end
  end))

  it("gives the values of what it awaits, and its error", in_task(function()
    local problem = {}
    local c = co.create(function(...)
      local a, b = flow.spawn(function(...) flow.sleep(1) return ... end, ...):await()
      local got = table.pack(co.yield(a, b))
      local ok, err = pcall(flow.await, flow.spawn(function() flow.sleep(1) error(problem) end))
      co.yield(ok, err, table.unpack(got, 1, got.n))
      flow.spawn(function() flow.sleep(1) error(problem) end):await()
    end)
    assert.same({ true, 1, 2, n = 3 }, table.pack(co.resume(c, 1, 2)))
    assert.same({ true, false, problem, "x", nil, n = 5 }, table.pack(co.resume(c, "x", nil)))
    local ok, err = co.resume(c)
    assert.is_false(ok)
    assert.equal(problem, err)
    assert.equal("dead", co.status(c))
  end))

  it("works in pcall, metamethods, iterators and closed variables there", in_task(function()
    local log, note = recorder()
    local slow = setmetatable({}, {
      __index = function(_, key) flow.sleep(0.1) return key end,
      __add = function() flow.yield() return "sum" end,
      __close = function() flow.sleep(0.1) note("closed") end,
    })
    local g = co.wrap(function()
      co.yield(slow.key)
      co.yield(slow + 1)
      local _ <close> = slow
      for i in counter(2) do
        note(pcall(function()
          local _ <close> = slow
          flow.sleep(0.1)
          co.yield(i)
          error("round " .. i, 0)
        end))
      end
      note(xpcall(function() flow.sleep(0.1) error("x", 0) end, function(err) return err .. " handled" end))
    end)
    assert.same({ "key", "sum", 1, 2 }, list(g))
    assert.same({ "closed", "false round 1", "closed", "false round 2", "false x handled", "closed" }, log)
  end))

  it("is each of the operations that suspend", in_task(function()
    local function done(...)
      return flow.spawn(function(...) flow.yield() return ... end, ...)
    end
    local g = co.wrap(function()
      co.yield(flow.is_awaitable_here())
      co.yield(done(1):await())
      co.yield(select(2, done(2):try_await()))
      co.yield(select(2, flow.await_all(done(0), done(3))))
      co.yield(flow.await_any(done(4)).result)
      for task in flow.when_each { done(5), done(5) } do co.yield(task.result) end
      co.yield(flow.await(setmetatable({}, { __await = function() flow.yield() return done(6) end })))
      co.yield(flow.await(flow.delay(1)) or 7)
      local source = flow.CancellationTokenSource(1)
      source.token:wait()
      co.yield(8)
      co.yield(flow.call(function() flow.sleep(1) return 9 end))
    end)
    assert.same({ true, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9 }, list(g))
  end))

  it("finds a complete task without suspending", in_task(function()
    local others = false
    flow.spawn(function() others = true end)
    local done = flow.Task.from_result(1)
    assert.equal(1, co.wrap(function() return done:await() end)())
    assert.is_false(others)
  end))

  it("drives the loop outside every task, as elsewhere", function()
    assert.same({ 1, 2 }, list(co.wrap(function()
      for i = 1, 2 do
        flow.delay(0.001):await()
        co.yield(i)
      end
    end)))
  end)

  it("may start tasks and hot functions, also deep down", in_task(function()
    local start
    local depth = many(1000)
    local lowest = depth
    start = flow.async(function(n)
      lowest = n
      if n == 0 then flow.yield() return 0 end
      return co.wrap(function()
        local deeper = start(n - 1)
        if lowest >= n then error("the function has not started hot") end
        co.yield(deeper:await() + 1)
      end)()
    end)
    assert.equal(depth, start(depth):await())
    local g = co.wrap(function()
      for i = 1, 3 do
        co.yield(flow.async(function() flow.sleep(0.1) return i end)():await())
      end
    end)
    assert.same({ 1, 2, 3 }, list(g))
  end))

  it("goes on in another task, which resumes the generator next", in_task(function()
    local g = counter(6)
    local got = {}
    for i = 1, 6 do
      got[i] = flow.spawn(function() return flow.current_task(), g() end)
      got[i]:await()
      assert.equal(got[i], (got[i].result))
      assert.equal(i, select(2, got[i]:results()))
    end
  end))

  it("does not nest deeper with each round", in_task(function()
    local rounds = many(30000, 2000)
    local g = co.wrap(function()
      for i = 1, rounds do
        flow.yield()
        co.yield(i)
      end
    end)
    local count = 0
    for _ in g do count = count + 1 end
    assert.equal(rounds, count)
    assert.equal("end", co.wrap(function()
      for _ = 1, rounds do flow.yield() end
      return "end"
    end)())
  end))

  it("works in thousands of generators at once", in_task(function()
    local n, generators, tasks = many(10000), {}, {}
    for i = 1, n do
      generators[i] = co.wrap(function()
        for k = 1, 3 do
          flow.sleep(0.01 * (i % 7 + 1))
          co.yield(i * k)
        end
      end)
    end
    for i = 1, n do tasks[i] = flow.spawn(function() return list(generators[i]) end) end
    local results = flow.when_all(tasks):await()
    for i = 1, n do assert.equal(6 * i, results[i][1] + results[i][2] + results[i][3]) end
  end))
end)

describe("a generator in which the task is suspended", function()
  -- a generator held by a task, which waits for a gate in it, at the depth given
  local function held(depth)
    local gate, inner = flow.TaskCompletionSource(), nil
    local function make(n)
      return co.create(function()
        if n > 0 then
          local ok, value = co.resume(make(n - 1))
          if not ok then error(value, 0) end
          return value
        end
        inner = co.running()
        co.yield(gate.task:await())
        return "end"
      end)
    end
    local c = make(depth or 0)
    local task = flow.spawn(function() return co.resume(c) end)
    flow.yield()
    return c, task, gate, inner
  end

  it("is running, as far as others can tell", helper.in_order(function()
    local c, task, gate = held()
    assert.equal("normal", co.status(c))
    assert.same({ false, "cannot resume non-suspended coroutine" }, { co.resume(c, 1, 2) })
    assert.truthy(raised(co.close, c):find("cannot close a normal coroutine", 1, true))
    gate:set_result("value")
    assert.same({ true, "value" }, { task:await() })
    assert.equal("suspended", co.status(c))
    assert.same({ true, "end" }, { co.resume(c) })
  end))

  it("is refused to a wrapped call by another task", helper.in_order(function()
    local g = counter(2)
    local first = flow.spawn(g)
    flow.yield()
    assert.truthy(raised(g):find("coroutine_spec.lua:%d+: cannot resume non%-suspended coroutine$")
      or raised(g):find("cannot resume non-suspended coroutine", 1, true))
    assert.equal(1, first:await())
    assert.equal(2, g())
  end))

  it("withstands Lua's own resume and close by strangers", helper.in_order(function()
    for depth = 0, 2 do
      local c, task, gate, inner = held(depth)
      assert.same({ true }, { coroutine.resume(c, "intruder") })
      assert.same({ true }, { coroutine.resume(inner, "intruder") })
      flow.spawn(function() coroutine.resume(inner) coroutine.resume(c) end):await()
      gate:set_result("value")
      assert.same({ true }, { coroutine.resume(inner) }) -- it is to go on, but not by us
      assert.same({ true }, { coroutine.resume(c) })
      assert.same({ true, "value" }, { task:await() })
    end
    for depth = 0, 2 do
      local _, task, gate, inner = held(depth)
      assert.is_true(coroutine.close(inner))
      assert.equal("dead", co.status(inner))
      assert.is_true(co.close(inner))
      gate:set_result()
      local ok, err = task:await()
      assert.is_false(ok)
      assert.truthy(err:find("cannot resume dead coroutine", 1, true))
    end
    for _, operation in ipairs { flow.yield, function() flow.sleep(1) end,
      function() flow.await_all(flow.delay(1), flow.delay(1)) end,
      function() for _ in flow.when_each { flow.delay(1) } do co.isyieldable() end end,
      function() flow.delay(1):try_await() end } do
      local c = co.create(function() operation() return "whole" end)
      local task = flow.spawn(function() return co.resume(c) end)
      flow.spawn(function() coroutine.resume(c) end)
      flow.yield()
      coroutine.resume(c)
      assert.same({ true, "whole" }, { task:await() })
    end
  end))

  it("withstands strangers that resume it when it is to go on, before its turn", helper.in_order(function()
    local gate
    for _, operation in ipairs { function() gate.task:await() end, function() gate.task:try_await() end,
      function() flow.await_all(gate.task, flow.Task.completed_task) end,
      function() for _ in flow.when_each { gate.task } do co.isyieldable() end end,
      function() co.wrap(function() gate.task:await() end)() end } do
      gate = flow.TaskCompletionSource()
      local c = co.create(function()
        operation()
        assert.is_true(flow.is_awaitable_here()) -- in the hands of its own task
        return "whole"
      end)
      local task = flow.spawn(function() return co.resume(c) end)
      flow.yield()
      gate:set_result()
      assert.same({ true }, { coroutine.resume(c) })
      assert.same({ true, "whole" }, { task:await() })
    end
  end))

  it("withstands strangers outside every task", function()
    for _, operation in ipairs { flow.yield, function() flow.sleep(0.001) end,
      function() for _ in flow.when_each { flow.delay(0.001) } do co.isyieldable() end end } do
      local c = co.create(function() operation() return "whole" end)
      local task = flow.spawn(function() return co.resume(c) end)
      flow.spawn(flow.loop.stop)
      flow.loop.run()
      coroutine.resume(c)
      assert.equal("normal", co.status(c))
      assert.same({ true, "whole" }, { flow.await(task) })
    end
  end)

  it("stands in the hang report where it waits", function()
    local gate = flow.TaskCompletionSource()
    local line
    local err = raised(flow.run, function()
      co.wrap(function()
        co.wrap(function()
          line = here(1)
          gate.task:await()
        end)()
      end)()
    end)
    is_error("InvalidOperation", err, line)
    err = raised(flow.run, function()
      line = here(1)
      co.wrap(flow.await)(gate.task)
    end)
    is_error("InvalidOperation", err, line)
  end)

  it("belongs to the circle of tasks that await each other", in_task(function()
    local a, b
    a = flow.spawn(function() return co.wrap(function() return b:await() end)() end)
    b = flow.spawn(function() return co.wrap(function() return a:await() end)() end)
    a.name, b.name = "A", "B"
    is_error("InvalidOperation", raised(flow.await, b), "'A'", "'B'")
    pcall(flow.await, a)
  end))
end)

describe("an await in a coroutine", function()
  local function sleepy() flow.sleep(1) end

  it("is refused where it could not pass, with the reason, and starts nothing", in_task(function()
    local reason
    local function refused(words, fn, ...)
      is_error("InvalidOperation", raised(fn, ...), words)
    end
    refused("coroutine.create", coroutine.wrap(sleepy))
    refused("coroutine.create", co.wrap(function() coroutine.wrap(sleepy)() end))
    refused("coroutine.create", coroutine.wrap(function() co.wrap(sleepy)() end))
    refused("coroutine.create", co.wrap(function() coroutine.wrap(function() co.wrap(sleepy)() end)() end))
    local function sorting() table.sort({ 2, 1 }, function() co.wrap(sleepy)() end) end
    refused("'sort'", sorting)
    refused("'sort'", co.wrap(sorting))
    refused("'sort'", co.wrap(function() table.sort({ 2, 1 }, sleepy) end))
    refused("'sort'", function() table.sort({ 2, 1 }, function() co.wrap(co.wrap(sleepy))() end) end)
    table.sort({ 2, 1 }, co.wrap(function() reason = flow.is_awaitable_here() end))
    assert.is_false(reason)
    assert.is_true(co.wrap(flow.is_awaitable_here)())
    assert.is_false(coroutine.wrap(flow.is_awaitable_here)())
  end))

  it("works there with what is complete", in_task(function()
    local done = flow.Task.from_result(1)
    local sum = 0
    table.sort({ 2, 1 }, function() sum = sum + co.wrap(flow.await)(done) end)
    assert.is_true(sum > 0)
    assert.equal(1, coroutine.wrap(co.wrap(flow.await))(done))
  end))

  it("is refused in a callback of a token", in_task(function()
    local source = flow.CancellationTokenSource()
    source.token:register(co.wrap(sleepy))
    local inner = helper.inner(raised(source.cancel, source))
    is_error("InvalidOperation", inner[1], "called by 'coflow.CancellationTokenSource:cancel'")
  end))

  it("is refused in what coroutine.close runs", in_task(function()
    local err
    local c = co.create(function()
      local _ <close> = closing(function() err = raised(sleepy) end)
      co.yield()
    end)
    co.resume(c)
    assert.is_true(co.close(c))
    is_error("InvalidOperation", err, "coroutine.close")
  end))
end)

-- Random programs ---------------------------------------------------------------------------------

-- A program of one task that makes, resumes, wraps and closes coroutines, yields, fails and catches, as the numbers
-- that follow from the seed say. `pause` stands at every step. As one task is one sequence of events, whether it
-- suspends there must not change a thing.
local function random_program(seed, lib, pause)
  local log, note = recorder()
  local state, steps = seed, 400
  local function random(n)
    state = (state * 1103515245 + 12345) % 2147483648
    return state // 65536 % n + 1
  end
  local pool, names = {}, setmetatable({}, { __mode = "k" })
  local act
  local function body(name)
    return function(...)
      note(name, "starts", ...)
      local _ <close> = closing(function(err)
        note(name, "closes", err)
        if random(8) == 1 then error(name .. " raises while it closes", 0) end
      end)
      act(name, 1 + random(6))
      if random(3) == 1 then error(name .. " fails") end
      return name, "ends"
    end
  end
  function act(name, count)
    for _ = 1, count do
      steps = steps - 1
      if steps < 0 then return end
      pause(random(4))
      local what, target = random(10), pool[random(#pool > 0 and #pool or 1)]
      if what <= 2 then
        local c = lib.create(body("c" .. steps))
        names[c] = "c" .. steps
        pool[#pool + 1] = c
      elseif what == 3 then
        pool[#pool + 1] = lib.wrap(body("w" .. steps))
      elseif what <= 6 and target then
        if type(target) == "thread" then
          note(name, "resumes", names[target], lib.status(target))
          note(name, "got", lib.resume(target, name))
        else
          note(name, "calls", pcall(target, name))
        end
      elseif what == 7 and type(target) == "thread" then
        note(name, "closes", names[target], pcall(lib.close, target))
      elseif what == 8 and name ~= "main" then
        note(name, "yields", lib.yield(name, steps))
      elseif what == 9 then
        note(name, "catches", pcall(act, name, random(4)))
      elseif random(4) == 1 then
        error(name .. " gives up")
      end
    end
  end
  note(pcall(act, "main", 200))
  return log
end

describe("random programs", function()
  it("do the same with our library, and with awaits at every step", in_task(function()
    local events, seeds = 0, many(100, 15)
    for seed = 1, seeds do
      local expected = random_program(seed, coroutine, function() end)
      local same = random_program(seed, co, function() end)
      local pauses = { flow.yield, function() flow.sleep(0.1) end, function() flow.spawn(flow.yield):await() end,
        function() flow.async(function() flow.yield() end)():await() end }
      local awaiting = random_program(seed, co, function(n)
        if flow.is_awaitable_here() then pauses[n]() end -- not in what coroutine.close runs
      end)
      events = events + #expected
      assert.same(expected, same, "seed " .. seed)
      assert.same(expected, awaiting, "seed " .. seed)
    end
    assert.is_true(events > 10 * seeds, events)
  end))

  it("do the same in tasks that run at the same time", in_task(function()
    local tasks = {}
    for seed = 1, many(100, 15) do
      tasks[seed] = flow.spawn(random_program, seed, co, function()
        if flow.is_awaitable_here() then flow.yield() end
      end)
    end
    for seed, task in ipairs(tasks) do
      assert.same(random_program(seed, coroutine, function() end), task:await())
    end
  end))
end)

-- Contexts ----------------------------------------------------------------------------------------

describe("the execution context of a coroutine", function()
  it("is the one in which it was made, and what it writes stays with it", in_task(function()
    local loc, other = flow.AsyncLocal(), flow.AsyncLocal()
    loc.value = "made"
    local g = co.wrap(function()
      for i = 1, 3 do
        local seen = loc.value
        loc.value = "own " .. i
        other.value = i
        flow.sleep(0.1)
        assert.equal("own " .. i, loc.value)
        co.yield(seen)
      end
      return loc.value
    end)
    loc.value = "consumer"
    assert.equal("made", g())
    assert.equal("consumer", loc.value)
    loc.value = "changed"
    assert.equal("own 1", g())
    assert.same({ "changed" }, { loc.value, other.value })
    assert.equal("own 2", flow.spawn(function()
      loc.value = "another task"
      local value = g()
      assert.equal("another task", loc.value)
      return value
    end):await())
    assert.equal("own 3", g())
    assert.same({ "changed" }, { loc.value, other.value })
  end))

  it("is empty if nothing was set, whoever resumes", in_task(function()
    local loc = flow.AsyncLocal()
    local g = co.wrap(function()
      while true do
        co.yield(loc.value)
        flow.yield()
      end
    end)
    loc.value = 1
    assert.is_nil(g())
    assert.is_nil(g())
    assert.equal(1, loc.value)
  end))

  it("works the same outside every task", function()
    local loc = flow.AsyncLocal()
    local _ <close> = loc:with("made")
    local c = co.create(function()
      loc.value = "own"
      co.yield()
      flow.delay(0.001):await()
      co.yield(loc.value)
      error("x")
    end)
    loc.value = "outside"
    co.resume(c)
    assert.equal("outside", loc.value)
    assert.same({ true, "own" }, { co.resume(c) })
    co.resume(c)
    assert.equal("outside", loc.value)
  end)

  it("is put back on an error, for the wrapped and for the resumed", in_task(function()
    local loc = flow.AsyncLocal()
    loc.value = "task"
    local seen
    local function fail()
      local _ <close> = closing(function() seen = loc.value end)
      loc.value = "own"
      flow.yield()
      error("failed")
    end
    pcall(co.wrap(fail))
    assert.same({ "task", "own" }, { loc.value, seen })
    seen = nil
    local c = co.create(fail)
    co.resume(c)
    assert.same({ "task" }, { loc.value, seen })
    co.close(c)
    assert.same({ "task", "own" }, { loc.value, seen })
  end))

  it("is in force in what coroutine.close runs", in_task(function()
    local loc = flow.AsyncLocal()
    loc.value = "made"
    local seen
    local c = co.create(function()
      local _ <close> = closing(function() seen = loc.value loc.value = "closed" end)
      loc.value = "own"
      co.yield()
    end)
    co.resume(c)
    loc.value = "task"
    co.close(c)
    assert.same({ "task", "own" }, { loc.value, seen })
  end))

  it("is the caller's on request", in_task(function()
    local loc = flow.AsyncLocal()
    loc.value = "made"
    local function body()
      loc.value = loc.value .. "+"
      co.yield(loc.value)
      flow.sleep(0.1)
      loc.value = loc.value .. "+"
      return loc.value
    end
    local g = co.wrap(body, { context = "caller" })
    local c = co.create(body, { context = "caller" })
    loc.value = "now"
    assert.equal("now+", g())
    assert.equal("now++", g())
    assert.same({ true, "now+++" }, { co.resume(c) })
    loc.value = "later"
    assert.same({ true, "later+" }, { co.resume(c) })
    assert.equal("later+", loc.value)
  end))

  it("passes to what the coroutine starts", in_task(function()
    local loc = flow.AsyncLocal()
    loc.value = "made"
    local g = co.wrap(function()
      loc.value = "own"
      co.yield(flow.spawn(loc.get, loc):await())
      co.yield(co.wrap(function() return loc.value end)())
    end)
    loc.value = "task"
    assert.same({ "own", "own" }, list(g))
  end))

  it("does not hold a local that does not flow", in_task(function()
    local transaction = flow.AsyncLocal { flow = "none" }
    transaction.value = "the task's"
    local g = co.wrap(function()
      co.yield(transaction.value or "nothing")
      transaction.value = "its own"
      co.yield()
      return transaction.value
    end)
    assert.equal("nothing", g())
    g()
    assert.equal("the task's", transaction.value)
    assert.equal("its own", g())
    assert.equal("the task's", co.wrap(function() return transaction.value end, { context = "caller" })())
  end))

  it("is empty if the flow was suppressed, and the suppression is not in force inside", in_task(function()
    local loc = flow.AsyncLocal()
    loc.value = 1
    local g
    do
      local _ <close> = flow.ExecutionContext.suppress_flow()
      g = co.wrap(function()
        co.yield(loc.value, flow.ExecutionContext.is_flow_suppressed())
        local _ <close> = flow.ExecutionContext.suppress_flow()
        co.yield(flow.ExecutionContext.is_flow_suppressed())
        co.yield(flow.ExecutionContext.is_flow_suppressed())
      end)
      assert.same({ nil, false }, { g() })
      assert.is_true(flow.ExecutionContext.is_flow_suppressed())
    end
    assert.is_true(g())
    assert.is_false(flow.ExecutionContext.is_flow_suppressed())
    assert.is_true(flow.spawn(g):await())
    g()
    assert.is_false(flow.ExecutionContext.is_flow_suppressed())
  end))

  it("may keep scopes open across a yield, and in another task", in_task(function()
    local loc = flow.AsyncLocal()
    loc.value = "made"
    local g = co.wrap(function()
      do
        local _ <close> = loc:with("scope")
        co.yield(loc.value)
        loc:run("inner", function() co.yield(loc.value) end)
        co.yield(loc.value)
      end
      co.yield(loc.value)
      local scope = loc:with("last")
      co.yield(loc.value)
      scope:dispose()
      return loc.value
    end)
    loc.value = "task"
    assert.equal("scope", g())
    local _ <close> = loc:with("consumer")
    assert.equal("inner", flow.spawn(g):await())
    assert.equal("scope", flow.spawn(g):await())
    assert.equal("made", flow.spawn(g):await())
    assert.equal("last", flow.spawn(g):await())
    assert.equal("made", g())
    assert.equal("consumer", loc.value)
  end))

  it("refuses the scopes of its resumer, and the other way round", in_task(function()
    local loc = flow.AsyncLocal()
    local scope, err
    local outer = loc:with(1)
    local c = co.create(function()
      err = raised(outer.dispose, outer)
      scope = loc:with(2)
      co.yield()
      return loc.value
    end)
    co.resume(c)
    is_error("InvalidOperation", err)
    raises("InvalidOperation", scope.dispose, scope)
    raises("InvalidOperation", function() local _ <close> = scope end)
    assert.equal(1, loc.value)
    assert.same({ true, 2 }, { co.resume(c) })
    scope:dispose() -- its coroutine has ended: nothing happens
    assert.equal(1, loc.value)
    outer:dispose()
    assert.is_nil(loc.value)
  end))

  it("tells the handlers of watched locals what changes for them", in_task(function()
    local log, note = recorder()
    local loc = flow.AsyncLocal { value_changed = function(args)
      note(args.previous_value, args.current_value, args.context_changed)
    end }
    loc.value = 1
    local g = co.wrap(function()
      loc.value = 2
      flow.sleep(0.1)
      co.yield()
    end)
    loc.value = 3
    g()
    g()
    assert.same({ "nil 1 false", "1 3 false", "3 1 true", "1 2 false", "2 3 true", "3 2 true", "2 3 true" },
      (function()
        local kept = {}
        for _, event in ipairs(log) do
          if not event:find("nil %d true") and not event:find("%d nil true") then kept[#kept + 1] = event end
        end
        return kept
      end)())
  end))

  it("is not disturbed by handlers that resume the coroutine while it changes", in_task(function()
    local c
    local results = {}
    local loc = flow.AsyncLocal { value_changed = function(args)
      if c and args.context_changed then
        local words = { co.status(c), select(2, co.resume(c)), tostring(pcall(co.close, c)) }
        results[#results + 1] = table.concat(words, ", ")
      end
    end }
    loc.value = "made"
    c = co.create(function()
      assert.equal("made", loc.value)
      loc.value = "own"
      co.yield()
      assert.equal("own", loc.value)
    end)
    loc.value = "task"
    assert.is_true(co.resume(c))
    assert.equal("task", loc.value)
    assert.is_true(co.resume(c))
    assert.equal("task", loc.value)
    local normal = "normal, cannot resume non-suspended coroutine, false"
    assert.same({ normal, normal, normal, "dead, cannot resume dead coroutine, true" }, results)
    c = nil
  end))

  it("is let go when the coroutine ends or dies", in_task(function()
    local loc = flow.AsyncLocal()
    local weak = setmetatable({}, { __mode = "v" })
    local function keep(name)
      weak[name] = { name }
      loc.value = weak[name]
    end
    keep("made")
    local ended, failed = co.create(function() keep("written") end), co.wrap(function() error("x") end)
    local closed, dropped = co.create(function() co.yield() end), co.wrap(function() co.yield() end)
    loc.value = nil
    collect()
    assert.not_nil(weak.made)
    co.resume(ended)
    pcall(failed)
    co.resume(closed)
    co.close(closed)
    dropped()
    dropped = nil -- luacheck: ignore
    collect()
    assert.is_nil(weak.made)
    assert.is_nil(weak.written)
    assert.equal("dead", co.status(ended))
    assert.is_function(failed)
  end))

  it("does not keep a coroutine alive that is in it", in_task(function()
    local loc = flow.AsyncLocal()
    local weak = setmetatable({}, { __mode = "k" })
    do
      local c
      c = co.create(function()
        loc.value = c
        co.yield()
      end)
      co.resume(c)
      weak[c] = true
      local g
      g = co.wrap(function()
        loc.value = g
        co.yield()
      end)
      g()
      weak[g] = true
    end
    collect()
    assert.is_nil(next(weak))
  end))
end)

-- Yields that are refused -------------------------------------------------------------------------

describe("a yield", function()
  local loc = flow.AsyncLocal()

  it("out of a scope of a coroutine in its caller's context is refused, with both places", in_task(function()
    local opened, yielded, err
    local c = co.create(function()
      do
        opened = here(1)
        local _ <close> = loc:with(1)
        flow.yield()
        yielded = here(1)
        err = raised(function() co.yield("lost") end)
      end
      co.yield("passes")
      opened = here(1)
      loc:run(2, function() yielded = here() co.yield() end)
    end, { context = "caller" })
    assert.same({ true, "passes" }, { co.resume(c) })
    is_error("InvalidOperation", err, opened, yielded)
    assert.is_nil(loc.value)
    local ok
    ok, err = co.resume(c)
    assert.is_false(ok)
    is_error("InvalidOperation", err, opened, yielded)
    co.close(c) -- only now, as ever after a resume that failed
    assert.is_nil(loc.value)
  end))

  it("is no matter for a scope that outlives such a coroutine: it belongs to the task", in_task(function()
    local scope = co.wrap(function() return loc:with(1) end, { context = "caller" })()
    assert.equal(1, loc.value)
    scope:dispose()
    assert.is_nil(loc.value)
  end))

  it("is refused out of an entered context too", in_task(function()
    local context = flow.ExecutionContext.capture()
    local function body()
      local _ <close> = context:enter()
      co.yield()
    end
    raises("InvalidOperation", co.wrap(body, { context = "caller" }))
    co.wrap(body)()
  end))

  it("passes if the scope is the resumer's, or an inner coroutine's", in_task(function()
    local _ <close> = loc:with(1)
    local inner = co.wrap(function()
      local _ <close> = loc:with(2)
      co.yield("inner")
    end)
    local g = co.wrap(function()
      co.yield(inner())
      co.yield(loc.value)
    end, { context = "caller" })
    assert.same({ "inner", 1 }, list(g))
  end))

  it("out of a cancellation scope or a group is refused, in any coroutine of ours", in_task(function()
    local opened, yielded
    local source = flow.CancellationTokenSource()
    local function body()
      yielded = here(1)
      co.yield()
    end
    for _, options in ipairs { {}, { context = "caller" } } do
      for _, scope in ipairs {
        function() opened = here() flow.with_timeout(9, body) end,
        function() opened = here() flow.with_cancellation(source.token, body) end,
        function() opened = here() flow.shield(body) end,
        function() opened = here() flow.shield({ grace = 1 }, body) end,
        function() opened = here() flow.task_group(function() flow.with_timeout(math.huge, flow.yield) body() end) end,
      } do
        local g = co.wrap(scope, options)
        is_error("InvalidOperation", raised(function() g() end), opened, yielded)
        local c = co.create(scope, options)
        local ok, err = co.resume(c)
        assert.is_false(ok)
        is_error("InvalidOperation", err, yielded)
        assert.is_nil(flow.deadline())
        flow.yield()
        co.close(c)
        flow.yield()
      end
    end
  end))

  it("passes if the scope is closed, the resumer's, or that of a coroutine further out", in_task(function()
    local g = co.wrap(function()
      flow.with_timeout(9, flow.yield)
      co.yield(1)
      co.yield(flow.with_timeout(9, function()
        return table.concat(list(counter(3)), " ")
      end))
      flow.task_group(function(group)
        for i in counter(2) do group:spawn(flow.sleep, i) end
      end)
    end)
    assert.same({ 1, "1 2 3" }, flow.with_timeout(99, function() return list(g) end))
  end))

  it("in the body of a task faults it, as the plain one does", in_task(function()
    local line
    local task = flow.spawn(function()
      line = here(1)
      co.yield()
    end)
    is_error("InvalidOperation", raised(flow.await, task), line)
    task = flow.spawn(function() co.wrap(function() flow.yield() end)() coroutine.yield() end)
    raises("InvalidOperation", flow.await, task)
  end))
end)

-- Ends --------------------------------------------------------------------------------------------

describe("a cancellation", function()
  it("is raised where the innermost generator waits", in_task(function(clock)
    local log, note = recorder()
    local source = flow.CancellationTokenSource(0.25)
    local function numbers()
      return co.wrap(function()
        local _ <close> = closing(function(err) note("inner closed", err.name) end)
        for i = 1, 10 do
          flow.sleep(0.1, source.token)
          co.yield(i)
        end
      end)
    end
    local g = co.wrap(function()
      local _ <close> = closing(function(err) note("outer closed", err.name) end)
      for i in numbers() do co.yield(i) end
    end)
    local err = raised(function()
      for i in g do note(i) end
    end)
    is_error("OperationCanceled", err)
    assert.equal(source.token, err.token)
    assert.equal(0.25, clock.now())
    assert.same({ "1", "2", "inner closed OperationCanceled", "outer closed OperationCanceled" }, log)
  end))

  it("that a generator catches leaves it alive", in_task(function()
    local source = flow.CancellationTokenSource(0.1)
    local g = co.wrap(function()
      co.yield(select(2, pcall(flow.sleep, 1, source.token)).name)
      flow.sleep(0.1)
      co.yield("on")
    end)
    assert.same({ "OperationCanceled", "on" }, list(g))
  end))

  it("lets the variables of a wrapped generator await while it unwinds", in_task(function(clock)
    local log, note = recorder()
    local source = flow.CancellationTokenSource(0.1)
    local inner = co.create(function()
      local _ <close> = closing(function(err) note("never", err.name) end)
      flow.sleep(1, source.token)
    end)
    local g = co.wrap(function(...)
      note("started", ...)
      local _ <close> = closing(function(err)
        flow.sleep(1)
        note("outer", err.name, clock.now())
        error("replaced", 0)
      end)
      local _ <close> = closing(function(err)
        note("in a generator", list(counter(3))[3], err.name)
        flow.sleep(1)
        note("inner", err.name)
      end)
      local ok, err = co.resume(inner)
      note(ok, err.name, clock.now())
      error(err)
    end)
    local line = here(1)
    local err = raised(function() g(1, nil) end)
    assert.equal(("spec/%s: replaced"):format(line), err)
    assert.same({ "started 1 nil", "false OperationCanceled 0.1", "in a generator 3 OperationCanceled",
      "inner OperationCanceled", "outer OperationCanceled 2.4" }, { log[1], log[2], log[3], log[4],
      (log[5]:gsub("2%.[34]%d*", "2.4")) })
    note("status")
    assert.truthy(raised(g):find("cannot resume dead coroutine", 1, true))
    assert.equal("status", log[#log])
  end))

  it("may itself be canceled while it unwinds, and abandoned", in_task(function()
    local log, note = recorder()
    flow.on_unobserved_exception(false)
    local _ <close> = closing(function() flow.on_unobserved_exception(nil) end)
    local source = flow.CancellationTokenSource(0.1)
    raises("OperationCanceled", co.wrap(function()
      local _ <close> = closing(function(err)
        note(err)
        flow.sleep(1, source.token)
      end)
      error("first", 0)
    end))
    flow.spawn(function()
      co.wrap(function()
        local _ <close> = closing(function() note("last") end)
        local _ <close> = closing(function() flow.TaskCompletionSource().task:await() end)
        error("first", 0)
      end)()
    end)
    flow.yield()
    collect()
    assert.same({ "first", "last" }, log)
  end))

  it("makes the task canceled", in_task(function()
    local source = flow.CancellationTokenSource(0.1)
    local task = flow.spawn(function() co.wrap(function() flow.sleep(1, source.token) end)() end)
    raises("OperationCanceled", flow.await, task)
    assert.is_true(task.is_canceled)
    assert.truthy(task:traceback():find("canceled here", 1, true))
  end))
end)

describe("the ambient cancellation", function()
  it("in a generator is that of whoever resumes it, deadline included", in_task(function(clock)
    local log, note = recorder()
    local g = co.wrap(function()
      for i = 1, 9 do
        local ok, err = pcall(flow.sleep, 1)
        co.yield(i, ok or err.name, flow.deadline())
      end
    end)
    note(flow.with_timeout(0.25, g))
    note(clock.now())
    note(g())
    note(raised(flow.with_timeout, 0.25, function() g() flow.sleep(1) end).name)
    local task = flow.spawn(function() return g() end)
    flow.yield()
    task:cancel()
    note(task:await())
    note(g())
    note(flow.shield({ grace = 5 }, g))
    assert.same({ "1 OperationCanceled 0.0", "0.25", "2 true nil", "Timeout", "4 OperationCanceled nil",
      "5 true nil", "6 true 4.0" }, log)
  end))

  it("ends what waits in generators with a timeout, and unwinds them", in_task(function(clock)
    local log, note = recorder()
    local g = co.wrap(function()
      local _ <close> = closing(function(err)
        flow.shield(flow.sleep, 1)
        note("outer", err.name, clock.now())
      end)
      local inner = co.wrap(function()
        local _ <close> = closing(function(err)
          note("canceled again", raised(flow.sleep, 1).name)
          flow.shield(function() flow.sleep(1) end)
          note("inner", err.name, clock.now())
        end)
        flow.sleep(100)
      end)
      inner()
    end)
    raises("Timeout", flow.with_timeout, 0.5, g)
    assert.same({ "canceled again OperationCanceled", "inner OperationCanceled 1.5",
      "outer OperationCanceled 2.5" }, log)
    flow.sleep(1)
    assert.equal(3.5, clock.now())
  end))

  it("has scopes in coroutines as in tasks", in_task(function(clock)
    for _, call in ipairs {
      function(fn) return pcall(co.wrap(fn)) end,
      function(fn) return co.resume(co.create(fn)) end,
      function(fn) return co.resume(co.create(co.wrap(fn))) end,
    } do
      local start = clock.now()
      local ok, err = call(function() flow.with_timeout(0.5, flow.sleep, 9) end)
      assert.is_false(ok)
      is_error("Timeout", err)
      assert.equal(start + 0.5, clock.now())
      assert.is_nil(flow.deadline())
      flow.sleep(1) -- not under the scope that has ended with the coroutine
      ok, err = call(function()
        flow.with_timeout(9, function()
          flow.with_timeout(0.5, function() flow.with_cancellation(flow.CancellationToken.none, flow.sleep, 9) end)
        end)
      end)
      assert.is_false(ok)
      is_error("Timeout", err, "0.5")
      ok, err = call(function() flow.with_timeout(9, error, "own", 0) end)
      assert.same({ false, "own" }, { ok, err:match("own$") })
      assert.is_nil(flow.deadline())
    end
    local c = co.create(function()
      local _ <close> = closing(function(err) assert.equal("OperationCanceled", err.name) end)
      flow.with_timeout(0.5, flow.sleep, 9)
    end)
    local outer = flow.with_timeout(9, function()
      co.resume(c)
      return flow.deadline()
    end)
    assert.equal(8.5, outer)
    co.close(c)
    flow.sleep(1)
  end))

  it("is waited for in a generator, and interrupts each kind of wait there", in_task(function()
    for _, operation in ipairs {
      function() flow.sleep(9) end,
      function() flow.delay(9):await() end,
      function() flow.delay(9):try_await() end,
      function() flow.await_all(flow.delay(9), flow.delay(8)) end,
      function() flow.await_any(flow.delay(9)) end,
      function() for _ in flow.when_each { flow.delay(9) } do co.isyieldable() end end,
      function() flow.CancellationTokenSource().token:wait() end,
      function() co.wrap(flow.sleep)(9) end,
    } do
      raises("Timeout", flow.with_timeout, 1, co.wrap(operation))
      raises("Timeout", flow.with_timeout, 1, function()
        local _, err = co.resume(co.create(operation))
        error(err, 0)
      end)
    end
    local waited = false
    pcall(flow.with_timeout, 1, co.wrap(function()
      flow.cancellation_token():wait()
      waited = true
    end))
    assert.is_true(waited)
  end))

  it("has groups, which wait for their children there", in_task(function(clock)
    local log, note = recorder()
    local function body()
      local ok, err = pcall(flow.task_group, function(group)
        group:spawn(function()
          local _ <close> = closing(function() flow.shield(flow.sleep, 1) note("child ended", clock.now()) end)
          flow.sleep(9)
        end)
        group:spawn(function() flow.sleep(1) error("failed", 0) end)
        flow.sleep(9)
      end)
      note(ok, err, clock.now())
      co.yield("on")
      return flow.task_group(function(group) return group:spawn(function() flow.sleep(1) return 7 end):await() end)
    end
    local g = co.wrap(body)
    note(g())
    note(g(), clock.now())
    local task = flow.spawn(function() return co.resume(co.create(body)) end)
    flow.yield()
    note(task:await())
    assert.same({ "child ended 2.0", "false failed 2.0", "on", "7 3.0", "child ended 5.0", "false failed 5.0",
      "true on" }, log)
  end))

  it("is let through by flow.pcall in a generator", in_task(function()
    local after = false
    raises("Timeout", flow.with_timeout, 1, co.wrap(function()
      flow.pcall(flow.sleep, 9)
      after = true
    end))
    assert.is_false(after)
  end))
end)

describe("a task that is abandoned in generators", function()
  it("is reported with the place, and their variables are closed, innermost first", in_task(function()
    local log, note = recorder()
    local loc = flow.AsyncLocal()
    local reported, line
    flow.on_unobserved_exception(function(err) reported = err end)
    local _ <close> = closing(function() flow.on_unobserved_exception(nil) end)
    local weak = setmetatable({}, { __mode = "k" })
    local function noting(name)
      return closing(function()
        note(name, loc.value, raised(flow.yield).name)
      end)
    end
    flow.spawn(function()
      loc.value = "task"
      local _ <close> = noting("task")
      local outer = co.wrap(function()
        local _ <close> = noting("outer")
        local inner = co.create(function()
          local _ <close> = noting("inner")
          loc.value = "inner"
          weak[co.running()] = true
          line = here(1)
          flow.TaskCompletionSource().task:await()
        end)
        loc.value = "outer"
        co.resume(inner)
      end)
      outer()
    end)
    flow.yield()
    flow.yield()
    assert.same({}, log)
    collect()
    is_error("TaskAbandoned", reported, line)
    assert.same({ "inner inner InvalidOperation", "outer outer InvalidOperation", "task task InvalidOperation" }, log)
    collect()
    assert.is_nil(next(weak))
  end))

  it("survives variables that raise", in_task(function()
    local log, note = recorder()
    flow.on_unobserved_exception(false)
    local _ <close> = closing(function() flow.on_unobserved_exception(nil) end)
    flow.spawn(function()
      local _ <close> = closing(function() note("task") error("task") end)
      co.wrap(function()
        local _ <close> = closing(function() note("outer") error("outer") end)
        co.wrap(function()
          local _ <close> = closing(function() note("inner") error("inner") end)
          flow.TaskCompletionSource().task:await()
        end)()
      end)()
    end)
    flow.yield()
    collect()
    assert.same({ "inner", "outer", "task" }, log)
  end))

  it("goes on if what it awaits there is alive", helper.in_order(function()
    local gate = flow.TaskCompletionSource()
    local got
    flow.spawn(function() got = co.wrap(function() return gate.task:await() end)() end)
    flow.yield()
    collect()
    gate:set_result("value")
    flow.yield()
    assert.equal("value", got)
  end))
end)

describe("an unfinished generator", function()
  it("is collected, with what it holds", in_task(function()
    local weak = setmetatable({}, { __mode = "v" })
    for i = 1, 20 do
      local g = co.wrap(function()
        local held = { i }
        weak[i] = held
        flow.yield()
        co.yield()
        return held
      end)
      g()
    end
    collect()
    assert.same({}, weak)
  end))

  it("is left alone when the state closes, wherever it stands", function()
    assert.equal("main\nheld closed\ntask closed\n", helper.output [[
      local flow = require "coflow"
      local co = flow.coroutine
      local function closing(text) return setmetatable({}, { __close = function() print(text) end }) end
      kept = {}
      flow.run(function()
        kept.yielded = co.wrap(function() local _ <close> = closing("never") co.yield() end)
        kept.yielded()
        kept.gate = flow.TaskCompletionSource()
        kept.task = flow.spawn(function()
          local _ <close> = closing("task closed")
          co.wrap(function() local _ <close> = closing("held closed") kept.gate.task:await() end)()
        end)
        flow.yield()
      end)
      print("main")
      os.exit(0, true)
    ]])
  end)

  it("may end the process from inside", function()
    assert.equal("inner\nouter\ntask\n", helper.output [[
      local flow = require "coflow"
      local co = flow.coroutine
      local function closing(text) return setmetatable({}, { __close = function() print(text) end }) end
      flow.run(function()
        local _ <close> = closing("task")
        flow.yield()
        co.wrap(function()
          local _ <close> = closing("outer")
          flow.yield()
          co.wrap(function()
            local _ <close> = closing("inner")
            flow.yield()
            os.exit(0, true)
          end)()
        end)()
      end)
    ]])
  end)
end)

-- Tracebacks --------------------------------------------------------------------------------------

describe("the async traceback", function()
  local function in_order(text, ...)
    local from = 1
    for _, word in ipairs { ... } do
      local _, last = text:find(word, from, true)
      assert.truthy(last, ("'%s' is not there, or not in its place:\n%s"):format(word, text))
      from = last + 1
    end
    return text
  end

  it("of a waiting task goes through its generators, innermost first", helper.in_order(function()
    local gate, lines = flow.TaskCompletionSource(), {}
    local task = flow.spawn(function()
      lines[3] = here(7)
      local outer = co.wrap(function()
        local inner = co.create(function()
          lines[1] = here(1)
          gate.task:await()
        end)
        lines[2] = here(1) co.resume(inner) end)
      outer()
    end)
    lines[2] = nil
    flow.yield()
    in_order(task:traceback(), "waiting", lines[1], lines[3])
    local waiter = flow.spawn(function() return task:await() end)
    flow.yield()
    gate:set_result()
    waiter:await()
  end))

  it("of the running task does too", in_task(function()
    local inner, outer, text
    outer = here(1)
    co.wrap(function() inner = here() text = flow.current_task():traceback() end)()
    in_order(text, "running", inner, outer)
  end))

  it("of a failed task shows where the error was raised, and how it came out", in_task(function()
    local lines = {}
    local function make(wrap)
      return flow.spawn(function()
        local inner = co.create(function()
          flow.yield()
          lines[1] = here(1)
          error(wrap and "text" or { "object" })
        end)
        local outer = co.wrap(function()
          local ok, err = co.resume(inner)
          lines[2] = here(1)
          if not ok then error(err, 0) end
        end)
        lines[3] = here(1)
        outer()
      end)
    end
    for _, wrap in ipairs { true, false } do
      local task = make(wrap)
      task:try_await()
      in_order(task:traceback(), "in task", lines[1], lines[2], lines[3])
      assert.is_nil(task:traceback():find("awaited by", 1, true))
    end
  end))

  it("of an error that was awaited in a generator has the awaited task first", in_task(function()
    local lines = {}
    local task = flow.spawn(function()
      local child = flow.spawn(function()
        flow.yield()
        lines[1] = here(1)
        error("child")
      end)
      lines[3] = here(4)
      co.wrap(function()
        lines[2] = here(1)
        child:await() end)
      ()
    end)
    task:try_await()
    in_order(task:traceback(), "in task", lines[1], "awaited by task", lines[2])
  end))

  it("goes on from where a group in a generator caught the error, out of the generator", in_task(function()
    local lines = {}
    local function wrapped(fn) co.wrap(fn)() end
    local function resumed(fn) error(select(2, co.resume(co.create(fn)))) end
    for _, call in ipairs { wrapped, resumed } do
      local task = flow.spawn(function()
        lines[2] = here(1)
        call(function()
          flow.task_group(function()
            lines[1] = here(1)
            error({ "object" })
          end)
        end)
      end)
      task:try_await()
      in_order(task:traceback(), "in task", lines[1], lines[2])
      assert.is_nil(task:traceback():find("awaited by", 1, true), task:traceback())
    end
  end))

  it("has where the error was raised that something of the library held up to close itself", in_task(function()
    local lines = {}
    local function fails()
      lines[1] = here(1)
      error("broken", 0)
    end
    local stream, lock = flow.stream, flow.Lock()
    for _, fn in ipairs {
      function() stream.from({ 1 }):for_each(fails) end,
      function() stream.from({ 1 }):map(fails):iterate()() end,
      function() lock:run(fails) end,
    } do
      local task = flow.spawn(function()
        local ok, err = co.resume(co.create(fn))
        lines[2] = here(1)
        if not ok then error(err, 0) end
      end)
      task:try_await()
      in_order(task:traceback(), "in task", lines[1], lines[2])
    end
  end))

  it("does not grow for ever where equal strings are raised in a loop", in_task(function()
    local task = flow.spawn(function()
      for _ = 1, 3000 do co.resume(co.create(function() error("equal", 0) end)) end
      error("equal", 0)
    end)
    task:try_await()
    assert.is_true(#task:traceback() < 100000)
  end))

  it("does not mix errors up: one that was caught is not told", in_task(function()
    local task = flow.spawn(function()
      pcall(co.wrap(function() error("caught") end))
      error("other")
    end)
    local line = here(-3)
    task:try_await()
    assert.is_nil(task:traceback():find(line .. ": in", 1, true))
  end))
end)

-- In place of the global library ------------------------------------------------------------------

describe("install", function()
  local function copy()
    local fields = {}
    for key, value in pairs(coroutine) do fields[key] = value end
    return fields
  end

  it("puts our functions into the global library, and uninstall puts it back", in_task(function()
    local before = copy()
    co.install()
    local _ <close> = closing(co.uninstall)
    for name in pairs(before) do assert.equal(co[name], coroutine[name], name) end
    assert.is_nil(rawget(coroutine, "install"))
    assert.same({ 1, 2 }, list(counter(2, coroutine)))
    co.install()
    co.uninstall()
    assert.same(before, copy())
    co.uninstall()
    assert.same(before, copy())
    raises("InvalidOperation", counter(1, coroutine))
  end))

  -- luacheck: push ignore 122
  it("puts back what was there, nothing included", function()
    local close, status = coroutine.close, coroutine.status
    local _ <close> = closing(function() coroutine.close, coroutine.status = close, status end)
    coroutine.close, coroutine.status = nil, print
    co.install()
    co.uninstall()
    assert.is_nil(coroutine.close)
    assert.equal(print, coroutine.status)
  end)
  -- luacheck: pop

  it("lets code await that knows nothing of it", in_task(function()
    local library = assert(load([[
      local M = {}
      function M.each(list, fn)
        return coroutine.wrap(function()
          for _, v in ipairs(list) do coroutine.yield(fn(v)) end
        end)
      end
      return M
    ]]))()
    co.install()
    local _ <close> = closing(co.uninstall)
    local function slow(v)
      flow.sleep(0.1)
      return v * 2
    end
    assert.same({ 2, 4 }, list(library.each({ 1, 2 }, slow)))
  end))
end)

describe("flow", function()
  it("loads its modules at first use", function()
    assert.equal("true nil nil true\n", helper.output [[
      local flow = require "coflow"
      local before = package.loaded["coflow.coroutine"] == nil
      local missing, other = flow.nothing, flow.init
      print(table.concat({ tostring(before), tostring(missing), tostring(other),
        tostring(flow.coroutine == require "coflow.coroutine") }, " "))
    ]])
  end)
end)

describe("a wrapped coroutine that is first resumed where no C call fits any more", function()
  for _, lib in ipairs { coroutine, co } do
    it("can be resumed later, " .. (lib == co and "ours" or "Lua's"), function()
      local gen = lib.wrap(function(...) return "ran", ... end)
      local refused
      local function deep() return (("a"):gsub("a", function() deep() end)) end
      xpcall(deep, function() refused = refused or { pcall(gen, 1) } end)
      assert.is_false(refused[1])
      assert.truthy(tostring(refused[2]):find("C stack overflow", 1, true), refused[2])
      assert.same({ "ran", 1, print }, { gen(1, print) })
    end)
  end
end)

describe("Lua's own coroutine.yield in a coroutine of ours", function()
  local stray = coroutine.yield
  local seen = flow.AsyncLocal()
  local scopes = {
    with_timeout = function(fn) return flow.with_timeout(1, fn) end,
    with_cancellation = function(fn) return flow.with_cancellation(flow.CancellationToken.none, fn) end,
    shield = function(fn) return flow.shield(fn) end,
    task_group = function(fn) return flow.task_group(fn) end,
  }

  it("works where no scope is open", in_task(function()
    local gen = co.wrap(function()
      flow.with_timeout(1, flow.yield)
      stray(1)
      stray(2)
    end)
    assert.same({ 1, 2 }, { gen(), gen() })
  end))

  for name, scope in pairs(scopes) do
    it("out of " .. name .. " ends it: its scope reaches nobody else", in_task(function()
      local closed = 0
      local function body()
        scope(function()
          local _ <close> = helper.closing(function() closed = closed + 1 end)
          stray(1)
        end)
      end
      local function check(ok, err)
        assert.is_false(ok)
        helper.is_error("InvalidOperation", err, "coroutine_spec.lua:", "has left the scope opened at")
        assert.is_nil(flow.deadline())
        assert.equal(flow.CancellationToken.none, flow.shield(flow.cancellation_token))
        flow.sleep(5)
      end
      local made = co.create(body)
      check(co.resume(made))
      assert.equal("dead", co.status(made))
      check(pcall(co.wrap(body)))
      assert.equal(2, closed)
    end))
  end

  it("out of a value set for a block ends it, where the context is the resumer's", in_task(function()
    local made = co.create(function() seen:run("inner", stray, 1) end, { context = "caller" })
    local ok, err = co.resume(made)
    assert.is_false(ok)
    helper.is_error("InvalidOperation", err, "has left the scope opened at")
    assert.is_nil(seen:get())
    made = co.create(function() seen:run("inner", stray, 1) end) -- its own context: no scope of others
    assert.same({ true, 1 }, { co.resume(made) })
    assert.is_nil(seen:get())
  end))
end)

describe("a coroutine that dies of an error in a call of the library", function()
  local seen = flow.AsyncLocal()
  local function fail() error("boom", 0) end
  local function dies(lib, options, fn, ...)
    assert.same({ false, "boom" }, { lib.resume(lib.create(fn, options), ...) })
  end

  local checks = {
    ["gives a lock back"] = function()
      local lock = flow.Lock()
      for _, lib in ipairs { co, coroutine } do
        dies(lib, nil, lock.run, lock, fail)
        assert(lock:try_lock(), "it is held"):dispose()
      end
    end,
    ["gives a place in a bulkhead back"] = function()
      local bulkhead = flow.resilience.bulkhead { max_concurrency = 1 }
      for _, lib in ipairs { co, coroutine } do
        dies(lib, nil, bulkhead.execute, bulkhead, fail)
        assert.equal("in", bulkhead:execute(function() return "in" end))
      end
    end,
    ["puts its caller's context back"] = function()
      local other = flow.ExecutionContext.capture()
      seen.value = "before"
      local caller = { context = "caller" }
      dies(co, caller, seen.run, seen, "run", fail)
      assert.equal("before", seen.value)
      dies(co, caller, flow.call, function()
        seen.value = "call"
        fail()
      end)
      assert.equal("before", seen.value)
      dies(co, caller, other.run, other, fail)
      assert.equal("before", seen.value)
      seen.value = nil
    end,
  }
  for name, check in pairs(checks) do
    it(name, in_task(check))
    if not name:find("bulkhead") then it(name .. ", outside every task", check) end
  end
end)
