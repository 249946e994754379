-- Channels: claims CH-1 to CH-43 of .NET's, and what is ours: prioritized order, batches, select, misuse, holding.

local flow = require "coflow"
local helper = require "spec.helper"
local support = require "spec.support.flow_support"

local Channel, select = flow.Channel, flow.channel.select
local in_task, recorder, raises, raised = support.in_task, helper.recorder, support.raises, helper.raised
local in_order = helper.in_order
local bad_argument, collect, settle = support.bad_argument, helper.collect, helper.settle

-- Starts fn at once; what it returns or raises is noted under that name.
local function start(note, name, fn)
  return flow.async(function()
    local ok, value, more = pcall(fn)
    if not ok then
      note(name, "raised", type(value) == "table" and value.name or value)
    elseif more ~= nil then
      note(name, value, more)
    else
      note(name, value)
    end
  end)()
end

local function drain(ch)
  local list = {}
  for item in ch.try_read, ch do list[#list + 1] = item end
  return list
end

describe("making a channel", function()
  it("refuses bad capacities and unknown options, by name", function()
    bad_argument(1, "bounded", function() local _ = Channel.bounded(-1) end, "capacity")
    bad_argument(1, "bounded", function() local _ = Channel.bounded(1.5) end, "capacity")
    bad_argument(1, "bounded", function() local _ = Channel.bounded(0 / 0) end, "capacity")
    bad_argument(1, "bounded", function() local _ = Channel.bounded() end, "number expected")
    bad_argument(1, "bounded", function() local _ = Channel.bounded("x") end, "number expected, got string")
    bad_argument(2, "bounded", function() local _ = Channel.bounded(1, { mode = "wait" }) end, "'mode'")
    bad_argument(2, "bounded", function() local _ = Channel.bounded(1, { full_mode = "drop" }) end, "full_mode")
    bad_argument(2, "bounded", function() local _ = Channel.bounded(1, { item_dropped = 1 }) end, "item_dropped")
    bad_argument(1, "unbounded", function() local _ = Channel.unbounded { capacity = 1 } end, "'capacity'")
    bad_argument(1, "prioritized", function() local _ = Channel.prioritized { comparer = 1 } end, "comparer")
  end)

  it("is the same module however it is reached", function()
    assert.equal(flow.channel, require "coflow.channel")
    assert.equal(flow.channel.Channel, Channel)
    assert.equal(3, flow.Channel.bounded(3.0):try_write(1) and 3)
  end)

  it("gives values that tell what they are, and have no fields but their own", function()
    local ch = Channel.bounded(3)
    ch:try_write(1)
    assert.equal("coflow.Channel (1 of 3 items)", tostring(ch))
    ch:complete()
    assert.equal("coflow.Channel (1 of 3 items, completed)", tostring(ch))
    assert.equal("coflow.Channel (0 items)", tostring(Channel.unbounded()))
    assert.is_nil(ch.nothing)
    assert.is_false(pcall(function() ch.count = 2 end))
  end)
end)

describe("an unbounded channel", function()
  it("gives items in the order in which they were written, false included", in_task(function()
    local ch = Channel.unbounded()
    local items = { 1, "two", false, 4.5, ch }
    for _, item in ipairs(items) do assert.is_true(ch:write(item)) end
    assert.equal(5, ch.count)
    assert.equal(1, ch:peek())
    for _, item in ipairs(items) do assert.equal(item, ch:read()) end
    assert.is_nil(ch:try_read())
    assert.is_nil(ch:peek())
  end))

  it("refuses nil", in_task(function()
    local ch = Channel.unbounded()
    bad_argument(1, "write", function() ch:write(nil) end, "nil is not an item")
    bad_argument(1, "write", function() ch:write() end, "nil is not an item")
    bad_argument(1, "try_write", function() ch:try_write(nil) end, "nil is not an item")
    bad_argument(1, "write_async", function() ch:write_async(nil) end, "nil is not an item")
    assert.equal(0, ch.count)
  end))

  it("keeps the order while its ring grows, wraps and is given up", in_task(function()
    local ch, random = Channel.unbounded(), support.random(7)
    local wrote, read = 0, 0
    for _, size in ipairs { 3, 900, 40, 3000, 0, 1, 0, 1, 0, 5000, 0, 2, 0, 2, 70, 0 } do
      local target = support.many(size, 100)
      while ch.count ~= target do
        local go_up = ch.count < target
        if random(4) == 1 then go_up = not go_up end
        if go_up then
          wrote = wrote + 1
          ch:write(wrote)
        elseif ch.count > 0 then
          read = read + 1
          assert.equal(read, ch:read())
        end
      end
    end
    assert.equal(wrote, read)
  end))

  it("does not stay large after a burst", in_task(function()
    local ch = Channel.unbounded()
    local function memory()
      support.collect()
      return collectgarbage("count")
    end
    local n, before = support.many(50000, 5000), memory()
    for i = 1, n do ch:write(i) end
    for i = 1, n do assert(ch:read() == i) end
    for i = 1, 3 do
      ch:write(i)
      ch:read()
    end
    assert.is_true(memory() - before < 20)
    for i = 1, n do ch:write(i) end
    ch:complete()
    assert.equal(n, #drain(ch))
    assert.is_true(memory() - before < 20)
  end))

  it("hands an item to the reader that waits longest, on a later turn", in_order(function() -- CH-6, CH-24, CH-30
    local log, note = recorder()
    local ch = Channel.unbounded()
    for i = 1, 3 do start(note, "reader " .. i, function() return ch:read() end) end
    for i = 1, 2 do
      ch:write("item " .. i)
      note("wrote", i)
    end
    assert.equal(0, ch.count)
    assert.is_nil(ch:try_read()) -- it was handed over: nobody can take it now
    settle()
    assert.same({ "wrote 1", "wrote 2", "reader 1 item 1", "reader 2 item 2" }, log)
    ch:complete()
    settle()
    assert.equal("reader 3 nil", log[5])
  end))

  it("works outside every task", function()
    local ch = Channel.unbounded()
    ch:write(1)
    assert.equal(1, ch:read())
    flow.spawn(function() ch:write("late") end)
    assert.equal("late", ch:read())
    flow.spawn(function() ch:write("late") end)
    assert.is_true(ch:wait_to_read())
    assert.same({ "late" }, ch:read_batch(5))
    flow.spawn(function() ch:complete() end)
    assert.is_nil(ch:read())
    helper.is_error("InvalidOperation", raised(ch.read, Channel.bounded(0)), "deadlock")
    collect() -- what waited there is closed
  end)
end)

describe("a bounded channel", function()
  it("lets a writer wait for room, and moves the oldest one in", in_order(function() -- CH-2, CH-23
    local log, note = recorder()
    local ch = Channel.bounded(2)
    assert.is_true(ch:try_write(1))
    assert.is_true(ch:try_write(2))
    assert.is_false(ch:try_write(3))
    for i = 4, 5 do start(note, "writer " .. i, function() return ch:write(i) end) end
    start(note, "hint", function() return ch:wait_to_write() end)
    assert.equal(2, ch.count)
    assert.equal(1, ch:read())
    settle()
    assert.same({ "writer 4 true" }, log)
    assert.same({ 2, 4, 5 }, { ch:read(), ch:read(), ch:read() })
    settle()
    assert.same({ "writer 4 true", "writer 5 true", "hint true" }, log)
    assert.equal(0, ch.count)
  end))

  local function fill(mode)
    local ch, dropped = nil, {}
    ch = Channel.bounded(2, { full_mode = mode, item_dropped = function(item)
      dropped[#dropped + 1] = item
      dropped.count = ch.count
    end })
    for i = 1, 4 do assert.is_true(i % 2 == 1 and ch:try_write(i) or ch:write(i)) end
    assert.is_true(ch:wait_to_write()) -- CH-4
    assert.equal(2, dropped.count)
    dropped.count = nil
    return dropped, drain(ch)
  end

  it("drops as its mode says, and tells of each item once", in_task(function() -- CH-3, CH-4, CH-5
    assert.same({ { 1, 2 }, { 3, 4 } }, { fill("drop_oldest") })
    assert.same({ { 2, 3 }, { 1, 4 } }, { fill("drop_newest") })
    assert.same({ { 3, 4 }, { 1, 2 } }, { fill("drop_write") })
  end))

  it("lets item_dropped use the channel, wait, and raise", in_task(function()
    local ch
    local log, note = recorder()
    ch = Channel.bounded(1, { full_mode = "drop_oldest", item_dropped = function(item)
      note("dropped", item)
      if item == "a" then
        assert.equal("b", ch:read()) -- re-entrant: what was written just now
        ch:write("again")
        flow.sleep(1)
      elseif item == "c" then
        error("no c", 0)
      end
    end })
    ch:write("a")
    assert.is_true(ch:write("b"))
    assert.equal("again", ch:read())
    ch:write("c")
    assert.equal("no c", raised(ch.write, ch, "d"))
    assert.equal("d", ch:read())
    ch:write("c")
    local task = ch:write_async("e")
    assert.equal("no c", task.exception)
    assert.equal("e", ch:read())
    ch:write("c")
    assert.equal("no c", raised(select, { { ch, "write", "f" } }))
    assert.same({ "f" }, drain(ch))
    assert.same({ "dropped a", "dropped c", "dropped c", "dropped c" }, log)
  end))

  it("never tells of a drop when it waits", in_task(function() -- CH-5
    local ch = Channel.bounded(1, { item_dropped = function() error("dropped") end })
    ch:write(1)
    local task = ch:write_async(2)
    ch:complete()
    raises("ChannelClosed", flow.await, task)
    assert.same({ 1 }, drain(ch))
  end))
end)

describe("a rendezvous", function()
  it("takes an item only from hand to hand", in_order(function() -- CH-1, CH-40, CH-41
    local log, note = recorder()
    local ch = Channel.bounded(0)
    assert.is_false(ch:try_write(1))
    assert.is_nil(ch:try_read())
    for i = 1, 2 do start(note, "writer " .. i, function() return ch:write(i) end) end
    settle()
    assert.same({}, log)
    assert.equal(0, ch.count)
    assert.is_nil(ch:peek())
    assert.equal(1, ch:try_read())
    assert.equal(2, ch:read())
    settle()
    assert.same({ "writer 1 true", "writer 2 true" }, log)
    start(note, "reader", function() return ch:read() end)
    assert.is_true(ch:try_write("x"))
    assert.is_false(ch:try_write("y"))
    settle()
    assert.equal("reader x", log[3])
  end))

  it("tells those who asked when somebody waits on the other side", in_order(function() -- CH-42
    local log, note = recorder()
    local ch = Channel.bounded(0)
    for i = 1, 2 do start(note, "writable " .. i, function() return ch:wait_to_write() end) end
    start(note, "reader", function() return ch:read() end)
    settle()
    assert.same({ "writable 1 true", "writable 2 true" }, log)
    assert.is_true(ch:wait_to_write())
    ch:write(1)
    start(note, "readable", function() return ch:wait_to_read() end)
    start(note, "writer", function() return ch:write(2) end)
    settle()
    assert.same({ "reader 1", "readable true" }, { log[3], log[4] })
    assert.is_true(ch:wait_to_read())
    assert.equal(2, ch:read())
    settle()
  end))

  it("drops, in the drop modes, unless a reader waits", in_task(function() -- CH-43
    for _, mode in ipairs { "drop_newest", "drop_oldest", "drop_write" } do
      local dropped = {}
      local ch = Channel.bounded(0, { full_mode = mode, item_dropped = function(item)
        dropped[#dropped + 1] = item
      end })
      assert.is_true(ch:write(1))
      local task = ch:read_async()
      assert.is_true(ch:write(2))
      assert.equal(2, flow.await(task))
      assert.same({ 1 }, dropped)
    end
  end))
end)

describe("a prioritized channel", function()
  it("raises what `<` says of items that it cannot compare, with no place of the library", in_task(function()
    local ch = Channel.prioritized()
    ch:write("x")
    assert.equal("attempt to compare number with string", raised(ch.write, ch, 1))
    assert.equal("attempt to compare number with string", raised(ch.try_write, ch, 1))
    assert.equal("x", ch:read())
  end))

  it("gives the first by its comparer, equal ones as they came", in_task(function() -- CH-31
    local ch = Channel.prioritized { comparer = function(a, b) return a.rank > b.rank end }
    local random, expected = support.random(3), {}
    for i = 1, support.many(2000, 300) do
      local item = { rank = random(20), i = i }
      expected[i] = item
      ch:write(item)
    end
    table.sort(expected, function(a, b)
      if a.rank ~= b.rank then return a.rank > b.rank end
      return a.i < b.i
    end)
    assert.equal(#expected, ch.count)
    for _, item in ipairs(expected) do
      assert.equal(item, ch:peek())
      assert.equal(item, ch:read())
    end
    assert.equal(0, ch.count)
  end))

  it("is sorted while it is read and written in turn", in_task(function()
    local ch, random, model = Channel.prioritized(), support.random(5), {}
    for _ = 1, support.many(4000, 300) do
      if random(5) > 2 then
        local item = random(1000)
        ch:write(item)
        local at = 1
        while model[at] and model[at] <= item do at = at + 1 end
        table.insert(model, at, item)
      else
        assert.equal(table.remove(model, 1), ch:try_read())
      end
    end
    assert.same(model, drain(ch))
  end))

  it("hands items to waiting readers without asking", in_task(function()
    local ch = Channel.prioritized { comparer = function() error("not needed") end }
    local task = ch:read_async()
    ch:write(5)
    assert.equal(5, flow.await(task))
  end))

  it("lets the comparer fail: nothing was written, nothing is lost", in_task(function()
    local fail
    local ch = Channel.prioritized { comparer = function(a, b)
      if fail then error(fail, 0) end
      return a < b
    end }
    for _, item in ipairs { 3, 1, 2 } do ch:write(item) end
    fail = {}
    assert.equal(fail, raised(ch.write, ch, 0))
    assert.equal(fail, raised(ch.try_write, ch, 0))
    assert.equal(fail, raised(select, { { ch, "write", 0 } }))
    local ok, err = pcall(ch.write_async, ch, 0)
    assert.is_false(ok)
    assert.equal(fail, err)
    assert.same({ 1, 2, 3 }, drain(ch)) -- reading compares nothing
    helper.is_error("InvalidOperation", raised(function()
      local slow = Channel.prioritized { comparer = function() flow.yield() end }
      slow:write(1)
      slow:write(2)
    end), "'write'")
  end))

  it("refuses an item whose comparer changes the channel each time it is asked", in_task(function()
    local ch, busy
    ch = Channel.prioritized { comparer = function(a, b)
      if not busy then
        busy = true
        ch:try_write(99)
        ch:try_read()
        busy = false
      end
      return a < b
    end }
    ch:write(5)
    raises("InvalidOperation", ch.write, ch, 1)
    assert.equal(1, ch.count)
  end))

  it("lets the comparer use the channel", in_task(function()
    local ch, act
    ch = Channel.prioritized { comparer = function(a, b)
      if act then act() end
      return a < b
    end }
    for _, item in ipairs { 5, 1, 9 } do ch:write(item) end
    act = function()
      act = nil
      assert.equal(1, ch:read())
      ch:write(7)
      ch:write(2)
    end
    ch:write(4)
    assert.same({ 2, 4, 5, 7, 9 }, drain(ch))
    ch:write(3)
    local reader
    act = function() -- takes the item there is, and waits for the one that is being written
      act = nil
      assert.equal(3, ch:read())
      reader = ch:read_async()
    end
    ch:write(8)
    assert.equal(8, flow.await(reader))
    ch:write(1)
    act = function()
      act = nil
      ch:complete()
    end
    raises("ChannelClosed", ch.write, ch, 6)
    assert.same({ 1 }, drain(ch))
  end))
end)

describe("completion", function()
  it("can be done once; try_complete tells", in_task(function() -- CH-10
    local ch = Channel.unbounded()
    ch:complete()
    raises("ChannelClosed", ch.complete, ch)
    assert.is_false(ch:try_complete())
    assert.is_true(Channel.unbounded():try_complete("x"))
  end))

  it("has one task, complete when the channel is, and drained", in_task(function() -- CH-11, CH-16, CH-27
    local ch = Channel.bounded(3)
    local task = ch.completion
    ch:write(1)
    ch:write(2)
    ch:complete()
    assert.equal(task, ch.completion)
    assert.is_false(ch:try_write(3))
    assert.equal(2, ch.count)
    assert.equal(1, ch:read())
    assert.equal(1, ch.count)
    assert.is_false(task.is_completed)
    assert.is_true(ch:wait_to_read())
    assert.equal(2, ch:read())
    assert.is_true(task.is_completed_successfully)
    assert.equal(0, ch.count)
    assert.is_nil(ch:read())
    assert.is_nil(ch:read_batch())
    assert.is_false(ch:wait_to_read())
    assert.is_false(ch:wait_to_write())
    raises("ChannelClosed", ch.write, ch, 3)
    assert.is_nil(raised(ch.write, ch, 3).inner)
    local other = Channel.unbounded()
    other:complete()
    assert.is_true(other.completion.is_completed_successfully)
  end))

  it("with an error is not told as unobserved, for those who read get it", in_task(function()
    support.with_reports(function(reports)
      local ch = Channel.unbounded()
      assert.is_false(ch.completion.is_completed)
      ch:complete("E")
      assert.is_true(ch.completion.is_faulted)
      ch = nil -- luacheck: ignore
      collect()
      assert.same({}, reports)
    end)
  end))

  it("with an error faults its task with that very object, and reads with ChannelClosed", in_task(function()
    local ch, err = Channel.unbounded(), {}
    ch:write(1) -- CH-12, CH-13
    ch:complete(err)
    assert.is_false(ch.completion.is_completed)
    assert.equal(1, ch:read())
    assert.equal(err, ch.completion.exception)
    assert.equal(err, raised(ch.wait_to_read, ch))
    assert.equal(err, raised(ch.wait_to_write, ch))
    for _, fn in ipairs { ch.read, ch.read_batch } do
      assert.equal(err, raises("ChannelClosed", fn, ch).inner)
    end
    assert.equal(err, raises("ChannelClosed", ch.write, ch, 1).inner)
    assert.equal(err, raised(function() for _ in ch:iterate() do error("no item") end end)) -- CH-33
    local text = tostring(raised(ch.read, ch))
    assert.equal("ChannelClosed: the channel has been completed with an error: " .. tostring(err), text)
    assert.is_nil(ch:try_read())
    assert.is_false(ch:try_write(1))
    for _, task in ipairs { ch:read_async(), ch:read_batch_async(1), ch:write_async(1) } do
      assert.equal(err, raises("ChannelClosed", flow.await, task).inner)
    end
    for _, task in ipairs { ch:wait_to_read_async(), ch:wait_to_write_async() } do
      assert.equal(err, task.exception)
    end
  end))

  it("with a cancellation cancels", in_task(function() -- CH-12, CH-15
    local ch = Channel.unbounded()
    local source = flow.CancellationTokenSource()
    source:cancel("enough")
    local err = raised(function() source.token:throw_if_cancellation_requested() end)
    ch:complete(err)
    assert.is_true(ch.completion.is_canceled)
    assert.equal(err, raised(flow.await, ch.completion))
    assert.equal(err, raised(ch.read, ch))
    assert.equal(err, raised(ch.write, ch, 1))
    local task = ch:read_async()
    assert.is_true(task.is_canceled)
  end))

  it("ends all waits, and delivers no blocked item", in_order(function() -- CH-14, CH-17
    local err = "broken"
    for _, with in ipairs { false, err } do
      local log, note = recorder()
      local full, empty = Channel.bounded(1), Channel.bounded(1)
      full:write(0)
      start(note, "write", function() return full:write(1) end)
      start(note, "write_async", function() return flow.await(full:write_async(2)) end)
      start(note, "wait_to_write", function() return full:wait_to_write() end)
      for _, name in ipairs { "read", "read_batch", "wait_to_read" } do
        start(note, name, function() return empty[name](empty) end)
        start(note, name .. "_async", function() return flow.await(empty[name .. "_async"](empty)) end)
      end
      start(note, "iterate", function() for _ in empty:iterate() do note("an item") end end)
      full:complete(with or nil)
      empty:complete(with or nil)
      settle()
      table.sort(log)
      assert.same(with and {
        "iterate raised broken", "read raised ChannelClosed", "read_async raised ChannelClosed",
        "read_batch raised ChannelClosed", "read_batch_async raised ChannelClosed",
        "wait_to_read raised broken", "wait_to_read_async raised broken", "wait_to_write raised broken",
        "write raised ChannelClosed", "write_async raised ChannelClosed",
      } or {
        "iterate nil", "read nil", "read_async nil", "read_batch nil", "read_batch_async nil",
        "wait_to_read false", "wait_to_read_async false", "wait_to_write false",
        "write raised ChannelClosed", "write_async raised ChannelClosed",
      }, log)
      assert.same({ 0 }, drain(full))
    end
  end))

  it("is not reported when nobody asked for its task", in_task(function()
    support.with_reports(function(reports)
      for _ = 1, 2 do
        local ch = Channel.unbounded()
        ch:write_async(1)
        ch:complete("unseen")
      end
      collect()
      assert.same({}, reports)
    end)
  end))
end)

describe("item_dropped", function()
  it("sees the writer's async locals, and changes none of them", in_task(function()
    local loc, seen = flow.AsyncLocal(), {}
    local ch = Channel.bounded(1, { full_mode = "drop_write", item_dropped = function(item)
      seen[item] = loc.value
      loc.value = "dropper's"
    end })
    loc.value = "writer's"
    ch:write(1)
    for item, write in ipairs { ch.write, ch.try_write, function(...) return flow.await(ch.write_async(...)) end } do
      assert.is_true(write(ch, item))
      assert.equal("writer's", loc.value)
    end
    assert.same({ "writer's", "writer's", "writer's" }, seen)
  end))
end)

describe("iterate", function()
  it("goes on to the end, from wherever the channel is", in_task(function() -- CH-32
    local ch, list = Channel.bounded(1), {}
    local writer = flow.spawn(function()
      for i = 1, 6 do ch:write(i) end
      ch:complete()
    end)
    for item in ch:iterate() do
      list[#list + 1] = item
      if item == 3 then break end
    end
    for item in ch:iterate() do list[#list + 1] = item end
    for _ in ch:iterate() do error("no more") end
    assert.same({ 1, 2, 3, 4, 5, 6 }, list)
    flow.await(writer)
  end))

  it("gives each item to one of several consumers, false included", in_task(function()
    local ch, seen = Channel.bounded(2), {}
    local consumers = {}
    for i = 1, 3 do
      consumers[i] = flow.spawn(function()
        for item in ch:iterate() do
          seen[#seen + 1] = tostring(item)
          flow.yield()
        end
      end)
    end
    for i = 1, 20 do ch:write(i % 5 ~= 0 and i) end
    ch:complete()
    flow.await_all(consumers)
    assert.equal(20, #seen)
  end))

  it("can be called by hand, and shared", in_task(function()
    local ch = Channel.unbounded()
    for i = 1, 4 do ch:write(i) end
    ch:complete()
    local it = ch:iterate()
    assert.equal(1, it())
    assert.equal(2, flow.spawn(it):await())
    local list = {}
    for item in it do list[#list + 1] = item end
    assert.same({ 3, 4 }, list)
    assert.is_nil(it())
  end))

  it("takes a token, which beats the items", in_task(function()
    local ch, source = Channel.unbounded(), flow.CancellationTokenSource()
    ch:write(1)
    ch:write(2)
    local list = {}
    local err = raised(function()
      for item in ch:iterate(source.token) do
        list[#list + 1] = item
        source:cancel()
      end
    end)
    helper.is_error("OperationCanceled", err)
    assert.equal(source.token, err.token)
    assert.same({ 1 }, list)
    assert.equal(1, ch.count)
  end))
end)

describe("read_batch", function()
  it("waits for the first item and takes what there is then", in_task(function()
    local ch = Channel.unbounded()
    for i = 1, 5 do ch:write(i) end
    assert.same({ 1, 2 }, ch:read_batch(2))
    assert.same({ 3, 4, 5 }, ch:read_batch())
    local task = flow.spawn(function() return ch:read_batch(3) end)
    flow.yield()
    for i = 6, 9 do ch:write(i) end
    assert.same({ 6, 7, 8 }, flow.await(task))
    assert.same({ 9 }, flow.await(ch:read_batch_async(math.huge)))
    task = ch:read_batch_async(5)
    ch:write("a")
    ch:write("b")
    assert.same({ "a" }, flow.await(task))
    assert.same({ "b" }, ch:read_batch(1))
  end))

  it("lets blocked writers in as it takes", in_task(function()
    local ch = Channel.bounded(1)
    for i = 1, 4 do ch:write_async(i) end
    assert.same({ 1, 2, 3 }, ch:read_batch(3))
    assert.same({ 4 }, ch:read_batch())
    local rendezvous = Channel.bounded(0)
    for i = 1, 3 do rendezvous:write_async(i) end
    assert.same({ 1, 2 }, rendezvous:read_batch(2))
    assert.equal(3, rendezvous:read())
  end))

  it("refuses what is no number of items", in_task(function()
    local ch = Channel.unbounded()
    for _, max in ipairs { 0, -1, 1.5 } do
      bad_argument(1, "read_batch", function() local _ = ch:read_batch(max) end)
      bad_argument(1, "read_batch_async", function() local _ = ch:read_batch_async(max) end)
    end
    bad_argument(1, "read_batch", function() local _ = ch:read_batch("x") end, "number")
    bad_argument(2, "read_batch", function() local _ = ch:read_batch(1, "x") end, "CancellationToken")
    assert.is_false(pcall(ch.read_batch, "x"))
    assert.is_false(pcall(ch.read_batch, ch.writer))
  end))
end)

describe("waiting to read or write", function()
  it("is a hint: all who ask are told, and one gets the item", in_order(function() -- CH-24, CH-25
    local log, note = recorder()
    local ch = Channel.unbounded()
    for i = 1, 2 do
      start(note, "reader " .. i, function()
        assert.is_true(ch:wait_to_read())
        return ch:try_read()
      end)
    end
    ch:write("x")
    settle()
    assert.same({ "reader 1 x", "reader 2 nil" }, log)
  end))

  it("is not told while a reader waits for the item itself", in_order(function()
    local log, note = recorder()
    local ch = Channel.unbounded()
    start(note, "hint", function() return ch:wait_to_read() end)
    start(note, "reader", function() return ch:read() end)
    ch:write(1)
    settle()
    assert.same({ "reader 1" }, log)
    ch:write(2)
    settle()
    assert.same({ "reader 1", "hint true" }, log)
  end))
end)

describe("the halves of a channel", function()
  it("are the same objects always, and can do their half", in_task(function()
    local ch = Channel.bounded(1)
    local reader, writer = ch.reader, ch.writer
    assert.equal(reader, ch.reader)
    assert.equal(writer, ch.writer)
    assert.is_true(writer:write(1))
    assert.is_false(writer:try_write(2))
    assert.equal(1, reader.count)
    assert.equal(1, reader:peek())
    assert.is_true(reader:wait_to_read())
    assert.equal(1, reader:read())
    assert.is_true(writer:wait_to_write())
    assert.is_true(flow.await(writer:write_async(3)))
    assert.same({ 3 }, reader:read_batch(4))
    writer:complete()
    assert.is_false(writer:try_complete())
    assert.is_nil(reader:read())
    assert.equal(ch.completion, reader.completion)
    assert.is_nil(reader.write)
    assert.is_nil(writer.read)
    assert.is_nil(writer.completion)
    assert.is_false(pcall(ch.read, writer))
    assert.is_false(pcall(ch.write, reader, 1))
    assert.is_false(pcall(ch.complete, reader))
    assert.is_false(pcall(ch.read, flow.completed_task))
    local list = {}
    local other = Channel.unbounded()
    for i = 1, 3 do other.writer:write(i) end
    other.writer:complete()
    for item in other.reader:iterate() do list[#list + 1] = item end
    assert.same({ 1, 2, 3 }, list)
  end))

  it("keep the channel alive", in_task(function()
    local reader, writer
    do
      local ch = Channel.unbounded()
      ch:write("kept")
      reader, writer = ch.reader, ch.writer
    end
    collect()
    writer:write("too")
    assert.same({ "kept", "too" }, reader:read_batch())
  end))
end)

describe("cancellation", function()
  it("before the call beats items and room", in_task(function() -- CH-20
    local ch = Channel.bounded(5)
    ch:write(1)
    local token = flow.CancellationToken.canceled
    for _, suffix in ipairs { "", "_async" } do
      local function try(name, ...)
        local fn = ch[name .. suffix]
        local err = suffix == "" and raised(fn, ch, ...) or raised(flow.await, fn(ch, ...))
        helper.is_error("OperationCanceled", err)
        assert.equal(token, err.token)
      end
      try("read", token)
      try("read_batch", 1, token)
      try("write", 2, token)
      try("wait_to_read", token)
      try("wait_to_write", token)
    end
    raises("OperationCanceled", select, { { ch, "read" }, token = token })
    assert.same({ 1 }, drain(ch))
  end))

  it("of a blocked writer takes its item back", in_task(function() -- CH-21
    local ch = Channel.bounded(1)
    ch:write(42)
    local source = flow.CancellationTokenSource()
    local first = flow.spawn(function() ch:write(43, source.token) end)
    local second = ch:write_async(44)
    local third = flow.spawn(function() ch:write(45) end)
    flow.sleep(1)
    source:cancel("never mind")
    third:cancel()
    flow.sleep(1)
    local err = raised(flow.await, first)
    assert.equal(source.token, err.token)
    assert.equal(42, ch:read())
    assert.equal(44, ch:read())
    assert.is_true(first.is_canceled and third.is_canceled and second.is_completed_successfully)
    assert.is_nil(ch:try_read())
  end))

  it("of a waiting reader consumes nothing, and the next one gets the item", in_order(function() -- CH-22
    local log, note = recorder()
    local ch, source = Channel.unbounded(), flow.CancellationTokenSource()
    start(note, "token", function() return ch:read(source.token) end)
    local task = start(note, "task", function() return ch:read() end)
    start(note, "timeout", function() return flow.with_timeout(1, ch.read, ch) end)
    local operation = ch:read_async()
    start(note, "last", function() return ch:read() end)
    source:cancel()
    task:cancel()
    assert.is_true(operation:cancel("no"))
    assert.is_false(operation:cancel())
    flow.sleep(1)
    ch:write("x")
    settle()
    assert.same({ "token raised OperationCanceled", "task raised OperationCanceled", "timeout raised Timeout",
      "last x" }, log)
    assert.is_true(operation.is_canceled)
    ch:write("y")
    assert.equal("y", ch:try_read())
  end))

  it("does not reach a reader that was handed its item", in_order(function()
    local log, note = recorder()
    local ch, source = Channel.unbounded(), flow.CancellationTokenSource()
    local task = start(note, "direct", function()
      local item = ch:read()
      return item, raised(flow.yield).name
    end)
    start(note, "token", function() return ch:read(source.token) end)
    ch:write(1)
    ch:write(2)
    task:cancel()
    source:cancel()
    settle()
    assert.same({ "direct 1 OperationCanceled", "token 2" }, log)
  end))

  it("is opted out of with none", in_task(function()
    local log, note = recorder()
    local ch, none = Channel.unbounded(), flow.CancellationToken.none
    local full = Channel.bounded(0)
    start(note, "in vain", function()
      flow.with_timeout(1, function()
        note("read", ch:read(none))
        note("write", full:write("item", none))
        note("select", select { { ch, "read" }, token = none })
        ch:read()
      end)
    end)
    local task = flow.async(function() return ch:read_async(none) end)()
    flow.sleep(2)
    assert.same({}, log)
    ch:write("a")
    settle()
    assert.equal("item", full:read())
    ch:write("for the operation")
    assert.equal("for the operation", flow.await(flow.await(task)))
    settle()
    ch:write("b")
    settle()
    assert.same({ "read a", "write true", "select 1 b", "in vain raised Timeout" }, log)
  end))

  it("reaches the operation that a token was given to, while the flow is suppressed", in_task(function()
    local ch, source = Channel.unbounded(), flow.CancellationTokenSource()
    local task = flow.spawn(function()
      local _ <close> = flow.ExecutionContext.suppress_flow()
      return ch:read(source.token)
    end)
    flow.yield()
    task:cancel()
    raises("OperationCanceled", flow.await, task)
    ch:write(1)
    assert.equal(1, ch:try_read())
  end))

  it("of a task ends the operations that it has started", in_task(function()
    local ch, operations = Channel.unbounded(), {}
    local task = flow.spawn(function()
      operations[1] = ch:read_async()
      operations[2] = flow.channel.select_async { { ch, "read" } }
      flow.sleep(math.huge)
    end)
    flow.yield()
    task:cancel()
    raises("OperationCanceled", flow.await, task)
    assert.is_true(operations[1].is_canceled and operations[2].is_canceled)
    ch:write(1)
    assert.equal(1, ch.count)
  end))
end)

describe("select", function()
  it("takes the first clause of the list that is there, and only that", in_task(function()
    local a, b = Channel.unbounded(), Channel.bounded(1)
    a:write("a")
    b:write("b")
    assert.same({ 2, "b" }, { select { { Channel.unbounded(), "read" }, { b, "read" }, { a, "read" } } })
    assert.same({ 1, true }, { select { { b, "write", "w" }, { a, "read" } } })
    assert.same({ 2, "a" }, { select { { b, "write", "v" }, { a, "read" } } })
    assert.same({ "w" }, drain(b))
    assert.same({ 1, "done" }, { select { flow.Task.from_result("done"), { b, "write", 1 } } })
    assert.equal(0, b.count)
  end))

  it("takes its token as an argument, too, and that of the list before it", in_task(function()
    local canceled, none = flow.CancellationToken.canceled, flow.CancellationToken.none
    local ch = Channel.unbounded()
    ch:write(1)
    raises("OperationCanceled", select, { { ch, "read" } }, canceled)
    raises("OperationCanceled", select, { { ch, "read" }, token = canceled }, none)
    assert.is_true(flow.channel.select_async({ { ch, "read" } }, canceled).is_canceled)
    bad_argument(2, "select", function() select({ { ch, "read" } }, 5) end, "CancellationToken")
    assert.same({ 1, 1 }, { select({ { ch, "read" } }, flow.CancellationTokenSource().token) })
    local source = flow.CancellationTokenSource()
    local task = flow.spawn(select, { { ch, "read" } }, source.token)
    flow.yield()
    source:cancel("enough")
    local _, err = task:try_await()
    assert.equal("enough", err.reason)
  end))

  it("gives the outcome of a complete task though its token is canceled", in_task(function()
    local ch, done = Channel.unbounded(), flow.Task.from_result("done")
    ch:write(1)
    local canceled = flow.CancellationToken.canceled
    assert.same({ 2, "done" }, { select { { ch, "read" }, done, token = canceled } })
    assert.same({ 1, "done" }, { flow.with_timeout(1, function()
      pcall(flow.sleep, 2)
      return select { done, { ch, "read" } }
    end) })
    assert.equal(1, ch.count)
    raises("OperationCanceled", select, { { ch, "read" }, flow.delay(1), token = canceled })
    flow.sleep(1)
  end))

  it("waits for whichever comes first, and leaves nothing in the others", in_task(function()
    local a, b, c = Channel.unbounded(), Channel.bounded(0), Channel.bounded(1)
    c:write("full")
    local source = flow.TaskCompletionSource()
    local clauses = { { a, "read" }, { b, "write", "w" }, { c, "write", "c" }, source.task }
    local function wait()
      local task = flow.spawn(function() return table.pack(select(clauses)) end)
      settle()
      return task
    end
    local task = wait()
    a:write("x")
    assert.same({ 1, "x", n = 2 }, flow.await(task))
    assert.is_nil(b:try_read())
    task = wait()
    assert.equal("w", b:read())
    assert.same({ 2, true, n = 2 }, flow.await(task))
    a:write("stays")
    assert.equal("stays", a:read())
    task = wait()
    assert.equal("full", c:read())
    assert.same({ 3, true, n = 2 }, flow.await(task))
    assert.equal("c", c:peek())
    task = wait()
    source:set_result("r", "more")
    assert.same({ 4, "r", n = 2 }, flow.await(task))
    a:write("stays")
    assert.is_nil(b:try_read())
    assert.same({ "stays" }, drain(a))
  end))

  it("times out, at once with 0, and takes what is there before that", in_task(function(clock)
    local ch = Channel.unbounded()
    local from = clock.now()
    assert.same({ nil, "timeout" }, { select { { ch, "read" }, timeout = 2 } })
    assert.equal(2, clock.now() - from)
    assert.same({ nil, "timeout" }, { select { { ch, "read" }, timeout = 0 } })
    ch:write(1)
    assert.same({ 1, 1 }, { select { { ch, "read" }, timeout = 0 } })
    ch:write(2)
    assert.equal(2, ch:read())
    local task = flow.channel.select_async { { ch, "read" }, timeout = 5 }
    ch:write(3)
    assert.same({ 1, 3 }, { flow.await(task) })
  end))

  it("raises what its clause would: a faulted task, a closed channel", in_task(function()
    local ch = Channel.unbounded()
    local source = flow.TaskCompletionSource()
    local task = flow.spawn(select, { { ch, "read" }, source.task })
    settle()
    source:set_exception("failed")
    assert.equal("failed", raised(flow.await, task))
    assert.equal("failed", raised(select, { source.task, { ch, "read" } }))
    task = flow.spawn(function() return table.pack(select { { ch, "read" }, timeout = 3 }) end)
    settle()
    ch:complete()
    assert.same({ 1, n = 2 }, flow.await(task))
    assert.same({ 1, n = 2 }, table.pack(select { { ch, "read" } }))
    raises("ChannelClosed", select, { { ch, "write", 1 } })
    local broken = Channel.bounded(0)
    local writing = flow.channel.select_async { { broken, "write", 1 } }
    broken:complete("why")
    assert.equal("why", raises("ChannelClosed", flow.await, writing).inner)
    assert.equal("why", raises("ChannelClosed", select, { { broken, "read" } }).inner)
  end))

  it("may meet itself from the other side", in_task(function()
    local ch = Channel.bounded(0)
    local function both(item) return flow.channel.select_async { { ch, "read" }, { ch, "write", item } } end
    local first = both("one")
    settle()
    assert.is_false(first.is_completed) -- it does not read what it writes
    local second = both("two")
    assert.same({ 1, "one" }, { flow.await(second) })
    assert.same({ 2, true }, { flow.await(first) })
    assert.is_false(ch:try_write(3))
    assert.is_nil(ch:try_read())
  end))

  it("takes halves, awaitables, and one task twice", in_task(function()
    local ch, source = Channel.unbounded(), flow.TaskCompletionSource()
    assert.same({ 1, true }, { select { { ch.writer, "write", 5 } } })
    assert.same({ 1, 5 }, { select { { ch.reader, "read" } } })
    local awaitable = setmetatable({}, { __await = function() return source.task end })
    local task = flow.channel.select_async { awaitable, source.task, { ch, "read" }, { ch, "read" } }
    settle()
    source:set_result(7)
    assert.same({ 1, 7 }, { flow.await(task) })
    ch:write(1)
    assert.equal(1, ch.count)
  end))

  it("is canceled by its token, and by the ambient one", in_task(function()
    local ch, source = Channel.bounded(0), flow.CancellationTokenSource()
    local task = flow.spawn(select, { { ch, "read" }, { ch, "write", 1 }, token = source.token })
    settle()
    source:cancel()
    assert.equal(source.token, raised(flow.await, task).token)
    raises("Timeout", flow.with_timeout, 1, select, { { ch, "read" }, { ch, "write", 1 } })
    assert.is_nil(ch:try_read())
    assert.is_false(ch:try_write(1))
  end))

  it("refuses what is no list of clauses", in_task(function()
    local ch = Channel.unbounded()
    local function bad(list, word)
      bad_argument(1, "select", function() local _ = select(list) end, word)
      bad_argument(1, "select_async", function() local _ = flow.channel.select_async(list) end, word)
    end
    bad(nil, "table expected")
    bad({}, "a clause or a task")
    bad({ timeout = 1 }, "a clause or a task")
    bad({ ch }, "element 1")
    bad({ { ch } }, "element 1")
    bad({ { ch, "read" }, { ch, "peek" } }, "element 2")
    bad({ { ch, "write" } }, "nil is not an item")
    bad({ { ch.reader, "write", 1 } }, "no channel to write")
    bad({ { {}, "read" } }, "no channel to read")
    bad({ { ch, "read" }, timeout = -1 }, "timeout")
    bad({ { ch, "read" }, token = 1 }, "token")
    bad({ { ch, "read" }, limit = 1 }, "'limit'")
    ch:write(1)
    assert.same({ 1 }, drain(ch))
  end))

  it("works outside every task", function()
    local ch = Channel.unbounded()
    flow.spawn(function() ch:write("x") end)
    assert.same({ 1, "x" }, { select { { ch, "read" } } })
    assert.same({ nil, "timeout" }, { select { { ch, "read" }, timeout = 0 } })
  end)
end)

describe("a place where nobody can suspend", function()
  it("is told so, and nothing is registered", in_task(function()
    local ch, full = Channel.unbounded(), Channel.bounded(0)
    local source = flow.CancellationTokenSource()
    local function in_sort(fn)
      return raised(function() table.sort({ 1, 2 }, function() fn() end) end)
    end
    for _, token in ipairs { false, source.token } do
      helper.is_error("InvalidOperation", in_sort(function() ch:read(token or nil) end), "sort")
      helper.is_error("InvalidOperation", in_sort(function() full:write(1, token or nil) end), "sort")
      helper.is_error("InvalidOperation", in_sort(function()
        select { { ch, "read" }, { full, "write", 1 }, token = token or nil }
      end), "sort")
    end
    ch:write("x")
    in_sort(function()
      assert.equal("x", ch:read()) -- what is there can be had anywhere
      error("done")
    end)
    ch:write("y")
    assert.equal(1, ch.count)
    assert.is_nil(full:try_read())
  end))
end)

describe("what waits for a channel", function()
  after_each(function() flow.on_unobserved_exception(false) end)

  it("is collected with it, reported, and closed", in_task(function()
    support.with_reports(function(reports)
      local log, note = recorder()
      local function park(name, make, wait)
        flow.async(function()
          local ch = make()
          local _ <close> = helper.closing(function(err)
            note(name, "closed", err and err.name)
            ch:try_write("harmless")
            ch:try_read()
          end)
          wait(ch)
        end)()
      end
      park("read", Channel.unbounded, function(ch) ch:read() end)
      park("two", Channel.unbounded, function(ch)
        flow.async(function() ch:read() end)()
        ch:read()
      end)
      park("write", function() return Channel.bounded(0) end, function(ch) ch:write(1) end)
      park("async", Channel.unbounded, function(ch) flow.await(ch:read_async()) end)
      park("select", Channel.unbounded, function(ch) select { { ch, "read" }, { ch, "read" } } end)
      park("token", Channel.unbounded, function(ch) ch:read(flow.CancellationTokenSource().token) end)
      park("completion", Channel.unbounded, function(ch) flow.await(ch.completion) end)
      collect()
      table.sort(log)
      assert.same({ "async closed nil", "completion closed nil", "read closed nil",
        "select closed nil", "token closed nil", "two closed nil",
        "write closed nil" }, log)
      assert.equal(8, #reports)
      for _, report in ipairs(reports) do helper.is_error("TaskAbandoned", report.err) end
    end)
  end))

  it("is kept by an armed deadline, by nothing else", in_task(function()
    local weak = support.weak()
    local log, note = recorder()
    start(note, "limited", function()
      local ch = Channel.unbounded()
      weak.limited = ch
      return flow.with_timeout(1, ch.read, ch)
    end)
    start(note, "select", function()
      local ch = Channel.unbounded()
      weak.select = ch
      return select { { ch, "read" }, timeout = 1 }
    end)
    collect()
    assert.is_truthy(weak.limited and weak.select)
    flow.sleep(2)
    settle()
    table.sort(log)
    assert.same({ "limited raised Timeout", "select nil timeout" }, log)
    assert.equal(0, support.alive(weak))
  end))

  it("is let go of when it has waited in vain", in_task(function()
    local ch, weak = Channel.unbounded(), support.weak()
    local full = Channel.bounded(0)
    for i = 1, 20 do
      local task = flow.spawn(function()
        if i % 4 == 0 then
          flow.with_timeout(1, ch.read, ch)
        elseif i % 4 == 1 then
          flow.with_timeout(1, full.write, full, {})
        elseif i % 4 == 2 then
          select { { ch, "read" }, { full, "write", {} }, timeout = 1 }
        else
          flow.with_timeout(1, flow.await, ch:wait_to_read_async())
        end
      end)
      weak[i] = task
    end
    flow.sleep(2)
    assert.equal(0, support.alive(weak))
    local before = collectgarbage("count")
    for _ = 1, support.many(300, 20) do
      local source = flow.CancellationTokenSource()
      local task = flow.spawn(function() ch:read(source.token) end)
      flow.yield()
      source:cancel()
      flow.try_await(task)
      pcall(flow.with_timeout, 0.1, select, { { ch, "read" }, { full, "write", 1 } })
    end
    collect()
    assert.is_true(collectgarbage("count") - before < 20)
  end))

  it("lets items and finished readers go", in_task(function()
    local ch, weak = Channel.bounded(3), support.weak()
    for i = 1, 9 do
      weak[i] = {}
      ch:write_async(weak[i])
    end
    for _ = 1, 9 do ch:read() end
    assert.equal(0, support.alive(weak))
    weak.channel = Channel.unbounded()
    weak.channel:write(weak.channel) -- a circle
    assert.equal(0, support.alive(weak))
  end))

  it("is named in the hang report", function()
    local err = raised(flow.run, function()
      local ch = Channel.unbounded()
      ch:read()
    end)
    helper.is_error("InvalidOperation", err, "waits for coflow.Channel")
    collect()
  end)

  it("is told apart from what somebody else resumes", in_order(function()
    local log, note = recorder()
    local ch, thread = Channel.unbounded(), nil
    start(note, "reader", function()
      thread = coroutine.running()
      return ch:read()
    end)
    for _ = 1, 3 do assert.is_true(coroutine.resume(thread, "junk", "junk")) end
    ch:write("item")
    assert.is_true(coroutine.resume(thread, "junk"))
    settle()
    assert.same({ "reader item" }, log)
  end))

  it("loses no item to a task whose coroutine somebody has closed", in_task(function()
    local ch, thread = Channel.unbounded(), nil
    flow.async(function()
      thread = coroutine.running()
      return ch:read()
    end)()
    coroutine.close(thread)
    ch:write("item")
    assert.equal("item", ch:read())
  end))
end)

describe("a generator", function()
  local wrap = flow.coroutine.wrap

  it("may wait for a channel: its task does", in_order(function()
    local ch, full = Channel.unbounded(), Channel.bounded(0)
    local squares = wrap(function()
      for item in ch:iterate() do
        full:write("seen " .. item)
        flow.coroutine.yield(item * item)
      end
    end)
    local log, note = recorder()
    start(note, "consumer", function()
      for square in squares do note(square) end
    end)
    for i = 1, 3 do
      ch:write(i)
      note(full:read())
      settle()
    end
    ch:complete()
    settle()
    assert.same({ "1", "seen 1", "4", "seen 2", "9", "seen 3", "consumer nil" }, log)
  end))

  it("loses nothing when it is canceled, or given up", in_task(function()
    local ch = Channel.unbounded()
    raises("Timeout", flow.with_timeout, 1, wrap(function() ch:read() end))
    local source = flow.CancellationTokenSource()
    local task = flow.spawn(wrap(function() return ch:read(source.token) end))
    flow.yield()
    source:cancel()
    raises("OperationCanceled", flow.await, task)
    ch:write(1)
    assert.equal(1, ch.count)
    support.with_reports(function(reports)
      flow.async(function() wrap(function() Channel.unbounded():read() end)() end)()
      collect()
      assert.equal(1, #reports)
    end)
  end))
end)

describe("a closed coroutine whose channel is gone", function()
  before_each(function() flow.on_unobserved_exception(false) end)

  it("can still be interrupted by a deadline above it", in_task(function()
    local weak = support.weak()
    raises("Timeout", flow.with_timeout, 1, function()
      local thread
      flow.async(function()
        thread = coroutine.running()
        weak.channel = Channel.unbounded()
        weak.channel:read()
      end)()
      coroutine.close(thread)
      collect()
      assert.is_nil(weak.channel)
      flow.sleep(5)
    end)
    settle()
  end))
end)

describe("an _async operation", function()
  it("is a task: complete at once when it can be", in_task(function()
    local ch = Channel.bounded(1)
    local write = ch:write_async(1)
    assert.equal("ran_to_completion", write.status)
    assert.is_true(write.result)
    local blocked = ch:write_async(2)
    assert.equal("waiting_for_activation", blocked.status)
    assert.equal(1, ch:read_async().result)
    assert.is_true(blocked.is_completed_successfully)
    assert.is_true(ch:wait_to_read_async().result)
    assert.same({ 2 }, ch:read_batch_async(3).result)
    assert.is_true(ch:wait_to_write_async().result)
    local read = ch:read_async()
    assert.is_true(flow.Task.when_any(read, write).is_completed)
    ch:write("x")
    assert.equal("x", read.result)
  end))

  it("goes on when wait_async gives up on it", in_task(function()
    local ch = Channel.unbounded()
    local read = ch:read_async()
    raises("Timeout", flow.await, read:wait_async(1))
    ch:write(1)
    assert.equal(1, flow.await(read))
  end))

  it("never runs its awaiter on the writer's stack", in_order(function()
    local log, note = recorder()
    local ch = Channel.unbounded()
    start(note, "awaiter", function() return flow.await(ch:read_async()) end)
    ch:write("x")
    note("wrote")
    settle()
    assert.same({ "wrote", "awaiter x" }, log)
  end))
end)

describe("finalizers", function()
  it("may use the channel that is being used", in_task(function()
    local ch, random = Channel.bounded(2), support.random(11)
    local written, got, going = 0, {}, true
    local function litter()
      setmetatable({}, { __gc = function()
        if not going then return end
        local item = ch:try_read()
        if item then got[#got + 1] = item end
        if ch:try_write(written + 1) then written = written + 1 end
      end })
    end
    local reader = flow.spawn(function()
      while going do
        litter()
        local index, item = select { { ch, "read" }, timeout = random(2) - 1 }
        if index then got[#got + 1] = item end
      end
    end)
    for _ = 1, support.many(300, 40) do
      litter()
      if random(3) == 1 then collectgarbage() end
      written = written + 1
      local mine = written
      ch:write_async(mine)
      if random(2) == 1 then flow.yield() end
    end
    going = false
    flow.await(reader)
    for item in ch.try_read, ch do got[#got + 1] = item end
    table.sort(got)
    assert.equal(written, #got)
    local last = 0
    for _, item in ipairs(got) do
      assert.is_true(item > last)
      last = item
    end
  end))
end)

describe("a pipeline of channels", function()
  it("passes many items through many tasks", in_task(function()
    local n = support.many(2000, 60)
    local stages = { Channel.bounded(1) }
    for i = 2, 20 do
      stages[i] = Channel.bounded(i % 3)
      flow.spawn(function()
        for item in stages[i - 1]:iterate() do stages[i]:write(item + 1) end
        stages[i]:complete()
      end)
    end
    flow.spawn(function()
      for i = 1, n do stages[1]:write(i) end
      stages[1]:complete()
    end)
    local expected = 20
    for item in stages[20]:iterate() do
      assert.equal(expected, item)
      expected = expected + 1
    end
    assert.equal(n + 20, expected)
  end))

  it("serves many waiters in order", in_task(function()
    local n, sum = support.many(100000, 200), 0
    local ch = Channel.unbounded()
    for i = 1, n do
      flow.async(function()
        assert(ch:read() == i)
        sum = sum + 1
      end)()
    end
    for i = 1, n do ch:write(i) end
    settle()
    while sum < n do flow.yield() end
  end))
end)

describe("the comparer of a prioritized channel", function()
  it("may read from the channel", in_task(function()
    local ch, armed
    ch = Channel.prioritized { comparer = function(a, b)
      if armed then
        armed = false
        while ch:try_read() do end
      end
      return a < b
    end }
    for _, n in ipairs { 1, 100, 1000 } do
      for i = 1, n do ch:write(i) end
      armed = true
      ch:write(n // 2)
      assert.equal(n // 2, ch:try_read())
      assert.is_nil(ch:try_read())
    end
  end))
end)
