"""The model of the demo, and the text that it reads: the Python standard library, as bytes."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

TEXT_BYTES = 16_000_000
CONTEXT = 64

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class ByteTransformer(nn.Module):
    """A pre-norm causal transformer over bytes that also embeds each byte with the one before it.

    The table of byte pairs holds half of the three million parameters and costs hardly any
    arithmetic, so that a CPU learns something in a minute. Two ASCII pairs share each row.
    """

    pairs = 8192
    # Of the activations; None: what the parameters and the float32 positions promote to.
    activations: mx.Dtype | None = None

    def __init__(self, dims: int = 192, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.byte = nn.Embedding(256, dims)
        self.pair = nn.Embedding(self.pairs, dims)
        self.position = nn.SinusoidalPositionalEncoding(dims)
        self.encoder = nn.TransformerEncoder(layers, dims, heads, norm_first=True)
        self.out = nn.Linear(dims, 256)

    def __call__(self, x: mx.array) -> mx.array:
        length = x.shape[1]
        h = self.byte(x) + self.pair(self.rows(x)) + self.position(mx.arange(length))
        if self.activations is not None:
            h = h.astype(self.activations)
        mask = nn.MultiHeadAttention.create_additive_causal_mask(length, h.dtype)
        logits: mx.array = self.out(self.encoder(h, mask))
        return logits

    def rows(self, x: mx.array) -> mx.array:
        """The row of the table that each byte and the one before it have."""
        return (128 * earlier(x, 1) + x) % self.pairs


class TrigramTransformer(ByteTransformer):
    """The same with a large table for three bytes, hashed: most rows are seen rarely."""

    pairs = 131072

    def rows(self, x: mx.array) -> mx.array:
        three = 16384 * earlier(x, 2) + 128 * earlier(x, 1) + x
        return (three.astype(mx.uint32) * 2654435761) >> 15  # Knuth's hash: the upper 17 bits


def earlier(x: mx.array, by: int) -> mx.array:
    """For each byte the one so many places before it, or zero."""
    return mx.pad(x[:, :-by], [(0, 0), (by, 0)])


def loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(x), y, reduction="mean")


def load_text() -> tuple[Bytes, Bytes]:
    """Return the standard library's sources as training and validation bytes.

    Every twentieth file is held out, so both parts hold the same kind of text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    installed = {"site-packages", "dist-packages"}
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    size = 0
    files = (p for p in sorted(root.rglob("*.py")) if installed.isdisjoint(p.parts))
    for number, path in enumerate(files):
        source = path.read_bytes()
        size += len(source)
        if size > TEXT_BYTES:
            break
        parts[number % 20 == 19].append(source)
    train, validation = (np.frombuffer(b"\n".join(part), dtype=np.uint8) for part in parts)
    return train, validation


def batches(text: Bytes, seed: int, count: int, size: int) -> Iterator[tuple[mx.array, mx.array]]:
    """Yield `count` batches of inputs and next bytes, each (size, CONTEXT); order set by `seed`."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        starts = rng.integers(0, len(text) - CONTEXT, size)
        windows = text[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int32)
        yield mx.array(windows[:, :-1]), mx.array(windows[:, 1:])
