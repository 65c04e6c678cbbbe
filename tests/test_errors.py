"""A wrong argument is named, with the rule and what came; a strange but right one works."""

import math
import re

import pytest
import torch

import mamba_ops
from tests.cases import ALL, PACKABLE, UPDATES, Inputs, full
from tests.compare import check, is_float

# The tensor that sets the sizes is right by definition: the next one is blamed for what does not fit.
SETS_SIZES = ("u", "x", "state", "weight")
LIMITED = ("ssd", "ssd_state_update")


@pytest.mark.parametrize("fault", ["shape", "dims", "dtype", "device"])
@pytest.mark.parametrize(
    ("name", "argument"), [(name, k) for name in ALL for k, v in full(name).items() if torch.is_tensor(v)]
)
def test_a_wrong_tensor_is_named(name: str, argument: str, fault: str) -> None:
    inputs = full(name)
    good = inputs[argument]
    dim = 1 if argument == "state" else 0  # a cache may have any number of rows
    if fault == "device" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    inputs[argument] = {
        "shape": lambda: good.narrow(dim, 0, good.shape[dim] - 1),
        "dims": lambda: good[None],
        "dtype": lambda: good.to(torch.float32 if argument == "state_indices" else torch.int16),
        "device": lambda: good.cuda(),
    }[fault]()
    with pytest.raises((RuntimeError, ValueError, TypeError)) as error:
        getattr(mamba_ops, name)(**inputs)
    named = r"\w+" if fault != "dtype" and argument in SETS_SIZES else re.escape(argument)
    assert re.search(rf"{name}: .*\b{named}\b.*\bgot\b", str(error.value)), str(error.value)


def faulty_offsets(values: list[int]) -> Inputs:
    return {"cu_seqlens": torch.tensor(values, dtype=torch.int32)}


@pytest.mark.parametrize("values", [[1, 9], [0, 8], [0, 10], [0, 7, 5, 9], [0], [-1, 9], [0, -3, 9]])
@pytest.mark.parametrize("name", PACKABLE)
def test_wrong_offsets_are_named(name: str, values: list[int]) -> None:
    inputs = full(name, pack="cu_seqlens") | faulty_offsets(values)
    inputs.pop("initial_state")
    with pytest.raises(RuntimeError, match=f"{name}.*cu_seqlens"):
        getattr(mamba_ops, name)(**inputs)


@pytest.mark.parametrize("name", PACKABLE)
def test_packs_that_exclude_each_other(name: str) -> None:
    inputs = full(name, pack="cu_seqlens")
    both = inputs | {"seq_idx": torch.zeros(1, 9, dtype=torch.int32)}
    with pytest.raises((RuntimeError, ValueError), match=f"{name}.*seq_idx.*cu_seqlens"):
        getattr(mamba_ops, name)(**both)
    inputs = full(name) | faulty_offsets([0, 4, 9])
    with pytest.raises((RuntimeError, ValueError), match=f"{name}.*b must be 1.*2"):
        getattr(mamba_ops, name)(**inputs)


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("selective_scan", {"B": torch.zeros(2, 3, 2, 9)}, "B.*g dividing.*4"),
        ("ssd", {"B": torch.zeros(2, 9, 3, 3)}, "B.*g.* dividing.*4"),
        ("ssd", {"C": torch.zeros(2, 9, 3, 3)}, "C.*g.* dividing.*4"),
        ("ssd", {"chunk_size": 0}, "chunk_size.*0"),
        ("ssd", {"chunk_size": -64}, "chunk_size.*-64"),
        ("ssd", {"chunk_size": 257}, "chunk_size.*256.*257"),
        ("ssd", {"dt_limit": (0.5, 0.1)}, "dt_limit.*0.5.*0.1"),
        ("ssd", {"dt_limit": (math.nan, 0.1)}, "dt_limit.*nan"),
        ("ssd", {"dt_limit": (1e-8, 1e-9)}, "dt_limit.*1e-08.*1e-09"),
        ("ssd_state_update", {"dt_limit": (0.5, 0.1)}, "dt_limit.*0.5.*0.1"),
        *((name, {"dt_limit": None}, r"dt_limit must be \(low, high\).*None") for name in LIMITED),
        *((name, {"dt_limit": (0.0, 1.0, 2.0)}, r"dt_limit must be \(low, high\).*2.0") for name in LIMITED),
        (
            "ssd",
            {"initial_state": torch.zeros(2, 4, 3, 3, dtype=torch.complex64)},
            "floating-point.*complex64",
        ),
        (
            "selective_scan",
            {"initial_state": torch.zeros(2, 4, 3, dtype=torch.complex64)},
            "floating-.*complex",
        ),
        ("causal_conv1d", {"activation": "gelu"}, "activation.*gelu"),
        ("causal_conv1d_update", {"activation": "gelu"}, "activation.*gelu"),
        ("causal_conv1d", {"weight": torch.zeros(4, 5), "initial_state": None}, "weight.*5"),
        ("causal_conv1d", {"weight": torch.zeros(4, 1), "initial_state": None}, "weight.*1"),
        ("causal_conv1d_update", {"weight": torch.zeros(4, 4), "state": torch.zeros(5, 4, 2)}, "state.*2"),
        ("rms_norm_gated", {"group_size": 3}, "group_size.*3"),
        ("rms_norm_gated", {"group_size": 0}, "group_size.*0"),
        ("rms_norm_gated", {"group_size": -4}, "group_size.*-4"),
        ("rms_norm_gated", {"eps": -1.0}, "eps.*-1"),
        *((name, {"state_indices": torch.tensor([0, 5, 1])}, "state_indices.*5") for name in UPDATES),
        *((name, {"state_indices": None}, "state.*3.*5") for name in UPDATES),
    ],
)
def test_a_wrong_value_is_named(name: str, wrong: Inputs, words: str) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError), match=f"(?s){name}.*{words}"):
        getattr(mamba_ops, name)(**full(name) | wrong)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("selective_scan", "u"),
        ("selective_scan", "A"),
        ("ssd", "dt"),
        ("ssd", "B"),
        ("causal_conv1d", "weight"),
        ("selective_state_update", "A"),
    ],
)
def test_a_tensor_that_is_not_optional_is_named(name: str, argument: str) -> None:
    named = "the first tensor" if argument in "ux" else argument
    inputs = full(name) | {argument: None}
    inputs.pop("initial_state", None)
    with pytest.raises(RuntimeError, match=f"{name}: {named} is not optional, got None"):
        getattr(mamba_ops, name)(**inputs)


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_must_be_on_the_meta_device_or_none(name: str) -> None:
    inputs = full(name)
    argument = next(k for k, v in reversed(inputs.items()) if torch.is_tensor(v))
    with pytest.raises(RuntimeError, match=f"{name}.*on one device.*cpu.*meta"):
        getattr(mamba_ops, name)(**inputs | {argument: inputs[argument].to("meta")})


@pytest.mark.parametrize("name", ALL)
def test_every_stride_is_right(name: str) -> None:
    """No input needs a unit stride: every second element of a wider tensor, in each dim."""
    inputs = full(name)
    for k, v in inputs.items():
        if is_float(v):
            wide = torch.full([2 * size for size in v.shape], math.nan, dtype=v.dtype)
            inputs[k] = wide[tuple(slice(None, None, 2) for _ in v.shape)].copy_(v)
    check(name, inputs)
