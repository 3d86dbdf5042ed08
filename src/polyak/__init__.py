"""Weight averaging for PyTorch: in any training loop, at memory speed, with nothing lost.

``attach(EMA(decay=0.999), model, optimizer)`` keeps an average. ``__all__`` lists what users need, the first thing
first; each name is imported when it is first read. What writers of integrations need is in ``polyak.algorithm``,
``polyak.events``, ``polyak.training`` and ``polyak.tensors``.
"""

import difflib
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyak.algorithm import Algorithm
    from polyak.averaging.batchnorm import update_bn
    from polyak.averaging.bema import BEMA
    from polyak.averaging.ema import EMA
    from polyak.averaging.functional import compute_ema
    from polyak.averaging.offload import Offload
    from polyak.errors import (
        AbsentError,
        ArgumentError,
        CallError,
        CheckpointError,
        CopyError,
        DtypeError,
        ExistsError,
        FixedError,
        KernelError,
        LoanError,
        MemoryLayoutError,
        MismatchError,
        MissingExtraError,
        OffloadError,
        OptimizerError,
        PlanWarning,
        PolyakError,
        ProfileError,
        QuarantineWarning,
        RecordError,
        ShardingError,
        TimeError,
    )
    from polyak.events import Event
    from polyak.export import export_averaged
    from polyak.hosts.optimizer import attach
    from polyak.polishing import polish
    from polyak.profiles import (
        Cooldown,
        HalfLife,
        Momentum,
        PowerFunction,
        Profile,
        Smoothing,
        Uniform,
        Warmup,
        Window,
    )
    from polyak.record import Record
    from polyak.record.recorder import Recorder
    from polyak.sharding.experts import declare_experts
    from polyak.sharding.parts import ModelParts
    from polyak.sweeping.checkpoints import sweep_checkpoints
    from polyak.sweeping.recommending import recommend
    from polyak.sweeping.sweep import sweep
    from polyak.tensors.slots import Policy, default_policy
    from polyak.time import Time, Timestamp, TimeUnit
    from polyak.trainer import (
        Callback,
        CheckpointSaver,
        ConsoleLogger,
        Destination,
        Evaluator,
        GradientClipping,
        JSONLinesLogger,
        Logger,
        MLflowLogger,
        ProgressBar,
        TensorBoardLogger,
        Trainer,
        WandBLogger,
    )
    from polyak.training.attached import Attached
    from polyak.watching.algorithm import Watch

__version__ = "0.1.0"

# In the order of use, not of the alphabet.
__all__ = [  # noqa: RUF022
    # Average while training.
    "attach",
    "EMA",
    "BEMA",
    "Attached",
    "Offload",
    "export_averaged",
    "update_bn",
    "compute_ema",
    # Choose the average after training.
    "Recorder",
    "Record",
    "sweep",
    "sweep_checkpoints",
    "recommend",
    "Watch",
    "polish",
    # How much each moment counts in an average.
    "HalfLife",
    "Smoothing",
    "Uniform",
    "Window",
    "Cooldown",
    "PowerFunction",
    "Warmup",
    "Momentum",
    "Profile",
    # Which tensors are averaged.
    "Policy",
    "default_policy",
    # Models that ranks hold in parts.
    "ModelParts",
    "declare_experts",
    # Times.
    "Time",
    "TimeUnit",
    "Timestamp",
    # Train with polyak's own trainer.
    "Trainer",
    "Evaluator",
    "CheckpointSaver",
    "GradientClipping",
    "ConsoleLogger",
    "ProgressBar",
    "JSONLinesLogger",
    "TensorBoardLogger",
    "WandBLogger",
    "MLflowLogger",
    "Logger",
    "Destination",
    "Callback",
    "Algorithm",
    "Event",
    # What is refused, and what is warned of.
    "PolyakError",
    "ArgumentError",
    "CallError",
    "AbsentError",
    "FixedError",
    "TimeError",
    "ProfileError",
    "OptimizerError",
    "LoanError",
    "CheckpointError",
    "ExistsError",
    "MismatchError",
    "RecordError",
    "CopyError",
    "DtypeError",
    "MemoryLayoutError",
    "ShardingError",
    "OffloadError",
    "KernelError",
    "MissingExtraError",
    "PlanWarning",
    "QuarantineWarning",
]

# The module of each name that is not in ``polyak.trainer`` or ``polyak.errors``.
_MODULES = {
    "attach": "hosts.optimizer",
    "EMA": "averaging.ema",
    "BEMA": "averaging.bema",
    "Attached": "training.attached",
    "Offload": "averaging.offload",
    "export_averaged": "export",
    "update_bn": "averaging.batchnorm",
    "compute_ema": "averaging.functional",
    "Recorder": "record.recorder",
    "Record": "record",
    "sweep": "sweeping.sweep",
    "sweep_checkpoints": "sweeping.checkpoints",
    "recommend": "sweeping.recommending",
    "Watch": "watching.algorithm",
    "polish": "polishing",
    **dict.fromkeys(
        ("HalfLife", "Smoothing", "Uniform", "Window", "Cooldown", "PowerFunction", "Warmup", "Momentum", "Profile"),
        "profiles",
    ),
    "Policy": "tensors.slots",
    "default_policy": "tensors.slots",
    "ModelParts": "sharding.parts",
    "declare_experts": "sharding.experts",
    "Time": "time",
    "TimeUnit": "time",
    "Timestamp": "time",
    "Algorithm": "algorithm",
    "Event": "events",
    **dict.fromkeys((name for name in __all__ if name.endswith(("Error", "Warning"))), "errors"),
}
# Names that are in another module now, since only writers of integrations need them.
_MOVED = {"dispatch": "algorithm", "State": "events"}
_WINGS = frozenset(
    {
        *(
            "algorithm",
            "averaging",
            "background",
            "compat",
            "errors",
            "events",
            "export",
            "hosts",
            "kernels",
            "polishing",
            "profiles",
        ),
        *("record", "sharding", "storage", "sweeping", "tensors", "time", "trainer", "training", "watching"),
    }
)


if not TYPE_CHECKING:  # type checkers know the names by the imports above, and that there are no others

    def __getattr__(name: str) -> Any:
        """Import a public name, or a module of the package, where it is first read."""
        if name in __all__:
            found = getattr(import_module(f"polyak.{_MODULES.get(name, 'trainer')}"), name)
            globals()[name] = found
            return found
        if name in _MOVED:
            module = f"polyak.{_MOVED[name]}"
            warnings.warn(f"polyak.{name} has moved: import it from {module}", DeprecationWarning, stacklevel=2)
            return getattr(import_module(module), name)
        if name in _WINGS:
            return import_module(f"polyak.{name}")
        close = difflib.get_close_matches(name.lower(), {known.lower(): known for known in __all__}, n=1)
        meant = next((known for known in __all__ if close and known.lower() == close[0]), None)
        advice = f"; did you mean polyak.{meant}?" if meant and not name.startswith("_") else ""
        raise AttributeError(f"module 'polyak' has no attribute {name!r}{advice}")

    def __dir__() -> list[str]:
        return [*__all__, *(name for name in globals() if name.startswith("__"))]
