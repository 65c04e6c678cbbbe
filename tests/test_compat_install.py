"""install() and its undo: what is imported, what is left alone, signatures, versions, scripts."""

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mamba_ops import compat
from mamba_ops.compat.__main__ import main

PACKAGES = ("mamba_ssm", "causal_conv1d", "selective_scan_cuda")

# Upstream's signatures: mamba_ssm 2.3.2, causal-conv1d 1.6.1.
SIGNATURES = {
    "mamba_ssm.ops.selective_scan_interface": {
        "selective_scan_fn": "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, "
        "return_last_state=False",
        "selective_scan_ref": "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, "
        "return_last_state=False",
        "mamba_inner_fn": "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, "
        "out_proj_weight, out_proj_bias, A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, "
        "C_proj_bias=None, delta_softplus=True, checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None, "
        "dt_rms_weight=None, b_c_dt_rms_eps=1e-06",
    },
    "mamba_ssm.ops.triton.ssd_combined": {
        "mamba_chunk_scan_combined": "x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, "
        "initial_states=None, seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, inf), "
        "return_final_states=False, return_varlen_states=False, state_dtype=None",
        "mamba_split_conv1d_scan_combined": "zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, "
        "initial_states=None, seq_idx=None, dt_limit=(0.0, inf), return_final_states=False, "
        "activation='silu', rmsnorm_weight=None, rmsnorm_eps=1e-06, outproj_weight=None, outproj_bias=None, "
        "headdim=None, ngroups=1, norm_before_gate=True, state_dtype=None",
        "mamba_chunk_scan": "x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False",
        "ssd_selective_scan": "x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, "
        "dt_limit=(0.0, inf)",
    },
    "mamba_ssm.ops.triton.ssd_chunk_state": {
        "chunk_state": "B, x, dt, dA_cumsum, states_in_fp32=True",
        "chunk_state_varlen": "B, x, dt, dA_cumsum, cu_seqlens, chunk_states",
    },
    "mamba_ssm.ops.triton.ssd_state_passing": {
        "state_passing": "states, dA_chunk_cumsum, initial_states=None"
    },
    "mamba_ssm.ops.triton.selective_state_update": {
        "selective_state_update": "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, "
        "state_batch_indices=None"
    },
    "mamba_ssm.ops.triton.layernorm_gated": {
        "rmsnorm_fn": "x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True",
        "layernorm_fn": "x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True, "
        "is_rms_norm=False",
        "rms_norm_ref": "x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True, "
        "upcast=True",
        "RMSNorm": "hidden_size, eps=1e-05, group_size=None, norm_before_gate=True, device=None, dtype=None",
        "LayerNorm": "hidden_size, eps=1e-05, group_size=None, norm_before_gate=True, device=None, "
        "dtype=None",
    },
    "mamba_ssm.ops.triton.layer_norm": {
        "layer_norm_fn": "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, "
        "dropout_p=0.0, rowscale=None, prenorm=False, residual_in_fp32=False, is_rms_norm=False, "
        "return_dropout_mask=False",
        "rms_norm_fn": "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, "
        "dropout_p=0.0, rowscale=None, prenorm=False, residual_in_fp32=False, return_dropout_mask=False",
        "RMSNorm": "hidden_size, eps=1e-05, dropout_p=0.0, device=None, dtype=None",
    },
    "mamba_ssm.modules.mamba_simple": {
        "Mamba": "d_model, d_state=16, d_conv=4, expand=2, dt_rank='auto', dt_min=0.001, dt_max=0.1, "
        "dt_init='random', dt_scale=1.0, dt_init_floor=0.0001, conv_bias=True, bias=False, "
        "use_fast_path=True, layer_idx=None, device=None, dtype=None"
    },
    "mamba_ssm.modules.mamba2": {
        "Mamba2": "d_model, d_state=128, d_conv=4, conv_init=None, expand=2, headdim=64, d_ssm=None, "
        "ngroups=1, A_init_range=(1, 16), D_has_hdim=False, rmsnorm=True, norm_before_gate=False, "
        "dt_min=0.001, dt_max=0.1, dt_init_floor=0.0001, dt_limit=(0.0, inf), bias=False, conv_bias=True, "
        "chunk_size=256, use_mem_eff_path=True, layer_idx=None, process_group=None, sequence_parallel=True, "
        "device=None, dtype=None"
    },
    "mamba_ssm.modules.mamba2_simple": {
        "Mamba2Simple": "d_model, d_state=64, d_conv=4, conv_init=None, expand=2, headdim=128, ngroups=1, "
        "A_init_range=(1, 16), dt_min=0.001, dt_max=0.1, dt_init_floor=0.0001, dt_limit=(0.0, inf), "
        "learnable_init_states=False, activation='swish', bias=False, conv_bias=True, chunk_size=256, "
        "use_mem_eff_path=True, layer_idx=None, device=None, dtype=None"
    },
    "mamba_ssm.modules.ssd_minimal": {"ssd_minimal_discrete": "X, A, B, C, block_len, initial_states=None"},
    "mamba_ssm.models.mixer_seq_simple": {
        "MambaLMHeadModel": "config, initializer_cfg=None, device=None, dtype=None"
    },
    "mamba_ssm.models.config_mamba": {},
    "mamba_ssm.utils.generation": {
        "InferenceParams": "max_seqlen, max_batch_size, seqlen_offset=0, batch_size_offset=0, "
        "key_value_memory_dict=<factory>, lengths_per_sample=None"
    },
    "causal_conv1d": {
        "causal_conv1d_fn": "x, weight, bias=None, seq_idx=None, initial_states=None, "
        "return_final_states=False, final_states_out=None, activation=None",
        "causal_conv1d_update": "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, "
        "conv_state_indices=None",
    },
    "causal_conv1d.causal_conv1d_varlen": {"causal_conv1d_varlen_states": "x, cu_seqlens, state_len"},
    "causal_conv1d.cpp_functions": {
        "causal_conv1d_fwd_function": "x, weight, bias, seq_idx, initial_states, final_states_out, "
        "silu_activation",
        "causal_conv1d_bwd_function": "x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, "
        "return_dinitial_states, silu_activation",
        "causal_conv1d_update_function": "x, conv_state, weight, bias, silu_activation, cache_seqlens, "
        "conv_state_indices",
    },
    "selective_scan_cuda": {
        "fwd": "u, delta, A, B, C, D, z, delta_bias, delta_softplus",
        "bwd": "u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z",
    },
}
# Further names that code imports.
NAMES = {
    "mamba_ssm": "Mamba Mamba2 Mamba3 MambaLMHeadModel mamba_inner_fn selective_scan_fn __version__",
    "mamba_ssm.ops.selective_scan_interface": "mamba_inner_ref SelectiveScanFn MambaInnerFn rms_norm_forward "
    "selective_scan_cuda causal_conv1d_fn",
    "mamba_ssm.ops.triton.ssd_combined": "ssd_chunk_scan_combined_ref mamba_conv1d_scan_ref ensure_stride "
    "mamba_split_conv1d_scan_ref _mamba_chunk_scan_combined_fwd _mamba_chunk_scan_combined_bwd "
    "rearrange_and_update_stride",
    "mamba_ssm.ops.triton.ssd_chunk_state": "chunk_state_ref _chunk_cumsum_fwd _chunk_state_fwd",
    "mamba_ssm.ops.triton.ssd_state_passing": "state_passing_ref _state_passing_fwd",
    "mamba_ssm.ops.triton.ssd_chunk_scan": "chunk_scan chunk_scan_ref",
    "mamba_ssm.ops.triton.ssd_bmm": "_bmm_chunk_fwd",
    "mamba_ssm.ops.triton.selective_state_update": "selective_state_update_ref",
    "mamba_ssm.ops.triton.layer_norm": "layer_norm_linear_fn layer_norm_ref rms_norm_ref _layer_norm_fwd",
    "mamba_ssm.ops.triton.layernorm": "RMSNorm layer_norm_fn rms_norm_fn",
    "mamba_ssm.ops.triton.k_activations": "SwiGLU swiglu",
    "mamba_ssm.modules.mamba3": "Mamba3",
    "mamba_ssm.modules.block": "Block",
    "mamba_ssm.modules.mlp": "GatedMLP",
    "mamba_ssm.modules.mha": "MHA",
    "mamba_ssm.models.config_mamba": "MambaConfig",
    "mamba_ssm.models.mixer_seq_simple": "MixerModel create_block _init_weights",
    "mamba_ssm.utils.generation": "decode sample GenerationMixin update_graph_cache capture_graph "
    "DecodingCGCache",
    "mamba_ssm.utils.hf": "load_config_hf load_state_dict_hf",
    "mamba_ssm.utils.determinism": "use_deterministic_mode set_deterministic_mode",
    "mamba_ssm.utils.torch": "custom_fwd custom_bwd",
    "mamba_ssm.distributed.tensor_parallel": "ColumnParallelLinear RowParallelLinear",
    "mamba_ssm.distributed.distributed_utils": "all_reduce reduce_scatter",
    "causal_conv1d": "__version__",
    "causal_conv1d.causal_conv1d_interface": "causal_conv1d_fn causal_conv1d_ref causal_conv1d_update_ref",
    "causal_conv1d.causal_conv1d_varlen": "causal_conv1d_varlen_states_ref",
}


