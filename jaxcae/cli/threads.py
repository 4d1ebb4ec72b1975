"""How many threads the linear algebra underneath may take."""

import contextlib
import importlib
from collections.abc import Iterator


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep LAPACK to one thread per call while many small matrices are decomposed.

    XLA decomposes the matrices of a batch one after another, or in threads of its own. On the CPU
    each call then wakes all threads of OpenBLAS for a matrix that one of them would have finished
    meanwhile: twice as slow on an idle machine of two cores, and far worse on a busy one.
    """
    from threadpoolctl import threadpool_limits

    # The limit holds for the libraries that are loaded by now, and JAX takes SciPy's when it needs
    # them.
    importlib.import_module("scipy.linalg")

    with threadpool_limits(limits=1, user_api="blas"):
        yield
