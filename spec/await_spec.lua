-- await: what it gives, everywhere that it works, and how it is refused where Lua cannot yield.

local flow = require "coflow"
local helper = require "spec.helper"

local Task = flow.Task
local in_task, recorder, raised, raises = helper.in_task, helper.recorder, helper.raised, helper.raises
local in_order = helper.in_order
local is_error, slowly, closing, here = helper.is_error, helper.slowly, helper.closing, helper.here

describe("await", function()
  it("returns every value of the task, nil included", in_task(function()
    local cases = {
      table.pack(), table.pack(nil), table.pack(nil, nil, nil), table.pack(false),
      table.pack(1, nil, "three", nil),
    }
    for _, values in ipairs(cases) do
      local queued = flow.spawn(table.unpack, values, 1, values.n)
      assert.same(values, table.pack(flow.await(queued)))
      assert.same(values, table.pack(flow.await(queued)))
      assert.same(values, table.pack(slowly(table.unpack(values, 1, values.n))))
    end
  end))

  it("returns 200 values, from a suspension and at once", in_task(function()
    local values = {}
    for i = 1, 200 do
      values[i] = i
    end
    local task = flow.spawn(table.unpack, values)
    for _ = 1, 2 do
      assert.same(values, { task:await() })
    end
  end))

  it("returns at once from a complete task", in_task(function()
    local log, note = recorder()
    local queued = flow.spawn(note, "queued")
    note(flow.await(Task.from_result("from_result")))
    note((raised(flow.await, Task.from_exception("from_exception"))))
    note(flow.await(flow.async(function() return "async" end)()))
    flow.await(flow.delay(0))
    note("delay of 0")
    queued:await()
    assert.same({ "from_result", "from_exception", "async", "delay of 0", "queued" }, log)
  end))

  it("resumes the waiters in the order in which they began to wait", in_order(function()
    local log, note = recorder()
    local gate = flow.TaskCompletionSource()
    local tasks = {}
    for i, wait in ipairs { flow.await, gate.task.await, flow.try_await, flow.await_all } do
      tasks[i] = flow.spawn(function()
        wait(gate.task)
        note(i)
      end)
    end
    flow.yield()
    gate:set_result()
    flow.await_all(tasks)
    assert.same({ "1", "2", "3", "4" }, log)
  end))

  it("gives the same outcome to every waiter", in_task(function()
    local value = {}
    local failing = flow.spawn(function()
      flow.yield()
      error(value)
    end)
    local tasks = {}
    for i = 1, 5 do
      tasks[i] = flow.spawn(function() return raised(flow.await, failing) end)
    end
    for i = 1, 5 do
      assert.is_true(rawequal(value, tasks[i]:await()))
    end
  end))

  it("raises the OperationCanceled of a canceled task", in_task(function()
    local canceled = flow.errors.OperationCanceled("enough")
    local task = flow.spawn(function()
      flow.yield()
      error(canceled)
    end)
    assert.is_true(rawequal(canceled, raised(flow.await, task)))
    assert.is_true(task.is_canceled)
  end))

  it("restores the waiter's own context, whoever completes the task", in_task(function()
    local loc = flow.AsyncLocal()
    local gate = flow.TaskCompletionSource()
    loc.value = "completer"
    local task = flow.async(function()
      loc.value = "waiter"
      gate.task:await()
      return loc.value
    end)()
    gate:set_result()
    assert.equal("waiter", task:await())
    assert.equal("completer", loc.value)
  end))

  it("tells about when_all on a table of tasks", in_task(function()
    local tasks = { Task.completed_task, Task.completed_task }
    local err = raised(function()
      local _ = flow.await(tasks)
    end)
    assert.truthy(err:find("bad argument #1 to 'await'", 1, true), err)
    assert.truthy(err:find("when_all", 1, true), err)
  end))

  it("serves a thousand waiters of one task, half of which end early", in_task(function(clock)
    local start = clock:now()
    local gate = flow.TaskCompletionSource()
    local source = flow.CancellationTokenSource()
    local n, kept, canceled = helper.many(1000), {}, {}
    for i = 1, n do
      kept[i] = gate.task:wait_async()
      canceled[i] = gate.task:wait_async(nil, source.token)
    end
    source:cancel()
    flow.yield()
    gate:set_result("it")
    for i = 1, n do
      assert.equal("it", kept[i]:await())
      assert.is_true(canceled[i].is_canceled)
    end
    assert.equal(start, clock:now())
  end))
end)

