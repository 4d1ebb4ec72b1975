"""What a training run is: one frozen record in sections, and the JSON that it is stored as.

`config.json` says which format it is in. A setting that is added later gets a default that means
"as before" (`sections.added`), so that what was written without it stays readable; whatever else
changes takes a new `FORMAT`, and code beside `_older` that reads the one before.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from jaxcae.activations import get_activation
from jaxcae.errors import InputError, unknown_name
from jaxcae.runs.checks import check_settings
from jaxcae.runs.model_settings import model_shape
from jaxcae.runs.sections import (
    ADDED,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    SeriesConfig,
    TrainingConfig,
)

FORMAT = 1
CONTRACTIVE, PLAIN = "contractive", "plain"
FOR_SERIES = MappingProxyType(
    {
        "standardize": "yes",
        "activation": "softplus",
        "contraction": 1.0,
        "epochs": 0,
        "learning_rate": 2e-3,
    }
)
"""Settings that are not given, where samples are windows of a series."""


@dataclass(frozen=True)
class Config:
    """Everything that decides the outcome of a run, in sections.

    `Config.of(data="rows.csv", sizes=(6, 4, 2), epochs=20)` sorts settings into them.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    series: SeriesConfig = field(default_factory=SeriesConfig, metadata={ADDED: True})

    @classmethod
    def of(cls, **settings: Any) -> "Config":
        """Make a configuration from settings, whichever section each belongs to.

        Args:
            settings: By name; `data` is the source of the data. What is not given has its default,
                which with a `window` is that of `FOR_SERIES`.

        Raises:
            InputError: If there is no setting of a name.
        """
        for name in settings:
            if name not in SETTINGS:
                raise InputError(str(unknown_name("setting", name, SETTINGS)))
        if settings.get("window") is not None:
            settings = {**FOR_SERIES, **settings}
        return cls(
            **{
                section: kind(**{f: settings[s] for s, f in fields.items() if s in settings})
                for section, (kind, fields) in _SECTIONS.items()
            }
        )

    def replace(self, **settings: Any) -> "Config":
        """Return a copy with other values of these settings."""
        return Config.of(**{**dict(self.settings()), **settings})

    def settings(self) -> Iterator[tuple[str, Any]]:
        """Yield every setting by name, across the sections."""
        for section, (_, fields) in _SECTIONS.items():
            for setting, name in fields.items():
                yield setting, getattr(getattr(self, section), name)

    if not TYPE_CHECKING:  # scripts of earlier versions; a type checker should find them

        def __getattr__(self, name: str) -> Any:
            section = SETTINGS.get(name)
            if section is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            warnings.warn(
                f"Config.{name} has moved: read Config.{section}.{name}.",
                DeprecationWarning,
                stacklevel=2,
            )
            return dict(self.settings())[name]

    def check(self) -> None:
        """Check what can be checked without the data.

        Raises:
            InputError: With the first setting that is not usable.
        """
        check_settings(self.data, self.model, self.objective, self.training, self.series)

    def resolve(
        self,
        features: int,
        low: float,
        high: float,
        data_digest: str,
        *,
        standardized: bool = False,
        feature_names: tuple[str, ...] = (),
    ) -> "Config":
        """Fill in what the data decides.

        Args:
            features: The width of a sample.
            low: The smallest value of the data, as the networks see it.
            high: The largest.
            data_digest: The digest of the training data.
            standardized: Whether the data is standardised.
            feature_names: The names of its features.

        Raises:
            InputError: If the settings do not go with the data.
        """
        unit_range, source, loss = low >= 0 and high <= 1, self.data.source, self.objective.loss
        sizes, output = self.model.sizes, self.model.output
        if self.model.kind == "mlp" and self.series.window and not sizes:
            code = min(64, max(1, self.series.window // 2))
            sizes = (features, 2 * code, code)
        elif self.model.kind == "mlp":
            sizes = sizes or (features, 256, min(64, max(1, features // 4)))
        elif self.model.kind not in ("conv", "temporal_conv"):
            output = "identity"  # whatever ends the module is its own
        if sizes and sizes[0] != features:
            raise InputError(
                f"`sizes` begins with {sizes[0]}, {source} has {features} features. "
                f"Use `sizes={(features, *sizes[1:])}`."
            )
        if output == "auto":
            output = "sigmoid" if unit_range and loss == "squared_error" else "identity"
        if loss == "bernoulli":
            if not unit_range:
                raise InputError(
                    f"`loss='bernoulli'` expects data in [0, 1], {source} goes from {low:g} to "
                    f"{high:g}. Use `loss='squared_error'`."
                )
            if output != "identity":
                raise InputError("`loss='bernoulli'` takes logits: leave `output` at identity.")
        reached = get_activation(output)
        if low < reached.least or high > reached.greatest:
            beyond = "below" if low < reached.least else "above"
            bound = reached.least if low < reached.least else reached.greatest
            warnings.warn(
                f"`output={output!r}` is never {beyond} {bound:g}, {source} goes from {low:g} to "
                f"{high:g}: what lies beyond cannot be reconstructed. Use `output='identity'`.",
                stacklevel=2,
            )
        return replace(
            self,
            data=replace(
                self.data,
                standardize="yes" if standardized else "no",
                digest=data_digest,
                feature_names=feature_names,
                digits=self.data.digits if self.data.digest else "float64",
            ),
            model=replace(self.model, sizes=sizes, output=output),
        )

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict: `format`, and one dict for each section."""
        sections = dataclasses.asdict(self)
        if self.series == SeriesConfig():  # a run on rows says nothing of series, as before
            del sections["series"]
        return {"format": FORMAT} | {
            section: {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
            for section, values in sections.items()
        }

    @classmethod
    def from_json(cls, value: Any, source: str = "config.json") -> "Config":
        """Read what `to_json` gave, of this version or an older one.

        Every setting must be there, no other, and each of its type.

        Raises:
            InputError: If it is anything else.
        """
        sections = dict(_table(value, source, "sections"))
        written = sections.pop("format", 0)
        if type(written) is not int or not 0 <= written <= FORMAT:
            raise InputError(
                f"{source}: is in format {written!r:.20}, this version of jaxcae reads up to "
                f"{FORMAT}. Use the version that wrote it, or a newer one."
            )
        if written == 0:
            sections = _older(sections, source)
        optional = {f.name for f in dataclasses.fields(cls) if ADDED in f.metadata}
        _check_names(sections, _SECTIONS, f"{source}: ", "section", optional)
        config = cls(**{name: _read(name, value, source) for name, value in sections.items()})
        try:
            config.check()
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        return config

    def shaped(self, features: int, image: tuple[int, ...] | None) -> "Config":
        """Fill in the shape of a sample as the model takes it; see `model_shape`."""
        shape = model_shape(self.model, features, image, self.series.window)
        return replace(self, model=replace(self.model, shape=shape))

    @property
    def networks(self) -> tuple[str, ...]:
        """Which networks the run trains, by name."""
        if self.objective.contraction == self.objective.curvature == 0:
            return (PLAIN,)
        return (CONTRACTIVE, PLAIN) if self.training.compare else (CONTRACTIVE,)


def differences(stored: Config, asked: Config) -> list[str]:
    """Compare setting by setting: a few words for each that differs.

    Where data lies is no difference if its digest is the same; and for how many epochs a run of a
    constant step size goes on is none, for its first steps do not depend on it.
    """
    moved = "" != stored.data.digest == asked.data.digest
    constant = "constant" == stored.training.schedule == asked.training.schedule
    ignored = {name for name, so in (("data", moved), ("epochs", constant)) if so}
    return [
        f"{_DIGESTS[name]}, whose digest is another"
        if name in _DIGESTS
        else f"`{name}`: {before!r} in the run, {after!r} asked"
        for (name, before), (_, after) in zip(stored.settings(), asked.settings(), strict=True)
        if before != after and name not in ignored
    ]


def main_network(config: Config) -> str:
    """Name the network that the run is for: the contractive one, if it trains one."""
    return config.networks[0]


def monitored(config: Config) -> str:
    """Name the entry of an epoch's record that early stopping watches."""
    return f"held_out_{main_network(config)}/loss"


# Settings whose values say nothing to a reader, in words.
_DIGESTS = {
    "data_digest": "the data",
    "series_digest": "the series",
    "model_source": "the factory's file",
    "metric_digest": "the metric",
    "model_frozen": "what the factory's module holds and does not train",
}

# The name of a setting by itself, where it is another than that of the field in its section.
_NAMES = {
    ("data", "source"): "data",
    ("data", "digest"): "data_digest",
    ("model", "kind"): "model",
    ("model", "args"): "model_args",
    ("model", "source"): "model_source",
    ("model", "frozen"): "model_frozen",
    ("series", "digest"): "series_digest",
}

_SECTIONS: Mapping[str, tuple[type, Mapping[str, str]]] = {
    section.name: (
        kind := get_type_hints(Config)[section.name],
        {_NAMES.get((section.name, f.name), f.name): f.name for f in dataclasses.fields(kind)},
    )
    for section in dataclasses.fields(Config)
}

SETTINGS = MappingProxyType(
    {setting: section for section, (_, fields) in _SECTIONS.items() for setting in fields}
)
"""Every setting and the section that it belongs to."""


def _older(flat: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Sort a file without sections, as version 0.1 wrote it, into sections."""
    for name in flat:
        if name not in SETTINGS:
            raise InputError(f"{source}: {unknown_name('option', name, SETTINGS)}")
    return {
        section: {field: flat[name] for name, field in fields.items() if name in flat}
        for section, (_, fields) in _SECTIONS.items()
    }


def _read(section: str, value: Any, source: str) -> Any:
    kind, names = _SECTIONS[section]
    where, values = f"{source}, {section}: ", _table(value, f"{source}, {section}", "options")
    optional = {f.name for f in dataclasses.fields(kind) if ADDED in f.metadata}
    _check_names(values, names.values(), where, "option", optional)
    for name, hint in get_type_hints(kind).items():
        if name in values and not _has_type(values[name], hint):
            raise InputError(f"{where}{name!r} has the unusable value {values[name]!r:.80}.")
    return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


def _table(value: Any, source: str, of: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{source}: expected a table of {of}, got {type(value).__name__}.")
    return value


def _check_names(
    given: Iterable[str],
    known: Iterable[str],
    where: str,
    kind: str,
    optional: Iterable[str] = (),
) -> None:
    for name in given:
        if name not in known:
            raise InputError(f"{where}{unknown_name(kind, name, known)}")
    for name in known:
        if name not in given and name not in optional:
            raise InputError(f"{where}the {kind} {name!r} is missing.")


def _has_type(value: Any, hint: Any) -> bool:
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        return isinstance(value, list) and all(type(item) is kind for item in value)
    kinds = get_args(hint) or (hint,)
    # A bool is an int in Python, and JSON writes 1.0 and 1 differently.
    return any(type(value) is kind or (kind is float and type(value) is int) for kind in kinds)
