"""Autoregressive generation: one prefill of all prompts, then one-token steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .lm import LanguageModel

Prompts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]


def stream(
    model: LanguageModel,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Generates token by token; the cost of a token does not depend on its position.

    Args:
        model: the language model.
        prompts: (b, l) integer tensor, or b sequences of token ids of any lengths >= 1 (run as one pack).
        max_new_tokens: at most this many tokens are generated for each prompt.
        temperature: the logits are divided by it; 0: always the most likely token.
        top_k: sample among the k most likely tokens; None: all.
        top_p: sample among the most likely tokens that hold this share, in (0, 1], of the probability; at
            least one token stays. None: all.
        stop_token: a row ends after this token; generation ends when all rows have.
        generator: source of randomness, on the model's device.

    Yields:
        (b,) int64: the next token of each row; -1 in rows that have ended. The stop token itself is yielded.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, or a setting outside its range.

    >>> from mamba_ops.models import LanguageModel, LMConfig
    >>> model = LanguageModel(LMConfig(vocab_size=11, d_model=32, n_layer=1, layer="mamba"))
    >>> [t.shape[0] for t in stream(model, [[1, 2, 3], [4]], 2, temperature=0)]
    [2, 2]
    """
    if temperature < 0:
        raise ValueError(f"generate: temperature must be >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be >= 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be >= 0, got {max_new_tokens}")
    device = model.backbone.embedding.weight.device
    tokens, cu_seqlens, rows = _pack(prompts, model.config.vocab_size, device)
    steps = _steps(
        model, tokens, cu_seqlens, rows, max_new_tokens, temperature, top_k, top_p, stop_token, generator
    )
    return (step.clone() for step in steps)  # outside inference mode: ordinary tensors for the caller


def generate(
    model: LanguageModel,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
    generator: torch.Generator | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> list[Tensor]:
    """Generates until max_new_tokens or the stop token; arguments as in stream.

    Args:
        on_token: called with what stream yields, as soon as it is there.

    Returns:
        Per prompt its new tokens, (t,) int64, the stop token included.

    >>> from mamba_ops.models import LanguageModel, LMConfig
    >>> model = LanguageModel(LMConfig(vocab_size=11, d_model=32, n_layer=1))
    >>> [len(t) for t in generate(model, [[1, 2, 3], [4]], 5, temperature=0)]
    [5, 5]
    """
    steps = []
    for tokens in stream(
        model,
        prompts,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_token=stop_token,
        generator=generator,
    ):
        if on_token is not None:
            on_token(tokens)
        steps.append(tokens)
    if not steps:
        return [torch.empty(0, dtype=torch.long) for _ in prompts]
    return [row[row >= 0] for row in torch.stack(steps, dim=1)]


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one token a row from logits (b, vocab_size); settings as in stream. Returns (b,) int64."""
    if temperature == 0 or top_k == 1:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is None and top_p is None:
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)
    logits, order = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), dim=-1)
    probs = logits.softmax(dim=-1)
    if top_p is not None:
        above = probs.cumsum(dim=-1) - probs
        probs = probs.masked_fill(above >= top_p, 0.0)
    return order.gather(1, torch.multinomial(probs, 1, generator=generator)).squeeze(1)


@torch.inference_mode()
def _steps(
    model: LanguageModel,
    tokens: Tensor,
    cu_seqlens: Tensor | None,
    rows: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop_token: int | None,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    if max_new_tokens == 0 or rows == 0:
        return
    cache = model.allocate_cache(rows)
    logits = model.prefill(tokens, cache, cu_seqlens=cu_seqlens)
    running = torch.ones(rows, dtype=torch.bool, device=logits.device)
    for position in range(max_new_tokens):
        following = sample(logits, temperature, top_k, top_p, generator)
        yield following if stop_token is None else following.masked_fill(~running, -1)
        if stop_token is not None:
            running &= following != stop_token
            if not running.any():
                return
        if position + 1 < max_new_tokens:
            logits = model.step(following, cache)


def _pack(prompts: Prompts, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor | None, int]:
    """Tokens (b, l), or (1, total) with cu_seqlens (b + 1,) where the lengths differ; and b."""
    rows = [torch.as_tensor(row, dtype=torch.long, device=device) for row in prompts]
    for i, row in enumerate(rows):
        if row.dim() != 1 or not len(row):
            raise ValueError(f"generate: prompt {i} must be (l,) with l >= 1, got {tuple(row.shape)}")
        if not 0 <= int(row.min()) <= int(row.max()) < vocab_size:
            raise ValueError(
                f"generate: prompt {i} must hold tokens in 0..{vocab_size - 1}, "
                f"got {int(row.min())}..{int(row.max())}"
            )
    lengths = [len(row) for row in rows]
    if len(set(lengths)) <= 1:
        return torch.stack(rows) if rows else torch.empty(0, 0, dtype=torch.long), None, len(rows)
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)
    return torch.cat(rows).unsqueeze(0), ends, len(rows)
