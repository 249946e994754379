--[[
The examples that work on files, pipeline.lua and crawler.lua, run on trees made for the purpose. (That they print what
they say they print is checked by readme_spec.lua, the main example by service_spec.lua.)
]]

local program = require "spec.support.program"

local root = debug.getinfo(1, "S").source:match("^@(.*)spec/[^/]*$") or ""
local quote = program.quote

-- A directory with these files, { path = content }, which is removed in the end.
local function tree(files)
  local directory = os.tmpname()
  os.remove(directory)
  finally(function() os.execute("rm -rf " .. quote(directory)) end)
  for path, content in pairs(files) do
    path = directory .. "/" .. path
    assert(os.execute("mkdir -p " .. quote(path:match("^.*/"))))
    local file <close> = assert(io.open(path, "wb"))
    file:write(content)
  end
  return directory
end

-- Runs the example in `name`; returns its output, in which `directory` is DIR, and its exit code.
local function run(name, arguments, directory)
  local output, code = program.run(root .. "examples/" .. name, arguments)
  if directory then output = output:gsub(directory:gsub("%p", "%%%0"), "DIR") end
  return output, code
end

describe("examples/pipeline.lua", function()
  local function pipeline(directory, arguments)
    return run("pipeline.lua", (arguments or "") .. " " .. quote(directory), directory)
  end

  it("adds up what is in the files of a tree, and finds the longest function", function()
    local output, code = pipeline(tree {
      ["a.c"] = "int f(int x) {\n  if (x) {\n  }\n  return x;\n}\n",
      ["sub/b.lua"] = "local function one() return 1 end\n\nlocal function Two(x)\n  return x\nend\nreturn Two",
      ["sub/deep/er/c.h"] = "",
      ["sub/notes.txt"] = "not counted\n",
      [".hidden/d.lua"] = "not counted\n",
    })
    assert.equal("3 files, 11 lines, 25 words\nlongest function: f in DIR/a.c, 5 lines\n",
      (output:gsub("at most %d texts in memory\n", "")))
    assert.equal(0, code)
  end)

  it("counts each file once, with a few in memory, however many there are", function()
    local files = {}
    for i = 1, 300 do files[("%d/%d.lua"):format(i % 7, i)] = ("x = %d\n"):format(i):rep(i % 10) end
    local output, code = pipeline(tree(files))
    assert.truthy(output:find("^300 files, 1350 lines, 4050 words\n"), output)
    local texts = tonumber(output:match("\nat most (%d+) texts in memory\n$"))
    assert.is_true(texts >= 1 and texts <= 4 + 4 + 1, output) -- being read, in the channel, being counted
    assert.equal(0, code)
  end)

  it("reports what cannot be read, and goes on", function()
    local directory = tree { ["a.lua"] = "a\n", ["b.lua/c.lua"] = "b\n" }
    assert(os.execute(("ln -s nowhere %s/gone.c"):format(quote(directory))))
    local output, code = pipeline(directory)
    assert.truthy(output:find("^not read: open 'DIR/gone.c': no such file .*\n2 files, 2 lines, 2 words\n"), output)
    assert.equal(1, code)
    output, code = pipeline(directory .. "/none")
    assert.truthy(output:find("^not read: scandir 'DIR': no such file .*\n0 files, 0 lines, 0 words\n"), output)
    assert.equal(1, code)
  end)

  it("draws a progress bar only where it is asked for, or on a terminal", function()
    local directory = tree { ["a.lua"] = "a\n", ["b.lua"] = "b\n" }
    assert.falsy(pipeline(directory):find("[\r#]"))
    local output, code = pipeline(directory, "--progress")
    assert.truthy(output:find("\r[" .. ("#"):rep(40) .. "] 2 of 2 \n2 files, 2 lines, 2 words\n", 1, true), output)
    assert.equal(0, code)
  end)

  it("tells what it has counted when it is interrupted", function()
    local directory = tree { ["a.lua"] = "one two\n" }
    assert(os.execute("mkfifo " .. quote(directory .. "/stuck.lua"))) -- reading it takes for ever
    local running = program.start(root .. "examples/pipeline.lua", "--progress " .. quote(directory))
    finally(running.finish)
    local output = ""
    repeat output = output .. assert(running.read(1), output) until output:find("] 1 of 2 ", 1, true)
    running.kill("INT")
    local rest, code = running.finish()
    assert.truthy(rest:find("\n1 files, 1 lines, 2 words, and then it was interrupted\n", 1, true), rest)
    assert.equal(130, code)
  end)

  it("explains an option that it does not know", function()
    local output, code = run("pipeline.lua", "--progres")
    assert.truthy(output:find("^pipeline: unknown option %-%-progres\nusage: "), output)
    assert.equal(2, code)
  end)
end)

