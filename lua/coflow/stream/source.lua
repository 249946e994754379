-- coflow.stream.source: where the items of a stream come from: a producer function, a list, an iterator, a channel.
--
-- A producer function (stream.new) runs in a coroutine of coflow.coroutine, in a context of its own; its awaits are
-- those of the task that pulls. It is closed by an error that `emit` raises in it, an OperationCanceled of the
-- producer's token, so that its `<close>` variables run as they do in any function, and may wait.
--
-- Source: the async iterators of C#.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local iteration = require "coflow.stream.iteration"

local coroutine, errors, is_callable = core.coroutine, core.errors, core.is_callable
local is_error = errors.is
local yield, running, status = coroutine.yield, coroutine.running, coroutine.status
local isyieldable = coroutine.isyieldable
local deferred, is_stream, new_stream = iteration.deferred, iteration.is_stream, iteration.new

-- Producers ---------------------------------------------------------------------------------------

local REFUSALS = 100 -- how often a producer that is being closed may go on and emit
local STUCK = {}

local function new_source(token)
  local ambient = core.cancellation_token()
  if token == nil then return core.linked_source(ambient) end
  return core.linked_source(token, ambient)
end

local function open_producer(fn, run)
  local source, own, thread -- nil before the first pull; own: the source's token
  local closing, refusals = false, 0

  local function emit(value, second, third)
    if value == nil then
      core.argument_error(1, "nil is not an item")
    elseif third ~= nil then
      core.argument_error(3, "an item is one or two values")
    elseif running() ~= thread then
      error(errors.InvalidOperation("emit can only be called by the producer function itself, not from another task, "
        .. "coroutine or callback, nor after its end"), 2)
    end
    if not isyieldable() then core.check_here() end -- raises: in a callback of C, say
    if not closing and not yield(value, second) then return end
    refusals = refusals + 1
    if refusals > REFUSALS then yield(STUCK) end -- for good
    own:throw_if_cancellation_requested()
  end

  local resume = coroutine.generator(function()
    thread = running()
    fn(emit, own)
  end)

  -- The producer stands in emit, which raises when it goes on.
  local function unwind()
    local ok, result = pcall(resume, true)
    if ok and result == STUCK then ok, result = coroutine.close(thread) end
    if ok or is_error(result, "OperationCanceled") and result.token == own then return end
    error(result, 0)
  end

  local function next()
    if run.closed then return nil end
    if not source then
      source = new_source(run.token)
      own = source.token
    end
    return resume()
  end

  local function close()
    if not source then return end
    if not thread or status(thread) == "dead" then
      source:dispose()
      return
    end
    closing = true
    local idle = status(thread) == "suspended" -- else somebody waits in it, and gets the error
    do
      local guard <close> = setmetatable({ idle and unwind }, deferred)
      source:cancel("the iteration was closed")
      guard[1] = nil
    end
    source:dispose()
    if idle then unwind() end
  end

  return next, close
end

---A stream of what `fn` emits. Each iteration calls `fn` anew, when its first item is asked for: it goes on to
---`emit(item)`, which returns when the next item is asked for. It runs in the execution context in which the iteration
---started; what it writes there is kept from item to item, and never seen outside. An item is any value but nil,
---or two values; a third one is refused.
---
---When the iteration is left early `token` is canceled, and then `emit` raises its OperationCanceled, so that `<close>`
---variables run; they may wait. A producer that catches it and emits again gets it again, and after a hundred
---times is closed where it stands.
---Cancellation: what `fn` waits for ends with the ambient token of whoever asks for the item, and with the token given
---to `iterate`. `token` is canceled with either.
---Source: C#'s async iterators; but there a producer's writes are gone after each item.
---@param fn fun(emit: fun(item: any, second: any), token: coflow.CancellationToken)
---@return coflow.Stream
local function new(fn)
  core.check_function(1, fn)
  return new_stream(function(run) return open_producer(fn, run) end)
end

