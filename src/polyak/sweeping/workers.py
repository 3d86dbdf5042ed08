"""``Workers``: the ranks that share the evaluations of averages. A single process is a worker too."""

import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch

from polyak.errors import ArgumentError, ShardingError
from polyak.sharding import Communicator, OneProcess, Ranks, is_initialized, start_process_group
from polyak.sharding.groups import device_of
from polyak.sweeping.together import communicates

T = TypeVar("T")
Parallel = bool | Literal["together"]

# An evaluation may take hours, and ranks without one wait for it.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class _Sent:
    """The message of a rank: a value, or the error that ended its work."""

    value: Any
    error: BaseException | None = None


@dataclass(slots=True)
class Workers:
    """The ranks that evaluate. All send the same number of messages, even after a failure, so that none waits forever.

    Args:
        ranks: How the ranks communicate.
        together: Whether all ranks evaluate each average together, as a sharded model needs.
    """

    ranks: Communicator = field(default_factory=OneProcess)
    together: bool = False
    _over: bool = field(default=False, init=False)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes files and shows progress."""
        return self.ranks.rank == 0

    @property
    def lanes(self) -> int:
        """How many averages are evaluated at the same time."""
        return 1 if self.together else self.ranks.world_size

    @property
    def lane(self) -> int:
        """Which of them this rank evaluates."""
        return 0 if self.together else self.ranks.rank

    def exchange(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank; raise if a rank has failed.

        Args:
            value: The value of this rank: anything that can be pickled.
        """
        return self._gather(_Sent(value))

    def from_first(self, value: T) -> T:
        """Return the value of rank 0.

        Args:
            value: The value of this rank, which only rank 0 sends.
        """
        return self.exchange(value if self.is_first else None)[0]  # pyrefly: ignore[bad-return]

    def raise_first(self, errors: Sequence[BaseException | None]) -> None:
        """Raise the first of the errors that all ranks know, if there is one.

        Args:
            errors: The same on all ranks.
        """
        if (error := next(filter(None, errors), None)) is not None:
            self._over = True
            raise error

    def agree(self, facts: Mapping[str, object]) -> None:
        """Check that all ranks were called with the same arguments.

        Args:
            facts: The facts, by name.

        Raises:
            ShardingError: On all ranks, if one has another fact.
        """
        found = self.exchange({name: str(fact) for name, fact in facts.items()})
        for rank, other in enumerate(found):
            for name in (name for name in other if other[name] != found[0][name]):
                self._over = True
                raise ShardingError(
                    f"all ranks must evaluate the same averages of one record in the same way (got {name} "
                    f"{found[0][name]} on rank 0 and {other[name]} on rank {rank}); call it with the same arguments "
                    "on all"
                )

    def end(self) -> None:
        """Wait until all ranks are done; raise if one has failed."""
        if not self._over:
            self._gather(_Sent(None))
            self._over = True

    def fail(self, error: BaseException) -> None:
        """Raise an error on all other ranks, in what they send next.

        Args:
            error: The error of this rank.
        """
        if not self._over:
            self._over = True
            with suppress(Exception):  # the others have left
                self.ranks.gather(_Sent(None, portable(error, self.ranks.rank)))

    def _gather(self, sent: _Sent) -> list[Any]:
        try:
            found = self.ranks.gather(sent)
        except RuntimeError as error:  # of gloo
            self._over = True
            raise ShardingError(
                f"all ranks must evaluate until the end, and one has ended ({error}); see its error"
            ) from error
        self.raise_first([one.error for one in found])
        return [one.value for one in found]


def portable(error: BaseException, rank: int) -> BaseException:
    """Return an error as another rank can raise it.

    Args:
        error: Any error.
        rank: The one that raised it.
    """
    try:
        sent = pickle.loads(pickle.dumps(error))
    except Exception:  # errors of other libraries can need more arguments than they keep
        sent = None
    if not isinstance(sent, BaseException) or str(sent) != str(error):
        sent = ShardingError(
            f"all ranks must evaluate without an error, and rank {rank} raised {type(error).__name__}: {error}; see "
            "its traceback"
        )
    sent.add_note(f"{_NOTE} {rank}.")
    return sent


_NOTE = "It was raised on rank"


def is_of_another_rank(error: BaseException) -> bool:
    """Return whether an error was first raised on another rank, which shows it.

    Args:
        error: Any error.
    """
    return any(note.startswith(_NOTE) for note in getattr(error, "__notes__", ()))


@contextmanager
def working(parallel: Parallel, evaluate: Callable[..., Any] | None) -> Iterator[Workers]:
    """Return the ranks that evaluate, for a ``with`` block; an error in the block of one rank ends those of all.

    Args:
        parallel: As for ``sweep``.
        evaluate: As for ``sweep``.

    Raises:
        ArgumentError: If ``parallel`` is something else.
        ShardingError: On the other ranks, if one fails in the block with an error that cannot be sent.
    """
    if parallel not in (True, False, "together"):
        raise ArgumentError(f"parallel must be True, False or 'together' (got {parallel!r}); see polyak.sweep")
    workers = _workers(parallel, evaluate)
    try:
        yield workers
        workers.end()
    except BaseException as error:
        workers.fail(error)
        raise
    finally:
        workers.ranks.close()


def _workers(parallel: Parallel, evaluate: Callable[..., Any] | None) -> Workers:
    if not parallel:
        return Workers()
    if is_launched() and not is_initialized():
        use_own_device()
        start_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    world = torch.distributed.group.WORLD if is_initialized() else None
    if world is None or world.size() == 1:
        return Workers()
    ranks = Ranks(world, device_of(world), replicas=True).separate(_PATIENCE)
    found = parallel == "together" or (evaluate is not None and communicates(evaluate))
    return Workers(ranks, any(ranks.gather(found)))


def is_launched() -> bool:
    """Return whether ``torchrun`` or another launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def use_own_device() -> None:
    """Make the GPU of ``LOCAL_RANK`` the current one, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
