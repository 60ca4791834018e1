"""Training steps of a GPT in PyTorch: tokens a second of each way to run it, as JSON on the last
line. Run by train_speed.py.

Usage: speed_train_torch.py WIDTH DEPTH HEADS VOCAB BATCH CONTEXT STEPS MODE...   (modes: eager,
  bf16, compiled, compiled-bf16)
"""

import json
import statistics
import sys
import time

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Pre-norm attention and feed-forward part, as in GPT-2."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attn_norm = nn.LayerNorm(width)
        self.mlp_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.o = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (
            a.view(b, t, self.heads, -1).transpose(1, 2)
            for a in self.qkv(self.attn_norm(x)).split(d, dim=2)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class GPT(nn.Module):
    """Learnt positions, a tied head."""

    def __init__(self, width: int, depth: int, heads: int, vocab: int, context: int):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens, targets):
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.embed.weight)
        return functional.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.view(-1))


def measure(mode: str, sizes: list[int], batch: int, context: int, steps: int) -> dict[str, float]:
    """The median over the steps behind the first ones, which compile and warm up."""
    width, depth, heads, vocab = sizes
    torch.manual_seed(0)
    model = GPT(width, depth, heads, vocab, context)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    run = torch.compile(model) if mode.startswith("compiled") else model
    rows = torch.randint(0, vocab, (steps + 5, batch, context + 1))
    seconds = []
    loss = None
    for i in range(steps + 5):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode.endswith("bf16")):
            loss = run(rows[i, :, :-1].contiguous(), rows[i, :, 1:].contiguous())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return {
        "tokens_per_second": batch * context / statistics.median(seconds[5:]),
        "loss": float(loss.detach()),
    }


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:8]]
    modes = sys.argv[8:]
    width, depth, heads, vocab, batch, context, steps = numbers
    torch.set_num_threads(len(__import__("os").sched_getaffinity(0)))
    found = {}
    for mode in modes:
        try:
            found[mode] = measure(mode, [width, depth, heads, vocab], batch, context, steps)
        except Exception as error:  # torch.compile needs a C++ compiler
            print(f"{mode}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
    print(json.dumps(found))
