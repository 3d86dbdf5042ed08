"""Average those checkpoints that make the average better: a greedy soup, or the best number of the newest.

Each checkpoint is evaluated. Then they join the average one after the other, the best first, and each stays if the
average is no worse with it (Wortsman et al. 2022, https://arxiv.org/abs/2203.05482). The function takes a dict of
tensors by name, as for load_state_dict, and returns a number, or numbers by name. One set of weights is in memory.

With --sweep, the checkpoints are of one run: means of the newest 1, 2, 3, 5, 10 ... of them are evaluated, of all, of
every second and of every fourth, and the best is written. The sum and one mean of the weights are in memory then.

Evaluate on validation data: what is chosen on the test set makes the test result biased.
"""

import math
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak.cli.checkpoints import (
    add_checkpoints,
    add_direction,
    add_place,
    maximize_of,
    open_all,
    require_new,
    writing,
)
from polyak.cli.command import Answer, UsageError
from polyak.cli.functions import last_line, load_function
from polyak.cli.output import fields, size, table, terminal_width
from polyak.cli.progress import Progress
from polyak.cli.soup_sweep import JSON as JSON_OF_SWEEP
from polyak.cli.soup_sweep import add_sweep, require_no_sweep, run_sweep
from polyak.printable import printable

if TYPE_CHECKING:
    from torch import Tensor

    from polyak.checkpoints.soup import Soup

NAME = "soup"

JSON = {
    "metric": "the metric that decides",
    "direction": "minimize or maximize",
    "value": "of the soup",
    "checkpoints": "a list of objects, the best first: path, alone (its value), joined (the soup's with it), kept",
    "output": "the file or folder that was written",
}

_EPILOG = """\
evaluate.py, for example:
  def validate(state):
      net = Model().eval()
      net.load_state_dict(state)
      return accuracy(net, validation)

examples:
  polyak soup --evaluate evaluate.py:validate --maximize run-*/best.pt -o soup.safetensors
  polyak soup --evaluate evaluate.py:loss fold-*.ckpt --key state_dict -o soup.pt
  polyak soup --evaluate evaluate.py:loss --sweep 'run/step-*' --counts 1,5,10 --spacings 1,2 -o best.safetensors

the object of --json with --sweep:
"""


def configure(parser: ArgumentParser) -> None:
    """Add the arguments.

    Args:
        parser: The parser of this command.
    """
    parser.epilog = _EPILOG + "\n".join(f"  {key:<16}  {meaning}" for key, meaning in JSON_OF_SWEEP.items())
    add_checkpoints(parser)
    parser.add_argument(
        "--evaluate", required=True, metavar="FUNCTION", help="FILE.py:FUNCTION or package.module:FUNCTION; see below"
    )
    parser.add_argument("--metric", metavar="NAME", help="the metric that decides (default: the first)")
    add_direction(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="a .safetensors or .pt file; without a suffix a folder as the best checkpoint is",
    )
    add_place(parser)
    parser.add_argument("--common", action="store_true", help="average the tensors that all checkpoints have")
    parser.add_argument("--force", action="store_true", help="replace an existing output file")
    add_sweep(parser)


def run(arguments: Namespace) -> Answer:
    """Find the soup, write it, and return what is in it.

    Args:
        arguments: The parsed arguments.

    Raises:
        UsageError: If the function cannot be imported, or the output is there.
        PolyakError: If a checkpoint cannot be read, they are not of one model, or an evaluation fails.
    """
    require_new(arguments.output, force=arguments.force)
    if arguments.sweep:
        return run_sweep(arguments)
    require_no_sweep(arguments)
    from polyak.checkpoints.averaging import plan
    from polyak.checkpoints.output import check_output, write_average
    from polyak.checkpoints.soup import greedy_soup

    opened = open_all(arguments)
    check_output(arguments.output, plan(opened, [1.0] * len(opened), common=arguments.common))
    with Progress("polyak soup") as progress:
        evaluation = _Evaluation(arguments, 2 * len(opened) - 1, progress)
        soup = greedy_soup(opened, evaluation, maximize=evaluation.is_better_higher, common=arguments.common)
    check_output(arguments.output, soup.plan)
    with writing(arguments.output):
        write_average(soup.plan, arguments.output)
    plain = {
        "metric": evaluation.metric,
        "direction": "maximize" if evaluation.is_better_higher() else "minimize",
        "value": soup.value,
        "checkpoints": [
            {"path": str(one.checkpoint.path), "alone": one.alone, "joined": one.joined, "kept": one.kept}
            for one in soup.ingredients
        ],
        "output": str(arguments.output),
    }
    return Answer(_text(soup, plain), plain)


class _Evaluation:
    """Evaluates weights by the function of the user.

    Args:
        arguments: The parsed arguments.
        total: The largest number of evaluations.
        progress: Shows them.
    """

    def __init__(self, arguments: Namespace, total: int, progress: Progress) -> None:
        self._function = load_function(arguments.evaluate, "--evaluate")
        self._name = arguments.evaluate.rpartition(":")[2]
        self._arguments, self._total, self._progress, self._done = arguments, total, progress, 0
        self.metric: str = arguments.metric or ""
        if self.metric:
            self.is_better_higher()  # before anything is evaluated

    def is_better_higher(self) -> bool:
        """Return whether a higher value is better."""
        return maximize_of(self._arguments, self.metric, self._name)

    def __call__(self, name: str, state: "dict[str, Tensor]") -> float:
        from polyak.sweeping import EvaluationError
        from polyak.sweeping.returned import measured

        self._progress.show(self._done, self._total, name)
        try:
            returned = self._function(state)
        except Exception as error:  # the function can raise anything
            raise EvaluationError(f"evaluating {name} failed: {last_line(error)}; correct the function") from error
        metrics, _ = measured(returned, name)
        self.metric = self.metric or next(iter(metrics))
        if self.metric not in metrics:
            raise UsageError(f"--metric must be one that {self._name} returns (it returns {', '.join(metrics)})")
        self.is_better_higher()
        self._done += 1
        return metrics[self.metric]


def _number(value: float) -> str:
    return "NaN" if math.isnan(value) else f"{value:.6g}"


def _text(soup: "Soup", plain: dict[str, Any]) -> str:
    width = terminal_width()
    rows = [
        (printable(one["path"]), _number(one["alone"]), _number(one["joined"]), "yes" if one["kept"] else "no")
        for one in plain["checkpoints"]
    ]
    found = table(("checkpoint", "alone", "soup with it", "kept"), rows, width)
    kept, size_bytes = len(soup.plan.checkpoints), sum(one.size_bytes for one in soup.plan.tensors.values())
    said = [
        ("soup", f"{kept} of {len(rows)} checkpoints: {plain['metric']} {_number(soup.value)}"),
        ("written", printable(f"{plain['output']}, {size(size_bytes)} of {len(soup.plan.names)} tensors")),
    ]
    return f"{found}\n{fields(said, width)}"
