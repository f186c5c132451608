"""Where calibration tokens come from, and what is said when they are not enough."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import save_tiny, tiny_config
from safetensors.torch import load_file
from shapes import byte_tokenizer
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sliceserve.slicing.calibration import pick_calibration, pick_windows
from sliceserve.slicing.corpora import HUB, read_corpus
from sliceserve.slicing.errors import MachineError, UserError
from sliceserve.slicing.job import PAPER, SliceOptions, run_slice
from sliceserve.slicing.selftext import PROMPTS, sample_windows
from sliceserve.slicing.slicer import Slicer

DOCUMENTS = [f"document {number} " + "x" * number for number in range(40)]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    return str(path)


def windows_of(name: str, seed: int = 0, samples: int = 5) -> torch.Tensor:
    return pick_windows(read_corpus(name, "--t"), byte_tokenizer(), samples, 64, seed, "--t")


def slice_tiny(model: Path, output: Path, **changes: Any) -> Path:
    fields: dict[str, Any] = {"fraction": 0.3, "samples": 8, "sequence_length": 64}
    fields |= PAPER | changes
    run_slice(SliceOptions(str(model), output, **fields), show_progress=False)
    return output


def test_short_documents_are_packed_whole_and_without_padding(tmp_path: Path) -> None:
    name = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in DOCUMENTS])
    windows = windows_of(name)
    assert windows.shape == (5, 64)
    *whole, last = byte_tokenizer().decode(windows.flatten()).split("\n\n")
    assert len(whole) == len(set(whole)) > 3
    assert set(whole) <= set(DOCUMENTS)
    assert any(text.startswith(last) for text in DOCUMENTS)
    assert whole != DOCUMENTS[: len(whole)], "documents are taken at random"


def test_the_seed_fixes_the_choice(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(DOCUMENTS * 3))
    jsonl = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in DOCUMENTS])
    for name in (str(text), jsonl):
        assert torch.equal(windows_of(name, seed=1), windows_of(name, seed=1))
        assert not torch.equal(windows_of(name, seed=1), windows_of(name, seed=2))


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Hello\u2028there"},
        {"role": "assistant", "content": "Hi"},
    ]
    name = write_jsonl(tmp_path / "chats.jsonl", [{"messages": turns}] * 20)
    tokenizer = byte_tokenizer()
    windows = pick_windows(read_corpus(name, "--t"), tokenizer, 2, 64, 0, "--t")
    expected = "\n\n".join(["Hello\u2028there\n\nHi"] * 20).encode()[:128]
    assert tokenizer.decode(windows.flatten()).encode() == expected
    tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(UserError, match=r"the chat template, .*: only one turn"):
        pick_windows(read_corpus(name, "--t"), tokenizer, 2, 64, 0, "--t")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    )
    windows = pick_windows(read_corpus(name, "--t"), tokenizer, 2, 64, 0, "--t")
    expected = "\n\n".join(["[user]Hello\u2028there[assistant]Hi"] * 20).encode()[:128]
    assert tokenizer.decode(windows.flatten()).encode() == expected


def test_kinds_of_text_share_the_windows(tmp_path: Path) -> None:
    rows = [
        {"kind": kind, "text": letter * 40} for kind, letter in (("a", "x"), ("b", "y"), ("", "z"))
    ]
    name = write_jsonl(tmp_path / "kinds.jsonl", rows * 10)
    picked = pick_calibration(read_corpus(name, "--t"), byte_tokenizer(), 4, 64, 0, "--t", 2)
    texts = [byte_tokenizer().decode(window) for window in picked.windows]
    assert [set(text.strip()) - {"\n"} for text in texts] == [{"x"}, {"x"}, {"y"}, {"z"}]
    assert {kind: len(windows) for kind, windows in picked.held_out.items()} == {
        "a": 2, "b": 2, name: 2,
    }  # fmt: skip
    assert set(byte_tokenizer().decode(picked.held_out["b"][0])) - {"\n"} == {"y"}
    with pytest.raises(UserError, match="its a, is too short for --samples 90"):
        pick_windows(read_corpus(name, "--t"), byte_tokenizer(), 90, 64, 0, "--t")


def test_windows_held_out_are_not_calibrated_on(tmp_path: Path) -> None:
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(map(str, range(1000))))
    picked = pick_calibration(read_corpus(str(path), "--t"), byte_tokenizer(), 50, 64, 0, "--t", 5)
    windows = {tuple(window.tolist()) for window in picked.windows}
    (held_out,) = picked.held_out.values()
    assert len(windows) == 50
    assert len({tuple(window.tolist()) for window in held_out} - windows) == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2, cannot be read: Expecting"),
        ('{"content": "x"}', 'line 2, has neither a "text" nor a list of "messages"'),
        ('["x"]', 'line 2, has neither a "text"'),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        read_corpus(str(path), "--calibration")
    assert message in str(caught.value)
    assert "--calibration" in str(caught.value)


def test_data_sets_of_the_hub_are_read_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` takes a directory of that name in place of the hub."""
    monkeypatch.chdir(tmp_path)
    for name, corpus in HUB.items():
        root = tmp_path / corpus.path
        root.mkdir(parents=True)
        files = []
        for part, split in corpus.splits.items():
            rows = datasets.Dataset.from_dict({corpus.column: [f"{name} {part}", "second"]})
            file = corpus.files.get(part, f"{split}.parquet")
            (root / file).parent.mkdir(exist_ok=True)
            save = rows.to_parquet if file.endswith(".parquet") else rows.to_json
            save(root / file)
            files.append(f"  - split: {split}\n    path: {file}")
        if "name" in corpus.arguments:
            header = f"configs:\n- config_name: {corpus.arguments['name']}\n  data_files:\n"
            (root / "README.md").write_text("---\n" + header + "\n".join(files) + "\n---\n")
    for name, corpus in HUB.items():
        for part in corpus.splits:
            texts = [f"{name} {part}", "second"]
            expected = ["\n\n".join(texts)] if corpus.joined else texts
            assert read_corpus(name, "--calibration", part).documents == expected
    with pytest.raises(UserError, match="--text 'alpaca' has no held out part"):
        read_corpus("alpaca", "--text", "held out")


