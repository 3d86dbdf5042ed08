"""Processes that are started again after one was killed, at the same master port."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from waiting import END_S

pytestmark = pytest.mark.slow  # processes of several ranks
SCRIPT = ROOT / "tests" / "support" / "restarted_script.py"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(**more: object) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "src"), str(SCRIPT.parent)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **{name: str(one) for name, one in more.items()}}


def ends(folder: Path) -> list[str]:
    return [(folder / f"end{rank}").read_text() for rank in range(2)]


def test_torchrun_with_a_static_master_port_needs_one_restart_for_one_killed_rank(tmp_path) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    launcher += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=END_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists()
    assert ends(tmp_path) == ["4.0", "4.0"]


def test_ranks_without_torchrun_start_again_at_the_port_of_those_that_ended(tmp_path) -> None:
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}

    def start() -> list[int]:
        command = [sys.executable, str(SCRIPT), str(tmp_path)]
        started = [subprocess.Popen(command, env=environment(RANK=rank, **place)) for rank in range(2)]
        return [one.wait(timeout=END_S) for one in started]

    failed, killed = start()
    assert failed > 0
    assert killed < 0
    assert start() == [0, 0]
    assert ends(tmp_path) == ["4.0", "4.0"]
