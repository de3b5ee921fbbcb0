"""``python -m flatstep memory``: how many bytes does training take, and where does a model fit?"""

import argparse
import json
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext
from ._command_line import print_row, print_table, print_wrapped
from .model_sizes import MAX_PARAMETERS, Model, read_model
from .slots import BLOCK, SMALLEST_CODED

MACS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 512)  # GiB, sold as GB
# Metal's recommendedMaxWorkingSetSize; reported are 67 % (of 16 GB) to 84 % (of 128 GB).
USABLE = 0.75


class Mode(NamedTuple):
    """How weights and state are stored; a state without dtype is in 8-bit codes."""

    name: str
    dtype: mx.Dtype
    num_states: int
    state_dtype: mx.Dtype | None = mx.float32
    rounding: _ext.Rounding = _ext.Rounding.NEAREST
    other_bytes: int = 0  # of a parameter's average, and the sum of its gradients

    def block_bytes(self, size: int = SMALLEST_CODED) -> int:
        """Of 64 parameters in a tensor of this size, and their state."""
        is_coded = self.state_dtype is None and size >= SMALLEST_CODED
        state = _ext.block_bytes() if is_coded else BLOCK * (self.state_dtype or mx.float32).size
        rest = _ext.rest_bytes(self.rounding, self.dtype)
        return BLOCK * (self.dtype.size + self.other_bytes) + rest + self.num_states * state


def modes(dtype: mx.Dtype) -> list[Mode]:
    """What a model in this dtype can be trained with."""
    if dtype == mx.float32:
        both = Mode("AdamW or mlx.optimizers.AdamW", dtype, 2)
        return [both, Mode("AdamW8bit", dtype, 2, None), Mode("Lion8bit", dtype, 1, None)]
    keep_8, keep_16 = _ext.Rounding.KEEP_8_BITS, _ext.Rounding.KEEP_16_BITS
    return [
        Mode("AdamW, float32 parameters", mx.float32, 2),
        Mode("mlx.optimizers.AdamW", dtype, 2, dtype),
        Mode("AdamW", dtype, 2),
        Mode("AdamW(master_weight_bits=24)", dtype, 2, rounding=keep_8),
        Mode("AdamW8bit", dtype, 2, None),
        Mode("AdamW8bit(stochastic_rounding=True)", dtype, 2, None, _ext.Rounding.STOCHASTIC),
        Mode("AdamW8bit(master_weight_bits=24)", dtype, 2, None, keep_8),
        Mode("AdamW8bit(master_weight_bits=32)", dtype, 2, None, keep_16),
        Mode("Lion8bit(master_weight_bits=24)", dtype, 1, None, keep_8),
    ]


def add_command(commands: Any) -> None:
    """Adds ``memory`` to an argparse parser's subcommands."""
    text = "estimate how much memory training takes, by optimizer"
    parser = commands.add_parser("memory", help=text, description=text)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--parameters", metavar="N", type=_count, help="how many: 7e9, 7B, 350M")
    model.add_argument(
        "--model", metavar="PATH", type=Path, help="a folder, safetensors file, index or config"
    )
    parser.add_argument("--trainable", metavar="N", type=_count, help="with LoRA, say (all)")
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16", help="default: bfloat16")
    for option, what in ("--ema", "an average of the weights"), ("--accumulate", "gradients' sums"):
        parser.add_argument(
            option,
            choices=("float32", "bfloat16"),
            nargs="?",
            const="float32",
            help=f"{what} too, in float32 unless it is said",
        )
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")
    parser.set_defaults(run=lambda options: run(options, parser))


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Runs the command; returns the exit status."""
    dtype: mx.Dtype = getattr(mx, options.dtype)
    model = Model(Counter([options.parameters or 0]), "--parameters", has_tensors=False)
    try:
        model = read_model(options.model, dtype.size) if options.model else model
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        parser.error(f"--model {options.model}: {reason}; --parameters takes a number instead")
    trainable = options.trainable or model.parameters
    if trainable > model.parameters:
        parser.error(f"--trainable {trainable:,}: the model has {model.parameters:,} parameters")
    about = {"parameters": model.parameters, "trainable": trainable, "dtype": options.dtype}
    others = {name: getattr(options, name) for name in ("ema", "accumulate")}
    about |= {name: other for name, other in others.items() if other}
    other_bytes = sum(getattr(mx, other).size for other in others.values() if other)
    rows = [
        _estimate(mode._replace(other_bytes=other_bytes), model, trainable) for mode in modes(dtype)
    ]
    if options.json:
        print(json.dumps({**about, "counted_from": model.source, "modes": rows}, indent=1))
    else:
        print("flatstep memory")
        print_row("parameters", f"{model.parameters:,} in {options.dtype}; {trainable:,} trained")
        print_row("counted from", model.source)
        for name, other in others.items():
            if other:
                print_row(name, f"in {other}, for all that is trained")
        _print(rows, options.dtype)
    return 0


def _estimate(mode: Mode, model: Model, trainable: int) -> dict[str, Any]:
    if model.has_tensors and trainable == model.parameters:
        sizes = model.sizes.items()
        trained = sum(n * -(-size // BLOCK) * mode.block_bytes(size) for size, n in sizes)
    else:  # then nobody knows which tensors are small
        trained = -(-trainable // BLOCK) * mode.block_bytes()
    held = trained + (model.parameters - trainable) * mode.dtype.size
    report = {"mode": mode.name, "bytes_per_parameter": mode.block_bytes() / BLOCK}
    for name, size in ("held", held), ("with_gradients", held + trainable * mode.dtype.size):
        fits = [mac for mac in MACS if size <= USABLE * mac * 2**30]
        report |= {name: size, f"{name}_fits_gb": fits}
    return report


def _print(rows: list[dict[str, Any]], dtype: str) -> None:
    lines = []
    for row in rows:
        cells = [row["mode"], f"{row['bytes_per_parameter']:g}"]
        for name in ("held", "with_gradients"):
            size = row[name] / 1e9
            cells.append(f"{size:.{3 if size < 10 else 1 if size < 1000 else 0}f}")
            cells.append(str(next(iter(row[f"{name}_fits_gb"]), f">{MACS[-1]}")))
        lines.append(cells)
    title = "Bytes of each trained parameter; GB of all, and the smallest Mac they fit in"
    print_table(title, ("", "bytes", "held", "fits", "peak", "fits"), lines)
    print()
    print_wrapped(
        "Held: weights and state. Peak: with all gradients; it is lower where a step is evaluated "
        "with them and frees them. Activations come on top. SGD8bit takes what Lion8bit does. "
        f"{'In mlx.optimizers, bfloat16 v never decays. ' if dtype == 'bfloat16' else ''}"
        f"Metal is taken to give {USABLE:.0%} of memory; on a Mac, "
        'mx.device_info()["max_recommended_working_set_size"] says what it does.'
    )


def _count(text: str) -> int:
    """A number of parameters: 7e9, 7B, 350M or 124439808."""
    match = re.fullmatch(r"(\d{1,16}(?:\.\d{1,9})?(?:e\+?\d{1,2})?)([kmbt]?)", text.lower(), re.A)
    number = Decimal(match[1]) * 1000 ** " kmbt".index(match[2] or " ") if match else Decimal(0)
    if not 1 <= number <= MAX_PARAMETERS or number % 1:
        allowed = "a whole number from 1 to 10^15, such as 7e9, 7B or 350M"
        raise argparse.ArgumentTypeError(f"{text!r} should be {allowed}")
    return int(number)
