-- coflow.closing: calls that close what they have opened wherever they are made.
--
-- An error that ends a coroutine of Lua's own closes nothing in it, until somebody closes the coroutine. There it is
-- held up, so that what is open here is closed, and then goes on. (What was open in such a coroutine is no traceback's
-- affair any more.)
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"

local dies_open, error, pcall = core.dies_open, error, pcall

-- coroutine -> true: such a call further out holds errors up already, so that nested calls cost no C level
local held_up = setmetatable({}, { __mode = "k" })

local function finish(co, ok, ...)
  held_up[co] = nil
  if ok then return ... end
  error((...), 0)
end

---Calls `run(...)`, a function with variables to be closed.
---@param run function
---@return any ... what `run` returns
return function(run, ...)
  local co = dies_open()
  if not co or held_up[co] then return run(...) end
  held_up[co] = true
  return finish(co, pcall(run, ...))
end
