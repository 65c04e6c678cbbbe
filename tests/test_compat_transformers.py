"""transformers' models on mamba_ops, small ones of every family, against transformers' own functions."""

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops import compat
from mamba_ops.compat import patch

transformers = pytest.importorskip("transformers", minversion="5.23")

VOCAB = 61
LIMIT = 1e-5  # relative, in the 2-norm: float32 rounding
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
ATTENTION = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8}
SSD = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "chunk_size": 8}

# Every family, with an attention layer where there is a choice. hidden_size is 32.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {"state_size": 4, "num_hidden_layers": 2}),
    "mamba, biases": ("Mamba", {"state_size": 4, "num_hidden_layers": 2, "use_bias": True}),
    "mamba2": ("Mamba2", {"num_hidden_layers": 2, **SSD}),
    "mamba2, steps limited": ("Mamba2", {"num_hidden_layers": 2, "time_step_limit": [0.02, 0.05], **SSD}),
    "falcon_mamba": ("FalconMamba", {"state_size": 4, "num_hidden_layers": 2}),
    "jamba": (
        "Jamba",
        {
            "num_hidden_layers": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            **ATTENTION,
        },
    ),
    "bamba": (
        "Bamba",
        {"num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_chunk_size": 8, **HEADS, **ATTENTION},
    ),
    "zamba2": (
        "Zamba2",
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "n_mamba_heads": 8,
            "mamba_ngroups": 2,
            "mamba_d_state": 8,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "use_mem_rope": False,
            "adapter_rank": 4,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            "num_hidden_layers": 2,
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 48,
            "mamba_chunk_size": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            **HEADS,
            **ATTENTION,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            "layers_block_type": ["mamba", "attention", "mlp"],
            "head_dim": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 8,
            **ATTENTION,
        },
    ),
}
for norm in (False, True):
    options = {"num_hidden_layers": 2, "head_dim": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 8}
    options |= {"mamba_rms_norm": norm, "mamba_norm_before_gate": False, **HEADS, **ATTENTION}
    CONFIGS[f"falcon_h1, {'with' if norm else 'without'} norm"] = ("FalconH1", options)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """On a GPU transformers' functions need operators that torch calls nondeterministic, and no TF32."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        torch.use_deterministic_algorithms(False)
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield request.param


def build(name: str, **changes: Any) -> Any:
    """A model of the family with every parameter off its initial value."""
    family, options = CONFIGS[name]
    config = getattr(transformers, f"{family}Config")(hidden_size=32, **TOKENS, **options | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def assert_same(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    assert theirs.keys() == ours.keys()
    for key, expected in theirs.items():
        error = torch.linalg.vector_norm(ours[key] - expected)
        assert error <= LIMIT * torch.linalg.vector_norm(expected) + 1e-7, f"{key}: {error}"


def both(call: Callable[[], dict[str, Tensor]]) -> None:
    """The same call with transformers' functions and with ours."""
    theirs = call()
    with compat.patch_transformers():
        ours = call()
    assert_same(theirs, ours)


