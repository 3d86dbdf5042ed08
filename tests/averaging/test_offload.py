import copy
import gc
import sys
import threading
import weakref
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import loops
import pytest
import torch
import warm
from forking import forks, in_a_fork
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from waiting import wait_until

import polyak.averaging.movement
import polyak.averaging.weights
from polyak import EMA, MismatchError, Offload, OffloadError, attach
from polyak.averaging.offload import Offloader, _Transfer
from polyak.averaging.weights import Shadow
from polyak.background import running
from polyak.kernels import lerp

TIMEOUT_S = 600.0


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class BrokenError(Exception):
    pass


class Late:
    """Makes background updates as late as they can be: each stops half-way until somebody waits for it.

    ``opened`` lets them continue, ``reached`` counts those that have come half-way.
    """

    def __init__(self, monkeypatch) -> None:
        self.opened, self.reached, self.broken = threading.Event(), threading.Semaphore(0), False
        late, settle = self, Offloader.settle

        class InTwo:
            def __init__(self, averages, online, places, left_out) -> None:
                half = len(averages) // 2
                self.parts = [
                    lerp(averages[part], online[part], places[part], left_out)
                    for part in (slice(half), slice(half, None))
                ]

            def __call__(self, weight, num_updates) -> None:
                self.parts[0](weight, num_updates)
                if threading.current_thread() is not threading.main_thread():
                    late.reached.release()
                    assert late.opened.wait(TIMEOUT_S)
                    if late.broken:
                        raise BrokenError("half-way")
                self.parts[1](weight, num_updates)

        def settle_and_close(offloader) -> None:
            late.opened.set()
            try:
                settle(offloader)
            finally:
                late.opened.clear()

        monkeypatch.setattr(polyak.averaging.movement, "lerp", InTwo)
        monkeypatch.setattr(Offloader, "settle", settle_and_close)

    def half_way(self) -> None:
        """Return in the middle of an update."""
        assert self.reached.acquire(timeout=TIMEOUT_S)


@contextmanager
def lateness():
    with pytest.MonkeyPatch.context() as monkeypatch:
        late = Late(monkeypatch)
        try:
            yield late
        finally:
            late.opened.set()


@pytest.fixture
def late():
    with lateness() as found:
        yield found


def net(dtype=torch.float32, *, gaps=True) -> nn.Module:
    """A model with buffers of both kinds, and with ``gaps`` a weight that is neither contiguous nor dense."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        if gaps:
            model.register_parameter("gaps", nn.Parameter(torch.randn(6, 5).t()[:, ::2]))
    return model.to(dtype)


def shift(model: nn.Module, by: float = 0.25) -> None:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(by if tensor.is_floating_point() else 1)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def exact(value):
    """Return what two states are compared by: every bit, since nan is not equal to nan."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
    return {name: exact(inner) for name, inner in value.items()} if isinstance(value, dict) else value


def same(one, other) -> bool:
    return exact(one) == exact(other)


