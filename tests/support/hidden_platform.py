"""A pytest plugin that hides what systems other than Linux lack: ``python -m pytest -p hidden_platform``.

``HIDDEN`` in the environment lists what to hide:

- ``fcntl``: no file locks, as on Windows.
- ``fork``: no ``os.fork``, and no callbacks for it, as on Windows.
- ``library``: no compiled kernel, as with the pure wheel.
- ``openmp``: torch has no OpenMP in which the C kernel could run, and none of the C functions that fingerprints use.
"""

import ctypes
import os
import sys

import torch
import torch.distributed  # it and the standard library have used these functions by now, and polyak has not

_HIDDEN = os.environ["HIDDEN"].split()
assert not any(name.partition(".")[0] == "polyak" for name in sys.modules)

if "fcntl" in _HIDDEN:
    sys.modules["fcntl"] = None
if "fork" in _HIDDEN:
    for _name in ("fork", "forkpty", "register_at_fork"):
        delattr(os, _name)

_library = ctypes.CDLL


class _Library(_library):
    def __init__(self, name, *arguments, **options):
        if name == torch._C.__file__ and "openmp" in _HIDDEN:
            raise OSError("no such library")
        if "_cpu" in str(name) and "library" in _HIDDEN:
            raise OSError("no such library")
        super().__init__(name, *arguments, **options)


ctypes.CDLL = _Library
