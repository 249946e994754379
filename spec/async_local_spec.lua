-- AsyncLocal: who sees a value, how it is put back, who is told of changes, and what keeps it alive.

local flow = require "coflow"
local helper = require "spec.helper"
local support = require "spec.support.flow_support"

local in_task, raises, bad_argument = support.in_task, support.raises, support.bad_argument
local in_order = support.in_order
local recorder, collect, weak, alive = support.recorder, support.collect, support.weak, support.alive
local ExecutionContext = flow.ExecutionContext
local capture = ExecutionContext.capture

describe("AsyncLocal()", function()
  it("reads as nil until it is set", in_task(function()
    local loc = flow.AsyncLocal()
    assert.is_nil(loc.value)
    assert.is_nil(loc:get())
  end))

  it("reads as its default until it is set, and again once it is removed", in_task(function()
    local loc = flow.AsyncLocal { default = "none" }
    assert.equal("none", loc.value)
    loc.value = "some"
    assert.equal("some", loc:get())
    loc:set(nil)
    assert.equal("none", loc.value)
  end))

  it("keeps false apart from nil and from the default", in_task(function()
    local loc = flow.AsyncLocal { default = true }
    loc.value = false
    assert.is_false(loc.value)
    loc.value = nil
    assert.is_true(loc.value)
    assert.is_false(flow.AsyncLocal { default = false }.value)
  end))

  it("may have a name, which changes nothing", in_task(function()
    local one, two = flow.AsyncLocal("user"), flow.AsyncLocal { name = "tenant" }
    one.value, two.value = 1, 2
    assert.same({ 1, 2 }, { one.value, two.value })
  end))

  it("sets and gets through the field and through the methods alike", in_task(function()
    local loc = flow.AsyncLocal()
    loc.value = 1
    assert.equal(1, loc:get())
    loc:set(2)
    assert.equal(2, loc.value)
  end))

  it("takes any kind of value and gives back the same one", in_task(function()
    local loc = flow.AsyncLocal()
    local values = { 0, -1.5, math.huge, "", "text", true, false, {}, print, io.stdout,
      coroutine.create(print), flow.AsyncLocal() }
    for _, value in ipairs(values) do
      loc.value = value
      assert.is_true(rawequal(value, loc.value))
    end
    loc.value = 0 / 0
    assert.is_true(loc.value ~= loc.value)
  end))

  it("tells values apart with rawequal, whatever their __eq says", in_task(function()
    local loc = flow.AsyncLocal()
    local same = { __eq = function() return true end }
    local one, two = setmetatable({}, same), setmetatable({}, same)
    loc.value = one
    loc.value = two
    assert.is_true(rawequal(two, loc.value))
  end))

  it("can be read and set outside every task", function()
    local loc = flow.AsyncLocal { default = "none" }
    loc.value = 1
    assert.equal(1, loc.value)
    loc.value = nil
    assert.equal("none", loc.value)
  end)

  it("refuses wrong arguments, and names an unknown option", function()
    bad_argument(1, "AsyncLocal", function() local _ = flow.AsyncLocal(true) end)
    bad_argument(1, "AsyncLocal", function() local _ = flow.AsyncLocal(print) end)
    bad_argument(1, "AsyncLocal", function() local _ = flow.AsyncLocal { colour = 1 } end, "colour")
    bad_argument(1, "AsyncLocal", function() local _ = flow.AsyncLocal { name = {} } end, "name")
    bad_argument(1, "AsyncLocal", function() local _ = flow.AsyncLocal { flow = "up" } end, "flow")
    bad_argument(1, "AsyncLocal", function()
      local _ = flow.AsyncLocal { value_changed = 1 }
    end, "value_changed")
  end)

  it("has methods that refuse a wrong self", function()
    local loc = flow.AsyncLocal()
    bad_argument(1, "get", function() loc.get({}) end)
    bad_argument(1, "set", function() loc.set(nil, 1) end)
    bad_argument(1, "with", function() loc.with("x", 1) end)
    bad_argument(1, "run", function() loc.run(1, 1, print) end)
  end)
end)

