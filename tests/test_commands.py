"""The commands: train, resume, interrupt, generate, doctor, and what bad input gets."""

import gzip
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from mamba_ops import _C
from mamba_ops.__main__ import main
from mamba_ops.commands import corpus, doctor, measure, trainer
from mamba_ops.models import (
    LanguageModel,
    LMConfig,
    load_checkpoint,
    load_model,
    save_checkpoint,
    save_pretrained,
)

SMALL = ["--d-model", "32", "--layers", "1", "--row", "32", "--batch", "2", "--precision", "float32"]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small text, in an empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    words = ["state", "space", "model", "scan", "chunk", "head", "gate", "norm"]
    draw = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(draw.choice(words) for _ in range(1000)))
    return path


def run_train(text: Path, *options: str) -> int:
    return main(["train", "--data", str(text), *SMALL, *options])


def resume(*options: str) -> int:
    return main(["train", "--resume", *options])


def weights(folder: str) -> dict[str, torch.Tensor]:
    loaded = load_checkpoint(Path(folder, trainer.CHECKPOINT))
    return loaded.weights | loaded.extra


# --- train ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["mamba", "mamba2"])
def test_train_learns_and_reports(text: Path, layer: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert run_train(text, "--layer", layer, "--steps", "60", "--lr", "0.02", "--out", "run") == 0
    out = capsys.readouterr().out
    loaded = load_checkpoint("run/checkpoint.safetensors")
    assert (loaded.config.layer, loaded.step) == (layer, 60)
    measured = [entry["held_out"] for entry in loaded.info["history"] if "held_out" in entry][-1]
    assert measured < 3
    held_out = corpus.load(str(text), 32).held_out
    assert text.read_bytes().endswith(held_out) and 32 < len(held_out) < 400
    for line in ("gzip -9", "order-2 model", f"this {layer} model    ", "sample, after"):
        assert line in out
    assert f"{8 * len(gzip.compress(held_out, 9)) / len(held_out):.1f}" in out
    assert f"{measured:.3f}" in out
    assert Path("run/curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in Path("run").iterdir()) == ["checkpoint.safetensors", "curve.png"]


def test_train_by_the_clock(text: Path) -> None:
    began = time.perf_counter()
    assert run_train(text, "--minutes", "0.03", "--out", "run") == 0
    loaded = load_checkpoint("run/checkpoint.safetensors")
    assert 1.8 <= loaded.info["seconds"] < time.perf_counter() - began
    assert loaded.step > 1


def test_without_matplotlib(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run_train(text, "--steps", "2", "--out", "run") == 0
    assert "no picture of the curve: matplotlib is not installed" in capsys.readouterr().out
    assert not Path("run/curve.png").exists()


def test_folders_are_numbered(text: Path) -> None:
    assert run_train(text, "--steps", "1") == run_train(text, "--steps", "1") == 0
    assert sorted(str(path.parent) for path in Path("runs").glob("*/checkpoint.safetensors")) == [
        "runs/mamba2",
        "runs/mamba2-2",
    ]


@pytest.mark.parametrize("layer", ["mamba", "mamba2"])
def test_resume_equals_an_uninterrupted_run(
    text: Path, layer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(text, "--layer", layer, "--steps", "7", "--out", "whole") == 0

    draw_rows = corpus.draw_rows

    def interrupted(text: torch.Tensor, step: int, *rest: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return draw_rows(text, step, *rest)

    monkeypatch.setattr(corpus, "draw_rows", interrupted)
    assert run_train(text, "--layer", layer, "--steps", "7", "--out", "parts") == 130
    assert "step 3 is saved; go on with" in capsys.readouterr().out
    assert load_checkpoint("parts/checkpoint.safetensors").step == 3
    assert resume("--out", "parts") == 0
    whole, parts = weights("whole"), weights("parts")
    assert whole.keys() == parts.keys() and any("exp_avg" in name for name in whole)
    for name, value in whole.items():
        assert torch.equal(parts[name], value), name


def test_ctrl_c_leaves_a_good_checkpoint(text: Path) -> None:
    command = [sys.executable, "-m", "mamba_ops", "train", "--data", str(text), *SMALL]
    with subprocess.Popen([*command, "--minutes", "3", "--out", "run"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert b"million parameters" in process.stdout.readline()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert b"interrupted" in process.stdout.read()
        assert process.wait(60) == 130
    assert load_checkpoint("run/checkpoint.safetensors").step > 0
    assert load_model("run/checkpoint.safetensors")(torch.tensor([[1, 2]])).isfinite().all()


# --- bad input --------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], code: int, *parts: str) -> None:
    """The command failed and said why in one line."""
    error = capsys.readouterr().err
    assert code == 1
    assert error.count("\n") == 1 and error.startswith("mamba_ops ") and "Traceback" not in error
    assert all(part in error for part in parts), error


def test_bad_text(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, run_train(Path("none.txt")), "cannot read", "none.txt: No such file")
    refused(capsys, run_train(text.parent), "cannot read", "directory")
    Path("empty").touch()
    refused(capsys, run_train(Path("empty")), "empty is empty")
    Path("short").write_bytes(b"x" * 60)
    refused(capsys, run_train(Path("short")), "training part of 27 bytes is shorter than a row of 32")
    Path("tiny").write_bytes(b"x")
    refused(capsys, run_train(Path("tiny")), "shorter than a row")
    refused(capsys, run_train(text, "--steps", "-3"), "--steps must be above 0, got -3")
    refused(capsys, run_train(text, "--minutes", "nan"), "--minutes must be above 0, got nan")
    refused(capsys, run_train(text, "--d-model", "31"), "headdim must divide d_ssm = 62")
    assert not Path("runs").exists()


@pytest.mark.parametrize("seed", ["-1", "4294967296", "x"])
def test_a_seed_that_no_generator_takes(text: Path, seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_train(text, "--seed", seed)
    assert f"--seed: must be an integer in 0..4294967295, got '{seed}'" in capsys.readouterr().err


def test_an_existing_run_stays(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_train(text, "--steps", "1", "--out", "run") == 0
    before = Path("run/checkpoint.safetensors").read_bytes()
    capsys.readouterr()
    refused(capsys, run_train(text, "--out", "run"), "holds a run already", "--resume")
    refused(capsys, resume("--out", "run"), "complete after 1 steps")
    refused(capsys, resume("--out", "run", "--lr", "1", "--steps", "5"), "--lr 1.0 differs from")
    text.write_text("another text" * 1000)
    refused(capsys, resume("--out", "run", "--steps", "5"), "is not the text with which")
    assert Path("run/checkpoint.safetensors").read_bytes() == before


def test_resume_without_a_run(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, resume(), "there is no run under runs/")
    refused(capsys, resume("--out", "nowhere"), "no checkpoint at nowhere")
    Path("wrong").mkdir()
    Path("wrong/checkpoint.safetensors").write_text("something else")
    refused(capsys, resume("--out", "wrong"), "not a whole safetensors file")
    save_checkpoint("wrong/checkpoint.safetensors", LanguageModel(LMConfig(d_model=32, n_layer=1)))
    refused(capsys, resume("--out", "wrong"), "was not written by train")


def test_a_diverging_run_stops(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run_train(text, "--steps", "300", "--lr", "1e30", "--out", "run")
    error = capsys.readouterr().err
    assert code == 1 and "the loss is no longer a number" in error and "--lr" in error
    assert not Path("run/checkpoint.safetensors").exists()


def test_out_that_is_a_file(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, run_train(text, "--out", str(text)), "cannot make the folder")


# --- generate ---------------------------------------------------------------------------------------------


@pytest.fixture
def byte_model(tmp_path: Path) -> str:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, LanguageModel(LMConfig(d_model=32, n_layer=1)))
    return str(path)


def test_generate(byte_model: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    outputs = []
    for options in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--temperature", "0"]):
        assert main(["generate", byte_model, "--prompt", "def é", "--tokens", "30", *options]) == 0
        outputs.append(capfdbinary.readouterr().out)
    assert all(len(out) == 6 + 30 + 1 and out.startswith("def é".encode()) for out in outputs)
    assert outputs[0] == outputs[1] != outputs[2]


def test_generate_refuses(byte_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, main(["generate", "none", "--prompt", "a"]), "no checkpoint at none")
    refused(capsys, main(["generate", byte_model, "--prompt", ""]), "prompt 0 must be (l,) with l >= 1")
    refused(capsys, main(["generate", byte_model, "--prompt", "a", "--top-p", "2"]), "top_p must be in")
    save_checkpoint(tmp_path / "other", LanguageModel(LMConfig(vocab_size=9, d_model=32, n_layer=1)))
    code = main(["generate", str(tmp_path / "other"), "--prompt", "a"])
    refused(capsys, code, "is a model of 9 tokens, not of bytes")
    save_pretrained(LanguageModel(LMConfig(vocab_size=9, d_model=32, n_layer=1)), tmp_path / "a")
    refused(capsys, main(["generate", str(tmp_path / "a"), "--prompt", "a"]), "not of bytes")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    refused(capsys, main(["generate", str(tmp_path / "a"), "--prompt", "a"]), "is no tokenizer")
    refused(capsys, main(["generate", str(tmp_path), "--prompt", "a"]), "no checkpoint at")


def test_generate_from_folders(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Of train, of a published model of bytes, and of one with a tokenizer."""
    model = LanguageModel(LMConfig(d_model=32, n_layer=1))
    save_checkpoint(tmp_path / "checkpoint.safetensors", model)
    save_pretrained(model, tmp_path / "bytes")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0, "two": 1, "three": 2}, "one"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    save_pretrained(LanguageModel(LMConfig(vocab_size=3, d_model=32, n_layer=1)), tmp_path / "words")
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    for name, start in ((".", b"one two"), ("bytes", b"one two"), ("words", b"one two ")):
        command = ["generate", str(tmp_path / name), "--prompt", "one two", "--tokens", "9"]
        assert main([*command, "--temperature", "0"]) == 0
        out = capfdbinary.readouterr().out
        assert out.startswith(start) and (len(out.split()) == 11 if name == "words" else len(out) == 17)


def test_generate_into_a_closed_pipe(byte_model: str) -> None:
    command = f"{sys.executable} -m mamba_ops generate {byte_model} --prompt abc --tokens 3000 | head -c 4"
    done = subprocess.run(command, shell=True, capture_output=True, check=True, timeout=60)
    assert done.stdout.startswith(b"abc") and done.stderr == b""


# --- measures and text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["mamba", "mamba2"])
def test_model_bits_equal_one_forward_per_segment(layer: str) -> None:
    model = LanguageModel(LMConfig(d_model=32, n_layer=1, layer=layer))
    text = torch.randint(256, (1201,), dtype=torch.uint8)
    stream = torch.cat([torch.tensor([10], dtype=torch.uint8), text]).long()
    nats = 0.0
    for start in (0, 601):
        part = stream[start : start + 602]
        logits = model(part[None, :-1])[0].detach()
        nats += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
    bits = measure.model_bits(model, text, torch.float32, rows=2)
    assert bits == pytest.approx(nats / math.log(2) / 1201, rel=1e-5)


def test_order2_bits_by_hand() -> None:
    seen, asked = b"abracadabra abracadabra", b"abrax"
    counts = [Counter(seen[i : i + k] for i in range(len(seen) - k + 1)) for k in (1, 2, 3)]
    bits = 0.0
    for i in range(len(asked)):
        probability = 1 / 256
        for k in range(3):
            context = (b"\n\n" + asked)[i + 2 - k : i + 2]
            total = sum(c for gram, c in counts[k].items() if gram[:k] == context)
            probability = (counts[k][context + asked[i : i + 1]] + 4 * probability) / (total + 4)
        bits -= math.log2(probability)
    assert measure.order2_bits(seen, asked) == pytest.approx(bits / len(asked))


def test_the_library_is_the_default_text() -> None:
    text = corpus.load(None, 512)
    assert text.fingerprint == corpus.load(None, 512).fingerprint
    assert len(text.train) > 5e6 and 0.02 < len(text.held_out) / len(text.train) < 0.1


def test_rows_follow_from_the_step() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    inputs, targets = corpus.draw_rows(text, 3, 4, 8, seed=5)
    assert inputs.shape == targets.shape == (4, 8)
    assert torch.equal(inputs + 1, targets)
    assert torch.equal(corpus.draw_rows(text, 3, 4, 8, seed=5)[0], inputs)
    assert not torch.equal(corpus.draw_rows(text, 4, 4, 8, seed=5)[0], inputs)
    starts = {int(corpus.draw_rows(text[:10], step, 1, 8, seed=0)[0][0, 0]) for step in range(40)}
    assert starts == {0, 1}


# --- doctor -----------------------------------------------------------------------------------------------


def test_doctor_names_what_forces_an_instruction_set() -> None:
    if len(_C.cpu_isas()) < 2:
        pytest.skip("the baseline is all that runs here")
    done = subprocess.run(
        [sys.executable, "-m", "mamba_ops", "doctor"],
        env=os.environ | {"MAMBA_OPS_CPU_ISA": "base"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "kernels for base" in done.stdout and "unset MAMBA_OPS_CPU_ISA" in done.stdout


def test_doctor_tells_of_operators_that_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(name: str, device: str) -> bool:
        if name == "ssd":
            raise RuntimeError("ssd: of no use\nhere")
        return name != "causal_conv1d"

    monkeypatch.setattr(doctor, "_agrees", failing)
    assert main(["doctor"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    for part in (
        "causal_conv1d WRONG cpu",
        "ssd FAILED ssd: of no use here",
        "selective_scan right",
        "no right results from causal_conv1d on cpu, ssd on cpu",
    ):
        assert part in out


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for part in ("torch " + torch.__version__, "kernels for", "CUDA kernels:", "ssd_state_update", "to do"):
        assert part in out
    assert "WRONG" not in out
