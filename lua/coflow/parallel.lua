-- coflow.parallel: a function for each of many items, some at the same time: for_each and map.
--
-- The calling task takes the items, one by one, and starts a child of a task group for each, when fewer than the
-- degree are running. So the source is used by one task only, as an ordinary loop uses it, and nothing is kept
-- of an item before its turn or after its end. The source is left, and closed, before the children are awaited.
--
-- Source: .NET Parallel.ForEachAsync; its errors and its cancellation are those of flow.task_group.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local arguments = require "coflow.arguments"
local closing = require "coflow.closing"
local iteration = require "coflow.stream.iteration"
local sources = require "coflow.stream.source"
local task_group = require("coflow.group").task_group

local new_run, pack = iteration.new_run, iteration.pack
local NONE = core.take("none", {}).none
local DEGREE = 16

local deferred = { __close = function(guard) guard[1]() end }

-- An external cancellation beats whatever comes out, with the token that was given, or else the ambient one.
local external = { __close = function(given) core.throw_if_canceled(given[1]) end }

local function isolated(fn, ...)
  local _ <close> = core.isolate()
  return fn(...)
end

-- A child: one item. What has been taken is handed to fn, also when the loop has been canceled meanwhile, or it
-- would be lost: it could come from a channel.
local function run_item(loop, index, item)
  local _ <close> = loop.leaving
  local result
  if loop.on_progress then result = isolated(loop.fn, item, loop.token) else result = loop.fn(item, loop.token) end
  if loop.results then loop.results[index] = result end
  loop.done = loop.done + 1
  if loop.on_progress then loop.on_progress(loop.done, loop.total) end
end

local function leave(loop)
  loop.running = loop.running - 1
  if not loop.waiting then return end
  loop.waiting = false
  loop.news:try_write(true)
end

local leaving = { __close = function(guard) leave(guard[1]) end }

-- Waits for a free slot; no item is taken, not even a first one, when the loop has been canceled.
local function wait_for_slot(loop)
  while loop.running >= loop.degree do
    loop.waiting = true
    loop.news:read()
  end
  core.throw_if_canceled()
end

local function start(loop, item)
  loop.count = loop.count + 1
  loop.running = loop.running + 1
  loop.group:spawn(run_item, loop, loop.count, item)
end

local function take_list(loop, list)
  for i = 1, loop.total do
    wait_for_slot(loop)
    start(loop, list[i])
  end
end

local function take_stream(loop, source)
  local source_run = new_run(loop.token)
  local next, close = source._open(source_run)
  local _ <close> = setmetatable({ function()
    source_run.closed = true
    if close then close() end
  end }, deferred)
  while true do
    wait_for_slot(loop)
    local value, second = next()
    if value == nil then return end
    start(loop, pack(value, second))
  end
end

local function run(loop, items, source, token)
  local _ <close> = setmetatable({ token }, external)
  local _ <close> = token == NONE and core.open_shield() or token and core.open_linked(token, loop.fn) or nil
  task_group(function(group)
    loop.group, loop.token = group, group.token
    if source then take_stream(loop, source) else take_list(loop, items) end
  end)
  return loop
end

-- Outside every task the loop is a task of its own, where there can be one.
local function drive(loop, ...)
  if core.current_task() then return closing(run, loop, ...) end
  return core.run(run, loop, ...)
end

local known_options = { max_degree_of_parallelism = true, token = true, on_progress = true }

-- The options, or nil and what is wrong with them.
local function wrong_options(options)
  local degree, token, on_progress = options.max_degree_of_parallelism, options.token, options.on_progress
  if degree ~= nil and degree ~= -1 and not arguments.is_count(degree, 1) then
    return "max_degree_of_parallelism must be a positive integer"
  end
  if token ~= nil and not core.is_token(token) then return "token must be a CancellationToken" end
  if on_progress ~= nil and not core.is_callable(on_progress) then return "on_progress must be a function" end
end

