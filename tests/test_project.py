"""The door, the import, and the documents."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from torch import nn

import pyro_bayes
from pyro_bayes.evaluation import plots, to_arviz
from pyro_bayes.likelihoods.predictive import Predictive
from pyro_bayes.prediction.batch_norm import update_batch_norm
from pyro_bayes.training import History, diagnose
from pyro_bayes.training.schedule import LinearWarmup

ROOT = Path(__file__).parent.parent
MODULES = ["pyro_bayes"] + [
    module.name
    for module in pkgutil.walk_packages(pyro_bayes.__path__, "pyro_bayes.")
    if not module.name.endswith("__main__")
]


def test_door():
    parts = ["ELBO", "BayesianModel", "evaluate", "fit", "likelihoods", "svi_model"]
    assert pyro_bayes.__all__ == parts


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    scope = {"torch": torch, "nn": nn, "pyro": pyro, **vars(module)}
    failed, _ = doctest.testmod(module, extraglobs=scope, optionflags=flags)
    assert failed == 0


def test_public_docstrings_have_an_example():
    model = pyro_bayes.BayesianModel
    for name in ("__doc__", "sample_params", "sample_model", "reparameterize", "kl_divergence",
                 "lift", "exact_kl", "mean", "predict", "summary"):  # fmt: skip
        text = model.__doc__ if name == "__doc__" else getattr(model, name).__doc__
        assert ">>>" in text, name
    for part in (pyro_bayes.ELBO, pyro_bayes.evaluate, pyro_bayes.fit, pyro_bayes.svi_model,
                 to_arviz, update_batch_norm, diagnose, History, Predictive, LinearWarmup,
                 *(getattr(plots, name) for name in plots.__all__ if name != "Losses"),
                 *pyro_bayes.likelihoods.REGISTRY.values()):  # fmt: skip
        assert ">>>" in part.__doc__, part


def test_help_on_classes_is_their_own():
    for name in MODULES:
        module = importlib.import_module(name)
        for kind in vars(module).values():
            own = inspect.isclass(kind) and kind.__module__ == name
            if own and not kind.__name__.startswith("_"):
                assert "internal Module state" not in (inspect.getdoc(kind.__init__) or "")


def test_importing_changes_nothing_and_needs_torch_and_pyro_only():
    code = """
import importlib.metadata, logging, sys, warnings
import torch, pyro, pyro.infer.autoguide, pyro.contrib.zuko
before = (
    torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(),
    pyro.settings.get(), list(pyro.get_param_store()), logging.getLogger().handlers[:],
    list(warnings.filters), set(vars(torch.Tensor)), set(vars(torch.nn.Module)),
)
loaded = set(sys.modules)
import pyro_bayes
after = (
    torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(),
    pyro.settings.get(), list(pyro.get_param_store()), logging.getLogger().handlers[:],
    list(warnings.filters), set(vars(torch.Tensor)), set(vars(torch.nn.Module)),
)
assert before == after
new = {name.split(".")[0] for name in set(sys.modules) - loaded} - set(sys.stdlib_module_names)
assert new <= {"pyro_bayes", "torch", "pyro"}, new
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


def test_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    scope = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)


def test_modules_stay_small():
    for path in (ROOT / "pyro_bayes").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path.name


# From the bottom: a room imports what stands before it, and rooms of one floor each other.
FLOORS = (
    {"base"},
    {"posterior", "priors", "noise"},
    {"pyro_bridge"},
    {"prediction"},
    {"likelihoods"},
    {"model"},
    {"training"},
    {"evaluation"},
    {"demo"},
)


def test_rooms_stand_on_those_below():
    """Also for types: what is imported for a checker only is an import here."""
    floors = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    for path in (ROOT / "pyro_bayes").rglob("*.py"):
        room = path.relative_to(ROOT / "pyro_bayes").parts[0].removesuffix(".py")
        nodes = ast.walk(ast.parse(path.read_text()))
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        modules = [f"{node.module}.{alias.name}" for node in imports for alias in node.names]
        for module in modules if room in floors else ():
            package, part, *_ = module.split(".")
            above = package == "pyro_bayes" and floors.get(part, -1) > floors[room]
            assert not above, f"{path.name} imports {module}"


def test_no_assert_on_input():
    for path in (ROOT / "pyro_bayes").rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), path.name


def whole_graphs_are_told_from_parts():
    """What a backward pass, and then one for a single input, say of another leaf's node."""
    found, x = [], torch.ones((), requires_grad=True)

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, probe):
            ctx.probe = probe.grad_fn
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            found.append(torch._C._will_engine_execute_node(ctx.probe))  # scores
            return grad, None

    def looked():
        return Look.apply(x, torch.ones((), requires_grad=True).view(()))

    looked().backward()
    torch.autograd.grad(looked(), x)
    return found


def test_private_parts_of_torch_and_pyro_are_where_we_use_them():
    """Each private name, and the modules that use it."""
    linear = nn.Linear(1, 1)
    assert isinstance(linear._parameters, dict)  # swap, guide
    assert isinstance(nn.Sequential(linear)._modules, dict)  # swap, guide, tied
    assert callable(torch.Tensor._make_wrapper_subclass)  # gaussian_tensor
    with torch._C.DisableTorchFunctionSubclass():  # gaussian_tensor
        pass
    assert callable(torch.utils._python_dispatch.TorchDispatchMode)  # predict
    pair = [torch.zeros(2, 1), torch.ones(())]
    side_by_side = torch._utils._flatten_dense_tensors(pair)  # flat
    torch.testing.assert_close(torch._utils._unflatten_dense_tensors(side_by_side, pair), pair)
    with torch._C._ExcludeDispatchKeyGuard(
        torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)  # flat
    ):
        assert not side_by_side.view(3, 1)._is_view()
    assert side_by_side._version == 0  # fused, state
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None  # noise
    assert torch._C._functorch.maybe_current_level() is None  # noise
    assert torch.autograd.forward_ad._current_level == -1  # flat
    assert torch._C._autograd._get_current_graph_task_keep_graph()  # flat
    assert linear._buffers == {}  # prior, state
    assert linear.weight._backward_hooks is None  # scores
    assert callable(torch.ops.aten.convolution_backward)  # rules.convolution
    assert whole_graphs_are_told_from_parts() == [True, False]

    def popped(x):
        level = torch._C._functorch.maybe_current_level()
        with torch._functorch.pyfunctorch.temporarily_pop_interpreter_stack():  # noise
            outside = torch._C._functorch.maybe_current_level()
        return x * (level == 1 and outside is None)

    assert torch.vmap(popped)(torch.ones(1)).item() == 1
    assert callable(pyro.nn.PyroModule._pyro_set_supermodule)  # model
    with pyro.settings.context(module_local_params=True):
        assert pyro.nn.PyroModule()._pyro_context.param_state == {"params": {}, "constraints": {}}
    assert callable(nn.Module._apply)  # guide, model
    for method in ("_setup_prototype", "_get_loc_and_scale"):  # guide
        assert method in vars(pyro.infer.autoguide.AutoNormal)
