"""Errors for names of other libraries, which say what polyak has instead, and for calls that do not fit a signature."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, ParamSpec, TypeVar

from polyak.errors import AbsentError, CallError

P = ParamSpec("P")
R = TypeVar("R")

_BY_ITSELF = "the average follows the optimizer's steps by itself: delete this line"
_APPLIED = "swap the average in for a block: `with ema.applied():`"
_MODULE = "the averaged module is ema.model"
_TRAINING = "the model in training is the one that attach was given"
_DECAY = (
    "the share of the average that an update keeps is ema.average.decay, and that of the last one is in ema.metrics()"
)
_EVAL = "evaluate ema.model, which is in eval mode, or the model in `with ema.applied():`"
_FILL = "copy the average into another model by ema.average.get_ema_model(other_model)"
_DEVICE = "the average moves with its model; EMA(..., offload=Offload()) keeps it on the CPU"
_STATE = "save ema.state_dict() and resume with ema.load_state_dict(...)"

# By the name in timm, torch.optim.swa_utils, ema_pytorch, torch_ema, diffusers and Lightning.
OF_AN_AVERAGE: Mapping[str, str] = {
    **dict.fromkeys(
        ("update", "update_parameters", "update_average", "update_moving_average", "update_ema", "update_weights"),
        _BY_ITSELF,
    ),
    **dict.fromkeys(
        ("average_parameters", "apply_shadow", "apply", "swap", "swap_parameters", "store", "restore", "scope"),
        _APPLIED,
    ),
    **dict.fromkeys(("ema_model", "module", "averaged_model", "average_model", "ema", "forward"), _MODULE),
    **dict.fromkeys(("online_model", "training_model"), _TRAINING),
    **dict.fromkeys(("decay", "smoothing", "beta", "get_decay", "get_current_decay", "cur_decay_value"), _DECAY),
    **dict.fromkeys(("half_life", "update_interval", "ema_start", "profile"), "the settings are those of ema.average"),
    **dict.fromkeys(("eval", "train", "requires_grad_"), _EVAL),
    **dict.fromkeys(("copy_to", "copy_params_from_ema_to_model", "set", "assign"), _FILL),
    **dict.fromkeys(("shadow", "shadow_params", "collected_params"), "ema.model.state_dict() has the averages by name"),
    **dict.fromkeys(("parameters", "named_parameters", "buffers", "modules"), "ema.model has parameters and modules"),
    **dict.fromkeys(("to", "cuda", "cpu", "device"), _DEVICE),
    **dict.fromkeys(
        ("n_averaged", "num_averaged", "optimization_step", "updates"), "ema.num_updates counts the updates"
    ),
    **dict.fromkeys(("save_checkpoint", "load", "load_checkpoint", "resume"), _STATE),
    "save_pretrained": "ema.save(path) writes the averaged weights; so does polyak.export_averaged, to a folder",
    "from_pretrained": "to begin with other weights, set ema.average.ema_model to a module that has them",
    "update_bn": "measure the statistics of BatchNorm by polyak.update_bn(model, loader) in `with ema.applied():`",
    "remove": "ema.detach() stops averaging",
    "close": "ema.detach() stops averaging",
    "reset": "to begin again, ema.detach() and attach a new EMA",
}
# For an EMA that is not attached yet, or is read through `algorithm`.
OF_AN_EMA: Mapping[str, str] = dict.fromkeys(
    (
        *("update", "update_parameters", "step", "applied", "average_parameters", "model", "module", "save", "store"),
        *("restore", "copy_to", "shadow", "parameters", "to", "eval", "apply_shadow", "n_averaged", "detach"),
    ),
    "attach it first, and use what that returns: ema = polyak.attach(EMA(...), model, optimizer)",
)

_KEEPS = "decay=0.999 is the share of the average that an update keeps"
_OFTEN = "update_interval='10 steps' is the time between updates"
_LATER = "ema_start='1000 steps' is when averaging begins"
_WARM = "profile=polyak.Warmup(polyak.Smoothing(0.9999)) warms the decay up"
_MODEL = "the model goes to attach: ema = polyak.attach(EMA(decay=0.999), model, optimizer)"
ARGUMENTS_OF_AN_EMA: Mapping[str, str] = {
    **dict.fromkeys(("beta", "alpha", "momentum", "ema_decay", "ema_rate", "decay_rate", "mu"), _KEEPS),
    **dict.fromkeys(("update_every", "update_freq", "update_every_n_steps", "every_n_steps", "interval"), _OFTEN),
    **dict.fromkeys(("update_after_step", "start_step", "start", "update_starting_at_step", "swa_start"), _LATER),
    **dict.fromkeys(
        ("use_ema_warmup", "use_warmup", "warmup", "inv_gamma", "power", "min_decay", "warmup_steps"), _WARM
    ),
    **dict.fromkeys(("model", "module", "parameters", "params", "optimizer"), _MODEL),
    **dict.fromkeys(("avg_fn", "multi_avg_fn"), "profile= decides how much of the average each update keeps"),
    "device": "an average is on its model's device; offload=polyak.Offload() keeps it on the CPU",
    "use_buffers": "policy= decides what is averaged; running statistics are by default, other buffers are copied",
    "span": "a half-life is half_life='1000 steps'",
}
ARGUMENTS_OF_ATTACH: Mapping[str, str] = {
    **dict.fromkeys(("ema", "algorithm", "callbacks"), "the EMA is algorithms=, the first argument"),
    **dict.fromkeys(("optim", "optimizers", "opt"), "the optimizer is optimizer=, the third argument"),
    **dict.fromkeys(
        ("decay", "smoothing", "half_life", "update_interval", "ema_start"),
        "it goes to the EMA: attach(EMA(decay=0.999), model, optimizer)",
    ),
    **dict.fromkeys(
        ("max_steps", "total_steps", "num_steps", "steps"), "the length of the run is max_duration='1000 steps'"
    ),
    **dict.fromkeys(("epochs", "max_epochs"), "the length of the run is max_duration='10 epochs'"),
    **dict.fromkeys(("batch_size", "samples_per_batch"), "the samples in a step are samples_per_step=64"),
}


def absent(owner: object, name: str, instead: Mapping[str, str]) -> AttributeError:
    """Return the error for an attribute that does not exist, which says what to use instead.

    Args:
        owner: The object.
        name: The name of the attribute.
        instead: What to use instead, by name.
    """
    kind = type(owner).__name__
    if name.startswith("_"):
        return AttributeError(f"{kind!r} object has no attribute {name!r}", name=name, obj=owner)
    known = [one for one in dir(type(owner)) if not one.startswith("_")]
    close = difflib.get_close_matches(name, known, n=1)
    advice = instead.get(name) or (f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}")
    return AbsentError(f"{_shown(kind)} has no {name!r}; {advice}", name=name, obj=owner)


def _shown(kind: str) -> str:
    return "what attach returned" if kind == "Attached" else f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"


def explained(example: str, instead: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that makes a call that does not fit the signature an error which says what to write.

    Args:
        example: A correct call.
        instead: What to write instead of arguments that other libraries have, by name.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                _refuse(str(error), signature, args, kwargs, example=example, instead=instead)
            return function(*args, **kwargs)

        return call

    return decorate


def _refuse(
    reason: str,
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    example: str,
    instead: Mapping[str, str],
) -> NoReturn:
    names = [name for name in signature.parameters if name != "self"]
    given = [kind_of(one) for one in args if "self" not in signature.parameters or one is not args[0]]
    given += [f"{name}={kind_of(value)}" for name, value in kwargs.items()]
    for name in kwargs:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            advice = instead.get(name) or (f"did you mean {close[0]}=?" if close else f"it takes {', '.join(names)}")
            raise CallError(f"the arguments must be those of {example} (got {name}=); {advice}")
    raise CallError(f"the arguments must be those of {example} (got {', '.join(given) or 'none'}); {reason}")


def kind_of(given: object) -> str:
    """Describe a value in a word or two, for errors.

    Args:
        given: Anything.
    """
    if given is None or isinstance(given, bool | int | float):
        return repr(given)
    if isinstance(given, str):
        return repr(given) if len(given) < 40 else f"a str of {len(given)} characters"
    if isinstance(given, type):
        return f"the class {given.__name__}"
    if inspect.isfunction(given) or inspect.ismethod(given):
        return f"the function {given.__name__}"
    name = type(given).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' or name.startswith('SGD') else 'a'} {name}"
