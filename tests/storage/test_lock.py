"""One writer at a time, on systems with ``flock`` and without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from polyak.storage import lock
from polyak.storage.lock import Lock


class BusyError(Exception):
    pass


class ForeignError(Exception):
    pass


@pytest.fixture(params=["flock", "no flock"])
def system(request, monkeypatch):
    """Run a test with ``fcntl``, and as on a system that has none."""
    if request.param == "no flock":
        monkeypatch.setattr(lock, "fcntl", None)
    return request.param


def take(path: Path) -> Lock:
    return Lock(path, BusyError)


def own(path: Path) -> Lock:
    return Lock(path, BusyError, ForeignError)


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("kind", ["folder", "file", "lock file"])
def test_a_lock_excludes_a_second_writer_until_it_is_released(tmp_path, kind) -> None:
    path = tmp_path / "it"
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("results")
    make = own if kind == "lock file" else take
    held = make(path)
    for _ in range(2):
        with pytest.raises(BusyError, match=f"process {os.getpid()}" if kind == "lock file" else "another process"):
            make(path)
    held.release()
    held.release()
    make(path).release()
    assert kind != "file" or path.read_text() == "results"


def test_a_folder_is_locked_where_folders_cannot_be_opened(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    folder, opened = tmp_path / "it", os.open

    def only_files(path, *arguments):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", only_files)
    folder.mkdir()
    held = take(folder)
    with pytest.raises(BusyError):
        take(folder)
    assert held.is_in_place
    held.release()
    take(folder).release()
    folder.rmdir()
    assert not held.is_in_place


@pytest.mark.usefixtures("system")
def test_a_lock_that_nobody_released_ends_with_its_object(tmp_path) -> None:
    held = own(tmp_path / "lock")
    del held
    own(tmp_path / "lock").release()


@pytest.mark.usefixtures("system")
def test_a_lock_knows_whether_its_file_is_in_place(tmp_path) -> None:
    held = own(tmp_path / "lock")
    assert held.is_own
    assert held.is_in_place
    (tmp_path / "lock").unlink()
    assert not held.is_in_place
    (tmp_path / "lock").touch()
    assert not held.is_in_place


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("kind", ["symlink", "hard link", "content"])
def test_a_file_that_is_no_lock_is_refused_and_left_as_it_is(tmp_path, kind) -> None:
    path, precious = tmp_path / "lock", tmp_path / "precious"
    precious.write_text("mine")
    {
        "symlink": lambda: path.symlink_to(precious),
        "hard link": lambda: path.hardlink_to(precious),
        "content": lambda: path.write_text("mine"),
    }[kind]()
    with pytest.raises(ForeignError):
        own(path)
    assert precious.read_text() == path.read_text() == "mine"


WITHOUT = """
import os, sys
sys.modules["fcntl"] = None
from pathlib import Path
from polyak.storage.lock import Lock
held = Lock(Path(sys.argv[1]), RuntimeError, RuntimeError)
if len(sys.argv) > 2:
    os._exit(0)  # as if killed
"""


def without_fcntl(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_without_fcntl_a_process_that_ends_frees_its_lock_and_for_a_killed_one_the_error_says_what_to_delete(
    tmp_path, monkeypatch
) -> None:
    for arguments in ((), ("killed",)):  # the second takes what the first has freed
        done = without_fcntl(tmp_path / "lock", *arguments)
        assert done.returncode == 0, done.stderr
    mark = tmp_path / ".lock.held"
    said = without_fcntl(tmp_path / "lock").stderr
    assert f"(if it was killed, delete {mark})" in said
    mark.unlink()
    monkeypatch.setattr(lock, "fcntl", None)
    own(tmp_path / "lock").release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_neither_owns_nor_releases_the_lock(tmp_path) -> None:
    held = Lock(tmp_path / "lock", BusyError, ForeignError)
    if not (child := os.fork()):
        held.release()
        os._exit(10 + held.is_own)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 10
    with pytest.raises(BusyError):
        own(tmp_path / "lock")
    held.release()
