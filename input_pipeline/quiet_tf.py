"""The only place that imports TensorFlow, so that it is told once to keep quiet and off the accelerators.

Decoding runs on the host; a TensorFlow that saw the GPU would take most of its memory from JAX. oneDNN has no
part in image decoding and announces itself on every start. Both variables yield to the user's own. The import
costs seconds: modules that need it are imported where the work starts, not at the top of `batches.py`.
"""

import os

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')

import tensorflow as tf

tf.config.set_visible_devices([], 'GPU')

__all__ = ['tf']
