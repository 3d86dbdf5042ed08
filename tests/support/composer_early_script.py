"""Trains with Composer 0.12.1 and its own ``EMA``, in a separate process; tests read its checkpoints."""

import sys
import warnings

import loops
import torch
from torch.amp import grad_scaler
from torch.utils.data import DataLoader

warnings.simplefilter("ignore")  # Composer 0.12.1 is four years older than this torch
# The name of this class in the torch of that time.
torch.cuda.amp.grad_scaler._refresh_per_optimizer_state = grad_scaler._refresh_per_optimizer_state

import composer  # noqa: E402  needs the line above
from composer.algorithms import EMA  # noqa: E402


class Wrapped(composer.ComposerModel):
    def __init__(self):
        super().__init__()
        self.net = loops.noisy_perceptron()

    def forward(self, batch):
        return self.net(batch[0])

    def loss(self, outputs, batch):
        return torch.nn.functional.cross_entropy(outputs, batch[1])


class Keeps(composer.Callback):
    """Saves the training weights after each batch."""

    def __init__(self, folder):
        self.folder = folder

    def batch_end(self, state, logger):
        torch.save(loops.bits(state.model), f"{self.folder}/trained{state.timestamp.batch.value}.pt")


def trainer_of(half_life, **options):
    model = Wrapped()
    return composer.Trainer(
        model=model,
        train_dataloader=DataLoader(loops.dataset(), batch_size=loops.BATCH),
        algorithms=[EMA(half_life)],
        optimizers=torch.optim.Adam(model.parameters(), lr=0.02),
        device="cpu",
        progress_bar=False,
        seed=3,
        **options,
    )


def train(folder, half_life):
    trainer = trainer_of(
        half_life,
        max_duration="3ep",
        eval_dataloader=DataLoader(loops.dataset(2, seed=5), batch_size=loops.BATCH),
        callbacks=[Keeps(folder)],
        save_folder=folder,
        save_interval="3ba",
    )
    trainer.fit()
    # A checkpoint saved by hand has the weights that the last event left in the model.
    trainer.eval()
    trainer.save_checkpoint(f"{folder}/training-in-it.pt")
    # Before the first evaluation, `training_model` has the initial weights.
    trainer = trainer_of(half_life, max_duration="5ba")
    trainer.fit()
    trainer.save_checkpoint(f"{folder}/never-swapped.pt")


if __name__ == "__main__":
    assert composer.__version__ == "0.12.1", composer.__version__
    torch.set_num_threads(1)
    for half_life in ("4ba", "1ep"):
        train(f"{sys.argv[1]}/{half_life}", half_life)
