-- coflow.testing: run a test in virtual time, under a chosen order, and without leaks.
--
-- It is the scheduler, the timers and the poll of production that run (src/testing.c): only where time comes
-- from differs, and, under a seed, who of those that are ready comes first. So what a test shows is what
-- production does in one of its possible orders.
--
--     local it = require("coflow.testing").it       -- the one line that busted needs
--
--     it("gives up after an hour", function(clock)  -- takes no time
--       local ok = pcall(flow.await, flow.delay(7200):wait_async(3600))
--       assert.is_false(ok)
--       assert.equal(3600, clock:now())
--     end)
--
-- SPDX-License-Identifier: MIT

local arguments = require "coflow.arguments"
local closing = require "coflow.closing"
local core = require "coflow.core"

local begin, finish, left, left_open, lost, give_up = core.testing.begin, core.testing.finish, core.testing.left,
  core.testing.left_open, core.testing.lost, core.testing.give_up
local InvalidOperation = core.errors.InvalidOperation
local is_integer = arguments.is_integer

local testing = {}

local DEFAULT_THRESHOLD = 0.01 -- real seconds
local ROUNDS = 16 -- how often what is left behind may leave more behind while it is closed
local LINES = 30

-- What is wrong with a number of seconds that a clock is set to or moved by; nil: nothing.
local function wrong_seconds(value)
  if type(value) ~= "number" then
    return ("number expected, got %s"):format(value == nil and "no value" or type(value))
  elseif not (value >= 0 and value < math.huge) then
    return value < 0 and "seconds must not be negative" or "seconds must be finite"
  end
end

-- Clocks ------------------------------------------------------------------------------------------

---The clock of a test, given to its function.
---@class coflow.testing.Clock
---@field seed? integer under which the test runs
local Clock = { __name = "coflow.testing.Clock" }
Clock.__index = Clock

---The virtual time, in seconds.
---@return number
function Clock.now(_) return core.loop.now() end

---Suspends the calling task until everything else has run that can run now, work in flight included. No time
---passes. Several that settle go on one at a time, the last one first.
function Clock.settle(_) core.await(core.testing.idle()) end

---A clock that moves only when it is told: `testing.run(fn, { time_provider = p })` installs it. Between runs it
---keeps its time.
---@class coflow.testing.FakeTimeProvider
---@field _now number its time while it is not installed
---@field _installed boolean
---@field _advances table[] those under way, by their targets; `turn`: a completion source of one that waits
---@field _leader table? the one of these that moves the clock
---@field _over boolean the function of the test has returned, or raised
local FakeTimeProvider = { __name = "coflow.testing.FakeTimeProvider" }
FakeTimeProvider.__index = FakeTimeProvider

local function check_provider(self)
  if getmetatable(self) ~= FakeTimeProvider then core.refuse_self(FakeTimeProvider, self) end
end

local function check_installed(self, what)
  if not self._installed then
    error(InvalidOperation(("%s: this FakeTimeProvider is not installed: "
      .. "testing.run(fn, { time_provider = p })"):format(what)), 0)
  end
end

---Its time, in seconds.
---@return number
function FakeTimeProvider:now()
  check_provider(self)
  return self._installed and core.loop.now() or self._now
end

---Suspends the calling task until everything else has run that can run now, as `clock:settle()`.
---Raises: InvalidOperation if it is not installed.
function FakeTimeProvider:settle()
  check_provider(self)
  check_installed(self, "settle")
  Clock.settle(self)
end

-- One of the advances under way, the leader, moves the clock, no further than to the first of their targets; the others
-- wait for theirs, or for their turn to lead. Whoever leads and ends, in whatever way, leaves that to the first. So one
-- that has been begun inside another one goes on beyond it as soon as the test waits; and when the test's function has
-- returned no more time passes: those that are under way then end where the clock stands.

local function lead(provider, entry)
  provider._leader = entry
  if entry and entry.turn then entry.turn:try_set_result() end
end

local advancing = {
  __close = function(guard)
    local provider, entry = guard.provider, guard.entry
    local list = provider._advances
    for at = #list, 1, -1 do
      if list[at] == entry then table.remove(list, at) end
    end
    if provider._leader == entry then lead(provider, list[1]) end
  end,
}

