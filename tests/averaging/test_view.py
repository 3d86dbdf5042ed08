"""``ema_model`` computes with the average bit for bit, or refuses: a view of every kind of model that people bring."""

import collections
import copy
import functools
import gc
import io
import logging
import pickle
import queue
import threading
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from polyak import EMA, Policy, PolyakError, Recorder, attach, default_policy
from polyak.averaging.references import References
from polyak.averaging.view import module_over
from polyak.errors import CopyError

GLOBAL = SimpleNamespace(model=None)
LISTED: list[nn.Module] = []


class Net(nn.Module):
    """What the kinds below change a detail of."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)).relu())


@dataclass(frozen=True, slots=True)
class Pair:
    body: nn.Module
    heads: list[nn.Module]


class Scaled(Net):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


# Instance forwards, and other functions that refer to the model


def compiled(model):
    model.forward = torch.compile(model.forward, backend="eager")


def compiled_inside(model):
    model.body = torch.compile(model.body, backend="eager")


def compiled_in_place(model):
    model.body.compile(backend="eager")


def compiled_part(model):
    model.body.forward = torch.compile(model.body.forward, backend="eager")


def dynamo_disabled(model):
    model.head.forward = torch.compiler.disable(model.head.forward)


def closure(model):
    forward = model.forward
    model.forward = lambda x: forward(x) + 1


def closure_of_a_closure(model):
    closure(model)
    closure(model)


def closures_with_a_common_counter(model):
    calls = 0

    def forward(x):
        nonlocal calls
        calls += 1
        return type(model).forward(model, x)

    model.forward = forward


def default_argument(model):
    model.forward = lambda x, inner=model: Net.forward(inner, x)


def keyword_default(model):
    def forward(x, *, inner=model.body):
        return model.head(inner(x))

    model.forward = forward


def partial(model):
    model.forward = functools.partial(Net.forward, model)


def partial_with_wrapped(model):
    forward = model.forward
    model.forward = functools.update_wrapper(functools.partial(lambda m, x: m._old(x), model), forward)
    model._old = forward


def wraps(model):
    def wrapper(forward):
        @functools.wraps(forward)
        def wrapped(*args):
            return forward(*args)

        return wrapped

    model.forward = wrapper(model.forward)


def bound_function(model):
    old = model.forward
    model.forward = MethodType(lambda self, x: old(x) - self.head.bias, model)


def captured_list(model):
    layers = [model.body, {"head": model.head}]
    model.forward = lambda x: layers[1]["head"](layers[0](x))


def captured_tensor(model):
    weight, bias = model.body.weight, model.body.bias
    model.forward = lambda x: model.head(x @ weight.t() + bias)


def captured_state_dict(model):
    weights = model.state_dict()
    model.forward = lambda x: model.head(x @ weights["body.weight"].t())


def captured_alias(model):
    rows = model.body.weight.detach().t()[:, 1:3]
    model.forward = lambda x: model.head(model.body(x)) + x @ rows


def alias_as_an_attribute(model):
    model.rows = model.body.weight.data[:2]
    model.forward = MethodType(lambda self, x: self.head(self.body(x)) + x @ self.rows.t(), model)


def forward_of_another_module(model):
    model.body.forward = MethodType(lambda self, x: model.head.bias[0] + nn.Linear.forward(self, x), model.body)


def weak_reference(model):
    inner = weakref.ref(model.body)
    model.forward = lambda x: model.head(inner()(x))


def weak_attribute(model):
    model.__dict__["me"] = weakref.ref(model)
    model.forward = MethodType(lambda self, x: self.me().head(self.body(x)), model)


def weak_proxy(model):
    model.__dict__["me"] = weakref.proxy(model.body)
    model.forward = MethodType(lambda self, x: self.head(self.me(x)), model)


def helper_object(model):
    class Helper:
        def __init__(self, module):
            self.module, self.lock = module, threading.Lock()

        def __call__(self, x):
            with self.lock:
                return self.module.head(self.module.body(x))

    model.helper = Helper(model)
    model.forward = model.helper.__call__


def slotted_object(model):
    class Helper:
        __slots__ = ("module",)

    model.helper = Helper()
    model.helper.module = [model.body]
    model.forward = MethodType(lambda self, x: self.helper.module[0](x), model)


def method_of_a_list(model):
    model.__dict__["layers"] = [model.body, model.head]
    model.__dict__["pick"] = model.layers.__getitem__
    model.forward = MethodType(lambda self, x: self.pick(1)(self.pick(0)(x)), model)


def global_function(model):
    GLOBAL.model = model
    LISTED[:] = [model]
    model.forward = lambda x: Net.forward(LISTED[0], x) + GLOBAL.model.head.bias


def hooks(model):
    model.body.register_forward_hook(lambda module, args, out: out + model.head.bias[0])
    model.head.register_forward_pre_hook(lambda module, args: (args[0] * model.body.weight.mean(),))


def hook_object(model):
    class Hook:
        def __init__(self, net):
            self.net = net

        def hook(self, module, args, out):
            return out * self.net.head.weight.mean()

    model.handle = model.body.register_forward_hook(Hook(model).hook)


def parent_in_a_list(model):
    model.body.parent = [model]
    model.body.forward = MethodType(lambda s, x: nn.Linear.forward(s, x) + s.parent[0].head.bias[0], model.body)


def keyed_by_modules(model):
    model.gains = {model.body: 2.0, model.head: 3.0}
    model.forward = MethodType(lambda s, x: s.gains[s.head] * s.head(s.body(x)), model)


# Tensors and modules of their own kinds


def remembers(model):
    old = model.forward

    def forward(x):
        model.last = old(x)
        return model.last

    model.forward = forward


def weight_norm(model):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.body)


def spectral_norm(model):
    nn.utils.spectral_norm(model.head)


def pruned(model):
    prune.l1_unstructured(model.body, "weight", amount=0.3)
    prune.random_unstructured(model.head, "bias", amount=0.5)


def parametrized(model):
    parametrizations.weight_norm(model.body)
    parametrizations.orthogonal(model.head)


def parametrized_by_the_model(model):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.other = [model.head]

        def forward(self, weight):
            return weight + self.other[0].bias[0]

    parametrize.register_parametrization(model.body, "weight", Tied())


def parametrized_spectral(model):
    parametrizations.spectral_norm(model.body)


def lstm(model):
    model.body = nn.LSTM(4, 6, num_layers=2)
    model.body.register_forward_hook(lambda module, args, out: out[0])


def lists_of_parameters(model):
    model.scales = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))])
    model.named = nn.ParameterDict({"a": nn.Parameter(torch.ones(2))})
    model.forward = MethodType(lambda s, x: Net.forward(s, x) * s.scales[0] + s.scales[1] - s.named["a"], model)


def nested(model):
    model.parts = nn.ModuleDict({"a": nn.ModuleList([nn.ModuleDict({"b": model.body})])})
    model.forward = MethodType(lambda s, x: s.head(s.parts["a"][0]["b"](x)), model)


def tied(model):
    model.again = nn.Linear(6, 4)
    model.again.weight = nn.Parameter(torch.randn(4, 6))
    model.body.weight = nn.Parameter(model.again.weight.detach().t().contiguous())
    model.again.weight = model.head.weight


def lazy(model):
    model.head = nn.LazyLinear(2)
    model(torch.ones(3, 4))


def frozen(model):
    model.body.requires_grad_(False)


def subclass_of_parameter(model):
    class Shaped(nn.Parameter):
        pass

    weight = Shaped(model.body.weight.detach().clone())
    weight.infshape = {"width": 6}
    weight.manifold = nn.Identity()
    model.body.weight = weight


def data_parallel_inside(model):
    model.body = nn.DataParallel(model.body)


def traced(model):
    model.body = torch.fx.symbolic_trace(model.body)


def mask(model):
    model.register_buffer("mask", torch.tensor([1.0, 0.0]), persistent=False)
    model.forward = MethodType(lambda s, x: Net.forward(s, x) * s.mask, model)


def with_ways_of_their_own_to_be_copied(model):
    class Cloned(nn.Linear):
        def __deepcopy__(self, memo):
            return nn.Linear(4, 6)

    class Forgets(nn.Linear):
        gain = 1.0

        def __getstate__(self):
            return {name: value for name, value in vars(self).items() if name != "gain"}

        def forward(self, x):
            return super().forward(x) * self.gain

    model.body, model.head = Cloned(4, 6), Forgets(6, 2)
    model.head.gain = 3.0


def third_party_averages(model):
    import ema_pytorch

    model.__dict__["theirs"] = ema_pytorch.EMA(model.body, beta=0.9)
    model.teacher = torch.optim.swa_utils.AveragedModel(model.head)


def containers(model):
    model.pair, model.queue = Pair(model.body, [model.head]), collections.deque([model.head], maxlen=3)
    model.heads = collections.defaultdict(lambda: model.head)
    model.forward = MethodType(lambda s, x: s.heads["a"](s.pair.body(x)) + s.queue[0](s.pair.body(x)), model)


def teacher_beside(model):
    model.__dict__["teacher"] = nn.Linear(4, 2)
    model.forward = MethodType(lambda s, x: Net.forward(s, x) + s.teacher(x), model)


# What cannot be copied, or serves the training


def lock(model):
    model.lock, model.locks = threading.Lock(), [threading.RLock()]


def generators(model):
    model.generator, model.stream = torch.Generator(), (i for i in range(3))


def files(model):
    model.file, model.log = Path(__file__).open(), logging.getLogger("test")  # noqa: SIM115
    weakref.finalize(model, model.file.close)


def queues(model):
    model.queue, model.thread = queue.Queue(), threading.Thread(target=model.forward)


def holds_its_trainer(model):
    class Loop:
        def __init__(self):
            self.model, self.optimizers = model, [torch.optim.SGD(model.parameters(), lr=0.1)]

    model.loop = Loop()
    model.scheduler = torch.optim.lr_scheduler.StepLR(model.loop.optimizers[0], 1)


def loader(model):
    model.data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(3)))


KINDS = [
    compiled, compiled_inside, compiled_in_place, compiled_part, dynamo_disabled, closure, closure_of_a_closure,
    closures_with_a_common_counter, default_argument, keyword_default, partial, partial_with_wrapped, wraps,
    bound_function, captured_list, captured_tensor, captured_state_dict, captured_alias, alias_as_an_attribute,
    forward_of_another_module, weak_reference, weak_attribute, weak_proxy, helper_object, slotted_object,
    method_of_a_list, global_function, hooks, hook_object, parent_in_a_list, keyed_by_modules, remembers, weight_norm,
    spectral_norm, pruned, parametrized, parametrized_by_the_model, parametrized_spectral, lstm, lists_of_parameters,
    nested, tied, lazy, frozen, subclass_of_parameter, data_parallel_inside, traced, mask, teacher_beside,
    with_ways_of_their_own_to_be_copied, third_party_averages, containers, lock,
    generators, files, queues, holds_its_trainer, loader,
]  # fmt: skip


def trained(model: nn.Module, inputs: Tensor, steps: int = 3, ema: EMA | None = None):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attached = attach(ema or EMA(smoothing=0.5), model, optimizer)
    train(model, optimizer, inputs, steps)
    return attached, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, steps: int) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(inputs) - 1).square().mean().backward()
        optimizer.step()


def applied(attached, model: nn.Module, inputs: Tensor) -> Tensor:
    was = model.training
    with torch.no_grad(), attached.applied():
        model.eval()
        out = model(inputs).detach().clone()
    model.train(was)
    return out


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_view(attached, model: nn.Module, inputs: Tensor) -> nn.Module:
    """The view computes what the model does with the average in it, and the model is none the worse for it."""
    before, versions = bits(model), {id(t): t._version for t in (*model.parameters(), *model.buffers())}
    model.eval()
    raw = type(model).__call__(model, inputs).detach().clone()
    model.train()
    view = attached.algorithm.ema_model
    assert type(view) is type(model)
    assert view is not model
    assert not any(module.training for module in view.modules())
    assert not any(tensor.requires_grad for tensor in (*view.parameters(), *view.buffers()))
    assert not view(inputs).requires_grad
    with torch.no_grad():  # as in `applied`: LSTMs have other kernels for it
        got = view(inputs)
    assert versions == {id(t): t._version for t in (*model.parameters(), *model.buffers())}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(got, applied(attached, model, inputs))
    assert not torch.equal(got, raw)
    shared = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    averages = {t.data_ptr() for t in attached.algorithm._shadow.averages.values()}
    assert all(p.data_ptr() in averages | shared for p in view.parameters())
    return view


@pytest.mark.slow
@pytest.mark.parametrize("change", KINDS, ids=lambda change: change.__name__)
def test_the_view_computes_what_the_model_does_with_the_average_in_it(change) -> None:
    torch.manual_seed(0)
    model, inputs = Net(), torch.randn(8, 4)
    change(model)
    attached, optimizer = trained(model, inputs)
    assert_view(attached, model, inputs)
    train(model, optimizer, inputs, 2)
    assert_view(attached, model, inputs)


def test_a_view_is_as_the_model_is_now_and_not_as_it_was_at_the_last_one() -> None:
    model, inputs = Scaled(), torch.randn(8, 4)
    attached, optimizer = trained(model, inputs)
    first = attached.algorithm.ema_model
    model.scale = 3.0
    model.norm.eps = 0.1
    model.head.register_forward_hook(lambda module, args, out: out + 1)
    assert_view(attached, model, inputs)
    for change in (nn.Module.half, nn.Module.double, lambda view: view.requires_grad_(), nn.Module.train):
        change(attached.algorithm.ema_model)
        train(model, optimizer, inputs, 1)
        assert_view(attached, model, inputs)
    assert first.scale == 1.0
    assert torch.equal(first.body.weight, attached.algorithm.ema_model.body.weight)  # the average's own memory


def test_a_view_sees_an_adapter_whose_scaling_has_changed() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["body", "head"], r=2, init_lora_weights=False))
    inputs = torch.randn(8, 4)
    attached, _ = trained(model, inputs)
    assert_view(attached, model, inputs)
    model.base_model.model.body.scaling["default"] = 7.0
    assert_view(attached, model, inputs)
    model.disable_adapter_layers()
    model.base_model.model.norm.bias.data.zero_()
    with torch.no_grad():
        assert torch.equal(attached.algorithm.ema_model(inputs), applied(attached, model, inputs))


def test_teachers_in_a_training_step_carry_no_gradient_and_disturb_none() -> None:
    torch.manual_seed(0)
    model, inputs = Net(), torch.randn(8, 4)
    weight_norm(model)
    attached, optimizer = trained(model, inputs)
    for _ in range(3):
        student = model(inputs)
        teacher = attached.algorithm.ema_model(inputs)
        assert not teacher.requires_grad
        optimizer.zero_grad()
        (student - teacher).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())


def test_a_view_keeps_classes_attributes_and_ties() -> None:
    model, inputs = Net(), torch.randn(8, 4)
    subclass_of_parameter(model)
    tied_weight = model.head.weight
    model.second = nn.Linear(6, 2)
    model.second.weight = tied_weight
    attached, _ = trained(model, inputs)
    view = attached.algorithm.ema_model
    assert type(view.body.weight) is type(model.body.weight)
    assert view.body.weight.infshape == {"width": 6}
    assert view.body.weight.manifold is not model.body.weight.manifold
    assert view.head.weight is view.second.weight
    assert isinstance(view.head.weight, nn.Parameter)


def test_a_view_shares_objects_that_serve_the_training_or_cannot_be_copied() -> None:
    model, inputs = Net(), torch.randn(8, 4)
    model.ema = EMA(smoothing=0.5)
    lock(model)
    holds_its_trainer(model)
    loader(model)
    attached, _ = trained(model, inputs, ema=model.ema)
    model.attached = attached
    view = assert_view(attached, model, inputs)
    for name in ("ema", "attached", "lock", "loop", "scheduler", "data"):
        assert getattr(view, name) is getattr(model, name), name


def test_a_view_of_a_lightning_module_shares_its_trainer() -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * self.trainer.max_epochs

    model, inputs = Module(), torch.randn(8, 4)
    model.trainer = lightning.Trainer(max_epochs=3, logger=False, enable_checkpointing=False, accelerator="cpu")
    attached, _ = trained(model, inputs)
    assert assert_view(attached, model, inputs).trainer is model.trainer


def test_a_view_copies_the_state_that_a_forward_changes() -> None:
    class Counts(Net):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.log = {"calls": 0}, []
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.seen["calls"] += 1
            self.log.append(x)
            self.calls += 1
            return super().forward(x)

    model, inputs = Counts(), torch.randn(8, 4)
    attached, _ = trained(model, inputs)
    view = attached.algorithm.ema_model
    view(inputs)
    assert (model.seen["calls"], len(model.log), int(model.calls)) == (3, 3, 3)
    assert (view.seen["calls"], len(view.log), int(view.calls)) == (4, 4, 4)


def test_two_closures_with_one_cell_have_one_in_the_view_as_well() -> None:
    model, inputs = Net(), torch.randn(8, 4)
    inner = model.body

    def replace(module: nn.Module) -> None:
        nonlocal inner
        inner = module

    model.forward = lambda x: model.head(inner(x))
    model.replace = replace
    attached, _ = trained(model, inputs)
    view = attached.algorithm.ema_model
    view.replace(nn.Linear(4, 6))
    assert inner is model.body
    with pytest.raises(AssertionError):
        torch.testing.assert_close(view(inputs), applied(attached, model, inputs))


# What cannot be a view


class ByGlobal(Net):
    def forward(self, x: Tensor) -> Tensor:
        return LISTED[0].head(self.body(x))


class OwnInstance(Net):
    instance: nn.Module

    def __init__(self) -> None:
        super().__init__()
        type(self).instance = self

    def forward(self, x: Tensor) -> Tensor:
        return self.instance.head(self.body(x))


class Clones:
    """Leads to a module, and copies itself in a way of its own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict) -> "Clones":
        return Clones(self.module)


