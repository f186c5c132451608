"""What a person reads about a sliced checkpoint."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from sliceserve.slicing.checkpoint import CheckpointSummary
from sliceserve.slicing.heldout import describe_held_out


def as_fields(summary: CheckpointSummary) -> dict[str, Any]:
    """Return a summary as plain JSON values."""
    return {
        "directory": str(summary.directory),
        "slicing": summary.slicing.model_dump(),
        "dense_parameters": summary.dense_parameters,
        "sliced_parameters": summary.sliced_parameters,
        "rotation_parameters": summary.rotation_parameters,
        "ratio": summary.ratio,
        "bytes": summary.bytes,
        "dtype": summary.dtype,
        "quantization": summary.scheme and summary.scheme.name,
        "group_size": summary.scheme and summary.scheme.group_size,
        "provenance": summary.provenance,
    }


def describe(summary: CheckpointSummary) -> str:
    """Return a summary in a few lines."""
    slicing = summary.slicing
    widths = ", ".join(
        f"{width} at {count} {'place' if count == 1 else 'places'}"
        for width, count in Counter(slicing.widths).items()
    )
    rotations = summary.rotation_parameters / summary.sliced_parameters
    lines = {
        "checkpoint": f"{summary.directory} (format {slicing.format_version}, {summary.stored_as})",
        "base": slicing.architecture,
        "width": f"{widths} of the residual stream",
        "rotations": describe_ranks(slicing.ranks),
        "parameters": f"{summary.sliced_parameters:,}, {summary.ratio:.1%} of the dense "
        f"{summary.dense_parameters:,} (rotations and head map {rotations:.1%} of the sliced)",
        "on disk": f"{summary.bytes / 1e6:,.1f} MB",
    }
    if source := summary.provenance.get("source"):
        commit = f"commit {source['commit']}, " if source.get("commit") else ""
        lines["source"] = f"{source['model']} ({commit}sha256 {source['sha256'][:16]}…)"
    if options := summary.provenance.get("options"):
        lines["calibration"] = (
            f"{options['calibration']}, {options['samples']} × {options['sequence_length']} "
            f"tokens, seed {options['seed']}"
        )
    refit = summary.provenance.get("refit", {})
    if refit.get("regressions"):
        lines["refit"] = (
            f"{refit['regressions']} regressions, {refit['rejected']} of them no better than none"
        )
    if quantised := summary.provenance.get("quantization"):
        lines["quantised"] = describe_rounding(quantised)
    if summary.ratio >= 1:
        lines["note"] = "not smaller than the dense model: rotations and an untied head outweigh it"
    text = "\n".join(f"{name:<12} {text}" for name, text in lines.items())
    if held_out := summary.provenance.get("held_out"):
        before = ", before it was quantised" if summary.scheme else ""
        text += f"\n\nperplexity on text held out{before}\n{describe_held_out(held_out)}\n"
    return text


def describe_rounding(record: Mapping[str, Any]) -> str:
    """Say how weights were rounded, and on what text."""
    if record["rounding"] == "nearest":
        return "rounded to nearest"
    return (
        f"by {record['rounding']} on {record['calibration']}, {record['samples']} × "
        f"{record['sequence_length']} tokens, seed {record['seed']}"
    )


def describe_ranks(ranks: list[int | None]) -> str:
    """Say of what rank the rotations are."""
    if not any(rank is None or rank for rank in ranks):
        return "none"
    low = [rank for rank in ranks if rank is not None]
    parts = [f"{len(ranks) - len(low)} whole matrices"] if len(low) < len(ranks) else []
    if low:
        spread = f"{min(low)} to {max(low)}, {sum(low) / len(low):.1f} on average"
        parts.append(f"{len(low)} of rank {low[0] if len(set(low)) == 1 else spread}")
    return ", ".join(parts)
