"""Checkpoints that Composer wrote, of its last release and of 0.12.1, each by a real run: training resumes from
them with our ``EMA``, and ``polyak convert`` takes the average out."""

import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import loops
import pytest
import torch
from converting import assert_is, convert
from paths import SUPPORT
from torch import Tensor

import polyak
from polyak import PlanWarning

if find_spec("mcli") is None:
    pytest.skip("Composer needs stubs: PYTHONPATH=tests/stubs pytest ..., as in `make test`", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Composer's own
    from composer.algorithms.ema import ema as composers
    from composer_script import Keeps, trainer

    from polyak.hosts.composer import EMA, Hosted

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::polyak.errors.PlanWarning"),
    # As in all tests: these average a few batches.
    pytest.mark.filterwarnings("ignore:the average that is .* is mostly its first weights:polyak.errors.PlanWarning"),
    pytest.mark.filterwarnings("ignore:raw weights are .* averaging has not begun:polyak.errors.PlanWarning"),
]

COUNTER = "net.1.num_batches_tracked"  # Composer averages it, and cuts the result


@dataclass(frozen=True)
class Left:
    """What a run of Composer with its own EMA left: checkpoints, and the training weights after each batch."""

    folder: Path

    def checkpoint(self, batch: int) -> Path:
        (found,) = self.folder.glob(f"ep*-ba{batch}-rank0.pt")
        return found

    def trained(self, batch: int) -> dict[str, Tensor]:
        return torch.load(self.folder / f"trained{batch}.pt")

    @property
    def by_hand(self) -> Path:
        """Saved with the training weights in the model."""
        return self.folder / "training-in-it.pt"


