"""Files of gpt-oss: HF folders of GptOssForCausalLM.

The experts are plain or in MXFP4, which is decoded when it is read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxmodel.errors import InputError
from jaxmodel.hub.families.llama import scaling_from_hf, scaling_to_hf
from jaxmodel.hub.names import Family, Name, Tensors, fixed
from jaxmodel.models import gpt_oss
from jaxmodel.models.parts import pattern

_LAYER = {
    "attn_norm/weight": "input_layernorm.weight",
    "mlp_norm/weight": "post_attention_layernorm.weight",
    **{f"attn/{x}": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"attn/{x}_bias": f"self_attn.{x}_proj.bias" for x in "qkvo"},
    "attn/sinks": "self_attn.sinks",
    "moe/router": "mlp.router.weight",
    "moe/router_bias": "mlp.router.bias",
    "moe/down_bias": "mlp.experts.down_proj_bias",
}
_KINDS = {True: "sliding_attention", False: "full_attention"}
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _names(config: gpt_oss.Config) -> list[Name]:
    stem = "model.layers.{}."
    names = [
        Name("embed", "model.embed_tokens.weight"),
        Name("norm/weight", "model.norm.weight"),
        Name("head", "lm_head.weight"),
        Name("blocks/{}/moe/down", f"{stem}mlp.experts.down_proj", transposed=True),
    ]
    for i, ours in enumerate(("gate", "up")):
        both = f"{stem}mlp.experts.gate_up_proj"
        names.append(
            Name(f"blocks/{{}}/moe/{ours}", both, transposed=True, part=(i, (1, 1)), woven=True)
        )
        names.append(
            Name(f"blocks/{{}}/moe/{ours}_bias", f"{both}_bias", part=(i, (1, 1)), woven=True)
        )
    return names + [Name(f"blocks/{{}}/{ours}", stem + theirs) for ours, theirs in _LAYER.items()]


def _from_hf(hf: Mapping[str, Any]) -> gpt_oss.Config:
    fixed(hf, {"hidden_act": ("silu",), "attention_bias": (True,), "tie_word_embeddings": (False,)})
    depth = hf.get("num_hidden_layers", 36)
    context = hf.get("max_position_embeddings", 131072)
    window = hf.get("sliding_window", 128)
    types = hf.get("layer_types") or [_KINDS[not i % 2] for i in range(depth)]
    if set(types) - set(_KINDS.values()) or len(types) != depth:
        allowed = f"{' or '.join(_KINDS.values())} for each of {depth} layers"
        raise InputError(f"config.json: layer_types is {types!r:.60}; allowed: {allowed}")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or _YARN
    return gpt_oss.Config(
        vocab=hf.get("vocab_size", 201088),
        width=hf.get("hidden_size", 2880),
        depth=depth,
        heads=hf.get("num_attention_heads", 64),
        kv_heads=hf.get("num_key_value_heads") or 8,
        head_width=hf.get("head_dim") or 64,
        mlp_width=hf.get("intermediate_size", 2880),
        context=context,
        experts=hf.get("num_local_experts", hf.get("num_experts", 128)),
        experts_per_token=hf.get("num_experts_per_tok", 4),
        windows=pattern(tuple((window or 0) if kind == _KINDS[True] else 0 for kind in types)),
        rope_base=float(rope.get("rope_theta", hf.get("rope_theta", 150000.0))),
        rope_scaling=scaling_from_hf(rope, context),
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        limit=float(hf.get("swiglu_limit", 7.0)),
        steepness=float(hf.get("swiglu_alpha", 1.702)),
        balance=hf.get("router_aux_loss_coef", 0.001),
        init_scale=hf.get("initializer_range", 0.02),
    )


def _to_hf(c: gpt_oss.Config) -> dict[str, Any]:
    windows = c.window_of_layers()
    scaling = {"rope_type": "default"} if c.rope_scaling is None else scaling_to_hf(c.rope_scaling)
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_width,
        "intermediate_size": c.mlp_width,
        "max_position_embeddings": c.context,
        "num_local_experts": c.experts,
        "num_experts_per_tok": c.experts_per_token,
        "sliding_window": max(windows) or None,
        "layer_types": [_KINDS[bool(window)] for window in windows],
        "rope_theta": c.rope_base,
        "rope_parameters": {**scaling, "rope_theta": c.rope_base},
        "rms_norm_eps": c.norm_eps,
        "swiglu_limit": c.limit,
        "swiglu_alpha": c.steepness,
        "router_aux_loss_coef": c.balance,
        "initializer_range": c.init_scale,
        "hidden_act": "silu",
        "attention_bias": True,
        "tie_word_embeddings": False,
    }


_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUES = np.concatenate([_FP4, -_FP4])  # by code: a sign, two bits of exponent, one of mantissa


class Decoded(Tensors):
    """Tensors in MXFP4 (OCP, 2023), presented as plain tensors.

    `NAME_blocks` `[E, out, groups, 16]` has two codes per byte, the lower half first, and
    `NAME_scales` `[E, out, groups]` has the exponent of each group of 32; together they are NAME,
    `[E, in, out]`.
    """

    def __init__(self, tensors: Tensors):
        self.where = tensors.where
        self._tensors = tensors
        names = set(tensors.names())
        stems = {name.removesuffix("_blocks") for name in names if name.endswith("_blocks")}
        self._packed = {stem for stem in stems if f"{stem}_scales" in names}

    def names(self) -> Collection[str]:
        """Return the names of all tensors."""
        parts = {f"{stem}_{part}" for stem in self._packed for part in ("blocks", "scales")}
        return [*(name for name in self._tensors.names() if name not in parts), *self._packed]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        if name not in self._packed:
            return self._tensors.shape(name)
        blocks = self._tensors.shape(f"{name}_blocks")
        scales = self._tensors.shape(f"{name}_scales")
        if len(blocks) != 4 or blocks[3] != 16 or blocks[:3] != scales:
            given = f"blocks {list(blocks)} and scales {list(scales)}"
            raise InputError(
                f"{self.where}: {name!r} has {given}; allowed: [E, O, G, 16] and [E, O, G]"
            )
        return blocks[0], blocks[2] * 32, blocks[1]

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype that `read` gives."""
        return np.dtype(np.float32) if name in self._packed else self._tensors.dtype(name)

    def read(self, name: str, index: tuple[Any, ...] = ()) -> np.ndarray:
        """Return a tensor, or the part of it that `index` selects."""
        if name not in self._packed:
            return self._tensors.read(name, index)
        experts, inner, out = (*index, *(slice(0, n) for n in self.shape(name)[len(index) :]))
        groups = slice(inner.start // 32, -(-inner.stop // 32))
        blocks = self._tensors.read(f"{name}_blocks", (experts, out, groups, slice(0, 16)))
        exponents = (
            self._tensors.read(f"{name}_scales", (experts, out, groups)).astype(np.int32) - 127
        )
        values = _VALUES[np.stack([blocks & 15, blocks >> 4], axis=-1)].reshape(
            *blocks.shape[:3], 32
        )
        decoded = np.ldexp(values, exponents[..., None]).reshape(*blocks.shape[:2], -1)
        first = inner.start - 32 * groups.start
        return decoded[..., first : first + inner.stop - inner.start].swapaxes(1, 2)


FAMILY = Family(
    "gpt_oss",
    kinds=("gpt_oss",),
    names=_names,
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    ignored=r".*rotary_emb\.inv_freq",
    # keys of the original code, in addition to those that transformers reads
    unread="experts_per_token|initial_context_length",
    view=Decoded,
)
