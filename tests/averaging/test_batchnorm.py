import copy

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

from polyak import EMA, LoanError, attach
from polyak.averaging.batchnorm import update_bn


def build(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3, momentum=0.3),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(3 * 16, 4),
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4, track_running_stats=False),
    )


def batches(count: int = 3) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(5, 1, 6, 6, generator=generator), torch.zeros(5)] for _ in range(count)]


def used() -> nn.Module:
    """A model with statistics of its own, and modes that differ."""
    model = build()
    model(batches()[0][0])
    model[1].eval()
    model[4].eval()
    return model


def kept(model):
    return [(module.training, getattr(module, "momentum", None)) for module in model.modules()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_statistics_are_those_of_torch_for_a_model_without_dropout() -> None:
    ours, theirs = used(), used()
    update_bn(ours, batches())
    swa_utils.update_bn(batches(), theirs)
    assert same(ours, theirs)
    assert not same(ours, used())


def test_batches_may_be_tensors_and_go_where_the_model_is() -> None:
    ours, theirs = used(), used()
    update_bn(ours, (batch for batch, _ in batches()), device="cpu")
    swa_utils.update_bn(batches(), theirs, device="cpu")
    assert same(ours, theirs)


def test_modes_and_momenta_are_restored() -> None:
    model = used()
    before = kept(model)
    update_bn(model, batches())
    assert kept(model) == before


def test_after_an_error_everything_is_as_it_was() -> None:
    model, untouched = used(), used()
    before = kept(model)

    def loader():
        yield from batches(2)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        update_bn(model, loader())
    assert kept(model) == before
    assert same(model, untouched)


def test_no_batch_is_refused_and_changes_nothing() -> None:
    model = used()
    with pytest.raises(ValueError, match="yielded none"):
        update_bn(model, [])
    assert same(model, used())


def test_dropout_neither_draws_nor_counts() -> None:
    plain, dropping = build(), build(dropout=0.5)
    state = torch.get_rng_state()
    update_bn(dropping, batches())
    assert torch.equal(torch.get_rng_state(), state)
    update_bn(plain, batches())
    assert same(plain, dropping)


def test_a_model_without_batchnorm_reads_nothing() -> None:
    loader = iter([1])
    update_bn(nn.Linear(1, 1), loader)
    assert next(loader) == 1


def test_only_buffers_of_batchnorm_change() -> None:
    model = used()
    before = copy.deepcopy(model.state_dict())
    update_bn(model, batches())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= {f"{i}.{name}" for i in (1, 5) for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert len(changed) == 6


def trained_with_average():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ema = attach(EMA("3ba"), model, optimizer)
    for inputs, _ in batches():
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return model, ema


@pytest.mark.parametrize("whose", ["polyak's", "torch's"])
def test_update_bn_of_an_averaged_module_leaves_the_average_as_it_is(whose) -> None:
    model, ema = trained_with_average()
    before = copy.deepcopy(ema.model.state_dict())
    averaged = ema.model
    if whose == "polyak's":
        update_bn(averaged, batches())
        with ema.applied():
            update_bn(model, batches())
            want = model[1].running_mean.clone()
        torch.testing.assert_close(averaged[1].running_mean, want)
    else:
        with pytest.raises(LoanError, match=r"train a copy: copy\.deepcopy"):
            swa_utils.update_bn(batches(), averaged)
        swa_utils.update_bn(batches(), copy.deepcopy(ema.model))
    assert all(torch.equal(before[name], value) for name, value in ema.model.state_dict().items())
    assert averaged[0].weight.data_ptr() == ema.model[0].weight.data_ptr()


def test_copies_and_files_of_an_averaged_module_reset_their_own_statistics(tmp_path) -> None:
    _, ema = trained_with_average()
    torch.save(ema.model, tmp_path / "model.pt")
    for other in (copy.deepcopy(ema.model), torch.load(tmp_path / "model.pt", weights_only=False)):
        other[1].reset_running_stats()
        assert not other[1].running_mean.any()
    assert ema.model[1].running_mean.any()
