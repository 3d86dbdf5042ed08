"""Train on handwritten digits with EMA, and see what averaging does.

A small network learns scikit-learn's digits while 30 % of its training labels
are wrong. Its weights never come to rest; their exponential moving average
does. Both are evaluated on clean test digits all along. It takes a few seconds
on a CPU. Stop it at any moment: the same command goes on to the same result.
Under torchrun several processes train together, each on its part of a batch.
"""

import shutil
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file
from torch import nn

import polyak
from polyak.averaging.ema import EMA
from polyak.cli.command import REFUSED, UsageError, require, span, whole
from polyak.cli.folder import RunFolder
from polyak.cli.recipe import NUM_VALIDATION, RECORD_INTERVAL, Digits, build_trainer, load_data, measure
from polyak.errors import PlanWarning, ProfileError, QuarantineWarning, ShardingError
from polyak.profiles import HalfLife
from polyak.record import Record
from polyak.report.series import Curve, read_curves, update_shares
from polyak.report.swept import swept
from polyak.storage.atomic import replacing
from polyak.storage.safetensors import TensorInfo, write_tensors
from polyak.sweeping import best, sweep
from polyak.time import Time, TimeUnit
from polyak.trainer import CheckpointSaver, JSONLinesLogger, ProgressBar
from polyak.trainer.parallel import Group, join

if TYPE_CHECKING:
    from rich.console import Console

NAME = "demo"

_UNITS = {TimeUnit.BATCH: "100ba", TimeUnit.EPOCH: "1.5ep", TimeUnit.SAMPLE: "1600sp", TimeUnit.DURATION: "0.1dur"}

_EPILOG = """\
what is written to DIR:
  averaged.safetensors  the averaged weights, as a plain state dict:
                        model.load_state_dict(safetensors.torch.load_file(path))
  raw.safetensors       the last weights, likewise
  checkpoints/          the newest two, one every 100 steps, to go on from
  metrics.jsonl         the training loss; accuracy and cross-entropy (loss) of
                        raw (eval_raw/...) and averaged weights (eval/...)
  demo.png, demo.svg    both curves, and how much each step of training counts
  record/               the run, for polyak inspect, reconstruct and sweep
  sweep/                report.html: every half-life on digits held out for it,
                        put together from the record; best.safetensors
  demo.json             the arguments, to which DIR belongs; --steps may grow

examples:
  polyak demo
  polyak demo --steps 3000                   go on from there: nothing in a
                                             constant learning rate says when
                                             to end
  polyak demo --half-life 10ba --out short   forget half within ten steps
  polyak demo --half-life 1000ba --out long  still remember the first weights
  polyak demo --seed 1 --out another         other digits, labels and weights
  torchrun --nproc-per-node 2 -m polyak demo --out two     on two processes
"""


def configure(parser: ArgumentParser) -> None:
    """Add the arguments.

    Args:
        parser: Of this command.
    """
    parser.epilog = _EPILOG
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="of everything that is drawn (default: 0)")
    parser.add_argument(
        "--half-life",
        type=span(_UNITS),
        default="100ba",
        metavar="TIME",
        help="after how long half of the average is new: steps as 100ba, epochs as 1.5ep, samples as 1600sp, a share "
        "of the run as 0.1dur (default: 100ba, fixed beforehand)",
    )
    parser.add_argument("--steps", type=whole(1), default=1000, help="how long to train (default: 1000)")
    parser.add_argument(
        "--out", type=Path, default=Path("polyak-demo"), metavar="DIR", help="where to write (default: polyak-demo)"
    )


def run(arguments: Namespace) -> int:
    """Train, or go on, or show what is there.

    Args:
        arguments: As parsed.

    Raises:
        UsageError: If an extra is missing, or the folder is one of another run.
    """
    require("cli", {"sklearn": "scikit-learn", "rich": "rich", "matplotlib": "matplotlib"})
    from rich.console import Console  # noqa: PLC0415  an extra

    parallelism: Literal["ddp"] | None = "ddp" if torch.distributed.is_torchelastic_launched() else None
    group = join(parallelism, "cpu")
    console = Console(highlight=False, quiet=group.rank > 0)
    if group.rank > 0:  # the first says what is to be said
        for category in (PlanWarning, QuarantineWarning):
            warnings.simplefilter("ignore", category)
    digits = Digits(arguments.seed, arguments.steps, arguments.half_life)
    folder = RunFolder(arguments.out)
    with ExitStack() as held:
        try:
            group.ranks.on_rank_0(lambda: _begin(digits, folder, held), "begin")
        except ShardingError:
            return REFUSED
        console.print(
            f"Digits, {digits.flipped:.0%} of the training labels wrong. A small network, SGD at a constant learning "
            f"rate, EMA with half-life {digits.half_life}, seed {digits.seed}."
        )
        if group.ranks.from_rank_0(folder.complete):
            console.print(f"{digits.steps} steps are done already; nothing was trained.")
        else:
            _train(digits, folder, console, group, parallelism)
        if group.rank == 0:
            _show(
                _final(read_curves(folder.metrics), digits, folder), _choose(digits, folder, console), folder, console
            )
    return 0


