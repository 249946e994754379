-- Random uses of a cache against a model: a list of entries, the one that was used longest ago first. Each has a
-- value, or a factory at work and the callers who wait for it; what has expired is not there.
--
-- No two factories end at the same time, so a story that tells the time is the same in whatever order those are
-- served who wait for one of them.

local flow = require "coflow"
local support = require "spec.support.model_support"

local KEYS = 5
local TICK = 2 ^ -20 -- exact in sums, as are all times here

local function play(story, random)
  local lifetime, max = ({ 2, 4, math.huge })[random(3)], ({ 1, 2, 3, math.huge })[random(4)]
  local cache = flow.AsyncCache { time_to_live = lifetime, max_entries = max < math.huge and max or nil }
  story.unordered = true

  ---- The model. entries: of { key, job, value, expires }; one that is being made has its place already.
  local entries, jobs, callers, turns = {}, {}, {}, {}
  local now, quiet = flow.loop.now(), false

  local function expect(...) story.expect(("%.6f"):format(now), ...) end
  local function got(...) story.got(("%.6f"):format(flow.loop.now()), ...) end

  local function find(key)
    for i = #entries, 1, -1 do
      if entries[i].value and entries[i].expires <= now then table.remove(entries, i) end
    end
    for i, entry in ipairs(entries) do
      if entry.key == key then return entry, i end
    end
  end

  local function drop(entry)
    local found, i = find(entry.key)
    if found == entry then table.remove(entries, i) end
    return found == entry
  end

  local function change(what, key)
    if what == "clear" then
      entries = {}
    else
      local entry = find(key)
      expect("invalidate", key, entry ~= nil)
      if entry then drop(entry) end
    end
  end

  local function really_change(what, key)
    if what == "clear" then cache:clear() else got("invalidate", key, cache:invalidate(key)) end
  end

  -- The factory ends: its value is kept, if it is still wanted, and those that were used longest ago go.
  local function finish(job)
    job.ended = true
    expect("factory", job.call, "ends")
    if job.change then change(job.change, job.victim) end
    local outcome = (job.fails and "failure " or "value ") .. job.call
    for _, caller in ipairs(job.callers) do
      expect("caller", caller, outcome)
      callers[caller] = nil
    end
    if job.fails then
      drop(job.entry)
    elseif drop(job.entry) then
      job.entry.value, job.entry.expires = outcome, now + lifetime
      table.insert(entries, job.entry)
      local oldest = 1
      while #entries > max and entries[oldest] do
        if entries[oldest].value then table.remove(entries, oldest) else oldest = oldest + 1 end
      end
    end
  end

  local function leave(caller)
    local job = callers[caller]
    if not job then return end
    callers[caller] = nil
    expect("caller", caller, "OperationCanceled")
    for i, other in ipairs(job.callers) do
      if other == caller then table.remove(job.callers, i) end
    end
    if #job.callers > 0 then return end
    drop(job.entry)
    if job.deaf then return end
    job.ended = true
    expect("factory", job.call, "OperationCanceled")
  end

  local function pass_time(seconds)
    for _, turn in ipairs(turns) do turn() end
    turns = {}
    local target = now + seconds
    repeat
      local next
      for _, job in ipairs(jobs) do
        if not job.ended and job.due <= target and (not next or job.due < next.due) then next = job end
      end
      if next then
        now = next.due
        finish(next)
      end
    until not next
    now = target
  end

  ---- What a factory does: it works, perhaps deaf to cancellation; it may change the cache; it gives a value, or fails.
  local function new_job(key)
    local job = { call = #jobs + 1, callers = {}, deaf = random(4) == 1, entry = { key = key } }
    job.fails = random(4) == 1 and not job.deaf -- else nobody might hear of it
    job.change = ({ "clear", "invalidate", "invalidate" })[random(10)]
    job.victim = random(KEYS)
    local seconds = random(12) / 4 + job.call * TICK
    if quiet and not story.shuffled and random(2) == 1 then seconds = 0 end
    job.due = now + seconds
    function job.factory()
      got("factory", job.call, "starts for", key)
      local ok, err = pcall(job.deaf and flow.shield or flow.call, flow.sleep, seconds)
      got("factory", job.call, ok and "ends" or err.name)
      if not ok then error(err, 0) end
      if job.change then really_change(job.change, job.victim) end
      if job.fails then error("failure " .. job.call, 0) end
      return "value " .. job.call
    end
    return job
  end

  ---- The driver
  local cancels, id = {}, 0

  local function get()
    id = id + 1
    local me, key = id, random(KEYS)
    local entry, job = find(key), nil
    if not entry then
      job = new_job(key)
      jobs[job.call] = job
      entry = job.entry
      entry.job = job
      expect("factory", job.call, "starts for", key)
      table.insert(entries, entry)
      if job.due == now then turns[#turns + 1] = function() finish(job) end end
    end
    if entry.value then
      drop(entry)
      table.insert(entries, entry)
      expect("caller", me, entry.value)
    else
      callers[me] = entry.job
      table.insert(entry.job.callers, me)
    end

    local factory = job and job.factory or error
    local function write(ok, value) got("caller", me, (ok or type(value) == "string") and value or value.name) end
    cancels[me] = support.style_of(random)(
      function(token) write(pcall(cache.get_or_add, cache, key, factory, token)) end,
      function(token) return cache:get_or_add_async(key, factory, token) end,
      function(task) write(pcall(flow.await, task)) end)
  end

  local function cancel()
    if id == 0 then return end
    local victim = random(id)
    cancels[victim]()
    if callers[victim] then turns[#turns + 1] = function() leave(victim) end end
  end

  for step = 1, 40 do
    quiet = random(3) == 1 -- nobody gives up, so the order of turns is that of calls
    for _ = 1, random(4) do
      local what = random(12)
      if what <= 8 or what <= 10 and quiet then
        get()
      elseif what <= 10 then
        cancel()
      else
        local way, key = what == 12 and random(3) == 1 and "clear" or "invalidate", random(KEYS)
        really_change(way, key)
        change(way, key)
      end
    end
    local seconds = random(8) / 8
    flow.sleep(seconds)
    pass_time(seconds)
    story.compare(step)
  end
  flow.sleep(20)
  pass_time(20)
  story.compare("the end")
  assert.is_nil(next(callers))
end

describe("random uses of a cache", function()
  for name, body in support.programs(play, 50, 3) do it(name, body) end
end)
