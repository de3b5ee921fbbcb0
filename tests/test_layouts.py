"""Gradients and parameters that lie in memory in any way are read as contiguous copies are."""

import flatstep as optim
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten


def layouts(rng: np.random.Generator) -> dict[str, mx.array]:
    """Every way in which a gradient may lie in memory."""
    cube = mx.array(rng.normal(size=(24, 40, 36)).astype(np.float32))
    matrix = mx.array(rng.normal(size=(300, 1040)).astype(np.float32))
    row = mx.array(rng.normal(size=(1, 140_000)).astype(np.float32))
    return {
        "transposed": matrix.T,
        "slice": matrix[3:291:2, 5:1000],
        "strided columns": matrix[:, ::3],
        "reversed": matrix[::-1, ::-1],
        "permuted": cube.transpose(2, 0, 1),
        "swapped": cube.swapaxes(1, 2),
        "row": mx.broadcast_to(matrix[:1], (300, 1040)),
        "column": mx.broadcast_to(matrix[:, :1], (300, 1040)),
        "one element": mx.broadcast_to(mx.array(0.3), (513, 1031)),
        "half": matrix.astype(mx.float16).T,
        "bfloat16": cube.astype(mx.bfloat16).transpose(1, 2, 0),
        "vector": matrix.reshape(-1)[::7],
        "long columns": mx.broadcast_to(row, (3, 140_000)).T,
        "long rows": mx.broadcast_to(row, (3, 140_000))[:, ::-1],
        "scalar": matrix[7, 11],
        "empty": matrix[:, :0],
    }


def test_any_layout_gives_the_bits_of_its_contiguous_copy() -> None:
    strided = layouts(np.random.default_rng(3))
    copies = {
        name: mx.array(np.array(a.astype(mx.float32))).astype(a.dtype)
        for name, a in strided.items()
    }
    mx.eval(strided, copies)
    pairs = [(copies, copies), (strided, copies), (copies, strided), (strided, strided)]
    results = []
    for gradients, parameters in pairs:
        optimizer = optim.AdamW(1e-2, bias_correction=True)
        updated = optimizer.apply_gradients(gradients, parameters)
        # The second step reads parameters and state where the first has put them.
        updated = optimizer.apply_gradients(gradients, updated)
        results.append([*tree_flatten(updated), *tree_flatten(optimizer.state)])
    for result in results[1:]:
        for (name, a), (_, b) in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(
                np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32)), err_msg=name
            )
