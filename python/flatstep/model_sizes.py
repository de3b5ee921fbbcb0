"""How many parameters a model has, from its files; no tensor is loaded.

A safetensors file begins with the length of its header in 8 bytes, and the header is JSON. Where
there are no tensors, config.json says which ones mlx-lm would make.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

FILES = ("model.safetensors.index.json", "model*.safetensors", "config.json")  # first come
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_PARAMETERS = 10**15


class Model(NamedTuple):
    """How many tensors have each size; without tensors, one that stands for all."""

    sizes: Counter[int]
    source: str
    has_tensors: bool = True

    @property
    def parameters(self) -> int:
        return sum(size * count for size, count in self.sizes.items())


def read_model(path: Path, itemsize: int) -> Model:
    """Counts a model's parameters, of `itemsize` bytes if only their sum in bytes is known.

    Raises:
        OSError: a file can't be read.
        ValueError: it is no model of a known kind.
    """
    path.stat()  # says so if it is not there
    if path.is_dir():
        found = next((files for name in FILES if (files := sorted(path.glob(name)))), [])
    else:
        found = [path] if path.suffix in (".json", ".safetensors") else []
    if not found or not all(map(Path.is_file, found)):
        raise ValueError(f"should be a file of the kind {', '.join(FILES)}, or a folder with one")
    if found[0].suffix == ".safetensors":
        model = _from_tensors(found)
    else:
        content = _json(found[0].read_bytes(), found[0])
        is_index = "weight_map" in content
        model = _from_index(content, found[0], itemsize) if is_index else _from_config(content)
    if not 0 < model.parameters <= MAX_PARAMETERS:
        raise ValueError(f"has {'more than 10^15' if model.parameters else 'no'} parameters")
    return model


def _from_tensors(files: list[Path]) -> Model:
    sizes = Counter(size for file in files for size in _sizes(file))
    return Model(sizes, f"{sizes.total():,} tensors")


def _from_index(index: dict[str, Any], path: Path, itemsize: int) -> Model:
    names, metadata = index["weight_map"], index.get("metadata", {})
    if not isinstance(names, dict) or not isinstance(metadata, dict):
        raise ValueError(f"{path.name}: weight_map and metadata should be JSON objects")
    files = sorted({path.parent / str(name) for name in names.values()})
    missing = sum(not file.is_file() for file in files)
    if files and not missing:
        return _from_tensors(files)
    source = f"total_size, as if all were of --dtype; {missing} of {len(files)} files are missing"
    return Model(Counter([_whole(metadata, "total_size", 0, 2**53) // itemsize]), source, False)


def _sizes(path: Path) -> list[int]:
    """Of the tensors in a safetensors file."""
    with path.open("rb") as file:
        length, rest = int.from_bytes(file.read(8), "little"), path.stat().st_size - 8
        if not 2 <= length <= min(rest, MAX_HEADER):
            found = (
                f"its first 8 bytes announce a header of {length:,}, and {max(0, rest):,} follow"
            )
            raise ValueError(f"{path.name} is no safetensors file, or not all of one: {found}")
        header = _json(file.read(length), path)
    sizes = []
    for name, entry in header.items():
        match entry:
            # Old checkpoints hold such tensors, too; mlx-lm leaves them out.
            case {"shape": [_, _, _, _]} if name.endswith(".attn.bias"):
                continue
            case _ if name.endswith((".rotary_emb.inv_freq", "__metadata__")):
                continue
            case {"dtype": "F32" | "F16" | "BF16", "shape": [*n]} if all(map(_is_size, n)):
                sizes.append(math.prod(n))
            case _:
                allowed = "F32, F16 or BF16 of some shape (quantized weights are not trained)"
                raise ValueError(f"{path.name}: {name} should be {allowed}, not {entry!s:.60}")
    return sizes


def _from_config(config: dict[str, Any]) -> Model:
    kind = config.get("model_type")
    if kind not in FAMILIES or config.get("quantization") or config.get("quantization_config"):
        allowed = f"one of {', '.join(FAMILIES)}, and not quantized"
        raise ValueError(f"model_type should be {allowed}; it is {kind!r}")
    if kind == "gpt2":
        d, layers = _whole(config, "n_embd"), _whole(config, "n_layer")
        layer = [3 * d * d, 3 * d, d * d, d, 4 * d * d, 4 * d, 4 * d * d, d, *[d] * 4]
        outer = [_whole(config, "vocab_size") * d, _whole(config, "n_positions") * d, d, d]
    else:
        d, layers = _whole(config, "hidden_size"), _whole(config, "num_hidden_layers")
        hidden, table = _whole(config, "intermediate_size"), _whole(config, "vocab_size") * d
        heads = _whole(config, "num_attention_heads")
        head = _whole(config, "head_dim", d // heads)
        q, kv = heads * head, _whole(config, "num_key_value_heads", heads) * head
        layer = [q * d, kv * d, kv * d, d * q, hidden * d, hidden * d, d * hidden, d, d]
        layer += [q, kv, kv] if kind == "qwen2" else [head, head] if kind == "qwen3" else []
        has_biases = kind in ("llama", "mistral")
        layer += [q, kv, kv, d] if has_biases and config.get("attention_bias") else []
        layer += [hidden, hidden, d] if has_biases and config.get("mlp_bias") else []
        outer = [table, d] if config.get("tie_word_embeddings", True) else [table, table, d]
    sizes = Counter(outer) + Counter({size: n * layers for size, n in Counter(layer).items()})
    return Model(sizes, f"{sizes.total():,} tensors of a {kind} config")


def _whole(values: dict[str, Any], key: str, default: int = 0, most: int = 2**31 - 1) -> int:
    value = values.get(key) or default
    if isinstance(value, float) and value.is_integer():  # some tools write total_size so
        value = int(value)
    if type(value) is not int or not 0 < value <= most:
        found = f"{values[key]!r:.40}" if key in values else "missing"
        raise ValueError(f"{key} should be a whole number from 1 to {most:,}; it is {found}")
    return value


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _json(text: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            return value
        raise ValueError(f"it begins with {text[:20]!r}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} should hold a JSON object: {error}") from None
