"""Figures: what they show, and what they leave alone."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pyro.distributions import Normal
from torch import nn

from pyro_bayes import BayesianModel
from pyro_bayes.evaluation import plots
from pyro_bayes.likelihoods import Gaussian
from pyro_bayes.priors import Empirical, Hierarchical
from pyro_bayes.training import History

CONFIDENCE = torch.tensor([0.05, 0.55, 0.58, 0.95, 0.97, 0.99, 1.0])
CORRECT = torch.tensor([0, 0, 1, 1, 1, 0, 1])
GRID = torch.linspace(-2, 2, 9).unsqueeze(-1)


HISTORY = History(
    nll=[2.0, 1.5, 1.2], kl=[0.1, 0.2, 0.3], loss=[2.1, 1.7, 1.5], validation=[2.2, 1.9]
)


@pytest.fixture
def bnn():
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    return BayesianModel(net, init_logvar=-2.0, prior_var=0.25)


def band(bnn, **options):
    x = GRID[torch.randperm(9)]
    return plots.regression_band(x, Gaussian(0.5).predictive(bnn, x), **options)


DRAW = {
    "reliability": lambda bnn, **o: plots.reliability(CONFIDENCE, CORRECT, **o),
    "pit_histogram": lambda bnn, **o: plots.pit_histogram(torch.rand(50, 2), **o),
    "prior_predictive": lambda bnn, **o: plots.prior_predictive(bnn, GRID, 20, **o),
    "regression_band": band,
    "rejection_curve": lambda bnn, **o: plots.rejection_curve(CONFIDENCE, CORRECT, **o),
    "scale_histogram": lambda bnn, **o: plots.scale_histogram(bnn, **o),
    "signal_histogram": lambda bnn, **o: plots.signal_histogram(bnn, **o),
    "training_curves": lambda bnn, **o: plots.training_curves(HISTORY, **o),
}


def line(ax, label):
    (found,) = [line for line in ax.get_lines() if line.get_label() == label]
    return torch.tensor(found.get_xydata()).T


def test_cases_are_all_figures():
    assert {*DRAW, "Losses"} == set(plots.__all__)


@pytest.mark.parametrize("name", DRAW)
def test_axes(name, bnn, tmp_path):
    ax = DRAW[name](bnn)
    assert isinstance(ax, Axes)
    ax.figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    own = Figure().add_subplot()
    assert DRAW[name](bnn, ax=own) is own
    with pytest.raises(TypeError, match=r"Expected ax to be one Axes .*; got Figure"):
        DRAW[name](bnn, ax=Figure())


@pytest.mark.parametrize("name", DRAW)
def test_missing_matplotlib_names_the_extra(name, bnn, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro_bayes\[plot\]'"):
        DRAW[name](bnn)


def test_pyplot_is_not_touched():
    code = """
import sys, torch
from pyro_bayes.evaluation import plots
assert not {"matplotlib", "torchmetrics", "arviz", "rich"} & set(sys.modules)
plots.reliability(torch.rand(9), torch.rand(9) < 0.5).figure.canvas
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "name", ["reliability", "pit_histogram", "rejection_curve", "prior_predictive"]
)
def test_calls_add_up(name, bnn):
    ax = DRAW[name](bnn, label="one")
    reference = len(ax.get_legend_handles_labels()[1]) - 1
    for label in ("two", "three"):
        assert DRAW[name](bnn, ax=ax, label=label) is ax
    labels = ax.get_legend_handles_labels()[1]
    assert [label for label in labels if label in ("one", "two", "three")] == [
        "one",
        "two",
        "three",
    ]
    assert len(labels) == 3 + reference
    assert len(ax.get_legend().get_texts()) == len(labels)


# What they show


def test_reliability():
    ax = plots.reliability(CONFIDENCE, CORRECT, bins=10, label="net")
    (container,) = ax.containers
    points, _, (bars,) = container.lines
    torch.testing.assert_close(
        torch.tensor(points.get_xydata()),
        torch.tensor([[0.05, 0.0], [0.565, 0.5], [0.9775, 0.75]], dtype=torch.double),
    )
    low, high = bars.get_segments()[2][:, 1]
    assert (low, high) == pytest.approx((0.3006, 0.9544), abs=1e-4)  # Wilson's, of 3 in 4
    low, high = bars.get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0, 0.7935), abs=1e-4)  # of 0 in 1
    steps = ax.patches[0].get_data()
    assert steps.values.tolist() == pytest.approx([1 / 7, 0, 0, 0, 0, 2 / 7, 0, 0, 0, 4 / 7])


