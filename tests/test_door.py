"""What a first user does in the first minutes, typed as they type it."""

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file
from torch import nn

from polyak import EMA, Attached, PolyakError, Recorder, Time, attach, export_averaged


def trained(algorithm: Any, steps: int = 30, **options: Any) -> tuple[nn.Linear, Attached]:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = attach(algorithm, model, optimizer, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    return model, ema


def test_a_decay_is_composers_smoothing() -> None:
    assert EMA(decay=0.999).smoothing == EMA(decay=0.999).decay == EMA(smoothing=0.999).decay == 0.999
    assert repr(EMA(decay=0.9)) == repr(EMA(smoothing=0.9))  # a state of the one is a state of the other


@pytest.mark.parametrize("time", ["1000 steps", "1000 batches", "1_000 Steps", "1e3 steps", "1000ba", 1000, 1000.0])
def test_a_half_life_in_steps_is_one_in_batches(time) -> None:
    assert EMA(half_life=time).smoothing == pytest.approx(2**-0.001, abs=1e-12)
    assert EMA(time).half_life == Time(1000, "ba")


def test_a_number_of_steps_is_a_time_wherever_attach_and_its_algorithms_take_one(tmp_path) -> None:
    ema = EMA(2, ema_start=5, update_interval=2)
    assert (ema.ema_start, ema.update_interval) == ("5ba", "2ba")
    recorder = Recorder(tmp_path / "record", interval=10)
    assert recorder.interval == "10ba"
    _, attached = trained([ema, recorder], 12, max_duration=12)
    assert attached.loop.state.max_duration == Time(12, "ba")
    assert attached.num_updates == 5  # after 5, 6, 8, 10 and 12 steps


def test_the_handle_has_the_average_as_a_module_numbers_and_a_file(tmp_path) -> None:
    model, ema = trained(EMA("5 steps"))
    inputs = torch.randn(2, 4)
    with ema.applied():
        averaged = model(inputs)
    assert torch.allclose(ema.model(inputs), averaged)
    assert not ema.model.training
    assert not torch.equal(model(inputs), averaged)
    assert ema.metrics().keys() == {"ema/decay", "ema/distance"}
    assert ema.num_updates == 30
    ema.save(tmp_path / "averaged.safetensors")
    saved = load_file(tmp_path / "averaged.safetensors")
    assert torch.equal(saved["weight"], ema.model.weight)
    assert saved.keys() == model.state_dict().keys()
    assert [path.name for path in tmp_path.iterdir()] == ["averaged.safetensors"]


def test_the_average_is_saved_inside_the_block_too_and_stays_in_the_model(tmp_path) -> None:
    model, ema = trained(EMA("5 steps"))
    with ema.applied():
        averaged = model.weight.detach().clone()
        ema.save(tmp_path / "one.safetensors")
        export_averaged(ema, model, tmp_path / "folder")
        assert torch.equal(model.weight, averaged)
    assert not torch.equal(model.weight, averaged)
    for file in (tmp_path / "one.safetensors", tmp_path / "folder" / "model.safetensors"):
        assert torch.equal(load_file(file)["weight"], averaged)


def test_a_file_of_the_average_is_replaced_only_if_that_is_asked_for(tmp_path) -> None:
    file = tmp_path / "averaged.safetensors"
    _, ema = trained(EMA("5 steps"))
    file.write_text("dear to somebody")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        ema.save(file)
    assert file.read_text() == "dear to somebody"
    ema.save(file, overwrite=True)
    assert load_file(file).keys() == {"weight", "bias"}


def test_the_handle_says_in_words_what_it_does() -> None:
    begun = "<Average of Linear (5 parameters): half-life 5 steps, updated every step; 30 steps counted, 30 updates>"
    assert repr(trained(EMA("5 steps"))[1]) == begun
    _, ema = trained(EMA(decay=0.99, ema_start="2 epochs", update_interval=10), 1, steps_per_epoch=100)
    text = "decay 0.99, updated every 10 steps, from 2 epochs on; 1 step counted, averaging has not begun"
    assert repr(ema) == f"<Average of Linear (5 parameters): {text}>"
    with pytest.warns(UserWarning, match="never started"):
        ema.detach()
    assert repr(ema).endswith("; detached>")


def test_with_several_algorithms_the_handle_is_that_of_the_average(tmp_path) -> None:
    recorder, ema = Recorder(tmp_path / "record", interval=10), EMA("5 steps")
    _, handle = trained([recorder, ema])
    assert handle.average is ema
    assert handle.algorithm is recorder
    assert handle.num_updates == 30
    assert f"; with {recorder!r}" in repr(handle)
    _, alone = trained(Recorder(tmp_path / "alone", interval=10))
    assert repr(alone).startswith("<Recorder(")
    for read in (lambda: alone.model, lambda: alone.num_updates, alone.metrics, lambda: alone.save("x")):
        with pytest.raises(PolyakError, match="must be an EMA among the algorithms"):
            read()


def test_the_averaged_module_follows_the_updates_and_is_not_the_model_in_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = attach(EMA("5 steps"), model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        kept = ema.model
        statistics = kept[1].running_mean.clone()
        kept(torch.randn(8, 4))
        assert torch.equal(kept[1].running_mean, statistics)
    assert torch.equal(kept[0].weight, ema.model[0].weight)
    assert kept[0].weight is not model[0].weight
    assert model.training


@pytest.mark.parametrize("arguments", ["model, optimizer, ema", "model, ema, optimizer", "ema, optimizer, model"])
def test_arguments_of_attach_in_another_order_are_one_error_that_shows_the_order(arguments) -> None:
    model = nn.Linear(1, 1)
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "ema": EMA("5 steps")}
    with pytest.raises(ValueError, match=r"the order must be attach\(EMA\(decay=0\.999\), model, optimizer\)"):
        attach(*(given[name] for name in arguments.split(", ")))


@pytest.mark.slow
def test_the_blocks_of_the_readme_run_pasted_one_after_another(tmp_path) -> None:
    if not (ROOT / "README.md").exists():
        pytest.skip("the documentation is not here")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    (tmp_path / "pasted.py").write_text("\n\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, "pasted.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
