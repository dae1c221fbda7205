"""Old names of tsdyn 0.1: they work until 0.3, with a DeprecationWarning that says the new name.

0.1 had one flat module per topic (`tsdyn.interaction`); docs/migration.md is printed from the tables below.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: Old module below tsdyn -> new module -> the names it took over.
MOVED: Mapping[str, Mapping[str, str]] = {
    "activations": {
        "tsdyn.networks.activations": "Activation AtZero Erf NAMES activation from_module",
    },
    "alignment": {
        "tsdyn.problem.augmentation": "augment_agnostic augment_aware training_set",
        "tsdyn.theory.alignments": (
            "ClusterFanout alignment band_density boundary cluster_fanouts clusters eta jumps mu observers "
            "regular separation"
        ),
    },
    "archive": {
        "tsdyn": "layer open select",
        "tsdyn.archive.netcdf": "bytes_per_epoch write_dataset",
        "tsdyn.archive.run_directory": "ARCHIVE SEGMENTS claim segments",
        "tsdyn.archive.selecting": "experiment_of swept_dimensions",
        "tsdyn.archive.sweep_directory": "SWEEP label sweep_points write_sweep",
        "tsdyn.archive.whole_files": "ArchiveError DirectoryError local_path write_text",
    },
    "classification": {
        "tsdyn.population": "Classification classify phase_boundaries",
        "tsdyn.population.critical_point_kinds": "EVEN Kind OWNS",
    },
    "costs": {
        "tsdyn.running.estimates": "COMMIT_BYTES Cost Footprint duration estimate footprint",
    },
    "critical_points": {
        "tsdyn.population": (
            "OneNeuron ReducedLoss copy_average one_neuron partitions perturbed_copy perturbed_copy_average"
        ),
        "tsdyn.population.critical_points": "ODD unit_orthonormal",
    },
    "data": {
        "tsdyn.problem.inputs": (
            "STREAMS batch_indices draw_inputs evaluation_inputs fresh_batches generator labels new_at_every_step "
            "training_inputs"
        ),
    },
    "deepnets": {
        "tsdyn.networks.batch_norm": "BatchNorm normalized",
        "tsdyn.networks.propagate": "Frame Image Place propagate",
        "tsdyn.networks.torch_io": "load_state",
        "tsdyn.theory": "batch_norm_gradient conserved_norms expectations fanout_norms",
    },
    "dynamics": {
        "tsdyn.theory.luck_matters": (
            "ProjectedRate activation_overlap angles gate_overlap projected_dynamics projected_rate two_layer_dynamics"
        ),
    },
    "experiment": {
        "tsdyn": "Experiment ExperimentError",
        "tsdyn.experiment.experiment": "differences digest",
        "tsdyn.experiment.parts": (
            "ActivationName BatchNormPlace Count Counts Data Epochs IMAGES MAX_COUNT MAX_EPOCHS MAX_SEEDS "
            "NonNegative Positive Rate Real Reals Record Student Teacher Training Widths"
        ),
        "tsdyn.experiment.rules": "MAX_POINTS",
    },
    "flow_runner": {
        "tsdyn.population": "starts",
    },
    "gradient_flow": {
        "tsdyn.flow": "REASONS gradient_flow",
    },
    "grid": {
        "tsdyn.archive.lazy_arrays": "GATHERED_BYTES LAZY_BYTES Stored",
        "tsdyn.archive.sweep_directory": "SWEEP label point_name sweep_points write_sweep",
    },
    "images": {
        "tsdyn.problem.images": (
            "DEFLATES DataError Samples check_width digits load read_arrays read_cifar10 read_cifar10_batch "
            "read_idx read_mnist split"
        ),
    },
    "index": {
        "tsdyn.archive.headers": "Header INDEX OWN Source",
    },
    "integrity": {
        "tsdyn.archive.integrity": "DAMAGED check repair",
        "tsdyn.archive.netcdf": "BLOCK_BYTES",
    },
    "interaction": {
        "tsdyn.gaussian.closed_forms": "Number arc_cosine",
        "tsdyn.gaussian.interaction": "Elementwise Function",
        "tsdyn.population": "Derivatives Interaction Partials",
    },
    "kernel": {
        "tsdyn.engine.native": "array load padded pointers",
    },
    "members": {
        "tsdyn.running.members": "FRESH_BYTES Members",
    },
    "networks": {
        "tsdyn": "Network",
        "tsdyn.networks.network": "Trace",
        "tsdyn.networks.propagate": "Image",
    },
    "observables": {
        "tsdyn.observables.formulas": ("accuracy cross_entropy loss mse observation observation_count standardized"),
        "tsdyn.observables.member": "Measurement Probe Response",
        "tsdyn.observables.registry": "Layers OBSERVABLES Observable Record fills measure",
    },
    "population_loss": {
        "tsdyn.population": "PopulationLoss loss loss_from_overlaps",
        "tsdyn.population.two_layer_loss": "Parameters",
    },
    "runner": {
        "tsdyn.running.conventions": "attributes",
        "tsdyn.running.runner": "COMMIT_SECONDS COMMIT_SHARE DeviceError Progress check_device run run_together",
    },
    "students": {
        "tsdyn.population": "warm_start",
        "tsdyn.problem.students": "draw_student winners",
    },
    "sweep": {
        "tsdyn": "run",
        "tsdyn.running.outcome": "SweepError",
        "tsdyn.running.sweep": "PointProgress estimate preflight",
        "tsdyn.running.workers": "CONNECT_SECONDS FRUITLESS POLL_SECONDS WorkersError",
    },
    "teachers": {
        "tsdyn.problem.teachers": (
            "balance draw_teacher fanouts from_file network_of orthonormal prune separated_rows uniform_start"
        ),
    },
    "training": {
        "tsdyn.engine.batched": "block_size",
        "tsdyn.engine.batches": "Batches Stream finite_stream",
        "tsdyn.engine.ensemble": "Ensemble living_blocks",
        "tsdyn.engine.graph": "CHUNK Chunk",
        "tsdyn.engine.rule": "Rule",
        "tsdyn.engine.train": "train_epoch",
    },
}
#: Old name -> new name, of what moved and was renamed.
RENAMED: Mapping[str, str] = {
    "archive.EXPERIMENT": "tsdyn.archive.run_directory.EXPERIMENT",
    "archive.Run": "tsdyn.archive.run_directory.RunDirectory",
    "deepnets.DeepNetwork": "tsdyn.Network",
    "deepnets.Layer": "tsdyn.networks.propagate.Layer",
    "deepnets.Parameters": "tsdyn.networks.propagate.Parameters",
    "flow_runner.run": "tsdyn.run",
    "grid.RUNS_A_CHUNK": "tsdyn.archive.lazy_arrays.RUNS_PER_CHUNK",
    "grid.open_sweeps": "tsdyn.open",
    "index.Index": "tsdyn.archive.headers.Headers",
    "interaction.derivatives": "tsdyn.population.interaction_derivatives",
    "interaction.in_cosine": "tsdyn.population.interaction",
    "interaction.of": "tsdyn.gaussian.interaction.interaction_of",
    "members.Together": "tsdyn.running.joint_training.JointTraining",
    "members.kinship": "tsdyn.running.joint_training.ensemble_key",
    "sweep.companies": "tsdyn.running.joint_training.group_points",
    "sweep.due": "tsdyn.running.sweep.unfinished",
    "sweep.fitting": "tsdyn.running.workers.workers_that_fit",
    "training.bury": "tsdyn.engine.ensemble.mark_dead",
}


def place(old: str, name: str) -> str | None:
    """The present dotted name of what was `tsdyn.<old>.<name>`; None if it did not move or was removed."""
    if f"{old}.{name}" in RENAMED:
        return RENAMED[f"{old}.{name}"]
    return next((f"{new}.{name}" for new, names in MOVED.get(old, {}).items() if name in names.split()), None)


def forwarded(old: str, name: str) -> object:
    """The object that was `tsdyn.<old>.<name>`; warns, with the caller two frames above as the warning's place.

    Raises:
        AttributeError: if 0.1 had no such name, or nothing has taken its place.
    """
    if name.startswith("_"):  # asked for by inspect, copy and the like, not by a user
        raise AttributeError(f"module 'tsdyn.{old}' has no attribute {name!r}")
    new = place(old, name)
    if new is None:
        raise AttributeError(f"module 'tsdyn.{old}' has no attribute {name!r}; docs/migration.md lists what moved")
    message = f"tsdyn.{old}.{name} is {new} now; the old name goes with tsdyn 0.3"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    module, _, attribute = new.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def forwarding(package: str) -> Callable[[str], object]:
    """The `__getattr__` of a package that was a module in 0.1: `forwarding(__name__)`."""
    old = package.removeprefix("tsdyn.")

    def __getattr__(name: str) -> object:
        return forwarded(old, name)

    return __getattr__


class _OldModule(types.ModuleType):
    """A stand-in for a module of 0.1 that no longer exists; its names are those of `MOVED`."""

    def __getattr__(self, name: str) -> object:
        return forwarded(self.__name__.removeprefix("tsdyn."), name)


def _made(name: str, *, stacklevel: int) -> types.ModuleType:
    old = name.removeprefix("tsdyn.")
    renamed = (new.rpartition(".")[0] for was, new in RENAMED.items() if was.startswith(f"{old}."))
    places = ", ".join(sorted({*MOVED[old], *renamed}))
    message = f"{name} is not a module any more: its names are in {places}; the old name goes with tsdyn 0.3"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)
    return _OldModule(name)


class _OldModules:
    """Import finder and loader of `tsdyn.interaction` and other old modules, the last in ``sys.meta_path``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, old = fullname.rpartition(".")
        loader: Any = self  # not an importlib.abc.Loader: importing that module doubles the time of `import tsdyn`
        return importlib.machinery.ModuleSpec(fullname, loader) if package == "tsdyn" and old in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _made(spec.name, stacklevel=3)  # frames of the import system do not count

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing: names are looked up when they are asked for."""


def old_module(old: str) -> types.ModuleType:
    """The old module as an attribute of the package: ``import tsdyn; tsdyn.interaction``."""
    name, package = f"tsdyn.{old}", sys.modules["tsdyn"]
    if name in sys.modules:
        return sys.modules[name]
    if importlib.machinery.PathFinder.find_spec(name, package.__path__) is not None:
        return importlib.import_module(name)  # a package by now, which forwards the names it had as a module
    sys.modules[name] = module = _made(name, stacklevel=4)
    setattr(package, old, module)
    return module


def install() -> None:
    """Make `import tsdyn.interaction` and `from tsdyn import interaction` work for old modules."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())
