"""A model of scale: what a step of exact training takes, from one CPU to 1,024 accelerators.

An encoder d-h-k with mirrored decoder, a global batch of B samples in float32, an exact penalty,
Adam. All counts are in closed form; `benchmarks.roofline_check` holds them against what XLA
compiles. With p = 2(dh + hk) weights in kernels and P parameters in all, a step is

    plain          6Bp − 2Bdh         there is no product for the gradient of the input
    each sample    4Bh²               products with the gram C = W₂W₂ᵀ ∘ …, forward and backward
    once a batch   4h²(d + k)         the grams of both kernels, and their gradients; 3.5 where one
                                      device mirrors half of a wide one
    Adam           14P

operations. Where devices share a batch, they share the columns of a wide gram. Times are bounds
from a device's published figures, and no measurement: the slowest of compute, memory and links if
all overlap; compute or memory, and then links, if none does.

References:
    Williams, Waterman and Patterson, "Roofline", Communications of the ACM 52 (2009),
    doi:10.1145/1498765.1498785.
"""

import math
from dataclasses import dataclass

DATA, SPLIT_GRAM, FSDP, FEATURES = "data", "data, gram divided", "shard_params", "features"
LAYOUTS = (DATA, SPLIT_GRAM, FSDP, FEATURES)
WORD = 4
"""Bytes of a float32."""
_HALVED = 256
"""Width from which a gram is taken in blocks, of which the lower half is mirrored."""


@dataclass(frozen=True)
class Device:
    """Published figures of a kind of device.

    Attributes:
        name: What it is.
        flops: Dense matrix products, operations a second.
        share: Which part of it products of such sizes reach; a guess, said as such.
        memory_speed: Bytes a second.
        memory: Bytes.
        domain: How many devices have fast links to one another.
        fast: Bytes a second and device, one way, within a domain.
        slow: Bytes a second and device, one way, between domains.
        fast_latency: Seconds of one exchange within a domain.
        slow_latency: Seconds of one exchange between domains.
        launch: Seconds that a step takes whatever it computes.
    """

    name: str
    flops: float
    memory_speed: float
    memory: float
    domain: int
    fast: float
    slow: float
    fast_latency: float
    slow_latency: float
    launch: float
    share: float = 0.4


H100 = Device(
    "H100 SXM (bfloat16 products, NVLink among 8, 400 Gb/s a device between machines)",
    *(990e12, 3.35e12, 80e9, 8, 450e9, 50e9, 8e-6, 20e-6, 30e-6),
)
TPU_V5E = Device(
    "TPU v5e (bfloat16 products, interconnect among 256)",
    *(197e12, 0.82e12, 16e9, 256, 180e9, 3.1e9, 1e-6, 30e-6, 20e-6),
)


@dataclass(frozen=True)
class Case:
    """A step: sizes d, h, k, the global batch, the layout, and over how many devices.

    Attributes:
        sizes: Features, hidden units, code.
        batch: Samples of a step, over all devices.
        layout: One of `LAYOUTS`.
        devices: How many.
        domain: With `features`: over how many of them a row is split; the rest share the rows.
    """

    sizes: tuple[int, int, int]
    batch: int
    layout: str = DATA
    devices: int = 1
    domain: int = 1

    @property
    def parameters(self) -> int:
        """All of the network's, kernels and biases."""
        d, h, k = self.sizes
        return 2 * (d * h + h * k) + 2 * h + d + k

    @property
    def groups(self) -> int:
        """Into how many parts the rows of a batch are divided."""
        return self.devices // self.domain if self.layout == FEATURES else self.devices

    @property
    def kept(self) -> float:
        """Which part of a gram is computed."""
        return 0.75 if self.sizes[1] >= _HALVED else 1.0


def data_parallel(sizes: tuple[int, int, int], batch: int, devices: int) -> Case:
    """Return the case of `jaxcae.layout(devices)`, which divides the columns of wide grams."""
    divided = sizes[1] >= _HALVED and sizes[1] % devices == 0
    return Case(sizes, batch, SPLIT_GRAM if divided else DATA, devices)