@pytest.fixture(autouse=True)
def nothing_installed() -> Iterator[None]:
    assert not any(name in sys.modules for name in PACKAGES)
    yield
    assert not any(name in sys.modules for name in PACKAGES)


@pytest.fixture
def installed() -> Iterator[None]:
    with compat.install(transformers=False):
        yield


def parameters(function: object) -> str:
    """A signature without annotations."""
    assert callable(function)
    found = inspect.signature(function).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found]
    return ", ".join(str(p) for p in plain)


@pytest.mark.parametrize("module", SIGNATURES)
def test_signatures(installed: None, module: str) -> None:
    for name, expected in SIGNATURES[module].items():
        value = getattr(importlib.import_module(module), name)
        if inspect.isclass(value):  # ours may take more at the end
            assert parameters(value).startswith(expected), name
        else:
            assert inspect.isfunction(value)  # what transformers can inspect
            assert parameters(value) == expected, name


@pytest.mark.parametrize("module", NAMES)
def test_names(installed: None, module: str) -> None:
    for name in NAMES[module].split():
        assert getattr(importlib.import_module(module), name) is not None


def test_everything_comes_from_here(installed: None) -> None:
    for name, module in sys.modules.items():
        if name.partition(".")[0] in PACKAGES:
            assert module.__name__ == f"mamba_ops.compat.{name}"
    with pytest.raises(ImportError):
        importlib.import_module("mamba_ssm.ops.triton.something_else")


