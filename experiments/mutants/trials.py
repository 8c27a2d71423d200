"""Trials of a mutant: its constructor is called, an input and a target are drawn, and both checkers run."""

import ast
import inspect
import re
import time
import traceback
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np

import fnbp
from experiments.mutants.catalogue import Mutant
from experiments.mutants.code import LIFT, build
from experiments.mutants.sites import PACKAGE, file_of, files, live, owner_of
from experiments.mutants.table import FOR, INNER, TABLE, Trial
from experiments.shared.report import InputError
from fnbp.contraction import contracted

QUICK = ("given", "another")  # the first probes of compare
FIRM = ("nonfinite", "formula")  # faults that more probes do not take back
TOKENS = {"tokens": 13, "many tokens": 4_099}  # kinds of integers, and below what they are
NARROW = ("bfloat16", "float16")
DTYPES = ("float32", *NARROW, "float64")


@cache
def constructors() -> dict[str, str]:
    """The public functions that make a Layer or a Loss and hold a backward, with their file; and INNER."""
    held = set(files()) - {LIFT}
    found = dict(INNER)
    for name in dir(fnbp):
        f = getattr(fnbp, name)
        if not inspect.isfunction(f):
            continue
        file = file_of(f)
        made = getattr(inspect.signature(f).return_annotation, "__name__", "")
        if made in ("Layer", "Loss") and file in held:
            found[name] = file
    return found


def unspoilt(name: str) -> Any:
    """The library's own constructor of that name."""
    return getattr(live(constructors()[name]), name)


@cache
def uses() -> dict[str, set[str]]:
    """The top-level functions, classes and tables that mention another one, by the name of the other."""
    found: dict[str, set[str]] = {}
    for file in files():
        for top in ast.parse((PACKAGE / file).read_text()).body:
            user = top.name if isinstance(top, ast.ClassDef) else owner_of(top)
            for node in ast.walk(top) if user else ():
                if isinstance(node, ast.Name) and node.id != user:
                    found.setdefault(node.id, set()).add(user)
    return found


def users(owner: str) -> list[str]:
    """The public constructor owner, or those that use owner, a helper or a factor."""
    public = constructors()
    if owner in public or owner in FOR:
        return list(FOR.get(owner, (owner,)))
    seen, due = {owner}, [owner]
    while due:
        for name in uses().get(due.pop(), ()):
            if name not in seen:
                seen.add(name)
                due += [] if name in public else [name]
    return [name for name in public if name in seen]


def trials_of(name: str) -> tuple[Trial, ...]:
    """The trials of a public constructor; if TABLE has none, a layer that needs no arguments is called without any."""
    if name in TABLE:
        return TABLE[name]
    signature = inspect.signature(unspoilt(name))
    due = [p for p in signature.parameters.values() if p.default is p.empty and p.kind != p.VAR_KEYWORD]
    return () if due or "Loss" in str(signature.return_annotation) else (Trial(),)


def trials(owner: str) -> list[tuple[str, Trial]]:
    """The constructors and trials for a mutant of that owner. Raises: InputError if there are none."""
    found = [(name, trial) for name in users(owner) for trial in trials_of(name)]
    if not found:
        raise InputError(f"TABLE in experiments/mutants/table.py has no call of {owner}, or of what uses it")
    return found


class Subject(NamedTuple):
    """A constructor's Layer or Loss with its data."""

    made: Any
    params: Any
    x: np.ndarray
    y: Any
    state: Any = None
    ctx: fnbp.Context = fnbp.Context()

    @property
    def data(self) -> tuple:
        """The arguments of a Loss after the prediction."""
        return (self.y,) if self.ctx.mask is None else (self.y, self.ctx.mask)


