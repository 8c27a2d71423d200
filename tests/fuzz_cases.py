"""What tests/fuzz.py draws: the table of every constructor's options, and cases of it as Python source.

TABLE says which options a constructor has, and KINDS which values of an option are sensible, and which must be refused.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fnbp


class Entry(NamedTuple):
    """What a constructor takes. x: families of inputs, see FAMILIES. options: "name:kind" for a positional one,
    "name=kind" for one by keyword, "*name:kind" for any number of them. weight: how often it is drawn."""

    x: str
    options: str = ""
    weight: float = 1.0


class Case(NamedTuple):
    """Python sources, evaluated in NAMES; params and state may speak of p and s, what init made. marks: which of them
    are nonsense that must be refused. target: of a loss, whose prediction is x."""

    layer: str
    x: str = "arr((2, 4))"
    init_x: str = ""
    key: str = "jax.random.key(0)"
    params: str = "p"
    state: str = "s"
    ctx: str = "fnbp.Context()"
    target: str = ""
    dtype: str = "float32"
    norms: bool = True
    marks: tuple[str, ...] = ()

    def line(self) -> str:
        """One line of Python that does the same."""
        first = "jax.config.update('jax_enable_x64', True); " if self.dtype == "float64" else ""
        if self.target:
            return f"{first}loss = {self.layer}; y, res = loss.forward({self.x}, {self.target}); loss.backward(res)"
        made = f"net = {self.layer}; p, s = net.init({self.key}, {self.init_x or self.x}); "
        ran = f"y, _, res = net.forward({self.params}, {self.state}, {self.x}, {self.ctx}); "
        return f"{first}{made}{ran}net.backward({self.params}, res, ones(y))"


# --- the table ---


def words(text: str) -> list[str]:
    """Values that hold no space."""
    return text.split()


ODD = "None 'a' () (2,) nan"
WHOLE = f"0 -1 2.5 True inf '3' {ODD}"
ALONE = WHOLE.replace("(2,) ", "")
PADS = "'same' -1 2.5 True None nan () ((1,2,3),) (('a',0),) (1,-1) ((1,2.5),(0,0))"
KINDS = {  # values that are sensible, values that are not
    "size": ("1 2 3 4 4 5 np.int64(2)", WHOLE),
    "heads": ("1 2 4", f"3 10**12 {WHOLE}"),
    "kv": ("None 1 2", "3 10**12 0 -1 2.5 True inf 'a' ()"),
    "groups": ("1 2 4", f"10**12 {WHOLE}"),
    "init": (
        "'glorot_uniform' 'he_normal' 'lecun_uniform' 'normal' 'orthogonal' 'ones' jax.nn.initializers.normal(0.1)",
        "'glorot' 0 True 2.5 () None nan (lambda*_:0.0)",
    ),
    "init?": ("None 'zeros' 'normal' jax.nn.initializers.normal(0.1)", "'zero' 0 True False 2.5 () nan (lambda*_:0.0)"),
    "out?": ("None 'normal' 'orthogonal'", "'glorot' 0 True 2.5 () nan (lambda*_:0.0)"),
    "rate": ("0 0.0 0.3 0.5 np.float32(0.5)", f"1 -0.1 1.5 True inf {ODD}"),
    "eps": ("1e-5 1e-3 1 np.float32(1e-3)", f"0 -1 True inf {ODD}"),
    "slope": ("0.01 0.2 0 1 -0.5 np.float32(0.1)", f"True inf -inf {ODD}"),
    "momentum": ("0.1 0.5 1", f"0 -1 1.5 True inf {ODD}"),
    "base": ("10_000.0 100 2.5", f"0 -1 True inf {ODD}"),
    "base?": ("None 10_000.0 100", "0 -1 True inf 'a' () (2,) nan"),
    "bool": ("True False", "0 1 None 'a' 'False' 2.5 () nan"),
    "bool?": ("True False None", "0 1 'a' 2.5 () nan"),
    "kernel": ("1 2 3 (2,2) (3,1) (2,) [2,2] np.int64(2)", f"10**12 (2,0) (2,2.5) (2,'a') {ALONE}"),
    "stride": ("1 2 (2,1) (1,1) 3", f"10**12 (2,0) (2,2.5) {ALONE}"),
    "stride?": ("None 1 2 (2,1)", "10**12 (2,0) 0 -1 2.5 True inf 'a' () nan"),
    "padding": ("'SAME' 'VALID' 0 1 (1,1) ((1,0),(0,1)) ((1,1),)", PADS),
    "sizes": ("-1 1 2 4 8", "0 -2 2.5 True None 'a' () nan 10**12"),
    "join": ("'sum' 'product' 'concat' 'tuple'", "'add' None 0 () 'Sum' ('sum',) nan"),
    "dtype": ("'bfloat16' jnp.float16 jnp.float32 np.dtype('float32')", "None 'bf16' int bool 0 2.5 () 'a' complex"),
    "dtype?": ("None 'bfloat16' jnp.float32", "'bf16' int 'int32' bool 2.5 'a' complex (2,)"),
    "name": ("'net' 'serial'", "None 3 ()"),
    "label": ("None 'mine'", "3 ()"),
    "ignored": ("None 99", "1.5 'a' True ()"),
    "class_weights": ("None", "-1.0 inf nan 'a'"),
    "reduce": ("'examples' 'tokens'", "'sum' None 3 ()"),
    "rule": ("None", "'a' 3"),
    "mixes": ("'never'", "'a' 3 None"),
    "activation": ("'relu' 'tanh' 'gelu' 'softmax' 'identity'", "'rely' None 0 () True fnbp.relu"),
    "norm": ("fnbp.layer_norm fnbp.rms_norm", "fnbp.layer_norm() None 'layer_norm' 0"),
    "mlp": ("None fnbp.dense(4) fnbp.swiglu(3,4)", "fnbp.dense 'a' 0 () True"),
    "pool": ("fnbp.max_pool fnbp.avg_pool", "fnbp.max_pool(2) None 'max_pool' 2"),
    "depth": ("8", f"9 2 7 {WHOLE}"),
    "width": ("4 4 8", WHOLE),
    "tokens": ("3 4 7", WHOLE),
    "vocabulary": ("3 4", WHOLE),
    "length": ("3 4 7", WHOLE),
    "net": ("fnbp.serial(fnbp.dense(4),fnbp.tanh(),fnbp.dense(4))", "None fnbp.dense fnbp.relu() 'a' ()"),
    "source": ("(0,'W') (0,'b')", "0 'W' (-1,'W') (0,) () (9,'W') (0,'Q') None (0,2.5) (True,'W') ('W',0)"),
    "target": ("(2,'W') (2,'b')", "0 'W' (-1,'W') (2,) () (9,'W') (1,'W') None (2,2.5) (0,'W') (0,'b')"),
    "apply": ("fnbp.dense(3) fnbp.tanh() (lambda*px:jnp.sin(px[1]))", "None 3 'a' ()"),
    "start": ("None (lambda*kx:{})", "3 'a' ()"),
    "masked": ("fnbp.last() fnbp.attention(2) fnbp.scan(fnbp.rnn_cell(3)) fnbp.scan(fnbp.gru_cell(2),True)", ""),
    "cell": ("fnbp.rnn_cell(3) fnbp.gru_cell(2) fnbp.lstm_cell(2)", ""),
    "cell?": ("None fnbp.rnn_cell(3) fnbp.gru_cell(2)", ""),
}  # fmt: skip
NO_LAYER = "None 3 'a' () fnbp.relu (fnbp.relu(),) {}"

ANY = "rows seq image"
CONV = "n_out:size kernel:kernel stride=stride padding=padding dilation=stride groups=groups W=init b=init?"
CELL = "n:size W=init U=init"
TABLE = {
    **{name: Entry(ANY) for name in words("identity sigmoid tanh relu softplus silu softmax log_softmax flatten")},
    "activation": Entry(ANY, "name:activation"),
    "leaky_relu": Entry(ANY, "slope=slope"),
    "elu": Entry(ANY, "alpha=slope"),
    "gelu": Entry(ANY, "approximate=bool"),
    "dense": Entry(ANY, "n_out:size W=init b=init?", 2),
    "bias": Entry(ANY, "b=init"),
    "conv": Entry("image seq", CONV, 3),
    "conv_transpose": Entry("image seq", CONV, 3),
    "max_pool": Entry("image seq", "kernel:kernel stride=stride? padding=padding", 2),
    "avg_pool": Entry("image seq", "kernel:kernel stride=stride? padding=padding count_padding=bool", 2),
    "global_avg_pool": Entry("image seq"),
    "reshape": Entry(ANY, "*shape:sizes"),
    "layer_norm": Entry(ANY, "eps=eps"),
    "rms_norm": Entry(ANY, "eps=eps"),
    "group_norm": Entry(ANY, "groups:groups eps=eps", 2),
    "batch_norm": Entry(ANY, "momentum=momentum eps=eps", 2),
    "dropout": Entry(ANY, "rate:rate"),
    "drop_path": Entry(ANY, "rate:rate"),
    "embedding": Entry("tokens", "size:tokens width:size E=init dtype=dtype?", 2),
    "positions": Entry("seq", "length:length P=init"),
    "sinusoids": Entry("seq", "base=base"),
    "rnn_cell": Entry("cell", CELL),
    "lstm_cell": Entry("cell", CELL),
    "gru_cell": Entry("cell", CELL),
    "scan": Entry("seq", "cell:cell reverse=bool"),
    "last": Entry("seq"),
    "attention": Entry("seq memory", "heads:heads kv_heads=kv causal=bool rotary=base? W=init b=init? W_out=out?", 3),
    "serial": Entry(ANY, "*layers:layer name=name", 2),
    "skip": Entry(ANY, "layer:same"),
    "parallel": Entry(ANY, "*layers:same join=join", 2),
    "repeat": Entry(ANY, "layer:same n:size"),
    "ragged": Entry("ragged", "layer:masked"),
    "remat": Entry(ANY, "layer:layer"),
    "cast": Entry(ANY, "layer:layer dtype:dtype"),
    "freeze": Entry(ANY, "layer:layer"),
    "tie": Entry(ANY, "net:net source:source target:target"),
    "from_jax": Entry(ANY, "apply:apply init=start name=label mask=rule mixes=mixes"),
    "residual": Entry("image", "n_out:size stride=stride project=bool?", 0.5),
    "gelu_mlp": Entry(ANY, "hidden:size n_out:size W=init b=init? W_out=out? approximate=bool"),
    "swiglu": Entry(ANY, "hidden:size n_out:size W=init W_out=out?"),
    "transformer_block": Entry(
        "seq",
        "width:width heads:heads kv_heads=kv causal=bool rotary=base? mlp=mlp norm=norm rate=rate W=init W_out=out? "
        "b=init?",
    ),
    "bidirectional": Entry("seq", "cell:cell back=cell?", 0.5),
    "stacked": Entry("seq", "*cells:cell rate=rate", 0.5),
    "models.mlp": Entry("rows", "*widths:size activation=activation W=init"),
    "models.lenet": Entry("digits", "classes=size activation=activation pool=pool", 0.3),
    "models.resnet": Entry("image", "depth=depth classes=size width=size", 0.3),
    "models.lstm_classifier": Entry("seq", "units:size classes:size layers=size rate=rate", 0.3),
    "models.gru_classifier": Entry("seq", "units:size classes:size layers=size rate=rate", 0.3),
    "models.gpt": Entry(
        "tokens",
        "vocabulary:vocabulary length:length layers:size heads:heads width:width rate=rate approximate=bool",
        0.3,
    ),
    "softmax_cross_entropy": Entry(
        "loss", "ignore_index=ignored weights=class_weights label_smoothing=rate reduce=reduce z_loss=rate"
    ),
    "linear_cross_entropy": Entry("loss", "ignore_index=ignored label_smoothing=rate z_loss=rate reduce=reduce"),
    "binary_cross_entropy": Entry(
        "loss", "from_logits=bool pos_weight=class_weights label_smoothing=rate ignore_index=ignored reduce=reduce"
    ),
    "mean_squared_error": Entry("loss", "reduce=reduce"),
    "half_squared_error": Entry("loss"),
}
SAME = words(
    "identity sigmoid tanh relu leaky_relu elu gelu softplus silu softmax layer_norm rms_norm dropout bias skip"
)
MASKED = ("attention", "scan", "last")
FAMILIES = {  # the shapes of x
    "rows": ((2, 4), (1, 4), (3, 5)),
    "seq": ((2, 3, 4), (1, 3, 4), (2, 1, 4)),
    "image": ((2, 4, 4, 4), (1, 5, 3, 2)),
    "tokens": ((2, 3), (3,), (1, 3)),
    "digits": ((1, 28, 28, 1),),
    "loss": ((2, 4), (2, 3, 4), (1, 4)),
}
DTYPES = ("float32", "bfloat16", "float16", "float64", "int32", "uint8", "bool", "complex64")
KEYS = ("7", "None", "'a'", "jnp.zeros(2)", "jax.random.split(jax.random.key(0))", "jnp.zeros((2, 2), 'uint32')")


# --- the values that sources speak of ---


def arr(shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
    """Moderate numbers of that dtype, the same for the same shape."""
    rng, kind = np.random.default_rng(list(shape)), np.dtype(jnp.dtype(dtype)).kind
    if kind in "iub":
        return jnp.asarray(rng.integers(0, 2 if kind == "b" else 3, shape), dtype)
    return jnp.asarray(rng.normal(size=shape) + (1j * rng.normal(size=shape) if kind == "c" else 0), dtype)


def share(shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
    """Numbers within (0, 1) that sum to 1 along the last axis."""
    return jax.nn.softmax(arr(shape, "float64" if dtype == "float64" else "float32"), -1).astype(dtype)


def spec(x: Any) -> Any:
    """The forms of arrays alone."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x)