def loss_and_gradients(model: Any, kept: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:
    """Logits (of the kept tokens) and the gradients of their sum weighted by random numbers."""
    model.zero_grad()
    logits = model(**inputs).logits
    logits = logits if kept is None else logits[kept]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weights.to(logits)).sum().backward()
    grads = {f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | grads


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients(name: str, training: bool, device: str) -> None:
    """Whole batches and batches padded on the left; in training the fused forms run where they may."""
    model = build(name).to(device).train(training)
    ids = torch.randint(3, VOCAB, (2, 19)).to(device)
    mask = torch.ones(2, 19, dtype=torch.long, device=device)
    both(lambda: loss_and_gradients(model, input_ids=ids))
    mask[0, :5] = 0
    both(lambda: loss_and_gradients(model, mask.bool(), input_ids=ids, attention_mask=mask))


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_and_cached_continuation(name: str, device: str) -> None:
    model = build(name).to(device).eval()
    ids = torch.randint(3, VOCAB, (2, 12)).to(device)
    mask = torch.ones(2, 12, dtype=torch.long, device=device)
    mask[0, :5] = 0

    def generated(mask: Tensor) -> Tensor:
        return model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)

    def call() -> dict[str, Tensor]:
        results = {"generated": generated(torch.ones_like(mask)).double(), "padded": generated(mask).double()}
        cache: dict[str, Any] = {}
        for tokens in (slice(0, 5), slice(5, 10), slice(10, 11), slice(11, 12)):
            out = model(input_ids=ids[:, tokens], use_cache=True, **cache)
            results[f"logits from {tokens.start}"] = out.logits
            attribute = "past_key_values" if getattr(out, "past_key_values", None) else "cache_params"
            cache = {attribute: getattr(out, attribute)}
        return results

    both(call)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_batches(name: str, training: bool, device: str) -> None:
    """Two sequences in a row as each by itself, with gradients; transformers' own functions refuse that."""
    # Granite's attention does not keep packed sequences apart, whatever its Mamba layers do.
    changes = {"layer_types": ["mamba"] * 2} if "granite" in name else {}
    model = build(name, **changes).to(device).train(training)
    first, second = torch.randint(3, VOCAB, (1, 11)).to(device), torch.randint(3, VOCAB, (1, 8)).to(device)
    seq_idx = torch.tensor([[0] * 11 + [1] * 8], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(11), torch.arange(8)])[None].to(device)
    weights = torch.randn(1, 19, VOCAB).to(device)

    def gradients(logits: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (logits * weights).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    apart = torch.cat([model(input_ids=t, use_cache=False).logits for t in (first, second)], dim=1)
    theirs = {"logits": apart.detach()} | gradients(apart)
    with compat.patch_transformers():
        packed = torch.cat([first, second], dim=1)
        logits = model(packed, seq_idx=seq_idx, position_ids=positions, use_cache=False).logits
        assert_same(theirs, {"logits": logits.detach()} | gradients(logits))


def test_packed_batches_under_gradient_checkpointing() -> None:
    """Where the model hands seq_idx on it works; where it is dropped, it is refused."""
    ids, seq_idx = torch.randint(3, VOCAB, (1, 12)), torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
    model = build("nemotron_h").train()
    inputs = {"input_ids": ids, "seq_idx": seq_idx, "use_cache": False}
    with compat.patch_transformers():
        plain = loss_and_gradients(model, **inputs)
        model.gradient_checkpointing_enable()
        assert_same(plain, loss_and_gradients(model, **inputs))
        model = build("mamba").train()
        model.gradient_checkpointing_enable()
        with pytest.raises(RuntimeError, match="gradient checkpointing would lose it"):
            model(input_ids=ids, seq_idx=seq_idx)


def test_training_uses_the_fused_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in patch.FUSED:
        function = patch.FUNCTIONS[name]

        def counted(*args: Any, _name: str = name, _function: Any = function, **kwargs: Any) -> Any:
            calls.append(_name)
            return _function(*args, **kwargs)

        counted.__signature__ = importlib.import_module("inspect").signature(function)  # type: ignore[attr-defined]
        monkeypatch.setitem(patch.FUNCTIONS, name, counted)
    ids = torch.randint(3, VOCAB, (1, 7))
    with compat.patch_transformers():
        for family, expected in (("mamba", 2), ("mamba2", 2), ("falcon_mamba", 0), ("bamba", 1)):
            calls.clear()
            build(family).train()(input_ids=ids, use_cache=False)
            assert len(calls) == expected, family
            build(family).eval()(input_ids=ids, use_cache=False)
            assert len(calls) == expected, family


def test_bfloat16_models_keep_float32_states() -> None:
    """Caches take the dtype of the states that the scans return."""
    model = build("mamba2").to(torch.bfloat16).eval()
    ids = torch.randint(3, VOCAB, (1, 7))
    with torch.no_grad(), compat.patch_transformers():
        cache = model(input_ids=ids, use_cache=True).cache_params
        state = cache.get_recurrent_state(0, state_idx=0)
        assert state.dtype == torch.float32
        model(input_ids=ids[:, :1], cache_params=cache)
        assert cache.get_recurrent_state(0, state_idx=0).dtype == torch.float32


def test_another_activation_stays_with_transformers() -> None:
    model = build("mamba", hidden_act="gelu").train()
    ids = torch.randint(3, VOCAB, (1, 9))
    both(lambda: loss_and_gradients(model, input_ids=ids))
    model = build("mamba2", hidden_act="gelu").train()
    both(lambda: loss_and_gradients(model, input_ids=ids))


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_compiled(name: str) -> None:
    """In one graph, packs included."""
    model = build(name).train()
    ids, seq_idx = torch.randint(3, VOCAB, (1, 9)), torch.tensor([[0] * 4 + [1] * 5], dtype=torch.int32)
    with compat.patch_transformers():
        expected = loss_and_gradients(model, input_ids=ids, seq_idx=seq_idx)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        got = loss_and_gradients(compiled, input_ids=ids, seq_idx=seq_idx)
    assert_same(expected, {key.replace("_orig_mod.", ""): value for key, value in got.items()})


def test_exports_keep_transformers_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("mamba2").eval(), torch.randint(3, VOCAB, (1, 9))
    called: list[str] = []
    monkeypatch.setitem(patch.FUNCTIONS, "causal_conv1d_fn", lambda x, *_, **__: called.append("ours") or x)
    with compat.patch_transformers(), torch.no_grad():
        monkeypatch.setattr(transformers.utils.import_utils, "is_torchdynamo_exporting", lambda: True)
        model(ids, use_cache=False)
        assert not called
        monkeypatch.undo()
    both(lambda: loss_and_gradients(model, input_ids=ids))


def test_undo_and_modeling_files_that_come_later() -> None:
    """Patching covers files that are loaded and files that are not yet, and leaves nothing behind."""
    loaded = importlib.import_module("transformers.models.mamba.modeling_mamba")
    later = "transformers.models.mamba2.modeling_mamba2"
    sys.modules.pop(later, None)
    before = {**vars(loaded)}, loaded.MambaMixer.forward, list(sys.meta_path)
    outer, inner = compat.patch_transformers(), compat.patch_transformers()
    assert loaded.causal_conv1d_fn is not before[0]["causal_conv1d_fn"]
    module = importlib.import_module(later)
    patched = module.mamba2_chunk_scan
    inner()
    inner()  # a second time does nothing
    assert module.mamba2_chunk_scan is patched
    outer()
    assert module.mamba2_chunk_scan is not patched
    assert vars(loaded) == before[0]
    assert loaded.MambaMixer.forward is before[1] and sys.meta_path == before[2]
