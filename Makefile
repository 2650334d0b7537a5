# make demo   see it work            make lint    formatters, linters, type checkers
# make test   lint, tests, coverage  make bench   measure it (PARTS="latency import": only some)
# make clean  remove what the others made
# make test-all   the same, then the tests with RabbitMQ 4.0 and 4.3 (Debian, by root), and without
#                 the fast paths
# make test-long  what breaks clusters, delays and copies, in full numbers, with each version
#
# Nothing is needed before but Python 3.11 or later, and pip: all Python packages go into .venv.
# RabbitMQ is installed when it is missing (Debian and its kin, by root or with sudo) and is not
# started: the demo and the tests start private nodes. With AMQP_URL set, the demo uses that one.

SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: demo test test-all test-long lint bench clean rabbitmq rabbitmq-4.0 rabbitmq-4.3

demo: $(VENV)/installed $(if $(AMQP_URL),,rabbitmq)
	$(BIN)/python examples/demo.py

PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test: lint rabbitmq
	$(PYTEST) --cov --cov-report=term-missing:skip-covered

# The whole suite as on an aiormq that lacks what the fast paths use, and what needs a broker with
# the other versions of it. What needs no broker behaves alike with all of them, and so do the
# examples.
test-all: rabbitmq-4.0 rabbitmq-4.3 test
	$(PYTEST) --documented-calls -m rabbitmq
	for version in 4.0 4.3; do \
		$(PYTEST) -m 'rabbitmq and not one_version' --rabbitmq $$version || exit 1; \
	done

# What `make test` does a few times is done a hundred times, or with a hundred thousand messages.
LONG := $(addprefix tests/faults/test_,cluster.py delays_at_scale.py kill_between_copy_and_ack.py)

test-long: $(VENV)/installed rabbitmq rabbitmq-4.0 rabbitmq-4.3
	for version in 3.10 4.0 4.3; do \
		$(BIN)/python -m pytest -rP --long --rabbitmq $$version $(LONG) || exit 1; \
	done

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/installed rabbitmq .venv-bench/installed
	@# The C client is measured where it can be built.
	@command -v gcc >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		{ [ -e /usr/include/amqp.h ] || apt-get -qq -y install librabbitmq-dev >/dev/null; } || true
	$(BIN)/python -m tests.benchmarks $(PARTS)

# Other work queues, to be compared with, in an environment of their own.
.venv-bench/installed: tests/benchmarks/peers.txt $(VENV)/installed
	$(PYTHON) -m venv --clear --without-pip .venv-bench
	$(BIN)/python -m pip --quiet --python .venv-bench/bin/python install --requirement $<
	@touch $@

clean:
	rm -rf $(VENV) .venv-bench .venv-bootstrap .coverage .coverage.* dist .hypothesis
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find aioworkq examples tests -name __pycache__ -type d -exec rm -rf {} +

# The virtual environment. pip of Debian 12 does not know dependency groups; ours must.
$(VENV)/installed: pyproject.toml $(VENV)/bin/pip
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable . --group dev
	@# pyright runs on Node.js: from a wheel where the machine has none.
	@command -v node >/dev/null || $(BIN)/python -m pip install --quiet 'pyright[nodejs]' || \
		echo 'There is no Node.js here and no wheel of it: pyright will try to download it.'
	@touch $@

# Debian's python3 has venv but lacks ensurepip until python3-venv is installed. Then pip puts
# itself into the new environment, or virtualenv makes one.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'Python 3.11 or later is needed: call make PYTHON=/path/to/python3.11.' >&2; exit 1; }
	@rm -rf $(VENV) .venv-bootstrap
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --quiet --python $(BIN)/python install pip; } || { \
		rm -rf $(VENV); \
		$(PYTHON) -m pip install --quiet --target .venv-bootstrap virtualenv && \
		PYTHONPATH=.venv-bootstrap $(PYTHON) -m virtualenv --quiet $(VENV); } || { \
		rm -rf $(VENV) .venv-bootstrap; \
		echo 'No virtual environment can be made: install venv for $(PYTHON).' >&2; \
		echo 'On Debian: apt-get install python3-venv.' >&2; exit 1; }
	@rm -rf .venv-bootstrap
	@test -x $@ && touch $@

