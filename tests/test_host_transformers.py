"""The ``Trainer`` of Transformers, held to the contract, and to what only it can get wrong."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import loops
import pytest
import torch
from host_contract import HostContract, Plan, Run, Session, Watched, native, net_of, of_net
from torch import Tensor, nn

from polyak import EMA, Event, LoanError, PlanWarning, Record, Recorder

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
safetensors_torch = pytest.importorskip("safetensors.torch")
from polyak.hosts.transformers import STATE_NAME, attach  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Classifier(nn.Module):
    main_input_name = "x"

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def collate(samples: list[Any]) -> dict[str, Tensor]:
    inputs, labels = zip(*samples, strict=True)
    return {"x": torch.stack(inputs), "labels": torch.stack(labels)}


class TransformersSession:
    def __init__(self, net: nn.Module, algorithms: Any, folder: Path, plan: Plan, **arguments: Any) -> None:
        self.folder, self.plan = folder, plan
        model = Classifier(net)
        self.trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                **{
                    "output_dir": str(folder),
                    "num_train_epochs": plan.epochs,
                    "per_device_train_batch_size": loops.BATCH,
                    "per_device_eval_batch_size": loops.BATCH,
                    "gradient_accumulation_steps": plan.accumulate,
                    "train_sampling_strategy": "random" if plan.shuffle else "sequential",
                    # At steps, as saving: after an evaluation at the end of the epoch, what is drawn at random next
                    # is not what the checkpoint of the epoch's last step goes on with, in the trainer itself.
                    "eval_strategy": "steps" if plan.evaluate else "no",
                    "eval_steps": plan.steps,
                    "save_strategy": "steps" if plan.save_every else "no",
                    "save_steps": plan.save_every or 1,
                    "max_grad_norm": 0.0,
                    "use_cpu": True,
                    "report_to": "none",
                    "disable_tqdm": True,
                    "include_num_input_tokens_seen": "all",
                }
                | arguments
            ),
            data_collator=collate,
            train_dataset=plan.data,
            eval_dataset=plan.eval_data,
            optimizers=(optimizer := plan.optimizer(model), torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        )
        attach(algorithms, self.trainer)

    def fit(self, resume: Path | None = None) -> None:
        self.trainer.train(resume_from_checkpoint=None if resume is None else str(resume))

    def evaluate(self) -> None:
        self.trainer.evaluate()

    def predict(self) -> None:
        self.trainer.predict(self.plan.eval_data)

    def save(self) -> Path:
        self.trainer.save_model(str(self.folder / "by-hand"))
        return self.folder / "by-hand"

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"


class TransformersHost:
    lacks: Mapping[str, str] = {}
    golden = """
        init fit_start
        epoch_start batch_start batch_end batch_start batch_end epoch_end eval_start eval_end save_start save_end
        epoch_start batch_start batch_end batch_start batch_end epoch_end eval_start eval_end save_start save_end
        fit_end
    """

    def session(self, net: nn.Module, algorithm: EMA, folder: Path, plan: Plan) -> Session:
        return TransformersSession(net, algorithm, folder, plan)

    def loadable(self, saved: Path) -> Mapping[str, Tensor]:
        return safetensors_torch.load_file(saved / "model.safetensors")


HOST = TransformersHost()


class TestContract(HostContract):
    host = HOST
