"""State in codes, and parameters in two parts or rounded by chance: what the Metal backend's host
code makes of them, to the bits of the CPU backend.

Run as on_standin.py is.
"""

from collections.abc import Callable, Iterable
from typing import Any

import kernel_text
import mlx.core as mx
import numpy as np
import pytest
from cases import FULLEST, Case, random_array
from flatstep import _ext
from on_standin import has_tiles, updates
from standin_plugin import StandIn
from updates import rule_of

Rounding = _ext.Rounding
KEPT = (Rounding.KEEP_8_BITS, Rounding.KEEP_16_BITS)
BLOCK = 64
KINDS = [
    (mx.float32, Rounding.NEAREST),
    *[(dtype, r) for dtype in (mx.float16, mx.bfloat16) for r in Rounding],
]
ADAMW = Case("AdamW", {"weight_decay": 0.1, "bias_correction": True})
# Of one bucket, and, in the middle, of another.
SHAPES = [(1,), (63,), (64, 128), (65,), (40, 70), (4097,), (3, 5, 64), (31, 192)]


class Training:
    """Steps of flatstep._ext over a tree of named arrays, whose state begins as `init` makes it."""

    def __init__(
        self,
        case: Case,
        start: dict[str, mx.array],
        rounding: _ext.Rounding,
        state_dtype: mx.Dtype,
        seed: int = 7,
        bucket_bytes: int = 1 << 22,
    ) -> None:
        self.rule, self.rounding, self.seed = rule_of(case), rounding, seed
        self.paths = list(start)
        dtypes = [a.dtype for a in start.values()]
        shapes = [a.shape for a in start.values()]
        self.layout = _ext.Layout(self.paths, shapes, dtypes, [0] * len(shapes), bucket_bytes)
        self.parameters = {name: mx.array(value) for name, value in start.items()}
        of_bucket = {b: t for (b, _), t in zip(self.layout.segments, dtypes, strict=True)}
        self.state = []
        for k in range(self.rule.num_states + (rounding in KEPT)):
            flat = []
            for bucket, blocks in enumerate(self.layout.bucket_blocks):
                width = BLOCK if state_dtype != mx.uint8 else _ext.block_bytes()
                dtype = state_dtype
                if k == self.rule.num_states:
                    dtype, width = mx.uint8, _ext.rest_bytes(rounding, of_bucket[bucket])
                flat.append(mx.broadcast_to(mx.array(0, dtype), (blocks, width)))
            self.state.append(flat)
        self.step = mx.array(0, mx.uint64)

    def take_step(self, gradients: dict[str, mx.array]) -> None:
        result: Any = _ext.step(
            self.layout,
            {name: number for number, name in enumerate(self.paths)},
            gradients,
            {name: self.parameters[name] for name in gradients},
            self.rule,
            None,
            self.state,
            {"step": self.step, "learning_rate": mx.array(1e-2)},
            _ext.StepSettings(self.rounding, self.seed),
        )
        updated, self.state, scalars = result
        self.step = scalars["step"]
        self.parameters.update(updated)
        mx.eval(self.parameters, self.state, self.step)
        mx.synchronize()

    def bits(self) -> dict[str, Any]:
        everything = dict(self.parameters)
        for k, flat in enumerate(self.state):
            everything |= {f"state {k} of {b}": array for b, array in enumerate(flat)}
        return {name: np.array(array.view(mx.uint8)) for name, array in everything.items()}


def assert_same_bits(
    standin: StandIn,
    make: Callable[[], Training],
    gradients: Iterable[dict[str, mx.array]],
    between: Callable[[Training, int], Any] = lambda training, step: None,
) -> None:
    """After each step, of the two backends."""
    both = (make(), make())
    held = []
    for number, given in enumerate(gradients):
        for on_gpu, training in enumerate(both):
            standin.use_gpu(bool(on_gpu))
            held.append(between(training, number))
            training.take_step(given)
        cpu, gpu = (training.bits() for training in both)
        for name, value in cpu.items():
            np.testing.assert_array_equal(value, gpu[name], err_msg=f"{name}, step {number}")


def start_of(
    rng: np.random.Generator, dtype: mx.Dtype, shapes: list[tuple[int, ...]] = SHAPES
) -> dict[str, mx.array]:
    start = {str(i): random_array(shape, rng, dtype) for i, shape in enumerate(shapes)}
    start["other"] = random_array((70,), rng)  # of a bucket of its own where that is not float32
    mx.eval(start)
    return start


def gradients_of(
    start: dict[str, mx.array], rng: np.random.Generator, steps: int
) -> list[dict[str, mx.array]]:
    """Contiguous, transposed, sliced and broadcast ones."""
    result = []
    for _ in range(steps):
        given = {}
        for i, (name, value) in enumerate(start.items()):
            shape = value.shape
            if len(shape) > 1 and i % 4 != 1:
                turned = random_array((*shape[:-2], shape[-1], shape[-2]), rng, value.dtype)
                given[name] = turned.swapaxes(-1, -2)
            elif len(shape) == 1 and i % 4 == 3:
                given[name] = random_array((shape[0] + 1,), rng, value.dtype)[1:]
            else:
                given[name] = random_array(shape, rng, value.dtype)
        given["other"] = mx.broadcast_to(mx.array(0.25), (70,))
        mx.eval(given)
        result.append(given)
    return result


