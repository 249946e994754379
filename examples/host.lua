--[[
host.lua - a service host: a shop that takes orders, a packer that packs them, and a queue between the two.

SIGTERM stops it gracefully: the shop closes, what was ordered is packed, and only then the process ends, with exit code
0. (Here the third customer sends the signal; a process manager would do it, or you with Ctrl-C, which is SIGINT.)

    lua5.4 examples/host.lua; echo $?

SPDX-License-Identifier: MIT
]]

local flow = require "coflow"

-- Takes orders until it is to stop. Whatever it waits for is interrupted then, and the queue is closed.
local function shop(orders)
  return flow.BackgroundService(function(stopping_token)
    local _ <close> = setmetatable({}, {
      __close = function()
        print("the shop closes")
        orders:complete()
      end,
    })
    for number = 1, 3 do
      orders:write(number)
      print(("order %d is taken"):format(number))
    end
    os.execute("kill -TERM $PPID")
    stopping_token:wait() -- no more customers
  end)
end

-- Packs until the queue is closed and empty, out of reach of its own cancellation: an order is a promise.
local function packer(orders)
  return flow.BackgroundService(function()
    flow.shield(function()
      for number in orders:iterate() do
        flow.sleep(0.05)
        print(("order %d is packed"):format(number))
      end
    end)
    print("all is packed")
  end)
end

local function main()
  local orders = flow.Channel.bounded(10)
  local host = flow.Host { shutdown_timeout = 10 }
  host:add(packer(orders)) -- started first, and stopped last
  host:add(shop(orders))
  host:run()
  print("the host has stopped")
end

os.exit(flow.main(main), true)

--> order 1 is taken
--> order 2 is taken
--> order 3 is taken
--> the shop closes
--> order 1 is packed
--> order 2 is packed
--> order 3 is packed
--> all is packed
--> the host has stopped
