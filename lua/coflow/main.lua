-- coflow.main: flow.main, for scripts. Loaded when it is first used (init.lua).
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"

---@class coflow
local flow = {}

-- What the program ends with; and its task, if that is left waiting: what was to be said of it has been said.
local function exit_code(task)
  core.watch_signals(true)
  local ok, result = pcall(core.await, task)
  core.watch_signals(false)
  local signal = not ok and not task.is_completed and core.errors.is(result, "OperationCanceled") and result.signal
  if signal then
    local canceled, problems = pcall(core.cancel, task, result.message)
    if not canceled then core.report(problems) end
    ok, result = pcall(core.await, task)
  end
  if ok then return type(result) == "number" and math.tointeger(result) or 0 end
  if signal and core.errors.is(result, "OperationCanceled") then return 128 + signal end
  io.stderr:write(core.error_text(result), "\n")
  if task.is_completed then
    io.stderr:write(task:traceback(), "\n")
    return 1
  end
  return 1, task
end

---Runs `fn` as a program. SIGINT and SIGTERM cancel its ambient token, so that it can clean up; a second one
---ends the process. An error is written to standard error with its async traceback; errors of tasks that nobody has
---observed, and nobody can any more, are reported before it returns.
---Use: `os.exit(flow.main(main), true)`.
---@param fn function
---@return integer exit code: 0, 1, 128 + the signal, or the integer that `fn` returned; 0 if that was something else
function flow.main(fn, ...)
  core.check_function(1, fn)
  if core.current_task() then
    error(core.errors.InvalidOperation("main inside a task would block the event loop: call the function"), 0)
  end
  local code, left = exit_code(core.spawn(fn, ...))
  core.report_garbage(left) -- with the state left open, nobody would
  return code
end

return flow
