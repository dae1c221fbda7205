"""jaxtyping aliases for the shapes of the theory; axes have the names of the archive's dimensions."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

Inputs: TypeAlias = Float[Tensor, "sample input"]
Outputs: TypeAlias = Float[Tensor, "sample output"]
Activations: TypeAlias = Float[Tensor, "sample node"]
TeacherActivations: TypeAlias = Float[Tensor, "sample teacher_node"]

MemberInputs: TypeAlias = Float[Tensor, "member sample input"]
MemberOutputs: TypeAlias = Float[Tensor, "member sample output"]
Batches: TypeAlias = Int[Tensor, "member step batch"]
Alive: TypeAlias = Bool[np.ndarray, " member"]

Matrix: TypeAlias = Float[np.ndarray, "rows columns"]
TeacherByStudent: TypeAlias = Float[Tensor, "teacher_node node"]
