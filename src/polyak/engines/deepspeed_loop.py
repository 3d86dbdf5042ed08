"""How an average follows DeepSpeed's engine: its steps, its backward passes and its checkpoints."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyak.algorithm import Algorithm
from polyak.engines.attached import EngineAttached, refuse_swapped
from polyak.engines.deepspeed import masters_of
from polyak.engines.hooks import Methods
from polyak.engines.masters import Masters
from polyak.errors import PlanWarning
from polyak.training.counted import CountedLoop
from polyak.training.options import LoopOptions


class DeepSpeedAttached(EngineAttached):
    """An average of the masters of DeepSpeed's engine, and its handle. ``polyak.hosts.deepspeed.attach`` makes it.

    Args:
        algorithms: One ``EMA``, or a list of one.
        engine: What ``deepspeed.initialize`` returned first.
        options: Of the loop.

    Raises:
        ArgumentError: If there is another algorithm than an ``EMA``, or ``engine`` is no engine of DeepSpeed.
        OptimizerError: If the masters cannot be averaged.
        TimeError: If a time is in a unit that is not counted.
    """

    def __init__(self, algorithms: Algorithm | Sequence[Algorithm], engine: Any, options: LoopOptions) -> None:
        super().__init__(algorithms, masters_of(engine), options)
        self._methods = Methods(engine)
        _surround(self._methods, self.loop, self._masters, engine)

    def detach(self) -> None:
        """Stop counting. The average stays; the engine has its own methods again."""
        self._methods.remove()
        super().detach()


def _surround(methods: Methods, loop: CountedLoop, masters: Masters, engine: Any) -> None:
    """Replace methods of the engine. What replaces them must not keep the average alive, and the loop does not."""

    def step(inner: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_swapped(masters, "an optimizer step must be made")
        loop.begin()
        result = inner(*args, **kwargs)
        if engine.was_step_applied() and len(loop.algorithms):
            masters.follow()
            loop.finish_batch()
        return result

    def backward(inner: Any, *args: Any, **kwargs: Any) -> Any:
        # Gradients of averaged weights would stay behind for the next step.
        refuse_swapped(masters, "a backward pass must be made")
        return inner(*args, **kwargs)

    def save(inner: Any, save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        refuse_swapped(masters, "a checkpoint must be saved")
        # Before DeepSpeed's own files, the last of which says which checkpoint is complete.
        _save(loop, masters, _folder(save_dir, f"global_step{engine.global_steps}" if tag is None else tag))
        return inner(save_dir, tag, *args, **kwargs)

    def load(inner: Any, load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        refuse_swapped(masters, "a checkpoint must be loaded")
        latest = Path(load_dir, "latest")
        tag = latest.read_text().strip() if tag is None and latest.is_file() else tag
        result = inner(load_dir, tag, *args, **kwargs)
        if result[0] is not None:
            _load(loop, masters, _folder(load_dir, tag))
        return result

    methods.around("step", step)
    methods.around("backward", backward)
    methods.around("_backward_prologue", backward)  # of `loss.backward()`
    methods.around("save_checkpoint", save)
    methods.around("load_checkpoint", load)


def _folder(folder: Any, tag: Any) -> Path:
    return Path(folder, str(tag), "polyak")


def _save(loop: CountedLoop, masters: Masters, folder: Path) -> None:
    from polyak.sharding import dcp  # noqa: PLC0415  takes half a second to import

    if len(loop.algorithms):
        masters.follow()
        dcp.save({"average": masters.in_fragments(loop.state_for(folder))}, folder)


def _load(loop: CountedLoop, masters: Masters, folder: Path) -> None:
    from polyak.sharding import dcp  # noqa: PLC0415  takes half a second to import

    if not len(loop.algorithms):
        return
    if not folder.is_dir():
        warnings.warn(
            f"a checkpoint should have the average to resume it, and {folder.parent} has none: it begins with the next "
            "update (this is right if the run was not averaged before)",
            PlanWarning,
            stacklevel=5,
        )
        return
    masters.follow()
    state = {"average": masters.in_fragments(loop.state_dict())}
    dcp.load(state, folder)
    loop.load_state_dict(masters.without_fragments(state["average"]))
