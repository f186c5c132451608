"""What the arguments of all commands have in common: errors, help, and names that several take."""

import argparse
from typing import NoReturn

from sliceserve.slicing.errors import UserError

ROTATIONS = ("dense", "low-rank", "shared")
SCHEMES = ("fp8", "int8", "w4a16")
GROUP_SIZES = (128, 64, 32)  # that vLLM's kernels take
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
