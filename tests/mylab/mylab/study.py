"""A figure of the package's own: entropy of weights while students train."""

from matplotlib.figure import Figure

import tsdyn

TITLE = "Entropy of squared weights along training"
SOURCE = "mylab"

_SMOKE = tsdyn.Experiment(
    name="lab-entropy", seeds=2,
    teacher={"widths": [6, 4, 2], "init": "sparse"}, student={"overrealization": 2.0, "scale": 0.1},
    data={"train": 60, "eval": 40}, training={"epochs": 3, "batch": 10},
    record={"observables": ["loss", "weight_entropy"]},
)  # fmt: skip
EXPERIMENTS = {
    "smoke": _SMOKE,
    "desk": _SMOKE.replace({"seeds": 8, "training.epochs": 50}),
    "paper": _SMOKE.replace({"seeds": 32, "training.epochs": 500}),
}


def measure(archive):
    mean = archive[["weight_entropy"]].mean(["seed", "node"], keep_attrs=True)
    return mean.assign_attrs(archive.attrs)


def draw(measured):
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    for layer in measured["layer"].values:
        axes.plot(measured["epoch"], measured["weight_entropy"].sel(layer=layer), label=f"layer {layer}")
    axes.set(xlabel="epoch", ylabel="entropy")
    axes.legend()
    return figure
