"""Lightning's ``Trainer``, held to the contract, and what goes wrong there without care."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import loops
import pytest
import torch
from host_contract import HostContract, Plan, Probe, Session, Watched, loss_of, native, net_of, num_tokens, of_net
from torch import Tensor, nn

from polyak import EMA, ArgumentError, Event, HalfLife, MismatchError, PlanWarning, ProfileError, Record, Recorder
from polyak.averaging.swap import swap_of
from polyak.trainer.batches import num_samples

lightning = pytest.importorskip("lightning", minversion="2.6")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import (  # noqa: E402
    Checkpoint,
    EarlyStopping,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.loggers import Logger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from polyak.hosts.lightning import Averaging  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*does not have many workers",
        ".*`isinstance.treespec, LeafSpec.` is deprecated",  # Lightning with torch 2.13
        ".*Checkpoint directory .* exists and is not empty",
        ".*smaller than the logging interval",
        "The dirpath has changed from",
        ".*was called without a model. The last model",
        ".*there is no last checkpoint available",
        "You defined a `validation_step` but have no `val_dataloader`",
    )
]


class Module(LightningModule):
    """What a user writes."""

    def __init__(self, net: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.net, self.plan = net, plan

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(self.net(inputs), targets)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.plan.optimizer(self.net)


def trainer_options(folder: Path, plan: Plan, *callbacks: Any) -> dict[str, Any]:
    return {
        "max_epochs": plan.epochs,
        "accumulate_grad_batches": plan.accumulate,
        "callbacks": list(callbacks),
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def trainer_for(folder: Path, plan: Plan, *callbacks: Any, **options: Any) -> Trainer:
    return Trainer(**trainer_options(folder, plan, *callbacks) | options)


class Kept(Logger):
    """A logger as its users write one."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step, metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def values(self, name: str) -> list[float]:
        """Return what was logged at the ends of the three epochs."""
        found = [(step, line[name]) for step, line in self.lines if name in line]
        # The step of metrics that Lightning logs at a validation is that before the counter moves.
        assert [step for step, _ in found] == ([6, 12, 18] if name.startswith("ema/") else [5, 11, 17])
        return [value for _, value in found]


class LightningSession:
    def __init__(self, net: nn.Module, algorithm: EMA, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.module = self.trained = net if isinstance(net, Module) else Module(net, plan)
        saves: list[Any] = []
        if plan.save_every:
            saves.append(ModelCheckpoint(folder, "epoch-{step}", save_top_k=-1, save_on_train_epoch_end=True))
            if plan.save_every % plan.steps:
                saves.append(ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=plan.save_every))
        counts = {"num_samples": num_samples, "num_tokens": num_tokens} if plan.counted else {}
        averaging, self.log = Averaging(algorithm, eval_weights=plan.eval_weights, **counts), Kept()
        self.handle = averaging
        precision = MixedPrecision("16-mixed", "cpu", plan.scaler) if plan.scaled else []
        self.trainer = trainer_for(folder, plan, averaging, *saves, logger=self.log, plugins=precision)

    def fit(self, resume: Path | None = None) -> None:
        loaders = self.plan.eval_loader if self.plan.evaluate else None
        self.trainer.fit(self.module, self.plan.loader, loaders, ckpt_path=resume)

    def evaluate(self) -> None:
        self.trainer.validate(self.module, self.plan.eval_loader, verbose=False)

    def predict(self) -> None:
        self.trainer.predict(self.module, self.plan.eval_loader)

    def save(self) -> Path:
        self.trainer.save_checkpoint(self.folder / "by-hand.ckpt")
        return self.folder / "by-hand.ckpt"

    def logged(self, name: str) -> list[float]:
        return self.log.values(name)

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"{'' if step % self.plan.steps else 'epoch-'}step={step}.ckpt"


