"""The settings of a run, by what they decide; the docstrings are the help of the command line.

A setting that comes later takes its default from `added`, and files without it stay readable.
"""

from dataclasses import dataclass, field
from math import prod
from typing import TypeVar

from jaxcae.data.tables import TableOptions

ADDED = "added after its format"

T = TypeVar("T")


def added(default: T) -> T:
    """Give a setting that older files lack the value that they are read with: "as before"."""
    return field(default=default, metadata={ADDED: True})


@dataclass(frozen=True)
class DataConfig:
    """Which samples, and how they are read."""

    source: str = "mnist5k"
    """Name of a data set (mnist5k, digits, shuttle, breast_cancer) or series (mitdb, ucr135, yahoo,
    uniDS, ecg3, daphnet), or a file: .npy, .npz, .csv, .csv.gz, .tsv or .parquet, or a folder of
    .npy."""
    held_out: float = 0.2
    """Fraction of the samples to hold out for evaluation."""
    stream: bool = False
    """Read a .npy from disk while training, for data larger than memory."""
    standardize: str = "auto"
    """Scale features to mean 0, deviation 1 of the training split: yes, no, auto (tabular sets)."""
    flatten: bool = False
    """Accept arrays of rank 3 and more, one sample per entry of the first axis."""
    digest: str = ""
    """Digest of the training data; filled in by the run."""
    label_column: str | None = added(None)
    """Column of labels, by name; `label` where there is one. Without names, its number from 1."""
    drop: tuple[str, ...] = added(())
    """Columns to leave out, such as a time."""
    header: str = added("auto")
    """Whether the first line of a CSV names the columns: yes, no, or auto, which does not guess."""
    delimiter: str | None = added(None)
    """What separates the cells of a CSV: comma, semicolon, tab, space, bar or a character."""
    decimal: str = added("point")
    """Decimal mark of a CSV: point or comma."""
    missing: str = added("refuse")
    """Missing cells: refuse, drop their rows, or put the mean of the training split there."""
    array: str | None = added(None)
    """Which array of a .npz holds the samples, where there are several."""
    feature_names: tuple[str, ...] = added(())
    """Names of the features in their order; filled in by the run, and expected of other data."""
    digits: str = added("float32")
    """Digits that standardisation works on; filled in by the run, float32 in old ones."""
    time_column: str | None = added(None)
    """Column of times, which is no feature: ISO 8601 or numbers such as epoch seconds."""

    @property
    def table(self) -> TableOptions:
        """How to read the data where it is a table."""
        return TableOptions(
            self.label_column,
            self.drop,
            self.header,
            self.delimiter,
            self.decimal,
            self.missing,
            self.array,
            self.feature_names or None,
            time_column=self.time_column,
        )


@dataclass(frozen=True)
class SeriesConfig:
    """How a series is cut into windows. Nothing is asked for where samples are rows."""

    window: int | None = added(None)
    """Rows of a window. Samples are then the windows of a series, and scores are of its rows;
    settings that are not given take values that suit a series."""
    train_until: str | None = added(None)
    """Train on the rows before this ROW or TIME; on all of them unless given."""
    normal_label: str | None = added(None)
    """Label of the normal rows, the only ones to train on; 0, false or normal unless given."""
    max_gap: float = added(1.5)
    """A step in time that is longer than so many median ones is a gap, which no window crosses."""
    score: str = added("two_scale")
    """What alarms go by: two_scale, reconstruction, neighbour or reconstruction+neighbour
    (experimental), or jacobian_norm (of contractive networks)."""
    train_rows: int = added(0)
    """How many rows come before the end of training; filled in by the run."""
    digest: str = added("")
    """Digest of those rows; filled in by the run."""


