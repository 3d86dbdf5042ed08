"""A checkpoint that a run resumes which is not as the run that saved it: refused by name, or with a warning."""

from pathlib import Path

import pytest
import torch
from torch import nn

from polyak import EMA, ArgumentError, Callback, CheckpointError, CheckpointSaver, PlanWarning, Trainer


def batches(number: int = 6, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 4, generator=random), torch.randn(size, 4, generator=random)) for _ in range(number)]


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def adam_backwards(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(list(model.parameters())[::-1])


def adam_in_groups(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([{"params": [parameter]} for parameter in model.parameters()])


def trainer(until: str, optimizer=adam, data=None, **options) -> Trainer:
    torch.manual_seed(0)
    model = layers()
    options = {"algorithms": EMA("3ba"), "optimizers": optimizer(model), "progress_bar": False, **options}
    return Trainer(model, batches() if data is None else data, until, loss=nn.functional.mse_loss, **options)


def saved(folder: Path, until: str = "1ep", interval: str = "1ep", **options) -> Path:
    trainer(until, callbacks=[CheckpointSaver(folder, interval)], **options).fit()
    return max(folder.glob("ep*.pt"))


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        (sgd, "SGD has .*momentum.* and the checkpoint has the state of Adam"),
        (adam_backwards, "Adam has '1.weight' where the checkpoint has '0.weight'"),
        (adam_in_groups, r"Adam has groups of \[1, 1\] parameters, and the checkpoint has \[2\]"),
    ],
)
def test_the_state_of_another_optimizer_is_refused_by_name(tmp_path: Path, optimizer, says) -> None:
    path = saved(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        trainer("2ep", optimizer, load_path=path)
    trainer("2ep", optimizer, load_path=path, load_ignore_keys=["optimizers"]).fit()


def test_an_optimizer_of_another_class_with_the_same_settings_may_continue(tmp_path: Path) -> None:
    trainer("2ep", lambda model: torch.optim.AdamW(model.parameters()), load_path=saved(tmp_path)).fit()


def test_batches_of_another_size_are_refused_inside_an_epoch_and_taken_at_its_end(tmp_path: Path) -> None:
    inside = saved(tmp_path / "inside", "4ba", "4ba")
    with pytest.raises(CheckpointError, match="after 16 samples in 4 batches of an epoch .got 32 samples"):
        trainer("2ep", data=batches(size=8), load_path=inside).fit()
    trainer("2ep", load_path=inside).fit()
    trainer("2ep", data=batches(size=8), load_path=saved(tmp_path / "end")).fit()


def test_a_run_that_is_over_when_it_is_loaded_says_so(tmp_path: Path) -> None:
    again = trainer("1ep", load_path=saved(tmp_path, "2ep"))
    with pytest.warns(PlanWarning, match="has nothing to train"):
        again.fit()


def test_an_average_that_a_checkpoint_does_not_have_begins_with_a_warning(tmp_path: Path) -> None:
    path = saved(tmp_path, algorithms=[])
    with pytest.warns(PlanWarning, match="has no state of EMA.*begins with the weights"):
        trainer("2ep", load_path=path)


def test_an_optimizer_that_needs_a_closure_is_refused_at_the_door() -> None:
    with pytest.raises(ArgumentError, match="must be ones that step without a closure .got a.? LBFGS"):
        trainer("1ep", lambda model: torch.optim.LBFGS(model.parameters()))


def test_a_folder_for_checkpoints_that_is_a_file_is_refused_at_the_door(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArgumentError, match="folder must be one for checkpoints"):
        trainer("1ep", save_folder=tmp_path / "file")


class Clips(Callback):
    def batch_end(self, state, logger) -> None:
        for parameter in state.model.parameters():
            parameter.data.clamp_(-0.05, 0.05)


def test_a_callback_that_changes_weights_after_the_average_has_taken_them_is_told() -> None:
    with pytest.warns(PlanWarning, match="must not change between two steps.*register_step_post_hook"):
        trainer("1ep", callbacks=[Clips()]).fit()


def test_a_hook_of_the_optimizer_changes_weights_before_the_average_takes_them() -> None:
    ema = EMA(decay=0.5)
    run = trainer("1ep", algorithms=ema)
    clips = Clips()
    run.state.optimizers[0].register_step_post_hook(lambda *_: clips.batch_end(run.state, None))
    run.fit()
    assert all(parameter.abs().max() <= 0.05 for parameter in ema.ema_model.parameters())


def test_weights_that_are_rounded_when_they_are_loaded_are_warned_of(tmp_path: Path) -> None:
    path = saved(tmp_path)
    model = layers().bfloat16()
    halves = [(x.bfloat16(), y.bfloat16()) for x, y in batches()]
    with pytest.warns(PlanWarning, match="has torch.float32, and the model torch.bfloat16: they are rounded"):
        Trainer(
            model,
            halves,
            "1ep",
            algorithms=EMA("3ba"),
            optimizers=adam(model),
            loss=nn.functional.mse_loss,
            load_path=path,
        )


def test_checkpoints_of_another_run_are_replaced_with_a_warning_and_not_deleted(tmp_path: Path) -> None:
    saved(tmp_path, "2ep")
    (tmp_path / "ep0-ba1.pt").write_text("of another run")
    with pytest.warns(PlanWarning, match="ep1-ba6.pt of another run is replaced") as caught:
        trainer("3ep", callbacks=[CheckpointSaver(tmp_path, "1ep", keep=1)]).fit()
    assert len([one for one in caught if "is replaced" in str(one.message)]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ep0-ba1.pt", "ep3-ba18.pt"]
