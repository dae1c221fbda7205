"""A small module, its probe, and a training loop that records it by `tsdyn.Recorder`."""

import numpy as np
import torch
from torch import nn

import tsdyn

X = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Skip(nn.Module):
    """Three layers, the second of them skipped."""

    def __init__(self, width=5):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 2)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        h = torch.tanh(self.fc1(x))
        return self.fc3(h + torch.relu(self.fc2(self.norm(h))))


def made(make=Skip, seed=0, **arguments):
    torch.manual_seed(seed)
    return make(**arguments).double()


Y = made(seed=77)(X).detach()


def train(model, optimizer, epoch):
    torch.manual_seed(epoch)
    rows = torch.randperm(len(X))[:8]
    loss = (model(X[rows]) - Y[rows]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def loop(path, *, seed=0, epochs=4, rate=0.01, **given):
    """Train and record; resumes."""
    model = made(seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    with tsdyn.Recorder(path, model, probe=(X, Y), seed=seed, state=[optimizer, scheduler], **given) as rec:
        start = rec.resume()
        if not start:
            rec.commit(0, loss_train=np.nan)
        for epoch in range(start + 1, epochs + 1):
            loss = train(model, optimizer, epoch)
            scheduler.step()
            rec.commit(epoch, loss_train=loss)
    return model