def test_a_hub_out_of_reach_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        MachineError, match="--calibration 'c4' is 'allenai/c4' on the Hugging Face"
    ):
        read_corpus("c4", "--calibration")


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", tiny_config(vocab_size=100), torch.float32)
    with pytest.raises(UserError, match=r"tokenizer does not fit .* has 100 rows"):
        slice_tiny(dense, tmp_path / "out")


def test_too_few_or_too_plain_tokens_are_warned_of(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slice_tiny(tiny, tmp_path / "few", samples=1)
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0].startswith("64 calibration tokens span at most 64 of the 96 dimensions")
    assert len(messages) == 1 or "has rank" in messages[1]
    caplog.clear()
    plain = tmp_path / "plain.txt"
    plain.write_text("abc" * 1000)
    slice_tiny(tiny, tmp_path / "plain", calibration=str(plain))
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0].startswith("at place 0 the calibration signal has rank 3 and 64 directions")


def test_the_dense_model_writes_its_own_text(tiny: Path, tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    windows = sample_windows(dense, byte_tokenizer(), (8, 64), seed=3, show_progress=False)
    assert windows.shape == (8, 64)
    assert not (windows[:, 0] == 256).any(), "a document begins with a word"
    with torch.no_grad():
        own = dense(input_ids=windows, labels=windows).loss
        noise = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0))
        foreign = dense(input_ids=noise, labels=noise).loss
    assert own < foreign - 0.2
    output = slice_tiny(tiny, tmp_path / "out", calibration="self", seed=3)
    calibration = json.loads((output / "provenance.json").read_text())["calibration"]
    assert calibration["text"] == "self"
    written = sample_windows(dense, byte_tokenizer(), (10, 64), seed=3, show_progress=False)
    expected = hashlib.sha256(written[:8].numpy().tobytes()).hexdigest()
    assert calibration["tokens_sha256"] == expected, "two more windows are held out"


def test_the_dense_model_answers_prompts(tiny: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "[{{ messages[0]['content'] }}]"
    requests = PROMPTS.read_text().splitlines()
    windows = sample_windows(dense, tokenizer, (6, 500), seed=3, show_progress=False)
    texts = [tokenizer.decode(window) for window in windows]
    starts = [any(text.startswith(f"[{request}]") for request in requests) for text in texts]
    assert starts == [False, True] * 3
    # The tiny model ends documents often: others begin in mid-window.
    later = [text for text in texts[::2] if any(f"<s>[{request}" in text for request in requests)]
    assert later


def test_text_once_written_is_kept_for_a_resumed_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = slice_tiny(tiny, tmp_path / "whole", calibration="self")
    with monkeypatch.context() as patch:
        patch.setattr(Slicer, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            slice_tiny(tiny, tmp_path / "cut", calibration="self", resume=True)
    with monkeypatch.context() as patch:
        patch.setattr("sliceserve.slicing.selftext.sample_windows", None)
        resumed = slice_tiny(tiny, tmp_path / "cut", calibration="self", resume=True)
    for file in ("model-00001-of-00001.safetensors", "spectrum.npy"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes()


def run_out_of_memory(monkeypatch: pytest.MonkeyPatch, windows: int) -> None:
    """Make a GPU too small for so many windows at once, in the second layer's second sublayer."""
    advance = Slicer._advance

    def limited(self: Slicer, layer: Any, sublayer: Any, contexts: Any, place: int) -> Any:
        if place == 4 and len(self.signals[0]) >= windows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return advance(self, layer, sublayer, contexts, place)

    monkeypatch.setattr(Slicer, "_advance", limited)


def test_a_gpu_out_of_memory_gets_smaller_batches(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load_file(slice_tiny(tiny, tmp_path / "a") / "model-00001-of-00001.safetensors")
    run_out_of_memory(monkeypatch, windows=5)
    output = slice_tiny(tiny, tmp_path / "b")
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING][
        -1
    ].endswith("ran out of memory with 8 windows of 64 tokens at once: going on with 4")
    for name, tensor in load_file(output / "model-00001-of-00001.safetensors").items():
        # An eigenvector's sign is arbitrary.
        assert_close(tensor.abs(), expected[name].abs(), rtol=0, atol=1e-3)


def test_a_gpu_too_small_for_one_window_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out_of_memory(monkeypatch, windows=1)
    with pytest.raises(
        MachineError, match="too small for one window of --sequence-length 64: CUDA"
    ):
        slice_tiny(tiny, tmp_path / "out")
    assert not list(tmp_path.iterdir())
