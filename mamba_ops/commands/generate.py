"""``python -m mamba_ops generate``: text from a checkpoint of ``train``, or from a published one."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..models import CheckpointError, LanguageModel, load_model, load_pretrained, stream
from . import CommandError, seed
from .trainer import CHECKPOINT

TOKENIZER = "tokenizer.json"
UNFINISHED = "\N{REPLACEMENT CHARACTER}".encode()


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the command's options."""
    option = parser.add_argument
    option(
        "checkpoint",
        help="what train wrote, or its folder; or a published checkpoint's folder, with tokenizer.json",
    )
    option("--prompt", required=True, help="text to go on from, at least one character")
    option("--tokens", type=int, default=400, help="bytes or tokens to generate; default: %(default)s")
    option("--temperature", type=float, default=0.8, help="0: always the likeliest one; default: %(default)s")
    option("--top-k", type=int, help="choose among this many likeliest ones only")
    option(
        "--top-p", type=float, help="choose among the likeliest ones that hold this share of the probability"
    )
    option("--seed", type=seed, help="makes the output repeatable")


@dataclass
class Codec:
    """Text to tokens and back: bytes, or those of a tokenizer."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], bytes]


def run(options: Namespace) -> int:
    """Runs the command; returns the exit code. Raises CommandError for bad input."""
    try:
        model, codec = _load(Path(options.checkpoint))
        generator = torch.Generator()
        if options.seed is None:
            generator.seed()
        else:
            generator.manual_seed(options.seed)
        prompt = codec.encode(options.prompt)
        steps = stream(
            model,
            [prompt],
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
    out.write(codec.decode(prompt))
    before, tokens = codec.decode(prompt), list(prompt)
    for step in steps:
        tokens += step.tolist()
        text = codec.decode(tokens)
        if not text.endswith(UNFINISHED):  # a character may take several tokens
            out.write(text[len(before) :])
            out.flush()
            before = text
    out.write(codec.decode(tokens)[len(before) :] + b"\n")
    out.flush()
    return 0


def _load(path: Path) -> tuple[LanguageModel, Codec]:
    """The model of a file or folder, and how it reads and writes text."""
    if not (path / "config.json").is_file():
        path = path / CHECKPOINT if path.is_dir() else path
        model = load_model(path)
    elif (path / TOKENIZER).is_file():
        return load_pretrained(path), _tokenizer(path / TOKENIZER)
    else:
        model = load_pretrained(path)
    if model.config.vocab_size != 256:
        raise CommandError(f"{path} is a model of {model.config.vocab_size} tokens, not of bytes")
    return model, Codec(lambda text: list(text.encode(errors="surrogateescape")), bytes)


def _tokenizer(path: Path) -> Codec:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise CommandError(f"{path} needs tokenizers: pip install tokenizers") from error
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise CommandError(f"{path} is no tokenizer: {error}") from error
    return Codec(
        lambda text: list(tokenizer.encode(text).ids),
        lambda tokens: str(tokenizer.decode(tokens)).encode(),
    )
