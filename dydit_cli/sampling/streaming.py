"""Write large arrays piece by piece, so that 50,000 images never stand in memory: into an .npz, into a .safetensors."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray


class ArrayStream:
    """Rows of an array whose shape is known, written as they come.

    Args:
        file: Open for writing, at the place where the numbers begin.
        shape: Of the whole array.
        dtype: Of its numbers, little-endian.
    """

    def __init__(self, file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._file = file
        self._shape = shape
        self._dtype = dtype
        self._rows = 0

    def write(self, rows: NDArray) -> None:
        """Append ``rows`` (n, ...)."""
        if rows.shape[1:] != self._shape[1:] or self._rows + len(rows) > self._shape[0]:
            raise ValueError(
                f"rows of shape {rows.shape} do not fit after {self._rows} rows of {self._shape}"
            )
        self._file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
        self._rows += len(rows)

    def finish(self) -> None:
        """Check that every row was written."""
        if self._rows != self._shape[0]:
            raise ValueError(f"{self._rows} of {self._shape[0]} rows were written")


@contextmanager
def npz_stream(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, name: str = "arr_0"
) -> Iterator[ArrayStream]:
    """Write an .npz with one array, uncompressed as `numpy.savez` does; more than 4 GB are fine."""
    # A fixed date makes the file a function of its content.
    entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive,
        archive.open(entry, "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_2_0(file, header)
        stream = ArrayStream(file, shape, dtype)
        yield stream
        stream.finish()


@contextmanager
def safetensors_stream(
    path: Path, name: str, shape: tuple[int, ...], labels: NDArray, metadata: dict[str, str]
) -> Iterator[ArrayStream]:
    """Write a .safetensors with int64 ``labels`` (n,) and one fp32 tensor ``name``, whose rows come later.

    The format is eight bytes of header length, a JSON header and the numbers of all tensors
    (https://huggingface.co/docs/safetensors); the library itself wants whole tensors.
    """
    label_bytes = np.ascontiguousarray(labels, "<i8").tobytes()
    end = len(label_bytes) + 4 * math.prod(shape)
    header = {
        "__metadata__": metadata,
        "labels": {"dtype": "I64", "shape": [len(labels)], "data_offsets": [0, len(label_bytes)]},
        name: {"dtype": "F32", "shape": list(shape), "data_offsets": [len(label_bytes), end]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + label_bytes)
        stream = ArrayStream(file, shape, np.dtype("<f4"))
        yield stream
        stream.finish()
