"""What a device holds, by part."""

from collections.abc import Sequence

from efficientnet.parallel.layout import Layout
from efficientnet.parallel.stages import StageCost, Storage
from experiments.planner.systems import Software


def memory_parts(
    software: Software, image: int, layout: Layout, table: Sequence[StageCost], storage: Storage
) -> dict[str, float]:
    """Returns the bytes on the fullest device by part.

    Args:
        software: What runs there.
        image: Bytes of an image.
        layout: Replicas, stages and accumulation.
        table: The stages.
        storage: Bytes of numbers.
    """
    images = image * images_held(software, layout)
    copy = 0 if storage.compute == storage.master else storage.compute
    each = [
        {
            'weights': stage.parameters * (storage.master + copy),
            'optimizer state': stage.parameters * storage.buffers * storage.state,
            'gradients': stage.parameters * storage.accumulator * software.gradients,
            'averages': stage.parameters * storage.averages * 4,
            'stash': stage.stash,
            'activations': stage.activations,
            'images': images * (number == 0 or software.uniform),
        }
        for number, stage in enumerate(table)
    ]
    if software.uniform:
        return {part: max(parts[part] for parts in each) for part in each[0]}
    return max(each, key=lambda parts: sum(parts.values()))


def images_held(software: Software, layout: Layout) -> int:
    """Returns how many images a device holds that is given images."""
    if software.streamed:
        return (1 + software.prefetch) * layout.micro_batch
    # A device holds its share of each batch, fetched ahead or in use, and all of its replica's during the update.
    share = -(-layout.rows // layout.stages)
    return (1 + software.prefetch) * share + (layout.rows if layout.stages > 1 else 0)
