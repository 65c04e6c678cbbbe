"""The language model: its parameters and results, generation, and checkpoints."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mamba_ops.models import (
    CheckpointError,
    LanguageModel,
    LMConfig,
    checkpoint,
    generate,
    load_checkpoint,
    load_model,
    save_checkpoint,
    stream,
)
from mamba_ops.models.sampling import Sampling

CONFIGS = {
    "mamba": LMConfig(vocab_size=19, d_model=16, n_layer=2, layer="mamba", layer_args={"d_state": 4}),
    "mamba2": LMConfig(vocab_size=19, d_model=16, n_layer=2, layer_args={"d_state": 4, "headdim": 8}),
    "samba": LMConfig(
        vocab_size=19,
        d_model=16,
        n_layer=2,
        layer="mamba",
        layer_args={"d_state": 4},
        attn_layer_idx=(1,),
        attn_cfg={"num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 4, "window": 5},
        d_intermediate=32,
    ),
    "zamba": LMConfig(
        vocab_size=19,
        d_model=16,
        n_layer=3,
        layer_args={"d_state": 4, "headdim": 8},
        d_intermediate=32,
        mlp_layer_idx=(1,),
        shared_layer_idx=(0, 2),
        shared_cfg={"num_heads": 2, "d_intermediate": 64, "rotary_emb_dim": 8},
    ),
}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """A model whose answers depend on the whole prompt: far from its small starting weights."""
    model = LanguageModel(CONFIGS[request.param]).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


# --- the model --------------------------------------------------------------------------------------------


def test_names_of_parameters() -> None:
    names = set(LanguageModel(CONFIGS["mamba2"]).state_dict())
    mixer = {"A_log", "D", "dt_bias", "in_proj.weight", "conv1d.weight", "conv1d.bias", "norm.weight"}
    mixer |= {"out_proj.weight"}
    assert names == {
        "backbone.embedding.weight",
        "backbone.norm_f.weight",
        "lm_head.weight",
        *(f"backbone.layers.{i}.norm.weight" for i in range(2)),
        *(f"backbone.layers.{i}.mixer.{name}" for i in range(2) for name in mixer),
    }


def test_head_is_tied_or_not() -> None:
    tied = LanguageModel(LMConfig(d_model=16, n_layer=1, layer="mamba"))
    free = LanguageModel(LMConfig(d_model=16, n_layer=1, layer="mamba", tie_embeddings=False))
    assert tied.lm_head.weight is tied.backbone.embedding.weight
    assert free.lm_head.weight is not free.backbone.embedding.weight


def test_initialisation() -> None:
    config = LMConfig(d_model=64, n_layer=9, layer="mamba", layer_args={"bias": True})
    model = LanguageModel(config)
    mixer = model.backbone.layers[0].mixer
    assert abs(model.backbone.embedding.weight.std() - 0.02) < 1e-3
    assert (mixer.in_proj.bias == 0).all() and (mixer.out_proj.bias == 0).all()
    assert (mixer.dt_proj.bias != 0).all()
    bound = 128**-0.5 / math.sqrt(9)
    assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound


@pytest.mark.parametrize("name", ["samba", "zamba"])
def test_hybrids_train(name: str) -> None:
    """They learn a few sequences by heart."""
    model = LanguageModel(CONFIGS[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(19, (4, 12))
    losses = []
    for _ in range(30):
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_parts_of_hybrids() -> None:
    samba, zamba = LanguageModel(CONFIGS["samba"]), LanguageModel(CONFIGS["zamba"])
    assert [type(block.mixer).__name__ for block in samba.backbone.layers] == ["Mamba", "Attention"]
    assert [block.has_mlp for block in samba.backbone.layers] == [True, True]
    assert [block.has_mlp for block in zamba.backbone.layers] == [False, True, False]
    names = set(zamba.state_dict())
    assert {"backbone.layers.1.mlp.fc2.weight", "backbone.layers.1.norm2.weight"} <= names
    assert {name for name in names if "shared" in name} == {
        "backbone.layers.0.shared_proj.weight",
        "backbone.layers.2.shared_proj.weight",
        "backbone.shared.norm.weight",
        "backbone.shared.mixer.in_proj.weight",
        "backbone.shared.mixer.in_proj.bias",
        "backbone.shared.mixer.out_proj.weight",
        "backbone.shared.mixer.out_proj.bias",
        "backbone.shared.norm2.weight",
        "backbone.shared.mlp.fc1.weight",
        "backbone.shared.mlp.fc2.weight",
    }


def test_the_residual_stream_of_half_precision() -> None:
    """In float32 it keeps what bfloat16 would round away; every layer still computes in bfloat16."""
    config = LMConfig(vocab_size=19, d_model=16, n_layer=6, layer="mamba", layer_args={"d_state": 4})
    exact = LanguageModel(config).double()
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).bfloat16())
    tokens = torch.randint(19, (4, 12))
    errors = {}
    for wide in (True, False):
        model = LanguageModel(replace(config, residual_in_fp32=wide), dtype=torch.bfloat16)
        model.load_state_dict(exact.state_dict())
        logits = model(tokens)
        assert logits.dtype == torch.bfloat16
        errors[wide] = (logits - exact(tokens)).norm() / exact(tokens).norm()
    assert errors[True] < 0.8 * errors[False] < 0.03


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_as_in_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = CONFIGS[name]
    shared = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    shared |= {"tie_word_embeddings": True}
    if name == "mamba":
        theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**shared))
    else:
        theirs = transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(**shared, num_heads=4, head_dim=8, n_groups=1, chunk_size=4)
        )
    weights = {k.replace("embeddings", "embedding"): v for k, v in theirs.state_dict().items()}
    ours = LanguageModel(config)
    ours.load_state_dict(weights)
    tokens = torch.randint(19, (2, 9))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=2e-5, atol=2e-5)


def test_packs_equal_rows(model: LanguageModel) -> None:
    rows = [torch.tensor([row]) for row in PROMPTS]
    expected = torch.cat([model(row) for row in rows], dim=1)
    packed = torch.cat(rows, dim=1)
    seq_idx = torch.tensor([[0] * 3 + [1] + [2] * 7])
    close(model(packed, cu_seqlens=torch.tensor([0, 3, 4, 11])), expected)
    close(model(packed, seq_idx=seq_idx), expected)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_unknown_layer_and_entry() -> None:
    with pytest.raises(ValueError, match="layer must be one of"):
        LMConfig(layer="attention")
    for size in ("vocab_size", "d_model", "n_layer"):
        with pytest.raises(ValueError, match=f"{size} must be at least 1, got 0"):
            LMConfig(**{size: 0})
    with pytest.raises(ValueError, match="d_intermediate must be at least 0, got -1"):
        LMConfig(d_intermediate=-1)
    with pytest.raises(ValueError, match=r"unknown entries \['heads'\]"):
        LMConfig.from_dict({"heads": 3})
    with pytest.raises(ValueError, match=r"attn_layer_idx must lie in 0..n_layer - 1 = 3, got \(4,\)"):
        LMConfig(attn_layer_idx=(4,), attn_cfg={"num_heads": 2})
    with pytest.raises(ValueError, match="mlp_layer_idx needs d_intermediate"):
        LMConfig(mlp_layer_idx=(1,))


# --- generation -------------------------------------------------------------------------------------------


def greedy(model: LanguageModel, prompt: list[int], count: int) -> list[int]:
    """The likeliest token after a forward over everything so far, again and again."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_equals_repeated_forwards(model: LanguageModel) -> None:
    expected = [greedy(model, prompt, 8) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) == 3
    got = generate(model, PROMPTS, 8, temperature=0)
    assert [row.tolist() for row in got] == expected
    for prompt, row in zip(PROMPTS, expected, strict=True):
        assert generate(model, torch.tensor([prompt]), 8, temperature=0)[0].tolist() == row


