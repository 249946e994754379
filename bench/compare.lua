--[[
compare.lua - `make bench`: coflow beside its rivals, as a table, with the bounds of plan.lua.

    bench/run [--reps N] [--only PATTERN] [--quick] [--json FILE]

A missed bound is told, not an error: machines differ. The exit status is 1 when coflow is not
there or one of its workloads fails.
SPDX-License-Identifier: MIT
]]
package.path = arg[0]:gsub("[^/]*$", "") .. "?.lua;" .. package.path
local contest = require "contest"
local peers = require "peers"
local plan = require "plan"
local startup = require "startup"
local verdict = require "verdict"

local USAGE = [[
usage: bench/run [--reps N] [--only PATTERN] [--quick] [--json FILE]
  --reps N        processes for each figure (7)
  --only PATTERN  workloads whose name matches a Lua pattern ("^w6_", "w13")
  --quick         3 processes, a quarter of the operations, nothing that takes long
  --json FILE     write the figures there too
]]

local function read_options()
  local options = { reps = 7 }
  local values = { ["--reps"] = "reps", ["--only"] = "only", ["--json"] = "json" }
  local i = 1
  while arg[i] do
    if arg[i] == "--quick" then
      options.quick, options.reps = true, 3
    elseif values[arg[i]] and arg[i + 1] then
      options[values[arg[i]]] = arg[i + 1]
      i = i + 1
    else
      io.stderr:write(USAGE)
      os.exit(2)
    end
    i = i + 1
  end
  options.reps = assert(math.tointeger(tonumber(options.reps)), USAGE)
  return options
end

local function notice(...) io.stderr:write("# ", table.concat({ ... }, " "), "\n") end

local function line(...) print((table.concat({ ... }):gsub("%s+$", ""))) end

-- ---- the table: a column for each peer, coflow's first and without a share

local found, all_well

local function columns(text)
  local cells = {}
  for k, peer in ipairs(found) do
    local value, share = text(peer)
    cells[k] = peer.name == "coflow" and ("%10s"):format(value)
      or ("%11s %-7s"):format(value, share or "")
  end
  return table.concat(cells)
end

local function report(row, list)
  local name = row[1]
  local ours = list["coflow " .. name]
  local on_time, on_bytes = verdict.on(row, list)
  line(("%-15s"):format(name), columns(function(peer)
    local one = list[peer.name .. " " .. name]
    if not one or not one.ns then return one and "failed" or "-" end
    return ("%.1f"):format(one.ns), ours and ours.ns and ("(%.2f)"):format(ours.ns / one.ns)
  end), "  ", on_time)

  local any = false
  local bytes = columns(function(peer)
    local one = list[peer.name .. " " .. name]
    if not one or not one.bytes then return "-" end
    any = true
    return ("%.0f"):format(one.bytes)
  end)
  if any then line(("%-15s"):format("  bytes"), bytes, "  ", on_bytes) end
end

local function as_json(row, list)
  local figures = {}
  for k = 1, list.shown do
    local one = list[k]
    if one.ns then
      local figure = ('{"peer":"%s","workload":"%s","n":%d'):format(one.peer.name, row[1], one.n)
      figure = ('%s,"runs":%d,"median":%.2f,"min":%.2f,"max":%.2f')
        :format(figure, one.runs, one.ns, one.min, one.max)
      if one.bytes then figure = ('%s,"bytes":%.1f'):format(figure, one.bytes) end
      figures[#figures + 1] = figure .. "}"
    end
  end
  return figures
end

-- ---- main

local options = read_options()
io.stdout:setvbuf("line") -- a row when it is known, also into a pipe
local function wanted(name) return not options.only or name:find(options.only) end

found = peers.find(notice)
all_well = found.coflow ~= nil

line(("ns per operation, median of %d processes; in brackets: coflow's time, this one being 1")
  :format(options.reps))
line((" "):rep(15), columns(function(peer) return peer.name end), "  bounds for this machine")

local figures, absent = {}, {}
local function keep(list) table.move(list, 1, #list, #figures + 1, figures) end

for _, row in ipairs(plan) do
  local name, coflow = row[1], found.coflow
  if coflow and not row.machine and not coflow.has[row.run or name] then
    absent[#absent + 1] = name
  elseif wanted(name) and not (options.quick and row.long) then
    local list = contest.run(row, found, options)
    for _, one in ipairs(list) do
      if one.failed then
        notice(one.peer.name, one.workload, one.failed)
        all_well = all_well and one.peer ~= coflow
      end
    end
    if list.shown > 0 then report(row, list) end
    keep(as_json(row, list))
  end
end
if wanted("w13_startup") then
  local list, problem = startup(found, options)
  if list then keep(list) else notice("w13_startup:", problem) end
  all_well = all_well and list ~= nil
end

if #absent > 0 then notice("not in workloads.lua yet:", table.unpack(absent)) end
line(("%d must bounds kept, %d missed"):format(verdict.kept, #verdict.missed),
  #verdict.missed > 0 and ": " or "", table.concat(verdict.missed, " "))
if options.json then
  local file <close> = assert(io.open(options.json, "w"))
  file:write("[\n", table.concat(figures, ",\n"), "\n]\n")
end
os.exit(all_well)
