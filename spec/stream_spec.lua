-- flow.stream: sources, iterations, operators, and what happens when any of them is left early, fails, is
-- canceled, forgotten or misused.
-- SPDX-License-Identifier: MIT
-- luacheck: ignore 512 (loops that are left at once)

local flow = require "coflow"
local testing = require "coflow.testing"
local helper = require "spec.helper"
local support = require "spec.support.flow_support"

local stream = flow.stream
local in_task, in_order, recorder = helper.in_task, helper.in_order, helper.recorder
local closing, raised = helper.closing, helper.raised
local is_error, raises, collect, many = helper.is_error, helper.raises, helper.collect, helper.many
local Source, Token = flow.CancellationTokenSource, flow.CancellationToken

-- 1 … n, waiting `seconds` before each; notes what happens to it.
local function counter(n, seconds, note, name)
  note, name = note or function() end, name or "counter"
  return stream.new(function(emit, token)
    note(name, "starts")
    local _ <close> = closing(function(err)
      note(name, "closed", err and err.name or err, token.is_cancellation_requested)
    end)
    for i = 1, n do
      if seconds then flow.sleep(seconds) end
      emit(i)
    end
  end)
end

local function list(n)
  local values = {}
  for i = 1, n do values[i] = i end
  return values
end

local function drain(s, token)
  for _ in s:iterate(token) do end -- luacheck: ignore
end

local function slowly(...)
  helper.slowly()
  return ...
end

