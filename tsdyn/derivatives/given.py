"""Parameters, vectors and losses as users give them: tensors or arrays, single, in order or by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from tsdyn.arguments import FUNCTION, MODULE, NUMBERS, check
from tsdyn.derivatives.agreement import agree, comparable
from tsdyn.derivatives.module_state import Randomness
from tsdyn.networks.network import Network

Parameters: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def refuse_unreal(caller: str, leaves: Sequence[Tensor]) -> None:
    for t in leaves:
        if not t.is_floating_point() or t.is_meta:
            kind = "meta tensors" if t.is_meta else str(t.dtype)
            raise ValueError(f"{caller}: parameters are {kind}; a Hessian is that of real ones (view_as_real)")


def as_tensor(given: Any) -> Tensor:
    """A tensor as it is; an array on the CPU, whatever torch's default device; Python's numbers in float64."""
    return given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given), device="cpu")


def names_of(given: Mapping[str, Any]) -> Iterable[str]:
    """Names of the parameters that are differentiated in, in their order; none if they have no names."""
    if "module" in given:
        module = given["module"].to_torch() if isinstance(given["module"], Network) else given["module"]
        return [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    return given["params"].keys() if isinstance(given["params"], Mapping | nn.ParameterDict) else ()


def flat(vector: Any, names: Callable[[], Sequence[str]]) -> Tensor:
    """A vector over all parameters, from itself or from a piece per parameter; `names` says how these are called."""
    if isinstance(vector, Mapping | nn.ParameterDict):
        known = names()
        if set(vector.keys()) != set(known):
            raise ValueError(
                f"hessian_vector_product: the vector has pieces {sorted(vector.keys())}, the parameters are {known}"
            )
        vector = [vector[name] for name in known]
    if isinstance(vector, list | tuple) and not all(isinstance(piece, int | float) for piece in vector):
        pieces = []
        for at, piece in enumerate(vector):
            check("hessian_vector_product", f"piece {at} of vector", piece, NUMBERS)
            pieces.append(as_tensor(piece).reshape(-1))
        return torch.cat(pieces) if pieces else torch.zeros(0)
    check("hessian_vector_product", "vector", vector, NUMBERS)
    return as_tensor(vector)


def leaves_of(caller: str, params: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Copies of the parameters to differentiate in, and a function that puts such tensors in their structure."""
    single = isinstance(params, Tensor | np.ndarray)
    mapping = isinstance(params, Mapping | nn.ParameterDict)
    given = [params] if single else list(params.values()) if mapping else list(params)
    tensors = [as_tensor(t).detach() for t in given]
    if not tensors:
        raise ValueError(f"{caller}: there are no parameters")
    refuse_unreal(caller, tensors)
    leaves = [t.clone().requires_grad_(True) for t in tensors]

    def structured(of: Sequence[Tensor]) -> Any:
        pieces = [t.clone() for t in of]  # the loss may work in place
        if mapping:
            return dict(zip(params.keys(), pieces, strict=True))
        return pieces[0] if single else pieces

    return leaves, structured


def steady(caller: str, compute: Callable[[], Tensor]) -> Tensor:
    """Compute the loss twice and return it; raise ValueError if it draws random numbers or the values differ."""
    randomness = Randomness(nn.Module())
    try:
        first = compute()
        if randomness.moved():
            raise ValueError(
                f"{caller}: the loss draws random numbers, so it has no one Hessian; make it deterministic "
                "(module.eval())"
            )
        again = compute()
    finally:
        randomness.restore()
    if comparable([first]) and not agree(again, first):
        raise ValueError(
            f"{caller}: the loss gives two values for the same parameters, so it draws random numbers of its own or "
            "remembers earlier calls; make it deterministic"
        )
    return first


def bound_to_a_form(
    caller: str, args: tuple[Any, ...], keywords: dict[str, Any], more: dict[str, Any]
) -> dict[str, Any]:
    """Arguments by name, of the form of the call that they have: (module, loss, x, y, ...) or (loss, params, ...).

    Args:
        caller: For messages.
        args, keywords: What it was called with.
        more: Arguments after those of either form, by name, and their defaults; ``Parameter.empty`` if there is none.

    Raises:
        TypeError: if they have neither form, or a loss or module is none; both forms are said.
    """
    containers = Tensor | np.ndarray | Mapping | nn.ParameterList | nn.ParameterDict
    loss = keywords.get("loss", args[1] if len(args) > 1 else None)
    of_module = "module" in keywords or (
        bool(args) and isinstance(args[0], nn.Module | Network) and callable(loss) and not isinstance(loss, containers)
    )
    try:
        bound = _form(of_module, **more).bind(*args, **keywords)
    except TypeError as error:
        forms = f"{caller}(loss, params, ...) or {caller}(module, loss, x, y, ...)"
        raise TypeError(f"{caller}: {error}; call it {forms}") from None
    bound.apply_defaults()
    check(caller, "loss", bound.arguments["loss"], FUNCTION)
    if of_module:
        check(caller, "module", bound.arguments["module"], MODULE)
    return dict(bound.arguments)


@functools.cache
def _form(of_module: bool, **more: Any) -> inspect.Signature:
    """Signature of one form of a call, with these arguments and their defaults at its end."""
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    first = {"module": empty, "loss": empty, "x": empty, "y": None} if of_module else {"loss": empty, "params": empty}
    if of_module and empty in more.values():
        first["y"] = empty
    return inspect.Signature([inspect.Parameter(n, kind, default=d) for n, d in {**first, **more}.items()])
