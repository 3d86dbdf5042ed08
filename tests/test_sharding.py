import pytest
import sharded
import torch
from ranks import Ranks

CELLS = [(kind, size) for kind, sizes in sharded.KINDS.items() for size in sizes]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    made = Ranks(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["own dtype", "bfloat16"])
@pytest.mark.parametrize(("kind", "size"), CELLS, ids=str)
def test_a_sharded_average_is_that_of_the_whole_model_bit_for_bit(ranks, kind, size, dtype) -> None:
    for found in ranks.run(size, sharded.follows_the_whole, kind, dtype):
        assert found["averages"] == []
        assert found["lent"] == []
        assert found["kept"] == []
        assert found["held"] == []
        assert found["given back"] == []
        assert found["moved by the loan"] > 1e-4
