-- coflow.context: what calls a function under a context and puts the old one back: ExecutionContext.run and
-- wrap, AsyncLocal:run, flow.call. Loaded when one of them is first used (init.lua).
--
-- SPDX-License-Identifier: MIT

local closing = require "coflow.closing"
local core = require "coflow.core"

local function run_in(context, fn, ...)
  local _ <close> = core.enter(context)
  return fn(...)
end

local function run_with(loc, value, fn, ...)
  local _ <close> = loc:with(value)
  return fn(...)
end

local function run_isolated(fn, ...)
  local _ <close> = core.isolate()
  return fn(...)
end

local ExecutionContext = {}

---Calls `fn` under `context`; what it changes stays inside. May suspend.
---Raises: InvalidOperation if `context` is nil (it was captured while the flow was suppressed).
---Source: .NET ExecutionContext.Run.
---@param context coflow.ExecutionContext
---@param fn function
---@return any ... what `fn` returns
function ExecutionContext.run(context, fn, ...)
  if context ~= nil then core.check_class(1, context, "coflow.ExecutionContext") end
  core.check_function(2, fn)
  return closing(run_in, context, fn, ...)
end

-- wrapper -> true: wrapping twice keeps the first context
local wrapped = setmetatable({}, { __mode = "k" })

---`fn` bound to the context captured now (to the empty one while the flow is suppressed).
---@param fn function
---@return function
function ExecutionContext.wrap(fn)
  core.check_function(1, fn)
  if wrapped[fn] then return fn end
  local context = core.capture() or core.empty_context
  local function wrapper(...) return closing(run_in, context, fn, ...) end
  wrapped[wrapper] = true
  return wrapper
end

core.methods("coflow.ExecutionContext").run = ExecutionContext.run

local AsyncLocal = core.methods("coflow.AsyncLocal")

---Calls `fn` with the value set, and puts the old one back on return and on error. May suspend.
---@param value any
---@param fn function
---@return any ... what `fn` returns
function AsyncLocal:run(value, fn, ...)
  core.check_class(1, self, "coflow.AsyncLocal")
  core.check_function(3, fn)
  return closing(run_with, self, value, fn, ...)
end

---@class coflow
local flow = {}

---Calls `fn` on the current task with the isolation of an async function: whatever it does to the
---execution context is undone when it returns or fails. May suspend.
---@param fn function
---@return any ... what `fn` returns
function flow.call(fn, ...)
  core.check_function(1, fn)
  return closing(run_isolated, fn, ...)
end

return { call = flow.call, run = ExecutionContext.run, wrap = ExecutionContext.wrap }
