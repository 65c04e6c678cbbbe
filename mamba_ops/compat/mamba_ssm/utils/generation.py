"""mamba_ssm.utils.generation: sampling, and decoding with states, on GPUs in a captured graph if asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


@dataclass
class InferenceParams:
    """What a model keeps while it generates; key_value_memory_dict holds each layer's states by its index."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Back to the first token; the states keep their storage."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def modify_logits_for_min_p_filtering(logits: Tensor, min_p: float) -> None:
    """-inf, in place, where the logit is below min_p."""
    if 0.0 < min_p < 1.0:
        logits.masked_fill_(logits < min_p, float("-inf"))


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """-inf, in place, for all but the top_k logits."""
    logits.masked_fill_(logits < torch.topk(logits, top_k)[0][..., -1, None], float("-inf"))


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """-inf, in place, for what the most probable tokens with top_p of the probability leave."""
    if not 0.0 < top_p < 1.0:
        return
    ordered, indices = torch.sort(logits, descending=False)
    remove = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    logits.masked_fill_(remove.scatter(1, indices, remove), float("-inf"))


def modify_logit_for_repetition_penalty(
    logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0
) -> Tensor:
    """Makes the tokens so far less likely, in place (Keskar et al. 2019). logits (batch, vocab)."""
    if repetition_penalty == 1.0:
        return logits
    score = torch.gather(logits, 1, prev_output_tokens)
    score = torch.where(score < 0, score * repetition_penalty, score / repetition_penalty)
    return logits.scatter_(1, prev_output_tokens, score)


def sample(
    logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0
) -> Tensor:
    """A token for each row of logits (batch, vocab); top_k 1: the most probable, 0: from all.

    Unlike the original: min_p is a share of the largest probability (there: logits below min_p go).
    """
    if top_k == 1:
        return logits.argmax(dim=-1)
    if top_p > 0.0:
        assert top_p <= 1.0, "top-p should be in (0, 1]."
    if top_k > 0:
        chosen, indices = torch.topk(logits, min(top_k, logits.shape[-1]), dim=-1)
    else:
        chosen, indices = logits.clone(), None
        if 0.0 < min_p < 1.0:
            floor = chosen.softmax(-1).amax(-1, keepdim=True) * min_p
            chosen.masked_fill_(chosen.softmax(-1) < floor, float("-inf"))
    chosen = chosen / temperature if temperature != 1.0 else chosen
    modify_logits_for_top_p_filtering(chosen, top_p)
    picked = torch.multinomial(torch.softmax(chosen, dim=-1), num_samples=1)
    return (picked if indices is None else indices.gather(1, picked)).squeeze(-1)


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    streamer: Any = None,
) -> Any:
    """Extends input_ids (batch, seqlen), rows of one length, to max_length or until every row has ended.

    Args:
        top_k, top_p, min_p, temperature: as for `sample`.
        teacher_outputs: (batch, length): tokens to take instead of sampled ones, as far as they go.
        vocab_size: of the tokens to choose from, where the head is padded.
        cg: replay steps from a captured graph; no effect on the CPU.
        enable_timing: print how long it took.
        streamer: has put(tokens) and end().

    Returns:
        An object with sequences (batch, max_length) and scores, a tuple of (batch, vocab).
    """
    if streamer is not None:
        streamer.put(input_ids.cpu())
    batch, prompt = input_ids.shape
    cg = cg and input_ids.is_cuda
    if cg:
        cache = update_graph_cache(model, getattr(model, "_decoding_cache", None), batch, prompt, max_length)
        model._decoding_cache = cache
        params = cache.inference_params
        params.reset(max_length, batch)
    else:
        params = InferenceParams(max_seqlen=max_length, max_batch_size=batch)

    def next_logits(tokens: Tensor) -> Tensor:
        offset = params.seqlen_offset
        positions = None
        if offset > 0:
            positions = torch.full((batch, 1), offset, dtype=torch.long, device=tokens.device)
        if cg and offset > 0:
            logits: Tensor = model._decoding_cache.run(tokens, positions, offset).squeeze(1)
        else:
            out = model(tokens, position_ids=positions, inference_params=params, num_last_tokens=1)
            logits = out.logits.squeeze(1)
        return logits if vocab_size is None else logits[..., :vocab_size]

    def next_tokens(logits: Tensor, so_far: list[Tensor]) -> Tensor:
        place = params.seqlen_offset
        if teacher_outputs is not None and teacher_outputs.shape[1] > place:
            return teacher_outputs[:, place : place + 1]
        if repetition_penalty != 1.0:
            seen = torch.cat(so_far, dim=1)
            logits = modify_logit_for_repetition_penalty(logits.clone(), seen, repetition_penalty)
        return sample(logits, top_k, top_p, min_p, temperature).unsqueeze(1)

    begin = time.perf_counter()
    scores: list[Tensor] = []
    sequences = [input_ids]
    while params.seqlen_offset == 0 or (
        params.seqlen_offset < max_length - 1
        and not (eos_token_id is not None and bool((sequences[-1] == eos_token_id).all()))
    ):
        scores.append(next_logits(sequences[-1]))
        params.seqlen_offset += sequences[-1].shape[1]
        sequences.append(next_tokens(scores[-1], sequences))
        if streamer is not None:
            streamer.put(sequences[-1].cpu())
    if streamer is not None:
        streamer.end()
    if enable_timing:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        print(f"Prompt processing + decoding time: {(time.perf_counter() - begin) * 1000:.0f}ms")
    return _output(top_k)(sequences=torch.cat(sequences, dim=1), scores=tuple(scores))


