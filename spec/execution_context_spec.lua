-- ExecutionContext: snapshots of the async locals, running under them, and keeping them from flowing.

local flow = require "coflow"
local support = require "spec.support.flow_support"

local in_task, raises, bad_argument = support.in_task, support.raises, support.bad_argument
local in_order = support.in_order
local recorder, weak, alive = support.recorder, support.weak, support.alive
local ExecutionContext = flow.ExecutionContext
local capture = ExecutionContext.capture

local loc, other
local function fresh_locals() loc, other = flow.AsyncLocal(), flow.AsyncLocal() end

-- A context in which loc has the value v.
local function context_with(v)
  return loc:run(v, capture)
end

describe("ExecutionContext.capture", function()
  before_each(fresh_locals)

  it("gives a context also when nothing is set", in_task(function()
    local context = capture()
    assert.is_not_nil(context)
    assert.equal("ran", context:run(function() return "ran" end))
  end))

  it("gives equal contexts as long as nothing is set in between", in_task(function()
    assert.equal(capture(), capture())
    loc.value = 1
    local context = capture()
    flow.yield()
    flow.spawn(function() loc.value = 2 end):await()
    assert.equal(context, capture())
    loc.value = 1
    assert.equal(context, capture())
    loc.value = 2
    assert.are_not.equal(context, capture())
  end))

  it("is back at the empty context when the last local is removed", in_task(function()
    local empty = capture()
    loc.value, other.value = 1, 2
    loc.value = nil
    assert.are_not.equal(empty, capture())
    other.value = nil
    assert.equal(empty, capture())
  end))

  it("gives a snapshot that later sets do not change", in_task(function()
    loc.value = 1
    local context = capture()
    loc.value, other.value = 2, 3
    assert.equal(1, context:get(loc))
    assert.is_nil(context:get(other))
    assert.same({ 1, nil }, { context:run(function() return loc.value, other.value end) })
  end))

  it("is what a child starts with", in_task(function()
    loc.value = 1
    local context = capture()
    assert.equal(context, flow.spawn(capture):await())
    assert.equal(context, flow.async(capture)():await())
  end))
end)

