-- coflow.lazy: a value that is made when it is first asked for, once, however many ask.
--
-- Source: AsyncLazy of Nito.AsyncEx.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local arguments = require "coflow.arguments"
local flight = require "coflow.flight"

---@class coflow.AsyncLazy
---@field is_value_created boolean
local AsyncLazy = {}

local class = { __name = "coflow.AsyncLazy", methods = AsyncLazy }

function class.__index(lazy, key)
  if key == "is_value_created" then
    local current = rawget(lazy, "_flight")
    return current and not current.given_up and current.task.is_completed_successfully
  end
  return AsyncLazy[key]
end

-- The fields of its own are there from the beginning, so that it is for others only.
function class.__newindex(lazy, key, value)
  if key == "is_value_created" then error("field 'is_value_created' of an AsyncLazy cannot be assigned", 2) end
  rawset(lazy, key, value)
end

local known_options = { retry_on_failure = true }

local function check_get(self, token)
  if getmetatable(self) ~= class then core.refuse_self(class, self) end
  arguments.check_token(2, token)
end

---The value: of the factory's one call. Callers that come while it runs wait for the same one.
---Cancellation: ends this caller's wait; the factory is canceled when no caller is left, and then called again
---at the next `get`.
---Raises: what the factory raised: the same value at every call, unless `retry_on_failure` is set.
---@param token? coflow.CancellationToken
---@return any ...
function AsyncLazy:get(token)
  check_get(self, token)
  local current = self._flight
  local failed = current and current.task.is_completed and not current.task.is_completed_successfully
  if current and (current.given_up or failed and (self._retry or current.task.is_canceled)) then current = nil end
  if current and current.task.is_completed_successfully then
    self._factory = nil -- it is not called again: what it refers to may go
  elseif not current then
    core.check_here()
    core.throw_if_canceled(token)
    local before, made = self._flight, flight.new(self._factory)
    current = self._flight
    if current == before then
      current = made
      self._flight = made
      made:launch()
    end
  end
  return current:join(token)
end

---`flow.await(lazy)`: as `get`.
function class.__await(lazy) return lazy:get_async() end

AsyncLazy.get_async = arguments.twin(AsyncLazy.get, check_get)

---A lazy value. The factory runs in the empty execution context, and under no caller's token.
---@param factory fun(): ...
---@param options? { retry_on_failure?: boolean } whether the next `get` after a failure calls the factory again
---@return coflow.AsyncLazy
local function new(factory, options)
  core.check_function(1, factory)
  options = core.check_options(2, options, known_options)
  local retry = options.retry_on_failure or false
  if type(retry) ~= "boolean" then core.argument_error(2, "retry_on_failure must be true or false") end
  return setmetatable({ _factory = factory, _retry = retry, _flight = false }, class)
end

return { AsyncLazy = new }
