"""The demo as a user runs it: what it writes, and what it says about inputs it cannot use."""

import runpy
import sys

import pytest
import torch
from torch.distributions import Independent, Normal

from pyro_bayes import demo
from pyro_bayes.demo import digits, plain, regression, table
from pyro_bayes.likelihoods import Categorical
from pyro_bayes.likelihoods.predictive import Predictive

PNG = b"\x89PNG\r\n\x1a\n"
ROWS = [f"{i},{i * i % 7},{2 * i + i % 3}" for i in range(40)]


def csv(*lines, header="a,b,y"):
    return "\n".join((header, *lines)).encode()


def run(*arguments, folder):
    return demo.main([*map(str, arguments), "--smoke", "--output", str(folder / "figures")])


def assert_figure(path):
    content = path.read_bytes()
    assert content.startswith(PNG)
    assert len(content) > 20_000
    assert int.from_bytes(content[16:20], "big") == 1200


def test_both_tasks(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert run(folder=tmp_path) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    for name in ("digits", "regression"):
        path = tmp_path / "figures" / f"{name}.png"
        assert f"Figure: {path}" in out
        assert_figure(path)
    for word in ("log-likelihood", "misclassified", "calibration error", "RMSE", "90% interval"):
        assert word in out
    assert torch.get_num_threads() == threads


def test_own_table(tmp_path, capsys):
    path = tmp_path / "own.csv"
    rows = [f"{row},0.1" for row in ROWS]
    header = '"a [red]", b ,"the\n$y$ in $",constant'
    path.write_bytes(b"\xef\xbb\xbf" + csv(*rows, "", header=header))
    assert run("--data", path, "--target", "the $y$ in $", folder=tmp_path) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "the $y$ in $: 30 rows to learn from, 10 to test" in out
    assert_figure(tmp_path / "figures" / "regression.png")
    assert not (tmp_path / "figures" / "digits.png").exists()


def test_smoke_takes_few_steps_whatever_the_table(tmp_path, monkeypatch):
    path, sizes = tmp_path / "large.csv", []
    path.write_bytes(csv(*[f"{i},{i * i % 7},{2 * i + i % 3}" for i in range(3000)]))

    def note(data, **_):
        sizes.append(len(data.y) + len(data.y_test))
        raise table.InputError("enough")

    monkeypatch.setattr(regression, "train_plain", lambda net, likelihood, data, **_: note(data))
    run("--data", path, "--target", "y", folder=tmp_path)
    assert sizes == [1000]


BAD_TABLES = {
    "missing column": (csv(*ROWS), "'z'"),
    "text": (csv(*ROWS, "1,Paris,3"), "a number in column 'b', line 42; got 'Paris'"),
    "no value": (csv(*ROWS, "1,,3"), "a number in column 'b', line 42; got ''"),
    "underscore": (csv(*ROWS, "1,1_000,3"), "column 'b', line 42; got '1_000'"),
    "line break": (csv(*ROWS, '1,"x\ny",3'), r"column 'b', line 43; got 'x\ny'"),
    "nan": (csv(*ROWS, "1,2,NaN"), "a finite number in column 'y', line 42; got 'NaN'"),
    "infinite": (csv(*ROWS, "-inf,2,3"), "a finite number in column 'a', line 42; got '-inf'"),
    "too large": (csv(*ROWS, "1,1e39,3"), "a finite number in column 'b', line 42; got '1e39'"),
    "too few cells": (csv(*ROWS, "1,2"), "3 cells in line 42; got 2"),
    "too many cells": (csv(*ROWS, "1,2,3,4"), "3 cells in line 42; got 4"),
    "blank line between": (csv(*ROWS, "", "1,2,x"), "column 'y', line 43; got 'x'"),
    "empty file": (b"", "a line of column names"),
    "header only": (csv(), "at least 20 rows"),
    "few rows": (csv(*ROWS[:19]), "at least 20 rows"),
    "no features": (csv(*map(str, range(30)), header="y"), "features beside 'y'"),
    "constant features": (csv(*[f"1,2,{i}" for i in range(30)]), "varies beside 'y'"),
    "constant target": (csv(*[f"{i},2,0.1" for i in range(30)]), "'y' to vary; got 0.1"),
    "same names": (csv(*ROWS, header="a,a,y"), "different names; got 'a' 2 times"),
    "same target": (csv(*ROWS, header="y,b,y"), "different names; got 'y' 2 times"),
    "semicolons": (csv("1;2;3", header="a;b;y"), "'a;b;y'"),
    "open quote": (csv(*ROWS, '"1,2,3'), "comma-separated values"),
    "not text": (csv(*ROWS).decode().encode("utf-16"), "UTF-8"),
    "latin-1": (csv(*ROWS, header="größe,b,y").decode().encode("latin-1"), "UTF-8"),
}


def assert_one_line(capsys, fragment):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1
    assert fragment in err
    return err


@pytest.mark.parametrize(("content", "fragment"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_table(tmp_path, capsys, content, fragment):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    target = "z" if fragment == "'z'" else "y"
    assert run("--data", path, "--target", target, folder=tmp_path) == 2
    line = assert_one_line(capsys, fragment)
    assert line.startswith("Expected ")
    assert "; got " in line


BAD_ARGUMENTS = {
    "no target": (["--data", "a.csv"], "got --data alone"),
    "no data": (["--target", "y"], "got --target alone"),
    "no file": (["--data", "a.csv", "--target", "y"], "'a.csv' (No such file or directory)"),
    "folder": (["--data", ".", "--target", "y"], "'.' (Is a directory)"),
    "negative seed": (["--seed=-1"], "from 0 to 2**32 - 1; got '-1'"),
    "text as seed": (["--seed", "one"], "from 0 to 2**32 - 1; got 'one'"),
    "unknown": (["--sead", "1"], "--sead"),
    "output is a file": (["--output", "taken"], "--output to be a folder to write to; got 'taken'"),
}


@pytest.mark.parametrize(("arguments", "fragment"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, fragment):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    assert demo.main(arguments) == 2
    assert_one_line(capsys, fragment)


def test_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "--target", "y"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("pyro_bayes.demo", run_name="__main__")
    assert exit_.value.code == 2
    assert_one_line(capsys, "--target")


@pytest.mark.parametrize("package", ["matplotlib", "numpy", "rich", "sklearn", "torchmetrics"])
def test_missing_package(monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert demo.main([]) == 2
    assert_one_line(capsys, f"'{package}' to be installed; got none")


def test_minibatches_cover_the_data_and_repeat_under_a_seed():
    x, y = torch.arange(10.0), torch.arange(10)
    loaders = [plain.minibatches(x, y, size=3, seed=1) for _ in range(2)]
    for _ in range(2):
        first, second = map(list, loaders)
        assert [len(labels) for _, labels in first] == [3, 3, 3]
        assert len(torch.cat([labels for _, labels in first]).unique()) == 9
        for (inputs, labels), (_, again) in zip(first, second, strict=True):
            assert torch.equal(labels, again)
            assert torch.equal(inputs, labels.float())
    (batch,) = plain.minibatches(x, y, size=64, seed=1)
    assert len(batch[1]) == 10


def test_scores_of_digits():
    # Confidence 0.9 and right 8 of 10 times; 0.6 and right 5 of 5 times; 1.0 and right.
    probs = torch.tensor([[0.9, 0.1]] * 10 + [[0.4, 0.6]] * 5 + [[1.0, 0.0]])
    labels = torch.tensor([0] * 8 + [1] * 2 + [1] * 5 + [0])
    score = digits.score(plain.predict(torch.nn.Identity(), Categorical(), probs.log()), labels)
    assert score.error == "12.5%"
    assert float(score.calibration) == pytest.approx((5 * 0.4 + 10 * 0.1) / 16, abs=1e-3)
    expected = probs[range(16), labels].log()
    torch.testing.assert_close(score.log_likelihoods, expected)


def test_scores_of_regression_are_in_the_targets_own_unit():
    x = torch.randn(40, 2, dtype=torch.float64)
    target = 5 + 3 * x[:, 0]
    data = regression.split(table.Table(x, target, "ab", "y"), seed=0)
    assert data.y.mean().item() == pytest.approx(0, abs=1e-6)
    assert data.y.std(correction=0).item() == pytest.approx(1, rel=1e-5)
    loc = torch.randn(200, 10, 1)
    score = regression.score(Predictive(Independent(Normal(loc, 0.5), 1)), data)
    truth = (data.location + data.scale * data.y_test).squeeze(-1)
    assert {round(v, 4) for v in truth.tolist()} <= {round(v, 4) for v in target.tolist()}
    own = Normal(data.location + data.scale * loc.squeeze(-1), 0.5 * data.scale)
    expected = own.log_prob(truth).exp().mean(0).log()
    torch.testing.assert_close(score.log_likelihoods, expected, rtol=1e-4, atol=1e-5)
    error = (own.mean.mean(0) - truth).square().mean().sqrt()
    assert float(score.error) == pytest.approx(error.item(), rel=1e-3)
    samples = own.sample((100,)).flatten(0, 1)
    low, high = samples.quantile(torch.tensor([0.05, 0.95]), dim=0)
    assert score.calibration == f"{((low < truth) & (truth < high)).double().mean():.1%}"


@pytest.mark.parametrize("column", ["b", "y"])
def test_far_values_do_not_overflow(column):
    x = torch.arange(80.0, dtype=torch.float64).reshape(40, 2)
    y = x[:, 0].clone()
    _, test = regression.train_test_split(range(40), test_size=10, random_state=0)
    (x[:, 1] if column == "b" else y)[test[0]] = 1e38
    with pytest.raises(table.InputError, match=rf"'{column}'; got one that is .*e\+36 standard"):
        regression.split(table.Table(x, y, "ab", "y"), seed=0)
