"""Every figure of `tsdyn plot` as a referee sees it; styles, colours and files."""

import io
import itertools
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from matplotlib._layoutgrid import LayoutGrid
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image
from tsdyn.analysis import captions, layout, panels, style
from tsdyn.analysis.figures import FIGURES

import tsdyn
from tests.analysis.test_figures import RICH
from tests.cases import small
from tests.rendering import faults
from tsdyn import studies


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    path = tmp_path_factory.mktemp("rendering")
    grid = {"student.overrealization": [1, 3], "teacher.polarity": [0.0, 1.0]}
    return tsdyn.run(small(**RICH, seeds=6), path / "run"), tsdyn.run(small(**RICH, sweep=grid), path / "sweep")


@pytest.mark.parametrize("name", FIGURES)
def test_figures_of_runs_and_sweeps_have_no_fault(name, archives):
    for archive in archives:
        assert faults(FIGURES[name](archive)) == []


@pytest.mark.parametrize("name", style.NAMES)
def test_every_style_is_readable_and_leaves_the_users_parameters_alone(name, archives):
    before = dict(mpl.rcParams)
    with style.using(name):
        figure = FIGURES["specialization"](archives[1])
    scale = figure.get_figwidth() / style.PAGE
    assert [f for f in faults(figure, style.SMALLEST * scale) if "in wide" not in f and "in high" not in f] == []
    assert scale >= 1
    assert dict(mpl.rcParams) == before


def test_the_checks_find_what_a_referee_finds():
    """A page with every fault is not let through: each check can fail."""
    page = style.page(1, 2.0)
    ax = page.body.subplots()
    ax.plot([0, 1], [0, 1], color="yellow")
    ax.text(0.5, 0.5, "one")
    ax.text(0.5, 0.5, "two")
    ax.text(0.2, 0.2, "small", size=4)
    ax.text(0.8, 0.1, "pale", color="0.8")
    ax.text(-3, 0, "outside").set_in_layout(False)
    found = " ".join(faults(page))
    for words in ("overlap", "has 4.0 points", "pale", "cut off", "contrast 1.1", "does not say n"):
        assert words in found


def _clean():
    """A page without fault: two panels with labels, a legend, marks and a caption."""
    page = style.page(2, 2.0)
    for ax in page.body.subplots(1, 2):
        ax.plot([0, 1], [0, 1], label="loss")
        ax.scatter([0.2, 0.4], [0.4, 0.2])
        ax.set(xlabel="epoch", ylabel="loss")
        ax.legend(loc="upper left")
    page.say("A curve. n = 3 seeds.")
    return page


def _resized(page, width, height):
    page.set_size_inches(width, height)


#: What a referee objects to → how it is planted into a clean page.
PLANTED = {
    "is cut off": lambda page, ax: ax.text(-2.0, 0.5, "outside").set_in_layout(False),
    "has 5.0 points": lambda page, ax: ax.text(0.6, 0.1, "tiny", size=5),
    "is pale": lambda page, ax: ax.text(0.6, 0.1, "faint", color="0.8"),
    "is no word": lambda page, ax: ax.text(0.6, 0.1, "nan"),
    "has a key or a symbol that is not set": lambda page, ax: ax.text(0.6, 0.1, "β_kk"),
    "overlap": lambda page, ax: [ax.text(0.6, 0.1, word) for word in ("one", "two")],
    "no label of y": lambda page, ax: ax.set_ylabel(""),
    "no label of x": lambda page, ax: ax.set_xlabel(""),
    "a line 'pale' of contrast": lambda page, ax: ax.plot([0, 1], [1, 0], color="yellow", label="pale"),
    "marks of contrast": lambda page, ax: ax.scatter([0.5], [0.7], color="yellow"),
    "empty panel": lambda page, ax: [art.remove() for art in (*ax.lines, *ax.collections)],
    "does not say n": lambda page, ax: page.say("A curve."),
    "leaves the panel": lambda page, ax: ax.set_ylim(0, 0.5),
    "in wide": lambda page, ax: _resized(page, 8.0, 2.5),
    "in high": lambda page, ax: _resized(page, style.PAGE, 9.5),
}


