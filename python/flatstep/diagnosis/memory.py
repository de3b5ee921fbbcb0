"""What a step does to memory: it updates its own in place, and leaves alone what others hold."""

from collections.abc import Callable
from functools import partial
from itertools import product

import mlx.core as mx

import flatstep
from flatstep import _ext

from .cases import ADAMW, MIXES, MOMENTUM, SHAPES, Row
from .comparison import DiscrepancyError, Training, check_same, flattened, joined, random_leaves

Check = Callable[[mx.Device], None]


def checks(quick: bool) -> dict[str, Check]:
    """The checks by their names."""
    modes = product((ADAMW, MOMENTUM), MIXES[:2], (False, True))
    rows = [Row(case, dtypes, compiled=compiled) for case, dtypes, compiled in modes]
    found: dict[str, Check] = {}
    for row in rows[::3] if quick else rows:
        found[f"a step keeps its memory: {row}"] = partial(keeps_its_memory, row)
        found[f"what is held keeps its value: {row}"] = partial(held_values_stay, row)
    found["flat_update keeps its memory, and gives what update gives"] = flat_update
    return found


def keeps_its_memory(row: Row, device: mx.Device) -> None:
    """From the second step on, every bucket's parameters and state stay where they are."""
    with mx.stream(device):
        training = Training(row)
        for seed in range(2, 4):
            training.step(training.gradients(seed))
        in_place = 0
        for seed in range(4, 4 + attempts(device)):
            gradients = training.gradients(seed)
            mx.synchronize()
            before = _ext.reuse_counters()
            training.step(gradients)
            change = {name: n - before[name] for name, n in _ext.reuse_counters().items()}
            counts = ", ".join(f"{name} {count}" for name, count in change.items())
            moved = change["parameters_fresh"] + change["state_fresh"]
            in_place += not moved and bool(change["parameters_in_place"])
        if not in_place:
            raise DiscrepancyError(
                f"step {seed - 1}: some buckets were not updated in place\n"
                f"  expected nothing fresh, and something in place\n  got      {counts}"
            )


def attempts(device: mx.Device) -> int:
    """How many steps may pass before one is in place.

    A GPU's finished work lets go of the arrays that it read a moment later, in a thread of its own.
    """
    return 20 if device.type == mx.DeviceType.gpu else 1


def held_values_stay(row: Row, device: mx.Device) -> None:
    """Weights, state and gradients that a user keeps stay as they were."""
    with mx.stream(device):
        training = Training(row)
        training.step(training.gradients(2))
        training.step(training.gradients(3))
        gradients = training.gradients(4)
        state = flattened(training.optimizer.state)
        held = {
            "weight": training.leaves["matrix"],
            "part of a weight": training.leaves["vector"][64:99],
            "state": state["odd.1.v"],
            "gradient": gradients["odd.0"],
        }
        del state
        mx.eval(held)
        before = {name: joined([array]) for name, array in held.items()}
        training.step(gradients)
        for name, array in held.items():
            check_same(f"{name} that was held", before[name], joined([array]))


def flat_update(device: mx.Device) -> None:
    with mx.stream(device):
        p, g = (random_leaves(SHAPES, seed, mx.float32)["vector"] for seed in (1, 2))
        ours = ADAMW.make(flatstep)
        tree = ours.apply_gradients({"p": g}, {"p": p})
        expected = joined([tree["p"]])
        flat = ours.flat_update(p, g, mx.zeros_like(p), mx.zeros_like(p), step=0)
        check_same("flat_update, compared with update", expected, joined([flat.parameter]))
        p, state = flat.parameter, flat.state
        mx.eval(p, state)
        mx.synchronize()
        del flat
        before = _ext.reuse_counters()
        for number in range(attempts(device)):
            p, state, step, _ = ours.flat_update(p, g, *state, step=1 + number)
            mx.eval(p, state, step)
            mx.synchronize()
        after = _ext.reuse_counters()
        if after["parameters_in_place"] == before["parameters_in_place"]:
            raise DiscrepancyError(
                "the second flat_update of an array that nobody else holds\n"
                f"  expected in place\n  got      {before}, then {after}"
            )
