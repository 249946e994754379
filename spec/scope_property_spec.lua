-- Random trees of tasks, scopes, groups and shields, canceled and timed out at random virtual times, run by coflow
-- and by a model of a few screens. The model knows no trees of members, no tokens and no marks: whether a task is
-- canceled is asked by walking up from the scope that it is in, each time.
--
-- Every wake is followed by a pause of a length of its own, under a shield: so no two things happen at the same
-- time, and each task must tell the same story, event by event.

local flow = require "coflow"
local testing = require "coflow.testing"
local helper = require "spec.helper"
local support = require "spec.support.flow_support"

local random_of, closing = support.random, helper.closing

local SOURCES = 4

---- Programs: trees of operations, made from a seed -----------------------------------------------

local function generate(seed)
  local random = random_of(7000 + seed)
  local programs, pauses = 0, 0
  local block

  local function time() return (random(8000) + random(1000) / 1024) / 1024 end
  local function program(depth)
    programs = programs + 1
    local id = programs
    return { id = id, body = block(depth, 2 + random(4)) }
  end
  local function nested(depth) return block(depth - 1, 1 + random(4)) end

  local makers = {
    { "sleep", 8, function() return time() end },
    { "yield", 1, function() end },
    { "look", 3, function() end },
    { "fail", 2, function() end },
    { "cancel_task", 2, function() return random(12) end },
    { "cancel_source", 1, function() return random(SOURCES) end },
    { "cancel_group", 1, function() end },
    { "await", 4, function() return random(4), random(2) == 1 end },
    { "spawn", 5, function(depth) return program(depth - 1) end },
    { "group_spawn", 5, function(depth) return program(depth - 1) end },
    { "timeout", 5, function(depth) return time(), nested(depth) end },
    { "shield", 2, function(depth) return random(2) == 1 and time() or nil, nested(depth) end },
    { "linked", 2, function(depth) return random(SOURCES), nested(depth) end },
    { "close", 3, function(depth) return nested(depth), nested(depth) end },
    { "group", 5, function(depth)
      local policy = ({ "fail_fast", "supervise", "first_success" })[random(3)]
      return { policy = policy, limit = random(2) == 1 and random(2) or nil }, nested(depth)
    end },
  }
  local deep = { spawn = true, group_spawn = true, timeout = true, shield = true, linked = true, close = true,
    group = true }
  local total = 0
  for _, maker in ipairs(makers) do total = total + maker[2] end

  local function operation(depth)
    while true do
      local at = random(total)
      for _, maker in ipairs(makers) do
        at = at - maker[2]
        if at <= 0 then
          if deep[maker[1]] and (depth == 0 or programs > 40) then break end
          local a, b, c = maker[3](depth)
          pauses = pauses + 1
          return { maker[1], a, b, c, n = pauses, pause = (pauses * 64 + random(63)) / 2 ^ 26,
            again = random(3) > 1 }
        end
      end
    end
  end

  function block(depth, length)
    local list = {}
    for i = 1, length do list[i] = operation(depth) end
    return list
  end

  return { id = 0, body = block(5, 8) }
end

---- The interpreter: what a program does to a `world`, which is coflow or the model ----------------

