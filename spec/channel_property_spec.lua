-- Random uses of two channels against a model: tables, scanned from the front, in which whoever is done is skipped.
-- Who got what, in which order, who was canceled or too late, and what is left.

local flow = require "coflow"
local support = require "spec.support.model_support"

local Channel = flow.Channel

local STEPS = 120

---- The model ------------------------------------------------------------------------------------

local Model = {}
Model.__index = Model

local function model_new(story)
  return setmetatable({ now = 0, ready = {}, timed = {}, story = story }, Model)
end

function Model:channel(capacity, mode)
  local ch = { capacity = capacity or math.huge, mode = mode or "wait", items = {}, dropped = {} }
  for _, queue in ipairs { "reads", "writes", "can_read", "can_write" } do ch[queue] = {} end
  return ch
end

-- The operation is over: its task will tell when it is resumed.
function Model:finish(op, text)
  op.done = true
  table.insert(self.ready, op.id .. ": " .. text)
end

function Model:flush()
  while self.ready[1] do
    local event = table.remove(self.ready, 1)
    if type(event) == "table" then
      while #event < event.max do
        local item = self:take(event.ch)
        if item == nil then break end
        table.insert(event, item)
      end
      event = ("%d: {%s}"):format(event.op.id, table.concat(event, " "))
    end
    self.story.expect(event)
  end
end

-- Takes the first that still waits out of the queue.
local function first(queue)
  while queue[1] do
    local waiter = table.remove(queue, 1)
    if not waiter.op.done then return waiter end
  end
end

local function any(queue)
  for _, waiter in ipairs(queue) do
    if not waiter.op.done then return true end
  end
  return false
end

function Model:serve(waiter, text)
  self:finish(waiter.op, waiter.prefix .. text)
end

function Model:tell(queue)
  for waiter in first, queue do self:serve(waiter, "true") end
end

function Model:take(ch)
  local item = table.remove(ch.items, 1)
  if item ~= nil then
    local writer = first(ch.writes)
    if writer then
      table.insert(ch.items, writer.item)
      self:serve(writer, "true")
    else
      self:tell(ch.can_write)
    end
    return item
  end
  local writer = first(ch.writes)
  if writer then
    self:serve(writer, "true")
    return writer.item
  end
end

function Model:give(ch, item)
  local reader = first(ch.reads)
  if reader then
    if reader.kind == "batch" and reader.op.async then
      self:serve(reader, "{" .. item .. "}")
    elseif reader.kind == "batch" then -- it takes what else there is when it is resumed
      reader.op.done = true
      table.insert(self.ready, { op = reader.op, ch = ch, max = reader.max, item })
    else
      self:serve(reader, tostring(item))
    end
  elseif #ch.items < ch.capacity then
    table.insert(ch.items, item)
    self:tell(ch.can_read)
  elseif ch.mode == "wait" then
    return false
  elseif ch.mode == "drop_write" or ch.capacity == 0 then
    table.insert(ch.dropped, item)
  else
    local at = ch.mode == "drop_oldest" and 1 or #ch.items
    table.insert(ch.dropped, table.remove(ch.items, at))
    table.insert(ch.items, item)
  end
  return true
end

-- What an operation of that kind comes to after completion.
local function at_the_end(ch, kind)
  if kind == "write" or (ch.err and kind ~= "can_read" and kind ~= "can_write" and kind ~= "next") then
    return "ChannelClosed " .. tostring(ch.err)
  elseif ch.err then
    return ch.err
  end
  return (kind == "can_read" or kind == "can_write") and "false" or "nil"
end

-- The outcome if there is one now.
function Model:attempt(ch, kind, item, max)
  if kind == "read" or kind == "next" then
    local got = self:take(ch)
    if got ~= nil then return tostring(got) end
  elseif kind == "batch" then
    local list = {}
    while #list < max do
      local got = self:take(ch)
      if got == nil then break end
      table.insert(list, got)
    end
    if #list > 0 then return "{" .. table.concat(list, " ") .. "}" end
  elseif kind == "write" then
    if not ch.completed and self:give(ch, item) then return "true" end
  elseif kind == "can_read" then
    if #ch.items > 0 or any(ch.writes) then return "true" end
  elseif not ch.completed then
    if ch.mode ~= "wait" or #ch.items < ch.capacity or any(ch.reads) then return "true" end
  end
  if ch.completed then return at_the_end(ch, kind) end
end

local queue_of = { read = "reads", next = "reads", batch = "reads", write = "writes",
  can_read = "can_read", can_write = "can_write" }

