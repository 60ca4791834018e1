"""Files of DistilBERT.

HF folders of DistilBertForMaskedLM, DistilBertForSequenceClassification and DistilBertModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmodel.hub.families.bert import (
    activation,
    activation_to_hf,
    architecture,
    labels,
    labels_to_hf,
    linear_names,
    norm_names,
)
from jaxmodel.hub.names import Family, Name, fixed
from jaxmodel.models import bert

_ARCHITECTURES = {
    "DistilBertForMaskedLM": "mlm",
    "DistilBertForSequenceClassification": "classify",
    "DistilBertModel": "embed",
}
_LAYER = {
    "attn/q": "attention.q_lin",
    "attn/k": "attention.k_lin",
    "attn/v": "attention.v_lin",
    "attn/o": "attention.out_lin",
    "mlp/up": "ffn.lin1",
    "mlp/down": "ffn.lin2",
}


def _names(config: bert.Config) -> list[Name]:
    stem = "distilbert.transformer.layer.{}"
    names = [
        Name("embed", "distilbert.embeddings.word_embeddings.weight"),
        Name("positions", "distilbert.embeddings.position_embeddings.weight"),
        *norm_names("embed_norm", "distilbert.embeddings.LayerNorm"),
        *norm_names("blocks/{}/attn_norm", f"{stem}.sa_layer_norm"),
        *norm_names("blocks/{}/mlp_norm", f"{stem}.output_layer_norm"),
        *linear_names("head/dense", "vocab_transform"),
        *norm_names("head/norm", "vocab_layer_norm"),
        Name("head/words", "vocab_projector.weight"),
        Name("head/bias", "vocab_projector.bias"),
        *linear_names("head/pool", "pre_classifier"),
        *linear_names("head/classes", "classifier"),
    ]
    return names + [
        name
        for ours, theirs in _LAYER.items()
        for name in linear_names(f"blocks/{{}}/{ours}", f"{stem}.{theirs}")
    ]


def _from_hf(hf: Mapping[str, Any]) -> bert.Config:
    fixed(hf, {"tie_weights_": (True,)})
    head = _ARCHITECTURES[architecture(hf, _ARCHITECTURES, "DistilBertForMaskedLM")]
    return bert.Config(
        vocab=hf.get("vocab_size", 30522),
        width=hf.get("dim", 768),
        depth=hf.get("n_layers", 6),
        heads=hf.get("n_heads", 12),
        mlp_width=hf.get("hidden_dim", 3072),
        context=hf.get("max_position_embeddings", 512),
        head=head,
        labels=labels(hf) if head == "classify" else (),
        types=0,
        activation=activation(hf, "gelu", key="activation"),
        init_scale=hf.get("initializer_range", 0.02),
        pool_activation="relu" if head == "classify" else "tanh",
        tied=hf.get("tie_word_embeddings", True) or head != "mlm",
    )


def _to_hf(c: bert.Config) -> dict[str, Any] | None:
    if c.types or c.norm_eps != 1e-12:
        return None
    return {
        "architectures": [{ours: theirs for theirs, ours in _ARCHITECTURES.items()}[c.head]],
        "model_type": "distilbert",
        "vocab_size": c.vocab,
        "dim": c.width,
        "n_layers": c.depth,
        "n_heads": c.heads,
        "hidden_dim": c.mlp_width,
        "max_position_embeddings": c.context,
        "activation": activation_to_hf(c.activation),
        "initializer_range": c.init_scale,
        "tie_word_embeddings": c.tied,
        **(labels_to_hf(c.labels) if c.labels else {}),
    }


FAMILY = Family(
    "bert",
    kinds=("distilbert",),
    names=_names,
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    ignored=r"embeddings\.position_ids",
    prefix="distilbert.",
    unread="sinusoidal_pos_embds",  # initial values of a table that the file has
    copies={"vocab_projector.weight": "embed"},
    head="vocab_projector.weight",
)
