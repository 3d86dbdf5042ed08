"""Hashes the source of a custom function, since results of another source are not reused."""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any


def named(function: Any) -> Any:
    """Return the object whose name identifies a function across processes: the function itself, or the class.

    Args:
        function: Any callable, such as a ``partial`` or an object with ``__call__``.
    """
    while isinstance(function, partial):
        function = function.func
    return function if hasattr(function, "__qualname__") else type(function)


def source_hash(function: Any) -> str | None:
    """Return a hash of a function's source and of what it uses from its own file; None if there is no source.

    Comments and the layout do not count. What other files define does not count either, nor do the values that the
    function finds when it runs.

    Args:
        function: Any callable.
    """
    function = inspect.unwrap(named(function))
    try:
        text = Path(inspect.getsourcefile(function) or "").read_text(encoding="utf-8")
        root = function.__qualname__.partition(".")[0]
    except (OSError, TypeError, UnicodeDecodeError):
        try:
            text, root = textwrap.dedent(inspect.getsource(function)), None  # a cell of a notebook
        except (OSError, TypeError):
            return None
    try:
        used = _used(ast.parse(text), root)
    except SyntaxError:
        used = text
    return hashlib.sha256(used.encode()).hexdigest()[:16]


def _used(tree: ast.Module, root: str | None) -> str:
    """Return the source of a definition and of the definitions that it uses; of all if ``root`` is not one of them."""
    defined: dict[str, list[ast.AST]] = {}
    for name, node in _definitions(tree.body):
        defined.setdefault(name, []).append(node)
    if root not in defined:
        return ast.unparse(tree)
    found, pending = set[str](), [root]
    while pending:
        name = pending.pop()
        if name in defined and name not in found:
            found.add(name)
            inner = (one for node in defined[name] for one in ast.walk(node))
            pending += [one.id for one in inner if isinstance(one, ast.Name)]
    return "\n".join(ast.unparse(node) for name in sorted(found) for node in defined[name])


def _definitions(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """Yield the names that statements of a file define, those in its ``if`` and ``try`` blocks too."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for one in ast.walk(target):
                    if isinstance(one, ast.Name):
                        yield one.id, node
        else:
            for block in ("body", "orelse", "finalbody"):
                yield from _definitions(getattr(node, block, []))
