"""Folders of engines with a file for each rank, and networks that were pickled as objects, are read as data."""

import pickle
import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from polyak import CheckpointError, TimeUnit
from polyak.checkpoints import open_checkpoint, provenance_of
from polyak.checkpoints.averaging import average, plan
from polyak.cli import main
from polyak.compat import read


def weights(number: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (5, 3), "a.bias": (5,), "b": (), "c.weight": (2, 3, 4)}
    return {name: torch.randn(shape, generator=generator) * number for name, shape in shapes.items()}


def save_deepspeed(folder, stage: int, ranks: int, number: float = 1.0) -> None:
    """Save float32 weights as ZeRO lays them out: flat, padded, and divided among ranks."""
    folder.mkdir(parents=True)
    tensors, groups = weights(number), (("a.weight", "a.bias"), ("b", "c.weight"))
    flats = [[] for _ in range(ranks)]
    for group in groups:
        if stage == 3:
            for rank in range(ranks):
                parts = []
                for name in group:
                    each = -(-tensors[name].numel() // ranks)
                    flat = nn.functional.pad(tensors[name].reshape(-1), (0, each * ranks - tensors[name].numel()))
                    parts.append(flat[rank * each : (rank + 1) * each])
                flats[rank].append(torch.cat(parts))
        else:
            flat = torch.cat([tensors[name].reshape(-1) for name in group])
            flat = nn.functional.pad(flat, (0, -len(flat) % (2 * ranks)))
            for rank, part in enumerate(flat.chunk(ranks)):
                flats[rank].append(part.clone())
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    for rank in range(ranks):
        state = {"zero_stage": stage, "partition_count": ranks, key: flats[rank], "base_optimizer_state": {}}
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "ds_version": "0.19"}, folder / name)
    module = {name: one.bfloat16() for name, one in tensors.items()}
    module |= {"n.running_mean": torch.ones(3), "tied": module["a.weight"]}
    shapes = [{name: tensors[name].shape for name in group} for group in groups]
    content = {"module": module, "param_shapes": shapes, "buffer_names": ["n.running_mean"]}
    content |= {"shared_params": {"tied": "a.weight"}, "global_steps": int(100 * number)}
    before = "zero_pp_rank_0_" if stage == 3 else ""
    torch.save(content, folder / f"{before}mp_rank_00_model_states.pt")


@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 4)])
def test_the_float32_weights_of_zero_are_put_together_from_all_ranks_and_averaged(tmp_path, stage, ranks) -> None:
    for number in (1, 2):
        save_deepspeed(tmp_path / f"global_step{number}00", stage, ranks, number)
    opened = [open_checkpoint(tmp_path / f"global_step{number}00") for number in (1, 2)]
    made, want = plan(opened, [1, 1]), weights(1.5)
    assert opened[1].moment[TimeUnit.BATCH] == 200
    assert sorted(made.names) == sorted([*want, "n.running_mean", "tied"])
    for name, tensor in want.items():
        assert made.newest.tensors[name].dtype == torch.float32
        assert torch.equal(opened[0].tensors[name].whole(), weights()[name])
        assert torch.allclose(average(made, name), tensor)
    assert torch.equal(average(made, "tied"), average(made, "a.weight"))


def test_the_latest_folder_of_zero_is_read_where_the_run_is_given(tmp_path) -> None:
    save_deepspeed(tmp_path / "global_step7", 2, 2)
    (tmp_path / "latest").write_text("global_step7")
    assert torch.equal(open_checkpoint(tmp_path).tensors["c.weight"].whole(), weights()["c.weight"])


