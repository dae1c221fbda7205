"""Tian et al. (2019), Figure 16: as `tian2019_batchnorm_bias`, of VGG11 with BatchNorm (``vgg11_bn.pth``).

Smoke and desk scale train the same small ConvNet on digits as there.
"""

from __future__ import annotations

from collections.abc import Mapping

from tsdyn.studies.tian2019_batchnorm_bias import EXPERIMENTS as VGG16
from tsdyn.studies.tian2019_batchnorm_bias import PANELS, StateDict, draw, measure

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "BatchNorm biases of each layer of VGG11, and the share of negative ones"
SOURCE = "Tian et al. 2019 (arXiv:1905.13405), Figure 16"

EXPERIMENTS: Mapping[str, Experiment | StateDict] = {**VGG16, "paper": StateDict("VGG11-BN", "vgg11_bn.pth")}
