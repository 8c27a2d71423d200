"""Seeded random cases against every constructor: python -m tests.fuzz --cases 5000 --seed 0.

A case is Python source: a layer, its input, key, params, state and context, mostly sensible, with at most a few things
that are not (tests/fuzz_cases.py). It either agrees with jax.vjp, or is refused by a ValueError or TypeError that names
the layer. Anything else is a fault: raw, another exception; unnamed; accepted, nonsense or a result of NaN or of
another form; wrong, a gradient; slow. What does not fit into memory is no fault.
"""

import argparse
import json
import linecache
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

if __name__ in ("__main__", "__mp_main__"):  # compiling is most of the work
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import jax
import jax.numpy as jnp
import numpy as np

import fnbp
from fnbp.factor import Factor, Mixed
from tests.fuzz_cases import NAMES, SAME, TABLE, Case, draw

SOURCES = "sources"
SECONDS = 20  # a case that takes longer is a fault
FAULTS = ("raw", "unnamed", "accepted", "wrong", "slow")
TOLERANCE = {"float32": 1e-3, "float64": 1e-9}


class Outcome(NamedTuple):
    """How a case ended: agrees, refused, memory, or one of FAULTS."""

    kind: str
    stage: str = ""
    message: str = ""


class Found(Exception):  # noqa: N818 (it is an outcome)
    """A fault that no exception of the library says."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Slow(BaseException):
    """The time is up; no except Exception of the library or of JAX stops it."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Slow is raised inside after that many seconds of the processor, in the main thread; other work costs none."""

    def stop(*_):
        raise Slow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# --- one case ---


def examine(case: Case, seconds: float = SECONDS) -> Outcome:
    """Run a case, and say how it ended."""
    stages: list[str] = []
    started = time.perf_counter()
    try:
        with at_most(seconds), warnings.catch_warnings(action="ignore"), jax.enable_x64(case.dtype == "float64"):
            for stage in (of_loss if case.target else of_layer)(case):
                stages.append(stage)
    except Slow:
        pass
    except Found as found:
        return Outcome(found.kind, stages[-1], str(found))
    except Exception as error:
        if stages[-1] == SOURCES:  # the fuzzer's own mistake
            raise
        return Outcome(*told(error, case, stages[-1]))
    slow = time.perf_counter() - started > seconds
    return Outcome("slow", stages[-1], f"more than {seconds} s") if slow else Outcome("agrees", stages[-1])


def told(error: Exception, case: Case, stage: str) -> tuple[str, str, str]:
    """What an exception says of a case: kind, stage, message."""
    text = " / ".join([str(error).strip(), *getattr(error, "__notes__", ())])
    if isinstance(error, MemoryError) or re.search("RESOURCE_EXHAUSTED|Out of memory", text):
        return "memory", stage, text
    plain = isinstance(error, (ValueError, TypeError)) and type(error).__module__ == "builtins"
    names = "|".join(map(re.escape, names_of(case)))
    named = re.search(rf"(?<![\w.])(?:{names})(?=[:(\[])|\bin (?:{names})\b", text)
    if plain and named:
        return "refused", stage, text
    return "unnamed" if plain and said(error) else "raw", stage, f"{type(error).__name__}: {text}"


def names_of(case: Case) -> set[str]:
    """What an error may call the layer: its constructors, and its name up to the bracket."""
    names = {name.rpartition(".")[2] for name in re.findall(r"(?:fnbp\.|^)([\w.]+)\(", case.layer)}
    names |= set(re.findall(r"name='(\w+)'", case.layer))
    try:
        return names | {source(case.layer).name.partition("(")[0]}
    except Exception:
        return names


