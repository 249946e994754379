-- coflow.resilience.places: a number of places, and the line of those who wait for one. For bulkhead and rate_limiter.
--
-- Whoever comes makes a *ticket*, a to-be-closed value, and enters with it. Closing the ticket gives up what it
-- stands for, whatever that is by then: a place, which goes to the first in line, or a position in the line. A place is
-- handed over in one step with leaving the line, so a waiter that is canceled after that, or abandoned, passes the
-- place on as it unwinds.
--
-- Invariants: free == 0 while somebody waits: a newcomer never overtakes.
--             Nothing is created between a look at the places and their change: finalizers may come in, too.
-- SPDX-License-Identifier: MIT

local core = require "coflow.core"

local Places = {}
Places.__index = Places

local function append(places, ticket)
  local last = places.last
  ticket.previous, places.last = last, ticket
  if last then last.next = ticket else places.first = ticket end
  places.waiting = places.waiting + 1
  ticket.in_line = true
end

local function remove(places, ticket)
  local previous, next = ticket.previous, ticket.next
  if previous then previous.next = next else places.first = next end
  if next then next.previous = previous else places.last = previous end
  ticket.previous, ticket.next, ticket.in_line = nil, nil, false
  places.waiting = places.waiting - 1
end

local function give_back(places)
  local next = places.first
  if not next then
    places.free = places.free + 1
    return
  end
  remove(places, next)
  next.has_place = true
  next.source:try_set_result()
end

local Ticket = {}

function Ticket.__close(ticket)
  if ticket.has_place then
    ticket.has_place = false
    give_back(ticket.places)
  elseif ticket.in_line then
    remove(ticket.places, ticket)
  end
end

---A ticket, which stands for nothing yet. To be closed by whoever makes it.
function Places:ticket()
  return setmetatable({ places = self, has_place = false, in_line = false }, Ticket)
end

---Takes a place, or waits for one; false if the line is full. May suspend.
---Cancellation: raises; a place that was handed over meanwhile passes on when the ticket is closed.
---@return boolean
function Places:enter(ticket)
  if self.free == 0 and self.waiting < self.max_waiting then
    ticket.source = core.TaskCompletionSource()
    ticket.source.task.name = "a place"
  end
  if self.free > 0 then
    self.free = self.free - 1
    ticket.has_place = true
    return true
  elseif self.waiting >= self.max_waiting then
    return false
  end
  append(self, ticket)
  core.await(ticket.source.task)
  core.throw_if_canceled()
  return true
end

---@param free integer
---@param max_waiting integer how long the line may be
return function(free, max_waiting)
  return setmetatable({ free = free, waiting = 0, max_waiting = max_waiting }, Places)
end
