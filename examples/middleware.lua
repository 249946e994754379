--[[
middleware.lua - steps around a handler: request ids, a limit of time, errors, access.

    lua5.4 examples/middleware.lua

SPDX-License-Identifier: MIT
]]

local flow = require "coflow"

local request_id = flow.AsyncLocal("request_id")
local function log(...) print("[" .. tostring(request_id.value) .. "]", ...) end

local app = flow.pipeline.new()

app:use(function(context, next)                  -- the outermost: everything inside sees the id
  request_id.value = context.id
  return next()
end)

app:use(function(context, next)                  -- a limit, and errors become answers
  local ok, answer = flow.pcall(flow.with_timeout, 0.05, next)
  if ok then return answer end
  log("failed:", answer)
  return { status = flow.errors.is(answer, "Timeout") and 504 or 500, path = context.path }
end)

app:use(function(context, next)                  -- not calling next ends the way here
  if context.path:find("^/admin") and not context.admin then return { status = 403 } end
  return next()
end)

app:run(function(context)
  log("handling", context.path)
  flow.sleep(context.seconds)
  if context.path == "/broken" then error("no such table", 0) end
  return { status = 200 }
end)

flow.run(function()
  local handle = app:build()
  local requests = {
    { id = "r1", path = "/slow", seconds = 60 },
    { id = "r2", path = "/fast", seconds = 0.01 },
    { id = "r3", path = "/admin", seconds = 0.01 },
    { id = "r4", path = "/broken", seconds = 0.02 },
  }
  local tasks = {}
  for i, request in ipairs(requests) do tasks[i] = flow.spawn(handle, request) end
  for task, i in flow.when_each(tasks) do print(requests[i].id, task.result.status) end
end)

--> [r1]	handling	/slow
--> [r2]	handling	/fast
--> [r4]	handling	/broken
--> r3	403
--> r2	200
--> [r4]	failed:	no such table
--> r4	500
--> [r1]	failed:	Timeout: the operation did not complete within 0.05 s
--> r1	504
