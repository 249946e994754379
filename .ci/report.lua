-- report.lua - what `make test` prints: a line for each spec file, and each failure in full.

local pretty = require "pl.pretty"

-- An error object says what it is through __tostring; a plain table is shown whole.
local function text(message)
  if type(message) ~= "table" or (getmetatable(message) or {}).__tostring then
    return tostring(message)
  end
  return pretty.write(message)
end

local function indent(s)
  return "      " .. s:gsub("\n", "\n      ")
end

-- busted's own frames say nothing about the failure.
local function frames(traceback)
  local kept = {}
  for line in (traceback or ""):gmatch("[^\n]+") do
    if not line:find("busted/", 1, true) and not line:find("pl/compat", 1, true) then
      kept[#kept + 1] = line
    end
  end
  return #kept > 1 and "\n" .. table.concat(kept, "\n") or ""
end

local function place(trace)
  return trace and trace.short_src and ("%s:%d"):format(trace.short_src, trace.currentline) or "?"
end

return function()
  local busted = require "busted"
  local handler = require "busted.outputHandlers.base"()

  local function fail(element, _, message, trace)
    io.write(("   %s\n      at %s\n%s\n"):format(handler.getFullName(element),
      place(element.trace or trace), indent(text(message) .. frames(trace and trace.traceback))))
    return nil, true
  end

  local function skip(element, _, status)
    if status ~= "pending" then return nil, true end
    io.write(("   skipped: %s\n"):format(handler.getFullName(element)))
    return nil, true
  end

  local function finish()
    local bad = handler.failuresCount + handler.errorsCount
    io.write(("%s  %-32s %4d passed%s%s %8.2f s\n"):format(bad > 0 and "FAIL" or "ok  ",
      arg[#arg], handler.successesCount,
      bad > 0 and (", %d failed"):format(bad) or "",
      handler.pendingsCount > 0 and (", %d skipped"):format(handler.pendingsCount) or "",
      handler.getDuration()))
    io.flush()
    return nil, true
  end

  busted.subscribe({ "failure" }, fail)
  busted.subscribe({ "error" }, fail)
  busted.subscribe({ "test", "end" }, skip)
  busted.subscribe({ "suite", "end" }, finish)
  return handler
end
