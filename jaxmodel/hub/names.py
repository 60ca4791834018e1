"""How other people's files name and shape the leaves of each family: HF folders and GGUF.

A `Name` maps the path of a leaf (with `{}` for the layer) to a tensor's name. The two may differ in form: `transposed`
(GPT-2 stores `[in, out]`), `part` (one of several equal parts of a tensor, GPT-2's joined q, k, v), `interleaved` (GGUF
stores the rows of q and k for rotary pairs that are neighbours).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxmodel.errors import InputError
from jaxmodel.models import gpt2, llama


@dataclasses.dataclass(frozen=True)
class Name:
    """Where the leaf `path` stands in a file.

    Attributes:
      path: of the leaf, `{}` for the layer.
      tensor: its name in the file, `{}` for the layer.
      transposed: whether the file has `[in, out]`.
      part: (index, count): the leaf is one of equal parts along the file's last axis.
      interleaved: whether rows of each head stand in rotary pairs.
    """

    path: str
    tensor: str
    transposed: bool = False
    part: tuple[int, int] | None = None
    interleaved: bool = False

    @property
    def packed(self) -> str:
        """The name under which a compressed leaf is stored: one for each leaf, so a part's own name goes in."""
        if self.part is None:
            return self.tensor
        stem, kind = self.tensor.rsplit(".", 1)
        return f"{stem}.{self.path.rsplit('/', 1)[1].removesuffix('_bias')}.{kind}"

    @property
    def alone(self) -> Name:
        """The entry for a part that is a tensor of its own, because its siblings have another form."""
        return dataclasses.replace(self, tensor=self.packed, part=None)


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family's files look.

    Attributes:
      model: (config, policy) -> Model.
      hf: entries for HF folders.
      config_from_hf: config.json -> Config.
      config_to_hf: Config -> config.json.
      ignored: regular expression of tensors that carry no weights (masks, tables, a copy of the tied embedding).
      prefix: of HF names, which older files leave out.
      gguf: entries for GGUF.
      config_from_gguf: metadata -> Config.
    """

    model: Callable[..., Any]
    hf: tuple[Name, ...]
    config_from_hf: Callable[[Mapping[str, Any]], Any]
    config_to_hf: Callable[[Any], dict[str, Any]]
    ignored: str = r"(?!)"
    prefix: str = ""
    gguf: tuple[Name, ...] = ()
    config_from_gguf: Callable[[Mapping[str, Any]], Any] | None = None


def find(names: tuple[Name, ...], layer_path: str) -> tuple[Name, str]:
    """The entry for a layer's leaf (`blocks/7/attn/q`) and the layer's number as text."""
    layer = re.search(r"(?:^|/)(\d+)/", layer_path)
    template = layer_path if layer is None else layer_path.replace(f"/{layer[1]}/", "/{}/", 1)
    for name in names:
        if name.path == template:
            return name, layer[1] if layer else ""
    raise InputError(f"hub: no file name is known for the leaf {layer_path!r}")


def file_shape(name: Name, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the file's tensor (the whole one, where the leaf is a part of it) behind a leaf of this shape."""
    shape = shape[::-1] if name.transposed else shape
    return shape if name.part is None else (*shape[:-1], shape[-1] * name.part[1])


def to_leaf(name: Name, tensor: np.ndarray, heads: int) -> np.ndarray:
    """A file's tensor in the form of our leaf."""
    if name.part is not None:
        tensor = np.split(tensor, name.part[1], axis=-1)[name.part[0]]
    if name.interleaved:
        tensor = tensor.reshape(heads, -1, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    return tensor.T if name.transposed else tensor


def heads_of(config: Any, path: str) -> int:
    """The heads among the rows of q or k."""
    return getattr(config, "kv_heads", config.heads) if path.endswith("/k") else config.heads


# -------------------------------------------------------------------------------------------------------- llama

_LLAMA_LEAVES = {
    "attn_norm/weight": ("input_layernorm", "attn_norm"),
    "attn/q": ("self_attn.q_proj", "attn_q"),
    "attn/k": ("self_attn.k_proj", "attn_k"),
    "attn/v": ("self_attn.v_proj", "attn_v"),
    "attn/o": ("self_attn.o_proj", "attn_output"),
    "mlp_norm/weight": ("post_attention_layernorm", "ffn_norm"),
    "mlp/gate": ("mlp.gate_proj", "ffn_gate"),
    "mlp/up": ("mlp.up_proj", "ffn_up"),
    "mlp/down": ("mlp.down_proj", "ffn_down"),
}
_LLAMA_TOP = {
    "embed": ("model.embed_tokens", "token_embd"),
    "norm/weight": ("model.norm", "output_norm"),
    "head": ("lm_head", "output"),
}


def _llama_from_hf(hf: Mapping[str, Any]) -> llama.Config:
    if hf.get("attention_bias") or hf.get("mlp_bias"):
        raise InputError("config.json: attention_bias and mlp_bias are not read; this family has no biases")
    if hf.get("hidden_act", "silu") != "silu":
        raise InputError(f"config.json: hidden_act is {hf['hidden_act']!r}; this family has 'silu'")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"config.json: the rope type {kind!r} is not read; allowed: 'default'")
    heads = hf["num_attention_heads"]
    return llama.Config(
        vocab=hf["vocab_size"],
        width=hf["hidden_size"],
        depth=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_width=hf.get("head_dim") or hf["hidden_size"] // heads,
        mlp_width=hf["intermediate_size"],
        context=hf.get("max_position_embeddings", 2048),
        rope_base=float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tied=hf.get("tie_word_embeddings", False),
        init_scale=hf.get("initializer_range", 0.02),
    )


