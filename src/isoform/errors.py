"""What a person did wrong, with the exit code that says which kind of thing it was.

Every message is one line: what was given, what was expected, where to change it. Anything that is not an
`IsoformError` is our own slip and shows its traceback.
"""


class IsoformWarning(UserWarning):
    """What a person should know, though the work goes on: one line."""


class IsoformError(Exception):
    """A mistake that the reader can mend; `exit_code` is what the command returns."""

    exit_code = 1


class ConfigError(IsoformError):
    """A config, recipe, option or command line that cannot be carried out."""

    exit_code = 2


class DataError(IsoformError):
    """A file, row or split that cannot be read or used."""

    exit_code = 3


class CheckpointError(IsoformError):
    """A model folder or training state that is missing, damaged or of another run."""

    exit_code = 4


class LockedError(IsoformError):
    """A run folder that another process holds."""

    exit_code = 5


class DiskError(IsoformError):
    """No room or no permission to write."""

    exit_code = 6


class NonFiniteError(IsoformError):
    """A loss or gradient that is NaN or infinite."""

    exit_code = 7


class OutOfMemoryError(IsoformError):
    """The smallest micro-batch does not fit."""

    exit_code = 8


class HangError(IsoformError):
    """A step that took longer than its limit."""

    exit_code = 9


class AuditError(IsoformError):
    """A comparison that the audit refuses."""

    exit_code = 10


class Stopped(IsoformError):
    """Stopped by a signal after the state was saved: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
