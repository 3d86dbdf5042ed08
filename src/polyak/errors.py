"""The exceptions and warnings of polyak.

Every error says what must hold, what came, and what to do. Each also derives from the built-in error that a
caller who does not know polyak would catch.
"""

from collections.abc import Iterable, Mapping


class PolyakError(Exception):
    """The base class of all errors: polyak refuses to do something."""


class ArgumentError(PolyakError, ValueError):
    """An argument that is not what it must be; the message names it."""


class CallError(ArgumentError, TypeError):
    """A call with an argument that the function does not have, or without one that it needs."""


class AbsentError(PolyakError, AttributeError):
    """An attribute that does not exist; the message says what there is instead."""


class FixedError(PolyakError, AttributeError):
    """An attribute that was assigned and cannot be changed."""


class TimeError(PolyakError, ValueError, RuntimeError):
    """A time string, a span or a unit that is not valid. A ``RuntimeError`` too, as Composer's are."""


class ProfileError(PolyakError, ValueError):
    """A profile with parameters out of range, or one that cannot be used in this place."""


class MismatchError(PolyakError, ValueError):
    """Two sets of named tensors that should agree and do not.

    Args:
        what: The two sides, for the first line of the message.
        missing: Names that the first side has and the second lacks.
        unexpected: Names that only the second side has.
        misshaped: For each name with two shapes, the shape that was expected and the one that came.

    Attributes:
        missing: As given, sorted.
        unexpected: As given, sorted.
        misshaped: As given.
    """

    def __init__(
        self,
        what: str,
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        misshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    ) -> None:
        self.missing = sorted(missing)
        self.unexpected = sorted(unexpected)
        self.misshaped = dict(misshaped or {})
        lines = [what]
        if self.missing:
            lines.append(f"  missing: {', '.join(self.missing)}")
        if self.unexpected:
            lines.append(f"  unexpected: {', '.join(self.unexpected)}")
        lines += [f"  {name}: expected shape {want}, got {got}" for name, (want, got) in self.misshaped.items()]
        super().__init__("\n".join(lines))


class DtypeError(PolyakError, ValueError):
    """A dtype that cannot hold the values that are to be averaged in it."""


class LoanError(PolyakError, RuntimeError):
    """An update, an optimizer step or a second swap while the average is in the model, or the reverse."""


class MemoryLayoutError(PolyakError, ValueError):
    """A tensor whose memory cannot be averaged or swapped, because it overlaps or only its class knows it."""


class OffloadError(PolyakError, RuntimeError):
    """An update in the background that failed, after which the average is not reliable."""


class CopyError(PolyakError, RuntimeError):
    """A model, an average or a recorder that cannot be copied or pickled."""


class ExistsError(PolyakError, FileExistsError):
    """A file or folder that exists already and is replaced only with ``overwrite=True``."""


class CheckpointError(PolyakError, ValueError):
    """A checkpoint, or a state in it, that is not what it should be."""


class ShardingError(PolyakError, RuntimeError):
    """Ranks that disagree, or an operation that is not possible if each rank has only a part of the model."""


class MissingExtraError(PolyakError, ImportError):
    """A library that is needed and not installed. The message names the extra of polyak that installs it."""


class OptimizerError(PolyakError, TypeError):
    """An optimizer whose steps cannot be counted, or after whose step the model does not have its new weights yet."""


class PlanWarning(UserWarning):
    """A plan that works as asked but is probably a mistake: its numbers are in the message."""


class QuarantineWarning(UserWarning):
    """Weights had NaN or inf, which were kept out of the average."""


class RecordError(PolyakError, OSError):
    """A record that cannot be read or written, or does not hold what it should."""


class KernelError(PolyakError, ImportError):
    """The kernel that ``POLYAK_KERNEL`` names cannot serve on this machine."""
