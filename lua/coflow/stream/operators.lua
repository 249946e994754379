-- coflow.stream.operators: streams made of streams.
--
-- Most are a function around the source's `next`: they cost a call, no task and no coroutine. They run on the
-- consumer's task, and what they do to its async locals is the consumer's affair. `operator` says once what these
-- have in common. Those that read ahead, buffer and merge, have a task for each source (pump.lua).
--
-- Source: LINQ for IAsyncEnumerable; the names are those of Lua's libraries for iterators.
-- SPDX-License-Identifier: MIT

local arguments = require "coflow.arguments"
local core = require "coflow.core"
local iteration = require "coflow.stream.iteration"
local gather = require "coflow.stream.pump"
local source = require "coflow.stream.source"

local now, sleep = core.loop.now, core.sleep
local Stream, new_stream, check, pack = iteration.Stream, iteration.new, iteration.check, iteration.pack
local in_turn, within = iteration.in_turn, iteration.within
local as_stream, check_stream = source.as_stream, source.check_stream

-- Makes a method of one argument. `check_argument` gives it, or raises; nil: the stream stays as it is.
--
-- `step(next, argument, run)` gives, for one iteration of the source, what takes the place of its `next`; and, if it
-- has something of its own to close, a function that does, called before the source's `close`.
---@return fun(self: coflow.Stream, argument: any): coflow.Stream
local function operator(check_argument, step)
  return function(self, argument)
    check(self)
    argument = check_argument(argument)
    if argument == nil then return self end
    local open = self._open
    return new_stream(function(run)
      local next, close = open(run)
      local pull, close_own = step(next, argument, run)
      return pull, in_turn(close_own, close)
    end)
  end
end

-- Arguments ---------------------------------------------------------------------------------------

local function callable(fn)
  core.check_function(2, fn)
  return fn
end

local function at_least(least)
  return function(n)
    if not arguments.is_integer(n, least) then core.argument_error(2, "integer >= " .. least .. " expected") end
    return math.tointeger(n)
  end
end

local natural, positive = at_least(0), at_least(1)

local function seconds(value)
  if math.type(value) == nil then
    core.argument_error(2, "number expected, got " .. (value == nil and "no value" or type(value)))
  elseif value < 0 or value ~= value then
    core.argument_error(2, value < 0 and "seconds must not be negative" or "seconds must not be NaN")
  end
  return value
end

local function finite_seconds(value)
  if seconds(value) == math.huge then core.argument_error(2, "seconds must be finite") end
  return value
end

-- nil: no limit
local function limit(value)
  if value ~= nil and seconds(value) < math.huge then return value end
end

local function other_stream(value) return check_stream(2, value) end

-- Items -------------------------------------------------------------------------------------------
--
-- A function gets the second value only where there is one: `print` counts its arguments, `math.max` minds nil.

-- " (defined at FILE:LINE)" of a function
local function place_of(fn)
  local info = type(fn) == "function" and debug.getinfo(fn, "S")
  if not info or info.what == "C" then return "" end
  return (" (defined at %s:%d)"):format(info.short_src, info.linedefined)
end

---Each item replaced by what `fn` returns for it: its first value, which must not be nil.
---@param fn fun(item: any, second: any): any
---@return coflow.Stream
Stream.map = operator(callable, function(next, fn)
  return function()
    local value, second = next()
    if value == nil then return nil end
    local mapped
    if second == nil then mapped = fn(value) else mapped = fn(value, second) end
    if mapped == nil then
      error(("bad argument #1 to 'map' (its function%s returned nil, which is not an item: filter leaves items out)")
        :format(place_of(fn)), 0)
    end
    return mapped
  end
end)

---The items for which `fn` returns a true value.
---@param fn fun(item: any, second: any): any
---@return coflow.Stream
Stream.filter = operator(callable, function(next, fn)
  return function()
    while true do
      local value, second = next()
      if second == nil then
        if value == nil or fn(value) then return value end
      elseif fn(value, second) then
        return value, second
      end
    end
  end
end)

---The first `n` items. No more is asked of the source.
---@param n integer
---@return coflow.Stream
Stream.take = operator(natural, function(next, n)
  local taken = 0
  return function()
    if taken >= n then return nil end
    taken = taken + 1
    return next()
  end
end)

