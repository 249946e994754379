-- coflow.pipeline: middleware: functions around a handler, each of which decides whether the next one runs.
--
-- Every step runs like an async function: async locals that it sets are seen by the steps inside it, and are
-- gone again outside.
--
-- Source: ASP.NET Core's Use, Run and Build.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local flow = require "coflow"

local App = {}
App.__index = App
App.__name = "coflow.Pipeline"
App.__metatable = false

local apps = setmetatable({}, { __mode = "k" }) -- app -> its steps and handler

local function steps_of(app)
  return apps[app] or core.refuse_self(App, app)
end

---Adds a step. The first one added is the outermost.
---@param step fun(context: any, next: fun(other?: any): ...): ... calls `next()` to go on, with another context
---if it likes; what `next` returns is what the steps inside have returned. Not calling it ends the way there.
---@return coflow.Pipeline the same, to go on with
function App:use(step)
  local steps = steps_of(self)
  core.check_function(2, step)
  table.insert(steps, step)
  return self
end

---Sets what stands at the end of all steps.
---Raises: InvalidOperation if there is one already.
---@param handler fun(context: any): ...
---@return coflow.Pipeline
function App:run(handler)
  local steps = steps_of(self)
  core.check_function(2, handler)
  if steps.handler then
    error(core.errors.InvalidOperation("the pipeline has a handler already: only one can stand at its end"), 2)
  end
  steps.handler = handler
  return self
end

local function nothing() end

---The pipeline as it is now, as one function. May suspend. Raises what a step raises and no step outside it handles.
---@return fun(context: any): ...
function App:build()
  local steps = steps_of(self)
  local inner = steps.handler or nothing
  for i = #steps, 1, -1 do
    local step, following = steps[i], inner
    inner = function(context)
      return flow.call(step, context, function(other)
        if other == nil then other = context end
        return flow.call(following, other)
      end)
    end
  end
  local outermost = inner
  return function(context) return flow.call(outermost, context) end
end

local pipeline = {}

---An empty pipeline.
---@return coflow.Pipeline
function pipeline.new()
  local app = setmetatable({}, App)
  apps[app] = {}
  return app
end

return pipeline
