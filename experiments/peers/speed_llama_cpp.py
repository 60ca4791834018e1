"""Tokens per second of llama.cpp, as JSON: run by experiments/peers_smollm2.py with the Python of
.peers.

python speed_llama_cpp.py FILE.gguf: prefill of 512 tokens, greedy decoding of one stream behind 240
tokens, 16 tokens; the best of three runs on two threads.
"""

import json
import sys
import time

from llama_cpp import Llama

PROMPT = 512
CACHE = 240
NEW = 16
REPEATS = 3


def main() -> None:
    model = Llama(
        sys.argv[1], n_ctx=1024, n_batch=PROMPT, n_threads=2, n_threads_batch=2, verbose=False
    )
    tokens = [i % model.n_vocab() for i in range(PROMPT)]
    prefill = decode = float("inf")
    for _ in range(REPEATS + 1):  # the first warms up
        model.reset()
        start = time.perf_counter()
        model.eval(tokens)
        prefill = min(prefill, time.perf_counter() - start)
        model.reset()
        model.eval(tokens[:CACHE])
        start = time.perf_counter()
        for _ in range(NEW):
            model.eval([model.sample(temp=0.0)])
        decode = min(decode, time.perf_counter() - start)
    print(json.dumps({"prefill_tps": PROMPT / prefill, "decode_tps_1": NEW / decode}))


main()
