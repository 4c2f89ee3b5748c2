# Two commands do everything on a fresh machine: `make demo` and `make test`. They make a virtual environment in .venv,
# and use it again the next time. PYTHON chooses the interpreter, TORCH the release of torch for the demo: the default
# is the one that the tests pin; nbddp itself only asks for 2.6 or newer.

PYTHON ?= python3
TORCH ?= torch==2.13.0

# The tests of what differs from one IPython and ipykernel to the next.
SHELL_TESTS = $(patsubst %,tests/test_%.py,cell completion config errors expression frontends output)

# Two at a time, since most of a test is waiting; those that take the whole machine come after, one by one. What has
# failed beside another is run again by itself, where its times mean something, and must pass there.
two_at_a_time = $(1) -n 2 --dist loadfile -m $(2) || $(1) -m $(2) --last-failed --last-failed-no-failures none

.PHONY: demo test long check browser cluster bench notebooks clean

demo: .venv/demo
	.venv/bin/python -m nbddp notebooks/01_quickstart.ipynb

test: .venv/test .venv/libraries/made .venv/oldest/made check browser cluster
	$(call two_at_a_time,.venv/bin/python -m pytest,"not alone")
	.venv/bin/python -m pytest -m alone
	NBDDP_PLAIN=1 .venv/libraries/bin/python -m pytest --nbval notebooks -n 2 --dist loadfile
	# What IPython has a part in, once more on the oldest; its warnings are of its own time.
	$(call two_at_a_time,.venv/oldest/bin/python -m pytest -p no:nbval -W default $(SHELL_TESTS),"not slow")

# A thousand cells in one kernel, where `make test` has two hundred; and the scripts of all notebooks, run and compared.
long: .venv/test .venv/libraries/made
	NBDDP_CELLS=1000 .venv/bin/python -m pytest -k cell_after_cell tests/test_endurance.py tests/test_kept.py
	NBDDP_LONG=1 .venv/libraries/bin/python -m pytest tests/test_export.py -k our_notebooks

check: .venv/test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# What the tests in JupyterLab need, where it can be had without asking: as root, by apt-get. Where it cannot, those tests are
# skipped, and say so at the end.
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
		command -v $$name > /dev/null && exit; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		echo "apt-get install chromium"; \
		export DEBIAN_FRONTEND=noninteractive; \
		timeout 60 apt-get -qq update > /dev/null; \
		timeout 300 apt-get -qq install -y --no-install-recommends chromium > /dev/null; \
	fi; \
	command -v chromium > /dev/null || echo "no browser: the tests in JupyterLab will be skipped"

# What the tests on several machines need, had in the same way: Slurm, sshd, a csh (some sites' login shell), and ip for
# machines with addresses of their own.
# The tests start daemons of their own; those of the packages are not started, neither now nor with the machine.
cluster:
	@missing=; for pair in slurmd:slurmd slurmctld:slurmctld munged:munge sshd:openssh-server tcsh:tcsh; do \
		PATH="$$PATH:/usr/sbin" command -v $${pair%:*} > /dev/null || missing="$$missing $${pair#*:}"; \
	done; \
	command -v srun > /dev/null || missing="$$missing slurm-client"; \
	command -v ip > /dev/null || missing="$$missing iproute2"; \
	if [ "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		echo "apt-get install$$missing"; \
		export DEBIAN_FRONTEND=noninteractive; \
		policy=/usr/sbin/policy-rc.d; \
		if [ ! -e $$policy ]; then \
			trap 'rm -f /usr/sbin/policy-rc.d' EXIT; printf '#!/bin/sh\nexit 101\n' > $$policy; chmod 755 $$policy; \
		fi; \
		timeout 60 apt-get -qq update > /dev/null; \
		timeout 300 apt-get -qq install -y --no-install-recommends $$missing > /dev/null 2>&1; \
		if [ -d /run/systemd/system ]; then \
			systemctl --quiet disable $$(echo $$missing | sed s/openssh-server/ssh/) 2> /dev/null; \
		fi; \
	fi; \
	command -v srun > /dev/null || echo "no Slurm: the tests of runs under Slurm will be skipped"; \
	PATH="$$PATH:/usr/sbin" command -v sshd > /dev/null || echo "no sshd: the tests of runs over ssh will be skipped"

# Run the notebooks anew and save what they show, which `make test` then holds them to.
notebooks: .venv/libraries/made
	NBDDP_PLAIN=1 .venv/libraries/bin/python -m tests.save_notebooks notebooks/*.ipynb

bench: .venv/test
	.venv/bin/python -m pip install --quiet -e '.[bench]'
	.venv/bin/python benchmarks/run.py
	.venv/bin/python benchmarks/data.py
	.venv/bin/python benchmarks/output.py
	.venv/bin/python benchmarks/stop.py
	.venv/bin/python benchmarks/nodes.py
	.venv/bin/python benchmarks/peers.py

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nbddp needs Python 3.11 or newer; set PYTHON")'
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml
	.venv/bin/python -m pip install --quiet -e '.[demo]' $(TORCH)
	touch $@

.venv/test: .venv/bin/python pyproject.toml
	.venv/bin/python -m pip install --quiet -e '.[test,demo]'
	touch $@

# The oldest IPython; and the libraries that the notebooks show. What is not installed here is found in the first environment.
.venv/%/made: .venv/test tests/%.txt
	.venv/bin/python -m venv .venv/$*
	.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$(.venv/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/rest.pth
	.venv/$*/bin/python -m pip install --quiet -r tests/$*.txt
	.venv/$*/bin/python -m pip install --quiet --no-deps -e .
	touch $@

clean:
	rm -rf .venv
