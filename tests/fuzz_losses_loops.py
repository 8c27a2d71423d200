"""Lines with functions of their own: loops, branches, what transforms a function. STEPS is the table of all lines."""

from typing import Any

from tests.fuzz_losses_ops import convolution, einsum, layout, matmul, matrix, pair, single, table
from tests.fuzz_losses_parts import Block, Scope, Value


def block(m: Scope, given: list[Value], shapes: list[tuple], head: str = "", **options: Any) -> tuple[str, Block]:
    """The name of a new function, and the function. head: its first lines, where {f} is the name."""
    name = m.name("f")
    return name, m.block(name, given, head.format(f=name), shapes, step=step, **options)


def inside(m: Scope, v: Value, shape: tuple[int, ...]) -> Value:
    """What a function calls its argument."""
    value = Value(m.name("c"), shape, v.kind, v.tame)
    m.root.kinds[value.text] = v.kind
    return value


def one_of(values: list[Value]) -> str:
    """A tuple of values."""
    return f"({''.join(f'{v}, ' for v in values)})"


def starts(m: Scope, count: int) -> list[Value]:
    """What a loop carries first, in the dtype of the program."""
    made = []
    for _ in range(count):
        kind, shape = m.choose(("P", "P", "D", "", "0")), m.dims(m.whole(0, 2))
        v = Value(f"jnp.zeros({shape})", shape, "", True) if kind == "0" else m.get(kind, shape)
        v = m.soft(v)
        made.append(v._replace(text=m.cast(v)))
    return made


def remat(m: Scope, name: str) -> str:
    return f"jax.checkpoint({name})" if m.chance(0.15) else name


def scan(m: Scope) -> None:
    """lax.scan: what is carried, given at each turn, or read besides may each be of params or of the example."""
    T, carried = m.whole(2, 3), starts(m, m.whole(0, 2))
    given = [
        m.get(m.choose(("P", "D", "")), (T, *m.dims(m.whole(0, 2)))) for _ in range(m.whole(0 if carried else 1, 2))
    ]
    c, x = [inside(m, v, v.shape) for v in carried], [inside(m, v, v.shape[1:]) for v in given]
    returned = [v.shape for v in carried] + [m.dims(m.whole(0, 2)) for _ in range(m.whole(0 if carried else 1, 2))]
    head = "def {f}(c, x):" + "".join(f"\n    {one_of(of)} = {by}" for of, by in ((c, "c"), (x, "x")) if of)
    name, made = block(m, c + x, returned, head, ints=[])
    n = len(carried)
    made.results = [one_of(made.results[:n]), one_of(made.results[n:])]
    options = [f"length={T}"] * (not given) + ["reverse=True"] * m.chance(0.3) + ["unroll=2"] * m.chance(0.1)
    text = ", ".join([remat(m, name), one_of(carried), one_of(given) if given else "None", *options])
    form = ["".join(f"{{{i}}}, " for i in of) for of in (range(n), range(n, len(returned)))]
    shapes = [*returned[:n], *((T, *shape) for shape in returned[n:])]
    m.emit_all(f"jax.lax.scan({text})", shapes, blocks=[made], form=f"({form[0]}), ({form[1]})")


def loop(m: Scope) -> None:
    """fori_loop over a known number of turns, whose index may index."""
    T, start = m.whole(2, 3), starts(m, 1)
    i, c = Value(m.name("i"), ()), inside(m, start[0], start[0].shape)
    name, made = block(m, [c], [c.shape], f"def {{f}}({i}, {c}):", ints=[(i, T)] * 2, single=True)
    m.emit(f"jax.lax.fori_loop(0, {T}, {name}, {start[0]})", c.shape, blocks=[made])


def mapped(m: Scope) -> None:
    """lax.map, or vmap with other axes."""
    T, shape = m.whole(2, 3), m.dims(m.whole(0, 2))
    kinds = m.choose((("P", "D"), ("P", "P"), ("D",), ("P",), ("D", "P", "P")))
    by_map = m.chance(0.4)
    given = [m.get(kind, (T, *m.dims(m.whole(0, 1)))) for kind in kinds]
    c = [inside(m, v, v.shape[1:]) for v in given]
    if by_map:
        name, made = block(m, c, [shape], f"def {{f}}(c):\n    {one_of(c)} = c", single=True)
        m.emit(f"jax.lax.map({remat(m, name)}, {one_of(given)})", (T, *shape), blocks=[made])
        return
    axes, last = [0] * len(given), m.chance(0.3)
    if len(given) > 1 and m.chance(0.5):  # one is the same for all
        axes[-1], c[-1] = None, c[-1]._replace(shape=given[-1].shape)
    if len(given[0].shape) > 1 and m.chance(0.4) and given[0].shape[-1] == T:
        axes[0], c[0] = -1, c[0]._replace(shape=given[0].shape[:-1])
    name, made = block(m, c, [shape], single=True)
    text = f"jax.vmap({name}, {tuple(axes)}, {-1 if last else 0})({', '.join(map(str, given))})"
    m.emit(text, (*shape, T) if last else (T, *shape), blocks=[made])


