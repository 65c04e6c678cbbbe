"""The layers: parameters as mamba_ssm's, results as transformers', and states that carry a sequence on."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mamba_ops import Mamba, Mamba2, RMSNormGated
from mamba_ops.nn import LayerCache
from mamba_ops.nn.token import project
from tests.conftest import missing_device

Layer = Mamba | Mamba2

MAKERS: dict[str, Callable[..., Layer]] = {
    "mamba": lambda **kw: Mamba(24, d_state=4, **kw),
    "mamba-options": lambda **kw: Mamba(
        24, d_state=5, d_conv=3, expand=3, dt_rank=5, dt_init="constant", conv_bias=False, bias=True, **kw
    ),
    "mamba2": lambda **kw: Mamba2(32, d_state=8, headdim=16, **kw),
    "mamba2-groups": lambda **kw: Mamba2(
        32, d_state=6, headdim=8, ngroups=2, D_has_hdim=True, norm_before_gate=True, bias=True, **kw
    ),
    "mamba2-mlp": lambda **kw: Mamba2(
        32, d_state=8, headdim=8, d_ssm=32, d_conv=2, conv_init=0.3, dt_limit=(0.02, 0.05), **kw
    ),
    "mamba2-no-norm": lambda **kw: Mamba2(32, d_state=8, headdim=16, rmsnorm=False, conv_bias=False, **kw),
}


@pytest.fixture(params=MAKERS)
def layer(request: pytest.FixtureRequest) -> Layer:
    """Each kind of layer in float64, with parameters away from their special starting values."""
    layer = MAKERS[request.param]().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def inputs(layer: Layer, b: int, l: int) -> Tensor:  # noqa: E741
    return torch.randn(b, l, layer.d_model, dtype=torch.float64)


# --- parameters -------------------------------------------------------------------------------------------


def test_state_dict_of_mamba() -> None:
    shapes = {name: tuple(t.shape) for name, t in Mamba(32, d_state=4, bias=True).state_dict().items()}
    assert shapes == {
        "A_log": (64, 4),
        "D": (64,),
        "in_proj.weight": (128, 32),
        "in_proj.bias": (128,),
        "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,),
        "x_proj.weight": (2 + 8, 64),
        "dt_proj.weight": (64, 2),
        "dt_proj.bias": (64,),
        "out_proj.weight": (32, 64),
        "out_proj.bias": (32,),
    }


@pytest.mark.parametrize("hdim", [False, True])
def test_state_dict_of_mamba2(hdim: bool) -> None:
    layer = Mamba2(32, d_state=4, headdim=8, d_ssm=48, ngroups=3, D_has_hdim=hdim)
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == {
        "dt_bias": (6,),
        "A_log": (6,),
        "D": (48 if hdim else 6,),
        "in_proj.weight": (2 * 64 + 2 * 3 * 4 + 6, 32),
        "conv1d.weight": (48 + 24, 1, 4),
        "conv1d.bias": (72,),
        "norm.weight": (48,),
        "out_proj.weight": (32, 64),
    }


def test_parameters_that_stay_float32() -> None:
    mamba, mamba2 = Mamba(16, dtype=torch.bfloat16), Mamba2(16, headdim=8, dtype=torch.bfloat16)
    kept = {name for name, p in mamba.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "D"}
    assert {name for name, p in mamba2.named_parameters() if p.dtype == torch.float32} == {"D"}


def test_initial_values() -> None:
    mamba = Mamba(64, d_state=3, dt_min=0.01, dt_max=0.02)
    close(mamba.A_log, torch.tensor([1.0, 2.0, 3.0]).log().expand(128, 3), 0)
    assert (mamba.D == 1).all()
    steps = nn.functional.softplus(mamba.dt_proj.bias)
    assert 0.0099 < steps.min() < 0.011 and 0.019 < steps.max() < 0.0201
    assert 0.4 < mamba.dt_proj.weight.abs().max() <= mamba.dt_rank**-0.5

    mamba2 = Mamba2(512, headdim=4, A_init_range=(2, 3), dt_min=0.01, dt_max=0.02, dt_init_floor=0.015)
    rates = mamba2.A_log.exp()
    assert 1.999 < rates.min() < 2.1 and 2.9 < rates.max() < 3.001
    steps = nn.functional.softplus(mamba2.dt_bias)
    assert 0.01499 < steps.min() < 0.01501 and 0.019 < steps.max() < 0.0201
    assert (mamba2.D == 1).all() and (mamba2.norm.weight == 1).all()
    assert Mamba2(16, headdim=8, conv_init=0.01).conv1d.weight.abs().max() <= 0.01


def test_flags_for_optimizers() -> None:
    def flagged(module: nn.Module, flag: str) -> set[str]:
        return {name for name, p in module.named_parameters() if getattr(p, flag, False)}

    assert flagged(Mamba(16), "_no_weight_decay") == {"A_log", "D"}
    assert flagged(Mamba(16), "_no_reinit") == {"dt_proj.bias"}
    assert flagged(Mamba2(16, headdim=8), "_no_weight_decay") == {"A_log", "D", "dt_bias"}


def test_arguments_without_effect_are_accepted() -> None:
    assert Mamba(16, use_fast_path=False, layer_idx=3).layer_idx == 3
    assert Mamba2(16, headdim=8, chunk_size=64, use_mem_eff_path=False, sequence_parallel=False, layer_idx=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mamba(16, dt_init="zero"), "dt_init"),
        (lambda: Mamba(16, d_conv=5), "d_conv must be 2, 3 or 4, got 5"),
        (lambda: Mamba(0), "d_model must be at least 1, got 0"),
        (lambda: Mamba(16, dt_rank=0), "dt_rank must be at least 1, got 0"),
        (lambda: Mamba(16, dt_min=0.0), "dt_min and dt_max must be above 0, got 0.0"),
        (lambda: Mamba2(16, headdim=0), "headdim must be at least 1, got 0"),
        (lambda: Mamba2(16, headdim=8, ngroups=0), "ngroups must be at least 1, got 0"),
        (lambda: Mamba2(16, headdim=8, dt_limit=(1.0,)), r"dt_limit must be \(low, high\), got \(1.0,\)"),
        (lambda: Mamba2(16, headdim=5), "headdim must divide d_ssm = 32, got 5"),
        (lambda: Mamba2(16, headdim=8, ngroups=3), "ngroups must divide the 4 heads, got 3"),
        (lambda: Mamba2(16, headdim=8, d_ssm=64), "d_ssm must be in 1..32"),
        (lambda: Mamba2(16, headdim=8, A_init_range=(0, 1)), "A_init_range"),
        (lambda: Mamba2(16, headdim=8, process_group=object()), "process_group must be None"),
        (lambda: RMSNormGated(16, group_size=5), "group_size must divide hidden_size = 16, got 5"),
    ],
)
def test_bad_arguments(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- one sequence -----------------------------------------------------------------------------------------


def test_gradients_reach_every_parameter(layer: Layer) -> None:
    x = inputs(layer, 2, 7).requires_grad_()
    y = layer(x)
    assert y.shape == x.shape
    (y * torch.randn_like(y)).sum().backward()
    for name, p in [("x", x), *layer.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


def test_prefill_then_steps_equals_one_forward(layer: Layer) -> None:
    x = inputs(layer, 2, 9)
    cache = layer.allocate_cache(2)
    with torch.no_grad():
        whole = layer(x)
        close(layer(x[:, :4], cache=cache), whole[:, :4])
        close(layer(x[:, 4:5], cache=cache), whole[:, 4:5])
        close(layer(x[:, 5:7], cache=cache), whole[:, 5:7])
        close(layer.step(x[:, 7], cache), whole[:, 7])
        close(layer.step(x[:, 8:], cache), whole[:, 8:])


def test_steps_alone_equal_one_forward(layer: Layer) -> None:
    x = inputs(layer, 3, 6)
    cache = layer.allocate_cache(3)
    with torch.no_grad():
        close(torch.stack([layer.step(x[:, t], cache) for t in range(6)], dim=1), layer(x))


def test_no_tokens_leave_the_cache_alone(layer: Layer) -> None:
    x = inputs(layer, 2, 3)
    cache = layer.allocate_cache(2)
    with torch.no_grad():
        layer(x, cache=cache)
        before = cache.select([0, 1])
        assert layer(x[:, :0], cache=cache).shape == (2, 0, layer.d_model)
    close(cache.conv_state, before.conv_state, 0)
    close(cache.ssm_state, before.ssm_state, 0)


def test_training_with_a_cache(layer: Layer) -> None:
    """Truncated backpropagation: the second part's gradients hold although the cache has moved on since."""
    x = inputs(layer, 2, 8)
    cache = layer.allocate_cache(2)
    storage = cache.ssm_state.data_ptr()
    layer(x[:, :4], cache=cache)
    y = layer(x[:, 4:6], cache=cache)
    layer(x[:, 6:], cache=cache)
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert cache.ssm_state.data_ptr() == storage and not cache.ssm_state.requires_grad


