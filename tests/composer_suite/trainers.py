"""Composer's Trainer and checkpoint tests: as they are, with Composer's own EMA in every Trainer, with polyak's."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from .outcomes import HERE, outcomes

# Resumption is in tests/trainer/test_checkpoint.py and test_fsdp_checkpoint.py.
FOLDERS = ("tests/trainer", "tests/checkpoint")
# Not run in any configuration.
LEFT_OUT = {
    "tests/trainer/test_trainer.py::TestNoTrainDataTrained::test_empty_train_dataloader": "never ends, with no EMA too",
}
WITHOUT, COMPOSERS, POLYAKS = CONFIGURATIONS = ("no EMA", "Composer's EMA", "polyak's EMA")
KINDS = ("passed", "failed", "error", "skipped")

_ONE_USE = "load_weights_only is for use and loads the average, and after fit() the model has its training weights"
_PART = "training weights are part of the average's state, which is loaded here: leave out state/algorithms too"
_LOADING = "tests.trainer.test_checkpoint.TestCheckpointLoading::"
# What passes without an EMA and is meant to fail with polyak's; docs/hosts/composer.md has these differences.
DIFFERENT = {
    f"{_LOADING}test_load_weights[True-True-cpu]": _ONE_USE,
    f"{_LOADING}test_load_weights[False-True-cpu]": _ONE_USE,
    f"{_LOADING}test_load_ignore_keys[state/model/*-False-True-True]": _PART,
    f"{_LOADING}test_save_ignore_keys[state/model/*-False-True-True]": _PART,
}
MARKERS = ("gpu", "doctest", "daily", "remote")
SETTINGS = "\n".join(
    [
        "[pytest]",
        f'addopts = -m "{" and ".join(f"not {marker}" for marker in MARKERS)}"',
        "markers =",
        *(f"    {marker}" for marker in (*MARKERS, "world_size(size)")),
        "",
    ]
)


def run_three_times(checkout: Path, processes: int) -> int:
    """Run the tests in each configuration and print what becomes of them; return how many fail by polyak's fault.

    Args:
        checkout: Of Composer's repository.
        processes: That share the tests.
    """
    if find_spec("boto3") is None:
        raise SystemExit("Composer's tests of checkpoints import boto3: pip install boto3")
    print(f"{' and '.join(FOLDERS)}, half-life 10ba:")
    for test, reason in LEFT_OUT.items():
        print(f"  left out: {test}: {reason}")
    print(f"  {'':15}" + "".join(f"{kind:>9}" for kind in KINDS), flush=True)
    results = {name: _run(checkout, name, processes) for name in CONFIGURATIONS}
    _print_losses(COMPOSERS, _lost(results, COMPOSERS), {})
    lost = _lost(results, POLYAKS)
    _print_losses(POLYAKS, lost, DIFFERENT)
    return len(set(lost) - DIFFERENT.keys())


def _run(checkout: Path, name: str, processes: int) -> Mapping[str, str]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(checkout / "tests", folder / "tests")
        (folder / "pytest.ini").write_text(SETTINGS, encoding="utf-8")
        plugins = ("stand_ins", "in_every_trainer")
        for plugin in plugins:
            shutil.copy(HERE / f"{plugin}.py", folder)
        arguments = [f"-p{plugin}" for plugin in plugins] + [f"--deselect={test}" for test in LEFT_OUT]
        result = outcomes(folder, *arguments, f"-n{processes}", *FOLDERS, EMA_IN_EVERY_TRAINER=name)
    counts = Counter(result.values())
    print(
        f"  {name:15}" + "".join(f"{counts[kind]:9}" for kind in ("passed", "failed", "error", "skipped")), flush=True
    )
    return result


def _lost(results: Mapping[str, Mapping[str, str]], name: str) -> list[str]:
    with_it = results[name]
    return [test for test, outcome in results[WITHOUT].items() if outcome == "passed" != with_it.get(test)]


def _print_losses(name: str, lost: list[str], reasons: Mapping[str, str]) -> None:
    print(f"{len(lost)} pass with no EMA and do not with {name}:")
    for test in lost:
        print(f"  {test}" + (f": {reasons.get(test, 'FAILED')}" if name == POLYAKS else ""))
