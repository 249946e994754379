-- coflow.stream: async streams, lazy and pull-based: nothing runs until somebody asks for an item.
--
-- A stream is a recipe: a function open(run) that gives, for one iteration, two functions:
--
--   next()   the next item: a value that is not nil, or two; nil at the end. May suspend and may raise.
--   close()  ends what next has begun, upstream first come last; nil where there is nothing to end.
--            May suspend where the caller may, and may raise, after all is closed.
--
-- `run` is what all of its streams know of that iteration: `token`, which it was given, or nil, and `closed`, which
-- becomes true before the first close is called. That may happen during a call of next, from another task. So what
-- begins something, a source or a pump, looks at it first: once it is true, next gives nil.
--
-- What they may rely on: nobody calls next after it has given nil or raised, nor while a call of it is under way;
-- close is called once, also after the end. The Iteration on the outside (stream/iteration.lua) sees
-- to that. Items come from stream/source.lua, go through stream/operators.lua, some of them with a task for each
-- source (stream/pump.lua), and end here.
--
-- An error that a pull raises, a cancellation too, ends the iteration, and closes everything upstream.
--
-- Source: IAsyncEnumerable of C#, and its LINQ; the names are those of Lua's libraries for iterators.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local arguments = require "coflow.arguments"
local closing = require "coflow.closing"
local iteration = require "coflow.stream.iteration"
local source = require "coflow.stream.source"
require "coflow.stream.operators"

local Stream, check, check_token = iteration.Stream, iteration.check, arguments.check_token
local iterate, pack = iteration.iterate, iteration.pack

local function check_to_table(self, token)
  check(self)
  check_token(2, token)
end

---All items, as a list. One of two values is a list of these.
---@param token? coflow.CancellationToken
---@return any[]
function Stream:to_table(token)
  check_to_table(self, token)
  local list, n = {}, 0
  for value, second in iterate(self, token) do
    n = n + 1
    list[n] = pack(value, second)
  end
  return list
end

Stream.to_table_async = arguments.twin(Stream.to_table, check_to_table)

local function check_reduce(self, fn, _, token)
  check(self)
  core.check_function(2, fn)
  check_token(4, token)
end

local function reduce(self, fn, initial, token)
  local result, empty = initial, initial == nil
  for value, second in iterate(self, token) do
    if empty then
      result, empty = pack(value, second), false
    elseif second == nil then
      result = fn(result, value)
    else
      result = fn(result, value, second)
    end
  end
  return empty, result
end

---`fn(…fn(fn(initial, item1), item2)…)`. Without `initial` (nil) the first item takes its place.
---Raises: InvalidOperation if there is neither an initial value nor an item.
---@param fn fun(accumulated: any, item: any, second: any): any
---@param initial any
---@param token? coflow.CancellationToken
---@return any
function Stream:reduce(fn, initial, token)
  check_reduce(self, fn, initial, token)
  local empty, result = closing(reduce, self, fn, initial, token)
  if empty then error(core.errors.InvalidOperation("reduce: no items, and no initial value"), 2) end
  return result
end

Stream.reduce_async = arguments.twin(Stream.reduce, check_reduce)

local function check_for_each(self, fn, token)
  check(self)
  core.check_function(2, fn)
  check_token(3, token)
end

local function for_each(self, fn, token)
  for value, second in iterate(self, token) do
    if second == nil then fn(value) else fn(value, second) end
  end
end

---Calls `fn(item)` for each item, one after the other; `fn(item, second)` for one of two values.
---@param fn fun(item: any, second: any)
---@param token? coflow.CancellationToken for the items; `fn` is not under it
function Stream:for_each(fn, token)
  check_for_each(self, fn, token)
  closing(for_each, self, fn, token)
end

Stream.for_each_async = arguments.twin(Stream.for_each, check_for_each)

return { new = source.new, from = source.from }
