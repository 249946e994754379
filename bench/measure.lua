--[[
measure.lua - how every Lua script of this folder measures, ours and the rivals'.

A script fills a table of workloads and ends in `measure.main`. A workload is a function of n that
returns nanoseconds per operation and, where memory is the question, bytes per item. The script is
run as `lua5.4 script.lua <workload> <n>` and prints one JSON line, or `list` for the names.

Nothing is subtracted for the loop around an operation: it is the same few ns in every script.
SPDX-License-Identifier: MIT
]]
local measure = {}

---Nanoseconds since some moment. A script that has a monotonic clock puts it here.
function measure.now() return os.clock() * 1e9 end

---Nanoseconds of processor time.
function measure.cpu() return os.clock() * 1e9 end

---Resident bytes of this process; NaN where there is no /proc, and then no bytes are printed.
function measure.rss()
  local file = io.open("/proc/self/status")
  if not file then return 0 / 0 end
  local kilobytes = file:read("a"):match("VmRSS:%s*(%d+) kB")
  file:close()
  return tonumber(kilobytes) * 1024
end

---Time per operation of `f(n)`, after `f(warm)` (a tenth of n) has filled pools and caches.
function measure.time(f, n, warm)
  f(warm or math.max(1, n // 10))
  collectgarbage()
  local start = measure.now()
  f(n)
  return (measure.now() - start) / n
end

---Memory that another `f(n)` leaves behind, per operation. Call it after `time`: the heap has
---reached its working size by then, so that what is left is a leak.
function measure.growth(f, n)
  collectgarbage()
  collectgarbage()
  local before = measure.rss()
  f(n)
  collectgarbage()
  collectgarbage()
  return (measure.rss() - before) / n
end

---Makes and keeps n things: time and resident bytes of each. `settle` runs before the second look.
---The list that keeps them is as large before as after, so it does not count.
function measure.keep(n, make, settle)
  local list = {}
  for i = 1, n do list[i] = false end
  collectgarbage()
  local before, start = measure.rss(), measure.now()
  for i = 1, n do list[i] = make(i) end
  if settle then settle(list) end
  local elapsed = measure.now() - start
  return elapsed / n, (measure.rss() - before) / n, list
end

---The script's main: `run(f)` must call f where the peer's operations may suspend.
function measure.main(peer, workloads, run)
  local name, n = arg[1], math.tointeger(tonumber(arg[2]))
  if name == "list" then
    local names = {}
    for each in pairs(workloads) do names[#names + 1] = each end
    table.sort(names)
    print(table.concat(names, "\n"))
    return
  end
  if not workloads[name] or not n or n < 1 then
    io.stderr:write("usage: ", arg[0], " <workload> <n> | list\n")
    os.exit(2)
  end
  run(function()
    local ns, bytes = workloads[name](n)
    assert(ns > 0, "no time has passed: the clock must go on while a task runs")
    local line = ('{"peer":"%s","workload":"%s","n":%d,"ns_per_op":%.2f'):format(peer, name, n, ns)
    if bytes and bytes == bytes then line = line .. (',"bytes_per_item":%.1f'):format(bytes) end
    print(line .. "}")
    os.exit(true) -- without closing the state: a million parked tasks need not be unwound
  end)
end

return measure
