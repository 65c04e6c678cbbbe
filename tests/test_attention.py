"""Attention of hybrids: the plain formula, transformers' results, packs, and the cache."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba_ops.models import LanguageModel, LMConfig
from mamba_ops.models.lm import Pass, SharedBlock
from mamba_ops.nn import Attention, AttentionCache

OPTIONS: dict[str, dict[str, object]] = {
    "plain": {"num_heads": 2},
    "grouped": {"num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 4, "qkv_proj_bias": False},
    "window": {"num_heads": 2, "rotary_emb_dim": 8, "window": 4, "softmax_scale": 0.3},
    "window-of-one": {"num_heads": 2, "window": 1},
    "interleaved": {"num_heads": 2, "rotary_emb_dim": 6, "rotary_emb_interleaved": True, "head_dim": 10},
    "conv": {"num_heads": 4, "num_heads_kv": 1, "d_conv": 4, "rotary_emb_dim": 2, "window": 3},
    "mlp": {"num_heads": 2, "mlp_dim": 100, "d_conv": 2, "d_out": 6, "rotary_emb_base": 50.0},
}


@pytest.fixture(params=OPTIONS)
def layer(request: pytest.FixtureRequest) -> Attention:
    return Attention(16, **OPTIONS[request.param]).double()  # type: ignore[arg-type]


def inputs(b: int, l: int) -> Tensor:  # noqa: E741
    return torch.randn(b, l, 16, dtype=torch.float64)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def fresh(layer: Attention, rows: int) -> AttentionCache:
    return layer.allocate_cache(rows, max_length=None if layer.window else 40)


def formula(layer: Attention, x: Tensor) -> Tensor:
    """One row (l, d_model), a query at a time, from the parameters alone."""
    l, h, hkv, p = len(x), layer.num_heads, layer.num_heads_kv, layer.head_dim
    projected = layer.in_proj(x)
    qkv, mlp = projected[:, : layer.qkv_dim], projected[:, layer.qkv_dim :]
    if layer.d_conv and l:
        qkv = layer.conv1d(qkv.t()[None])[0, :, :l].t()
    q, k, v = (t.unflatten(1, (-1, p)) for t in qkv.split([h * p, hkv * p, hkv * p], dim=1))
    q, k = turn(layer, q), turn(layer, k)
    scale = p**-0.5 if layer.softmax_scale is None else layer.softmax_scale
    out = []
    for t in range(l):
        first = 0 if layer.window is None else max(0, t - layer.window + 1)
        for head in range(h):
            group = head // (h // hkv)
            weights = (scale * k[first : t + 1, group] @ q[t, head]).softmax(0)
            out.append(weights @ v[first : t + 1, group])
    heads = torch.cat(out).view(l, h * p) if out else x.new_empty(0, h * p)
    if layer.mlp_dim:
        up, gate = mlp.chunk(2, dim=1)
        heads = torch.cat([heads, up * F.silu(gate)], dim=1)
    result: Tensor = layer.out_proj(heads)
    return result


def turn(layer: Attention, x: Tensor) -> Tensor:
    """Rotation of pairs as multiplication by exp(i t f)."""
    dim = layer.rotary_emb_dim
    parts = list(x.unbind(-1))
    for i in range(dim // 2):
        one, two = (2 * i, 2 * i + 1) if layer.rotary_emb_interleaved else (i, i + dim // 2)
        angle = torch.arange(len(x), dtype=x.dtype) * layer.rotary_emb_base ** (-2 * i / dim)
        turned = torch.complex(parts[one], parts[two]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        parts[one], parts[two] = turned.real, turned.imag
    return torch.stack(parts, -1)


@pytest.mark.parametrize("l", [0, 1, 3, 4, 5, 13])
def test_follows_the_formula(layer: Attention, l: int) -> None:  # noqa: E741
    x = inputs(2, l)
    close(layer(x), torch.stack([formula(layer, row) for row in x]))


def test_gradients(layer: Attention) -> None:
    x = inputs(2, 9).requires_grad_()
    expected = torch.stack([formula(layer, row) for row in x])
    weights = torch.randn_like(expected)
    leaves = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x), leaves, weights)
    for got, want in zip(ours, torch.autograd.grad(expected, leaves, weights), strict=True):
        close(got, want)


def test_packs_equal_rows(layer: Attention) -> None:
    lengths = [3, 0, 1, 9]
    rows = [inputs(1, length) for length in lengths]
    expected = torch.cat([layer(row) for row in rows], dim=1)
    pack = torch.cat(rows, dim=1)
    close(layer(pack, cu_seqlens=torch.tensor([0, 3, 3, 4, 13], dtype=torch.int32)), expected)
    ids = torch.tensor([[5] * 3 + [2] + [5] * 9])
    close(layer(pack, seq_idx=ids), expected)
    close(layer(torch.cat([pack, pack]), seq_idx=ids.expand(2, -1)), torch.cat([expected, expected]))


@pytest.mark.parametrize("pieces", [(0, 17), (3, 1, 13), (5, 5, 7), (1, 0, 2, 14)])
def test_cache_goes_on(layer: Attention, pieces: tuple[int, ...]) -> None:
    x = inputs(2, 20)
    whole, cache = layer(x), fresh(layer, 2)
    with torch.no_grad():
        got = [layer(piece, cache=cache) for piece in x[:, :17].split(pieces, dim=1)]
        got += [layer.step(x[:, 17], cache)[:, None], layer.step(x[:, 18:19], cache)]
        got.append(layer(x[:, 19:], cache=cache))
    close(torch.cat(got, dim=1), whole)


def test_cache_and_packs(layer: Attention) -> None:
    lengths = [1, 6, 11]
    rows = [inputs(1, length + 6) for length in lengths]
    wholes = [layer(row)[0] for row in rows]
    cache = fresh(layer, 3)
    parts = [[0, *(n for n in lengths)], [0, 2, 0, 3], [0, 1, 1, 1]]
    done = [0, 0, 0]
    with torch.no_grad():
        for part in parts:
            pack = torch.cat([r[:, d : d + n] for r, d, n in zip(rows, done, part[1:], strict=True)], dim=1)
            out = layer(pack, cache=cache, cu_seqlens=torch.tensor(part).cumsum(0))[0]
            expected = [w[d : d + n] for w, d, n in zip(wholes, done, part[1:], strict=True)]
            close(out, torch.cat(expected))
            done = [d + n for d, n in zip(done, part[1:], strict=True)]
        tokens = torch.stack([row[0, d] for row, d in zip(rows, done, strict=True)])
        expected = torch.stack([w[d] for w, d in zip(wholes, done, strict=True)])
        chosen = cache.select([2, 0])
        close(layer.step(tokens[[2, 0]], chosen), expected[[2, 0]])
        saved = cache.select([0, 1, 2])
        close(layer.step(tokens, cache), expected)
        cache.copy_from(saved)
        close(layer.step(tokens, cache), expected)
        cache.put([1], saved.select([1]))
        close(layer.step(tokens, cache)[1], expected[1])
        cache.reset()
        close(layer(rows[0].expand(3, -1, -1), cache=cache), wholes[0].expand(3, -1, -1))


def test_no_sequences(layer: Attention) -> None:
    x, cache = inputs(0, 9), fresh(layer, 0)
    with torch.no_grad():
        for out in (layer(x), layer(x, cache=cache), layer(x, cache=cache)):
            assert out.shape == (0, 9, layer.out_proj.out_features)
        assert layer.step(x[:, 0], cache).shape == (0, layer.out_proj.out_features)
        empty = layer(inputs(1, 0), cache=fresh(layer, 2), cu_seqlens=torch.tensor([0, 0, 0]))
    assert empty.shape == (1, 0, layer.out_proj.out_features)
    with pytest.raises(ValueError, match="with s >= 1 and batch 1"):
        layer(inputs(1, 0), cu_seqlens=torch.tensor([0]))


def test_a_full_cache_says_so() -> None:
    layer = Attention(16, 2)
    cache = layer.allocate_cache(1, max_length=3)
    with torch.no_grad():
        layer(torch.zeros(1, 3, 16), cache=cache)
        with pytest.raises(ValueError, match=r"room for 3 tokens, got 3 \+ 1"):
            layer.step(torch.zeros(1, 16), cache)
    with pytest.raises(ValueError, match="room for 3 tokens, got 3"):
        layer(torch.zeros(1, 2, 16), cache=cache, cu_seqlens=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="without a window needs max_length"):
        layer.allocate_cache(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide d_model = 16, got 3"),
        ({"num_heads": 4, "num_heads_kv": 3}, "num_heads_kv must divide num_heads = 4, got 3"),
        ({"num_heads": 2, "head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"num_heads": 2, "rotary_emb_dim": 3}, "rotary_emb_dim must be even"),
        ({"num_heads": 2, "rotary_emb_dim": 10}, "in 0..head_dim = 8, got 10"),
        ({"num_heads": 2, "window": 0}, "window must be at least 1"),
        ({"num_heads": 2, "causal": False}, "causal must be True"),
        ({"num_heads": 2, "d_conv": 5}, "d_conv must be 2, 3 or 4"),
    ],
)
def test_bad_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(16, **options)  # type: ignore[arg-type]


def test_bad_input() -> None:
    layer = Attention(16, 2)
    x = torch.zeros(1, 4, 16)
    for bad in ([0, 3], [1, 4], [0, 3, 2, 4]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to l = 4"):
            layer(x, cu_seqlens=torch.tensor(bad))
    with pytest.raises(ValueError, match="with batch 2"):
        layer(x.expand(2, -1, -1), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"seq_idx must be \(b, l\)"):
        layer(x, seq_idx=torch.zeros(1, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="integers, got .* torch.float32"):
        layer(x, seq_idx=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="neither a cache nor cu_seqlens"):
        layer(x, seq_idx=torch.zeros(1, 4, dtype=torch.int32), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="must have 1 rows, got 2"):
        layer(x, cache=layer.allocate_cache(2, max_length=9))
    with pytest.raises(ValueError, match="must have 1 rows, got 2"):
        layer.step(x[:, 0], layer.allocate_cache(2, max_length=9))


def test_half_precision() -> None:
    exact = Attention(16, 4, 2, rotary_emb_dim=4, window=5, d_conv=3).double()
    layer = Attention(16, 4, 2, rotary_emb_dim=4, window=5, d_conv=3, dtype=torch.bfloat16)
    layer.load_state_dict(exact.state_dict())
    exact.load_state_dict(layer.state_dict())
    x = inputs(2, 9).bfloat16()
    expected, cache = exact(x.double()), layer.allocate_cache(2)
    with torch.no_grad():
        got = torch.cat([layer(x[:, :8], cache=cache), layer.step(x[:, 8:], cache)], dim=1)
    assert got.dtype == torch.bfloat16
    assert (got - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("window", [None, 3])
def test_as_in_transformers(window: int | None) -> None:
    """A whole model of attention and MLPs: Mistral's."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=19,
            hidden_size=16,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=window,
            initializer_range=0.5,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    ).double()
    attn_cfg = {"num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 4, "window": window}
    attn_cfg |= {"qkv_proj_bias": False, "out_proj_bias": False}
    ours = LanguageModel(
        LMConfig(
            19, 16, 2, attn_layer_idx=(0, 1), attn_cfg=attn_cfg, d_intermediate=128, tie_embeddings=False
        )
    ).double()
    theirs_now, weights = theirs.state_dict(), {}
    for i in range(2):
        old, new = f"model.layers.{i}", f"backbone.layers.{i}"
        qkv = [theirs_now[f"{old}.self_attn.{name}_proj.weight"] for name in "qkv"]
        fc1 = [theirs_now[f"{old}.mlp.{name}_proj.weight"] for name in ("up", "gate")]
        weights[f"{new}.mixer.in_proj.weight"] = torch.cat(qkv)
        weights[f"{new}.mixer.out_proj.weight"] = theirs_now[f"{old}.self_attn.o_proj.weight"]
        weights[f"{new}.mlp.fc1.weight"] = torch.cat(fc1)
        weights[f"{new}.mlp.fc2.weight"] = theirs_now[f"{old}.mlp.down_proj.weight"]
        weights[f"{new}.norm.weight"] = theirs_now[f"{old}.input_layernorm.weight"]
        weights[f"{new}.norm2.weight"] = theirs_now[f"{old}.post_attention_layernorm.weight"]
    weights["backbone.embedding.weight"] = theirs_now["model.embed_tokens.weight"]
    weights["backbone.norm_f.weight"] = theirs_now["model.norm.weight"]
    weights["lm_head.weight"] = theirs_now["lm_head.weight"]
    ours.load_state_dict(weights)
    tokens = torch.randint(19, (2, 12))
    close(ours(tokens), theirs(tokens).logits, 1e-5)  # transformers rotates in float32


def test_the_shared_block_as_in_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.zamba.modeling_zamba import ZambaAttentionDecoderLayer

    config = transformers.ZambaConfig(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=128,
        hidden_act="silu",
        rms_norm_eps=1e-5,
    )
    config._attn_implementation = "eager"
    theirs = ZambaAttentionDecoderLayer(config, layer_idx=0).double()
    shared_cfg = {"num_heads": 4, "softmax_scale": (32 / 4 / 2) ** -0.5, "d_intermediate": 128}
    shared_cfg |= {"qkv_proj_bias": False, "out_proj_bias": False}
    lm = LMConfig(
        d_model=16, n_layer=1, shared_layer_idx=(0,), shared_cfg=shared_cfg, layer_args={"headdim": 8}
    )
    ours = SharedBlock(lm, None, torch.float64)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter))
    attention, mlp = theirs.self_attn, theirs.feed_forward
    copy(ours.mixer.in_proj, attention.q_proj, attention.k_proj, attention.v_proj)
    copy(ours.mixer.out_proj, attention.o_proj)
    copy(ours.mlp.fc1, mlp.up_proj, mlp.gate_proj)
    copy(ours.mlp.fc2, mlp.down_proj)
    copy(ours.norm, theirs.input_layernorm)
    copy(ours.norm2, theirs.pre_ff_layernorm)
    x, embedded = inputs(2, 7), inputs(2, 7)
    mask = torch.full((7, 7), -math.inf, dtype=torch.float64).triu(1)[None, None]
    expected = theirs(x, embedded, layer_idx=0, attention_mask=mask)
    close(ours(x, embedded, Pass(), None), expected, 1e-5)


def copy(ours: nn.Module, *theirs: nn.Module) -> None:
    ours.weight.data.copy_(torch.cat([module.weight for module in theirs]))  # type: ignore[union-attr, operator]
