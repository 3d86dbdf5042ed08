"""Where training scripts keep the average in their checkpoints: a table with one line for each layout."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polyak.compat.found import MODULE, Averaged, Content, named_under, plain, tensors_of
from polyak.compat.tensors import Unread
from polyak.compat.words import listed, shown
from polyak.errors import CheckpointError

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, slots=True)
class Shape:
    """A place where an average may be.

    Args:
        who: Writes so.
        key: Where the state dict is; a ``*`` is any key.
        prefix: How the names of the averaged tensors begin in it.
        model: Where the training weights are, if they must be in the file: a key, or how their names begin, as
            ``student.``.
        spelling: What was done to the names: each of these was replaced. The averages are then of parameters alone,
            and the other tensors are taken from the training weights.
        unless: A key that must not be there.
        note: What to know about it.
    """

    who: str
    key: str
    prefix: str = ""
    model: str = ""
    spelling: tuple[str, str] | None = None
    unless: str = ""
    note: str = ""


_MMCV = (
    "mmcv's EMAHook exchanges the weights at the end of an epoch: if the file was saved after that, the average is the "
    "plain weights"
)
SHAPES: Sequence[Shape] = (
    Shape("DiT, SiT and others", "ema", model="model"),
    Shape("ConvNeXt, k-diffusion and others", "model_ema", model="model"),
    Shape("ema_model and model", "ema_model", model="model"),
    Shape("EMA callbacks for Lightning", "ema_state_dict", model="state_dict", unless="message_hub"),
    Shape("EMA callbacks for Lightning", "callbacks.*.ema_state_dict", model="state_dict"),
    Shape("RAVE", "callbacks.EMA.weights", model="state_dict"),
    *(
        Shape(f"{average} and {online}", average, model=online)
        for average, online in (
            ("ema_model", "net_model"),  # torchcfm
            ("ema", "net"),  # EDM
            ("ema", "module"),  # DeepSpeed
            ("ema_state", "model"),  # detectron2
            ("model_avg", "model"),  # icefall
            ("ema_params", "model"),
            ("ema_weights", "model"),
            ("shadow", "model"),
            ("averaged_model", "model"),
            ("ema_model_state_dict", "model_state_dict"),
            ("model_ema_state_dict", "model_state_dict"),
            ("ema_state_dict", "model_state_dict"),
            ("target_encoder", "encoder"),  # I-JEPA
            ("G_ema", "G"),
            ("generator_ema", "generator"),
            ("ema_net", "net"),
            ("net_ema", "net"),
        )
    ),
    Shape("diffusion_policy", "state_dicts.ema_model", model="state_dicts"),
    Shape("OpenFold", "ema.params"),
    Shape("Boltz", "ema.ema_weights"),
    Shape("audiocraft", "ema.state.model"),
    Shape("fairseq", "extra_state.ema", model="model"),
    Shape("DINOv2", "teacher", unless="student"),
    Shape("mmengine", "state_dict", model="message_hub", note="the state_dict of mmengine's EMAHook is the average"),
    Shape("RT-DETR", "ema.module"),
    Shape("EMA classes with a shadow", "ema.shadow"),
    Shape("EMA classes with a state dict", "ema.state_dict"),
    Shape("BasicSR", "params_ema"),
    Shape("StyleGAN2", "g_ema"),
    Shape("DINO", "teacher", model="student"),
    Shape("Lightning's StochasticWeightAveraging", "callbacks.*.average_model_state"),
    Shape("NeMo", "optimizer_states.*.ema", model="state_dict"),
    Shape("Stable Diffusion", "state_dict", "model_ema.", model="model.", spelling=(".", "")),
    Shape("mmcv", "state_dict", "ema_", spelling=(".", "_"), note=_MMCV),
    *(
        Shape(f"{average} and {online}", key, average, model=online)
        for key in ("", "model", "state_dict")
        for average, online in (
            ("teacher.", "student."),
            ("encoder_k.", "encoder_q."),
            ("target_encoder.", "online_encoder."),
            ("momentum_encoder.", "encoder."),
            ("ema_model.", "model."),
            ("momentum_encoder.", "base_encoder."),
            ("ema.", "model."),
            ("ema.module.", "model."),
            ("ema.ema_model.", "model."),
            ("net_ema.", "net."),
            ("generator_ema.", "generator."),
            ("diffusion_ema.ema_model.", "diffusion.model."),
        )
    ),
)


def candidates(content: Content) -> dict[str, tuple[Shape, Any]]:
    """Return everything that may be an average, by its place.

    Args:
        content: The content of a file.
    """
    found = dict[str, tuple[Shape, Any]]()
    for shape in SHAPES:
        if shape.unless and shape.unless in content:
            continue
        for place, value in _at(content, shape.key.split(".") if shape.key else [], ""):
            if _fits(shape, content, value):
                found.setdefault(f"{place} ({shape.prefix}*)" if shape.prefix else place, (shape, value))
    longer = {shape.prefix for shape, _ in found.values()}
    return {place: one for place, one in found.items() if not _is_shorter(one[0].prefix, longer)}


def _is_shorter(prefix: str, prefixes: Iterable[str]) -> bool:
    """Return whether another prefix begins with this one, as ``ema.module.`` does with ``ema.``."""
    return bool(prefix) and any(other != prefix and other.startswith(prefix) for other in prefixes)


def _at(value: Any, keys: Sequence[str], place: str) -> Iterator[tuple[str, Any]]:
    if not keys:
        yield place, value
        return
    inside = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        if isinstance(key, (str, int)) and keys[0] in {"*", str(key)}:
            yield from _at(inner, keys[1:], f"{place}.{key}".strip("."))


def _fits(shape: Shape, content: Content, value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return not shape.prefix and bool(value) and all(isinstance(one, (Tensor, Unread)) for one in value)
    if not isinstance(value, Mapping):
        return False
    if not shape.prefix:
        return (not shape.model or shape.model in content) and is_state_dict(value) and not _has_both(value)
    names = _names(value)
    if shape.spelling:
        base = {name.replace(*shape.spelling) for name in _names(value, shape.model)}
        return any(name in base for name in _names(value, shape.prefix))
    return any(n.startswith(shape.prefix) for n in names) and any(n.startswith(shape.model) for n in names)


def is_state_dict(value: object) -> bool:
    """Return whether a mapping has tensors by name, and no mappings or lists.

    Args:
        value: Any value.
    """
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    nested = any(type(one) in {dict, list, tuple} for name, one in value.items() if not name.endswith("_extra_state"))
    return not nested and any(isinstance(one, (Tensor, Unread)) for one in value.values())


def _has_both(value: Content) -> bool:
    """Return whether it is the state dict of an EMA class, with the training weights and counters in it."""
    parts = {part for name in value for part in name.split(".")}
    return {"online_model", "ema_model"} <= parts


def _names(value: Content, prefix: str = "") -> list[str]:
    """Return the names of tensors without ``module.``, or those that begin with a prefix, without it."""
    names = [name for name, one in value.items() if isinstance(name, str) and isinstance(one, (Tensor, Unread))]
    if named_under(MODULE, names):
        names = [name.removeprefix(MODULE) for name in names]
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def take(shape: Shape, content: Content, value: Any) -> Averaged:
    """Return the average at a place.

    Args:
        shape: The shape by which it was found.
        content: The content of the file.
        value: What is there.

    Raises:
        CheckpointError: If a tensor cannot be read, or names are not to be had.
    """
    notes = (shape.note,) if shape.note else ()
    kind = f"checkpoint ({shape.who})"
    if isinstance(value, (list, tuple)):
        return _in_order(kind, content, tensors_of({str(i): tensor for i, tensor in enumerate(value)}))
    tensors = plain(tensors_of(value))
    if shape.spelling is not None:
        return _respelled(shape, tensors, kind, notes)
    average, base = plain(_below(tensors, shape.prefix)), _below(tensors, shape.model)
    if shape.prefix and average.keys() & base.keys():  # and the counters of an EMA class
        average = {name: tensor for name, tensor in average.items() if "." in name or name in base}
    return Averaged(kind, average, notes)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _respelled(shape: Shape, tensors: Mapping[str, Tensor], kind: str, notes: tuple[str, ...]) -> Averaged:
    assert shape.spelling is not None
    base = {n: t for n, t in _below(tensors, shape.model).items() if not n.startswith(shape.prefix)}
    names = dict[str, str]()
    for name in base:
        if names.setdefault(spelled := name.replace(*shape.spelling), name) != name:
            raise CheckpointError(f"the names must differ as {shape.who} spells them (two are {shown(spelled)})")
    average = {names[name]: tensor for name, tensor in _below(tensors, shape.prefix).items() if name in names}
    others = base.keys() - average.keys()
    more = (f"{len(others)} others, not averaged, are the training weights'",) if others else ()
    return Averaged(kind, base | average, (*notes, *more))


def _in_order(kind: str, content: Content, given: Mapping[str, Tensor]) -> Averaged:
    """Give an average without names those of the model in the file, if only one order is possible."""
    model = content.get("state_dict")
    groups = [
        len(opt["param_groups"])
        for state in content.get("optimizer_states", ())
        if isinstance(state, Mapping) and isinstance(opt := state.get("opt", state), Mapping) and "param_groups" in opt
    ]
    base = plain(tensors_of(model)) if isinstance(model, Mapping) else {}
    for names in (list(base), [name for name in base if not name.endswith(STATISTICS)]):
        shapes = [base[name].shape for name in names]
        if max(groups, default=1) == 1 and shapes == [tensor.shape for tensor in given.values()]:
            average = dict(zip(names, given.values(), strict=True))
            return Averaged(kind, base | average, ("it has no names: they are the model's, in order",))
    return Averaged(kind, given, positional=True)


def one_of(found: Mapping[str, object]) -> CheckpointError:
    """Return the error that a file has several averages.

    Args:
        found: The averages, by their places.
    """
    return CheckpointError(
        f"the file must hold one average (it has {len(found)}, at {listed(map(repr, found))}); say which by --key, "
        "and by --prefix where names begin differently"
    )
