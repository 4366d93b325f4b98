"""On a GPU, all is as on a CPU, in fewer launches."""

import copy
import math
import subprocess
import sys

import pyro
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile

from pyro_bayes import ELBO, BayesianModel, likelihoods
from pyro_bayes.posterior import gaussian, gpu
from pyro_bayes.posterior.draws import divergence, draw
from pyro_bayes.training.schedule import LinearWarmup

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ESTIMATORS = [False, True, "flipout"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Linear(8 * 64, 64), nn.Tanh(), nn.Linear(64, 5))

    def forward(self, x):
        return self.body(self.norm(self.conv(x)).relu().flatten(1))


@pytest.fixture(params=[torch.float32, torch.float64], ids=["single", "double"])
def bnn(request):
    torch.manual_seed(0)
    return BayesianModel(Net(), init_logvar=-4.0, prior_var=0.5).to("cuda", request.param)


@pytest.fixture
def data(bnn):
    x = torch.randn(16, 3, 8, 8, device="cuda", dtype=next(bnn.parameters()).dtype)
    return x, torch.randint(5, (16,), device="cuda")


def close(found, expected, rtol=2e-4, atol=2e-5):
    torch.testing.assert_close(found.cpu().double(), expected.cpu().double(), rtol=rtol, atol=atol)


def test_kernels_are_at_work(bnn):
    for parameter in (bnn.guide.mean, bnn.guide.mean.detach()):
        assert (gpu.kernels(parameter) is not None) == (parameter.dtype == torch.float32)
    assert gpu.kernels(torch.zeros(3)) is None


def by_formula(flat, outputs):
    """Draws as functions of the posterior, by name."""
    layout, mean, logvar = flat
    epsilon = ((layout.flatten(outputs) - mean) / (0.5 * logvar).exp()).detach()
    same = layout.split(gaussian.draw(mean, logvar, epsilon))
    return dict(zip(layout.names, same, strict=True))


def test_gradients_are_those_of_the_formulas(bnn, data):
    x, y = data
    (flat,) = bnn.guide.flats()
    _, outputs, kl = draw(flat, number="divergence", precision=2.0)
    values = dict(zip(flat.layout.names, outputs, strict=True))
    bnn.base.eval()
    losses = []
    terms = gaussian.divergence_terms(flat.mean, flat.logvar, 2.0).sum()
    for drawn, number in ((values, kl), (by_formula(flat, outputs), terms)):
        losses.append(F.cross_entropy(functional_call(bnn.base, drawn, (x,)), y) + 0.1 * number)
    close(*losses)
    close(divergence(flat, 2.0), terms)
    for own, other in zip(*[torch.autograd.grad(v, flat[1:]) for v in losses], strict=True):
        close(own, other)


def test_log_densities_are_those_of_the_formulas(bnn):
    (flat,) = bnn.guide.flats()
    layout, mean, logvar = flat
    _, outputs, log_densities = draw(flat, number="log_densities")
    same = layout.flatten(by_formula(flat, outputs).values())
    expected = layout.sums(gaussian.log_densities(same, mean, logvar))
    close(log_densities, expected, rtol=1e-4)
    factors = torch.arange(1.0, len(expected) + 1).to(expected)
    first = (factors * log_densities).sum() + layout.flatten(outputs).sin().sum()
    second = (factors * expected).sum() + same.sin().sum()
    pairs = [torch.autograd.grad(loss, (mean, logvar)) for loss in (first, second)]
    for own, other in zip(*pairs, strict=True):
        close(own, other, atol=2e-4)


def test_divergences(bnn):
    on_cpu = copy.deepcopy(bnn).cpu().double()
    close(bnn.kl_divergence(), on_cpu.kl_divergence())
    close(bnn.kl_divergence(prior_var="empirical"), on_cpu.kl_divergence(prior_var="empirical"))


PRIORS = {"one": 0.3, "patterns": {"conv.*": 0.1, "*": 2.0}, "empirical": "empirical"}


@pytest.mark.parametrize("prior_var", PRIORS.values(), ids=PRIORS)
@pytest.mark.parametrize("local_trick", [None, *ESTIMATORS])
def test_gradients_of_divergences(prior_var, local_trick):
    bnn = BayesianModel(Net(), init_logvar=-4.0, prior_var=prior_var).to("cuda")
    on_cpu = copy.deepcopy(bnn).cpu().double()
    if local_trick is None:
        own = bnn.kl_divergence()
    else:
        with bnn.reparameterize_with_kl(local_trick) as (_, own):
            pass
    expected = on_cpu.kl_divergence()
    close(own, expected)
    (3 * own).backward()
    (3 * expected).backward()
    for one, other in zip(bnn.parameters(), on_cpu.parameters(), strict=True):
        close(one.grad, other.grad)


