-- Every request for memory fails in turn. Whatever was going on may fail with it, but nothing crashes or leaks (make
-- check), and the state works as before. What a failing request has ended may have been what others wait for: so
-- a scenario may also end in a deadlock, with its report.

local flow = require "coflow"
local helper = require "spec.helper"

local function identity(...) return ... end

local LONG = 0.02 -- seconds that are waited for only if what ends the wait has failed

local function raised(fn, ...)
  local ok, err = pcall(fn, ...)
  assert(not ok)
  return err
end

-- Each leaves nothing behind, and takes no time to speak of.
local scenarios = {}

function scenarios.tasks()
  for i = 1, 3 do assert(flow.await(flow.spawn(identity, i)) == i) end
  local many = flow.spawn(function()
    flow.yield()
    return 1, nil, 3
  end)
  assert(select("#", flow.await(many)) == 3)
  local hot = flow.async(function(x)
    flow.yield()
    return x
  end)
  assert(flow.await(hot(1)) == 1)
  local cold = flow.Task.new(identity, 5)
  cold:start()
  assert(flow.await(cold) == 5)
end

function scenarios.failures()
  local failed = flow.spawn(function() error("x") end)
  assert(not flow.try_await(failed) and failed:traceback())
  local source = flow.TaskCompletionSource()
  source:set_exception("e")
  assert(not flow.try_await(source.task))
  flow.await(source.task:continue_with(function() return 1 end))
end

function scenarios.combinators()
  local a, b = flow.spawn(identity, 1), flow.spawn(identity, 2)
  assert(flow.await(flow.when_all { x = a, y = b }).x == 1)
  local c, d = flow.spawn(identity, 1), flow.spawn(identity, 2)
  assert(flow.await(flow.when_any(c, d)) == c)
  flow.await_all(c, d)
  local e, f = flow.spawn(flow.yield), flow.spawn(flow.yield)
  flow.await_any(e, f)
  flow.await_all { e, f }
  local n = 0
  for _ in flow.when_each { e, f, flow.spawn(identity) } do n = n + 1 end
  assert(n == 3)
end

function scenarios.locals()
  local list = {}
  for i = 1, 20 do
    list[i] = flow.AsyncLocal()
    list[i].value = i
  end
  local loc = list[1]
  flow.await(flow.spawn(function() loc.value = 2 end))
  assert(loc.value == 1)
  do
    local _ <close> = loc:with(3)
  end
  loc:run(4, flow.yield)
  flow.ExecutionContext.capture():run(function()
    loc.value = 9
    flow.yield()
  end)
  assert(loc.value == 1 and list[20].value == 20)
  flow.ExecutionContext.wrap(identity)(1)
  local _ <close> = flow.ExecutionContext.suppress_flow()
  flow.await(flow.spawn(identity))
end

function scenarios.handlers_of_locals()
  local n = 0
  local loc = flow.AsyncLocal { value_changed = function() n = n + 1 end }
  loc.value = 1
  flow.await(flow.spawn(function()
    loc.value = 2
    flow.yield()
  end))
  loc.value = nil
end

function scenarios.tokens()
  local source, n = flow.CancellationTokenSource(), 0
  local first = source.token:register(function() n = n + 1 end)
  source.token:register(function() n = n + 1 end)
  first:unregister()
  local linked <close> = flow.CancellationTokenSource.linked(source.token)
  linked.token:register(identity)
  local asleep = flow.spawn(flow.sleep, LONG, linked.token)
  flow.yield()
  source:cancel("reason")
  assert(n == 1 and not flow.try_await(asleep))
  local soon <close> = flow.CancellationTokenSource(0.0001)
  assert(not flow.try_await(flow.delay(LONG, soon.token)))
end

