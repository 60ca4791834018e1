"""Write `jaxmodel/hub/defaults.json`: what each key of config.json is where it is left out, of
every kind that is read.

python tests/hub/goldens/make_defaults.py        needs transformers; the newest is asked for, and
                                                 each entry names it
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig

KINDS = (
    *(
        "bert",
        "clip",
        "dinov2",
        "distilbert",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gpt2",
        "gpt_oss",
        "granite",
        "llama",
    ),
    *(
        "mistral",
        "mixtral",
        "modernbert",
        "olmo2",
        "olmo3",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "roberta",
        "siglip",
    ),
    *("siglip_text_model", "siglip_vision_model", "smollm3", "t5", "vit", "xlm-roberta"),
)


def main() -> None:
    """Ask each class for its config, and write one line for each kind."""
    lines = [
        f'"{kind}": {json.dumps(AutoConfig.for_model(kind).to_dict(), sort_keys=True)}'
        for kind in sorted(KINDS)
    ]
    file = Path(__file__).parents[3] / "jaxmodel" / "hub" / "defaults.json"
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
