"""The commands behind ``python -m mamba_ops``."""

from argparse import ArgumentTypeError


class CommandError(Exception):
    """The user's input cannot be worked with; the message, one line, says why. Shown without a traceback."""


def seed(text: str) -> int:
    """The value of --seed: what every generator of torch takes."""
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise ArgumentTypeError(f"must be an integer in 0..{(1 << 32) - 1}, got {text!r}")
    return int(text)
