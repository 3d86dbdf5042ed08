"""The cumulative profiles of stored averages at points of the run, over which integrals are computed as sums."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from polyak.errors import ProfileError
from polyak.profiles import Profile
from polyak.record.manifest import Edge
from polyak.record.stored import StoredAverage
from polyak.time import Time, TimeUnit

# How many parts an interval between two moments is divided into, and how many of the points of one are where, for
# an integral of Gauss. Profiles are smooth between the moments, and steepest just before one.
_MOST_PARTS, _LEAST_PARTS = 16, 2
_ALL_PARTS = 1024
_MOST_HALVINGS = 12
_NODES = (-0.8611363115940526, -0.3399810435848563, 0.3399810435848563, 0.8611363115940526)
_WEIGHTS = (0.34785484513745385, 0.6521451548625461, 0.6521451548625461, 0.34785484513745385)
# The logarithm of the smallest number above 0: of what an average has forgotten.
_FORGOTTEN = -745.0


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """Stored averages on a grid of the run. The edges of intervals are on it with weight 0.

    Args:
        edges: The distinct moments, from the start of the record.
        at: Updates at each point, in order.
        weights: For sums over the points that are integrals over the run; they sum to 1.
        intervals: For each point the number of its interval; for an edge that of the interval before it.
        edge_at: For each edge, the number of its point.
        profiles: For each average, its cumulative profile at each point.
        max_duration: The length of the run, which times in ``dur`` refer to.
    """

    edges: tuple[Edge, ...]
    at: Tensor
    weights: Tensor
    intervals: Tensor
    edge_at: Tensor
    profiles: Tensor
    max_duration: Time | None

    def clock(self, unit: TimeUnit | None) -> list[float]:
        """Return the reading of a clock at each point, by linear interpolation between the edges.

        Args:
            unit: The unit of the clock; None for updates.
        """
        return clock_at(self.edges, self.at, unit, self.max_duration).tolist()

    def readings(self, unit: TimeUnit | None) -> list[float]:
        """Return the reading of a clock at each edge.

        Args:
            unit: The unit of the clock; None for updates.
        """
        return [edge.clock(unit, self.max_duration) for edge in self.edges]


@lru_cache(maxsize=16)
def basis_of(averages: tuple[StoredAverage, ...], max_duration: Time | None) -> Basis:
    """Return the basis of some averages; the same object again for the same averages.

    Args:
        averages: Oldest first.
        max_duration: As for ``Basis``.

    Raises:
        ProfileError: If a clock that a profile needs stands still.
    """
    edges = [averages[0].start]
    edges += [one.end for i, one in enumerate(averages) if i == 0 or one.end != averages[i - 1].end]
    parts = max(_LEAST_PARTS, min(_MOST_PARTS, _ALL_PARTS // len(edges)))
    at, weights, intervals, edge_at = [float(edges[0].updates)], [0.0], [0], [0]
    for i, edge in enumerate(edges[1:]):
        start, length = edges[i].updates, edge.updates - edges[i].updates
        for begin, width in _cells(float(length), parts, first=i == 0):
            at += [start + begin + width * (1 + node) / 2 for node in _NODES]
            weights += [width * weight / 2 for weight in _WEIGHTS]
            intervals += [i] * len(_NODES)
        at.append(float(edge.updates))
        weights.append(0.0)
        intervals.append(i)
        edge_at.append(len(at) - 1)
    points = torch.tensor(at, dtype=torch.float64)
    scaled = torch.tensor(weights, dtype=torch.float64) / (edges[-1].updates - edges[0].updates)
    profiles = _curves(averages, edges, points, max_duration)
    return Basis(tuple(edges), points, scaled, torch.tensor(intervals), torch.tensor(edge_at), profiles, max_duration)


def _cells(length: float, parts: int, *, first: bool) -> list[tuple[float, float]]:
    """Divide an interval evenly, then its last part, and in the first interval also its first part, again and again."""
    width = length / parts
    halvings = min(_MOST_HALVINGS if parts == _MOST_PARTS else parts, max(0, int(math.log2(max(1.0, width)))))
    cells = [(i * width, width) for i in range(int(first), parts - 1)]
    left = [(0.0, width * 0.5**halvings), *((width * 0.5**i, width * 0.5**i) for i in range(halvings, 0, -1))]
    right = [(length - begin - size, size) for begin, size in reversed(left)]
    return [*(left if first else ()), *cells, *right]


def clock_at(edges: Sequence[Edge], at: Tensor, unit: TimeUnit | None, max_duration: Time | None) -> Tensor:
    """Return the readings of a clock, by linear interpolation between edges.

    Args:
        edges: The edges, in order.
        at: Updates.
        unit: The unit of the clock; None for updates.
        max_duration: The length of the run, for ``dur``.

    Raises:
        ProfileError: If the clock stands still.
    """
    if unit is None:
        return at.clone()
    readings = [edge.clock(unit, max_duration) for edge in edges]
    if not readings[-1] > readings[0]:
        raise ProfileError(
            f"a profile must have a clock that advances (the checkpoints do not say their time in {unit}); use another "
            "unit, or give their times to Record.from_checkpoints"
        )
    updates = torch.tensor([float(edge.updates) for edge in edges], dtype=torch.float64)
    values = torch.tensor(readings, dtype=torch.float64)
    right = torch.searchsorted(updates, at).clamp(1, len(edges) - 1)
    share = (at - updates[right - 1]) / (updates[right] - updates[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])


def _curves(averages: Sequence[StoredAverage], edges: Sequence[Edge], at: Tensor, max_duration: Time | None) -> Tensor:
    """Return the share of each average that comes from the weights up to each point."""
    logs = dict[tuple[Profile, float], tuple[Tensor, Tensor]]()
    curves = torch.zeros(len(averages), len(at), dtype=torch.float64)
    for curve, one in zip(curves, averages, strict=True):
        if one.profile is None:
            curve.copy_(at >= one.end.updates)
            continue
        key = one.profile, one.origin
        if key not in logs:
            clock = (clock_at(edges, at, one.profile.unit, max_duration) - one.origin).clamp(min=0.0)
            logs[key] = clock, _log_shares(one.profile, clock.tolist())
        clock, shares = logs[key]
        last = one.end.clock(one.profile.unit, max_duration) if one.last is None else one.last
        end = torch.tensor([last - one.origin], dtype=torch.float64)
        curve.copy_((shares - _at(clock, shares, end)).clamp(max=0.0).exp())
    return curves


def _log_shares(profile: Profile, clock: list[float]) -> Tensor:
    """Return the logarithm of an average's share at the last point; at any other it differs by a constant factor."""
    logs = [0.0]
    for i in range(len(clock) - 1, 0, -1):
        decay = profile.decay(clock[i - 1], clock[i])
        logs.append(logs[-1] + (max(math.log(decay), _FORGOTTEN) if decay > 0 else _FORGOTTEN))
    return torch.tensor(logs[::-1], dtype=torch.float64)


def _at(clock: Tensor, values: Tensor, point: Tensor) -> Tensor:
    right = torch.searchsorted(clock, point).clamp(1, len(clock) - 1)
    width = clock[right] - clock[right - 1]
    share = torch.where(width > 0, (point - clock[right - 1]) / width, torch.ones_like(width)).clamp(0, 1)
    return values[right - 1] + share * (values[right] - values[right - 1])
