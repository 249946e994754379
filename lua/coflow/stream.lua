-- coflow.stream: async streams, lazy and pull-based: nothing runs until somebody asks for an item.
--
-- A stream is a recipe: a function open(token) that gives, for one iteration, two functions:
--
--   next()   the next item: a value that is not nil, or two; nil at the end. May suspend and may raise.
--   close()  ends what next has begun, upstream first come last; nil where there is nothing to end.
--            May suspend where the caller may, and may raise, after all is closed.
--
-- What they may rely on: nobody calls next after it has given nil or raised, nor after close, nor while a call of
-- it is under way; close is called once, also after the end. The Iteration on the outside sees to that. So most
-- operators are a function around the source's next: they cost a call, no task and no coroutine. They run
-- on the consumer's task, and what they do to its async locals is the consumer's affair.
--
-- A producer function (stream.new) runs in a coroutine of coflow.coroutine, in a context of its own; its awaits are
-- those of the task that pulls. It is closed by an error that `emit` raises in it, an OperationCanceled of the
-- producer's token, so that its `<close>` variables run as they do in any function, and may wait.
--
-- What reads ahead (buffer, merge) has a task for each source. These are *pumps*: made when the iteration is, so that
-- the context is that of that moment; started at the first pull, under the ambient token of whoever makes it;
-- canceled and awaited at the end.
--
-- An error that a pull raises, a cancellation too, ends the iteration, and closes everything upstream.
--
-- Source: IAsyncEnumerable of C#, and its LINQ; the names are those of Lua's libraries for iterators.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local coroutine = core.coroutine

local await, current_task, now = core.await, core.current_task, core.loop.now
local errors, is_callable, is_token = core.errors, core.is_callable, core.is_token
local is_error = errors.is
local yield, running, status = coroutine.yield, coroutine.running, coroutine.status
local NONE = core.take("none", {}).none

---@class coflow.Stream
---@field _open fun(token?: coflow.CancellationToken): function, function?
local Stream = {}
local class = { __index = Stream, __name = "coflow.Stream" }

-- Closing ------------------------------------------------------------------------------------------

-- setmetatable({ fn }, deferred): calls fn at the end of the block, whatever happens before.
local deferred = {}
function deferred.__close(guard)
  local fn = guard[1]
  if fn then fn() end
end

local function close_value(value)
  local _ <close> = value
end

-- One function that calls both, the second one also when the first one raises. (Only then from within `__close`,
-- which costs one of the C calls that Lua can nest: streams may be nested more deeply.)
local function in_turn(first, second)
  if not (first and second) then return first or second end
  return function()
    do
      local guard <close> = setmetatable({ second }, deferred)
      first()
      guard[1] = nil
    end
    return second()
  end
end

-- Calls fn out of reach of the ambient token.
local function shielded(fn, ...)
  local _ <close> = current_task() and core.open_shield() or nil
  return fn(...)
end

-- Scopes around a pull -----------------------------------------------------------------------------

-- An error of the token that was given goes out with that token, not with that of our scope.
local renaming = {}
function renaming.__close(given, err)
  local token = given[1]
  if err == nil or token == NONE or not token.is_cancellation_requested then return end
  if not is_error(err, "OperationCanceled") or err.token == token then return end
  local _, own = pcall(token.throw_if_cancellation_requested, token)
  if err.token == core.cancellation_token() or err.cause == own.cause then error(own, 0) end
end

-- Calls fn with the ambient token linked to `token`; `none` hides it. Under a token that is canceled already it is
-- called too: it is interrupted where it waits, as always.
local function under_token(token, fn)
  local canceled = token.is_cancellation_requested and core.call_source()
  local _ <close> = token == NONE and core.open_shield()
    or core.open_linked(canceled and canceled.token or token, fn)
  local _ <close> = setmetatable({ token }, renaming)
  if canceled then canceled:cancel(token.reason) end
  local value, second = fn()
  return value, second
end

local function under_timeout(seconds, fn)
  local _ <close> = core.open_timeout(seconds, fn)
  local value, second = fn()
  return value, second
