"""The shape of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..nn import Mamba, Mamba2

LAYERS: dict[str, type[Mamba] | type[Mamba2]] = {"mamba": Mamba, "mamba2": Mamba2}


@dataclass(frozen=True)
class LMConfig:
    """Shape of a language model: Mamba or Mamba-2 layers, with attention and MLPs where a hybrid has them.

    Attributes:
        vocab_size: number of tokens; 256 for bytes.
        d_model: width of the residual stream.
        n_layer: number of blocks.
        layer: "mamba" or "mamba2".
        layer_args: further constructor arguments of the layer (d_state, headdim, ...).
        norm_eps: of the pre-norms and the final norm.
        tie_embeddings: the head uses the embedding's weight.
        residual_in_fp32: the residual stream of a model in half precision is float32.
        attn_layer_idx: blocks whose mixer is attention instead, as in mamba_ssm.
        attn_cfg: constructor arguments of nn.Attention there (num_heads, window, rotary_emb_dim, ...).
        d_intermediate: width of a gated MLP after the mixer; 0: none, as in mamba_ssm.
        mlp_layer_idx: blocks that have the MLP; None: all.
        shared_layer_idx: blocks before whose mixer one attention block runs whose weights they share (Zamba).
        shared_cfg: constructor arguments of nn.Attention there, and d_intermediate of its MLP.

    >>> LMConfig(d_model=64).layer
    'mamba2'
    >>> samba = LMConfig(n_layer=4, layer="mamba", attn_layer_idx=(1, 3), d_intermediate=512,
    ...                  attn_cfg={"num_heads": 8, "num_heads_kv": 2, "rotary_emb_dim": 32, "window": 2048})
    >>> zamba = LMConfig(n_layer=6, shared_layer_idx=(2, 5),
    ...                  shared_cfg={"num_heads": 8, "d_intermediate": 512})
    """

    vocab_size: int = 256
    d_model: int = 256
    n_layer: int = 4
    layer: str = "mamba2"
    layer_args: dict[str, Any] = field(default_factory=dict)
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    residual_in_fp32: bool = True
    attn_layer_idx: Sequence[int] = ()
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    d_intermediate: int = 0
    mlp_layer_idx: Sequence[int] | None = None
    shared_layer_idx: Sequence[int] = ()
    shared_cfg: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.layer not in LAYERS:
            raise ValueError(f"LMConfig: layer must be one of {sorted(LAYERS)}, got {self.layer!r}")
        for name, least in (("vocab_size", 1), ("d_model", 1), ("n_layer", 1), ("d_intermediate", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"LMConfig: {name} must be at least {least}, got {getattr(self, name)}")
        for name in ("attn_layer_idx", "mlp_layer_idx", "shared_layer_idx"):
            chosen = getattr(self, name)
            if chosen is None:
                continue
            object.__setattr__(self, name, tuple(chosen))
            if not all(0 <= i < self.n_layer for i in chosen):
                raise ValueError(
                    f"LMConfig: {name} must lie in 0..n_layer - 1 = {self.n_layer - 1}, got {chosen}"
                )
        if self.mlp_layer_idx is not None and not self.d_intermediate:
            raise ValueError("LMConfig: mlp_layer_idx needs d_intermediate, the width of the MLPs")

    def has_mlp(self, index: int) -> bool:
        """Whether block index has an MLP after its mixer."""
        return self.d_intermediate > 0 and (self.mlp_layer_idx is None or index in self.mlp_layer_idx)

    def to_dict(self) -> dict[str, Any]:
        """All attributes, as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LMConfig:
        """The inverse of to_dict. Raises ValueError for a name that is no attribute."""
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"LMConfig: unknown entries {unknown}")
        return cls(**values)
