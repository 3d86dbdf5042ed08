"""A program that is forked from a process with torch does what it does in a new one (see ``support/warm.py``)."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm

PROGRAM = """
import atexit, os, sys

def put(text):
    print(text, file=sys.stderr)

if __name__ == "__main__":
    atexit.register(put, "at exit")
    print(sys.argv[1:], sys.path, os.getcwd(), os.environ["ONE"], "PYTHONHOME" in os.environ)
    assert sys.modules["__main__"].put is put
    put(sorted(name for name in sys.modules if name.startswith("polyak")))
    sys.exit(int(sys.argv[1]))
"""
ENVIRONMENT = {"ONE": "\u00e4", "PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parent), "PYTHONUTF8": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("form", [["-c", PROGRAM], ["-m", "program"], ["program.py"]], ids=lambda form: form[0])
@pytest.mark.parametrize("status", [0, 3])
def test_a_forked_program_does_what_it_does_in_a_new_interpreter(tmp_path, form, status) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [*form, str(status), "two words"]
    forked = warm.run(*command, cwd=tmp_path, env=ENVIRONMENT)
    new = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert forked.returncode == new.returncode
    assert forked.stdout == new.stdout
    assert forked.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]


def test_a_forked_program_that_raises_has_status_1_and_a_traceback() -> None:
    done = warm.run("-c", "import torch\n1 / 0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith('  File "<string>", line 2, in <module>\nZeroDivisionError: division by zero\n')


def test_a_forked_program_ends_by_a_signal_with_its_number() -> None:
    process = warm.Process("-c", "import time\ntime.sleep(600)")
    assert process.poll() is None
    process.kill()
    assert process.communicate() == ("", "")
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_the_forked_command_has_the_streams_and_the_status_of_polyak(tmp_path) -> None:
    command = "echo a | polyak env --json | tail -n 1; polyak --version; polyak unknown"
    environment = os.environ | {"PATH": f"{warm.folder()}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout.startswith("}\npolyak ")
    assert done.stderr.startswith("polyak: COMMAND must be ")
