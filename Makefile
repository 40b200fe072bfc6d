# make demo    train a digit detector with the library's ops, and see what it finds
# make test    the whole test suite
# make docs    the documentation, in site/; whatever it would warn of is an error
# make peers   with torchvision and mmdet, each with and without these ops (downloads gigabytes)
# make oldest  every kernel compiled with the oldest Triton that pyproject.toml admits
# make check   what CI runs: tests, linters, types, packages, documentation, the demo's quick forms
# make gpu-check   all that a GPU can say, in nine minutes: tests, compute-sanitizer, figures
#
# VENV=        use the present environment, install nothing (no network needed)
# TORCH=...    another torch, e.g. TORCH=torch==2.11.0
# ARGS=...     further arguments to the demo, to pytest or to the GPU check
# OUT=...      folder for what the GPU check leaves (perf/out)
# COMMIT=...   what the GPU check records as the commit, in a copy without git

VENV ?= .venv
PEERS ?= .venv-peers
TORCH ?= $(shell cat constraints.txt)
PYTHON ?= python3
RUN := PYTHONPATH=. $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
WORKERS ?= auto

DEMOS := demo-quick demo-losses demo-nms demo-dcn

.PHONY: demo $(DEMOS) test lint types wheel docs oldest peers check gpu-check clean FORCE

demo: $(if $(VENV),$(VENV)/demo.installed)
	$(RUN) examples/digits_detector.py $(ARGS)

test: $(if $(VENV),$(VENV)/test.installed)
	$(RUN) -m pytest tests -q $(if $(WORKERS),-n $(WORKERS) --dist loadgroup) $(ARGS)

lint: $(if $(VENV),$(VENV)/dev.installed)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(if $(VENV),$(VENV)/dev.installed)
	$(RUN) -m mypy

wheel: $(if $(VENV),$(VENV)/dev.installed)
	$(RUN) tests/tools/check_wheel.py

docs: $(if $(VENV),$(VENV)/docs.installed)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

oldest: $(if $(VENV),$(VENV)/test.installed)
	$(RUN) -m tests.tools.oldest

peers: $(PEERS)/installed
	PYTHONPATH=. $(PEERS)/bin/python -m pytest tests/test_peers.py -q -rs $(ARGS)

$(PEERS)/installed: pyproject.toml
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet torchvision mmcv-lite==2.1.0 mmdet==3.3.0 -e '.[test]'
	touch $@

# One core each; all is installed by then, so that no two installations meet.
check: test oldest $(if $(VENV),$(patsubst %,$(VENV)/%.installed,dev docs demo))
	OMP_NUM_THREADS=1 $(MAKE) -j 2 -O wheel lint types docs $(DEMOS)

demo-quick:
	$(MAKE) demo ARGS="--quick --out runs/quick"
demo-losses:
	$(MAKE) demo ARGS="--loss all --quick --steps 20 --out runs/losses"
demo-nms:
	$(MAKE) demo ARGS="--nms all --quick --steps 20 --out runs/nms"
demo-dcn:
	$(MAKE) demo ARGS="--dcn --quick --steps 20 --out runs/dcn"

# OUT and COMMIT reach it as environment variables.
gpu-check: $(if $(VENV),$(VENV)/test.installed)
	$(RUN) -m dlops_triton.perf.gpu_check $(ARGS)

$(VENV)/%.installed: pyproject.toml $(VENV)/constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c $(VENV)/constraints.txt -e '.[$*,demo]'
	touch $@

# Written when TORCH changes, so that an environment with another torch is installed anew.
$(VENV)/constraints.txt: FORCE
	@mkdir -p $(VENV)
	@echo "$(TORCH)" | cmp -s - $@ || echo "$(TORCH)" > $@

FORCE:

clean:
	rm -rf $(VENV) $(PEERS) build dist runs site *.egg-info
