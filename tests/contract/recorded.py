"""Recomputes what an archive should hold from its own parameters, by torch.autograd and NumPy alone.

Nothing here comes from tsdyn: a network is the list of its recorded arrays, every derivative is autograd's, every mean
is over samples one by one.  Slow and plain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA = {
    "relu": torch.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.01),
    "identity": lambda z: z,
    "erf": lambda z: torch.erf(z / math.sqrt(2)),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": lambda z: torch.log1p(torch.exp(-z.abs())) + z.clamp(min=0),
    "gelu": lambda z: z * torch.special.ndtr(z),
    "silu": lambda z: z / (1 + torch.exp(-z)),
}


@dataclass
class Plain:
    """A network as its recorded arrays: W_l (node, input_node), of a convolution (channel, channel·row·column)."""

    weights: list[Tensor]
    biases: list[Tensor]
    activation: str
    image: tuple[int, int, int] | None = None
    norms: list[dict[str, Tensor]] | None = None
    place: str = "none"
    biased: bool = True
    z: list[Tensor] = field(default_factory=list)
    f: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor) -> Tensor:
        """f_L(x); leaves z_l (what σ takes) and f_l = σ(z_l) of every layer behind.

        BatchNorm after σ belongs to the layer above it, as in the folded network: a node's activation is σ's.
        """
        sigma, self.z, self.f = SIGMA[self.activation], [], []
        below = x if self.image is None else x.unflatten(1, self.image)
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            last = i == len(self.weights) - 1
            if self.image is not None and not last:
                z = F.conv2d(below, w.unflatten(1, (below.shape[1], 3, 3)), b)
            else:
                z = below.flatten(1) @ w.T + b
            if last:
                f = z
            elif self.place == "before":
                z = self.normalized(i, z)
                f = sigma(z)
            elif self.place == "after":
                f = sigma(z)
            else:
                f = sigma(z)
            self.z.append(z)
            self.f.append(f)
            below = self.normalized(i, f) if self.place == "after" and not last else f
        return below

    def normalized(self, i: int, x: Tensor) -> Tensor:
        """BatchNorm by its running statistics."""
        assert self.norms is not None
        at = [self.norms[i][k].view(-1, *[1] * (x.ndim - 2)) for k in ("mean", "variance", "scale", "shift")]
        return (x - at[0]) / (at[1] + 1e-5).sqrt() * at[2] + at[3]

    def balances(self) -> list[Tensor]:
        """Σ_o a_oj² − Σ_i w_ji² − b_j² of every hidden layer, (node,)."""
        layers = zip(self.weights[:-1], self.biases[:-1], self.weights[1:], strict=True)
        return [(a * a).sum(0) - (w * w).sum(1) - b * b for w, b, a in layers]


def rows(x: Tensor) -> Tensor:
    """Activations as (sample, node), or images as (sample·row·column, channel)."""
    return x if x.ndim == 2 else x.permute(0, 2, 3, 1).flatten(0, 2)


@dataclass
class Seen:
    """Two networks on one data set, with all derivatives by autograd.

    Attributes:
        loss: ``mse`` is ½‖f* − f‖² of a sample, ``cross_entropy`` −log softmax(f)_class.
        classes: Of the samples, for a cross entropy.
    """

    student: Plain
    teacher: Plain
    x: Tensor
    loss: str
    classes: Tensor | None = None

    @cached_property
    def target(self) -> Tensor:
        return self.teacher(self.x).detach()

    @cached_property
    def output(self) -> Tensor:
        return self.student(self.x)

    def value(self, output: Tensor, target: Tensor, classes: Tensor) -> Tensor:
        """The loss, summed over the samples given."""
        if self.loss == "mse":
            return 0.5 * (target - output).square().sum()
        assert self.loss == "cross_entropy"
        return -output.log_softmax(1)[torch.arange(len(output)), classes].sum()

    @cached_property
    def whole_classes(self) -> Tensor:
        return self.target.argmax(1) if self.classes is None else self.classes

    @property
    def mean_loss(self) -> Tensor:
        return self.value(self.output, self.target, self.whole_classes) / len(self.x)

    @property
    def mse(self) -> Tensor:
        return (self.target - self.output).square().mean()

    def gradients(self) -> list[Tensor]:
        """g_l = −∂(loss of a sample)/∂z_l, one (sample, node) per layer, one sample at a time."""
        found: list[list[Tensor]] = []
        for i in range(len(self.x)):
            part = slice(i, i + 1)
            output = self.student(self.x[part])
            z = list(self.student.z)
            value = self.value(output, self.target[part], self.whole_classes[part])
            found.append([-g[0] for g in torch.autograd.grad(value, z)])
        return [torch.stack(layer) for layer in zip(*found, strict=True)]

    def gradient_norms(self) -> Tensor:
        """‖∂(loss of a sample)/∂θ‖, (sample,)."""
        leaves = [*self.student.weights, *(self.student.biases if self.student.biased else [])]
        found = []
        for i in range(len(self.x)):
            part = slice(i, i + 1)
            value = self.value(self.student(self.x[part]), self.target[part], self.whole_classes[part])
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, leaves)]).norm())
        return torch.stack(found)

    def hessian(self) -> Tensor:
        """Hessian of the mean loss in all parameters, row by row."""
        leaves = [*self.student.weights, *(self.student.biases if self.student.biased else [])]
        value = self.value(self.student(self.x), self.target, self.whole_classes) / len(self.x)
        first = torch.cat([
            g.flatten() for g in torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
        ])  # fmt: skip
        found = []
        for entry in first:
            if not entry.requires_grad:
                found.append(torch.zeros_like(first).detach())
                continue
            row = torch.autograd.grad(entry, leaves, retain_graph=True, materialize_grads=True)
            found.append(torch.cat([r.flatten() for r in row]))
        return torch.stack(found)

    def jacobians(self, network: Plain) -> list[Tensor]:
        """∂f_L/∂f_l of every hidden layer, (sample, output, node[, row, column]), one sample and output at a time."""
        found: list[list[Tensor]] = []
        for i in range(len(self.x)):
            output = network(self.x[i : i + 1])
            hidden = network.f[:-1]
            each = [torch.autograd.grad(output[0, c], hidden, retain_graph=True) for c in range(output.shape[1])]
            found.append([torch.stack([row[at][0] for row in each]) for at in range(len(hidden))])
        return [torch.stack(layer) for layer in zip(*found, strict=True)]

    def slopes(self, network: Plain) -> list[Tensor]:
        """∂f_l/∂z_l of every hidden layer, elementwise; rows as `rows`."""
        network(self.x)
        found = []
        for z in network.z[:-1]:
            at = z.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(SIGMA[network.activation](at).sum(), at)
            found.append(rows(slope))
        return found

    def moments(self) -> dict[str, list[Tensor]]:
        """A, B, D, L, H and their mixed forms, one per hidden layer; of channels summed over pixels."""
        n = len(self.x)
        v, v_star = self.jacobians(self.student), self.jacobians(self.teacher)
        d, d_star = self.slopes(self.student), self.slopes(self.teacher)
        self.student(self.x), self.teacher(self.x)
        f = [rows(h).detach() for h in self.student.f[:-1]]
        f_star = [rows(h).detach() for h in self.teacher.f[:-1]]
        dots = "ncipq,ncjpq->ij" if v[0].ndim == 5 else "nci,ncj->ij"
        found: dict[str, list[Tensor]] = {
            "A": [torch.einsum(dots, a, b) / n for a, b in zip(v, v_star, strict=True)],
            "B": [torch.einsum(dots, a, a) / n for a in v],
            "D_star": [a.T @ b / len(a) for a, b in zip(d, d_star, strict=True)],
            "D": [a.T @ a / len(a) for a in d],
            "L_star": [a.T @ b / len(a) for a, b in zip(f, f_star, strict=True)],
            "L": [a.T @ a / len(a) for a in f],
        }
        found["H_star"] = [a * b for a, b in zip(found["A"], found["D_star"], strict=True)]
        found["H"] = [a * b for a, b in zip(found["B"], found["D"], strict=True)]
        return found

    def fanout_norms(self, network: Plain) -> list[Tensor]:
        """√E‖v_k‖², one (node,) per hidden layer; of a channel summed over its pixels."""
        found = []
        for v in self.jacobians(network):
            square = v.square().sum(1)
            found.append((square if square.ndim == 2 else square.sum((2, 3))).mean(0).sqrt())
        return found

    def correlations(self) -> list[np.ndarray]:
        """np.corrcoef of every pair of nodes, (teacher_node, node) per hidden layer; NaN for a constant one."""
        self.student(self.x), self.teacher(self.x)
        found = []
        for mine, theirs in zip(self.student.f[:-1], self.teacher.f[:-1], strict=True):
            a, b = rows(mine).detach().double().numpy(), rows(theirs).detach().double().numpy()
            pairs = np.full((b.shape[1], a.shape[1]), np.nan)
            for j in range(b.shape[1]):
                for k in range(a.shape[1]):
                    if np.ptp(a[:, k]) > 0 and np.ptp(b[:, j]) > 0:
                        pairs[j, k] = np.corrcoef(b[:, j], a[:, k])[0, 1]
            found.append(pairs)
        return found

    def observation(self, band: float) -> list[np.ndarray]:
        """Share of the samples near a teacher node's boundary where a student node is active."""
        found = []
        for z_star, z in self._hidden_z():
            near = np.abs(z_star) <= band * z_star.std(0)
            with np.errstate(invalid="ignore"):
                found.append(np.array([
                    [np.nan if not n.any() else (z[n, k] > 0).mean() for k in range(z.shape[1])] for n in near.T
                ]))  # fmt: skip
        return found

    def observation_count(self) -> list[np.ndarray]:
        """Number of samples where a student node is active, on the side of a teacher node's boundary that has fewer."""
        return [
            np.array([
                [min(((z_star[:, j] > 0) & (z[:, k] > 0)).sum(), ((z_star[:, j] <= 0) & (z[:, k] > 0)).sum())
                 for k in range(z.shape[1])] for j in range(z_star.shape[1])
            ], float)
            for z_star, z in self._hidden_z()
        ]  # fmt: skip

    def _hidden_z(self) -> list[tuple[np.ndarray, np.ndarray]]:
        self.student(self.x), self.teacher(self.x)
        pairs = zip(self.teacher.z[:-1], self.student.z[:-1], strict=True)
        return [(a.detach().numpy(), b.detach().numpy()) for a, b in pairs]

    def alignment(self) -> np.ndarray:
        """Definition 3 at the lowest layer: max of the sine and the bias difference, in the better orientation."""
        (w, b), (w_star, b_star) = ((n.weights[0], n.biases[0]) for n in (self.student, self.teacher))
        found = np.full((len(w_star), len(w)), np.nan)
        for j, (u, c) in enumerate(zip(w_star.detach().double(), b_star.detach().double(), strict=True)):
            for k, (v, d) in enumerate(zip(w.detach().double(), b.detach().double(), strict=True)):
                if u.norm() > 0 and v.norm() > 0:
                    one, two, cu, cv = u / u.norm(), v / v.norm(), c / u.norm(), d / v.norm()
                    cosine = float(one @ two)
                    sine = float((two - cosine * one).norm())
                    found[j, k] = max(sine, abs(float(cu - math.copysign(1, cosine) * cv)))
        return found

    def accuracy(self, classes: Tensor, most: int) -> np.ndarray:
        order = self.output.argsort(1, descending=True)
        hit = (order == classes[:, None]).numpy()
        return np.array([hit[:, : k + 1].any(1).mean() for k in range(most)])

    def lemma1_residual(self) -> float:
        """Error of g_l = D_l (A_l [f*; 1] − B_l [f; 1]) by autograd's Jacobians, relative to the layer's largest term.

        With the column of the constant node V_l [f_l; 1] is f_L, so that A_l [f*; 1] = V_lᵀ f*_L and likewise for B.
        """
        worst = 0.0
        gradients = self.gradients()
        v, d = self.jacobians(self.student), self.slopes(self.student)
        output, target = self.student(self.x).detach(), self.target
        for i in range(len(v)):
            pull = torch.einsum("nck,nc->nk", v[i], target) * d[i]
            push = torch.einsum("nck,nc->nk", v[i], output) * d[i]
            scale = max(float(t.abs().max()) for t in (gradients[i], pull, push))
            if scale:
                worst = max(worst, float((gradients[i] - (pull - push)).abs().max()) / scale)
        return worst


def plain(ds: Any, epoch: int, *, activation: str, teacher: bool = False, **shape: Any) -> Plain:
    """The network of seed 0 that an archive holds at `epoch`, with parameters that require gradients."""
    who, nodes = ("teacher_", "teacher_width") if teacher else ("", "width")
    one = ds.isel(seed=0) if teacher else ds.isel(seed=0).sel(epoch=epoch)
    weights, biases = [], []
    for layer in ds["layer"].values:
        at = one.sel(layer=layer)
        size = int(at[nodes])
        inputs = int(at["teacher_input_width" if teacher else "input_width"])
        weights.append(torch.tensor(at[f"{who}weight"].values[:size, :inputs]).requires_grad_(True))
        biases.append(torch.tensor(at[f"{who}bias"].values[:size]).requires_grad_(True))
    norms = None
    if shape.get("place", "none") != "none":
        norms = [
            {k: torch.tensor(one.sel(layer=i)[f"norm_{k}"].values[: int(one.sel(layer=i)["width"])])
             for k in ("mean", "variance", "scale", "shift")}
            for i in ds["layer"].values[:-1]
        ]  # fmt: skip
    return Plain(weights, biases, activation, norms=norms, **shape)
