"""Train in a random subspace: the optimiser sees a few coefficients, or scores of a mask.

    basis_(model, 10_000)     # PRANC: all weights are one combination of 10,000 pseudorandom basis vectors
    mask_(model, kept=0.5)    # edge-popup: frozen pseudorandom weights, of which a learnt mask keeps half

Train as ever, `seedpack.save(model, path)`, and `seedpack.load(path, model=Net())` anywhere. docs/training.md explains.
"""

from seedpack.reparam.basis import basis_ as basis_
from seedpack.reparam.mask import mask_ as mask_
