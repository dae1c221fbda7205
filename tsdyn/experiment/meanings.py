"""What each key of the experiment file means, in one line, and files with these lines as comments."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import tomli_w

if TYPE_CHECKING:
    from tsdyn.experiment.experiment import Experiment

#: Key → meaning.  Other releases add keys, packages do not: their parts take ``arguments``.
MEANINGS: Mapping[str, str] = {
    "kind": "training, population-flow (gradient flow of the population loss) or online (each sample seen once)",
    "name": "names the run",
    "seeds": "number of students, or a list of labels; each draws its own teacher, start and data",
    "dtype": "float64 or float32, of training and of what is recorded",
    "teacher.widths": "input, hidden ..., output; channels of a convolutional teacher",
    "teacher.init": "how the teacher is made: separated, orthonormal, gaussian, trained or file",
    "teacher.path": 'file of the teacher\'s parameters, with init = "file"',
    "teacher.convolution": "whether hidden layers are 3 x 3 convolutions, of the student too",
    "teacher.stride": "stride of the convolutions",
    "teacher.padding": "zeros on each side of the convolutions' inputs",
    "teacher.batch_norm": "BatchNorm of the hidden layers: none, before or after the activation",
    "teacher.batch_norm_affine": "whether BatchNorm has a scale and a shift",
    "teacher.train_epochs": 'epochs on the data\'s labels, with init = "trained"',
    "teacher.train_rate": "learning rate of these epochs",
    "teacher.prune": "share of nodes that are pruned, one per hidden layer",
    "teacher.finetune_epochs": "epochs of training after pruning",
    "teacher.choices": "values that entries of separated rows are drawn from",
    "teacher.scale": 'standard deviation of the weights, with init = "gaussian"',
    "teacher.unit_norm": "whether the first layer's rows, or those of every layer, are scaled to unit norm",
    "teacher.polarity": "fan-out of the teacher's j-th node (j = 1, 2, ...) is divided by j to this power",
    "teacher.bias": "every bias, false for none, or uniform",
    "teacher.balanced": "whether each node is shifted to be active on half of the samples",
    "teacher.activation": "the student's unless given",
    "teacher.leak": "slope of leaky_relu below 0; the student's unless given",
    "teacher.module": "import path of a module of your own, package.module:Name",
    "teacher.source": "SHA-256 of that module's source; filled in",
    "teacher.numbers": "that module's number of parameters; filled in",
    "teacher.layers": "names of that module's labelled layers, the lowest first; filled in",
    "teacher.shapes": "(nodes, inputs of a node) of these layers; filled in",
    "teacher.arguments": "keyword arguments of your module, or of a package's part",
    "teacher.made": "source, numbers, layers and shapes of each module of a sweep; filled in",
    "student.overrealization": "hidden widths are the teacher's times this",
    "student.widths": "input, hidden ..., output, in the place of overrealization",
    "student.init": "gaussian, torch, near-teacher or another registered start",
    "student.path": 'file of the first parameters, with init = "file"',
    "student.scale": "standard deviation of the first weights",
    "student.shrink": "factor on the first weights",
    "student.toward_weakest": "first weights free, adversarial to or helped toward the weakest teacher node",
    "student.activation": "relu, leaky_relu, erf, tanh, ... or a registered activation",
    "student.leak": "slope of leaky_relu below 0",
    "student.bias": "whether layers have biases",
    "student.batch_norm": "BatchNorm of the hidden layers: none, before or after the activation",
    "student.batch_norm_affine": "whether BatchNorm has a scale and a shift",
    "student.module": "import path of a module of your own, package.module:Name",
    "student.source": "SHA-256 of that module's source; filled in",
    "student.numbers": "that module's number of parameters; filled in",
    "student.layers": "names of that module's labelled layers, the lowest first; filled in",
    "student.shapes": "(nodes, inputs of a node) of these layers; filled in",
    "student.arguments": "keyword arguments of your module, or of a package's part",
    "student.made": "source, numbers, layers and shapes of each module of a sweep; filled in",
    "data.law": "gaussian, uniform, mixture, hidden-manifold, digits, mnist, cifar10 or file",
    "data.path": "your file, or the folder of mnist or cifar10",
    "data.eval_path": 'file of the evaluation samples, with law = "file"',
    "data.image": "channel, row, column of images in a file",
    "data.std": "standard deviation of each input",
    "data.covariance": ".npy file of the inputs' covariance, (input, input)",
    "data.spectrum": "s: eigenvalues of the covariance fall as i^-s, trace as of the identity",
    "data.latent": "components of mixture, or latent dimensions of hidden-manifold",
    "data.fold": "activation of hidden-manifold",
    "data.noise": "standard deviation of the noise on training targets; evaluation stays clean",
    "data.flip": "share of wrong classes among training targets",
    "data.train": 'number of training samples, or "fresh": new ones at every step',
    "data.eval": "number of evaluation samples",
    "data.augment": "none, agnostic, aware (Tian 2020, Definition 7) or crop-flip",
    "data.augment_eps": "distance of the added samples from the boundary",
    "data.augment_c": "share of added samples along the boundary's normal",
    "data.arguments": "keyword arguments of a package's law",
    "data.leave_out.subsets": "number of training sets that each lack some samples; each is a point of the sweep",
    "data.leave_out.share": "share of the samples that each of them lacks",
    "data.leave_out.subset": "which of them the run trains on",
    "training.method": "sgd, gd (all the data at each step), adam, adamw, flow (gradient flow)",
    "training.loss": "mse (half the squared error, summed over outputs) or cross_entropy",
    "training.labels": "targets are the teacher's outputs or the data's own labels",
    "training.learning_rate": "a number, or { epoch = rate }",
    "training.batch": "samples per step, drawn with replacement",
    "training.steps_per_epoch": "steps per epoch; one pass over the data unless given",
    "training.epochs": "number of epochs",
    "training.momentum": "heavy-ball momentum",
    "training.weight_decay": "coefficient of the parameter in the gradient (adamw: apart from it)",
    "training.beta_1": "Adam's decay of the first moment",
    "training.beta_2": "Adam's decay of the second moment",
    "training.epsilon": "Adam's number beside the root of the second moment",
    "training.nesterov": "whether momentum is Nesterov's",
    "training.decay_biases": "whether weight decay is also of biases",
    "training.rates": "factors on the learning rate, one per layer",
    "training.clip": "largest norm of a member's gradient",
    "training.warm_up": "epochs over which the rate grows in proportion",
    "training.anneal": "none, or cosine: the rate falls to 0 over the run",
    "training.stop": "{ variable, below } or { variable, patience }: when a member stops learning",
    "training.frozen": "layers that do not learn, from 1",
    "training.normalize": "whether rows of the first layer are scaled to unit norm after each step",
    "training.arguments": "keyword arguments of a package's optimizer",
    "record.every": "record every so many epochs",
    "record.epochs": "or these epochs",
    "record.geometric": "or epochs that grow by this ratio",
    "record.state_every": "keep the training state every so many epochs, for forks and sensitivity",
    "record.observables": "what is measured: variables of the schema, or words for several",
    "record.band": "half-width of the band around a teacher's boundary, for observation",
    "record.quantiles": "quantiles over samples, for gradient_norm",
    "record.eigenvalues": "number of leading eigenvalues of the Hessian",
    "fork.parent": "directory of the run that this one branches off",
    "fork.fork_epoch": "epochs that the two share",
    "fork.branch": "number of the branch, which keys its random draws",
    "fork.perturb": "what is changed there: gaussian, weight, silence, reinitialise, transplant, swap or set",
    "fork.draws": "whether batches from there on are the other run's (same) or new (other)",
    "flow.inputs": "input width, in the place of the first of the widths",
    "flow.times": "{ first, last, number }: recorded times, evenly in log t",
    "online.inputs": "N, in the place of the first of the widths",
    "online.noise": "standard deviation of the noise on the teacher's output",
    "online.layers": "first (outgoing weights are 1) or both",
    "online.last": "alpha = steps / N at the end",
    "online.points": "number of recorded alphas, evenly in log alpha",
    "sweep": "keys with lists of values: one run for each combination",
}
#: Keys that are written even where they have their defaults, since a reader asks for them.
_ALWAYS = (
    "student.overrealization",
    "student.activation",
    "data.train",
    "training.method",
    "training.learning_rate",
    "training.epochs",
    "seeds",
)
_COLUMN = 34


def commented(experiment: Experiment, heading: str) -> str:
    """TOML text of an experiment: `heading` and each key's meaning as comments; keys with their defaults are left out.

    `Experiment.from_toml_text` gives an equal experiment back.

    Args:
        experiment: The experiment.
        heading: First lines, without ``#``.
    """
    lines = [f"# {line}" if line else "#" for line in heading.splitlines()]
    for section, kept in _told(experiment):
        if section:
            note = f"  # {MEANINGS['sweep']}" if section == "sweep" else ""
            lines += ["", f"[{section}]{note}"]
        lines += _lines(section, kept)
    return "\n".join(lines) + "\n"


def table(experiment: Experiment) -> str:
    """HTML table of the keys that `commented` writes: key, value, meaning."""
    cells = ""
    for section, kept in _told(experiment):
        for name, value in kept.items():
            key = f"{section}.{name}".lstrip(".")
            words = (key, _inline(value), MEANINGS.get(key, ""))
            cells += f"<tr>{''.join(f'<td>{html.escape(word)}</td>' for word in words)}</tr>"
    return f"<table><tr><th>key</th><th>value</th><th>meaning</th></tr>{cells}</table>"


def _told(experiment: Experiment) -> Iterator[tuple[str, dict[str, Any]]]:
    """Sections, "" for the top level, with those of their keys that are not at their defaults or are always written."""
    values = experiment.as_dict()
    plain = type(experiment)(name="plain", teacher={"widths": [1, 1, 1]}).as_dict()
    own = {key: value for key, value in values.items() if not isinstance(value, dict)}
    yield "", {k: v for k, v in own.items() if k in ("name", *_ALWAYS) or plain.get(k) != v}
    for section, inside in values.items():
        if not isinstance(inside, dict):
            continue
        before = plain.get(section)
        usual: dict[str, Any] = before if isinstance(before, dict) and section != "sweep" else {}
        kept = {k: v for k, v in inside.items() if f"{section}.{k}" in _ALWAYS or k not in usual or usual[k] != v}
        if kept:
            yield section, kept


def _lines(section: str, values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        entry = _entry(key, value)
        meaning = MEANINGS.get(f"{section}.{key}".lstrip("."))
        if meaning is None:  # a swept key
            yield entry
        elif len(entry) < _COLUMN:
            yield f"{entry:{_COLUMN}}# {meaning}"
        else:
            yield from (f"# {line}" for line in textwrap.wrap(meaning, 100))
            yield entry


def _entry(key: str, value: Any) -> str:
    """``key = value`` on one line; a table is written inline."""
    return f"{_key(key)} = {_inline(value)}"


def _key(key: str) -> str:
    return next(iter(tomli_w.dumps({key: 0}).partition(" = ")))


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(str(k))} = {_inline(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return tomli_w.dumps({"v": value}).partition(" = ")[2].strip()
