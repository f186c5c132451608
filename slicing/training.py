"""The training loop of recovery fine-tuning: peft's LoRA and Transformers' Trainer."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from apollo_torch.random_projector import GradientProjector
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from sliceserve.slicing.architectures import find_architecture
from sliceserve.slicing.errors import UserError
from sliceserve.slicing.finetune import (
    APOLLO,
    CHECKPOINTS,
    LORA_DROPOUT,
    FinetuneOptions,
    adapted_linears,
    learning_rate,
)

if TYPE_CHECKING:
    from sliceserve.slicing.modeling import SlicedForCausalLM


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows of tokens [count, sequence_length] as the Trainer takes them: nothing is masked."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Shows one bar, where the Trainer prints a line a log, and ends a run that diverges."""

    def __init__(self, show_progress: bool) -> None:
        self.bar = tqdm(desc="training", unit="step", disable=not show_progress)

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        self.bar.reset(total=state.max_steps)
        self.bar.update(state.global_step)

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, _args: Any, _state: Any, _control: Any, logs: dict[str, Any], **_kwargs: Any
    ) -> None:
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")
            if not math.isfinite(logs["loss"]):
                raise UserError("the loss is not finite: lower --learning-rate")

    def on_train_end(self, _args: Any, _state: Any, _control: Any, **_kwargs: Any) -> None:
        self.bar.close()


def train(
    model: "SlicedForCausalLM",
    windows: Tensor,
    options: FinetuneOptions,
    directory: Path,
    show_progress: bool = True,
) -> tuple[Any, list[dict[str, float]], int]:
    """Train a sliced model, from the last checkpoint in `directory` if there is one.

    Args:
        model: the sliced model, on its device.
        windows: token ids [samples, sequence_length].
        options: of the run.
        directory: for the Trainer's checkpoints.
        show_progress: whether to show its bar.

    Returns:
        The trained model with adapters merged, the loss (nats) by step, and the bytes allocated on
        the GPU at most.

    Raises:
        UserError: the loss is no longer finite.

    """
    device = model.device
    set_seed(options.seed)
    trained: Any = model
    if options.method == "lora":
        architecture = find_architecture(model.config.description.architecture)
        adapters = LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=LORA_DROPOUT,
            target_modules=adapted_linears(architecture),
            task_type="CAUSAL_LM",
        )
        trained = get_peft_model(model, adapters)
    else:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    steps = options.epochs * -(-len(windows) // options.batch_size)
    full = options.method == "full"
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=options.batch_size,
        num_train_epochs=options.epochs,
        learning_rate=learning_rate(options),
        lr_scheduler_type="linear",
        warmup_steps=steps // 20,
        optim="apollo_adamw" if full else "adamw_torch",
        optim_target_modules="all-linear" if full else None,
        optim_args=APOLLO if full else None,
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        logging_steps=max(1, steps // 100),
        save_steps=max(1, steps // CHECKPOINTS),
        save_total_limit=1,
        logging_nan_inf_filter=False,
        seed=options.seed,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
    )
    if device.type == "cuda":
        # The Trainer would spread the model over all GPUs it sees.
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
        assert arguments.device  # noqa: S101 - counts the GPUs once, before the line below
        arguments._n_gpu = 1
    trainer = Trainer(
        model=trained,
        args=arguments,
        train_dataset=Windows(windows),
        callbacks=[_Watch(show_progress)],
    )
    trainer.remove_callback(PrinterCallback)
    # APOLLO keeps its projections as objects among its state, which torch.load refuses.
    with torch.serialization.safe_globals([GradientProjector]):
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(directory)))
    history = [
        {"step": entry["step"], "loss": entry["loss"], "learning_rate": entry["learning_rate"]}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    if options.method == "lora":
        # Merged in float32: an update is finer than the rounding of bfloat16 weights.
        trained = trained.to(torch.float32).merge_and_unload()
    return trained, history, peak
