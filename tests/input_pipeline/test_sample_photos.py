import numpy as np
import pytest

from input_pipeline.errors import DataError
from input_pipeline.sources import open_source


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
def test_two_real_photographs(split):
    source = open_source('sample_photos', split)
    images, labels, _ = source.read(np.arange(2))
    assert (source.num_examples, source.classes, labels.tolist()) == (2, ('china', 'flower'), [0, 1])
    assert all(image.startswith(b'\xff\xd8') and len(image) > 100_000 for image in images)
    assert source.locate(1).endswith('flower.jpg')


def test_an_unknown_split():
    with pytest.raises(DataError, match=r"input\.train_split = 'val' must be one of train, validation, test"):
        open_source('sample_photos', 'val', train_split='val')
