"""The laws of the house: what every file, layer and claim must keep."""

import ast
import importlib
import inspect
import re
import runpy
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fnbp
from experiments.shared.commands import commands
from fnbp.layers import activation
from tests.cases import CASES

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "fnbp").rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))
RUNNABLE = [command.name for command in commands()]
AUTODIFF = re.compile(r"\b(grad|vjp|jvp|linearize|linear_transpose|jacobian|jacrev|jacfwd|hessian)\b")
DIFFERENTIATORS = {"comparison", "interop", "opening"}
FLOORS = (  # rooms: files and packages; imports run down these, one way
    {"arrays", "construction", "processes", "steps"},
    {"contractions"},
    {"pairs"},
    {"layer", "factor", "losses"},
    {"wrapping"},
    {"naming"},
    {"contraction", "layers", "rendering"},
    {"combinators", "measurement"},
    {"sharding"},
    {"backpropagation"},
    {"opening"},
    {"factors", "models", "interop", "statistics", "training"},
    {"comparison", "exchange"},
    {"testing", "__main__"},
    {"__init__"},
)
ids = [str(path.relative_to(ROOT)) for path in SOURCES]


PUBLIC = [name for name in dir(fnbp) if not name.startswith("_") and not inspect.ismodule(getattr(fnbp, name))]


def constructors():
    """The public functions that make a Layer, by the annotation of what they return."""
    public = {name: getattr(fnbp, name) for name in PUBLIC}
    return {name: f for name, f in public.items() if inspect.isfunction(f) and returns(f) in ("Layer", "Loss")}


def returns(function):
    annotation = inspect.signature(function).return_annotation
    return getattr(annotation, "__name__", annotation)


