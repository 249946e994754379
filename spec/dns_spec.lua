-- coflow.dns: names and addresses, as far as this machine knows them without a network.

local flow = require "coflow"
local helper = require "spec.helper"
local support = require "spec.support.io_support"

local dns = flow.dns
local in_task, raises, bad_argument = support.in_task, helper.raises, support.bad_argument
local Source = flow.CancellationTokenSource

describe("resolve", function()
  it("gives the addresses of a name, each once", in_task(function()
    local list = dns.resolve("localhost")
    local seen = {}
    for _, address in ipairs(list) do
      assert.is_nil(seen[address])
      seen[address] = true
    end
    assert.is_true(seen["127.0.0.1"] or seen["::1"])
    assert.same(list, dns.resolve_async("localhost"):await())
  end))

  it("takes numeric addresses as they are", in_task(function()
    assert.same({ "192.0.2.7" }, dns.resolve("192.0.2.7"))
    assert.same({ "2001:db8::1" }, dns.resolve("2001:DB8:0:0::1"))
  end))

  it("asks for one family", in_task(function()
    for _, family in ipairs { "ipv4", 4 } do
      assert.same({ "127.0.0.1" }, dns.resolve("127.0.0.1", { family = family }))
      assert.is_true(flow.errors.is(helper.raised(dns.resolve, "::1", { family = family }), "IO"))
    end
    assert.same({ "::1" }, dns.resolve("::1", { family = "ipv6" }))
    assert.same({ "::1" }, dns.resolve("::1", { family = 6 }))
    assert.same({ "::1" }, dns.resolve("::1", { family = "any" }))
    for _, wrong in ipairs { "inet", 5, true } do
      bad_argument("family", dns.resolve, "::1", { family = wrong })
    end
    bad_argument("unknown option 'families'", dns.resolve, "::1", { families = 4 })
  end))

  it("raises an IO error with the host", in_task(function()
    local err = raises("IO", dns.resolve, "no.such.name.invalid")
    assert.equal("no.such.name.invalid", err.host)
    assert.equal("getaddrinfo", err.syscall)
    assert.equal("EAI_", err.code:sub(1, 4))
    assert.is_nil(err.path)
    raises("IO", dns.resolve, ("x"):rep(5000))
  end))

  it("refuses what is no name", in_task(function()
    bad_argument("empty", dns.resolve, "")
    bad_argument("zero bytes", dns.resolve, "a\0b")
    bad_argument("string expected", dns.resolve, 7)
    bad_argument("CancellationToken", dns.resolve, "localhost", nil, 7)
  end))

  it("is canceled at once, and its answer is dropped", in_task(function()
    local source = Source()
    local tasks = {}
    for i = 1, 20 do tasks[i] = dns.resolve_async("localhost", nil, source.token) end
    source:cancel()
    for _, task in ipairs(tasks) do
      assert.is_true(task.is_canceled)
      assert.equal(source.token, raises("OperationCanceled", task.await, task).token)
    end
    raises("OperationCanceled", dns.resolve, "localhost", nil, source.token)
    assert.is_true(#dns.resolve("localhost") > 0)
  end))

  it("may be canceled by a finalizer while its answer is made a list, which then was freed", in_task(function()
    support.canceled_while_landing(function(token, k) -- each gives a string that is not there yet
      return dns.resolve_async(("2001:DB8:0:0::%x"):format(0x700 + k), nil, token)
    end, function(ok, list, k)
      if ok then
        assert.same({ ("2001:db8::%x"):format(0x700 + k) }, list)
      else
        assert.equal("OperationCanceled", list.name)
      end
    end)
  end))
end)

describe("reverse", function()
  it("gives the name of an address", in_task(function()
    assert.equal("localhost", dns.reverse("127.0.0.1"))
    assert.equal("localhost", dns.reverse_async("127.0.0.1"):await())
  end))

  it("raises where there is none", in_task(function()
    local err = raises("IO", dns.reverse, "192.0.2.7")
    assert.equal("192.0.2.7", err.host)
    assert.equal("getnameinfo", err.syscall)
  end))

  it("refuses names", in_task(function()
    bad_argument("numeric address", dns.reverse, "localhost")
    bad_argument("numeric address", dns.reverse, "1.2.3")
  end))
end)
