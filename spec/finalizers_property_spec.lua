-- Random programs in which finalizers, at any allocation, and whatever is called do anything: those of
-- spec/support/mischief.lua. Each has a process of its own: what is collected when depends on all that is there.

local helper = require "spec.helper"

describe("a random program whose finalizers and callbacks do anything", function()
  for seed = 1, helper.seeds(2, 1) do
    it("comes to an end, and leaves nothing behind: seed " .. seed, function()
      assert.equal("ended\n", helper.output(([[
        require("spec.support.mischief").play(%d)
        print "ended"
      ]]):format(seed)))
    end)
  end
end)
