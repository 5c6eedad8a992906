# `make run` and `make test` do all of their own set-up: they need Python 3.11+ and make.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
SECONDS ?= 60

VENV := .venv
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest -n 3 --dist loadfile

.PHONY: help run test check test-processors test-clients install-media test-media run-ray test-ray bench soak clean

help:
	@echo 'make run     start the service on http://$(HOST):$(PORT); HOST=… and PORT=… change that'
	@echo 'make test    run the tests'
	@echo 'make check   check format, lint and types, then run the tests'
	@echo 'make test-processors tests the service as on processors with less'
	@echo 'make test-clients tests it with other people'"'"'s clients, which it installs'
	@echo 'make install-media adds what sounds, pictures, videos and shapes need (docs/media.md)'
	@echo 'make test-media tests sounds, pictures, videos and shapes (docs/media.md)'
	@echo 'make run-ray replicas behind Ray Serve on http://127.0.0.1:8000; make test-ray tests that'
	@echo 'make bench   measure the service; BENCH_ARGS=… is passed on'
	@echo 'make soak    mixed traffic for SECONDS=$(SECONDS), then what was left behind'
	@echo 'make clean   remove the virtual environment and all caches'
	@echo
	@echo 'The first run installs requirements.txt into $(VENV). PYTHON=python3.12 picks the Python;'
	@echo 'pip reads its usual variables. Linux without a GPU: several GB less to download with'
	@echo '    make run PIP_EXTRA_INDEX_URL=… (the CPU index that pytorch.org/get-started names)'

# exec: signals reach uvicorn itself. `python -m` survives a moved checkout, bin/uvicorn does not.
run: $(VENV)/.run
	@exec $(PY) -m uvicorn main:app --host "$(HOST)" --port "$(PORT)" --timeout-graceful-shutdown 25

test: $(VENV)/.test
	$(PYTEST)

check: $(VENV)/.test
	$(PY) -m ruff format --check
	$(PY) -m ruff check
	$(PY) -m mypy
	$(PYTEST)

# exec: SIGTERM reaches the script, which then lets the replicas finish.
run-ray: $(VENV)/.ray
	@exec $(PY) ray_serve.py

test-processors: $(VENV)/.test
	$(PY) -m pytest -m processors

test-clients: $(VENV)/.test
	$(PY) -m pytest -m clients

install-media: $(VENV)/.media

test-media: $(VENV)/.test $(VENV)/.media
	$(PY) -m pytest -m media

test-ray: $(VENV)/.test $(VENV)/.ray
	$(PY) -m pytest -m slow

bench: $(VENV)/.test
	$(PY) scripts/bench.py $(BENCH_ARGS)

soak: $(VENV)/.test
	$(PY) scripts/soak.py --seconds $(SECONDS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .schemathesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An interrupted install leaves .installing behind. Then, or when the environment's Python no
# longer starts, the environment is made anew. An install that merely fails changes nothing.
ifneq ($(shell test ! -e $(VENV)/.installing && $(PY) -c 'print("works")' 2>/dev/null),works)
.PHONY: $(VENV)/.made
endif

define install
	@echo 'Installing $(1) into $(VENV)'
	@touch $(VENV)/.installing; trap 'exit 130' INT; \
	  $(PY) -m pip install --no-input --disable-pip-version-check -r $(1); \
	  status=$$?; rm $(VENV)/.installing; exit $$status
endef

$(VENV)/.made:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'Python 3.11 or newer is needed, "$(PYTHON)" is not: make $(MAKECMDGOALS) PYTHON=/path/to/python3' >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo '"$(PYTHON)" lacks venv or ensurepip; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@rm -rf $(VENV)
	@"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(VENV)/.run: requirements.txt $(VENV)/.made
	$(call install,requirements.txt)
	@touch $@

$(VENV)/.test: requirements-dev.txt requirements.txt $(VENV)/.made
	$(call install,requirements-dev.txt)
	@touch $(VENV)/.run $@

$(VENV)/.ray: requirements-ray.txt requirements.txt $(VENV)/.made
	$(call install,requirements-ray.txt)
	@touch $(VENV)/.run $@

$(VENV)/.media: requirements-media.txt requirements.txt $(VENV)/.made
	$(call install,requirements-media.txt)
	@touch $(VENV)/.run $@
