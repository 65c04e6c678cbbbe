"""What is timed: named cases, each with our operator, its peers and what is demanded of the two.

Inputs come from ``tests/cases.py``, which makes those of the tests too. Letters as everywhere: b batch,
l length, d channels, h heads, p head width, n state, w convolution width.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from tests import cases as make

from . import baselines
from .contenders import (
    COPY,
    Contender,
    Direction,
    Inputs,
    attention,
    compiled,
    copy,
    operator,
    peer,
    updating,
)

SCAN_OPTIONS = ("D", "z", "delta_bias", "delta_softplus")
SSD_OPTIONS = ("D", "dt_bias", "dt_softplus")
CONV_OPTIONS = ("bias", "activation")

# One-token operators: the library of the peer, the peer, plain torch, options.
UPDATES: dict[str, tuple[str, Callable[..., torch.Tensor], Callable[..., torch.Tensor], tuple[str, ...]]] = {
    "ssd_state_update": (
        "mamba_ssm",
        baselines.ssd_update_mamba_ssm,
        baselines.ssd_update_torch,
        ("D", "z", "dt_bias", "dt_softplus"),
    ),
    "selective_state_update": (
        "mamba_ssm",
        baselines.scan_update_mamba_ssm,
        baselines.scan_update_torch,
        SCAN_OPTIONS,
    ),
    "causal_conv1d_update": (
        "causal_conv1d",
        baselines.conv_update_causal_conv1d,
        baselines.conv_update_torch,
        CONV_OPTIONS,
    ),
}

RECURRENCE = "recurrence in torch"
MAMBAPY = "mambapy"
LISTING = "paper's listing"
COMPILED = "paper's listing, compiled"
SHARED = "paper's listing, one C B per group, compiled"

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
GPU_LENGTHS = tuple(512 * 4**k for k in range(5)) + (1 << 20,)
DRAWN_TOKENS = 16384  # longer inputs repeat them: they are drawn in float64


@dataclass(frozen=True)
class Must:
    """A demand on our median time.

    Attributes:
        kind: "faster": at least `value` times as fast as `than`; "share": at most `value` times the time of
            `than`; "ms": at most `value` milliseconds, on a device whose name holds `than` (empty: on any).
    """

    kind: Literal["faster", "share", "ms"]
    value: float
    than: str


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        name: operator/direction/dtype[/variant]; for ``--only`` and as the key in the results.
        title: for people.
        make: the inputs, the same at every call.
        contenders: the first is ours.
        truth: its results, from inputs in float64, are what all others are compared with; None: the second
            contender's, as they are.
        dtype: of the data.
        must: demand; None: timed for information.
        goal_ms: where the design wants to go.
        time: dim of the time of inputs and results, by name; long ones are checked on their first tokens.
        series: (operator, length) of a point of time against length.
        limit: relative error beyond which a result is wrong; None: that of the dtype.
    """

    name: str
    title: str
    make: Callable[[], Inputs]
    contenders: tuple[Contender, ...]
    truth: Contender | None
    dtype: torch.dtype = torch.float32
    must: Must | None = None
    goal_ms: float | None = None
    time: dict[str, int] | None = None
    series: tuple[str, int] | None = None
    limit: float | None = None


