# Two commands do everything on a fresh machine: `make demo` and `make test`. They make a virtual environment in .venv,
# and use it again the next time. PYTHON chooses the interpreter, TORCH the release of torch for the demo: the default
# is the one that the tests pin; nbddp itself only asks for 2.6 or newer.

PYTHON ?= python3
TORCH ?= torch==2.13.0

.PHONY: demo test check bench notebooks clean

demo: .venv/demo
	.venv/bin/python -m nbddp notebooks/01_quickstart.ipynb

test: .venv/test .venv/oldest/made check
	.venv/bin/python -m pytest
	.venv/bin/python -m pytest --nbval notebooks
	# Once more, on the oldest IPython; its warnings are of its own time.
	.venv/oldest/bin/python -m pytest -p no:nbval -W default --deselect tests/test_readme.py

check: .venv/test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# Run the notebooks anew and save what they show, which `make test` then holds them to.
notebooks: .venv/test
	.venv/bin/python -m tests.save_notebooks notebooks/*.ipynb

bench: .venv/test
	.venv/bin/python -m pip install --quiet -e '.[bench]'
	.venv/bin/python benchmarks/run.py
	.venv/bin/python benchmarks/data.py

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nbddp needs Python 3.11 or newer; set PYTHON")'
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml
	.venv/bin/python -m pip install --quiet -e '.[demo]' $(TORCH)
	touch $@

.venv/test: .venv/bin/python pyproject.toml
	.venv/bin/python -m pip install --quiet -e '.[test,demo]'
	touch $@

# What is not installed here is found in the first environment.
.venv/oldest/made: .venv/test tests/oldest.txt
	.venv/bin/python -m venv .venv/oldest
	.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$(.venv/oldest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/rest.pth
	.venv/oldest/bin/python -m pip install --quiet -r tests/oldest.txt
	.venv/oldest/bin/python -m pip install --quiet --no-deps -e .
	touch $@

clean:
	rm -rf .venv
