"""What ``polyak recommend`` does. It imports torch, which the help of the command does not need."""

from argparse import Namespace
from pathlib import Path

from polyak.cli.asking import open_record
from polyak.cli.command import Answer, UsageError
from polyak.cli.files import check_output
from polyak.cli.functions import load_batchnorm, load_function
from polyak.cli.output import fields, terminal_width, written
from polyak.cli.progress import Progress
from polyak.printable import printable
from polyak.profiles import named
from polyak.record.recommendation import Comparison, Recommendation
from polyak.report.words import measured, percent
from polyak.sweeping import export, recommend
from polyak.sweeping.workers import Parallel, is_launched, use_own_device, working


def run_recommend(arguments: Namespace) -> Answer | None:
    """Recommend an average, and write it if asked; return the recommendation, or None on other ranks than rank 0.

    Args:
        arguments: The parsed arguments of ``polyak recommend``.

    Raises:
        UsageError: If a function cannot be imported, or the output cannot be written.
        PolyakError: If the record does not give an average, or an evaluation fails.
    """
    record, output = open_record(arguments.record, arguments), arguments.output
    _check(arguments)
    if is_launched():
        use_own_device()
    evaluate = None if arguments.evaluate is None else load_function(arguments.evaluate, "--evaluate")
    batchnorm = None if arguments.update_bn is None else load_batchnorm(arguments.update_bn)
    parallel: Parallel = "together" if arguments.together else True
    with working(parallel, evaluate) as workers, Progress("polyak recommend") as progress:
        if output is not None and workers.is_first:
            # Next to the checkpoints of a pattern, an average is not one of them.
            source = record.folder if arguments.record.is_dir() else arguments.record
            check_output(output, force=arguments.force, source=source)
        result = recommend(
            record,
            evaluate,
            metric=arguments.metric,
            maximize=arguments.maximize or None,
            minimize=arguments.minimize or None,
            batchnorm=batchnorm,
            progress=progress.show,
            parallel=parallel,
        )
        if not workers.is_first:
            return None
        if output is not None:
            export(record, result.profile, output, batchnorm)
    return Answer(_text(result, output, record.arguments), _plain(result, output, record.folder))


def _check(arguments: Namespace) -> None:
    given = [name for name in ("metric", "minimize", "maximize") if getattr(arguments, name)]
    if arguments.evaluate is None and given:
        raise UsageError(f"--{given[0]} must be given together with --evaluate (got it alone); add the function")


def _text(result: Recommendation, output: Path | None, source: str | None) -> str:
    options = named(result.profile).options
    compared = [] if result.comparison is None else _numbers(result.comparison)
    rows = [
        ("recommended", named(result.profile).describe()),
        ("because", result.reason),
        *compared,
        ("error", f"about {percent(result.error)} of |last weights - average|"),
        *([] if output is None else [("written", str(output))]),
    ]
    text = fields([(name, printable(value)) for name, value in rows], terminal_width())
    if output is not None or options is None or source is None:
        return text
    return f"{text}\n\n{written(f'To write it: polyak reconstruct {source} {options} -o averaged.safetensors')}"


def _numbers(compared: Comparison) -> list[tuple[str, str]]:
    values = [(named(compared.default).describe(), compared.default_value)]
    if compared.best != compared.default:
        values.append((named(compared.best).describe(), compared.best_value))
    if compared.raw is not None:
        values.insert(0, ("raw weights", compared.raw))
    return [(compared.metric, ", ".join(f"{name} {measured(value)}" for name, value in values))]


def _plain(result: Recommendation, output: Path | None, record: Path) -> dict[str, object]:
    return {
        "record": str(record),
        "profile": named(result.profile).options,
        "half_life": None if result.half_life is None else str(result.half_life),
        "reason": result.reason,
        "error_estimate": result.error,
        "comparison": None if result.comparison is None else result.comparison.to_plain(),
        "output": None if output is None else str(output),
    }
