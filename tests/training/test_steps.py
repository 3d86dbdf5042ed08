"""Which steps of an optimizer are counted, and how users learn of steps that are not."""

import threading
import warnings
from collections import defaultdict

import pytest
import reference
import torch
from torch import Tensor, nn

from polyak import EMA, OptimizerError, PlanWarning, PolyakError, attach
from polyak.training.moved import moved_names, norms_of
from polyak.training.steps import StepHooks

BY_HAND = r"give attach\(\.\.\., None\) instead, and call step\(\)"


def linear(seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(4, 2)


INPUTS = torch.linspace(-1, 1, 32).reshape(8, 4)


def backward(model: nn.Module) -> Tensor:
    loss = (model(INPUTS) - 1).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer, steps: int = 6, step=None) -> list[Tensor]:
    """Train, and return the weights after each step."""
    weights = []
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        (step or optimizer.step)()
        weights.append(model.weight.detach().clone())
    return weights


def assert_averaged(ema: EMA, weights: list[Tensor], decay: float = 0.5) -> None:
    want = reference.online(weights, [decay] * (len(weights) - 1))
    torch.testing.assert_close(ema.ema_model.weight.double(), want, rtol=1e-5, atol=1e-6)


class FreesGradients(torch.optim.SGD):
    """As heavyball's."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        return loss


class FreesGradientsItself(torch.optim.Optimizer):
    """The same without a parent whose step would be hooked too, and without a closure's gradients before or after."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})

    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(0.1 * parameter.grad)
                    parameter.grad = None
        return loss


class Lookahead(torch.optim.Optimizer):
    """Moves the weights after the optimizer that it wraps."""

    def __init__(self, optimizer, every: int = 2) -> None:
        self.optimizer, self.every, self.steps = optimizer, every, 0
        super().__init__(optimizer.param_groups, {})
        self.slow = [parameter.detach().clone() for parameter in self.parameters]

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        self.steps += 1
        if self.steps % self.every == 0:
            for parameter, slow in zip(self.parameters, self.slow, strict=True):
                parameter.copy_(slow.lerp_(parameter, 0.5))
        return loss


class LookaheadWithoutInit(Lookahead):
    """As timm's, which torch does not hook."""

    def __init__(self, optimizer) -> None:
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, defaultdict(dict)

    def step(self, closure=None):
        return self.optimizer.step(closure)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization, as it is commonly written."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1)

    @torch.no_grad()
    def first_step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["up"] = up = 0.05 * parameter.grad
            parameter.add_(up)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(self.state[parameter]["up"])
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure=None):
        assert closure is not None
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class AscendsItself(SAM):
    """The same without another optimizer."""

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(self.state[parameter]["up"] + 0.1 * parameter.grad)
        self.zero_grad()


class DPOptimizer(torch.optim.Optimizer):
    """As opacus': without hooks of its own, over an optimizer to which it gives other gradients."""

    def __init__(self, optimizer, every: int = 2) -> None:
        self.original_optimizer, self.calls, self.every = optimizer, 0, every

    @property
    def param_groups(self):
        return self.original_optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.original_optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        self.calls += 1
        return None if self.calls % self.every else self.original_optimizer.step()


@pytest.mark.parametrize("make", [FreesGradients, FreesGradientsItself], ids=lambda cls: cls.__name__)
def test_steps_that_free_their_gradients_are_counted(make) -> None:
    model, ema = linear(), EMA(smoothing=0.5)
    optimizer = make(model.parameters())
    attached = attach(ema, model, optimizer)
    weights = train(model, optimizer)
    assert attached.timestamp.batch == "6ba"
    assert_averaged(ema, weights)


@pytest.mark.parametrize(
    "make",
    [FreesGradientsItself, torch.optim.LBFGS, SAM, lambda p: Lookahead(torch.optim.SGD(p, lr=0.1))],
    ids=["frees gradients", "LBFGS", "SAM", "Lookahead"],
)
def test_steps_with_a_closure_are_counted_once_each(make) -> None:
    model, ema = linear(), EMA(smoothing=0.5)
    optimizer = make(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model)

    attached = attach(ema, model, optimizer)
    weights = train(model, optimizer, step=lambda: optimizer.step(closure))
    assert attached.timestamp.batch == "6ba"
    assert_averaged(ema, weights)


