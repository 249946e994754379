-- Real signals, which this process sends to itself, on the real clock: the deadlines only end a broken run.

local flow = require "coflow"
local helper = require "spec.helper"

local recorder, raises, raised = helper.recorder, helper.raises, helper.raised

local function send(name)
  os.execute("kill -" .. name .. " $PPID")
end

-- Runs it as a root task; nothing may be left that keeps the loop alive.
local function live(fn)
  return function()
    flow.run(flow.with_timeout, 30, fn)
    assert.is_false(flow.loop.is_alive())
  end
end

-- Passes loop turns until what was sent has been told to those who wait.
local function settle(condition)
  while not condition() do flow.sleep(0.001) end
end

describe("signal.wait", function()
  it("waits for a signal, and returns its name", live(function()
    local task = flow.signal.wait_async("SIGUSR1")
    flow.sleep(0.001)
    assert.is_false(task.is_completed)
    send("USR1")
    assert.equal("SIGUSR1", flow.await(task))
    local second = flow.spawn(function() return flow.signal.wait("SIGUSR1") end)
    flow.yield()
    send("USR1")
    assert.equal("SIGUSR1", flow.await(second))
  end))

  it("tells everybody who waits, each for its own", live(function()
    local one = flow.signal.wait_async("SIGUSR1")
    local two = flow.signal.wait_async { "SIGUSR2", "SIGUSR1" }
    local three = flow.signal.wait_async("SIGUSR2")
    send("USR1")
    assert.same({ "SIGUSR1", "SIGUSR1" }, { flow.await_all(one, two) })
    assert.is_false(three.is_completed)
    send("USR2")
    assert.equal("SIGUSR2", flow.await(three))
  end))

  it("ends with the ambient token, and with its own", live(function()
    raises("Timeout", flow.with_timeout, 0.01, flow.signal.wait, "SIGUSR1")
    local source = flow.CancellationTokenSource(0.01)
    local err = raises("OperationCanceled", flow.signal.wait, "SIGUSR1", source.token)
    assert.equal(source.token, err.token)
    raises("OperationCanceled", flow.signal.wait, "SIGUSR1", source.token)
    local task = flow.signal.wait_async("SIGUSR1")
    flow.yield()
    assert.is_true(task:cancel())
    raises("OperationCanceled", flow.await, task)
  end))

  it("keeps alive who waits, and the loop, while it waits", live(function()
    local log, note = recorder()
    do
      local function wait() note(flow.signal.wait("SIGUSR1")) end
      flow.spawn(wait)
    end
    helper.collect()
    assert.is_true(flow.loop.is_alive())
    send("USR1")
    settle(function() return #log > 0 end)
    assert.same({ "SIGUSR1" }, log)
  end))

  it("works outside every task", function()
    local task = flow.signal.wait_async("SIGUSR1")
    send("USR1")
    assert.equal("SIGUSR1", flow.await(task))
    assert.is_false(flow.loop.is_alive())
    raises("OperationCanceled", flow.signal.wait, "SIGUSR1", flow.CancellationTokenSource(0.01).token)
  end)

  it("gives the signal back to the system afterwards", function()
    local result = helper.child [[
      local flow = require "coflow"
      local task = flow.signal.wait_async("SIGTERM")
      os.execute("kill -TERM $PPID")
      print(flow.await(task))
      io.stdout:flush()
      os.execute("kill -TERM $PPID; sleep 20")
      print("not reached")
    ]]
    assert.equal("SIGTERM\n", result.out)
    assert.equal(128 + 15, result.code)
  end)

  it("takes its signal before flow.main, which is not canceled then", function()
    local result = helper.child [[
      local flow = require "coflow"
      local function main()
        local name = flow.signal.wait { "SIGTERM", "SIGHUP" }
        flow.sleep(0.001)
        print(name)
      end
      local function send()
        flow.sleep(0.001)
        os.execute("kill -TERM $PPID")
      end
      flow.spawn(send)
      os.exit(flow.main(main), true)
    ]]
    assert.equal("SIGTERM\n", result.out)
    assert.equal("0", result.code .. result.err)
  end)

  it("leaves flow.main its signals", function()
    local result = helper.child [[
      local flow = require "coflow"
      local function main()
        local ok, err = pcall(flow.signal.wait, "SIGHUP")
        print(ok, err.reason)
        return 7
      end
      local function send()
        flow.sleep(0.001)
        os.execute("kill -TERM $PPID")
      end
      flow.spawn(send)
      os.exit(flow.main(main), true)
    ]]
    assert.equal("false\tinterrupted by SIGTERM\n", result.out)
    assert.equal("", result.err)
    assert.equal(7, result.code)
  end)

  it("holds nothing when the state closes", function()
    assert.equal("done\n", helper.output [[
      local flow = require "coflow"
      local function wait() flow.signal.wait("SIGHUP") end
      flow.run(function()
        local _ = flow.spawn(wait), flow.signal.wait_async { "SIGUSR1", "SIGHUP" }
        flow.sleep(0.001)
      end)
      local catcher = require "coflow.core".catch(false, 1)
      catcher:wait()
      print("done")
    ]])
  end)

  it("lets go of the signal when a coroutine dies in it", function()
    local kept = {}
    for i, library in ipairs { coroutine, flow.coroutine } do
      flow.run(function()
        local source = flow.CancellationTokenSource()
        flow.spawn(source.cancel, source)
        kept[i] = library.create(function() flow.signal.wait("SIGUSR1", source.token) end)
        assert.is_false((library.resume(kept[i])))
        flow.yield()
      end)
      assert.is_false(flow.loop.is_alive(), i)
    end
  end)

  it("closes what was forgotten", live(function()
    local core = require "coflow.core"
    do
      local catcher = core.catch(false, core.signals().SIGUSR1)
      assert.is_true(flow.loop.is_alive())
      assert.is_nil(catcher:take())
    end
    helper.collect()
  end))

  it("refuses wrong arguments, at their caller", live(function()
    local function refuses(message, ...)
      local arguments = table.pack(...)
      local err = raised(function()
        flow.signal.wait(table.unpack(arguments, 1, arguments.n))
      end)
      assert.equal("string", type(err))
      assert.truthy(err:find(helper.here(-3), 1, true), err)
      assert.truthy(err:find(message, 1, true), err)
    end
    refuses("bad argument #1 to 'wait' (name of a signal")
    refuses("SIGKILL is no signal that can be caught", "SIGKILL")
    refuses("HUP is no signal that can be caught: its name is SIGHUP", "HUP")
    refuses("hup is no signal that can be caught: its name is SIGHUP", { "SIGTERM", "hup" })
    refuses("KILL is no signal that can be caught)", "KILL")
    refuses("boolean is no signal", { true })
    refuses("the list of signals is empty", {})
    refuses("bad argument #2", "SIGHUP", 1)
  end))
end)

describe("signal.stream", function()
  if not package.searchpath("coflow.stream", package.path) then return end

  it("is a stream of what comes, also between two items, from its iteration on", live(function()
    local log, note = recorder()
    local stream = flow.signal.stream { "SIGUSR1", "SIGUSR2" }
    flow.spawn(function()
      flow.sleep(0.001)
      send("USR2")
    end)
    for name in stream:iterate() do
      note(name)
      if #log == 1 then
        send("USR1")
        flow.sleep(0.01)
      else
        break
      end
    end
    assert.same({ "SIGUSR2", "SIGUSR1" }, log)
  end))

  it("ends with the ambient token, and refuses what is no signal", live(function()
    raises("Timeout", flow.with_timeout, 0.01, function()
      for _ in flow.signal.stream("SIGUSR1"):iterate() do error("nobody has sent it") end
    end)
    local err = raised(function() flow.signal.stream("SIGKILL") end)
    assert.truthy(err:find("bad argument #1 to 'stream'", 1, true))
    flow.yield() -- callbacks of a deadline have a turn of their own
  end))
end)

describe("a catcher of signals", function()
  it("for the first one only shares the signal with others", live(function()
    local core = require "coflow.core"
    local USR1 = core.signals().SIGUSR1
    local all <close> = core.catch(false, USR1)
    local first <close> = core.catch(true, USR1)
    do
      local again <close> = core.catch(true, USR1)
      send("USR1")
      flow.await(again:wait())
      assert.equal(USR1, again:take())
      settle(function() return first:take() == USR1 and all:take() == USR1 end)
    end
    send("USR1")
    flow.await(all:wait())
    assert.equal(USR1, all:take())
    assert.is_nil(first:take())
    local later <close> = core.catch(true, USR1) -- the handle is started anew
    send("USR1")
    flow.await(later:wait())
    assert.equal(USR1, later:take())
  end))

  local core = require "coflow.core"
  local USR1, USR2 = core.signals().SIGUSR1, core.signals().SIGUSR2

  it("notes what comes between two waits: each once, in order of arrival", live(function()
    local catcher <close> = core.catch(false, USR1, USR2)
    send("USR2")
    flow.await(catcher:wait())
    send("USR1")
    send("USR2")
    local other <close> = core.catch(false, USR1)
    send("USR1")
    flow.await(other:wait())
    assert.equal(USR2, catcher:take())
    assert.equal(USR1, catcher:take())
    assert.is_nil(catcher:take())
    assert.equal(USR1, other:take())
    assert.is_nil(other:take())
  end))

  it("does not lose what comes when its waiter is canceled", live(function()
    local catcher <close> = core.catch(false, USR1)
    local task = flow.spawn(function() flow.await(catcher:wait()) end)
    flow.yield()
    send("USR1")
    task:cancel()
    task:try_await()
    flow.await(catcher:wait())
    assert.equal(USR1, catcher:take())
  end))

  it("wakes its waiter when it is closed", live(function()
    local waiter
    do
      local catcher <close> = core.catch(false, USR1)
      waiter = catcher:wait()
      assert.equal(waiter, catcher:wait())
      assert.is_false(waiter.is_completed)
    end
    assert.is_true(waiter.is_completed)
  end))
end)
