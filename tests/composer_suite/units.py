"""Composer's ``test_time.py`` with its import changed to ``polyak.time``, and its ``test_ema.py`` twice: with imports
changed to ``polyak.hosts.composer``, in Composer's own terms, and to ``polyak``, in ours. There a timestamp is
immutable, so the line that sets one of its counters sets a new one.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from .outcomes import HERE, outcomes

# What is meant to differ; docs have a row for each.
DIFFERENT = {
    "test_invalid_math": "== of times in two units is False, not an error: the rest of the test holds",
    "test_time_repr": "the repr is Time(1, 'tok'), which needs one import less",
    "test_set_timestamp": "a timestamp is immutable: copy(epoch_in_iteration=2)",
    "test_timestep_bad_strings": "1.5ep is a time: half-lives may be fractional, intervals may not",
}
TIME = {"from composer.core.time import": "from polyak.time import"}
IN_COMPOSER = {
    "from composer.algorithms import EMA\n": "from polyak.hosts.composer import EMA\n",
    "from composer.algorithms.ema.ema import": "from polyak.hosts.composer import",
}
IN_OURS = IN_COMPOSER | {
    "from composer.algorithms import EMA\n": "from polyak import EMA\n",
    "from composer.core import": "from polyak import",
    "state.timestamp._batch = update_interval": "state.timestamp = Timestamp(batch=update_interval)",
    "state.timestamp._epoch = update_interval": "state.timestamp = Timestamp(epoch=update_interval)",
}


def run(name: str, folder: Path, text: str, changes: Mapping[str, str]) -> int:
    """Print what passes, what differs as documented and what fails; return how many fail.

    Args:
        name: What is run, for the first line.
        folder: Where to run.
        text: Of the test file.
        changes: What to replace in it.
    """
    for one, other in changes.items():
        text = text.replace(one, other)
    copy = folder / "test_of_composer.py"
    copy.write_text(text, encoding="utf-8")
    results = outcomes(folder, copy.name)
    counts = Counter(
        outcome if outcome == "passed" else "documented" if _function(test) in DIFFERENT else "failed"
        for test, outcome in results.items()
    )
    print(f"{name}: {counts['passed']} of {len(results)} pass, {counts['documented']} differ as documented")
    for test in sorted({_function(test) for test, outcome in results.items() if outcome != "passed"}):
        print(f"  {test}: {DIFFERENT.get(test, 'FAILED')}")
    return counts["failed"]


def _function(test: str) -> str:
    return test.rpartition("::")[2].partition("[")[0]


def run_units(checkout: Path) -> int:
    """Run all of them; return how many fail.

    Args:
        checkout: Of Composer's repository.
    """
    tests = checkout / "tests"
    ema = (tests / "algorithms" / "test_ema.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        failed = run("test_time.py", folder, (tests / "test_time.py").read_text(encoding="utf-8"), TIME)
        # Those of EMA import models from `tests.common`, and nothing else of the checkout.
        shutil.copytree(tests / "common", folder / "tests" / "common")
        (folder / "tests" / "__init__.py").touch()
        shutil.copy(HERE / "stand_ins.py", folder)
        shutil.copy(HERE / "ema_conftest.py", folder / "conftest.py")
        failed += run("test_ema.py in Composer", folder, ema, IN_COMPOSER)
        failed += run("test_ema.py in our terms", folder, ema, IN_OURS)
    return failed
