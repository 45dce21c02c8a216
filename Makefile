# Everything runs in .venv, which `make` creates; nothing outside this folder is changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help quickstart test test-slow test-ray test-clients lint format docs bad-images clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed; name it with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# --constraint pins every version that was tested; a stamp file remembers what was installed.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev,onnx,litert,int8]'
	@touch $@ $(VENV)/.installed

# An environment of its own: without these packages everything else must work, too.
.venv-ray/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable '.[dev,litert,test-ray]'
	@touch $@

quickstart: $(VENV)/.installed  ## install, draw practice photos, train, predict one photo
	@test -d quickstart-photos || $(BIN)/finetune sample quickstart-photos
	$(BIN)/finetune train configs/quickstart.yaml
	$(BIN)/finetune predict "$$(ls -d quickstart-photos/city/*.jpg | head -n 1)"

test: $(VENV)/.installed-dev  ## run the test suite (under 10 minutes)
	$(BIN)/python -m pytest -m "not slow and not machines" -n 2 --dist loadfile

test-slow: $(VENV)/.installed-dev  ## run the long tests, too: faults, all backbones, exports
	$(BIN)/python -m pytest -m "slow and not machines" -o timeout=1200

test-ray: .venv-ray/.installed  ## let stores and workers be processes here: S3, Google Cloud Storage, Ray
	.venv-ray/bin/python -m pytest -m machines -o timeout=600

test-clients: $(VENV)/.installed-dev  ## let other programs answer for exports: all, or make test-clients CLIENTS="litert"
	$(BIN)/python tools/test_clients.py $(CLIENTS)

lint: $(VENV)/.installed-dev  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## let ruff format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-dev  ## renew the help texts in docs/commands.md
	$(BIN)/python tools/update_docs.py

bad-images: $(VENV)/.installed-dev  ## fetch the odd, broken and hostile pictures that the tests use when present
	$(BIN)/python tools/fetch_bad_images.py

clean:  ## remove what make created
	rm -rf .venv* .clients quickstart-photos
