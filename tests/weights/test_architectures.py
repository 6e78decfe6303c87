import pytest

from efficientnet.model.scaling import VARIANTS
from efficientnet.weights.architectures import fields_of


@pytest.mark.parametrize('variant', VARIANTS)
def test_the_originals_are_evaluated_at_their_own_resolution(variant):
    """As in efficientnet_builder.py and efficientnet_lite_builder.py, with 32 pixels around the square that is cut."""
    fields, size = fields_of('tensorflow', f'efficientnet-{variant}'.replace('-', '_')), VARIANTS[variant].resolution
    assert fields['image_size'] == size
    assert fields['evaluation.crop_ratio'] == pytest.approx(size / (size + 32), abs=1e-3)


@pytest.mark.parametrize(('name', 'crop'), [('efficientnet_lite4', 0.922), ('tf_efficientnet_lite4', 0.92)])
def test_timm_evaluates_lite4_at_that_of_b4(name, crop):
    fields = fields_of('timm', name)
    assert (fields['image_size'], fields['evaluation.crop_ratio']) == (380, crop)
