-- coflow.testing: run a test under a virtual clock, on the same scheduler and timers as production.
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"

local testing = {}

local Clock = {}
Clock.__index = Clock

---The virtual time, in seconds.
---@return number
function Clock.now() return core.loop.now() end

---Runs `fn(clock)` as the root task while time is virtual: when no task is ready the clock jumps to the
---next deadline, so nothing ever sleeps.
---@param fn fun(clock): ...
---@param options? { start_time?: number }
---@return any ... what `fn` returns
function testing.run(fn, options)
  for key in pairs(options or {}) do
    if key ~= "start_time" then
      error(("bad argument #2 to 'run' (unknown option '%s')"):format(tostring(key)), 2)
    end
  end
  if core.current_task() then
    error(core.errors.InvalidOperation("testing.run inside a task: it drives the loop itself, "
      .. "with a clock of its own"), 0)
  end
  core.virtual(options and options.start_time or 0)
  local _ <close> = setmetatable({}, { __close = function() core.virtual(nil) end })
  return core.run(fn, setmetatable({}, Clock))
end

return testing
