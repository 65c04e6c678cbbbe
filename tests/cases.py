"""Inputs of every operator from sizes, dtype and options: shared by the tests and the benchmarks.

Each function is named after its operator and returns that operator's keyword arguments. Values are drawn in
float64 from a seed and then rounded: the same case in another dtype, layout or device holds the same numbers.
"""

import contextlib
import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]

OPERATORS = ("selective_scan", "ssd", "causal_conv1d", "rms_norm_gated")
UPDATES = ("causal_conv1d_update", "selective_state_update", "ssd_state_update")
ALL = OPERATORS + UPDATES
PACKABLE = OPERATORS[:3]
SCAN_OPTIONS = ("D", "z", "delta_bias", "delta_softplus", "initial_state", "return_final_state")
SSD_OPTIONS = ("D", "z", "dt_bias", "dt_softplus", "dt_limit", "initial_state", "return_final_state")
CONV_OPTIONS = ("bias", "activation", "initial_state", "return_final_state")
PACKS = (None, "seq_idx", "cu_seqlens")
LAYOUTS = ("contiguous", "transposed", "padded", "projected", "expanded")

# Step sizes after softplus, and decay rates: a state that lasts for thousands of tokens, and for one.
STEPS = {"weak": (1e-3, 0.1), "strong": (0.05, 0.5)}
RATES = {"weak": (1e-3, 1.0), "strong": (8.0, 16.0)}
LIMITS = {"weak": (0.004, 0.03), "strong": (0.1, 0.3)}


