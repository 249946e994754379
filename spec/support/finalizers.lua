-- finalizers.lua - finalizers that come at a chosen moment of what runs.
--
-- Any allocation may run the collector, and with it finalizers, which may use the whole API: in the midst of anything.
-- Here each allocation does, for as long as a function runs, and a finalizer acts at one of them. What a spec wants to
-- see alone allocates little: it looks up its functions before, and what it makes ready it makes ready outside.

local finalizers = {}

-- Each allocation is a whole cycle: a pause of 1 ends with the last one, and so large a step goes through all of it.
local function hurry() collectgarbage("incremental", 1, 1000, 63) end
local function slow_down() collectgarbage("incremental", 200, 100, 13) end

---Runs fn(...). Meanwhile each allocation collects; in each collection a finalizer asks `due()`, and the first time
---that this holds it calls `action()`. Raises and returns what fn does. Nothing is collected right before fn runs.
function finalizers.when(due, action, fn, ...)
  local on = true
  local class
  class = { __gc = function()
    if not on then return end
    if due() then
      on = false
      action()
    else
      setmetatable({}, class)
    end
  end }
  local _ <close> = setmetatable({}, { __close = function()
    on = false
    slow_down()
  end })
  collectgarbage()
  collectgarbage("stop")
  setmetatable({}, class)
  hurry()
  collectgarbage("restart")
  return fn(...)
end

---The same, where `action()` is called in each collection.
function finalizers.always(action, fn, ...)
  return finalizers.when(function() action() end, nil, fn, ...)
end

---The same, where `action()` is called in the n-th collection. It may be a list: of what is called then, in the next
---one, and so on.
function finalizers.at(n, action, fn, ...)
  local steps = type(action) == "table" and action or { action }
  local step = -n
  return finalizers.always(function()
    step = step + 1
    if steps[step + 1] then steps[step + 1]() end
  end, fn, ...)
end

---Calls fn(at, n) for n = 1, 2, …, where at(action, f, ...) is as above, until f ends before its n-th collection: so
---action comes at each of the allocations. There is one at least, and no more than `most` are tried. Before that fn is
---called without action: what is made once is there then.
function finalizers.sweep(fn, most)
  local function rehearse(_, f, ...) return finalizers.always(function() end, f, ...) end
  fn(rehearse, 0)
  for n = 1, most or 100 do
    local came = false
    fn(function(action, f, ...)
      local steps = type(action) == "table" and { table.unpack(action) } or { action }
      local first = steps[1]
      steps[1] = function()
        came = true
        first()
      end
      return finalizers.at(n, steps, f, ...)
    end, n)
    if not came then
      if n == 1 and not os.getenv("COFLOW_GC_STRESS") then error("nothing was allocated", 2) end
      return
    end
  end
end

return finalizers
