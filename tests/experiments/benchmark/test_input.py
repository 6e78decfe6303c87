"""The input path: what is calculated and said of it, made-up images and shards, and tiny runs."""

import json
import time

import numpy as np
import pytest
from PIL import Image

import input_pipeline
from experiments.benchmark import host_input, resume
from tests.experiments.benchmark.command_line import parsed, run


def test_input_summary_and_text():
    args = parsed('input', '--batch=10', '--batches=20', '--photos=DIR')
    seconds = {'ours': [2.0, 1.0, 4.0], 'tf_data': [3.0, 3.0, 1.0], 'torch': [5.0, 6.0, 7.0]}
    found = host_input.summary(args, seconds, 1.05, {'grain': 'pip install it'})
    assert found['images_per_second'] == {'ours': 100, 'tf_data': 200 / 3, 'torch': 200 / 6}
    assert found['ratio'] == pytest.approx({'tf_data': 1.5, 'torch': 3.0})
    assert found['range']['ours'] == [50, 200]
    assert found['bytes_per_image'] == 224 * 224 * 3
    text = host_input.show(json.loads(json.dumps(found)))
    assert '1.50  1.3 met' in text
    assert 'grain: not installed (pip install it)' in text
    assert '1.05 T (target 1.1, met)' in text
    assert '1.3 missed' in host_input.show(host_input.summary(args, seconds | {'tf_data': [2.0]}, 1.2, {}))


def test_photographs_are_as_large_as_imagenets(tmp_path):
    host_input.make_photos(tmp_path, count=8)
    sizes = []
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as image:
            sizes.append(image.size)
        assert 10_000 < path.stat().st_size < 150_000
    assert sizes == [(375, 500), *[(500, 375)] * 3] * 2


def test_boxes_of_random_resized_crop():
    draw = np.random.default_rng(0)
    boxes = np.array([host_input.resized_crop_box(500, 375, draw.uniform) for _ in range(500)])
    left, top, width, height = boxes.T
    assert (boxes >= 0).all()
    assert (left + width <= 500).all()
    assert (top + height <= 375).all()
    area, aspect = width * height / (500 * 375), width / height
    assert 0.045 < area.min() < 0.1
    assert 0.8 < area.max() <= 1
    assert 0.72 < aspect.min() < aspect.max() < 1.38


def test_a_step_hides_the_loading_that_takes_no_longer(monkeypatch):
    def loading(seconds):
        while True:
            time.sleep(seconds)
            yield np.zeros((1, 2, 2, 3), np.uint8)

    monkeypatch.setattr(host_input, 'AHEAD', 1)
    assert 1 <= host_input.overlap(loading(0.04), 0.05, 10) < 1.6  # one after the other: 1.8
    assert 2.5 < host_input.overlap(loading(0.2), 0.05, 10) < 6  # four steps, less what was made ahead


def test_made_up_shards_are_read_as_they_were_meant(tmp_path):
    resume.make_shards(tmp_path / 'shards', 2050)
    source = input_pipeline.open_source('imagenet_tfrecords', 'train', str(tmp_path / 'shards'))
    assert source.num_examples == 2050
    (batch,) = input_pipeline.train_batches(source, image_size=2, global_batch=2050, num_batches=1, seed=0)
    assert batch['mask'].all()
    np.testing.assert_array_equal(batch['image'], np.full((2050, 2, 2, 3), 99))


@pytest.mark.slow
def test_tiny_input():
    found = json.loads(run('input', '--image_size=32', '--batch=4', '--batches=3', '--rounds=2', '--json'))
    assert found['ratio'].keys() | found['missing'].keys() == {'tf_data', 'torch'}
    assert found['ratio'].keys() < found['images_per_second'].keys()
    assert found['bytes_per_image'] == 3072
    assert all(low <= found['images_per_second'][name] <= high for name, (low, high) in found['range'].items())


@pytest.mark.slow
def test_tiny_resume():
    found = json.loads(run('input', '--resume_cost', '--records=2050', '--image_size=8', '--batch=4', '--json'))
    assert (found['records'], found['files']) == (2050, 1024)
    assert set(found['seconds']) == set(resume.ROWS)
    assert min(found['seconds'].values()) > 0