describe("ExecutionContext.run", function()
  before_each(fresh_locals)

  it("calls the function under the context, with its arguments and results", in_task(function()
    local context = context_with("captured")
    loc.value = "current"
    for _, run in ipairs { ExecutionContext.run, context.run } do
      local results = table.pack(run(context, function(...)
        return loc.value, select("#", ...), ...
      end, nil, "a", nil))
      assert.same({ "captured", 3, nil, "a", nil, n = 5 }, results)
    end
    assert.equal("current", loc.value)
  end))

  it("runs on the current task", in_task(function()
    local me = flow.current_task()
    assert.equal(me, capture():run(flow.current_task))
  end))

  it("keeps changes inside", in_task(function()
    local context = context_with(1)
    other.value = "outer"
    context:run(function() loc.value, other.value = 2, 2 end)
    assert.is_nil(loc.value)
    assert.equal("outer", other.value)
    assert.equal(1, context:get(loc))
  end))

  it("starts every time from the captured values", in_task(function()
    local context, events = context_with(10), {}
    for i = 1, 3 do
      events[i] = context:run(function()
        loc.value = loc.value + i
        return loc.value
      end)
    end
    assert.same({ 11, 12, 13 }, events)
  end))

  it("gives a local set after the capture its default", in_task(function()
    local late = flow.AsyncLocal { default = "default" }
    local context = capture()
    late.value = "late"
    assert.equal("default", context:run(function() return late.value end))
    assert.equal("late", late.value)
  end))

  it("puts the context back before an error leaves, and passes it on as it is", in_task(function()
    local context = context_with("captured")
    loc.value = "current"
    for _, problem in ipairs { {}, "text", false } do
      local seen
      local ok, err = pcall(function()
        local _ <close> = setmetatable({}, { __close = function() seen = loc.value end })
        context:run(function()
          loc.value = "changed"
          error(problem, 0)
        end)
      end)
      assert.is_false(ok)
      assert.equal(problem, err)
      assert.equal("current", seen)
      assert.equal("current", loc.value)
    end
    assert.same({ false, nil }, { pcall(context.run, context, error) })
    assert.equal("current", loc.value)
  end))

  it("may suspend inside, where others see nothing of it", in_order(function()
    local events, record = recorder()
    local context = context_with("captured")
    loc.value = "current"
    local watcher = flow.spawn(function()
      for _ = 1, 3 do
        record("watcher " .. loc.value)
        flow.yield()
      end
    end)
    context:run(function()
      for i = 1, 3 do
        record("inside " .. loc.value)
        flow.yield()
        loc.value = "changed " .. i
      end
    end)
    record("after " .. loc.value)
    watcher:await()
    assert.same({ "inside captured", "watcher current", "inside changed 1", "watcher current",
      "inside changed 2", "watcher current", "after current" }, events)
  end))

  it("puts the context back also when a wait inside is canceled", in_task(function()
    local source <close> = flow.CancellationTokenSource(1)
    local context = context_with("captured")
    loc.value = "current"
    local err = raises("OperationCanceled", context.run, context, flow.sleep, 5, source.token)
    assert.equal(source.token, err.token)
    assert.equal("current", loc.value)
  end))

  it("is what is captured inside", in_task(function()
    local context = context_with("captured")
    loc.value = "current"
    context:run(function()
      assert.equal(context, capture())
      assert.equal("captured", flow.spawn(function() return loc.value end):await())
    end)
  end))

  it("works 10,000 deep in one task, with a suspension at the bottom", in_task(function()
    local contexts = {}
    for i = 1, 10 do contexts[i] = context_with(i) end
    local wrong = 0
    local function nest(depth)
      if depth == 0 then
        flow.yield()
        return loc.value
      end
      local before = loc.value
      local bottom = contexts[depth % 10 + 1]:run(nest, depth - 1)
      if loc.value ~= before then wrong = wrong + 1 end
      return bottom
    end
    assert.equal(2, nest(support.many(10000)))
    assert.equal(0, wrong)
    assert.is_nil(loc.value)
  end))

  it("lets an error out of 10,000 levels and puts the context back", in_task(function()
    local context, problem = context_with(1), {}
    local function nest(depth)
      if depth == 0 then error(problem) end
      context:run(nest, depth - 1)
    end
    local _, err = pcall(nest, support.many(10000))
    assert.equal(problem, err)
    assert.is_nil(loc.value)
  end))

  it("refuses nil as the context, without calling the function", in_task(function()
    local called = false
    raises("InvalidOperation", function() ExecutionContext.run(nil, function() called = true end) end)
    assert.is_false(called)
  end))

  it("refuses other wrong arguments", in_task(function()
    bad_argument(1, "run", function() ExecutionContext.run(42, print) end)
    bad_argument(1, "run", function() ExecutionContext.run({}, print) end)
    bad_argument(2, "run", function() ExecutionContext.run(capture()) end)
    bad_argument(2, "run", function() ExecutionContext.run(capture(), "f") end)
  end))

  it("works outside every task", function()
    loc.value = "outside"
    local context = capture()
    loc.value = nil
    assert.equal("outside", context:run(function() return loc.value end))
    assert.is_nil(loc.value)
  end)
end)

describe("ctx:enter", function()
  before_each(fresh_locals)

  it("holds for the rest of the block, across awaits, and keeps changes inside", in_task(function()
    local context = context_with("captured")
    loc.value = "current"
    do
      local _ <close> = context:enter()
      assert.equal("captured", loc.value)
      loc.value = "changed"
      flow.yield()
      assert.equal("changed", loc.value)
    end
    assert.equal("current", loc.value)
    assert.equal("captured", context:get(loc))
  end))

  it("keeps the context it has put back no longer, though somebody has the handle", in_task(function()
    local context, values = context_with("captured"), support.weak()
    values[1] = {}
    loc.value = values[1]
    local handle = context:enter()
    handle:dispose()
    assert.equal(values[1], loc.value)
    loc.value = nil
    assert.equal(0, support.alive(values))
    handle:dispose()
  end))

  it("is left by an error too", in_task(function()
    local context, problem = context_with("captured"), {}
    local _, err = pcall(function()
      local _ <close> = context:enter()
      error(problem)
    end)
    assert.equal(problem, err)
    assert.is_nil(loc.value)
  end))

  it("nests", in_task(function()
    local one, two = context_with(1), context_with(2)
    local events, record = recorder()
    do
      local _ <close> = one:enter()
      do
        local _ <close> = two:enter()
        record(loc.value)
      end
      record(loc.value)
    end
    record(tostring(loc.value))
    assert.same({ 2, 1, "nil" }, events)
  end))

  it("is also left by dispose, and twice is harmless", in_task(function()
    local scope = context_with(1):enter()
    assert.equal(1, loc.value)
    scope:dispose()
    assert.is_nil(loc.value)
    loc.value = 2
    scope:dispose()
    assert.equal(2, loc.value)
  end))

  it("refuses a wrong self", in_task(function()
    local context = capture()
    bad_argument(1, "enter", function() local _ = context.enter({}) end)
  end))
end)

