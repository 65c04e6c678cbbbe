"""``python -m mamba_ops generate``: text from a checkpoint of ``train``, byte by byte."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

import torch

from ..models import CheckpointError, load_model, stream
from . import CommandError


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the command's options."""
    option = parser.add_argument
    option("checkpoint", help="a checkpoint.safetensors that train wrote")
    option("--prompt", required=True, help="text to go on from, at least one character")
    option("--tokens", type=int, default=400, help="bytes to generate; default: %(default)s")
    option(
        "--temperature", type=float, default=0.8, help="0: always the likeliest byte; default: %(default)s"
    )
    option("--top-k", type=int, help="choose among this many likeliest bytes only")
    option(
        "--top-p", type=float, help="choose among the likeliest bytes that hold this share of the probability"
    )
    option("--seed", type=int, help="makes the output repeatable")


def run(options: Namespace) -> int:
    """Runs the command; returns the exit code. Raises CommandError for bad input."""
    prompt = options.prompt.encode(errors="surrogateescape")
    try:
        model = load_model(options.checkpoint)
        if model.config.vocab_size != 256:
            raise CommandError(
                f"{options.checkpoint} is a model of {model.config.vocab_size} tokens, not of bytes"
            )
        generator = torch.Generator()
        if options.seed is None:
            generator.seed()
        else:
            generator.manual_seed(options.seed)
        steps = stream(
            model,
            [list(prompt)],
            options.tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            generator=generator,
        )
    except (CheckpointError, ValueError) as error:
        raise CommandError(str(error)) from error
    sys.stdout.flush()
    out = sys.stdout.buffer
    out.write(prompt)
    for tokens in steps:
        out.write(bytes(tokens.tolist()))
        out.flush()
    out.write(b"\n")
    out.flush()
    return 0