class LightningHost:
    lacks: Mapping[str, str] = {
        "mid-epoch": "Lightning resumes inside an epoch only with a loader that has a state, which torch's does not"
    }
    losses = "loss", "raw_loss"
    uncounted = ("sp", "tok", "sec", "iter")
    known_late = ()
    golden = """
        init fit_start
        epoch_start batch_end
        batch_end epoch_end eval_before_all eval_start eval_end eval_after_all save_start save_end
        epoch_start batch_end
        batch_end epoch_end eval_before_all eval_start eval_end eval_after_all save_start save_end
        fit_end
    """

    def session(self, net: nn.Module, algorithm: EMA, folder: Path, plan: Plan) -> Session:
        return LightningSession(net, algorithm, folder, plan)

    def loadable(self, saved: Path) -> Mapping[str, Tensor]:
        return Module.load_from_checkpoint(saved, net=net_of(), plan=Plan(), strict=False).state_dict()


HOST = LightningHost()


class TestContract(HostContract):
    host = HOST


# What goes wrong in Lightning without care


def fitted(folder: Path, algorithm: Any, *callbacks: Any, plan: Plan | None = None, **options: Any) -> Any:
    plan = plan or Plan(epochs=2)
    module, averaging = Module(net_of(), plan), Averaging(algorithm, num_samples=num_samples)
    trainer = trainer_for(folder, plan, averaging, *callbacks, **options)
    trainer.fit(module, plan.loader, plan.eval_loader if plan.evaluate else None)
    return trainer, module, averaging


def test_a_checkpoint_of_weights_only_has_the_average(tmp_path: Path) -> None:
    ema = Watched("4ba")
    saver = ModelCheckpoint(tmp_path, "w", save_weights_only=True, save_on_train_epoch_end=True)
    _, module, _ = fitted(tmp_path, ema, saver)
    saved = torch.load(tmp_path / "w.ckpt", weights_only=True)
    assert "optimizer_states" not in saved
    assert not loops.differences(ema.average, of_net(saved["state_dict"]))
    assert not loops.differences(ema.batches[-1][0], of_net(loops.bits(module)))


@pytest.mark.parametrize("weights_only", [False, True], ids=["full", "weights only"])
@pytest.mark.parametrize("how", ["validate", "test", "predict"])
def test_a_checkpoint_that_is_evaluated_is_evaluated_with_its_weights_and_leaves_the_average(
    tmp_path: Path, how: str, weights_only: bool
) -> None:
    ema, plan = Watched("4ba"), Plan(epochs=2)
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_weights_only=weights_only)
    trainer, module, _ = fitted(tmp_path, ema, saver, plan=plan)
    before, probe = ema.average, Probe(module.net)
    getattr(trainer, how)(module, plan.eval_loader, ckpt_path=tmp_path / "step=6.ckpt")
    assert not loops.differences([ema.batches[5][1]] * 2, probe.evaluated)
    assert not loops.differences(before, ema.average)
    assert swap_of(module) is None


def test_the_checkpoint_of_an_exception_in_validation_has_each_set_of_weights_where_it_belongs(tmp_path: Path) -> None:
    ema, plan = Watched("4ba"), Plan(epochs=2, evaluate=True)
    module = Module(net_of(), plan)
    Probe(module.net).raises = ("eval", 0, RuntimeError("as planned"))
    trainer = trainer_for(tmp_path, plan, OnExceptionCheckpoint(tmp_path), Averaging(ema))
    with pytest.raises(RuntimeError, match="as planned"):
        trainer.fit(module, plan.loader, plan.eval_loader)
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    training, average = ema.batches[-1]
    assert not loops.differences(average, of_net(saved["state_dict"]))
    assert not loops.differences(training, of_net(saved["polyak"]["algorithms"][0][1]["training_model"]))
    assert not loops.differences(training, of_net(loops.bits(module)))


def test_a_checkpoint_saved_by_hand_in_validation_has_both_and_leaves_the_average_swapped_in(tmp_path: Path) -> None:
    ema, plan = Watched("4ba"), Plan(epochs=1, evaluate=True)

    class Saves(Module):
        def on_validation_epoch_end(self) -> None:
            self.trainer.save_checkpoint(tmp_path / "within.ckpt")
            assert swap_of(self) is not None

    module = Saves(net_of(), plan)
    trainer_for(tmp_path, plan, Averaging(ema)).fit(module, plan.loader, plan.eval_loader)
    saved = torch.load(tmp_path / "within.ckpt", weights_only=True)
    assert saved["polyak"]["state_dict_holds"].startswith("averaged weights of EMA")
    assert not loops.differences(ema.average, of_net(saved["state_dict"]))
    assert not loops.differences(ema.batches[-1][0], of_net(loops.bits(module)))