describe("await works in", function()
  it("pcall", in_task(function()
    assert.same({ n = 4, true, 1, nil, 3 }, table.pack(pcall(slowly, 1, nil, 3)))
    local value = {}
    local ok, err = pcall(pcall, function()
      slowly()
      error(value)
    end)
    assert.same({ true, false }, { ok, err })
    assert.equal(value, raised(function()
      slowly()
      pcall(error, slowly())
      flow.await(flow.spawn(error, value))
    end))
  end))

  it("xpcall, whose message handler still sees the place of the error", in_task(function()
    local place
    local ok, trace = xpcall(function(...)
      assert.same({ 1, nil, 3 }, { slowly(...) })
      place = here(1)
      error("boom")
    end, debug.traceback, 1, nil, 3)
    assert.is_false(ok)
    assert.truthy(trace:find(place .. ": boom\n", 1, true), trace)
    assert.truthy(trace:find(place .. ":", trace:find("stack traceback", 1, true), true), trace)
    assert.same({ n = 3, true, 7, nil }, table.pack(xpcall(slowly, print, 7, nil)))
  end))

  it("protected calls nested 100 deep", in_task(function()
    local function nest(n)
      if n == 0 then
        return slowly("bottom")
      end
      return select(2, assert(pcall(nest, n - 1)))
    end
    assert.equal("bottom", nest(100))
  end))

  local OPERATORS = {
    __add = function(o) return o + 1 end, __sub = function(o) return o - 1 end,
    __mul = function(o) return o * 2 end, __div = function(o) return o / 2 end,
    __mod = function(o) return o % 2 end, __pow = function(o) return o ^ 2 end,
    __unm = function(o) return -o end, __idiv = function(o) return o // 2 end,
    __band = function(o) return o & 1 end, __bor = function(o) return o | 1 end,
    __bxor = function(o) return o ~ 1 end, __bnot = function(o) return ~o end,
    __shl = function(o) return o << 1 end, __shr = function(o) return o >> 1 end,
    __concat = function(o) return o .. "x" end, __len = function(o) return #o end,
    __index = function(o) return o.field end, __call = function(o) return o(1, 2) end,
  }
  it("metamethods of operators, indexing and calls", in_task(function()
    local metatable = {}
    for event in pairs(OPERATORS) do
      metatable[event] = function() return slowly(event) end
    end
    local object = setmetatable({}, metatable)
    for event, operate in pairs(OPERATORS) do
      assert.equal(event, operate(object))
    end
  end))

  it("metamethods of comparisons", in_task(function()
    local metatable = {
      __eq = function() return slowly(true) end,
      __lt = function() return slowly(true) end,
      __le = function() return slowly(false) end,
    }
    local a, b = setmetatable({}, metatable), setmetatable({}, metatable)
    assert.is_true(a == b)
    assert.is_true(a < b)
    assert.is_false(a >= b)
    local chosen = a < b and "then" or "else"
    assert.equal("then", chosen)
  end))

  it("metamethods of assignment and of pairs", in_task(function()
    local log, note = recorder()
    local object = setmetatable({}, {
      __newindex = function(_, key, value)
        note("set", key, slowly(value))
      end,
      __pairs = function(self)
        slowly()
        return function(_, i)
          return slowly(i < 2 and i + 1 or nil)
        end, self, 0
      end,
    })
    object.field = 5
    for i in pairs(object) do
      note("item", i)
    end
    assert.same({ "set field 5", "item 1", "item 2" }, log)
  end))

  it("generic-for iterators and their closing value", in_task(function()
    local log, note = recorder()
    local function items(n)
      local i = 0
      return function()
        i = i + 1
        return slowly(i <= n and i or nil)
      end, nil, nil, closing(function()
        slowly()
        note("closed")
      end)
    end
    for i in items(2) do
      note(i, slowly("body"))
    end
    for i in items(9) do
      if i == 2 then
        break
      end
      note(i)
    end
    assert.same({ "1 body", "2 body", "closed", "1", "closed" }, log)
  end))

  it("__close handlers, on each way out of a block", in_task(function()
    local log, note = recorder()
    local function block(way, leave)
      local _ <close> = closing(function(err)
        note(way, "outer", slowly(tostring(err)))
      end)
      local _ <close> = closing(function(err)
        note(way, "inner", slowly(tostring(err)))
      end)
      return leave()
    end
    note(block("return", function() return "a", nil, "c" end))
    note(select("#", block("values", function() return nil, nil end)))
    pcall(block, "error", function() error("boom", 0) end)
    for i = 1, 2 do
      local _ <close> = closing(function() note("break", slowly("closed")) end)
      if i == 1 then
        break
      end
    end
    assert.same({
      "return inner nil", "return outer nil", "a nil c",
      "values inner nil", "values outer nil", "2",
      "error inner boom", "error outer boom",
      "break closed",
    }, log)
  end))

  it("__close handlers while an error unwinds, which goes on unchanged", in_task(function()
    local log, note = recorder()
    local value = {}
    local task = flow.async(function()
      local _ <close> = closing(function(err)
        note("outer", rawequal(err, value))
        flow.sleep(1)
        note("outer closed")
      end)
      flow.call(function()
        local _ <close> = closing(function(err)
          note("inner", rawequal(err, value))
          flow.sleep(2)
          note("inner closed")
        end)
        slowly()
        error(value)
      end)
    end)()
    assert.equal(value, raised(flow.await, task))
    assert.same({ "inner true", "inner closed", "outer true", "outer closed" }, log)
  end))

  it("__close handlers while a cancellation unwinds", in_task(function(clock)
    local log, note = recorder()
    local start = clock:now()
    local source = flow.CancellationTokenSource(1)
    local task = flow.async(function()
      local _ <close> = closing(function(err)
        note(clock:now() - start == 1, err.name)
        flow.sleep(2)
        note(clock:now() - start == 3, "closed")
      end)
      flow.sleep(100, source.token)
    end)()
    raises("OperationCanceled", flow.await, task)
    assert.same({ "true OperationCanceled", "true closed" }, log)
    assert.is_true(task.is_canceled)
  end))

  it("__close handlers that replace the error", in_task(function()
    local first, second = {}, {}
    local task = flow.async(function()
      local _ <close> = closing(function()
        slowly()
        error(second)
      end)
      slowly()
      error(first)
    end)()
    assert.equal(second, raised(flow.await, task))
  end))

  it("__close handlers of a loop that ends with an error of nil", in_task(function()
    local log, note = recorder()
    local function items()
      return function() return slowly(1) end, nil, nil, closing(function(err) note("closed", slowly(err)) end)
    end
    local ok, err = pcall(function()
      for _ in items() do
        error(nil)
      end
    end)
    assert.same({ false, nil, { "closed nil" } }, { ok, err, log })
  end))

  it("loaded chunks, and dofile", in_task(function()
    local chunk = load("local slowly = ... return slowly('loaded')")
    assert.equal("loaded", chunk(slowly))
    local path = os.tmpname()
    local file = assert(io.open(path, "w"))
    file:write("return require('spec.helper').slowly('from a file')")
    file:close()
    local ok, got = pcall(dofile, path)
    os.remove(path)
    assert.same({ true, "from a file" }, { ok, got })
  end))
end)

