"""Two processes that have a slice of every weight each clip and skip as one that has all of it."""

import os
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from shadow import bits
from sharded_training import OPTIMIZERS, SPOILT, STEPS, all_training

PROCESSES = 2
SCALARS = ("grad_norm", "skipped_steps", "step", "learning_rate", "loss_scale", "accumulated")

Seen = dict[str, mx.array]


def free_ports(count: int) -> int:
    """The first of so many in a row that nobody listens on."""
    for first in range(20_000 + os.getpid() % 10_000, 60_000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    """By each process, and by one that trains the whole model."""
    folder = tmp_path_factory.mktemp("sharded")
    here = Path(__file__).parent
    launch = Path(sys.executable).with_name("mlx.launch")
    command = [sys.executable, str(launch), "-n", str(PROCESSES), "--backend", "ring"]
    command += ["--starting-port", str(free_ports(PROCESSES)), "--python", sys.executable]
    command += [str(here / "sharded_training.py"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    files = [folder / f"{rank}.safetensors" for rank in range(PROCESSES)]
    assert all(file.exists() for file in files), done.stderr
    return [*(dict(mx.load(str(file))) for file in files), all_training(None)]


every_run = pytest.mark.parametrize(
    ("name", "compiled"), list(product(OPTIMIZERS, (False, True))), ids=str
)


def at(seen: Seen, name: str, compiled: bool, step: int) -> Seen:
    start = f"{name}/{compiled}/{step}/"
    return {path[len(start) :]: a for path, a in seen.items() if path.startswith(start)}


@every_run
def test_both_agree_with_one_process(seen: list[Seen], name: str, compiled: bool) -> None:
    for step in range(STEPS):
        *parts, whole = (at(each, name, compiled, step) for each in seen)
        for scalar in (f"state.{name}" for name in SCALARS):
            if scalar in whole:
                values = [part[scalar].item() for part in (*parts, whole)]
                assert bits([parts[0][scalar]]) == bits([parts[1][scalar]]), scalar
                assert np.allclose(values[0], values[2], 1e-6, 0, equal_nan=True), (scalar, values)
        for path, array in whole.items():
            if array.ndim > 0 and "group_learning_rates" not in path:
                joined = mx.concatenate([part[path] for part in parts])
                close = mx.allclose(joined, array, 1e-5, 1e-7, equal_nan=True)
                assert close.item(), (path, step)


@every_run
def test_both_skip_what_only_one_of_them_sees(seen: list[Seen], name: str, compiled: bool) -> None:
    for each in seen:
        skipped = 0
        for step in range(1, STEPS):
            before, after = (at(each, name, compiled, t) for t in (step - 1, step))
            if "state.skipped_steps" not in after or step not in SPOILT:
                continue
            skipped += 1
            assert after["state.skipped_steps"].item() == skipped
            for path in ("state.skipped_steps", "state.loss_scale", "state.loss_scale_steps"):
                before.pop(path, None)
                after.pop(path, None)
            assert bits(before) == bits(after)
        assert skipped == (len(SPOILT) if name in ("skipping", "scaling", "all") else 0)


def test_each_has_its_slice_and_a_norm_of_all(seen: list[Seen]) -> None:
    *parts, whole = (at(each, "clipping", False, 0) for each in seen)
    assert [part["params.w"].shape for part in (*parts, whole)] == [(33, 70), (33, 70), (66, 70)]
    # Of the part alone it would be far smaller.
    assert whole["state.grad_norm"].item() > 1.3 * 0.5 * (66 * 70) ** 0.5
