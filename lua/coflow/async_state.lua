-- coflow.async_state: state that libraries share along one flow of work, such as a request.
--
-- The opposite of an AsyncLocal: the flow holds a *holder*, a table that everyone below shares, so what a
-- callee sets is seen by its caller. One async local serves any number of contexts, since it is the holder
-- that flows. `reset`, or a new `initialize`, empties the holder at once, for every flow that still has it.
--
-- Source: Microsoft.Extensions.AsyncState.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"

local errors = core.errors

---@class coflow.AsyncStateContext
local Context = {}
Context.__index = Context
Context.__name = "coflow.AsyncStateContext"

---@class coflow.AsyncState
local AsyncState = {}
AsyncState.__index = AsyncState
AsyncState.__name = "coflow.AsyncState"

local function check(self, class)
  if getmetatable(self) ~= class then core.refuse_self(class, self) end
end

local function empty(state)
  local holder = state._local.value
  if holder then holder.values = nil end
end

---Gives the current flow, and what it starts from here on, an empty holder. An old one is emptied.
function AsyncState:initialize()
  check(self, AsyncState)
  empty(self)
  self._local.value = { values = {} }
end

---Empties the holder, for every flow that has it: they are uninitialized from now on.
function AsyncState:reset()
  check(self, AsyncState)
  empty(self)
  self._local.value = nil
end

---A named place in the state: the same name gives the same context.
---@param name string
---@return coflow.AsyncStateContext
function AsyncState:context(name)
  check(self, AsyncState)
  if type(name) ~= "string" then core.argument_error(2, "string expected, got " .. type(name)) end
  local context = self._contexts[name]
  if not context then
    context = setmetatable({ _state = self, _name = name }, Context)
    self._contexts[name] = context
  end
  return context
end

local function values_of(context)
  local holder = context._state._local.value
  return holder and holder.values
end

local function need_values(context)
  local holder = context._state._local.value
  if holder and holder.values then return holder.values end
  error(errors.InvalidOperation((holder
      and "the state of context '%s' has been reset, or initialized anew, by a flow that shares it"
      or "the state of context '%s' is not initialized in this flow: call state:initialize() where the work begins")
    :format(context._name)), 3)
end

---The value in the current flow, nil when none was set.
---Raises: InvalidOperation where the state is not initialized.
function Context:get()
  check(self, Context)
  return need_values(self)[self._name]
end

---Sets the value for every flow that shares the holder.
---Raises: InvalidOperation where the state is not initialized.
---@param value any
function Context:set(value)
  check(self, Context)
  need_values(self)[self._name] = value
end

---Whether the state is initialized here, and the value.
---@return boolean found
---@return any value
function Context:try_get()
  check(self, Context)
  local values = values_of(self)
  if not values then return false, nil end
  return true, values[self._name]
end

---A state of its own, not yet initialized anywhere.
---@return coflow.AsyncState
local function new()
  return setmetatable({ _local = core.AsyncLocal("async_state"), _contexts = {} }, AsyncState)
end

return { AsyncState = new }