describe("examples/crawler.lua", function()
  local function crawler(arguments, directory) return run("crawler.lua", arguments, directory) end

  -- What it prints of links, and what of attempts.
  local function parts(output) return output:match("^(.*)(tried again: .*)$") end

  local site = {
    ["index.html"] = '<a href="a/">A</a> <a href=\'b.md?x=1#y\'>B</a> <a href="#here">here</a> <img src="b%20c.png">',
    ["a/index.html"] = '<a href="../index.html">up</a> <a href="/a/../../b.md">B</a> <a href="c.html">C</a>',
    ["b.md"] = '[A](a/index.html "title") `[no](no.html)`\n```\n[no](no.html)\n```\n[out](https://example.org/x.html)',
    ["b c.png"] = "[no](no.html)",
    ["island.html"] = '<a href="sea.html">nobody comes here</a>',
  }

  it("follows links from page to page, each page once, and finds none dead where none is", function()
    local whole = { ["a/c.html"] = "<a href=./c.html>none</a>" }
    for path, text in pairs(site) do whole[path] = text end
    local directory = tree(whole)
    local output, code = crawler(quote(directory .. "/index.html"), directory)
    assert.equal("links: 8 to 5 places, 0 of them dead\n", (parts(output)))
    assert.equal(0, code)
    assert.equal(output, crawler(quote(directory .. "/"), directory))
  end)

  it("tells of each dead link where it is, and the exit code is 1", function()
    local directory = tree(site)
    local output, code = crawler(quote(directory .. "/index.html"), directory)
    assert.equal("dead: a/c.html, from a/index.html: open 'DIR/a/c.html': no such file or directory (ENOENT)\n"
      .. "links: 8 to 5 places, 1 of them dead\n", (parts(output)))
    assert.equal(1, code)
  end)

  it("tries again what failed, and finds the same over a bad line as over a good one", function()
    local directory = tree(site)
    local good, quiet = parts(crawler(quote(directory .. "/index.html"), directory))
    assert.truthy(quiet:find("^tried again: 0 times"), quiet)
    local retries = {}
    for seed = 1, 3 do
      local arguments = ("--flaky 0.3 --seed %d %s"):format(seed, quote(directory .. "/index.html"))
      local bad, noisy = parts(crawler(arguments))
      assert.equal(good, (bad:gsub(directory:gsub("%p", "%%%0"), "DIR")))
      retries[seed] = noisy:match("^tried again: (%d+) times")
      assert.equal(retries[seed], crawler(arguments):match("tried again: (%d+) times"), "a seed is a run")
    end
    assert.is_true(retries[1] + retries[2] + retries[3] > 0)
  end)

  it("gives up in the end", function()
    local output, code = crawler("--flaky 1 " .. quote(root .. "examples/data/site/index.html"))
    assert.equal("dead: index.html, from the start: read 'index.html': the line is bad (EIO)\n"
      .. "links: 1 to 1 places, 1 of them dead\ntried again: 4 times; at the same time: at most 1\n", output)
    assert.equal(1, code)
  end)

  it("reads so many at the same time as it is told", function()
    local links = {}
    for i = 1, 12 do links[i] = ('<a href="index.html?%d">x</a> <a href="%d.html">x</a>'):format(i, i) end
    local files = { ["index.html"] = table.concat(links) }
    for i = 1, 12 do files[i .. ".html"] = "" end
    local start = quote(tree(files) .. "/index.html")
    for _, n in ipairs { 1, 5, 100 } do
      local output, code = crawler(("--at-once %d %s"):format(n, start))
      local expected = "links: 25 to 13 places, 0 of them dead\ntried again: 0 times; at the same time: at most %d\n"
      assert.equal(expected:format(math.min(n, 12)), output)
      assert.equal(0, code)
    end
  end)

  it("explains wrong arguments", function()
    for _, arguments in ipairs { "--seed x", "--seed", "--flaky 2 a.md", "--flaky -1 a.md", "--at-once 0 a.md",
      "--at-once 1.5 a.md", "--at-last 2", "-x", "a.md b.md" } do
      local output, code = crawler(arguments)
      assert.truthy(output:find("^usage: lua5.4 examples/crawler.lua"), arguments .. ": " .. output)
      assert.equal(2, code)
    end
  end)
end)
