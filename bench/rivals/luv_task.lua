--[[
luv_task.lua - the task layer that people write on luv: the rival `luv+lua` is this and luv.

Plain Lua, no more than the workloads need: a FIFO of coroutines drained from a uv idle handle,
tasks with a list of waiters, all, any, and a channel. It has no cancellation, no async locals,
no tracebacks and one result a task, so it does less than coflow for each operation.
SPDX-License-Identifier: MIT
]]
local uv = require "luv"
local create, resume, running, yield =
  coroutine.create, coroutine.resume, coroutine.running, coroutine.yield

local M = {}
local Task = {}
Task.__index = Task

-- ---- the ready queue: queue[first .. last]; the idle handle is active while it is not empty

local BATCH = 1000 -- resumed between two polls of the loop
local queue, first, last = {}, 1, 0
local idle, active = uv.new_idle(), false

local function drain()
  for _ = 1, BATCH do
    if first > last then break end
    local co = queue[first]
    queue[first] = nil
    first = first + 1
    local ok, err = resume(co)
    if not ok then error(err) end
  end
  if first > last then
    first, last, active = 1, 0, false
    idle:stop()
  end
end

local function ready(co)
  last = last + 1
  queue[last] = co
  if not active then
    active = true
    idle:start(drain)
  end
end
M.ready = ready

function M.yield()
  ready((running()))
  yield()
end

-- ---- tasks: a waiter is a coroutine to make ready or a function to call with the task

local function settle(task, ok, value)
  task.done, task.ok, task.value = true, ok, value
  local waiters = task.waiters
  if not waiters then return end
  task.waiters = nil
  for i = 1, #waiters do
    local waiter = waiters[i]
    if type(waiter) == "thread" then ready(waiter) else waiter(task) end
  end
end

---A task without a function, for ever pending here.
function M.pending() return setmetatable({ done = false }, Task) end

---Queues f(x) as a task.
function M.spawn(f, x)
  local task = setmetatable({ done = false }, Task)
  ready(create(function() settle(task, pcall(f, x)) end))
  return task
end

---Starts f(x) at once.
function M.start(f, x)
  local task = setmetatable({ done = false }, Task)
  resume(create(function() settle(task, pcall(f, x)) end))
  return task
end

function Task:await()
  if not self.done then
    local waiters = self.waiters
    if waiters then waiters[#waiters + 1] = running() else self.waiters = { (running()) } end
    yield()
  end
  if not self.ok then error(self.value, 0) end
  return self.value
end

function M.all(tasks)
  local me, left, parked = running(), 0, false
  local function one_done()
    left = left - 1
    if left == 0 and parked then ready(me) end
  end
  for i = 1, #tasks do
    local task = tasks[i]
    if not task.done then
      left = left + 1
      local waiters = task.waiters
      if waiters then waiters[#waiters + 1] = one_done else task.waiters = { one_done } end
    end
  end
  if left > 0 then
    parked = true
    yield()
  end
  local results = {}
  for i = 1, #tasks do results[i] = tasks[i].value end
  return results
end

function M.any(tasks)
  for i = 1, #tasks do
    if tasks[i].done then return tasks[i] end
  end
  local me, winner = running(), nil
  local function first_done(task)
    if winner then return end
    winner = task
    ready(me)
  end
  for i = 1, #tasks do
    local task = tasks[i]
    local waiters = task.waiters
    if waiters then waiters[#waiters + 1] = first_done else task.waiters = { first_done } end
  end
  yield()
  for i = 1, #tasks do -- unregister, or tasks that live long would leak
    local waiters = tasks[i].waiters
    if waiters then
      for j = #waiters, 1, -1 do
        if waiters[j] == first_done then
          table.remove(waiters, j)
          break
        end
      end
    end
  end
  return winner
end

-- ---- a channel for one writer and one reader

function M.channel(capacity)
  local items, head, tail, reader, writer = {}, 1, 0, nil, nil
  local channel = {}
  function channel.write(value)
    while tail - head + 1 >= capacity do
      writer = running()
      yield()
    end
    tail = tail + 1
    items[tail] = value
    local co = reader
    if co then
      reader = nil
      ready(co)
    end
  end
  function channel.read()
    while head > tail do
      reader = running()
      yield()
    end
    local value = items[head]
    items[head] = nil
    head = head + 1
    local co = writer
    if co then
      writer = nil
      ready(co)
    end
    return value
  end
  return channel
end

---Runs main as a task and the loop until nothing is left.
function M.run(main)
  local task = M.spawn(main)
  uv.run()
  if not task.ok then error(task.value, 0) end
end

return M
