"""The Mamba-2 layer: state space duality over heads between two projections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._library import step_limits
from ..causal_conv1d import causal_conv1d
from ..mamba2_step import Mamba2StepLayer
from ..mamba_split_conv1d_scan import mamba_split_conv1d_scan
from ..ssd import ssd
from ..state_update import causal_conv1d_update, ssd_state_update
from .cache import LayerCache, carry, check_sequence, decay_rate, initial_state, state_dtype_of
from .init import Device, check_sizes, depthwise_conv, no_weight_decay, random_step_bias
from .norm import Norm, RMSNormGated
from .token import is_plain, norm_and_project, project, project_and_convolve, token_rows


class Mamba2(nn.Module):
    """Mamba-2 layer with mamba_ssm.Mamba2's arguments, parameters and initialisation; its state dicts load.

        z0, x0, z, xBC, dt = in_proj(input);  x, B, C = silu(conv(xBC))
        S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;  y_t = S_t C_t + D x_t
        output = out_proj([silu(z0) x0, norm(y silu(z))])        z0, x0 only where d_ssm < d_inner

    Args:
        d_model: width of input and output.
        d_state: n, width of a head's state.
        d_conv: width of the convolution, 2 to 4.
        conv_init: the convolution's weight starts uniform in [-conv_init, conv_init]; None: torch's default.
        expand: d_inner = expand * d_model channels inside.
        headdim: p; d_ssm / p heads.
        d_ssm: channels of the state space part; the other d_inner - d_ssm form a gated MLP. None: all.
        ngroups: g, how many B and C the heads share.
        A_init_range: -A starts uniform in this range.
        D_has_hdim: D per channel (d_ssm,) instead of per head (h,).
        rmsnorm: False: no norm, z gates the scan's output directly.
        norm_before_gate: norm(y) silu(z) instead of norm(y silu(z)).
        dt_min, dt_max, dt_init_floor: range and floor of the initial steps softplus(dt_bias).
        dt_limit: steps are clamped to this range, in step() too (mamba_ssm forgets it there).
        bias, conv_bias: whether in_proj and out_proj, and the convolution, have a bias.
        chunk_size, use_mem_eff_path, sequence_parallel: accepted for compatibility, without effect: the
            operator picks its chunks, whose length does not change the result, and there is one path.
        layer_idx: kept as an attribute, not used.
        process_group: must be None.
        device, dtype: of the parameters; D stays float32, as in mamba_ssm.
        norm_eps: of the norm; 1e-5 in mamba_ssm.

    Raises:
        ValueError: sizes that do not divide, or a process group.

    Source: Dao & Gu 2024, section 7; checked against transformers' torch implementation.

    >>> layer = Mamba2(32, d_state=16, headdim=16)
    >>> x = torch.randn(2, 5, 32)
    >>> cache = layer.allocate_cache(2)
    >>> with torch.no_grad():
    ...     whole, first = layer(x), layer(x[:, :4], cache=cache)
    >>> bool(torch.allclose(layer.step(x[:, 4], cache), whole[:, 4], atol=1e-5))
    True
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: Sequence[float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: Sequence[float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: object | None = None,
        sequence_parallel: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if process_group is not None:
            raise ValueError("Mamba2: process_group must be None: this layer does not split over processes")
        check_sizes("Mamba2", d_model=d_model, d_state=d_state, headdim=headdim, ngroups=ngroups)
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.conv_init = conv_init
        self.expand = expand
        self.d_inner = int(expand * d_model)
        self.headdim = headdim
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.ngroups = ngroups
        self.D_has_hdim = D_has_hdim
        self.rmsnorm = rmsnorm
        self.norm_before_gate = norm_before_gate
        self.dt_limit = step_limits("Mamba2", dt_limit)
        self.chunk_size = chunk_size
        self.use_mem_eff_path = use_mem_eff_path
        self.layer_idx = layer_idx
        self.activation = "silu"
        if not 0 < self.d_ssm <= self.d_inner:
            raise ValueError(f"Mamba2: d_ssm must be in 1..{self.d_inner} (= expand * d_model), got {d_ssm}")
        if self.d_ssm % headdim:
            raise ValueError(f"Mamba2: headdim must divide d_ssm = {self.d_ssm}, got {headdim}")
        self.nheads = self.d_ssm // headdim
        if self.nheads % ngroups:
            raise ValueError(f"Mamba2: ngroups must divide the {self.nheads} heads, got {ngroups}")
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise ValueError(
                f"Mamba2: A_init_range must be (low, high) with 0 < low <= high, got {A_init_range}"
            )
        self.d_mlp = self.d_inner - self.d_ssm
        self.conv_dim = self.d_ssm + 2 * ngroups * d_state
        self._split = [
            size for size in (self.d_mlp, self.d_mlp, self.d_ssm, self.conv_dim, self.nheads) if size
        ]

        self.in_proj = nn.Linear(d_model, sum(self._split), bias=bias, device=device, dtype=dtype)
        self.conv1d = depthwise_conv(self.conv_dim, d_conv, conv_bias, device, dtype)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.dt_bias = no_weight_decay(
            random_step_bias(self.nheads, dt_min, dt_max, dt_init_floor, device, dtype)
        )
        A = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = no_weight_decay(A.log().to(self.dt_bias.dtype))
        skips = self.d_ssm if D_has_hdim else self.nheads
        self.D = no_weight_decay(torch.ones(skips, dtype=torch.float32, device=device))
        if rmsnorm:
            self.norm = RMSNormGated(
                self.d_ssm,
                eps=norm_eps,
                group_size=self.d_ssm // ngroups,
                norm_before_gate=norm_before_gate,
                device=device,
                dtype=dtype,
            )
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
        check_sequence("Mamba2", x, self.d_model)
        return self._mix(self.in_proj(x), cache, seq_idx, cu_seqlens)

    def _mix(
        self,
        projected: Tensor,
        cache: LayerCache | None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        first_state: Tensor | None = None,
    ) -> Tensor:
        """What `forward` does with the output of in_proj; first_state: of the scan, without a cache."""
        conv_state, ssm_state = (None, None) if cache is None else (cache.conv_state, cache.ssm_state)
        starts = {
            "conv": None if conv_state is None else initial_state(conv_state, projected.dtype),
            "scan": first_state if ssm_state is None else initial_state(ssm_state, ssm_state.dtype),
        }
        pack: dict[str, Any] = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
        plain_norm = not self.rmsnorm or is_plain(self.norm, RMSNormGated)
        if not (plain_norm and is_plain(self.out_proj, nn.Linear)):
            return self._by_parts(projected, starts, pack, conv_state, ssm_state)
        result = mamba_split_conv1d_scan(
            projected,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            decay_rate(self.A_log),
            self._skip(),
            headdim=self.headdim,
            ngroups=self.ngroups,
            dt_limit=self.dt_limit,
            rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
            rmsnorm_eps=self.norm.eps if self.rmsnorm else 1e-5,
            norm_before_gate=self.norm_before_gate,
            outproj_weight=self.out_proj.weight,
            outproj_bias=self.out_proj.bias,
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
        """The same where the projection or the norm is more than its weight, as with a low-rank adapter."""
        *mlp, z, xBC, dt = torch.split(projected, self._split, dim=-1)
        xBC = carry(
            causal_conv1d(
                xBC.transpose(1, 2),
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                "silu",
                initial_state=starts["conv"],
                return_final_state=conv_state is not None,
                **pack,
            ),
            conv_state,
        )
        inner, B, C = self._heads(xBC.transpose(1, 2))
        y = carry(
            ssd(
                inner,
                dt,
                decay_rate(self.A_log),
                B,
                C,
                self._skip(),
                None if self.rmsnorm else self._by_head(z),
                self.dt_bias,
                True,
                self.dt_limit,
                initial_state=starts["scan"],
                return_final_state=conv_state is not None,
                **pack,
            ),
            ssm_state,
        )
        out: Tensor = self.out_proj(self._gated(y, z, mlp))
        return out

    @torch.no_grad()
    def step(self, x: Tensor, cache: LayerCache) -> Tensor:
        """One token: x (b, d_model) or (b, 1, d_model); cache, b rows, updated in place. Returns x.shape."""
        rows = token_rows("Mamba2.step", x, self.d_model)
        fused = self.step_fused(rows, cache)
        if fused is not None:
            return fused[0].reshape(x.shape)
        *mlp, z, xBC, dt = torch.split(project(self.in_proj, rows), self._split, dim=-1)
        xBC = causal_conv1d_update(
            xBC, cache.conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu"
        )
        return self._step_convolved(mlp, z, xBC, dt, cache).reshape(x.shape)

    def step_fused(
        self,
        x: Tensor,
        cache: LayerCache,
        norm: RMSNormGated | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """`step` of norm(residual + x), or of x without norm, in three launches; None where it takes more.

        Args:
            x: (b, d_model).
            cache: b rows, updated in place.
            norm, residual: what stands before the layer.

        Returns:
            The layer's output (b, d_model), and residual + x, or x.
        """
        fused = project_and_convolve(
            self.in_proj,
            self.conv1d,
            x,
            cache.conv_state,
            begin=2 * self.d_mlp + self.d_ssm,
            norm=norm,
            residual=residual,
        )
        if fused is None:
            return None
        *mlp, z, xBC, dt = torch.split(fused[0], self._split, dim=-1)
        return self._step_convolved(mlp, z, xBC, dt, cache), fused[1]

    def step_layer(self, norm: RMSNormGated, cache: LayerCache) -> Mamba2StepLayer | None:
        """This layer and the norm before it for `mamba2_step`; None where a step is more than that."""
        plain = (
            is_plain(norm, Norm)
            and is_plain(self, Mamba2)
            and all(
                is_plain(linear, nn.Linear) and linear.bias is None
                for linear in (self.in_proj, self.out_proj)
            )
            and self.rmsnorm
            and is_plain(self.norm, RMSNormGated)
            and not self.norm_before_gate
            and self.ngroups == 1
            and not self.d_mlp
        )
        if not plain:
            return None
        return Mamba2StepLayer(
            norm.weight,
            self.in_proj.weight,
            cache.conv_state,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            cache.ssm_state,
            self.dt_bias,
            self.A_log,
            self._skip(),
            self.norm.weight,
            self.out_proj.weight,
        )

    def _step_convolved(
        self, mlp: Sequence[Tensor], z: Tensor, xBC: Tensor, dt: Tensor, cache: LayerCache
    ) -> Tensor:
        """What `step` does behind the convolution. Returns (b, d_model)."""
        inner, B, C = self._heads(xBC)
        gates = not self.rmsnorm or (is_plain(self.norm, RMSNormGated) and not self.norm.norm_before_gate)
        y = ssd_state_update(
            cache.ssm_state,
            inner,
            dt,
            self.A_log,
            B,
            C,
            self._skip(),
            self._by_head(z) if gates else None,
            self.dt_bias,
            True,
            self.dt_limit,
            A_is_log=True,
        )
        gate = None if gates else z
        if self.rmsnorm and not mlp:
            out = norm_and_project(self.norm, self.out_proj, y.flatten(-2), gate)
            if out is not None:
                return out
        return project(self.out_proj, self._gated(y, gate, mlp))

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
            torch.zeros(batch_size, self.conv_dim, self.d_conv - 1, dtype=dtype, device=device),
            torch.zeros(
                batch_size,
                self.nheads,
                self.headdim,
                self.d_state,
                dtype=state_dtype_of(dtype, state_dtype),
                device=device,
            ),
        )

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., conv_dim) to x (..., h, p), B (..., g, n), C (..., g, n)."""
        group = self.ngroups * self.d_state
        x, B, C = torch.split(xBC, [self.d_ssm, group, group], dim=-1)
        outer = xBC.shape[:-1]
        return (
            x.view(*outer, self.nheads, self.headdim),
            B.view(*outer, self.ngroups, self.d_state),
            C.view(*outer, self.ngroups, self.d_state),
        )

    def _skip(self) -> Tensor:
        """D as the operators take it: (h,) or (h, p)."""
        return self.D.view(-1, self.headdim) if self.D_has_hdim else self.D

    def _by_head(self, z: Tensor) -> Tensor:
        """z (..., h, p), as the scan takes it."""
        return z.view(*z.shape[:-1], self.nheads, self.headdim)

    def _gated(self, y: Tensor, z: Tensor | None, mlp: Sequence[Tensor]) -> Tensor:
        """Norm of y (..., h, p), its gate z if the scan has not applied it, and the MLP part beside it."""
        y = y.flatten(-2)
        if self.rmsnorm:
            y = self.norm(y, z)
        if mlp:
            y = torch.cat([F.silu(mlp[0]) * mlp[1], y], dim=-1)
        return y
