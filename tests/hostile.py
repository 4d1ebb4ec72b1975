"""Hostile input files, made by code so that no bomb lies in the repository.

Each entry of `HOSTILE` is a file that a reader must refuse, and the words by which it must say
why. `write(folder, name)` makes the file.
"""

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

BOMB_BYTES = 3 << 30


class Hostile(NamedTuple):
    """A file that must be refused: its ending, its bytes, and a pattern of the refusal."""

    suffix: str
    content: Callable[[], bytes]
    complaint: str


class RunsCode:
    """An object whose unpickling leaves a mark: `ran` in the environment of this module."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        """Call `mark` when unpickled."""
        return mark, ("unpickled",)


MARKS: list[str] = []


def mark(word: str) -> None:
    """Remember that hostile code ran."""
    MARKS.append(word)


def write(folder: Path, name: str) -> Path:
    """Make the hostile file called `name` in `folder`."""
    suffix, content, _ = HOSTILE[name]
    path = folder / f"{name.replace(' ', '_')}{suffix}"
    path.write_bytes(content())
    return path


def npy(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    """Return an array as the bytes of a `.npy`."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    """Return arrays as the bytes of a compressed `.npz`."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def header(description: str, *, version: bytes = b"\x01\x00") -> bytes:
    """Return a `.npy` that is nothing but a header, with any text as its description."""
    text = description.encode("latin-1") + b"\n"
    size = struct.pack("<H", len(text)) if version == b"\x01\x00" else struct.pack("<I", len(text))
    return b"\x93NUMPY" + version + size + text


def promise(shape: str, dtype: str = "'<f4'", fortran: bool = False) -> bytes:
    """Return a header that promises this shape."""
    return header(f"{{'descr': {dtype}, 'fortran_order': {fortran}, 'shape': {shape}, }}")


def zeros_deflated(num_bytes: int) -> bytes:
    """Return a raw deflate stream of that many zeros, without ever holding them."""
    block = 1 << 26
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
    # After a full flush nothing refers back, so the same bytes can follow again and again.
    tail = packer.compress(bytes(num_bytes % block)) + packer.flush()
    return packed * (num_bytes // block) + tail


def raw_zip(name: str, stored: bytes, packed: bytes, declared: int) -> bytes:
    """Return a zip of one deflated member whose declared size may be a lie."""
    # A stored deflate block (at most 65,535 bytes) carries the header; zeros follow it.
    opening = b"\x00" + struct.pack("<HH", len(stored), len(stored) ^ 0xFFFF) + stored
    data, encoded = opening + packed, name.encode()
    size = min(declared, 0xFFFFFFFF)
    fields = (20, 0, 8, 0, 0, 0, len(data), size, len(encoded), 0)
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", *fields) + encoded
    central = struct.pack(
        "<4s6H3I5H2I", b"PK\x01\x02", 20, *fields, 0, 0, 0, 0, 0
    ) + encoded  # fmt: skip
    where = len(local) + len(data)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(central), where, 0)
    return local + data + central + end


def bomb(shape: str, declared_extra: int = BOMB_BYTES) -> bytes:
    """Return a 3 MB `.npz` that expands to 3 GB, whose array header promises `shape`."""
    head = promise(shape)
    return raw_zip("features.npy", head, zeros_deflated(BOMB_BYTES), len(head) + declared_extra)


def encrypted() -> bytes:
    """Return an `.npz` whose member claims to be encrypted."""
    content = bytearray(npz(features=np.ones((4, 3), np.float32)))
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(magic) + offset] |= 1
    return bytes(content)


def damaged_member() -> bytes:
    """Return an `.npz` with one flipped bit in its packed values: the checksum must tell."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    np.savez(buffer, features=rng.random((64, 8), np.float32))
    content = bytearray(buffer.getvalue())
    content[len(content) // 2] ^= 1
    return bytes(content)


def many_members() -> bytes:
    """Return an archive of far more members than anyone saves."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(1001):
            archive.writestr(f"a{i}.npy", b"")
    return buffer.getvalue()


def twice_the_same_name() -> bytes:
    """Return an archive with two members of one name, of which readers would pick different."""
    content = npz(aaaaaaaa=np.ones((2, 2), np.float32), features=np.ones((2, 2), np.float32))
    return content.replace(b"aaaaaaaa.npy", b"features.npy")


