-- program.lua - what the specs of the long examples share: programs run as their users run them, in a process of their
-- own, which finds modules where this one does.

local assert = require "luassert"

local program = {}

function program.quote(s)
  return "'" .. s:gsub("'", "'\\''") .. "'"
end

local quote = program.quote

-- As one process: `timeout`, which passes signals on. Its deadline only ever ends a broken run.
local function command(script, arguments)
  return ("LUA_PATH_5_4=%s LUA_CPATH_5_4=%s exec timeout --foreground -k 5 60 %s %s %s 2>&1"):format(
    quote(package.path), quote(package.cpath), os.getenv("LUA") or "lua5.4", quote(script), arguments)
end

local function close(pipe, output)
  local _, how, code = pipe:close()
  assert.equal("exit", how, output)
  return output, code
end

---Runs a program to its end; `arguments` is a piece of a shell's command line.
---@return string output both streams
---@return integer code
function program.run(script, arguments)
  local pipe = assert(io.popen(command(script, arguments)))
  return close(pipe, pipe:read("a"))
end

---Starts a program. A table: `read(how)`, of what it prints, a line by default; `kill(signal)`; `finish()`, which waits
---for its end and returns the rest that it prints, and its exit code; a second `finish` does nothing. Whoever may
---leave early says `finally(running.finish)` first: one that is still there is asked to end.
function program.start(script, arguments)
  local pipe = assert(io.popen("echo $$; " .. command(script, arguments)))
  local pid = pipe:read("l")
  local running, killed, finished = {}, false, false
  function running.read(how) return pipe:read(how or "l") end
  function running.kill(signal)
    killed = true
    assert(os.execute(("kill -%s %s"):format(signal, pid)))
  end
  function running.finish()
    if finished then return end
    finished = true
    if not killed then running.kill("TERM") end
    return close(pipe, pipe:read("a"))
  end
  return running
end

return program
