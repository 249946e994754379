--[[
peers.lua - who is measured: how each peer is started, which are there, and one run of one workload.

Everything runs in a process of its own. A peer that cannot list its workloads (its package is not
installed, it did not compile) is left out with a notice.
SPDX-License-Identifier: MIT
]]
local peers = {}

local interpreter = os.getenv("LUA") or "lua5.4"

local commands = {
  { "coflow", interpreter .. " bench/workloads.lua" },
  { "lua-raw", interpreter .. " bench/rivals/lua_raw.lua" },
  { "luv+lua", interpreter .. " bench/rivals/luv.lua" },
  { "cqueues", interpreter .. " bench/rivals/cqueues.lua" },
  { "libuv-c", "build/bench/libuv" },
}

---Whether a command succeeded, and all that it wrote.
function peers.capture(command)
  local pipe <close> = assert(io.popen(command .. " 2>&1"))
  local output = pipe:read("a")
  return pipe:close(), output
end

---Whether a program is on the path.
function peers.has(program)
  return (os.execute("command -v " .. program .. " >/dev/null 2>&1"))
end

---The interpreter under test.
peers.interpreter = interpreter

---Keeps a process on one processor, the last that we may use (interrupts like the first).
peers.pinned = ""
if peers.has("taskset") then
  local _, affinity = peers.capture("taskset -cp $$")
  peers.pinned = "taskset -c " .. affinity:match("(%d+)%s*$") .. " "
end

-- A run that hangs must not stop the others.
local bounded = peers.has("timeout") and "timeout 120 " or ""

---The peers that are there, in order and by name: { name =, command =, has = { name = true … } }.
function peers.find(notice)
  local found = {}
  for _, row in ipairs(commands) do
    local name, command = row[1], row[2]
    local ok, output = peers.capture(bounded .. command .. " list")
    if ok then
      local peer = { name = name, command = command, has = {} }
      for workload in output:gmatch("%S+") do peer.has[workload] = true end
      found[#found + 1] = peer
      found[name] = peer
    else
      notice(("%s: left out (%s)"):format(name, output:match("[^\n]+") or "no output"))
    end
  end
  return found
end

---One process: nanoseconds per operation and bytes per item, or nil and what it said instead.
function peers.run(peer, workload, n, prefix)
  local command = ("%s%s%s %s %d"):format(bounded, prefix, peer.command, workload, n)
  local ok, output = peers.capture(command)
  local ns = ok and output:match('"ns_per_op":([-%d.]+)')
  if not ns then return nil, output:match("[^\n]+") or "no output" end
  return tonumber(ns), tonumber(output:match('"bytes_per_item":([-%d.]+)'))
end

return peers
