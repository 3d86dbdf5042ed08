"""Run MosaicML Composer's own tests against polyak, given a checkout of Composer's repository, and count.

    git clone https://github.com/mosaicml/composer
    PYTHONPATH=tests/stubs python tests/composer_suite.py composer

``test_time.py`` runs with its import changed to ``polyak.time``; ``test_ema.py`` with its imports changed to
``polyak.hosts.composer``, in Composer's own terms, and to ``polyak``, in ours: there a timestamp is immutable, so the
line that sets one of its counters sets a new one. Composer must be installed. None of its files is part of this
project.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

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
# In place of Composer's own, which downloads tokenizers and sets up what these tests do not use.
CONFTEST = """
import os
import sys
from types import SimpleNamespace

import pytest

sys.path.insert(0, os.getcwd())

import composer.models.huggingface
from tests.common import SimpleModel
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from polyak import Time
from polyak.algorithm import NoLogger

# It imports every model that there is, some of which want a torchvision.
composer.models.huggingface._is_registered_causal_lm = lambda model: False
config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=64)
with open("vocab.txt", "w") as file:
    file.write("\\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
pytest.tiny_bert_model = BertForMaskedLM(config)
pytest.tiny_bert_tokenizer = BertTokenizerFast("vocab.txt")


@pytest.fixture
def minimal_state(request):
    if request.module.Event.__module__.startswith("polyak"):
        return SimpleNamespace(model=None, timestamp=None, max_duration=Time(100, "ep"))
    from composer.core import State
    from composer.devices import DeviceCPU
    return State(model=SimpleModel(), run_name="run", device=DeviceCPU(), rank_zero_seed=0, max_duration="100ep")


@pytest.fixture
def empty_logger():
    return NoLogger()
"""


def run(name: str, folder: Path, text: str, changes: Mapping[str, str], conftest: str = "") -> int:
    """Print what passes, what differs as documented and what fails; return how many fail.

    Args:
        name: What is run, for the first line.
        folder: Where to run.
        text: Of the test file.
        changes: What to replace in it.
        conftest: Next to it, if it needs one.
    """
    for one, other in changes.items():
        text = text.replace(one, other)
    copy = folder / "test_of_composer.py"
    copy.write_text(text, encoding="utf-8")
    (folder / "conftest.py").write_text(conftest, encoding="utf-8")
    call = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=line", "-p", "no:cacheprovider", copy.name]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False)
    outcomes = re.findall(r"^(PASSED|FAILED|ERROR) \S+?::(\w+)", done.stdout, re.MULTILINE)
    if not outcomes:
        raise SystemExit(f"pytest must collect the tests of {name} (it said: {done.stdout}{done.stderr})")
    counts = Counter(
        "passed" if outcome == "PASSED" else "documented" if name in DIFFERENT else "failed"
        for outcome, name in outcomes
    )
    differing = {name for outcome, name in outcomes if outcome != "PASSED"}
    print(f"{name}: {counts['passed']} of {len(outcomes)} pass, {counts['documented']} differ as documented")
    for test in sorted(differing):
        print(f"  {test}: {DIFFERENT.get(test, 'FAILED')}")
    return counts["failed"]


def run_all(checkout: Path) -> int:
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
        failed += run("test_ema.py in Composer", folder, ema, IN_COMPOSER, CONFTEST)
        failed += run("test_ema.py in our terms", folder, ema, IN_OURS, CONFTEST)
    return failed


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    sys.exit(bool(run_all(Path(sys.argv[1]))))
