"""Conversations with a language model: fed, continued, saved, rolled back."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..nn import AttentionCache
from ..nn.cache import STATE_DTYPES
from .checkpoint import CheckpointError, read_safetensors, replacing, require_safetensors, write_safetensors
from .graph import StepGraph
from .lm import LanguageModel, Pass
from .sampling import Sampling
from .state import ModelCache

Prompts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]
FORMAT = "mamba_ops.session.1"
CACHE = "cache."
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STATE_DTYPES}


class Session:
    """b sequences that a model continues, side by side.

    The states do not grow with the tokens (those of attention without a window have room for max_length), and
    they stay where they are: on a GPU the steps are captured in a CUDA graph at the first of them.

    Args:
        model: the language model; its weights must keep their storage.
        batch_size: b.
        max_length: tokens that a sequence can have in all; needed where attention has no window.
        graph: whether steps run in a CUDA graph; None: on a GPU.
        state_dtype: of the recurrent states; None: float32. See Mamba2.allocate_cache.

    Attributes:
        cache: the states.
        logits: (b, vocab_size) of the token after the last one fed; None before any, or where tokens pend.
        pending: (b,) tokens that stream has drawn last and not fed yet, or None.

    >>> from mamba_ops.models import LanguageModel, LMConfig
    >>> session = Session(LanguageModel(LMConfig(vocab_size=11, d_model=32, n_layer=1)), 2)
    >>> first = session.generate([[1, 2, 3], [4]], 5)
    >>> more = session.generate([[5], [6, 7]], 5)  # goes on from all of that
    """

    def __init__(
        self,
        model: LanguageModel,
        batch_size: int,
        *,
        max_length: int | None = None,
        graph: bool | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.cache = model.allocate_cache(batch_size, max_length=max_length, state_dtype=state_dtype)
        self.logits: Tensor | None = None
        self.pending: Tensor | None = None
        self._max_length, self._state_dtype = max_length, state_dtype
        self._device = model.backbone.embedding.weight.device
        self._captures = self._device.type == "cuda" if graph is None else graph
        if self._captures and self._device.type != "cuda":
            raise ValueError(f"Session: graph needs a model on a GPU, got one on {self._device}")
        self._graph: StepGraph | None = None
        self._scored: _Scored | None = None
        self._before: ModelCache | None = None

    @property
    def batch_size(self) -> int:
        return self.cache.batch_size

    def reset(self) -> None:
        """Forgets every token."""
        self.cache.reset()
        self.logits = self.pending = self._scored = None

    @torch.inference_mode()
    def extend(self, prompts: Prompts) -> Tensor:
        """Feeds further tokens, in one pass, after those that pend.

        Args:
            prompts: (b, l) integer tensor, or b sequences of token ids of any lengths.

        Returns:
            logits (b, vocab_size) of the token after each row's last.

        Raises:
            ValueError: a row without any token, or a token outside the vocabulary.
        """
        rows = self._rows(prompts)
        if self.pending is not None:
            drawn = torch.split(self.pending.cpu(), 1)
            rows = [torch.cat(pair) for pair in zip(drawn, rows, strict=True)]
        if self.logits is not None and not any(map(len, rows)):
            return self.logits
        for i, row in enumerate(rows):
            if not len(row):
                raise ValueError(f"generate: prompt {i} must be (l,) with l >= 1, got {tuple(row.shape)}")
        tokens, cu_seqlens = self._joined(rows)
        logits = self.model.prefill(tokens, self.cache, cu_seqlens=cu_seqlens)
        self.logits, self.pending, self._scored = logits, None, None
        return logits

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Feeds one token a row, (b,) integer, unchecked. Returns logits (b, vocab_size)."""
        if self.pending is not None:
            return self.extend(tokens[:, None])
        return self._fed(tokens.to(self._device)).clone()

    def stream(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_token: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Feeds the prompts and draws tokens; arguments, yields and errors as generation.stream.

        The token drawn last pends: the next call feeds it before its prompts, which may be empty therefore. A
        row that has ended stays as it was then, whatever the other rows go on with.
        """
        sampling = Sampling(temperature, top_k, top_p, generator)
        if max_new_tokens < 0:
            raise ValueError(f"generate: max_new_tokens must be >= 0, got {max_new_tokens}")
        if len(prompts) and (max_new_tokens or any(map(len, prompts))):
            self.extend(prompts)
        drawn = self._draws(max_new_tokens, sampling, stop_token)
        return (tokens.clone() for tokens in drawn)  # outside inference mode: ordinary tensors for the caller

    def generate(self, prompts: Prompts, max_new_tokens: int, **settings: Any) -> list[Tensor]:
        """All that stream yields with these settings: per prompt its new tokens, (t,) int64."""
        steps = list(self.stream(prompts, max_new_tokens, **settings))
        if not steps:
            return [torch.empty(0, dtype=torch.long) for _ in prompts]
        return [row[row >= 0] for row in torch.stack(steps, dim=1)]

    @torch.inference_mode()
    def score(self, drafts: Tensor) -> Tensor:
        """Feeds k drafted tokens a row, to be kept in part: logits after each of them, in one pass.

        Args:
            drafts: (b, k) integer, k >= 1. The first is usually the token drawn from the logits so far, the
                others are guesses of those that follow.

        Returns:
            (b, k, vocab_size).
        """
        if self.logits is None:
            raise ValueError("Session.score: logits must be known; feed a prompt and all drawn tokens first")
        if drafts.dim() != 2 or drafts.shape[1] < 1:
            raise ValueError(f"Session.score: drafts must be (b, k) with k >= 1, got {tuple(drafts.shape)}")
        rows = self._rows(drafts)
        if self._before is None:
            self._before = self.cache.clone()
        else:
            self._before.copy_from(self.cache)
        scores: Tensor = self.model(torch.stack(rows).to(self._device), cache=self.cache)
        self._scored = _Scored(rows, scores, self.logits)
        self.logits = scores[:, -1]
        return scores.clone()

    @torch.inference_mode()
    def keep(self, counts: Sequence[int]) -> None:
        """Goes back to where only the first counts[i] of the drafts scored last were fed to row i.

        The states before the drafts come back, and the tokens kept run once more, in one pass over all rows.
        """
        scored = self._scored
        if scored is None or self._before is None:
            raise ValueError("Session.keep: no drafts have been scored since other tokens were fed")
        k = scored.scores.shape[1]
        if len(counts) != self.batch_size or not all(0 <= count <= k for count in counts):
            raise ValueError(
                f"Session.keep: counts must be {self.batch_size} numbers in 0..{k}, got {list(counts)}"
            )
        self._scored = None
        if all(count == k for count in counts):
            return
        self.cache.copy_from(self._before)
        if any(counts):
            kept = [row[:count] for row, count in zip(scored.drafts, counts, strict=True)]
            tokens, cu_seqlens = self._joined(kept)
            self.model.backbone(tokens, Pass(self.cache, None, cu_seqlens))
        every = torch.cat([scored.earlier[:, None], scored.scores], dim=1)
        self.logits = every[torch.arange(self.batch_size), torch.tensor(counts)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the states to a file, atomically, for load to go on from.

        Raises:
            CheckpointError: safetensors is not installed.
            OSError: the file cannot be written; an earlier one stays.
        """
        require_safetensors()
        tensors = {CACHE + name: t for name, t in self.cache.tensors().items()}
        tensors |= {
            name: t for name, t in (("logits", self.logits), ("pending", self.pending)) if t is not None
        }
        metadata = {
            "format": FORMAT,
            "model": json.dumps(_identity(self.model)),
            "batch_size": str(self.batch_size),
            "max_length": json.dumps(self._max_length),
            "state_dtype": str(self._state_dtype).removeprefix("torch."),
            "seen": json.dumps([cache.seen for cache in self.cache if isinstance(cache, AttentionCache)]),
        }
        with replacing(path) as temporary:
            write_safetensors(
                {name: t.clone().contiguous() for name, t in tensors.items()}, temporary, metadata
            )

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: LanguageModel, *, graph: bool | None = None
    ) -> Session:
        """The session that save has written, on the device of the model, which must be the one of then.

        Raises:
            CheckpointError: no such file, or not a whole one of save; or one of another model.
        """
        device = model.backbone.embedding.weight.device
        tensors, metadata = read_safetensors(path, device)
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} is no saved session (its metadata lacks format {FORMAT})")
        try:
            if json.loads(metadata["model"]) != json.loads(json.dumps(_identity(model))):
                raise CheckpointError(f"{path} was saved with another model: another config or other weights")
            stored = metadata.get("state_dtype", "None")
            session = cls(
                model,
                int(metadata["batch_size"]),
                max_length=json.loads(metadata["max_length"]),
                graph=graph,
                state_dtype=None if stored == "None" else DTYPES[stored],
            )
            seen = iter(json.loads(metadata["seen"]))
            for name, mine in session.cache.tensors().items():
                theirs = tensors[CACHE + name]
                if (theirs.shape, theirs.dtype) != (mine.shape, mine.dtype):
                    raise CheckpointError(
                        f"{path}: {name} must be {mine.dtype} {tuple(mine.shape)}, "
                        f"got {theirs.dtype} {tuple(theirs.shape)}"
                    )
                mine.copy_(theirs)
            for cache in session.cache:
                if isinstance(cache, AttentionCache):
                    cache.seen = int(next(seen))
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            raise CheckpointError(f"{path} is not a whole saved session: {error!r}") from error
        session.logits, session.pending = tensors.get("logits"), tensors.get("pending")
        return session

    def _fed(self, tokens: Tensor) -> Tensor:
        """One token a row; the logits may be overwritten by the next call."""
        if self._captures and self._graph is None:
            self._graph = StepGraph(self.model, self.cache)
        step = self.model.step(tokens, self.cache) if self._graph is None else self._graph.step(tokens)
        self.logits, self.pending, self._scored = step, None, None
        return step

    def _known(self) -> Tensor:
        """The logits of the next token, after feeding the one that pends."""
        if self.logits is not None:
            return self.logits
        if self.pending is None:
            raise ValueError("Session: nothing was fed yet")
        return self._fed(self.pending)

    @torch.inference_mode()
    def _draws(self, count: int, sampling: Sampling, stop_token: int | None) -> Iterator[Tensor]:
        """The loop of stream. Yields tensors of inference mode."""
        if self.batch_size == 0:
            return
        running = torch.ones(self.batch_size, dtype=torch.bool, device=self._device)
        ended: list[tuple[Tensor, ModelCache]] = []
        try:
            for _ in range(count):
                logits = self._known()
                tokens = sampling.draw(logits)
                shown = tokens
                if stop_token is not None:
                    tokens = tokens.where(running, stop_token)
                    shown = tokens.masked_fill(~running, -1)
                    stopped = running & (tokens == stop_token)
                    rows = stopped.nonzero().squeeze(1)
                    if len(rows):
                        ended.append((rows, self.cache.select(rows)))
                    running &= ~stopped
                self.logits, self.pending, self._scored = None, tokens, None
                yield shown
                if stop_token is not None and not running.any():
                    return
        finally:
            for rows, cache in ended:
                self.cache.put(rows, cache)

    def _rows(self, prompts: Prompts) -> list[Tensor]:
        """The prompts as int64 tensors on the CPU, checked."""
        if len(prompts) != self.batch_size:
            raise ValueError(f"generate: there must be {self.batch_size} prompts, got {len(prompts)}")
        vocab_size = self.model.config.vocab_size
        given = [torch.as_tensor(row, device="cpu") for row in prompts]
        rows = [row.long() for row in given]
        for i, row in enumerate(rows):
            if given[i].numel() and given[i].is_floating_point():
                raise ValueError(f"generate: prompt {i} must hold integers, got {given[i].dtype}")
            if row.dim() != 1:
                raise ValueError(f"generate: prompt {i} must be (l,), got {tuple(row.shape)}")
            if len(row) and not 0 <= int(row.min()) <= int(row.max()) < vocab_size:
                raise ValueError(
                    f"generate: prompt {i} must hold tokens in 0..{vocab_size - 1}, "
                    f"got {int(row.min())}..{int(row.max())}"
                )
        return rows

    def _joined(self, rows: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Tokens (b, l), or (1, total) with cu_seqlens (b + 1,) where the lengths differ, on the device."""
        lengths = [len(row) for row in rows]
        if len(set(lengths)) == 1:
            return torch.stack(rows).to(self._device), None
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return torch.cat(rows)[None].to(self._device), ends.to(self._device)


@dataclass
class _Scored:
    """What keep needs of the last score: the drafts, the logits after each, and those before the first."""

    drafts: list[Tensor]
    scores: Tensor
    earlier: Tensor


def _identity(model: LanguageModel) -> dict[str, Any]:
    """What tells one model from another: its config, and a hash of samples of its weights."""
    samples = torch.cat([p.detach().flatten()[:64].float() for p in model.parameters()]).cpu()
    digest = hashlib.sha256(bytes(samples.view(torch.uint8).tolist())).hexdigest()
    return {"config": model.config.to_dict(), "weights": digest}