class Twins:
    """One run with an average in place and one with an offloaded average, both told the same."""

    def __init__(self, dtype, average, gaps) -> None:
        self.models = [net(dtype, gaps=gaps), net(dtype, gaps=gaps)]
        options = {"dtype": average}
        self.shadows = [Shadow(self.models[0], **options), Shadow(self.models[1], **options, offload=Offload())]
        self.states = []
        self.count = 0

    def train(self) -> None:
        self.count += 1
        for model in self.models:
            shift(model, 0.37 * (self.count % 5) - 0.7)

    def overflow(self) -> None:
        for model in self.models:
            nn.init.constant_(model[0].bias, torch.nan)

    def recover(self) -> None:
        for model in self.models:
            nn.init.constant_(model[0].bias, self.count)

    def update(self) -> None:
        for shadow in self.shadows:
            shadow.update_(0.3)

    def evaluate(self) -> None:
        for shadow in self.shadows:
            shadow.swap_in("a test")
        self.compare()
        for shadow in self.shadows:
            shadow.restore()

    def save(self) -> None:
        self.states = [copy.deepcopy(shadow.state_dict()) for shadow in self.shadows]

    def load(self) -> None:
        """Load what was saved last, in each the state of the other, unless the model has grown since."""
        errors = []
        for shadow, state in zip(self.shadows, reversed(self.states), strict=False):
            try:
                shadow.load_state_dict(state)
            except MismatchError as error:
                errors.append(str(error))
        assert errors in ([], errors[:1] * 2)

    def use(self) -> None:
        assert same(*(values(shadow.averaged_model()) for shadow in self.shadows))

    def copy(self) -> None:
        targets = [copy.deepcopy(model) for model in self.models]
        for shadow, target in zip(self.shadows, targets, strict=True):
            shadow.copy_to(target)
        assert same(*map(values, targets))

    def count_quarantined(self) -> None:
        assert self.shadows[0].num_quarantined == self.shadows[1].num_quarantined

    def widen(self) -> None:
        for model in self.models:
            model.double()

    def grow(self) -> None:
        self.count += 1
        for model in self.models:
            model.register_parameter(f"new{self.count}", nn.Parameter(torch.full((2,), self.count, dtype=torch.half)))

    def replace(self) -> None:
        for model in self.models:
            model[2].weight = nn.Parameter(model[2].weight.detach().clone() + 1)

    def freeze_and_thaw(self) -> None:
        for model in self.models:
            model[2].bias.requires_grad_(not model[2].bias.requires_grad)

    def compare(self) -> None:
        assert same(*(shadow.state_dict() for shadow in self.shadows))
        assert same(*(shadow.averages for shadow in self.shadows))
        assert same(*map(values, self.models))


ACTS = [name for name in vars(Twins) if not name.startswith("_")]
WIDTHS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(WIDTHS),
    st.sampled_from([None, *WIDTHS]),
    st.booleans(),
    # An update and a step by themselves as often as all that reads the average.
    st.lists(st.sampled_from(["update", "train"]) | st.sampled_from(ACTS), min_size=4, max_size=20),
)
def test_the_average_in_the_background_is_that_in_place_bit_for_bit(dtype, average, gaps, acts) -> None:
    with lateness():
        twins = Twins(dtype, average, gaps)
        for act in acts:
            getattr(twins, act)()
        twins.compare()


def test_an_update_takes_the_weights_as_they_are_and_does_not_wait_for_the_average(late) -> None:
    model = net()
    shadow = Shadow(model, offload=Offload())
    shift(model)
    want = values(model)
    shadow.update_(1.0)
    late.half_way()
    shift(model)  # the next step comes while the thread still works
    assert not late.opened.is_set()
    assert same(dict(shadow.averages), want)


@pytest.mark.parametrize("make", [net, partial(net, gaps=False)])
def test_no_reader_gets_a_half_moved_average(late, make) -> None:
    model = make()  # of plain tensors only, so that a swap can be repeated
    shadow = Shadow(model, offload=Offload())

    def evaluate() -> dict[str, torch.Tensor]:
        with shadow.swapped("a test"):
            return values(model)

    readers = {
        "a swap": evaluate,
        "a second swap": evaluate,
        "a state": lambda: shadow.state_dict()["averages"],
        "averages": lambda: dict(shadow.averages),
        "averaged_tensors": shadow.averaged_tensors,
        "averaged_model": lambda: values(shadow.averaged_model()),
        "averaged_model again": lambda: values(shadow.averaged_model()),
        "copy_to": lambda: [target := make(), shadow.copy_to(target), values(target)][-1],
        "kinds": lambda: {name: tensor for name, (tensor, _) in shadow.kinds().items()},
    }
    for reader, read in readers.items():
        shift(model)
        want = values(model)
        shadow.update_(1.0)
        late.half_way()
        assert same({name: tensor.clone() for name, tensor in read().items()}, want), reader


