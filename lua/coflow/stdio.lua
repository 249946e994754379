-- coflow.stdio: the standard streams (stdio.c), made when they are first used.
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"

require "coflow.net" -- the class

local numbers = { stdin = 0, stdout = 1, stderr = 2 }

local streams = {} -- those in use, by name

---A standard stream that is closed, or broken by a canceled write, is replaced when it is next asked for.
---@class coflow.stdio
---@field stdin coflow.Stream
---@field stdout coflow.Stream
---@field stderr coflow.Stream
local stdio = {}

---Whether a standard stream is a terminal.
---@param name "stdin"|"stdout"|"stderr"
---@return boolean
function stdio.is_terminal(name)
  if not numbers[name] then core.argument_error(1, "\"stdin\", \"stdout\" or \"stderr\" expected") end
  return core.is_terminal(numbers[name])
end

local function is_usable(stream) return stream and not stream.is_closed end

return setmetatable(stdio, {
  __index = function(_, name)
    if not is_usable(streams[name]) and numbers[name] then
      local stream = core.open_standard(numbers[name])
      if not is_usable(streams[name]) then streams[name] = stream end -- else by a finalizer, meanwhile
    end
    return streams[name]
  end,
})
