"""The rule of compare: z, and what each excuse excuses."""

import re
from pathlib import Path

import numpy as np
import pytest

import fnbp.comparison
from fnbp.comparison.evaluation import Evaluator, Sides
from fnbp.comparison.leaf import Leaf, Scale, Sight, Values
from fnbp.comparison.numerics import U32, U64, relative
from fnbp.comparison.probe import Probe
from fnbp.comparison.rounding import Z_LIMIT, noise, roundings, z_of
from fnbp.comparison.subject import subject_of_function
from fnbp.comparison.verdict import (
    EXCUSES,
    Verdict,
    kink,
    rounding,
    saturated,
    verdict,
)

rng = np.random.default_rng(0)
X = rng.standard_normal((5, 7)).astype(np.float32)
DY = rng.standard_normal((5, 7)).astype(np.float32)
WIDE = Scale(np.dtype(np.float32))


def sight(f, vjp, probe="given", x=X, n=U32):
    """What compare would see of the one argument of f at a probe, with that noise."""
    evaluator = Evaluator(subject_of_function("f", f, (x,), None, vjp))
    point = Probe(probe, (x,), (), DY)
    exact, working = evaluator.at(point, np.float64), evaluator.at(point)
    values = Values(*(side["x"] for s in (exact, working) for side in (s.manual, s.automatic)))
    m, a = values.known()
    leaf, z = Leaf("f", "x", x.shape, "float32"), z_of(m, a, n, WIDE, exact, point)
    return Sight(evaluator, point, leaf, values, m, a, n, relative(m, a), z, exact, WIDE, np.random.default_rng(0))


def square(x):
    return x**2


def double(args, dy):
    return (2 * args[0] * dy,)


def test_noise_is_the_error_of_float32_and_at_least_one_rounding():
    a = np.array([3.0, 4.0])
    assert noise(a, a) == U32 and roundings(a, a) == 1
    assert noise(a * (1 + 1e-3), a) == pytest.approx(1e-3)
    assert roundings(a * (1 + 1e-3), a) == pytest.approx(1e-3 * 2**24)


def test_z_is_the_error_over_what_rounding_explains():
    a, n = np.array([3.0, 4.0]), 1e-3
    exact = Sides([], [], [], {}, {"x": a}, ())
    point = Probe("given", (a,), (), np.ones(2))
    m = a * (1 + 1e-9)
    assert z_of(m, a, n, WIDE, exact, point) == pytest.approx(1e-9 / (2.0**-53 * n / 2.0**-24), rel=1e-6)
    assert z_of(m, a, n, WIDE.narrowed(), exact, point) == pytest.approx(1e-9 / n, rel=1e-6)
    assert z_of(0 * a, 0 * a, n, WIDE, exact, point) == 0
    size = np.sqrt(12.5) * np.sqrt(
        2
    )  # beside an exact 0: the root mean square of the leaves times the root of dy's size
    assert z_of(1e-9 + 0 * a, 0 * a, n, WIDE, exact, point) == pytest.approx(1e-9 / (U64 * size))


def test_every_excuse_says_what_it_excuses_and_the_readme_lists_them_in_order():
    text = (Path(fnbp.comparison.__file__).parent / "README.md").read_text().partition("unless one of `EXCUSES`")[2]
    listed = re.findall(r"^ {4}(\w+) {2,}", text.partition("\n\nn is computed")[0], re.MULTILINE)
    assert listed == [excuse.__name__ for excuse in EXCUSES]
    assert all((excuse.__doc__ or "").split()[0] in ("Excuse", "Allow", "Judge") for excuse in EXCUSES)


def test_a_right_leaf_needs_no_excuse_and_a_wrong_one_has_none():
    right = sight(square, double)
    assert right.z <= 1 and [excuse(right) for excuse in EXCUSES] == [None] * 7
    assert verdict(right) == Verdict("ok", right)
    wrong = sight(square, lambda args, dy: (2.001 * args[0] * dy,))
    assert wrong.z > Z_LIMIT and [excuse(wrong) for excuse in EXCUSES] == [None] * 7
    said = verdict(wrong)
    assert said.kind == "formula" and said.hint.startswith("it is 1.0005 times the right value")


def test_excuses_change_nothing_that_they_are_given():
    at = sight(square, lambda args, dy: (2.001 * args[0] * dy,), probe="large")
    before = repr((at.leaf.row("ok"), at.scale, at.z))  # as text: a row holds nan, which equals nothing
    for excuse in EXCUSES:
        excuse(at)
    assert repr((at.leaf.row("ok"), at.scale, at.z)) == before and not at.leaf.pooled


@pytest.mark.parametrize(
    ("probe", "n", "error", "excused"),
    [("zeros", 0.5, 0.3, True), ("given", 0.5, 0.3, False), ("given", 0.5, 0.05, True), ("zeros", 0.05, 0.3, False)],
)
def test_a_leaf_of_which_float32_keeps_no_digit_is_unseen(probe, n, error, excused):
    at = sight(square, double, probe, n=n)._replace(error=error)
    assert saturated(at) == (Verdict("unseen", at) if excused else None)


def test_a_slope_between_those_of_a_kink_is_excused_and_one_beyond_is_not():
    def at(slope):
        x = np.where(X > 0.5, X, np.where(X > -0.5, 0, X)).astype(np.float32)
        backward = lambda args, dy: (np.where(args[0] > 0, 1, np.where(args[0] == 0, slope, 0)) * dy,)  # noqa: E731
        return sight(lambda x: x * (x > 0), backward, "zeros", x)

    assert kink(at(0.5)).kind == "convention"
    assert kink(at(1.5)) is None


def test_an_error_that_grows_with_eps_is_rounding():
    def cancelling(args, dy):  # ((x + c)^2 - x^2 - c^2) / c = 2 x
        (x,) = args
        c = x.dtype.type(1000 / 3)
        return (dy * (((x + c) ** 2 - x**2) - c**2) / c,)

    at = sight(square, cancelling)
    assert at.z > Z_LIMIT and rounding(at).kind == verdict(at).kind == "rounding"