def said(error: Exception) -> bool:
    """True where the library itself raised the error, in so many words."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return linecache.getline(last.filename, last.lineno).lstrip().startswith("raise")


def of_layer(case: Case) -> Iterator[str]:
    """Run a layer through its stages, each yielded before it begins. Raises Found."""
    yield SOURCES
    key, x_init, x, ctx = (source(text) for text in (case.key, case.init_x or case.x, case.x, case.ctx))
    yield "constructor"
    layer = source(case.layer)
    yield "init"
    p, s = made = layer.init(key, x_init)
    yield SOURCES
    p, s = source(case.params, p=p), source(case.state, s=s)
    marks = [mark for mark in case.marks if mark != "params" or forms(p) != forms(made[0])]
    yield "forward"
    y, s_new, res = layer.forward(p, s, x, ctx)
    if marks:
        raise Found("accepted", f"{', '.join(marks)} is nonsense")
    if not all(map(is_array, jax.tree.leaves(x))):
        return
    check_forms(case, x, y)
    check_alike("the new state", s_new, s)
    check_finite("y", (y, s_new), (x, p, s))
    yield "backward"
    dy = jax.tree.map(cotangent, y)
    factors, dx = layer.backward(p, res, dy)
    yield "total"
    grads = jax.tree.map(lambda f: f.total() if is_factor(f) else f, factors, is_leaf=is_factor)
    check_finite("the gradient", (grads, dx), (x, p, s))
    yield "jax.vjp"
    p, x = jax.tree.map(jnp.asarray, (p, x))
    check_gradient(case, lambda p, x: layer.forward(p, s, x, ctx)[0], (p, x), (grads, dx), dy)
    if case.norms and norms_are_due(case, x, y, factors):
        yield "per_example_norms"
        check_norms(case, layer, p, s, x, ctx)


def of_loss(case: Case) -> Iterator[str]:
    """Run a loss through its stages, each yielded before it begins. Raises Found."""
    yield SOURCES
    x, target = source(case.x), source(case.target)
    yield "constructor"
    loss = source(case.layer)
    yield "check"
    loss.check(x, target)
    yield "forward"
    losses, res = loss.forward(x, target)
    if case.marks:
        raise Found("accepted", f"{', '.join(case.marks)} is nonsense")
    if not is_array(x) or not is_array(target):
        return
    if losses.shape != x.shape[:1]:
        raise Found("accepted", f"losses have shape {losses.shape}, x {x.shape}")
    check_finite("the losses", losses, (x, target))
    yield "backward"
    dx = loss.backward(res)
    check_finite("dprediction", dx, (x, target))
    yield "jax.vjp"
    x = jnp.asarray(x)
    check_gradient(case, lambda x: loss.forward(x, target)[0], (x,), (dx,), jnp.ones_like(losses))


def source(text: str, **more: Any) -> Any:
    """What a source of a case stands for."""
    return eval(text, NAMES | more)


def is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))


def is_factor(f: Any) -> bool:
    return isinstance(f, Factor)


def floating(a: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(a), jnp.floating)


def cotangent(y: jax.Array) -> Any:
    """A random cotangent of y."""
    if not floating(y):
        return y
    return jnp.asarray(np.random.default_rng([*y.shape, 1]).normal(size=y.shape), y.dtype)


def form(a: Any) -> tuple[str, tuple[int, ...]]:
    """dtype and shape, in the dtypes that JAX has."""
    return str(jax.dtypes.canonicalize_dtype(jnp.result_type(a))), jnp.shape(a)


def forms(tree: Any) -> tuple:
    """The structure of a tree, and the forms of its leaves."""
    return jax.tree.structure(tree), [form(a) for a in jax.tree.leaves(tree)]


def check_forms(case: Case, x: Any, y: Any) -> None:
    """Found where y is of another dtype, or shape, than a layer of that kind should return."""
    if is_array(x) and is_array(y) and floating(x) and form(y)[0] != form(x)[0] and "bent" not in case.params:
        raise Found("accepted", f"x is {form(x)[0]}, y is {form(y)[0]}")
    if is_array(x) and re.match(rf"fnbp\.({'|'.join(SAME)})\(", case.layer) and jnp.shape(y) != jnp.shape(x):
        raise Found("accepted", f"x has shape {x.shape}, y has shape {y.shape}")


def check_alike(what: str, new: Any, old: Any) -> None:
    """Found unless both trees are of the same forms."""
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise Found("accepted", f"{what} has another structure than before")
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        if form(a) != form(b):
            raise Found("accepted", f"{what} is {form(a)}, was {form(b)}")


def check_finite(what: str, made: Any, of: Any) -> None:
    """Found where NaN or infinity is made of finite numbers; narrow dtypes may overflow."""
    floats = [np.asarray(a) for a in jax.tree.leaves((made, of)) if floating(a)]
    if any(a.dtype not in (np.float32, np.float64) for a in floats):
        return
    if all(np.isfinite(a).all() for a in jax.tree.leaves(of) if floating(a)):
        for a in jax.tree.leaves(made):
            if floating(a) and not np.isfinite(np.asarray(a)).all():
                raise Found("accepted", f"{what} is not finite")


def check_gradient(case: Case, f: Any, args: tuple, own: tuple, dy: Any) -> None:
    """Found where what a backward returned is not the vjp of f: in the narrow dtypes, not of its forms."""
    if any(jnp.issubdtype(a.dtype, jnp.complexfloating) for a in jax.tree.leaves(args)):
        return
    exact = all(floating(a) is False or str(a.dtype) in TOLERANCE for a in jax.tree.leaves(args))
    exact = exact and case.dtype in TOLERANCE and not re.search("float16|cast", case.layer)
    due = jax.vjp(f, *args)[1](dy) if exact else args
    pairs: list[tuple[Any, Any]] = []

    def pair(a, b):
        if a is not None and floating(a):
            pairs.append((a, b))

    try:
        jax.tree.map(pair, due, own, is_leaf=lambda a: a is None)
    except (ValueError, TypeError) as error:
        raise Found("wrong", f"the gradient is no tree of the arguments: {str(error).splitlines()[0]}") from error
    for a, b in pairs:
        if not is_array(b) or form(a) != form(b):
            raise Found("accepted", f"a gradient is {form(b) if is_array(b) else type(b)}, {form(a)} is due")
    if exact and pairs:
        try:
            compare("the gradient", pairs, TOLERANCE["float64" if case.dtype == "float64" else "float32"])
        except Found as found:
            if not within_rounding(f, args, dy, due, pairs):
                raise found


def within_rounding(f: Any, args: tuple, dy: Any, due: tuple, pairs: list[tuple[Any, Any]]) -> bool:
    """Whether the gradient of jax.vjp itself moves by about as much if its arguments move by one rounding."""
    rng = np.random.default_rng(0)

    def nudged(a):
        return a * (1 + float(jnp.finfo(a.dtype).eps) * rng.choice([-1, 1], a.shape)) if floating(a) else a

    moved = jax.vjp(f, *jax.tree.map(nudged, args))[1](dy)
    apart = [
        abs(np.asarray(a) - np.asarray(b)).max()
        for a, b in zip(jax.tree.leaves(due), jax.tree.leaves(moved), strict=True)
        if floating(a) and a.size
    ]
    off = [abs(np.asarray(a) - np.asarray(b)).max() for a, b in pairs if a.size]
    return max(off) <= 64 * max(apart)


def compare(what: str, pairs: Iterable[tuple[Any, Any]], tolerance: float) -> None:
    """Found where two numbers differ by more than that, of the largest there is."""
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in pairs if a.size]
    if not all(np.isfinite(a).all() for a, _ in pairs):
        return
    largest = max([1.0, *(float(abs(a).max()) for a, _ in pairs)])
    off = max([0.0, *(float(abs(a - b).max()) for a, b in pairs)])
    if not off <= tolerance * largest:
        raise Found("wrong", f"{what} is off by {off / largest:.1e} of the largest")


def norms_are_due(case: Case, x: Any, y: Any, factors: Any) -> bool:
    """True where the examples are apart, and each has a gradient."""
    of = jax.tree.leaves(factors, is_leaf=is_factor)
    apart = all(is_factor(f) and not isinstance(f, Mixed) for f in of) and "batch_norm" not in case.layer
    sizes = {a.shape[:1] for a in jax.tree.leaves((x, y))}
    alone = is_array(y) and y.ndim > 1 and floating(y) and len(sizes) == 1 and sizes != {(0,)}
    return bool(of) and apart and alone and case.dtype in TOLERANCE and not re.search("from_jax|cast|res", case.layer)


def check_norms(case: Case, layer: fnbp.Layer, p: Any, s: Any, x: Any, ctx: fnbp.Context) -> None:
    """Found where the norm of one example's gradient is not that of total."""
    x, mask = jax.tree.map(lambda a: a[:1], (x, ctx.mask))
    ctx = fnbp.Context(ctx.key, mask, ctx.train)
    target = jnp.zeros_like(layer.forward(p, s, x, ctx)[0])
    loss = fnbp.half_squared_error()
    norms = fnbp.per_example_norms(layer, loss)(p, s, x, target, ctx)
    _, grads = fnbp.value_and_grad(layer, loss)(p, s, x, target, ctx)
    due = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    compare("the norm", [(due[None], norms)], TOLERANCE[case.dtype])


