"""mamba_ssm.ops.triton.layer_norm: dropout, residual and norm in one call."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..... import add_rms_norm, rms_norm_gated
from ....autocast import parameter, without_autocast
from .layernorm_gated import _float

Device = torch.device | str | None


@without_autocast
def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """norm(dropout(x rowscale) + dropout(x1) + residual) weight + bias.

    Args:
        x, residual, x1: (..., dim).
        weight, bias: (dim,); weight1, bias1: of a second output from the same norm.
        rowscale: (...,): multiplies the rows of x; not together with x1.
        prenorm: also return the sum before the norm, in residual's dtype, without residual in float32 if
            residual_in_fp32, else in x's.
        is_rms_norm: the mean is not taken out.
        return_dropout_mask: also return which elements of x (and of x1 if given) were kept; None each without
            dropout.

    Returns:
        y [, y1] [, sum] [, mask, mask1], alone or as a tuple; y in x's dtype.
    """
    assert x1 is None or rowscale is None, "rowscale is not supported with parallel LayerNorm"
    wide = torch.promote_types(x.dtype, torch.float32)
    plain = all(t is None for t in (bias, x1, weight1, rowscale)) and dropout_p == 0.0
    mask = mask1 = None
    if is_rms_norm and plain and residual is not None and residual.dtype == wide:
        y, total = add_rms_norm(x, residual, parameter(weight, x.dtype), eps=eps)
    else:
        total, mask = _dropped(x if rowscale is None else _float(x) * rowscale[..., None], dropout_p)
        if x1 is not None:
            part, mask1 = _dropped(x1, dropout_p)
            total = _float(total) + part
        total = total if residual is None else _float(total) + residual
        y = _norm(total, weight, bias, eps, is_rms_norm).to(x.dtype)
    outs: list[Tensor | None] = [y]
    if weight1 is not None:
        outs.append(_norm(total, weight1, bias1, eps, is_rms_norm).to(x.dtype))
    if prenorm:
        kept = wide if residual_in_fp32 else x.dtype
        outs.append(total.to(kept if residual is None else residual.dtype))
    if return_dropout_mask:
        outs += [mask, mask1]
    first = outs[0]
    assert first is not None
    return first if len(outs) == 1 else tuple(outs)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """`layer_norm_fn` as an RMS norm."""
    inputs = (x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale)
    return layer_norm_fn(*inputs, prenorm, residual_in_fp32, True, return_dropout_mask)


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A norm and a linear layer behind it; with prenorm also the sum before the norm."""
    normed = layer_norm_fn(
        x,
        norm_weight,
        norm_bias,
        residual,
        eps=eps,
        prenorm=True,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )
    y, total = normed
    assert y is not None and total is not None
    out = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (out, total) if prenorm else out


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`layer_norm_fn` step by step, in x's dtype or float32 (upcast), with dropout by given masks."""
    assert x1 is None or rowscale is None, "rowscale is not supported with parallel LayerNorm"
    tensors = (x, weight, bias, residual, x1, weight1, bias1)
    v, w, b, r, v1, w1, b1 = (t if t is None or not upcast else t.float() for t in tensors)
    assert v is not None and w is not None
    v = v if rowscale is None else v * rowscale[..., None]
    v = _masked(v, dropout_p, dropout_mask)
    v = v if v1 is None else v + _masked(v1, dropout_p, dropout_mask1)
    v = v if r is None else (v + r).to(v.dtype)
    outs = [_norm(v, w, b, eps, is_rms_norm).to(x.dtype)]
    outs += [] if w1 is None else [_norm(v, w1, b1, eps, is_rms_norm).to(x.dtype)]
    outs += [v] if prenorm else []
    return outs[0] if len(outs) == 1 else tuple(outs)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`layer_norm_ref` as an RMS norm."""
    inputs = (x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm)
    return layer_norm_ref(*inputs, dropout_mask, dropout_mask1, upcast, True)


class RMSNorm(nn.Module):
    """`rms_norm_fn` with its weight; bias is None."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Weight one."""
        nn.init.ones_(self.weight)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor | None, ...]:
        """x, residual: (..., dim)."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


def _layer_norm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> tuple[Tensor | None, ...]:
    """(y, y1, mean, rstd, residual_out, seeds, dropout_mask, dropout_mask1) of rows (m, dim).

    mean is None for an RMS norm, seeds always: dropout draws from torch's generator.
    """
    inputs = (x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale)
    with torch.no_grad():
        y, *rest, total, mask, mask1 = layer_norm_fn(*inputs, True, True, is_rms_norm, True)
        assert y is not None and total is not None
        sums = _float(total)
        mean = None if is_rms_norm else sums.mean(-1)
        centred = sums if mean is None else sums - mean[:, None]
        rstd = torch.rsqrt(centred.square().mean(-1) + eps)
        kept = residual.dtype if residual is not None else residual_dtype or x.dtype
        changed = residual is not None or x1 is not None or rowscale is not None or dropout_p > 0.0
        residual_out = total.to(kept) if changed or kept != x.dtype else x
        y1 = rest[0] if rest else None
        outs = (t if t is None else t.to(out_dtype or x.dtype) for t in (y, y1))
        masks = (mask, mask1) if return_dropout_mask else (None, None)
    return (*outs, mean, rstd, residual_out, None, *masks)


def _norm(v: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool) -> Tensor:
    if not is_rms_norm:
        y = F.layer_norm(_float(v), v.shape[-1:], eps=eps) * _float(weight)
    else:
        y = rms_norm_gated(v, parameter(weight, v.dtype), eps=eps)
    return y if bias is None else y + bias


def _dropped(v: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    if p == 0.0:
        return v, None
    mask = torch.rand_like(v, dtype=torch.float32) >= p
    return _float(v).masked_fill(~mask, 0) / (1 - p), mask


def _masked(v: Tensor, p: float, mask: Tensor | None) -> Tensor:
    if p == 0.0:
        return v
    return F.dropout(v, p) if mask is None else v.masked_fill(~mask, 0) / (1 - p)
