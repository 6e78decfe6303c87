"""From TFDS, ImageNet's own shards or image folders to uint8 batches, sharded by process and exactly resumable.

Knows nothing of the model or of devices.
"""

from input_pipeline.batches import evaluation_batches, train_batches
from input_pipeline.errors import DataError
from input_pipeline.sources import EMBEDDED, OTHER_TEST, CachedSource, Source, open_source

__all__ = [
    'EMBEDDED',
    'OTHER_TEST',
    'CachedSource',
    'DataError',
    'Source',
    'evaluation_batches',
    'open_source',
    'train_batches',
]
