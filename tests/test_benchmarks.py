"""The benchmarks run, and say what the README repeats."""

import re
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    """Returns a script as a module; to import it all in a process of its own takes long."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a script may set it
    return import_module


def test_gradient_variance(script, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- gradient-variance -->\n<!-- /gradient-variance -->\nafter\n")
    script("gradient_variance").main(["--smoke", "--output", str(path)])
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert text.count("| local noise |") >= 4


def test_speed(script, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- speed -->\n<!-- /speed -->\nafter\n")
    script("speed").main(["--smoke", "--nets", "small", "flow", "--output", str(path)])
    text = path.read_text()
    assert text.endswith("after\n")
    written, fused, compared = re.findall(
        r"^\*\*(?:A step with|SVI ÷).*?(?=^\*\*)", text, re.DOTALL | re.MULTILINE
    )
    times = r"\| \d.* \| \d.* \|\n"  # on both networks
    for part in (written, fused):
        for ours in ("draws of weights", "local noise", "`ELBO`, draws of weights", "SVI"):
            assert re.search(rf"\| pyro_bayes, {ours} {times}", part)
    assert "not installed" in written or find_spec("blitz")
    assert "*cannot*: torchopt has no fused Adam (`small`: posteriors / `flow`: post" in fused
    for adam in ("Adam as users write it", r"`Adam\(…, fused=True\)`"):
        assert re.search(rf"\| pyro_bayes, SVI \| {adam} \| \d.* \| cannot \|", compared)
    assert (tmp_path / "cost.png").exists()


@pytest.mark.parametrize("fused", [False, True])
def test_all_contenders_use_the_same_adam(monkeypatch, fused):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    nets, contenders = import_module("nets"), import_module("contenders")
    used, init = [], torch.optim.Adam.__init__

    def spy(self, parameters, **options):
        used.append(options)
        init(self, parameters, **options)

    monkeypatch.setattr(torch.optim.Adam, "__init__", spy)
    problem = replace(nets.PROBLEMS["small"], fused=fused)
    expected = {"lr": nets.LEARNING_RATE} | ({"fused": True} if fused else {})
    for name in contenders.CONTENDERS:
        used.clear()
        running, failures = contenders.start([name], problem)
        if failures:
            assert failures[name] in ("not installed", "cannot: torchopt has no fused Adam")
            continue
        running[name].step()
        if name != "posteriors":  # has torchopt's
            assert used
            assert all(options == expected for options in used), name


def test_reasons_are_below_the_table(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    rows = [["x", "1.0", "cannot: no layer"], ["y", "cannot: no layer", "cannot: no layer"]]
    lines = import_module("section").table(["", "a", "b"], rows).splitlines()
    assert lines[2:4] == ["| x | 1.0 | cannot |", "| y | cannot | cannot |"]
    assert lines[4:] == ["", "*cannot*: no layer (a: y / b: x; y)."]


def test_readme_repeats_the_figures():
    """On a dense net, the variance is at least 10 and 100 times lower."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    dense = text[text.index("**Digits, 64-200-200-200-10 ReLU net.**") :]
    rows = re.findall(r"\| (μ|log σ²) \| local noise \|(.*)\|", dense)[:2]
    factors = {kind: [float(f) for f in re.findall(r"\((.*?)×\)", row)] for kind, row in rows}
    assert min(factors["μ"]) >= 10
    assert min(factors["log σ²"]) >= 100
    readme = (ROOT / "README.md").read_text()
    for epoch, column in (("epoch 10", 2), ("epoch 30", 5)):
        row = re.search(rf"\| (?:digits, 64.*|the same), {epoch} \|(.*)\|", readme).group(1)
        _, _, mean, logvar = (float(cell) for cell in row.split("|"))
        assert abs(mean - factors["μ"][column]) <= 1
        assert abs(logvar - factors["log σ²"][column]) <= 1


# UCI


@pytest.fixture
def uci(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    names = ("data", "networks", "published", "__main__")
    return {name: import_module(f"benchmarks.uci.{name}") for name in names}


def made(size=40, inputs=3):
    random = np.random.RandomState(0)
    x = random.randn(size, inputs)
    return x, 5 + 3 * x[:, 0] + 0.1 * random.randn(size)


def test_uci_table(uci, tmp_path):
    for name in ("yacht", "boston"):
        x, y = made()
        np.savez(tmp_path / f"{name}.npz", X=x, y=y)
    csv = tmp_path / "published.csv"
    rows = ["dataset,method,metric,mean,err,status"]
    for name in ("yacht", "boston"):
        rows += [f"{name},DVI (full),LL,-1e9,0.02,read", f"{name},PBP,LL,-2e9,0.1,read"]
        rows += [f"{name},Deep ensembles (M=5),LL,1e9,0.2,read", f"{name},PBP,RMSE,0.5,,memory"]
    csv.write_text("\n".join(rows))
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- uci -->\n<!-- /uci -->\nafter\n")
    options = ["--data", tmp_path, "--published", csv, "--datasets", "yacht", "boston"]
    options += ["--splits", 2, "--steps", 3, "--draws", 5]
    options += ["--processes", 1, "--batch-size", 20, "--output", path]
    uci["__main__"].main([str(option) for option in options])
    text = path.read_text()
    assert text.endswith("after\n")
    assert text.count("| **pyro_bayes** |") == 2
    assert re.search(r"\| `yacht` \| DVI, -1000000000.00 \| \+.* \| above \| -", text)
    assert "PBP, mean field | -2000000000.00 ± 0.10" in text
    assert "0.50" not in text  # what nobody has read


def test_uci_missing_data(uci, tmp_path):
    options = ["--data", str(tmp_path), "--datasets", "wine", "--processes", "1"]
    with pytest.raises(SystemExit, match=r"wine.npz, with the arrays X \(N, D\) and y \(N,\)"):
        uci["__main__"].main(options)
    with pytest.raises(uci["data"].Missing, match=r"OpenML is known to have; got power\. Name a"):
        uci["data"].load("power", None)


def test_uci_openml(uci, monkeypatch):
    import sklearn.datasets

    def fetch(size):
        frame = pandas.DataFrame(np.zeros((size, 6)))
        return lambda **_: (frame, pandas.Series(np.ones(size)))

    pandas = pytest.importorskip("pandas")
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch(308))
    x, y = uci["data"].load("yacht", None)
    assert (x.shape, y.shape) == ((308, 6), (308,))
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch(307))
    with pytest.raises(uci["data"].Missing, match=r"\(308, 6\); got \(307, 6\) from OpenML"):
        uci["data"].load("yacht", None)

    def fail(**_):
        raise OSError("no network")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fail)
    with pytest.raises(uci["data"].Missing, match=r"reach; got: no network\. Name a folder"):
        uci["data"].load("yacht", None)


