"""Where a network is cut into pipeline stages, and what each stage then does and holds.

A split names the first block of a stage; the first stage begins with the stem. The best splits make the slowest
stage as fast as they can, since in a full pipeline every stage waits for it. A block's forward pass counts its
multiply-adds and `MOVED` for each number kept for the backward, as moving numbers takes time as well. A stage's work on
a micro-batch is its forward pass once forward, twice backward, and again as often as the backward needs it recomputed,
in forward passes:

| recompute | stages before the last | last stage |
| --------- | ---------------------- | ---------- |
| none      | 3                      | 3          |
| stage     | 4                      | 3          |
| block     | 5                      | 4          |

Its device holds, in bytes:

- weights: for each parameter the stored weight, its copy in the compute dtype if that is another, the optimizer's
  state, the fp32 gradient accumulator and fp32 averages;
- stash: for each micro-batch between its forward and its backward the stage's input (the first stage has the images
  anyway), or all that the backward needs under recompute='none'. Stage s of S holds 2 (S - 1 - s) micro-batches
  under the grouped schedule, one under the sequential; the last stage none;
- activations: what the backward in progress needs, see costs.py; under recompute='block' the inputs of all blocks
  and the rest of the block that needs most.

Not counted are the uint8 images, which all devices of a replica hold whatever the splits, and what is there for a
moment only: gradients of activations, hand-over buffers, the optimizer's temporaries.
"""

import dataclasses
import itertools
import math
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from efficientnet.errors import ConfigError
from efficientnet.model.costs import FP32_BYTES, BlockCost
from efficientnet.model.scaling import ModelSpec, block_names
from efficientnet.parallel.pipeline import SCHEDULES

if TYPE_CHECKING:
    from efficientnet.numerics.precision import Policy  # imports JAX, which nothing here needs

# Multiply-adds in whose time a kept number is written and read. It fits what two stages of B0 G16 were measured to take
# (128 pixels, two cores of an AMD EPYC), first ÷ second: cut at block4a 1.80, block3b 1.43, block3a 1.06, by this 1.98,
# 1.49, 1.09. Accelerators, whose memory is slower beside their arithmetic, should want more; none was measured.
MOVED = 100
PASSES = {'none': (3, 3), 'block': (5, 4), 'stage': (4, 3)}  # stages before the last, last stage; see above
BUFFERS = {'lars': 1, 'sgd': 1, 'rmsprop': 2}  # numbers of optimizer state a parameter
PUBLISHED = {'b4': ('block4a',)}  # the reference's splits for its own run, group size 16

Price = tuple[float, int, int]  # of a stage: its work, the bytes on its device, the bytes it sends on
Prices = dict[tuple[int, int], dict[int, Price]]  # by number and first block of the stage, then by first block after it


@dataclasses.dataclass(frozen=True)
class Storage:
    """Bytes of the numbers that a device holds; by default those of 16.16 with LARS.

    Attributes:
        compute: Of an activation, and of a weight cast for it.
        master: Of a stored weight.
        state: Of a number of optimizer state.
        buffers: Numbers of optimizer state a parameter.
        averages: Averages of the weights that are kept, in fp32.
        accumulator: Of a number of the gradient accumulators.
    """

    compute: int = 2
    master: int = 2
    state: int = 2
    buffers: int = 1
    averages: int = 0
    accumulator: int = FP32_BYTES

    @property
    def parameter(self) -> int:
        """Bytes held for one parameter, its gradient accumulator included."""
        copy = 0 if self.compute == self.master else self.compute
        return self.master + copy + self.buffers * self.state + self.averages * FP32_BYTES + self.accumulator


DEFAULT_STORAGE = Storage()


def storage_of(policy: 'Policy', optimizer: str, averages: int = 0) -> Storage:
    """Returns the storage under a precision policy.

    Args:
        policy: Of precision.py.
        optimizer: A key of `BUFFERS`.
        averages: Averages of the weights that are kept.

    Raises:
        ConfigError: Unknown optimizer.
    """
    if optimizer not in BUFFERS:
        raise ConfigError(f'optimizer.name={optimizer!r} is unknown; choose one of {", ".join(BUFFERS)}')
    sizes = (policy.compute.itemsize, policy.master.itemsize, policy.state.itemsize)
    return Storage(*sizes, BUFFERS[optimizer], averages)


