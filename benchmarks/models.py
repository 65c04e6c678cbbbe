"""Cases of whole models: two layers of width 768 against transformers' torch path, with the same weights."""

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
PROMPT, LENGTH = 16, 1024
TRANSFORMERS = "transformers"


def cases() -> Iterator[Case]:
    """One token, a prompt, and a training step, for both layers."""
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
        yield Case(
            f"model/training/{layer}",
            f"{label}, {N_LAYER} layers of d{D_MODEL}, training step on {LENGTH} tokens, without optimiser",
            inputs,
            (Contender(OURS, partial(_ours, "training")), Contender(name, partial(_theirs, "training"))),
            None,
        )


def _inputs(layer: str) -> Inputs:
    from mamba_ops.models import LanguageModel, LMConfig

    torch.manual_seed(0)
    model = LanguageModel(LMConfig(VOCAB, D_MODEL, N_LAYER, layer))
    tokens = torch.randint(VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"layer": layer, "weights": model.state_dict(), "tokens": tokens}


def _ours(kind: str, inputs: Inputs) -> Run:
    from mamba_ops.models import LanguageModel, LMConfig

    model = LanguageModel(LMConfig(VOCAB, D_MODEL, N_LAYER, inputs["layer"]))
    model.load_state_dict(inputs["weights"])
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
    mambapy = kind == "training" and inputs["layer"] == "mamba"
    model = baselines.transformers_model(inputs["layer"], D_MODEL, N_LAYER, VOCAB, mambapy)
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
