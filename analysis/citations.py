"""BibTeX entries for an archive: the papers its variables name as their source, its data set, and tsdyn."""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr

from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment

#: Text in a variable's ``source`` → BibTeX entry.
PAPERS: Mapping[str, str] = {
    "Tian 2020": """@inproceedings{tian2020student,
  title     = {Student Specialization in Deep Rectified Networks With Finite Width and Input Dimension},
  author    = {Tian, Yuandong},
  booktitle = {Proceedings of the 37th International Conference on Machine Learning},
  series    = {Proceedings of Machine Learning Research},
  volume    = {119},
  pages     = {9470--9480},
  year      = {2020}
}""",
    "Tian et al. 2019": """@misc{tian2019luck,
  title         = {Luck Matters: Understanding Training Dynamics of Deep {ReLU} Networks},
  author        = {Tian, Yuandong and Jiang, Tina and Gong, Qucheng and Morcos, Ari},
  year          = {2019},
  eprint        = {1905.13405},
  archiveprefix = {arXiv}
}""",
    "Simsek et al. 2023": """@inproceedings{simsek2023copy,
  title     = {Should Under-parameterized Student Networks Copy or Average Teacher Weights?},
  author    = {Simsek, Berfin and Bendjeddou, Amire and Gerstner, Wulfram and Brea, Johanni},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {36},
  year      = {2023}
}""",
    "Saad & Solla 1995": """@article{saad1995online,
  title   = {On-line learning in soft committee machines},
  author  = {Saad, David and Solla, Sara A.},
  journal = {Physical Review E},
  volume  = {52},
  number  = {4},
  pages   = {4225--4243},
  year    = {1995}
}""",
    "Goldt et al. 2019": """@inproceedings{goldt2019dynamics,
  title     = {Dynamics of stochastic gradient descent for two-layer neural networks in the teacher-student setup},
  author    = {Goldt, Sebastian and Advani, Madhu S. and Saxe, Andrew M. and Krzakala, Florent and
               Zdeborov{\\'a}, Lenka},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {32},
  year      = {2019}
}""",
    "Du, Hu & Lee 2018": """@inproceedings{du2018algorithmic,
  title     = {Algorithmic Regularization in Learning Deep Homogeneous Models: Layers are Automatically Balanced},
  author    = {Du, Simon S. and Hu, Wei and Lee, Jason D.},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {31},
  year      = {2018}
}""",
}

#: ``data.law`` → BibTeX entry.
DATA: Mapping[str, str] = {
    "digits": """@misc{alpaydin1998digits,
  title     = {Optical Recognition of Handwritten Digits},
  author    = {Alpaydin, E. and Kaynak, C.},
  year      = {1998},
  publisher = {UCI Machine Learning Repository}
}""",
    "mnist": """@article{lecun1998gradient,
  title   = {Gradient-based learning applied to document recognition},
  author  = {LeCun, Yann and Bottou, L{\\'e}on and Bengio, Yoshua and Haffner, Patrick},
  journal = {Proceedings of the IEEE},
  volume  = {86},
  number  = {11},
  pages   = {2278--2324},
  year    = {1998}
}""",
    "cifar10": """@techreport{krizhevsky2009learning,
  title       = {Learning Multiple Layers of Features from Tiny Images},
  author      = {Krizhevsky, Alex},
  institution = {University of Toronto},
  year        = {2009}
}""",
}


def software(version: str) -> str:
    """BibTeX entry of tsdyn itself, as in ``CITATION.cff``.

    Examples:
        >>> from tsdyn.analysis.citations import software
        >>> software("0.2.0").splitlines()[0]
        '@software{tsdyn,'
    """
    return f"""@software{{tsdyn,
  title   = {{tsdyn: exact, labelled analysis of training dynamics in teacher-student networks}},
  author  = {{{{The tsdyn developers}}}},
  version = {{{version}}}
}}"""


def papers(archive: xr.Dataset) -> list[str]:
    """Papers that the variables of an archive name in ``source``, in the words of `PAPERS`, in that order.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart")
        >>> from tsdyn.analysis.citations import papers
        >>> papers(ds)
        ['Tian 2020', 'Tian et al. 2019', 'Du, Hu & Lee 2018']
    """
    sources = " ".join(str(array.attrs.get("source", "")) for array in archive.variables.values())
    return [words for words in PAPERS if words in sources]


def citations(archive: xr.Dataset) -> list[str]:
    """BibTeX entries for an archive, or for anything measured from one; tsdyn itself first.

    The papers that its variables name in ``source``, and its data set if it is a published one.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart")
        >>> from tsdyn.analysis.citations import citations
        >>> citations(ds)[1].splitlines()[0]
        '@inproceedings{tian2020student,'
    """
    found = [PAPERS[words] for words in papers(archive)]
    try:
        law = Experiment.from_toml_text(str(archive.attrs["experiment"]), archived=True).data.law
        found += [DATA[law]] if law in DATA else []
    except (KeyError, ExperimentError):  # a measured Dataset does not say which data it was run on
        pass
    version = str(archive.attrs.get("tsdyn_version", "unknown"))
    own = version if version.replace(".", "").replace("+", "").isalnum() else "unknown"
    return [software(own), *found]
