"""Text as bytes: where it comes from, how a part is held out, and how rows are drawn from the rest."""

from __future__ import annotations

import hashlib
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import CommandError

HELD_OUT_SHARE, HELD_OUT_MOST = 32, 1 << 18
HELD_OUT_CLASS = 8  # these files are about as hard for gzip as the whole library: 1.95 and 1.92 bits per byte
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Bytes to learn from, and bytes that are only measured on."""

    name: str
    train: bytes
    held_out: bytes

    @property
    def fingerprint(self) -> str:
        """Tells whether another corpus is the same."""
        return hashlib.sha256(self.train + b"|" + self.held_out).hexdigest()[:16]


def load(path: str | None, row: int) -> Corpus:
    """The text of a file, its end held out; without one, the running Python's standard library.

    Args:
        path: the file, or None.
        row: bytes in a row of training; each part of the text must have that many and one more.

    Raises:
        CommandError: the file is missing, empty, unreadable or too short.
    """
    corpus = _standard_library() if path is None else _file(Path(path), row)
    for part, text in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(text) <= row:
            raise CommandError(
                f"{corpus.name}: its {part} part of {len(text)} bytes is shorter than a row of {row} and the "
                "byte that follows; give more text or a smaller --row"
            )
    return corpus


def _file(path: Path, row: int) -> Corpus:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error
    if not text:
        raise CommandError(f"{path} is empty")
    cut = max(len(text) - max(min(len(text) // HELD_OUT_SHARE, HELD_OUT_MOST), row + 1), 0)
    return Corpus(str(path), text[:cut], text[cut:])


def _standard_library() -> Corpus:
    """The library's sources without its tests, in the order of their paths; whole files are held out."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(
        name
        for name in (path.relative_to(root).as_posix() for path in root.rglob("*.py"))
        if not NOT_LIBRARY & set(name.split("/"))
    )
    if not names:
        raise CommandError(f"no Python sources under {root}; give a text with --data FILE")
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for name in names:
        held_out = zlib.crc32(name.encode()) % HELD_OUT_SHARE == HELD_OUT_CLASS
        parts[held_out].append((root / name).read_bytes())
    return Corpus("Python's standard library", b"".join(parts[0]), b"".join(parts[1]))


def as_tensor(text: bytes) -> Tensor:
    """(len(text),) uint8."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def draw_rows(text: Tensor, step: int, batch: int, row: int, seed: int) -> tuple[Tensor, Tensor]:
    """The batch of one training step, a function of its arguments alone, so that a resumed run sees the same.

    Args:
        text: (l,) uint8, l > row.
        step, seed: choose the rows.

    Returns:
        inputs and targets, (batch, row) int64 each.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(text) - row, (batch, 1), generator=generator)
    rows = text[starts + torch.arange(row + 1)].long()
    return rows[:, :-1], rows[:, 1:]
