"""mamba_ssm's modules, models and generation as the stand-in has them: what people rely on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import mamba_ops
from mamba_ops import reference
from mamba_ops.compat.mamba_ssm.distributed.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from mamba_ops.compat.mamba_ssm.models.config_mamba import MambaConfig
from mamba_ops.compat.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel, create_block
from mamba_ops.compat.mamba_ssm.modules.block import Block
from mamba_ops.compat.mamba_ssm.modules.mamba2 import Mamba2
from mamba_ops.compat.mamba_ssm.modules.mamba2_simple import Mamba2Simple
from mamba_ops.compat.mamba_ssm.modules.mamba3 import Mamba3
from mamba_ops.compat.mamba_ssm.modules.mamba_simple import Mamba
from mamba_ops.compat.mamba_ssm.modules.mha import MHA
from mamba_ops.compat.mamba_ssm.modules.mlp import GatedMLP
from mamba_ops.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm
from mamba_ops.compat.mamba_ssm.utils import determinism, generation
from mamba_ops.compat.mamba_ssm.utils.generation import InferenceParams, decode, sample

LAYERS = {
    "mamba": lambda **k: Mamba(16, d_state=4, layer_idx=0, **k),
    "mamba2": lambda **k: Mamba2(16, d_state=8, headdim=8, ngroups=2, layer_idx=0, **k),
    "mamba2, with an MLP": lambda **k: Mamba2(16, d_state=8, headdim=4, d_ssm=16, layer_idx=0, **k),
    "mamba2, D by channel": lambda **k: Mamba2(16, d_state=8, headdim=8, D_has_hdim=True, layer_idx=0, **k),
}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Layers


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_ours_with_upstreams_calls(name: str) -> None:
    layer = LAYERS[name]()
    ours = mamba_ops.Mamba(16, d_state=4) if name == "mamba" else None
    if ours is not None:
        ours.load_state_dict(layer.state_dict())
        x = torch.randn(2, 5, 16)
        assert torch.equal(layer(x), ours(x))
    assert "in_proj.weight" in layer.state_dict() and layer.conv1d.weight.dim() == 3


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_prefill_steps_and_more_tokens(name: str) -> None:
    """Any prompt, then one token, then several at a time (which the original refuses), then one."""
    layer, x = LAYERS[name](), torch.randn(2, 12, 16)
    whole = layer(x)
    for prompt in (1, 2, 7):
        params = InferenceParams(max_seqlen=12, max_batch_size=2)
        parts, begin = [], 0
        for tokens in (prompt, 1, 3, 12 - prompt - 4):
            parts.append(layer(x[:, begin : begin + tokens], inference_params=params))
            begin += tokens
            params.seqlen_offset = begin
        close(torch.cat(parts, dim=1), whole)
        params.reset(12, 2)
        close(layer(x[:, :3], inference_params=params), whole[:, :3])  # what was kept is forgotten


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_step_and_caches(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(2, 1, 16)
    conv_state, ssm_state = layer.allocate_inference_cache(2, 9)
    channels = layer.conv1d.weight.shape[0]
    assert conv_state.shape == (2, channels, 4) and ssm_state.shape[0] == 2
    if name != "mamba":
        assert conv_state.stride() == (4 * channels, 1, channels)
    out, conv_again, ssm_again = layer.step(x, conv_state, ssm_state)
    assert conv_again is conv_state and ssm_again is ssm_state and ssm_state.count_nonzero() > 0
    close(out, layer(x))
    half = layer.allocate_inference_cache(2, 9, dtype=torch.float16)
    assert [t.dtype for t in half] == [torch.float16] * 2
    assert [t.dtype for t in LAYERS[name](dtype=torch.bfloat16).allocate_inference_cache(1, 1)] == [
        torch.bfloat16
    ] * 2
    with pytest.raises(AssertionError, match="1 token"):
        layer.step(torch.randn(2, 2, 16), conv_state, ssm_state)


@torch.no_grad()
def test_the_convolutions_state_holds_its_last_inputs() -> None:
    layer, x = LAYERS["mamba"](), torch.randn(1, 6, 16)
    params = InferenceParams(max_seqlen=9, max_batch_size=1)
    layer(x, inference_params=params)
    inputs = layer.in_proj(x)[..., :32].mT
    close(params.key_value_memory_dict[0][0], inputs[..., -4:])
    params = InferenceParams(max_seqlen=9, max_batch_size=1)
    layer(x[:, :2], inference_params=params)
    close(params.key_value_memory_dict[0][0], F.pad(inputs[..., :2], (2, 0)))


@torch.no_grad()
def test_mamba2_packs() -> None:
    layer, x = LAYERS["mamba2"](), torch.randn(1, 9, 16)
    cuts = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    ids = torch.tensor([[0] * 3 + [1] + [2] * 5], dtype=torch.int32)
    apart = torch.cat([layer(x[:, a:b]) for a, b in ((0, 3), (3, 4), (4, 9))], dim=1)
    close(layer(x, seq_idx=ids), apart)
    close(layer(x, cu_seqlens=cuts), apart)
    close(layer(x, seq_idx=ids, cu_seqlens=cuts), apart)
    params = InferenceParams(max_seqlen=9, max_batch_size=3)
    close(layer(x, seq_idx=ids, cu_seqlens=cuts, inference_params=params), apart)
    params.seqlen_offset = 9
    token = torch.randn(3, 1, 16)
    got = layer(token, inference_params=params)
    for row, (a, b) in enumerate(((0, 3), (3, 4), (4, 9))):
        close(got[row : row + 1], layer(torch.cat([x[:, a:b], token[row : row + 1]], 1))[:, -1:])
    flat = torch.randn(2, 5, 16)
    assert torch.equal(layer(flat.view(10, 16), seqlen=5), layer(flat).view(10, 16))


def test_mamba2_simple() -> None:
    layer = Mamba2Simple(16, d_state=8, headdim=8, ngroups=2, learnable_init_states=True, bias=True)
    with torch.no_grad():
        layer.init_states.normal_()
    x, ids = torch.randn(2, 7, 16), torch.tensor([[0] * 3 + [1] * 4] * 2, dtype=torch.int32)
    expected = reference.mamba_split_conv1d_scan(
        layer.in_proj(x),
        layer.conv1d.weight.squeeze(1),
        layer.conv1d.bias,
        layer.dt_bias,
        -layer.A_log.exp(),
        layer.D,
        headdim=8,
        ngroups=2,
        rmsnorm_weight=layer.norm.weight,
        rmsnorm_eps=1e-5,
        outproj_weight=layer.out_proj.weight,
        outproj_bias=layer.out_proj.bias,
        initial_state=layer.init_states.expand(2, -1, -1, -1),
        seq_idx=ids,
    )
    out = layer(x, seq_idx=ids)
    close(out, expected)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.count_nonzero() for p in layer.parameters())
    assert layer.init_states._no_weight_decay
    assert "init_states" not in Mamba2Simple(16, headdim=8).state_dict()


def test_mamba2_simple_with_an_adapter() -> None:
    """A projection that is more than its weight runs as it is."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer, x = Mamba2Simple(16, d_state=8, headdim=8, learnable_init_states=True), torch.randn(2, 7, 16)
    with torch.no_grad():
        layer.init_states.normal_()
        expected = 2 * layer(x)
        layer.out_proj.__class__ = Doubled
        close(layer(x), expected)


