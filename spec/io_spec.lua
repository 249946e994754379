-- What holds for every operation on the system, shown by files: the two styles, errors, cancellation at every
-- point, garbage, the end of the state.

local flow = require "coflow"
local testing = require "coflow.testing"
local helper = require "spec.helper"
local support = require "spec.support.io_support"

local fs, is = flow.fs, flow.errors.is
local in_task, pipe, put, content = support.in_task, support.pipe, support.put, support.content
local io_error, recorder, raises = support.io_error, helper.recorder, helper.raises
local Source, none = flow.CancellationTokenSource, flow.CancellationToken.none

describe("an operation", function()
  it("is a task in its _async form", in_task(function(dir)
    put(dir .. "/x", "data")
    local task = fs.read_file_async(dir .. "/x")
    assert.equal("waiting_for_activation", task.status)
    assert.equal("fs.read_file", task.name)
    assert.equal("data", task:await())
    assert.equal("ran_to_completion", task.status)
    assert.equal("data", task.result)
  end))

  it("lets other tasks run while it waits, in direct style", in_task(function(dir)
    put(dir .. "/x", "data")
    local log, note = recorder()
    local other = flow.spawn(note, "other")
    note(fs.read_file(dir .. "/x"))
    other:await()
    assert.same({ "other", "data" }, log)
  end))

  it("goes on beside others", in_task(function(dir)
    local tasks = {}
    for i = 1, 50 do
      put(dir .. "/" .. i, tostring(i))
      tasks[i] = fs.read_file_async(dir .. "/" .. i)
    end
    local results = flow.when_all(tasks):await()
    for i = 1, 50 do assert.equal(tostring(i), results[i]) end
  end))

  it("drives the loop outside every task", function()
    assert.equal("directory", fs.stat("/").type)
    io_error("ENOENT", fs.stat, "/no/such/file")
  end)

  it("works inside pcall, in metamethods, iterators and nested calls", in_task(function(dir)
    put(dir .. "/x", "data")
    local ok, data = pcall(fs.read_file, dir .. "/x")
    assert.same({ true, "data" }, { ok, data })
    local object = setmetatable({}, { __index = function(_, name) return fs.read_file(dir .. "/" .. name) end })
    assert.equal("data", object.x)
    ok = xpcall(fs.read_file, debug.traceback, dir .. "/none")
    assert.is_false(ok)
  end))

  it("starts nothing where Lua cannot yield", in_task(function(dir)
    local err
    table.sort({ 1, 2 }, function(a, b)
      err = err or select(2, pcall(fs.write_file, dir .. "/x", "data"))
      return a < b
    end)
    helper.is_error("InvalidOperation", err, "sort")
    local co = coroutine.wrap(function() return pcall(fs.write_file, dir .. "/x", "data") end)
    local ok
    ok, err = co()
    assert.is_false(ok)
    helper.is_error("InvalidOperation", err)
    assert.is_false(flow.loop.is_alive())
    assert.same({}, support.names(dir))
  end))

  it("can be started there in its _async form", in_task(function(dir)
    local task
    table.sort({ 1, 2 }, function(a, b)
      task = task or fs.write_file_async(dir .. "/x", "data")
      return a < b
    end)
    task:await()
    assert.equal("data", content(dir .. "/x"))
  end))

  it("is refused in callbacks in direct style", in_task(function()
    local source = Source()
    local err
    source.token:register(function() err = select(2, pcall(fs.stat, "/")) end)
    flow.spawn(source.cancel, source):await()
    helper.is_error("InvalidOperation", err)
  end))
end)

describe("wrong arguments", function()
  it("are refused at the caller's line, in both styles", in_task(function()
    for _, name in ipairs { "stat", "stat_async" } do
      local fn = fs[name]
      local line = helper.here(1)
      local err = helper.raised(function() local _ = fn(42, "x") end)
      assert.truthy(err:find(line .. ": bad argument #1 to ", 1, true), err)
      err = helper.raised(function() local _ = fn("/", "x") end)
      assert.truthy(err:find("bad argument #2 to ", 1, true), err)
      assert.truthy(err:find("coflow.CancellationToken", 1, true), err)
      err = helper.raised(function() local _ = fn("a\0b") end)
      assert.truthy(err:find("zero bytes", 1, true), err)
    end
    assert.is_false(flow.loop.is_alive())
  end))

  it("are refused outside every task at the caller's line", function()
    local line = helper.here(1)
    local err = helper.raised(function() local _ = fs.stat({}) end)
    assert.truthy(err:find(line, 1, true), err)
  end)
end)

