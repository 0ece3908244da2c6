"""The one exception for what a user can mend."""


class InputError(ValueError):
    """Input or settings that cannot work. The message is one line that names the value, the place and the fix; the
    command line prints it without a traceback."""