def test_mamba3_is_a_name() -> None:
    with pytest.raises(NotImplementedError, match="Mamba-3"):
        Mamba3(16)


# Blocks


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("residual_in_fp32", [False, True])
def test_block(rms: bool, residual_in_fp32: bool) -> None:
    norm: Any = RMSNorm if rms else nn.LayerNorm

    def build(fused: bool) -> Block:
        torch.manual_seed(0)
        mixer = lambda d: Mamba(d, d_state=4, layer_idx=0)  # noqa: E731
        return Block(16, mixer, lambda d: GatedMLP(d, 24, multiple_of=8), norm, fused, residual_in_fp32)

    x, residual = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    for given in (None, residual):
        plain, fused = build(False)(x, given), build(True)(x, given)
        for a, b in zip(plain, fused, strict=True):
            close(a, b)
    half = build(True).to(torch.bfloat16)(x.bfloat16())
    assert half[1].dtype == (torch.float32 if residual_in_fp32 else torch.bfloat16)
    no_mlp = Block(16, lambda d: Mamba(d, d_state=4), nn.Identity)
    assert not any(key.startswith(("mlp", "norm2")) for key in no_mlp.state_dict())


def test_gated_mlp_gates_with_its_second_half() -> None:
    mlp, x = GatedMLP(6, multiple_of=8), torch.randn(3, 6)
    y, gate = mlp.fc1(x).chunk(2, dim=-1)
    assert torch.equal(mlp(x), mlp.fc2(y * F.silu(gate))) and mlp.fc2.in_features == 16


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"rotary_emb_dim": 4}, {"d_conv": 3}, {"mlp_dim": 256}])
@pytest.mark.parametrize("interleaved", [False, True])
def test_attention_goes_on_from_its_cache(options: dict[str, int], interleaved: bool) -> None:
    layer = MHA(
        16,
        4,
        2,
        causal=True,
        layer_idx=0,
        rotary_emb_interleaved=interleaved,
        **options,  # type: ignore[arg-type]
    )
    x = torch.randn(2, 9, 16)
    whole = layer(x)
    close(layer(x[:, :4]), whole[:, :4])
    params = InferenceParams(max_seqlen=12, max_batch_size=2)
    parts, begin = [], 0
    for tokens in (4, 1, 1, 3):
        parts.append(layer(x[:, begin : begin + tokens], inference_params=params))
        begin += tokens
        params.seqlen_offset = begin
    close(torch.cat(parts, dim=1), whole)
    params.lengths_per_sample = torch.tensor([5, 5], dtype=torch.int32)  # as a captured step reads it
    params.seqlen_offset = 11
    if not options.get("d_conv"):
        close(layer(x[:, 5:6], inference_params=params), whole[:, 5:6])