LIFTS = {"activation", "map_layers", "replace_functions", "stateless"}  # each returns a Layer of what it is given
BLOCKS = {"residual", "gelu_mlp", "swiglu", "transformer_block", "bidirectional", "stacked"}
COMBINATORS = {"serial", "skip", "parallel", "repeat", "ragged", "remat", "cast", "freeze", "tie", "from_jax"} | BLOCKS
LAYERS = {name for name, f in constructors().items() if returns(f) == "Layer"} - LIFTS


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_what_a_file_hands_on_is_public(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    file = path.relative_to(ROOT)
    own = {name: f for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
    made = {name: f for name, f in own.items() if returns(f) in ("Layer", "Loss")}
    for name in (name for name, f in made.items() if "Shapes:" in (f.__doc__ or "")):  # a helper has no shapes
        assert name in getattr(module, "__all__", ()), f'put "{name}" into __all__ of {file}'
    for name in getattr(module, "__all__", ()):
        places = (fnbp, fnbp.factors, fnbp.models, fnbp.sharding, fnbp.statistics, fnbp.testing)
        found = any(hasattr(place, name) for place in places)
        assert found, f"{name} is not in fnbp; add to fnbp/__init__.py: from {module.__name__} import *"


def test_every_public_layer_has_a_case():
    apart = {"cast", "ragged"}  # another rounding than the cases', another input: tests/test_wrappers.py
    without = LAYERS - {case.id.split(":")[0] for case in CASES} - apart
    assert not without, f"add a Case for each of {sorted(without)} to tests/cases.py"


def test_every_activation_has_a_name():
    missing = set(activation.__all__) - set(activation.ACTIVATIONS) - {"activation"}
    assert not missing, f"add {sorted(missing)} to ACTIVATIONS in fnbp/layers/activation.py"


def parameters(tree):
    """Every parameter of the functions of a module and of its classes, but for those within functions."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from parameters(node)
        if isinstance(node, ast.FunctionDef):
            a = node.args
            for one in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg):
                if one is not None and one.arg not in ("self", "cls"):
                    yield node, one


@pytest.mark.parametrize("path", SOURCES + EXPERIMENTS, ids=ids + [f"experiments/{p.name}" for p in EXPERIMENTS])
def test_parameters_are_annotated(path):
    if path.parent.name == "examples":  # written as a user writes
        return
    for function, parameter in parameters(ast.parse(path.read_text())):
        assert parameter.annotation, f"{path.name}: annotate {parameter.arg} of {function.name}"


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_cases_have_distinct_prime_sizes(case):
    for shape in case.shapes:
        assert all(n == 1 or all(n % d for d in range(2, n)) for n in shape)
        assert len(set(shape)) == len(shape)


@pytest.mark.parametrize("name", sorted(LAYERS - COMBINATORS))
def test_docstrings_of_layers_have_their_parts(name):
    text = inspect.getdoc(constructors()[name]) or ""
    first, second, *_ = [*text.splitlines(), "", ""]
    lacks = f"the docstring of {name} lacks"
    assert first.endswith(".") and second == "", f"{lacks} a first line that ends with a full stop, alone"
    assert re.search(r"^ {4}\S.* = ", text, re.M), f"{lacks} the formulas, indented by 4"
    assert re.search(r"\bd[A-Za-z]+(\[\S+\])? = ", text), f"{lacks} the backward's formula, as dx = ..."
    assert re.search(r"^Shapes: +.*\(", text, re.M), f'{lacks} the line "Shapes: x (m, n); ..."'
    assert "saved" in text, f'{lacks} what is saved, in "Shapes:", or "nothing saved"'


@pytest.mark.parametrize("name", [name for name, f in constructors().items() if returns(f) == "Loss"])
def test_docstrings_of_losses_have_their_parts(name):
    text = inspect.getdoc(constructors()[name]) or ""
    for part in ("l =", "Shapes:", "Source:", "Raises:", "saved"):
        assert part in text, f'the docstring of {name} lacks "{part}"'


def test_every_public_name_is_documented():
    for name in PUBLIC:
        assert inspect.getdoc(getattr(fnbp, name)), name


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_only_the_three_differentiate_automatically(path):
    if DIFFERENTIATORS & {path.stem, path.parent.name}:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "jax":
            assert not AUTODIFF.search(node.attr.removeprefix("value_and_")), f"jax.{node.attr}, line {node.lineno}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax"):
            assert not any(AUTODIFF.search(alias.name) for alias in node.names), f"line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES + EXPERIMENTS, ids=ids + [f"experiments/{p.name}" for p in EXPERIMENTS])
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and path in SOURCES:
            assert node.end_lineno - node.lineno < 60, node.name


def room(path):
    """The file or package of fnbp/ that a source belongs to."""
    return path.relative_to(ROOT / "fnbp").parts[0].removesuffix(".py")


def imports(path):
    """The modules of fnbp that a source imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert path.name == "__init__.py" and not node.module, "imports are absolute"
            yield from (f"fnbp.{a.name}" for a in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fnbp":
            yield from (f"fnbp.{a.name}" for a in node.names) if node.module == "fnbp" else (node.module,)


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_imports_run_down(path):
    floor = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    assert room(path) in floor, f"{room(path)} is a new room: give it a floor in FLOORS"
    for module in imports(path):
        below = module.split(".")[1]
        assert below == room(path) or floor[below] < floor[room(path)], f"{module}, from {room(path)}"


def test_files_of_a_package_import_each_other_one_way():
    graph = {".".join(path.relative_to(ROOT).with_suffix("").parts): set(imports(path)) for path in SOURCES}
    graph = {name.removesuffix(".__init__"): below for name, below in graph.items()}
    order = TopologicalSorter(graph)
    order.prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_backwards_hold_no_literal_dtypes(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name.startswith(("backward", "dloss")):
            assert not re.search(r"float(16|32|64)", ast.unparse(node)), node.name


def test_no_module_bears_the_name_of_a_public_function():
    assert {path.stem for path in (ROOT / "fnbp").glob("*.py")} & set(PUBLIC) == set()


def test_nothing_is_switched_globally():
    for path in SOURCES:
        assert "config.update" not in path.read_text(), path


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.filterwarnings("ignore:'experiments:RuntimeWarning")  # another test has imported it
def test_every_experiment_has_help(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"experiments.{name}", run_name="__main__")
    assert ended.value.code == 0 and "--out" in capsys.readouterr().out