@pytest.mark.parametrize("name", MAKERS)
def test_bfloat16(name: str) -> None:
    exact = MAKERS[name]().double()
    layer = MAKERS[name](dtype=torch.bfloat16)
    layer.load_state_dict(exact.state_dict())
    exact.load_state_dict(layer.state_dict())
    x = inputs(layer, 2, 12).bfloat16()
    cache = layer.allocate_cache(2)
    assert (cache.conv_state.dtype, cache.ssm_state.dtype) == (torch.bfloat16, torch.float32)
    with torch.no_grad():
        expected = exact(x.double())
        got = torch.cat([layer(x[:, :9], cache=cache), layer(x[:, 9:], cache=cache)], dim=1)
        stepped = torch.stack([layer.step(x[:, 0], layer.allocate_cache(2))], dim=1)
    assert got.dtype == stepped.dtype == torch.bfloat16
    scale = expected.abs().max()
    assert (got - expected).abs().max() < 0.03 * scale
    assert (stepped - expected[:, :1]).abs().max() < 0.03 * scale


@pytest.mark.parametrize("name", MAKERS)
def test_autocast(name: str) -> None:
    layer = MAKERS[name]()
    x = torch.randn(2, 9, layer.d_model)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    assert (got - expected).abs().max() < 0.03 * expected.abs().max()
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("b", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_product_of_few_rows(b: int, bias: bool) -> None:
    """The fast product of a step gives what the linear layer gives, in a layout that later products like."""
    linear = nn.Linear(640, 512, bias=bias)
    x = torch.randn(b, 640)
    got = project(linear, x)
    close(got, linear(x), 1e-5)
    assert got.stride() == (512, 1)


def test_product_of_few_rows_respects_replaced_layers() -> None:
    linear = nn.Linear(640, 512)
    x = torch.randn(1, 640)
    with torch.autocast("cpu", torch.bfloat16):
        assert project(linear, x).dtype == torch.bfloat16
    linear.register_forward_hook(lambda module, args, out: out + 1)
    close(project(linear, x), linear(x), 0)
    close(project(nn.Sequential(linear, nn.Tanh()), x), linear(x).tanh(), 0)


# --- packed sequences -------------------------------------------------------------------------------------

LENGTHS = (4, 1, 0, 6, 2)


def test_cu_seqlens_equals_separate_rows(layer: Layer) -> None:
    rows = [inputs(layer, 1, length) for length in LENGTHS]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    expected = torch.cat([layer(row) for row in rows if row.shape[1]], dim=1)
    close(layer(torch.cat(rows, dim=1), cu_seqlens=ends.int()), expected)


def test_seq_idx_equals_separate_rows(layer: Layer) -> None:
    x = inputs(layer, 2, 7)
    seq_idx = torch.tensor([[5, 5, 5, 0, 0, 5, 5], [1, 2, 2, 2, 2, 2, 2]])
    expected = torch.stack(
        [
            torch.cat([layer(x[:1, :3]), layer(x[:1, 3:5]), layer(x[:1, 5:])], dim=1)[0],
            torch.cat([layer(x[1:, :1]), layer(x[1:, 1:])], dim=1)[0],
        ]
    )
    close(layer(x, seq_idx=seq_idx.int()), expected)


def test_packed_prefill_then_steps(layer: Layer) -> None:
    """One pack fills a cache of a row per sequence, and steps and packs go on from it."""
    lengths = (3, 1, 5)
    rows = [inputs(layer, 1, length + 3) for length in lengths]
    cache = layer.allocate_cache(3)
    with torch.no_grad():
        firsts = torch.cat([row[:, :length] for row, length in zip(rows, lengths, strict=True)], dim=1)
        layer(firsts, cache=cache, cu_seqlens=torch.tensor([0, 3, 4, 9]))
        seconds = torch.cat([row[:, n : n + 2] for row, n in zip(rows, lengths, strict=True)], dim=1)
        packed = layer(seconds, cache=cache, cu_seqlens=torch.tensor([0, 2, 4, 6]))
        stepped = layer.step(torch.cat([row[:, -1] for row in rows]), cache)
        for i, row in enumerate(rows):
            whole = layer(row)[0]
            close(packed[0, 2 * i : 2 * i + 2], whole[-3:-1])
            close(stepped[i], whole[-1])


# --- the cache --------------------------------------------------------------------------------------------


def test_cache_rows(layer: Layer) -> None:
    x = inputs(layer, 3, 5)
    cache = layer.allocate_cache(3)
    with torch.no_grad():
        layer(x[:, :4], cache=cache)
        saved = cache.select([0, 1, 2])
        expected = layer.step(x[:, 4], cache.select([0, 1, 2]))
        close(layer.step(x[[2, 2], 4], cache.select([2, 2])), expected[[2, 2]], 1e-12)
        cache.reorder([1, 2, 0])
        close(layer.step(x[[1, 2, 0], 4], cache), expected[[1, 2, 0]], 1e-12)
        cache.copy_from(saved)
        close(layer.step(x[:, 4], cache), expected, 0)
        cache.reset()
        close(layer(x, cache=cache), layer(x))


def test_cache_of_another_shape() -> None:
    cache = Mamba(16).allocate_cache(2)
    with pytest.raises(ValueError, match="states must be"):
        cache.copy_from(Mamba(16).allocate_cache(3))


def test_step_wants_one_token(layer: Layer) -> None:
    cache: LayerCache = layer.allocate_cache(2)
    for shape in ((2, 2, layer.d_model), (2, layer.d_model + 1), (layer.d_model,)):
        with pytest.raises(ValueError, match=r"step: x must be \(b, "):
            layer.step(torch.zeros(shape, dtype=torch.float64), cache)


def test_forward_wants_a_batch_of_sequences(layer: Layer) -> None:
    for shape in ((2, layer.d_model), (2, 3, layer.d_model - 1)):
        with pytest.raises(ValueError, match=r"x must be \(b, l, "):
            layer(torch.zeros(shape, dtype=torch.float64))


# --- against transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_mamba_as_in_transformers(bias: bool) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = transformers.MambaConfig(
        hidden_size=24, state_size=5, conv_kernel=4, expand=2, time_step_rank=3, use_bias=bias
    )
    compare_with(MambaMixer(config, layer_idx=0), Mamba(24, d_state=5, dt_rank=3, bias=bias))


