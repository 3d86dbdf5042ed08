"""What a newcomer types first, from the habits of other libraries too: it is right, or the error says what to write.

The tables of ``docs/first-tries.md`` are made of those of this file.
"""

import copy
import warnings
from typing import Any

import pytest
import torch
from paths import ROOT
from tables import cell, check_page, error_of, rows
from torch import nn

import polyak
from polyak import PlanWarning, PolyakError

PAGE = ROOT / "docs" / "first-tries.md"


def names() -> dict[str, Any]:
    """Return what the tries use: a model that has trained for three steps, with an average attached."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = polyak.attach(polyak.EMA("10 steps"), model, optimizer)
    inputs = torch.randn(8, 2)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    public = {
        name: getattr(polyak, name) for name in ("EMA", "attach", "export_averaged", "update_bn", "Recorder", "sweep")
    }
    given = {"model": model, "optimizer": optimizer, "ema": ema, "inputs": inputs, "copy": copy, "torch": torch}
    others = {
        "new_model": nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
        "loader": [inputs],
    }
    return {**public, **given, **others, "polyak": polyak, "nn": nn}


# What is typed, and what the error says.
ARGUMENTS: list[tuple[str, str]] = [
    ("EMA(0.999)", r"half_life must be a time \(got 0\.999\).*EMA\(decay=0\.999\).*693 steps"),
    ("EMA('0.999')", r"EMA\(decay=0\.999\)"),
    ("EMA(decay=99.9)", r"decay must be in \[0, 1\] \(got 99\.9\)"),
    ("EMA(decay='0.99')", r"decay must be a number in \[0, 1\]"),
    ("EMA(decay=0.99, smoothing=0.99)", "two names of one argument"),
    ("EMA('10 steps', decay=0.99)", r"exactly one of half_life, decay .*half_life='10 steps', decay=0\.99"),
    ("EMA(half_life=None)", "exactly one of half_life, decay .*got none"),
    ("EMA(model, decay=0.999)", r"takes no model.*got a Sequential.*polyak\.attach\(EMA\(decay=0\.999\), model, opt"),
    ("EMA(model.parameters(), 0.995)", r"no parameters \(got a generator\).*polyak\.attach"),
    ("EMA(model=model, beta=0.9999, update_every=10)", r"got model=\); the model goes to attach"),
    ("EMA(beta=0.9999)", r"got beta=\); decay=0\.999 is the share"),
    ("EMA(alpha=0.01)", r"decay=0\.999 is the share of the average that an update keeps"),
    ("EMA(momentum=0.999)", r"decay=0\.999 is the share"),
    ("EMA(decay=0.999, update_every=10)", r"update_interval='10 steps'"),
    ("EMA(decay=0.999, update_after_step=100)", r"ema_start='1000 steps' is when averaging begins"),
    ("EMA(decay=0.9999, use_ema_warmup=True)", r"polyak\.Warmup\(polyak\.Smoothing\(0\.9999\)\)"),
    ("EMA(decay=0.9999, device='cpu')", r"offload=polyak\.Offload\(\)"),
    ("EMA(decay=0.999, use_buffers=True)", "policy= decides what is averaged"),
    ("EMA(halflife='10 steps')", r"did you mean half_life=\?"),
    ("EMA(every=10)", "it takes half_life, smoothing, ema_start, update_interval, decay"),
    ("EMA('1000')", "for optimizer steps, write '1000 steps'"),
    ("EMA('1000 stesp')", "did you mean '1000 steps'"),
    ("EMA('3 epcohs')", "did you mean '3 epochs'"),
    ("EMA('1000 updates')", r"the units are steps or batches \(ba\), epochs .*got '1000 updates'"),
    ("EMA('10%')", "for a share of the run, write '0.1dur'"),
    ("EMA('ten steps')", "a time string is a number"),
    ("EMA('-5 steps')", "a number that is not negative"),
    ("EMA(1000.5)", "half_life must be a time or a whole number of steps"),
    ("EMA('10 steps', update_interval=0)", "update_interval must be above 0"),
    ("EMA('10 steps', dtype='float32')", "dtype must be a torch.dtype"),
    ("EMA('10 steps', offload='cpu')", r"offload must be an Offload, as Offload\(\)"),
    ("EMA('10 steps', dtype=torch.int8)", "dtype must be a floating-point .*got torch.int8"),
    ("EMA('10 steps', policy='all')", "policy must be a function of a Slot"),
    ("EMA('10 steps', ema_start='1 foo')", "ema_start must be a time"),
    ("EMA(profile='uniform')", r"an instance of a profile, such as HalfLife\('1000ba'\) \(got 'uniform'"),
    ("Recorder('my-run', every=100)", "interval='100 steps' is the time"),
    ("Recorder(model)", r"folder must be a path \(got a Sequential\); the model goes to attach"),
]
ATTACHING: list[tuple[str, str]] = [
    (
        "attach(model, optimizer, EMA('10 steps'))",
        r"the order must be attach\(EMA\(.*\), model, optimizer\) \(got attach",
    ),
    ("attach(model, EMA('10 steps'), optimizer)", "give the algorithm first"),
    ("attach(EMA('10 steps'), optimizer, model)", r"the order must be attach\(EMA\(.*an SGD, a Sequential"),
    ("attach(EMA('10 steps'), model)", r"attach\(EMA\(decay=0\.999\), model, optimizer\) .*missing .*'optimizer'"),
    ("attach(EMA('10 steps'))", "missing a required argument: 'model'"),
    ("attach(model, optimizer)", r"attach\(EMA\(decay=0\.999\), model, optimizer\) \(got a Sequential, an SGD\)"),
    ("attach(EMA, model, optimizer)", r"got the class EMA\); create one, with parentheses"),
    ("attach('ema', model, optimizer)", "algorithms must be an EMA, a Recorder or a list of them"),
    ("attach(0.999, model, optimizer)", "algorithms must be an EMA, a Recorder or a list of them"),
    ("attach(ema, model, optimizer)", "attached already"),
    (
        "attach([EMA('10 steps'), EMA('99 steps')], model, optimizer)",
        r"one average at a time.*each its own loop or attach",
    ),
    ("attach(EMA('10 steps'), nn.Linear, optimizer)", r"model must be .*the class Linear.*Linear\(\.\.\.\)"),
    ("attach(EMA('10 steps'), model.parameters(), optimizer)", "give the model itself, not its parameters"),
    ("attach(EMA('10 steps'), model.state_dict(), optimizer)", "give the model itself, not its state dict"),
    ("attach(EMA('10 steps'), model, torch.optim.SGD)", r"the class SGD is none; make one over .*SGD\(model\.param"),
    ("attach(EMA('10 steps'), model, scheduler)", "give the optimizer that this scheduler changes"),
    ("attach(EMA('10 steps'), model, [optimizer])", "the one that steps last in a batch"),
    (
        "attach(EMA('10 steps'), model, torch.optim.SGD(new_model.parameters(), 0.1))",
        "must step parameters of the model",
    ),
    ("attach(EMA('10 steps'), model=model, optim=optimizer)", "the optimizer is optimizer="),
    ("attach(ema=EMA('10 steps'), model=model, optimizer=optimizer)", "the EMA is algorithms="),
    ("attach(EMA(), model, optimizer, decay=0.999)", r"it goes to the EMA: attach\(EMA\(decay=0\.999\)"),
    ("attach(EMA(), model, optimizer, max_steps=1000)", "max_duration='1000 steps'"),
    ("attach(EMA(), model, optimizer, epochs=3)", "max_duration='10 epochs'"),
    ("attach(EMA(), model, optimizer, steps_per_epoch=2.5)", "steps_per_epoch must be a whole number"),
    ("attach(EMA('1e6 tokens'), model, optimizer)", "tok"),
    ("attach(EMA('2 epochs'), model, optimizer)", "the loop must count ep .*steps_per_epoch="),
    ("attach(ema.average, new_model, torch.optim.SGD(new_model.parameters(), 0.1))", "make a new EMA"),
    ("attach(EMA('10 steps'), model, optimizer, logger=print)", r"method log_metrics\(metrics, step\)"),
    ("attach(EMA('10 steps'), model, optimizer, samples_per_step=-1)", "whole number of at least 0"),
    ("attach(EMA('0.5dur'), model, optimizer)", "give max_duration, or use another unit"),
]
USING: list[tuple[str, str]] = [
    ("ema.update()", "follows the optimizer's steps by itself: delete this line"),
    ("ema.update(model)", "delete this line"),
    ("ema.update_parameters(model)", "delete this line"),
    ("ema.step()", "those of the optimizer are counted.*delete this call"),
    ("ema.ema_model", r"the averaged module is ema\.model"),
    ("ema.module", r"the averaged module is ema\.model"),
    ("ema.averaged_model", r"the averaged module is ema\.model"),
    ("ema(inputs)", r"cannot be called; call ema\.model\(\.\.\.\)"),
    ("ema.eval()", "evaluate ema.model"),
    ("ema.copy_to(model.parameters())", r"ema\.average\.get_ema_model\(other_model\)"),
    ("ema.store(model.parameters())", r"`with ema\.applied\(\):`"),
    ("ema.restore(model.parameters())", r"`with ema\.applied\(\):`"),
    ("ema.apply_shadow()", r"`with ema\.applied\(\):`"),
    ("ema.average_parameters()", r"`with ema\.applied\(\):`"),
    ("ema.shadow_params", r"ema\.model\.state_dict\(\)"),
    ("ema.parameters()", "ema.model has parameters"),
    ("ema.to('cpu')", "moves with its model"),
    ("ema.n_averaged", "ema.num_updates counts"),
    ("ema.get_decay(100)", r"ema\.average\.decay"),
    ("ema.half_life", r"ema\.average"),
    ("ema.online_model", "the model in training"),
    ("ema.save_pretrained('averaged')", r"ema\.save\(path\)"),
    ("ema.metric()", r"did you mean metrics\?"),
    ("ema.foo", "it has algorithm, applied"),
    ("ema.model = new_model", "model of what attach returned cannot be assigned"),
    ("ema.decay = 0.99", "decay of what attach returned cannot be assigned"),
    ("ema.average.half_life = '20 steps'", "half_life of an EMA must stay.*make a new EMA"),
    ("ema.model.train()(inputs)", r"must stay in eval mode.*copy\.deepcopy\(ema\.model\)\.train\(\)"),
    ("with ema.applied():\n    optimizer.step()", "must not run on averaged weights"),
    ("with ema.applied():\n    ema.applied().__enter__()", "one average at a time"),
    ("EMA(decay=0.999).update(model)", r"attach it first.*ema = polyak\.attach"),
    ("EMA(decay=0.999).model", "attach it first"),
    ("attach(EMA('10 steps', ema_start='99 steps'), model, optimizer).model", "averaging must have begun"),
    ("attach(EMA('10 steps'), model, optimizer).save('new.safetensors')", "averaging must have begun"),
    ("attach(Recorder('run', interval='10ba'), model, optimizer).model", "there must be an EMA among the algorithms"),
    ("with ema.applied(model): pass", r"must be those of ema\.applied\(\) \(got a Sequential\)"),
    ("update_bn(model)", r"must be those of update_bn\(model, loader\) \(got a Sequential\); missing .*'loader'"),
    ("update_bn(loader, model)", r"update_bn\(model, loader\) \(got a list, a Sequential\)"),
    ("sweep(ema, lambda state: 0.0)", "record the run by a Recorder first"),
    ("polyak.Ema(decay=0.999)", r"has no attribute 'Ema'; did you mean polyak\.EMA\?"),
    ("polyak.export_average", r"did you mean polyak\.export_averaged\?"),
    ("polyak.polish(model, optimizer, model, 10)", r"what attach returned, an EMA or a Record \(got a Sequential\)"),
]
SAVING: list[tuple[str, str]] = [
    ("ema.load_state_dict(model.state_dict())", r"tensors by name.*give them to model\.load_state_dict"),
    ("ema.load_state_dict(optimizer.state_dict())", r"state of an optimizer.*optimizer\.load_state_dict"),
    ("ema.load_state_dict({'model': 0, 'ema': ema.state_dict()})", r"ema\.load_state_dict\(checkpoint\['ema'\]\)"),
    ("ema.load_state_dict(ema.average.state_dict())", r"ema\.algorithm\.load_state_dict"),
    ("ema.load_state_dict('checkpoint.pt')", r"torch\.load\(path, weights_only=True\)"),
    ("ema.load_state_dict({})", "must be one that ema.state_dict"),
    ("ema.average.load_state_dict(model.state_dict())", "the state must be that of an EMA"),
    ("ema.save(None)", r"path must be a file \.safetensors or a folder \(got None\); write ema\.save"),
    ("ema.save('averaged.pt')", r"saved as safetensors.*torch\.save\(ema\.state_dict\(\)"),
    ("ema.save('a.safetensors'); ema.save('a.safetensors')", "new file .*overwrite=True"),
    ("ema.save('averaged'); ema.save('averaged')", "new or empty folder .*overwrite=True"),
    ("ema.save(model, 'averaged.safetensors')", r"must be those of ema\.save\('averaged\.safetensors'\)"),
    (
        "export_averaged(model, ema, 'averaged')",
        r"export_averaged\(ema, model, folder\) \(got a Sequential, an Attached\)",
    ),
    ("export_averaged(EMA, model, 'averaged')", r"what attach returned, then the model in training"),
    ("ema.save_checkpoint('run.pt')", r"save ema\.state_dict\(\)"),
    ("export_averaged(ema, 'averaged')", "missing a required argument: 'folder'"),
    (
        "export_averaged(ema, model, 'averaged.safetensors')",
        r"an export is a folder .*ema\.save\('averaged\.safetensors'\)",
    ),
]
REFUSED = [*ARGUMENTS, *ATTACHING, *USING, *SAVING]

# What is typed, what then holds, and what it does.
RIGHT: list[tuple[str, str, str]] = [
    ("made = EMA(decay=0.999)", "made.smoothing == made.decay == 0.999", "the average keeps 99.9 % at each step"),
    ("made = EMA('1000 steps')", "made.half_life == '1000ba'", "half of the average is replaced within 1,000 steps"),
    ("made = EMA(1000)", "made.half_life == '1000ba'", "the same: a whole number counts steps"),
    ("made = EMA('2 epochs')", "made.half_life == '2ep'", "also 'samples', 'tokens', 'seconds', or short: '2ep'"),
    ("made = EMA('10 steps', ema_start=5, update_interval=2)", "made.update_interval == '2ba'", "numbers of steps"),
    (
        "made = attach(model=new_model, optimizer=None, algorithms=[EMA('10 steps')])",
        "made.num_updates == 0",
        "arguments by name, in any order",
    ),
    ("made = repr(ema)", "made.startswith('<Average of Sequential')", "what is averaged, how, and how far it is"),
    ("made = ema.model(inputs)", "made.shape == (8, 1)", "the prediction of the averaged model"),
    (
        "ema.model(inputs.requires_grad_()).sum().backward()",
        "inputs.grad is not None",
        "gradients reach the inputs, and no weights",
    ),
    (
        "with ema.applied:\n    made = model(inputs)",
        "torch.allclose(made, ema.model(inputs), atol=1) and not ema.average.ema_weights_active",
        "the same as `with ema.applied():`",
    ),
    (
        "with ema.applied() as averaged:\n    averaged.eval()(inputs)\n    ema.save('averaged.safetensors')",
        "not ema.average.ema_weights_active",
        "the averaged weights are saved, inside the block too",
    ),
    ("ema.save('averaged.safetensors', overwrite=True)", "True", "replaces the file"),
    ("export_averaged(ema, model, 'averaged')", "True", "what attach returned, or its EMA"),
    (
        "new_model.load_state_dict(ema.model.state_dict())",
        "torch.equal(new_model[0].weight, ema.model[0].weight)",
        "a model with the averaged weights",
    ),
    ("made = copy.deepcopy(ema.model).train()", "made(inputs) is not None", "a copy that may train"),
    (
        "torch.save(ema.state_dict(), 'ema.pt'); ema.load_state_dict(torch.load('ema.pt', weights_only=True))",
        "ema.num_updates == 3",
        "resumes the average; the model and the optimizer have states of their own",
    ),
    (
        "torch.save(ema, 'ema.pt')",
        "True",
        "a pickle with the model, the optimizer and the average; larger than the state",
    ),
    ("made = ema.algorithm is ema.average", "made", "the EMA itself: its settings, and more that it can do"),
]

# What is typed, and what the warning says.
WARNED: list[tuple[str, str]] = [
    ("attach(ema.average, model, optimizer)", "was attached already: it follows the new loop"),
]


def run(code: str) -> dict[str, Any]:
    given = names()
    exec(code, given)
    return given


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("code", "says"), REFUSED, ids=[code for code, _ in REFUSED])
def test_a_first_try_that_is_wrong_is_an_error_that_says_what_to_write(code, says) -> None:
    with pytest.raises(
        (PolyakError, AttributeError, FileExistsError, RuntimeError, TypeError, ValueError), match=f"(?s){says}"
    ):
        run(code)


@pytest.mark.parametrize(("code", "holds", "_"), RIGHT, ids=[code for code, _, _ in RIGHT])
def test_a_first_try_that_is_right_does_what_it_says(code, holds, _) -> None:
    assert eval(holds, run(code))


@pytest.mark.parametrize(("code", "says"), WARNED, ids=[code for code, _ in WARNED])
def test_a_first_try_that_is_probably_a_mistake_warns(code, says) -> None:
    with pytest.warns(PlanWarning, match=says):
        run(code)


def test_the_page_has_each_first_try_with_its_answer() -> None:
    def error(code: str) -> tuple[str, str]:
        return _code(code), error_of(lambda: run(code), Exception)

    def warning(code: str) -> tuple[str, str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(code)
        return _code(code), cell(str(caught[0].message))

    def tables() -> dict[str, list[str]]:
        says = ("what is typed", "what the error says")
        return {
            "of what is right": rows(
                ("what is typed", "what it does"), [(_code(code), what) for code, _, what in RIGHT]
            ),
            "of arguments": rows(says, [error(code) for code, _ in ARGUMENTS]),
            "of attach": rows(says, [error(code) for code, _ in ATTACHING]),
            "of use": rows(says, [error(code) for code, _ in USING]),
            "of saving": rows(says, [error(code) for code, _ in SAVING]),
            "of warnings": rows(("what is typed", "what the warning says"), [warning(code) for code, _ in WARNED]),
        }

    check_page(PAGE, tables)


def _code(code: str) -> str:
    """Return the code of a try in one line, without the name of its result."""
    return code.replace("made = ", "").replace(":\n    ", ": ").replace("\n    ", "; ")
