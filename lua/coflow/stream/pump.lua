-- coflow.stream.pump: reading ahead, from one source or from several.
--
-- Each source has a task, its *pump*: made when the iteration is, so that the context is that of that moment; started
-- at the first pull, under the ambient token of whoever makes it; canceled and awaited at the end.
--
-- All pumps put what they read in one queue, from which the consumer takes: three lists, from `first` to `last`. A
-- pump's failure is an entry of its own in it, behind the items that came before; the error is the task's. The channels
-- carry no items, only the news of one (arrival), or of room for one (pump.room): whoever reads it looks again.
--
-- Invariants: of each pump at most `limit` items are in the queue (pump.held).
--             active is the number of pumps that have not ended; the last one that ends puts an entry.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local iteration = require "coflow.stream.iteration"
local under = require "coflow.under_token"

local await, current_task, is_error = core.await, core.current_task, core.errors.is
local deferred, in_turn = iteration.deferred, iteration.in_turn

local FAILED = {}

-- Calls fn out of reach of the ambient token.
local function shielded(fn, ...)
  local _ <close> = current_task() and core.open_shield() or nil
  return fn(...)
end

-- The pumps that wait for room. Held here: only the consumer ends that, or what closes a forgotten iteration.
local idle = {}

-- The items of all `streams`, in order of arrival, read ahead by at most `limit` items of each.
local function gather(streams, limit, name, run)
  local values, seconds, owners, first, last = {}, {}, {}, 1, 0
  local pumps, active, started, stopped = {}, #streams, false, false
  local stop = core.call_source() -- ends the pumps' waits; but what closes their sources may wait
  local arrival, waiting = core.channel_new(), false -- where the consumer waits, and whether it does

  local function put(pump, value, second)
    last = last + 1
    values[last], seconds[last], owners[last] = value, second, pump
    if not waiting then return end
    waiting = false
    arrival:try_write(true)
  end

  local function leave(pump)
    active = active - 1
    idle[pump] = nil
    if not pump.ended then put(pump, FAILED) elseif active == 0 then put(pump, nil) end
  end

  local function pump_all(pump)
    local _ <close> = setmetatable({ function() leave(pump) end }, deferred)
    local closing <close> = setmetatable({ pump.close }, deferred)
    do
      local _ <close> = core.open_linked(stop.token, pump.next)
      while true do
        while pump.held >= limit do
          idle[pump] = true
          pump.room:read()
        end
        local value, second = pump.next()
        if value == nil or stopped then break end
        pump.held = pump.held + 1
        put(pump, value, second)
      end
    end
    closing[1] = nil
    if pump.close then pump.close() end
    pump.ended = true -- well: what closing raises is a failure, too
  end

  for i, source in ipairs(streams) do
    local pump = { held = 0, ended = false, room = core.channel_new() }
    pump.next, pump.close = source._open(run)
    local function body() pump_all(pump) end
    pump.task = core.new(function() if run.token then under.call(run.token, body) else body() end end)
    pump.task.name = name
    pumps[i] = pump
  end

  local function next()
    if run.closed then return nil end
    if not started then
      started = true
      for _, pump in ipairs(pumps) do pump.task:start() end
    end
    while first > last do
      if active == 0 then return nil end
      waiting = true
      arrival:read()
    end
    local value, second, pump = values[first], seconds[first], owners[first]
    values[first], seconds[first], owners[first] = nil, nil, nil
    first = first + 1
    if value == nil then return nil end
    if value == FAILED then return await(pump.task) end -- which raises
    pump.held = pump.held - 1
    if idle[pump] then
      idle[pump] = nil
      pump.room:try_write(true)
    end
    return value, second
  end

  -- What a source raised before, and nobody has asked for, is dropped with the items that were read ahead. Gives
  -- what callbacks of the sources' tokens raise: the sources are to end first.
  local function cancel()
    for _, pump in ipairs(pumps) do
      pump.dropped = pump.task.is_completed
    end
    stopped = true
    return pcall(stop.cancel, stop, "the iteration was closed")
  end

  local function join()
    local err, failed
    for _, pump in ipairs(pumps) do
      local ok, problem = core.try_await(pump.task)
      local told = ok or pump.dropped or pump.task.is_canceled or is_error(problem, "TaskAbandoned")
      if not (told or failed) then err, failed = problem, true end
    end
    if failed then error(err, 0) end
  end

  local function close()
    if active == 0 then
      for _, pump in ipairs(pumps) do local _ = pump.task.exception end
    elseif not started then
      local closing
      for _, pump in ipairs(pumps) do closing = in_turn(closing, pump.close) end
      if closing then closing() end
    else
      local told, problem = cancel()
      local ended, err = true, nil
      if pcall(core.check_here) then ended, err = pcall(shielded, join) end -- else they end by themselves
      if not told and not ended then core.report(problem) end
      if not told or not ended then error(ended and problem or err, 0) end
    end
  end

  return next, close
end

return gather
