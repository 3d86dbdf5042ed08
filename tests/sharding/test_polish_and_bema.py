"""``polish`` and ``BEMA`` of a model that several ranks train, wrapped or sharded."""

import polish_in_ranks as jobs
import pytest

pytestmark = pytest.mark.slow  # processes of several ranks

KINDS = ["ddp", "ddp, divided average", "fsdp", "fsdp, blocks", "fsdp, offloaded average", "tp"]


@pytest.mark.parametrize(
    ("kind", "source"), [*((kind, "ema") for kind in KINDS), ("ddp", "record"), ("fsdp, blocks", "record")]
)
def test_ranks_polish_from_the_average_with_the_state_of_the_optimizer(ranks, tmp_path, kind, source) -> None:
    for found in ranks.run(2, jobs.polishes, kind, source, str(tmp_path)):
        assert found["average"] == found["optimizer"] == found["ranks"] == []
        assert found["rates"] == pytest.approx([0.02 * 0.3 * share for share in (1, 0.75, 0.5, 0.25, 0)])


@pytest.mark.parametrize("kind", ["ddp", "fsdp, blocks"])
def test_ranks_refuse_to_polish_another_model(ranks, kind) -> None:
    for said in ranks.run(2, jobs.refuses_another, kind):
        assert said[0] == "MismatchError: the model to polish must be the one that was averaged:"
        assert said[1].startswith("ArgumentError: steps must be a whole number of at least 1")


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp, blocks", "tp"])
def test_the_bema_of_ranks_is_that_of_the_full_model_bit_for_bit(ranks, kind) -> None:
    for found in ranks.run(2, jobs.bema_follows_the_whole, kind):
        assert found.pop("is a correction") > 1e-3
        assert found == {"averages": [], "updates": 3, "swapped in": [], "restored": []}


@pytest.mark.parametrize("kind", ["ddp", "fsdp, blocks"])
def test_the_bema_of_ranks_resumes_bit_for_bit(ranks, tmp_path, kind) -> None:
    assert ranks.run(2, jobs.bema_resumes, kind, str(tmp_path / "saved")) == [[], []]