-- Places where Lua cannot yield. Each calls `fn()` once from within it.
local PLACES = {
  sort = function(fn)
    local done = false
    table.sort({ 2, 1 }, function(a, b)
      if not done then
        done = true
        fn()
      end
      return a < b
    end)
  end,
  gsub = function(fn) string.gsub("x", "x", function() fn() end) end,
  require = function(fn)
    package.preload["spec.awaiting"] = function()
      fn()
      return true
    end
    require "spec.awaiting"
    package.loaded["spec.awaiting"] = nil
    package.preload["spec.awaiting"] = nil
  end,
  tostring = function(fn)
    return tostring(setmetatable({}, { __tostring = function()
      fn()
      return "x"
    end }))
  end,
  handler = function(fn)
    xpcall(error, function() fn() end)
  end,
  coroutine = function(fn)
    assert(coroutine.resume(coroutine.create(fn)))
  end,
  wrap = function(fn)
    coroutine.wrap(fn)()
  end,
  collectgarbage = function(fn)
    local done = false
    setmetatable({}, { __gc = function()
      fn()
      done = true
    end })
    collectgarbage()
    collectgarbage()
    assert(done)
  end,
  load = function(fn)
    local done = false
    load(function()
      if not done then
        done = true
        fn()
      end
    end)
  end,
}

