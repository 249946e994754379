-- coflow.channel: queues of items between tasks, with back-pressure; and select.
--
-- The channels are C (src/channel.c). Here: the constructors, and the order of a prioritized channel.
--
-- Source: System.Threading.Channels.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"

local channel_new, version_of = core.channel_new, core.channel_version
local move, insert = table.move, table.insert

local Channel = {}
local channel = { Channel = Channel, select = core.select, select_async = core.select_async }

local modes = { wait = true, drop_newest = true, drop_oldest = true, drop_write = true }
local unbounded_options = {}
local bounded_options = { full_mode = true, item_dropped = true }
local prioritized_options = { comparer = true }

---A channel without a limit: a write never waits.
---Raises: at once, if an option is unknown: there is none.
---Source: .NET Channel.CreateUnbounded, without its single-reader mode.
---@param options? table
---@return coflow.Channel
function Channel.unbounded(options)
  core.check_options(1, options, unbounded_options)
  return channel_new()
end

---A channel with room for `capacity` items. With 0, a rendezvous: every item goes from a writer to a reader,
---and the one who comes first waits for the other.
---`full_mode` says what a write does when there is no room: "wait" (the default), or, and then it never waits,
---"drop_newest" and "drop_oldest", which drop a buffered item in favor of the new one, or "drop_write", which
---drops the new one and reports success. `item_dropped(item)` is called with each item dropped, on the writer's
---task, as by `flow.call`: what it does to async locals stays inside; what it raises, the write raises. A rendezvous
---drops the new item unless a reader waits.
---Source: .NET Channel.CreateBounded.
---@param capacity integer
---@param options? { full_mode?: "wait"|"drop_newest"|"drop_oldest"|"drop_write", item_dropped?: fun(item) }
---@return coflow.Channel
function Channel.bounded(capacity, options)
  if math.type(capacity) == nil then
    core.argument_error(1, "number expected, got " .. (capacity == nil and "no value" or type(capacity)))
  end
  local size = math.tointeger(capacity)
  if not size or size < 0 then core.argument_error(1, "capacity must be an integer and not negative") end
  options = core.check_options(2, options, bounded_options)
  local mode, dropped = options.full_mode, options.item_dropped
  if mode ~= nil and not modes[mode] then
    core.argument_error(2, 'full_mode must be "wait", "drop_newest", "drop_oldest" or "drop_write"')
  end
  if dropped ~= nil and not core.is_callable(dropped) then
    core.argument_error(2, "item_dropped must be a function")
  end
  local isolated = dropped and function(item) return require("coflow.context").call(dropped, item) end
  return channel_new(size, mode, isolated)
end

-- The items of a prioritized channel: a list of pieces, each a list of at most PIECE items. All in one row
-- they are sorted, the first to be read last, so that reading takes the end of the last piece, calls no comparer
-- and cannot fail. No piece is empty.

local PIECE = 128
local RESTARTS = 1000 -- of the search, because a comparer has changed the channel meanwhile

-- The first index of `list` from which on `item` goes before none; `last` gives what an element is compared by. What
-- the comparer does to the channel is noticed afterwards.
local function search(list, count, item, comparer, last)
  local low, high = 1, count + 1
  while low < high do
    local middle = (low + high) // 2
    local other = list[middle]
    if last and other then other = other[#other] end
    if other == nil then return low end -- it has read from it
    if comparer(item, other) then low = middle + 1 else high = middle end
  end
  return low
end

-- Puts `item` before the piece's index `position`. Creates nothing: a finalizer could change the channel.
local function place(pieces, at, position, spare, item)
  local piece = pieces[at]
  if not piece then
    spare[1] = item
    pieces[at] = spare
  elseif not spare then
    insert(piece, position, item)
  else -- it is full: its upper half becomes a piece of its own
    local half = PIECE // 2
    move(piece, half + 1, PIECE, 1, spare)
    insert(pieces, at + 1, spare)
    for i = PIECE, half + 1, -1 do piece[i] = nil end
    if position > half + 1 then
      insert(spare, position - half, item)
    else
      insert(piece, position, item)
    end
  end
end

---A channel without a limit whose items are read in order of priority; equal ones as they were written.
---What `comparer` raises, the write raises, and the item is not there; so it does with InvalidOperation when that
---changes the channel without end.
---Source: .NET Channel.CreateUnboundedPrioritized; there the order of equal items is open.
---@param options? { comparer?: fun(a, b): boolean } true if `a` goes first; by default a < b
---@return coflow.Channel
function Channel.prioritized(options)
  local comparer = core.check_options(1, options, prioritized_options).comparer
  if comparer == nil then
    comparer = core.less
  elseif not core.is_callable(comparer) then
    core.argument_error(1, "comparer must be a function")
  end
  return channel_new(nil, nil, nil, function(self, pieces, item)
    for _ = 1, RESTARTS do
      local version = version_of(self)
      if not version then return false end -- a comparer has completed it
      local count = #pieces
      local at = math.min(search(pieces, count, item, comparer, true), math.max(count, 1))
      local piece = pieces[at]
      local position = piece and search(piece, #piece, item, comparer) or 1
      local spare = (not piece or #piece >= PIECE) and {} or nil
      if version_of(self) == version then -- else it is another one now
        place(pieces, at, position, spare, item)
        return true
      end
    end
    error(core.errors.InvalidOperation("the comparer changes the channel each time that it is asked"), 0)
  end)
end

-- Batches ---------------------------------------------------------------------------------------------

local ChannelReader = core.methods("coflow.ChannelReader")
local read, try_read, check_batch = ChannelReader.read, ChannelReader.try_read, core.check_batch

---Waits for the first item, as `read` does, and returns it with those that are there then: a list of at most `max`.
---nil at the end.
---Cancellation: consumes no item.
---Raises: as `read`.
---@param max? integer nil: all that are there
---@param token? coflow.CancellationToken
---@return any[]? items
function ChannelReader:read_batch(max, token)
  max = check_batch(self, max, token)
  local list = { false }
  list[1] = read(self, token)
  if list[1] == nil then return nil end
  for i = 2, max do
    local item = try_read(self)
    if item == nil then break end
    list[i] = item
  end
  return list
end

core.methods("coflow.Channel").read_batch = ChannelReader.read_batch

return channel
