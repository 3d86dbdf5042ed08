"""Show the versions, the devices, and which kernel averages on each of them, and why.

The first kernel of the list that can serve a device does. The variable POLYAK_KERNEL names the one to begin with.
"""

import os
import platform
from argparse import ArgumentParser, Namespace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import polyak
from polyak.cli.command import Answer
from polyak.cli.output import fields, size, terminal_width, written
from polyak.errors import KernelError
from polyak.printable import printable

NAME = "env"

JSON = {
    "versions": "of polyak, python, torch and safetensors",
    "optional": "the versions of optional packages by name; null for one that is not installed",
    "system": "the operating system and the processor",
    "devices": "a list with type, name and size_bytes of each device; the size is null for the CPU",
    "kernels": "by device type and kernel: null if the kernel serves it, otherwise the reason why not",
    "polyak_kernel": "the variable POLYAK_KERNEL; null if it is not set",
    "threads": "of torch, and how many processors this process may use",
}

_OPTIONAL = (
    "accelerate",
    "lightning",
    "matplotlib",
    "mlflow",
    "mosaicml",
    "plotly",
    "pytorch-ignite",
    "rich",
    "scikit-learn",
    "tensorboard",
    "torchmetrics",
    "transformers",
    "triton",
    "wandb",
)

_EPILOG = """\
examples:
  polyak env
  polyak env --json | jq .kernels
"""


def configure(parser: ArgumentParser) -> None:
    """Add the examples.

    Args:
        parser: The parser of this command.
    """
    parser.epilog = _EPILOG


def run(arguments: Namespace) -> Answer:
    """Return what polyak finds on this machine.

    Args:
        arguments: Not used.
    """
    del arguments
    import torch

    plain: dict[str, Any] = {
        "versions": {
            "polyak": polyak.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "safetensors": _version("safetensors"),
        },
        "optional": {name: _version(name) for name in _OPTIONAL},
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "devices": [{"type": "cpu", "name": platform.processor() or platform.machine(), "size_bytes": None}],
        "kernels": {},
        "polyak_kernel": os.environ.get("POLYAK_KERNEL") or None,
        "threads": {"torch": torch.get_num_threads(), "processors": _processors()},
    }
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        plain["devices"].append({"type": "cuda", "name": device.name, "size_bytes": device.total_memory})
    if torch.backends.mps.is_available():
        plain["devices"].append({"type": "mps", "name": "Metal", "size_bytes": None})
    plain["kernels"] = {kind: _kernels(kind) for kind in dict.fromkeys(one["type"] for one in plain["devices"])}
    return Answer(_text(plain), plain)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processors() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _kernels(device_type: str) -> dict[str, str | None]:
    """Return for each kernel why it does not serve a device; None if it does."""
    try:
        from polyak.kernels import reasons
    except KernelError as error:  # POLYAK_KERNEL names none that can serve
        return {"none": str(error)}
    return reasons(device_type)


def _text(plain: dict[str, Any]) -> str:
    width = terminal_width()
    versions = [(name, value or "not installed") for name, value in plain["versions"].items()]
    rows = [*versions, ("system", plain["system"])]
    for one in plain["devices"]:
        memory = "" if one["size_bytes"] is None else f", {size(one['size_bytes'])}"
        rows.append(("device", f"{one['type']}: {one['name']}{memory}"))
    threads = plain["threads"]
    rows.append(("threads", f"{threads['torch']} of torch, on {threads['processors']} processors"))
    if plain["polyak_kernel"]:
        rows.append(("POLYAK_KERNEL", plain["polyak_kernel"]))
    for kind, reasons in plain["kernels"].items():
        rows.append((f"kernels on {kind}", _serving(reasons)))
    installed = [f"{name} {value}" for name, value in plain["optional"].items() if value]
    missing = [name for name, value in plain["optional"].items() if not value]
    rows += [("optional", ", ".join(installed) or "none"), ("not installed", ", ".join(missing) or "none")]
    note = written("The first kernel serves all tensors that it can; the next one serves the rest.")
    return f"{fields([(name, printable(value)) for name, value in rows], width)}\n\n{note}"


def _serving(reasons: dict[str, str | None]) -> str:
    serving = [name for name, reason in reasons.items() if reason is None]
    others = [f"{name} does not serve: {reason}" for name, reason in reasons.items() if reason is not None]
    return "; ".join([", then ".join(serving) or "none", *others])
