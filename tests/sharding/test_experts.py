"""Names and shapes of declared experts, here and in the full model."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from polyak.sharding import Places
from polyak.sharding.experts import _DECLARED, Experts

MESH: Any = SimpleNamespace(size=lambda: 2, get_local_rank=lambda: 1)


def test_a_rank_finds_its_own_experts_by_their_names_in_the_full_model_and_no_others() -> None:
    experts = Experts(MESH, None, {"0": "2", "1": "3"})
    assert experts.name_here("3.weight") == "1.weight"
    assert experts.name_here("0.weight") is None


def test_a_rank_takes_its_part_of_a_full_tensor_and_what_has_no_such_dimension_is_the_same_on_all() -> None:
    module, full, count = nn.ParameterDict(), torch.arange(4.0).view(4, 1), torch.tensor(3.0)
    _DECLARED[module] = Experts(MESH, 0, {})
    places = Places(iter([("experts.", module)]))
    found = places.as_local({"experts.up": full, "experts.count": count})
    assert torch.equal(found["experts.up"], full[2:])
    assert found["experts.count"] is count
    assert places.differs("experts.up", full)
    assert not places.differs("experts.count", count)
