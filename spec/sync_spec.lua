-- coflow.sync: semaphore, locks, events, countdown, condition, barrier. First what all of them promise to those
-- who wait, then each by itself.

local flow = require "coflow"
local support = require "spec.support.flow_support"
local helper = require "spec.helper"

local in_task, raises, bad_argument = support.in_task, support.raises, support.bad_argument
local in_order = helper.in_order
local many, random_of = support.many, support.random
local is = flow.errors.is

-- Lets all that is ready run.
local function settle() flow.sleep(0.001) end

-- A log, and a task of fn that writes what it ended with into it.
local function logging()
  local log = {}
  local function watch(name, fn, ...)
    return flow.async(function(...)
      local result = table.pack(pcall(fn, ...))
      local err = not result[1] and result[2]
      log[#log + 1] = name .. (result[1] and " got it" or " " .. (type(err) == "table" and err.name or tostring(err)))
      return table.unpack(result, 1, result.n)
    end)(...)
  end
  return log, watch
end

local function held(lock, how)
  local key = lock[how](lock)
  return function() key:dispose() end
end

-- Everything that can be waited for: `new` gives a thing that is not there and the function that gives it to one
-- waiter; `there` one that is there; `wait` and `start` ask for it, with a token.
local kinds = {}

local function timed(name, new, there)
  kinds[#kinds + 1] = {
    name = name .. ":wait", new = new, there = there, timed = true, gives = name == "CountdownEvent" and 1 or 3,
    wait = function(x, token) return x:wait(nil, token) end,
    start = function(x, token) return x:wait_async(nil, token) end,
  }
end

timed("Semaphore", function()
  local x = flow.Semaphore(0)
  return x, function() x:release() end
end, function() return flow.Semaphore(1) end)
timed("ManualResetEvent", function()
  local x = flow.ManualResetEvent()
  return x, function() x:set() end
end, function() return flow.ManualResetEvent(true) end)
timed("AutoResetEvent", function()
  local x = flow.AutoResetEvent(false)
  return x, function() x:set() end
end, function() return flow.AutoResetEvent(true) end)
timed("CountdownEvent", function()
  local x = flow.CountdownEvent(1)
  return x, function() x:signal() end
end, function() return flow.CountdownEvent(0) end)

local function locking(class, method, holding)
  kinds[#kinds + 1] = {
    name = class .. ":" .. method, key = true, gives = 1,
    new = function()
      local x = flow[class]()
      return x, held(x, holding)
    end,
    there = function() return flow[class]() end,
    wait = function(x, token) return x[method](x, token) end,
    start = function(x, token) return x[method .. "_async"](x, token) end,
  }
end

locking("Lock", "lock", "lock")
locking("ReaderWriterLock", "read_lock", "write_lock")
locking("ReaderWriterLock", "write_lock", "read_lock")
locking("ReaderWriterLock", "write_lock", "write_lock")

kinds[#kinds + 1] = {
  name = "Barrier:signal_and_wait", gives = 1,
  new = function()
    local x = flow.Barrier(2)
    return x, function() x:signal_and_wait_async() end
  end,
  there = function() return flow.Barrier(1) end,
  wait = function(x, token) return x:signal_and_wait(token) end,
  start = function(x, token) return x:signal_and_wait_async(token) end,
}

local condition_locks = setmetatable({}, { __mode = "k" })
kinds[#kinds + 1] = {
  name = "Condition:wait", condition = true,
  new = function()
    local lock = flow.Lock()
    local x = flow.Condition(lock)
    condition_locks[x] = lock
    return x, function() x:notify() end
  end,
  wait = function(x, token)
    local _ <close> = condition_locks[x]:lock(flow.CancellationToken.none)
    return x:wait(token)
  end,
  start = function(x, token)
    local key = condition_locks[x]:lock(flow.CancellationToken.none)
    local ok, task = pcall(x.wait_async, x, token)
    if not ok then
      key:dispose()
      error(task, 0)
    end
    return task:continue_with(function()
      key:dispose()
      return task:await()
    end)
  end,
}

-- With a collection at every allocation, one of each sort: the others take the same ways through the code.
local alike = { ["ManualResetEvent:wait"] = true, ["CountdownEvent:wait"] = true }
local seen = {}

for _, kind in ipairs(kinds) do
  local again = seen[kind.name] or alike[kind.name]
  seen[kind.name] = true
  if not again or many(1, 0) == 1 then describe(kind.name, function()
    if kind.there then
      it("has at once what is there, in both styles", in_task(function()
        local result = kind.wait(kind.there())
        assert.is_truthy(result)
        local task = kind.start(kind.there())
        assert.equal("ran_to_completion", task.status)
        assert.equal(type(result), type(task.result))
      end))

      it("prefers a canceled token to what is there, and takes nothing", in_task(function()
        local x = kind.there()
        local err = raises("OperationCanceled", kind.wait, x, flow.CancellationToken.canceled)
        assert.equal(flow.CancellationToken.canceled, err.token)
        assert.equal("canceled", kind.start(x, flow.CancellationToken.canceled).status)
        local task = flow.spawn(function()
          flow.current_task():cancel()
          raises("OperationCanceled", kind.wait, x)
          assert.equal("canceled", kind.start(x).status)
        end)
        task:await()
        assert.is_truthy(kind.wait(x))
      end))

      it("works outside every task", function()
        assert.is_truthy(kind.wait(kind.there()))
        assert.is_truthy(flow.await(kind.start(kind.there())))
      end)
    end

    it("hands it to those who wait in the order of arrival, of both styles", in_order(function()
      local log, watch = logging()
      local source <close> = flow.CancellationTokenSource()
      local x, give = kind.new()
      local function wait(...)
        local key = kind.wait(...)
        if kind.key then key:dispose() end
        return key
      end
      watch("a", wait, x)
      watch("b", function()
        local key = kind.start(x):await()
        if kind.key then key:dispose() end
      end)
      watch("c", wait, x, source.token)
      for _ = 1, kind.gives or 3 do
        give()
        settle()
      end
      if kind.name:find("Barrier") then
        assert.same({ "b got it", "a got it", "c got it" }, log) -- b was the second one
      else
        assert.same({ "a got it", "b got it", "c got it" }, log)
      end
      source:cancel()
      settle()
    end))

    it("ends with what cancels it, and then has taken nothing", in_task(function()
      local log, watch = logging()
      local source <close> = flow.CancellationTokenSource()
      local x, give = kind.new()
      local by_token = watch("token", kind.wait, x, source.token)
      settle()
      source:cancel("enough")
      settle()
      local started = kind.start(x, source.token)
      settle()
      local other <close> = flow.CancellationTokenSource()
      local twin = kind.start(x, other.token)
      other:cancel()
      settle()
      local ambient = watch("ambient", kind.wait, x)
      settle()
      ambient:cancel()
      settle()
      local late = watch("timeout", function() flow.with_timeout(1, kind.wait, x) end)
      late:await()
      assert.same({ "token OperationCanceled", "ambient OperationCanceled", "timeout Timeout" }, log)
      assert.equal("canceled", started.status)
      assert.equal("canceled", twin.status)
      local _, err = by_token:await()
      assert.equal(source.token, err.token)
      assert.equal("enough", err.reason)
      assert.equal(other.token, raises("OperationCanceled", flow.await, twin).token)
      local good = watch("good", kind.wait, x)
      settle()
      give()
      settle()
      assert.equal("good got it", log[4])
      good:await()
    end))

    it("can be canceled by its task", in_task(function()
      local x = kind.new()
      if kind.condition then
        local key = condition_locks[x]:lock()
        local task = x:wait_async()
        assert.is_true(task:cancel("over"))
        key:dispose()
        assert.equal("over", raises("OperationCanceled", flow.await, task).reason)
        local deaf = x:wait_async(flow.CancellationToken.none)
        assert.is_true(deaf:cancel())
        raises("OperationCanceled", flow.await, deaf)
        return
      end
      local task = kind.start(x)
      assert.is_true(task:cancel("over"))
      assert.equal("over", raises("OperationCanceled", flow.await, task).reason)
      if not kind.name:find("Barrier") then
        task = kind.start(x, flow.CancellationToken.none)
        assert.is_true(task:cancel())
        raises("OperationCanceled", flow.await, task)
      end
    end))

    it("opts out of every cancellation with none", in_task(function()
      local log, watch = logging()
      local x, give = kind.new()
      local task = watch("deaf", kind.wait, x, flow.CancellationToken.none)
      settle()
      task:cancel()
      settle()
      assert.same({}, log)
      give()
      settle()
      assert.same({ "deaf got it" }, log)
      x, give = kind.new()
      local twin
      task = watch("starter", function()
        flow.current_task():cancel()
        twin = kind.start(x, flow.CancellationToken.none)
      end)
      settle()
      assert.equal("waiting_for_activation", twin.status)
      give()
      settle()
      assert.equal("ran_to_completion", twin.status)
      task:await()
    end))

    it("gives a waiter what it was granted, canceled or not, and interrupts what it does next", in_task(function()
      local x, give = kind.new()
      local got, next_error
      local task = flow.async(function()
        got = kind.wait(x)
        next_error = select(2, pcall(flow.yield))
      end)()
      settle()
      give()
      task:cancel()
      settle()
      assert.is_truthy(got)
      assert.is_true(is(next_error, "OperationCanceled"))
    end))

    it("wakes who waits with ObjectDisposed, and refuses from then on", in_task(function()
      local log, watch = logging()
      local x = kind.new()
      watch("a", kind.wait, x)
      if not kind.name:find("Barrier") then watch("b", function() return kind.start(x):await() end) end
      settle()
      x:dispose()
      x:dispose()
      settle()
      table.sort(log)
      assert.same({ "a ObjectDisposed", not kind.name:find("Barrier") and "b ObjectDisposed" or nil }, log)
      local err = raises("ObjectDisposed", kind.wait, x)
      assert.truthy(err.message:find(kind.name:match("^%a+"), 1, true))
      raises("ObjectDisposed", kind.start, x)
      raises("ObjectDisposed", kind.wait, x, flow.CancellationToken.canceled)
    end))

    it("is disposed by a to-be-closed variable", in_task(function()
      local x
      do
        local closing <close> = kind.new()
        x = closing
      end
      raises("ObjectDisposed", kind.wait, x)
    end))

    it("refuses where nobody can suspend, and starts nothing there", in_task(function()
      local x, give = kind.new()
      local err
      flow.spawn(function() -- another task than the one that holds it
        err = raises("InvalidOperation", function() table.sort({ 1, 2 }, function() kind.wait(x) end) end)
      end):await()
      assert.truthy(err.message:find("sort", 1, true))
      local log, watch = logging()
      watch("a", kind.wait, x)
      give()
      settle()
      assert.same({ "a got it" }, log)
    end))

    it("reports the tasks that wait for what has been collected", in_task(function()
      support.with_reports(function(reports)
        local closed = 0
        local function abandon(token)
          local x, give = kind.new()
          if kind.key then give = nil end
          flow.spawn(function()
            local _ <close> = helper.closing(function() closed = closed + 1 end)
            if token then kind.start(x):await() else kind.wait(x) end
          end)
          return give and true
        end
        abandon()
        abandon(true)
        settle()
        helper.collect()
        assert.equal(2, #reports)
        assert.is_true(is(reports[1].err, "TaskAbandoned"))
        assert.is_true(is(reports[2].err, "TaskAbandoned"))
        assert.equal(2, closed)
      end)
    end))

    it("lives while a deadline above it can end the wait", in_task(function()
      local log, watch = logging()
      watch("a", function()
        local x = kind.new()
        flow.with_timeout(5, function()
          flow.spawn(function() kind.wait(x) end):await()
        end)
      end)
      settle()
      helper.collect()
      flow.sleep(6)
      assert.same({ "a Timeout" }, log)
    end))

    it("checks its arguments", in_task(function()
      local x = kind.new()
      local method = kind.name:match(":(.*)")
      for _, name in ipairs { method, method .. "_async" } do
        local call = load(("local x = ... local _ = x:%s(%s)"):format(name, kind.timed and "nil, 1" or "1"))
        bad_argument(kind.timed and 2 or 1, name, function() call(x) end, "CancellationToken")
      end
      assert.is_false(pcall(x[method], {}))
      assert.is_false(pcall(x[method], flow.CancellationToken.none))
      assert.has_error(function() x.field = 1 end)
      assert.truthy(tostring(x):find("^coflow%.%a+ %(.*0 waiting%)$"))
    end))

    if kind.timed then
      it("gives up in time, with false, and takes nothing", in_task(function(clock)
        local log, watch = logging()
        local x, give = kind.new()
        local start = clock:now()
        assert.is_false(x:wait(2))
        assert.equal(2, clock:now() - start)
        local task = x:wait_async(1)
        assert.is_false(task:await())
        local source <close> = flow.CancellationTokenSource()
        assert.is_false(x:wait(1, source.token))
        assert.equal(4, clock:now() - start)
        watch("a", x.wait, x, math.huge)
        give()
        settle()
        assert.same({ "a got it" }, log)
      end))

      it("never waits with a timeout of 0", in_task(function()
        local x = kind.new()
        local yielded = false
        flow.spawn(function() yielded = true end)
        assert.is_false(x:wait(0))
        assert.is_false(x:wait_async(0).result)
        assert.is_true(kind.there():wait(0))
        assert.is_true(kind.there():wait_async(0).result)
        raises("OperationCanceled", x.wait, x, 0, flow.CancellationToken.canceled)
        assert.is_false(yielded)
        settle()
      end))

      it("is canceled, not out of time, by what comes first, and leaves no deadline behind", in_task(function()
        local x, give = kind.new()
        local source <close> = flow.CancellationTokenSource(1)
        raises("OperationCanceled", x.wait, x, 2, source.token)
        raises("Timeout", flow.with_timeout, 1, x.wait, x, 2)
        local _, watch = logging()
        watch("a", x.wait, x, 1000)
        give()
        settle()
      end))

      it("refuses negative times and NaN", in_task(function()
        local x = kind.new()
        bad_argument(1, "wait", function() local _ = x:wait(-1) end, "negative")
        bad_argument(1, "wait", function() local _ = x:wait(0 / 0) end, "NaN")
        bad_argument(1, "wait", function() local _ = x:wait("soon") end)
        bad_argument(1, "wait_async", function() local _ = x:wait_async(-1) end, "negative")
        bad_argument(1, "wait_async", function() local _ = x:wait_async(0 / 0) end, "NaN")
      end))

      it("works outside every task, with a timeout", function()
        assert.is_false(kind.new():wait(0.001))
        assert.is_false(kind.new():wait_async(0.001):await())
      end)
    end
  end) end
end

describe("Semaphore", function()
  it("counts", in_task(function()
    local s = flow.Semaphore(2, 3)
    assert.is_true(s:wait())
    assert.equal(1, s.current_count)
    assert.equal(1, s:release())
    assert.equal(2, s:release())
    assert.equal(3, s.current_count)
    s = flow.Semaphore(0)
    assert.equal(0, s:release(math.maxinteger))
    assert.equal(math.maxinteger, s.current_count)
    raises("SemaphoreFull", s.release, s, math.maxinteger)
    assert.equal(5, flow.Semaphore(5, math.huge).current_count)
  end))

  it("refuses what makes no sense", function()
    bad_argument(1, "Semaphore", function() local _ = flow.Semaphore() end)
    bad_argument(1, "Semaphore", function() local _ = flow.Semaphore(-1) end)
    bad_argument(1, "Semaphore", function() local _ = flow.Semaphore(1.5) end)
    bad_argument(2, "Semaphore", function() local _ = flow.Semaphore(0, 0) end)
    bad_argument(1, "Semaphore", function() local _ = flow.Semaphore(3, 2) end)
    local s = flow.Semaphore(1)
    bad_argument(1, "release", function() local _ = s:release(0) end)
    bad_argument(1, "release", function() local _ = s:release(-1) end)
    bad_argument(1, "release", function() local _ = s:release(0.5) end)
    assert.equal(1, s.current_count)
  end)

  it("runs a function in a slot, and gives it back however that ends", in_order(function()
    local s = flow.Semaphore(2)
    local log, note = helper.recorder()
    local function job(name, ...)
      note(name, "in", s.current_count)
      flow.sleep(1)
      note(name, "out")
      return name, nil, ...
    end
    local a, b, c = s:run_async(job, "a", 3), s:run_async(job, "b"), s:run_async(job, "c")
    flow.yield()
    assert.same({ "a in 1", "b in 0" }, log)
    a:cancel()
    raises("OperationCanceled", flow.await, a)
    assert.same({ "b", nil, n = 2 }, table.pack(b:await()))
    assert.same({ "c", nil, n = 2 }, table.pack(c:await()))
    assert.equal(2, s.current_count)
    local err = {}
    assert.equal(err, helper.raised(s.run, s, error, err))
    assert.same({ 1, nil, n = 2 }, table.pack(s:run(function(...) return ... end, 1, nil)))
    assert.equal(2, s.current_count)
  end))

  it("runs no function when its wait is canceled, and takes no slot", in_order(function()
    local s = flow.Semaphore(1)
    s:wait()
    local ran = false
    local task = s:run_async(function() ran = true end)
    flow.yield()
    task:cancel()
    raises("OperationCanceled", flow.await, task)
    s:release()
    assert.is_false(ran)
    assert.equal(1, s.current_count)
  end))

  it("may be disposed of while a function runs in a slot of it, or released for it", in_order(function()
    local s = flow.Semaphore(1, 1)
    assert.equal("done", s:run(function() s:dispose() return "done" end))
    s = flow.Semaphore(1, 1)
    raises("SemaphoreFull", s.run, s, function() s:release() end)
    assert.equal(1, s.current_count)
  end))

  it("runs functions inside each other without a C call level", in_task(function()
    local n, s = many(10000), flow.Semaphore(many(10000))
    local function nest(i)
      if i > n then return n end
      return (s:run(nest, i + 1))
    end
    assert.equal(n, nest(1))
    assert.equal(n, s.current_count)
  end))

  it("refuses to run what is no function", in_task(function()
    local s = flow.Semaphore(1)
    bad_argument(1, "run", function() local _ = s:run(1) end)
    bad_argument(1, "run", function() local _ = s.run({}, print) end)
    bad_argument(1, "run_async", function() local _ = s:run_async() end)
    bad_argument(1, "run_async", function() local _ = s.run_async(flow.Lock(), print) end)
    assert.equal(1, s.current_count)
  end))

  it("changes nothing when too much is released", in_order(function()
    local s = flow.Semaphore(1, 2)
    raises("SemaphoreFull", s.release, s, 2)
    assert.equal(1, s.current_count)
    s:wait()
    local log, watch = logging()
    for i = 1, 3 do watch(i, s.wait, s) end
    raises("SemaphoreFull", s.release, s, 3) -- also when there are waiters for all of it
    settle()
    assert.same({}, log)
    assert.equal(0, s:release(2))
    settle()
    assert.same({ "1 got it", "2 got it" }, log)
    assert.equal(0, s.current_count)
    s:release()
    settle()
    assert.equal("3 got it", log[3])
  end))

  it("hands slots over: who comes after a release does not overtake who waited", in_task(function()
    local log, watch = logging()
    local s = flow.Semaphore(0)
    watch("old", s.wait, s)
    s:release()
    assert.equal(0, s.current_count)
    assert.is_false(s:wait(0))
    watch("new", s.wait, s)
    assert.same({}, log) -- nor does anybody run inside release
    settle()
    assert.same({ "old got it" }, log)
    s:release()
    settle()
  end))

  it("lets a release and a cancellation in one turn decide in their order", in_task(function()
    local s = flow.Semaphore(0)
    local source <close> = flow.CancellationTokenSource()
    local log, watch = logging()
    watch(1, s.wait, s, nil, source.token)
    watch(2, s.wait, s)
    s:release()
    source:cancel()
    settle()
    assert.same({ "1 got it" }, log)
    assert.equal(0, s.current_count)
    s:release()
    settle()
  end))

  it("gives the slot of a canceled waiter to the next", in_order(function()
    local s = flow.Semaphore(0)
    local source <close> = flow.CancellationTokenSource()
    local log, watch = logging()
    watch(1, s.wait, s, nil, source.token)
    watch(2, s.wait, s)
    source:cancel()
    s:release()
    settle()
    assert.same({ "1 OperationCanceled", "2 got it" }, log)
  end))

  it("tells its count after it was disposed, and refuses all else", in_task(function()
    local s = flow.Semaphore(3)
    s:dispose()
    assert.equal(3, s.current_count)
    raises("ObjectDisposed", s.release, s)
    assert.truthy(tostring(s):find("disposed", 1, true))
  end))

  it("is not disturbed by finalizers that use it", in_task(function()
    local s = flow.Semaphore(0, 1000)
    local got = 0
    for _ = 1, 60 do flow.spawn(function() if s:wait() then got = got + 1 end end) end
    settle()
    for _ = 1, 30 do
      setmetatable({}, { __gc = function() s:release() end })
      s:release()
    end
    for _ = 1, 3 do helper.collect() end
    assert.equal(60, got)
    assert.equal(0, s.current_count)
  end))
end)

describe("Lock", function()
  it("is open again when the key's block is left, by whatever way", in_task(function()
    local lock = flow.Lock()
    do
      local _ <close> = lock:lock()
      assert.is_nil(lock:try_lock())
    end
    pcall(function()
      local _ <close> = lock:lock()
      error("out")
    end)
    local key = assert(lock:try_lock())
    key:dispose()
    assert.truthy(tostring(lock):find("free", 1, true))
  end))

  it("is not opened by a key that was used before", in_task(function()
    local lock = flow.Lock()
    local old = lock:lock()
    old:dispose()
    local new <close> = lock:lock()
    old:dispose()
    old:dispose()
    assert.is_nil(lock:try_lock())
    new:dispose()
    old:dispose()
    local _ <close> = assert(lock:try_lock())
  end))

  it("can be opened by another task than took it, which can then take it", in_task(function()
    local lock = flow.Lock()
    local key = flow.spawn(lock.lock, lock):await()
    flow.spawn(key.dispose, key):await()
    local _ <close> = lock:lock()
  end))

  it("tells a task that locks what it holds", in_task(function()
    flow.current_task().name = "me"
    local lock = flow.Lock()
    local key = lock:lock()
    local err = raises("InvalidOperation", lock.lock, lock)
    assert.truthy(err.message:find("'me' holds this Lock already", 1, true))
    assert.is_nil(lock:try_lock())
    assert.equal("waiting_for_activation", lock:lock_async().status) -- somebody else may wait for that
    raises("InvalidOperation", function() lock:run(function() end) end)
    key:dispose()
  end))

  it("does so whatever way it was taken, but for operations, which are anybody's", in_task(function()
    local lock = flow.Lock()
    local source <close> = flow.CancellationTokenSource()
    local key = assert(lock:try_lock())
    raises("InvalidOperation", lock.lock, lock)
    key:dispose()
    key = lock:lock(source.token)
    raises("InvalidOperation", lock.lock, lock, source.token)
    flow.spawn(function() -- handed over, at once and with a token
      local log, watch = logging()
      watch("b", function()
        local mine <close> = lock:lock(source.token)
        raises("InvalidOperation", lock.lock, lock)
        mine:dispose()
      end)
      watch("c", function()
        local mine <close> = lock:lock()
        raises("InvalidOperation", lock.lock, lock)
        mine:dispose()
      end)
      key:dispose()
      settle()
      assert.same({ "b got it", "c got it" }, log)
    end):await()
    key = lock:lock_async():await()
    local second = lock:lock_async()
    key:dispose()
    second:await():dispose()
  end))

  it("does not take who gave the key away and let go for the owner", in_task(function()
    local lock = flow.Lock()
    local key = lock:lock()
    local other = flow.spawn(lock.lock, lock)
    settle()
    key:dispose() -- handed to the other one, which has not run yet
    local mine = flow.async(lock.lock)(lock)
    settle()
    other:await():dispose()
    mine:await():dispose()
  end))

  it("does not take a new task for a dead owner", in_task(function()
    local lock = flow.Lock()
    local keys = {}
    for _ = 1, many(50, 10) do -- addresses come again
      keys[1] = flow.spawn(lock.lock, lock):await()
      helper.collect()
      local waiter = flow.spawn(function() lock:lock():dispose() end)
      settle()
      assert.equal("waiting_for_activation", waiter.status)
      keys[1]:dispose()
      waiter:await()
    end
  end))

  it("does not keep its owner alive", in_task(function()
    support.with_reports(function(reports)
      local lock = flow.Lock()
      flow.spawn(function()
        local _ <close> = lock:lock()
        flow.await(flow.TaskCompletionSource().task)
      end)
      settle()
      helper.collect()
      assert.is_true(is(reports[1].err, "TaskAbandoned"))
      local _ <close> = assert(lock:try_lock(), "the dead task's key was not closed")
    end)
  end))

  it("knows the code outside every task", function()
    local lock = flow.Lock()
    local key = lock:lock()
    local err = raises("InvalidOperation", lock.lock, lock)
    assert.truthy(err.message:find("outside every task", 1, true))
    key:dispose()
    key = flow.run(lock.lock, lock)
    local waiter = flow.spawn(function()
      flow.sleep(0.001)
      key:dispose()
    end)
    key = lock:lock() -- drives the loop
    raises("InvalidOperation", lock.lock, lock)
    key:dispose()
    waiter:await()
    assert.equal(1, lock:run(function() return 1 end))
  end)

  it("runs a function while it is held", in_order(function()
    local lock = flow.Lock()
    local log = {}
    local function job(name)
      return lock:run(function(...)
        log[#log + 1] = name .. " in"
        flow.sleep(1)
        log[#log + 1] = name .. " out"
        return name, nil, ...
      end, nil, 3)
    end
    local a, b = flow.spawn(job, "a"), flow.spawn(job, "b")
    assert.same({ "a", nil, nil, 3, n = 4 }, table.pack(a:await()))
    b:await()
    assert.same({ "a in", "a out", "b in", "b out" }, log)
    local err = {}
    assert.equal(err, helper.raised(lock.run, lock, error, err))
    assert.truthy(tostring(lock):find("free", 1, true))
    bad_argument(1, "run", function() local _ = lock:run(1) end)
    bad_argument(1, "run", function() local _ = lock.run({}, print) end)
  end))

  it("runs a function in a task of its own while it is held", in_order(function()
    local lock = flow.Lock()
    local log, note = helper.recorder()
    local function job(name, ...)
      note(name, "in", tostring(lock):find("free", 1, true))
      flow.sleep(1)
      note(name, "out")
      return name, nil, ...
    end
    local a, b, c = lock:run_async(job, "a", 3), lock:run_async(job, "b"), lock:run_async(job, "c")
    assert.same({ "a in nil" }, log)
    b:cancel()
    assert.same({ "a", nil, 3, n = 3 }, table.pack(a:await()))
    helper.raises("OperationCanceled", flow.await, b)
    c:await()
    assert.same({ "a in nil", "a out", "c in nil", "c out" }, log)
    local err = {}
    local failing = lock:run_async(error, err)
    assert.equal(err, helper.raised(flow.await, failing))
    assert.truthy(tostring(lock):find("free", 1, true))
    bad_argument(1, "run_async", function() local _ = lock:run_async(1) end)
    bad_argument(1, "run_async", function() local _ = lock.run_async({}, print) end)
  end))

  it("costs no C call level: many different locks inside each other", in_task(function()
    local n = many(10000)
    local locks = {}
    for i = 1, n do locks[i] = flow.Lock() end
    local function nest(i)
      if i > n then
        flow.yield()
        return n
      end
      return (locks[i]:run(nest, i + 1))
    end
    assert.equal(n, nest(1))
    for i = 1, n do assert(locks[i]:try_lock()) end
  end))

  it("passes to the next one after a canceled waiter", in_order(function()
    local lock = flow.Lock()
    local key = lock:lock()
    local log, watch = logging()
    local a = watch("a", lock.lock, lock)
    watch("b", lock.lock, lock)
    a:cancel()
    key:dispose()
    settle()
    assert.same({ "a OperationCanceled", "b got it" }, log)
    assert.is_nil(lock:try_lock())
  end))

  it("lets a key of a disposed lock be closed", in_task(function()
    local lock = flow.Lock()
    do
      local _ <close> = lock:lock()
      lock:dispose()
    end
    raises("ObjectDisposed", lock.try_lock, lock)
  end))
end)

describe("ReaderWriterLock", function()
  it("lets readers in together, writers alone", in_task(function()
    local rw = flow.ReaderWriterLock()
    local a = rw:read_lock()
    local b = rw:read_lock()
    assert.is_nil(rw:try_write_lock())
    a:dispose()
    a:dispose() -- frees nothing the second time
    assert.is_nil(rw:try_write_lock())
    b:dispose()
    local w = assert(rw:try_write_lock())
    assert.is_nil(rw:try_write_lock())
    assert.is_nil(rw:try_read_lock())
    w:dispose()
    w:dispose()
    a = assert(rw:try_read_lock())
    w:dispose()
    assert.is_nil(rw:try_write_lock())
    a:dispose()
    assert(rw:try_write_lock()):dispose()
  end))

  it("holds new readers back while a writer waits, and prefers writers to waiting readers", in_order(function()
    local rw = flow.ReaderWriterLock()
    local log, watch = logging()
    local first = rw:read_lock()
    local keys = {}
    local function take(name, how) keys[name] = watch(name, rw[how], rw) end
    take("r1", "read_lock")
    take("w1", "write_lock")
    take("r2", "read_lock")
    take("w2", "write_lock")
    take("r3", "read_lock")
    assert.is_nil(rw:try_read_lock())
    assert.same({ "r1 got it" }, log)
    local function close(name) select(2, keys[name]:await()):dispose() end
    first:dispose()
    close("r1")
    settle()
    assert.equal("w1 got it", log[2])
    close("w1")
    settle()
    assert.equal("w2 got it", log[3])
    close("w2")
    settle()
    assert.same({ "r2 got it", "r3 got it" }, { log[4], log[5] })
    close("r2")
    close("r3")
  end))

  it("lets the readers in at once when the last waiting writer is canceled", in_order(function()
    for _, how in ipairs { "token", "ambient", "twin", "timeout" } do
      local rw = flow.ReaderWriterLock()
      local log, watch = logging()
      local source <close> = flow.CancellationTokenSource()
      local first = rw:read_lock()
      local writer
      if how == "token" then
        writer = watch("w", rw.write_lock, rw, source.token)
      elseif how == "ambient" then
        writer = watch("w", rw.write_lock, rw)
      elseif how == "twin" then
        writer = rw:write_lock_async()
      else
        writer = watch("w", function() flow.with_timeout(1, rw.write_lock, rw) end)
      end
      local direct, twin = watch("r1", rw.read_lock, rw), nil
      flow.spawn(function() twin = rw:read_lock_async() end):await()
      watch("r3", rw.read_lock, rw, flow.CancellationToken.none)
      assert.equal("waiting_for_activation", twin.status)
      if how == "token" then
        source:cancel()
      elseif how == "timeout" then
        flow.sleep(1)
      else
        writer:cancel()
      end
      assert.equal("ran_to_completion", twin.status, how)
      local _ <close> = assert(rw:try_read_lock())
      flow.yield()
      table.sort(log)
      assert.same({ "r1 got it", "r3 got it", how == "timeout" and "w Timeout" or how ~= "twin"
        and "w OperationCanceled" or nil }, log, how)
      direct:await()
      first:dispose()
    end
  end))

  it("does so also when writers and readers are canceled by one token", in_task(function()
    local rw = flow.ReaderWriterLock()
    local first = rw:read_lock()
    local log, watch = logging()
    local all = flow.spawn(function()
      watch("r1", rw.read_lock, rw, flow.CancellationToken.none)
      watch("w", rw.write_lock, rw)
      watch("r2", rw.read_lock, rw)
      watch("r3", function() return rw:read_lock_async(flow.CancellationToken.none):await() end)
      flow.sleep(math.huge)
    end)
    settle()
    local outer = watch("r4", rw.read_lock, rw)
    all:cancel()
    settle()
    table.sort(log)
    assert.same({ "r1 got it", "r2 OperationCanceled", "r3 OperationCanceled", "r4 got it", "w OperationCanceled" },
      log)
    first:dispose()
    outer:await()
  end))

  it("tells a task that would wait for itself", in_task(function()
    local rw = flow.ReaderWriterLock()
    local key = rw:write_lock()
    raises("InvalidOperation", rw.write_lock, rw)
    raises("InvalidOperation", rw.read_lock, rw)
    key:dispose()
    local one, two = rw:read_lock(), rw:read_lock() -- no writer waits
    local err = raises("InvalidOperation", rw.write_lock, rw)
    assert.truthy(err.message:find("ReaderWriterLock", 1, true))
    local writer = rw:write_lock_async()
    raises("InvalidOperation", rw.read_lock, rw)
    one:dispose()
    raises("InvalidOperation", rw.read_lock, rw)
    two:dispose()
    local reader = flow.spawn(rw.read_lock, rw)
    settle()
    writer:await():dispose()
    reader:await():dispose()
    rw:write_lock():dispose()
  end))

  it("knows many readers", in_task(function()
    local rw = flow.ReaderWriterLock()
    local n = many(300, 20)
    local keys = {}
    for round = 1, 3 do
      for i = 1, n do keys[i] = flow.spawn(rw.read_lock, rw):await() end
      local order = support.shuffled(n, random_of(round))
      for k = 1, n // 2 do keys[order[k]]:dispose() end
      local mine = rw:read_lock()
      raises("InvalidOperation", rw.write_lock, rw)
      mine:dispose()
      local writer = flow.spawn(rw.write_lock, rw)
      settle()
      for k = n // 2 + 1, n do keys[order[k]]:dispose() end
      writer:await():dispose()
    end
  end))
end)

describe("events", function()
  it("are set or not as told, by true, false or nothing", function()
    for _, name in ipairs { "ManualResetEvent", "AutoResetEvent" } do
      local class = flow[name]
      assert.is_true(class(true).is_set)
      assert.is_false(class(false).is_set)
      assert.is_false(class(nil).is_set)
      assert.is_false(class().is_set)
      for _, wrong in ipairs { 5, "x", {}, print } do
        local make = load("local flow, wrong = ... return function() local _ = flow." .. name .. "(wrong) end")
        bad_argument(1, name, make(flow, wrong), "boolean expected")
      end
    end
  end)
end)

describe("ManualResetEvent", function()
  it("lets all through while it is set", in_order(function()
    local event = flow.ManualResetEvent()
    local log, watch = logging()
    for i = 1, 3 do watch(i, event.wait, event) end
    assert.is_false(event.is_set)
    event:set()
    event:reset() -- those who waited have been let through
    watch(4, event.wait, event)
    settle()
    assert.same({ "1 got it", "2 got it", "3 got it" }, log)
    event:set()
    event:set()
    assert.is_true(event.is_set)
    assert.is_true(event:wait())
    assert.is_true(event:wait())
    event:dispose()
    assert.is_true(event.is_set)
    raises("ObjectDisposed", event.set, event)
    raises("ObjectDisposed", event.reset, event)
    settle()
  end))
end)

describe("AutoResetEvent", function()
  it("lets one through for each set, and counts several without a waiter as one", in_order(function()
    local event = flow.AutoResetEvent(true)
    assert.is_true(event.is_set)
    event:set()
    event:set()
    assert.is_true(event:wait())
    assert.is_false(event:wait(0))
    local log, watch = logging()
    for i = 1, 3 do watch(i, event.wait, event) end
    event:set()
    event:set()
    assert.is_false(event.is_set)
    settle()
    assert.same({ "1 got it", "2 got it" }, log)
    event:set()
    event:set()
    event:reset()
    assert.is_false(event:wait(0))
    settle()
    event:dispose()
    raises("ObjectDisposed", event.set, event)
    raises("ObjectDisposed", event.reset, event)
  end))

  it("keeps the signal that a canceled waiter did not take", in_task(function()
    local event = flow.AutoResetEvent()
    local _, watch = logging()
    local a = watch("a", event.wait, event)
    a:cancel()
    event:set()
    assert.is_true(event.is_set)
    assert.is_true(event:wait())
    settle()
  end))
end)

describe("CountdownEvent", function()
  it("lets all through at zero, for good", in_order(function()
    local event = flow.CountdownEvent(3)
    local log, watch = logging()
    for i = 1, 2 do watch(i, event.wait, event) end
    assert.is_false(event:signal())
    event:add(2)
    assert.equal(4, event.current_count)
    assert.is_false(event.is_set)
    assert.is_false(event:signal(3))
    settle()
    assert.same({}, log)
    assert.is_true(event:signal())
    assert.is_true(event.is_set)
    settle()
    assert.same({ "1 got it", "2 got it" }, log)
    raises("InvalidOperation", event.add, event)
    raises("InvalidOperation", event.signal, event)
    assert.equal(0, event.current_count)
    assert.is_true(event:wait())
  end))

  it("refuses more signals than are to come, and changes nothing", in_task(function()
    local event = flow.CountdownEvent(2)
    raises("InvalidOperation", event.signal, event, 3)
    assert.equal(2, event.current_count)
    bad_argument(1, "signal", function() local _ = event:signal(0) end)
    bad_argument(1, "add", function() local _ = event:add(-1) end)
    bad_argument(1, "add", function() local _ = event:add(math.maxinteger) end)
    bad_argument(1, "CountdownEvent", function() local _ = flow.CountdownEvent(-1) end)
    bad_argument(1, "CountdownEvent", function() local _ = flow.CountdownEvent() end)
    event:dispose()
    raises("ObjectDisposed", event.signal, event)
    raises("ObjectDisposed", event.add, event)
  end))
end)

describe("Condition", function()
  local function setup()
    local lock = flow.Lock()
    local condition = flow.Condition(lock)
    local log = {}
    local function waiter(name, token)
      return flow.async(function()
        local key <close> = lock:lock()
        local ok, err = pcall(condition.wait, condition, token)
        assert.is_nil(lock:try_lock(), "the lock was not taken again")
        log[#log + 1] = name .. (ok and " woke" or " " .. err.name)
        key:dispose()
        assert(lock:try_lock(), "the key did not fit any more"):dispose()
      end)()
    end
    return lock, condition, log, waiter
  end

  it("opens the lock while it waits, and wakes as many as it is told, in order", in_order(function()
    local lock, condition, log, waiter = setup()
    for i = 1, 5 do waiter(i) end
    lock:lock():dispose()
    assert.equal(1, condition:notify())
    settle()
    assert.same({ "1 woke" }, log)
    assert.equal(2, condition:notify(2))
    settle()
    assert.same({ "1 woke", "2 woke", "3 woke" }, log)
    waiter(6)
    assert.equal(3, condition:notify_all())
    settle()
    assert.same({ "1 woke", "2 woke", "3 woke", "4 woke", "5 woke", "6 woke" }, log)
    bad_argument(1, "notify", function() local _ = condition:notify(0) end)
    bad_argument(1, "Condition", function() local _ = flow.Condition(condition) end)
  end))

  it("loses a notification for which nobody waits", in_task(function()
    local _, condition, log, waiter = setup()
    assert.equal(0, condition:notify())
    assert.equal(0, condition:notify_all())
    waiter("a")
    settle()
    assert.same({}, log)
    condition:notify_all()
    settle()
  end))

  it("returns with the lock also when it is canceled, however long that takes", in_task(function(clock)
    local lock, _, log, waiter = setup()
    local task = waiter("a")
    local key = lock:lock()
    task:cancel()
    settle()
    assert.same({}, log)
    task:cancel()
    flow.sleep(5)
    key:dispose()
    settle()
    assert.same({ "a OperationCanceled" }, log)
    local source <close> = flow.CancellationTokenSource()
    waiter("b", source.token)
    key = lock:lock()
    source:cancel()
    settle()
    assert.equal(1, #log)
    key:dispose()
    settle()
    assert.equal("b OperationCanceled", log[2])
    local start = clock:now()
    flow.spawn(function()
      local _ <close> = lock:lock()
      raises("Timeout", flow.with_timeout, 2, flow.Condition(lock).wait, flow.Condition(lock))
      assert.is_nil(lock:try_lock())
    end):await()
    assert.equal(2, clock:now() - start)
  end))

  it("carries the token that it was given in the error", in_task(function()
    local lock = flow.Lock()
    local condition = flow.Condition(lock)
    local source <close> = flow.CancellationTokenSource(1)
    local _ <close> = lock:lock()
    assert.equal(source.token, raises("OperationCanceled", condition.wait, condition, source.token).token)
    raises("OperationCanceled", condition.wait, condition, source.token) -- keeps the lock
    assert.is_nil(lock:try_lock())
  end))

  it("does not lose the notification of a waiter that was canceled after it", in_order(function()
    local _, condition, log, waiter = setup()
    local a = waiter("a")
    waiter("b")
    condition:notify()
    a:cancel()
    settle()
    assert.same({ "a woke" }, log)
    local _, other, log2, waiter2 = setup()
    a = waiter2("a")
    waiter2("b")
    a:cancel()
    other:notify()
    settle()
    assert.same({ "a OperationCanceled", "b woke" }, log2)
    condition:notify()
    settle()
  end))

  it("lets a canceled wait in a task of its own lose nothing either", in_order(function()
    local lock = flow.Lock()
    local condition = flow.Condition(lock)
    local first = lock:lock()
    local a = condition:wait_async()
    local second = lock:lock()
    local b = condition:wait_async(flow.CancellationToken.none)
    a:cancel()
    condition:notify()
    settle()
    assert.equal("canceled", a.status) -- and its key fits again
    assert.equal("waiting_for_activation", b.status)
    second:dispose()
    assert.is_nil(lock:try_lock())
    first:dispose()
    assert.is_true(b:await())
    assert.is_nil(lock:try_lock())
    second:dispose()
    assert(lock:try_lock()):dispose()
  end))

  it("keeps what a key to it is worth", in_task(function()
    local lock = flow.Lock()
    local condition = flow.Condition(lock)
    local key = lock:lock()
    local task = condition:wait_async()
    key:dispose()
    local other = lock:lock()
    key:dispose() -- waits, so it fits nothing
    assert.is_nil(lock:try_lock())
    condition:notify()
    settle()
    assert.equal("waiting_for_activation", task.status)
    other:dispose()
    settle()
    assert.is_true(task.result)
    other:dispose()
    assert.is_nil(lock:try_lock())
    raises("InvalidOperation", lock.lock, lock) -- mine again
    key:dispose()
    assert(lock:try_lock()):dispose()
  end))

  it("must be waited for by who holds the lock", in_task(function()
    local lock = flow.Lock()
    local condition = flow.Condition(lock)
    raises("InvalidOperation", condition.wait, condition)
    raises("InvalidOperation", condition.wait_async, condition)
    local other = flow.spawn(lock.lock, lock)
    settle()
    local task = flow.spawn(function()
      raises("InvalidOperation", condition.wait, condition)
      raises("InvalidOperation", condition.wait_async, condition)
    end)
    local owner = flow.spawn(function()
      local _ <close> = lock:lock()
      flow.sleep(1)
    end)
    other:await():dispose()
    task:await()
    settle()
    local err = raises("InvalidOperation", condition.wait, condition)
    assert.truthy(err.message:find(owner.name, 1, true))
    owner:await()
    local key = lock:lock_async():await() -- of which nobody knows whose it is
    local waiting = condition:wait_async()
    condition:notify()
    settle()
    assert.is_true(waiting.result)
    key:dispose()
    assert(lock:try_lock())
  end))

  it("takes the lock again when it is disposed, and does without when the lock is", in_task(function()
    local _, condition, log, waiter = setup()
    waiter("a")
    condition:dispose()
    settle()
    assert.same({ "a ObjectDisposed" }, log)
    raises("ObjectDisposed", condition.notify, condition)
    raises("ObjectDisposed", condition.notify_all, condition)
    local lock = flow.Lock()
    condition = flow.Condition(lock)
    local task = flow.async(function()
      local _ <close> = lock:lock()
      condition:wait()
    end)()
    lock:dispose()
    condition:notify()
    raises("ObjectDisposed", flow.await, task)
  end))

  it("leaves no failure that nobody sees", in_task(function()
    support.with_reports(function(reports)
      local lock, condition, _, waiter = setup()
      raises("ObjectDisposed", function()
        local task = waiter("a")
        condition:dispose()
        lock:dispose()
        task:await()
      end)
      helper.collect()
      assert.same({}, reports)
    end)
  end))

  it("works outside every task", function()
    local lock = flow.Lock()
    local condition = flow.Condition(lock)
    local key <close> = lock:lock()
    flow.spawn(function()
      local _ <close> = lock:lock()
      condition:notify()
    end)
    assert.is_true(condition:wait())
    assert.is_nil(lock:try_lock())
    raises("InvalidOperation", lock.lock, lock)
    key:dispose()
  end)

  it("has the lock again outside every task when nobody can notify it, whatever token it was given", function()
    local none <const> = flow.CancellationToken.none
    local function stopped()
      flow.spawn(function()
        flow.yield()
        flow.loop.stop()
      end)
    end
    for _, token in ipairs { false, none, flow.CancellationTokenSource().token } do
      for _, prepare in ipairs { function() end, stopped } do
        local lock = flow.Lock()
        local condition = flow.Condition(lock)
        local key = lock:lock()
        prepare()
        raises("InvalidOperation", condition.wait, condition, token or nil)
        assert.equal(0, condition:notify())
        assert.is_nil(lock:try_lock())
        key:dispose()
        flow.run(flow.yield)
        assert(lock:try_lock(), "nobody has the key"):dispose()
      end
    end
  end)

  it("is the place where a consumer waits for producers", in_task(function()
    local lock = flow.Lock()
    local filled = flow.Condition(lock)
    local items, got = {}, {}
    local consumers = {}
    for i = 1, 3 do
      consumers[i] = flow.spawn(function()
        for _ = 1, 10 do
          local _ <close> = lock:lock()
          while #items == 0 do filled:wait() end
          got[#got + 1] = table.remove(items, 1)
        end
      end)
    end
    for i = 1, 30 do
      lock:run(function()
        items[#items + 1] = i
        filled:notify()
      end)
      if i % 4 == 0 then flow.yield() end
    end
    flow.await_all(consumers)
    for i = 1, 30 do assert.equal(i, got[i]) end
  end))
end)

describe("Barrier", function()
  it("lets a phase's participants through together, with its number", in_order(function()
    local barrier = flow.Barrier(3)
    local log = {}
    local function worker(name)
      for _ = 1, 3 do
        flow.sleep(#name)
        local phase = barrier:signal_and_wait()
        log[#log + 1] = name .. phase
      end
    end
    local tasks = {}
    for i = 1, 3 do tasks[i] = flow.spawn(worker, ("x"):rep(i)) end
    assert.equal(3, barrier.participant_count)
    flow.sleep(2.5)
    assert.equal(1, barrier.participants_remaining)
    flow.await_all(tasks)
    assert.equal(3, barrier.current_phase_number)
    assert.same({ "xxx0", "x0", "xx0", "xxx1", "x1", "xx1", "xxx2", "x2", "xx2" }, log)
    bad_argument(1, "Barrier", function() local _ = flow.Barrier(0) end)
    bad_argument(1, "Barrier", function() local _ = flow.Barrier("x") end)
  end))

  it("needs the signal of a participant whose wait was canceled again", in_task(function()
    local barrier = flow.Barrier(2)
    local log, watch = logging()
    local a = watch("a", barrier.signal_and_wait, barrier)
    a:cancel()
    watch("b", barrier.signal_and_wait, barrier) -- in the same turn: a does not count any more
    settle()
    assert.same({ "a OperationCanceled" }, log)
    assert.equal(1, barrier.participants_remaining)
    assert.equal(0, barrier:signal_and_wait())
    settle()
    assert.same({ "a OperationCanceled", "b got it" }, log)
  end))

  it("lets an early participant of the next phase wait for the others", in_task(function()
    local barrier = flow.Barrier(2)
    local log, watch = logging()
    watch("a", barrier.signal_and_wait, barrier)
    barrier:signal_and_wait()
    local next_phase = barrier:signal_and_wait_async() -- a has not run yet
    assert.equal("waiting_for_activation", next_phase.status)
    settle()
    assert.same({ "a got it" }, log)
    assert.equal(1, barrier:signal_and_wait())
    assert.equal(1, next_phase.result)
  end))
end)

describe("a generator", function()
  it("may wait for all of these: its task does", in_task(function()
    for _, kind in ipairs(kinds) do
      local log, watch = logging()
      local x, give = kind.new()
      local source <close> = flow.CancellationTokenSource()
      watch("plain", flow.coroutine.wrap(function() return kind.wait(x) end))
      local ambient = watch("ambient", flow.coroutine.wrap(function() return kind.wait(x) end))
      watch("token", flow.coroutine.wrap(function() return kind.wait(x, source.token) end))
      if kind.name:find("Barrier") then
        table.sort(log)
        settle()
        assert.same({ "ambient got it", "plain got it" }, log)
        log[1], log[2] = nil, nil
      else
        settle()
        ambient:cancel()
        settle()
        assert.same({ "ambient OperationCanceled" }, log)
      end
      source:cancel()
      settle()
      assert.equal("token OperationCanceled", table.remove(log))
      if not kind.name:find("Barrier") then
        give()
        settle()
        assert.equal("plain got it", table.remove(log))
      end
    end
  end))

  it("holds a lock for its task", in_task(function()
    local lock = flow.Lock()
    local generate = flow.coroutine.wrap(function()
      local _ <close> = lock:lock()
      flow.coroutine.yield(1)
      flow.Condition(lock):wait()
    end)
    assert.equal(1, generate())
    raises("InvalidOperation", lock.lock, lock)
    raises("Timeout", flow.with_timeout, 1, generate)
    assert(lock:try_lock())
  end))
end)

describe("a hang", function()
  it("is reported with what the tasks wait for", function()
    local lock = flow.Lock()
    local err = raises("InvalidOperation", flow.run, function()
      local _ <close> = lock:lock()
      flow.Semaphore(0):wait()
    end)
    assert.truthy(err.message:find("coflow.Semaphore", 1, true))
  end)
end)
