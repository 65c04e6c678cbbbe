"""The commands behind ``python -m mamba_ops``."""


class CommandError(Exception):
    """The user's input cannot be worked with; the message, one line, says why. Shown without a traceback."""
