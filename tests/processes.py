"""Python processes that tests start, talk to and stop."""

import os
import subprocess
import sys


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Start `python -c CODE ARGUMENTS…` on the CPU, with pipes to all its streams."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