def test_attention_is_attention() -> None:
    layer = MHA(8, 2, causal=False, qkv_proj_bias=False, softmax_scale=0.3)
    x = torch.randn(1, 5, 8)
    q, k, v = layer.in_proj(x).view(1, 5, 3, 2, 4).unbind(2)
    weights = torch.einsum("bihd,bjhd->bhij", q, k).mul(0.3).softmax(-1)
    close(layer(x), layer.out_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)))


# The language model


def lm(**changes: Any) -> MambaLMHeadModel:
    torch.manual_seed(0)
    options: dict[str, Any] = {"d_model": 16, "n_layer": 2, "vocab_size": 61, "ssm_cfg": {"d_state": 4}}
    return MambaLMHeadModel(MambaConfig(**options | changes)).eval()


HYBRID: dict[str, Any] = {
    "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8},
    "attn_layer_idx": [1],
    "attn_cfg": {"num_heads": 2, "causal": True, "rotary_emb_dim": 8},
    "d_intermediate": 24,
}


def test_the_language_model() -> None:
    model = lm()
    keys = set(model.state_dict())
    assert {"backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"} <= keys
    assert {"backbone.layers.1.norm.weight", "backbone.layers.1.mixer.A_log"} <= keys
    assert model.lm_head.weight is model.backbone.embedding.weight and model.lm_head.out_features == 64
    ids = torch.randint(61, (2, 7))
    out = model(ids)
    assert out._fields == ("logits",) and out.logits.shape == (2, 7, 64)
    assert torch.equal(model(ids, num_last_tokens=2).logits, out.logits[:, -2:])
    hybrid = lm(**HYBRID, tie_embeddings=False)
    assert isinstance(hybrid.backbone.layers[1].mixer, MHA) and "lm_head.weight" in hybrid.state_dict()
    assert hybrid.lm_head.weight is not hybrid.backbone.embedding.weight
    with pytest.raises(ValueError, match="Invalid ssm_layer"):
        create_block(8, 0, {"layer": "Mamba9"})


