"""The configuration of a sliced checkpoint: the numbers that cross from slicing to serving."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from sliceserve.slicing.architectures import Architecture, find_architecture
from sliceserve.slicing.errors import UserError

FORMAT_VERSION = 2
MODEL_TYPE = "sliceserve"
CAUSAL_LM = "SlicedForCausalLM"
OWN_FIELDS = (
    "slicing",
    "architectures",
    "model_type",
    "transformers_version",
    "dtype",
    "quantization_config",
)


class Slicing(BaseModel):
    """What was sliced: the `slicing` object of config.json.

    Attributes:
        format_version: the version of the checkpoint format.
        architecture: the class name of the dense model, for instance LlamaForCausalLM.
        base_model_type: its Transformers model type.
        widths: columns kept at each place of the residual stream, in order; the last is what the
            head reads.
        ranks: of the rotations between neighbouring places; 0 for none, None for a whole matrix.
        dense_parameters: parameters of the model as its user stored it (tied tables once).

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format_version: int = Field(ge=1)
    architecture: str
    base_model_type: str
    widths: list[int]
    ranks: list[int | None]
    dense_parameters: int = Field(ge=1)

    @model_validator(mode="after")
    def _widths_are_possible(self) -> Self:
        if not self.widths or min(self.widths) < 1:
            raise ValueError("widths must be positive")
        if len(self.ranks) != len(self.widths) - 1:
            raise ValueError(f"{len(self.widths)} widths need {len(self.widths) - 1} ranks")
        for rank, width, following in zip(self.ranks, self.widths, self.widths[1:], strict=False):
            if rank is not None and not (0 <= rank <= width == following):
                raise ValueError(f"a rotation from {width} to {following} cannot have rank {rank}")
        if self.base_model_type not in CONFIG_MAPPING:
            raise ValueError(f"Transformers knows no base_model_type {self.base_model_type!r}")
        return self


class SlicedConfig(PreTrainedConfig):  # type: ignore[misc]  # Transformers is untyped here
    """Config of a sliced model: every field of the dense model's config, and `slicing`.

    The dense fields stay at the top level because vLLM reads heads, head_dim, positions and
    vocabulary there. `hidden_size` stays the dense one, the largest width of the stream.
    """

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True

    def __init__(self, slicing: dict[str, Any] | None = None, **fields: Any) -> None:
        self.slicing = slicing or {}
        super().__init__(**fields)

    @property
    def description(self) -> Slicing:
        """The checked `slicing` object.

        Raises:
            UserError: the format is newer than this release, or a field is missing or impossible.

        """
        return parse_slicing(self.slicing, self.num_hidden_layers, self.hidden_size)

    def base(self) -> PreTrainedConfig:
        """Return the config of the dense model, untied: the sliced model ties its head itself."""
        fields = {k: v for k, v in self.to_dict().items() if k not in OWN_FIELDS}
        fields["tie_word_embeddings"] = False
        config = CONFIG_MAPPING[self.description.base_model_type](**fields)
        config.architectures = [self.description.architecture]
        config._attn_implementation = self._attn_implementation
        return config


def parse_slicing(fields: Any, num_hidden_layers: Any, hidden_size: Any) -> Slicing:
    """Check the `slicing` object of a config.json against the dense model's shape.

    Raises:
        UserError: the format is newer than this release, or a field is missing or impossible.

    """
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"checkpoint format {version} is newer than this release reads ({FORMAT_VERSION}): "
            "upgrade sliceserve"
        )
    if version == 1 and isinstance(fields.get("widths"), list):
        # All rotations were whole matrices.
        fields = fields | {"ranks": [None] * (len(fields["widths"]) - 1)}
    try:
        slicing = Slicing.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("slicing", *first["loc"])))
        raise UserError(f"config.json is not a sliced model's: {where}: {first['msg']}") from error
    for name, value in (("num_hidden_layers", num_hidden_layers), ("hidden_size", hidden_size)):
        if not isinstance(value, int):
            raise UserError(f"config.json: {name} is {value!r}, not a number")
    if max(slicing.widths) > hidden_size:
        raise UserError(
            f"config.json lists a width of {max(slicing.widths)}, more than its hidden_size "
            f"{hidden_size}"
        )
    places = find_architecture(slicing.architecture).places(num_hidden_layers)
    if len(slicing.widths) != places:
        raise UserError(
            f"config.json lists {len(slicing.widths)} widths where {num_hidden_layers} layers "
            f"have {places} places"
        )
    return slicing


def sliced_config(
    dense: PreTrainedConfig,
    architecture: Architecture,
    widths: list[int],
    ranks: list[int | None],
    dense_parameters: int,
    dtype: str,
    tied: bool = False,
) -> SlicedConfig:
    """Make the config of a sliced model from that of the dense one."""
    fields = dense.to_dict()
    for name in (*OWN_FIELDS, "_name_or_path"):
        fields.pop(name, None)
    fields["tie_word_embeddings"] = tied
    fields["head_dim"] = head_dim(dense)
    slicing = Slicing(
        format_version=FORMAT_VERSION,
        architecture=architecture.causal_lm,
        base_model_type=dense.model_type,
        widths=widths,
        ranks=ranks,
        dense_parameters=dense_parameters,
    )
    return SlicedConfig(
        slicing=slicing.model_dump(), architectures=[CAUSAL_LM], dtype=dtype, **fields
    )


def head_dim(dense: PreTrainedConfig) -> int:
    """Return the size of one attention head; old configs leave it to be derived."""
    explicit = getattr(dense, "head_dim", None)
    return int(explicit or dense.hidden_size // dense.num_attention_heads)


def register_config() -> None:
    """Make `AutoConfig` read sliced checkpoints."""
    AutoConfig.register(MODEL_TYPE, SlicedConfig, exist_ok=True)