def test_a_closure_that_computes_no_gradients_is_no_step() -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(EMA(smoothing=0.5), model, optimizer)
    train(model, optimizer, steps=2)
    optimizer.step(optimizer.zero_grad)  # as Lightning's, if training_step returns None
    assert attached.timestamp.batch == "2ba"


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_weights_after_a_wrapper_are_averaged(every) -> None:
    model, ema = linear(), EMA(smoothing=0.5)
    optimizer = Lookahead(Lookahead(torch.optim.SGD(model.parameters(), lr=0.1), every), 2)
    attached = attach(ema, model, optimizer)
    weights = train(model, optimizer)
    assert attached.timestamp.batch == "6ba"
    assert_averaged(ema, weights)


def test_the_optimizer_in_a_wrapper_that_only_calls_it_is_counted() -> None:
    model, ema = linear(), EMA(smoothing=0.5)
    optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    attached = attach(ema, model, optimizer)
    weights = train(model, optimizer)
    assert attached.timestamp.batch == "3ba"
    assert_averaged(ema, weights[1::2])


class NoOptimizer:
    def __init__(self, parameters) -> None:
        self.inner = torch.optim.SGD(parameters, lr=0.1)

    def step(self) -> None:
        self.inner.step()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (NoOptimizer, "must be one torch.optim.Optimizer, and NoOptimizer is none"),
        (lambda p: [torch.optim.SGD(p, lr=0.1)], "and list is none; of several give the one that steps last"),
        (
            lambda p: LookaheadWithoutInit(torch.optim.SGD(p, lr=0.1)),
            "must run torch's step hooks, and LookaheadWithoutInit",
        ),
    ],
    ids=["a class that is no optimizer", "a list", "no super().__init__()"],
)
def test_an_optimizer_without_torchs_hooks_is_refused_with_the_remedy(make, why) -> None:
    model = linear()
    with pytest.raises(OptimizerError, match=f"{why}.*{BY_HAND}") as caught:
        attach(EMA(), model, make(model.parameters()))
    assert isinstance(caught.value, PolyakError)


# Steps that are not seen


@pytest.mark.parametrize("at", ["applied", "state_dict", "detach"])
def test_weights_that_move_uncounted_are_warned_of_once(at) -> None:
    model = linear()
    optimizer = AscendsItself(model.parameters())
    attached = attach(EMA("3ba"), model, optimizer)
    with attached.applied():
        pass  # nothing has moved yet
    for _ in range(3):
        backward(model)
        optimizer.first_step()
        backward(model)
        optimizer.second_step()
    ask = {"applied": lambda: attached.applied().__enter__(), "state_dict": attached.state_dict}
    with pytest.warns(PlanWarning, match=f"2 parameters have moved, such as 'weight', and 0 steps.*{BY_HAND}"):
        ask.get(at, attached.detach)()
    attached.state_dict()
    attached.detach()


def test_a_loop_that_forgets_to_call_step_is_warned() -> None:
    model = linear()
    attached = attach(EMA("3ba"), model, None)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.warns(PlanWarning, match="0 steps were counted; call step"), attached.applied():
        pass


def test_a_state_that_is_loaded_is_no_step() -> None:
    model, other = linear(), linear(seed=1)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    attached, again = (attach(EMA("3ba"), m, o) for m, o in zip((model, other), optimizers, strict=True))
    train(model, optimizers[0])
    other.load_state_dict(model.state_dict())
    again.load_state_dict(attached.state_dict())
    with again.applied():
        pass
    again.detach()


