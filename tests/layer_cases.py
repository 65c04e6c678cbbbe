"""Inputs of the two operators that are a whole layer but for its input projection; as in ``cases``."""

import math
from collections.abc import Collection

import torch

from tests.cases import LIMITS, RATES, Draw, Inputs

LAYER_OPERATORS = ("mamba_inner", "mamba_split_conv1d_scan")
INNER_OPTIONS = (
    "conv1d_bias",
    "out_proj_bias",
    "D",
    "delta_bias",
    "B_proj_bias",
    "C_proj_bias",
    "b_rms_weight",
    "c_rms_weight",
    "dt_rms_weight",
    "conv_state",
    "initial_state",
    "return_final_states",
)
SPLIT_OPTIONS = (
    "conv1d_bias",
    "dt_bias",
    "D",
    "dt_limit",
    "mask_negative",
    "rmsnorm_weight",
    "outproj_weight",
    "outproj_bias",
    "conv_state",
    "initial_state",
    "return_final_states",
)
LOSS = ("y", "conv_state", "final_state")


def mamba_inner(
    b: int = 2,
    d: int = 6,
    l: int = 17,
    n: int = 4,
    *,
    r: int = 2,
    m: int = 5,
    w: int = 4,
    given: Collection[str] = (),
    complex_A: bool = False,
    options: Collection[str] = (),
    pack: str | None = None,
    decay: str = "weak",
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    params: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """given: which of "B" and "C" are constant (d, n) instead of projected. Weights are in dtype."""
    draw = Draw(seed, dtype, params, device, layout)
    width = 2 * n if complex_A else n
    A = -draw.log_uniform(*RATES[decay], d, n)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return draw._to(draw.normal(rows, columns) / math.sqrt(columns), dtype)

    inputs: Inputs = {
        "xz": draw.data(draw.normal(b, 2 * d, l)),
        "conv1d_weight": draw.parameter(draw.normal(d, w) / math.sqrt(w)),
        "conv1d_bias": draw.parameter(draw.normal(d)) if "conv1d_bias" in options else None,
        "x_proj_weight": weight(r + width * (2 - len(given)), d),
        "delta_proj_weight": weight(d, r),
        "out_proj_weight": weight(m, d),
        "out_proj_bias": draw.parameter(draw.normal(m)) if "out_proj_bias" in options else None,
        "A": draw.parameter(torch.complex(A, 3 * draw.normal(d, n)) if complex_A else A),
        **draw.pack(pack, b, l),
    }
    for name in given:
        inputs[name] = draw.parameter(draw.normal(d, n, complex_=complex_A))
    rows = inputs["cu_seqlens"].numel() - 1 if pack == "cu_seqlens" else b
    sizes = {"D": d, "delta_bias": d, "B_proj_bias": width, "C_proj_bias": width}
    sizes |= {"b_rms_weight": n, "c_rms_weight": n, "dt_rms_weight": d}
    for name, size in sizes.items():
        of_given = name[0].upper() in given and name not in ("D",)
        if name in options and not of_given and not (complex_A and name in ("b_rms_weight", "c_rms_weight")):
            inputs[name] = draw.parameter((1 if "rms" in name else 0) + 0.3 * draw.normal(size))
    if any("rms" in name for name in inputs):
        inputs["rms_eps"] = 0.1  # with next to none the norm of one column's multiples has no gradient
    if "conv_state" in options:
        inputs["conv_state"] = draw.data(draw.normal(rows, d, w - 1))
    if "initial_state" in options:
        inputs["initial_state"] = draw.state(draw.normal(rows, d, n, complex_=complex_A))
    if "return_final_states" in options:
        inputs["return_final_states"] = True
    return inputs


def mamba_split_conv1d_scan(
    b: int = 2,
    l: int = 17,
    h: int = 4,
    p: int = 3,
    n: int = 5,
    *,
    g: int = 1,
    k: int = 0,
    m: int = 5,
    w: int = 4,
    activation: str | None = "silu",
    norm_before_gate: bool = False,
    D_per_channel: bool = False,
    options: Collection[str] = (),
    pack: str | None = None,
    decay: str = "weak",
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    params: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    draw = Draw(seed, dtype, params, device, layout)
    d, conv = h * p, h * p + 2 * g * n
    bias = draw.normal(h)
    rest = draw.normal(b, l, 2 * k + d + conv)
    steps = draw.raw_steps(decay, True, bias if "dt_bias" in options else None, b, l, h)
    inputs: Inputs = {
        "zxbcdt": draw.data(torch.cat([rest, steps], -1)),
        "conv1d_weight": draw.parameter(draw.normal(conv, w) / math.sqrt(w)),
        "conv1d_bias": draw.parameter(draw.normal(conv)) if "conv1d_bias" in options else None,
        "dt_bias": draw.parameter(bias) if "dt_bias" in options else None,
        "A": draw.parameter(-draw.log_uniform(*RATES[decay], h)),
        "headdim": p,
        "ngroups": g,
        "activation": activation,
        "norm_before_gate": norm_before_gate,
        **draw.pack(pack, b, l),
    }
    rows = inputs["cu_seqlens"].numel() - 1 if pack == "cu_seqlens" else b
    if "D" in options:
        inputs["D"] = draw.parameter(draw.normal(*((h, p) if D_per_channel else (h,))))
    if "dt_limit" in options:
        inputs["dt_limit"] = LIMITS[decay]
    if "mask_negative" in options:
        inputs["mask_negative"] = True
    if "rmsnorm_weight" in options:
        inputs["rmsnorm_weight"] = draw.parameter(1 + 0.3 * draw.normal(d))
    if "outproj_weight" in options:
        inputs["outproj_weight"] = draw._to(draw.normal(m, k + d) / math.sqrt(k + d), dtype)
        if "outproj_bias" in options:
            inputs["outproj_bias"] = draw.parameter(draw.normal(m))
    if "conv_state" in options:
        inputs["conv_state"] = draw.data(draw.normal(rows, conv, w - 1))
    if "initial_state" in options:
        inputs["initial_state"] = draw.state(draw.normal(rows, h, p, n))
    if "return_final_states" in options:
        inputs["return_final_states"] = True
    return inputs


def full(name: str, l: int = 9, **options: object) -> Inputs:
    """A small case with every option; b = 1 in a pack."""
    b = 1 if options.get("pack") == "cu_seqlens" else 2
    if name == "mamba_inner":
        return mamba_inner(b, 4, l, 2, m=3, **{"options": INNER_OPTIONS} | options)
    return mamba_split_conv1d_scan(b, l, 4, 2, 3, g=2, k=3, m=3, **{"options": SPLIT_OPTIONS} | options)
