"""Processes that a test forks. To start Python and import torch in another process takes two seconds."""

import multiprocessing
import os
from collections.abc import Callable

import pytest
import torch


def forks(test: Callable[..., None]) -> Callable[..., None]:
    """Skip a test where a process cannot be forked, and ignore the warning that it has threads: pytest-xdist's."""
    skip = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks on this system")
    return skip(pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")(test))


def fork(act: Callable[[], object]) -> multiprocessing.Process:
    """Return a forked process that runs ``act`` and exits: with 1 if that raises, with its code if it exits."""

    def run() -> None:
        torch.set_num_threads(1)  # those of OpenMP do not survive a fork
        act()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def in_a_fork(act: Callable[[], object]) -> str:
    """Return what ``act`` raises in a forked process, or nothing."""
    reader, writer = os.pipe()

    def say() -> None:
        said = ""
        try:
            act()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())

    process = fork(say)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    process.join()
    assert process.exitcode == 0
    return said
