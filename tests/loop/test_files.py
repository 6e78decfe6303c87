import errno
import json

import pytest

from efficientnet.loop.files import disk_problem, write_json


def test_json_is_whole_or_absent(tmp_path):
    write_json(tmp_path / 'a.json', {'x': 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / 'a.json', {'x': object()})
    assert json.loads((tmp_path / 'a.json').read_text()) == {'x': 1}


def test_what_a_disk_says_is_told_from_other_errors():
    assert disk_problem(OSError(errno.EDQUOT, 'Disk quota exceeded')) == 'Disk quota exceeded'
    assert disk_problem(ValueError('RESOURCE_EXHAUSTED: write: No space left on device')) == 'No space left on device'
    assert disk_problem(ValueError('RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes')) is None
