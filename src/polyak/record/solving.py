"""Computes the coefficients of stored averages in an average under any profile, and the error of that average.

Each stored average has a cumulative profile: the share of it that is of the weights up to a moment. A combination of
them has the combination of these. The coefficients make that nearest to the profile that is asked for, which is the
best linear prediction if the weights are a random walk. Karras et al., 2024, https://arxiv.org/abs/2312.02696,
appendix C, compare densities instead, for power functions alone: the best if weights were independent of each other.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from polyak.errors import PlanWarning, ProfileError, TimeError
from polyak.profiles import PowerFunction, Profile, Uniform, named
from polyak.record.basis import Basis, basis_of
from polyak.record.fitting import MISSING_SHARE, Fit
from polyak.record.stored import StoredAverage
from polyak.time import Time, TimeUnit

# Above this error, relative to |last weights - average|, an average is refused: what is left of it is a guess.
MOST_ERROR = 0.25
_EXACT = 1e-6
# In the place of the rounding of the files where a combination that is exact is looked for.
_TINY = 1e-13
# What is lost by rounding that is not worth to be stated, and how much more of it is accepted for the right profile.
_ROUNDED, _LITTLE = 1e-3, 1.02
# Points of a segment at which ``Fit.profile`` is given.
_POINTS = 32


@dataclass(frozen=True, slots=True)
class StoredFit(Fit):
    """A combination of stored averages, compared with the profile that was asked for.

    Args:
        solved: The coefficient of each average.
        residual: The error, relative to |last weights - average|, if the weights were a random walk with equal steps.
        max_duration: The length of the run.
    """

    solved: tuple[float, ...] = ()
    residual: float = 0.0
    curve: Tensor | None = None
    max_duration: Time | None = None

    @property
    def coefficients(self) -> list[float]:
        """The weight of each average. Their sum is 1, less the share of the raw weights."""
        return [(1 - self.raw) * one for one in self.solved]

    @property
    def expected_error(self) -> float:
        """The error, relative to |last weights - average|, if the weights were a random walk with equal steps."""
        return self.residual

    @property
    def remedy(self) -> str:
        """What makes the error smaller in another run."""
        return "save checkpoints more often, or record the run with a Recorder"


def fit_stored(
    profile: Profile, averages: Sequence[StoredAverage], at: Time | str | int | None, max_duration: Time | None
) -> StoredFit:
    """Return the coefficients of stored averages, with the data for their errors.

    Args:
        profile: Its clock starts where the record does.
        averages: Oldest first.
        at: The moment of the average, that of a checkpoint; None for the last.
        max_duration: The length of the run; needed for times in ``dur``.

    Raises:
        ProfileError: If the averages do not give the profile, within the limit of its error.
        TimeError: If no checkpoint was saved at ``at``.
    """
    used = _until(tuple(averages), at, max_duration)
    basis = basis_of(used, max_duration)
    readings = basis.readings(profile.unit)
    placed, raw = named(profile).placed([one - readings[0] for one in readings])
    curve, missing = _target(placed, basis)
    solved, residual = _solve(used, basis, curve)
    shown = named(profile).describe()
    if not residual <= MOST_ERROR:
        raise ProfileError(
            f"an average must be within {MOST_ERROR:.0%} of its distance from the last weights (the {len(used)} "
            f"checkpoints give {shown} with an error of about {residual:.0%}); ask for a longer average, or average "
            "checkpoints by polyak average, which states no error"
        )
    if missing > MISSING_SHARE:
        warnings.warn(
            f"{missing:.1%} of the average under {shown} are weights from before the first checkpoint: they are left "
            "out, as HalfLife(..., unbiased=True) leaves them out by itself",
            PlanWarning,
            stacklevel=4,
        )
    mixed = solved @ basis.profiles
    cumulative = _at_edges(used, basis, mixed)
    return StoredFit(
        used,
        _shown(used, basis, curve),
        cumulative,
        missing,
        raw,
        tuple(solved.tolist()),
        residual,
        curve,
        max_duration,
    )


def error_of(fitted: StoredFit, products: Sequence[Sequence[float]]) -> float:
    """Estimate the error of an average, in units of |last weights - average|.

    It is an estimate and not a bound, from how far neighbors among the stored averages are from each other.

    Args:
        fitted: What `fit_stored` returned.
        products: For each two pairs of neighbors, the inner product of their differences.

    Returns:
        The error; 0 if the stored averages give the profile exactly, else infinite if there is a single one.
    """
    if fitted.is_exact:
        return 0.0
    if len(fitted.segments) == 1 or fitted.curve is None:
        return math.inf
    averages = _stored(fitted)
    basis = basis_of(averages, fitted.max_duration)
    between = torch.tensor(products, dtype=torch.float64)[: len(averages) - 1, : len(averages) - 1]
    variances = _variances(basis, between)
    solved, curve = torch.tensor(fitted.solved, dtype=torch.float64), fitted.curve
    local = variances[basis.intervals] * basis.weights
    error = float((local * (curve - solved @ basis.profiles).square()).sum())
    error += float((variances[basis.intervals] * basis.weights).sum() * (solved * _rounding(averages)).square().sum())
    # The average differs from the newest that is stored by steps between neighbors ...
    steps = solved.cumsum(0)[:-1]
    distance = float(steps @ between @ steps)
    # ... and the last weights from that by the steps that it lags behind.
    lag = basis.profiles[-1]
    distance += max(0.0, float((local * (2 * curve * lag - lag.square())).sum()))
    if error <= 0:
        return 0.0
    return math.sqrt(error / distance) if distance > 0 else math.inf


def _stored(fitted: StoredFit) -> tuple[StoredAverage, ...]:
    return tuple(one for one in fitted.segments if isinstance(one, StoredAverage))


def _until(
    averages: tuple[StoredAverage, ...], at: Time | str | int | None, max_duration: Time | None
) -> tuple[StoredAverage, ...]:
    if at is None:
        return averages
    moment = Time.from_input(at, TimeUnit.BATCH)
    ends = [one.end.clock(moment.unit, max_duration) for one in averages]
    found = [i for i, end in enumerate(ends) if math.isclose(end, moment.value, rel_tol=1e-9)]
    if not found:
        near = sorted(sorted(set(ends), key=lambda end: abs(end - moment.value))[:3])
        raise TimeError(
            f"an average must end at a checkpoint (got at={moment}): near it are "
            f"{', '.join(Time(end, moment.unit).to_timestring() for end in near)}"
        )
    return averages[: found[-1] + 1]


def _target(profile: Profile, basis: Basis) -> tuple[Tensor, float]:
    """Return the cumulative profile at the points of the basis, and its share from before the record."""
    unit = profile.unit
    stands = unit is not None and len({edge.clock(unit, basis.max_duration) for edge in basis.edges}) == 1
    if stands and (isinstance(profile, PowerFunction) or (isinstance(profile, Uniform) and not profile.since.value)):
        unit = None  # they are the same in each unit that advances evenly
    clock = basis.clock(unit)
    begin, now, share = clock[0], clock[-1] - clock[0], 1.0
    values = [1.0]
    for later, earlier in pairwise(reversed(clock)):
        before, after = max(0.0, min(earlier - begin, now)), max(0.0, later - begin)
        share = share * profile.decay(before, after) if profile.recursive else profile.decay(before, now)
        values.append(share)
    missing = values[-1]
    if missing < -_EXACT:
        raise ProfileError(
            f"a profile must not subtract weights from before the first checkpoint (got {missing:.1%} of them under "
            f"{profile}); use another profile"
        )
    if not missing < 1:
        raise ProfileError(f"{profile} must give weight to the record (got all weight before it): use a shorter one")
    return (torch.tensor(values[::-1], dtype=torch.float64) - missing) / (1 - missing), missing


def _rounding(averages: Sequence[StoredAverage]) -> Tensor:
    """Return what the files lose by rounding, assuming that the weights moved over the run by as much as their norm."""
    return torch.tensor([one.rounding for one in averages], dtype=torch.float64)


@lru_cache(maxsize=16)
def _factors(averages: tuple[StoredAverage, ...], max_duration: Time | None, exact: bool) -> tuple[Tensor, Tensor]:
    """Return Q and R of the equations for all coefficients but the last, which follows from their sum.

    Below the points there is a row for each coefficient: large ones would amplify what was lost by rounding.
    """
    basis, count = basis_of(averages, max_duration), len(averages) - 1
    lost = torch.full((count + 1,), _TINY, dtype=torch.float64) if exact else _rounding(averages).clamp(min=_TINY)
    differences = (basis.profiles[:-1] - basis.profiles[-1]) * basis.weights.sqrt()
    rows = torch.cat([differences.T, torch.diag(lost[:-1]), -lost[-1] * torch.ones(1, count, dtype=torch.float64)])
    factors = torch.linalg.qr(rows)
    return factors[0], factors[1]


def _solve(averages: tuple[StoredAverage, ...], basis: Basis, curve: Tensor) -> tuple[Tensor, float]:
    """Return the coefficients and the expected error, rounding of the files included."""
    size = float((basis.weights * curve.square()).sum())
    lost = _rounding(averages)

    def solved(*, exact: bool) -> tuple[Tensor, float, float]:
        count = len(averages) - 1
        found = torch.ones(len(averages), dtype=torch.float64)
        if count:
            q, r = _factors(averages, basis.max_duration, exact)
            last = _TINY if exact else float(lost[-1].clamp(min=_TINY))
            right = (curve - basis.profiles[-1]) * basis.weights.sqrt()
            right = torch.cat([right, torch.zeros(count, dtype=torch.float64), torch.tensor([-last])])
            found[:-1] = torch.linalg.solve_triangular(r, (q.T @ right).unsqueeze(1), upper=True).squeeze(1)
            found[-1] = 1 - found[:-1].sum()
        residual = float((basis.weights * (curve - found @ basis.profiles).square()).sum())
        return found, residual, float((found * lost).square().sum())

    found, residual, amplified = solved(exact=True)
    if residual / size < _EXACT**2 and amplified / size < _ROUNDED**2:
        return found, math.sqrt(residual / size)
    other = solved(exact=False)
    if amplified + residual > _LITTLE**2 * (other[1] + other[2]):
        found, residual, amplified = other
    return found, math.sqrt((residual + amplified) / size)


def _variances(basis: Basis, between: Tensor) -> Tensor:
    """Return the variance of the walk in each interval, over all numbers, for steps over as long a time as the run."""
    differences = basis.profiles.diff(dim=0).square() * basis.weights
    whole = differences.sum(dim=1)
    found = torch.where(whole > 0, between.diagonal() / whole.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    count = len(basis.edges) - 1
    # How much of what two neighbors differ by is of an interval, and a little of all for those that none is of.
    shares = torch.zeros(len(whole), count, dtype=torch.float64)
    shares.index_add_(1, basis.intervals, differences)
    shares = shares / whole.clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(1) + 1e-9
    shares = shares * (whole > 0).unsqueeze(1)
    return (found @ shares) / shares.sum(dim=0).clamp(min=torch.finfo(torch.float64).tiny)


def _at_edges(averages: Sequence[StoredAverage], basis: Basis, curve: Tensor) -> tuple[float, ...]:
    """Return a cumulative profile where the record starts and at the end of each average."""
    by_edge = {edge: float(curve[i]) for edge, i in zip(basis.edges, basis.edge_at.tolist(), strict=True)}
    return (by_edge[averages[0].start], *(by_edge[one.end] for one in averages))


def _shown(averages: Sequence[StoredAverage], basis: Basis, curve: Tensor) -> tuple[tuple[float, ...], ...]:
    """Return ``Fit.profile``: evenly spaced values in each segment, and two equal ones for other averages of it."""
    shown, before = list[tuple[float, ...]](), None
    values = curve.tolist()
    at = basis.at.tolist()
    for one in averages:
        if one.end == before:
            shown.append((shown[-1][-1],) * 2)
            continue
        before = one.end
        start, end = one.start.updates, one.end.updates
        evenly = [start + (end - start) * i / _POINTS for i in range(_POINTS + 1)]
        shown.append(tuple(_interpolated(at, values, evenly)))
    return tuple(shown)


def _interpolated(at: Sequence[float], values: Sequence[float], points: Sequence[float]) -> list[float]:
    xs, ys = torch.tensor(at, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    wanted = torch.tensor(points, dtype=torch.float64)
    right = torch.searchsorted(xs, wanted).clamp(1, len(at) - 1)
    share = (wanted - xs[right - 1]) / (xs[right] - xs[right - 1])
    return (ys[right - 1] + share * (ys[right] - ys[right - 1])).tolist()
