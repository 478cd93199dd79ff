"""Train the demo model: a small Llama whose answers depend on a far prefix, and whose answers can be checked.

    OMP_NUM_THREADS=1 python launch/demo_model/train.py     # minutes on one CPU core; writes the model beside this file
    python launch/demo_model/train.py --eval                # trains nothing: prints the recall of the weights there

The model learns one thing, to copy: given `key value` lines and then a key, it continues with that key's value. Three
things make that quick. The data is dense: nearly every token of a sequence's second half can be predicted. The segments
grow as it learns. And it starts near the circuit that copying needs (`wire`), which from a plain random start takes
longer to form than all of the training does now.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import NamedTuple

import recall
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
VOCAB, HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 128, 128, 128, 2, 4, 2, 64
EPS, THETA, MAX_TOKENS = 1e-5, 1_000_000.0, 4096
CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": EPS,
    "rope_theta": THETA,
    "max_position_embeddings": MAX_TOKENS,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


class Stage(NamedTuple):
    """A step of the curriculum: `steps` batches of `batch` sequences; their first half has `low` to `high` tokens.

    `repeats` is the share of batches that are plain repeats; the others are records.
    """

    steps: int
    batch: int
    low: int
    high: int
    repeats: float


CURRICULUM = (
    Stage(150, 32, 16, 32, repeats=1.0),
    Stage(150, 24, 32, 96, repeats=0.25),
    Stage(150, 12, 96, 320, repeats=0.1),
    Stage(150, 8, 256, 640, repeats=0.1),
    Stage(150, 4, 512, 1024, repeats=0.1),
)
PEAK_RATE, WARMUP_STEPS = 3e-3, 30


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; parameter names are those of transformers' Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [batch, tokens, hidden]; cos, sin: [tokens, head_dim]."""
        q, k, v = (p(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, MLP, bias=False)
        self.up_proj = nn.Linear(HIDDEN, MLP, bias=False)
        self.down_proj = nn.Linear(MLP, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each behind its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(HIDDEN, eps=EPS)
        self.self_attn = Attention()
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, eps=EPS)
        self.mlp = Mlp()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The model, named so that its `state_dict()` is a LlamaForCausalLM checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(VOCAB, HIDDEN),
                "layers": nn.ModuleList(Layer() for _ in range(LAYERS)),
                "norm": nn.RMSNorm(HIDDEN, eps=EPS),
            }
        )
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [batch, tokens] -> logits: [batch, tokens, vocabulary]."""
        angle = torch.outer(torch.arange(ids.shape[1]), frequencies()).repeat(1, 2)
        x = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            x = layer(x, angle.cos(), angle.sin())
        return self.lm_head(self.model["norm"](x))


def frequencies() -> Tensor:
    """Radians per token of each rotary pair, fast ones first: [head_dim / 2]."""
    return THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x: [batch, heads, tokens, head_dim]; dimension i pairs with i + head_dim / 2."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


@torch.no_grad()
def wire(model: Llama) -> None:
    """Start near the circuit that copying needs; the match of keys, which is the skill, stays random and is learned.

    Dimension 0 of every embedding is a constant, from which head h of the first layer looks h + 1 tokens back: the fast
    rotary pairs of its query are turned by that many tokens against those of its key. In the second layer a value comes
    out as it went in, and the output head reads embeddings, so the tokens that it attends to become likelier.
    """
    for name, weight in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(weight, std=1.0 if "embed" in name else weight.shape[1] ** -0.5)
    embeddings = model.model["embed_tokens"].weight
    embeddings[:, 0] = 4.0
    model.lm_head.weight.copy_(0.05 * embeddings)
    model.lm_head.weight[:, 0] = 0.0

    first, second = (layer.self_attn for layer in model.model["layers"])
    fast = 2.0 * (frequencies() > 0.03)
    first.q_proj.weight *= 0.1
    first.k_proj.weight *= 0.1
    for head, query in enumerate(first.q_proj.weight.split(HEAD_DIM)):
        back = (head + 1) * frequencies()
        query[:, 0] = torch.cat((fast * back.cos(), -fast * back.sin()))
    for key in first.k_proj.weight.split(HEAD_DIM):
        key[:, 0] = torch.cat((fast, torch.zeros_like(fast)))

    values = second.v_proj.weight.split(HEAD_DIM)
    second.o_proj.weight.copy_(0.5 * torch.cat([v.T for v in values for _ in range(HEADS // KV_HEADS)], dim=1))


LETTERS = torch.tensor(recall.encode(recall.ALPHABET))
PRINTABLE = torch.arange(32, 127)


def draw(alphabet: Tensor, *shape: int) -> Tensor:
    """Random characters of the alphabet, as ids."""
    return alphabet[torch.randint(len(alphabet), shape)]


def repeats(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """A segment of random characters, then stretches of it, of which all but the first two characters can be predicted.

    Returns ids and a mask of the predictable ones: [batch, about 2 * length].
    """
    stretch = random.randint(6, 16)
    copies = length // stretch
    segment = draw(random.choice((LETTERS, PRINTABLE)), batch, length)
    start = torch.randint(length - stretch + 1, (batch, copies, 1))
    copied = segment.gather(1, (start + torch.arange(stretch)).flatten(1))
    known = torch.zeros(batch, length + copies * stretch, dtype=torch.bool)
    known[:, length:].unflatten(1, (copies, stretch))[..., 2:] = True
    return torch.cat((segment, copied), 1), known


def records(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """`key value` lines, then all of them again in another order; all of a line but its key can be predicted.

    Half of the batches ask for late lines first, or lines close to the end of a long context would hardly be asked for.
    Returns ids and a mask of the predictable ones: [batch, about 2 * length].
    """
    key, value = random.choice(((recall.KEY_LENGTH, recall.VALUE_LENGTH), (random.randint(2, 4), random.randint(2, 4))))
    lines = draw(LETTERS, batch, length // (key + value + 2), key + value + 2)
    lines[..., key], lines[..., -1] = ord(" "), ord("\n")
    order = (torch.rand(lines.shape[:2]) - random.choice((0, 1)) * torch.linspace(0, 1, lines.shape[1])).argsort(1)
    again = lines.gather(1, order[..., None].expand_as(lines))
    known = torch.ones_like(lines, dtype=torch.bool)
    known[..., :key] = False
    return torch.cat((lines, again), 1).flatten(1), torch.cat((torch.zeros_like(known), known), 1).flatten(1)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * cosine)


def train(seed: int) -> Llama:
    """The trained model; progress goes to stdout."""
    random.seed(seed)
    torch.manual_seed(seed)
    model = Llama()
    wire(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    plan = [stage for stage in CURRICULUM for _ in range(stage.steps)]
    began = time.monotonic()
    for step, stage in enumerate(plan):
        make = repeats if random.random() < stage.repeats else records
        ids, known = make(stage.batch, random.randint(stage.low, stage.high))
        logits, wanted = model(ids[:, :-1])[known[:, 1:]], ids[:, 1:][known[:, 1:]]
        loss = F.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(plan))
        optimizer.step()
        if step % 25 == 0 or step + 1 == len(plan):
            right = (logits.argmax(-1) == wanted).float().mean().item()
            took = time.monotonic() - began
            progress = f"step {step:4d}  {ids.shape[1]:4d} tokens  right {100 * right:5.1f} %  loss {loss:.3f}"
            print(f"{progress}  {took:4.0f} s", flush=True)
    return model


@torch.no_grad()
def print_recall(model: Llama, contexts: int, tokens: int, seed: int) -> None:
    """Print, by distance, the share of right first characters and by how much the right logit wins."""
    rng = random.Random(seed)
    margins: dict[int, list[float]] = {}
    for _ in range(contexts):
        context = recall.make_context(rng, tokens)
        for query in recall.queries(context, rng, 40, min_distance=0, max_distance=tokens):
            logits = model(torch.tensor([query.token_ids]))[0, -1]
            right = recall.encode(query.expected)[0]
            others = torch.cat((logits[:right], logits[right + 1 :]))
            margins.setdefault(query.distance // 256 * 256, []).append((logits[right] - others.max()).item())
    print(f"\n{contexts} contexts of {tokens} tokens, 40 queries each\n")
    print("| tokens back | queries | first character right | margin of its logit, 5th percentile | least |")
    print("|---|---|---|---|---|")
    for distance, found in sorted(margins.items()):
        found.sort()
        share = 100 * sum(margin > 0 for margin in found) / len(found)
        least = f"{found[len(found) // 20]:.1f} | {found[0]:.1f}"
        print(f"| {distance} to {distance + 255} | {len(found)} | {share:.1f} % | {least} |")


def main() -> None:
    """Train and save, or measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--eval", action="store_true", help="measure the weights that are there, train nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the weights")
    options = parser.parse_args()
    weights = options.out / "model.safetensors"
    if not options.eval:
        trained = train(options.seed).state_dict()
        options.out.mkdir(parents=True, exist_ok=True)
        save_file({name: t.to(torch.bfloat16).contiguous() for name, t in trained.items()}, weights, {"format": "pt"})
        (options.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    model = Llama()
    model.load_state_dict({name: t.float() for name, t in load_file(weights).items()})
    for tokens in (512, 1024, 2048):
        print_recall(model, 10, tokens, seed=1)


if __name__ == "__main__":
    main()
