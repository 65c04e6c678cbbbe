"""``python -m mamba_ops train``: a byte-level language model from nothing."""

from __future__ import annotations

import importlib.util
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..models import CheckpointError, LanguageModel, LMConfig, load_checkpoint, load_model
from . import CommandError, corpus, seed
from .trainer import CHECKPOINT, Settings, Trainer

LAYER_ARGS: dict[str, dict[str, Any]] = {"mamba2": {"d_state": 64, "headdim": 64}, "mamba": {"d_state": 16}}
MINUTES = 3.2


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the command's options; those left out take Settings' defaults, or the resumed run's."""
    option = parser.add_argument
    option("--data", metavar="FILE", help="any text; default: the sources of Python's standard library")
    option("--layer", choices=sorted(LAYER_ARGS), help="default: mamba2")
    option(
        "--out", metavar="DIR", help="folder of the checkpoint and the curve; default: runs/LAYER, numbered"
    )
    option(
        "--resume", action="store_true", help="go on from the checkpoint in --out, or the newest under runs/"
    )
    option("--steps", type=int, help="optimizer steps; makes the run reproducible to the bit")
    option("--minutes", type=float, help=f"training time; default: {MINUTES}, unless --steps is given")
    option("--d-model", type=int, help=f"width; default: {Settings.d_model}")
    option("--layers", type=int, help=f"blocks; default: {Settings.layers}")
    option("--row", type=int, help=f"bytes in a row; default: {Settings.row}")
    option("--batch", type=int, help=f"rows in a step; default: {Settings.batch}")
    option("--lr", type=float, help=f"highest learning rate; default: {Settings.lr}")
    option("--seed", type=seed, help="of the weights and the order of the rows; default: 0")
    option(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of the matrix products; default: float32. bfloat16 is faster where the CPU multiplies it",
    )


def run(options: Namespace) -> int:
    """Runs the command; returns the exit code. Raises CommandError for bad input."""
    given = {
        f.name: getattr(options, f.name) for f in fields(Settings) if getattr(options, f.name) is not None
    }
    for name in ("d_model", "layers", "row", "batch", "steps", "minutes", "lr"):
        if not given.get(name, 1) > 0:
            raise CommandError(f"--{name.replace('_', '-')} must be above 0, got {given[name]}")
    if "data" in given:
        given["data"] = str(Path(given["data"]).absolute())
    for name in ("safetensors", "tqdm"):
        if importlib.util.find_spec(name) is None:
            raise CommandError(f"train needs {name}, which is not installed: pip install 'mamba_ops[train]'")
    if options.resume:
        return _resumed(_resume_folder(options.out), given).run()
    return _started(options.out, given).run()


def _started(out: str | None, given: dict[str, Any]) -> Trainer:
    if "steps" not in given:
        given.setdefault("minutes", MINUTES)
    settings = Settings(**given)
    text = corpus.load(settings.data, settings.row)
    config = LMConfig(
        d_model=settings.d_model,
        n_layer=settings.layers,
        layer=settings.layer,
        layer_args=LAYER_ARGS[settings.layer],
    )
    torch.manual_seed(settings.seed)
    try:
        model = LanguageModel(config)
    except ValueError as error:
        raise CommandError(str(error)) from error
    return Trainer(_new_folder(out, settings.layer), settings, text, model)


def _resumed(folder: Path, given: dict[str, Any]) -> Trainer:
    try:
        checkpoint = load_checkpoint(folder / CHECKPOINT)
        if not checkpoint.info.keys() >= {"settings", "text", "seconds", "history"}:
            raise CheckpointError(
                f"{folder / CHECKPOINT} was not written by train: there is nothing to go on from"
            )
        model = load_model(checkpoint)
    except CheckpointError as error:
        raise CommandError(str(error)) from error
    before = checkpoint.info["settings"]
    for name in given.keys() - {"steps", "minutes"}:
        if given[name] != before[name]:
            raise CommandError(
                f"--{name.replace('_', '-')} {given[name]} differs from {before[name]}, with which the run "
                "began; leave it out, or begin another run"
            )
    if "steps" in given or "minutes" in given:
        before |= {"steps": given.get("steps"), "minutes": given.get("minutes")}
    settings = Settings(**before)
    text = corpus.load(settings.data, settings.row)
    if text.fingerprint != checkpoint.info["text"]:
        raise CommandError(f"{text.name} is not the text with which the run in {folder} began")
    trainer = Trainer(folder, settings, text, model)
    trainer.restore(checkpoint)
    if trainer.progress >= 1:
        raise CommandError(
            f"the run in {folder} is complete after {trainer.step} steps; "
            "to go on, give more --steps or --minutes"
        )
    return trainer


def _new_folder(out: str | None, layer: str) -> Path:
    """The folder to write to: the one asked for, unless it holds a run, or the next free one under runs/."""
    if out is None:
        names = (f"{layer}-{i}" if i > 1 else layer for i in range(1, sys.maxsize))
        folder = next(f for f in (Path("runs", name) for name in names) if not (f / CHECKPOINT).exists())
    else:
        folder = Path(out)
        if (folder / CHECKPOINT).exists():
            raise CommandError(
                f"{folder} holds a run already: add --resume to go on, or choose another --out"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot make the folder {folder}: {error.strerror}") from error
    return folder


def _resume_folder(out: str | None) -> Path:
    if out is not None:
        return Path(out)
    found = sorted(Path("runs").glob(f"*/{CHECKPOINT}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CommandError("there is no run under runs/ to resume; name its folder with --out")
    return found[-1].parent
