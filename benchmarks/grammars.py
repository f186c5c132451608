"""How long xgrammar compiles what an answer has to look like, by its size.

    python benchmarks/grammars.py MODEL

MODEL is a directory with a tokenizer: the larger its vocabulary, the longer it takes. Each form is
compiled in a process of its own, on one thread as in vLLM's engine, and given up after --limit: a
compilation cannot be ended otherwise. `server/forms.py` has bounds by this table.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

Form = tuple[str, str]  # what of xgrammar's compiler takes it, and the text


def schema(fields: dict[str, Any]) -> Form:
    return "compile_json_schema", json.dumps(fields)


def objects(count: int, properties: int) -> Form:
    one = {
        "type": "object",
        "properties": {f"p{number:04}": {"type": "string"} for number in range(properties)},
    }
    whole = {"type": "object", "properties": {f"o{number}": one for number in range(count)}}
    return schema(one if count == 1 else whole)


def words(count: int) -> list[str]:
    return [f"{number * 7919 % 10**4:04}" for number in range(count)]


FORMS: dict[str, Form] = {
    "enum of 8,192 texts": schema({"enum": words(8192)}),
    "choice of 8,192 texts": (
        "compile_grammar",
        "root ::= " + " | ".join(f'"{word}"' for word in words(8192)),
    ),
    "128 properties": objects(1, 128),
    "455 properties": objects(1, 455),
    "1,820 properties": objects(1, 1820),
    "4 objects of 256 properties": objects(4, 256),
    "4 objects of 512 properties": objects(4, 512),
    "array of 100,000 texts": schema(
        {"type": "array", "items": {"type": "string"}, "minItems": 10**5, "maxItems": 10**6}
    ),
    "regular expression a{100000}": ("compile_regex", "a{100000}"),
}


def compile_form(model: str, name: str) -> float:
    """Compile one form in this process; return seconds."""
    import xgrammar
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    vocabulary = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer))
    compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)
    method, text = FORMS[name]
    start = time.perf_counter()
    getattr(compiler, method)(text)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--limit", type=float, default=30, help="seconds for each, its start too")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.form:
        print(compile_form(options.model, options.form), flush=True)
        return
    print("| form | characters | seconds |\n| --- | ---: | ---: |", flush=True)
    for name, (_, text) in FORMS.items():
        command = [sys.executable, __file__, options.model, "--form", name]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=options.limit
            )
            seconds = f"{float(done.stdout.split()[-1]):.2f}"
        except subprocess.TimeoutExpired:
            seconds = f"not within {options.limit:g}"
        print(f"| {name} | {len(text):,} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
