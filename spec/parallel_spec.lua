-- flow.parallel: for_each and map.
-- SPDX-License-Identifier: MIT

local flow = require "coflow"
local testing = require "coflow.testing"
local helper = require "spec.helper"
local support = require "spec.support.flow_support"

local parallel, stream = flow.parallel, flow.stream
local in_task, in_order, recorder = helper.in_task, helper.in_order, helper.recorder
local closing, raised = helper.closing, helper.raised
local is_error, raises, collect, many = helper.is_error, helper.raises, helper.collect, helper.many
local Source, Token = flow.CancellationTokenSource, flow.CancellationToken

local function list(n)
  local values = {}
  for i = 1, n do values[i] = i end
  return values
end

-- A stream of 1 … n that notes what is asked of it.
local function noted(n, note, seconds)
  return stream.new(function(emit, token)
    local _ <close> = closing(function(err) note("closed", err and err.name, token.is_cancellation_requested) end)
    for i = 1, n do
      if seconds then flow.sleep(seconds) end
      note("take", i)
      emit(i)
    end
  end)
end

local function degree(n, more)
  more = more or {}
  more.max_degree_of_parallelism = n
  return more
end

-- The sources that an item may come from.
local kinds = {
  list = list,
  iterator = function(n)
    local i = 0
    return function()
      i = i + 1
      if i <= n then return i end
    end
  end,
  ["callable table"] = function(n)
    local i = 0
    return setmetatable({}, { __call = function()
      i = i + 1
      if i <= n then return i end
    end })
  end,
  ["iterator that waits"] = function(n)
    local i = 0
    return function()
      helper.slowly()
      i = i + 1
      if i <= n then return i end
    end
  end,
  stream = function(n) return stream.from(list(n)) end,
  ["stream that waits"] = function(n)
    return stream.new(function(emit)
      for i = 1, n do
        flow.sleep(0.1)
        emit(i)
      end
    end)
  end,
  ["iterator of a channel"] = function(n)
    local ch = flow.Channel.unbounded()
    for i = 1, n do ch:write(i) end
    ch:complete()
    return (ch:iterate())
  end,
  channel = function(n)
    local ch = flow.Channel.unbounded()
    flow.spawn(function()
      for i = 1, n do
        ch:write(i)
        flow.yield()
      end
      ch:complete()
    end)
    return ch
  end,
  ["buffered stream"] = function(n) return stream.from(list(n)):buffer(3) end,
  ["thing to iterate"] = function(n)
    return { iterate = function(_, token) return stream.from(list(n)):iterate(token) end }
  end,
}

