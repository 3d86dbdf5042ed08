"""The contract that every host is held to: it does what the native ``Trainer`` does on the same data, and no more.

A host's test file says how a script in its framework is written, as a ``Host``, and inherits the tests::

    HOST = LightningHost()

    class TestContract(HostContract):
        host = HOST

The model is looked at from inside its own ``forward`` (``Probe``) and the average from inside the algorithm
(``Watched``), so that all frameworks are looked at in the same way.
"""

import copy
import inspect
import os
import re
import signal
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Protocol

import loops
import pytest
import reference
import torch
from launching import exit_code
from paths import ROOT
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from polyak import EMA, Event, HalfLife, Recorder, Trainer
from polyak.averaging.swap import swap_of
from polyak.errors import AbsentError, LoanError, ProfileError, TimeError
from polyak.training.handle import Handle

# Capabilities that a host may lack, for the reason in ``Host.lacks``; tests that need one are skipped with that reason.
# The table in the README has a row for each.
CAPABILITIES = {
    "equal": "weights and average after each step: the native trainer's, bit for bit",
    "accumulation": "the same with gradient accumulation",
    "skipped": "steps that mixed precision skips are not averaged",
    "buffers": "BatchNorm statistics averaged, counters copied",
    "compiled": "`torch.compile`d models",
    "epochs": "half-lives in epochs and shares of the run",
    "samples": "half-lives in samples",
    "tokens": "half-lives in tokens",
    "evaluation": "evaluation with the average",
    "choice": "evaluation of raw and averaged weights side by side",
    "prediction": "prediction with the average",
    "metrics": "`ema/decay` and `ema/distance` in its own loggers",
    "restored": "training weights back after evaluation, saving, an error, an interrupt",
    "saving": "the average where its users load weights from",
    "epoch end": "resumed at the end of an epoch, bit for bit",
    "random": "the same with shuffled data and dropout",
    "kill": "the same after `kill -9`",
    "mid-epoch": "resumed inside an epoch, bit for bit",
    "random mid-epoch": "the same with shuffled data and dropout, inside an epoch",
}
# The capability that another one requires.
NEEDS = {
    "choice": ["evaluation"],
    "metrics": ["evaluation"],
    "random": ["epoch end"],
    "kill": ["epoch end"],
    "random mid-epoch": ["random", "mid-epoch"],
}


def why_not(capability: str, lacks: Mapping[str, str]) -> str | None:
    """Return the reason why a host that lacks these does not have a capability, or None if it has it."""
    assert {capability, *lacks} <= CAPABILITIES.keys()
    reasons = [lacks.get(capability), *(why_not(other, lacks) for other in NEEDS.get(capability, []))]
    return next(filter(None, reasons), None)


@dataclass(frozen=True)
class Plan:
    """The task of a script: train with Adam on batches of ``loops.BATCH`` samples."""

    epochs: int = 3
    steps: int = 6  # optimizer steps in an epoch
    accumulate: int = 1  # batches in a step
    evaluate: bool = False  # at the end of every epoch
    save_every: int | None = None  # steps
    shuffle: bool = False
    choice: bool = False  # whether evaluation is of the training weights too
    scaled: bool = False  # whether there is a gradient scaler
    weights: str = "averaged"  # those of evaluations, if it is no choice
    counted: bool = True  # whether the script says how many samples, tokens and steps there are

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        return torch.amp.GradScaler("cpu", init_scale=2.0) if self.scaled else None

    @property
    def eval_weights(self) -> Any:
        return "both" if self.choice else self.weights

    @property
    def lengths(self) -> dict[str, Any]:
        """What ``attach`` is told of a loop."""
        samples = loops.BATCH * self.accumulate
        per_step = {"samples_per_step": samples, "tokens_per_step": 6 * samples}
        return {"max_duration": f"{self.epochs}ep", "steps_per_epoch": self.steps, **per_step}

    @property
    def data(self) -> TensorDataset:
        return loops.dataset(self.steps * self.accumulate)

    @property
    def eval_data(self) -> TensorDataset:
        return loops.dataset(2, seed=5)

    @property
    def loader(self) -> DataLoader:
        return DataLoader(self.data, batch_size=loops.BATCH, shuffle=self.shuffle)

    @property
    def eval_loader(self) -> DataLoader:
        return DataLoader(self.eval_data, batch_size=loops.BATCH)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=0.02)