@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.02, 0.05)])
def test_mamba2_as_in_transformers(limit: tuple[float, float]) -> None:
    # 5.17 gives other results here, with several groups; 5.23 agrees.
    transformers = pytest.importorskip("transformers", minversion="5.23")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = transformers.Mamba2Config(
        hidden_size=32, num_heads=8, head_dim=8, n_groups=2, state_size=6, chunk_size=4, time_step_limit=limit
    )
    layer = Mamba2(32, d_state=6, headdim=8, ngroups=2, dt_limit=limit)
    compare_with(Mamba2Mixer(config, layer_idx=0), layer)


def compare_with(theirs: nn.Module, ours: Layer) -> None:
    """Output and gradients of a layer and of the transformers block whose state dict it has loaded."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    ours.load_state_dict(theirs.state_dict())
    x, dy = torch.randn(2, 11, ours.d_model), torch.randn(2, 11, ours.d_model)
    expected, got = theirs(x), ours(x)
    close(got, expected, 2e-5)
    expected.backward(dy)
    got.backward(dy)
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        grad = reference[name].grad
        assert grad is not None and parameter.grad is not None
        assert (parameter.grad - grad).norm() <= 2e-5 * grad.norm() + 1e-7, name


# --- projections that are more than their weights ----------------------------------------------------------


class Adapter(nn.Module):
    """A linear layer with a low-rank product beside it, and the weight of the layer alone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, linear.out_features, bias=False, dtype=torch.float64)

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + self.up(self.down(x))
        return out


