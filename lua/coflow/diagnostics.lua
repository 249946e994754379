-- coflow.diagnostics: what a program is doing: its tasks as a tree, who waits on whom, who keeps the loop, a trace.
--
-- All of it can be asked for at any time, from a task as well as from outside, and changes nothing. How long a task has
-- waited, and the figures of `metrics`, are known from when this module was first loaded; from then on each step
-- of a task costs two looks at the clock.
--
-- The kernel tells who waits for what (src/deadlock.c, hang.lua), and measures (src/probe.c). The words are made here.
--
-- Source: all_tasks and slow_callback_duration of asyncio; the trace event format of Chrome.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local arguments = require "coflow.arguments"
local hang = require "coflow.hang"

local probe, name_of = core.probe, hang.name_of

local diagnostics = {}

-- The tree ----------------------------------------------------------------------------------------

local DEEPEST = 40 -- further in the lines are indented no more

-- Calls `visit(item, depth, last)` for each of the list, before those of which it is the parent; last: `last[d]` says
-- whether the one at depth `d` above it, or itself, is the last of its siblings. Without recursion: there may be
-- 100,000 levels.
local function walk(list, parent_of, visit)
  local roots, below = {}, {}
  for i, item in ipairs(list) do
    local parent = parent_of(item, i)
    local siblings = parent and (below[parent] or {}) or roots
    if parent then below[parent] = siblings end
    siblings[#siblings + 1] = item
  end
  local levels, last = { { list = roots, next = 1 } }, {}
  while #levels > 0 do
    local level = levels[#levels]
    local item = level.list[level.next]
    level.next = level.next + 1
    if not item then
      levels[#levels] = nil
    else
      last[#levels] = level.next > #level.list
      visit(item, #levels, last)
      if below[item] then levels[#levels + 1] = { list = below[item], next = 1 } end
    end
  end
end

---The tasks with a function to run that have not ended, the running one included; a task stands before those that it
---has started.
---@return coflow.Task[]
function diagnostics.tasks()
  local tasks, list, parents = {}, core.live_tasks()
  local there = {}
  for _, task in ipairs(list) do there[task] = true end
  walk(list, function(_, i) return there[parents[i]] and parents[i] end, function(task) tasks[#tasks + 1] = task end)
  return tasks
end

local function duration(row) return row.seconds and (", for %.3f s"):format(row.seconds) or "" end

-- What a task does, after its name.
local function doing(row)
  local status = row.task.status
  if status == "created" then
    return "has not been started"
  elseif status == "waiting_to_run" and row.wait == "is ready not started" then
    return "is to start"
  end
  return row.wait and row.wait .. duration(row) or "is running"
end

local function indent(depth, last)
  local parts = {}
  for d = 1, math.min(depth, DEEPEST) - 1 do parts[d] = last[d] and "   " or "│  " end
  parts[#parts + 1] = last[depth] and "└─ " or "├─ "
  return table.concat(parts)
end

---All tasks as a tree, each below the one that has started it: name, id, what it waits for, where, and for how long.
---For the whole stack of one of them: `task:traceback()`.
---@return string
function diagnostics.dump()
  local list, of = hang.rows(false)
  local lines = { #list == 1 and "1 task" or ("%d tasks"):format(#list) }
  walk(list, function(row) return of[row.parent] end, function(row, depth, last)
    lines[#lines + 1] = ("%s%s %s"):format(indent(depth, last), name_of(row.task), doing(row))
  end)
  return table.concat(lines, "\n")
end

-- Hangs -------------------------------------------------------------------------------------------

local function line_of(row, more)
  if more == 0 then return ("  %s %s%s"):format(name_of(row.task), row.wait, duration(row)) end
  local wait = row.wait:gsub("^waits", "wait"):gsub("^sleeps", "sleep"):gsub("^is ", "are ")
  return ("  %s and %d more of that name %s"):format(name_of(row.task), more, wait)
end

---Who waits on whom: a line for each task that waits (one for all of a name that wait for the same thing at the same
---place), and circles of tasks that hold each other up, by awaiting, a lock, or a task group. Such a circle ends only
---by a deadline or a cancellation, if there is one.
---@return string
function diagnostics.hang_report()
  local list, of = hang.rows(true)
  local waiting, lines, like = 0, {}, {}
  for _, row in ipairs(list) do
    if row.waits then
      local key = row.task.name .. "\0" .. row.wait
      local same = like[row.target or key] or {}
      like[row.target or key] = same
      waiting = waiting + 1
      if same[key] then
        same[key].more = same[key].more + 1
      else
        same[key] = { row = row, more = 0 }
        lines[#lines + 1] = same[key]
      end
    end
  end
  if waiting == 0 then return "no task waits" end
  for i, line in ipairs(lines) do lines[i] = line_of(line.row, line.more) end
  table.insert(lines, 1, waiting == 1 and "1 task waits:" or ("%d tasks wait:"):format(waiting))
  for _, circle in ipairs(hang.circles(list, of)) do lines[#lines + 1] = circle end
  return table.concat(lines, "\n")
end

-- The loop ----------------------------------------------------------------------------------------

---Calls `fn(task, seconds)` for each task that has kept the loop for longer than `seconds` at a stretch, without
---waiting: once it has come to rest, before the loop looks at timers and events again, outside every task; for 4,096
---of them at a time. `seconds` is real time, also in a test. What `fn` raises goes to the handler of unobserved
---exceptions. There is one such function at a time: `on_blocked(nil)` ends it.
---@param seconds number?
---@param fn fun(task: coflow.Task, seconds: number)?
function diagnostics.on_blocked(seconds, fn)
  if seconds == nil then return probe.on_blocked() end
  if not arguments.is_seconds(seconds) then
    core.argument_error(1, "seconds, not negative, expected, got " .. tostring(seconds))
  end
  core.check_function(2, fn)
  probe.on_blocked(seconds, fn)
end

---@class coflow.diagnostics.Trace
local Trace = { __name = "coflow.diagnostics.Trace" }
Trace.__index = Trace

local current -- the trace that is being written

---Ends the trace, so that its file is complete; again: nothing.
---Raises: IO if not all of it could be written.
function Trace:dispose()
  if getmetatable(self) ~= Trace then core.refuse_self(Trace, self) end
  if self ~= current then return end
  local ok, err = pcall(probe.trace_end, self.path)
  local ended = ok or core.errors.is(err, "IO") -- else there was no memory: it may be tried again
  if ended and self == current then current = nil end
  if not ok then error(err, 0) end
end

function Trace:__close() self:dispose() end

-- When the state closes: until then it is `current`.
function Trace:__gc()
  local ok, err = pcall(self.dispose, self)
  if not ok then core.report(err) end
end

---Writes what the tasks do from now on to a file, as Chrome's trace events (JSON), for chrome://tracing or
---ui.perfetto.dev: each run of a task between two waits, and the life and the waits of each task. Until the
---trace is disposed of, or the state closes. There is one at a time.
---Raises: IO if the file cannot be opened; InvalidOperation if there is a trace already.
---@param path string
---@return coflow.diagnostics.Trace # close it by a `<close>` variable or `dispose()`; it may as well be dropped
function diagnostics.trace(path)
  if type(path) ~= "string" then core.type_error(1, "string", path) end
  if path:find("\0", 1, true) then core.argument_error(1, "a path has no zero byte") end
  local trace = setmetatable({ path = path }, Trace)
  if not probe.trace(path) then
    path = current and current.path or "another file"
    error(core.errors.InvalidOperation(("a trace is being written already, to %s"):format(path)), 2)
  end
  current = trace
  return trace
end

---@class coflow.diagnostics.Metrics
---@field tasks integer with a function to run, that have not ended
---@field waiting integer of these, suspended, and not ready
---@field ready integer tasks and completions on the ready list
---@field deadlines integer that are armed: sleeps, timeouts, Timers
---@field requests integer operations that libuv has in hands
---@field handles integer open sockets, listeners and pipes; a closed one until the loop has turned
---@field processes integer that run
---@field idle_coroutines integer kept for new tasks
---@field memory integer? bytes that Lua uses; nil where the collector does not tell: in a finalizer
---@field started integer tasks started, and …
---@field steps integer … runs of a task between two waits, and …
---@field busy number … seconds that these took, since the module was loaded
---@field elapsed number seconds since then
---@field utilization number busy / elapsed

---Figures of the moment, and of the time since the module was loaded. Its time is real, also in a test.
---@return coflow.diagnostics.Metrics
function diagnostics.metrics()
  local metrics, kilobytes = probe.counts(), collectgarbage "count"
  local list, _, waiting = core.live_tasks()
  metrics.tasks, metrics.waiting = #list, waiting
  metrics.memory = kilobytes and math.floor(kilobytes * 1024)
  metrics.utilization = metrics.elapsed > 0 and math.min(metrics.busy / metrics.elapsed, 1) or 0
  return metrics
end

return diagnostics
