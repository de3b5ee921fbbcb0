"""Steps of the engine itself, with parameters and state in any storage."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from block_reference import BLOCK, CODE_BYTES, Bytes, Float32
from flatstep import _ext

Rounding = _ext.Rounding

# Of each rule the hyperparameters, as many of them in use as can be.
HYPERPARAMETERS: dict[str, dict[str, float]] = {
    "sgd": {"weight_decay": 0.01, "momentum": 0.0, "dampening": 0.0, "nesterov": 0.0},
    "momentum": {"weight_decay": 0.01, "momentum": 0.9, "dampening": 0.1, "nesterov": 1.0},
    "adam": {
        "weight_decay": 0.01,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "bias_correction": 1.0,
    },
    "lion": {"weight_decay": 0.01, "beta1": 0.9, "beta2": 0.99},
}
# Which of a rule's arrays of state are signed.
SIGNS: dict[str, list[bool]] = {
    "sgd": [],
    "momentum": [True],
    "adam": [True, False],
    "lion": [True],
}


def rule(name: str, **changed: float) -> _ext.Rule:
    return _ext.Rule(name, {**HYPERPARAMETERS[name], **changed})


class Engine:
    """A rule over leaves by name: their parameters, and the state of all buckets."""

    def __init__(
        self,
        rule: _ext.Rule,
        parameters: Mapping[str, mx.array],
        *,
        has_codes: bool = False,
        rounding: Rounding = Rounding.NEAREST,
        seed: int = 0,
        bucket_bytes: int = 1 << 22,
    ) -> None:
        self.rule, self.rounding, self.seed = rule, rounding, seed
        self.parameters = dict(parameters)
        shapes = [list(p.shape) for p in parameters.values()]
        dtypes = [p.dtype for p in parameters.values()]
        kinds = [0] * len(shapes)
        self.layout = _ext.Layout(list(parameters), shapes, dtypes, kinds, bucket_bytes)
        self.skeleton = {name: i for i, name in enumerate(parameters)}
        self.steps_taken = 0
        blocks = self.layout.bucket_blocks
        width, dtype = (CODE_BYTES, mx.uint8) if has_codes else (BLOCK, mx.float32)
        self.state = [[mx.zeros((n, width), dtype) for n in blocks] for _ in range(rule.num_states)]
        if rest_bytes := _ext.rest_bytes(rounding, dtypes[0]):
            self.state.append([mx.zeros((n, rest_bytes), mx.uint8) for n in blocks])
        mx.eval(self.parameters, self.state)

    def step(self, gradients: Mapping[str, mx.array], learning_rate: float = 1e-3) -> None:
        # Nothing but the step holds the state, so that it is written in place.
        state, self.state = self.state, []
        result = _ext.step(
            self.layout,
            self.skeleton,
            dict(gradients),
            self.parameters,
            self.rule,
            None,
            state,
            {
                "step": mx.array(self.steps_taken, mx.uint64),
                "learning_rate": mx.array(learning_rate, mx.float32),
            },
            _ext.StepSettings(self.rounding, self.seed),
            stream=mx.cpu,
        )
        del state
        assert result is not None
        updated: Any = result[0]
        self.parameters.update(updated)
        self.state = result[1]
        self.steps_taken += 1
        mx.eval(self.parameters, self.state)

    def bits(self) -> list[bytes]:
        """All that a step writes."""
        leaves = [floats(p) for p in self.parameters.values()]
        state = [np.array(a) for buckets in self.state for a in buckets]
        return [a.tobytes() for a in (*leaves, *state)]

    def codes(self, k: int, bucket: int = 0) -> Bytes:
        """A copy of an array of state in blocks."""
        return np.array(self.state[k][bucket])


def one_leaf(values: Any, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    return {"w": mx.array(np.asarray(values, np.float32)).astype(dtype)}


def floats(array: mx.array) -> Float32:
    return np.array(array.astype(mx.float32))
