"""What the processes of ``ranks.Ranks`` do with DeepSpeed under Accelerate and under Transformers' ``Trainer``."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed_runs as runs
import torch
import torch.distributed as dist
from deepspeed_runs import KINDS, adam, batch, begin, dtype, evaluated, master, net
from torch import Tensor, nn


def config_of(kind: str, accumulate: int, *, gather: bool = True) -> dict[str, Any]:
    config = copy.deepcopy({"zero_optimization": {"stage": 0}, **KINDS[kind]})
    if config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = gather
    return {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": accumulate, **config}


def fresh() -> None:
    """Let Accelerate forget the group of an earlier job, and use this one: by itself it offers DeepSpeed on GPUs."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    begin()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


def error_of(act: Callable[[], object]) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Accelerate


class Accelerated:
    """A loop with Accelerate, in which two batches are one step."""

    def __init__(self, kind: str, *, averaged: bool = True) -> None:
        from accelerate import Accelerator, DeepSpeedPlugin

        from polyak import EMA
        from polyak.hosts.accelerate import attach

        fresh()
        self.accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config_of(kind, 2)))
        model = net()
        self.model, self.optimizer = self.accelerator.prepare(model, adam(model))
        self.ema: Any = None
        if averaged:
            self.ema = attach(
                EMA(runs.HALF_LIFE), self.accelerator, self.model, self.optimizer, samples_per_step=2 * 8 * 2
            )

    def backward(self, number: int) -> None:
        output = self.model(batch(number).to(dtype(self.model)))
        self.accelerator.backward((output.float() - 1).square().mean())

    def train(self, steps: range) -> None:
        self.model.train()
        for number in range(2 * steps.start, 2 * steps.stop):
            with self.accelerator.accumulate(self.model):
                self.backward(number)
                self.optimizer.step()
                self.optimizer.zero_grad()


def accelerate_follows(kind: str, folder: str) -> dict[str, Any]:
    """Train with and without an average; compare both, and save after 6 steps."""
    plain = Accelerated(kind, averaged=False)
    plain.train(range(9))
    expected = master(plain.model)
    run, reference = Accelerated(kind), None
    for step in range(6):
        run.train(range(step, step + 1))
        reference = runs.reference_of(run.model, reference)
    run.accelerator.save_state(folder)
    before, raw = evaluated(run.model), master(run.model)
    with run.ema.applied() as model:
        swapped, output = master(run.model), evaluated(run.model)
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        exported = run.accelerator.get_state_dict(run.model)
        refused = {
            "backward": error_of(lambda: run.backward(0)),
            "save": error_of(lambda: run.accelerator.save_state(folder)),
            "load": error_of(lambda: run.accelerator.load_state(folder)),
        }
    restored = torch.equal(before, evaluated(run.model)) and equal(master(run.model), raw)
    counted = (run.ema.num_updates, run.ema.timestamp.batch.value, run.ema.timestamp.sample.value)
    run.train(range(6, 9))
    after = master(run.model)
    with run.ema.applied():
        later = master(run.model)
    return {
        "error": runs.error(swapped, reference),
        "moved": runs.error(raw, reference),
        "outputs": (output, runs.single(reference, run.model, buffers)),
        "exported": [n for n in swapped if exported and not torch.equal(exported[n], swapped[n].to(exported[n].dtype))],
        "refused": refused,
        "restored": restored,
        "counted": counted,
        "harmless": equal(expected, after),
        "raw": after,
        "later": later,
    }


def accelerate_resumes(kind: str, folder: str) -> dict[str, Any]:
    run = Accelerated(kind)
    run.accelerator.load_state(folder)
    run.train(range(6, 9))
    raw = master(run.model)
    with run.ema.applied():
        return {"raw": raw, "later": master(run.model), "updates": run.ema.num_updates}


# Transformers


class Learner(nn.Module):
    main_input_name = "x"

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        output = self.net(x)
        return {"loss": (output.float() - labels.float()).square().mean(), "logits": output}


def data(seed: int, size: int) -> list[dict[str, Tensor]]:
    drawn = torch.randn(size, 37, generator=torch.Generator().manual_seed(seed))
    return [{"x": x, "labels": torch.ones(3)} for x in drawn]


STEPS, EVAL = 6, data(9, 16)


