"""Names from before modules moved still import, and say where they are now."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import polyak

MOVED = {
    "batchnorm": ["update_bn"],
    "ema": ["EMA", "compute_ema"],
    "posthoc": ["Record"],
    "recorder": ["Recorder"],
    "select": ["Policy", "default_policy"],
}


@pytest.mark.parametrize("module", MOVED)
def test_a_module_that_moved_imports_with_a_deprecation_warning(module: str) -> None:
    sys.modules.pop(f"polyak.{module}", None)
    with pytest.warns(DeprecationWarning, match=f"polyak.{module} has moved: import from polyak"):
        old = importlib.import_module(f"polyak.{module}")
    for name in MOVED[module]:
        assert getattr(old, name) is getattr(polyak, name)


def test_segments_of_a_record_have_their_old_names_too() -> None:
    from polyak.record import Segment, Stretch

    assert Stretch is Segment


@pytest.mark.parametrize(("name", "module"), [("dispatch", "polyak.algorithm"), ("State", "polyak.events")])
def test_a_name_for_writers_of_integrations_has_moved_and_says_where(name: str, module: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"polyak\.{name} has moved: import it from {module}"):
        assert getattr(polyak, name) is getattr(importlib.import_module(module), name)
    assert name not in polyak.__all__


# The public names


def typed_imports() -> dict[str, str]:
    """Return the module of each name that ``polyak/__init__.py`` imports for type checkers."""
    tree = ast.parse(Path(polyak.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))  # that for type checkers
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_each_public_name_is_what_type_checkers_see() -> None:
    imports = typed_imports()
    assert sorted(imports) == sorted(polyak.__all__)
    for name, module in imports.items():
        assert getattr(polyak, name) is getattr(importlib.import_module(module), name), name
    assert polyak.__all__[:2] == ["attach", "EMA"]
    assert set(polyak.__all__) <= set(dir(polyak))


@pytest.mark.slow
def test_polyak_imports_what_is_read_and_no_more() -> None:
    code = """
import sys, polyak
assert polyak.__version__ and "torch" not in sys.modules
from polyak import EMA, attach
loaded = {name for name in sys.modules if name.startswith(("polyak.trainer", "polyak.report", "polyak.record"))}
assert not loaded, loaded
import polyak.errors
from polyak import *
assert Trainer is polyak.Trainer and polyak.record.Record is Record
try:
    polyak.absent
except AttributeError as error:
    assert "has no attribute 'absent'" in str(error)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
