"""What a user can be told. Every error names the thing, the number and the remedy."""


class OutsizeError(Exception):
    """The base of all errors that are a user's to mend; the command line prints them without a traceback."""


class OptionError(OutsizeError):
    """An option, name or setting that is unknown, unreadable or contradicts another."""


class BudgetError(OutsizeError):
    """The job does not fit the memory or the disk it was given; the message says how much would do, and so does `least`:
    bytes of memory, or None where memory is not what is missing."""

    def __init__(self, message: str, least: int | None = None) -> None:
        super().__init__(message)
        self.least = least


class ModelError(OutsizeError):
    """A model file, folder or module that cannot be used as it is."""


class DataError(OutsizeError):
    """Training or evaluation text that cannot be read; the message names file and line."""


class StorageError(OutsizeError):
    """A disk that is full, not writable, or gave back fewer or other bytes than were stored."""


class DamageError(StorageError):
    """Stored bytes that are not those that were written; the message names block, tensor and place."""


class RunError(OutsizeError):
    """A run's folder or state that cannot be continued, or numbers that stopped being finite."""


class PlanAgain(OutsizeError):
    """Steps take much longer than planned, and the run has stopped to be planned for that; the last one is committed."""