def test_equal_lengths_run_as_a_batch(model: LanguageModel) -> None:
    prompts = torch.tensor([[1, 2], [3, 4]])
    got = generate(model, prompts, 6, temperature=0)
    assert [row.tolist() for row in got] == [greedy(model, row, 6) for row in prompts.tolist()]


def test_stop_token(model: LanguageModel) -> None:
    whole = [row.tolist() for row in generate(model, PROMPTS, 8, temperature=0)]
    stop = whole[0][3]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    got = generate(model, PROMPTS, 8, temperature=0, stop_token=stop)
    assert [row.tolist() for row in got] == expected
    steps = list(stream(model, PROMPTS[:1], 8, temperature=0, stop_token=stop))
    assert [int(step) for step in steps] == expected[0]


def test_ended_rows_yield_minus_one(model: LanguageModel) -> None:
    whole = [row.tolist() for row in generate(model, PROMPTS, 8, temperature=0)]
    stop = whole[0][0]
    steps = torch.stack(list(stream(model, PROMPTS, 8, temperature=0, stop_token=stop)), dim=1)
    assert steps[0, 0] == stop and (steps[0, 1:] == -1).all()


def test_a_seed_repeats(model: LanguageModel) -> None:
    def draw(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [row.tolist() for row in generate(model, PROMPTS, 20, generator=generator)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_on_token_sees_every_step(model: LanguageModel) -> None:
    seen: list[Tensor] = []
    rows = generate(model, PROMPTS, 5, on_token=seen.append, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.stack(seen, dim=1), torch.stack(rows))
    assert not seen[0].is_inference()


def test_nothing_to_generate(model: LanguageModel) -> None:
    assert [len(row) for row in generate(model, PROMPTS, 0)] == [0, 0, 0]
    assert generate(model, [], 5) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": [[1], []]}, r"prompt 1 must be \(l,\) with l >= 1"),
        ({"prompts": [[19]]}, r"prompt 0 must hold tokens in 0..18, got 19..19"),
        ({"prompts": [[-1]]}, "prompt 0 must hold tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    model = LanguageModel(CONFIGS["mamba"])
    with pytest.raises(ValueError, match=message):
        generate(model, **({"prompts": [[1]], "max_new_tokens": 3} | settings))  # type: ignore[arg-type]


PROBABILITIES = torch.tensor([[0.05, 0.4, 0.25, 0.3]])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.05, 0.4, 0.25, 0.3]),
        ({"top_k": 2}, [0, 0.4 / 0.7, 0, 0.3 / 0.7]),
        ({"top_k": 99}, [0.05, 0.4, 0.25, 0.3]),
        ({"top_p": 1.0}, [0.05, 0.4, 0.25, 0.3]),
        ({"top_p": 0.1}, [0, 1, 0, 0]),
        ({"top_p": 0.5}, [0, 0.4 / 0.7, 0, 0.3 / 0.7]),
        ({"top_k": 3, "top_p": 0.75}, [0, 0.4 / 0.95, 0.25 / 0.95, 0.3 / 0.95]),
        ({"temperature": 0.5}, [0.0025 / 0.315, 0.16 / 0.315, 0.0625 / 0.315, 0.09 / 0.315]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 1e-6}, [0, 1, 0, 0]),
    ],
)
def test_sampling_follows_its_distribution(settings: dict[str, float], expected: list[float]) -> None:
    logits = PROBABILITIES.log().expand(40_000, 4)
    generator = torch.Generator().manual_seed(0)
    drawn = Sampling(generator=generator, **settings).draw(logits)  # type: ignore[arg-type]
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert (shares - torch.tensor(expected)).abs().max() < 0.01
    assert all(share == 0 for share, e in zip(shares.tolist(), expected, strict=True) if e == 0)


