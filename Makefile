# Everything a contributor runs. `make` alone lists it; CONTRIBUTING.md says more.
#
# Tools and packages go into virtual environments in this folder, nothing outside it is touched.
# Written for GNU make 3.81, which macOS has.

PYTHON ?= python3
VENV ?= .venv

PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
# A worker for each core; what is left goes to those that are idle, so few make a fixture twice.
WORKERS := -n auto --dist worksteal
# All of the C++ runs in these. The others take long, measure, limit memory, or ask what torch does;
# what is queued asks the same of every rule.
NOT_SANITIZED := torch memory memory_estimate modes out_of_memory bench_command bench_tools blow_up
SANITIZED_TESTS := $(foreach test,$(NOT_SANITIZED),--ignore=tests/test_$(test).py) \
  --ignore=tests/metal --deselect=tests/test_parity.py::test_a_thousand_steps \
  $(foreach rule,Adam Lion,'--deselect=tests/test_queued.py::test_steps_that_wait_together_are_what_they_are_alone[$(rule)') \
  $(foreach rule,Adam Lion,'--deselect=tests/test_queued.py::test_a_step_reads_gradients_that_are_queued_before_it[$(rule)')
SUPPORTED := 3.10 3.11 3.12 3.13 3.14

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
CXX_SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.inc)
FORMATTED := $(CXX_SOURCES) $(wildcard metal/*.metal metal/*.h \
  tests/*.cpp tests/metal/*/*.cpp tests/metal/*/*.h tests/metal/*/*/*.h tests/metal/*/*/*.hpp)
SOURCES := pyproject.toml CMakeLists.txt $(CXX_SOURCES) $(wildcard metal/* scripts/metal_source.py \
  python/flatstep/*.py* python/flatstep/*/*.py)

.PHONY: help demo test test-all bench modes profile instructions lint format warnings sanitize macos-check linux stubs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       train a small transformer with mlx.optimizers and with flatstep, compare"
	@echo "make test       build, and run the tests; ARGS goes to pytest: make test ARGS='-k adam'"
	@echo "make test-all   all of them, those too that take long and say little more"
	@echo "make bench      measure against mlx.optimizers, torch and the memory's own speed"
	@echo "make modes      train in each way to store parameters and state, and measure memory: docs/memory.md"
	@echo "make profile    where the time of a step goes: Python, graph, evaluation, kernels"
	@echo "make instructions  count a step's instructions around its kernels, compare with the bound (Linux)"
	@echo "make lint       ruff, mypy, clang-format and the workflows' schema, changing nothing"
	@echo "make format     let ruff and clang-format lay out the sources"
	@echo "make warnings   compile with every compiler warning as an error"
	@echo "make sanitize   run the engine's tests under AddressSanitizer and UBSan (Linux, GCC)"
	@echo "make macos-check cross-compile for macOS on Linux, and check what a Mac would load"
	@echo "make stubs      write python/flatstep/_ext.pyi anew from the built extension"
	@echo "make clean      delete everything that the above have made"
	@echo "PYTHON=python3.12 chooses the interpreter, 3.10 to 3.14; now: $(PYTHON) ($(PYTHON_VERSION))"

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/.test clang-for-tests
	$(BIN)/python -m pytest $(WORKERS) -m "not exhaustive" $(ARGS)

test-all: $(VENV)/.test clang-for-tests
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

bench: $(VENV)/.bench
	$(BIN)/python -m flatstep bench $(ARGS)

modes: $(VENV)/.bench
	$(BIN)/python -m flatstep.benchmark.modes --plots build/memory $(ARGS)

profile: $(VENV)/.package
	$(BIN)/python -m flatstep.benchmark.profile $(ARGS)

# Needs valgrind. ARGS=--accept makes what it counts the bound.
instructions: $(VENV)/.package
	$(BIN)/python -m flatstep.benchmark.instructions $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	@echo "$(BIN)/clang-format --dry-run --Werror csrc metal tests/metal"
	@$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(VENV)/.lint
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(FORMATTED)

stubs: $(VENV)/.lint
	$(BIN)/python -m nanobind.stubgen --quiet --module flatstep._ext --output-file python/flatstep/_ext.pyi
	$(BIN)/ruff format --quiet python/flatstep/_ext.pyi

warnings: $(VENV)/.build-tools
	$(BIN)/cmake -S . -B build/warnings -G Ninja --log-level=WARNING \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DFLATSTEP_WERROR=ON
	$(BIN)/cmake --build build/warnings

