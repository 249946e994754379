--[[
contest.lua - one row of the table: every peer that has the workload, in turns.

A figure is the median of separate processes, pinned to one processor. The contestants take turns,
so that a disturbance meets all of them; what a bound refers to (another row of coflow's, or
lua-raw's w1_switch for nanoseconds) takes its turn among them.
SPDX-License-Identifier: MIT
]]
local peers = require "peers"
local plan = require "plan"

local contest = {}

local by_name = {}
for _, row in ipairs(plan) do by_name[row[1]] = row end

function contest.median(list)
  table.sort(list)
  local middle = (#list + 1) // 2
  return #list % 2 == 1 and list[middle] or (list[middle] + list[middle + 1]) / 2
end

local function n_for(row, peer, options)
  local n = row.slow and row.slow[peer.name] or row.n
  return math.tointeger(options.quick and not row.fixed and n // 4 or n)
end

-- `list.shown` are the row's own; the rest is there for the bounds. Also found by "peer workload".
local function contestants(row, found)
  local list = {}
  local function add(peer, of)
    local key = peer.name .. " " .. of[1]
    if list[key] then return end
    local one = { peer = peer, row = of, workload = of.run or of[1], all_ns = {}, all_bytes = {} }
    list[#list + 1], list[key] = one, one
  end
  local workload = row.run or row[1]
  for _, peer in ipairs(found) do
    if peer.has[workload] then add(peer, row) end
  end
  list.shown = #list
  if found.coflow and found.coflow.has[workload] then
    if row.ns or row.over then add(found["lua-raw"], by_name.w1_switch) end
    if row.over then add(found.coflow, by_name[row.over[3]]) end
    if row.ratio and row.ratio[4] then add(found.coflow, by_name[row.ratio[4]]) end
  end
  return list
end

---Measures a row of the plan: a list of { peer =, n =, runs =, ns =, min =, max =, bytes = }, or
---with `failed`, what the process said, in place of the figures.
function contest.run(row, found, options)
  local list = contestants(row, found)
  local prefix = row.cpus == "all" and "" or peers.pinned
  for _ = 1, math.min(row.reps or options.reps, options.reps) do
    for _, one in ipairs(list) do
      one.n = n_for(one.row, one.peer, options)
      if not one.failed then
        local ns, bytes = peers.run(one.peer, one.workload, one.n, prefix)
        if ns then
          table.insert(one.all_ns, ns)
          table.insert(one.all_bytes, bytes)
        else
          one.failed = bytes
        end
      end
    end
  end
  for _, one in ipairs(list) do
    if not one.failed then
      one.runs, one.ns = #one.all_ns, contest.median(one.all_ns)
      one.min, one.max = one.all_ns[1], one.all_ns[one.runs]
      one.bytes = one.all_bytes[1] and contest.median(one.all_bytes)
    end
  end
  return list
end

---How much slower than the machine of plan.CALIBRATION this one is now.
function contest.scale(found, options)
  local row = by_name.w1_switch
  local list = contest.run({ row[1], n = row.n }, { found["lua-raw"] }, options)
  return list[1].ns / plan.CALIBRATION
end

return contest
