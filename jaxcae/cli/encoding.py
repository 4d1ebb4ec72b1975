"""Any encoding: what a stream cannot encode is written in ASCII, `‖J‖²` as `||J||^2`.

A terminal under `LC_ALL=C`, a pipe under `PYTHONIOENCODING=ascii` or a file in Latin-1 must not end
a command that has done its work.
"""

import codecs
import io
import sys

_ASCII = {
    "‖": "||", "²": "^2", "³": "^3", "−": "-", "→": "->", "←": "<-", "·": "|", "…": "...",
    "×": "x", "÷": "/", "≥": ">=", "≤": "<=", "≈": "~", "±": "+-", "–": "-", "—": "-",
    "\u0302": "^", "\u00a0": " ", "’": "'", "‘": "'", "“": '"', "”": '"', "√": "sqrt",
    "λ": "lambda", "σ": "sigma", "ε": "eps", "Σ": "sum", "μ": "mu", "γ": "gamma", "∇": "grad",
    "ᵀ": "^T", "₀": "_0", "₁": "_1", "₂": "_2", "ᵢ": "_i", "½": "1/2", "¼": "1/4", "∞": "inf",
    "•": "*", "✓": "ok", "✗": "x", "━": "=", "╸": "=", "╺": "-",
}  # fmt: skip
_FRAMES = range(0x2500, 0x2580)  # lines and corners of boxes


def ascii_of(text: str) -> str:
    """Write text in ASCII; a character with no form of its own becomes `?`."""
    return "".join(c if c.isascii() else _form(c) for c in text)


def encodable(text: str, encoding: str | None) -> str:
    """Return text as it is, or all of it in ASCII where one character of it cannot be encoded."""
    try:
        text.encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return ascii_of(text)
    return text


def any_encoding() -> None:
    """Let this process print any character on stdout and stderr."""
    codecs.register_error("jaxcae.ascii", _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="jaxcae.ascii")


def _form(character: str) -> str:
    if character in _ASCII:
        return _ASCII[character]
    if ord(character) in _FRAMES:
        return "|" if character in "│┃║" else "-" if character in "─═" else "+"
    return "?"


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return ascii_of(error.object[error.start : error.end]), error.end
