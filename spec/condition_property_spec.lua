-- Random uses of a condition and its lock against a model: who holds the lock, who waits for it, and who for the
-- condition. Whoever was woken, or canceled, asks for the lock again on its own turn; of those who do so between
-- two comparisons, which comes first is up to the order, and the model learns it from what has happened.

local flow = require "coflow"
local support = require "spec.support.model_support"

local function play(story, random)
  local lock = flow.Lock()
  local condition = flow.Condition(lock)
  local cancels, keys, canceled = {}, {}, {}

  -- The model. contending: of { id, after, again }, `again` the step in which one came who retakes the lock. ready:
  -- what happens when those that are ready run.
  local held, holder = false, nil
  local contending, waiting, ready = {}, {}, {}
  local step = 1
  local function go_on(fn) ready[#ready + 1] = fn end

  -- Who of those in front that have come again has told that it has the lock; by themselves, the first.
  local function first_to_tell()
    local front = contending[1].again
    for i, each in ipairs(contending) do
      if each.again ~= front then break end
      if story.has_got(each.id, each.what) then return table.remove(contending, i) end
    end
    return table.remove(contending, 1)
  end

  local function hand_over()
    held, holder = #contending > 0, nil
    if not held then return end
    if story.shuffled and contending[1].again then -- it shows when they have run
      return go_on(function()
        local next = first_to_tell()
        holder = next.id
        next.after()
      end)
    end
    local next = table.remove(contending, 1)
    holder = next.id
    go_on(next.after)
  end

  local function retake(id, what)
    go_on(function()
      local function after() story.expect(id, what) end
      if not held and not story.shuffled then
        held, holder = true, id
        return after()
      end
      contending[#contending + 1] = { id = id, what = what, again = step, after = after }
      if not held then hand_over() end
    end)
  end

  local id = 0
  local function start()
    id = id + 1
    local me, waits, by_token, with_token = id, random(3) > 1, random(2) == 1, random(2) == 1
    local source = by_token and flow.CancellationTokenSource() or nil
    local token = source and source.token or with_token and flow.CancellationTokenSource().token or nil
    local task = flow.async(function()
      local ok, key = pcall(lock.lock, lock, token)
      if not ok then return story.got(me, "gave up") end
      story.got(me, "locked")
      if waits then
        local woke, err = pcall(condition.wait, condition, token)
        story.got(me, woke and "woke" or err.name)
      end
      keys[me] = key
    end)()
    cancels[me] = function() if source then source:cancel() else task:cancel() end end

    local function after()
      story.expect(me, "locked")
      if not waits then return end
      if canceled[me] then return story.expect(me, "OperationCanceled") end
      waiting[#waiting + 1] = { id = me }
      hand_over()
    end
    if held then
      contending[#contending + 1] = { id = me, after = after }
    else
      held, holder = true, me
      after()
    end
  end

  local function unlock()
    local key = holder and keys[holder]
    if not key then return end
    key:dispose()
    key:dispose()
    keys[holder] = nil
    hand_over()
  end

  local function notify(n)
    local woken = n and condition:notify(n) or condition:notify_all()
    n = math.min(n or #waiting, #waiting)
    assert.equal(n, woken)
    for _ = 1, n do retake(table.remove(waiting, 1).id, "woke") end
  end

  local function cancel()
    if id == 0 then return end
    local victim = random(id)
    cancels[victim]()
    if canceled[victim] then return end
    canceled[victim] = true
    if support.remove(waiting, victim) then return retake(victim, "OperationCanceled") end
    for i, each in ipairs(contending) do
      if each.id == victim and not each.again then
        table.remove(contending, i)
        go_on(function() story.expect(victim, "gave up") end)
        return
      end
    end
  end

  local function settle()
    flow.sleep(1)
    while #ready > 0 do table.remove(ready, 1)() end
    story.compare(step)
  end

  while step <= 40 do
    for _ = 1, random(4) do
      local what = random(12)
      if what <= 4 then start()
      elseif what <= 8 then unlock()
      elseif what <= 9 then notify(random(2))
      elseif what <= 10 then notify()
      else cancel() end
    end
    settle()
    step = step + 1
  end
  while held or #waiting > 0 do -- the end: everybody comes to one
    notify()
    settle()
    unlock()
  end
  settle()
end

describe("random uses of a condition", function()
  for name, body in support.programs(play, 100, 3) do it(name, body) end
end)
