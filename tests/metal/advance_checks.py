"""What `advance` leaves of a step's scalars and writes for each group, held to what pass.h says in
plain Python. The tests of the kernels run it, and those of the mistakes in them."""

import struct
from itertools import product
from types import SimpleNamespace
from typing import Any

import arguments as args
import numpy as np
import reference
from advances import Group, pass_of, run_advance
from numpy.typing import NDArray

F = np.float32
COSINE = ("cosine_decay", 1e-2, 10)
JOINED = ("join_schedules", [("linear_schedule", 0, 1e-2, 3), COSINE, COSINE], [3, 5])
WRITTEN = ("step", "learning_rate", "grad_norm", "skipped_steps", "accumulated")


def lion(number: int) -> Any:
    """With a decay of its own, by which constants are told apart."""
    numbers = [[F(0.25 * number), 1, 0, 0], [0.5, 0.5, 0, 0], [0.75, 0.25, 0, 0]]
    values = [x for triple in numbers for x in triple] + [0.0] * 20
    return SimpleNamespace(type="Lion", num_states=1, groups=[struct.pack("32f", *values)])


def rule_words(constants: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Of each group: beta1, what it leaves to 1, beta2, what it leaves, the rate, and the decay."""
    words = constants[:, args.PASS_WORDS : args.PASS_WORDS + 6]
    return words.copy().view(np.float32)


def check_groups(library: Any) -> None:
    """Each source of rates, taken or not; rates that are held stay bit for bit."""
    schedules = {1: COSINE, 4: JOINED, 6: ("exponential_decay", 0.1, 0.9)}
    groups = [Group(lion(0))]
    for g in range(1, 40):
        source = (args.OF_ALL, args.OF_SCHEDULE, args.OWN)[g % 3]
        schedule = schedules.get(g, COSINE) if g % 3 == 1 else ()
        groups.append(Group(lion(g), source, 1 + 0.125 * g, schedule))
    rates = np.arange(1, 40, dtype=np.float32) / 64
    scalars = {"step": 4, "learning_rate": 0.5, "group_learning_rates": rates}
    scalars["sum_of_squares"] = np.nan
    for schedule, skips in product(((), JOINED), (0, 1)):
        settings = args.settings(has_norm=1, skips_nonfinite=skips)
        constants, after = run_advance(
            library, groups, scalars, WRITTEN, schedule=schedule, settings=settings
        )
        of_all = F(reference.schedule_value(schedule, 4)) if schedule else F(0.5)
        expected = [of_all]
        for g, group in enumerate(groups[1:], start=1):
            own = F(reference.schedule_value(group.schedule, 4)) if group.schedule else of_all
            scaled = F(group.scale) * own
            expected.append(rates[g - 1] if group.source == args.OWN else scaled)
        rule = rule_words(constants)
        np.testing.assert_allclose(rule[:, 4], expected, rtol=3e-7)
        np.testing.assert_array_equal(rule[:, 5], rule[:, 4] * F(0.25) * np.arange(40, dtype=F))
        np.testing.assert_array_equal(rule[:, :4], [[0.5, 0.5, 0.75, 0.25]] * 40)
        taken = rates if skips else rule[1:, 4]
        np.testing.assert_array_equal(after["group_learning_rates"], taken)
        np.testing.assert_array_equal(after["learning_rate"], [0.5 if skips else rule[0, 4]])
        assert (constants[:, : args.PASS_WORDS] == constants[0, : args.PASS_WORDS]).all()


def expected_pass(s: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The constants that all groups share, as pass.h has them."""
    steps, accumulated = s.get("accumulate_steps", 0), now.get("accumulated", 0)
    scale, holds = F(now.get("grad_scale", 1.0)), accumulated < steps
    adds = bool(s.get("is_accumulation", 0))
    if adds:
        scale = F(1)
    elif steps and not holds:
        scale = scale / F(accumulated)
    seed = s.get("seed", 0)
    result = {
        "tick": now["step"],
        "seed": seed,
        "action": args.UPDATE,
        "grad_scale": scale,
        "clip_value": s.get("clip_value", np.inf),
        "clip_factor": 1.0,
        "ema_decay": 0.0,
        "ema_weight": 0.0,
    }
    if adds:
        tick = now["step"] * 4099 + accumulated
        return result | {"tick": tick & args.WORD, "seed": seed ^ 0x5BD1E995}
    if s.get("has_norm"):
        norm = np.sqrt(F(now["sum_of_squares"]))
        factor = F(s.get("max_grad_norm", np.inf)) / (norm + F(1e-6))
        result["clip_factor"] = F(1) if factor >= 1 else factor
        if s.get("skips_nonfinite") and not np.isfinite(norm):
            result["action"] = args.DROP
    if holds:
        result["action"] = args.HOLD
    after, start = now["step"] + 1, s.get("ema_start", 0)
    if after <= start:
        return result | {"ema_decay": 0.0, "ema_weight": 1.0}
    if (after - start) % s.get("ema_every", 1):
        return result | {"ema_decay": 1.0, "ema_weight": 0.0}
    decay = s.get("ema", 0.0)
    return result | {"ema_decay": F(decay), "ema_weight": F(1 - decay)}


def expected_after(s: dict[str, Any], now: dict[str, Any], action: int) -> dict[str, Any]:
    after = {name: now.get(name, 0) for name in WRITTEN}
    if s.get("is_accumulation"):
        return after | {"accumulated": after["accumulated"] + 1}
    if action == args.HOLD:
        return after
    after["accumulated"] = 0
    if action == args.DROP:
        return after | {"skipped_steps": after["skipped_steps"] + 1}
    norm = np.sqrt(F(now.get("sum_of_squares", 0.0)))
    return after | {"step": now["step"] + 1, "grad_norm": norm}


FAR = (1 << 40) + 3
NORM = {"has_norm": 1, "max_grad_norm": 2.0}
STEPS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"seed": 7}, {"step": 5}),
    ({"seed": 7, "clip_value": 0.5}, {"step": FAR, "grad_scale": 0.25}),
    (NORM, {"step": 5, "sum_of_squares": 9.0, "grad_norm": 7.0}),
    (NORM, {"step": 5, "sum_of_squares": 1.0, "grad_norm": 7.0, "skipped_steps": 3}),
    (NORM, {"step": 5, "sum_of_squares": np.inf, "grad_norm": 7.0}),
    ({**NORM, "skips_nonfinite": 1}, {"step": 5, "sum_of_squares": 16.0, "skipped_steps": 2}),
    *[
        (
            {**NORM, "skips_nonfinite": 1, "accumulate_steps": 4},
            {
                "step": 5,
                "sum_of_squares": value,
                "grad_norm": 7.0,
                "skipped_steps": 2,
                "accumulated": accumulated,
                "grad_scale": 0.5,
            },
        )
        for value, accumulated in product((np.nan, np.inf, 9.0), (0, 3, 4, 6))
    ],
    *[
        ({"seed": 9, "is_accumulation": 1, "accumulate_steps": 1}, {"step": s, "accumulated": n})
        for s, n in ((0, 0), (3, 1), (3, 2), (FAR, 7))
    ],
    *[
        ({"ema": 0.9, "ema_start": start, "ema_every": every}, {"step": step})
        for start, every, step in product((0, 2, 1 << 33), (1, 3), (0, 1, 2, 3, 4, (1 << 33) + 2))
    ],
]


