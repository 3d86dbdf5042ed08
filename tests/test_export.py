import json

import pytest
import sharded
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from polyak import EMA, CheckpointError, LoanError, attach, export_averaged
from polyak.training.attached import Attached


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [(kind, max(sizes)) for kind, sizes in sharded.KINDS.items()], ids=str)
def test_ranks_export_the_average_that_they_swap_in(ranks, tmp_path, kind, size) -> None:
    swapped = ranks.run(size, sharded.exports, kind, str(tmp_path / "averaged"), 5e9)[0]
    (file,) = (tmp_path / "averaged").glob("*.safetensors")
    assert sharded.unequal(load_file(file), swapped) == []
    assert [path.name for path in tmp_path.iterdir()] == ["averaged"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp, blocks"])
def test_ranks_save_the_average_to_one_file_by_the_handle(ranks, tmp_path, kind) -> None:
    swapped = ranks.run(2, sharded.saves_by_the_handle, kind, str(tmp_path / "averaged.safetensors"))[0]
    assert sharded.unequal(load_file(tmp_path / "averaged.safetensors"), swapped) == []
    assert [path.name for path in tmp_path.iterdir()] == ["averaged.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size"),
    [("ddp, divided average", 2), ("fsdp, blocks", 2), ("fsdp, offloaded average", 2), ("fsdp and tp", 4)],
    ids=str,
)
def test_ranks_publish_the_average_that_they_swap_in(ranks, kind, size) -> None:
    for rank, found in enumerate(ranks.run(size, sharded.publishes, kind)):
        assert sharded.unequal(found["everywhere"], found["swapped"]) == []
        assert sharded.unequal(found["inside"], found["swapped"]) == []
        assert sharded.unequal(found["alone"], found["swapped"] if rank == 0 else {}) == []
        assert found["restored"] == []
        assert "the engine is gone" in found["error"]
        assert found["error"].startswith("ValueError" if rank == 1 else "ShardingError: all ranks must agree on pub")
        assert found["calls before the error"][-1] == "second.weight"
        assert found["no function"].startswith("ArgumentError: publish needs a function")


@pytest.mark.slow
def test_one_rank_of_a_sharded_model_exports_it(ranks, tmp_path) -> None:
    swapped = ranks.run(1, sharded.exports, "fsdp, blocks", str(tmp_path / "averaged"), 5e9)[0]
    assert sharded.unequal(load_file(tmp_path / "averaged" / "model.safetensors"), swapped) == []


