"""Wrong command lines, and what each says: one sentence in the words of the user, and nothing is written."""

import re
import sys

import pytest
import torch
from records import record

from polyak.cli import main

EVALUATE = """
def validate(state):
    return {"loss": float(state["0.weight"].norm()), "accuracy": 0.5}

def accuracy(state):
    return 0.5

def empty(state):
    return {}

def matrix(state):
    return state["0.weight"]

def nothing(state):
    pass

number = 3
"""

# Each line after "polyak", and what is said. RUN is a record; the current folder has evaluate.py and old.safetensors.
LINES = [
    (
        "swep RUN",
        "inspect, plan, recommend, reconstruct, soup, sweep or watch (got 'swep'; did you mean sweep?)",
    ),
    ("--verison", "unrecognized arguments: --verison (did you mean --version?)"),
    ("inspect", "the following arguments are required: RECORD"),
    ("inspect RUN more", "unrecognized arguments: more"),
    ("inspect RUN --verfy", "unrecognized arguments: --verfy (did you mean --verify?)"),
    ("inspect none", "RECORD must be there (there is no none); check the path"),
    ("inspect evaluate.py", "evaluate.py cannot be read: it is neither a safetensors file nor one of torch.save"),
    ("env all", "unrecognized arguments: all"),
    ("plan evaluate.py", "MODEL must be FILE.py:FUNCTION or package.module:FUNCTION (got 'evaluate.py')"),
    ("plan evaluate.py:number", "there is no function 'number' in evaluate.py"),
    ("plan none.py:build", "there is no file none.py"),
    ("plan no.module:build", "no.module cannot be imported: ModuleNotFoundError: No module named 'no'"),
    ("plan math:sqrt", "must return a model when it is called without arguments"),
    ("convert old.safetensors", "the following arguments are required: -o"),
    ("convert none.pt -o new.safetensors", "none.pt"),
    ("convert a.pt -o new.pt", "must end in .safetensors, the only format that is written (got new.pt)"),
    ("convert a.pt -o old.safetensors", "must be a new file (old.safetensors exists); choose another, or add --force"),
    ("convert a.pt -o none/new.safetensors", "in a folder that exists (there is no folder none)"),
    ("convert a.pt -o new.safetensors --timm --key ema", "--timm must not be given with --key or --prefix"),
    ("reconstruct RUN -o new.safetensors", "one of the arguments --half-life --window"),
    ("reconstruct RUN --half-life 10ba -o .", "-o must be a file, not a folder (got .)"),
    ("reconstruct RUN --half-life 10xx -o new.safetensors", "argument --half-life: "),
    ("reconstruct RUN --half-life 1ba -o new.safetensors", "(got half-life 1ba, whose median age is"),
    ("reconstruct RUN --half-life 10ba", "are required: -o"),
    ("reconstruct RUN --half-life 10ba -o new", "must end in .safetensors, the only format that is written (got new)"),
    ("reconstruct RUN --half-life 10ba -o old.safetensors", "old.safetensors exists); choose another, or add --force"),
    ("reconstruct RUN --half-life 10ba -o RUN/new.safetensors", "must not be the input or in its folder"),
    ("reconstruct RUN --half-life 10ba --at 7ba -o new.safetensors", "near it are"),
    (
        "reconstruct RUN --half-life 10ba --dtype int8 -o new.safetensors",
        "must be float32, float16, bfloat16 or float64",
    ),
    ("reconstruct RUN --half-life 10ba --window 5ba -o new.safetensors", "not allowed with argument --half-life"),
    ("sweep RUN", "the following arguments are required: --evaluate"),
    ("sweep RUN --evaluate evaluate.py:valdate", "no function 'valdate' in evaluate.py (did you mean validate?)"),
    ("sweep RUN --evaluate evaluate.py:accuracy", "higher value of accuracy is better (higher is usually better)"),
    ("sweep RUN --evaluate evaluate.py:validate --metric accuracy", "say so with --maximize or --minimize"),
    ("sweep RUN --evaluate evaluate.py:validate --metric acc --maximize", "(got acc); use loss or accuracy"),
    ("sweep RUN --evaluate evaluate.py:validate --at 0%", "--at: a share of the record must be above 0%"),
    ("sweep RUN --evaluate evaluate.py:validate --at 7ba", "--at: a moment must be the end of a segment (got 7ba)"),
    ("sweep RUN --evaluate evaluate.py:validate --points one", "a whole number of at least 2 (got 'one')"),
    ("sweep RUN --evaluate evaluate.py:validate --profiles lawa=3ep", "(got 'lawa=3ep')"),
    ("sweep RUN --evaluate evaluate.py:validate --out RUN", "--out must not be the folder of the record"),
    ("sweep RUN --evaluate evaluate.py:validate --out evaluate.py", "--out must be a folder (evaluate.py is a file)"),
    (
        "sweep RUN --evaluate evaluate.py:validate --raw none",
        "raw weights must be a safetensors file (none: No such file",
    ),
    ("sweep RUN --evaluate evaluate.py:empty", "(got an empty dict for newest mean)"),
    ("sweep RUN --evaluate evaluate.py:matrix", "(got a tensor of shape 4 x 3 for newest mean)"),
    ("sweep RUN --evaluate evaluate.py:nothing", "(got nothing for newest mean)"),
    (
        "sweep RUN --evaluate evaluate.py:validate --update-bn evaluate.py:validate",
        "--update-bn: the function must return",
    ),
    ("demo --steps 0", "--steps: it must be a whole number of at least 1 (got '0')"),
    ("demo --half-life 5tok", "a time above 0, such as 100ba, 1.5ep, 1600sp or 0.1dur (got '5tok')"),
]

