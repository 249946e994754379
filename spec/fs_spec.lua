-- coflow.fs: files, whole files, directories, watching. What holds for every operation is in io_spec.

local flow = require "coflow"
local helper = require "spec.helper"
local support = require "spec.support.io_support"

local fs = flow.fs
local in_task, put, content, names = support.in_task, support.put, support.content, support.names
local io_error, raises, bad_argument = support.io_error, helper.raises, support.bad_argument
local Source = flow.CancellationTokenSource

describe("open", function()
  it("gives a file that is closed at the end of its block", in_task(function(dir)
    local kept
    do
      local file <close> = fs.open(dir .. "/x", "w")
      kept = file
      assert.is_false(file.is_closed)
      assert.equal(dir .. "/x", file.path)
      assert.equal("coflow.File '" .. dir .. "/x'", tostring(file))
      assert.equal(file, file:write("one", " ", 2, "\n"))
    end
    assert.is_true(kept.is_closed)
    assert.equal("one 2\n", content(dir .. "/x"))
    raises("ObjectDisposed", kept.read, kept)
    raises("ObjectDisposed", kept.write_async, kept, "x")
    kept:close()
    kept:dispose()
    assert.truthy(tostring(kept):find("closed", 1, true))
  end))

  it("knows Lua's modes", in_task(function(dir)
    local path = dir .. "/x"
    io_error("ENOENT", fs.open, path)
    io_error("ENOENT", fs.open, path, "r+")
    fs.open(path, "wx"):write("12345"):close()
    io_error("EEXIST", fs.open, path, "wx")
    do
      local file <close> = fs.open(path, "rb")
      assert.equal("12345", file:read())
      io_error("EBADF", file.write, file, "x")
    end
    do
      local file <close> = fs.open(path, "r+")
      file:write("ab")
      assert.equal("345", file:read())
    end
    do
      local file <close> = fs.open(path, "a+")
      assert.equal("ab", file:read(2))
      file:write("67")
      assert.equal(7, file:seek())
      assert.is_nil(file:read())
      file:seek("set", 1)
      file:write("8")
      assert.equal("ab345678", content(path))
    end
    do
      local file <close> = fs.open(path, "w+")
      assert.equal(0, fs.stat(path).size)
      file:write("x")
      file:seek("set")
      assert.equal("x", file:read())
      local reader <close> = fs.open(path, "a")
      io_error("EBADF", reader.read, reader)
    end
    for _, mode in ipairs { "", "z", "rw", "rx", "r++z" } do
      bad_argument("invalid mode: \"r\", \"w\" or \"a\"", fs.open, path, mode)
    end
  end))

  it("does not hand descriptors to children", in_task(function(dir)
    put(dir .. "/x", "")
    local _ <close> = fs.open(dir .. "/x")
    local pipe <close> = io.popen("ls -l /proc/self/fd")
    assert.is_nil(pipe:read("a"):find(dir, 1, true))
  end))

  it("takes paths of any bytes but zero", in_task(function(dir)
    local name = "a\1\200\255 '\n"
    fs.write_file(dir .. "/" .. name, "strange")
    assert.equal("strange", fs.read_file(dir .. "/" .. name))
    assert.same({ name }, names(dir))
    bad_argument("zero bytes", fs.open, "x\0")
    io_error("ENOENT", fs.open, "")
    bad_argument("string expected", fs.open, 7)
  end))
end)

