"""A tiktoken encoding over the project's own ranks: one token a character, and one for each role or tag."""

import re

import tiktoken

CHARACTERS = "0123456789+-*=;#?!"
SPECIAL_TOKENS = (
    "<|end|>",
    "<|user|>", "<|assistant|>",  # a problem; the text the model writes
    "<|hint|>", "<|solution|>", "<|attempt|>",  # a corrective idea; a solution held to be correct; one to reflect on
    "<error_quote>", "</error_quote>", "<explanation>", "</explanation>",
)  # fmt: skip

SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))

encoding = tiktoken.Encoding(
    name="chain_arithmetic",
    pat_str=r"(?s:.)",
    mergeable_ranks={character.encode(): rank for rank, character in enumerate(CHARACTERS)},
    special_tokens={token: len(CHARACTERS) + i for i, token in enumerate(SPECIAL_TOKENS)},
)
VOCAB_SIZE = encoding.n_vocab
END = encoding.encode_single_token("<|end|>")


def encode(text: str) -> list[int]:
    """Text with special tokens -> token ids; ValueError names a character the vocabulary lacks."""
    unknown = set(SPECIAL.sub("", text)) - set(CHARACTERS)
    if unknown:
        raise ValueError(f"{text!r} has {sorted(unknown)}, the vocabulary only {CHARACTERS!r} and the special tokens")
    return encoding.encode(text, allowed_special="all")


def decode(tokens: list[int]) -> str:
    """Token ids -> text, up to and without the first <|end|>."""
    return encoding.decode(tokens[: tokens.index(END)] if END in tokens else tokens)


def pieces(tokens: list[int]) -> list[str]:
    """The text of each token by itself; joined, they are the text."""
    return [encoding.decode([token]) for token in tokens]