@pytest.mark.parametrize("name", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_adapters_take_part(layer: Layer, name: str) -> None:
    """Forward, gradients, prefill and steps as with the adapter merged into the weight."""
    if not hasattr(layer, name):
        pytest.skip("no such projection")
    merged = copy.deepcopy(layer)
    adapter = Adapter(getattr(layer, name))
    setattr(layer, name, adapter)
    with torch.no_grad():
        getattr(merged, name).weight += adapter.up.weight @ adapter.down.weight
    x = inputs(layer, 2, 7).requires_grad_()
    outs = [module(x) for module in (layer, merged)]
    close(*outs)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in outs]
    close(*grads)
    assert torch.autograd.grad(layer(x).sum(), adapter.up.weight)[0].count_nonzero()
    with torch.no_grad():
        caches = [module.allocate_cache(2, dtype=torch.float64) for module in (layer, merged)]
        close(layer(x[:, :6], cache=caches[0]), merged(x[:, :6], cache=caches[1]))
        close(layer.step(x[:, 6], caches[0]), merged.step(x[:, 6], caches[1]))


@pytest.mark.parametrize("name", ["x_proj", "out_proj", "norm"])
def test_hooks_run(layer: Layer, name: str) -> None:
    if not hasattr(layer, name):
        pytest.skip("no such part")
    x, calls = inputs(layer, 1, 5), []
    expected = layer(x)
    handle = getattr(layer, name).register_forward_hook(lambda *_: calls.append(name))
    close(layer(x), expected)
    assert calls == [name]
    handle.remove()
    layer(x)
    assert calls == [name]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_norm_s_own_forward_runs_in_steps(device: str) -> None:
    """Where a GPU would take norm and projection in one launch."""

    class Nothing(RMSNormGated):
        def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
            return torch.zeros_like(x)

    reason = missing_device("norm_linear", device)
    if reason:
        pytest.skip(reason)
    layer = Mamba2(32, d_state=16, headdim=16, device=device, dtype=torch.bfloat16)
    x, cache = torch.randn(2, 32, device=device, dtype=torch.bfloat16), layer.allocate_cache(2)
    assert layer.step(x, cache).count_nonzero()
    layer.norm.__class__ = Nothing
    assert not layer.step(x, cache).count_nonzero()