def scan(
    b: int,
    d: int,
    l: int,
    n: int,
    direction: Direction,
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    layout: str = "contiguous",
    tag: str = "",
    series: bool = False,
    must: Must | None = None,
    goal_ms: float | None = None,
) -> Case:
    """The selective scan with D, z, delta_bias and softplus; layout "transposed" is channel-last."""
    recurrence = peer(RECURRENCE, baselines.scan_recurrence, direction, longest=8192)
    if device == "cuda":
        peers = [peer("mamba_ssm", baselines.scan_mamba_ssm, direction, layout="contiguous")]
    else:
        peers = [recurrence, peer(MAMBAPY, baselines.scan_mambapy, direction, longest=8192)]
    if series:
        peers.append(attention(l, device, dtype, direction))
    time = {"u": 2, "delta": 2, "z": 2, "B": 2, "C": 2, "y": 2}
    drawn = min(l, DRAWN_TOKENS)
    kind = {"dtype": dtype, "layout": layout, "device": device}
    draw = partial(_drawn, make.selective_scan, b, d, drawn, n, options=SCAN_OPTIONS, **kind)
    return Case(
        f"selective_scan/{direction}/{_short(dtype)}{tag}",
        f"selective_scan b{b} d{d} l{l} n{n} {_short(dtype)}{_layout(layout)}, {_words(direction)}",
        draw if drawn == l else partial(_repeated, draw, l // drawn, time),
        (operator("selective_scan", direction), *peers),
        recurrence,
        dtype,
        must,
        goal_ms,
        time,
        (_series("selective_scan", direction), l) if series else None,
    )


def ssd(
    b: int,
    l: int,
    h: int,
    p: int,
    n: int,
    direction: Direction,
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    groups: int = 1,
    gate: bool = False,
    path: str = "auto",
    compile_peers: bool = True,
    tag: str = "",
    series: bool = False,
    must: Must | None = None,
    goal_ms: float | None = None,
) -> Case:
    """The chunked SSD with D, dt_bias and softplus; `path`: the CUDA kernels that ours may take."""
    listing = peer(LISTING, baselines.ssd_listing, direction)
    shared = partial(baselines.ssd_listing, share_groups=True)
    if device == "cuda":
        # mamba_ssm's products of float32 inputs are TF32: other work than ours.
        peers = [peer("mamba_ssm", baselines.ssd_mamba_ssm, direction)] if dtype.itemsize == 2 else []
        peers.append(peer("fla simple_gla", baselines.ssd_fla, direction))
    elif series:
        peers = [compiled(COMPILED, baselines.ssd_listing, direction, longest=8192)]
    elif compile_peers:
        peers = [
            listing,
            compiled(COMPILED, baselines.ssd_listing, direction),
            compiled(SHARED, shared, direction),
        ]
    else:
        peers = [listing]
    if series:
        peers.append(attention(l, device, dtype, direction))
    options = (*SSD_OPTIONS, "z") if gate else SSD_OPTIONS
    kind = {"dtype": dtype, "device": device, "groups": (groups, groups)}
    words = (f" g{groups}" if groups > 1 else "") + (" z" if gate else "")
    forced = "" if path == "auto" else f", {path} kernels"
    time = {"x": 1, "dt": 1, "B": 1, "C": 1, "z": 1, "y": 1}
    drawn = min(l, DRAWN_TOKENS)
    draw = partial(_drawn, make.ssd, b, drawn, h, p, n, options=options, **kind)
    return Case(
        f"ssd/{direction}/{_short(dtype)}{tag}",
        f"ssd b{b} l{l} h{h} p{p} n{n}{words} {_short(dtype)}, {_words(direction)}{forced}",
        draw if drawn == l else partial(_repeated, draw, l // drawn, time),
        (operator("ssd", direction, path), *peers),
        listing,
        dtype,
        must,
        goal_ms,
        time,
        (_series("ssd", direction), l) if series else None,
    )


def conv(
    b: int,
    d: int,
    l: int,
    direction: Direction,
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    layout: str = "transposed",
    tag: str = "",
    must: Must | None = None,
    goal_ms: float | None = None,
) -> Case:
    """The causal convolution of width 4 with bias and SiLU; layout "transposed" is channel-last."""
    plain = peer("torch", baselines.conv_torch, direction)
    cuda = [peer("causal_conv1d", baselines.conv_causal_conv1d, direction)] if device == "cuda" else []
    kind = {"dtype": dtype, "layout": layout, "device": device}
    return Case(
        f"causal_conv1d/{direction}/{_short(dtype)}{tag}",
        f"causal_conv1d b{b} d{d} l{l} w4 {_short(dtype)}{_layout(layout)}, {_words(direction)}",
        partial(_drawn, make.causal_conv1d, b, d, l, 4, options=CONV_OPTIONS, **kind),
        (operator("causal_conv1d", direction), *cuda, plain),
        plain,
        dtype,
        must,
        goal_ms,
    )


def norm(
    rows: int,
    d: int,
    direction: Direction,
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    must: Must | None = None,
) -> Case:
    """The gated norm, gate first; on CUDA beside a copy of the tensors that it must read and write."""
    plain = peer("torch", baselines.norm_torch, direction)
    tensors = 3 if direction == "forward" else 8  # x, z, y; then x, z, dy, dx, dz
    beside = [copy(tensors * rows * d * dtype.itemsize)] if device == "cuda" else []
    return Case(
        f"rms_norm_gated/{direction}/{_short(dtype)}",
        f"rms_norm_gated {rows} x {d} {_short(dtype)}, {_words(direction)}",
        partial(_drawn, make.rms_norm_gated, rows, d, dtype=dtype, device=device),
        (operator("rms_norm_gated", direction), plain, *beside),
        plain,
        dtype,
        must,
    )


def update(name: str, sizes: dict[str, int], must: Must | None = None, goal_ms: float | None = None) -> Case:
    """One token in bfloat16 with every option, on CUDA; recurrent states in float32."""
    library, call, plain_call, options = UPDATES[name]
    plain = peer("torch", plain_call, "forward")
    kind = {"options": options, "dtype": torch.bfloat16, "device": "cuda"}
    letters = " ".join(f"{letter}{size}" for letter, size in sizes.items())
    tag = "".join(f"/{letter}{size}" for letter, size in sizes.items() if letter == "b")
    return Case(
        f"{name}/forward/bfloat16{tag}",
        f"{name} {letters}" + (", state in float32" if "state_update" in name else ""),
        partial(_drawn, getattr(make, name), *sizes.values(), **kind),
        (updating(name), updating(library, call), plain),
        plain,
        torch.bfloat16,
        must,
        goal_ms,
    )


def cpu_cases() -> Iterator[Case]:
    """Demands are ratios within one run on two cores."""
    from . import models, train_share

    size = (1, 1536, 2048, 16)
    yield scan(*size, "forward", must=Must("faster", 60, RECURRENCE), goal_ms=8)
    yield scan(*size, "both", must=Must("faster", 100, MAMBAPY), goal_ms=30)
    yield scan(*size, "forward", layout="transposed", tag="/channel-last")
    yield scan(*size, "both", layout="transposed", tag="/channel-last")
    heads = (1, 2048, 24, 64, 128)
    for dtype, factor, goals in ((torch.float32, 3.5, (7.5, 25)), (torch.bfloat16, 3, (3, 12))):
        must = Must("faster", factor, COMPILED)
        yield ssd(*heads, "forward", dtype, must=must, goal_ms=goals[0])
        yield ssd(*heads, "both", dtype, must=must, goal_ms=goals[1])
    yield from (conv(1, 1536, 2048, "forward"), conv(1, 1536, 2048, "both"))
    yield from (norm(2048, 1536, "forward"), norm(2048, 1536, "both"))
    yield from models.cases()
    yield train_share.case()
    for l in LENGTHS:
        yield scan(1, 1536, l, 16, "forward", tag=f"/length-{l}", series=True)
        yield ssd(1, l, 24, 64, 128, "forward", tag=f"/length-{l}", series=True)


def cuda_cases() -> Iterator[Case]:
    """Demands are milliseconds on an H200, or shares of the time of a copy on any GPU."""
    from . import gpu_models

    def gpu_conv(direction: Direction, **options: Any) -> Case:
        return conv(4, 5376, 4096, direction, torch.bfloat16, device="cuda", **options)

    yield gpu_conv("forward", must=Must("ms", 0.105, "H200"), goal_ms=0.095)
    yield gpu_conv("both", must=Must("ms", 0.31, "H200"), goal_ms=0.28)
    yield gpu_conv("forward", layout="contiguous", tag="/channel-first", must=Must("ms", 0.094, "H200"))
    yield norm(16384, 5120, "forward", torch.bfloat16, device="cuda", must=Must("share", 1.15, COPY))
    yield norm(16384, 5120, "both", torch.bfloat16, device="cuda", must=Must("share", 1.25, COPY))
    heads = {"h": 80, "p": 64, "n": 128}
    yield update("ssd_state_update", {"b": 128, **heads}, Must("ms", 0.175, "H200"), 0.165)
    yield update("ssd_state_update", {"b": 1, **heads}, Must("ms", 0.006, "H200"))
    for b in (128, 1):
        yield update("selective_state_update", {"b": b, "d": 5120, "n": 16})
        yield update("causal_conv1d_update", {"b": b, "d": 5376, "w": 4})
    yield from _gpu_ssd_cases()
    yield from _gpu_scan_cases()
    yield from gpu_models.cases()


def _gpu_ssd_cases() -> Iterator[Case]:
    large, small = (4, 4096, 80, 64, 128), (8, 2048, 24, 64, 128)
    long, grouped = (1, 65536, 128, 64, 128), (2, 8192, 128, 64, 128)
    rows: tuple[tuple[tuple[int, int, int, int, int], str, dict[str, Any], tuple[float | None, ...]], ...] = (
        # sizes, tag, options; must and goal forward, must and goal forward and backward, in ms on an H200
        (large, "", {}, (0.15, 0.11, 0.95, 0.65)),
        (large, "/gate", {"gate": True}, (0.19, 0.15, None, None)),
        (small, "/h24", {}, (0.06, 0.045, 0.40, 0.25)),
        (long, "/length-65536-h128", {}, (1.15, 0.9, 6.5, 4.2)),
        (grouped, "/g8", {"groups": 8}, (0.26, 0.18, 1.6, 1.05)),
        ((4, 4096, 80, 64, 64), "/n64", {}, (0.125, 0.09)),
        (large, "/portable", {"path": "portable"}, (0.60, 0.40, 3.2, 2.0)),
        (large, "", {"dtype": torch.float32}, (8 * 0.15, 8 * 0.11, 8 * 0.95, 8 * 0.65)),
    )
    for sizes, tag, options, ms in rows:
        directions: tuple[Direction, ...] = ("forward", "both")
        for direction, must, goal in zip(directions, ms[::2], ms[1::2], strict=False):
            given = {"dtype": torch.bfloat16, **options}
            demand = Must("ms", must, "H200") if must else None
            yield ssd(*sizes, direction, device="cuda", tag=tag, must=demand, goal_ms=goal, **given)
    for l in GPU_LENGTHS:
        for direction in ("forward", "both"):
            tag = f"/length-{l}"
            yield ssd(1, l, 32, 64, 128, direction, torch.bfloat16, device="cuda", tag=tag, series=True)


def _gpu_scan_cases() -> Iterator[Case]:
    def gpu_scan(
        sizes: tuple[int, int, int],
        direction: Direction,
        must_ms: float,
        goal_ms: float,
        dtype: torch.dtype = torch.bfloat16,
        layout: str = "transposed",
        tag: str = "",
    ) -> Case:
        b, d, l = sizes
        return scan(
            *(b, d, l, 16),
            direction,
            dtype,
            device="cuda",
            layout=layout,
            tag=f"/b{b}-d{d}-l{l}{tag}",
            must=Must("ms", must_ms, "H200"),
            goal_ms=goal_ms,
        )

    large, small, few = (4, 5120, 4096), (8, 1536, 2048), (1, 2048, 65536)
    yield gpu_scan(large, "forward", 0.62, 0.48)
    yield gpu_scan(large, "both", 3.3, 2.2)
    yield gpu_scan(small, "forward", 0.20, 0.15)
    yield gpu_scan(small, "both", 1.0, 0.7)
    yield gpu_scan(few, "forward", 1.5, 0.95)
    yield gpu_scan(few, "both", 5.6, 3.8)
    yield gpu_scan(large, "forward", 0.95, 0.65, torch.float32)
    yield gpu_scan(large, "both", 4.0, 2.9, torch.float32)
    yield gpu_scan(large, "forward", 0.75, 0.55, layout="contiguous", tag="/l-major")
    # A million tokens: the time per token of 65,536, and a tenth.
    yield gpu_scan((1, 2048, 2**20), "both", 5.6 * 16 * 1.1, 3.8 * 16)
    for l in GPU_LENGTHS:
        for direction in ("forward", "both"):
            options: dict[str, Any] = {"device": "cuda", "layout": "transposed", "series": True}
            yield scan(1, 2048, l, 16, direction, torch.bfloat16, tag=f"/length-{l}", **options)


def quick_cases() -> Iterator[Case]:
    """The operators in miniature, to try the harness."""
    yield scan(1, 32, 128, 4, "forward", must=Must("faster", 1, RECURRENCE))
    yield scan(1, 32, 128, 4, "both", must=Must("faster", 1, MAMBAPY))
    yield ssd(1, 128, 2, 16, 16, "both", compile_peers=False, must=Must("faster", 1, LISTING))
    yield conv(1, 32, 128, "both")
    yield norm(64, 32, "both")
    for l in (64, 128):
        yield scan(1, 32, l, 4, "forward", tag=f"/length-{l}", series=True)


def select(device: str, quick: bool, only: str | None) -> list[Case]:
    """The cases of a run; `only` is a shell pattern, matched anywhere in the name."""
    found = quick_cases() if quick else cpu_cases() if device == "cpu" else cuda_cases()
    return [case for case in found if only is None or fnmatch.fnmatch(case.name, f"*{only}*")]


def _drawn(call: Callable[..., Inputs], *sizes: int, device: str, **options: Any) -> Inputs:
    """Inputs whose numbers are drawn where they are wanted."""
    with make.drawn_on(device):
        return call(*sizes, device=device, **options)


def _repeated(draw: Callable[[], Inputs], times: int, time: dict[str, int]) -> Inputs:
    """Inputs whose tokens are repeated, in the layout of those that are drawn."""

    def longer(t: torch.Tensor, dim: int) -> torch.Tensor:
        if t.stride(dim) == 1:
            return torch.cat([t] * times, dim)
        return torch.cat([t.movedim(dim, 1)] * times, 1).movedim(1, dim)

    inputs = draw()
    return inputs | {name: longer(inputs[name], dim) for name, dim in time.items() if name in inputs}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _words(direction: Direction) -> str:
    return "forward" if direction == "forward" else "forward + backward"


def _series(operator: str, direction: Direction) -> str:
    return operator if direction == "forward" else f"{operator}, {_words(direction)}"


def _layout(layout: str) -> str:
    return " channel-last" if layout == "transposed" else ""
