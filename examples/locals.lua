--[[
locals.lua - what flows where: async locals through calls, tasks, callbacks, and what must not flow.

    lua5.4 examples/locals.lua

SPDX-License-Identifier: MIT
]]

local flow = require "coflow"

local user = flow.AsyncLocal { name = "user", default = "nobody" }
-- A transaction belongs to the task that opened it. A task started meanwhile must not write into it.
local transaction = flow.AsyncLocal { name = "transaction", flow = "none" }

local function who(place)
  print(("%-12s %-8s %s"):format(place, user.value, transaction.value or "-"))
end

local function main()
  who("start")                        --> start        nobody   -

  user.value, transaction.value = "ada", "T1"
  who("set")                          --> set          ada      T1

  local child = flow.spawn(function()
    who("child")                      --> child        ada      -
    user.value = "bob"                -- its own, from here on
    flow.sleep(0.01)
    who("child later")
  end)
  flow.yield()
  who("parent")                       --> parent       ada      T1
  child:await()
  --> child later  bob      -

  do
    local _ <close> = user:with("root") -- for the rest of the block, also when an error ends it
    who("block")                      --> block        root     T1
  end
  who("after")                        --> after        ada      T1

  flow.call(function()                -- the same task, but what it sets is undone
    user.value = "guest"
    who("call")                       --> call         guest    T1
  end)
  who("after")                        --> after        ada      T1

  -- A callback that is called from elsewhere, later: bound to the flow in which it was made.
  local callback = flow.ExecutionContext.wrap(function() who("callback") end)
  user.value = "eve"
  callback()                          --> callback     ada      -

  -- Work that outlives this request should not carry its user.
  local background
  do
    local _ <close> = flow.ExecutionContext.suppress_flow()
    background = flow.spawn(who, "background")
  end
  background:await()                  --> background   nobody   -
  who("end")                          --> end          eve      T1
end

os.exit(flow.main(main), true)
