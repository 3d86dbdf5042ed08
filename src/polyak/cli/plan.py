"""Show what averaging would do with each tensor of a model, and why.

MODEL is a function or a class that returns the model when it is called without arguments. Nothing is trained, and
nothing is written.
"""

from argparse import ArgumentParser, Namespace

from polyak.cli.command import Answer, UsageError, UserCodeError
from polyak.cli.functions import last_line, load_function
from polyak.cli.output import table, terminal_width, written
from polyak.printable import printable

NAME = "plan"

JSON = {
    "tensors": "a list with an object for each tensor: name, shape, dtype, decision, reason",
    "counts": "how many tensors there are of each decision",
}

_EPILOG = """\
examples:
  polyak plan train.py:build_model
  polyak plan torchvision.models:resnet18
  polyak plan train.py:build_model --json

in Python, the same is
  print(EMA("1000ba").plan(model))
"""


def configure(parser: ArgumentParser) -> None:
    """Add the arguments.

    Args:
        parser: The parser of this command.
    """
    parser.epilog = _EPILOG
    parser.add_argument("model", metavar="MODEL", help="FILE.py:FUNCTION or package.module:FUNCTION")


def run(arguments: Namespace) -> Answer:
    """Return the plan.

    Args:
        arguments: The parsed arguments.

    Raises:
        UsageError: If the function cannot be called without arguments, or does not return a module.
        PolyakError: If two tensors of the model overlap partly.
    """
    from torch import nn

    from polyak.averaging.plan import plan

    build = load_function(arguments.model, "MODEL")
    try:
        model = build()
    except Exception as error:  # the function can raise anything
        raise UserCodeError(
            f"MODEL must return a model when it is called without arguments ({last_line(error)})"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"MODEL must return a torch.nn.Module (got {type(model).__name__})")
    found = plan(model)
    *lines, total = str(found).splitlines()
    width = terminal_width()
    if any(len(line) > width for line in lines):
        cells = [
            (row.name, "x".join(map(str, row.shape)) or "-", str(row.dtype).removeprefix("torch."), row.decision)
            for row in found
        ]
        rows = [[*map(printable, line), printable(row.reason)] for line, row in zip(cells, found, strict=True)]
        text = table(["tensor", "shape", "dtype", "decision", "reason"], rows, width, text=4)
    else:
        text = "\n".join(map(printable, lines))
    counts: dict[str, int] = {}
    for row in found:
        counts[row.decision] = counts.get(row.decision, 0) + 1
    tensors = [
        {"name": r.name, "shape": list(r.shape), "dtype": str(r.dtype), "decision": r.decision, "reason": r.reason}
        for r in found
    ]
    return Answer(f"{text}\n{written(total)}".strip(), {"tensors": tensors, "counts": counts})
