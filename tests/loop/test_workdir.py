import dataclasses
import errno
import json
import types

import ml_collections
import pytest

from efficientnet.errors import ConfigError, RunError
from efficientnet.loop.settings import flatten
from efficientnet.loop.workdir import claim, stored_config, writing
from tests.tiny import tiny_config, tiny_parts


@pytest.fixture(scope='module')
def parts():
    return tiny_parts(blocks=1)


def test_config_is_written_and_read_back(tmp_path, parts):
    with claim(tmp_path / 'a' / 'b', parts):
        stored = json.loads((tmp_path / 'a' / 'b' / 'config.json').read_text())
    assert stored['optimizer']['name'] == 'lars'
    assert stored['replicas'] == 1
    found = stored_config(tmp_path / 'a' / 'b', None)
    assert flatten(found) == flatten(parts.config)
    assert stored_config(tmp_path / 'a' / 'b', tiny_config()).seed == 0


def test_open_replicas_are_resolved(tmp_path):
    parts = tiny_parts(blocks=1, replicas=0, micro_batch=2)
    with claim(tmp_path, parts):
        assert json.loads((tmp_path / 'config.json').read_text())['replicas'] == 8


def test_another_layout_may_go_on_but_another_recipe_may_not(tmp_path, parts):
    with claim(tmp_path, parts):
        pass
    with claim(tmp_path, tiny_parts(blocks=1, micro_batch=4, evaluation__batch=7)):
        pass
    with pytest.raises(ConfigError, match=r'seed: 0 there, 1 now'), claim(tmp_path, tiny_parts(blocks=1, seed=1)):
        pass


def test_two_processes_do_not_share_a_folder(tmp_path, parts):
    with claim(tmp_path, parts), pytest.raises(ConfigError, match='in use by another process'), claim(tmp_path, parts):
        pass
    with claim(tmp_path, parts):
        pass


def test_a_run_goes_on_with_as_many_images_as_it_had(tmp_path, parts):
    source = parts.train_source
    fewer = dataclasses.replace(source, images=source.images[1:], labels=source.labels[1:])
    with claim(tmp_path, parts):
        pass
    with claim(tmp_path, dataclasses.replace(parts, train_source=fewer)):
        (tmp_path / 'checkpoints' / '3').mkdir(parents=True)
    count = source.num_examples
    message = f'run on {count - 1:,} training images, the data set has {count:,}; restore those'
    with pytest.raises(ConfigError, match=message), claim(tmp_path, parts):
        pass
    with claim(tmp_path, dataclasses.replace(parts, train_source=fewer)):
        pass


def test_a_file_in_the_way(tmp_path, parts):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match='cannot be written'), claim(tmp_path / 'file' / 'run', parts):
        pass


def test_a_full_disk_before_anything_is_computed(tmp_path, parts, monkeypatch):
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr('efficientnet.loop.workdir.shutil.disk_usage', lambda path: usage)
    with pytest.raises(ConfigError, match=r'0 MB free, but checkpoint\.keep=2 needs about'), claim(tmp_path, parts):
        pass


def test_only_checkpoints_make_room_for_checkpoints(tmp_path, parts, monkeypatch):
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr('efficientnet.loop.workdir.shutil.disk_usage', lambda path: usage)
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'export').write_bytes(bytes(10**7))
    with pytest.raises(ConfigError, match='MB free'), claim(tmp_path, parts):
        pass
    (tmp_path / 'other').rename(tmp_path / 'checkpoints')
    with claim(tmp_path, parts):
        pass


def test_a_run_from_before_a_field_is_evaluated(tmp_path, parts):
    with claim(tmp_path, parts):
        pass
    stored = json.loads((tmp_path / 'config.json').read_text())
    del stored['model']['activation']
    (tmp_path / 'config.json').write_text(json.dumps(stored))
    assert stored_config(tmp_path, None).model.activation == ''
    stored['image_size'] = '64'
    (tmp_path / 'config.json').write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match='of another type'):
        stored_config(tmp_path, None)


@pytest.mark.parametrize(
    'error', [OSError(errno.ENOSPC, 'No space left on device'), ValueError('RESOURCE_EXHAUSTED: write: No space left')]
)
def test_a_disk_that_fills_up(tmp_path, error):
    message = r'No space left on device; the checkpoint of step 7 is safe: make room, then the same command goes on'
    with pytest.raises(RunError, match=message), writing(tmp_path, 7):
        raise error
    message = r'No space left on device; make room, then'
    with pytest.raises(RunError, match=message), writing(tmp_path):
        raise error
    with pytest.raises(RunError, match=r'Permission denied; see to that, then'), writing(tmp_path):
        raise PermissionError(errno.EACCES, 'Permission denied')


def test_other_errors_are_not_disk_errors(tmp_path):
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        raise ZeroDivisionError


def test_no_run_and_a_damaged_config(tmp_path):
    with pytest.raises(ConfigError, match='holds no run'):
        stored_config(tmp_path, None)
    (tmp_path / 'config.json').write_text('{"seed": ')
    with pytest.raises(ConfigError, match=r'config\.json is damaged'):
        stored_config(tmp_path, ml_collections.ConfigDict())
