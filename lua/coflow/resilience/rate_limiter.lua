-- coflow.resilience.rate_limiter: so many calls in a time, and so many that wait.
--
-- Two kinds of limit, each with two functions: `due(limit, ahead)`, when the permit after the next `ahead` ones is
-- there, and `take(limit, now)`, which takes the next one. Times come from the numbers of permits, never from sums of
-- delays.
--
-- Who waits, waits in two places: first in the line for the one place in front (places.lua), then there, asleep, until
-- the next permit is due. So only one is ever asleep, permits go out in the order of arrival, and a canceled waiter
-- has taken none. Nobody who comes while somebody waits takes a permit that happens to be there.
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local new_places = require "coflow.resilience.places"
local strategy = require "coflow.resilience.strategy"

local kind = strategy.kind

-- Limits ------------------------------------------------------------------------------------------

-- A bucket of `permits`, filled evenly. Since it was last full, at `start`, `taken` were taken: so number n of them
-- was there at start + (n - permits) * per / permits, and the bucket is full again once as many have come in.
local bucket = {}

function bucket.new(permits, per)
  return { permits = permits, per = per, start = -math.huge, taken = 0 }
end

function bucket.due(limit, ahead)
  return limit.start + (limit.taken + ahead + 1 - limit.permits) * limit.per / limit.permits
end

function bucket.take(limit, now)
  if strategy.has_come(limit.start + limit.taken * limit.per / limit.permits, now) then
    limit.start, limit.taken = now, 0
  end
  limit.taken = limit.taken + 1
end

-- The times at which the last `permits` were taken, in a ring: each permit comes back `per` later.
local window = {}

function window.new(permits, per)
  return { permits = permits, per = per, count = 0, times = {} }
end

function window.due(limit, ahead)
  local number = limit.count + ahead % limit.permits
  if number < limit.permits then return -math.huge end
  return limit.times[number % limit.permits + 1] + (ahead // limit.permits + 1) * limit.per
end

function window.take(limit, now)
  limit.times[limit.count % limit.permits + 1] = now
  limit.count = limit.count + 1
end

local limits = { token_bucket = bucket, sliding_window = window }

-- Waiting -----------------------------------------------------------------------------------------

local function waiting(self) return 1 - self._front.free + self._front.waiting end

local function reject(self)
  local wait = limits[self._kind].due(self._limit, waiting(self)) - core.loop.now()
  local retry_after = math.max(wait, 0)
  error(core.errors.RateLimitRejected(("all %d permits per %.6g s are used up; the next one is free in %.6g s"):format(
    self._permits, self._per, retry_after), { retry_after = retry_after }), 0)
end

-- Takes a permit, now or when it is due.
local function acquire(self)
  local kind_of, limit, now = limits[self._kind], self._limit, core.loop.now()
  if self._front.free == 1 and strategy.has_come(kind_of.due(limit, 0), now) then return kind_of.take(limit, now) end
  local ticket <close> = self._front:ticket()
  if self._queue_limit == 0 or not self._front:enter(ticket) then reject(self) end
  core.sleep(math.max(kind_of.due(limit, 0) - core.loop.now(), 0))
  core.throw_if_canceled()
  kind_of.take(limit, core.loop.now())
end

local function run(self, fn, ...)
  acquire(self)
  return strategy.call(fn, ...)
end

local class = strategy.class("rate_limiter", run)

---@class coflow.RateLimiterOptions
---@field permits integer calls that may start in a row
---@field per number seconds in which as many permits come back
---@field queue_limit? integer calls that may wait for a permit (0); math.huge: no limit
---@field kind? "token_bucket"|"sliding_window" how they come back: one by one, evenly, or each `per` after it was
---taken, so that no span of `per` seconds sees more than `permits` ("token_bucket")

---A strategy that starts no more than `permits` calls in a row, and as many more every `per` seconds. Calls that wait
---for a permit start in the order in which they came.
---Cancellation: ends the wait; whoever waits behind moves up.
---Raises: RateLimitRejected when no permit is there and no more may wait; `retry_after`: seconds until there is one
---for a newcomer.
---@param options coflow.RateLimiterOptions
---@return coflow.Strategy
return strategy.constructor(class, {
  { "permits", kind.integer(1), required = true },
  { "per", kind.span, required = true },
  { "queue_limit", kind.count(0), default = 0 },
  { "kind", kind.choice(limits, '"token_bucket" or "sliding_window"'), default = "token_bucket" },
}, function(self)
  self._limit = limits[self._kind].new(self._permits, self._per + 0.0) -- products of integers would overflow
  self._front = new_places(1, self._queue_limit - 1)
end)