@pytest.fixture(scope="module")
def early(tmp_path_factory: Any) -> Mapping[str, Left]:
    folder = tmp_path_factory.mktemp("early")
    for half_life in ("4ba", "1ep"):
        (folder / half_life).mkdir()
    tests, release = SUPPORT, Path(sys.prefix) / "composer-0.12.1"  # put there by `make test`
    done = subprocess.run(
        [sys.executable, str(tests / "composer_early_script.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(release), str(tests), *filter(None, sys.path)])},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return {half_life: Left(folder / half_life) for half_life in ("4ba", "1ep")}


@pytest.fixture(scope="module")
def late(tmp_path_factory: Any) -> Mapping[str, Left]:
    def run(half_life: str) -> Left:
        folder = tmp_path_factory.mktemp("late")
        keeps = Keeps()
        made = trainer(folder, composers.EMA(half_life), net=loops.noisy_perceptron(), callbacks=keeps)
        made.fit()
        made.eval()
        made.save_checkpoint(str(folder / "training-in-it.pt"))
        for batch, weights in keeps.trained.items():
            torch.save(weights, folder / f"trained{batch}.pt")
        return Left(folder)

    return {half_life: run(half_life) for half_life in ("4ba", "1ep")}


@pytest.fixture(params=["0.12.1", "0.32.1"])
def runs(request: Any) -> Mapping[str, Left]:
    return request.getfixturevalue("early" if request.param == "0.12.1" else "late")


@pytest.fixture(scope="module")
def unaveraged(tmp_path_factory: Any) -> Mapping[int, dict[str, Tensor]]:
    """The training weights of the same run without any average."""
    keeps = Keeps()
    trainer(tmp_path_factory.mktemp("plain"), net=loops.noisy_perceptron(), callbacks=keeps, save=None).fit()
    return keeps.trained


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the model and the state of the EMA in a checkpoint."""
    state = torch.load(path, weights_only=False)["state"]
    ((name, ema),) = state["algorithms"]
    assert name == "EMA"
    return dict(state["model"]), ema


def resume(folder: Path, path: Path, *algorithms: Any, seed: int = 9, **options: Any) -> Any:
    net = loops.noisy_perceptron(seed)
    return trainer(folder, *algorithms, net=net, load_path=str(path), callbacks=Keeps(), **options)


def weights_of(trainer: Any) -> dict[str, Tensor]:
    return loops.bits(trainer.state.model)


@pytest.mark.parametrize("batch", [9, 12])
@pytest.mark.parametrize("half_life", ["4ba", "1ep"])
def test_a_run_of_composers_own_ema_resumes_from_its_training_weights(tmp_path, runs, unaveraged, half_life, batch):
    # On an epoch's last batch, 12, Composer itself resumes from wrong weights with a half-life in epochs.
    path = runs[half_life].checkpoint(batch)
    model, state = contents(path)
    assert state["ema_weights_active"]
    ema = EMA(half_life)
    resumed = resume(tmp_path, path, ema)
    assert ema.ema_started
    assert not ema.ema_weights_active
    assert loops.differences(runs[half_life].trained(batch), weights_of(resumed)) == []
    assert loops.differences(loops.averaged(ema) | {COUNTER: 0}, model | {COUNTER: 0}) == []
    assert torch.equal(loops.averaged(ema)[COUNTER], torch.tensor(batch))
    resumed.fit()
    assert loops.differences(unaveraged[18], weights_of(resumed)) == []
    # The checkpoint of an epoch's last batch is from before the epoch's end.
    assert ema.num_updates == (18 - batch if half_life == "4ba" else 2)


def test_a_checkpoint_saved_by_hand_goes_on_too(tmp_path, runs):
    left = runs["4ba"]
    model, state = contents(left.by_hand)
    assert not state["ema_weights_active"]
    ema = EMA("4ba")
    resumed = resume(tmp_path, left.by_hand, ema, max_duration="4ep")
    assert loops.differences(model, weights_of(resumed)) == []
    average, _ = contents(left.checkpoint(18))
    assert loops.differences(loops.averaged(ema) | {COUNTER: 0}, average | {COUNTER: 0}) == []
    resumed.fit()
    assert ema.num_updates == 6


def test_the_training_weights_are_the_models_where_0_12_1_has_kept_no_others(tmp_path, early):
    path = early["4ba"].folder / "never-swapped.pt"
    model, state = contents(path)
    assert not state["ema_weights_active"]
    assert loops.differences(model, state["training_model"])
    ema = EMA("4ba")
    resumed = resume(tmp_path, path, ema)
    assert loops.differences(model, weights_of(resumed)) == []
    assert loops.differences(loops.averaged(ema) | {COUNTER: 0}, state["ema_model"] | {COUNTER: 0}) == []


@pytest.mark.parametrize("by", ["0.12.1", "0.32.1", "polyak"])
def test_a_checkpoint_taken_up_without_its_ema_gives_the_training_weights_and_warns(tmp_path, request, by, unaveraged):
    if by == "polyak":
        trainer(tmp_path, EMA("4ba"), net=loops.noisy_perceptron()).fit()
        left = Left(tmp_path)
    else:
        left = request.getfixturevalue("early" if by == "0.12.1" else "late")["4ba"]
    path = left.checkpoint(9)
    with pytest.warns(PlanWarning, match=r"there is no EMA here.*training weights"):
        resumed = resume(tmp_path / "resumed", path, save=None)
    assert loops.differences(unaveraged[9], weights_of(resumed)) == []
    resumed.fit()
    assert loops.differences(unaveraged[18], weights_of(resumed)) == []
    with pytest.warns(PlanWarning, match="there is no EMA here"):
        other = polyak.EMA("4ba")  # by another name, which Composer goes by
        again = resume(tmp_path / "other", path, Hosted(other), save=None)
    assert loops.differences(unaveraged[9], weights_of(again)) == []
    # For use, without going on, it is the average that is wanted.
    for_use = resume(tmp_path / "use", path, save=None, load_weights_only=True)
    assert loops.differences(contents(path)[0], weights_of(for_use)) == []


def test_composers_own_ema_takes_up_its_own_checkpoint_as_ever(tmp_path, late):
    left = late["4ba"]
    theirs = composers.EMA("4ba")
    resumed = resume(tmp_path, left.checkpoint(9), theirs, save=None)
    assert theirs.ema_weights_active
    assert loops.differences(contents(left.checkpoint(9))[0], weights_of(resumed)) == []
    resumed.fit()
    assert loops.differences(left.trained(18), resumed.state.callbacks[-1].trained[18]) == []


@pytest.mark.parametrize("active", [True, False], ids=["average in the model", "training weights in the model"])
def test_convert_takes_the_average_out(tmp_path, runs, capsys, active):
    left = runs["4ba"]
    path = left.checkpoint(18) if active else left.by_hand
    average, _ = contents(left.checkpoint(18))
    want = average | {COUNTER: torch.tensor(18)}
    (tmp_path / "file.pt").write_bytes(path.read_bytes())
    assert_is(want, convert(tmp_path / "file.pt"))
    assert "checkpoint of Composer with its own EMA" in capsys.readouterr().out
    # The state alone
    if not active:
        _, state = contents(path)
        torch.save(state, tmp_path / "state.pt")
        got = convert(tmp_path / "state.pt")
        assert_is(average, got)


def test_convert_reads_what_our_own_ema_saved_in_composer(tmp_path):
    ema = EMA("4ba")
    made = trainer(tmp_path, ema, net=loops.noisy_perceptron())
    made.fit()
    made.save_checkpoint(str(tmp_path / "end.pt"))
    assert_is(loops.averaged(ema), convert(tmp_path / "end.pt"), made.state.model)
    torch.save(ema.state_dict(), tmp_path / "state.pt")
    assert_is(loops.averaged(ema), convert(tmp_path / "state.pt"))


def test_convert_takes_off_the_prefix_that_ddp_gave_to_the_state_alone(tmp_path, runs):
    path = runs["4ba"].by_hand
    (tmp_path / "bare.pt").write_bytes(path.read_bytes())
    want = convert(tmp_path / "bare.pt")
    file = torch.load(path, weights_only=False)
    ((name, state),) = file["state"]["algorithms"]
    # 0.12.1 has the state dicts of two models, and 0.32.1 two dicts of one.
    dicts = [state["ema_model"], state["training_model"]] if "training_model" in state else state["ema_model"].values()
    for tensors in dicts:
        for key in list(tensors):
            tensors[f"module.{key}"] = tensors.pop(key)
    file["state"]["algorithms"] = [(name, state)]
    torch.save(file, tmp_path / "ddp.pt")
    assert_is(want, convert(tmp_path / "ddp.pt"))
