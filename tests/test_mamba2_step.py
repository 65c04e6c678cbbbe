"""mamba2_step against the formulas of its parts: sizes, dtypes, tokens in turn; by three launches a layer
and, on a Hopper GPU, by one for all."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mamba_ops import _C, Mamba2StepLayer, mamba2_step, reference
from mamba_ops.mamba2_step import is_one_launch
from mamba_ops.models import LanguageModel, LMConfig, Session
from mamba_ops.models.lm import Backbone
from tests.compare import FEW
from tests.conftest import missing_device

OPERATOR = "norm_linear"  # runs where mamba2_step does
HALF, WHOLE = torch.bfloat16, torch.float32


@pytest.fixture
def hopper() -> str:
    """A GPU where all layers are one launch."""
    reason = missing_device("norm_linear", "cuda")
    if not reason and not _C.mamba2_step_fits(1, 256, 8, 128, 2):
        reason = "no Hopper GPU, or built without its kernels"
    if reason:
        pytest.skip(reason)
    return "cuda"


def random_layer(
    d: int,
    h: int,
    n: int,
    *,
    dtype: torch.dtype = HALF,
    state: torch.dtype = WHOLE,
    params: torch.dtype = WHOLE,
    D: str = "head",
    bias: bool = True,
    b: int = 1,
    w: int = 4,
    seed: int = 0,
) -> Mamba2StepLayer:
    """params: of dt_bias, A_log and D."""
    g = torch.Generator().manual_seed(seed)
    inner = 2 * d

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=g, dtype=torch.float64)

    return Mamba2StepLayer(
        norm_weight=(1 + 0.1 * normal(d)).to(dtype),
        in_proj=(normal(2 * inner + 2 * n + h, d) / math.sqrt(d)).to(dtype),
        conv_state=normal(b, inner + 2 * n, w - 1).to(dtype),
        conv_weight=(0.5 * normal(inner + 2 * n, w)).to(dtype),
        conv_bias=(0.1 * normal(inner + 2 * n)).to(dtype) if bias else None,
        state=normal(b, h, inner // h, n).to(state),
        dt_bias=(normal(h) - 2).to(params),
        A_log=normal(h).to(params),
        D=(normal(h) if D == "head" else normal(h, inner // h)).to(params),
        gate_norm_weight=(1 + 0.1 * normal(inner)).to(dtype),
        out_proj=(normal(d, inner) / math.sqrt(inner)).to(dtype),
    )


def moved(layers: list[Mamba2StepLayer], **to: Any) -> list[Mamba2StepLayer]:
    """Copies: floats stay what they are unless `to` says otherwise."""
    return [Mamba2StepLayer(*(None if t is None else t.clone().to(**to) for t in layer)) for layer in layers]


def formula(
    stream: Tensor,
    layers: list[Mamba2StepLayer],
    *,
    eps: float,
    gate_eps: float,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    out = None
    for layer in layers:
        _, h, p, n = layer.state.shape
        inner, dtype = h * p, layer.in_proj.dtype
        if out is None:
            x = reference.rms_norm_gated(stream, layer.norm_weight.to(stream.dtype), eps=eps).to(dtype)
        else:
            x, stream = reference.add_rms_norm(out, stream, layer.norm_weight, eps=eps)
        z, xBC, dt = F.linear(x, layer.in_proj).split([inner, inner + 2 * n, h], dim=-1)
        xBC = reference.causal_conv1d_update(
            xBC, layer.conv_state, layer.conv_weight, layer.conv_bias, activation="silu"
        )
        x, B, C = xBC.split([inner, n, n], dim=-1)
        y = reference.ssd_state_update(
            layer.state,
            x.unflatten(-1, (h, p)),
            dt,
            layer.A_log,
            B.unsqueeze(1),
            C.unsqueeze(1),
            layer.D,
            z.unflatten(-1, (h, p)),
            layer.dt_bias,
            True,
            dt_limit,
            A_is_log=True,
        )
        y = reference.rms_norm_gated(y.flatten(-2), layer.gate_norm_weight, eps=gate_eps)
        out = F.linear(y, layer.out_proj)
    assert out is not None
    return out, stream


def run(
    step: Callable[..., tuple[Tensor, Tensor]],
    streams: list[Tensor],
    layers: list[Mamba2StepLayer],
    **options: Any,
) -> list[Tensor]:
    """All outputs of some tokens, and the states that they leave."""
    results: list[Tensor] = []
    for stream in streams:
        results += step(stream, layers, **options)
    for layer in layers:
        results += [layer.conv_state, layer.state]
    return results


def check(
    layers: list[Mamba2StepLayer],
    device: str,
    *,
    stream: torch.dtype = WHOLE,
    tokens: int = 3,
    one_launch: bool | None = None,
    **options: Any,
) -> None:
    """Errors (2-norm) at most twice those of the formula in the inputs' own dtypes on the CPU, and last bits;
    four times for few elements, as in tests/compare.py."""
    g = torch.Generator().manual_seed(1)
    b, d = layers[0].state.shape[0], layers[0].in_proj.shape[1]
    streams = [torch.randn(b, d, generator=g, dtype=torch.float64).to(stream) for _ in range(tokens)]
    options = {"eps": 1e-3, "gate_eps": 1e-4, "dt_limit": (0.0, math.inf)} | options
    ours = moved(layers, device=device)
    if one_launch is not None:
        assert is_one_launch(streams[0].to(device), ours) == one_launch
    got = run(mamba2_step, [s.to(device) for s in streams], ours, **options)
    own = run(formula, streams, moved(layers), **options)
    exact = run(formula, [s.double() for s in streams], moved(layers, dtype=torch.float64), **options)
    for mine, plain, truth in zip(got, own, exact, strict=True):
        assert (mine.shape, mine.dtype) == (plain.shape, plain.dtype)
        error, base = ((t.cpu().double() - truth).norm() for t in (mine, plain))
        factor = 2 if mine.numel() >= FEW else 4
        last_bits = torch.finfo(mine.dtype).eps / 2 if mine.dtype != torch.float64 else 1e-14
        assert error <= factor * base + last_bits * truth.norm(), f"{error} against {base}"


@pytest.mark.parametrize("dtype", [HALF, torch.float16, WHOLE, torch.float64])
def test_follows_the_formula(device: str, dtype: torch.dtype) -> None:
    """Whatever the sizes and dtypes."""
    wide = torch.float64 if dtype == torch.float64 else WHOLE
    for b, w in ((1, 4), (3, 2)):
        layers = [
            random_layer(24, 6, 10, dtype=dtype, state=wide, params=wide, b=b, w=w, seed=i) for i in range(2)
        ]
        check(layers, device, stream=wide, one_launch=False)


SIZES = [(256, 8, 128), (256, 512, 64), (512, 1, 128), (768, 24, 128), (1280, 20, 64), (2304, 72, 128)]
SIZES += [(2560, 80, 128), (2560, 40, 256), (512, 1024, 128)]


@pytest.mark.parametrize(("d", "h", "n"), SIZES)
def test_sizes(hopper: str, d: int, h: int, n: int) -> None:
    layers = [random_layer(d, h, n, state=HALF, seed=i) for i in range(2)]
    check(layers, hopper, one_launch=True)


@pytest.mark.parametrize("state", [HALF, WHOLE])
@pytest.mark.parametrize("stream", [HALF, WHOLE])
@pytest.mark.parametrize("params", [HALF, WHOLE])
@pytest.mark.parametrize("D", ["head", "channel"])
@pytest.mark.parametrize("bias", [True, False])
def test_dtypes_and_options(
    hopper: str, bias: bool, D: str, params: torch.dtype, stream: torch.dtype, state: torch.dtype
) -> None:
    layers = [
        random_layer(512, 16, n, state=state, params=params, D=D, bias=bias, seed=i)
        for i, n in ((0, 64), (1, 64))
    ]
    check(layers, hopper, stream=stream, one_launch=True, dt_limit=(0.01, 0.1))


@pytest.mark.parametrize(("d", "h", "n"), [(256, 8, 68), (256, 8, 32), (320, 8, 128), (2816, 88, 128)])
def test_sizes_that_the_kernel_does_not_take(hopper: str, d: int, h: int, n: int) -> None:
    check([random_layer(d, h, n, state=HALF, seed=i) for i in range(2)], hopper, one_launch=False)


def test_odd_number_of_heads(hopper: str) -> None:
    """The last row of in_proj has no partner."""
    for d, h in ((768, 3), (2304, 9)):
        check([random_layer(d, h, 128, seed=i) for i in range(2)], hopper, one_launch=True)


def test_many_layers(hopper: str) -> None:
    """More units than the ring has slots, many times round; the most layers of a launch, and one more."""
    layers = [random_layer(256, 8, 64, state=HALF, seed=i % 7) for i in range(128)]
    for layer in layers:
        layer.out_proj.mul_(0.1)
    check(layers, hopper, tokens=2, one_launch=True)
    check([*layers, layers[0]], hopper, tokens=1, one_launch=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer._replace(state=layer.state.half()),
        lambda layer: layer._replace(in_proj=layer.in_proj.t().contiguous().t()),
        lambda layer: layer._replace(norm_weight=layer.norm_weight.float()),
        lambda layer: layer._replace(conv_bias=None),
        lambda layer: layer._replace(D=layer.D[:, None].repeat(1, layer.state.shape[2])),
        lambda layer: layer._replace(
            gate_norm_weight=torch.cat([layer.gate_norm_weight[:1]] + [layer.gate_norm_weight])[1:]
        ),
    ],
)
def test_what_the_kernel_does_not_take(
    hopper: str, change: Callable[[Mamba2StepLayer], Mamba2StepLayer]
) -> None:
    """Three launches a layer do."""
    layers = moved([random_layer(256, 8, 128, state=HALF, seed=i) for i in range(2)], device=hopper)
    layers[1] = change(layers[1])
    stream = torch.ones(1, 256, device=hopper)
    assert not is_one_launch(stream, layers)
    out, total = mamba2_step(stream, layers)
    assert out.isfinite().all() and total.isfinite().all()


def test_the_same_bits_every_run_and_in_a_graph(hopper: str) -> None:
    layers = moved([random_layer(768, 24, 128, state=HALF, seed=i) for i in range(4)], device=hopper)
    stream = torch.randn(1, 768, device=hopper)
    expected = run(mamba2_step, [stream] * 5, moved(layers))
    for _ in range(20):
        for got, want in zip(run(mamba2_step, [stream] * 5, moved(layers)), expected, strict=True):
            assert torch.equal(got, want)
    captured = moved(layers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, total = mamba2_step(stream, captured)
    for i in range(5):
        graph.replay()
        assert torch.equal(out, expected[2 * i]) and torch.equal(total, expected[2 * i + 1])
    for layer, want in zip(captured, zip(expected[10::2], expected[11::2], strict=True), strict=True):
        assert torch.equal(layer.conv_state, want[0]) and torch.equal(layer.state, want[1])


def test_two_streams_at_once(hopper: str) -> None:
    """Launches that need all multiprocessors take turns."""
    layers = moved([random_layer(1280, 40, 128, state=HALF, seed=i) for i in range(6)], device=hopper)
    x = torch.randn(1, 1280, device=hopper)
    expected = run(mamba2_step, [x] * 4, moved(layers))
    sides = [torch.cuda.Stream() for _ in range(3)]
    copies = [moved(layers) for _ in sides]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = []
    for side, mine in zip(sides, copies, strict=True):
        with torch.cuda.stream(side):
            results.append(run(mamba2_step, [x] * 4, mine))
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(got, want) for got, want in zip(result, expected, strict=True))


def test_opcheck(hopper: str) -> None:
    layers = moved([random_layer(256, 8, 128, seed=i) for i in range(2)], device=hopper)
    lists = [list(tensors) for tensors in zip(*layers, strict=True)]
    stream = torch.randn(1, 256, device=hopper)
    torch.library.opcheck(
        torch.ops.mamba_ops.mamba2_step.default, (stream, *lists, 1e-5, 1e-5, 0.0, math.inf)
    )


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("in_proj", lambda t: t[1:], r"in_proj\[1\] must be \(4 d \+ 2 n \+ h, d\)"),
        ("out_proj", lambda t: t.float(), r"out_proj\[1\] must be bfloat16, got float32"),
        ("D", lambda t: t.bfloat16(), r"D\[1\] must have the dtype of the first, float32, got bfloat16"),
        ("conv_state", lambda t: t.cpu(), r"conv_state\[1\]"),
        ("state", lambda t: t.transpose(2, 3), r"state\[1\] must be \(1, h, p, n\)"),
    ],
)
def test_errors_of_the_operator(
    hopper: str, name: str, bad: Callable[[Tensor], Tensor], message: str
) -> None:
    layers = moved([random_layer(256, 8, 128, seed=i) for i in range(2)], device=hopper)
    layers[1] = layers[1]._replace(**{name: bad(getattr(layers[1], name))})
    lists = [list(tensors) for tensors in zip(*layers, strict=True)]
    with pytest.raises(RuntimeError, match="mamba2_step: .*" + message):
        torch.ops.mamba_ops.mamba2_step(torch.zeros(1, 256, device=hopper), *lists, 1e-5, 1e-5, 0.0, math.inf)


def test_errors() -> None:
    layer = random_layer(8, 2, 4, dtype=WHOLE)
    with pytest.raises(ValueError, match="mamba2_step: layers must be one or more, got none"):
        mamba2_step(torch.zeros(1, 8), [])
    with pytest.raises(ValueError, match=r"mamba2_step: stream must be \(b, d\), got \(8,\)"):
        mamba2_step(torch.zeros(8), [layer])
    with pytest.raises(ValueError, match=r"mamba2_step: state must be \(b, h, p, n\), got \(2, 8, 4\)"):
        mamba2_step(torch.zeros(1, 8), [layer._replace(state=layer.state[0])])
    with pytest.raises(RuntimeError, match="mamba2_step: has no backward"):
        mamba2_step(torch.zeros(1, 8, requires_grad=True), [layer])
    with pytest.raises(
        ValueError, match=r"mamba2_step: dt_limit must be \(low, high\) with low <= high, got \(1.0, 0.0\)"
    ):
        mamba2_step(torch.zeros(1, 8), [layer], dt_limit=(1.0, 0.0))


# --- in a language model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_a_model_s_steps(hopper: str, residual_in_fp32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by three launches a layer, within the rounding of both; in one launch for a single row only."""
    torch.manual_seed(0)
    model = LanguageModel(
        LMConfig(97, 2048, 3, "mamba2", residual_in_fp32=residual_in_fp32), device=hopper, dtype=HALF
    )
    exact = LanguageModel(LMConfig(97, 2048, 3, "mamba2"), device=hopper, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    calls: list[bool] = []
    at_once = Backbone._step_at_once

    def counted(self: Backbone, *args: Any) -> Any:
        result = at_once(self, *args)
        calls.append(result is not None)
        return result

    def logits(model: LanguageModel, b: int = 1, **options: Any) -> Tensor:
        session = Session(model, b, **options)
        return torch.stack([session.step(torch.full((b,), i, device=hopper)) for i in range(5)])

    truth = logits(exact, graph=False)
    monkeypatch.setattr(Backbone, "_step_at_once", counted)
    one = logits(model)
    assert calls and all(calls)
    calls.clear()
    logits(model, 2)
    assert calls and not any(calls)
    monkeypatch.setattr(Backbone, "_step_at_once", lambda *_: None)
    three = logits(model)
    errors = [(t.double() - truth).norm() / truth.norm() for t in (one, three)]
    assert errors[0] <= 1.5 * errors[1] + 1e-3, f"{errors}"


@pytest.mark.parametrize("part", ["norm", "mixer.norm", "mixer.in_proj", "mixer.out_proj", "mixer"])
def test_a_hook_is_not_left_out(hopper: str, part: str) -> None:
    model = LanguageModel(LMConfig(97, 2048, 2, "mamba2"), device=hopper, dtype=HALF)
    cache = model.allocate_cache(1)
    block = model.backbone.layers[1]
    assert block.mixer.step_layer(block.norm, cache.mixers[1]) is not None
    module = block.get_submodule(part)
    handle = module.register_forward_hook(lambda *_: None)
    assert block.mixer.step_layer(block.norm, cache.mixers[1]) is None
    handle.remove()