def test_a_running_update_ends_before_a_state_is_loaded_or_tensors_are_listed_again(late) -> None:
    model = net()
    shadow = Shadow(model, offload=Offload())
    state = copy.deepcopy(shadow.state_dict())
    for change in (
        lambda: shadow.load_state_dict(state),
        lambda: [model.double(), shadow.swap_in("a"), shadow.restore()],
    ):
        shift(model)
        shadow.update_(1.0)
        late.half_way()
        under_way = shadow._movement.offloader
        change()
        now = exact(dict(shadow.averages))
        under_way.settle()
        assert exact(dict(shadow.averages)) == now


def test_the_quarantine_is_counted_to_the_last_update(late) -> None:
    model = net()
    shadow = Shadow(model, offload=Offload())
    nn.init.constant_(model[2].bias, torch.nan)
    shadow.update_(0.5)
    late.half_way()
    assert shadow.num_quarantined == 1
    shadow.update_(0.5)
    assert shadow.state_dict()["num_quarantined"] == 2
    assert shadow.num_updates == 2


def test_the_average_moves_when_the_weights_are_copied(late, monkeypatch) -> None:
    """As on a GPU, where copies are only begun by the call: here they are made at the latest moment."""
    monkeypatch.setattr(_Transfer, "wait", _Transfer.start)
    monkeypatch.setattr(_Transfer, "start", lambda _: None)
    model = net()
    shadow = Shadow(model, offload=Offload())
    for _ in range(3):
        shift(model)
        want = values(model)
        shadow.update_(1.0)
        late.half_way()
        shift(model)
        assert same(dict(shadow.averages), want)


def test_no_graph_is_built_in_the_background() -> None:
    model = net(torch.bfloat16)
    shadow = Shadow(model, dtype=torch.float64, offload=Offload())
    shadow.averaged_model()[1].running_mean.requires_grad_()  # the average's own tensor
    shift(model)
    shadow.update_(1.0)
    assert torch.equal(shadow.averages["1.running_mean"], model[1].running_mean.double())
    assert not any(tensor.requires_grad for tensor in shadow._movement.offloader.staged)


def test_at_most_one_update_is_under_way(monkeypatch) -> None:
    going, running, most = threading.Event(), 0, 0

    class Slow:
        def __init__(self, *arguments) -> None:
            self.update = lerp(*arguments)

        def __call__(self, weight, num_updates) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            assert going.wait(TIMEOUT_S)
            self.update(weight, num_updates)
            running -= 1

    monkeypatch.setattr(polyak.averaging.movement, "lerp", Slow)
    model = net()
    shadow = Shadow(model, offload=Offload())
    shadow.update_(0.5)
    second = threading.Thread(target=shadow.update_, args=(0.5,))
    second.start()
    second.join(0.1)
    assert second.is_alive()
    going.set()
    second.join(TIMEOUT_S)
    assert not second.is_alive()
    assert shadow.state_dict()["num_updates"] == 2
    assert most == 1


def test_an_update_only_copies_and_allocates_nothing() -> None:
    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found.append(str(function))
            return function(*args, **(kwargs or {}))

    found = []
    model = net()
    shadow = Shadow(model, offload=Offload())
    shadow.update_(0.5)
    places = [tensor.data_ptr() for tensor in shadow._movement.offloader.staged]
    with Operations():
        for _ in range(3):
            shadow.update_(0.5)
    assert found == ["aten._foreach_copy_.default"] * 3
    assert places == [tensor.data_ptr() for tensor in shadow._movement.offloader.staged]


CALLS = {
    "update": lambda shadow: shadow.update_(0.5),
    "swap_in": lambda shadow: shadow.swap_in("a test"),
    "state": lambda shadow: shadow.state_dict(),
    "averages": lambda shadow: shadow.averages,
    "averaged_tensors": lambda shadow: shadow.averaged_tensors(),
    "averaged_model": lambda shadow: shadow.averaged_model(),
    "copy_to": lambda shadow: shadow.copy_to(net()),
    "num_quarantined": lambda shadow: shadow.num_quarantined,
}


