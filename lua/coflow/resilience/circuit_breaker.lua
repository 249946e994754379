-- coflow.resilience.circuit_breaker: refuses calls while most of them fail.
--
--              too many failures             break_duration
--     closed ────────────────────> open ────────────────────> half open
--       ^                           ^                          │     │
--       └───────── success ─────────┼──────────────────────────┘     │
--                                   └──────────── failure ───────────┘
--
-- Half open, one call at a time is let through, the *probe*. Nothing is timed: an open breaker whose time has come
-- is half open.
--
-- A call counts only in the period (`_period`) in which it began: what was under way when the breaker opened says
-- nothing about the time after. So while it is half open only the probe decides. A canceled call says nothing either.
--
-- Failures are counted in PARTS parts of the sampling duration, a ring, of which the oldest one is forgotten as a
-- whole. Nothing is created between a look at the state and its change.
--
-- Source: Polly's circuit breaker. There a call that began before the break counts, and a cancellation is a success.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local strategy = require "coflow.resilience.strategy"

local errors, kind = core.errors, strategy.kind

local PARTS = 10

-- Counting ----------------------------------------------------------------------------------------

local function clear_counts(self)
  self._part = 1
  for i = 1, PARTS do
    self._starts[i], self._calls[i], self._failures[i] = -math.huge, 0, 0
  end
end

local function count(self, failed)
  local now, part = core.loop.now(), self._part
  if now - self._starts[part] >= self._sampling_duration / PARTS then
    part = part % PARTS + 1
    self._part, self._starts[part], self._calls[part], self._failures[part] = part, now, 0, 0
  end
  self._calls[part] = self._calls[part] + 1
  if failed then self._failures[part] = self._failures[part] + 1 end
end

local function too_many_failures(self)
  local now, calls, failures = core.loop.now(), 0, 0
  for i = 1, PARTS do
    if now - self._starts[i] < self._sampling_duration then
      calls, failures = calls + self._calls[i], failures + self._failures[i]
    end
  end
  return calls >= self._minimum_throughput and failures / calls >= self._failure_ratio
end

-- States ------------------------------------------------------------------------------------------

local function state_of(self)
  if self._state == "open" and strategy.has_come(self._until, core.loop.now()) then return "half_open" end
  return self._state
end

local function begin(self, state)
  self._state, self._period, self._probe, self._inner = state, self._period + 1, false, nil
  clear_counts(self)
end

local function open(self, err)
  begin(self, "open")
  self._until, self._inner = core.loop.now() + self._break_duration, err
end

local function succeeded(self)
  if self._state == "closed" then count(self, false) else begin(self, "closed") end
end

local function failed(self, err)
  if self._state == "closed" then
    count(self, true)
    if not too_many_failures(self) then return end
  end
  open(self, err)
end

-- Calls -------------------------------------------------------------------------------------------

local function refuse(self, state)
  local message, retry_after
  if state == "isolated" then
    message = "the circuit is held open: reset() closes it"
  elseif state == "open" then
    retry_after = self._until - core.loop.now()
    message = ("the circuit is open, after too many failures; next attempt in %.6g s"):format(retry_after)
  else
    retry_after = self._break_duration
    message = "the circuit is half open, and a call that tries whether it can be closed is under way"
  end
  error(errors.BrokenCircuit(message, { retry_after = retry_after, inner = self._inner }), 0)
end

local function enter(self, passage)
  local state = state_of(self)
  if state == "half_open" and not self._probe then
    self._state, self._probe = state, passage
  elseif state ~= "closed" then
    refuse(self, state)
  end
  passage.period = self._period
end

-- What the end of a call says: "success", "failure", or nothing. Without an error, and where nothing can
-- suspend, the task was abandoned.
local function verdict(self, passage, err)
  if passage.returned then return "success" end
  if errors.is(err, "OperationCanceled") or err == nil and not core.is_awaitable_here() then return nil end
  return strategy.handles(self, err) and "failure" or "success"
end

local passing = {}
function passing.__close(passage, err)
  local self = passage.breaker
  if passage.period ~= self._period then return end -- it was refused, or began before
  local ok, result = pcall(verdict, self, passage, err) -- which may suspend
  if self._probe == passage then self._probe = false end
  if not ok then error(result, 0) end
  if passage.period ~= self._period then return end
  if result == "success" then succeeded(self) elseif result == "failure" then failed(self, err) end
end

local function returning(passage, ...)
  passage.returned = true
  return ...
end

local function run(self, fn, ...)
  local passage <close> = setmetatable({ breaker = self }, passing)
  enter(self, passage)
  return returning(passage, strategy.call(fn, ...))
end

---@class coflow.CircuitBreaker: coflow.Strategy
---@field state "closed"|"open"|"half_open"|"isolated"
local class, CircuitBreaker = strategy.class("circuit_breaker", run, { state = state_of })

---Holds the circuit open until `reset`: all calls are refused. Calls under way go on, and count no more.
function CircuitBreaker:isolate()
  class.check(self)
  begin(self, "isolated")
end

---Closes the circuit and forgets what was counted.
function CircuitBreaker:reset()
  class.check(self)
  begin(self, "closed")
end

---@class coflow.CircuitBreakerOptions
---@field failure_ratio? number from 0 to 1: the share of failed calls that opens it (0.5)
---@field sampling_duration? number seconds over which calls are counted (30), to a tenth of it
---@field minimum_throughput? integer calls in that time below which it does not open (10)
---@field break_duration? number seconds that it stays open (5)
---@field should_handle? fun(err: any): boolean? which errors are failures; by default all. Others count as
---successes: whoever answers with them is there. Not asked about OperationCanceled

---A strategy that refuses calls, with BrokenCircuit, for `break_duration` after too many have failed. Then it lets
---one through at a time: a success closes the circuit, a failure opens it again.
---Cancellation: a canceled call counts neither as a success nor as a failure.
---Raises: BrokenCircuit; `retry_after`: seconds until a call may be let through (nil when isolated; while the one that
---tries is under way, the break that would follow its failure), `inner`: the error that opened the circuit.
---@param options? coflow.CircuitBreakerOptions
---@return coflow.CircuitBreaker
return strategy.constructor(class, {
  { "failure_ratio", kind.number(0, 1, "a number from 0 to 1"), default = 0.5 },
  { "sampling_duration", kind.span_or_huge, default = 30 },
  { "minimum_throughput", kind.count(1), default = 10 },
  { "break_duration", kind.seconds_or_huge, default = 5 },
  { "should_handle", kind.callable },
}, function(self)
  self._starts, self._calls, self._failures = {}, {}, {}
  self._period = 0
  begin(self, "closed")
end)