# --- checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_round_trip(tmp_path: Path, tie: bool, dtype: torch.dtype) -> None:
    config = LMConfig(
        vocab_size=19, d_model=16, n_layer=1, layer_args={"headdim": 8}, tie_embeddings=tie, norm_eps=1e-6
    )
    model = LanguageModel(config, dtype=dtype)
    extra = {"momentum": torch.arange(3.0)}
    save_checkpoint(tmp_path / "a", model, step=12, extra=extra, info={"note": [1, "two"]})
    loaded = load_checkpoint(tmp_path / "a")
    assert (loaded.config, loaded.step, loaded.info) == (config, 12, {"note": [1, "two"]})
    assert torch.equal(loaded.extra["momentum"], extra["momentum"])
    again = load_model(tmp_path / "a")
    assert (again.lm_head.weight is again.backbone.embedding.weight) == tie
    for (name, mine), (other, theirs) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other and mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def test_a_loaded_model_trains(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", LanguageModel(CONFIGS["mamba"]))
    model = load_model(tmp_path / "a")
    flagged = {name.rsplit(".")[-1] for name, p in model.named_parameters() if hasattr(p, "_no_weight_decay")}
    assert flagged == {"A_log", "D"}
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot write .*none"):
        save_checkpoint(tmp_path / "none" / "a", LanguageModel(CONFIGS["mamba"]))


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    save_checkpoint(path, LanguageModel(CONFIGS["mamba"]), step=1)

    def broken(path: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "_sync", broken)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, LanguageModel(CONFIGS["mamba"]), step=2)
    assert load_checkpoint(path).step == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a"
    model = LanguageModel(CONFIGS["mamba"])
    save_checkpoint(path, model, step=1)
    child = os.fork()
    if child == 0:
        try:
            checkpoint._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
            save_checkpoint(path, model, step=2)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert load_checkpoint(path).step == 1


def rewritten(path: Path, **changes: str | None) -> None:
    """Writes the checkpoint again with other metadata entries; None takes one away."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() | changes
    save_file(tensors, path, {k: v for k, v in metadata.items() if v is not None})


def test_wrong_files_are_refused_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            load_model(path)
        assert "\n" not in str(caught.value)

    refused("no checkpoint at")
    path.write_bytes(b"")
    refused("not a whole safetensors file")
    path.write_bytes(b"these are no tensors at all")
    refused("not a whole safetensors file")
    save_file({"a": torch.zeros(2)}, path)
    refused("is no checkpoint of mamba_ops")

    model = LanguageModel(CONFIGS["mamba"])
    save_checkpoint(path, model)
    path.write_bytes(path.read_bytes()[:-8])
    refused("not a whole safetensors file")
    save_checkpoint(path, model)
    rewritten(path, step=None)
    refused("unreadable metadata")
    save_checkpoint(path, model)
    rewritten(path, config=json.dumps(CONFIGS["mamba"].to_dict() | {"n_layer": 3}))
    refused("weights do not fit the config: .* Missing key")
    save_checkpoint(path, model)
    rewritten(path, config=json.dumps(CONFIGS["mamba"].to_dict() | {"vocab_size": 20}))
    refused("weights do not fit the config: .* size mismatch")
    save_checkpoint(path, model)
    rewritten(path, config=json.dumps(CONFIGS["mamba"].to_dict() | {"layer_args": {"heads": 3}}))
    refused("the config does not describe a model")