def test_batches_without_a_loss_are_not_counted(tmp_path: Path) -> None:
    class Skips(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    ema, plan = Watched("4ba"), Plan(epochs=2)
    with pytest.warns(UserWarning, match="returned `None`"):
        trainer_for(tmp_path, plan, Averaging(ema)).fit(Skips(net_of(), plan), plan.loader)
    assert len(ema.batches) == 6


def test_a_start_after_the_end_leaves_the_trained_weights(tmp_path: Path) -> None:
    # Lightning's own EMAWeightAveraging returns the initial weights.
    ema = EMA("4ba", ema_start="100ba")
    with pytest.warns(PlanWarning, match="averaging never"):
        trainer, module, _ = fitted(tmp_path, ema)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert loops.differences(loops.bits(net_of()), of_net(saved["state_dict"]))
    assert not loops.differences(of_net(loops.bits(module)), of_net(saved["state_dict"]))
    assert saved["polyak"]["state_dict_holds"] == "training weights"


def test_the_last_window_of_an_epoch_may_be_short(tmp_path: Path) -> None:
    ema, plan = Watched("1ep", update_interval="1ba"), Plan(epochs=2, steps=5)
    fitted(tmp_path, ema, plan=plan, accumulate_grad_batches=2)
    assert ema.num_updates == 2 * 3 - 1
    assert ema.events.count(Event.EPOCH_END) == 2


def test_an_epoch_that_max_steps_cuts_short_does_not_end(tmp_path: Path) -> None:
    ema = Watched("4ba")
    _, _, averaging = fitted(tmp_path, ema, max_steps=9)
    assert ema.events.count(Event.EPOCH_END) == 1
    now = averaging._loop.state
    assert (now.timestamp.elapsed("ep"), now.max_duration) == (1.5, "9ba")


def test_epochs_have_no_fraction_where_only_the_model_knows_its_steps(tmp_path: Path) -> None:
    class Adversarial(Module):
        automatic_optimization = False

        def __init__(self, net: nn.Module, plan: Plan) -> None:
            super().__init__(net, plan)
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net.parameters(), lr=0.1), torch.optim.SGD(self.net.parameters(), lr=0.2)]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

    ema, plan = Watched("4ba"), Plan(epochs=2)
    module = Adversarial(net_of(), plan)
    trainer_for(tmp_path, plan, Averaging(ema, optimizer=1)).fit(module, plan.loader)
    assert len(ema.batches) == 12
    assert not loops.differences(ema.batches[-1][0], of_net(loops.bits(module)))
    with pytest.raises(ProfileError, match="the loop must count ep"):
        trainer_for(tmp_path, plan, Averaging(EMA("1ep", update_interval="1ba"))).fit(
            Adversarial(net_of(), plan), plan.loader
        )


def test_the_sanity_check_of_a_resumed_run_logs_nothing(tmp_path: Path) -> None:
    plan = Plan(epochs=1, evaluate=True)
    trainer, _, _ = fitted(tmp_path, EMA("4ba"), plan=plan)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    log, module = Kept(), Module(net_of(), plan)
    probe = Probe(module.net)
    trainer = trainer_for(tmp_path, plan, Averaging(EMA("4ba")), num_sanity_val_steps=1, logger=log, max_epochs=2)
    trainer.fit(module, plan.loader, plan.eval_loader, ckpt_path=tmp_path / "end.ckpt")
    assert len(probe.evaluated) == 3
    assert [step for step, line in log.lines if "ema/distance" in line] == [12]


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_keep_parameters_in_their_own_way_are_refused_before_training(name: str) -> None:
    strategy = type("Mine", (type(name, (), {}),), {})()
    why = "whose engine steps float32 masters" if "DeepSpeed" in name else "under which it does not"
    with pytest.raises(NotImplementedError, match=f"{name}, {why}"):
        Averaging(EMA()).setup(SimpleNamespace(strategy=strategy), Module(net_of(), Plan()), "fit")
    assert hasattr(lightning.pytorch.strategies, name)


