"""Evaluate the averages of a record with a custom function, and find the best half-life.

The function takes a dict of tensors by name, as for load_state_dict, and returns a number, or numbers by name. It is
called for half-lives from the shortest that the record resolves to the whole run, then for a few more near the best.

Evaluate on validation data: if the half-life is chosen on the test set, the test result is biased.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polyak.cli.asking import add_record, half_lives, open_record, profiles
from polyak.cli.command import UsageError, require, whole
from polyak.cli.functions import load_function
from polyak.compat.words import printable
from polyak.report.swept import Swept, swept
from polyak.report.words import compared, headline, measured, other_name, percent
from polyak.storage.atomic import replacing
from polyak.sweeping import Result, export, sweep

if TYPE_CHECKING:
    from rich.console import Console

NAME = "sweep"

_EPILOG = """\
evaluate.py, for example:
  import torch
  from my_project import Model, validation_inputs, validation_targets

  def validate(state):
      model = Model().eval()
      model.load_state_dict(state)
      with torch.no_grad():
          outputs = model(validation_inputs)
      return {"loss": torch.nn.functional.cross_entropy(outputs, validation_targets)}

files in DIR:
  sweep.jsonl            one line per evaluation; a stopped sweep resumes from it
  best.safetensors       the best average, for model.load_state_dict(safetensors.torch.load_file(...))
  report.html            charts of the metric, the error and the profile of each half-life; needs no network
  sweep.png, sweep.svg   figures of the same, for papers

examples:
  polyak sweep my-record --evaluate evaluate.py:validate
  polyak sweep my-record --evaluate my_project.validation:accuracy --maximize --raw last.safetensors
  polyak sweep my-record --evaluate evaluate.py:validate --half-lives 100ba,1000ba,10000ba --refine 0
  polyak sweep my-record --evaluate evaluate.py:validate --profiles window=10ep,power=0.1,uniform-from=50ep
