"""Parts shared by the figures of deep networks: ρ̄ or r̄ per hidden layer and the loss over epochs, a line per width."""

from __future__ import annotations

import itertools
from textwrap import fill
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tsdyn.analysis import specialization
from tsdyn.analysis.figures import PANEL
from tsdyn.analysis.layout import short
from tsdyn.analysis.panels import colour, shade

from tsdyn.archive.selecting import experiment_of, swept_dimensions

#: Variables shown beside the layers, as far as they were recorded.
SCALARS = ("mse_eval", "loss_eval", "accuracy", "label_accuracy")

#: ``data.law`` → name of the data in figures.
DATA = {"gaussian": "Gaussian inputs", "digits": "scikit-learn's digits", "cifar10": "CIFAR-10"}


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


def by_network(measured: xr.Dataset) -> xr.Dataset:
    """`measured` with its ``point`` labelled by the kind of network, as listed by `networks`."""
    kinds = np.where(measured["convolution"] == "true", "ConvNet", "fully connected")
    return measured.drop_vars([str(name) for name in measured["point"].coords]).assign_coords(point=kinds)


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


def band(values: xr.DataArray, *, ax: Axes, color: Any, label: str, along: str = "epoch") -> None:
    """Draw the mean over seeds against `along`, with a band from the least to the largest seed; (seed, `along`)."""
    x = values[along]
    ax.fill_between(x, values.min("seed"), values.max("seed"), color=color, alpha=0.15, linewidth=0)
    ax.plot(
        x, values.mean("seed"), color=color, label=label, linewidth=1.4, marker="o" if along != "epoch" else None, ms=3
    )


def draw_lines(values: xr.DataArray, lines: str | None, ax: Axes, *, along: str = "epoch") -> None:
    """Draw one `band` per value of the dimension `lines`: layers dark to light, others in the palette's colours."""
    there: list[Any] = [None] if lines is None else list(values[lines].values)
    for position, value in enumerate(there):
        one = values if lines is None else values.sel({lines: value})
        if bool(np.isnan(one).all()):
            continue
        color = shade(position, len(there)) if lines == "layer" else colour(position)
        shown = f"layer {value}" if lines == "layer" else short(value)
        band(one, ax=ax, color=color, label=shown, along=along)


def draw(
    measured: xr.Dataset,
    *,
    title: str,
    show: tuple[str, ...] = ("mean_specialization", "mse_eval"),
    lines: str | None = None,
) -> Figure:
    """Figure with a row per point and layered variable: a panel per layer, then per scalar; a colour per `lines` value.

    Args:
        measured: From `measure`.
        title: Title of the figure.
        show: Variables in the order of their panels; those without ``layer`` come at the end of each first row.
        lines: Swept dimension shown by colour; the first that varies unless given.
    """
    swept = swept_dimensions(measured["mean_specialization"])
    lines = lines or next(iter(swept), None)
    layered = [name for name in show if "layer" in measured[name].dims]
    scalars = [name for name in show if name not in layered]
    others = [dim for dim in swept if dim != lines]
    points = [dict(zip(others, v, strict=True)) for v in itertools.product(*(measured[d].values for d in others))]
    rows, layers = list(itertools.product(points, layered)), measured["layer"].values
    columns = len(layers) + len(scalars)
    figure = Figure(figsize=(PANEL[0] * 0.85 * columns + 1.2, PANEL[1] * len(rows) + 0.5), layout="constrained")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    tops = {name: _top(measured[name]) for name in layered}
    for (point, name), row in zip(rows, panels, strict=True):
        for layer, ax in zip(layers, row, strict=False):
            draw_lines(measured[name].sel({**point, "layer": layer}), lines, ax)
            ax.set(ylim=(-0.02 * tops[name], 1.02 * tops[name]), title=f"layer {layer}")
        if name == layered[0]:
            for scalar, ax in zip(scalars, row[len(layers) :], strict=True):
                draw_lines(measured[scalar].sel(point), lines, ax)
                ax.set_title(fill(str(measured[scalar].attrs.get("long_name", scalar)), 28))
                if not scalar.endswith("accuracy"):
                    ax.set_yscale("log")
        else:
            for ax in row[len(layers) :]:
                ax.set_axis_off()
        where = ", ".join(str(v) for v in point.values())
        row[0].set_ylabel(
            "\n".join(filter(None, (where, str(measured[name].attrs.get("long_name", name))))), fontsize=8
        )
    for ax in panels.flat:
        ax.title.set_fontsize(8)
        ax.tick_params(which="both", labelsize=7)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    figure.supxlabel("epoch", fontsize=9)
    figure.suptitle(f"{title}; mean over {measured.sizes['seed']} seeds, band least to largest", fontsize=10)
    if lines is not None:
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", title=lines, fontsize=8, title_fontsize=8)
    return figure


def _top(values: xr.DataArray) -> float:
    """Upper limit of a panel: ranks of winners fall early, and on the scale [0, 1] they would be flat lines."""
    largest = float(np.fmax.reduce(values.values, axis=None, initial=0.0))
    return largest if "rank" in str(values.name) and largest > 0 else 1.0
