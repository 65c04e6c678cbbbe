"""The Mamba-1 layer: input-dependent selective scan between two projections."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..causal_conv1d import causal_conv1d
from ..mamba_inner import mamba_inner
from ..selective_scan import selective_scan
from ..state_update import causal_conv1d_update, selective_state_update
from .cache import LayerCache, carry, check_sequence, decay_rate, initial_state, state_dtype_of
from .init import Device, check_sizes, depthwise_conv, no_weight_decay, random_step_bias
from .norm import RMSNormGated
from .token import is_plain, project, project_and_convolve, token_rows


class Mamba(nn.Module):
    """Mamba layer with mamba_ssm.Mamba's arguments, parameters and initialisation; its state dicts load.

        x, z = in_proj(input);  x = silu(conv(x));  dt, B, C = x_proj(x);  delta = dt_proj(dt)
        h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t;  output = out_proj((C_t . h_t + D x_t) silu(z_t))

    Args:
        d_model: width of input and output.
        d_state: n, states per channel.
        d_conv: width of the convolution, 2 to 4.
        expand: d_inner = expand * d_model channels inside.
        dt_rank: rank of the step projection; "auto": ceil(d_model / 16).
        dt_min, dt_max, dt_init_floor: range and floor of the initial steps softplus(dt_proj.bias).
        dt_init, dt_scale: dt_proj.weight starts "random" in, or "constant" at, dt_rank ** -0.5 * dt_scale.
        conv_bias, bias: whether the convolution, and in_proj and out_proj, have a bias.
        use_fast_path: accepted for compatibility, without effect: there is one path.
        layer_idx: kept as an attribute, not used.
        device, dtype: of the parameters; A_log and D stay float32, as in mamba_ssm.

    Source: Gu & Dao 2023, figure 3; checked against transformers' torch implementation.

    >>> layer = Mamba(16)
    >>> x = torch.randn(2, 5, 16)
    >>> cache = layer.allocate_cache(2)
    >>> with torch.no_grad():
    ...     whole, first = layer(x), layer(x[:, :4], cache=cache)
    >>> bool(torch.allclose(layer.step(x[:, 4], cache), whole[:, 4], atol=1e-5))
    True
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise ValueError(f'Mamba: dt_init must be "random" or "constant", got {dt_init!r}')
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        check_sizes("Mamba", d_model=d_model, d_state=d_state, d_inner=self.d_inner, dt_rank=self.dt_rank)
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        self.activation = "silu"

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, device=device, dtype=dtype)
        self.conv1d = depthwise_conv(self.d_inner, d_conv, conv_bias, device, dtype)
        self.x_proj = nn.Linear(
            self.d_inner, self.dt_rank + 2 * d_state, bias=False, device=device, dtype=dtype
        )
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, device=device, dtype=dtype)
        bound = self.dt_rank**-0.5 * dt_scale
        with torch.no_grad():
            if dt_init == "constant":
                self.dt_proj.weight.fill_(bound)
            else:
                self.dt_proj.weight.uniform_(-bound, bound)
            self.dt_proj.bias.copy_(
                random_step_bias(self.d_inner, dt_min, dt_max, dt_init_floor, device, dtype)
            )
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]

        decays = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = no_weight_decay(decays.log().repeat(self.d_inner, 1))
        self.D = no_weight_decay(torch.ones(self.d_inner, dtype=torch.float32, device=device))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        *,
        cache: LayerCache | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Runs the layer over a sequence.

        Args:
            x: (b, l, d_model).
            cache: states to continue from, replaced by those after the last token (no gradient flows through
                them); b rows, or s rows with cu_seqlens. A new cache starts at the beginning of a sequence.
            seq_idx: (b, l) integer; states reset where neighbours differ.
            cu_seqlens: (s + 1,) integer; s sequences packed in batch 1.

        Returns:
            (b, l, d_model).
        """
        check_sequence("Mamba", x, self.d_model)
        return self._mix(self.in_proj(x), cache, seq_idx, cu_seqlens)

    def _mix(
        self,
        projected: Tensor,
        cache: LayerCache | None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """What `forward` does with the output of in_proj."""
        conv_state, ssm_state = (None, None) if cache is None else (cache.conv_state, cache.ssm_state)
        starts = {
            "conv": None if conv_state is None else initial_state(conv_state, projected.dtype),
            "scan": None if ssm_state is None else initial_state(ssm_state, ssm_state.dtype),
        }
        pack: dict[str, Any] = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
        if not all(is_plain(linear, nn.Linear) for linear in (self.x_proj, self.dt_proj, self.out_proj)):
            return self._by_parts(projected, starts, pack, conv_state, ssm_state)
        result = mamba_inner(
            projected.transpose(1, 2),
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.out_proj.weight,
            self.out_proj.bias,
            decay_rate(self.A_log),
            D=self.D,
            delta_bias=self.dt_proj.bias,
            conv_state=starts["conv"],
            initial_state=starts["scan"],
            return_final_states=cache is not None,
            **pack,
        )
        return carry(result, conv_state, ssm_state)

    def _by_parts(
        self,
        projected: Tensor,
        starts: dict[str, Tensor | None],
        pack: dict[str, Any],
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
    ) -> Tensor:
        """The same where a projection is more than its weight, such as one with a low-rank adapter."""
        # split before transposing: the gradients are joined as they lie
        inner, z = projected.chunk(2, dim=-1)
        u = carry(
            causal_conv1d(
                inner.transpose(1, 2),
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                "silu",
                initial_state=starts["conv"],
                return_final_state=conv_state is not None,
                **pack,
            ),
            conv_state,
        )
        dt, B, C = self.x_proj(u.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta, delta_bias = self._raw_steps(dt)
        y = carry(
            selective_scan(
                u,
                delta.transpose(1, 2),
                decay_rate(self.A_log),
                B.transpose(1, 2),
                C.transpose(1, 2),
                self.D,
                z.transpose(1, 2),
                delta_bias,
                True,
                initial_state=starts["scan"],
                return_final_state=conv_state is not None,
                **pack,
            ),
            ssm_state,
        )
        out: Tensor = self.out_proj(y.transpose(1, 2))
        return out

    def _raw_steps(self, dt: Tensor) -> tuple[Tensor, Tensor | None]:
        """The steps before softplus, and the bias that the scan has yet to add to them."""
        if is_plain(self.dt_proj, nn.Linear):
            return F.linear(dt, self.dt_proj.weight), self.dt_proj.bias
        return self.dt_proj(dt), None

    @torch.no_grad()
    def step(self, x: Tensor, cache: LayerCache) -> Tensor:
        """One token: x (b, d_model) or (b, 1, d_model); cache, b rows, updated in place. Returns x.shape."""
        rows = token_rows("Mamba.step", x, self.d_model)
        fused = self.step_fused(rows, cache)
        if fused is not None:
            return fused[0].reshape(x.shape)
        inner, z = project(self.in_proj, rows).chunk(2, dim=-1)
        u = causal_conv1d_update(
            inner, cache.conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu"
        )
        return self._step_convolved(u, z, cache).reshape(x.shape)

    def step_fused(
        self,
        x: Tensor,
        cache: LayerCache,
        norm: RMSNormGated | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """`step` of norm(residual + x), or of x without norm, in fewer launches; None where it takes more.

        Args and result: see Mamba2.step_fused.
        """
        fused = project_and_convolve(
            self.in_proj,
            self.conv1d,
            x,
            cache.conv_state,
            norm=norm,
            residual=residual,
        )
        if fused is None:
            return None
        u, z = fused[0].chunk(2, dim=-1)
        return self._step_convolved(u, z, cache), fused[1]

    def _step_convolved(self, u: Tensor, z: Tensor, cache: LayerCache) -> Tensor:
        """What `step` does behind the convolution. Returns (b, d_model)."""
        dt, B, C = torch.split(project(self.x_proj, u), [self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta, delta_bias = self._raw_steps(dt)
        y = selective_state_update(
            cache.ssm_state,
            u,
            delta,
            decay_rate(self.A_log),
            B,
            C,
            self.D,
            z,
            delta_bias,
            True,
        )
        return project(self.out_proj, y)

    def allocate_cache(
        self,
        batch_size: int,
        dtype: torch.dtype | None = None,
        device: Device = None,
        *,
        state_dtype: torch.dtype | None = None,
    ) -> LayerCache:
        """An empty cache for batch_size sequences.

        Args:
            batch_size: b.
            dtype: the activations' dtype (that of in_proj's output); None: the weights'.
            device: None: the weights'.
            state_dtype: of ssm_state, which is rounded to it after every call; None: float32 (float64 for
                float64 activations). In bfloat16 it takes half the memory and time, as mamba_ssm keeps it,
                and the rounding of many tokens adds up in heads of slow decay.
        """
        weight = self.in_proj.weight
        dtype, device = dtype or weight.dtype, device or weight.device
        return LayerCache(
            torch.zeros(batch_size, self.d_inner, self.d_conv - 1, dtype=dtype, device=device),
            torch.zeros(
                batch_size,
                self.d_inner,
                self.d_state,
                dtype=state_dtype_of(dtype, state_dtype),
                device=device,
            ),
        )
