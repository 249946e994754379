-- bench/echo.lua <port> - W12: an echo server, a coroutine per connection.
--
-- SPDX-License-Identifier: MIT

local flow = require "coflow"

local port = assert(math.tointeger(tonumber(arg[1])), "usage: lua5.4 bench/echo.lua <port>")

flow.run(function()
  local listener <close> = flow.net.listen("127.0.0.1", port)
  listener:serve(function(stream)
    while true do
      local data = stream:read()
      if not data then break end
      stream:write(data)
    end
  end)
end)