@pytest.mark.slow
def test_a_large_model_is_exported_in_several_files_and_an_index(ranks, tmp_path) -> None:
    swapped = ranks.run(2, sharded.exports, "fsdp, blocks", str(tmp_path / "averaged"), 8000)[0]
    names = sorted(path.name for path in (tmp_path / "averaged").glob("*.safetensors"))
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts = [load_file(tmp_path / "averaged" / name) for name in names]
    assert sharded.unequal({n: t for part in parts for n, t in part.items()}, swapped) == []
    index = json.loads((tmp_path / "averaged" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == swapped.keys()


def trained() -> tuple[nn.Module, EMA]:
    model = sharded.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = attach(EMA("2ba"), model, optimizer)
    for _ in range(3):
        model(torch.randn(4, 37)).square().mean().backward()
        optimizer.step()
    return model, ema.algorithm


def test_one_process_exports_one_file_that_the_model_loads(tmp_path) -> None:
    model, ema = trained()
    export_averaged(ema, model, tmp_path / "averaged")
    other = sharded.net(seed=1)
    other.load_state_dict(load_file(tmp_path / "averaged" / "model.safetensors"))
    assert sharded.unequal(dict(other.named_parameters()), dict(ema.ema_model.named_parameters())) == []
    with safe_open(tmp_path / "averaged" / "model.safetensors", framework="pt") as file:
        assert file.metadata()["polyak.updates"] == "2"
        assert "HalfLife" in file.metadata()["polyak.algorithm"]


def test_a_folder_that_holds_something_is_not_written_to(tmp_path) -> None:
    model, ema = trained()
    (tmp_path / "model.safetensors").write_text("dear to somebody")
    with pytest.raises(FileExistsError, match="new or empty folder"):
        export_averaged(ema, model, tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "dear to somebody"


def test_an_earlier_export_is_replaced_with_overwrite_in_one_step_and_nothing_else_is(tmp_path, monkeypatch) -> None:
    model, ema = trained()
    folder = tmp_path / "averaged"
    export_averaged(ema, model, folder, max_file_bytes=8000, overwrite=True)  # where nothing is
    assert len(list(folder.iterdir())) == 3
    with pytest.raises(FileExistsError, match="replace an earlier export by overwrite=True"):
        export_averaged(ema, model, folder)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("polyak.export.write_tensors", full)
        with pytest.raises(OSError, match="No space"):
            export_averaged(ema, model, folder, overwrite=True)
    assert len(list(folder.iterdir())) == 3
    export_averaged(ema, model, folder, overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["averaged"]


@pytest.mark.parametrize("other", ["config.json", "my-model.safetensors"])
def test_overwrite_refuses_a_folder_with_other_files_and_names_them(tmp_path, other) -> None:
    model, ema = trained()
    folder = tmp_path / "averaged"
    export_averaged(ema, model, folder)
    (folder / other).write_text("dear to somebody")
    with pytest.raises(FileExistsError, match=rf"replaces an earlier export and nothing else .*{other}\): move"):
        export_averaged(ema, model, folder, overwrite=True)
    assert (folder / other).read_text() == "dear to somebody"


def test_overwrite_refuses_a_file(tmp_path) -> None:
    model, ema = trained()
    (tmp_path / "averaged").write_text("dear to somebody")
    with pytest.raises(FileExistsError, match="not a folder"):
        export_averaged(ema, model, tmp_path / "averaged", overwrite=True)
    assert (tmp_path / "averaged").read_text() == "dear to somebody"


def test_a_model_with_a_sparse_tensor_in_its_state_dict_is_not_exported(tmp_path) -> None:
    model, ema = trained()
    model.register_buffer("cached", torch.eye(2).to_sparse(), persistent=False)
    export_averaged(ema, model, tmp_path / "averaged")
    model.register_buffer("edges", torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match=r"no sparse or nested tensors.*\(got \['edges'\]\)"):
        export_averaged(ema, model, tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["averaged"]


def test_an_average_that_has_not_begun_is_not_exported(tmp_path) -> None:
    model = nn.Linear(2, 1)
    ema = attach(EMA("2ba"), model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(LoanError, match="must have begun"):
        export_averaged(ema.algorithm, model, tmp_path / "averaged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, dtype=torch.complex128),
        lambda: torch.zeros(2, dtype=torch.complex32),
        lambda: torch.zeros(2).to(torch.float8_e4m3fnuz),
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        lambda: torch.empty(2, device="meta"),
    ],
    ids=["complex128", "complex32", "float8_e4m3fnuz", "quantized", "meta"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_safetensors_cannot_hold_is_named(tmp_path, make) -> None:
    model, ema = trained()
    tensor = make()
    model.register_buffer("odd", tensor)
    with pytest.raises(CheckpointError, match="must have .*to be exported.*odd"):
        export_averaged(ema, model, tmp_path / "averaged")
    assert list(tmp_path.iterdir()) == []
    model.register_buffer("odd", tensor, persistent=False)
    export_averaged(ema, model, tmp_path / "averaged")


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch) -> None:
    model, ema = trained()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("polyak.export.write_tensors", full)
        with pytest.raises(OSError, match="No space"):
            export_averaged(ema, model, tmp_path / "averaged")
    assert list(tmp_path.iterdir()) == []
    export_averaged(ema, model, tmp_path / "averaged")


class Scaled(nn.Linear):
    """Has a state next to its tensors."""

    def __init__(self, scale: object) -> None:
        super().__init__(2, 1)
        self.scale = scale

    def get_extra_state(self) -> object:
        return self.scale

    def set_extra_state(self, state: object) -> None:
        self.scale = state


def averaged(model: nn.Module) -> Attached:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(EMA("3ba"), model, optimizer)
    for _ in range(6):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    return attached


def test_an_extra_state_that_is_a_tensor_is_saved_and_loads(tmp_path) -> None:
    averaged(nn.Sequential(Scaled(torch.tensor([3.0])))).save(tmp_path / "a.safetensors")
    model = nn.Sequential(Scaled(torch.tensor([1.0])))
    model.load_state_dict(load_file(tmp_path / "a.safetensors"))
    assert model[0].scale.item() == 3.0


def test_an_extra_state_that_safetensors_cannot_hold_is_refused_by_name(tmp_path) -> None:
    ema = averaged(nn.Sequential(Scaled({"scale": 3.0})))
    with pytest.raises(CheckpointError, match=r"must be a tensor.*got a dict for '0\._extra_state'"):
        ema.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_module_that_is_registered_twice_is_written_under_each_of_its_names(tmp_path) -> None:
    layer = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(layer, nn.Tanh(), layer), nn.ModuleDict({"a": layer, "b": layer})["a"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = attach(EMA("3ba"), model, optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    ema.save(tmp_path / "averaged.safetensors")
    assert load_file(tmp_path / "averaged.safetensors").keys() == model.state_dict().keys()
    model.load_state_dict(load_file(tmp_path / "averaged.safetensors"))
    ema.detach()
