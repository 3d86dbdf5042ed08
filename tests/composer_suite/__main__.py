"""Run MosaicML Composer's own tests against polyak, given a checkout of Composer's repository, and count.

    git clone --branch v0.32.1 https://github.com/mosaicml/composer
    python -m tests.composer_suite composer

``test_time.py`` and ``test_ema.py`` run with polyak's classes in place of Composer's. The tests of its ``Trainer`` and
of checkpoints and resumption run three times: as they are, with Composer's own ``EMA`` added to every ``Trainer`` that
a test makes, and with that of ``polyak.hosts.composer``. The exit status is 1 if a test fails that is not documented
as different.

Composer, of the release that is checked out, and boto3 must be installed. What needs a GPU, several processes or a
network is left out; a tiny tokenizer replaces those that Composer's tests download. None of Composer's files is part of
this project.
"""

import argparse
import sys
from pathlib import Path

from .trainers import run_three_times
from .units import run_units


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.composer_suite", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="of Composer's repository")
    parser.add_argument("--processes", type=int, default=2, help="that share the tests of trainers (default 2)")
    parser.add_argument("--only", choices=("units", "trainers"), help="run one of the two parts")
    asked = parser.parse_args()
    failed = 0
    if asked.only != "trainers":
        failed += run_units(asked.checkout)
    if asked.only != "units":
        failed += run_three_times(asked.checkout, asked.processes)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
