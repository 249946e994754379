-- mischief.lua - what random programs share that do what nobody should: the errors that they may meet, and a play in
-- which finalizers and callbacks do anything, at any time.
--
-- There are no models of them, since nobody has promised what such programs do. But each ends, meets no error but those
-- of the library and of Lua, and leaves nothing behind.

local core = require "coflow.core"
local flow = require "coflow"
local finalizers = require "spec.support.finalizers"
local helper = require "spec.helper"
local support = require "spec.support.flow_support"

local mischief = {}

-- What may be raised but for the library's own errors.
local told = {
  "on purpose$", "cannot close a %a+ coroutine", "cannot resume %a[%a-]* coroutine", "C stack overflow",
  "^error in error handling$",
}

local function is_known(err)
  if type(err) == "table" then return flow.errors.is(err, err.name) end
  for _, pattern in ipairs(told) do
    if type(err) == "string" and err:find(pattern) then return true end
  end
  return false
end

---A function try(fn, ...), as pcall, and one that raises if any error has come out of it that nobody makes.
function mischief.new_judge()
  local wrong
  local function try(...)
    local ok, err = pcall(...)
    if not ok and not wrong and not is_known(err) then wrong = "an error that nobody makes: " .. tostring(err) end
    return ok, err
  end
  return try, function()
    if wrong then error(wrong, 0) end
  end
end

-- Calls fn outside every task, in virtual time; nothing may be left then.
local function virtually(fn, seed)
  core.testing.begin(true, 0, 0.01, seed)
  local _ <close> = helper.closing(core.testing.finish)
  fn()
  core.testing.settle()
  local left = core.testing.left()
  if #left > 0 then error("left behind: " .. table.concat(left, "\n\t"), 0) end
end

local ROUNDS, STEPS, SLOTS, NESTED = 3, 40, 12, 5

