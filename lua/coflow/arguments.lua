-- coflow.arguments: how functions that are written in Lua take their arguments.
--
-- A task keeps what its function raises; but a wrong argument is its caller's affair, in an `_async` form too. So
-- there the arguments are looked at before there is a task, by the same function as in direct style, on the stack of
-- the caller, whose line and whose name for the function are in the message (core.argument_error).
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"

local arguments = {}

---The `_async` twin of `fn`: calls `check(...)`, then starts `fn(...)`, and returns its task.
---@param fn function
---@param check fun(...) raises what is wrong with the arguments
---@return fun(...): coflow.Task
function arguments.twin(fn, check)
  local start = core.async(fn)
  return function(...)
    check(...)
    return start(...)
  end
end

---Refuses argument `n` if it is neither nil nor a token.
function arguments.check_token(n, token)
  if token ~= nil and not core.is_token(token) then core.check_class(n, token, "coflow.CancellationToken") end
end

---Whether it is an integer, be it written as a float, from `least` to `most`; nil: no bound.
function arguments.is_integer(value, least, most)
  return type(value) == "number" and math.tointeger(value) ~= nil
    and (not least or value >= least) and (not most or value <= most)
end

---… or math.huge, which stands for "no limit".
function arguments.is_count(value, least) return value == math.huge or arguments.is_integer(value, least) end

---Whether it is a number of seconds, not negative; math.huge is one.
function arguments.is_seconds(value) return type(value) == "number" and value >= 0 end

---What stands before the token may be left out: then the token stands in its place. Gives both.
function arguments.token_last(value, token)
  if token == nil and core.is_token(value) then return nil, value end
  return value, token
end

return arguments