def test_files_of_zero_that_are_missing_or_of_tensor_parallelism_are_named(tmp_path) -> None:
    save_deepspeed(tmp_path / "a", 2, 3)
    (tmp_path / "a/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"files of all 3 ranks \(.*a has those of 2\); copy the rest"):
        open_checkpoint(tmp_path / "a")
    remedy = r"convert it by python -m deepspeed.checkpoint.ds_to_universal, and give the folder that it writes"
    for name in (
        "mp_rank_01_model_states.pt",
        "layer_00-model_00-model_states.pt",
        "expp_rank_0_mp_rank_00_optim_states.pt",
    ):
        save_deepspeed(tmp_path / name, 2, 1)
        torch.save({"module": {}}, tmp_path / name / name)
        with pytest.raises(CheckpointError, match=rf"data parallelism alone \(.* has {name}\); {remedy}"):
            open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_files_of_one_rank_of_several_are_refused_by_what_they_say(tmp_path, stage) -> None:
    save_deepspeed(tmp_path / "a", stage, 1)
    (model,) = (tmp_path / "a").glob("*model_states.pt")
    content = torch.load(model) | {"mp_world_size": 2, "ds_version": "0.19"}
    torch.save(content, model)
    with pytest.raises(CheckpointError, match="is of 2 ranks of the model, and has the files of one"):
        open_checkpoint(tmp_path / "a")
    with pytest.raises(CheckpointError, match="has the part of one of 2 ranks"):
        open_checkpoint(model)
    torch.save(content | {"mp_world_size": 1, "module": {"a.weight": torch.empty(0)}}, model)
    with pytest.raises(CheckpointError, match="is of ZeRO stage 3, which keeps them in the files of all ranks"):
        open_checkpoint(model)


@pytest.mark.parametrize("stage", [2, 3])
def test_parameters_that_zero_does_not_train_are_read_too(tmp_path, stage) -> None:
    frozen = torch.arange(7.0).half()
    save_deepspeed(tmp_path / "a", stage, 2)
    (model,) = (tmp_path / "a").glob("*model_states.pt")
    content = torch.load(model) | {"frozen_param_shapes": {"frozen": torch.Size([7])}}
    parts = nn.functional.pad(frozen, (0, 1)).chunk(2) if stage == 3 else [frozen]
    for rank, part in enumerate(parts):
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else model.name
        torch.save(content | {"frozen_param_fragments": {"frozen": part.clone()}}, tmp_path / "a" / name)
    assert torch.equal(open_checkpoint(tmp_path / "a").tensors["frozen"].whole(), frozen)
    if stage == 3:
        (tmp_path / "a/zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
        with pytest.raises(CheckpointError, match="the files of all ranks must have frozen"):
            open_checkpoint(tmp_path / "a")


def test_folders_of_deepspeeds_own_converter_are_averaged(tmp_path) -> None:
    for number in (1, 2):
        folder = tmp_path / f"global_step{number}00_universal"
        for name, tensor in weights(number).items():
            (folder / "zero" / name).mkdir(parents=True)
            torch.save({"param": tensor, "cat_dim": 0}, folder / "zero" / name / "fp32.pt")
            torch.save({"param": tensor * 0}, folder / "zero" / name / "exp_avg.pt")
        module = {name: torch.empty(0) for name in weights()} | {"n.running_mean": torch.ones(3) * number}
        content = {"module": module, "buffer_names": ["n.running_mean"], "global_steps": 100 * number}
        torch.save(content, folder / "mp_rank_00_model_states.pt")
    opened = [open_checkpoint(tmp_path / f"global_step{number}00_universal") for number in (1, 2)]
    made, want = plan(opened, [1, 1]), weights(1.5) | {"n.running_mean": torch.full((3,), 1.5)}
    assert (opened[1].format, opened[1].moment[TimeUnit.BATCH]) == ("universal DeepSpeed checkpoint", 200)
    assert {*made.names} == {*want}
    assert all(torch.allclose(average(made, name), tensor) for name, tensor in want.items())


def test_the_ranks_of_megatron_are_read_together_and_their_names_say_the_rank(tmp_path) -> None:
    for step in (1, 3):
        for rank in range(2):
            folder = tmp_path / f"iter_000000{step}/mp_rank_0{rank}"
            folder.mkdir(parents=True)
            model = {"language_model": {"encoder": {"w": torch.full((2,), float(step + rank))}}}
            torch.save({"iteration": step, "model": model, "optimizer": {}}, folder / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    made = plan([open_checkpoint(tmp_path / "iter_0000001"), open_checkpoint(tmp_path)], [1, 1])
    names = [f"mp_rank_0{rank}/language_model.encoder.w" for rank in range(2)]
    assert [*made.names] == names
    assert [average(made, name).tolist() for name in names] == [[2, 2], [3, 3]]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2000, 300), nn.BatchNorm1d(3)])
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.attribute = {"callback": print}