for kind, make in pairs(kinds) do
  describe("parallel over a " .. kind, function()
    it("calls the function once for each item", in_task(function()
      for _, n in ipairs { 0, 1, 5, 40 } do
        local calls = {}
        parallel.for_each(make(n), degree(3), function(item)
          calls[item] = (calls[item] or 0) + 1
          for _ = 1, item % 3 do flow.yield() end
        end)
        assert.equal(n, #calls)
        for i = 1, n do assert.equal(1, calls[i]) end
      end
    end))

    it("has the results in input order", in_task(function()
      local squares = parallel.map(make(10), degree(4), function(item)
        flow.sleep((item * 7) % 5)
        return item * item, "dropped"
      end)
      assert.same({ 1, 4, 9, 16, 25, 36, 49, 64, 81, 100 }, squares)
      assert.same({}, parallel.map(make(0), error))
    end))

    it("takes an item only when there is room, and none after a failure", in_task(function()
      local running, most, started = 0, 0, 0
      local err = raised(parallel.for_each, make(30), degree(3), function(item)
        started = started + 1
        running = running + 1
        most = math.max(most, running)
        local _ <close> = closing(function() running = running - 1 end)
        flow.sleep(0.5)
        if item == 7 then error("seven", 0) end
      end)
      assert.equal("seven", err)
      assert.equal(3, most)
      assert.equal(0, running)
      assert.is_true(started <= 11, started) -- 7, 8 and 9 end at the same time
    end))

    it("does everything under any order", function()
      testing.explore(function()
        local sum = 0
        local results = parallel.map(make(12), degree(3), function(item)
          for _ = 1, item % 4 do flow.yield() end
          sum = sum + item
          return -item
        end)
        assert.equal(78, sum)
        for i = 1, 12 do assert.equal(-i, results[i]) end
      end, { runs = many(20, 2) })
    end)
  end)
end

describe("parallel.for_each", function()
  it("runs sixteen at a time unless told", in_task(function(clock)
    parallel.for_each(list(32), function() flow.sleep(1) end)
    assert.equal(2, clock:now())
    parallel.for_each(list(32), degree(-1), function() flow.sleep(1) end)
    assert.equal(4, clock:now())
    parallel.for_each(list(32), degree(math.huge), function() flow.sleep(1) end)
    assert.equal(5, clock:now())
    parallel.for_each(list(3), degree(1), function() flow.sleep(1) end)
    assert.equal(8, clock:now())
  end))

  it("never calls the function on the caller's stack, and one after the other starts", in_task(function()
    local me, tasks = flow.current_task(), {}
    parallel.for_each(list(3), function(item)
      assert.not_equal(me, flow.current_task())
      tasks[item] = flow.current_task()
    end)
    assert.not_equal(tasks[1], tasks[2])
  end))

  it("asks the source for one item at a time, and for the next one when a slot is free", in_order(function(clock)
    local log, note = recorder()
    local asked = false
    local i = 0
    parallel.for_each(function()
      assert.is_false(asked)
      asked = true
      flow.sleep(1)
      asked = false
      i = i + 1
      note("take", i, clock:now())
      if i <= 4 then return i end
    end, degree(2), function(item)
      flow.sleep(3)
      note("done", item, clock:now())
    end)
    assert.same({ "take 1 1.0", "take 2 2.0", "done 1 4.0", "done 2 5.0", "take 3 5.0", "take 4 6.0", "done 3 8.0",
      "done 4 9.0", "take 5 9.0" }, log)
  end))

  it("gives each item a context of its own, that of the call", in_task(function()
    local loc = flow.AsyncLocal()
    loc.value = "call"
    local seen = {}
    parallel.for_each(list(4), degree(2), function(item)
      seen[item] = loc.value
      loc.value = item
      flow.yield()
      assert.equal(item, loc.value)
    end)
    assert.same({ "call", "call", "call", "call" }, seen)
    assert.equal("call", loc.value)
    do
      local _ <close> = flow.ExecutionContext.suppress_flow()
      parallel.for_each({ 1 }, function() seen = loc.value end)
    end
    assert.is_nil(seen)
  end))

  it("gives one token to all, which is their ambient one and the source's", in_order(function()
    local tokens, told = {}, nil
    local err = raised(parallel.for_each, stream.new(function(emit, token)
      token:register(function() told = true end)
      for i = 1, 9 do emit(i) end
    end), degree(2), function(item, token)
      tokens[item] = token
      assert.is_true(token.can_be_canceled)
      if item == 3 then error("three", 0) end
      flow.yield()
      assert.is_true(item < 3 or token.is_cancellation_requested)
    end)
    assert.equal("three", err)
    assert.equal(tokens[1], tokens[3])
    assert.is_true(told)
    assert.is_true(tokens[1].is_cancellation_requested)
  end))

  it("cancels the others at the first failure, waits for them, and then raises it", in_task(function(clock)
    local log, note = recorder()
    local problem = {}
    local err = raised(parallel.for_each, list(9), degree(3), function(item)
      local _ <close> = closing(function(e)
        flow.shield(flow.sleep, item)
        note(item, e == problem and "problem" or e.name, clock:now())
      end)
      if item == 2 then flow.sleep(1) error(problem) end
      flow.sleep(100)
    end)
    assert.equal(problem, err)
    -- the second one has failed when it has been left
    assert.same({ "2 problem 3.0", "1 OperationCanceled 4.0", "3 OperationCanceled 6.0" }, log)
  end))

  it("raises several failures together, without the cancellations that it caused", in_task(function()
    local inner = helper.inner(raised(parallel.for_each, list(4), function(item, token)
      if item == 1 then flow.yield() error("one", 0) end
      local _ <close> = closing(function() if item == 3 then error("three", 0) end end)
      flow.sleep(1, token)
    end))
    table.sort(inner)
    assert.same({ "one", "three" }, inner)
  end))

  it("has not failed when a call ends canceled", in_task(function()
    local seen = {}
    parallel.for_each(list(5), degree(2), function(item)
      seen[#seen + 1] = item
      if item == 2 then flow.sleep(1, Token.canceled) end
    end)
    assert.equal(5, #seen)
    assert.same({ 1, nil, 3, n = 3 }, parallel.map(list(3), function(item)
      if item == 2 then flow.current_task():cancel() flow.yield() end
      return item
    end))
  end))

  it("raises what the source raises, and closes it before it ends", in_task(function(clock)
    local log, note = recorder()
    local function failing(emit)
      local _ <close> = closing(function() flow.shield(flow.sleep, 5) note("closed", clock:now()) end)
      emit(1)
      flow.sleep(1)
      error("source", 0)
    end
    local err = raised(parallel.for_each, stream.new(failing), function()
      local _ <close> = closing(function() note("child", clock:now()) end)
      flow.sleep(100)
    end)
    assert.equal("source", err)
    assert.same({ "closed 6.0", "child 6.0" }, log)
    assert.equal("iterate", raised(parallel.for_each, { iterate = function() error("iterate", 0) end }, print))
  end))

  it("raises what closing the source raises, beside the failure", in_task(function()
    local s = stream.new(function(emit)
      local _ <close> = closing(function() error("closing", 0) end)
      while true do emit(1) end
    end)
    local inner = helper.inner(raised(parallel.for_each, s, degree(1), function() error("item", 0) end))
    table.sort(inner)
    assert.same({ "closing", "item" }, inner)
  end))

  it("closes the source on every way out", in_task(function()
    local function closed(options, fn)
      local log, note = recorder()
      pcall(parallel.for_each, noted(4, note, 1), options, fn)
      return log[#log]
    end
    assert.equal("closed nil false", closed(nil, function() end))
    assert.equal("closed OperationCanceled true", closed(degree(2), function() error("x") end))
    assert.equal("closed OperationCanceled true", closed(degree(1), function() flow.sleep(0.5) error("x") end))
    assert.equal("closed OperationCanceled true", closed({ token = Source(2.5).token }, function() end))
    local log, note = recorder()
    raises("Timeout", flow.with_timeout, 2.5, parallel.for_each, noted(4, note, 1), function() end)
    assert.equal("closed OperationCanceled true", log[#log])
  end))

  it("closes an iteration that it was given", in_task(function()
    local log, note = recorder()
    local it = noted(4, note):iterate()
    assert.equal("x", raised(parallel.for_each, it, degree(1), function() error("x", 0) end))
    assert.equal("closed OperationCanceled true", log[2])
    assert.is_nil(it())
  end))

  it("does not touch the source when it is canceled before", in_task(function()
    local touched = false
    local thing = { iterate = function() touched = true end }
    local function iterator() touched = true end
    local source = Source()
    source:cancel()
    for _, items in ipairs { thing, iterator, stream.new(iterator) } do
      local err = raises("OperationCanceled", parallel.for_each, items, { token = source.token }, print)
      assert.equal(source.token, err.token)
      local task = flow.spawn(function() parallel.map(items, print) end)
      task:cancel()
      raises("OperationCanceled", flow.await, task)
    end
    assert.is_false(touched)
  end))

  it("is canceled from outside, with that token, whatever else failed", in_task(function()
    local source = Source(1)
    local function failing()
      local _ <close> = closing(function() error("failed", 0) end)
      flow.sleep(5)
    end
    local err = raises("OperationCanceled", parallel.for_each, list(3), { token = source.token }, failing)
    assert.equal(source.token, err.token)
    raises("Timeout", flow.with_timeout, 1, parallel.for_each, list(3), failing)
    source = Source(2) -- after the failure, while the others end
    err = raises("OperationCanceled", parallel.for_each, list(3), { token = source.token }, function(item)
      if item == 1 then error("first", 0) end
      flow.shield(flow.sleep, 5)
    end)
    assert.equal(source.token, err.token)
    local task = flow.spawn(parallel.for_each, list(3), failing)
    flow.sleep(1)
    task:cancel("stop")
    assert.equal("stop", raises("OperationCanceled", flow.await, task).reason)
  end))

  it("is out of reach with the token none", in_task(function(clock)
    local done = 0
    local task = flow.spawn(parallel.for_each, list(3), { token = Token.none }, function()
      flow.sleep(2)
      done = done + 1
    end)
    flow.sleep(1)
    task:cancel()
    task:await()
    assert.equal(3, done)
    assert.equal(2, clock:now())
  end))

  it("hands over what it has taken, also when it was canceled in that moment", in_task(function()
    local taken, seen, source = {}, {}, Source()
    local i = 0
    raises("OperationCanceled", parallel.for_each, function()
      i = i + 1
      taken[i] = i
      if i == 3 then source:cancel() end
      return i
    end, { token = source.token }, function(item) seen[item] = item end)
    assert.same({ 1, 2, 3 }, taken)
    assert.same(taken, seen)
  end))

  it("stops taking from a source that catches its cancellation", in_task(function()
    local seen = 0
    local s = stream.new(function(emit)
      while true do
        pcall(flow.sleep, 1)
        emit(1)
      end
    end)
    assert.equal("x", raised(parallel.for_each, s, function()
      seen = seen + 1
      if seen == 2 then error("x", 0) end
    end))
    assert.is_true(seen <= 3)
  end))

  it("tells its progress, in the caller's context", in_task(function()
    local log, note = recorder()
    local loc = flow.AsyncLocal()
    loc.value = "call"
    local function progress(done, total) note(done, total, loc.value) end
    parallel.for_each(list(3), { on_progress = progress }, function(item)
      loc.value = item
      flow.sleep(4 - item)
    end)
    parallel.map(stream.from(list(2)), { on_progress = progress }, function() end)
    assert.same({ "1 3 call", "2 3 call", "3 3 call", "1 nil call", "2 nil call" }, log)
    assert.equal("progress", raised(parallel.for_each, list(9), degree(2, {
      on_progress = function(done) if done == 3 then error("progress", 0) end end,
    }), flow.yield))
  end))

  it("counts n, and hands on what is nil, false or two values", in_task(function()
    local seen = {}
    parallel.for_each({ 1, nil, false, n = 4 }, degree(1), function(item) seen[#seen + 1] = tostring(item) end)
    assert.same({ "1", "nil", "false", "nil" }, seen)
    assert.same({ "1", nil, "false", n = 3 }, parallel.map({ 1, nil, false, n = 3 }, function(item)
      if item ~= nil then return tostring(item) end
    end))
    assert.same({ { "k", "v" } }, parallel.map(("k=v"):gmatch("(%w+)=(%w+)"), function(item) return item end))
    local items = list(3)
    parallel.for_each(items, function() items[#items + 1] = 0 end) -- the list as it was at the call
    assert.equal(6, #items)
  end))

  it("holds only its degree of items in memory", in_task(function()
    local weak = setmetatable({}, { __mode = "k" })
    local most, n = 0, many(100000, 60)
    local done = 0
    parallel.for_each(stream.new(function(emit)
      for _ = 1, n do
        local item = {}
        weak[item] = true
        emit(item)
      end
    end), degree(4), function()
      done = done + 1
      if done % (n // 5) == 0 then
        collectgarbage()
        local count = 0
        for _ in pairs(weak) do count = count + 1 end
        most = math.max(most, count)
      end
    end)
    assert.equal(n, done)
    assert.is_true(most <= 6, most)
  end))

  it("has twins that start at once and fail as tasks do", in_task(function()
    local task = parallel.map_async(list(3), function(item) flow.sleep(1) return item end)
    assert.is_false(task.is_completed)
    assert.same({ 1, 2, 3 }, (task:await()))
    parallel.for_each_async(list(3), function() end):await()
    task = parallel.for_each_async(list(3), error)
    assert.equal(3, #helper.inner(raised(flow.await, task)))
    task = parallel.for_each_async(list(3), function() flow.sleep(9) end)
    flow.yield()
    task:cancel()
    raises("OperationCanceled", flow.await, task)
    assert.is_true(task.is_canceled)
  end))

  it("is nested in itself", in_task(function()
    local sums = parallel.map(list(4), function(a)
      local products = parallel.map(list(4), degree(2), function(b) flow.yield() return a * b end)
      local sum = 0
      for _, v in ipairs(products) do sum = sum + v end
      return sum
    end)
    assert.same({ 10, 20, 30, 40 }, sums)
  end))

  it("takes a token last, behind the function", in_task(function()
    local source = Source()
    source:cancel()
    for _, call in ipairs {
      function() parallel.for_each({ 1 }, {}, error, source.token) end,
      function() parallel.for_each({ 1 }, error, source.token) end,
      function() parallel.map({ 1 }, nil, error, source.token) end,
      function() parallel.map_async({ 1 }, error, source.token):await() end,
    } do
      assert.equal(source.token, raises("OperationCanceled", call).token)
    end
    assert.same({ 1 }, parallel.map({ 1 }, { token = Token.none }, function(v) return v end, source.token))
  end))

  it("drives the loop outside every task", function()
    local sum = 0
    parallel.for_each(list(4), function(item) flow.sleep(0.001) sum = sum + item end)
    assert.equal(10, sum)
    assert.same({ 2 }, parallel.map({ 1 }, { token = Source().token }, function(v) return v + 1 end))
    is_error("OperationCanceled", raised(parallel.map, { 1 }, { token = Token.canceled }, print))
  end)

  it("is refused, and calls nothing, in a callback of the loop", in_task(function()
    local log, note = recorder()
    is_error("InvalidOperation", select(2, helper.in_callback(parallel.for_each, list(3), note)))
    flow.yield()
    assert.same({}, log)
  end))

  it("takes a list of a strict class", in_task(function()
    local strict = { __index = function(_, key)
      if type(key) == "string" then error("undeclared " .. key) end
    end }
    local doubled = parallel.map(setmetatable(list(3), strict), function(v) return v * 2 end)
    assert.same({ 2, 4, 6 }, doubled)
  end))

  it("refuses bad arguments", in_task(function()
    for _, name in ipairs { "for_each", "map" } do
      local f = parallel[name]
      local function bad(n, ...)
        local err = raised(load("local f = ... f(select(2, ...))"), f, ...)
        assert.equal("string", type(err))
        assert.truthy(err:find("bad argument #" .. n .. " to 'f'", 1, true), err)
        return err
      end
      bad(1, nil, print)
      bad(1, 5, print)
      bad(1, "text", print)
      bad(3, {})
      bad(3, {}, nil, 5)
      bad(3, {}, {})
      bad(2, {}, 5, print)
      assert.truthy(bad(2, {}, { degree = 1 }, print):find("degree", 1, true))
      assert.truthy(bad(2, {}, print, degree(1)):find("options come before the function", 1, true))
      bad(2, {}, degree(0), print)
      bad(2, {}, degree(-2), print)
      bad(2, {}, degree(1.5), print)
      bad(2, {}, degree("4"), print)
      bad(2, {}, { token = 1 }, print)
      bad(4, {}, {}, print, 1)
      bad(4, {}, print, nil, 1)
      bad(2, {}, { on_progress = 1 }, print)
    end
  end))

  it("reports nothing afterwards", in_task(function()
    local reports = {}
    flow.on_unobserved_exception(function(err) reports[#reports + 1] = err end)
    pcall(parallel.for_each, list(9), function(item) flow.yield() error(item, 0) end)
    pcall(parallel.for_each, list(9), { token = Source(1).token }, function()
      local _ <close> = closing(function() error("x", 0) end)
      flow.sleep(9)
    end)
    collect()
    flow.on_unobserved_exception(function(err) io.stderr:write("unobserved: ", tostring(err), "\n") end)
    assert.same({}, reports)
  end))
end)

describe("a parallel loop in a coroutine that dies of it", function()
  it("raises the cancellation that beats an error, as elsewhere", in_task(function()
    local source = flow.CancellationTokenSource()
    local co = flow.coroutine.create(function()
      parallel.for_each({ 1 }, { token = source.token }, function()
        source:cancel()
        error("failed", 0)
      end)
    end)
    local _, err = flow.coroutine.resume(co)
    assert.equal(source.token, helper.is_error("OperationCanceled", err).token)
  end))
end)

describe("parallel loops of any kind", function()
  it("call for each item once, in order, and leave nothing running", function()
    local outcomes = {}
    for seed = 1, helper.seeds(100, 6) do
      local random = support.random(seed)
      testing.run(function()
        local n, limit, way = random(20) - 1, random(5), random(4)
        local open, running, calls = 0, 0, {}
        local function wait()
          local kind = random(4)
          if kind == 1 then flow.yield() elseif kind == 2 then flow.sleep(random(3)) end
        end
        local items = stream.new(function(emit)
          open = open + 1
          local _ <close> = closing(function() flow.shield(wait) open = open - 1 end)
          for i = 1, n do
            wait()
            if way == 2 and random(20) == 1 then error("source", 0) end
            emit(i)
          end
        end)
        if random(3) == 1 then items = items:buffer(random(3)) end
        local source <close> = Source(way == 3 and random(10) or nil)
        local ok, result = pcall(flow.with_timeout, way == 4 and random(10) or nil, parallel.map, items,
          { max_degree_of_parallelism = limit, token = source.token }, function(item)
            running = running + 1
            local _ <close> = closing(function() running = running - 1 end)
            assert.is_nil(calls[item])
            calls[item] = true
            assert.is_true(running <= limit)
            wait()
            if way == 2 and random(10) == 1 then error("item", 0) end
            return -item
          end)
        assert.equal(0, running)
        assert.equal(0, open)
        local called = 0
        for _ in pairs(calls) do called = called + 1 end
        for i = 1, called do assert.is_true(calls[i]) end
        if ok then
          assert.equal(n, called)
          assert.equal(n, #result)
          for i = 1, n do assert.equal(-i, result[i]) end
        elseif way == 2 then
          assert.is_true(result == "source" or result == "item" or #helper.inner(result) > 1)
        else
          is_error(way == 3 and "OperationCanceled" or "Timeout", result)
        end
        outcomes[way .. tostring(ok)] = true
      end, { seed = seed })
    end
    for _, outcome in ipairs { "1true", "2false", "3false", "4false" } do
      assert.is_true(outcomes[outcome] or many(2, 1) == 1, outcome)
    end
  end)
end)
