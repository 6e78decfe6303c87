"""The EfficientNets that others publish weights of, as differences from configs/base.py.

A tensor's shape does not say how its layer was padded, what was added to a variance or how pixels were scaled; the
library and the name of the architecture do. Numbers are those of timm 1.0.31, torchvision 0.28, EfficientNet-PyTorch
0.7.1 and TensorFlow's tpu/models/official/efficientnet.
"""

import re
from typing import Any

from efficientnet.errors import ConfigError

Fields = dict[str, Any]  # dotted names as in configs/base.py

IMAGENET = {'augment.mean': (123.675, 116.28, 103.53), 'augment.std': (58.395, 57.12, 57.375)}
HALVES = {'augment.mean': (127.5, 127.5, 127.5), 'augment.std': (127.5, 127.5, 127.5)}  # to -1 … 1
LITE = {'augment.mean': (127.0, 127.0, 127.0), 'augment.std': (128.0, 128.0, 128.0)}
PYTORCH = {'model.padding': 'symmetric', 'model.norm_epsilon': 1e-5, 'input.resize': 'area'}  # antialiased
TENSORFLOW = {'model.padding': 'same', 'model.norm_epsilon': 1e-3, 'input.resize': 'bicubic'}
DEPTHWISE = {'model.norm': 'batch', 'model.group_size': 1, 'model.expand_ratio': 6}

# Image side and crop ratio of the original evaluation, kept by most ports.
SIZES = {
    'b0': (224, 0.875), 'b1': (240, 0.882), 'b2': (260, 0.890), 'b3': (300, 0.904),
    'b4': (380, 0.922), 'b5': (456, 0.934), 'b6': (528, 0.942), 'b7': (600, 0.949),
    'lite0': (224, 0.875), 'lite1': (240, 0.882), 'lite2': (260, 0.890), 'lite3': (280, 0.897), 'lite4': (300, 0.904),
}  # fmt: skip
TIMM_SIZES = {'b2': (256, 0.875), 'b3': (288, 0.904), 'b4': (320, 0.875), 'b5': (448, 1.0)}
TIMM_LITE_SIZES = {'lite3': (300, 0.904), 'lite4': (380, 0.922)}  # with tf_ the latter is cut 0.920
TORCHVISION_SIZES = {
    'b0': (224, 224 / 256), 'b1': (240, 240 / 256), 'b2': (288, 1.0), 'b3': (300, 300 / 320),
    'b4': (380, 380 / 384), 'b5': (456, 1.0), 'b6': (528, 1.0), 'b7': (600, 1.0),
}  # fmt: skip

# timm's own variants, by what follows efficientnet_b0.
TIMM_VARIANTS = {
    ('b0', 'gn'): {'model.norm_group_size': 8},
    ('b0', 'g8_gn'): {'model.norm_group_size': 8, 'model.group_size': 8},
    ('b0', 'g16_evos'): {'model.group_size': 16, 'model.width_divisor': 16},  # batch norm, whatever it is called
    ('b3', 'gn'): {'model.norm_group_size': 16, 'model.width_divisor': 16},
    ('b3', 'g8_gn'): {'model.norm_group_size': 16, 'model.group_size': 8, 'model.width_divisor': 16},
}
GROUP_NORM = {'model.norm': 'group', 'model.norm_layout': 'contiguous'}

NAME = re.compile(
    r'(?P<tf>tf_)?efficientnet[-_](?P<variant>b[0-7]|lite[0-4])(_(?P<kind>g\d+_gn|g\d+_evos|gn))?(?![a-z0-9])'
)
TAG = re.compile(r'(_(ns|ap|aa))?(\.\w+)?')  # of timm, for how weights were trained
ADVERSARIAL = re.compile(r'_ap(?![a-z0-9])|\.ap_')  # examples, too, for which pixels were scaled otherwise


