"""The read-only attributes of an ``EMA``, and the errors for assigning to them."""

from typing import TYPE_CHECKING, Any

from torch import nn

from polyak.algorithm import Algorithm
from polyak.averaging.habits import OF_AN_EMA, absent
from polyak.averaging.online import OnlineAverage
from polyak.averaging.weights import Shadow
from polyak.errors import FixedError
from polyak.profiles import Profile, named
from polyak.time import Time

# The attributes that cannot be assigned, and what to do instead.
_FIXED = {
    **dict.fromkeys(
        ("half_life", "smoothing", "decay", "profile", "ema_start", "update_interval"),
        "make a new EMA with another one, and load the state of this one into it",
    ),
    "ema_weights_active": "get_ema_model and get_training_model swap the average in and out",
    "training_model": "it is the model in training, and its weights are kept: assign none",
    "num_updates": "it counts updates",
    "num_quarantined": "it counts what was kept out",
}


class Attributes(Algorithm):
    """The read-only attributes of an ``EMA``, with the names of MosaicML Composer's."""

    _average: OnlineAverage

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED:
            raise FixedError(
                f"{name} of an EMA must stay as it is (got {value!r} for {getattr(self, name)!r}); {_FIXED[name]}"
            )
        object.__setattr__(self, name, value)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if not name.startswith("_") and hasattr(type(self), name):
                return object.__getattribute__(self, name)  # a property has failed with an AttributeError of its own
            raise absent(self, name, OF_AN_EMA)

    @property
    def profile(self) -> Profile:
        """The profile, which decides on the decay."""
        return self._average.schedule.profile

    @property
    def half_life(self) -> Time | None:
        """The half-life, or None if another profile decides."""
        return named(self.profile).half_life

    @property
    def smoothing(self) -> float | None:
        """The share of the average that one update keeps, or None if it depends on the elapsed time."""
        return self._average.schedule.smoothing

    @property
    def decay(self) -> float | None:
        """Another name of ``smoothing``."""
        return self.smoothing

    @property
    def ema_start(self) -> Time:
        """How much training comes before averaging."""
        return self._average.schedule.start

    @property
    def update_interval(self) -> Time:
        """The time between updates."""
        return self._average.schedule.interval

    @property
    def ema_started(self) -> bool:
        """Whether averaging has begun, with an update or with the average that ``ema_model`` was set to."""
        return self._average.started

    @ema_started.setter
    def ema_started(self, started: bool) -> None:
        if bool(started) != self.ema_started:
            raise FixedError(
                f"ema_started must say whether there is an average (got {started!r}, and there is "
                f"{'one' if self.ema_started else 'none'}); set ema_model to begin with your own average, or make a "
                "new EMA to begin again"
            )

    @property
    def ema_weights_active(self) -> bool:
        """Whether the model holds the average now."""
        return self._average.active

    @property
    def training_model(self) -> nn.Module | None:
        """The model with its training weights. While the average is swapped in, it is a module over their backup."""
        shadow = self._average.shadow
        return shadow.training_model() if shadow else self._average.model

    @property
    def num_updates(self) -> int:
        """How often the average has moved."""
        return self._average.num_updates

    @property
    def num_quarantined(self) -> int:
        """How many tensors had NaN or inf, which were kept out of the average. Reading it waits for the device."""
        shadow = self._average.shadow
        return shadow.num_quarantined if shadow else 0

    @property
    def _shadow(self) -> Shadow | None:
        return self._average.shadow
