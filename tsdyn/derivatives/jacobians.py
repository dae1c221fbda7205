"""Per-sample Jacobians, and what is built from them: the neural tangent kernel and the Gauss–Newton matrix.

By ``vmap(jacrev(functional_call))`` where it agrees with plain autograd, on some whole samples and on all of them by
one random combination; otherwise by one backward pass per sample and output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Literal, TypeAlias, assert_never, overload

import torch
import xarray as xr
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.utils._pytree import tree_map

from tsdyn.arguments import FUNCTION, MODULE, takes
from tsdyn.derivatives import labels
from tsdyn.derivatives.agreement import agree_by_name, comparable
from tsdyn.derivatives.assumptions import MEMORY, Asked, Loss, Tree, asked, log, sample_axis
from tsdyn.derivatives.layered import fill_jacobians, plain_network
from tsdyn.memory import refuse_beyond
from tsdyn.networks.network import Network


@overload
def jacobian(
    module: nn.Module | Network,
    x: Tree,
    *,
    wrt: Literal["parameters"] = "parameters",
    memory: int = MEMORY,
    labelled: Literal[False] = False,
) -> dict[str, Tensor]: ...
@overload
def jacobian(
    module: nn.Module | Network,
    x: Tree,
    *,
    wrt: Literal["inputs"],
    memory: int = MEMORY,
    labelled: Literal[False] = False,
) -> Tensor: ...
@overload
def jacobian(
    module: nn.Module | Network, x: Tree, *, wrt: str, memory: int = MEMORY, labelled: Literal[False] = False
) -> dict[str, Tensor] | Tensor: ...
@overload
def jacobian(
    module: nn.Module | Network, x: Tree, *, wrt: str = "parameters", memory: int = MEMORY, labelled: Literal[True]
) -> xr.Dataset: ...
@takes(module=MODULE)
def jacobian(
    module: nn.Module | Network, x: Tree, *, wrt: str = "parameters", memory: int = MEMORY, labelled: bool = False
) -> dict[str, Tensor] | Tensor | xr.Dataset:
    """Jacobian of every sample's output, equal to plain autograd of one output of one sample at a time.

    Args:
        module: Deterministic, its samples independent, its output one real tensor.
        x: (sample, ...), as in `per_sample_gradients`.
        wrt: ``"parameters"`` → name → (sample, output, *parameter), of those that require a gradient; ``"inputs"`` →
            (sample, output, *input); the name of a submodule that is called once → (sample, output, *activation) at
            its output (V_l, for a layer's activation).  If the module gives one number per sample, the axis ``output``
            is missing.
        memory: Limit on the bytes of one chunk of samples, besides the result.
        labelled: Whether to return a Dataset over the network's own layers and nodes and the samples, whose labels are
            those of `x` if that is a DataArray (`tsdyn.derivatives.labels`).

    Raises:
        ValueError: for a module without per-sample derivatives, an unknown submodule, or one called more than once.
        MemoryError: before it starts, if the result does not fit.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from tsdyn import derivatives
        >>> module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        >>> x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
        >>> {name: tuple(j.shape) for name, j in derivatives.jacobian(module, x).items()}
        {'0.weight': (6, 2, 4, 3), '0.bias': (6, 2, 4), '2.weight': (6, 2, 2, 4), '2.bias': (6, 2, 2)}
    """
    caller = "jacobian"
    if labelled:
        return _labelled_jacobian(jacobian(module, labels.unlabelled(x), wrt=wrt, memory=memory), module, x, wrt)
    with asked(caller, module, x) as one:
        if wrt == "parameters" and (filled := _by_formulas(one)) is not None:
            return filled
        view = _View(one, wrt)
        size = sum(one.count * view.outputs * t.nbytes for t in view.single().values())
        refuse_beyond(caller, size, one.device, "ask for fewer samples")
        found = view.whole(memory // max(1, 3 * size // one.count))
        shaped = {n: j.view(len(j), *view.output_shape, *j.shape[2:]) for n, j in found.items()}
    return shaped if wrt == "parameters" else shaped[wrt]


def _by_formulas(one: Asked) -> dict[str, Tensor] | None:
    """Jacobians in the parameters of a fully connected network of torch's own parts, which need no comparison."""
    leaves = list(one.parameters.values())
    if not (one.known and one.count and leaves):
        return None
    plain = plain_network(one.module, one.inputs, leaves, compare=False)
    if plain is None:
        return None
    network, order = plain
    outputs = network.widths[-1]
    refuse_beyond(one.caller, one.count * outputs * sum(t.nbytes for t in leaves), one.device, "ask for fewer samples")
    found = {n: p.new_empty(one.count, outputs, *p.shape, requires_grad=False) for n, p in one.parameters.items()}
    with torch.no_grad():
        fill_jacobians(network, one.inputs, order, list(found.values()))
    return found


def _labelled_jacobian(found: dict[str, Tensor] | Tensor, module: nn.Module | Network, x: Tree, wrt: str) -> xr.Dataset:
    """Dataset of Jacobians: ``weight`` and ``bias`` for parameters, else ``inputs`` or ``activation``."""
    flat = found if isinstance(found, dict) else {wrt: found}
    own: Mapping[str, Tensor] = {}
    if wrt == "parameters":
        made = module.to_torch() if isinstance(module, Network) else module
        own = {name: p for name, p in made.named_parameters() if p.requires_grad}
    name, values = next(iter(flat.items()))
    inner = own[name].ndim if wrt == "parameters" else 1
    if wrt == "parameters" and values.ndim - inner > 2:
        outputs = tuple(values.shape[1 : values.ndim - inner])
        raise ValueError(
            f"jacobian: labelled=True is of outputs that are vectors or numbers, not of shape (sample, "
            f"{', '.join(map(str, outputs))}); flatten them in the module, or take the form without labels"
        )
    lead = ("sample", "output")[: values.ndim - inner]
    coords = labels.of_samples(x) | (labels.outputs(values.shape[1]) if len(lead) == 2 else {})
    if wrt == "parameters":
        return labels.in_parameters(flat, module, lead, coords, "derivative of the output")
    if values.ndim > 3:
        raise ValueError(f"jacobian: labelled=True with wrt={wrt!r} is of vectors, not {tuple(values.shape[2:])}")
    called, last = ("inputs", "input_node") if wrt == "inputs" else ("activation", "node")
    return labels.single(called, values, (*lead, last), coords, f"derivative of the output in {wrt}")


@overload
def neural_tangent_kernel(
    module: nn.Module | Network, x: Tree, x2: Tree = None, *, memory: int = MEMORY, labelled: Literal[False] = False
) -> Tensor: ...
@overload
def neural_tangent_kernel(
    module: nn.Module | Network, x: Tree, x2: Tree = None, *, memory: int = MEMORY, labelled: Literal[True]
) -> xr.Dataset: ...
@takes(module=MODULE)
def neural_tangent_kernel(
    module: nn.Module | Network, x: Tree, x2: Tree = None, *, memory: int = MEMORY, labelled: bool = False
) -> Tensor | xr.Dataset:
    """Empirical NTK Θ(x, x') = J(x) J(x')ᵀ over all trainable parameters, (sample, sample2, output, output2).

    Contracted in blocks of samples, so that at most two blocks of Jacobians exist at a time.  The result has the
    parameters' type, whatever the inputs'; complex parameters count as their real and imaginary parts.  With
    `labelled` a Dataset of ``kernel`` (sample, sample_2, output, output_2), with the samples' labels on both sides.

    Raises:
        ValueError: as `jacobian`, or for outputs that are neither vectors nor numbers.
        MemoryError: before it starts, if the kernel does not fit.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from tsdyn import derivatives
        >>> module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        >>> x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
        >>> derivatives.neural_tangent_kernel(module, x).shape
        torch.Size([6, 6, 2, 2])
    """
    caller = "neural_tangent_kernel"
    if labelled:
        kernel = neural_tangent_kernel(module, *(labels.unlabelled(each) for each in (x, x2)), memory=memory)
        coords = labels.of_samples(x) | labels.of_samples(x if x2 is None else x2, "sample_2")
        dims = ("sample", "sample_2", "output", "output_2")
        return labels.single("kernel", kernel, dims, coords, "neural tangent kernel")
    with ExitStack() as held:
        one = held.enter_context(asked(caller, module, x))
        two = one if x2 is None else held.enter_context(asked(caller, module, x2))
        left = _View(one, "parameters")
        right = left if x2 is None else _View(two, "parameters")
        if len(left.output_shape) > 1:
            raise ValueError(f"{caller}: outputs have shape (sample, *{left.output_shape}); (sample, output) is needed")
        outputs, dtype = left.outputs, one.dtype.to_real()
        size = one.count * two.count * outputs**2 * dtype.itemsize
        refuse_beyond(caller, size, one.device, "give x and x2 in blocks")
        block = memory // max(1, 4 * outputs * sum(p.nbytes for p in one.parameters.values()))
        kernel = torch.empty(one.count, outputs, two.count, outputs, dtype=dtype, device=one.device)
        for i in _chunks(one.count, block):
            rows = left.rows(i)
            for j in _chunks(two.count, block):
                if x2 is None and j.start < i.start:  # symmetric
                    kernel[i, :, j] = kernel[j, :, i].permute(2, 3, 0, 1)
                    continue
                columns = rows if x2 is None and j == i else right.rows(j)
                kernel[i, :, j] = (rows.flatten(0, 1) @ columns.flatten(0, 1).T).view(len(rows), outputs, -1, outputs)
    return kernel.transpose(1, 2)


@overload
def gauss_newton(
    module: nn.Module | Network,
    loss: Loss,
    x: Tree,
    y: Tree = None,
    *,
    memory: int = MEMORY,
    labelled: Literal[False] = False,
) -> Tensor: ...
@overload
def gauss_newton(
    module: nn.Module | Network, loss: Loss, x: Tree, y: Tree = None, *, memory: int = MEMORY, labelled: Literal[True]
) -> xr.Dataset: ...
@takes(module=MODULE, loss=FUNCTION)
def gauss_newton(
    module: nn.Module | Network, loss: Loss, x: Tree, y: Tree = None, *, memory: int = MEMORY, labelled: bool = False
) -> Tensor | xr.Dataset:
    """Generalized Gauss–Newton matrix E[Jᵀ (∂²ℓ/∂f²) J] over all trainable parameters, (parameter, parameter).

    Equals the Fisher matrix where the loss is a negative log-likelihood of exponential family (squared error, cross
    entropy); the Hessian of the mean over samples differs by the term of second derivatives of the module, which
    vanishes at zero residual.  With `labelled` a Dataset of ``gauss_newton`` (parameter, parameter_2); its coordinates
    say the layer, node and input node of each parameter.

    Raises:
        ValueError, MemoryError: as `jacobian`.
    """
    caller = "gauss_newton"
    if labelled:
        matrix = gauss_newton(module, loss, *(labels.unlabelled(each) for each in (x, y)), memory=memory)
        return labels.in_pairs("gauss_newton", matrix, module, "generalized Gauss-Newton matrix")
    with asked(caller, module, x, y) as one:
        view = _View(one, "parameters")
        if any(p.is_complex() for p in one.parameters.values()):
            raise ValueError(f"{caller}: {one.name} has complex parameters; a matrix of real ones is meant")
        one.refuse_unsteady(lambda: one.value(loss, view.alone, one.some(slice(0, 1))[1]))
        count = sum(p.numel() for p in one.parameters.values())
        refuse_beyond(caller, 2 * count**2 * one.dtype.itemsize, one.device, "take a smaller module")
        total = torch.zeros(count, count, dtype=one.dtype, device=one.device)
        for part in _chunks(one.count, memory // max(1, 4 * view.outputs * count * one.dtype.itemsize)):
            rows = view.rows(part)
            total += torch.einsum("sop,soq->pq", rows, _loss_hessians(one, loss, view, part).to(rows) @ rows)
        return total / one.count


def _loss_hessians(one: Asked, loss: Loss, view: _View, part: slice) -> Tensor:
    """∂²ℓ/∂f² of each sample, (sample, output, output); by vmap where it agrees with plain autograd."""
    inputs, targets = one.some(part)
    output = one.rows(one.call(inputs), view.alone, part.stop - part.start).detach()

    def plain(i: int) -> Tensor:
        target = one.some(slice(part.start + i, part.start + i + 1))[1]
        return _second(lambda o: one.value(loss, o[0], target)[None], output[i : i + 1], one)[0]

    try:
        found = _second(lambda o: one.losses_of(loss, o, targets), output, one)
        if comparable([found]) and all(
            agree_by_name({"": found[i]}, {"": plain(i)}) for i in {0, len(output) // 2, len(output) - 1}
        ):
            return found
    except (RuntimeError, ValueError, TypeError, IndexError):
        pass  # where torch.func fails, the loop either works or raises its own error
    log.warning("%s: the loss under vmap differs from plain autograd; one sample at a time instead", one.caller)
    return torch.stack([plain(i) for i in range(len(output))])


def _second(losses: Callable[[Tensor], Tensor], output: Tensor, one: Asked) -> Tensor:
    free = output.clone().requires_grad_(True)
    value = losses(free).sum()
    if not value.requires_grad:
        raise ValueError(f"{one.caller}: the loss does not depend on the module's output")
    (slope,) = torch.autograd.grad(value, free, create_graph=True)
    flat = slope.reshape(len(free), -1)
    columns = [one.gradients(flat[:, k].sum(), [free], again=True)[0].reshape(flat.shape) for k in range(flat.shape[1])]
    return torch.stack(columns, 2)


def _chunks(count: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


# --- one module, one thing to differentiate in ---------------------------------------------------------------


#: What one `_View` differentiates in; anything but the first two names a submodule.
_Of: TypeAlias = Literal["parameters", "inputs", "submodule"]


class _View:
    """Jacobians of a module's outputs in its parameters, its input, or the output of a submodule.

    Attributes:
        alone: Output of sample 0 alone.
        output_shape: Shape of one sample's output, without the sample axis; `outputs` is its size.
    """

    def __init__(self, one: Asked, wrt: str) -> None:
        self._one, self._wrt = one, wrt
        submodules = dict(one.module.named_modules())
        if wrt not in ("parameters", "inputs") and wrt not in submodules:
            raise ValueError(
                f"{one.caller}: wrt={wrt!r}; it is 'parameters', 'inputs' or a submodule: "
                f"{', '.join(filter(None, submodules))}"
            )
        self._of: _Of = "parameters" if wrt == "parameters" else "inputs" if wrt == "inputs" else "submodule"
        self._part = submodules.get(wrt)
        if wrt == "parameters" and not one.parameters:
            raise ValueError(f"{one.caller}: {one.name} has no parameter that requires a gradient")
        if wrt == "inputs" and not (isinstance(one.inputs, Tensor) and one.inputs.is_floating_point()):
            raise ValueError(f"{one.caller}: wrt='inputs' needs x as one tensor of real numbers")
        self.alone = one.examine()
        if not isinstance(self.alone, Tensor) or not self.alone.is_floating_point():
            kind = self.alone.dtype if isinstance(self.alone, Tensor) else type(self.alone).__name__
            raise ValueError(f"{one.caller}: {one.name} returns {kind}; one tensor of real numbers is needed")
        self._read_shapes()
        self.outputs = self.alone.numel()
        self._vmap = comparable([self.alone])
        self._right = {i: self._plain(i) for i in {0, one.count - 1}}

    def _read_shapes(self) -> None:
        """Find one sample's shapes: those of a batch of one without the axis that is longer in a batch of two."""
        one = self._one
        first = one.some(slice(0, 1))[0]
        with _Tap(self._part) as alone:
            one.call(first)
        with _Tap(self._part) as twice:
            pair = one.call(tree_map(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) else t, first))
        if self._part is not None:
            if len(alone.seen) != 1:
                raise ValueError(
                    f"{one.caller}: {self._wrt} is called {len(alone.seen)} times, so it has no one output; give each "
                    "call a submodule of its own"
                )
            if not isinstance(alone.seen[0], Tensor) or not alone.seen[0].is_floating_point():
                raise ValueError(f"{one.caller}: {self._wrt} returns no tensor of real numbers")
            one._rows(twice.seen[0], alone.seen[0], 2)
            self._at = alone.seen[0].detach()
            self._at_shape = _without(sample_axis(twice.seen[0], self._at, 2), self._at)
        self.output_shape = _without(sample_axis(pair, self.alone, 2), self.alone)

    def single(self) -> dict[str, Tensor]:
        """Shapes by name of what is differentiated in, for one sample."""
        match self._of:
            case "parameters":
                return {n: p.detach() for n, p in self._one.parameters.items()}
            case "inputs":
                return {"inputs": self._one.inputs[0]}
            case "submodule":
                return {self._wrt: self._at.reshape(self._at_shape)}
            case other:
                assert_never(other)

    def whole(self, size: int) -> dict[str, Tensor]:
        """Jacobians of all samples by name, found for `size` of them at a time and written to one place."""
        one, found = self._one, {}
        for name, t in self.single().items():
            found[name] = torch.empty(one.count, self.outputs, *t.shape, dtype=t.dtype, device=t.device)
        plain = (
            plain_network(one.module, one.inputs, list(one.parameters.values())) if self._of == "parameters" else None
        )
        for part in _chunks(one.count, size):
            own = {name: j[part] for name, j in found.items()}
            if plain is not None and self._vmap:
                fill_jacobians(plain[0], one.some(part)[0].detach(), plain[1], list(own.values()))
                if self._agrees(part, own):
                    continue
                log.warning("%s: %s: formulas differ from plain autograd; torch.func instead", one.caller, one.name)
                plain = None
            for name, jacobian in self.jacobians(part).items():
                own[name].copy_(jacobian)
        return found

    def rows(self, part: slice) -> Tensor:
        """Jacobians flattened to (sample, output, parameter), real."""
        found = self.jacobians(part)
        real = [torch.view_as_real(j.resolve_conj()) if j.is_complex() else j for j in found.values()]
        return torch.cat([j.reshape(*j.shape[:2], -1) for j in real], 2)

    def jacobians(self, part: slice) -> dict[str, Tensor]:
        """Jacobians by name, (sample, output, *shape) each."""
        if self._vmap:
            try:
                found = self._by_vmap(part)
                if self._agrees(part, found):
                    return found
                reason = "vmap(jacrev) differs from plain autograd"
            except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
                reason = f"vmap(jacrev) fails ({str(error).strip().splitlines()[0][:120]})"
            log.warning("%s: %s: %s; one backward pass per output instead", self._one.caller, self._one.name, reason)
            self._vmap = False
        rows = [self._right.get(i) or self._plain(i) for i in range(part.start, part.stop)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    # --- the definition --------------------------------------------------------------------------------------

    def _plain(self, sample: int) -> dict[str, Tensor]:
        output, wrt = self._traced(slice(sample, sample + 1))
        self._one.refuse_detached(output)
        output = output.flatten()
        last = len(output) - 1
        rows = [self._one.gradients(o, list(wrt.values()), again=i < last) for i, o in enumerate(output)]
        shapes = [t.shape for t in self.single().values()]
        return {name: torch.stack([row[k].reshape(shapes[k]) for row in rows]) for k, name in enumerate(wrt)}

    def _traced(self, part: slice | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The output of some samples, and the tensors to differentiate it in."""
        inputs = self._one.some(part)[0]
        match self._of:
            case "parameters":
                return self._one.call(inputs), dict(self._one.parameters)
            case "inputs":
                free = inputs.clone().requires_grad_(True)
                return self._one.call(free), {"inputs": free}
            case "submodule":
                with _Tap(self._part) as tap:
                    output = self._one.call(inputs)
                return output, {self._wrt: tap.seen[0]}
            case other:
                assert_never(other)

    # --- the shorter way -------------------------------------------------------------------------------------

    def _by_vmap(self, part: slice) -> dict[str, Tensor]:
        inputs = self._one.some(part)[0]
        dims = tree_map(lambda t: 0 if isinstance(t, Tensor) else None, inputs)

        def output(parameters: dict[str, Tensor], sample: Tree) -> Tensor:
            batch = tree_map(lambda t: t[None] if isinstance(t, Tensor) else t, sample)
            found: Tensor = self._one.call_with(parameters, batch)
            return found.reshape(-1)

        def moved(offset: Tensor, sample: Tree) -> Tensor:
            with _Tap(self._part, offset):
                return output({}, sample)

        match self._of:
            case "parameters":
                found: dict[str, Tensor] = vmap(jacrev(output), (None, dims))(self.single(), inputs)
                return found
            case "inputs":
                return {"inputs": vmap(jacrev(output, argnums=1), (None, dims))({}, inputs)}
            case "submodule":
                at = vmap(jacrev(moved), (None, dims))(torch.zeros_like(self._at), inputs)
                return {self._wrt: at.reshape(*at.shape[:2], *self._at_shape)}
            case other:
                assert_never(other)

    def _agrees(self, part: slice, found: dict[str, Tensor]) -> bool:
        """Whether Jacobians agree with plain autograd: some whole samples, and all under random weights."""
        for i in self._right.keys() & set(range(part.start, part.stop)):
            if not agree_by_name({n: j[i - part.start] for n, j in found.items()}, self._right[i]):
                return False
        draw = torch.Generator().manual_seed(part.start + 1)
        weights = torch.randn(part.stop - part.start, self.outputs, generator=draw, device="cpu").to(self.alone)
        combined = {n: torch.einsum("so,so...->s...", weights.to(j), j) for n, j in found.items()}
        right: dict[str, list[Tensor]] = {name: [] for name in found}
        for half in (slice(0, None, 2), slice(1, None, 2)):
            chosen = torch.arange(part.start, part.stop, device=self._one.device)[half]
            if not len(chosen):
                continue
            output, wrt = self._traced(chosen)
            rows = self._one.rows(output, self.alone, len(chosen))
            slopes = self._one.gradients((rows.reshape(weights[half].shape) * weights[half]).sum(), list(wrt.values()))
            for name, slope in zip(wrt, slopes, strict=True):
                if self._part is not None:
                    slope = self._one._rows(slope, self._at, len(chosen)).reshape(len(chosen), *self._at_shape)
                right[name].append(slope)
        match self._of:
            case "parameters":  # which all samples share
                total = {n: torch.stack(r).sum(0) for n, r in right.items()}
                return agree_by_name({n: c.sum(0) for n, c in combined.items()}, total)
            case "inputs" | "submodule":  # of which each sample has its own
                halves = {n: torch.cat([c[0::2], c[1::2]]) for n, c in combined.items()}
                return agree_by_name(halves, {n: torch.cat(r) for n, r in right.items()})
            case other:
                assert_never(other)


def _without(axis: int | None, alone: Tensor) -> tuple[int, ...]:
    shape = tuple(alone.shape)
    return shape if axis is None else shape[:axis] + shape[axis + 1 :]


class _Tap:
    """Hook that reads a submodule's output at each call, or adds an offset to it."""

    def __init__(self, part: nn.Module | None, offset: Tensor | None = None) -> None:
        self.seen: list[Any] = []
        self._part, self._offset = part, offset

    def __enter__(self) -> _Tap:
        self._handle = None if self._part is None else self._part.register_forward_hook(self._hook)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _hook(self, _: nn.Module, __: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            self.seen.append(output)
            return output
        if self._offset is not None:
            return output + self._offset
        free = (
            output if output.requires_grad or not output.is_floating_point() else output.detach().requires_grad_(True)
        )
        self.seen.append(free)
        return free.clone() if free.is_floating_point() else free  # what follows may work in place
