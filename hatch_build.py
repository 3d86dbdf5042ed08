"""Compile the C kernel when a wheel is built. Without a compiler, polyak uses torch's operations.

With ``POLYAK_PURE`` in the environment the wheel has no kernel and serves every system (``make dist``).
"""

import importlib.util
import os
import sys
from pathlib import Path
from sysconfig import get_platform
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_KERNELS = Path("src/polyak/kernels")


def _load(path: Path) -> ModuleType:
    """Import a file of the package alone: the package needs torch, which a build has not."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class KernelBuildHook(BuildHookInterface):
    """Put the compiled library next to its sources: in the wheel, or in the tree of an editable install."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        del version
        if self.target_name != "wheel" or os.environ.get("POLYAK_PURE"):
            return
        build = _load(Path(self.root) / _KERNELS / "build.py")
        try:
            library: Path = build.build()
        except (build.BuildError, OSError) as error:
            self.app.display_warning(
                f"polyak is built without its C kernel: averages on the CPU are slower, with the same bits ({error})"
            )
            # One of another machine or of older sources would be no better than none.
            build.LIBRARY.unlink(missing_ok=True)
            return
        build_data["artifacts"].append(f"/{library.relative_to(self.root).as_posix()}")
        build_data["pure_python"] = False
        if sys.platform == "linux" or sys.platform == "darwin":  # it knows no Python, so it serves each version
            build_data["tag"] = f"py3-none-{get_platform().replace('-', '_').replace('.', '_')}"
