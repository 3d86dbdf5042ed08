"""The reference of the average: float64, by the documented rules, without polyak."""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

AVERAGE, COPY, LEAVE = 2, 1, 0

# How far one update may be off, for weights of size 1: rounding to nearest, but stochastic for bfloat16.
_ERROR = {torch.float64: 1e-13, torch.float32: 4e-7, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
# Additional rounding where the average is swapped into a model of another dtype.
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 0.0}


def tensors(net: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Return all dense tensors of a model by each of their names, and whether the rules average or copy them."""
    found = dict[str, tuple[Tensor, int]]()
    for name, parameter in net.named_parameters(remove_duplicate=False):
        numeric = parameter.is_floating_point() or parameter.is_complex()
        found[name] = parameter.detach(), AVERAGE if parameter.requires_grad and numeric else LEAVE
    persistent = net.state_dict(keep_vars=True).keys()
    for name, buffer in net.named_buffers(remove_duplicate=False):
        if buffer.layout != torch.strided:
            continue
        numeric = buffer.is_floating_point() or buffer.is_complex()
        statistic = numeric and name.rpartition(".")[2].startswith("running_") and bool(buffer.isfinite().all())
        found[name] = buffer.detach(), (AVERAGE if statistic else COPY) if name in persistent else LEAVE
    return found


def inner(tensor: Tensor) -> list[Tensor]:
    """Return a tensor, or the inner tensors of a wrapper subclass."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
    return list(chain.from_iterable(inner(getattr(tensor, name)) for name in names)) if names else [tensor]


def flat(tensor: Tensor) -> Tensor:
    """Return the elements in float64, complex ones as two."""
    parts = [t.detach().as_subclass(Tensor).resolve_conj().resolve_neg() for t in inner(tensor)]
    reals = [torch.view_as_real(t) if t.is_complex() else t for t in parts]
    return torch.cat([t.to(torch.float64, copy=True).reshape(-1) for t in reals])


def _addresses(tensor: Tensor) -> Tensor:
    """Return where each element of ``flat`` is."""
    places = list[Tensor]()
    for part in inner(tensor):
        offsets = torch.zeros(part.shape, dtype=torch.int64)
        for dim, (size, stride) in enumerate(zip(part.shape, part.stride(), strict=True)):
            offsets += (torch.arange(size) * stride).reshape([-1 if d == dim else 1 for d in range(part.dim())])
        place = part.data_ptr() + offsets.reshape(-1) * part.element_size()
        if part.is_complex():
            place = torch.stack([place, place + part.element_size() // 2], -1).reshape(-1)
        places.append(place)
    return torch.cat(places)


def _storages(tensor: Tensor) -> list[int]:
    return [part.untyped_storage().data_ptr() for part in inner(tensor)]


def policies(found: Mapping[str, tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Return for each element whether it is averaged or copied. Where tensors share memory, averaging wins."""
    masks = {name: torch.full((flat(t).numel(),), policy) for name, (t, policy) in found.items()}
    homes = {name: _storages(t) for name, (t, _) in found.items()}
    crowd = Counter(place for places in homes.values() for place in set(places) if place)
    shared = [name for name, places in homes.items() if any(crowd[place] > 1 for place in places)]
    if shared:
        where = {name: _addresses(found[name][0]) for name in shared}
        for policy in (COPY, AVERAGE):
            taken = torch.cat([where[name][masks[name] == policy] for name in shared])
            for name in shared:
                masks[name][torch.isin(where[name], taken) & (masks[name] < policy)] = policy
    return masks


class Reference:
    """The average of a model, updated step by step.

    Args:
        half_life: In batches.
        smoothing: In place of a half-life, if any.
        interval: Between updates, in batches.
        start: When averaging begins, in batches.
        dtype: Of the average; None for float32 or more.
    """

    def __init__(
        self, *, half_life: float, smoothing: float | None, interval: int, start: int, dtype: torch.dtype | None
    ) -> None:
        self._half_life, self._smoothing, self._interval, self._start = half_life, smoothing, interval, start
        self._dtype = dtype
        self._batch, self._updated_at = 0, 0
        self.exact = True  # whether the copied tensors have kept their dtype
        self.num_updates = 0
        self.begun = False
        self._policies = dict[str, Tensor]()
        self._averages = dict[str, Tensor]()
        self._dtypes = dict[str, torch.dtype]()
        self._largest = dict[str, float]()

    def count(self, net: nn.Module, moved: set[str]) -> None:
        """Count a step.

        Args:
            net: The model after the step.
            moved: Names of the parameters that an optimizer has changed so far, including those that are frozen now.
        """
        self._batch += 1
        if self.begun:
            if self._batch // self._interval > self._updated_at // self._interval:
                span = self._batch - self._updated_at
                keep = 2 ** (-span / self._half_life) if self._smoothing is None else self._smoothing
                self._update(net, moved, keep)
        elif self._batch >= self._start:
            found = self._find(net, moved)
            parameters = {name for name, _ in net.named_parameters(remove_duplicate=False)}
            averaged = [flat(t) for name, (t, policy) in found.items() if policy == AVERAGE and name in parameters]
            if all(bool(t.isfinite().all()) for t in averaged):
                self.begun = True
                self._update(net, moved, 0.0)
                self.num_updates = 0

    def _find(self, net: nn.Module, moved: set[str]) -> dict[str, tuple[Tensor, int]]:
        return {name: (t, AVERAGE if name in moved else policy) for name, (t, policy) in tensors(net).items()}

    def _update(self, net: nn.Module, moved: set[str], keep: float) -> None:
        self._updated_at = self._batch
        self.num_updates += 1
        found = self._find(net, moved)
        for name, asked in policies(found).items():
            now, had, mask = flat(found[name][0]), self._policies.get(name), asked
            if had is None:
                self._averages[name], self._dtypes[name] = now, self._dtype_of(found[name][0])
            else:
                # An averaged tensor stays averaged, and a copied tensor stays copied, unless it is trained now.
                mask = torch.maximum(asked, had) if "running_" not in name else had
                moving = (had == AVERAGE) & now.isfinite()
                average = self._averages[name]
                new = torch.where(moving, keep * average + (1 - keep) * now, average)
                self._averages[name] = torch.where(had == AVERAGE, new, now)
            self._policies[name] = mask
            size = float(now[now.isfinite()].abs().max()) if now.isfinite().any() else 0.0
            self._largest[name] = max(self._largest.get(name, 0.0), size)

    def _dtype_of(self, tensor: Tensor) -> torch.dtype:
        dtype = tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype
        if not dtype.is_floating_point:
            return torch.float64
        return self._dtype if self._dtype and not tensor.is_complex() else torch.promote_types(dtype, torch.float32)

    def averages(self, name: str) -> bool:
        """Return whether all elements of a tensor are averaged."""
        return name in self._policies and bool((self._policies[name] == AVERAGE).all())

    def wrong_in(self, saved: Mapping[str, Tensor]) -> Iterator[str]:
        """Yield the differences between saved averages and the reference, by name."""
        for name, tensor in saved.items():
            if name in self._averages:
                yield from self._differing(name, flat(tensor), self._averages[name], None)

    def wrong(self, net: nn.Module, online: Mapping[str, Tensor], *, rounded: bool) -> Iterator[str]:
        """Yield the differences between a model that holds the average and the reference.

        Args:
            net: With the average.
            online: The training weights, as ``flat`` gives them.
            rounded: Whether the values have been rounded to the dtype of the model.
        """
        for name, (tensor, _) in tensors(net).items():
            if name in online:
                policy = self._policies.get(name, torch.tensor(LEAVE))
                want = torch.where(policy == LEAVE, online[name], self._averages.get(name, online[name]))
                dtype = tensor.dtype if rounded else None
                for said in self._differing(name, flat(tensor), want, dtype):
                    yield said + (" (the training weights)" if torch.equal(flat(tensor), online[name]) else "")

    def _differing(self, name: str, got: Tensor, want: Tensor, dtype: torch.dtype | None) -> Iterator[str]:
        policy = self._policies.get(name, torch.tensor(LEAVE)).expand_as(want)
        # Memory that is averaged in part is averaged as a whole: an average of 16 bits rounds its frozen elements too.
        averaged = policy == AVERAGE
        rounds = averaged | averaged.any()
        allowed = torch.where(rounds, self.tolerance(name, dtype), 0.0 if self.exact else 0.02)
        finite = got.isfinite() & want.isfinite()
        # An element that joined as inf stays inf or becomes NaN.
        other = (got.isfinite() != want.isfinite()) | (~rounds & (got.nan_to_num() != want.nan_to_num()))
        bad = torch.where(finite, (got - want).abs() > allowed, other)
        if bad.any():
            i = int(bad.nonzero()[0, 0])
            yield f"{name} ({('left', 'copied', 'averaged')[int(policy[i])]}) is {got[i]:.7g} for {want[i]:.7g}"

    def tolerance(self, name: str, dtype: torch.dtype | None) -> float:
        """Return the tolerance of an element of the average."""
        size = 1e-3 + self._largest.get(name, 0.0)
        error = _ERROR.get(self._dtypes.get(name, torch.float32), 1e-6) * (self.num_updates + 2)
        if dtype is not None:
            error += _ROUNDING.get(dtype.to_real() if dtype.is_complex else dtype, 0.0)
        return 2 * size * error
