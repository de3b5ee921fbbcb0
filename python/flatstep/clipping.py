"""Clipping by the global norm as a function, for gradients that no optimizer here takes."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from . import _ext
from .slots import FLOATING


def clip_grad_norm(grads: Any, max_norm: float) -> tuple[Any, mx.array]:
    """Clips the global norm of the gradients.

    ``max_grad_norm=`` of an optimizer does the same without a copy of the gradients.

    Args:
        grads (dict): A Python tree of gradients.
        max_norm (float): The maximum allowed global norm of the gradients, >= 0.

    Returns:
        (dict, mx.array): The gradients, multiplied by ``min(1, max_norm / (norm + 1e-6))``, and
        their norm before, a float32 scalar.

    Raises:
        ValueError: ``max_norm`` is negative.

    Source: ``mlx.optimizers.clip_grad_norm``.

    Example:
        >>> import flatstep as optim, mlx.core as mx
        >>> grads, norm = optim.clip_grad_norm({"w": mx.array([3.0, 4.0])}, max_norm=1.0)
        >>> grads["w"], norm
        (array([0.6, 0.8], dtype=float32), array(5, dtype=float32))
    """
    if max_norm < 0:
        raise ValueError(f"max_norm should be >=0, {max_norm} was provided instead")
    named: Any = tree_flatten(grads)
    leaves: list[mx.array] = [leaf for _, leaf in named]
    total_norm = _ext.global_norm(
        [leaf if leaf.dtype in FLOATING else leaf.astype(mx.float32) for leaf in leaves]
    )
    normalizer = mx.minimum(max_norm / (total_norm + 1e-6), 1.0)

    def scaled(gradient: mx.array) -> mx.array:
        product = gradient * normalizer
        is_floating = mx.issubdtype(gradient.dtype, mx.floating)
        return product.astype(gradient.dtype) if is_floating else product

    return tree_map(scaled, grads), total_norm
