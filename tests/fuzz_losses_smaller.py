"""Smaller programs that end as one of tests/fuzz_losses.py does: without terms, lines, or what a line computes."""

import copy
import re
import time
from collections.abc import Callable, Iterator

from tests.fuzz import Outcome
from tests.fuzz_losses_parts import Line, Program, names, render


def blocks_of(lines: list[Line]) -> Iterator[list[Line]]:
    """All lists of lines: these, and those of the functions within."""
    yield lines
    for line in lines:
        for block in line.blocks:
            yield from blocks_of(block.lines)


def edited(program: Program) -> Iterator[Program]:
    """Programs with something less: terms, lines, what a line computes."""
    for i in range(len(program.terms)):
        some = copy.deepcopy(program)
        if len(some.terms) > 1:
            some.terms = [some.terms[i]]
            yield some
    plain = copy.deepcopy(program)
    plain.form, plain.packed = "dict", False
    plain.leaves, plain.arguments = dict(plain.leaves), dict(plain.arguments)
    read = names("\n".join([*render(plain.lines), *plain.terms]))
    plain.leaves = {name: text for name, text in plain.leaves.items() if name in read}
    plain.arguments = {name: text for name, text in plain.arguments.items() if name in read} or plain.arguments
    if plain.source() != program.source():
        yield plain
    sizes = [len(lines) for lines in blocks_of(program.lines)]
    for b, size in enumerate(sizes):
        for i in reversed(range(size)):
            for how in ("", "arr({0}, {1})", "leaf", "argument"):
                less = copy.deepcopy(program)
                lines = list(blocks_of(less.lines))[b]
                replace_line(less, lines, i, how)
                if less.source() != program.source():
                    yield less


def replace_line(program: Program, lines: list[Line], i: int, how: str) -> None:
    """Take a line away, or let constants, leaves or arguments stand in for what it defines."""
    line, others = lines[i], []
    if not how:
        del lines[i]
        return
    m = re.search(r"\(\((\d+)", next(iter(program.arguments.values()), ""))
    for v in line.outs:
        seed, name = int(re.sub(r"\D", "", v.text)), re.sub(r"\D", "w" if how == "leaf" else "x", v.text)
        if re.search(r"= (w|x|arr)", line.text) and re.fullmatch(r"\w+ = (\w+|arr\(\d+, \(.*\)\))", line.text):
            others.append(line)
            continue
        if how == "leaf":
            program.leaves[name] = f"arr({seed}, {v.shape})"
        if how == "argument":
            program.arguments[name] = f"arr({seed}, {(int(m[1]) if m else 1, *v.shape)})"
        others.append(Line([v], f"{v} = {how.format(seed, v.shape) if 'arr' in how else name}"))
    lines[i : i + 1] = others


def shrunk(program: Program, due: Outcome, examine: Callable[[Program], Outcome], seconds: float = 300) -> Program:
    """The smallest program found that ends in the same way."""
    until, found = time.perf_counter() + seconds, True

    def same(less: Program) -> bool:
        try:
            return alike(examine(less)) == alike(due)
        except Exception:
            return False

    while found and time.perf_counter() < until:
        found, start = False, 0
        while time.perf_counter() < until:
            tries = list(edited(program))
            hit = next((i for i in range(start, len(tries)) if time.perf_counter() < until and same(tries[i])), None)
            if hit is None:
                break
            program, start, found = tries[hit], max(0, hit - 1), True
    return program


def alike(outcome: Outcome) -> tuple[str, str]:
    """What makes two outcomes the same: the kind, and the message without names and numbers."""
    if outcome.kind in ("wrong", "slow", "equal"):
        how = re.search("shape|finite|off", outcome.message)
        second = "" if outcome.stage in ("per_example", "jax") else f"{outcome.stage}, "
        return outcome.kind, f"{second}{how[0] if how else ''}" if outcome.kind == "wrong" else ""
    line = outcome.message.strip().splitlines()[0] if outcome.message.strip() else ""
    return outcome.kind, " ".join(re.sub(r"\b[a-z]?\d+\b|\(.*?\)|\[.*?\]", "#", line).split()[:16])
