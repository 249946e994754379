-- spec/stdio_spec.lua - the standard streams, of child processes: pipes, terminals, sockets, files, devices, closed.
-- spec/support/parent.c gives a child its streams; a script asks it for a line of input by writing '?'.
-- SPDX-License-Identifier: MIT

local flow = require "coflow"
local helper = require "spec.helper"
local support = require "spec.support.io_support"

local many = helper.many

local parent, dir

setup(function()
  dir = flow.fs.mkdtemp(os.tmpname() .. ".d")
  os.remove((dir:gsub("%.d......$", "")))
  parent = dir .. "/parent"
  assert(os.execute(("%s -std=c11 -D_GNU_SOURCE spec/support/parent.c -o %s"):format(os.getenv("CC") or "cc", parent)))
end)

teardown(function() os.execute("rm -rf '" .. dir .. "'") end)

local limit = os.execute("command -v timeout >/dev/null 2>&1") and "timeout -k 5 60 " or "" -- ends a broken run

-- Runs `body`, Lua that sees flow, stdio, stdin, stdout and stderr, as a task of flow.main, or one that calls
-- testing.run, as it is; `shell` is a command in which
-- CHILD stands for that process, DIR for a directory, and PARENT for parent.c. Returns what the command writes to
-- its output, what to standard error, and its status.
local function run(shell, body, input)
  support.put(dir .. "/script.lua", body:find("testing.run", 1, true) and body or ([[
    local flow = require "coflow"
    local stdio = flow.stdio
    os.exit(flow.main(function(dir)
      local stdin, stdout, stderr = stdio.stdin, stdio.stdout, stdio.stderr
      %s
    end, %q), true)
  ]]):format(body, dir))
  support.put(dir .. "/input", input or "")
  local words = {
    CHILD = (os.getenv("LUA") or "lua5.4") .. " " .. dir .. "/script.lua", DIR = dir, PARENT = parent,
  }
  support.put(dir .. "/run.sh", (shell:gsub("%u+", words)))
  local _, how, code = os.execute(("COFLOW_SEED= %ssh %s/run.sh <%s/input >%s/out 2>%s/err"):format(
    limit, dir, dir, dir, dir))
  local out, err = support.content(dir .. "/out"), support.content(dir .. "/err")
  if limit ~= "" and (code == 124 or code == 137) then error("it did not end by itself: " .. out .. err, 2) end
  return out, err, how == "signal" and 128 + code or code
end

-- The same; it must end well and write nothing to standard error. Returns its output.
local function output(shell, body, input)
  local out, err, code = run(shell, body, input)
  if code ~= 0 or err ~= "" then error(("ended with %d: %s%s"):format(code, out, err), 2) end
  return out
end

local kinds = { "pipe", "socket", "terminal", "pipe,nonblocking", "socket,nonblocking" }

