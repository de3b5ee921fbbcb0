"""Agreement with torch where the formulas agree: rules and learning-rate schedules."""

from collections.abc import Callable
from typing import Any

import flatstep
import mlx.core as mx
import numpy as np
import pytest
import torch
from cases import ADAMW, MORE, RULES, Case, case_id
from numpy.typing import NDArray
from reference import relative_distance, to_float64

STEPS = 200
RATE = 1e-2

# What torch calls the arrays that MLX calls v and m, of the optimizers whose formulas agree.
TORCH_SLOTS = {
    "SGD": {"v": "momentum_buffer"},
    "Adam": {"m": "exp_avg", "v": "exp_avg_sq"},
    "AdamW": {"m": "exp_avg", "v": "exp_avg_sq"},
}


def torch_arguments(case: Case) -> dict[str, Any] | None:
    """The same optimizer's arguments in torch; None where it has no counterpart there.

    MLX doesn't correct Adam's bias by default and damps the first momentum too, which torch does
    not.
    """
    arguments = dict(case.arguments)
    is_corrected = arguments.pop("bias_correction", case.rule == "SGD")
    if case.rule not in TORCH_SLOTS or not is_corrected or arguments.get("dampening"):
        return None
    return arguments


PAIRS = [(c, a) for c in [*RULES, *MORE] if (a := torch_arguments(c)) is not None]
every_pair = pytest.mark.parametrize(("case", "arguments"), PAIRS, ids=case_id)

TorchSchedule = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


def problem() -> tuple[dict[str, NDArray[np.float32]], list[dict[str, NDArray[np.float32]]]]:
    """Parameters, one of them a bias at zero, and gradients for each step."""
    rng = np.random.default_rng(17)
    shapes = {"weight": (5, 7), "bias": (7,), "long": (129,)}

    def normal(shape: tuple[int, ...]) -> NDArray[np.float32]:
        return rng.normal(size=shape).astype(np.float32)

    params = {name: normal(shape) for name, shape in shapes.items()}
    params["bias"][:] = 0
    mean = {name: normal(shape) for name, shape in shapes.items()}
    steps = range(STEPS)
    return params, [{k: normal(s) + mean[k] for k, s in shapes.items()} for _ in steps]


def train_torch(
    case: Case, arguments: dict[str, Any], schedule: TorchSchedule | None = None
) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer, list[float]]:
    """The parameters, the optimizer, and the rate that each step used."""
    start, steps = problem()
    params = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    optimizer = getattr(torch.optim, case.rule)(params.values(), lr=RATE, **arguments)
    scheduler = schedule(optimizer) if schedule else None
    rates = []
    for grads in steps:
        for name, p in params.items():
            p.grad = torch.tensor(grads[name])
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler:
            scheduler.step()
    return params, optimizer, rates


def train_ours(case: Case, rate: Any) -> tuple[dict[str, mx.array], Any, list[float]]:
    start, steps = problem()
    params = {name: mx.array(value) for name, value in start.items()}
    optimizer = case.make(flatstep, rate)
    rates = []
    for grads in steps:
        tree = {name: mx.array(value) for name, value in grads.items()}
        params = optimizer.apply_gradients(tree, params)
        mx.eval(params, optimizer.state)
        rates.append(optimizer.learning_rate.item())
    return params, optimizer, rates


def assert_close(ours: mx.array, theirs: torch.Tensor) -> None:
    assert relative_distance(to_float64(ours), theirs.detach().double().numpy()) <= 1e-5


@every_pair
def test_weights_and_state_are_those_of_torch(case: Case, arguments: dict[str, Any]) -> None:
    expected, theirs, _ = train_torch(case, arguments)
    got, ours, _ = train_ours(case, RATE)
    for name, p in expected.items():
        assert_close(got[name], p)
        for slot, torch_slot in TORCH_SLOTS[case.rule].items():
            # torch keeps no buffer for SGD without momentum.
            value = theirs.state[p].get(torch_slot)
            if value is not None:
                assert_close(ours.state[name][slot], value)


def constant_then_linear(warmup: int, decay: int, low: float) -> Callable[[int], float]:
    """The factor on the rate: ``low`` for a while, then from 1 down to 0."""

    def factor(step: int) -> float:
        return low if step < warmup else max(0.0, 1 - (step - warmup) / decay)

    return factor


def inverse_time(step: int) -> float:
    return 1 / (1 + 0.1 * step)


SCHEDULES: dict[str, tuple[TorchSchedule, Any]] = {
    "LambdaLR, a constant warmup and then a linear decay": (
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, constant_then_linear(20, 150, 0.1)
        ),
        flatstep.join_schedules(
            [
                flatstep.linear_schedule(0.1 * RATE, 0.1 * RATE, 20),
                flatstep.linear_schedule(RATE, 0.0, 150),
            ],
            [20],
        ),
    ),
    "LambdaLR, inverse time": (
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, inverse_time),
        lambda step: RATE / (1 + 0.1 * step),
    ),
    "LinearLR": (
        lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, 120),
        flatstep.linear_schedule(RATE, 0.2 * RATE, 120),
    ),
    "ConstantLR and then LinearLR": (
        lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.ConstantLR(optimizer, 0.1, 20),
                torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 150),
            ],
            [20],
        ),
        flatstep.join_schedules(
            [lambda _: 0.1 * RATE, flatstep.linear_schedule(RATE, 0, 150)], [20]
        ),
    ),
    "CosineAnnealingLR": (
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, 1e-4),
        flatstep.cosine_decay(RATE, STEPS, 1e-4),
    ),
    "StepLR": (
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 30, 0.5),
        flatstep.step_decay(RATE, 0.5, 30),
    ),
    "ExponentialLR": (
        lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97),
        flatstep.exponential_decay(RATE, 0.97),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("case", "arguments"),
    [(case, torch_arguments(case)) for case in (Case("SGD", {"momentum": 0.9}), ADAMW)],
    ids=case_id,
)
def test_schedules_steer_the_weights_as_in_torch(
    case: Case, arguments: dict[str, Any], name: str
) -> None:
    theirs, ours = SCHEDULES[name]
    expected, _, expected_rates = train_torch(case, arguments, theirs)
    got, _, rates = train_ours(case, ours)
    assert rates == pytest.approx(expected_rates, rel=1e-6, abs=1e-9)
    for path, p in expected.items():
        assert_close(got[path], p)
