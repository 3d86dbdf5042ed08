"""The state of averaged tensors: taken, and loaded under any wrapper of the model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polyak import sharding
from polyak.averaging.movement import Movement
from polyak.averaging.offload import hold_writes
from polyak.averaging.swap import swap_of
from polyak.averaging.swapper import Swapper
from polyak.errors import LoanError
from polyak.sharding import local
from polyak.tensors.slots import Policy, check_match


def tensors_state(movement: Movement, swapper: Swapper) -> dict[str, Any]:
    """Return the averages by name and the counters; while the average is in the model, the training weights too.

    Args:
        movement: The averages.
        swapper: Where they are.
    """
    averages, policies = swapper.averaged(), movement.listing.policies
    state: dict[str, Any] = {
        "averages": averages,
        "num_updates": movement.num_updates,
        "num_quarantined": movement.quarantine.total,
        # As text, since `torch.distributed.checkpoint` flattens lists.
        "copied": "\n".join(sorted(name for name in averages if policies.get(name) is Policy.COPY)),
        "waiting": "\n".join(movement.listing.waiting()),
        "dtype": str(movement.settings.dtype),
    }
    if swapper.active:
        state["training"] = swapper.training()
    else:
        state["averages"] = {n: sharding.beside(a, local(a).detach()) for n, a in averages.items()}
        swapper.expose(state["averages"].values())
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
    """
    model, listing, settings = movement.model, movement.listing, movement.settings
    if swap := swap_of(model):
        raise LoanError(f"a state can be loaded only into training weights, and {swap.owner} has swapped them out")
    sharding.reshard(model)
    if movement.offloader is not None:
        movement.offloader.settle()  # a state replaces a broken average as well
    averages: Mapping[str, Tensor] = state["averages"]
    held = listing.expect(averages, set((state.get("waiting") or "").splitlines()))
    online = {name: slot.tensor.detach() for name, slot in held.items()}
    check_match("a saved average must fit the model", online, averages)
    training: Mapping[str, Tensor] | None = state.get("training")
    if training:
        check_match("saved training weights must fit the model", online, training)
    hold_writes()
    # What was decided in the saved run holds: a mask that was infinite may be finite now.
    if state.get("copied") is not None:
        copied = state["copied"].splitlines()
        listing.policies |= {name: Policy.COPY if name in copied else Policy.AVERAGE for name in online}
    keeps_dtypes = state.get("dtype") == str(settings.dtype)  # the model may have had another when averaging began
    for name, tensor in online.items():
        average = listing.averages.get(name)
        if average is None or (keeps_dtypes and average.dtype != averages[name].dtype):
            average = listing.add(held[name], averages[name].dtype if keeps_dtypes else None)
        sharding.copy_(average, averages[name])
        if training:
            sharding.copy_(tensor, training[name])
    movement.reset(int(state["num_updates"]), int(state["num_quarantined"]))
