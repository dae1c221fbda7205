"""What has no derivatives by its kind, and torch's errors about derivatives in plain words."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def refuse_by_kind(caller: str, module: nn.Module, *, per_sample: bool = True) -> None:
    """Raise ValueError for layers known to be random, to change their state or to mix samples, before any call."""
    for name, part in module.named_modules():
        who = name or type(part).__name__
        if isinstance(part, torch.jit.ScriptModule):
            raise ValueError(
                f"{caller}: {who} is a torch.jit.ScriptModule, whose calls cannot be followed; give the module that it "
                "was made from"
            )
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training and per_sample:
            raise ValueError(
                f"{caller}: {who} is BatchNorm in training mode, which mixes samples: no "
                "per-sample derivative exists; call module.eval() to use its running statistics, or use GroupNorm"
            )
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None and per_sample:
            raise ValueError(
                f"{caller}: {who} is BatchNorm without running statistics, which mixes samples in eval() too, as "
                "BatchNorm in training mode does: no per-sample derivative exists; use GroupNorm"
            )
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.training and part.running_mean is not None:
            raise ValueError(
                f"{caller}: {who} is {type(part).__name__} in training mode, which moves its running statistics when "
                "it is called; call module.eval()"
            )
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0:
            raise ValueError(f"{caller}: {who} is Dropout in training mode, which is random; call module.eval()")
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"{caller}: {name} has no shape yet; call the module once on its input")
        refuse_odd(caller, name, tensor)


def refuse_odd(caller: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError for a tensor that holds no numbers, is not dense, or that autograd cannot follow."""
    if tensor.is_meta:
        raise ValueError(f"{caller}: {name} is a meta tensor, which holds no numbers; give it some (to_empty, load)")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        raise ValueError(f"{caller}: {name} is {tensor.layout} of {tensor.dtype}; dense tensors are needed (to_dense)")
    if isinstance(tensor, nn.Parameter) and tensor.is_inference():
        raise ValueError(f"{caller}: {name} was made in inference mode, where autograd cannot follow; make it outside")


def strided(gradient: Tensor) -> Tensor:
    """A gradient with all its zeros: that of an ``Embedding(sparse=True)`` comes without, that of a sign as none."""
    if gradient.layout is not torch.strided:
        return gradient.to_dense()
    return gradient.clone() if gradient._is_zerotensor() else gradient


def explained(caller: str, name: str, error: RuntimeError) -> Exception:
    """Torch's error as a ValueError that names the caller and the way out, if it is a known one."""
    reason = str(error)
    if "modified by an inplace operation" in reason:
        return ValueError(
            f"{caller}: {name} overwrites the input of a layer in place, which its gradient needs; "
            "write the operation out of place (inplace=False)"
        )
    if "use_reentrant" in reason:
        return ValueError(
            f"{caller}: {name} has a reentrant checkpoint, through which torch differentiates by backward() alone; use "
            "checkpoint(..., use_reentrant=False)"
        )
    if "not implemented" in reason:
        return ValueError(f"{caller}: {name} holds an operation that torch cannot differentiate here ({reason})")
    return error
