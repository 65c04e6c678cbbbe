"""python -m mamba_ops.compat SCRIPT ARGS: runs a script with mamba_ops in mamba_ssm's place."""

import argparse
import runpy
import sys
from pathlib import Path

from . import install


def main() -> None:
    """Installs the stand-ins and becomes the script."""
    parser = argparse.ArgumentParser(
        prog="python -m mamba_ops.compat",
        description="Run a script with mamba_ops in the place of mamba_ssm, causal_conv1d and the torch "
        "functions of transformers' models.",
    )
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is a module's name")
    parser.add_argument("--keep", action="store_true", help="leave packages alone that are really installed")
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if not options.module and not Path(options.script).exists():
        parser.error(f"there is no script {options.script}")
    install(replace=not options.keep)
    sys.argv = [options.script, *options.args]
    if options.module:
        runpy.run_module(options.script, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(options.script).resolve().parent)
        runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main()
