"""What flatstep sets out to reach, checked against what was measured.

Where a goal does not say eager or compiled, both have to meet it: the figure is the worse one's.
"""

from dataclasses import dataclass
from itertools import groupby

from .._command_line import print_table
from .cases import Setting
from .contenders import FLATSTEP
from .results import Result

EAGER, COMPILED = FLATSTEP[:1], FLATSTEP[1:]
MLX_COMPILED, TORCH_FUSED = "mlx compiled", "torch fused"
MOST_EXTRA = 0.01  # of the state, in every case


@dataclass(frozen=True)
class Goal:
    """So many times the floor at most or, with a peer, so many times as fast as it at least."""

    setting: Setting
    bound: float
    peer: str | None = None
    modes: tuple[str, ...] = FLATSTEP

    def __str__(self) -> str:
        mode = "" if self.modes == FLATSTEP else f"{self.modes[0].split()[1]} "
        if self.peer:
            return f"{mode}at least {self.bound:g} times as fast as {self.peer}"
        return f"{mode}at most {self.bound:.2f} of the floor"

    def figure(self, result: Result) -> float:
        """Raises KeyError where somebody was not measured."""
        if self.peer:
            return min(result.faster(name, self.peer) for name in self.modes)
        return max(result.series[name].ratio for name in self.modes)

    def is_met(self, figure: float) -> bool:
        return figure >= self.bound if self.peer else figure <= self.bound


GPT2, FLAT, LORA, TINY = map(Setting, ("gpt2", "flat", "lora", "tiny"))

GOALS = (  # those of a setting together
    Goal(GPT2, 1.05),
    Goal(GPT2, 1, TORCH_FUSED),
    Goal(Setting("gpt2", "sgd"), 1.05),
    Goal(Setting("gpt2", dtype="bf16"), 1.08),
    Goal(Setting("gpt2", threads=1), 1.1),
    Goal(Setting("gpt2", loops="avx2"), 1.08),
    Goal(FLAT, 1.03),
    Goal(Setting("flat", threads=1), 1.1),
    Goal(LORA, 1.2, modes=EAGER),
    Goal(LORA, 1.3, TORCH_FUSED),
    Goal(TINY, 2, TORCH_FUSED, EAGER),
    Goal(TINY, 8, MLX_COMPILED, EAGER),
    Goal(TINY, 1.5, TORCH_FUSED, COMPILED),
    Goal(TINY, 6, MLX_COMPILED, COMPILED),
)


def print_goals(planned: list[Setting], results: list[Result]) -> bool:
    """Prints whether each goal of the planned settings is met; returns whether all are."""
    by_setting = {result.setting: result for result in results}
    rows, all_met = [], True
    goals = [goal for goal in GOALS if goal.setting in planned]
    for setting, group in groupby(goals, key=lambda goal: goal.setting):
        result = by_setting.get(setting, Result(setting, {}))
        doubt = ", noisy" if result.series and result.noise else ""
        rows.append((setting.label, "", ""))
        for goal in group:
            try:
                figure = goal.figure(result)
            except KeyError:
                rows.append((f"  {goal}", "-", "not measured"))
                all_met = False
                continue
            met = goal.is_met(figure)
            rows.append((f"  {goal}", f"{figure:.3f}", f"{'met' if met else 'not met'}{doubt}"))
            all_met = all_met and met
    extra = max((r.extra_part(n) for r in results for n in FLATSTEP if n in r.series), default=1)
    met = extra <= MOST_EXTRA
    rows.append(("every case: extra memory", "", ""))
    rows.append(
        (f"  at most {MOST_EXTRA:.0%} of the state", f"{extra:.2%}", "met" if met else "not met")
    )
    print_table("Goals: medians of ratios to the floor", ("", "measured", ""), rows)
    return all_met and met
