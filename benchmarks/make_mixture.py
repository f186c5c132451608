"""Build the calibration mixture that ships with the package, from texts that may be shipped.

    python benchmarks/make_mixture.py --wikitext TRAIN.txt --novel DIR --speeches DIR \\
        --scripts DIR --chats FILE.jsonl --pages FILE.jsonl --output slicing/data/mixture.jsonl

slicing/data/LICENSE.md names the sources. The chats and pages were written by SmolLM2-135M-Instruct
at temperature 1: the chats are its answers to slicing/data/prompts.txt under its chat template, the
pages go on from one random token.
"""

import argparse
import json
import pydoc_data.topics
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHARACTERS = 230_000  # of each kind: 25 windows of 2048 tokens or so
PIECE = 6_000  # characters of a document at most: a window holds several
SPEECHES = range(1961, 2022)
MODULES = [
    "argparse", "asyncio/base_events", "ast", "calendar", "collections/__init__", "configparser",
    "csv", "datetime", "decimal", "email/message", "fractions", "http/client", "inspect",
    "json/decoder", "logging/handlers", "pathlib", "random", "shutil", "socketserver",
    "statistics", "subprocess", "tarfile", "textwrap", "threading", "typing", "unittest/case",
    "urllib/request", "zipfile",
]  # fmt: skip


def pieces(text: str, ends: str = r"(?<=\n\n)") -> Iterator[str]:
    """Cut a text at its blank lines, or where else parts end, into about `PIECE` characters."""
    piece = ""
    for part in re.split(ends, text):
        if piece and len(piece) + len(part) > PIECE:
            yield piece.strip()
            piece = ""
        piece += part
    if piece.strip():
        yield piece.strip()


def articles(path: Path) -> list[str]:
    """Split WikiText at the titles of its articles."""
    parts = re.split(r"(?m)^(?= = [^=].* = $)", path.read_text(encoding="utf-8"))
    return [piece for part in parts if part.strip() for piece in pieces(part.replace("\n", "\n\n"))]


def texts(paths: list[Path], *ends: str) -> list[str]:
    """Return the pieces of some files."""
    return [piece for path in paths for piece in pieces(path.read_text(encoding="utf-8"), *ends)]


def lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def sample(kind: str, rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Choose documents of a kind at random, `CHARACTERS` in all."""
    rows = sorted(rows, key=json.dumps)
    random.Random(seed).shuffle(rows)  # noqa: S311 - nothing is secret here
    chosen, total = [], 0
    for row in rows:
        if total >= CHARACTERS:
            break
        chosen.append({"kind": kind} | row)
        total += len(json.dumps(row, ensure_ascii=False))
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--wikitext", type=Path, required=True, help="raw train split")
    parser.add_argument("--novel", type=Path, required=True, help="directory of chapter_*.txt")
    parser.add_argument("--speeches", type=Path, required=True, help="directory of YEAR_*.txt")
    parser.add_argument("--scripts", type=Path, required=True, help="directory of .js files")
    parser.add_argument("--chats", type=Path, required=True, help="JSONL with messages")
    parser.add_argument("--pages", type=Path, required=True, help="JSONL with text")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    library = Path(sysconfig.get_path("stdlib"))
    speeches = [p for p in options.speeches.glob("*.txt") if int(p.name[:4]) in SPEECHES]
    code = texts([library / f"{name}.py" for name in MODULES])
    code += texts(sorted(options.scripts.rglob("*.js")))
    kinds = {
        "encyclopedia": [{"text": text} for text in articles(options.wikitext)],
        "chat": [{"messages": row["messages"]} for row in lines(options.chats)],
        "web": [{"text": row["text"]} for row in lines(options.pages)],
        "fiction": [{"text": text} for text in texts(sorted(options.novel.glob("chapter_*.txt")))],
        "speech": [{"text": text} for text in texts(sorted(speeches), r"(?<=[.!?] )")],
        "code": [{"text": text} for text in code],
        "manual": [
            {"text": piece}
            for topic in pydoc_data.topics.topics.values()
            for piece in pieces(topic)
        ],
    }
    chosen = [
        row for seed, (kind, rows) in enumerate(kinds.items()) for row in sample(kind, rows, seed)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
    options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