end

-- `next` within such a scope; there are none outside of tasks, so there each pull is a task.
local function within(scope, argument, next)
  return function()
    if current_task() then return scope(argument, next) end
    return await(core.spawn(scope, argument, next))
  end
end

-- Iterations ---------------------------------------------------------------------------------------

---One run over a stream: what `for` calls. Called by hand it gives the next item; nil at the end, after an error,
---and when it has been closed. A to-be-closed value.
---@class coflow.StreamIteration
local Iteration = {}
local iteration = { __index = Iteration, __name = "coflow.StreamIteration" }

-- _open: not closed yet. _busy: nil before the first pull, true during one. _guard: closed at the end of each pull.

local function finish(it)
  it._open = false
  local close = it._close
  it._close = nil
  if close then close() end
end

-- One for all pulls of an iteration, and for no other: a pull during a pull is refused before.
local pulling = {}
function pulling.__close(guard)
  local it = guard[1]
  if not it._busy then return end
  it._busy = false -- it was left by an error
  if it._open then finish(it) end
end

function iteration.__call(it)
  local busy = it._busy
  if not it._open then
    return nil
  elseif busy then
    error(errors.InvalidOperation("the iteration is in use: its next item has been asked for already"), 2)
  elseif busy == nil then
    core.throw_if_canceled(it._token)
  end
  it._busy = true
  local _ <close> = it._guard
  local value, second = it._next()
  it._busy = false
  if value == nil and it._open then finish(it) end
  return value, second
end

function iteration.__close(it)
  if it._open then finish(it) end
end

local function close_later(close)
  core.current_task().name = "closing a forgotten stream"
  close()
end

-- Forgotten unfinished: closed on a later turn, by a task that has nobody's context or token.
function iteration.__gc(it)
  if not it._open or it._busy == nil or not it._close then return end
  it._open = false
  local _ <close> = core.suppress_flow()
  core.spawn(close_later, it._close)
end

---Ends the iteration and closes its producers. Twice is harmless. May suspend.
---Raises: what a `<close>` variable raises. InvalidOperation while another task waits for the next item.
function Iteration:dispose()
  if getmetatable(self) ~= iteration then
    error("calling 'dispose' on bad self (coflow.StreamIteration expected, got " .. type(self) .. ")", 2)
  end
  if not self._open then return end
  if self._busy then
    error(errors.InvalidOperation("the iteration is in use: somebody waits for its next item"), 2)
  end
  finish(self)
end

local function check(self, name)
  if getmetatable(self) ~= class then
    error(("calling '%s' on bad self (coflow.Stream expected, got %s)"):format(name, type(self)), 3)
  end
end

local function wrong_token(token)
  if token ~= nil and not is_token(token) then
    return "CancellationToken expected, got " .. type(token)
  end
end

local function iterate(self, token)
  local next, close = self._open(token)
  if token ~= nil then next = within(under_token, token, next) end
  local it = setmetatable({ _next = next, _close = close, _open = true, _token = token, _guard = false }, iteration)
  it._guard = setmetatable({ it }, pulling)
  return it, it, nil, it
end

---`for item in stream:iterate() do`: runs over the items; each call starts afresh. Leaving the loop, however, closes
---the producers: their `<close>` variables have run when it is left. The first value alone is the iteration:
---`local it <close> = stream:iterate()`, then `it()` is the next item, and `it:dispose()` ends it.
---Nothing runs before the first item is asked for.
---Cancellation: a token canceled before the first item starts nothing; later `token`, as the ambient one, ends the
---iteration where a producer waits. One that never waits is told by its own token only.
---Raises: what a producer raises, as it is. InvalidOperation if two tasks ask at the same time.
---Source: C#'s await foreach and WithCancellation.
---@param token? coflow.CancellationToken
---@return coflow.StreamIteration
function Stream:iterate(token)
  check(self, "iterate")
  local wrong = wrong_token(token)
  if wrong then core.argument_error(2, wrong) end
  return iterate(self, token)
end