describe("ExecutionContext.restore", function()
  before_each(fresh_locals)

  it("makes the context the current one, for good", in_task(function()
    local context = context_with("captured")
    other.value = "current"
    ExecutionContext.restore(context)
    assert.same({ "captured", nil }, { loc.value, other.value })
    flow.yield()
    assert.equal("captured", loc.value)
    assert.equal(context, capture())
  end))

  it("leaves the context as it was, whatever is set afterwards", in_task(function()
    local context = context_with("captured")
    ExecutionContext.restore(context)
    loc.value = "changed"
    assert.equal("captured", context:get(loc))
    ExecutionContext.restore(context)
    assert.equal("captured", loc.value)
  end))

  it("stays within an async function, flow.call and run", in_task(function()
    local context = context_with("captured")
    loc.value = "current"
    flow.async(ExecutionContext.restore)(context):await()
    assert.equal("current", loc.value)
    flow.call(ExecutionContext.restore, context)
    assert.equal("current", loc.value)
    capture():run(ExecutionContext.restore, context)
    assert.equal("current", loc.value)
  end))

  it("refuses nil and everything else that is no context, and changes nothing", in_task(function()
    loc.value = 1
    raises("InvalidOperation", function() ExecutionContext.restore(nil) end)
    bad_argument(1, "restore", function() ExecutionContext.restore("x") end)
    bad_argument(1, "restore", function() ExecutionContext.restore({}) end)
    assert.equal(1, loc.value)
  end))
end)

describe("ExecutionContext.wrap", function()
  before_each(fresh_locals)

  it("binds a function to the context of now, for every call", in_task(function()
    loc.value = "bound"
    local wrapped = ExecutionContext.wrap(function(...)
      local seen = loc.value
      loc.value = "changed"
      return seen, select("#", ...), ...
    end)
    loc.value = "current"
    for _ = 1, 2 do
      assert.same({ "bound", 3, 1, nil, nil, n = 5 }, table.pack(wrapped(1, nil, nil)))
      assert.equal("current", loc.value)
    end
    assert.equal("bound", flow.spawn(wrapped):await())
  end))

  it("keeps the first context when it wraps twice", in_task(function()
    loc.value = "first"
    local wrapped = ExecutionContext.wrap(function() return loc.value end)
    loc.value = "second"
    local twice = ExecutionContext.wrap(wrapped)
    loc.value = "third"
    assert.equal("first", twice())
    assert.equal("first", wrapped())
  end))

  it("passes errors on and puts the context back", in_task(function()
    local problem = {}
    local wrapped = ExecutionContext.wrap(function() error(problem) end)
    loc.value = "current"
    local _, err = pcall(wrapped)
    assert.equal(problem, err)
    assert.equal("current", loc.value)
  end))

  it("lets the function suspend", in_task(function()
    loc.value = "bound"
    local wrapped = ExecutionContext.wrap(function()
      flow.sleep(1)
      return loc.value
    end)
    loc.value = nil
    assert.equal("bound", wrapped())
    assert.is_nil(loc.value)
  end))

  it("keeps the values of its context alive just as long as it lives", in_task(function()
    local values = weak()
    loc.value = {}
    values[1] = loc.value
    local wrapped = ExecutionContext.wrap(function() end)
    loc.value = nil
    wrapped()
    assert.equal(1, alive(values))
    wrapped = nil -- luacheck: ignore
    assert.equal(0, alive(values))
  end))

  it("refuses what is not a function", in_task(function()
    bad_argument(1, "wrap", function() ExecutionContext.wrap() end)
    bad_argument(1, "wrap", function() ExecutionContext.wrap("f") end)
  end))
end)

