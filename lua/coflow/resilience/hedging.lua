-- coflow.resilience.hedging: when an answer is slow to come, asks again without giving up the first question.
--
-- Attempts are tasks, started by the one that calls and ended with it: the race is a to-be-closed value, which cancels
-- those that still run and waits for their end, deaf to cancellation. (A task group would do the same, but an outer
-- cancellation during that wait would take the winner's values away.)
--
-- Source: Polly's hedging strategy.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local strategy = require "coflow.resilience.strategy"

local kind = strategy.kind

local Race = {}

function Race.__close(race)
  for _, task in ipairs(race.tasks) do
    local ok, err = pcall(core.cancel, task, "another attempt has decided the outcome")
    if not ok then core.report(err) end -- of callbacks
  end
  for _, task in ipairs(race.tasks) do pcall(core.await_with, task, core.none) end
end

local function returned(race, ...)
  race.winner = race.winner or core.current_task()
  return ...
end

local function attempt(race, fn, ...)
  core.throw_if_canceled()
  if race.winner then return end -- decided before this one began
  return returned(race, fn(...))
end

-- Waits until one of the tasks has ended; no longer than `seconds`.
local function wait_for_any(tasks, seconds)
  core.try_await(core.wait_async(core.when_any(tasks), seconds))
end

-- Looks at the tasks that have ended. Returns how many of them failed, and the one whose outcome is that of the race
-- if it is decided: the winner, or one that failed with what is not to be handled. The last one that failed is noted.
local function take_ended(self, race)
  local failures, i = 0, 1
  while not race.winner and race.tasks[i] do
    local task = race.tasks[i]
    if task.is_completed then
      local _, err = core.try_await(task)
      if not strategy.handles(self, err) then return failures, task end
      failures = failures + 1
      race.failed = task
      table.remove(race.tasks, i)
    else
      i = i + 1
    end
  end
  return failures, race.winner
end

local function run(self, fn, ...)
  local race <close> = setmetatable({ tasks = {}, winner = nil, failed = nil }, Race)
  local number, left, wanted = 0, self._max_hedged_attempts + 1.0, 1
  while true do
    for _ = 1, math.min(wanted, left) do
      local task = core.spawn(attempt, race, fn, ...)
      table.insert(race.tasks, task)
      number, left = number + 1, left - 1
      task.name = "hedged attempt " .. number
    end
    if #race.tasks == 0 then return core.await(race.failed) end
    wait_for_any(race.tasks, left > 0 and self._delay or math.huge)
    local failures, decided = take_ended(self, race)
    if decided then return core.await(decided) end
    if race.tasks[1] or left > 0 then core.throw_if_canceled() end -- the wait is complete, which beats a token
    wanted = math.max(failures, 1) -- without a failure the delay has passed
  end
end

local class = strategy.class("hedging", run)

---@class coflow.HedgingOptions
---@field delay? number seconds from one attempt to the next (2); 0: all at once; math.huge: the next one only after
---a failure
---@field max_hedged_attempts? integer attempts besides the first (1)
---@field should_handle? fun(err: any): boolean? after which errors to go on; by default all. Others end the race
---with that error, and so does OperationCanceled, about which it is not asked

---A strategy that starts further attempts while the first ones have not answered: one after each `delay`, and one
---at once for each that failed. The first success wins; the other attempts are canceled, and their end is awaited. All
---failed: the last error comes out as it is. Each attempt is a task of its own.
---Cancellation: cancels all attempts.
---@param options? coflow.HedgingOptions
---@return coflow.Strategy
return strategy.constructor(class, {
  { "delay", kind.seconds_or_huge, default = 2 },
  { "max_hedged_attempts", kind.integer(0), default = 1 },
  { "should_handle", kind.callable },
})