def test_initial_values() -> None:
    model = lm(n_layer=4, ssm_cfg={"layer": "Mamba2", "d_state": 8, "headdim": 8, "bias": True})
    assert 0.015 < model.backbone.embedding.weight.std() < 0.025
    mixer = model.backbone.layers[0].mixer
    assert mixer.in_proj.bias.count_nonzero() == 0
    assert mixer.out_proj.weight.abs().max() <= 1 / 32**0.5 / 4**0.5
    assert lm().backbone.layers[0].mixer.dt_proj.bias.count_nonzero() == 32  # kept by _no_reinit


@pytest.mark.parametrize("options", [{}, HYBRID])
@pytest.mark.parametrize("fused", [False, True])
def test_generate(options: dict[str, Any], fused: bool) -> None:
    """Greedy, with states, as by running the whole sequence for every token."""
    model = lm(**options, fused_add_norm=fused, residual_in_fp32=fused)
    ids = torch.randint(61, (2, 5))
    expected = ids
    for _ in range(6):
        logits = model(expected, num_last_tokens=1).logits.squeeze(1)[:, :61]
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    got = model.generate(ids, 11, vocab_size=61)
    assert torch.equal(got, expected)
    assert torch.equal(model.generate(ids, 11, vocab_size=61, cg=True), expected)  # no graph on the CPU
    out = model.generate(ids, 11, vocab_size=61, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(out.sequences, expected) and len(out.scores) == 6 and out.scores[0].shape == (2, 61)
    assert model.generate(ids, 11, return_dict_in_generate=True).scores is None


def test_generate_stops_streams_and_follows_a_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[Tensor] = []
            self.ended = False

        def put(self, tokens: Tensor) -> None:
            self.tokens.append(tokens)

        def end(self) -> None:
            self.ended = True

    model, ids, streamer = lm(), torch.randint(61, (1, 4)), Streamer()
    greedy = model.generate(ids, 12)
    end = int(greedy[0, 6])
    stopped = decode(ids, model, 12, eos_token_id=end, streamer=streamer, enable_timing=True).sequences
    first = 4 + (greedy[0, 4:] == end).nonzero()[0].item()
    assert torch.equal(stopped, greedy[:, : first + 1])
    assert streamer.ended and torch.equal(torch.cat(streamer.tokens, 1), stopped)
    assert "decoding time" in capsys.readouterr().out
    teacher = torch.randint(61, (1, 9))
    taught = model.generate(ids, 12, teacher_outputs=teacher)
    assert torch.equal(taught[:, 4:9], teacher[:, 4:]) and taught.shape == (1, 12)
    assert not torch.equal(model.generate(ids, 12, repetition_penalty=1e9), greedy)


def test_sample() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.2, 0.05]])).expand(2000, -1)

    def seen(**options: Any) -> Tensor:
        return torch.bincount(sample(logits, **options), minlength=4) / 2000

    assert seen()[0] == 1
    assert ((seen(top_k=0) - logits[0].exp()).abs() < 0.05).all()
    assert (seen(top_k=2) > 0).tolist() == [True, True, False, False]
    assert (seen(top_k=0, top_p=0.7) > 0).tolist() == [True, True, False, False]
    assert (seen(top_k=4, top_p=0.7) > 0).tolist() == [True, True, False, False]
    assert (seen(top_k=0, min_p=0.45) > 0).tolist() == [True, True, False, False]  # of the largest
    assert seen(top_k=0, temperature=0.1)[0] > 0.99
    with pytest.raises(AssertionError, match="top-p"):
        sample(logits, top_k=0, top_p=1.5)
    kept = logits[:1].clone()
    generation.modify_logits_for_top_k_filtering(kept, 2)
    assert kept.isinf().tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("format_", ["bin", "safetensors", "shards"])
