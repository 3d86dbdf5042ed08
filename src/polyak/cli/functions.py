"""Imports the custom functions that commands take."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polyak.cli.command import UsageError, UserCodeError
from polyak.cli.parser import meant

_SHOWN = 10  # functions, in an error


def load_function(spec: str, option: str) -> Callable[..., Any]:
    """Import a custom function.

    Args:
        spec: ``FILE.py:FUNCTION`` or ``package.module:FUNCTION``.
        option: The option that gives it, for error messages.

    Raises:
        UsageError: If the module cannot be imported, or has no such function.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise UsageError(f"{option} must be FILE.py:FUNCTION or package.module:FUNCTION (got {spec!r})")
    try:
        module = _load_file(Path(source), option) if source.endswith(".py") else _load_module(source)
    except UsageError:
        raise
    except Exception as error:  # the file can raise anything
        raise UserCodeError(f"{option}: {source} cannot be imported: {last_line(error)}; correct it") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [one for one, value in vars(module).items() if callable(value) and not one.startswith("_")]
        hint = meant(name, known)
        own = sorted(one for one in known if getattr(vars(module)[one], "__module__", None) == module.__name__)
        listed = ", ".join(own[:_SHOWN]) + (", ..." if own[_SHOWN:] else "")
        raise UsageError(
            f"{option}: there is no function {name!r} in {source}{hint and f' ({hint})'}; it has {listed or 'none'}"
        )
    return function


def load_batchnorm(spec: str) -> Any:
    """Return the model and the batches that a custom function returns, for ``--update-bn``.

    Args:
        spec: As for ``load_function``.

    Raises:
        UsageError: If there is no such function, or it returns something else.
    """
    function = load_function(spec, "--update-bn")
    try:
        found = function()
    except Exception as error:  # the function can raise anything
        raise UserCodeError(
            f"--update-bn: the function must return a model and batches when it is called without arguments "
            f"({last_line(error)}); change it"
        ) from error
    if not (isinstance(found, tuple) and len(found) == 2):
        raise UsageError(
            f"--update-bn: the function must return a model and batches (got a {type(found).__name__}); change it"
        )
    return found


def last_line(error: BaseException) -> str:
    """Return the kind of an error and its message, as a traceback ends.

    Args:
        error: The error of a function of the user.
    """
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _load_file(path: Path, option: str) -> Any:
    if not path.is_file():
        raise UsageError(f"{option}: there is no file {path}")
    path = path.resolve()
    name = f"polyak_user_{path.stem}"
    if name in sys.modules and sys.modules[name].__file__ == str(path):
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.path.insert(0, str(path.parent))  # the file can import its neighbours, as when it is run
    sys.modules[name] = module
    try:
        specification.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_module(name: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)
