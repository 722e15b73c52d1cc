# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
#
#   make demo        bare hosts to answering models, in a sandbox on this machine
#   make demo-down   remove every trace of it
#   make test        everything that CI runs

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VERSION := $(shell sed -n 's/^version: *//p' galaxy.yml)
BIN := $(CURDIR)/.venv/bin
TARBALL := .build/dist/gpu_fleet-nim-$(VERSION).tar.gz
COLLECTIONS := $(CURDIR)/.build/collections
SOURCES := $(shell git ls-files -co --exclude-standard -- galaxy.yml README.md CHANGELOG.rst LICENSE LICENSES REUSE.toml \
	docs meta playbooks plugins roles)
SANDBOX := $(BIN)/python tests/sandbox/sandbox.py
SCENARIOS := $(sort $(notdir $(patsubst %/molecule.yml,%,$(wildcard molecule/*/molecule.yml))))
HOSTS ?= 2
S ?= $(SCENARIOS)

export PATH := $(BIN):$(PATH)
export ANSIBLE_COLLECTIONS_PATH := $(COLLECTIONS)
export ANSIBLE_HOME := $(CURDIR)/.build/ansible
export ANSIBLE_INJECT_FACT_VARS := false

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# -- tools ------------------------------------------------------------------------------------------

.PHONY: venv
venv: .venv/.stamp ## Install the tools into .venv

.venv/.stamp: requirements-dev.txt
	@echo "== installing Ansible, the linters and the test tools into .venv"
	@python3 -c 'import ensurepip' 2>/dev/null || tests/tools.sh ensurepip=python3-venv
	@test -x $(BIN)/python || python3 -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt 2> >(grep -v 'is ignored: it is neither' >&2)
	@touch $@

# The checkout under the path that Python and Ansible expect of a collection.
.build/ansible_collections/gpu_fleet/nim:
	@mkdir -p $(@D) && ln -sfn ../../.. $@

# -- build ------------------------------------------------------------------------------------------

.PHONY: build
build: $(TARBALL) ## Build the collection tarball

$(TARBALL): $(SOURCES) | .venv/.stamp
	@$(BIN)/ansible-galaxy collection build --force --output-path $(@D) . | sed 's/^/== /'

# What the demo and molecule run is the tarball, installed as a user installs it.
.PHONY: install
install: $(COLLECTIONS)/.stamp
$(COLLECTIONS)/.stamp: $(TARBALL)
	@rm -rf $(COLLECTIONS) && mkdir -p $(COLLECTIONS)
	@$(BIN)/ansible-galaxy collection install --offline --no-deps -p $(COLLECTIONS) $(TARBALL) 2>&1 | grep -v WARNING | sed 's/^/== /'
	@touch $@

# -- sandbox and demo -------------------------------------------------------------------------------

.PHONY: sandbox
sandbox: .venv/.stamp ## Start the sandbox with HOSTS=n bare GPU hosts
	@$(SANDBOX) up -n $(HOSTS)

.PHONY: demo
demo: install ## Bare hosts to three answering models, then a table and a chat with each
	@tests/sandbox/demo.sh

.PHONY: demo-down
demo-down: ## Remove every trace of the sandbox (Debian packages that it installed stay)
	@if test -d .sandbox; then $(SANDBOX) down; else echo "== there is no sandbox"; fi

.PHONY: screenshot
screenshot: install ## docs/images/fleet-report.png out of the demo that is up (installs chromium)
	@tests/sandbox/screenshot.sh

# -- tests ------------------------------------------------------------------------------------------

.PHONY: test
test: lint unit rollouts sanity molecule ## Everything that CI runs

.PHONY: readme
readme: demo ## The demo, then every playbook command that the README shows
	@ANSIBLE_CONFIG=$(CURDIR)/.sandbox/ansible.cfg $(BIN)/python tests/sandbox/readme.py commands --output .sandbox

.PHONY: lint
lint: .venv/.stamp .build/ansible_collections/gpu_fleet/nim $(COLLECTIONS)/.stamp ## Linters and type checker
	@echo "== ruff"; $(BIN)/ruff check . && $(BIN)/ruff format --check .
	@echo "== mypy"; $(BIN)/mypy
	@echo "== yamllint"; $(BIN)/yamllint --strict .
	@echo "== reuse"; git ls-files -co --exclude-standard -z | xargs -0 $(BIN)/reuse lint-file
	@echo "== ansible-lint"; ANSIBLE_COLLECTIONS_PATH=$(COLLECTIONS) $(BIN)/ansible-lint --offline --strict -q
	@echo "== documentation"; cd $(COLLECTIONS)/ansible_collections/gpu_fleet/nim && $(BIN)/antsibull-docs lint-collection-docs --plugin-docs .

.PHONY: unit
unit: .venv/.stamp .build/ansible_collections/gpu_fleet/nim ## Unit tests
	@tests/tools.sh apt-get=apt dpkg=dpkg haproxy=haproxy openssl=openssl systemd-analyze=systemd
	@PYTHONPATH=.build $(BIN)/pytest -n 2 -m "not rollout" tests/unit

.PHONY: rollouts
rollouts: .venv/.stamp .build/ansible_collections/gpu_fleet/nim ## The playbooks of rollouts with played hosts, under load behind a real HAProxy (2 minutes)
	@tests/tools.sh haproxy=haproxy openssl=openssl
	@PYTHONPATH=.build $(BIN)/pytest -n 2 -m rollout tests/unit

.PHONY: fuzz
fuzz: .venv/.stamp .build/ansible_collections/gpu_fleet/nim ## Every parser with fifty times as much damaged input as `make unit`
	@PYTHONPATH=.build HYPOTHESIS_PROFILE=fuzz $(BIN)/pytest -n 2 tests/unit/test_fuzz_*.py tests/unit/test_requirements.py \
	  tests/unit/test_untrusted.py tests/unit/test_generated_inventories.py tests/unit/test_redaction_properties.py

.PHONY: sanity
sanity: .venv/.stamp ## ansible-test sanity, without ignores
	@tests/sanity.sh

.PHONY: molecule
molecule: install ## Molecule scenarios; one with S=name
	@tests/molecule.sh $(S)

.PHONY: test-full
test-full: install fuzz ## The long tables: every driver branch, drifts, fuzzing, interruptions, every known failure, upgrades under load, a real dnf on RPM look-alikes, systemd's start limit
	@tests/tools.sh mmdebstrap=mmdebstrap
	@$(BIN)/pytest -n 2 tests/sandbox/rpm
	@TEST_FULL=1 tests/molecule.sh lifecycle upgrade
	@$(BIN)/pytest -v tests/full/test_failure_signatures.py
	@$(BIN)/pytest -n 2 -v tests/full --ignore tests/full/test_failure_signatures.py --ignore tests/full/test_upgrade_faults.py
	@$(BIN)/pytest -v tests/full/test_upgrade_faults.py

# The baseline's collections, and the same ansible-core as in .venv.
.build/bench-venv/.stamp: tests/benchmarks/requirements.txt requirements-dev.txt
	@echo "== installing the collections of the baseline into .build/bench-venv"
	@test -x $(@D)/bin/python || python3 -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c requirements-dev.txt -r $< 2> >(grep -v 'is ignored: it is neither' >&2)
	@touch $@

.PHONY: bench
bench: install .build/bench-venv/.stamp ## site against roles task by task, and against a ping (15 minutes, on an idle machine)
	@$(BIN)/python tests/benchmarks/bench.py

.PHONY: bench-upgrade
bench-upgrade: install ## A roll of the driver over four hosts under load, against the least it could take (20 minutes, on an idle machine)
	@$(BIN)/python tests/benchmarks/upgrade.py

.PHONY: test-gpu
test-gpu: ## On a server (x86-64) with NVIDIA GPUs that are not in MIG mode: what only real hardware can tell (see tests/real_gpu)
	@tests/real_gpu/run.sh

.PHONY: clean
clean: demo-down ## Remove everything that was built
	@rm -rf .build .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .ansible
