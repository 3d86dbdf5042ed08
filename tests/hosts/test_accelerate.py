"""Loops with Accelerate, held to the contract, and to what only they can get wrong."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import loops
import pytest
import torch
from host_contract import HostContract, Plan, Run, Session, Watched, native, net_of, of_net
from safetensors.torch import load_file
from torch import Tensor, nn

from polyak import EMA, ArgumentError, CheckpointError, HalfLife, LoanError, Record, Recorder

accelerate = pytest.importorskip("accelerate")
from polyak.hosts.accelerate import attach  # noqa: E402


class Tracker(accelerate.tracking.GeneralTracker):
    """A tracker as its users write one."""

    name = "kept"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int | None, dict[str, float]]] = []

    @property
    def tracker(self) -> Any:
        return self.lines

    def store_init_configuration(self, values: Any) -> None:
        """Nothing."""

    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        self.lines.append((step, values))


class AccelerateSession:
    """A script as its users write it."""

    def __init__(self, net: nn.Module, algorithms: Any, folder: Path, plan: Plan) -> None:
        self.folder, self.plan, self.tracker = folder, plan, Tracker()
        self.accelerator = accelerate.Accelerator(
            cpu=True,
            log_with=self.tracker,
            gradient_accumulation_steps=plan.accumulate,
            dataloader_config=accelerate.DataLoaderConfiguration(use_seedable_sampler=plan.shuffle),
        )
        self.accelerator.init_trackers("run")
        self.accelerator.scaler = plan.scaler  # which it makes for a GPU
        self.net, self.optimizer, self.loader, self.eval_loader = self.accelerator.prepare(
            net, plan.optimizer(net), plan.loader, plan.eval_loader
        )
        self.attached = self.handle = attach(
            algorithms,
            self.accelerator,
            self.net,
            self.optimizer,
            **(plan.lengths if plan.counted else {}),
        )
        self.done = 0

    def fit(self, resume: Path | None = None) -> None:
        if resume is not None:
            self.accelerator.load_state(resume)
            self.done = int(resume.name.removeprefix("state-"))
        for epoch in range(self.done // self.plan.steps, self.plan.epochs):
            self.loader.set_epoch(epoch)
            skip = self.done % self.plan.steps
            loader = self.accelerator.skip_first_batches(self.loader, skip * self.plan.accumulate)
            for inputs, labels in loader if skip else self.loader:
                with self.accelerator.accumulate(self.net):
                    self.accelerator.backward(nn.functional.cross_entropy(self.net(inputs), labels))
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                if self.accelerator.sync_gradients:
                    self.after_step()
        self.attached.detach()

    def after_step(self) -> None:
        self.done += 1
        if self.plan.evaluate and self.done % self.plan.steps == 0:
            self.evaluate()
            if self.plan.choice:
                self.run_evaluation()
        if self.plan.save_every and self.done % self.plan.save_every == 0:
            self.accelerator.save_state(self.checkpoint(self.done))
            with self.attached.applied():
                self.accelerator.save_model(self.net, self.checkpoint(self.done) / "for-use")

    def evaluate(self) -> None:
        with self.attached.applied():
            self.run_evaluation()

    @torch.no_grad()
    def run_evaluation(self) -> None:
        self.net.eval()
        try:
            for inputs, _ in self.eval_loader:
                self.net(inputs)
        finally:
            self.net.train()

    predict = evaluate

    def save(self) -> Path:
        with self.attached.applied():
            self.accelerator.save_model(self.net, self.folder / "by-hand" / "for-use")
        return self.folder / "by-hand"

    def logged(self, name: str) -> list[float]:
        steps, lines = zip(*self.tracker.lines, strict=True)
        assert steps == (6, 12, 18)
        return [line[name] for line in lines]

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"state-{step}"


class AccelerateHost:
    lacks: Mapping[str, str] = {
        "random mid-epoch": "skip_first_batches draws from the generators that load_state has just set, so the script "
        "would have to set them again after the first batch",
    }
    losses = None
    uncounted = ("sp", "tok", "sec", "iter", "ep", "dur")
    known_late = ()
    golden = """
        init fit_start
        batch_end batch_end epoch_end eval_start eval_end eval_start eval_end
        batch_end batch_end epoch_end eval_start eval_end eval_start eval_end
        fit_end
    """

    def session(self, net: nn.Module, algorithm: EMA, folder: Path, plan: Plan) -> Session:
        return AccelerateSession(net, algorithm, folder, plan)

    def loadable(self, saved: Path) -> Mapping[str, Tensor]:
        return load_file(saved / "for-use" / "model.safetensors")


HOST = AccelerateHost()


class TestContract(HostContract):
    host = HOST


# Its own traps


def run(folder: Path, algorithms: Any = None, plan: Plan | None = None) -> Run:
    class Host(AccelerateHost):
        def session(self, net, algorithm, folder, plan):
            return AccelerateSession(net, algorithms or algorithm, folder, plan)

    return Run(Host(), folder, plan or Plan())


def test_a_resumable_state_is_neither_saved_nor_loaded_while_the_average_is_swapped_in(tmp_path) -> None:
    lent = run(tmp_path, plan=Plan(save_every=9)).fit()
    accelerator = lent.session.accelerator
    with lent.session.attached.applied():
        with pytest.raises(LoanError, match="a state must be saved with training weights in the model"):
            accelerator.save_state(tmp_path / "wrong")
        with pytest.raises(LoanError, match="a state must be loaded with training weights in the model"):
            accelerator.load_state(tmp_path / "state-9")
        with pytest.raises(LoanError, match="one average at a time"), lent.session.attached.applied():
            pass
    assert not list((tmp_path / "wrong").glob("*.safetensors"))
    lent.assert_training_weights()


def test_a_state_has_the_training_weights_and_the_average_without_pickled_code(tmp_path) -> None:
    saved = run(tmp_path, plan=Plan(save_every=9)).fit()
    weights, average = saved.ema.batches[8]
    assert not loops.differences(weights, of_net(load_file(tmp_path / "state-9" / "model.safetensors")))
    state = torch.load(tmp_path / "state-9" / "custom_checkpoint_0.pkl", weights_only=True)
    assert not loops.differences(average, of_net(state["algorithms"][0][1]["ema_model"]))


def test_passes_that_only_accumulate_gradients_are_not_counted(tmp_path) -> None:
    assert run(tmp_path, plan=Plan(accumulate=3)).fit().session.attached.timestamp.batch.value == 18


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips_do_not_count(fused) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    net = net_of()
    inner = torch.optim.SGD(net.parameters(), lr=0.1, fused=fused)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=torch.amp.GradScaler("cpu", growth_interval=2))
    attached = attach(EMA("4ba"), accelerator, net, wrapped)
    for factor in (1.0, float("inf"), 1.0, float("nan"), 1.0):
        wrapped.zero_grad()
        wrapped.scaler.scale(net(torch.ones(1, 6)).sum() * factor).backward()
        wrapped.step()
    assert attached.timestamp.batch.value == 3


def test_a_record_is_kept_next_to_the_average_and_resumed(tmp_path) -> None:
    plan, profile = Plan(save_every=6), HalfLife("4ba", unbiased=True)
    run(tmp_path, [EMA("4ba"), Recorder(tmp_path / "record", "2ba")], plan).fit()
    want = Record(tmp_path / "record").average(profile)
    run(tmp_path, [EMA("4ba"), Recorder(tmp_path / "record", "2ba")], plan).fit(tmp_path / "state-12")
    assert not loops.differences(want, Record(tmp_path / "record").average(profile))


def test_the_state_of_other_algorithms_is_refused(tmp_path) -> None:
    run(tmp_path, plan=Plan(save_every=6)).fit()
    with pytest.raises(CheckpointError, match=r"the state must be that of \['Recorder'\]"):
        run(tmp_path / "other", [Recorder(tmp_path / "record", "2ba")]).fit(tmp_path / "state-6")


@pytest.mark.parametrize("kind", ["FSDP", "MEGATRON_LM"])
def test_sharded_weights_are_refused(tmp_path, monkeypatch, kind) -> None:
    sharded = accelerate.DistributedType(kind)
    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", property(lambda self: sharded))
    net = net_of()
    with pytest.raises(NotImplementedError, match=f"under {kind} it does not"):
        attach(EMA("4ba"), accelerate.Accelerator(cpu=True), net, Plan().optimizer(net))


def test_a_model_that_deepspeed_has_not_prepared_is_refused(monkeypatch) -> None:
    deepspeed = accelerate.DistributedType.DEEPSPEED
    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", property(lambda self: deepspeed))
    net = net_of()
    with pytest.raises(ArgumentError, match=r"or the model as Accelerate prepared it \(got \w+\)"):
        attach(EMA("4ba"), accelerate.Accelerator(cpu=True), net, Plan().optimizer(net))


def test_an_algorithm_learns_where_the_state_is_saved(tmp_path) -> None:
    class Hears(EMA):
        def state_dict(self):
            heard.append(attached._loop.state.saving_to)
            return super().state_dict()

    heard: list[Path | None] = []
    hears = run(tmp_path, [Hears("4ba")], Plan(save_every=9))
    attached = hears.session.attached
    hears.fit()
    attached.state_dict()
    assert heard == [tmp_path / "state-9", tmp_path / "state-18", None]


def test_a_compiled_model_is_averaged_as_it_is_inside(tmp_path) -> None:
    plan = Plan()
    net = net_of()
    session = AccelerateSession(torch.compile(net, backend="eager"), ema := Watched("4ba"), tmp_path, plan)
    session.fit()
    assert not loops.differences(native(plan, "4ba").average, ema.average)
    with session.attached.applied():
        assert not loops.differences(ema.average, of_net(loops.bits(net)))