# --- the command ---


def run(task: tuple[int, int, str]) -> dict[str, Any]:
    """Draw and examine one case."""
    started = time.perf_counter()
    name, case = draw(*task)
    outcome = examine(case)
    seconds = time.perf_counter() - started
    return {"index": task[1], "constructor": name, **outcome._asdict(), "line": case.line(), "seconds": seconds}


def keep_compiled(folder: str) -> None:
    """What one worker, or an earlier run, has compiled the others load."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def results(tasks: list[tuple[int, int, str]], workers: int) -> Iterator[dict[str, Any]]:
    """Of every task, as they are done."""
    folder = str(Path(tempfile.gettempdir(), f"fnbp_fuzz_{os.getuid()}"))
    if workers < 2:
        keep_compiled(folder)
        yield from map(run, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers, keep_compiled, (folder,)) as pool:
        yield from pool.imap_unordered(run, tasks, chunksize=8)


def group(result: dict[str, Any]) -> tuple[str, str, str]:
    """What makes two faults the same: kind, constructor and the first words of the message."""
    words = re.sub(r"[\d.]+", "#", result["message"]).split()
    return result["kind"], result["constructor"], " ".join(words[:5])


def report(done: list[dict[str, Any]]) -> None:
    """Print counts by constructor, and each group of faults with its shortest reproduction."""
    kinds = ("agrees", "refused", "memory", *FAULTS)
    print(f"{'':24}" + "".join(f"{kind:>9}" for kind in kinds) + "  seconds")
    for name in (*TABLE, "all"):
        of = [one for one in done if name in (one["constructor"], "all")]
        counts = Counter(one["kind"] for one in of)
        if of:
            row = "".join(f"{counts[kind] or '':>9}" for kind in kinds)
            print(f"{name:24}{row}{sum(one['seconds'] for one in of):9.1f}")
    groups: dict[tuple, list] = {}
    for one in done:
        if one["kind"] in FAULTS:
            groups.setdefault(group(one), []).append(one)
    for (kind, name, _), faults in sorted(groups.items()):
        least = min(faults, key=lambda one: len(one["line"]))
        message = " ".join(least["message"].split())
        print(f"\n{kind} {name}, {len(faults)} times, at {least['stage']}, index {least['index']}: {message[:200]}")
        print(f"    {least['line']}")


def main(arguments: list[str] | None = None) -> int:
    """The command. 1 where there are faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, default=1, help="every so many indices")
    parser.add_argument("--only", default="", help="a regular expression of constructors; it changes what is drawn")
    parser.add_argument("--index", type=int, help="one case alone, with its traceback")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file for all results")
    options = parser.parse_args(arguments)
    if options.index is not None:
        return alone(options.seed, options.index, options.only)
    started = time.perf_counter()
    indices = range(0, options.cases, options.step)
    done = list(results([(options.seed, i, options.only) for i in indices], options.workers))
    done.sort(key=lambda one: one["index"])
    report(done)
    print(f"\n{len(done)} cases in {time.perf_counter() - started:.0f} s")
    if options.out:
        options.out.write_text(json.dumps(done, indent=1))
    return int(any(one["kind"] in FAULTS for one in done))


def alone(seed: int, index: int, only: str) -> int:
    """Print one case: its line, its outcome, and what it raised."""
    name, case = draw(seed, index, only)
    print(f"{name}\n{case}\n\nfrom tests.fuzz_cases import *\n{case.line()}\n")
    try:
        with jax.enable_x64(case.dtype == "float64"):
            for stage in (of_loss if case.target else of_layer)(case):
                print(stage)
    except Exception:
        traceback.print_exc(file=sys.stdout)
    outcome = examine(case)
    print(outcome)
    return int(outcome.kind in FAULTS)


if __name__ == "__main__":
    sys.exit(main())