describe("the flow of an async local", function()
  local loc
  before_each(function() loc = flow.AsyncLocal() end)

  it("carries the values at the moment of spawn, not those at the start", in_task(function()
    loc.value = "at spawn"
    local task = flow.spawn(function() return loc.value end)
    loc.value = "later"
    assert.equal("at spawn", task:await())
  end))

  it("never shows a child's writes to its parent or its siblings", in_task(function()
    loc.value = "parent"
    local one = flow.spawn(function()
      loc.value = "one"
      flow.yield()
      return loc.value
    end)
    local two = flow.spawn(function()
      flow.yield()
      return loc.value
    end)
    assert.same({ "one", "parent", "parent" }, { one:await(), two:await(), loc.value })
  end))

  it("never shows a parent's later writes to a child already running", in_task(function()
    local events, record = recorder()
    loc.value = 1
    local child = flow.spawn(function()
      for _ = 1, 3 do
        record(loc.value)
        flow.yield()
      end
    end)
    for value = 2, 4 do
      loc.value = value
      flow.yield()
    end
    child:await()
    assert.same({ 1, 1, 1 }, events)
    assert.equal(4, loc.value)
  end))

  it("reaches grandchildren, each with the values of whoever started it", in_task(function()
    loc.value = 1
    local grandchild = flow.spawn(function()
      loc.value = loc.value + 1
      return flow.spawn(function()
        loc.value = loc.value + 1
        return loc.value
      end):await() * 10 + loc.value
    end)
    assert.equal(32, grandchild:await())
    assert.equal(1, loc.value)
  end))

  it("shares a table by reference", in_task(function()
    loc.value = { count = 0 }
    flow.spawn(function() loc.value.count = loc.value.count + 1 end):await()
    flow.async(function() loc.value.count = loc.value.count + 1 end)():await()
    assert.equal(2, loc.value.count)
  end))

  it("shows what a plain function sets to its caller: 2, 2, 2", in_task(function()
    local events, record = recorder()
    local function method_b()
      loc.value = 2
      record(loc.value)
    end
    local function method_a()
      loc.value = 1
      method_b()
      record(loc.value)
    end
    method_a()
    record(loc.value)
    assert.same({ 2, 2, 2 }, events)
  end))

  for _, how in ipairs { "suspend", "do not suspend" } do
    it("hides what async functions set from their callers, when they " .. how .. ": 2, 1, nil",
      in_task(function()
        local events, record = recorder()
        local pause = how == "suspend" and flow.yield or function() end
        local method_b = flow.async(function()
          loc.value = 2
          pause()
          record(tostring(loc.value))
        end)
        local method_a = flow.async(function()
          loc.value = 1
          pause()
          method_b():await()
          record(tostring(loc.value))
        end)
        method_a():await()
        record(tostring(loc.value))
        assert.same({ "2", "1", "nil" }, events)
      end))
  end

  it("is isolated by flow.call on the same task: 2, 1, nil", in_task(function()
    local events, record = recorder()
    local me = flow.current_task()
    flow.call(function()
      loc.value = 1
      flow.call(function()
        loc.value = 2
        flow.yield()
        assert.equal(me, flow.current_task())
        record(tostring(loc.value))
      end)
      record(tostring(loc.value))
    end)
    record(tostring(loc.value))
    assert.same({ "2", "1", "nil" }, events)
  end))

  it("is put back when flow.call or an async function ends with an error", in_task(function()
    local problem = {}
    local function fail()
      loc.value = "inside"
      error(problem)
    end
    loc.value = "outside"
    local ok, err = pcall(flow.call, fail)
    assert.is_false(ok)
    assert.equal(problem, err)
    assert.equal("outside", loc.value)
    assert.same({ false, problem }, { flow.async(fail)():try_await() })
    assert.equal("outside", loc.value)
  end))

  it("keeps what a failing plain function had set", in_task(function()
    pcall(function()
      loc.value = "set"
      error("then failed")
    end)
    assert.equal("set", loc.value)
  end))

  it("is back at its caller's value as soon as a hot function first suspends", in_task(function()
    loc.value = "caller"
    local hot = flow.async(function()
      loc.value = "hot"
      flow.yield()
      return loc.value
    end)
    local task = hot()
    assert.equal("caller", loc.value)
    assert.equal("hot", task:await())
  end))

  it("is the same after an await, whoever completes the awaited task", in_task(function()
    local source = flow.TaskCompletionSource()
    loc.value = "waiter"
    local waiter = flow.spawn(function()
      source.task:await()
      return loc.value
    end)
    flow.yield()
    local completer = flow.spawn(function()
      loc.value = "completer"
      source:set_result()
      return loc.value
    end)
    loc.value = "root"
    assert.same({ "waiter", "completer" }, { waiter:await(), completer:await() })
    assert.equal("root", loc.value)
  end))

  it("reaches continue_with as it was at the call, and keeps its writes there", in_task(function()
    local source = flow.TaskCompletionSource()
    loc.value = "at the call"
    local continuation = source.task:continue_with(function()
      local seen = loc.value
      loc.value = "inside"
      return seen
    end)
    loc.value = "later"
    source:set_result()
    assert.equal("at the call", continuation:await())
    assert.equal("later", loc.value)
  end))

  it("keeps a thousand interleaved tasks apart", in_task(function()
    local n, other, tasks, wrong = support.many(1000), flow.AsyncLocal(), {}, 0
    for i = 1, n do
      loc.value = i
      tasks[i] = flow.spawn(function()
        other.value = -i
        for round = 1, 3 do
          flow.yield()
          if loc.value ~= i + round - 1 or other.value ~= -i then wrong = wrong + 1 end
          loc.value = i + round
        end
      end)
    end
    for i = 1, n do tasks[i]:await() end
    assert.equal(0, wrong)
    assert.equal(n, loc.value)
    assert.is_nil(other.value)
  end))

  it("starts every new task clean when nothing is set", in_task(function()
    for i = 1, 50 do
      flow.spawn(function() loc.value = i end):await()
      assert.is_nil(flow.spawn(function() return loc.value end):await())
      assert.is_nil(flow.async(function() return loc.value end)():await())
    end
  end))
end)