@pytest.mark.parametrize("call", CALLS)
def test_an_error_in_the_background_is_raised_until_a_state_is_loaded(late, call) -> None:
    model = net()
    shadow = Shadow(model, offload=Offload())
    shift(model)
    shadow.update_(0.5)
    state = copy.deepcopy(shadow.state_dict())
    training = values(model)
    late.broken = True
    shadow.update_(0.5)
    for _ in range(2):
        with pytest.raises(OffloadError, match=r"one failed \(BrokenError\('half-way'\)\).*load a state") as caught:
            CALLS[call](shadow)
        assert isinstance(caught.value.__cause__, BrokenError)
        assert same(values(model), training)
        assert shadow.owner is None
        assert shadow.num_updates == 2
    late.broken = False
    model.double()  # nor does a model that has changed hide it
    with pytest.raises(OffloadError):
        CALLS[call](shadow)
    model.float()
    with pytest.raises(MismatchError):
        shadow.load_state_dict(Shadow(nn.Linear(1, 1)).state_dict())
    with pytest.raises(OffloadError):
        CALLS[call](shadow)
    shadow.load_state_dict(state)
    CALLS[call](shadow)
    if shadow.owner:
        shadow.restore()
    assert shadow.num_updates == state["num_updates"] + (call == "update")


