"""What a step may wait for, and what it must not, run where flatstep is the stand-in's."""

import time
from typing import Any

import flatstep as optim
import mlx.core as mx
from flatstep import _ext
from standin_plugin import StandIn

PARAMETERS = {"w": mx.ones((40, 30)), "b": mx.zeros((7,))}
GRADIENTS = {"w": mx.full((40, 30), 0.5), "b": mx.ones((7,))}


def trained(steps: int = 2) -> tuple[optim.AdamW, Any]:
    optimizer = optim.AdamW(1e-2)
    parameters = PARAMETERS
    for _ in range(steps):
        parameters = optimizer.apply_gradients(GRADIENTS, parameters)
        mx.eval(parameters, optimizer.state)
    return optimizer, parameters


def test_the_cpu_waits_for_no_gpu_that_has_not_been_given_its_work(standin: StandIn) -> None:
    standin.use_gpu(False)
    optimizer, parameters = trained()
    kept = parameters
    standin.hold_stream(True)
    parameters = optimizer.apply_gradients(GRADIENTS, parameters)
    mx.async_eval(parameters, optimizer.state)
    waited_too_long = standin.hold_stream(False)
    _, expected = trained(3)
    assert not waited_too_long
    assert all(mx.array_equal(parameters[k], expected[k]) for k in expected)
    _, unchanged = trained(2)
    assert all(mx.array_equal(kept[k], unchanged[k]) for k in kept)


def test_state_that_a_gpu_lets_go_of_late_is_updated_in_place(standin: StandIn) -> None:
    optimizer, parameters = trained()
    standin.let_go_late(500)
    # On a busy machine the stand-in may sleep longer than a step is patient, and the next steps
    # then do not wait: so a few rounds, with time between them.
    shares = []
    for _ in range(5):
        before = _ext.reuse_counters()
        for _ in range(8):
            parameters = optimizer.apply_gradients(GRADIENTS, parameters)
            mx.eval(parameters, optimizer.state)
        after = _ext.reuse_counters()
        in_place, fresh = (after[k] - before[k] for k in ("state_in_place", "state_fresh"))
        shares.append(in_place / (in_place + fresh))
        time.sleep(0.2)
    assert max(shares) > 0.7