-- Starts an operation: clauses { ch =, kind =, item = }, one of them, or those of a select.
function Model:start(op, clauses, select, timeout, timeout_text)
  for i, c in ipairs(clauses) do
    local text = self:attempt(c.ch, c.kind, c.item, c.max)
    if text then
      op.done = true
      local failed = text:find("^ChannelClosed") or text == c.ch.err
      self.story.expect(op.id .. ": " .. (select and not failed and i .. " " or "") .. text)
      return
    end
  end
  for i, c in ipairs(clauses) do
    table.insert(c.ch[queue_of[c.kind]],
      { op = op, kind = c.kind, item = c.item, max = c.max, prefix = select and i .. " " or "" })
  end
  for _, c in ipairs(clauses) do
    if c.ch.capacity == 0 then
      if c.kind == "write" then
        self:tell(c.ch.can_read)
      elseif queue_of[c.kind] == "reads" then
        self:tell(c.ch.can_write)
      end
    end
  end
  if timeout then
    table.insert(self.timed, { op = op, due = self.now + timeout, text = timeout_text })
  end
end

function Model:cancel(op)
  if not op.done then self:finish(op, "OperationCanceled") end
end

function Model:complete(ch, err)
  if ch.completed then return false end
  ch.completed, ch.err = true, err
  for _, queue in ipairs { "writes", "reads", "can_write", "can_read" } do
    for waiter in first, ch[queue] do
      local text = at_the_end(ch, queue == "writes" and "write" or queue == "reads" and waiter.kind or queue)
      local failed = text:find("^ChannelClosed") or text == err
      self:finish(waiter.op, (failed and "" or waiter.prefix) .. text)
    end
  end
  return true
end

function Model:advance(seconds)
  self:flush()
  self.now = self.now + seconds
  table.sort(self.timed, function(a, b)
    if a.due ~= b.due then return a.due < b.due end
    return a.op.id < b.op.id
  end)
  while self.timed[1] and self.timed[1].due <= self.now do
    local timed = table.remove(self.timed, 1)
    if not timed.op.done then self:finish(timed.op, timed.text) end
  end
  self:flush()
end

---- The same with coflow -----------------------------------------------------------------------------

-- What channels are completed with: no string, to which coroutine.wrap would add a place.
local BROKEN = setmetatable({}, { __tostring = function() return "broken" end })

local function describe_value(value)
  if value == BROKEN then return "broken" end
  if type(value) ~= "table" then return tostring(value) end
  if flow.errors.is(value, "ChannelClosed") then return "ChannelClosed " .. tostring(value.inner) end
  if value.name then return value.name end
  return "{" .. table.concat(value, " ") .. "}"
end

local function describe_outcome(ok, ...)
  local values = table.pack(...)
  if not ok then values.n = 1 end
  for i = 1, values.n do values[i] = describe_value(values[i]) end
  return table.concat(values, " ", 1, values.n)
end

local methods = { read = "read", next = "next", batch = "read_batch", write = "write",
  can_read = "wait_to_read", can_write = "wait_to_write" }

-- A function that does the operation in that style, and returns as direct style would.
local function real_operation(style, clauses, select, timeout, token)
  if select then
    local list = { timeout = select == "timeout" and timeout or nil, token = token }
    for i, c in ipairs(clauses) do
      list[i] = { c.real, c.kind == "read" and "read" or "write", c.item }
    end
    if style == "async" then
      return function() return flow.await(flow.channel.select_async(list)) end
    end
    return function() return flow.channel.select(list) end
  end
  local c = clauses[1]
  if c.kind == "next" then
    local next, state = c.real:iterate(token)
    return function() return next(state) end
  end
  local first_argument = c.kind == "write" and c.item or c.kind == "batch" and c.max or nil
  local half = (c.kind == "write" or c.kind == "can_write") and c.real.writer or c.real.reader
  local target = style == "half" and half or c.real
  local method = target[methods[c.kind] .. (style == "async" and "_async" or "")]
  return function()
    local function call()
      if first_argument ~= nil then return method(target, first_argument, token) end
      return method(target, token)
    end
    if style == "async" then return flow.await(call()) end
    return call()
  end
end

-- The same function, which waits in so many nested coroutines.
local function in_coroutines(fn, depth)
  for _ = 1, depth do
    local inner = fn
    fn = function() return flow.coroutine.wrap(function() return inner() end)() end
  end
  return fn
end

---- A run ----------------------------------------------------------------------------------------------