def test_the_last_error_of_a_run_is_raised_where_it_ends(late) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(EMA("4ba", offload=Offload()), model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model[:3](torch.randn(4, 3)).square().mean().backward()
        late.broken = True
        optimizer.step()
    with pytest.raises(OffloadError):
        attached.detach()


class Interrupted(BaseException):
    pass


@contextmanager
def interrupted_at_line(n: int):
    """Interrupt this thread at the n-th line that it runs in ``offload.py``."""
    lines = 0

    def trace(frame, kind, argument):
        del argument
        nonlocal lines
        if not frame.f_code.co_filename.endswith("averaging/offload.py"):
            return None
        lines += kind == "line"
        if kind == "line" and lines == n:
            raise Interrupted
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(outer)


def test_an_interrupt_at_any_line_of_an_update_leaves_a_whole_average(late) -> None:
    del late
    for n in range(1, 100):
        model = net()
        shadow = Shadow(model, offload=Offload())
        for _ in range(2):
            shift(model)
            shadow.update_(1.0)
        before = values(model)
        shift(model)
        now = values(model)
        try:
            with interrupted_at_line(n):
                shadow.update_(1.0)
        except Interrupted:
            due = shadow._movement.offloader._job == (1.0, 3)
            shift(model)
            assert same(dict(shadow.averages), now if due else before), n
            shadow.update_(1.0)
            assert same(dict(shadow.averages), values(model)), n
        else:
            break
    assert n > 5


def test_an_interrupt_at_any_line_of_waiting_leaves_the_update_to_be_waited_for(late) -> None:
    for n in range(1, 100):
        model = net()
        shadow = Shadow(model, offload=Offload())
        shift(model)
        shadow.update_(1.0)
        late.half_way()
        want = values(model)
        done = True
        with suppress(Interrupted), interrupted_at_line(n):
            done = False
            shadow.swap_in("a test")
            done = True
            shadow.restore()
        assert shadow.owner is None
        shift(model)
        assert same(dict(shadow.averages), want), n
        if done:
            break
    assert n > 5


ENDS = """
import threading, torch
from torch import nn
import polyak.averaging.movement
import polyak.averaging.weights
from polyak import Offload
from polyak.kernels import lerp

opened = threading.Event()

class Slow:
    def __init__(self, *arguments):
        self.update = lerp(*arguments)

    def __call__(self, weight, num_updates):
        opened.wait(600)
        self.update(weight, num_updates)

polyak.averaging.movement.lerp = Slow
shadow = polyak.averaging.weights.Shadow(nn.Linear(100, 100), offload=Offload())
shadow.update_(0.5)
threading.Timer(0.3, opened.set).start()
"""


@pytest.mark.slow
def test_a_process_ends_with_an_update_under_way() -> None:
    done = warm.run("-c", ENDS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@forks
def test_a_forked_process_continues_with_its_own_thread() -> None:
    model = net()
    shadow = Shadow(model, offload=Offload())
    shadow.update_(0.5)
    assert shadow.num_quarantined == 0  # the update has ended

    def again() -> None:
        shift(model)
        shadow.update_(1.0)
        assert same(dict(shadow.averages), values(model))

    assert in_a_fork(again) == ""
    again()


@forks
def test_a_process_that_was_forked_during_an_update_refuses_its_half_moved_average(late) -> None:
    shadow = Shadow(net(), offload=Offload())
    state = copy.deepcopy(shadow.state_dict())
    shadow.update_(0.5)
    late.half_way()

    def refuses() -> None:
        late.opened = threading.Event()  # a thread that is not here may hold the lock of the other
        for call in (lambda: shadow.update_(0.5), shadow.state_dict):
            with pytest.raises(OffloadError, match="forked during an update"):
                call()
        shadow.load_state_dict(state)
        shadow.update_(0.5)
        assert shadow.state_dict()["num_updates"] == 1

    assert in_a_fork(refuses) == ""
    shadow.update_(0.5)
    assert shadow.state_dict()["num_updates"] == 2


def threads() -> int:
    return running("polyak-offload")


def test_an_offloaded_average_is_freed_with_its_model_and_its_thread_ends() -> None:
    gc.collect()
    model = net()
    shadow = Shadow(model, offload=Offload(overlap=True))
    shadow.update_(0.5)
    assert threads() > 0
    alive = weakref.ref(model)
    del model, shadow
    gc.collect()
    wait_until(lambda: not threads())
    assert alive() is None


def test_device_and_offload_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"device must be None for an offloaded average.*got 'cpu'"):
        Shadow(net(), device="cpu", offload=Offload())


def trained(folder: Path, ema: EMA, **options):
    return loops.train(folder, ema=ema, model=loops.noisy_perceptron(), shuffle=True, **options)


def test_a_run_with_an_offloaded_average_is_one_without(tmp_path, late) -> None:
    del late
    found = []
    for name, how in (("in place", None), ("offloaded", Offload())):
        trainer = trained(tmp_path / name, EMA("4ba", offload=how))
        trainer.fit()
        found.append(loops.everything(trainer, tmp_path / name))
    assert loops.differences(*found) == []


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_run_with_an_offloaded_average_resumes_bit_for_bit(tmp_path, late, dtype) -> None:
    del late

    def build(folder, **options):
        return trained(folder, EMA("4ba", dtype=dtype, offload=Offload()), **options)

    assert loops.resume_differences(build, tmp_path) == {}


@pytest.mark.parametrize("overlap", [False, True])
def test_copies_are_ordered_against_changes_of_the_weights(monkeypatch, overlap) -> None:
    """Without a GPU: which stream is told what, in which order."""
    told = []

    class Stream:
        def __init__(self, name) -> None:
            self.name = name

        def wait_event(self, event) -> None:
            told.append((self.name, "waits for", event.holds))

    class Event:
        def __init__(self, *, blocking) -> None:
            assert blocking

        def record(self, stream) -> None:
            self.holds = tuple(what for who, what, *_ in told if what in ("weight", "buffer"))
            told.append((stream.name, "records", self.holds))

    class Into:
        def __init__(self, name) -> None:
            self.name = name

        def copy_(self, tensor, *, non_blocking) -> None:
            assert non_blocking
            told.append((now.name, self.name))

    @contextmanager
    def on(stream):
        nonlocal now
        now, before = stream, now
        yield
        now = before

    now = main = Stream("main")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: told.append((stream.name, "is recorded")))
    rows = [(Into("weight"), torch.ones(1), overlap), (Into("buffer"), torch.ones(1), False)]
    transfer = _Transfer(torch.device("cuda", 0), rows)
    transfer.start()
    both = ("buffer", "weight")
    copied = [
        ("side", "is recorded"),
        ("main", "buffer"),
        ("main", "records", ("buffer",)),
        ("side", "waits for", ("buffer",)),
        ("side", "weight"),
        ("side", "records", both),
    ]
    assert told == (copied if overlap else [("main", "weight"), ("main", "buffer"), ("main", "records", both[::-1])])
    told.clear()
    transfer.hold()
    assert told == [("main", "waits for", both if overlap else both[::-1])]


