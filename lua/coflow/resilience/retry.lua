-- coflow.resilience.retry: calls again what has failed, after a delay.
--
-- All attempts but the last run under pcall. The last one is a plain call: its error is the one that comes out.
--
-- Source: Polly's retry strategy, with its formulas for delays; the jitter of exponential ones is the decorrelated
-- one of George Polevoy.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local strategy = require "coflow.resilience.strategy"

local errors, call, kind = core.errors, strategy.call, strategy.kind

local backoffs = {
  constant = function(base) return base end,
  linear = function(base, attempt)
    local delay = base * (attempt + 1.0) -- integers would overflow
    return math.type(base) == "integer" and math.tointeger(delay) or delay
  end,
  exponential = function(base, attempt) return base * 2.0 ^ attempt end,
}

local function tanh(x)
  local e = math.exp(-2 * x)
  return (1 - e) / (1 + e)
end

-- One point on a curve that grows like 2^t in each unit of time: the delay is the way from the last point to
-- the next, so the sum of the delays stays near the curve, whatever the points. `state` holds the last one.
local function decorrelated(state, base, attempt, random)
  local t = attempt + math.max(random, 2.0 ^ -53) -- no delay is 0
  local point = 2.0 ^ t * tanh(math.sqrt(4 * t))
  if point == math.huge then return math.huge end
  local step = point - state.point
  state.point = point
  return base * step / 1.4
end

local function jitter(self)
  local number = call(self._random)
  if type(number) == "number" and number >= 0 and number <= 1 then return number end
  error(errors.InvalidOperation(("random must return a number from 0 to 1, not %s")
    :format(type(number) == "number" and tostring(number) or "a " .. type(number))), 0)
end

local function computed(self, state, attempt)
  local base = self._delay
  if base == 0 then return 0 end
  local delay = backoffs[self._backoff](base, attempt)
  if self._use_jitter and self._backoff == "exponential" then
    delay = decorrelated(state, base, attempt, jitter(self))
  elseif self._use_jitter then
    delay = delay * (0.75 + 0.5 * jitter(self))
  end
  return math.min(delay, self._max_delay)
end

local function delay_after(self, state, attempt, err)
  local delay = computed(self, state, attempt)
  if not self._delay_generator then return delay end
  local given = call(self._delay_generator, { attempt_number = attempt, error = err })
  if given and type(given) ~= "number" then
    error(errors.InvalidOperation("delay_generator must return a number of seconds or nil, not a " .. type(given)), 0)
  elseif given ~= given then
    error(errors.InvalidOperation("delay_generator must return a number of seconds or nil, not NaN"), 0)
  end
  return given and given >= 0 and given or delay
end

local function run(self, fn, ...)
  local state = { point = 0 }
  for attempt = 0, self._max_retry_attempts - 1 do
    local outcome = table.pack(strategy.try(fn, ...))
    if outcome[1] then return table.unpack(outcome, 2, outcome.n) end
    local err = outcome[2]
    if not strategy.handles(self, err) then error(err, 0) end
    local delay = delay_after(self, state, attempt, err)
    if self._on_retry then call(self._on_retry, { attempt_number = attempt, delay = delay, error = err }) end
    if delay == 0 and core.is_awaitable_here() then core.yield() end -- others have their turn
    core.sleep(delay) -- which raises if the token was canceled meanwhile
  end
  return call(fn, ...)
end

local class = strategy.class("retry", run)

---@class coflow.RetryOptions
---@field max_retry_attempts? integer attempts besides the first (3); math.huge: no limit
---@field delay? number seconds, the base of the delays (2); 0: no delay ever
---@field backoff? "constant"|"linear"|"exponential" the delay after attempt n, counted from 0, is `delay`,
---`delay * (n + 1)` or `delay * 2^n` ("constant")
---@field max_delay? number seconds, for computed delays
---@field use_jitter? boolean makes the delays vary: by a quarter up or down; exponential ones more
---@field delay_generator? fun(args: { attempt_number: integer, error: any }): number? gives the delay itself; nil or
---a negative number: the computed one
---@field should_handle? fun(err: any): boolean? which errors to retry after; by default all. Not
---asked about OperationCanceled
---@field on_retry? fun(args: { attempt_number: integer, delay: number, error: any }) called before each delay
---@field random? fun(): number the source of jitter, giving numbers from 0 to 1 (math.random)

---A strategy that calls the function again when it has failed. When the attempts are used up the last error comes
---out as it is. With a delay of 0 others that are ready come first, where it can suspend.
---Cancellation: ends the delay, and is never retried.
---Raises: InvalidOperation for a delay of `delay_generator` that is no number, or NaN, and for what `random` gives
---that is no number from 0 to 1.
---@param options? coflow.RetryOptions
---@return coflow.Strategy
return strategy.constructor(class, {
  { "max_retry_attempts", kind.count(0), default = 3 },
  { "delay", kind.seconds, default = 2 },
  { "backoff", kind.choice(backoffs, '"constant", "linear" or "exponential"'), default = "constant" },
  { "max_delay", kind.seconds_or_huge, default = math.huge },
  { "use_jitter", kind.boolean, default = false },
  { "delay_generator", kind.callable },
  { "should_handle", kind.callable },
  { "on_retry", kind.callable },
  { "random", kind.callable, default = math.random },
})
