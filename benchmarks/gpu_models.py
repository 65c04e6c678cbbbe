"""Cases of layers and of whole models on a GPU, beside mamba_ssm's where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import Case, Must
from .contenders import OURS, Contender, Fresh, Inputs, Results, Run

D_MODEL, TOKENS = 2560, (4, 4096)
WHOLE = {"d_model": 2560, "n_layer": 64, "vocab_size": 50288}  # of the published model of 2.7 billion
SMALL = {"d_model": 768, "n_layer": 24, "vocab_size": 50288}  # of that of 130 million
MAMBA_SSM = "mamba_ssm"
DEEP_LIMIT = 0.1  # relative error: what rounding to bfloat16 in 64 layers leaves in common

FIRST_STEP = f"""
import time, torch
torch.zeros(1, device="cuda").item()
from benchmarks.gpu_models import language_model, training_step
tokens = torch.randint(50000, (8, 2048), device="cuda")
step = training_step(language_model({{**{SMALL}, "layer": "mamba2"}}), tokens)
torch.cuda.synchronize()
begin = time.perf_counter()
step()
torch.cuda.synchronize()
print(1e3 * (time.perf_counter() - begin))
"""

# The slowest of the first calls of every operator, forward and backward.
FIRST_CALLS = """
import time, torch
import mamba_ops
from tests import cases
torch.ones(1, device="cuda", requires_grad=True).mul(2).backward(torch.ones(1, device="cuda"))
sizes = {
    "selective_scan": (1, 128, 512, 16), "ssd": (1, 512, 8, 64, 128), "causal_conv1d": (1, 128, 512),
    "rms_norm_gated": (512, 128), "causal_conv1d_update": (1, 128), "selective_state_update": (1, 128),
    "ssd_state_update": (1, 8, 64, 128),
}
times = []
for name, size in sizes.items():
    inputs = getattr(cases, name)(*size, dtype=torch.bfloat16, device="cuda")
    inputs = {k: v.requires_grad_() if k in "xu" and "state" not in inputs else v for k, v in inputs.items()}
    torch.cuda.synchronize()
    begin = time.perf_counter()
    y = getattr(mamba_ops, name)(**inputs)
    if y.requires_grad:
        y.backward(torch.ones_like(y))
    torch.cuda.synchronize()
    times.append(1e3 * (time.perf_counter() - begin))
print(max(times))
"""


def cases() -> Iterator[Case]:
    """Training of a layer, training and steps of the model of 2.7 billion, the first step of a small one.

    mamba_ssm's layers and models get the weights of ours, and ours must agree with their results.
    """
    for layer, name, must, goal in (("mamba2", "Mamba2", 7.2, 6.3), ("mamba", "Mamba", 9.5, 8.0)):
        yield _case(
            f"layer/both/{layer}",
            f"{name} layer of d{D_MODEL} on {TOKENS[0]} x {TOKENS[1]} tokens, forward + backward",
            partial(_layer, "mamba_ops", name),
            partial(_layer, "mamba_ssm", name),
            must=must,
            goal_ms=goal,
            make=partial(_layer_inputs, name),
        )
    yield _case(
        "model/training/mamba2/2.7b",
        "Mamba-2 of 2.7 billion, training step on 2 x 2048 tokens, without optimiser",
        lambda inputs: training_step(_ours(inputs), inputs["tokens"]),
        lambda inputs: training_step(_theirs(inputs), inputs["tokens"]),
        must=240,
        make=partial(_whole_inputs, 2, 2048),
        limit=DEEP_LIMIT,
    )
    for b, must in ((1, 2.0), (64, 6.0)):
        yield _case(
            f"model/token/mamba2/2.7b/b{b}",
            f"Mamba-2 of 2.7 billion, batch {b}, one token in a CUDA graph, states too",
            _token,
            _mamba_ssm_token,
            must=must,
            make=partial(_whole_inputs, b, 1),
            limit=DEEP_LIMIT,
        )
    for name, title, code, must in (
        (
            "model/first-training-step/mamba2/130m",
            "Mamba-2 of 130 million, first training step of a process, 8 x 2048 tokens",
            FIRST_STEP,
            2000,
        ),
        ("first-call", "the slowest first call of an operator in a process, small inputs", FIRST_CALLS, 50),
    ):
        yield _case(name, title, partial(_fresh, code), must=must)


def language_model(config: dict[str, Any]) -> nn.Module:
    """Ours in bfloat16 on the GPU, with random weights."""
    from mamba_ops.models import LanguageModel, LMConfig

    with torch.device("cuda"):
        return LanguageModel(LMConfig(**config), dtype=torch.bfloat16)


def training_step(model: nn.Module, tokens: Tensor) -> Run:
    """Forward and backward of the loss of the next token on (b, l) tokens."""
    first = "backbone.layers.0.mixer.in_proj.weight"  # its gradient has come through every layer

    def run() -> Results:
        model.zero_grad(set_to_none=True)
        out: Any = model(tokens)
        logits = out if isinstance(out, Tensor) else out.logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        return {"loss": loss.detach(), f"grad {first}": model.get_parameter(first).grad}

    return run


def _case(
    name: str,
    title: str,
    *contenders: Callable[[Inputs], Run],
    must: float,
    goal_ms: float | None = None,
    make: Callable[[], Inputs] = dict,
    limit: float | None = None,
) -> Case:
    """Ours and, where there is one, mamba_ssm's."""
    both = zip((OURS, MAMBA_SSM), contenders, strict=False)
    pairs = tuple(Contender(who, prepare) for who, prepare in both)
    demand = Must("ms", must, "H200")
    return Case(name, f"{title}; bfloat16", make, pairs, None, torch.bfloat16, demand, goal_ms, limit=limit)


