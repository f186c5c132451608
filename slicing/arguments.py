"""The arguments of every command; what the commands do is in `cli`."""

import argparse
import importlib.metadata
from pathlib import Path

from sliceserve.slicing import arguments_sliced as sliced
from sliceserve.slicing import values
from sliceserve.slicing.parsing import DTYPES, ROTATIONS, SCHEMES, HelpFormatter, Parser

BASES = ("pca", "output-aware")
REFITS = ("none", "output", "full")
BACKENDS = ("transformers", "vllm")
QUANTIZATIONS = ("none", *SCHEMES)


def make_parser() -> argparse.ArgumentParser:
    """Describe all commands."""
    parser = Parser(
        prog="sliceserve", description=importlib.metadata.metadata("sliceserve")["Summary"]
    )
    version = importlib.metadata.version("sliceserve")
    parser.add_argument("--version", action="version", version=f"sliceserve {version}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_slice(commands)
    sliced.add_inspect(commands)
    _add_perplexity(commands)
    _add_evaluate(commands)
    sliced.add_finetune(commands)
    _add_benchmark(commands)
    sliced.add_report(commands)
    sliced.add_export(commands)
    sliced.add_quantize(commands)
    _add_plan(commands)
    commands.add_parser("serve", help="serve a sliced checkpoint with an OpenAI-compatible API")
    return parser


def _add_slice(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = commands.add_parser(
        "slice",
        help="delete a fraction of a model's hidden dimension and write the smaller model",
        description="Slice a model offline: SliceGPT (arXiv 2401.15024), dense weights "
        "out. The paper's own form is --rotation dense --basis pca --refit none. The output "
        "directory appears only when it is complete.",
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(command="slice")
    parser.add_argument("model", metavar="MODEL", help="a directory, a hub id or a .gguf file")
    _add_revision(parser, "of a hub id (its main branch)")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="directory to make"
    )
    parser.add_argument(
        "--target-params",
        type=values.share,
        metavar="SHARE",
        help="of the model's parameters to keep, rotations and head included, in (0, 1]; picks "
        "width, form and rank",
    )
    parser.add_argument(
        "--fraction",
        type=values.fraction,
        help="instead, of the hidden dimension to delete, in [0, 1); the parameters removed are "
        "fewer (0.25)",
    )
    parser.add_argument(
        "--rotation",
        choices=ROTATIONS,
        help="between neighbouring sublayers: whole matrices and a head of full width, as in the "
        "paper; bases aligned so that few directions turn; or one basis for all and no rotation "
        "(shared where at most an eighth of hidden_size is deleted, else low-rank)",
    )
    parser.add_argument(
        "--rank",
        type=values.rank,
        metavar="N|auto",
        help="directions that a low-rank rotation turns; with as many as are deleted it is exact; "
        "auto takes those whose cosine is below 0.98 (a 72nd of hidden_size)",
    )
    parser.add_argument(
        "--basis",
        choices=BASES,
        default="output-aware",
        help="directions to keep: those of the largest signal, as in the paper, or of signal and "
        "gradient of the loss together",
    )
    parser.add_argument(
        "--refit",
        choices=REFITS,
        default="full",
        help="weights to fit to the dense model's signals: none, as in the paper; those that write "
        "the residual stream, and the head; or those that read it too",
    )
    parser.add_argument(
        "--calibration",
        default="mixture",
        metavar="NAME|FILE|self",
        help="a UTF-8 text file; a .jsonl file with a document a line under text or messages, and "
        "their kind; mixture, of several kinds, or wikitext2-excerpt, which ship with the package; "
        "wikitext2, ptb, c4 or alpaca from the hub; self, for text that the dense model writes (it "
        "must fit on the device)",
    )
    parser.add_argument("--samples", type=values.number, default=64, help="calibration windows")
    parser.add_argument(
        "--sequence-length", type=values.window, default=2048, help="tokens in a window"
    )
    parser.add_argument(
        "--round-to",
        type=values.number,
        help="keep a multiple of this many columns (128 of a hidden_size from 2048 up, else 8)",
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the windows")
    parser.add_argument("--device", help="where to compute, for instance cuda:0 (a GPU if any)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights written (the model's)")
    parser.add_argument(
        "--compute-dtype",
        choices=DTYPES,
        help="that layers run in (the model's; on a CPU that does not multiply bfloat16, float32)",
    )
    parser.add_argument(
        "--memory-limit",
        type=values.size,
        metavar="SIZE",
        help="of host memory, such as 24GB; calibration signals that do not fit go to a file "
        "beside the output (most of what is available)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what is unfinished when the run ends early, and go on from it",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="implies --resume, but what was begun with other inputs, such as another version or a "
        "new copy of the model, is removed and begun anew",
    )


def _add_perplexity(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = commands.add_parser(
        "perplexity",
        help="measure a dense or sliced model on a text",
        description="One stream of tokens, consecutive windows, no overlap; the mean is over "
        "predicted tokens.",
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(command="perplexity")
    parser.add_argument("model", metavar="MODEL_OR_DIR", help="a dense or a sliced model")
    _add_revision(parser, "of a hub id (its main branch)")
    parser.add_argument(
        "--text",
        required=True,
        metavar="NAME|FILE",
        help="a text as for slice --calibration; of wikitext2, ptb and c4 the held-out part",
    )
    parser.add_argument(
        "--sequence-length", type=values.window, default=2048, help="tokens in a window"
    )
    parser.add_argument("--samples", type=values.number, help="windows, from the start (all)")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="transformers", help="what runs the model"
    )
    _add_measuring(parser)


def _add_evaluate(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = commands.add_parser(
        "evaluate",
        help="compare models on the tasks of lm-evaluation-harness",
        description="Runs lm-evaluation-harness in this process and shows the models side by "
        "side, with standard errors.",
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(command="evaluate")
    parser.add_argument(
        "models", nargs="+", metavar="MODEL_OR_DIR", help="dense or sliced models, a column each"
    )
    _add_revision(parser, "of the one model that is a hub id (its main branch)")
    parser.add_argument(
        "--tasks",
        type=values.names,
        default="piqa,hellaswag,winogrande,arc_easy,arc_challenge",
        metavar="NAME,NAME",
        help="by the names of the harness",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="local data: DIR/TASK/validation.jsonl or test.jsonl, in the fields of the task's "
        "data set (from the hub)",
    )
    parser.add_argument("--limit", type=values.number, help="examples a task, from its start (all)")
    parser.add_argument("--batch-size", type=values.number, default=16, help="sequences at once")
    _add_measuring(parser)


def _add_revision(parser: Parser, what: str) -> None:
    """Add which version of a model on the hub is meant."""
    parser.add_argument("--revision", metavar="COMMIT|TAG|BRANCH", help=what)


def _add_measuring(parser: Parser) -> None:
    """Add what all commands that measure a model share."""
    parser.add_argument("--device", help="where to compute, for instance cuda:0 (a GPU if any)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="to compute in (float32 on a CPU, else the model's)"
    )
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")


def _add_benchmark(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = commands.add_parser(
        "benchmark",
        help="measure how fast a sliced model is here, beside its dense parent",
        description="Runs each model through vLLM, in a process of its own: batches of equal "
        "requests that start together, of random tokens.",
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(command="benchmark")
    parser.add_argument("model", metavar="MODEL_OR_DIR", help="a dense or a sliced model")
    parser.add_argument("--against", metavar="MODEL_OR_DIR", help="another, the first column")
    _add_revision(parser, "of the one model that is a hub id (its main branch)")
    parser.add_argument(
        "--batch-size", type=values.number, nargs="+", default=[1, 8, 64], help="requests at once"
    )
    parser.add_argument("--input-len", type=values.number, default=128, help="tokens in a prompt")
    parser.add_argument(
        "--output-len", type=values.window, default=128, help="tokens generated for each"
    )
    parser.add_argument(
        "--repeats", type=values.number, default=3, help="of every batch; the fastest counts"
    )
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="to run in")
    parser.add_argument(
        "--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights"
    )
    parser.add_argument(
        "--tensor-parallel-size", type=values.number, default=1, help="GPUs that share every layer"
    )
    parser.add_argument(
        "--pipeline-parallel-size", type=values.number, default=1, help="GPUs that take turns"
    )
    parser.add_argument(
        "--gpu-memory-utilization", type=values.share, help="share of a GPU's memory (vLLM's)"
    )
    parser.add_argument(
        "--enforce-eager", action="store_true", help="without compilation and CUDA graphs"
    )
    parser.add_argument(
        "--quantization", help="what vLLM makes of the weights while it loads: fp8_per_channel, …"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="HTML page to write, with a plot")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")


def _add_plan(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = commands.add_parser(
        "plan",
        help="count the GPUs that a model needs, dense and sliced",
        description="Counts the GPUs of a given size that serve a model, dense and in every form "
        "it can be sliced to, from its config alone: no weights are read or needed. Of a sliced "
        "checkpoint, those of the checkpoint.",
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(command="plan")
    parser.add_argument(
        "model", metavar="MODEL_OR_DIR", help="a model as for slice, or a sliced checkpoint"
    )
    _add_revision(parser, "of a hub id (its main branch)")
    parser.add_argument(
        "--gpu-memory",
        type=values.memory,
        required=True,
        metavar="SIZE",
        help="of one GPU, such as 40GiB, which is what a card sold as 40 GB has",
    )
    parser.add_argument(
        "--gpu-memory-utilization",
        type=values.share,
        default=0.92,
        metavar="SHARE",
        help="of it for weights, KV cache and activations, as for serve",
    )
    parser.add_argument(
        "--fraction", type=values.fraction, nargs="+", help="as for slice, one or several (0.25)"
    )
    parser.add_argument(
        "--rotation", choices=ROTATIONS, nargs="+", help="as for slice, one or several (all)"
    )
    parser.add_argument(
        "--rank", type=values.rank_number, metavar="N", help="as for slice (a 72nd of hidden_size)"
    )
    parser.add_argument("--round-to", type=values.number, help="as for slice (the same)")
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        nargs="+",
        help="of the layers' linears (none and fp8; of a quantised checkpoint its own)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of weights, KV cache and activations (the config's)"
    )
    parser.add_argument(
        "--context", type=values.number, help="tokens of one sequence (all positions of the model)"
    )
    parser.add_argument("--concurrency", type=values.number, default=1, help="sequences at once")
    parser.add_argument(
        "--batched-tokens",
        type=values.number,
        default=2048,
        help="at most in one step, as --max-num-batched-tokens for serve",
    )
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
