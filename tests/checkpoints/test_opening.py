"""Checkpoints are read in all formats, without running code, and one tensor at a time."""

import json
import os
import pickle
import shutil
import tarfile

import checkpoint_files
import pytest
import torch
from safetensors.torch import save_file

from polyak import CheckpointError, TimeUnit
from polyak.checkpoints import open_checkpoint
from polyak.checkpoints.moments import in_natural_order, moment_of
from polyak.record import Writer
from polyak.storage.safetensors import TensorInfo

FORMATS = list(checkpoint_files.FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_all_tensors_of_a_format_are_read_bit_for_bit_in_whole_and_in_pieces(tmp_path, name) -> None:
    path = checkpoint_files.write(name, tmp_path, 3.0)
    opened, want = open_checkpoint(path), checkpoint_files.state(3.0)
    assert opened.tensors.keys() == want.keys()
    for key, stored in opened.tensors.items():
        assert (stored.dtype, stored.shape) == (want[key].dtype, tuple(want[key].shape))
        assert torch.equal(stored.whole(), want[key])
        if stored.numel > stored.grain:
            pieces = [stored.read(0, stored.grain), stored.read(stored.grain, stored.numel)]
            assert torch.equal(torch.cat(pieces), want[key].reshape(-1))
        opened.files.release()
    assert opened.moment[TimeUnit.BATCH] == 300
    opened.files.require_unchanged()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [("fsdp", 1), ("fsdp, blocks", 3), ("fsdp, blocks", 4), ("tp", 2)])
def test_what_several_ranks_saved_is_read_bit_for_bit(ranks, tmp_path, kind, size) -> None:
    want = ranks.run(size, checkpoint_files.saves_model, kind, str(tmp_path / "saved"))[0]
    opened = open_checkpoint(tmp_path / "saved")
    assert opened.place == "model"
    assert opened.tensors.keys() >= want.keys()
    for name, tensor in want.items():
        stored = opened.tensors[name]
        assert torch.equal(stored.whole(), tensor.cpu())
        if stored.numel > stored.grain:
            middle = stored.numel // stored.grain // 2 * stored.grain
            pieces = [stored.read(0, middle), stored.read(middle, stored.numel)]
            assert torch.equal(torch.cat(pieces), tensor.cpu().reshape(-1))


def test_a_checkpoint_with_several_state_dicts_lists_them_and_a_key_chooses(tmp_path) -> None:
    raw, ema = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    torch.save({"model": raw, "ema": {"module": ema, "updates": 3}, "optimizer": {"a": raw}}, tmp_path / "it.pt")
    with pytest.raises(
        CheckpointError, match=r"it has model \(1 tensors\), ema.module \(1 tensors\)\); say which by --key"
    ):
        open_checkpoint(tmp_path / "it.pt")
    assert torch.equal(open_checkpoint(tmp_path / "it.pt", key="ema.module").tensors["w"].whole(), ema["w"])


def test_a_prefix_chooses_tensors_and_is_left_out_of_their_names(tmp_path) -> None:
    torch.save({"model": {"student.w": torch.zeros(3), "teacher.w": torch.ones(3)}}, tmp_path / "it.pt")
    opened = open_checkpoint(tmp_path / "it.pt", prefix="teacher.")
    assert list(opened.tensors) == ["w"]
    assert torch.equal(opened.tensors["w"].whole(), torch.ones(3))
    with pytest.raises(CheckpointError, match="none with tutor"):
        open_checkpoint(tmp_path / "it.pt", prefix="tutor.")


class Code:
    def __reduce__(self):
        return os.mkdir, ("code_ran",)


def test_code_in_a_pickle_does_not_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"w": torch.ones(3)}, "more": Code()}, tmp_path / "it.pt")
    assert torch.equal(open_checkpoint(tmp_path / "it.pt").tensors["w"].whole(), torch.ones(3))
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Code()))
    with pytest.raises(CheckpointError, match=r"bare.pt"):
        open_checkpoint(tmp_path / "bare.pt")
    assert not (tmp_path / "code_ran").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_checkpoint_is_refused_by_name(tmp_path, name) -> None:
    path = checkpoint_files.write(name, tmp_path)
    weights = {".safetensors", ".bin", ".distcp", path.suffix, *([".pt"] if name.startswith("Megatron,") else [])}
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.suffix in weights and one.is_file()]
    largest = max(files, key=lambda one: one.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 4)
    with pytest.raises(CheckpointError, match=path.name):
        for stored in open_checkpoint(path).tensors.values():
            stored.whole()


def test_a_bit_that_changed_is_found_when_its_tensor_is_read_and_not_before(tmp_path) -> None:
    torch.save({"a": torch.arange(1000.0), "b": torch.full((1000,), 7.0)}, tmp_path / "it.pt")
    data = bytearray((tmp_path / "it.pt").read_bytes())
    data[data.index(torch.full((9,), 7.0).numpy().tobytes()) + 5] ^= 1
    (tmp_path / "it.pt").write_bytes(data)
    opened = open_checkpoint(tmp_path / "it.pt")
    assert torch.equal(opened.tensors["a"].whole(), torch.arange(1000.0))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="checksum"):
            opened.tensors["b"].whole()


