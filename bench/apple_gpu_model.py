"""The tables of docs/apple_gpu_model.md: ``python -m bench.apple_gpu_model`` prints them.

The model itself is `flatstep.benchmark.apple_gpu`, which `python -m flatstep bench` prints beside
what it measures.
"""

from collections.abc import Iterable

from flatstep.benchmark import apple_gpu
from flatstep.benchmark.apple_gpu import CHIPS, Chip
from flatstep.benchmark.cases import CASES, Setting
from flatstep.benchmark.table import milliseconds

MANNERS = (("adamw", "fp32"), ("sgd", "fp32"), ("adamw", "bf16"))
COUNTED = {
    "gpt2": MANNERS,
    "lora": MANNERS,
    "tinyllama": (("adamw", "bf16"), ("sgd", "bf16")),
    "tiny": MANNERS[:1],
}
TIMED = ("gpt2", "lora", "tinyllama")


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def bandwidths() -> str:
    rows = []
    for chip in CHIPS:
        source = f"[{chip.source.partition('/')[0]}](https://{chip.source})"
        rows.append((chip.label, f"{chip.bandwidth:g}", source))
    return markdown(("chip", "GB/s", "source"), rows)


def work() -> str:
    """What a step asks of a GPU; the command buffers are those of a Max or an Ultra."""
    rows = []
    for case, manners in COUNTED.items():
        for manner in manners:
            setting = Setting(case, *manner)
            ours = apple_gpu.flatstep_work(setting, is_large=True)
            peers = apple_gpu.mlx_compiled_work(setting, is_large=True)
            row = [setting.label]
            for one in (ours, peers):
                row += [
                    f"{one.moved_bytes / setting.elements:.0f}",
                    f"{one.dispatches:,}",
                    f"{one.command_buffers}",
                ]
            rows.append(row)
    names = ("bytes a parameter", "dispatches", "command buffers")
    head = [f"{library}: {name}" for library in ("flatstep", "mlx compiled") for name in names]
    return markdown(["", *head], rows)


def times(case: str) -> str:
    """Milliseconds of a step, from the fast assumptions to the slow ones."""
    settings = [Setting(case, *manner) for manner in COUNTED[case]]
    head = ["chip"]
    for setting in settings:
        head += [f"{setting.manner}: floor", "flatstep", "mlx"]
    rows: dict[tuple[str, ...], list[str]] = {}
    for chip in sorted(CHIPS, key=lambda chip: chip.bandwidth):
        rows.setdefault(tuple(_times(chip, settings)), []).append(chip.label)
    return markdown(head, (["; ".join(labels), *cells] for cells, labels in rows.items()))


def _times(chip: Chip, settings: list[Setting]) -> list[str]:
    cells = []
    for setting in settings:
        for contender in ("floor", "flatstep compiled", "mlx compiled"):
            predicted = apple_gpu.predict(contender, setting, [chip])
            assert predicted
            cells.append(milliseconds(predicted))
    return cells


def tables() -> dict[str, str]:
    return {
        "What a step asks of the GPU": work(),
        **{f"{CASES[case][0]}: milliseconds": times(case) for case in TIMED},
        "Bandwidths": bandwidths(),
    }


if __name__ == "__main__":
    for title, text in tables().items():
        print(f"### {title}\n\n{text}\n")
