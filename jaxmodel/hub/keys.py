"""A record of which keys of a config.json were read, so that none is ignored silently.

A key that no reader asked for must have the value that transformers takes if the key is missing
(`defaults.json`, made from transformers by `tests/hub/goldens/make_defaults.py`), or be empty
(null, false, 0, ...), or concern only training, generation or bookkeeping (`HARMLESS`). Any other
key might change what is computed.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxmodel.errors import InputError, nearest
from jaxmodel.hub.schemas import Rope

HARMLESS = re.compile(
    "|".join(
        (
            # who wrote the file, from what, for which classes
            r"_name_or_path|name_or_path|_commit_hash|_num_labels|architectures|model_type|auto_map|custom_pipelines|license\w*",
            r"(transformers|peft|unsloth|diffusers)?_?version|transformers[._]\w+|tokenizer_class|processor_class|unsloth\w*",
            r"finetuning_task|task_specific_params|language|author|name|model_name|description|tags|created_at|base_model\w*",
            # how the result is computed, stored and returned, not what it is
            r"(torch_)?dtype|use_cache|use_bfloat16|torchscript|return_dict|output_(attentions|hidden_states|past|router_logits)",
            r"_?attn_implementation\w*|_?(use_)?flash_(attn|attention)\w*|deterministic_flash_attn|reference_compile",
            r"max_seq_len\w*|max_sequence_length|model_max_length|use_sdpa|pretraining_tp|chunk_size_feed_forward|reorder_and_upcast_attn|cache_implementation|tf_legacy_loss",
            r"gradient_checkpointing\w*|use_memory_efficient\w*|repad_logits_with_grad|use_return_dict|pad_vocab_size_multiple",
            # training
            r"\w*dropout\w*|\w*_pdrop|\w*drop_path\w*|layerdrop|initializer_\w+|init_(std|method|cutoff_factor)|label_smoothing",
            r"router_jitter_noise|\w*(aux|z)_loss\w*|loss_type|use_mask_token|sparse_pred\w*|ignore_index|gradient_\w+|seed",
            r"problem_type|id2label|label2id|num_labels",
            # generation
            r"\w+_token_(ids?|index)|forced_\w+|(begin_)?suppress_tokens|bad_words_ids|prefix|sep_token|max_(length|new_tokens)",
            r"min_length|do_sample|early_stopping|num_(beams|beam_groups|return_sequences)|temperature|top_[kp]|typical_p",
            r"(diversity|repetition|length)_penalty|\w*no_repeat_ngram_size|exponential_decay_length_penalty",
            r"remove_invalid_values|return_dict_in_generate",
        )
    )
)
_ROPES = ("rope_scaling", "rope_parameters")
_TOWERS = ("text_config", "vision_config", "text_config_dict", "vision_config_dict")


class Keys(dict[str, Any]):
    """An object of config.json that records which of its keys were read.

    The result of `|` records them too; other copies do not.

    >>> hf = Keys({"hidden_size": 8, "odd": 1})
    >>> (hf | {"model_type": "llama"})["hidden_size"], hf.asked
    (8, {'hidden_size'})
    """

    def __init__(self, values: Mapping[str, Any], asked: set[str] | None = None):
        super().__init__(
            {k: Keys(v) if k in _TOWERS and type(v) is dict else v for k, v in values.items()}
        )
        self.asked: set[str] = set() if asked is None else asked

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, and record the key as read, whether it exists or not."""
        self.asked.add(key)
        return super().get(key, default)

    def __or__(self, other: Mapping[str, Any]) -> Keys:  # pyright: ignore[reportIncompatibleMethodOverride]
        if isinstance(other, Keys):  # a key read from the result counts as read from both
            self.asked |= other.asked
            other.asked = self.asked
        return Keys({**self, **other}, self.asked)

    def __ror__(self, other: Mapping[str, Any]) -> Keys:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Keys({**other, **self}, self.asked)


def check_asked(hf: Keys, kind: str, unread: str = r"(?!)") -> None:
    """Refuse a config.json with a key that was not read and is not known to be harmless.

    Args:
      hf: config.json, after it was read.
      kind: its `model_type`.
      unread: regular expression of further harmless keys of this family.

    Raises:
      InputError: such a key; the line names it, its value and what to do.
    """
    _check(hf, defaults().get(kind, {}), re.compile(f"{HARMLESS.pattern}|{unread}"), "")


def without(hf: Mapping[str, Any], ignored: Collection[str], stem: str = "") -> dict[str, Any]:
    """Return config.json without some of its keys; `text_config.rope_theta` is a nested key.

    >>> without({"a": 1, "b": {"c": 2, "d": 3}}, ["a", "b.d"])
    {'b': {'c': 2}}
    """
    left = {key: value for key, value in hf.items() if stem + key not in ignored}
    return {
        key: without(value, ignored, f"{stem}{key}.") if isinstance(value, dict) else value
        for key, value in left.items()
    }


def _check(hf: Keys, usual: Mapping[str, Any], harmless: re.Pattern[str], stem: str) -> None:
    for key, value in hf.items():
        if key in hf.asked and key in _TOWERS and isinstance(value, Keys):
            _check(value, usual.get(key) or {}, harmless, f"{stem}{key}.")
        if key in hf.asked and key in _ROPES:
            _check_rope(value, f"{stem}{key}.")
        if key in hf.asked or value is None or (value == usual[key] if key in usual else not value):
            continue
        if harmless.fullmatch(key):
            continue
        raise _refused(stem + key, value, {*usual, *hf.asked}, usual.get(key))


def _check_rope(rope: Any, stem: str) -> None:
    for key, value in rope.items() if isinstance(rope, dict) else ():
        if isinstance(value, dict) and key in Rope.__annotations__:
            _check_rope(value, f"{stem}{key}.")
        elif key not in Rope.__annotations__ and value:
            raise _refused(stem + key, value, Rope.__annotations__, None)


def _refused(key: str, value: Any, known: Collection[str], usual: Any) -> InputError:
    close = nearest(key.rpartition(".")[2], known)
    hint = (
        f" (usual: {json.dumps(usual):.40})"
        if usual is not None
        else f" (nearest: {', '.join(close)})"
        if close
        else ""
    )
    return InputError(
        f"config.json: {key} is {json.dumps(value):.60}{hint}, which is not supported and may "
        f"change what the model computes; if it does not, remove it from the file or use "
        f"from_pretrained(ignore=[{key!r}])"
    )


@functools.cache
def defaults() -> dict[str, dict[str, Any]]:
    """Return transformers' default for each key of config.json, by `model_type`."""
    return json.loads((Path(__file__).parent / "defaults.json").read_text(encoding="utf-8"))