local function begin_advance(self, seconds)
  local entry, list = { target = core.loop.now() + seconds }, self._advances
  local at = #list + 1
  while at > 1 and list[at - 1].target > entry.target do at = at - 1 end
  if self._leader then
    entry.turn = core.TaskCompletionSource()
    entry.turn.task.name = "FakeTimeProvider:advance"
  else
    lead(self, entry)
  end
  table.insert(list, at, entry)
  return entry
end

local function advance(self, seconds)
  if self._over then return core.yield() end -- who advances for ever must not keep the test from ending
  local entry = begin_advance(self, seconds)
  local _ <close> = setmetatable({ provider = self, entry = entry }, advancing)
  if entry.turn then core.await(entry.turn.task) end
  while not entry.reached do
    core.await(core.testing.idle(true))
    local first = self._advances[1]
    if entry.reached then
      return
    elseif core.loop.now() < first.target then
      core.testing.step(first.target)
    else
      first.reached = true
      table.remove(self._advances, 1)
      if first ~= entry then first.turn:try_set_result() end
    end
  end
end

-- The test's function has ended.
local function end_advances(provider, ...)
  provider._over = true
  for _, entry in ipairs(provider._advances) do
    entry.reached = true
    if entry.turn then entry.turn:try_set_result() end
  end
  core.testing.release() -- the leader
  return ...
end

---Moves the time on: what is ready runs; then the clock steps to each time at which something is due, up to
---and including the target, and all that becomes ready there runs; then it stands at the target, and settles.
---So whatever runs reads its own due time. Several may be under way, of several tasks or in what another one has woken:
---each returns when the clock stands at its own target, as far from where the clock stood when it was called. One that
---is under way when the test's function returns ends then, and so does one that is begun later.
---Cancellation: the clock stays where it is, or goes on to the targets of others.
---Raises: InvalidOperation if it is not installed, or where it cannot suspend, as in a callback: start a task there.
---Source: .NET FakeTimeProvider.Advance, but that one moves to the target first, and in a callback returns at once.
---@param seconds number >= 0
function FakeTimeProvider:advance(seconds)
  check_provider(self)
  local wrong = wrong_seconds(seconds)
  if wrong then core.argument_error(2, wrong) end
  check_installed(self, "advance")
  core.check_here()
  closing(advance, self, seconds)
end

---A new fake clock, to be installed by `testing.run(fn, { time_provider = p })`.
---Source: .NET FakeTimeProvider; it starts at 0, not in the year 2000.
---@param options? { start_time?: number } seconds, 0 by default
---@return coflow.testing.FakeTimeProvider
function testing.FakeTimeProvider(options)
  options = core.check_options(1, options, { start_time = true })
  local start = options.start_time or 0
  local wrong = wrong_seconds(start)
  if wrong then core.argument_error(1, "start_time: " .. wrong) end
  return setmetatable({ _now = start, _installed = false, _advances = {} }, FakeTimeProvider)
end

-- Running -----------------------------------------------------------------------------------------

-- The seed asked for: an integer, or nil for the order of production.
local function seed_of(seed)
  if seed == nil then
    seed = os.getenv("COFLOW_SEED")
    if seed == nil or seed == "" then return nil end
    local number = math.tointeger(tonumber(seed))
    if not number then error(core.errors.Argument("COFLOW_SEED must be an integer, not " .. seed), 0) end
    return number
  end
  return seed or nil
end

-- Closes what the test has left, and what that leaves in turn; nobody is told of errors that this makes.
local function clean_up()
  for _ = 1, ROUNDS do
    give_up()
    core.testing.settle(true)
    if #left() == 0 and #left_open() == 0 then break end
  end
end

