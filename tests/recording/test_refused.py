"""`tsdyn.Recorder`: what it refuses, and that nothing is lost by it."""

import math
import shutil

import pytest
import torch
from torch import nn
from tsdyn.analysis import members

import tsdyn
from tests.recording.loops import Skip, X, Y, loop, made
from tsdyn.archive import integrity
from tsdyn.archive.lock import HeldError
from tsdyn.archive.whole_files import ArchiveError, DirectoryError


class Shared(Skip):
    def __init__(self):
        super().__init__()
        self.fc2.weight = nn.Parameter(torch.zeros(5, 5))
        self.extra = nn.Linear(5, 5)
        self.extra.weight = self.fc2.weight

    def forward(self, x):
        return self.fc3(self.extra(torch.tanh(self.fc2(torch.tanh(self.fc1(x))))))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(x)[:, None]


class Twice(Skip):
    def forward(self, x):
        return super().forward(x) + self.fc3(torch.tanh(self.fc1(x)))


def frozen():
    return Skip().requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "given", "sentence"),
    [
        (Shared, {}, "share a parameter"),
        (Tokens, {}, r"\(sample, output\) is needed"),
        (Twice, {}, "called 2 times"),
        (frozen, {"observables": ["gradient_norm"]}, "every parameter is frozen"),
        (Skip, {"probe": (X.float(), Y)}, "inputs are torch.float32, the model torch.float64"),
        (Skip, {"probe": (X.to("meta"), Y)}, "on meta, the model on cpu"),
        (Skip, {"probe": (X, Y[:, :1])}, "targets of the same shape"),
        (Skip, {"layers": ["norm"]}, "no Linear layer or convolution"),
        (Skip, {"observables": ["correlation"]}, "give teacher="),
        (Skip, {"observables": ["fanout_norm"]}, "cannot be recorded"),
        (lambda: nn.Linear(6, 2), {"observables": ["parameter"]}, "in no labelled layer, and all are in one"),
        (Skip, {"state": [3]}, r"state\[0\] is int"),
        (Skip, {"seed": -1}, "seed = -1"),
        (Skip, {"every": 0}, "every = 0"),
        (Skip, {"config": {"seed": 1}}, "word of the schema"),
        (Skip, {"config": {"rate": float("nan")}}, "finite number"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_written(tmp_path, make, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        tsdyn.Recorder(tmp_path / "new", made(make), **{"probe": (X, Y), **given})
    assert not (tmp_path / "new").exists()


class Breaking(Skip):
    """Its forward raises once it is told to."""

    broken = False

    def forward(self, x):
        if self.broken:
            raise RuntimeError("out of order")
        return super().forward(x)


def giving(value):
    """An observable that is 1 until its third call, and then this."""
    calls = []

    def mine(model, x, y):
        calls.append(1)
        return torch.tensor(1.0) if len(calls) < 3 else value(model)

    return mine


def lost(_):
    raise KeyError("key")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            lost,
            r"observable 'mine' raised KeyError: 'key'; nothing of this epoch is recorded, what was committed stays",
        ),
        (lambda m: torch.ones(3), r"mine has shape \(3,\); over .* it is one number"),
        (lambda m: [1.0, 2.0], r"mine has shape \(2,\)"),
        (lambda m: None, "'mine' gave NoneType; give a number or a tensor"),
        (lambda m: "a", "'mine' gave str"),
        (lambda m: {}, "'mine' gave dict"),
        (lambda m: torch.tensor(1j), "gave complex numbers"),
    ],
)
def test_an_observable_that_fails_on_the_way_loses_nothing_and_can_be_mended(tmp_path, value, sentence):
    model = made()
    rec = tsdyn.Recorder(tmp_path, model, probe=(X, Y), observables=["loss", giving(value)])
    rec.commit(0)
    rec.commit(1)
    with pytest.raises(ValueError, match=sentence):
        rec.commit(2)
    assert tsdyn.open(tmp_path)["mine"].values.tolist() == [[1, 1]]
    rec.close()

    def mine(model, x, y):
        return model.fc1.weight.sum()  # with its gradient

    again = tsdyn.Recorder(tmp_path, model, probe=(X, Y), observables=["loss", mine])
    assert again.resume() == 1
    again.commit(2)
    assert tsdyn.open(tmp_path)["mine"].values[0, 2] == float(model.fc1.weight.detach().sum())
    assert not integrity.check(tmp_path)