def test_a_checkpoint_resumed_without_the_callback_is_warned_of_by_lightning(tmp_path: Path) -> None:
    trainer, _, _ = fitted(tmp_path, EMA("4ba"))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    plan = Plan(epochs=3)
    with pytest.warns(UserWarning, match="add the following callbacks.*Averaging"):
        trainer_for(tmp_path, plan).fit(Module(net_of(), plan), plan.loader, ckpt_path=tmp_path / "end.ckpt")


def test_a_checkpoint_saved_without_the_callback_begins_an_average_with_a_warning(tmp_path: Path) -> None:
    plan, ema = Plan(epochs=1), Watched("4ba")
    trainer = trainer_for(tmp_path, plan)
    trainer.fit(Module(net_of(), plan), plan.loader)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.warns(PlanWarning, match="saved without this callback"):
        trainer_for(tmp_path, Plan(), Averaging(ema)).fit(
            Module(net_of(), plan), plan.loader, ckpt_path=tmp_path / "end.ckpt"
        )
    assert len(ema.batches) == 12


class Resumable:
    """A loader that can resume inside an epoch, as torchdata's do."""

    def __init__(self, plan: Plan) -> None:
        self._batches, self._next = list(plan.loader), 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        while self._next < len(self._batches):
            self._next += 1
            yield self._batches[self._next - 1]
        self._next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["next"]


@pytest.mark.parametrize("half_life", ["4ba", "1ep"])
def test_with_a_loader_that_has_a_state_resuming_inside_an_epoch_is_exact(tmp_path: Path, half_life: str) -> None:
    plan = Plan()

    def run(ema: Watched, net: nn.Module, resume: Path | None = None) -> Module:
        module = Module(net, plan)
        saver = ModelCheckpoint(tmp_path / str(resume is None), "{step}", save_top_k=-1, every_n_train_steps=3)
        trainer_for(tmp_path, plan, Averaging(ema), saver).fit(module, Resumable(plan), ckpt_path=resume)
        return module

    whole, resumed = Watched(half_life), Watched(half_life)
    one = run(whole, net_of("noisy"))
    other = run(resumed, net_of("noisy", seed=7), tmp_path / "True" / "step=9.ckpt")
    assert not loops.differences(loops.bits(one), loops.bits(other))
    assert not loops.differences(whole.batches[9:], resumed.batches)
    assert not loops.differences(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("half_life", ["4ba", "1ep"])
def test_a_checkpoint_of_the_last_batch_of_an_epoch_resumes_bit_for_bit(tmp_path: Path, half_life: str) -> None:
    plan = Plan(evaluate=True, shuffle=True)

    def run(ema: Watched, net: nn.Module, resume: Path | None = None) -> Module:
        module = Module(net, plan)
        saver = ModelCheckpoint(tmp_path / str(resume is None), "{step}", save_top_k=-1, every_n_train_steps=6)
        trainer = trainer_for(tmp_path, plan, Averaging(ema), saver)
        trainer.fit(module, plan.loader, plan.eval_loader, ckpt_path=resume)
        return module

    whole, resumed = Watched(half_life), Watched(half_life)
    one = run(whole, net_of("noisy"))
    loops.disturb()
    other = run(resumed, net_of("noisy", seed=7), tmp_path / "True" / "step=12.ckpt")
    assert resumed.events.count(Event.EPOCH_END) == 1
    assert not loops.differences(loops.bits(one), loops.bits(other))
    assert not loops.differences(whole.state_dict(), resumed.state_dict())


def test_a_checkpoint_of_a_validation_inside_an_epoch_has_both_sets_of_weights(tmp_path: Path) -> None:
    ema, plan = Watched("4ba"), Plan(epochs=2, evaluate=True)
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=False)
    fitted(tmp_path, ema, saver, plan=plan, val_check_interval=0.5)
    for step, (training, average) in enumerate(ema.batches, 1):
        if step % 3 == 0:
            saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
            assert not loops.differences(average, of_net(saved["state_dict"]))
            assert not loops.differences(training, of_net(saved["polyak"]["algorithms"][0][1]["training_model"]))