@pytest.mark.parametrize("state_dtype", [mx.uint8, mx.float32], ids=["codes", "float32"])
@pytest.mark.parametrize(("dtype", "rounding"), KINDS, ids=lambda v: str(v).rpartition(".")[2])
@pytest.mark.parametrize("case", [*FULLEST, Case("SGD", {"momentum": 0.9})], ids=str)
def test_each_storage_is_the_cpu_backends_to_the_bit(
    case: Case,
    dtype: mx.Dtype,
    rounding: _ext.Rounding,
    state_dtype: mx.Dtype,
    standin: StandIn,
) -> None:
    rng = np.random.default_rng(1)
    start = start_of(rng, dtype)
    steps = gradients_of(start, rng, 4)
    assert_same_bits(standin, lambda: Training(case, start, rounding, state_dtype), steps)


@pytest.mark.parametrize("bucket_bytes", [1, 4096])
def test_each_leaf_rounds_by_numbers_of_its_own(bucket_bytes: int, standin: StandIn) -> None:
    rng = np.random.default_rng(2)
    shapes = [(65,), (65,), (40, 70)]
    start = start_of(rng, mx.bfloat16, shapes)
    start["1"] = mx.array(start["0"])
    steps = gradients_of(start, rng, 3)
    steps[0]["1"] = mx.array(steps[0]["0"])

    def make() -> Training:
        return Training(ADAMW, start, Rounding.STOCHASTIC, mx.uint8, bucket_bytes=bucket_bytes)

    assert_same_bits(standin, make, steps)
    training = make()
    training.take_step(steps[0])
    assert not mx.array_equal(training.parameters["0"], training.parameters["1"])


@pytest.mark.parametrize(
    "rounding", [Rounding.STOCHASTIC, Rounding.KEEP_8_BITS, Rounding.KEEP_16_BITS]
)
def test_a_part_of_the_leaves_and_state_that_is_held(
    rounding: _ext.Rounding, standin: StandIn
) -> None:
    rng = np.random.default_rng(3)
    start = start_of(rng, mx.float16)
    steps = [
        {name: g for i, (name, g) in enumerate(given.items()) if (i + step) % 3}
        for step, given in enumerate(gradients_of(start, rng, 5))
    ]

    def hold(training: Training, step: int) -> Any:
        return [list(flat) for flat in training.state] if step % 2 else None

    assert_same_bits(standin, lambda: Training(ADAMW, start, rounding, mx.uint8), steps, hold)


def test_rests_of_parameters_that_others_replaced_count_as_zero(standin: StandIn) -> None:
    rng = np.random.default_rng(4)
    start = start_of(rng, mx.bfloat16)
    others = start_of(rng, mx.bfloat16)

    def replace(training: Training, step: int) -> None:
        if step == 2:
            training.parameters["5"] = mx.array(others["5"])

    def make() -> Training:
        return Training(ADAMW, start, Rounding.KEEP_16_BITS, mx.uint8)

    assert_same_bits(standin, make, gradients_of(start, rng, 4), replace)


@pytest.mark.parametrize("first", [1, 4, 16])
def test_blocks_may_start_anywhere(first: int, standin: StandIn) -> None:
    rng = np.random.default_rng(5)
    start = start_of(rng, mx.bfloat16)

    def move(training: Training, step: int) -> None:
        for k, flat in enumerate(training.state):
            for b, array in enumerate(flat):
                if array.dtype == mx.uint8:
                    moved = mx.concatenate([mx.zeros(first, mx.uint8), array.reshape(-1)])
                    training.state[k][b] = moved[first:].reshape(array.shape)
        mx.eval(training.state)

    def make() -> Training:
        return Training(ADAMW, start, Rounding.KEEP_8_BITS, mx.uint8)

    assert_same_bits(standin, make, gradients_of(start, rng, 3), move)


def test_tiles_are_made_of_whole_blocks(standin: StandIn) -> None:
    rng = np.random.default_rng(6)
    for columns, tiled in ((64, True), (70, False), (192, True)):
        start = {"w": random_array((33, columns), rng, mx.bfloat16)}
        given = {"w": random_array((columns, 33), rng, mx.bfloat16).T}
        mx.eval(start, given)
        training = Training(ADAMW, start, Rounding.KEEP_8_BITS, mx.uint8)
        standin.take_log()
        training.take_step(given)
        assert [has_tiles(line) for line in updates(standin.take_log())] == [tiled]


def test_blocks_are_written_where_they_lie(standin: StandIn) -> None:
    rng = np.random.default_rng(7)
    start = start_of(rng, mx.bfloat16)
    training = Training(ADAMW, start, Rounding.KEEP_8_BITS, mx.uint8)
    start.clear()
    given = gradients_of(dict(training.parameters), rng, 1)[0]
    for step in range(4):
        before = _ext.reuse_counters()
        standin.take_log()
        training.take_step(given)
        after = _ext.reuse_counters()
        if step >= 2:
            assert after["state_fresh"] == before["state_fresh"]
            assert not [line for line in standin.take_log() if "copy" in line.lower()]


def test_every_kernel_asked_for_is_among_all_instances(standin: StandIn) -> None:
    text = kernel_text.all_instances()
    rng = np.random.default_rng(8)
    for dtype, rounding in KINDS:
        start = start_of(rng, dtype, [(3, 64)])
        training = Training(ADAMW, start, rounding, mx.uint8)
        training.take_step(gradients_of(start, rng, 1)[0])
    for name in {line.split("; ")[0] for line in standin.take_log()}:
        assert f'", {name.removeprefix("flatstep ")})' in text, name
