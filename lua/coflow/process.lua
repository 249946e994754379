-- coflow.process: programs that run beside this one. Starting, signals and waiting are in C (process.c); here is what
-- is best said in Lua: options, closing, and running a program from beginning to end.
--
-- Who ends a child: `close` and `<close>`, a canceled `run`, and a canceled `wait` if nobody else waits. All do it
-- alike: SIGTERM, after the grace SIGKILL, and they return when it is gone. A process that is merely forgotten goes on.
--
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"
local arguments = require "coflow.arguments"
local closing = require "coflow.closing"
local under = require "coflow.under_token"
require "coflow.net" -- pipes are streams
local task_group = require("coflow.group").task_group

local is_error = core.errors.is
local NONE = core.none
local GRACE = 5 -- seconds

local process = {}
local native

-- Options ------------------------------------------------------------------------------------------

-- What is wrong with a list of a program and its arguments, or nil. `place`: where options go, should some be in it.
local function wrong_args(args, place)
  if type(args) ~= "table" then
    return "args: list of a program and its arguments expected, got " .. type(args)
  end
  local n = #args
  for key in next, args do
    if key ~= "n" and not (math.type(key) == "integer" and key >= 1 and key <= n) then
      return ("args: unknown key '%s': %s"):format(tostring(key), place)
    end
  end
  if n == 0 then return "args is empty: a program expected" end
  for i = 1, n do
    local arg = args[i]
    if type(arg) ~= "string" then
      return ("args[%d]: string expected, got %s"):format(i, type(arg))
    elseif arg:find("\0", 1, true) then
      return ("args[%d] has a zero byte"):format(i)
    end
  end
end

local function wrong_env(env)
  if type(env) ~= "table" then return "env: table expected, got " .. type(env) end
  for name, value in next, env do
    if type(name) ~= "string" or name == "" or name:find("[=\0]") then
      local what = type(name) == "string" and ("%q"):format(name) or type(name)
      return ("env: %s is no name of a variable: { NAME = \"value\" }"):format(what)
    elseif value ~= false and type(value) ~= "string" then
      return ("env.%s: string or false expected, got %s"):format(name, type(value))
    elseif value and value:find("\0", 1, true) then
      return ("env.%s has a zero byte"):format(name)
    end
  end
end

local words = { pipe = true, inherit = true, null = true }

local function wrong_standard(name, value)
  if value == nil or words[value] or name == "stderr" and value == "stdout" or native.is_standard(value) then return end
  return ("%s: \"pipe\", \"inherit\", \"null\", %sa stream, a file or a descriptor expected"):format(name,
    name == "stderr" and "\"stdout\", " or "")
end

local function wrong_options(options)
  local cwd, grace = options.cwd, options.grace
  if cwd ~= nil and (type(cwd) ~= "string" or cwd == "" or cwd:find("\0", 1, true)) then
    return "cwd: path of a directory expected"
  elseif grace ~= nil and not (type(grace) == "number" and grace >= 0) then
    return "grace: number of seconds expected"
  end
  return options.env ~= nil and wrong_env(options.env)
    or wrong_standard("stdin", options.stdin)
    or wrong_standard("stdout", options.stdout)
    or wrong_standard("stderr", options.stderr)
end