local function new_stream(open) return setmetatable({ _open = open }, class) end

-- Sources ------------------------------------------------------------------------------------------

local REFUSALS = 100 -- how often a producer that is being closed may go on and emit
local STUCK = {}

local function new_source(token)
  local ambient = core.cancellation_token()
  if token == nil then return core.linked_source(ambient) end
  return core.linked_source(token, ambient)
end

local function open_producer(fn, token)
  local source, own, thread -- nil before the first pull; own: the source's token
  local closing, refusals = false, 0

  local function emit(value, second)
    if value == nil then
      core.argument_error(1, "nil is not an item")
    elseif running() ~= thread then
      error(errors.InvalidOperation("emit can only be called by the producer function itself, not from another task, "
        .. "coroutine or callback, nor after its end"), 2)
    end
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
    if not source then
      source = new_source(token)
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
---or two values.
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
  return new_stream(function(token) return open_producer(fn, token) end)
end

local function open_list(list)
  local i, n = 0, math.tointeger(rawget(list, "n"))
  return function()
    i = i + 1
    local value = list[i]
    if value == nil and n and i <= n then
      error(errors.InvalidOperation(("nil is not an item: element %d of the list of %d is nil"):format(i, n)), 0)
    end
    return value
  end
end

local function open_iterator(fn, state, control, closing)
  return function()
    local value, second = fn(state, control)
    control = value
    return value, second
  end, closing ~= nil and function() close_value(closing) end or nil
end

-- What has a method `iterate`.
local function open_iterable(source, token)
  local next, close
  return function()
    if not next then next, close = open_iterator(source:iterate(token)) end
    return next()
  end, function() if close then close() end end
end

local function has_iterate(source)
  if type(source) ~= "table" and type(source) ~= "userdata" then return false end
  local ok, method = pcall(function() return source.iterate end)
  return ok and method ~= nil and is_callable(method)
end

local NO_SOURCE = "list, iterator, stream or channel expected, got "

-- The stream of what `from` takes, or nil and what is wrong.
local function as_stream(source, state, control, closing)
  if getmetatable(source) == class then
    return source
  elseif has_iterate(source) then
    return new_stream(function(token) return open_iterable(source, token) end)
  elseif source ~= nil and is_callable(source) then
    local meta = getmetatable(source)
    if closing == nil and type(meta) == "table" and meta.__close then closing = source end
    return new_stream(function() return open_iterator(source, state, control, closing) end)
  elseif type(source) == "table" then
    return new_stream(function() return open_list(source) end)
  end
  return nil, NO_SOURCE .. (source == nil and "no value" or type(source))
end

---A stream of the elements of a list, or of what an iterator gives, or of the items of a channel: of anything that has
---a method `iterate`. Of an iterator it takes what `for` takes (`stream.from(pairs(t))`: keys and values), the
---to-be-closed value too; two values are one item. Where that state is used up, a second iteration finds nothing.
---Raises: InvalidOperation, when it comes to it, for an element that is nil although the list's `n` counts it.
---@param source table|function|coflow.Stream|coflow.Channel
---@return coflow.Stream
local function from(source, state, control, closing)
  local made, wrong = as_stream(source, state, control, closing)
  if wrong then core.argument_error(1, wrong) end
  return made
end

-- Operators without a task -------------------------------------------------------------------------

-- The stream whose items come from the function that `step(next)` gives for an iteration of the source.
local function through(source, step)
  local open = source._open
  return new_stream(function(token)
    local next, close = open(token)
    return step(next), close
  end)
end

-- " (defined at FILE:LINE)" of a function
local function place_of(fn)
  local info = type(fn) == "function" and debug.getinfo(fn, "S")
  if not info or info.what == "C" then return "" end
  return (" (defined at %s:%d)"):format(info.short_src, info.linedefined)
end

