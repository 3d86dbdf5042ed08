"""``compute_ema``: one update of an average that is itself a module."""

import itertools

import torch
from torch import Tensor, nn

from polyak.averaging.derived import forget_derived
from polyak.averaging.swap import refuse_averaged_weights
from polyak.errors import ArgumentError
from polyak.kernels import Place, lerp_
from polyak.profiles import Smoothing
from polyak.tensors.memory import has_memory, write_
from polyak.tensors.slots import check_match, check_ties, is_statistic, named_tensors, slots

_calls = itertools.count()


@torch.no_grad()
def compute_ema(model: nn.Module, ema_model: nn.Module, smoothing: float = 0.99) -> None:
    """Move ``ema_model`` towards ``model`` in place: ``ema = smoothing * ema + (1 - smoothing) * weights``.

    Parameters and running statistics (buffers named ``running_...``) are averaged, other buffers are copied, sparse
    tensors are left as they are. Memory that several tensors share is averaged once. Tensors are matched by name,
    without the prefixes of ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``. NaN and inf in
    ``model`` leave their elements of the average as they were. An ``ema_model`` with 16-bit weights is rounded
    stochastically; float32 is better.

    Args:
        model: The model in training.
        ema_model: Its average, which is changed.
        smoothing: The share of the average that is kept, from 0 to 1.

    Raises:
        ArgumentError: If one of the two is not a module, ``ema_model`` shares trained tensors with ``model``, or it has
            one tensor where ``model`` has two.
        LoanError: If ``model`` holds an average.
        ProfileError: If ``smoothing`` is not in [0, 1].
        MismatchError: If names or shapes differ. The message lists them.

    Example:
        >>> model, ema_model = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> _ = nn.init.zeros_(model.weight), nn.init.ones_(ema_model.weight)
        >>> compute_ema(model, ema_model, smoothing=0.75)
        >>> ema_model.weight.item()
        0.75

    References:
        ``composer.algorithms.ema.compute_ema``.
    """
    for name, given in (("model", model), ("ema_model", ema_model)):
        if not isinstance(given, nn.Module):
            raise ArgumentError(f"{name} must be a torch.nn.Module (got {given!r}, a {type(given).__name__})")
    weight = 1 - Smoothing(smoothing).value
    online, averages = named_tensors(model), named_tensors(ema_model)
    check_match("ema_model must have the names and shapes of model", online, averages)
    refuse_averaged_weights(model)
    shared = [
        n for n, t in online.items() if t.requires_grad and has_memory(t) and _address(t) == _address(averages[n])
    ]
    if shared:
        raise ArgumentError(
            f"ema_model must have its own memory (got {shared[0]!r} in that of model); make it by copy.deepcopy(model)"
        )
    check_ties("tied tensors of ema_model", ema_model, online)
    averaged = list[tuple[Tensor, Tensor]]()
    for slot in slots(ema_model):
        average, tensor = slot.tensor.detach(), online[slot.name].detach()
        if average.layout != torch.strided:
            continue
        if (slot.is_parameter or is_statistic(slot)) and (average.is_floating_point() or average.is_complex()):
            averaged.append((average, tensor.to(average.device)))
        else:
            write_(average, tensor)
    moved, tensors = [average for average, _ in averaged], [tensor for _, tensor in averaged]
    lerp_(moved, tensors, weight, [Place(i) for i in range(len(averaged))], num_updates=next(_calls))
    forget_derived()


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if has_memory(tensor) else 0