class Container(torch.optim.Optimizer):
    """Steps the optimizer in it, as torchtitan's does."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})

    def step(self, closure=None) -> None:
        del closure
        self.inner.step()


def test_a_step_of_an_inner_optimizer_that_makes_a_state_to_load_into_is_no_uncounted_step() -> None:
    model = linear()
    inner = torch.optim.AdamW(model.parameters())
    attached = attach(EMA("3ba"), model, Container(inner))

    def init_optim_state() -> None:  # the name that torchtitan's has
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        inner.param_groups[0]["lr"] = 0.0
        inner.step()
        inner.zero_grad()

    init_optim_state()
    attached.state_dict()  # without a warning
    assert attached.timestamp.batch.value == 0


def test_the_optimizer_inside_sam_is_named_where_its_steps_are_the_ones_to_count() -> None:
    def run(attached_to: str) -> EMA:
        model, ema = linear(), EMA(smoothing=0.5)
        optimizer = SAM(model.parameters())
        attached = attach(ema, model, optimizer if attached_to == "SAM" else optimizer.base_optimizer)

        def step() -> None:
            optimizer.first_step()
            backward(model)
            optimizer.second_step()

        weights = train(model, optimizer, step=step)
        with attached.applied():
            pass
        assert_averaged(ema, weights)
        return ema

    seen = "0 of SAM were, and since then 6 of SGD.*attach the algorithm to that SGD"
    with pytest.warns(PlanWarning, match=seen), pytest.raises(AttributeError):
        run("SAM")  # there is no average
    run("SGD")


@pytest.mark.parametrize("gone", [True, False])
def test_an_optimizer_that_replaces_the_attached_one_is_noticed(gone) -> None:
    model = linear()
    first = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(EMA("3ba"), model, first)
    train(model, first, steps=3)
    second = torch.optim.Adam(model.parameters())
    kept = None if gone else first
    del first
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, second, steps=4)
        for _ in range(2):
            with attached.applied():
                pass
    name, steps = ("the optimizer that was attached, which is gone,", 1) if gone else ("SGD", 4)
    (found,) = [str(warning.message) for warning in caught if "must be counted" in str(warning.message)]  # once
    assert f"3 of {name} were, and since then {steps} of Adam" in found
    attached.detach()
    del kept


def test_an_optimizer_that_steps_instead_of_the_attached_one_for_long_is_noticed_before_an_evaluation() -> None:
    model = linear()
    first, second = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.Adam(model.parameters())
    attached = attach(EMA("3ba"), model, first)
    train(model, first, steps=3)
    train(model, second, steps=99)
    with pytest.warns(
        PlanWarning, match="3 of SGD were, and since then 100 of Adam.*attach the algorithm to that Adam"
    ):
        train(model, second, steps=1)
    train(model, second, steps=150)
    attached.detach()


def test_two_optimizers_of_the_same_parameters_that_take_turns_are_no_replacement() -> None:
    model = linear()
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    with attach(EMA("3ba"), model, second) as attached:
        for _ in range(120):
            train(model, first, steps=1)
            train(model, second, steps=1)
        with attached.applied():
            pass


def test_an_optimizer_that_replaces_one_whose_average_nobody_has_is_no_matter() -> None:
    model = linear()
    for _ in range(3):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ema = attach(EMA("3ba"), model, optimizer)
        train(model, optimizer, steps=3)
    assert ema.average.num_updates == 2


def test_optimizers_of_other_parameters_are_ignored() -> None:
    model = nn.Sequential(linear(), nn.Linear(2, 2))
    first, last = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model)
    attached = attach(EMA("3ba"), model, last)
    for _ in range(3):
        model(INPUTS).square().mean().backward()
        last.step()
        first.step()
    with attached.applied():
        pass


def test_a_wrapper_around_the_attached_optimizer_does_not_replace_it() -> None:
    model = linear()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(EMA("3ba"), model, inner)
    train(model, Lookahead(inner, every=100))
    with attached.applied():
        pass


# Compiled steps, and errors in them


class Child(torch.optim.Adam):
    fail = False

    def step(self, closure=None):
        loss = super().step(closure)
        if self.fail:
            raise RuntimeError("as planned")
        return loss


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.compile itself
@pytest.mark.parametrize("when", ["before attach", "after attach"])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD, Child], ids=lambda cls: cls.__name__)
def test_a_compiled_step_is_counted_once(make, when) -> None:
    torch.compiler.reset()
    model, ema = linear(), EMA(smoothing=0.5)
    torch.optim.Adam(model.parameters())  # hooks the step of Child's parent
    optimizer = make(model.parameters(), lr=torch.tensor(0.01))
    if when == "before attach":
        step = torch.compile(optimizer.step, backend="eager")
        train(model, optimizer, step=step)
    attached = attach(ema, model, optimizer)
    if when == "after attach":
        step = torch.compile(optimizer.step, backend="eager")
    weights = train(model, optimizer, step=step)
    assert attached.timestamp.batch == "6ba"
    assert_averaged(ema, weights)


@pytest.mark.filterwarnings("ignore")
def test_another_optimizers_step_can_still_be_compiled_as_one_graph() -> None:
    class Plain(torch.optim.Optimizer):
        """Of torch's own steps none can be."""

        @torch.no_grad()
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(0.1 * parameter.grad)

    torch.compiler.reset()
    model, other = linear(), linear(seed=1)
    attach(EMA(), model, torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = Plain(other.parameters(), {})
    weights = train(other, optimizer, step=torch.compile(optimizer.step, backend="eager", fullgraph=True))
    assert not torch.equal(weights[0], weights[-1])


@pytest.mark.parametrize("times", [1, 3])
def test_steps_are_counted_again_after_some_have_raised(times) -> None:
    model = linear()
    torch.optim.Adam(model.parameters())
    optimizer = Child(model.parameters())
    attached = attach(EMA("3ba"), model, optimizer)
    train(model, optimizer, steps=2)
    optimizer.fail = True
    for _ in range(times):
        with pytest.raises(RuntimeError, match="as planned"):
            train(model, optimizer, steps=1)
    optimizer.fail = False
    train(model, optimizer, steps=2)
    assert attached.timestamp.batch == "4ba"


def test_a_step_that_tries_its_parents_step_again_counts_once() -> None:
    class Flaky(torch.optim.SGD):
        fails = True

        def step(self, closure=None):
            self.fails = not self.fails
            if self.fails:
                raise RuntimeError("as planned")
            return super().step(closure)

    class Tries(Flaky):
        def step(self, closure=None):
            try:
                return super().step(closure)
            except RuntimeError:
                return super().step(closure)

    model = linear()
    Flaky(model.parameters(), lr=0.1)
    torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = Tries(model.parameters(), lr=0.1)
    attached = attach(EMA("3ba"), model, optimizer)
    train(model, optimizer, steps=4)
    assert attached.timestamp.batch == "4ba"


def test_threads_that_train_separate_models_count_their_own_steps() -> None:
    failures, gate = [], threading.Barrier(4)

    def work(number: int) -> None:
        try:
            model, ema = linear(number), EMA(smoothing=0.5)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * (number + 1))
            gate.wait()
            for _ in range(5):
                with attach(ema, model, optimizer) as attached:
                    weights = train(model, optimizer, steps=20)
                assert attached.timestamp.batch == "20ba"
            assert ema.num_updates == 99
            assert not torch.equal(weights[-1], ema.ema_model.weight)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_hooks_that_are_registered_inside_a_step_do_not_count_it() -> None:
    model, seen = linear(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made: list[StepHooks] = []
    first = optimizer.register_step_pre_hook(
        lambda *_: None if made else made.append(StepHooks(optimizer, lambda: seen.append(1)))
    )
    with warnings.catch_warnings():
        try:
            train(model, optimizer, steps=1)
        except RuntimeError:  # torch iterates over its hooks
            first.remove()
    seen.clear()
    train(model, optimizer, steps=1)
    assert seen == [1]


# Which tensors are stepped


def halves() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)).bfloat16()


