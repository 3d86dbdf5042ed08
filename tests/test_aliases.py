"""Names from before modules moved still import, and say where they are now."""

import importlib
import sys

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