function scenarios.scopes()
  flow.with_timeout(5, flow.yield)
  raised(flow.with_timeout, 0.0001, flow.sleep, LONG)
  flow.shield(flow.yield)
  flow.shield({ grace = 1 }, flow.yield)
  flow.with_cancellation(flow.CancellationTokenSource().token, flow.yield)
  local task = flow.spawn(flow.with_timeout, 3, flow.sleep, LONG)
  flow.yield()
  task:cancel("reason")
  assert(not flow.try_await(task))
end

function scenarios.groups()
  local result = flow.task_group(function(group)
    for _ = 1, 4 do group:spawn(flow.yield) end
    return 5
  end, { limit = 2 })
  assert(result == 5)
  raised(flow.task_group, function(group)
    group:spawn(error, "boom")
    group:spawn(flow.sleep, LONG)
  end)
  assert(flow.race { identity, function() flow.sleep(LONG) end } == nil)
  flow.task_group(function(group)
    group:spawn(group.wait_stopping, group)
    flow.yield()
    group:stop()
  end, { grace = LONG, policy = "supervise" })
end

function scenarios.time()
  local n, done = 0, flow.TaskCompletionSource()
  local timer <close> = flow.Timer(function()
    n = n + 1
    if n >= 2 then done:try_set_result() end
  end, 0.0001, 0.0001)
  flow.await(done.task)
  timer:change(LONG)
  local periodic <close> = flow.PeriodicTimer(0.0001)
  periodic:wait_for_next_tick()
  flow.await(periodic:wait_for_next_tick_async())
  flow.await(flow.delay(0.0001):wait_async(LONG))
  assert(not flow.try_await(flow.delay(LONG):wait_async(0.0001)))
end

function scenarios.channels()
  local channel = flow.Channel.bounded(2)
  local writer = flow.spawn(function()
    for i = 1, 8 do channel:write(i) end
    channel:complete()
  end)
  local sum = 0
  for value in channel:iterate() do sum = sum + value end
  assert(sum == 36)
  flow.await(writer)
  local long = flow.Channel.unbounded()
  for i = 1, 20 do long:write(i) end
  for i = 1, 20 do assert(long:read() == i) end
  local meeting = flow.Channel.bounded(0)
  local giver = flow.spawn(meeting.write, meeting, "x")
  assert(flow.await(meeting:read_async()) == "x")
  flow.await(giver)
  local sorted = flow.Channel.prioritized { comparer = function(a, b) return a < b end }
  sorted:write(2)
  sorted:write(1)
  assert(sorted:read() == 1)
  flow.channel.select { { long, "read" }, { meeting, "read" }, timeout = 0.0001 }
  local chosen = flow.spawn(flow.channel.select, { { long, "read" }, { meeting, "read" } })
  flow.yield()
  long:write(3)
  assert(flow.await(chosen) == 1)
end

function scenarios.locks()
  local semaphore, lock, shared = flow.Semaphore(1), flow.Lock(), flow.ReaderWriterLock()
  semaphore:wait()
  local waiter = flow.spawn(semaphore.wait, semaphore)
  flow.yield()
  semaphore:release()
  flow.await(waiter)
  local function hold()
    local _ <close> = lock:lock()
    flow.yield()
  end
  flow.await_all(flow.spawn(hold), flow.spawn(hold))
  do
    local _ <close> = shared:read_lock()
    local _ <close> = shared:read_lock()
  end
  do
    local _ <close> = shared:write_lock()
  end
  local event, barrier, condition = flow.ManualResetEvent(), flow.Barrier(2), flow.Condition(lock)
  local tasks = {
    flow.spawn(event.wait, event),
    flow.spawn(barrier.signal_and_wait, barrier),
    flow.spawn(function()
      local _ <close> = lock:lock()
      condition:wait()
    end),
  }
  flow.yield()
  event:set()
  barrier:signal_and_wait()
  do
    local _ <close> = lock:lock()
    condition:notify()
  end
  flow.await_all(tasks)
end

