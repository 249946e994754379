# coflow - build, run, test, check, install.
#
# `make` needs a C compiler, the headers of Lua 5.4 and libuv, and builds into build/. The targets
# run, test, lint, check and bench first install what this machine lacks (.ci/setup).
#
#   make test                                     every spec
#   make test SPEC=spec/task_spec.lua             one file (or several)
#   make test BUSTED_ARGS='--filter="in order"'   options for busted
#   make test JOBS=1                              one file at a time, not one for each processor
#   make check                                    the same under sanitizers and collector stress
#   eval "$(make -s env)"                         the built module, loadable from any directory
#
# What follows is found (.ci/find) unless given: make CC=clang LUA_CFLAGS=-I/opt/lua/include

PREFIX  ?= /usr/local
CFLAGS  ?= -O2 -g -fno-plt -fno-asynchronous-unwind-tables
BUILD   := build

JOBS    ?= $(shell nproc 2>/dev/null || echo 1)
# For a make of ours, unless whoever called this one has said how many.
PARALLEL = $(if $(filter -j%,$(MAKEFLAGS)),,-j$(JOBS))

# Looked up when first used, then remembered: a target that needs no compiler asks for none.
LUA        ?= $(eval LUA := $(shell sh .ci/find lua))$(LUA)
LUA_CFLAGS ?= $(eval LUA_CFLAGS := $(shell sh .ci/find lua-cflags))$(LUA_CFLAGS)
LUA_LIBS   ?= $(eval LUA_LIBS := $(shell sh .ci/find lua-libs))$(LUA_LIBS)
UV_CFLAGS  ?= $(eval UV_CFLAGS := $(shell sh .ci/find uv-cflags))$(UV_CFLAGS)
UV_LIBS    ?= $(eval UV_LIBS := $(shell sh .ci/find uv-libs))$(UV_LIBS)

COMPILE  = $(CC) -std=c11 -D_GNU_SOURCE $(CPPFLAGS) $(CFLAGS) -fPIC -fvisibility=hidden -pthread \
           -Wall -Wextra $(LUA_CFLAGS) $(UV_CFLAGS)
