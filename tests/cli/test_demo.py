"""``polyak demo`` as users run it: as a process, interrupted, killed, run again."""

import json
import os
import random
import re
import signal
import statistics
import sys
import time

import pytest
import torch
import warm
from safetensors import safe_open
from safetensors.torch import load_file
from waiting import END_S, wait_until

import polyak
from polyak.cli import main
from polyak.cli.folder import RunFolder
from polyak.cli.recipe import Digits, build_model, load_data, measure
from polyak.report.series import read_curves

pytestmark = pytest.mark.slow  # trains the demo many times

STEPS = 410  # not the end of an epoch, a checkpoint interval or a half-life
OUTPUTS = ("averaged.safetensors", "metrics.jsonl", "demo.png", "demo.svg", "raw.safetensors", "demo.json")
FOLDERS = ("checkpoints", "record", "sweep")


HELD = """
import sys, time
from torch.optim.optimizer import register_optimizer_step_pre_hook
from polyak.cli import main

def hold(*_):
    hold.steps += 1
    while hold.steps == 245:
        time.sleep(0.01)

hold.steps = 0
register_optimizer_step_pre_hook(hold)
sys.exit(main(sys.argv[1:]))
"""


def start(out, *arguments, program=("-m", "polyak")):
    return warm.Process(*program, "demo", "--out", out, *arguments, env=os.environ | {"COLUMNS": "200"})


@pytest.fixture(scope="module", autouse=True)
def _threads():
    """Restore the number of torch's threads, which the command sets to 1."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def demo(out, *arguments):
    """Run the demo in this process, where everything is imported."""
    assert main(["demo", "--out", str(out), *map(str, arguments)]) == 0


def demo_process(out, *arguments):
    """Run the demo as a process; return its stdout and stderr."""
    process = start(out, *arguments)
    printed, said = process.communicate(timeout=END_S)
    assert process.returncode == 0, said
    return printed, said


def stop(out, *arguments, number=signal.SIGKILL, once):
    """Run the demo as a process, and send it a signal when a condition holds."""
    process = start(out, *arguments, program=("-c", HELD))
    wait_until(lambda: once() or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    _, said = process.communicate(timeout=END_S)
    return process.returncode, said


def lines(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def contents(out):
    return {name: (out / name).read_bytes() for name in OUTPUTS}


def refused(capsys, *arguments):
    """Return the error for arguments; check that it is one line."""
    try:
        code = main(["demo", *map(str, arguments)])
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2
    assert said.count("\n") == 1
    assert said.endswith("\n")
    assert said.startswith("polyak demo: ")
    return said


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The demo without arguments."""
    out = tmp_path_factory.mktemp("full") / "a" / "b"
    return out, *demo_process(out)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    demo(out, "--steps", STEPS)
    return contents(out)


def test_the_averaged_weights_are_better_than_the_raw_weights(full) -> None:
    out, printed, _ = full
    curves = read_curves(out / "metrics.jsonl")
    # The curve of the raw weights is jagged, and its end depends on the rounding of the processor.
    late = slice(-30, None)
    raw, averaged = curves["eval_raw/accuracy"].values[late], curves["eval/accuracy"].values[late]
    assert min(averaged) > statistics.mean(raw) + 0.01
    assert max(averaged) - min(averaged) < max(raw) - min(raw)
    assert curves["eval/loss"].last < statistics.mean(curves["eval_raw/loss"].values[late])
    assert "Averaging helps here because" in printed
    assert f"{curves['eval/accuracy'].last:.1%}" in printed
    assert f"{curves['eval_raw/accuracy'].last:.1%}" in printed


def test_the_demo_writes_all_files_that_its_help_names(full) -> None:
    out, printed, said = full
    assert sorted(p.name for p in out.iterdir()) == sorted([*OUTPUTS, *FOLDERS])
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["ep14-ba900.pt", "ep15-ba1000.pt"]
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert b"</svg>" in (out / "demo.svg").read_bytes()
    curves = read_curves(out / "metrics.jsonl")
    assert curves["eval/accuracy"].batches == curves["train/loss"].batches == tuple(range(10, 1001, 10))
    assert all(name in printed for name in OUTPUTS[:-2])
    assert "note" not in said