---Each item replaced by what `fn` returns for it: its first value, which must not be nil.
---@param fn fun(item: any, second: any): any
---@return coflow.Stream
function Stream:map(fn)
  check(self, "map")
  core.check_function(2, fn)
  return through(self, function(next)
    return function()
      local value, second = next()
      if value == nil then return nil end
      local mapped = fn(value, second)
      if mapped == nil then
        error(("bad argument #1 to 'map' (its function%s returned nil, which is not an item: filter leaves items out)")
          :format(place_of(fn)), 0)
      end
      return mapped
    end
  end)
end

---The items for which `fn` returns a true value.
---@param fn fun(item: any, second: any): any
---@return coflow.Stream
function Stream:filter(fn)
  check(self, "filter")
  core.check_function(2, fn)
  return through(self, function(next)
    return function()
      while true do
        local value, second = next()
        if value == nil or fn(value, second) then return value, second end
      end
    end
  end)
end

local function wrong_count(n, least)
  n = math.type(n) and math.tointeger(n)
  if not n or n < least then return "integer >= " .. least .. " expected" end
end

---The first `n` items. No more is asked of the source.
---@param n integer
---@return coflow.Stream
function Stream:take(n)
  check(self, "take")
  local wrong = wrong_count(n, 0)
  if wrong then core.argument_error(2, wrong) end
  return through(self, function(next)
    local taken = 0
    return function()
      if taken >= n then return nil end
      taken = taken + 1
      return next()
    end
  end)
end

---All but the first `n` items.
---@param n integer
---@return coflow.Stream
function Stream:skip(n)
  check(self, "skip")
  local wrong = wrong_count(n, 0)
  if wrong then core.argument_error(2, wrong) end
  return through(self, function(next)
    local skipped = 0
    return function()
      while skipped < n do
        skipped = skipped + 1
        if next() == nil then return nil end
      end
      return next()
    end
  end)
end

---The items of what `fn` returns for each item (whatever `stream.from` takes), one after the other.
---@param fn fun(item: any, second: any): table|function|coflow.Stream
---@return coflow.Stream
function Stream:flat_map(fn)
  check(self, "flat_map")
  core.check_function(2, fn)
  local open = self._open
  return new_stream(function(token)
    local next, close = open(token)
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
        local made, wrong = as_stream(fn(value, second))
        if wrong then error("bad argument #1 to 'flat_map' (its function: " .. wrong .. ")", 0) end
        inner, close_inner = made._open(token)
      end
    end, in_turn(leave, close)
  end)
end

local function pack(value, second)
  if second == nil then return value end
  return { value, second }
end

