"""What a user is told: the one exception for everything that can be mended, and the one warning."""


class UserError(ValueError):
    """A request that cannot be met: says what was given, what is allowed, and what to do.

    The command line prints its message without a traceback and ends with exit status 2.
    """


class FastvaeWarning(UserWarning):
    """What was passed over and a user may want to mend. The command line prints it in one line."""


class OneProcessError(UserError):
    """What befell one process of several, which the others know nothing of: it says so itself."""


class Stopped(BaseException):
    """A signal ended a run early. Nothing is lost; the message says how to go on.

    No Exception, so that what handles errors does not take it for one.
    """

    def __init__(self, message: str, number: int) -> None:
        """`number`: that of the signal."""
        super().__init__(message)
        self.number = number