def _fresh(code: str, inputs: Inputs) -> Run:
    return Fresh(code)


def _layer_inputs(name: str) -> Inputs:
    import mamba_ops

    torch.manual_seed(0)
    layer: nn.Module = getattr(mamba_ops, name)(D_MODEL, device="cuda", dtype=torch.bfloat16)
    x, dy = (torch.randn(*TOKENS, D_MODEL, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {"weights": layer.state_dict(), "x": x, "dy": dy}


def _layer(library: str, name: str, inputs: Inputs) -> Run:
    """Forward and backward to every weight and to the input."""
    layer: nn.Module = getattr(__import__(library), name)(D_MODEL, device="cuda", dtype=torch.bfloat16)
    layer.load_state_dict(inputs["weights"])
    leaves = {"x": inputs["x"].detach().requires_grad_(), **dict(layer.named_parameters())}

    def run() -> Results:
        y = layer(leaves["x"])
        grads = torch.autograd.grad(y, list(leaves.values()), inputs["dy"])
        return {"y": y.detach(), **{f"grad {n}": g for n, g in zip(leaves, grads, strict=True)}}

    return run


def _whole_inputs(b: int, l: int) -> Inputs:
    torch.manual_seed(0)
    weights = language_model({**WHOLE, "layer": "mamba2"}).state_dict()
    return {"weights": weights, "tokens": torch.randint(50000, (b, l), device="cuda")}


def _ours(inputs: Inputs) -> nn.Module:
    model = language_model({**WHOLE, "layer": "mamba2"})
    model.load_state_dict(inputs["weights"])
    return model


def _theirs(inputs: Inputs) -> nn.Module:
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    config = MambaConfig(**WHOLE, ssm_cfg={"layer": "Mamba2"})
    model: nn.Module = MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16)
    model.load_state_dict(inputs["weights"])
    return model


def _token(inputs: Inputs) -> Run:
    """A step after another one."""
    from mamba_ops.models import LanguageModel, Session

    model, tokens = _ours(inputs), inputs["tokens"][:, 0]
    assert isinstance(model, LanguageModel)
    session = Session(model, len(tokens), state_dtype=torch.bfloat16)
    session.step(tokens)

    def run() -> Results:
        return {"logits": session.step(tokens)}

    return run


def _mamba_ssm_token(inputs: Inputs) -> Run:
    """The same in mamba_ssm's own graph, whose capture leaves something in the states."""
    model, tokens = _theirs(inputs), inputs["tokens"]
    from mamba_ssm.utils.generation import update_graph_cache

    cache = update_graph_cache(model, None, len(tokens), seqlen_og=1, max_seqlen=2048)
    model.decoding_cache = cache  # the graph alone does not keep the weights that it reads
    positions = torch.ones_like(tokens)

    @torch.inference_mode()
    def run() -> Results:
        return {"logits": model.decoding_cache.run(tokens, positions, 1)[:, 0]}

    with torch.inference_mode():
        for states in cache.inference_params.key_value_memory_dict.values():
            for state in states:
                state.zero_()
    run()
    return run