@dataclass(frozen=True)
class ModelConfig:
    """The autoencoder."""

    kind: str = added("mlp")
    """mlp, conv (for images), temporal_conv (for windows of a series), or PACKAGE.MODULE:FACTORY, a
    function or class of yours: it gives a module of Flax or Equinox with encode and decode, or a
    jaxcae.Autoencoder."""
    args: tuple[str, ...] = added(())
    """key=value, … for the factory, or for conv and temporal_conv (features, latent, kernel_size,
    stride). Values are Python literals; what is none is text."""
    shape: tuple[int, ...] = added(())
    """Shape of a sample as conv, temporal_conv or the factory takes it, such as 28 28 1; by default
    found by the data for conv, by the window for temporal_conv, and one row for a factory."""
    sizes: tuple[int, ...] = ()
    """Widths from the features to the code, such as 784 256 64; by default chosen by the data."""
    activation: str = "relu"
    """Hidden activation: sigmoid, tanh, softplus, elu, gelu, silu, relu or identity."""
    latent_activation: str = "identity"
    """Activation on the code."""
    output: str = "auto"
    """Activation on the reconstruction; auto is sigmoid for data in [0, 1], else identity."""
    tied: bool = False
    """Decode with the encoder's kernels, transposed."""
    source: str = added("")
    """Digest of the file that the factory is in; filled in by the run."""
    frozen: str = added("")
    """Digest of what the factory's module holds and does not train; filled in by the run."""

    @property
    def num_features(self) -> int:
        """The width of a sample as a row; 0 before the data has been seen."""
        return self.sizes[0] if self.sizes else prod(self.shape) if self.shape else 0

    @property
    def label(self) -> str:
        """A few words for titles."""
        if self.kind == "mlp":
            return f"{'-'.join(map(str, self.sizes))} {self.activation}"
        return f"{self.kind} of {'×'.join(map(str, self.shape))}"


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised."""

    loss: str = "squared_error"
    """Reconstruction loss: squared_error or bernoulli (cross-entropy, for data in [0, 1])."""
    features: str = "sum"
    """How the reconstruction loss reduces over features: sum or mean."""
    contraction: float = 0.03
    """λ, the weight of the squared Frobenius norm of the encoder's Jacobian."""
    method: str = "auto"
    """How to compute the norms; auto is exact, and plans for speed."""
    l1: float = 0.0
    """Weight of Σ|w| over the kernels."""
    l2: float = 0.0
    """Weight of Σw² over the kernels."""
    corruption: str = "gaussian"
    """Corruption of the input where noise-scale is above 0: gaussian or masking."""
    noise_scale: float = 0.0
    """Deviation of the noise, or probability of masking; 0 trains on the samples as they are."""
    curvature: float = added(0.0)
    """γ, the weight of the squared sum of the encoder's second derivatives, ‖∇²h‖²; 0 for none."""
    curvature_method: str = added("auto")
    """How to compute it: auto (exact, for one or two elementwise layers) or hutchinson (any)."""
    input_metric: str | None = added(None)
    """Directions that contraction and curvature count, weighed: data:RANK for so many principal
    ones of the training data by their deviations, or a .npy of shape (rows, features), or
    (features,); all alike unless given."""
    metric_digest: str = added("")
    """Digest of the metric; filled in by the run."""


@dataclass(frozen=True)
class TrainingConfig:
    """How it is minimised."""

    epochs: int = 60
    """How often to go through the data; 0, for windows of a series: about 1,200 steps."""
    batch_size: int = 128
    """Samples per step; the last batch of an epoch may be short."""
    learning_rate: float = 3e-3
    """Adam's step size at the start."""
    schedule: str = "cosine"
    """How the step size changes: cosine (to 0 at the last step) or constant."""
    patience: int | None = None
    """Stop after so many epochs without a lower held-out loss, and keep the best epoch's result."""
    seed: int = 0
    """Seed of the split, the initial parameters, the order of samples and the noise."""
    compare: bool = True
    """Also train the same network without the penalty, from the same seed, to compare."""
    pretrain: int = added(0)
    """Epochs for each layer by itself, on the codes of the one before (greedy stacking), before all
    of them are trained together; 0 for none."""
