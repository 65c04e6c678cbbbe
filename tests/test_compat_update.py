"""mamba_ssm's one-token update as the stand-in has it, against plain torch."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mamba_ops import reference
from mamba_ops.compat.mamba_ssm.ops.triton import selective_state_update as update
from tests.cases import Inputs
from tests.compat_check import close, dtypes, follows, per_head, renamed, subset


def plain_update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, **rest: Any) -> Tensor:
    rest = {k: v.flatten() if k in ("D", "dt_bias") and v is not None else v for k, v in rest.items()}
    rest = renamed(rest, dt_bias="delta_bias", dt_softplus="delta_softplus")
    rest = renamed(rest, state_batch_indices="state_indices")
    z = rest.pop("z", None)
    z = z if z is None else z.flatten(1)
    flat = state.flatten(1, -2) if state.dim() == 4 else state
    y = reference.selective_state_update(flat, x.flatten(1), dt.flatten(1), A.flatten(0, -2), z=z, **rest)
    state.copy_(flat.view(state.shape))
    return y.view(x.shape)


@settings(max_examples=40)
@given(data=st.data())
def test_selective_state_update(data: st.DataObject) -> None:
    draw, dtype = data.draw, data.draw(dtypes)
    b, h, p, n = draw(st.integers(1, 3)), 4, 3, 5
    heads, tied = draw(st.booleans()), draw(st.booleans())
    seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=seed)

    lead = (h, p) if heads else (h * p,)
    tied = heads and tied
    base = (h,) if tied else lead
    inputs: Inputs = {
        "state": normal(b + 2, *lead, n).to(draw(st.sampled_from((torch.float32, dtype)))),
        "x": normal(b, *lead).to(dtype),
        "dt": normal(b, *base).to(dtype),
        "A": -normal(*(base if tied else (*lead, n))).exp(),
        "B": normal(b, 2, n).to(dtype),
        "C": normal(b, 2, n).to(dtype),
        "dt_softplus": draw(st.booleans()),
    }
    for name in draw(subset(("D", "dt_bias"))):
        inputs[name] = normal(*base)
    if draw(st.booleans()):
        inputs["z"] = normal(b, *lead).to(dtype)

    def tie(function: Any) -> Any:
        """Calls it with the numbers of heads expanded as transformers and mamba_ssm's layers expand them."""

        def call(**inputs: Any) -> Any:
            shapes = {"A": (p, n), "dt": (p,), "D": (p,), "dt_bias": (p,)} if tied else {}
            expanded = {k: per_head(inputs[k], *shape) for k, shape in shapes.items() if k in inputs}
            return function(**inputs | expanded)

        return call

    stand_in, plain = tie(update.selective_state_update), tie(plain_update)
    if draw(st.booleans()):
        rows = torch.randperm(b + 2, generator=seed)[:b].int()
        rows[draw(st.integers(0, b - 1))] = -1
        inputs["state_batch_indices"] = rows
    else:
        inputs["state"] = inputs["state"][:b]
    got = follows(stand_in, plain, inputs, dtype, gradients=False)
    assert got["out 0"].dtype == dtype and got["state"].dtype == inputs["state"].dtype
    if "state_batch_indices" in inputs:
        padding = inputs["state_batch_indices"] < 0
        assert got["out 0"][padding].count_nonzero() == 0
    else:
        follows(stand_in, plain, inputs, dtype)  # while gradients are recorded
        state = inputs["state"].clone()
        known = {k: v for k, v in inputs.items() if k != "state"}
        close(tie(update.selective_state_update_ref)(state=state, **known), got["out 0"], dtype)


def test_a_state_that_is_no_view_of_channels() -> None:
    state = torch.randn(3, 4, 5, 2).transpose(2, 3)[:, ::2]
    x, dt, A = torch.randn(3, 2, 2), torch.rand(3, 2, 2), -torch.rand(2, 2, 5)
    inputs = {"state": state, "x": x, "dt": dt, "A": A, "B": torch.randn(3, 5), "C": torch.randn(3, 5)}
    follows(update.selective_state_update, plain_update, inputs, torch.float32, gradients=False)


def test_gradients_reach_the_first_token_through_the_state() -> None:
    """In grad mode steps are differentiable, the state included, where the original drops gradients."""
    x = torch.randn(1, 4, requires_grad=True)
    state = torch.zeros(1, 4, 2)
    one = torch.ones(1, 2)
    args = (torch.rand(1, 4), -torch.rand(4, 2), one, one)
    update.selective_state_update(state, x, *args)
    update.selective_state_update(state, x.detach(), *args).sum().backward()
    assert x.grad is not None and x.grad.count_nonzero() == 4


def test_gradients_and_indices_do_not_go_together() -> None:
    one, x = torch.ones(1, 2), torch.randn(1, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no backward"):
        update.selective_state_update(
            torch.zeros(1, 4, 2),
            x,
            torch.rand(1, 4),
            -torch.rand(4, 2),
            one,
            one,
            state_batch_indices=torch.zeros(1, dtype=torch.int32),
        )