describe("a refusal of the system", function()
  it("is an IO error with code, syscall and path", in_task(function(dir)
    local err = io_error("ENOENT", fs.open, dir .. "/none")
    assert.equal("IO", err.name)
    assert.equal("open", err.syscall)
    assert.equal(dir .. "/none", err.path)
    assert.equal("open '" .. dir .. "/none': no such file or directory (ENOENT)", err.message)
    assert.equal("IO: " .. err.message, tostring(err))
  end))

  it("faults the task, whose awaits raise the same value", in_task(function()
    local task = fs.stat_async("/no/such/file")
    local _, first = pcall(task.await, task)
    local _, second = pcall(task.await, task)
    assert.is_true(is(first, "IO"))
    assert.equal(first, second)
    assert.equal("faulted", task.status)
  end))

  it("is reported when nobody looks at it", in_task(function()
    local seen
    flow.on_unobserved_exception(function(err, task) seen = { err.code, task.name } end)
    fs.stat_async("/no/such/file")
    fs.stat("/") -- one after the other in the pool, or nearly
    for _ = 1, 100 do
      if seen then break end
      fs.stat("/")
      helper.collect()
    end
    flow.on_unobserved_exception(nil)
    assert.same({ "ENOENT", "fs.stat" }, seen)
  end))
end)

describe("canceled before the call", function()
  it("nothing is started", in_task(function(dir)
    local source = Source()
    source:cancel("late")
    local task = fs.write_file_async(dir .. "/x", "data", nil, source.token)
    assert.is_true(task.is_canceled)
    local err = raises("OperationCanceled", task.await, task)
    assert.equal(source.token, err.token)
    assert.equal("late", err.reason)
    err = raises("OperationCanceled", fs.write_file, dir .. "/x", "data", nil, source.token)
    assert.equal(source.token, err.token)
    assert.is_false(flow.loop.is_alive())
    assert.same({}, support.names(dir))
  end))

  it("the ambient token counts, and none opts out", in_task(function(dir)
    local task = flow.spawn(function()
      pcall(flow.sleep, math.huge)
      local token = flow.cancellation_token()
      assert.equal(token, raises("OperationCanceled", fs.write_file, dir .. "/x", "data").token)
      assert.is_true(fs.write_file_async(dir .. "/x", "data").is_canceled)
      fs.write_file(dir .. "/y", "data", nil, none)
      return "through"
    end)
    flow.yield()
    task:cancel()
    assert.equal("through", task:await())
    assert.same({ "y" }, support.names(dir))
  end))
end)

