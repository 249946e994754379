-- hello.lua - the first program: two things at once, and what order they come in.
--
--     lua5.4 examples/hello.lua [name]
--
-- SPDX-License-Identifier: MIT

local flow = require "coflow"

-- An ordinary function. It waits, and need not say so.
local function brew(drink, seconds)
  flow.sleep(seconds)
  return drink
end

local function main(name)
  print("hello, " .. (name or "you"))     --> hello, you
  local orders = {
    flow.spawn(brew, "tea", 0.06),
    flow.spawn(brew, "coffee", 0.02),
    flow.spawn(brew, "water", 0),
  }
  print("all is ordered")                 --> all is ordered
  for task in flow.when_each(orders) do   -- in the order in which they end
    print("  " .. task.result)
  end
  -->   water
  -->   coffee
  -->   tea

  local tea, coffee = flow.await_all(orders) -- in the order of the list, and complete already
  print(tea .. " and " .. coffee)         --> tea and coffee
end

os.exit(flow.main(main, ...), true)