def ones(tree: Any) -> Any:
    return jax.tree.map(jnp.ones_like, tree)


def numpy(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def bent(tree: Any, how: str) -> Any:
    """params or state that are not quite of the net: a leaf of another shape, one missing, one more."""
    if how == "shape":
        leaves, form = jax.tree.flatten(tree)
        if not leaves:
            return tree
        return jax.tree.unflatten(form, [jnp.ones((*leaves[0].shape, 2)), *leaves[1:]])
    if isinstance(tree, dict):
        return dict(list(tree.items())[1:]) if how == "missing" else {**tree, "another": jnp.ones(3)}
    return tree[1:] if how == "missing" else (*tree, {"another": jnp.ones(3)})


NAMES: dict[str, Any] = {"fnbp": fnbp, "jax": jax, "jnp": jnp, "np": np, "nan": np.nan, "inf": np.inf}
NAMES |= {f.__name__: f for f in (arr, share, spec, ones, numpy, bent)}


# --- drawing ---


def pick(rng: np.random.Generator, values: Any) -> Any:
    """One of the values, of a sequence or of words."""
    values = words(values) if isinstance(values, str) else values
    return values[int(rng.integers(len(values)))]


def part(rng: np.random.Generator, kind: str, family: str, depth: int) -> str:
    """A layer for a combinator: for that family, and one that keeps the shape, but sometimes where kind is layer."""
    if depth > 0 and rng.random() < 0.35:
        name = pick(rng, "skip serial parallel remat repeat cast freeze")
        return call(rng, name, family, depth - 1)[0]
    last = FAMILIES.get(family, ((4,),))[0][-1]
    plain = words("relu() tanh() gelu() softmax() layer_norm() rms_norm() dropout(0.3) bias() elu() batch_norm()")
    plain += [f"dense({last})", f"dense({last},b=None)", f"swiglu(3,{last})", "identity()", "group_norm(2)"]
    plain += ["attention(2)", "sinusoids()", "positions(4)"] if family == "seq" else []
    plain += [f"conv({last},3)", f"conv({last},2,groups=2)", "max_pool(3,1,'SAME')"] if family == "image" else []
    plain += ["dense(3)", "flatten()", "conv(2,2,2)", "last()"] if kind == "layer" and rng.random() < 0.3 else []
    return f"fnbp.{pick(rng, plain)}"


def value(rng: np.random.Generator, kind: str, family: str, depth: int, bad: bool) -> str:
    """The source of one option."""
    if kind in ("layer", "same") or (bad and kind in ("masked", "cell", "cell?")):
        nonsense = NO_LAYER.removeprefix("None ") if kind == "cell?" else NO_LAYER
        return pick(rng, nonsense) if bad else part(rng, kind, family, depth)
    return pick(rng, KINDS[kind][bad])


def call(rng: np.random.Generator, name: str, family: str, depth: int, bad: bool = False) -> tuple[str, tuple]:
    """The source of a call of that constructor, with one option that is nonsense where bad is True; and its mark."""
    options = [re.match(r"(\*?)(\w+)([:=])(\S+)", option).groups() for option in TABLE[name].options.split()]
    worst = int(rng.integers(len(options))) if bad and options else -1
    given, marks = [], ()
    for i, (many, option, by, kind) in enumerate(options):
        if by == "=" and i != worst and rng.random() < 0.5:
            continue
        count = int(rng.integers(1 if i == worst else 0, 4)) if many else 1
        values = [value(rng, kind, family, depth, i == worst and j == 0) for j in range(count)]
        if i == worst:
            marks = (f"{option}={values[0]}",)
        given += values if by == ":" else [f"{option}={one}" for one in values]
    return f"fnbp.{name}({', '.join(given)})", marks


def drawn_x(rng: np.random.Generator, family: str, layer: str, dtype: str, odd: bool) -> tuple[str, tuple[int, ...]]:
    """The source of an input, and the shape of its array; odd: of any rank and sizes."""
    like = {"memory": "seq", "ragged": "seq", "cell": "rows"}.get(family, family)
    shape = pick(rng, FAMILIES[like])
    if odd:
        shape = tuple(int(n) for n in rng.choice([0, 1, 1, 2, 3, 4, 7], rng.integers(0, 6)))
        shape = shape if np.prod(shape) <= 200 else shape[:2]
    x = f"arr({shape}, {dtype!r})"
    if family == "memory":
        return f"({x}, arr({(*shape[:1], 2, 3)}, {dtype!r}))", shape
    if family == "ragged":
        lengths = [int(n) for n in rng.integers(0, shape[1] + 1, shape[0])] if len(shape) > 1 else [1]
        return f"({x}, jnp.array({lengths}))", shape
    if family == "cell" or (layer.startswith("fnbp.scan") and rng.random() < 0.4):
        n = re.search(r"_cell\((\d)", layer)
        h = f"arr({(*shape[:1], int(n[1]) if n else 3)}, {dtype!r})"
        return (
            f"({pick(rng, ['None', f'({h}, {h})' if 'lstm' in layer else h]) if rng.random() < 0.9 else h}, {x})",
            shape,
        )
    return x, shape


def context(rng: np.random.Generator, layer: str, shape: tuple[int, ...], odd: bool) -> tuple[str, tuple]:
    """The source of a Context; odd: with a key or mask that is none, and the mark where the layer reads that."""
    norm, drops = re.search("batch_norm|res", layer), re.search("drop", layer) or "rate=" in layer
    given = ["train=True"] if rng.random() < (0.8 if norm else 0.5) else []
    given += ["key=jax.random.key(1)"] if rng.random() < 0.9 else []
    marks = ()
    if odd and rng.random() < 0.5 and drops:
        key = pick(rng, KEYS)
        given = [one for one in given if not one.startswith("key")] + [f"key={key}"]
    elif odd or rng.random() < 0.25:
        due, wrong = shape[:2], rng.random() < 0.7
        mask = f"arr({due}, 'bool')"
        if odd and wrong:
            mask = pick(rng, [f"arr({due}, 'int32')", f"arr({due})", f"arr({(*due, 5)}, 'bool')", "[True]", "'a'", "3"])
            marks = ("mask",) if re.match(rf"fnbp\.({'|'.join(MASKED)})\(", layer) else ()
        given.append(f"mask={mask}")
    return f"fnbp.Context({', '.join(given)})", marks


TROUBLES = words("shape dtype kind params state ctx key")


def draw(seed: int, index: int, only: str = "") -> tuple[str, Case]:
    """The constructor and the case of that seed and index. only: a regular expression of constructors."""
    rng = np.random.default_rng([seed, index])
    names = [name for name in TABLE if re.search(only, name)]
    weights = np.array([TABLE[name].weight for name in names])
    name = names[int(rng.choice(len(names), p=weights / weights.sum()))]
    family, roll = pick(rng, TABLE[name].x), rng.random()
    trouble = {one for one in TROUBLES if rng.random() < 0.12} if roll < 0.5 else set()
    layer, marks = call(rng, name, family, int(rng.integers(0, 3)), bad=0.45 < roll < 0.75)
    dtype = pick(rng, DTYPES if "dtype" in trouble else ("float32",) * 9 + DTYPES[1:4])
    if family == "loss":
        return name, drawn_loss(rng, name, layer, dtype, trouble, marks)
    if family == "tokens" and "dtype" not in trouble:
        dtype = "int32"
    x, shape = drawn_x(rng, family, layer, dtype, "shape" in trouble)
    ctx, more = context(rng, layer, shape, "ctx" in trouble)
    case = Case(
        layer, x, pick(rng, [f"spec({x})", x]), ctx=ctx, dtype=dtype, norms=rng.random() < 0.4, marks=marks + more
    )
    case = case._replace(params=pick(rng, ["p"] * 4 + ["numpy(p)"]), state="ones(s)" if rng.random() < 0.3 else "s")
    if rng.random() < 0.1:
        case = case._replace(key="jax.random.PRNGKey(0)")
    if "kind" in trouble:
        other = pick(
            rng, [f"numpy({x})", f"[{x}]", f"({x}, {x})", f"({x},)", "None", f"{{'x': {x}}}", "3.0", "'a'", "[[1.0]]"]
        )
        case = case._replace(x=other, init_x=pick(rng, [other, case.init_x]))
    if "params" in trouble:
        params = pick(rng, [f"bent(p, {how!r})" for how in ("shape", "missing", "another")] + words("{} None () [] 3"))
        case = case._replace(params=params, marks=case.marks + (("params",) if params.startswith("bent") else ()))
    if "state" in trouble:
        case = case._replace(state=pick(rng, ["bent(s, 'shape')", "bent(s, 'missing')", "{}", "None", "()", "3"]))
    if "key" in trouble:
        case = case._replace(key=pick(rng, KEYS), marks=(*case.marks, "key"))
    return name, case


def drawn_loss(rng, name: str, layer: str, dtype: str, trouble: set, marks: tuple) -> Case:
    """The case of a loss: x is the prediction."""
    shape = pick(rng, FAMILIES["loss"])
    like = f"({shape}, {dtype!r})"
    x = f"share{like}" if name == "binary_cross_entropy" and "from_logits=True" not in layer else f"arr{like}"
    labels = f"arr({shape[:-1]}, 'int32')"
    target = {
        "softmax_cross_entropy": pick(rng, [labels, f"share{like}"]),
        "linear_cross_entropy": labels,
        "binary_cross_entropy": f"share{like}",
    }
    case = Case(layer, x, target=target.get(name, f"-arr{like}"), dtype=dtype, marks=marks)
    if trouble & {"shape", "params"}:
        wrong = [f"arr({(*shape, 2)})", "arr(())", f"3 + {labels}", f"-1 - {labels}", "None", "[1]", "'a'", "{}", "3"]
        wrong = wrong if name != "mean_squared_error" and name != "half_squared_error" else wrong[:1] + wrong[4:]
        case = case._replace(target=pick(rng, wrong), marks=(*marks, "target"))
    if trouble & {"kind", "state"}:
        case = case._replace(x=pick(rng, ["None", "[1.0]", "arr(())", "'a'", f"numpy({x})", f"({x},)", "arr((0, 4))"]))
    return case
