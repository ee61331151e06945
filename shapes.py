"""Shapes of the official models, known without a download; a T5 that is nothing but a shape."""

import os

import torch

import hub
from t5 import T5, T5Config, expected_shapes

# d_model, d_kv, d_ff, layers, heads, gated.
SHAPES = {"t5-small": (512, 64, 2048, 6, 8, False), "t5-base": (768, 64, 3072, 12, 12, False),
          "t5-large": (1024, 64, 4096, 24, 16, False), "t5-3b": (1024, 128, 16384, 24, 32, False)}
V11 = {"small": (512, 64, 1024, 8, 6, True), "base": (768, 64, 2048, 12, 12, True),
       "large": (1024, 64, 2816, 24, 16, True), "xl": (2048, 64, 5120, 24, 32, True),
       "xxl": (4096, 64, 10240, 24, 64, True)}
SHAPES |= {family.format(size): shape for size, shape in V11.items()
           for family in ("t5-v1_1-{}", "t5-{}-lm-adapt", "flan-t5-{}")}


def model_shape(name):
    """The T5Config of a model: of an official one without a download, else read."""
    if name not in SHAPES or os.path.isdir(name):
        return hub.model_config(name)
    d, k, ff, layers, heads, gated = SHAPES[name]
    return T5Config(d, k, ff, layers, layers, heads, hub.OFFICIAL_ROWS, gated, tied=not gated,
                    scaled=not gated)


def stand_in(config, dtype, device):
    """A T5 of a shape with constant weights; on the device "meta" without any."""
    weights = {name: torch.full(shape, 0.01, dtype=dtype, device=device)
               for name, shape in expected_shapes(config).items()}
    return T5(config, {"lm_head.weight": weights["shared.weight"], **weights})