def complex_of(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype is torch.float64 else torch.complex64


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


@contextlib.contextmanager
def drawn_on(device: str) -> Iterator[None]:
    """Within, numbers are drawn on the device: sooner where they are many, and others than on the CPU."""
    before, Draw.source = Draw.source, device
    try:
        yield
    finally:
        Draw.source = before


class Draw:
    """Random tensors of one case: data in dtype, parameters and states in float32 (float64 for float64)."""

    source = "cpu"  # what draws

    def __init__(
        self, seed: int, dtype: torch.dtype, params: torch.dtype | None, device: str, layout: str
    ) -> None:
        self.generator = torch.Generator(self.source).manual_seed(seed)
        self.dtype, self.params = dtype, params or parameter_dtype(dtype)
        self.device, self.layout = device, layout

    def normal(self, *shape: int, complex_: bool = False) -> Tensor:
        dtype = torch.complex128 if complex_ else torch.float64
        return torch.randn(*shape, generator=self.generator, dtype=dtype, device=self.generator.device)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=dtype, device=self.generator.device)

    def log_uniform(self, low: float, high: float, *shape: int) -> Tensor:
        share = self.uniform(*shape, dtype=torch.float64)
        return (math.log(low) + (math.log(high) - math.log(low)) * share).exp()

    def data(self, values: Tensor) -> Tensor:
        return lay_out(self._to(values, self.dtype), self.layout)

    def parameter(self, values: Tensor) -> Tensor:
        return self._to(values, self.params)

    def state(self, values: Tensor) -> Tensor:
        return lay_out(self._to(values, parameter_dtype(self.dtype)), self.layout)

    def _to(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(self.device, complex_of(dtype) if values.is_complex() else dtype)

    def raw_steps(self, decay: str, softplus: bool, bias: Tensor | None, *shape: int) -> Tensor:
        """What becomes a step size in STEPS once the bias (broadcast) is added and softplus taken."""
        steps = self.log_uniform(*STEPS[decay], *shape)
        raw = steps + torch.log(-torch.expm1(-steps)) if softplus else steps
        return raw if bias is None else raw - bias

    def seq_idx(self, b: int, l: int) -> Tensor:
        """Runs of 1 to about 20 tokens; ids return, and one is negative."""
        starts = self.uniform(b, l) < 0.1
        return ((starts.cumsum(1) % 5) - 1).to(self.device, torch.int32)

    def cu_seqlens(self, l: int) -> Tensor:
        """Sequences of any length from 0 up, an empty one first, one in the middle and one last."""
        cuts = torch.randint(l + 1, (2 + l // 40,), generator=self.generator, device=self.generator.device)
        cuts = cuts.cpu().sort().values
        return torch.cat([torch.tensor([0, 0]), cuts, cuts[-1:], torch.tensor([l, l])]).to(
            self.device, torch.int32
        )

    def pack(self, pack: str | None, b: int, l: int) -> Inputs:
        if pack == "cu_seqlens":
            assert b == 1, "a pack has batch 1"
            return {"cu_seqlens": self.cu_seqlens(l)}
        return {"seq_idx": self.seq_idx(b, l)} if pack == "seq_idx" else {}


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The same values in other strides (expanded: the first row of the batch, for every row).

    contiguous; transposed: the last two dims swapped in memory, channel-last for (b, d, l); padded: a slice
    of a wider tensor that is NaN elsewhere; projected: both; expanded: stride 0 over the batch.
    """
    if layout == "expanded":
        return t[:1].expand(t.shape) if t.shape[0] else t
    t = t.mT if layout in ("transposed", "projected") else t
    if layout in ("padded", "projected"):
        wide = torch.full(
            (t.shape[0] + 1, *t.shape[1:-1], t.shape[-1] + 3), math.nan, dtype=t.dtype, device=t.device
        )
        wide[1:, ..., 2:-1] = t
        t = wide[1:, ..., 2:-1]
    else:
        t = t.contiguous()
    return t.mT if layout in ("transposed", "projected") else t


def selective_scan(
    b: int = 2,
    d: int = 6,
    l: int = 23,
    n: int = 4,
    *,
    groups: tuple[int | None, int | None] = (None, None),
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
    """groups of B and of C: None for (b, n, l), g for (b, g, n, l), 0 for a constant (d, n)."""
    draw = Draw(seed, dtype, params, device, layout)
    bias = draw.normal(d) if "delta_bias" in options else None
    softplus = "delta_softplus" in options
    delta = draw.raw_steps(decay, softplus, bias if bias is None else bias[:, None], b, d, l)
    A = -draw.log_uniform(*RATES[decay], d, n)

    def projection(g: int | None) -> Tensor:
        if g == 0:
            return draw.parameter(draw.normal(d, n, complex_=complex_A))
        return draw.data(draw.normal(*((b, n, l) if g is None else (b, g, n, l)), complex_=complex_A))

    inputs: Inputs = {
        "u": draw.data(draw.normal(b, d, l)),
        "delta": draw.data(delta),
        "A": draw.parameter(torch.complex(A, 3 * draw.normal(d, n)) if complex_A else A),
        "B": projection(groups[0]),
        "C": projection(groups[1]),
        **draw.pack(pack, b, l),
    }
    if "D" in options:
        inputs["D"] = draw.parameter(draw.normal(d))
    if "z" in options:
        inputs["z"] = draw.data(draw.normal(b, d, l))
    if bias is not None:
        inputs["delta_bias"] = draw.parameter(bias)
    if softplus:
        inputs["delta_softplus"] = True
    if "initial_state" in options:
        rows = inputs["cu_seqlens"].numel() - 1 if pack == "cu_seqlens" else b
        inputs["initial_state"] = draw.state(draw.normal(rows, d, n, complex_=complex_A))
    if "return_final_state" in options:
        inputs["return_final_state"] = True
    return inputs


def ssd(
    b: int = 2,
    l: int = 23,
    h: int = 4,
    p: int = 3,
    n: int = 5,
    *,
    groups: tuple[int, int] = (1, 1),
    chunk_size: int | None = None,
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
    """groups of B and of C."""
    draw = Draw(seed, dtype, params, device, layout)
    bias = draw.normal(h) if "dt_bias" in options else None
    softplus = "dt_softplus" in options
    inputs: Inputs = {
        "x": draw.data(draw.normal(b, l, h, p)),
        "dt": draw.data(draw.raw_steps(decay, softplus, bias, b, l, h)),
        "A": draw.parameter(-draw.log_uniform(*RATES[decay], h)),
        "B": draw.data(draw.normal(b, l, groups[0], n)),
        "C": draw.data(draw.normal(b, l, groups[1], n)),
        **draw.pack(pack, b, l),
    }
    if chunk_size is not None:
        inputs["chunk_size"] = chunk_size
    if "D" in options:
        inputs["D"] = draw.parameter(draw.normal(*((h, p) if D_per_channel else (h,))))
    if "z" in options:
        inputs["z"] = draw.data(draw.normal(b, l, h, p))
    if bias is not None:
        inputs["dt_bias"] = draw.parameter(bias)
    if softplus:
        inputs["dt_softplus"] = True
    if "dt_limit" in options:
        inputs["dt_limit"] = LIMITS[decay]
    if "initial_state" in options:
        rows = inputs["cu_seqlens"].numel() - 1 if pack == "cu_seqlens" else b
        inputs["initial_state"] = draw.state(draw.normal(rows, h, p, n))
    if "return_final_state" in options:
        inputs["return_final_state"] = True
    return inputs


def causal_conv1d(
    b: int = 2,
    d: int = 6,
    l: int = 23,
    w: int = 4,
    *,
    options: Collection[str] = (),
    pack: str | None = None,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    params: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    draw = Draw(seed, dtype, params, device, layout)
    inputs: Inputs = {
        "x": draw.data(draw.normal(b, d, l)),
        "weight": draw.parameter(draw.normal(d, w) / math.sqrt(w)),
        **draw.pack(pack, b, l),
    }
    if "bias" in options:
        inputs["bias"] = draw.parameter(draw.normal(d))
    if "activation" in options:
        inputs["activation"] = "silu"
    if "initial_state" in options:
        rows = inputs["cu_seqlens"].numel() - 1 if pack == "cu_seqlens" else b
        inputs["initial_state"] = draw.data(draw.normal(rows, d, w - 1))
    if "return_final_state" in options:
        inputs["return_final_state"] = True
    return inputs


def rms_norm_gated(
    *shape: int,
    gate: bool = True,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    params: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> Inputs:
    """options: eps, group_size, norm_before_gate as the operator takes them."""
    draw = Draw(seed, dtype, params, device, layout)
    inputs: Inputs = {
        "x": draw.data(draw.normal(*shape)),
        "weight": draw.parameter(1 + 0.1 * draw.normal(shape[-1])),
        **options,
    }
    if gate:
        inputs["z"] = draw.data(draw.normal(*shape))
    return inputs


def add_rms_norm(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    residual: torch.dtype | None = None,
    params: torch.dtype | None = None,
    layout: str = "contiguous",
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> Inputs:
    """residual: its dtype. options: eps as the operator takes it."""
    draw = Draw(seed, dtype, params, device, layout)
    return {
        "x": draw.data(draw.normal(*(shape or (2, 8)))),
        "residual": draw.data(3 * draw.normal(*(shape or (2, 8)))).to(residual or dtype),
        "weight": draw.parameter(1 + 0.1 * draw.normal(shape[-1] if shape else 8)),
        **options,
    }


NORMS = ("none", "norm", "add", "add to float32", "gate after the norm", "gate before the norm")


def norm_linear(
    b: int = 3,
    k: int = 40,
    n: int = 9,
    norm: str = "add",
    *,
    dtype: torch.dtype = torch.float32,
    params: torch.dtype | None = None,
    layout: str = "contiguous",
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """norm: one of NORMS."""
    draw = Draw(seed, dtype, params, device, layout)
    inputs: Inputs = {
        "x": draw.data(draw.normal(b, k)),
        "weight": draw.data(draw.normal(n, k) / math.sqrt(max(k, 1))),
        "bias": draw.data(draw.normal(1, n))[0],
    }
    if norm != "none":
        inputs |= {"norm_weight": draw.parameter(1 + 0.1 * draw.normal(k)), "eps": 1e-3}
    if norm.startswith("add"):
        residual = draw.data(3 * draw.normal(b, k))
        inputs["residual"] = residual.to(parameter_dtype(dtype)) if "float32" in norm else residual
    if norm.startswith("gate"):
        inputs |= {"z": draw.data(draw.normal(b, k)), "norm_before_gate": "after" in norm}
    return inputs


def norm_linear_conv(
    b: int = 3,
    k: int = 40,
    n: int = 20,
    d: int = 6,
    w: int = 4,
    begin: int = 5,
    norm: str = "add",
    *,
    kept: int | None = None,
    dtype: torch.dtype = torch.float32,
    params: torch.dtype | None = None,
    layout: str = "contiguous",
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """norm: none, norm, or add; kept: inputs in the state, w - 1 unless given."""
    inputs = norm_linear(b, k, n, norm, dtype=dtype, params=params, layout=layout, device=device, seed=seed)
    draw = Draw(seed + 1, dtype, params, device, layout)
    return {
        "norm_weight": None,
        **inputs,
        "conv_state": lay_out(draw.data(draw.normal(b, d, kept or w - 1)).clone(), _writable(layout)),
        "conv_weight": draw.parameter(draw.normal(d, w) / math.sqrt(w)),
        "conv_bias": draw.parameter(draw.normal(d)),
        "begin": begin,
    }


def state_indices(draw: Draw, b: int, s: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """b different rows of s in any order, every third replaced by -1."""
    rows = torch.randperm(s, generator=draw.generator, device=draw.generator.device)[:b].cpu()
    return torch.where(torch.arange(b) % 3 == 1, -1, rows).to(draw.device, dtype)


def causal_conv1d_update(
    b: int = 3,
    d: int = 6,
    w: int = 4,
    *,
    t: int | None = None,
    k: int | None = None,
    rows: int | None = None,
    options: Collection[str] = (),
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    params: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """t tokens (None: one, without the dim); k inputs kept; rows of the state (None: b, no state_indices)."""
    draw = Draw(seed, dtype, params, device, layout)
    inputs: Inputs = {
        "x": draw.data(draw.normal(*((b, d) if t is None else (b, d, t)))),
        "state": lay_out(draw.data(draw.normal(rows or b, d, k or w - 1)).clone(), _writable(layout)),
        "weight": draw.parameter(draw.normal(d, w) / math.sqrt(w)),
    }
    if "bias" in options:
        inputs["bias"] = draw.parameter(draw.normal(d))
    if "activation" in options:
        inputs["activation"] = "silu"
    if rows is not None:
        inputs["state_indices"] = state_indices(draw, b, rows)
    return inputs


def selective_state_update(
    b: int = 3,
    d: int = 6,
    n: int = 4,
    *,
    t: int | None = None,
    g: int | None = None,
    rows: int | None = None,
    state_dtype: torch.dtype | None = None,
    **options: Any,
) -> Inputs:
    """As a selective_scan of t tokens (None: one, without the dim), B and C with g groups (None: no dim)."""
    scan = selective_scan(b, d, 1 if t is None else t, n, groups=(g, g), **options)
    layout, draw = options.get("layout", "contiguous"), _draw_of(options)
    if t is None:
        scan |= {name: scan[name][..., 0] for name in ("u", "delta", "B", "C", "z") if name in scan}
    state = draw.state(draw.normal(rows or b, d, n, complex_=scan["A"].is_complex()))
    state = state if state_dtype is None else state.to(state_dtype)
    inputs = {"state": lay_out(state.clone(), _writable(layout)), **scan}
    return inputs if rows is None else inputs | {"state_indices": state_indices(draw, b, rows)}


def ssd_state_update(
    b: int = 3,
    h: int = 4,
    p: int = 3,
    n: int = 5,
    *,
    t: int | None = None,
    rows: int | None = None,
    state_dtype: torch.dtype | None = None,
    **options: Any,
) -> Inputs:
    """As an ssd of t tokens (None: one, without the dim)."""
    scan = ssd(b, 1 if t is None else t, h, p, n, **options)
    layout, draw = options.get("layout", "contiguous"), _draw_of(options)
    if t is None:
        scan |= {name: scan[name][:, 0] for name in ("x", "dt", "B", "C", "z") if name in scan}
    state = draw.state(draw.normal(rows or b, h, p, n))
    state = state if state_dtype is None else state.to(state_dtype)
    inputs = {"state": lay_out(state.clone(), _writable(layout)), **scan}
    return inputs if rows is None else inputs | {"state_indices": state_indices(draw, b, rows)}


def full(name: str, l: int = 9, **options: Any) -> Inputs:
    """A small case of the operator with every option; b = 1 in a pack."""
    b = 1 if options.get("pack") == "cu_seqlens" else 2
    if name == "selective_scan":
        return selective_scan(b, 4, l, 2, **{"groups": (2, None), "options": SCAN_OPTIONS} | options)
    if name == "ssd":
        return ssd(b, l, 4, 2, 3, **{"groups": (2, 1), "options": SSD_OPTIONS, "chunk_size": 4} | options)
    if name == "causal_conv1d":
        return causal_conv1d(b, 4, l, 4, **{"options": CONV_OPTIONS} | options)
    if name == "rms_norm_gated":
        return rms_norm_gated(2, l, 8, group_size=4, **options)
    if name == "causal_conv1d_update":
        return causal_conv1d_update(3, 4, 3, t=2, k=5, rows=5, options=CONV_OPTIONS[:2], **options)
    if name == "selective_state_update":
        return selective_state_update(3, 4, 2, t=2, g=2, rows=5, options=SCAN_OPTIONS[:4], **options)
    return ssd_state_update(3, 4, 2, 3, t=2, rows=5, groups=(2, 2), options=SSD_OPTIONS[:5], **options)


def _draw_of(options: Inputs) -> Draw:
    return Draw(
        options.get("seed", 0) + 1,
        options.get("dtype", torch.float32),
        None,
        options.get("device", "cpu"),
        "contiguous",
    )


def _writable(layout: str) -> str:
    return "contiguous" if layout == "expanded" else layout
