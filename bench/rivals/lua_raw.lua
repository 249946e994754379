--[[
lua_raw.lua - the rival that is no library: bare coroutines, weak tables, plain closures.

What the virtual machine itself charges. There is no scheduler, no task object and no error handling
here, so these are limits more than alternatives. Async locals are what people write by hand: a weak
table keyed by coroutine, whose maps are copied on write so that children can share them.
SPDX-License-Identifier: MIT
]]
package.path = arg[0]:gsub("[^/]*$", "") .. "../?.lua;" .. package.path
local measure = require "measure"

local create, resume, running, yield =
  coroutine.create, coroutine.resume, coroutine.running, coroutine.yield
local time, keep = measure.time, measure.keep
local W = {}

local has_luv, uv = pcall(require, "luv")
if has_luv then measure.now = uv.hrtime end -- the same clock as the others'

local function identity(x) return x end
local function nothing() end
local function forever() while true do yield() end end

function W.w1_switch(n)
  local co = create(forever)
  return time(function(k) for _ = 1, k do resume(co) end end, n)
end

function W.w1_1k(n)
  local cos = {}
  for i = 1, 1000 do cos[i] = create(forever) end
  return time(function(rounds)
    for _ = 1, rounds do
      for i = 1, 1000 do resume(cos[i]) end
    end
  end, n // 1000) / 1000
end

function W.w2_spawn_await(n)
  return time(function(k) for i = 1, k do resume(create(identity), i) end end, n)
end
W.w2_async_await = W.w2_spawn_await -- a new coroutine is always a hot start

-- ---- async locals by hand

local maps = setmetatable({}, { __mode = "k" })

local function get(key)
  local map = maps[running()]
  return map and map[key]
end

local function set(key, value)
  local co = running()
  local copy = {}
  for k, v in next, maps[co] do copy[k] = v end
  copy[key] = value
  maps[co] = copy
end

local function spawn(f, x)
  local co = create(f)
  maps[co] = maps[running()]
  return resume(co, x)
end

-- A map with k entries for the running coroutine; gives the last one's key.
local function with_locals(k)
  local map, key = {}, nil
  for i = 1, k do
    key = {}
    map[key] = i
  end
  maps[running()] = map
  return key
end

for _, k in ipairs { 1, 8, 64, 1000 } do
  W["w6_get_" .. k] = function(n)
    local key = with_locals(k)
    return time(function(m) for _ = 1, m do get(key) end end, n)
  end
  W["w6_set_" .. k] = function(n)
    local key = with_locals(k)
    return time(function(m) for i = 1, m do set(key, i) end end, n)
  end
end

for _, k in ipairs { 0, 1, 8, 64, 1000 } do
  W["w6_flow_" .. k] = function(n)
    with_locals(k)
    return time(function(m) for i = 1, m do spawn(identity, i) end end, n)
  end
end

-- ---- memory

function W.w9_mem(n)
  local function park() yield() end
  return keep(n, function()
    local co = create(park)
    resume(co)
    return co
  end)
end

function W.w9_ctx(n)
  local key = {}
  return keep(n, function(i) return { [key] = i } end)
end

-- ---- callbacks in a table

function W.w10_reg(n)
  local callbacks = {} -- luacheck: ignore (a set; nobody cancels)
  local function register(f)
    local registration = {}
    callbacks[registration] = f
    return registration
  end
  local function unregister(registration) callbacks[registration] = nil end
  return time(function(k) for _ = 1, k do unregister(register(nothing)) end end, n)
end

function W.w10_cancel(n)
  local callbacks = {}
  local start = measure.now()
  for _ = 1, n do callbacks[{}] = nothing end
  for _, f in next, callbacks do f() end
  return (measure.now() - start) / n
end

measure.main("lua-raw", W, function(f) assert(resume(create(f))) end)
