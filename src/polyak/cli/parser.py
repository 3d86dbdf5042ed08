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
_OPTION = re.compile(r"(?<= )(--?[a-z][a-z-]*) (?=[^-\s])")
_WIDEST = 100
_NARROW = 60  # below it, what an option does begins on a line of its own


class Formatter(argparse.HelpFormatter):
    """Wraps sentences and lists at words, and examples as a shell reads them.

    Args:
        prog: The name of the program.
    """

    def __init__(self, prog: str) -> None:
        width = min(terminal_width(), _WIDEST)
        super().__init__(prog, max_help_position=24 if width >= _NARROW else 12, width=width)

    def _format_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Iterable[Any], prefix: str | None
    ) -> str:
        """Return what a command needs; the list below the usage has all options."""
        del usage, groups, prefix
        listed = list(actions)
        words = [str(action.metavar) for action in listed if not action.option_strings]
        words += [f"{one.option_strings[0]} {one.metavar}" for one in listed if one.option_strings and one.required]
        return wrapped(" ".join([self._prog, *words, "[OPTIONS]"]), self._width, first="usage: ") + "\n\n"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"

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
    if field := _FIELD.fullmatch(line):
        indent, name, text = field.groups()
        column = field.start(3)
        if width - column >= len(indent) + 16:
            return wrapped(text, width, first=line[:column])
        return f"{_indented(indent + name, width)}\n{wrapped(text, width, first=f'{indent}    ')}"
    if _COMMAND.match(line):
        return _broken(line.strip(), width)
    indent = line[: len(line) - len(line.lstrip())]
    return wrapped(line.strip(), width, first=indent, rest=f"{indent}  ")


def _broken(command: str, width: int) -> str:
    """Return a command in lines as a shell reads them, each option on the line of its value."""
    kept = _OPTION.sub("\\1\xa0", command)
    if max(map(len, kept.split(" "))) > width - 8:
        kept = command
    *lines, last = wrapped(kept, width - 2, first="  ", rest="      ").replace("\xa0", " ").splitlines()
    return "\n".join([*(f"{line} \\" for line in lines), last])


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
