"""Layers one by one: which there are, and that both sides compute the same."""

import pytest

from efficientnet.model import convolution
from efficientnet.model.convolution import grouped_conv
from efficientnet.model.scaling import model_spec
from experiments.benchmark import sides, train_step
from tests.experiments.benchmark.command_line import parsed


def test_layers_are_those_of_the_network_once():
    layers = sides.distinct_layers(model_spec('b0', width=0.25, depth=0.3, group_size=16), 32)
    assert len(set(layers)) == len(layers)
    # block1a: 8 channels on 16 pixels a side do not expand; block2a: 8 -> 32 -> 8 with a stride of 2.
    assert layers[:3] == [sides.Layer(32, 3, 8, 3, 2), sides.Layer(16, 8, 8), sides.Layer(16, 8, 8, 3, 1, 1)]
    assert layers[-2:] == [sides.Layer(1, 80, 320, 1), sides.Layer(1, 320, 320)]
    assert sides.Layer(16, 8, 32, 1) in layers
    assert sides.Layer(16, 32, 32, 3, 2, 2) in layers
    assert sides.Layer(8, 32, 8, 1) in layers


def test_layers_of_both_sides_are_of_the_model_that_the_flags_describe():
    args = parsed('train_step', '--layers', '--width=0.5', '--depth=0.3', '--group_size=4', '--image_size=64')
    spec = model_spec('b0', width=0.5, depth=0.3, group_size=4)
    assert sides.measured_layers(args) == sides.distinct_layers(spec, 64)
    assert sides.measured_layers(args | {'layers': False}) == []


@pytest.mark.parametrize(
    ('layer', 'method', 'right'),
    [
        (sides.Layer(8, 3, 8, 3, 2), 'native', 'auto'),  # the stem's is the model's if that is oneDNN's alone
        (sides.Layer(8, 3, 8, 3, 2), 'onednn', 'onednn'),
        (sides.Layer(8, 8, 8, 3), 'native', 'native'),
        (sides.Layer(8, 8, 32, 1), 'native', 'auto'),
    ],
)
def test_a_layer_is_formulated_and_typed_as_in_the_model(layer, method, right, monkeypatch):
    seen = []

    def convolve(x, kernel, **options):
        seen.append((x.dtype, kernel.dtype, options['method']))
        return grouped_conv(x, kernel, **options | {'method': 'auto'})

    monkeypatch.setattr(convolution, 'grouped_conv', convolve)
    job = sides._our_layer(layer, parsed('train_step', '--policy=bf16.32', '--micro_batch=2'), method)
    assert seen == [('bfloat16', 'bfloat16', right)]
    job()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_pytorchs_layers_are_of_the_policys_numbers(dtype, monkeypatch):
    torch = pytest.importorskip('torch')
    convolve, seen, compute = torch.nn.Conv2d.forward, [], getattr(torch, dtype)

    def forward(module, x):
        y = convolve(module, x)
        seen.append((x.dtype, y.dtype, x.requires_grad))
        return y

    monkeypatch.setattr(torch.nn.Conv2d, 'forward', forward)
    args, rest = parsed('train_step', '--micro_batch=2'), (torch.device('cpu'), torch.channels_last, compute)
    for layer in (sides.Layer(8, 3, 8, 3, 2), sides.Layer(8, 8, 8), sides.Layer(8, 8, 8, 3, 1, 2)):
        sides._torch_layer(layer, args, *rest)()
    assert dict.fromkeys(seen) == dict.fromkeys([(compute, compute, False), (compute, compute, True)])


def test_layers_are_timed_by_the_call():
    class Side:
        def run(self, job):
            return (0.5, None)

    rows = train_step._measure_layers({'ours': Side()}, {'ours': {'layers': ['one']}}, 3)
    assert rows == [{'layer': 'one', 'ours': 0.5 / sides.LAYER_CALLS}]
