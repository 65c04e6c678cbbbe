"""Stand-in for selective_scan_cuda, mamba_ssm's extension module, which forks of it call directly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import selective_scan
from .autocast import without_autocast
from .mamba_ssm.ops.selective_scan_interface import as_complex, laid_out_like

_CHUNK = 2048


@without_autocast
@torch.no_grad()
def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """[out, x] and with z out * silu(z).

    x (batch, dim, chunks, 2 dstate) holds in turns, for each state at the end of each chunk of 2048 tokens,
    its decay since the start and its value: ``x[:, :, -1, 1::2]`` is the last state.
    """
    B, C = as_complex(B, A), as_complex(C, A)
    bias = None if delta_bias is None else delta_bias.float()[:, None]
    step = delta.float() if bias is None else delta.float() + bias
    step = F.softplus(step) if delta_softplus else step
    state = A.new_zeros(u.shape[0], *A.shape)
    outs, intermediates = [], []
    since_start = step.new_zeros(*step.shape[:2], 1)
    for begin in range(0, max(u.shape[2], 1), _CHUNK):
        tokens = slice(begin, begin + _CHUNK)
        out, state = selective_scan(
            u[..., tokens],
            delta[..., tokens],
            A,
            B if B.dim() == 2 else B[..., tokens],
            C if C.dim() == 2 else C[..., tokens],
            D,
            None,
            delta_bias,
            bool(delta_softplus),
            initial_state=state,
            return_final_state=True,
        )
        since_start = since_start + step[..., tokens].sum(-1, keepdim=True)
        outs.append(out)
        intermediates.append(torch.stack([torch.exp(since_start * A), state], dim=-1).flatten(-2))
    out = laid_out_like(torch.cat(outs, dim=-1), delta)
    x = torch.stack(intermediates, dim=2)
    if z is None:
        return [out, x]
    return [out, x, laid_out_like((out.float() * F.silu(z.float())).to(z.dtype), z)]


@without_autocast
@torch.no_grad()
def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Tensor]:
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias], with z then dz, and out_z where it is to be recomputed.

    x and out, kept from the forward by the original, are not used: the states are recomputed. dz is filled if
    given. Gradients of A, D and delta_bias, and of variable B and C, are float32.
    """
    leaves = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias, "z": z}
    given = {k: t.detach().requires_grad_() for k, t in leaves.items() if t is not None}
    with torch.enable_grad():
        call: dict[str, Any] = given | {"B": as_complex(given["B"], A), "C": as_complex(given["C"], A)}
        y = selective_scan(**call, delta_softplus=bool(delta_softplus))
    assert isinstance(y, Tensor)
    grads = dict(zip(given, torch.autograd.grad(y, list(given.values()), dout), strict=True))
    grads = {k: g.float() if k in "BC" and not g.is_complex() else g for k, g in grads.items()}
    empty = u.new_empty(0, dtype=torch.float32)
    result = [grads.get(k, empty) for k in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    if z is None:
        return result
    result.append(grads["z"] if dz is None else dz.copy_(grads["z"]))
    return [*result, laid_out_like(y.detach(), z)] if recompute_out_z else result
