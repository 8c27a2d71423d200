"""The likely mistake: each hypothesis fits its own mistake, and a right guess is made where several might do."""

import numpy as np
import pytest

from fnbp.comparison.hints import Evidence, hint_of

rng = np.random.default_rng(0)
M, N, K = 7, 13, 5
A = rng.standard_normal((M, N))
X = rng.standard_normal((M, N)) + 3
DY = rng.standard_normal((M, N))
W = rng.standard_normal((K, N))
SQUARE = rng.standard_normal((11, 11))
CUBE = rng.standard_normal((3, 5, 5))


def hint(manual, automatic=A, others=(), thrice=None, name="mine", **arrays):
    arrays = {"x": X, "dy": DY, "W": W} | arrays
    thrice = 3 * manual if thrice is None else thrice
    return hint_of(Evidence("x", manual, automatic, dict(others), arrays, thrice, name))


def part(where, value):
    changed = A.copy()
    changed[where] = value
    return changed


def narrow(a, bits):
    fraction, exponent = np.frexp(a)
    return np.ldexp(np.round(fraction * 2.0**bits) / 2.0**bits, exponent)


FITS = {
    "zero": (hint(0 * A), "it is all zero: the gradient is dropped"),
    "sign": (hint(-A), "the sign is flipped"),
    "two": (hint(2 * A), "it is 2 times the right value: a factor 2 too many"),
    "half": (hint(A / 2), "it is 0.5 times the right value: a factor 2 is missing"),
    "over_batch": (
        hint(A / M),
        "it is 0.142857 times the right value: divided by 7, the batch size: a mean instead of a sum",
    ),
    "times_batch": (hint(A * M), "it is 7 times the right value: times 7, the batch size: a sum instead of a mean"),
    "over_width": (
        hint(A / N),
        "it is 0.0769231 times the right value: divided by 13, axis 1 of x: a mean instead of a sum",
    ),
    "root": (hint(A / np.sqrt(K)), "it is 0.447214 times the right value: divided by the root of 5, axis 0 of W"),
    "bessel": (hint(A * (N - 1) / N), "it is 0.923077 times the right value: 12 instead of 13, axis 1 of x"),
    "keep": (hint(A * 0.7, name="dropout(0.3)"), "it is 0.7 times the right value: 1 - 0.3, of dropout(0.3)"),
    "inverse_keep": (
        hint(A / 0.7, name="dropout(0.3)"),
        "it is 1.42857 times the right value: 1 / (1 - 0.3), of dropout(0.3)",
    ),
    "any_factor": (hint(1.01 * A), "it is 1.01 times the right value"),
    "no_dy": (hint(X, thrice=X), "it does not depend on the cotangent: dy is left out"),
    "dy_twice": (hint(X, thrice=9 * X), "it is quadratic in the cotangent: dy is taken twice"),
    "over_dy": (hint(X, thrice=X / 3), "it is divided by the cotangent"),
    "clipped": (hint(np.clip(A, -0.5, 0.5)), "it is clipped at 0.5"),
    "transposed": (hint(SQUARE.T, SQUARE), "it is transposed"),
    "last_two": (hint(np.swapaxes(CUBE, 1, 2), CUBE), "its last two axes are swapped"),
    "flipped": (hint(A[:, ::-1]), "it is flipped along axis 1"),
    "flipped_twice": (hint(A[::-1, ::-1]), "it is flipped along every axis"),
    "late": (hint(np.roll(A, 1, 1)), "it is off by one along axis 1"),
    "early": (hint(np.roll(A, -1, 0)), "it is off by one along axis 0"),
    "other_leaf": (hint(X, others={"beta": X}), "it is the gradient of beta"),
    "bfloat16": (hint(narrow(A, 8)), "the rounding of bfloat16: is something cast to bfloat16?"),
    "float16": (hint(narrow(A, 11)), "the rounding of float16: is something cast to float16?"),
    "float32": (hint(narrow(A, 24)), "the rounding of float32: is something cast to float32?"),
    "dy": (hint(DY), "it is dy as it came: the derivative is left out"),
    "no_residual": (hint(A - DY), "dy is missing from it: the path around the layer is dropped"),
    "residual_twice": (hint(A + DY), "dy is in it once too often"),
    "decay": (hint(A + 1e-4 * X), "0.0001 times x is added to it"),
    "some_signs": (hint(part((slice(0, 3),), -A[:3])), "the sign is flipped in 43% of its elements"),
    "summed": (hint(np.broadcast_to(A.sum(0), A.shape)), "it is the sum over axis 0, repeated along it"),
    "averaged": (
        hint(np.broadcast_to(A.mean(1, keepdims=True), A.shape)),
        "it is the mean over axis 1, repeated along it",
    ),
    "one_row": (hint(part((3,), 5 * A[3])), "it is wrong at 3 of axis 0 only"),
    "zero_rows": (hint(part(([2, 4],), 0)), "it is wrong at 2, 4 of axis 0 only, where it is zero"),
    "one_element": (hint(part((3, 5), 9.0)), "it is wrong at 3 of axis 0 only"),
    "mean_term": (
        hint(A + rng.standard_normal((M, 1))),
        "the difference is constant along axis 1: a mean over it is missing, or one too many",
    ),
    "x_term": (
        hint(A + rng.standard_normal((M, 1)) * (X - X.mean(1, keepdims=True))),
        "the difference is a multiple of x in each row: a term with the mean of dy x is missing or wrong",
    ),
    "times_x": (hint(A * X), "it is multiplied by x once too often"),
    "no_x": (hint(A / X), "a factor x is left out"),
    "not_linear": (hint(A + X**2, thrice=3 * A + X**2), "it is not linear in the cotangent"),
    "nan": (hint(part((1, 2), np.nan)), "1 of 91 elements are not finite"),
}


@pytest.mark.parametrize("name", FITS)
def test_a_mistake_is_called_by_its_name(name):
    found, due = FITS[name]
    assert found == due if not due.startswith("the rounding") else found.endswith(due)


def test_what_fits_nothing_has_no_name():
    assert hint(rng.standard_normal((M, N))) == ""


def test_one_number_is_no_multiple_unless_the_multiple_means_something():
    assert hint(np.array(1.234), np.array(1.0)) == ""
    assert hint(np.array(1 / 7), np.array(1.0)).endswith("divided by 7, the batch size: a mean instead of a sum")


def test_a_tiny_error_is_not_taken_for_the_right_gradient():
    assert hint(A * (1 + 1e-9)) == "it is 1 + 1.0e-09 times the right value"
    assert hint(A * (1 - 1e-6)) == "it is 1 - 1.0e-06 times the right value"
    noisy = A * (1 + 1e-9 * rng.standard_normal(A.shape))
    assert "times the right value" not in hint(noisy) and "sign" not in hint(noisy)
