"""The benchmarks run, and say what the README repeats."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_gradient_variance(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- gradient-variance -->\n<!-- /gradient-variance -->\nafter\n")
    script = ROOT / "benchmarks" / "gradient_variance.py"
    run = [sys.executable, "-W", "error", script, "--smoke", "--output", path]
    subprocess.run(run, check=True, capture_output=True)
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert text.count("| local noise |") >= 4


def test_speed(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- speed -->\n<!-- /speed -->\nafter\n")
    script = ROOT / "benchmarks" / "speed.py"
    run = [sys.executable, script, "--smoke", "--nets", "small", "--output", path]
    subprocess.run(run, check=True, capture_output=True)
    text = path.read_text()
    assert text.endswith("after\n")
    assert "| pyro_bayes, draws of weights |" in text
    assert "not installed" in text or find_spec("blitz")
    assert (tmp_path / "cost.png").exists()


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
