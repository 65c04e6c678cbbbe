"""What the forward keeps for the backward besides its inputs."""

from typing import Any

import pytest
import torch

import mamba_ops
from tests import cases, layer_cases
from tests.cases import CONV_OPTIONS, SCAN_OPTIONS, SSD_OPTIONS, Inputs
from tests.compare import is_float


def saved_bytes(name: str, inputs: Inputs) -> int:
    """Bytes of the tensors saved for the backward that do not live in an input's memory."""
    leaves = {k: v.detach().requires_grad_() if is_float(v) else v for k, v in inputs.items()}
    known = {v.untyped_storage().data_ptr() for v in leaves.values() if torch.is_tensor(v)}
    extra: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            extra[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out: Any = getattr(mamba_ops, name)(**leaves)
    assert (out[0] if isinstance(out, tuple) else out).requires_grad
    return sum(extra.values())


@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("l", [1, 100, 128, 1000, 4096])
def test_scan_saves_a_state_every_128_tokens(
    l: int, dtype: torch.dtype, pack: str | None, complex_A: bool
) -> None:
    """4 d n / 128 bytes per token and batch row, in whole checkpoints; complex states take twice that."""
    b, d, n = 1 if pack == "cu_seqlens" else 2, 24, 16
    options = {"options": SCAN_OPTIONS, "pack": pack, "dtype": dtype, "complex_A": complex_A}
    checkpoint = b * d * n * (8 if complex_A else 4)
    assert saved_bytes("selective_scan", cases.selective_scan(b, d, l, n, **options)) <= checkpoint * -(
        -l // 128
    )


@pytest.mark.parametrize("layout", ["contiguous", "projected"])
def test_scan_saves_no_copy_of_its_inputs(layout: str) -> None:
    inputs = cases.selective_scan(2, 24, 100, 4, groups=(None, 2), options=SCAN_OPTIONS, layout=layout)
    assert saved_bytes("selective_scan", inputs) <= 4 * 2 * 24 * 4


@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("l", [1, 100, 1000])
def test_ssd_saves_its_inputs(l: int, dtype: torch.dtype, pack: str | None) -> None:
    b = 1 if pack == "cu_seqlens" else 2
    options = {"options": SSD_OPTIONS, "pack": pack, "dtype": dtype, "layout": "projected"}
    assert saved_bytes("ssd", cases.ssd(b, l, 4, 16, 16, **options)) == 0


@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv_saves_its_inputs(dtype: torch.dtype, pack: str | None) -> None:
    b = 1 if pack == "cu_seqlens" else 2
    options = {"options": CONV_OPTIONS, "pack": pack, "dtype": dtype, "layout": "projected"}
    assert saved_bytes("causal_conv1d", cases.causal_conv1d(b, 24, 1000, **options)) == 0


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_saves_its_inputs(dtype: torch.dtype, before: bool) -> None:
    inputs = cases.rms_norm_gated(200, 96, group_size=48, norm_before_gate=before, dtype=dtype)
    assert saved_bytes("rms_norm_gated", inputs) == 0


@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", layer_cases.LAYER_OPERATORS)
def test_layers_save_their_inputs(name: str, dtype: torch.dtype, pack: str | None) -> None:
    assert saved_bytes(name, layer_cases.full(name, 1000, dtype=dtype, pack=pack)) == 0


@pytest.mark.parametrize("layer", [mamba_ops.Mamba, mamba_ops.Mamba2])
def test_a_layer_saves_its_input_projection(layer: type[torch.nn.Module]) -> None:
    """Besides input and parameters: the projection's output, and A = -exp(A_log) with exp(A_log)."""
    module, x = layer(64), torch.randn(2, 500, 64, requires_grad=True)
    known = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
    extra: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            extra[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    projected = 2 * 500 * module.in_proj.out_features * 4
    assert sum(extra.values()) <= projected + 2 * 4 * module.A_log.numel()


@pytest.mark.parametrize("name", ["selective_scan", "ssd", "causal_conv1d", "rms_norm_gated"])
def test_inference_saves_nothing(name: str) -> None:
    inputs = cases.rms_norm_gated(9, 8) if name == "rms_norm_gated" else getattr(cases, name)(l=300)
    with torch.no_grad():
        out = getattr(mamba_ops, name)(**inputs)
    assert out.grad_fn is None