function scenarios.generators()
  local next = flow.coroutine.wrap(function()
    for i = 1, 3 do
      flow.yield()
      flow.coroutine.yield(i)
    end
  end)
  assert(next() == 1 and next() == 2)
  local co = flow.coroutine.create(function()
    local _ <close> = helper.closing(identity)
    flow.coroutine.yield()
  end)
  flow.coroutine.resume(co)
  flow.coroutine.close(co)
end

function scenarios.streams()
  local function source()
    return flow.stream.new(function(emit)
      for i = 1, 5 do
        emit(i)
        flow.yield()
      end
    end)
  end
  local even = source():map(function(x) return x * 2 end):filter(function(x) return x > 2 end)
  assert(#even:to_table() == 4)
  for value in source():buffer(2):iterate() do
    if value == 3 then break end
  end
  source():merge(flow.stream.from { 7 }):to_table()
  source():zip(flow.stream.from { 7 }):to_table()
  flow.stream.from({ 1, 2, 3 }):chunk(2):to_table()
end

function scenarios.loops_and_caches()
  local doubled = flow.parallel.map({ 1, 2, 3 }, { max_degree_of_parallelism = 2 }, function(x)
    flow.yield()
    return x * 2
  end)
  assert(doubled[3] == 6)
  local function four()
    flow.yield()
    return 4
  end
  assert(flow.AsyncLazy(four):get() == 4)
  local cache = flow.AsyncCache { time_to_live = 5, max_entries = 2 }
  for i = 1, 3 do assert(cache:get_or_add(i, four) == 4) end
  local queue <close> = flow.BackgroundQueue { capacity = 2, workers = 1 }
  assert(flow.await(queue:enqueue(four)) == 4)
  queue:fire_and_forget(flow.yield)
  queue:drain()
end

function scenarios.services()
  local host = flow.Host { shutdown_timeout = LONG }
  host:add(flow.BackgroundService(function(token) flow.sleep(LONG, token) end))
  host:start()
  flow.yield()
  host:stop()
  local strategies = flow.resilience
  local attempts = 0
  local result = strategies.pipeline({
    strategies.timeout { seconds = 4 }, strategies.retry { delay = 0.0001 }, strategies.circuit_breaker {},
    strategies.bulkhead { max_concurrency = 2 },
  }):execute(function()
    attempts = attempts + 1
    if attempts == 1 then error("again", 0) end
    return 5
  end)
  assert(result == 5)
end

local trace -- which a request has kept from being ended

function scenarios.diagnostics()
  local diagnostics = require "coflow.diagnostics"
  if trace then trace:dispose() end
  for _, task in ipairs(diagnostics.tasks()) do -- what a failing request has left
    if task ~= flow.current_task() then task:cancel() end
  end
  flow.yield()
  trace = diagnostics.trace("/dev/null")
  diagnostics.on_blocked(0, identity)
  local lock, hot = flow.Lock(), flow.async(identity)
  local holder = flow.spawn(function()
    local _ <close> = lock:lock()
    flow.sleep(0.0001)
  end)
  flow.yield()
  local waiter = flow.spawn(lock.run, lock, identity)
  local both = flow.spawn(function() flow.when_all(holder, waiter):await() end)
  flow.yield()
  for i = 1, 3 do assert(flow.await(hot(i)) == i) end
  assert(#diagnostics.tasks() == 4)
  assert(diagnostics.dump():find "waits for coflow.Lock, held by")
  assert(diagnostics.hang_report():find "waits for 'when_all' of")
  assert(diagnostics.metrics().tasks == 4)
  both:await()
  trace:dispose()
  trace = nil
  diagnostics.on_blocked(nil)
end

function scenarios.schedulers()
  local limited = flow.TaskScheduler.limited(1)
  assert(flow.await(flow.spawn_on(limited, function()
    flow.yield()
    return 1
  end)) == 1)
  local queue = {}
  local own = flow.TaskScheduler.new { queue_task = function(_, task) queue[#queue + 1] = task end }
  local task = flow.spawn_on(own, identity, 3)
  own:try_execute_task(queue[1])
  assert(flow.await(task) == 3)
end

function scenarios.files()
  local fs = flow.fs
  local folder = fs.mkdtemp(os.tmpname() .. "XXXXXX")
  local ok, err = pcall(function()
    fs.write_file(folder .. "/a", "hello\nworld\n", { atomic = true })
    assert(fs.read_file(folder .. "/a") == "hello\nworld\n")
    local file <close> = fs.open(folder .. "/a")
    for _ in file:lines() do end
    for _ in fs.scandir(folder) do end
    assert(fs.stat(folder).type == "directory")
    fs.copy(folder .. "/a", folder .. "/b")
  end)
  os.remove(folder .. "/a")
  os.remove(folder .. "/b")
  os.remove(folder)
  if not ok then error(err, 0) end
end

function scenarios.sockets() -- the peer may be what failed
  flow.with_timeout(2, function()
    local listener <close> = flow.net.listen("127.0.0.1", 0)
    local server = flow.spawn(function()
      local stream <close> = listener:accept()
      for line in stream:lines() do stream:write(line, "\n") end
    end)
    do
      local client <close> = flow.net.connect("127.0.0.1", listener.port)
      client:write("hello\n")
      assert(client:read_line() == "hello")
      client:shutdown()
      client:read_all()
    end
    flow.await(server)
  end)
end

describe("a request for memory that fails", function()
  local fail

  setup(function()
    local library = os.tmpname()
    os.remove(library)
    library = library .. ".so"
    assert(os.execute(("%s -std=c11 -shared -fPIC $(sh .ci/find lua-cflags) spec/support/memory.c -o %s"):format(
      os.getenv("CC") or "cc", library)))
    fail = assert(package.loadlib(library, "luaopen_memory"))()
    os.remove(library)
  end)

  -- What a test sees of the others, of which there are as many as requests.
  local function works()
    local task = flow.spawn(function()
      flow.yield()
      return 7
    end)
    flow.sleep(0)
    return flow.await(task) == 7
  end

  local names = {}
  for name in pairs(scenarios) do names[#names + 1] = name end
  table.sort(names)

  for _, name in ipairs(names) do
    it("leaves everything in order: " .. name:gsub("_", " "), function()
      local scenario = scenarios[name]
      flow.on_unobserved_exception(false)
      finally(function()
        fail()
        flow.run(helper.collect)
      end)
      for _ = 1, 3 do flow.run(scenario) end -- what is kept for later is there then
      local step = os.getenv("COFLOW_GC_STRESS") and 13 or 1
      local failed, n, requests = 0, 1 - step
      repeat
        n = n + step
        local ok, count = pcall(function() -- the stack may have to grow for the call
          fail(n)
          local ok = pcall(flow.run, scenario)
          local count = fail()
          return ok and count or -count
        end)
        requests = ok and math.abs(count) or fail()
        if not ok or count < 0 then failed = failed + 1 end
        assert.is_true(flow.run(works))
      until requests < n
      assert.is_true(failed > 0)
      flow.run(scenario)
    end)
  end

  it("does not keep open what is collected in a test", function()
    local function deep(n) return n == 0 and 0 or 1 + deep(n - 1) end
    finally(function()
      fail()
      collectgarbage("restart")
    end)
    local ok, err = pcall(flow.testing.run, function()
      for n = 1, 20 do
        collectgarbage("stop")
        local port = flow.net.listen("127.0.0.1", 0).port
        flow.yield()
        deep(50) -- Lua has room for the calls of finalizers
        fail(n)
        pcall(collectgarbage)
        fail()
        collectgarbage("restart")
        helper.collect()
        flow.yield()
        flow.net.listen("127.0.0.1", port):close()
      end
    end)
    assert.is_false(ok)
    helper.is_error("InvalidOperation", err, "that was open when it was collected") -- most of them
  end)
end)
