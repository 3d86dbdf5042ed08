"""The steps of ``polyak demo``: train, export, draw, and choose a half-life from the record."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import nn

import polyak
from polyak.averaging.ema import EMA
from polyak.cli.command import UsageError
from polyak.cli.folder import RunFolder
from polyak.cli.progress import Progress
from polyak.cli.recipe import Digits, build_trainer, load_data, measure
from polyak.profiles import HalfLife
from polyak.record import Record
from polyak.report.series import Curve, read_curves, update_shares
from polyak.report.written import write_report
from polyak.storage.atomic import replacing
from polyak.storage.safetensors import TensorInfo, write_tensors
from polyak.sweeping import best, sweep
from polyak.time import Time
from polyak.trainer import CheckpointSaver, JSONLinesLogger, ProgressBar
from polyak.trainer.parallel import Group


@dataclass(frozen=True, slots=True)
class Chosen:
    """The half-life that is best on validation digits, and its metrics on the test digits.

    Args:
        half_life: The half-life.
        accuracy: The accuracy on the test digits.
        loss: The cross-entropy on the test digits.
    """

    half_life: Time
    accuracy: float
    loss: float


class _Accuracies(ProgressBar):
    """A progress bar that shows the accuracy of raw and averaged weights, in 80 columns."""

    _NAMES: Mapping[str, str] = {"eval_raw/accuracy": "raw %", "eval/accuracy": "averaged %"}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        super().log_metrics({self._NAMES[n]: 100 * v for n, v in metrics.items() if n in self._NAMES}, step)


def train(
    digits: Digits, folder: RunFolder, say: Callable[[str], None], group: Group, parallelism: Literal["ddp"] | None
) -> None:
    """Train to the end, from the last checkpoint if there is one, and write the weights and the figure.

    Args:
        digits: The task.
        folder: The folder of the run.
        say: Prints a sentence about the progress.
        group: The processes that train together.
        parallelism: As for ``Trainer``.
    """
    # More threads are slower for a network of this size, and their number could change the last bits.
    torch.set_num_threads(1)
    saver = CheckpointSaver(folder.checkpoints, "100ba", keep=2)
    if group.ranks.from_rank_0(saver.latest() is None and folder.record.exists()):
        # A run was killed before its first checkpoint: its record has no run to belong to.
        group.ranks.on_rank_0(lambda: shutil.rmtree(folder.record), "remove the record of a run that was killed")
    trainer, ema = build_trainer(
        digits,
        callbacks=[saver],
        loggers=[JSONLinesLogger(folder.metrics), _Accuracies()],
        record=folder.record,
        autoresume=True,
        parallelism=parallelism,
    )
    if group.size > 1:
        say(f"{group.size} processes train together.")
    if begun := trainer.state.timestamp.batch.value:
        say(f"Resuming after {begun} of {digits.steps} steps, from {saver.latest()}.")
    trainer.fit()
    if group.rank == 0:
        (folder.sweep / "report.html").unlink(missing_ok=True)  # the report of a shorter run
        _write(digits, folder, ema)


def _write(digits: Digits, folder: RunFolder, ema: EMA) -> None:
    assert ema.ema_model is not None
    assert ema.training_model is not None
    metadata = {
        "format": "pt",
        "made_by": f"polyak demo, polyak {polyak.__version__}",
        "steps": str(digits.steps),
        "seed": str(digits.seed),
    }
    _export(ema.training_model, folder.raw, {**metadata, "profile": "last weights"})
    _export(ema.ema_model, folder.averaged, {**metadata, "profile": repr(ema.profile)})
    _draw(digits, folder)
    folder.finish()


def _export(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    state = model.state_dict()
    infos = {name: TensorInfo.of(tensor, averaged=True) for name, tensor in state.items()}
    with replacing(path, exclusive=True) as temporary:
        write_tensors(temporary, infos, state.__getitem__, metadata)


def choose(digits: Digits, folder: RunFolder, say: Callable[[str], None]) -> Chosen | None:
    """Choose the half-life from the record on validation digits; return None if the record resolves none.

    Args:
        digits: The task.
        folder: The folder of a complete run.
        say: Prints why no half-life can be chosen.
    """
    _, validation, test = load_data(digits)
    record = Record(folder.record)
    folder.sweep.mkdir(exist_ok=True)
    try:
        with Progress("polyak demo", lines=False) as progress:
            results = sweep(
                record,
                partial(measure, data=validation),
                metric="loss",
                others={"raw": folder.raw, "online": folder.averaged},
                results=folder.sweep / "sweep.jsonl",
                progress=progress.show,
            )
    except polyak.ProfileError as error:
        say(f"No half-life can be chosen from this record: {error}")
        return None
    found = best([result for result in results if result.half_life is not None], "loss")
    assert found.profile is not None
    assert found.half_life is not None
    record.export(found.profile, folder.sweep / "best.safetensors", overwrite=True)
    if not (folder.sweep / "report.html").exists():
        write_report(results, folder.sweep)
    tested = measure(load_file(folder.sweep / "best.safetensors"), data=test)
    return Chosen(found.half_life, tested["accuracy"], tested["loss"])


def final_curves(digits: Digits, folder: RunFolder) -> dict[str, Curve]:
    """Return the four curves that the demo shows.

    Args:
        digits: The task.
        folder: The folder of a complete run.

    Raises:
        UsageError: If a curve is missing or does not reach the last step.
    """
    curves = read_curves(folder.metrics)
    names = ("eval_raw/accuracy", "eval/accuracy", "eval_raw/loss", "eval/loss")
    if any(name not in curves or curves[name].batches[-1] != digits.steps for name in names):
        raise UsageError(
            f"{folder.metrics} must reach to {digits.steps} steps (it was changed); remove {folder.path} to start again"
        )
    return {name: curves[name] for name in names}


def _draw(digits: Digits, folder: RunFolder) -> None:
    from polyak.report.figures import Comparison, comparison, percent, render

    curves = final_curves(digits, folder)
    moments = [digits.clock(batch) for batch in range(1, digits.steps + 1)]
    raw, averaged = curves["eval_raw/accuracy"], curves["eval/accuracy"]
    figure = comparison(
        f"Averaged weights get {averaged.last:.1%} of test digits right, raw {raw.last:.1%}",
        f"A small network on digits, {digits.flipped:.0%} of its training labels wrong, at a constant learning rate; "
        f"seed {digits.seed}",
        Comparison("Test accuracy", raw, averaged, "{:.1%}".format, percent),
        Comparison("Test cross-entropy", curves["eval_raw/loss"], curves["eval/loss"], "{:.2f}".format, "{:g}".format),
        shares=update_shares(HalfLife(digits.half_life), moments),
        half_life=str(digits.half_life),
    )
    for path in (folder.png, folder.svg):
        with replacing(path, exclusive=True) as temporary:
            temporary.write_bytes(render(figure, path.suffix[1:]))
