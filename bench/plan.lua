--[[
plan.lua - what `make bench` runs, in order: each workload, how often, and the bounds it must keep.

n        operations a process; `slow` names peers that get fewer. Chosen so that a process takes
         some tenths of a second. `fixed`: not cut down by --quick. `long`: left out by it.
reps     processes, where fewer than usual are enough (memory does not jitter).
cpus     "all": threads are the point, so it is not pinned to one processor.
machine  nobody's operation but a scale: one turn of libuv's loop, one hop through it.

Bounds are pairs { must, goal }, upper limits on coflow's figure:

ratio    times a rival's figure from the same run: { must, goal, peer [, workload] }
ns       nanoseconds, on a machine where lua-raw's w1_switch takes CALIBRATION; scaled by that row
over     the same, above another workload of coflow: { must, goal, workload }
bytes    bytes an item
instr    instructions an operation (bench/instr)

A workload that workloads.lua does not have yet is left out with a notice.
SPDX-License-Identifier: MIT
]]
local LUA, LUV, C = "lua-raw", "luv+lua", "libuv-c"

local plan = {
  { "w1_idle", n = 1e6, machine = true },
  { "w1_async", n = 1e5, machine = true },

  { "w1_switch", n = 1e6, slow = { cqueues = 2e5 },
    ratio = { 0.85, 0.65, LUA }, instr = { 620, 500 } },
  { "w1_1k", n = 1e6, slow = { cqueues = 2e5 },
    ratio = { 0.85, 0.65, LUA }, instr = { 620, 500 } },

  { "w2_spawn_await", n = 3e5, slow = { cqueues = 6e4 },
    ratio = { 1.3, 1.0, LUA }, instr = { 2700 } },
  { "w2_async_await", n = 3e5, ratio = { 1.3, 0.8, LUA }, instr = { 2700 } },
  { "w2_chain", n = 1e6, reps = 3, fixed = true, long = true },

  { "w3_await_done", n = 2e6, ns = { 26, 21 }, instr = { 380, 300 } },

  { "w4_all_1k", n = 1e5, slow = { cqueues = 5e4 }, ratio = { 1 / 4, 1 / 5.5, LUV } },
  { "w4_all_100k", n = 1e5, fixed = true, ratio = { 1 / 4, 1 / 7, LUV } },

  { "w5_any_2", n = 1e5, slow = { cqueues = 3e4 },
    ratio = { 1 / 5, 1 / 7, LUV }, bytes = { 8, 8 } }, -- bytes left behind: none, but for jitter
  { "w5_any_100", n = 1e4, slow = { [LUV] = 5e3, cqueues = 3e3 },
    ratio = { 1 / 5, 1 / 7, LUV }, bytes = { 80, 80 } },

  { "w6_get_1", n = 2e6, ns = { 26, 20 } },
  { "w6_get_8", n = 2e6, ns = { 26, 20 } },
  { "w6_get_64", n = 2e6, ns = { 26, 20 } },
  { "w6_get_1000", n = 2e6, ns = { 26, 20 } },
  { "w6_value_8", n = 2e6 },
  { "w6_set_1", n = 5e5, ns = { 85, 70 } },
  { "w6_set_8", n = 5e5, slow = { [LUA] = 1e5 }, ns = { 150, 125 } },
  { "w6_set_64", n = 2e5, slow = { [LUA] = 3e4 }, ns = { 420, 335 } },
  { "w6_set_1000", n = 2e5, slow = { [LUA] = 2e3 }, ns = { 620, 500 } },
  { "w6_flow_0", n = 3e5 },
  { "w6_flow_1", n = 3e5, over = { 20, 15, "w6_flow_0" } },
  { "w6_flow_8", n = 3e5, over = { 20, 15, "w6_flow_0" } },
  { "w6_flow_64", n = 3e5, over = { 20, 15, "w6_flow_0" } },
  { "w6_flow_1000", n = 3e5, over = { 20, 15, "w6_flow_0" } },

  { "w7_chan_1", n = 3e5, slow = { cqueues = 1e5 }, ratio = { 1 / 4.5, 1 / 6, LUV } },
  { "w7_chan_100", n = 1e6, ratio = { 1 / 1.4, 1 / 1.8, LUV } },
  { "w7_chan_unb", n = 1e6, ratio = { 1 / 1.4, 1 / 1.8, LUV } },

  { "w8_timer_cancel", n = 1e6, fixed = true, ratio = { 1 / 6, 1 / 9, LUV }, bytes = { 160, 110 } },
  { "w8_timer_fire", n = 1e5, fixed = true, ratio = { 1 / 6, 1 / 9, LUV } },

  { "w9_mem", n = 1e5, fixed = true, bytes = { 1500, 1400 } },
  { "w9_mem1m", n = 1e6, run = "w9_mem", reps = 3, fixed = true, long = true,
    bytes = { 1500, 1400 } },
  { "w9_ctx", n = 1e5, fixed = true, bytes = { 110, 95 } },

  { "w10_reg", n = 5e5, ns = { 125, 105 } },
  { "w10_cancel", n = 1e5, ns = { 135, 118 } },

  { "w11_pool", n = 1e4, cpus = "all", ratio = { 1.1, 1.03, C } },
  { "w11_pool_64", n = 64000, cpus = "all" },

  { "w14_timeout", n = 1e6, ratio = { 4, 2.5, "coflow", "w1_switch" } },
  { "w14_group", n = 1e5, ratio = { 15, 12, "coflow", "w2_spawn_await" } }, -- of ten children
}

plan.CALIBRATION = 73

---What starting costs above a bare interpreter: milliseconds (scaled) and kilobytes.
plan.startup = { ms = { 0.30, 0.15 }, kilobytes = { 400, 400 } }

return plan
