"""Deprecated: import from ``polyak.tensors.slots``."""

import warnings

from polyak.tensors.slots import Policy, PolicyRule, Slot, default_policy

__all__ = ["Policy", "PolicyRule", "Slot", "default_policy"]

warnings.warn("polyak.select has moved: import from polyak.tensors.slots", DeprecationWarning, stacklevel=2)