def test_a_second_fit_continues_counting(tmp_path: Path) -> None:
    ema, plan = Watched("0.5ep", update_interval="1ba"), Plan(epochs=4)
    trainer, module, averaging = fitted(tmp_path, ema)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, plan.loader)
    now = averaging._loop.state.timestamp
    assert (now.epoch, now.batch) == ("4ep", "24ba")
    assert ema.num_updates == 23


def test_the_training_weights_can_be_evaluated_too(tmp_path: Path) -> None:
    ema, plan = Watched("4ba"), Plan(epochs=1)
    trainer, module, averaging = fitted(tmp_path, ema, plan=plan)
    probe = Probe(module.net)
    averaging.eval_weights = "raw"
    trainer.validate(module, plan.eval_loader, verbose=False)
    assert not loops.differences([ema.batches[-1][0]] * 2, probe.evaluated)
    averaging.eval_weights = ["averaged", "raw"]
    with pytest.raises(ValueError, match="an entry for each of the 1 dataloaders"):
        trainer.test(module, plan.eval_loader, verbose=False)
    trainer.test(module, [plan.eval_loader] * 2, verbose=False)
    weights, average = ema.batches[-1]
    assert not loops.differences([average, average, weights, weights], probe.evaluated[2:])
    for wrong in ("best", ["averaged", "best"], ["averaged", "both"], None):
        with pytest.raises(ArgumentError, match="eval_weights must .*'averaged'"):
            Averaging(EMA(), eval_weights=wrong)
    for old, new in (("training", "raw"), (["averaged", "training"], ["averaged", "raw"])):
        with pytest.warns(DeprecationWarning, match="eval_weights='training' is deprecated; write 'raw'"):
            assert Averaging(EMA(), eval_weights=old).eval_weights == new


def test_the_best_checkpoint_has_the_weights_that_were_scored(tmp_path: Path) -> None:
    saver, ema = ModelCheckpoint(tmp_path, monitor="loss"), EMA("4ba")
    plan = Plan(epochs=3, evaluate=True)
    trainer, module, _ = fitted(tmp_path, ema, saver, plan=plan)
    (scored,) = trainer.validate(module, plan.eval_loader, ckpt_path="best", verbose=False)
    assert scored["loss"] == float(saver.best_model_score)
    alone = Module.load_from_checkpoint(saver.best_model_path, net=net_of(), plan=plan)
    fresh = trainer_for(tmp_path, plan, Averaging(EMA())).validate(alone, plan.eval_loader, verbose=False)
    assert fresh[0]["loss"] == float(saver.best_model_score)


class Counter(Callback):
    """Counts validations, and keeps what callbacks see at their ends."""

    def __init__(self) -> None:
        self.starts, self.batches, self.seen = 0, 0, list[dict[str, float]]()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.starts += 1

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.batches += 1

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.mark.parametrize("monitor", ["loss", "raw_loss"])
def test_with_both_a_checkpoint_is_kept_by_either_and_holds_what_was_measured(tmp_path: Path, monitor: str) -> None:
    plan, ema, counter = Plan(epochs=3, evaluate=True, choice=True), Watched("4ba"), Counter()
    saver = ModelCheckpoint(tmp_path, "{step}-{raw_loss:.3f}", monitor=monitor, save_top_k=-1)
    stopper = EarlyStopping(monitor, patience=5)
    module = Module(net_of(), plan)
    trainer = trainer_for(tmp_path, plan, counter, stopper, Averaging(ema, eval_weights="both"), saver)
    trainer.fit(module, plan.loader, plan.eval_loader)
    assert (counter.starts, counter.batches) == (3, 6)  # callbacks see the evaluation of the average alone
    ends = [ema.batches[step] for step in (5, 11, 17)]
    want = [loss_of(module.net, average if monitor == "loss" else raw, plan) for raw, average in ends]
    assert [one[monitor] for one in counter.seen] == pytest.approx(want, rel=1e-4)
    assert float(saver.best_model_score) == pytest.approx(min(want), rel=1e-4)
    assert float(stopper.best_score) == pytest.approx(min(want), rel=1e-4)
    raw, average = ends[want.index(min(want))]
    saved = torch.load(saver.best_model_path, weights_only=True)
    assert not loops.differences(average, of_net(saved["state_dict"]))
    assert not loops.differences(raw, of_net(saved["polyak"]["algorithms"][0][1]["training_model"]))
    scored = trainer.validate(module, plan.eval_loader, ckpt_path="best", verbose=False)[0]["loss"]
    assert scored == pytest.approx(loss_of(module.net, average, plan), rel=1e-4)


