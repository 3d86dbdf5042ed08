"""``Record.average_into`` gives a model the values of ``average``."""

import pytest
import torch
from records import build
from torch import nn

from polyak import Cooldown, HalfLife, MismatchError, Record, Recorder, RecordError, attach


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("filling") / "run", build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(Recorder(folder, "1ba", None), model, optimizer):
        for _ in range(32):
            optimizer.zero_grad()
            model(torch.randn(8, 3)).square().mean().backward()
            optimizer.step()
    return folder


@pytest.mark.parametrize(
    ("profile", "at"),
    [(HalfLife("4ba", unbiased=True), "50%"), (Cooldown("8ba"), None), (Cooldown("8ba", floor=0.5), None)],
)
def test_a_model_is_filled_with_the_average_bit_for_bit_and_a_floor_counts_the_raw_weights(folder, profile, at) -> None:
    record, model = Record(folder), build()
    record.average_into(model, profile, at)
    want = record.average(profile, at)
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())


def test_a_floor_without_raw_weights_and_another_model_leave_the_model_as_it_was(folder) -> None:
    record, model = Record(folder), build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RecordError, match="a floor needs the raw weights at the moment of the average"):
        record.average_into(model, Cooldown("8ba", floor=0.5), "50%")
    with pytest.raises(MismatchError, match="the model must have the recorded tensors"):
        record.average_into(nn.Sequential(model[0]), Cooldown("8ba"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
