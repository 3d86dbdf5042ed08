"""The command `polyak average`."""

import sys

import checkpoint_files
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from polyak import update_bn
from polyak.cli import main

NUMBERS = (9.0, 10.0, 11.0)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Three checkpoints of Lightning in the working directory; run the command, return its exit code and output."""
    monkeypatch.chdir(tmp_path)
    for number in NUMBERS:
        checkpoint_files.write("Lightning", tmp_path, number)

    def command(*arguments: str) -> tuple[int, str]:
        try:
            code = main(["average", *arguments])
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return command


def scale(path) -> float:
    return load_file(path)["net.scale"].item() * 2


def test_a_pattern_is_averaged_in_natural_order_with_the_newest_last(run, tmp_path) -> None:
    code, said = run("step-*.ckpt", "-o", "out.safetensors")
    assert code == 0
    assert scale("out.safetensors") == 10
    rows = [line.split() for line in said.splitlines() if line.startswith("step-")]
    assert [row[:3] for row in rows] == [[f"step-{n}.ckpt", f"{n}ba", "0.3333"] for n in (900, 1000, 1100)]
    assert load_file("out.safetensors")["net.norm.num_batches_tracked"] == 1100
    assert "1 layers have running statistics (net.norm)" in said
    assert "net.norm.num_batches_tracked, net.mask" in said


@pytest.mark.parametrize(
    ("options", "want"),
    [
        (["--last", "2"], 10.5),
        (["--weights", "1,0,0"], 9),
        (["--weights", "1,1,2"], 10.25),
        (["--half-life", "100ba"], (9 + 2 * 10 + 4 * 11) / 7),
        (["--half-life", "1ep"], (9 + 2 * 10 + 4 * 11) / 7),
        (["--half-life", "1ep", "--times", "1ep,2ep,3ep"], (9 + 2 * 10 + 4 * 11) / 7),
        (["--window", "200ba"], 10.5),
        (["--key", "state_dict"], 10),
    ],
    ids=str,
)
def test_options_give_the_weights(run, options, want) -> None:
    assert run("step-*.ckpt", "-o", "out.safetensors", *options)[0] == 0
    assert scale("out.safetensors") == pytest.approx(want, rel=1e-6)


def test_averages_of_mmcv_next_to_the_weights_are_averaged_and_said(run, tmp_path) -> None:
    for number in (1.0, 3.0):
        state = {"net.w": torch.ones(2) * number, "ema_net_w": torch.ones(2) * number * 10}
        torch.save({"meta": {"iter": int(number)}, "state_dict": state}, tmp_path / f"iter_{int(number)}.pth")
    code, said = run("iter_*.pth", "-o", "out.safetensors")
    assert code == 0
    assert "averages of mmcv's EMAHook are next to the weights (ema_net_w)" in said
    assert {name: one.tolist() for name, one in load_file("out.safetensors").items()} == {
        "net.w": [2, 2],
        "ema_net_w": [20, 20],
    }
    assert main(["convert", "iter_1.pth", "-o", "alone.safetensors"]) == 0
    assert load_file("alone.safetensors")["net.w"].tolist() == [10, 10]


def test_a_dry_run_shows_the_plan_and_writes_nothing(run, tmp_path) -> None:
    before = sorted(tmp_path.iterdir())
    code, said = run("step-*.ckpt", "-o", "out.pt", "--dry-run")
    assert code == 0
    assert "step-1000.ckpt" in said
    assert "nothing is written" in said
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_that_exists_is_replaced_only_by_force(run, tmp_path) -> None:
    (tmp_path / "out.pt").write_text("old")
    assert run("step-*.ckpt", "-o", "out.pt") == (
        2,
        "polyak average: -o must be new (got out.pt, which is there; choose another, or add --force)\n",
    )
    assert (tmp_path / "out.pt").read_text() == "old"
    assert run("step-*.ckpt", "-o", "out.pt", "--force")[0] == 0
    assert torch.load(tmp_path / "out.pt", weights_only=True)["net.scale"] == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none-*.pt", "-o", "out.pt"], "none-*.pt matches none"),
        (["step-900.ckpt", "step-*.ckpt", "-o", "out.pt"], "each checkpoint must be given once (twice: step-900.ckpt)"),
        (["step-*.ckpt", "-o", "out.txt"], "the output must be .safetensors"),
        (["step-*.ckpt", "-o", "out"], "must have a suffix"),
        (["step-*.ckpt", "-o", "none/out.pt"], "in a folder that exists"),
        (["step-*.ckpt", "-o", "out.pt", "--weights", "1,2"], "weights must have a value for each checkpoint"),
        (["step-*.ckpt", "-o", "out.pt", "--weights", "a"], "it must be numbers"),
        (["step-*.ckpt", "-o", "out.pt", "--weights", "1,1,1", "--half-life", "1ep"], "not allowed with"),
        (
            ["step-*.ckpt", "-o", "out.pt", "--half-life", "5tok"],
            "in tok (step-900.ckpt, step-1000.ckpt, step-1100.ckpt does",
        ),
        (
            ["step-*.ckpt", "-o", "out.pt", "--half-life", "5ba", "--times", "1ep,2ep,3ep"],
            "times must be in one unit, that of the profile (got 1ep, not ba)",
        ),
        (["step-*.ckpt", "-o", "out.pt", "--key", "optimizer"], "--key must be that of a state dict"),
        (["step-*.ckpt", "-o", "step-900.ckpt", "--force"], "neither in nor around a checkpoint"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_in_one_line(run, tmp_path, arguments, said) -> None:
    before = sorted(tmp_path.iterdir())
    code, printed = run(*arguments)
    assert code == 2
    assert said in printed
    assert printed.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_the_best_by_a_metric_in_the_names_are_averaged(run, tmp_path) -> None:
    for number, loss in zip(NUMBERS, (0.3, 0.2, 0.1), strict=True):
        (tmp_path / f"step-{int(100 * number)}.ckpt").rename(tmp_path / f"step={int(number)}-val_loss={loss}.ckpt")
    assert run("step=*.ckpt", "-o", "out.safetensors", "--best", "2", "--metric", "val_loss")[0] == 0
    assert scale("out.safetensors") == 10.5
    assert run("step=*.ckpt", "-o", "max.safetensors", "--best", "2", "--metric", "val_loss", "--max")[0] == 0
    assert scale("max.safetensors") == 9.5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--best", "2"], "the best must be those of a metric"),
        (["--best", "2", "--metric", "wer"], "each checkpoint must have the metric wer (step-900.ckpt has best)"),
        (["--best", "2", "--metric", "gain"], "whether a lower or a higher gain is better"),
        (["--best", "2", "--last", "2"], "not allowed with"),
        (["--max"], "must come with --metric"),
    ],
    ids=str,
)
def test_a_metric_that_is_not_clear_is_refused_in_one_line(run, arguments, said) -> None:
    code, printed = run("step-*.ckpt", "-o", "out.pt", *arguments)
    assert code == 2
    assert said in printed
    assert printed.count("\n") == 1


BATCHES = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), [torch.randn(8, 2) for _ in range(3)]

def other():
    return nn.Linear(2, 2), []

def nothing():
    return None
"""


