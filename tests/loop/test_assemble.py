"""What is wrong with a config is said before anything is computed, by field."""

import math
import shutil

import jax
import pytest
from PIL import Image

from efficientnet.errors import ConfigError
from efficientnet.loop import programs
from efficientnet.loop.assemble import Parts, assemble
from efficientnet.model import onednn
from input_pipeline import DataError
from tests.tiny import tiny_config, tiny_parts


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'dataset': 'no_such_dataset'}, 'no_such_dataset'),
        ({'input__test_split': 'nonsense'}, r'input\.test_split'),
        ({'input__dir': '/nowhere', 'dataset': 'folder'}, '/nowhere'),
        ({'replicas': 9}, 'replicas=9'),
        ({'micro_batch': 7}, 'global_batch=14 or 21'),
        ({'stages': 0}, r'stages=0 must be at least 1'),
        ({'stages': 9, 'replicas': 1}, r'stages=9 needs 9 devices, but there are 8; use at most 8 stages'),
        ({'stages': 3, 'splits': 'head'}, r"stages=3 and splits='head' disagree: those make 2"),
        ({'splits': 'block9z'}, r"splits='block9z'"),
        ({'splits': 'head', 'pipeline': '1f1b'}, r"pipeline='1f1b'"),
        ({'pipeline': 'sequential'}, r"pipeline='sequential'"),
        ({'recompute': 'all'}, r"recompute='all'"),
        ({'splits': 'head', 'replicas': 5}, r'replicas=5 × stages=2 needs 10 devices, but there are 8'),
        ({'steps': 0, 'epochs': 0.001}, r'epochs=0\.001'),
        ({'image_size': 0}, 'image_size=0'),
        ({'seed': -1}, 'seed=-1'),
        ({'model__variant': 'b8'}, 'b8'),
        ({'model__group_size': 3}, 'group_size=3'),
        ({'model__norm_groups': 5}, 'norm_groups=5'),
        ({'model__norm': 'instance'}, 'instance'),
        ({'model__conv_method': 'fft'}, 'fft'),
        ({'model__padding': 'valid'}, 'padding'),
        ({'model__survival': 0.0}, 'survival'),
        ({'model__dropout': 1.0}, 'dropout'),
        ({'model__strides': (1, 2, 2)}, r'strides=\(1, 2, 2\)'),
        ({'model__norm_epsilon': float('nan')}, r'model\.norm_epsilon=nan'),
        ({'model__width': 1e6}, r'model\.width=1000000'),
        ({'optimizer__momentum': 1.0}, r'optimizer\.momentum=1\.0'),
        ({'optimizer__weight_decay': float('nan')}, r'optimizer\.weight_decay=nan'),
        ({'optimizer__trust_coefficient': float('inf')}, r'optimizer\.trust_coefficient=inf'),
        ({'augment__std': (1.0, float('nan'), 1.0)}, r'augment\.std'),
        ({'augment__mean': (1.0, float('inf'), 1.0)}, r'augment\.mean'),
        ({'precision__policy': '8.8'}, r"precision\.policy='8\.8'"),
        ({'precision__rounding': 'up', 'precision__policy': '16.16'}, r'precision\.rounding'),
        ({'precision__loss_scale': 'auto'}, r'precision\.loss_scale'),
        ({'precision__max_skipped': 0}, r'precision\.max_skipped=0'),
        ({'optimizer__name': 'adam'}, r"optimizer\.name='adam'"),
        ({'optimizer__rate_per_example': -1.0}, r'optimizer\.rate_per_example'),
        ({'schedule__kind': 'step'}, r'schedule\.kind'),
        ({'schedule__warmup': '3'}, r"schedule\.warmup='3'"),
        ({'schedule__warmup': '7 steps'}, r"warmup='7 steps' is 7 steps, more than the run's 6; .* or raise steps"),
        (
            {'schedule__warmup': '3 epochs', 'steps': 0, 'epochs': 1.0},
            r"warmup='3 epochs' is 269 steps, more than the run's 89; shorten it or raise epochs",
        ),
        ({'evaluation__every': 'always'}, r'evaluation\.every'),
        ({'evaluation__batch': 0}, r'evaluation\.batch=0'),
        ({'augment__crop': 'middle'}, r'augment\.crop'),
        ({'augment__pad': -1}, r'augment\.pad'),
        ({'augment__mixup_alpha': -0.1}, r'augment\.mixup_alpha=-0\.1'),
        ({'augment__cutmix_probability': 1.5}, r'augment\.cutmix_probability=1\.5'),
        ({'augment__smoothing_over': 'some'}, r"augment\.smoothing_over='some'"),
        ({'augment__mixup_alpha': 0.1, 'micro_batch': 1}, 'micro_batch=1 leaves no second image'),
        (
            {'model__norm': 'batch', 'model__batch_norm_sync': True, 'splits': 'head'},
            r'batch_norm_sync=True needs stages=1',
        ),
        ({'augment__std': (1.0, 0.0, 1.0)}, r'augment\.std'),
        ({'augment__label_smoothing': 1.0}, r'augment\.label_smoothing'),
        ({'input__prefetch': 0}, r'input\.prefetch'),
        ({'input__damaged_limit': -1}, r'input\.damaged_limit'),
        ({'input__resize': 'nearest', 'image_size': 9}, r'input\.resize'),
        ({'input__test_dataset': 'no_such_dataset'}, 'no_such_dataset'),
        ({'augment__crop': 'distorted', 'augment__crop_area': (0.5, 0.1)}, r'augment\.crop_area'),
        ({'evaluation__crop_ratio': 2.0}, r'evaluation\.crop_ratio'),
        ({'checkpoint__keep': 0}, r'checkpoint\.keep'),
        ({'optimizer__name': 'rmsprop', 'optimizer__rms_decay': 1.0}, r'optimizer\.rms_decay=1\.0'),
        ({'schedule__end_ratio': -1.0}, r'schedule\.end_ratio=-1\.0'),
        ({'schedule__power': -1.0}, r'schedule\.power=-1\.0'),
        ({'schedule__kind': 'exponential', 'schedule__decay_rate': -0.5}, r'schedule\.decay_rate=-0\.5'),
        ({'schedule__kind': 'exponential', 'schedule__decay_every': '0 epochs'}, r'schedule\.decay_every=0'),
        ({'model__norm_group_size': -8}, r'model\.norm_group_size=-8'),
        ({'model__norm_group_size': 16}, r'norm_group_size=16 must divide the 8 channels of stem/norm'),
        ({'precision__initial_loss_scale': 100.0}, r'precision\.initial_loss_scale=100\.0 must be a power of two'),
    ],
)
def test_one_line_that_names_the_field(changes, message):
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        assemble(tiny_config(**changes))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'changes',
    [
        {'optimizer__rms_decay': 0.5},
        {'optimizer__name': 'sgd', 'optimizer__trust_coefficient': 0.1},
        {'model__norm': 'batch', 'model__norm_groups': 8},
        {'model__batch_norm_decay': 0.5},
        {'schedule__kind': 'constant', 'schedule__power': 3.0},
        {'schedule__decay_rate': 0.5},
        {'augment__crop': 'none'},
        {'augment__label_smoothing': 0.0, 'augment__smoothing_over': 'all'},
        {'model__batch_norm_sync': True},
        {'input__cache': 1.0},  # the digits are in memory
        {'evaluation__crop_ratio': 0.5},
        {'augment__crop_area': (0.5, 1.0)},
        {'input__dir': '/photos'},  # the digits are in no folder
        {'precision__rounding': 'nearest'},  # under 32.32
        {'input__damaged_limit': 3},
        {'input__resize': 'area'},
    ],
)
def test_fields_that_nothing_reads(changes):
    with pytest.raises(ConfigError, match='nothing reads these fields'):
        assemble(tiny_config(**changes))


