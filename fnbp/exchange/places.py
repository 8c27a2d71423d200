"""Where each layer of a net stands in another library: as its user says, in order, or as its Sequential has it.

A place is a name with one * in it, for which each array puts its own: "encoder.fc1.*", "lstm.*_l0". Without a * it is
the name of a module.
"""

import difflib
import re
from collections.abc import Iterable, Mapping

from fnbp.arrays.checks import describe, shown
from fnbp.combinators.wrappers import cast, ragged, remat, skip
from fnbp.exchange.blocks import block
from fnbp.exchange.nodes import Node, Turned
from fnbp.exchange.rows import Counterpart
from fnbp.exchange.table import counterpart

Found = dict[Turned, str]
BY_NAME = {"lm_head.*": "torch"}  # the one matrix of GPT-2 that is a Linear
CHILDREN = {"torch": "{}", "gpt2": "{}", "linen": "layers_{}", "nnx": "layers.{}"}  # part i of a Sequential


def join(place: str, part: str) -> str:
    """A part of a module."""
    return f"{place}.{part}" if place and part else place or part


def starred(place: str, suffix: str = "") -> str:
    """A place with its *."""
    return place if "*" in place else join(place, f"*{suffix}")


def names_at(place: str, of: Counterpart, node: Node) -> list[str]:
    """The names of all arrays of a layer."""
    return [place.replace("*", one.theirs) for one in of.of(node.held)]


