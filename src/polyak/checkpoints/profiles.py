"""The weights of checkpoints under a profile."""

from collections.abc import Sequence
from itertools import pairwise

from polyak.errors import ProfileError
from polyak.profiles import Profile, named


def weights_at(profile: Profile, times: Sequence[float]) -> list[float]:
    """Return the weight of each checkpoint under a profile. They sum to 1.

    A checkpoint stands for the time since the one before it. The first stands for as much time as the second, so that
    it counts no more than others: equal distances and a very long half-life give equal weights. The floor of a cooldown
    is the share of the newest checkpoint besides.

    Args:
        profile: Any. Without a unit it counts checkpoints.
        times: When the checkpoints were saved, in the profile's unit, in increasing order.

    Raises:
        ProfileError: If the times do not increase, or the profile gives no checkpoint any weight, or subtracts some.

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
    placed, newest = named(profile).placed([begin, *times])
    shares = [placed.decay(time, times[-1]) for time in (begin, *times)]  # of what was in the average at these times
    if any(after < before for before, after in pairwise([0.0, *shares])):
        raise ProfileError(
            f"a profile of checkpoints must not subtract weights (got {profile}, which does at {[*times]}); take it "
            "from a record, or use another profile"
        )
    weights = [after - before for before, after in pairwise(shares)]
    total = sum(weights)
    if not total > 0:
        raise ProfileError(f"a profile must give some checkpoint a weight ({profile} gives none at {[*times]})")
    weights = [(1 - newest) * weight / total for weight in weights]
    return [*weights[:-1], weights[-1] + newest]