@pytest.mark.parametrize('stored', [False, True])
def test_a_folder_of_test_images_without_their_data_set(stored):
    with pytest.raises(ConfigError, match=r"input\.test_dir='elsewhere' is read with input\.test_dataset only"):
        assemble(tiny_config(input__test_dir='elsewhere'), stored=stored)


def test_a_folder_that_the_data_set_does_not_need():
    with pytest.raises(ConfigError, match=r"input\.dir='/photos'; .* your own images need dataset='folder'"):
        assemble(tiny_config(input__dir='/photos'))


def test_what_happens_every_so_often_happens():
    """A data set of less than one batch still has checkpoints on the way."""
    parts = tiny_parts(blocks=1, global_batch=2000, micro_batch=1000, checkpoint__every='1 epochs', log_every='0 steps')
    assert (parts.checkpoint_every, parts.log_every) == (1, 0)


def test_b6_cannot_have_groups_of_16():
    with pytest.raises(ConfigError) as caught:
        assemble(tiny_config(model__variant='b6', model__width=0.0, model__depth=0.0))
    assert all(word in str(caught.value) for word in ('block1a', '56', '16'))


@pytest.mark.parametrize('norm', ['group', 'batch', 'layer_proxy'])
def test_every_optimizer_and_schedule_goes_with_every_norm(norm):
    if norm == 'batch':
        options = {'optimizer__name': 'rmsprop', 'optimizer__epsilon': 1e-3, 'schedule__kind': 'exponential'}
    elif norm == 'group':
        options = {'optimizer__name': 'sgd', 'schedule__kind': 'cosine'}
    else:
        options = {'optimizer__name': 'lars', 'schedule__kind': 'constant'}
    parts = tiny_parts(model__norm=norm, **options)
    state = parts.state_shapes()
    assert jax.tree.structure(state) == jax.tree.structure(parts.init_state())
    assert (state.batch_stats.size > 0) == (norm == 'batch')