def test_with_both_other_evaluations_have_raw_metrics_too_for_each_dataloader(tmp_path: Path) -> None:
    plan, ema, log = Plan(epochs=2, evaluate=True), Watched("4ba"), Kept()
    trainer, module, averaging = fitted(tmp_path, ema, plan=plan, logger=log)
    averaging.eval_weights = "both"
    want = [loss_of(module.net, tensors, plan) for tensors in ema.batches[-1]]
    (found,) = trainer.validate(module, plan.eval_loader, verbose=False)
    assert [float(trainer.callback_metrics["raw_loss"]), found["loss"]] == pytest.approx(want, rel=1e-4)
    assert [line["raw_loss"] for _, line in log.lines if "raw_loss" in line] == pytest.approx(want[:1], rel=1e-4)
    trainer.test(module, [plan.eval_loader] * 2, verbose=False)
    names = [f"{prefix}loss/dataloader_idx_{i}" for prefix in ("raw_", "") for i in (0, 1)]
    found = [float(trainer.callback_metrics[name]) for name in names]
    assert found == pytest.approx([want[0], want[0], want[1], want[1]], rel=1e-4)
    assert swap_of(module) is None


def test_a_pass_over_the_raw_weights_leaves_no_trace_in_training_or_after_an_error(tmp_path: Path) -> None:
    class Noisy(Module):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            torch.rand(3)
            super().validation_step(batch, batch_idx)

    def run(weights: str, fails: int = 0) -> tuple[Watched, Any]:
        plan, ema = Plan(evaluate=True, shuffle=True), Watched("4ba")
        module = Noisy(net_of("noisy"), plan)
        probe = Probe(module.net)
        if fails:
            probe.raises = ("eval", 0, RuntimeError("as planned"))
        trainer = trainer_for(tmp_path, plan, Averaging(ema, eval_weights=weights))
        loops.disturb()
        with pytest.raises(RuntimeError, match="as planned") if fails else nullcontext():
            trainer.fit(module, plan.loader, plan.eval_loader)
        return ema, trainer

    (one, _), (both, _), (failed, trainer) = run("averaged"), run("both"), run("both", fails=1)
    assert not loops.differences(one.batches, both.batches)
    assert len(trainer.callbacks) > 0
    assert not failed.ema_weights_active
    assert len(failed.batches) == 6


def test_an_optimizer_that_is_replaced_in_mid_run_is_noticed(tmp_path: Path) -> None:
    class Replaces(Module):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.strategy.optimizers = [torch.optim.SGD(self.net.parameters(), lr=0.1)]

    plan, ema = Plan(evaluate=True), Watched("4ba")
    with pytest.warns(PlanWarning, match="steps must be counted.* of SGD, which steps the same parameters, were not"):
        trainer_for(tmp_path, plan, Averaging(ema)).fit(Replaces(net_of(), plan), plan.loader, plan.eval_loader)
    assert len(ema.batches) == 6


def test_a_second_callback_with_an_average_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback|provide a unique `state_key`"):
        trainer_for(tmp_path, Plan(), Averaging(EMA("4ba")), Averaging(EMA("8ba")))


