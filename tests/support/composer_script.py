"""Scripts with Composer that tests run. Importing this needs Composer."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import loops
import torch
from composer import Callback, ComposerModel, Evaluator, Trainer
from composer.callbacks import CheckpointSaver
from composer.metrics import CrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Wrapped(ComposerModel):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Sequence[Tensor]) -> Tensor:
        return self.net(batch[0])

    def loss(self, outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])

    def get_metrics(self, is_train: bool) -> dict[str, Any]:
        return {} if is_train else {"CrossEntropy": CrossEntropy()}

    def update_metric(self, batch: Sequence[Tensor], outputs: Tensor, metric: Any) -> None:
        metric.update(outputs, batch[1])


class Keeps(Callback):
    """Stores the weights at each event; raises an error at a given event."""

    def __init__(self, raises: Mapping[str, BaseException] | None = None, at: int = 0) -> None:
        self.seen: list[tuple[str, dict[str, Tensor]]] = []
        self.trained: dict[int, dict[str, Tensor]] = {}
        self._raises, self._at = dict(raises or {}), at

    def run_event(self, event: Any, state: Any, logger: Any) -> None:
        name = event.value
        if name in {"eval_batch_start", "predict_batch_start", "batch_start", "fit_end"}:
            self.seen.append((f"{name} {state.dataloader_label}", loops.bits(state.model)))
        if name == "batch_end":
            self.trained[int(state.timestamp.batch)] = loops.bits(state.model)
        if name in self._raises and int(state.timestamp.batch) >= self._at:
            raise self._raises.pop(name)

    def of(self, name: str) -> list[dict[str, Tensor]]:
        return [weights for event, weights in self.seen if event.startswith(name)]


def trainer(
    folder: Path,
    *algorithms: Any,
    net: nn.Module | None = None,
    data: Dataset | None = None,
    batch: int = loops.BATCH,
    shuffle: bool = False,
    optimizer: Callable[..., Any] = lambda p: torch.optim.Adam(p, lr=0.02),
    max_duration: str = "3ep",
    save: Any = "3ba",
    raw: bool = False,
    **options: Any,
) -> Trainer:
    torch.set_num_threads(1)
    model = net if isinstance(net, Wrapped) else Wrapped(loops.perceptron() if net is None else net)
    held = DataLoader(loops.dataset(2, seed=5), batch_size=loops.BATCH)
    evaluators = [Evaluator(label="eval", dataloader=held)]
    if raw:
        evaluators.append(Evaluator(label="eval_raw", dataloader=held))
    made = Trainer(
        **{
            "model": model,
            "train_dataloader": DataLoader(
                loops.dataset() if data is None else data, batch_size=batch, shuffle=shuffle
            ),
            "eval_dataloader": evaluators,
            "max_duration": max_duration,
            "algorithms": list(algorithms),
            "optimizers": optimizer(model.parameters()),
            "save_folder": str(folder) if save else None,
            **({"save_interval": save} if save else {}),
            "save_overwrite": True,
            "device": "cpu",
            "progress_bar": False,
            "seed": 3,
            **options,
        }
    )
    for saver in made.state.callbacks:
        if isinstance(saver, CheckpointSaver):
            # Composer removes this folder only at the exit of Python.
            saver.tmp_dir_for_symlink.cleanup()
            saver.tmp_dir_for_symlink = SimpleNamespace(name=mkdtemp(dir=folder))
    return made
