-- coflow.under_token: calling a function under a token that somebody gave to an operation which is made of others.
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
  if err.token == core.cancellation_token() or err.cause == own.cause then error(own, 0) end
end

-- Calls fn with the ambient token linked to `token`; `none` hides it. Under a token that is canceled already it is
-- called too: it is interrupted where it waits, as always.
---@param token coflow.CancellationToken
---@param fn fun(): any, any
local function under_token(token, fn)
  local canceled = token.is_cancellation_requested and core.call_source()
  local _ <close> = token == NONE and core.open_shield()
    or core.open_linked(canceled and canceled.token or token, fn)
  local _ <close> = setmetatable({ token }, renaming)
  if canceled then canceled:cancel(token.reason) end
  local value, second = fn()
  return value, second
end

return under_token
