"""Seeded random losses for fnbp.opened, held against vmap(grad): python -m tests.fuzz_losses --cases 1000 --seed 0.

A program is Python source: a loss of one example, params and a batch. fnbp.opened either agrees with JAX, in what
per_example and one more contraction make of it, or refuses by a ValueError or TypeError that names a parameter, or a
primitive and its line. Anything else is a fault: wrong, another number; raw, another exception; unnamed, a refusal that
does not say where; slow; crash, of the process. What JAX itself refuses counts apart.

Each program is written down as it is done, in a .jsonl beside `--out`; Ctrl-C reports on those, `--resume` goes on.
`--jax` runs JAX alone; `--index 7 --shrink` runs one program, and prints the smallest that has the same fault.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import queue
import re
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if __name__ in ("__main__", "__mp_main__"):  # compiling is most of the work
    FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    if importlib.metadata.version("jax").startswith("0.10."):
        FAST += " --xla_cpu_use_fusion_emitters=false"  # later versions have nothing else, and refuse the option
    os.environ.setdefault("XLA_FLAGS", FAST)

import jax
import jax.numpy as jnp
import numpy as np

import fnbp
from tests.fuzz import Found, Outcome, Slow, at_most
from tests.fuzz_losses_loops import step
from tests.fuzz_losses_ops import einsum, matmul, pair, table
from tests.fuzz_losses_parts import Program, Root, Scope, Value, names, render
from tests.fuzz_losses_smaller import alike, shrunk

LIBRARY = Path(fnbp.__file__).parent
SECONDS = 90
TURNS = 100  # programs a process
FAULTS = ("wrong", "raw", "unnamed", "slow", "crash")
Task = tuple[int, int, bool]
TOLERANCE = {"float64": 1e-10, "float32": 3e-4, "bfloat16": 5e-2}
NARROW = ("jax.nn.dot_product_attention",)  # which take their softmax in float32, of float64 too
SECOND = {  # what each contraction makes of the gradients of all examples
    "total": lambda g: g.mean(0),  # the gradient of the mean loss
    "sq_norms": lambda g: (g**2).sum(tuple(range(1, g.ndim))),
    "second_moment": lambda g: (g**2).sum(0),
    "gram": lambda g: g.reshape(len(g), -1) @ g.reshape(len(g), -1).T,
}

# --- drawing ---


def draw(rng: np.random.Generator, most: int = 11) -> Program:
    """A random loss, of 3 lines to that many and one, and the lines within them."""
    root = Root(rng, m=int(rng.integers(1, 4)))
    m, roll = Scope(root), rng.random()
    root.dtype = "float32" if roll < 0.05 else "mixed" if roll < 0.13 else "float64"
    root.loosest = {"mixed": "bfloat16"}.get(root.dtype, root.dtype)
    m.choose((pair, einsum, matmul, table))(m)
    for _ in range(m.whole(2, most)):
        step(m)
    if not m.lines:
        pair(m)
    terms = [term(m, v) for v in ends(m)]
    if m.chance(0.2):
        w = m.get("P", m.dims(m.whole(0, 2)))
        terms.append(m.choose((f"0.1 * jnp.sum({w} ** 2)", f"jnp.vdot({w}, {w})", f"jnp.sum(jnp.exp(-({w} ** 2)))")))
    if m.chance(0.12):
        terms.append(str(m.get("P", ())))
    if m.chance(0.01):
        terms = [str(m.get("P", ()))]
    if root.dtype == "mixed":
        terms = [f"({one}).astype('float32')" for one in terms]
    used = names("\n".join([*render(m.lines), *terms]))
    leaves = {name: text for name, text in root.leaves.items() if name in used or m.chance(0.05)}
    arguments = {name: text for name, text in root.arguments.items() if name in used}
    if not any(name.startswith("w") for name in leaves):
        leaves["w0"] = "arr(0, (2,))"
    arguments = arguments or {"x0": f"arr(0, {(root.m, 2)})"}
    if m.chance(0.02):
        leaves["key"] = "jax.random.key(3)"
        w = next(name for name in leaves if name.startswith("w"))
        terms.append(f"jnp.sum(jax.random.normal(key, {w}.shape) * {w})")
    form = m.choose(("dict", "dict", "dict", "tuple", "nested") + ("bare",) * 9 * (len(leaves) == 1))
    second, packed = m.choose([*SECOND]), m.chance(0.12)
    tags = tuple(dict.fromkeys(root.tags))
    lines, jit = m.lines, m.chance(0.9)
    if root.loosest == "float64" and any(name in text for text in render(lines) for name in NARROW):
        root.loosest = "float32"
    return Program(lines, terms, leaves, arguments, form, packed, root.dtype, root.loosest, second, jit, tags)


def ends(m: Scope) -> list[Value]:
    """The values that the loss adds up: those that nothing else reads, but for a few that stay dead, and some more."""
    read = names("\n".join(text.partition(" = ")[2] or text for text in render(m.lines)))
    loose = [v for v in m.own if v.text not in read and m.chance(0.9)]
    more = [v for v in m.own if v.text in read and m.chance(0.1)]
    return loose + more or m.own[-1:]


def term(m: Scope, v: Value) -> str:
    """A smooth number that a value is worth."""
    s, n = m.soft(v), v.size
    if not v.shape:
        return m.choose((str(v), str(s), f"{s} ** 2"))
    c = f"arr({n}, {v.shape})"
    return m.choose((
        f"jnp.sum({s})", f"jnp.sum({s} ** 2)", f"jnp.mean(jnp.sin({v}))", f"jnp.sum(jnp.tanh({v}) * {c})",
        f"jax.nn.logsumexp({s})", f"jnp.sqrt(1 + jnp.sum({s} ** 2))", f"jnp.vdot({s}, {c})", f"jnp.max({s} + {c})",
        f"-jax.nn.log_softmax({s}.reshape(-1))[{m.index(n)}]", f"jnp.linalg.norm(1.5 + {s})",
    ))  # fmt: skip


def drawn(seed: int, index: int) -> Program:
    return draw(np.random.default_rng([seed, index]))


# --- one program ---


def is_real(a: Any) -> bool:
    return jnp.issubdtype(a.dtype, jnp.inexact)


def direct(loss: Callable, params: Any, batch: tuple) -> tuple[Any, list[Any]]:
    """Losses and gradients of all examples by JAX, of the leaves that have one."""
    of, real = of_real(loss, params)
    return jax.jit(jax.vmap(jax.value_and_grad(of), (None, *[0] * len(batch))))(real, *batch)


def of_mean(loss: Callable, params: Any, batch: tuple) -> list[Any]:
    """The gradients of the mean loss by JAX."""
    of, real = of_real(loss, params)
    return jax.jit(jax.grad(lambda real: jnp.mean(jax.vmap(lambda *example: of(real, *example))(*batch))))(real)


def of_real(loss: Callable, params: Any) -> tuple[Callable, list[Any]]:
    """The loss as a function of the leaves that have a gradient, and these leaves."""
    leaves, tree = jax.tree.flatten(params)

    def of(chosen, *example):
        left = iter(chosen)
        return loss(tree.unflatten([next(left) if is_real(a) else a for a in leaves]), *example)

    return of, [a for a in leaves if is_real(a)]


def examine(program: Program, seconds: float = SECONDS, jax_alone: bool = False, tell=lambda stage: None) -> Outcome:
    """Run a program, and say how it ended; tell: what is told of each stage before it begins."""
    stage, params = "source", None
    try:
        with at_most(seconds), warnings.catch_warnings(action="ignore"), jax.enable_x64(program.dtype == "float64"):
            values = program.run()
            loss, params, batch = values["loss"], values["params"], values["batch"]
            tell(stage := "jax")
            losses, due = jax.block_until_ready(direct(loss, params, batch))
            if jax_alone:
                return Outcome("equal", stage, summary(due))
            for stage in ("per_example", program.second):
                tell(stage)
                check(program, stage, loss, params, batch, losses, due)
    except Slow:
        return Outcome("slow", stage, f"more than {seconds} s")
    except Found as found:
        return Outcome(found.kind, stage, str(found))
    except Exception as error:
        if stage in ("source", "jax"):
            return Outcome("jax", stage, f"{type(error).__name__}: {str(error)[:300]}")
        return Outcome(told(error, program, params), stage, f"{type(error).__name__}: {error}")
    return Outcome("equal", stage)


def check(program: Program, name: str, loss: Callable, params: Any, batch: tuple, losses: Any, due: list[Any]) -> None:
    """Found where fnbp.opened with the contraction of that name is not what is due."""
    opened = fnbp.opened(loss, contract=getattr(fnbp, name))
    made = (jax.jit(opened) if program.jit else opened)(params, *batch)
    leaves, tree = jax.tree.flatten(params)
    own = [g for g, a in zip(tree.flatten_up_to(made[1]), leaves, strict=True) if is_real(a)]
    of = SECOND.get(name, lambda g: g)
    tolerance = TOLERANCE[program.loosest] * (1 if name == "per_example" else 10)
    off = apart("the losses", losses, made[0], tolerance)
    off = off or all_apart([of(wide(a)) for a in due], own, tolerance)
    if off and name == "total":  # where a user's rule is not linear, that of the mean loss is another number
        off = all_apart(of_mean(loss, params, batch), own, tolerance) and off
    if off and not within_rounding(program, loss, params, batch, of, due, own):
        raise Found("wrong", off)


def all_apart(due: list[Any], own: list[Any], tolerance: float) -> str:
    """How the first array differs that does; nothing if none does."""
    found = (apart(f"leaf {i}", a, b, tolerance) for i, (a, b) in enumerate(zip(due, own, strict=True)))
    return next(filter(None, found), "")


def wide(a: Any) -> np.ndarray:
    return np.asarray(a).astype(np.complex128 if jnp.iscomplexobj(a) else np.float64)


def apart(what: str, due: Any, own: Any, tolerance: float) -> str:
    """How two arrays differ, by more than tolerance of the largest number; nothing if they do not."""
    due, own = wide(due), wide(own)
    if due.shape != own.shape:
        return f"{what} has shape {own.shape}, {due.shape} is due"
    if (np.isfinite(due) != np.isfinite(own)).any():
        return f"{what} is finite at other places"
    there = np.isfinite(due)
    largest = np.abs(due[there]).max(initial=0)
    off = np.abs(due[there] - own[there]).max(initial=0)
    return f"{what} is off by {off:.1e}, its largest number is {largest:.1e}" if off > tolerance * largest else ""


def within_rounding(
    program: Program, loss: Callable, params: Any, batch: tuple, of: Callable, due: Any, own: Any
) -> bool:
    """Whether what is due itself moves by about as much if params and batch move by one rounding."""
    rng, eps = np.random.default_rng(0), float(jnp.finfo(program.loosest).eps)
    moved = []
    for _ in range(3):
        nudge = lambda a: (a * (1 + eps * rng.choice([-1, 1], a.shape))).astype(a.dtype) if is_real(a) else a  # noqa: E731
        moved.append(direct(loss, *jax.tree.map(nudge, (params, batch)))[1])
    floor = eps * max(np.abs(wide(a)).max(initial=0) for a in due)
    for i, (a, b) in enumerate(zip(due, own, strict=True)):
        a, b = of(wide(a)), wide(b)
        if a.shape != b.shape or (np.isfinite(a) != np.isfinite(b)).any():
            return False
        there = np.isfinite(a)
        move = max(np.abs(of(wide(one[i]))[there] - a[there]).max(initial=0) for one in moved)
        if np.abs(a[there] - b[there]).max(initial=0) > (64 if eps < 1e-10 else 8) * max(move, floor):
            return False
    return True


def told(error: Exception, program: Program, params: Any) -> str:
    """Whether an exception refuses, names nothing, or is raw."""
    plain = type(error) in (ValueError, TypeError)
    last = traceback.extract_tb(error.__traceback__)[-1]
    if not plain or LIBRARY not in Path(last.filename).parents:
        return "raw"
    found = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    paths = [jax.tree_util.keystr(path) for path in found]
    paths += [f"{jax.tree_util.keystr(path, simple=True, separator='.')} goes into" for path in found if path]
    named = any(path in str(error) if path else "params" in str(error) for path in paths)
    return "refused" if named or re.search(r"a parameter goes into \w+ .*at .*:\d+", str(error)) else "unnamed"


def summary(due: list[Any]) -> str:
    """What the gradients of JAX are like."""
    a = np.concatenate([wide(g).reshape(-1) for g in due])
    kind = "nan" if np.isnan(a).any() else "inf" if np.isinf(a).any() else "zero" if not a.any() else "finite"
    large = "" if kind != "finite" or np.abs(a).max() < 1e4 else " large"
    return kind + large + (" some zero" if kind == "finite" and any(not np.asarray(g).any() for g in due) else "")


# --- the command ---


def run(task: Task, tell: Callable[[str], None] = lambda stage: None) -> dict[str, Any]:
    """Draw and examine one program."""
    seed, index, jax_alone = task
    started = time.perf_counter()
    program = drawn(seed, index)
    outcome = examine(program, jax_alone=jax_alone, tell=tell)
    if index % 25 == 0:
        jax.clear_caches()
    return result(program, index, outcome, time.perf_counter() - started)


def result(program: Program, index: int, outcome: Outcome, seconds: float) -> dict[str, Any]:
    return {"index": index, **outcome._asdict(), "script": program.script(), "tags": program.tags, "seconds": seconds}


def work(pipe: Connection) -> None:
    """In a process of its own: programs as they are asked for, and before that the stages that they are in."""
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(run(pipe.recv(), pipe.send))


def serve(tasks: Iterator[Task], done: queue.Queue) -> None:
    """One process after another, of 100 programs each; a program that its process dies of has crashed."""
    left = TURNS
    while left == TURNS:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=work, args=(theirs,))
        process.start()
        theirs.close()
        left = 0
        for task in itertools.islice(tasks, TURNS):
            left += 1
            stage = answer = "source"
            ours.send(task)
            try:
                while isinstance(stage := answer, str):
                    if not any(ours.poll(1) for _ in range(20 * SECONDS)):
                        raise EOFError
                    answer = ours.recv()
            except EOFError:
                kind = "jax" if stage in ("source", "jax") else "crash"
                outcome = Outcome(kind, stage, "the process died, or did not answer")
                answer, left = result(drawn(*task[:2]), task[1], outcome, 0.0), TURNS
            done.put(answer)
            if left == TURNS:
                break
        ours.close()
        process.kill()
    done.put(None)


def results(tasks: list[Task], workers: int) -> Iterator[dict[str, Any]]:
    """Of every task, as they are done."""
    left, done = iter(tasks), queue.Queue()
    for _ in range(workers):
        threading.Thread(target=serve, args=(left, done), daemon=True).start()
    while workers:
        one = done.get()
        workers -= one is None
        if one is not None:
            yield one


def report(done: list[dict[str, Any]], out: Path) -> None:
    """Print the counts and each kind of refusal and fault with its shortest program; write all faults down."""
    print("  ".join(f"{kind} {count}" for kind, count in Counter(one["kind"] for one in done).most_common()))
    groups: dict[tuple, list] = {}
    for one in done:
        groups.setdefault(alike(Outcome(one["kind"], one["stage"], one["message"])), []).append(one)
    for (kind, message), of in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
        if kind != "equal":
            least = min(of, key=lambda one: len(one["script"]))
            said = message or least["message"]
            print(f"{kind} {len(of)} times, as at index {least['index']} in {least['stage']}: {said}")
    faults = [one for one in done if one["kind"] in (*FAULTS, "jax")]
    texts = (f"# {one['kind']} {one['index']} {one['stage']}: {one['message']}\n{one['script']}" for one in faults)
    out.write_text("\n\n".join(texts))
    tags = Counter(tag for one in done for tag in one["tags"])
    bad = Counter(tag for one in done if one["kind"] in FAULTS for tag in one["tags"])
    print("drawn of (at fault): " + "  ".join(f"{tag} {count} ({bad[tag]})" for tag, count in tags.most_common()))


def main(arguments: list[str] | None = None) -> int:
    """The command. 1 where there are faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", type=int, help="one program alone")
    parser.add_argument("--shrink", action="store_true", help="with --index: a smaller program of the same fault")
    parser.add_argument("--jax", action="store_true", help="JAX alone")
    parser.add_argument("--resume", action="store_true", help="go on behind the programs in the .jsonl beside --out")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir(), "fuzz_losses.txt"), help="for the faults"
    )
    options = parser.parse_args(arguments)
    if options.index is not None:
        program = drawn(options.seed, options.index)
        outcome = examine(program, jax_alone=options.jax)
        program = shrunk(program, outcome, examine) if options.shrink else program
        print(program.script(), outcome, sep="\n")
        return int(outcome.kind in FAULTS)
    started = time.perf_counter()
    log = options.out.with_suffix(".jsonl")
    known = log.read_text().splitlines() if options.resume and log.is_file() else []
    done = [one for one in map(json.loads, known) if one["index"] < options.cases]
    left = sorted(set(range(options.cases)) - {one["index"] for one in done})
    with log.open("a" if options.resume else "w") as file, contextlib.suppress(KeyboardInterrupt):
        for one in results([(options.seed, i, options.jax) for i in left], options.workers):
            done.append(one)
            print(json.dumps(one), file=file, flush=True)
            if one["kind"] in FAULTS:
                print(f"{one['kind']} at index {one['index']}, {len(done)} done", file=sys.stderr, flush=True)
    done.sort(key=lambda one: one["index"])
    report(done, options.out)
    print(f"{len(done)} programs in {time.perf_counter() - started:.0f} s; faults are in {options.out}")
    return int(any(one["kind"] in FAULTS for one in done))


if __name__ == "__main__":
    sys.exit(main())
