"""Learning-rate schedules, with the names, arguments and errors of ``mlx.optimizers``.

A schedule here is two things at once: a callable like MLX's (and evaluated by MLX's function when
it is called), and plain data that the update kernel evaluates by itself at every step.
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as mlx_optimizers

from . import _ext
from .checks import as_finite, misfit

__all__ = ["cosine_decay", "exponential_decay", "join_schedules", "linear_schedule", "step_decay"]

ScheduleFunction = Callable[[Any], Any]


class Schedule:
    """A learning-rate schedule that the engine evaluates in the update itself.

    Made by the functions of this module. Calling it with a step (an int, or an array of any shape)
    gives what the function of the same name in ``mlx.optimizers`` gives.
    """

    def __init__(
        self,
        factory: Callable[..., "Schedule"],
        arguments: tuple[Any, ...],
        function: ScheduleFunction,
        plain: _ext.PlainSchedule | None,
    ):
        self._factory = factory
        self._arguments = arguments
        self._function = function
        self._plain = plain

    def __call__(self, step: int | mx.array) -> Any:
        return self._function(step)

    def __repr__(self) -> str:
        return f"{self._factory.__name__}({', '.join(map(repr, self._arguments))})"

    def __reduce__(self) -> tuple[Any, ...]:
        return self._factory, self._arguments


def plain_schedule(schedule: ScheduleFunction) -> _ext.PlainSchedule | None:
    """The schedule as data for a kernel, or None when only calling it gives its values."""
    if isinstance(schedule, Schedule) and schedule._plain and schedule._plain.fits_kernel:
        return schedule._plain
    return None


def exponential_decay(init: float, decay_rate: float) -> Schedule:
    r"""Make an exponential decay scheduler: :math:`\text{init} \cdot \text{decay\_rate}^t`.

    Args:
        init (float): Initial value.
        decay_rate (float): Multiplicative factor to decay by.

    Raises:
        ValueError: an argument is not finite in float32.

    Source: ``mlx.optimizers.exponential_decay``.

    Example:
        >>> import flatstep as optim
        >>> optimizer = optim.SGD(learning_rate=optim.exponential_decay(1e-1, 0.9))
        >>> for _ in range(5): optimizer.update({}, {})
        >>> optimizer.learning_rate
        array(0.06561, dtype=float32)
    """
    rates = {"init": init, "decay_rate": decay_rate}
    return _schedule(exponential_decay, (init, decay_rate), rates, _ext.exponential_decay)


def step_decay(init: float, decay_rate: float, step_size: int) -> Schedule:
    r"""Make a step decay scheduler:
    :math:`\text{init} \cdot \text{decay\_rate}^{\lfloor t / \text{step\_size} \rfloor}`.

    Args:
        init (float): Initial value.
        decay_rate (float): Multiplicative factor to decay by.
        step_size (int): Decay every ``step_size`` steps.

    Raises:
        ValueError: ``step_size`` is less than 1, or a rate is not finite in float32.

    Source: ``mlx.optimizers.step_decay``.

    Example:
        >>> import flatstep as optim
        >>> optimizer = optim.SGD(learning_rate=optim.step_decay(1e-1, 0.9, 10))
        >>> for _ in range(21): optimizer.update({}, {})
        >>> optimizer.learning_rate
        array(0.081, dtype=float32)
    """
    rates, steps = {"init": init, "decay_rate": decay_rate}, {"step_size": step_size}
    arguments = (init, decay_rate, step_size)
    return _schedule(step_decay, arguments, rates, _ext.exponential_decay, steps)


def cosine_decay(init: float, decay_steps: int, end: float = 0.0) -> Schedule:
    r"""Make a cosine decay scheduler: from ``init`` at step 0 along half a cosine to ``end``,
    :math:`\text{end} + (\text{init} - \text{end}) (1 + \cos(\pi t / \text{decay\_steps})) / 2`.

    Args:
        init (float): Initial value.
        decay_steps (int): Number of steps to decay over. The value is ``end`` beyond them.
        end (float, optional): Final value to decay to. Default: ``0``.

    Raises:
        ValueError: ``decay_steps`` is less than 1, or a rate is not finite in float32.

    Source: ``mlx.optimizers.cosine_decay``.

    Example:
        >>> import flatstep as optim
        >>> optimizer = optim.SGD(learning_rate=optim.cosine_decay(1e-1, 1000))
        >>> for _ in range(5): optimizer.update({}, {})
        >>> optimizer.learning_rate
        array(0.0999961, dtype=float32)
    """
    rates, steps = {"init": init, "end": end}, {"decay_steps": decay_steps}
    return _schedule(cosine_decay, (init, decay_steps, end), rates, _ext.cosine_decay, steps)


def linear_schedule(init: float, end: float, steps: int) -> Schedule:
    r"""Make a linear scheduler:
    :math:`\text{init} + \min(t, \text{steps}) (\text{end} - \text{init}) / \text{steps}`.

    Args:
        init (float): Initial value.
        end (float): Final value.
        steps (int): Number of steps to apply the schedule over. The value is ``end`` beyond them.

    Raises:
        ValueError: ``steps`` is less than 1, or a rate is not finite in float32.

    Source: ``mlx.optimizers.linear_schedule``.

    Example:
        >>> import flatstep as optim
        >>> optimizer = optim.Adam(learning_rate=optim.linear_schedule(0, 1e-1, 100))
        >>> for _ in range(101): optimizer.update({}, {})
        >>> optimizer.learning_rate
        array(0.1, dtype=float32)
    """
    rates = {"init": init, "end": end}
    arguments = (init, end, steps)
    return _schedule(linear_schedule, arguments, rates, _ext.linear_schedule, {"steps": steps})


def join_schedules(schedules: list[ScheduleFunction], boundaries: list[int]) -> Schedule:
    r"""Join multiple schedules to create a new schedule.

    Args:
        schedules (list(Callable)): A list of schedules. Schedule :math:`i+1` receives a step count
          indicating the number of steps since the :math:`i`-th boundary. Any callable will do,
          and joins may be joined again; with a callable that is not of this module the whole join
          is evaluated with MLX operations.
        boundaries (list(int)): A list of integers of length ``len(schedules) - 1`` that indicates
          when to transition between schedules.

    Raises:
        ValueError: the lengths don't fit, or there is no schedule.

    Source: ``mlx.optimizers.join_schedules``.

    Example:
        >>> import flatstep as optim
        >>> linear = optim.linear_schedule(0, 1e-1, steps=10)
        >>> cosine = optim.cosine_decay(1e-1, 200)
        >>> schedule = optim.join_schedules([linear, cosine], [10])
        >>> optimizer = optim.Adam(learning_rate=schedule)
        >>> for _ in range(12): optimizer.update({}, {})
        >>> optimizer.learning_rate
        array(0.0999938, dtype=float32)
    """
    function = mlx_optimizers.join_schedules(schedules, boundaries)
    for i, schedule in enumerate(schedules):
        if not callable(schedule):
            raise TypeError(
                f"join_schedules: schedules[{i}] should be callable, {schedule!r} was provided"
            )
    _check_numbers("join_schedules", {f"boundaries[{i}]": b for i, b in enumerate(boundaries)})
    parts = [s._plain if isinstance(s, Schedule) else None for s in schedules]
    known = [part for part in parts if part is not None]
    plain = None
    if len(known) == len(parts) and all(_is_whole(b) for b in boundaries):
        plain = _ext.join_schedules(known, [int(b) for b in boundaries])
    return Schedule(join_schedules, (schedules, boundaries), function, plain)


def _schedule(
    factory: Callable[..., Schedule],
    arguments: tuple[Any, ...],
    rates: dict[str, Any],
    make_plain: Callable[[float, float, int], _ext.PlainSchedule],
    steps: dict[str, Any] | None = None,
) -> Schedule:
    """The schedule of MLX's function of the same name, as data too if its arguments are numbers."""
    name = factory.__name__
    _check_rates(name, rates)
    _check_numbers(name, steps or {})
    function = getattr(mlx_optimizers, name)(*arguments)
    (every,) = (steps or {"every": 1}).values()
    plain = None
    if _are_numbers(*rates.values()) and _is_whole(every):
        first, second = rates.values()
        plain = make_plain(first, second, int(every))
    return Schedule(factory, arguments, function, plain)


def _check_numbers(function: str, arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if not hasattr(value, "__float__"):
            raise TypeError(misfit(f"{function}: {name}", "a number", repr(value)))
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(misfit(f"{function}: {name}", "a number", value))


def _check_rates(function: str, arguments: dict[str, Any]) -> None:
    """That they, and how far they are apart, are finite in float32, as far as they are known."""
    _check_numbers(function, arguments)
    known = []
    for name, value in arguments.items():
        number = _ext.known_value(value) if isinstance(value, mx.array) else value
        if number is not None:
            known.append(as_finite(f"{function}: {name}", number))
    if "end" in arguments and len(known) == 2:
        as_finite(f"{function}: end - init", known[1] - known[0])


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(v, (int, float)) for v in values)


def _is_whole(value: Any) -> bool:
    return _are_numbers(value) and abs(value) < 2**62 and value == int(value)
