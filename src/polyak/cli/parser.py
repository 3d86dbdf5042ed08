"""The parser of the command line: its help fits the terminal, and its errors say what was perhaps meant."""

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from polyak.cli.command import REFUSED
from polyak.cli.messages import tell
from polyak.cli.output import terminal_width
from polyak.report.columns import wrapped

_COMMAND = re.compile(r"\s+(\$ )?(polyak|torchrun|pip) ")
_FIELD = re.compile(r"( +)(\S+(?: \S+)*) {2,}(\S.*)")
_WIDEST = 100


class Formatter(argparse.HelpFormatter):
    """Wraps sentences and lists at words, and examples as a shell reads them.

    Args:
        prog: The name of the program.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=min(terminal_width(), _WIDEST))

    def _format_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Iterable[Any], prefix: str | None
    ) -> str:
        """Return what a command needs; the list below the usage has all options."""
        del usage, groups, prefix
        listed = list(actions)
        words = [str(action.metavar) for action in listed if not action.option_strings]
        words += [f"{one.option_strings[0]} {one.metavar}" for one in listed if one.option_strings and one.required]
        return wrapped(" ".join([self._prog, *words, "[OPTIONS]"]), self._width, first="usage: ") + "\n\n"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrapped(text, width).splitlines()

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        del indent
        lines, paragraph = list[str](), list[str]()
        for line in [*text.strip().splitlines(), ""]:
            if line and not line.startswith(" "):
                paragraph.append(line)
                continue
            if paragraph:
                lines.append(wrapped(" ".join(paragraph), width))
                paragraph.clear()
            lines.append(_indented(line, width))
        return "\n".join(lines)


def _indented(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    if _COMMAND.match(line):
        *broken, last = wrapped(line.strip(), width - 2, first="  ", rest="      ").splitlines()
        return "\n".join([*(f"{part} \\" for part in broken), last])
    if field := _FIELD.fullmatch(line):
        indent, name, text = field.groups()
        column = field.start(3)
        if width - column >= len(indent) + 16:
            return wrapped(text, width, first=line[:column])
        return f"{indent}{name}\n{wrapped(text, width, first=f'{indent}    ')}"
    indent = line[: len(line) - len(line.lstrip())]
    return wrapped(line.strip(), width, first=indent, rest=f"{indent}  ")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, and name what was perhaps meant."""

    def error(self, message: str) -> NoReturn:
        """Print the error and end the process.

        Args:
            message: What is wrong.
        """
        tell(f"{self.prog}: {message.replace(' -o/--output', ' -o')}; see {self.prog} --help")
        self.exit(REFUSED)

    def unrecognized(self, given: Sequence[str]) -> NoReturn:
        """Print that arguments are unknown, with an option that is similar.

        Args:
            given: The arguments.
        """
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        hint = meant(given[0].partition("=")[0], known) if given[0].startswith("-") else ""
        self.error(f"unrecognized arguments: {' '.join(given)}{hint and f' ({hint})'}")


def meant(given: str, known: Iterable[str]) -> str:
    """Return words for what was perhaps meant; "" if nothing is similar.

    Args:
        given: What was given.
        known: What there is.

    Example:
        >>> meant("swep", ["sweep", "plan"])
        'did you mean sweep?'
    """
    found = difflib.get_close_matches(given, list(known), n=1)
    return f"did you mean {found[0]}?" if found else ""
