--[[
frame_loop.lua - coflow inside a host that owns the main loop: a game that draws a frame at a time.

    lua5.4 examples/frame_loop.lua

A frame of this host is: events, a turn of coflow's loop, what was posted, drawing. Code under the host's
synchronization context goes on in the third step only, where it may touch the scene; whatever needs no scene (here:
reading a level) runs in the second. A host with a window does the same between two of its frames.

SPDX-License-Identifier: MIT
]]

local flow = require "coflow"
local SynchronizationContext, TaskScheduler = flow.SynchronizationContext, flow.TaskScheduler

-- The host ----------------------------------------------------------------------------------------

local host = { frame = 0, step = "none", scene = {}, posted = {}, pressed = {} }

host.context = SynchronizationContext.new {
  post = function(_, continuation) table.insert(host.posted, continuation) end,
}

-- A task of the next frame, and of the next press of that key: what the game waits for.
function host.next_frame()
  host.tick = host.tick or flow.TaskCompletionSource()
  return host.tick.task
end

function host.press_of(key)
  host.pressed[key] = host.pressed[key] or flow.TaskCompletionSource()
  return host.pressed[key].task
end

local function complete(source)
  if source then source:set_result() end -- wakes who waits: nothing of it runs here
end

local function events(key)
  local tick, press = host.tick, key and host.pressed[key]
  host.tick = nil
  complete(tick)
  complete(press)
end

local function run_posted()
  local now = host.posted
  host.posted = {} -- what these lead to is for the next frame
  for _, continuation in ipairs(now) do continuation() end
end

-- Only in its own step of the frame may anybody touch the scene.
local function draw_at(x, what)
  assert(host.step == "posted", "the scene was touched during: " .. host.step)
  host.scene[x] = what
end

local function draw()
  local line = {}
  for x = 1, 16 do line[x] = host.scene[x] or "_" end
  print(("%2d %s"):format(host.frame, table.concat(line)))
end

local function run_frame(key)
  host.frame = host.frame + 1
  host.step = "events"
  events(key)
  host.step = "loop"
  flow.loop.run("nowait") -- never waits; it posts what is ready to go on
  host.step = "posted"
  run_posted()
  host.step = "drawing"
  draw()
end

-- The game ----------------------------------------------------------------------------------------

-- Knows nothing of frames or contexts: it runs wherever it is spawned.
local function read_level()
  for _ = 1, 3 do host.next_frame():await() end -- a slow disk
  return { 9, 12, 15 }
end

local fly = flow.async(function(stop)
  local x = 1
  while not stop.is_completed do
    draw_at(x, ">")
    host.next_frame():await()
    draw_at(x, nil)
    x = x + 1
  end
  draw_at(x, "#")
  return x
end)

local game = flow.async(function()
  SynchronizationContext.set(host.context) -- undone for whoever called us
  host.next_frame():await()

  local level = flow.spawn(read_level)     -- not under our context: it runs in the loop's turn
  local stop = host.press_of("space")
  local ship = fly(stop)                   -- hot: starts at once, here, and goes on under our context

  for _, x in ipairs(level:await()) do draw_at(x, "*") end
  local x = ship:await()

  -- Work given to this scheduler comes back to the same step of a frame, whoever gives it.
  local scene = TaskScheduler.from_current_synchronization_context()
  flow.spawn(function()
    return flow.spawn_on(scene, draw_at, x + 1, "!"):await()
  end):await()
  return x
end)

-- The program ---------------------------------------------------------------------------------------

local task = game()
assert(SynchronizationContext.current() == nil)
local keys = { [7] = "space" } -- frame -> key
repeat
  run_frame(keys[host.frame + 1])
until task.is_completed
print(("%s after %d frames: landed at %d"):format(task.status, host.frame, task.result))

-->  1 >_______________
-->  2 _>______________
-->  3 __>_____________
-->  4 ___>____________
-->  5 ____>___*__*__*_
-->  6 _____>__*__*__*_
-->  7 ______#_*__*__*_
-->  8 ______#_*__*__*_
-->  9 ______#!*__*__*_
--> 10 ______#!*__*__*_
--> ran_to_completion after 10 frames: landed at 7
