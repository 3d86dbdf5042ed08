"""Refuses strategies of Lightning under which weights cannot be averaged."""

from typing import Any

_FOREIGN = {"FSDPStrategy", "XLAFSDPStrategy"}


def refuse_foreign(strategy: Any) -> None:
    """Refuse a strategy under which a process does not hold the model's parameters themselves.

    Args:
        strategy: The strategy of a trainer or of Fabric.

    Raises:
        NotImplementedError: If it is one.
    """
    names = {cls.__name__ for cls in type(strategy).__mro__}
    if "DeepSpeedStrategy" in names:
        raise NotImplementedError(
            "the optimizer must step the model's own parameters to be counted here (got DeepSpeedStrategy, whose "
            "engine steps float32 masters); call polyak.hosts.deepspeed.attach(EMA(...), engine) with "
            "trainer.strategy.model in the module's on_fit_start, or with Fabric's model._forward_module"
        )
    if foreign := _FOREIGN & names:
        raise NotImplementedError(
            f"each process must hold a model's parameters as they are for them to be averaged (got {', '.join(foreign)}"
            ", under which it does not); use ModelParallelStrategy with fully_shard, DDP or one device"
        )
