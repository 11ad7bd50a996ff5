"""Names of a checkpoint and of a module that differ by what wraps one of them: torch.compile, DataParallel, Lightning."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import product

WRAPPERS = ("module",)  # of nn.DataParallel and its kin
INSIDE = "_orig_mod"  # of torch.compile, which also wraps modules inside others


def is_optional(name: str) -> bool:
    """Return whether a checkpoint may lack a tensor: files before torch 0.4.1 do not count batches."""
    return name.endswith(".num_batches_tracked")


def names_in_module(stored: Collection[str], own: Collection[str]) -> dict[str, str]:
    """Return {name in a checkpoint: name in a module}, where one of them is wrapped.

    Names are compared without what wraps modules inside, and without what all names of one side begin with: `module.` on
    either side, and on one side anything, as the attribute of a Lightning module. Names that fit as they are stay so, and
    so do those that fit in no way.
    """
    same = {name: name for name in stored}
    if _fits(same, own):
        return same
    for stored_cut, own_cut in sorted(product(_cuts(stored), _cuts(own)), key=lambda cuts: sum(map(len, cuts))):
        if any(set(cut) <= set(WRAPPERS) for cut in (stored_cut, own_cut)):
            in_module = {_bare(name, len(own_cut)): name for name in own}
            bare = {name: _bare(name, len(stored_cut)) for name in stored}
            names = {name: in_module[bare[name]] for name in stored if bare[name] in in_module}
            if len(names) == len(stored) and len(in_module) == len(own) and _fits(names, own):
                return names
    return same


def _fits(names: Mapping[str, str], own: Collection[str]) -> bool:
    found = set(names.values())
    return len(found) == len(names) and found <= set(own) and all(map(is_optional, set(own) - found))


def _parts(name: str) -> list[str]:
    return [part for part in name.split(".") if part != INSIDE]


def _bare(name: str, cut: int) -> str:
    return ".".join(_parts(name)[cut:])


def _cuts(names: Collection[str]) -> list[list[str]]:
    """Return the beginnings that all names share, the empty one first.

    >>> _cuts(["module.net.a.weight", "module.net.b.weight"])
    [[], ['module'], ['module', 'net']]
    """
    shared: list[str] = []
    for level in zip(*(_parts(name)[:-1] for name in names), strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return [shared[:count] for count in range(len(shared) + 1)]