describe("await where Lua cannot yield", function()
  for place, enter in pairs(PLACES) do
    it("is refused in " .. place .. ", names the place and registers nothing", in_task(function()
      local gate, other = flow.TaskCompletionSource(), flow.TaskCompletionSource()
      local log, note = recorder()
      local err, line, awaitable
      local task = flow.async(function()
        enter(function()
          awaitable = flow.is_awaitable_here()
          line = here(1)
          err = raised(flow.await, gate.task)
        end)
        note("refused")
        other.task:await()
        note("other")
        note(gate.task:await())
      end)()
      is_error("InvalidOperation", err)
      local name = place == "wrap" and "coroutine" or place
      assert.truthy(err.message:find(name, 1, true) or err.message:find(line, 1, true), err.message)
      assert.is_false(awaitable)
      gate:set_result("gate")
      slowly()
      assert.same({ "refused" }, log)
      other:set_result()
      task:await()
      assert.same({ "refused", "other", "gate" }, log)
    end))

    it("is allowed in " .. place .. " for a task that is complete", in_task(function()
      local value = {}
      local got, err
      enter(function()
        got = table.pack(flow.await(Task.from_result(1, nil)))
        err = raised(flow.await, Task.from_exception(value))
      end)
      assert.same({ n = 2, 1, nil }, got)
      assert.equal(value, err)
    end))
  end

  it("is refused in every suspending form", in_task(function()
    local gate = flow.TaskCompletionSource()
    local forms = {
      function() flow.await(gate.task) end,
      function() flow.try_await(gate.task) end,
      function() gate.task:await() end,
      function() gate.task:try_await() end,
      function() flow.await_all(gate.task) end,
      function() flow.await_any(gate.task) end,
      function()
        local step, state, control = flow.when_each { gate.task }
        step(state, control)
      end,
      function() flow.sleep(1) end,
      function() flow.yield() end,
      function() flow.call(flow.yield) end,
    }
    for i, form in ipairs(forms) do
      local errs = {}
      PLACES.sort(function() errs[1] = raised(form) end)
      PLACES.coroutine(function() errs[2] = raised(form) end)
      for _, err in ipairs(errs) do
        assert.is_true(flow.errors.is(err, "InvalidOperation"), ("form %d: %s"):format(i, tostring(err)))
      end
    end
    gate:set_result()
  end))

  it("raises its refusal through the place into the task", in_task(function()
    local gate = flow.TaskCompletionSource()
    local task = flow.async(function()
      table.sort({ 2, 1 }, function() gate.task:await() end)
    end)()
    is_error("InvalidOperation", raised(flow.await, task))
    assert.is_true(task.is_faulted)
    local wrapped = flow.async(function()
      coroutine.wrap(flow.await)(gate.task)
    end)()
    is_error("InvalidOperation", raised(flow.await, wrapped))
    gate:set_result()
  end))

  it("works again in the same task once the place is left", in_task(function()
    local err
    PLACES.gsub(function() err = raised(flow.yield) end)
    is_error("InvalidOperation", err)
    assert.equal("on", slowly("on"))
    assert.is_true(flow.is_awaitable_here())
  end))
end)

