"""What flatstep sets out to reach, checked against what was measured.

Where a goal speaks of flatstep, its eager and its compiled step both have to meet it: the figure is
that of the worse.
"""

from collections.abc import Callable
from dataclasses import dataclass

from flatstep.benchmark.cases import Setting
from flatstep.benchmark.contenders import FLATSTEP
from flatstep.benchmark.results import Result
from rich import box
from rich.table import Table

Results = dict[Setting, Result]


@dataclass(frozen=True)
class Goal:
    """A figure and its bound. `measure` raises KeyError where something was not measured."""

    text: str
    measure: Callable[[Results], float]
    bound: float
    unit: str = "x"
    at_least: bool = False
    settings: tuple[Setting, ...] = ()

    def is_met(self, figure: float) -> bool:
        return figure >= self.bound if self.at_least else figure <= self.bound


@dataclass(frozen=True)
class Verdict:
    goal: Goal
    figure: float | None
    is_noisy: bool

    @property
    def is_met(self) -> bool:
        return self.figure is not None and self.goal.is_met(self.figure)


GPT2 = Setting("gpt2")
LORA = Setting("lora")
FLAT = Setting("flat")
TINY = Setting("tiny")
GPT2_SGD = Setting("gpt2", "sgd")
GPT2_BF16 = Setting("gpt2", dtype="bf16")
COST = tuple(Setting(f"cost-{count}") for count in (10, 1_000, 10_000))


def near_floor(setting: Setting, bound: float) -> Goal:
    return Goal(
        f"{setting.label}: over the floor",
        lambda results: max(results[setting].series[name].ratio for name in FLATSTEP),
        bound,
        settings=(setting,),
    )


def faster_than(setting: Setting, peer: str, bound: float) -> Goal:
    return Goal(
        f"{setting.label}: faster than {peer}",
        lambda results: min(results[setting].faster(name, peer) for name in FLATSTEP),
        bound,
        at_least=True,
        settings=(setting,),
    )


def little_memory(setting: Setting) -> Goal:
    return Goal(
        f"{setting.label}: extra memory / state",
        lambda results: 100 * extra_part(results[setting]),
        1,
        "%",
        settings=(setting,),
    )


def extra_part(result: Result) -> float:
    return max(result.extra_part(name) or 0.0 for name in FLATSTEP)


def slope(results: Results, name: str, few: int, many: int) -> float:
    """Microseconds for each tensor more, between two points of the cost curve."""
    medians = (results[Setting(f"cost-{count}")].series[name].quartiles[1] for count in (few, many))
    start, end = medians
    return 1e6 * (end - start) / (many - few)


def cost_per_tensor(results: Results) -> float:
    return max(slope(results, name, 10, 10_000) for name in FLATSTEP)


def cost_growth(results: Results) -> float:
    """The slope of the curve's last part over that of its first: 1 for a straight line."""
    return max(
        slope(results, name, 1_000, 10_000) / slope(results, name, 10, 1_000) for name in FLATSTEP
    )


def most_memory(results: Results) -> float:
    return 100 * max(map(extra_part, results.values()))


GOALS = {
    "Goals": [
        near_floor(GPT2, 1.15),
        faster_than(GPT2, "mlx compiled", 5),
        little_memory(GPT2),
        near_floor(LORA, 1.3),
        faster_than(TINY, "mlx compiled", 8),
        faster_than(TINY, "torch fused", 1),
    ],
    "Goals to be first": [
        near_floor(GPT2, 1.05),
        faster_than(GPT2, "mlx compiled", 6),
        faster_than(GPT2, "torch fused", 1),
        near_floor(FLAT, 1.03),
        near_floor(LORA, 1.08),
        faster_than(LORA, "torch fused", 1.35),
        faster_than(TINY, "torch fused", 2),
        faster_than(TINY, "mlx compiled", 12),
        near_floor(GPT2_SGD, 1.05),
        near_floor(GPT2_BF16, 1.1),
        Goal(
            "10⁶ elements in 10 to 10,000 tensors: cost of a tensor",
            cost_per_tensor,
            2,
            " µs",
            settings=COST,
        ),
        Goal(
            "10⁶ elements: slope above 1,000 tensors / slope below",
            cost_growth,
            1.25,
            settings=COST,
        ),
        Goal("every case: extra memory / state", most_memory, 1, "%"),
    ],
}


def judge(goal: Goal, results: Results) -> Verdict:
    try:
        figure = goal.measure(results)
    except KeyError:
        return Verdict(goal, None, False)
    noisy = any(results[setting].is_noisy for setting in goal.settings)
    return Verdict(goal, figure, noisy)


def goal_table(title: str, verdicts: list[Verdict]) -> Table:
    table = Table(
        "",
        "goal",
        "measured",
        "",
        box=box.SIMPLE_HEAD,
        title=title,
        caption="a time is a median of ratios to the floor, of flatstep's slower mode",
        title_justify="left",
        caption_justify="left",
    )
    for verdict in verdicts:
        goal = verdict.goal
        bound = f"{'≥' if goal.at_least else '≤'} {goal.bound:g}{goal.unit}"
        if verdict.figure is None:
            table.add_row(goal.text, bound, "-", "not measured")
            continue
        word = "[green]met[/]" if verdict.is_met else "[red]not met[/]"
        note = ", [yellow]noisy[/]" if verdict.is_noisy else ""
        table.add_row(goal.text, bound, f"{verdict.figure:.3f}{goal.unit}", word + note)
    return table
