"""A pytest plugin: small local objects replace what Composer's conftest downloads, and what needs a torchvision."""

import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import composer.models.huggingface
import pytest
import torchvision.datasets
from torch.utils.data import Dataset
from transformers import BertTokenizerFast

SECONDS = 300  # for one test; most take less than one


class VisionDataset(Dataset):
    """Has what Composer's tests use of torchvision's class of this name."""

    def __init__(self, root: str, transforms: Any = None, transform: Any = None, target_transform: Any = None) -> None:
        self.root = root
        self.transforms, self.transform, self.target_transform = transforms, transform, target_transform


torchvision.datasets.VisionDataset = VisionDataset
# Composer's own imports every model that transformers has, some of which want a torchvision.
composer.models.huggingface._is_registered_causal_lm = lambda model: False


def tokenizer(name: str) -> BertTokenizerFast:
    """Return a tokenizer that knows the tokens with a role and no others, whatever its name."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return BertTokenizerFast(vocab={token: index for index, token in enumerate(tokens)})


@pytest.hookimpl(tryfirst=True)  # before Composer's conftest, which makes tokenizers here
def pytest_configure(config: pytest.Config) -> None:
    from tests.fixtures import autouse_fixtures, fixtures

    fixtures.assets_tokenizer_helper = tokenizer
    fixtures.download_tokenizers_files = lambda: None
    del autouse_fixtures.setup_mlflow_tracking  # skips each test where there is no mlflow


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)


def _stop(number: int, frame: FrameType | None) -> None:
    pytest.fail(f"the test took more than {SECONDS} seconds")
