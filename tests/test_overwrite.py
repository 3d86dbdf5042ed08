"""All that writes to a path that users choose keeps what is there, unless they ask to replace it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from records import build, record, validate
from torch import nn

from polyak import EMA, ExistsError, PolyakError, Record, Uniform, attach, export_averaged
from polyak.checkpoints import average_checkpoints
from polyak.sweeping import export, sweep

pytestmark = pytest.mark.filterwarnings("ignore:the average that is .* mostly its first weights")


def saved(path: Path, *, whole_folder: bool = False) -> Callable[..., object]:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = attach(EMA("2 steps"), model, optimizer)
    for _ in range(8):
        model(torch.ones(4, 2)).square().mean().backward()
        optimizer.step()
    if whole_folder:
        return lambda **options: export_averaged(ema, model, path, **options)
    return lambda **options: ema.save(path, **options)


def recorded(folder: Path) -> Record:
    record(folder, updates=32)
    return Record(folder)


def averaged(folder: Path, output: Path) -> Callable[..., object]:
    paths = [folder / f"step-{step}.pt" for step in (1, 2)]
    for path in paths:
        torch.save(build().state_dict(), path)
    return lambda **options: average_checkpoints(paths, output, **options)


def swept(folder: Path, output: Path) -> Callable[..., object]:
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    recorded(folder / "run")
    result = sweep(folder / "run", validate, points=2, refine=0)
    return lambda **options: result.report(output, **options)


WRITERS: dict[str, tuple[str, Callable[[Path, Path], Callable[..., object]]]] = {
    "save": ("averaged.safetensors", lambda folder, path: saved(path)),
    "save to a folder": ("averaged", lambda folder, path: saved(path)),
    "export_averaged": ("averaged", lambda folder, path: saved(path, whole_folder=True)),
    "Record.export": (
        "averaged.safetensors",
        lambda folder, path: partial(recorded(folder / "run").export, Uniform(), path),
    ),
    "sweeping.export": (
        "averaged.safetensors",
        lambda folder, path: partial(export, recorded(folder / "run"), Uniform(), path),
    ),
    "average_checkpoints": ("averaged.safetensors", averaged),
    "average_checkpoints, torch": ("averaged.pt", averaged),
    "SweepResult.report": ("report", swept),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_what_exists_is_replaced_only_with_overwrite(tmp_path: Path, name: str) -> None:
    file, make = WRITERS[name]
    path = tmp_path / file
    write = make(tmp_path, path)
    write()
    main = next(iter(sorted(path.iterdir()))) if path.is_dir() else path
    main.write_bytes(main.read_bytes() + b" ")  # to be seen if it is replaced
    before = main.read_bytes()
    with pytest.raises(ExistsError, match="overwrite=True") as caught:
        write()
    assert isinstance(caught.value, PolyakError)
    assert isinstance(caught.value, FileExistsError)
    assert main.read_bytes() == before
    write(overwrite=True)
    assert main.read_bytes() != before
    assert not [found for found in tmp_path.rglob("*.tmp") if found.name != "lock"]


def test_an_average_of_checkpoints_replaces_no_folder_with_files(tmp_path: Path) -> None:
    (tmp_path / "averaged.pt").mkdir()
    (tmp_path / "averaged.pt" / "notes").write_text("mine")
    with pytest.raises(ExistsError, match="a folder that has files"):
        averaged(tmp_path, tmp_path / "averaged.pt")(overwrite=True)
    assert (tmp_path / "averaged.pt" / "notes").read_text() == "mine"
