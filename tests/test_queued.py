"""Steps that wait on MLX's stream behind other work, where one task may do what several would."""

from typing import Any

import flatstep as optim
import mlx.core as mx
import numpy as np
from cases import Case, random_tree
from models import every_rule
from shadow import bits

# Five buckets, each of one leaf and a little.
SHAPES = {"layers": [{"w": (1100, 1000), "b": (70,)} for _ in range(5)]}


def problem(seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    trees = random_tree(SHAPES, rng), random_tree(SHAPES, rng)
    mx.eval(trees)
    return trees


def keep_the_stream_busy() -> None:
    x = mx.full((1 << 20,), 0.5) + 0
    for _ in range(20):
        x = mx.sin(x)
    mx.async_eval(x)


class Training:
    """A rule and its problem, stepped without waiting for anything."""

    def __init__(self, case: Case, seed: int):
        self.params, self.gradients = problem(seed)
        self.optimizer = case.make(optim)
        self.optimizer.init(self.params)
        mx.eval(self.optimizer.state)

    def step(self) -> None:
        self.params = self.optimizer.apply_gradients(self.gradients, self.params)
        mx.async_eval(self.params, self.optimizer.state)

    def wait(self) -> None:
        mx.eval(self.params, self.optimizer.state)

    def values(self) -> Any:
        self.wait()
        return bits({"params": self.params, "state": dict(self.optimizer.state)})


def trained_alone(case: Case, seed: int, steps: int) -> Any:
    training = Training(case, seed)
    for _ in range(steps):
        training.step()
        training.wait()
    return training.values()


@every_rule
def test_steps_that_wait_together_are_what_they_are_alone(case: Case) -> None:
    expected = [trained_alone(case, seed, 4) for seed in range(2)]
    both = [Training(case, seed) for seed in range(2)]
    for _ in range(4):
        keep_the_stream_busy()
        for training in both:
            training.step()
        for training in both:
            training.wait()
    assert [training.values() for training in both] == expected


@every_rule
def test_a_step_reads_gradients_that_are_queued_before_it(case: Case) -> None:
    """Buckets whose gradients are there stand between those whose gradients are not."""
    expected = trained_alone(case, 3, 3)
    training = Training(case, 3)
    given = training.gradients
    for _ in range(3):
        keep_the_stream_busy()
        training.gradients = {
            "layers": [
                layer if i % 2 else {name: g * 1.0 for name, g in layer.items()}
                for i, layer in enumerate(given["layers"])
            ]
        }
        training.step()
        training.wait()
    assert training.values() == expected
