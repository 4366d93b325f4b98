"""Where parameters lie in flat memory: any shape and any strides, in chunks of any size."""

import pytest
import torch
from torch import nn

from pyro_bayes.posterior import layout
from pyro_bayes.posterior.layout import Layout

LAST = torch.channels_last
PARAMETERS = {
    "matrix": torch.empty(4, 3),
    "scalar": torch.empty(()),
    "empty": torch.empty(0, 2),
    "transposed": torch.empty(3, 5).T,
    "channels last": torch.empty(2, 3, 2, 2).to(memory_format=LAST),
    "one channel": torch.empty(4, 1, 3, 3).to(memory_format=LAST),
    "thin": torch.empty(2, 3, 2, 1).to(memory_format=LAST),
    "permuted": torch.empty(2, 3, 1, 4).permute(3, 2, 0, 1),
    "sliced": torch.empty(6, 6)[:, ::2],
    "expanded": torch.empty(3, 1).expand(3, 2),
    "no channels": torch.empty(2, 0, 3, 3).to(memory_format=LAST),
    "vector": torch.empty(5),
}


@pytest.fixture(params=[layout.CHUNK, 7, 1], ids="chunks of {}".format)
def whole(request, monkeypatch):
    monkeypatch.setattr(layout, "CHUNK", request.param)
    return Layout(PARAMETERS)


@pytest.fixture
def flat(whole):
    return torch.randn(whole.size)


def test_parts_are_side_by_side(whole):
    assert whole.names == tuple(PARAMETERS)
    assert whole.size == sum(p.numel() for p in PARAMETERS.values())
    assert [part.offset for part in whole.parts] == [sum(whole.sizes[:i]) for i in range(12)]


@pytest.mark.parametrize("start", [0, 3])
def test_views_have_the_strides_of_a_copy(whole, start):
    flat = torch.randn(whole.size + start)[start:]
    views = whole.views(flat)
    for view, parameter in zip(views, PARAMETERS.values(), strict=True):
        assert view.shape == parameter.shape
        assert view.stride() == torch.empty_like(parameter).stride()
    for view in views:
        view.fill_(7.0)
    assert (flat == 7).all()  # so no element is in none, and all are in its memory


def test_split_has_the_elements_of_views(whole, flat):
    for piece, view in zip(whole.split(flat), whole.views(flat), strict=True):
        assert torch.equal(piece, view)
        assert piece.data_ptr() == view.data_ptr()
    many = torch.randn(2, 3, whole.size)
    for piece, view in zip(whole.split(many), whole.views(many[1, 2]), strict=True):
        assert piece.shape == (2, 3, *view.shape)
        assert torch.equal(piece[1, 2], view)


def test_flatten_is_the_inverse_of_split(whole, flat):
    assert torch.equal(whole.flatten(whole.split(flat)), flat)
    dense = [view.contiguous() for view in whole.views(flat)]
    assert torch.equal(whole.flatten(dense), flat)
    for function in (whole.flatten, lambda tensors: whole.split(whole.flatten(tensors))[3]):
        inputs = [torch.randn(p.shape).double().requires_grad_() for p in PARAMETERS.values()]
        assert torch.autograd.gradcheck(lambda *t, f=function: f(t), inputs, fast_mode=True)


def test_chunks_are_of_one_parameter_or_fit(whole, flat):
    chunks = whole.chunks(flat)
    assert [chunk.start for chunk in chunks] == [0, *[chunk.stop for chunk in chunks[:-1]]]
    assert chunks[-1].stop == whole.size
    for chunk in chunks:
        assert sum(chunk.sizes) == chunk.stop - chunk.start <= layout.CHUNK
        held = whole.parts[chunk.first : chunk.first + len(chunk.sizes)]
        if len(chunk.sizes) > 1:
            assert [part.size for part in held] == list(chunk.sizes)
            assert held[0].offset == chunk.start
        else:
            assert held[0].offset <= chunk.start
            assert chunk.stop <= held[0].offset + held[0].size
    assert whole.chunks(flat.to("meta")) == whole.whole() == ((0, whole.size, 0, (*whole.sizes,)),)


def test_chunks_of_known_sizes(monkeypatch):
    monkeypatch.setattr(layout, "CHUNK", 10)
    own = Layout({str(i): torch.empty(n) for i, n in enumerate([4, 6, 1, 25, 0, 3])})
    assert [tuple(chunk) for chunk in own.chunks(torch.empty(0))] == [
        (0, 10, 0, (4, 6)),
        (10, 11, 2, (1,)),
        (11, 21, 3, (10,)),
        (21, 31, 3, (10,)),
        (31, 36, 3, (5,)),
        (36, 39, 4, (0, 3)),
    ]


def test_gathered_elements_are_those_of_the_chunk(whole, flat):
    lines = whole.lines(whole.views(flat))
    storage = flat.untyped_storage().data_ptr()
    assert all(line.untyped_storage().data_ptr() == storage for line in lines)
    for chunk in whole.chunks(flat):
        assert torch.equal(whole.gather(lines, chunk, flat), flat[chunk.start : chunk.stop])
    (matrix, *others) = whole.views(flat.clone())
    matrix.zero_()
    expected = whole.flatten([matrix, *others])
    lines = whole.lines([None, *others])
    for chunk in whole.chunks(flat):
        assert torch.equal(whole.gather(lines, chunk, flat), expected[chunk.start : chunk.stop])


NUMBERS = {
    "distinct": torch.arange(1.0, 13.0),
    "equal": torch.full((12,), 3.0),
    "expanded": torch.tensor(3.0).expand(12),
}


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
def test_one_number_for_each_parameter(whole, flat, numbers):
    spread = whole.spread(numbers)
    for number, own in zip(numbers, whole.views(spread), strict=True):
        assert (own == number).all()
    for chunk in whole.chunks(flat):
        own = torch.empty(chunk.stop - chunk.start).copy_(whole.each(numbers, chunk))
        assert torch.equal(own, spread[chunk.start : chunk.stop])


def test_sums_of_each_parameter(whole, flat):
    expected = torch.stack([view.sum() for view in whole.views(flat)])
    torch.testing.assert_close(whole.sums(flat), expected)
    double = flat.double().requires_grad_()
    assert torch.autograd.gradcheck(whole.sums, double, fast_mode=True)


def test_parameters_of_a_network():
    conv = nn.Conv2d(3, 4, 3).to(memory_format=LAST)
    parameters = {name: p.detach() for name, p in conv.named_parameters()}
    own = Layout(parameters)
    views = dict(zip(own.names, own.views(own.flatten(parameters.values())), strict=True))
    for name, parameter in parameters.items():
        assert torch.equal(views[name], parameter)
        assert views[name].stride() == parameter.stride()