describe("ExecutionContext.suppress_flow", function()
  before_each(fresh_locals)

  local suppress, is_suppressed = ExecutionContext.suppress_flow, ExecutionContext.is_flow_suppressed

  it("is reported by is_flow_suppressed until it is undone", in_task(function()
    assert.is_false(is_suppressed())
    local control = suppress()
    assert.is_true(is_suppressed())
    control:undo()
    assert.is_false(is_suppressed())
    control:undo()
    assert.is_false(is_suppressed())
  end))

  it("ends with its block, by an error too", in_task(function()
    do
      local _ <close> = suppress()
      assert.is_true(is_suppressed())
    end
    assert.is_false(is_suppressed())
    pcall(function()
      local _ <close> = suppress()
      error("out")
    end)
    assert.is_false(is_suppressed())
  end))

  it("gives what is started or registered the empty context", in_task(function()
    local events, record = recorder()
    local source <close> = flow.CancellationTokenSource()
    local gate = flow.TaskCompletionSource()
    local function look(name) record(name .. " " .. tostring(loc.value)) end
    loc.value = "mine"
    local tasks = {}
    do
      local _ <close> = suppress()
      tasks[1] = flow.spawn(look, "spawn")
      tasks[2] = flow.async(look)("async")
      tasks[3] = gate.task:continue_with(function() look("continue_with") end)
      source.token:register(look, "register")
    end
    tasks[4] = flow.spawn(look, "afterwards")
    source:cancel()
    gate:set_result()
    for _, task in ipairs(tasks) do task:await() end
    table.sort(events)
    assert.same({ "afterwards mine", "async nil", "continue_with nil", "register nil", "spawn nil" },
      events)
  end))

  it("leaves the task its own values, to read and to write", in_task(function()
    loc.value = 1
    local _ <close> = suppress()
    assert.equal(1, loc.value)
    loc.value, other.value = 2, 3
    assert.is_true(is_suppressed())
    assert.same({ 2, 3 }, { loc.value, other.value })
    assert.is_nil(flow.spawn(function() return loc.value end):await())
    assert.equal(4, other:run(4, function() return other.value end))
  end))

  it("makes capture give nil, which run and restore refuse", in_task(function()
    local _ <close> = suppress()
    local context = capture()
    assert.is_nil(context)
    raises("InvalidOperation", function() ExecutionContext.run(context, print) end)
    raises("InvalidOperation", function() ExecutionContext.restore(context) end)
  end))

  it("is inert the second time", in_task(function()
    local first = suppress()
    local second = suppress()
    second:undo()
    assert.is_true(is_suppressed())
    do
      local _ <close> = suppress()
    end
    assert.is_true(is_suppressed())
    first:undo()
    assert.is_false(is_suppressed())
    second:undo()
    assert.is_false(is_suppressed())
  end))

  it("is ended by restore_flow, which is refused when nothing is suppressed", in_task(function()
    raises("InvalidOperation", ExecutionContext.restore_flow)
    local _ = suppress()
    ExecutionContext.restore_flow()
    assert.is_false(is_suppressed())
    raises("InvalidOperation", ExecutionContext.restore_flow)
    loc.value = 1
    assert.equal(1, flow.spawn(function() return loc.value end):await())
  end))

  it("holds across the task's awaits until it is undone", in_task(function()
    loc.value = 1
    local control = suppress()
    flow.yield()
    flow.sleep(1)
    assert.is_true(is_suppressed())
    assert.is_nil(flow.spawn(function() return loc.value end):await())
    control:undo()
    assert.equal(1, flow.spawn(function() return loc.value end):await())
  end))

  it("belongs to its task: no child and no other task is under it", in_task(function()
    local running = flow.spawn(function()
      flow.yield()
      return is_suppressed()
    end)
    flow.yield()
    local _ <close> = suppress()
    assert.is_false(flow.spawn(is_suppressed):await())
    assert.is_false(flow.async(is_suppressed)():await())
    assert.is_false(running:await())
    assert.is_true(is_suppressed())
  end))

  it("is undone by no other task", in_task(function()
    local control <close> = suppress()
    flow.spawn(function()
      raises("InvalidOperation", function() control:undo() end)
      raises("InvalidOperation", ExecutionContext.restore_flow)
    end):await()
    assert.is_true(is_suppressed())
  end))

  it("is undone by nobody else, who is told why", in_task(function()
    local function refused(control)
      return raises("InvalidOperation", function() control:undo() end).message
    end
    local elsewhere = flow.spawn(suppress):await()
    assert.equal("the flow was suppressed in another task: undo it there", refused(elsewhere))
    local control <close> = suppress()
    flow.coroutine.wrap(function()
      assert.equal("the flow was suppressed outside this coroutine: undo it there", refused(control))
    end)()
    flow.CancellationToken.canceled:register(function()
      assert.equal("the flow was suppressed outside this callback: undo it there", refused(control))
    end)
    assert.is_true(is_suppressed())
  end))

  it("is not undone inside flow.call, which would put it back, but is at its block's end",
    in_task(function()
      for _, call in ipairs {
        function(fn) flow.call(fn) end,
        function(fn) flow.call(flow.call, fn) end,
        function(fn) flow.call(function() coroutine.wrap(fn)() end) end,
        function(fn) coroutine.wrap(function() flow.call(fn) end)() end,
      } do
        local control
        do
          local block <close> = suppress()
          control = block
          call(function()
            raises("InvalidOperation", function() control:undo() end)
            assert.is_true(is_suppressed())
          end)
          assert.is_true(is_suppressed())
        end
        assert.is_false(is_suppressed())
        control:undo() -- harmless
        control = suppress()
        pcall(call, function() pcall(control.undo, control) end)
        control:undo()
        assert.is_false(is_suppressed())
      end
    end))

  it("is undone inside the flow.call that it was begun in, whatever was the case before", in_task(function()
    do
      local _ <close> = suppress()
      flow.call(function()
        ExecutionContext.restore_flow()
        local control = suppress()
        control:undo()
        assert.is_false(is_suppressed())
      end)
      assert.is_true(is_suppressed())
    end
    assert.is_false(is_suppressed())
  end))

  it("begun in a flow.call that has ended is not what is undone later", in_task(function()
    local inner
    local _ <close> = suppress()
    flow.call(function()
      ExecutionContext.restore_flow()
      inner = suppress()
    end)
    local err = raises("InvalidOperation", function() inner:undo() end)
    assert.equal("the flow was suppressed in a call or scope that has ended: undo it there", err.message)
    do local _ <close> = inner end
    assert.is_true(is_suppressed())
  end))

  it("ended while a call in another coroutine is open does not come back with its end", in_task(function()
    local control = suppress()
    local generator = coroutine.wrap(function() flow.call(coroutine.yield) end)
    generator()
    control:undo()
    assert.is_false(is_suppressed())
    generator()
    assert.is_false(is_suppressed())
  end))

  it("ends with its block also over an entered context that was left open", in_task(function()
    local context = context_with(1)
    local entered
    do
      local _ <close> = suppress()
      entered = context:enter()
    end
    assert.is_false(is_suppressed())
    entered:dispose()
    assert.is_false(is_suppressed())
    assert.is_nil(loc.value)
  end))

  it("is not ordered with the values of a block, and ends without them", in_task(function()
    local control
    do
      local _ <close> = loc:with(1)
      control = suppress()
    end
    assert.is_nil(loc.value)
    assert.is_true(is_suppressed())
    local scope = loc:with(2)
    control:undo()
    control = suppress()
    scope:dispose()
    assert.is_nil(loc.value)
    assert.is_true(is_suppressed())
    control:undo()
    assert.is_false(is_suppressed())
  end))

  it("may be in force in a coroutine that yields, in its caller's context", in_task(function()
    local generator = flow.coroutine.wrap(function()
      local control = suppress()
      flow.coroutine.yield(is_suppressed())
      control:undo()
      return is_suppressed()
    end, { context = "caller" })
    assert.is_true(generator())
    assert.is_true(is_suppressed())
    assert.is_false(generator())
  end))

  it("is not in force inside a registered callback, and what one starts does not outlive it",
    in_task(function()
      local source <close> = flow.CancellationTokenSource()
      local events, record = recorder()
      local inner
      loc.value = "registered"
      source.token:register(function()
        record(is_suppressed())
        inner = flow.spawn(function() return loc.value end)
        suppress()
      end)
      do
        local _ <close> = suppress()
        source:cancel()
        record(is_suppressed())
      end
      assert.same({ false, true }, events)
      assert.equal("registered", inner:await())
      local again <close> = flow.CancellationTokenSource()
      again.token:register(function() suppress() end)
      again:cancel()
      assert.is_false(is_suppressed())
    end))

  it("does not reach the caller of an async function or of flow.call", in_task(function()
    flow.async(function() suppress() end)():await()
    assert.is_false(is_suppressed())
    flow.call(function()
      suppress()
      assert.is_true(is_suppressed())
    end)
    assert.is_false(is_suppressed())
    pcall(flow.call, function()
      suppress()
      error("out")
    end)
    assert.is_false(is_suppressed())
  end))

  it("is not in force inside run, and is again afterwards", in_task(function()
    local context = context_with("captured")
    local _ <close> = suppress()
    context:run(function()
      assert.is_false(is_suppressed())
      assert.equal(context, capture())
      assert.equal("captured", flow.spawn(function() return loc.value end):await())
    end)
    assert.is_true(is_suppressed())
    assert.is_nil(capture())
  end))

  it("started inside run does not outlive it", in_task(function()
    capture():run(function() suppress() end)
    assert.is_false(is_suppressed())
  end))

  it("is not touched by a `<close>` variable of another task", in_task(function()
    local control = suppress()
    raises("InvalidOperation", flow.await, flow.spawn(function() local _ <close> = control end))
    assert.is_true(is_suppressed())
    control:undo()
    assert.is_false(is_suppressed())
  end))

  it("cannot be undone inside run, where it is not in force", in_task(function()
    local context = capture()
    local control = suppress()
    context:run(function() raises("InvalidOperation", function() control:undo() end) end)
    assert.is_true(is_suppressed())
    control:undo()
    assert.is_false(is_suppressed())
  end))
end)

