--[[
startup.lua - W13: what `require` and an empty main cost above a bare interpreter.

startup.c runs and times them in turns; this adds the differences and the bounds.
SPDX-License-Identifier: MIT
]]
local contest = require "contest"
local peers = require "peers"
local plan = require "plan"
local verdict = require "verdict"

local RUNS = 61

local chunks = {
  { "bare", "" },
  { "coflow", "require('coflow').run(function() end)" },
  { "luv+lua", "require('luv').run()" },
}

---Prints a line for each; returns the figures as JSON objects, or nil and what went wrong.
return function(found, options)
  local command = ("%sbuild/bench/startup %d %s"):format(peers.pinned, RUNS, peers.interpreter)
  local names = {}
  for _, chunk in ipairs(chunks) do
    if chunk[1] == "bare" or found[chunk[1]] then
      names[#names + 1] = chunk[1]
      command = ('%s "%s"'):format(command, chunk[2])
    end
  end
  local ok, output = peers.capture(command)
  if not ok then return nil, output end

  local scale = contest.scale(found, options)
  local figures, bare_ms, bare_kilobytes = {}, nil, nil
  for ms, kilobytes in output:gmatch("([%d.]+) (%d+)") do
    bare_ms, bare_kilobytes = bare_ms or ms, bare_kilobytes or kilobytes
    local name = names[#figures + 1]
    local more_ms, more_kilobytes = ms - bare_ms, kilobytes - bare_kilobytes
    local text = ("%-15s%-8s%8.2f ms %7.0f KB"):format("w13_startup", name, ms, kilobytes)
    if name ~= "bare" then
      text = ("%s   above bare %+.2f ms %+.0f KB"):format(text, more_ms, more_kilobytes)
    end
    if name == "coflow" then
      text = ("%s   %s; %s"):format(text,
        verdict.of("w13_startup:ms", more_ms, plan.startup.ms, " ms", scale),
        verdict.of("w13_startup:KB", more_kilobytes, plan.startup.kilobytes, " KB", 1))
    end
    print(text)
    figures[#figures + 1] = ('{"peer":"%s","workload":"w13_startup","n":%d,"ms":%s,"kilobytes":%s}')
      :format(name, RUNS, ms, kilobytes)
  end
  return figures
end
