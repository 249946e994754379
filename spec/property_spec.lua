-- Random programs, run by coflow and by a model of a few screens; both must tell the same story, event by
-- event. The model is plain coroutines, one ready queue, one list of deadlines and copied tables.

local flow = require "coflow"
local testing = require "coflow.testing"
local helper = require "spec.helper"
local support = require "spec.support.flow_support"

local in_task, recorder, random_of = support.in_task, support.recorder, support.random
local in_order = support.in_order

local KEYS, NAPS, PROMISES = 3, 12, 4

---- Programs: trees of operations, made from a seed -----------------------------------------------

local function generate(seed)
  local random = random_of(seed)
  local programs, naps = 0, 0
  local block

  local function program(depth)
    programs = programs + 1
    local id = programs
    return { id = id, body = block(depth, 4 + random(6), false) }
  end

  local makers = {
    { "set", 6, function() return random(KEYS), random(4) > 1 and random(9) or nil end },
    { "get", 4, function() return random(KEYS) end },
    { "yield", 4, function() end },
    { "sleep", 5, function() return (random(6) - 1) / 4 end },
    { "nap", 4, function()
      naps = naps + 1
      return naps, (random(6) - 1) / 2
    end },
    { "cancel", 4, function() return random(NAPS) end },
    { "spawn", 4, function(depth) return program(depth - 1) end },
    { "start", 4, function(depth) return program(depth - 1) end },
    { "await", 4, function() return random(5) end },
    { "promise_wait", 2, function() return random(PROMISES) end },
    { "promise_set", 3, function() return random(PROMISES), random(9) end },
    { "fail", 1, function() return random(9) end },
    { "with", 3, function(depth, root)
      return random(KEYS), random(9), block(depth - 1, 2 + random(3), root)
    end },
    { "call", 2, function(depth, root) return block(depth - 1, 2 + random(3), root) end },
    { "capture", 3, function() return random(3) end },
    { "within", 3, function(depth, root) return random(3), block(depth - 1, 2 + random(3), root) end },
    { "suppress", 2, function(depth, root) return block(depth - 1, 2 + random(3), root) end },
  }
  local nesting = { spawn = true, start = true, with = true, call = true, within = true,
    suppress = true }
  local not_in_root = { await = true, promise_wait = true, fail = true }
  local total = 0
  for _, maker in ipairs(makers) do total = total + maker[2] end

  local function operation(depth, root)
    while true do
      local at = random(total)
      for _, maker in ipairs(makers) do
        at = at - maker[2]
        if at <= 0 then
          local name = maker[1]
          local fits = (depth > 0 or not nesting[name]) and not (root and not_in_root[name])
            and (name ~= "nap" or naps < NAPS)
          if not fits then break end
          return { name, maker[3](depth, root) }
        end
      end
    end
  end

  function block(depth, length, root)
    local list = {}
    for i = 1, length do list[i] = operation(depth, root) end
    return list
  end

  return { id = 0, body = block(4, 14, true) }
end

---- The interpreter: what a program does to a `world`, which is coflow or the model ----------------