def test_a_checkpoint_that_changes_while_it_is_open_is_named(tmp_path) -> None:
    path = checkpoint_files.write("safetensors", tmp_path)
    opened = open_checkpoint(path)
    shutil.copy(path, tmp_path / "copy").replace(path)
    with pytest.raises(CheckpointError, match=r"step-100.safetensors did\); wait"):
        opened.files.require_unchanged()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.mkdir(), "must have weights in it"),
        (lambda path: None, "must exist"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"text"), "neither a safetensors file nor one of torch.save"),
        (lambda path: torch.save({"epoch": 3}, path), "must have a state dict in it"),
        (lambda path: torch.save({"optimizer": {"w": torch.ones(3)}}, path), "must have a state dict in it"),
        (lambda path: torch.save({"w": torch.ones(3), "s": torch.eye(3).to_sparse()}, path), "s is a sparse tensor"),
    ],
    ids=["an empty folder", "nothing", "an empty file", "a text", "no tensors", "an optimizer", "a sparse tensor"],
)
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, make, said) -> None:
    make(tmp_path / "it")
    with pytest.raises(CheckpointError, match=said) as raised:
        open_checkpoint(tmp_path / "it")
    assert str(tmp_path / "it") in str(raised.value)


@pytest.mark.parametrize(
    ("mode", "names", "said"),
    [
        ("w:gz", ["model_weights.ckpt"], "must be an uncompressed tar archive"),
        ("w:", ["model_config.yaml"], r"must have one model_weights.ckpt \(it has model_config.yaml\)"),
        ("w:", ["a/model_weights.ckpt", "b/model_weights.ckpt"], "must have one model_weights.ckpt"),
    ],
    ids=["compressed", "no weights", "two weights"],
)
def test_an_archive_of_nemo_must_have_weights_that_can_be_read_in_place(tmp_path, mode, names, said) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "weights")
    with tarfile.open(tmp_path / "it.nemo", mode) as archive:
        for name in names:
            archive.add(tmp_path / "weights", name)
    with pytest.raises(CheckpointError, match=rf"it.nemo {said}"):
        open_checkpoint(tmp_path / "it.nemo")


def test_an_index_must_name_files_of_the_folder_and_tensors_in_them(tmp_path) -> None:
    path = checkpoint_files.write("Transformers or Accelerate, several files", tmp_path)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../other.safetensors"}}))
    with pytest.raises(CheckpointError, match="must name files of the folder"):
        open_checkpoint(path)
    index.write_text(json.dumps({"weight_map": {"w": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match="must have all tensors"):
        open_checkpoint(path)


def test_a_folder_with_two_models_lists_their_files(tmp_path) -> None:
    for file in ("model.safetensors", "model_1.safetensors"):
        save_file({"w": torch.ones(2)}, tmp_path / file)
    with pytest.raises(CheckpointError, match=r"has model.safetensors, model_1.safetensors\); give the file"):
        open_checkpoint(tmp_path)


def test_a_pipeline_of_diffusers_and_a_record_are_refused_with_what_to_do(tmp_path) -> None:
    pipeline, record = tmp_path / "pipeline", tmp_path / "record"
    for model in ("unet", "vae"):
        (pipeline / model).mkdir(parents=True)
        save_file({"w": torch.ones(2)}, pipeline / model / "diffusion_pytorch_model.safetensors")
    (pipeline / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"by itself: {pipeline}/unet, {pipeline}/vae$"):
        open_checkpoint(pipeline)
    assert open_checkpoint(pipeline / "unet").tensors.keys() == {"w"}
    with Writer(record, {"w": TensorInfo(torch.float32, (1,), averaged=True)}):
        pass
    with pytest.raises(CheckpointError, match="of a record, polyak reconstruct gives the averages"):
        open_checkpoint(record)


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("checkpoint-500", {"ba": 500}),
        ("epoch=3-step=1200.ckpt", {"ba": 1200, "ep": 3}),
        ("ep1-ba500-rank0.pt", {"ba": 500, "ep": 1}),
        ("checkpoint12.pt", {"ep": 12}),
        ("checkpoint_3_5000.pt", {"ba": 5000, "ep": 3}),
        ("iter_0001000", {"ba": 1000}),
        ("12epoch.pth", {"ep": 12}),
        ("global_step1000", {"ba": 1000}),
        ("step_100_000.pt", {"ba": 100_000}),
        ("step-10k.pt", {"ba": 10_000}),
        ("iter_1.5m.pth", {"ba": 1_500_000}),
        ("100k-steps.pt", {"ba": 100_000}),
        ("step1000-tokens4B", {"ba": 1000}),
        ("step-100-kept.pt", {"ba": 100}),
        ("step_3_50.pt", {"ba": 3}),
        (f"step-{2**63 + 1}.pt", {}),
        (f"step-{'9' * 240}.pt", {}),
        ("network-snapshot-0020971-0.050.pkl", {"sp": 20_971_520}),
        ("model.pt", {}),
        ("fold2.pt", {}),
    ],
)
def test_a_name_says_when_a_checkpoint_was_saved(tmp_path, name, moment) -> None:
    assert moment_of(tmp_path / name, {}, {}) == moment


def test_what_a_checkpoint_says_counts_more_than_its_name(tmp_path) -> None:
    assert moment_of(tmp_path / "step-5.pt", {"global_step": 7}, {}) == {"ba": 7}
    assert moment_of(tmp_path / "step-5.pt", {}, {"global_step": 8}) == {"ba": 8}
    assert moment_of(tmp_path / "x", {"optimizer_history": [{"num_updates": 1}, {"num_updates": 9}]}, {}) == {"ba": 9}


@pytest.mark.parametrize("name", ["iter_num", "step_count", "batch_idx_train", "completed_steps", "it"])
def test_the_counters_of_training_scripts_are_steps(tmp_path, name) -> None:
    assert moment_of(tmp_path / "ckpt.pt", {name: torch.tensor(7), "current_epoch": 2}, {}) == {"ba": 7, "ep": 2}


def test_names_sort_as_people_sort_them(tmp_path) -> None:
    names = ["a-9.pt", "a-10.pt", "a-010.pt", "b.pt"]
    assert sorted((tmp_path / one for one in reversed(names)), key=in_natural_order)[0].name == "a-9.pt"
    assert sorted((tmp_path / one for one in names), key=in_natural_order)[-1].name == "b.pt"


@pytest.mark.parametrize("name", ["model.pt", "model.ckpt", "lit_model.pth"])
def test_a_folder_of_olmo_speechbrain_or_litgpt_is_a_checkpoint(tmp_path, name) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / name)
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optim.pt")
    (tmp_path / "config.yaml").write_text("layers: 2")
    assert open_checkpoint(tmp_path).tensors.keys() == {"w"}


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "pytorch_model-00001-of-00002.bin"])
def test_shards_without_their_index_are_refused_by_what_is_missing(tmp_path, name) -> None:
    (tmp_path / name).write_bytes(b"shard")
    with pytest.raises(
        CheckpointError, match=r"the index of its shards, such as model.safetensors.index.json, is missing"
    ):
        open_checkpoint(tmp_path)


