--[[
cqueues.lua - the rival cqueues: its own event loop and coroutine scheduler, written in C.

Its promises stand for tasks. It has no timer objects: a timer is a coroutine that sleeps.
SPDX-License-Identifier: MIT
]]
package.path = arg[0]:gsub("[^/]*$", "") .. "../?.lua;" .. package.path
local measure = require "measure"
local cqueues = require "cqueues"
local condition = require "cqueues.condition"
local promise = require "cqueues.promise"

local poll, sleep = cqueues.poll, cqueues.sleep
local time = measure.time
local loop = cqueues.new()
local W = {}

function measure.now() return cqueues.monotime() * 1e9 end

local function identity(x) return x end

-- Wraps count coroutines of body(i) and waits until all have returned.
local function together(count, body)
  local left, done = count, condition.new()
  for i = 1, count do
    loop:wrap(function()
      body(i)
      left = left - 1
      if left == 0 then done:signal() end
    end)
  end
  while left > 0 do done:wait() end
end

function W.w1_switch(n)
  return time(function(k) for _ = 1, k do sleep(0) end end, n)
end

function W.w1_1k(n)
  return time(function(rounds)
    together(1000, function() for _ = 1, rounds do sleep(0) end end)
  end, n // 1000) / 1000
end

function W.w2_spawn_await(n)
  return time(function(k) for i = 1, k do promise.new(identity, i):get() end end, n)
end

function W.w3_await_done(n)
  local done = promise.new(identity, 1)
  done:get()
  return time(function(k) for _ = 1, k do done:get() end end, n)
end

local function all(size)
  return function(n)
    return time(function(rounds)
      for _ = 1, rounds do
        local promises = {}
        for i = 1, size do
          promises[i] = promise.new(function()
            sleep(0)
            return i
          end)
        end
        for i = 1, size do promises[i]:get() end
      end
    end, math.max(1, n // size), 1) / size
  end
end
W.w4_all_1k, W.w4_all_100k = all(1000), all(100000)

local function any(size)
  return function(n)
    local promises = {}
    for i = 1, size - 1 do promises[i] = promise.new() end
    local function body() sleep(0) end
    return time(function(k)
      for _ = 1, k do
        promises[size] = promise.new(body)
        poll(table.unpack(promises, 1, size))
      end
    end, n)
  end
end
W.w5_any_2, W.w5_any_100 = any(2), any(100)

local function channel(capacity) -- what its users write: a table and two conditions
  return function(n)
    return time(function(k)
      local items, head, tail = {}, 1, 0
      local not_empty, not_full = condition.new(), condition.new()
      local function write()
        for i = 1, k do
          while tail - head + 1 >= capacity do not_full:wait() end
          tail = tail + 1
          items[tail] = i
          not_empty:signal(1)
        end
      end
      local function read()
        for _ = 1, k do
          while head > tail do not_empty:wait() end
          local item = items[head]
          items[head] = nil
          head = head + 1
          assert(item)
          not_full:signal(1)
        end
      end
      together(2, function(i) if i == 1 then write() else read() end end)
    end, n)
  end
end
W.w7_chan_1, W.w7_chan_100, W.w7_chan_unb = channel(1), channel(100), channel(math.huge)

function W.w8_timer_fire(n)
  local start = measure.cpu()
  together(n, function(i) sleep(i / n * 0.1) end)
  return (measure.cpu() - start) / n
end

function W.w9_mem(n)
  local gate, parked = condition.new(), 0
  local function park()
    parked = parked + 1
    gate:wait()
  end
  return measure.keep(n, function() return loop:wrap(park) end, function()
    while parked < n do sleep(0) end
  end)
end

measure.main("cqueues", W, function(main)
  loop:wrap(main)
  assert(loop:loop())
end)
