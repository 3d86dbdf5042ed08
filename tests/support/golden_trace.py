"""The golden trace in ``docs/golden-trace.md``: one run in Composer's ``Trainer`` and in ours, event by event.

    PYTHONPATH=tests/stubs python tests/support/golden_trace.py --write

Without ``--write`` it prints the tables.
"""

import itertools
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import loops
import torch
from paths import ROOT
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import polyak

PAGE = ROOT / "docs" / "golden-trace.md"
BEGIN, END = "<!--- table of {} -->", "<!--- end of the table -->"
RUNS: Mapping[str, Mapping[str, Any]] = {
    "a half-life": {"half_life": "4ba", "update_interval": "1ba"},
    "a smoothing and a late start": {"half_life": None, "smoothing": 0.9, "update_interval": "1ba", "ema_start": "2ba"},
}
DURATION, BATCHES = "2ep", 2
TOLERANCE = 2e-6  # of values as printed, on any machine

# Events that polyak alone has, and the one state that differs: where it does, and why. The page says more.
ONLY_POLYAKS = dict.fromkeys(["save_start", "save_end"], "polyak's own events")
LEFT_IN = "Composer leaves the average in"
LEFT_IN_AT = {
    "batch_checkpoint",
    "epoch_checkpoint",
    "epoch_start",
    "before_dataloader",
    "after_dataloader",
    "fit_end",
}