def check_kinds(recompute: str, schedule: str) -> None:
    """Raises ConfigError unless both are known."""
    for field, value, known in (('recompute', recompute, PASSES), ('pipeline', schedule, SCHEDULES)):
        if value not in known:
            raise ConfigError(f'{field}={value!r} is unknown; choose one of {", ".join(known)}')


@dataclasses.dataclass(frozen=True)
class StageCost:
    """What one stage does with a micro-batch, and what its device holds.

    Attributes:
        blocks: Names in order.
        parameters: Trained numbers.
        macs: Multiply-adds of one image's forward pass.
        work: On one micro-batch, there and back: multiply-adds and `MOVED` for each number kept, or seconds where
            blocks were timed.
        weights: Bytes held for the parameters.
        stash: Bytes held for micro-batches between their forward and their backward.
        activations: Bytes that the backward in progress needs.
        sent: Bytes of a micro-batch's activation for the next stage; its gradient comes back as large.
    """

    blocks: tuple[str, ...]
    parameters: int
    macs: int
    work: float
    weights: int
    stash: int
    activations: int
    sent: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.stash + self.activations


def parse_splits(text: str | Sequence[str]) -> tuple[str, ...] | Literal['auto']:
    """Reads splits as people write them: 'block4a,block6a', ('block4a',), "('block4a',)", 'auto', '' for none.

    Raises:
        ConfigError: It is neither text nor a sequence of texts.
    """
    parts = text.strip(' ()[]').split(',') if isinstance(text, str) else text
    if not isinstance(parts, Sequence) or not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"splits={text!r} must be 'auto' or names of blocks such as 'block4a,block6a'")
    names = tuple(name for part in parts if (name := part.strip(' \'"')))
    return 'auto' if names == ('auto',) else names


def check_splits(spec: ModelSpec, splits: Sequence[str]) -> None:
    """Raises ConfigError unless `splits` are blocks of the network, each once, in its order, without 'stem'."""
    known, given = block_names(spec), f'splits={",".join(splits)!r}'
    for name in splits:
        if name not in known:
            raise ConfigError(f'{given}: {name!r} is no block of this network, which has {_in_short(known)}')
    if 'stem' in splits:
        raise ConfigError(f"{given}: 'stem' begins the first stage anyway; name the first block of every other stage")
    ordered = sorted(set(splits), key=known.index)
    if len(ordered) < len(splits):
        raise ConfigError(f'{given} must name every block once, {",".join(ordered)!r}')
    if ordered != list(splits):
        raise ConfigError(f"{given} must be in the network's order, {','.join(ordered)!r}")


def resolve_splits(
    text: str | Sequence[str], stages: int, spec: ModelSpec, costs: Sequence[BlockCost], **options: Any
) -> tuple[str, ...]:
    """Returns the splits that a config's fields `splits` and `stages` ask for together.

    Args:
        text: As of `parse_splits`.
        stages: How many there shall be; 1 is also what it is where only splits are given.
        spec: The network.
        costs: Of its blocks, from which 'auto' is balanced.
        options: Of `balance`.

    Raises:
        ConfigError: The two disagree, or as the functions that are named.
    """
    splits = parse_splits(text)
    if splits == 'auto':
        return balance(costs, stages, **options)
    check_splits(spec, splits)
    if stages not in (1, len(splits) + 1):
        raise ConfigError(
            f'stages={stages} and splits={",".join(splits)!r} disagree: those make {len(splits) + 1} stages; give one'
        )
    return splits


def config_options(config: Any, policy: 'Policy', *, pipelined: bool) -> dict[str, Any]:
    """Returns the options of `stage_table` and `balance` that a config asks for.

    Args:
        config: With the fields of configs/base.py.
        policy: That it names.
        pipelined: Whether it has more than one stage; else no schedule is read.
    """
    averages = (config.averaging.epoch_decay > 0) + (config.averaging.update_decay > 0)
    return {
        'recompute': config.recompute,
        'schedule': config.pipeline if pipelined else 'grouped',
        'micro_batch': config.micro_batch,
        'storage': storage_of(policy, config.optimizer.name, averages),
    }