local function play(random)
  local try, judge = mischief.new_judge()
  local busy, depth, acts = true, 0, nil

  local function chance(n, of) return random(of) <= n end
  local function either(a, b) if chance(1, 2) then return a end return b end
  local function time() return random(512) / 2 ^ 20 end
  local function act() try(acts[random(#acts)]) end

  -- Somebody's code that is called: n times of `of` it does anything.
  local function hook(n, of)
    if not busy or depth == NESTED or not chance(n, of) then return end
    depth = depth + 1
    act()
    depth = depth - 1
  end

  local tasks, coroutines, completions, sources, groups, colds, queue = {}, {}, {}, {}, {}, {}, {}
  local function put(list, x)
    list[#list > SLOTS and random(#list) or #list + 1] = x
    return x
  end
  local function with(list, fn)
    return function()
      if #list > 0 then fn(list[random(#list)]) end
    end
  end
  local everybody, count = setmetatable({}, { __mode = "v" }), 0
  local function note()
    put(coroutines, (coroutine.running()))
    count = count + 1
    everybody[count] = flow.current_task()
  end
  local function never() return put(completions, flow.TaskCompletionSource()).task end
  local function new_source(...) return put(sources, flow.CancellationTokenSource(...)) end
  local function any() return tasks[random(SLOTS)] or flow.delay(0) end

  local plain = flow.AsyncLocal()
  local watched = flow.AsyncLocal { value_changed = function()
    hook(1, 5)
    if chance(1, 10) then error("on purpose", 0) end
  end }
  local limited = flow.TaskScheduler.limited(2)
  local scheduler = flow.TaskScheduler.new { queue_task = function(self, task)
    hook(1, 10)
    local function execute() self:try_execute_task(task) end
    if chance(1, 4) then execute()
    elseif chance(1, 15) then error("on purpose", 0)
    else queue[#queue + 1] = execute end
  end }
  local context = flow.SynchronizationContext.new { post = function(_, fn)
    hook(1, 10)
    if chance(1, 2) then fn() else queue[#queue + 1] = fn end
  end }

  acts = {
    with(coroutines, coroutine.close),
    with(coroutines, function(co) coroutine.resume(co, 1, 2) end),
    with(tasks, function(task) task:cancel() end),
    with(tasks, function(task) return task:traceback(), task.status, task.name end),
    with(tasks, function(task) task:wait(time()) end),
    with(tasks, function(task) flow.await_any(task, flow.delay(time())) end),
    with(completions, function(source) source:try_set_result(1) end),
    with(completions, function(source) source:try_set_exception("on purpose") end),
    with(sources, function(source) source:cancel() end),
    with(sources, function(source) source:cancel_after(0) end),
    with(sources, function(source) source:try_reset() end),
    with(sources, function(source) source:dispose() end),
    with(groups, function(group) group:cancel() end),
    with(groups, function(group) group:stop() end),
    with(groups, function(group) return group.token end),
    with(groups, function(group) put(tasks, group:spawn(flow.yield)) end),
    with(colds, function(task) task:run_synchronously() end),
    with(colds, function(task) task:start(either(scheduler)) end),
    with(colds, function(task) task:cancel() end),
    function() plain:set(random(3)) end,
    function() watched:set(random(3)) end,
    function() return flow.cancellation_token() end,
    function() flow.run(flow.yield) end,
    function() flow.loop.run "nowait" end,
    function() flow.async(function() watched:set(random(9)) flow.yield() end)() end,
    function() put(tasks, flow.async(function() note() any():await() end)()) end,
    function() if #queue > 0 then table.remove(queue)() end end,
  }

  local body
  local steps = {
    function() flow.yield() end,
    function() flow.sleep(time()) end,
    function() any():await() end,
    function() never():await() end,
    function() flow.await_any(any(), never(), any()) end,
    function() flow.await_all(any(), any()) end,
    function() put(tasks, any():wait_async(time())):await() end,
    function() for _ in flow.when_each { any(), flow.delay(time()) } do hook(1, 5) end end,
    function() flow.with_timeout(time(), function() never():await() end) end,
    function() flow.with_cancellation(new_source().token, function() never():await() end) end,
    function() flow.race { body(), body() } end,
    function()
      flow.task_group(function(group)
        put(groups, group)
        for _ = 1, random(4) do put(tasks, group:spawn(body())) end
        if chance(1, 2) then flow.yield() end
      end, { limit = random(3), policy = ({ "fail_fast", "supervise", "first_success" })[random(3)],
        grace = either(time()) })
    end,
    function()
      local gen = flow.coroutine.wrap(function()
        note()
        flow.yield()
        flow.coroutine.yield(1)
        flow.sleep(time())
      end)
      gen()
      gen()
    end,
    function()
      flow.SynchronizationContext.set(context)
      flow.yield()
    end,
    function()
      put(tasks, any():continue_with(body(), { scheduler = either(scheduler), token = either(new_source().token) }))
    end,
    function()
      local source = put(sources, flow.CancellationTokenSource.linked(flow.cancellation_token(),
        new_source(time()).token))
      source.token:register(function()
        hook(1, 2)
        plain:set(1)
      end)
      flow.sleep(time(), source.token)
    end,
  }
  function body()
    return function()
      note()
      if chance(1, 2) then watched:set(random(5)) end
      local _ <close> = helper.closing(function()
        hook(1, 2)
        if chance(1, 8) then try(flow.yield) end
      end)
      for _ = 1, random(3) do
        if busy then try(steps[random(#steps)]) end
      end
      if chance(1, 4) then error("on purpose", 0) end
      return 1
    end
  end

  local starts = {
    function() put(tasks, flow.spawn(body())) end,
    function() put(tasks, flow.async(body())()) end,
    function() put(tasks, flow.spawn_on(scheduler, body())) end,
    function() put(tasks, flow.spawn_on(limited, body())) end,
    function() put(colds, put(tasks, flow.Task.new(body()))) end,
    flow.yield, act,
  }
  local function main()
    for _ = 1, STEPS do
      try(starts[random(#starts)])
      if #queue > 0 then try(table.remove(queue)) end
    end
  end

  flow.on_unobserved_exception(function() hook(1, 3) end)
  finalizers.always(function() if chance(1, 10) then act() end end, function()
    for _ = 1, ROUNDS do
      for _ = 1, 5 do hook(1, 1) end
      try(flow.run, main)
    end
  end)

  -- The end: what somebody could still do is done, the rest is garbage, and who waits for each other is canceled.
  busy = false
  local function settle(fn, ...)
    for _ = 1, 5 do
      while #queue > 0 do try(table.remove(queue)) end
      try(flow.run, fn, ...)
    end
  end
  for _, source in ipairs(completions) do source:try_set_result() end
  settle(flow.sleep, 1)
  for _, list in ipairs { tasks, coroutines, completions, sources, groups, colds } do
    for i = #list, 1, -1 do list[i] = nil end
  end
  settle(helper.collect)
  for i = 1, count do
    if everybody[i] then everybody[i]:cancel() end
  end
  settle(helper.collect)
  judge()
end

---Plays what comes of a seed, outside every task: tasks of all kinds, during which finalizers, at any allocation, and
---whatever is called, do anything. The handler of unobserved exceptions is changed.
function mischief.play(seed)
  virtually(function() play(support.random(seed)) end, seed % 2 == 0 and seed or nil)
end

return mischief