describe("AsyncLocal:with", function()
  local loc
  before_each(function() loc = flow.AsyncLocal() end)

  it("holds for the rest of the block, across awaits", in_task(function()
    loc.value = "before"
    do
      local _ <close> = loc:with("inside")
      assert.equal("inside", loc.value)
      flow.yield()
      assert.equal("inside", loc.value)
    end
    assert.equal("before", loc.value)
  end))

  it("keeps what it has put back no longer, though somebody has the handle", in_task(function()
    local values = weak()
    values[1] = {}
    loc.value = values[1]
    local handle = loc:with("inside")
    handle:dispose()
    assert.equal(values[1], loc.value)
    loc.value = nil
    assert.equal(0, alive(values))
    handle:dispose()
  end))

  it("puts back nothing when there was nothing", in_task(function()
    local empty = capture()
    do
      local _ <close> = loc:with(1)
    end
    assert.is_nil(loc.value)
    assert.equal(empty, capture())
  end))

  it("is put back by break, return and error alike", in_task(function()
    local problem = {}
    for i = 1, 3 do
      local _ <close> = loc:with(i)
      if i == 2 then break end
    end
    assert.is_nil(loc.value)
    local function returns()
      local _ <close> = loc:with(2)
      return loc.value
    end
    assert.equal(2, returns())
    assert.is_nil(loc.value)
    local _, err = pcall(function()
      local _ <close> = loc:with(3)
      error(problem)
    end)
    assert.equal(problem, err)
    assert.is_nil(loc.value)
  end))

  it("nests", in_task(function()
    local events, record = recorder()
    do
      local _ <close> = loc:with(1)
      do
        local _ <close> = loc:with(2)
        do
          local _ <close> = loc:with(nil)
          record(tostring(loc.value))
        end
        record(tostring(loc.value))
      end
      record(tostring(loc.value))
    end
    record(tostring(loc.value))
    assert.same({ "nil", "2", "1", "nil" }, events)
  end))

  it("puts back its own local only, whatever was set inside", in_task(function()
    local other = flow.AsyncLocal()
    loc.value = "before"
    do
      local _ <close> = loc:with("inside")
      loc.value = "set inside"
      other.value = "kept"
    end
    assert.equal("before", loc.value)
    assert.equal("kept", other.value)
  end))

  it("is also undone by dispose, and twice is harmless", in_task(function()
    loc.value = "before"
    local scope = loc:with("inside")
    scope:dispose()
    assert.equal("before", loc.value)
    loc.value = "after"
    scope:dispose()
    assert.equal("after", loc.value)
  end))

  it("refuses dispose out of order, and changes nothing then", in_task(function()
    local outer = loc:with("outer")
    local inner = loc:with("inner")
    raises("InvalidOperation", function() outer:dispose() end)
    assert.equal("inner", loc.value)
    inner:dispose()
    assert.equal("outer", loc.value)
    outer:dispose()
    assert.is_nil(loc.value)
  end))

  it("tells handlers that are called through __call", in_task(function()
    local seen
    local handler = setmetatable({}, { __call = function(_, args) seen = args.current_value end })
    flow.AsyncLocal({ value_changed = handler }).value = 3
    assert.equal(3, seen)
  end))

  it("is not ended by a `<close>` variable of another task", in_task(function()
    local scope = loc:with(1)
    local other = flow.spawn(function() local _ <close> = scope end)
    raises("InvalidOperation", flow.await, other)
    assert.equal(1, loc.value)
    scope:dispose()
    assert.is_nil(loc.value)
  end))

  it("refuses dispose from another task, and changes nothing then", in_task(function()
    local scope = loc:with("mine")
    flow.spawn(function()
      raises("InvalidOperation", function() scope:dispose() end)
      assert.equal("mine", loc.value)
    end):await()
    assert.equal("mine", loc.value)
    scope:dispose()
    assert.is_nil(loc.value)
  end))

  it("refuses dispose from another task also when its own has ended", in_task(function()
    local context = loc:run(9, flow.ExecutionContext.capture)
    for _, open in ipairs {
      function() return loc:with("gone") end, function() return context:enter() end,
    } do
      for _, scope in ipairs { flow.spawn(open):await(), flow.async(open)():await() } do
        local err = raises("InvalidOperation", function() scope:dispose() end)
        assert.equal("this scope was opened in another task: dispose of it there", err.message)
        loc.value = "mine"
        do local _ <close> = scope end -- nothing is left to be put back
        assert.equal("mine", loc.value)
      end
    end
  end))

  it("refuses dispose to the generator of its task, and the reverse", in_task(function()
    local scope, inner = loc:with("mine")
    local generator = flow.coroutine.wrap(function()
      local err = raises("InvalidOperation", function() scope:dispose() end)
      assert.equal("this scope was opened outside this coroutine: dispose of it there", err.message)
      inner = loc:with("the generator's")
      flow.coroutine.yield()
      inner:dispose()
      return loc.value
    end)
    generator()
    local err = raises("InvalidOperation", function() inner:dispose() end)
    assert.equal("this scope was opened in another coroutine: dispose of it there", err.message)
    assert.equal("mine", generator())
    scope:dispose()
    assert.is_nil(loc.value)
  end))

  it("puts its value back at __close, also over inner ones that were never closed",
    in_task(function()
      loc.value = "before"
      do
        local _ <close> = loc:with("outer")
        loc:with("inner")
        loc:with("innermost")
      end
      assert.equal("before", loc.value)
    end))

  it("orders each task's scopes on their own", in_task(function()
    local outer = loc:with("parent")
    local child = flow.spawn(function()
      local inner = loc:with("child")
      flow.yield()
      flow.yield()
      inner:dispose()
      return loc.value
    end)
    flow.yield()
    outer:dispose()
    assert.is_nil(loc.value)
    assert.equal("parent", child:await())
  end))

  it("is seen by what is started inside the block, and outlives the block there", in_task(function()
    local task
    do
      local _ <close> = loc:with("inside")
      task = flow.spawn(function()
        flow.yield()
        flow.yield()
        return loc.value
      end)
    end
    assert.is_nil(loc.value)
    assert.equal("inside", task:await())
  end))
end)

