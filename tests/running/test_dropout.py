"""Dropout of own modules: noise that depends on seed, epoch, step and layer only, against plain loops of torch."""

import numpy as np
import pytest
import torch
from torch import nn

import tsdyn
from tests.cases import small
from tests.comparing import assert_same
from tsdyn.engine import dropout
from tsdyn.problem.inputs import batch_indices, evaluation_inputs, generator, training_inputs
from tsdyn.problem.teachers import draw_teacher
from tsdyn.running import own_modules
from tsdyn.running.members import Members

INPUTS, OUTPUTS, BATCH, EPOCHS = 6, 2, 8, 3


class Dropped(nn.Module):
    """Two layers of dropout, the first of which is called twice."""

    def __init__(self):
        super().__init__()
        self.below, self.inner, self.top = nn.Linear(INPUTS, 5), nn.Linear(5, 5), nn.Linear(5, OUTPUTS)
        self.first, self.second = nn.Dropout(0.3), nn.Dropout(0.5)

    def forward(self, x):
        h = self.first(torch.relu(self.below(x)))
        return self.top(self.second(self.first(torch.relu(self.inner(h)))))


class Detached(torch.autograd.Function):
    """The identity, which torch.func refuses."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


class Refused(Dropped):
    def forward(self, x):
        return super().forward(Detached.apply(x))


def convnet():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 3, 2),
        nn.ReLU(),
        nn.Dropout2d(0.4),
        nn.Flatten(),
        nn.Linear(6, OUTPUTS),
    )


#: Shapes of the masks of one step, with the share that is dropped, in the order of calls.
CALLS = {
    Dropped: [((BATCH, 5), 0.3), ((BATCH, 5), 0.3), ((BATCH, 5), 0.5)],
    Refused: [((BATCH, 5), 0.3), ((BATCH, 5), 0.3), ((BATCH, 5), 0.5)],
    convnet: [((BATCH, 3, 1, 1), 0.4)],
}


def asked(**changes):
    return small(**{
        "seeds": [1, 4], "teacher__widths": [INPUTS, 3, OUTPUTS], "data__train": 40, "data__eval": 20,
        "training__epochs": EPOCHS, "training__batch": BATCH, "training__steps_per_epoch": 5,
        "record__observables": ["loss", "parameter"],
    } | changes)  # fmt: skip


def by_hand(make, of, seed, epochs=EPOCHS):
    """A loop of torch whose dropout layers multiply with numbers drawn here."""
    with torch.random.fork_rng():
        torch.manual_seed(int(generator(seed, "student").integers(2**63)))
        module = make().double()
    x = torch.from_numpy(training_inputs(of, seed))
    with torch.no_grad():
        y = draw_teacher(of, seed)(x)
    masks = []
    for part in module.modules():
        if isinstance(part, (nn.Dropout, nn.Dropout2d)):
            part.register_forward_hook(lambda part, given, out: given[0] * masks.pop(0) if part.training else out)
    optimizer = torch.optim.SGD(module.parameters(), of.training.learning_rate)
    for epoch in range(1, epochs + 1):
        rng = generator(seed, "dropout", epoch)
        for rows in batch_indices(of, seed, epoch, len(x)):
            masks += [torch.from_numpy((rng.random(shape) >= p) / (1 - p)) for shape, p in CALLS[make]]
            optimizer.zero_grad()
            (0.5 * (module(x[rows]) - y[rows]).square().sum(1).mean()).backward()
            optimizer.step()
    return module


@pytest.mark.parametrize("make", CALLS, ids=lambda make: make.__name__)
def test_a_run_with_dropout_is_a_loop_with_the_same_noise(tmp_path, make, caplog):
    of = asked()
    ds = tsdyn.run(of, tmp_path / "run", student=make).load()
    assert ("refuses it" in caplog.text) == (make is Refused)
    for seed in (1, 4):
        module = by_hand(make, of, seed)
        found = own_modules.named(ds.sel(seed=seed).isel(epoch=-1))
        for name, expected in module.state_dict().items():
            assert_same(torch.from_numpy(found[name].values), expected, 1e-12, what=name)
        x = torch.from_numpy(evaluation_inputs(of, seed))
        with torch.no_grad():  # measured without noise
            loss = float(0.5 * (module.eval()(x) - draw_teacher(of, seed)(x)).square().sum(1).mean())
        assert float(ds.loss_eval.sel(seed=seed)[-1]) == pytest.approx(loss, rel=1e-11)


@pytest.mark.parametrize("train", [40, "fresh"])
def test_stopped_and_resumed_has_the_same_bits_whoever_shares_the_ensemble(tmp_path, train):
    of = asked(data__train=train)
    whole = tsdyn.run(of, tmp_path / "whole", student=Dropped).load()
    tsdyn.run(of.replace({"training.epochs": 1}), tmp_path / "parts", student=Dropped)
    again = tsdyn.run(of, tmp_path / "parts", student=Dropped).load()
    np.testing.assert_array_equal(again.parameter.sel(epoch=whole.epoch), whole.parameter)
    alone = tsdyn.run(of.replace({"seeds": [4]}), tmp_path / "alone", student=Dropped).load()
    np.testing.assert_allclose(alone.parameter.sel(seed=4), whole.parameter.sel(seed=4), rtol=0, atol=1e-13)
    assert not np.allclose(whole.parameter.sel(seed=1), whole.parameter.sel(seed=4))


def test_masks_keep_their_share_and_their_mean():
    """Of n draws with probability 1 − p, n (1 − p) are kept up to five standard errors; kept ones are 1/(1 − p)."""
    n, p = 40_000, 0.3
    (mask,) = dropout.drawn(
        [dropout.Call("d", (n,), torch.float64, p)], [np.random.default_rng(0)], torch.device("cpu")
    )
    kept = mask[0] > 0
    assert abs(int(kept.sum()) - n * (1 - p)) < 5 * (n * p * (1 - p)) ** 0.5
    assert torch.equal(mask[0][kept].unique(), torch.tensor([1 / (1 - p)], dtype=torch.float64))
    (none,) = dropout.drawn(
        [dropout.Call("d", (3,), torch.float64, 1.0)], [np.random.default_rng(0)], torch.device("cpu")
    )
    assert torch.equal(none, torch.zeros(1, 3, dtype=torch.float64))


def test_a_layer_that_is_called_otherwise_is_refused():
    module, x = Dropped(), torch.zeros(BATCH, INPUTS)
    called = dropout.calls(module, x)
    assert [call.name for call in called] == ["first", "first", "second"]
    with (
        pytest.raises(ValueError, match="dropout layer first is not called as on the first batch"),
        dropout.masked(module, called[:1], [torch.ones(BATCH, 5)]),
    ):
        module(x)
    assert module.first.forward == nn.Dropout.forward.__get__(module.first)  # as it was
    of = asked(record__observables=["loss", "parameter"])
    members = Members(own_modules.described(of, student=Dropped), student=Dropped)
    assert len(next(iter(members.stream(1)(slice(1, 2)))).noises) == 1
