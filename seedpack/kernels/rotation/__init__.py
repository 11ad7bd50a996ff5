"""The random rotation of a weight's input side; see `reference`."""

from seedpack.kernels.rotation.reference import rotate as rotate
from seedpack.kernels.rotation.reference import unrotate as unrotate
