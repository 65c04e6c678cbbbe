"""Generation in one call; a Session does the same piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .lm import LanguageModel
from .session import Prompts, Session


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
    state_dtype: torch.dtype | None = None,
) -> Iterator[Tensor]:
    """Generates token by token, at a cost that does not grow with the position, but for unlimited attention.

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
        state_dtype: of the recurrent states; None: float32. See Mamba2.allocate_cache.

    Yields:
        (b,) int64: the next token of each row; -1 in rows that have ended. The stop token itself is yielded.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, or a setting outside its range.

    >>> from mamba_ops.models import LanguageModel, LMConfig
    >>> model = LanguageModel(LMConfig(vocab_size=11, d_model=32, n_layer=1, layer="mamba"))
    >>> [t.shape[0] for t in stream(model, [[1, 2, 3], [4]], 2, temperature=0)]
    [2, 2]
    """
    longest = max((len(row) for row in prompts), default=0) + max(max_new_tokens, 0)
    session = Session(model, len(prompts), max_length=longest, state_dtype=state_dtype)
    return session.stream(
        prompts,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_token=stop_token,
        generator=generator,
    )


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
    state_dtype: torch.dtype | None = None,
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
        state_dtype=state_dtype,
    ):
        if on_token is not None:
            on_token(tokens)
        steps.append(tokens)
    if not steps:
        return [torch.empty(0, dtype=torch.long) for _ in prompts]
    return [row[row >= 0] for row in torch.stack(steps, dim=1)]