describe("AsyncLocal:run", function()
  local loc
  before_each(function() loc = flow.AsyncLocal() end)

  it("passes arguments and results, nil included", in_task(function()
    local results = table.pack(loc:run("v", function(...)
      return loc.value, select("#", ...), ...
    end, nil, 2, nil))
    assert.same({ "v", 3, nil, 2, nil, n = 5 }, results)
  end))

  it("puts the value back on return and on error", in_task(function()
    local problem = {}
    loc.value = "before"
    loc:run("inside", function() loc.value = "changed inside" end)
    assert.equal("before", loc.value)
    local ok, err = pcall(loc.run, loc, "inside", function() error(problem) end)
    assert.is_false(ok)
    assert.equal(problem, err)
    assert.equal("before", loc.value)
  end))

  it("hides the value when it is nil", in_task(function()
    loc.value = "before"
    assert.equal("nil", loc:run(nil, function() return tostring(loc.value) end))
    assert.equal("before", loc.value)
  end))

  it("may suspend", in_task(function()
    local other = flow.spawn(function()
      flow.yield()
      return loc.value
    end)
    local seen = loc:run(1, function()
      flow.sleep(1)
      return loc.value
    end)
    assert.equal(1, seen)
    assert.is_nil(loc.value)
    assert.is_nil(other:await())
  end))

  it("works 10,000 deep in one task, with a suspension at the bottom", in_task(function()
    local n = support.many(10000)
    local function nest(depth)
      if depth == 0 then
        flow.yield()
        return loc.value
      end
      local seen = loc:run(depth, nest, depth - 1)
      if loc.value ~= (depth < n and depth + 1 or nil) then error("not put back") end
      return seen
    end
    assert.equal(1, nest(n))
    assert.is_nil(loc.value)
  end))

  it("lets an error out of 10,000 levels and puts everything back", in_task(function()
    local problem = {}
    local function nest(depth)
      if depth == 0 then error(problem) end
      loc:run(depth, nest, depth - 1)
    end
    local _, err = pcall(nest, support.many(10000))
    assert.equal(problem, err)
    assert.is_nil(loc.value)
  end))

  it("refuses what is not a function, and sets nothing then", in_task(function()
    bad_argument(2, "run", function() loc:run(1) end)
    bad_argument(2, "run", function() loc:run(1, "f") end)
    assert.is_nil(loc.value)
  end))
end)

