"""Configs and weight names of published checkpoints, as mamba_ssm and transformers write them."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from torch import Tensor

from .config import LAYERS, LMConfig

Naming = Literal["mamba_ssm", "transformers"]

# transformers' key, ours, and transformers' default: its config.json may leave out what is as by default.
Entries = tuple[tuple[str, str, Any], ...]
SHARED: Entries = (
    ("conv_kernel", "d_conv", 4),
    ("expand", "expand", 2),
    ("time_step_min", "dt_min", 0.001),
    ("time_step_max", "dt_max", 0.1),
    ("time_step_floor", "dt_init_floor", 1e-4),
    ("use_bias", "bias", False),
    ("use_conv_bias", "conv_bias", True),
)
TRANSFORMERS_LAYER: dict[str, Entries] = {
    "mamba": (
        *SHARED,
        ("state_size", "d_state", 16),
        ("time_step_rank", "dt_rank", "auto"),
        ("time_step_init_scheme", "dt_init", "random"),
        ("time_step_scale", "dt_scale", 1.0),
    ),
    "mamba2": (
        *SHARED,
        ("state_size", "d_state", 128),
        ("head_dim", "headdim", 64),
        ("n_groups", "ngroups", 8),
        ("time_step_limit", "dt_limit", (0.0, float("inf"))),
        ("chunk_size", "chunk_size", 256),
        ("layer_norm_epsilon", "norm_eps", 1e-5),
    ),
}
TRANSFORMERS_MODEL: dict[str, Entries] = {
    "mamba": (
        ("vocab_size", "vocab_size", 50280),
        ("hidden_size", "d_model", 768),
        ("num_hidden_layers", "n_layer", 32),
        ("layer_norm_epsilon", "norm_eps", 1e-5),
        ("residual_in_fp32", "residual_in_fp32", True),
        ("tie_word_embeddings", "tie_embeddings", True),
    ),
    "mamba2": (
        ("vocab_size", "vocab_size", 32768),
        ("hidden_size", "d_model", 4096),
        ("num_hidden_layers", "n_layer", 64),
        ("layer_norm_epsilon", "norm_eps", 1e-5),
        ("residual_in_fp32", "residual_in_fp32", True),
        ("tie_word_embeddings", "tie_embeddings", False),
    ),
}
# Arguments of our layers that transformers' models cannot express, and the values that they have there.
TRANSFORMERS_FIXED = {"d_ssm": None, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}

MAMBA_SSM_LAYERS = {"Mamba1": "mamba", "Mamba2": "mamba2"}
MAMBA_SSM_DEFAULTS: dict[str, Any] = {
    "d_model": 2560,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}


def read_config(values: dict[str, Any]) -> LMConfig:
    """The config of a published config.json. Raises ValueError for what our model cannot be."""
    kind = values.get("model_type")
    if kind in TRANSFORMERS_MODEL:
        return _from_transformers(kind, values)
    if kind is None and "d_model" in values:
        return _from_mamba_ssm(values)
    raise ValueError(
        f"model_type must be one of {sorted(TRANSFORMERS_MODEL)} (or be absent, beside mamba_ssm's d_model), "
        f"got {kind!r}"
    )


def write_config(config: LMConfig, naming: Naming) -> dict[str, Any]:
    """The inverse of read_config. Raises ValueError for what the other library cannot express."""
    return _to_mamba_ssm(config) if naming == "mamba_ssm" else _to_transformers(config)


def read_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under our names, which are mamba_ssm's; transformers' differ in the embedding."""
    return {name.replace("backbone.embeddings.", "backbone.embedding."): t for name, t in weights.items()}


