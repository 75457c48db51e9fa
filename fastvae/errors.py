"""The one exception for everything a user can mend."""


class UserError(ValueError):
    """A request that cannot be met: says what was given, what is allowed, and what to do.

    The command line prints its message without a traceback and ends with exit status 2.
    """