def test_the_averaged_weights_load_into_a_plain_model_and_equal_those_of_the_checkpoint(full) -> None:
    out, _, _ = full
    saved = load_file(out / "averaged.safetensors")
    model = build_model()
    model.load_state_dict(saved)
    checkpoint = torch.load(out / "checkpoints" / "ep15-ba1000.pt", weights_only=True)
    assert checkpoint["model_holds"].startswith("averaged")
    assert saved.keys() == checkpoint["model"].keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in checkpoint["model"].items())
    with safe_open(out / "averaged.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["profile"] == "HalfLife(span=Time(100, 'ba'), unbiased=False)"
    assert (metadata["steps"], metadata["seed"]) == ("1000", "0")
    assert polyak.__version__ in metadata["made_by"]


def test_the_demo_prints_a_complete_run_again_and_changes_no_file(full) -> None:
    out, printed, _ = full
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again, said = demo_process(out)
    assert said == ""
    assert again.split("weights", 1)[1] == printed.split("weights", 1)[1]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_half_life_is_chosen_from_the_record_on_separate_validation_digits(full) -> None:
    out, printed, _ = full
    digits = Digits()
    train, validation, test = load_data(digits)
    assert [len(part) for part in (train, validation, test)] == [1000, 297, 500]
    state = load_file(out / "sweep" / "best.safetensors")
    with safe_open(out / "sweep" / "best.safetensors", "pt") as file:
        span = re.search(r"Time\(([\d.]+), 'ba'\)", file.metadata()["polyak.profile"])[1]
    assert f"{span}ba is best on validation" in printed
    results = [json.loads(line) for line in (out / "sweep" / "sweep.jsonl").read_text().splitlines()]
    assert (
        min(one["metrics"]["loss"] for one in results if one["name"].startswith("half"))
        == measure(state, validation)["loss"]
    )
    assert f"{measure(state, test)['loss']:.3f}" in printed
    assert "metric-chart" in (out / "sweep" / "report.html").read_text()


def test_the_demo_writes_missing_outputs_again(full) -> None:
    before = contents(full[0])
    for name in ("averaged.safetensors", "demo.svg"):
        (full[0] / name).unlink()
    demo(full[0])
    assert contents(full[0]) == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_resumes_and_ends_as_an_uninterrupted_one(uninterrupted, tmp_path, capsys, number) -> None:
    # Three lines every ten steps: after the second checkpoint.
    code, said = stop(tmp_path, "--steps", STEPS, number=number, once=lambda: lines(tmp_path) > 70)
    if number is signal.SIGINT:
        assert code == 130
        assert said.splitlines()[-1] == "polyak demo: interrupted; run the same command again to resume"
        assert "Traceback" not in said
    else:
        assert code == -signal.SIGKILL
    assert not (tmp_path / "averaged.safetensors").exists()
    demo(tmp_path, "--steps", STEPS)
    assert re.search("Resuming after [234]00 of 410 steps", capsys.readouterr().out)
    assert contents(tmp_path) == uninterrupted


def test_a_run_that_grows_ends_as_one_that_was_that_long_from_the_start(uninterrupted, tmp_path) -> None:
    demo(tmp_path, "--steps", STEPS - 135)
    demo(tmp_path, "--steps", STEPS)
    assert contents(tmp_path) == uninterrupted


def test_a_run_that_is_killed_repeatedly_ends_as_an_uninterrupted_one(uninterrupted, tmp_path) -> None:
    generator = random.Random(0)
    for _ in range(6):
        began = time.monotonic()
        delay = generator.uniform(0.3, 2.5)
        process = start(tmp_path, "--steps", STEPS)
        while process.poll() is None and time.monotonic() < began + delay:
            time.sleep(0.001)
        process.kill()
        process.communicate()
    demo(tmp_path, "--steps", STEPS)
    assert contents(tmp_path) == uninterrupted
    assert not [path.name for path in tmp_path.rglob(".*")]


def test_a_half_life_longer_than_the_run_gives_one_note(tmp_path, capsys) -> None:
    demo(tmp_path, "--steps", 20, "--half-life", "1000ba")
    printed, said = capsys.readouterr()
    assert "Averaging does not improve both metrics" in printed
    notes = [line for line in said.splitlines() if "note:" in line]
    assert len(notes) == 1
    assert notes[0].startswith("polyak demo: note: the first weights will still be 98.7% of the average")


@pytest.mark.parametrize("half_life", ["0.5ep", "300sp", "0.2dur"])
def test_the_demo_accepts_every_unit_of_half_life(tmp_path, half_life) -> None:
    demo(tmp_path, "--steps", 40, "--half-life", half_life)
    assert half_life in (tmp_path / "demo.json").read_text()


def test_the_error_for_other_arguments_names_what_differs(full, capsys) -> None:
    out, _, _ = full
    before = contents(out)
    said = refused(capsys, "--out", out, "--seed", 1, "--half-life", "50ba")
    assert "has --seed 0 --half-life 100ba; this run has --seed 1 --half-life 50ba" in said
    assert "another --out" in said
    assert "--steps 1000; this run has --steps 500" in refused(capsys, "--out", out, "--steps", 500)
    assert contents(out) == before


def test_another_spelling_of_the_half_life_is_the_same(full) -> None:
    demo(full[0], "--half-life", "1e2BA")


def test_a_run_whose_half_life_is_a_fraction_of_it_cannot_grow(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin({"--half-life": "0.1dur", "--steps": 100}, "", may_grow=None)
    with pytest.raises(ValueError, match="has --steps 100; this run has --steps 200"):
        folder.begin({"--half-life": "0.1dur", "--steps": 200}, "", may_grow=None)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--steps", "0"], "--steps: it must be a whole number of at least 1 (got '0')"),
        (["--steps", "many"], "--steps: it must be a whole number of at least 1 (got 'many')"),
        (["--seed", "-1"], "--seed: it must be a whole number from 0 to 4294967295 (got '-1')"),
        *(
            (["--half-life", bad], f"(got {bad!r})")
            for bad in ("100", "", "0ba", "infba", "nanba", "5tok", "-1ba", "1h")
        ),
        (["--half-life", "x"], "it must be a time above 0, such as 100ba, 1.5ep, 1600sp or 0.1dur"),
        (["--haf-life", "1ba"], "unrecognized arguments: --haf-life=1ba (did you mean --half-life?); see polyak demo"),
        (["--step", "5"], "unrecognized arguments: --step=5"),
    ],
)
def test_bad_arguments_give_a_one_line_error(capsys, tmp_path, monkeypatch, arguments, expected) -> None:
    monkeypatch.chdir(tmp_path)
    # argparse reads a value that begins with a dash as an option unless it is joined.
    joined = f"{arguments[0]}={arguments[1]}"
    assert expected in refused(capsys, joined)
    assert not list(tmp_path.iterdir())


