"""Operations on a batch of members that give each member the bits that it has alone, wherever it stands in the batch.

torch's own do not: MKL's products round by the address at which a matrix begins, vectorised functions leave the last
few elements of a batch to other code, and sums of stacked terms add up in another order there.  So a member that is
computed later, or beside others, would differ from itself in the last bits.  Additions, products, quotients and roots
of single numbers are rounded by the standard, and need nothing of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

#: Numbers that a vectorised loop takes at once, at most (two registers of eight): it computes full rounds alike.
_ROUND = 16
#: Below this torch does not cut an array for its threads, which would make ends within it.
_UNCUT = 1 << 14
#: Bytes of a line of the cache, at which MKL's kernels begin.
LINE = 64
#: Multiplications of one product below which torch uses a loop of its own, which knows no addresses.
_PLAIN = 400


def elementwise(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A function of single numbers, of tensors of one shape; each number's result depends on this number alone."""
    first, *others = torch.broadcast_tensors(*tensors)
    count = first.numel()
    if count % _ROUND == 0 and count <= _UNCUT and all(t.is_contiguous() for t in (first, *others)):
        return function(first, *others)
    flat = [t.reshape(-1) for t in (first, *others)]
    if count % _ROUND:
        flat = [torch.cat([t, t[-1:].expand(-count % _ROUND)]) for t in flat]
    if len(flat[0]) <= _UNCUT:
        found = function(*flat)
    else:
        found = torch.cat([function(*part) for part in zip(*(t.split(_UNCUT) for t in flat), strict=True)])
    return found[:count].view(first.shape)


def combined(weights: Sequence[float], terms: Iterable[Tensor]) -> Tensor:
    """Σ weight · term, added in order; there is one term at least, and as many weights or more."""
    pairs = zip(weights, terms, strict=False)
    weight, term = next(pairs)
    found = weight * term
    for weight, term in pairs:
        found += weight * term
    return found


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of batches of matrices, (member, ..., row, inner) and (member, ..., inner, column).

    Every matrix of a product that MKL computes begins at a line of the cache.  It is `a @ b` itself where autograd
    follows, and elsewhere than on a CPU.
    """
    rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    if rows * inner * columns < _PLAIN or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return a @ b
    if a.device.type != "cpu" or torch._C._functorch.is_functorch_wrapped_tensor(a):
        return a @ b
    lead = a.shape[:-2]
    if lead != b.shape[:-2]:
        lead = torch.broadcast_shapes(lead, b.shape[:-2])
        a, b = (t.expand(*lead, *t.shape[-2:]) for t in (a, b))
    left, right = _laid_out(a), _laid_out(b)
    found = _room(a, left.shape[0], rows, columns)
    torch.bmm(left, right, out=found)
    return found.unflatten(0, lead) if lead else found[0]


def _laid_out(matrices: Tensor) -> Tensor:
    """The matrices (matrix, row, column), each from a line of the cache on; a copy unless they are so already."""
    rows, columns = matrices.shape[-2:]
    stacked = matrices.reshape(-1, rows, columns)
    whole = len(stacked) == 1 or rows * columns * stacked.element_size() % LINE == 0
    if whole and stacked.is_contiguous() and stacked.data_ptr() % LINE == 0:
        return stacked
    found = _room(stacked, len(stacked), rows, columns)
    found.copy_(stacked)
    return found


def _room(like: Tensor, count: int, rows: int, columns: int) -> Tensor:
    line = LINE // like.element_size()
    step = -(-rows * columns // line) * line
    found: Tensor = like.new_empty(count, step)[:, : rows * columns].unflatten(-1, (rows, columns))
    return found
