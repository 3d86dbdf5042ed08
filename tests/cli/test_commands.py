"""``polyak inspect``, ``reconstruct`` and ``sweep`` as users run them."""

import json
import re
import shutil
import signal
import sys

import pytest
import torch
import warm
from paths import SUPPORT
from records import build, record, validate
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from waiting import END_S, wait_until

from polyak.cli import main
from polyak.profiles import HalfLife, PowerFunction, Smoothing, Uniform, Window, named
from polyak.record import Record
from polyak.sweeping import best, sweep

OUTPUTS = ["best.safetensors", "report.html", "sweep.jsonl", "sweep.png", "sweep.svg"]

EVALUATE = """
import sys, time
from pathlib import Path

sys.path.insert(0, "{tests}")
import neighbour
from records import build, data, validate

CALLS = Path(__file__).with_name("calls")


def counted(state):
    with CALLS.open("a") as file:
        file.write("x")
    return validate(state)


def held(state):  # after five calls, until the test has stopped the process
    while CALLS.stat().st_size == 5 and not CALLS.with_name("stopped").exists():
        time.sleep(0.01)
    return counted(state)


def failing(state):
    if CALLS.stat().st_size == 3:
        raise ZeroDivisionError("too\\nbad")
    return counted(state)


def batches():
    return build(), data(batches=6)


def no_batches():
    return build()


number = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands") / "run"
    save_file(record(folder).state_dict(), folder.parent / "raw.safetensors")
    return folder


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "user code" / "evaluate.py"
    path.parent.mkdir()
    path.write_text(EVALUATE.format(tests=SUPPORT.as_posix()))
    (path.parent / "neighbour.py").write_text("")
    (path.parent / "calls").write_text("")
    yield path
    sys.modules.pop("polyak_user_evaluate", None)
    sys.modules.pop("neighbour", None)


def calls(script):
    return (script.parent / "calls").stat().st_size


def undated(folder):
    """Return the contents of files without the minute in which a report was written."""
    return {path.name: re.sub(rb"[\d-]{10} \d\d:\d\d UTC", b"", path.read_bytes()) for path in folder.iterdir()}


def refused(capsys, command, *arguments, lines=1):
    """Return the error for arguments; check that it is one line, after those of the progress."""
    try:
        code = main([command, *map(str, arguments)])
    except SystemExit as error:
        code = error.code
    out, said = capsys.readouterr()
    assert code == 2
    assert out == ""
    errors = [line for line in said.splitlines() if " of at most " not in line]
    assert len(errors) == lines, said
    assert errors[-1].startswith(f"polyak {command}: ")
    return "\n".join(errors)


def run(capsys, command, *arguments):
    assert main([command, *map(str, arguments)]) == 0
    return capsys.readouterr()


@pytest.mark.slow
def test_inspect_prints_the_contents_of_a_record(folder, capsys) -> None:
    out, said = run(capsys, "inspect", folder, "--verify")
    assert said == ""
    for words in (
        "0 to 256",
        "0 to 2,048",
        "0 to 5.12",
        "2 updates, 2ba",
        "all files match their hashes",
        "8 averaged, 1 with",
        "ep2 (../ep2.pt)",
    ):
        assert words in out, words


def test_inspect_prints_json(folder, capsys) -> None:
    out, _ = run(capsys, "inspect", folder, "--json")
    plain = json.loads(out)
    stretches = Record(folder).stretches
    assert plain["from"] == {"updates": 0, "ep": 0.0, "ba": 0.0, "sp": 0.0, "sec": 0.0}
    assert {unit: plain["to"][unit] for unit in ("updates", "ba", "sp")} == {"updates": 256, "ba": 256, "sp": 2048}
    assert plain["finest"] == {"updates": 2, "ba": 2}
    assert plain["stretches"] == len(stretches) == sum(level["stretches"] for level in plain["levels"])
    assert plain["size_bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert plain["tensors"]["averaged_numbers"] == sum(
        tensor.numel() for tensor in build().state_dict().values() if tensor.is_floating_point()
    )
    assert plain["verified"] is False


def test_inspect_accepts_a_record_without_a_segment(tmp_path, capsys) -> None:
    record(tmp_path / "run", updates=1)
    out, _ = run(capsys, "inspect", tmp_path / "run")
    assert "No segment has ended yet" in out
    out, _ = run(capsys, "inspect", tmp_path / "run", "--json")
    assert json.loads(out)["finest"] is None


def test_damaged_and_missing_files_give_a_one_line_error(folder, tmp_path, capsys) -> None:
    shutil.copytree(folder, tmp_path / "run")
    path = next((tmp_path / "run").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    run(capsys, "inspect", tmp_path / "run")
    assert "must have the SHA-256 in the manifest" in refused(capsys, "inspect", tmp_path / "run", "--verify")
    path.unlink()
    arguments = (tmp_path / "run", "--half-life", "9ba", "-o", tmp_path / "f.safetensors")
    assert "cannot be opened" in refused(capsys, "reconstruct", *arguments)


@pytest.mark.parametrize(
    "command", [["inspect"], ["reconstruct", "--power", "0.1", "-o", "f"], ["sweep", "--evaluate", "m:f"]]
)
def test_a_missing_record_gives_a_one_line_error(tmp_path, capsys, command) -> None:
    name, *rest = command
    assert "RECORD must be there" in refused(capsys, name, tmp_path / "none", *rest)


@pytest.mark.parametrize(
    ("arguments", "profile", "at"),
    [
        (["--half-life", "10ba"], HalfLife("10ba"), None),
        (["--half-life", "0.5ep", "--unbiased"], HalfLife("0.5ep", unbiased=True), None),
        (["--window", "64ba"], Window("64ba"), None),
        (["--uniform-from", "0ba"], Uniform("0ba"), None),
        (["--power", "0.1"], PowerFunction(sigma_rel=0.1), None),
        (["--smoothing", ".9"], Smoothing(0.9), None),
        (["--half-life", "10ba", "--at", "224ba"], HalfLife("10ba"), "224ba"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::polyak.errors.PlanWarning")
def test_reconstruct_writes_the_same_average_as_the_library(folder, tmp_path, capsys, arguments, profile, at) -> None:
    out, _ = run(capsys, "reconstruct", folder, *arguments, "-o", tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    averaged = Record(folder).average(profile, at)
    assert saved.keys() == averaged.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in averaged.items())
    build().load_state_dict(saved)
    assert named(profile).describe() in out
    assert f"{at or '256ba'}" in out
    assert "estimate" in out
    assert "9 tensors" in out
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_reconstruct_casts_the_averaged_tensors(folder, tmp_path, capsys) -> None:
    run(capsys, "reconstruct", folder, "--half-life", "10ba", "--dtype", "bfloat16", "-o", tmp_path / "f.safetensors")
    saved = load_file(tmp_path / "f.safetensors")
    assert saved["0.weight"].dtype is torch.bfloat16
    assert saved["1.num_batches_tracked"].dtype is torch.int64
    assert int(saved["1.num_batches_tracked"]) == 256


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--half-life", "1ba"], "a profile must not be finer than the record"),
        (["--half-life", "many"], "argument --half-life: the half-life must be a time"),
        (["--half-life", "10ba", "--at", "255ba"], "near it are"),
        (["--half-life", "10tok"], "needs a clock in tok"),
        (["--window", "0ba"], "the window must be above 0"),
        (["--power", "0.5"], "sigma_rel must be above 0 and at most"),
        (["--power", "x"], "argument --power: it must be a number (got 'x')"),
        (["--smoothing", "1.5"], "smoothing must be in [0, 1]"),
        (["--window", "64ba", "--unbiased"], "--unbiased needs a profile with an unbiased variant, --half-life"),
        (["--window", "64ba", "--power", "0.1"], "not allowed with"),
        ([], "one of the arguments --half-life --window --uniform-from --power --smoothing"),
        (["--half-life", "10ba", "--dtype", "int8"], "it must be float32, float16, bfloat16 or float64 (got 'int8')"),
    ],
    ids=str,
)
def test_bad_profiles_and_moments_give_a_one_line_error(folder, tmp_path, capsys, arguments, expected) -> None:
    assert expected in refused(capsys, "reconstruct", folder, *arguments, "-o", tmp_path / "f.safetensors")
    assert not list(tmp_path.iterdir())


def test_bad_outputs_give_a_one_line_error(folder, tmp_path, capsys) -> None:
    for output, expected in (
        (tmp_path, "must be a file, not a folder"),
        (folder / "f.safetensors", "must not be the input or in its folder"),
        (tmp_path / "none" / "f.safetensors", "there is no folder"),
        (tmp_path / "f.pt", "must end in .safetensors"),
    ):
        assert expected in refused(capsys, "reconstruct", folder, "--half-life", "10ba", "-o", output)
    assert "are required: -o;" in refused(capsys, "reconstruct", folder, "--half-life", "10ba")


def test_an_average_with_a_large_error_gives_one_note(folder, tmp_path, capsys) -> None:
    _, said = run(capsys, "reconstruct", folder, "--half-life", "200ba", "-o", tmp_path / "f.safetensors")
    assert said.count("\n") == said.count("polyak reconstruct: note: ") == 1
    assert "weights from before the record" in said


@pytest.mark.slow
def test_sweep_writes_all_files_that_its_help_names(folder, script, tmp_path, capsys) -> None:
    raw = folder.parent / "raw.safetensors"
    arguments = [folder, "--evaluate", f"{script}:counted", "--points", 4, "--refine", 2, "--raw", raw, "--online", raw]
    out, said = run(capsys, "sweep", *arguments, "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == OUTPUTS
    results = sweep(folder, validate, points=4, refine=2)
    chosen = best(results)
    assert f"Best: {chosen.name}" in out
    assert f"{chosen.name} (best)" in out
    assert "raw weights" in out
    assert "online EMA" in out
    assert "the result is biased" in out
    assert "note" not in said
    saved = load_file(tmp_path / "out" / "best.safetensors")
    averaged = Record(folder).average(chosen.profile)
    assert all(torch.equal(saved[name], tensor) for name, tensor in averaged.items())
    lines = [json.loads(line) for line in (tmp_path / "out" / "sweep.jsonl").read_text().splitlines()]
    assert {line["name"]: line["metrics"] for line in lines if line["name"] != "raw"} == {
        result.name: result.metrics for result in results
    }
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    before = undated(tmp_path / "out")
    count = calls(script)
    run(capsys, "sweep", *arguments, "--out", tmp_path / "out")
    assert calls(script) == count == len(results) + 1
    assert undated(tmp_path / "out") == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_sweep_resumes_without_evaluating_again(folder, script, tmp_path, number) -> None:
    arguments = ["--evaluate", f"{script}:held", "--points", 12, "--out", tmp_path / "out"]
    command = ["-m", "polyak", "sweep", folder, *arguments]
    kept = tmp_path / "out" / "sweep.jsonl"
    process = warm.Process(*command)
    wait_until(lambda: calls(script) == 5 or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    _, said = process.communicate(timeout=END_S)
    (script.parent / "stopped").touch()
    if number is signal.SIGINT:
        assert process.returncode == 130
        assert said.splitlines()[-1] == "polyak sweep: interrupted; run the same command again to resume"
        assert "Traceback" not in said
    measured, before = kept.read_bytes().count(b"\n"), calls(script)
    assert before <= measured + 1
    assert warm.run(*command).returncode == 0
    total = kept.read_bytes().count(b"\n")
    assert total > 12
    assert calls(script) == before + total - measured
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == OUTPUTS


def test_a_failing_function_gives_its_traceback_and_earlier_results_are_kept(folder, script, tmp_path, capsys) -> None:
    arguments = (folder, "--evaluate", f"{script}:failing", "--points", 4, "--out", tmp_path / "out")
    said = refused(capsys, "sweep", *arguments, lines=6)
    assert said.startswith(f'Traceback (most recent call last):\n  File "{script}", line 26, in failing\n')
    assert "evaluating half-life 50.8ba failed: ZeroDivisionError: too bad (" in said
    assert f"{script}, line 26" in said
    assert (tmp_path / "out" / "sweep.jsonl").read_bytes().count(b"\n") == 3
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sweep.jsonl"]
    with (script.parent / "calls").open("a") as file:
        file.write("x")
    run(capsys, "sweep", *arguments)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("evaluate.py", "must be FILE.py:FUNCTION or package.module:FUNCTION"),
        ("{script}", "must be FILE.py:FUNCTION"),
        ("none.py:f", "there is no file none.py"),
        ("{script}:none", "there is no function 'none' in"),
        ("{script}:number", "there is no function 'number' in"),
        ("no.module:f", "no.module cannot be imported: ModuleNotFoundError"),
        ("json:nothing", "there is no function 'nothing' in json; it has"),
    ],
)
def test_functions_that_cannot_be_imported_give_a_one_line_error(folder, script, capsys, spec, expected) -> None:
    said = refused(capsys, "sweep", folder, "--evaluate", spec.format(script=script))
    assert expected in said
    assert "--evaluate" in said


def test_the_error_of_a_file_that_cannot_be_imported_comes_with_its_traceback(folder, tmp_path, capsys) -> None:
    (tmp_path / "broken.py").write_text("raise ValueError('broken')")
    said = refused(capsys, "sweep", folder, "--evaluate", f"{tmp_path}/broken.py:f", lines=5)
    assert said.startswith(f'Traceback (most recent call last):\n  File "{tmp_path}/broken.py", line 1, in <module>\n')
    assert "cannot be imported: ValueError: broken" in said


def test_sweep_imports_a_function_from_a_module(folder, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users_package").mkdir()
    (tmp_path / "users_package" / "judge.py").write_text("def size(state): return state['0.weight'].norm()")
    run(capsys, "sweep", folder, "--evaluate", "users_package.judge:size", "--points", 2, "--refine", 0)
    assert sorted(path.name for path in (tmp_path / "polyak-sweep").iterdir()) == OUTPUTS


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--half-lives", "10ba,many"], "a time string is a number"),
        (["--half-lives", "1ba"], "a profile must not be finer than the record"),
        (["--profiles", "lawa=10ep"], "it must be profiles such as window=10ep,power=0.1 (got 'lawa=10ep')"),
        (["--profiles", "window"], "(got 'window')"),
        (["--half-lives", "10ba", "--profiles", "power=.1"], "not allowed with"),
        (["--points", "1"], "a whole number of at least 2"),
        (["--refine", "-1"], "a whole number of at least 0"),
        (["--minimize", "--maximize"], "not allowed with"),
        (["--raw", "none"], "the raw weights must be a safetensors file"),
        (["--metric", "acc"], "whether a lower or a higher acc is better (higher is usually better)"),
        (["--metric", "size"], "whether a lower or a higher size is better (its name does not say it)"),
        (["--metric", "acc", "--maximize"], "(got acc); use loss or accuracy"),
        (["--at", "255ba"], "--at: a moment must be the end of a segment (got 255ba); near it are"),
        (["--at", "120%"], "--at: a share of the record must be above 0% and at most 100% (got '120%')"),
        (["--at", "soon"], "--at: a moment must be a share of the record such as 50%, or a time (got 'soon')"),
    ],
    ids=str,
)
def test_bad_arguments_of_sweep_give_a_one_line_error(folder, script, tmp_path, capsys, arguments, expected) -> None:
    joined = [f"{arguments[0]}={arguments[1]}", *arguments[2:]] if arguments[0] == "--refine" else arguments
    said = refused(capsys, "sweep", folder, "--evaluate", f"{script}:counted", "--out", tmp_path / "out", *joined)
    assert expected in said


def test_sweep_refuses_to_write_into_the_record(folder, script, capsys) -> None:
    said = refused(capsys, "sweep", folder, "--evaluate", f"{script}:counted", "--out", folder)
    assert "must not be the folder of the record" in said


def test_sweep_accepts_half_lives_profiles_and_maximize(folder, script, tmp_path, capsys) -> None:
    arguments = (folder, "--evaluate", f"{script}:counted", "--refine", 0)
    out, _ = run(capsys, "sweep", *arguments, "--half-lives", "4ba,0.5ep", "--out", tmp_path / "a")
    assert "half-life 4ba" in out
    assert "half-life 0.5ep" in out
    chosen = ("--metric", "accuracy", "--maximize", "--out", tmp_path / "b")
    out, _ = run(capsys, "sweep", *arguments, "--profiles", "window=64ba,power=0.1,half-life=20ba", *chosen)
    assert all(name in out for name in ("window 64ba", "power function 0.1", "half-life 20ba", "with accuracy 0."))


def test_sweep_recomputes_batchnorm_statistics_of_the_files_that_it_writes(folder, script, tmp_path, capsys) -> None:
    arguments = (folder, "--evaluate", f"{script}:counted", "--half-lives", "16ba", "--refine", 0)
    run(capsys, "sweep", *arguments, "--update-bn", f"{script}:batches", "--out", tmp_path / "out")
    with safe_open(tmp_path / "out" / "best.safetensors", "pt") as file:
        assert file.metadata()["polyak.batchnorm"] == "recomputed"
        assert int(file.get_tensor("1.num_batches_tracked")) == 6
    assert "BatchNorm" in (tmp_path / "out" / "report.html").read_text()
    said = refused(capsys, "sweep", *arguments, "--update-bn", f"{script}:no_batches")
    assert "must return a model and batches" in said


@pytest.mark.parametrize("module", ["matplotlib", "plotly"])
def test_sweep_writes_what_it_can_without_the_packages_for_pictures(
    folder, script, tmp_path, capsys, monkeypatch, module
) -> None:
    for name in ("rich", module):
        monkeypatch.setitem(sys.modules, name, None)
    out, _ = run(
        capsys,
        "sweep",
        folder,
        "--evaluate",
        f"{script}:counted",
        "--points",
        2,
        "--refine",
        0,
        "--out",
        tmp_path / "out",
    )
    without = {"plotly": {"report.html"}, "matplotlib": {"sweep.png", "sweep.svg"}}[module]
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(OUTPUTS) - without
    assert "pip install 'polyak[report]'" in " ".join(out.split())
    assert not [name for name in without if name in out]


@pytest.mark.parametrize(
    ("command", "expected"),
    [("inspect", "--verify"), ("reconstruct", "from_pretrained"), ("sweep", "is biased")],
)
def test_help_names_the_options_and_the_commands(capsys, command, expected) -> None:
    for arguments in ([command, "--help"], ["--help"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        assert (expected if len(arguments) == 2 else command) in capsys.readouterr().out