describe("canceled while it goes on", function()
  it("ends at once, with its token, whatever the thread does", in_task(function(dir)
    local _ <close>, reader, writer = pipe(dir)
    local source = Source()
    local task = reader:read_async(10, source.token)
    flow.yield()
    source:cancel("enough")
    assert.is_true(task.is_canceled)
    local err = raises("OperationCanceled", task.await, task)
    assert.equal(source.token, err.token)
    assert.equal("enough", err.reason)
    writer:write("all of it")
    assert.equal("all of it", reader:read())
  end))

  it("ends its await in direct style", in_task(function(dir)
    local _ <close>, reader, writer = pipe(dir)
    local source = Source()
    local task = flow.spawn(function() return reader:read(10, source.token) end)
    flow.yield()
    source:cancel()
    assert.equal(source.token, raises("OperationCanceled", task.await, task).token)
    writer:write("x")
    assert.equal("x", reader:read())
  end))

  it("ends with its task, its group, its deadline", in_task(function(dir)
    local _ <close>, reader, writer = pipe(dir)
    local task = flow.spawn(reader.read, reader)
    flow.yield()
    assert.is_true(task:cancel("bye"))
    raises("OperationCanceled", task.await, task)
    raises("Timeout", flow.with_timeout, 0.01, reader.read, reader)
    raises("Timeout", flow.with_timeout, 0.01, function() return reader:read_async():await() end)
    flow.task_group(function(group)
      local child = group:spawn(reader.read_line, reader)
      flow.yield()
      group:cancel()
      raises("OperationCanceled", child.await, child)
    end)
    writer:write("nothing is lost\n")
    assert.equal("nothing is lost", reader:read_line())
  end))

  it("by hand, once", in_task(function(dir)
    local _ <close>, reader, writer = pipe(dir)
    local task = reader:read_async()
    assert.is_true(task:cancel("by hand"))
    assert.is_true(task.is_canceled)
    assert.is_false(task:cancel())
    assert.equal("by hand", raises("OperationCanceled", task.await, task).reason)
    writer:write("x")
  end))

  it("lets go of what comes late: a descriptor, a directory", in_task(function(dir)
    for _ = 1, 50 do
      local task = fs.open_async(dir)
      flow.yield()
      task:cancel()
      task = fs.mkdtemp_async(dir .. "/x")
      flow.yield()
      if not task:cancel() then fs.remove(task:await()) end -- it was faster
    end
    local deadline = os.time() + 10
    while #support.names(dir) > 0 and os.time() < deadline do flow.yield() end
    assert.same({}, support.names(dir))
  end))

  it("is not heard with none", in_task(function(dir)
    local _ <close>, reader, writer = pipe(dir)
    local task = flow.spawn(function()
      local data = reader:read(10, none)
      assert.is_true(flow.cancellation_token().is_cancellation_requested)
      return data
    end)
    flow.yield()
    task:cancel()
    flow.yield()
    assert.is_false(task.is_completed)
    writer:write("x")
    assert.equal("x", task:await())
  end))

  it("ends in direct style where nothing flows, too", in_task(function(dir)
    local _ <close>, reader, writer = pipe(dir)
    local task = flow.spawn(function()
      local _ <close> = flow.ExecutionContext.suppress_flow()
      return reader:read()
    end)
    flow.yield()
    task:cancel()
    raises("OperationCanceled", task.await, task)
    writer:write("kept")
    assert.equal("kept", reader:read())
  end))
end)

