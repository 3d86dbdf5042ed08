"""A small run whose weights are known at every step, and what other libraries store of it.

No generator of random numbers is used, so that files that a library wrote once stay those of this run.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyak.profiles import Profile

SHAPES = {"weight": (6, 8), "bias": (6,)}
COUNT = 54


@lru_cache(maxsize=4096)
def weights(step: int) -> dict[str, Tensor]:
    """Return the weights after a step: slow changes, and faster ones as of a learning rate that does not fall."""
    i = torch.arange(COUNT, dtype=torch.float64)
    slow = torch.sin(0.002 * step * (1 + i / 20)) + 0.0005 * step
    noise = sum(torch.sin(step * (0.02 * k + 0.0007 * k * i) + k * i * i) for k in range(1, 9))
    flat = (2 + slow + 0.05 * noise).float()
    return {"weight": flat[:48].reshape(6, 8), "bias": flat[48:]}


def module(step: int = 0) -> nn.Linear:
    made = nn.Linear(8, 6)
    made.load_state_dict(weights(step))
    return made


def follow(model: nn.Module, steps: int) -> Iterator[int]:
    """Yield each step, with the model at its weights."""
    for step in range(1, steps + 1):
        model.load_state_dict(weights(step))
        yield step


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in SHAPES])


def truth(profile: Profile, steps: int, begin: int = 0) -> Tensor:
    """Return the average of all weights after ``begin``, as one vector."""
    now = float(steps - begin)
    shares = [profile.decay(float(t), now) for t in range(steps - begin + 1)]
    shares = [(one - shares[0]) / (1 - shares[0]) for one in shares]
    return torch.tensor(shares, dtype=torch.float64).diff() @ _trajectory(steps)[begin:]


@lru_cache(maxsize=4)
def _trajectory(steps: int) -> Tensor:
    return torch.stack([flat(weights(step)) for step in range(1, steps + 1)])


def error(average: Any, profile: Profile, steps: int, begin: int = 0) -> float:
    """Return |average - truth| relative to |last weights - truth|."""
    true = truth(profile, steps, begin)
    return float((flat(average) - true).norm() / (flat(weights(steps)) - true).norm())


def moving_average(decay: Callable[[int], float], steps: int, ends: Sequence[int]) -> dict[int, dict[str, Tensor]]:
    """Return what an average that is updated after every step, from the first weights, is at some steps."""
    average, found = {name: one.double() for name, one in weights(1).items()}, {}
    for step in range(1, steps + 1):
        for name, one in weights(step).items():
            average[name].lerp_(one.double(), 1 - decay(step))
        if step in ends:
            found[step] = {name: one.clone() for name, one in average.items()}
    return found


def write_raw(folder: Path, steps: int, every: int) -> None:
    for step in range(every, steps + 1, every):
        torch.save({"model": weights(step), "global_step": step}, folder / f"step-{step}.pt")


def write_icefall(folder: Path, steps: int, every: int, period: int = 10) -> None:
    """Write checkpoints as icefall's ``save_checkpoint`` does."""
    average = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for step in range(1, steps + 1):
        if step % period == 0:
            for name, one in weights(step).items():
                average[name] = average[name] * (1 - period / step) + one.double() * (period / step)
        if step % every == 0:
            saved = {
                "model": weights(step),
                "optimizer": {"state": {}, "param_groups": []},
                "scheduler": None,
                "grad_scaler": None,
                "sampler": None,
                "model_avg": {name: one.float() for name, one in average.items()},
                "batch_idx_train": step,
                "average_period": period,
                "best_train_loss": 0.5,
            }
            torch.save(saved, folder / f"checkpoint-{step}.pt")


def write_swa(folder: Path, steps: int, every: int, stride: int = 10) -> None:
    """Write checkpoints of torch's own ``AveragedModel``."""
    model = module()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for step in follow(model, steps):
        if step % stride == 0:
            averaged.update_parameters(model)
        if step % every == 0:
            torch.save(
                {"model": model.state_dict(), "swa": averaged.state_dict(), "step": step}, folder / f"step-{step}.pt"
            )


class EasyDict(dict):  # as EDM2's, with which it pickles snapshots
    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("a test must not unpickle a snapshot")


class Persistent(nn.Linear):
    """Pickled as modules of EDM2 are: a function's name, and the attributes in its argument."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.register_buffer("constant", torch.tensor([3.0, 0.1]))

    def __reduce__(self) -> Any:
        meta = {"type": "class", "version": 6, "module_src": "raise", "class_name": "Net", "state": dict(vars(self))}
        return _reconstruct_persistent_obj, (meta,), None


def write_edm2(
    folder: Path, steps: int, every: int, batch_size: int = 1024, sigmas: Sequence[float] = (0.05, 0.1)
) -> None:
    """Write snapshots as EDM2's training loop does: float16 modules in pickles, two at a time."""
    from polyak.profiles import PowerFunction

    ends = range(every, steps + 1, every)
    for sigma in sigmas:
        power = PowerFunction(sigma).exponent + 1
        found = moving_average(lambda step, power=power: (1 - 1 / step) ** power, steps, ends)
        for step, average in found.items():
            net = Persistent()
            net.load_state_dict({**average, "constant": net.constant})
            data = EasyDict(encoder=None, dataset_kwargs={"class_name": "x"}, loss_fn=None)
            data["ema"] = net.eval().requires_grad_(False).half()
            name = f"network-snapshot-{step * batch_size // 1000:07d}-{sigma:.3f}.pkl"
            with (folder / name).open("wb") as file:
                pickle.dump(data, file)