def test_pit_histogram():
    ax = plots.pit_histogram(torch.tensor([0.0, 0.1, 0.3, 1.0]), bins=4, label="net")
    steps = ax.patches[1].get_data()
    assert steps.values.tolist() == [2, 1, 0, 1]
    assert ax.get_ylim()[1] > 2
    many = plots.pit_histogram(torch.rand(4000), bins=20)
    values = many.patches[1].get_data().values
    band = many.patches[0].get_extents().transformed(many.transData.inverted())
    assert ((values > band.y0) & (values < band.y1)).mean() >= 0.8
    assert band.y1 - 1 == pytest.approx(1.96 * (19 / 4000) ** 0.5, rel=1e-3)


def test_regression_band(bnn):
    x = torch.linspace(-2, 2, 9).unsqueeze(-1)
    predictive = Gaussian(0.5).predictive(bnn, x, 200)
    shuffled = torch.randperm(9)
    mixed = Gaussian(0.5).distribution(predictive.mixture.base_dist.loc[:, shuffled], batch_dims=2)
    ax = plots.regression_band(
        x[shuffled], type(predictive)(mixed), level=0.8, data=(x, x), label="net"
    )
    torch.testing.assert_close(
        line(ax, "net"), torch.cat([x, predictive.mean], 1).T.double(), check_dtype=False
    )
    outer, inner = (torch.tensor(c.get_paths()[0].vertices) for c in ax.collections)
    low, high = predictive.interval(0.8)
    for band, (lower, upper) in (
        (outer, (low, high)),
        (inner, (predictive.mean - 1.2816 * predictive.epistemic.sqrt(),
                 predictive.mean + 1.2816 * predictive.epistemic.sqrt())),
    ):  # fmt: skip
        for i in range(9):
            ys = band[band[:, 0] == x[i].double()][:, 1]
            assert ys.min() == pytest.approx(lower[i].item(), abs=1e-4)
            assert ys.max() == pytest.approx(upper[i].item(), abs=1e-4)
    torch.testing.assert_close(line(ax, "data"), torch.cat([x, x], 1).T.double())


def test_rejection_curve():
    uncertainty = torch.tensor([0.1, 0.4, 0.2, 0.2, 0.9])
    error = torch.tensor([0.0, 1.0, 0.0, 2.0, 5.0])
    ax = plots.rejection_curve(uncertainty, error, label="net")
    rejected, mean = line(ax, "net")
    assert rejected.tolist() == pytest.approx([0.8, 0.6, 0.4, 0.2, 0])
    # Two are equally uncertain: their errors are averaged.
    assert mean.tolist() == pytest.approx([0, 0.5, 2 / 3, 0.75, 1.6])
    rejected, best = line(ax, "by the error itself")
    assert best.tolist() == pytest.approx([0, 0, 1 / 3, 0.75, 1.6])
    (whole,) = line(ax, "none rejected")[1].unique().tolist()
    assert whole == pytest.approx(1.6)


@pytest.mark.parametrize(
    ("draw", "reference"), [(plots.scale_histogram, 0.5), (plots.signal_histogram, 1.0)]
)
def test_histograms_of_layers(draw, reference, bnn):
    with torch.no_grad():
        bnn.guide.posterior()["0.weight"][1].fill_(-6.0)
        bnn.guide.posterior()["0.weight"][0].zero_()
    ax = draw(bnn)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["2", "0"]
    second, first = (patch.get_data() for patch in ax.patches)
    posterior = bnn.guide.posterior()
    for steps, layer, place in ((first, "0", 1), (second, "2", 0)):
        values = torch.cat([
            (0.5 * logvar).exp().flatten()
            if draw is plots.scale_histogram
            else (mean.abs() / (0.5 * logvar).exp()).flatten()
            for name, (mean, logvar) in posterior.items()
            if name.startswith(layer)
        ]).detach().double()  # fmt: skip
        edges = torch.from_numpy(steps.edges)
        counts = torch.histogram(values.clamp(edges[0], edges[-1]), edges).hist
        heights = torch.from_numpy(steps.values) - place
        torch.testing.assert_close(heights, 0.85 * counts / counts.max())
        assert steps.edges[-1] > values.max()
    (dashed,) = [line for line in ax.get_lines() if line.get_linestyle() == "--"]
    assert dashed.get_xdata()[0] == pytest.approx(reference)


