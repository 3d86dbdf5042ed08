"""Show what averaging would do with each tensor of a model, and why.

MODEL is a function or a class that returns the model when it is called without arguments. Nothing is trained, and
nothing is written.
"""

import json
import traceback
from argparse import ArgumentParser, Namespace

from torch import nn

from polyak.averaging.plan import plan
from polyak.cli.command import UsageError
from polyak.cli.functions import load_function
from polyak.cli.output import say

NAME = "plan"

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
    parser.add_argument("--json", action="store_true", help="print a JSON list with an object for each tensor")


def run(arguments: Namespace) -> int:
    """Print the plan.

    Args:
        arguments: The parsed arguments.

    Raises:
        UsageError: If the function cannot be called without arguments, or does not return a module.
        PolyakError: If two tensors of the model overlap partly.
    """
    build = load_function(arguments.model, "MODEL")
    try:
        model = build()
    except Exception as error:  # the function can raise anything
        last = traceback.format_exception_only(error)[-1].strip()
        raise UsageError(f"MODEL must return a model when it is called without arguments ({last})") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"MODEL must return a torch.nn.Module (got {type(model).__name__})")
    found = plan(model)
    if arguments.json:
        rows = [
            {"name": r.name, "shape": list(r.shape), "dtype": str(r.dtype), "decision": r.decision, "reason": r.reason}
            for r in found
        ]
        print(json.dumps(rows, indent=1))
    else:
        for line in str(found).splitlines():
            say(line)
    return 0
