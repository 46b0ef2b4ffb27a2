"""What went wrong, as messages on the terminal and an exit status."""

import sys

from mergelab import config_errors
from mergelab.core.errors import INTERRUPTED, InputError, MergelabError


def report(error: BaseException) -> int:
    """Print what went wrong, unless that has been done; returns the exit status."""
    from mergelab.report import terminal

    if isinstance(error, KeyboardInterrupt):
        terminal.failure(str(error) or "interrupted; nothing half-made was left")
        return INTERRUPTED
    if isinstance(error, MergelabError):
        if not error.reported:
            error.reported = True
            for message in getattr(error, "messages", [str(error)]):
                terminal.failure(message)
        return error.exit_status
    if isinstance(error, OSError) and error.strerror:
        terminal.failure(config_errors.unwritable(error))
    else:
        terminal.failure(config_errors.explain_composition(error, sys.argv[1:]))
    return InputError.exit_status
