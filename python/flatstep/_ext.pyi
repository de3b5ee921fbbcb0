"""The compiled engine of flatstep."""

from collections.abc import Mapping, Sequence
import enum

import mlx.core
import mlx.core.distributed

class Rule:
    """An update rule with its hyperparameters."""

    def __init__(self, name: str, values: Mapping[str, float]) -> None: ...
    @property
    def num_states(self) -> int:
        """How many state arrays a step updates."""

    def has_sign(self, k: int) -> bool:
        """Whether values of state number k may be below zero."""

    @property
    def type(self) -> str:
        """The name of its struct in csrc/rules.h."""

    @property
    def groups(self) -> list[bytes]:
        """
        The hyperparameters of each group of parameters, as a kernel gets them.
        """

    def with_group(
        self,
        values: Mapping[str, float],
        source: RateSource,
        scale: float = 1.0,
        schedule: PlainSchedule | None = None,
    ) -> Rule:
        """The rule with one more group of parameters."""

class Rounding(enum.Enum):
    """How half-precision parameters are rounded."""

    NEAREST = 0

    STOCHASTIC = 1

    KEEP_8_BITS = 2

    KEEP_16_BITS = 3

def block_bytes() -> int:
    """Of a block of 8-bit codes with its scale."""

def rest_bytes(rounding: Rounding, dtype: mlx.core.Dtype) -> int:
    """Of what lies beside a block of parameters; 0: nothing."""

def load_codes(blocks: mlx.core.array, has_sign: bool) -> mlx.core.array:
    """Codes and scales as float32 of shape (blocks, 64)."""

def store_codes(values: mlx.core.array, has_sign: bool) -> mlx.core.array:
    """Codes and scales of float32 of shape (blocks, 64)."""

def load_split(
    parameters: mlx.core.array, rests: mlx.core.array, rounding: Rounding
) -> mlx.core.array:
    """Master weights as float32 of shape (blocks, 64)."""

def store_split(
    values: mlx.core.array, dtype: mlx.core.Dtype, rounding: Rounding
) -> tuple[mlx.core.array, mlx.core.array]:
    """Parameters of this dtype, of shape (blocks, 64), and their rests."""

class PlainSchedule:
    """A schedule as data that a kernel evaluates."""

    @property
    def fits_kernel(self) -> bool:
        """False when a join has more pieces than a kernel takes."""

    def __call__(self, step: int) -> float:
        """The float32 learning rate at a step, as the kernels compute it."""

def linear_schedule(init: float, end: float, steps: int) -> PlainSchedule: ...
def cosine_decay(init: float, end: float, steps: int) -> PlainSchedule: ...
def exponential_decay(init: float, decay_rate: float, step_size: int) -> PlainSchedule: ...
def join_schedules(
    schedules: Sequence[PlainSchedule], boundaries: Sequence[int]
) -> PlainSchedule: ...

class Layout:
    """Where each leaf of a tree lies in flat memory."""

    def __init__(
        self,
        paths: Sequence[str],
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[mlx.core.Dtype],
        kinds: Sequence[int],
        bucket_bytes: int,
    ) -> None: ...
    @property
    def segments(self) -> list[tuple[int, int]]:
        """The bucket and the first element of each leaf."""

    @property
    def bucket_blocks(self) -> list[int]:
        """The length of each bucket in blocks of 64 elements."""

def reuse_counters() -> dict[str, int]:
    """
    How often a bucket's buffer was written in place, and how often to fresh memory.
    """

def gpu_backend() -> str | None:
    """The GPU backend of this build, or None."""

def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def cpu_loops() -> str: ...
def available_cpu_loops() -> list[str]: ...
def set_cpu_loops(name: str) -> None: ...
def floor_pass(p: mlx.core.array, g: mlx.core.array, state: Sequence[mlx.core.array]) -> None:
    """
    Moves the bytes of a step, with next to no arithmetic: the time that memory allows.
    """

MAX_TREE_DEPTH: int = 1000

def is_tracing() -> bool:
    """True while a function is traced."""

def known_value(array: mlx.core.array) -> float | None:
    """
    The value of a floating scalar that is evaluated; None of any other array.
    """

class RateSource(enum.Enum):
    """Where the learning rate of a group comes from."""

    ALL = 0

    OWN = 1

    SCHEDULE = 2

class LeafGroups:
    """The group of parameters of each leaf."""

    def __init__(self, groups: Sequence[int]) -> None: ...

FROZEN: int = 4294967295

class StepSettings:
    """What a user sets for a step besides the rule."""

    def __init__(
        self,
        rounding: Rounding = Rounding.NEAREST,
        seed: int = 0,
        max_grad_norm: float = float("inf"),
        clip_value: float = float("inf"),
        has_norm: bool = False,
        skips_nonfinite: bool = False,
        accumulate_steps: int = 0,
        ema: float | None = None,
        ema_start: int = 0,
        ema_every: int = 1,
    ) -> None: ...

def step(
    layout: Layout,
    skeleton: object,
    gradients: object | None,
    parameters: object | None,
    rule: Rule,
    schedule: PlainSchedule | None,
    state: list[list[mlx.core.array]],
    scalars: Mapping[str, mlx.core.array],
    settings: StepSettings,
    groups: LeafGroups | None = None,
    norm_group: mlx.core.distributed.Group | None = None,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None = None,
) -> tuple[object, list[list[mlx.core.array]], dict[str, mlx.core.array]] | None:
    """
    One step over a tree: (parameters, state, scalars), or None when a parameter's dtype is not the layout's.
    """

def are_flat(
    layout: Layout, skeleton: object, parameters: object, groups: LeafGroups | None = None
) -> bool:
    """Whether the parameters lie in their buckets, once they are evaluated."""

def accumulate(
    layout: Layout,
    skeleton: object,
    gradients: object | None,
    sums: list[list[mlx.core.array]],
    scalars: Mapping[str, mlx.core.array],
    seed: int = 0,
    groups: LeafGroups | None = None,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None = None,
) -> tuple[list[mlx.core.array], dict[str, mlx.core.array]]:
    """Adds gradients to their sums: (sums, scalars)."""

def global_norm(
    gradients: Sequence[mlx.core.array],
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None = None,
) -> mlx.core.array:
    """The 2-norm of all elements of some arrays."""

def views(
    flat: mlx.core.array,
    specs: Sequence[tuple[Sequence[int], int]],
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None = None,
) -> list[mlx.core.array]:
    """
    Parts of a flat array, given as (shape, first element). They share its memory unless they would keep much of it that is not theirs.
    """
