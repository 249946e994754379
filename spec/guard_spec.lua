-- The scopes of the context, with and enter, and the suppression of its flow: that they belong to the code in which
-- they were opened, whatever else runs within it.

local flow = require "coflow"
local support = require "spec.support.flow_support"

local in_task, raises = support.in_task, support.raises
local ExecutionContext = flow.ExecutionContext
local capture, suppress = ExecutionContext.capture, ExecutionContext.suppress_flow
local is_suppressed = ExecutionContext.is_flow_suppressed

local loc, other
local function fresh_locals() loc, other = flow.AsyncLocal(), flow.AsyncLocal() end

-- What calls a function within the code of a task, or outside of all: each is told the function.
local callers = {
  ["a callback"] = function(fn)
    local source = flow.CancellationTokenSource()
    source.token:register(fn)
    source:cancel()
  end,
  ["an unsafe callback"] = function(fn)
    local source = flow.CancellationTokenSource()
    source.token:unsafe_register(fn)
    source:cancel()
  end,
  ["a callback of a linked source"] = function(fn)
    local source = flow.CancellationTokenSource()
    flow.CancellationTokenSource.linked(source.token).token:register(fn)
    source:cancel()
  end,
  ["a callback of another callback"] = function(fn)
    local source = flow.CancellationTokenSource()
    source.token:register(function() flow.CancellationToken.canceled:register(fn) end)
    source:cancel()
  end,
  ["a callback of a deadline"] = function(fn)
    local source = flow.CancellationTokenSource()
    source.token:register(fn)
    source:cancel_after(0)
    source.token:wait()
    flow.yield()
  end,
  ["a callback registered too late"] = function(fn) flow.CancellationToken.canceled:register(fn) end,
  ["a method of a scheduler"] = function(fn)
    local queued
    local scheduler = flow.TaskScheduler.new { queue_task = function(_, task)
      queued = task
      fn()
    end }
    flow.spawn_on(scheduler, function() end)
    scheduler:try_execute_task(queued)
  end,
  ["a handler of unobserved exceptions"] = function(fn)
    local before = flow.on_unobserved_exception(function(err)
      if err == "seen by nobody" then pcall(fn) end
    end)
    flow.async(error)("seen by nobody", 0)
    support.collect()
    flow.on_unobserved_exception(before)
  end,
}

-- A test that runs outside every task, and then in one.
local function in_task_and_outside(fn)
  return function()
    fn()
    in_task(fn)()
  end
end

-- call(fn), and whatever becomes of errors in fn there, they come out here.
local function calling(call, fn)
  local ok, err
  call(function() ok, err = pcall(fn) end)
  if not ok then error(err or "it has not been called", 0) end
end

for name, call in pairs(callers) do
  describe("a scope and " .. name, function()
    before_each(function()
      fresh_locals()
      flow.on_unobserved_exception(false)
    end)
    after_each(function() flow.on_unobserved_exception(nil) end)

    local openers = {
      with = function() return loc:with("inside") end,
      enter = function() return loc:run("inside", capture):enter() end,
    }

    for what, open in pairs(openers) do
      it("that is to end it: " .. what, in_task_and_outside(function()
        loc.value = "before"
        do
          local scope <close> = open()
          calling(call, function()
            raises("InvalidOperation", function() scope:dispose() end)
            raises("InvalidOperation", function() local _ <close> = scope end)
          end)
          assert.equal("inside", loc.value)
        end
        assert.equal("before", loc.value)
        local scope = open()
        calling(call, function() pcall(scope.dispose, scope) end)
        scope:dispose()
        assert.equal("before", loc.value)
        loc.value = nil
      end))

      it("that leaves one open: " .. what, in_task_and_outside(function()
        local mine = other:with("mine")
        local left
        calling(call, function() left = open() end)
        raises("InvalidOperation", function() left:dispose() end)
        do local _ <close> = left end
        mine:dispose()
        assert.is_nil(other.value)
        loc.value = nil
      end))
    end

    it("that opens some of its own, and fails", in_task_and_outside(function()
      local mine, seen = other:with("mine")
      calling(call, function()
        loc.value = "callback"
        local outer = loc:with("outer")
        do
          local _ <close> = loc:with("inner")
          raises("InvalidOperation", function() outer:dispose() end)
        end
        outer:dispose()
        seen = loc.value
        local _ <close> = suppress()
        loc:with("left open")
      end)
      pcall(call, function()
        loc:with("left open")
        error("failed", 0)
      end)
      assert.equal("callback", seen)
      assert.is_false(is_suppressed())
      mine:dispose()
      assert.is_nil(other.value)
      loc.value = nil
    end))

    it("that is to end a suppression, or leaves one", in_task_and_outside(function()
      do
        local control <close> = suppress()
        calling(call, function()
          raises("InvalidOperation", function() control:undo() end)
          raises("InvalidOperation", function() local _ <close> = control end)
        end)
        assert.is_true(is_suppressed())
      end
      assert.is_false(is_suppressed())
      local left
      calling(call, function() left = suppress() end)
      raises("InvalidOperation", function() left:undo() end)
      if is_suppressed() then ExecutionContext.restore_flow() end -- a handler is as a plain function
    end))

    it("that starts a task, or a generator, whose scopes are theirs alone", in_task_and_outside(function()
      local task, generator
      local mine = other:with("mine")
      calling(call, function()
        task = flow.async(function()
          local scope = loc:with("task")
          raises("InvalidOperation", function() mine:dispose() end)
          flow.yield()
          flow.yield()
          scope:dispose()
          return "task"
        end)()
        generator = flow.coroutine.wrap(function()
          local scope = loc:with("generator")
          flow.coroutine.yield()
          scope:dispose()
          return "generator"
        end)
        generator()
      end)
      mine:dispose()
      assert.equal("generator", generator())
      assert.equal("task", task:await())
      assert.is_nil(other.value)
    end))
  end)
end

describe("a callback that closes a coroutine of its task's", function()
  before_each(fresh_locals)

  it("says nothing of the scope that is open there, and hinders no other", in_task(function()
    local source, mine = flow.CancellationTokenSource(), other:with("mine")
    local co = coroutine.create(function()
      local _ <close> = loc:with("inside")
      coroutine.yield()
    end)
    coroutine.resume(co)
    local result
    source.token:register(function() result = { coroutine.close(co) } end)
    source:cancel()
    assert.same({ true }, result)
    mine:dispose()
    assert.is_nil(other.value)
  end))
end)
