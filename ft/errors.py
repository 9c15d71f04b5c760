"""The errors that a user can mend, and the exit codes that scripts outside rely on."""

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: a checkpoint stands, start me again


def printable(text: str) -> str:
    """The text for a terminal: control characters and those that turn the writing direction are escaped, so
    that a user's data cannot give the terminal orders."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text
    )


class UserError(Exception):
    """The config, the data or the launch is wrong. The message names the key or the row, what was found,
    what was expected and what to do; the scripts print it without a traceback and exit with 2."""


class Stopped(Exception):
    """The run was told to stop, and has saved a checkpoint; the scripts exit with 75."""
