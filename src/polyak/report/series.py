"""What a report shows, as plain numbers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from polyak.errors import PolyakError
from polyak.profiles import Profile


class SeriesError(PolyakError, ValueError):
    """A file that holds no numbers to be shown."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric in the course of a run.

    Args:
        batches: When it was measured, rising.
        values: What was measured, one for each.
    """

    batches: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def last(self) -> float:
        """The value at the end."""
        return self.values[-1]


def read_curves(path: Path) -> dict[str, Curve]:
    r"""Return the metrics that a ``JSONLinesLogger`` wrote, by name. Of several at one batch the last counts.

    Args:
        path: The file.

    Raises:
        SeriesError: If a line is not a JSON object with a ``"batch"``.
        OSError: If the file cannot be read.

    Example:
        >>> path = Path("metrics.jsonl")
        >>> _ = path.write_text('{"batch": 10, "eval/loss": 2.5}\n{"batch": 20, "eval/loss": 2.0}\n')
        >>> read_curves(path)["eval/loss"]
        Curve(batches=(10, 20), values=(2.5, 2.0))
    """
    found = dict[str, dict[int, float]]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            metrics = json.loads(line)
            batch = int(metrics.pop("batch"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SeriesError(
                f'line {number} of {path} must be a JSON object with a "batch" (got {line[:60]!r}); remove the line'
            ) from None
        for name, value in metrics.items():
            found.setdefault(name, {})[batch] = float(value)
    return {
        name: Curve(tuple(sorted(values)), tuple(values[batch] for batch in sorted(values)))
        for name, values in found.items()
    }


def update_shares(profile: Profile, moments: Sequence[float]) -> list[float]:
    """Return how much each update counts in the average after the last one. The shares add up to 1.

    The first is the weights with which averaging began.

    Args:
        profile: One that is ``recursive``.
        moments: When the updates were, by the profile's clock; rising. At least one.

    Example:
        >>> from polyak.profiles import HalfLife
        >>> update_shares(HalfLife("1ba"), [1, 2, 3])
        [0.25, 0.25, 0.5]
    """
    kept = [profile.decay(moment, moments[-1]) for moment in moments]
    return [now - before for before, now in zip([0.0, *kept[:-1]], kept, strict=True)]


def median_update(shares: Sequence[float]) -> int:
    """Return the index of the update since which at least half of the average came.

    Args:
        shares: Of the updates, in order.

    Example:
        >>> median_update([0.25, 0.25, 0.5])
        2
    """
    newer = list(accumulate(reversed(shares)))
    behind = next(i for i, share in enumerate(newer) if share >= 0.5 - 1e-12)
    return len(shares) - 1 - behind
