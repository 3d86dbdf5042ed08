"""Series of checkpoints that are wrong: one error each, which names the file and says what to do."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_runs as runs
import pytest
import torch

from polyak import PowerFunction
from polyak.checkpoints import open_checkpoint
from polyak.checkpoints.series import Options, open_series
from polyak.errors import CheckpointError

FILES = Path(__file__).parent / "series_files"
SIGMAS = (PowerFunction(0.05), PowerFunction(0.28))


def refused(folder: Path | list[Path], match: str, **said: Any) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        open_series(folder if isinstance(folder, list) else [folder], Options(**said))
    assert str(error.value).count("\n") == 0


def test_a_truncated_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    runs.write_raw(tmp_path, 300, 100)
    path = tmp_path / "step-200.pt"
    path.write_bytes(path.read_bytes()[:-300])
    refused(
        tmp_path, r"step-200\.pt .*truncated.*; if a run is writing it, wait until it is complete, and else leave it"
    )


def test_a_truncated_snapshot_is_named_with_what_to_do(tmp_path: Path) -> None:
    runs.write_edm2(tmp_path, 300, 100)
    path = tmp_path / "network-snapshot-0000204-0.050.pkl"
    path.write_bytes(path.read_bytes()[:-1500])
    refused(tmp_path, r"network-snapshot-0000204-0\.050\.pkl.*damaged.*; if a run is writing it, wait")


def test_an_empty_file_that_is_being_written_is_named(tmp_path: Path) -> None:
    runs.write_raw(tmp_path, 300, 100)
    (tmp_path / "step-400.pt").touch()
    refused(tmp_path, r"step-400\.pt is empty\); if a run is writing it, wait until it is complete")


def test_temporary_files_and_copies_without_a_number_are_left_out(tmp_path: Path) -> None:
    runs.write_icefall(tmp_path, 300, 100)
    (tmp_path / "checkpoint-400.pt.tmp").write_bytes(b"half")
    shutil.copy(tmp_path / "checkpoint-300.pt", tmp_path / "best-valid-loss.pt")
    series = open_series([tmp_path], Options())
    assert [one.name for one in series.averages] == [f"checkpoint-{step}.pt" for step in (100, 200, 300)]
    assert series.left_out == ["best-valid-loss.pt: no number in its name"]


@pytest.mark.parametrize("write", [runs.write_raw, runs.write_icefall, runs.write_swa])
def test_a_step_that_is_there_twice_is_refused(tmp_path: Path, write: Callable[[Path, int, int], None]) -> None:
    write(tmp_path, 300, 100)
    copied = next(tmp_path.glob("*200*"))
    shutil.copy(copied, tmp_path / "again-7.pt")
    said = {"stored": (PowerFunction(0.1),)} if write is runs.write_swa else {}
    refused(tmp_path, r"must be of another step .*again-7\.pt.* leave one out", **said)


def test_a_folder_with_two_runs_is_refused_by_their_tensors(tmp_path: Path) -> None:
    runs.write_raw(tmp_path, 300, 100)
    torch.save({"model": {"weight": torch.ones(6, 8), "head": torch.ones(2)}}, tmp_path / "step-250.pt")
    refused(tmp_path, r"must be of one run .*step-250\.pt has other tensors than .*: bias, head\); leave a run out")
    torch.save({"model": {"weight": torch.ones(7, 8), "bias": torch.ones(7)}}, tmp_path / "step-250.pt")
    refused(tmp_path, r"must be of one run .*\(7,?.*step-250\.pt")


def test_a_folder_with_two_runs_is_refused_by_their_settings(tmp_path: Path) -> None:
    for step, seed in ((10, 1), (20, 1), (30, 2)):
        saved = {"model": runs.weights(step), "hyper_parameters": {"seed": seed, "lr": 0.1}}
        torch.save(saved, tmp_path / f"step-{step}.ckpt")
    refused(tmp_path, r"step-30\.ckpt has another hyper_parameters\.seed than .*step-20\.ckpt\); leave a run out")


def test_a_folder_with_two_runs_is_refused_by_their_epochs(tmp_path: Path) -> None:
    for step, epoch in ((10, 1), (20, 2), (30, 1)):
        torch.save({"model": runs.weights(step), "epoch": epoch, "global_step": step}, tmp_path / f"{step}.pt")
    refused(tmp_path, r"30\.pt is of a later update than .*20\.pt, but of 1 ep, not 2\); leave a run out")


def test_a_folder_with_two_runs_of_icefall_is_refused_by_their_period(tmp_path: Path) -> None:
    runs.write_icefall(tmp_path, 200, 100, period=10)
    other = tmp_path / "other"
    other.mkdir()
    runs.write_icefall(other, 300, 300, period=20)
    shutil.move(other / "checkpoint-300.pt", tmp_path)
    refused(tmp_path, r"average_period 10, and checkpoint-300\.pt 20\); leave a run out")


def test_snapshots_of_two_runs_of_edm2_are_refused_by_their_names(tmp_path: Path) -> None:
    runs.write_edm2(tmp_path, 200, 100)
    (tmp_path / "network-snapshot-0000204-0.050.pkl").rename(tmp_path / "phema-0000204-0.050.pkl")
    refused(tmp_path, r"must be of one run \(their names begin with network-snapshot, phema\); give a pattern")


def test_checkpoints_of_two_kinds_are_refused(tmp_path: Path) -> None:
    runs.write_icefall(tmp_path, 200, 100)
    torch.save({"model": runs.weights(1)}, tmp_path / "step-300.pt")
    refused(tmp_path, r"must be of one kind .*step-300\.pt: checkpoints of training weights")


def test_a_snapshot_of_an_unknown_profile_is_refused(tmp_path: Path) -> None:
    runs.write_edm2(tmp_path, 100, 100)
    (tmp_path / "network-snapshot-0000102-0.050.pkl").rename(tmp_path / "network-snapshot-0000102-0.500.pkl")
    refused(tmp_path, r"must be known .*0\.500\.pkl: sigma_rel must be above 0 .*; rename it")
    refused(FILES / "ema_pytorch", r"0\.320\.pt does not say it\): give the 2 sigma_rels.*update_every")
    refused(FILES / "ema_pytorch", r"has 2, and 1 are given", stored=SIGMAS[:1], update_every=1)


def test_a_missing_step_of_post_hoc_ema_is_named(tmp_path: Path) -> None:
    shutil.copytree(FILES / "ema_pytorch", tmp_path / "folder")
    (tmp_path / "folder" / "1.640.pt").unlink()
    refused(tmp_path / "folder", r"1\.640\.pt is missing\); restore it", stored=SIGMAS, update_every=1)


def test_no_checkpoint_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, r"there must be checkpoints .* has none\); check the path")
    refused(tmp_path / "step-*.pt", r"matches none\); check the path")


class Runs:
    """Would run code if it were unpickled."""

    def __reduce__(self) -> Any:
        return (exit, ("code in a pickle was run",))


def test_a_pickle_of_a_module_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "network-snapshot-0000102-0.050.pkl"
    with path.open("wb") as file:
        pickle.dump({"ema": runs.module(3), "other": Runs()}, file)
    found = open_checkpoint(path)
    assert found.format == "pickle"
    assert torch.equal(found.tensors["weight"].whole(), runs.weights(3)["weight"])


def test_large_tensors_of_a_pickle_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    module = torch.nn.Linear(100, 100).half()
    with path.open("wb") as file:
        pickle.dump({"ema": module}, file)
    found = open_checkpoint(path)
    (held,) = found.files.paths
    assert held == path
    assert torch.equal(found.tensors["weight"].whole(), module.weight)
    assert torch.equal(found.tensors["bias"].read(10, 20), module.bias[10:20])


def test_a_pickle_without_a_module_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x-1.pkl"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"x-1\.pkl: a checkpoint must have a state dict in it"):
        open_checkpoint(path)
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(CheckpointError, match=r"x-1\.pkl must hold a state dict or a checkpoint"):
        open_checkpoint(path)


def test_a_folder_of_checkpoint_folders_is_a_series(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for step in (100, 200):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file(runs.weights(step), folder / "model.safetensors")
    assert [one.updates for one in open_series([tmp_path], Options()).averages] == [100, 200]


def test_files_of_timm_are_a_series_and_hidden_files_are_none(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        torch.save(
            {"state_dict": {"w": torch.full((2,), float(epoch))}, "epoch": epoch},
            tmp_path / f"checkpoint-{epoch}.pth.tar",
        )
    shutil.copy(tmp_path / "checkpoint-3.pth.tar", tmp_path / "last.pth.tar")
    (tmp_path / "._checkpoint-1.pth.tar").write_bytes(b"of a file system")
    series = open_series([tmp_path], Options())
    assert [one.name for one in series.averages] == [f"checkpoint-{epoch}.pth.tar" for epoch in (1, 2, 3)]
    assert list(series.left_out) == ["last.pth.tar: no number in its name"]


def test_folders_of_megatron_are_a_series(tmp_path: Path) -> None:
    for step in (100, 200):
        folder = tmp_path / f"iter_{step:07d}" / "mp_rank_00"
        folder.mkdir(parents=True)
        torch.save({"model": {"w": torch.ones(2)}, "iteration": step}, folder / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("200")
    assert [one.updates for one in open_series([tmp_path], Options()).averages] == [100, 200]


def test_a_link_to_a_checkpoint_is_no_other_checkpoint(tmp_path: Path) -> None:
    runs.write_raw(tmp_path, 300, 100)
    (tmp_path / "latest-rank0.pt").symlink_to("step-300.pt")
    assert [one.name for one in open_series([tmp_path], Options()).averages] == [
        f"step-{n}.pt" for n in (100, 200, 300)
    ]


def test_a_resumed_run_is_one_run(tmp_path: Path) -> None:
    for step, begin in ((100, "scratch"), (200, "resume")):
        said = {"init_from": begin, "lr": 0.1, "start_epoch": step}
        torch.save({"model": {"w": torch.ones(2)}, "step": step, "config": said}, tmp_path / f"step-{step}.pt")
    assert len(open_series([tmp_path], Options()).averages) == 2


def test_files_that_are_averages_by_their_names_need_a_profile(tmp_path: Path) -> None:
    for step in (100, 200):
        torch.save({"state_dict": {"w": torch.ones(2)}, "global_step": step}, tmp_path / f"step={step}-EMA.ckpt")
    refused(tmp_path, r"by its name .*step=100-EMA.ckpt is one, ema\); give it as stored=HalfLife")
    assert len(open_series([tmp_path], Options(stored=(PowerFunction(0.05),))).averages) == 2


def test_epochs_from_0_and_a_checkpoint_of_step_0_begin_the_run(tmp_path: Path) -> None:
    for number in range(3):
        torch.save({"model": {"w": torch.ones(2)}, "epoch": number}, tmp_path / f"epoch_{number}.pth")
        torch.save({"model": {"w": torch.ones(2)}, "step": 10 * number}, tmp_path / f"step-{10 * number}.pt")
    assert [one.updates for one in open_series([tmp_path / "*.pth"], Options()).averages] == [1, 2, 3]
    series = open_series([tmp_path / "*.pt"], Options())
    assert [one.updates for one in series.averages] == [10, 20]
    assert list(series.left_out) == ["step-0.pt: of ba 0, before training"]


def test_a_folder_with_brackets_in_its_name_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "lr=[0.1]").mkdir()
    runs.write_raw(tmp_path / "lr=[0.1]", 300, 100)
    assert len(open_series([tmp_path / "lr=[0.1]" / "step-*.pt"], Options()).averages) == 3


def test_a_model_next_to_checkpoints_with_numbers_is_none_of_them(tmp_path: Path) -> None:
    runs.write_raw(tmp_path, 300, 100)
    shutil.copy(tmp_path / "step-300.pt", tmp_path / "model.pt")
    assert list(open_series([tmp_path], Options()).left_out) == ["model.pt: no number in its name"]
