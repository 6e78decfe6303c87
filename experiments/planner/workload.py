"""What is to be trained, with the names and meanings of configs/base.py."""

import dataclasses
import math
import sys

from efficientnet.errors import ConfigError
from efficientnet.model.scaling import VARIANTS, ModelSpec, model_spec
from efficientnet.numerics.precision import POLICIES
from efficientnet.parallel.pipeline import SCHEDULES
from efficientnet.parallel.stages import BUFFERS, PASSES

BALANCED = 'balanced'  # splits
IMAGE_BYTES = {'uint8': 1, 'fp32': 4}  # of a number of an image on its way from the host
IMAGENET = 1_281_167  # training images
LARGEST = 1_000_000  # of a size; what is larger would be counted for minutes


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is trained, with the names and meanings of configs/base.py.

    Attributes:
        model: 'b0' … 'b7'.
        group_size: Channels a group.
        image_size: Pixels a side; 0 for the model's own.
        classes: Of the data set.
        global_batch: Images a weight update.
        micro_batch: Images computed at once; 0 for the fastest number that fits.
        stages: Devices one copy of the model is spread over; 0 for the fastest number that fits.
        splits: First block of every stage but the first, or 'balanced'; 'auto' is 'balanced', but the reference's
            splits where the reference's program is planned and has some.
        replicas: Copies of the model; 0 for as many as there are devices for.
        schedule: 'grouped' or 'sequential'.
        recompute: 'none', 'block' or 'stage'.
        policy: Of precision.py.
        optimizer: 'lars', 'rmsprop' or 'sgd'.
        epochs: Passes over the data set.
        examples: In the data set.
        images: What crosses the host's link, a key of `IMAGE_BYTES`.
    """

    model: str = 'b4'
    group_size: int = 16
    image_size: int = 0
    classes: int = 1000
    global_batch: int = 6144
    micro_batch: int = 3
    stages: int = 0
    splits: str = 'auto'
    replicas: int = 0
    schedule: str = 'grouped'
    recompute: str = 'stage'
    policy: str = '16.16'
    optimizer: str = 'lars'
    epochs: float = 350.0
    examples: int = IMAGENET
    images: str = 'uint8'

    @property
    def pixels(self) -> int:
        """Side of an image of a known model."""
        return self.image_size or VARIANTS[self.model].resolution

    @property
    def chooses_splits(self) -> bool:
        """Whether the splits are left to the planner."""
        return self.splits in ('auto', BALANCED)

    def spec(self) -> ModelSpec:
        """Returns the network.

        Raises:
            ConfigError: The model is unknown, or its channels do not divide into such groups.
        """
        return model_spec(self.model, group_size=self.group_size, classes=self.classes)

    def image_bytes(self, images: str | None = None) -> int:
        """Returns the bytes of an image on its way from the host, as 'uint8', as 'fp32', or as the workload has it."""
        return self.pixels**2 * 3 * IMAGE_BYTES[images or self.images]

    def check(self) -> None:
        """Raises ConfigError for what nothing further on would name by its flag."""
        known_values = {
            'model': VARIANTS,
            'policy': POLICIES,
            'optimizer': BUFFERS,
            'schedule': SCHEDULES,
            'recompute': PASSES,
            'images': IMAGE_BYTES,
        }
        for field, known in known_values.items():
            if getattr(self, field) not in known:
                raise ConfigError(f'--{field}={getattr(self, field)!r} is unknown; choose one of {", ".join(known)}')
        for field in ('image_size', 'stages', 'replicas', 'micro_batch', 'global_batch', 'classes', 'group_size'):
            value = getattr(self, field)
            if not isinstance(value, int) or not 0 <= value <= LARGEST:
                raise ConfigError(f'--{field}={value} must be a whole number from 0 to {LARGEST:,}')
        if not 0 < self.epochs < math.inf:
            raise ConfigError(f'--epochs={self.epochs:g} must be above 0')
        if self.examples < 1:
            raise ConfigError(f'--examples={self.examples} must be at least 1')
        if self.examples > sys.float_info.max / max(self.epochs, 1.0):
            raise ConfigError(f'--examples={self.examples:d} × --epochs={self.epochs:g} is beyond counting')
        self.spec()
