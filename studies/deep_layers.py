"""Parts shared by the figures of deep networks: ρ̄ or r̄ of each hidden layer and the loss over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from tsdyn.analysis import captions, layout, panels, specialization
from tsdyn.analysis import style as look

from tsdyn.archive.selecting import experiment_of, swept_dimensions

#: Variables shown beside the layers, as far as they were recorded.
SCALARS = ("mse_eval", "loss_eval", "accuracy", "label_accuracy")

#: ``data.law`` → name of the data in figures.
DATA = {"gaussian": "Gaussian inputs", "digits": "scikit-learn's digits", "cifar10": "CIFAR-10"}


#: The teacher of Tian et al. (2019), section 5, and its data: entries from ±½, ±¼, 0, biases U[−½, ½], inputs N(0, 10²)
#: in 20 dimensions, outputs not standardised, 1,024 evaluation samples.
LUCK: dict[str, Any] = {
    "teacher": {"widths": [20, 10, 15, 20, 25, 100], "init": "luck-matters"},
    "data.std": 10.0,
    "data.eval": 1024,
}
#: Rates without and with BatchNorm for outputs as large as this teacher's, from a coarse scan (powers of ten, one seed,
#: 4 epochs).  The ConvNet's are of a scan of their own, 2 seeds and 8 epochs (docs/reproduction.md): without BatchNorm
#: 1e-7 kills a student's nodes and it hardly learns below, with it 1e-4 diverges and the loss is least at 3e-5.
RATES: dict[str, tuple[float, float]] = {"small": (1e-4, 1e-3), "large": (1e-6, 1e-4), "ConvNet": (3e-8, 3e-5)}


def networks(connected: list[int], channels: int) -> list[dict[str, Any]]:
    """The two kinds of teacher of Luck Matters, fully connected and ConvNet, as keys of listed points.

    Args:
        connected: Hidden widths of the fully connected one, which takes 20 inputs.
        channels: Number of channels of each of the ConvNet's four convolutions, on images of 16 x 16.

    Source: Tian et al. (2019), section 5.
    """
    return [
        {"teacher.convolution": False, "teacher.widths": [20, *connected, 100], "data.image": [1, 4, 5]},
        {"teacher.convolution": True, "teacher.widths": [256, *[channels] * 4, 100], "data.image": [1, 16, 16]},
    ]


def with_and_without_norm(connected: list[int], channels: int, steps: tuple[int, int], size: str) -> dict[str, Any]:
    """Both kinds of network, with and without BatchNorm, each at a rate that it stands; `steps` in an epoch of each."""
    kinds = zip(networks(connected, channels), (size, "ConvNet"), steps, strict=True)
    return {
        "points": [
            kind | {"student.batch_norm": place, "training.learning_rate": rate, "training.steps_per_epoch": count}
            for kind, name, count in kinds
            for place, rate in zip(("none", "after"), RATES[name], strict=True)
        ]
    }


def by_network(measured: xr.Dataset, *keys: str) -> xr.Dataset:
    """`measured` with its ``point`` labelled by the kind of network, as listed by `networks`, and words for `keys`."""
    kinds = np.where(measured["convolution"] == "true", "ConvNet", "fully connected").tolist()
    for key in keys:
        kinds = [
            f"{kind}, {captions.words(key, v)}" for kind, v in zip(kinds, measured[key].values.tolist(), strict=True)
        ]
    return measured.drop_vars([str(name) for name in measured["point"].coords]).assign_coords(point=kinds)


@captions.telling
def measure(archive: xr.Dataset) -> xr.Dataset:
    """``mean_specialization``, ``mean_rank`` and ``median_rank`` (swept..., seed, epoch, layer) of the hidden layers,
    and loss, mse and top-1 accuracies where they were recorded; loaded.  The attribute ``data`` names the inputs' law.
    """
    hidden = archive.isel(layer=slice(None, -1))
    scalars = {name: archive[name] for name in SCALARS if name in archive}
    found = {name: _top_1(array) if "top_k" in array.dims else array for name, array in scalars.items()}
    return xr.Dataset(
        {
            "mean_specialization": specialization.mean_specialization(hidden),
            "mean_rank": specialization.mean_rank(hidden),
            "median_rank": specialization.median_rank(hidden),
            **found,
        },
        attrs={"data": data_of(archive)},
    ).load()


def data_of(archive: xr.Dataset) -> str:
    """``data.law`` of an archive's experiment."""
    return experiment_of(archive).data.law


def data_name(measured: xr.Dataset) -> str:
    """Name of the measured data in figures; a file keeps its own name."""
    law = str(measured.attrs["data"])
    return DATA.get(law, law)


def _top_1(accuracy: xr.DataArray) -> xr.DataArray:
    meaning = accuracy.attrs["long_name"].replace("among the k largest outputs", "as largest output")
    return accuracy.sel(top_k=1, drop=True).assign_attrs(long_name=meaning)


