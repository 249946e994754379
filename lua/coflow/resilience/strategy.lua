-- coflow.resilience.strategy: what all strategies of coflow.resilience share.
--
-- A strategy is an object with `execute` and `execute_async`. `strategy.class` makes a class of the one function
-- that differs, `run(self, fn, ...)`, which is called inside a task whose token is not canceled. Its options are
-- checked by a list of rules; their values become fields of the object, with an underscore.
--
-- What a strategy calls, the function and the user's callbacks, runs like an async function: what it does to
-- async locals stays inside, so no attempt sees what another one has set.
--
-- SPDX-License-Identifier: MIT

local closing = require "coflow.closing"
local core = require "coflow.core"
local arguments = require "coflow.arguments"

local errors = core.errors

local strategy = {}

-- Calling what the user gave ------------------------------------------------------------------------

---Calls `fn` with the isolation of an async function.
function strategy.call(fn, ...)
  local _ <close> = core.isolate()
  return fn(...)
end

---As pcall, with the traceback kept for the case that the error is raised again.
---@return boolean ok
---@return any ... values, or the error
function strategy.try(fn, ...)
  return xpcall(strategy.call, core.trace_handler, fn, ...)
end

---Whether the error is a failure for the strategy: what its `should_handle` says, without one any. OperationCanceled
---is none for anybody, and `should_handle` is not asked.
function strategy.handles(self, err)
  if errors.is(err, "OperationCanceled") then return false end
  if not self._should_handle then return true end
  return strategy.call(self._should_handle, err) and true or false
end

---Whether the time `due` has come. Somebody who slept for `due - now` may wake a few units in the last place of the
---clock before it.
function strategy.has_come(due, now)
  return due - now <= math.abs(now) * 2.0 ^ -50
end

-- Options -----------------------------------------------------------------------------------------

-- What the value of an option may be: a test, and its name for the message.
local kind = {
  callable = { core.is_callable, "a function" },
  boolean = { function(value) return type(value) == "boolean" end, "a boolean" },
}
strategy.kind = kind

---A number of at least `low` and at most `high` (without it: finite). `above`: greater than `low`.
function kind.number(low, high, what, above)
  return { function(value)
    if type(value) ~= "number" or value ~= value or value < low or (above and value == low) then return false end
    return high and value <= high or not high and value < math.huge
  end, what }
end

kind.seconds = kind.number(0, nil, "a number of seconds, neither negative nor infinite")
kind.seconds_or_huge = { arguments.is_seconds, "a number of seconds, not negative" }
kind.span = kind.number(0, nil, "a positive, finite number of seconds", true)
kind.span_or_huge = kind.number(0, math.huge, "a positive number of seconds", true)

function kind.integer(low)
  return { function(value) return arguments.is_integer(value, low) end, ("an integer of at least %d"):format(low) }
end

---An integer of at least `low`; math.huge stands for "no limit".
function kind.count(low)
  return { function(value) return arguments.is_count(value, low) end,
    ("an integer of at least %d, or math.huge"):format(low) }
end

---One of the strings that are keys of `choices`.
function kind.choice(choices, what)
  return { function(value) return type(value) == "string" and choices[value] ~= nil end, what }
end

-- Puts the options, or their defaults, into fields of `self`; returns what is wrong, or nil.
local function read(rules, options, self)
  for _, rule in ipairs(rules) do
    local name, accepts, expected = rule[1], rule[2][1], rule[2][2]
    local value = options[name]
    if value == nil then value = rule.default end
    if value == nil and rule.required or value ~= nil and not accepts(value) then
      return ("%s must be %s"):format(name, expected)
    end
    self["_" .. name] = math.type(value) == "float" and math.tointeger(value) or value
  end
end

-- Classes -----------------------------------------------------------------------------------------

---A way to call functions, which may refuse, repeat, limit or replace a call. It belongs to no task: one object
---serves all who share what it protects.
---@class coflow.Strategy
---@field execute fun(self: coflow.Strategy, fn: function, ...): ... calls `fn(...)` in the strategy's way and returns
---all its values; its errors come out unchanged. A canceled token starts nothing. May suspend; outside every task it
---drives the event loop.
---@field execute_async fun(self: coflow.Strategy, fn: function, ...): coflow.Task the same, as a task

---Makes a class.
---@param name string of the function that makes its objects
---@param run fun(self: table, fn: function, ...): ...
---@param getters? table<string, fun(self: table): any> properties
---@return table class the metatable
---@return table methods
function strategy.class(name, run, getters)
  local methods = {}
  local class = { __name = "coflow.resilience." .. name, __index = methods, methods = methods }
  if getters then
    function class.__index(self, key)
      local get = getters[key]
      if get then return get(self) end
      return methods[key]
    end

    function class.__newindex(self, key, value)
      if getters[key] then error(("field '%s' of a %s cannot be assigned"):format(key, class.__name), 2) end
      rawset(self, key, value)
    end
  end

  ---Refuses a `self` of another class.
  function class.check(self)
    if getmetatable(self) ~= class then core.refuse_self(class, self) end
  end

  local function check_execute(self, fn)
    class.check(self)
    core.check_function(2, fn)
  end

  function methods.execute(self, fn, ...)
    check_execute(self, fn)
    if not core.current_task() then return core.run(run, self, fn, ...) end
    core.throw_if_canceled()
    return closing(run, self, fn, ...)
  end

  methods.execute_async = arguments.twin(methods.execute, check_execute)
  return class, methods
end

---The public function that makes an object of the class from a table of options.
---@param class table
---@param rules table[] { name, kind, default =, required = }
---@param prepare? fun(self: table) sets the fields that are not options
function strategy.constructor(class, rules, prepare)
  local known = {}
  for _, rule in ipairs(rules) do known[rule[1]] = true end
  return function(options)
    options = core.check_options(1, options, known)
    local self = {}
    local problem = read(rules, options, self)
    if problem then core.argument_error(1, problem) end
    if prepare then prepare(self) end
    return setmetatable(self, class)
  end
end

return strategy
