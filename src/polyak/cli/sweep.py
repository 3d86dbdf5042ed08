"""Evaluate the averages of a record with a custom function, and find the best half-life.

The function takes a dict of tensors by name, as for load_state_dict, and returns a number, or numbers by name. In place
of a number, it may return the losses of single examples: then the result says which half-lives are as good as the best.
It is called for half-lives from the shortest that the record resolves to the whole run, then for a few more near the
best. The run may still be writing the record.

Several processes evaluate between them, each on its own GPU: torchrun --nproc-per-node 8 -m polyak sweep ...

Evaluate on validation data: if the half-life is chosen on the test set, the test result is biased.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from polyak.cli.asking import add_record, half_lives, profiles
from polyak.cli.command import Answer, whole
from polyak.cli.evaluating import add_ranks

NAME = "sweep"

JSON = {
    "record": "the folder of the record",
    "metric": "the metric that decides",
    "direction": "minimize or maximize",
    "best": "the best average: an object as in results",
    "as_good_as_best": "the half-lives that are as good: from, to, examples; null if no examples are known",
    "results": "a list of objects: name, half_life, at, metrics, interval, error, distance, seconds",
    "reconstruct": "the command that exports the best average again; null if it has none",
    "files": "the files that were written",
}

_EPILOG = """\
evaluate.py, for example:
  from my_project import Model, x, y
  from torch import nn, no_grad

  losses = nn.CrossEntropyLoss(
      reduction="none"
  )

  def validate(state):
      net = Model().eval()
      net.load_state_dict(state)
      with no_grad():
          return losses(net(x), y)

files in DIR:
  sweep.jsonl       one line per evaluation; a stopped sweep resumes from it
  best.safetensors  the best average, for load_state_dict
  report.html       charts of the metric and of each average, for a browser; needs plotly
  sweep.png, .svg   figures of the same, for papers; need matplotlib

examples:
  polyak sweep my-record --evaluate evaluate.py:validate
  polyak sweep my-record --evaluate my_project.validation:accuracy --maximize
  polyak sweep my-record --evaluate evaluate.py:validate --at 50% --at 100%
  polyak sweep my-record --evaluate evaluate.py:validate --half-lives 100ba,1000ba,10000ba --refine 0
  polyak sweep my-record --evaluate evaluate.py:validate --profiles window=10ep,power=0.1
  torchrun --nproc-per-node 8 -m polyak sweep my-record --evaluate evaluate.py:validate
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
    _add_averages(parser)
    parser.add_argument("--metric", metavar="NAME", help="the metric that decides (default: the first)")
    sense = parser.add_mutually_exclusive_group()
    sense.add_argument(
        "--minimize", action="store_true", help="lower is better (default for a loss, an error, a perplexity)"
    )
    sense.add_argument("--maximize", action="store_true", help="higher is better, as for an accuracy")
    parser.add_argument(
        "--raw",
        type=Path,
        metavar="F",
        help="a safetensors file of the raw weights, for comparison (default: those that the record keeps)",
    )
    parser.add_argument(
        "--online", type=Path, metavar="F", help="a safetensors file of the online average, for comparison"
    )
    parser.add_argument(
        "--update-bn",
        metavar="FUNCTION",
        help="a function, given as for --evaluate, that returns a model and batches of training data; the statistics "
        "of BatchNorm layers are recomputed for each average, but not for raw and online weights",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("polyak-sweep"),
        metavar="DIR",
        help="the output folder (default: polyak-sweep)",
    )
    parser.add_argument("--force", action="store_true", help="replace the results of another record, or other files")
    add_ranks(parser)
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="evaluate everything again, as after a change of the data; a change of the function's source is noticed",
    )


def _add_averages(parser: ArgumentParser) -> None:
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
    parser.add_argument(
        "--at",
        action="append",
        metavar="WHEN",
        help="the end of the averages: a share of the record such as 50%%, or a time such as 1000ba or 0.5dur; may be "
        "given several times (default: the end of the record)",
    )


def run(arguments: Namespace) -> Answer | None:
    """Evaluate or resume, and write the files; return the results, or None on other ranks than rank 0.

    Args:
        arguments: The parsed arguments.

    Raises:
        UsageError: If a function cannot be imported, or the output folder has other files.
        PolyakError: If the record does not give an average, or an evaluation fails.
    """
    from polyak.cli.sweep_run import run_sweep

    return run_sweep(arguments)
