-- coflow.scope: functions that call others under another ambient token: flow.with_timeout, with_cancellation and
-- shield. Loaded when one of them is first used (init.lua).
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local arguments = require "coflow.arguments"

local open_timeout, open_linked = core.open_timeout, core.open_linked

---@class coflow
local flow = {}

---Calls `fn` with the ambient token linked to `token`, so that both cancel it; `none` adds nothing. What `fn`
---starts and leaves running stays under the outer token only. May suspend.
---Cancellation: a token already canceled raises without calling `fn`.
---Raises: InvalidOperation outside every task.
---@param token coflow.CancellationToken
---@param fn function
---@return any ... what `fn` returns
function flow.with_cancellation(token, fn, ...)
  local _ <close> = open_linked(token, fn)
  return fn(...)
end

---Calls `fn` and cancels the ambient token after `seconds`: every wait inside ends then, and each new one. The
---nearest deadline wins. Where `fn` computes without a wait nothing interrupts it. May suspend.
---Raises: Timeout if the deadline passed before any outer cancellation, and `fn` ended with an OperationCanceled;
---any other error comes out as it is. 0 never calls `fn`. InvalidOperation outside every task.
---Source: trio.fail_after.
---@param seconds number? nil or math.huge: no limit
---@param fn function
---@return any ... what `fn` returns
function flow.with_timeout(seconds, fn, ...)
  local _ <close> = open_timeout(seconds, fn)
  return fn(...)
end

local shield_options = { grace = true }

local function shielded(grace, fn, ...)
  local _ <close> = core.open_shield(grace)
  return fn(...)
end

---Calls `fn` with the ambient token and deadline hidden: for clean-up that must await. May suspend.
---Raises: InvalidOperation outside every task.
---Source: trio's shielded scopes.
---@overload fun(fn: function, ...): ...
---@param options { grace?: number } seconds after which waits in it are canceled after all
---@param ... any the function, and its arguments
---@return any ... what the function returns
function flow.shield(options, ...)
  if type(options) ~= "table" or core.is_callable(options) then
    core.check_function(1, options)
    return shielded(nil, options, ...)
  end
  local grace = core.check_options(1, options, shield_options).grace
  core.check_function(2, (...))
  if grace ~= nil and not arguments.is_seconds(grace) then
    core.argument_error(1, "grace must be a number of seconds, not negative")
  end
  return shielded(grace, ...)
end

return flow
