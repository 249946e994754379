-- Written by `make rockspec`; `make lint` checks that it is up to date.
rockspec_format = "3.0"
package = "coflow"
version = "scm-1"
source = {
  url = "git+https://example.org/coflow.git",
}
description = {
  summary = "Asynchronous tasks, cancellation and I/O for Lua 5.4, on libuv",
  license = "MIT",
}
dependencies = {
  "lua >= 5.4, < 5.5",
}
external_dependencies = {
  LIBUV = { header = "uv.h", library = "uv" },
}
build = {
  type = "builtin",
  modules = {
    ["coflow.core"] = {
      sources = {
        "src/cancel.c",
        "src/channel.c",
        "src/combine.c",
        "src/context.c",
        "src/coroutine.c",
        "src/deadline.c",
        "src/dns.c",
        "src/error.c",
        "src/fiber.c",
        "src/fs.c",
        "src/group.c",
        "src/io.c",
        "src/loop.c",
        "src/module.c",
        "src/periodic.c",
        "src/schedule.c",
        "src/scope.c",
        "src/select.c",
        "src/signal.c",
        "src/sync.c",
        "src/task.c",
        "src/testing.c",
        "src/timer.c",
        "src/waiter.c",
        "src/watch.c",
      },
      defines = { "_GNU_SOURCE" },
      incdirs = { "$(LIBUV_INCDIR)" },
      libdirs = { "$(LIBUV_LIBDIR)" },
      libraries = { "uv" },
    },
    ["coflow.async_state"] = "lua/coflow/async_state.lua",
    ["coflow.background"] = "lua/coflow/background.lua",
    ["coflow.cache"] = "lua/coflow/cache.lua",
    ["coflow.channel"] = "lua/coflow/channel.lua",
    ["coflow.context"] = "lua/coflow/context.lua",
    ["coflow.coroutine"] = "lua/coflow/coroutine.lua",
    ["coflow.dns"] = "lua/coflow/dns.lua",
    ["coflow.flight"] = "lua/coflow/flight.lua",
    ["coflow.fs"] = "lua/coflow/fs.lua",
    ["coflow.group"] = "lua/coflow/group.lua",
    ["coflow.hosting"] = "lua/coflow/hosting.lua",
    ["coflow"] = "lua/coflow/init.lua",
    ["coflow.lazy"] = "lua/coflow/lazy.lua",
    ["coflow.main"] = "lua/coflow/main.lua",
    ["coflow.meta"] = "lua/coflow/meta.lua",
    ["coflow.parallel"] = "lua/coflow/parallel.lua",
    ["coflow.pipeline"] = "lua/coflow/pipeline.lua",
    ["coflow.resilience"] = "lua/coflow/resilience.lua",
    ["coflow.resilience.bulkhead"] = "lua/coflow/resilience/bulkhead.lua",
    ["coflow.resilience.circuit_breaker"] = "lua/coflow/resilience/circuit_breaker.lua",
    ["coflow.resilience.hedging"] = "lua/coflow/resilience/hedging.lua",
    ["coflow.resilience.places"] = "lua/coflow/resilience/places.lua",
    ["coflow.resilience.rate_limiter"] = "lua/coflow/resilience/rate_limiter.lua",
    ["coflow.resilience.retry"] = "lua/coflow/resilience/retry.lua",
    ["coflow.resilience.strategy"] = "lua/coflow/resilience/strategy.lua",
    ["coflow.scheduler"] = "lua/coflow/scheduler.lua",
    ["coflow.scope"] = "lua/coflow/scope.lua",
    ["coflow.signal"] = "lua/coflow/signal.lua",
    ["coflow.stream"] = "lua/coflow/stream.lua",
    ["coflow.sync"] = "lua/coflow/sync.lua",
    ["coflow.task"] = "lua/coflow/task.lua",
    ["coflow.testing"] = "lua/coflow/testing.lua",
  },
}
