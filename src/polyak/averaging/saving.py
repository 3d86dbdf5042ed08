"""Takes the state of averaged tensors, and loads it under any wrapper of the model."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from polyak import sharding
from polyak.averaging.derived import forget_derived
from polyak.averaging.movement import Movement
from polyak.averaging.offload import hold_writes
from polyak.averaging.swap import swap_of
from polyak.averaging.swapper import Swapper
from polyak.errors import CheckpointError, LoanError
from polyak.sharding import local
from polyak.tensors.slots import Policy, check_match, places_of


def tensors_state(movement: Movement, swapper: Swapper) -> dict[str, Any]:
    """Return the averages by name and the counters; while the average is in the model, the training weights too.

    Args:
        movement: The averages.
        swapper: Knows where they are.
    """
    averages, policies = swapper.averaged(), movement.listing.policies
    places = places_of(movement.model)
    copied = sorted(places.name(name) for name in averages if policies.get(name) is Policy.COPY)
    state: dict[str, Any] = {
        "averages": averages,
        "num_updates": movement.num_updates,
        "num_quarantined": movement.quarantine.total,
        # As text, since `torch.distributed.checkpoint` flattens lists.
        "copied": "\n".join(copied),
        "waiting": "\n".join(map(places.name, movement.listing.waiting())),
        "dtype": str(movement.settings.dtype),
    }
    if swapper.active:
        state["training"] = places.as_full(swapper.training())
        state["averages"] = places.as_full(averages)
    else:
        own = {name: sharding.beside(average, local(average).detach()) for name, average in averages.items()}
        state["averages"] = places.as_full(own)
        # Those of experts are over the memory of the tensors in `own`.
        swapper.expose(chain(own.values(), state["averages"].values()))
    return state


@torch.no_grad()
def load_tensors(movement: Movement, state: Mapping[str, Any]) -> None:
    """Resume from what ``tensors_state`` returned.

    Args:
        movement: The averages.
        state: As saved. If it has training weights, the model gets them.

    Raises:
        LoanError: If the model holds an average.
        MismatchError: If names or shapes differ from the model's.
        CheckpointError: If values are cut to whole numbers.
    """
    model, listing, settings = movement.model, movement.listing, movement.settings
    refuse_swapped(model)
    sharding.reshard(model)
    if movement.offloader is not None:
        movement.offloader.settle()  # a state also replaces an average whose update failed
    places = places_of(model)
    averages: Mapping[str, Tensor] = places.as_local(state["averages"])
    waiting, copied = (set(places.as_local(_listed(state.get(key)))) for key in ("waiting", "copied"))
    held = listing.expect(averages, waiting)
    online = {name: slot.tensor.detach() for name, slot in held.items()}
    check_match("a saved average must fit the model", online, averages)
    cut = [n for n, t in online.items() if _is_numeric(t) and not _is_numeric(averages[n])]
    if cut:
        raise CheckpointError(
            f"a saved average must have floating-point values where the model has (got {averages[cut[0]].dtype} for "
            f"{cut[0]!r}); save what state_dict() returns as it is"
        )
    training: Mapping[str, Tensor] | None = state.get("training")
    if training:
        training = places.as_local(training)
        check_match("saved training weights must fit the model", online, training)
    hold_writes()
    # Decisions of the saved run are kept: a mask that was infinite may be finite now.
    if state.get("copied") is not None:
        listing.policies |= {name: Policy.COPY if name in copied else Policy.AVERAGE for name in online}
    keeps_dtypes = state.get("dtype") == str(settings.dtype)  # the model may have had another when averaging began
    for name, tensor in online.items():
        average = listing.averages.get(name)
        if average is None or (keeps_dtypes and average.dtype != averages[name].dtype):
            average = listing.add(held[name], averages[name].dtype if keeps_dtypes else None)
        sharding.copy_(average, averages[name])
        if training:
            sharding.copy_(tensor, training[name])
    forget_derived()
    movement.reset(int(state["num_updates"]), int(state["num_quarantined"]))


def refuse_swapped(model: nn.Module) -> None:
    """Refuse to load a state while the model holds an average.

    Args:
        model: Wrapped or not.

    Raises:
        LoanError: If it does.
    """
    if swap := swap_of(model):
        raise LoanError(
            f"a state can be loaded only into training weights, and {swap.owner} has swapped them out; leave the block "
            "of applied() first"
        )


def _listed(names: str | None) -> dict[str, Tensor]:
    return dict.fromkeys(filter(None, (names or "").split("\n")), torch.empty(0))


def _is_numeric(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
