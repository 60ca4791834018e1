"""Bad input becomes one line that says what was given and what is allowed."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from jaxmodel import errors
from jaxmodel.errors import InputError


def test_an_input_error_is_a_value_error():
    with pytest.raises(ValueError, match="bits"):
        raise InputError("bits: 9")


def test_unknown_names_argument_value_allowed_and_nearest():
    message = str(errors.unknown("model", "smolm2-135m", {"gpt2", "smollm2-135m", "llama-2-7b"}))
    assert message.startswith(
        "model: 'smolm2-135m' is not known; allowed: gpt2, llama-2-7b, smollm2-135m"
    )
    assert message.endswith("(nearest: smollm2-135m)")
    assert "\n" not in message


def test_unknown_without_a_near_name_gives_no_hint():
    assert "nearest" not in str(errors.unknown("kind", "zzzz", ["alpha", "beta"]))


def test_unknown_shortens_a_long_list():
    message = str(errors.unknown("name", "q", [f"option{i:03d}" for i in range(300)]))
    assert message.count("option") == 20
    assert message.endswith(", ...")


def test_nearest_counts_and_orders():
    names = ["blocks/0/attn/q", "blocks/0/attn/k", "embed"]
    assert errors.nearest("blocks/0/attn/qq", names, count=1) == ["blocks/0/attn/q"]
    assert errors.nearest("zzz", names) == []


def test_at_least():
    for fine in (1, np.int64(7)):
        errors.at_least("chunk", fine)
    errors.at_least("steps", 0, 0)
    for bad in (0, -3, 1.0, "1", True, None, np.float32(2)):
        with pytest.raises(InputError) as caught:
            errors.at_least("chunk", bad)
        assert str(caught.value) == f"chunk: {bad!r} given; allowed: a whole number of at least 1"
    with pytest.raises(InputError, match="at least 257"):
        errors.at_least("vocab", 256, 257)


def test_require_returns_the_module():
    assert errors.require("json.decoder", "hub") is sys.modules["json.decoder"]


@pytest.mark.parametrize("module", ["not_installed_anywhere", "not_installed_anywhere.inner"])
def test_require_names_the_install_line(module):
    with pytest.raises(InputError, match=r"pip install 'jaxmodel\[serve\]'") as caught:
        errors.require(module, "serve")
    assert module in str(caught.value)


def test_require_does_not_hide_a_broken_module(tmp_path, monkeypatch):
    (tmp_path / "is_installed_but_broken.py").write_text("import its_own_missing_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="its_own_missing_dependency"):
        errors.require("is_installed_but_broken", "serve")
