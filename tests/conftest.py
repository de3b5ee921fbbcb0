"""What several test modules ask for by name."""

from collections.abc import Iterator

import pytest
from flatstep import _ext


@pytest.fixture
def restored_settings() -> Iterator[None]:
    """Whatever loops and threads a test chooses, the next has those that were."""
    loops, threads = _ext.cpu_loops(), _ext.num_threads()
    yield
    _ext.set_cpu_loops(loops)
    _ext.set_num_threads(threads)
