-- Random uses of a semaphore against a model: a number, and a list of those who wait.

local flow = require "coflow"
local support = require "spec.support.model_support"

local function play(story, random)
  local max = random(4)
  local count = random(max + 1) - 1
  local semaphore = flow.Semaphore(count, max)
  local cancels = {}
  local now, queue = flow.loop.now(), {} -- of { id, due }

  local function write(id, ok, result)
    if ok then story.got(id, result) else story.got(id, result.name) end
  end

  local id = 0
  local function wait()
    id = id + 1
    local me, timeout = id, ({ 0, 0.25, 0.5, 1 })[random(9)]
    if timeout and timeout > 0 then timeout = timeout + id * 1e-6 end -- no two at once
    cancels[me] = support.style_of(random)(
      function(token) write(me, pcall(semaphore.wait, semaphore, timeout, token)) end,
      function(token) return semaphore:wait_async(timeout, token) end,
      function(task) write(me, pcall(flow.await, task)) end)
    if count > 0 and #queue == 0 then
      count = count - 1
      story.expect(me, true)
    elseif timeout == 0 then
      story.expect(me, false)
    else
      queue[#queue + 1] = { id = me, due = now + (timeout or math.huge) }
    end
  end

  local function release()
    local n = random(3)
    local ok, err = pcall(semaphore.release, semaphore, n)
    if count + n > max then
      assert(not ok and flow.errors.is(err, "SemaphoreFull"))
    else
      assert(ok and err == count)
      for _ = 1, n do
        if #queue > 0 then
          story.expect_in_turn(table.remove(queue, 1).id, true)
        else
          count = count + 1
        end
      end
    end
    assert.equal(count, semaphore.current_count)
  end

  local function cancel()
    if id == 0 then return end
    local victim = random(id)
    cancels[victim]()
    if support.remove(queue, victim) then story.expect_in_turn(victim, "OperationCanceled") end
  end

  local function pass_time(seconds)
    flow.sleep(seconds)
    now = now + seconds
    local late = {}
    for i, each in ipairs(queue) do
      if each.due <= now then late[#late + 1] = { id = each.id, due = each.due, at = i } end
    end
    table.sort(late, function(a, b)
      if a.due ~= b.due then return a.due < b.due end
      return a.at < b.at
    end)
    for _, each in ipairs(late) do
      support.remove(queue, each.id)
      story.expect_in_turn(each.id, false)
    end
    now = flow.loop.now()
  end

  for step = 1, 40 do
    for _ = 1, random(4) do
      local what = random(10)
      if what <= 5 then wait() elseif what <= 8 then release() else cancel() end
    end
    pass_time(random(4) / 8)
    story.compare(step)
  end
  for _, each in ipairs(queue) do story.expect_in_turn(each.id, "ObjectDisposed") end
  semaphore:dispose()
  flow.sleep(2)
  story.compare("the end")
end

describe("random uses of a semaphore", function()
  for name, body in support.programs(play, 100, 3) do it(name, body) end
end)
