"""Run cases in processes of their own, so that a crash is a failure like others; shrink what fails."""

import multiprocessing
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from multiprocessing.connection import Connection, wait

import torch

from .cases import Case, draw, simpler
from .judge import Outcome, judge

_CHUNK = 100  # cases in one process
_HANGS_S = 60
_SHRUNK = 40  # causes of which an example is made smaller

# Forked: nothing has run yet in the process that forks, which takes no time.
_context = multiprocessing.get_context("fork")


class _Worker:
    """A process that runs some cases."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._cases = list(cases)
        self._next = 0
        self._start()

    def _start(self) -> None:
        self.connection, other = _context.Pipe(duplex=False)
        self._process = _context.Process(target=_work, args=(self._cases[self._next :], other), daemon=True)
        self._process.start()
        other.close()
        self.heard_at = time.monotonic()

    def hear(self) -> tuple[Case, Outcome]:
        """Return the next case and how it ended; the process may have died of it."""
        try:
            outcome = self.connection.recv()
        except EOFError:
            self._process.join()
            outcome = Outcome("wrong", f"the process died with exit code {self._process.exitcode}")
        return self._ended(outcome)

    def give_up(self) -> tuple[Case, Outcome]:
        """Kill the process, which has been silent for too long."""
        self._process.kill()
        self._process.join()
        return self._ended(Outcome("wrong", f"the process was silent for {_HANGS_S} s"))

    def _ended(self, outcome: Outcome) -> tuple[Case, Outcome]:
        self._next += 1
        self.heard_at = time.monotonic()
        if self._process.exitcode is not None and not self.done:
            self._start()
        return self._cases[self._next - 1], outcome

    @property
    def done(self) -> bool:
        """Whether all cases have been run."""
        return self._next == len(self._cases)

    def end(self) -> None:
        """Let the process go."""
        self._process.join(5)
        self._process.kill()
        self._process.join()
        self.connection.close()


def _work(cases: Sequence[Case], connection: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is told by its exit code
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # frameworks print
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    for case in cases:
        connection.send(judge(case))
    connection.close()
    os._exit(0)  # at once: there is nothing to tidy up


def outcomes(cases: Iterator[Case], processes: int) -> Iterator[tuple[Case, Outcome]]:
    """Yield how each case ended.

    Args:
        cases: To run.
        processes: To run them in.
    """
    chunks = iter(lambda: list(islice(cases, _CHUNK)), [])
    workers = [_Worker(chunk) for chunk in islice(chunks, processes)]
    while workers:
        ready = wait([worker.connection for worker in workers], timeout=1)
        for worker in list(workers):
            if worker.connection in ready:
                yield worker.hear()
            elif time.monotonic() - worker.heard_at > _HANGS_S:
                yield worker.give_up()
            if worker.done:
                worker.end()
                workers.remove(worker)
                if chunk := next(chunks, None):
                    workers.append(_Worker(chunk))


def alone(case: Case) -> Outcome:
    """Return how a case ends in a process of its own.

    Args:
        case: To run.
    """
    return next(outcomes(iter([case]), 1))[1]


def shrunk(case: Case, cause: str) -> tuple[Case, Outcome]:
    """Return the smallest case that still fails for the same cause, as far as one feature at a time leads.

    Args:
        case: That fails.
        cause: Of its outcome.
    """
    found = alone(case)
    while True:
        for candidate in simpler(case):
            outcome = alone(candidate)
            if outcome.kind == "wrong" and outcome.cause == cause:
                case, found = candidate, outcome
                break
        else:
            return case, found


def _drawn(seed: int, count: int | None, seconds: float | None, loop: str | None) -> Iterator[Case]:
    until = None if seconds is None else time.monotonic() + seconds
    while (count is None or count > 0) and (until is None or time.monotonic() < until):
        yield draw(seed, loop)
        seed, count = seed + 1, None if count is None else count - 1


def run(
    *,
    seed: int,
    count: int | None,
    seconds: float | None,
    loop: str | None,
    processes: int,
    case: str | None,
    shrink: bool,
) -> int:
    """Run cases, print what failed, and return 1 if something did."""
    from polyak.kernels import serving_cpu

    began = time.monotonic()
    cases = iter([Case.parse(case)]) if case else _drawn(seed, count, seconds, loop)
    kinds, refused, failed = Counter[str](), Counter[str](), dict[str, list[tuple[Case, Outcome]]]()
    for ended, outcome in outcomes(cases, processes):
        kinds[outcome.kind] += 1
        if outcome.kind == "wrong":
            failed.setdefault(outcome.cause, []).append((ended, outcome))
        elif outcome.kind == "refused":
            refused[outcome.cause] += 1
    took = time.monotonic() - began
    kernel = serving_cpu()[0]
    print(f"kernel {kernel}: {kinds.total()} cases in {took:.0f} s, {kinds.total() / took:.0f}/s: {dict(kinds)}")
    for said, number in refused.most_common():
        print(f"  refused {number} x {said}")
    for n, (cause, examples) in enumerate(sorted(failed.items(), key=lambda item: -len(item[1]))):
        _report(cause, examples, details=bool(case), shrink=shrink and n < _SHRUNK)
    return int(bool(failed))


def _report(cause: str, examples: Sequence[tuple[Case, Outcome]], *, details: bool, shrink: bool) -> None:
    case, outcome = examples[0]
    if shrink and not details:
        case, outcome = shrunk(case, cause)
    seeds = ", ".join(str(ended.seed) for ended, _ in examples[:5])
    print(f"\n{len(examples)} x {outcome.said.strip()[:400]}\n  seeds {seeds}\n  --case '{case}'")
    if details:
        print(outcome.trace)
    sys.stdout.flush()
