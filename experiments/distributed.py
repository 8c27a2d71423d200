"""Gradients and losses on many devices, and in many processes, are those of one device.

The same script runs on one device, on simulated CPU devices (--devices 8), in processes that it starts on this machine
(--processes 2), and in a cluster whose launcher JAX knows, such as Slurm (--cluster, in each process). It trains with
the data split over all devices, then alone on one, and compares. If one of the processes that it started dies, it ends
the others and says so; with --checkpoint the same command goes on from there.
"""

import math
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import fnbp
from experiments.shared import data, report
from experiments.shared.report import InputError, console

MINUTES = 0.3  # on two CPU cores

LIMIT = 1e-5  # how far losses and gradients may be apart, in float32
GRACE = 10.0  # seconds that the other processes have to end by themselves when one has died
OWN = ("rank", "out", "checkpoint")  # settings in which processes may differ


@dataclass(frozen=True)
class Settings:
    """One device is the default."""

    train: Literal["digits", "gpt"] = "digits"
    """digits: a dense network on scikit-learn's digits. gpt: a transformer on the letters of fnbp/README.md."""
    devices: int | None = None
    """Simulate so many CPU devices in each process; by default the devices that there are."""
    processes: int = 1
    """Start so many processes on this machine; they talk over the loopback."""
    cluster: bool = False
    """Join the processes that a cluster's launcher has started: jax.distributed.initialize()."""
    model: int = 1
    """Split matrices into so many parts along which layers compute; the batch is split over what is left."""
    fully: bool = False
    """Split parameters and the optimizer's state over the devices, too."""
    explicit: bool = False
    """A mesh of Explicit axes."""
    steps: int = 200
    """The steps of the training."""
    batch_size: int = 64
    """The examples of one step, over all devices."""
    learning_rate: float = 1e-3
    """The learning rate of AdamW."""
    seed: int = 0
    """The seed of the parameters and of the order of the batches."""
    checkpoint: Path | None = None
    """The folder of checkpoints, written every 20 steps; a run goes on from the newest."""
    timeout: int = 60
    """Seconds to wait for the coordinator and for the other processes at the start."""
    rank: int | None = None
    """Be this one of the processes, by hand; needs --coordinator."""
    coordinator: str | None = None
    """The address of process 0, such as 10.0.0.1:5000."""
    out: Path = Path("results/distributed")
    """The folder for result.json."""


def main(settings: Settings) -> int:
    """Start the processes, or be one of them. Returns: 0 if all agree, else 1."""
    check(settings)
    if settings.processes > 1 and settings.rank is None:
        return start(settings)
    join(settings)
    check_alike(settings)
    return compare(settings)


def check(settings: Settings) -> None:
    """InputError if settings do not fit each other."""
    for name in ("processes", "steps", "batch_size", "model", "timeout"):
        if getattr(settings, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(settings, name)}")
    if settings.devices is not None and settings.devices < 1:
        raise InputError(f"--devices must be at least 1, got {settings.devices}")
    if settings.cluster and (settings.processes > 1 or settings.rank is not None):
        raise InputError("--cluster: the launcher says how many processes there are; leave out --processes and --rank")
    if (settings.rank is None) != (settings.coordinator is None):
        raise InputError("give --rank and --coordinator together, or none of them")
    if settings.rank is not None and not 0 <= settings.rank < settings.processes:
        raise InputError(f"--rank must be from 0 to {settings.processes - 1}, got {settings.rank}")


# --- the process that starts the others ---


def start(settings: Settings) -> int:
    """Start the processes and watch them. Returns: 0 if all did well, else 1."""
    where = f"127.0.0.1:{free_port()}"
    children: list[subprocess.Popen] = []
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        for rank in range(settings.processes):
            words = [sys.executable, "-m", "experiments.distributed", *options(settings)]
            words += ["--rank", str(rank), "--coordinator", where]
            children.append(subprocess.Popen(words, stdout=None if rank == 0 else subprocess.DEVNULL))
        return watched(children)
    finally:
        ended(children)


def ended(children: list[subprocess.Popen]) -> None:
    """End what still runs: by SIGTERM, at which fit writes a checkpoint, and after a while by SIGKILL."""
    for child in children:
        if child.poll() is None:
            child.terminate()
    wait(children)
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()