describe("a stream", function()
  it("runs nothing before its first item is asked for", in_task(function()
    local log, note = recorder()
    local s = counter(2, 1, note):map(function(v) note("map", v) return v end)
    local it = s:iterate()
    flow.sleep(5)
    assert.same({}, log)
    assert.equal(1, it())
    assert.same({ "counter starts", "map 1" }, log)
    it:dispose()
  end))

  it("refuses an item emitted where Lua cannot yield, and says where that was", in_task(function()
    local refused
    local s = stream.new(function(emit)
      emit(1)
      local ok, err = pcall(string.gsub, "x", "x", emit)
      refused = not ok and err
      emit(2)
    end)
    assert.same({ 1, 2 }, s:to_table())
    helper.is_error("InvalidOperation", refused, "gsub'")
  end))

  it("runs on when the next item is asked for, and then only", in_task(function()
    local log, note = recorder()
    local s = stream.new(function(emit)
      for i = 1, 3 do
        note("emits", i)
        emit(i)
        note("emitted", i)
      end
      note("ends")
    end)
    for v in s:iterate() do
      flow.yield()
      note("got", v)
    end
    assert.same({ "emits 1", "got 1", "emitted 1", "emits 2", "got 2", "emitted 2", "emits 3", "got 3",
      "emitted 3", "ends" }, log)
  end))

  it("starts afresh with each iteration, also at the same time", in_task(function()
    local s = counter(3, 1)
    assert.same({ 1, 2, 3 }, s:to_table())
    assert.same({ 1, 2, 3 }, s:to_table())
    local a, b = s:iterate(), s:iterate()
    assert.same({ 1, 1, 2 }, { a(), b(), b() })
    local both = flow.when_all(s:to_table_async(), s:to_table_async()):await()
    assert.same({ { 1, 2, 3 }, { 1, 2, 3 }, n = 2 }, both)
    assert.same({ 2, 3 }, { a(), b() })
    a:dispose()
    b:dispose()
  end))

  it("closes its producer once, at the end, on an error and on every way out of the loop", in_task(function()
    local function closed(leave)
      local log, note = recorder()
      local result = table.pack(pcall(leave, counter(3, 0.5, note)))
      return { table.concat(log, ", "), table.unpack(result, 2, result.n) }
    end
    assert.same({ "counter starts, counter closed nil false" }, closed(drain))
    assert.same({ "counter starts, counter closed OperationCanceled true" }, closed(function(s)
      for v in s:iterate() do if v == 2 then break end end
    end))
    assert.same({ "counter starts, counter closed OperationCanceled true", "r" }, closed(function(s)
      for _ in s:iterate() do return "r" end
    end))
    assert.same({ "counter starts, counter closed OperationCanceled true", "failed" }, closed(function(s)
      for _ in s:iterate() do error("failed", 0) end
    end))
    assert.same({ "counter starts, counter closed OperationCanceled true" }, closed(function(s)
      for _ in s:iterate() do goto out end
      ::out::
    end))
    local log, note = recorder()
    raises("Timeout", flow.with_timeout, 0.75, function()
      drain(counter(3, 0.5, note))
    end)
    assert.same({ "counter starts", "counter closed OperationCanceled true" }, log)
  end))

  it("has closed everything before the loop is left, what waits while it closes included", in_task(function(clock)
    local log, note = recorder()
    local s = stream.new(function(emit)
      local _ <close> = closing(function() flow.sleep(2) note("outer", clock:now()) end)
      local _ <close> = closing(function() flow.sleep(1) note("inner", clock:now()) end)
      while true do emit(1) end
    end)
    for _ in s:iterate() do break end
    note("left", clock:now())
    assert.equal("failed", raised(function() for _ in s:iterate() do error("failed", 0) end end))
    note("left", clock:now())
    assert.same({ "inner 1.0", "outer 3.0", "left 3.0", "inner 4.0", "outer 6.0", "left 6.0" }, log)
  end))

  it("raises the producer's error unchanged, after the items before it", in_task(function()
    for _, value in ipairs { "text", 5, { "table" }, false } do
      for _, wait in ipairs { slowly, function() end } do
        local seen = {}
        local s = stream.new(function(emit) emit(1) wait() error(value, 0) end)
        local err = raised(function() for v in s:iterate() do seen[#seen + 1] = v end end)
        assert.is_true(rawequal(value, err))
        assert.same({ 1 }, seen)
      end
    end
    local ok, err = pcall(drain, stream.new(function() error(nil) end))
    assert.same({ false, nil }, { ok, err })
  end))

  it("has the producer in the traceback of its error", in_task(function()
    local function produce() flow.yield() error("broken") end
    local task = flow.spawn(function() drain(stream.new(function() produce() end)) end)
    assert.is_false((task:try_await()))
    assert.truthy(task:traceback():find("stream_spec.lua:" .. debug.getinfo(produce, "S").linedefined, 1, true))
  end))

  it("raises what a close handler raises, when the loop is left", in_task(function()
    local s = stream.new(function(emit)
      local _ <close> = closing(function() flow.yield() error("closing", 0) end)
      while true do emit(1) end
    end)
    assert.equal("closing", raised(function() for _ in s:iterate() do break end end))
    assert.equal("closing", raised(function() for _ in s:iterate() do error("body", 0) end end))
    assert.same({}, s:take(0):to_table())
  end))

  it("stays at its end, and ends after an error", in_task(function()
    local it = counter(1):iterate()
    assert.same({ 1, nil, nil }, { it(), it(), it() })
    local log, note = recorder()
    it = counter(3, 1, note):map(function(v) if v == 2 then error("no", 0) end return v end):iterate()
    assert.equal(1, it())
    assert.equal("no", raised(it))
    assert.same({ "counter starts", "counter closed OperationCanceled true" }, log)
    assert.is_nil(it())
    it:dispose()
    it:dispose()
    assert.equal(2, #log)
  end))

  it("may be disposed of before it starts, twice, and within a block", in_task(function()
    local log, note = recorder()
    local it = counter(2, 1, note):iterate()
    it:dispose()
    it:dispose()
    assert.is_nil(it())
    assert.same({}, log)
    do
      local inner <close> = counter(2, 1, note):iterate()
      inner()
      inner:dispose()
    end
    assert.same({ "counter starts", "counter closed OperationCanceled true" }, log)
  end))

  it("refuses nil as an item, and emits from elsewhere", in_task(function()
    local kept
    local s = stream.new(function(emit)
      kept = emit
      assert.truthy(raised(emit, nil):find("nil is not an item", 1, true))
      assert.truthy(raised(emit):find("bad argument #1", 1, true))
      local line = helper.here(1)
      local _, err = pcall(function() emit(1, 2, 3) end)
      assert.truthy(err:find(line .. ": bad argument #3 to 'emit' (an item is one or two values)", 1, true), err)
      assert.truthy(raised(emit, 1, nil, false):find("bad argument #3", 1, true))
      is_error("InvalidOperation", raised(flow.await, flow.spawn(emit, 1)), "emit")
      is_error("InvalidOperation", raised(flow.coroutine.wrap(function() emit(1) end)), "emit")
      emit(2)
      emit(false)
    end)
    assert.same({ 2, false }, s:to_table())
    raises("InvalidOperation", kept, 1)
    s = stream.new(function(emit) emit(nil) end)
    assert.truthy(raised(drain, s):find("bad argument #1 to 'emit'", 1, true))
  end))

  it("refuses to emit out of a scope", in_task(function()
    local s = stream.new(function(emit) flow.with_timeout(1, emit, 1) end)
    raises("InvalidOperation", drain, s)
    s = stream.new(function(emit)
      for _ = 1, 2 do emit((flow.with_timeout(2, function() flow.sleep(1) return 1 end))) end
    end)
    assert.same({ 1, 1 }, s:to_table())
  end))

  it("refuses two that ask at the same time, and a dispose meanwhile; the first one is unharmed", in_task(function()
    for _, s in ipairs { counter(2, 1), counter(2, 1):buffer(1), counter(2, 1):map(slowly) } do
      local it = s:iterate()
      local first = flow.spawn(it)
      flow.sleep(0.5)
      raises("InvalidOperation", it)
      raises("InvalidOperation", it.dispose, it)
      assert.equal(1, (first:await()))
      assert.equal(2, it())
      it:dispose()
    end
  end))

  it("ends for the one who waits when its block is left by another", in_task(function()
    local log, note = recorder()
    local waiting
    do
      local it <close> = stream.new(function(emit)
        local _ <close> = closing(function(err) note("closed", err.name) end)
        flow.sleep(1)
        emit(1)
      end):iterate()
      waiting = flow.spawn(it)
      flow.sleep(0.5)
    end
    raises("OperationCanceled", flow.await, waiting)
    assert.same({ "closed OperationCanceled" }, log)
  end))

  -- What happens until a second after a block that iterates has been left while another task waits for an item.
  local function left_by_another(make)
    local log, note = recorder()
    do
      local it <close> = make(note):iterate()
      flow.spawn(function() for v in it do note("item", v) end note("over") end)
      flow.sleep(1)
    end
    note("left")
    flow.sleep(1)
    return log
  end

  local function late(items)
    local ch = flow.Channel.unbounded()
    flow.spawn(function() flow.sleep(1.5) for _, v in ipairs(items) do ch:write(v) end end)
    return stream.from(ch)
  end

  it("begins nothing after its block has been left by another", in_task(function()
    local function waiting(v) flow.sleep(1.5) return v end
    assert.same({ "left", "over" }, left_by_another(function(note)
      return late({ "a" }):zip(counter(3, nil, note))
    end))
    assert.same({ "left", "over" }, left_by_another(function(note)
      return late({ "a" }):zip(counter(3, nil, note):merge(counter(3, nil, note)))
    end))
    assert.same({ "left", "over" }, left_by_another(function(note)
      return stream.from({ 1, 2 }):flat_map(function() return waiting(counter(3, nil, note)) end)
    end))
    assert.same({ "left", "over" }, left_by_another(function(note)
      return late({ "a" }):zip(stream.from({ iterate = function() note("iterate") return next, {} end }))
    end))
  end))

  it("takes no further item of its source after its block has been left by another", in_task(function()
    local ch = flow.Channel.unbounded()
    for i = 1, 4 do ch:write(i) end
    assert.same({ "left", "over" }, left_by_another(function()
      return stream.from(ch):filter(function() flow.sleep(0.6) return false end)
    end))
    assert.equal(2, ch.count)
    local endless = { "left", "asked 1", "over" }
    assert.same(endless, left_by_another(function(note)
      local asked = 0
      local function next_one() asked = asked + 1 return asked end
      return stream.from(next_one):filter(function(v) flow.sleep(1.5) note("asked", v) return v > 99 end)
    end))
    assert.same(endless, left_by_another(function(note)
      return stream.from(list(99)):filter(function(v) flow.sleep(1.5) note("asked", v) return false end)
    end))
    assert.same({ "counter starts", "counter closed OperationCanceled true", "left", "over" },
      left_by_another(function(note)
        return counter(99, nil, note):filter(function() flow.sleep(1.5) return false end)
      end))
  end))

  it("closes what a source began while its block was left by another", in_task(function()
    local log = left_by_another(function(note)
      return stream.from({ iterate = function()
        flow.sleep(1.5)
        return next, { 1 }, nil, closing(function() note("closed") end)
      end })
    end)
    assert.same({ "left", "closed", "over" }, log)
  end))

  it("is refused where its pulls need a task and there can be none, and takes nothing then", in_task(function()
    local log, note = recorder()
    local ch = flow.Channel.unbounded()
    ch:write("item")
    local token = Source().token
    is_error("InvalidOperation", select(2, helper.in_callback(function()
      for v in stream.from(ch):iterate(token) do note(v) end
    end)))
    is_error("InvalidOperation", select(2, helper.in_callback(function()
      for v in counter(2, nil, note):timeout(5):iterate() do note(v) end
    end)))
    collect()
    assert.same({}, log)
    assert.equal("item", ch:try_read())
  end))

  it("that reads ahead may be disposed of where nobody can wait: it ends on a later turn", in_task(function()
    for _, where in ipairs { helper.in_callback, function(fn) return pcall(string.gsub, "x", "x", fn) end } do
      local log, note = recorder()
      local it = counter(9, nil, note):buffer(2):iterate()
      it()
      local ok, err = where(function() it:dispose() note("disposed") end)
      assert.truthy(ok, tostring(err))
      helper.settle()
      assert.same({ "counter starts", "disposed", "counter closed OperationCanceled true" }, log)
    end
  end))

  it("tells a producer again and again to end, then closes it where it stands", in_task(function()
    local log, note = recorder()
    local s = stream.new(function(emit)
      local _ <close> = closing(function() note("closed") end)
      local refused = 0
      while true do
        local ok, err = pcall(emit, 1)
        if not ok then
          refused = refused + 1
          if refused == 1 then note(err.name) end
        end
      end
    end)
    for _ in s:iterate() do break end
    assert.same({ "OperationCanceled", "closed" }, log)
    local rest = 0
    s = stream.new(function(emit)
      for _ = 1, 10 do if not pcall(emit, 1) then rest = rest + 1 end end
      flow.sleep(1)
      note("clean")
    end)
    for _ in s:iterate() do break end
    assert.equal(10, rest)
    assert.equal("clean", log[3])
  end))

  it("keeps the writes of its producer from item to item, away from the consumer", in_task(function()
    local loc = flow.AsyncLocal()
    loc.value = "start"
    local log, note = recorder()
    local s = stream.new(function(emit)
      local _ <close> = closing(function() note("closing", loc.value) end)
      note("first", loc.value)
      loc.value = "producer"
      emit(1)
      flow.yield()
      note("second", loc.value)
      flow.spawn(function() note("child", loc.value) end):await()
      emit(2)
    end)
    local it = s:iterate()
    loc.value = "consumer"
    it()
    assert.equal("consumer", loc.value)
    it()
    assert.equal("consumer", loc.value)
    it:dispose()
    assert.equal("consumer", loc.value)
    assert.same({ "first start", "second producer", "child producer", "closing producer" }, log)
  end))

  it("does so behind a buffer, a merge and a for_each too", in_task(function()
    local loc = flow.AsyncLocal()
    loc.value = 1
    local function producer(emit)
      for _ = 1, 3 do
        emit(loc.value)
        loc.value = loc.value + 1
      end
    end
    local s = stream.new(producer)
    for _, through in ipairs { s, s:buffer(2), s:buffer(1):map(tostring):map(tonumber), s:merge({}) } do
      local it = through:iterate()
      loc.value = 10
      assert.same({ 1, 2, 3, nil, 10 }, { it(), it(), it(), it(), loc.value })
      loc.value = 1
    end
  end))

  it("is closed on a later turn when it is forgotten", in_task(function()
    local log, note = recorder()
    local loc = flow.AsyncLocal()
    for _, through in ipairs { "map", "flat_map" } do
      loc.value = "iteration"
      local s = stream.new(function(emit)
        local _ <close> = closing(function(err)
          flow.sleep(1)
          note(through, err.name, loc.value)
        end)
        for i = 1, 3 do emit(i) end
      end)
      local it = s[through](s, function(v) return through == "map" and v or { v } end):iterate()
      it()
      loc.value = "collection"
      it = nil -- luacheck: ignore
      s = nil -- luacheck: ignore
      collect()
      flow.sleep(2)
    end
    assert.same({ "map OperationCanceled iteration", "flat_map OperationCanceled iteration" }, log)
  end))

  it("that is forgotten is closed under nobody's token", in_task(function()
    local log, note = recorder()
    local it = stream.new(function(emit)
      local _ <close> = closing(function() flow.sleep(2) note("closed") end)
      for i = 1, 3 do emit(i) end
    end):iterate()
    it()
    it = nil -- luacheck: ignore
    local collector = flow.spawn(function()
      collectgarbage()
      collectgarbage()
      flow.sleep(10)
    end)
    flow.sleep(1)
    collector:cancel()
    flow.sleep(2)
    assert.same({ "closed" }, log)
  end))

  it("that is forgotten before it started leaves nothing", in_task(function()
    local log, note = recorder()
    counter(1, 1, note):iterate()
    counter(1, 1, note):buffer(2):iterate()
    counter(1, 1, note):merge(counter(1)):iterate()
    collect()
    assert.same({}, log)
  end))

  it("is closed with a consumer that is abandoned, wherever that waits", in_task(function(clock)
    local shapes = {
      plain = function(s) return s end,
      buffer = function(s) return s:buffer(2) end,
      merge = function(s) return s:merge({}) end,
      flat_map = function(s) return stream.from({ 1 }):flat_map(function() return s end) end,
    }
    local reported
    flow.on_unobserved_exception(function(err) if err.name == "TaskAbandoned" then reported = reported + 1 end end)
    local function dead() flow.TaskCompletionSource().task:await() end
    for name, shape in pairs(shapes) do
      for _, stuck in ipairs { false, true } do
        local closed = 0
        reported = 0
        flow.spawn(function()
          local s = stream.new(function(emit)
            local _ <close> = closing(function() closed = closed + 1 end)
            emit(1)
            if stuck then dead() end
            emit(2)
          end)
          for _ in shape(s):iterate() do
            if not stuck then dead() end
          end
        end)
        for _ = 1, 3 do
          clock:settle()
          collect()
        end
        assert.equal(1, closed, name)
        -- the task, and what had read ahead and waits for what can never come
        assert.equal(stuck and (name == "buffer" or name == "merge") and 2 or 1, reported, name)
      end
    end
    flow.on_unobserved_exception(function(err) io.stderr:write("unobserved: ", tostring(err), "\n") end)
  end))

  it("made of an iterator ends where that gives nil, whatever comes with it", in_task(function()
    assert.same({}, stream.from(function() return nil, "message", 5 end):to_table())
  end))

  it("may be anywhere when the state closes", function()
    assert.equal("end\n", helper.output [[
      local flow = require "coflow"
      local function producer(emit)
        local _ <close> = setmetatable({}, { __close = function() flow.sleep(1) end })
        emit(1)
        emit(2)
        flow.sleep(10)
        emit(3)
      end
      kept = {}
      for _, shape in ipairs {
        function(s) return s end,
        function(s) return s:buffer(2) end,
        function(s) return s:merge(s):timeout(5) end,
        function(s) return flow.stream.from({ s }):flat_map(function(inner) return inner end):throttle(1) end,
      } do
        local s = shape(flow.stream.new(producer))
        local it, forgotten = s:iterate(), s:iterate()
        it() forgotten()
        kept[#kept + 1] = it
        flow.spawn(s.for_each, s, function() end)
        flow.spawn(s.for_each, s, function() flow.sleep(10) end)
        flow.spawn(flow.parallel.for_each, s, function() flow.sleep(10) end)
        flow.spawn(flow.parallel.map, s, { max_degree_of_parallelism = 1 }, function() end)
      end
      for _ = 1, 5 do flow.run(flow.yield) end
      print("end")
      os.exit(0, true)
    ]])
  end)

  it("is closed by whoever stands in its loop when the state closes", function()
    assert.equal("end\nbody closed\nproducer closed\n", helper.output [[
      local flow = require "coflow"
      local function closing(what) return setmetatable({}, { __close = function() print(what .. " closed") end }) end
      flow.run(function()
        flow.spawn(function()
          for _ in flow.stream.new(function(emit)
            local _ <close> = closing "producer"
            emit(1)
          end):map(function(v) return v end):iterate() do
            local _ <close> = closing "body"
            flow.sleep(10)
          end
        end)
        flow.yield()
      end)
      print("end")
    ]])
  end)

  it("is closed with the generator that runs over it, which cannot wait for it", in_task(function(clock)
    for _, shape in ipairs { function(s) return s end, function(s) return s:buffer(2) end } do
      local log, note = recorder()
      local s = shape(stream.new(function(emit)
        local _ <close> = closing(function() note("closed", flow.is_awaitable_here()) end)
        for i = 1, 9 do
          flow.sleep(1)
          emit(i)
        end
      end))
      local co = flow.coroutine.create(function()
        for v in s:iterate() do flow.coroutine.yield(v) end
      end)
      assert.same({ true, 1 }, { flow.coroutine.resume(co) })
      assert.same({ true, 2 }, { flow.coroutine.resume(co) })
      local now = clock:now()
      assert.is_true(flow.coroutine.close(co))
      clock:settle()
      assert.equal(1, #log)
      assert.equal(now, clock:now())
    end
  end))

  it("works outside every task", function()
    local seen = {}
    for v in counter(3, 0.001):iterate() do seen[#seen + 1] = v end
    for v in counter(9):buffer(2):timeout(1):merge({ 7 }):take(3):iterate() do seen[#seen + 1] = v end
    for v in counter(2, 0.001):iterate(Source().token) do seen[#seen + 1] = v end
    for v in counter(2, 0.001):throttle(0.001):iterate(Token.none) do seen[#seen + 1] = v break end
    assert.equal(9, #seen)
    assert.same({ 1, 2 }, counter(2, 0.001):to_table())
  end)

  it("may be nested in another's producer", in_task(function()
    local function tree(depth)
      return stream.new(function(emit)
        if depth == 0 then
          flow.yield()
          emit("leaf")
          return
        end
        for leaf in tree(depth - 1):iterate() do emit(leaf) end
        emit(depth)
      end)
    end
    local found = tree(30):to_table()
    assert.equal(31, #found)
    assert.equal("leaf", found[1])
    assert.equal(30, found[31])
    for _ in tree(30):iterate() do break end
  end))

  it("is over after an error for whoever steps it as `for` does, and closed", in_task(function()
    local log, note = recorder()
    local function failing_producer()
      return stream.new(function(emit)
        local _ <close> = closing(function() note("closed") end)
        emit(1)
        error("broken", 0)
      end)
    end
    local function failing_function()
      return counter(3, nil, note):map(function(v) return v < 2 and v or error("broken", 0) end)
    end
    for _, make in ipairs { failing_producer, failing_function } do
      local f, s, control = make():iterate()
      control = f(s, control)
      assert.equal(1, control)
      assert.equal("broken", raised(f, s, control))
      note("raised")
      for _ = 1, 2 do assert.is_nil(f(s, control)) end
      f:dispose()
    end
    local f, s = counter(3, 5, note):iterate()
    raises("Timeout", flow.with_timeout, 1, f, s, nil)
    assert.is_nil(f(s, nil))
    local canceled = "counter closed OperationCanceled true"
    assert.same({ "closed", "raised", "counter starts", canceled, "raised", "counter starts", canceled }, log)
  end))

  it("composes to any depth without a C call a level", in_task(function()
    local s = stream.from(list(3))
    local n = many(1000, 250)
    for i = 1, n do
      if i % 4 == 0 then s = s:filter(function() return true end)
      elseif i % 4 == 1 then s = s:map(function(v) return v end)
      elseif i % 4 == 2 then s = s:flat_map(function(v) return { v } end)
      else s = s:zip(list(5)):map(function(v) return v end) end
    end
    assert.same({ 1, 2, 3 }, s:to_table())
    assert.same({ 1 }, s:take(1):to_table())
  end))

  it("refuses bad arguments", in_task(function()
    local s = stream.from {}
    for name, bad in pairs {
      map = { 1 }, filter = { {} }, flat_map = { "x" }, for_each = { false }, reduce = { 1 }, take = { -1 },
      skip = { 1.5 }, chunk = { 0 }, buffer = { 0 }, zip = { 5 }, merge = { true }, timeout = { -1 },
      throttle = { 0 / 0 }, iterate = { "token" }, to_table = { 1 },
    } do
      local err = raised(load("local s, bad = ... local _ = s:" .. name .. "(bad) return _"), s, bad[1])
      assert.equal("string", type(err))
      assert.truthy(err:find("bad argument #1 to '" .. name .. "'", 1, true), err)
      err = raised(load("local s, bad = ... local _ = s." .. name .. "(bad, bad) return _"), s, bad[1])
      assert.truthy(err:find("bad argument #1 to '" .. name .. "' (coflow.Stream expected", 1, true), err)
    end
    for _, bad in ipairs { 5, "text", true } do
      assert.truthy(raised(function() local _ = stream.from(bad) return _ end):find("#1 to 'from'", 1, true))
    end
    assert.has_error(function() stream.new(5) end)
    assert.has_error(function() stream.from() end)
    assert.has_error(function() s:timeout("1") end)
    assert.has_error(function() s:throttle(math.huge) end)
    assert.has_error(function() s:merge({}, 5) end)
    assert.has_error(function() s:iterate().dispose({}) end)
  end))
end)

describe("a coroutine that dies", function()
  local libraries = { coroutine, flow.coroutine }

  it("in a pull ends the iteration, which is in use no more", in_task(function()
    for _, library in ipairs(libraries) do
      local log, note = recorder()
      local it = counter(3, nil, note):map(function() error("map", 0) end):iterate()
      local co = library.create(function() it() end)
      assert.same({ false, "map" }, { library.resume(co) })
      assert.same({ "counter starts", "counter closed OperationCanceled true" }, log)
      assert.is_nil(it())
      it:dispose()
    end
  end))

  it("in the function of reduce or for_each closes the producer", in_task(function()
    for _, method in ipairs { "reduce", "for_each" } do
      local log, note = recorder()
      local co = flow.coroutine.create(function()
        local s = counter(3, nil, note)
        s[method](s, function() error(method, 0) end)
      end)
      assert.same({ false, method }, { flow.coroutine.resume(co) })
      assert.same({ "counter starts", "counter closed OperationCanceled true" }, log)
    end
  end))

  it("as it disposes of an iteration closes the producer all the same", in_task(function()
    local log, note = recorder()
    local it = stream.new(function(emit, token)
      local _ <close> = closing(function() note("closed") end)
      token:register(function() error("in a callback", 0) end)
      emit(1)
    end):iterate()
    it()
    local co = flow.coroutine.create(function() it:dispose() end)
    local _, err = flow.coroutine.resume(co)
    assert.same({ "in a callback" }, helper.inner(err))
    assert.same({ "closed" }, log)
  end))
end)

describe("a stream's token", function()
  it("that is canceled before starts nothing", in_task(function()
    local log, note = recorder()
    local source = Source()
    source:cancel()
    assert.equal(source.token, raises("OperationCanceled", drain, counter(3, 1, note), source.token).token)
    raises("OperationCanceled", drain, stream.from { 1 }, Token.canceled)
    assert.same({}, log)
    local task = flow.spawn(function()
      raises("OperationCanceled", drain, counter(3, 1, note))
      counter(1, nil, note):to_table(Token.none)
    end)
    task:cancel()
    task:await()
    assert.same({ "counter starts", "counter closed nil false" }, log)
  end))

  it("that is not canceled is not that of the error when the ambient one is", in_task(function()
    for name, s in pairs {
      producer = counter(9, 9), buffer = counter(9, 9):buffer(2), merge = counter(9, 9):merge(counter(9, 9)),
      flat_map = stream.from({ 1 }):flat_map(function() return counter(9, 9) end),
    } do
      local ambient
      local task = flow.spawn(function()
        ambient = flow.cancellation_token()
        s:to_table(Source().token)
      end)
      flow.sleep(1)
      task:cancel("enough")
      local err = raises("OperationCanceled", flow.await, task)
      assert.equal(ambient, err.token, name)
      assert.equal("enough", err.reason)
    end
  end))

  it("ends the iteration where the producer waits, at once", in_task(function(clock)
    local log, note = recorder()
    local source = Source(1.5)
    local err = raises("OperationCanceled", function()
      for v in counter(5, 1, note):iterate(source.token) do note(v) end
    end)
    assert.equal(source.token, err.token)
    assert.equal(1.5, clock:now())
    assert.same({ "counter starts", "1", "counter closed OperationCanceled true" }, log)
  end))

  it("counts also where it was canceled between two items", in_task(function()
    local source = Source()
    local seen = {}
    local err = raises("OperationCanceled", function()
      for v in counter(5, 1):iterate(source.token) do
        seen[#seen + 1] = v
        if v == 2 then source:cancel("enough") end
      end
    end)
    assert.same({ 1, 2 }, seen)
    assert.equal(source.token, err.token)
    assert.equal("enough", err.reason)
  end))

  it("only tells a producer that never waits", in_task(function()
    local source = Source()
    local seen, told = {}, {}
    local s = stream.new(function(emit, token)
      for i = 1, 3 do
        emit(i)
        told[i] = token.is_cancellation_requested
      end
    end)
    for v in s:iterate(source.token) do
      seen[#seen + 1] = v
      if v == 2 then source:cancel() end
    end
    assert.same({ 1, 2, 3 }, seen)
    assert.same({ false, true, true }, told)
  end))

  it("is combined with the ambient one, for the producer", in_task(function()
    local told = {}
    local s = stream.new(function(emit, token)
      token:register(function() told[#told + 1] = true end)
      emit(1)
      flow.shield(flow.sleep, 5)
      told[#told + 1] = token.is_cancellation_requested
    end)
    raises("Timeout", flow.with_timeout, 1, function()
      drain(s, Source().token)
      flow.yield()
    end)
    assert.same({ true, true }, told)
    told = {}
    drain(s, Source(1).token)
    assert.same({ true, true }, told)
    told = {}
    flow.with_timeout(1, drain, s, Token.none)
    assert.same({ false }, told)
  end))

  it("reaches through operators and their tasks", in_task(function(clock)
    for _, shape in ipairs {
      function(s) return s:buffer(2) end,
      function(s) return s:merge(counter(9, 10)) end,
      function(s) return s:map(tostring):timeout(9):chunk(3) end,
      function(s) return stream.from { 1 }:flat_map(function() return s end):throttle(0) end,
    } do
      local log, note = recorder()
      local start, source = clock:now(), Source(0.5)
      assert.equal(source.token, raises("OperationCanceled", drain, shape(counter(9, 1, note)), source.token).token)
      assert.equal(0.5, clock:now() - start)
      assert.same({ "counter starts", "counter closed OperationCanceled true" }, log)
    end
  end))

  it("leaves an error alone that is somebody else's", in_task(function()
    local source, mine = Source(), flow.errors.OperationCanceled("mine")
    source:cancel()
    local other = Source()
    other:cancel()
    for _, err in ipairs { mine, "text", raised(other.token.throw_if_cancellation_requested, other.token) } do
      local live = Source()
      local s = stream.new(function(emit) emit(1) error(err, 0) end)
      assert.is_true(rawequal(err, raised(function()
        for _ in s:iterate(live.token) do live:cancel() end
      end)))
    end
  end))

  it("is canceled by an early close, before the producer goes on", in_task(function()
    local log, note = recorder()
    local s = stream.new(function(emit, token)
      token:register(function() note("told") end)
      local _ <close> = closing(function() note("closed") end)
      emit(1)
      emit(2)
    end)
    for _ in s:iterate() do break end
    s:take(1):to_table()
    drain(s)
    assert.same({ "told", "closed", "told", "closed", "closed" }, log)
  end))

  it("runs callbacks whose errors do not keep the producer open", in_task(function()
    local log, note = recorder()
    local s = stream.new(function(emit, token)
      token:register(error, "callback", 0)
      local _ <close> = closing(function() note("closed") end)
      emit(1)
    end)
    local err = raises("Aggregate", function() for _ in s:iterate() do break end end)
    assert.same({ "callback" }, helper.inner(err))
    assert.same({ "closed" }, log)
  end))

  it("leaves nothing registered after the end", in_task(function()
    local source = Source()
    local weak = setmetatable({}, { __mode = "v" })
    local function run(leave)
      local s = stream.new(function(emit, token)
        weak[#weak + 1] = token
        emit(1)
        emit(2)
      end)
      for _ in s:iterate(source.token) do if leave then break end end
    end
    flow.spawn(run, true):await() -- a task of its own: the last traceback is kept with it
    flow.spawn(run, false):await()
    collect()
    assert.is_nil(next(weak))
    source:cancel()
  end))
end)

describe("stream.from", function()
  it("takes a list, also one with false and n", in_task(function()
    assert.same({ 1, false, 3 }, stream.from({ 1, false, 3, n = 3 }):to_table())
    assert.same({ 1, 2 }, stream.from({ 1, 2, 3, n = 2 }):to_table())
    assert.same({}, stream.from({ 1, n = 0 }):to_table())
    assert.same({}, stream.from({}):to_table())
    is_error("InvalidOperation", raised(drain, stream.from({ 1, nil, 3, n = 3 })), "element 2")
  end))

  it("takes what for takes, and closes its closing value", in_task(function()
    assert.same({ { "a", 1 } }, stream.from(pairs { a = 1 }):to_table())
    assert.same({ { "k", "v" }, { "x", "y" } }, stream.from(("k=v x=y"):gmatch("(%w+)=(%w+)")):to_table())
    local log, note = recorder()
    local function numbers() return function(n, i) if i < n then return i + 1 end end, 3, 0, closing(note) end
    assert.same({ 1, 2, 3 }, stream.from(numbers()):to_table())
    assert.same({ 1 }, stream.from(numbers()):take(1):to_table())
    assert.equal(2, #log)
    local i = 0
    local callable = setmetatable({}, { __call = function() i = i + 1 if i < 3 then return i end end })
    assert.same({ 1, 2 }, stream.from(callable):to_table())
  end))

  -- once the third value was lost
  it("refuses an iterator that gives three values", in_task(function()
    local log, note = recorder()
    local closed = closing(function() note("closed") end)
    local function three() return 1, 2, false end
    for _, through in ipairs { "map", "buffer", "merge" } do
      local s = stream.from(three, nil, nil, closed)
      s = through == "map" and s or s[through](s, through == "buffer" and 1 or {})
      local it <close> = s:iterate()
      is_error("InvalidOperation", raised(it), "an item is one or two values")
      assert.is_nil(it())
    end
    assert.same({ "closed", "closed", "closed" }, log)
    is_error("InvalidOperation", raised(drain, stream.from(("abc"):gmatch("(.)(.)(.)"))), "iterator")
  end))

  -- once it said source.lua:135: bad argument #1 to 'fn'
  it("says of a function of C that it is no iterator of that, without a place in the library", in_task(function()
    local expected = "bad argument #1 to 'next' (table expected, got nil)"
    assert.equal(expected, raised(drain, stream.from(next)))
    assert.equal(expected, raised(flow.parallel.for_each, next, print))
    assert.equal(expected, raised(drain, stream.from { 1 }:flat_map(function() return next end)))
    assert.same({ { 1, "a" }, { 2, "b" } }, stream.from(next, { "a", "b" }):to_table())
    local values = { 1, {}, 3 }
    local pulled = stream.from(flow.coroutine.wrap(function()
      for _, value in ipairs(values) do
        flow.yield() -- in the first call as in the later ones
        flow.coroutine.yield(value)
      end
    end)):to_table()
    assert.same(values, pulled)
    local err = {}
    assert.equal(err, raised(drain, stream.from(flow.coroutine.wrap(function() error(err) end))))
  end))

  it("takes a stream, an iteration of one, and anything that can be iterated", in_task(function()
    local log, note = recorder()
    local s = counter(3, nil, note)
    assert.equal(s, stream.from(s))
    assert.same({ 1, 2 }, stream.from(s:iterate()):take(2):to_table())
    assert.equal("counter closed OperationCanceled true", log[2])
    local opened = 0
    local thing = { iterate = function(_, token)
      opened = opened + 1
      return s:iterate(token)
    end }
    local from = stream.from(thing)
    assert.equal(0, opened)
    assert.same({ 1, 2, 3 }, from:to_table())
    assert.same({ 1 }, from:take(1):to_table())
    assert.equal("counter closed OperationCanceled true", log[#log])
    assert.equal(2, opened)
    local source = Source(0.5)
    thing = { iterate = function(_, token) return counter(1, 5):iterate(token) end }
    assert.equal(source.token, raises("OperationCanceled", drain, stream.from(thing), source.token).token)
  end))

  it("raises what a source's iterate raises, when it is asked", in_task(function()
    local s = stream.from { iterate = function() error("closed", 0) end }
    assert.equal("closed", raised(drain, s))
    assert.equal("closed", raised(drain, stream.from({ 1 }):flat_map(function() return s end)))
  end))
end)

describe("a list", function()
  it("has as many items for stream.from as for parallel.map", in_task(function()
    local function size(n) return setmetatable({ 1, 2, 3 }, { __len = function() return n end }) end
    local lists = { {}, { 1, 2, 3 }, { 1, 2, 3, n = 2 }, { 1, 2, 3, n = "2" }, { 1, n = 0 }, size(2), size(0) }
    for _, items in ipairs(lists) do
      local all = flow.parallel.map(items, function(item) return item end)
      assert.equal(#all, #stream.from(items):to_table())
    end
  end))

  it("with a hole in it has an item that is nil, which is told", in_task(function()
    for _, items in ipairs { { 1, nil, 3 }, { 1, nil, 3, n = 3 }, { 1, n = 2 } } do
      assert.is_true(flow.parallel.map(items, function(item) return item end).n >= 2)
      local seen = {}
      is_error("InvalidOperation", raised(function()
        stream.from(items):for_each(function(item) seen[#seen + 1] = item end)
      end), "element 2")
      assert.same({ 1 }, seen)
    end
  end))

  it("may grow while it is iterated over", in_task(function()
    local items = { 1 }
    stream.from(items):for_each(function(item) if item < 5 then items[#items + 1] = item + 1 end end)
    assert.same({ 1, 2, 3, 4, 5 }, items)
  end))
end)

describe("stream.from a channel", function()
  it("gives what is written, and what the channel ended with", in_task(function()
    local ch = flow.Channel.bounded(2)
    flow.spawn(function()
      for i = 1, 5 do ch:write(i) end
      ch:complete()
    end)
    assert.same({ 1, 2, 3, 4, 5 }, stream.from(ch):to_table())
    assert.same({}, stream.from(ch.reader):to_table())
    local problem = {}
    ch = flow.Channel.unbounded()
    ch:write(1)
    ch:complete(problem)
    local seen = {}
    assert.equal(problem, raised(function() for v in stream.from(ch):iterate() do seen[#seen + 1] = v end end))
    assert.same({ 1 }, seen)
  end))

  it("loses no item to a pull that is canceled", in_task(function()
    local ch = flow.Channel.unbounded()
    local source = Source(1)
    for _, shape in ipairs {
      function(s) return s end,
      function(s) return s:map(tostring):filter(function() return true end) end,
      function(s) return s:timeout(5) end,
      function(s) return s:buffer(2) end,
    } do
      raises("OperationCanceled", drain, shape(stream.from(ch)), source.token)
      source = Source(1)
    end
    raises("Timeout", drain, stream.from(ch):timeout(2))
    ch:write("kept")
    ch:write("left")
    assert.same({ "kept" }, stream.from(ch):take(1):to_table())
    assert.equal("left", ch:read())
  end))
end)

describe("operators", function()
  it("map, filter, take, skip and chunk", in_task(function()
    local s = counter(6, 0.1)
    assert.same({ 2, 4, 6, 8, 10, 12 }, s:map(function(v) return v * 2, "dropped" end):to_table())
    assert.same({ 2, 4, 6 }, s:filter(function(v) return v % 2 == 0 end):to_table())
    assert.same({ 1, 2 }, s:take(2):to_table())
    assert.same({}, s:take(0):to_table())
    assert.same({ 5, 6 }, s:skip(4):to_table())
    assert.same({}, s:skip(9):to_table())
    assert.same({ 1, 2, 3, 4, 5, 6 }, s:skip(0):take(99):to_table())
    assert.same({ { 1, 2, 3, 4 }, { 5, 6 } }, s:chunk(4):to_table())
    assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, s:chunk(3.0):to_table())
    assert.same({}, stream.from({}):chunk(2):to_table())
    assert.same({ "1", "2" }, s:map(slowly):filter(slowly):map(tostring):take(2):to_table())
  end))

  it("ask for no more than they need", in_task(function()
    local log, note = recorder()
    local s = stream.new(function(emit) for i = 1, 9 do note(i) emit(i) end end)
    assert.same({ 1, 2 }, s:take(2):to_table())
    s:take(0):to_table()
    s:skip(1):take(1):to_table()
    assert.same({ "1", "2", "1", "2" }, log)
  end))

  it("run their functions on the consumer's task, as plain calls", in_task(function()
    local loc = flow.AsyncLocal()
    local s = counter(2, 1):map(function(v)
      loc.value = v
      return flow.current_task()
    end)
    assert.same({ flow.current_task(), flow.current_task() }, s:to_table())
    assert.equal(2, loc.value)
  end))

  it("raise the errors of their functions, and close the source", in_task(function()
    local function bad() flow.yield() error("bad", 0) end
    for _, name in ipairs { "map", "filter", "flat_map", "for_each", "reduce" } do
      local log, note = recorder()
      local s = counter(3, nil, note)
      local err = raised(function()
        local made = s[name](s, bad)
        if made then drain(made) end
      end)
      assert.equal("bad", err)
      assert.same({ "counter starts", "counter closed OperationCanceled true" }, log)
    end
    local log, note = recorder()
    local function nothing() end
    assert.equal(("bad argument #1 to 'map' (its function (defined at %s:%d) returned nil, which is not an item: "
      .. "filter leaves items out)"):format(debug.getinfo(1, "S").short_src, debug.getinfo(nothing, "S").linedefined),
      raised(drain, counter(1, nil, note):map(nothing)))
    assert.truthy(raised(drain, counter(1, nil, note):flat_map(function() end)):find("'flat_map'", 1, true))
    assert.equal(4, #log)
  end))

  it("flat_map goes through one after the other and closes each", in_task(function()
    local log, note = recorder()
    local s = counter(3, 1, note, "outer"):flat_map(function(v)
      return v == 2 and {} or counter(2, 1, note, "inner" .. v):map(function(w) return v * 10 + w end)
    end)
    assert.same({ 11, 12, 31, 32 }, s:to_table())
    assert.same({ "outer starts", "inner1 starts", "inner1 closed nil false", "inner3 starts",
      "inner3 closed nil false", "outer closed nil false" }, log)
    log, note = recorder()
    s = counter(1, nil, note, "outer"):flat_map(function() return counter(2, nil, note, "inner") end)
    assert.same({ 1 }, s:take(1):to_table())
    assert.same({ "outer starts", "inner starts", "inner closed OperationCanceled true",
      "outer closed OperationCanceled true" }, log)
  end))

  it("flat_map closes the outer one also when the inner one fails to close", in_task(function()
    local log, note = recorder()
    local inner = stream.new(function(emit)
      local _ <close> = closing(function() error("inner", 0) end)
      emit(1)
      emit(2)
    end)
    local s = counter(2, nil, note):flat_map(function() return inner end)
    assert.equal("inner", raised(function() for _ in s:iterate() do break end end))
    assert.equal("counter closed OperationCanceled true", log[2])
  end))

  it("zip goes on until either ends, and closes both", in_task(function()
    local log, note = recorder()
    local long, short = counter(5, nil, note, "long"), counter(2, nil, note, "short")
    local seen = {}
    for a, b in long:zip(short):iterate() do seen[#seen + 1] = a .. ":" .. b end
    assert.same({ "1:1", "2:2" }, seen)
    assert.same({ "long starts", "short starts", "short closed nil false", "long closed OperationCanceled true" }, log)
    assert.same({ { 1, "a" }, { 2, "b" } }, short:zip({ "a", "b", "c" }):to_table())
    assert.equal("short closed nil false", log[6])
    assert.same({ { { 1, 1 }, 1 } }, short:zip(short):zip({ 1 }):to_table())
  end))

  it("give both values of an item on", in_task(function()
    local s = stream.from({ 1, 2, 3 }):zip({ "a", "b", "c" })
    local function both(v, w) assert.equal(("abc"):sub(v, v), w) return true end
    s = s:filter(both):skip(1):take(2):buffer(1):throttle(0):timeout(1):merge({})
    assert.same({ { 2, "b" }, { 3, "c" } }, s:to_table())
    assert.same({ "2b", "3c" }, s:map(function(v, w) return v .. w end):to_table())
    assert.same({ { { 2, "b" }, { 3, "c" } } }, s:chunk(5):to_table())
    assert.equal("2b3c", s:reduce(function(all, v, w) return all .. v .. w end, ""))
    local seen = {}
    s:for_each(function(v, w) seen[v] = w end)
    assert.same({ [2] = "b", [3] = "c" }, seen)
  end))

  it("of one value are given to functions alone", in_task(function()
    local log, note = helper.recorder()
    local function count(...)
      note(select("#", ...), ...)
      return true
    end
    local one, two = stream.from { 1, 2 }, stream.from { 1 }:zip { 2 }
    one:for_each(count)
    one:map(count):filter(count):to_table()
    one:flat_map(function(...) count(...) return {} end):to_table()
    assert.same({ "1 1", "1 2", "1 1", "1 true", "1 2", "1 true", "1 1", "1 2" }, log)
    assert.equal(2, one:reduce(math.max, 0))
    table.move({}, 1, #log, 1, log)
    two:for_each(count)
    two:map(count):to_table()
    two:filter(count):to_table()
    two:flat_map(function(...) count(...) return {} end):to_table()
    two:reduce(count, 0)
    assert.same({ "2 1 2", "2 1 2", "2 1 2", "2 1 2", "3 0 1 2" }, log)
  end))

  it("to_table, reduce and for_each, each with its twin", in_task(function()
    local s = counter(4, 0.5)
    local function add(a, b) return a + b end
    assert.equal(10, s:reduce(add))
    assert.equal(20, s:reduce(add, 10))
    assert.equal(5, stream.from({}):reduce(add, 5))
    assert.equal(7, stream.from({ 7 }):reduce(error))
    assert.is_nil(stream.from({ 1, 2 }):reduce(function() end))
    raises("InvalidOperation", function() stream.from({}):reduce(add) end)
    local seen = {}
    s:for_each(function(v) flow.yield() seen[#seen + 1] = v end)
    assert.same({ 1, 2, 3, 4 }, seen)
    assert.equal(10, (s:reduce_async(add):await()))
    assert.same({ 1, 2, 3, 4 }, (s:to_table_async():await()))
    s:for_each_async(function() end):await()
    local task = s:to_table_async()
    flow.sleep(0.7)
    task:cancel()
    raises("OperationCanceled", flow.await, task)
    raises("OperationCanceled", s.for_each, s, print, Token.canceled)
    raises("OperationCanceled", s.reduce, s, print, 1, Token.canceled)
  end))

  it("timeout bounds the wait for each item, not what is done between", in_task(function(clock)
    local log, note = recorder()
    local s = stream.new(function(emit)
      local _ <close> = closing(function(err) note("closed", err.name) end)
      for i = 1, 5 do
        flow.sleep(i)
        emit(i)
      end
    end):timeout(2.5)
    local seen = {}
    local err = raises("Timeout", function()
      for v in s:iterate() do
        seen[#seen + 1] = v
        flow.sleep(10)
      end
    end)
    assert.same({ 1, 2 }, seen)
    assert.equal(25.5, clock:now())
    assert.same({ "closed OperationCanceled" }, log)
    assert.truthy(err)
    raises("Timeout", drain, counter(1):timeout(0))
    assert.same({ 1 }, counter(1, 5):timeout():timeout(math.huge):to_table())
  end))

  it("throttle delays what comes too soon, and nothing else", in_task(function(clock)
    local times = {}
    local waits = { 0, 0, 0, 5, 0.5 }
    local s = stream.new(function(emit)
      for i, wait in ipairs(waits) do
        flow.sleep(wait)
        emit(i)
      end
    end)
    for v in s:throttle(1):iterate() do times[#times + 1] = v .. "@" .. clock:now() end
    assert.same({ "1@0.0", "2@1.0", "3@2.0", "4@7.0", "5@8.0" }, times)
  end))
end)

describe("buffer", function()
  it("reads ahead by as many items as told, from the first pull on", in_task(function()
    local log, note = recorder()
    local s = stream.new(function(emit)
      for i = 1, 6 do
        note("emit", i)
        emit(i)
      end
    end):buffer(2)
    local it = s:iterate()
    flow.sleep(1)
    assert.same({}, log)
    assert.equal(1, it())
    flow.sleep(1)
    assert.same({ "emit 1", "emit 2", "emit 3" }, log)
    assert.same({ 2, 3 }, { it(), it() })
    flow.sleep(1)
    assert.equal(5, #log)
    assert.same({ 4, 5, 6, nil, nil }, { it(), it(), it(), it(), it() })
  end))

  it("overlaps producer and consumer", in_task(function(clock)
    for v in counter(3, 1):buffer(1):iterate() do
      assert.is_number(v)
      flow.sleep(1)
    end
    assert.equal(4, clock:now())
  end))

  it("gives the items before an error, then the error, unchanged", in_task(function()
    local problem, seen = {}, {}
    local s = stream.new(function(emit)
      emit(1)
      emit(2)
      error(problem)
    end):buffer(5)
    local it = s:iterate()
    seen[1] = it()
    flow.sleep(1)
    seen[2] = it()
    assert.is_true(rawequal(problem, raised(it)))
    assert.is_nil(it())
    assert.same({ 1, 2 }, seen)
  end))

  it("has ended its task and closed the source when the loop is left", in_task(function(clock)
    local log, note = recorder()
    local function left(seconds)
      local s = stream.new(function(emit)
        local _ <close> = closing(function() flow.sleep(1) note("closed", clock:now()) end)
        for i = 1, 9 do
          if i > 1 and seconds then flow.shield(flow.sleep, seconds) end
          emit(i)
        end
      end):buffer(2)
      for _ in s:iterate() do
        flow.sleep(1)
        break
      end
      note("left", clock:now())
    end
    left()
    left(4)
    assert.same({ "closed 2.0", "left 2.0", "closed 7.0", "left 7.0" }, log)
  end))

  it("interrupts what the source waits for when the loop is left", in_order(function(clock)
    local log, note = recorder()
    for _ in counter(2, 10, note):merge({ 1 }):iterate() do break end
    assert.equal(0, clock:now())
    assert.same({ "counter starts", "counter closed OperationCanceled true" }, log)
  end))

  it("waits for its task also while a cancellation unwinds the consumer", in_task(function(clock)
    local log, note = recorder()
    local s = stream.new(function(emit)
      local _ <close> = closing(function() flow.shield(flow.sleep, 3) note("closed", clock:now()) end)
      while true do emit(1) end
    end):buffer(2)
    raises("Timeout", flow.with_timeout, 1, function()
      for _ in s:iterate() do flow.sleep(5) end
    end)
    assert.same({ "closed 4.0" }, log)
  end))

  it("drops an error that nobody came to, but not that of a close handler", in_task(function()
    local reports = {}
    flow.on_unobserved_exception(function(err) reports[#reports + 1] = err end)
    local s = stream.new(function(emit) emit(1) error("ahead", 0) end)
    for _ in s:buffer(3):iterate() do flow.sleep(1) break end
    for _ in s:buffer(3):merge(counter(3, 5)):iterate() do flow.sleep(1) break end
    collect()
    s = stream.new(function(emit)
      local _ <close> = closing(function() error("closing", 0) end)
      while true do emit(1) end
    end)
    assert.equal("closing", raised(function() for _ in s:buffer(3):iterate() do break end end))
    assert.equal("closing", raised(function() for _ in s:merge(s):iterate() do break end end))
    collect()
    flow.on_unobserved_exception(function(err) io.stderr:write("unobserved: ", tostring(err), "\n") end)
    assert.same({}, reports)
  end))

  it("keeps nothing of itself, nor of what it had read ahead, when the loop is left", in_task(function()
    local weak = setmetatable({}, { __mode = "v" })
    flow.spawn(function()
      local s = stream.new(function(emit)
        for i = 1, 9 do
          local item = {}
          weak[i] = item
          emit(item)
        end
      end)
      weak.fn = function(v) return v, weak end
      for _ in s:map(weak.fn):buffer(3):iterate() do
        flow.sleep(1)
        break
      end
    end):await()
    collect()
    assert.is_nil(next(weak))
  end))

  it("stops reading ahead when the iteration's token is canceled", in_task(function(clock)
    local log, note = recorder()
    local s = stream.new(function(emit)
      local _ <close> = closing(function(err) note("closed", err.name, clock:now()) end)
      emit(1)
      flow.sleep(100)
    end)
    local source = Source(0.5)
    raises("OperationCanceled", function()
      for _ in s:buffer(2):iterate(source.token) do flow.sleep(10) end
    end)
    assert.same({ "closed OperationCanceled 0.5" }, log)
    assert.equal(10, clock:now())
  end))

  it("is under the token of its iteration, not of a scope around a pull", in_task(function()
    local it = counter(3, 1):buffer(2):iterate()
    assert.equal(1, flow.with_timeout(5, it))
    flow.sleep(10)
    assert.equal(2, flow.with_timeout(5, it))
    it:dispose()
  end))

  it("that is forgotten ends its task", in_task(function(clock)
    local log, note = recorder()
    local it = counter(9, nil, note):buffer(2):iterate()
    it()
    clock:settle()
    it = nil -- luacheck: ignore
    collect()
    flow.sleep(1)
    assert.equal("counter starts", log[1])
    assert.equal(2, #log)
  end))
end)

describe("merge", function()
  it("gives the items in order of arrival, all of them", in_order(function(clock)
    local function every(seconds, name)
      return counter(3, seconds):map(function(i) return name .. i end)
    end
    local seen = {}
    for v in every(2, "a"):merge(every(3, "b"), { "c1", "c2" }):iterate() do
      seen[#seen + 1] = v .. "@" .. clock:now()
    end
    assert.same({ "c1@0.0", "c2@0.0", "a1@2.0", "b1@3.0", "a2@4.0", "b2@6.0", "a3@6.0", "b3@9.0" }, seen)
  end))

  it("ends with the first error, after the items before it, and closes the others", in_task(function(clock)
    local log, note = recorder()
    local failing = stream.new(function(emit) emit("f") flow.sleep(2.5) error("failed", 0) end)
    local seen = {}
    assert.equal("failed", raised(function()
      for v in counter(9, 1, note):merge(failing, counter(9, 1, note, "other")):iterate() do seen[#seen + 1] = v end
    end))
    assert.same({ "f", 1, 1, 2, 2 }, seen)
    assert.equal(2.5, clock:now())
    table.sort(log)
    assert.same({ "counter closed OperationCanceled true", "counter starts", "other closed OperationCanceled true",
      "other starts" }, log)
  end))

  it("takes no more than an item of each ahead", in_task(function()
    local log, note = recorder()
    local s = stream.new(function(emit) for i = 1, 9 do note(i) emit(i) end end)
    local it = s:merge(s):iterate()
    it()
    flow.sleep(1)
    table.sort(log)
    assert.same({ "1", "1", "2" }, log)
    it:dispose()
  end))

  it("loses and doubles nothing, whatever the order", function()
    testing.explore(function()
      local streams, n = {}, 4
      for i = 1, n do
        streams[i] = stream.new(function(emit)
          for k = 1, 5 do
            for _ = 1, (i * k) % 3 do flow.yield() end
            emit(i * 10 + k)
          end
        end):buffer(i)
      end
      local last, count = {}, 0
      local s = streams[1]:merge(table.unpack(streams, 2)):map(slowly):buffer(3)
      for v in s:iterate() do
        local i, k = v // 10, v % 10
        assert.equal((last[i] or 0) + 1, k)
        last[i], count = k, count + 1
      end
      assert.equal(5 * n, count)
    end, { runs = many(50, 2) })
  end)

  it("closes whatever the order", function()
    testing.explore(function()
      local log, note = recorder()
      local s = counter(9, nil, note):merge(counter(9, 1, note), counter(9, 2, note):buffer(2)):map(slowly)
      for v in s:iterate() do if v == 3 then break end end
      local opened, closed = 0, 0
      for _, event in ipairs(log) do
        if event:find("starts") then opened = opened + 1 else closed = closed + 1 end
      end
      assert.equal(3, opened)
      assert.equal(3, closed)
    end, { runs = many(50, 2) })
  end)
end)

-- Random pipelines against lists. Whatever the operators, the order and the way out: the items are the first ones of
-- those that the same operators give on a list, and when the loop is left each producer that began has been left, once.
describe("a pipeline of any operators", function()
  local function random_pipeline(random, opened)
    local function wait()
      local kind = random(6)
      if kind == 1 then flow.yield() elseif kind == 2 then flow.sleep(random(3)) end
    end
    local function producer(values)
      return stream.new(function(emit)
        opened.now = opened.now + 1
        opened.ever = opened.ever + 1
        local _ <close> = closing(function()
          if random(2) == 1 then flow.shield(wait) end
          opened.now = opened.now - 1
        end)
        for _, v in ipairs(values) do
          wait()
          if random(20) == 1 then pcall(wait) end
          emit(v)
        end
      end)
    end
    local function flattened(values, fn)
      local result = {}
      for _, v in ipairs(values) do
        for _, w in ipairs(fn(v)) do result[#result + 1] = w end
      end
      return result
    end
    local operators = {
      function(s, list_) return s:map(function(v) wait() return v + 1 end),
        flattened(list_, function(v) return { v + 1 } end) end,
      function(s, list_) return s:filter(function(v) wait() return v % 3 ~= 0 end),
        flattened(list_, function(v) return v % 3 ~= 0 and { v } or {} end) end,
      function(s, list_)
        local n = random(12)
        return s:take(n), table.move(list_, 1, math.min(n, #list_), 1, {})
      end,
      function(s, list_)
        local n = random(3)
        return s:skip(n), table.move(list_, n + 1, #list_, 1, {})
      end,
      function(s, list_) return s:flat_map(function(v) return producer({ v, -v }) end),
        flattened(list_, function(v) return { v, -v } end) end,
      function(s, list_)
        local n = random(4)
        return s:chunk(n):flat_map(function(chunk) return chunk end), list_
      end,
      function(s, list_)
        return s:zip(producer(list(9))):map(function(a, b) return a * 10 + b end), (function()
          local result = {}
          for i = 1, math.min(9, #list_) do result[i] = list_[i] * 10 + i end
          return result
        end)()
      end,
      function(s, list_) return s:buffer(random(3)), list_ end,
      function(s, list_) return s:merge(producer({})), list_ end,
      function(s, list_) return s:throttle(random(3) - 1), list_ end,
      function(s, list_) return s:timeout(1000), list_ end,
    }
    local values = list(random(15) - 1)
    local s, expected = producer(values), values
    for _ = 1, random(6) do s, expected = operators[random(#operators)](s, expected) end
    return s, expected, wait
  end

  it("gives what it should, and closes what it opened", function()
    local left = 0
    for seed = 1, helper.seeds(100, 6) do
      local random = support.random(seed)
      testing.run(function()
        local opened = { now = 0, ever = 0 }
        local s, expected, wait = random_pipeline(random, opened)
        local way, at, seen = random(5), random(10), {}
        local problem = {}
        local function consume(token)
          for v in s:iterate(token) do
            seen[#seen + 1] = v
            wait()
            if #seen == at and way == 2 then break end
            if #seen == at and way == 3 then error(problem) end
          end
        end
        local source <close> = Source(way == 5 and at or nil)
        local ok, err = pcall(flow.with_timeout, way == 4 and at or nil, consume, source.token)
        if not ok then
          left = left + 1
          if way == 3 then assert.equal(problem, err)
          else is_error(way == 4 and "Timeout" or "OperationCanceled", err) end
        elseif way ~= 2 or #seen < at then
          assert.equal(#expected, #seen)
        end
        for i, v in ipairs(seen) do assert.equal(expected[i], v) end
        assert.equal(0, opened.now)
      end, { seed = seed })
    end
    assert.is_true(left > 0)
  end)
end)

describe("what closing a source raises", function()
  local function from(n, problem)
    local i = 0
    return stream.from(function()
      i = i + 1
      if i <= n then return i end
    end, nil, nil, setmetatable({}, { __close = function() error(problem, 0) end }))
  end

  for name, read in pairs {
    directly = function(s) return s end,
    ["through buffer"] = function(s) return s:buffer(2) end,
    ["through merge"] = function(s) return s:merge(counter(2)) end,
  } do
    it("at its end is raised by the iteration, " .. name, in_task(function()
      assert.equal("problem", raised(function() for _ in read(from(2, "problem")):iterate() do end end))
    end))
  end

  it("does not keep a callback of the producer's token from being followed by its close", in_task(function()
    local closed
    local function producer(emit, token)
      token:register(function() error("callback", 0) end)
      local _ <close> = closing(function()
        flow.shield(flow.sleep, 1)
        closed = flow.loop.now()
      end)
      for i = 1, 100 do
        emit(i)
        flow.sleep(0.25)
      end
    end
    local err = raised(function() for _ in stream.new(producer):buffer(2):iterate() do break end end)
    is_error("Aggregate", err)
    assert.equal(closed, flow.loop.now())
  end))
end)
