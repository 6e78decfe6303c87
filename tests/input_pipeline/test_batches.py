"""Batches: the same whatever the process count or the restart, complete, and robust against damaged files."""

import collections
import logging
import re

import numpy as np
import pytest

from input_pipeline import DataError, evaluation_batches, open_source, order, train_batches
from input_pipeline.quiet_tf import tf
from input_pipeline.sources import WHOLE_IMAGE, ArraySource, CachedSource, Examples


def numbered(n, side=6, classes=256):
    """Images that say which they are: every pixel of image i is i."""
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, side, side, 3))
    return ArraySource('numbered', tuple(map(str, range(classes))), images, np.arange(n, dtype=np.int32) % classes)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Fourteen smooth JPEGs of several shapes in two classes."""
    root = tmp_path_factory.mktemp('photos')
    for i in range(14):
        image = np.indices((20 + 3 * (i % 4), 40 - 2 * (i % 3))).sum(0)[..., None] * [1, 2, 3] + 5 * i
        path = root / 'train' / f'class{i % 2}' / f'{i:02d}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_jpeg(image.astype(np.uint8)).numpy())
    return root


KINDS = {
    'array pad': ('digits', {'crop': 'pad', 'pad': 2, 'image_size': 8}),
    'array resized': ('digits', {'crop': 'none', 'image_size': 10}),
    'array distorted': ('digits', {'crop': 'distorted', 'image_size': 8}),
    'photo distorted': ('folder', {'crop': 'distorted', 'image_size': 16}),
    'photo pad': ('folder', {'crop': 'pad', 'pad': 3, 'image_size': 16}),
}


@pytest.fixture(params=KINDS)
def stream(request, photos):
    """A function from further arguments to the list of batches, for every kind of source and crop."""
    name, kind = KINDS[request.param]
    source = open_source(name, 'train', str(photos))
    defaults = {'global_batch': 12, 'num_batches': 5, 'seed': 3, **kind}
    return lambda **kwargs: list(train_batches(source, **(defaults | kwargs)))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() == {'image', 'label', 'mask'}
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def joined(parts):
    return [{name: np.concatenate([p[name] for p in rows]) for name in rows[0]} for rows in zip(*parts, strict=True)]


def test_the_process_count_changes_nothing(stream):
    whole = stream()
    assert [batch['image'].dtype for batch in whole] == [np.uint8] * 5
    assert (whole[0]['label'].dtype, whole[0]['mask'].dtype) == (np.int32, np.float32)
    for count in (2, 4):
        assert_same(joined([stream(process_index=k, process_count=count) for k in range(count)]), whole)


def test_a_cache_changes_nothing(photos):
    source = open_source('folder', 'train', str(photos))
    options = {'image_size': 16, 'global_batch': 12, 'num_batches': 5, 'seed': 3}
    sizes = [len(image) for image in source.read(np.arange(14)).images]
    cached = CachedSource(source, sum(sizes) // 2)
    assert_same(list(train_batches(cached, **options)), list(train_batches(source, **options)))
    assert 0 < len(cached.kept) < 14


def test_a_resumed_stream_is_the_rest_of_the_uninterrupted_one(stream):
    whole = stream()
    assert_same(stream(start_batch=3), whole[3:])
    assert stream(start_batch=5) == []


def test_seed_and_epoch_change_the_images(stream):
    a, b = stream(num_batches=1)[0], stream(num_batches=1, seed=4)[0]
    assert (a['image'] != b['image']).any()


@pytest.mark.parametrize(('n', 'batch'), [(10, 4), (7, 5), (5, 12), (6, 6)])
def test_every_example_once_an_epoch_with_batches_that_straddle(n, batch):
    epochs = 6
    options = {'image_size': 6, 'global_batch': batch, 'seed': 0, 'crop': 'none', 'flip': False}
    batches = train_batches(numbered(n), num_batches=-(-n * epochs // batch), **options)
    seen = np.concatenate([b['label'] for b in batches])[: n * epochs].reshape(epochs, n)
    for epoch, indices in enumerate(seen):
        np.testing.assert_array_equal(indices, order.epoch_order(0, epoch, n))


def test_images_labels_and_draws_belong_together():
    images = np.random.default_rng(0).integers(0, 256, (9, 6, 6, 3), dtype=np.uint8)
    source = ArraySource('noise', tuple('abcdefghi'), images, np.arange(9, dtype=np.int32))
    options = {'image_size': 6, 'global_batch': 4, 'num_batches': 7, 'seed': 11, 'crop': 'pad', 'pad': 2}
    batches = train_batches(source, **options)
    got = np.concatenate([b['image'] for b in batches])
    indices, seeds = order.stream_rows(11, np.arange(28), 9)
    for image, index, (a, b) in zip(got, indices, seeds.tolist(), strict=True):
        top, left = (a // 2 * 5) >> 31, (b // 2 * 5) >> 31
        want = np.pad(images[index], [(2, 2), (2, 2), (0, 0)])[top : top + 6, left : left + 6]
        np.testing.assert_array_equal(image, want[:, ::-1] if a % 2 else want)


def test_pad_means_nothing_to_other_crops():
    options = {'image_size': 6, 'global_batch': 5, 'num_batches': 1, 'seed': 0, 'crop': 'none'}
    assert_same(*(list(train_batches(numbered(5), pad=pad, **options)) for pad in (0, 3)))


def test_an_example_is_cropped_anew_in_every_epoch(photos):
    source = open_source('folder', 'train', str(photos))
    options = {'image_size': 16, 'global_batch': 14, 'num_batches': 8, 'seed': 0, 'flip': False}
    views = collections.defaultdict(set)
    for epoch, batch in enumerate(train_batches(source, **options)):
        for index, image in zip(order.epoch_order(0, epoch, 14), batch['image'], strict=True):
            views[int(index)].add(image.tobytes())
    assert min(len(seen) for seen in views.values()) >= 7


@pytest.mark.parametrize('process_count', [1, 3])
@pytest.mark.parametrize(('n', 'batch'), [(10, 3), (10, 6), (1, 9), (12, 6), (200, 51)])
def test_evaluation_sees_every_example_exactly_once(n, batch, process_count):
    share = {'process_count': process_count, 'batch': batch, 'image_size': 6}
    parts = [list(evaluation_batches(numbered(n), process_index=k, **share)) for k in range(process_count)]
    assert {len(part) for part in parts} == {-(-n // batch)}
    whole = joined(parts)
    assert {len(b['mask']) for b in whole} == {batch}
    images, labels, mask = (np.concatenate([b[name] for b in whole]) for name in ('image', 'label', 'mask'))
    assert mask.tolist() == [1.0] * n + [0.0] * (len(mask) - n)
    assert labels.tolist() == list(range(n)) + [0] * (len(mask) - n)
    np.testing.assert_array_equal(images[:n], numbered(n).images)
    assert not images[n:].any()


def test_evaluation_of_photographs_with_padding(photos):
    source = open_source('folder', 'train', str(photos))
    parts = [
        list(evaluation_batches(source, image_size=16, batch=12, process_index=k, process_count=3)) for k in range(3)
    ]
    whole = joined(parts)
    assert np.concatenate([b['mask'] for b in whole]).tolist() == [1.0] * 14 + [0.0] * 10
    assert np.concatenate([b['label'] for b in whole]).tolist() == [0] * 7 + [1] * 7 + [0] * 10
    first = tf.io.decode_image(tf.io.read_file(source.paths[0]))
    resized = tf.image.resize(first, (18, 36))[1:17, 10:26]
    assert np.abs(whole[0]['image'][0] - resized.numpy()).max() < 0.51


@pytest.fixture
def damaged(photos, tmp_path):
    """The photographs as class0, and in class1 every way to be damaged that a disk full of images has."""
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train/class0').symlink_to(photos / 'train/class0')
    whole = (photos / 'train/class1/01.jpg').read_bytes()
    bad = tmp_path / 'train/class1'
    bad.mkdir()
    (bad / 'cut.jpg').write_bytes(whole[:200])
    (bad / 'empty.jpg').write_bytes(b'')
    (bad / 'folder.jpg').mkdir()
    (bad / 'gone.jpg').symlink_to('nowhere')
    (bad / 'text.jpg').write_text('not an image')
    return tmp_path


def test_damaged_images_are_blank_masked_and_named_once(damaged, caplog):
    source = open_source('folder', 'train', str(damaged))
    for index, batch in enumerate(evaluation_batches(source, image_size=16, batch=4, damaged_limit=5)):
        wrong = np.arange(4) + 4 * index >= 7
        np.testing.assert_array_equal(batch['mask'], np.where(wrong, 0.0, 1.0))
        assert batch['label'][wrong].tolist() == [0] * wrong.sum()
        assert not batch['image'][wrong].any()
        assert batch['image'][~wrong].any(axis=(1, 2, 3)).all()
    assert sorted(r.args[0].rsplit('/')[-1] for r in caplog.records if r.levelno == logging.WARNING) == [
        'cut.jpg', 'empty.jpg', 'folder.jpg', 'gone.jpg', 'text.jpg'
    ]  # fmt: skip


def test_good_neighbours_of_a_damaged_image_are_what_they_would_be_without_it(damaged, photos):
    source = open_source('folder', 'train', str(damaged))
    options = {'image_size': 16, 'global_batch': 6, 'seed': 1, 'damaged_limit': 5}
    whole = list(train_batches(source, num_batches=6, **options))
    indices, _ = order.stream_rows(1, np.arange(36), 12)
    np.testing.assert_array_equal(np.concatenate([b['mask'] for b in whole]), (indices < 7).astype(np.float32))
    assert_same(list(train_batches(source, num_batches=6, start_batch=3, **options)), whole[3:])
    halves = [train_batches(source, num_batches=6, process_index=k, process_count=2, **options) for k in range(2)]
    assert_same(joined([list(half) for half in halves]), whole)
    for name in ('cut.jpg', 'empty.jpg', 'text.jpg'):
        (damaged / 'train/class1' / name).write_bytes((photos / 'train/class1/01.jpg').read_bytes())
    for old, new in zip(whole, train_batches(source, num_batches=6, **options), strict=True):
        good = old['mask'] == 1
        np.testing.assert_array_equal(old['image'][good], new['image'][good])


def test_too_much_damage_stops_the_run(damaged):
    source = open_source('folder', 'train', str(damaged))
    batches = evaluation_batches(source, image_size=16, batch=4, damaged_limit=2)
    assert next(batches)['mask'].all()
    assert next(batches)['mask'].tolist() == [1, 1, 1, 0]
    with pytest.raises(DataError, match=r'5 damaged images, more than input.damaged_limit = 2: .*cut.jpg, '):
        next(batches)


def test_damage_is_counted_by_file_not_by_epoch(damaged):
    source = open_source('folder', 'train', str(damaged))
    batches = train_batches(source, image_size=16, global_batch=12, num_batches=4, seed=0, damaged_limit=5)
    assert [b['mask'].sum() for b in batches] == [7] * 4


def test_damage_is_named_once_in_a_run(damaged, caplog):
    source, known = open_source('folder', 'train', str(damaged)), {}
    for _ in range(3):
        list(evaluation_batches(source, image_size=16, batch=4, damaged_limit=5, damaged=known))
    assert len(caplog.records) == len(known) == 5
    with pytest.raises(DataError, match=r'5 damaged images, more than input\.damaged_limit = 4'):
        list(evaluation_batches(source, image_size=16, batch=4, damaged_limit=4, damaged=known))


@pytest.mark.parametrize('bad', [[0], [11], [0, 1, 2, 3], [3, 4], [8, 9, 10, 11], range(12)])
def test_wherever_the_damage_is_the_others_keep_their_places(tmp_path, bad):
    folder = tmp_path / 'train/only'
    folder.mkdir(parents=True)
    for i in range(12):
        image = tf.io.encode_png(np.full((8, 8, 3), i + 1, np.uint8)).numpy()
        (folder / f'{i:02d}.png').write_bytes(image[:30] if i in bad else image)
    source = open_source('folder', 'train', str(tmp_path))
    batches = list(evaluation_batches(source, image_size=8, batch=4, damaged_limit=12))
    want = [0 if i in bad else i + 1 for i in range(12)]
    assert [batch['image'].max(axis=(1, 2, 3)).tolist() for batch in batches] == [want[0:4], want[4:8], want[8:12]]
    assert np.concatenate([batch['mask'] for batch in batches]).tolist() == [float(i > 0) for i in want]


KINDS_OF_DAMAGE = {
    'nothing at all': lambda data: b'',
    'the first bytes of a JPEG': lambda data: data[:3],
    'the header alone': lambda data: data[:300],
    'half of the data': lambda data: data[: len(data) // 2],
    'no size': lambda data: data[: data.index(b'\xff\xc0') + 5] + bytes(4) + data[data.index(b'\xff\xc0') + 9 :],
    'noise': lambda data: np.random.default_rng(0).bytes(5000),
    'a web page': lambda data: b'<html>404</html>',
}


@pytest.mark.parametrize('kind', KINDS_OF_DAMAGE)
@pytest.mark.parametrize('train', [True, False])
def test_every_kind_of_damage_is_named_and_skipped(tmp_path, photos, kind, train, caplog):
    folder = tmp_path / 'train/only'
    folder.mkdir(parents=True)
    whole = tf.io.encode_jpeg(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)).numpy()
    (folder / 'bad.jpg').write_bytes(KINDS_OF_DAMAGE[kind](whole))
    (folder / 'good.jpg').write_bytes(whole)
    source = open_source('folder', 'train', str(tmp_path))
    if train:
        options = {'global_batch': 2, 'num_batches': 1, 'seed': 0, 'crop_area': (0.9, 1.0)}
        (batch,) = train_batches(source, image_size=8, damaged_limit=1, **options)
    else:
        (batch,) = evaluation_batches(source, image_size=8, batch=2, damaged_limit=1)
    assert sorted(batch['mask'].tolist()) == [0, 1]
    assert not batch['image'][batch['mask'] == 0].any()
    assert 'bad.jpg' in caplog.text
    assert 'good.jpg' not in caplog.text


def test_the_orientation_in_exif_data_is_ignored(tmp_path):
    pillow = pytest.importorskip('PIL.Image')
    folder = tmp_path / 'train/only'
    folder.mkdir(parents=True)
    picture = pillow.fromarray(np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8))
    turned = pillow.Exif()
    turned[0x0112] = 6  # a quarter turn
    picture.save(folder / 'a.jpg')
    picture.save(folder / 'b.jpg', exif=turned)
    with pillow.open(folder / 'b.jpg') as stored:
        assert stored.getexif()[0x0112] == 6
    (batch,) = evaluation_batches(open_source('folder', 'train', str(tmp_path)), image_size=16, batch=2)
    np.testing.assert_array_equal(*batch['image'])


@pytest.mark.parametrize('crop', ['distorted', 'none'])
def test_a_huge_and_a_very_long_photograph(tmp_path, crop):
    folder = tmp_path / 'train/only'
    folder.mkdir(parents=True)
    for name, shape in (('huge', (5000, 6000, 1)), ('long', (3, 65000, 1))):
        (folder / f'{name}.jpg').write_bytes(tf.io.encode_jpeg(np.full(shape, 90, np.uint8)).numpy())
    source = open_source('folder', 'train', str(tmp_path))
    options = {'image_size': 16, 'global_batch': 2, 'num_batches': 1, 'seed': 0, 'crop': crop}
    (batch,) = train_batches(source, **options)
    assert batch['mask'].all()
    assert np.abs(batch['image'].astype(int) - 90).max() <= 2


def test_an_example_without_a_label_is_seen_but_not_counted(caplog):
    class Unlabelled:
        """Four images, the second of both classes and the third of none."""

        name, classes, num_examples, image_shape, label_sets = 'four', ('a', 'b'), 4, (2, 2, 3), True

        def read(self, indices):
            labels = np.array([[1, 0], [1, 1], [0, 0], [0, 1]], np.uint8)[indices]
            return Examples(np.full((len(indices), 2, 2, 3), 7, np.uint8), labels, [WHOLE_IMAGE] * len(indices))

    (batch,) = evaluation_batches(Unlabelled(), image_size=2, batch=6)
    assert batch['mask'].tolist() == [1, 1, 0, 1, 0, 0]
    assert batch['label'].tolist() == [[1, 0], [1, 1], [0, 0], [0, 1], [0, 0], [0, 0]]
    assert not caplog.records
    with pytest.raises(DataError, match=r'four has sets of right classes.* can only be tested on'):
        train_batches(Unlabelled(), image_size=2, global_batch=2, num_batches=1, seed=0)


@pytest.mark.parametrize('crop', ['distorted', 'none'])
def test_unusual_images_work(tmp_path, crop):
    folder = tmp_path / 'train/only'
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    contents = {
        'png_named.jpg': tf.io.encode_png(pixels[..., :3]).numpy(),
        'grey.png': tf.io.encode_png(pixels[..., :1]).numpy(),
        'grey_alpha.png': tf.io.encode_png(pixels[..., :2]).numpy(),
        'alpha.png': tf.io.encode_png(pixels).numpy(),
        'deep.png': tf.io.encode_png(pixels[..., :3].astype(np.uint16) * 257).numpy(),
        'grey.jpg': tf.io.encode_jpeg(pixels[..., :1]).numpy(),
        'pixel.jpg': tf.io.encode_jpeg(np.full((1, 1, 3), 200, np.uint8)).numpy(),
        'strip.png': tf.io.encode_png(np.full((1, 900, 3), 9, np.uint8)).numpy(),
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    pillow = pytest.importorskip('PIL.Image')
    pillow.fromarray(pixels, 'CMYK').save(folder / 'cmyk.jpg')
    for name in ('bitmap.bmp', 'moving.gif'):
        pillow.fromarray(pixels[..., :3].copy()).save(folder / name)
    source = open_source('folder', 'train', str(tmp_path))
    options = {'image_size': 16, 'global_batch': 11, 'num_batches': 1, 'seed': 0, 'crop': crop}
    (batch,) = train_batches(source, **options)
    assert batch['mask'].all()
    assert batch['image'].any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'global_batch': 7, 'process_count': 2}, 'global_batch = 7 must be a multiple of the 2 processes'),
        ({'global_batch': 0}, 'global_batch = 0 must'),
        ({'image_size': 0}, 'image_size = 0 must be at least 1'),
        ({'crop': 'random'}, "augment.crop = 'random' must be one of none, pad, distorted"),
        ({'crop': 'pad', 'pad': -1}, 'augment.pad = -1 must be at least 0'),
        ({'seed': -1}, 'seed = -1 must be from 0'),
        ({'start_batch': 3}, 'start_batch = 3 must be from 0 to num_batches = 2'),
        ({'prefetch': -1}, 'prefetch = -1 must be at least 0'),
        ({'process_index': 1}, 'process_index = 1 must be from 0 to 0'),
        ({'crop_aspect': (1.33, 0.75)}, 'augment.crop_aspect = (1.33, 0.75) must be two numbers above 0'),
        ({'crop_aspect': (1.0,)}, 'augment.crop_aspect = (1.0,) must be two numbers'),
        ({'crop_area': (0.0, 1.0)}, 'augment.crop_area = (0.0, 1.0) must be two numbers above 0'),
        ({'crop_area': (0.5, 1.1)}, 'augment.crop_area = (0.5, 1.1) must be two numbers above 0 and at most 1'),
        ({'crop_covered': 1.5}, 'augment.crop_covered = 1.5 must be from 0 to 1'),
        ({'resize': 'lanczos'}, "input.resize = 'lanczos' must be one of bilinear, bicubic, area"),
        ({'crop_ratio': 0}, 'evaluation.crop_ratio = 0 must be above 0 and at most 1'),
        ({'damaged_limit': -1}, 'input.damaged_limit = -1 must be at least 0'),
    ],
)
def test_requests_that_make_no_sense_are_refused_before_work_starts(change, message):
    options = {'image_size': 8, 'global_batch': 4, 'num_batches': 2, 'seed': 0} | change
    with pytest.raises(DataError, match=re.escape(message)):
        train_batches(numbered(5), **options)
