"""The trainer's checkpoints where files are damaged, and optimizer states with dtypes of their own."""

import inspect
import io
import zipfile
from collections import Counter
from pathlib import Path

import loops
import pytest
import torch
from torch import Tensor, nn

from polyak import EMA, CheckpointError, CheckpointSaver, PlanWarning, Trainer
from polyak.trainer import checkpoint, checksums, states

pytestmark = pytest.mark.filterwarnings("ignore:averaging never started:polyak.PlanWarning")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    trainer = loops.train(folder, ema=EMA("4ba"), optimizer="momentum")
    trainer.fit()
    trainer.save_checkpoint(folder / "x.pt")
    return (folder / "x.pt").read_bytes()


def outcome(path: Path) -> str:
    try:
        checkpoint.read(path)
    except CheckpointError as error:
        return "refused" if path.name in str(error) else f"not named: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def test_a_checkpoint_with_a_flipped_bit_anywhere_is_refused_by_name(whole, tmp_path) -> None:
    path = tmp_path / "bad.pt"
    path.write_bytes(whole)
    assert outcome(path) == "read"
    ends = {*range(300), *range(len(whole) - 300, len(whole))}
    for at in sorted(ends | set(range(0, len(whole), 29))):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        assert outcome(path) == "refused", at


def test_a_truncated_or_extended_checkpoint_is_refused_by_name(whole, tmp_path) -> None:
    path = tmp_path / "bad.pt"
    lengths = {*range(40), *range(len(whole) - 200, len(whole)), *range(0, len(whole), 97)}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        assert outcome(path) == "refused", length
    for more in (b"\0", whole[-10:], whole):
        path.write_bytes(whole + more)
        assert outcome(path) == "refused"


@pytest.mark.parametrize("change", ["zeros", "swapped blocks", "another checkpoint's end", "recompressed", "a folder"])
def test_a_damaged_checkpoint_is_refused_by_name(whole, tmp_path, change) -> None:
    path, half = tmp_path / "bad.pt", len(whole) // 2
    other = whole[:-1] + bytes([whole[-1] ^ 1])
    if change == "recompressed":
        with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
    elif change == "a folder":
        path.mkdir()
    else:
        contents = {
            "zeros": whole[:half] + bytes(4096) + whole[half + 4096 :],
            "swapped blocks": whole[:512] + whole[1024:1536] + whole[512:1024] + whole[1536:],
            "another checkpoint's end": other,
        }
        path.write_bytes(contents[change])
    assert outcome(path) == "refused"


def test_a_checkpoint_of_an_older_version_is_read_unless_its_archive_is_damaged(whole, tmp_path) -> None:
    path = tmp_path / "old.pt"
    saved = torch.load(io.BytesIO(whole), weights_only=True)
    torch.save({**saved, "polyak_checkpoint": 2}, path)
    assert outcome(path) == "read"
    content = path.read_bytes()
    weights = saved["model"]["0.weight"].numpy().tobytes()
    at = content.index(weights) + 5
    path.write_bytes(content[:at] + bytes([content[at] ^ 8]) + content[at + 1 :])
    assert outcome(path) == "refused"
    torch.save({**saved, "polyak_checkpoint": 3}, path)  # one that has lost its hash
    assert outcome(path) == "refused"


def test_torch_and_unzip_read_a_checkpoint_with_a_hash(whole, tmp_path) -> None:
    (tmp_path / "x.pt").write_bytes(whole)
    assert checksums.verify(tmp_path / "x.pt")
    plain = torch.load(tmp_path / "x.pt", weights_only=True)
    mapped = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    assert loops.differences(plain["model"], mapped["model"]) == []
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None


# Resuming with a damaged checkpoint.


def runs(folder: Path, until: str = "6ba", **options) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(4, 4, generator=generator), torch.randint(3, (4,), generator=generator)) for _ in range(20)]
    return Trainer(
        model,
        data,
        until,
        algorithms=EMA("2ba"),
        optimizers=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        loss=nn.functional.cross_entropy,
        callbacks=CheckpointSaver(folder, "2ba"),
        autoresume=True,
        progress_bar=False,
        **options,
    )


