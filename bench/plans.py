"""Which settings are measured: plans are lists of them.

The settings are those of `flatstep.benchmark`, so that `python -m flatstep bench` means the same.
"""

from collections.abc import Iterable, Sequence
from itertools import product

from flatstep.benchmark.cases import CASES, Setting


def cost_cases() -> list[str]:
    return [name for name in CASES if name.startswith("cost-")]


def named_cases(names: Sequence[str]) -> list[str]:
    """Cases by their names, where "cost" stands for all of that curve."""
    cases = [name for name in names if name != "cost"]
    return cases + (cost_cases() if "cost" in names else [])


def default_plan() -> list[Setting]:
    """Every rule, both dtypes, one thread and all, but not every combination of them.

    TinyLlama is left to those who ask for it: a step of its slowest peers takes half a minute.
    """
    return [
        *(Setting(case) for case in ("gpt2", "lora", "vit", "flat", "tiny")),
        *(Setting(case, "sgd") for case in ("gpt2", "lora")),
        Setting("lora", "adam"),
        *(Setting(case, dtype="bf16") for case in ("gpt2", "lora")),
        *(Setting(case, threads=1) for case in ("lora", "tiny")),
        *map(Setting, cost_cases()),
    ]


def quick_plan() -> list[Setting]:
    return [Setting(case) for case in ("lora", "tiny", "cost-10", "cost-300", "cost-3000")]


def goals_plan() -> list[Setting]:
    return [
        *(Setting(case) for case in ("gpt2", "lora", "flat", "tiny")),
        Setting("gpt2", "sgd"),
        Setting("gpt2", dtype="bf16"),
        *map(Setting, ("cost-10", "cost-1000", "cost-10000")),
    ]


def product_plan(
    cases: Iterable[str], rules: Iterable[str], dtypes: Iterable[str], threads: Iterable[int | None]
) -> list[Setting]:
    return [Setting(*choice) for choice in product(cases, rules, dtypes, threads)]
