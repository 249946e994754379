-- coflow.flight: one call of a factory, shared by whoever asks while it is under way. For lazy and cache.
--
-- The factory runs in the empty context, under no token, as a task of its own: whoever happens to ask first
-- imposes nothing on the others. Each caller only waits; when the last one has given up, the factory is
-- canceled, and nobody joins it any more.
--
-- SPDX-License-Identifier: MIT

local closing = require "coflow.closing"
local core = require "coflow.core"

local Flight = {}
Flight.__index = Flight

local leaving = {}
function leaving.__close(place)
  local flight = place.flight
  flight.callers = flight.callers - 1
  if flight.callers > 0 or flight.task.is_completed then return end
  flight.given_up = true
  if flight.on_given_up then flight.on_given_up(flight) end
  local ok, err = pcall(core.cancel, flight.task, "nobody waits for the value any more")
  if not ok then core.report(err) end
end

local function wait(flight, token)
  flight.callers = flight.callers + 1
  local _ <close> = setmetatable({ flight = flight }, leaving)
  return core.await_with(flight.task, token)
end

---Waits for the value, or raises what the factory raised.
---Cancellation: ends this caller's wait.
---@param token? coflow.CancellationToken
function Flight:join(token)
  local task = self.task
  if task.is_completed then return task:results() end
  return closing(wait, self, token)
end

---Calls the factory. Not done by `new`, which creates things: a finalizer that asks meanwhile for the same value
---may have begun a flight of its own, which is then to be joined instead.
function Flight:launch()
  local _ <close> = core.suppress_flow()
  self.task:start()
end

---A flight that will call `factory(...)`. `on_given_up(flight)` is called when the last caller has left before the end.
local function new(factory, on_given_up, ...)
  local _ <close> = core.suppress_flow()
  return setmetatable({ task = core.new(factory, ...), callers = 0, on_given_up = on_given_up }, Flight)
end

return { new = new }