def damage(path: Path) -> None:
    if path.is_dir():
        path = max(path.iterdir(), key=lambda file: file.stat().st_size)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"?" + content[len(content) // 2 + 1 :])


def test_autoresume_skips_damaged_checkpoints_with_a_warning_and_resumes_bit_for_bit(tmp_path) -> None:
    (whole := runs(tmp_path / "whole", "8ba")).fit()
    runs(tmp_path / "parts").fit()
    damage(tmp_path / "parts" / "ep0-ba6.pt")
    (tmp_path / "parts" / "ep0-ba4.pt").write_bytes(b"")
    with pytest.warns(PlanWarning, match=r"ep0-ba6.pt .*SHA-256.*resumes from .*ep0-ba2.pt"):
        parts = runs(tmp_path / "parts", "8ba")
    assert parts.state.timestamp.batch.value == 2
    parts.fit()
    assert loops.differences(loops.bits(whole.state.model), loops.bits(parts.state.model)) == []
    assert outcome(tmp_path / "parts" / "ep0-ba6.pt") == "read"  # written again on the way


def test_autoresume_with_damaged_checkpoints_only_is_an_error_that_names_the_newest(tmp_path) -> None:
    runs(tmp_path).fit()
    for path in tmp_path.iterdir():
        damage(path)
    with pytest.raises(CheckpointError, match=r"ep0-ba6.pt"):
        runs(tmp_path)


def test_autoresume_does_not_skip_a_checkpoint_of_another_model(tmp_path) -> None:
    runs(tmp_path).fit()
    torch.save({"model": {}}, tmp_path / "ep1-ba20.pt")
    with pytest.raises(CheckpointError, match=r"ep1-ba20.pt must be a checkpoint of polyak.Trainer in format"):
        runs(tmp_path)


def test_load_path_loads_only_the_checkpoint_that_it_names(tmp_path) -> None:
    loops.train(tmp_path, ema=EMA("4ba")).fit()
    path = max((tmp_path / "checkpoints").iterdir())
    damage(path)
    with pytest.raises(CheckpointError, match=path.name):
        loops.train(tmp_path, ema=EMA("4ba"), load_path=path)


@pytest.fixture
def ungrouped():
    assert not torch.distributed.is_initialized()
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_a_folder_with_a_flipped_bit_in_any_file_is_refused_by_name(ungrouped, tmp_path) -> None:
    trainer = loops.train(tmp_path, ema=EMA("2ba"), saves=None, max_duration="8ba", parallelism="fsdp2")
    trainer.fit()
    trainer.save_checkpoint(folder := tmp_path / "saved")
    assert outcome(folder) == "read"
    seen = Counter()
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for at in range(0, len(content), max(1, len(content) // 40)):
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
            assert outcome(folder) == "refused", (path.name, at)
            seen[path.name] += 1
        path.write_bytes(content[:-1])
        assert outcome(folder) == "refused", path.name
        path.unlink()
        assert outcome(folder) == "refused", path.name
        path.write_bytes(content)
    assert len(seen) >= 3
    assert outcome(folder) == "read"


def test_autoresume_skips_a_damaged_folder(ungrouped, tmp_path) -> None:
    runs(tmp_path, parallelism="fsdp2").fit()
    damage(tmp_path / "ep0-ba6")
    with pytest.warns(PlanWarning, match=r"ep0-ba6.* SHA-256 .*resumes from .*ep0-ba4"):
        resumed = runs(tmp_path, "8ba", parallelism="fsdp2")
    assert resumed.state.timestamp.batch.value == 4


# Optimizers.


def optimizers() -> list[type[torch.optim.Optimizer]]:
    found = [getattr(torch.optim, name) for name in sorted(dir(torch.optim))]
    every = [one for one in found if inspect.isclass(one) and issubclass(one, torch.optim.Optimizer)]
    return [one for one in every if one is not torch.optim.Optimizer]


def model_for(cls: type, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    if cls is torch.optim.SparseAdam:
        return nn.Embedding(10, 4, sparse=True, dtype=dtype)
    if cls.__name__ == "Muon":  # takes matrices only
        return nn.Linear(5, 4, bias=False, dtype=dtype)
    return nn.Sequential(nn.Linear(5, 4, dtype=dtype), nn.Linear(4, 2, dtype=dtype))


def stepped(cls: type, dtype: torch.dtype, options: dict, resume_at: int) -> tuple[list[Tensor], dict]:
    """Return the weights and the state after eight steps, of a run that was stopped before one of them."""
    model = model_for(cls, dtype)
    optimizer = cls(model.parameters(), **options)
    generator = torch.Generator().manual_seed(1)
    for i in range(8):
        if i == resume_at:
            file = io.BytesIO()
            torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            model = model_for(cls, dtype)
            model.load_state_dict(saved["model"])
            optimizer = cls(model.parameters(), **options)
            states.load_optimizer(optimizer, saved["optimizer"], states.saved_dtypes(model, saved["model"]))
        if isinstance(model, nn.Embedding):
            inputs = torch.randint(10, (8,), generator=generator)
        else:
            inputs = torch.randn(8, 5, generator=generator).to(dtype)

        def closure() -> Tensor:
            optimizer.zero_grad()  # noqa: B023  called before the next turn
            loss = model(inputs).float().square().mean()  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(closure)
    return [parameter.detach() for parameter in model.parameters()], optimizer.state_dict()


def identical(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one.detach(), other.detach())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(identical, one, other))
    return one == other


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", optimizers(), ids=lambda cls: cls.__name__)
def test_every_optimizer_resumes_bit_for_bit_with_any_dtypes_in_its_state(cls, dtype) -> None:
    options = inspect.signature(cls).parameters
    flags = [{}, *({name: True} for name in ("foreach", "fused", "capturable", "amsgrad") if name in options)]
    compared = 0
    for flag in flags:
        given = {**({"lr": 1e-2} if "lr" in options else {}), **flag}
        try:
            want = stepped(cls, dtype, given, -1)
        except (RuntimeError, AssertionError):  # what torch does not do on a CPU
            continue
        assert identical(want, stepped(cls, dtype, given, 4)), given
        compared += 1
    assert compared


def test_an_optimizer_state_is_cast_for_a_model_that_has_changed_its_dtype() -> None:
    old, new = nn.Linear(3, 2), nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer = torch.optim.Adam(old.parameters())
    old(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    other = torch.optim.Adam(new.parameters())
    states.load_optimizer(other, optimizer.state_dict(), states.saved_dtypes(new, old.state_dict()))
    assert other.state[new.weight]["exp_avg"].dtype is torch.bfloat16


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_checkpoint_names_the_parameters_that_were_removed_from_their_optimizer(optimizer, tmp_path) -> None:
    """As Composer's LayerFreezing takes them out."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    data = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(3)]
    optimizers = optimizer(model.parameters(), lr=0.1, **({"momentum": 0.9} if optimizer is torch.optim.SGD else {}))
    trainer = Trainer(model, data, "2ep", optimizers=optimizers, loss=nn.functional.cross_entropy)
    trainer.fit(duration="1ep")
    frozen = {id(parameter) for parameter in model[0].parameters()}
    group = optimizers.param_groups[0]
    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in frozen]
    model[0].requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"0\.weight, 0\.bias.*leave them in their optimizer"):
        trainer.save_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()
    trainer.fit(duration="1ep")
