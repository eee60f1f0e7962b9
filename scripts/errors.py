"""Errors a user can do something about: one line on stderr and an exit code, no traceback."""

import os

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_BY_SIGNAL = 128  # and the signal's number
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A command cannot go on. The message says what is wrong and what to do about it."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def require_root(what: str) -> None:
    """Raise UserError unless this process is root; `what` is the subject of the complaint."""
    if os.geteuid() != 0:
        raise UserError(f"{what} needs root: run the same command with sudo")
