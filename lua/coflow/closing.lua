-- coflow.closing: calls that close what they have opened wherever they are made.
--
-- An error that ends a coroutine made by `create`, Lua's or ours, closes nothing in it, until somebody closes the
-- coroutine. There it is held up, so that what is open here is closed, and then goes on. The async traceback still has
-- where it was raised; what the coroutine's own stack tells (debug.traceback) begins here.
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"

local dies_open, trace_handler, error, xpcall = core.dies_open, core.trace_handler, error, xpcall

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
  return finish(co, xpcall(run, trace_handler, ...))
end