describe("canceled after it has ended", function()
  it("nothing happens", in_task(function(dir)
    local source = Source()
    local task = fs.write_file_async(dir .. "/x", "data", nil, source.token)
    task:await()
    source:cancel()
    assert.is_false(task:cancel())
    assert.equal("ran_to_completion", task.status)
  end))

  it("nothing is lost between its end and its landing, whatever comes first", function()
    local dir = fs.mkdtemp(os.tmpname() .. ".d")
    local text = {}
    for i = 1, 200 do text[i] = ("%03d"):format(i) end
    put(dir .. "/x", table.concat(text))
    testing.explore(function()
      local file <close> = fs.open(dir .. "/x")
      local got, tasks = {}, {}
      for i = 1, 12 do
        local source = Source()
        tasks[2 * i - 1] = flow.spawn(function()
          local ok, data = pcall(file.read, file, 3, source.token)
          if ok then got[#got + 1] = data end
        end)
        tasks[2 * i] = flow.spawn(function()
          for _ = 1, i % 5 do
            flow.yield()
            if i % 2 == 0 then fs.stat("/") end
          end
          if i % 3 > 0 then source:cancel() end
        end)
      end
      flow.when_all(tasks):await()
      assert.is_true(#got >= 4)
      table.sort(got) -- they go on in any order
      assert.equal(table.concat(text, "", 1, #got), table.concat(got))
      assert.equal(3 * #got, file:seek())
    end, { runs = helper.many(60, 5) })
    fs.remove(dir, { recursive = true })
  end)

  it("nothing is lost when the cancellation comes in between", in_task(function(dir)
    local _ <close>, reader = pipe(dir)
    local writer <close> = assert(io.open(dir .. "/fifo", "w"))
    local spinning <close> = support.spinning()
    local canceled, rounds = 0, helper.many(600, 20)
    for n = 1, rounds do
      local task = flow.spawn(reader.read, reader)
      flow.yield()
      writer:write(n):flush()
      spinning.wait(n)
      task:cancel()
      local ok, data = task:try_await()
      if not ok then
        canceled = canceled + 1
        data = flow.with_timeout(10, reader.read, reader)
      end
      assert.equal(tostring(n), data)
    end
    assert.is_true(rounds < 600 or canceled > 0 and canceled < rounds)
  end))
end)

describe("garbage", function()
  it("is not what is in flight: it ends, and is forgotten then", in_task(function(dir)
    fs.write_file_async(dir .. "/x", ("x"):rep(100000))
    collectgarbage()
    collectgarbage()
    local size = 0
    local deadline = os.time() + 10
    while size ~= 100000 and os.time() < deadline do
      local ok, s = pcall(fs.stat, dir .. "/x")
      size = ok and s.size or 0
    end
    assert.equal(100000, size)
  end))

  it("a task that waits lives by it", in_task(function(dir)
    local _, reader, writer = pipe(dir)
    local _ <close> = writer
    local done
    flow.spawn(function()
      local _ <close> = reader
      done = reader:read()
    end)
    flow.yield()
    reader = nil -- luacheck: ignore
    helper.collect()
    writer:write("alive")
    local deadline = os.time() + 10
    while not done and os.time() < deadline do flow.yield() end
    assert.equal("alive", done)
  end))

  it("a file is closed as the state closes, though its last job was done and has not landed", function()
    for _ = 1, 10 do -- closing it went on in a thread, with the loop closed and the memory gone
      assert.equal("ended", helper.output [[
        local flow = require "coflow"
        local file, other
        flow.run(function()
          file, other = flow.fs.open "/proc/self/maps", flow.fs.open "/proc/self/maps"
        end)
        local first = other:read_async(5)
        flow.spawn(function()
          first:await()
          flow.loop.stop()
        end)
        local read, close = file:read_async(5), file:close_async()
        flow.loop.run "nowait"
        local from = os.clock()
        repeat until os.clock() - from > 0.01 -- both reads are done, and come together
        flow.loop.run "once"
        assert(read and not close.is_completed)
        io.write "ended"
      ]])
    end
  end)

  it("a file that nobody closes is closed by the collector", in_task(function(dir)
    put(dir .. "/x", "")
    for _ = 1, 20 do fs.open(dir .. "/x") end
  end))

  it("a finished operation keeps nothing", in_task(function(dir)
    local weak = setmetatable({}, { __mode = "v" })
    local task
    do
      local source = Source()
      weak.token = source.token
      local file = fs.open(dir .. "/x", "w")
      weak.file = file
      task = file:sync_async(source.token)
      task:await()
      file:close()
    end
    helper.collect()
    assert.is_nil(weak.token)
    assert.is_nil(weak.file)
    assert.is_true(task.is_completed_successfully)
  end))
end)

describe("an operation that outlives its scope", function()
  it("is held all the same", in_task(function(dir)
    local _ <close>, reader, writer = pipe(dir)
    local weak = setmetatable({}, { __mode = "v" })
    flow.with_timeout(1000, function() weak.task = reader:read_async() end)
    helper.collect()
    local task = assert(weak.task) -- from now on it is held by us
    writer:write("x")
    assert.equal("x", task:await())
  end))
end)

describe("virtual time", function()
  it("waits for what is in flight", function()
    testing.run(function(clock)
      local late = flow.delay(1000)
      local key = select(2, flow.await_any { file = fs.read_file_async("/proc/self/stat"), late = late })
      assert.equal("file", key)
      assert.equal(0, clock.now())
      late:await()
    end)
  end)

  it("counts operations among what a test has left", function()
    local dir = fs.mkdtemp(os.tmpname() .. ".d")
    local reader, writer, _
    local ok, err = pcall(testing.run, function()
      _, reader, writer = pipe(dir)
      reader:read_async()
    end)
    assert.is_false(ok)
    assert.truthy(tostring(err):find("file:read", 1, true), tostring(err))
    assert.truthy(tostring(err):find("io_spec.lua", 1, true), tostring(err))
    reader:close()
    writer:close()
    fs.remove(dir, { recursive = true })
  end)
end)

describe("a process without descriptors", function()
  it("is told so, and still has time", function()
    local script = os.tmpname()
    put(script, [[
      local flow = require "coflow"
      local fs = flow.fs
      local files = {}
      for i = 1, 100 do files[i] = io.open("/dev/null") end
      local ok, err = pcall(fs.stat, "/")
      assert(not ok and flow.errors.is(err, "IO") and err.code == "EMFILE", err)
      assert(not pcall(fs.watch, "/"))
      flow.run(function()
        flow.sleep(0.005)
        for _, file in ipairs(files) do file:close() end
        assert(fs.stat("/").type == "directory")
        files = {}
        for i = 1, 100 do
          ok, err = pcall(fs.open, "/")
          if not ok then break end
          files[i] = err
        end
        assert(err.code == "EMFILE" and #files > 0)
        assert(select(2, pcall(fs.read_file, "/etc/passwd")).code == "EMFILE")
        assert(select(2, pcall(fs.scandir, "/")).code == "EMFILE")
      end)
      io.write("well")
    ]])
    local child <close> = io.popen(("ulimit -n 40; %s %s 2>&1"):format(os.getenv("LUA") or "lua5.4", script))
    assert.equal("well", child:read("a"))
    os.remove(script)
  end)

  it("is told as EMFILE also where the loop is only to be made, or a module to be read", function()
    local script = os.tmpname()
    put(script, [[
      local flow = require "coflow"
      for round = -1, 12 do
        local files, left = {}, math.max(round, 0)
        for i = 1, 100 do files[i] = io.open("/dev/null") end
        for _ = 1, left do table.remove(files):close() end
        local function outcome(f, ...)
          local ok, err = pcall(f, ...)
          return ok or flow.errors.is(err, "IO") and err.code == "EMFILE" or err
        end
        assert(outcome(flow.run, flow.sleep, 0.001) == true)
        local late = outcome(function() return flow.with_timeout end)
        assert(late == true, late)
        local udp = outcome(function() return flow.net.udp { host = "127.0.0.1" }:close() or true end)
        assert(udp == true, udp)
        local signals = outcome(function() return flow.signal.stream("SIGUSR1") and true end)
        assert(signals == true, signals)
        for _, file in ipairs(files) do file:close() end
        if left == 0 then assert(flow.Semaphore and flow.net and flow.signal) end -- but not what these need later
      end
      io.write("well")
    ]])
    local child <close> = io.popen(("ulimit -n 40; %s %s 2>&1"):format(os.getenv("LUA") or "lua5.4", script))
    assert.equal("well", child:read("a"))
    os.remove(script)
  end)
end)

describe("the end of the state", function()
  local busy = [[
    local flow = require "coflow"
    local fs, dns = flow.fs, flow.dns
    local path = os.tmpname()
    os.remove(path)
    assert(os.execute("mkfifo " .. path))
    kept = {}
    local function busy()
      local reader = fs.open(path)
      local writer = fs.open(path, "w")
      os.remove(path)
      kept.reader, kept.writer = reader, writer
      for i = 1, 100 do
        kept[#kept + 1] = i % 5 == 0 and fs.open_async("/")
          or i % 5 == 1 and reader:read_async(10)
          or i % 5 == 2 and fs.read_file_async("/proc/self/maps")
          or i % 5 == 3 and dns.resolve_async("localhost")
          or i % 5 == 4 and fs.scandir_async("/")
      end
      kept.watcher = fs.watch("/tmp")
      kept.change = kept.watcher:next_async()
    end
  ]]

  it("stops a hundred in flight", function()
    helper.output(busy .. "flow.run(busy)")
    helper.output(busy .. "flow.run(function() busy() kept = nil collectgarbage() end)")
    helper.output(busy .. "flow.run(function() busy() flow.sleep(0.002) end)")
  end)

  it("inside a task as well", function()
    assert.equal(3, helper.child(busy .. "flow.run(function() busy() os.exit(3, true) end)").code)
    assert.equal(3, helper.child(busy .. [[
      flow.run(function()
        busy()
        for _, task in ipairs(kept) do task:cancel() end
        os.exit(3, true)
      end)]]).code)
  end)

  it("leaves a thread that nobody answers: a pipe without a reader", function()
    helper.output([[
      local flow = require "coflow"
      local path = os.tmpname()
      os.remove(path)
      assert(os.execute("mkfifo " .. path))
      flow.run(function()
        for _ = 1, 10 do flow.fs.open_async(path, "w") end
        flow.yield()
        os.remove(path)
      end)
    ]])
  end)

  it("refuses what finalizers start after it", function()
    local out = helper.output([[
      local flow
      local last = setmetatable({}, { __gc = function()
        local ok, err = pcall(flow.fs.read_file_async, "/etc/passwd")
        io.write(tostring(ok), " ", err.name)
      end })
      flow = require "coflow"
      flow.fs.stat("/")
      kept = last
    ]])
    assert.equal("false InvalidOperation", out)
  end)

  it("releases what finalizers start before it", function()
    helper.output([[
      local flow = require "coflow"
      flow.fs.stat("/")
      kept = setmetatable({}, { __gc = function() task = flow.fs.open_async("/") end })
    ]])
  end)
end)
