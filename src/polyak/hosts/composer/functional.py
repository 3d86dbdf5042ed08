"""``compute_ema`` and ``EMAParameters``, for loops that average with Composer's functions."""

from typing import Any

from torch import Tensor, nn

import polyak.averaging.functional
from polyak.averaging.weights import Shadow
from polyak.errors import MismatchError
from polyak.profiles import Smoothing
from polyak.tensors.slots import slots


class EMAParameters:
    """The average of a model's weights, for loops that call ``compute_ema`` themselves.

    ``swap_params`` swaps the average into the model, and its next call restores the training weights.

    Args:
        model: The model in training. The average begins with its weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.shadow = Shadow(model)

    def _kept(self, *, parameters: bool) -> dict[str, Tensor]:
        averages = self.shadow.averaged_tensors()
        kind = {slot.name for slot in slots(self._model) if slot.is_parameter is parameters}
        return {name: tensor for name, tensor in averages.items() if name in kind}

    @property
    def named_parameters_dict(self) -> dict[str, Tensor]:
        """The averages of parameters by name."""
        return self._kept(parameters=True)

    @property
    def named_buffers_dict(self) -> dict[str, Tensor]:
        """The averages and copies of buffers by name."""
        return self._kept(parameters=False)

    def named_parameters(self) -> Any:
        """Return the averages of parameters, with their names."""
        return self.named_parameters_dict.items()

    def named_buffers(self) -> Any:
        """Return the averages and copies of buffers with their names."""
        return self.named_buffers_dict.items()

    def update_(self, model: nn.Module, smoothing: float) -> None:
        """Move the average towards the model.

        Args:
            model: The model in training.
            smoothing: Share of the average that is kept, from 0 to 1.

        Raises:
            ProfileError: If ``smoothing`` is not in [0, 1].
            MismatchError: If it is another model.
            LoanError: If it holds an average.
        """
        self._check(model)
        self.shadow.update_(1 - Smoothing(smoothing).value)

    def swap_params(self, model: nn.Module) -> None:
        """Swap the average into the model, or restore the training weights.

        Args:
            model: The model in training.

        Raises:
            MismatchError: If it is another model.
            LoanError: If it holds another average.
        """
        self._check(model)
        if self.shadow.owner:
            self.shadow.restore()
        else:
            self.shadow.swap_in("EMAParameters.swap_params")

    def transfer_ema_params(self, model: nn.Module) -> None:
        """Copy the average into another model with the same names.

        Args:
            model: The model to be overwritten.

        Raises:
            MismatchError: If names or shapes differ.
        """
        self.shadow.copy_to(model)

    def move_params_to_device(self, destination_model: nn.Module) -> None:
        """Do nothing: the average follows its model.

        Args:
            destination_model: Not used.
        """

    def _check(self, model: nn.Module) -> None:
        if model is not self._model:
            raise MismatchError(
                "EMAParameters averages the model that it was made of (got another one); make a new EMAParameters"
            )


def compute_ema(model: nn.Module, ema_model: nn.Module | EMAParameters, smoothing: float = 0.99) -> None:
    """Move ``ema_model`` towards ``model`` in place, as ``polyak.compute_ema``.

    Args:
        model: The model in training.
        ema_model: Its average, a module or ``EMAParameters``.
        smoothing: Share of the average that is kept, from 0 to 1.

    Raises:
        ProfileError: If ``smoothing`` is not in [0, 1].
        MismatchError: If the two have other names or shapes.
    """
    if isinstance(ema_model, EMAParameters):
        ema_model.update_(model, smoothing)
    else:
        polyak.averaging.functional.compute_ema(model, ema_model, smoothing)
