-- spec/process_spec.lua - programs on the real clock: only sh, cat, sleep, env, true and false. The deadline ends a
-- broken run; whoever must be ready says so through a pipe.
-- SPDX-License-Identifier: MIT

local flow = require "coflow"
local helper = require "spec.helper"
local testing = require "coflow.testing"

local fs, process = flow.fs, flow.process
local many, raised, raises = helper.many, helper.raised, helper.raises

local LIMIT = 50 -- seconds

-- How many descriptors this process has open.
local function descriptors()
  local n = 0
  for _ in fs.scandir("/proc/self/fd") do n = n + 1 end
  return n
end

-- State and parent of a process; nil: there is none.
local function status_of(pid)
  local ok, stat = pcall(fs.read_file, ("/proc/%s/stat"):format(pid))
  if not ok then return nil end
  local state, parent = stat:match("%) (%a) (%d+)")
  return state, math.tointeger(parent)
end

-- The children of this process, dead ones that nobody has reaped included: "pid state", a line each.
local function children()
  local self = math.tointeger(fs.read_file("/proc/self/stat"):match("^%d+"))
  local list = {}
  for name in fs.scandir("/proc") do
    if name:find("^%d+$") then
      local state, parent = status_of(name)
      if parent == self then list[#list + 1] = name .. " " .. state end
    end
  end
  return table.concat(list, "\n")
end

-- A test body: it runs as a task under a deadline, and leaves no child, no zombie and no descriptor.
local function clean(fn)
  return function()
    collectgarbage()
    flow.run(function() -- libuv opens its own descriptors
      process.run({ "true" })
      fs.watch("/"):close()
      descriptors()
    end)
    local before = flow.run(descriptors)
    flow.run(function() flow.with_timeout(LIMIT, fn) end)
    collectgarbage()
    collectgarbage()
    assert.equal(before, flow.run(descriptors), "descriptors left open")
    assert.equal("", flow.run(children), "children left")
    assert.is_false(flow.loop.is_alive())
  end
end

local function until_true(condition)
  while not condition() do flow.sleep(0.001) end
end

local function sh(script, options)
  options = options or {}
  options.args = { "sh", "-c", script }
  return process.spawn(options)
end

-- One that says that it is ready, and then sleeps; `first` is what it does before.
local function sleeper(first, options)
  options = options or {}
  options.stdout = "pipe"
  local p = sh((first or "") .. "\necho ready\nexec sleep 100", options)
  assert.equal("ready", p.stdout:read_line())
  return p
end

local DEAF = "trap '' TERM" -- which sleep inherits

describe("process.spawn and wait", function()
  it("tell how a program ended", clean(function()
    assert.same({ 0 }, { process.spawn { args = { "true" } }:wait() })
    assert.same({ 1 }, { process.spawn { args = { "false" } }:wait() })
    assert.same({ 42 }, { sh("exit 42"):wait() })
    assert.same({ 128 + 15, "SIGTERM" }, { sh("kill -TERM $$"):wait() })
    assert.same({ 128 + 9, "SIGKILL" }, { sh("kill -KILL $$"):wait() })
    local code, signal = sh("kill -34 $$"):wait()
    assert.same({ 128 + 34, "SIG34" }, { code, signal })
  end))

  it("start nothing if canceled before", clean(function()
    local path = os.tmpname()
    os.remove(path)
    local options = { args = { "touch", path } }
    helper.raises("OperationCanceled", process.spawn, options, flow.CancellationToken.canceled)
    helper.raises("Timeout", flow.with_timeout, 0.001, function()
      pcall(flow.sleep, 60)
      process.spawn(options)
    end)
    assert.is_nil(io.open(path))
    flow.with_cancellation(flow.CancellationTokenSource().token, function()
      process.spawn(options, flow.CancellationToken.none):wait()
    end)
    assert.is_true(os.remove(path))
  end))

  it("tell it to everybody who waits, before and after the end", clean(function()
    local p = sleeper()
    local tasks = {}
    for i = 1, 10 do tasks[i] = i % 2 == 0 and p:wait_async() or flow.spawn(p.wait, p) end
    flow.yield()
    assert.is_true(p.is_running)
    assert.matches("^coflow%.Process %(%d+, running%)$", tostring(p))
    assert.is_true(p:kill())
    for i = 1, 10 do assert.same({ 143, "SIGTERM" }, { flow.await(tasks[i]) }) end
    assert.is_false(p.is_running)
    assert.same({ 143, "SIGTERM" }, { p:wait() })
    assert.same({ 143, "SIGTERM" }, { flow.await(p:wait_async()) })
    assert.same({ 143, "SIGTERM" }, { p:wait(flow.CancellationToken.none) })
    assert.equal(("coflow.Process (%d, ended by SIGTERM)"):format(p.pid), tostring(p))
    p:close()
  end))

  it("give each argument to the program as it is", clean(function()
    local args = { "$HOME", "; exit 3", "", "a b", "*", "\"'`\\", "two\nlines", "-n", "ü\xff" }
    local out = process.run { "sh", "-c", "for a; do printf '[%s]' \"$a\"; done", "sh", table.unpack(args) }
    assert.equal("[" .. table.concat(args, "][") .. "]", out)
  end))

  it("know the number of the process", clean(function()
    local p <close> = sh("echo $$", { stdout = "pipe" })
    assert.equal(p.pid, math.tointeger(p.stdout:read_line()))
    assert.is_nil(p.stdin)
    assert.is_nil(p.stderr)
  end))

  it("work outside every task", function()
    local p = process.spawn { args = { "sh", "-c", "cat; exit 3" }, stdin = "pipe", stdout = "pipe" }
    p.stdin:write("from outside")
    p.stdin:close()
    assert.equal("from outside", p.stdout:read_all())
    assert.equal(3, p:wait())
    assert.equal(3, p:wait_async():await())
    p:close()
    assert.equal("x", (process.run({ "cat" }, "x")))
    assert.equal("", flow.run(children))
  end)

  it("work for many at once", clean(function()
    local n = many(200, 20)
    local list = {}
    for i = 1, n do list[i] = sh("read line; exit " .. i % 100, { stdin = "pipe" }) end
    local tasks = {}
    for i = n, 1, -1 do tasks[i] = list[i]:wait_async() end
    for i = 1, n do list[i].stdin:write("go\n") end
    for i = 1, n do assert.equal(i % 100, flow.await(tasks[i])) end
    for i = 1, n do list[i]:close() end
  end))

  it("tell whether it is the program or the working directory that is not there", clean(function()
    local function told(message, options)
      assert.equal("IO: " .. message, tostring(raises("IO", process.spawn, options)))
      assert.equal("IO: " .. message, tostring(raises("IO", process.run, options.args, nil, { cwd = options.cwd })))
    end
    told("spawn 'no-such-program': no such file or directory (ENOENT)", { args = { "no-such-program" } })
    told("spawn: the working directory '/no/such': no such file or directory (ENOENT)",
      { args = { "true" }, cwd = "/no/such" })
    told("spawn: the working directory '/dev/null': not a directory (ENOTDIR)",
      { args = { "true" }, cwd = "/dev/null" })
    told("spawn 'no-such-program': no such file or directory (ENOENT)", { args = { "no-such-program" }, cwd = "/" })
  end))

  it("refuse what cannot be started, and leave nothing open", clean(function()
    local function refused(code, path, options)
      options.stdin, options.stdout, options.stderr = "pipe", "pipe", "pipe"
      local err = raises("IO", process.spawn, options)
      assert.same({ code, "spawn", path }, { err.code, err.syscall, err.path })
    end
    local before = descriptors()
    collectgarbage("stop") -- nothing is left to be collected
    for _ = 1, 3 do
      refused("ENOENT", "no-such-program", { args = { "no-such-program" } })
      refused("ENOENT", "/no/such/program", { args = { "/no/such/program", "x" } })
      refused("ENOENT", "", { args = { "" } })
      refused("EACCES", "/dev/null", { args = { "/dev/null" } })
      refused("ENOENT", "/no/such/place", { args = { "true" }, cwd = "/no/such/place" })
      refused("ENOTDIR", "/dev/null", { args = { "true" }, cwd = "/dev/null" })
      refused("ENOENT", "no-such-program", { args = { "no-such-program" }, cwd = "/" })
      refused("E2BIG", "true", { args = { "true", ("x"):rep(1 << 22) } })
      refused("ENOENT", "true", { args = { "true" }, env = { PATH = "/no/such/place" } })
    end
    local after = descriptors()
    collectgarbage("restart")
    assert.equal(before, after)
    local task = process.run_async { "no-such-program" }
    assert.equal("ENOENT", raises("IO", flow.await, task).code)
  end))

  it("refuse wrong arguments, at their caller", clean(function()
    local function refuses(message, fn, ...)
      local arguments = table.pack(...)
      local err = raised(function()
        fn(table.unpack(arguments, 1, arguments.n))
      end)
      assert.equal("string", type(err))
      assert.truthy(err:find(helper.here(-3), 1, true), err)
      assert.truthy(err:find(message, 1, true), err)
    end
    local spawn, run = process.spawn, process.run
    local t = { "true" }
    refuses("bad argument #1", spawn)
    refuses("bad argument #1", spawn, "true")
    refuses("args: list of a program and its arguments expected, got nil", spawn, {})
    refuses("args is empty", spawn, { args = {} })
    refuses("the list goes into a field: spawn { args = {", spawn, { "ls" })
    refuses("args: unknown key 'cwd': options go beside it: spawn {", spawn, { args = { "ls", cwd = "/" } })
    refuses("args: unknown key '3'", spawn, { args = { [1] = "ls", [3] = "x" } })
    refuses("args[1]: string expected, got number", spawn, { args = { 1 } })
    refuses("args[3]: string expected, got boolean", spawn, { args = { "a", "b", true } })
    refuses("args[2] has a zero byte", spawn, { args = { "a", "b\0c" } })
    refuses("unknown option 'shell'", spawn, { args = t, shell = true })
    refuses("cwd: path", spawn, { args = t, cwd = "a\0" })
    refuses("cwd: path", spawn, { args = t, cwd = 1 })
    refuses("env: table expected", spawn, { args = t, env = "A=1" })
    refuses("env: \"A=B\" is no name", spawn, { args = t, env = { ["A=B"] = "1" } })
    refuses("is no name", spawn, { args = t, env = { ["A\0"] = "1" } })
    refuses("env: \"\" is no name", spawn, { args = t, env = { [""] = "1" } })
    refuses("env: number is no name", spawn, { args = t, env = { "A=1" } })
    refuses("env.A: string or false expected, got number", spawn, { args = t, env = { A = 1 } })
    refuses("env.A: string or false expected, got boolean", spawn, { args = t, env = { A = true } })
    refuses("env.A has a zero byte", spawn, { args = t, env = { A = "\0" } })
    refuses("grace: number of seconds", spawn, { args = t, grace = -1 })
    refuses("grace: number of seconds", spawn, { args = t, grace = 0 / 0 })
    refuses("stdin: \"pipe\"", spawn, { args = t, stdin = "stdout" })
    refuses("stdout: \"pipe\"", spawn, { args = t, stdout = "stdout" })
    refuses("stderr: \"pipe\", \"inherit\", \"null\", \"stdout\"", spawn, { args = t, stderr = "stderr" })
    refuses("stdin: \"pipe\"", spawn, { args = t, stdin = -1 })
    refuses("stdin: \"pipe\"", spawn, { args = t, stdin = 1.5 })
    refuses("stdin: \"pipe\"", spawn, { args = t, stdin = {} })
    for _, f in ipairs { run, process.run_async } do
      refuses("args[1]: string expected, got table", f, { {} })
      refuses("args: unknown key 'cwd': options come third: run({", f, { "ls", cwd = "/" })
      refuses("args: unknown key 'args': run takes the list itself, spawn a table with args", f, { args = { "ls" } })
      refuses("args is empty", f, { n = 0 })
      refuses("bad argument #2", f, t, 1)
      refuses("bad argument #3", f, t, nil, { stdin = "null" })
      refuses("max: number of bytes", f, t, nil, { max = 0 })
      refuses("stderr: \"pipe\"", f, t, nil, { stderr = "x" })
      refuses("bad argument #4", f, t, nil, nil, "token")
    end
    local p <close> = spawn { args = t }
    refuses("CancellationToken expected", p.wait, p, 1)
    refuses("CancellationToken expected", p.wait_async, p, 1)
    refuses("no such signal: its name is SIGTERM", p.kill, p, "TERM")
    refuses("no such signal)", p.kill, p, "SIGTERMINATE")
    refuses("Process expected", p.wait, 1)
    refuses("Process expected", p.close, io.stdout)
    assert.has_error(function() p.pid = 1 end)
  end))
end)

describe("pipes of a process", function()
  it("are streams: what is written comes in, what it writes goes out", clean(function()
    local p <close> = process.spawn { args = { "cat" }, stdin = "pipe", stdout = "pipe" }
    for i = 1, 10 do
      p.stdin:write(("line %d\n"):format(i))
      assert.equal("line " .. i, p.stdout:read_line())
    end
    p.stdin:write("rest")
    p.stdin:shutdown()
    assert.equal("rest", p.stdout:read_all())
    assert.equal(0, p:wait())
    raises("InvalidOperation", p.stdin.write, p.stdin, "more")
    p.stdin:close()
    raises("ObjectDisposed", p.stdin.write, p.stdin, "more")
  end))

  it("end the input when they are closed, after what was written before", clean(function()
    local n = many(3000000, 300000)
    for _, how in ipairs { "close", "shutdown" } do
      local p <close> = process.spawn { args = { "cat" }, stdin = "pipe", stdout = "pipe" }
      local text = ("0123456789"):rep(n // 10)
      local sent = flow.spawn(function()
        p.stdin:write(text)
        p.stdin[how](p.stdin)
      end)
      assert.is_true(text == p.stdout:read_all(math.huge))
      flow.await(sent)
      assert.equal(0, p:wait())
    end
  end))

  it("hold nothing of what was written, once they are shut down", clean(function()
    local size, list = 60000, {} -- two are more than a pipe takes, and less than makes a writer wait
    local function fill(p)
      p.stdin:write(("x"):rep(size))
      p.stdin:write(("y"):rep(size))
      p.stdin:shutdown_async()
    end
    for i = 1, 10 do list[i] = sh("sleep 0.05; cat >/dev/null", { stdin = "pipe" }) end
    helper.collect()
    local before = collectgarbage("count") * 1024
    for i = 1, 10 do fill(list[i]) end
    for i = 1, 10 do assert.equal(0, list[i]:wait()) end
    helper.collect()
    assert.is_true(collectgarbage("count") * 1024 - before < 5 * size)
    for i = 1, 10 do list[i]:close() end
  end))

  it("go one way", clean(function()
    local p <close> = process.spawn { args = { "cat" }, stdin = "pipe", stdout = "pipe" }
    raises("IO", p.stdin.read, p.stdin)
    raises("IO", p.stdout.write, p.stdout, "x")
    p.stdin:shutdown()
    raises("IO", p.stdin.read, p.stdin)
    assert.is_nil(p.stdout:read())
  end))

  it("refuse what is written to a program that reads no more", clean(function()
    local p <close> = process.spawn { args = { "true" }, stdin = "pipe" }
    p:wait()
    assert.equal("EPIPE", raises("IO", p.stdin.write, p.stdin, "x").code)
  end))

  it("may be opened by name", clean(function()
    assert.equal("in", (process.run({ "cat", "/dev/stdin" }, "in")))
    local _, _, err = process.run { "sh", "-c", "echo said >/dev/stderr" }
    assert.equal("said\n", err)
  end))

  it("can be one for both outputs", clean(function()
    local script = "echo 1; echo 2 >&2; echo 3; echo 4 >&2"
    local p <close> = sh(script, { stdout = "pipe", stderr = "stdout" })
    assert.equal("1\n2\n3\n4\n", p.stdout:read_all())
    assert.is_nil(p.stderr)
    assert.same({ "1\n2\n3\n4\n", 0 }, { process.run({ "sh", "-c", script }, nil, { stderr = "stdout" }) })
    local _, _, err = process.run({ "sh", "-c", script }, nil, { stderr = "null" })
    assert.is_nil(err)
  end))
end)

describe("what a process is given", function()
  local path
  before_each(function() path = os.tmpname() end)
  after_each(function() os.remove(path) end)

  it("can be nothing", clean(function()
    local p <close> = process.spawn { args = { "cat" }, stdin = "null", stdout = "null", stderr = "null" }
    assert.equal(0, p:wait())
  end))

  it("can be a file of Lua's, with what was written to it before", clean(function()
    local file <close> = assert(io.open(path, "w"))
    file:write("ours\n")
    local p <close> = sh("echo theirs; echo wrong >&2", { stdout = file, stderr = "stdout" })
    p:wait()
    file:write("ours again\n")
    file:flush()
    assert.equal("ours\ntheirs\nwrong\nours again\n", fs.read_file(path))
    file:close()
    assert.equal("EBADF", raises("IO", process.spawn, { args = { "true" }, stdout = file }).code)
  end))

  it("can be a file of coflow.fs, from its position on", clean(function()
    fs.write_file(path, "skipped\nread by cat\n")
    local file <close> = fs.open(path)
    assert.equal("skipped", file:read_line())
    local p <close> = process.spawn { args = { "cat" }, stdin = file, stdout = "pipe" }
    assert.equal("read by cat\n", p.stdout:read_all())
    p:wait()
    assert.is_nil(file:read_line())
    local busy = file:read_async(1)
    local err = raises("InvalidOperation", process.spawn, { args = { "true" }, stdin = file })
    assert.matches("in use", err.message)
    flow.await(busy)
    file:close()
    assert.equal("EBADF", raises("IO", process.spawn, { args = { "true" }, stdin = file }).code)
  end))

  it("can be a file of coflow.fs, which it and the parent write by turns", clean(function()
    -- once children and parent wrote over each other: the position did not follow
    for mode, first in pairs { w = "", ["w+"] = "", a = "old\n", ["a+"] = "old\n", ["r+"] = "" } do
      fs.write_file(path, "old\n")
      local file <close> = fs.open(path, mode)
      file:write("start\n")
      for i = 1, 3 do
        local p <close> = sh("echo child " .. i .. "; echo error >&2", { stdout = file, stderr = "stdout" })
        p:wait()
        file:write("parent ", i, "\n")
      end
      local expected = first .. "start\nchild 1\nerror\nparent 1\nchild 2\nerror\nparent 2\nchild 3\nerror\nparent 3\n"
      assert.equal(expected, fs.read_file(path), mode)
      assert.equal(#expected, file:seek(), mode)
      assert.equal(#expected, file:stat().size, mode)
    end
  end))

  it("can be a file of coflow.fs, which several write at once, and the parent", clean(function()
    local file <close> = fs.open(path, "w")
    local list = {}
    for i = 1, 4 do list[i] = sh(("for i in 1 2 3 4 5; do echo child-%d; done"):format(i), { stdout = file }) end
    for _ = 1, 20 do file:write("parent\n") end
    for _, p in ipairs(list) do p:close() end
    local text = fs.read_file(path)
    assert.equal(20, select(2, text:gsub("parent\n", "")))
    assert.equal("", (text:gsub("parent\n", ""):gsub("child%-%d\n", "")))
    assert.equal(#text, file:seek())
  end))

  it("can be a file of coflow.fs, which it and the parent read by turns", clean(function()
    fs.write_file(path, "1\n2\n3\n4\n5\n6\n7\n8\n")
    local file <close> = fs.open(path)
    local function child()
      local p <close> = sh("read x; echo $x", { stdin = file, stdout = "pipe" })
      local line = p.stdout:read_line()
      p:wait()
      return line
    end
    local seen = { child(), child(), file:read_line(), child(), file:read(2), child() }
    assert.same({ "1", "2", "3", "4", "5\n", "6" }, seen)
    for line in file:lines() do -- of which all have been read ahead
      seen[#seen + 1] = line
      seen[#seen + 1] = child()
    end
    assert.same({ "7", "8" }, { table.unpack(seen, 7) })
    assert.equal("", file:read_all())
  end))

  it("leaves what was read ahead of it where it is, and goes where the parent seeks", clean(function()
    fs.write_file(path, "1\n2\n3\n4\n")
    local file <close> = fs.open(path, "r+")
    local source = flow.CancellationTokenSource()
    local canceled = file:read_async(nil, source.token)
    source:cancel()
    raises("OperationCanceled", flow.await, canceled)
    assert.equal(0, file:seek()) -- which comes when the thread has read ahead, or has not begun
    local p <close> = sh("read x; echo $x", { stdin = file, stdout = "pipe" })
    assert.equal("1", p.stdout:read_line())
    p:wait()
    assert.equal(2, file:seek())
    assert.equal(4, file:seek("cur", 2))
    assert.equal("3", file:read_line())
    local q <close> = sh("printf xx", { stdout = file })
    q:wait()
    assert.equal(8, file:seek())
    assert.equal(2, file:seek("set", 2))
    local r <close> = sh("printf two", { stdout = file })
    r:wait()
    assert.equal(5, file:seek())
    file:truncate(5)
    assert.equal(5, file:seek("end"))
    file:write("!")
    assert.equal("1\ntwo!", fs.read_file(path))
    file:truncate(0) -- the position stays, for the child as well
    local t <close> = sh("printf end", { stdout = file })
    t:wait()
    assert.equal("\0\0\0\0\0\0end", fs.read_file(path))
    assert.equal(0, file:seek("set"))
    assert.equal("\0\0\0\0\0\0end", file:read_all())
  end))

  it("can be a descriptor", clean(function()
    local file <close> = assert(io.open(path, "w"))
    local p <close> = sh("echo $0 >&2", { stderr = "pipe", stdin = 0, stdout = 1 })
    assert.equal("sh\n", p.stderr:read_all())
    p:wait()
    assert.equal("EBADF", raises("IO", process.spawn, { args = { "true" }, stdin = 1 << 20 }).code)
    assert.equal("EBADF", raises("IO", process.spawn, { args = { "true" }, stdin = math.maxinteger }).code)
    file:close()
  end))

  it("can be changed round", clean(function()
    local p <close> = sh("exec 3>&1", { stdout = 2, stderr = 1 })
    assert.equal(0, p:wait())
    local q <close> = sh("echo out", { stdout = "pipe", stderr = "stdout" })
    assert.equal("out\n", q.stdout:read_all())
    q:wait()
  end))

  it("can be a stream, which is the child's from then on", clean(function()
    local first <close> = sh("echo a; echo b; exec sleep 100", { stdout = "pipe" })
    local second <close> = process.spawn { args = { "cat" }, stdin = first.stdout, stdout = "pipe" }
    assert.is_true(first.stdout.is_closed)
    assert.equal("a", second.stdout:read_line())
    assert.equal("b", second.stdout:read_line())
    first:close()
    assert.is_nil(second.stdout:read_line())
    assert.equal(0, second:wait())
  end))

  it("lets a pipeline end from its end", clean(function()
    local first <close> = sh("while echo y; do :; done", { stdout = "pipe" })
    local second <close> = sh("read line; echo $line", { stdin = first.stdout, stdout = "pipe" })
    assert.equal("y\n", second.stdout:read_all())
    local _, signal = first:wait()
    assert.equal("SIGPIPE", signal)
  end))

  it("can be a connection", clean(function()
    local listener <close> = flow.net.listen("127.0.0.1", 0)
    local client <close> = flow.net.connect("127.0.0.1", listener.port)
    local server = listener:accept()
    local p <close> = process.spawn { args = { "cat" }, stdin = server, stdout = server }
    assert.is_true(server.is_closed)
    client:write("there and back")
    client:shutdown()
    assert.equal("there and back", client:read_all())
    assert.equal(0, p:wait())
  end))

  it("is not a stream that is in use, closed, or has been read ahead", clean(function()
    local p <close> = process.spawn { args = { "cat" }, stdin = "pipe", stdout = "pipe" }
    local reading = p.stdout:read_async()
    local options = { args = { "cat" }, stdin = p.stdout }
    raises("InvalidOperation", process.spawn, options)
    p.stdin:write("abc")
    assert.equal("abc", flow.await(reading))
    p.stdin:write("more")
    assert.equal("m", p.stdout:read(1))
    raises("InvalidOperation", process.spawn, options)
    assert.equal("ore", p.stdout:read())
    local err = raises("IO", process.spawn, { args = { "no-such-program" }, stdin = p.stdout })
    assert.equal("ENOENT", err.code)
    assert.is_false(p.stdout.is_closed)
    p.stdin:write("still here")
    assert.equal("still here", p.stdout:read_exactly(10))
    p.stdout:close()
    assert.equal("EBADF", raises("IO", process.spawn, options).code)
  end))

  it("does not wait here when the program could not be started", clean(function()
    local function numbers()
      local set = {}
      for name in fs.scandir("/proc/self/fd") do set[name] = true end
      return set
    end
    local before = numbers()
    local p <close> = process.spawn { args = { "cat" }, stdin = "pipe", stdout = "pipe" }
    local function modes()
      local count, waits = 0, 0
      for name in pairs(numbers()) do
        local ok, info = pcall(fs.read_file, "/proc/self/fdinfo/" .. name)
        if not before[name] and ok then
          count = count + 1
          if tonumber(info:match("flags:%s*(%d+)"), 8) & 2048 == 0 then waits = waits + 1 end -- O_NONBLOCK
        end
      end
      return count, waits
    end
    assert.same({ 2, 0 }, { modes() })
    raises("IO", process.spawn, { args = { "no-such-program" }, stdin = p.stdout, stdout = p.stdin })
    assert.same({ 2, 0 }, { modes() })
  end))

  it("is no other descriptor of the library", clean(function()
    local listener <close> = flow.net.listen("127.0.0.1", 0)
    local client <close> = flow.net.connect("127.0.0.1", listener.port)
    local file <close> = fs.open("/dev/null")
    local watcher <close> = fs.watch("/")
    local other <close> = process.spawn { args = { "cat" }, stdin = "pipe", stdout = "pipe", stderr = "pipe" }
    local before = process.run { "sh", "-c", "echo /proc/self/fd/*" }
    client:close()
    listener:close()
    file:close()
    watcher:close()
    other:close()
    assert.equal(before, (process.run { "sh", "-c", "echo /proc/self/fd/*" }))
  end))

  it("is the environment of this program, with its changes", clean(function()
    local home = os.getenv("HOME") or ""
    local script = "echo \"$HOME|$A|$B|${C-none}\""
    local function says(env, clear)
      return (process.run({ "/bin/sh", "-c", script }, nil, { env = env, clear_env = clear }))
    end
    assert.equal(home .. "|||none\n", says())
    assert.equal(home .. "|1||none\n", says { A = "1" })
    assert.equal("|x=y z||\n", says { HOME = false, A = "x=y z", C = "" })
    assert.equal("/h|||none\n", says { HOME = "/h", B = false })
    assert.equal("|1||none\n", says({ A = "1", HOME = false }, true))
    local out = process.run({ "env" }, nil, { clear_env = true, env = { ONLY = "this" } })
    assert.equal("ONLY=this\n", out)
    assert.equal("", (process.run({ "/usr/bin/env" }, nil, { clear_env = true })))
  end))

  it("is a working directory", clean(function()
    assert.equal("/\n", (process.run({ "sh", "-c", "pwd" }, nil, { cwd = "/" })))
    assert.equal("/proc\n", (process.run({ "sh", "-c", "pwd -P" }, nil, { cwd = "/proc" })))
  end))

  it("is the default of every signal", clean(function()
    local _, _, _, signal = process.run { "sh", "-c", "kill -PIPE $$" }
    assert.equal("SIGPIPE", signal)
  end))
end)

describe("ending a process", function()
  it("sends any signal", clean(function()
    for _, name in ipairs { "SIGTERM", "SIGKILL", "SIGINT", "SIGHUP", "SIGUSR1" } do
      local p <close> = sleeper()
      assert.is_true(p:kill(name))
      assert.equal(name, select(2, p:wait()))
      assert.is_false(p:kill(name))
    end
    local p <close> = sleeper()
    p:kill("SIGSTOP")
    until_true(function() return status_of(p.pid) == "T" end)
    assert.is_true(p.is_running)
    p:kill("SIGCONT")
    p:kill()
    assert.equal("SIGTERM", select(2, p:wait()))
  end))

  it("by close: it has ended, and its pipes are closed", clean(function()
    local p = process.spawn { args = { "sleep", "100" }, stdin = "pipe", stdout = "pipe", stderr = "pipe" }
    p:close()
    assert.is_nil((status_of(p.pid)))
    assert.is_true(p.stdin.is_closed and p.stdout.is_closed and p.stderr.is_closed)
    assert.same({ 143, "SIGTERM" }, { p:wait() })
    p:close()
    flow.await(p:close_async())
  end))

  it("by close, also when it is read from and written to", clean(function()
    local p = process.spawn { args = { "sleep", "100" }, stdin = "pipe", stdout = "pipe" }
    local reading = p.stdout:read_async()
    local writing = p.stdin:write_async(("x"):rep(1000000))
    local closing, second = p:close_async(), p:close_async()
    raises("IO", flow.await, writing)
    flow.await_all(closing, second)
    local ok, err = flow.try_await(reading)
    assert.is_true(ok and err == nil or err.code == "ECANCELED", tostring(err))
  end))

  it("lets it write its last words", clean(function()
    local path <const> = os.tmpname()
    local p = sh(("trap 'echo bye; echo bye > %s; exit 3' TERM; echo ready; while :; do sleep 0.01; done"):format(path),
      { stdout = "pipe" })
    assert.equal("ready", p.stdout:read_line())
    p:close()
    assert.same({ 3 }, { p:wait() })
    assert.equal("bye\n", fs.read_file(path))
    fs.remove(path)
  end))

  it("kills it after the grace, at once without one", clean(function()
    local p = sleeper(DEAF, { grace = 0.05 })
    p:close()
    assert.equal("SIGKILL", select(2, p:wait()))
    local q = sleeper(DEAF, { grace = 0 })
    q:close()
    assert.equal("SIGKILL", select(2, q:wait()))
    local r = sleeper(DEAF, { grace = math.huge })
    local closing = r:close_async()
    flow.sleep(0.02)
    assert.is_false(closing.is_completed)
    r:kill("SIGKILL")
    flow.await(closing)
  end))

  it("by leaving its scope, normally, with an error or canceled", clean(function()
    local pids = {}
    local function scope(how)
      local p <close> = sleeper(DEAF, { grace = 0.02 })
      pids[#pids + 1] = p.pid
      if how == "error" then error("oh", 0) end
      if how == "sleep" then flow.sleep(100) end
      return "done"
    end
    assert.equal("done", scope())
    assert.equal("oh", raised(scope, "error"))
    local task = flow.spawn(scope, "sleep")
    until_true(function() return #pids == 3 end)
    task:cancel()
    raises("OperationCanceled", flow.await, task)
    for _, pid in ipairs(pids) do assert.is_nil((status_of(pid))) end
    assert.equal(3, #pids)
  end))

  it("by dispose: without waiting", clean(function()
    local p = sleeper(DEAF, { grace = 0.02, stdin = "pipe" })
    p:dispose()
    assert.is_true(p.is_running)
    assert.is_true(p.stdin.is_closed and p.stdout.is_closed)
    assert.equal("SIGKILL", select(2, p:wait()))
    p:dispose()
  end))

  it("where nobody can wait", clean(function()
    local p = sleeper()
    local ok, err = coroutine.resume(coroutine.create(function()
      local _ <close> = p
    end))
    assert.is_false(ok)
    helper.is_error("InvalidOperation", err)
    assert.equal("SIGTERM", select(2, p:wait()))
    assert.is_true(p.stdout.is_closed)
  end))

  it("does not happen where nobody can wait for it, nor does its start", clean(function()
    local function nowhere(fn, ...)
      local arguments = table.pack(...)
      return raises("InvalidOperation", table.sort, { 1, 2 }, function()
        fn(table.unpack(arguments, 1, arguments.n))
      end)
    end
    nowhere(process.run, { "no-such-program" })
    local p <close> = sleeper()
    nowhere(p.wait, p)
    p:kill("SIGUSR1")
    assert.equal("SIGUSR1", select(2, p:wait()))
  end))

  it("does not end what is detached", clean(function()
    local p = sh("echo ready; read line; exec sleep 100", { stdin = "pipe", stdout = "pipe", detached = true })
    assert.equal("ready", p.stdout:read_line())
    local session = fs.read_file(("/proc/%d/stat"):format(p.pid)):match("%) %a %d+ %d+ (%d+)")
    assert.equal(p.pid, math.tointeger(session))
    raises("Timeout", flow.with_timeout, 0.01, p.wait, p)
    p:close()
    assert.is_true(p.is_detached and p.is_running)
    assert.is_true(p.stdin.is_closed and p.stdout.is_closed)
    p:kill("SIGUSR1")
    assert.equal("SIGUSR1", select(2, p:wait()))
  end))

  it("leaves the loop alone when nobody waits any more", function()
    flow.run(function()
      local p = process.spawn { args = { "sleep", "100" }, detached = true }
      local task = p:wait_async()
      flow.yield()
      assert.is_true(flow.loop.is_alive())
      task:cancel()
      raises("OperationCanceled", flow.await, task)
      assert.is_false(flow.loop.is_alive())
      p:kill()
      p:wait()
    end)
  end)
end)

describe("a canceled wait", function()
  it("ends the process, and has reaped it when it raises", clean(function()
    local p = sleeper()
    raises("Timeout", flow.with_timeout, 0.01, p.wait, p)
    assert.is_nil((status_of(p.pid)))
    assert.equal("SIGTERM", select(2, p:wait()))
    p:close()
    local q = sleeper(DEAF, { grace = 0.02 })
    local task = q:wait_async()
    flow.yield()
    assert.is_true(task:cancel())
    raises("OperationCanceled", flow.await, task)
    assert.is_nil((status_of(q.pid)))
    assert.equal("SIGKILL", select(2, q:wait()))
    q:close()
    local r = sleeper()
    local source = flow.CancellationTokenSource(0.01)
    local err = raises("OperationCanceled", r.wait, r, source.token)
    assert.equal(source.token, err.token)
    assert.is_nil((status_of(r.pid)))
    r:close()
  end))

  it("that was canceled before it began leaves the process alone", clean(function()
    local p = sleeper()
    local canceled = flow.CancellationToken.canceled
    assert.equal(canceled, raises("OperationCanceled", p.wait, p, canceled).token)
    assert.is_true(p:wait_async(canceled).is_canceled)
    raises("Timeout", flow.with_timeout, 0.01, function()
      pcall(flow.sleep, 9)
      p:wait()
    end)
    assert.is_true(p.is_running)
    p:close()
  end))

  it("leaves it to the others who wait", clean(function()
    local p = sleeper()
    local first, second = p:wait_async(), p:wait_async()
    flow.yield()
    first:cancel()
    raises("OperationCanceled", flow.await, first)
    flow.sleep(0.01)
    assert.is_true(p.is_running)
    second:cancel()
    raises("OperationCanceled", flow.await, second)
    assert.is_false(p.is_running)
    p:close()
  end))

  it("is another thing than waiting for some time", clean(function()
    local p <close> = sleeper()
    local task = p:wait_async()
    raises("Timeout", flow.await, task:wait_async(0.01))
    assert.is_true(p.is_running)
    assert.is_false(task.is_completed)
    p:kill("SIGKILL")
    assert.equal("SIGKILL", select(2, flow.await(task)))
  end))
end)

describe("a process that is forgotten", function()
  it("goes on, with its pipes closed, and is reaped", clean(function()
    local pid
    do
      local p = process.spawn { args = { "cat" }, stdin = "pipe" }
      pid = p.pid
    end
    helper.collect()
    until_true(function() return status_of(pid) == nil end) -- its input has ended
    do
      local p = sleeper()
      pid = p.pid
    end
    helper.collect()
    flow.sleep(0.01)
    until_true(function() return status_of(pid) == "S" end)
    process.run { "sh", "-c", "kill " .. pid }
    until_true(function() return status_of(pid) == nil end)
  end))

  it("is held by who waits for it", clean(function()
    local log, note = helper.recorder()
    local function start()
      local p = sh("read line; exit 3", { stdin = "pipe" })
      flow.spawn(function() note(p:wait()) end)
      return p.stdin
    end
    local stdin = start()
    flow.sleep(0.001)
    helper.collect()
    stdin:write("go\n")
    until_true(function() return #log > 0 end)
    assert.same({ "3 nil" }, log)
  end))

  it("by a task that was to close it is ended all the same", function()
    flow.on_unobserved_exception(false)
    flow.run(function() -- without a deadline, which would hold the task
      local pid
      local function start()
        local source = flow.TaskCompletionSource()
        flow.spawn(function()
          local p <close> = sleeper()
          pid = p.pid
          flow.await(source.task)
        end)
      end
      start()
      until_true(function() return pid ~= nil end)
      helper.collect()
      until_true(function() return status_of(pid) == nil end)
    end)
    flow.on_unobserved_exception(nil)
  end)
end)

describe("process.run", function()
  it("gives output, code, error output and signal", clean(function()
    assert.same({ n = 4, "out\n", 3, "err\n" },
      table.pack(process.run { "sh", "-c", "echo out; echo err >&2; exit 3" }))
    assert.same({ n = 4, "", 137, "", "SIGKILL" }, table.pack(process.run { "sh", "-c", "kill -KILL $$" }))
    assert.same({ "in\0put", 0, "" }, { process.run({ "cat" }, "in\0put") })
    assert.same({ "", 0, "" }, { process.run({ "cat" }, "") })
    assert.same({ "", 0, "" }, { process.run { "cat" } })
    assert.same({ "x", 0, "" }, { flow.await(process.run_async({ "cat" }, "x")) })
  end))

  it("reads and writes at the same time, however much", clean(function()
    local text = ("0123456789"):rep(many(1000000, 50000))
    local out, code = process.run({ "sh", "-c", "cat; exit 7" }, text)
    assert.is_true(out == text)
    assert.equal(7, code)
    local both, _, err = process.run({ "sh", "-c", "cat >&2; echo done" }, text)
    assert.equal("done\n", both)
    assert.is_true(err == text)
  end))

  it("does not mind a program that does not read", clean(function()
    local text = ("x"):rep(many(1000000, 200000))
    assert.same({ "", 0, "" }, { process.run({ "true" }, text) })
    assert.same({ "first\n", 1, "" }, { process.run({ "sh", "-c", "read a; echo $a; exit 1" }, "first\n" .. text) })
  end))

  it("ends what writes too much", clean(function()
    local script = "while echo 0123456789; do :; done"
    local err = raises("IO", process.run, { "sh", "-c", script }, nil, { max = 1000 })
    assert.equal("EMSGSIZE", err.code)
    err = raises("IO", process.run, { "sh", "-c", DEAF .. "; while echo x >&2; do :; done; exec sleep 100" }, nil,
      { max = 100000, grace = 0.02 })
    assert.equal("EMSGSIZE", err.code)
    assert.equal("12345", (process.run({ "sh", "-c", "printf 12345" }, nil, { max = 5 })))
    assert.equal("12345", (process.run({ "sh", "-c", "printf 12345" }, nil, { max = math.huge })))
    assert.equal("EMSGSIZE", raises("IO", process.run, { "sh", "-c", "printf 123456" }, nil, { max = 5 }).code)
  end))

  it("ends its program when it is canceled, before that is told", clean(function()
    raises("Timeout", flow.with_timeout, 0.02, process.run, { "sleep", "100" })
    assert.equal("", children())
    raises("Timeout", flow.with_timeout, 0.02, process.run, { "sleep", "100" }, ("x"):rep(1000000),
      { stderr = "null", grace = 0 })
    assert.equal("", children())
    local task = process.run_async({ "sh", "-c", DEAF .. "; exec sleep 100" }, nil, { grace = 0.02 })
    flow.sleep(0.05)
    assert.is_true(task:cancel())
    raises("OperationCanceled", flow.await, task)
    assert.equal("", children())
  end))

  it("starts nothing in a callback of the loop, where nobody can wait for it", clean(function()
    local called = flow.TaskCompletionSource()
    local source = flow.CancellationTokenSource(0.001)
    source.token:register(function() called:set_result(raised(process.run, { "sleep", "100" })) end)
    helper.is_error("InvalidOperation", called.task:await())
  end))

  it("is canceled by its token, which the error tells", clean(function()
    local source = flow.CancellationTokenSource()
    local task = process.run_async({ "sleep", "100" }, nil, nil, source.token)
    flow.yield()
    source:cancel("enough")
    local err = raises("OperationCanceled", flow.await, task)
    assert.equal(source.token, err.token)
    assert.equal("enough", err.reason)
    assert.equal("", children())
    err = raises("OperationCanceled", process.run, { "no-such-program" }, nil, nil, source.token)
    assert.equal(source.token, err.token)
    flow.with_timeout(0.005, function()
      assert.equal("x", (process.run({ "sh", "-c", "sleep 0.02; cat" }, "x", nil, flow.CancellationToken.none)))
    end)
  end))

  it("waits for all who have its output open, unless it is canceled", clean(function()
    assert.equal("late\n", (process.run { "sh", "-c", "(sleep 0.05; echo late) & exit 0" }))
    local log, note = helper.recorder()
    local task = process.run_async { "sh", "-c", "sleep 2 & echo $!; exit 0" } -- its child has the pipe
    flow.spawn(function() flow.try_await(task) note("ended") end)
    until_true(function() return children() == "" end)
    flow.sleep(0.01)
    assert.same({}, log)
    task:cancel()
    raises("OperationCanceled", flow.await, task)
  end))

  it("works for many at once", clean(function()
    local n = many(100, 10)
    local tasks = {}
    for i = 1, n do tasks[i] = process.run_async({ "cat" }, ("%d"):format(i):rep(10000)) end
    for i = 1, n do assert.is_true(flow.await(tasks[i]) == ("%d"):format(i):rep(10000)) end
  end))
end)

describe("processes in virtual time", function()
  it("hold the clock while somebody waits for them", function()
    testing.run(function(clock)
      local p <close> = sh("sleep 0.05; exit 3")
      assert.equal(3, (flow.with_timeout(3600, p.wait, p)))
      assert.equal("x\n", (flow.with_timeout(3600, process.run, { "sh", "-c", "sleep 0.05; echo x" })))
      assert.equal(0, clock:now())
      flow.sleep(3600)
      assert.equal(3600, clock:now())
    end)
  end)

  it("have a grace in real time", function()
    testing.run(function(clock)
      local p = sh(DEAF .. "; echo ready; exec sleep 100", { stdout = "pipe", grace = 0.02 })
      assert.equal("ready", p.stdout:read_line())
      p:close()
      assert.equal("SIGKILL", select(2, p:wait()))
      assert.equal(0, clock:now())
    end)
  end)

  it("are not left behind by a test", function()
    local pid, line
    local err = raises("InvalidOperation", testing.run, function()
      line = helper.here(1)
      pid = process.spawn({ args = { "sleep", "100" } }).pid
    end)
    assert.matches("left something behind", err.message)
    assert.matches("process " .. pid .. " runs, made at spec/" .. line, err.message, 1, true)
    flow.run(until_true, function() return status_of(pid) == nil end)
    testing.run(function()
      local p = sh("exec sleep 100", { detached = true })
      pid = p.pid
    end)
    flow.run(function()
      process.run { "sh", "-c", "kill " .. pid }
      until_true(function() return status_of(pid) == nil end)
    end)
  end)

  it("follow a seed", function()
    testing.explore(function()
      local a, b = process.run_async({ "cat" }, "a"), process.run_async({ "cat" }, "b")
      assert.same({ "a", "b" }, { flow.await_all(a, b) })
    end, { runs = many(10, 2) })
  end)
end)

describe("closing the state", function()
  -- The script starts children and prints their numbers; they are gone when it has ended.
  local function gone(script)
    local out = helper.output(([[
      local flow = require "coflow"
      local process = flow.process
      local function sleeper(options)
        options.args = { "sh", "-c", (options.env or "") .. "\necho ready; exec sleep 100" }
        options.env, options.stdout, options.stdin = nil, "pipe", "pipe"
        local p = process.spawn(options)
        assert(p.stdout:read_line() == "ready")
        print(p.pid)
        return p
      end
    ]]) .. script)
    local pids = {}
    for pid in out:gmatch("%d+") do pids[#pids + 1] = pid end
    for _, pid in ipairs(pids) do assert.is_nil((flow.run(status_of, pid)), "still there: " .. pid) end
    return #pids
  end

  it("ends those that run, deaf ones too", function()
    assert.equal(4, gone [[
      local kept = {}
      flow.run(function()
        kept[1] = sleeper {}
        kept[2] = sleeper { env = "trap '' TERM" }
        sleeper { grace = 0 }
        kept[3] = sleeper { grace = math.huge, env = "trap '' TERM" }
        kept[4] = kept[1]:wait_async()
        kept[5] = kept[1].stdout:read_async()
        kept[6] = process.run_async({ "sleep", "100" })
      end)
    ]])
  end)

  it("lets go of those that are detached", function()
    local pid = helper.output [[
      local flow = require "coflow"
      local p = flow.process.spawn { args = { "sleep", "100" }, detached = true, stdout = "null", stderr = "null" }
      print(p.pid)
    ]]
    pid = math.tointeger(tonumber(pid))
    flow.run(until_true, function() return status_of(pid) == "S" end)
    flow.run(process.run, { "sh", "-c", "kill " .. pid })
  end)

  it("refuses new ones", function()
    assert.equal("InvalidOperation\n", helper.output [[
      last = setmetatable({}, { __gc = function() -- made first, and so finalized when the loop is closed
        local _, err = pcall(require("coflow").process.spawn, { args = { "true" } })
        print(err.name)
      end })
      local flow = require "coflow"
      flow.process.run { "true" }
    ]])
  end)
end)

describe("a coroutine that dies", function()
  it("in process.run or in a wait leaves no child running", clean(function()
    local source = flow.CancellationTokenSource()
    flow.spawn(source.cancel, source)
    local co = flow.coroutine.create(function() process.run({ "sleep", "100" }, nil, nil, source.token) end)
    local _, err = flow.coroutine.resume(co)
    assert.equal(source.token, helper.is_error("OperationCanceled", err).token)
    assert.equal("", children())
    source = flow.CancellationTokenSource()
    flow.spawn(source.cancel, source)
    local p = process.spawn { args = { "sleep", "100" } }
    local waiting = flow.coroutine.create(function() p:wait(source.token) end)
    helper.is_error("OperationCanceled", select(2, flow.coroutine.resume(waiting)))
    assert.is_false(p.is_running)
  end))
end)

describe("run", function()
  it("takes a whole float for the most bytes", function()
    flow.run(function()
      assert.equal("12\n", (process.run({ "echo", "12" }, nil, { max = 2.0 ^ 20 })))
      assert.equal("EMSGSIZE", raises("IO", process.run, { "echo", "12" }, nil, { max = 2.0 }).code)
      for _, max in ipairs { 2.5, 0, -1, 0 / 0, 2.0 ^ 63, "2" } do
        assert.truthy(raised(process.run, { "true" }, nil, { max = max }):find("max: number of bytes", 1, true))
      end
    end)
  end)

  it("does not wait for whoever else holds the input", function()
    flow.run(function()
      local program = { "sh", "-c", "exec 3<&0; sleep 60 >/dev/null 2>&1 & echo $!; exit 7" }
      local holder, code = flow.with_timeout(20, flow.process.run, program, ("x"):rep(1 << 20))
      flow.process.run { "kill", (holder:gsub("%s", "")) }
      assert.equal(7, code)
    end)
  end)
end)