describe("a file", function()
  it("reads up to a number of bytes, and nil at the end", in_task(function(dir)
    local text = helper.many(300000, 100000)
    local data = {}
    for i = 1, text // 10 do data[i] = ("%010d"):format(i) end
    data = table.concat(data)
    put(dir .. "/x", data)
    local file <close> = fs.open(dir .. "/x")
    assert.equal(data:sub(1, 1), file:read(1))
    assert.equal("", file:read(0))
    local parts = { data:sub(1, 1) }
    for part in function() return file:read(7777) end do
      assert.is_true(#part <= 7777)
      parts[#parts + 1] = part
    end
    assert.equal(data, table.concat(parts))
    assert.is_nil(file:read())
    assert.equal("", file:read_all())
    assert.equal("", file:read(0))
    file:seek("set", 5)
    assert.equal(data:sub(6), file:read_all())
    file:seek("set")
    assert.equal(data, file:read(#data * 2))
    for _, wrong in ipairs { -1, 1.5, "x", {} } do
      bad_argument(wrong == -1 and "negative" or "number", file.read, file, wrong)
    end
  end))

  it("sees what is appended after the end", in_task(function(dir)
    put(dir .. "/x", "1")
    local file <close> = fs.open(dir .. "/x")
    local writer <close> = fs.open(dir .. "/x", "a")
    assert.equal("1", file:read())
    assert.is_nil(file:read())
    writer:write("2")
    assert.equal("2", file:read())
  end))

  it("tells lines, with and without an end", in_task(function(dir)
    put(dir .. "/x", "first\n\r\n\nlast")
    local file <close> = fs.open(dir .. "/x")
    assert.equal("first", file:read_line())
    assert.equal("\r", file:read_line())
    assert.equal("", file:read_line())
    assert.equal("last", file:read_line())
    assert.is_nil(file:read_line())
  end))

  it("iterates over lines, and stands behind the one where the loop was left", in_task(function(dir)
    local n, lines = helper.many(20000, 3000), {}
    for i = 1, n do lines[i] = ("line %d %s"):format(i, ("x"):rep(i % 100)) end
    put(dir .. "/x", table.concat(lines, "\n"))
    local file <close> = fs.open(dir .. "/x")
    local i = 0
    for line in file:lines() do
      i = i + 1
      assert.equal(lines[i], line)
      if i == 1000 then break end
    end
    assert.equal(lines[1001], file:read(#lines[1001]))
    assert.equal("", file:read_line())
    for line in file:lines() do
      if i == 1000 then i = i + 1 end
      i = i + 1
      assert.equal(lines[i], line)
    end
    assert.equal(n, i)
  end))

  it("takes the longest line and a token for its lines, as read_line does", in_task(function(dir)
    put(dir .. "/x", "12\n345\n6")
    local file <close> = fs.open(dir .. "/x")
    local lines = file:lines(2)
    assert.equal("12", lines())
    assert.equal("EMSGSIZE", raises("IO", lines).code)
    assert.equal("345", file:lines(math.huge)())
    assert.equal("6", file:lines(flow.CancellationToken.none)())
    file:seek("set")
    local source = flow.CancellationTokenSource()
    lines = file:lines(nil, source.token)
    assert.equal("12", lines())
    source:cancel()
    assert.equal(source.token, raises("OperationCanceled", lines).token)
    bad_argument("number of bytes", file.lines, file, -1)
    assert.equal("345", file:read_line(math.huge))
  end))

  it("refuses lines and rests that are too long, and loses nothing", in_task(function(dir)
    put(dir .. "/x", "12345\n678")
    local file <close> = fs.open(dir .. "/x")
    io_error("EMSGSIZE", file.read_line, file, 4)
    assert.equal("12345", file:read_line(5))
    io_error("EMSGSIZE", file.read_line, file, 2)
    io_error("EMSGSIZE", file.read_all, file, 2)
    assert.equal("678", file:read_all(3))
    file:seek("set")
    io_error("EMSGSIZE", file.read_all, file, 3)
    io_error("EMSGSIZE", file.read_all, file, 3)
    assert.equal("12345\n678", file:read_all())
    put(dir .. "/long", ("x"):rep(200000))
    local long <close> = fs.open(dir .. "/long")
    io_error("EMSGSIZE", long.read_line, long, 100)
    assert.equal(200000, #long:read_line())
  end))

  it("seeks from the start, from here, from the end", in_task(function(dir)
    put(dir .. "/x", "0123456789")
    local file <close> = fs.open(dir .. "/x")
    assert.equal(0, file:seek())
    assert.equal(4, file:seek("set", 4))
    assert.equal("4", file:read(1))
    assert.equal(5, file:seek())
    assert.equal(3, file:seek("cur", -2))
    assert.equal(8, file:seek("end", -2))
    assert.equal("89", file:read())
    assert.equal(20, file:seek("end", 10))
    assert.is_nil(file:read())
    for _, wrong in ipairs { { "set", -1 }, { "end", -11 }, { "cur", -21 }, { "cur", math.maxinteger },
      { "end", math.maxinteger } } do
      io_error("EINVAL", file.seek, file, table.unpack(wrong))
    end
    assert.equal(20, file:seek())
    bad_argument("invalid option", file.seek, file, "middle")
    local _ <close>, reader = support.pipe(dir)
    io_error("ESPIPE", reader.seek, reader, "set", 0)
  end))

  it("writes in the order it was told, from any number of tasks", in_task(function(dir)
    local file = fs.open(dir .. "/x", "w")
    local expected, tasks = {}, {}
    for i = 1, helper.many(200, 50) do
      expected[i] = i .. "\n"
      tasks[i] = file:write_async(i, "\n")
    end
    local closed = file:close_async()
    raises("ObjectDisposed", file.write, file, "late")
    closed:await()
    for _, task in ipairs(tasks) do assert.is_true(task.is_completed_successfully) end
    assert.equal(table.concat(expected), content(dir .. "/x"))
  end))

  it("takes a token after any number of strings", in_task(function(dir)
    local file <close> = fs.open(dir .. "/x", "w")
    local source = Source()
    file:write("a", source.token)
    file:write("b", nil)
    file:write(source.token)
    file:write()
    source:cancel()
    raises("OperationCanceled", file.write, file, "c", source.token)
    raises("OperationCanceled", file.write, file, source.token)
    bad_argument("string expected", file.write, file, "x", {})
    bad_argument("string expected", file.write, file, nil)
    bad_argument("string expected", file.write, file, nil, "x")
    bad_argument("string expected", file.write, file, "x", nil, nil)
    assert.equal("ab", content(dir .. "/x"))
  end))

  it("drops a write that was canceled while it waited for its turn", in_task(function(dir)
    local file <close> = fs.open(dir .. "/x", "w")
    local tasks = {}
    for i = 1, 9 do tasks[i] = file:write_async(i) end
    for i = 2, 9, 2 do assert.is_true(tasks[i]:cancel()) end
    flow.when_all({ tasks[1], tasks[3], tasks[5], tasks[7], tasks[9] }):await()
    assert.equal("13579", content(dir .. "/x"))
    assert.equal(5, file:seek())
  end))

  it("is stat'ed, synchronized and truncated", in_task(function(dir)
    local file <close> = fs.open(dir .. "/x", "w+")
    file:write("0123456789")
    file:sync()
    assert.equal(10, file:stat().size)
    file:truncate(4)
    assert.equal(10, file:seek())
    file:seek("set")
    assert.equal("0123", file:read())
    bad_argument("negative", file.truncate, file, -1)
  end))

  it("closes after a cancellation, too", in_task(function(dir)
    local task = flow.spawn(function()
      local file <close> = fs.open(dir .. "/x", "w")
      file:write("x")
      flow.sleep(math.huge)
    end)
    while not fs.access(dir .. "/x") do flow.yield() end
    task:cancel()
    raises("OperationCanceled", task.await, task)
    local file = fs.open(dir .. "/x")
    local closing = file:close_async()
    assert.is_true(closing:cancel())
    file:close()
  end))

  it("closes though the closing was canceled before any thread had it", in_task(function(dir)
    local _ <close>, reader, writer = support.pipe(dir)
    put(dir .. "/x", "")
    local file = fs.open(dir .. "/x")
    local readers = {}
    for i = 1, 4 do -- each thread of the pool waits for ever
      readers[i] = fs.open(dir .. "/fifo")
    end
    local busy = {}
    for i = 1, 4 do busy[i] = readers[i]:read_async() end
    local closing = file:close_async()
    assert.is_true(closing:cancel())
    for i = 1, 4 do
      busy[i]:cancel()
      readers[i]:close()
    end
    for fd in fs.scandir("/proc/self/fd") do
      local ok, path = pcall(fs.readlink, "/proc/self/fd/" .. fd)
      assert.is_false(ok and path == fs.realpath(dir .. "/x"))
    end
    assert.is_true(file.is_closed)
    assert.is_not_nil(reader and writer)
  end))

  it("keeps the error that unwinds through its block", in_task(function(dir)
    local err = helper.raised(function()
      local _ <close> = fs.open(dir .. "/x", "w")
      error("mine", 0)
    end)
    assert.equal("mine", err)
  end))

  it("closes in a coroutine that somebody closes", in_task(function(dir)
    put(dir .. "/x", "")
    local co = coroutine.create(function(file)
      local _ <close> = file
      coroutine.yield()
    end)
    local file = fs.open(dir .. "/x")
    coroutine.resume(co, file)
    assert.is_true(coroutine.close(co))
    assert.is_true(file.is_closed)
  end))

  it("works with pipes, and leaves them when it is canceled", in_task(function(dir)
    local _ <close>, reader, writer = support.pipe(dir)
    local big = ("0123456789"):rep(50000) -- more than a pipe holds
    local task = writer:write_async(big)
    local parts, n = {}, 0
    while n < #big do
      parts[#parts + 1] = reader:read()
      n = n + #parts[#parts]
    end
    task:await()
    assert.equal(big, table.concat(parts))
    task = writer:write_async(big)
    flow.yield()
    assert.is_true(task:cancel())
    writer:close()
    while reader:read() do n = n + 1 end
    assert.is_nil(reader:read_line())
  end))

  it("loses no byte of a read that a finalizer cancels while its result is made", in_task(function(dir)
    local text = ""
    for i = 1, 50 do text = text .. ("%079d\n"):format(i) end
    put(dir .. "/x", text)
    for method, argument in pairs { read = 1000, read_line = false, read_all = false } do
      local file
      support.canceled_while_landing(function(token)
        file = fs.open(dir .. "/x")
        return file[method .. "_async"](file, argument or nil, token)
      end, function(ok, got)
        local rest = file:read_all()
        local head = not ok and "" or method == "read_line" and got .. "\n" or got
        assert.is_true(text == head .. rest, method)
        assert.equal(#text, file:seek())
        file:close()
      end)
    end
  end))

  it("gives each line once, also to a finalizer that reads while one is made", in_task(function(dir)
    local text = {}
    for i = 1, 20 do text[i] = ("%079d"):format(i) end
    put(dir .. "/x", table.concat(text, "\n") .. "\n")
    for _, method in ipairs { "read_line_async", "read_async" } do
      for k = 1, 8 do
        local file <close> = fs.open(dir .. "/x")
        local next, read, got, among = file:lines(), file[method], {}, nil
        got[1] = next()
        do
          local _ <close> = support.at_collection(k, function() among = read(file) end)
          got[2] = next()
        end
        for line in next do got[#got + 1] = line end
        if among ~= nil then
          for line in among:await():gmatch("[^\n]+") do got[#got + 1] = line end
        end
        table.sort(got)
        assert.same(text, got)
      end
    end
  end))

  it("is closed once, also by a finalizer of the close", in_task(function(dir)
    put(dir .. "/x", "")
    for k = 1, 4 do
      local file = fs.open(dir .. "/x")
      local close, tasks = file.close_async, {}
      do
        local _ <close> = support.at_collection(k, function() tasks[2] = close(file) end)
        tasks[1] = close(file)
      end
      for _, task in ipairs(tasks) do task:await() end
      assert.is_true(file.is_closed)
    end
  end))

  it("has no place behind the last one, where a write is refused", in_task(function(dir)
    local file <close> = fs.open(dir .. "/x", "w")
    file:seek("set", math.maxinteger)
    raises("IO", file.write, file, "xyz")
    assert.equal(math.maxinteger, file:seek())
    file:seek("set")
    file:write("xyz")
    assert.equal("xyz", content(dir .. "/x"))
  end))
end)

describe("whole files", function()
  it("are read and written", in_task(function(dir)
    local data = ("\0\1\255\n"):rep(100000)
    fs.write_file(dir .. "/x", data)
    assert.equal(data, fs.read_file(dir .. "/x"))
    fs.write_file(dir .. "/x", "short")
    assert.equal("short", fs.read_file(dir .. "/x"))
    fs.write_file(dir .. "/x", "er", { append = true })
    assert.equal("shorter", fs.read_file(dir .. "/x"))
    fs.write_file(dir .. "/x", "")
    assert.equal("", fs.read_file(dir .. "/x"))
    assert.truthy(#fs.read_file("/proc/self/status") > 100) -- which has no size
    io_error("EISDIR", fs.read_file, dir)
    io_error("EISDIR", fs.write_file, dir, "x")
    bad_argument("unknown option 'atomics'", fs.write_file, dir .. "/x", "", { atomics = true })
    bad_argument("string expected", fs.write_file, dir .. "/x", {})
    bad_argument("'append'", fs.write_file, dir .. "/x", "", { atomic = true, append = true })
  end))

  it("are replaced as a whole", in_task(function(dir)
    fs.write_file(dir .. "/x", "old")
    fs.chmod(dir .. "/x", tonumber("640", 8))
    local reader <close> = fs.open(dir .. "/x")
    fs.write_file(dir .. "/x", "new", { atomic = true })
    assert.equal("old", reader:read_all())
    assert.equal("new", content(dir .. "/x"))
    assert.equal(tonumber("640", 8), fs.stat(dir .. "/x").mode)
    fs.symlink("x", dir .. "/link")
    fs.write_file(dir .. "/link", "by link", { atomic = true })
    assert.equal("by link", content(dir .. "/x"))
    assert.equal("link", fs.lstat(dir .. "/link").type)
    fs.write_file(dir .. "/y", "first", { atomic = true })
    assert.same({ "link", "x", "y" }, names(dir))
  end))

  it("leave nothing beside them on failure and on cancellation", in_task(function(dir)
    io_error("ENOENT", fs.write_file, dir .. "/none/x", "x", { atomic = true })
    fs.mkdir(dir .. "/d")
    io_error("EISDIR", fs.write_file, dir .. "/d", "x", { atomic = true })
    fs.write_file(dir .. "/x", "old")
    local big = ("x"):rep(4000000)
    local canceled = 0
    for i = 1, 20 do
      local task = fs.write_file_async(dir .. "/x", big, { atomic = true })
      for _ = 1, i do fs.stat("/") end
      if task:cancel() then canceled = canceled + 1 end
      pcall(task.await, task)
      local now = fs.stat(dir .. "/x").size
      assert.is_true(now == 3 or now == #big)
    end
    assert.is_true(canceled > 0)
    local deadline = os.time() + 10
    while #names(dir) > 2 and os.time() < deadline do flow.yield() end
    assert.same({ "d", "x" }, names(dir))
  end))

  it("stay whole when the process is killed half-way", in_task(function(dir)
    local script = ([[
      local flow = require "coflow"
      local big = ("x"):rep(5000000)
      flow.run(function()
        for _ = 1, 100 do flow.fs.write_file(%q, big, { atomic = true }) end
      end)
    ]]):format(dir .. "/x")
    put(dir .. "/script.lua", script)
    put(dir .. "/x", "old")
    os.execute(("timeout -s KILL 0.2 %s %s/script.lua 2>/dev/null"):format(os.getenv("LUA") or "lua5.4", dir))
    local size = fs.stat(dir .. "/x").size
    assert.is_true(size == 3 or size == 5000000)
  end))

  it("are copied, with their permissions", in_task(function(dir)
    local data = ("0123456789"):rep(helper.many(2000000, 200000))
    put(dir .. "/x", data)
    fs.chmod(dir .. "/x", tonumber("750", 8))
    fs.copy(dir .. "/x", dir .. "/y")
    assert.equal(data, content(dir .. "/y"))
    assert.equal(tonumber("750", 8), fs.stat(dir .. "/y").mode)
    fs.copy(dir .. "/x", dir .. "/x") -- onto itself: nothing happens
    assert.equal(#data, fs.stat(dir .. "/x").size)
    put(dir .. "/y", "longer before")
    put(dir .. "/x", "")
    fs.copy(dir .. "/x", dir .. "/y")
    assert.equal("", content(dir .. "/y"))
    assert.equal(dir .. "/none", io_error("ENOENT", fs.copy, dir .. "/none", dir .. "/z").path)
    assert.equal(dir .. "/no/z", io_error("ENOENT", fs.copy, dir .. "/x", dir .. "/no/z").path)
    io_error("EISDIR", fs.copy, dir, dir .. "/z")
    assert.same({ "x", "y" }, names(dir))
  end))

  it("are not half there after a copy was canceled", in_task(function(dir)
    local file <close> = fs.open(dir .. "/x", "w")
    file:truncate(1 << 32)
    local task = fs.copy_async(dir .. "/x", dir .. "/y")
    while not fs.access(dir .. "/y") do flow.yield() end
    if task:cancel() then
      local deadline = os.time() + 30
      while fs.access(dir .. "/y") and os.time() < deadline do flow.yield() end
      assert.is_false((fs.access(dir .. "/y")))
    end
  end))
end)

describe("entries of directories", function()
  it("are told with their types", in_task(function(dir)
    put(dir .. "/file", "")
    fs.mkdir(dir .. "/directory")
    fs.symlink("nowhere", dir .. "/link")
    support.fifo(dir)
    local types = {}
    for name, type in fs.scandir(dir) do types[name] = type end
    assert.same({ file = "file", directory = "directory", link = "link", fifo = "fifo" }, types)
    types = {}
    for name, type in fs.scandir_async(dir):await() do types[name] = type end
    assert.equal("fifo", types.fifo)
    local next = fs.scandir(dir .. "/directory")
    assert.is_nil(next())
    assert.is_nil(next())
    io_error("ENOTDIR", fs.scandir, dir .. "/file")
  end))

  it("are stat'ed", in_task(function(dir)
    put(dir .. "/x", "12345")
    fs.chmod(dir .. "/x", tonumber("604", 8))
    fs.symlink("x", dir .. "/link")
    local s = fs.stat(dir .. "/link")
    assert.equal("file", s.type)
    assert.equal(5, s.size)
    assert.equal("integer", math.type(s.size))
    assert.equal(tonumber("604", 8), s.mode)
    assert.equal(1, s.nlink)
    assert.is_true(math.abs(s.mtime - os.time()) < 100)
    assert.equal("link", fs.lstat(dir .. "/link").type)
    assert.equal(s.ino, fs.lstat(dir .. "/x").ino)
    assert.equal("char", fs.stat("/dev/null").type)
    io_error("ENOENT", fs.stat, dir .. "/none")
    bad_argument("permissions", fs.chmod, dir .. "/x", 4096)
  end))

  it("tell whether they are accessible", in_task(function(dir)
    put(dir .. "/x", "")
    assert.is_true(fs.access(dir .. "/x"))
    assert.is_true(fs.access(dir .. "/x", "rw"))
    assert.same({ false, "EACCES" }, { fs.access(dir .. "/x", "x") })
    assert.same({ false, "ENOENT" }, { fs.access(dir .. "/none") })
    bad_argument("r, w and x", fs.access, dir, "z")
  end))

  it("are links", in_task(function(dir)
    put(dir .. "/x", "")
    fs.symlink("x", dir .. "/link")
    assert.equal("x", fs.readlink(dir .. "/link"))
    assert.equal(fs.realpath(dir .. "/x"), fs.realpath(dir .. "/link"))
    io_error("EINVAL", fs.readlink, dir .. "/x")
    assert.equal(dir .. "/link", io_error("EEXIST", fs.symlink, "x", dir .. "/link").path)
    io_error("ENOENT", fs.realpath, dir .. "/none")
  end))

  it("are made, one or all of a path", in_task(function(dir)
    fs.mkdir(dir .. "/a")
    io_error("EEXIST", fs.mkdir, dir .. "/a")
    io_error("ENOENT", fs.mkdir, dir .. "/b/c")
    fs.mkdir(dir .. "//b/c/./d//", { recursive = true })
    fs.mkdir(dir .. "/b/c/d", { recursive = true })
    assert.equal("directory", fs.stat(dir .. "/b/c/d").type)
    put(dir .. "/file", "")
    io_error("EEXIST", fs.mkdir, dir .. "/file", { recursive = true })
    io_error("ENOTDIR", fs.mkdir, dir .. "/file/x", { recursive = true })
    fs.mkdir(dir .. "/private", { mode = tonumber("700", 8) })
    assert.equal(tonumber("700", 8), fs.stat(dir .. "/private").mode)
    io_error("ENOENT", fs.mkdir, "", { recursive = true })
    bad_argument("unknown option", fs.mkdir, dir, { parents = true })
  end))

  it("are new, by a name that nobody has", in_task(function(dir)
    local a, b = fs.mkdtemp(dir .. "/x-"), fs.mkdtemp(dir .. "/x-")
    assert.not_equal(a, b)
    assert.equal(1, (a:find(dir .. "/x-", 1, true)))
    assert.equal("directory", fs.stat(b).type)
    io_error("ENOENT", fs.mkdtemp, dir .. "/none/x")
  end))

  it("leave no temporary directory behind that nobody was told of", in_task(function(dir)
    support.canceled_while_landing(function(token)
      return fs.mkdtemp_async(dir .. "/" .. ("x"):rep(60), token)
    end, function(ok, path)
      if ok then fs.remove(path) end
    end)
    flow.with_timeout(50, function() -- those that a thread was about to make go when it has
      while #names(dir) > 0 do flow.yield() end
    end)
  end))

  it("may be canceled by a finalizer while the failure is told, whose path then was freed", in_task(function()
    local parent = "/proc/" .. ("x"):rep(60) -- which nobody makes
    support.canceled_while_landing(function(token)
      return fs.mkdir_async(parent .. "/x", { recursive = true }, token)
    end, function(ok, err)
      assert.is_false(ok)
      if err.name ~= "OperationCanceled" then assert.equal(parent, err.path) end
    end)
  end))

  it("are renamed and truncated", in_task(function(dir)
    put(dir .. "/x", "12345")
    fs.truncate(dir .. "/x", 2)
    fs.rename(dir .. "/x", dir .. "/y")
    assert.equal("12", content(dir .. "/y"))
    io_error("ENOENT", fs.rename, dir .. "/x", dir .. "/z")
    io_error("ENOENT", fs.truncate, dir .. "/x", 1)
    assert.same({ "y" }, names(dir))
  end))

  it("are removed, one or all below", in_task(function(dir)
    fs.mkdir(dir .. "/t/a/b/c", { recursive = true })
    fs.mkdir(dir .. "/empty")
    put(dir .. "/t/a/x", "")
    put(dir .. "/kept", "")
    fs.symlink("../../kept", dir .. "/t/a/link")
    fs.symlink("../..", dir .. "/t/a/up")
    fs.remove(dir .. "/empty")
    io_error("ENOTEMPTY", fs.remove, dir .. "/t")
    io_error("ENOENT", fs.remove, dir .. "/none")
    io_error("ENOENT", fs.remove, dir .. "/none", { recursive = true })
    fs.remove(dir .. "/t/a/x")
    fs.remove(dir .. "/t", { recursive = true })
    assert.same({ "kept" }, names(dir))
    fs.remove(dir .. "/kept", { recursive = true })
    assert.same({}, names(dir))
  end))

  it("say which of them could not be removed", in_task(function()
    local err = helper.raised(fs.remove, "/proc/self/task", { recursive = true })
    assert.is_true(flow.errors.is(err, "IO"))
    assert.equal(1, (err.path:find("/proc/self/task/", 1, true)))
  end))
end)

describe("watch", function()
  local function same(expected, change)
    assert.same(expected, change)
  end

  it("tells changes in the order they came", in_task(function(dir)
    local watcher <close> = fs.watch(dir)
    fs.mkdir(dir .. "/a")
    fs.mkdir(dir .. "/b")
    same({ kind = "rename", name = "a" }, watcher:next())
    same({ kind = "rename", name = "b" }, watcher:next())
    local task = watcher:next_async()
    flow.yield()
    assert.is_false(task.is_completed)
    fs.rename(dir .. "/a", dir .. "/c")
    same({ kind = "rename", name = "a" }, task:await())
    same({ kind = "rename", name = "c" }, watcher:next())
  end))

  it("is a stream of the changes", in_task(function(dir)
    local watcher <close> = fs.watch(dir)
    for _, name in ipairs { "a", "b", "c" } do fs.mkdir(dir .. "/" .. name) end
    local kept = watcher:map(function(change) return change.name end):filter(function(name) return name ~= "a" end)
    assert.same({ "b" }, kept:take(1):to_table())
    assert.same({ { kind = "rename", name = "c" } }, watcher:take(1):to_table_async():await())
    helper.raises("OperationCanceled", watcher.to_table, watcher, flow.CancellationToken.canceled)
    for name, wrong in pairs { map = 5, take = -1, reduce = 1, to_table_async = {}, merge = 5 } do
      local _, err = pcall(load("local watcher, wrong = ... watcher:" .. name .. "(wrong)", "=user"), watcher, wrong)
      assert.truthy(err:find("user:1: bad argument #1 to '" .. name .. "' (", 1, true), err)
    end
  end))

  it("tells of contents, and of one file alone", in_task(function(dir)
    put(dir .. "/x", "")
    local watcher <close> = fs.watch(dir .. "/x")
    put(dir .. "/y", "")
    put(dir .. "/x", "1")
    local change = watcher:next()
    assert.equal("change", change.kind)
    assert.equal("x", change.name)
  end))

  it("is iterated over until somebody closes it", in_task(function(dir)
    local watcher = fs.watch(dir)
    local seen = {}
    local task = flow.spawn(function()
      for change in watcher:iterate() do seen[#seen + 1] = change.name end
    end)
    fs.mkdir(dir .. "/a")
    while #seen == 0 do flow.yield() end
    watcher:close()
    task:await()
    assert.same({ "a" }, seen)
    assert.is_nil(watcher:next())
    watcher:close()
    watcher:dispose()
    assert.truthy(tostring(watcher):find("closed", 1, true))
  end))

  it("gives each change to one waiter, and loses none that was promised to a canceled one", in_task(function(dir)
    local watcher <close> = fs.watch(dir)
    local a, b, c = watcher:next_async(), watcher:next_async(), watcher:next_async()
    flow.yield()
    assert.is_true(b:cancel())
    fs.mkdir(dir .. "/1")
    fs.mkdir(dir .. "/2")
    assert.equal("1", a:await().name)
    assert.equal("2", c:await().name)
    for i = 3, 40 do -- somebody who may be canceled at any moment
      local source = Source()
      local task = watcher:next_async(source.token)
      local made = fs.mkdir_async(dir .. "/" .. i)
      for _ = 1, i % 7 do flow.yield() end
      source:cancel()
      made:await()
      local name = task.is_completed_successfully and task.result.name or watcher:next().name
      assert.equal(tostring(i), name)
    end
  end))

  it("loses no change that was promised to somebody who is canceled before it gets it", in_task(function(dir)
    local watcher <close> = fs.watch(dir)
    local expected, got, canceled = {}, {}, 0
    local outside = dir .. ".x"
    local spinning <close> = support.spinning()
    put(outside, "")
    for n = 1, helper.many(300, 20) do
      local task = flow.spawn(watcher.next, watcher)
      flow.yield()
      expected[n] = tostring(n)
      assert(os.rename(outside, dir .. "/" .. n)) -- one change
      put(outside, "")
      spinning.wait(n)
      task:cancel()
      local ok, change = task:try_await()
      if not ok then
        canceled = canceled + 1
        change = flow.with_timeout(10, watcher.next, watcher)
      end
      got[n] = change.name
    end
    os.remove(outside)
    assert.same(expected, got)
    assert.is_true(canceled > 0 or os.getenv("COFLOW_GC_STRESS") ~= nil) -- where there are few rounds
  end))

  -- A watcher of `dir` that has seen these files come.
  local function watched(dir, files)
    local watcher = fs.watch(dir)
    for _, name in ipairs(files) do put(dir .. "/" .. name, "") end
    fs.stat(dir) -- libuv sees them first
    return watcher
  end

  -- Names in order, each so long that telling it makes a string.
  local function long_names(k)
    local list = {}
    for i = 1, 3 do list[i] = i .. ("x"):rep(60) .. k end
    return list
  end

  it("loses no change, and tells none twice, when a finalizer cancels who is told it", in_task(function(dir)
    local canceled = 0
    for k = 1, 8 do
      local expected, got, source = long_names(k), {}, nil
      local watcher = watched(dir, expected)
      local waiting
      do
        local _ <close> = support.at_collection(k, function() if source then source:cancel() end end)
        for _ = 1, 4 do
          source = Source()
          local task = watcher:next_async(source.token)
          if task.is_completed_successfully then
            got[#got + 1] = task.result.name
          elseif task.is_canceled then
            canceled = canceled + 1
          else
            waiting = task
          end
        end
      end
      watcher:close()
      if waiting ~= nil then assert.is_nil(waiting:await()) end
      assert.same(expected, got)
    end
    assert.is_true(canceled > 0 or os.getenv("COFLOW_GC_STRESS") ~= nil)
  end))

  it("tells each change once, also to a finalizer that asks while one is told", in_task(function(dir)
    for k = 1, 8 do
      local expected, got, tasks = long_names(k), {}, {}
      local watcher = watched(dir, expected)
      local next = watcher.next_async
      local function ask()
        local task = next(watcher)
        tasks[#tasks + 1] = task
      end
      do
        local _ <close> = support.at_collection(k, ask)
        for _ = 1, 3 do ask() end
      end
      watcher:close()
      for _, task in ipairs(tasks) do
        local change = task:await()
        if change ~= nil then got[#got + 1] = change.name end
      end
      table.sort(got)
      assert.same(expected, got)
    end
  end))

  it("raises where there is nothing", in_task(function(dir)
    local err = io_error("ENOENT", fs.watch, dir .. "/none")
    assert.equal(dir .. "/none", err.path)
    assert.equal("watch", err.syscall)
    bad_argument("zero bytes", fs.watch, "x\0")
  end))

  it("keeps nobody waiting for ever by being there", in_task(function(dir)
    local watcher <close> = fs.watch(dir)
    local script = ([[
      local flow = require "coflow"
      local watcher = flow.fs.watch(%q)
      io.write(tostring(flow.loop.is_alive()))
      local ok, err = pcall(flow.run, function() flow.TaskCompletionSource().task:await() end)
      io.write(" ", err.name)
    ]]):format(dir)
    assert.equal("false InvalidOperation", helper.output(script))
    assert.is_not_nil(watcher)
  end))

  it("is closed by the collector", in_task(function(dir)
    for _ = 1, 20 do fs.watch(dir) end
  end))

  it("says when more came than it keeps", in_task(function(dir)
    local watcher <close> = fs.watch(dir)
    assert(os.execute(("cd '%s' && seq 4200 | xargs touch"):format(dir)))
    local kinds = {}
    repeat
      local change = watcher:next()
      kinds[change.kind] = true
    until change.kind == "overflow"
    assert.is_true(kinds.rename)
  end))
end)

describe("a FIFO, where nobody may ever come,", function()
  local function fifo(dir)
    os.execute("mkfifo '" .. dir .. "/fifo'")
    return dir .. "/fifo"
  end

  it("is copied, and its copying ends when it is canceled", in_task(function(dir)
    local path = fifo(dir)
    local from, to = fs.copy_async(path, dir .. "/x"), fs.write_file_async(path, "through")
    flow.await_all(from, to)
    assert.equal("through", content(dir .. "/x"))
    put(dir .. "/y", ("y"):rep(1000))
    fs.rename(path, dir .. "/unread")
    local unread = dir .. "/unread"
    path = fifo(dir)
    for _ = 1, 6 do -- more than there are threads
      raises("Timeout", flow.with_timeout, 0.01, fs.copy, path, dir .. "/z")
      raises("Timeout", flow.with_timeout, 0.01, fs.copy, dir .. "/y", unread)
    end
    assert.equal("file", fs.stat(dir .. "/y").type)
    assert.equal("fifo", fs.stat(path).type)
  end))

  it("is closed while another task waits for it, which is told", in_task(function(dir)
    local path = fifo(dir)
    local file = fs.open(path, "r+")
    local reading, next = file:read_async(), file:read_line_async()
    flow.sleep(0.001)
    file:close()
    io_error("ECANCELED", flow.await, reading)
    io_error("ECANCELED", flow.await, next)
    local full = fs.open(path, "r+")
    local writing = full:write_async(("x"):rep(1000000))
    flow.sleep(0.001)
    full:close()
    io_error("ECANCELED", flow.await, writing)
  end))

  it("is closed by the first close, which a second one does not stop", in_task(function(dir)
    local before = support.descriptors()
    local file = fs.open(fifo(dir), "r+")
    local reading = file:read_async()
    local first, second = file:close_async(), file:close_async()
    first:await()
    second:await()
    io_error("ECANCELED", flow.await, reading)
    assert.equal(before, support.descriptors())
    assert.is_true(file.is_closed)
  end))

  it("does not keep a process that exits", in_task(function(dir)
    local path = fifo(dir)
    for _, wait in ipairs {
      "fs.open(path, 'r+'):read_async()", "fs.open_async(path, 'w')", "fs.read_file_async(path)",
    } do
      assert.equal("gone", helper.output(([[
        local fs, path = require("coflow").fs, %q
        require("coflow").run(function()
          kept = %s
          require("coflow").sleep(0.01)
          io.write("gone")
          io.stdout:flush()
          os.exit(0, false)
        end)
      ]]):format(path, wait)))
    end
  end))

  it("that nobody reads any more refuses what is written, in a program without sockets as well", in_task(function(dir)
    local path = fifo(dir)
    put(dir .. "/script.lua", ([[
      package.path, package.cpath = %q, %q
      local fs, path = require("coflow").fs, %q
      require("coflow").run(function()
        local reader = fs.open(path)
        local writer <close> = fs.open(path, "w")
        reader:close()
        local ok, err = pcall(writer.write, writer, "hello")
        print(ok, err.name, err.code)
      end)
    ]]):format(package.path, package.cpath, path))
    -- unlike os.execute, this gives it the default of every signal
    local out, _, err, signal = flow.process.run({ "sh", "-c", '$LUA "$0"', dir .. "/script.lua" }, nil, {
      env = { LUA = os.getenv("LUA") or "lua5.4" },
    })
    assert.same({ "false\tIO\tEPIPE\n", "" }, { out, err })
    assert.is_nil(signal)
  end))

  it("stays one when it is written atomically", in_task(function(dir)
    local path = fifo(dir)
    local reading = fs.read_file_async(path)
    fs.write_file(path, "x", { atomic = true })
    assert.equal("x", flow.await(reading))
    assert.equal("fifo", fs.stat(path).type)
  end))
end)

describe("write_file, atomic,", function()
  it("makes what a link to nothing refers to, and leaves the link", in_task(function(dir)
    fs.symlink(dir .. "/target", dir .. "/link")
    fs.write_file(dir .. "/link", "x", { atomic = true })
    assert.equal("link", fs.lstat(dir .. "/link").type)
    assert.equal("x", content(dir .. "/target"))
  end))
end)

describe("read_dir", function()
  it("is scandir by its other name", in_task(function(dir)
    put(dir .. "/a", "")
    local found = {}
    for name, type in fs.read_dir(dir) do found[#found + 1] = name .. " " .. type end
    assert.same({ "a file" }, found)
    assert.equal("a", flow.await(fs.read_dir_async(dir))())
  end))
end)

describe("chmod", function()
  it("takes numbers, not their text, which would be decimal", in_task(function(dir)
    put(dir .. "/x", "")
    bad_argument("number", fs.chmod, dir .. "/x", "755")
  end))
end)
