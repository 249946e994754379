--[[
workloads.lua - what coflow's operations cost: one function for each row of `make bench`.

    lua5.4 bench/workloads.lua <workload> <n>      (or: list)

Each does the same work as the workload of that name in rivals/, written as a user would write it
when speed matters: library functions in locals, no object made that the operation does not need.
A new one is a function here and a row in plan.lua.
SPDX-License-Identifier: MIT
]]
package.path = arg[0]:gsub("[^/]*$", "") .. "?.lua;" .. package.path
local measure = require "measure"
local flow = require "coflow"

local await, spawn, yield, when_all = flow.await, flow.spawn, flow.yield, flow.when_all
local time, keep = measure.time, measure.keep
local W = {}

local clock = flow.loop.now
function measure.now() return clock() * 1e9 end

local function identity(x) return x end
local function nothing() end

-- ---- W1: a switch: yield, and be resumed when everything else that is ready has run

function W.w1_switch(n)
  return time(function(k) for _ = 1, k do yield() end end, n)
end

function W.w1_1k(n)
  return time(function(rounds)
    local tasks = {}
    local function body() for _ = 1, rounds do yield() end end
    for i = 1, 1000 do tasks[i] = spawn(body) end
    await(when_all(tasks))
  end, n // 1000) / 1000
end

-- ---- W2: a task from start to awaited end

function W.w2_spawn_await(n)
  return time(function(k) for i = 1, k do await(spawn(identity, i)) end end, n)
end

function W.w2_async_await(n)
  local hot = flow.async(identity)
  return time(function(k) for i = 1, k do await(hot(i)) end end, n)
end

function W.w2_chain(n) -- n tasks, each awaiting the one before it
  local function link(previous) return (await(previous)) end
  local start = measure.now()
  local source = flow.TaskCompletionSource()
  local last = source.task
  for _ = 1, n do last = spawn(link, last) end
  yield()
  assert(last.status == "waiting_for_activation")
  source:set_result(n)
  assert(await(last) == n)
  return (measure.now() - start) / n
end

-- ---- W3: a task that is already complete

function W.w3_await_done(n)
  local task = spawn(identity, 1)
  await(task)
  return time(function(k) for _ = 1, k do await(task) end end, n)
end

-- ---- W4, W5: all and any

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
        await(when_all(tasks))
      end
    end, math.max(1, n // size), 1) / size
  end
end
W.w4_all_1k, W.w4_all_100k = all(1000), all(100000)

local function any(size) -- all but one never complete; bytes: what an operation leaves behind
  return function(n)
    local sources, tasks = {}, {}
    for i = 1, size - 1 do
      sources[i] = flow.TaskCompletionSource()
      tasks[i] = sources[i].task
    end
    local await_any = flow.await_any
    local function body() yield() end
    local function run(k)
      for _ = 1, k do
        tasks[size] = spawn(body)
        await_any(tasks)
      end
    end
    local ns = time(run, n)
    return ns, measure.growth(run, n)
  end
end
W.w5_any_2, W.w5_any_100 = any(2), any(100)

-- ---- W6: async locals, with k of them set

local function set_locals(k)
  local list = {}
  for i = 1, k do
    list[i] = flow.AsyncLocal()
    list[i]:set(i)
  end
  return list
end

for _, k in ipairs { 1, 8, 64, 1000 } do
  W["w6_get_" .. k] = function(n)
    local loc = set_locals(k)[k]
    local get = loc.get
    return time(function(m) for _ = 1, m do get(loc) end end, n)
  end
  W["w6_set_" .. k] = function(n)
    local loc = set_locals(k)[k]
    local set = loc.set
    return time(function(m) for i = 1, m do set(loc, i) end end, n)
  end
end

function W.w6_value_8(n) -- the everyday spelling of w6_get_8
  local loc = set_locals(8)[8]
  return time(function(m) for _ = 1, m do local _ = loc.value end end, n)
end

for _, k in ipairs { 0, 1, 8, 64, 1000 } do
  W["w6_flow_" .. k] = function(n) -- w2_spawn_await, the task inheriting k locals
    set_locals(k)
    return W.w2_spawn_await(n)
  end
end

-- ---- W7: an item through a channel, one writer and one reader

local function channel(make, capacity)
  return function(n)
    local new = flow.Channel[make]
    return time(function(k)
      local ch = new(capacity)
      local write, read = ch.write, ch.read
      local writer = spawn(function() for i = 1, k do write(ch, i) end end)
      local reader = spawn(function() for _ = 1, k do read(ch) end end)
      await(writer)
      await(reader)
    end, n)
  end
end
W.w7_chan_1, W.w7_chan_100 = channel("bounded", 1), channel("bounded", 100)
W.w7_chan_unb = channel("unbounded")

-- ---- W8: timers

function W.w8_timer_cancel(n)
  local Timer = flow.Timer
  local start = measure.now()
  local _, bytes, timers = keep(n, function(i) return Timer(nothing, 3600 + i % 1000 / 1000) end)
  for i = 1, n do timers[i]:dispose() end
  return (measure.now() - start) / n, bytes
end

function W.w8_timer_fire(n) -- processor time: most of the 100 ms is spent asleep
  local Timer = flow.Timer
  local done, left, start = flow.TaskCompletionSource(), n, measure.cpu()
  local function fire()
    left = left - 1
    if left == 0 then done:set_result() end
  end
  for i = 1, n do Timer(fire, i * 0.1 / n) end
  await(done.task)
  return (measure.cpu() - start) / n
end

-- ---- W9: memory

function W.w9_mem(n) -- n tasks parked on one completion source
  local source = flow.TaskCompletionSource()
  local gate = source.task
  local function park() await(gate) end
  local ns, bytes, tasks = keep(n, function() return spawn(park) end, yield)
  assert(tasks[n].status == "waiting_for_activation")
  return ns, bytes
end

function W.w9_ctx(n) -- a captured context that holds one local
  local loc, capture = flow.AsyncLocal(), flow.ExecutionContext.capture
  return keep(n, function(i)
    loc:set(i)
    return capture()
  end)
end

-- ---- W10: cancellation callbacks

function W.w10_reg(n)
  local token = flow.CancellationTokenSource().token
  local register, unregister = token.register, token:register(nothing).unregister
  return time(function(k) for _ = 1, k do unregister(register(token, nothing)) end end, n)
end

function W.w10_cancel(n)
  local source = flow.CancellationTokenSource()
  local token = source.token
  local register = token.register
  collectgarbage()
  local start = measure.now()
  for _ = 1, n do register(token, nothing) end
  source:cancel()
  return (measure.now() - start) / n
end

-- ---- W14: scopes

function W.w14_timeout(n) -- a deadline that does not fire, around one hop
  local with_timeout = flow.with_timeout
  return time(function(k) for _ = 1, k do with_timeout(30, yield) end end, n)
end

function W.w14_group(n) -- a group of ten children
  local task_group = flow.task_group
  local function ten(group) for i = 1, 10 do group:spawn(identity, i) end end
  return time(function(k) for _ = 1, k do task_group(ten) end end, n // 10)
end

-- ---- W15: how cost grows: the same with n tasks parked beside, each under a deadline

for _, beside in ipairs { 1000, 100000, 1000000 } do
  for _, name in ipairs { "w1_switch", "w2_spawn_await", "w6_get_8", "w6_set_8" } do
    W[("w15_%s_%d"):format(name:sub(1, 2) == "w6" and name:sub(1, 6) or name:sub(1, 2), beside)] = function(n)
      local source = flow.TaskCompletionSource()
      local function park() flow.with_timeout(3600, await, source.task) end
      for _ = 1, beside do spawn(park) end
      yield()
      return W[name](n)
    end
  end
end

measure.main("coflow", W, flow.run)
