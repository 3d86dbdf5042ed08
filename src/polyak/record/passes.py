"""Computes averages of a record, and their errors, in passes over its files."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyak.profiles import Profile
from polyak.record.combining import Products, combine
from polyak.record.files import SegmentFile
from polyak.record.fitting import Fit, error_estimate, warn_of_error
from polyak.record.manifest import Segment
from polyak.storage.safetensors import TensorInfo

if TYPE_CHECKING:
    from polyak.record.reader import Record


class Passes:
    """Computes averages and errors. It keeps the products from which errors follow, so that they are computed once."""

    def __init__(self) -> None:
        self._products = list[list[float]]()
        self._segments: tuple[Segment, ...] = ()  # those that the products are of

    def averages(
        self, record: "Record", asked: Sequence[tuple[Profile, Fit]], dtype: torch.dtype | None, max_bytes: float
    ) -> Iterator[dict[str, Tensor]]:
        """Yield averages by name, each with a warning if its error is above 5 %.

        Args:
            record: What is read.
            asked: The profiles, and what ``fit`` returned for them.
            dtype: As for ``Record.average``.
            max_bytes: The memory for averages that are computed together. One is computed however large it is.

        Raises:
            RecordError: As ``Record.average``.
        """
        infos = {name: averaged_as(info, dtype) for name, info in record.tensors.items()}
        size_bytes = sum(math.prod(info.shape) * info.dtype.itemsize for info in infos.values())
        together = max(1, int(max_bytes // max(1, size_bytes)))
        for start in range(0, len(asked), together):
            part = asked[start : start + together]
            results = self._combined(record, [fitted for _, fitted in part], infos)
            for profile, fitted in part:
                warn_of_error(profile, self.error(record, fitted), fitted.remedy)
                yield results.pop(0)  # this frame keeps none

    def error(self, record: "Record", fitted: Fit) -> float:
        """Estimate the error of an average; read the files only if the products are not known.

        Args:
            record: What is read.
            fitted: What ``fit`` returned for the average.

        Raises:
            RecordError: If a file is missing, truncated, damaged or foreign.
        """
        if fitted.is_exact:
            return error_estimate(fitted, [])
        if (products := self._unknown(fitted.segments)) is not None:
            with opened(record, fitted.segments) as files:
                for name, info in record.tensors.items():
                    products.add(files, name, info)
            self._keep(products, fitted.segments)
        return error_estimate(fitted, self._products)

    def _combined(
        self, record: "Record", fits: Sequence[Fit], infos: Mapping[str, TensorInfo]
    ) -> list[dict[str, Tensor]]:
        """Return averages from one pass over the files, and keep the products that their errors follow from."""
        segments, raw = max((fitted.segments for fitted in fits), key=len), any(fitted.raw for fitted in fits)
        coefficients = [weights(one, len(segments), raw=raw) for one in fits]
        products = None if all(one.is_exact for one in fits) else self._unknown(segments)
        results: list[dict[str, Tensor]] = [{} for _ in fits]
        with opened(record, segments, raw=raw) as files:
            for name, info in record.tensors.items():
                if info.averaged:
                    made = [torch.empty(info.shape, dtype=infos[name].dtype) for _ in fits]
                    combine(files, name, info, coefficients, made, products)
                else:
                    made = [files[len(one.segments) - 1].read(name).clone() for one in fits]
                for result, tensor in zip(results, made, strict=True):
                    result[name] = tensor
        if products is not None:
            self._keep(products, segments)
        return results

    def _unknown(self, segments: tuple[Segment, ...]) -> Products | None:
        """Return an object in which the products of segments are computed; None if they are known."""
        return None if self._segments[: len(segments)] == segments else Products(len(segments) - 1)

    def _keep(self, products: Products, segments: tuple[Segment, ...]) -> None:
        self._products, self._segments = products.sums.tolist(), segments


def weights(fitted: Fit, segments: int, *, raw: bool) -> list[float]:
    """Return the weight of each file in an average.

    Args:
        fitted: What ``fit`` returned for the average.
        segments: How many segments are read; it has no share in those after its own.
        raw: Whether the raw weights are read after them.
    """
    later = [0.0] * (segments - len(fitted.segments))
    return [*fitted.coefficients, *later, *([fitted.raw] if raw else [])]


@contextmanager
def opened(record: "Record", segments: Sequence[Segment], *, raw: bool = False) -> Iterator[list[SegmentFile]]:
    """Open the files of segments for the length of a ``with`` block.

    Args:
        record: What is read.
        segments: The segments of the record.
        raw: Whether to open the raw weights after them.

    Raises:
        RecordError: If a file is missing, truncated or foreign.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(record.open(segment)) for segment in segments]
        yield [*files, *([stack.enter_context(record.open_raw())] if raw else [])]


def averaged_as(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    """Return a tensor in the form that it has in an average.

    Args:
        info: As the record keeps it.
        dtype: As for ``Record.average``.
    """
    if not info.averaged or info.dtype.is_complex:
        return info
    return replace(info, dtype=dtype or (torch.float64 if info.dtype == torch.float64 else torch.float32))
