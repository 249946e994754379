-- coflow.diagnostics: what a program is doing: its tasks as a tree, who waits on whom, who keeps the loop, a trace.
--
-- All of it can be asked for at any time, from a task as well as from outside, and changes nothing. How long a task has
-- waited, and the figures of `metrics`, are known from when this module was first loaded; from then on each step
-- of a task costs two looks at the clock.
--
-- The kernel tells, in one row for each task, what it waits for and who holds it up (src/deadlock.c), and measures
-- (src/probe.c). The words are made here.
--
-- Source: all_tasks and slow_callback_duration of asyncio; the trace event format of Chrome.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local arguments = require "coflow.arguments"

local probe, survey = core.probe, core.survey

local diagnostics = {}

-- Rows --------------------------------------------------------------------------------------------

---@class coflow.diagnostics.Row one of src/deadlock.c, with names
---@field task coflow.Task
---@field parent coflow.Task|false
---@field wait string|false
---@field seconds number|false
---@field on coflow.Task[]

local function rows()
  local list, of = survey(), {}
  for i, row in ipairs(list) do
    local task, parent, wait, seconds, on = table.unpack(row)
    list[i] = { task = task, parent = parent, wait = wait, seconds = seconds, on = on }
    of[task] = list[i]
  end
  return list, of
end

local function name_of(task) return ("'%s' (#%d)"):format(task.name, task.id) end

local function duration(seconds) return seconds and (", for %.3f s"):format(seconds) or "" end

-- What a task does, after its name.
local function doing(row)
  local status = row.task.status
  if row.wait and status ~= "waiting_to_run" then
    return row.wait .. duration(row.seconds)
  elseif status == "created" then
    return "has not been started"
  elseif status == "waiting_to_run" then
    return "is to start"
  end
  return status == "running" and "is running" or "waits to start"
end

---The tasks with a function to run that have not ended, the running one included; a task stands before those that it
---has started.
---@return coflow.Task[]
function diagnostics.tasks()
  local list = {}
  for i, row in ipairs((rows())) do list[i] = row.task end
  return list
end

-- The tree ----------------------------------------------------------------------------------------

local DEEPEST = 40 -- further in the lines are indented no more

