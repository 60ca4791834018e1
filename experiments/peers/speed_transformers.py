"""Tokens per second of transformers on torch, as JSON: run by experiments/peers_smollm2.py with the
Python of .peers.

python speed_transformers.py FOLDER DTYPE: prefill of 512 tokens (the head on the last position
only), greedy decoding of 1 and 8 streams behind 240 tokens of cache, 16 tokens each; the best of
three runs.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM

PROMPT = 512
CACHE = 240
NEW = 16
REPEATS = 3


@torch.inference_mode()
def main() -> None:
    folder, dtype = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    row = torch.arange(PROMPT)[None] % model.config.vocab_size

    def seconds(work) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    read = lambda: model(row, logits_to_keep=1, use_cache=True)
    read()
    found = {"prefill_tps": PROMPT / min(seconds(read) for _ in range(REPEATS))}
    for rows in (1, 8):
        best = float("inf")
        for _ in range(REPEATS):
            out = model(row[:, :CACHE].repeat(rows, 1), logits_to_keep=1, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            cache = out.past_key_values
            start = time.perf_counter()
            for _ in range(NEW):
                out = model(token, past_key_values=cache, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
                cache = out.past_key_values
            best = min(best, time.perf_counter() - start)
        found[f"decode_tps_{rows}"] = rows * NEW / best
    print(json.dumps(found))


main()
