"""``PolishStart``: the weights from which a polish starts, the average of an ``EMA`` or of a record."""

from polyak.averaging.ema import EMA
from polyak.averaging.schedule import convert
from polyak.errors import ArgumentError
from polyak.polishing import load_average
from polyak.record import Recorder
from polyak.tensors.slots import slots
from polyak.time import Time, TimeUnit
from polyak.trainer.context import Context

# With fewer intervals, a record does not resolve any half-life.
_FEWEST = 2


class PolishStart:
    """Loads the average of a trainer's ``EMA`` into its model. Without an ``EMA``, it takes that of its ``Recorder``.

    For a record this is the average that ``Record.recommend`` recommends: a half-life of a sixteenth of the run so far.

    Args:
        context: The context of the trainer.

    Raises:
        ArgumentError: If there is no average, or there are several.
    """

    def __init__(self, context: Context) -> None:
        self._state, self._group = context.state, context.group
        emas = [one for one in self._state.algorithms if isinstance(one, EMA)]
        recorders = [one for one in self._state.algorithms if isinstance(one, Recorder)]
        if len(emas or recorders) != 1:
            raise ArgumentError(
                f"polish needs one average among the algorithms (got {len(emas or recorders)}); give "
                "algorithms=EMA(half_life='auto'), or a Recorder"
            )
        self._ema = emas[0] if emas else None
        self._recorder = None if emas else recorders[0]

    def check(self, share: float, polish: Time) -> None:
        """Check that there will be an average when the polish begins.

        Args:
            share: The length of the polish, as a share of the run.
            polish: The same as it was given, for errors.

        Raises:
            ArgumentError: If averaging begins too late, or the intervals of the record are too long.
        """
        length, state = self._state.max_duration, self._state
        assert length is not None
        end = convert(length, TimeUnit.BATCH, state)
        before = None if end is None else (1 - share) * end
        if self._ema is not None:
            start = convert(self._ema.ema_start, TimeUnit.BATCH, state)
            if start is not None and before is not None and start >= before:
                raise ArgumentError(
                    f"averaging must begin before the polish (got ema_start='{self._ema.ema_start}' for a polish of "
                    f"the last {polish}); take an earlier ema_start"
                )
        elif self._recorder is not None and self._recorder.interval is not None:
            interval = convert(self._recorder.interval, TimeUnit.BATCH, state)
            if interval is not None and before is not None and _FEWEST * interval > before:
                raise ArgumentError(
                    f"a record must have {_FEWEST} intervals before the polish (got interval='"
                    f"{self._recorder.interval}' for a polish of the last {polish}); take a shorter interval"
                )

    def load(self) -> None:
        """Load the average into the model, on all ranks.

        Raises:
            LoanError: If averaging has not begun.
            RecordError: If the record cannot be read.
        """
        if self._ema is not None:
            load_average(self._state.model, self._ema)
        elif self._group.kind == "fsdp2":
            # Each rank writes its shards: all must have done so before one reads them.
            self._group.ranks.on_every_rank("the record", self._flush)
            self._group.ranks.on_every_rank("the average of the record", self._fill)
        else:
            self._group.ranks.on_rank_0(self._fill, "load the average of the record")
            self._group.share(slot.tensor.detach() for slot in slots(self._state.model))

    def _flush(self) -> None:
        assert self._recorder is not None
        _ = self._recorder.record

    def _fill(self) -> None:
        from polyak.sweeping.recommending import default_of  # noqa: PLC0415  only where it is used

        assert self._recorder is not None
        record = self._recorder.record
        profile, _ = default_of(record)
        record.average_into(self._state.model, profile)
