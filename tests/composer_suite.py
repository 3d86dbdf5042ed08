"""Run MosaicML Composer's own tests against polyak, given a checkout of Composer's repository, and count.

    git clone https://github.com/mosaicml/composer
    python tests/composer_suite.py composer

``test_time.py`` runs with its import changed to ``polyak.time``. None of Composer's files is part of this project.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

# What is meant to differ; docs have a row for each.
DIFFERENT = {
    "test_invalid_math": "== of times in two units is False, not an error: the rest of the test holds",
    "test_time_repr": "the repr is Time(1, 'tok'), which needs one import less",
    "test_set_timestamp": "a timestamp is immutable: copy(epoch_in_iteration=2)",
    "test_timestep_bad_strings": "1.5ep is a time: half-lives may be fractional, intervals may not",
}


def run_time_tests(checkout: Path) -> int:
    """Print what passes, what differs as documented and what fails; return how many fail.

    Args:
        checkout: Of Composer's repository.
    """
    theirs = (checkout / "tests" / "test_time.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "test_time_of_composer.py"
        copy.write_text(theirs.replace("from composer.core.time import", "from polyak.time import"), encoding="utf-8")
        call = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=no", "-p", "no:cacheprovider", str(copy)]
        done = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False)
    outcomes = re.findall(r"^(PASSED|FAILED|ERROR) \S+?::(\w+)", done.stdout, re.MULTILINE)
    if not outcomes:
        raise SystemExit(f"pytest must collect tests from {checkout} (it said: {done.stdout}{done.stderr})")
    counts = Counter(
        "passed" if outcome == "PASSED" else "documented" if name in DIFFERENT else "failed"
        for outcome, name in outcomes
    )
    differing = {name for outcome, name in outcomes if outcome != "PASSED"}
    print(f"test_time.py: {counts['passed']} of {len(outcomes)} pass, {counts['documented']} differ as documented")
    for name in sorted(differing):
        print(f"  {name}: {DIFFERENT.get(name, 'FAILED')}")
    return counts["failed"]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    sys.exit(bool(run_time_tests(Path(sys.argv[1]))))
