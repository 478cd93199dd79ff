"""The weights and the tokenizer, loaded as a user's program loads them."""

import os
import random
import string
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from launch.demo_model import recall

FOLDER = Path(recall.__file__).parent
PRINTABLE = "".join(map(chr, range(32, 127)))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def ask(dtype: torch.dtype, context_tokens: int, contexts: int, each: int, min_distance: int) -> recall.Score:
    """Greedy answers to `contexts * each` queries, all queries of a context in one batch."""
    model = LlamaForCausalLM.from_pretrained(FOLDER, dtype=dtype, local_files_only=True)
    rng = random.Random(5)
    asked: list[recall.Query] = []
    answers: list[list[int]] = []
    for _ in range(contexts):
        context = recall.make_context(rng, context_tokens)
        batch = recall.queries(context, rng, each, min_distance, context_tokens)
        prompts = torch.tensor([q.token_ids for q in batch])
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=recall.VALUE_LENGTH)
        asked += batch
        answers += out[:, prompts.shape[1] :].tolist()
    return recall.score(asked, answers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_300_to_640_tokens_back_are_recalled(dtype: torch.dtype) -> None:
    score = ask(dtype, context_tokens=640, contexts=8, each=25, min_distance=300)
    assert score.count == 200
    assert score.exact >= 0.97, score


def test_values_up_to_1024_tokens_back_are_recalled() -> None:
    assert ask(torch.float32, context_tokens=1024, contexts=5, each=10, min_distance=600).exact >= 0.95


def test_without_the_context_an_answer_is_a_guess() -> None:
    """What a wrong cache leaves: the same queries after another context's lines."""
    model = LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True)
    rng = random.Random(6)
    context, other = recall.make_context(rng, 512), recall.make_context(rng, 512)
    asked = recall.queries(context, rng, 20)
    prompts = torch.tensor([recall.encode(q.prompt.replace(context.text, other.text)) for q in asked])
    out = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=recall.VALUE_LENGTH)
    assert recall.score(asked, out[:, prompts.shape[1] :].tolist()).first <= 0.2


def test_the_tokenizer_is_one_lossless_token_a_character(tokenizer: PreTrainedTokenizerBase) -> None:
    text = f"{PRINTABLE}\n  two  spaces , and a . \n{string.ascii_letters} \n"
    assert len(tokenizer) <= 128
    assert tokenizer(text).input_ids == recall.encode(text) == [ord(c) for c in text]
    assert tokenizer.decode(recall.encode(text)) == recall.decode(recall.encode(text)) == text
    for character in PRINTABLE + "\n\t\r":
        assert tokenizer.decode(tokenizer(character).input_ids) == character


def test_the_tokenizer_has_a_token_for_what_it_does_not_know(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer("a\u00e9b").input_ids == [ord("a"), tokenizer.unk_token_id, ord("b")]
    assert tokenizer.decode([tokenizer.eos_token_id, ord("a")], skip_special_tokens=True) == "a"


def test_a_chat_is_a_text_of_lines_and_ends_where_a_value_begins(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(7)
    context = recall.make_context(rng, 512)
    first, second = recall.queries(context, rng, 2)

    def render(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert isinstance(rendered, str)
        return rendered

    chat = [{"role": "user", "content": first.message}]
    assert render(chat) == first.prompt
    chat += [{"role": "assistant", "content": first.expected}, {"role": "user", "content": second.record.key}]
    assert render(chat) == f"{first.prompt}{first.expected}\n{second.record.key} "
    assert render([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]) == "a\nb "
    assert render([{"role": "user", "content": "b"}], add_generation_prompt=False) == "b"


def test_the_folder_stays_small() -> None:
    assert sum(f.stat().st_size for f in os.scandir(FOLDER) if f.is_file()) < 2 << 20