def test_lines_of_several_priors(net):
    bnn = BayesianModel(net, -2.0, prior_var={"0.weight": Empirical(each=1, least=0.0), "": 0.25})
    first, second = plots.scale_histogram(bnn).collections[::-1]  # from the top
    variances = bnn.guide.priors.present("0.weight").flatten().tolist()
    expected = sorted(math.sqrt(v) for v in (*variances, 0.25))
    assert [s[0, 0] for s in first.get_segments()] == pytest.approx(expected)
    assert [s[:, 0].tolist() for s in second.get_segments()] == [[0.5, 0.5]]
    assert first.get_segments()[0][:, 1].tolist() == [1, 1.85]


def test_prior_predictive_of_functions():
    """Outputs of a linear model are Gaussian: the band and the first draws are known."""
    bnn = BayesianModel(nn.Linear(1, 1).double(), prior=Normal(0.5, 2.0))
    x = GRID.double()[torch.randperm(9)]
    with torch.random.fork_rng():
        draws = [bnn.sample_prior() for _ in range(2)]
    ax = plots.prior_predictive(bnn, x, 2000, level=0.8, lines=2)
    for drawn, draw in zip(ax.get_lines(), draws, strict=True):
        t, output = torch.tensor(drawn.get_xydata()).T
        assert (t.diff() > 0).all()
        torch.testing.assert_close(output, t * draw["weight"].item() + draw["bias"].item())
    band = torch.tensor(ax.collections[0].get_paths()[0].vertices)
    for t in x.flatten():
        ys = band[band[:, 0] == t][:, 1]
        mean, deviation = 0.5 + 0.5 * t.item(), 2 * math.sqrt(1 + t.item() ** 2)
        assert ys.min() == pytest.approx(mean - 1.2816 * deviation, abs=0.12 * deviation)
        assert ys.max() == pytest.approx(mean + 1.2816 * deviation, abs=0.12 * deviation)
    bottom, top = ax.get_ylim()
    assert bottom < band[:, 1].min() < band[:, 1].max() < top
    wider = BayesianModel(nn.Linear(1, 1).double(), prior_var=100.0)
    low, high = plots.prior_predictive(wider, x, 50, ax=ax).get_ylim()
    assert low < bottom < top < high


def test_prior_predictive_of_other_outputs():
    bnn = BayesianModel(nn.Linear(2, 3), prior_var=4.0)
    ax = plots.prior_predictive(bnn, torch.eye(2), 2000, function=lambda net, x: net(x).flatten())
    steps = ax.patches[0].get_data()
    widths = steps.edges[1:] - steps.edges[:-1]
    assert (steps.values * widths).sum() == pytest.approx(0.99, abs=1e-3)
    reach = 2.5758 * math.sqrt(8)  # of a weight and a bias
    assert [*steps.edges[[0, -1]]] == pytest.approx([-reach, reach], rel=0.03)
    assert steps.values[16:24].mean() == pytest.approx(0.396 / math.sqrt(8), rel=0.05)
    assert not ax.get_lines()


def test_prior_predictive_of_constants():
    bnn, far = BayesianModel(nn.Linear(1, 1)), lambda net, x: 0 * net(x) + 1e6
    bottom, top = plots.prior_predictive(bnn, GRID, 20, function=far).get_ylim()
    assert bottom < 1e6 < top
    wide = plots.prior_predictive(bnn, GRID.unsqueeze(-1), 20, function=far).patches[0].get_data()
    assert wide.values[1:].tolist() == [0] * 39
    assert wide.edges[0] == 1e6


def test_prior_predictive_leaves_the_network_as_it_is():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
    net[2].eval()
    bnn = BayesianModel(net, prior=Hierarchical())
    bnn.kl_divergence().backward()
    grads = [p.grad.clone() for p in bnn.parameters()]
    state = {key: value.clone() for key, value in bnn.state_dict().items()}
    plots.prior_predictive(bnn, torch.randn(6, 3), 5)
    with pytest.raises(RuntimeError, match="shapes"):
        plots.prior_predictive(bnn, torch.randn(6, 2), 5)
    assert [part.training for part in net] == [True, True, False, True]
    torch.testing.assert_close(dict(bnn.state_dict()), state, rtol=0, atol=0)
    torch.testing.assert_close([p.grad for p in bnn.parameters()], grads, rtol=0, atol=0)
    assert not bnn.swap.is_open