describe("value_changed", function()
  -- An async local whose notifications are recorded as "previous>current", "!" when the context changed.
  local function observed(record, name)
    local loc
    loc = flow.AsyncLocal {
      value_changed = function(args)
        assert.equal(args.current_value, loc.value)
        record(("%s%s>%s%s"):format(name or "", args.previous_value, args.current_value,
          args.context_changed and "!" or ""))
      end,
    }
    return loc
  end

  it("is told of every set, with the new value already in place", in_task(function()
    local events, record = recorder()
    local loc = observed(record)
    loc.value = 1
    loc:set(2)
    loc.value = nil
    assert.same({ "nil>1", "1>2", "2>nil" }, events)
  end))

  it("gets a real boolean as context_changed", in_task(function()
    local flags = {}
    local loc = flow.AsyncLocal {
      value_changed = function(args) flags[#flags + 1] = args.context_changed end,
    }
    local empty = capture()
    loc.value = 1
    empty:run(function() end)
    loc.value = nil
    assert.same({ false, true, true, false }, flags)
  end))

  it("is not told of a set to the same value, nor of other locals", in_task(function()
    local events, record = recorder()
    local loc, other = observed(record), flow.AsyncLocal()
    local value = {}
    loc.value = nil
    loc.value = value
    events[1] = nil
    loc.value = value
    other.value = 1
    other.value = nil
    assert.same({}, events)
    loc.value = nil
  end))

  it("is told twice round a run: entering and leaving", in_task(function()
    local events, record = recorder()
    local loc = observed(record)
    loc.value = 1
    local context = capture()
    loc.value = 2
    context:run(function() record("in") end)
    record("out")
    assert.same({ "nil>1", "1>2", "2>1!", "in", "1>2!", "out" }, events)
  end))

  it("is told nothing by a run that does not change the value", in_task(function()
    local events, record = recorder()
    local loc, other = observed(record), flow.AsyncLocal()
    loc.value = 1
    local context = capture()
    other.value = 1
    context:run(function() end)
    assert.same({ "nil>1" }, events)
  end))

  it("is told before an error leaves a run", in_task(function()
    local events, record = recorder()
    local loc = observed(record)
    local empty = capture()
    loc.value = 1
    pcall(empty.run, empty, function()
      loc.value = 2
      error("out")
    end)
    record("caught")
    assert.same({ "nil>1", "1>nil!", "nil>2", "2>1!", "caught" }, events)
  end))

  it("is told when a hot function returns to its caller", in_task(function()
    local events, record = recorder()
    local loc = observed(record)
    local task = flow.async(function() loc.value = 1 end)()
    record("returned")
    task:await()
    assert.same({ "nil>1", "1>nil!", "returned" }, events)
  end))

  it("sees an unbroken chain of values while tasks take turns", in_order(function()
    local last, broken, count = nil, 0, 0
    local loc
    loc = flow.AsyncLocal {
      value_changed = function(args)
        if args.previous_value ~= last or args.current_value == last then broken = broken + 1 end
        last, count = args.current_value, count + 1
      end,
    }
    local function turns(value)
      for _ = 1, 5 do
        loc.value = value
        flow.yield()
        assert.equal(value, last)
      end
    end
    local tasks = {}
    for i = 1, 3 do tasks[i] = flow.spawn(turns, i) end
    turns(4)
    for i = 1, 3 do tasks[i]:await() end
    assert.equal(4, last)
    assert.equal(0, broken)
    assert.is_true(count >= 4 * 5)
  end))

  it("asks the locals of the old context first, then those only in the new one", in_task(function()
    local events, record = recorder()
    local a, b, c = observed(record, "a "), observed(record, "b "), observed(record, "c ")
    c.value, b.value = 1, 1
    local context = capture()
    c.value, b.value = nil, nil
    a.value, b.value = 2, 2
    for i = #events, 1, -1 do events[i] = nil end
    context:run(function() record("in") end)
    local entering = table.move(events, 1, 3, 1, {})
    assert.equal("c nil>1!", entering[3])
    table.sort(entering)
    assert.same({ "a 2>nil!", "b 2>1!", "c nil>1!" }, entering)
    assert.equal("in", events[4])
    assert.equal("a nil>2!", events[7])
  end))

  it("may set its local during a switch, and the new value sticks", in_task(function()
    local loc
    loc = flow.AsyncLocal {
      value_changed = function(args)
        if args.context_changed and args.current_value == "captured" then loc.value = "replaced" end
      end,
    }
    loc.value = "captured"
    local context = capture()
    loc.value = "outer"
    assert.equal("replaced", context:run(function() return loc.value end))
    assert.equal("outer", loc.value)
    assert.equal("captured", context:get(loc))
  end))

  it("may set other locals during a switch", in_task(function()
    local mirror = flow.AsyncLocal()
    local loc = flow.AsyncLocal {
      value_changed = function(args) mirror.value = args.current_value end,
    }
    loc.value = "captured"
    local context = capture()
    loc.value = "outer"
    assert.equal("captured", context:run(function() return mirror.value end))
    assert.equal("outer", mirror.value)
  end))

  it("may not suspend", in_task(function()
    local armed = true
    local loc = flow.AsyncLocal {
      value_changed = function()
        if armed then flow.yield() end
      end,
    }
    raises("InvalidOperation", function() loc.value = 1 end)
    assert.equal(1, loc.value)
    armed = false
    loc.value = nil
  end))

  it("raises its error to whoever sets, and the new value stays", in_task(function()
    local problem = {}
    local loc = flow.AsyncLocal { value_changed = function() error(problem) end }
    local ok, err = pcall(function() loc.value = 1 end)
    assert.is_false(ok)
    assert.equal(problem, err)
    assert.equal(1, loc.value)
    pcall(loc.set, loc, nil)
    assert.is_nil(loc.value)
  end))

  it("has its error in a switch reported with task nil, and the switch goes on", function()
    support.with_reports(function(reports)
      in_task(function()
        local problem, armed = {}, true
        local bad = flow.AsyncLocal {
          value_changed = function(args)
            if args.context_changed and armed then
              armed = false
              error(problem)
            end
          end,
        }
        local events, record = recorder()
        local good = observed(record)
        local empty = capture()
        bad.value, good.value = 1, 1
        assert.equal("done", empty:run(function()
          assert.is_nil(bad.value)
          assert.is_nil(good.value)
          return "done"
        end))
        assert.same({ "nil>1", "1>nil!", "nil>1!" }, events)
        flow.yield()
        assert.equal(1, #reports)
        assert.equal(problem, reports[1].err)
        assert.is_nil(reports[1].task)
        armed = false
        bad.value, good.value = nil, nil
      end)()
    end)
  end)

  it("leaves no entry behind for nil", in_task(function()
    local loc = observed(function() end)
    local empty = capture()
    loc.value = 1
    loc.value = nil
    for _ in pairs(capture()) do error("an entry is left") end
    assert.equal(empty, capture())
  end))
end)

describe("the option flow", function()
  it("is \"task\" unless told otherwise", in_task(function()
    local plain = flow.AsyncLocal()
    local told, thread = flow.AsyncLocal { flow = "task" },
      flow.AsyncLocal { flow = "thread", name = "coflow.spec.thread" }
    plain.value, told.value, thread.value = 1, 2, 3
    assert.same({ 1, 2, 3 }, flow.spawn(function()
      return { plain.value, told.value, thread.value }
    end):await())
  end))

  it("as \"none\" keeps a value in the task that set it", in_task(function()
    local loc, flowing = flow.AsyncLocal { flow = "none", default = "none" }, flow.AsyncLocal()
    loc.value, flowing.value = "mine", "ours"
    local function look() return loc.value, flowing.value end
    assert.same({ "none", "ours" }, { flow.spawn(look):await() })
    assert.same({ "none", "ours" }, { flow.async(look)():await() })
    assert.same({ "none", "ours" }, { flow.Task.completed_task:continue_with(look):await() })
    flow.yield()
    assert.equal("mine", loc.value)
  end))

  it("as \"none\" stays out of captured contexts and of callbacks", in_task(function()
    local loc = flow.AsyncLocal { flow = "none" }
    local source <close> = flow.CancellationTokenSource()
    local events, record = recorder()
    loc.value = "mine"
    local context = capture()
    assert.is_nil(context:get(loc))
    for key in pairs(context) do assert.are_not.equal(loc, key) end
    source.token:register(function() record(tostring(loc.value)) end)
    source:cancel()
    assert.same({ "nil" }, events)
    assert.equal("mine", loc.value)
  end))

  it("as \"none\" keeps a child's value out of its parent", in_task(function()
    local loc = flow.AsyncLocal { flow = "none" }
    flow.spawn(function()
      loc.value = "child"
      flow.yield()
      assert.equal("child", loc.value)
      assert.is_nil(flow.spawn(function() return loc.value end):await())
    end):await()
    assert.is_nil(loc.value)
  end))

  it("as \"none\" works with with and run", in_task(function()
    local loc = flow.AsyncLocal { flow = "none" }
    do
      local _ <close> = loc:with(1)
      assert.equal(2, loc:run(2, function()
        flow.yield()
        return loc.value
      end))
      assert.equal(1, loc.value)
    end
    assert.is_nil(loc.value)
  end))
end)

describe("the context's copies", function()
  local random = support.random(20240)

  -- What is wrong with `context`, or with the current context, compared with the table `model`.
  local function differences(locals, model, context)
    local wrong, entries = {}, 0
    for i, loc in ipairs(locals) do
      local value
      if context then value = context:get(loc) else value = loc.value end
      if value ~= model[i] then wrong[#wrong + 1] = ("%d: %s"):format(i, tostring(value)) end
      if model[i] ~= nil then entries = entries + 1 end
    end
    for _ in pairs(context or capture()) do entries = entries - 1 end
    if entries ~= 0 then wrong[#wrong + 1] = entries .. " entries too few" end
    return wrong
  end

  local function copy(t)
    local result = {}
    for k, v in pairs(t) do result[k] = v end
    return result
  end

  for _, count in ipairs { 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 18, 31, 32, 33, 40, 63, 64, 65, 100,
    255, 256, 257, 1000 } do
    it("agree with a plain table through random changes of " .. count .. " locals",
      in_task(function()
        local empty = capture()
        local locals, model, snapshots = {}, {}, {}
        for i = 1, count do locals[i] = flow.AsyncLocal() end
        local steps = support.many(6 * count + 60, 30 + count // 10)
        for step = 1, steps do
          local i = random(count)
          local value = random(3) > 1 and random(4) or nil
          locals[i].value = value
          model[i] = value
          if locals[i].value ~= value then error(("step %d: local %d is wrong"):format(step, i)) end
          if step % (steps // 8) == 0 then
            snapshots[#snapshots + 1] = { context = capture(), model = copy(model) }
            assert.same({}, differences(locals, model))
          end
        end
        for _, i in ipairs(support.shuffled(count, random)) do locals[i].value = nil end
        assert.equal(empty, capture())
        for _, snapshot in ipairs(snapshots) do
          assert.same({}, differences(locals, snapshot.model, snapshot.context))
          snapshot.context:run(function()
            assert.same({}, differences(locals, snapshot.model))
          end)
        end
      end))
  end

  it("do not depend on the order of adding, updating and removing, for 1 to 40 locals",
    in_task(function()
      local locals, empty = {}, capture()
      local step = 27 // support.many(27, 5) -- all ways, or some for each number
      for i = 1, 40 do locals[i] = flow.AsyncLocal() end
      local function order(kind, n)
        local list = support.shuffled(n, random)
        if kind == 1 then table.sort(list) end
        if kind == 2 then table.sort(list, function(a, b) return a > b end) end
        return list
      end
      for n = 1, 40 do
        for kinds = n % step, 26, step do
          local model = {}
          for _, i in ipairs(order(kinds % 3 + 1, n)) do
            locals[i].value, model[i] = i, i
          end
          for _, i in ipairs(order(kinds // 3 % 3 + 1, n)) do
            locals[i].value, model[i] = -i, -i
          end
          local wrong = differences(locals, model)
          for _, i in ipairs(order(kinds // 9 + 1, n)) do
            locals[i].value, model[i] = nil, nil
            if locals[i].value ~= nil then wrong[#wrong + 1] = i end
            local j = random(n)
            if locals[j].value ~= model[j] then wrong[#wrong + 1] = j end
          end
          if wrong[1] or capture() ~= empty then
            error(("%d locals, orders %d: %s"):format(n, kinds, table.concat(wrong, ", ")))
          end
        end
      end
    end))

  it("branch: tasks that start from one context change it each for itself", in_task(function()
    local locals, model = {}, {}
    for i = 1, 50 do
      locals[i] = flow.AsyncLocal()
      locals[i].value, model[i] = i, i
    end
    local tasks = {}
    for t = 1, 20 do
      local mine = copy(model)
      tasks[t] = flow.spawn(function()
        for step = 1, 30 do
          local i = random(50)
          mine[i] = random(2) == 1 and t * step or nil
          locals[i].value = mine[i]
          if step % 5 == 0 then flow.yield() end
        end
        return differences(locals, mine)
      end)
    end
    for t = 1, 20 do assert.same({}, tasks[t]:await()) end
    assert.same({}, differences(locals, model))
  end))

  -- A set changes a map that nobody else can see in place. These look for a way to see it.

  local function values_of(locals)
    local values = {}
    for i, loc in ipairs(locals) do values[i] = loc.value end
    return values
  end

  for _, count in ipairs(support.many(200, 17) == 200 and { 1, 2, 8, 16, 17, 40, 200 } or { 2, 17 }) do
    it("never change once somebody has them, whoever it is, with " .. count .. " locals",
      in_task(function()
        local locals, private = {}, flow.AsyncLocal { flow = "none" }
        for i = 1, count do
          locals[i] = flow.AsyncLocal()
          if i % 4 > 0 then locals[i].value = i end
        end
        local kept, children, gate = {}, {}, flow.TaskCompletionSource()
        local change

        local function keep()
          local context = capture()
          kept[#kept + 1] = context and { context = context, model = values_of(locals) }
        end

        local function flowing()
          return ExecutionContext.is_flow_suppressed() and {} or values_of(locals)
        end

        local function child(model)
          local wrong = differences(locals, model)
          for _ = 1, 3 do change(3) end
          model = values_of(locals)
          gate.task:await()
          return wrong, differences(locals, model)
        end

        -- Runs `change` by way of fn(...), which is to put back what it finds.
        local function within(fn, ...)
          local before = values_of(locals)
          fn(...)
          for i = 1, count do
            if locals[i].value ~= before[i] then error("not put back: " .. i) end
          end
        end

        local ways = {
          keep,
          function() setmetatable({}, { __gc = keep }) end, -- in the middle of any operation
          function() private.value = random(2) == 1 and random(9) or nil end,
          function() if kept[1] then ExecutionContext.restore(kept[random(#kept)].context) end end,
          function() children[#children + 1] = flow.spawn(child, flowing()) end,
          function() children[#children + 1] = flow.async(child)(flowing()) end,
          function(depth) within(flow.call, change, depth) end,
          function(depth) private:run(random(9), change, depth) end,
          function(depth)
            local context = kept[1] and kept[random(#kept)].context
            if context then within(context.run, context, change, depth) end
          end,
          function(depth)
            local _ <close> = ExecutionContext.suppress_flow()
            change(depth)
          end,
        }

        function change(depth)
          for _ = 1, 4 do
            for _ = 1, random(4) do
              local loc, value = locals[random(count)], random(8) > 1 and random(1000) or nil
              loc.value = value
              if loc.value ~= value then error("not set") end
            end
            ways[random(depth < 3 and #ways or 4)](depth + 1)
          end
        end

        for _ = 1, support.many(20, 2) do change(0) end
        gate:set_result()
        for _, task in ipairs(children) do
          local at_start, at_end = task:await()
          assert.same({}, at_start)
          assert.same({}, at_end)
        end
        assert.is_true(#kept > 0)
        for _, one in ipairs(kept) do
          assert.same({}, differences(locals, one.model, one.context))
        end
      end))
  end

  for what, change in pairs {
    ["captures them"] = function() end,
    ["sets a local"] = function(loc) loc.value = {} end,
    ["removes a local"] = function(loc) loc.value = nil end,
    ["adds a local"] = function() flow.AsyncLocal().value = 1 end,
  } do
    it("never change when a finalizer " .. what .. " in the middle of a set", in_task(function()
      local locals, kept, finalized = {}, {}, 0
      for i = 1, 100 do
        locals[i] = flow.AsyncLocal()
        locals[i].value = i
      end
      local first, second, third = locals[1], locals[2], locals[3]
      local metatable = { __gc = function()
        finalized = finalized + 1
        if #kept == 40 then return end
        change(third)
        kept[#kept + 1] = { context = capture(), first = first.value, second = second.value }
      end }
      -- Of what these loops make, most is made by the sets.
      for i = 1, support.many(20000, 60) do
        capture()
        first.value = -i
        setmetatable({}, metatable)
        second.value = -i
        if second.value ~= -i then error("the second set is lost") end
        first.value = i
        if first.value ~= i or second.value ~= -i then error("a value is wrong") end
      end
      assert.is_true(finalized > 0)
      for _, one in ipairs(kept) do
        assert.same({ one.first, one.second }, { one.context:get(first), one.context:get(second) })
      end
      for i = 4, 100 do assert.equal(i, locals[i].value) end
    end))
  end
end)

describe("a value in a context", function()
  local loc
  before_each(function() loc = flow.AsyncLocal() end)

  it("lives while a task holds it and is freed once that task is gone", in_order(function()
    local values, gate = weak(), flow.TaskCompletionSource()
    local task = flow.spawn(function()
      loc.value = {}
      values[1] = loc.value
      gate.task:await()
    end)
    flow.yield()
    assert.equal(1, alive(values))
    gate:set_result()
    task:await()
    assert.equal(0, alive(values))
    assert.equal("ran_to_completion", task.status)
  end))

  it("is not kept by a finished task, however it ended", in_task(function()
    local values, kept = weak(), {}
    local endings = {
      function() return 1 end,
      function() error("failed") end,
      function() flow.CancellationToken.canceled:throw_if_cancellation_requested() end,
    }
    for i, ending in ipairs(endings) do
      for j, start in ipairs { flow.spawn, function(f) return flow.async(f)() end } do
        local task = start(function()
          loc.value = {}
          values[#kept + 1] = loc.value
          if i % 2 == j % 2 then flow.yield() end
          ending()
        end)
        task:try_await()
        kept[#kept + 1] = task
      end
    end
    assert.equal(0, alive(values))
    assert.equal(6, #kept)
  end))

  it("is not kept when it was only inherited by a finished task", in_task(function()
    local values = weak()
    loc.value = {}
    values[1] = loc.value
    local task = flow.spawn(flow.yield)
    loc.value = nil
    assert.equal(1, alive(values))
    task:await()
    assert.equal(0, alive(values))
  end))

  it("is freed once it is replaced", in_task(function()
    local values = weak()
    loc.value = {}
    values[1] = loc.value
    loc.value = {}
    values[2] = loc.value
    collect()
    assert.is_nil(values[1])
    assert.equal(loc.value, values[2])
    loc.value = nil
    assert.equal(0, alive(values))
  end))

  it("is not kept by a child that shadowed it", in_order(function()
    local values, gate = weak(), flow.TaskCompletionSource()
    loc.value = {}
    values[1] = loc.value
    local child = flow.spawn(function()
      loc.value = "mine"
      gate.task:await()
      return loc.value
    end)
    flow.yield()
    loc.value = nil
    assert.equal(0, alive(values))
    gate:set_result()
    assert.equal("mine", child:await())
  end))

  it("is not kept by a context captured after it was shadowed", in_task(function()
    local values = weak()
    loc.value = {}
    values[1] = loc.value
    loc.value = "shadow"
    local context = capture()
    loc.value = nil
    assert.equal(0, alive(values))
    assert.equal("shadow", context:get(loc))
  end))

  it("is kept by a captured context for as long as that lives", in_task(function()
    local values = weak()
    loc.value = {}
    values[1] = loc.value
    local context = capture()
    loc.value = nil
    assert.equal(1, alive(values))
    assert.equal(values[1], context:get(loc))
    context = nil -- luacheck: ignore
    assert.equal(0, alive(values))
  end))

  it("is freed after with and run", in_task(function()
    local values = weak()
    do
      local _ <close> = loc:with({})
      values[1] = loc.value
    end
    loc:run({}, function() values[2] = loc.value end)
    assert.equal(0, alive(values))
  end))

  it("is freed although it refers to its own context and its own local", in_task(function()
    local values = weak()
    flow.call(function()
      local own = flow.AsyncLocal()
      own.value = { own = own }
      own.value.context = capture()
      own.value.task = flow.current_task()
      own.value.wrapped = flow.ExecutionContext.wrap(function() return own end)
      values[1], values[2] = own.value, own.value.context
    end)
    assert.equal(0, alive(values))
  end))

  it("is freed when its task was started from the value itself", in_task(function()
    local values = weak()
    flow.spawn(function()
      loc.value = {}
      loc.value.child = flow.spawn(function()
        flow.yield()
        loc.value.seen = true
      end)
      values[1] = loc.value
      loc.value.child:await()
    end):await()
    assert.equal(0, alive(values))
  end))

  it("is freed with a thousand others, in any order", in_task(function()
    local values, contexts = weak(), {}
    for i = 1, 1000 do
      loc.value = { i }
      values[i] = loc.value
      contexts[i] = capture()
    end
    loc.value = nil
    for i = 1, 1000, 2 do contexts[i] = nil end
    assert.equal(500, alive(values))
    for i = 2, 1000, 2 do assert.equal(values[i], contexts[i]:get(loc)) end
    contexts = nil -- luacheck: ignore
    assert.equal(0, alive(values))
  end))

  it("goes away with its local when nothing else is in the context", in_task(function()
    local values = weak()
    flow.call(function()
      for i = 1, 300 do
        local each = flow.AsyncLocal()
        each.value = { i }
        values[i] = each.value
      end
    end)
    assert.equal(0, alive(values))
  end))
end)

describe("an async local, in its corners,", function()
  it("is silent when removing a value brings back a default that equals it", function()
    local events = {}
    local loc = flow.AsyncLocal { default = 1, value_changed = function(args)
      events[#events + 1] = ("%s -> %s"):format(args.previous_value, args.current_value)
    end }
    flow.run(function()
      loc.value = 1
      loc.value = nil
      loc.value = 2
      loc.value = nil
    end)
    assert.same({ "1 -> 2", "2 -> 1" }, events)
  end)

  it("keeps the order of scopes per coroutine: one may end while another's is open", function()
    flow.run(function()
      local loc = flow.AsyncLocal()
      local generator = coroutine.wrap(function()
        local scope = loc:with("generator")
        coroutine.yield()
        scope:dispose()
        return "disposed"
      end)
      generator()
      local scope = loc:with("main")
      assert.equal("disposed", generator())
      scope:dispose()
    end)
  end)

  it("keeps what an unsafe callback writes from the canceler", function()
    flow.run(function()
      local loc, source = flow.AsyncLocal(), flow.CancellationTokenSource()
      loc.value = 2
      local seen
      source.token:unsafe_register(function()
        seen = loc.value
        loc.value = 77
      end)
      source:cancel()
      assert.equal(2, seen)
      assert.equal(2, loc.value)
    end)
  end)
end)

describe("a value_changed handler that raises", function()
  it("leaves no scope open and no value behind", in_task(function()
    local loc = flow.AsyncLocal { value_changed = function(change)
      if change.current_value == 2 then error("refused", 0) end
    end }
    local other = flow.AsyncLocal()
    local outer = other:with(1)
    assert.same({ false, "refused" }, { pcall(loc.run, loc, 2, function() error("called") end) })
    assert.is_nil(loc.value)
    loc.value = 1
    assert.same({ false, "refused" }, { pcall(loc.with, loc, 2) })
    assert.equal(1, loc.value)
    outer:dispose()
    assert.is_nil(other.value)
  end))

  it("shows in the async traceback of the task that has set", in_task(function()
    local loc = flow.AsyncLocal { value_changed = function(args)
      if not args.context_changed then error("refused") end
    end }
    local task = flow.spawn(function() loc.value = 1 end)
    assert.matches("async_local_spec.lua:%d+: refused$", select(2, task:try_await()))
    local line = debug.getinfo(1, "l").currentline
    local handler = ("async_local_spec.lua:%d: in function <"):format(line - 4)
    local setter = ("async_local_spec.lua:%d: in function <"):format(line - 2)
    local _, at = task:traceback():find(handler, 1, true)
    assert.is_truthy(at and task:traceback():find(setter, at, true), task:traceback())
  end))
end)

describe("a value_changed handler that is called as a task is entered", function()
  -- What it does, each in a program of its own.
  local actions = {
    "(flow.current_task() or {}).name", "flow.cancellation_token()",
    "flow.ExecutionContext.suppress_flow():undo()", "other:set(1)", "other:with(2):dispose()",
    "flow.call(function() other.value = 3 end)", "flow.coroutine.wrap(function() coroutine.yield() end)()",
    "flow.spawn(flow.yield)", "flow.async(flow.yield)()", "collectgarbage()",
    "flow.ExecutionContext.capture():run(flow.current_task)", "coroutine.resume(kept)",
  }
  for _, action in ipairs(actions) do
    it("may use everything: " .. action, function()
      assert.equal("5 3 true", (helper.output(([[
        local flow = require "coflow"
        local other, kept = flow.AsyncLocal(), coroutine.create(function() end)
        local loc = flow.AsyncLocal { value_changed = function() return %s end }
        local function run()
          local task = flow.spawn(function()
            kept = coroutine.running()
            loc.value = 2
            flow.yield()
            return 5
          end)
          loc.value = 1
          flow.yield()
          local cache = flow.AsyncCache()
          local three = cache:get_or_add("key", function() return 3 end) -- starts in the empty context
          return task:await(), three
        end
        print = function() end
        local a, b = flow.run(run)
        local c, d = flow.run(run)
        io.write(("%%s %%s %%s"):format(a, b, a == c and b == d))
      ]]):format(action))))
    end)
  end
end)
