"""Means of the newest checkpoints, each over more of them. Each checkpoint is read once for all of these means."""

import torch
from torch import Tensor

from polyak.checkpoints.averaging import add_, average, piece_of, require_numbers, require_range, wide
from polyak.checkpoints.opening import Checkpoint
from polyak.checkpoints.plan import Plan, is_averaged
from polyak.checkpoints.stored import StoredTensor
from polyak.checkpoints.weights import is_extra_state


def _nothing(dtype: torch.dtype) -> complex | float:
    """Return what changes no number that is added to it: 0.0 would change -0.0."""
    return complex(-0.0, -0.0) if dtype.is_complex else -0.0


def _read(stored: StoredTensor, first: int, last: int) -> Tensor:
    """Return elements of a tensor, whose grain may be another."""
    begin = first // stored.grain * stored.grain
    end = min(-(-last // stored.grain) * stored.grain, stored.numel)
    return stored.read(begin, end)[first - begin : last - begin]


class RunningMean:
    """The mean of checkpoints that are added one after the other, the newest first.

    It has the bits of `average`. Its memory is one set of weights in float64.

    Args:
        plan: The plan of the checkpoints: its newest has the dtypes and the integers of the mean.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self._count = plan, 0
        kinds = {name: one.dtype for name, one in plan.tensors.items() if not is_extra_state(name)}
        self._sums = {
            name: torch.full((plan.tensors[name].numel,), _nothing(dtype), dtype=wide(dtype))
            for name, dtype in kinds.items()
            if is_averaged(dtype)
        }

    @torch.no_grad()
    def add(self, checkpoint: Checkpoint) -> None:
        """Add a checkpoint.

        Args:
            checkpoint: Has the tensors of the plan.

        Raises:
            CheckpointError: If it is damaged, has changed, or holds NaN.
        """
        for name, total in self._sums.items():
            stored = checkpoint.tensors[name]
            step = piece_of(stored)
            for first in range(0, stored.numel, step):
                last = min(first + step, stored.numel)
                piece = stored.read(first, last)
                add_(total[first:last], piece)
                if not bool(total[first:last].sum().isfinite()):
                    newest = self._plan.newest
                    require_numbers(name, checkpoint, piece, (newest, _read(newest.tensors[name], first, last)))
            checkpoint.files.release()
        checkpoint.files.require_unchanged()
        self._count += 1

    @torch.no_grad()
    def mean(self) -> dict[str, Tensor]:
        """Return the mean of the checkpoints so far, in the dtypes of the newest, with its integers.

        Raises:
            CheckpointError: If a file is damaged, or the mean does not fit a dtype.
        """
        newest, found = Plan([self._plan.newest], [1.0], self._plan.names), dict[str, Tensor]()
        for name, like in self._plan.tensors.items():
            if name not in self._sums:
                found[name] = average(newest, name)
                continue
            mean = self._sums[name] / self._count
            found[name] = mean.to(like.dtype).reshape(like.shape)
            require_range(self._plan, name, found[name].reshape(-1), mean)
        return found
