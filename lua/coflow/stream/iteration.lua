-- coflow.stream.iteration: the class coflow.Stream, and one run over a stream: what `for` calls.
--
-- An Iteration keeps what stream.lua promises to its `next` and its `close`. Each pull closes a guard: if it is left by
-- an error, a cancellation too, the iteration ends, and closes everything upstream, before the error goes on.
-- One that is forgotten unfinished is closed by a task of its own.
--
-- Invariants: it._close is called once, by whoever sets run.closed.
--             it._busy is nil before the first pull, true during one, else false.
-- SPDX-License-Identifier: MIT

local closing = require "coflow.closing"
local core = require "coflow.core"
local arguments = require "coflow.arguments"
local under = require "coflow.under_token"

local current_task, errors = core.current_task, core.errors

---@class coflow.Stream
---@field _open fun(run: coflow.StreamRun): function, function?
local Stream = {}
local class = { __index = Stream, __name = "coflow.Stream" }

local function new(open) return setmetatable({ _open = open }, class) end

local function is_stream(value) return getmetatable(value) == class end

-- For the methods.
local function check(self)
  if not is_stream(self) then core.refuse_self(class, self) end
end

-- Closing -----------------------------------------------------------------------------------------

-- setmetatable({ fn }, deferred): calls fn at the end of the block, whatever happens before.
local deferred = {}
function deferred.__close(guard)
  local fn = guard[1]
  if fn then fn() end
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

-- `next` within a scope; there are none outside of tasks, so there each pull is a task, where there can be one.
local function within(scope, argument, next)
  return function()
    if current_task() then return scope(argument, next) end
    return core.run(scope, argument, next)
  end
end

-- Iterations --------------------------------------------------------------------------------------

---One run over a stream: what `for` calls. Called by hand it gives the next item; nil at the end, after an error,
---and when it has been closed. A to-be-closed value.
---@class coflow.StreamIteration
local Iteration = {}
local iteration = { __index = Iteration, __name = "coflow.StreamIteration" }

local function finish(it)
  it._run.closed = true
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
  if not it._run.closed then finish(it) end
end

local function pull(it, run)
  it._busy = true
  local _ <close> = it._guard
  local value, second = it._next()
  it._busy = false
  if value == nil and not run.closed then finish(it) end
  return value, second
end

function iteration.__call(it)
  local busy, run = it._busy, it._run
  if run.closed then
    return nil
  elseif busy then
    error(errors.InvalidOperation("the iteration is in use: its next item has been asked for already"), 2)
  elseif busy == nil then
    core.throw_if_canceled(run.token)
  end
  return closing(pull, it, run)
end

function iteration.__close(it)
  if not it._run.closed then finish(it) end
end

local function close_forgotten(it)
  core.current_task().name = "closing a forgotten stream"
  if not it._run.closed then finish(it) end
end

-- Forgotten unfinished: closed on a later turn, by a task that has nobody's context or token. (Not so when the state
-- closes: then there is no later turn, but whoever stands in the loop may still be closed, and closes it.)
function iteration.__gc(it)
  if it._run.closed or it._busy == nil or not it._close then return end
  local _ <close> = core.suppress_flow()
  core.spawn(close_forgotten, it)
end

---Ends the iteration and closes its producers. Twice is harmless. May suspend.
---Raises: what a `<close>` variable raises. InvalidOperation while another task waits for the next item.
function Iteration:dispose()
  if getmetatable(self) ~= iteration then core.refuse_self(iteration, self) end
  if self._run.closed then return end
  if self._busy then
    error(errors.InvalidOperation("the iteration is in use: somebody waits for its next item"), 2)
  end
  closing(finish, self)
end

-- What the streams of one iteration share.
---@class coflow.StreamRun
---@field token? coflow.CancellationToken
---@field closed boolean no source, and no pump, is to begin any more
local function new_run(token) return { token = token, closed = false } end

local function iterate(self, token)
  local run = new_run(token)
  local next, close = self._open(run)
  if token ~= nil then next = within(under.call, token, next) end
  local it = setmetatable({ _next = next, _close = close, _run = run, _guard = false }, iteration)
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
  check(self)
  arguments.check_token(2, token)
  return iterate(self, token)
end

-- An item as one value: one of two is a list of these.
local function pack(value, second)
  if second == nil then return value end
  return { value, second }
end

return {
  Stream = Stream, new = new, new_run = new_run, is_stream = is_stream, check = check, iterate = iterate,
  pack = pack, deferred = deferred, in_turn = in_turn, within = within,
}
