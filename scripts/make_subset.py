"""Make the Fashion-MNIST subset that the package ships from the full data set.

    python scripts/make_subset.py --source FOLDER

FOLDER holds the four original files and the licence. 10,000 training images (1,000 a class) and 1,000 test
images (100 a class) are chosen by a fixed seed, keep their order, and are written as gzipped IDX files under
the original names. Running it again gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SEED = 0
PER_CLASS = {"train": 1000, "t10k": 100}
TARGET = Path(__file__).parent.parent / "dydit_cli" / "assets" / "fashion-mnist"


def read(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read a gzipped IDX file of bytes."""
    data = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def write(path: Path, array: NDArray[np.uint8]) -> None:
    """Write a gzipped IDX file of bytes, the same bytes every time (no time stamp, no file name inside)."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=9, mtime=0))


def balanced(labels: NDArray[np.uint8], per_class: int) -> NDArray[np.int64]:
    """Choose ``per_class`` indices of each class, in ascending order."""
    random = np.random.default_rng(SEED)
    chosen = [
        random.choice(np.flatnonzero(labels == label), per_class, replace=False)
        for label in np.unique(labels)
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def main() -> None:
    """Parse the arguments and write the subset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source", type=Path, required=True, help="folder with the full data set and its LICENSE"
    )
    parser.add_argument(
        "--target", type=Path, default=TARGET, help="folder to write (default: the package's assets)"
    )
    arguments = parser.parse_args()
    arguments.target.mkdir(parents=True, exist_ok=True)
    for part, per_class in PER_CLASS.items():
        images = read(arguments.source / f"{part}-images-idx3-ubyte.gz", 3)
        labels = read(arguments.source / f"{part}-labels-idx1-ubyte.gz", 1)
        chosen = balanced(labels, per_class)
        write(arguments.target / f"{part}-images-idx3-ubyte.gz", images[chosen])
        write(arguments.target / f"{part}-labels-idx1-ubyte.gz", labels[chosen])
        print(f"{part}: {len(chosen)} of {len(labels)} images")
    shutil.copyfile(arguments.source / "LICENSE", arguments.target / "LICENSE")


if __name__ == "__main__":
    main()
