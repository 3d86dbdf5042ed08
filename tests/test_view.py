"""``ema_model`` computes with the average bit for bit, or refuses: a view of every kind of model that people bring."""

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
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from polyak import EMA, LoanError, Policy, PolyakError, Recorder, attach, default_policy
from polyak.errors import CopyError
from polyak.references import References
from polyak.shadow import Shadow
from polyak.view import module_over

GLOBAL = SimpleNamespace(model=None)
LISTED: list[nn.Module] = []


class Net(nn.Module):
    """What the kinds below change a detail of."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)).relu())


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
    model.again.weight = nn.Parameter(torch.empty(4, 6))
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


def teacher_beside(model):
    model.__dict__["teacher"] = nn.Linear(4, 2)
    model.forward = MethodType(lambda s, x: Net.forward(s, x) + s.teacher(x), model)


# What cannot be copied, or serves the training


def lock(model):
    model.lock, model.locks = threading.Lock(), [threading.RLock()]


def generators(model):
    model.generator, model.stream = torch.Generator(), (i for i in range(3))


def files(model):
    model.file, model.log = open(__file__), logging.getLogger("test")  # noqa: SIM115
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
    nested, tied, lazy, frozen, subclass_of_parameter, data_parallel_inside, traced, mask, teacher_beside, lock,
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
    shared = {id(p) for p in model.parameters() if not p.requires_grad}
    averages = {t.data_ptr() for t in attached.algorithm._shadow.averages.values()}
    assert all(p.data_ptr() in averages for p in view.parameters() if id(p) not in shared)
    return view


@pytest.mark.parametrize("change", KINDS, ids=lambda change: change.__name__)
def test_the_view_computes_what_the_model_does_with_the_average_in_it(change) -> None:
    torch.manual_seed(0)
    model, inputs = Net(), torch.randn(8, 4)
    change(model)
    attached, optimizer = trained(model, inputs)
    assert_view(attached, model, inputs)
    train(model, optimizer, inputs, 2)
    assert_view(attached, model, inputs)