# What no sentence has: Python's own notation, a list in brackets, a temporary or hidden name, an error number.
FOREIGN = re.compile(r"PosixPath|TimeUnit|Time\(|HalfLife\(|\['|\[\"|Errno|\.tmp|<class|object at 0x|None")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lines") / "run"
    record(folder, updates=64)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    (tmp_path / "evaluate.py").write_text(EVALUATE)
    (tmp_path / "old.safetensors").write_text("mine")
    torch.save({"n_averaged": torch.tensor(3), "module.weight": torch.ones(2)}, tmp_path / "a.pt")
    yield tmp_path
    import sys

    sys.modules.pop("polyak_user_evaluate", None)


@pytest.mark.parametrize(("line", "expected"), LINES, ids=[line for line, _ in LINES])
def test_a_wrong_line_is_refused_in_one_sentence(run, here, capsys, line, expected) -> None:
    before = sorted(path.name for path in here.iterdir())
    try:
        code = main(line.replace("RUN", str(run)).split())
    except SystemExit as error:
        code = error.code
    out, said = capsys.readouterr()
    *earlier, sentence = said.splitlines()
    assert (code, out) == (2, "")
    assert expected in sentence
    assert not FOREIGN.search(sentence), sentence
    traceback = ["Traceback (most recent call last):"] if "called without arguments" in sentence else []
    assert [one for one in earlier if " of at most " not in one][:1] in ([], traceback)
    left = {path.name for path in here.iterdir()} - set(before) - {"__pycache__", "polyak-sweep"}
    assert not left
    assert (here / "old.safetensors").read_text() == "mine"
    folder = here / "polyak-sweep"
    assert not folder.exists() or {path.name for path in folder.iterdir()} <= {"sweep.jsonl"}


def test_the_table_has_as_many_lines_as_it_should() -> None:
    assert len(LINES) > 40


@pytest.mark.parametrize(
    "command", [["inspect"], ["recommend"], ["reconstruct", "--half-life", "5ba", "-o", "o.safetensors"]]
)
def test_a_record_that_is_not_there_is_named(tmp_path, monkeypatch, capsys, command) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command[0], "rnu", *command[1:]]) == 2
    assert "RECORD must be there (there is no rnu); check the path" in capsys.readouterr().err


def test_watch_of_checkpoints_says_what_evaluates_them(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2)}, "step-1.pt")
    for folder in (".", "*.pt"):
        assert main(["watch", folder, "--evaluate", "math:sqrt"]) == 2
        assert "has checkpoints); evaluate their averages by polyak sweep" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_stream_ends_no_command(tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, name, None)
    assert main(["average", "nothing.pt", "-o", "out.pt"]) == 2
    assert main(["diff", "nothing.pt", "nothing.pt"]) == 2


def test_a_path_that_begins_with_a_dash_is_named_with_how_to_write_it(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2)}, "-step-1.pt")
    with pytest.raises(SystemExit):
        main(["inspect", "-step-1.pt"])
    assert "must be written ./-step-1.pt" in capsys.readouterr().err
    assert main(["inspect", "./-step-1.pt"]) == 0


def test_a_folder_whose_name_is_no_text_is_averaged(tmp_path, monkeypatch, capsys) -> None:
    folder = tmp_path / "bad\udcff\x1b[31m"
    folder.mkdir()
    for step in (1, 2):
        torch.save({"w": torch.ones(2) * step}, tmp_path / f"step-{step}.pt")
        (tmp_path / f"step-{step}.pt").rename(folder / f"step-{step}.pt")
    monkeypatch.chdir(folder)
    assert main(["average", *map(str, sorted(folder.iterdir())), "-o", str(folder / "out.safetensors")]) == 0
    assert "\x1b" not in capsys.readouterr().out