def stage_blocks(spec: ModelSpec, splits: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Returns the names of the blocks of each stage.

    Args:
        spec: The network.
        splits: First block of every stage but the first.

    Raises:
        ConfigError: As `check_splits`.
    """
    check_splits(spec, splits)
    names = block_names(spec)
    return tuple(names[start:stop] for start, stop in _spans(names, splits))


def stage_table(
    costs: Sequence[BlockCost],
    splits: Sequence[str],
    recompute: str = 'stage',
    *,
    schedule: str = 'grouped',
    micro_batch: int = 1,
    storage: Storage = DEFAULT_STORAGE,
    seconds: Mapping[str, float] | None = None,
) -> list[StageCost]:
    """Returns what each stage does and holds.

    Args:
        costs: Of all blocks, in order.
        splits: First block of every stage but the first, such as `check_splits` lets pass.
        recompute: A key of `PASSES`.
        schedule: A key of `pipeline.SCHEDULES`.
        micro_batch: Images.
        storage: Bytes of numbers.
        seconds: Measured time of each block's forward pass on a micro-batch, in place of multiply-adds and `MOVED`.

    Raises:
        ConfigError: An option is unknown or out of range, or a block has no time.
    """
    spans = _spans([block.name for block in costs], splits)
    pipeline = _Pipeline(tuple(costs), len(spans), recompute, schedule, micro_batch, storage, seconds)
    return [pipeline.stage(number, start, stop) for number, (start, stop) in enumerate(spans)]


def balance(
    costs: Sequence[BlockCost],
    stages: int,
    recompute: str = 'stage',
    *,
    schedule: str = 'grouped',
    micro_batch: int = 1,
    storage: Storage = DEFAULT_STORAGE,
    seconds: Mapping[str, float] | None = None,
    budget: int | None = None,
) -> tuple[str, ...]:
    """Returns the splits whose slowest stage has the least work.

    Among equals it takes those whose fullest device holds least, then those that send least over their widest
    boundary, then those that come first in the network. Exact, in O(blocks² · stages) by dynamic programming.

    Args:
        costs: As in `stage_table`, and so are the options.
        stages: How many there shall be.
        recompute: A key of `PASSES`.
        schedule: A key of `pipeline.SCHEDULES`.
        micro_batch: Images.
        storage: Bytes of numbers.
        seconds: Measured times of the blocks.
        budget: Bytes that no device may exceed; None for no limit.

    Raises:
        ConfigError: There are fewer blocks than stages, the budget is too small for any splits, or as `stage_table`.
    """
    if not 1 <= stages <= len(costs):
        raise ConfigError(f'stages={stages} must be at least 1 and at most {len(costs)}, the number of blocks')
    pipeline = _Pipeline(tuple(costs), stages, recompute, schedule, micro_batch, storage, seconds)
    prices = pipeline.prices()
    limits = [math.inf, math.inf if budget is None else budget, math.inf]
    # Each criterion is minimised within the limits that those before it have set. In one pass over all of them a
    # stage would be followed by the rest that is best by itself, though the maximum may lie elsewhere.
    for criterion in range(len(limits)):
        rest = _smallest_maxima(prices, limits, criterion)
        if rest[0, 0] == math.inf:
            least = _smallest_maxima(prices, [math.inf] * len(limits), 1)[0, 0]
            raise ConfigError(
                f'budget={budget} bytes a device is too small for stages={stages}; no splits need less than {least}'
            )
        limits[criterion] = rest[0, 0]
    start, splits = 0, []
    for number in range(stages - 1):
        options = prices[number, start].items()
        start = min(s for s, price in options if _within(price, limits) and rest[number + 1, s] <= limits[-1])
        splits.append(costs[start].name)
    return tuple(splits)


class _Load(NamedTuple):
    """Sums over some blocks in a row, bytes of a micro-batch."""

    parameters: int
    macs: int
    forward: float  # work of a micro-batch's forward pass
    inputs: int
    kept: int
    beyond: int  # the most that a block keeps besides its input


@dataclasses.dataclass(frozen=True)
class _Pipeline:
    """A network in so many stages, wherever it is cut; the fields are as in `stage_table`."""

    costs: tuple[BlockCost, ...]
    stages: int
    recompute: str
    schedule: str
    micro_batch: int
    storage: Storage
    seconds: Mapping[str, float] | None

    def __post_init__(self) -> None:
        check_kinds(self.recompute, self.schedule)
        if self.micro_batch < 1:
            raise ConfigError(f'micro_batch={self.micro_batch} must be at least 1')
        untimed = [block.name for block in self.costs if self.seconds is not None and block.name not in self.seconds]
        if untimed:
            raise ConfigError(f'seconds must have every block; {", ".join(untimed)} is missing')

    def stage(self, number: int, start: int, stop: int) -> StageCost:
        """Returns stage `number` if it has the blocks from `start` to before `stop`."""
        load = self._loads(start)[stop - start - 1]
        weights, stash, activations = self._held(number, start, load)
        return StageCost(
            blocks=tuple(block.name for block in self.costs[start:stop]),
            parameters=load.parameters,
            macs=load.macs,
            work=self._work(number, load),
            weights=weights,
            stash=stash,
            activations=activations,
            sent=self._sent(number, stop),
        )

    def prices(self) -> Prices:
        """Returns the price of every stage that leaves all others at least one block, first stages first."""
        prices, count = {}, len(self.costs)
        loads = [self._loads(start) for start in range(count)]
        for number in range(self.stages):
            after = self.stages - 1 - number
            for start in range(number, count - after) if number else (0,):
                stops = range(start + 1, count - after + 1) if after else (count,)
                spans = {stop: loads[start][stop - start - 1] for stop in stops}
                prices[number, start] = {
                    stop: (self._work(number, load), sum(self._held(number, start, load)), self._sent(number, stop))
                    for stop, load in spans.items()
                }
        return prices

    def _loads(self, start: int) -> list[_Load]:
        """What the blocks from `start` up to each later one, and it, come to together."""
        loads, load = [], _Load(0, 0, 0, 0, 0, 0)
        for block in self.costs[start:]:
            taken = self._input(block)
            kept = self.micro_batch * block.kept_bytes(self.storage.compute)
            forward = self.micro_batch * (block.macs + MOVED * (block.kept + block.kept_fp32))
            if self.seconds is not None:
                forward = self.seconds[block.name]
            load = _Load(
                load.parameters + block.parameters,
                load.macs + block.macs,
                load.forward + forward,
                load.inputs + taken,
                load.kept + kept,
                max(load.beyond, kept - taken),
            )
            loads.append(load)
        return loads

    def _work(self, number: int, load: _Load) -> float:
        return load.forward * PASSES[self.recompute][number == self.stages - 1]

    def _held(self, number: int, start: int, load: _Load) -> tuple[int, int, int]:
        """Bytes of weights, stash and activations."""
        after = self.stages - 1 - number
        stashed = load.kept if self.recompute == 'none' else self._input(self.costs[start]) * (number > 0)
        activations = load.inputs + load.beyond if self.recompute == 'block' else load.kept
        stash = stashed * (2 * after if self.schedule == 'grouped' else min(after, 1))
        return load.parameters * self.storage.parameter, stash, activations

    def _sent(self, number: int, stop: int) -> int:
        return self._input(self.costs[stop]) if number < self.stages - 1 else 0

    def _input(self, block: BlockCost) -> int:
        """Bytes of a micro-batch's activation that enters a block."""
        return self.micro_batch * block.boundary * self.storage.compute


def _smallest_maxima(prices: Prices, limits: Sequence[float], criterion: int) -> dict[tuple[int, int], float]:
    """Returns, by stage and start, the smallest maximum of a criterion over it and all later ones; inf if none fits."""
    least = {}
    for number, start in reversed(prices):  # the last stage first
        maxima = [
            max(price[criterion], least.get((number + 1, stop), 0.0))  # nothing comes after the last block
            for stop, price in prices[number, start].items()
            if _within(price, limits)
        ]
        least[number, start] = min(maxima, default=math.inf)
    return least


def _within(price: Price, limits: Sequence[float]) -> bool:
    work, held, sent = limits  # spelt out: the planner's sweep calls this 740,000 times
    return price[0] <= work and price[1] <= held and price[2] <= sent


def _spans(names: Sequence[str], splits: Sequence[str]) -> list[tuple[int, int]]:
    """Indices of the first block of each stage and of the first after it."""
    return list(itertools.pairwise([0, *map(names.index, splits), len(names)]))


def _in_short(names: Sequence[str]) -> str:
    """'stem, block1a-b, block2a-d, …, head'."""
    runs = itertools.groupby(names, key=lambda name: name.rstrip(string.ascii_lowercase) or name)
    ends = [[*run] for _, run in runs]
    return ', '.join(run[0] if len(run) == 1 else f'{run[0]}-{run[-1][-1]}' for run in ends)
