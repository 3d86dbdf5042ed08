"""The strategies of Lightning under which weights cannot be averaged."""

from typing import Any

_FOREIGN = {"DeepSpeedStrategy", "FSDPStrategy", "XLAFSDPStrategy"}


def refuse_foreign(strategy: Any) -> None:
    """Refuse a strategy under which a process does not hold the model's parameters as they are.

    Args:
        strategy: Of a trainer or of Fabric.

    Raises:
        NotImplementedError: If it is one.
    """
    if foreign := _FOREIGN & {cls.__name__ for cls in type(strategy).__mro__}:
        raise NotImplementedError(
            f"each process must hold a model's parameters as they are for them to be averaged (got {', '.join(foreign)}"
            ", under which it does not); use ModelParallelStrategy with fully_shard, DDP or one device"
        )