def wait(children: list[subprocess.Popen]) -> None:
    """Give the processes some time to end by themselves."""
    until = time.monotonic() + GRACE
    while any(child.poll() is None for child in children) and time.monotonic() < until:
        time.sleep(0.05)


def watched(children: list[subprocess.Popen]) -> int:
    """Wait for all; if one fails, end the others and say which one it was."""
    while True:
        codes = [child.poll() for child in children]
        bad = next((rank for rank, code in enumerate(codes) if code), None)
        if bad is not None:
            break
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)
    wait(children)
    killed = [rank for rank, child in enumerate(children) if child.poll() == -signal.SIGKILL]
    first = killed[0] if killed else bad
    print(f"error: process {first} of {len(children)} {how(children[first].returncode)}", file=sys.stderr)
    print("error: the others were ended; with --checkpoint the same command goes on", file=sys.stderr, flush=True)
    return 1


def how(code: int) -> str:
    """How a process ended."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def options(settings: Settings) -> list[str]:
    """The words of a command line that give these settings."""
    words = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            words += report.option(field.name.replace("_", "-"), value if isinstance(value, bool) else str(value))
    return words


# --- one of the processes ---


def join(settings: Settings) -> None:
    """Choose the devices, and join the other processes. InputError if they do not answer."""
    if settings.devices is not None or settings.rank is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", settings.devices or 1)
    wait: dict[str, Any] = {"initialization_timeout": settings.timeout}
    try:
        if settings.rank is not None:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            if settings.rank:
                check_answers(settings.coordinator or "", settings.timeout)
            jax.distributed.initialize(settings.coordinator, settings.processes, settings.rank, **wait)
        elif settings.cluster:
            jax.distributed.initialize(**wait)
    except (RuntimeError, ValueError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"the processes did not find each other within {settings.timeout} s: {first}") from error


def check_answers(where: str, seconds: float) -> None:
    """InputError unless the coordinator answers in time: JAX's client ends the whole process if it does not."""
    host, _, port = where.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"--coordinator must be an address such as 10.0.0.1:5000, got {where}")
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=max(0.1, until - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise InputError(f"the coordinator {where} did not answer within {seconds} s: {error}") from error
        time.sleep(0.1)


def check_alike(settings: Settings) -> None:
    """InputError, with their names, if the processes were given different settings."""
    if jax.process_count() == 1:
        return
    told = {name: value for name, value in asdict(settings).items() if name not in OWN}
    told |= {"version of jax": jax.__version__, "devices of a process": jax.local_device_count()}
    digests = np.asarray([zlib.crc32(repr(value).encode()) for value in told.values()], np.uint32)
    all_of = multihost_utils.process_allgather(digests)
    wrong = [name for name, column in zip(told, all_of.T, strict=True) if len(set(column.tolist())) > 1]
    if wrong:
        here = ", ".join(f"{name} {told[name]}" for name in wrong)
        raise InputError(f"the processes were given different settings; process {jax.process_index()} has {here}")


def compare(settings: Settings) -> int:
    """Train on all devices, then on one, and print how far they are apart."""
    net, loss, x, y = subject(settings)
    params, state = net.init(jax.random.key(settings.seed), x[:1])
    mesh = of_machine(settings)
    placed = fnbp.sharding.place(net, params, mesh, settings.fully)
    whole = NamedSharding(mesh, PartitionSpec())
    batch = fnbp.sharding.split(mesh, x[: settings.batch_size], y[: settings.batch_size])
    run = jax.jit(fnbp.value_and_grad(fnbp.sharding.sharded(net, placed), loss))
    (_, _), grads = run(placed, jax.device_put(state, whole), *batch)
    grads = [np.asarray(g) for g in jax.tree.leaves(jax.jit(lambda tree: tree, out_shardings=whole)(grads))]
    (_, _), alone = jax.jit(fnbp.value_and_grad(net, loss))(params, state, *(a[: settings.batch_size] for a in (x, y)))
    gradients = max(difference(g, np.asarray(a)) for g, a in zip(grads, jax.tree.leaves(alone), strict=True))

    many = train(net, loss, settings)(placed, jax.device_put(state, whole), *fnbp.sharding.split(mesh, x, y), True)
    one = train(net, loss, settings)(params, state, x, y, False)
    for done in (many, one):
        if done.step != settings.steps:
            raise InputError(f"the training ended after step {done.step} of {settings.steps}: {done.message}")
    losses = float(np.abs(many.history.loss - one.history.loss).max())
    ok = gradients <= LIMIT and losses <= LIMIT
    if jax.process_index() == 0:
        show(settings, mesh, placed, gradients, losses, many.history.loss, ok)
    return 0 if ok else 1


def subject(settings: Settings) -> tuple[fnbp.Layer, fnbp.Loss, np.ndarray, np.ndarray]:
    """A net, its loss and its data, of as many examples as fill whole batches."""
    if settings.train == "digits":
        loaded = data.load("digits")
        net, x, y = fnbp.models.mlp(256, 64, 10), loaded.train_x, loaded.train_y
    else:
        text = (Path(fnbp.__file__).parent / "README.md").read_text()
        letters = sorted(set(text))
        codes = np.asarray([letters.index(one) for one in text], np.int32)
        vocabulary = -(-len(letters) // 16) * 16  # so that devices divide it
        blocks = codes[: (len(codes) - 1) // 32 * 32 + 1]
        net = fnbp.models.gpt(vocabulary, 32, layers=2, heads=4, width=64)
        x, y = blocks[:-1].reshape(-1, 32), blocks[1:].reshape(-1, 32)
    n = len(x) // settings.batch_size * settings.batch_size
    if not n:
        raise InputError(f"--batch-size must be at most {len(x)}, got {settings.batch_size}")
    return net, fnbp.softmax_cross_entropy(), x[:n], y[:n]


def of_machine(settings: Settings) -> jax.sharding.Mesh:
    """The mesh of all devices. InputError if it cannot be made, or the batch not be split over it."""
    try:
        mesh = fnbp.sharding.mesh(model=settings.model, explicit=settings.explicit)
    except ValueError as error:
        raise InputError(f"--model {settings.model}: {error}") from error
    if settings.batch_size % mesh.shape["data"]:
        parts = mesh.shape["data"]
        raise InputError(f"--batch-size {settings.batch_size} cannot be split over {parts} devices; try {parts * 8}")
    return mesh


def train(net: fnbp.Layer, loss: fnbp.Loss, settings: Settings) -> Callable[..., fnbp.Fit]:
    """(params, state, x, y, saved) -> Fit: the same call on one device and on many."""
    optimizer = optax.adamw(settings.learning_rate)

    def run(params: Any, state: Any, x: Any, y: Any, saved: bool) -> fnbp.Fit:
        keep = fnbp.Checkpoints(settings.checkpoint, steps=20) if saved and settings.checkpoint else None
        return fnbp.fit(
            net, loss, params, state, x, y, optimizer=optimizer, key=jax.random.key(settings.seed + 1),
            batch_size=settings.batch_size, steps=settings.steps, progress=False, checkpoint=keep,
        )  # fmt: skip

    return run


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, over the largest number."""
    return float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-30))


def show(settings: Settings, mesh: Any, placed: Any, gradients: float, losses: float, loss: Any, ok: bool) -> None:
    """Print the figures and write result.json."""
    sizes = (math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.itemsize for leaf in jax.tree.leaves(placed))
    share = sum(sizes) / sum(leaf.nbytes for leaf in jax.tree.leaves(placed))
    kinds = "Explicit" if settings.explicit else "Auto"
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    console.print(report.figures([
        ("devices", f"{jax.device_count()} in {jax.process_count()} processes; mesh {shape}, {kinds} axes"),
        ("parameters", f"{share:.3f} of them on each device"),
        ("gradients", f"{gradients:.1e} apart from those of one device (relative)"),
        ("losses", f"{losses:.1e} apart at most, over {settings.steps} steps; the last is {loss[-1]:.4f}"),
        ("one device and many", "agree" if ok else f"DISAGREE by more than {LIMIT:g}"),
    ]), highlight=False)  # fmt: skip
    report.save(settings.out, settings, {
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "share_of_parameters": share,
        "gradients_apart": gradients,
        "losses_apart": losses,
        "first_loss": float(loss[0]),
        "last_loss": float(loss[-1]),
    })  # fmt: skip


if __name__ == "__main__":
    report.run(Settings, main)
