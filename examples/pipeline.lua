--[[
pipeline.lua - a pipeline over real files: walk a tree, read, count, add up, each stage at its own pace.

The stages are joined by channels with room for a few items. A stage that is ahead waits for the one behind it, so a
tree of any size passes through the memory of a few files. A file that cannot be read is reported, and the rest goes on;
Ctrl-C ends all stages where they wait, and what was counted by then is told.

    lua5.4 examples/pipeline.lua [--progress] [directory]

SPDX-License-Identifier: MIT
]]

local flow = require "coflow"
local fs = flow.fs

local USAGE = [[
usage: lua5.4 examples/pipeline.lua [--progress] [directory]
  directory   where to look for .c, .h and .lua files (default: .)
  --progress  draw the progress bar, also where standard error is no terminal
exit code: 0, 1 if something could not be read, 2 for wrong arguments, 130 after Ctrl-C]]

local PATHS, TEXTS, READERS = 1000, 4, 4 -- paths are small, and tell the bar early how much there is

local totals = { files = 0, lines = 0, words = 0, longest = 0 }
local problems = {}
local found, walking = 0, true
local held, most_held = 0, 0 -- texts in memory

-- A stage: calls fn(item, output) for what comes from `input`, up to `degree` at the same time, and returns its
-- output, which is complete when the stage has ended, however it ended.
local function stage(group, input, options, fn)
  local output = flow.Channel.bounded(options.room)
  group:spawn(function()
    local _ <close> = setmetatable({}, { __close = function() output:complete() end })
    flow.parallel.for_each(input, { max_degree_of_parallelism = options.degree }, function(item) fn(item, output) end)
  end)
  return output
end

-- ---- The stages ---------------------------------------------------------------------------------------------

local function is_source(name) return name:find("%.[ch]$") or name:find("%.lua$") end

local function walk(directory, paths)
  local ok, entries = flow.pcall(fs.scandir, directory)
  if not ok then return table.insert(problems, entries.message) end
  for name, type in entries do
    local path = directory .. "/" .. name
    local hidden = name:find("^%.")
    if type == "directory" and not hidden then
      walk(path, paths)
    elseif type ~= "directory" and not hidden and is_source(name) then
      found = found + 1
      paths:write(path) -- waits while there is no room
    end
  end
end

local function read(path, texts)
  held = held + 1
  most_held = math.max(most_held, held)
  local ok, text = flow.pcall(fs.read_file, path)
  if ok then return texts:write { path = path, text = text } end
  held = held - 1
  table.insert(problems, text.message)
end

-- A function is what begins at the start of a line, up to the next line that begins with its end.
local function count(item, counts)
  local result = { path = item.path, lines = 0, words = 0, longest = 0 }
  local start, name
  for line in item.text:gsub("[^\n]$", "%0\n"):gmatch("(.-)\n") do
    result.lines = result.lines + 1
    for _ in line:gmatch("%S+") do result.words = result.words + 1 end
    if line:find("^[%a_].*%(.*{$") or line:find("^%l* ?function .*%)$") then
      start, name = result.lines, line:match("([%w_.:]+)%(")
    elseif start and (line:find("^}") or line:find("^end")) then
      local length = result.lines - start + 1
      if length > result.longest then result.longest, result.name = length, name end
      start = nil
    end
  end
  held = held - 1
  counts:write(result)
end

local function add(result)
  totals.files = totals.files + 1
  totals.lines, totals.words = totals.lines + result.lines, totals.words + result.words
  if result.longest > totals.longest then
    totals.longest, totals.where = result.longest, ("%s in %s"):format(result.name, result.path)
  end
end

-- ---- Progress and report ------------------------------------------------------------------------------------

local function draw()
  local done = totals.files + #problems
  local width = found > 0 and math.min(done * 40 // found, 40) or 0
  io.stderr:write(("\r[%s%s] %d of %d%s "):format(("#"):rep(width), (" "):rep(40 - width), done, found,
    walking and "+" or ""))
end

-- Redraws the bar now and then, until it is canceled.
local function progress()
  local _ <close> = setmetatable({}, { __close = function() draw() io.stderr:write("\n") end })
  local timer <close> = flow.PeriodicTimer(0.1)
  repeat draw() until not timer:wait_for_next_tick()
end

local function report(finished)
  for _, problem in ipairs(problems) do print("not read: " .. problem) end
  print(("%d files, %d lines, %d words%s"):format(totals.files, totals.lines, totals.words,
    finished and "" or ", and then it was interrupted"))
  if totals.where then print(("longest function: %s, %d lines"):format(totals.where, totals.longest)) end
  print(("at most %d texts in memory"):format(most_held))
end

local function run(directory, with_progress)
  flow.task_group(function(group)
    local bar = with_progress and group:spawn(progress)
    local paths = stage(group, { directory }, { room = PATHS }, function(root, output)
      walk(root, output)
      walking = false
    end)
    local texts = stage(group, paths, { room = TEXTS, degree = READERS }, read)
    local counts = stage(group, texts, { room = 1, degree = 1 }, count)
    for result in counts:iterate() do add(result) end
    if bar then bar:cancel() end
  end)
end

local function main(...)
  local directory, with_progress = ".", os.execute("test -t 2") -- is standard error a terminal?
  for _, word in ipairs { ... } do
    if word == "--progress" then
      with_progress = true
    elseif word:find("^%-") then
      io.stderr:write("pipeline: unknown option ", word, "\n", USAGE, "\n")
      return 2
    else
      directory = word
    end
  end
  local ok, err = pcall(run, directory, with_progress)
  if not ok and not flow.errors.is(err, "OperationCanceled") then error(err, 0) end
  report(ok)
  if not ok then error(err, 0) end -- flow.main makes an exit code of it
  return #problems == 0 and 0 or 1
end

os.exit(flow.main(main, ...), true)

--> ... files, ... lines, ... words
--> longest function: ... in ./..., ... lines
--> at most ... texts in memory