class Session(Protocol):
    """A script in a framework, with an algorithm attached to its trainer by our adapter."""

    def fit(self, resume: Path | None = None) -> None:
        """Train; resume from a checkpoint, if one is given."""

    def evaluate(self) -> None: ...
    def predict(self) -> None: ...

    def save(self) -> Path:
        """Save now, as this framework's users do by hand, and return where."""
        ...

    def logged(self, name: str) -> list[float]:
        """Return the values of a metric in the framework's own loggers."""
        ...

    def checkpoint(self, step: int) -> Path:
        """Return where ``fit`` saved after that many steps (a multiple of ``Plan.save_every``)."""
        ...


class Host(Protocol):
    """A framework. ``net`` maps inputs to logits; a host that needs to wrap it does so in an attribute ``net``."""

    lacks: ClassVar[Mapping[str, str]]
    uncounted: ClassVar[Collection[str]]  # units that are not counted where ``Plan.counted`` is False
    known_late: ClassVar[Collection[str]]  # those of them of which this is known only when training begins
    losses: ClassVar[tuple[str, str] | None]  # the names of the loss of the average and of the training weights
    golden: ClassVar[str]  # events of two epochs of two steps, with an evaluation and a checkpoint at the end of each

    def session(self, net: nn.Module, algorithm: EMA, folder: Path, plan: Plan) -> Session: ...

    def loadable(self, saved: Path) -> Mapping[str, Tensor]:
        """Return the weights that users find in what ``save`` or ``fit`` saved, as they load it."""
        ...


def num_tokens(batch: Any) -> int:
    """Return the tokens in a batch: as many as there are inputs."""
    return batch[0].numel()


class Probe:
    """Stores the weights in each evaluation, counts the training batches, and raises an error at a given batch."""

    def __init__(self, net: nn.Module) -> None:
        self.evaluated: list[dict[str, Tensor]] = []
        self.trained = 0
        self.raises: tuple[str, int, BaseException] | None = None  # "train" or "eval", after how many, what
        self.raised = 0
        net.register_forward_pre_hook(self._look)

    def __deepcopy__(self, memo: object) -> "Probe":
        return self

    def _look(self, net: nn.Module, inputs: object) -> None:
        if net.training:
            self.trained += 1
        else:
            self.evaluated.append(of_net(loops.bits(net)))
        if self.raises:
            where, after, error = self.raises
            if where == ("train" if net.training else "eval") and (self.trained if net.training else after) >= after:
                self.raises, self.raised = None, self.raised + 1
                raise error


class Overflows:
    """Gives every third batch NaN gradients."""

    def __init__(self, net: nn.Module) -> None:
        self._batches = 0
        net.register_forward_hook(self._spoil)

    def _spoil(self, net: nn.Module, inputs: object, logits: Tensor) -> Tensor:
        self._batches += net.training
        return logits * float("inf") if net.training and self._batches % 3 == 1 else logits


class Watched(EMA):
    """Stores the events, except those inside a batch, and the weights and the average after each batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.events: list[Event] = []
        self.batches: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def match(self, event: Event, state: Any) -> bool:
        if not event.is_inner:
            self.events.append(event)
        return super().match(event, state)

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        super().apply(event, state, logger)
        if event is Event.BATCH_END:
            self.batches.append((of_net(loops.bits(state.model)), self.average))

    @property
    def average(self) -> dict[str, Tensor]:
        return of_net(loops.averaged(self))


def of_net(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies by the names in the net itself, without wrappers."""
    names = {name: name.rpartition("net.")[2].removeprefix("_orig_mod.") for name in tensors}
    return {names[name]: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def net_of(kind: str = "perceptron", seed: int = 0) -> nn.Module:
    torch.set_num_threads(1)
    return {
        "perceptron": loops.perceptron,
        "noisy": loops.noisy_perceptron,
        "normed": lambda seed: loops.seeded(
            lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), seed
        ),
    }[kind](seed)


