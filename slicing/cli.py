"""The command line: slice, inspect, perplexity, evaluate, finetune, report and serve."""

import argparse
import importlib.metadata
import json
import logging
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from tqdm.contrib.logging import logging_redirect_tqdm

from sliceserve.slicing.errors import UserError

EXIT_USER_ERROR = 2
BACKENDS = ("transformers", "vllm")
METHODS = ("lora", "full")
DTYPES = ("bfloat16", "float16", "float32")


class Parser(argparse.ArgumentParser):
    """Reports bad arguments the way every other user error is reported: one sentence, code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as a user error."""
        raise UserError(f"{message} (see `{self.prog} --help`)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults but for None: what that stands for is in the text."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; 2 for anything the user can mend."""
    try:
        return run(list(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        print(f"sliceserve: error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"sliceserve: error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("sliceserve: interrupted; nothing half written is left", file=sys.stderr)
    return EXIT_USER_ERROR


def run(arguments: list[str]) -> int:
    """Parse and run one command."""
    if arguments[:1] == ["serve"]:
        # vLLM's own parser reads these options, so that all of them pass through.
        from sliceserve.server.serve import main as serve

        return serve(arguments[1:])
    for number in (signal.SIGTERM, signal.SIGHUP):
        # What nohup has made the process ignore stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    options = vars(make_parser().parse_args(arguments))
    command: Callable[..., int] = options.pop("command")
    logger = logging.getLogger("sliceserve")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("sliceserve: warning: %(message)s"))
    logger.addHandler(handler)
    try:
        with logging_redirect_tqdm([logger]):
            return command(**options)
    finally:
        logger.removeHandler(handler)


def make_parser() -> argparse.ArgumentParser:
    """Describe all commands; what they do is imported only when one runs."""
    parser = Parser(
        prog="sliceserve", description=importlib.metadata.metadata("sliceserve")["Summary"]
    )
    version = importlib.metadata.version("sliceserve")
    parser.add_argument("--version", action="version", version=f"sliceserve {version}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_slice(commands)
    _add_inspect(commands)
    _add_perplexity(commands)
    _add_evaluate(commands)
    _add_finetune(commands)
    _add_report(commands)
    commands.add_parser("serve", help="serve a sliced checkpoint with an OpenAI-compatible API")
    return parser


def _add_slice(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = commands.add_parser(
        "slice",
        help="delete a fraction of a model's hidden dimension and write the smaller model",
        description="Slice a model offline: the paper's algorithm (arXiv 2401.15024), dense "
        "weights out. The output directory appears only when it is complete.",
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(command=slice_command)
    parser.add_argument("model", metavar="MODEL", help="a directory, a hub id or a .gguf file")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="directory to make"
    )
    parser.add_argument(
        "--fraction",
        type=_fraction,
        default=0.25,
        help="of the hidden dimension to delete, in [0, 1); the parameters removed are fewer",
    )
    parser.add_argument(
        "--calibration",
        default="wikitext2-excerpt",
        metavar="NAME|FILE|self",
        help="a UTF-8 text file; a .jsonl file with a document a line under text or messages; "
        "wikitext2-excerpt, which ships with the package; wikitext2, ptb, c4 or alpaca from the "
        "hub; self, for text that the dense model writes (it must fit on the device)",
    )
    parser.add_argument("--samples", type=_positive, default=64, help="calibration windows")
    parser.add_argument("--sequence-length", type=_window, default=2048, help="tokens in a window")
    parser.add_argument(
        "--round-to", type=_positive, default=8, help="keep a multiple of this many columns"
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the windows")
    parser.add_argument("--device", help="where to compute, for instance cuda:0 (a GPU if any)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights written (the model's)")
    parser.add_argument(
        "--memory-limit",
        type=_bytes,
        metavar="SIZE",
        help="of host memory, such as 24GB; calibration signals that do not fit go to a file "
        "beside the output (most of what is available)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what is unfinished when the run ends early, and go on from it",
    )


def _add_inspect(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = commands.add_parser("inspect", help="show what a sliced checkpoint holds")
    parser.set_defaults(command=inspect_command)
    parser.add_argument("directory", type=Path, metavar="DIR", help="a sliced checkpoint")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")


def _add_perplexity(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = commands.add_parser(
        "perplexity",
        help="measure a dense or sliced model on a text",
        description="One stream of tokens, consecutive windows, no overlap; the mean is over "
        "predicted tokens.",
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(command=perplexity_command)
    parser.add_argument("model", metavar="MODEL_OR_DIR", help="a dense or a sliced model")
    parser.add_argument(
        "--text",
        required=True,
        metavar="NAME|FILE",
        help="a text as for slice --calibration; of wikitext2, ptb and c4 the held-out part",
    )
    parser.add_argument("--sequence-length", type=_window, default=2048, help="tokens in a window")
    parser.add_argument("--samples", type=_positive, help="windows, from the start (all)")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="transformers", help="what runs the model"
    )
    parser.add_argument("--device", help="where to compute, for instance cuda:0 (a GPU if any)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="to compute in (float32 on a CPU, else the model's)"
    )
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")


def _add_evaluate(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = commands.add_parser(
        "evaluate",
        help="compare models on the tasks of lm-evaluation-harness",
        description="Runs lm-evaluation-harness in this process and shows the models side by "
        "side, with standard errors.",
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(command=evaluate_command)
    parser.add_argument(
        "models", nargs="+", metavar="MODEL_OR_DIR", help="dense or sliced models, a column each"
    )
    parser.add_argument(
        "--tasks",
        type=_names,
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
    parser.add_argument("--limit", type=_positive, help="examples a task, from its start (all)")
    parser.add_argument("--batch-size", type=_positive, default=16, help="sequences at once")
    parser.add_argument("--device", help="where to compute, for instance cuda:0 (a GPU if any)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="to compute in (float32 on a CPU, else the model's)"
    )
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")


def _add_finetune(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = commands.add_parser(
        "finetune",
        help="train a sliced model to recover what slicing has cost",
        description="Trains LoRA adapters (merged afterwards) or all parameters of a sliced "
        "checkpoint and writes a sliced checkpoint of the same shapes.",
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(command=finetune_command)
    parser.add_argument("directory", type=Path, metavar="DIR", help="a sliced checkpoint")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="directory to make"
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="lora",
        help="low-rank adapters, or all parameters with the APOLLO optimizer",
    )
    parser.add_argument(
        "--text",
        default="wikitext2-excerpt",
        metavar="NAME|FILE",
        help="to train on, as for slice --calibration",
    )
    parser.add_argument("--samples", type=_positive, default=128, help="training windows")
    parser.add_argument(
        "--validation-samples",
        type=_positive,
        default=8,
        help="windows kept apart, to measure perplexity on before and after",
    )
    parser.add_argument("--sequence-length", type=_window, default=1024, help="tokens in a window")
    parser.add_argument("--epochs", type=_positive, default=1, help="times through the windows")
    parser.add_argument("--batch-size", type=_positive, default=4, help="windows at once")
    parser.add_argument(
        "--learning-rate", type=_rate, help="at its peak (3e-4 for lora, 1e-5 for full)"
    )
    parser.add_argument("--rank", type=_positive, default=32, help="of the adapters")
    parser.add_argument("--alpha", type=_positive, default=10, help="their scale is alpha / rank")
    parser.add_argument("--seed", type=int, default=0, help="of windows, order and adapters")
    parser.add_argument("--device", help="where to train, for instance cuda:0 (a GPU if any)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what is unfinished when the run ends early, and go on from it",
    )


def _add_report(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = commands.add_parser(
        "report", help="write an HTML page about a sliced checkpoint, with nothing outside it"
    )
    parser.set_defaults(command=report_command)
    parser.add_argument("directory", type=Path, metavar="DIR", help="a sliced checkpoint")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the HTML file to write"
    )
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="what `perplexity --json` and `evaluate --json` have printed, dense and sliced",
    )


def slice_command(device: str | None, **options: object) -> int:
    """Run `sliceserve slice`."""
    from sliceserve.slicing.job import SliceOptions, run_slice
    from sliceserve.slicing.report import describe
    from sliceserve.slicing.source import quiet_transformers

    quiet_transformers()
    chosen = SliceOptions(device=device or _default_device(), **options)  # type: ignore[arg-type]
    try:
        run = run_slice(chosen)
    except KeyboardInterrupt:
        if chosen.resume:
            raise UserError("interrupted; the same command goes on where it stopped") from None
        raise
    print(describe(run.summary))
    print(f"{'took':<12} {run.stopwatch}")
    print(f"{'memory':<12} {run.peak_bytes / 1e9:.2f} GB at most, signals in {run.signals_home}")
    if run.peak_gpu_bytes:
        print(f"{'GPU memory':<12} {run.peak_gpu_bytes / 1e9:.2f} GB at most")
    return 0


def inspect_command(directory: Path, as_json: bool) -> int:
    """Run `sliceserve inspect`."""
    from sliceserve.slicing.checkpoint import read_checkpoint_summary
    from sliceserve.slicing.report import as_fields, describe

    summary = read_checkpoint_summary(directory)
    print(json.dumps(as_fields(summary), indent=2) if as_json else describe(summary))
    return 0


def perplexity_command(backend: str, device: str | None, as_json: bool, **options: object) -> int:
    """Run `sliceserve perplexity`."""
    from sliceserve.slicing.perplexity import measure_text
    from sliceserve.slicing.source import quiet_transformers

    if device and backend == "vllm":
        raise UserError(f"--device {device!r}: with --backend vllm, vLLM chooses the device")
    quiet_transformers()
    place = device or _default_device()
    result = measure_text(backend=backend, device=place, **options)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps(asdict(result), indent=2))
    else:
        print(
            f"perplexity {result.perplexity:.4f} over {result.predicted_tokens} tokens "
            f"({result.windows} windows of {result.sequence_length})"
        )
    return 0


def evaluate_command(
    models: list[str], device: str | None, as_json: bool, **options: object
) -> int:
    """Run `sliceserve evaluate`."""
    from sliceserve.slicing.evaluation import as_table, evaluate
    from sliceserve.slicing.source import quiet_transformers

    quiet_transformers()
    results = evaluate(models, device=device or _default_device(), **options)  # type: ignore[arg-type]
    if as_json:
        fields = {
            model: {
                task: {metric: asdict(score) for metric, score in metrics.items()}
                for task, metrics in scores.items()
            }
            for model, scores in results.items()
        }
        print(json.dumps({"evaluation": fields}, indent=2))
    else:
        print(as_table(results))
    return 0


def finetune_command(device: str | None, **options: object) -> int:
    """Run `sliceserve finetune`."""
    from sliceserve.slicing.finetune import FinetuneOptions, run_finetune
    from sliceserve.slicing.report import describe
    from sliceserve.slicing.source import quiet_transformers

    quiet_transformers()
    chosen = FinetuneOptions(device=device or _default_device(), **options)  # type: ignore[arg-type]
    try:
        run = run_finetune(chosen)
    except KeyboardInterrupt:
        if chosen.resume:
            raise UserError("interrupted; the same command goes on where it stopped") from None
        raise
    print(describe(run.summary))
    print(
        f"{'perplexity':<12} {run.before:.2f} before, {run.after:.2f} after, on "
        f"{chosen.validation_samples} windows it was not trained on"
    )
    if run.peak_gpu_bytes:
        print(f"{'GPU memory':<12} {run.peak_gpu_bytes / 1e9:.2f} GB at most")
    return 0


def report_command(directory: Path, results: list[Path], output: Path) -> int:
    """Run `sliceserve report`."""
    from sliceserve.slicing.page import write_report
    from sliceserve.slicing.source import quiet_transformers

    quiet_transformers()
    write_report(directory, results, output)
    print(f"{output} written")
    return 0


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _bytes(text: str) -> int:
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    match = re.fullmatch(r"([0-9.]+) *([a-z]*)", text.strip(), re.IGNORECASE)
    if not match or match[2].upper() not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 24GB or 512MiB")
    return int(float(match[1]) * units[match[2].upper()])


def _names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]


def _window(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text} is less than 2, and a window must predict")
    return value


def _interrupt(_signum: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


# argparse names a failed type by its function.
_fraction.__name__ = "fraction"
_positive.__name__ = "number"
_window.__name__ = "number"
_bytes.__name__ = "size"
_rate.__name__ = "rate"
_names.__name__ = "list"

if __name__ == "__main__":
    sys.exit(main())