@pytest.mark.parametrize("overlap", [False, True])
def test_changes_of_the_weights_wait_for_copies_that_overlap(monkeypatch, overlap) -> None:
    held = []
    monkeypatch.setattr(_Transfer, "hold", lambda _: held.append(values(model)))
    model = net()
    shadow, other = Shadow(model, offload=Offload(overlap)), Shadow(model)
    shift(model)
    state = copy.deepcopy(other.state_dict()) | {"training": values(model)}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for change in (optimizer.step, lambda: other.swap_in("a test"), lambda: other.load_state_dict(state)):
        if other.owner:
            other.restore()
        shadow.update_(0.5)
        before = values(model)
        held.clear()
        change()
        assert not same(values(model), before)
        assert same(held[0], before) if overlap else held == []
    del shadow
    gc.collect()
    held.clear()
    optimizer.step()
    assert held == []


gpu = pytest.mark.gpu
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(dtype=torch.float32, *, odd: bool = True) -> nn.Module:
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)), nn.BatchNorm1d(1024)).to("cuda", dtype)
    if odd:
        model[0].weight.data = model[0].weight.data.t()
        model[1].weight.data = model[1].weight.data.repeat(1, 2)[:, ::2]
    return model


@gpu
@no_gpu
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("average", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_the_average_is_that_made_in_turns(dtype, average, overlap) -> None:
    model = on_gpu(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shadow, plain = Shadow(model, dtype=average, offload=Offload(overlap)), Shadow(model, dtype=average, device="cpu")
    for step in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, 1024, device="cuda", dtype=dtype)).square().mean().backward()
        optimizer.step()
        plain.update_(0.1)
        shadow.update_(0.1)
        if step % 5 == 0:
            with shadow.swapped("a test"):
                pass
    assert same(shadow.state_dict(), plain.state_dict())
    assert all(tensor.is_pinned() for tensor in shadow._movement.offloader.staged)


@gpu
@no_gpu
@pytest.mark.parametrize("overlap", [False, True])
def test_on_a_gpu_neither_the_next_step_nor_the_next_batch_is_seen_however_late_the_copy(overlap) -> None:
    model = on_gpu()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    shadow = Shadow(model, offload=Offload(overlap))
    shadow.update_(1.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.cuda.synchronize()
    want = {name: tensor.cpu() for name, tensor in values(model).items()}
    with torch.cuda.stream(shadow._movement.offloader._transfers[0]._stream or torch.cuda.current_stream()):
        torch.cuda._sleep(200_000_000)
    shadow.update_(1.0)
    model(torch.randn(8, 1024, device="cuda"))  # changes buffers
    optimizer.step()
    assert same(dict(shadow.averages), want)


@gpu
@no_gpu
@pytest.mark.parametrize("overlap", [False, True])
def test_on_a_gpu_an_update_waits_for_nothing_and_takes_no_memory_there(overlap) -> None:
    model = on_gpu(torch.bfloat16, odd=False)  # torch gives odd ones a new layout, which takes memory
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    shadow = Shadow(model, offload=Offload(overlap))
    shadow.update_(0.1)
    shadow._movement.wait()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            shadow.update_(0.1)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    with shadow.swapped("a test"):
        pass
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before < 1 << 20