def test_versions(installed: None) -> None:
    import causal_conv1d
    import mamba_ssm

    assert importlib.metadata.version("mamba_ssm") == mamba_ssm.__version__ == "2.3.2.post1"
    assert importlib.metadata.version("causal-conv1d") == causal_conv1d.__version__ == "1.6.1"
    assert importlib.util.find_spec("mamba_ssm") is not None
    assert importlib.metadata.version("torch") == torch.__version__.partition("+")[0]
    assert importlib.metadata.metadata("mamba-ssm")["Name"] == "mamba_ssm"


def test_undo() -> None:
    before = list(sys.meta_path)
    undo = compat.install()
    again = compat.install()  # has nothing left to do, and nothing to undo
    again()
    assert importlib.import_module("mamba_ssm").__version__
    undo()
    assert sys.meta_path == before
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("mamba_ssm")
    with pytest.raises(ImportError):
        importlib.import_module("causal_conv1d")


REAL = {
    "mamba_ssm/__init__.py": "__version__ = 'real'\nfrom . import ops\n",
    "mamba_ssm/ops/__init__.py": "",
    "mamba_ssm/ops/only_real.py": "from causal_conv1d import causal_conv1d_fn\n",
    "mamba_ssm/ops/selective_scan_interface.py": "selective_scan_fn = 'real'\n",
}


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A mamba_ssm, and no causal_conv1d, that is really installed."""
    for name, text in REAL.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]


@pytest.mark.parametrize("imported", [False, True])
def test_a_real_package_is_replaced_whole(real: None, imported: bool) -> None:
    before = importlib.import_module("mamba_ssm") if imported else None
    with compat.install(transformers=False):
        assert importlib.import_module("mamba_ssm").__version__ == "2.3.2.post1"
        scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        assert callable(scan.selective_scan_fn)
        with pytest.raises(ImportError):
            importlib.import_module("mamba_ssm.ops.only_real")
    module = importlib.import_module("mamba_ssm")
    assert module.__version__ == "real" and (before is None or module is before)
    assert importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn == "real"


@pytest.mark.parametrize("imported", [False, True])
def test_a_real_package_is_left_alone(real: None, imported: bool) -> None:
    """As asked by replace=False; it may use our causal_conv1d, which it lacks."""
    if imported:
        importlib.import_module("mamba_ssm")
    with compat.install(replace=False, transformers=False):
        assert importlib.import_module("mamba_ssm").__version__ == "real"
        assert importlib.import_module("mamba_ssm.ops.only_real").causal_conv1d_fn is not None
        assert "selective_scan_cuda" not in sys.modules
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("mamba_ssm")
        with compat.install(transformers=False):  # and later is replaced after all
            assert importlib.import_module("mamba_ssm").__version__ == "2.3.2.post1"
        assert importlib.import_module("mamba_ssm").__version__ == "real"


SCRIPT = """
import sys, torch
from mamba_ssm import Mamba2
from causal_conv1d import causal_conv1d_fn
assert __name__ == "__main__"
layer = Mamba2(16, d_state=8, headdim=8)
print(Mamba2.__module__, tuple(layer(torch.randn(1, 5, 16)).shape), sys.argv[1:])
"""


def test_a_script(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "mamba_ops.compat", str(script), "--lr", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "mamba_ops.compat.mamba_ssm.modules.mamba2 (1, 5, 16) ['--lr', '1']\n", done.stderr


def test_a_script_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compat", "/nowhere/train.py"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "there is no script /nowhere/train.py" in capsys.readouterr().err