@pytest.mark.parametrize(('size', 'method'), [(32, 'auto'), (40, 'onednn')])
def test_convolutions_of_large_images_are_onednns(size, method, monkeypatch):
    monkeypatch.setattr(onednn, 'available', lambda: True)
    assert tiny_parts(image_size=size).model.conv_method == method
    assert tiny_parts(image_size=size, model__conv_method='loop').model.conv_method == 'loop'


def test_what_calls_onednn_is_compiled_after_all_else(monkeypatch):
    """So that the rest, the initial weights above all, is still written to the cache of programs."""
    monkeypatch.setattr(onednn, 'available', lambda: True)
    monkeypatch.setattr(programs, 'largest_temporaries', lambda parts, compiled: 0)
    parts, began, allowed = tiny_parts(blocks=1, replicas=1, image_size=40), [], []

    def compiling(name):
        def job(*args):
            began.append(name)
            allowed.append(jax.config.jax_persistent_cache_min_compile_time_secs < math.inf)

        return job

    for name in ('gather', 'evaluate', 'update'):
        monkeypatch.setattr(programs, f'compile_{name}', compiling(name))
    initial = Parts.init_state
    monkeypatch.setattr(Parts, 'init_state', lambda *args: compiling('initial')() or initial(*args))
    programs.compile_programs(parts, update=True, initial=True)
    assert set(began[-2:]) == {'evaluate', 'update'}
    assert set(began[:-2]) == {'gather', 'initial'}
    assert all(allowed)


def test_onednn_where_it_cannot_be_had(monkeypatch):
    monkeypatch.setattr(onednn, 'available', lambda: False)
    with pytest.raises(ConfigError, match='conv_method=onednn needs an x86 CPU'):
        tiny_parts(model__conv_method='onednn')


def test_seeds_differ_and_repeat():
    one, same, other = (tiny_parts(blocks=1, seed=seed).init_state().params for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()


@pytest.fixture
def folder(tmp_path):
    """An image folder of ten classes with one grey picture each, for training and for a test elsewhere."""
    for place in ('here/train', 'here/test', 'there/test'):
        for name in '0123456789':
            path = tmp_path / place / name / 'a.png'
            path.parent.mkdir(parents=True)
            Image.new('RGB', (8, 8), (99, 99, 99)).save(path)
    return tmp_path


def test_another_test_set(folder):
    changes = {'input__test_dataset': 'folder', 'input__test_dir': str(folder / 'there'), 'input__test_split': 'test'}
    parts = tiny_parts(blocks=1, **changes)  # trained on digits
    assert parts.train_source.name == 'digits train'
    (batch,) = parts.evaluation_batches()
    assert (batch['image'][:10] == 99).all()
    assert batch['mask'].sum() == 10
    shutil.rmtree(folder / 'there/test/3')
    (folder / 'there/test/8').rename(folder / 'there/test/ten')
    message = r"input\.test_split = 'test': .*/there/test has .* that the training data lacks: ten; .* split, 0, 1, 2 …"
    with pytest.raises(DataError, match=message):
        assemble(tiny_config(**changes))
    shutil.rmtree(folder / 'there/test/ten')
    (batch,) = tiny_parts(blocks=1, **changes).evaluation_batches()
    assert batch['label'][batch['mask'] > 0].tolist() == [0, 1, 2, 4, 5, 6, 7, 9]
    message = r"input\.test_dataset='sample_photos' has other classes than dataset='digits': 2 \(.*\), not 10"
    with pytest.raises(ConfigError, match=message):
        assemble(tiny_config(input__test_dataset='sample_photos'))


def test_a_cache_of_photographs_and_damage_known_to_the_run(folder):
    (folder / 'here/test/3/a.png').write_bytes(b'damaged')
    parts = tiny_parts(blocks=1, dataset='folder', input__dir=str(folder / 'here'), input__cache=0.5)
    assert parts.train_source.limit == 2**29
    assert sum(batch['mask'].sum() for batch in parts.train_batches(0)) == 6 * 16
    assert len(parts.train_source.kept) == 10
    for _ in range(2):
        list(parts.evaluation_batches())
    assert parts.damaged_test == {3: str(folder / 'here/test/3/a.png')}
    assert not parts.damaged_train
