"""Weights in the formats of compressed-tensors, and what a config says of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sliceserve.slicing.architectures import find_architecture
from sliceserve.slicing.config import SlicedConfig
from sliceserve.slicing.errors import UserError, reason
from sliceserve.slicing.modeling import HEAD_MAP, ROTATION
from sliceserve.slicing.quantised import Scheme


class Packer:
    """Chooses the scales of weights and stores them, as a scheme says."""

    def __init__(self, scheme: Scheme) -> None:
        """Look the scheme up.

        Raises:
            UserError: compressed-tensors is missing, or another version than is known.

        """
        self.scheme = scheme
        with _compressed_tensors():
            from compressed_tensors.compressors import BaseCompressor
            from compressed_tensors.quantization import preset_name_to_scheme
            from compressed_tensors.quantization.utils import calculate_qparams

            self._preset = preset_name_to_scheme(scheme.preset, ["Linear"])
            if scheme.group_size is not None:
                self._preset.weights.group_size = scheme.group_size
            self._compressor = BaseCompressor.get_value_from_registry(scheme.format)
            self._calculate = calculate_qparams

    def fields(self, config: SlicedConfig) -> dict[str, Any]:
        """Return the `quantization_config` of config.json."""
        with _compressed_tensors():
            from compressed_tensors.quantization import QuantizationConfig

            architecture = find_architecture(config.description.architecture)
            fields = QuantizationConfig(
                config_groups={"group_0": self._preset},
                format=self.scheme.format,
                quantization_status="compressed",
                ignore=[architecture.head, HEAD_MAP, f"re:.*{ROTATION}.*"],
            ).model_dump(mode="json")
        return dict(fields)

    def scales(self, weight: Tensor) -> Tensor:
        """Return the scales that a weight's largest values ask for: [outputs, groups]."""
        wide = weight.float()
        groups = wide.reshape(len(wide), -1, self.scheme.group_size or wide.shape[1])
        scales: Tensor = self._calculate(groups.amin(2), groups.amax(2), self._preset.weights)[0]
        # Engines hold those of groups in the dtype of the model: what they multiply by is chosen.
        return scales if self.scheme.group_size is None else scales.to(weight.dtype)

    def pack(self, weight: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """Round a weight to nearest and return tensors, named as in `Scheme.tensors`."""
        state = {"weight": weight.float(), "weight_scale": scales}
        packed: dict[str, Tensor] = self._compressor.compress(state, self._preset)
        return packed


@contextmanager
def _compressed_tensors() -> Iterator[None]:
    """Say in one sentence that the library is missing, or another version than is known.

    Raises:
        UserError: the block could not find something in it.

    """
    try:
        yield
    except (ImportError, AttributeError, KeyError) as error:
        raise UserError(
            f"quantize needs compressed-tensors 0.17, which comes with vLLM: {reason(error)}"
        ) from error