def native(plan: Plan, *args: Any, kind: str = "perceptron", **kwargs: Any) -> Watched:
    """Do the task of a host in the native trainer; return the algorithm with the stored weights."""
    ema, net = Watched(*args, **kwargs), net_of(kind)
    Trainer(
        net,
        DataLoader(plan.data, batch_size=loops.BATCH * plan.accumulate),
        f"{plan.epochs}ep",
        grad_accum=plan.accumulate,
        algorithms=ema,
        optimizers=plan.optimizer(net),
        loss=nn.functional.cross_entropy,
        num_tokens=num_tokens,
        progress_bar=False,
    ).fit()
    return ema


class Run:
    """A session: the net, the probe in it, and the algorithm that stores the weights."""

    def __init__(
        self,
        host: Host,
        folder: Path,
        plan: Plan,
        ema: Watched | None = None,
        net: nn.Module | None = None,
        wrap: Callable[[nn.Module], nn.Module] = lambda net: net,
    ) -> None:
        self.host, self.plan = host, plan
        self.net = net_of() if net is None else net
        self.probe = Probe(self.net)
        self.ema = Watched("4ba") if ema is None else ema
        folder.mkdir(parents=True, exist_ok=True)
        self.session = host.session(wrap(self.net), self.ema, folder, plan)

    @property
    def weights(self) -> dict[str, Tensor]:
        return of_net(loops.bits(self.net))

    def fit(self, resume: Path | None = None) -> "Run":
        self.session.fit(resume)
        return self

    def assert_training_weights(self) -> None:
        assert swap_of(self.net) is None
        assert not self.ema.ema_weights_active
        assert not loops.differences(self.ema.batches[-1][0], self.weights)

    def count(self, event: Event) -> int:
        return self.ema.events.count(event)


