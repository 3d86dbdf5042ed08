"""The kernel in plain torch, which accepts all pairs: ``_foreach`` operations, or pieces and scratch memory."""

from collections.abc import Iterator, Sequence
from ctypes import c_float
from itertools import compress

import torch
from torch import Tensor

from polyak.kernels.exchange import Exchange
from polyak.kernels.pairs import Pair, Place
from polyak.kernels.pieces import SCRATCH_ELEMENTS, Scratch, order_of, pieces_of
from polyak.kernels.rounding import SIXTEEN_BITS, RandomBits, RowBits, is_within, round_, run_of, store, words_of

# Elements up to which tensors are moved in groups that fit in the scratch.
_SMALL = 1024

# Weights from here on may be 1 in float32.
_NEARLY_ALL = 1 - 2**-25

_Triple = tuple[Tensor, Tensor, Place]


def _together(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group small contiguous tensors of one dtype, up to ``SCRATCH_ELEMENTS`` a group. Others have a group each."""
    kinds = dict[tuple[torch.dtype, torch.device], list[Tensor]]()
    for tensor in tensors:
        if tensor.numel() > _SMALL or not tensor.is_contiguous():
            yield [tensor]
        else:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for kind in kinds.values():
        for i in range(0, len(kind), SCRATCH_ELEMENTS // _SMALL):
            yield kind[i : i + SCRATCH_ELEMENTS // _SMALL]


def _sum_is_finite(tensors: list[Tensor], scratch: Scratch) -> Tensor:
    """Return a 0-dim bool: True only if all of ``tensors`` are finite; False also if only their sum is not."""
    # Small tensors are copied first: a call for each would cost more than the copies.
    values = tensors[0]
    if len(tensors) > 1:
        flat = [tensor.view(-1) for tensor in tensors]
        buffer = scratch.all(values.dtype, values.device, "seen")
        values = torch.cat(flat, out=buffer[: sum(tensor.numel() for tensor in flat)])
    if values.is_complex():
        # The conjugate of a lazily conjugated view is no lazy view, and is finite where that is.
        values = torch.view_as_real(values.conj() if values.is_conj() else values)
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    return values.sum(dtype=wide).isfinite()


def _groups(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Group averages of one dtype, with their weights, up to ``SCRATCH_ELEMENTS`` a group."""
    kinds = dict[tuple[torch.dtype, torch.dtype, torch.device], list[tuple[Tensor, Tensor]]]()
    for average, tensor in pairs:
        kinds.setdefault((average.dtype, tensor.dtype, average.device), []).append((average, tensor))
    for kind in kinds.values():
        for i in range(0, len(kind), SCRATCH_ELEMENTS // _SMALL):
            group = kind[i : i + SCRATCH_ELEMENTS // _SMALL]
            yield [average for average, _ in group], [tensor for _, tensor in group]


def why_not(device: torch.device) -> str | None:
    """Return None: torch serves all devices.

    Args:
        device: Any device.
    """
    del device
    return None


def accepts(pair: Pair) -> bool:
    """Return True: torch moves and swaps all tensors.

    Args:
        pair: Any pair.
    """
    del pair
    return True


def swap(pairs: Sequence[Pair]) -> Exchange:
    """Return what swaps pairs through a scratch buffer.

    Args:
        pairs: Pairs on one device.
    """
    return Exchange(pairs)


def lerp(pairs: Sequence[Pair], left_out: Tensor) -> "Lerp":
    """Return a function that moves the left tensors of pairs towards the right ones.

    Args:
        pairs: Pairs on one device, with places.
        left_out: A 0-dim int64 tensor on their device, which counts the tensors that had NaN or inf.
    """
    return Lerp(pairs, left_out)


class Lerp:
    """Move averages towards weights, as ``registry.lerp`` says. Nothing here waits for a device.

    Args:
        pairs: Pairs on one device, with places.
        left_out: A 0-dim int64 tensor on their device, which counts the tensors that had NaN or inf.
    """

    def __init__(self, pairs: Sequence[Pair], left_out: Tensor) -> None:
        self._left_out = left_out
        self._scratch = Scratch()
        self._on_cpu = left_out.device.type == "cpu"
        rounded = [_with_place(pair) for pair in pairs if pair.left.dtype in SIXTEEN_BITS and pair.left.numel()]
        self._rows, self._single = _rows(rounded, self._scratch) if self._on_cpu else ([], rounded)
        self._wide = [(a, x) for a, x, _ in pairs if a.dtype not in SIXTEEN_BITS]
        same = [a.dtype == x.dtype for a, x in self._wide]
        self._same_dtype = [a for a, x in compress(self._wide, same)], [x for a, x in compress(self._wide, same)]
        others = [pair for pair, is_same in zip(self._wide, same, strict=True) if not is_same and self._on_cpu]
        self._others = [(a, x) for a, x in others if a.numel() > _SMALL]
        grouped = [(a, x) for a, x in others if a.numel() <= _SMALL]
        self._groups = [(*group, _parts(*group, self._scratch)) for group in _groups(grouped)]
        self._online = list(_together([x for _, x in self._wide]))

    @torch.no_grad()
    def __call__(self, weight: float, num_updates: int) -> None:
        """Move every average once.

        Args:
            weight: Share of the weights taken, from 0 to 1.
            num_updates: The number of the update, a part of the seed.
        """
        single = self._single
        for rows in self._rows:
            single = single + rows.lerp_(weight, num_updates)
        for average, tensor, place in single:
            random = RandomBits(place, tuple(average.shape), num_updates, self._scratch)
            finite = _lerp_rounded(average, tensor, weight, random, self._scratch, in_order=place.shape is not None)
            self._count(finite)
        if self._wide:
            self._lerp_wide(weight)

    def _lerp_wide(self, weight: float) -> None:
        """Move the averages of 32 and 64 bits."""
        # Reading a flag costs nothing on the CPU, and stalls the queue of any other device.
        if self._on_cpu and bool(torch.stack([_sum_is_finite(xs, self._scratch) for xs in self._online]).all()):
            if self._same_dtype[0] and weight < _NEARLY_ALL:
                # The form with one product: `decay * a + (1 - decay) * x` drifts, since the two rounded factors do not
                # sum to 1 (by 2e-3 after 100,000 updates; this form by 1e-5).
                torch._foreach_lerp_(*self._same_dtype, weight)
            if weight < _NEARLY_ALL:
                for averages, tensors, parts in self._groups:
                    torch._foreach_copy_(parts, tensors)
                    torch._foreach_lerp_(averages, parts, weight)
            for average, tensor in self._others if weight < _NEARLY_ALL else self._wide:
                for a, x in pieces_of((average, tensor)):
                    _lerp(a, _as_wide(x, a.dtype, self._scratch), weight)
            return
        for average, tensor in self._wide:
            self._count(_lerp_finite(average, tensor, weight, self._scratch))

    def _count(self, finite: Tensor) -> None:
        self._left_out.add_(finite.logical_not_())


def _with_place(pair: Pair) -> _Triple:
    assert pair.place is not None
    return pair.left, pair.right, pair.place


def _parts(averages: list[Tensor], online: list[Tensor], scratch: Scratch) -> list[Tensor]:
    """Return a part of the scratch for each of ``online``, in the dtype of ``averages``."""
    sizes = [tensor.numel() for tensor in online]
    parts = scratch.all(averages[0].dtype, averages[0].device, "target")[: sum(sizes)].split(sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, online, strict=True)]


def _as_wide(tensor: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    return tensor if tensor.dtype == dtype else scratch.like(tensor, dtype, "target").copy_(tensor)


def _lerp(average: Tensor, tensor: Tensor, weight: float) -> None:
    # Torch's own lerp gives -0.0 or 0.0 here, depending on the place in the tensor.
    if weight == 1 or (average.dtype == torch.float32 and c_float(weight).value == 1):
        average.copy_(tensor)
    else:
        average.lerp_(tensor, weight)


def _finite_target(average: Tensor, tensor: Tensor, all_finite: Tensor, scratch: Scratch) -> Tensor:
    """Return what a piece moves to, the average itself where ``tensor`` is NaN or inf; clear the flag if any is."""
    seen = scratch.like(tensor, torch.promote_types(tensor.dtype, torch.float32), "seen").copy_(tensor)
    finite = torch.eq(seen.sub_(seen), 0, out=scratch.like(tensor, torch.bool, "finite"))
    all_finite.logical_and_(torch.all(finite, out=scratch.flag(torch.bool, tensor.device, "piece")))
    target = scratch.like(tensor, average.dtype, "target").copy_(tensor)
    return torch.where(finite, target, average, out=target)


def _lerp_finite(average: Tensor, tensor: Tensor, weight: float, scratch: Scratch) -> Tensor:
    """Move an average of 32 or 64 bits where ``tensor`` is finite; return whether all of it is."""
    all_finite = scratch.flag(torch.bool, average.device, "all").fill_(True)
    for a, x in pieces_of((average, tensor)) if average.numel() else ():
        _lerp(a, _finite_target(a, x, all_finite, scratch), weight)
    return all_finite


def _lerp_rounded(
    average: Tensor, tensor: Tensor, weight: float, random: RandomBits, scratch: Scratch, *, in_order: bool
) -> Tensor:
    """Move a 16-bit average where ``tensor`` is finite; return whether all of it is."""
    all_finite = scratch.flag(torch.bool, average.device, "all").fill_(True)
    for a, x in pieces_of((average, tensor), in_order=in_order):
        moved = scratch.like(a, torch.float32, "moved").copy_(a)
        within = False
        if a.device.type == "cpu":  # on another device the flag must be awaited
            # NaN or inf in the weights gives NaN or inf in the result.
            _lerp(moved, _as_wide(x, torch.float32, scratch), weight)
            within = is_within(moved, a.dtype, scratch)
        if not within:
            moved.copy_(a)
            _lerp(moved, _finite_target(moved, x, all_finite, scratch), weight)
        round_(moved, a.dtype, random.of(a), scratch, within=within)
        store(moved, a)
    return all_finite


class _Rows:
    """Small 16-bit averages on the CPU that are moved in one group: each has a row of the scratch.

    Args:
        triples: Averages of one dtype, their weights, and their places.
        runs: The ``run_of`` of each average.
        width: Words of a row: the most that any of them needs.
        scratch: Memory to work in.
    """

    def __init__(self, triples: list[_Triple], runs: list[range], width: int, scratch: Scratch) -> None:
        self._triples, self._scratch = triples, scratch
        self._averages, self._online = [a for a, _, _ in triples], [x for _, x, _ in triples]
        self._dtype = self._averages[0].dtype
        self._random = RowBits([place.seed for *_, place in triples], runs, width, scratch)
        self._moved, self._target = (
            scratch.all(torch.float32, self._averages[0].device, name)[: len(triples) * 2 * width]
            for name in ("moved", "target")
        )
        rows = self._moved.view(len(triples), 2 * width)
        self._parts = [
            _laid_out_as(triple, row[run.start % 2 :][: len(run)])
            for triple, row, run in zip(triples, rows, runs, strict=True)
        ]

    def lerp_(self, weight: float, num_updates: int) -> list[_Triple]:
        """Move the averages; return those that were not moved, since a value is NaN, inf or very large."""
        moved, parts, averages = self._moved.zero_(), self._parts, self._averages  # the gaps are finite too
        torch._foreach_copy_(parts, self._online)
        self._target.copy_(moved)
        torch._foreach_copy_(parts, averages)
        _lerp(moved, self._target, weight)
        unmoved = list[_Triple]()
        if not is_within(moved, self._dtype, self._scratch):
            within = [is_within(part, self._dtype, self._scratch) for part in parts]
            unmoved = [triple for triple, moves in zip(self._triples, within, strict=True) if not moves]
            parts, averages = list(compress(parts, within)), list(compress(averages, within))
        if averages:
            round_(moved, self._dtype, self._random.draw(num_updates), self._scratch, within=True)
            torch._foreach_copy_(averages, parts)
        return unmoved


def _laid_out_as(triple: _Triple, part: Tensor) -> Tensor:
    """Return a part of the scratch in the shape of an average, with its elements in the order of their random bits."""
    average, tensor, place = triple
    if order_of((average, tensor), in_order=place.shape is not None) is None:
        return part.view(average.shape)
    return part.as_strided(average.shape, average.stride())


def _rows(triples: Sequence[_Triple], scratch: Scratch) -> tuple[list[_Rows], list[_Triple]]:
    """Group small averages of one dtype and about one size; return also the averages that are in no group."""
    kinds, single = dict[tuple[torch.dtype, int], list[tuple[_Triple, range]]](), list[_Triple]()
    for triple in triples:
        average, _, place = triple
        run = run_of(place, tuple(average.shape))
        if run is None or len(run) > _SMALL:
            single.append(triple)
        else:
            width = 1 << (words_of(run) - 1).bit_length()  # a power of two, so that there are few kinds
            kinds.setdefault((average.dtype, width), []).append((triple, run))
    grouped = list[_Rows]()
    for (_, width), kind in kinds.items():
        most = SCRATCH_ELEMENTS // (2 * width)
        for i in range(0, len(kind), most):
            own, runs = zip(*kind[i : i + most], strict=True)
            grouped.append(_Rows(list(own), list(runs), width, scratch))
    return grouped, single