local function new_loop(fn, options, total)
  local degree = options.max_degree_of_parallelism or DEGREE
  local loop = {
    fn = fn,
    degree = degree == -1 and DEGREE or degree,
    on_progress = options.on_progress,
    total = total,
    running = 0,
    news = core.channel_new(), -- that a slot is free, for the calling task if it is waiting
    waiting = false,
    count = 0,
    done = 0,
  }
  loop.leaving = setmetatable({ loop }, leaving)
  return loop
end

-- What both functions take: a stream of the items, or nil where they are a list, and its length.
local function source_of(items)
  if sources.is_list(items) then return nil, sources.count(items) end
  local made, wrong = sources.as_stream(items)
  return made, nil, wrong
end

---@class coflow.ParallelOptions
---@field max_degree_of_parallelism? integer items at the same time; 16 if nil or -1
---@field token? coflow.CancellationToken
---@field on_progress? fun(done: integer, total: integer?) called when an item has been dealt with, on its task, in the
---context of the call; `total` is known for lists

-- options, fn, its number, the token behind it, and its number; the options may be left out
local function sort_arguments(options, fn, token)
  if options == nil or not core.is_callable(options) then return options, fn, 3, token, 4 end
  if core.is_token(fn) then return nil, options, 2, fn, 3 end
  if fn == nil then return nil, options, 2, token, 4 end
  if type(fn) == "table" and not core.is_callable(fn) then
    core.argument_error(2, "table of options expected, got function: options come before the function")
  end
  return options, fn, 3, token, 4
end

-- The function, the source and the length as above, the options, and the token; raises what is wrong with the
-- arguments.
local function check_arguments(items, options, fn, token)
  local place, token_place
  options, fn, place, token, token_place = sort_arguments(options, fn, token)
  local source, total, wrong = source_of(items)
  if wrong then core.argument_error(1, wrong) end
  options = core.check_options(2, options, known_options)
  wrong = wrong_options(options)
  if wrong then core.argument_error(2, wrong) end
  core.check_function(place, fn)
  arguments.check_token(token_place, token)
  return fn, source, total, options, options.token or token
end

local parallel = {}

---Calls `fn(item, token)` once for each item, several at the same time, each as a task with a context of its own.
---An item is taken when there is room for it, by the calling task. An item of two values becomes a list.
---
---The first failure (of `fn`, of `on_progress`, of the source) cancels `token`, the ambient one of all of them, and no
---further item is taken. Returns, or raises, when all have ended and the source is closed. As in a task group, a
---call of `fn` that ends canceled has not failed.
---Cancellation: `options.token`, or `token`, or the ambient one; it wins over errors. Canceled before: the source is
---not touched.
---Raises: the one error as it is, or an Aggregate when several failed on their own.
---Source: .NET Parallel.ForEachAsync; its default degree is the number of processors.
---@param items table|function|coflow.Stream|coflow.Channel a list (`n` counts), an iterator, a stream or a channel
---@param options? coflow.ParallelOptions may be left out
---@param fn fun(item: any, token: coflow.CancellationToken)
---@param token? coflow.CancellationToken where options.token is nil
function parallel.for_each(items, options, fn, token)
  local source, total
  fn, source, total, options, token = check_arguments(items, options, fn, token)
  drive(new_loop(fn, options, total), items, source, token)
end

---As `for_each`; returns the first values that `fn` returned, in the order of the items.
---@param items table|function|coflow.Stream|coflow.Channel
---@param options? coflow.ParallelOptions may be left out
---@param fn fun(item: any, token: coflow.CancellationToken): any
---@param token? coflow.CancellationToken
---@return { n?: integer, [integer]: any } results nil for an item whose call ended canceled; `n`, their number, only
---where a nil is among them
function parallel.map(items, options, fn, token)
  local source, total
  fn, source, total, options, token = check_arguments(items, options, fn, token)
  local loop = new_loop(fn, options, total)
  loop.results = {}
  drive(loop, items, source, token)
  return core.mark_count(loop.results, loop.count)
end

parallel.for_each_async = arguments.twin(parallel.for_each, check_arguments)
parallel.map_async = arguments.twin(parallel.map, check_arguments)

return parallel
