"""Run by torchrun: two runs, in each of which a rank is killed once, so that torchrun restarts all ranks."""

import os
import sys
from pathlib import Path

import torch
from distributed_runs import Killed, killed

from polyak import Event

torch.set_num_threads(1)
folder, restarts = Path(sys.argv[1]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
for number, (kind, event, batch) in enumerate(
    # In the middle of an epoch, and where all ranks are about to write a checkpoint.
    (("ddp", Event.BATCH_START, 8), ("fsdp2", Event.SAVE_START, 9))
):
    callbacks = [Killed(event, batch, victim=1, note=(folder / "killed", kind))] if restarts == number else []
    killed(kind, folder / kind, folder / "results", *callbacks)