"""


def configure(parser: ArgumentParser) -> None:
    """Add the arguments.

    Args:
        parser: The parser of this command.
    """
    parser.epilog = _EPILOG
    add_record(parser)
    parser.add_argument(
        "--evaluate", required=True, metavar="FUNCTION", help="FILE.py:FUNCTION or package.module:FUNCTION; see below"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--half-lives", type=half_lives, metavar="LIST", help="such as 10ba,100ba, instead of a grid")
    which.add_argument("--profiles", type=profiles, metavar="LIST", help="such as window=10ep,power=0.1")
    parser.add_argument("--points", type=whole(2), default=9, metavar="N", help="half-lives on the grid (default: 9)")
    parser.add_argument(
        "--refine",
        type=whole(0),
        default=3,
        metavar="N",
        help="at most N further half-lives near the best (default: 3)",
    )
    parser.add_argument("--metric", metavar="NAME", help="the metric that decides (default: the first)")
    sense = parser.add_mutually_exclusive_group()
    sense.add_argument("--minimize", action="store_true", help="lower is better, as for a loss (default)")
    sense.add_argument("--maximize", action="store_true", help="higher is better, as for an accuracy")
    parser.add_argument("--raw", type=Path, metavar="F", help="a safetensors file of the raw weights, for comparison")
    parser.add_argument(
        "--online", type=Path, metavar="F", help="a safetensors file of the online average, for comparison"
    )
    parser.add_argument(
        "--update-bn",
        metavar="FUNCTION",
        help="a function, given as for --evaluate, that returns a model and batches of training data; the statistics "
        "of BatchNorm layers are recomputed for each average, but not for --raw and --online",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("polyak-sweep"),
        metavar="DIR",
        help="the output folder (default: polyak-sweep)",
    )


def run(arguments: Namespace) -> int:
    """Evaluate or resume, write the report, and print the results.

    Args:
        arguments: The parsed arguments.

    Raises:
        UsageError: If an extra is missing, or a function cannot be imported.
        PolyakError: If the record does not give an average, or an evaluation fails.
    """
    require("cli", {"rich": "rich", "matplotlib": "matplotlib", "plotly": "plotly"})
    from rich.console import Console  # noqa: PLC0415  an extra

    record = open_record(arguments.record)
    if arguments.out.resolve() == record.folder.resolve():
        raise UsageError(f"--out must not be the folder of the record (got {arguments.out}); choose another")
    evaluate = load_function(arguments.evaluate, "--evaluate")
    batchnorm = None
    if arguments.update_bn is not None:
        batchnorm = load_function(arguments.update_bn, "--update-bn")()
        if not (isinstance(batchnorm, tuple) and len(batchnorm) == 2):
            raise UsageError(
                f"--update-bn: the function must return a model and batches (got {batchnorm!r:.60}); change it"
            )
    out = arguments.out
    with Progress() as progress:
        results = sweep(
            record,
            evaluate,
            arguments.half_lives or arguments.profiles,
            points=arguments.points,
            refine=arguments.refine,
            metric=arguments.metric,
            maximize=arguments.maximize,
            others={name: path for name in ("raw", "online") if (path := getattr(arguments, name)) is not None},
            batchnorm=batchnorm,
            results=out / "sweep.jsonl",
            progress=progress.show,
        )
    numbers = swept(record, results, arguments.metric, maximize=arguments.maximize, batchnorm=batchnorm is not None)
    best = numbers.points[numbers.best].result
    assert best.profile is not None
    export(record, best.profile, out / "best.safetensors", batchnorm)
    write_report(numbers, out)
    _show(numbers, results, out, Console(highlight=False, markup=False, emoji=False))
    return 0


class Progress:
    """A progress bar on stderr, for a ``with`` block."""

    def __enter__(self) -> "Progress":
        from rich import progress as rich  # noqa: PLC0415
        from rich.console import Console  # noqa: PLC0415  an extra

        console = Console(stderr=True)
        columns = (
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TimeElapsedColumn(),
        )
        self._progress = rich.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("reading", total=None)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, done: int, total: int, name: str) -> None:
        """Show the progress.

        Args:
            done: The number of evaluations that are done.
            total: The largest number of evaluations.
            name: The name of the next one.
        """
        self._progress.update(self._task, completed=done, total=total, description=printable(name))


def write_report(numbers: Swept, out: Path) -> None:
    """Write the page and the figures of a sweep.

    Args:
        numbers: The numbers of the sweep.
        out: The folder.
    """
    from polyak.report.figures import render  # noqa: PLC0415  an extra
    from polyak.report.page import page  # noqa: PLC0415
    from polyak.report.sweep_figure import sweep_figure  # noqa: PLC0415

    with replacing(out / "report.html", exclusive=True) as temporary:
        temporary.write_text(page(numbers), encoding="utf-8")
    figure = sweep_figure(numbers)
    for kind in ("png", "svg"):
        with replacing(out / f"sweep.{kind}", exclusive=True) as temporary:
            temporary.write_bytes(render(figure, kind))


def _show(numbers: Swept, results: Sequence[Result], out: Path, console: "Console") -> None:
    from rich.table import Table  # noqa: PLC0415  an extra

    best = numbers.points[numbers.best].result
    table = Table("weights", title_justify="left")
    for heading in (*map(printable, best.metrics), "error", "distance"):
        table.add_column(heading, justify="right")
    given = [one for one in results if one.profile is None]
    for one in (*given, *(point.result for point in numbers.points)):
        cells = [measured(one.metrics[name]) if name in one.metrics else "" for name in best.metrics]
        cells += ["", ""] if one.profile is None else [percent(one.error), percent(one.distance)]
        mark = " (best)" if one is best else ""
        table.add_row(printable(f"{other_name(one.name)}{mark}"), *cells, style="bold" if mark else "")
    console.print(table)
    console.print(
        "error: estimated, relative to |last weights - average|; distance: from the newest mean, relative to it"
    )
    console.print(printable(f"{headline(numbers)}. {compared(numbers)}"), soft_wrap=True)
    console.print("If this was the test set, the result is biased: choose on validation data.", soft_wrap=True)
    console.print(f"\nWritten to {printable(str(out))}/", soft_wrap=True)
    for name, what in (
        ("report.html", "the report, for any browser"),
        ("best.safetensors", "for model.load_state_dict(safetensors.torch.load_file(...))"),
        ("sweep.png, sweep.svg", "the figures of the report, for papers"),
        ("sweep.jsonl", "all results; they are reused"),
    ):
        console.print(f"  {name:<22} {what}", soft_wrap=True)
