"""The stand-ins on a GPU, against themselves on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ops.compat.mamba_ssm.ops import selective_scan_interface as scan
from mamba_ops.compat.mamba_ssm.ops.triton import (
    layer_norm,
    layernorm_gated,
    ssd_combined,
)
from mamba_ops.compat.mamba_ssm.ops.triton import selective_state_update as update
from tests import cases, layer_cases
from tests.cases import Inputs
from tests.compat_check import per_head, renamed, run


def on_gpu() -> dict[str, tuple[Any, Inputs, bool]]:
    """A case with every option of each function that runs on an operator: function, inputs, gradients."""
    scan_inputs = cases.selective_scan(2, 6, 70, 4, groups=(2, 2), options=cases.SCAN_OPTIONS[:4])
    ssd_inputs = cases.ssd(2, 70, 4, 8, 16, options=cases.SSD_OPTIONS[:5], pack="seq_idx")
    split = {"D", "dt_bias", "conv1d_bias", "rmsnorm_weight", "outproj_weight", "outproj_bias"}
    split_inputs = layer_cases.mamba_split_conv1d_scan(2, 70, 4, 8, 16, k=3, options=split, pack="seq_idx")
    inner = layer_cases.mamba_inner(2, 16, 70, 8, options=layer_cases.INNER_OPTIONS[:9])
    inner["conv1d_weight"] = inner["conv1d_weight"].unsqueeze(1)
    inner["b_c_dt_rms_eps"] = inner.pop("rms_eps")
    one, rows = torch.Generator().manual_seed(0), torch.tensor([3, -1, 0], dtype=torch.int32)
    state = {"state": torch.randn(4, 4, 8, 16, generator=one), "x": torch.randn(3, 4, 8, generator=one)}
    state |= {"B": torch.randn(3, 2, 16, generator=one), "C": torch.randn(3, 2, 16, generator=one)}
    tied = {"dt": per_head(torch.rand(3, 4, generator=one), 8), "D": per_head(torch.randn(4), 8)}
    tied |= {"A": per_head(-torch.rand(4, generator=one), 8, 16), "dt_bias": per_head(torch.rand(4), 8)}
    update_inputs = state | tied | {"dt_softplus": True}
    untied = {k: v.contiguous() if torch.is_tensor(v) else v for k, v in update_inputs.items()}
    conv_inputs = cases.causal_conv1d(2, 16, 70, options=("bias", "activation"), layout="transposed")
    starts = {"initial_states": torch.randn(2, 16, 3), "return_final_states": True}
    ring = cases.causal_conv1d_update(3, 16, 4, t=2, k=6, rows=5, options=("bias", "activation"))
    ring = renamed(ring, state="conv_state", state_indices="conv_state_indices")
    counts = {"cache_seqlens": torch.tensor([0, 3, 17], dtype=torch.int32)}
    varlen = {"cu_seqlens": torch.tensor([0, 9, 70]), "return_varlen_states": True, "chunk_size": 16}
    return {
        "selective_scan_fn": (scan.selective_scan_fn, scan_inputs | {"return_last_state": True}, True),
        "mamba_inner_fn": (scan.mamba_inner_fn, inner, True),
        "mamba_chunk_scan_combined": (
            ssd_combined.mamba_chunk_scan_combined,
            ssd_inputs | {"chunk_size": 16, "return_final_states": True},
            True,
        ),
        "varlen": (
            ssd_combined.mamba_chunk_scan_combined,
            cases.ssd(1, 70, 4, 8, 16, options=("D", "dt_softplus")) | varlen,
            True,
        ),
        "mamba_split_conv1d_scan_combined": (
            ssd_combined.mamba_split_conv1d_scan_combined,
            split_inputs | {"chunk_size": 16},
            True,
        ),
        "selective_state_update by heads": (update.selective_state_update, update_inputs, False),
        "selective_state_update by channels": (update.selective_state_update, untied, False),
        "state_batch_indices": (
            update.selective_state_update,
            update_inputs | {"state_batch_indices": rows},
            False,
        ),
        "causal_conv1d_fn": (causal_conv1d_fn, conv_inputs | starts, True),
        "causal_conv1d_fn, packed": (
            causal_conv1d_fn,
            cases.causal_conv1d(2, 16, 70, options=("bias", "activation"), pack="seq_idx"),
            True,
        ),
        "causal_conv1d_update": (causal_conv1d_update, ring, False),
        "causal_conv1d_update, ring": (causal_conv1d_update, ring | counts, False),
        "rmsnorm_fn": (
            layernorm_gated.rmsnorm_fn,
            cases.rms_norm_gated(3, 64) | {"bias": None, "group_size": 16},
            True,
        ),
        "rms_norm_fn": (
            layer_norm.rms_norm_fn,
            {
                "x": torch.randn(3, 64),
                "weight": torch.randn(64),
                "bias": None,
                "residual": torch.randn(3, 64),
            },
            True,
        ),
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", on_gpu())
def test_cuda_tensors(name: str) -> None:
    """On a GPU as on the CPU, strides included."""
    function, inputs, gradients = on_gpu()[name]
    if name.startswith("selective_state_update"):
        inputs["state"] = inputs["state"][:3]
    there = {k: to_gpu(v) if torch.is_tensor(v) else v for k, v in inputs.items()}
    expected = run(function, inputs, gradients)
    try:
        got = run(function, there, gradients)
    except RuntimeError as error:
        if "built without CUDA" not in str(error):
            raise
        pytest.skip(str(error))
    for key, value in expected.items():
        assert got[key].is_cuda and got[key].stride() == value.stride(), key
        error = torch.linalg.vector_norm(got[key].cpu() - value)
        assert error <= 2e-5 * torch.linalg.vector_norm(value), f"{key}: {error}"


def to_gpu(t: Tensor) -> Tensor:
    """On the GPU with the same strides, expanded dims too."""
    base = t[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())]
    return (
        torch.empty_strided(base.shape, base.stride(), dtype=t.dtype, device="cuda")
        .copy_(base)
        .expand(t.shape)
    )
