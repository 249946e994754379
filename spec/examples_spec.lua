--[[
The example that works on files, pipeline.lua, run on trees made for the purpose. (That it prints what it says it
prints is checked by readme_spec.lua, the main example by service_spec.lua.)
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
