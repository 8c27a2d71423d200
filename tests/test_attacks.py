"""Wrong backwards that were written to get past compare are caught, and the right ones beside them pass."""

import jax
import numpy as np
import pytest

from experiments.attacks.catalogue import ATTACKS
from fnbp.comparison.code import computes_narrow, jaxpr_of, numbers_in, rules_in
from fnbp.comparison.evaluation import EndlessError, within
from fnbp.comparison.subject import fingerprint

QUICK = {  # one of each class in the quick suite; all of them are slow
    "the bias gets the mean of dz for each example",
    "off by 1e-9",
    "NaN where dy is all 0",
    "abs(gamma)",
    "abs(s)",
    "conjugate forgotten beside a real argument",
    "slope 7 of a root at x < 0",
    "a rule that is twice the slope",
    "an even batch of a layer",
    "exp wrong at x < -8",
    "between 11 and 12",
    "wrong in training",
    "a stash of the last forward",
    "x.var(1) near 3, off by 1e-6",
    "right: FlashAttention's backward, draw 1",
    "right: (x + 1e4) - 1e4",
    "a batch of 7 taken for granted",
    "dx is clipped",
    "a scale, clipped",
    "token 0 is padding",
}


def test_every_class_has_three_wrong_backwards():
    wrong = [attack.of for attack in ATTACKS if not attack.right]
    assert min(wrong.count(of) for of in wrong) >= 3


def test_the_quick_ones_exist():
    assert {attack.title for attack in ATTACKS} >= QUICK


def marked(attack):
    marks = () if attack.title in QUICK else (pytest.mark.slow,)
    return pytest.param(attack, marks=marks, id=f"{attack.of}: {attack.title}")


@pytest.mark.parametrize("attack", [marked(attack) for attack in ATTACKS])
@pytest.mark.filterwarnings("ignore")
def test_compare_sees_through_it(attack):
    said = attack.run()
    assert said.ok == attack.right, said


def test_numbers_of_a_code_are_found_with_those_of_comparisons_first():
    def f(x):
        return 0.125 * jax.numpy.clip(x, -1.5, 3.0) + jax.numpy.where(x > 7.25, x, 0.0)

    found = numbers_in(jaxpr_of(f, np.ones(3, np.float32)))
    assert set(found) == {-1.5, 3.0, 7.25, 0.125} and found[-1] == 0.125


def test_narrow_codes_and_rules_are_told(x64):
    x = np.ones(3)
    assert not computes_narrow(jaxpr_of(jax.numpy.sin, x))
    assert computes_narrow(jaxpr_of(lambda x: jax.numpy.sin(x.astype(np.float32)), x))
    assert computes_narrow(None)
    assert rules_in(jaxpr_of(jax.nn.relu, x)) and not rules_in(jaxpr_of(jax.numpy.sin, x))
    assert "stop_gradient" in rules_in(jaxpr_of(lambda x: jax.lax.stop_gradient(jax.nn.relu(x)), x))


def test_what_does_not_end_is_left_behind():
    with pytest.raises(EndlessError, match=r"did not end within 0.05 s"):
        within(0.05, lambda: __import__("threading").Event().wait(1))
    assert within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)


def test_functions_of_equal_code_differ_by_all_that_the_code_sees():
    def made(closed, default=0, *, keyword=0):
        def f(x, d=default, *, k=keyword):
            return x * closed + d + k

        return f

    assert fingerprint(made(1)) == fingerprint(made(1))
    others = [made(2), made(1, 1), made(1, keyword=1), made(np.ones(2))]
    assert len({fingerprint(f) for f in (made(1), *others)}) == 5
