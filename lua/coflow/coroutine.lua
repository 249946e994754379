-- coflow.coroutine: Lua's coroutine library, in whose coroutines a task may await.
--
-- Each function does what Lua's own of that name does, with the same errors. Three things are more:
--
-- - An await in a coroutine suspends the task that resumes it, through any number of coroutines one in
--   the other. Meanwhile the coroutine counts as running ("normal"): only that task goes on with it.
-- - A coroutine runs in the execution context in which it was made, and what it changes there stays its own.
--   The ambient token and deadline are those of whoever resumes it.
-- - An error that leaves a coroutine and goes on in the task has both stacks in the async traceback.
--
-- An await works where a coroutine of ours is resumed by our functions all the way from the task. Outside every
-- task it drives the loop, as elsewhere. The `<close>` variables of a coroutine made by `wrap` may await while an
-- error unwinds them; what `close` runs cannot.
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local own = core.coroutine

local coroutine = {
  yield = own.yield,
  resume = own.resume,
  status = own.status,
  running = own.running,
  isyieldable = own.isyieldable,
  close = own.close,
  create = own.create,
  wrap = own.wrap,
}

local NAMES = { "create", "wrap", "resume", "yield", "status", "running", "isyieldable", "close" }

local installed ---@type table? the library that has our functions
local originals = {} -- what it had before, by name; nil where it had nothing

---Puts these functions in place of those of the global library `coroutine`, for code that knows nothing of
---coflow: its coroutines may await from then on. Code that has put the old functions into locals before keeps
---them. Installing twice is harmless.
function coroutine.install()
  if installed then return end
  installed = _G.coroutine
  for _, name in ipairs(NAMES) do
    originals[name], installed[name] = installed[name], coroutine[name]
  end
end

---Puts back what `install` replaced. Coroutines made in between stay what they are.
function coroutine.uninstall()
  if not installed then return end
  for _, name in ipairs(NAMES) do
    installed[name] = originals[name]
  end
  installed, originals = nil, {}
end

return coroutine