@pytest.mark.parametrize("objection", PLANTED)
def test_a_planted_fault_is_found_and_nothing_else(objection):
    with style.using("paper"):
        page = _clean()
        assert faults(page) == []
        PLANTED[objection](page, page.axes[0] if "label" not in objection else page.axes[1])
        if objection == "no label of y":  # of one panel only: its neighbour's would do where they share the axis
            page.axes[0].set_ylabel("")
        found = faults(page)
    assert found
    assert all(objection in fault for fault in found)


@pytest.mark.parametrize("kind", ["pdf", "svg", "png"])
def test_the_same_archive_gives_the_same_bytes_with_provenance(kind, archives):
    files = []
    for _ in range(2):
        figure = FIGURES["loss"](archives[0])
        figure.provenance = captions.provenance(archives[0], "tsdyn plot DIR loss")
        files.append(io.BytesIO())
        figure.savefig(files[-1], format=kind)
    one, other = (file.getvalue() for file in files)
    assert one == other
    digest = str(archives[0].attrs["digest"])
    match kind:
        case "pdf":
            assert b"/Type3" not in one
            assert b"/FontFile2" in one  # TrueType
            assert b"CreationDate" not in one
            assert digest.encode() in one
        case "svg":
            assert b"<text" in one
            assert digest.encode() in one
            assert b"dc:date" not in one
        case "png":
            with Image.open(io.BytesIO(one)) as image:
                assert digest in image.text["Source"]
                assert "n = 6 seeds" in image.text["Description"]


def _written(figure, kind):
    file = io.BytesIO()
    figure.savefig(file, format=kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["pdf", "svg"])
def test_a_vector_file_depends_on_the_figure_alone(kind, archives, monkeypatch):
    """Not on the last bits of the layout's solver, which orders variables by their addresses in memory, nor on the
    user's parameters."""
    first = _written(FIGURES["loss"](archives[1]), kind)
    noise = np.random.default_rng(0)

    def disturbed(found):
        return lambda *given, **named: Bbox(found(*given, **named).get_points() + noise.uniform(-1e-14, 1e-14, (2, 2)))

    for name in ("get_inner_bbox", "get_outer_bbox", "get_bbox_for_cb"):
        monkeypatch.setattr(LayoutGrid, name, disturbed(getattr(LayoutGrid, name)))
    with mpl.rc_context({"savefig.bbox": "tight", "path.simplify_threshold": 1.0}):
        assert _written(FIGURES["loss"](archives[1]), kind) == first


def test_a_second_process_writes_the_same_bytes(archives, tmp_path):
    script = (
        "import sys, matplotlib; matplotlib.use('Agg'); import tsdyn; from tsdyn.analysis.figures import FIGURES; "
        "FIGURES['loss'](tsdyn.open(sys.argv[1])).savefig(sys.argv[2])"
    )
    run = tmp_path / "run"
    tsdyn.run(small(training__epochs=1, training__steps_per_epoch=2), run)
    FIGURES["loss"](tsdyn.open(run)).savefig(tmp_path / "a.svg")
    subprocess.run([sys.executable, "-c", script, run, tmp_path / "b.svg"], check=True)  # with hashes of its own
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_the_palette_is_seen_by_everyone():
    """3:1 on white, apart in grey and with each kind of colour vision: ΔE is about ten just noticeable differences."""
    for colour in (*style.PALETTE, style.GREY, style.GUIDE):
        assert style.contrast(colour) >= style.CONTRAST
    for one, other in itertools.combinations(style.PALETTE, 2):
        assert abs(style.lightness(one)[0] - style.lightness(other)[0]) >= 6
        for vision in (None, *style.VISIONS):
            assert np.linalg.norm(style.lightness(one, vision) - style.lightness(other, vision)) >= 20
    shades = [style.shade(i, 20) for i in range(20)]
    assert all(style.contrast(shade) >= style.CONTRAST for shade in shades)
    greys = [style.lightness(shade)[0] for shade in shades]
    assert (np.diff(greys) > 0).all()


def test_contrast_is_that_of_wcag():
    assert style.contrast("black") == pytest.approx(21)
    assert style.contrast("white") == pytest.approx(1)
    assert style.contrast("#767676") == pytest.approx(4.54, abs=0.005)  # the grey that WCAG's note gives for 4.5


