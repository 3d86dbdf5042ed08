"""The command `polyak average`."""

import checkpoint_files
import pytest
import torch
from safetensors.torch import load_file

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
