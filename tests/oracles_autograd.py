"""The definitions that derivatives are compared with: loops of ``torch.autograd.grad``; nothing of tsdyn is imported.

`call(module, x)` is how a module takes its input; `trained` are its parameters that require a gradient.
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def cut(tree, index):
    """Samples of a tensor, or of all tensors of a tuple, list or dict."""
    if isinstance(tree, dict):
        return {key: cut(value, index) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(cut(value, index) for value in tree)
    return None if tree is None else tree[index]


def trained(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def slopes(value, parameters, **keywords):
    found = torch.autograd.grad(value, list(parameters), allow_unused=True, retain_graph=True, **keywords)
    return [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, found, strict=True)]


def gradients(module, call, loss, x, y, samples):
    """Per-sample gradients, name → (sample, *parameter)."""
    free = trained(module)
    rows = []
    for i in range(samples):
        one = slice(i, i + 1)
        rows.append(slopes(loss(call(module, cut(x, one)), cut(y, one)), free.values()))
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(free)}


def norms(by_name):
    real = [torch.view_as_real(g) if g.is_complex() else g for g in by_name.values()]
    return torch.cat([g.double().reshape(len(g), -1) for g in real], 1).norm(dim=1)


def jacobian(module, call, x, samples):
    """Jacobians, name → (sample, output, *parameter), outputs flattened."""
    free = trained(module)
    rows = []
    for i in range(samples):
        output = call(module, cut(x, slice(i, i + 1))).flatten()
        rows.append([slopes(o, free.values()) for o in output])
    return {
        name: torch.stack([torch.stack([of_output[k] for of_output in row]) for row in rows])
        for k, name in enumerate(free)
    }


def kernel(jacobians):
    """Neural tangent kernel, (sample, sample2, output, output2)."""
    real = [torch.view_as_real(j) if j.is_complex() else j for j in jacobians.values()]
    flat = torch.cat([j.reshape(*j.shape[:2], -1) for j in real], 2)
    return torch.einsum("sop,tqp->stoq", flat, flat)


def hessian(module, call, loss, x, y):
    """Hessian (parameter, parameter), entry by entry of the gradient; without fused attention, which has none."""
    free = list(trained(module).values())
    with sdpa_kernel(SDPBackend.MATH):
        first = slopes(loss(call(module, x), y), free, create_graph=True)
        flat = torch.cat([g.flatten() for g in first])
        rows = []
        for entry in flat:
            row = slopes(entry, free) if entry.requires_grad else [torch.zeros_like(p) for p in free]
            rows.append(torch.cat([g.flatten() for g in row]))
    return torch.stack(rows).detach()