describe("a context", function()
  before_each(fresh_locals)

  it("shows its values through get and pairs", in_task(function()
    loc.value, other.value = "one", false
    local context = capture()
    loc.value, other.value = nil, nil
    assert.equal("one", context:get(loc))
    assert.is_false(context:get(other))
    assert.is_nil(context:get(flow.AsyncLocal()))
    local seen, count = {}, 0
    for each, value in pairs(context) do
      seen[each], count = value, count + 1
    end
    assert.equal(2, count)
    assert.equal("one", seen[loc])
    assert.is_false(seen[other])
  end))

  it("has nothing to show when it is empty", in_task(function()
    for _ in pairs(capture()) do error("something in it") end
  end))

  it("refuses to look up what is no async local", in_task(function()
    local context = capture()
    bad_argument(1, "get", function() local _ = context:get("x") end)
    bad_argument(1, "get", function() local _ = context:get() end)
  end))

  it("cannot be changed through a lookup", in_task(function()
    local context = context_with(1)
    for _ in pairs(context) do loc.value = 2 end
    pcall(function() context[loc] = 3 end)
    assert.equal(1, context:get(loc))
  end))
end)

describe("what captures the context", function()
  before_each(fresh_locals)

  it("is spawn, an async function, continue_with and register", in_order(function()
    local events, record = recorder()
    local source <close> = flow.CancellationTokenSource()
    local gate = flow.TaskCompletionSource()
    local function look(name)
      record(name .. " " .. tostring(loc.value))
      loc.value = "private to " .. name
    end
    loc.value = "captured"
    local tasks = { flow.spawn(look, "spawn"), flow.async(look)("async"),
      gate.task:continue_with(function() look("continue_with") end) }
    source.token:register(look, "register")
    loc.value = "canceler"
    source:cancel()
    gate:set_result()
    for _, task in ipairs(tasks) do task:await() end
    assert.equal("canceler", loc.value)
    assert.same({ "async captured", "register captured", "spawn captured",
      "continue_with captured" }, events)
  end))

  it("is not unsafe_register, which runs in the canceler's", in_task(function()
    local events, record = recorder()
    local source <close> = flow.CancellationTokenSource()
    loc.value = "registered"
    source.token:unsafe_register(function() record(loc.value) end)
    loc.value = "canceler"
    source:cancel()
    assert.same({ "canceler" }, events)
  end))

  it("is not a completion source", in_task(function()
    local values = weak()
    loc.value = {}
    values[1] = loc.value
    local gate = flow.TaskCompletionSource()
    loc.value = nil
    assert.equal(0, alive(values))
    gate:set_result()
  end))

  it("is not delay, wait_async, cancel_after, a source or a linked source", in_task(function()
    local values, gate = weak(), flow.TaskCompletionSource()
    local parent <close> = flow.CancellationTokenSource()
    loc.value = {}
    values[1] = loc.value
    local delay = flow.delay(60, parent.token)
    local wait = gate.task:wait_async(60, parent.token)
    local timed <close> = flow.CancellationTokenSource(60)
    timed:cancel_after(61)
    local linked <close> = flow.CancellationTokenSource.linked(parent.token)
    loc.value = nil
    assert.equal(0, alive(values))
    parent:cancel()
    gate:set_result()
    assert.is_true(linked.is_cancellation_requested)
    assert.is_true(delay.is_canceled and wait.is_canceled)
  end))

  it("lets go of it when a callback is unregistered, disposed or done", in_task(function()
    local values, kept = weak(), {}
    local source <close> = flow.CancellationTokenSource()
    for i = 1, 4 do
      loc.value = { i }
      values[i] = loc.value
      kept[i] = source.token:register(function() end)
    end
    loc.value = nil
    assert.equal(4, alive(values))
    kept[1]:unregister()
    assert.equal(3, alive(values))
    kept[3]:dispose()
    assert.equal(2, alive(values))
    source:cancel()
    assert.equal(0, alive(values))
    assert.equal(4, #kept)
  end))

  it("lets go of it when the source is disposed or reset", in_task(function()
    local values, kept = weak(), {}
    local sources = { flow.CancellationTokenSource(), flow.CancellationTokenSource() }
    for i, source in ipairs(sources) do
      loc.value = {}
      values[i] = loc.value
      kept[i] = source.token:register(function() end)
    end
    loc.value = nil
    sources[1]:dispose()
    assert.equal(1, alive(values))
    assert.is_true(sources[2]:try_reset())
    assert.equal(0, alive(values))
    sources[2]:dispose()
    assert.equal(2, #kept)
  end))

  it("lets go of it when a continuation is done", in_task(function()
    local values, gate = weak(), flow.TaskCompletionSource()
    loc.value = {}
    values[1] = loc.value
    local continuation = gate.task:continue_with(function() end)
    loc.value = nil
    assert.equal(1, alive(values))
    gate:set_result()
    continuation:await()
    assert.equal(0, alive(values))
  end))

  it("lets go of it when a continuation's condition was not met", in_task(function()
    local values, gate = weak(), flow.TaskCompletionSource()
    loc.value = {}
    values[1] = loc.value
    local continuation = gate.task:continue_with(function() end, { on = "fault" })
    loc.value = nil
    gate:set_result()
    continuation:try_await()
    assert.is_true(continuation.is_canceled)
    assert.equal(0, alive(values))
  end))

  it("never leaks a caller's context into a timer's callbacks", in_task(function()
    local events, record = recorder()
    loc.value = "registered"
    local source <close> = flow.CancellationTokenSource()
    source.token:register(function() record(tostring(loc.value)) end)
    source.token:unsafe_register(function() record(tostring(loc.value)) end)
    loc.value = "armed"
    source:cancel_after(1)
    loc.value = "sleeping"
    flow.sleep(2)
    assert.same({ "nil", "registered" }, events)
    assert.equal("sleeping", loc.value)
  end))
end)