def test_a_first_commit_that_fails_leaves_the_folder_free(tmp_path):
    for loss, sentence in (
        (lambda o, t: (o - t).square().sum(1), "a loss is the mean over the batch"),
        (lambda o, t: 1 / 0, "loss_eval: the model or the loss raised ZeroDivisionError"),
    ):
        rec = tsdyn.Recorder(tmp_path, made(), probe=(X, Y), loss=loss)
        with pytest.raises(ValueError, match=sentence):
            rec.commit(0)
        rec.close()
    tsdyn.Recorder(tmp_path, made(), probe=(X, Y)).commit(0)
    assert tsdyn.open(tmp_path).epoch.values.tolist() == [0]


def test_a_model_that_raises_on_the_way_loses_nothing(tmp_path):
    model = made(Breaking)
    rec = tsdyn.Recorder(tmp_path, model, probe=(X, Y))
    rec.commit(0)
    model.broken = True
    with pytest.raises(ValueError, match="the model or the loss raised RuntimeError: out of order"):
        rec.commit(1)
    model.broken = False
    rec.commit(1)
    assert tsdyn.open(tmp_path).epoch.values.tolist() == [0, 1]


def test_numbers_that_are_not_finite_are_told_once_and_recorded(tmp_path, caplog):
    rec = tsdyn.Recorder(tmp_path, made(), probe=(X, Y), observables=["loss", giving(lambda m: math.inf)])
    for epoch in range(5):
        rec.commit(epoch, rate=math.nan)  # as it was given
    said = [record.getMessage() for record in caplog.records if "recorded as it is" in record.getMessage()]
    assert len(said) == 1
    assert "epoch 2: mine is NaN or infinite" in said[0]
    assert tsdyn.open(tmp_path)["mine"].values.tolist() == [[1, 1, math.inf, math.inf, math.inf]]


@pytest.mark.parametrize("value", ["a", None, 1j, {}])
def test_own_values_that_are_no_numbers_are_refused(tmp_path, value):
    rec = tsdyn.Recorder(tmp_path, made(), probe=(X, Y))
    with pytest.raises(ValueError, match=r"rate = .*; give a real number"):
        rec.commit(0, rate=value)


@pytest.mark.parametrize(
    ("teacher", "sentence"),
    [
        (nn.Linear(5, 2).double(), "the teacher raised RuntimeError for inputs"),
        (nn.Linear(6, 2).float(), "the teacher is torch.float32 on cpu, the model torch.float64"),
    ],
)
def test_teachers_that_cannot_be_compared_are_refused(tmp_path, teacher, sentence):
    with pytest.raises(ValueError, match=sentence):
        tsdyn.Recorder(tmp_path / "new", made(), probe=(X, Y), teacher=teacher)
    assert not (tmp_path / "new").exists()


def test_configs_that_cannot_be_told_apart_are_refused(tmp_path):
    def recorded(**config):
        tsdyn.Recorder(tmp_path, made(), probe=(X, Y), config=config).commit(0)

    recorded(name="a/b")
    recorded(name="a-b")  # another directory
    recorded(rate=1)
    for config in ({"name": "A-b"}, {"rate": 1.0}, {"rate": "1"}):
        with pytest.raises(ValueError, match=r"config|holds the config"):
            recorded(**config)
    assert tsdyn.open(tmp_path).sizes["name"] == 3  # unset, too


