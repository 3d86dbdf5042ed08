"""Writes the files in ``tests/checkpoints/series_files`` with ema-pytorch and nitrous-ema.

Run it with both installed: ``PYTHONPATH=tests/support python tests/support/make_series_files.py``.
"""

import shutil
from pathlib import Path

import ema_pytorch
import nitrous_ema
import torch
from foreign_runs import follow, module

FOLDER = Path(__file__).parents[1] / "checkpoints" / "series_files"
STEPS, EVERY = 1600, 320
SIGMAS = (0.05, 0.28)


def main() -> None:
    for name, library, stride, options in (
        ("ema_pytorch", ema_pytorch, 1, {"checkpoint_dtype": torch.float32}),
        ("ema_pytorch_10", ema_pytorch, 10, {}),
        ("nitrous_ema", nitrous_ema, 10, {"step_size_correction": True}),
    ):
        folder = FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        model = module()
        post_hoc = library.PostHocEMA(
            model,
            sigma_rels=SIGMAS,
            update_every=stride,
            checkpoint_every_num_steps=EVERY,
            checkpoint_folder=str(folder),
            **options,
        )
        for _ in follow(model, STEPS):
            post_hoc.update()


if __name__ == "__main__":
    main()