def flops(case: Case) -> float:
    """Count the operations of a step on one of the devices."""
    d, h, k = case.sizes
    batch, devices = case.batch, case.devices
    plain = 12 * batch * (d * h + h * k) - 2 * batch * d * h
    each = 4 * batch * h * h
    adam = 14 * case.parameters
    if case.layout == DATA:
        return (plain + each) / devices + (1 + case.kept) * 2 * h * h * (d + k) + adam
    once = 4 * h * h * (d + k)
    if case.layout in (SPLIT_GRAM, FSDP):
        return (plain + each + once) / devices + (
            adam if case.layout == SPLIT_GRAM else adam / devices
        )
    narrow = 12 * batch * h * k  # the layers between the wide ones are repeated within a domain
    split = (1 + case.kept) * 2 * h * h * (d / case.domain + k)
    return (plain - narrow) / devices + (each + narrow) / case.groups + split + adam / case.domain


@dataclass(frozen=True)
class Traffic:
    """Bytes of the results of collectives, as XLA counts them.

    Attributes:
        reduced: Of all-reduces over all devices, or between domains where rows are split.
        gathered: Of gathers and scatters over all devices.
        reduced_inside: Of all-reduces within a domain, where rows are split over it.
    """

    reduced: float = 0
    gathered: float = 0
    reduced_inside: float = 0


def traffic(case: Case) -> Traffic:
    """Count the bytes that the collectives of a step make."""
    d, h, k = case.sizes
    count = case.parameters
    if case.devices == 1:
        return Traffic()
    if case.layout == DATA:  # gradients, that of the penalty's gram, loss and its norm
        return Traffic(WORD * (count + h * h) + 8)
    if case.layout == SPLIT_GRAM:
        handed = h * h + d * h + h * k + 2 * h * h / case.devices
        return Traffic(WORD * (count + h * h) + 8, WORD * handed)
    if case.layout == FSDP:
        return Traffic(WORD * case.kept * h * h + 8, WORD * (2 * count + 2 * h * h))
    rows = case.batch / case.groups
    between = WORD * (count / case.domain + h * h) if case.groups > 1 else 0
    return Traffic(between, 0, WORD * (2 * rows * h + case.kept * h * h + rows + h))


@dataclass(frozen=True)
class Step:
    """Seconds of a step, by what bounds them, and bytes of memory on a device."""

    compute: float
    memory: float
    links: float
    launch: float
    held: float

    @property
    def overlapped(self) -> float:
        """If computing, reading and exchanging all go on at once."""
        return max(self.compute, self.memory, self.links) + self.launch

    @property
    def in_turn(self) -> float:
        """If the links wait for the rest."""
        return max(self.compute, self.memory) + self.links + self.launch

    @property
    def limit(self) -> str:
        """What to make faster first."""
        parts = {
            "compute": self.compute,
            "memory": self.memory,
            "links": self.links,
            "launch": self.launch,
        }
        return max(parts, key=lambda name: parts[name])


def step(device: Device, case: Case) -> Step:
    """Bound the time of a step from a device's figures."""
    d, h, k = case.sizes
    inside = case.domain if case.layout == FEATURES else min(device.domain, case.devices)
    outside = max(1, case.devices // inside)
    moved = traffic(case)
    links = 0.0
    if case.devices > 1:
        links += _within_and_between(moved.reduced, 2, case, device, inside, outside)
        links += _within_and_between(moved.gathered, 1, case, device, inside, outside)
        links += 2 * moved.reduced_inside * (inside - 1) / inside / device.fast
        exchanges = 3 if case.layout == FEATURES else 1
        links += exchanges * device.fast_latency * math.ceil(math.log2(max(inside, 2)))
        links += device.slow_latency * math.ceil(math.log2(outside)) if outside > 1 else 0
    share = {FSDP: case.devices, FEATURES: case.domain}.get(case.layout, 1)
    own = case.parameters / share
    rows = case.batch / case.groups
    width = d / case.domain if case.layout == FEATURES else d
    # Parameters, gradients and Adam's two moments; activations of both ways; grams.
    state = 4 * WORD * own + (WORD * case.parameters if case.layout == FSDP else 0)
    active = WORD * rows * (3 * width + 6 * h + 2 * k) + 3 * WORD * h * h
    return Step(
        flops(case) / (device.flops * device.share),
        (7 * WORD * own + 2 * active) / device.memory_speed,
        links,
        device.launch,
        state + active,
    )


def _within_and_between(
    size: float, ways: int, case: Case, device: Device, inside: int, outside: int
) -> float:
    """Seconds to reduce (2 ways) or gather (1): inside a domain, then a part of it between them."""
    if case.layout == FEATURES:  # what is reduced is a domain's part already
        return ways * size * (outside - 1) / outside / device.slow
    within = ways * size * (inside - 1) / inside / device.fast
    return within + ways * size / inside * (outside - 1) / outside / device.slow
