"""A batch that is left by an exception or an interrupt has not begun: nothing of it stays, and it is repeated."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loops
import pytest
import torch
from torch import nn

from polyak import EMA, Callback, CheckpointSaver, Event, PlanWarning, Trainer
from polyak.trainer.interrupts import signals_held

INSIDE = [
    Event.BEFORE_DATALOADER,
    Event.AFTER_DATALOADER,
    Event.BATCH_START,
    Event.BEFORE_TRAIN_BATCH,
    Event.BEFORE_FORWARD,
    Event.AFTER_FORWARD,
    Event.BEFORE_LOSS,
    Event.AFTER_LOSS,
    Event.BEFORE_BACKWARD,
    Event.AFTER_BACKWARD,
    Event.AFTER_TRAIN_BATCH,
]
AFTER = [Event.BATCH_END, Event.BATCH_CHECKPOINT, Event.EPOCH_START, Event.EPOCH_END, Event.EPOCH_CHECKPOINT]


@pytest.fixture(autouse=True)
def interrupts_raise() -> Iterator[None]:
    """Let an interrupt raise, whatever was imported before: Composer has a handler of its own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Draws(Callback):
    """Draws random numbers at every event inside a batch, as augmentations do."""

    def run_event(self, event: Event, state: Any, logger: Any) -> None:
        if event in INSIDE:
            torch.rand(1)


def build(folder: Path, *callbacks: Callback, **options: Any) -> tuple[Trainer, EMA]:
    ema = EMA("4ba")
    trainer = loops.train(
        folder,
        ema=ema,
        model=loops.noisy_perceptron(),
        data=loops.Noisy(),
        max_duration="2ep",
        shuffle=True,
        saves=None,
        callbacks=(Draws(), *callbacks),
        **options,
    )
    return trainer, ema


def end(trainer: Trainer, ema: EMA) -> dict[str, Any]:
    """Return all that the run leads to."""
    return {
        "steps": int(trainer.state.timestamp.batch),
        "weights": loops.bits(trainer.state.model),
        "average": loops.averaged(ema),
        "optimizer": trainer.state.optimizers[0].state_dict()["state"],
        "drawn": torch.rand(3),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Any]:
    trainer, ema = build(tmp_path_factory.mktemp("whole"))
    trainer.fit()
    return end(trainer, ema)


def continued(trainer: Trainer, folder: Path) -> tuple[Trainer, EMA]:
    """Save in the handler, and resume in another trainer."""
    trainer.save_checkpoint(folder / "stopped.pt")
    loops.disturb()
    resumed, ema = build(folder / "resumed", load_path=folder / "stopped.pt")
    resumed.fit()
    return resumed, ema


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "batch"),
    [(at, batch) for at in [*INSIDE, *AFTER] for batch in (0, 5, 8) if (at, batch) != (Event.EPOCH_START, 8)],
    ids=str,
)
def test_a_run_interrupted_at_any_event_and_saved_there_resumes_as_if_it_had_not_stopped(at, batch, whole, tmp_path):
    trainer, _ = build(tmp_path, loops.Raises(at, KeyboardInterrupt(), batch=batch))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    resumed, ema = continued(trainer, tmp_path)
    assert loops.differences(whole, end(resumed, ema)) == []


@pytest.mark.parametrize("at", INSIDE, ids=str)
def test_a_fit_after_one_interrupted_inside_a_batch_equals_a_run_that_never_stopped(at, whole, tmp_path):
    class Once(Callback):
        raised = False

        def run_event(self, event: Event, state: Any, logger: Any) -> None:
            if event is at and state.timestamp.batch == 8 and not self.raised:
                self.raised = True
                raise KeyboardInterrupt

    trainer, ema = build(tmp_path, Once())
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer.fit()
    assert loops.differences(whole, end(trainer, ema)) == []


def test_an_interrupted_batch_whose_gradients_were_unscaled_can_be_repeated(tmp_path):
    class Once(Callback):
        raised = False

        def after_train_batch(self, state: Any, logger: Any) -> None:
            if state.timestamp.batch == 3 and not self.raised:
                self.raised = True
                raise KeyboardInterrupt

    def run(folder: Path, *callbacks: Callback) -> dict[str, Any]:
        trainer, ema = build(folder, *callbacks, precision="amp_fp16")
        try:
            trainer.fit()
        except KeyboardInterrupt:
            trainer.fit()
        return end(trainer, ema)

    assert loops.differences(run(tmp_path / "whole"), run(tmp_path / "interrupted", Once())) == []


class Signal:
    """Sends this process an interrupt after a number of lines of the trainer's code, once a batch has ended."""

    def __init__(self, after: int | None) -> None:
        self.lines = 0
        self._after = after
        self._armed = False

    def arm(self) -> None:
        self._armed = True

    def __call__(self, frame: Any, event: str, argument: object) -> Any:
        if "polyak/trainer" not in frame.f_code.co_filename or "checkpoint" in frame.f_code.co_filename:
            return None
        if event == "line" and self._armed:
            self.lines += 1
            if self.lines == self._after:
                self._armed = False
                signal.raise_signal(signal.SIGINT)
        return self


