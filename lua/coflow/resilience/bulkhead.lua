-- coflow.resilience.bulkhead: so many calls at a time, and so many that wait.
--
-- Source: Polly's concurrency limiter; the name is that of its older strategy.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local new_places = require "coflow.resilience.places"
local strategy = require "coflow.resilience.strategy"

local kind = strategy.kind

local function run(self, fn, ...)
  local ticket <close> = self._places:ticket()
  if not self._places:enter(ticket) then
    error(core.errors.BulkheadRejected(("all %s places are taken, and no more than %s calls may wait"):format(
      self._max_concurrency, self._max_queue)), 0)
  end
  return strategy.call(fn, ...)
end

local class = strategy.class("bulkhead", run)

---A strategy that lets `max_concurrency` calls run at the same time, and `max_queue` more wait their turn: first come,
---first served.
---Cancellation: ends the wait; a place that was just handed over goes to the next one.
---Raises: BulkheadRejected when the queue is full.
---@param options { max_concurrency: integer, max_queue?: integer } max_queue: 0 unless given; math.huge: no limit
---@return coflow.Strategy
return strategy.constructor(class, {
  { "max_concurrency", kind.count(1), required = true },
  { "max_queue", kind.count(0), default = 0 },
}, function(self)
  self._places = new_places(self._max_concurrency, self._max_queue)
end)
