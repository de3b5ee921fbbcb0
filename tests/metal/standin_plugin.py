"""A pytest plugin for a process whose flatstep is the stand-in's: `pytest -p standin_plugin`.

Kernels are compiled by the simulator, and a test whose kernels did something wrong fails.
"""

import ctypes
import os
import sys
import zlib
from collections.abc import Hashable, Iterator
from pathlib import Path

import flatstep
import mlx.core as mx
import pytest
from cases import Case
from flatstep import _ext
from hypothesis import settings
from updates import rule_of


class StandIn:
    """The C interface of the stand-in (tests/metal/standin/standin.h)."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(_ext.__file__)
        for name in ("standin_take_log", "standin_take_error"):
            getattr(self._library, name).restype = ctypes.c_char_p
        scratch = os.environ["FLATSTEP_STANDIN_SCRATCH"]
        command = f"{sys.executable} -m simulator build --no-check"
        self.set_compiler(os.environ.get("FLATSTEP_STANDIN_COMPILER", command), scratch)

    def set_compiler(self, command: str, scratch: str) -> None:
        self.compiler = command
        self._library.standin_set_compiler(command.encode(), scratch.encode())

    def use_gpu(self, use: bool) -> None:
        self._library.standin_use_gpu(int(use))

    def hold_stream(self, hold: bool) -> bool:
        return bool(self._library.standin_hold_stream(int(hold)))

    def let_go_late(self, microseconds: int) -> None:
        self._library.standin_let_go_late(microseconds)

    def set_max_threads(self, most: int) -> None:
        self._library.standin_set_max_threads(most)

    def take_log(self) -> list[str]:
        """The dispatches since the last call."""
        mx.synchronize()
        return self._library.standin_take_log().decode().splitlines()

    def take_error(self) -> str:
        mx.synchronize()
        return self._library.standin_take_error().decode()


STANDIN = StandIn()


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "not exhaustive":
        settings.register_profile("few", max_examples=20)
        settings.load_profile("few")


def shown_by(item: pytest.Function) -> set[Hashable]:
    """What a test shows of the Metal backend: its file's kernels, and its own ways to ask for them.

    Rules that are one kernel count as one, and its dtypes are part of it.
    """
    function, _, _ = item.nodeid.partition("[")
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    rules = [rule_of(value).type for value in parameters.values() if isinstance(value, Case)]
    shown: set[Hashable] = {function, *rules}
    for name, value in parameters.items():
        if isinstance(value, mx.Dtype):
            shown.add((*rules, name, value))
        elif not isinstance(value, Case):
            shown.add((function, name, id(value)))  # not every value can be compared
    return shown


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Of the cases of the engine's tests those that show nothing new are exhaustive.

    They are gone through in an order that is always the same and follows none of the parameters,
    so that those that remain mix them.
    """
    shown: set[Hashable] = set()
    for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode())):
        about_the_host = item.path.parent == Path(__file__).parent
        if about_the_host or item.get_closest_marker("exhaustive"):
            continue
        if shown_by(item) <= shown:
            item.add_marker("exhaustive")
        shown |= shown_by(item)


def pytest_report_header() -> str:
    return f"flatstep: {Path(flatstep.__file__).parent}, GPU backend {_ext.gpu_backend()}"


@pytest.fixture(autouse=True)
def standin() -> Iterator[StandIn]:
    """The stand-in; unless a test says otherwise, all updates go through its Metal backend."""
    STANDIN.take_error()
    STANDIN.take_log()
    yield STANDIN
    STANDIN.use_gpu(True)
    STANDIN.set_max_threads(1024)
    STANDIN.let_go_late(0)
    assert STANDIN.take_error() == ""
