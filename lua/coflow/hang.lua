-- coflow.hang: which task waits for what, and circles of tasks that hold each other up. For diagnostics, and for the
-- error of a deadlock (src/deadlock.c, which tells the rows).
--
-- A circle is told once for each knot: tasks that hold each other up in many ways are in one of them.
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"

local hang = {}

local LONGEST = 20 -- tasks of a circle that are named

---@class coflow.hang.Row
---@field task coflow.Task
---@field parent coflow.Task|false|nil the one that has started it
---@field wait string? what it waits for, and where; or that it is ready
---@field waits boolean? it is suspended, and not ready
---@field seconds number? since when
---@field target any? what it waits for: a task, a channel, a lock …
---@field on coflow.Task[]? those that must end, or give back a lock, before it goes on; in a row that is not deep: none

---The rows of all tasks with a function to run that have not ended; and by task.
---@param deep boolean with `target` and `on`
---@return coflow.hang.Row[]
---@return table<coflow.Task, coflow.hang.Row>
function hang.rows(deep)
  local list, of = core.survey(deep), {}
  for _, row in ipairs(list) do of[row.task] = row end
  return list, of
end

---Its name and id; a name of many lines is told in one.
---@param task coflow.Task
function hang.name_of(task) return ("'%s' (#%d)"):format(task.name:gsub("%c", "?"), task.id) end

local function line_of(path, from)
  local names = {}
  for i = from, math.min(#path, from + LONGEST - 1) do names[#names + 1] = hang.name_of(path[i].row.task) end
  local more = #path - from + 1 - #names
  if more > 0 then names[#names + 1] = ("%d more"):format(more) end
  names[#names + 1] = names[1]
  return ("circle: %s waits for %s"):format(names[1], table.concat(names, ", which waits for ", 2))
end

---The circles among these rows, or among all, a line each. Depth first, without recursion: `path` is the chain of
---those that are looked at, `at[row]` the place of one in it, or false when all behind it has been seen.
---@param list? coflow.hang.Row[]
---@param of? table<coflow.Task, coflow.hang.Row>
---@return string[]
function hang.circles(list, of)
  if not list then list, of = hang.rows(true) end
  local found, at, told = {}, {}, {}
  local path = {}
  local function enter(row)
    path[#path + 1] = { row = row, next = 1 }
    at[row] = #path
  end
  for _, start in ipairs(list) do
    if at[start] == nil then enter(start) end
    while #path > 0 do
      local top = path[#path]
      local on = top.row.on
      local other = on and of[on[top.next]]
      top.next = top.next + 1
      if not on or top.next > #on + 1 then
        at[top.row], path[#path] = false, nil
      elseif other and at[other] then
        local new = true
        for i = at[other], #path do
          new = new and not told[path[i].row]
          told[path[i].row] = true
        end
        if new then found[#found + 1] = line_of(path, at[other]) end
      elseif other and at[other] == nil then
        enter(other)
      end
    end
  end
  return found
end

return hang
