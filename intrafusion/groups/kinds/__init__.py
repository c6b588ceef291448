"""What a layer is to the channels of a group, one class per kind of layer; importing this knows them all."""

from intrafusion.groups.kinds import (  # noqa: F401  (each registers its kinds)
    attention,
    batchnorm,
    convolution,
    embedding,
    linear,
    normalisation,
    parameter,
    prelu,
)
