"""The errors that a person can fix. Each is one line and carries the exit code of the command.

::

    CdistillError                2   the base: usage, or anything without a better name
    ├── RecipeError              2   a recipe, an override or an option is wrong
    │   └── UnknownNameError     2   a name that no registry knows
    ├── MissingAssetError        3   a file that must be put somewhere first
    ├── CorruptFileError         4   a file that is damaged, foreign or unsafe
    │   └── MismatchError        4   a valid file that was made for something else
    ├── DivergedError            5   the training produced NaN or infinity
    ├── RunLockedError           6   another process owns the run folder
    ├── DiskFullError            7   a write did not fit
    └── StoppedError           75/130   stopped by a signal, everything saved

The message reads ``where: what was got; what is allowed; what to do``. A bug is any other exception: it keeps
its traceback and ends with exit code 1.
"""

import difflib
from collections.abc import Iterable


class CdistillError(Exception):
    """A mistake that the user can fix: printed in one line, without a traceback."""

    exit_code = 2


class RecipeError(CdistillError):
    """A recipe, an override or an option is wrong; the message lists every error."""


class UnknownNameError(RecipeError, ValueError):
    """A name that the registry of its kind does not hold; a ValueError too, so that pydantic takes it as its own."""


class MissingAssetError(CdistillError):
    """A file is needed that has to be fetched first; the message says which, and where to put it."""

    exit_code = 3


class CorruptFileError(CdistillError):
    """A file is truncated, altered, foreign or unsafe to read."""

    exit_code = 4


class MismatchError(CorruptFileError):
    """A file is valid, but made for another teacher, network or recipe."""


class DivergedError(CdistillError):
    """A loss became NaN or infinite."""

    exit_code = 5


class RunLockedError(CdistillError):
    """Another process works in the run folder."""

    exit_code = 6


class DiskFullError(CdistillError):
    """A file could not be written because the disk or a quota is full."""

    exit_code = 7


class StoppedError(CdistillError):
    """A signal asked the program to stop; the state is saved and the run can be resumed."""

    exit_code = 75

    def __init__(self, message: str, exit_code: int = exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def brief(error: BaseException) -> str:
    r"""Returns the message of someone else's error, or its kind, in one line of bounded length.

    >>> brief(ValueError("two\n   lines"))
    'two lines'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def printable(text: str, longest: int = 200) -> str:
    r"""Returns a stranger's text in one line of bounded length, with whatever could steer a terminal written out.

    >>> print(printable("red \x1b[31m and \u202e back"))
    red \x1b[31m and \u202e back
    """
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[: longest + 1])
    return shown if len(text) <= longest and len(shown) <= longest else f"{shown[:longest]}..."


def suggest(got: str, known: Iterable[str]) -> str:
    """Returns a list of the known names, with the nearest one as a question.

    >>> suggest("analitic", ["analytic", "ctm"])
    "known: analytic, ctm (did you mean 'analytic'?)"
    """
    names = sorted(known)
    folded = {name.lower(): name for name in names}
    near = difflib.get_close_matches(got.lower(), folded, n=1)
    hint = f" (did you mean {folded[near[0]]!r}?)" if near else ""
    return f"known: {', '.join(names)}{hint}"
