-- spec/helper.lua - what the specs share: virtual time, event lists, error checks, child processes.
--
-- `in_task` turns a function into a test body: it runs as the root task of `testing.run`, so time is
-- virtual, and tasks, timers or handles left behind fail the test. Events go into a list, which the
-- test compares as a whole.
-- SPDX-License-Identifier: MIT

local flow = require "coflow"
local testing = require "coflow.testing"

local helper = {}

---How many a spec about large numbers takes: `n`, or `few` where each allocation runs the collector. By default
---those are some more than the calls that Lua can nest (200).
function helper.many(n, few)
  return os.getenv("COFLOW_GC_STRESS") and math.min(n, few or 210 + n // 100) or n
end

---How many seeds a spec takes that makes its choices by chance: `n`, or COFLOW_MORE_SEEDS times as many, or `few`
---where each allocation runs the collector.
function helper.seeds(n, few)
  return os.getenv("COFLOW_GC_STRESS") and few or n * (tonumber(os.getenv("COFLOW_MORE_SEEDS")) or 1)
end

---A test body that runs `fn(clock)` as the root task of `testing.run`, with its options.
function helper.in_task(fn, options)
  return function()
    testing.run(fn, options)
  end
end

---The same for a test of the order of things: first in, first out, also when COFLOW_SEED is set.
function helper.in_order(fn)
  return helper.in_task(fn, { seed = false })
end

---An empty list, and a function that appends to it: its arguments, joined by spaces, as one event.
---@return string[] log
---@return fun(...) note
function helper.recorder()
  local log = {}
  return log, function(...)
    local words = table.pack(...)
    for i = 1, words.n do
      words[i] = tostring(words[i])
    end
    log[#log + 1] = table.concat(words, " ")
  end
end

---A value for a `<close>` variable that calls `fn(error)` when it is closed.
function helper.closing(fn)
  return setmetatable({}, { __close = function(_, err) fn(err) end })
end

---Suspends the calling task at least once, then returns its arguments.
function helper.slowly(...)
  flow.yield()
  return flow.await(flow.spawn(function(...) return ... end, ...))
end

---The value that `fn(...)` raises; fails when it raises nothing.
function helper.raised(fn, ...)
  local ok, err = pcall(fn, ...)
  if ok then
    error("expected an error, but none was raised", 2)
  end
  return err
end

---Checks that `err` is an error object of that name and that its message holds each of `words`; returns it.
function helper.is_error(name, err, ...)
  if not flow.errors.is(err, name) then
    error(("expected the error %s, got: %s"):format(name, tostring(err)), 2)
  end
  for _, word in ipairs { ... } do
    if not err.message:find(word, 1, true) then
      error(("expected '%s' in the message: %s"):format(word, err.message), 2)
    end
  end
  return err
end

---Checks that `fn(...)` raises an error object of that name; returns it.
function helper.raises(name, fn, ...)
  local ok, err = pcall(fn, ...)
  if ok then
    error(("expected the error %s, but none was raised"):format(name), 2)
  elseif not flow.errors.is(err, name) then
    error(("expected the error %s, got: %s"):format(name, tostring(err)), 2)
  end
  return err
end

---Checks that `err` is an Aggregate; returns its inner errors as a list that has no `n`.
function helper.inner(err)
  if not flow.errors.is(err, "Aggregate") then
    error("expected the error Aggregate, got: " .. tostring(err), 2)
  end
  local inner = err.inner_exceptions
  return { table.unpack(inner, 1, inner.n or #inner) }
end

---"file.lua:LINE" of the caller's own line, or of the line `offset` below it.
function helper.here(offset)
  local info = debug.getinfo(2, "Sl")
  return ("%s:%d"):format(info.source:match("[^/]+$"), info.currentline + (offset or 0))
end

---Calls `fn(...)` in a callback of the loop, outside every task, and returns what pcall gives. For a task, under
---virtual time.
function helper.in_callback(fn, ...)
  local arguments, results = table.pack(...), nil
  local source = flow.CancellationTokenSource()
  source.token:register(function() results = table.pack(pcall(fn, table.unpack(arguments, 1, arguments.n))) end)
  source:cancel_after(1)
  flow.sleep(2)
  return table.unpack(results, 1, results.n)
end

---Calls `fn(...)` in the places where nobody can wait: a callback of the loop, a function that C calls, a coroutine of
---Lua's own. Each must refuse it with InvalidOperation.
function helper.refused_where_nobody_waits(fn, ...)
  local function check(where, ok, err)
    if ok or not flow.errors.is(err, "InvalidOperation") then
      error(("expected InvalidOperation %s, got: %s"):format(where, ok and "no error" or tostring(err)), 3)
    end
  end
  local arguments = table.pack(...)
  local function call() fn(table.unpack(arguments, 1, arguments.n)) end
  check("in a callback of the loop", helper.in_callback(call))
  check("in gsub", pcall(string.gsub, "x", "x", call))
  check("in a plain coroutine", coroutine.resume(coroutine.create(call)))
end

---The unobserved exceptions from now on, until the next handler: a list of { err =, task = }.
function helper.reports()
  local reports = {}
  flow.on_unobserved_exception(function(err, task)
    reports[#reports + 1] = { err = err, task = task }
  end)
  return reports
end

---Lets run what is ready, and what that makes ready, while no time passes: also in the order of a seed, where it takes
---many of our turns until each of the others has had a few.
function helper.settle()
  for _ = 1, 50 do flow.yield() end
end

---Collects garbage until finalizers, and the later turns that they ask for, have run.
function helper.collect()
  for _ = 1, 3 do
    collectgarbage()
    collectgarbage()
    helper.settle()
  end
end

---How many KB are in use after `more` calls of `fn(i)` that were not after `few` others.
function helper.growth(few, more, fn)
  local function used(n)
    for i = 1, n do fn(i) end
    helper.collect()
    return collectgarbage("count")
  end
  local before = used(few)
  return used(more) - before
end

local function content(path)
  local file <close> = assert(io.open(path, "rb"))
  return file:read("a")
end

-- The deadline only ever ends a broken run, where the system can give one.
local limit = os.execute("timeout --foreground 1 true >/dev/null 2>&1") and "timeout --foreground -k 5 60 " or ""

---Runs a Lua script in a process of its own, with this one's environment, but for COFLOW_SEED:
---what such a script prints is one order of many.
---@param script string
---@return table result `out`, `err`, `code` (a signal counts as 128 + its number), `file` (the script's path)
function helper.child(script)
  local base = os.tmpname()
  local result = { file = base .. ".lua" }
  local out, err = base .. ".out", base .. ".err"
  local file = assert(io.open(result.file, "wb"))
  file:write(script)
  file:close()
  local command = ("COFLOW_SEED= %s%s %s >%s 2>%s </dev/null"):format(
    limit, os.getenv("LUA") or "lua5.4", result.file, out, err)
  local _, how, code = os.execute(command)
  result.code = how == "signal" and 128 + code or code
  result.out, result.err = content(out), content(err)
  for _, path in ipairs { base, result.file, out, err } do
    os.remove(path)
  end
  if limit ~= "" and (code == 124 or code == 137) then
    error("the child process did not end by itself; its output:\n" .. result.out .. result.err, 2)
  end
  return result
end

---Runs a spec file in busted, in a process of its own; returns what busted prints.
function helper.busted(path)
  local result = helper.child(([[
    package.path, package.cpath = %q, %q
    arg = { [0] = "busted", "--output=plainTerminal", %q }
    require "busted.runner" { standalone = false }
  ]]):format(package.path, package.cpath, path))
  return result.out .. result.err
end

---Runs a script as `child` does, checks that it ended well and wrote no errors; returns its output.
function helper.output(script)
  local result = helper.child(script)
  if result.code ~= 0 or result.err ~= "" then
    error(("the child process ended with %d: %s%s"):format(result.code, result.out, result.err), 2)
  end
  return result.out
end

return helper
