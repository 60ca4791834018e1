"""What has a text form: found in one registry, declared in one way, with help and good errors."""

from __future__ import annotations

import dataclasses
import typing

import numpy as np
import pytest

from jaxmodel import schema, text_form
from jaxmodel.adapt.initializers import Initializer
from jaxmodel.compress import Method
from jaxmodel.data.augment import Augmentation
from jaxmodel.errors import InputError
from jaxmodel.losses.penalties import L1, Penalty
from jaxmodel.optim.projections import Bound, MaxNorm

KINDS = {
    "augment": Augmentation,
    "bound": Bound,
    "initializer": Initializer,
    "method": Method,
    "penalty": Penalty,
}
MEMBERS = [
    (kind, name, cls)
    for kind, base in KINDS.items()
    for name, cls in sorted(text_form.members(base).items())
    if cls.__module__.startswith("jaxmodel.")
]
# Settings of these values stand for those that have no default.
EXAMPLES = {"classes": 4, "first": 50, "vocab": 50, "high": 2.0}


def example(cls: type[text_form.Member]) -> text_form.Member:
    needed = [f.name for f in text_form.settings(cls) if f.default is dataclasses.MISSING]
    return cls(**{name: EXAMPLES.get(name, 1) for name in needed})


def test_the_registry_holds_each_kind_and_its_own_example():
    assert {kind: text_form.KINDS[kind] for kind in KINDS} == KINDS
    for base in KINDS.values():
        assert text_form.read(base, base.example)
    assert len(MEMBERS) > 40 and len({(kind, name) for kind, name, _ in MEMBERS}) == len(MEMBERS)


@pytest.mark.parametrize(("kind", "name", "cls"), MEMBERS, ids=[m[1] for m in MEMBERS])
def test_every_member(kind, name, cls):
    base = KINDS[kind]
    made = example(cls)
    assert text_form.read(base, str(made)) == (made,)
    assert name == name.lower() and str(made).startswith(f"{name}(")
    told = text_form.help_of(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in text_form.settings(cls):
        assert told.get(field.name), f"{name}: {field.name} has no help"
        assert "an object" not in schema.words(hints[field.name]), f"{name}: {field.name}"
        wrong = object()
        with pytest.raises(InputError, match=rf"{name}: {field.name} is <.*; allowed: "):
            dataclasses.replace(made, **{field.name: wrong})
    listing = text_form.describe(base)
    assert f"\n{name}(" in f"\n{listing}" and all(f"  {key}: " in listing for key in told)


def test_numbers_are_what_the_setting_says():
    assert L1(np.float32(0.5)) == L1(0.5) and type(L1(1).l1) is float
    assert str(L1(1)) == "l1(l1=1.0)"
    for bad in (True, "1", None, float("nan"), float("inf"), -1):
        with pytest.raises(InputError, match="l1: l1 is .*; allowed: a number of at least 0"):
            L1(bad)


def test_names_of_one_word_are_read_with_a_warning():
    with pytest.warns(DeprecationWarning, match="bound: maxnorm is max_norm now"):
        assert text_form.read(Bound, "maxnorm(3)") == (MaxNorm(3),)
    with pytest.warns(DeprecationWarning, match="augment: randomcrop is random_crop now"):
        assert str(text_form.read(Augmentation, "randomcrop(2)")[0]) == "random_crop(padding=2)"


@pytest.mark.parametrize(
    ("base", "text", "says"),
    [
        (Bound, "max_nrm(1)", "bound: 'max_nrm' is not known; allowed: max_min_norm, max_norm (ne"),
        (Method, "rtn(bitz=4)", "takes the settings bits, group, symmetric, activations, scale_d"),
        (Method, "rtn(bitz=4)", "(nearest: bits)"),
        (Method, "magnitude(scope='rows')", '"row", "leaf" (nearest: row)'),
        (Initializer, "he('gauss')", "he: distribution is 'gauss'; allowed: "),
        (Initializer, "zeros(1)", "'zeros(1)' in 'zeros(1)': zeros takes no settings"),
        (Penalty, "l1(1); l2(1)", "penalty: 'l1(1); l2(1)' cannot be read; write it as 'l2(1e-4"),
        (Penalty, "x = 1", "cannot be read"),
        (Penalty, "l1(" + "-" * 10**5 + "1)", "cannot be read"),
        (Penalty, "l1(__import__('os'))", "l1 takes the settings l1"),
        (Penalty, "l1(1, l1=2)", "l1 takes the settings l1"),
        (Penalty, "l1(**{'l1': 2})", "l1 takes the settings l1"),
        (Penalty, "l1.l2(1)", "penalty: 'l1.l2' is not known"),
        (Penalty, "\0", "cannot be read"),
    ],
)
def test_bad_text_is_one_line(base, text, says):
    with pytest.raises(InputError) as error:
        text_form.read(base, text)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 700


def test_a_member_of_ones_own():
    @dataclasses.dataclass(frozen=True)
    class Own(text_form.Member, kind="own", example="group_lasso(1)"):
        """A kind outside of the package, so that other tests do not find its members."""

    @dataclasses.dataclass(frozen=True)
    class GroupLasso(Own):
        l1: float = 1.0
        over: typing.Any = None

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.over == "nothing":
                raise ValueError("nothing to sum over")

    assert text_form.read_one(Own, "group_lasso(2)") == GroupLasso(2.0)
    assert text_form.read_one(Own, "group_lasso(over=(1, 'a'))") == GroupLasso(over=(1, "a"))
    with pytest.raises(InputError, match='own: "group_lasso.*nothing to sum over'):
        text_form.read(Own, "group_lasso(over='nothing')")
