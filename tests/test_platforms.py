"""The core works where the system lacks what Linux has. ``tests/support/hidden_platform.py`` says what is hidden."""

import os

import pytest
import warm
from paths import ROOT

LACKS = {
    "no file locks, no fork and no compiled kernel, as on Windows": (
        "fcntl fork library",
        ["averaging/test_ema_surface.py", "record/test_recorder.py", "storage", "training/test_loop.py"],
    ),
    "no OpenMP in torch, as on macOS": ("openmp", ["averaging/test_ema_surface.py", "tensors/test_fingerprint.py"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("system", LACKS)
def test_tests_of_the_core_pass_on_a_system_with(system) -> None:
    hidden, files = LACKS[system]
    options = ["-p", "hidden_platform", "-q", "-n0", "-m", "not slow"]
    command = ["-m", "pytest", *options, *(f"tests/{file}" for file in files)]
    paths = [str(ROOT / "tests/support"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"HIDDEN": hidden, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("POLYAK_KERNEL", None)
    done = warm.run(*command, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
