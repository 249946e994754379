-- coflow.cache: values by key, made by a factory when they are missing: one call per key, however many ask.
--
-- An entry is in two lists: `used`, by last use (the least recently used is evicted over max_entries), and
-- `made`, by the time it was made (all live equally long, so the first in it expires first). Whoever uses the
-- cache also drops what has expired.
--
-- Source: the memory caches of .NET, with the factory's call shared (HybridCache).
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local arguments = require "coflow.arguments"
local flight = require "coflow.flight"

---@class coflow.AsyncCache
local AsyncCache = {}

local class = { __index = AsyncCache, __name = "coflow.AsyncCache" }

-- A circular list through the fields named `next` and `previous` of its members; the list is its own head.
local function new_list(next, previous)
  local head = { next_field = next, previous_field = previous }
  head[next], head[previous] = head, head
  return head
end

local function remove(list, entry)
  local next, previous = list.next_field, list.previous_field
  if not entry[next] then return end
  entry[previous][next], entry[next][previous] = entry[next], entry[previous]
  entry[next], entry[previous] = nil, nil
end

local function append(list, entry)
  local next, previous = list.next_field, list.previous_field
  entry[previous], entry[next] = list[previous], list
  list[previous][next], list[previous] = entry, entry
end

local function first(list)
  local entry = list[list.next_field]
  return entry ~= list and entry or nil
end

local function drop(cache, entry)
  if cache._entries[entry.key] == entry then
    cache._entries[entry.key] = nil
    cache._count = cache._count - 1
  end
  remove(cache._used, entry)
  remove(cache._made, entry)
end

local function drop_expired(cache)
  local now = core.loop.now()
  local entry = first(cache._made)
  while entry and entry.expires <= now do
    drop(cache, entry)
    entry = first(cache._made)
  end
end

-- The factory has made the value: from now on it counts, if it is still wanted.
local function store(cache, entry)
  if cache._entries[entry.key] ~= entry then return end
  entry.expires = core.loop.now() + cache._time_to_live
  append(cache._used, entry)
  append(cache._made, entry)
  drop_expired(cache) -- before anything that is still good
  while cache._count > cache._max_entries do
    local oldest = first(cache._used)
    if not oldest then break end -- all others are being made
    drop(cache, oldest)
  end
end

local function make(cache, entry, factory)
  local function done(...)
    store(cache, entry)
    return ...
  end
  local _ <close> = setmetatable({}, { __close = function(_, err)
    if err ~= nil or not entry.expires then drop(cache, entry) end -- no failure is kept
  end })
  return done(factory(entry.key))
end

local function check(self)
  if getmetatable(self) ~= class then core.refuse_self(class, self) end
end

local function check_get(self, key, factory, token)
  check(self)
  if key == nil or key ~= key then core.argument_error(2, "the key must be neither nil nor NaN") end
  core.check_function(3, factory)
  arguments.check_token(4, token)
end

---The value under the key; if there is none, that of `factory(key)`, which then is kept. Callers that come
---while the factory runs wait for the same call.
---Cancellation: ends this caller's wait; the factory is canceled when no caller is left, and nothing is kept.
---Raises: what the factory raised; failures are not kept.
---@param key any neither nil nor NaN
---@param factory fun(key: any): ... runs in the empty execution context, and under no caller's token
---@param token? coflow.CancellationToken
---@return any ...
function AsyncCache:get_or_add(key, factory, token)
  check_get(self, key, factory, token)
  drop_expired(self)
  local entry = self._entries[key]
  if not entry then
    core.check_here()
    core.throw_if_canceled(token)
    local made = { key = key }
    made.flight = flight.new(make, function() drop(self, made) end, self, made, factory)
    core.name_after(made.flight.task, factory)
    entry = self._entries[key]
    if not entry then
      entry = made
      self._entries[key] = made
      self._count = self._count + 1
      made.flight:launch()
    end
  elseif entry.expires then
    remove(self._used, entry)
    append(self._used, entry)
  end
  return entry.flight:join(token)
end

AsyncCache.get_or_add_async = arguments.twin(AsyncCache.get_or_add, check_get)

---Forgets the value under the key. A factory that is making it goes on, for those who wait.
---@param key any
---@return boolean whether there was one
function AsyncCache:invalidate(key)
  check(self)
  drop_expired(self)
  local entry = key ~= nil and self._entries[key]
  if entry then drop(self, entry) end
  return entry and true or false
end

---Forgets all values.
function AsyncCache:clear()
  check(self)
  self._entries, self._count = {}, 0
  self._used = new_list("next_used", "previous_used")
  self._made = new_list("next_made", "previous_made")
end

local known_options = { time_to_live = true, max_entries = true }

---A cache.
---@param options? { time_to_live?: number, max_entries?: integer } seconds from the making of a value to its end;
---values kept at most, those being made included: over that, those that were used longest ago go
---@return coflow.AsyncCache
local function new(options)
  options = core.check_options(1, options, known_options)
  local time_to_live, max_entries = options.time_to_live or math.huge, options.max_entries or math.huge
  if not arguments.is_seconds(time_to_live) then
    core.argument_error(1, "time_to_live must be a number of seconds, not negative")
  elseif not arguments.is_count(max_entries, 1) then
    core.argument_error(1, "max_entries must be a positive integer")
  end
  local cache = setmetatable({ _time_to_live = time_to_live, _max_entries = max_entries }, class)
  cache:clear()
  return cache
end

return { AsyncCache = new }
