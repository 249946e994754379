-- coflow.fs: files and directories. The operations are in C (fs.c, watch.c); here is what is best said in Lua.
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local arguments = require "coflow.arguments"

local fs, next_line = core.open_fs()

local File = core.methods("coflow.File")

---Iterates over the lines from the position on, without their ends: `for line in file:lines() do`. Lines are
---read ahead, but the position is behind the last one told: leaving the loop early loses nothing. Leaves the
---file open. May suspend.
---Cancellation: raises at the next line.
---Raises: IO with code EMSGSIZE at a line of more than `max` bytes.
---@param max? integer no limit unless given; may be left out
---@param token? coflow.CancellationToken
---@return fun(): string?
function File:lines(max, token)
  core.check_class(1, self, "coflow.File")
  max, token = arguments.token_last(max, token)
  if max ~= nil and not arguments.is_count(max, 0) then core.argument_error(2, "max must be a number of bytes") end
  arguments.check_token(3, token)
  local read_line = self.read_line
  return function()
    return next_line(self, max, token) or read_line(self, max, token)
  end
end

local Watcher = core.methods("coflow.Watcher")

---Iterates over the changes until the watcher is closed: `for change in watcher:iterate() do`. May suspend.
---Cancellation: raises; no change is lost.
---@param token? coflow.CancellationToken
---@return fun(): coflow.Change?
function Watcher:iterate(token)
  core.check_class(1, self, "coflow.Watcher")
  arguments.check_token(2, token)
  local next = self.next
  return function() return next(self, token) end
end

core.late(Watcher, [[
  map=watcher filter=watcher take=watcher skip=watcher flat_map=watcher chunk=watcher merge=watcher zip=watcher
  buffer=watcher throttle=watcher timeout=watcher to_table=watcher to_table_async=watcher reduce=watcher
  reduce_async=watcher for_each=watcher for_each_async=watcher]])

fs.read_dir, fs.read_dir_async = fs.scandir, fs.scandir_async

return fs
