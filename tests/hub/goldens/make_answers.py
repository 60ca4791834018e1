"""Make answers.json: which tokens of chats transformers gives to the assistant
(`return_assistant_tokens_mask`).

Run with transformers 5.24 and tokenizers:  python make_answers.py
The tokenizer is that of bytes with a few merges, so that tokens begin within words and characters
have several.
"""

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

MERGES = [
    ("o", "k"),
    ("ok", "."),
    ("Ġ", "y"),
    ("Ġy", "e"),
    ("Ġye", "s"),
    ("Ã", "©"),
    ("\u010a", "\u010a"),
    ("h", "i"),
]
TURN = "<|{{ m.role }}|>\n"
TEMPLATES = {
    "words": "{% for m in messages %}"
    + TURN
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}\n{% endfor %}",
    "tight": "{%- for m in messages -%}{%- if m.role == 'assistant' -%}A:{%- generation -%} {{ "
    "m.content | trim }}\n"
    "{%- endgeneration -%}{%- else -%}U: {{ m.content }}{{ '\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}A:{%- endif -%}",
}
CHATS = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok."}],
    [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "café?"},
        {"role": "assistant", "content": " yes 😀"},
        {"role": "user", "content": "hi\n\n"},
        {"role": "assistant", "content": "café"},
    ],
]


def backend() -> Tokenizer:
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for a, b in MERGES:
        letters.setdefault(a + b, len(letters))
    made = Tokenizer(models.BPE(letters, MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"])
    return made


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    out = {"tokenizer": json.loads(backend().to_str()), "cases": []}
    backend().save(str(folder / "tokenizer.json"))
    for template in TEMPLATES.values():
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "</s>",
            "chat_template": template,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for chat in CHATS:
            said = tokenizer.apply_chat_template(
                chat, return_dict=True, return_assistant_tokens_mask=True
            )
            case = {
                "template": template,
                "messages": chat,
                "ids": said["input_ids"],
                "learnt": said["assistant_masks"],
            }
            out["cases"].append(case)
    Path(__file__).with_name("answers.json").write_text(
        json.dumps(out, ensure_ascii=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
