"""What a step should take on an Apple GPU: a prediction, which no Mac has checked yet.

docs/apple_gpu_model.md has the formula, where each number comes from, and what would refute it. Two
sets of assumptions, a fast and a slow one, bound each time.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .. import _ext
from ..layout import BUCKET_BYTES
from .cases import DTYPES, ITEMSIZE, Setting
from .floor import ADDED_BYTES, LITTLE_MEMORY, floor_size

GRADIENTS_OF_A_DISPATCH = 20
MODELLED = ("floor", "flatstep eager", "flatstep compiled", "mlx compiled")


@dataclass(frozen=True)
class Chip:
    """A chip's memory bandwidth in GB/s; where one name has two, `variant` tells them apart."""

    name: str
    bandwidth: float
    source: str
    variant: str = ""
    by_apple: bool = True

    @property
    def label(self) -> str:
        return f"{self.name}, {self.variant}" if self.variant else self.name

    @property
    def is_large(self) -> bool:
        return self.name.endswith(("Max", "Ultra"))


NEWSROOM = "www.apple.com/newsroom"
M1_PRO = (
    f"{NEWSROOM}/2021/10/introducing-m1-pro-and-m1-max"
    "-the-most-powerful-chips-apple-has-ever-built/"
)
M2_PRO = (
    f"{NEWSROOM}/2023/01/apple-unveils-m2-pro-and-m2-max"
    "-next-generation-chips-for-next-level-workflows/"
)
M4_PRO = f"{NEWSROOM}/2024/10/apple-introduces-m4-pro-and-m4-max/"
M5_PRO = (
    f"{NEWSROOM}/2026/03/apple-debuts-m5-pro-and-m5-max"
    "-to-supercharge-the-most-demanding-pro-workflows/"
)
M3_MAC_BOOK = "support.apple.com/en-us/117737"
MAC_STUDIO_2025 = "support.apple.com/en-us/122211"

CHIPS = (
    Chip("M1", 68, "github.com/philipturner/metal-benchmarks", by_apple=False),
    Chip("M1 Pro", 200, M1_PRO),
    Chip("M1 Max", 400, M1_PRO),
    Chip(
        "M1 Ultra",
        800,
        f"{NEWSROOM}/2022/03/apple-unveils-m1-ultra"
        "-the-worlds-most-powerful-chip-for-a-personal-computer/",
    ),
    Chip(
        "M2",
        100,
        f"{NEWSROOM}/2022/06/apple-unveils-m2-with-breakthrough-performance-and-capabilities/",
    ),
    Chip("M2 Pro", 200, M2_PRO),
    Chip("M2 Max", 400, M2_PRO),
    Chip("M2 Ultra", 800, f"{NEWSROOM}/2023/06/apple-introduces-m2-ultra/"),
    Chip("M3", 100, "support.apple.com/en-us/118551"),
    Chip("M3 Pro", 150, M3_MAC_BOOK),
    Chip("M3 Max", 300, M3_MAC_BOOK, "30 GPU cores"),
    Chip("M3 Max", 400, M3_MAC_BOOK, "40 GPU cores"),
    Chip("M3 Ultra", 819, MAC_STUDIO_2025),
    Chip("M4", 120, "support.apple.com/en-us/122209"),
    Chip("M4 Pro", 273, M4_PRO),
    Chip("M4 Max", 410, MAC_STUDIO_2025, "32 GPU cores"),
    Chip("M4 Max", 546, M4_PRO, "40 GPU cores"),
    Chip(
        "M5",
        153,
        f"{NEWSROOM}/2025/10/apple-unleashes-m5"
        "-the-next-big-leap-in-ai-performance-for-apple-silicon/",
    ),
    Chip("M5 Pro", 307, M5_PRO),
    Chip("M5 Max", 460, "www.apple.com/macbook-pro/specs/", "32 GPU cores"),
    Chip("M5 Max", 614, M5_PRO, "40 GPU cores"),
    Chip(
        "M5 Ultra",
        1200,
        f"{NEWSROOM}/2026/08/apple-introduces-new-mac-studio-with-m5-max-and-m5-ultra/",
    ),
)


@dataclass(frozen=True)
class Assumptions:
    """What the published figures leave open; times in seconds."""

    bandwidth_share: float  # of the published bandwidth that a stream of reads and writes reaches
    dispatch: float  # of the GPU, from one kernel to the next
    command_buffer: float  # of the GPU, from one to the next
    preparation: float  # of a bucket's constants, where nothing else runs meanwhile
    flatstep_tensor: float  # of the host, for each tensor
    flatstep_dispatch: float  # of the host
    mlx_tensor: float  # of the host, with the dispatch of its kernel
    wait: float  # until the host knows that the last command buffer has run


