"""How an average follows DeepSpeed's engine: its steps, its backward passes and its checkpoints."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from polyak.algorithm import Algorithm
from polyak.engines.attached import EngineAttached
from polyak.engines.deepspeed import masters_of
from polyak.engines.handle import refuse_swapped
from polyak.engines.hooks import Methods
from polyak.engines.masters import Masters
from polyak.errors import PlanWarning
from polyak.training.loop import Loop
from polyak.training.options import LoopOptions


class DeepSpeedAttached(EngineAttached):
    """An average of the masters of DeepSpeed's engine, and its handle. ``polyak.hosts.deepspeed.attach`` makes it.

    Args:
        algorithms: One ``EMA``, or a list of one.
        engine: What ``deepspeed.initialize`` returned first.
        options: The options of the loop.

    Raises:
        ArgumentError: If there is another algorithm than an ``EMA``, or ``engine`` is not an engine of DeepSpeed.
        OptimizerError: If the masters cannot be averaged.
        TimeError: If a time is in a unit that is not counted.
    """

    def __init__(self, algorithms: Algorithm | Sequence[Algorithm], engine: Any, options: LoopOptions) -> None:
        masters = masters_of(engine)
        super().__init__(algorithms, masters, options)
        # What replaces methods must not keep the average alive, and the loop does not.
        self._methods = surround(engine, masters, self.loop, self.loop.begin, self.loop.finish_batch)

    def detach(self) -> None:
        """Stop counting. The average stays; the engine has its own methods again."""
        self._methods.remove()
        super().detach()


def surround(
    engine: Any,
    masters: Masters,
    loop: Loop,
    begin: Callable[[], object] = lambda: None,
    finish: Callable[[], object] = lambda: None,
) -> Methods:
    """Replace methods of an engine, so that nothing trains averaged weights and its checkpoints have the average.

    Args:
        engine: DeepSpeed's engine.
        masters: The masters of the engine.
        loop: Which follows the masters.
        begin: Called before each step.
        finish: Called after each step that moved weights.
    """
    methods = Methods(engine)

    def step(inner: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_swapped(masters, "an optimizer step must be made")
        begin()
        result = inner(*args, **kwargs)
        if engine.was_step_applied() and len(loop.algorithms):
            masters.follow()
            finish()
        return result

    def backward(inner: Any, *args: Any, **kwargs: Any) -> Any:
        # Gradients of averaged weights would stay behind for the next step.
        refuse_swapped(masters, "a backward pass must be made")
        return inner(*args, **kwargs)

    def save(inner: Any, save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        refuse_swapped(masters, "a checkpoint must be saved")
        # Before DeepSpeed's own files, the last of which says which checkpoint is complete.
        _save(loop, masters, folder_of(save_dir, f"global_step{engine.global_steps}" if tag is None else tag))
        return inner(save_dir, tag, *args, **kwargs)

    def load(inner: Any, load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        refuse_swapped(masters, "a checkpoint must be loaded")
        folder = folder_of(load_dir, tag)
        result = inner(load_dir, tag, *args, **kwargs)
        if result[0] is not None and len(loop.algorithms) and not load_average(loop, masters, folder):
            warnings.warn(
                f"a checkpoint should have the average to resume it, and {folder.parent} has none: it begins with the "
                "next update (this is right if the run was not averaged before)",
                PlanWarning,
                stacklevel=4,
            )
        return result

    methods.around("step", step)
    methods.around("backward", backward)
    methods.around("_backward_prologue", backward)  # of `loss.backward()`
    methods.around("save_checkpoint", save)
    methods.around("load_checkpoint", load)
    return methods


def folder_of(folder: Any, tag: Any = None) -> Path:
    """Return where the average is in a folder of DeepSpeed's checkpoints.

    Args:
        folder: As given to ``load_checkpoint``.
        tag: The tag of the checkpoint; None for the latest.
    """
    latest = Path(folder, "latest")
    tag = latest.read_text().strip() if tag is None and latest.is_file() else tag
    return Path(folder, str(tag), "polyak")


def _save(loop: Loop, masters: Masters, folder: Path) -> None:
    from polyak.sharding import dcp  # noqa: PLC0415  takes half a second to import

    if len(loop.algorithms):
        masters.follow()
        loop.warn_of_uncounted()
        with loop.state.writing(folder):
            dcp.save({"average": masters.in_fragments(loop.state_dict())}, folder)


def load_average(loop: Loop, masters: Masters, folder: Path) -> bool:
    """Resume from the average in a checkpoint; return whether there is one. All ranks must call this.

    Args:
        loop: Which follows the masters.
        masters: The masters of the engine, which has loaded its own state.
        folder: As ``folder_of`` returned it.
    """
    from polyak.sharding import dcp  # noqa: PLC0415  takes half a second to import

    if not folder.is_dir():
        return False
    masters.follow()
    state = {"average": masters.in_fragments(loop.state_dict())}
    dcp.load(state, folder)
    loop.load_state_dict(masters.without_fragments(state["average"]))
    return True