class HostContract:
    """The tests. ``host`` is the framework."""

    host: ClassVar[Host]

    def needs(self, *capabilities: str) -> None:
        for capability in capabilities:
            if reason := why_not(capability, self.host.lacks):
                pytest.skip(f"not {CAPABILITIES[capability]}: {reason}")

    # The average

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_after_each_step_weights_and_average_are_the_native_trainers(self, tmp_path, accumulate) -> None:
        self.needs("equal" if accumulate == 1 else "accumulation")
        plan = Plan(accumulate=accumulate)
        run, want = Run(self.host, tmp_path, plan).fit(), native(plan, "4ba")
        assert len(run.ema.batches) == plan.epochs * plan.steps
        assert not loops.differences(want.batches, run.ema.batches)
        run.assert_training_weights()

    def test_a_step_that_mixed_precision_skips_is_no_step(self, tmp_path) -> None:
        self.needs("skipped")
        run = Run(self.host, tmp_path, Plan(scaled=True))
        Overflows(run.net)
        run.fit()
        assert (run.probe.trained, len(run.ema.batches)) == (18, 12)
        weights = [weights for weights, _ in run.ema.batches]
        assert all(loops.differences(*two) for two in pairwise(weights))
        names = weights[0]
        want = {name: reference.online([w[name] for w in weights], [0.5**0.25] * 11) for name in names}
        for name, average in run.ema.average.items():
            torch.testing.assert_close(average.double(), want[name], rtol=1e-5, atol=1e-6)
        run.assert_training_weights()

    def test_statistics_of_batchnorm_are_averaged_and_swapped_like_the_weights(self, tmp_path) -> None:
        self.needs("buffers")
        plan = Plan(evaluate="evaluation" not in self.host.lacks)
        run = Run(self.host, tmp_path, plan, net=net_of("normed")).fit()
        assert not loops.differences(native(plan, "4ba", kind="normed").batches, run.ema.batches)
        weights, average = run.ema.batches[-1]
        assert run.ema.average["1.num_batches_tracked"] == weights["1.num_batches_tracked"] == 18
        assert loops.differences(weights["1.running_var"], average["1.running_var"])
        if plan.evaluate:
            assert not loops.differences(average, run.probe.evaluated[-1])
        run.assert_training_weights()

    @pytest.mark.filterwarnings("ignore")  # of torch.compile itself
    def test_a_compiled_model_is_averaged_and_swapped_like_the_model_inside(self, tmp_path) -> None:
        self.needs("compiled")
        plan = Plan(epochs=1, evaluate="evaluation" not in self.host.lacks)
        run = Run(self.host, tmp_path, plan, wrap=lambda net: torch.compile(net, backend="eager")).fit()
        assert not loops.differences(native(plan, "4ba").batches, run.ema.batches)
        if plan.evaluate:
            assert not loops.differences([run.ema.average] * 2, run.probe.evaluated)
        run.assert_training_weights()

    @pytest.mark.parametrize(
        ("unit", "options"),
        [
            ("epochs", {"half_life": "0.5ep", "update_interval": "1ba"}),
            ("epochs", {"half_life": "1ep"}),
            ("epochs", {"half_life": "0.2dur", "ema_start": "0.4dur"}),
            ("samples", {"half_life": "20sp", "ema_start": "12sp"}),
            ("tokens", {"half_life": "120tok", "ema_start": "72tok"}),
        ],
        ids=str,
    )
    def test_half_lives_in_other_units_than_batches_are_the_native_trainers(self, tmp_path, unit, options) -> None:
        self.needs(unit)
        plan = Plan(accumulate=1 if "accumulation" in self.host.lacks else 2)
        run, want = Run(self.host, tmp_path, plan, Watched(**options)).fit(), native(plan, **options)
        assert run.ema.num_updates == want.num_updates
        assert not loops.differences([want.average, want.batches], [run.ema.average, run.ema.batches])

    @pytest.mark.parametrize(
        ("argument", "unit"),
        [
            *(("half_life", unit) for unit in ("sp", "tok", "sec", "iter", "ep", "dur")),
            *(("ema_start", unit) for unit in ("tok", "ep")),
            *(("update_interval", unit) for unit in ("tok", "ep")),
            *(("interval of a Recorder", unit) for unit in ("tok", "ep")),
        ],
    )
    def test_a_unit_that_is_not_counted_is_an_error_and_no_run_without_an_average(
        self, tmp_path, unit, argument
    ) -> None:
        time = f"{0.1 if unit == 'dur' else 1}{unit}"
        algorithm = (
            Recorder(tmp_path / "record", interval=time)
            if argument == "interval of a Recorder"
            else EMA(**{"half_life": "4ba", argument: time})
        )
        net, plan = net_of(), Plan(epochs=2, counted=False)
        probe = Probe(net)

        def train() -> None:
            session = self.host.session(net, algorithm, tmp_path, plan)
            if unit not in self.host.uncounted or unit in self.host.known_late:
                session.fit()

        if unit not in self.host.uncounted:
            if unit == "sec":
                pytest.skip("a run of no known number of seconds")
            train()
            assert algorithm.num_updates > 0
            return
        with pytest.raises((TimeError, ProfileError), match=rf"\b{time}'|times in {unit} need"):
            train()
        assert probe.trained <= 1

    def test_a_fit_after_one_that_failed_counts_each_step_once(self, tmp_path) -> None:
        run = Run(self.host, tmp_path, Plan())
        run.probe.raises = ("train", 4, RuntimeError("as planned"))
        with pytest.raises(RuntimeError, match="as planned"):
            run.fit()
        assert run.count(Event.BATCH_END) == 3
        trained = run.probe.trained
        run.fit()
        assert run.count(Event.BATCH_END) - 3 == run.probe.trained - trained > 0
        run.assert_training_weights()

    # The average in the model

    def test_evaluation_sees_the_average_and_gives_the_training_weights_back(self, tmp_path) -> None:
        self.needs("evaluation")
        run = Run(self.host, tmp_path, Plan(evaluate=True)).fit()
        averages = [average for _, average in run.ema.batches]
        ends = [averages[step] for step in (5, 11, 17)]
        assert len(run.probe.evaluated) >= 6
        assert all(any(not loops.differences(end, seen) for end in ends) for seen in run.probe.evaluated)
        run.assert_training_weights()
        seen = len(run.probe.evaluated)
        run.session.evaluate()
        assert len(run.probe.evaluated) == seen + 2
        assert not loops.differences([averages[-1]] * 2, run.probe.evaluated[seen:])
        run.assert_training_weights()
        assert not loops.differences(native(run.plan, "4ba").batches, run.ema.batches)

    def test_raw_and_averaged_weights_can_be_evaluated_side_by_side(self, tmp_path) -> None:
        self.needs("choice")
        run = Run(self.host, tmp_path, Plan(evaluate=True, choice=True)).fit()
        ends = [run.ema.batches[step] for step in (5, 11, 17)]
        # Two batches with each, in any order.
        seen = sorted(map(repr, map(list, map(loops.leaves, run.probe.evaluated))))
        assert seen == sorted(repr(list(loops.leaves(tensors))) for end in ends for tensors in end for _ in range(2))
        run.assert_training_weights()
        assert not loops.differences(native(run.plan, "4ba").batches, run.ema.batches)

    @pytest.mark.parametrize("weights", ["averaged", "raw", "both"])
    def test_a_metric_with_a_plain_name_is_that_of_the_weights_that_were_asked_for(self, tmp_path, weights) -> None:
        self.needs("choice")
        if self.host.losses is None:
            pytest.skip("its users name the metrics")
        run = Run(self.host, tmp_path, Plan(evaluate=True, choice=weights == "both", weights=weights)).fit()
        batches = [run.ema.batches[step] for step in (5, 11, 17)]
        raw, averaged = ([loss_of(run.net, one[which], run.plan) for one in batches] for which in (0, 1))
        assert all(abs(one - other) > 1e-4 for one, other in zip(raw, averaged, strict=True))
        plain, prefixed = self.host.losses
        assert run.session.logged(plain)[:3] == pytest.approx(raw if weights == "raw" else averaged, rel=1e-4)
        if weights == "both":
            assert run.session.logged(prefixed)[:3] == pytest.approx(raw, rel=1e-4)
        else:
            with suppress(KeyError, AssertionError):
                assert not run.session.logged(prefixed)
        run.assert_training_weights()
        assert not loops.differences(native(Plan(), "4ba").batches, run.ema.batches)

    def test_decay_and_distance_go_to_the_frameworks_own_loggers(self, tmp_path) -> None:
        self.needs("metrics")
        run = Run(self.host, tmp_path, Plan(evaluate=True)).fit()
        assert run.session.logged("ema/decay") == pytest.approx([0.5**0.25] * 3)
        far = []
        for weights, average in (run.ema.batches[step] for step in (5, 11, 17)):
            apart, whole = (
                torch.cat([tensor.flatten() for tensor in tensors]).norm()
                for tensors in ([weights[n] - average[n] for n in average], average.values())
            )
            far.append(float(apart / whole))
        assert run.session.logged("ema/distance") == pytest.approx(far, rel=1e-5)

    def test_prediction_sees_the_average_and_gives_the_training_weights_back(self, tmp_path) -> None:
        self.needs("prediction")
        run = Run(self.host, tmp_path, Plan()).fit()
        run.session.predict()
        assert not loops.differences([run.ema.average] * 2, run.probe.evaluated)
        run.assert_training_weights()

    @pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt], ids=["error", "interrupt"])
    @pytest.mark.parametrize("during", ["training", "evaluation in fit", "evaluation", "prediction"])
    def test_after_an_exception_the_model_has_its_training_weights(self, tmp_path, during, kind) -> None:
        self.needs("restored")
        if during != "training":
            self.needs("prediction" if during == "prediction" else "evaluation")
        run = Run(self.host, tmp_path, Plan(evaluate=during == "evaluation in fit"))
        if during in {"evaluation", "prediction"}:
            run.fit()
        error = kind("as planned")  # a new one: polyak would search everything that an old traceback refers to
        run.probe.raises = ("train", 8, error) if during == "training" else ("eval", 0, error)
        # Some frameworks end an interrupted run without an exception, or exit the program.
        with suppress(kind, SystemExit):
            {"evaluation": run.session.evaluate, "prediction": run.session.predict}.get(during, run.fit)()
        assert run.probe.raised == 1
        run.assert_training_weights()

    @pytest.mark.parametrize("use", ["evaluation", "saving"])
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"half_life": "1000ba"}, r"mostly its first weights: they are 99.7% of it after 5 updates \(half-life"),
            ({"half_life": "4ba", "ema_start": "8ba"}, r"averaging has not begun.*0 updates at 6ba.*ema_start='8ba'"),
            ({"half_life": "4ba"}, None),
            ({"half_life": None, "profile": HalfLife("1000ba", unbiased=True)}, None),
        ],
        ids=["young", "raw", "old enough", "unbiased"],
    )
    def test_an_average_that_is_raw_or_young_is_used_with_one_warning(self, tmp_path, use, options, message) -> None:
        self.needs(use)
        plan = Plan(epochs=2, evaluate=True) if use == "evaluation" else Plan(epochs=2, save_every=6)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Run(self.host, tmp_path, plan, Watched(**options)).fit()
        found = [str(warning.message) for warning in caught if re.search("mostly its|not begun", str(warning.message))]
        assert len(found) == (message is not None), found
        assert message is None or re.search(message, found[0]), found

    # The handle

    def test_what_users_hold_is_the_handle_of_the_average(self, tmp_path) -> None:
        run = Run(self.host, tmp_path, Plan())
        handle = getattr(run.session, "handle", None)
        if handle is None:
            pytest.skip("its users hold no handle")
        assert isinstance(handle, Handle)
        text = repr(handle)
        assert "half" in text.lower()
        with pytest.raises(LoanError, match=r"train until then|train\(\) or fit\(\) first"):
            _ = handle.model
        run.fit()
        assert handle.average is run.ema
        assert not loops.differences(run.ema.average, of_net(dict(handle.model.named_parameters())))
        assert handle.num_updates >= 17
        assert handle.metrics() == run.ema.metrics()
        assert isinstance(handle.state_dict(), dict)
        with handle.applied() as model:
            assert not loops.differences(run.ema.average, of_net(loops.bits(model)))
            if "evaluation" not in self.host.lacks and not hasattr(run.session, "attached"):
                run.session.evaluate()  # whose end does not end the block
                assert not loops.differences(run.ema.average, run.probe.evaluated[-1])
            assert not loops.differences(run.ema.average, run.weights)
            handle.save(tmp_path / "inside.safetensors")
            with pytest.raises(LoanError, match="one average at a time"), handle.applied():
                pass
        run.assert_training_weights()
        handle.save(tmp_path / "averaged.safetensors")
        for name in ("inside", "averaged"):
            assert not loops.differences(run.ema.average, of_net(load_file(tmp_path / f"{name}.safetensors")))
        with pytest.raises(FileExistsError, match="overwrite=True"):
            handle.save(tmp_path / "averaged.safetensors")
        with pytest.raises(AbsentError, match="has no 'update'; the average follows"):
            handle.update()
        run.assert_training_weights()

    def test_raw_metrics_are_refused_in_a_block_in_which_the_model_holds_the_average(self, tmp_path) -> None:
        self.needs("choice")
        run = Run(self.host, tmp_path, Plan(evaluate=True, choice=True)).fit()
        if hasattr(run.session, "attached") or not hasattr(run.session, "handle"):
            pytest.skip("its users evaluate by hand")
        evaluate = getattr(run.session, "evaluate_both", run.session.evaluate)
        seen = len(run.probe.evaluated)
        refused = pytest.raises(LoanError, match="the raw weights must be in the model to be evaluated")
        with refused, run.session.handle.applied():
            evaluate()
        assert len(run.probe.evaluated) == seen
        run.assert_training_weights()
        evaluate()
        assert len(run.probe.evaluated) == seen + 4

    # What is saved

    def test_users_find_the_average_in_what_is_saved_and_the_model_keeps_its_weights(self, tmp_path) -> None:
        self.needs("saving")
        run = Run(self.host, tmp_path, Plan(save_every=3)).fit()
        run.assert_training_weights()
        assert not loops.differences(native(run.plan, "4ba").batches, run.ema.batches)
        for step in (9, 18):
            found = of_net(self.host.loadable(run.session.checkpoint(step)))
            assert not loops.differences(run.ema.batches[step - 1][1], found)
        assert not loops.differences(run.ema.average, of_net(self.host.loadable(run.session.save())))
        run.assert_training_weights()

    @pytest.mark.parametrize("step", [6, 9], ids=["epoch end", "mid-epoch"])
    @pytest.mark.parametrize("half_life", ["4ba", "1ep"])
    def test_a_resumed_run_is_as_if_it_had_not_stopped(self, tmp_path, half_life, step) -> None:
        self.needs("epoch end" if step == 6 else "mid-epoch")
        if half_life == "1ep":
            self.needs("epochs")
        # With shuffled data and dropout, where the framework itself resumes with them.
        kind = "perceptron" if why_not("random" if step == 6 else "random mid-epoch", self.host.lacks) else "noisy"
        plan = Plan(save_every=3, shuffle=kind == "noisy", evaluate="evaluation" not in self.host.lacks)
        loops.disturb()
        whole = Run(self.host, tmp_path / "whole", plan, Watched(half_life), net_of(kind)).fit()
        loops.disturb()
        resumed = Run(self.host, tmp_path / "resumed", plan, Watched(half_life), net_of(kind, seed=7))
        resumed.fit(whole.session.checkpoint(step))
        assert resumed.probe.trained == 18 - step
        assert not loops.differences(whole.weights, resumed.weights)
        assert not loops.differences(whole.ema.state_dict(), resumed.ema.state_dict())
        assert not loops.differences(whole.ema.batches[-(18 - step) :], resumed.ema.batches[-(18 - step) :])

    def test_a_run_that_was_killed_resumes_from_its_last_checkpoint(self, tmp_path) -> None:
        self.needs("kill")
        plan = Plan(save_every=6)
        # The name by which another process can import it: pytest names a test's module by its file alone.
        module = ".".join(Path(inspect.getfile(type(self))).relative_to(ROOT).with_suffix("").parts)
        assert exit_code(die, module, tmp_path / "killed") == -signal.SIGKILL
        whole = Run(self.host, tmp_path / "whole", plan).fit()
        resumed = Run(self.host, tmp_path / "killed", plan, net=net_of(seed=7))
        resumed.fit(resumed.session.checkpoint(12))
        assert resumed.probe.trained == 6
        assert not loops.differences(whole.weights, resumed.weights)
        assert not loops.differences(whole.ema.state_dict(), resumed.ema.state_dict())

    def test_an_average_that_is_attached_to_a_second_run_continues_from_its_new_clock(self, tmp_path) -> None:
        plan = Plan(epochs=2)
        run = Run(self.host, tmp_path / "first", plan).fit()
        (before, average), seen = run.ema.batches[-1], len(run.ema.batches)
        # The framework's own module around the net, if it needs one, is the model.
        model = getattr(run.session, "trained", run.net)
        again = self.host.session(model, run.ema, tmp_path / "second", plan)
        again.fit()
        batches = run.ema.batches[seen:]
        assert len(batches) == 12
        assert loops.differences(before, batches[-1][0])
        for name in average:
            weights = [average[name], *(weights[name] for weights, _ in batches)]
            want = reference.online(weights, [0.5**0.25] * 12)
            torch.testing.assert_close(batches[-1][1][name].double(), want, rtol=1e-5, atol=1e-6)

    # The order

    def test_the_order_of_events_is_the_golden_one(self, tmp_path) -> None:
        plan = Plan(epochs=2, steps=2, evaluate="evaluation" not in self.host.lacks, save_every=2)
        run = Run(self.host, tmp_path, plan, Watched("1ba")).fit()
        assert " ".join(run.ema.events) == " ".join(self.host.golden.split())


def loss_of(net: nn.Module, tensors: Mapping[str, Tensor], plan: Plan) -> float:
    """Return the mean loss of a net on the evaluation data, with other tensors."""
    inputs, labels = plan.eval_data.tensors
    net = copy.deepcopy(net).eval()
    net._forward_pre_hooks.clear()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(torch.func.functional_call(net, dict(tensors), (inputs,)), labels))


class Kills(Probe):
    """Kills the process in the middle of training."""

    def _look(self, net: nn.Module, inputs: object) -> None:
        super()._look(net, inputs)
        if self.trained == 15:
            os.kill(os.getpid(), signal.SIGKILL)


def die(test_module: str, folder: Path) -> None:
    """Run in a separate process, which is killed before the end."""
    run = Run(import_module(test_module).HOST, folder, Plan(save_every=6))
    Kills(run.net)
    run.fit()
