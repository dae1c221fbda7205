"""Share of seeds by what they recover, over the swept keys."""

from __future__ import annotations

import xarray as xr
from matplotlib.axes import Axes
from tsdyn.analysis import captions, layout, panels, phase
from tsdyn.analysis import style as look
from tsdyn.analysis.figures.reading import in_lowest_layer, variables_of

from tsdyn.experiment.sweep_axes import POINT


def measure_phase(archive: xr.Dataset) -> xr.Dataset:
    """``fraction`` of seeds in which none, some or all teacher nodes are recovered; (swept..., class).

    At the last epoch; for a single point at every epoch.
    """
    if "fraction" in archive:
        return archive
    needed = in_lowest_layer(variables_of(archive, "phase"))
    needed = needed.isel(epoch=-1) if layout.swept(needed) else needed
    fraction = phase.fractions(phase.recovery_class(needed))
    return xr.Dataset({"fraction": fraction}, attrs=captions.told(archive)).load()


def phase_diagram(ds: xr.Dataset, *, of: str | None = None, ax: Axes | None = None) -> Axes:
    """Shares of seeds by class: stacked against one swept key (or epoch), or of one class over two swept keys.

    Args:
        ds: An archive, or ``fraction`` (..., class) of any measure with classes (`tsdyn.analysis.phase.fractions`).
        of: The class shown over two keys; the last if None.
        ax: Axes.

    Raises:
        ValueError: if neither one nor two keys are left, or there is no such class.
    """
    shares = measure_phase(ds)["fraction"]
    along = [str(dim) for dim in shares.dims if dim != "class"]
    if len(along) == 1:
        ax = panels.stack(shares, ax=ax)
        ax.set_xlabel(captions.key_words(along[0]))
        if along[0] == POINT:
            keys = layout.listed(shares)
            labels = zip(*([layout.short(v) for v in shares[key].values.tolist()] for key in keys), strict=True)
            panels.name_ticks(ax, "x", [", ".join(at) for at in labels])
            ax.set_xlabel(", ".join(map(captions.key_words, keys)))
        return ax
    if len(along) != 2:
        raise ValueError(f"phase_diagram: over {', '.join(map(str, along)) or 'nothing'}; select one or two swept keys")
    names = [str(name) for name in shares["class"].values]
    if of is not None and of not in names:
        raise ValueError(f"phase_diagram: no class {of!r}; there are {', '.join(names)}")
    own = shares.sel({"class": of or names[-1]}).transpose(along[1], along[0])
    ax = panels.table(own, ax=ax, limits=(0, 1), cmap="cividis", bar=False)
    panels.numbers(own, ax)
    for axis, dim in zip("xy", along, strict=True):
        listed = dim == POINT
        shown = [layout.name_of(own, at) if listed else layout.short(at[dim]) for at in layout.points(own, [dim])]
        panels.name_ticks(ax, axis, shown)
        ax.set(**{f"{axis}label": "" if listed else captions.key_words(dim)})
    ax.invert_yaxis()
    return ax


@look.styled
def draw_phase(ds: xr.Dataset) -> look.Page:
    """`phase_diagram` over the first two swept keys, one panel per class, one row per point of the other keys."""
    measured = measure_phase(ds)
    swept = layout.swept(measured)
    says = str(measured["fraction"].attrs["long_name"])
    if "epoch" in measured.coords and measured["epoch"].ndim == 0:
        says += f" after epoch {int(measured['epoch'])}"
    if len(swept) < 2:
        figure = layout.grid(
            measured, lambda at, ax: phase_diagram(measured, ax=ax), across=(), spread="none",
            title=layout.headed(says, measured),
        )  # fmt: skip
        layout.legend(figure)
        return figure
    figure = layout.grid(
        measured,
        lambda at, ax: phase_diagram(
            measured.sel({d: v for d, v in at.items() if d != "class"}), of=at["class"], ax=ax
        ),
        across=("class",),
        down=swept[2:],
        title=layout.headed(says, measured),
        spread="none",
        share=False,
    )
    figure.body.colorbar(figure.axes[0].images[0], ax=figure.axes, label="share of seeds", aspect=30)
    return figure
