"""Questions with checkable answers for the demo model: a context of `key value` lines, and queries that repeat a key.

    rng = random.Random(1)
    context = make_context(rng, 512)
    asked = queries(context, rng, 20)
    answers = [llm(query.token_ids) for query in asked]          # text or token ids, greedy, at least 3 tokens
    print(score(asked, answers).exact)

All prompts of one context share it as their prefix, so all but the first can come from a cache, and an answer is right
only if the cached bytes are. Token ids are character codes (`encode`), as in the demo model's tokenizer. In a chat,
send `query.message` as the user's message: the chat template adds the rest of the prompt. Standard library only.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

ALPHABET = string.ascii_letters + string.digits
KEY_LENGTH = 3
VALUE_LENGTH = 3
RECORD_TOKENS = KEY_LENGTH + VALUE_LENGTH + 2
"""Tokens of one line: key, space, value, newline. A divisor of 32, so whole lines fill chunks of 32 or 64 tokens."""
CHANCE = 1 / len(ALPHABET)
"""Share of right first characters that blind guessing reaches."""


@dataclass(frozen=True)
class Record:
    """One line of a context; `start` is the index of its first token."""

    key: str
    value: str
    start: int


@dataclass(frozen=True)
class Context:
    """The shared prefix: `text`, and the `records` it consists of, in order."""

    text: str
    records: tuple[Record, ...]

    @property
    def token_ids(self) -> list[int]:
        """The text as token ids, one per character."""
        return encode(self.text)


@dataclass(frozen=True)
class Query:
    """A prompt that ends right before a value; `distance` is the count of tokens from value to prompt end."""

    prompt: str
    record: Record
    distance: int

    @property
    def token_ids(self) -> list[int]:
        """The prompt as token ids, one per character."""
        return encode(self.prompt)

    @property
    def message(self) -> str:
        """The prompt as a user's chat message: without the space that the chat template adds."""
        return self.prompt.removesuffix(" ")

    @property
    def expected(self) -> str:
        """The right answer, `VALUE_LENGTH` characters."""
        return self.record.value


@dataclass(frozen=True)
class Score:
    """Shares of right answers, 0 to 1, among `count`: `first` by the first character, `exact` by the whole value."""

    first: float
    exact: float
    count: int


def encode(text: str) -> list[int]:
    """Token ids of a text: the code of each character. Refuses what the tokenizer has no token for."""
    ids = list(text.encode("ascii"))
    strange = sorted({chr(i) for i in ids if not (32 <= i < 127 or i == 10)})
    if strange:
        raise ValueError(f"text holds {strange}; the demo model knows printable ASCII and newline")
    return ids


def decode(token_ids: Sequence[int]) -> str:
    """Text of token ids; special tokens give nothing."""
    return "".join(chr(i) for i in token_ids if 32 <= i < 127 or i == 10)


def make_context(rng: random.Random, n_tokens: int) -> Context:
    """A context of `n_tokens` tokens, rounded down to whole lines; its keys are distinct."""
    count = n_tokens // RECORD_TOKENS
    if count < 1:
        raise ValueError(f"n_tokens={n_tokens} holds no line; a line takes {RECORD_TOKENS} tokens")
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[_word(rng, KEY_LENGTH)] = None
    records = tuple(Record(k, _word(rng, VALUE_LENGTH), i * RECORD_TOKENS) for i, k in enumerate(keys))
    return Context("".join(f"{r.key} {r.value}\n" for r in records), records)


def queries(
    context: Context, rng: random.Random, k: int, min_distance: int = 300, max_distance: int = 600
) -> list[Query]:
    """`k` queries for distinct records whose values lie `min_distance` to `max_distance` tokens back.

    The prompt is the whole context, the key and a space, so the next token is the value's first character.
    """
    end = len(context.text) + KEY_LENGTH + 1
    candidates = [Query(f"{context.text}{r.key} ", r, end - r.start - KEY_LENGTH - 1) for r in context.records]
    fitting = [q for q in candidates if min_distance <= q.distance <= max_distance]
    if len(fitting) < k:
        raise ValueError(
            f"k={k} queries, but {len(fitting)} of {len(candidates)} records lie {min_distance} to {max_distance} "
            "tokens back; ask for fewer, widen the distances or make a longer context"
        )
    return rng.sample(fitting, k)


def score(asked: Sequence[Query], answers: Sequence[str | Sequence[int]]) -> Score:
    """Compare answers (text or token ids) with what was asked, in the same order; what follows a value is ignored."""
    if not asked or len(asked) != len(answers):
        raise ValueError(f"{len(answers)} answers to {len(asked)} queries")
    texts = [a if isinstance(a, str) else decode(a) for a in answers]
    pairs = [(q.expected, text) for q, text in zip(asked, texts, strict=True)]
    first = sum(text[:1] == want[0] for want, text in pairs)
    exact = sum(text.startswith(want) for want, text in pairs)
    return Score(first / len(pairs), exact / len(pairs), len(pairs))


def _word(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(ALPHABET, k=length))