-- What is there already ---------------------------------------------------------------------------

-- How many elements a list has.
local function count(list) return math.tointeger(rawget(list, "n")) or #list end

local function open_list(list, run)
  local i = 0
  return function()
    if run.closed then return nil end
    local n = count(list) -- now: a list may grow
    if i >= n then return nil end
    i = i + 1
    local value = list[i]
    if value == nil then
      error(errors.InvalidOperation(("nil is not an item: element %d of the list of %d is nil"):format(i, n)), 0)
    end
    return value
  end
end

local function close_value(value)
  local _ <close> = value
end

local function returned(ok, ...)
  if ok then return ... end
  error((...), 0)
end

-- If a function of C is no iterator, or not of that state, its first call says so with the line of whoever calls it,
-- which would be ours; pcall has none.
local function call_first(fn, state, control)
  if type(fn) ~= "function" or debug.getinfo(fn, "S").what ~= "C" then return fn(state, control) end
  return returned(pcall(fn, state, control))
end

local function open_iterator(run, fn, state, control, closing)
  local call
  local function first() -- only this one is looked at: the others are to cost nothing
    call = fn
    local value, second, third = call_first(fn, state, control)
    if value ~= nil and third ~= nil then
      error(errors.InvalidOperation("an item is one or two values: the iterator gave a third one"), 0)
    end
    return value, second
  end
  call = first
  return function()
    if run.closed then return nil end
    local value, second = call(state, control)
    control = value
    return value, second
  end, closing ~= nil and function() close_value(closing) end or nil
end

-- What has a method `iterate`.
local function open_iterable(source, run)
  local next, close
  local left = false
  return function()
    if run.closed then return nil end
    if not next then
      next, close = open_iterator(run, source:iterate(run.token))
      if left and close then close() end -- meanwhile
    end
    return next()
  end, function()
    left = true
    if close then close() end
  end
end

local function has_iterate(source)
  if type(source) ~= "table" and type(source) ~= "userdata" then return false end
  local ok, method = pcall(function() return source.iterate end)
  return ok and method ~= nil and is_callable(method)
end

-- Whether `from` takes it for a list: a table that is nothing else.
local function is_list(source)
  return type(source) == "table" and not (is_stream(source) or has_iterate(source) or is_callable(source))
end

-- The stream of what `from` takes, or nil and what is wrong.
local function as_stream(source, state, control, closing)
  if is_stream(source) then
    return source
  elseif has_iterate(source) then
    return new_stream(function(run) return open_iterable(source, run) end)
  elseif source ~= nil and is_callable(source) then
    local meta = getmetatable(source)
    if closing == nil and type(meta) == "table" and meta.__close then closing = source end
    return new_stream(function(run) return open_iterator(run, source, state, control, closing) end)
  elseif is_list(source) then
    return new_stream(function(run) return open_list(source, run) end)
  end
  return nil, "list, iterator, stream or channel expected, got " .. (source == nil and "no value" or type(source))
end

-- … or, for a public function, blames its argument n.
local function check_stream(n, ...)
  local made, wrong = as_stream(...)
  if wrong then core.argument_error(n, wrong) end
  return made
end

---A stream of the elements of a list, or of what an iterator gives, or of the items of a channel: of anything that has
---a method `iterate`. Of an iterator it takes what `for` takes (`stream.from(pairs(t))`: keys and values), the
---to-be-closed value too; two values are one item. Where that state is used up, a second iteration finds nothing.
---A list has as many elements as its `n` says, or else `#list`.
---Raises: InvalidOperation, when it comes to it, for an element of a list that is nil, or an iterator whose
---first item is of three values.
---@param source table|function|coflow.Stream|coflow.Channel
---@return coflow.Stream
local function from(source, state, control, closing)
  return (check_stream(1, source, state, control, closing)) -- no tail call: this is the function to be blamed
end

return { new = new, from = from, is_list = is_list, count = count, as_stream = as_stream, check_stream = check_stream }
