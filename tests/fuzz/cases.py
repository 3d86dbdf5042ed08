"""A case is a model, a loop, options and events, drawn from a seed; it is plain data, so that it can be shrunk."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .blocks import BLOCKS
from .events import OBSERVING
from .loops import STRUCTURAL
from .models import DTYPES, OPTIMIZERS, TRAITS

# How often each loop is drawn: the loops of frameworks take a hundred times as long as our own.
LOOPS = {"hooked": 60, "by hand": 40}
HOSTS = {"Trainer": 6, "Lightning": 1, "Accelerate": 1, "Transformers": 1}

Options = dict[str, Any]
_OPTIONS: dict[str, Sequence[Any]] = {
    "half_life": ("3ba", "3ba", "1ba", "100ba"),
    "smoothing": (None, None, 0.5, 0.9),
    "update_interval": ("1ba", "1ba", "1ba", "2ba", "3ba"),
    "ema_start": ("0ba", "0ba", "0ba", "2ba"),
    "dtype": (None, None, None, "float32", "float64", "bfloat16"),
    "offload": (False, False, False, False, False, True),
}
DEFAULTS: Options = {name: values[0] for name, values in _OPTIONS.items()}


@dataclass(frozen=True)
class Case:
    """Everything that a run depends on."""

    seed: int
    blocks: tuple[str, ...] = ()
    traits: tuple[str, ...] = ()
    dtype: str = "float32"
    optimizer: str = "sgd"
    loop: str = "hooked"
    steps: int = 6
    events: tuple[tuple[int, str], ...] = ()
    options: tuple[tuple[str, Any], ...] = tuple(DEFAULTS.items())

    @property
    def ema(self) -> Options:
        """The options of the average by name."""
        return dict(self.options)

    def __str__(self) -> str:
        """Return the values that are not the defaults, as JSON that ``Case.parse`` reads."""
        plain = {field.name: field.default for field in self.__dataclass_fields__.values()}
        said = {name: value for name, value in asdict(self).items() if value != plain[name]}
        if "options" in said:
            said["options"] = {name: value for name, value in self.options if value != DEFAULTS[name]}
        return json.dumps(said)

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Return the case that ``str`` wrote."""
        said = json.loads(text)
        for name in ("blocks", "traits"):
            said[name] = tuple(said.get(name, ()))
        said["events"] = tuple((at, name) for at, name in said.get("events", ()))
        said["options"] = tuple((DEFAULTS | said.get("options", {})).items())
        return cls(**said)


def draw(seed: int, loop: str | None = None) -> Case:
    """Return the case of a seed.

    Args:
        seed: Any.
        loop: By default a random one.
    """
    chance = random.Random(seed)
    loops = LOOPS | HOSTS
    loop = loop or chance.choices(list(loops), [3 * n if name in LOOPS else n for name, n in loops.items()])[0]
    blocks = tuple(chance.sample(list(BLOCKS), chance.choice((0, 0, 1, 1, 2, 3))))
    traits = tuple(chance.sample(list(TRAITS), chance.choice((0, 1, 1, 2))))
    steps = chance.randint(3, 8)
    names = [*OBSERVING] * 2 + [*STRUCTURAL]
    events = sorted((chance.randint(0, steps), chance.choice(names)) for _ in range(chance.choice((1, 2, 3, 4))))
    return Case(
        seed=seed,
        blocks=blocks,
        traits=traits,
        dtype=chance.choice(DTYPES),
        optimizer=chance.choice(list(OPTIMIZERS)),
        loop=loop,
        steps=steps,
        events=tuple(events),
        options=tuple((name, chance.choice(values)) for name, values in _OPTIONS.items()),
    )


def simpler(case: Case) -> Iterator[Case]:
    """Yield copies of the case, each without one of its features.

    Args:
        case: A case that fails.
    """
    for field in ("events", "blocks", "traits"):
        held = getattr(case, field)
        for i in range(len(held)):
            yield replace(case, **{field: held[:i] + held[i + 1 :]})
    for name, value in case.options:
        if value != DEFAULTS[name]:
            yield replace(case, options=tuple((case.ema | {name: DEFAULTS[name]}).items()))
    plain = {"dtype": "float32", "optimizer": "sgd", "loop": "hooked"}
    yield from (replace(case, **{name: value}) for name, value in plain.items() if getattr(case, name) != value)
    if case.steps > 1:
        events = tuple((min(at, case.steps - 1), name) for at, name in case.events)
        yield replace(case, steps=case.steps - 1, events=events)
    for i, (at, name) in enumerate(case.events):
        if at > 1:
            yield replace(case, events=tuple(sorted((*case.events[:i], (at - 1, name), *case.events[i + 1 :]))))