def write_weights(weights: dict[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    """The inverse of read_weights."""
    if naming == "mamba_ssm":
        return weights
    return {name.replace("backbone.embedding.", "backbone.embeddings."): t for name, t in weights.items()}


def _from_transformers(kind: str, values: dict[str, Any]) -> LMConfig:
    def read(entries: Entries) -> dict[str, Any]:
        return {ours: _plain(values.get(theirs, default)) for theirs, ours, default in entries}

    layer_args = read(TRANSFORMERS_LAYER[kind])
    config = LMConfig(layer=kind, layer_args=layer_args, **read(TRANSFORMERS_MODEL[kind]))
    inner = int(layer_args["expand"] * config.d_model)
    demands = [
        ("hidden_act", "silu", values.get("hidden_act", "silu")),
        ("intermediate_size", inner, values.get("intermediate_size", inner)),
    ]
    if kind == "mamba2":
        heads = values.get("num_heads", 128) * layer_args["headdim"]
        demands.append(("num_heads * head_dim", inner, heads))
    for name, must, found in demands:
        if found != must and not (name == "hidden_act" and found == "swish"):
            raise ValueError(f"{name} must be {must!r}, got {found!r}")
    return config


def _from_mamba_ssm(values: dict[str, Any]) -> LMConfig:
    unknown = sorted(values.keys() - MAMBA_SSM_DEFAULTS.keys())
    if unknown:
        raise ValueError(f"unknown entries {unknown}")
    values = MAMBA_SSM_DEFAULTS | values
    layer_args = dict(values["ssm_cfg"])
    layer = layer_args.pop("layer", "Mamba1")
    if layer not in MAMBA_SSM_LAYERS:
        raise ValueError(f"ssm_cfg.layer must be one of {sorted(MAMBA_SSM_LAYERS)}, got {layer!r}")
    if not values["rms_norm"]:
        raise ValueError("rms_norm must be true: there is no layer norm here")
    attn_cfg = dict(values["attn_cfg"])
    if values["attn_layer_idx"] and not attn_cfg.get("causal", False):
        raise ValueError("attn_cfg.causal must be true: attention does not look ahead here")
    multiple = values["pad_vocab_size_multiple"]
    return LMConfig(
        vocab_size=-(-values["vocab_size"] // multiple) * multiple,
        d_model=values["d_model"],
        n_layer=values["n_layer"],
        layer=MAMBA_SSM_LAYERS[layer],
        layer_args=layer_args,
        tie_embeddings=values["tie_embeddings"],
        residual_in_fp32=values["residual_in_fp32"],
        attn_layer_idx=values["attn_layer_idx"],
        attn_cfg=attn_cfg,
        d_intermediate=values["d_intermediate"],
    )


def _to_mamba_ssm(config: LMConfig) -> dict[str, Any]:
    norm_eps = config.layer_args.get("norm_eps", 1e-5)
    refused = {
        "norm_eps": (config.norm_eps, norm_eps) != (1e-5, 1e-5),
        "mlp_layer_idx": not all(map(config.has_mlp, range(config.n_layer))) and config.d_intermediate > 0,
        "shared_layer_idx": bool(config.shared_layer_idx),
        "attn_cfg.window": config.attn_cfg.get("window") is not None,
        "attn_cfg.d_out": config.attn_cfg.get("d_out", config.d_model) not in (None, config.d_model),
    }
    _refuse("mamba_ssm", refused)
    layer = {ours: theirs for theirs, ours in MAMBA_SSM_LAYERS.items()}[config.layer]
    attn_cfg = {k: v for k, v in config.attn_cfg.items() if k not in ("window", "d_out")} | {"causal": True}
    return MAMBA_SSM_DEFAULTS | {
        "d_model": config.d_model,
        "d_intermediate": config.d_intermediate,
        "n_layer": config.n_layer,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"layer": layer, **{k: v for k, v in config.layer_args.items() if k != "norm_eps"}},
        "attn_layer_idx": list(config.attn_layer_idx),
        "attn_cfg": attn_cfg if config.attn_layer_idx else {},
        "residual_in_fp32": config.residual_in_fp32,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_embeddings,
    }


def _to_transformers(config: LMConfig) -> dict[str, Any]:
    signature = inspect.signature(LAYERS[config.layer]).parameters
    args = {name: p.default for name, p in signature.items()} | config.layer_args
    d_inner = int(args["expand"] * config.d_model)
    if args.get("d_ssm") == d_inner:
        args["d_ssm"] = None
    refused = {f"layer_args.{k}": args.get(k, v) != v for k, v in TRANSFORMERS_FIXED.items()}
    refused |= {
        "layer_args.expand": args["expand"] != int(args["expand"]),
        "layer_args.norm_eps": args.get("norm_eps", config.norm_eps) != config.norm_eps,
        "attn_layer_idx": bool(config.attn_layer_idx),
        "d_intermediate": config.d_intermediate > 0,
        "shared_layer_idx": bool(config.shared_layer_idx),
    }
    _refuse("transformers", refused)
    values = {
        "architectures": [{"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}[config.layer]],
        "model_type": config.layer,
        **{theirs: getattr(config, ours) for theirs, ours, _ in TRANSFORMERS_MODEL[config.layer]},
        **{theirs: args[ours] for theirs, ours, _ in TRANSFORMERS_LAYER[config.layer]},
        "expand": int(args["expand"]),
        "hidden_act": "silu",
    }
    if config.layer == "mamba2":
        values["num_heads"] = d_inner // args["headdim"]
        values["time_step_limit"] = list(args["dt_limit"])
    return values


def _refuse(library: str, refused: dict[str, bool]) -> None:
    names = [name for name, holds in refused.items() if holds]
    if names:
        raise ValueError(f"{library} has no model with this {', '.join(names)}")


def _plain(value: Any) -> Any:
    """Numbers as transformers writes them: infinities may be objects, alone or in a list."""
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return float(value["__float__"])
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