def test_checkpoints(tmp_path: Path, format_: str) -> None:
    model, ids = lm(**HYBRID), torch.randint(61, (1, 5))
    model.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["d_intermediate"] == 24
    weights = torch.load(tmp_path / "pytorch_model.bin")
    if format_ != "bin":
        save_file = pytest.importorskip("safetensors.torch").save_file
        weights = {k: v.clone() for k, v in weights.items()}
        (tmp_path / "pytorch_model.bin").unlink()
        if format_ == "safetensors":
            save_file(weights, tmp_path / "model.safetensors")
        else:
            keys = sorted(weights)
            files = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(keys)}
            for file in set(files.values()):
                save_file({k: weights[k] for k in keys if files[k] == file}, tmp_path / file)
            index = {"weight_map": files}
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    again = MambaLMHeadModel.from_pretrained(str(tmp_path))
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    half = MambaLMHeadModel.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    dtypes = {k: p.dtype for k, p in half.named_parameters()}
    assert dtypes["backbone.layers.0.mixer.D"] == torch.float32
    assert dtypes["backbone.layers.0.mixer.in_proj.weight"] == torch.bfloat16
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    (tmp_path / "pytorch_model.bin").unlink(missing_ok=True)
    with pytest.raises(OSError, match="missing|neither"):
        MambaLMHeadModel.from_pretrained(str(tmp_path))


# The rest


def test_the_switch_of_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAMBA_DETERMINISTIC", raising=False)
    assert determinism.use_deterministic_mode() == torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("MAMBA_DETERMINISTIC", "0")
    assert not determinism.use_deterministic_mode()
    determinism.set_deterministic_mode(True)
    assert determinism.use_deterministic_mode()
    determinism.set_deterministic_mode(None)
    assert not determinism.use_deterministic_mode()


def parallel_linears(rank: int, folder: str) -> None:
    """A column-parallel and a row-parallel layer behind each other: the whole product, and its gradients."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(0)
    x, first, second = (torch.randn(*s, generator=generator) for s in ((4, 6), (8, 6), (3, 8)))
    bias = torch.randn(3, generator=generator)
    whole = x.clone().requires_grad_()
    expected = F.linear(F.linear(whole, first), second, bias)
    expected.square().sum().backward()
    for sequence in (True, False):
        column = ColumnParallelLinear(6, 8, group, bias=False, sequence_parallel=sequence, multiple_of=2)
        row = RowParallelLinear(8, 3, group, sequence_parallel=sequence)
        mine = slice(4 * rank, 4 * rank + 4)
        with torch.no_grad():
            column.weight.copy_(first[mine])
            row.weight.copy_(second[:, mine])
            if row.bias is not None:
                row.bias.copy_(bias)
        tokens = slice(2 * rank, 2 * rank + 2) if sequence else slice(None)
        part = x[tokens].clone().requires_grad_()
        out = row(column(part))
        torch.testing.assert_close(out, expected[tokens].detach())
        out.square().sum().backward()
        torch.testing.assert_close(part.grad, whole.grad[tokens])
        assert (row.bias is None) == (rank == 1)
    try:
        ColumnParallelLinear(6, 9, group, multiple_of=2)
    except ValueError as error:
        assert "multiple of 2" in str(error)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
def test_tensor_parallel(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        parallel_linears, args=(str(tmp_path),), nprocs=2, start_method="fork"
    )
