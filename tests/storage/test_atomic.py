"""Safe writes: complete or as it was, on the disk, and nothing temporary left."""

import errno
import os
import signal
from pathlib import Path

import pytest
from forking import fork, forks

from polyak.storage import atomic
from polyak.storage.atomic import put, remove, remove_whole, replacing, temporary_path


class Refused(BaseException):
    """Stands for anything that ends a block, Ctrl-C included."""


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def test_a_file_replaces_the_old_one_when_its_block_ends(tmp_path) -> None:
    (tmp_path / "a").write_text("old")
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
        assert content(tmp_path) == {"a": "old", temporary.name: "new"}
    assert content(tmp_path) == {"a": "new"}


def test_a_folder_appears_when_its_block_ends(tmp_path) -> None:
    with replacing(tmp_path / "in" / "a", folder=True) as temporary:
        (temporary / "x").write_text("new")
        assert not (tmp_path / "in" / "a").exists()
    assert content(tmp_path) == {"in/a/x": "new"}


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Refused])
def test_an_error_in_the_block_leaves_what_was_there_and_nothing_temporary(tmp_path, folder, error) -> None:
    (tmp_path / "a").write_text("old")

    def write() -> None:
        with replacing(tmp_path / "a", folder=folder) as temporary:
            (temporary / "x" if folder else temporary).write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert content(tmp_path) == {"a": "old"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("folder", [False, True])
def test_content_is_flushed_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch, folder) -> None:
    calls, fsync, rename = [], os.fsync, Path.replace
    final = tmp_path / "a"

    def flushed(descriptor: int) -> None:
        calls.append(("flush", Path(f"/proc/self/fd/{descriptor}").resolve()))
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        calls.append(("rename", target))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    with replacing(final, folder=folder) as temporary:
        (temporary / "x" if folder else temporary).write_text("new")
    files = [temporary / "x", temporary] if folder else [temporary]
    assert calls == [*(("flush", path) for path in files), ("rename", final), ("flush", tmp_path)]


@pytest.mark.parametrize("call", [1, 2])
def test_a_disk_that_refuses_leaves_the_old_file_and_nothing_temporary(tmp_path, monkeypatch, call) -> None:
    (tmp_path / "a").write_text("old")
    calls = 0

    def refuse(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(Path, "replace", refuse)

    def write() -> None:
        with replacing(tmp_path / "a") as temporary:
            temporary.write_text("new")

    with pytest.raises(OSError, match="No space"):
        write()
    assert content(tmp_path) == {"a": "old"}


def test_a_folder_that_cannot_be_flushed_after_the_rename_is_no_error(tmp_path, monkeypatch) -> None:
    def refuse(_: Path) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(atomic, "flush_folder", refuse)
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert content(tmp_path) == {"a": "new"}


def test_a_folder_with_content_is_replaced_only_where_that_is_asked_for(tmp_path) -> None:
    for name in ("a", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    with pytest.raises(OSError, match="not empty"):
        put(tmp_path / "new", tmp_path / "a")
    put(tmp_path / "new", tmp_path / "a", over_folder=True)
    assert content(tmp_path) == {"a/x": "new"}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_take_the_place_of_another_leaves_that_one(tmp_path, monkeypatch) -> None:
    for name in ("a", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    rename = Path.replace

    def refuse(path: Path, target: Path) -> Path:
        if path == tmp_path / "new":
            raise Refused
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(Refused):
        put(tmp_path / "new", tmp_path / "a", over_folder=True)
    assert content(tmp_path) == {"a/x": "a", "new/x": "new"}


def test_an_empty_folder_is_replaced(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    with replacing(tmp_path / "a", folder=True) as temporary:
        (temporary / "x").write_text("new")
    assert content(tmp_path) == {"a/x": "new"}


def test_a_temporary_link_is_not_followed(tmp_path) -> None:
    (tmp_path / "precious").write_text("mine")
    temporary_path(tmp_path / "a").symlink_to(tmp_path / "precious")
    with replacing(tmp_path / "a", exclusive=True) as temporary:
        temporary.write_text("new")
    assert content(tmp_path) == {"a": "new", "precious": "mine"}


def test_writers_without_a_lock_have_temporary_names_of_their_own(tmp_path) -> None:
    assert temporary_path(tmp_path / "a", process=1) != temporary_path(tmp_path / "a", process=2)
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("")
        assert str(os.getpid()) in temporary.name


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127])
def test_a_name_of_the_greatest_length_can_be_written(tmp_path, name) -> None:
    with replacing(tmp_path / name) as temporary:
        temporary.write_text("new")
    assert content(tmp_path) == {name: "new"}


def test_remove_deletes_files_links_and_folders_and_accepts_what_is_absent(tmp_path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").touch()
    for name in ("file", "link", "folder", "absent"):
        remove(tmp_path / name)
    assert list(tmp_path.iterdir()) == [kept]


def test_remove_whole_takes_the_name_away_before_the_content(tmp_path, monkeypatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").touch()

    def interrupt(_: Path) -> None:
        raise Refused

    with monkeypatch.context() as patches:
        patches.setattr(atomic.shutil, "rmtree", interrupt)
        with pytest.raises(Refused):
            remove_whole(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == [".a.tmp"]
    remove_whole(tmp_path / "a")


@forks
def test_what_a_killed_writer_left_is_recognizable_and_overwritten_by_the_next(tmp_path) -> None:
    def write() -> None:
        with replacing(tmp_path / "a", exclusive=True) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    (tmp_path / "a").write_text("old")
    killed = fork(write)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert content(tmp_path) == {"a": "old", ".a.tmp": "half"}
    with replacing(tmp_path / "a", exclusive=True) as temporary:
        temporary.write_text("new")
    assert content(tmp_path) == {"a": "new"}
