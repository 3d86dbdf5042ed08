"""The settings of averages: dtype, device and which tensors have one, and the checks of ``EMA``'s arguments."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polyak.averaging.habits import kind_of
from polyak.averaging.offload import Offload
from polyak.errors import ArgumentError, ProfileError, TimeError
from polyak.profiles import Smoothing
from polyak.sharding import is_spread
from polyak.tensors.slots import PolicyRule, default_policy

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_DTYPES = (None, torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Settings:
    """How averages are kept.

    Args:
        dtype: The dtype of the averages; None for the model's own, and float32 where that has 16 bits.
        policy: Decides which tensors are averaged, copied or left.
        device: The device of the averages; None for the model's.
        mesh: Ranks over which the averages are divided, of a model that each of them has in full.
        offload: How averages are moved in the background, on the CPU; None for averages that are not offloaded.
        views: Whether a tensor in another one's memory has its own average.
    """

    dtype: torch.dtype | None = None
    policy: PolicyRule = default_policy
    device: torch.device | None = None
    mesh: "DeviceMesh | None" = None
    offload: Offload | None = None
    views: bool = False


def settings_for(model: nn.Module, *, device: torch.device | str | None, **given: Any) -> Settings:
    """Return the settings of a model's averages.

    Args:
        model: The model, unwrapped.
        device: The device that was asked for.
        **given: The other fields of ``Settings``.

    Raises:
        ValueError: If they exclude each other, or do not fit the model.
    """
    settings = Settings(device=None if device is None else torch.device(device), **given)
    dtype, offload, mesh = settings.dtype, settings.offload, settings.mesh
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be None, float64, float32, bfloat16 or float16 (got {dtype!r})")
    if offload is not None and device is not None:
        raise ValueError(f"device must be None for an offloaded average, which is on the CPU (got {device!r})")
    if mesh is not None and (mesh.ndim > 1 or any(is_spread(tensor) for tensor in model.parameters())):
        raise ValueError(
            "mesh must have one dimension, and each of its ranks must have the full model (got "
            f"{mesh}); the average of a sharded model is sharded as the model is, without mesh"
        )
    if offload is None:
        return settings
    return Settings(dtype, settings.policy, torch.device("cpu"), mesh, offload, settings.views)


def check_options(**given: Any) -> None:
    """Check the arguments of ``EMA`` that are not times.

    Args:
        **given: By name: ``dtype``, ``policy``, ``mesh`` and ``offload``.

    Raises:
        ArgumentError: If one has another type; it names the argument.
    """
    must = {
        "dtype": (
            _DTYPE if isinstance(given["dtype"], torch.dtype) else "a torch.dtype or None",
            _is_wide(given["dtype"]),
        ),
        "policy": ("a function of a Slot that returns a Policy", callable(given["policy"])),
        "mesh": ("a DeviceMesh or None", given["mesh"] is None or hasattr(given["mesh"], "get_group")),
        "offload": ("an Offload, as Offload(), or None", isinstance(given["offload"], Offload | None)),
    }
    for name, (what, holds) in must.items():
        if not holds or isinstance(given[name], type):
            raise ArgumentError(f"{name} must be {what} (got {given[name]!r}, a {type(given[name]).__name__})")


_DTYPE = "a floating-point dtype of 16 bits or more, or None"


def _is_wide(dtype: object) -> bool:
    return dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2)


def one_decay(decay: float | None, smoothing: float | None) -> float | None:
    """Return the one that was given of ``decay`` and ``smoothing``, which mean the same.

    Args:
        decay: As given to ``EMA``.
        smoothing: As given to ``EMA``.

    Raises:
        ProfileError: If both are given, or ``decay`` is not in [0, 1].
    """
    if decay is None:
        return smoothing
    if smoothing is not None:
        raise ProfileError(
            "decay and smoothing are two names of one argument: give one (got "
            f"decay={decay!r}, smoothing={smoothing!r})"
        )
    try:
        return Smoothing(decay).value
    except ProfileError as error:
        raise ProfileError(str(error).replace("smoothing", "decay", 1)) from None


def check_half_life(given: Any) -> None:
    """Check that a half-life is not what other libraries take as the first argument: a decay, a model, parameters.

    Args:
        given: As given to ``EMA``.

    Raises:
        TimeError: If it is a decay.
        ArgumentError: If it is a model, or parameters.
    """
    decay = _as_decay(given)
    if decay is not None:
        span = f"; its half-life is {math.log(0.5) / math.log(decay):,.3g} steps" if 0 < decay < 1 else ""
        raise TimeError(f"half_life must be a time (got {given!r}): for a decay write EMA(decay={decay}){span}")
    if isinstance(given, nn.Module) or (isinstance(given, Iterable) and not isinstance(given, str)):
        raise ArgumentError(
            f"half_life must be a time, and an EMA takes no model and no parameters (got {kind_of(given)}): write "
            "ema = polyak.attach(EMA(decay=0.999), model, optimizer)"
        )


def _as_decay(given: object) -> float | None:
    """Return a number, or the text of one, from 0.0 to 1.0 with a point: a decay in place of a half-life."""
    try:
        number = float(given) if isinstance(given, float | str) else None
    except ValueError:
        return None
    return number if number is not None and "." in str(given) and 0 <= number <= 1 else None
