"""The numbers for the demo's figure. Nothing is drawn here."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from polyak.errors import PolyakError
from polyak.profiles import Profile


class SeriesError(PolyakError, ValueError):
    """A file of metrics is not as ``JSONLinesLogger`` writes it."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric over a run.

    Args:
        batches: The batches at which it was measured, ascending.
        values: The value at each of them.
    """

    batches: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def last(self) -> float:
        """The value at the end."""
        return self.values[-1]


def read_curves(path: Path) -> dict[str, Curve]:
    r"""Return the metrics that a ``JSONLinesLogger`` wrote, by name. Of several values at one batch, the last counts.

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
    """Return the share of each update in the average after the last one. The shares add up to 1.

    The first share is that of the weights with which averaging began.

    Args:
        profile: A ``recursive`` profile.
        moments: The profile's clock at each update, ascending; at least one.

    Example:
        >>> from polyak.profiles import HalfLife
        >>> update_shares(HalfLife("1ba"), [1, 2, 3])
        [0.25, 0.25, 0.5]
    """
    kept = [profile.decay(moment, moments[-1]) for moment in moments]
    return [now - before for before, now in zip([0.0, *kept[:-1]], kept, strict=True)]


def median_update(shares: Sequence[float]) -> int:
    """Return the index of the latest update from which on the shares add up to at least one half.

    Args:
        shares: The shares of the updates, in order.

    Example:
        >>> median_update([0.25, 0.25, 0.5])
        2
    """
    newer = list(accumulate(reversed(shares)))
    behind = next(i for i, share in enumerate(newer) if share >= 0.5 - 1e-12)
    return len(shares) - 1 - behind
