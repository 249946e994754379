-- coflow.signal: signals of the system: SIGHUP to read a configuration again, SIGTERM to end.
--
-- While somebody waits here for a signal its default action is off, for the whole process; afterwards it is in
-- force again (but SIGPIPE stays ignored where there are streams). Every wait and every stream for a signal gets it.
-- flow.main, which has SIGINT and SIGTERM for itself, gets them as well.
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local arguments = require "coflow.arguments"
local closing = require "coflow.closing"

local signal = {}

local signals, names = core.signals(), {} -- name -> number, and the reverse
for name, number in pairs(signals) do names[number] = name end

-- The numbers of a name or a list of names; or nil and what is wrong with it.
local function find(which)
  if type(which) == "string" then which = { which } end
  if type(which) ~= "table" then
    return nil, "name of a signal, or a list of names, expected, got " .. (which == nil and "no value" or type(which))
  elseif #which == 0 then
    return nil, "the list of signals is empty"
  end
  local numbers = {}
  for i, name in ipairs(which) do
    if not signals[name] then
      local full = type(name) == "string" and "SIG" .. name:upper()
      return nil, ("%s is no signal that can be caught%s"):format(full and name or type(name),
        signals[full] and ": its name is " .. full or "")
    end
    numbers[i] = signals[name]
  end
  return numbers
end

local function numbers_of(which)
  local numbers, wrong = find(which)
  if wrong then core.argument_error(1, wrong) end
  return numbers
end

local function check_wait(which, token)
  local numbers = numbers_of(which)
  arguments.check_token(2, token)
  return numbers
end

-- The name of the next signal that the catcher has noted.
local function next_of(catcher, token)
  core.throw_if_canceled(token)
  while true do
    local number = catcher:take()
    if number then return names[number] end
    core.await_with(catcher:wait(), token)
  end
end

local function wait(numbers, token)
  local catcher <close> = core.catch(false, table.unpack(numbers))
  return next_of(catcher, token)
end

---Waits for a signal, and returns its name. From the call to the return its default action is off.
---Cancellation: ends the wait.
---Raises: IO if the system refuses to tell of it.
---@param which string|string[] "SIGHUP", say, or several of which the first to come counts
---@param token? coflow.CancellationToken
---@return string name
function signal.wait(which, token)
  local numbers = check_wait(which, token)
  core.throw_if_canceled(token)
  core.check_here()
  return closing(wait, numbers, token)
end

signal.wait_async = arguments.twin(signal.wait, check_wait)

---A stream of the names of the signals that come, from the moment at which it is iterated on. Those that come
---while the last one is dealt with are not lost; of the same signal they count once, as signals do.
---@param which string|string[]
---@return coflow.Stream
function signal.stream(which)
  local numbers = numbers_of(which)
  return core.require("stream").new(function(emit)
    local catcher <close> = core.catch(false, table.unpack(numbers))
    while true do emit(next_of(catcher)) end
  end)
end

return signal
