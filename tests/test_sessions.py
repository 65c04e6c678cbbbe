"""Sessions: conversations that go on, are saved, and are rolled back; steps in a CUDA graph."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mamba_ops.models import CheckpointError, LanguageModel, Session, save_checkpoint
from tests.conftest import missing_device
from tests.test_models import CONFIGS, PROMPTS, greedy

ROOM = 64


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return make(request.param)


def make(name: str) -> LanguageModel:
    """A model whose answers depend on the whole prompt: far from its small starting weights."""
    torch.manual_seed(1)
    model = LanguageModel(CONFIGS[name]).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def fed(model: LanguageModel) -> Session:
    session = Session(model, 3, max_length=ROOM)
    session.extend(PROMPTS)
    return session


def close(got: Tensor | None, expected: Tensor | None) -> None:
    assert got is not None and expected is not None
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_a_conversation_goes_on(model: LanguageModel) -> None:
    session = Session(model, 3, max_length=ROOM)
    text: list[list[int]] = [[], [], []]
    for further in (PROMPTS, [[3], [7, 7, 2], [1, 18]], torch.tensor([[5, 6], [1, 2], [3, 4]]), [[], [], []]):
        text = [row + list(map(int, more)) for row, more in zip(text, further, strict=True)]
        expected = [greedy(model, row, 4) for row in text]
        got = [row.tolist() for row in session.generate(further, 4, temperature=0)]
        assert got == expected
        text = [row + new for row, new in zip(text, got, strict=True)]
    session.reset()
    got = session.generate(PROMPTS, 4, temperature=0)
    assert [row.tolist() for row in got] == [greedy(model, row, 4) for row in PROMPTS]


def test_steps_and_prompts_are_the_same(model: LanguageModel) -> None:
    at_once, stepped = Session(model, 2, max_length=ROOM), Session(model, 2, max_length=ROOM)
    tokens = torch.randint(19, (2, 9))
    whole = at_once.extend(tokens)
    stepped.extend(tokens[:, :2])
    for t in range(2, 9):
        logits = stepped.step(tokens[:, t])
    close(logits, whole)
    assert at_once.extend([[], []]) is whole  # nothing to feed


def test_a_stream_that_is_left_early(model: LanguageModel) -> None:
    session = Session(model, 3, max_length=ROOM)
    stream = session.stream(PROMPTS, 9, temperature=0)
    drawn = [next(stream).tolist() for _ in range(3)]
    stream.close()
    text = [[*prompt, *new] for prompt, new in zip(PROMPTS, zip(*drawn, strict=True), strict=True)]
    got = session.generate([[4], [4], [4]], 4, temperature=0)
    assert [row.tolist() for row in got] == [greedy(model, [*row, 4], 4) for row in text]


def test_rows_that_ended_stay_as_they_were(model: LanguageModel) -> None:
    whole = [row.tolist() for row in Session(model, 3, max_length=ROOM).generate(PROMPTS, 8, temperature=0)]
    stop = whole[0][1]
    session = Session(model, 3, max_length=ROOM)
    first = [row.tolist() for row in session.generate(PROMPTS, 8, temperature=0, stop_token=stop)]
    assert first == [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    assert len({len(row) for row in first}) > 1
    text = [prompt + new + [2, 3] for prompt, new in zip(PROMPTS, first, strict=True)]
    got = session.generate([[2, 3]] * 3, 4, temperature=0)
    assert [row.tolist() for row in got] == [greedy(model, row, 4) for row in text]


# --- speculation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(4, 4, 4), (0, 0, 0), (2, 2, 2), (3, 0, 4), (1, 4, 2)])
def test_keeping_some_drafts(model: LanguageModel, counts: tuple[int, ...]) -> None:
    drafts = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    session = fed(model)
    before = session.logits
    scores = session.score(drafts)
    close(scores[:, -1], session.logits)
    session.keep(counts)
    text = [prompt + row[:n] for prompt, row, n in zip(PROMPTS, drafts.tolist(), counts, strict=True)]
    every = torch.cat([before[:, None], scores], dim=1)  # type: ignore[index]
    expected = torch.stack([model(torch.tensor([row]))[0, -1] for row in text])
    close(every[torch.arange(3), torch.tensor(counts)], expected)
    close(session.logits, expected)
    got = session.generate([[13], [14], [15]], 3, temperature=0)
    assert [r.tolist() for r in got] == [greedy(model, [*t, 13 + i], 3) for i, t in enumerate(text)]


def test_speculative_decoding_gives_the_same_tokens(model: LanguageModel) -> None:
    """A draft that is right now and then: the greedy answer, with every fourth token changed."""
    answers = [greedy(model, prompt, 20) for prompt in PROMPTS]
    drafts = [[(t + (i % 4 == 3)) % 19 for i, t in enumerate(row)] + [0] * 9 for row in answers]
    session, done, rounds = fed(model), [0, 0, 0], 0
    got: list[list[int]] = [[], [], []]
    while min(done) < 15:
        rounds += 1
        sure = session.logits.argmax(1)  # type: ignore[union-attr]
        guesses = torch.tensor([row[n + 1 : n + 4] for row, n in zip(drafts, done, strict=True)])
        tried = torch.cat([sure[:, None], guesses], dim=1)
        right = session.score(tried).argmax(2)[:, :-1] == guesses
        counts = (1 + right.cumprod(1).sum(1)).tolist()
        session.keep(counts)
        got = [row + t[:n] for row, t, n in zip(got, tried.tolist(), counts, strict=True)]
        done = [len(row) for row in got]
    assert [row[:15] for row in got] == [row[:15] for row in answers]
    assert rounds < 12


def test_speculation_wants_its_order() -> None:
    model = make("mamba")
    session = Session(model, 3)
    drafts = torch.zeros(3, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="logits must be known"):
        session.score(drafts)
    session.extend(PROMPTS)
    with pytest.raises(ValueError, match="no drafts have been scored"):
        session.keep([1, 1, 1])
    with pytest.raises(ValueError, match=r"drafts must be \(b, k\) with k >= 1, got \(3, 0\)"):
        session.score(drafts[:, :0])
    session.score(drafts)
    for counts in ([1, 1], [1, 1, 3], [1, -1, 1]):
        with pytest.raises(ValueError, match=r"counts must be 3 numbers in 0..2"):
            session.keep(counts)
    session.step(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="no drafts have been scored"):
        session.keep([1, 1, 1])


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_states_in_another_dtype(tmp_path: Path, state_dtype: torch.dtype) -> None:
    """They are rounded after every call, to their own precision and no less, and a file keeps them so."""
    for name in ("mamba", "mamba2"):
        exact = fed(make(name))
        model, text = exact.model, torch.tensor([[5, 6], [1, 2], [3, 4]])
        session = Session(model, 3, max_length=ROOM, state_dtype=state_dtype)
        session.extend(PROMPTS)
        session.save(tmp_path / "a")
        again = Session.load(tmp_path / "a", model)
        for t in range(2):
            logits, expected, loaded = (s.step(text[:, t]) for s in (session, exact, again))
            error = ((logits - expected).norm() / expected.norm()).item()
            assert torch.finfo(state_dtype).eps / 1e3 < error < 4 * torch.finfo(state_dtype).eps
            assert torch.equal(loaded, logits)
        for key, state in again.cache.tensors().items():
            assert state.dtype == (state_dtype if "ssm" in key else torch.float64)


def test_state_dtypes_that_are_none() -> None:
    with pytest.raises(ValueError, match="state_dtype must be float32, bfloat16, .* got torch.int32"):
        Session(make("mamba2"), 2, state_dtype=torch.int32)


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_saved_session_goes_on(model: LanguageModel, tmp_path: Path, tokens: int) -> None:
    session = Session(model, 3, max_length=ROOM)
    session.generate(PROMPTS, tokens, temperature=0)
    session.save(tmp_path / "a")
    expected = session.generate([[1], [2, 3], [4]], 6, temperature=0)
    for _ in range(2):
        again = Session.load(tmp_path / "a", model)
        got = again.generate([[1], [2, 3], [4]], 6, temperature=0)
        assert [row.tolist() for row in got] == [row.tolist() for row in expected]
        again.save(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_an_empty_session_is_saved(tmp_path: Path) -> None:
    model = make("samba")
    Session(model, 2).save(tmp_path / "a")
    again = Session.load(tmp_path / "a", model)
    assert again.logits is again.pending is None
    assert [len(row) for row in again.generate([[1], [2]], 3)] == [3, 3]


def test_files_that_are_no_saved_session(tmp_path: Path) -> None:
    path, model = tmp_path / "a", make("mamba")

    def refused(message: str, model: LanguageModel = model) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            Session.load(path, model)
        assert "\n" not in str(caught.value)

    refused("no checkpoint at")
    path.write_bytes(b"no tensors")
    refused("not a whole safetensors file")
    save_checkpoint(path, model)
    refused("is no saved session")
    session = fed(model)
    session.save(path)
    refused("another model", make("mamba2"))
    other = make("mamba")
    with torch.no_grad():
        other.backbone.layers[1].mixer.out_proj.weight[0, 0] += 1  # type: ignore[union-attr, index]
    refused("another model", other)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused("not a whole safetensors file")
    path.write_bytes(whole)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file({k: t for k, t in tensors.items() if "ssm_state" not in k}, path, metadata)
    refused("not a whole saved session.*ssm_state")
    save_file(tensors, path, metadata | {"batch_size": "2"})
    refused(r"must be torch.float64 \(2, .* got torch.float64 \(3, ")


# --- bad input --------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    session = Session(make("mamba"), 2)
    with pytest.raises(ValueError, match="there must be 2 prompts, got 1"):
        session.extend([[1]])
    with pytest.raises(ValueError, match=r"prompt 1 must be \(l,\) with l >= 1"):
        session.extend([[1], []])
    with pytest.raises(ValueError, match=r"prompt 1 must hold tokens in 0..18, got 19..19"):
        session.extend([[1], [19]])
    with pytest.raises(ValueError, match="prompt 0 must hold integers, got torch.float32"):
        session.extend([[1.5], [2]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="graph needs a model on a GPU"):
        Session(make("mamba"), 2, graph=True)
    with pytest.raises(ValueError, match="needs max_length"):
        Session(make("zamba"), 2)


def test_a_session_without_room() -> None:
    session = Session(make("zamba"), 2, max_length=5)
    session.extend([[1, 2, 3], [1]])
    expected = session.cache.clone().tensors()
    for tokens in ([[1, 2, 3], [1, 1, 1]], [[1], [1, 2, 3]]):
        with pytest.raises(ValueError, match=r"room for 5 tokens, got 3 \+ 3"):
            session.extend(tokens)
    got = session.cache.tensors()  # nothing has changed, in the layers before the attention either
    assert all(torch.equal(got[name], t) for name, t in expected.items())
    session.step(torch.tensor([1, 1]))
    session.step(torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"room for 5 tokens, got 5 \+ 1"):
        session.step(torch.tensor([1, 1]))


# --- GPU --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_in_a_cuda_graph(name: str, tmp_path: Path) -> None:
    """The same tokens with and without the graph and on the CPU, in all that a session does."""
    for operator in ("selective_scan", "ssd", "selective_state_update", "ssd_state_update", "rms_norm_gated"):
        reason = missing_device(operator, "cuda")
        if reason:
            pytest.skip(reason)
    model = make(name)
    expected = [greedy(model, prompt, 8) for prompt in PROMPTS]
    model = model.float().cuda()
    sessions = [Session(model, 3, max_length=ROOM, graph=graph) for graph in (True, False)]
    for session in sessions:
        got = session.generate(PROMPTS, 8, temperature=0)
        assert [row.tolist() for row in got] == expected
    graphed, plain = sessions
    graphed.extend([[1], [2, 3], [4]])
    plain.extend([[1], [2, 3], [4]])
    graphed.save(tmp_path / "a")
    for session in sessions:
        session.score(torch.ones(3, 4, dtype=torch.long))
        session.keep([1, 0, 4])
    for t in range(5):
        tokens = torch.tensor([t, t + 1, t + 2], device="cuda")
        assert torch.equal(graphed.step(tokens), plain.step(tokens))
    again = Session.load(tmp_path / "a", model)
    again.score(torch.ones(3, 4, dtype=torch.long))
    again.keep([1, 0, 4])
    assert again.generate([[]] * 3, 1, temperature=0)[0].is_cuda
    drawn = [list(s.stream([[1]] * 3, 4, temperature=0)) for s in sessions]
    assert torch.equal(torch.stack(drawn[0]), torch.stack(drawn[1]))


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_in_bfloat16_on_a_gpu(name: str) -> None:
    """No further from float64 than twice what the CPU's are, and the same bits with and without the graph."""
    reason = missing_device("norm_linear", "cuda")
    if reason:
        pytest.skip(reason)
    model, tokens = make(name).bfloat16(), torch.randint(19, (12, 3))

    def logits(model: LanguageModel, graph: bool = False) -> Tensor:
        session = Session(model, 3, max_length=ROOM, graph=graph)
        return torch.stack([session.step(row).cpu() for row in tokens])

    own, truth = logits(model).double(), logits(deepcopy(model).double())
    model.cuda()
    got = logits(model)
    assert (got.double() - truth).norm() <= 2 * (own - truth).norm()
    assert torch.equal(logits(model, graph=True), got)
