"""The arguments of commands that take a sliced checkpoint and nothing else."""

import argparse
from pathlib import Path
from typing import TypeAlias

from sliceserve.slicing import values
from sliceserve.slicing.parsing import GROUP_SIZES, SCHEMES, HelpFormatter, Parser

METHODS = ("lora", "full")
ROUNDINGS = ("nearest", "gptq")

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_inspect(commands: Commands) -> None:
    """Describe `sliceserve inspect`."""
    parser = commands.add_parser("inspect", help="show what a sliced checkpoint holds")
    parser.set_defaults(command="inspect")
    parser.add_argument("directory", type=Path, metavar="DIR", help="a sliced checkpoint")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")


def add_finetune(commands: Commands) -> None:
    """Describe `sliceserve finetune`."""
    parser = commands.add_parser(
        "finetune",
        help="train a sliced model to recover what slicing has cost",
        description="Trains LoRA adapters (merged afterwards) or all parameters of a sliced "
        "checkpoint and writes a sliced checkpoint of the same shapes.",
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(command="finetune")
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
    parser.add_argument("--samples", type=values.number, default=128, help="training windows")
    parser.add_argument(
        "--validation-samples",
        type=values.number,
        default=8,
        help="windows kept apart, to measure perplexity on before and after",
    )
    parser.add_argument(
        "--sequence-length", type=values.window, default=1024, help="tokens in a window"
    )
    parser.add_argument("--epochs", type=values.number, default=1, help="times through the windows")
    parser.add_argument("--batch-size", type=values.number, default=4, help="windows at once")
    parser.add_argument(
        "--learning-rate", type=values.rate, help="at its peak (3e-4 for lora, 1e-5 for full)"
    )
    parser.add_argument("--rank", type=values.number, default=32, help="of the adapters")
    parser.add_argument(
        "--alpha", type=values.number, default=10, help="their scale is alpha / rank"
    )
    parser.add_argument("--seed", type=int, default=0, help="of windows, order and adapters")
    parser.add_argument("--device", help="where to train, for instance cuda:0 (a GPU if any)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what is unfinished when the run ends early, and go on from it",
    )


def add_report(commands: Commands) -> None:
    """Describe `sliceserve report`."""
    parser = commands.add_parser(
        "report", help="write an HTML page about a sliced checkpoint, with nothing outside it"
    )
    parser.set_defaults(command="report")
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


def add_export(commands: Commands) -> None:
    """Describe `sliceserve export`."""
    parser = commands.add_parser(
        "export",
        help="write a checkpoint of --rotation shared as an ordinary one, for any engine",
        description="A model sliced with --rotation shared is a dense model of a narrow "
        "hidden_size: this writes it so that engines run it without sliceserve.",
    )
    parser.set_defaults(command="export")
    parser.add_argument("directory", type=Path, metavar="DIR", help="a sliced checkpoint")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR2", help="directory to make"
    )


def add_quantize(commands: Commands) -> None:
    """Describe `sliceserve quantize`."""
    parser = commands.add_parser(
        "quantize",
        help="store a sliced checkpoint's linears in eight or four bits",
        description="Writes the linears of the decoder layers in eight bits, with a scale a row "
        "(what they read is quantised while it runs), or in four, with a scale a group of inputs, "
        "in the format of compressed-tensors. Embedding, head and rotations stay as they are.",
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(command="quantize")
    parser.add_argument("directory", type=Path, metavar="DIR", help="a sliced checkpoint")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR2", help="directory to make"
    )
    parser.add_argument(
        "--scheme",
        choices=SCHEMES,
        required=True,
        help="fp8 for GPUs that multiply it (compute capability 8.9 and up); int8 for others, "
        "and CPUs; w4a16 for weights of four bits",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        help="of w4a16, inputs that share a scale; has to divide the inputs of every linear (128)",
    )
    parser.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        help="to nearest, or so that weights answer for each other's rounding on a calibration "
        "text (nearest for eight bits, gptq for four)",
    )
    parser.add_argument(
        "--calibration", default="mixture", metavar="NAME|FILE", help="text for gptq, as for slice"
    )
    parser.add_argument("--samples", type=values.number, default=64, help="calibration windows")
    parser.add_argument(
        "--sequence-length", type=values.window, default=2048, help="tokens in a window"
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the windows")
    parser.add_argument("--device", help="where gptq runs, for instance cuda:0 (a GPU if any)")