def check_scalars(library: Any) -> None:
    """Each value of a step by itself, and what stays as it is."""
    for settings, now in STEPS:
        now = {"learning_rate": 0.5, **now}
        constants, after = run_advance(
            library,
            [Group(lion(1))],
            now,
            WRITTEN,
            schedule=("linear_schedule", 1.0, 2.0, 64),
            settings=args.settings(**settings),
        )
        expected = expected_pass(settings, now)
        expected["tick"] &= args.WORD
        got = pass_of(constants)
        for name, value in expected.items():
            same = np.array(value, got[name].dtype)
            np.testing.assert_array_equal(got[name], same, f"{name}, {settings}, {now}")
        rest = expected_after(settings, now, expected["action"])
        if expected["action"] == args.UPDATE:
            rest["learning_rate"] = reference.schedule_value(
                ("linear_schedule", 1.0, 2.0, 64), now["step"]
            )
        for name, value in rest.items():
            same = np.array([value], after[name].dtype)
            np.testing.assert_array_equal(after[name], same, f"{name}, {settings}, {now}")


def check_what_is_not_there(library: Any) -> None:
    """Neither read nor written, each scalar by itself."""
    now = {"step": 3, "learning_rate": 0.5, "grad_scale": 0.25, "sum_of_squares": 4.0}
    now |= {"grad_norm": 1.0, "skipped_steps": 2, "accumulated": 5}
    settings = args.settings(accumulate_steps=5)
    for gone in now:
        given = {name: value for name, value in now.items() if name != gone}
        written = tuple(name for name in WRITTEN if name != gone)
        _, after = run_advance(library, [Group(lion(1))], given, written, settings=settings)
        assert set(after) == set(written)
        if "step" in after:
            is_held = gone == "accumulated"
            assert after["step"] == [3 if is_held else 4]


CHECKS = [check_groups, check_scalars, check_what_is_not_there]
