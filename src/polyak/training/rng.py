"""The states of all random number generators that a training loop may draw from."""

import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader


def seed_all(seed: int) -> None:
    """Seed Python's, torch's and, if it is in use, numpy's global generators.

    Args:
        seed: At least 0 and below 2 ** 32.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)


def use_deterministic_algorithms() -> None:
    """Make torch use only deterministic algorithms in this process; they are slower, and some raise errors."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def generators_of(loader: object) -> list[torch.Generator]:
    """Return the generators that a data loader and its samplers own.

    Args:
        loader: A ``DataLoader``, or any iterable, which is taken to own none.
    """
    if not isinstance(loader, DataLoader):
        return []
    samplers = [loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
    owned = [getattr(owner, "generator", None) for owner in (loader, *samplers)]
    return list({id(g): g for g in owned if isinstance(g, torch.Generator)}.values())


def get_state(generators: Sequence[torch.Generator] = (), *, gpu: bool = True, plain: bool = True) -> dict[str, Any]:
    """Return the states of the global generators, and of ``generators``, as tensors and plain containers.

    Args:
        generators: Others to include.
        gpu: Whether to include those of GPUs.
        plain: Whether the state will be saved; otherwise numpy's may stay an array, which is faster.
    """
    state: dict[str, Any] = {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "generators": [generator.get_state() for generator in generators],
    }
    if gpu and torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if numpy := sys.modules.get("numpy"):
        kind, keys, *rest = numpy.random.get_state()
        state["numpy"] = (kind, keys.tolist() if plain else keys, *rest)
    return state


def set_state(state: Mapping[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Set the states that ``get_state`` returned.

    Args:
        state: As returned.
        generators: The same others.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    for generator, own in zip(generators, state["generators"], strict=True):
        generator.set_state(own)
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state and (numpy := sys.modules.get("numpy")):
        numpy.random.set_state(tuple(state["numpy"]))


@contextmanager
def preserved(generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Restore the states after the block, so that numbers drawn in it do not change later ones.

    Args:
        generators: Generators to restore in addition to the global ones.
    """
    state = get_state(generators)
    try:
        yield
    finally:
        try:
            set_state(state, generators)
        except BaseException:  # such as an interrupt halfway
            set_state(state, generators)
            raise


class Stream:
    """The random numbers of a data loader, from the global generators or separate ones.

    Ranks that divide the same batches have separate streams with the same start: they must draw the same order and the
    same transforms, while the model must draw different numbers on each rank.

    Args:
        loader: The loader, whose generators belong to the stream.
    """

    def __init__(self, loader: object) -> None:
        self.generators = generators_of(loader)
        self._separate: dict[str, Any] | None = None

    @property
    def is_separate(self) -> bool:
        """Whether it is separate from the global generators."""
        return self._separate is not None

    def separate(self, state: dict[str, Any]) -> None:
        """Separate it from the global generators from now on.

        Args:
            state: The first state of the stream, as ``get_state`` returned it.
        """
        self._separate = state
        self.set_state(state)

    def get_state(self) -> dict[str, Any]:
        """Return its state, as tensors and plain containers."""
        if self._separate is None:
            return get_state(self.generators)
        return {**self._separate, "generators": [generator.get_state() for generator in self.generators]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Set the state that ``get_state`` returned.

        Args:
            state: As returned.
        """
        if self._separate is None:
            set_state(state, self.generators)
            return
        self._separate = state
        for generator, own in zip(self.generators, state["generators"], strict=True):
            generator.set_state(own)

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Let the block draw from the stream."""
        if self._separate is None:
            yield
            return
        own = get_state(gpu=False)
        set_state({**self._separate, "generators": []})
        try:
            yield
        finally:
            self._separate = get_state(gpu=False)
            set_state(own)
