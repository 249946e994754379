-- coflow.under_token: a token that somebody gave to an operation which is made of others.
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"

local is_error = core.errors.is
local NONE = core.none

-- An error of the token that was given goes out with that token, not with that of our scope.
local renaming = {}
function renaming.__close(given, err)
  local token = given[1]
  if err == nil or token == NONE or not token.is_cancellation_requested then return end
  if not is_error(err, "OperationCanceled") or err.token == token then return end
  local _, own = pcall(token.throw_if_cancellation_requested, token)
  local cause = err.cause
  local ours = err.token == core.cancellation_token() or cause == own.cause or (cause ~= nil and cause == given[2])
  if ours then error(own, 0) end
end

-- An error of our scope's token, of which nobody outside knows, goes out with the ambient one.
local leaving = {}
function leaving.__close(scope, err)
  if scope.token and is_error(err, "OperationCanceled") and err.token == scope.token then core.throw_if_canceled() end
end

local under = {}

-- Calls fn with the ambient token linked to `token`; `none` hides it. Under a token that is canceled already it is
-- called too: it is interrupted where it waits, as always.
---@param token coflow.CancellationToken
---@param fn fun(): any, any
function under.call(token, fn)
  local canceled = token.is_cancellation_requested and core.call_source()
  local scope <close> = setmetatable({}, leaving)
  local _ <close> = token == NONE and core.open_shield()
    or core.open_linked(canceled and canceled.token or token, fn)
  if token ~= NONE then scope.token = core.cancellation_token() end
  local _ <close> = setmetatable({ token, canceled and canceled.token }, renaming)
  if canceled then canceled:cancel(token.reason) end
  local value, second = fn()
  return value, second
end

---Opens a scope linked to the token, if there is one; `none` hides what is ambient.
---@param token coflow.CancellationToken?
function under.open(token)
  if token == NONE then return core.open_shield() end
  return token and core.open_linked(token, core.open_linked) or nil
end

local blaming = {}
function blaming.__close(given, err)
  local token = given[1]
  if token ~= NONE and is_error(err, "OperationCanceled") then core.throw_if_canceled(token) end
end

---To be closed around that scope: whoever gave the token, if there is one, is told that it was that, or else the
---ambient one.
function under.blame(token) return setmetatable({ token }, blaming) end

return under