@pytest.mark.parametrize("leaves", ["flat", "named"])
def test_other_strides(leaves):
    net = Net().to("cuda", memory_format=torch.channels_last)
    strides = {name: p.stride() for name, p in net.named_parameters()}
    bnn = BayesianModel(net, init_logvar=-80.0, leaves=leaves)
    with bnn.reparameterize() as base:
        for name, parameter in base.named_parameters():
            assert parameter.stride() == strides[name]
            close(parameter, bnn.means.get_parameter(name))


@pytest.mark.parametrize("leaves", ["flat", "named"])
@pytest.mark.parametrize("local_trick", ESTIMATORS)
def test_training(data, local_trick, leaves):
    x, y = data
    bnn = BayesianModel(Net(), init_logvar=-4.0, leaves=leaves).to(x)
    optimizer = torch.optim.Adam(bnn.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        with bnn.reparameterize(local_trick=local_trick) as net:
            loss = F.cross_entropy(net(x), y) + bnn.kl_divergence() / 1e5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def captured(step):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


@pytest.mark.parametrize("local_trick", ESTIMATORS)
def test_a_step_can_be_captured(bnn, data, local_trick):
    x, y = data
    optimizer = torch.optim.Adam(bnn.parameters(), lr=1e-2, capturable=True)

    def step():
        optimizer.zero_grad()
        with bnn.reparameterize(local_trick=local_trick) as net:
            loss = F.cross_entropy(net(x), y)
        loss = loss + bnn.kl_divergence() / 1e5
        loss.backward()
        optimizer.step()
        return loss.detach()

    graph, loss = captured(step)
    losses = []
    for _ in range(60):
        graph.replay()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert bnn.kl_divergence().isfinite()


LIKELIHOODS = {
    "bernoulli": (likelihoods.Bernoulli, 1),
    "categorical": (likelihoods.Categorical, 5),
    "gaussian": (lambda: likelihoods.Gaussian(0.5, learn=True), 1),
    "heteroscedastic": (likelihoods.HeteroscedasticGaussian, 2),
    "negative binomial": (lambda: likelihoods.NegativeBinomial(2.0), 1),
    "poisson": (likelihoods.Poisson, 1),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_step_of_the_objective_can_be_captured(name):
    make, outputs = LIKELIHOODS[name]
    bnn = BayesianModel(nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, outputs)))
    weight = LinearWarmup(10)
    objective = ELBO(bnn, make(), num_data=500, local_trick=True, kl_weight=weight).to("cuda")
    x = torch.randn(50, 4, device="cuda")
    y = (x.sum(-1) > 0).long() if outputs == 5 else (x.sum(-1, keepdim=True) > 0).float()
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.02, capturable=True)

    def step():
        optimizer.zero_grad()
        loss = objective(x, y)
        loss.backward()
        optimizer.step()
        objective.step()
        return loss.detach()

    graph, loss = captured(step)
    losses = []
    for _ in range(100):
        graph.replay()
        losses.append(loss.item())
    assert objective.kl_weight.weight == 1
    assert losses[-1] < losses[10]


def test_capture_without_a_step_before():
    code = """
import torch
from torch import nn
from pyro_bayes import BayesianModel
from pyro_bayes.posterior import gpu

bnn = BayesianModel(nn.Linear(4, 3)).to("cuda")
torch.zeros(1, device="cuda")
try:  # CUDA may refuse to load a kernel meanwhile
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        bnn.sample_params()
except RuntimeError:
    pass
bnn.sample_params()
assert gpu.kernels(bnn.guide.mean) is not None
"""
    run = [sys.executable, "-W", "error::UserWarning:pyro_bayes", "-c", code]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def test_replays_draw_anew(bnn, data):
    bnn.base.eval()

    def outputs():
        with torch.no_grad(), bnn.reparameterize() as net:
            return net(data[0])

    outputs()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = outputs()
    found = []
    for _ in range(3):
        graph.replay()
        found.append(output.clone())
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


LAUNCHES = {
    "draws": (lambda flat: draw(flat), 2),  # one for the key of the random numbers
    "draws and divergence": (lambda flat: draw(flat, number="divergence"), 4),
    "divergence": (lambda flat: divergence(flat), 2),
    "variances": (lambda flat: draw(flat, "variances"), 1),
}


@pytest.mark.filterwarnings("ignore:Warning. Profiler")
@pytest.mark.parametrize(("compute", "count"), LAUNCHES.values(), ids=LAUNCHES)
def test_launches_are_few(compute, count):
    bnn = BayesianModel(nn.Sequential(*[nn.Linear(16, 16) for _ in range(10)])).to("cuda")
    (flat,) = bnn.guide.flats()
    compute(flat)
    with profile(activities=[ProfilerActivity.CUDA]) as measured:
        compute(flat)
        torch.cuda.synchronize()
    kernels = [e for e in measured.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) <= count, [kernel.name for kernel in kernels]