def draw(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Data of a kind, in float32."""
    if kind == "labels":
        return rng.integers(0, shape[-1], shape[:-1]).astype(np.int32)
    if kind in TOKENS:
        return rng.integers(0, TOKENS[kind], shape).astype(np.int32)
    if kind == "yes or no":
        return rng.integers(-1, 2, shape).astype(np.float32)
    a = rng.random(shape) * 0.9 + 0.05 if kind in ("unit", "soft") else rng.standard_normal(shape)
    return np.asarray(a / a.sum(-1, keepdims=True) if kind == "soft" else a, np.float32)


def subject(constructor: Any, trial: Trial, dtype: str = "float32") -> Subject:
    """What the constructor makes, with data that are the same each time."""
    rng = np.random.default_rng(0)
    x = draw(trial.x, rng, trial.shape)
    x = x if trial.x in TOKENS else np.asarray(x, jnp.dtype(dtype))
    made = trial.make(constructor)
    counts = np.random.default_rng(2).random(trial.shape[: trial.mask]) < 0.7 if trial.mask else None
    if not isinstance(made, fnbp.Layer):  # a Loss, of a class of its own where its module is fresh
        return Subject(fnbp.Loss(*made), None, x, draw(trial.y, rng, trial.shape), None, fnbp.Context(mask=counts))
    params, state = made.init(jax.random.key(0), x)
    wanted = jnp.dtype(dtype)
    moved = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape) / 2, wanted), params)
    training = fnbp.Context(jax.random.key(1), counts, train=True)
    if jax.tree.leaves(state) and not trial.train:
        state = made.forward(moved, state, jnp.asarray(x), training)[1]
    return Subject(made, moved, x, None, state, training if trial.train else fnbp.Context(mask=counts))


# --- the two checkers ---


def compared(s: Subject, **options: Any) -> fnbp.Report:
    """Run fnbp.compare on a subject: a Layer at its x, or a Loss behind the identity."""
    if isinstance(s.made, fnbp.Loss):
        return fnbp.compare(fnbp.identity(), s.x, loss=s.made, y=s.y, ctx=s.ctx, **options)
    return fnbp.compare(s.made, s.x, params=s.params, state=s.state, ctx=s.ctx, **options)


def alone(s: Subject) -> fnbp.Report:
    """Run fnbp.compare on a subject as a function and its vjp, at two probes: far less is compiled."""
    made = s.made
    if isinstance(made, fnbp.Loss):

        def loss(p):
            return jnp.sum(made.forward(p, *s.data)[0])

        def vjp_of_loss(args, dy):
            d = made.backward(made.forward(args[0], *s.data)[1])
            return ((dy * d).astype(d.dtype),)

        return fnbp.compare(loss, s.x, vjp=vjp_of_loss, probes=QUICK, transforms=())
    net = fnbp.map_layers(contracted(fnbp.total), made)

    def layer(params, x):
        return made.forward(params, s.state, x, s.ctx)[0]

    def vjp_of_layer(args, dy):
        return net.backward(args[0], net.forward(args[0], s.state, args[1], s.ctx)[2], dy)

    return fnbp.compare(layer, s.params, s.x, vjp=vjp_of_layer, probes=QUICK, transforms=())


def fault(s: Subject, label: str) -> tuple[str, str]:
    """The kind of the first fault that compare finds, "" for none, and its hint.

    A wrong formula is wrong however it is asked, so alone is asked first; whatever else it says, the complete compare
    has the word.
    """
    try:
        first = alone(s).first_fault
        if first is not None and first.kind in FIRM:
            return first.kind, first.hint
    except Exception:  # the complete one will meet it again
        pass
    try:
        first = compared(s).first_fault
    except Exception as error:
        return ("raises", repr(error)[:200]) if raised_by(error, label) else ("ERROR", traceback.format_exc()[-600:])
    return (first.kind, first.hint) if first else ("", "")


def raised_by(error: BaseException, label: str) -> bool:
    """True if the error, or a cause of it, comes from the code of that label, or compare says what that returns."""
    if isinstance(error, TypeError) and re.match("compare: what .* returns must be", str(error)):
        return True
    while error is not None:
        frames = traceback.walk_tb(error.__traceback__)
        if any(frame.f_code.co_filename == label for frame, _ in frames):
            return True
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return False


def peer(s: Subject) -> str:
    """The complaint of jax.test_util.check_grads at its defaults, or ""."""
    try:
        if isinstance(s.made, fnbp.Loss):
            jax.test_util.check_grads(
                partial(of_prediction(s.made), s.data), (jnp.asarray(s.x),), order=1, modes=["rev"]
            )
        else:
            jax.test_util.check_grads(*differentiable(s, s.params, jnp.asarray(s.x)), order=1, modes=["rev"])
    except Exception as error:
        return type(error).__name__
    return ""


@cache
def fair(name: str, trial: Trial) -> bool:
    """False if check_grads calls the library itself wrong: then its word on a mutant counts for nothing."""
    return not peer(subject(unspoilt(name), trial))


def of_prediction(loss: fnbp.Loss) -> Callable[[Any, Any], Any]:
    """The losses of the examples as a jax.custom_vjp of (data, prediction)."""

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def losses_of(data, p):
        return loss.forward(p, *data)[0]

    def backward(data, res, g):
        d = loss.backward(res)
        return ((g.reshape(-1, *[1] * (d.ndim - 1)) * d).astype(d.dtype),)

    losses_of.defvjp(lambda data, p: loss.forward(p, *data), backward)
    return losses_of


# --- one mutant ---


def judged_task(task: tuple[Mutant, bool]) -> dict[str, Any]:
    """Judge one mutant in a worker process, which cannot find what stands in the __main__.py of a package."""
    return judged(*task)


def judged(mutant: Mutant, with_peer: bool = True) -> dict[str, Any]:
    """Ask both checkers about a mutant, in float32, then in other dtypes if it survives. Returns: a line of JSON."""
    began = time.perf_counter()
    pairs = trials(mutant.owner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = {name: build(mutant, constructors()[name], name) for name, _ in pairs}
            kind, hint, where = verdict(made, pairs, mutant.id)
            other = ""
            for name, trial in pairs if with_peer else ():
                other = other or (peer(subject(made[name], trial)) if fair(name, trial) else "")
            apart = None if kind else max(distance(made[name], name, trial) for name, trial in pairs)
        except Exception as error:  # its forward raises, or what was built here does
            kind = "raises" if raised_by(error, mutant.id) else "ERROR"
            hint, where, other, apart = repr(error)[:300], "", "raises" if kind == "raises" else "", None
    return {
        "id": mutant.id, "site": mutant.site, "owner": mutant.owner, "class": mutant.kind, "code": mutant.code,
        "fault": kind, "hint": hint, "in": where, "peer": other, "apart": apart,
        "seconds": round(time.perf_counter() - began, 3),
    }  # fmt: skip


def verdict(made: dict[str, Any], pairs: list[tuple[str, Trial]], label: str) -> tuple[str, str, str]:
    """The kind and hint of the first fault over all trials, and the dtype in which it was found."""
    for dtype in DTYPES:
        for name, trial in pairs:
            with jax.enable_x64(dtype == "float64"):
                kind, hint = fault(subject(made[name], trial, dtype), label)
            if kind:
                return kind, hint, dtype
    return "", "", ""


def distance(constructor: Any, name: str, trial: Trial) -> float:
    """How far the cotangents of a survivor are from the original's, relatively, the worst of points near and far."""
    worst = 0.0
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        for size in (1.0, 0.0, 1e-3, 30.0, 1e4) if trial.x == "normal" else (1.0,):
            one, other = (subject(f, trial) for f in (constructor, unspoilt(name)))
            x = np.asarray(one.x * size, np.float64) if trial.x == "normal" else one.x
            dy = rng.standard_normal(999)
            ours, theirs = (jax.tree.leaves(cotangents(s, x, dy)) for s in (one, other))
            for a, b in zip(ours, theirs, strict=True):
                a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
                off = np.linalg.norm(a - b)
                worst = max(worst, float(off / (np.linalg.norm(b) or 1.0))) if np.isfinite(off) else np.inf
    return worst


def cotangents(s: Subject, x: np.ndarray, dy: np.ndarray) -> Any:
    """The cotangents that the backward returns at x in float64, with its factors summed."""
    if isinstance(s.made, fnbp.Loss):
        return s.made.backward(s.made.forward(jnp.asarray(x), *map(jnp.asarray, s.data))[1])
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), s.params)
    f, args = differentiable(s, params, jnp.asarray(x))
    y, pull = jax.vjp(f, *args)
    return pull(jnp.resize(jnp.asarray(dy, y.dtype), y.shape))


def differentiable(s: Subject, params: Any, x: jax.Array) -> tuple[Callable, tuple]:
    """A Layer as a function with its manual backward as VJP, and the arguments by which it can be differentiated."""
    apply = fnbp.to_jax(s.made, state=s.state, ctx=s.ctx)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return apply, (params, x)
    return lambda params: apply(params, x), (params,)


# --- the library itself ---


def original_tasks() -> list[tuple[str, int, str]]:
    """The constructor, trial and dtype of everything that the mutants are tried on."""
    return [(name, i, dtype) for name in constructors() for i, _ in enumerate(trials_of(name)) for dtype in DTYPES]


def original(task: tuple[str, int, str]) -> dict[str, Any]:
    """Ask both checkers about the library's own constructor, on one trial."""
    name, i, dtype = task
    with jax.enable_x64(dtype == "float64"):
        s = subject(unspoilt(name), trials_of(name)[i], dtype)
        report = compared(s)
    words = "" if report.ok else f"{report.first_fault}"
    return {"name": name, "trial": i, "dtype": dtype, "fault": words, "peer": peer(s) if dtype == "float32" else ""}
