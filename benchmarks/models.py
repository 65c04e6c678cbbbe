"""Cases of whole models: against transformers' torch path, with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import baselines
from .cases import Case, Must
from .contenders import OURS, Contender, Inputs, Results, Run

D_MODEL, N_LAYER, VOCAB = 768, 2, 256
WHOLE_LAYERS, WHOLE_VOCAB = 24, 50280  # of the published models of 130 million parameters
PROMPT, LENGTH = 16, 1024
TRANSFORMERS = "transformers"


def cases() -> Iterator[Case]:
    """One token, a prompt, and a training step, for both layers; one token of a whole small model."""
    twice = Must("faster", 2, TRANSFORMERS)
    work = (("token", "one token", twice), ("prefill", f"prefill of {LENGTH} tokens", None))
    for layer, label, goal in (("mamba", "Mamba", 0.7), ("mamba2", "Mamba-2", 0.9)):
        inputs = partial(_inputs, layer)
        for kind, words, must in work:
            peers = Contender(TRANSFORMERS, partial(_theirs, kind)), Contender(OURS, partial(_ours, kind))
            yield Case(
                f"model/{kind}/{layer}",
                f"{label}, {N_LAYER} layers of d{D_MODEL}, batch 1, {words}",
                inputs,
                peers[::-1],
                None,
                must=must,
                goal_ms=goal if kind == "token" else None,
            )
        # transformers' own recurrence takes 134 s for a step of Mamba; with mambapy's scan it is bearable.
        name = TRANSFORMERS if layer == "mamba2" else "transformers with mambapy"
        step = f"{N_LAYER} layers of d{D_MODEL}, training step on {LENGTH} tokens, without optimiser"
        soon = Must("ms", 600 if layer == "mamba" else 400, "AMD EPYC")
        for tag, whose, ours in (
            ("", "", partial(_ours, "training")),
            ("-patched", "transformers' ", _patched),
        ):
            yield Case(
                f"model/training/{layer}{tag}",
                f"{whose}{label}, {step}",
                inputs,
                (Contender(OURS, ours), Contender(name, partial(_theirs, "training"))),
                None,
                must=soon,
            )
        for dtype in (torch.float32, torch.bfloat16):
            short = str(dtype).removeprefix("torch.")
            yield Case(
                f"model/token/{layer}/130m/{short}",
                f"{label}, {WHOLE_LAYERS} layers of d{D_MODEL} (130M), {short}, batch 1, one token",
                partial(_inputs, layer, WHOLE_LAYERS, WHOLE_VOCAB, dtype),
                tuple(
                    Contender(name, partial(run, "token"))
                    for name, run in ((OURS, _ours), (TRANSFORMERS, _theirs))
                ),
                None,
                dtype,
                must=Must("ms", 33.3, "AMD EPYC") if dtype == torch.bfloat16 else None,
            )


def _inputs(
    layer: str, n_layer: int = N_LAYER, vocab_size: int = VOCAB, dtype: torch.dtype = torch.float32
) -> Inputs:
    from mamba_ops.models import LanguageModel, LMConfig

    torch.manual_seed(0)
    config = LMConfig(vocab_size, D_MODEL, n_layer, layer)
    tokens = torch.randint(vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"config": config, "weights": LanguageModel(config, dtype=dtype).state_dict(), "tokens": tokens}


def _ours(kind: str, inputs: Inputs) -> Run:
    from mamba_ops.models import LanguageModel

    weights = inputs["weights"]
    model = LanguageModel(inputs["config"], dtype=weights["lm_head.weight"].dtype)
    model.load_state_dict(weights)
    tokens = inputs["tokens"]
    if kind == "training":
        return _training(model, tokens)
    cache = model.allocate_cache(1)
    with torch.no_grad():
        model.prefill(tokens[:, :PROMPT], cache)

    @torch.no_grad()
    def token() -> Results:
        return {"logits": model.step(tokens[:, PROMPT], cache)}

    @torch.no_grad()
    def prefill() -> Results:
        return {"logits": model.prefill(tokens, model.allocate_cache(1))}

    return token if kind == "token" else prefill


def _theirs(kind: str, inputs: Inputs) -> Run:
    config = inputs["config"]
    mambapy = kind == "training" and config.layer == "mamba"
    model = baselines.transformers_model(
        config.layer, config.d_model, config.n_layer, config.vocab_size, mambapy
    ).to(inputs["weights"]["lm_head.weight"].dtype)
    model.load_state_dict({k.replace("embedding.", "embeddings."): w for k, w in inputs["weights"].items()})
    tokens = inputs["tokens"]
    if kind == "training":
        return _training(model, tokens)
    with torch.no_grad():
        cache = model(tokens[:, :PROMPT], use_cache=True).cache_params
    one = tokens[:, PROMPT : PROMPT + 1]

    @torch.no_grad()
    def token() -> Results:
        return {"logits": model(one, cache_params=cache, use_cache=True).logits[:, -1]}

    @torch.no_grad()
    def prefill() -> Results:
        return {"logits": model(tokens, use_cache=True, logits_to_keep=1).logits[:, -1]}

    return token if kind == "token" else prefill


def _patched(inputs: Inputs) -> Run:
    """The training step of transformers' model with its functions replaced."""
    from mamba_ops import compat

    config = inputs["config"]
    shape = (config.d_model, config.n_layer, config.vocab_size)
    model = baselines.transformers_model(config.layer, *shape, use_mambapy=False)
    model.load_state_dict({k.replace("embedding.", "embeddings."): w for k, w in inputs["weights"].items()})
    step = _training(model, inputs["tokens"])

    def run() -> Results:
        with compat.patch_transformers():
            return step()

    return run


def _training(model: nn.Module, tokens: torch.Tensor) -> Run:
    """Forward and backward of the loss of the next token; compared in the gradients of the projections."""
    model.train()

    def run() -> Results:
        model.zero_grad(set_to_none=True)
        out: Any = model(tokens)
        logits = out if isinstance(out, torch.Tensor) else out.logits
        loss = F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:])
        torch.autograd.backward(loss)
        grads = {f"grad {name}": p.grad for name, p in model.named_parameters() if "_proj" in name}
        return {"loss": loss.detach()} | {name: g for name, g in grads.items() if g is not None}

    return run
