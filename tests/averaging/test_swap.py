"""A swap always ends, and an evaluation changes nothing: whatever happens while the average is in the model."""

import gc
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import CodeType, FrameType

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import polyak
from polyak import EMA, LoanError, MismatchError, PlanWarning, attach, kernels, update_bn
from polyak.averaging.swap import swap_of
from polyak.averaging.weights import Shadow
from polyak.training.attached import Attached

ROOT = str(Path(polyak.__file__).parent)


@pytest.fixture(params=kernels.serving_cpu(), autouse=True)
def kernel(request) -> Iterator[str]:
    with kernels.only(request.param):
        yield request.param


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = (
            nn.Linear(4, 4, dtype=dtype),
            nn.BatchNorm1d(4, dtype=dtype),
            nn.Linear(4, 2, dtype=dtype),
        )
        self.frozen = nn.Parameter(torch.randn(2, dtype=dtype), requires_grad=False)
        self.register_buffer("cache", torch.zeros(2, 2, dtype=dtype), persistent=False)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf], dtype=dtype))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x))) + self.frozen


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def trained(dtype: torch.dtype = torch.float32):
    model = Net(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = attach(EMA(smoothing=0.5), model, optimizer)
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer, ema


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(8, 4, dtype=model.a.weight.dtype).cumsum(0)).square().mean().backward()
    optimizer.step()


def averages_of(ema) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in ema.algorithm.state_dict()["ema_model"].items()}


# What an evaluation may do


def in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        model.seen = model.seen + 1
        model.cache = torch.ones(2, 2, dtype=model.cache.dtype)


def grows_its_cache(model: nn.Module) -> None:
    model.cache = torch.ones(5, 2, dtype=model.cache.dtype)


