"""The data of the experiments: digits that need no download, and MNIST, Fashion-MNIST and a text, which do."""

import gzip
import hashlib
import os
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.shared.report import InputError


class Source(NamedTuple):
    """A set of images in four IDX files: its name, its folder, its address, the SHA-256 of each unpacked file."""

    name: str
    folder: str
    url: str
    sha256: dict[str, str]


MNIST = Source(
    "MNIST",
    "mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
)
FASHION = Source(
    "Fashion-MNIST",
    "fashion-mnist",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
)
SOURCES = {"mnist": MNIST, "fashion": FASHION}
TEXT = "tinyshakespeare.txt"
TEXT_SOURCE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TEXT_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


LARGEST = 64 << 20  # bytes of a file unpacked: the largest here, 60,000 images, holds 47 million
SECONDS = 30  # how long a server may be silent


class Data(NamedTuple):
    """Images as rows (n, pixels), float32 in [0, 1], and their labels (n,), int32, in a training and a test part."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def load(name: str, folder: Path | None = None, download: bool = False) -> Data:
    """The data set of that name: digits, mnist or fashion."""
    return digits() if name == "digits" else images(SOURCES[name], folder, download)


def digits() -> Data:
    """1,797 images of 8x8 that ship with scikit-learn; a fixed fifth of them, 359, is held out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = (images / 16).astype(np.float32), labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(x))
    held_out, kept = order[: len(x) // 5], order[len(x) // 5 :]
    return Data(x[kept], y[kept], x[held_out], y[held_out])


def images(source: Source, folder: Path | None = None, download: bool = False) -> Data:
    """60,000 training and 10,000 test images of 28x28, checked by their SHA-256.

    They are looked for in folder, else in $FNBP_DATA, else in the user's cache; in each also under the set's own
    folder, mnist/ or fashion-mnist/. They are downloaded only if download is True.
    """
    folder = data_folder(folder)
    if download:
        fetch(folder / source.folder, source)
    train_x, train_y, test_x, test_y = (read_idx(folder, name, source) for name in source.sha256)
    flat = [(pixels.reshape(len(pixels), -1) / 255).astype(np.float32) for pixels in (train_x, test_x)]
    return Data(flat[0], train_y.astype(np.int32), flat[1], test_y.astype(np.int32))


def shakespeare(folder: Path | None = None, download: bool = False) -> tuple[str, np.ndarray]:
    """The 65 characters of tinyshakespeare in their order, and its 1,115,394 characters as their numbers, uint8.

    The text is looked for in folder, else in $FNBP_DATA, else in the user's cache. It is downloaded only if download is
    True.
    """
    path = data_folder(folder) / TEXT
    if download:
        path.parent.mkdir(parents=True, exist_ok=True)
        fetch_file(TEXT_SOURCE, path)
    if not path.is_file():
        raise InputError(
            f"tinyshakespeare is not there: no {path}. Give its folder with --data-folder or $FNBP_DATA, download it "
            f"with --download, or fetch it yourself from {TEXT_SOURCE}"
        )
    check_length(path, path.stat().st_size, TEXT_SOURCE)
    raw = path.read_bytes()
    check_sum(path, raw, TEXT_SHA256, TEXT_SOURCE)
    codes, numbers = np.unique(np.frombuffer(raw, np.uint8), return_inverse=True)
    return "".join(map(chr, codes)), numbers.astype(np.uint8)


def data_folder(folder: Path | None) -> Path:
    """The folder of the data: the argument, else $FNBP_DATA, else the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fnbp"
    return Path(folder or os.environ.get("FNBP_DATA") or cache)


def read_idx(folder: Path, name: str, source: Source) -> np.ndarray:
    """The array of an IDX file, packed or not. Raises: InputError if it is absent or is another file."""
    places = [where / (name + end) for where in (folder / source.folder, folder) for end in (".gz", "")]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise InputError(
            f"{source.name} is not there: no {name}.gz in {folder / source.folder} or {folder}. Give its folder with "
            f"--data-folder or $FNBP_DATA, download it with --download, or fetch it yourself from {source.url}"
        )
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be unpacked ({error}). Delete it, and fetch it anew from {source.url}"
        ) from error
    check_length(path, len(raw), source.url)
    for other in SOURCES.values():
        if other is not source and hashlib.sha256(raw).hexdigest() == other.sha256[name]:
            raise InputError(
                f"{path} is of {other.name}, not of {source.name}: that belongs in {folder / source.folder}"
            )
    check_sum(path, raw, source.sha256[name], source.url)
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">i4", dimensions, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def check_length(path: Path, length: int, source: str) -> None:
    """Raise InputError if there are more bytes than any of these files holds."""
    if length > LARGEST:
        raise InputError(
            f"{path} is corrupt: it holds more than {LARGEST >> 20} MiB. Delete it, and fetch it anew from {source}"
        )


def check_sum(path: Path, raw: bytes, due: str, source: str) -> None:
    """Raise InputError if the content is not the expected one."""
    found = hashlib.sha256(raw).hexdigest()
    if found != due:
        raise InputError(
            f"{path} is corrupt: the SHA-256 of its content is {found}, expected {due}. "
            f"Delete it, and fetch it anew from {source}"
        )


def fetch(folder: Path, source: Source) -> None:
    """Download the files of a set that are missing in folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in source.sha256:
        fetch_file(f"{source.url}{name}.gz", folder / f"{name}.gz")


def fetch_file(source: str, target: Path) -> None:
    """Download source to the file target, unless the file exists."""
    if target.exists():
        return
    try:
        with urllib.request.urlopen(source, timeout=SECONDS) as response:
            content = response.read(LARGEST + 1)
    except OSError as error:
        raise InputError(f"{source} cannot be fetched: {error}") from error
    check_length(target, len(content), source)
    partial = target.with_suffix(".partial")
    partial.write_bytes(content)
    partial.rename(target)
