"""The arguments of commands that evaluate averages with a custom function."""

from argparse import ArgumentParser


def add_evaluation(parser: ArgumentParser, *, required: bool) -> None:
    """Add ``--evaluate``, and which metric decides.

    Args:
        parser: The parser of a command.
        required: Whether the function must be given.
    """
    parser.add_argument(
        "--evaluate",
        required=required,
        metavar="FUNCTION",
        help="FILE.py:FUNCTION or package.module:FUNCTION; as for polyak sweep",
    )
    parser.add_argument("--metric", metavar="NAME", help="the metric that decides (default: the first)")
    sense = parser.add_mutually_exclusive_group()
    sense.add_argument(
        "--minimize", action="store_true", help="lower is better (default for a loss, an error, a perplexity)"
    )
    sense.add_argument("--maximize", action="store_true", help="higher is better, as for an accuracy")


def add_ranks(parser: ArgumentParser) -> None:
    """Add how the ranks of ``torchrun`` evaluate.

    Args:
        parser: The parser of a command.
    """
    parser.add_argument(
        "--together",
        action="store_true",
        help="under torchrun: evaluate each average on all ranks together, as a model needs that is sharded over them "
        "(default: found from the function)",
    )
