"""The one error a user can cause: every door prints its line and exits with 2, no traceback."""

import re

SOME_LEFT_OUT = 3  # the exit code where some of several things could not be used, or were not done

# A data loader's worker hands its error on as text: a traceback, whose last line is the error.
_FROM_A_WORKER = re.compile(r"^latdiff3d\.errors\.InputError: (.+)$", re.MULTILINE)


class InputError(ValueError):
    """Something the user gave is wrong. The message says what was found, what was expected and what to do."""


class DivergedError(InputError):
    """Training came to numbers that are none, before the weights took any harm."""


class InputExit(SystemExit):
    """An `InputError` on its way out of MONAI's config machinery, which would wrap any `Exception` in its own words.

    Raised in the main thread only, at the top of a bundle's program; `str()` is the one line to show.
    """


def root_input_error(error: BaseException) -> InputError | None:
    """Return the `InputError` at or below `error` in its chain of causes, or in a worker's report, or None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return cause
        reported = _FROM_A_WORKER.search(str(cause))
        if reported:
            return InputError(reported.group(1))
        cause = cause.__cause__ or cause.__context__
    return None


def place_error(error: BaseException) -> InputError | None:
    """Return what the system says of a file or folder that it refuses, if `error` is that."""
    if not isinstance(error, OSError) or not error.filename:
        return None
    return InputError(f"{error.filename}: {error.strerror}; expected a place that can be read and written.")
