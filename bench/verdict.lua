--[[
verdict.lua - says of a figure whether it keeps its bound: "≤ 0.85 × lua-raw: ok, goal 0.65: MISS".

Bounds in nanoseconds or milliseconds are scaled to this machine and printed as scaled.
SPDX-License-Identifier: MIT
]]
local plan = require "plan"

local verdict = { kept = 0, missed = {} }

local function number(x) return (x < 100 and "%.3g" or "%.0f"):format(x) end

---@param bound number[] must and, optionally, goal
---@param unit string
---@param scale number what 1 in the bound stands for in the figure
---@param shown number? what 1 in the bound stands for in print: `scale`, if not given
function verdict.of(name, figure, bound, unit, scale, shown)
  local function say(limit, of)
    local kept = figure <= limit * scale
    return number(limit * (shown or scale)) .. of .. (kept and ": ok" or ": MISS"), kept
  end
  local text, kept = say(bound[1], unit)
  if kept then verdict.kept = verdict.kept + 1 else table.insert(verdict.missed, name) end
  return "≤ " .. text .. (bound[2] and ", goal " .. say(bound[2], "") or "")
end

---The verdicts on a measured row (contest.lua): one text on its time, one on its bytes.
function verdict.on(row, list)
  local name = row[1]
  local function ns_of(peer, workload)
    local one = list[peer .. " " .. workload]
    return one and one.ns
  end
  local ours, calibration = ns_of("coflow", name), ns_of("lua-raw", "w1_switch")
  if not ours then return "", "" end

  local texts = {}
  if row.ratio then
    local peer, workload = row.ratio[3], row.ratio[4]
    local base = ns_of(peer, workload or name)
    if base then
      table.insert(texts, verdict.of(name, ours, row.ratio, " × " .. (workload or peer), base, 1))
    end
  end
  if row.ns and calibration then
    table.insert(texts, verdict.of(name, ours, row.ns, " ns", calibration / plan.CALIBRATION))
  end
  local base = row.over and ns_of("coflow", row.over[3])
  if base and calibration then
    local above = ours - base
    table.insert(texts, ("%+.1f above %s %s"):format(above, row.over[3],
      verdict.of(name, above, row.over, " ns", calibration / plan.CALIBRATION)))
  end

  local bytes = list["coflow " .. name].bytes
  return table.concat(texts, "; "),
    row.bytes and bytes and verdict.of(name .. ":bytes", bytes, row.bytes, " bytes", 1) or ""
end

return verdict
