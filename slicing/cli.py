"""The command line: every command but serve, which has vLLM's own options."""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from tqdm.contrib.logging import logging_redirect_tqdm

from sliceserve.slicing.arguments import make_parser
from sliceserve.slicing.errors import MachineError, UserError, fault, is_out_of_memory, reason


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    It is 2 for what the user gave and can mend, 1 for what the machine or the network has failed
    in, and 128 and its number after a signal.
    """
    try:
        code = run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read it has had enough, as `head` has; Python would complain of what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (UserError, MachineError) as error:
        return _end(error.exit_code, error)
    except OSError as error:
        return _end(fault(error, MachineError).exit_code, error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _end(MachineError.exit_code, f"out of memory: {reason(error)}")
    except KeyboardInterrupt:
        return _interrupted(signal.SIGINT)
    return code


def run(arguments: list[str]) -> int:
    """Parse and run one command."""
    if arguments[:1] == ["serve"]:
        # vLLM's own parser reads these options, so that all of them pass through.
        from sliceserve.server.serve import main as serve

        return serve(arguments[1:])
    received: list[int] = []
    options: dict[str, Any] = {}

    def interrupt(number: int, _frame: object) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # What nohup has made the process ignore stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    logger = logging.getLogger("sliceserve")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("sliceserve: warning: %(message)s"))
    logger.addHandler(handler)
    try:
        options |= vars(make_parser().parse_args(arguments))
        command = COMMANDS[options.pop("command")]
        with logging_redirect_tqdm([logger]):
            return command(**options)
    except (KeyboardInterrupt, Exception) as error:
        # An interrupt inside a library may come out as an error of the library's own.
        if not received and not isinstance(error, KeyboardInterrupt):
            raise
        kept = options.get("resume") or options.get("restart")
        return _interrupted(received[0] if received else signal.SIGINT, bool(kept))
    finally:
        logger.removeHandler(handler)


def _end(code: int, message: object) -> int:
    """Say why a command ends, and return its exit code."""
    print(f"sliceserve: error: {message}", file=sys.stderr)
    return code


def _interrupted(number: int, kept: bool = False) -> int:
    """Say that a signal has ended a command, and return the exit code."""
    left = "the same command goes on where it stopped" if kept else "nothing half written is left"
    print(f"sliceserve: interrupted; {left}", file=sys.stderr)
    return 128 + number


def slice_command(device: str | None, **options: object) -> int:
    """Run `sliceserve slice`."""
    from sliceserve.slicing.job import SliceOptions, run_slice
    from sliceserve.slicing.report import describe
    from sliceserve.slicing.source import quiet_transformers

    quiet_transformers()
    chosen = SliceOptions(device=_place(device), **options)  # type: ignore[arg-type]
    run = run_slice(chosen)
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
    place = _place(device)
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
    from sliceserve.slicing.evaluation import Scores, as_table, evaluate
    from sliceserve.slicing.source import quiet_transformers

    quiet_transformers()

    def show(model: str, scores: Scores) -> None:
        # Models take minutes each: an interrupted run has shown what it has found.
        if len(models) > 1:
            print(as_table({model: scores}), file=sys.stderr)

    place = _place(device)
    results = evaluate(models, device=place, on_result=show, **options)  # type: ignore[arg-type]
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
    chosen = FinetuneOptions(device=_place(device), **options)  # type: ignore[arg-type]
    run = run_finetune(chosen)
    print(describe(run.summary))
    print(
        f"{'perplexity':<12} {run.before:.2f} before, {run.after:.2f} after, on "
        f"{chosen.validation_samples} windows it was not trained on"
    )
    if run.peak_gpu_bytes:
        print(f"{'GPU memory':<12} {run.peak_gpu_bytes / 1e9:.2f} GB at most")
    return 0


def benchmark_command(
    model: str,
    against: str | None,
    batch_size: list[int],
    plot: Path | None,
    as_json: bool,
    **options: object,
) -> int:
    """Run `sliceserve benchmark`."""
    from sliceserve.server.speed import SpeedOptions, compare_speed, describe_speed
    from sliceserve.slicing.source import quiet_transformers

    quiet_transformers()
    if plot is not None:
        # Before minutes are spent.
        from sliceserve.slicing.page import check_page

        check_page(plot, "--plot")
    chosen = SpeedOptions(batch_size=tuple(batch_size), **options)  # type: ignore[arg-type]
    found = compare_speed([model] if against is None else [against, model], chosen)
    speed = {name: asdict(speed) for name, speed in found.items()}
    if as_json:
        print(json.dumps({"speed": speed, "options": asdict(chosen)}, indent=2))
    else:
        print(describe_speed(found, chosen))
    if plot is not None:
        from sliceserve.slicing.page import write_speeds

        write_speeds(speed, asdict(chosen), plot)
    return 0


def report_command(directory: Path, results: list[Path], output: Path) -> int:
    """Run `sliceserve report`."""
    from sliceserve.slicing.page import write_report
    from sliceserve.slicing.source import quiet_transformers

    quiet_transformers()
    write_report(directory, results, output)
    print(f"{output} written")
    return 0


def export_command(directory: Path, output: Path) -> int:
    """Run `sliceserve export`."""
    from sliceserve.slicing.export import run_export
    from sliceserve.slicing.source import quiet_transformers

    quiet_transformers()
    exported = run_export(directory, output)
    print(
        f"{exported.directory}: {exported.architecture} with hidden_size {exported.hidden_size}, "
        f"{exported.parameters:,} parameters"
    )
    return 0


def quantize_command(device: str | None, **options: object) -> int:
    """Run `sliceserve quantize`."""
    from sliceserve.slicing.quantize import QuantizeOptions, run_quantize
    from sliceserve.slicing.report import describe
    from sliceserve.slicing.source import quiet_transformers

    quiet_transformers()
    chosen = QuantizeOptions(device=_place(device), **options)  # type: ignore[arg-type]
    print(describe(run_quantize(chosen)))
    return 0


def plan_command(as_json: bool, **options: object) -> int:
    """Run `sliceserve plan`."""
    from sliceserve.slicing.plan import PlanOptions, make_plan
    from sliceserve.slicing.plantable import as_fields, describe_plan
    from sliceserve.slicing.source import quiet_transformers

    quiet_transformers()
    plan = make_plan(PlanOptions(**options))  # type: ignore[arg-type]
    print(json.dumps(as_fields(plan), indent=2) if as_json else describe_plan(plan))
    return 0


def _place(device: str | None) -> str:
    """Return where to compute; the host's part takes as many threads as it is given CPUs."""
    import torch

    from sliceserve.slicing.threads import limit_threads

    limit_threads()
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


COMMANDS: dict[str, Callable[..., int]] = {
    "slice": slice_command,
    "inspect": inspect_command,
    "perplexity": perplexity_command,
    "evaluate": evaluate_command,
    "finetune": finetune_command,
    "benchmark": benchmark_command,
    "report": report_command,
    "export": export_command,
    "quantize": quantize_command,
    "plan": plan_command,
}

if __name__ == "__main__":
    sys.exit(main())