describe("await of any value with __await", function()
  local function awaitable(fn)
    return setmetatable({}, { __await = fn })
  end

  it("awaits the task that it gives, called once with the value", in_task(function()
    local seen = {}
    local object = awaitable(function(...)
      seen[#seen + 1] = table.pack(...)
      return flow.spawn(slowly, 1, nil, 3, nil)
    end)
    assert.same({ n = 4, 1, nil, 3, nil }, table.pack(flow.await(object)))
    assert.equal(1, #seen)
    assert.equal(object, seen[1][1])
    assert.equal(1, seen[1].n)
  end))

  it("raises the task's error, and the error of __await itself", in_task(function()
    local value = {}
    assert.equal(value, raised(flow.await, awaitable(function() return flow.spawn(error, value) end)))
    assert.equal(value, raised(flow.await, awaitable(function() error(value) end)))
  end))

  it("serves every function that takes awaitables", in_task(function()
    local function value(v)
      return awaitable(function() return flow.spawn(slowly, v) end)
    end
    assert.same({ true, 1 }, { flow.try_await(value(1)) })
    assert.same({ 1, 2 }, { flow.await_all(value(1), value(2)) })
    assert.same({ n = 2, 1, 2 }, flow.when_all { value(1), value(2) }:await())
    assert.same({ n = 1, 1 }, flow.when_all(value(1)):await())
    assert.same({ a = 1 }, flow.when_all { a = value(1) }:await())
    local first, key = flow.await_any(value(1), flow.TaskCompletionSource().task)
    assert.same({ 1, 1 }, { first.result, key })
    for task, k in flow.when_each { value(1) } do
      assert.same({ 1, 1 }, { task.result, k })
    end
  end))

  it("may suspend in __await", in_task(function()
    assert.equal(5, flow.await(awaitable(function() return flow.spawn(slowly, slowly(5)) end)))
  end))

  it("is an error that names __await when it gives no task", in_task(function()
    for _, fn in ipairs { function() end, function() return 42 end, function() return {} end } do
      local err = raised(function()
        local _ = flow.await(awaitable(fn))
      end)
      assert.truthy(tostring(err):find("__await", 1, true), tostring(err))
    end
  end))

  it("works on values of any type", in_task(function()
    local old = debug.getmetatable(print)
    debug.setmetatable(print, { __await = function(fn) return flow.spawn(fn) end })
    local ok, got = pcall(flow.await, function() return slowly("from a function") end)
    debug.setmetatable(print, old)
    assert.same({ true, "from a function" }, { ok, got })
  end))
end)

describe("try_await", function()
  it("gives true and every value", in_task(function()
    assert.same({ n = 4, true, 1, nil, nil }, table.pack(flow.try_await(flow.spawn(slowly, 1, nil, nil))))
    assert.same({ n = 1, true }, table.pack(Task.completed_task:try_await()))
  end))

  it("gives false and the value that the task raised", in_task(function()
    local value = {}
    local function fail(err)
      slowly()
      error(err)
    end
    assert.same({ n = 2, false, value }, table.pack(flow.try_await(flow.spawn(fail, value))))
    assert.equal(value, select(2, flow.spawn(fail, value):try_await()))
    assert.same({ n = 2, false, nil }, table.pack(flow.try_await(flow.spawn(fail, nil))))
  end))

  it("gives false and the OperationCanceled of a canceled task", in_task(function()
    local source = flow.CancellationTokenSource(1)
    local ok, err = flow.try_await(flow.delay(5, source.token))
    assert.is_false(ok)
    assert.equal(source.token, is_error("OperationCanceled", err).token)
  end))

  it("raises what is wrong with its argument", in_task(function()
    local err = raised(function()
      local _ = flow.try_await(42)
    end)
    assert.truthy(err:find("bad argument #1 to 'try_await'", 1, true), err)
  end))
end)

describe("flow.pcall", function()
  it("is pcall while nothing is canceled", in_task(function()
    assert.same({ n = 4, true, 1, nil, nil }, table.pack(flow.pcall(slowly, 1, nil, nil)))
    local value = {}
    local ok, err = flow.pcall(function(arg)
      slowly()
      error(arg)
    end, value)
    assert.is_false(ok)
    assert.equal(value, err)
    assert.same({ n = 2, false, nil }, table.pack(flow.pcall(error)))
  end))

  it("catches an OperationCanceled that is not of the ambient token", in_task(function()
    local source = flow.CancellationTokenSource(1)
    local ok, err = flow.pcall(flow.sleep, 5, source.token)
    assert.is_false(ok)
    is_error("OperationCanceled", err)
  end))
end)

describe("a task that awaits itself", function()
  it("is refused with its name, and goes on", in_task(function()
    local task
    task = flow.spawn(function()
      is_error("InvalidOperation", raised(flow.await, task), "narcissus")
      is_error("InvalidOperation", raised(task.await, task), "narcissus")
      is_error("InvalidOperation", raised(flow.try_await, task), "narcissus")
      return slowly("fine")
    end)
    task.name = "narcissus"
    assert.equal("fine", task:await())
  end))

  it("is refused round a circle of two, with the names", in_order(function()
    local a, b
    a = flow.spawn(function() return b:await() end)
    b = flow.spawn(function() return raised(flow.await, a) end)
    a.name, b.name = "alpha", "beta"
    is_error("InvalidOperation", a:await(), "alpha", "beta")
    assert.equal(a.result, b.result)
  end))

  it("is refused round a circle of five, with the names", in_order(function()
    local tasks = {}
    for i = 1, 5 do
      tasks[i] = flow.spawn(function() return tasks[i % 5 + 1]:await() end)
      tasks[i].name = "link" .. i
    end
    local ok, err = tasks[1]:try_await()
    assert.is_false(ok)
    is_error("InvalidOperation", err, "link1", "link2", "link3", "link4", "link5")
    for i = 1, 5 do
      assert.equal(err, tasks[i].exception)
    end
  end))

  it("is not seen where a chain only looks like a circle", in_task(function()
    local gate = flow.TaskCompletionSource()
    local a = flow.spawn(function() return gate.task:await() end)
    local b = flow.spawn(function() return a:await() + gate.task:await() end)
    local c = flow.spawn(function() return b:await() + a:await() end)
    flow.yield()
    gate:set_result(1)
    assert.equal(3, c:await())
    assert.same({ 1, 2 }, { a:await(), b:await() })
  end))
end)

describe("a raw coroutine.yield in a task's body", function()
  it("faults the task with the place, and runs its <close> variables", in_task(function()
    local log, note = recorder()
    local line
    local task = flow.spawn(function()
      local _ <close> = closing(function() note("closed") end)
      line = here(1)
      coroutine.yield("value")
      note("resumed")
    end)
    is_error("InvalidOperation", raised(flow.await, task), line)
    assert.is_true(task.is_faulted)
    assert.same({ "closed" }, log)
  end))

  it("cannot be caught by a pcall round it", in_task(function()
    local log, note = recorder()
    local task = flow.spawn(function()
      slowly()
      pcall(coroutine.yield)
      note("resumed")
    end)
    is_error("InvalidOperation", raised(flow.await, task))
    assert.same({}, log)
  end))

  it("faults a hot task without disturbing its caller", in_task(function()
    local task = flow.async(function() coroutine.yield() end)()
    assert.equal("faulted", task.status)
    is_error("InvalidOperation", task.exception)
    assert.equal("on", slowly("on"))
  end))

  it("comes out of flow.run as an error", function()
    raises("InvalidOperation", flow.run, function() coroutine.yield() end)
    assert.equal(1, flow.run(function() return slowly(1) end))
  end)

  it("is nobody's business inside a plain coroutine", in_task(function()
    local generator = coroutine.wrap(function()
      coroutine.yield(1)
      coroutine.yield(2)
    end)
    local a = generator()
    slowly()
    local b = generator()
    assert.same({ 1, 2 }, { a, b })
  end))
end)

-- What ends the wait then is the token as well.
describe("await and try_await with a token", function()
  local Source, Token = flow.CancellationTokenSource, flow.CancellationToken
  local none, canceled = Token.none, Token.canceled

  it("end the wait, not what is waited for", in_task(function()
    for _, await in ipairs { flow.await, flow.try_await } do
      local source = Source()
      local task = flow.spawn(function()
        flow.sleep(2)
        return "value", 2
      end)
      flow.spawn(function()
        flow.sleep(1)
        source:cancel("enough")
      end)
      local err = raises("OperationCanceled", await, task, source.token)
      assert.equal("enough", err.reason)
      assert.equal(source.token, err.token)
      assert.same({ "value", 2 }, { task:await() })
    end
  end))

  it("raise at once if it is canceled, unless the task is complete", in_task(function()
    local delay = flow.delay(1)
    local awaitable = setmetatable({}, { __await = function() return delay end })
    for _, x in ipairs { delay, delay:configure_await(false), awaitable } do
      raises("OperationCanceled", flow.await, x, canceled)
      raises("OperationCanceled", flow.try_await, x, canceled)
    end
    assert.equal(1, flow.await(Task.from_result(1), canceled))
    assert.same({ true, 1 }, { flow.try_await(Task.from_result(1), canceled) })
    delay:await()
  end))

  it("give the task's own outcome otherwise, and have observed it", in_task(function()
    local token = Source().token
    local function later(f, ...) return flow.spawn(function(...) flow.sleep(1) return f(...) end, ...) end
    assert.same({ 1, 2 }, { later(table.unpack, { 1, 2 }):await(token) })
    assert.same({ true, 1, 2 }, { later(table.unpack, { 1, 2 }):try_await(token) })
    assert.same({ false, "x" }, { later(error, "x", 0):try_await(token) })
    assert.same({ false, "x" }, { pcall(flow.await, later(error, "x", 0), token) })
  end))

  it("wait on under `none` though the ambient token is canceled", in_task(function()
    local task = flow.spawn(flow.sleep, 2, none)
    local ok, answer = pcall(flow.with_timeout, 1, function()
      pcall(flow.sleep, 5)
      local answer = flow.try_await(task, none)
      flow.await(flow.delay(1, none), none)
      raises("OperationCanceled", flow.try_await, flow.delay(1, none))
      return answer
    end)
    assert.same({ true, true }, { ok, answer })
    flow.sleep(1)
  end))

  it("wait on the scheduler that an await is configured for", in_task(function()
    local token = Source().token
    local ran = flow.TaskScheduler.limited(1)
    local task = flow.spawn(flow.sleep, 1)
    local awaiter = Task.new(function()
      task:configure_await(false):await(token)
      return true
    end)
    assert.is_true(awaiter:start(ran):await())
  end))

  it("refuse a source in its place", in_task(function()
    local delay = flow.delay(1)
    for _, await in ipairs { flow.await, flow.try_await, delay.await, delay.try_await } do
      local err = raised(await, delay, Source())
      assert.truthy(err:find("CancellationToken expected, got coflow.CancellationTokenSource", 1, true), err)
    end
    delay:await()
  end))

  it("take no notice of what else a call has returned", in_task(function()
    local function two() return flow.delay(1), 5, "x" end
    flow.await(two())
    assert.same({ true }, { flow.try_await(two()) })
  end))

  it("drive the loop at the top level", function()
    raises("OperationCanceled", flow.await, flow.delay(3600), canceled)
    raises("OperationCanceled", flow.try_await, flow.delay(3600), canceled)
    assert.is_true(flow.try_await(Task.from_result(), none))
  end)
end)