local function start(args, options, stdin, stdout, stderr)
  return native.spawn(table.move(args, 1, #args, 1, {}), options.cwd,
    options.env or options.clear_env and {} or nil, options.clear_env, stdin, stdout, stderr, options.detached,
    options.grace or GRACE)
end

-- Processes ----------------------------------------------------------------------------------------

local function dispose(stream)
  if stream then stream:dispose() end
end

-- What it still says while it ends is read by nobody, but writing it does not kill it: its pipes are closed last.
local function close(self)
  native.terminate(self)
  dispose(self.stdin)
  local ok, err = true, nil
  if not self.is_detached then ok, err = pcall(native.ended, self, NONE) end -- where nobody can wait, it raises
  dispose(self.stdout)
  dispose(self.stderr)
  if not ok then error(err, 0) end
end

native = core.open_process(close)
local Process = core.methods("coflow.Process")

---Ends it, and returns when it has ended and its pipes are closed: SIGTERM, and SIGKILL after the grace. One that is
---detached goes on; only its pipes are closed. A second time is harmless. `<close>` does the same.
---Cancellation: does not shorten it; the grace bounds it.
function Process:close()
  core.check_class(1, self, "coflow.Process")
  close(self)
end

local close_async = core.async(close)

---@return coflow.Task
function Process:close_async()
  core.check_class(1, self, "coflow.Process")
  return close_async(self)
end

---The same, without waiting: it is told to end, and its pipes are closed at once. It is killed after the grace if it
---has not ended, while the loop runs.
function Process:dispose()
  core.check_class(1, self, "coflow.Process")
  native.terminate(self)
  dispose(self.stdin)
  dispose(self.stdout)
  dispose(self.stderr)
end

local giving_up = {
  __close = function(guard, err)
    if is_error(err, "OperationCanceled") and native.give_up(guard.process) then
      native.ended(guard.process, NONE)
    end
  end,
}

local function wait_here(self, token)
  local _ <close> = setmetatable({ process = self }, giving_up)
  return native.ended(self, token)
end

local function wait(self, token)
  core.throw_if_canceled(token)
  return closing(wait_here, self, token)
end

---Waits for its end. Any number of tasks may wait, also when it has ended.
---Cancellation: ends it as `close` does, but for the pipes, and raises when it has ended; unless other tasks wait for
---it as well (the cancellation of the last one ends it), or it is detached: then it goes on, and this raises at once.
---Canceled before the call: raises, and leaves it alone.
---To wait for some time only, `process:wait_async():wait_async(seconds)`.
---Source: .NET's WaitForExitAsync, which leaves the process alone.
---@param token? coflow.CancellationToken
---@return integer code 128 + the signal if it was ended by one, as in a shell; -1: another part of this program has
---waited for it
---@return string? signal its name: "SIGTERM"
function Process:wait(token)
  core.check_class(1, self, "coflow.Process")
  arguments.check_token(2, token)
  return wait(self, token)
end

local wait_async = core.async(wait)

---@param token? coflow.CancellationToken
---@return coflow.Task
function Process:wait_async(token)
  core.check_class(1, self, "coflow.Process")
  arguments.check_token(2, token)
  return wait_async(self, token)
end

-- Starting -----------------------------------------------------------------------------------------

---@class coflow.ProcessOptions
---@field args string[] the program, looked for in PATH unless it has a slash, and its arguments: no shell reads them
---@field cwd? string its working directory
---@field env? table<string, string|false> changes of the environment; false removes a variable
---@field clear_env? boolean it gets nothing but `env`
---@field stdin? coflow.Standard
---@field stdout? coflow.Standard
---@field stderr? coflow.Standard | "stdout" "stdout": the same as its stdout
---@field grace? number seconds between SIGTERM and SIGKILL, 5 by default; 0: killed at once, math.huge: never
---@field detached? boolean in a session of its own; nothing here ends it but `kill`, and it outlives this program

---What the child has there: "inherit" (by default): what this program has; "null": nothing; "pipe": a stream of the
---process, `process.stdin` …; a number: that descriptor; an open file of `coflow.fs` or of `io`; a stream, which is the
---child's from then on, and closed here.
---@alias coflow.Standard "inherit" | "null" | "pipe" | integer | coflow.File | coflow.Stream | file*

local spawn_options = {
  args = true, cwd = true, env = true, clear_env = true, stdin = true, stdout = true, stderr = true, grace = true,
  detached = true,
}

---Starts a program. It goes on until it ends by itself or somebody ends it; nobody needs to wait for it.
---Cancellation: canceled before the call, by the token or the ambient one, it starts nothing.
---Raises: IO (`code`, `path`) if it cannot be started, ENOENT if there is none, or no `cwd`. InvalidOperation if a
---stream or file given to it is in use, or holds bytes that were read ahead.
---@param options coflow.ProcessOptions
---@param token? coflow.CancellationToken
---@return coflow.Process
function process.spawn(options, token)
  if type(options) == "table" and options.args == nil and #options > 0 then
    core.argument_error(1, "the list goes into a field: spawn { args = { … }, cwd = … }")
  end
  options = core.check_options(1, options, spawn_options)
  local wrong = wrong_args(options.args, "options go beside it: spawn { args = { … }, cwd = … }")
    or wrong_options(options)
  if wrong then core.argument_error(1, wrong) end
  arguments.check_token(2, token)
  core.throw_if_canceled(token)
  return start(options.args, options, options.stdin or "inherit", options.stdout or "inherit",
    options.stderr or "inherit")
end

-- Running ------------------------------------------------------------------------------------------

local function send(stream, input)
  stream:write(input)
  stream:close()
end

-- A program need not read all that it is given.
local function feed(stream, input)
  local ok, err = core.pcall(send, stream, input)
  if ok or is_error(err, "ObjectDisposed") then return end
  if not (is_error(err, "IO") and (err.code == "EPIPE" or err.code == "ECANCELED")) then error(err, 0) end
end

local function run_here(args, input, options, token)
  local _ <close> = under.blame(token)
  local _ <close> = under.open(token)
  core.throw_if_canceled()
  local child <close> = start(args, options, input and "pipe" or "null", "pipe", options.stderr or "pipe")
  local output, errors, code, signal
  task_group(function(group)
    if input then group:spawn(feed, child.stdin, input) end
    output = group:spawn(child.stdout.read_all, child.stdout, options.max)
    if child.stderr then errors = group:spawn(child.stderr.read_all, child.stderr, options.max) end
    code, signal = native.ended(child)
    if input then child.stdin:dispose() end -- others may hold its other end, and need not read
  end)
  return output.result, code, errors and errors.result, signal
end

local function run(args, input, options, token)
  core.check_here()
  return closing(run_here, args, input, options, token)
end

local run_async = core.async(run)

local run_options = { cwd = true, env = true, clear_env = true, stderr = true, grace = true, max = true }

-- Which argument is wrong, and what is; or nil.
local function wrong_run(args, input, options, token)
  local listed = type(args) == "table" and args.args == nil
  local max, wrong = options.max, wrong_args(args, listed and "options come third: run({ … }, input, { cwd = … })"
    or "run takes the list itself, spawn a table with args")
  if wrong then
    return 1, wrong
  elseif input ~= nil and type(input) ~= "string" then
    return 2, "input must be a string, or nil: options come third"
  elseif max ~= nil and not arguments.is_count(max, 1) then
    return 3, "max: number of bytes expected"
  elseif token ~= nil and not core.is_token(token) then
    return 4, "token must be a CancellationToken"
  end
  wrong = wrong_options(options)
  if wrong then return 3, wrong end
end

local function check_run(args, input, options, token)
  options, token = arguments.token_last(options, token)
  if options == nil then input, token = arguments.token_last(input, token) end
  options = core.check_options(3, options, run_options)
  local n, wrong = wrong_run(args, input, options, token)
  if wrong then core.argument_error(n, wrong) end
  return args, input, options, token
end

---Runs a program from beginning to end: writes `input` to it, and reads all that it writes meanwhile. Returns once it
---has ended and nobody has its output open any more.
---Cancellation: ends it (SIGTERM, after the grace SIGKILL) and raises when it has ended, whoever has its output open.
---Raises: IO if it cannot be started; with code EMSGSIZE, when it has ended, if it writes more than `max` bytes.
---@param args string[] the program and its arguments
---@param input? string nil: it has no input. It need not read all of it.
---@param options? { cwd?: string, env?: table<string, string|false>, clear_env?: boolean, grace?: number,
---stderr?: coflow.Standard|"stdout", max?: integer } as `spawn`; stderr: "pipe" by default. max: bytes of output, and
---of error output, 64 MiB by default.
---@param token? coflow.CancellationToken
---@return string output
---@return integer code as `wait` tells it
---@return string? errors its error output, if that is a pipe
---@return string? signal
function process.run(args, input, options, token)
  if core.current_task() then return run(check_run(args, input, options, token)) end
  return core.run(run, check_run(args, input, options, token))
end

---@param args string[]
---@param input? string
---@param options? table
---@param token? coflow.CancellationToken
---@return coflow.Task
function process.run_async(args, input, options, token)
  return run_async(check_run(args, input, options, token))
end

return process