@dataclass(frozen=True)
class Seen:
    """What a trainer is like at an event.

    Attributes:
        event: Its name.
        clock: Epochs and batches.
        moves: How often the average has changed.
        decay: Of the last update, if there was one.
        model: The first weight in the model.
        average: The average of it, if averaging has begun.
        holds: Which weights the model holds.
    """

    event: str
    clock: str
    moves: int
    decay: float | None
    model: float
    average: float | None
    holds: str

    @property
    def cells(self) -> list[str]:
        return [_text(value) for value in astuple(self)[2:]]

    def agrees(self, other: "Seen") -> bool:
        """Return whether all is the same, and the numbers to how they are printed."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return all(
            abs(a - b) <= TOLERANCE if isinstance(a, float) and isinstance(b, float) else a == b for a, b in pairs
        )


def _text(value: object) -> str:
    return "-" if value is None else f"{value:.6f}" if isinstance(value, float) else str(value)


class Watch:
    """Keeps what a trainer is like at each event; a callback in either passes the events on to it."""

    def __init__(
        self, ema: Any, average: Callable[[Any, nn.Module], float | None], decay: Callable[[Any], Any]
    ) -> None:
        self.seen = list[Seen]()
        self._ema, self._average, self._decay = ema, average, decay

    def look(self, event: str, state: Any) -> None:
        average = self._average(self._ema, state.model)
        before = self.seen[-1] if self.seen else None
        moved = before is not None and before.average not in (None, average)
        moves = (before.moves if before else 0) + moved
        self.seen.append(
            Seen(
                event=event,
                clock=f"ep{int(state.timestamp.epoch)} ba{int(state.timestamp.batch)}",
                moves=moves,
                decay=self._decay(self._ema) if moves else None,
                model=_first(state.model),
                average=average,
                holds="average" if self._ema.ema_weights_active else "training",
            )
        )


def _first(model: nn.Module) -> float:
    return next(iter(model.parameters())).flatten()[0].item()


def _options(folder: Path) -> dict[str, Any]:
    return {
        "train_dataloader": DataLoader(loops.dataset(BATCHES), batch_size=loops.BATCH),
        "eval_dataloader": DataLoader(loops.dataset(1, seed=5), batch_size=loops.BATCH),
        "max_duration": DURATION,
        "save_folder": str(folder),
        "save_interval": "1ep",
        "progress_bar": False,
    }


def in_composers(folder: Path, options: Mapping[str, Any]) -> list[Seen]:
    """Train in Composer's trainer with its own EMA; return what was seen.

    Args:
        folder: For its checkpoints.
        options: Of the EMA.
    """
    import composer
    from composer.algorithms import EMA
    from composer.models import ComposerClassifier

    def average(ema: Any, model: nn.Module) -> float | None:
        if not ema.ema_started:
            return None
        if ema.ema_weights_active:
            return _first(model)
        return next(iter(ema.ema_model.named_parameters_dict.values())).flatten()[0].item()

    ema = EMA(**options)
    watch = Watch(ema, average, lambda ema: ema.smoothing)

    class Passes(composer.Callback):
        def run_event(self, event: Any, state: Any, logger: Any) -> None:
            watch.look(event.value, state)

    model = ComposerClassifier(loops.perceptron(), num_classes=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trained = composer.Trainer(
        model=model,
        algorithms=[ema],
        optimizers=optimizer,
        callbacks=[Passes()],
        device="cpu",
        **_options(folder),
    )
    trained.fit()
    for saver in trained.state.callbacks:
        if isinstance(saver, composer.callbacks.CheckpointSaver):
            saver.tmp_dir_for_symlink.cleanup()  # which Composer leaves to the end of Python
    return watch.seen


def in_polyaks(folder: Path, options: Mapping[str, Any]) -> list[Seen]:
    """Train in polyak's trainer with ``polyak.EMA``; return what was seen.

    Args:
        folder: For its checkpoints.
        options: Of the EMA.
    """

    def average(ema: polyak.EMA, model: nn.Module) -> float | None:
        return _first(ema.ema_model) if ema.ema_model is not None else None

    ema = polyak.EMA(**options)
    watch = Watch(ema, average, lambda ema: ema.metrics()["ema/decay"])

    class Passes(polyak.Callback):
        def run_event(self, event: polyak.Event, state: Any, logger: Any) -> None:
            watch.look(event.value, state)

    model = loops.perceptron()
    polyak.Trainer(
        model,
        algorithms=ema,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.5),
        loss=cross_entropy,
        callbacks=[Passes()],
        **_options(folder),
    ).fit()
    return watch.seen


@dataclass(frozen=True)
class Row:
    """What was seen at an event by both, or by the one that has it."""

    composers: Seen | None
    polyaks: Seen | None

    @property
    def agrees(self) -> bool:
        return self.composers is not None and self.polyaks is not None and self.composers.agrees(self.polyaks)

    @property
    def reason(self) -> str:
        """Why they differ, or nothing where they do not or no reason is known."""
        if self.composers is None or self.polyaks is None:
            return ONLY_POLYAKS.get(self.polyaks.event, "") if self.polyaks else ""
        theirs, ours = self.composers, self.polyaks
        left_in = theirs.event in LEFT_IN_AT and (theirs.holds, ours.holds) == ("average", "training")
        # But for what is in the model, all must be the same.
        same = replace(theirs, model=ours.model, holds=ours.holds).agrees(ours)
        return LEFT_IN if left_in and same else ""


def rows(options: Mapping[str, Any]) -> list[Row]:
    """Train in both; return event by event what was seen, side by side.

    Args:
        options: Of the EMA.
    """
    torch.set_num_threads(1)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # Composer's own
        theirs = in_composers(Path(folder) / "composer", options)
        ours = in_polyaks(Path(folder) / "polyak", options)
    return list(_side_by_side(theirs, ours))


def _side_by_side(theirs: list[Seen], ours: list[Seen]) -> Iterator[Row]:
    left, right = iter(theirs), iter(ours)
    one, other = next(left, None), next(right, None)
    while one or other:
        takes_one = one is not None and (other is None or other.event not in ONLY_POLYAKS)
        takes_other = other is not None and (not takes_one or (one is not None and one.event == other.event))
        yield Row(one if takes_one else None, other if takes_other else None)
        one = next(left, None) if takes_one else one
        other = next(right, None) if takes_other else other


HEAD = ["event", "clock", *(["moves", "decay", "model", "average", "holds"] * 2), "why they differ"]


def table(made: list[Row]) -> list[str]:
    """Return the lines of the table: Composer's five columns, then polyak's.

    Args:
        made: The rows.
    """
    cells = [HEAD]
    for row in made:
        seen = row.composers or row.polyaks
        assert seen is not None
        both = [one.cells if one else [""] * 5 for one in (row.composers, row.polyaks)]
        cells.append([seen.event, seen.clock, *both[0], *both[1], row.reason])
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEAD))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def on_page(name: str) -> list[str]:
    """Return the lines of a run's table as the page has them.

    Args:
        name: Of the run.
    """
    inside = PAGE.read_text().partition(BEGIN.format(name))[2].partition(END)[0]
    return [line for line in inside.strip().splitlines() if not line.startswith("```")]


def write() -> None:
    """Put the tables into the page."""
    page = PAGE.read_text()
    for name, options in RUNS.items():
        before, begin, rest = page.partition(BEGIN.format(name))
        lines = "\n".join(["", "", "```text", *table(rows(options)), "```", "", ""])
        page = before + begin + lines + END + rest.partition(END)[2]
    PAGE.write_text(page)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write()
    else:
        print("\n".join(itertools.chain.from_iterable(["", name, *table(rows(RUNS[name]))] for name in RUNS)))
