"""The order of examples, in pure numpy: a function of (seed, epoch, index) and of nothing else.

Nothing here has state. The training stream is endless and any of its positions can be computed on its own,
so a run resumes at batch b without reading what came before, and processes share a batch without talking.
The bits come straight from the Philox counter: numpy promises those streams for ever, whereas it may change
what `Generator.permutation` does with them.
"""

import functools

import numpy as np

_ORDER, _AUGMENTATION = 0, 1  # the two independent Philox streams of an epoch


def _bits(seed: int, epoch: int, stream: int, n: int) -> np.ndarray:
    key = np.array([seed, epoch], np.uint64)  # a list would go through float64 and lose the low bits of a seed
    return np.random.Philox(key=key, counter=[0, 0, 0, stream]).random_raw(n)


@functools.lru_cache(maxsize=4)  # batches straddle two epochs, and prefetching may be one epoch ahead
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation in which an epoch visits its examples.

    Args:
        seed: run seed, 0 ≤ seed < 2⁶⁴.
        epoch: epoch number from 0.
        n: number of examples.

    Returns:
        int64 [n], each of 0 … n − 1 once; read-only, because it is cached.
    """
    order = np.argsort(_bits(seed, epoch, _ORDER, n), kind='stable')
    order.flags.writeable = False
    return order


@functools.lru_cache(maxsize=4)
def augmentation_seeds(seed: int, epoch: int, n: int) -> np.ndarray:
    """The random numbers that an epoch gives each example for its crop and flip.

    Args:
        seed: run seed, 0 ≤ seed < 2⁶⁴.
        epoch: epoch number from 0.
        n: number of examples.

    Returns:
        uint32 [n, 2]; row i belongs to example i, wherever in the epoch it comes; read-only.
    """
    bits = _bits(seed, epoch, _AUGMENTATION, n)
    seeds = np.stack([bits >> np.uint64(32), bits & np.uint64(0xFFFFFFFF)], axis=1).astype(np.uint32)
    seeds.flags.writeable = False
    return seeds


def stream_rows(seed: int, positions: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """What stands at the given positions of the endless training stream.

    Position p is example order[p mod n] of epoch ⌊p / n⌋.

    Args:
        seed: run seed.
        positions: int64 [k], stream positions from 0.
        n: number of examples.

    Returns:
        Example indices, int64 [k], and their augmentation seeds, uint32 [k, 2].
    """
    indices = np.empty(len(positions), np.int64)
    seeds = np.empty((len(positions), 2), np.uint32)
    epochs, places = np.divmod(positions, n)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        indices[here] = epoch_order(seed, epoch, n)[places[here]]
        seeds[here] = augmentation_seeds(seed, epoch, n)[indices[here]]
    return indices, seeds


def sequential_rows(positions: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """What stands at the given positions of one pass in index order, for evaluation.

    Args:
        positions: int64 [k], positions from 0; those from n on are padding.
        n: number of examples.

    Returns:
        Example indices, int64 [k], −1 for padding, and seeds, uint32 [k, 2], all zero: nothing is drawn.
    """
    return np.where(positions < n, positions, -1), np.zeros((len(positions), 2), np.uint32)


def process_positions(rows: np.ndarray, global_batch: int, process_index: int, process_count: int) -> np.ndarray:
    """The stream positions of the rows that one process reads, batch after batch.

    Global batch b holds positions b·G … (b + 1)·G − 1; process k of P owns its rows k·G/P … (k + 1)·G/P − 1.

    Args:
        rows: int64 [k], counted from the process's first row of batch 0; G/P of them make a batch.
        global_batch: G, a multiple of the number of processes.
        process_index: k, from 0.
        process_count: P.

    Returns:
        int64 [k].
    """
    local_batch = global_batch // process_count
    batches, places = np.divmod(rows, local_batch)
    return batches * global_batch + process_index * local_batch + places