def masters(parameters) -> list[Tensor]:
    return [parameter.detach().float().requires_grad_() for parameter in parameters]


def flat(parameters) -> list[Tensor]:
    return [torch.cat([parameter.detach().float().flatten() for parameter in parameters]).requires_grad_()]


def all_but_norms(model: nn.Sequential) -> list[Tensor]:
    model[1].float()
    return [*masters([*model[0].parameters(), *model[2].parameters()]), *model[1].parameters()]


def all_but_norms_flat(model: nn.Sequential) -> list[Tensor]:
    model[1].float()
    (one,) = flat([*model[0].parameters(), *model[2].parameters()])
    padded = torch.cat([one.detach(), torch.zeros(9)]).requires_grad_()  # as engines pad it
    return [padded, *model[1].parameters()]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda model: masters(model.parameters()), "with 6 of its 6 tensors elsewhere. has none of them"),
        (lambda model: flat(model.parameters()), "with 1 of its 1 tensors elsewhere. has none of them"),
        (lambda model: flat(list(model.parameters())[3:]), "has none of them"),
        (all_but_norms, "steps float32 masters of '0.weight' and 3 others"),
        (all_but_norms_flat, "steps float32 masters of '0.weight' and 3 others"),
        (lambda model: nn.Linear(4, 3).parameters(), "or another model"),
    ],
    ids=["masters", "one flat tensor", "a rank's part of it", "apex O2", "flat, and norms", "another model"],
)
def test_an_optimizer_of_other_tensors_than_the_models_is_refused(make, why) -> None:
    model = halves()
    optimizer = torch.optim.SGD(make(model), lr=0.1)
    with pytest.raises(OptimizerError, match=f"SGD .*{why}.*{BY_HAND}"):
        attach(EMA(), model, optimizer)