def test_a_bad_out_gives_a_one_line_error(capsys, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "metrics.jsonl").write_text("mine too")
    assert "is a file" in refused(capsys, "--out", tmp_path / "file")
    assert "a folder that can be made" in refused(capsys, "--out", tmp_path / "file" / "below")
    assert "has file, metrics.jsonl); choose another" in refused(capsys, "--out", tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "mine too"


def test_a_changed_file_of_arguments_gives_a_one_line_error(capsys, tmp_path) -> None:
    (tmp_path / "demo.json").write_text("{")
    assert "demo.json must be as polyak demo wrote it" in refused(capsys, "--out", tmp_path)


def test_changed_metrics_give_a_one_line_error(full, capsys) -> None:
    path = full[0] / "metrics.jsonl"
    before = path.read_bytes()
    try:
        path.write_bytes(before[: len(before) // 2])
        assert "metrics.jsonl must be a JSON object" in refused(capsys, "--out", full[0])
        path.write_bytes(b"\n".join(before.splitlines()[:10]))
        assert "metrics.jsonl must reach to 1000 steps" in refused(capsys, "--out", full[0])
        path.unlink()
        assert main(["demo", "--out", str(full[0])]) == 2
        assert "metrics.jsonl must reach to 1000 steps" in capsys.readouterr().err.splitlines()[-1]
    finally:
        path.write_bytes(before)


def test_a_second_run_in_the_same_folder_gives_a_one_line_error(capsys, tmp_path) -> None:
    with RunFolder(tmp_path).locked():
        assert "another polyak demo is running" in refused(capsys, "--out", tmp_path)


@pytest.mark.parametrize("module", ["sklearn", "rich", "matplotlib", "plotly"])
def test_a_missing_extra_gives_a_one_line_error(capsys, tmp_path, monkeypatch, module) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'polyak[cli]'" in refused(capsys, "--out", tmp_path / "out")


def test_an_unknown_option_without_a_command_gives_a_one_line_error(capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--verison"])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said == "polyak: unrecognized arguments: --verison (did you mean --version?); see polyak --help\n"


def test_polyak_without_arguments_lists_the_commands(capsys) -> None:
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out


def test_help_and_version_fit_into_80_columns(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for arguments, expected in (
        (["--version"], f"polyak {polyak.__version__}"),
        (["--help"], "polyak demo"),
        (["demo", "--help"], "averaged.safetensors"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        printed = capsys.readouterr().out
        assert expected in printed
        assert max(map(len, printed.splitlines())) <= 80


def test_the_demo_saves_its_arguments_as_json(full) -> None:
    kept = json.loads((full[0] / "demo.json").read_text())
    assert kept["arguments"] == {"--seed": 0, "--half-life": "100ba", "--steps": 1000}
    assert kept["complete"] is True
