--[[
generator.lua - generators that await: pages fetched when they are needed, cut into lines, by two plain loops.

A report lies on a server in pages that end anywhere, also in the middle of a line. `pages` fetches one at a time,
and only when the loop asks for it; `lines` puts the lines together. Both are ordinary generators. That they wait
for the server does not show in the code that uses them, and meanwhile other tasks go on.

    lua5.4 examples/generator.lua

SPDX-License-Identifier: MIT
]]

local flow = require "coflow"
local coroutine = flow.coroutine -- all that is needed; or, for code of others: flow.coroutine.install()

local client = flow.AsyncLocal("client") -- for whom a request is made

-- The server: five pages, each of which takes a while.
local report = { "mon 12\ntu", "e 7\nwed 31\n", "thu ", "4\nfri 19\n", "sat 2\n" }
local function fetch(number)
  flow.sleep(0.02)
  print(("fetched page %d for %s"):format(number, client.value))
  return report[number]
end

local function pages()
  return coroutine.wrap(function()
    local _ <close> = setmetatable({}, { __close = function() print("connection closed") end })
    for number = 1, #report do coroutine.yield(fetch(number)) end
  end)
end

local function lines()
  return coroutine.wrap(function()
    local rest = ""
    for page in pages() do
      rest = rest .. page
      for line in rest:gmatch("(.-)\n") do coroutine.yield(line) end
      rest = rest:match("[^\n]*$")
    end
  end)
end

local function main()
  client.value = "ada"
  local each = lines()                  -- fetches nothing yet; keeps the context of now
  client.value = "someone else"

  print(each())
  --> fetched page 1 for ada
  --> mon 12

  local ticker = flow.spawn(function()  -- runs while the loop below waits for a page
    flow.sleep(0.01)
    print("another task")
  end)
  for line in each do
    print(line)
    if line == "fri 19" then break end
  end
  ticker:await()
  --> another task
  --> fetched page 2 for ada
  --> tue 7
  --> wed 31
  --> fetched page 3 for ada
  --> fetched page 4 for ada
  --> thu 4
  --> fri 19

  print(client.value)                   --> someone else
  print(each())
  --> fetched page 5 for ada
  --> sat 2
  print(each() == nil)
  --> connection closed
  --> true
end

os.exit(flow.main(main), true)
