"""The training loop behind ``python -m mamba_ops train``."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ..models import Checkpoint, LanguageModel, generate, save_checkpoint
from . import CommandError, corpus, curve, measure

CHECKPOINT, CURVE = "checkpoint.safetensors", "curve.png"
SHOW_SECONDS, SAVE_SECONDS, HELD_OUT_SECONDS, HELD_OUT_BYTES = 0.5, 60.0, 20.0, 32768


@dataclass(frozen=True)
class Settings:
    """What decides a run; kept in its checkpoint. A run ends at steps or minutes, whichever comes first."""

    layer: str = "mamba2"
    data: str | None = None
    d_model: int = 384
    layers: int = 3
    row: int = 256
    batch: int = 8
    lr: float = 3e-3
    seed: int = 0
    precision: str = "float32"
    steps: int | None = None
    minutes: float | None = None


class Trainer:
    """One training run: its model, optimizer, position and history."""

    def __init__(self, folder: Path, settings: Settings, text: corpus.Corpus, model: LanguageModel) -> None:
        self.folder = folder
        self.settings = settings
        self.text = text
        self.model = model
        self.dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[settings.precision]
        self.train_text = corpus.as_tensor(text.train)
        self.held_out_text = corpus.as_tensor(text.held_out)
        decayed = [p for p in model.parameters() if p.dim() > 1 and not hasattr(p, "_no_weight_decay")]
        rest = [p for p in model.parameters() if p.dim() <= 1 or hasattr(p, "_no_weight_decay")]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)
        self.step = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []

    @property
    def progress(self) -> float:
        """How much of the run is done, 0 to 1 and above: the larger of the shares of steps and minutes."""
        steps, minutes = self.settings.steps, self.settings.minutes
        return max(self.step / steps if steps else 0.0, self.seconds / (60 * minutes) if minutes else 0.0)

    def run(self) -> int:
        """Trains to the end or to an interruption; returns the exit code."""
        size = sum(p.numel() for p in self.model.parameters())
        with _interruptible() as interrupted:
            print(
                f"{self.settings.layer} of {size / 1e6:.2f} million parameters, "
                f"{str(self.dtype).removeprefix('torch.')}, on {self.text.name}: "
                f"{len(self.text.train):,} bytes to learn from, {len(self.text.held_out):,} held out",
                flush=True,
            )
            self._loop(interrupted)
        self.save()
        if interrupted and self.progress < 1:
            again = f"python -m mamba_ops train --out {self.folder} --resume"
            print(f"\ninterrupted: step {self.step} is saved; go on with: {again}", flush=True)
            return 130
        self._report()
        return 0

    def _loop(self, interrupted: list[int]) -> None:
        """Steps until the run is complete or interrupted gets an entry, saving and measuring now and then."""
        began, saved, shown = time.perf_counter() - self.seconds, self.seconds, self.seconds
        first_step, first_second = self.step, self.seconds
        losses: list[torch.Tensor] = []
        with _bar(self.progress) as bar:
            while self.progress < 1 and not interrupted:
                losses.append(self._train_step())
                self.seconds = time.perf_counter() - began
                if self.seconds - shown < SHOW_SECONDS and self.progress < 1 and not interrupted:
                    continue
                shown = self.seconds
                bits = self._note(losses)
                speed = (self.step - first_step) * self._step_bytes / (self.seconds - first_second)
                left = max(int(self._seconds_left()), 0)
                bar.set_description_str(
                    f"step {self.step}, {bits:.3f} bits/byte, {speed / 1e3:.1f}k tokens/s, "
                    f"{left // 60}:{left % 60:02} left{self._held_out_note()}",
                    refresh=False,
                )
                bar.update(min(self.progress, 1.0) - bar.n)
                if self.seconds - saved >= SAVE_SECONDS:
                    saved = self.seconds
                    self.save()
                if self._measure_due():
                    self._measure(HELD_OUT_BYTES)
                    self.seconds = time.perf_counter() - began

    def _note(self, losses: list[torch.Tensor]) -> float:
        """Empties the list and enters its mean into the history, in bits per byte."""
        bits = float(torch.stack(losses).mean()) / math.log(2)
        losses.clear()
        if not math.isfinite(bits):
            raise CommandError(
                f"the loss is no longer a number at step {self.step}: begin again with a smaller --lr "
                f"(now {self.settings.lr}); an earlier checkpoint stays as it was"
            )
        self.history.append({"step": self.step, "bytes": self._bytes_seen, "train": round(bits, 4)})
        return bits

    def _train_step(self) -> torch.Tensor:
        """One optimizer step on the rows of this step. Returns the loss, in nats per byte."""
        settings = self.settings
        inputs, targets = corpus.draw_rows(
            self.train_text, self.step, settings.batch, settings.row, settings.seed
        )
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * _schedule(self.progress)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            logits = self.model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def _measure_due(self) -> bool:
        last = next((e["seconds"] for e in reversed(self.history) if "held_out" in e), 0.0)
        return self.seconds - last >= HELD_OUT_SECONDS and self.progress < 1

    def _measure(self, most: int | None) -> float:
        bits = measure.model_bits(self.model, self.held_out_text, self.dtype, most=most)
        self.history.append(
            {
                "step": self.step,
                "bytes": self._bytes_seen,
                "held_out": round(bits, 4),
                "seconds": self.seconds,
            }
        )
        return bits

    def _held_out_note(self) -> str:
        last = next((e["held_out"] for e in reversed(self.history) if "held_out" in e), None)
        return "" if last is None else f", held-out {last:.3f}"

    @property
    def _step_bytes(self) -> int:
        return self.settings.batch * self.settings.row

    @property
    def _bytes_seen(self) -> int:
        return self.step * self._step_bytes

    def _seconds_left(self) -> float:
        return self.seconds * (1 / max(self.progress, 1e-9) - 1)

    def save(self) -> None:
        """Writes the checkpoint: all that a resumed run needs, since rows and rates follow from the step."""
        state = self.optimizer.state_dict()["state"]
        save_checkpoint(
            self.folder / CHECKPOINT,
            self.model,
            step=self.step,
            extra={
                f"optimizer.{i}.{key}": value for i, entry in state.items() for key, value in entry.items()
            },
            info={
                "settings": asdict(self.settings),
                "text": self.text.fingerprint,
                "seconds": self.seconds,
                "history": self.history,
            },
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes over position, history and optimizer of a checkpoint whose model this run has."""
        self.step = checkpoint.step
        self.seconds = checkpoint.info["seconds"]
        self.history = checkpoint.info["history"]
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in checkpoint.extra.items():
            _, i, key = name.split(".")
            state.setdefault(int(i), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def _report(self) -> None:
        """Prints the comparison, the picture's place and a sample."""
        bits = self._measure(None)
        baselines = {
            "gzip -9": measure.gzip_bits(self.text.held_out),
            "order-2 model": measure.order2_bits(self.text.train, self.text.held_out),
        }
        self.save()
        print(f"\nbits per byte on the {len(self.text.held_out):,} held-out bytes:")
        for name, value in (baselines | {f"this {self.settings.layer} model": bits}).items():
            print(f"  {name:20} {value:.3f}")
        title = f"{self.settings.layer} on {self.text.name}"
        print(curve.draw(self.folder / CURVE, self.history, baselines, title))
        prompt = self.text.held_out[:64]
        generator = torch.Generator().manual_seed(self.settings.seed)
        prompts = [list(prompt)]
        (tokens,) = generate(self.model, prompts, 320, temperature=0.7, top_p=0.95, generator=generator)
        print(f"\nsample, after the first {len(prompt)} held-out bytes:\n")
        print((prompt + bytes(tokens.tolist())).decode(errors="replace"))
        print(
            f"\ncheckpoint: {self.folder / CHECKPOINT}; more text: "
            f"python -m mamba_ops generate {self.folder / CHECKPOINT} --prompt 'def '",
            flush=True,
        )


def _schedule(progress: float) -> float:
    """Share of the highest learning rate: up over the first 3 %, then down a cosine to 2 %."""
    warm_up = 0.03
    if progress < warm_up:
        return (progress + 0.002) / (warm_up + 0.002)
    return 0.02 + 0.98 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up))) / 2


def _bar(done: float) -> Any:
    """A progress bar from done to 1; on a terminal redrawn often, in a log file a line now and then."""
    from tqdm import tqdm

    return tqdm(
        total=1.0,
        initial=done,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
        bar_format="{percentage:3.0f}%|{bar:20}| {desc}",
    )


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Within the block the first Ctrl-C or termination is only noted in the list; the second one acts."""
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        noted.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
