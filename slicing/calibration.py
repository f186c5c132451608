"""Text to windows of tokens, for calibration and for perplexity; never padded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sliceserve.slicing.corpora import Corpus, Document
from sliceserve.slicing.errors import UserError, reading

SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Calibration:
    """Token windows of a corpus.

    Attributes:
        windows: to calibrate on, [samples, sequence_length].
        held_out: by kind, windows of the same text to measure on, [up to some, sequence_length].

    """

    windows: Tensor
    held_out: dict[str, Tensor]


def token_windows(corpus: Corpus, tokenizer: Any, sequence_length: int) -> Tensor:
    """Cut all of a corpus, as one stream of tokens without BOS, into windows; no overlap.

    Returns:
        Token ids [windows, sequence_length]; the rest of the stream, if shorter, is left out.

    """
    ids = [token for part in _streams(corpus.documents, tokenizer) for token in part]
    return _cut(ids, sequence_length)


def pick_windows(
    corpus: Corpus,
    tokenizer: Any,
    samples: int,
    sequence_length: int,
    seed: int,
    argument: str,
) -> Tensor:
    """Choose windows as `pick_calibration` does, and none to measure on."""
    return pick_calibration(corpus, tokenizer, samples, sequence_length, seed, argument, 0).windows


def pick_calibration(
    corpus: Corpus,
    tokenizer: Any,
    samples: int,
    sequence_length: int,
    seed: int,
    argument: str,
    held_out: int,
) -> Calibration:
    """Choose windows at random by `seed`, of each kind of text the same number or one more.

    Documents of a kind are taken in random order and packed, one after the other, until there are
    enough tokens: a window is full, whatever the length of the documents. Of a single document, a
    running text, random windows are taken, in its order.

    Args:
        corpus: where from.
        tokenizer: the model's.
        samples: windows.
        sequence_length: tokens in a window.
        seed: of the choice.
        argument: the option the corpus was given to, for the error.
        held_out: windows of each kind to leave over for measuring, if there is so much text.

    Raises:
        UserError: fewer windows than samples; says how many fit.

    """
    generator = torch.Generator().manual_seed(seed)
    kinds = list(dict.fromkeys(corpus.kinds))
    chosen, left = [], {}
    for position, kind in enumerate(kinds):
        share = samples // len(kinds) + (position < samples % len(kinds))
        documents = [
            text for text, own in zip(corpus.documents, corpus.kinds, strict=True) if own == kind
        ]
        count = len(documents)
        order = torch.randperm(count, generator=generator).tolist() if count > 1 else range(count)
        ids: list[int] = []
        for part in _streams([documents[index] for index in order], tokenizer):
            ids += part
            if len(ids) >= (share + held_out) * sequence_length:
                break
        windows = _cut(ids, sequence_length)
        fit = len(windows)
        if fit < share:
            what = f"{argument} {corpus.name!r}" + (f", its {kind}," if len(kinds) > 1 else "")
            raise UserError(
                f"{what} is too short for --samples {samples} of --sequence-length "
                f"{sequence_length}: {fit * len(kinds)} fit"
            )
        # Of several documents, packed in random order already, the first windows will do.
        picks = torch.randperm(fit, generator=generator) if count == 1 else torch.arange(fit)
        chosen.append(windows[picks[:share].sort().values])
        spare = picks[share : share + held_out]
        if len(spare):
            left[kind] = windows[spare]
    return Calibration(torch.cat(chosen), left)


def _streams(documents: Sequence[Document], tokenizer: Any) -> Iterator[list[int]]:
    """Give the tokens of each document, with a blank line between two."""
    for index, document in enumerate(documents):
        text = document
        if not isinstance(text, str) and getattr(tokenizer, "chat_template", None):
            with reading("the chat template, for the messages of the calibration text,"):
                text = tokenizer.apply_chat_template(text, tokenize=False)
        elif not isinstance(text, str):
            # A base model knows no template: its turns are paragraphs.
            text = SEPARATOR.join(str(turn.get("content", "")) for turn in text)
        text = (SEPARATOR if index else "") + text
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        yield ids


def _cut(ids: list[int], sequence_length: int) -> Tensor:
    count = len(ids) // sequence_length
    return torch.tensor(ids[: count * sequence_length]).reshape(count, sequence_length)


def check_vocabulary(windows: Tensor, vocab_size: int) -> None:
    """Check that a model has every token that its tokenizer has given.

    Raises:
        UserError: it does not.

    """
    largest = int(windows.max())
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer does not fit the model: it gives token {largest}, and the embedding "
            f"has {vocab_size} rows"
        )
