"""``python -m mamba_ops``: doctor, train, generate."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .commands import CommandError, doctor, generate, train

COMMANDS = {
    "doctor": (doctor, "what is installed, what would run here, and what to do about what is missing"),
    "train": (train, "train a byte-level language model on any text"),
    "generate": (generate, "continue a text with a checkpoint of train"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; bad input costs one line and a 1."""
    parser = argparse.ArgumentParser(prog="python -m mamba_ops")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=text, description=text))
    options = parser.parse_args(arguments)
    try:
        return int(COMMANDS[options.command][0].run(options))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CommandError, OSError) as error:
        print(f"mamba_ops {options.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
