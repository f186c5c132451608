"""How many of a sliced model's drafts its dense parent accepts, and the speed, in vLLM.

    python benchmarks/speculate.py MODEL DRAFT [--drafted 1 3 5]

MODEL decodes greedily, one request at a time, without drafts and with each number of drafted
tokens; every engine runs in a process of its own. Prompts are pieces of a text that lie evenly in
it, the WikiText-2 test excerpt unless `--text` names another. From vLLM's own counters: the share
of drafted tokens that MODEL accepts, the share accepted at each position, and the mean length of
what a step of MODEL gives (the accepted tokens and one of its own). The last column counts answers
that are those without drafts; others part at a tie, as products of several rows round otherwise.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from sliceserve.slicing.corpora import HELD_OUT

COUNTERS = {
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:spec_decode_num_draft_tokens": "drafted",
    "vllm:spec_decode_num_accepted_tokens": "accepted",
}
BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
CAPTURED = [1, 2, 4, 8, 16]


def measure(options: argparse.Namespace, drafted: int) -> dict[str, Any]:
    """Generate with so many drafted tokens (0: none); return tokens, seconds and counts."""
    from vllm import LLM, SamplingParams

    speculative = {
        "method": "draft_model",
        "model": str(options.draft),
        "num_speculative_tokens": drafted,
    }
    llm = LLM(
        model=str(options.model),
        dtype=options.dtype,
        enforce_eager=options.enforce_eager,
        max_model_len=options.input + options.output + drafted,
        max_num_seqs=1,
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config=speculative if drafted else None,
        # Left to itself vLLM captures graphs for two tokens, for a request at a time, and a step of
        # the draft has three: it would run without.
        compilation_config={"cudagraph_capture_sizes": CAPTURED},
    )
    sampling = SamplingParams(temperature=0, max_tokens=options.output, ignore_eos=True)
    prompts = make_prompts(options)
    llm.generate(prompts[:1], sampling, use_tqdm=False)
    before, start = read_counters(llm), time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds, after = time.perf_counter() - start, read_counters(llm)
    counts = {
        name: [new - old for new, old in zip(after[name], before[name], strict=True)]
        for name in after
    }
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return {"tokens": tokens, "seconds": seconds, "counts": counts}


def make_prompts(options: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Cut pieces of `--input` tokens out of the text."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text(), add_special_tokens=False)["input_ids"]
    step = len(ids) // options.prompts
    if step < options.input:
        raise SystemExit(f"--text: {len(ids)} tokens are too few")
    starts = range(0, step * options.prompts, step)
    return [{"prompt_token_ids": ids[start : start + options.input]} for start in starts]


def read_counters(llm: Any) -> dict[str, list[int]]:
    found = {}
    for metric in llm.get_metrics():
        if metric.name in COUNTERS:
            found[COUNTERS[metric.name]] = [metric.value]
        elif metric.name == BY_POSITION:
            found["by position"] = list(metric.values)
    return found


def describe(drafted: int, result: dict[str, Any], baseline: dict[str, Any]) -> str:
    """Return a row of the table."""
    rate = sum(map(len, result["tokens"])) / result["seconds"]
    if not drafted:
        return f"| none | | | 1.00 | {rate:.1f} | | |"
    counts = result["counts"]
    drafts, proposed, accepted = (counts[name][0] for name in COUNTERS.values())
    positions = " ".join(f"{count / drafts:.2f}" for count in counts["by position"])
    same = sum(
        ours == theirs for ours, theirs in zip(result["tokens"], baseline["tokens"], strict=True)
    )
    speed = baseline["seconds"] / result["seconds"]
    return (
        f"| {drafted} | {accepted / proposed:.1%} | {positions} | {1 + accepted / drafts:.2f} "
        f"| {rate:.1f} | × {speed:.2f} | {same} of {len(result['tokens'])} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, metavar="MODEL", help="the dense model")
    parser.add_argument("draft", type=Path, metavar="DRAFT", help="a smaller one, such as sliced")
    parser.add_argument("--drafted", type=int, nargs="+", default=[1, 3, 5], help="tokens a step")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--input", type=int, default=64, help="tokens in a prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens generated for each")
    parser.add_argument("--text", type=Path, default=HELD_OUT, help="UTF-8, to cut prompts from")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        print("RESULT " + json.dumps(measure(options, options.only)))
        return 0
    print("| drafted | accepted | by position | mean length | tokens/s | | same answers |")
    print("| ---: | ---: | --- | ---: | ---: | ---: | ---: |", flush=True)
    baseline = None
    for drafted in (0, *options.drafted):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", str(drafted)]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if run.returncode:
            return run.returncode
        (line,) = (line for line in run.stdout.splitlines() if line.startswith("RESULT "))
        result = json.loads(line.removeprefix("RESULT "))
        baseline = baseline or result
        print(describe(drafted, result, baseline), flush=True)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    sys.exit(main())