def packed_by_bzip2() -> bytes:
    """Return an archive packed by a method that NumPy does not write."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("features.npy", npy(np.ones((2, 2), np.float32)))
    return buffer.getvalue()


def with_value(dtype: type, value: float) -> np.ndarray:
    """Return a 5 × 4 array that holds `value` at row 3, column 2 and at row 4, column 0."""
    array = np.ones((5, 4), dtype)
    array[3, 2] = array[4, 0] = value
    return array


_OBJECTS = np.array([[RunsCode(), 1.0], [2.0, 3.0]], dtype=object)
_ROWS = "1,2,3\n4,5,6\n"

HOSTILE: dict[str, Hostile] = {
    # .npy
    "empty": Hostile(".npy", lambda: b"", "empty: no rows"),
    "not an array": Hostile(".npy", lambda: b"hello, this is text", "not a usable .npy"),
    "magic alone": Hostile(".npy", lambda: b"\x93NUMPY", "not a usable .npy"),
    "zero rows": Hostile(".npy", lambda: npy(np.ones((0, 5))), "no rows"),
    "zero columns": Hostile(".npy", lambda: npy(np.ones((5, 0))), "no features"),
    "rank 0": Hostile(".npy", lambda: npy(np.array(3.0)), "a single number"),
    "rank 1": Hostile(".npy", lambda: npy(np.ones(7)), r"rank 2.*shape \(7,\).*flatten"),
    "rank 3": Hostile(".npy", lambda: npy(np.ones((2, 3, 4))), r"shape \(2, 3, 4\).*flatten"),
    "objects": Hostile(".npy", lambda: npy(_OBJECTS, allow_pickle=True), "never loaded"),
    "a pickle": Hostile(".npy", lambda: pickle.dumps(RunsCode()), "not a usable .npy"),
    "text": Hostile(".npy", lambda: npy(np.array([["a", "b"]])), "expected numbers"),
    "complex": Hostile(".npy", lambda: npy(np.ones((2, 2), complex)), "expected numbers"),
    "dates": Hostile(".npy", lambda: npy(np.zeros((2, 2), "datetime64[s]")), "expected numbers"),
    "records": Hostile(".npy", lambda: npy(np.zeros((2, 2), "i4,f8")), "expected numbers"),
    "truncated": Hostile(".npy", lambda: npy(np.ones((50, 40)))[:-1], "16000 bytes.*15999"),
    "trailing": Hostile(".npy", lambda: npy(np.ones((50, 40))) + b"!", "16000 bytes.*16001"),
    "header lies": Hostile(".npy", lambda: promise("(30000, 30000)"), "promises 3600000000"),
    "header lies absurdly": Hostile(".npy", lambda: promise(f"({10**30}, {10**30})"), "promises"),
    "negative shape": Hostile(".npy", lambda: promise("(-4, -5)"), "makes no sense"),
    "negative rows": Hostile(".npy", lambda: promise("(-4, 5)"), "makes no sense"),
    "shape of booleans": Hostile(".npy", lambda: promise("(True, True)"), "makes no sense"),
    "shape of text": Hostile(".npy", lambda: promise("('4', 5)"), "not a usable .npy"),
    "header of code": Hostile(
        ".npy", lambda: header("__import__('tests.hostile').hostile.mark('ran')"), "not a usable"
    ),
    "deep header": Hostile(".npy", lambda: header("(" * 4000 + ")" * 4000), "not a usable .npy"),
    "long header": Hostile(
        ".npy", lambda: header(" " * 200_000, version=b"\x02\x00"), "header is too long"
    ),
    "nan": Hostile(
        ".npy", lambda: npy(with_value(np.float32, np.nan)), "2 values.*nan at row 3, column 2"
    ),
    "infinity": Hostile(
        ".npy", lambda: npy(with_value(np.float64, -np.inf)), "2 values.*-inf at row 3, column 2"
    ),
    "nan in half": Hostile(
        ".npy", lambda: npy(with_value(np.float16, np.nan)), "2 values.*row 3, column 2"
    ),
    "float64 out of range": Hostile(
        ".npy", lambda: npy(with_value(np.float64, 1e300)), r"range of float32.*1e\+300 at row 3"
    ),
    "large integers": Hostile(
        ".npy", lambda: npy(with_value(np.int64, 2**40)), "1099511627776 at row 3, column 2"
    ),
    "smallest integer": Hostile(
        ".npy", lambda: npy(with_value(np.int64, -(2**63))), "-9223372036854775808 at row 3"
    ),
    "large unsigned": Hostile(
        ".npy", lambda: npy(with_value(np.uint64, 2**64 - 1)), "18446744073709551615 at row 3"
    ),
    "nan in Fortran order": Hostile(
        ".npy",
        lambda: npy(np.asfortranarray(with_value(np.float32, np.nan))),
        "2 values.*row 3, column 2",
    ),
    # .npz
    "empty archive": Hostile(".npz", lambda: npz(), "no rows"),
    "empty zip file": Hostile(".npz", lambda: b"", "no rows"),
    "not a zip": Hostile(".npz", lambda: b"PK\x03\x04 but no more", "not a usable .npz"),
    "two arrays": Hostile(".npz", lambda: npz(a=np.ones((2, 2)), b=np.ones((2, 2))), "which array"),
    "objects in npz": Hostile(".npz", lambda: _savez_objects(), "never loaded"),
    "zip bomb": Hostile(".npz", lambda: bomb("(32768, 24576)"), "the cap is"),
    "zip bomb that lies": Hostile(".npz", lambda: bomb("(3, 4)"), "promises 48 bytes"),
    "zip bomb that lies twice": Hostile(
        ".npz", lambda: bomb("(3, 4)", declared_extra=48), "not a usable .npz: Bad CRC"
    ),
    "encrypted": Hostile(".npz", encrypted, "encrypted"),
    "damaged": Hostile(".npz", damaged_member, "not a usable .npz: Bad CRC"),
    "many members": Hostile(".npz", many_members, "1001 arrays"),
    "one name twice": Hostile(".npz", twice_the_same_name, "share one name"),
    "bzip2": Hostile(".npz", packed_by_bzip2, "packed by a method"),
    "labels too short": Hostile(
        ".npz", lambda: npz(features=np.ones((5, 2)), labels=np.ones(4)), "one label per row"
    ),
    "nan in npz": Hostile(
        ".npz", lambda: npz(features=with_value(np.float32, np.nan)), "2 values.*row 3, column 2"
    ),
    # .csv
    "empty csv": Hostile(".csv", lambda: b"", "empty: no rows"),
    "header only": Hostile(".csv", lambda: b"a,b,c\n", "a header and no rows"),
    "byte order mark only": Hostile(".csv", lambda: b"\xef\xbb\xbf", "empty: no rows"),
    "ragged": Hostile(".csv", lambda: (_ROWS + "7,8\n").encode(), "line 3 has 2 columns, exp.* 3"),
    "too wide": Hostile(".csv", lambda: (_ROWS + "7,8,9,10\n").encode(), "line 3 has 4 columns"),
    "trailing comma": Hostile(".csv", lambda: b"1,2,\n3,4,\n", "line 1, column 3.*is empty"),
    "text cell": Hostile(
        ".csv", lambda: (_ROWS + "7,eight,9\n").encode(), "line 3, column 2: 'eight' is not"
    ),
    "missing cell": Hostile(".csv", lambda: (_ROWS + "7,,9\n").encode(), "line 3, column 2.*empty"),
    "not available": Hostile(".csv", lambda: (_ROWS + "7,NA,9\n").encode(), "column 2: 'NA' is"),
    "missing first line": Hostile(".csv", lambda: b"NA,NA\n1,2\n3,4\n", "line 1, column 1: 'NA'"),
    "a name twice": Hostile(".csv", lambda: b"a,b,a\n1,2,3\n", "line 1, column 3.*'a' comes twice"),
    "a column without a name": Hostile(".csv", lambda: b",a\nx,1\n", "line 1, column 1: .*no name"),
    "blank line": Hostile(".csv", lambda: b"1,2\n\n3,4\n", "line 2 is blank"),
    "blank last line": Hostile(".csv", lambda: b"1,2\n3,4\n\n", "line 3 is blank"),
    "semicolons": Hostile(".csv", lambda: b"1;2;3\n4;5;6\n", "commas, not by ';'|separated by ';'"),
    "decimal commas": Hostile(".csv", lambda: b"1,5;2,5\n3,5;4,5\n", "';'"),
    "semicolons under a header": Hostile(".csv", lambda: b"a;b\n1;2\n", "separated by ';'"),
    "tabs": Hostile(".csv", lambda: b"1\t2\n3\t4\n", "tabs"),
    "utf-16": Hostile(".csv", lambda: _ROWS.encode("utf-16"), "UTF-16"),
    "utf-16 without a mark": Hostile(".csv", lambda: _ROWS.encode("utf-16-le"), "UTF-16"),
    "latin-1 header": Hostile(".csv", lambda: "größe,b\n1,2\n".encode("latin-1"), "not text in U"),
    "nan cell": Hostile(".csv", lambda: (_ROWS + "7,nan,9\n").encode(), "line 3, column 2"),
    "infinite cell": Hostile(".csv", lambda: (_ROWS + "7,-inf,9\n").encode(), "line 3, column 2"),
    "1e400": Hostile(".csv", lambda: (_ROWS + "7,8,1e400\n").encode(), "1e400 at line 3, column 3"),
    "1e300": Hostile(".csv", lambda: (_ROWS + "7,8,1e300\n").encode(), r"1e\+300 at line 3, col"),
    "underscores": Hostile(".csv", lambda: (_ROWS + "7,1_0,9\n").encode(), "'1_0' is not a number"),
    "a number in the header": Hostile(".csv", lambda: b"a,2\n1,2\n", "line 1, column 1: 'a' is"),
    "label column alone": Hostile(".csv", lambda: b"label\n1\n2\n", "no features"),
    "digits of another script": Hostile(
        ".csv", lambda: (_ROWS + "7,٣,9\n").encode(), "line 3, column 2"
    ),
    "one endless line": Hostile(".csv", lambda: b"1" * ((1 << 24) + 2), "longer than"),
    "a million columns": Hostile(".csv", lambda: b"1" + b",1" * (1 << 20), "1048577 columns"),
    # other
    "another ending": Hostile(".txt", lambda: b"1,2\n", r"ends in \.npy"),
}  # fmt: skip


def _savez_objects() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=True, features=_OBJECTS)
    return buffer.getvalue()