def test_epochs_that_do_not_follow_and_other_models_are_refused(tmp_path):
    rec = tsdyn.Recorder(tmp_path, made(), probe=(X, Y))
    rec.commit(0)
    rec.commit(3)
    for epoch, sentence in ((3, "not after epoch 3"), (-1, "at least 0"), (True, "integer")):
        with pytest.raises(ValueError, match=sentence):
            rec.commit(epoch)
    with pytest.raises(HeldError):
        tsdyn.Recorder(tmp_path, made(), probe=(X, Y))
    rec.close()
    again = tsdyn.Recorder(tmp_path, made(), probe=(X, Y))
    with pytest.raises(ValueError, match=r"call resume\(\)"):
        again.commit(4)
    again.close()
    for model, given in (
        (made(width=6), {}),
        (made(), {"loss": nn.functional.mse_loss}),
        (made(), {"probe": (X + 1, Y)}),
    ):
        with pytest.raises(DirectoryError, match="another recording"):
            tsdyn.Recorder(tmp_path, model, **{"probe": (X, Y), **given})

    class Changed(Skip):
        def forward(self, x):
            return 2 * super().forward(x)

    Changed.__module__, Changed.__qualname__ = Skip.__module__, Skip.__qualname__
    other = tsdyn.Recorder(tmp_path, made(Changed), probe=(X, Y))
    with pytest.raises(ArchiveError, match="forward has changed"):
        other.resume()
    assert not integrity.check(tmp_path)
    assert tsdyn.open(tmp_path).epoch.values.tolist() == [0, 3]


def test_layers_that_change_between_commits_are_refused(tmp_path):
    model = made()
    rec = tsdyn.Recorder(tmp_path, model, probe=(X, Y))
    rec.commit(0)
    model.extra = nn.Linear(2, 2).double()
    with pytest.raises(ValueError, match="not those that the recording began with"):
        rec.commit(1)
    assert tsdyn.open(tmp_path).epoch.values.tolist() == [0]


class Swapping(nn.Module):
    """Calls two layers of one shape in an order that can be changed."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.top = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.swapped = False

    def forward(self, x):
        for layer in (self.two, self.one) if self.swapped else (self.one, self.two):
            x = torch.relu(layer(x))
        return self.top(x)


@pytest.mark.parametrize("layers", [None, ["two", "one", "top"]])
def test_layers_called_in_another_order_are_refused_and_nothing_is_lost(tmp_path, layers):
    model = made(Swapping)
    rec = tsdyn.Recorder(tmp_path, model, probe=(X, Y), observables=["loss"], layers=layers)
    rec.commit(0)
    model.swapped = True
    with pytest.raises(ValueError, match=r"in the order two, one, top; when the recording began it was one, two, top"):
        rec.commit(1)
    model.swapped = False
    rec.commit(2)
    rec.close()
    assert tsdyn.open(tmp_path).epoch.values.tolist() == [0, 2]


def test_a_recording_is_no_experiment_to_rebuild_members_of(tmp_path):
    loop(tmp_path, epochs=1)
    with pytest.raises(ValueError, match="a recording of a loop of the user's own"):
        members.member(tsdyn.open(tmp_path).isel(seed=0, epoch=0))


def _steps(model, x, y):
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    return 0.0


def _goes_backward(model, x, y):
    with torch.enable_grad():
        (model(x) - y).square().sum().backward()
    return 0.0


@pytest.mark.parametrize("observable", [_steps, _goes_backward])
def test_an_observable_that_changes_the_model_is_refused_and_the_model_put_back(tmp_path, observable):
    model = made(Skip)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rec = tsdyn.Recorder(tmp_path / "own", model, probe=(X, Y), observables=("loss", observable))
    with pytest.raises(ValueError, match=r"changes fc1\.weight"):
        rec.commit(0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_of_several_recordings_those_that_cannot_be_opened_are_named_and_may_be_left_out(tmp_path):
    for seed in range(2):
        with tsdyn.Recorder(tmp_path / "two", made(), probe=(X, Y), seed=seed) as rec:
            rec.commit(0)
    (tmp_path / "two" / "seed=1" / "recording.toml").write_text("no = [")
    with pytest.raises(ArchiveError, match="seed=1"):
        tsdyn.open(tmp_path / "two")
    with pytest.warns(UserWarning, match=r"seed=1.*; left NaN"):
        assert tsdyn.open(tmp_path / "two", skip_damaged=True)["seed"].values.tolist() == [0]
    with tsdyn.Recorder(tmp_path / "rates", made(), probe=(X, Y), config={"rate": 1}) as rec:
        rec.commit(0)
    shutil.copytree(tmp_path / "rates" / "rate=1" / "seed=0", tmp_path / "rates" / "rate=1" / "seed=7")
    with pytest.raises(DirectoryError, match="hold the same seed of one config"):
        tsdyn.open(tmp_path / "rates")
