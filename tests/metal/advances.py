"""A dispatch of the kernel `advance`: what a step leaves, and the constants of each group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import arguments as args
import kernel_text
import numpy as np
from numpy.typing import NDArray


class Rule(Protocol):
    """What the tests ask of flatstep._ext.Rule."""

    @property
    def type(self) -> str: ...
    @property
    def num_states(self) -> int: ...
    @property
    def groups(self) -> Sequence[bytes]: ...


@dataclass
class Group:
    """A group of parameters: the first of the rule's has its hyperparameters."""

    rule: Rule
    source: int = args.OF_ALL
    scale: float = 1.0
    schedule: tuple[Any, ...] = ()


def group_table(groups: Sequence[Group]) -> NDArray[np.uint32]:
    table = np.zeros(len(groups), args.GROUP_ARGUMENTS)
    schedules = b""
    for number, group in enumerate(groups):
        place = (table.nbytes + len(schedules)) // 4
        hyperparameters = np.frombuffer(group.rule.groups[0], np.uint32)
        table[number] = (group.source, group.scale, place, 0, hyperparameters)
        if group.schedule:
            schedule = args.schedule(*group.schedule)
            size = 8 + args.PIECE.itemsize * int(schedule["num_pieces"])
            schedules += schedule.tobytes()[:size]
    return np.frombuffer(table.tobytes() + schedules, np.uint32)


def run_advance(
    library: Any,
    groups: Sequence[Group],
    scalars: Mapping[str, Any],
    written: Sequence[str] = ("step",),
    *,
    schedule: tuple[Any, ...] = (),
    settings: args.Struct | None = None,
) -> tuple[NDArray[np.uint32], dict[str, NDArray[Any]]]:
    """The constants of each group, and what is written of the scalars.

    Where there are several groups, their rates are always read and written.
    """
    if len(groups) > 1:
        scalars = {"group_learning_rates": np.zeros(len(groups) - 1), **scalars}
        written = ("group_learning_rates", *written)
    constants = np.zeros((len(groups), args.GROUP_WORDS), np.uint32)
    arguments = np.zeros((), args.ADVANCE_STRUCT)
    arguments["settings"] = args.settings() if settings is None else settings
    buffers: dict[int, Any] = {}
    after = {}
    for number, (name, dtype) in enumerate(args.SCALARS.items()):
        read = np.array(scalars.get(name, []), dtype).reshape(-1)
        buffers[number] = read
        arguments["read"] |= (name in scalars) << number
        size = (len(groups) - 1 if name == "group_learning_rates" else 1) if name in written else 0
        buffers[args.ADVANCE_WRITTEN + number] = np.zeros(size, dtype)
        arguments["written"] |= (name in written) << number
        if name in written:
            after[name] = buffers[args.ADVANCE_WRITTEN + number]
    buffers[args.ADVANCE_CONSTANTS] = constants
    buffers[args.ADVANCE_ARGUMENTS] = np.array([arguments])
    buffers[args.ADVANCE_SCHEDULE] = np.array([args.schedule(*schedule)])
    buffers[args.ADVANCE_GROUPS] = group_table(groups)
    library.run(
        kernel_text.advance(groups[0].rule.type),
        grid=(len(groups),),
        threads=(len(groups),),
        buffers=buffers,
    )
    return constants, after


def pass_of(constants: NDArray[np.uint32]) -> args.Struct:
    """What is the same for every group, as the first has it."""
    return constants[0, : args.PASS_WORDS].copy().view(args.PASS_CONSTANTS)[0]
