"""An average in torchtitan's trainer: right against float64, harmless, validated, configured, and resumed."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import ForkedRanks, Origin
from paths import ROOT
from safetensors.torch import load_file

pytest.importorskip("torchtitan")
import torchtitan_configs
import torchtitan_run
import torchtitan_shim  # noqa: F401  before torchtitan
from torchtitan.config import ConfigManager
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.trainer import Trainer

from polyak import EMA
from polyak.errors import ArgumentError, ProfileError, TimeError
from polyak.hosts.torchtitan import attach
from polyak.hosts.torchtitan.config import AveragedTrainer, Averaging, averaged

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PAGE = ROOT / "docs" / "hosts" / "torchtitan.md"
LAYOUTS = [("tp", 2), ("fsdp and tp", 4), ("pp", 2), ("pp, several parts", 2), ("pp and fsdp", 4), ("float8", 2)]
NEEDS = {"float8": "torchao"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRanks]:
    with Origin("torchtitan_run", "torchtitan.trainer", "torchtitan.models.llama3") as origin:
        pool = ForkedRanks(tmp_path_factory.mktemp("ranks"), origin)
        yield pool
        pool.close()


Found = dict[str, Any]


def train(ranks: ForkedRanks, folder: Path, *runs: Found, layout: str = "fsdp", size: int = 2) -> list[Found]:
    """Run torchtitan's trainer once for each of some runs; return what each rank found of them."""
    return ranks.run(size, torchtitan_run.trains, str(folder), layout, list(runs))


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("whole")
    return train(ranks, folder, {"name": "run", "export": True})[0]["run"] | {"folder": folder}


def test_the_average_is_right_and_training_is_as_without_it(ranks, whole, tmp_path) -> None:
    assert whole["error"] < 1e-6
    assert (whole["updates"], whole["tokens"]) == (8, 8 * 2 * 2 * 32)
    assert train(ranks, tmp_path, {"name": "plain", "average": False})[0]["plain"]["raw"] == whole["raw"]


def test_validation_has_the_average_and_the_training_weights(whole) -> None:
    found = {(step, name): value for step, name, value in whole["losses"]}
    assert {step for step, _ in found} == {1, 4, 8}
    assert found[1, "validation_metrics/loss"] == found[1, "raw_validation_metrics/loss"]
    assert found[8, "validation_metrics/loss"] > found[8, "raw_validation_metrics/loss"]  # it lags behind
    assert whole["logged"] == ["ema/decay", "ema/distance"]
    assert whole["refused"].startswith("LoanError: "), whole["refused"]  # both, while the average is swapped in


def test_a_run_that_was_killed_resumes_with_the_bits_of_one_that_was_not(ranks, whole, tmp_path) -> None:
    with pytest.raises(AssertionError, match="a rank died"):
        train(ranks, tmp_path, {"name": "run", "kill_at": 6})
    resumed = train(ranks, tmp_path, {"name": "run"})[0]["run"]
    assert (resumed["raw"], resumed["average"]) == (whole["raw"], whole["average"])
    assert resumed["losses"] == [one for one in whole["losses"] if one[0] == 8]


@pytest.mark.parametrize(("layout", "size"), LAYOUTS)
def test_under_each_layout_the_average_is_right_harmless_validated_and_resumed(ranks, layout, size, tmp_path) -> None:
    if layout in NEEDS and importlib.util.find_spec(NEEDS[layout]) is None:
        pytest.skip(f"needs {NEEDS[layout]}")
    runs = [
        {"name": "plain", "average": False},
        {"name": "whole", "publish": True, "interval": 4},
        {"name": "resumed", "load": "whole", "load_step": 4},
    ]
    lags, results = False, train(ranks, tmp_path, *runs, layout=layout, size=size)
    full = {name: bits for found in results for name, bits in found["whole"]["average"].items()}
    for found in results:
        plain, whole, resumed = found["plain"], found["whole"], found["resumed"]
        assert whole["error"] < 1e-6
        assert (whole["updates"], resumed["updates"]) == (8, 8)
        assert whole["average"] != whole["raw"] == plain["raw"]
        assert whole["published"] == full  # that of all stages
        assert (resumed["raw"], resumed["average"]) == (whole["raw"], whole["average"])
        assert resumed["losses"] == [one for one in whole["losses"] if one[0] > 4]
        raw = {step: value for step, name, value in whole["losses"] if name.startswith("raw_")}
        assert raw == {step: value for step, _, value in plain["losses"]}
        averaged_losses = {step: value for step, name, value in whole["losses"] if not name.startswith("raw_")}
        assert averaged_losses.keys() == {1, 4, 8}
        lags = lags or averaged_losses[8] > raw[8]
    assert lags  # on the ranks with the last stage, which have a loss
    fresh = torchtitan_run.config_of(tmp_path, layout, {"name": "fresh"}).model_spec.model.build()
    fresh.load_state_dict(load_file(tmp_path / "published.safetensors"))  # under the names of torchtitan's checkpoints
    assert torchtitan_run.bits({name: tensor.detach() for name, tensor in fresh.named_parameters()}) == full


def test_the_page_has_the_table_of_layouts() -> None:
    inside = PAGE.read_text().partition("<!--- table of layouts -->")[2].partition("<!--- end of the table -->")[0]
    rows = [line.split("|")[1:3] for line in inside.strip().splitlines()[2:]]
    assert [(name.strip(), int(ranks)) for name, ranks in rows] == [("fsdp", 2), *LAYOUTS]


