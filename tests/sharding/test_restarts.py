"""Processes that are started again after one was killed, at the same master port."""

import socket
from pathlib import Path

import pytest
from launching import restarted
from ranks import processes
from restarted_ranks import communicates
from waiting import END_S

pytestmark = pytest.mark.slow  # processes of several ranks


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ends(folder: Path) -> list[str]:
    return [(folder / f"end{rank}").read_text() for rank in range(2)]


@pytest.mark.filterwarnings("ignore")  # of torch's agent
def test_torchrun_with_a_static_master_port_needs_one_restart_for_one_killed_rank(tmp_path) -> None:
    restarted(communicates, tmp_path, {}, restarts=1, port=free_port())
    assert (tmp_path / "killed").exists()
    assert ends(tmp_path) == ["4.0", "4.0"]


def test_ranks_without_torchrun_start_again_at_the_port_of_those_that_ended(tmp_path) -> None:
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def start() -> list[int | None]:
        started = [
            processes().Process(target=communicates, args=(tmp_path, {"RANK": str(rank), **place})) for rank in range(2)
        ]
        for one in started:
            one.start()
        for one in started:
            one.join(END_S)
        return [one.exitcode for one in started]

    failed, killed = start()
    assert failed > 0
    assert killed < 0
    assert start() == [0, 0]
    assert ends(tmp_path) == ["4.0", "4.0"]
