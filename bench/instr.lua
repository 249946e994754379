--[[
instr.lua - instructions per operation: the figure without noise, for the cheap workloads.

Callgrind counts two runs with different n; the slope between them is free of start-up. Every
workload with a bound in plan.lua warms up with a tenth of n, which counts as operations too.

    bench/instr [--peer NAME] [WORKLOAD...]      (coflow; the workloads of plan.lua with a bound)
SPDX-License-Identifier: MIT
]]
package.path = arg[0]:gsub("[^/]*$", "") .. "?.lua;" .. package.path
local peers = require "peers"
local plan = require "plan"

local FEW, MANY, WARM = 20000, 60000, 1.1

local function notice(text) io.stderr:write("# ", text, "\n") end

if not peers.has("valgrind") then
  notice("valgrind is not installed: nothing counted")
  os.exit(true)
end

local peer_name, asked = "coflow", {}
local i = 1
while arg[i] do
  if arg[i] == "--peer" then
    i = i + 1
    peer_name = arg[i]
  else
    table.insert(asked, arg[i])
    asked[arg[i]] = true
  end
  i = i + 1
end

local peer = peers.find(notice)[peer_name]
if not peer then os.exit(false) end

local function count(workload, n)
  local valgrind = "valgrind --tool=callgrind --callgrind-out-file=/dev/null"
  local ok, output = peers.capture(("%s %s %s %d"):format(valgrind, peer.command, workload, n))
  local instructions = ok and output:match("Collected : (%d+)")
  if not instructions then error(workload .. ": " .. output) end
  return tonumber(instructions)
end

local missed = 0
for _, row in ipairs(plan) do
  local name, bound = row[1], row.instr
  if peer.has[name] and (asked[name] or bound and #asked == 0) then
    local slope = (count(name, MANY) - count(name, FEW)) / ((MANY - FEW) * WARM)
    local text = ""
    if bound and peer_name == "coflow" then
      local function mark(limit) return slope <= limit and "ok" or "MISS" end
      text = ("≤ %d %s"):format(bound[1], mark(bound[1]))
      if bound[2] then text = ("%s, goal %d %s"):format(text, bound[2], mark(bound[2])) end
      if slope > bound[1] then missed = missed + 1 end
    end
    print((("%-16s %8.0f instructions   %s"):format(name, slope, text):gsub("%s+$", "")))
  end
end
os.exit(missed == 0)