# Python itself is not instrumented, so the sanitizers' libraries are loaded before it, and
# libstdc++ with them, whose exceptions they intercept. Python's own leaks are not looked for.
sanitize:
	@[ "$$(uname)" = Linux ] || { echo "make sanitize: only on Linux, with GCC"; exit 1; }
	@SKBUILD_CMAKE_DEFINE=FLATSTEP_SANITIZE=ON SKBUILD_CMAKE_BUILD_TYPE=Debug \
	  SKBUILD_BUILD_DIR=build/sanitize \
	  $(MAKE) --no-print-directory VENV=.venv-sanitize .venv-sanitize/.sanitize
	LD_PRELOAD=$$(ldd .venv-sanitize/lib/python*/site-packages/flatstep/_ext*.so | \
	    awk '/libasan|libubsan|libstdc/ {print $$3}' | sort | paste -sd: -) \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  .venv-sanitize/bin/python -m pytest $(WORKERS) $(SANITIZED_TESTS) $(ARGS)

# The module that a Mac would build, and what can be known of it without one. scripts/macos/ says how.
MACOS := build/macos
MACOS_SOABI = cpython-$(subst .,,$(PYTHON_VERSION))-darwin
macos-check: linux $(MACOS)/.prepared
	@$(BIN)/cmake -S . -B $(MACOS)/build -G Ninja --log-level=WARNING \
	  --toolchain scripts/macos/toolchain.cmake -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DPython_INCLUDE_DIR=$(abspath $(MACOS)/python) \
	  -DMLX_ROOT=$(abspath $(MACOS)/site-packages/mlx/share/cmake) -DSKBUILD_SOABI=$(MACOS_SOABI) \
	  -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON -DFLATSTEP_WERROR=ON -Wno-unused-cli
	$(BIN)/cmake --build $(MACOS)/build -- --quiet
	$(BIN)/python scripts/macos/check.py $(MACOS)/build/_ext.$(MACOS_SOABI).so
	$(BIN)/python scripts/macos/faults.py $(MACOS)/build/_ext.$(MACOS_SOABI).so

linux:
	@[ "$$(uname)" = Linux ] || { echo "make macos-check: only on Linux; on a Mac, make test"; exit 1; }

clean:
	rm -rf $(VENV) .venv-sanitize build dist demo.png
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- Environments. A stamp says what is installed, so that a second run starts at once. ----

$(VENV)/.python-$(PYTHON_VERSION):
ifeq ($(PYTHON_VERSION),)
	@echo "make: no interpreter '$(PYTHON)' found; choose one with PYTHON=..." && exit 1
else ifeq ($(filter $(PYTHON_VERSION),$(SUPPORTED)),)
	@echo "make: $(PYTHON) is Python $(PYTHON_VERSION), flatstep needs 3.10 to 3.14; choose one with PYTHON=..." && exit 1
else
	@echo "Creating $(VENV) with Python $(PYTHON_VERSION)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@
endif

$(VENV)/.build-tools: $(VENV)/.python-$(PYTHON_VERSION) pyproject.toml scripts/build_requirements.py
	@echo "Installing MLX and the build tools"
	@$(BIN)/python scripts/build_requirements.py > $(VENV)/build-requirements.txt
	@$(PIP) install --requirement $(VENV)/build-requirements.txt
	@touch $@

$(VENV)/.package: $(VENV)/.build-tools $(SOURCES)
	@echo "Building flatstep"
	@$(PIP) install --no-build-isolation --no-deps --force-reinstall .
	@touch $@

# What the extras of pyproject.toml name. flatstep itself is there already.
EXTRAS := $(foreach extra,demo test bench lint sanitize macos-check,$(VENV)/.$(extra))
$(EXTRAS): $(VENV)/.%: $(VENV)/.build-tools | $(VENV)/.package
	@echo "Installing what '$*' needs"
	@$(PIP) install 'flatstep[$*]'
	@touch $@

$(MACOS)/.prepared: $(VENV)/.macos-check scripts/macos/prepare.py scripts/macos/macho.py
	@echo "Preparing a build for macOS in $(MACOS)"
	@$(BIN)/python scripts/macos/prepare.py
	@touch $@

# The kernels are tested with clang, on Linux: one that is named or there already, or PyPI's.
.PHONY: clang-for-tests
clang-for-tests: $(VENV)/.test
	@[ "$$(uname)" != Linux ] || [ -n "$$FLATSTEP_CLANG" ] \
	  || PYTHONPATH=tests/metal $(BIN)/python -m simulator.clang >/dev/null 2>&1 \
	  || { echo "Installing a clang for the GPU kernels' tests"; $(PIP) install 'flatstep[clang]'; }