FAST = Assumptions(0.92, 0.5e-6, 0.0, 0.0, 1e-6, 2e-6, 3e-6, 100e-6)
SLOW = Assumptions(0.75, 2.5e-6, 20e-6, 8e-6, 3e-6, 6e-6, 20e-6, 300e-6)


@dataclass(frozen=True)
class Work:
    """What a step asks of the GPU."""

    moved_bytes: int
    dispatches: int
    command_buffers: int


def flatstep_buckets(setting: Setting) -> Counter[int]:
    """How many tensors each bucket has."""
    shapes, dtypes = setting.shapes, [DTYPES[setting.dtype]] * len(setting.shapes)
    layout = _ext.Layout(list(shapes), list(shapes.values()), dtypes, BUCKET_BYTES)
    return Counter(bucket for bucket, _ in layout.segments)


def command_buffers(nodes: Iterable[tuple[int, float]], is_large: bool) -> int:
    """How many MLX commits for nodes of (dispatches, elements of the arrays that they bind).

    MLX looks after each node: it commits after more than so many dispatches, or where the arrays
    have more than so many Mi elements (elements, whatever their size).
    """
    limit = 50 if is_large else 40
    count, dispatches, elements = 1, 0, 0.0
    for more_dispatches, more_elements in nodes:
        if dispatches > limit or elements >= (limit + 1) * 2**20:
            count, dispatches, elements = count + 1, 0, 0.0
        dispatches += more_dispatches
        elements += more_elements
    return count


def flatstep_work(setting: Setting, is_large: bool) -> Work:
    """One dispatch for every twenty gradients of a bucket, and one that counts the step."""
    buckets = flatstep_buckets(setting)
    dispatches = {b: -(-n // GRADIENTS_OF_A_DISPATCH) for b, n in buckets.items()}
    elements = setting.elements / len(buckets) * (2 + setting.slots)  # p, g and the state
    nodes = [(count, elements) for count in dispatches.values()]
    moved, total = setting.step_bytes, sum(dispatches.values()) + 1
    return Work(moved, total, command_buffers(nodes, is_large))


def mlx_compiled_work(setting: Setting, is_large: bool) -> Work:
    """One fused kernel for each tensor, which writes fresh memory, and a few on scalars.

    The state has the parameters' dtype.
    """
    tensors = len(setting.shapes)
    arrays = 3 + 2 * setting.slots
    scalars = (1 if setting.rule == "sgd" else 4) + (setting.dtype == "bf16")
    nodes = [(1, setting.elements / tensors * arrays)] * tensors
    moved = setting.elements * arrays * ITEMSIZE[setting.dtype]
    return Work(moved, tensors + scalars, command_buffers(nodes, is_large))


def floor_work(setting: Setting, is_large: bool) -> Work:
    """MLX's sums in place, one for each pass."""
    passes = floor_size(setting, LITTLE_MEMORY)[1]
    nodes = [(1, setting.step_bytes / passes / ADDED_BYTES * 2)] * passes
    return Work(setting.step_bytes, passes, command_buffers(nodes, is_large))


def seconds(contender: str, setting: Setting, chip: Chip, a: Assumptions) -> float:
    """What a step takes by itself, from a call of the optimizer to the end of `mx.eval`.

    The GPU works while the host still builds and encodes, so the slower of the two counts.
    """
    host = preparation = 0.0
    if contender == "floor":
        work = floor_work(setting, chip.is_large)
    elif contender == "mlx compiled":
        work = mlx_compiled_work(setting, chip.is_large)
        host = len(setting.shapes) * a.mlx_tensor
    else:
        work = flatstep_work(setting, chip.is_large)
        preparation = len(flatstep_buckets(setting)) * a.preparation
        host = len(setting.shapes) * a.flatstep_tensor + work.dispatches * a.flatstep_dispatch
    gpu = work.moved_bytes / (chip.bandwidth * 1e9 * a.bandwidth_share) + preparation
    gpu += work.dispatches * a.dispatch + work.command_buffers * a.command_buffer
    return max(gpu, host) + a.wait


def chips_named(device_name: str) -> list[Chip]:
    """The chips that go by the name that Metal gives a device, such as "Apple M4 Max"."""
    return [chip for chip in CHIPS if f"Apple {chip.name}" == device_name]


def predict(contender: str, setting: Setting, chips: list[Chip]) -> tuple[float, float] | None:
    """The fast and the slow end in seconds over these chips, or None where the model is silent."""
    if contender not in MODELLED or not chips:
        return None
    fast = min(seconds(contender, setting, chip, FAST) for chip in chips)
    return fast, max(seconds(contender, setting, chip, SLOW) for chip in chips)