EVALUATIONS: dict[str, Callable[[nn.Module], object]] = {
    "a forward pass": lambda model: model.eval()(torch.ones(3, 4, dtype=model.a.weight.dtype)),
    "a forward pass in train mode": lambda model: model(torch.randn(8, 4).to(model.a.weight.dtype)),
    "update_bn": lambda model: update_bn(model, [torch.randn(8, 4).to(model.a.weight.dtype)]),
    "buffers assigned in inference mode": in_inference_mode,
    "a cache that grows": grows_its_cache,
    "a buffer deleted": lambda model: delattr(model, "cache"),
    "a buffer set to None": lambda model: setattr(model, "cache", None),
    "buffers written to": lambda model: [buffer.zero_() for buffer in model.buffers()],
    "statistics reset": lambda model: model.norm.reset_running_stats(),
    "a buffer added": lambda model: setattr(model, "more", nn.Buffer(torch.zeros(1), persistent=False)),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_a_swap_undoes_the_changes_of_an_evaluation_to_buffers(evaluation, dtype) -> None:
    model, optimizer, ema = trained(dtype)
    twin, twin_optimizer, twin_ema = trained(dtype)
    for _ in range(3):
        before, averages = everything(model), averages_of(ema)
        with ema.applied(), torch.no_grad():
            EVALUATIONS[evaluation](model)
        model.train()
        after = everything(model)
        assert equal({name: after[name] for name in before}, before)
        assert equal(averages_of(ema), averages)
        step(model, optimizer)
        step(twin, twin_optimizer)
    assert equal({n: t for n, t in everything(model).items() if n != "more"}, everything(twin))
    mine, theirs = averages_of(ema), averages_of(twin_ema)
    assert equal({name: mine[name] for name in theirs}, theirs)


CHANGES: dict[str, tuple[str, Callable[[nn.Module], object]]] = {
    "a merged adapter": ("a.weight", lambda model: model.a.weight.data.add_(0.5)),
    "one element": ("b.weight", lambda model: model.b.weight.data.view(-1)[3:4].mul_(1.5)),
    "a frozen weight": ("frozen", lambda model: model.frozen.data.add_(1)),
    "an in-place operation": ("a.bias", lambda model: model.a.bias.add_(1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_a_parameter_that_changes_while_the_average_is_in_the_model_is_refused_by_name(change, dtype) -> None:
    model, optimizer, ema = trained(dtype)
    before = everything(model)
    name, act = CHANGES[change]
    refused = pytest.raises(LoanError, match=f"must not change while the average is in the model, and '{name}' did")
    with refused, ema.applied(), torch.no_grad():
        act(model)
    assert swap_of(model) is None
    frozen, after = {n for n, p in model.named_parameters() if not p.requires_grad}, everything(model)
    assert all(torch.equal(after[n], before[n]) for n in before if n not in frozen)
    step(model, optimizer)


def test_an_exception_that_leaves_the_block_is_the_one_that_is_seen() -> None:
    model, _, ema = trained()
    with (
        pytest.raises(ValueError, match="mine"),
        pytest.warns(UserWarning, match="'a.weight' did"),
        ema.applied(),
        torch.no_grad(),
    ):
        model.a.weight.add_(1)
        raise ValueError("mine")
    assert swap_of(model) is None


def test_a_tensor_that_cannot_be_restored_is_named_and_the_others_are_restored() -> None:
    model, _, ema = trained()
    before = everything(model)
    with pytest.raises(LoanError, match=r"'a.weight' could not be"), ema.applied():
        model.a.weight = nn.Parameter(torch.zeros(7, 7))
    assert swap_of(model) is None
    after = everything(model)
    assert all(torch.equal(after[name], before[name]) for name in before if name != "a.weight")


# Interrupts


Line = tuple[CodeType, int]


def interrupted_at(place: tuple[Line, int] | None, ema, *, leaving: bool) -> Counter[Line]:
    """Interrupt a line of polyak's when it runs for the n-th time, while the average is swapped in, or restored.

    Returns:
        The lines that ran, and how often.
    """
    ran = Counter[Line]()

    def trace(frame, event, arg):
        del arg
        if not frame.f_code.co_filename.startswith(ROOT):
            return None
        if event == "line":
            line = frame.f_code, frame.f_lineno
            ran[line] += 1
            if (line, ran[line]) == place:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    with suppress(KeyboardInterrupt), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if not leaving:
                sys.settrace(trace)
            with ema.applied():
                sys.settrace(trace if leaving else None)
        finally:
            sys.settrace(None)
    return ran


def places(ema, *, leaving: bool) -> list[tuple[Line, int]]:
    """Return where to interrupt a swap or its end: the first two and the last two runs of each line."""
    for _ in range(2):  # the second is as those that follow
        ran = interrupted_at(None, ema, leaving=leaving)
    return [(line, n) for line, last in ran.items() for n in range(1, last + 1) if n < 3 or n > last - 2]


@pytest.mark.slow
@pytest.mark.parametrize("leaving", [False, True], ids=["entering", "leaving"])
def test_after_an_interrupt_at_any_line_training_continues_from_its_own_weights(leaving) -> None:
    model, optimizer, ema = trained()
    before, averages = everything(model), averages_of(ema)
    interrupted = 0
    for number, place in enumerate(places(ema, leaving=leaving)):
        line, runs = place
        interrupted += interrupted_at(place, ema, leaving=leaving)[line] == runs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a swap that was left without its end says so
            assert equal(averages_of(ema), averages), place
            if number % 2:
                optimizer.zero_grad()
                optimizer.step()  # moves nothing; it must not be refused
            else:
                with ema.applied():
                    pass
        assert equal(everything(model), before), place
        assert swap_of(model) is None, place
    assert interrupted > 0.9 * (number + 1) > 200


def test_two_interrupts_in_a_row_lose_nothing() -> None:
    model, _, ema = trained()
    before = everything(model)
    for place in places(ema, leaving=True)[::7]:
        for _ in range(2):
            interrupted_at(place, ema, leaving=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with ema.applied():
                pass
        assert equal(everything(model), before)


def test_a_restore_that_is_interrupted_each_time_ends_when_the_next_one_asks(monkeypatch) -> None:
    model, optimizer, ema = trained()
    before, averages = everything(model), averages_of(ema)

    def interrupt(swap: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), ema.applied():
        patch.setattr("polyak.averaging.swap.Swap._restore", interrupt)
    assert not equal(everything(model), before)
    assert equal(averages_of(ema), averages)  # a state asks
    assert equal(everything(model), before)
    assert swap_of(model) is None
    step(model, optimizer)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer that sends signals")
def test_real_signals_at_any_moment_lose_nothing() -> None:
    model = nn.Sequential(*[nn.Linear(40, 40) for _ in range(20)])
    shadow = Shadow(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    before, averages = everything(model), {n: t.clone() for n, t in shadow.averages.items()}
    hits, old = 0, signal.signal(signal.SIGALRM, _interrupt)
    for delay in range(1, 400):
        try:
            signal.setitimer(signal.ITIMER_REAL, delay * 2e-5)
            with shadow.swapped("the test"):
                pass
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            hits += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert shadow.owner is None or equal({n: t.clone() for n, t in shadow.averaged_tensors().items()}, averages)
        if shadow.owner is not None:
            shadow.restore()
        assert equal(everything(model), before)
        assert equal(dict(shadow.averages), averages)
        assert torch.is_grad_enabled()
    signal.signal(signal.SIGALRM, old)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if frame is not None and frame.f_code.co_name == "gc_callback":
        return  # Hypothesis's: Python only prints what is raised in it
    raise KeyboardInterrupt


def test_a_handler_that_asks_while_weights_are_exchanged_is_refused_and_nothing_is_mixed_up() -> None:
    model, _, ema = trained()
    before, averages, answers = everything(model), averages_of(ema), list[str]()

    def trace(frame, event, arg):
        del event, arg
        if frame.f_code.co_qualname == "Swap._restore" and not answers:
            try:
                answers.append("same" if equal(averages_of(ema), averages) else "mixed up")
            except LoanError as error:
                answers.append(str(error))

    with ema.applied():
        sys.settrace(trace)
    sys.settrace(None)
    assert "a signal handler must not use weights while" in answers[0]
    assert equal(everything(model), before)


def test_a_swap_ends_when_its_block_is_garbage_collected() -> None:
    model, optimizer, ema = trained()
    before = everything(model)

    def evaluation():
        with ema.applied():
            yield everything(model)

    running = evaluation()
    assert not equal(next(running), before)
    with pytest.raises(LoanError, match="must not run on averaged weights"):
        optimizer.step()
    del running
    gc.collect()
    assert equal(everything(model), before)
    optimizer.step()


def test_threads_that_evaluate_and_train_models_of_their_own_do_not_meet() -> None:
    errors = list[BaseException]()

    def work() -> None:
        try:
            model, optimizer, ema = trained()
            for _ in range(20):
                step(model, optimizer)
                before = everything(model)
                with ema.applied():
                    time.sleep(0)
                assert equal(everything(model), before)
        except BaseException as error:  # whatever it is, it is to be seen
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_an_average_of_a_part_of_a_model_is_not_swapped_in_twice() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    whole, part = Shadow(model), Shadow(model[0])
    with whole.swapped("the whole"), pytest.raises(LoanError, match="the whole has swapped its own in"):
        part.swap_in("the part")
    with part.swapped("the part"), pytest.raises(LoanError, match="the part has swapped its own in"):
        whole.swap_in("the whole")


# What torch keeps of weights


def in_autocast() -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16)


def in_parametrize_cached() -> AbstractContextManager[object]:
    return parametrize.cached()


@pytest.mark.parametrize("block", [in_autocast, in_parametrize_cached])
def test_a_model_computes_with_what_it_holds_also_inside_one_block_of_autocast(block) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 2), torch.randn(8, 4)
    parametrize.register_parametrization(model, "weight", nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = attach(EMA(smoothing=0.9), model, optimizer)
    for _ in range(3):
        model(inputs).square().mean().backward()
        optimizer.step()

    @torch.no_grad()
    def separately() -> tuple[torch.Tensor, torch.Tensor]:
        with block():
            raw = model(inputs)
        with ema.applied(), block():
            return raw, model(inputs)

    with torch.no_grad(), block():
        raw = model(inputs)
        with ema.applied():
            averaged = model(inputs)
        again = model(inputs)
    want_raw, want_averaged = separately()
    assert torch.equal(averaged, want_averaged)
    assert torch.equal(raw, want_raw)
    assert torch.equal(again, raw)
    assert not torch.equal(averaged, raw)


# Autograd


def student() -> tuple[nn.Module, torch.optim.Optimizer, Attached]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = attach(EMA(smoothing=0.9), model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(INPUTS).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, ema


INPUTS = torch.linspace(-1, 1, 32).reshape(8, 4)


@pytest.mark.parametrize("offered", [False, True], ids=["exchanged", "copied"])
def test_a_student_that_runs_before_its_teacher_in_a_block_has_its_gradients(offered) -> None:
    model, optimizer, ema = student()
    held = ema.model if offered else None
    output = model(INPUTS)
    with torch.no_grad(), ema.applied():
        target = model(INPUTS)
    (output - target).square().mean().backward()
    got = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.zero_grad()
    (model(INPUTS) - target).square().mean().backward()
    assert all(torch.equal(one, parameter.grad) for one, parameter in zip(got, model.parameters(), strict=True))
    del held


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_graph_made_with_the_average_is_not_differentiated_with_the_training_weights(steps) -> None:
    model, optimizer, ema = student()
    with ema.applied():
        output = model(INPUTS)
    for _ in range(steps):
        optimizer.zero_grad()
        model(INPUTS).square().mean().backward()
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.square().mean().backward()


def test_a_graph_made_with_the_training_weights_is_not_differentiated_with_the_average() -> None:
    model, _, ema = student()
    output = model(INPUTS)
    with ema.applied(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.square().mean().backward()


@pytest.mark.parametrize("replace", ["load_state_dict(assign=True)", "a new Parameter"])
def test_a_parameter_that_was_replaced_in_a_block_is_put_back_and_named(replace) -> None:
    model, optimizer, ema = student()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(LoanError, match=r"parameters must not change.*'0\.weight'"), ema.applied():
        if replace == "a new Parameter":
            model[0].weight = nn.Parameter(torch.zeros(4, 4))
        else:
            model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()}, assign=True)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}


def test_a_stale_swap_ends_also_where_warnings_are_errors() -> None:
    model, optimizer, ema = student()
    before = model[0].weight.detach().clone()
    model_swap = ema.applied()
    model_swap.__enter__()
    swap_of(model).scope = lambda: None  # as after an interrupt
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PlanWarning, match="was left without its end"):
            optimizer.step()
        assert torch.equal(model[0].weight, before)
        model(INPUTS).square().mean().backward()
        optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_a_block_that_refuses_a_second_one_of_its_own_keeps_the_average() -> None:
    model, _, ema = student()
    block = ema.applied
    with block:
        averaged = model[0].weight.detach().clone()
        with pytest.raises(LoanError), block:
            pass
        assert torch.equal(model[0].weight, averaged)
    assert not torch.equal(model[0].weight, averaged)


class AnswersWithTrue(nn.Linear):
    """As a module that takes names that it does not have from elsewhere."""

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in {"merged", "publish_weights"}:
                return True
            raise


class AnswersWithAKeyError(nn.Linear):
    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in {"merged", "publish_weights"}:
                raise KeyError(name) from None
            raise


@pytest.mark.parametrize("kind", [AnswersWithTrue, AnswersWithAKeyError])
def test_a_model_with_its_own_getattr_is_averaged_and_swapped(kind) -> None:
    model = kind(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = attach(EMA(smoothing=0.9), model, optimizer)
    for _ in range(3):
        model(INPUTS).square().mean().backward()
        optimizer.step()
    with torch.no_grad(), ema.applied():
        averaged = model(INPUTS)
    assert torch.equal(ema.model(INPUTS), averaged)


def test_a_model_whose_structure_has_changed_is_refused_by_name_where_its_average_is_wanted() -> None:
    model, _, ema = student()
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    with pytest.raises(MismatchError, match=r"missing: 0\.weight"), ema.applied():
        pass
    ema.detach()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_evaluation_may_rescale_embeddings_with_a_norm(kind, frozen) -> None:
    model = nn.Sequential(kind(8, 2, max_norm=0.1), nn.Linear(2, 1))
    model[0].requires_grad_(not frozen)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    ema, inputs = EMA(smoothing=0.5), torch.arange(8).reshape(4, 2)
    attached = attach(ema, model, optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    before, average = everything(model), ema._average.shadow.averages
    average = {name: tensor.clone() for name, tensor in average.items()}
    with attached.applied(), torch.no_grad():
        model.eval()(inputs)
    assert frozen or equal(before, everything(model))
    assert equal(average, dict(ema._average.shadow.averages))
    attached.detach()


def test_parameters_that_are_loaded_for_each_forward_pass_are_not_replaced() -> None:
    class Offloaded(nn.Linear):  # as Accelerate's cpu_offload: on the meta device between two forward passes
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self._parameters["weight"] = nn.Parameter(torch.ones(2, 2), requires_grad=False)
            result = super().forward(x)
            self._parameters["weight"] = nn.Parameter(torch.empty(2, 2, device="meta"), requires_grad=False)
            return result

    model = nn.Sequential(Offloaded(2, 2, bias=False), nn.Linear(2, 1))
    model[0].to("meta").requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    attached = attach(EMA(smoothing=0.5), model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    before = model[1].weight.detach().clone()
    with attached.applied():
        model(torch.ones(1, 2))
    assert torch.equal(before, model[1].weight)
    attached.detach()


def test_a_state_of_no_average_is_not_loaded_while_the_model_holds_one() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(EMA(smoothing=0.5), model, optimizer)
    nothing = attached.state_dict()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    before = everything(model)
    with attached.applied(), pytest.raises(LoanError, match="only into training weights.*leave the block"):
        attached.load_state_dict(nothing)
    assert equal(before, everything(model))
    attached.load_state_dict(nothing)
    assert not attached.average.ema_started
    attached.detach()
