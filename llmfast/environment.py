"""What this machine has and which backends can run: `llmfast.info()` and `python -m llmfast info`."""

import os
import platform
from importlib import import_module, metadata
from pathlib import Path

import torch


def info() -> dict:
    """Versions, devices, instruction sets and, for each backend, None or why it can't run here.

    >>> llmfast.info()["backends"]["cuda"]
    'needs a CUDA device'
    """
    from . import __version__, backends

    version = lambda name: next((d.version for d in metadata.distributions(name=name)), None)
    found = {
        "llmfast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = {
            "name": device.name,
            "capability": f"{device.major}.{device.minor}",
            "memory": device.total_memory,
        }
        found["gpu"]["cuda"] = torch.version.cuda
    found["backends"] = {}
    for name in backends.ORDER:
        module = import_module(f"{backends.__name__}.{name}")
        found["backends"][name] = module.available()
        found |= getattr(module, "details", dict)()
    found["environment"] = {
        k: v for k, v in sorted(os.environ.items()) if k.startswith(("LLMFAST_", "TRITON_", "OMP_"))
    }
    return found


def tiles_path() -> Path:
    """Where `llmfast tune` keeps its table: under LLMFAST_HOME, or llmfast in XDG_CACHE_HOME or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("LLMFAST_HOME") or Path(cache, "llmfast"), "tiles.json")


def _cpu_name():
    try:
        with open("/proc/cpuinfo") as f:
            return next(
                (line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), platform.processor()
            )
    except OSError:
        return platform.processor()
