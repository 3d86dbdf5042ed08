"""EMA in a plain loop, against the float64 reference."""

import copy
import math
import re
import sys
from pathlib import Path

import pytest
import reference
import torch
from torch import nn

import polyak.training.steps
from polyak import (
    EMA,
    CallError,
    Event,
    HalfLife,
    LoanError,
    PlanWarning,
    PowerFunction,
    ProfileError,
    Record,
    Recorder,
    Smoothing,
    TimeError,
    Uniform,
    Warmup,
    Window,
    attach,
)
from polyak.averaging.weights import Shadow
from polyak.training.steps import StepHooks


class Loop:
    """A loop that gives one weight a sequence of values, by steps of an optimizer."""

    def __init__(self, ema, **counts) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.attached = attach(ema, self.model, self.optimizer, **counts)
        self.weights: list[torch.Tensor] = []

    def step(self, to: float) -> None:
        self.model.weight.grad = self.model.weight.detach() - to
        self.optimizer.step()
        self.weights.append(self.model.weight.detach().clone())

    def run(self, steps: int) -> "Loop":
        for _ in range(steps):
            self.step(torch.sin(torch.tensor(float(7 * len(self.weights)))).item() + len(self.weights) / 10)
        return self


ONLINE = [
    HalfLife("5ba"),
    HalfLife("0ba"),
    HalfLife("infba"),
    HalfLife("5ba", unbiased=True),
    HalfLife("40sp"),
    HalfLife("1.5ep"),
    HalfLife("0.25dur"),
    HalfLife("300tok"),
    Uniform(),
    Uniform("10ba"),
    PowerFunction(sigma_rel=0.15),
    PowerFunction(gamma=3.0, unit="sp"),
    Warmup(HalfLife("20ba")),
    Warmup(HalfLife("20ba"), power=0.75),
]
COUNTS = {"max_duration": "30ba", "steps_per_epoch": 10, "samples_per_step": 8, "tokens_per_step": 50}
PER_BATCH = {"ba": 1, "sp": 8, "tok": 50, "ep": 0.1, "dur": 1 / 30}


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("profile", ONLINE, ids=repr)
def test_each_update_is_that_of_the_reference_whatever_the_interval(profile, interval) -> None:
    loop = Loop(EMA(profile=profile, update_interval=f"{interval}ba"), **COUNTS).run(30)
    # The average begins with the weights after the first batch; updates follow at multiples of the interval.
    batches = [1, *(b for b in range(2, 31) if b % interval == 0)]
    per = PER_BATCH[str(profile.unit)]
    decays = [profile.decay(a * per, b * per) for a, b in zip(batches[:-1], batches[1:], strict=True)]
    want = reference.online([loop.weights[b - 1] for b in batches], decays)
    torch.testing.assert_close(loop.attached.algorithm.ema_model.weight.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("profile", [p for p in ONLINE if p != HalfLife("infba")], ids=repr)
def test_the_average_is_the_weights_times_the_shares_that_the_profile_gives_them(profile) -> None:
    loop = Loop(EMA(profile=profile, update_interval="1ba"), **COUNTS).run(30)
    per = PER_BATCH[str(profile.unit)]
    shares = reference.shares(profile.decay, [per * b for b in range(1, 31)])
    shares[0] += 1 - sum(shares)  # the first weights stand for all before them
    want = reference.weighted(loop.weights, shares)
    torch.testing.assert_close(loop.attached.algorithm.ema_model.weight.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ema", "share"),
    [
        (EMA(profile=Smoothing(0.9)), lambda t: 0.1),
        (EMA(smoothing=0.9), lambda t: 0.1),
        (EMA(half_life=None, smoothing=0.9), lambda t: 0.1),
        (EMA(profile=Warmup(Smoothing(0.99))), lambda t: reference.newest_diffusers(0.99, t)),
    ],
    ids=["profile", "smoothing", "smoothing, half_life None", "warm-up"],
)
def test_smoothing_counts_updates(ema, share) -> None:
    loop = Loop(ema).run(20)
    want = reference.online(loop.weights, [1 - share(t) for t in range(1, 20)])
    torch.testing.assert_close(ema.ema_model.weight.double(), want, rtol=1e-5, atol=1e-6)


def test_with_composers_arguments_it_is_composers_formula() -> None:
    ema = EMA(half_life="10ba", update_interval="1ba")
    assert ema.smoothing == 2 ** (-1 / 10)
    loop = Loop(ema).run(20)
    average = loop.weights[0].double()
    for weights in loop.weights[1:]:
        average = ema.smoothing * average + (1 - ema.smoothing) * weights.double()
    torch.testing.assert_close(ema.ema_model.weight.double(), average, rtol=1e-5, atol=1e-6)


def test_mixed_units_follow_what_elapses() -> None:
    mixed = Loop(EMA(half_life="2ep", update_interval="5ba"), steps_per_epoch=10).run(40)
    plain = Loop(EMA(half_life="20ba", update_interval="5ba")).run(40)
    torch.testing.assert_close(mixed.attached.algorithm.ema_model.weight, plain.attached.algorithm.ema_model.weight)


def test_averaging_starts_where_it_is_asked_to() -> None:
    for start in ("7ba", "0.35dur", "56sp", "0.7ep"):
        ema = EMA(half_life="5ba", ema_start=start)
        loop = Loop(ema, max_duration="20ba", steps_per_epoch=10, samples_per_step=8)
        loop.run(6)
        assert not ema.ema_started, start
        loop.run(1)
        assert ema.ema_started
        assert torch.equal(ema.ema_model.weight, loop.weights[6])


def test_a_uniform_average_counts_all_weights_since_the_start_the_same() -> None:
    loop = Loop(EMA(profile=Uniform(), ema_start="10ba")).run(30)
    want = torch.stack(loop.weights[10:]).double().mean(0)
    torch.testing.assert_close(loop.attached.algorithm.ema_model.weight.double(), want, rtol=1e-5, atol=1e-6)


def test_updates_in_epochs_are_at_the_ends_of_epochs() -> None:
    ema = EMA(half_life="1ep")
    loop = Loop(ema, steps_per_epoch=10).run(9)
    assert not ema.ema_started
    loop.run(31)
    want = reference.online([loop.weights[i] for i in (9, 19, 29, 39)], [0.5] * 3)
    torch.testing.assert_close(ema.ema_model.weight.double(), want, rtol=1e-5, atol=1e-6)
    by_hand = EMA(half_life="1ep")
    loop = Loop(by_hand, steps_per_epoch="by hand")
    for _ in range(4):
        loop.run(10).attached.end_epoch()
    torch.testing.assert_close(by_hand.ema_model.weight, ema.ema_model.weight)


def test_a_window_cannot_be_followed_online() -> None:
    with pytest.raises(ProfileError, match="one buffer must be able to follow"):
        EMA(profile=Window("10ba"))


@pytest.mark.parametrize("unit", ["sp", "tok", "iter"])
def test_a_clock_that_the_loop_does_not_count_is_an_error_and_not_an_average_that_never_moves(unit) -> None:
    with pytest.raises(ProfileError, match=f"the loop must count {unit}"):
        Loop(EMA(half_life=f"10{unit}")).run(1)


def test_epochs_and_shares_of_the_run_need_to_be_known() -> None:
    with pytest.raises(ProfileError, match="the loop must count ep"):
        Loop(EMA(half_life="2ep", update_interval="1ba")).run(1)
    for times in ({"half_life": "0.5dur"}, {"ema_start": "0.5dur"}, {"update_interval": "0.1dur"}):
        with pytest.raises(TimeError, match="times in dur need a run whose max_duration is known"):
            Loop(EMA(**{"half_life": "1ba", **times})).run(1)


def test_a_step_without_gradients_does_not_count() -> None:
    loop = Loop(EMA(half_life="5ba")).run(3)
    loop.optimizer.zero_grad()
    loop.optimizer.step()
    assert loop.attached.timestamp.batch.value == 3


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips_does_not_count(fused) -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    attached = attach(EMA(half_life="5ba"), model, optimizer)
    for factor in (1.0, float("inf"), 1.0, float("nan"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 1)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert attached.timestamp.batch.value == 3


def test_gradient_accumulation_counts_steps_and_not_passes() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(EMA(half_life="5ba"), model, optimizer) as attached:
        for micro in range(12):
            model(torch.ones(1, 2)).sum().backward()
            if micro % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
    assert attached.timestamp.batch.value == 3


def test_a_step_that_calls_its_parents_step_counts_once_and_one_that_raises_not_at_all() -> None:
    class Child(torch.optim.SGD):
        fail = False

        def step(self, closure=None):
            if self.fail:
                raise RuntimeError
            return super().step(closure)

    model = nn.Linear(1, 1)
    torch.optim.SGD(model.parameters(), lr=0.1)  # hooks the parent's step
    optimizer = Child(model.parameters(), lr=0.1)
    attached = attach(EMA(half_life="5ba"), model, optimizer)
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    optimizer.fail = True
    with pytest.raises(RuntimeError):
        optimizer.step()
    optimizer.fail = False
    optimizer.step()
    assert attached.timestamp.batch.value == 2


def test_the_average_is_swapped_in_for_a_block_and_restored_after_an_error() -> None:
    loop = Loop(EMA(half_life="5ba")).run(10)
    training, average = loop.weights[-1], loop.attached.algorithm.ema_model.weight.clone()
    with pytest.raises(KeyboardInterrupt), loop.attached.applied() as model:
        assert torch.equal(model.weight, average)
        with pytest.raises(LoanError, match="one average at a time"), loop.attached.applied():
            pass
        assert torch.equal(model.weight, average)
        raise KeyboardInterrupt
    assert torch.equal(loop.model.weight, training)


def test_before_averaging_has_begun_the_model_keeps_its_weights() -> None:
    loop = Loop(EMA(half_life="5ba", ema_start="100ba")).run(3)
    with loop.attached.applied() as model:
        assert torch.equal(model.weight, loop.weights[-1])
    with pytest.warns(PlanWarning, match="averaging never started"):
        loop.attached.detach()


def test_a_detached_average_no_longer_moves_but_is_kept() -> None:
    ema = EMA(half_life="5ba")
    loop = Loop(ema)
    with loop.attached:
        loop.run(5)
    average = ema.ema_model.weight.clone()
    loop.run(5)
    assert torch.equal(ema.ema_model.weight, average)
    loop.attached.detach()
    assert loop.attached.timestamp.batch.value == 5


@pytest.mark.parametrize("lent", [False, True])
@pytest.mark.parametrize("profile", [HalfLife("5ba"), Uniform(), Smoothing(0.9), HalfLife("1.5ep")], ids=repr)
def test_a_loop_that_was_stopped_resumes_bit_for_bit(tmp_path, profile, lent) -> None:
    counts = {"steps_per_epoch": 4}
    whole = Loop(EMA(profile=profile, ema_start="2ba", update_interval="1ba"), **counts).run(25)

    first = Loop(EMA(profile=profile, ema_start="2ba", update_interval="1ba"), **counts).run(11)
    if lent:
        first.attached.algorithm.get_ema_model(first.model)
    torch.save({"model": first.model.state_dict(), "ema": first.attached.state_dict()}, tmp_path / "state.pt")

    second = Loop(EMA(profile=profile, ema_start="2ba", update_interval="1ba"), **counts)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second.model.load_state_dict(state["model"])
    second.attached.load_state_dict(state["ema"])
    second.weights = copy.copy(first.weights)
    second.run(14)
    assert torch.equal(second.model.weight, whole.model.weight)
    assert torch.equal(second.attached.algorithm.ema_model.weight, whole.attached.algorithm.ema_model.weight)
    assert second.attached.timestamp == whole.attached.timestamp


def test_two_averages_of_one_model_can_be_compared() -> None:
    fast = Loop(EMA(half_life="2ba"))
    slow = attach(EMA(half_life="20ba"), fast.model, fast.optimizer)
    fast.run(30)
    with fast.attached.applied() as model:
        one = model.weight.clone()
    with slow.applied() as model:
        two = model.weight.clone()
    assert not torch.equal(one, two)
    assert torch.equal(fast.model.weight, fast.weights[-1])
    with slow.applied(), pytest.raises(LoanError, match="HalfLife"), fast.attached.applied():
        pass


def test_an_ema_is_for_one_model() -> None:
    ema = EMA(half_life="5ba")
    Loop(ema)
    with pytest.raises(ValueError, match="make a new EMA"):
        Loop(ema)


@pytest.mark.parametrize("lr", [0.1, 0.2])
def test_of_several_optimizers_the_one_that_steps_last_counts_when_all_weights_have_moved(lr) -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
    first, last = (torch.optim.SGD(part.parameters(), lr=lr) for part in model)
    ema = EMA(half_life="2ba")
    weights = []
    with attach(ema, model, last) as attached:
        for _ in range(4):
            model(torch.ones(1, 1)).square().sum().backward()
            for optimizer in (first, last):
                optimizer.step()
                optimizer.zero_grad()
            weights.append(model[0].weight.detach().clone())
    assert attached.timestamp.batch.value == 4
    want = reference.online(weights, [0.5**0.5] * 3)
    torch.testing.assert_close(ema.ema_model[0].weight.double(), want, rtol=1e-5, atol=1e-6)


def test_optimizers_that_step_in_the_backward_pass_count_one_batch_each_time_that_step_is_called() -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}

    def step_now(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step_now)
    ema, weights = EMA(half_life="2ba"), []
    with attach(ema, model, None, max_duration="4ba", steps_per_epoch=2) as attached:
        for _ in range(4):
            model(torch.ones(1, 1)).square().sum().backward()
            attached.step()
            weights.append(model[0].weight.detach().clone())
        with attached.applied(), pytest.raises(LoanError, match="must not run on averaged weights"):
            model(torch.ones(1, 1)).square().sum().backward()
    assert (attached.timestamp.batch, attached.timestamp.epoch) == ("4ba", "2ep")
    want = reference.online(weights, [0.5**0.5] * 3)
    torch.testing.assert_close(ema.ema_model[0].weight.double(), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="here it is detached"):
        attached.step()


def test_a_loop_whose_steps_are_counted_by_hand_is_warned_of_its_plan_at_the_first() -> None:
    attached = attach(EMA(half_life="5ba", ema_start="100ba"), nn.Linear(1, 1), None, max_duration="4ba")
    with pytest.warns(PlanWarning, match="averaging never starts: its first update is at 100ba"):
        attached.step()


def test_steps_are_counted_by_hand_or_by_the_optimizer_but_not_both() -> None:
    loop = Loop(EMA(half_life="5ba"))
    with pytest.raises(ValueError, match="here those of the optimizer are counted"):
        loop.attached.step()


def test_several_algorithms_follow_one_loop(tmp_path) -> None:
    ema, recorder = EMA(half_life="5ba"), Recorder(tmp_path / "record", interval="2ba")
    with Loop([ema, recorder]).run(10).attached as attached:
        assert attached.algorithm is ema
    assert Record(tmp_path / "record").stretches[-1].end.updates == 10
    with pytest.raises(ValueError, match="one average at a time"):
        Loop([EMA(), EMA()])


def test_weights_that_deepspeed_keeps_elsewhere_are_refused() -> None:
    model = nn.Linear(1, 1)
    model.weight.ds_id = 0  # as ZeRO-3 marks them
    with pytest.raises(NotImplementedError, match=r"under DeepSpeed ZeRO-3 it does not; use polyak\.hosts\.deepspeed"):
        attach(EMA(), model, None)


def test_a_model_in_one_flat_tensor_is_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        """The real one needs processes."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._fsdp_wrapped_module = module

    assert hasattr(torch.distributed.fsdp, "FullyShardedDataParallel")
    with pytest.raises(NotImplementedError, match="under FullyShardedDataParallel it does not"):
        attach(EMA(), nn.Sequential(FullyShardedDataParallel(nn.Linear(1, 1))), None)


class Log:
    """A logger that keeps what it gets."""

    def __init__(self) -> None:
        self.lines: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None) -> None:
        self.lines.append((step, dict(metrics)))


def test_decay_and_distance_are_logged_once_where_an_evaluation_begins() -> None:
    log, ema = Log(), EMA(half_life="5ba", ema_start="2ba")
    loop = Loop(ema, logger=log)
    with loop.run(1).attached.applied():
        pass
    with loop.run(1).attached.applied():
        pass
    loop.run(8)
    average, weights = ema.ema_model.weight.detach().clone(), loop.weights[-1]
    for _ in range(2):
        with loop.attached.applied():
            # Of the training weights also now.
            assert ema.metrics() == log.lines[-1][1]
    want = {"ema/decay": 0.5**0.2, "ema/distance": float((weights - average).norm() / average.norm())}
    assert log.lines == [(2, {"ema/distance": 0.0}), (10, pytest.approx(want, rel=1e-6))]


def test_a_resumed_run_logs_what_an_unstopped_run_logs() -> None:
    one, log = EMA(half_life="5ba"), Log()
    loop = Loop(one).run(4)
    other = Loop(EMA(half_life="5ba"), logger=log)
    other.model.load_state_dict(loop.model.state_dict())
    other.attached.load_state_dict(loop.attached.state_dict())
    with other.attached.applied():
        pass
    assert log.lines == [(4, one.metrics())]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_distance_is_that_of_the_parameters_relative_to_their_average(dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(4, 4)).to(dtype)
    model[0].to(memory_format=torch.channels_last)
    model[2].weight.requires_grad_(requires_grad=False)
    shadow = Shadow(model)
    before = {name: tensor.detach().double() for name, tensor in model.named_parameters() if tensor.requires_grad}
    before = {name: tensor.clone() for name, tensor in before.items()}
    with torch.no_grad():
        for tensor in [*model.parameters(), model[1].running_var]:
            tensor.add_(torch.randn_like(tensor))
    after = {name: tensor.detach().double() for name, tensor in model.named_parameters() if name in before}
    apart = sum(float((after[name] - before[name]).square().sum()) for name in before)
    want = (apart / sum(float(tensor.square().sum()) for tensor in before.values())) ** 0.5
    assert shadow.distance() == pytest.approx(want, rel=1e-6)
    with shadow.swapped("the test"):
        assert shadow.distance() == pytest.approx(want, rel=1e-6)
        with pytest.raises(LoanError, match="got the average of the test"):
            Shadow(model).distance()


def test_the_distance_from_an_average_of_nothing_but_zeros_is_none_or_infinite() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    shadow = Shadow(model)
    assert shadow.distance() == 0
    nn.init.ones_(model.weight)
    assert shadow.distance() == math.inf


def test_an_error_in_a_block_fires_exception_and_fit_end_once() -> None:
    class Hears(EMA):
        def match(self, event, state):
            heard.append(event)
            return super().match(event, state)

    heard: list[Event] = []
    with pytest.raises(RuntimeError, match="as planned"), Loop(Hears(half_life="5ba")).run(2).attached as attached:
        raise RuntimeError("as planned")
    attached.detach()
    assert heard == [Event.INIT, Event.FIT_START, *[Event.BATCH_END] * 2, Event.EXCEPTION, Event.FIT_END]


def test_the_step_that_torch_takes_for_a_state_to_load_into_does_not_count() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    began = []

    class Hears(EMA):
        def apply(self, event, state, logger) -> None:
            began.append(event)
            super().apply(event, state, logger)

    attached = attach(Hears("2ba"), model, optimizer)
    assert get_optimizer_state_dict(model, optimizer)["state"]
    assert attached.timestamp.batch == "0ba"
    assert began == [Event.INIT]


def test_torch_checkpoints_look_into_a_state() -> None:
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict

    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(EMA("2ba"), model, optimizer)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    flat, _ = flatten_state_dict({"ema": attached.state_dict()})
    assert torch.equal(flat["ema.algorithms.0.1.ema_model.weight"], model.weight)


def test_a_step_takes_at_most_20_calls_between_the_optimizer_and_the_algorithm(monkeypatch) -> None:
    monkeypatch.setattr(polyak.training.steps, "_OBSERVING", ())  # optimizers of other tests that still exist
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    attached = attach(EMA("10ba"), model, optimizer)
    calls: list[str] = []
    between = re.compile(r"polyak/(training|time|algorithm|events|tensors/optimizers)")

    def note(frame, event, arg) -> None:
        if event == "call" and between.search(file := Path(frame.f_code.co_filename).as_posix()):
            calls.append(f"{file} {frame.f_code.co_name}")

    for counted in [False] * 21 + [True]:  # in the first twenty and before the next, weights are watched
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        sys.setprofile(note if counted else None)
        optimizer.step()
        sys.setprofile(None)
    assert attached.timestamp.batch == "22ba"
    assert len([call for call in calls if "polyak/time/" not in call]) <= 20, calls
    assert not [call for call in calls if call.endswith("span.py __post_init__")]


def test_the_callers_of_a_step_are_not_walked_once_the_optimizer_has_a_state(monkeypatch) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    attached = attach(EMA("10ba"), model, optimizer)
    for step in range(4):
        if step == 1:
            monkeypatch.setattr(StepHooks, "_callers", lambda *_: pytest.fail("the stack was walked"))
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert attached.timestamp.batch == "4ba"


def test_a_second_block_of_what_attach_returned_is_refused_instead_of_counting_nothing() -> None:
    attached = Loop(EMA("2ba")).run(9).attached
    with attached:
        pass
    with pytest.raises(CallError, match=r"it is detached\); attach again"), attached:
        pass
