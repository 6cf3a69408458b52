"""What can go wrong for a user: one line, and exit code 2 for bad input, 1 for a failed check."""

from importlib import import_module
from typing import Any


class BadInput(Exception):
    """The user can put it right: one line on stderr, exit code 2."""

    code = 2


class CheckFailed(Exception):
    """The job ran, and its result is not what it must be: exit code 1."""

    code = 1


class Interrupted(Exception):
    """A signal ended the job, and its state is saved: exit code 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.code = 128 + signal_number


def one_line(error: BaseException) -> str:
    """The message of an exception from elsewhere, without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def need(module: str, extra: str) -> Any:
    """Import an optional package in the call that needs it; its absence names what to install."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise BadInput(
            f"this needs the package {module.partition('.')[0]!r}, which is not installed; "
            f'install it with: pip install "decomp_kernels[{extra}]"'
        ) from None
