--[[
timeout.lua - a page that is ready in time, whatever its parts do.

Each part of the page has a deadline, and so has the page. Nothing is handed down for that: `load` and `save` know
of no deadline, and every wait in them ends when one passes, wherever it was set.

    lua5.4 examples/timeout.lua

SPDX-License-Identifier: MIT
]]

local flow = require "coflow"

-- Stands for a request to another machine.
local function load(part, seconds)
  flow.sleep(seconds)
  return "[" .. part .. "]"
end

-- The part, or what stands in for it when it is not there within `seconds`.
local function part_within(seconds, part, takes)
  local ok, result = pcall(flow.with_timeout, seconds, load, part, takes)
  if ok then return result end
  -- Only the deadline of this part is ours to deal with. When the page's passes it is OperationCanceled, and goes on.
  if not flow.errors.is(result, "Timeout") then error(result, 0) end
  return "(no " .. part .. ")"
end

local function page(pace)
  local left, right = flow.await_all(
    flow.spawn(part_within, 0.05, "news", 0.005 * pace),
    flow.spawn(part_within, 0.05, "weather", 60))
  return left .. " " .. right
end

-- Writes in two steps that belong together: if the second one is cut short, the first is undone.
local function save(name, seconds)
  local done = false
  local _ <close> = setmetatable({}, {
    __close = function()
      if done then return end
      flow.shield({ grace = 1 }, function() -- in here waits are allowed again, for a second at most
        flow.sleep(0.005)
        print(name .. ": undone")
      end)
    end,
  })
  print(name .. ": begun")
  flow.sleep(seconds)
  done = true
  print(name .. ": saved")
end

local function main()
  print(flow.with_timeout(5, page, 1))
  --> [news] (no weather)
  print(pcall(flow.with_timeout, 0.02, page, 1000))
  --> false	Timeout: the operation did not complete within 0.02 s

  flow.with_timeout(5, function()
    save("draft", 0.005)
    --> draft: begun
    --> draft: saved
    local ok, err = pcall(flow.with_timeout, 0.02, save, "final", 60)
    --> final: begun
    --> final: undone
    print(ok, err.name, flow.deadline() > 4) -- the inner deadline has passed, most of the outer is left
    --> false	Timeout	true
  end)

  local task = flow.spawn(save, "last", 60)
  flow.yield() -- let it begin
  --> last: begun
  task:cancel("the editor was closed") -- as a deadline does
  print(select(2, task:try_await()))
  --> last: undone
  --> OperationCanceled: the operation was canceled: the editor was closed
end

os.exit(flow.main(main), true)
