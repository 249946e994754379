-- coflow.closing: calls that close what they have opened wherever they are made.
--
-- An error that ends a coroutine of Lua's own closes nothing in it, until somebody closes the coroutine. There it is
-- held up, so that what is open here is closed, and then goes on. (What was open in such a coroutine is no traceback's
-- affair any more.)
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"

local dies_open, error, pcall = core.dies_open, error, pcall

local function finish(ok, ...)
  if ok then return ... end
  error((...), 0)
end

---Calls `run(...)`, a function with variables to be closed.
---@param run function
---@return any ... what `run` returns
return function(run, ...)
  if not dies_open() then return run(...) end
  return finish(pcall(run, ...))
end