def test_an_optimizer_with_masters_is_refused_with_the_integration_that_averages_them() -> None:
    model = halves()
    with pytest.raises(OptimizerError, match=r"polyak\.hosts\.deepspeed with DeepSpeed"):
        attach(EMA(), model, torch.optim.SGD(masters(model.parameters()), lr=0.1))
    zero = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    with pytest.raises(OptimizerError, match=r"DeepSpeedZeroOptimizer is none; .*: use polyak\.hosts\.deepspeed"):
        attach(EMA(), model, zero())


def part(model: nn.Sequential) -> list[Tensor]:
    return list(model[2].parameters())


def joint(model: nn.Sequential) -> list[Tensor]:
    return [*model.parameters(), *nn.Linear(4, 3).parameters()]


def tied(model: nn.Sequential) -> list[Tensor]:
    model.append(nn.Linear(3, 2))
    model[3].weight = model[2].weight
    return list(model.parameters())


def lazy(model: nn.Sequential) -> list[Tensor]:
    model.append(nn.LazyLinear(2))
    return list(model.parameters())


def frozen(model: nn.Sequential) -> list[Tensor]:
    model[0].requires_grad_(requires_grad=False)
    return [*part(model), *masters([])]


@pytest.mark.parametrize("make", [part, joint, tied, lazy, frozen], ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_optimizer_of_the_models_own_tensors_or_some_of_them_is_taken(make, dtype) -> None:
    model = halves().to(dtype)
    attach(EMA(), model, torch.optim.SGD(make(model), lr=0.1)).detach()


def test_a_model_that_is_built_lazily_is_averaged_from_its_first_step() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(EMA("3ba"), model, optimizer) as attached:
        for _ in range(3):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
    assert attached.timestamp.batch == "3ba"
    assert attached.algorithm.num_updates == 2


# Weights that change between steps

_BETWEEN = r"must not change between two steps.*after each step, give attach\(\.\.\., None\)"


def clip(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.clamp_(-0.05, 0.05)


def normalize(model: nn.Module) -> None:
    model.weight.data = nn.functional.normalize(model.weight.data, dim=1)


@torch.no_grad()
def mask(model: nn.Module) -> None:
    model.weight.mul_(torch.tensor([0.0, 1.0, 1.0, 0.0]))


@pytest.mark.parametrize("change", [clip, normalize, mask])
def test_a_loop_that_changes_weights_after_each_step_is_told_at_the_second(change) -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(EMA(smoothing=0.5), model, optimizer)
    train(model, optimizer, steps=1)
    change(model)
    with pytest.warns(PlanWarning, match=_BETWEEN):
        train(model, optimizer, steps=1)
    attached.detach()


def test_a_loop_that_changes_weights_later_is_told_too_and_once() -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(EMA(smoothing=0.5), model, optimizer)
    train(model, optimizer, steps=9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(200):
            train(model, optimizer, steps=1)
            clip(model)
    assert len([warning for warning in caught if "must not change between" in str(warning.message)]) == 1
    attached.detach()


def test_a_loop_that_changes_weights_after_each_step_is_averaged_when_it_counts_by_hand() -> None:
    model, ema, weights = linear(), EMA(smoothing=0.5), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(ema, model, None)
    for _ in range(12):
        train(model, optimizer, steps=1)
        clip(model)
        attached.step()
        weights.append(model.weight.detach().clone())
    assert_averaged(ema, weights)


def test_swaps_and_states_between_two_steps_change_no_weights() -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(EMA(smoothing=0.5), model, optimizer)
    for _ in range(12):
        train(model, optimizer, steps=1)
        with attached.applied():
            attached.state_dict()
        attached.load_state_dict(attached.state_dict())
    attached.detach()


def test_weights_that_move_between_two_evaluations_without_a_step_are_warned_of() -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(EMA(smoothing=0.5), model, optimizer)
    train(model, optimizer, steps=5)
    with attached.applied():
        pass
    train(model, optimizer, steps=3, step=lambda: type(optimizer).step.__wrapped__(optimizer))
    with pytest.warns(PlanWarning, match="2 parameters have moved since the last check, after 5 steps.*0 steps were"):
        attached.state_dict()
    attached.detach()


def test_the_norms_of_a_full_parameter_and_of_its_shard_are_not_compared() -> None:
    full = norms_of({"weight": torch.ones(4)})
    assert moved_names(full, norms_of({"weight": torch.ones(2)})) == []
    assert moved_names(full, norms_of({"weight": torch.full((4,), 2.0)})) == ["weight"]


@pytest.mark.parametrize("period", [2, 3, 5, 6, 10])
def test_a_loop_that_changes_weights_in_some_steps_only_is_told_in_the_first_22(period) -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(EMA(smoothing=0.5), model, optimizer)
    with pytest.warns(PlanWarning, match=_BETWEEN):
        for step in range(1, 23):
            train(model, optimizer, steps=1)
            if step % period == 0:
                clip(model)
    attached.detach()


def test_weights_that_are_loaded_once_between_two_steps_are_no_habit_of_the_loop() -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(EMA(smoothing=0.5), model, optimizer)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(30):
        train(model, optimizer, steps=1)
        if step == 4:
            model.load_state_dict(saved)
    attached.detach()


def test_an_optimizer_inside_a_wrapper_that_moves_weights_after_it_is_warned_of() -> None:
    model = linear()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = Lookahead(inner)
    attached = attach(EMA(smoothing=0.5), model, inner)
    with pytest.warns(PlanWarning, match="must not change between two steps"):
        train(model, outer, steps=22)
    attached.detach()


def test_embeddings_that_a_forward_pass_rescales_are_no_change_by_the_loop() -> None:
    model = nn.Embedding(8, 2, max_norm=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    attached = attach(EMA(smoothing=0.5), model, optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.arange(8)).sum().backward()
        optimizer.step()
    with attached.applied():
        pass
    model(torch.arange(8))
    attached.state_dict()
    attached.detach()


# Other optimizers


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.weight = nn.Linear(4, 4), nn.Parameter(torch.ones(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.body(x), self.weight)


def test_a_second_optimizer_is_noticed_whichever_of_its_tensors_it_has_first() -> None:
    model = Two()
    head = torch.optim.SGD([model.weight], lr=0.1)
    attached = attach(EMA(smoothing=0.9), model, head)
    train(model, head, steps=20)
    train(model, torch.optim.SGD([*model.body.parameters(), model.weight], lr=0.1), steps=20)
    with pytest.warns(PlanWarning, match="since then 20 of SGD, which steps the same parameters, were not"):
        attached.state_dict()
    attached.detach()


def test_many_steps_of_an_optimizer_of_another_part_are_warned_of_and_few_are_not() -> None:
    model = Two()
    head, body = torch.optim.SGD([model.weight], lr=0.01), torch.optim.Adam(model.body.parameters(), lr=1e-3)
    attached = attach(EMA(smoothing=0.9), model, head)
    for _ in range(3):  # as a critic, which steps more often
        train(model, head, steps=1)
        train(model, body, steps=90)
        attached.state_dict()
    train(model, head, steps=1)
    with pytest.warns(PlanWarning, match="4 of SGD were, and since then 100 of Adam, which steps other parameters"):
        train(model, body, steps=100)
    attached.detach()


def test_weights_that_stand_still_while_steps_are_counted_by_hand_are_warned_of() -> None:
    model = linear()
    attached = attach(EMA(smoothing=0.5), model, None)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for _ in range(3):
        weights["weight"] = weights["weight"] - 0.1  # as with torch.func, outside the model
        attached.step()
    with pytest.warns(PlanWarning, match="3 steps were counted by hand, and no parameter has moved.*torch.func"):
        attached.state_dict()
    attached.detach()


class ScheduleFree(torch.optim.SGD):
    """Has other weights for evaluations, as those of schedulefree."""

    def _move(self, by: float) -> None:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(by)

    def eval(self) -> None:
        self._move(0.1)

    def train(self) -> None:
        self._move(-0.1)


def test_an_optimizer_that_changes_weights_for_an_evaluation_is_not_warned_of() -> None:
    model = linear()
    optimizer = ScheduleFree(model.parameters(), lr=0.1)
    attached = attach(EMA(smoothing=0.5), model, optimizer)
    train(model, optimizer, steps=5)
    optimizer.eval()
    with attached.applied():
        pass
    optimizer.train()
    attached.state_dict()
    attached.detach()