local function interpret(world, root)
  local log, record = recorder()
  local run_task

  local function note(id, ...)
    local parts = table.pack(...)
    for i = 1, parts.n do parts[i] = tostring(parts[i]) end
    record(("%g task %d: %s"):format(world.now(), id, table.concat(parts, " ")))
  end

  local function run_block(me, list)
    local id = me.id
    for _, op in ipairs(list) do
      local name, a, b, c = op[1], op[2], op[3], op[4]
      if name == "set" then world.set(a, b)
      elseif name == "get" then note(id, "get", a, world.get(a))
      elseif name == "yield" then
        world.yield()
        note(id, "yielded")
      elseif name == "sleep" then
        world.sleep(a)
        note(id, "slept", a)
      elseif name == "nap" then note(id, "nap", a, world.nap(a, b))
      elseif name == "cancel" then
        note(id, "cancel", a)
        world.cancel(a)
      elseif name == "spawn" or name == "start" then
        note(id, name, a.id)
        me.children[#me.children + 1] = world[name](run_task, a)
        note(id, "went on")
      elseif name == "await" then
        local child = me.children[a]
        if child then note(id, "awaited child", a, world.try_await(child)) end
      elseif name == "promise_wait" then note(id, "promise", a, world.promise_wait(a))
      elseif name == "promise_set" then note(id, "set promise", a, world.promise_set(a, b))
      elseif name == "fail" then
        note(id, "fails", a)
        error("failure " .. a, 0)
      elseif name == "with" then world.with(a, b, function() run_block(me, c) end)
      elseif name == "call" then world.call(function() run_block(me, a) end)
      elseif name == "suppress" then world.suppress(function() run_block(me, a) end)
      elseif name == "capture" then
        me.contexts[a] = world.capture()
        note(id, "captured", me.contexts[a] ~= nil)
      elseif name == "within" then
        if me.contexts[a] then world.within(me.contexts[a], function() run_block(me, b) end) end
      else error("no operation " .. name) end
    end
  end

  function run_task(program)
    local me = { id = program.id, children = {}, contexts = {} }
    local start = ""
    for key = 1, KEYS do start = start .. " " .. tostring(world.get(key)) end
    note(me.id, "starts with" .. start)
    local ok, err = pcall(run_block, me, program.body)
    if program.id == 0 then
      for promise = 1, PROMISES do world.promise_set(promise, 0) end
    end
    for i, child in ipairs(me.children) do note(me.id, "joined child", i, world.try_await(child)) end
    for key = 1, KEYS do note(me.id, "finally", key, world.get(key)) end
    if not ok then error(err, 0) end
    return "task " .. me.id
  end

  world.main(function() run_task(root) end)
  return log
end

---- coflow ------------------------------------------------------------------------------------------

local function real_world(seed)
  local locals, naps, promises = {}, {}, {}
  for i = 2, KEYS do locals[i] = flow.AsyncLocal() end
  -- The first one is told of its changes: an unbroken chain that ends at the value that is read.
  local last, broken = nil, nil
  locals[1] = flow.AsyncLocal {
    value_changed = function(args)
      if args.previous_value ~= last or args.current_value == last then broken = args end
      last = args.current_value
    end,
  }
  for i = 1, NAPS do naps[i] = flow.CancellationTokenSource() end
  for i = 1, PROMISES do promises[i] = flow.TaskCompletionSource() end
  local start
  return {
    main = function(fn)
      testing.run(function(clock)
        start = clock:now()
        fn()
      end, { seed = seed or false })
      assert.is_nil(broken)
      for _, source in ipairs(naps) do source:dispose() end
    end,
    now = function() return flow.loop.now() - start end,
    set = function(k, v) locals[k].value = v end,
    get = function(k)
      local value = locals[k].value
      if k == 1 and (broken or value ~= last) then error("value_changed missed a change") end
      return value
    end,
    yield = flow.yield,
    sleep = flow.sleep,
    nap = function(i, seconds)
      local ok, err = pcall(flow.sleep, seconds, naps[i].token)
      if not ok and not flow.errors.is(err, "OperationCanceled") then error(err, 0) end
      return ok
    end,
    cancel = function(i) naps[i]:cancel() end,
    spawn = flow.spawn,
    start = function(fn, program) return flow.async(fn)(program) end,
    try_await = flow.try_await,
    promise_wait = function(i) return flow.await(promises[i].task) end,
    promise_set = function(i, v) return promises[i]:try_set_result(v) end,
    with = function(k, v, fn)
      local _ <close> = locals[k]:with(v)
      fn()
    end,
    call = flow.call,
    capture = flow.ExecutionContext.capture,
    within = flow.ExecutionContext.run,
    suppress = function(fn)
      local _ <close> = flow.ExecutionContext.suppress_flow()
      fn()
    end,
  }
end

---- The model -----------------------------------------------------------------------------------------

local function model_world()
  local clock, sequence, current = 0, 0, nil
  local ready, first, last = {}, 1, 0
  local deadlines, naps, promises = {}, {}, {}
  for i = 1, NAPS do naps[i] = { canceled = false } end
  for i = 1, PROMISES do promises[i] = { waiters = {} } end
  local empty = {}

  local function push(task, value)
    last = last + 1
    ready[last] = { task = task, value = value }
  end

  local function resume(task, value)
    local previous = current
    current = task
    local ok, err = coroutine.resume(task.thread, value)
    current = previous
    if not ok then error(err, 0) end
  end

  local function new_task(fn, ...)
    local task, arguments = { waiters = {}, suppressed = false }, table.pack(...)
    task.context = current and not current.suppressed and current.context or empty
    task.thread = coroutine.create(function()
      task.ok, task.value = pcall(fn, table.unpack(arguments, 1, arguments.n))
      task.done = true
      for _, waiter in ipairs(task.waiters) do push(waiter) end
    end)
    return task
  end

  local function sleep(seconds, nap)
    if seconds == 0 then return true end
    sequence = sequence + 1
    local deadline = { due = clock + seconds, sequence = sequence, task = current }
    deadlines[#deadlines + 1] = deadline
    if nap then nap.deadline = deadline end
    return coroutine.yield()
  end

  -- Everything due next, in the order it was set.
  local function advance()
    table.sort(deadlines, function(a, b)
      if a.due ~= b.due then return a.due < b.due end
      return a.sequence < b.sequence
    end)
    clock = deadlines[1].due
    while deadlines[1] and deadlines[1].due == clock do
      push(table.remove(deadlines, 1).task, true)
    end
  end

  -- Runs fn with what `enter` does to the current task undone afterwards.
  local function protected(task, fn, leave)
    local ok, err = pcall(fn)
    leave(task)
    if not ok then error(err, 0) end
  end

  local function set(k, v)
    local changed = {}
    for key, value in pairs(current.context) do changed[key] = value end
    changed[k] = v
    current.context = changed
  end

  local function isolated(context, suppressed, fn)
    local task = current
    local old_context, old_suppressed = task.context, task.suppressed
    task.context, task.suppressed = context, suppressed
    protected(task, fn, function()
      task.context, task.suppressed = old_context, old_suppressed
    end)
  end

  local world = { set = set }
  function world.now() return clock end
  function world.get(k) return current.context[k] end
  function world.yield()
    push(current)
    coroutine.yield()
  end
  function world.sleep(seconds) sleep(seconds) end
  function world.nap(i, seconds)
    if naps[i].canceled then return false end
    return sleep(seconds, naps[i])
  end
  function world.cancel(i)
    local nap = naps[i]
    if nap.canceled then return end
    nap.canceled = true
    for n, deadline in ipairs(deadlines) do
      if deadline == nap.deadline then
        table.remove(deadlines, n)
        push(deadline.task, false)
        return
      end
    end
  end
  function world.spawn(fn, program)
    local task = new_task(fn, program)
    push(task)
    return task
  end
  function world.start(fn, program)
    local task = new_task(fn, program)
    resume(task)
    return task
  end
  function world.try_await(task)
    if not task.done then
      table.insert(task.waiters, current)
      coroutine.yield()
    end
    return task.ok, task.value
  end
  function world.promise_wait(i)
    local promise = promises[i]
    if not promise.done then
      table.insert(promise.waiters, current)
      coroutine.yield()
    end
    return promise.value
  end
  function world.promise_set(i, v)
    local promise = promises[i]
    if promise.done then return false end
    promise.done, promise.value = true, v
    for _, waiter in ipairs(promise.waiters) do push(waiter) end
    return true
  end
  function world.with(k, v, fn)
    local old = current.context[k]
    set(k, v)
    protected(current, fn, function() set(k, old) end)
  end
  function world.call(fn) isolated(current.context, current.suppressed, fn) end
  function world.within(context, fn) isolated(context, false, fn) end
  function world.capture() return not current.suppressed and current.context or nil end
  function world.suppress(fn)
    local task, before = current, current.suppressed
    task.suppressed = true
    protected(task, fn, function() task.suppressed = before end)
  end
  function world.main(fn)
    local root = new_task(fn)
    push(root)
    while not root.done do
      if first > last then advance() end
      local entry = ready[first]
      ready[first] = nil
      first = first + 1
      resume(entry.task, entry.value)
    end
    if not root.ok then error(root.value, 0) end
  end
  return world
end

describe("a random program", function()
  for seed = 1, helper.seeds(30, 5) do
    it("does what the model says, event by event: seed " .. seed, function()
      local program = generate(seed)
      local expected = interpret(model_world(), program)
      local got = interpret(real_world(), program)
      assert.is_true(#expected > 10)
      for i = 1, math.max(#expected, #got) do
        if expected[i] ~= got[i] then
          error(("event %d of %d\n  expected: %s\n  got:      %s\n  after:    %s"):format(i, #expected,
            expected[i], got[i], table.concat(expected, "\n            ", math.max(1, i - 8), i - 1)))
        end
      end
    end)
  end

  it("takes the same course every time", function()
    local program = generate(99)
    assert.same(interpret(real_world(), program), interpret(real_world(), program))
  end)

  -- The order differs, what depends on it too; that every task runs to its end, that contexts keep to
  -- themselves and that nobody hangs does not. And a seed is a course.
  local varied = 0
  for seed = 1, support.many(15, 2) do
    it("ends, in some order, whatever the seed: program " .. seed, function()
      local program, courses = generate(seed), {}
      for order = 1, support.many(12, 2) do
        local course = interpret(real_world(order), program)
        courses[table.concat(course, "\n")] = true
        assert.same(course, interpret(real_world(order), program))
        assert.truthy(course[#course]:find("task 0: finally", 1, true))
      end
      if next(courses, next(courses)) then varied = varied + 1 end
    end)
  end

  it("takes more than one course, if it has more than one", function()
    assert.is_true(varied > support.many(15, 2) // 2)
  end)
end)

describe("a random graph of linked sources", function()
  for seed = 1, helper.seeds(8, 2) do
    it("is canceled just where it is reached, every callback once: seed " .. seed, in_task(function()
      local random = random_of(1000 + seed)
      local sources, parents, counts, disposed = {}, {}, {}, {}
      local canceled = {}
      for i = 1, 200 do
        local tokens = {}
        parents[i] = {}
        for n = 1, random(4) - 1 do
          local parent = i > 1 and random(i - 1)
          if parent and not disposed[parent] then
            parents[i][#parents[i] + 1] = parent
            tokens[#tokens + 1] = sources[parent].token
          end
          if n == 2 and random(10) == 1 then tokens[#tokens + 1] = flow.CancellationToken.none end
        end
        sources[i] = #tokens > 0 and flow.CancellationTokenSource.linked(table.unpack(tokens))
          or flow.CancellationTokenSource()
        for _, parent in ipairs(parents[i]) do canceled[i] = canceled[i] or canceled[parent] end
        counts[i] = 0
        if not canceled[i] then
          sources[i].token:register(function() counts[i] = counts[i] + 1 end)
        else
          counts[i] = 1
        end
        if random(12) == 1 then
          local victim = random(i)
          if not disposed[victim] and not canceled[victim] then
            sources[victim]:dispose()
            disposed[victim] = true
          end
        end
        if random(25) == 1 then
          local start = random(i)
          if not disposed[start] then
            sources[start]:cancel("by " .. start)
            canceled[start] = true
            for child = start + 1, i do
              for _, parent in ipairs(parents[child]) do
                if canceled[parent] and not disposed[child] then canceled[child] = true end
              end
            end
          end
        end
        for n = 1, i do
          if sources[n].is_cancellation_requested ~= (canceled[n] or false)
            or counts[n] ~= (canceled[n] and 1 or 0) then
            error(("source %d of %d: %s, %d callbacks"):format(n, i,
              tostring(sources[n].is_cancellation_requested), counts[n]))
          end
        end
      end
      for i = 1, 200 do sources[i]:dispose() end
    end))
  end
end)

describe("random registrations", function()
  for seed = 1, helper.seeds(8, 2) do
    it("run newest first, without those that were removed: seed " .. seed, in_task(function()
      local random = random_of(2000 + seed)
      local events, record = recorder()
      local source <close> = flow.CancellationTokenSource()
      local list, expected = {}, {}
      for step = 1, 400 do
        local victim = #list > 0 and random(#list)
        if random(3) > 1 or not victim then
          local early = #list > 0 and random(10) == 1 and list[random(#list)]
          list[#list + 1] = { step = step, early = early, registration = source.token:register(function()
            record(step)
            if early then early.registration:dispose() end
          end) }
        else
          assert.is_true(table.remove(list, victim).registration:unregister())
        end
      end
      local gone = {}
      for i = #list, 1, -1 do
        if not gone[list[i]] then
          expected[#expected + 1] = list[i].step
          if list[i].early then gone[list[i].early] = true end
        end
      end
      source:cancel()
      assert.same(expected, events)
    end))
  end
end)

describe("random deadlines", function()
  for seed = 1, helper.seeds(8, 2) do
    it("fire in order, without those that were canceled or moved: seed " .. seed,
      in_order(function(clock)
        local random = random_of(3000 + seed)
        local events, record = recorder()
        local start, sources, expected = clock:now(), {}, {}
        for i = 1, 150 do
          sources[i] = { i = i, source = flow.CancellationTokenSource() }
          sources[i].source.token:register(function()
            record(("%d at %g"):format(i, clock:now() - start))
          end)
        end
        for set = 1, 600 do
          local each = sources[random(150)]
          local seconds = random(6) > 1 and random(40) / 4 or math.huge
          each.source:cancel_after(seconds)
          each.due, each.set = seconds, set
        end
        for _, each in ipairs(sources) do
          if each.due and each.due < math.huge then expected[#expected + 1] = each end
        end
        table.sort(expected, function(a, b)
          if a.due ~= b.due then return a.due < b.due end
          return a.set < b.set
        end)
        for n, each in ipairs(expected) do expected[n] = ("%d at %g"):format(each.i, each.due) end
        flow.sleep(20)
        assert.same(expected, events)
        for _, each in ipairs(sources) do each.source:dispose() end
      end))
  end
end)
