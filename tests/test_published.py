"""The published backwards: what is called right is right in float64, and compare finds what is recorded."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.published import __main__ as published
from experiments.published.__main__ import ENTRIES
from experiments.shared import report

pytestmark = pytest.mark.slow  # compare on every entry

NAMED = {entry.name: entry for entry in ENTRIES}
FAST: Any = {"xla_backend_optimization_level": 0}  # it compiles in half the time
KINDS = {"ok", "convention", "formula", "precision", "nonfinite", "structure"}


def both(entry, args, dy):
    """Published and automatic cotangents of the floating arguments."""
    _, pull = jax.vjp(entry.plain, *args)
    floating = [i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.floating)]
    manual, automatic = entry.backward(args, dy), pull(dy)
    return [manual[i] for i in floating], [automatic[i] for i in floating]


@pytest.fixture(scope="module")
def in_float64():
    """Both sides of every entry, in float64, of a random dy: one compilation for all."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        points = {}
        for entry in ENTRIES:
            args = tuple(map(jnp.asarray, entry.cast(np.float64)))
            y = jax.eval_shape(entry.plain, *args)
            points[entry.name] = args, jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), y)
        every = jax.jit(lambda points: {name: both(NAMED[name], *point) for name, point in points.items()})
        compiled = every.lower(points).compile(compiler_options=FAST)
        return jax.tree.map(np.asarray, compiled(points))


def error(manual, automatic):
    """The largest difference over the largest automatic value."""
    size = max(np.max(abs(a)) for a in automatic)
    return max(np.max(abs(m - a)) for m, a in zip(manual, automatic, strict=True)) / (size or 1.0)


@pytest.mark.parametrize("name", [entry.name for entry in ENTRIES if entry.right])
def test_right_forms_are_right_in_float64(name, in_float64):
    manual, automatic = in_float64[name]
    for m, a in zip(manual, automatic, strict=True):
        assert m.dtype == np.float64 and m.shape == a.shape
    assert error(manual, automatic) <= (1e-6 if name == "fixed point, steps below 1e-6" else 1e-9)


@pytest.mark.parametrize("name", [entry.name for entry in ENTRIES if not entry.right])
def test_other_forms_are_not(name, in_float64):
    assert not error(*in_float64[name]) <= 1e-4


def test_the_record_is_complete():
    assert len(NAMED) == len(ENTRIES)
    for entry in ENTRIES:
        assert (entry.vjp is None) != (entry.reference is None), entry.name
        wanted = {entry.expected, entry.bfloat16 or "ok"}
        assert wanted <= KINDS, entry.name
        if entry.deliberate or wanted <= {"ok", "convention"}:
            assert not entry.mended, entry.name
        else:
            assert {NAMED[entry.mended].expected, NAMED[entry.mended].bfloat16 or "ok"} == {"ok"}, entry.name


QUICK = {"probes": ("given", "large", "huge"), "transforms": ()}


@pytest.mark.parametrize(
    ("name", "dtype", "hint"),
    [
        ("dense, dW and db over m", np.float32, "divided by 11, the batch size"),
        ("binary cross-entropy, da then dz", np.float32, "are not finite"),
        ("log(1 + e^x), 1 - 1 / (1 + e^x)", np.float32, "does something cancel, or is it cast down?"),
        ("layer norm, in float32 throughout", jnp.bfloat16, "got float32[11, 7], expected bfloat16[11, 7]"),
        ("straight-through, beside its own rule", np.float32, "differences of the forward give another slope"),
        ("RMS norm with eps", np.float32, ""),
    ],
)
def test_compare_finds_what_is_recorded(name, dtype, hint):
    found = published.find(NAMED[name], dtype, **QUICK)
    assert found.as_expected, (found.verdict, found.told)
    assert hint in found.told and bool(hint) == bool(found.told)


def test_the_survey_runs_and_tells_a_surprise(tmp_path, monkeypatch, capsys):
    entry = replace(NAMED["gradient reversal"], options=QUICK, bfloat16=None)
    monkeypatch.setattr(published, "ENTRIES", (entry,))
    settings = published.Settings(only="reversal", out=tmp_path)
    assert published.main(settings) == 0
    assert "the sign is flipped" in capsys.readouterr().out
    measured = json.loads((tmp_path / "result.json").read_text())["measured"]
    assert measured["entries"] == 1 and measured["not_as_expected"] == []
    assert measured["findings"][0]["found"][0]["report"]["ok"] is False
    monkeypatch.setattr(published, "ENTRIES", (replace(entry, expected="ok"),))
    assert published.main(settings) == 1
    assert "FORMULA, not ok" in capsys.readouterr().out


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(report.InputError, match="is in no name"):
        published.main(published.Settings(only="nowhere", out=tmp_path))


def test_help():
    root = Path(__file__).parents[1]
    words = [sys.executable, "-m", "experiments.published", "--help"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--only" in done.stdout