def branches(m: Scope) -> None:
    """cond and switch, on data or on params alone; operands are given or closed over."""
    shapes = [m.dims(m.whole(0, 2)) for _ in range(m.whole(1, 2))]
    given = [m.get(m.kind(), m.dims(m.whole(0, 2))) for _ in range(m.whole(0, 2))]
    kind = m.choose(("P", "D", "D", ""))
    if m.chance(0.6):
        on = m.pick(kind)
        chosen, count, how = f"jnp.sum({on}) > 0.1", 2, "cond"
    else:
        count, how = m.whole(2, 3), "switch"
        on = m.index(count)
        chosen = str(on)
    made = []
    for _ in range(count):
        c = [inside(m, v, v.shape) for v in given]
        made.append(block(m, c, shapes))
    functions = [name for name, _ in made]
    functions = ", ".join(functions) if how == "cond" else f"[{', '.join(functions)}]"
    text = f"jax.lax.{how}({', '.join([chosen, functions, *map(str, given)])})"
    m.emit_all(text, shapes, blocks=[one for _, one in made])


def stopped(m: Scope) -> None:
    """while, that no derivative passes."""
    v = m.soft(m.pick(m.choose(("P", "P", "D"))))
    v = v._replace(text=m.cast(v))
    c = Value(m.name("c"), v.shape, "", False)
    name, made = block(m, [c], [v.shape], sealed=True, single=True)
    below = m.choose(("3", f"2 + ({v}.sum() > 0)"))
    turns = f"lambda s: s[0] < {below}, lambda s: (s[0] + 1, {name}(s[1]))"
    if m.chance(0.5):
        text = f"jax.lax.while_loop({turns}, (0, jax.lax.stop_gradient({v})))[1]"
    else:
        text = f"jax.lax.stop_gradient(jax.lax.while_loop({turns}, (0, {v}))[1])"
    if m.chance(0.5):
        text += f" * {v}"
    m.emit(text.replace(f"({v}.sum()", f"(jax.lax.stop_gradient({v}).sum()"), v.shape, blocks=[made])


def helper(m: Scope) -> None:
    """A function that is jitted, rematerialised, differentiated, or given a rule of its own, within the loss."""
    given = [m.get(m.kind(), m.dims(m.whole(0, 2))) for _ in range(m.whole(1, 2))]
    c = [inside(m, v, v.shape) for v in given]
    how = m.choose(("", "jax.jit", "jax.jit", "jax.checkpoint", "grad", "jvp", "twice", "doubled", "halved"))
    text, shape = ", ".join(map(m.cast, given)), m.dims(m.whole(0, 2))
    if how == "twice":  # the same function on two values
        other = m.get("", given[0].shape)
        name, made = block(m, c[:1], [shape], single=True)
        m.emit(f"{name}({other}) + jax.jit({name})({given[0]})", shape, blocks=[made])
    elif how == "grad":
        name, made = block(m, c, [shape], single=True)
        call = f"jax.grad(lambda *c: jnp.sum(jnp.sin({name}(*c))))({text})"
        m.emit(call, given[0].shape, blocks=[made])
    elif how == "jvp":
        tangent = m.cast(m.get("", given[0].shape))
        name, made = block(m, c[:1], [shape], single=True)
        m.emit(f"jax.jvp({name}, ({m.cast(given[0])},), ({tangent},))[1]", shape, blocks=[made])
    elif how in ("doubled", "halved"):
        name, made = block(m, c, [shape], single=True, sealed=True)
        m.emit(f"{how}({name})({text})", shape, blocks=[made])
    else:
        shapes = [m.dims(m.whole(0, 2)) for _ in range(m.whole(1, 2))]
        name, made = block(m, c, shapes)
        m.emit_all(f"{how}({name})({text})" if how else f"{name}({text})", shapes, blocks=[made])


def step(m: Scope) -> None:
    """Draw one line, at least."""
    steps = [(f, w) for f, w in STEPS if f not in NESTING or m.depth < (2 if m.chance(0.3) else 1)]
    before = len(m.lines)
    for _ in range(20):
        weights = [w for _, w in steps]
        f = steps[int(m.rng.choice(len(steps), p=[w / sum(weights) for w in weights]))][0]
        alone, m.alone = m.alone, m.alone or (f in NESTING and m.chance(0.2))
        f(m)
        m.alone = alone
        if len(m.lines) > before:
            m.root.tags.append(f.__name__)
            return


NESTING = (scan, loop, mapped, branches, stopped, helper)
STEPS = [
    (layout, 5.0), (single, 3.0), (matrix, 0.5), (pair, 4.0), (einsum, 2.0), (matmul, 3.0), (convolution, 1.5),
    (table, 2.0), (scan, 2.0), (loop, 0.8), (mapped, 1.2), (branches, 1.5), (stopped, 0.6), (helper, 1.8),
]  # fmt: skip
