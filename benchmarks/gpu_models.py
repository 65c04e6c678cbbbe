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

FIRST_STEP = f"""
import time, torch
torch.zeros(1, device="cuda").item()
from benchmarks.gpu_models import language_model, training_step
step = training_step(language_model({{**{SMALL}, "layer": "mamba2"}}), (8, 2048))
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
    """Training of a layer, training and steps of the model of 2.7 billion, the first step of a small one."""
    for layer, name, must, goal in (("mamba2", "Mamba2", 7.2, 6.3), ("mamba", "Mamba", 9.5, 8.0)):
        yield _case(
            f"layer/both/{layer}",
            f"{name} layer of d{D_MODEL} on {TOKENS[0]} x {TOKENS[1]} tokens, forward + backward",
            Contender(OURS, partial(_layer, "mamba_ops", name)),
            Contender(MAMBA_SSM, partial(_layer, "mamba_ssm", name)),
            must=must,
            goal_ms=goal,
        )
    yield _case(
        "model/training/mamba2/2.7b",
        "Mamba-2 of 2.7 billion, training step on 2 x 2048 tokens, without optimiser",
        Contender(OURS, lambda _: training_step(language_model({**WHOLE, "layer": "mamba2"}), (2, 2048))),
        Contender(MAMBA_SSM, lambda _: training_step(_mamba_ssm_model(), (2, 2048))),
        must=240,
    )
    for b, must in ((1, 2.0), (64, 6.0)):
        yield _case(
            f"model/token/mamba2/2.7b/b{b}",
            f"Mamba-2 of 2.7 billion, batch {b}, one token in a CUDA graph, states too",
            Contender(OURS, partial(_token, b)),
            must=must,
        )
    yield _case(
        "model/first-training-step/mamba2/130m",
        "Mamba-2 of 130 million, first training step of a process, 8 x 2048 tokens",
        Contender(OURS, lambda _: Fresh(FIRST_STEP)),
        must=2000,
    )
    yield _case(
        "first-call",
        "the slowest first call of an operator in a process, small inputs",
        Contender(OURS, lambda _: Fresh(FIRST_CALLS)),
        must=50,
    )


def language_model(config: dict[str, Any]) -> nn.Module:
    """Ours in bfloat16 on the GPU, with random weights."""
    from mamba_ops.models import LanguageModel, LMConfig

    with torch.device("cuda"):
        return LanguageModel(LMConfig(**config), dtype=torch.bfloat16)


def training_step(model: nn.Module, tokens: tuple[int, int]) -> Run:
    """Forward and backward of the loss of the next token on b x l tokens."""
    ids = torch.randint(50000, tokens, device="cuda")

    def run() -> Results:
        model.zero_grad(set_to_none=True)
        out: Any = model(ids)
        logits = out if isinstance(out, Tensor) else out.logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        torch.autograd.backward(loss)
        return {}

    return run


def _case(
    name: str,
    title: str,
    *contenders: Contender,
    must: float,
    goal_ms: float | None = None,
    make: Callable[[], Inputs] = dict,
) -> Case:
    demand = Must("ms", must, "H200")
    return Case(name, f"{title}; bfloat16", make, contenders, None, torch.bfloat16, demand, goal_ms)


def _layer(library: str, name: str, inputs: Inputs) -> Run:
    """Forward and backward to every weight and to the input."""
    module = __import__(library)
    torch.manual_seed(0)
    layer: nn.Module = getattr(module, name)(D_MODEL, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(*TOKENS, D_MODEL, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = torch.ones_like(x)

    def run() -> Results:
        torch.autograd.grad(layer(x), [x, *layer.parameters()], weights)
        return {}

    return run


def _mamba_ssm_model() -> nn.Module:
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    config = MambaConfig(**WHOLE, ssm_cfg={"layer": "Mamba2"})
    model: nn.Module = MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16)
    return model


def _token(b: int, inputs: Inputs) -> Run:
    from mamba_ops.models import Session

    session = Session(language_model({**WHOLE, "layer": "mamba2"}), b, state_dtype=torch.bfloat16)
    tokens = torch.randint(50000, (b,), device="cuda")
    session.step(tokens)

    def run() -> Results:
        session.step(tokens)
        return {}

    return run
