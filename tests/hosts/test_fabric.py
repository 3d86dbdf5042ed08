"""Loops in Lightning's Fabric, held to the contract, and to what only they can get wrong."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import loops
import pytest
import torch
from host_contract import HostContract, Plan, Session, net_of
from torch import Tensor, nn

from polyak import EMA
from tests.hosts.test_plain import PlainSession

pytest.importorskip("lightning", minversion="2.6")
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision

from polyak.hosts.lightning import attach

# Lightning with torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated")


class FabricSession(PlainSession):
    """The plain loop, with what Fabric does in it."""

    def attach(self, algorithms: Any, **counts: Any) -> Any:
        precision = [MixedPrecision("16-mixed", "cpu", self.scaler)] if self.scaler else None
        self.fabric = Fabric(accelerator="cpu", devices=1, loggers=[self.log], plugins=precision)
        self.net, self.optimizer = self.fabric.setup(self.net, self.optimizer)
        self.loader, self.eval_loader = self.fabric.setup_dataloaders(self.loader, self.eval_loader)
        return attach(algorithms, self.fabric, self.net, self.optimizer, **counts)

    def backward(self, loss: Tensor) -> None:
        self.fabric.backward(loss)

    def step(self) -> None:
        self.optimizer.step()

    def save_state(self, folder: Path) -> None:
        random = {"now": torch.get_rng_state(), "epoch": self.epoch_rng}
        self.fabric.save(folder / "state.pt", {**self.state, "done": self.done, "random": random})

    def load(self, path: Path) -> None:
        rest = self.fabric.load(path, self.state)
        self.done, self.epoch_rng = rest["done"], rest["random"]["epoch"]
        torch.set_rng_state(rest["random"]["now"])

    def save_for_use(self, folder: Path) -> None:
        with self.attached.applied():
            self.fabric.save(folder / "averaged.pt", {"model": self.net})


class FabricHost:
    lacks: Mapping[str, str] = {}
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
        return FabricSession(net, algorithm, folder, plan)

    def loadable(self, saved: Path) -> Mapping[str, Tensor]:
        return torch.load(saved / "averaged.pt", weights_only=True)["model"]


HOST = FabricHost()


class TestContract(HostContract):
    host = HOST


@pytest.mark.parametrize("before", [False, True])
def test_the_average_has_the_models_own_names_whether_it_was_attached_before_or_after_setup(before: bool) -> None:
    fabric, net, ema = Fabric(accelerator="cpu", devices=1), net_of(), EMA("4ba")
    own = Plan().optimizer(net)
    model, optimizer = fabric.setup(net, own)
    attached = attach(ema, fabric, *((net, own) if before else (model, optimizer)))
    fabric.backward(model(torch.ones(1, 6)).sum())
    optimizer.step()
    assert attached.timestamp.batch == "1ba"
    assert ema.state_dict()["ema_model"].keys() == dict(net.named_parameters()).keys()
    assert not loops.differences(loops.bits(net), ema.state_dict()["ema_model"])


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_strategies_that_shard_the_weights_are_refused_before_training(name: str) -> None:
    from lightning.fabric import strategies

    fabric, net = Fabric(accelerator="cpu", devices=1), net_of()
    fabric._strategy = object.__new__(getattr(strategies, name))
    with pytest.raises(NotImplementedError, match=name):
        attach(EMA(), fabric, net, Plan().optimizer(net))
