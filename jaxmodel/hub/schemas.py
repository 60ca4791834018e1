"""Schemas of the JSON files of a model's folder: the type of each key that is read.

See `jaxmodel.schema`. `Config` serves all families, since a key of config.json has the same type in
each. Every key that a family reads is listed here; a test checks it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

from jaxmodel.schema import Count, Index, Positive, Range, Share

type Token = str | dict[str, Any] | None
type Ids = Index | list[Index] | None
type Template = str | list[NamedTemplate] | dict[str, str] | None


class Rope(TypedDict, total=False):
    """`rope_scaling` or `rope_parameters`; models with two kinds of layers have one for each."""

    rope_type: str
    type: str
    rope_theta: Positive
    factor: Positive | None
    original_max_position_embeddings: Count | Positive | None
    low_freq_factor: Positive | None
    high_freq_factor: Positive | None
    beta_fast: Positive | None
    beta_slow: Positive | None
    attention_factor: Positive | None
    mscale: float | None
    mscale_all_dim: float | None
    truncate: bool | None
    partial_rotary_factor: Share | None
    short_factor: list[Positive] | None
    long_factor: list[Positive] | None
    full_attention: Rope | None
    sliding_attention: Rope | None


class Config(TypedDict, total=False):
    """config.json, and the objects in it that describe one tower."""

    model_type: str
    architectures: list[str] | None
    # sizes
    vocab_size: Count
    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None
    head_dim: Count | None
    intermediate_size: Count
    max_position_embeddings: Count
    type_vocab_size: Index
    dim: Count
    hidden_dim: Count
    n_layers: Count
    n_heads: Count
    n_embd: Count
    n_layer: Count
    n_head: Count
    n_inner: Count | None
    n_positions: Count
    d_model: Count
    d_kv: Count
    d_ff: Count
    num_layers: Count
    num_decoder_layers: Count | None
    num_heads: Count
    relative_attention_num_buckets: Count
    relative_attention_max_distance: Count
    num_local_experts: Count
    num_experts: Count
    num_experts_per_tok: Count
    moe_intermediate_size: Count
    mlp_only_layers: list[Index] | None
    decoder_sparse_step: Count
    projection_dim: Count
    projection_size: Count | None
    vision_use_head: bool | None
    pooler_output_size: Count | None
    image_size: Count
    patch_size: Count
    num_channels: Count
    mlp_ratio: Positive
    use_swiglu_ffn: bool
    use_mask_token: bool
    num_labels: Count
    # rotation, windows
    rope_theta: Positive
    rope_local_base_freq: Positive
    rope_scaling: Rope | None
    rope_parameters: Rope | None
    partial_rotary_factor: Share | None
    original_max_position_embeddings: Count | Positive | None
    sliding_window: Index | None
    sliding_window_pattern: Count | None
    use_sliding_window: bool | None
    max_window_layers: Index
    layer_types: list[str] | None
    global_attn_every_n_layers: Count
    local_attention: Count
    global_rope_theta: Positive
    local_rope_theta: Positive
    no_rope_layers: list[Index] | None
    no_rope_layer_interval: Count
    # numbers
    layer_norm_eps: Positive
    layer_norm_epsilon: Positive
    norm_eps: Positive
    rms_norm_eps: Positive
    initializer_range: Positive
    initializer_factor: Positive
    router_aux_loss_coef: float
    attn_logit_softcapping: Positive | None
    final_logit_softcapping: Positive | None
    query_pre_attn_scalar: Positive
    logit_scale_init_value: float
    embedding_multiplier: Positive
    attention_multiplier: Positive
    residual_multiplier: Positive
    logits_scaling: Positive
    swiglu_limit: Positive
    swiglu_alpha: Positive
    dropout_rate: Share
    classifier_dropout: Share | None
    # choices
    hidden_act: str
    hidden_activation: str | None
    classifier_activation: str
    classifier_pooling: str
    classifier_bias: bool
    decoder_bias: bool
    norm_bias: bool
    activation: str
    sinusoidal_pos_embds: bool
    activation_function: str
    feed_forward_proj: str
    dense_act_fn: str
    is_gated_act: bool
    use_qk_norm: bool
    shared_expert_intermediate_size: Index
    full_attn_mod: Count
    interpolate_factor: Count
    lm_head_bias: bool
    pooler_act: str
    position_embedding_type: str | None
    attention_bias: bool
    mlp_bias: bool
    qkv_bias: bool
    add_pooling_layer: bool
    tie_word_embeddings: bool
    tie_weights_: bool
    norm_topk_prob: bool
    scale_decoder_outputs: bool
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    is_decoder: bool
    is_encoder_decoder: bool
    add_cross_attention: bool
    use_bidirectional_attention: bool | Literal["all"] | None
    problem_type: str | None
    # names and ids
    id2label: dict[str, str | int] | None
    label2id: dict[str, Index] | None
    bos_token_id: Ids
    eos_token_id: Ids
    pad_token_id: int | None
    decoder_start_token_id: Index | None
    image_token_index: Index
    image_token_id: Index
    # towers
    text_config: Config | None
    vision_config: Config | None
    text_config_dict: Config | None
    vision_config_dict: Config | None
    quantization_config: dict[str, Any] | None


class _Ours(TypedDict):
    family: str
    config: dict[str, Any]
    policy: dict[str, Any]
    card: dict[str, Any]
    leaves: dict[str, dict[str, Any]]
    leaves_sha256: str


class Ours(_Ours, total=False):
    """The contents of jaxmodel.json."""

    adapters: bool
    narrow: dict[str, Index]  # groups with fewer units than the config says


class Shape(TypedDict):
    """An input of a foreign module, with the batch first."""

    shape: list[Index]
    dtype: str


class Foreign(TypedDict):
    """The config.json of a foreign Flax module."""

    flax: Literal["linen", "nnx"]
    module: str
    fields: dict[str, Any]
    stated: dict[str, str]
    inputs: dict[str, Shape] | None
    rngs: list[str]
    own_call: bool


class ShardIndex(TypedDict):
    """The contents of model.safetensors.index.json."""

    weight_map: dict[str, str]


class NamedTemplate(TypedDict):
    """One of several chat templates."""

    name: str
    template: str


class Tokens(TypedDict, total=False):
    """The contents of tokenizer_config.json and special_tokens_map.json."""

    bos_token: Token
    eos_token: Token
    pad_token: Token
    cls_token: Token
    sep_token: Token
    mask_token: Token
    unk_token: Token
    additional_special_tokens: list[str | dict[str, Any]] | None
    extra_special_tokens: list[str | dict[str, Any]] | dict[str, str | dict[str, Any]] | None
    added_tokens_decoder: dict[str, AddedToken] | None
    chat_template: Template
    do_lower_case: bool | None
    tokenize_chinese_chars: bool | None
    strip_accents: bool | None
    add_prefix_space: bool | None
    extra_ids: Annotated[int, Range(0, 100_000)]
    tokenizer_class: str | None
    add_bos_token: bool | None
    add_eos_token: bool | None
    model_max_length: Any  # transformers writes 1e30 for none


class Generation(TypedDict, total=False):
    """The contents of generation_config.json."""

    bos_token_id: Ids
    eos_token_id: Ids
    pad_token_id: int | list[Index] | None  # -1 for none


class TextEnds(Generation, total=False):
    """The keys in the text part of config.json that say what ends a text."""

    vocab_size: Count


class Ends(TypedDict, total=False):
    """The keys of config.json that say what ends a text."""

    eos_token_id: Ids
    vocab_size: Count
    text_config: TextEnds | None


class Side(TypedDict, total=False):
    """A size of images."""

    height: Count
    width: Count
    shortest_edge: Count
    longest_edge: Count
    cover: bool


class Images(TypedDict, total=False):
    """The contents of preprocessor_config.json."""

    image_processor_type: str
    feature_extractor_type: str
    do_resize: bool | None
    size: Count | Side | None
    resample: Index | None
    do_center_crop: bool | None
    crop_size: Count | Side | None
    do_rescale: bool | None
    rescale_factor: Positive
    do_normalize: bool | None
    image_mean: list[float]
    image_std: list[Positive]


class Processor(TypedDict, total=False):
    """The contents of processor_config.json."""

    image_processor: Images | None
    feature_extractor: dict[str, Any] | None


class Content(TypedDict):
    """The text of a token."""

    content: str


class AddedToken(Content, total=False):
    """An entry of `added_tokens_decoder`."""

    lstrip: bool
    rstrip: bool
    single_word: bool
    normalized: bool
    special: bool


class Templates(TypedDict, total=False):
    """The contents of chat_template.json."""

    chat_template: Template


class Sentences(TypedDict, total=False):
    """The contents of sentence_bert_config.json."""

    max_seq_length: Count | None
    do_lower_case: bool | None


class Module(TypedDict):
    """An entry of modules.json."""

    path: str
    type: str


type Modules = list[Module]


class Pooling(TypedDict, total=False):
    """The contents of 1_Pooling/config.json.

    The old form has a flag for each way, the new form has `pooling_mode`.
    """

    word_embedding_dimension: Count
    embedding_dimension: Count
    include_prompt: bool
    pooling_mode: str | list[str]
    pooling_mode_cls_token: bool
    pooling_mode_max_tokens: bool
    pooling_mode_mean_tokens: bool
    pooling_mode_mean_sqrt_len_tokens: bool
    pooling_mode_weightedmean_tokens: bool
    pooling_mode_lasttoken: bool


class Prompts(TypedDict, total=False):
    """The contents of config_sentence_transformers.json."""

    prompts: dict[str, str] | None
    default_prompt_name: str | None


class Adapter(TypedDict, total=False):
    """The contents of adapter_config.json, as PEFT writes it."""

    peft_type: str
    base_model_name_or_path: str | None
    r: Count
    lora_alpha: float
    lora_dropout: Share
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    bias: str
    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None
    modules_to_save: list[str] | None
    layers_to_transform: list[Index] | Index | None
    rank_pattern: dict[str, Count]
    alpha_pattern: dict[str, float]
