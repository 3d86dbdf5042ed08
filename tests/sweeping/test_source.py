"""Results are not reused when the source of the function changes."""

import importlib.util
import sys

import pytest
from records import record

from polyak.errors import PlanWarning
from polyak.sweeping import sweep
from polyak.sweeping.source import source_hash

SCRIPT = """
import math

SCALE = 1.0
OTHER = 2.0


def helper(x):
    return SCALE * x


def unused(x):
    return OTHER * x


class Judge:
    def __call__(self, state):
        return {"loss": helper(1.0)}


def validate(state):
    # a comment
    return {"loss": helper(math.pi)}
"""


def load(path, text):
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("users_script", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["users_script"] = module
    exec(compile(text, str(path), "exec"), vars(module))
    return module


@pytest.fixture(autouse=True)
def _modules():
    yield
    sys.modules.pop("users_script", None)


def changed(tmp_path, old, new, name="validate"):
    """Return whether a change of the script changes the hash of a function."""
    before = source_hash(getattr(load(tmp_path / "script.py", SCRIPT), name))
    assert old in SCRIPT
    return before != source_hash(getattr(load(tmp_path / "script.py", SCRIPT.replace(old, new)), name))


@pytest.mark.parametrize(
    ("old", "new"), [("math.pi", "math.e"), ("SCALE * x", "SCALE + x"), ("SCALE = 1.0", "SCALE = 3.0")]
)
def test_a_change_of_the_function_or_of_what_it_uses_changes_the_hash(tmp_path, old, new) -> None:
    assert changed(tmp_path, old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [("# a comment", "# another"), ("OTHER * x", "x"), ("def unused", "\n\n\ndef unused"), ("2.0", "5.0")],
)
def test_a_change_of_comments_and_of_what_it_does_not_use_does_not(tmp_path, old, new) -> None:
    assert not changed(tmp_path, old, new)


def test_the_hash_of_an_object_is_that_of_its_class(tmp_path) -> None:
    assert changed(tmp_path, "helper(1.0)", "helper(2.0)", "Judge")
    module = load(tmp_path / "script.py", SCRIPT)
    assert source_hash(module.Judge()) == source_hash(module.Judge)
    assert source_hash(len) is None


def test_sweep_evaluates_again_when_the_source_has_changed_or_with_fresh(tmp_path) -> None:
    record(tmp_path / "run", updates=64)
    path = tmp_path / "sweep.jsonl"
    options = {"points": 2, "refine": 0, "results": path}
    validate = load(tmp_path / "script.py", SCRIPT).validate
    first = sweep(tmp_path / "run", validate, **options)
    assert [one.metrics for one in sweep(tmp_path / "run", validate, **options)] == [one.metrics for one in first]
    assert len(path.read_text().splitlines()) == 3
    later = load(tmp_path / "script.py", SCRIPT.replace("math.pi", "math.e")).validate
    with pytest.warns(PlanWarning, match="the source of validate has changed"):
        results = sweep(tmp_path / "run", later, **options)
    assert results[0].metrics != first[0].metrics
    assert len(path.read_text().splitlines()) == 6
    sweep(tmp_path / "run", later, **options, fresh=True)
    assert len(path.read_text().splitlines()) == 9