class Finder:
    """Finds the place of each layer. found: those that are known so far."""

    def __init__(self, maker: str, library: str, root: Node, places: Mapping[str, str] | None):
        self.maker, self.library, self.root, self.found = maker, library, root, Found()
        self.left: dict[str, None] = {}  # the names that no layer has taken
        self.explicit = {} if places is None else places
        self.check()

    def check(self) -> None:
        """TypeError or ValueError unless the places of the user name layers of the net, each by a text."""
        if not isinstance(self.explicit, Mapping):
            raise TypeError(
                f"{self.maker}: places must be a dict, such as {{'serial[0].dense(5)': 'fc1'}}, got "
                f"{describe(self.explicit)}"
            )
        paths = set(paths_of(self.root))
        for path, place in self.explicit.items():
            if path not in paths:
                near = difflib.get_close_matches(str(path), paths, n=1, cutoff=0.0)
                raise ValueError(
                    f"{self.maker}: no layer of {self.root.path} is {shown(path)}; the nearest is {near[0]}"
                )
            if not isinstance(place, str) or place.count("*") > 1:
                raise TypeError(
                    f"{self.maker}: the place of {path} must be a text with at most one *, such as 'encoder.fc1' or "
                    f"'lstm.*_l0', got {shown(place)}"
                )

    def counterpart(self, leaf: Node) -> Counterpart:
        """What a layer is in the library. TypeError, with the path, if it has no counterpart."""
        library = BY_NAME.get(self.found.get(leaf.key, ""), self.library)
        found = counterpart(library, leaf.made, leaf.held)
        if isinstance(found, str):
            raise TypeError(f"{self.maker}: {leaf.label} has no counterpart: {found}")
        return found

    def determined(self, node: Node, place: str | None = None) -> None:
        """Find what places say, and if a place of this node is given all places below."""
        own = self.said(node)
        place = place if own is None else own
        if not node.parts:
            if place is not None and node.held:
                self.found[node.key] = starred(place, self.counterpart(node).suffix)
            return
        parts = None if place is None else block(self.library, node)
        if place is None or parts is not None:
            for leaf, part in zip(node.leaves(), parts or (), strict=False):
                self.found[leaf.key] = starred(join(str(place), part), self.counterpart(leaf).suffix)
            for part in node.parts:
                self.determined(part)
            return
        for i, part in enumerate(node.parts):
            self.determined(part, place if is_wrapper(node) else join(place, CHILDREN[self.library].format(i)))

    def said(self, node: Node) -> str | None:
        """The place that the user gives a node. ValueError if it does not fit the node."""
        own = self.explicit.get(node.path)
        if own is None:
            return None
        if "*" in own and node.parts and not is_wrapper(node):
            raise ValueError(f"{self.maker}: {node.path} has several layers, so its place has no *, got {shown(own)}")
        try:
            return own.format(*node.turns)
        except (IndexError, KeyError, ValueError) as error:
            n = len(node.turns)
            raise ValueError(
                f"{self.maker}: the place of {node.path} may have {n} {{}}, one for each repeat around it, got "
                f"{shown(own)}"
            ) from error

    def in_order(self, names: Iterable[str]) -> None:
        """Find the places that are not known yet: each layer takes the first name that is left, and those beside it."""
        of = {leaf.key: leaf for leaf in self.root.leaves()}
        taken = {
            name for key, place in self.found.items() for name in names_at(place, self.counterpart(of[key]), of[key])
        }
        self.left = {name: None for name in names if name not in taken}
        self.walk(self.root, self.left)

    def walk(self, node: Node, left: dict[str, None]) -> None:
        """The same for the layers of a node, of the names that are left."""
        leaves = [leaf for leaf in node.leaves() if leaf.key not in self.found]
        if not leaves or not left:
            return
        if not node.parts:
            self.take(node, self.first(left, node), left)
            return
        parts = block(self.library, node) if len(leaves) == len(list(node.leaves())) else None
        if parts is not None and self.whole(leaves, parts, left):
            return
        for part in node.parts:
            self.walk(part, left)

    def whole(self, leaves: list[Node], parts: Iterable[str], left: dict[str, None]) -> bool:
        """True if a block takes its places, since all its names are left, beside the first one."""
        places = [starred(part, self.counterpart(leaf).suffix) for leaf, part in zip(leaves, parts, strict=True)]
        names = [
            name for leaf, place in zip(leaves, places, strict=True)
            for name in names_at(place, self.counterpart(leaf), leaf)
        ]  # fmt: skip
        first = next(iter(left))
        prefixes = [first[: -len(name)] for name in names if first == name or first.endswith(f".{name}")]
        if not prefixes or any(prefixes[0] + name not in left for name in names):
            return False
        for leaf, place in zip(leaves, places, strict=True):
            self.take(leaf, prefixes[0] + place, left)
        return True

    def first(self, left: dict[str, None], leaf: Node) -> str | None:
        """The place at which the first name that is left is one of a layer's; None if it is not."""
        name, of = next(iter(left)), self.counterpart(leaf)
        suffix = of.suffix.replace("_l0", r"_l\d+")  # of its own direction
        for theirs in sorted((one.theirs for one in of.of(leaf.held)), key=len, reverse=True):
            if (match := re.fullmatch(rf"((?:.*\.)?){re.escape(theirs)}({suffix})", name)) is not None:
                return f"{match[1]}*{match[2]}"
        return None

    def nearby(self, leaf: Node, theirs: str) -> str:
        """For a message: the first name that is left, and how a scan takes the weights of a cell or of another one."""
        name = next(iter(self.left), "none")
        close = f"; the next entry that is left is {name}"
        match = re.fullmatch(rf"((?:.*\.)?){re.escape(theirs)}((?:_l\d+)?(?:_reverse)?)", name)
        if match is None or not self.counterpart(leaf).suffix:
            return close
        return f"{close}, which places={{{leaf.path!r}: {f'{match[1]}*{match[2]}'!r}}} takes, if that is meant"

    def take(self, leaf: Node, place: str | None, left: dict[str, None]) -> None:
        """A layer takes a place, and its names are left no more."""
        if place is None:
            return
        self.found[leaf.key] = place
        for name in names_at(place, self.counterpart(leaf), leaf):
            left.pop(name, None)


def paths_of(node: Node) -> Iterable[str]:
    """The path of a node and of all below."""
    yield node.path
    for part in node.parts:
        yield from paths_of(part)


def is_wrapper(node: Node) -> bool:
    """True for a layer around one other, which another library does not count as a module."""
    if len(node.layer.parts) > 1 or node.layer.traits.turns:
        return False
    return not node.layer.parts or bool(node.layer.traits.tied) or node.layer.name in WRAPPERS or casts(node)


WRAPPERS = {f.__name__ for f in (skip, remat, ragged)}


def casts(node: Node) -> bool:
    """True for a cast."""
    return node.made is not None and node.made.constructor is cast
