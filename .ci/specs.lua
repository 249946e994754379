-- specs.lua - busted, in the interpreter that runs this script, counting what passed.
--
-- Debian's `busted` starts whichever Lua is the default one, so its runner is called from here.
-- Keeps "PASSED FAILED SKIPPED in TEST" in the file that COUNTS names, whatever the output handler,
-- and "... end" in the end. Errors count as failures.

if not package.searchpath("busted.runner", package.path) then
  -- Debian's packages and luarocks' trees need not be where this interpreter looks.
  local function answer(command)
    local pipe = io.popen(command .. " 2>/dev/null")
    local text = pipe:read("a"):gsub("%s+$", "")
    pipe:close()
    return text
  end
  local rocks = "luarocks --lua-version 5.4 path "
  package.path = table.concat({ package.path, "/usr/share/lua/5.4/?.lua",
    "/usr/share/lua/5.4/?/init.lua", answer(rocks .. "--lr-path") }, ";")
  package.cpath = table.concat({ package.cpath, "/usr/lib/lua/5.4/?.so",
    "/usr/lib/" .. answer("cc -print-multiarch") .. "/lua/5.4/?.so",
    answer(rocks .. "--lr-cpath") }, ";")
end

local passed, failed, skipped = 0, 0, 0

local function write(rest)
  local name = os.getenv("COUNTS")
  if name then
    local file <close> = assert(io.open(name, "w"))
    file:write(passed, " ", failed, " ", skipped, " ", rest, "\n")
  end
end

local function full_name(busted, element)
  local parent = busted.context.parent(element)
  local above = parent and parent.descriptor == "describe" and full_name(busted, parent) .. " " or ""
  return above .. tostring(element.name)
end

local function count(busted)
  busted.subscribe({ "test", "start" }, function(element)
    write("in " .. full_name(busted, element))
    if debug.stress then debug.stress(true) end -- make check's interpreter (host.c)
    return nil, true -- as each subscriber here: go on to the next one
  end)
  busted.subscribe({ "test", "end" }, function(_, _, status)
    if debug.stress then debug.stress(false) end -- busted is not what is tested
    if status == "success" then passed = passed + 1 end
    if status == "pending" then skipped = skipped + 1 end
    return nil, true
  end)
  local function fail() failed = failed + 1 return nil, true end
  busted.subscribe({ "failure" }, fail)
  busted.subscribe({ "error" }, fail)
  busted.subscribe({ "exit" }, function() write("end") return nil, true end)
end

-- The runner makes its own instance, so the constructor is where to get hold of it.
local new = require "busted.core"
package.loaded["busted.core"] = function(...)
  local busted = new(...)
  count(busted)
  return busted
end

require "busted.runner" { standalone = false, output = ".ci/report.lua" }