def test_a_compiled_module_is_averaged_under_its_own_names(tmp_path: Path) -> None:
    plan, ema = Plan(epochs=1), Watched("4ba")
    module = Module(net_of(), plan)
    module.net = torch.compile(module.net, backend="eager")
    trainer = trainer_for(tmp_path, plan, Averaging(ema))
    trainer.fit(module, plan.loader)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == module.state_dict().keys()
    assert not loops.differences(ema.average, of_net(saved["state_dict"]))
    assert not loops.differences([*native(plan, "4ba").average.values()], [*ema.average.values()])


def test_a_record_resumes_from_a_checkpoint_and_is_that_of_a_run_that_did_not_stop(tmp_path: Path) -> None:
    def run(folder: Path, resume: Path | None = None) -> None:
        plan = Plan()
        saver = ModelCheckpoint(tmp_path / folder.name / "saved", "{step}", save_top_k=-1)
        algorithms = [Watched("4ba"), Recorder(folder / "record", interval="2ba")]
        trainer_for(tmp_path, plan, Averaging(algorithms), saver).fit(
            Module(net_of(), plan), plan.loader, ckpt_path=resume
        )

    run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    want = Record(tmp_path / "whole" / "record").average(HalfLife("4ba", unbiased=True))
    run(tmp_path / "again", tmp_path / "again" / "saved" / "step=12.ckpt")
    assert not loops.differences(want, Record(tmp_path / "again" / "record").average(HalfLife("4ba", unbiased=True)))


def test_two_averages_and_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one average at a time"):
        Averaging([EMA(), EMA()])
    trainer, _, _ = fitted(tmp_path, EMA("4ba"), plan=Plan(epochs=1))
    with pytest.raises(MismatchError, match="make a new EMA"):
        trainer.fit(Module(net_of(), Plan()), Plan().loader)


def test_the_search_for_a_learning_rate_leaves_no_trace_in_the_average(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import LearningRateFinder

    class Searched(Module):
        lr = 0.02

        def __init__(self, net: nn.Module, plan: Plan) -> None:
            super().__init__(net, plan)
            self.optimizer = torch.optim.SGD(net.parameters(), lr=self.lr)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.optimizer

    def run(*, search: bool) -> Watched:
        ema, plan = Watched("4ba"), Plan(epochs=2)
        module = Searched(net_of(), plan)
        finder = [LearningRateFinder(num_training_steps=5, update_attr=False)] if search else []
        trainer_for(tmp_path, plan, Averaging(ema), *finder).fit(module, plan.loader)
        return ema

    want, found = run(search=False), run(search=True)
    assert not loops.differences(want.batches, found.batches[-12:])
    assert want.num_updates == found.num_updates


def test_the_other_package_of_lightning_takes_the_callback_too(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")
    ema, plan = Watched("4ba"), Plan(epochs=2)

    class Their(other.LightningModule):
        training_step, configure_optimizers = Module.training_step, Module.configure_optimizers

    module = Their()
    module.net, module.plan = net_of(), plan
    trainer = other.Trainer(**trainer_options(tmp_path, plan, Averaging(ema)))
    trainer.fit(module, plan.loader)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert not loops.differences(ema.average, of_net(saved["state_dict"]))
    assert not loops.differences(native(plan, "4ba").batches, ema.batches)


@pytest.mark.parametrize("optimizer", [-1, "adam", True])
def test_what_is_no_number_of_an_optimizer_is_refused_at_the_door(optimizer) -> None:
    with pytest.raises(ArgumentError, match="optimizer must be the number of an optimizer"):
        Averaging(EMA("4ba"), optimizer=optimizer)


def test_an_optimizer_that_the_model_does_not_have_is_refused_by_number(tmp_path: Path) -> None:
    plan = Plan(epochs=1)
    with pytest.raises(ArgumentError, match="one of the model's 1 optimizers .got 3"):
        trainer_for(tmp_path, plan, Averaging(EMA("4ba"), optimizer=3)).fit(Module(net_of(), plan), plan.loader)
