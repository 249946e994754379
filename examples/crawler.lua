--[[
crawler.lua - follows the links of a site of local files, some at a time, over a line that may be bad, and finds the
dead ones.

The pages that are known and not yet read are read together: flow.parallel.map runs a few at a time, and gives the
results in the order of the pages, so the report is the same however they overtake each other. Each read goes through
one resilience pipeline: what fails is tried again after a while, each attempt needs a permit of the rate limiter, and
has a limit of time. A page that is not there is not tried again.

    lua5.4 examples/crawler.lua            the site in examples/data/site, over a bad line; one of its links is dead
    lua5.4 examples/crawler.lua README.md

SPDX-License-Identifier: MIT
]]

local flow = require "coflow"
local fs, resilience = flow.fs, flow.resilience

local USAGE = [[
usage: lua5.4 examples/crawler.lua [--at-once N] [--flaky SHARE] [--seed N] [start page]
  --at-once N    so many reads at the same time (4)
  --flaky SHARE  the share of the reads that fail, 0 to 1 (0; 0.3 where nothing is said)
  --seed N       which ones fail: the same for the same seed (1)
exit code: 0, 1 if there are dead links, 2 for wrong arguments]]

-- ---- Reading ------------------------------------------------------------------------------------------------

-- A page of the site in `root`, or "" for what is there and is no page.
local function reader(root)
  return function(page)
    local path = root .. "/" .. page
    if page:find("%.html$") or page:find("%.md$") then return fs.read_file(path) end
    return fs.stat(path) and ""
  end
end

-- `fetch` over a bad line. Which calls fail depends on the seed, the page and the attempt, and not on the order in
-- which they happen to come.
local function flaky(fetch, share, seed)
  local attempts = {}
  return function(page)
    attempts[page] = (attempts[page] or 0) + 1
    local hash = seed
    for _, byte in ipairs { (page .. attempts[page]):byte(1, -1) } do hash = hash * 31 + byte end
    math.randomseed(hash)
    if math.random() < share then
      error(flow.errors.IO(("read '%s': the line is bad (EIO)"):format(page), { code = "EIO" }), 0)
    end
    return fetch(page)
  end
end

local final = { ENOENT = true, ENOTDIR = true, EACCES = true } -- errors that will be the same next time

local function patiently(count)
  return resilience.pipeline { -- outermost first
    resilience.retry {
      max_retry_attempts = 4, delay = 0.01, backoff = "exponential",
      should_handle = function(err) return not final[err.code] end,
      on_retry = function() count.retries = count.retries + 1 end,
    },
    resilience.rate_limiter { permits = 10, per = 0.1, queue_limit = math.huge },
    resilience.timeout { seconds = 5 },
  }
end

-- ---- Links --------------------------------------------------------------------------------------------------

-- Where `target` leads to from `page`; both as seen from the root of the site, which no ".." can leave.
local function resolve(page, target)
  local parts = {}
  local from = target:find("^/") and "" or page:match("^.*/") or ""
  for part in (from .. target:gsub("/$", "/index.html")):gmatch("[^/]+") do
    if part == ".." then table.remove(parts) elseif part ~= "." then table.insert(parts, part) end
  end
  return table.concat(parts, "/")
end

-- The places in the site that a page links to.
local function links_of(page, text)
  local links = {}
  local function add(target)
    target = target:gsub("[?#].*$", ""):gsub("%%(%x%x)", function(hex) return string.char(tonumber(hex, 16)) end)
    if target == "" or target:find("^%a[%w+.-]*:") or target:find("^//") then return end -- the same page, or elsewhere
    table.insert(links, resolve(page, target))
  end
  if page:find("%.md$") then
    text = text:gsub("```.-```", ""):gsub("`[^`\n]*`", "") -- code
    for target in text:gmatch("%]%(([^%s)]+)[^)]*%)") do add(target) end
  else
    for _, target in text:gmatch("href=([\"'])(.-)%1") do add(target) end
    for _, target in text:gmatch("src=([\"'])(.-)%1") do add(target) end
  end
  return links
end

-- ---- The crawl ----------------------------------------------------------------------------------------------

-- Reads all that can be reached from `start`. Returns what each page was found to be, true or an error, and all links
-- { from =, to = }, in the order in which a reader of the pages meets them.
local function crawl(start, fetch, at_once, count)
  local found, links = { [start] = true }, { { from = "the start", to = start } }
  local service = patiently(count)

  local function visit(page)
    count.busy = count.busy + 1
    count.most_busy = math.max(count.most_busy, count.busy)
    local ok, result = flow.pcall(service.execute, service, fetch, page)
    count.busy = count.busy - 1
    if ok then return links_of(page, result) end
    found[page] = result
    return {}
  end

  local pages = { start }
  while #pages > 0 do
    local results = flow.parallel.map(pages, { max_degree_of_parallelism = at_once }, visit)
    local following = {}
    for i, page in ipairs(pages) do
      count.places = count.places + 1
      for _, target in ipairs(results[i]) do
        table.insert(links, { from = page, to = target })
        if not found[target] then
          found[target] = true
          table.insert(following, target)
        end
      end
    end
    pages = following
  end
  return found, links
end

local function report(found, links, count)
  local dead = 0
  for _, link in ipairs(links) do
    local problem = found[link.to]
    if problem ~= true then
      dead = dead + 1
      print(("dead: %s, from %s: %s"):format(link.to, link.from, problem.message or problem))
    end
  end
  print(("links: %d to %d places, %d of them dead"):format(#links, count.places, dead))
  print(("tried again: %d times; at the same time: at most %d"):format(count.retries, count.most_busy))
  return dead
end

-- What the command line says, or nil if that makes no sense.
local function options_of(...)
  local words, given = { ... }, { ["--at-once"] = 4, ["--seed"] = 1, ["--flaky"] = select("#", ...) == 0 and 0.3 or 0 }
  local start = #words % 2 == 1 and table.remove(words) or nil
  for i = 1, #words, 2 do
    if not given[words[i]] then return nil end
    given[words[i]] = tonumber(words[i + 1]) or 0 / 0
  end
  local options = {
    start = start or "examples/data/site/index.html",
    at_once = math.tointeger(given["--at-once"]),
    seed = math.tointeger(given["--seed"]),
    share = given["--flaky"],
  }
  local sound = not options.start:find("^%-") and options.at_once and options.at_once >= 1 and options.seed
    and options.share >= 0 and options.share <= 1
  return sound and options or nil
end

local function main(...)
  local options = options_of(...)
  if not options then
    io.stderr:write(USAGE, "\n")
    return 2
  end
  local root, page = options.start:match("^(.*)/") or ".", options.start:match("[^/]+$") or "index.html"
  local fetch = flaky(reader(root), options.share, options.seed)
  local count = { places = 0, retries = 0, busy = 0, most_busy = 0 }
  local found, links = crawl(page, fetch, options.at_once, count)
  return report(found, links, count) == 0 and 0 or 1
end

os.exit(flow.main(main, ...), true)

--> dead: guide/patience.html, from guide/index.html: open 'examples/data/site/guide/patience.html': no such file...
--> dead: events-2023.html, from events.html: open 'examples/data/site/events-2023.html': no such file...
--> links: 19 to 9 places, 2 of them dead
--> tried again: 7 times; at the same time: at most 4
