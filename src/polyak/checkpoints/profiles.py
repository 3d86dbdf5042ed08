"""The weights of checkpoints under a profile."""

from collections.abc import Sequence
from itertools import pairwise

from polyak.errors import ProfileError
from polyak.profiles import Profile


def weights_at(profile: Profile, times: Sequence[float]) -> list[float]:
    """Return the weight of each checkpoint under a profile. They sum to 1.

    A checkpoint stands for the time since the one before it. The first stands for as much time as the second, so that
    it counts no more than others: equal distances and a very long half-life give equal weights.

    Args:
        profile: Any. Without a unit it counts checkpoints.
        times: When the checkpoints were saved, in the profile's unit, in increasing order.

    Raises:
        ProfileError: If the times do not increase, or the profile gives no checkpoint any weight.

    Example:
        >>> from polyak import HalfLife
        >>> [round(weight, 3) for weight in weights_at(HalfLife("10ba"), [10, 20, 30])]
        [0.143, 0.286, 0.571]
    """
    if any(after <= before for before, after in pairwise(times)):
        raise ProfileError(f"the times of checkpoints must increase (got {[*times]}); leave out those saved twice")
    if len(times) == 1:
        return [1.0]
    begin = max(0.0, 2 * times[0] - times[1])
    shares = [profile.decay(time, times[-1]) for time in (begin, *times)]  # of what was in the average at these times
    weights = [after - before for before, after in pairwise(shares)]
    total = sum(weights)
    if not total > 0:
        raise ProfileError(f"a profile must give some checkpoint a weight ({profile} gives none at {[*times]})")
    return [weight / total for weight in weights]
