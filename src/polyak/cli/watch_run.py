"""What ``polyak watch`` does. It imports torch, which the help of the command does not need."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from polyak.checkpoints.series import holds_checkpoints
from polyak.cli.command import Answer, UsageError
from polyak.cli.functions import load_function
from polyak.cli.messages import tell
from polyak.record.manifest import MANIFEST
from polyak.report.watch_page import PAGE, write_watch_page
from polyak.report.words import measured
from polyak.storage.atomic import remove
from polyak.time import Time, TimeUnit
from polyak.watching import Moment, Reading, read_moments, watch
from polyak.watching.log import FILE
from polyak.watching.moment import COOLDOWN, COOLDOWNS, NEWEST, RAW

_WIDTH = 10


def run_watch(arguments: Namespace) -> Iterator[Answer]:
    """Evaluate at each interval until the run ends; yield what is printed.

    Args:
        arguments: The parsed arguments of ``polyak watch``.

    Raises:
        UsageError: If the function cannot be imported, or the output folder has the moments of another record.
        PolyakError: If the record cannot be read, or an evaluation fails.
    """
    folder, out = arguments.record.absolute(), arguments.out
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"RECORD must be a folder ({folder} is a file); give the folder that a Recorder writes")
    if not (folder / MANIFEST).exists() and holds_checkpoints(arguments.record):
        raise UsageError(
            f"RECORD must be the folder that a Recorder writes ({arguments.record} has checkpoints); evaluate their "
            "averages by polyak sweep, or polyak soup --sweep"
        )
    evaluate = load_function(arguments.evaluate, "--evaluate")
    _check_out(out, folder, force=arguments.force)
    moments = watch(
        folder,
        evaluate,
        arguments.every,
        results=out / FILE,
        metric=arguments.metric,
        maximize=arguments.maximize or None,
        minimize=arguments.minimize or None,
        patience_s=arguments.patience,
        say=lambda sentence: tell(f"polyak watch: {sentence}"),
    )
    return _answers(moments, out)


def _answers(moments: Iterator[Moment], out: Path) -> Iterator[Answer]:
    heading = True
    try:
        for moment in moments:
            write_watch_page(read_moments(out / FILE), out)
            yield Answer(_line(moment, heading=heading), moment.to_plain(), one_line=True)
            heading = False
    except KeyboardInterrupt:
        tell("polyak watch: stopped; the run continues")
    if (out / PAGE).exists():
        tell(f"polyak watch: curves in {out / PAGE}")


def _check_out(out: Path, folder: Path, *, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out must be a folder ({out} is a file); choose another")
    if out.resolve() == folder.resolve():
        raise UsageError(f"--out must not be the folder of the record (got {out}); choose another")
    path = out / FILE
    others = {one.record for one in read_moments(path)} - {str(folder)} if path.exists() else set[str]()
    if others and not force:
        raise UsageError(
            f"--out must not have the moments of another record ({path} has those of {min(others)}); choose another "
            "--out, or add --force to replace them"
        )
    if others:
        remove(path)


def _line(moment: Moment, *, heading: bool) -> str:
    """Return a moment as a line of a table, after a heading for the first."""
    now = Time(round(moment.timestamp.elapsed(TimeUnit.BATCH)), TimeUnit.BATCH)
    cells = [("trained", str(now))]
    raw, newest = moment.get(RAW), moment.get(NEWEST)
    cells += [("raw", _cell(moment, raw)), ("newest", _cell(moment, newest))]
    cells += [("T/16", _cell(moment, moment.sixteenth)), ("best", _best(moment))]
    cells += [(f"cool {share:.0%}", _cell(moment, moment.get(COOLDOWN, share))) for share in COOLDOWNS]
    widths = [max(_WIDTH, len(name)) + (5 if name == "best" else 0) for name, _ in cells]
    row = "".join(f" {text}".rjust(width) for (_, text), width in zip(cells, widths, strict=True))
    if not heading:
        return row
    names = "".join(name.rjust(width) for (name, _), width in zip(cells, widths, strict=True))
    return f"{moment.metric}, {'higher' if moment.maximize else 'lower'} is better\n{names}\n{row}"


def _cell(moment: Moment, reading: Reading | None) -> str:
    return "-" if reading is None else measured(moment.value(reading))


def _best(moment: Moment) -> str:
    best = moment.best
    return "-" if best is None or best.share is None else f"{_cell(moment, best)} T/{1 / best.share:.3g}"
