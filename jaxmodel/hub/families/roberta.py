"""Files of RoBERTa and XLM-RoBERTa.

HF folders of their ...ForMaskedLM, ...ForSequenceClassification and ...Model. These are BERTs whose
positions begin after the padding id. They are saved as `roberta`, which is the same model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmodel.errors import InputError
from jaxmodel.hub.families import bert as of_bert
from jaxmodel.hub.names import Family, Name, fixed
from jaxmodel.models import bert

_HEADS = {"ForMaskedLM": "mlm", "ForSequenceClassification": "classify", "Model": "embed"}
_STEMS = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
_RENAMED = {  # name in BERT's files -> name in these; the first match counts
    "bert.pooler.dense": "classifier.dense",
    "bert.": "roberta.",
    "cls.predictions.transform.LayerNorm": "lm_head.layer_norm",
    "cls.predictions.transform": "lm_head",
    "cls.predictions": "lm_head",
    "classifier": "classifier.out_proj",
}


def _names(config: bert.Config) -> list[Name]:
    def renamed(tensor: str) -> str:
        old = next(old for old in _RENAMED if tensor.startswith(old))
        return _RENAMED[old] + tensor.removeprefix(old)

    return [
        dataclasses.replace(name, tensor=renamed(name.tensor)) for name in of_bert.names(config)
    ]


def _from_hf(hf: dict[str, Any]) -> bert.Config:
    stem = _STEMS[hf["model_type"]]
    known = {f"{stem}{rest}": head for rest, head in _HEADS.items()}
    head = known[of_bert.architecture(hf, known, f"{stem}ForMaskedLM")]
    if head == "mlm":  # the layer before the logits always uses GELU
        fixed(hf, {"hidden_act": ("gelu",)})
    padding = hf.get("pad_token_id", 1)
    rows = hf.get("max_position_embeddings", 512)
    if not isinstance(padding, int) or not 0 <= padding < rows - 1:
        raise InputError(
            f"config.json: pad_token_id is {padding!r}; allowed: 0 to {rows - 2}, because "
            "positions begin after it"
        )
    config = of_bert.config_from_hf(
        hf | {"architectures": [f"Bert{next(r for r, h in _HEADS.items() if h == head)}"]}
    )
    return dataclasses.replace(config, context=rows - padding - 1, first_position=padding + 1)


def _to_hf(c: bert.Config) -> dict[str, Any] | None:
    if (
        c.first_position < 1
        or c.types < 1
        or c.pool_activation != "tanh"
        or (c.head == "mlm" and c.activation != "gelu")
    ):
        return None
    theirs = of_bert.config_to_hf(dataclasses.replace(c, first_position=0)) or {}
    named = {head: f"Roberta{rest}" for rest, head in _HEADS.items()}[c.head]
    padding = {
        "pad_token_id": c.first_position - 1,
        "max_position_embeddings": c.context + c.first_position,
    }
    return {**theirs, "architectures": [named], "model_type": "roberta", **padding}


FAMILY = Family(
    "bert",
    kinds=tuple(_STEMS),
    names=_names,
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    ignored=r"embeddings\.position_ids|pooler\.dense\.(weight|bias)|lm_head\.bias",
    spellings=(("lm_head.decoder.bias", "lm_head.bias"),),
    head="lm_head.decoder.weight",
    prefix="roberta.",
    unread=of_bert.FAMILY.unread,
    copies={"lm_head.decoder.weight": "embed", "lm_head.decoder.bias": "head/bias"},
)
