"""What a notebook shows: tables of networks and experiments, in which text of the user is never markup."""

from html.parser import HTMLParser

import torch

import tsdyn
from tests.cases import small


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.rows, self.tags = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_a_network_shows_its_layers():
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 3, generator=draw), torch.randn(2, 4, generator=draw)]
    shown = Cells(tsdyn.Network(weights, [torch.zeros(4), None])._repr_html_())
    assert shown.rows[1:] == [["1", "3", "4", "linear", "bias", "", "16"], ["2", "4", "2", "linear", "", "", "8"]]


def test_an_experiment_shows_the_keys_that_are_not_at_their_defaults():
    shown = Cells(small(data__law="file", data__path="a<b>&c.npz", training__momentum=0.5)._repr_html_())
    assert shown.tags == {"table", "tr", "td", "th"}
    rows = {row[0]: row[1:] for row in shown.rows[1:]}
    assert rows["data.path"][0] == '"a<b>&c.npz"'
    assert rows["training.momentum"] == ["0.5", "heavy-ball momentum"]
    assert "training.nesterov" not in rows
