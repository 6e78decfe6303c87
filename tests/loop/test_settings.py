import pytest

from configs import base
from efficientnet.errors import ConfigError
from efficientnet.loop.settings import RESUMABLE, Fields, check_known, check_resumable, check_used, config_of, flatten


def test_flatten_makes_tuples_json():
    flat = flatten(base.get_config())
    assert flat['optimizer.momentum'] == 0.885
    assert flat['augment.mean'] == [123.68, 116.78, 103.94]


def test_base_is_locked():
    with pytest.raises(AttributeError, match='momentum'):
        base.get_config().optimizer.momentun = 0.9


def test_unknown_and_missing_fields():
    config = base.get_config()
    check_known(config)
    with config.unlocked():
        config.optimizer.beta = 1.0
    with pytest.raises(ConfigError, match=r'unknown config fields: optimizer\.beta'):
        check_known(config)
    with config.unlocked():
        del config.optimizer.beta
        del config.seed
    with pytest.raises(ConfigError, match='missing: seed'):
        check_known(config)


def test_a_changed_field_that_nothing_reads():
    config = base.get_config()
    config.optimizer.rms_decay = 0.5
    fields = Fields(config)
    assert fields.optimizer.momentum == 0.885
    assert 'optimizer.momentum' not in fields.unread()
    with pytest.raises(ConfigError, match=r'optimizer\.rms_decay=0\.5'):
        check_used(fields)
    assert fields.optimizer.rms_decay == 0.5
    check_used(fields)


def test_what_nothing_reads_may_differ():
    stored, now = (flatten(base.get_config()) for _ in range(2))
    stored['precision.rounding'] = 'nearest'
    with pytest.raises(ConfigError, match=r'precision\.rounding'):
        check_resumable(stored, now, 'runs/x')
    check_resumable(stored, now, 'runs/x', frozenset({'precision.rounding'}))


def test_a_run_from_before_a_field_goes_on():
    stored, now = (flatten(base.get_config()) for _ in range(2))
    del stored['model.activation']
    check_resumable(stored, now, 'runs/x')
    now['model.activation'] = 'relu6'
    with pytest.raises(ConfigError, match=r"model\.activation: '' there, 'relu6' now"):
        check_resumable(stored, now, 'runs/x')


def test_config_of_what_was_stored():
    assert config_of({'image_size': 32, 'augment.mean': [1.0, 2.0, 3.0]}, 'config.json').image_size == 32
    with pytest.raises(ConfigError, match=r'config\.json has fields that are not in configs/base\.py: beta'):
        config_of({'beta': 1}, 'config.json')
    with pytest.raises(ConfigError, match=r'config\.json has a field of another type'):
        config_of({'image_size': '64'}, 'config.json')
    with pytest.raises(ConfigError, match=r'config\.json has null for augment\.mean, seed; restore'):
        config_of({'seed': None, 'augment.mean': None}, 'config.json')


def test_resumable_fields_exist():
    assert set(RESUMABLE) <= set(flatten(base.get_config()))


def test_other_config_is_refused_by_name():
    stored, now = (flatten(base.get_config()) for _ in range(2))
    now['replicas'] = 4
    check_resumable(stored, now, 'runs/x')
    now['optimizer.momentum'] = 0.5
    with pytest.raises(ConfigError, match=r'runs/x .*optimizer\.momentum: 0\.885 there, 0\.5 now'):
        check_resumable(stored, now, 'runs/x')


@pytest.mark.parametrize(
    ('field', 'value', 'then'),
    [
        ('augment.mixup_alpha', 0.2, 'micro_batch'),
        ('augment.cutmix_probability', 0.5, 'micro_batch'),
        ('model.norm', 'batch', 'micro_batch'),
        ('model.batch_norm_sync', True, 'replicas'),
    ],
)
def test_what_a_micro_batch_shares_fixes_its_size(field, value, then):
    stored, now = (flatten(base.get_config()) | {field: value} for _ in range(2))
    now[then] = 2
    with pytest.raises(ConfigError, match=rf'{then}: .* there, 2 now'):
        check_resumable(stored, now, 'runs/x')
