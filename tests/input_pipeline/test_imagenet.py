"""ImageNet's own shards, written here record by record: order, labels, boxes, and what is said of incomplete sets."""

import numpy as np
import pytest

from input_pipeline import DataError, evaluation_batches, imagenet, open_source, train_batches
from input_pipeline.quiet_tf import tf

SHARDS, EACH = 3, 4


def picture(number):
    """A JPEG of 40 × 60 pixels with three bands of colour, lighter for higher numbers."""
    image = np.zeros((40, 60, 3), np.uint8)
    for band in range(3):
        image[:, 20 * band : 20 * band + 20, band] = 100 + 10 * number
    return tf.io.encode_jpeg(image, quality=95).numpy()


def example(number, boxes=()):
    """The features under the names of the original scripts; boxes are ymin, xmin, ymax, xmax."""
    feature = {
        'image/encoded': tf.train.Feature(bytes_list=tf.train.BytesList(value=[picture(number)])),
        'image/class/label': tf.train.Feature(int64_list=tf.train.Int64List(value=[number + 1])),
        'image/filename': tf.train.Feature(bytes_list=tf.train.BytesList(value=[b'n01440764_1.JPEG'])),
    }
    for side, values in zip(('ymin', 'xmin', 'ymax', 'xmax'), zip(*boxes, strict=True), strict=False):
        feature[f'image/object/bbox/{side}'] = tf.train.Feature(float_list=tf.train.FloatList(value=values))
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


BOXES = {
    0: [(0.25, 0.5, 0.75, 1.0)],
    1: [(0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)],
    2: [(-0.5, 0.1, 1.5, 0.9)],  # sticks out
    3: [(0.5, 0.5, 0.5, 0.9), (0.9, 0.1, 0.2, 0.8)],  # empty, upside down
}


def write(folder, split='train'):
    folder.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        with tf.io.TFRecordWriter(str(folder / f'{split}-{shard:05d}-of-{SHARDS:05d}')) as writer:
            for number in range(shard * EACH, (shard + 1) * EACH):
                writer.write(example(number, BOXES.get(number, ())))


@pytest.fixture
def shards(tmp_path):
    write(tmp_path)
    write(tmp_path, 'validation')
    return tmp_path


def opened(root, split='train'):
    return open_source('imagenet_tfrecords', split, str(root))


def test_examples_labels_and_boxes(shards):
    source = opened(shards)
    assert source.num_examples == SHARDS * EACH
    order = np.array([7, 0, 11, 1, 2, 3])
    images, labels, boxes = source.read(order)
    assert labels.tolist() == order.tolist()  # counted from 1 in the file
    assert list(images) == [picture(number) for number in order]
    whole = [[0, 0, 1, 1]]
    clipped = [[0, 0.1, 1, 0.9]]
    for found, want in zip(boxes, [whole, BOXES[0], whole, BOXES[1], clipped, whole], strict=True):
        np.testing.assert_array_equal(found, np.array(want, np.float32))
    assert source.locate(7).endswith('train-00001-of-00003 record 3')


def test_the_classes_are_those_of_tfds(shards):
    classes = opened(shards).classes
    assert len(set(classes)) == 1000
    assert (classes[0], classes[999]) == ('n01440764', 'n15075141')
    assert list(classes) == sorted(classes)


def test_shards_may_lie_in_a_folder_of_the_split(tmp_path):
    write(tmp_path / 'train')
    assert opened(tmp_path).num_examples == SHARDS * EACH


def test_boxes_decide_where_crops_are(shards):
    # The annotated quarter of image 0 lies right of the middle; every crop holds a tenth of it and often little else.
    source = opened(shards)
    options = {'image_size': 8, 'global_batch': 12, 'num_batches': 40, 'seed': 0, 'flip': False, 'crop_covered': 1.0}
    seen = 0
    for batch in train_batches(source, crop_area=(0.3, 0.6), **options):
        for label, image in zip(batch['label'], batch['image'], strict=True):
            if label == 0:
                seen += 1
                assert image[:, -1, 2].mean() > 60  # blue, the right band, reaches the right edge
                assert image[:, -1, 0].mean() < 40
    assert seen == 40


def test_kill_and_resume_over_processes_is_the_same_stream(shards):
    source = opened(shards)
    options = {'image_size': 8, 'global_batch': 6, 'num_batches': 7, 'seed': 5}
    whole = list(train_batches(source, **options))
    for count in (1, 2, 3):
        parts = [
            list(train_batches(source, start_batch=3, process_index=k, process_count=count, **options))
            for k in range(count)
        ]
        for number, batches in enumerate(zip(*parts, strict=True)):
            for name in ('image', 'label', 'mask'):
                joined = np.concatenate([batch[name] for batch in batches])
                np.testing.assert_array_equal(joined, whole[3 + number][name])
    epochs = np.concatenate([batch['label'] for batch in whole])[:36].reshape(3, 12)
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs.tolist())


def test_evaluation(shards):
    (batch,) = evaluation_batches(opened(shards, 'validation'), image_size=16, batch=12)
    assert batch['label'].tolist() == list(range(12))
    assert batch['mask'].all()


def test_what_is_incomplete_is_named(shards, tmp_path):
    with pytest.raises(DataError, match=r"input.test_split = 'test': no shards test-00000-of-… .* train, validation"):
        opened(shards, 'test')
    (shards / 'train-00001-of-00003').rename(shards / 'aside')
    with pytest.raises(DataError, match=r'2 shards that do not make up 3: .*train-00001-of-00003'):
        opened(shards)
    (shards / 'aside').rename(shards / 'train-00001-of-00002')
    with pytest.raises(DataError, match='do not make up'):
        opened(shards)
    with pytest.raises(DataError, match=r"input.dir = '.*nowhere' is not a folder"):
        opened(tmp_path / 'nowhere')
    with pytest.raises(DataError, match=r'input.dir is empty; with dataset = .imagenet_tfrecords. it must name'):
        open_source('imagenet_tfrecords', 'train')


def test_a_record_without_image_or_label_is_damaged_and_named(shards, caplog):
    path = shards / 'train-00000-of-00003'
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(b'no example')
        writer.write(tf.train.Example().SerializeToString())
        writer.write(example(2))
    (batch,) = evaluation_batches(opened(shards), image_size=8, batch=11, damaged_limit=2)
    assert batch['mask'].tolist() == [0, 0] + [1] * 9
    assert f'{path} record 0' in caplog.text
    assert f'{path} record 1' in caplog.text


def test_label_zero_of_the_shards_is_no_class(shards):
    with tf.io.TFRecordWriter(str(shards / 'train-00000-of-00003')) as writer:
        writer.write(example(-1))
    with pytest.raises(DataError, match='has label -1, must be 0 to 999'):
        list(evaluation_batches(opened(shards), image_size=8, batch=3))


def test_keys_are_those_of_the_original_scripts():
    assert imagenet.KEYS.boxes == tuple(f'image/object/bbox/{side}' for side in ('ymin', 'xmin', 'ymax', 'xmax'))