def _llama_to_hf(config: llama.Config) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_base,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "initializer_range": config.init_scale,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def _llama_from_gguf(metadata: Mapping[str, Any]) -> llama.Config:
    def get(key: str) -> Any:
        try:
            return metadata[f"llama.{key}"]
        except KeyError:
            raise InputError(f"gguf: the metadata 'llama.{key}' is missing") from None

    if metadata.get("llama.rope.scaling.type", "none") != "none":
        raise InputError(f"gguf: the rope scaling {metadata['llama.rope.scaling.type']!r} is not read; allowed: 'none'")
    heads, width = get("attention.head_count"), get("embedding_length")
    return llama.Config(
        vocab=metadata.get("llama.vocab_size") or len(metadata.get("tokenizer.ggml.tokens") or get("vocab_size")),
        width=width,
        depth=get("block_count"),
        heads=heads,
        kv_heads=metadata.get("llama.attention.head_count_kv", heads),
        head_width=metadata.get("llama.rope.dimension_count", width // heads),
        mlp_width=get("feed_forward_length"),
        context=get("context_length"),
        rope_base=float(metadata.get("llama.rope.freq_base", 10000.0)),
        norm_eps=float(np.float32(get("attention.layer_norm_rms_epsilon"))),
        tied=True,  # the reader unties it where the file has an output matrix
    )


LLAMA = Family(
    model=llama.model,
    hf=tuple(Name(f"blocks/{{}}/{ours}", f"model.layers.{{}}.{hf}.weight") for ours, (hf, _) in _LLAMA_LEAVES.items())
    + tuple(Name(ours, f"{hf}.weight") for ours, (hf, _) in _LLAMA_TOP.items()),
    config_from_hf=_llama_from_hf,
    config_to_hf=_llama_to_hf,
    ignored=r".*rotary_emb\.inv_freq|lm_head\.weight",
    gguf=tuple(
        Name(f"blocks/{{}}/{ours}", f"blk.{{}}.{theirs}.weight", interleaved=ours in ("attn/q", "attn/k"))
        for ours, (_, theirs) in _LLAMA_LEAVES.items()
    )
    + tuple(Name(ours, f"{theirs}.weight") for ours, (_, theirs) in _LLAMA_TOP.items()),
    config_from_gguf=_llama_from_gguf,
)

# --------------------------------------------------------------------------------------------------------- gpt2


def _gpt2_names() -> tuple[Name, ...]:
    names = [
        Name("embed", "transformer.wte.weight"),
        Name("positions", "transformer.wpe.weight"),
        Name("norm/weight", "transformer.ln_f.weight"),
        Name("norm/bias", "transformer.ln_f.bias"),
    ]
    layer, stem = "blocks/{}/", "transformer.h.{}."
    for ours, theirs in {"attn_norm": "ln_1", "mlp_norm": "ln_2"}.items():
        names += [Name(f"{layer}{ours}/{kind}", f"{stem}{theirs}.{kind}") for kind in ("weight", "bias")]
    for i, leaf in enumerate("qkv"):
        names.append(Name(f"{layer}attn/{leaf}", f"{stem}attn.c_attn.weight", transposed=True, part=(i, 3)))
        names.append(Name(f"{layer}attn/{leaf}_bias", f"{stem}attn.c_attn.bias", part=(i, 3)))
    for ours, theirs in {"attn/o": "attn.c_proj", "mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"}.items():
        names.append(Name(layer + ours, f"{stem}{theirs}.weight", transposed=True))
        names.append(Name(f"{layer}{ours}_bias", f"{stem}{theirs}.bias"))
    return tuple(names)


_GPT2_FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def _gpt2_from_hf(hf: Mapping[str, Any]) -> gpt2.Config:
    for key, allowed in _GPT2_FIXED.items():
        if hf.get(key, allowed[0]) not in allowed:
            raise InputError(f"config.json: {key} is {hf[key]!r}; this family has {allowed[0]!r}")
    if hf.get("n_inner") not in (None, 4 * hf["n_embd"]):
        raise InputError(f"config.json: n_inner is {hf['n_inner']}; this family has 4 * n_embd = {4 * hf['n_embd']}")
    return gpt2.Config(
        vocab=hf["vocab_size"],
        width=hf["n_embd"],
        depth=hf["n_layer"],
        heads=hf["n_head"],
        context=hf.get("n_positions", 1024),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        init_scale=hf.get("initializer_range", 0.02),
    )


def _gpt2_to_hf(config: gpt2.Config) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_positions": config.context,
        "n_ctx": config.context,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_scale,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    }


GPT2 = Family(
    model=gpt2.model,
    hf=_gpt2_names(),
    config_from_hf=_gpt2_from_hf,
    config_to_hf=_gpt2_to_hf,
    ignored=r".*\.attn\.(masked_)?bias|lm_head\.weight",
    prefix="transformer.",
)

FAMILIES: dict[str, Family] = {"llama": LLAMA, "gpt2": GPT2}
"""By `model_type` of config.json and `general.architecture` of GGUF."""
