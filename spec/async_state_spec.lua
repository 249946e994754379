-- coflow.async_state: state shared along a flow; AY-* of the semantics.
-- SPDX-License-Identifier: MIT

local flow = require "coflow"
local helper = require "spec.helper"

local in_task, raises = helper.in_task, helper.raises

local function fixture()
  local state = flow.AsyncState()
  return state, state:context("user")
end

describe("an AsyncState", function()
  it("has no values before it is initialized", in_task(function()
    local _, user = fixture()
    helper.is_error("InvalidOperation", helper.raised(user.get, user), "user", "initialize")
    raises("InvalidOperation", user.set, user, 1)
    assert.same({ false, n = 2 }, table.pack(user:try_get()))
  end))

  it("has nil in a context that was not set", in_task(function()
    local state, user = fixture()
    state:initialize()
    assert.is_nil(user:get())
    assert.same({ true, n = 2 }, table.pack(user:try_get()))
    user:set("Ada")
    assert.same({ true, "Ada", n = 2 }, table.pack(user:try_get()))
  end))

  it("gives the same context for the same name, before and after it is initialized", in_task(function()
    local state, user = fixture()
    state:initialize()
    user:set(1)
    assert.equal(user, state:context("user"))
    assert.not_equal(user, state:context("order"))
    state:context("order"):set(2)
    assert.equal(1, user:get())
  end))

  it("shows what a callee sets to its caller, and to siblings", in_task(function()
    local state, user = fixture()
    state:initialize()
    local sibling = flow.spawn(function() flow.sleep(2) return user:get() end)
    flow.spawn(function() flow.sleep(1) user:set("child") end):await()
    assert.equal("child", user:get())
    assert.equal("child", sibling:await())
    user:set(nil)
    assert.is_nil(user:get())
  end))

  it("is not seen by a caller of the function that initializes it", in_task(function()
    local state, user = fixture()
    flow.async(function() state:initialize() end)():await()
    assert.is_false((user:try_get()))
    local function plain() state:initialize() end
    plain()
    assert.is_true((user:try_get()))
  end))

  it("is isolated between flows that each initialize it", in_task(function()
    local state, user = fixture()
    local function flow_of(name)
      return flow.spawn(function()
        state:initialize()
        user:set(name)
        flow.sleep(1)
        return user:get()
      end)
    end
    assert.same({ "a", "b", n = 2 }, flow.when_all(flow_of "a", flow_of "b"):await())
    assert.is_false((user:try_get()))
  end))

  for _, how in ipairs { "reset", "initialize" } do
    it(how .. " empties what other flows still hold, at once", in_task(function()
      local state, user = fixture()
      state:initialize()
      local weak = setmetatable({}, { __mode = "v" })
      user:set({})
      weak[1] = user:get()
      local gate = flow.TaskCompletionSource()
      local other = flow.spawn(function()
        gate.task:await()
        return user:try_get()
      end)
      flow.yield()
      state[how](state)
      collectgarbage()
      assert.is_nil(weak[1])
      gate:set_result()
      assert.is_false((other:await()))
      assert.equal(how == "initialize", (user:try_get()))
    end))
  end

  it("does not cross a suppressed flow", in_task(function()
    local state, user = fixture()
    state:initialize()
    local control = flow.ExecutionContext.suppress_flow()
    local task = flow.spawn(user.get, user)
    control:undo()
    raises("InvalidOperation", flow.await, task)
  end))

  it("refuses names that are no strings", in_task(function()
    local state = fixture()
    assert.has_error(function() state:context(1) end, "bad argument #1 to 'context' (string expected, got number)")
    assert.has_error(function() state.context({}, "x") end)
  end))
end)
