"""What ``polyak sweep`` does. It imports torch, which the help of the command does not need."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyak.cli.asking import open_record
from polyak.cli.command import Answer, UsageError
from polyak.cli.functions import load_batchnorm, load_function
from polyak.cli.output import fields, terminal_width, written
from polyak.cli.progress import Progress
from polyak.errors import TimeError
from polyak.printable import printable
from polyak.profiles import named
from polyak.record import Record
from polyak.record.moments import ends
from polyak.report.text import advice, as_good
from polyak.report.words import compared, headline
from polyak.report.written import FIGURES, PAGE, missing_pictures, numbers, write_report
from polyak.storage.atomic import remove
from polyak.sweeping import EvaluationError, Result, SweepResult, export, records_in, sweep
from polyak.sweeping.candidates import Batchnorm
from polyak.sweeping.held import held_by_all
from polyak.sweeping.workers import Parallel, is_launched, use_own_device, working

RESULTS = "sweep.jsonl"
BEST = "best.safetensors"
_FILES = {
    PAGE: "the report, for any browser",
    BEST: "the best average, for load_state_dict",
    ", ".join(FIGURES): "the figures of the report, for papers",
    RESULTS: "all results; they are reused",
}


def run_sweep(arguments: Namespace) -> Answer | None:
    """Evaluate or resume, and write the files; return the results, or None on other ranks than rank 0.

    Args:
        arguments: The parsed arguments of ``polyak sweep``.

    Raises:
        UsageError: If a function cannot be imported, or the output folder has other files.
        PolyakError: If the record does not give an average, or an evaluation fails.
    """
    record, out = open_record(arguments.record, arguments), arguments.out
    if arguments.at is not None and record.segments:
        _check_moments(record, arguments.at)
    if is_launched():
        use_own_device()
    evaluate = load_function(arguments.evaluate, "--evaluate")
    batchnorm = None if arguments.update_bn is None else load_batchnorm(arguments.update_bn)
    parallel: Parallel = "together" if arguments.together else True
    with working(parallel, evaluate) as workers:
        if workers.is_first:
            _check_folder(out, record, force=arguments.force)
        with held_by_all(record, workers) as snapshot:
            with Progress("polyak sweep") as progress:
                results = sweep(
                    snapshot,
                    evaluate,
                    arguments.half_lives or arguments.profiles,
                    points=arguments.points,
                    refine=arguments.refine,
                    metric=arguments.metric,
                    maximize=arguments.maximize or None,
                    minimize=arguments.minimize or None,
                    at=arguments.at,
                    others={name: path for name in ("raw", "online") if (path := getattr(arguments, name)) is not None},
                    batchnorm=batchnorm,
                    results=out / RESULTS,
                    fresh=arguments.fresh,
                    progress=progress.show,
                    parallel=parallel,
                )
            if not workers.is_first:
                return None
            _export(snapshot, results, out, batchnorm)
        files = [*write_report(results, out), BEST, RESULTS]
    return Answer(_text(results, out, files), _plain(results, out, files))


def _export(record: Record, results: SweepResult, out: Path, batchnorm: Batchnorm | None) -> None:
    best = results.best
    if best.profile is None:
        raise EvaluationError("a sweep must have an average (got other weights alone); give a profile")
    export(record, best.profile, out / BEST, batchnorm, at=best.at, overwrite=True)


def _check_moments(record: Record, at: list[str]) -> None:
    try:
        ends(record, at)
    except TimeError as error:
        raise UsageError(f"--at: {error}") from None


def _check_folder(out: Path, record: Record, *, force: bool) -> None:
    """Check that the output folder is new, or has results of this record; with ``force``, remove other results."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out must be a folder ({out} is a file); choose another")
    if out.resolve() == record.folder.resolve():
        raise UsageError(f"--out must not be the folder of the record (got {out}); choose another")
    outputs = (BEST, PAGE, *FIGURES)
    known = [segment.file for segment in record.segments]
    others = [folder for folder in records_in(out / RESULTS, known) if folder != str(record.folder.resolve())]
    present = [name for name in outputs if (out / name).exists()]
    foreign = bool(present) and not (out / RESULTS).exists()
    if not force and others:
        raise UsageError(
            f"--out must not have the results of another record ({out} has those of {others[0]}); choose another "
            "--out, or add --force to replace them"
        )
    if not force and foreign:
        raise UsageError(
            f"--out must be a new folder, or one of polyak sweep ({out} has {present[0]} but no {RESULTS}); choose "
            "another --out, or add --force to replace the file"
        )
    if others:
        for name in (RESULTS, *outputs):
            remove(out / name)


def _text(results: SweepResult, out: Path, files: list[str]) -> str:
    shown = numbers(results)
    sentences = [
        "error: estimated, relative to |last weights - average|; distance: from the newest mean, relative to it",
        f"{headline(shown)}. {compared(shown)}",
        as_good(results),
        advice(results),
        "If this was the test set, the result is biased: choose on validation data.",
    ]
    if missing := missing_pictures():
        sentences.append(
            f"There are no pictures of it without {' and '.join(missing)}: pip install 'polyak[report]' and run the "
            "same command again."
        )
    rows = [(names, what) for names, what in _FILES.items() if names.partition(",")[0] in files]
    return "\n".join(
        [
            "\n".join(map(printable, results.table(terminal_width()).splitlines())),
            "",
            written(*(sentence for sentence in sentences if sentence)),
            "",
            written(f"Written to {out}/"),
            *(f"  {line}" for line in fields(rows, terminal_width() - 2).splitlines()),
        ]
    )


def _plain(results: SweepResult, out: Path, files: list[str]) -> dict[str, Any]:
    best, equal = results.best, results.as_good
    examples = len(best.examples.get(results.metric, ()))
    options = None if best.profile is None else named(best.profile).options
    at, source = "" if best.at is None else f" --at {best.at}", results.record.arguments
    return {
        "record": str(results.record.folder),
        "metric": results.metric,
        "direction": "maximize" if results.maximize else "minimize",
        "best": _result(best, results.metric),
        "as_good_as_best": None
        if examples < 2 or not equal
        else {"from": str(equal[0].half_life), "to": str(equal[-1].half_life), "examples": examples},
        "results": [_result(one, results.metric) for one in results],
        "reconstruct": None
        if options is None or source is None
        else f"polyak reconstruct {source} {options}{at} -o averaged.safetensors",
        "files": [str(out / name) for name in files],
    }


def _result(one: Result, metric: str) -> Mapping[str, Any]:
    return {
        "name": one.name,
        "half_life": None if one.half_life is None else str(one.half_life),
        "at": None if one.at is None else str(one.at),
        "metrics": dict(one.metrics),
        "interval": one.interval(metric),
        "error": one.error,
        "distance": one.distance,
        "seconds": round(one.seconds, 3),
    }
