-- coflow.pipeline: middleware.
-- SPDX-License-Identifier: MIT

local flow = require "coflow"
local helper = require "spec.helper"

local in_task, recorder, raises = helper.in_task, helper.recorder, helper.raises
local pipeline = flow.pipeline

describe("a pipeline", function()
  it("runs its steps in the order they were added, and back", in_task(function()
    local log, note = recorder()
    local app = pipeline.new()
    for _, name in ipairs { "a", "b" } do
      app:use(function(context, next)
        note(name, "in", context)
        flow.yield()
        local result = next()
        note(name, "out", result)
        return result .. name
      end)
    end
    app:run(function(context)
      note("handler", context)
      return "r"
    end)
    assert.equal("rba", app:build()("c"))
    assert.same({ "a in c", "b in c", "handler c", "b out r", "a out rb" }, log)
  end))

  it("ends at a step that does not call next", in_task(function()
    local app = pipeline.new():use(function() return "stop" end):run(function() error("reached") end)
    assert.equal("stop", app:build()())
  end))

  it("goes on with the context that next is given", in_task(function()
    local app = pipeline.new():use(function(_, next) return next("other") end):use(function(_, next) return next() end)
    app:run(function(context) return context end)
    assert.equal("other", app:build()("first"))
  end))

  it("returns nothing where nobody handles", in_task(function()
    assert.equal(0, select("#", pipeline.new():use(function(_, next) return next() end):build()(1)))
  end))

  it("passes all values, and errors unchanged", in_task(function()
    local problem = {}
    local app = pipeline.new()
    app:use(function(_, next)
      local ok, err = pcall(next)
      if not ok then return nil, err end
      error("no error came")
    end)
    app:use(function(_, next) return next() end)
    app:run(function() flow.yield() error(problem) end)
    local value, err = app:build()(1)
    assert.is_nil(value)
    assert.equal(problem, err)
  end))

  it("shows async locals to the inner steps only", in_task(function()
    local loc = flow.AsyncLocal()
    local seen = {}
    local app = pipeline.new()
    app:use(function(_, next)
      loc.value = "outer"
      next()
      seen.after = loc.value
    end)
    app:use(function(_, next)
      seen.inner = loc.value
      loc.value = "inner"
      next()
    end)
    app:run(function() seen.handler = loc.value end)
    app:build()(1)
    assert.same({ inner = "outer", handler = "inner", after = "outer" }, seen)
    assert.is_nil(loc.value)
  end))

  it("lets a step call next again", in_task(function()
    local calls = 0
    local app = pipeline.new():use(function(_, next) next() return next() end)
    app:run(function() calls = calls + 1 return calls end)
    assert.equal(2, app:build()(1))
  end))

  it("is as it was when it was built", in_task(function()
    local app = pipeline.new():run(function() return "handler" end)
    local before = app:build()
    app:use(function() return "step" end)
    assert.equal("handler", before(1))
    assert.equal("step", app:build()(1))
  end))

  it("takes ten thousand steps", in_task(function()
    local n = helper.many(10000)
    local app = pipeline.new()
    for _ = 1, n do app:use(function(context, next) return next(context + 1) end) end
    app:run(function(context) flow.yield() return context end)
    assert.equal(n, app:build()(0))
  end))

  it("is interrupted like any code", in_task(function()
    local app = pipeline.new():use(function(_, next) return next() end):run(function() flow.sleep(10) end)
    raises("Timeout", flow.with_timeout, 1, app:build(), 1)
  end))

  it("refuses what is no function, and a second handler", function()
    local app = pipeline.new():run(print)
    raises("InvalidOperation", app.run, app, print)
    assert.has_error(function() app:use(1) end, "bad argument #1 to 'use' (function expected, got number)")
    assert.has_error(function() app.use({}, print) end)
  end)
end)