def fit_traced(trainer: Trainer, tracer: Signal) -> None:
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        trainer.fit()
    finally:
        sys.settrace(before)


class Arms(Callback):
    """Lets the lines be counted in one batch, the sixth, and the end of its epoch."""

    def __init__(self, tracer: Signal) -> None:
        self._tracer = tracer

    def batch_start(self, state: Any, logger: Any) -> None:
        if state.timestamp.batch == 5:
            self._tracer.arm()
        elif state.timestamp.batch == 6:
            self._tracer._armed = False


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a log whose `with` had not begun
def test_a_real_signal_at_any_line_of_a_batch_leaves_a_run_that_resumes_bit_for_bit(whole, tmp_path):
    counting = Signal(None)
    trainer, _ = build(tmp_path / "counted", Arms(counting))
    fit_traced(trainer, counting)
    assert counting.lines > 100
    for after in range(1, counting.lines, max(1, counting.lines // 40)):
        folder = tmp_path / str(after)
        tracer = Signal(after)
        trainer, _ = build(folder, Arms(tracer))
        with pytest.raises(KeyboardInterrupt):
            fit_traced(trainer, tracer)
        resumed, ema = continued(trainer, folder)
        assert loops.differences(whole, end(resumed, ema)) == [], f"after {after} lines"


def test_a_signal_in_the_optimizer_step_waits_until_the_step_is_counted_and_averaged(whole, tmp_path):
    trainer, ema = build(tmp_path)

    def interrupt(optimizer: Any, args: Any, kwargs: Any) -> None:
        if trainer.state.timestamp.batch == 3:
            os.kill(os.getpid(), signal.SIGINT)

    trainer.state.optimizers[0].register_step_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.state.timestamp.batch == 4
    assert ema.num_updates == 3
    resumed, again = continued(trainer, tmp_path)
    assert loops.differences(whole, end(resumed, again)) == []


def test_delayed_signals_arrive_after_the_block_and_handlers_are_restored():
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        handler = signal.getsignal(signal.SIGTERM)
        with signals_held():
            signal.raise_signal(signal.SIGTERM)
            assert came == []
        assert came == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt), signals_held():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(ZeroDivisionError), signals_held():
            _ = 1 / 0
        assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ran: list[bool] = []

        def elsewhere() -> None:
            with signals_held():
                ran.append(True)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert ran == [True]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_trains_in_a_thread(tmp_path, whole):
    trainer, ema = build(tmp_path)
    thread = threading.Thread(target=trainer.fit)
    thread.start()
    thread.join()
    assert trainer.state.timestamp.batch == 12
    assert loops.differences(whole["average"], loops.averaged(ema)) == []


class Replaced(nn.Module):
    """Replaces its buffer in each forward pass instead of changing it in place, and has one that comes late."""

    def __init__(self) -> None:
        super().__init__()
        self.net = loops.perceptron()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("late", None)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + 1
        self.late = torch.ones(()) if self.late is None else self.late * 2
        return self.net(inputs)


@pytest.mark.parametrize("batch", [0, 1, 4])
def test_a_buffer_that_the_forward_pass_replaces_is_restored_too(batch, tmp_path):
    model = Replaced()
    trainer = loops.train(
        tmp_path, model=model, saves=None, callbacks=(loops.Raises(Event.AFTER_LOSS, KeyboardInterrupt(), batch=batch),)
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert model.seen == batch
    assert model.late is None if batch == 0 else model.late == 2 ** (batch - 1)


# The end of a run


@pytest.mark.parametrize(
    ("duration", "interval", "want"),
    [
        ("6ba", "100ba", ["ep2-ba6.pt"]),
        ("6ba", "3ba", ["ep0-ba3.pt", "ep2-ba6.pt"]),
        ("5ba", "100ba", ["ep1-ba5.pt"]),
        ("2ep", "100ba", ["ep2-ba6.pt"]),
        ("2ep", "1ep", ["ep1-ba3.pt", "ep2-ba6.pt"]),
    ],
)
def test_the_end_of_a_run_is_saved_once(duration, interval, want, tmp_path):
    data = [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(3)]
    model = loops.perceptron()
    saver = CheckpointSaver(tmp_path, interval)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = nn.functional.cross_entropy
    Trainer(model, data, duration, optimizers=optimizer, loss=loss, callbacks=saver, progress_bar=False).fit()
    assert sorted(path.name for path in tmp_path.iterdir()) == want


def test_a_second_fit_with_nothing_to_train_warns(tmp_path):
    trainer, _ = build(tmp_path)
    trainer.fit()
    with pytest.warns(PlanWarning, match=r"nothing to train: the run has reached its max_duration, 2ep.*duration="):
        trainer.fit()
    assert trainer.state.timestamp.batch == 12
