-- coflow.resilience: calling what may fail, hang or be overloaded.
--
-- Each function makes a *strategy* (resilience/strategy.lua), an object whose `execute(fn, ...)` calls `fn` in its
-- way. `pipeline` puts strategies into each other, outermost first. The order decides what each one sees:
--
--     pipeline {
--       timeout { seconds = 30 },      the limit for all of it: attempts, delays, waiting in queues
--       retry {},                      sees whatever comes out from below, refusals too
--       circuit_breaker {},            counts each attempt; an open circuit costs no place and no permit
--       rate_limiter { … },            each attempt takes a permit
--       bulkhead { … },                holds a place only while an attempt runs, not during the delays
--       timeout { seconds = 2 },       the limit for one attempt; not for its waiting above
--     }
--
-- Cancellation is no failure for any of them: an OperationCanceled, whoever was canceled, goes through at once.
-- A Timeout from a strategy further in is an error like any other.
--
-- Source: Polly 8, with ambient cancellation in place of its tokens.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local flow = require "coflow"
local strategy = require "coflow.resilience.strategy"

local kind = strategy.kind

local resilience = {
  retry = require "coflow.resilience.retry",
  circuit_breaker = require "coflow.resilience.circuit_breaker",
  bulkhead = require "coflow.resilience.bulkhead",
  rate_limiter = require "coflow.resilience.rate_limiter",
  hedging = require "coflow.resilience.hedging",
}

local Timeout = strategy.class("timeout", function(self, fn, ...)
  return flow.with_timeout(self._seconds, strategy.call, fn, ...)
end)

---A strategy that cancels a call after `seconds`. A call that returns all the same returns its values.
---Cancellation: comes out as what it is, not as Timeout.
---Raises: Timeout when its time has passed before any outer cancellation.
---@param options { seconds?: number } nil or math.huge: no limit; 0: the function is never called
---@return coflow.Strategy
resilience.timeout = strategy.constructor(Timeout, { { "seconds", kind.seconds_or_huge } })

local function with_fallback(self, ok, ...)
  if ok then return ... end
  local err = ...
  if not strategy.handles(self, err) then error(err, 0) end
  return strategy.call(self._action, err)
end

local Fallback = strategy.class("fallback", function(self, fn, ...)
  return with_fallback(self, strategy.try(fn, ...))
end)

---A strategy that returns what `action(err)` returns in place of a call that has failed.
---Cancellation: does not call `action`.
---Raises: what `action` raises.
---@param options { action: (fun(err: any): ...), should_handle?: (fun(err: any): boolean?) } should_handle: which
---errors to replace; by default all. Not asked about OperationCanceled
---@return coflow.Strategy
resilience.fallback = strategy.constructor(Fallback, {
  { "action", kind.callable, required = true },
  { "should_handle", kind.callable },
})

local Pipeline = strategy.class("pipeline", function(self, fn, ...)
  return self._outermost(fn, ...)
end)

local function is_strategy(value)
  if type(value) ~= "table" and type(value) ~= "userdata" then return false end
  local ok, execute = pcall(function() return value.execute end)
  return ok and core.is_callable(execute)
end

-- What is wrong with the arguments of `pipeline`, or nil.
local function problem(strategies)
  if type(strategies) ~= "table" then
    return "list of strategies expected, got " .. (strategies == nil and "no value" or type(strategies))
  elseif rawlen(strategies) == 0 and is_strategy(strategies) then
    return "list of strategies expected, got a strategy: pipeline { outermost, …, innermost }"
  end
  local n = #strategies
  for key in pairs(strategies) do
    if math.type(key) ~= "integer" or key < 1 or key > n then
      return ("strategies expected at 1, 2, 3 …, not at '%s'"):format(tostring(key))
    end
  end
  for i = 1, n do
    if not is_strategy(strategies[i]) then
      return ("element %d is no strategy (a %s value without a method 'execute')"):format(i, type(strategies[i]))
    end
  end
end

---A strategy made of others, outermost first. It takes any object that has an `execute`.
---@param strategies coflow.Strategy[] without any, `fn` is just called
---@return coflow.Strategy
function resilience.pipeline(strategies)
  local message = problem(strategies)
  if message then core.argument_error(1, message) end
  local inner = strategy.call
  for i = #strategies, 1, -1 do
    local outer, following = strategies[i], inner
    inner = function(...) return outer:execute(following, ...) end
  end
  return setmetatable({ _outermost = inner }, Pipeline)
end

return resilience