def _begin(digits: Digits, folder: RunFolder, held: ExitStack) -> None:
    held.enter_context(folder.locked())
    folder.begin(
        {"--seed": digits.seed, "--half-life": str(digits.half_life), "--steps": digits.steps},
        f"flipped={digits.flipped} lr={digits.lr} batch_size={digits.batch_size} "
        f"validation={NUM_VALIDATION} record={RECORD_INTERVAL}",
        may_grow=None if digits.half_life.unit is TimeUnit.DURATION else "--steps",
    )


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What the half-life that validation chose gets on the test digits."""

    half_life: Time
    accuracy: float
    loss: float


class _Accuracies(ProgressBar):
    """A progress bar that shows what the demo is about, and fits into 80 columns."""

    _NAMES: Mapping[str, str] = {"eval_raw/accuracy": "raw %", "eval/accuracy": "averaged %"}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        super().log_metrics({self._NAMES[n]: 100 * v for n, v in metrics.items() if n in self._NAMES}, step)


def _train(
    digits: Digits, folder: RunFolder, console: "Console", group: Group, parallelism: Literal["ddp"] | None
) -> None:
    # Threads cost more than they bring in a network of this size, and their number could change the last bits.
    torch.set_num_threads(1)
    saver = CheckpointSaver(folder.checkpoints, "100ba", keep=2)
    if group.ranks.from_rank_0(saver.latest() is None and folder.record.exists()):
        # Of a run that was killed before it could be gone on with.
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
        console.print(f"{group.size} processes train together.")
    if begun := trainer.state.timestamp.batch.value:
        console.print(f"Going on after {begun} of {digits.steps} steps, from {saver.latest()}.")
    trainer.fit()
    if group.rank == 0:
        (folder.sweep / "report.html").unlink(missing_ok=True)  # of a shorter run
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
    with replacing(path, exclusive=True) as draft:
        write_tensors(draft, infos, state.__getitem__, metadata)


def _choose(digits: Digits, folder: RunFolder, console: "Console") -> _Chosen | None:
    """Choose the half-life from the record, on digits that are neither trained on nor tested with."""
    from polyak.cli.sweep import Progress, write_report  # noqa: PLC0415  plotting, an extra

    _, validation, test = load_data(digits)
    record = Record(folder.record)
    folder.sweep.mkdir(exist_ok=True)
    try:
        with Progress() as progress:
            results = sweep(
                record,
                partial(measure, data=validation),
                others={"raw": folder.raw, "online": folder.averaged},
                results=folder.sweep / "sweep.jsonl",
                progress=progress.show,
            )
    except ProfileError as error:
        console.print(f"No half-life can be chosen from this record: {error}")
        return None
    found = best([result for result in results if isinstance(result.profile, HalfLife)], "loss")
    assert isinstance(found.profile, HalfLife)
    record.export(found.profile, folder.sweep / "best.safetensors")
    if not (folder.sweep / "report.html").exists():
        write_report(swept(record, results, "loss"), folder.sweep)
    tested = measure(load_file(folder.sweep / "best.safetensors"), data=test)
    return _Chosen(found.profile.span, tested["accuracy"], tested["loss"])


def _final(curves: Mapping[str, Curve], digits: Digits, folder: RunFolder) -> dict[str, Curve]:
    """Return the four curves that the demo shows, and see that they reach the end."""
    names = ("eval_raw/accuracy", "eval/accuracy", "eval_raw/loss", "eval/loss")
    if any(name not in curves or curves[name].batches[-1] != digits.steps for name in names):
        raise UsageError(
            f"{folder.metrics} must reach to {digits.steps} steps, and was changed; remove {folder.path} to begin anew"
        )
    return {name: curves[name] for name in names}


def _draw(digits: Digits, folder: RunFolder) -> None:
    from polyak.report.figures import Comparison, comparison, percent, render  # noqa: PLC0415  an extra

    curves = _final(read_curves(folder.metrics), digits, folder)
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
        with replacing(path, exclusive=True) as draft:
            draft.write_bytes(render(figure, path.suffix[1:]))


def _show(curves: Mapping[str, Curve], chosen: _Chosen | None, folder: RunFolder, console: "Console") -> None:
    from rich.table import Table  # noqa: PLC0415  an extra

    rows: dict[str, Any] = {
        "raw": (curves["eval_raw/accuracy"].last, curves["eval_raw/loss"].last),
        "averaged": (curves["eval/accuracy"].last, curves["eval/loss"].last),
    }
    table = Table("weights", title_justify="left")
    table.add_column("test accuracy", justify="right")
    table.add_column("cross-entropy (less is better)", justify="right")
    for name, (accuracy, loss) in rows.items():
        table.add_row(name, f"{accuracy:.1%}", f"{loss:.3f}", style="bold" if name == "averaged" else "")
    accuracy, loss = (after - before for before, after in zip(rows["raw"], rows["averaged"], strict=True))
    table.add_section()
    table.add_row("difference", f"{100 * accuracy:+.1f} points", f"{loss:+.3f}")
    if chosen is not None:
        table.add_section()
        table.add_row("half-life chosen later", f"{chosen.accuracy:.1%}", f"{chosen.loss:.3f}")
    console.print(table)
    if chosen is not None:
        console.print(
            f"Chosen later: the run was recorded once, and of all half-lives {chosen.half_life} is best on validation "
            "digits. All numbers above are of test digits, which had no part in that."
        )
    console.print(
        "Averaging helps here because the learning rate is constant and labels wrong. Where it does not: see README."
        if accuracy > 0 > loss
        else "Averaging does not win on both counts with this seed, half-life and length. When it helps: see README."
    )
    console.print(f"\nWritten to {folder.path}/", soft_wrap=True)
    for name, what in (
        (folder.averaged.name, "for model.load_state_dict(load_file(path))"),
        (f"{folder.sweep.name}/report.html", "every half-life, to look at in a browser"),
        (f"{folder.checkpoints.name}/", "to go on from, with more --steps"),
        (folder.metrics.name, "every number that was measured"),
        (f"{folder.png.name}, {folder.svg.name}", "the curves, and how much each step counts"),
    ):
        console.print(f"  {name:<22} {what}", soft_wrap=True)