# Export


def test_the_average_is_saved_under_the_names_of_torchtitans_checkpoints_and_of_hugging_face(whole) -> None:
    folder, model = whole["folder"], torchtitan_configs.tiny().model_spec.model
    averaged_weights = torch.load(folder / "averaged-0.pt")
    saved = load_file(folder / "titan.safetensors")
    assert "layers.0.attention.qkv_linear.wq.weight" in saved
    hugging = load_file(folder / "hf" / "model.safetensors")
    assert "model.layers.0.self_attn.q_proj.weight" in hugging
    for state in saved, Llama3StateDictAdapter(model, None).from_hf(hugging):
        fresh = model.build()
        fresh.load_state_dict(state)
        loaded = {name: tensor.detach() for name, tensor in fresh.named_parameters()}
        assert loaded.keys() == averaged_weights.keys()
        assert all(torch.equal(loaded[name], one) for name, one in averaged_weights.items())


# The configuration


def parsed(*options: str, config: str = "tiny_averaged") -> Any:
    return ConfigManager().parse_args(["--module", "torchtitan_configs", "--config", config, *options])


def test_the_command_line_sets_the_section() -> None:
    assert parsed().polyak == Averaging.Config(half_life="100ba", eval_weights="both", save="averaged")
    changed = parsed("--polyak.half_life", "0.1dur", "--polyak.eval_weights=raw", "--polyak.no-enable").polyak
    assert (changed.half_life, changed.eval_weights, changed.enable) == ("0.1dur", "raw", False)
    assert parsed("--training.steps", "5").training.steps == 5
    assert "half_life" in parsed().to_dict()["polyak"]


def test_a_section_that_cannot_be_is_refused_where_the_command_line_is_read(capfd) -> None:
    for options, what in [
        (("--polyak.half_life", "10 parsecs"), "got '10 parsecs'"),
        (("--polyak.decay", "0.9"), "decay"),  # it has a half-life already
    ]:
        with pytest.raises(SystemExit):
            parsed(*options)
        assert what in " ".join("".join(capfd.readouterr()).replace("│", " ").split())
    with pytest.raises(TimeError, match="10 parsecs"):
        averaged(torchtitan_configs.tiny(), half_life="10 parsecs")
    with pytest.raises(ProfileError, match="exactly one"):
        averaged(torchtitan_configs.tiny(), half_life="3ba", decay=0.9)
    with pytest.raises(ArgumentError, match="save='averaged'"):
        Averaging.Config(save_in_hf=True)
    with pytest.raises(ArgumentError, match="one place"):
        Averaging.Config(algorithms=lambda: EMA("3ba"), half_life="3ba")
    with pytest.raises(ArgumentError, match="one section"):
        averaged(parsed())


def test_the_section_keeps_the_trainers_own_class() -> None:
    class Other(Trainer):
        @torchtitan_configs.dataclass(kw_only=True, slots=True)
        class Config(Trainer.Config):
            more: int = 3

    config = averaged(Other.Config(more=4), half_life="3ba")
    assert config.more == 4
    assert issubclass(type(config)._owner, Other)
    assert isinstance(averaged(Trainer.Config()), AveragedTrainer.Config)


def test_a_section_and_an_override_average_as_attach_does(ranks, whole, tmp_path) -> None:
    tiny = ["--checkpoint.interval=8", "--module", "torchtitan_configs", "--config"]
    override = (
        'polyak.hosts.torchtitan.config.ema={"half_life": "0.375dur", "eval_weights": "both", "save": "averaged"}'
    )
    runs = [
        {"name": "section", "args": [*tiny, "tiny_averaged", "--polyak.half_life", "3ba", "--polyak.record=record"]},
        {"name": "override", "args": [*tiny, "tiny", "--override.imports", override]},
        {"name": "off", "args": [*tiny, "tiny_averaged", "--polyak.no-enable"]},
    ]
    found = train(ranks, tmp_path, *runs)[0]
    for name in "section", "override":
        for key in "raw", "average", "losses", "updates", "tokens", "logged":
            assert found[name][key] == whole[key]
        saved = (tmp_path / name / "averaged" / "model.safetensors").read_bytes()
        assert len(saved) > 1e6
    assert found["off"]["raw"] == whole["raw"]
    assert "average" not in found["off"]
    assert (tmp_path / "section" / "record" / "manifest.json").exists()


# What is refused


class Stub:
    """A trainer as far as ``attach`` looks before it refuses."""

    def __init__(self, **attributes: Any) -> None:
        self.model_parts, self.optimizers, self.step = [], object(), 0
        vars(self).update(attributes)


@pytest.mark.parametrize(
    ("trainer", "what"),
    [
        (object(), "must be one of torchtitan"),
        (Stub(step=4), "before a checkpoint is loaded"),
        (Stub(averaging=Stub(algorithms=[EMA("3ba")])), "in one call"),
    ],
    ids=["no trainer", "after a checkpoint", "a second time"],
)
def test_attach_refuses_a_trainer_that_it_cannot_follow(trainer, what) -> None:
    with pytest.raises(ArgumentError, match=what):
        attach(EMA("3ba"), trainer)
