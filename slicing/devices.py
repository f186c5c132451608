"""The device to compute on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sliceserve.slicing.errors import MachineError, UserError, reason


def checked_device(name: str) -> torch.device:
    """Return a torch device that exists on this machine.

    Raises:
        UserError: no such device here.

    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name!r} cannot be used here: {reason(error)}") from error
    return device


def layers_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Return the dtype that layers run in: on a GPU, or a CPU that multiplies bfloat16, the stored.

    Other CPUs are no faster in it than in float32.
    """
    if device.type == "cpu" and not (stored == torch.bfloat16 and _multiplies_bfloat16()):
        return torch.float32
    return stored


def _multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


@contextmanager
def within_memory(device: torch.device) -> Iterator[None]:
    """Turn a GPU that runs out of memory into one sentence.

    Raises:
        MachineError: the block needs more memory than the device has.

    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MachineError(f"--device {str(device)!r} is too small: {reason(error)}") from error
