"""The versions, the machine and the devices that a report belongs to."""

import os
import platform
import sys
from importlib import metadata

import mlx.core as mx

from .. import __version__, _ext

DEVICES: dict[str, mx.Device] = {"cpu": mx.Device(mx.cpu), "gpu": mx.Device(mx.gpu)}
# What changes how flatstep or MLX run.
PREFIXES = ("FLATSTEP_", "MLX_")


def describe() -> dict[str, str]:
    """What is here, by what it is called in the report."""
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(PREFIXES)]
    return {
        "flatstep": __version__,
        "mlx": metadata.version("mlx"),
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": _system(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "default device": _name_of(mx.default_device()),
        "devices": "; ".join(_device(name) for name in ("cpu", "gpu") if has_device(name)),
        "CPU backend": f"{_ext.cpu_loops()} loops, threads: {_ext.num_threads()}",
        "GPU backend": _ext.gpu_backend() or "none in this build",
        "settings": " ".join(settings) or "none in the environment",
    }


def has_device(name: str) -> bool:
    return name == "cpu" or mx.is_available(DEVICES[name])


def why_not(name: str) -> str | None:
    """Why a step can't run on a device, or None when it can."""
    if name == "gpu" and _ext.gpu_backend() is None:
        return "this build of flatstep has no GPU backend"
    if not has_device(name):
        return f"MLX finds no {name.upper()} on this machine"
    return None


def default_device() -> str:
    return _name_of(mx.default_device())


def _name_of(device: mx.Device) -> str:
    return next(name for name, known in DEVICES.items() if device.type == known.type)


def _device(name: str) -> str:
    info = mx.device_info(DEVICES[name])
    parts = [str(info[key]) for key in ("device_name", "architecture") if key in info]
    memory = info.get("memory_size", info.get("total_memory"))
    if isinstance(memory, int):
        parts.append(f"{memory / 2**30:.1f} GiB")
    return f"{name} ({', '.join(parts)})"


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]} (Darwin {platform.release()})"
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        distribution = "Linux"
    return f"{distribution} ({platform.system()} {platform.release()})"