def test_an_object_in_the_place_of_a_tensor_is_refused_by_its_class(tmp_path) -> None:
    torch.save({"model": {"w": ShardedTensor(), "b": torch.ones(2)}, "step": 1}, tmp_path / "rank-0.pt")
    with pytest.raises(
        CheckpointError, match=r"all weights must be plain tensors \(w is an object of the class .*ShardedTensor"
    ):
        open_checkpoint(tmp_path / "rank-0.pt")


class ShardedTensor:
    """Stands for torch's, whose ranks save parts of a tensor as objects."""


def test_the_state_of_an_optimizer_is_no_model_under_any_key(tmp_path) -> None:
    adam = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]}
    torch.save({"net": {"w": torch.ones(2)}, "opt_g": adam, "adam": adam}, tmp_path / "it.pt")
    assert open_checkpoint(tmp_path / "it.pt").place == "net"
    torch.save(adam, tmp_path / "opt.pt")
    with pytest.raises(CheckpointError, match="param_groups, the state of an optimizer\\); leave it out"):
        open_checkpoint(tmp_path / "opt.pt")


def test_a_tuple_of_states_is_read_by_number_and_single_numbers_are_weights(tmp_path) -> None:
    torch.save(({"w": torch.ones(2)}, {"param_groups": []}), tmp_path / "it.pt")
    assert open_checkpoint(tmp_path / "it.pt").place == "0"
    torch.save({"temperature": torch.tensor(2.0)}, tmp_path / "it.pt")
    assert open_checkpoint(tmp_path / "it.pt").tensors.keys() == {"temperature"}


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-00500/model.pt", 500),
        ("step-00500/lit_model.pth", 500),
        ("checkpoint-500/pytorch_model.bin", 500),
        ("step-500/step-7.pt", 7),
        ("step_5e2.pt", 500),
        ("ema_0.9999_010000.pt", 10_000),  # guided-diffusion
        ("model010000.pt", 10_000),
        ("0050000.pt", 50_000),  # DiT
        ("lora-000001.safetensors", None),
        ("step-500/fold.pt", None),
        ("llama-100k-steps/model.pt", None),
    ],
)
def test_the_folder_says_the_step_where_the_name_of_the_file_is_the_usual_one(tmp_path, name, step) -> None:
    assert moment_of(tmp_path / name, {}, {}).get("ba") == step


def test_a_folder_of_a_model_in_a_folder_of_a_step_is_of_that_step(tmp_path) -> None:
    (tmp_path / "checkpoint-500" / "unet").mkdir(parents=True)
    assert moment_of(tmp_path / "checkpoint-500" / "unet", {}, {}) == {"ba": 500}
