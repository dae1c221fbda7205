"""Tian et al. (2019), Figures 6 and 16: histograms of the BatchNorm biases of each layer, and how many are negative.

The paper's networks are VGG16 and VGG11 with BatchNorm before the activation, pretrained on ImageNet: most biases are
negative, so that few nodes are active on any one sample.  ``--scale paper`` reads such a state dict from the current
folder (``vgg16_bn.pth``); `tian2019_batchnorm_bias_vgg11` reads VGG11; for any other network,

    tsdyn study run tian2019-batchnorm-bias --scale paper --set path=mine.pth --set name=mine

The scales smoke and desk train a small ConvNet on the labels of scikit-learn's digits instead, and say so.  At desk
scale 89 % of the biases of the lowest convolution and 96 % of the next are negative, from the first ten epochs on, and
none of the third's, on which the classes depend linearly; accuracy is 0.99.  Trained without momentum and weight decay,
56 %, 74 % and 0 % are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tomli_w
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from tsdyn.analysis import batch_norm, captions, layout
from tsdyn.analysis import style as look
from tsdyn.studies import deep_layers

from tsdyn.archive.netcdf import write_dataset
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.vocabulary import COORDINATES, VARIABLES

TITLE = "BatchNorm biases of each layer, and the share of negative ones"
SOURCE = "Tian et al. 2019 (arXiv:1905.13405), Figures 6 and 16"

#: Addresses of the paper's pretrained networks, by the name of the file that a study reads.
PRETRAINED: Mapping[str, str] = {
    "vgg16_bn.pth": "https://download.pytorch.org/models/vgg16_bn-6c64b313.pth",
    "vgg11_bn.pth": "https://download.pytorch.org/models/vgg11_bn-6002323d.pth",
}
COLUMNS = 4


@dataclass(frozen=True)
class StateDict:
    """The BatchNorm layers of a network in a file.

    Args:
        name: Name of the network, for the archive and the figure.
        path: File that ``torch.save(module.state_dict(), path)`` wrote, or a ``*.safetensors``; only tensors are read.
    """

    name: str
    path: str

    def to_toml(self) -> str:
        return tomli_w.dumps(asdict(self))

    def run(self, directory: Path) -> xr.Dataset:
        """Return what `read` gives, and leave it in `directory` as ``norms.nc``; raises as `read` does."""
        ds = self.read()
        directory.mkdir(parents=True, exist_ok=True)
        write_dataset(directory / "norms.nc", ds)
        return ds

    def read(self) -> xr.Dataset:
        """Dataset of the biases, read from the file at each call.

        Returns:
            ``norm_shift`` (layer, node), padded with NaN; ``module`` names the layer in the state dict, ``width`` says
            where it ends.

        Raises:
            ExperimentError: if the file is missing, cannot be read safely or holds no BatchNorm with a bias.
        """
        from tsdyn.networks.torch_io import load_state  # imports torch, which listing studies does not need

        path = Path(self.path)
        if not path.is_file():
            address = PRETRAINED.get(path.name)
            how = f"save a network's state dict there{f', the one of {address}' if address else ''}"
            raise ExperimentError(
                f"{path.absolute()}: no such file; {how}, or run --scale desk, which trains a small network on digits"
            )
        try:
            state = load_state(path)
        except ValueError as error:
            raise ExperimentError(str(error)) from None
        shifts = {name: state[f"{name}.bias"].double().numpy() for name in norms(state)}
        if not shifts:
            raise ExperimentError(
                f"{path}: none of its {len(state)} tensors is a bias beside a running_mean: no BatchNorm"
            )
        widths = [len(shift) for shift in shifts.values()]
        padded = np.full((len(shifts), max(widths)), np.nan)
        for row, shift in zip(padded, shifts.values(), strict=True):
            row[: len(shift)] = shift
        return xr.Dataset(
            {"norm_shift": (("layer", "node"), padded, VARIABLES["norm_shift"].attrs | {"source": SOURCE})},
            coords={
                "layer": range(1, len(shifts) + 1),
                "node": range(max(widths)),
                "width": ("layer", widths, COORDINATES["width"].attrs),
                "module": ("layer", list(shifts), {"long_name": "name in the state dict"}),
            },
            attrs={
                "name": self.name,
                "experiment": self.to_toml(),
                "data": path.name,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            },
        )


def norms(state: Mapping[str, object]) -> list[str]:
    """Names of the BatchNorm layers with a bias in a state dict, recognized by their ``running_mean``.

    In the order of the state dict, which is the network's, unless the file format sorted the names; then by the numbers
    in them.
    """
    found = [key.removesuffix(".running_mean") for key in state if key.endswith(".running_mean")]
    names = [name for name in found if f"{name}.bias" in state]
    return sorted(names, key=_numbered) if list(state) == sorted(state) else names


def _numbered(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


_DESK = Experiment(
    name="batchnorm-bias-digits-desk",
    seeds=4,
    dtype="float32",
    # students learn the data's labels: of their teacher nothing matters but its widths
    teacher={"widths": [64, 16, 24, 32, 10], "convolution": True, "init": "gaussian"},
    student={"overrealization": 2.0, "init": "torch", "batch_norm": "before"},
    data={"law": "digits", "train": 1200, "eval": 597},
    # momentum and weight decay are what VGG was trained with
    training={
        "loss": "cross_entropy",
        "labels": "data",
        "learning_rate": 0.05,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "batch": 32,
        "epochs": 60,
    },
    record={"every": 10, "observables": ["loss", "label_accuracy", "norm_shift"]},
)

EXPERIMENTS: Mapping[str, Experiment | StateDict] = {
    "smoke": _DESK.replace(
        {"name": "batchnorm-bias-digits-smoke", "seeds": 2, "student.overrealization": 0.5, "training.epochs": 2}
    ),
    "desk": _DESK,
    "paper": StateDict("VGG16-BN", "vgg16_bn.pth"),
}


def measure(found: xr.Dataset) -> xr.Dataset:
    """Dataset of ``negative_shift_share`` (layer), ``shift_count`` (layer, bin) and ``shift_edge`` (layer, edge).

    Of each BatchNorm layer at the last epoch, over the nodes of all seeds together.
    """
    last = found[["norm_shift"]].isel(epoch=-1) if "epoch" in found.dims else found[["norm_shift"]]
    last = last.load().dropna("layer", how="all")
    seeds = last.sizes.get("seed", 0)
    if seeds:
        nodes = last.stack(pooled=("seed", "node"), create_index=False).drop_vars(["seed", "node"])
        last = nodes.rename(pooled="node")
    measured = batch_norm.shift_histogram(last).assign(negative_shift_share=batch_norm.negative_shift_share(last))
    data = found.attrs.get("data") or deep_layers.data_of(found)
    return measured.assign_attrs(captions.told(found) | {"name": found.attrs["name"], "data": data, "seeds": seeds})


def _histogram(measured: xr.Dataset, ax: Axes) -> None:
    """Histogram of the BatchNorm biases of one layer, the lowest unless selected; negative ones in another colour."""
    one = measured.isel(layer=0) if "layer" in measured.dims else measured
    edge, count = one["shift_edge"].values, one["shift_count"].values
    colours = [look.NEGATIVE if low < 0 else look.POSITIVE for low in edge[:-1]]
    ax.bar(edge[:-1], count, width=np.diff(edge), align="edge", color=colours)
    ax.axvline(0, color="black", linewidth=look.points(0.6))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4, symmetric=True))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    ax.set(xlabel="BatchNorm bias", ylabel="number of nodes")


#: The panel by name.
PANELS: dict[str, layout.Panel] = {"histogram": _histogram}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure with one histogram per BatchNorm layer, the lowest first; negative bins in another colour, share above."""
    layers = measured["layer"].values.tolist()
    cells: list[layout.Cell | None] = []
    for layer in layers:
        one = measured.sel(layer=layer)
        title = f"layer {layer}: {float(one['negative_shift_share']):.0%} negative"
        cells.append(layout.Cell("histogram", {"layer": layer}, title))
    columns = min(len(layers), COLUMNS)
    cells += [None] * (-len(cells) % columns)
    told = measured.attrs
    whole = int(measured["shift_count"].sum())
    pooled = f"n = {told['seeds']} seeds, nodes pooled" if told["seeds"] else "n = 1 seed: one trained network"
    where = f" after epoch {int(measured['epoch'])}" if "epoch" in measured.coords else ""
    page = layout.arrange(
        measured.drop_attrs(deep=False), PANELS, [cells[i : i + columns] for i in range(0, len(cells), columns)],
        says="", spread="none", height=1.3, key=None,
    )  # fmt: skip
    handles = [
        Patch(color=look.NEGATIVE, label="negative"),
        Patch(color=look.POSITIVE, label="zero or positive"),
    ]
    layout.legend(page, handles=handles)
    small = f"a small ConvNet trained on {deep_layers.data_name(measured)}, in place of the paper's VGG,"
    network = small if told["seeds"] else str(told["name"])
    says = f"Biases of each BatchNorm layer of {network}{where}"
    shown = captions.caption(measured.assign_attrs(seeds=None), f"{says}. {whole} nodes; {pooled}", "none")
    page.say(shown.replace(" n = None seeds.", ""))
    page.provenance = captions.provenance(measured)
    return page
