"""Runs: what one is, the directory it lies in, its checkpoints, and what is left of it."""

from jaxcae.errors import RunError, UnfinishedRunError
from jaxcae.runs.config import Config
from jaxcae.runs.directory import RunDirectory
from jaxcae.runs.entries import read_config
from jaxcae.runs.environment import environment
from jaxcae.runs.finished import (
    Run,
    check_params,
    load_run,
    open_run,
    params_path,
)
from jaxcae.runs.keeper import Keeper
from jaxcae.runs.lock import is_in_use
from jaxcae.runs.log import LogMark, check_log, read_metrics
from jaxcae.runs.trainer import Observer, Outcome, train

__all__ = [
    "Config",
    "Keeper",
    "LogMark",
    "Observer",
    "Outcome",
    "Run",
    "RunDirectory",
    "RunError",
    "UnfinishedRunError",
    "check_log",
    "check_params",
    "environment",
    "is_in_use",
    "load_run",
    "open_run",
    "params_path",
    "read_config",
    "read_metrics",
    "train",
]