LINK     = $(CC) -shared -pthread $(CFLAGS) $(LDFLAGS)
MODULE   = $(BUILD)/coflow/core.so
# The kernel first: what every script runs lies together, and the pages of the rest are not read.
KERNEL   = module blame error trace task fiber fiber_await fiber_abandon loop poll shutdown scope cancel context map guard timer deadline combine
OBJECTS  = $(patsubst %,$(BUILD)/%.o,$(KERNEL) $(filter-out $(KERNEL),\
           $(patsubst src/%.c,%,$(sort $(wildcard src/*.c)))))
SCRIPTS  = $(shell cd lua && find . -name '*.lua' | sort)

# What makes the built module loadable: our paths, then what LUA_PATH was, then Lua's default.
ours     = $(CURDIR)/lua/?.lua;$(CURDIR)/lua/?/init.lua;
ours_c   = $(CURDIR)/$(BUILD)/?.so;
theirs   = $(subst $1,,$(if $2,$2$(if $(findstring ;;,$2),,;;),;))
PATHS    = LUA_PATH="$(ours)$(call theirs,$(ours),$(or $(LUA_PATH_5_4),$(LUA_PATH)))" \
           LUA_CPATH="$(ours_c)$(call theirs,$(ours_c),$(or $(LUA_CPATH_5_4),$(LUA_CPATH)))"
# The variables with a version in their names would win over ours.
RIVAL_PATHS = $(if $(LUA_PATH_5_4)$(LUA_CPATH_5_4),unset LUA_PATH_5_4 LUA_CPATH_5_4)
WITH_PATHS  = unset LUA_PATH_5_4 LUA_CPATH_5_4; export $(PATHS) LUA="$(LUA)";

MAKEFLAGS += --no-print-directory
.PHONY: build env probe run test lint check bench install rockspec format clean FORCE
.PHONY: do-run do-test do-lint do-check do-check-specs do-bench

build: $(MODULE)

$(MODULE): $(OBJECTS)
	@mkdir -p $(@D)
	$(LINK) -o $@ $(OBJECTS) $(UV_LIBS)

$(BUILD)/%.o: src/%.c $(BUILD)/flags
	$(COMPILE) -MMD -MP -c -o $@ $<

# Written only when it changes, so that other flags, headers or sources rebuild what they must.
$(BUILD)/flags: export NOW = $(COMPILE) : $(LINK) $(OBJECTS) $(UV_LIBS)
$(BUILD)/flags: FORCE
	@printf '%s\n' "$$NOW" | cmp -s - $@ || { \
	  sh .ci/probe $(COMPILE) && mkdir -p $(@D) && printf '%s\n' "$$NOW" >$@; }

-include $(OBJECTS:.o=.d)

probe:
	@sh .ci/probe $(COMPILE)

env:
	@$(if $(RIVAL_PATHS),echo '$(RIVAL_PATHS)')
	@echo 'export $(PATHS)'

# ---- Targets that set up the machine first; then a second make, which sees what is there now ----

run test lint check bench:
	@sh .ci/setup $@
	@$(MAKE) $(PARALLEL) do-$@

do-run: build
	@$(WITH_PATHS) exec "$(LUA)" examples/service.lua examples/data/access.log

do-test: build
	@$(WITH_PATHS) export JOBS=$(JOBS); exec sh .ci/specs "$(LUA)" $(SPEC)

do-lint: build
	@JOBS=$(JOBS) sh .ci/lint $(MODULE) $(COMPILE)

do-bench: build
	@test -x bench/run || { echo "bench/run is not there yet" >&2; exit 1; }
	@$(WITH_PATHS) CC="$(CC)" LUA_CFLAGS="$(LUA_CFLAGS)" UV_CFLAGS="$(UV_CFLAGS)" \
	  UV_LIBS="$(UV_LIBS)" exec bench/run $(BENCH_ARGS)

# ---- check: the specs with sanitizers, then again with a collection at every allocation ----
#
# The first of these runs plays many more random programs, and runs what is ready in the order of a
# seed, since specs must not rely on another that nobody has promised.

SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer

do-check:
	@$(MAKE) BUILD=build/check CFLAGS="-O1 -g $(SANITIZE)" LUA="$(CURDIR)/build/check/lua" do-check-specs

do-check-specs: build $(BUILD)/lua
	@$(WITH_PATHS) export JOBS=$(JOBS) UBSAN_OPTIONS=print_stacktrace=1 ASAN_OPTIONS=print_legend=0:$$ASAN_OPTIONS; \
	  echo "== specs under AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer"; \
	  COFLOW_MORE_SEEDS=$${COFLOW_MORE_SEEDS:-20} COFLOW_SEED=$${COFLOW_SEED:-1} \
	  sh .ci/specs "$(LUA)" $(SPEC); status=$$?; \
	  echo "== the same, with a full collection at every allocation"; \
	  COFLOW_GC_STRESS=1 sh .ci/specs "$(LUA)" $(SPEC) && exit $$status

# -rdynamic, and Lua as a shared library: the module must find this program's luaL_newstate first.
$(BUILD)/lua: .ci/host.c $(BUILD)/flags
	$(CC) -std=c11 -D_GNU_SOURCE $(CFLAGS) -Wall -Wextra $(LUA_CFLAGS) -rdynamic -o $@ $< \
	  $(LUA_LIBS) -ldl -lm

# ---- Install ----

install: build
	install -d "$(DESTDIR)$(PREFIX)/lib/lua/5.4/coflow" "$(DESTDIR)$(PREFIX)/include"
	install -m 755 $(MODULE) "$(DESTDIR)$(PREFIX)/lib/lua/5.4/coflow/core.so"
	$(if $(wildcard src/coflow.h),install -m 644 src/coflow.h "$(DESTDIR)$(PREFIX)/include/coflow.h")
	cd lua && for f in $(SCRIPTS); do \
	  install -D -m 644 $$f "$(DESTDIR)$(PREFIX)/share/lua/5.4/$$f" || exit; done

rockspec:
	sh .ci/rockspec scm-1 >rockspec/coflow-scm-1.rockspec

format:
	$(shell command -v clang-format-14 || echo clang-format) -i .ci/*.c src/*.[ch]

clean:
	rm -rf build
