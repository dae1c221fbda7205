"""jaxtyping aliases for the shapes of the theory; axes have the names of the archive's dimensions."""

from __future__ import annotations

from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

Inputs: TypeAlias = Float[Tensor, "sample input"]
Outputs: TypeAlias = Float[Tensor, "sample output"]
Activations: TypeAlias = Float[Tensor, "sample node"]
TeacherActivations: TypeAlias = Float[Tensor, "sample teacher_node"]
TeacherByStudent: TypeAlias = Float[Tensor, "teacher_node node"]
