"""Weight averaging for PyTorch: in any training loop, at memory speed, with nothing lost."""

from polyak.algorithm import Algorithm, dispatch
from polyak.averaging.batchnorm import update_bn
from polyak.averaging.ema import EMA
from polyak.averaging.functional import compute_ema
from polyak.averaging.offload import Offload
from polyak.errors import (
    ArgumentError,
    CheckpointError,
    CopyError,
    DtypeError,
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
from polyak.events import Event, State
from polyak.export import export_averaged
from polyak.hosts.optimizer import attach
from polyak.profiles import HalfLife, PowerFunction, Profile, Smoothing, Uniform, Warmup, Window
from polyak.record import Record
from polyak.record.recorder import Recorder
from polyak.sweeping import sweep
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

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "Algorithm",
    "ArgumentError",
    "Attached",
    "Callback",
    "CheckpointError",
    "CheckpointSaver",
    "ConsoleLogger",
    "CopyError",
    "Destination",
    "DtypeError",
    "Evaluator",
    "Event",
    "FixedError",
    "GradientClipping",
    "HalfLife",
    "JSONLinesLogger",
    "KernelError",
    "LoanError",
    "Logger",
    "MLflowLogger",
    "MemoryLayoutError",
    "MismatchError",
    "MissingExtraError",
    "Offload",
    "OffloadError",
    "OptimizerError",
    "PlanWarning",
    "Policy",
    "PolyakError",
    "PowerFunction",
    "Profile",
    "ProfileError",
    "ProgressBar",
    "QuarantineWarning",
    "Record",
    "RecordError",
    "Recorder",
    "ShardingError",
    "Smoothing",
    "State",
    "TensorBoardLogger",
    "Time",
    "TimeError",
    "TimeUnit",
    "Timestamp",
    "Trainer",
    "Uniform",
    "WandBLogger",
    "Warmup",
    "Window",
    "attach",
    "compute_ema",
    "default_policy",
    "dispatch",
    "export_averaged",
    "sweep",
    "update_bn",
]
