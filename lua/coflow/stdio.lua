-- coflow.stdio: the standard streams (stdio.c), made when they are first used.
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"

require "coflow.net" -- the class

local numbers = { stdin = 0, stdout = 1, stderr = 2 }

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

return setmetatable(stdio, {
  __index = function(self, name)
    local number = numbers[name]
    if not number then return nil end
    local stream = core.open_standard(number)
    if rawget(self, name) == nil then rawset(self, name, stream) end -- else by a finalizer, meanwhile
    return rawget(self, name)
  end,
})