# The package would start a node of the system: a policy forbids it where there is none yet.
define INSTALL_RABBITMQ
set -eu
for folder in /usr/lib/rabbitmq/bin /usr/local/sbin /usr/sbin /opt/homebrew/sbin; do
    PATH="$$PATH:$$folder"
done
if command -v rabbitmq-server >/dev/null; then exit 0; fi
if [ "$$(id -u)" = 0 ]; then
    as_root=
elif command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
    as_root=sudo
else
    as_root=nobody
fi
if [ "$$as_root" = nobody ] || ! command -v apt-get >/dev/null; then
    echo 'RabbitMQ is not installed, and this user cannot install it here.' >&2
    echo 'On Debian: apt-get install --no-install-recommends rabbitmq-server, as root.' >&2
    exit 1
fi
echo 'Installing RabbitMQ ...'
policy=/usr/sbin/policy-rc.d
if [ ! -e "$$policy" ]; then
    trap '$$as_root rm -f "$$policy"' EXIT
    trap 'exit 1' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' | $$as_root tee "$$policy" >/dev/null
    $$as_root chmod +x "$$policy"
fi
$$as_root apt-get -qq update || echo 'The package lists may be old: apt-get update failed.' >&2
$$as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq -y -o DPkg::Lock::Timeout=300 \
    install --no-install-recommends rabbitmq-server >/dev/null
endef
export INSTALL_RABBITMQ

rabbitmq:
	@sh -c "$$INSTALL_RABBITMQ"

# Other versions of RabbitMQ live in root file systems of their own, in the user's cache, where
# aioworkq.testing finds them. Debian 13 has RabbitMQ 4.0, Debian's unstable has 4.3.
define INSTALL_ROOT
set -eu
version=$$1 suite=$$2
folder=$${XDG_CACHE_HOME:-$$HOME/.cache}/aioworkq/rabbitmq
root=$$folder/debian-$$suite
if [ -d "$$root" ]; then exit 0; fi
if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "RabbitMQ $$version comes from Debian's $$suite: this needs Debian or its kin, and root." >&2
    exit 1
fi
echo "Installing RabbitMQ $$version into $$root ..."
if ! command -v debootstrap >/dev/null; then
    apt-get -qq update || echo 'The package lists may be old: apt-get update failed.' >&2
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 \
        install --no-install-recommends debootstrap >/dev/null
fi
. /etc/os-release
mirror=$$(apt-get indextargets --format '$$(REPO_URI)' 'Created-By: Packages' \
    "Codename: $$VERSION_CODENAME" 'Component: main' | head -n 1)
mkdir -p "$$folder"
log=$$folder/.$$suite.log
rm -rf "$$folder/.$$suite"
# What is not finished has a hidden name.
debootstrap --variant=minbase --include=rabbitmq-server "$$suite" "$$folder/.$$suite" $$mirror \
    >"$$log" 2>&1 || { tail -n 20 "$$log" >&2; exit 1; }
[ -s "$$folder/.$$suite/etc/hosts" ] || echo '127.0.0.1 localhost' >"$$folder/.$$suite/etc/hosts"
rm -rf "$$folder/.$$suite/var/cache/apt/archives"
mv "$$folder/.$$suite" "$$root"
rm "$$log"
endef
export INSTALL_ROOT

rabbitmq-4.0: rabbitmq
	@sh -c "$$INSTALL_ROOT" sh 4.0 trixie

rabbitmq-4.3: rabbitmq
	@sh -c "$$INSTALL_ROOT" sh 4.3 sid
