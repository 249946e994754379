-- Random programs whose coroutines strangers close and resume, at any time, and collections. There is no model, since
-- nobody has promised what such programs do; but each comes to its end, with no other errors than are told of in such
-- cases, and leaves nothing behind: no task, no timer, no lock that is held.

local flow = require "coflow"
local testing = require "coflow.testing"
local helper = require "spec.helper"
local mischief = require "spec.support.mischief"
local support = require "spec.support.flow_support"

local co, closing = flow.coroutine, helper.closing

local TASKS, DEPTH, STEPS = 100, 6, 2500

local function never() return flow.TaskCompletionSource().task end

local function play(random)
  local left, try, judge = STEPS, mischief.new_judge()
  local coroutines, tasks, tokens, queue, sources = {}, {}, {}, {}, {}

  local function chance(n, of) return random(of) <= n end
  local function time() return random(2048) / 2 ^ 20 end
  local function take(list) return table.remove(list, random(#list)) end
  local function note()
    coroutines[#coroutines + 1] = coroutine.running()
    return coroutines[#coroutines]
  end
  local function keep(task) tasks[#tasks + 1] = task end
  -- An inner coroutine is not closed with the outer one.
  local function close(inner) if inner then try(co.close, inner) end end

  for i = 1, 5 do sources[i] = flow.TaskCompletionSource() end
  for i = 1, 3 do tokens[i] = flow.CancellationTokenSource(0.05).token end
  local function token() return tokens[random(6)] end -- or none
  local function shared() return sources[random(5)].task end

  local channel, semaphore, barrier, event, rooms, lock, condition
  local function make_things()
    channel, semaphore, barrier = flow.Channel.bounded(2), flow.Semaphore(1), flow.Barrier(2)
    event, rooms, lock = flow.AutoResetEvent(), flow.ReaderWriterLock(), flow.Lock()
    condition = flow.Condition(lock)
  end
  make_things()
  local watched = flow.AsyncLocal { value_changed = function()
    if chance(1, 100) then collectgarbage() end
  end }
  local scheduler = flow.TaskScheduler.new { queue_task = function(self, task)
    local function execute() self:try_execute_task(task) end
    if chance(3, 10) then execute() else queue[#queue + 1] = execute end
  end }
  local limited = flow.TaskScheduler.limited(2)
  local context = flow.SynchronizationContext.new { post = function(_, fn)
    if chance(3, 10) then fn() else queue[#queue + 1] = fn end
  end }

  local steps = {
    function() flow.yield() end,
    function() flow.sleep(time()) end,
    function() never():await() end,
    function() shared():await() end,
    function() flow.await_any(never(), shared()) end,
    function() collectgarbage() end,
    function() error("on purpose") end,
    function() channel:write(1) end,
    function() channel:read(token()) end,
    function() barrier:signal_and_wait(token()) end,
    function() if not event:wait(0.001) then event:set() end end,
    function() flow.channel.select { { channel, "read" }, shared(), timeout = chance(1, 2) and time() or nil } end,
    function() flow.when_all({ never(), shared() }):wait_async(time()):await() end,
    function(nested) flow.with_timeout(time(), nested) end,
    function(nested) flow.shield(nested) end,
    function(nested)
      local source = flow.CancellationTokenSource(chance(1, 2) and time() or nil)
      flow.with_cancellation(source.token, function()
        if chance(1, 3) then source:cancel() end
        nested()
      end)
    end,
    function(nested)
      local policy = ({ "fail_fast", "supervise", "first_success" })[random(3)]
      flow.task_group(function(group)
        for _ = 1, random(3) do group:spawn(nested) end
        nested()
      end, { limit = random(2), policy = policy })
    end,
    function(nested) flow.race { nested, nested, nested } end,
    function(nested)
      local inner
      local _ <close> = closing(function() close(inner) end)
      co.wrap(function()
        inner = note()
        nested()
      end)()
    end,
    function(nested)
      local made = co.create(function()
        note()
        nested()
      end)
      local _ <close> = closing(function() close(made) end)
      try(co.resume, made)
    end,
    function(nested)
      if not semaphore:wait(time()) then return end
      local _ <close> = closing(function() semaphore:release() end)
      nested()
    end,
    function(nested) lock:run(nested) end,
    function(nested)
      local _ <close> = lock:lock(token())
      if chance(1, 2) then condition:wait(token()) else condition:notify_all() end
      nested()
    end,
    function(nested)
      local _ <close> = chance(1, 2) and rooms:read_lock(token()) or rooms:write_lock(token())
      nested()
    end,
    function(nested) watched:run(random(9), nested) end,
    function(nested)
      local _ <close> = watched:with(random(9))
      nested()
    end,
    function(nested)
      local _ <close> = closing(function()
        collectgarbage()
        try(nested)
      end)
      nested()
    end,
    function(nested) try(nested) end,
    function(nested) keep(flow.async(nested)()) end,
    function(nested) keep(flow.spawn_on(scheduler, nested)) end,
    function(nested) flow.async(nested)():await() end,
    function(nested) flow.spawn(nested):wait_async(time()):await() end,
    function(nested) flow.spawn(nested):configure_await(false):await() end,
    function(nested) keep(flow.spawn_on(limited, nested)) end,
    function(nested) flow.await_all(flow.spawn(nested), flow.async(nested)()) end,
    function(nested)
      flow.call(function()
        flow.SynchronizationContext.set(context)
        nested()
      end)
    end,
  }

  local function body(depth)
    if depth > DEPTH then return flow.yield() end
    for _ = 1, random(3) do
      if left == 0 then return end
      left = left - 1
      steps[random(#steps)](function() body(depth + 1) end)
    end
  end

  local function run_queue()
    while #queue > 0 do try(table.remove(queue)) end
  end

  local strangers = { coroutine.close, coroutine.resume, co.close, co.resume }
  local function stranger()
    for _ = 1, random(3) do
      if #coroutines > 0 then
        local how, which = strangers[random(#strangers)], take(coroutines)
        if coroutine.status(which) ~= "normal" then try(how, which) end
        if chance(1, 2) then collectgarbage() end
      end
      if #tasks > 0 and chance(1, 3) then take(tasks):cancel() end
      if chance(1, 10) then
        local i = random(5)
        sources[i]:try_set_result()
        sources[i] = flow.TaskCompletionSource()
      end
      run_queue()
      if chance(1, 3) then condition:notify_all() end
      if chance(1, 3) then channel:try_read() end
      if chance(1, 3) then channel:try_write(2) end
    end
  end

  for i = 1, TASKS do
    keep(flow.spawn(function()
      note()
      try(body, 1)
    end))
    flow.yield()
    stranger()
    if i % 10 == 0 then flow.sleep(0.001) end
  end

  left = 0
  coroutines, tasks, tokens, sources = {}, {}, {}, {}
  for _, each in ipairs { semaphore, barrier, lock, rooms, event, condition } do each:dispose() end
  channel:complete()
  make_things() -- the old ones are garbage, and so is who still waits for them
  for _ = 1, 10 do
    flow.sleep(1)
    run_queue()
    helper.collect()
  end
  judge()
end

describe("a random program whose coroutines strangers close", function()
  setup(function() flow.on_unobserved_exception(false) end)
  teardown(function()
    collectgarbage()
    flow.on_unobserved_exception(nil)
  end)

  for seed = 1, helper.seeds(6, 1) do
    it("comes to an end, and leaves nothing behind: seed " .. seed, function()
      collectgarbage("stop")
      local _ <close> = closing(function() collectgarbage("restart") end)
      testing.run(function() play(support.random(seed)) end, { seed = seed % 2 == 0 and seed })
    end)
  end
end)
