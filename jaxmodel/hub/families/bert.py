"""Files of BERT.

HF folders of BertForMaskedLM, BertForSequenceClassification and BertModel (sentence embeddings).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jaxmodel.errors import InputError, one_of
from jaxmodel.hub.names import Family, Name, fixed
from jaxmodel.models import bert
from jaxmodel.models.vit import numbered

_ARCHITECTURES = {
    "BertForMaskedLM": "mlm",
    "BertForSequenceClassification": "classify",
    "BertModel": "embed",
}
_FIXED = {
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}
# `hidden_act` -> name in `layers.ACTIVATIONS`; of several synonyms in HF the last is written
ACTIVATIONS = {
    **dict.fromkeys(("gelu_python", "gelu"), "gelu"),
    **dict.fromkeys(
        ("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh"),
        "gelu_tanh",
    ),
    **dict.fromkeys(("swish", "silu"), "silu"),
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
_TABLES = {
    "embed": "word_embeddings",
    "positions": "position_embeddings",
    "types": "token_type_embeddings",
}
_LAYER = {
    "attn/q": "attention.self.query",
    "attn/k": "attention.self.key",
    "attn/v": "attention.self.value",
    "attn/o": "attention.output.dense",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
}
_NORMS = {
    "embed_norm": "bert.embeddings.LayerNorm",
    "blocks/{}/attn_norm": "bert.encoder.layer.{}.attention.output.LayerNorm",
    "blocks/{}/mlp_norm": "bert.encoder.layer.{}.output.LayerNorm",
    "head/norm": "cls.predictions.transform.LayerNorm",
}
_HEAD = {
    "dense": "cls.predictions.transform.dense",
    "pool": "bert.pooler.dense",
    "classes": "classifier",
}


def activation(
    hf: Mapping[str, Any], default: str, where: str = "config.json", key: str = "hidden_act"
) -> str:
    """Return the activation that a key names, as transformers (5.24) defines it.

    Raises:
      InputError: an unknown one.
    """
    name = hf.get(key, default)
    one_of(f"{where}: {key}", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def activation_to_hf(name: str) -> str:
    """Return the `hidden_act` of an activation."""
    return {ours: theirs for theirs, ours in ACTIVATIONS.items()}[name]


def labels(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes in order; by default two unnamed ones, as in HF."""
    named = hf.get("id2label")
    if named is None:
        return numbered(int(hf.get("num_labels", 2)))
    if sorted(named) != sorted(map(str, range(len(named)))):
        raise InputError(
            f"config.json: id2label has the keys {', '.join(named)[:80]}; allowed: 0 to "
            f"{len(named) - 1}, each once"
        )
    return tuple(str(named[str(i)]) for i in range(len(named)))


def labels_to_hf(names: tuple[str, ...]) -> dict[str, Any]:
    """Return the keys of config.json that name the classes."""
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def architecture(hf: Mapping[str, Any], known: Collection[str], default: str) -> str:
    """Return the class from which config.json was saved; it determines the head.

    Raises:
      InputError: a class that is not among `known`.
    """
    named = (hf.get("architectures") or [default])[0]
    one_of("config.json: architectures", named, known)
    return named


def linear_names(ours: str, theirs: str) -> list[Name]:
    """Return the entries of a linear map and its bias."""
    return [Name(ours, f"{theirs}.weight"), Name(f"{ours}_bias", f"{theirs}.bias")]


def norm_names(ours: str, theirs: str) -> list[Name]:
    """Return the entries of a layer norm."""
    return [Name(f"{ours}/{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias")]


def names(config: bert.Config) -> list[Name]:
    """Return the entries of BERT's files."""
    names = [Name(ours, f"bert.embeddings.{theirs}.weight") for ours, theirs in _TABLES.items()]
    for ours, theirs in _LAYER.items():
        names += linear_names(f"blocks/{{}}/{ours}", f"bert.encoder.layer.{{}}.{theirs}")
    for ours, theirs in _NORMS.items():
        names += norm_names(ours, theirs)
    for ours, theirs in _HEAD.items():
        names += linear_names(f"head/{ours}", theirs)
    # transformers 5 reads the bias of a head of its own beside its table
    bias = "cls.predictions.bias" if config.tied else "cls.predictions.decoder.bias"
    return [*names, Name("head/words", "cls.predictions.decoder.weight"), Name("head/bias", bias)]


def config_from_hf(hf: Mapping[str, Any]) -> bert.Config:
    """Make a config from a config.json of BERT."""
    fixed(hf, _FIXED)
    head = _ARCHITECTURES[architecture(hf, _ARCHITECTURES, "BertForMaskedLM")]
    return bert.Config(
        vocab=hf["vocab_size"],
        width=hf["hidden_size"],
        depth=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        mlp_width=hf["intermediate_size"],
        context=hf.get("max_position_embeddings", 512),
        head=head,
        labels=labels(hf) if head == "classify" else (),
        types=hf.get("type_vocab_size", 2),
        activation=activation(hf, "gelu"),
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        init_scale=hf.get("initializer_range", 0.02),
        tied=hf.get("tie_word_embeddings", True) or head != "mlm",
    )


def config_to_hf(c: bert.Config) -> dict[str, Any] | None:
    """Return the config.json of BERT; None without token types, since all BERT files have them."""
    if not c.types:
        return None
    named = {ours: theirs for theirs, ours in _ARCHITECTURES.items()}[c.head]
    return {
        "architectures": [named],
        "model_type": "bert",
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_width,
        "max_position_embeddings": c.context,
        "type_vocab_size": c.types,
        "hidden_act": activation_to_hf(c.activation),
        "layer_norm_eps": c.norm_eps,
        "initializer_range": c.init_scale,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": c.tied,
        **(labels_to_hf(c.labels) if c.labels else {}),
    }


FAMILY = Family(
    "bert",
    kinds=("bert",),
    names=names,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    # every BertModel has a pooler, which masked language models and mean pooling do not use; the
    # earliest files also have the next-sentence head
    ignored=r"embeddings\.position_ids|pooler\.dense\.(weight|bias)|cls\.seq_relationship\.(weight|bias)"
    r"|cls\.predictions\.bias",  # next to the bias of an untied head
    spellings=(("cls.predictions.decoder.bias", "cls.predictions.bias"),),
    head="cls.predictions.decoder.weight",
    prefix="bert.",
    unread=r"directionality|pooler_\w+",  # the next-sentence head, in TensorFlow's files
    copies={"cls.predictions.decoder.weight": "embed", "cls.predictions.decoder.bias": "head/bias"},
)