def test_captions_say_what_ran(archives):
    said = FIGURES["loss"](archives[0]).caption
    for words in ("n = 6 seeds", "middle 80 %", "d = 2 inputs", "N = 40 samples", "rate 0.02", "batch 16", "3 epochs"):
        assert words in said
    assert "every seed" in FIGURES["loss"](archives[1]).caption
    assert "Wilson" in FIGURES["success-rate"](archives[1]).caption
    with style.using("paper", captioned=False):
        bare = FIGURES["loss"](archives[0])
    assert bare.caption == said
    assert not bare.findobj(lambda artist: artist.get_gid() == "caption")


def test_a_symbol_at_the_start_of_a_sentence_stays_what_it_is():
    """σ, not Σ; of numbers that xarray read from a file, which are NumPy's."""
    flows = studies.load("simsek2023-loss").EXPERIMENTS["smoke"]
    ds = xr.Dataset(attrs={"experiment": flows.to_toml(), "seeds": np.int64(2)})
    said = captions.caption(ds, "Losses", "none")
    assert said.startswith("Losses. n = 2 seeds. σ = erf; ")


def test_a_caption_lists_the_teachers_and_rates_of_listed_points_in_their_order():
    ds = xr.Dataset(attrs={"experiment": studies.load("tian2019-ranks").EXPERIMENTS["desk"].to_toml(), "seeds": 2})
    said = captions.caption(ds, "Ranks", "none")
    assert "teachers 10-15-20-25-100 and 50-75-100-125-100; " in said
    assert "rates, point by point, 0.0001, 0.001, 1e-06 and 0.0001." in said


def test_names_at_the_ends_of_curves_stand_apart_in_order_within_the_panel():
    for values in ([0.0, 0.01, 0.02, 0.99, 1.0], [1.0, 1.0, 1.0], [0.5], [0.0, 0.0, 0.99, 0.5]):
        ax = Figure().subplots()
        ax.set_ylim(0, 1)
        panels.name_ends(ax, {f"curve {i}": value for i, value in enumerate(values)})
        places = {text.get_text(): text.xy[1] for text in ax.texts}
        heights = [places[f"curve {i}"] for i in np.argsort(values, kind="stable")]
        assert all(np.diff(heights) >= 0.085 - 1e-9)
        assert 0 <= min(heights) <= max(heights) <= 1
        assert len(values) > 1 or heights == values


def test_clearly_negative_cells_of_a_heat_map_have_a_minus_sign_which_the_caption_explains():
    values = np.array([[1.0, -1.0, np.nan], [-0.3, -0.2, 0.3]])
    with style.using("paper"):
        made = style.page(1, 1.0)
        ax = panels.table(xr.DataArray(values), ax=made.body.subplots(), limits=(-1, 1), cmap="RdBu", bar=False)
    (marks,) = ax.collections
    assert {tuple(place) for place in np.array(marks.get_offsets())} == {(1, 0), (0, 1)}
    ds = xr.Dataset(attrs={"seeds": 2})
    assert "minus signs" in layout.told(made, ds, "Map", "none", None).caption
    panels.table(xr.DataArray(abs(values)), ax=ax, limits=(0, 1), cmap="cividis", bar=False)
    assert len(ax.collections) == 1


def test_words_stand_for_keys():
    assert captions.words("overrealization", 5.0) == "5x as many student nodes as teacher nodes"
    assert captions.words("batch_norm", "after") == "with BatchNorm"
    assert captions.words("train", "20000") == "N = 20,000"
    assert captions.words("train", "fresh") == "new samples at every step"


def test_marks_of_seeds_are_drawn_in_an_order_that_does_not_depend_on_the_seed():
    rng = np.random.default_rng(1)
    x, y = (xr.DataArray(rng.uniform(size=(4, 30)), dims=("seed", "node"), name=n) for n in "xy")
    (drawn,) = panels.points(x, y, ax=Figure().subplots()).collections
    places = {tuple(p): k for k, p in enumerate(np.stack([x.values.ravel(), y.values.ravel()], 1))}
    last = [places[tuple(p)] // 30 for p in np.array(drawn.get_offsets())[-30:]]
    assert len(set(last)) > 1  # not all of one seed on top


def test_a_caption_of_any_length_fits_its_page():
    for words in (1, 40, 400):
        page = style.page(1, 1.0)
        page.body.subplots().plot([1, 2], color="black")
        page.say("n = 3 seeds. " + "Ωide words " * words)
        assert not [f for f in faults(page) if "cut off" in f or "overlap" in f]
    assert layout.HEIGHTS
