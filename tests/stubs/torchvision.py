"""Stands in for torchvision, which Composer and timm import and of which no build fits the torch that is tested.

Any module and any name of it can be imported; a name stands for an empty class.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

__path__ = []


class _AnyName(type):
    def __getattr__(cls, name):
        return __getattr__(name)


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _AnyName(name, (), {})


class _Anything(MetaPathFinder, Loader):
    def find_spec(self, fullname, path=None, target=None):
        return ModuleSpec(fullname, self, is_package=True) if fullname.startswith("torchvision.") else None

    def exec_module(self, module):
        module.__getattr__ = __getattr__


sys.meta_path.append(_Anything())
