"""Replaces Composer's own conftest for ``test_ema.py``: that one sets up much, and downloads, for other tests."""

import os
import sys
from types import SimpleNamespace

import pytest

sys.path.insert(0, os.getcwd())  # noqa: PTH109 - the checkout's `tests`

import stand_ins
from tests.common import SimpleModel
from transformers import BertConfig, BertForMaskedLM

from polyak import Time
from polyak.algorithm import NoLogger

config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=64)
pytest.tiny_bert_model = BertForMaskedLM(config)
pytest.tiny_bert_tokenizer = stand_ins.tokenizer("bert")


@pytest.fixture
def minimal_state(request):
    if request.module.Event.__module__.startswith("polyak"):
        return SimpleNamespace(model=None, timestamp=None, max_duration=Time(100, "ep"))
    from composer.core import State
    from composer.devices import DeviceCPU

    return State(model=SimpleModel(), run_name="run", device=DeviceCPU(), rank_zero_seed=0, max_duration="100ep")


@pytest.fixture
def empty_logger():
    return NoLogger()