local function interpret(world, root)
  local stories, tasks, order, opened, closed = {}, {}, {}, 0, 0
  local run_task

  local function run_block(me, list)
    local function note(op, ...)
      local words = table.pack(("%.9f"):format(world.now()), op.n, op[1], ...)
      for i = 1, words.n do words[i] = tostring(words[i]) end
      me.story[#me.story + 1] = table.concat(words, " ")
    end
    -- What may suspend, or open a scope: afterwards a pause, then the error goes on, or does not.
    local function try(op, goes_on, fn, ...)
      local ok, err = pcall(fn, ...)
      world.pause(op.pause)
      note(op, ok, ok and "" or world.name(err))
      if not ok and goes_on then error(err, 0) end
      return ok, err
    end

    for _, op in ipairs(list) do
      local name, a, b = op[1], op[2], op[3]
      if name == "sleep" then try(op, true, world.sleep, a)
      elseif name == "yield" then try(op, true, world.yield)
      elseif name == "look" then note(op, world.canceled(), world.deadline())
      elseif name == "fail" then error("failure " .. me.id .. "." .. op.n, 0)
      elseif name == "cancel_task" then
        if tasks[a] then note(op, a, world.cancel_task(tasks[a])) end
      elseif name == "cancel_source" then world.cancel_source(a)
      elseif name == "cancel_group" then
        if me.group then note(op, world.cancel_group(me.group)) end
      elseif name == "await" then
        if me.children[a] then try(op, b, world.await, me.children[a]) end
      elseif name == "spawn" or name == "group_spawn" then
        local child
        if name == "spawn" then child = world.spawn(run_task, a)
        elseif me.group then
          local ok, task = pcall(world.group_spawn, me.group, run_task, a, me.group)
          note(op, ok)
          child = ok and task or nil
        end
        if child then
          tasks[a.id] = child
          order[#order + 1] = a.id
          me.children[#me.children + 1] = child
        end
      elseif name == "timeout" then try(op, op.again, world.timeout, a, run_block, me, b)
      elseif name == "shield" then try(op, op.again, world.shield, a, run_block, me, b)
      elseif name == "linked" then try(op, op.again, world.linked, a, run_block, me, b)
      elseif name == "close" then
        opened = opened + 1
        local _ <close> = closing(function(err)
          closed = closed + 1
          world.pause(op.pause)
          note(op, "closing", err ~= nil and world.name(err))
          pcall(world.shield, nil, run_block, me, a)
        end)
        run_block(me, b)
      elseif name == "group" then
        local outer = me.group
        try(op, op.again, world.group, a, function(group)
          me.group = group
          local _ <close> = closing(function() me.group = outer end)
          run_block(me, b)
          return "the body's"
        end)
      else error("no operation " .. name) end
    end
  end

  function run_task(program, group)
    local me = { id = program.id, children = {}, group = group, story = {} }
    assert(stories[me.id] == nil, "started twice")
    stories[me.id] = me.story
    opened = opened + 1
    local _ <close> = closing(function() closed = closed + 1 end)
    world.pause((program.id * 64 + 63) / 2 ^ 26)
    run_block(me, program.body)
    return "the child's " .. me.id
  end

  local ended, hang = pcall(world.main, function()
    pcall(run_task, root)
    local i = 1
    while order[i] do
      local ok, value = world.try_await(tasks[order[i]])
      stories["end of " .. order[i]] = { ok and value or world.name(value), world.status(tasks[order[i]]) }
      i = i + 1
    end
  end)
  if ended then
    assert(opened == closed, "a <close> variable was not closed, or twice")
  elseif world.name(hang) ~= "InvalidOperation" then
    error(hang, 0)
  end
  stories.all = { ended and "ended" or "hangs" }
  return stories
end

---- coflow ------------------------------------------------------------------------------------------

-- Failures that tasks have from each other may count as one or several where a `<close>` handler has seen others
-- on the way (the specs of groups have the plain cases): so each counts once here, and one alone is itself.
local function describe_aggregate(err, name)
  local words, seen = {}, {}
  for i = 1, err.inner_exceptions.n or #err.inner_exceptions do
    local word = name(err.inner_exceptions[i])
    if not seen[word] then words[#words + 1] = word end
    seen[word] = true
  end
  return words[2] and "Aggregate{" .. table.concat(words, ", ") .. "}" or words[1]
end

local function real_world()
  local sources = {}
  for i = 1, SOURCES do sources[i] = flow.CancellationTokenSource() end
  local world = {
    main = function(fn)
      testing.run(fn)
      for _, source in ipairs(sources) do source:dispose() end
      assert(not flow.loop.is_alive(), "something is left alive")
    end,
    now = flow.loop.now,
    sleep = flow.sleep,
    yield = flow.yield,
    pause = function(seconds) flow.shield(flow.sleep, seconds) end,
    canceled = function() return flow.cancellation_token().is_cancellation_requested end,
    deadline = function()
      local left = flow.deadline()
      return left and ("%.9f"):format(left)
    end,
    cancel_task = function(task) return task:cancel() end,
    cancel_source = function(i) sources[i]:cancel() end,
    cancel_group = function(group) return group:cancel() end,
    await = flow.await,
    try_await = flow.try_await,
    spawn = flow.spawn,
    group_spawn = function(group, ...) return group:spawn(...) end,
    timeout = flow.with_timeout,
    shield = function(grace, ...) return flow.shield({ grace = grace }, ...) end,
    linked = function(i, ...) return flow.with_cancellation(sources[i].token, ...) end,
    group = function(options, fn) return flow.task_group(fn, options) end,
    status = function(task) return task.status end,
  }
  function world.name(err)
    if type(err) == "string" then return err end
    return err.name == "Aggregate" and describe_aggregate(err, world.name) or err.name
  end
  return world
end

---- The model -----------------------------------------------------------------------------------------

local function model_world()
  local clock, current, root = 0, nil, nil
  local ready, first, last = {}, 1, 0
  local tasks, deadlines, groups, sources = {}, {}, {}, {}
  for i = 1, SOURCES do sources[i] = { canceled = false, scopes = {} } end
  local world = {}

  local function canceled_error() return { name = "OperationCanceled" } end
  local function is_canceled_error(err) return type(err) == "table" and err.name == "OperationCanceled" end

  local function canceled(scope)
    while scope do
      if scope.canceled then return true end
      scope = not scope.shield and scope.parent
    end
    return false
  end

  local function push(task, interrupted)
    last = last + 1
    ready[last] = { task = task, interrupted = interrupted }
    task.waits = false
  end

  -- Suspends the current task until push(); raises at once, or when it is interrupted.
  local function suspend(deaf_until_pushed)
    if canceled(current.scope) then error(canceled_error(), 0) end
    current.waits = not deaf_until_pushed
    if coroutine.yield() then error(canceled_error(), 0) end
  end

  -- Queued children of a canceled group never start; one that is canceled itself does, in its turn.
  local function discard(group)
    if not canceled(group.scope) then return end
    for i = #group.queue, 1, -1 do
      local child = table.remove(group.queue, i)
      child.done, child.ok, child.value = true, false, canceled_error()
      for _, waiter in ipairs(child.waiters) do
        if waiter.waits == child then push(waiter) end
      end
    end
  end

  local function cancel(scope)
    if canceled(scope) then return false end
    scope.canceled = true
    for _, task in ipairs(tasks) do
      if task.waits and canceled(task.scope) then
        if task.timer then task.timer.off = true end
        push(task, true)
      end
    end
    for _, group in ipairs(groups) do discard(group) end
    return true
  end

  local function at(seconds, fn)
    local timer = { due = clock + seconds, fn = fn }
    deadlines[#deadlines + 1] = timer
    return timer
  end

  local function open(scope)
    scope.parent, scope.outer = current.scope, current.scope
    current.scope = scope
    if scope.seconds then
      scope.timer = at(scope.seconds, function() scope.expired = cancel(scope) end)
    end
    return scope
  end

  local function close(scope)
    if scope.timer then scope.timer.off = true end
    scope.ended = true
    current.scope = scope.outer
  end

  local function within(scope, fn, ...)
    open(scope)
    local result = table.pack(pcall(fn, ...))
    close(scope)
    if result[1] then return table.unpack(result, 2, result.n) end
    if scope.expired and not scope.shield and is_canceled_error(result[2]) then error({ name = "Timeout" }, 0) end
    error(result[2], 0)
  end

  local function new_task(parent, fn, ...)
    local task, arguments = { waiters = {}, scope = { parent = parent } }, table.pack(...)
    task.base = task.scope
    task.thread = coroutine.create(function()
      task.ok, task.value = pcall(fn, table.unpack(arguments, 1, arguments.n))
      task.done = true
      for _, waiter in ipairs(task.waiters) do
        if waiter.waits == task then push(waiter) end
      end
    end)
    tasks[#tasks + 1] = task
    return task
  end

  local function resume(task, interrupted)
    local before = current
    current = task
    local ok, err = coroutine.resume(task.thread, interrupted)
    current = before
    if not ok then error(err, 0) end
  end

  function world.now() return clock end
  function world.sleep(seconds)
    local me = current
    me.timer = at(seconds, function() push(me) end)
    local ok, err = pcall(suspend)
    me.timer.off = true
    me.timer = nil
    if not ok then error(err, 0) end
  end
  function world.yield()
    if canceled(current.scope) then error(canceled_error(), 0) end
    push(current)
    coroutine.yield()
  end
  function world.pause(seconds) within({ shield = true }, world.sleep, seconds) end
  function world.canceled() return canceled(current.scope) end
  function world.deadline()
    local due, scope = math.huge, current.scope
    while scope do
      if scope.timer and not scope.ended then due = math.min(due, scope.timer.due) end
      scope = not scope.shield and scope.parent
    end
    return due < math.huge and ("%.9f"):format(math.max(due - clock, 0)) or nil
  end
  function world.cancel_task(task) return not task.done and cancel(task.base) end
  function world.cancel_source(i)
    local source = sources[i]
    if source.canceled then return end
    source.canceled = true
    for _, scope in ipairs(source.scopes) do
      if not scope.ended then cancel(scope) end
    end
  end
  function world.cancel_group(group) return not group.ended and cancel(group.scope) end
  function world.try_await(task)
    if not task.done then
      table.insert(task.waiters, current)
      if canceled(current.scope) then error(canceled_error(), 0) end
      current.waits = task
      if coroutine.yield() then error(canceled_error(), 0) end
    end
    task.observed = true
    return task.ok, task.value
  end
  function world.await(task)
    local ok, value = world.try_await(task)
    if not ok then error(value, 0) end
    return value
  end
  function world.spawn(fn, ...)
    local task = new_task(current.scope, fn, ...)
    push(task)
    return task
  end
  function world.timeout(seconds, ...) return within({ seconds = seconds }, ...) end
  function world.shield(grace, ...) return within({ shield = true, seconds = grace }, ...) end
  function world.linked(i, ...)
    if sources[i].canceled then error(canceled_error(), 0) end
    local scope = {}
    table.insert(sources[i].scopes, scope)
    return within(scope, ...)
  end

  local function start(group, child)
    group.running = group.running + 1
    push(child)
  end
  function world.group_spawn(group, fn, ...)
    if group.ended then error({ name = "InvalidOperation" }, 0) end
    local child
    child = new_task(group.scope, function(...)
      local ok, value = pcall(fn, ...)
      if not ok and not is_canceled_error(value) then
        table.insert(group.failures, { task = child, err = value })
        if group.policy == "fail_fast" then cancel(group.scope) end
      elseif ok and group.policy == "first_success" and not group.winner and not group.body_raised then
        group.winner = { value = value }
        cancel(group.scope)
      end
      group.running = group.running - 1
      if group.queue[1] then start(group, table.remove(group.queue, 1)) end
      if group.running == 0 and group.host.waits == group then push(group.host) end
      if not ok then error(value, 0) end
      return value
    end, ...)
    group.children = true
    if group.running < group.limit then
      start(group, child)
    else
      table.insert(group.queue, child)
      discard(group)
    end
    return child
  end
  function world.group(options, fn)
    local group = { limit = options.limit or math.huge, policy = options.policy, queue = {}, running = 0,
      failures = {}, host = current, scope = {} }
    groups[#groups + 1] = group
    open(group.scope)
    local ok, value = pcall(fn, group)
    local was_canceled = canceled(group.scope)
    local body_canceled = not ok and is_canceled_error(value)
    if not ok then
      group.body_raised = not body_canceled
      if group.body_raised then table.insert(group.failures, { err = value }) end
      cancel(group.scope)
    end
    open { shield = true }
    while group.running > 0 do
      current.waits = group
      coroutine.yield()
    end
    close(current.scope)
    was_canceled = was_canceled or (ok and canceled(group.scope))
    group.ended = true
    close(group.scope)

    local failures, seen = { n = 0 }, {}
    for _, failure in ipairs(group.failures) do
      local dealt_with = group.policy == "supervise" and failure.task and failure.task.observed
      if not dealt_with and not seen[failure.err] then
        seen[failure.err] = true
        failures.n = failures.n + 1
        failures[failures.n] = failure.err
        failures.task = failure.task
      end
      if failure.task then failure.task.observed = true end
    end
    if group.winner then return group.winner.value end
    if failures.n > 1 or failures.n == 1 and group.policy == "first_success" and failures.task then
      failures.task = nil
      error({ name = "Aggregate", inner_exceptions = failures }, 0)
    elseif failures.n == 1 then error(failures[1], 0) end
    if canceled(current.scope) then error(canceled_error(), 0) end
    if was_canceled then return ok and value or nil end
    if body_canceled then error(value, 0) end
    if group.policy == "first_success" and group.children then error(canceled_error(), 0) end
    return value
  end

  function world.status(task)
    return task.ok and "ran_to_completion" or is_canceled_error(task.value) and "canceled" or "faulted"
  end
  function world.name(err)
    if type(err) == "string" then return err end
    return err.name == "Aggregate" and describe_aggregate(err, world.name) or err.name
  end
  function world.main(fn)
    root = new_task(nil, fn)
    push(root)
    while not root.done do
      if first > last then
        local nearest
        for i = #deadlines, 1, -1 do
          if deadlines[i].off then table.remove(deadlines, i) end
        end
        for i, timer in ipairs(deadlines) do
          if not nearest or timer.due < deadlines[nearest].due then nearest = i end
        end
        if not nearest then error({ name = "InvalidOperation" }, 0) end -- each waits for the other
        local timer = table.remove(deadlines, nearest)
        clock = timer.due
        timer.fn()
      else
        local entry = ready[first]
        ready[first] = nil
        first = first + 1
        resume(entry.task, entry.interrupted)
      end
    end
    if not root.ok then error(root.value, 0) end
  end
  return world
end

---- The comparison ------------------------------------------------------------------------------------

local function compare(expected, got)
  local ids = {}
  for id in pairs(expected) do ids[#ids + 1] = id end
  for id in pairs(got) do
    if not expected[id] then ids[#ids + 1] = id end
  end
  table.sort(ids, function(a, b) return tostring(a) < tostring(b) end)
  local earliest, text
  for _, id in ipairs(ids) do
    local e, g = expected[id] or {}, got[id] or {}
    for i = 1, math.max(#e, #g) do
      if e[i] ~= g[i] then
        local when = tonumber((e[i] or g[i]):match("^[%d.]+") or 1e9)
        if not earliest or when < earliest then
          earliest = when
          text = ("task %s, event %d\n  expected: %s\n  got:      %s\n  after:    %s"):format(id, i, e[i], g[i],
            table.concat(e, "\n            ", math.max(1, i - 6), i - 1))
        end
        break
      end
    end
  end
  if text then error(text, 0) end
end

describe("a random tree of tasks, scopes and groups", function()
  for seed = 1, helper.seeds(100, 6) do
    it("does what the model says, task by task: seed " .. seed, function()
      local program = generate(seed)
      support.with_reports(function()
        local expected = interpret(model_world(), program)
        local got = interpret(real_world(), program)
        compare(expected, got)
      end)
    end)
  end

  for seed = 1, helper.many(8, 2) do
    it("ends, and closes all, whatever finalizers do on the way: seed " .. seed, function()
      local random, left, busy = random_of(9000 + seed), 400, true
      local world, list, group_of = real_world(), setmetatable({}, { __mode = "v" }), nil
      local spawn, group_spawn = world.spawn, world.group_spawn
      local function known(task)
        list[random(16)] = task
        return task
      end
      function world.spawn(...) return known(spawn(...)) end
      function world.group_spawn(group, ...)
        group_of = group
        return known(group_spawn(group, ...))
      end
      local acts = {
        function() if list[random(16)] then list[random(16)]:cancel("by a finalizer") end end,
        function() if group_of then group_of:cancel("by a finalizer") end end,
        function() if group_of then group_of:spawn(flow.sleep, 0.25) end end,
        function() if group_of then group_of:stop() end end,
        function() flow.current_task():cancel("by a finalizer") end,
        function() flow.with_timeout(1, flow.cancellation_token) end,
        function() flow.cancellation_token():register(function() end) end,
        function()
          local co = coroutine.create(function() flow.with_timeout(0.5, coroutine.yield) end)
          coroutine.resume(co)
          coroutine.close(co)
        end,
        function() flow.spawn(flow.with_timeout, 0.25, flow.sleep, 1) end,
        function() world.cancel_source(random(SOURCES)) end,
      }
      local function gremlin()
        if left == 0 or not busy then return end
        left = left - 1
        setmetatable({}, { __gc = function()
          for _ = 1, random(3) do pcall(acts[random(#acts)]) end
          gremlin()
        end })
      end
      support.with_reports(function()
        local main, pause = world.main, world.pause
        function world.pause(seconds)
          if random(12) == 1 then collectgarbage("step", 500) end
          pause(seconds)
        end
        function world.main(fn)
          main(function()
            for _ = 1, 10 do gremlin() end
            flow.shield(fn) -- the root must see the end of all
            collectgarbage()
            busy = false
            flow.shield(flow.sleep, 5) -- what the finalizers have started ends
          end)
        end
        local step = collectgarbage("incremental", 100, 400)
        local ok, err = pcall(interpret, world, generate(seed))
        collectgarbage(step, 200, 100)
        if not ok then error(err, 0) end
        collectgarbage()
        assert.is_true(left < 390, 'left ' .. left)
      end)
    end)
  end

  it("is not trivial, and leaves no memory behind", function()
    support.with_reports(function()
      local events, tasks = 0, 0
      local function round()
        for seed = 1, helper.many(10, 3) do
          for _, story in pairs(interpret(real_world(), generate(seed))) do
            events, tasks = events + #story, tasks + 1
          end
        end
        support.collect()
        flow.run(helper.collect)
        return collectgarbage("count")
      end
      round()
      local before = round()
      local grown = round() - before
      assert.is_true(grown < 3, grown)
      assert.is_true(events > 100 and tasks > 20)
    end)
  end)
end)
