-- model_support.lua - random programs, and models to hold them against.
--
-- A program makes its choices from a seed. What it does it does twice, to the thing itself and to a model that is
-- obviously right, and both tell a story of what comes of it: which must be the same, event by event. Each seed is
-- played in the order of production, first in, first out, and with any that is ready coming next: then what happens
-- between two comparisons may come in any order.

local assert = require "luassert"
local flow = require "coflow"
local testing = require "coflow.testing"
local helper = require "spec.helper"
local flow_support = require "spec.support.flow_support"

local support = {}

local BLOCK = 50

local function line(...)
  local words = table.pack(...)
  for i = 1, words.n do words[i] = tostring(words[i]) end
  return table.concat(words, " ")
end

-- What the model and the thing say. An event is told at once, or in its turn: when those that are ready have run.
-- unordered: a program may set it, if the order is not promised.
local function new_story(seed, shuffled)
  local expected, later, got, compared = {}, {}, {}, 0
  local story = { shuffled = shuffled, unordered = shuffled }

  function story.expect(...) expected[#expected + 1] = line(...) end
  function story.expect_in_turn(...) later[#later + 1] = line(...) end
  function story.got(...)
    got[#got + 1] = line(...)
    got[got[#got]] = true
  end
  function story.has_got(...) return got[line(...)] end

  ---Everybody that is ready has run, here and in the model.
  function story.compare(step)
    table.move(later, 1, #later, #expected + 1, expected)
    later = {}
    local n = math.max(#expected, #got)
    local e, g = table.move(expected, compared + 1, n, 1, {}), table.move(got, compared + 1, n, 1, {})
    if story.unordered then
      table.sort(e)
      table.sort(g)
    end
    for i = 1, n - compared do
      if e[i] ~= g[i] then
        error(("seed %d%s, step %s, event %d\n  expected: %s\n  got:      %s\n  after:    %s"):format(
          seed, shuffled and ", shuffled" or "", step, compared + i, e[i], g[i],
          table.concat(expected, ", ", math.max(1, compared - 8), compared)), 0)
      end
    end
    compared = n
  end

  return story
end

---`for name, body in programs(play, n, few) do it(name, body) end`: plays `play(story, random, clock)` for each seed,
---in both orders. How many: as helper.seeds.
function support.programs(play, n, few)
  local seeds = helper.seeds(n, few)
  return coroutine.wrap(function()
    for _, shuffled in ipairs { false, true } do
      for from = 1, seeds, BLOCK do
        local to = math.min(seeds, from + BLOCK - 1)
        local order = shuffled and "in any order" or "first in, first out"
        coroutine.yield(("do as the model, %s: seeds %d to %d"):format(order, from, to), function()
          for seed = from, to do
            testing.run(function(clock) play(new_story(seed, shuffled), flow_support.random(seed), clock) end,
              { seed = shuffled and seed })
            assert.is_false(flow.loop.is_alive())
          end
        end)
      end
    end
  end)
end

---A way to ask for something, with a way to take it back, by chance: `ask(direct, start, ended)` -> cancel.
---`direct(token)` asks in direct style; or `start(token)` gives a task, and then `ended(task)` awaits it.
function support.style_of(random)
  local style = random(5)
  if style == 1 then -- direct, canceled by the ambient token
    return function(direct)
      local task = flow.async(direct)()
      return function() task:cancel() end
    end
  end
  local source = flow.CancellationTokenSource()
  if style == 2 then -- direct, by a token
    return function(direct)
      flow.async(direct)(source.token)
      return function() source:cancel() end
    end
  elseif style == 3 then -- with a token, by the ambient one
    return function(direct)
      local task = flow.async(direct)(source.token)
      return function() task:cancel() end
    end
  elseif style == 4 then -- as an operation, by a token
    return function(_, start, ended)
      local task = start(source.token)
      flow.async(ended)(task)
      return function() source:cancel() end
    end
  end
  return function(_, start, ended) -- … by itself
    local task = start()
    flow.async(ended)(task)
    return function() task:cancel() end
  end
end

---Removes the element with that id from a list; returns it, or nil.
function support.remove(list, id)
  for i, element in ipairs(list) do
    if element.id == id then return table.remove(list, i) end
  end
end

return support
