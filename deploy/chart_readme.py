"""Print the chart's README: its text, and a table of its values from their `# --` comments.

python deploy/chart_readme.py helm/sliceserve > helm/sliceserve/README.md
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


def documented(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the path and the description of every value that a `# --` comment stands before."""
    path: list[tuple[int, str]] = []
    description = ""
    for line in text.splitlines():
        if match := re.match(r" *# -- (.*)", line):
            description = match[1]
        elif match := re.match(r"( *)([A-Za-z]+):", line):
            indent = len(match[1])
            path = [(depth, name) for depth, name in path if depth < indent]
            path.append((indent, match[2]))
            if description:
                yield tuple(name for _, name in path), description
            description = ""


def rows(chart: Path) -> Iterator[tuple[str, str, str]]:
    """Yield name, default as JSON and description of every documented value."""
    text = (chart / "values.yaml").read_text("utf-8")
    values = yaml.safe_load(text)
    for path, description in documented(text):
        value: Any = values
        for name in path:
            value = value[name]
        yield ".".join(path), json.dumps(value), description


def page(chart: Path) -> str:
    """Return the README."""
    table = [f"| `{name}` | `{default}` | {text} |" for name, default, text in rows(chart)]
    body = (chart / "README.md.in").read_text("utf-8")
    return body + "\n".join(["| value | default | |", "| --- | --- | --- |", *table]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page(Path(sys.argv[1])))