def _output(top_k: int) -> Any:
    """What transformers calls the result, or a plain object without transformers."""
    try:
        from transformers.generation.utils import GenerateDecoderOnlyOutput
    except ImportError:
        return SimpleNamespace
    return GenerateDecoderOnlyOutput


class GenerationMixin:
    """generate() for a model with allocate_inference_cache."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The states of every layer, by its index."""
        raise NotImplementedError

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`decode` with this model: sequences, or with return_dict_in_generate the whole result."""
        output = decode(input_ids, self, max_length, top_k, top_p, min_p, temperature, **kwargs)
        if not output_scores:
            output.scores = None
        return output if return_dict_in_generate else output.sequences


@dataclass
class DecodingCGCache:
    """The captured steps of a model, by (batch size, tokens), and the states that they work on."""

    max_batch_size: int = 0
    max_seqlen: int = 0
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    callables: dict[tuple[int, int], Callable[[Tensor, Tensor, int], Tensor]] = field(default_factory=dict)
    mempool: Any = None
    inference_params: Any = None
    run: Any = None


@torch.inference_mode()
def update_graph_cache(
    model: Any,
    cache: DecodingCGCache | None,
    batch_size: int,
    seqlen_og: int,
    max_seqlen: int,
    decoding_seqlens: Sequence[int] = (1,),
    dtype: torch.dtype | None = None,
    n_warmups: int = 2,
) -> DecodingCGCache:
    """The cache with steps captured for batch_size; made anew where it is too small or of another dtype."""
    cache = cache or DecodingCGCache()
    weight = next(iter(model.parameters()))
    device, dtype = weight.device, dtype or weight.dtype
    fits = batch_size <= cache.max_batch_size and max_seqlen <= cache.max_seqlen
    if not fits or (cache.device, cache.dtype) != (device, dtype):
        cache.callables.clear()
        cache.device, cache.dtype = device, dtype
        cache.max_batch_size, cache.max_seqlen = batch_size, max_seqlen
        cache.inference_params = InferenceParams(
            max_seqlen=max_seqlen,
            max_batch_size=batch_size,
            seqlen_offset=seqlen_og,
            key_value_memory_dict=model.allocate_inference_cache(batch_size, max_seqlen, dtype),
            lengths_per_sample=torch.full((batch_size,), seqlen_og, dtype=torch.int32, device=device),
        )
        cache.mempool = torch.cuda.graphs.graph_pool_handle()
    for tokens in decoding_seqlens:
        if (batch_size, tokens) not in cache.callables:
            cache.callables[batch_size, tokens] = capture_graph(
                model, cache.inference_params, batch_size, max_seqlen, tokens, cache.mempool, n_warmups
            )

    def run(input_ids: Tensor, position_ids: Tensor, seqlen: int) -> Tensor:
        return cache.callables[input_ids.shape[0], input_ids.shape[1]](input_ids, position_ids, seqlen)

    cache.run = run
    cache.inference_params.seqlen_offset = 0
    return cache


def capture_graph(
    model: Any,
    inference_params: InferenceParams,
    batch_size: int,
    max_seqlen: int,
    decoding_seqlen: int = 1,
    mempool: Any = None,
    n_warmups: int = 2,
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """A step of the model as a CUDA graph: (input_ids, position_ids, seqlen) to logits."""
    device = next(iter(model.parameters())).device
    input_ids = torch.zeros(batch_size, decoding_seqlen, dtype=torch.long, device=device)
    position_ids = torch.zeros_like(input_ids)
    offset = inference_params.seqlen_offset
    inference_params.seqlen_offset = max_seqlen - decoding_seqlen
    assert inference_params.lengths_per_sample is not None
    inference_params.lengths_per_sample[:] = inference_params.seqlen_offset

    def step() -> Tensor:
        logits: Tensor = model(
            input_ids,
            position_ids=position_ids,
            inference_params=inference_params,
            num_last_tokens=decoding_seqlen,
        ).logits
        return logits

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(n_warmups):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=mempool):
        logits = step()

    def run(new_input_ids: Tensor, new_position_ids: Tensor, seqlen: int) -> Tensor:
        assert inference_params.lengths_per_sample is not None
        inference_params.lengths_per_sample[:] = seqlen
        input_ids.copy_(new_input_ids)
        position_ids.copy_(new_position_ids)
        graph.replay()
        return logits.clone()

    inference_params.seqlen_offset = offset
    return run
