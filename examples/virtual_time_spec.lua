-- virtual_time_spec.lua - how code that waits is tested: an hour takes no time, and every order is tried.
--
--     busted examples/virtual_time_spec.lua
--
-- SPDX-License-Identifier: MIT

local flow = require "coflow"
local testing = require "coflow.testing"
local it = testing.it -- busted's `it`, in virtual time: the one line that a spec needs

-- What is tested: calls fn again after 1, 2, 4 … seconds, until it succeeds or has failed `attempts` times.
local function retry(attempts, fn)
  for n = 1, attempts do
    local ok, result = pcall(fn)
    if ok then return result end
    if n == attempts then error(result, 0) end
    flow.sleep(2 ^ (n - 1))
  end
end

-- What else is tested: one report a time, whoever asks; those who come meanwhile get the same one.
local function shared(load)
  local running
  return function()
    running = running or flow.spawn(function()
      local report = load()
      running = nil
      return report
    end)
    return running:await()
  end
end

describe("retry", function()
  it("waits longer each time", function(clock)
    local times = {}
    local result = retry(10, function()
      times[#times + 1] = clock:now()
      if #times < 6 then error("busy") end
      return "served"
    end)
    assert.equal("served", result)
    assert.same({ 0, 1, 3, 7, 15, 31 }, times)
  end)

  it("gives up", function(clock)
    assert.has_error(function() retry(12, function() error("down", 0) end) end, "down")
    assert.equal(2047, clock:now()) -- more than half an hour
  end)
end)

describe("a shared report", function()
  it("is loaded once for all who wait", function()
    local loads = 0
    local report = shared(function()
      loads = loads + 1
      flow.sleep(5)
      return loads
    end)
    local a, b = flow.await_all(flow.spawn(report), flow.spawn(report))
    assert.same({ 1, 1, 2 }, { a, b, report() })
  end)

  it("is never loaded twice at a time, whoever comes first", { runs = 100 }, function() -- a hundred orders
    local loading, most = 0, 0
    local report = shared(function()
      loading = loading + 1
      most = math.max(most, loading)
      flow.sleep(1)
      loading = loading - 1
    end)
    local tasks = {}
    for i = 1, 6 do
      tasks[i] = flow.spawn(function()
        flow.sleep(i // 3)
        report()
      end)
    end
    flow.await_all(tasks)
    assert.equal(1, most)
  end)
end)


describe("a clock that is told to move", function()
  local clock = testing.FakeTimeProvider { start_time = 100 }

  it("shows what has happened by then", { time_provider = clock }, function()
    local task = flow.spawn(flow.sleep, 60)
    clock:advance(59)
    assert.is_false(task.is_completed)
    clock:advance(1)
    assert.is_true(task.is_completed)
    assert.equal(160, clock:now())
  end)
end)
