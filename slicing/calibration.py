"""Text to windows of tokens, for calibration and for perplexity; never padded."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sliceserve.slicing.corpora import Corpus, Document
from sliceserve.slicing.errors import UserError, reading

SEPARATOR = "\n\n"


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
    """Choose windows at random by `seed`.

    Documents are taken in random order and packed, one after the other, until there are enough
    tokens: a window is full, whatever the length of the documents. Of a single document, a running
    text, random windows are taken, in its order.

    Args:
        corpus: where from.
        tokenizer: the model's.
        samples: windows.
        sequence_length: tokens in a window.
        seed: of the choice.
        argument: the option the corpus was given to, for the error.

    Returns:
        Token ids [samples, sequence_length].

    Raises:
        UserError: fewer windows than samples; says how many fit.

    """
    generator = torch.Generator().manual_seed(seed)
    count = len(corpus.documents)
    order = torch.randperm(count, generator=generator).tolist() if count > 1 else range(count)
    ids: list[int] = []
    for part in _streams([corpus.documents[index] for index in order], tokenizer):
        ids += part
        if len(ids) >= samples * sequence_length:
            break
    windows = _cut(ids, sequence_length)
    fit = len(windows)
    if fit < samples:
        raise UserError(
            f"{argument} {corpus.name!r} is too short for --samples {samples} of "
            f"--sequence-length {sequence_length}: {fit} fit"
        )
    chosen = torch.randperm(fit, generator=generator)[:samples].sort().values
    return windows[chosen]


def _streams(documents: Sequence[Document], tokenizer: Any) -> Iterator[list[int]]:
    """Give the tokens of each document, with a blank line between two."""
    for index, document in enumerate(documents):
        text = document
        if not isinstance(text, str):
            with reading("the chat template, for the messages of the calibration text,"):
                text = tokenizer.apply_chat_template(text, tokenize=False)
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
