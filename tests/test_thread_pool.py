"""The thread pool by itself: test_thread_pool.cpp says what must hold."""

import os
import shlex
import subprocess
from pathlib import Path

HERE = Path(__file__).parent


def test_the_thread_pool_by_itself(tmp_path: Path) -> None:
    source = HERE.parent / "csrc"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    files = [HERE / "test_thread_pool.cpp", source / "backend" / "thread_pool.cpp"]
    program = tmp_path / "test_thread_pool"
    options = ["-std=c++20", "-O1", "-pthread", f"-I{source}", "-o", program]
    subprocess.run([*compiler, *options, *files], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