---All tasks as a tree, each below the one that has started it: name, id, what it waits for, where, and for how long.
---@return string
function diagnostics.dump()
  local list, of = rows()
  local below, roots, lines = {}, {}, {}
  for _, row in ipairs(list) do
    local parent = of[row.parent]
    local siblings = parent and (below[parent] or {}) or roots
    if parent then below[parent] = siblings end
    siblings[#siblings + 1] = row
  end
  lines[1] = ("%d %s at %.3f s"):format(#list, #list == 1 and "task" or "tasks", core.loop.now())
  local function add(siblings, indent, depth)
    for i, row in ipairs(siblings) do
      local last = i == #siblings
      lines[#lines + 1] = ("%s%s %s %s"):format(indent, last and "└─" or "├─", name_of(row.task), doing(row))
      if below[row] then
        add(below[row], depth < DEEPEST and indent .. (last and "   " or "│  ") or indent, depth + 1)
      end
    end
  end
  add(roots, "", 1)
  return table.concat(lines, "\n")
end

-- Hangs -------------------------------------------------------------------------------------------

-- Circles of tasks that hold each other up, each as a list. Depth first, without recursion: `path` is the chain of
-- those that are looked at, `at[row]` the place of one in it, or false when all behind it has been seen.
local function circles(list, of)
  local found, at = {}, {}
  for _, start in ipairs(list) do
    local path = {}
    local function enter(row)
      path[#path + 1] = { row = row, next = 1 }
      at[row] = #path
    end
    if at[start] == nil then enter(start) end
    while #path > 0 do
      local top = path[#path]
      local other = of[top.row.on[top.next]]
      top.next = top.next + 1
      if top.next > #top.row.on + 1 then
        at[top.row], path[#path] = false, nil
      elseif other and at[other] then
        local circle = {}
        for i = at[other], #path do circle[#circle + 1] = path[i].row.task end
        found[#found + 1] = circle
      elseif other and at[other] == nil then
        enter(other)
      end
    end
  end
  return found
end

---Who waits on whom: a line for each task that waits (one for all of a name that wait for the same), and each circle
---of tasks that hold each other up, by awaiting, a lock, or a task group. Such a circle never ends by itself.
---@return string
function diagnostics.hang_report()
  local list, of = rows()
  local waiting, lines, like = 0, {}, {}
  for _, row in ipairs(list) do
    if row.task.status == "waiting_for_activation" and row.wait then
      local key = row.task.name .. "\0" .. row.wait
      waiting = waiting + 1
      if like[key] then
        like[key].more = like[key].more + 1
      else
        like[key] = { row = row, more = 0 }
        lines[#lines + 1] = like[key]
      end
    end
  end
  if waiting == 0 then return "no task waits" end
  for i, line in ipairs(lines) do
    local row, more = line.row, line.more
    lines[i] = ("  %s %s%s%s"):format(name_of(row.task), row.wait, duration(row.seconds),
      more > 0 and ("; so do %d more of that name"):format(more) or "")
  end
  table.insert(lines, 1, waiting == 1 and "1 task waits:" or ("%d tasks wait:"):format(waiting))
  for _, circle in ipairs(circles(list, of)) do
    local names = {}
    for i, task in ipairs(circle) do names[i] = name_of(task) end
    names[#names + 1] = names[1]
    lines[#lines + 1] = ("circle: %s waits for %s"):format(names[1], table.concat(names, ", which waits for ", 2))
  end
  return table.concat(lines, "\n")
end

-- The loop ----------------------------------------------------------------------------------------

---Calls `fn(task, seconds)` for each task that has kept the loop for longer than `seconds` at a stretch, without
---waiting: once it has come to rest, before the loop looks at timers and events again, outside every task. `seconds` is
---real time, also in a test. What `fn` raises goes to the handler of unobserved exceptions. There is one such
---function at a time: `on_blocked(nil)` ends it.
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
  current = nil
  if not probe.trace_end() then
    error(core.errors.IO("the trace could not be written to " .. self.path, { path = self.path }), 2)
  end
end

function Trace:__close() self:dispose() end

---Writes what the tasks do from now on to a file, as Chrome's trace events (JSON), for chrome://tracing or
---ui.perfetto.dev: each run of a task between two waits, and the life and the waits of each task. Until the
---trace is disposed of, or the state closes. There is one at a time.
---Raises: IO if the file cannot be opened; InvalidOperation if there is a trace already.
---@param path string
---@return coflow.diagnostics.Trace # close it by a `<close>` variable or `dispose()`; it may as well be dropped
function diagnostics.trace(path)
  if type(path) ~= "string" then core.type_error(1, "string", path) end
  if path:find("\0", 1, true) then core.argument_error(1, "a path has no zero byte") end
  if not probe.trace(path) then
    error(core.errors.InvalidOperation(("a trace is being written already, to %s"):format(current.path)), 2)
  end
  current = setmetatable({ path = path }, Trace)
  return current
end

---@class coflow.diagnostics.Metrics
---@field tasks integer with a function to run, that have not ended
---@field waiting integer of these, suspended
---@field ready integer tasks and completions on the ready list
---@field deadlines integer that are armed: sleeps, timeouts, Timers
---@field requests integer operations that libuv has in hands
---@field handles integer open sockets, listeners, pipes, processes
---@field idle_coroutines integer kept for new tasks
---@field memory integer bytes that Lua uses
---@field started integer tasks started, and …
---@field steps integer … runs of a task between two waits, and …
---@field busy number … seconds that these took, since the module was loaded
---@field elapsed number seconds since then
---@field utilization number busy / elapsed

---Figures of the moment, and of the time since the module was loaded. Its time is real, also in a test.
---@return coflow.diagnostics.Metrics
function diagnostics.metrics()
  local metrics, waiting = probe.counts(), 0
  local list = rows()
  for _, row in ipairs(list) do
    if row.task.status == "waiting_for_activation" then waiting = waiting + 1 end
  end
  metrics.tasks, metrics.waiting = #list, waiting
  metrics.memory = math.floor(collectgarbage("count") * 1024)
  metrics.utilization = metrics.elapsed > 0 and math.min(metrics.busy / metrics.elapsed, 1) or 0
  return metrics
end

return diagnostics
