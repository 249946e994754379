--[[
luv.lua - the rival `luv+lua`: luv, with the small task layer of luv_task.lua above it.

The same event loop as coflow's, everything else in Lua.
SPDX-License-Identifier: MIT
]]
package.path = arg[0]:gsub("[^/]*$", "") .. "../?.lua;" .. package.path
local measure = require "measure"
local task = require "rivals.luv_task"
local uv = require "luv"

local spawn, yield = task.spawn, task.yield
local time, keep = measure.time, measure.keep
local W = {}

measure.now = uv.hrtime

local function identity(x) return x end
local function nothing() end

function W.w1_switch(n)
  return time(function(k) for _ = 1, k do yield() end end, n)
end

function W.w1_1k(n)
  return time(function(rounds)
    local tasks = {}
    local function body() for _ = 1, rounds do yield() end end
    for i = 1, 1000 do tasks[i] = spawn(body) end
    task.all(tasks)
  end, n // 1000) / 1000
end

function W.w1_async(n) -- a hop through uv_async_send, as many wrappers make it
  local co = coroutine.running()
  local async = uv.new_async(function() coroutine.resume(co) end)
  return time(function(k)
    for _ = 1, k do
      async:send()
      coroutine.yield()
    end
  end, n)
end

function W.w2_spawn_await(n)
  return time(function(k) for i = 1, k do spawn(identity, i):await() end end, n)
end

function W.w2_async_await(n)
  local start = task.start
  return time(function(k) for i = 1, k do start(identity, i):await() end end, n)
end

function W.w3_await_done(n)
  local done = spawn(identity, 1)
  done:await()
  return time(function(k) for _ = 1, k do done:await() end end, n)
end

local function all(size)
  return function(n)
    return time(function(rounds)
      for _ = 1, rounds do
        local tasks = {}
        for i = 1, size do
          tasks[i] = spawn(function()
            yield()
            return i
          end)
        end
        task.all(tasks)
      end
    end, math.max(1, n // size), 1) / size
  end
end
W.w4_all_1k, W.w4_all_100k = all(1000), all(100000)

local function any(size)
  return function(n)
    local tasks = {}
    for i = 1, size - 1 do tasks[i] = task.pending() end
    local function body() yield() end
    return time(function(k)
      for _ = 1, k do
        tasks[size] = spawn(body)
        task.any(tasks)
      end
    end, n)
  end
end
W.w5_any_2, W.w5_any_100 = any(2), any(100)

local function channel(capacity)
  return function(n)
    return time(function(k)
      local ch = task.channel(capacity)
      local writer = spawn(function() for i = 1, k do ch.write(i) end end)
      local reader = spawn(function() for _ = 1, k do ch.read() end end)
      writer:await()
      reader:await()
    end, n)
  end
end
W.w7_chan_1, W.w7_chan_100, W.w7_chan_unb = channel(1), channel(100), channel(math.huge)

function W.w8_timer_cancel(n)
  local start = measure.now()
  local _, bytes, timers = keep(n, function(i)
    local timer = uv.new_timer()
    timer:start(3600000 + i % 1000, 0, nothing)
    return timer
  end)
  for i = 1, n do timers[i]:close() end
  return (measure.now() - start) / n, bytes
end

function W.w8_timer_fire(n) -- processor time: most of the 100 ms is spent asleep
  local co, left, start = coroutine.running(), n, measure.cpu()
  for i = 1, n do
    local timer = uv.new_timer()
    timer:start(i * 100 // n, 0, function()
      timer:close()
      left = left - 1
      if left == 0 then task.ready(co) end
    end)
  end
  coroutine.yield()
  return (measure.cpu() - start) / n
end

function W.w9_mem(n)
  local gate, parked = task.pending(), 0
  local function park()
    parked = parked + 1
    gate:await()
  end
  return keep(n, function() return spawn(park) end, function()
    while parked < n do yield() end
  end)
end

local function pool(in_flight)
  return function(n)
    local co, left = coroutine.running(), 0
    local work = uv.new_work(identity, function()
      left = left - 1
      if left == 0 then task.ready(co) end
    end)
    return time(function(k)
      for i = 1, k // in_flight do
        left = in_flight
        for _ = 1, in_flight do work:queue(i) end
        coroutine.yield()
      end
    end, n)
  end
end
W.w11_pool, W.w11_pool_64 = pool(1), pool(64)

measure.main("luv+lua", W, task.run)
