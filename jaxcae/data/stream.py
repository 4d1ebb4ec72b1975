"""`.npy` files larger than memory: rows read from disk as they are needed, a batch at a time."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxcae.data.arrays import wide_type
from jaxcae.data.dataset import split_rows
from jaxcae.data.files import NpyFiles
from jaxcae.data.preparation import Preparation
from jaxcae.data.standardization import Moments, Standardization
from jaxcae.data.values import BLOCK_BYTES, Caster
from jaxcae.errors import InputError, check_positive_int

_SPOTS = 256
_ENDLESS = 2**62
"""Batches of a stream without end."""


class NpySource:
    """Random access to the rows of a `.npy` in C order, as float32, with nothing kept in memory.

    A folder of `.npy` files of one width is one set. Reading is thread-safe. Files are closed when
    the last source that shares them is gone.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        flatten: bool = False,
        standardization: Standardization | None = None,
        missing: str = "refuse",
        fill: np.ndarray | None = None,
        narrow: bool = False,
    ) -> None:
        """Open the file and read its header.

        Args:
            path: The file, or a folder of files, taken in the order of their names.
            flatten: Flatten samples of higher rank.
            standardization: What to apply to the rows, on all their digits.
            missing: Whether to "refuse" NaN, or to take it for a missing value ("mean", "drop").
            fill: What to put in place of missing values; None leaves them.
            narrow: Go through float32 before standardising, as early versions did.

        Raises:
            InputError: If it is not a usable `.npy`. Rows of one in Fortran order are refused only
                when they are read.
        """
        self.path = Path(path)
        self._files = NpyFiles(self.path, flatten)
        self.num_rows, self.num_features = self._files.num_rows, self._files.num_features
        self.feature_shape = self._files.feature_shape
        self.standardization, self.missing, self.fill = standardization, missing, fill
        self._wide = wide_type(self._files.dtype) if not narrow else np.dtype(np.float32)
        self._rows: np.ndarray | None = None  # None: all rows, in order

    @property
    def fortran_order(self) -> bool:
        """Whether a row is scattered over the whole file, so that it cannot be streamed."""
        return self._files.scattered

    def __len__(self) -> int:
        return self.num_rows if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return one sample, shape (features,), or refuse a value that float32 cannot hold."""
        return self.read(np.asarray([index]))[0]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return samples by their numbers, shape (len(rows), features), in one pass over the file.

        Raises:
            InputError: If float32 cannot hold a value.
        """
        return self._cast_rows(rows if self._rows is None else self._rows[rows])

    def __repr__(self) -> str:
        return f"NpySource({str(self.path)!r}, {len(self)} × {self.num_features})"

    def split(self, held_out: float = 0.2, seed: int = 0) -> tuple["NpySource", "NpySource"]:
        """Split as `split` splits a data set in memory: the same rows for the same seed.

        Memory: eight bytes per row, for the permutation.
        """
        order, count = split_rows(str(self.path), len(self), held_out, seed)
        return self._take(order[count:]), self._take(order[:count])

    def standardized(
        self, standardization: Standardization | None, fill: np.ndarray | None = None
    ) -> "NpySource":
        """Return the same rows with `standardization` applied, and `fill` where none is."""
        source = copy.copy(self)
        source.standardization, source.fill = standardization, fill
        return source

    def fit_standardization(self) -> Standardization:
        """Fit mean and deviation of each feature on these rows alone, in one pass over the file.

        Raises:
            InputError: If a value anywhere in the file is unusable.
        """
        return Standardization.fit_blocks(self._chosen())

    def fit_fill(self) -> np.ndarray:
        """Return the mean of each feature over these rows, missing values left out."""
        moments = Moments()
        for block in self._chosen():
            moments.add(block)
        return moments.known_mean()

    def without_missing(self) -> "NpySource":
        """Return the source of those rows in which no value is missing."""
        rows = np.arange(self.num_rows) if self._rows is None else self._rows
        whole = np.concatenate([~np.isnan(block).any(1) for block in self._scan_raw(True)])
        rows = rows[whole[rows]]
        if not len(rows):
            raise InputError(f"{self.path}: no rows: there is a missing cell in every one.")
        source = copy.copy(self)
        source._rows = rows
        return source

    def _chosen(self) -> Iterator[np.ndarray]:
        """Yield the rows of this source with all their digits, in the order of the file."""
        chosen = np.full(self.num_rows, self._rows is None)
        if self._rows is not None:
            chosen[self._rows] = True
        start = 0
        for block in self._scan_raw(True):
            yield block[chosen[start : start + len(block)]]
            start += len(block)

    def check(self) -> None:
        """Read every row of the file once, and refuse what float32 cannot hold.

        Raises:
            InputError: With the count of unusable values and the first row and column.
        """
        for _ in self.scan():
            pass

    def spot_check(self) -> None:
        """Refuse columns of which float32 would keep little, by rows spread over the file.

        Raises:
            InputError: Naming the columns.
        """
        if self.standardization is None and self._wide.itemsize > 4 and not self.fortran_order:
            numbers = np.unique(np.linspace(0, self.num_rows - 1, _SPOTS).astype(int))
            caster = Caster(self.path, missing=True)
            caster.taken(self._files.read(numbers), 0, np.float32)
            caster.check_spacing()

    def scan(self, size: int | None = None) -> Iterator[np.ndarray]:
        """Yield the rows of the whole file in file order, and refuse unusable values at its end.

        Rows with a missing value are left out where `missing` is "drop".
        What was computed from the blocks is void if this raises. Unlike `blocks` it can tell how
        many values are unusable.
        """
        for block in self._scan_raw(self.standardization is not None, size):
            if self.missing == "drop":
                block = block[~np.isnan(block).any(axis=1)]
            yield self._prepared(block)

    def _scan_raw(self, wide: bool, size: int | None = None) -> Iterator[np.ndarray]:
        caster = Caster(self.path, self._files.place, missing=self.missing != "refuse")
        step = size or self._rows_at_once()
        for start in range(0, self.num_rows, step):
            yield self._cast(caster, start, min(step, self.num_rows - start), wide)
        caster.finish()

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """Yield all rows in order, at most `size` at a time: for evaluation and scoring."""
        check_positive_int("size", size)
        for start in range(0, len(self), size):
            yield self.read(np.arange(start, min(start + size, len(self))))

    def _take(self, rows: np.ndarray) -> "NpySource":
        source = copy.copy(self)
        source._rows = rows if self._rows is None else self._rows[rows]
        return source

    def _rows_at_once(self) -> int:
        return max(1, BLOCK_BYTES // (self.num_features * self._files.dtype.itemsize))

    def _cast_rows(self, numbers: np.ndarray) -> np.ndarray:
        caster = Caster(
            self.path,
            place=lambda index, column: self._files.place(int(numbers[index]), column),
            missing=self.missing != "refuse",
            spacing=False,
        )
        wide = self.standardization is not None
        taken = caster.taken(self._files.read(numbers), 0, self._wide if wide else np.float32)
        caster.finish()
        return self._prepared(taken)

    def _cast(self, caster: Caster, row: int, count: int, wide: bool) -> np.ndarray:
        block = self._files.read(np.arange(row, row + count))
        return caster.taken(block, row, self._wide if wide else np.float32)

    def _prepared(self, rows: np.ndarray) -> np.ndarray:
        return Preparation(self.standardization, None, self.fill).apply(rows)


@runtime_checkable
class Rows(Protocol):
    """Samples that can be read by their numbers: `len(rows)`, and a whole batch in one call."""

    def __len__(self) -> int: ...

    def read(self, rows: np.ndarray, /) -> np.ndarray:
        """Return samples, shape (len(rows), *features), in the order asked for."""
        ...


class StreamedBatches:
    """The batches of a training run over a file larger than memory, found again from a step.

    Args:
        source: The rows to train on; anything with `len` and `read`.
        batch_size: Rows per batch; the last batch of an epoch may be short.
        seed: Seed of the order; see `stream`.
    """

    def __init__(self, source: Rows, batch_size: int, seed: int = 0) -> None:
        check_positive_int("batch_size", batch_size)
        self._source, self._batch_size, self._seed = source, batch_size, seed
        self._rows_here: Callable[[int], Any] | None = None

    def of_rows(self, rows_here: Callable[[int], Any]) -> "StreamedBatches":
        """Return the same batches, of which only some rows are read; the others are zeros.

        Which rows make a batch follows from the seed and the step alone, so processes that each
        read a part of every batch see, together, what one process would.

        Args:
            rows_here: The numbers of the rows to read, of a batch of a size.
        """
        batches = copy.copy(self)
        batches._rows_here = rows_here
        return batches

    @property
    def steps_per_epoch(self) -> int:
        """How many batches make an epoch, a short last one included."""
        return -(-len(self._source) // self._batch_size)

    def from_step(self, step: int) -> Iterator[np.ndarray]:
        """Iterate without end over the batches of the steps from `step` on."""
        batches = stream(
            self._source,
            self._batch_size,
            self._seed,
            drop_remainder=False,
            rows_here=self._rows_here,
        )
        try:
            batches.set_state({"next_index": step})
            yield from batches
        finally:
            batches.close()


class _Epochs:
    """Batches by their number: rows permuted anew in each epoch, by its number and the seed."""

    def __init__(
        self, source: Rows, batch_size: int, seed: int, per_epoch: int, rows_here: Any = None
    ) -> None:
        self._source, self._size, self._seed = source, batch_size, seed
        self._per_epoch, self._rows_here = per_epoch, rows_here
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, number: int) -> np.ndarray:
        epoch, index = divmod(number, self._per_epoch)
        order = self._orders.get(epoch)
        if order is None:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._source))
            # That before stays: threads that read ahead cross into an epoch one by one.
            kept = {k: v for k, v in self._orders.items() if k == epoch - 1}
            self._orders = {**kept, epoch: order}
        rows = order[index * self._size : (index + 1) * self._size]
        if self._rows_here is None:
            return self._source.read(rows)
        here = self._rows_here(len(rows))
        read = self._source.read(rows[here])
        batch = np.zeros((len(rows), *read.shape[1:]), read.dtype)  # not touched, not in memory
        batch[here] = read
        return batch


