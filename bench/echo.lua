-- bench/echo.lua <port> - W12: an echo server, a coroutine per connection.
--
-- The methods in locals, as in workloads.lua: a stream has properties, so looking one up is a call.
-- SPDX-License-Identifier: MIT

local flow = require "coflow"

local port = assert(math.tointeger(tonumber(arg[1])), "usage: lua5.4 bench/echo.lua <port>")

flow.run(function()
  local listener <close> = flow.net.listen("127.0.0.1", port)
  listener:serve(function(stream)
    local read, write = stream.read, stream.write
    while true do
      local data = read(stream)
      if not data then break end
      write(stream, data)
    end
  end)
end)
