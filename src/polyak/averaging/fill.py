"""Fills a model with the average or the training weights: by a swap if it is in training, otherwise by a copy."""

from torch import nn

from polyak.averaging.online import OnlineAverage
from polyak.averaging.swap import refuse_second_swap
from polyak.errors import LoanError
from polyak.sharding import OneProcess
from polyak.tensors.slots import unwrap


def fill_with_average(average: OnlineAverage, model: nn.Module) -> None:
    """Swap the average into the model in training, or copy it into another model.

    Args:
        average: The average.
        model: Any model with the names of the one in training, or that one itself.

    Raises:
        LoanError: If averaging has not begun, or the model holds another average.
        MismatchError: If names or shapes differ.
    """
    in_training = unwrap(model) is average.model
    if in_training and not average.active:
        average.agree()  # first, so that all ranks raise if one does
    if average.shadow is None:
        raise LoanError(
            f"averaging must have begun before there is an average (it begins at {average.schedule.start}); train "
            "until then"
        )
    if not in_training:
        average.warn_before_use("copied")
        average.shadow.copy_to(model)
    elif not average.active:
        average.warn_before_use("swapped in")
        average.shadow.swap_in(f"{average.name} (get_ema_model)")


def refuse_swap(average: OnlineAverage, model: nn.Module, owner: str) -> None:
    """Refuse to swap the average into a model that holds one already, on all ranks if it does on one.

    Args:
        average: The average.
        model: The one in training.
        owner: Who asks.

    Raises:
        LoanError: If the model holds an average here.
        ShardingError: If it does on another rank.
    """
    together = average.pipeline() or average.ranks or OneProcess()
    together.on_every_rank(f"a swap by {owner}", lambda: refuse_second_swap(model, owner))


def fill_with_training_weights(average: OnlineAverage, model: nn.Module) -> None:
    """Restore the training weights of the model in training, or copy them into another model.

    Args:
        average: The average.
        model: Any model with the names of the one in training, or that one itself.

    Raises:
        LoanError: If the model in training is not known yet.
        MismatchError: If names or shapes differ.
    """
    if average.model is None:
        raise LoanError("the EMA must know the model in training before it can copy its weights; attach it first")
    if unwrap(model) is average.model:
        if average.shadow is not None:
            average.restore()
    else:
        (average.shadow or average.new_shadow(average.model)).copy_to(model, training=True)