def test_prior_predictive_of_a_former_model(net):
    former = BayesianModel(net, prior_var=100.0)
    BayesianModel(net, prior_var=0.01)
    low, high = plots.prior_predictive(former, torch.ones(4, 3), 50).get_xlim()
    assert high - low > 50


def test_base_that_is_one_layer():
    ax = plots.signal_histogram(BayesianModel(nn.Linear(3, 2)))
    assert [text.get_text() for text in ax.get_yticklabels()] == ["(base)"]


def test_training_curves():
    ax = plots.training_curves(HISTORY)
    assert line(ax, "NLL").tolist() == [[1, 2, 3], HISTORY.nll]
    assert line(ax, "KL / N")[1].tolist() == HISTORY.kl
    assert line(ax, "loss")[1].tolist() == HISTORY.loss
    assert line(ax, "validation NLL").tolist() == [[1, 2], HISTORY.validation]
    short = replace(HISTORY, validation=[])
    assert len(plots.training_curves(short).get_lines()) == 3


# What they refuse


def test_histograms_of_millions_of_parameters(monkeypatch):
    """`torch.quantile` refuses more than 16 million numbers."""
    monkeypatch.setattr(torch.Tensor, "quantile", None)
    bnn = BayesianModel(nn.Linear(30, 200))
    with torch.no_grad():
        bnn.logvars.weight[0, :4] = torch.tensor([-40.0, -40.0, -40.0, 0.0])
    low, high = plots.scale_histogram(bnn).get_xlim()
    assert 1e-4 < low < 0.01 < 1 < high < 2  # but for one in a thousand


def test_rounding_of_probabilities_is_forgiven():
    """Means of probabilities in single precision may be above 1."""
    confidence = torch.tensor([0.5, 1.0000002])
    assert plots.reliability(confidence, torch.ones(2)).get_xlim() == (0, 1)
    assert plots.pit_histogram(confidence - 1e-7).get_xlim() == (0, 1)


BAD = {
    "lengths": (lambda: plots.reliability(CONFIDENCE, CORRECT[:3]), ValueError, "got 7 and 3"),
    "shape": (lambda: plots.rejection_curve(torch.rand(3, 2), torch.rand(3, 2)), ValueError,
              r"uncertainty to be of shape \(N,\).*; got \(3, 2\)"),
    "list": (lambda: plots.reliability([0.5], CORRECT), TypeError, "confidence .*; got list"),
    "nothing": (lambda: plots.pit_histogram(torch.rand(0)), ValueError, r"pit .*; got \(0,\)"),
    "nan": (lambda: plots.pit_histogram(torch.tensor([torch.nan])), ValueError, "pit .* finite"),
    "pit": (lambda: plots.pit_histogram(torch.tensor([0.5, 1.5])), ValueError, "from 0.5 to 1.5"),
    "confidence": (lambda: plots.reliability(2 * CONFIDENCE, CORRECT), ValueError,
                   "confidence to be between 0 and 1; got values from 0.1 to 2"),
    "no bins": (lambda: plots.reliability(CONFIDENCE, CORRECT, bins=0), ValueError, "bins .* 0"),
    "half a bin": (lambda: plots.pit_histogram(CONFIDENCE, bins=0.5), ValueError, "bins .*got 0.5"),
    "level": (lambda: band(BayesianModel(nn.Linear(1, 1)), level=90), ValueError, "level .* 90"),
    "outputs": (lambda: plots.regression_band(
        torch.rand(4), Gaussian(1.0).predictive(BayesianModel(nn.Linear(1, 2)), torch.rand(4, 1))),
        ValueError, r"\(4, 2\)"),
    "one draw": (lambda: plots.prior_predictive(BayesianModel(nn.Linear(1, 1)), GRID, 1),
                 ValueError, "num_samples .* 1"),
    "half a line": (lambda: plots.prior_predictive(BayesianModel(nn.Linear(1, 1)), GRID, lines=0.5),
                    ValueError, "lines .* 0.5"),
    "a state": (lambda: plots.prior_predictive(BayesianModel(nn.LSTM(1, 1)), GRID), TypeError,
                "output that is a tensor; got tuple. Say with function"),
    "infinite": (lambda: plots.prior_predictive(BayesianModel(nn.Linear(1, 1)), GRID / 0),
                 ValueError, "outputs to be finite"),
    "history": (lambda: plots.training_curves(History()), ValueError, "epoch"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, kind, match = BAD[name]
    with pytest.raises(kind, match=match):
        call()
