"""The model of a stored run, made again: by its factory, where the user names it.

A run directory may come from anywhere, and to import a module is to run its code. So what a
directory names is never imported on its word: whoever opens it names the factory once more. That
the model is then the one that was trained is checked by the shapes of its parameters and by a
digest of what it holds beside them; a digest of the factory's file tells whether it was edited.
"""

import sys
import warnings
from dataclasses import replace
from pathlib import Path

from jaxcae.errors import CheckpointError, RunError
from jaxcae.files import sha256_of_file
from jaxcae.models.factory import is_factory, load_factory
from jaxcae.runs.config import Config
from jaxcae.runs.leaves import digest_of_tree
from jaxcae.runs.recipe import make_model, make_unflattened
from jaxcae.types import Autoencoder


def confirm_factory(config: Config, model: str | None, path: Path) -> Config:
    """Return the configuration with the factory that the user names for it.

    Args:
        config: The configuration that is stored.
        model: What the user names; None for nothing.
        path: The directory of the run, for messages.

    Raises:
        RunError: If the run's model needs to be named and is not, or is no factory's.
    """
    kind = config.model.kind
    if not is_factory(kind):
        if model not in (None, kind):
            raise RunError(f"{path}: its model is {kind}, got {model!r:.80}.")
        return config
    if model is None:
        raise RunError(
            f"{path}: its model is made by {kind}, and code is not run on the word of a directory. "
            f"If you know that module, name it: `model={kind}`."
        )
    if not is_factory(model):
        raise RunError(f"{path}: its model is made by {kind}, got {model!r:.80}.")
    return config.replace(model=model)


def remake_model(config: Config, model: str | None, path: Path) -> Autoencoder:
    """Make the model of a stored run once more.

    Args:
        config: The configuration that is stored.
        model: The factory, named by the user; None where the model is a built-in one.
        path: The directory of the run, for messages.

    Raises:
        RunError: If the factory has not been named.
        InputError: If it cannot be imported, or makes no autoencoder of such samples.
        CheckpointError: If its module holds other arrays, beside parameters, than it did.
    """
    confirmed = confirm_factory(config, model, path)
    autoencoder = make_model(confirmed)
    if identified(confirmed).model.frozen != config.model.frozen:
        raise CheckpointError(
            f"{path}: what the module of {confirmed.model.kind} holds and does not train, such as "
            "statistics of normalisation, is not what the run was trained with."
        )
    return autoencoder


def identified(config: Config) -> Config:
    """Fill in the digests by which a factory's model is told from another.

    That of its file is written when a run begins; an edit since then is warned of, and no more, as
    most edits do not touch the model. Arrays that are not trained decide results.
    """
    settings = config.model
    if not is_factory(settings.kind):
        return config
    now = _source_digest(settings.kind)
    if settings.source not in ("", now):
        warnings.warn(
            f"the file of {settings.kind} has changed since the run began; that the model has not "
            "is checked by the shapes of its parameters alone.",
            stacklevel=2,
        )
    frozen = getattr(make_unflattened(config), "frozen", {})
    digest = digest_of_tree(frozen)
    return replace(config, model=replace(settings, source=settings.source or now, frozen=digest))


def _source_digest(name: str) -> str:
    load_factory(name)
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return sha256_of_file(Path(file)) if file is not None and Path(file).is_file() else ""
