"""What a person and a program read of a plan: a table, JSON values, and what they rest on."""

from dataclasses import asdict
from typing import Any

from sliceserve.slicing.plan import Plan

HEADER = (
    "form", "weights in", "parameters", "of dense", "embedding", "layers", "rotations", "head",
    "weights", "KV cache", "activations", "pipeline", "tensor parallel",
)  # fmt: skip
GIB = 2**30


def as_fields(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain JSON values, the assumptions among them."""
    fields = asdict(plan) | {"usable_bytes": plan.usable_bytes, "assumptions": assumptions(plan)}
    for form, values in zip(plan.forms, fields["forms"], strict=True):
        values["weight_bytes"] = form.weight_bytes
    return fields


def assumptions(plan: Plan) -> list[str]:
    """Return what the counts rest on, a sentence each."""
    sentences = [
        f"{plan.usable_bytes / GIB:.2f} of {plan.gpu_bytes / GIB:.2f} GiB of each GPU are for "
        f"weights, KV cache and activations (--gpu-memory-utilization "
        f"{plan.gpu_memory_utilization}, to be given to the server too); the rest is for the "
        "driver, communication and CUDA graphs.",
        f"KV cache: {plan.load.concurrency} × {plan.load.context} tokens in {plan.dtype}, all "
        "layers at full length (what a sliding window saves is not counted).",
        f"Activations, on each GPU of a pipeline: an estimate for a step of {plan.batched_tokens} "
        "tokens, the widest layer's and two float32 copies of the logits.",
        "Pipeline, as the paper's table counts: any number of GPUs, consecutive whole layers on "
        "each, the embedding with the first layer, the head with the last.",
        "Tensor parallel: every matrix on all GPUs, whose number divides attention heads, "
        "key-value heads and the MLP's width.",
    ]
    sizes = {
        form.quantization: "one byte a weight"
        if form.group_size is None
        else f"half a byte a weight and a scale for each group of {form.group_size}, which no two "
        "GPUs share"
        for form in plan.forms
        if form.quantization != "none"
    }
    sentences += [
        f"{name}: the layers' linears take {size}; embedding, head and rotations stay in "
        f"{plan.dtype}, and the rotations are whole on every tensor-parallel GPU."
        for name, size in sizes.items()
    ]
    return sentences


def describe_plan(plan: Plan) -> str:
    """Return a plan as a table, the assumptions under it."""
    rows: list[tuple[str, ...]] = [HEADER]
    for form in plan.forms:
        sizes = (form.embedding_bytes, form.layers_bytes, form.rotations_bytes, form.head_bytes,
                 form.weight_bytes, form.cache_bytes, form.activation_bytes)  # fmt: skip
        rows.append(
            (
                form.name,
                plan.dtype if form.quantization == "none" else form.quantization,
                f"{form.parameters:,}",
                f"{form.ratio:.1%}",
                *(f"{size / GIB:.2f}" for size in sizes),
                _gpus(form.pipeline_gpus),
                _gpus(form.tensor_parallel_gpus),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = "\n".join(
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    title = f"{plan.model}: {plan.architecture} on GPUs of {plan.gpu_bytes / GIB:.2f} GiB"
    units = "Sizes in GiB; the last two columns count GPUs."
    notes = "\n".join(f"- {sentence}" for sentence in assumptions(plan))
    return f"{title}\n\n{table}\n\n{units}\n{notes}"


def _gpus(count: int | None) -> str:
    return "none fits" if count is None else str(count)
