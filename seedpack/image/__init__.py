"""Images as coefficients: `compress` fits a neural field to one image and writes a seedpack checkpoint; `decompress` renders it.

The field is wavelet bands of whole numbers and a small network whose weights are one combination of pseudorandom bases (PRANC,
arXiv 2206.08464). Both are trained on the one image for squared error and coded bits together, as COIN (arXiv 2103.03123) and
COOL-CHIC (arXiv 2212.05458) do; see `docs/images.md`.
"""

from seedpack.image.checkpoint import Report, compress, decompress
from seedpack.image.files import format_of, read, write
from seedpack.image.fit import STEPS

__all__ = ["STEPS", "Report", "compress", "decompress", "format_of", "read", "write"]
