import pytest
import torch

from polyak import ArgumentError
from polyak.engines.export import check_dtype


def test_averages_of_masters_are_written_in_floating_point_dtypes_only() -> None:
    check_dtype(None)
    check_dtype(torch.bfloat16)
    with pytest.raises(ArgumentError, match=r"must be a floating-point dtype \(got torch.int8\)"):
        check_dtype(torch.int8)