---Lists of `n` items each; the last one may be shorter.
---@param n integer
---@return coflow.Stream
function Stream:chunk(n)
  check(self, "chunk")
  local wrong = wrong_count(n, 1)
  if wrong then core.argument_error(2, wrong) end
  return through(self, function(next)
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
end

---Items of two values: one from this stream and one from the other, until either ends. An item of two values on
---either side becomes a list.
---@param other table|function|coflow.Stream|coflow.Channel whatever `stream.from` takes
---@return coflow.Stream
function Stream:zip(other)
  check(self, "zip")
  local second_stream, wrong = as_stream(other)
  if not second_stream then core.argument_error(2, wrong) end
  local open = self._open
  return new_stream(function(token)
    local next_a, close_a = open(token)
    local next_b, close_b = second_stream._open(token)
    return function()
      local a, a2 = next_a()
      if a == nil then return nil end
      local b, b2 = next_b()
      if b == nil then return nil end
      return pack(a, a2), pack(b, b2)
    end, in_turn(close_b, close_a)
  end)
end

local function wrong_seconds(seconds)
  if math.type(seconds) == nil then
    return "number expected, got " .. (seconds == nil and "no value" or type(seconds))
  elseif seconds < 0 or seconds ~= seconds then
    return seconds < 0 and "seconds must not be negative" or "seconds must not be NaN"
  end
end

---The same items, each of which must come within `seconds` of being asked for. What the consumer does in
---between does not count.
---Raises: Timeout, while iterating. 0 asks for no item at all.
---@param seconds number? nil or math.huge: no limit
---@return coflow.Stream
function Stream:timeout(seconds)
  check(self, "timeout")
  local wrong = seconds ~= nil and wrong_seconds(seconds)
  if wrong then core.argument_error(2, wrong) end
  if seconds == nil or seconds == math.huge then return self end
  return through(self, function(next) return within(under_timeout, seconds, next) end)
end

---The same items, at most one every `seconds`: one that comes sooner is held back, none is dropped. One that is held
---back when the iteration is canceled goes with it.
---@param seconds number
---@return coflow.Stream
function Stream:throttle(seconds)
  check(self, "throttle")
  local wrong = wrong_seconds(seconds) or seconds == math.huge and "seconds must be finite"
  if wrong then core.argument_error(2, wrong) end
  return through(self, function(next)
    local due = -math.huge
    return function()
      local value, second = next()
      if value == nil then return nil end
      local wait = due - now()
      if wait > 0 then core.sleep(wait) end
      due = now() + seconds
      return value, second
    end
  end)
end

-- Operators with a task for each source ------------------------------------------------------------

local FAILED = {}

-- The pumps that wait for room. Held here: only the consumer ends that, or what closes a forgotten iteration.
local idle = {}

-- The items of all `streams`, in order of arrival, read ahead by at most `limit` items of each.
--
-- One queue for all: the three lists from `first` to `last`. A pump's failure is an entry of its own in it, behind
-- the items that came before; the error is the task's. The channels carry no items, only the news of one, or
-- of room for one: whoever reads it looks again.
local function gather(streams, limit, name, token)
  local values, seconds, owners, first, last = {}, {}, {}, 1, 0
  local pumps, active, started, stopped = {}, #streams, false, false
  local stop = core.call_source() -- ends the pumps' waits; but what closes their sources may wait
  local arrival, waiting = core.channel_new(), false -- where the consumer waits, and whether it does

  local function put(pump, value, second)
    last = last + 1
    values[last], seconds[last], owners[last] = value, second, pump
    if not waiting then return end
    waiting = false
    arrival:try_write(true)
  end

  local function leave(pump)
    active = active - 1
    idle[pump] = nil
    if not pump.ended then put(pump, FAILED) elseif active == 0 then put(pump, nil) end
  end

  local function pump_all(pump)
    local _ <close> = setmetatable({ function() leave(pump) end }, deferred)
    local closing <close> = setmetatable({ pump.close }, deferred)
    do
      local _ <close> = core.open_linked(stop.token, pump.next)
      while true do
        while pump.held >= limit do
          idle[pump] = true
          pump.room:read()
        end
        local value, second = pump.next()
        if value == nil or stopped then break end
        pump.held = pump.held + 1
        put(pump, value, second)
      end
    end
    closing[1] = nil
    if pump.close then pump.close() end
    pump.ended = true -- well: what closing raises is a failure, too
  end

  for i, source in ipairs(streams) do
    local pump = { held = 0, ended = false, room = core.channel_new() }
    pump.next, pump.close = source._open(token)
    local function run() pump_all(pump) end
    pump.task = core.new(function() if token then under_token(token, run) else run() end end)
    pump.task.name = name
    pumps[i] = pump
  end

  local function next()
    if not started then
      started = true
      for _, pump in ipairs(pumps) do pump.task:start() end
    end
    while first > last do
      if active == 0 then return nil end
      waiting = true
      arrival:read()
    end
    local value, second, pump = values[first], seconds[first], owners[first]
    values[first], seconds[first], owners[first] = nil, nil, nil
    first = first + 1
    if value == nil then return nil end
    if value == FAILED then return await(pump.task) end -- which raises
    pump.held = pump.held - 1
    if idle[pump] then
      idle[pump] = nil
      pump.room:try_write(true)
    end
    return value, second
  end

  -- What a source raised before, and nobody has asked for, is dropped with the items that were read ahead. Gives
  -- what callbacks of the sources' tokens raise: the sources are to end first.
  local function cancel()
    for _, pump in ipairs(pumps) do
      pump.dropped = pump.task.is_completed
    end
    stopped = true
    return pcall(stop.cancel, stop, "the iteration was closed")
  end

  local function join()
    local err, failed
    for _, pump in ipairs(pumps) do
      local ok, problem = core.try_await(pump.task)
      local told = ok or pump.dropped or pump.task.is_canceled or is_error(problem, "TaskAbandoned")
      if not (told or failed) then err, failed = problem, true end
    end
    if failed then error(err, 0) end
  end

  local function close()
    if active == 0 then
      for _, pump in ipairs(pumps) do local _ = pump.task.exception end
    elseif not started then
      local closing
      for _, pump in ipairs(pumps) do closing = in_turn(closing, pump.close) end
      if closing then closing() end
    else
      local told, problem = cancel()
      local ended, err = true, nil
      if core.is_awaitable_here() or not current_task() then ended, err = pcall(shielded, join) end
      if not told and not ended then core.report(problem) end
      if not told or not ended then error(ended and problem or err, 0) end
    end
  end

  return next, close
end

---The same items, of which up to `n` are read ahead, by a task of the iteration, from the first pull on.
---Items that were read ahead of an error come before it. Those that are left when the iteration is, are dropped.
---@param n integer
---@return coflow.Stream
function Stream:buffer(n)
  check(self, "buffer")
  local wrong = wrong_count(n, 1)
  if wrong then core.argument_error(2, wrong) end
  return new_stream(function(token) return gather({ self }, n, "stream buffer", token) end)
end

---The items of this stream and the others, in the order in which they arrive: each source has a task of the
---iteration, which goes on when its item has been taken. The first error ends all.
---@param other table|function|coflow.Stream|coflow.Channel whatever `stream.from` takes
---@return coflow.Stream
function Stream:merge(other, ...)
  check(self, "merge")
  local others = table.pack(other, ...)
  local streams = { self }
  for i = 1, math.max(others.n, 1) do
    local made, wrong = as_stream(others[i])
    if not made then core.argument_error(i + 1, wrong) end
    streams[i + 1] = made
  end
  return new_stream(function(token) return gather(streams, 1, "stream merge", token) end)
end

-- Ends ---------------------------------------------------------------------------------------------

---All items, as a list. One of two values is a list of these.
---@param token? coflow.CancellationToken
---@return any[]
function Stream:to_table(token)
  check(self, "to_table")
  local wrong = wrong_token(token)
  if wrong then core.argument_error(2, wrong) end
  local list, n = {}, 0
  for value, second in iterate(self, token) do
    n = n + 1
    list[n] = pack(value, second)
  end
  return list
end

---`fn(…fn(fn(initial, item1), item2)…)`. Without `initial` (nil) the first item takes its place.
---Raises: InvalidOperation if there is neither an initial value nor an item.
---@param fn fun(accumulated: any, item: any, second: any): any
---@param initial any
---@param token? coflow.CancellationToken
---@return any
function Stream:reduce(fn, initial, token)
  check(self, "reduce")
  core.check_function(2, fn)
  local wrong = wrong_token(token)
  if wrong then core.argument_error(4, wrong) end
  local result, empty = initial, initial == nil
  for value, second in iterate(self, token) do
    if empty then
      result, empty = pack(value, second), false
    else
      result = fn(result, value, second)
    end
  end
  if empty then error(errors.InvalidOperation("reduce: no items, and no initial value"), 2) end
  return result
end

---Calls `fn(item)` for each item, one after the other.
---@param fn fun(item: any, second: any)
---@param token? coflow.CancellationToken for the items; `fn` is not under it
function Stream:for_each(fn, token)
  check(self, "for_each")
  core.check_function(2, fn)
  local wrong = wrong_token(token)
  if wrong then core.argument_error(3, wrong) end
  for value, second in iterate(self, token) do fn(value, second) end
end

for _, name in ipairs { "to_table", "reduce", "for_each" } do
  Stream[name .. "_async"] = core.async(Stream[name])
end

-- _as_stream and _pack are for coflow.parallel.
return { new = new, from = from, _as_stream = as_stream, _pack = pack }