---All but the first `n` items.
---@param n integer
---@return coflow.Stream
Stream.skip = operator(natural, function(next, n)
  local skipped = 0
  return function()
    while skipped < n do
      skipped = skipped + 1
      if next() == nil then return nil end
    end
    return next()
  end
end)

---Lists of `n` items each; the last one may be shorter.
---@param n integer
---@return coflow.Stream
Stream.chunk = operator(positive, function(next, n)
  local ended = false
  return function()
    if ended then return nil end
    local list = {}
    for i = 1, n do
      local value, second = next()
      if value == nil then
        ended = true
        if i == 1 then return nil end
        break
      end
      list[i] = pack(value, second)
    end
    return list
  end
end)

-- More streams ------------------------------------------------------------------------------------

---The items of what `fn` returns for each item (whatever `stream.from` takes), one after the other.
---@param fn fun(item: any, second: any): table|function|coflow.Stream
---@return coflow.Stream
Stream.flat_map = operator(callable, function(next, fn, run)
  local inner, close_inner
  local function leave()
    local leaving = close_inner
    inner, close_inner = nil, nil
    if leaving then leaving() end
  end
  return function()
    while true do
      if inner then
        local value, second = inner()
        if value ~= nil then return value, second end
        leave()
      end
      local value, second = next()
      if value == nil then return nil end
      local made, wrong
      if second == nil then made, wrong = as_stream(fn(value)) else made, wrong = as_stream(fn(value, second)) end
      if wrong then error("bad argument #1 to 'flat_map' (its function: " .. wrong .. ")", 0) end
      inner, close_inner = made._open(run)
      if run.closed then -- meanwhile: it may have something to close
        leave()
        return nil
      end
    end
  end, leave
end)

---Items of two values: one from this stream and one from the other, until either ends. An item of two values on
---either side becomes a list.
---@param other table|function|coflow.Stream|coflow.Channel whatever `stream.from` takes
---@return coflow.Stream
Stream.zip = operator(other_stream, function(next, other, run)
  local next_other, close_other = other._open(run)
  return function()
    local a, a2 = next()
    if a == nil then return nil end
    local b, b2 = next_other()
    if b == nil then return nil end
    return pack(a, a2), pack(b, b2)
  end, close_other
end)

-- Time --------------------------------------------------------------------------------------------

local function under_timeout(duration, fn)
  local _ <close> = core.open_timeout(duration, fn)
  local value, second = fn()
  return value, second
end

---The same items, each of which must come within `seconds` of being asked for. What the consumer does in
---between does not count.
---Raises: Timeout, while iterating. 0 asks for no item at all.
---@param seconds number? nil or math.huge: no limit
---@return coflow.Stream
Stream.timeout = operator(limit, function(next, duration)
  return within(under_timeout, duration, next)
end)

---The same items, at most one every `seconds`: one that comes sooner is held back, none is dropped. One that is held
---back when the iteration is canceled goes with it.
---@param seconds number
---@return coflow.Stream
Stream.throttle = operator(finite_seconds, function(next, interval)
  local due = -math.huge
  return function()
    local value, second = next()
    if value == nil then return nil end
    local wait = due - now()
    if wait > 0 then sleep(wait) end
    due = now() + interval
    return value, second
  end
end)

-- Reading ahead -----------------------------------------------------------------------------------

---The same items, of which up to `n` are read ahead, by a task of the iteration, from the first pull on.
---Items that were read ahead of an error come before it. Those that are left when the iteration is, are dropped.
---@param n integer
---@return coflow.Stream
function Stream:buffer(n)
  check(self)
  n = positive(n)
  return new_stream(function(run) return gather({ self }, n, "stream buffer", run) end)
end

---The items of this stream and the others, in the order in which they arrive: each source has a task of the
---iteration, which goes on when its item has been taken. The first error ends all.
---@param other table|function|coflow.Stream|coflow.Channel whatever `stream.from` takes
---@return coflow.Stream
function Stream:merge(other, ...)
  check(self)
  local others = table.pack(other, ...)
  local streams = { self }
  for i = 1, math.max(others.n, 1) do
    streams[i + 1] = check_stream(i + 1, others[i])
  end
  return new_stream(function(run) return gather(streams, 1, "stream merge", run) end)
end
