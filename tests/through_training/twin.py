"""Training unrolled as one autograd graph, member by member: the definition that `tsdyn.sensitivity` is compared with.

Imports nothing of tsdyn.  Optimizers are written as torch's documentation writes them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "relu": torch.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.01),
    "identity": lambda z: z,
    "tanh": torch.tanh,
    "erf": lambda z: torch.erf(z / 2**0.5),
    "softplus": lambda z: F.softplus(z, threshold=50.0),
    "gelu": F.gelu,
}


def forward(p, stats, x, how, training):
    """Outputs and statistics after; `how` has activation, norm place, image and padding of convolutions."""
    depth = how["depth"]
    sigma = ACTIVATIONS[how["activation"]]
    f = x if how.get("image") is None else x.view(len(x), *how["image"])
    after = dict(stats)
    for layer in range(1, depth + 1):
        w, b = p[f"weight_{layer}"], p.get(f"bias_{layer}")
        z = F.conv2d(f, w, b, padding=how["padding"]) if w.ndim == 4 else F.linear(f.flatten(1), w, b)
        if layer == depth:
            return z, after
        place = how.get("norm", "none")
        if place == "before":
            z = normalized(p, stats, after, z, layer, training)
        f = sigma(z)
        if place == "after":
            f = normalized(p, stats, after, f, layer, training)
    raise AssertionError


def normalized(p, stats, after, x, layer, training):
    over = [d for d in range(x.ndim) if d != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    mean, variance = stats[f"norm_mean_{layer}"], stats[f"norm_variance_{layer}"]
    if training:
        mean, variance = x.mean(over), x.var(over, correction=0)
        unbiased = x.var(over, correction=1)
        after[f"norm_mean_{layer}"] = 0.9 * stats[f"norm_mean_{layer}"] + 0.1 * mean
        after[f"norm_variance_{layer}"] = 0.9 * stats[f"norm_variance_{layer}"] + 0.1 * unbiased
    flat = (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()
    return flat * p[f"norm_scale_{layer}"].view(shape) + p[f"norm_shift_{layer}"].view(shape)


def sample_losses(kind, output, target):
    if kind == "mse":
        return 0.5 * ((output - target) ** 2).sum(1)
    return -(target * torch.log_softmax(output, 1)).sum(1)


def layer_of(name):
    return int(name.rsplit("_", 1)[1])


def trained(start, stats, x_all, y_all, weight, rates, steps, how):
    """Parameters and statistics after training.

    Args:
        start, stats: Parameters and running statistics by name.
        x_all, y_all, weight: Training samples, their targets and weights in the loss.
        rates: One per epoch.
        steps: (epoch from 0, rows or None) of each step, or (epoch, inputs, targets) for fresh samples.
        how: The options.
    """
    p = dict(start)
    first = {n: torch.zeros_like(t) for n, t in p.items()}
    second = {n: torch.zeros_like(t) for n, t in p.items()}
    mu, decay, method = how.get("momentum", 0.0), how.get("weight_decay", 0.0), how.get("method", "sgd")
    b1, b2, eps = 0.9, 0.999, 1e-8
    for t, (epoch, *batch) in enumerate(steps, start=1):
        if len(batch) == 2:
            x, y, w = batch[0], batch[1], torch.ones(len(batch[0]), dtype=torch.float64)
        elif batch[0] is None:
            x, y, w = x_all, y_all, weight
        else:
            x, y, w = x_all[batch[0]], y_all[batch[0]], weight[batch[0]]
        output, stats = forward(p, stats, x, how, True)
        objective = (w * sample_losses(how.get("loss", "mse"), output, y)).mean()
        free = [n for n in p if layer_of(n) not in how.get("frozen", ())]
        slopes = dict(zip(free, torch.autograd.grad(objective, [p[n] for n in free], create_graph=True), strict=True))
        if how.get("clip") is not None:
            norm = torch.cat([g.flatten() for g in slopes.values()]).norm()
            factor = how["clip"] / (norm + 1e-6)
            slopes = {n: g * factor if factor < 1 else g for n, g in slopes.items()}
        new = dict(p)
        for n, g in slopes.items():
            eta = rates[epoch] * (how["rates"][layer_of(n) - 1] if how.get("rates") else 1.0)
            lam = decay if how.get("decay_biases", True) or n.startswith("weight") else 0.0
            if method == "adamw":
                value = p[n] * (1 - eta * lam)
            else:
                value, g = p[n], g + lam * p[n]
            if method in ("adam", "adamw"):
                first[n] = b1 * first[n] + (1 - b1) * g
                second[n] = b2 * second[n] + (1 - b2) * g**2
                root = torch.where(second[n] > 0, torch.where(second[n] > 0, second[n], 1.0).div(1 - b2**t).sqrt(), 0.0)
                new[n] = value - eta * (first[n] / (1 - b1**t)) / (root + eps)
            elif how.get("nesterov"):
                first[n] = mu * first[n] + g
                new[n] = value - eta * (g + mu * first[n])
            elif mu:
                first[n] = mu * first[n] + g
                new[n] = value - eta * first[n]
            else:
                new[n] = value - eta * g
            if how.get("normalize") and n.startswith("weight") and layer_of(n) < how["depth"]:
                new[n] = new[n] / new[n].flatten(1).norm(dim=1).view(-1, *[1] * (new[n].ndim - 1))
        p = new
    return p, stats