-- What the test has left. What is open says so, too, when it is collected: here, if it is garbage, so that it is told
-- in the same way whenever the collector comes. (But not while there are tasks, which would be reported as abandoned.)
local function all_left()
  local list, open = left(), left_open()
  if #list == 0 and #open > 0 then
    collectgarbage()
    collectgarbage() -- the first one may only finalize what holds others
    core.testing.settle()
    list, open = left(), left_open()
  end
  table.move(open, 1, #open, #list + 1, list)
  local collected = lost()
  return table.move(collected, 1, #collected, #list + 1, list)
end

local function describe_left(list)
  local lines = table.move(list, 1, math.min(#list, LINES), 2, { "the test has left something behind:" })
  if #list > LINES then lines[#lines + 1] = ("… and %d more"):format(#list - LINES) end
  return table.concat(lines, "\n\t")
end

local names = setmetatable({}, { __mode = "k" }) -- of the tests that `it` has been given

-- A failure under a seed is worth nothing without the seed. The error is the caller's own, and stays the same.
local function tell_seed(seed, name)
  io.stderr:write(("coflow.testing: %sfailed under seed %d; the same course again: seed = %d, or COFLOW_SEED=%d\n")
    :format(name and ("'%s' "):format(name) or "", seed, seed, seed))
end

-- The course is the same every time only if the numbers that the test draws are, too; those who draw some later get
-- others than the test's.
local function seed_numbers(seed)
  local later = math.random(0)
  math.randomseed(seed)
  return setmetatable({}, { __close = function() math.randomseed(later) end })
end

local function ended(fn, seed, ok, ...)
  core.testing.settle()
  local err, list = ..., all_left()
  if ok and #list > 0 then
    ok, err = false, InvalidOperation(describe_left(list) .. (seed and ("\n\t(seed %d)"):format(seed) or ""))
  end
  if #list > 0 then clean_up() end
  if ok then return ... end
  core.testing.settle() -- the task of fn may have been collected meanwhile, and is closed then
  if seed then tell_seed(seed, names[fn]) end
  error(err, 0)
end

---@class coflow.testing.Options
---@field seed? integer|false
---@field start_time? number seconds, 0 by default
---@field autojump_threshold? number real seconds, 0.01 by default
---@field time_provider? coflow.testing.FakeTimeProvider

local run_options = { seed = true, start_time = true, autojump_threshold = true, time_provider = true }
local ending = setmetatable({}, { __close = finish })

local function run_under(fn, seed, start, threshold, provider)
  begin(not provider, start, threshold, seed)
  local _ <close> = ending
  local _ <close> = seed and seed_numbers(seed)
  if not provider then return ended(fn, seed, pcall(core.run, fn, setmetatable({ seed = seed }, Clock))) end
  provider._installed, provider._advances, provider._leader, provider._over = true, {}, nil, false
  local _ <close> = setmetatable({}, { __close = function()
    provider._now, provider._installed = core.loop.now(), false
  end })
  return ended(fn, seed, end_advances(provider, pcall(core.run, fn, provider)))
end

---Runs `fn(clock)` as the root task while time is virtual, and returns what it returns. When nothing is ready
---the clock jumps to the next deadline, so nothing ever sleeps. What happens outside has its own time: worker
---jobs, file operations and processes that somebody waits for hold the clock back until they end; sockets, pipes,
---signals, and what files do that are none (FIFOs, terminals), which may wait for ever, until no task became ready for
---`autojump_threshold` real seconds.
---
---`seed`: any task that is ready comes next, and equal deadlines fire in any order, as the seed decides; the same
---seed gives the same course, every time, and `math.random` the same numbers. It is `clock.seed`, and a failure
---writes it to standard error. nil: the order of production, first in, first out, unless the environment has
---COFLOW_SEED; false: that order, whatever the environment has.
---
---`time_provider`: a FakeTimeProvider, which `fn` gets as its clock; then nothing jumps by itself.
---
---Tasks started, timers armed, and what was opened meanwhile, sockets, listeners, watchers of files and other handles,
---must have ended, or have been closed: that the collector does it does not count (but a handler of unobserved
---exceptions, if there is one, is told of a task that is collected while it waits). What is merely ready may still run
---when `fn` returns; then what is left fails the test, and is closed, so that the next one starts clean: tasks
---as if they had been abandoned, their `<close>` variables run.
---Raises: the error of `fn`, first of all. InvalidOperation: what was left, each with its name, where it waits
---and where it was made; or a deadlock; or inside a task, or inside another `testing.run`.
---Source: trio's autojump clock and its checks; the seeds are those of loom and madsim.
---@param fn fun(clock: coflow.testing.Clock | coflow.testing.FakeTimeProvider): ...
---@param options? coflow.testing.Options
---@return any ... what `fn` returns
function testing.run(fn, options)
  core.check_function(1, fn)
  options = core.check_options(2, options, run_options)
  local seed, start, threshold, provider = options.seed, options.start_time, options.autojump_threshold,
    options.time_provider
  if seed and not is_integer(seed) then
    core.argument_error(2, "seed must be an integer, or false")
  elseif start ~= nil and wrong_seconds(start) then
    core.argument_error(2, "start_time: " .. wrong_seconds(start))
  elseif threshold ~= nil and not arguments.is_seconds(threshold) then
    core.argument_error(2, "autojump_threshold must be a number of seconds >= 0")
  elseif provider ~= nil and getmetatable(provider) ~= FakeTimeProvider then
    core.argument_error(2, "time_provider must be a FakeTimeProvider")
  elseif provider and (start or provider._installed) then
    core.argument_error(2, start and "start_time is the time_provider's own" or "time_provider is in use already")
  end
  if core.current_task() then
    error(InvalidOperation("testing.run inside a task: it drives the loop itself, with a clock of its own"), 0)
  end
  seed = seed_of(seed)
  start = start or provider and provider._now or 0
  return closing(run_under, fn, seed, start, threshold or DEFAULT_THRESHOLD, provider)
end

---@class coflow.testing.ExploreOptions
---@field runs? integer 100 by default
---@field seed? integer the first one; by default COFLOW_SEED of the environment, or 1
---@field start_time? number
---@field autojump_threshold? number

local explore_options = { runs = true, seed = true, start_time = true, autojump_threshold = true }

---Runs `fn(clock)` under many seeds, one after the other, as `testing.run` does; ends with the first failure, which
---writes its seed to standard error. So a failure is found again by `testing.run(fn, { seed = … })`.
---@param fn fun(clock: coflow.testing.Clock)
---@param options? coflow.testing.ExploreOptions
function testing.explore(fn, options)
  core.check_function(1, fn)
  options = core.check_options(2, options, explore_options)
  local runs, first = options.runs or 100, options.seed or seed_of(nil) or 1
  if not is_integer(runs, 1) then
    core.argument_error(2, "runs must be an integer > 0")
  elseif not is_integer(first) then
    core.argument_error(2, "seed must be an integer")
  end
  first = math.tointeger(first)
  for run = 0, runs - 1 do
    local seed = first + run -- after the last integer comes the first
    testing.run(fn, { seed = seed, start_time = options.start_time, autojump_threshold = options.autojump_threshold })
  end
end

local it_options = { runs = true, seed = true, start_time = true, autojump_threshold = true, time_provider = true }

---busted's `it` whose function runs under `testing.run`: `local it = require("coflow.testing").it` above the
---blocks is all that changes. The test framework is found when it is called: a global `it`, or busted's.
---Raises: InvalidOperation where there is none.
---@param name string
---@param options? table those of `testing.run`; with `runs`, those of `testing.explore`, which then runs it
---@param fn fun(clock: coflow.testing.Clock)
---@overload fun(name: string, fn: fun(clock: coflow.testing.Clock))
function testing.it(name, options, fn)
  if fn == nil then options, fn = nil, options end
  core.check_function(options == nil and 2 or 3, fn)
  local run = options and options.runs and testing.explore or testing.run
  core.check_options(2, options, run == testing.run and it_options or explore_options)
  if options and options.runs == false then core.argument_error(2, "runs must be an integer > 0") end
  local it = rawget(_G, "it")
  if it == nil and package.loaded.busted then it = package.loaded.busted.it end
  if it == nil then
    error(InvalidOperation("testing.it: there is no `it` here: it works in a spec that busted runs"), 0)
  end
  names[fn] = name
  return it(name, function() run(fn, options) end) -- a tail call: busted looks at who called
end

return testing
