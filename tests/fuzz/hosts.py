"""The same models in the loops of frameworks, with a probe in the model for steps and evaluations."""

import copy
import logging
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from polyak import Trainer

from .blocks import BATCH, WIDTH
from .cases import Case
from .check import WrongError, differences, held
from .loops import ema_of
from .models import OPTIMIZERS, build
from .reference import Reference, flat, tensors


class Task(nn.Module):
    """A model that reports each evaluation."""

    main_input_name = "x"

    def __init__(self, case: Case, evaluated: Callable[[], None]) -> None:
        super().__init__()
        self.net = build(case)
        self._evaluated = evaluated

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        del labels
        if not self.training:
            self._evaluated()
        logits = self.net(x)
        return {"loss": logits.float().square().mean(), "logits": logits}


class Watch:
    """A run that stores or compares the weights after each step and the average in each evaluation.

    Args:
        case: The case that runs.
        reference: Of the average, filled by the first of the two runs.
        twin: The run without an average, whose weights this one must have.
    """

    def __init__(self, case: Case, reference: Reference, twin: "Watch | None" = None) -> None:
        self._reference, self._twin = reference, twin
        self.ema = ema_of(case.ema) if twin else None
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor], Reference]] = []
        self.evaluations: list[int] = []
        self._moved = set[str]()
        torch.manual_seed(case.seed)
        self.task = Task(case, self._evaluated)
        parameters = [p for p in self.task.parameters() if p.is_floating_point() or p.is_complex()]
        self.optimizer = OPTIMIZERS[case.optimizer](parameters)
        self.optimizer.register_step_post_hook(lambda optimizer, args, kwargs: self._stepped())

    def _stepped(self) -> None:
        net = self.task.net
        weights = {name: tensor.detach().clone() for name, tensor in held(net).items()}
        if self._twin is None:
            self._moved |= {n for n, p in net.named_parameters(remove_duplicate=False) if p.grad is not None}
            self._reference.count(net, self._moved)
        else:
            self._demand(differences(weights, self._twin.steps[len(self.steps)][0]), "after a step")
        online = {name: flat(tensor) for name, (tensor, _) in tensors(net).items()}
        self.steps.append((weights, online, copy.deepcopy(self._reference)))

    def _evaluated(self) -> None:
        self.evaluations.append(len(self.steps))
        if self._twin is not None and self.steps:
            _, online, reference = self._twin.steps[len(self.steps) - 1]
            if reference.begun:
                self._demand(reference.wrong(self.task.net, online, rounded=True), "in an evaluation")

    def ends(self) -> None:
        """Check the weights and the average after the run."""
        assert self._twin is not None
        assert self.ema is not None
        self._demand(differences(held(self.task.net), self._twin.steps[len(self.steps) - 1][0]), "after training")
        average = {name[name.index("net.") + 4 :]: t for name, t in self.ema.state_dict().get("ema_model", {}).items()}
        self._demand(self._twin.steps[len(self.steps) - 1][2].wrong_in(average), "at the end")
        if self.evaluations != self._twin.evaluations:
            raise WrongError(f"evaluations after the steps {self.evaluations} for {self._twin.evaluations}")

    @staticmethod
    def _demand(said: Iterable[str], where: str) -> None:
        for difference in said:
            raise WrongError(f"{where}: {difference}")


def _inputs(case: Case, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(case.seed + 1)
    return torch.randn(count * BATCH, WIDTH, generator=generator).to(getattr(torch, case.dtype))


def _loader(case: Case, count: int | None = None) -> DataLoader[Any]:
    return DataLoader(TensorDataset(_inputs(case, count or case.steps)), batch_size=BATCH)


def _native(case: Case, watch: Watch) -> None:
    batches = [(x, x) for (x,) in _loader(case)]

    def trainer(**options: Any) -> Trainer:
        return Trainer(
            model=watch.task,
            train_dataloader=batches,
            eval_dataloader=batches[:1],
            eval_interval="2ba",
            algorithms=watch.ema,
            optimizers=watch.optimizer,
            loss=lambda outputs, targets: outputs["loss"],
            progress_bar=False,
            **options,
        )

    trainer(max_duration=f"{case.steps}ba", seed=case.seed).fit()


def _lightning(case: Case, watch: Watch) -> None:
    import lightning.pytorch as lightning

    from polyak.hosts.lightning import Averaging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.task = watch.task

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.task(batch[0])["loss"]

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.task(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return watch.optimizer

    trainer = lightning.Trainer(
        max_epochs=1,
        callbacks=[Averaging(watch.ema)] if watch.ema else [],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=2,
        num_sanity_val_steps=0,
    )
    trainer.fit(Module(), _loader(case), _loader(case, 1))


def _accelerate(case: Case, watch: Watch) -> None:
    from accelerate import Accelerator

    from polyak.hosts.accelerate import attach

    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(watch.task, watch.optimizer, _loader(case))
    attached = attach(watch.ema, accelerator, model, optimizer) if watch.ema else None
    for i, (x,) in enumerate(loader):
        accelerator.backward(model(x)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        if i % 2:
            model.eval()
            if attached is None:
                model(x)
            else:
                with attached.applied():
                    model(x)
            model.train()


def _transformers(case: Case, watch: Watch) -> None:
    import transformers

    from polyak.hosts.transformers import attach

    transformers.logging.set_verbosity_error()
    inputs = _inputs(case, case.steps)
    data = [{"x": x, "labels": 0} for x in inputs]
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            watch.task,
            transformers.TrainingArguments(
                output_dir=str(Path(folder)),
                num_train_epochs=1,
                per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=BATCH,
                train_sampling_strategy="sequential",
                eval_strategy="steps",
                eval_steps=2,
                save_strategy="no",
                max_grad_norm=0.0,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
                seed=case.seed % 2**31,
            ),
            train_dataset=data,
            eval_dataset=data[:BATCH],
            optimizers=(watch.optimizer, torch.optim.lr_scheduler.ConstantLR(watch.optimizer, factor=1.0)),
        )
        if watch.ema is not None:
            attach(watch.ema, trainer)
        trainer.train()


HOSTS: dict[str, Callable[[Case, Watch], None]] = {
    "Trainer": _native,
    "Lightning": _lightning,
    "Accelerate": _accelerate,
    "Transformers": _transformers,
}
