--[[
cancel.lua - a job under a deadline of its own and the caller's: whichever comes first ends it.

Copies "blocks" to two mirrors, one of which is slow. Each copy has its own time limit, linked to the token of
the whole job. A copy that is cut short still puts its work away, because the error is raised inside it.

    lua5.4 examples/cancel.lua

SPDX-License-Identifier: MIT
]]

local flow = require "coflow"

-- Copies until it is done or the token says stop; tells how far it came either way.
local function copy(mirror, blocks, seconds_each, token)
  local done = 0
  local _ <close> = setmetatable({}, {
    __close = function() print(("%s: closed after %d of %d blocks"):format(mirror, done, blocks)) end,
  })
  for _ = 1, blocks do
    flow.sleep(seconds_each, token) -- raises OperationCanceled when the token is canceled
    done = done + 1
  end
end

-- The same within `seconds`, or until `token` is canceled. Leaving the function disposes of the source, so neither
-- its timer nor its link to `token` stays behind.
local function copy_within(seconds, mirror, blocks, seconds_each, token)
  local limit <close> = flow.CancellationTokenSource.linked(token)
  limit:cancel_after(seconds)
  copy(mirror, blocks, seconds_each, limit.token)
end

local function tell(mirror, task)
  local ok, err = task:try_await()
  if ok then
    print(mirror .. ": complete")
  elseif flow.errors.is(err, "OperationCanceled") then
    print(("%s: cut short%s"):format(mirror, err.reason and ", " .. err.reason or " by its time limit"))
  else
    error(err, 0)
  end
end

local function main()
  local job <close> = flow.CancellationTokenSource()
  local _ <close> = job.token:register(function() print("the job is called off") end)

  local quick = flow.spawn(copy_within, 10, "quick", 2, 0.005, job.token)
  local slow = flow.spawn(copy_within, 0.05, "slow", 2, 60, job.token)
  tell("quick", quick)
  --> quick: closed after 2 of 2 blocks
  --> quick: complete
  tell("slow", slow)
  --> slow: closed after 0 of 2 blocks
  --> slow: cut short by its time limit

  local last = flow.spawn(copy_within, 10, "last", 2, 60, job.token)
  flow.yield() -- let it start
  job:cancel("the disk is full")
  --> the job is called off
  tell("last", last)
  --> last: closed after 0 of 2 blocks
  --> last: cut short, the disk is full
end

os.exit(flow.main(main), true)
