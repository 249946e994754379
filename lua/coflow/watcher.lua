-- coflow.watcher: a Watcher of coflow.fs is a stream of its changes: it has the methods of one. Loaded when one of them
-- is first used (fs.lua).
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local stream = require "coflow.stream"
local Stream = require("coflow.stream.iteration").Stream

local Watcher = core.methods("coflow.Watcher")

for name, method in pairs(Stream) do
  if not rawget(Watcher, name) then
    Watcher[name] = function(self, ...)
      core.check_class(1, self, "coflow.Watcher")
      return (method(stream.from(self), ...)) -- no tail call: this is the function to be blamed
    end
  end
end

return Watcher
