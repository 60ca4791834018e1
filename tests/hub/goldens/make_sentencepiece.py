"""Small SentencePiece models, and how the library of that name cuts texts with them:
`sentencepiece/`.

Run with sentencepiece 0.2.1 or later: `python make_sentencepiece.py`. For each model: NAME.model,
and in pieces.json the ids and the decoded text of each of TEXTS.
"""

from __future__ import annotations

import json
import os
import pydoc_data.topics
from pathlib import Path

import sentencepiece

HERE = Path(__file__).parent / "sentencepiece"
TEXTS = [
    *(
        "The quick brown fox",
        " two  spaces and three   ",
        "",
        " ",
        "a",
        "naïve café, 東京 \U0001f642!",
        "tabs\tand\nlines\n\n",
    ),
    *("x = [1, 2, 3]  # 12345", "hello▁world"),
    *(
        "ＦＵＬＬ ｗｉｄｔｈ ﬁ",
        "the module is imported by the statement",
        "\u200b\ufffd",
        "a <tool> b",
    ),
    *(
        "Don't — “quote”",
        "aaaaaaaaaaaaaaaaaaaaaaaa",
        "    indented",
        "trailing ",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    ),
]
SAME = {"minloglevel": 2, "num_threads": 1, "hard_vocab_limit": False, "character_coverage": 0.999}
LIKE_LLAMA = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
LIKE_LLAMA["remove_extra_whitespaces"] = False
MODELS = {
    "llama": {**LIKE_LLAMA, "vocab_size": 700},
    "gemma": {
        **LIKE_LLAMA,
        "vocab_size": 620,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<tool>", "\n\n"],
    },
    "t5": {
        "model_type": "unigram",
        "vocab_size": 300,
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": -1,
    },
}


def main() -> None:
    """Train, and write what the library says."""
    topics = pydoc_data.topics.topics
    os.chdir(HERE)  # the library writes down the paths that it is given
    corpus = Path("corpus.txt")
    rules = Path("rules.tsv")
    corpus.write_text("\n".join(topics[key] for key in sorted(topics))[:150_000], encoding="utf-8")
    rules.write_text(
        "FF26\t0046\nFB01\t0066 0069\nFF34\t0054\n9\t20\n", encoding="utf-8"
    )  # a few of NFKC's, for the size
    said = {}
    for name, options in MODELS.items():
        more = {"normalization_rule_tsv": str(rules)} if name == "t5" else {}
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=name, **SAME, **options, **more
        )
        (HERE / f"{name}.vocab").unlink()
        processor = sentencepiece.SentencePieceProcessor(model_file=str(HERE / f"{name}.model"))
        ids = [processor.encode(text) for text in TEXTS]
        said[name] = {
            "ids": ids,
            "decoded": [processor.decode(row) for row in ids],
            "size": processor.get_piece_size(),
        }
    corpus.unlink()
    rules.unlink()
    (HERE / "pieces.json").write_text(
        json.dumps({"texts": TEXTS, **said}, indent=None) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