def first(values: xr.DataArray, *kept: str) -> xr.DataArray:
    """`values` at the first label of every dimension but ``seed`` and those `kept`."""
    return values.isel({dim: 0 for dim in values.dims if dim not in ("seed", *kept)})


def panel(name: str, *, along: str = "epoch") -> layout.Panel:
    """Panel of a measured variable against `along`: layers dark to light in styles of their own, other variables black.

    Of a sweep it draws the first point; select another with ``measured.sel``.
    """

    def drawn(measured: xr.Dataset, ax: Axes) -> None:
        values = first(measured[name], along, "layer")
        layers = values["layer"].values.tolist() if "layer" in values.dims else []
        for position, layer in enumerate(layers):
            panels.spread(
                values.sel(layer=layer), ax=ax, along=along, color=look.shade(position, len(layers)),
                label=f"layer {layer}", linestyle=panels.STYLES[position % len(panels.STYLES)],
                marker=None if along == "epoch" else panels.mark(position),
            )  # fmt: skip
        if "layer" not in values.dims:
            panels.spread(values, ax=ax, along=along, color=look.PALETTE[2], marker=None if along == "epoch" else "o")
        scale(values, ax)
        if along == "train":
            layout.decades(ax, "x")
            ax.set_xlabel("training samples N")

    drawn.__doc__ = f"Panel of ``{name}`` against {along}."
    return drawn


def scale(values: xr.DataArray, ax: Axes) -> None:
    """Scale and label the vertical axis: [0, 1] for ρ̄ and accuracies, from 0 for ranks, else logarithmic."""
    name = str(values.name)
    if name == "mean_specialization" or name.endswith("accuracy"):
        ax.set_ylim(-0.02, 1.02)
    elif name.endswith("rank"):
        ax.update_datalim([(float(ax.dataLim.x0), 0.0)], updatex=False)
        ax.autoscale_view(scalex=False)
    elif bool(np.fmin.reduce(values.values, axis=None) > 0):
        layout.decades(ax)
    ax.set_ylabel(NAMES.get(name, panels.axis_label(values)))


#: What the vertical axes say.
NAMES = {
    "mean_specialization": "mean best correlation ρ̄",
    "mean_rank": "mean rank r̄ of winners (0: first)",
    "median_rank": "median rank of winners (0: first)",
    "mse_eval": "evaluation mse per output",
    "mse_train": "training mse per output",
    "loss_eval": "evaluation loss",
    "label_accuracy": "accuracy on labels",
    "accuracy": "share of samples with the teacher's class",
}


def draw(
    measured: xr.Dataset,
    drawing: Mapping[str, layout.Panel],
    *,
    says: str,
    show: Sequence[str] = ("mean_specialization", "mse_eval"),
    across: Sequence[str] | None = None,
    height: float = 1.3,
    paper: Mapping[str, Any] | None = None,
) -> look.Page:
    """Page with a column per point of `across` and, for each point of the other swept keys, a row per variable.

    Args:
        measured: From `measure`.
        drawing: Panels by the name of their variable, from `panel`.
        says: What the figure shows.
        show: Variables in the order of their rows.
        across: Swept dimensions along columns; all if None.
        height: Of a row, in inches on paper.
        paper: Experiments by scale.
    """
    ends = [name for name in SCALARS if name in measured and name in show]
    if ends:
        last = measured[ends[0]].isel(epoch=-1) if "epoch" in measured[ends[0]].dims else measured[ends[0]]
        dead = int(last.isnull().sum())
        says += f"; {dead} of {last.size} students diverged, whose curves end there" if dead else ""
    says += f"; {captions.RANKS}" if any(name.endswith("_rank") for name in show) else ""
    swept = [str(dim) for dim in swept_dimensions(measured["mean_specialization"])]
    across = list(swept if across is None else [dim for dim in across if dim in swept])
    columns = layout.points(measured, across)
    rows: list[list[layout.Cell | None]] = []
    for block, down in enumerate(layout.points(measured, [dim for dim in swept if dim not in across])):
        for position, name in enumerate(show):  # columns are named once, at the top of the page
            named = [down if block else {**down, **at} for at in columns]
            titles = [layout.name_of(measured, of) if not position else "" for of in named]
            rows.append([layout.Cell(name, {**down, **at}, t) for at, t in zip(columns, titles, strict=True)])
    page = layout.arrange(
        measured, drawing, rows, says=says, spread="curves", height=height, share_x=True, share_y="row", paper=paper,
        columns=2,
    )  # fmt: skip
    for position in range(len(show)):  # a variable has one scale on the whole page, not one in each block
        kin = page.axes[position * len(columns) :: len(show) * len(columns)]
        low, high = (np.array([ax.get_ylim() for ax in kin]).T[i] for i in (0, 1))
        for ax in kin:
            ax.set_ylim(low.min(), high.max())
    return page