describe("standard input and output", function()
  for _, kind in ipairs(kinds) do
    describe("that are a " .. kind, function()
      it("are read and written, and their flags stay as they were", function()
        assert.equal("ONE\nTWO\nend\n", output("PARENT " .. kind .. " CHILD", [[
          while true do
            stdout:write("?")
            local line = stdin:read_line()
            if not line then break end
            stdout:write(line:upper(), "\n")
          end
          print "end"
        ]], "one\ntwo\n"))
      end)

      it("keep their flags when the process is killed", function()
        local out, err, code = run("PARENT " .. kind .. " CHILD", [[
          stdout:write("first?")
          stdout:write(stdin:read_line())
          flow.spawn(stdin.read, stdin)
          flow.yield()
          os.execute("kill -ABRT $PPID")
        ]], "second\nthird\n")
        assert.same({ "firstsecond", "", 128 + 6 }, { out, err, code })
      end)

      it("keep nobody else waiting while nothing comes, and a canceled read loses nothing", function()
        assert.equal("Timeout\nOperationCanceled\nline\nrest\nnil\n", output("PARENT " .. kind .. " CHILD", [[
          local ticks = 0
          flow.spawn(function() while ticks >= 0 do flow.sleep(0.001) ticks = ticks + 1 end end)
          local ok, err = pcall(flow.with_timeout, 0.02, stdin.read, stdin)
          print(err.name)
          local task = stdin:read_exactly_async(1000)
          while ticks < 30 do flow.sleep(0.001) end
          task:cancel()
          ok, err = flow.try_await(task)
          print(err.name)
          local source = flow.CancellationTokenSource()
          local first = stdin:read_exactly_async(10, source.token)
          io.write("?") io.flush()
          flow.sleep(0.01) -- it may have come, or comes later
          source:cancel()
          flow.try_await(first)
          print(stdin:read_line())
          io.write("?") io.flush()
          print(stdin:read_line())
          io.write("?") io.flush()
          print(stdin:read())
          ticks = -1 / 0
        ]], "line\nrest\n"))
      end)

      it("hold up no thread while nothing comes", function()
        assert.equal("line line\n", output("export UV_THREADPOOL_SIZE=1; PARENT " .. kind .. " CHILD", [[
          local line = stdin:read_line_async()
          flow.sleep(0.02)
          local file = flow.fs.read_file(dir .. "/input"):match("%l+")
          io.write("?") io.flush()
          flow.fs.write_file(dir .. "/file", file)
          print(file .. " " .. flow.await(line))
        ]], "line\n"))
      end)

      it("do not keep the process from its end", function()
        assert.equal("", (output("PARENT " .. kind .. " CHILD", [[
          flow.spawn(stdin.read, stdin)
          stdin:read_line_async():cancel()
          flow.yield()
        ]])))
      end)

      it("say what a canceled write has sent", function()
        local out, err, code = run("PARENT " .. kind .. ",held CHILD", [[
          local source = flow.CancellationTokenSource()
          local task = stdout:write_async(("x"):rep(5000000), source.token)
          flow.sleep(0.05)
          source:cancel()
          local ok, err = flow.try_await(task)
          local again = select(2, pcall(stdout.write, stdout, "more"))
          assert(again.code == "ECANCELED" and again.written == err.written)
          stderr:write(err.name, " ", err.written)
        ]])
        assert.equal(0, code)
        assert.equal("OperationCanceled " .. #out, err)
        assert.is_true(#out > 0 and #out < 5000000)
      end)
    end)
  end

  it("may be the master of a terminal, which is not opened again", function()
    local out, err, code = run("PARENT master CHILD", [[
      stderr:write(tostring(stdio.is_terminal("stdin")), "\n")
      stdout:write("no end\n")
      pcall(flow.with_timeout, 0.02, stdin.read, stdin)
    ]])
    assert.same({ "no end\n", "true\n", 0 }, { out, err, code })
  end)

  it("tell whether they are a terminal", function()
    assert.equal("true true false\n", (output("PARENT terminal CHILD 2>DIR/null", [[
      print(stdio.is_terminal("stdin"), stdio.is_terminal("stdout"), (stdio.is_terminal("stderr")))
    ]]):gsub("\t", " ")))
    assert.equal("false false\n", (output("CHILD | cat", [[
      print(stdio.is_terminal("stdin"), (stdio.is_terminal("stdout")))
    ]]):gsub("\t", " ")))
    assert.matches("bad argument #1 to 'is_terminal'", helper.raised(function() flow.stdio.is_terminal("x") end))
    assert.is_nil(flow.stdio.stdnull)
  end)
end)

describe("a standard stream that is a file", function()
  it("has all that reads", function()
    assert.equal("one|two|th|ree|four\nfi|ve\nsix\n||nil|nil\n", output("CHILD <DIR/input", [[
      local got = { stdin:read_line(), stdin:read_until("\n") }
      got[#got + 1] = stdin:read(2)
      got[#got + 1] = stdin:read_until("-")
      got[#got + 1] = stdin:read_exactly(7)
      got[#got + 1] = stdin:read_all()
      got[#got + 1] = stdin:read_all()
      print(table.concat(got, "|") .. "|" .. tostring(stdin:read()) .. "|" .. tostring(stdin:read_line()))
    ]], "one\ntwo\nthree-four\nfive\nsix\n"))
  end)

  it("is read in lines, and copied, however big it is", function()
    local lines = {}
    for i = 1, many(200000, 20000) do lines[i] = "line number " .. i end
    local text = table.concat(lines, "\n")
    assert.equal(#lines .. "\n", output("CHILD <DIR/input", [[
      local n = 0
      for line in stdin:lines() do
        n = n + 1
        if line ~= "line number " .. n then error(line) end
      end
      print(n)
    ]], text))
    assert.is_true(text == output("CHILD <DIR/input", [[
      local n = stdin:copy_to(stdout)
      assert(n > 1000)
    ]], text))
    assert.is_true(text == output("CHILD <DIR/input | cat", "stdin:copy_to(stdout)", text))
    assert.is_true(text == output("cat DIR/input | CHILD", "stdout:write(stdin:read_all())", text))
  end)

  it("refuses more than max, and tells a partial answer from the end", function()
    assert.equal("EMSGSIZE EOF one\n", output("CHILD <DIR/input", [[
      local _, long = pcall(stdin.read_all, stdin, 2)
      local _, short = pcall(stdin.read_exactly, stdin, 4)
      print(long.code .. " " .. short.code .. " " .. stdin:read_all())
    ]], "one"))
  end)

  for what, shell in pairs {
    ["a file"] = "CHILD <DIR/input", ["a device"] = "CHILD </dev/zero", ["a socket"] = "PARENT socket CHILD",
    ["a pipe"] = "PARENT pipe CHILD",
  } do
    it("keeps its flags when a program that was to have it could not be started: " .. what, function()
      local out, err, code = run(shell, [[
        local function flags(fd)
          return flow.fs.read_file("/proc/self/fdinfo/" .. fd):match("flags:%s*(%d+)")
        end
        local ins, outs = flags(0), flags(1)
        local ok, why = pcall(flow.process.spawn, { args = { "/no/program" }, stdin = stdin, stdout = stdout })
        assert(not ok and why.code == "ENOENT", why)
        print(flags(0) == ins, flags(1) == outs)
      ]], "text")
      assert.same({ "true\ttrue\n", "", 0 }, { out, err, code })
    end)
  end

  it("is in use while a thread reads it, though nobody waits for that any more", function()
    assert.equal("InvalidOperation\nInvalidOperation\n300000\n", output("CHILD <DIR/input", [[
      local spawn, options = flow.process.spawn, { args = { "cat" }, stdin = stdin }
      stdin:read_async(10):cancel()
      print(select(2, pcall(spawn, options)).name) -- it used to be lent, and the child missed what the thread took
      local some = stdin:read()
      stdin:read_async(10):cancel()
      print(select(2, pcall(spawn, options)).name)
      print(#some + #stdin:read_all())
    ]], ("x"):rep(300000)))
  end)

  it("is written where the descriptor stands, by several processes in turn", function()
    assert.equal("before\none\ntwo\nafter\n", output("(echo before; CHILD; echo after) >DIR/file; cat DIR/file", [[
      stdout:write("one\n")
      stdout:write_async("two\n")
    ]]))
    assert.equal("before\nadded\n", output("echo before >DIR/file; CHILD >>DIR/file; cat DIR/file", [[
      stdout:write("added\n")
    ]]))
  end)

  it("that cannot be read, or written, is told", function()
    assert.equal("EISDIR\n", output("CHILD <DIR", "print(select(2, pcall(stdin.read, stdin)).code)"))
    if io.open("/dev/full") then
      assert.equal("ENOSPC ENOSPC", select(2, run("CHILD >/dev/full", [[
        local _, first = pcall(stdout.write, stdout, "x")
        local _, second = pcall(stdout.flush, stdout)
        stderr:write(first.code, " ", second.code)
      ]])))
    end
  end)

  it("is canceled as others are: what was begun is written, and told", function()
    assert.equal("true true\n", (output("CHILD >DIR/file; cat DIR/report", [[
      local task = stdout:write_async(("x"):rep(3000000))
      task:cancel()
      local ok, err = flow.try_await(task)
      local report = io.open(dir .. "/report", "w")
      flow.sleep(0.02)
      report:write(tostring(not ok), " ", tostring(err.written % 65536 == 0), "\n", err.written, "\n")
    ]]):gsub("(%d+)\n$", function(n)
      assert.equal(tonumber(n), #support.content(dir .. "/file"))
      return ""
    end)))
  end)
end)

describe("a device", function()
  it("has an end, or swallows all", function()
    assert.equal("nil nil\n", output("CHILD </dev/null", [[
      print(tostring(stdin:read()) .. " " .. tostring(stdin:read_line()))
    ]]))
    assert.equal("", output("CHILD >/dev/null", [[stdout:write(("x"):rep(1000000)) stdout:flush() ]]))
    assert.equal("100000\n", output("CHILD </dev/zero", [[
      local _, err = pcall(stdin.read_all, stdin, 1000000)
      assert(err.code == "EMSGSIZE")
      print(#stdin:read_exactly(100000))
    ]]))
  end)
end)

describe("a closed descriptor", function()
  it("refuses what is asked of it", function()
    assert.equal("EBADF EBADF\n", output("CHILD <&-", [[
      local _, first = pcall(stdin.read, stdin)
      local _, second = pcall(stdin.read_line, stdin)
      print(first.code .. " " .. second.code)
      stdin:close()
    ]]))
    assert.equal("EBADF", select(2, run("CHILD >&-", [[
      local ok, err = pcall(stdout.write, stdout, "x")
      stderr:write(err.code)
    ]])))
    assert.equal("EBADF\n", output("CHILD 2>&-", [[
      local ok, err = pcall(stderr.write, stderr, "x")
      print(err.code)
    ]]))
  end)

  it("is not what is opened next", function()
    local _, err = run("CHILD <&- >&-", [[
      local listener <close> = flow.net.listen("127.0.0.1", 0)
      local accepted = listener:accept_async()
      local client <close> = flow.net.connect("127.0.0.1", listener.port)
      local server <close> = flow.await(accepted)
      print("secret")
      io.flush()
      pcall(stdout.write, stdout, "secret")
      client:shutdown()
      server:shutdown()
      stderr:write("got: ", server:read_all(), client:read_all())
    ]])
    assert.equal("got: ", err)
  end)
end)

describe("the order of output", function()
  for what, shell in pairs {
    ["a pipe"] = "CHILD | cat", ["a file"] = "CHILD", ["a socket"] = "PARENT socket CHILD",
    ["a terminal"] = "PARENT terminal CHILD",
  } do
    it("is that of print and write: " .. what, function()
      local expected = {}
      for i = 1, 400 do expected[i] = i end
      assert.equal(table.concat(expected, "\n") .. "\n", output(shell, [[
        for i = 1, 400, 4 do
          print(i)
          stdout:write(i + 1, "\n")
          io.write(i + 2, "\n")
          stdout:write(i + 3, "\n")
        end
      ]]))
    end)
  end

  it("holds for what does not fit at once", function()
    local big = ("x"):rep(300000)
    assert.is_true(big .. "\nafter\n" .. big .. "\nlast\n" == output("CHILD | cat", [[
      local big = ("x"):rep(300000)
      stdout:write(big, "\n")
      print("after")
      stdout:write(big, "\n")
      print("last")
    ]]))
  end)
end)

describe("several tasks", function()
  local shells = {
    ["a pipe"] = "CHILD | cat", ["a file"] = "CHILD >DIR/file; cat DIR/file", ["a socket"] = "PARENT socket CHILD",
    ["a terminal"] = "PARENT terminal CHILD",
  }

  for what, shell in pairs(shells) do
    it("may write at a time, each string in one piece: " .. what, function()
      local lines = {}
      for line in output(shell, [[
        flow.task_group(function(group)
          for i = 1, 10 do
            group:spawn(function()
              for j = 1, 20 do
                local line = ("%d %d "):format(i, j) .. ("x"):rep(j * j * 20)
                if (i + j) % 3 == 0 then flow.await(stdout:write_async(line, "\n")) else stdout:write(line, "\n") end
              end
            end)
          end
        end)
      ]]):gmatch("[^\n]+") do lines[#lines + 1] = line end
      assert.equal(200, #lines)
      local last = {}
      for _, line in ipairs(lines) do
        local i, j, x = line:match("^(%d+) (%d+) (x+)$")
        assert.equal((last[i] or 0) + 1, tonumber(j))
        assert.equal(j * j * 20, #x)
        last[i] = tonumber(j)
      end
    end)

    it("may be canceled while they write: what is told is what was sent: " .. what, function()
      for seed = 1, many(6, 2) do
        local out = output(shell, ([[
          local state = %d
          local function random(n)
            state = state * 6364136223846793005 + 1442695040888963407
            return (state >> 33) %% n + 1
          end
          local expected, broken = {}, false
          for round = 1, 30 do
            local tasks = {}
            for i = 1, random(6) do
              local size = ({ 0, 1, 100, 3000, 5000, 70000, 200000 })[random(7)]
              local text = string.char(96 + random(26)):rep(size)
              tasks[i] = { text = text, task = stdout:write_async(text) }
            end
            if random(3) == 1 then flow.sleep(0) flow.yield() end
            for i = #tasks, 1, -1 do
              if random(3) == 1 then tasks[i].task:cancel() end
            end
            for _, t in ipairs(tasks) do
              local ok, err = flow.try_await(t.task)
              local n = ok and #t.text or err.written
              if not n then error(err) end
              broken = broken or not ok and n > 0 and n < #t.text or stdout.is_closed
              expected[#expected + 1] = t.text:sub(1, n)
            end
            if broken then break end
          end
          local file <close> = io.open(dir .. "/expected", "wb")
          file:write(table.concat(expected))
        ]]):format(seed))
        local expected = support.content(dir .. "/expected")
        assert.equal(#expected, #out)
        assert.is_true(expected == out)
      end
    end)
  end

  it("that cancel all that is to be sent let those go on who wait for just that", function()
    local _, err, code = run("PARENT socket,held CHILD", [[
      local stuck
      repeat
        local last = stdout:write_async(("x"):rep(4096))
        flow.sleep(0.005)
        if not last.is_completed then
          local empty, flushed = stdout:write_async(""), stdout:flush_async()
          last:cancel()
          local ok, why = flow.try_await(last)
          stuck = not ok and why.written == 0
          flow.await(empty)
          flow.await(flushed)
        end
      until stuck
      stderr:write("ends")
    ]])
    assert.same({ "ends", 0 }, { err, code })
  end)

  it("are not mistaken for one whose coroutine somebody has closed: that is canceled", function()
    local shell = "mkfifo DIR/fifo5; CHILD 1<>DIR/fifo5; cat DIR/report"
    assert.equal("ran_to_completion 0 300000 ran_to_completion\n", output(shell, [[
      flow.on_unobserved_exception(false)
      local first = stdout:write_async(("x"):rep(200000))
      local co
      local closed = flow.spawn(function()
        co = coroutine.running()
        stdout:write(("-"):rep(3000))
      end)
      flow.yield()
      local last = stdout:write_async(("+"):rep(300000))
      coroutine.close(co)
      stdout:write_async(""):cancel() -- who comes and goes is noticed, and so is who has gone
      local fifo <close> = flow.fs.open(dir .. "/fifo5")
      local got = ""
      repeat got = got .. fifo:read() until got:find(("+"):rep(300000), 1, true)
      flow.await(last)
      local report <close> = io.open(dir .. "/report", "w")
      report:write(first.status, " ", select(2, got:gsub("%-", "")), " ", select(2, got:gsub("%+", "")), " ",
        last.status, "\n")
      assert(closed.status == "faulted")
    ]]))
  end)

  it("that wait for a slow reader are taken out of the queue when they are canceled", function()
    assert.equal("true 3 5\n", output("mkfifo DIR/fifo3; CHILD 1<>DIR/fifo3; cat DIR/report", [[
      local n = 0
      local first = stdout:write_async(("x"):rep(400000))
      local tasks = {}
      for i = 1, 5 do
        local long = i % 2 == 0 and ("-"):rep(10000) or ""
        tasks[i] = stdout:write_async("<" .. i, long, ">")
      end
      for _, i in ipairs { 4, 2, 1 } do
        tasks[i]:cancel()
        local ok, err = flow.try_await(tasks[i])
        assert(not ok and err.written == 0)
      end
      stdout:write_async("end")
      local fifo <close> = flow.fs.open(dir .. "/fifo3")
      local got = ""
      repeat got = got .. fifo:read() until got:find("end", 1, true)
      local report <close> = io.open(dir .. "/report", "w")
      report:write(tostring(first.is_completed_successfully), " ")
      report:write(got:match("^x+<(%d)><(%d)>end$"), " ", select(2, got:match("^x+<(%d)><(%d)>end$")), "\n")
      n = n + 1
    ]]))
  end)
end)

describe("the wrong direction", function()
  for what, shell in pairs {
    ["a pipe"] = "cat DIR/input | CHILD | cat", ["a file"] = "CHILD", ["a terminal"] = "PARENT terminal CHILD",
    ["a socket"] = "PARENT socket CHILD",
  } do
    it("is refused: " .. what, function()
      assert.equal("EBADF EBADF EBADF\n", output(shell, [[
        local _, first = pcall(stdin.write, stdin, "x")
        local _, second = pcall(stdout.read, stdout)
        local _, third = pcall(stdin.shutdown, stdin)
        stdin:flush()
        print(first.code .. " " .. second.code .. " " .. third.code)
      ]], "x"))
    end)
  end
end)

describe("closing", function()
  it("is up to the stream: print goes on, and so does a new one", function()
    assert.equal("written\nprinted\ntrue\nObjectDisposed\nanew\n", output("CHILD | cat", [[
      assert(stdio.stdout == stdout)
      stdout:write_async("written\n")
      stdout:close()
      stdout:close()
      print("printed")
      print(stdout.is_closed)
      print(select(2, pcall(stdout.write, stdout, "x")).name)
      stdio.stdout:write("anew\n")
      assert(stdio.stdout ~= stdout and stdio.stdout == stdio.stdout)
    ]]))
  end)

  it("by a write that was canceled half sent leaves room for a new one", function()
    assert.equal("true x new\n", output("mkfifo DIR/fifo4; CHILD 1<>DIR/fifo4; cat DIR/report", [[
      local task = stdout:write_async(("x"):rep(1000000))
      flow.sleep(0.001)
      task:cancel()
      local _, err = flow.try_await(task)
      local task = stdio.stdout:write_async("new")
      local fifo <close> = flow.fs.open(dir .. "/fifo4")
      local got = ""
      repeat got = got .. fifo:read() until got:find("new", 1, true)
      flow.await(task)
      local report <close> = io.open(dir .. "/report", "w")
      report:write(tostring(#got == err.written + 3), " ", got:match("^(x)x*"), " ", got:sub(-3), "\n")
    ]]))
  end)

  it("ends those who wait", function()
    for _, kind in ipairs { "pipe", "socket", "terminal" } do
      assert.equal("ECANCELED ECANCELED ObjectDisposed\n", output("PARENT " .. kind .. " CHILD", [[
        local one = stdin:read_line_async()
        local two = flow.spawn(function() return stdin:read_line() end)
        local _, refused = flow.try_await(two)
        assert(refused.name == "InvalidOperation")
        stdin:close()
        local _, err = flow.try_await(one)
        stderr:dispose()
        local _, closed = pcall(stdin.read, stdin)
        stdout:write(err.code, " ", err.code, " ", closed.name, "\n")
      ]]))
    end
  end)

  it("happens when they are forgotten: no descriptor is left", function()
    assert.equal("0\n", output("cat DIR/input | CHILD | cat", [[
      local function count()
        local n = 0
        for _ in flow.fs.scandir("/proc/self/fd") do n = n + 1 end
        return n
      end
      local here = stdio
      local core = require "coflow.core"
      stdin:read() stdin:read()
      flow.sleep(0)
      local before = count()
      for i = 1, 20 do
        local s = core.open_standard(i % 3)
        if i % 3 == 0 then assert(s:read() == nil) else s:write("") end
      end
      s = nil
      for _ = 1, 3 do collectgarbage() flow.sleep(0.001) end
      print(count() - before)
      assert(here)
    ]], "x"))
  end)
end)

describe("shutdown", function()
  it("tells the reader that this was all", function()
    local out, err = run("mkfifo DIR/fifo1; CHILD | { cat; echo ended >DIR/fifo1; }", [[
      print("printed")
      stdout:write_async("written\n")
      stdout:shutdown()
      print("too late")
      stderr:write(flow.fs.read_file(dir .. "/fifo1"))
      local _, refused = pcall(stdout.write, stdout, "x")
      stderr:write(refused.name, "\n")
      stdout:close()
    ]])
    assert.same({ "printed\nwritten\n", "ended\nInvalidOperation\n" }, { out, err })
  end)

  it("of a file leaves the rest to others", function()
    assert.equal("written\nafter\n", output("(CHILD; echo after) >DIR/file; cat DIR/file", [[
      flow.await(stdout:write_async("written\n"))
      stdout:shutdown()
      print("too late")
    ]]))
  end)
end)

describe("the end of the state", function()
  for what, shell in pairs {
    ["a pipe"] = "CHILD | cat", ["a file"] = "CHILD", ["a socket"] = "PARENT socket CHILD",
    ["a terminal"] = "PARENT terminal CHILD",
  } do
    it("comes when all is sent: " .. what, function()
      local big = ("0123456789"):rep(30000)
      assert.is_true(big .. "end\n" == output(shell, [[
        stdout:write_async(("0123456789"):rep(30000))
        flow.spawn(function() stdout:write_async("end\n") end)
        flow.yield()
      ]]))
    end)
  end

  it("waits for no reader who never reads", function()
    for _, shell in ipairs { "mkfifo DIR/fifo2; CHILD 1<>DIR/fifo2", "PARENT socket,held CHILD" } do
      local out, err, code = run(shell, [[
        stdout:write_async(("x"):rep(3000000))
        stderr:write("ends\n")
      ]])
      assert.equal(0, code)
      assert.equal("ends\n", err)
      assert.is_true(#out < 3000000)
    end
  end)

  it("comes at once when the reader has gone", function()
    local _, err = run("CHILD | true", [[
      local ok, err
      repeat ok, err = pcall(stdout.write, stdout, ("x"):rep(100000)) until not ok
      stderr:write(err.code)
    ]])
    assert.equal("EPIPE", err)
  end)
end)

describe("under virtual time", function()
  for _, kind in ipairs { "pipe", "socket", "terminal" } do
    it("standard input holds the clock back for the threshold only: a " .. kind, function()
      assert.equal("3600.0 line\n", output("PARENT " .. kind .. " CHILD", [[
        local flow = require "coflow"
        require("coflow.testing").run(function(clock) -- testing.run
          local task = flow.stdio.stdin:read_line_async()
          flow.sleep(3600)
          local now = clock:now()
          flow.stdio.stdout:write("?")
          print(now .. " " .. flow.await(task))
        end)
      ]], "line\n"))
    end)
  end

  it("a file holds it back until it has been read, and written", function()
    assert.equal("text 0 0\n", output("CHILD 2>DIR/file <DIR/input; cat DIR/file", [[
      local flow = require "coflow"
      require("coflow.testing").run(function(clock) -- testing.run
        local late = flow.delay(3600)
        local task = flow.stdio.stdin:read_all_async()
        assert(flow.await_any(task, late) == task)
        local text, now = task.result, clock:now()
        task = flow.stdio.stderr:write_async(("%s %d"):format(text, now))
        assert(flow.await_any(task, late) == task)
        flow.stdio.stderr:write((" %d\n"):format(clock:now()))
        late:cancel()
      end, { autojump_threshold = 0 })
    ]], "text"))
  end)
end)
