"""Write the demo model's tokenizer beside this file: one token per character, its id the character's code.

    python launch/demo_model/make_tokenizer.py

Printable ASCII, tab, newline and carriage return are tokens; the other 30 of the 128 ids are special or reserved ones.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE

HERE = Path(__file__).resolve().parent
VOCABULARY = 128
SPECIAL = {0: "<|pad|>", 1: "<|bos|>", 2: "<|eos|>", 3: "<|unk|>"}
CHARACTERS = {*range(32, 127), *map(ord, "\t\n\r")}
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}{{ ' ' }}"
    "{%- elif not loop.first and loop.previtem.role != 'assistant' -%}{{ '\\n' }}"
    "{%- endif -%}"
    "{{ message.content or '' }}"
    "{%- if message.role == 'assistant' -%}{{ '\\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' ' }}{%- endif -%}"
)
"""A chat is a text of `key value` lines: a user's message ends in a key, the answer is its value and ends the line."""


def token(i: int) -> str:
    """The text of token `i`."""
    return chr(i) if i in CHARACTERS else SPECIAL.get(i, f"<|reserved_{i}|>")


def main() -> None:
    tokenizer = Tokenizer(BPE(vocab={token(i): i for i in range(VOCABULARY)}, merges=[], unk_token=SPECIAL[3]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token(i), special=True) for i in range(VOCABULARY) if i not in CHARACTERS])
    tokenizer.save(str(HERE / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL[0],
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "unk_token": SPECIAL[3],
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (HERE / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    # A newline ends an answer, as it ends a line; ask with ignore_eos to let the model recite the lines that follow.
    generation = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": [2, ord("\n")], "do_sample": False}
    (HERE / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


if __name__ == "__main__":
    main()
