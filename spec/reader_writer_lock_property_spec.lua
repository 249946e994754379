-- Random uses of a ReaderWriterLock against a model: who is in, and two lists of those who wait.

local flow = require "coflow"
local support = require "spec.support.model_support"

local function play(story, random)
  local rw = flow.ReaderWriterLock()
  local cancels, keys = {}, {}
  local readers, writing = 0, false
  local queues = { read = {}, write = {} }
  local holding = {} -- of { id, what }

  local function write(id, ok, result)
    if ok then keys[id] = result end
    story.got(id, ok and "in" or result.name)
  end
  local function enter(each, expect)
    if each.what == "write" then writing = true else readers = readers + 1 end
    holding[#holding + 1] = each
    expect(each.id, "in")
  end
  local function may_enter(what)
    return not writing and (what == "read" and #queues.write == 0 or what == "write" and readers == 0)
  end
  local function admit()
    if #queues.write > 0 and may_enter("write") then
      enter(table.remove(queues.write, 1), story.expect_in_turn)
    end
    while #queues.read > 0 and may_enter("read") do
      enter(table.remove(queues.read, 1), story.expect_in_turn)
    end
  end

  local id = 0
  local function ask()
    id = id + 1
    local each = { id = id, what = random(5) <= 3 and "read" or "write" }
    local me, method = id, each.what .. "_lock"
    cancels[me] = support.style_of(random)(
      function(token) write(me, pcall(rw[method], rw, token)) end,
      function(token) return rw[method .. "_async"](rw, token) end,
      function(task) write(me, pcall(flow.await, task)) end)
    if may_enter(each.what) and (each.what == "read" or #queues.write == 0) then
      enter(each, story.expect)
    else
      table.insert(queues[each.what], each)
    end
  end

  local function try()
    local what = random(2) == 1 and "read" or "write"
    local key = rw["try_" .. what .. "_lock"](rw)
    assert.equal(may_enter(what) and #queues.write == 0, key ~= nil)
    if key then key:dispose() end
  end

  local function leave()
    local at = #holding > 0 and random(#holding)
    local each = at and holding[at]
    if not each or not keys[each.id] then return end -- it has not run yet
    table.remove(holding, at)
    keys[each.id]:dispose()
    keys[each.id]:dispose()
    if each.what == "write" then writing = false else readers = readers - 1 end
    admit()
  end

  local function cancel()
    if id == 0 then return end
    local victim = random(id)
    local found = support.remove(queues.read, victim) or support.remove(queues.write, victim)
    cancels[victim]()
    if not found then return end
    story.expect_in_turn(victim, "OperationCanceled")
    admit()
  end

  for step = 1, 40 do
    for _ = 1, random(4) do
      local what = random(10)
      if what <= 4 then ask() elseif what <= 7 then leave() elseif what <= 9 then cancel() else try() end
    end
    flow.sleep(1)
    story.compare(step)
  end
  for _, what in ipairs { "write", "read" } do
    for _, each in ipairs(queues[what]) do story.expect_in_turn(each.id, "ObjectDisposed") end
  end
  rw:dispose()
  flow.sleep(1)
  story.compare("the end")
end

describe("random uses of a ReaderWriterLock", function()
  for name, body in support.programs(play, 100, 3) do it(name, body) end
end)
