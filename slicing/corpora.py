"""Where text comes from: a file, a text that ships with the package, a well-known data set."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sliceserve.slicing.errors import MachineError, UserError, reading, reason

DATA = Path(__file__).with_name("data")
MIXTURE = "mixture"
SHIPPED = {
    MIXTURE: DATA / "mixture.jsonl",
    "wikitext2-excerpt": DATA / "wikitext2-train-excerpt.txt",
}
HELD_OUT = DATA / "wikitext2-test-excerpt.txt"

Document = str | list[dict[str, Any]]  # a text, or the messages of a chat


@dataclass(frozen=True)
class Corpus:
    """Text for calibration or measuring.

    Attributes:
        name: what the user gave.
        documents: texts or chats.
        sha256: of what was read, hex.
        kinds: of text, one entry a document; all the same where the source names none.

    """

    name: str
    documents: Sequence[Document]
    sha256: str
    kinds: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Give documents of no kind the name of the corpus."""
        if not self.kinds:
            object.__setattr__(self, "kinds", [self.name] * len(self.documents))


@dataclass(frozen=True)
class HubCorpus:
    """A data set on the Hugging Face hub.

    Attributes:
        path: its id.
        column: the field that holds the text.
        splits: the part for calibration and, where there is one, the part for measuring.
        joined: whether its rows are pieces of running text, to be joined by blank lines.
        arguments: what `datasets.load_dataset` needs beside, by part.

    """

    path: str
    column: str
    splits: Mapping[str, str]
    joined: bool
    arguments: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


HUB = {
    "wikitext2": HubCorpus(
        "Salesforce/wikitext",
        "text",
        {"calibration": "train", "held out": "test"},
        joined=True,
        arguments={"name": "wikitext-2-raw-v1"},
    ),
    "ptb": HubCorpus(
        "ptb-text-only/ptb_text_only",
        "sentence",
        {"calibration": "train", "held out": "test"},
        joined=True,
        # Its main branch is a loading script, which `datasets` no longer runs.
        arguments={"name": "penn_treebank", "revision": "refs/convert/parquet"},
    ),
    "c4": HubCorpus(
        "allenai/c4",
        "text",
        {"calibration": "train", "held out": "validation"},
        joined=False,
        files={
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "held out": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    "alpaca": HubCorpus("tatsu-lab/alpaca", "text", {"calibration": "train"}, joined=False),
}


def read_corpus(name: str, argument: str, part: str = "calibration") -> Corpus:
    """Read text by name or by path.

    Args:
        name: a text that ships with the package, a data set of `HUB`, a .jsonl file with one
            document a line under "text" or "messages" (and, if it likes, the "kind" of text), or
            any other UTF-8 file.
        argument: the option it was given to, for the error.
        part: of a data set: "calibration" or "held out".

    Raises:
        UserError: no such name or file, or one that cannot be read.
        MachineError: the hub did not give a data set.

    """
    if name in HUB:
        return _read_hub(name, argument, part)
    path = SHIPPED.get(name, Path(name).expanduser())
    if not path.is_file():
        known = ", ".join([*SHIPPED, *HUB])
        raise UserError(f"{argument} {name!r} is no file and none of the texts known ({known})")
    raw = path.read_bytes()
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{argument} {name!r} is not UTF-8 text: {error}") from error
    sha256 = hashlib.sha256(raw).hexdigest()
    if path.suffix != ".jsonl":
        return Corpus(name, [content], sha256)
    documents, kinds = _parse_jsonl(content, f"{argument} {name!r}")
    return Corpus(name, documents, sha256, [kind or name for kind in kinds])


def _parse_jsonl(content: str, what: str) -> tuple[list[Document], list[str]]:
    documents: list[Document] = []
    kinds: list[str] = []
    # Not splitlines(): JSON strings may hold U+2028 and the like as they are.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        with reading(f"{what}, line {number},"):
            row = json.loads(line)
        fields = row if isinstance(row, dict) else {}
        text, messages = fields.get("text"), fields.get("messages")
        if isinstance(text, str):
            documents.append(text)
        elif isinstance(messages, list) and all(isinstance(turn, dict) for turn in messages):
            documents.append(messages)
        else:
            raise UserError(f'{what}, line {number}, has neither a "text" nor a list of "messages"')
        kinds.append(str(fields.get("kind", "")))
    return documents, kinds


def _read_hub(name: str, argument: str, part: str) -> Corpus:
    import datasets  # slow to import, and rarely needed

    corpus = HUB[name]
    if part not in corpus.splits:
        raise UserError(f"{argument} {name!r} has no {part} part: name a file")
    arguments = dict(corpus.arguments)
    if part in corpus.files:
        arguments["data_files"] = {corpus.splits[part]: corpus.files[part]}
    try:
        rows = datasets.load_dataset(corpus.path, split=corpus.splits[part], **arguments)
        texts: list[str] = list(rows[corpus.column])
    except Exception as error:
        # Everything is caught: it raises what its parsers, the network and the hub raise.
        raise MachineError(
            f"{argument} {name!r} is {corpus.path!r} on the Hugging Face hub, which did not give "
            f"it: {reason(error)}"
        ) from error
    documents = ["\n\n".join(texts)] if corpus.joined else texts
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode() + b"\0")
    return Corpus(name, documents, digest.hexdigest())