def find_name(*texts: str) -> str | None:
    """Returns the first name of an architecture that is in any of the texts, as timm spells it, or None."""
    for text in texts:
        found = NAME.search(text)
        if found:
            adversarial = text[: found.start()].endswith('adv-') or ADVERSARIAL.match(text, found.end())
            return found[0].replace('-', '_') + ('_ap' if adversarial else '')
    return None


def fields_of(scheme: str, name: str) -> Fields:
    """Returns what a config needs for weights of an architecture.

    Args:
        scheme: of `naming.SCHEMES`.
        name: such as 'efficientnet_b0', 'tf_efficientnet_b4', 'tf_efficientnet_b4_ap', 'efficientnet_lite0',
            'efficientnet_b3_g8_gn'.

    Raises:
        ConfigError: It is not known.
    """
    found = NAME.match(name)
    if found and not TAG.fullmatch(name[found.end() :]):
        found = None
    variant, kind = (found['variant'], found['kind']) if found else (None, None)
    adversarial = bool(found and ADVERSARIAL.match(name, found.end()))
    lite = bool(variant and variant.startswith('lite'))
    of_tf = bool(found and found['tf'])
    of_timm = not kind if of_tf else not adversarial and (not kind or (variant, kind) in TIMM_VARIANTS)
    of_others = not kind and not (scheme == 'torchvision' and (lite or adversarial))
    if not found or not (of_timm if scheme == 'timm' else of_others):
        kinds = ', '.join(f'efficientnet_{base}_{end}' for base, end in TIMM_VARIANTS)
        raise ConfigError(
            f'--architecture={name!r} is not known for tensors named as {scheme} does; known are efficientnet_b0 … b7 '
            'and, but for torchvision, efficientnet_lite0 … lite4 and efficientnet_b0_ap … b7_ap (of adversarial '
            f'examples; in timm with tf_); for timm the same with tf_ before them, and {kinds}'
        )
    fields = {'model.variant': variant, **DEPTHWISE}
    size, crop = (TIMM_LITE_SIZES if scheme == 'timm' else {}).get(variant, SIZES[variant])
    if scheme == 'timm' and not of_tf:
        fields |= PYTORCH | IMAGENET
        size, crop = TIMM_SIZES.get(variant, (size, crop))
        if kind:
            fields |= TIMM_VARIANTS[variant, kind]
            fields |= GROUP_NORM if 'model.norm_group_size' in fields else {}
    elif scheme == 'torchvision':
        fields |= PYTORCH | IMAGENET
        fields |= {'model.norm_epsilon': 1e-3} if variant in ('b5', 'b6', 'b7') else {}
        size, crop = TORCHVISION_SIZES[variant]
    elif scheme == 'timm':
        fields |= TENSORFLOW | (HALVES if lite or adversarial else IMAGENET)
        crop = 0.92 if variant == 'lite4' else crop
    else:
        fields |= TENSORFLOW | (LITE if lite else HALVES if adversarial else IMAGENET)
    if lite and fields['model.padding'] == 'same':
        fields['input.resize'] = 'bilinear'
    return fields | {'image_size': size, 'evaluation.crop_ratio': crop}


def fields_of_timm_config(pretrained: dict[str, Any]) -> Fields:
    """Returns the fields that a timm 'pretrained_cfg' (config.json beside the weights on a hub) says more exactly.

    Raises:
        ConfigError: One of them is of another kind.
    """
    fields: Fields = {}
    try:
        if 'input_size' in pretrained:
            fields['image_size'] = int(pretrained['input_size'][-1])
        if 'crop_pct' in pretrained:
            fields['evaluation.crop_ratio'] = float(pretrained['crop_pct'])
        for name in ('mean', 'std'):
            if name in pretrained:
                fields[f'augment.{name}'] = tuple(round(255 * value, 4) for value in pretrained[name])
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"'pretrained_cfg' in config.json beside the weights is damaged ({error})") from error
    return fields