def test_the_statistics_of_batchnorm_are_recomputed_for_the_averaged_weights(run, tmp_path) -> None:
    (tmp_path / "batches.py").write_text(BATCHES)
    models = [nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)) for _ in range(2)]
    for i, model in enumerate(models):
        torch.save(model.state_dict(), tmp_path / f"{i}.pt")
    torch.manual_seed(0)
    code, said = run("[01].pt", "-o", "out.safetensors", "--update-bn", "batches.py:build")
    assert code == 0
    assert "running statistics" not in said
    got, want = load_file("out.safetensors"), nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    weights = [model.state_dict() for model in models]
    for name in ("0.weight", "0.bias", "1.weight"):
        assert torch.allclose(got[name], (weights[0][name] + weights[1][name]) / 2)
    want.load_state_dict(got)
    torch.manual_seed(0)
    nn.Linear(2, 3)  # which the function makes before its batches
    update_bn(want, [torch.randn(8, 2) for _ in range(3)])
    assert torch.allclose(got["1.running_var"], want[1].running_var)
    assert got["1.num_batches_tracked"] == 3
    sys.modules.pop("polyak_user_batches", None)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("nothing", "must return a model and batches (got None)"),
        ("other", "the model must take the averaged weights and the batches"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_nothing_is_written(run, tmp_path, function, said) -> None:
    (tmp_path / "batches.py").write_text(BATCHES)
    code, printed = run("step-*.ckpt", "-o", "out.pt", "--update-bn", f"batches.py:{function}")
    assert code == 2
    assert said in printed
    assert not (tmp_path / "out.pt").exists()
    sys.modules.pop("polyak_user_batches", None)


@pytest.mark.parametrize(("output", "options"), [("out.safetensors", ()), ("out.pt", ()), ("out", ("--as", "dcp"))])
def test_a_full_disk_is_named_with_the_output_and_nothing_is_left(
    tmp_path, monkeypatch, capsys, output, options
) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        torch.save({"w": torch.full((100_000,), float(step))}, f"step-{step}.pt")
    before, limits = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code = main(["average", "step-1.pt", "step-2.pt", "-o", output, *options])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert (code, error.count("\n"), sorted(tmp_path.iterdir())) == (2, 1, before)
    assert error.startswith(f"polyak average: {output}: ")