def stream(
    source: Rows | str | Path,
    batch_size: int,
    seed: int = 0,
    *,
    epochs: int | None = None,
    drop_remainder: bool = True,
    num_threads: int = 2,
    prefetch: int = 4,
    rows_here: Callable[[int], Any] | None = None,
) -> Any:
    """Iterate over shuffled batches of a `.npy`, in bounded memory.

    Every epoch visits the rows in a new order that depends on `seed` and the epoch alone, and
    batches do not cross epochs. A batch is one call of `read`. Threads read ahead; there are no
    worker processes. Memory: the batches read ahead, and eight bytes a row for the order.

    Args:
        source: A path, or anything with `len` and `read`: an `NpySource`, such as one half of a
            split, or rows of your own.
        batch_size: Rows per batch.
        seed: Seed of the order, from 0 to 2³² − 1.
        epochs: How many epochs; None for no end.
        drop_remainder: Leave out each epoch's last rows if they fill no batch, so that every
            batch has one shape. They differ from epoch to epoch.
        num_threads: Threads that read ahead.
        prefetch: Batches read ahead, which are what is held in memory.
        rows_here: Gives the numbers of the rows to read of a batch of a size, for a process that
            takes a part of every batch; the other rows are zeros. All by default.

    Returns:
        A grain `DatasetIterator` of float32 arrays (batch, features). `get_state()` and
        `set_state()` resume it at the same batch, and a checkpoint can hold it. Call `close()`
        when done.

    Raises:
        InputError: If the file is not usable, or holds fewer rows than one batch.
    """
    try:
        import grain
    except ImportError:
        raise InputError(
            "streaming needs the grain package, which is not installed: run pip install grain"
        ) from None
    source = NpySource(source) if isinstance(source, str | Path) else source
    if isinstance(source, NpySource):
        source.spot_check()
    check_positive_int("batch_size", batch_size)
    if drop_remainder and len(source) < batch_size:
        name = getattr(source, "path", "the source")
        raise InputError(
            f"{name}: {len(source)} rows do not fill one batch of {batch_size}. "
            "Choose a smaller batch."
        )
    per_epoch = len(source) // batch_size
    per_epoch += not drop_remainder and len(source) % batch_size > 0
    dataset = grain.MapDataset.range(_ENDLESS if epochs is None else epochs * per_epoch)
    dataset = dataset.map(_Epochs(source, batch_size, seed, per_epoch, rows_here))
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(dataset.to_iter_dataset(options))