def trainer_of(kind: str, folder: str, *, averaged: bool = True, gather: bool = True, **arguments: Any) -> Any:
    """Return a trainer, in which two batches are one step, and the handle of its average."""
    import transformers

    from polyak import EMA
    from polyak.hosts.transformers import attach

    transformers.logging.set_verbosity_error()
    fresh()
    bf16 = "bf16" in kind
    trainer = transformers.Trainer(
        Learner(),
        transformers.TrainingArguments(
            **{
                "output_dir": folder,
                "deepspeed": config_of(kind, 2, gather=gather),
                "accelerator_config": {"use_configured_state": True},
                "use_cpu": True,  # without which it refuses bf16
                "bf16": bf16,
                "max_steps": STEPS,
                "per_device_train_batch_size": 8,
                "per_device_eval_batch_size": 8,
                "gradient_accumulation_steps": 2,
                "train_sampling_strategy": "sequential",
                "optim": "adamw_torch",
                "learning_rate": 0.02,
                "lr_scheduler_type": "constant",
                "max_grad_norm": 0.0,
                "save_strategy": "steps",
                "save_steps": 3,
                "eval_strategy": "steps",
                "eval_steps": 3,
                "remove_unused_columns": False,
                "report_to": "none",
                "disable_tqdm": True,
                "logging_strategy": "no",
                "dataloader_pin_memory": False,
            }
            | arguments
        ),
        train_dataset=data(1, STEPS * 2 * 8 * dist.get_world_size()),
        eval_dataset=EVAL,
    )
    return trainer, attach(EMA(runs.HALF_LIFE), trainer, eval_weights="both") if averaged else None