def test_uci_splits(uci, tmp_path):
    x, y = made()
    order = np.random.RandomState(1)
    first, second = order.permutation(40), order.permutation(40)
    splits = uci["data"].split(x, y, validation=False, count=2)
    assert splits.x.shape == (36, 2, 3)
    assert splits.y_test.shape == (4, 2)
    for k, rows in enumerate((first, second)):
        train, test = y[rows[:36]], y[rows[36:]]
        expected = (np.stack([test, test]) - train.mean()) / train.std()
        torch.testing.assert_close(splits.y_test[:, k].double(), torch.tensor(expected[0]))
        assert splits.scale[k].item() == pytest.approx(train.std())
        torch.testing.assert_close(splits.x[:, k].mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    np.savez(tmp_path / "yacht.npz", X=x, y=y, perm=np.stack([first] * 20))
    with pytest.raises(ValueError, match="standard splits"):
        uci["data"].load("yacht", tmp_path)


def test_uci_validation_leaves_the_test_part_alone(uci):
    x, y = made()
    tested = np.random.RandomState(1).permutation(40)[36:]
    x[tested], y[tested] = np.nan, np.nan
    splits = uci["data"].split(x, y, validation=True, count=1)
    assert len(splits.x) == 32
    assert len(splits.x_test) == 4
    assert all(t.isfinite().all() for t in (splits.x, splits.y, splits.x_test, splits.y_test))


def test_uci_splits_share_nothing(uci):
    from pyro_bayes import ELBO, BayesianModel, likelihoods

    networks = uci["networks"]
    splits = uci["data"].split(*made(), validation=False, count=3)
    bnn = BayesianModel(
        networks.Networks(3, 3), -2.0, prior_var=networks.PRIORS["input"], leaves="named"
    )
    objective = ELBO(bnn, likelihoods.HeteroscedasticGaussian(), 36, local_trick=True)

    def gradients():
        torch.manual_seed(0)
        return torch.autograd.grad(objective(splits.x, splits.y), list(bnn.parameters()))

    before = gradients()
    splits.x[:, 1] += 1
    with torch.no_grad():
        for parameter in bnn.parameters():
            parameter[1] += 0.1
    for old, new in zip(before, gradients(), strict=True):
        torch.testing.assert_close(old[::2], new[::2])
        assert not torch.allclose(old[1], new[1])


@pytest.mark.parametrize("prior", ["unit", "empirical"])
def test_uci_scores_are_in_original_units(uci, prior):
    setting = uci["networks"].Setting(steps=150, learning_rate=0.03, draws=50, prior=prior)
    x, y = made(100)
    scores = [
        uci["networks"].evaluate(
            uci["data"].split(x, scale * y, validation=False, count=2), setting
        )
        for scale in (1, 10)
    ]
    torch.testing.assert_close(scores[1].rmse, 10 * scores[0].rmse, rtol=1e-2, atol=0)
    shift = torch.full((2,), np.log(10), dtype=torch.float32)
    torch.testing.assert_close(
        scores[0].log_likelihood - scores[1].log_likelihood, shift, rtol=1e-2, atol=0
    )
    assert scores[0].elbo - scores[1].elbo == pytest.approx(np.log(10), rel=1e-2)
    assert (scores[0].rmse < 1.5).all()  # of 3
    assert (scores[0].log_likelihood > -1.8).all()


def test_readme_repeats_the_uci_table():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    rows = re.findall(r"\| `(\w+)` \| [^|]*, -?[\d.]+ \| ([+-][\d.]+) \| [\d.]+ \| (\S+) \|", text)
    assert len(rows) == 7
    missed = {name: gap for name, gap, verdict in rows if verdict == "**below**"}
    assert missed == {"boston": "-0.12", "wine": "-0.03"}
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "on five, and fall short of it on `boston` (by 0.12 nats) and `wine` (by 0.03)" in readme
    assert "six minutes of one core" in readme
    assert "6 minutes of one core" in text