def test_draws_depend_on_the_seed(bnn):
    torch.manual_seed(1)
    first = bnn.sample_params()
    second = bnn.sample_params()
    torch.manual_seed(1)
    for name, value in bnn.sample_params().items():
        assert torch.equal(value, first[name])
        assert not torch.equal(value, second[name])


@pytest.mark.parametrize("leaves", ["flat", "named"])
def test_parameters_that_move_are_found(leaves):
    net = nn.Linear(4, 3)
    bnn = BayesianModel(net, init_logvar=-30.0, leaves=leaves).to("cuda")
    for _ in range(3):
        bnn.to("cpu")
        bnn.to("cuda")
        assert net.weight.data_ptr() == bnn.means.weight.data_ptr()
        close(bnn.sample_params()["weight"], net.weight, atol=1e-5)
        bnn.means.weight.data = torch.randn(3, 4, device="cuda")
        close(net.weight, bnn.means.weight)


def test_parts_on_different_devices():
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2).to("cuda"))
    bnn = BayesianModel(net, init_logvar=-2.0)
    with bnn.reparameterize() as base:
        loss = base[1](base[0](torch.randn(5, 4)).to("cuda")).sum()
    (loss + bnn.kl_divergence().to("cuda")).backward()
    assert all(p.grad is not None and p.grad.device == p.device for p in bnn.parameters())


def test_second_derivatives(bnn):
    (flat,) = bnn.guide.flats()
    outputs = draw(flat).outputs
    pairs = []
    for drawn in (outputs, by_formula(flat, outputs).values()):
        cubes = (flat.layout.flatten(drawn) ** 3).sum()
        first = torch.autograd.grad(cubes, flat[1:], create_graph=True)
        pairs.append(torch.autograd.grad(sum(g.sum() for g in first), flat[1:]))
    for own, other in zip(*pairs, strict=True):
        close(own, other)


@pytest.mark.filterwarnings("ignore")  # those of the compiler
def test_transforms():
    bnn = BayesianModel(nn.Linear(4, 3), init_logvar=-2.0).to("cuda")
    x = torch.randn(5, 4, device="cuda")
    with bnn.reparameterize() as net:
        jacobian = torch.func.vmap(torch.func.jacrev(net))(x)
        assert torch.equal(jacobian[0], jacobian[1])
    compiled = torch.compile(bnn.base)
    with bnn.reparameterize() as net:
        close(compiled(x), net(x))


@pytest.mark.parametrize("local_trick", ESTIMATORS)
def test_half_precision(local_trick):
    bnn = BayesianModel(Net(), init_logvar=-4.0).to("cuda")
    x, y = torch.randn(16, 3, 8, 8, device="cuda"), torch.randint(5, (16,), device="cuda")
    with torch.autocast("cuda", torch.bfloat16), bnn.reparameterize(local_trick) as net:
        loss = F.cross_entropy(net(x), y)
    (loss + bnn.kl_divergence() / 1e5).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in bnn.parameters())
    half = BayesianModel(nn.Linear(4, 3)).to("cuda", torch.bfloat16)
    with half.reparameterize(local_trick) as net:
        net(torch.randn(5, 4, device="cuda", dtype=torch.bfloat16)).sum().backward()


def test_svi(bnn, data):
    x, y = data

    def model(x, y=None):
        with bnn.lift() as net:
            logits = net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", pyro.distributions.Categorical(logits=logits), obs=y)

    for guide in (bnn.guide, bnn.exact_kl()):
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        losses = [svi.step(x, y) for _ in range(30)]
        assert all(map(math.isfinite, losses))
        assert sum(losses[-5:]) < sum(losses[:5])
    drawn = Predictive(model, guide=bnn.guide, num_samples=3)(x)
    assert drawn["y"].device.type == "cuda"


def test_prediction(bnn, data):
    x, _ = data
    bnn.base.eval()
    whole = predicted(bnn, x)
    chunked = predicted(bnn, x, chunk_size=7)
    looped = predicted(bnn, x, chunk_size=1)
    assert whole.mean.is_cuda
    for other in (chunked, looped, predicted(bnn, [x[:10], x[10:]])):
        close(other.mean, whole.mean)
        close(other.variance, whole.variance, rtol=1e-3)
    exact = copy.deepcopy(bnn).cpu()
    on_cpu = predicted(exact, x.cpu())
    error = (on_cpu.standard_error.square() + whole.standard_error.cpu().square()).sqrt()
    assert ((whole.mean.cpu() - on_cpu.mean) / error).abs().max() < 6


def predicted(bnn, x, **options):
    torch.manual_seed(3)
    return bnn.predict(x, num_samples=300, quantiles=0.5, **options)


def test_saving(bnn, tmp_path):
    torch.save(bnn.state_dict(), tmp_path / "model.pt")
    other = BayesianModel(Net(), init_logvar=-1.0)
    state = torch.load(tmp_path / "model.pt", map_location="cpu", weights_only=True)
    other.load_state_dict(state)
    close(other.kl_divergence(0.5), bnn.kl_divergence())
