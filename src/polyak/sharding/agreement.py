"""Facts that ranks compare in small messages, and the error that shows where they differ.

Ranks that agree exchange one digest. Others exchange digests of buckets of facts, then the facts in the buckets that
differ. So messages do not grow with the number of facts, and the error grows neither with that nor with the world size.
"""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from polyak.errors import ShardingError

if TYPE_CHECKING:
    from polyak.sharding.communicator import Ranks

# By the path of its names, the value of each fact as text.
Facts = dict[tuple[str, ...], str]
# For each fact that is sent, the digest of its value and the text that is shown.
Sent = dict[tuple[str, ...], tuple[int, str]]

MOST_FACTS = 8
# In larger groups only rank 0 shows what differs: thousands of equal errors would hide it.
_MOST_SHOWING = 16
_MOST_VALUES = 4
_MOST_RUNS = 12
_HEAD, _TAIL = 140, 60
_NOTHING = "nothing"
# The number of buckets for facts with one name, which come first in an error, and for those in mappings.
_BUCKETS_OF_ONE, _BUCKETS = 64, 4096


def flat(facts: Mapping[str, Any], *above: str) -> Facts:
    """Return facts by the path of their names, each as text.

    Args:
        facts: By name; a fact may itself be a mapping.
        *above: Names of the mappings that this one is in.

    Example:
        >>> flat({"updates": 3, "tensors": {"weight": (2, 1)}})
        {('updates',): '3', ('tensors', 'weight'): '(2, 1)'}
    """
    found = Facts()
    for name, fact in facts.items():
        if isinstance(fact, Mapping):
            found |= flat(fact, *above, name)
        else:
            found[*above, name] = _NOTHING if fact is None else str(fact)
    return found


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def digest(facts: Facts) -> int:
    """Return a number that is the same for the same facts in any order.

    Args:
        facts: As of ``flat``.
    """
    return _digest("\n".join("\n".join((*path, facts[path])) for path in sorted(facts)))


def _bucket(path: tuple[str, ...]) -> int:
    code = zlib.crc32("\n".join(path).encode())
    return code % _BUCKETS_OF_ONE if len(path) == 1 else _BUCKETS_OF_ONE + code % (_BUCKETS - _BUCKETS_OF_ONE)


def digests(facts: Facts) -> Tensor:
    """Return a digest for each bucket of facts; where two ranks differ in a fact, they differ in its bucket.

    Args:
        facts: As of ``flat``.
    """
    sums = [0] * _BUCKETS
    for path, value in facts.items():
        sums[_bucket(path)] ^= _digest(f"{path}={value}")
    return torch.tensor(sums, dtype=torch.int64)


def in_buckets(facts: Facts, buckets: Sequence[int]) -> Sent:
    """Return the facts in some buckets, to be sent, with long values shortened in the middle.

    Args:
        facts: As of ``flat``.
        buckets: Their numbers.
    """
    wanted = frozenset(buckets)
    return {path: (_digest(value), _shortened(value)) for path, value in facts.items() if _bucket(path) in wanted}


def _shortened(value: str) -> str:
    return value if len(value) <= _HEAD + _TAIL else f"{value[:_HEAD]} ... {value[-_TAIL:]}"


def refuse(ranks: "Ranks", what: str, own: Facts, remedy: str) -> NoReturn:
    """Raise the error of ranks whose digests differ. A collective: all ranks must call it.

    Args:
        ranks: The ranks that do not agree.
        what: What they must agree on.
        own: The facts of this rank, as of ``flat``.
        remedy: What to do about it; empty if the facts say it.

    Raises:
        ShardingError: It shows which rank has which value.
    """
    buckets = ranks.differing(digests(own))
    found = ranks.gather_to_rank_0(in_buckets(own, buckets[:MOST_FACTS]))
    members = torch.distributed.get_process_group_ranks(ranks.group)
    if ranks.world_size > _MOST_SHOWING and ranks.rank > 0:
        raise ShardingError(f"all ranks must agree on {what}: see the error of rank {members[0]}")
    lines = differences(found, members) if ranks.rank == 0 else []
    if ranks.world_size <= _MOST_SHOWING:
        lines = ranks.from_rank_0(lines)
    if hidden := len(buckets[MOST_FACTS:]):
        lines.append(f"  and at least {hidden} more")
    raise ShardingError("\n".join([f"all ranks must agree on {what}:", *lines, *([remedy] if remedy else [])]))


def differences(sent: Sequence[Sent], ranks: Sequence[int]) -> list[str]:
    """Return a line for each fact in which ranks differ.

    Args:
        sent: What each rank sent.
        ranks: The number of each rank, to be shown.

    Example:
        >>> differences([{("a",): (1, "x")}, {("a",): (1, "x")}, {}], [4, 5, 6])
        ['  a: rank 6: nothing; ranks 4, 5: x']
    """
    lines = list[str]()
    for path in sorted({path for one in sent for path in one}, key=lambda path: (len(path) > 1, path)):
        who = dict[tuple[int, str] | None, list[int]]()
        for rank, one in zip(ranks, sent, strict=True):
            who.setdefault(one.get(path), []).append(rank)
        if len(who) > 1:
            lines.append(f"  {' '.join(path)}: {_by_value(who)}")
    more = [f"  and {len(lines) - MOST_FACTS} more"] if len(lines) > MOST_FACTS else []
    return lines[:MOST_FACTS] + more


def _by_value(who: Mapping[tuple[int, str] | None, Sequence[int]]) -> str:
    fewest_first = sorted(who.items(), key=lambda item: len(item[1]))
    if len(fewest_first) > _MOST_VALUES:  # the value that most have is worth showing
        fewest_first = [*fewest_first[: _MOST_VALUES - 1], fewest_first[-1]]
    parts = [
        f"{'ranks' if len(them) > 1 else 'rank'} {_ranges(them)}: {_NOTHING if value is None else value[1]}"
        for value, them in fewest_first
    ]
    hidden = len(who) - len(parts)
    return "; ".join([*parts, f"{hidden} other values on the rest"] if hidden else parts)


def _ranges(ranks: Sequence[int]) -> str:
    """Return numbers as text, with three or more in a row as a range, shortened to fit a line.

    Args:
        ranks: The ranks in ascending order.

    Example:
        >>> _ranges([0, 1, 2, 3, 5, 7, 8])
        '0-3, 5, 7, 8'
    """
    runs = list[list[int]]()
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [[f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run) for run in runs[:_MOST_RUNS]]
    more = [f"and {hidden} more"] if (hidden := sum(map(len, runs[_MOST_RUNS:]))) else []
    return ", ".join([*chain.from_iterable(texts), *more])
