-- flow_support.lua - what the specs of context, cancellation and time share: running a test in virtual
-- time, looking at errors, weak tables, a random generator that is the same on every machine.

local assert = require "luassert"
local flow = require "coflow"
local helper = require "spec.helper"

local support = {}

support.in_task, support.in_order = helper.in_task, helper.in_order
support.many = helper.many

-- Calls fn(...), which must raise an error object called `name`; returns that object.
function support.raises(name, fn, ...)
  local ok, err = pcall(fn, ...)
  assert.is_false(ok, name .. " expected, but nothing was raised")
  if not flow.errors.is(err, name) then error(name .. " expected, got " .. tostring(err), 2) end
  return err
end

-- Calls fn, which must raise Lua's own `bad argument #n to 'name' (...)`; `word` must be in it, if given.
-- fn must not end in a tail call, or Lua cannot know the name.
function support.bad_argument(n, name, fn, word)
  local ok, err = pcall(fn)
  assert.is_false(ok, "a bad argument expected, but nothing was raised")
  if type(err) ~= "string" then error("a string expected, got " .. tostring(err), 2) end
  local number, called = err:match("bad argument #(%d+) to '([^']*)'")
  if tonumber(number) ~= n or not called:find(name .. "$") then
    error(("bad argument #%d to '%s' expected, got: %s"):format(n, name, err), 2)
  end
  if word and not err:find(word, 1, true) then
    error(("%q expected in: %s"):format(word, err), 2)
  end
end

-- A list of events and the function that appends to it.
function support.recorder()
  local events = {}
  return events, function(event) events[#events + 1] = event end
end

function support.collect()
  collectgarbage()
  collectgarbage()
  collectgarbage()
end

function support.weak() return setmetatable({}, { __mode = "v" }) end

-- How many entries of a weak table are still alive.
function support.alive(weak)
  support.collect()
  local count = 0
  for _ in pairs(weak) do count = count + 1 end
  return count
end

-- A function that gives integers in 1..n, the same for the same seed everywhere.
function support.random(seed)
  local state = seed * 0x9E3779B97F4A7C15 + 1
  return function(n)
    state = state * 6364136223846793005 + 1442695040888963407
    return (state >> 33) % n + 1
  end
end

function support.shuffled(n, random)
  local list = {}
  for i = 1, n do list[i] = i end
  for i = n, 2, -1 do
    local j = random(i)
    list[i], list[j] = list[j], list[i]
  end
  return list
end

-- Runs fn(reports) while unobserved exceptions are recorded in `reports` as {err =, task =}.
function support.with_reports(fn)
  local ok, err = pcall(fn, helper.reports())
  flow.on_unobserved_exception(function(unobserved)
    io.stderr:write("unobserved: ", tostring(unobserved), "\n")
  end)
  if not ok then error(err, 0) end
end

return support
