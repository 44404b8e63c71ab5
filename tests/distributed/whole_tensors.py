"""Whole tensors from the parts that ranks hold, by torch's own account of where each part is."""

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from scatterfold.parallel.process import gather
from scatterfold.parallel.shards import local_part


def whole(state):
    """Whole tensors by name, of all ranks and pipeline stages together; what several ranks hold must be equal.

    One exchange for all of them: gathering each by itself would be most of a test's time.
    """
    # Arrays pickle ten times faster than tensors, and FSDP cannot free memory that is shared with one.
    parts = {name: (*place(tensor), local_part(tensor).detach().clone().numpy()) for name, tensor in state.items()}
    found = {}
    for own in gather(parts):
        for name, (shape, where, part) in own.items():
            part = torch.from_numpy(part)
            there = found.setdefault(name, part.new_full(shape, float("nan")))[where]
            assert torch.equal(part, torch.where(there.isnan(), part, there)), name
            there.copy_(part)
    return found


def place(tensor):
    """Where in the whole tensor this rank's part is: the size of the whole, and a slice of each dimension."""
    if not isinstance(tensor, DTensor):
        return tensor.shape, (slice(None),) * tensor.dim()
    assert not any(placement.is_partial() for placement in tensor.placements)
    sizes, starts = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.shape, tuple(slice(start, start + size) for size, start in zip(sizes, starts))


def same(one, other):
    """Equal to the last bit."""
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def holds(state, wholes):
    """Each rank looks at its own parts of the whole tensors `wholes`, and all ranks together have all of them."""
    for name, tensor in state.items():
        shape, where = place(tensor)
        assert shape == wholes[name].shape and torch.equal(local_part(tensor), wholes[name][where]), name
    assert {name for names in gather(list(state)) for name in names} == set(wholes)
