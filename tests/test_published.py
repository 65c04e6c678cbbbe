"""Published checkpoint folders: both libraries' names and files, whole or refused, never lost."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mamba_ops.models import (
    CheckpointError,
    LanguageModel,
    LMConfig,
    checkpoint,
    load_pretrained,
    save_pretrained,
)
from tests.test_models import CONFIGS

SMALL = {
    "mamba": LMConfig(19, 16, 2, "mamba", {"d_state": 4, "expand": 3, "dt_rank": 5, "bias": True}),
    "mamba2": LMConfig(19, 16, 2, layer_args={"d_state": 4, "headdim": 8, "ngroups": 2, "d_conv": 3}),
    "untied": LMConfig(
        19,
        16,
        2,
        layer_args={"headdim": 8, "dt_limit": (0.01, 0.2), "conv_bias": False},
        tie_embeddings=False,
    ),
    "narrow": LMConfig(19, 16, 1, "mamba", norm_eps=1e-6, residual_in_fp32=False),
}
HYBRID = LMConfig(
    vocab_size=24,
    d_model=16,
    n_layer=3,
    layer_args={"d_state": 4, "headdim": 8, "d_ssm": 16, "D_has_hdim": True},
    attn_layer_idx=(1,),
    attn_cfg={
        "causal": True,
        "d_conv": 4,
        "head_dim": 8,
        "num_heads": 3,
        "rotary_emb_dim": 4,
        "qkv_proj_bias": False,
        "out_proj_bias": False,
    },
    d_intermediate=32,
)


def shaken(config: LMConfig, **options: Any) -> LanguageModel:
    model = LanguageModel(config, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def same(got: LanguageModel, expected: LanguageModel) -> None:
    """The same weights, dtypes and results."""
    pairs = zip(got.state_dict().items(), expected.state_dict().items(), strict=True)
    for (name, mine), (other, theirs) in pairs:
        assert name == other and mine.dtype == theirs.dtype and torch.equal(mine, theirs), name
    tokens = torch.randint(got.config.vocab_size, (2, 9))
    assert torch.equal(got(tokens), expected(tokens))
    assert torch.equal(step(got, tokens[:, 0]), step(expected, tokens[:, 0]))


def step(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    return model.step(tokens, model.allocate_cache(len(tokens), max_length=9))


# --- round trips ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [None, 3000])
@pytest.mark.parametrize("name", SMALL)
def test_transformers_round_trip(
    tmp_path: Path, name: str, shard_bytes: int | None, dtype: torch.dtype
) -> None:
    model = shaken(SMALL[name], dtype=dtype)
    save_pretrained(model, tmp_path / "a", shard_bytes=shard_bytes)
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert ("model.safetensors" in files) == (shard_bytes is None)
    assert ("model.safetensors.index.json" in files) == (shard_bytes is not None)
    same(load_pretrained(tmp_path / "a"), model)


@pytest.mark.parametrize("shard_bytes", [None, 3000])
@pytest.mark.parametrize("name", ["mamba", "mamba2", "untied", "hybrid"])
def test_mamba_ssm_round_trip(tmp_path: Path, name: str, shard_bytes: int | None) -> None:
    model = shaken(HYBRID if name == "hybrid" else SMALL[name])
    save_pretrained(model, tmp_path, naming="mamba_ssm", shard_bytes=shard_bytes)
    assert (tmp_path / "pytorch_model.bin").exists() == (shard_bytes is None)
    same(load_pretrained(tmp_path), model)


# --- against transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_transformers_loads_ours(tmp_path: Path, name: str, sharded: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = shaken(SMALL[name])
    save_pretrained(model, tmp_path, shard_bytes=3000 if sharded else None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(19, (2, 9))
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "bin"])
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_ours_loads_transformers(tmp_path: Path, name: str, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    shared = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    if name == "mamba":
        theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**shared, use_bias=True))
    else:
        theirs = transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(**shared, num_heads=4, head_dim=8, n_groups=2, layer_norm_epsilon=1e-3)
        )
    theirs.save_pretrained(tmp_path, max_shard_size="6KB" if kind == "sharded" else "5GB")
    if kind == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    assert (tmp_path / "model.safetensors.index.json").exists() == (kind == "sharded")
    ours = load_pretrained(tmp_path)
    tokens = torch.randint(19, (2, 9))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=3e-5, atol=3e-5)


# --- as mamba_ssm's authors published them ----------------------------------------------------------------


def published_folder(folder: Path, model: LanguageModel, config: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def test_the_first_configs(tmp_path: Path) -> None:
    """Entries of later versions are missing, and the vocabulary is padded to a multiple of 8."""
    model = shaken(LMConfig(vocab_size=24, d_model=32, n_layer=1, layer="mamba"))
    config = {"d_model": 32, "n_layer": 1, "vocab_size": 19, "ssm_cfg": {}, "rms_norm": True}
    config |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    published_folder(tmp_path, model, config)
    same(load_pretrained(tmp_path), model)


def test_a_hybrid_with_attention(tmp_path: Path) -> None:
    model = shaken(HYBRID)
    config = {
        "d_model": 16,
        "d_intermediate": 32,
        "n_layer": 3,
        "vocab_size": 19,
        "ssm_cfg": {"layer": "Mamba2"} | HYBRID.layer_args,
        "attn_layer_idx": [1],
        "attn_cfg": HYBRID.attn_cfg,
        "pad_vocab_size_multiple": 8,
    }
    published_folder(tmp_path, model, config)
    same(load_pretrained(tmp_path), model)
    assert {name for name in model.state_dict() if ".1." in name} == {
        f"backbone.layers.1.{name}"
        for name in (
            "norm.weight",
            "mixer.in_proj.weight",
            "mixer.conv1d.weight",
            "mixer.conv1d.bias",
            "mixer.out_proj.weight",
            "norm2.weight",
            "mlp.fc1.weight",
            "mlp.fc2.weight",
        )
    }


def test_dtype(tmp_path: Path) -> None:
    model = shaken(SMALL["mamba"])
    save_pretrained(model, tmp_path)
    low = load_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {name.rsplit(".")[-1] for name, p in low.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "D"}
    assert low.lm_head.weight is low.backbone.embedding.weight
    assert torch.equal(low.lm_head.weight, model.lm_head.weight.bfloat16())
    low(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(p.grad is not None for p in low.parameters())
    assert getattr(low.backbone.layers[0].mixer.A_log, "_no_weight_decay", False)  # type: ignore[union-attr]


def test_either_of_tied_weights_may_be_missing(tmp_path: Path) -> None:
    model = shaken(SMALL["mamba"])
    save_pretrained(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("backbone.embeddings.weight")
    save_file(weights, tmp_path / "model.safetensors")
    same(load_pretrained(tmp_path), model)
    weights["backbone.embeddings.weight"] = weights["lm_head.weight"] + 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="ties head and embedding, but their weights differ"):
        load_pretrained(tmp_path)


# --- what is refused --------------------------------------------------------------------------------------


def edited(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def refuses(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, r"model_type must be one of \['mamba', 'mamba2'\].* got 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"intermediate_size": 33}, "intermediate_size must be 32, got 33"),
        ({"num_heads": 5}, r"num_heads \* head_dim must be 32, got 40"),
        ({"conv_kernel": 7}, "d_conv must be 2, 3 or 4, got 7"),
        ({"n_groups": 3}, "ngroups must divide"),
        ({"head_dim": 0, "num_heads": 0}, "num_heads"),
        ({"num_hidden_layers": 3}, "weights do not fit the config: .* Missing key"),
        ({"num_hidden_layers": "two"}, "describes? (no|a) model"),
        ({"vocab_size": 20}, "weights do not fit the config: .* size mismatch"),
        ({"vocab_size": -1}, "vocab_size must be at least 1, got -1"),
        ({"time_step_limit": 3}, "does not describe a model"),
    ],
)
def test_configs_of_transformers(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = LMConfig(19, 16, 2, layer_args={"d_state": 4, "headdim": 8})
    save_pretrained(shaken(config), tmp_path)
    edited(tmp_path / "config.json", **changes)
    refuses(tmp_path, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba3"}}, r"ssm_cfg.layer must be one of \['Mamba1', 'Mamba2'\]"),
        ({"ssm_cfg": {"layer": "Mamba2", "heads": 2}}, "unexpected keyword argument 'heads'"),
        ({"ssm_cfg": 5}, "describes no model"),
        ({"rms_norm": False}, "rms_norm must be true"),
        ({"pad_vocab_size_multiple": 0}, "describes no model"),
        ({"attn_cfg": {"num_heads": 2}}, "attn_cfg.causal must be true"),
        ({"moe": 8}, r"unknown entries \['moe'\]"),
        ({"attn_layer_idx": [3]}, "attn_layer_idx must lie in 0..n_layer - 1 = 2"),
    ],
)
def test_configs_of_mamba_ssm(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_pretrained(shaken(HYBRID), tmp_path, naming="mamba_ssm")
    edited(tmp_path / "config.json", **changes)
    refuses(tmp_path, message)


def test_broken_files(tmp_path: Path) -> None:
    refuses(tmp_path / "none", "no checkpoint in .*none: there is no config.json")
    model, path = shaken(SMALL["mamba2"]), tmp_path / "model.safetensors"
    save_pretrained(model, tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config[:-10])
    refuses(tmp_path, "config.json describes no model that we have")
    (tmp_path / "config.json").write_text("[1, 2]")
    refuses(tmp_path, "config.json describes no model that we have")
    (tmp_path / "config.json").write_text(config)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    refuses(tmp_path, "model.safetensors is not a whole safetensors file")
    path.unlink()
    refuses(tmp_path, "no weights in")
    path = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), path)
    whole = path.read_bytes()
    for bad in (whole[: len(whole) // 2], b"", b"something else"):
        path.write_bytes(bad)
        refuses(tmp_path, "pytorch_model.bin is not a whole file of torch.save")
    torch.save([1, 2], path)
    refuses(tmp_path, "must hold a dict of tensors, got list")
    torch.save({"backbone.embedding.weight": 5}, path)
    refuses(tmp_path, "backbone.embedding.weight must be a floating-point tensor, got int")
    torch.save({"backbone.embedding.weight": torch.zeros(2, dtype=torch.int8)}, path)
    refuses(tmp_path, "must be a floating-point tensor, got torch.int8")
    torch.save({1: torch.zeros(2)}, path)
    refuses(tmp_path, "weights must be named by strings, got 1")


def test_a_pickle_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    save_pretrained(shaken(SMALL["mamba"]), tmp_path, naming="mamba_ssm")
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    refuses(tmp_path, "not a whole file of torch.save")
    assert not (tmp_path / "ran").exists()


def test_broken_shards(tmp_path: Path) -> None:
    save_pretrained(shaken(SMALL["mamba2"]), tmp_path, shard_bytes=3000)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name = weight_map["backbone.norm_f.weight"]
    shard = load_file(tmp_path / name)
    save_file({k: t for k, t in shard.items() if k != "backbone.norm_f.weight"}, tmp_path / name)
    refuses(tmp_path, f"{name} has no backbone.norm_f.weight")
    (tmp_path / name).unlink()
    refuses(tmp_path, f"the shard {name} is missing")
    edited(index, weight_map={k: f"../{v}" for k, v in weight_map.items()})
    refuses(tmp_path, "must name files beside it")
    for bad in ({"weight_map": 3}, {"weight_map": {"a": 3}}, {}, [1]):
        index.write_text(json.dumps(bad))
        refuses(tmp_path, "is no index of shards")


@pytest.mark.parametrize("name", ["samba", "zamba"])
def test_models_that_the_others_do_not_have(tmp_path: Path, name: str) -> None:
    for naming in ("transformers", "mamba_ssm"):
        with pytest.raises(ValueError, match=f"{naming} has no model with this"):
            save_pretrained(LanguageModel(CONFIGS[name]), tmp_path / "a", naming=naming)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shard_bytes must be at least 1, got 0"):
        save_pretrained(shaken(CONFIGS["mamba"]), tmp_path, shard_bytes=0)
    with pytest.raises(ValueError, match="naming must be"):
        save_pretrained(LanguageModel(SMALL["mamba"]), tmp_path / "a", naming="jax")  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("args", [{"rmsnorm": False}, {"d_ssm": 16}, {"norm_before_gate": True}])
def test_layers_that_transformers_does_not_have(tmp_path: Path, args: dict[str, Any]) -> None:
    model = LanguageModel(LMConfig(d_model=16, n_layer=1, layer_args={"headdim": 8} | args))
    with pytest.raises(ValueError, match=f"no model with this layer_args.{next(iter(args))}"):
        save_pretrained(model, tmp_path)


# --- nothing is lost --------------------------------------------------------------------------------------


def test_a_checkpoint_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    first, second = shaken(SMALL["mamba"]), shaken(SMALL["mamba2"])
    (tmp_path / "tokenizer.json").write_text("{}")
    save_pretrained(first, tmp_path)
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        save_pretrained(second, tmp_path, naming="mamba_ssm")
    same(load_pretrained(tmp_path), first)
    for naming, shard_bytes in (("mamba_ssm", None), ("transformers", 3000), ("transformers", 2000)):
        save_pretrained(second, tmp_path, naming=naming, shard_bytes=shard_bytes, overwrite=True)  # type: ignore[arg-type]
        same(load_pretrained(tmp_path), second)
    save_pretrained(first, tmp_path, overwrite=True)
    same(load_pretrained(tmp_path), first)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("shard_bytes", [None, 3000])
def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int | None
) -> None:
    first, second = shaken(SMALL["mamba2"]), shaken(SMALL["mamba2"])
    save_pretrained(first, tmp_path, shard_bytes=shard_bytes)
    names = {path.name for path in tmp_path.iterdir()}

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(second, tmp_path, shard_bytes=shard_bytes, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == names
    same(load_pretrained(tmp_path), first)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("survives", range(5))
def test_a_killed_write_leaves_the_old_or_the_new_checkpoint(tmp_path: Path, survives: int) -> None:
    """Killed at each rename, of 3 shards, the index and the config, that replaces another checkpoint."""
    first, second = shaken(SMALL["mamba2"]), shaken(SMALL["mamba2"])
    save_pretrained(first, tmp_path, shard_bytes=8000)
    child = os.fork()
    if child == 0:
        try:
            left = survives

            def counted(path: object, to: object, rename: Any = os.replace) -> None:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                rename(path, to)

            checkpoint.os.replace = counted  # type: ignore[assignment]
            save_pretrained(second, tmp_path, shard_bytes=8000, overwrite=True)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    same(load_pretrained(tmp_path), second if survives == 4 else first)