class Merges(nn.Linear):
    """As loralib's layers: an adapter is merged into the weight where evaluation begins."""

    def train(self, mode: bool = True) -> nn.Module:
        if self.training and not mode:
            self.weight.data += 1.0
        return super().train(mode)


def by_a_global():
    LISTED[:] = [ByGlobal()]
    return LISTED[0]


def by_a_class_attribute():
    return OwnInstance()


def by_a_method_that_closes_over_it():
    inner = nn.Linear(4, 6)

    class Closes(Net):
        def __init__(self):
            super().__init__()
            self.body = inner

        def forward(self, x):
            return self.head(inner(x))

    return Closes()


def by_a_copy_of_its_own():
    model = Net()
    model.clones = Clones(model.body)
    return model


def merging():
    model = Net()
    model.body = Merges(4, 6)
    return model


def by_a_cache():
    model = Net()
    model.pick = functools.lru_cache(lambda name: getattr(model, name))
    model.forward = MethodType(lambda s, x: s.pick("head")(s.pick("body")(x)), model)
    return model


def by_a_generator():
    model = Net()

    def layers(net=model):
        while True:
            yield net.body

    model.layers = layers()
    model.forward = MethodType(lambda s, x: s.head(next(s.layers)(x)), model)
    return model


def nested_too_deeply():
    model = Net()
    for _ in range(400):
        model.body = nn.Sequential(model.body)
    model.forward = lambda x: model.head.weight.sum() * x
    return model


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (by_a_global, "class ByGlobal"), (by_a_class_attribute, "class OwnInstance"),
        (by_a_method_that_closes_over_it, "class .*Closes"), (by_a_copy_of_its_own, "clones"),
        (merging, r"eval\(\) writes"), (by_a_cache, "pick"), (by_a_generator, "layers"),
        (nested_too_deeply, "body"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_viewed_is_refused_by_name_and_is_left_as_it_was(build, named) -> None:
    model, inputs = build(), torch.randn(8, 4)
    attached, optimizer = trained(model, inputs)
    before = bits(model)
    for _ in range(2):
        with pytest.raises(CopyError, match=f"(?s){named}.*applied()"):
            _ = attached.algorithm.ema_model
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    train(model, optimizer, inputs, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_has_no_view() -> None:
    model = Net()
    model.body = torch.jit.script(model.body)
    with pytest.raises(CopyError, match=r"body is scripted.*applied\(\)"):
        module_over(model, {id(p): p.detach().clone() for p in model.parameters()})


def test_part_of_the_memory_of_an_averaged_tensor_in_another_layout_is_refused() -> None:
    model = nn.Linear(4, 2)
    model.rows = model.weight.data.view(torch.int32)[:1]
    with pytest.raises(CopyError, match=r"rows.*applied\(\)"):
        module_over(model, {id(model.weight): torch.ones(2, 4)})


def test_a_view_takes_tensors_of_another_dtype_for_any_parameter_or_buffer() -> None:
    model = nn.BatchNorm1d(3)
    model.register_buffer("rows", model.weight.detach()[:2])
    new = {id(t): torch.full_like(t, 2, dtype=torch.float64) for t in (*model.parameters(), *model.buffers())}
    view = module_over(model, new)
    assert view.running_mean.data_ptr() == new[id(model.running_mean)].data_ptr()
    assert {t.dtype for t in (*view.parameters(), *view.buffers())} == {torch.float64}
    assert torch.equal(view.rows, torch.full((2,), 2.0, dtype=torch.float64))


def test_views_leave_nothing_behind() -> None:
    model, inputs = Net(), torch.randn(8, 4)
    closure(model)
    attached, _ = trained(model, inputs)
    gone = weakref.ref(attached.algorithm.ema_model)
    gc.collect()
    assert gone() is None


def test_references_name_the_attribute_of_the_module_that_leads_to_an_object() -> None:
    model = Net()
    model.body.helper = {"to": [lambda: model.head.weight]}
    found = References(model)
    assert found.where(id(model.head)) == "head"
    assert found.where(id(model.body.helper["to"][0])) == "body.helper"


# Copies of an EMA


class Holds(Net):
    def __init__(self) -> None:
        super().__init__()
        self.ema = EMA(smoothing=0.5)


def leave_buffers(slot):
    return default_policy(slot) if slot.is_parameter else Policy.LEAVE


def averages(ema: EMA) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in ema.state_dict()["ema_model"].items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def resumed(model: nn.Module, ema: EMA, state: dict, inputs: Tensor, steps: int = 2) -> dict[str, Tensor]:
    """Train on, as a script does that has loaded a checkpoint."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(ema, model, optimizer)
    attached._loop.state.timestamp = state["timestamp"]
    train(model, optimizer, inputs, steps)
    attached.detach()
    return averages(ema)


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("holds", [False, True])
def test_an_ema_is_copied_with_its_model_and_both_train_on_as_the_originals_do(holds, swapped) -> None:
    torch.manual_seed(0)
    model, inputs = Holds() if holds else Net(), torch.randn(8, 4)
    attached, optimizer = trained(model, inputs, ema=getattr(model, "ema", None))
    ema, want, weights = attached.algorithm, averages(attached.algorithm), bits(model)
    with attached.applied() if swapped else warnings.catch_warnings():
        if holds:
            other = copy.deepcopy(model)
            twin = other.ema
        else:
            other, _, twin = copy.deepcopy((model, optimizer, ema))
        assert twin is not ema
        assert twin._average.model is other
        assert not twin.ema_weights_active
        assert same(averages(twin), want)
        assert same(bits(other), bits(model))
        assert torch.equal(twin.ema_model(inputs), applied_view(ema, model, inputs))
    assert same(averages(ema), want)
    assert same(bits(model), weights)
    mine = [a.data_ptr() for a in twin._shadow.averages.values()]
    assert set(mine).isdisjoint(a.data_ptr() for a in ema._shadow.averages.values())
    state = {"timestamp": attached.timestamp}
    got = resumed(other, twin, state, inputs)
    train(model, optimizer, inputs, 2)
    assert same(got, averages(ema))
    assert same(bits(other), bits(model))


def applied_view(ema: EMA, model: nn.Module, inputs: Tensor) -> Tensor:
    view = ema.ema_model
    was = view.training
    out = view.eval()(inputs)
    view.train(was)
    return out


def test_an_ema_copied_alone_keeps_its_average_and_a_model_to_use_it_with() -> None:
    model, inputs = Net(), torch.randn(8, 4)
    attached, optimizer = trained(model, inputs)
    ema = attached.algorithm
    best, want = copy.deepcopy(ema), averages(ema)
    train(model, optimizer, inputs, 2)
    assert same(averages(best), want)
    assert not same(averages(ema), want)
    assert best.num_updates == 2
    assert best.ema_model is not model
    other = best.get_ema_model(Net())
    assert torch.equal(other.body.weight, want["body.weight"])
    again = copy.deepcopy(copy.deepcopy(best))
    assert same(averages(again), want)


def test_a_pickled_ema_keeps_its_average_until_it_meets_its_model_again() -> None:
    torch.manual_seed(0)
    model, inputs = Net(), torch.randn(8, 4)
    attached, optimizer = trained(model, inputs)
    ema, want = attached.algorithm, averages(attached.algorithm)
    twin = pickled(pickled(ema))
    assert same(averages(twin), want)
    assert repr(twin) == repr(ema)
    other = Net()
    other.load_state_dict(model.state_dict())
    got = resumed(other, twin, {"timestamp": attached.timestamp}, inputs)
    train(model, optimizer, inputs, 2)
    assert same(got, averages(ema))
    assert twin.num_updates == ema.num_updates


def test_an_ema_that_is_pickled_while_swapped_in_brings_its_model_the_training_weights() -> None:
    model, inputs = Holds(), torch.randn(8, 4)
    attached, _ = trained(model, inputs, ema=model.ema)
    want, weights = averages(model.ema), bits(model)
    with attached.applied():
        other = pickled(model)
    assert same(bits(other), want)
    attach(other.ema, other, torch.optim.SGD(other.parameters(), lr=0.1))
    assert same(bits(other), weights)
    assert same(averages(other.ema), want)
    assert not other.ema.ema_weights_active


def test_pickling_leaves_the_averages_where_they_are() -> None:
    model, inputs = Net(), torch.randn(8, 4)
    attached, optimizer = trained(model, inputs)
    averaged = attached.algorithm._shadow.averages
    before = {name: tensor.data_ptr() for name, tensor in averaged.items()}
    from multiprocessing.reduction import ForkingPickler

    ForkingPickler.dumps(attached.algorithm)  # moves tensors to shared memory
    torch.save(attached.algorithm, io.BytesIO())
    assert before == {name: tensor.data_ptr() for name, tensor in averaged.items()}
    assert not any(tensor.is_shared() for tensor in averaged.values())
    train(model, optimizer, inputs, 1)


def test_an_ema_is_copied_and_pickled_before_it_meets_a_model() -> None:
    for make in (copy.copy, copy.deepcopy, pickled):
        twin = make(EMA("5ba", policy=leave_buffers))
        attached, _ = trained(Net(), torch.randn(8, 4), ema=twin)
        assert attached.algorithm.num_updates == 2
        assert "norm.running_mean" not in averages(twin)


def test_a_policy_without_a_name_is_no_obstacle_to_a_copy_and_named_when_pickled() -> None:
    model, inputs = Net(), torch.randn(8, 4)
    attached, _ = trained(
        model, inputs, ema=EMA(smoothing=0.5, policy=lambda slot: leave_buffers(slot) or default_policy(slot))
    )
    ema = attached.algorithm
    assert same(averages(copy.deepcopy(ema)), averages(ema))
    assert same(averages(copy.copy(ema)), averages(ema))
    for thing in (
        ema,
        EMA(policy=lambda slot: leave_buffers(slot) or default_policy(slot)),
        Recorder("x", policy=lambda _: Policy.COPY),
    ):
        with pytest.raises(CopyError, match="policy must be a function that can be imported"):
            pickle.dumps(thing)
    cloudpickle = pytest.importorskip("cloudpickle")
    assert same(averages(pickle.loads(cloudpickle.dumps(ema))), averages(ema))


def test_an_ema_whose_model_cannot_be_copied_says_so_and_its_state_can_be() -> None:
    model, inputs = Net(), torch.randn(8, 4)
    lock(model)
    attached, _ = trained(model, inputs)
    with pytest.raises(CopyError, match=r"the model must be copyable.*copy ema.state_dict\(\)"):
        copy.deepcopy(attached.algorithm)
    assert same(pickled(attached.algorithm).state_dict()["ema_model"], averages(attached.algorithm))


def test_a_recorder_is_copied_and_pickled_before_it_is_at_work_and_refused_then(tmp_path) -> None:
    recorder = Recorder(tmp_path / "record", interval="1ba")
    for make in (copy.copy, copy.deepcopy, pickled):
        assert repr(make(recorder)) == repr(recorder)
    model = Net()
    model.recorder = recorder
    with attach(recorder, model, torch.optim.SGD(model.parameters(), lr=0.1)):
        for make in (copy.deepcopy, pickle.dumps):
            for thing in (recorder, model):
                with pytest.raises(PolyakError, match="before it is attached"):
                    make(thing)


# Real models


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config), {"input_ids": torch.randint(16, (2, 6))}


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=16, max_position_embeddings=8,
    )  # fmt: skip
    return LlamaForCausalLM(config), {"input_ids": torch.randint(16, (2, 6))}


def tiny_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=16, decoder_start_token_id=0)
    ids = torch.randint(16, (2, 6))
    return T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids}


def tiny_lora():
    import peft

    model, inputs = tiny_llama()
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False, use_dora=True)
    return peft.get_peft_model(model, config), inputs


def tiny_prepared():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model, inputs = tiny_gpt2()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    try:
        return accelerator.prepare(model), inputs
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def tiny_hooked():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, inputs = tiny_gpt2()
    for module in model.modules():
        if not list(module.children()):
            add_hook_to_module(module, AlignDevicesHook("cpu"))
    add_hook_to_module(model, AlignDevicesHook("cpu", io_same_device=True), append=True)
    return model, inputs


def tiny_unet():
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    return model, {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([1, 5])}


REAL = [tiny_gpt2, tiny_llama, tiny_t5, tiny_lora, tiny_prepared, tiny_hooked, tiny_unet]


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0].clone()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", REAL, ids=lambda build: build.__name__)
def test_the_view_of_a_real_model_computes_what_the_model_does_with_the_average_in_it(build) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attached = attach(EMA(smoothing=0.5), model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs)[0].float().square().mean().backward()
        optimizer.step()
    model.eval()
    raw, got = output(model, inputs), output(attached.algorithm.ema_model, inputs)
    trained_ones = [p for p in model.parameters() if p.requires_grad]
    with attached.applied():
        model.requires_grad_(False)  # torch has other kernels for attention where gradients may be wanted
        want = output(model, inputs)
        for parameter in trained_ones:
            parameter.requires_grad_()
    assert torch.equal(got, want)
    assert not torch.equal(got, raw)


def test_teachers_that_are_read_at_each_step_leave_nothing_behind_in_the_average() -> None:
    model, inputs = Net(), torch.randn(8, 4)
    attached, _ = trained(model, inputs)
    swapper = attached.algorithm._average.shadow._swapper
    attached.model(inputs)
    gc.collect()
    gc.freeze()  # so that each collection looks only at what is new
    held = len(swapper._exposed)
    for _ in range(20):
        attached.model(inputs)
        attached.state_dict()
        gc.collect()
    assert len(swapper._exposed) <= 6 * held


def test_a_swap_makes_no_backup_once_nobody_holds_the_averaged_model() -> None:
    model, inputs = Net(), torch.randn(8, 4)
    attached, _ = trained(model, inputs)
    swapper = attached.algorithm._average.shadow._swapper
    held = attached.model
    held(inputs)
    assert swapper.is_exposed()
    del held
    gc.collect()
    assert not swapper.is_exposed()


def averaging(model: nn.Module, inputs: Tensor):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = attach(EMA("3ba"), model, optimizer)

    def train() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

    train()
    return ema, train


def test_a_parametrization_is_removed_from_the_averaged_module_and_stays_in_the_model() -> None:
    model, inputs = parametrizations.weight_norm(nn.Linear(4, 2)), torch.ones(3, 4)
    parametrize.register_parametrization(model, "bias", nn.Tanh())
    ema, train = averaging(model, inputs)
    averaged = ema.model
    before = averaged(inputs)
    for name in ("weight", "bias"):
        parametrize.remove_parametrizations(averaged, name)
    torch.testing.assert_close(averaged(inputs), before)
    assert type(averaged) is nn.Linear
    train()
    assert parametrize.is_parametrized(model)
    torch.testing.assert_close(ema.model.weight, ema.model.parametrizations.weight[0](
        *(getattr(ema.model.parametrizations.weight, f"original{i}") for i in (0, 1))
    ))  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_averaged_module_and_its_copies_are_scripted(tmp_path) -> None:
    inputs = torch.randn(8, 4)
    ema, _ = averaging(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), inputs)
    torch.save(ema.model, tmp_path / "model.pt")
    for module in (ema.model, copy.deepcopy(ema.model)):
        torch.testing.assert_close(torch.jit.script(module)(inputs), ema.model(inputs))
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(loaded(inputs), ema.model(inputs))
