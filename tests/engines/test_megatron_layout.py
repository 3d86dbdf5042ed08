"""Where Megatron's tensors are in the full model: what its ``sharded_state_dict`` says, without Megatron."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from polyak.engines.megatron_layout import _place
from polyak.errors import OptimizerError
from polyak.sharding.fragments import Fragment, boxes_of


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_consecutive_elements_are_the_blocks_that_they_make_up(shape: list[int], data: st.DataObject) -> None:
    length = math.prod(shape)
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    whole = torch.arange(length)
    fragment = Fragment.of_boxes(whole[start:stop], list(boxes_of(start, stop, shape)), shape)
    found = torch.full(shape, -1)
    for box, tensor in fragment.blocks():
        found[tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))] = tensor
    assert torch.equal(found.view(-1)[start:stop], whole[start:stop])
    assert int((found >= 0).sum()) == stop - start
    assert len(fragment.blocks()) <= max(2 * len(shape) - 1, 1)


@dataclass
class Sharded:
    """What Megatron calls ``ShardedTensor``."""

    key: str
    data: Tensor
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    replica_id: Any = (0, 0, 0)
    prepend_axis_num: int = 0

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)


@dataclass
class Factory:
    """What Megatron calls ``ShardedTensorFactory``."""

    key: str
    data: Tensor
    build_fn: Callable[..., Any]
    replica_id: Any = (0, 0, 0)


def test_one_of_many_layers_has_a_name_of_its_own() -> None:
    place = _place(Sharded("layers.weight", torch.ones(2, 3), (8, 4, 3), (5, 2, 0), prepend_axis_num=1))
    assert (place.name, place.shape) == ("layers.weight.5", (4, 3))
    fragment = place.fragment(torch.ones(4), 1, written=True)
    assert [(box.offsets, box.sizes) for box, _ in fragment.blocks()] == [((2, 1), (1, 2)), ((3, 0), (1, 2))]


@pytest.mark.parametrize("separate", [True, False])
def test_the_halves_of_a_gated_layer_are_one_below_the_other(separate: bool) -> None:
    def build(key: str, tensor: Tensor, replica: Any, flat: None) -> list[Sharded]:
        gate, up = tensor.chunk(2)
        if separate:
            return [Sharded(key + "_w", gate, (4, 3), (2, 0)), Sharded(key + "_v", up, (4, 3), (2, 0))]
        return [Sharded(key, gate, (8, 3), (2, 0)), Sharded(key, up, (8, 3), (6, 0))]

    place = _place(Factory("fc1", torch.ones(4, 3), build))
    assert (place.name, place.shape) == ("fc1", (8, 3))
    fragment = place.fragment(torch.ones(12), 0, written=False)
    assert [(box.offsets, box.sizes) for box, _ in fragment.blocks()] == [((2, 0), (2, 3)), ((6, 0), (2, 3))]
    assert fragment.__create_write_items__("fc1", fragment) == []


@pytest.mark.parametrize("build", [lambda t: list(t.chunk(2, 1)), lambda t: [t.clone()], lambda t: [t.t()]])
def test_a_parameter_that_is_divided_in_another_way_is_refused_by_name(build: Callable[[Tensor], Any]) -> None:
    def parts(key: str, tensor: Tensor, replica: Any, flat: None) -> list[Sharded]:
        return [Sharded(key, one, tuple(one.shape), (0, 0)) for one in build(tensor)]

    with pytest.raises(OptimizerError, match=r"blocks of rows .* 'experts.weight1'"):
        _place(Factory("experts.weight1", torch.ones(4, 6), parts))