def reference_callback(trainer: Any, found: dict[str, Any]) -> Any:
    import transformers

    class Follows(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found["reference"] = runs.reference_of(trainer.model_wrapped, found.get("reference"))

    return Follows()


def skipping_callback(trainer: Any, step: int) -> Any:
    import transformers

    class Skips(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                trainer.model_wrapped._step_applied = False  # as after an overflow in fp16

    return Skips()


def counted(ema: Any) -> tuple[int, int, int]:
    clock = ema._loop.state.timestamp
    return ema.num_updates, clock.batch.value, clock.sample.value


@torch.no_grad()
def loss_of(weights: dict[str, Tensor], engine: Any, buffers: dict[str, Tensor]) -> float:
    """Return the loss of the evaluation's data of one process that holds these weights."""
    model = Learner().to(dtype(engine))
    model.load_state_dict({**model.state_dict(), **{n: t.to(dtype(engine)) for n, t in weights.items()}, **buffers})
    inputs = {name: torch.stack([one[name] for one in EVAL]) for name in EVAL[0]}
    return float(model.eval()(inputs["x"].to(dtype(engine)), inputs["labels"])["loss"])


def transformers_follows(kind: str, folder: str, gather: bool) -> dict[str, Any]:
    """Train with and without an average; compare both, the evaluation, and what was saved."""
    from safetensors.torch import load_file

    plain, _ = trainer_of(kind, folder + "/plain", averaged=False, gather=gather, save_strategy="no")
    plain.train()
    expected = master(plain.model_wrapped)
    trainer, ema = trainer_of(kind, folder + "/run", gather=gather)
    found: dict[str, Any] = {}
    trainer.add_callback(reference_callback(trainer, found))
    trainer.train()
    engine, raw = trainer.model_wrapped, master(trainer.model_wrapped)
    raw_buffers = {name: buffer.detach().clone() for name, buffer in engine.module.named_buffers()}
    with ema.applied() as model:
        swapped = master(engine)
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    if "zero 3" in kind:
        runs.move_masters(engine)
    metrics = trainer.evaluate()
    trainer.save_model(folder + "/exported")
    dist.barrier()  # rank 0 writes it
    saved = load_file(Path(folder, "run", f"checkpoint-{STEPS}", "model.safetensors"))
    exported = load_file(Path(folder, "exported", "model.safetensors"))
    return {
        "error": runs.error(swapped, found["reference"]),
        "moved": runs.error(raw, found["reference"]),
        "losses": (metrics["eval_loss"], loss_of(swapped, engine, buffers)),
        "raw losses": (metrics["eval_raw_loss"], loss_of(raw, engine, raw_buffers)),
        "in training": next(
            line["eval_loss"] for line in trainer.state.log_history if line["step"] == STEPS and "eval_loss" in line
        ),
        "saved": [n for n in swapped if not torch.equal(saved[n], swapped[n].to(dtype(engine)))],
        "names": saved.keys() == model.state_dict().keys(),
        "exported": equal(saved, exported),
        "counted": counted(ema),
        "restored": equal(master(engine), raw),
        "harmless": equal(expected, raw),
        "raw": raw,
        "average": swapped,
        "model": error_of(lambda: ema.model),
    }


def transformers_resumes(kind: str, folder: str, gather: bool) -> dict[str, Any]:
    trainer, ema = trainer_of(kind, folder + "/resumed", gather=gather)
    trainer.train(resume_from_checkpoint=folder + "/run/checkpoint-3")
    raw = master(trainer.model_wrapped)
    with ema.applied():
        return {"raw": raw, "average": master(trainer.model_wrapped), "updates": ema.num_updates}


def transformers_loads_best(kind: str, folder: str) -> dict[str, Any]:
    """Let the first of two checkpoints be the best; resume a run without an average with one, and skip a step."""
    import warnings

    trainer, ema = trainer_of(kind, folder, load_best_model_at_end=True, greater_is_better=True, averaged=True)
    found: dict[str, Any] = {}

    def note(step: int) -> Callable[..., Any]:
        def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            if trainer.state.global_step == step and "raw" not in found:
                found["raw"] = master(trainer.model_wrapped)
                with ema.applied():
                    found["average"] = master(trainer.model_wrapped)
            return output

        inner = trainer.evaluation_loop
        return evaluation_loop

    trainer.evaluation_loop = note(3)
    trainer.train()
    raw = master(trainer.model_wrapped)
    with ema.applied():
        average = master(trainer.model_wrapped)
    best = {"raw": equal(raw, found["raw"]), "average": equal(average, found["average"]), "updates": ema.num_updates}
    plain, _ = trainer_of(kind, folder + "/plain", averaged=False)
    plain.train()
    trainer, ema = trainer_of(kind, folder + "/added")
    trainer.add_callback(skipping_callback(trainer, step=4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=folder + "/plain/checkpoint-3")
    found = [str(one.message) for one in caught if "so it was saved without polyak" in str(one.message)]
    return {"best": best, "warned": len(found), "added": counted(ema)}


def transformers_refuses(folder: str) -> dict[str, str]:
    from polyak import EMA, Recorder
    from polyak.hosts.transformers import attach

    trainer, _ = trainer_of("bf16, zero 2", folder, averaged=False)
    found = {"recorder": error_of(lambda: attach(Recorder(folder + "/record", "1ba"), trainer))}
    ema = attach(EMA("2ba"), trainer)
    found["early"] = error_of(ema.state_dict)
    return found


# Lightning


def lightning_runs(folder: str) -> dict[str, Any]:
    """Attach to the engine of Lightning's strategy, which itself offers GPUs alone; save after an epoch, and resume."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, deepspeed

    from polyak import EMA
    from polyak.hosts.deepspeed import attach
    from polyak.hosts.lightning import Averaging

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adam(self.net)

        def on_fit_start(self) -> None:
            self.ema = attach(EMA(runs.HALF_LIFE), self.trainer.strategy.model)

        def training_step(self, drawn: Tensor) -> Tensor:
            return (self.net(drawn.bfloat16()).float() - 1).square().mean()

    def fit(*callbacks: Any, resumed: str | None = None) -> Module:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=dist.get_world_size(),
            strategy=DeepSpeedStrategy(stage=2, overlap_comm=False, logging_batch_size_per_gpu=8),
            precision="bf16-mixed",
            max_steps=6,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=bool(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        module = Module()
        # One batch, since Lightning does not resume a loader where it was.
        trainer.fit(module, torch.utils.data.DataLoader([batch(0)] * 3, None), ckpt_path=resumed)
        return module

    begin()
    found = {"on a CPU": error_of(fit)}
    DeepSpeedStrategy.setup_environment = DDPStrategy.setup_environment
    DeepSpeedStrategy.root_device = torch.device("cpu", 0)  # it needs a number
    deepspeed._validate_device_index_selection = lambda devices: None
    found["callback"] = error_of(lambda: fit(Averaging(EMA("3ba"))))
    keeps = ModelCheckpoint(folder, save_on_train_epoch_end=True, save_top_k=-1, filename="{step}")
    for name, one in (("whole", fit(keeps)), ("resumed", fit(resumed=f"{folder}/step=3.ckpt"))):
        engine = one.trainer.strategy.model
        found[name, "raw"] = master(engine)
        with one.ema.applied():
            found[name, "average"] = master(engine)
        found[name, "updates"] = one.ema.num_updates
    return found