local function play(story, random, clock)
  local model = model_new(story)
  local ops, models, reals, real_dropped = {}, {}, {}, {}
  local items = 0

  local function pick(list) return list[random(#list)] end
  local function settle()
    model:flush()
    clock:settle()
  end

  for i = 1, 2 do
    local capacity = pick { 0, 0, 1, 1, 2, 3, 9 }
    local mode = random(4) == 1 and pick { "drop_newest", "drop_oldest", "drop_write" } or "wait"
    if random(8) == 1 then
      models[i], reals[i] = model:channel(), Channel.unbounded()
    else
      models[i] = model:channel(capacity, mode)
      reals[i] = Channel.bounded(capacity, { full_mode = mode, item_dropped = function(item)
        table.insert(real_dropped, item)
      end })
    end
  end

  local function clause(kinds)
    local i = random(2)
    local kind = pick(kinds)
    items = items + 1
    return { ch = models[i], real = reals[i], kind = kind, max = random(3),
      item = kind == "write" and items or nil }
  end

  local actions = {
    { 10, function() -- an operation
      local op = { id = #ops + 1 }
      ops[op.id] = op
      local select = random(4) == 1 and pick { "plain", "timeout" }
      local clauses = {}
      for n = 1, select and random(3) or 1 do
        clauses[n] = clause(select and { "read", "write" }
          or { "read", "read", "write", "write", "next", "batch", "can_read", "can_write" })
      end
      local style = pick { "direct", "direct", "async", "half" }
      -- Who takes a batch itself takes what is there on its turn.
      if clauses[1].kind == "batch" and story.shuffled then style = "async" end
      local source = random(2) == 1 and flow.CancellationTokenSource()
      local limit = random(3) == 1 and random(4) / 4
      local inside = limit and select ~= "timeout"
      local fn = real_operation(style, clauses, select, limit, source and source.token or nil)
      if random(4) == 1 then fn = in_coroutines(fn, random(2)) end
      op.async = style == "async"
      op.cancel = source and function() source:cancel() end or function() op.task:cancel() end
      op.task = flow.async(function()
        local text
        if inside then
          text = describe_outcome(pcall(flow.with_timeout, limit, fn))
        else
          text = describe_outcome(pcall(fn))
        end
        story.got(op.id .. ": " .. text)
      end)()
      model:start(op, clauses, select, (inside or select == "timeout") and limit or nil,
        inside and "Timeout" or "nil timeout")
    end },
    { 3, function() -- a cancellation, perhaps of what was granted just now
      if #ops == 0 then return end
      local op = ops[math.max(1, #ops + 1 - random(8))]
      op.cancel()
      model:cancel(op)
    end },
    { 4, function()
      local i = random(2)
      local item, expected = reals[i]:try_read(), model:take(models[i])
      assert(item == expected, ("try_read: %s, not %s"):format(item, expected))
    end },
    { 4, function()
      local i = random(2)
      items = items + 1
      local expected = not models[i].completed and model:give(models[i], items)
      assert(reals[i]:try_write(items) == expected, "try_write: not " .. tostring(expected))
    end },
    { 4, settle },
    { 2, function()
      local seconds = random(3) / 4
      model:advance(seconds)
      flow.sleep(seconds)
      clock:settle()
    end },
  }
  local total = 0
  for _, action in ipairs(actions) do total = total + action[1] end

  local function compare(step)
    story.compare(step)
    for i = 1, 2 do
      assert(reals[i].count == #models[i].items, "count")
      assert(reals[i]:peek() == models[i].items[1], "peek")
    end
  end

  for step = 1, STEPS do
    local at = random(total)
    for _, action in ipairs(actions) do
      at = at - action[1]
      if at <= 0 then
        action[2]()
        break
      end
    end
    if random(60) == 1 then
      local i, err = random(2), random(2) == 1 and "broken" or nil
      assert(reals[i]:try_complete(err and BROKEN) == model:complete(models[i], err), "try_complete")
    end
    compare(step)
  end

  for i = 1, 2 do -- the end: everything is over, and every item has come out once
    reals[i]:try_complete()
    model:complete(models[i])
    settle()
    while #models[i].items > 0 do assert(reals[i]:try_read() == model:take(models[i]), "drained") end
    settle()
    assert(reals[i].completion.is_completed, "completion")
    if reals[i].completion.is_faulted then assert(reals[i].completion.exception == BROKEN) end
  end
  compare("the end")
  local dropped = 0
  for i = 1, 2 do dropped = dropped + #models[i].dropped end
  assert(#real_dropped == dropped, "item_dropped")
  model:advance(10)
  flow.sleep(10)
  for _, op in ipairs(ops) do
    assert(op.done and op.task.is_completed, "an operation goes on")
  end
end

describe("random uses of channels", function()
  for name, body in support.programs(play, 100, 3) do it(name, body) end
end)