class _Persistent:
    """Pickles a network as NVIDIA's networks are: by a function that takes all of it as one mapping."""

    def __init__(self, net) -> None:
        self.net = net

    def __reduce__(self):
        meta = {"type": "class", "module_src": "raise SystemExit", "class_name": "Net", "state": self.net.__dict__}
        return _reconstruct_persistent_obj, (meta,)


def _reconstruct_persistent_obj(meta):
    raise AssertionError("code of a pickle ran")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


def pickled(content) -> bytes:
    """Pickle a function under the name of a module that does not exist."""
    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules["torch_utils"] = types.ModuleType("torch_utils")
    sys.modules["torch_utils.persistence"] = module
    try:
        return pickle.dumps(content)
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]


def test_a_network_of_edm2_in_a_pickle_is_read_as_data_and_no_code_runs(tmp_path) -> None:
    net = _Net().half()
    (tmp_path / "snapshot.pkl").write_bytes(pickled({"ema": _Persistent(net), "dataset_kwargs": {"resolution": 64}}))
    opened, want = open_checkpoint(tmp_path / "snapshot.pkl"), net.state_dict()
    assert (opened.place, opened.format) == ("ema", "pickle")
    assert opened.tensors.keys() == want.keys()
    assert all(torch.equal(opened.tensors[name].whole(), one) for name, one in want.items())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_snapshots_of_edm2_are_averaged_to_a_state_dict_of_their_network(tmp_path, suffix) -> None:
    net, states = _Net().half(), []
    for thousands in (1024, 2048, 3072):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_()
        states.append({name: one.clone() for name, one in net.state_dict().items()})
        content = pickled({"ema": _Persistent(net), "dataset_kwargs": {"resolution": 64}})
        (tmp_path / f"network-snapshot-{thousands:07d}-0.100.pkl").write_bytes(content)
    out = tmp_path / f"merged{suffix}"
    assert main(["average", str(tmp_path / "network-snapshot-*.pkl"), "-o", str(out)]) == 0
    got = torch.load(out) if suffix == ".pt" else load_file(out)
    assert {*got} == {*states[0]}
    for name, tensor in got.items():
        mean = sum(state[name].double() for state in states) / 3
        assert torch.equal(tensor, mean.half() if tensor.is_floating_point() else states[-1][name])
    net.load_state_dict(got)
    assert [one["moment"] for one in provenance_of(out)] == [{"sp": n * 1024000.0} for n in (1, 2, 3)]


def test_an_average_of_snapshots_is_not_written_as_a_pickle(tmp_path, capsys) -> None:
    (tmp_path / "network-snapshot-0001024-0.100.pkl").write_bytes(pickled({"ema": _Persistent(_Net())}))
    assert main(["average", str(tmp_path / "network-*.pkl"), "-o", str(tmp_path / "out.pkl")]) == 2
    assert "the output must be .safetensors, .pt" in capsys.readouterr().err


def test_a_network_of_ultralytics_in_a_file_of_torch_is_read_as_data(tmp_path) -> None:
    net = _Net().half()
    torch.save({"epoch": 3, "model": None, "ema": net, "train_args": {"lr0": 0.1}}, tmp_path / "last.pt")
    opened, want = open_checkpoint(tmp_path / "last.pt"), net.state_dict()
    assert opened.place == "ema"
    assert all(torch.equal(opened.tensors[name].whole(), one) for name, one in want.items())


def test_a_network_in_place_of_its_state_is_converted_as_its_state_is(tmp_path) -> None:
    net = nn.Linear(2, 2)
    torch.save({"model": {}, "state_dict_ema": net}, tmp_path / "it.pt")
    assert torch.equal(read(tmp_path / "it.pt").tensors["weight"], net.weight)
    assert main(["convert", str(tmp_path / "it.pt"), "-o", str(tmp_path / "out.safetensors")]) == 0


def test_a_pickle_without_tensors_is_refused_by_name(tmp_path) -> None:
    (tmp_path / "it.pkl").write_bytes(pickle.dumps({"stats": [1, 2]}))
    with pytest.raises(CheckpointError, match=r"it.pkl: a checkpoint must have a state dict in it"):
        open_checkpoint(tmp_path / "it.pkl")
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps({"ema": {"w": torch.ones(5_000_000)}})[:9_000_000])
    with pytest.raises(CheckpointError, match=r"cut.pkl cannot be read: its pickle is damaged"):
        open_checkpoint(tmp_path / "cut.pkl")
