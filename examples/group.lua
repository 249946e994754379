--[[
group.lua - work that many tasks share, and none of them outlives.

A group returns when all that was started in it has ended: with the values of its body, or with the error of the
first one that failed, which has ended the others. Who calls `check_all` need not know that it has tasks.

    lua5.4 examples/group.lua

SPDX-License-Identifier: MIT
]]

local flow = require "coflow"

local seconds = { ["a.txt"] = 0.015, ["b.txt"] = 0.01, ["c.txt"] = 0.01, ["big.txt"] = 60 }

-- Stands for reading a file on a slow disk.
local function read(name)
  local done = false
  local _ <close> = setmetatable({}, {
    __close = function() if not done then print(name .. ": put away") end end,
  })
  flow.sleep(seconds[name] or 0.005)
  if not seconds[name] then error(name .. ": no such file", 0) end
  done = true
  return #name
end

-- The number of letters in the names of all files, two of which are read at a time.
local function check_all(...)
  local names, total = { ... }, 0
  flow.task_group(function(group)
    for _, name in ipairs(names) do
      group:spawn(function()
        local length = read(name) -- first the wait, then the total: others change it meanwhile
        total = total + length
        print(name .. ": read")
      end)
    end
  end, { limit = 2 })
  return total
end

-- Answers until the group is asked to stop, then what has come in by then.
local function serve(group, name, pace)
  local served = 0
  while not group.is_stopping do
    flow.sleep(pace)
    served = served + 1
  end
  print(name .. (served > 0 and ": served some, ended by itself" or ": served none"))
end

local function main()
  print(check_all("a.txt", "b.txt", "c.txt"))
  --> b.txt: read
  --> a.txt: read
  --> c.txt: read
  --> 15

  -- The first failure ends the others, and comes out when they have ended. c.txt has not begun, and never does.
  print(pcall(check_all, "big.txt", "lost.txt", "c.txt"))
  --> lost.txt: put away
  --> big.txt: put away
  --> false	lost.txt: no such file

  -- Asking two, taking the first good answer.
  print(flow.race {
    function() return "from the far mirror", read("big.txt") end,
    function() return "from the near mirror", read("b.txt") end,
    function() return "from the broken one", read("lost.txt") end,
  })
  --> lost.txt: put away
  --> big.txt: put away
  --> from the near mirror	5

  -- A graceful end: whoever waits or works is told, and interrupted only after the grace.
  flow.task_group(function(group)
    group:spawn(serve, group, "quick", 0.005)
    local slow = group:spawn(serve, group, "slow", 60)
    flow.sleep(0.03)
    group:stop()
    print("asked to stop")
    flow.shield(slow.try_await, slow) -- the body is in the group as well
    print("slow: " .. slow.status)
  end, { grace = 0.05 })
  print("stopped")
  --> asked to stop
  --> quick: served some, ended by itself
  --> slow: canceled
  --> stopped
end

os.exit(flow.main(main), true)
