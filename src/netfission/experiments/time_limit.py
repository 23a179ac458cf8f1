"""A limit on the time of a command, which ends its trainings after a whole epoch."""

import time
from dataclasses import dataclass, field

OUT_OF_TIME = 75  # exit status: the same command goes on (EX_TEMPFAIL of sysexits.h)


class OutOfTimeError(Exception):
    """The next epoch would probably end after the limit.

    Args:
        message: what is done, for the user.
        epoch: seconds of the last epoch; 0 if none was trained.
    """

    def __init__(self, message: str = "", epoch: float = 0.0) -> None:
        super().__init__(message)
        self.epoch = epoch


@dataclass(frozen=True)
class TimeLimit:
    """A limit on wall-clock time, which several processes of one machine share.

    Attributes:
        seconds: the limit.
        start: when it began, as `time.time()`.

    Example:
        >>> TimeLimit(60.0).check()
        >>> TimeLimit(60.0, start=0.0).check()
        Traceback (most recent call last):
        netfission.experiments.time_limit.OutOfTimeError
    """

    seconds: float
    start: float = field(default_factory=time.time)

    def check(self, epoch: float = 0.0) -> None:
        """Raise `OutOfTimeError` if the limit is over, or would be after an epoch of so many seconds."""
        if time.time() + epoch >= self.start + self.seconds:
            raise OutOfTimeError(epoch=epoch)
