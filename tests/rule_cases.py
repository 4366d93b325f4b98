"""One module for each thing that a rule must get right, with an input of two examples."""

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from zuko.nn import MaskedLinear

from pyro_bayes import BayesianModel


class Weighted(nn.Module):
    """A weight, a bias if it has a shape, and a function of the input and them."""

    def __init__(self, function, weight, bias=None):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(weight))
        self.bias = nn.Parameter(torch.randn(bias)) if bias is not None else None

    def forward(self, *inputs):
        return self.function(*inputs, *(p for p in (self.weight, self.bias) if p is not None))


class Attention(nn.MultiheadAttention):
    """Attends from the input to itself, or to its reverse."""

    def __init__(self, *args, cross=False, masks=None, options=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.cross, self.masks, self.options = cross, masks, options or {}

    def forward(self, x):
        key = x.flip(1) if self.cross else x
        value = key[..., : self.vdim] if self.vdim != self.embed_dim else key
        key = key[..., : self.kdim] if self.kdim != self.embed_dim else key
        options = {"need_weights": False} | self.options
        if self.masks is not None:
            options["key_padding_mask"] = torch.zeros(x.shape[:2], dtype=torch.bool)
            options["key_padding_mask"][:, -1] = True
            options["attn_mask"] = _causal(x)
            if self.masks == "heads":
                options["attn_mask"] = options["attn_mask"].expand(len(x) * self.num_heads, -1, -1)
            if self.masks == "boolean":
                options["attn_mask"] = options["attn_mask"] < 0
            else:
                padding = options["key_padding_mask"]
                options["key_padding_mask"] = padding.to(x.dtype) * -1e9
        output, shares = super().forward(x, key, value, **options)
        return output if shares is None else (output, shares)


@dataclass(frozen=True)
class Case:
    """A module with the input of two examples.

    Arguments:
        make: Makes the module.
        shape: The shape of the input.
        integers: If the input holds indices, how many there are.
        affine: Whether the output is linear in the parameters.
        vmap: Whether torch can batch the module over inputs.
        lost: Whether flipout cannot follow the signs, and uses one draw.
        own_batch: Whether the parameters have a dimension for the batch.
        variant: Whether it is one of many that differ little.
        batch_dim: The dimension of the input that counts examples.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    integers: int = 0
    affine: bool = True
    vmap: bool = True
    lost: bool = False
    own_batch: bool = False
    variant: bool = False
    batch_dim: int = 0

    def input(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(1)
        if self.integers:
            return torch.randint(self.integers, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator, dtype=dtype)

    def model(self, seed=2, dtype=torch.float64, spread=True, **kwargs):
        """The module, made Bayesian, with a deviation of its own for each element."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            base = self.make().to(dtype).eval()
            for name, buffer in base.named_buffers():
                if "running" in name:
                    buffer.uniform_(0.5, 1.5)
            bnn = BayesianModel(base, init_logvar=-2.0, **kwargs)
            with torch.no_grad():
                for logvar in bnn.logvars.parameters() if spread else ():
                    logvar.uniform_(-3.0, 0.0)
        return bnn


def mask():
    return MaskedLinear(torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool())


CASES = {
    "linear": Case(lambda: nn.Linear(4, 3), (2, 4)),
    "linear, sequence": Case(lambda: nn.Linear(4, 3), (2, 3, 4)),
    "linear, time first": Case(lambda: nn.Linear(4, 3), (3, 2, 4), batch_dim=1),
    "linear, masked": Case(mask, (2, 4)),
    "linear, without bias": Case(lambda: nn.Linear(4, 3, bias=False), (2, 4)),
    "bilinear": Case(
        lambda: Weighted(lambda x, w, b: F.bilinear(x[..., :3], x[..., 3:], w, b), (2, 3, 4), (2,)),
        (2, 7),
    ),
    "embedding": Case(lambda: nn.Embedding(5, 3), (2, 4), integers=5),
    "embedding, time first": Case(lambda: nn.Embedding(5, 3), (4, 2), integers=5, batch_dim=1),
    "embedding, padded": Case(lambda: nn.Embedding(5, 3, padding_idx=0), (2, 4), integers=5),
    "layer norm": Case(lambda: nn.LayerNorm(4), (2, 3, 4)),
    "layer norm, time first": Case(lambda: nn.LayerNorm(4), (3, 2, 4), batch_dim=1),
    "layer norm, images": Case(lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "layer norm, without bias": Case(lambda: nn.LayerNorm(4, bias=False), (2, 4)),
    "rms norm": Case(lambda: nn.RMSNorm(4), (2, 3, 4)),
    "group norm": Case(lambda: nn.GroupNorm(2, 4), (2, 4, 3)),
    "instance norm": Case(lambda: nn.InstanceNorm2d(2, affine=True), (2, 2, 3, 3)),
    "batch norm": Case(lambda: nn.BatchNorm1d(4), (2, 4)),
    "batch norm, images": Case(lambda: nn.BatchNorm2d(2), (2, 2, 3, 3)),
}

CONVOLUTIONS = {
    "stride": (nn.Conv1d(2, 3, 3, stride=2), (2, 2, 7)),
    "dilation": (nn.Conv1d(2, 3, 2, dilation=2, padding=1), (2, 2, 5)),
    "same": (nn.Conv1d(2, 3, 3, padding="same"), (2, 2, 4)),
    "groups": (nn.Conv2d(4, 6, 2, groups=2), (2, 4, 3, 3)),
    "depthwise": (nn.Conv2d(2, 4, 2, groups=2), (2, 2, 3, 3)),
    "circular": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 2, 3, 3)),
    "reflect": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), (2, 2, 3, 3)),
    "3d": (nn.Conv3d(2, 2, 2), (2, 2, 2, 3, 2)),
    "transposed 1d": (nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), (2, 2, 3)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 2, groups=2, dilation=2), (2, 4, 2, 2)),
    "transposed 3d": (nn.ConvTranspose3d(2, 2, 2, padding=1), (2, 2, 2, 3, 2)),
}
for _name, (_module, _shape) in CONVOLUTIONS.items():
    CASES[f"convolution, {_name}"] = Case(lambda m=_module: type(m)(**_arguments(m)), _shape)


def _arguments(module):
    names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
    if hasattr(module, "output_padding") and type(module).__name__.startswith("ConvT"):
        names += " output_padding"
    return {name: getattr(module, name) for name in names.split()}


BAGS = {
    "sum": (lambda i, w: F.embedding_bag(i, w, mode="sum"), (2, 4)),
    "mean": (lambda i, w: F.embedding_bag(i, w, mode="mean", padding_idx=0), (2, 4)),
    "weighted": (
        lambda i, w: F.embedding_bag(
            i,
            w,
            mode="sum",
            per_sample_weights=torch.arange(4.0).to(w.dtype).expand(i.shape),
        ),
        (2, 4),
    ),
    "offsets": (
        lambda i, w: F.embedding_bag(i.reshape(-1), w, torch.arange(0, i.numel(), 4)),
        (2, 4),
    ),
    "last offset": (
        lambda i, w: F.embedding_bag(
            i.reshape(-1), w, torch.arange(0, i.numel() + 1, 4), include_last_offset=True
        ),
        (2, 4),
    ),
}
for _name, (_function, _shape) in BAGS.items():
    CASES[f"bag, {_name}"] = Case(
        lambda f=_function: Weighted(f, (4, 3)), _shape, integers=4, vmap=False
    )

ATTENTIONS = {
    "packed": {},
    "cross": {"cross": True},
    "separate": {"cross": True, "kdim": 3, "vdim": 2},
    "weights": {"options": {"need_weights": True}},
    "weights of heads": {"options": {"need_weights": True, "average_attn_weights": False}},
    "masks": {"masks": "positions"},
    "masks of heads": {"masks": "heads", "options": {"need_weights": True}},
    "boolean masks": {"masks": "boolean", "cross": True},
    "key bias and masks": {"masks": "heads", "add_bias_kv": True, "add_zero_attn": True},
    "key bias": {"add_bias_kv": True, "add_zero_attn": True},
    "without bias": {"bias": False},
}
for _name, _kwargs in ATTENTIONS.items():
    CASES[f"attention, {_name}"] = Case(
        lambda k=_kwargs: Attention(4, 2, batch_first=True, **k), (2, 3, 4), affine=False
    )
CASES["encoder layer"] = Case(
    lambda: nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), (2, 3, 4), affine=False
)
CASES["encoder layer, time first"] = Case(
    lambda: nn.TransformerEncoderLayer(4, 2, 5), (3, 2, 4), affine=False, batch_dim=1
)


class Decoder(nn.TransformerDecoderLayer):
    """Attends to the input's reverse as memory."""

    def forward(self, x):
        return super().forward(x, x.flip(1), tgt_is_causal=True, tgt_mask=_causal(x))


def _causal(x):
    return nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)


CASES["decoder layer"] = Case(lambda: Decoder(4, 2, 5, batch_first=True), (2, 3, 4), affine=False)

PRODUCTS = {
    "matmul": (lambda x, w: x @ w, (4, 3), (2, 4)),
    "matmul, function": (lambda x, w: torch.matmul(x, w), (4, 3), (2, 3, 4)),
    "matmul, method": (lambda x, w: x.matmul(w), (4, 3), (2, 4)),
    "matmul, reflected": (lambda x, w: w.__rmatmul__(x), (4, 3), (2, 4)),
    "matmul, vector": (lambda x, w: x @ w, (4,), (2, 4)),
    "matmul, from the left": (lambda x, w: w @ x, (3, 4), (2, 4, 3)),
    "matmul, vector from the left": (lambda x, w: w @ x, (4,), (2, 4, 3)),
    "matmul, stack": (lambda x, w: x.unsqueeze(1) @ w, (2, 4, 3), (2, 3, 4)),
    "mm": (lambda x, w: torch.mm(x, w), (4, 3), (2, 4)),
    "mm, method": (lambda x, w: x.mm(w), (4, 3), (2, 4)),
    "bmm": (lambda x, w: torch.bmm(x, w.expand(len(x), 4, 3)), (1, 4, 3), (2, 3, 4)),
    "bmm, method": (lambda x, w: x.bmm(w.expand(len(x), 4, 3)), (1, 4, 3), (2, 3, 4)),
}
for _name, (_function, _weight, _shape) in PRODUCTS.items():
    CASES[_name] = Case(
        lambda f=_function, w=_weight: Weighted(f, w),
        _shape,
        vmap=_name[:2] not in ("mm", "bm"),
        variant=True,
    )
for _name, _addmm in {"addmm": torch.addmm, "addmm, method": torch.Tensor.addmm}.items():
    CASES[_name] = Case(
        lambda f=_addmm: Weighted(lambda x, w, b: f(b, x, w, beta=0.5, alpha=2), (4, 3), (3,)),
        (2, 4),
        vmap=False,
    )
for _name, _baddbmm in {
    "baddbmm": torch.baddbmm,
    "baddbmm, method": torch.Tensor.baddbmm,
}.items():
    CASES[_name] = Case(
        lambda f=_baddbmm: Weighted(
            lambda x, w, b: f(b, x, w.expand(len(x), 4, 3), beta=0.5, alpha=2), (1, 4, 3), (1, 1, 3)
        ),
        (2, 3, 4),
        vmap=False,
        variant=True,
    )

EINSUMS = {
    "linear": ("bi,oi->bo", (3, 4), (2, 4)),
    "time first": ("tbi,io->tbo", (4, 3), (3, 2, 4)),
    "heads": ("bthd,hde->bte", (2, 3, 4), (2, 3, 2, 3)),
    "summed positions": ("bti,oi->bo", (3, 4), (2, 3, 4)),
    "ellipsis": ("...i,io->...o", (4, 3), (2, 3, 4)),
    "experts": ("bni,nio->nbo", (3, 4, 2), (2, 3, 4)),
    "two inputs": ("bi,bj,oij->ob", (3, 4, 4), (2, 4)),
    "implicit": ("bi,io", (4, 3), (2, 4)),
}
for _name, (_equation, _weight, _shape) in EINSUMS.items():
    CASES[f"einsum, {_name}"] = Case(
        lambda e=_equation, w=_weight: Weighted(_product(e), w),
        _shape,
        variant=True,
        vmap=False,
        batch_dim=int(_name == "time first"),
    )


def _product(equation):
    def product(x, w):
        inputs = [x] * equation.partition("->")[0].count(",")
        output = torch.einsum(equation, *inputs, w)
        return output.movedim(1, 0) if equation.endswith(("nbo", "ob")) else output

    return product


CASES["cat, class token"] = Case(
    lambda: Weighted(lambda x, w: torch.cat([w.expand(len(x), -1, -1), x], 1), (1, 1, 4)),
    (2, 3, 4),
    vmap=False,
)
for _name, _cat in {"concat": torch.concat, "concatenate": torch.concatenate}.items():
    CASES[f"cat, {_name}"] = Case(
        lambda f=_cat: Weighted(lambda x, w: f([x, w.expand(len(x), 1, 4)], 1), (1, 4)),
        (2, 3, 4),
        variant=True,
        vmap=False,
    )
CASES["add in place"] = Case(
    lambda: Weighted(lambda x, w: (2 * x).add_(w), (4,)), (2, 3, 4), vmap=False
)
CASES["add in place, operator"] = Case(
    lambda: Weighted(lambda x, w: operator.iadd(2 * x, w), (4,)), (2, 4), variant=True, vmap=False
)

# A parameter in arithmetic with an activation, and with a constant of its own shape.
C = torch.tensor([[0.0, 1.0, -2.0, 0.5], [1.5, 0.0, 1.0, 3.0], [0.1, 1.0, 0.0, -1.0]])
ARITHMETIC = {
    "mul": torch.mul,
    "multiply": torch.multiply,
    "mul, method": torch.Tensor.mul,
    "multiply, method": torch.Tensor.multiply,
    "mul, operator": torch.Tensor.__mul__,
    "mul, reflected": torch.Tensor.__rmul__,
    "add": torch.add,
    "add, method": torch.Tensor.add,
    "add, operator": torch.Tensor.__add__,
    "add, reflected": torch.Tensor.__radd__,
    "add, alpha": lambda a, b: torch.add(a, b, alpha=-2),
    "sub": torch.sub,
    "subtract": torch.subtract,
    "sub, method": torch.Tensor.sub,
    "subtract, method": torch.Tensor.subtract,
    "sub, operator": torch.Tensor.__sub__,
    "sub, reflected": torch.Tensor.__rsub__,
}
DIVISION = {
    "div": torch.div,
    "divide": torch.divide,
    "div, method": torch.Tensor.div,
    "divide, method": torch.Tensor.divide,
    "div, operator": torch.Tensor.__truediv__,
}
NEGATION = {
    "neg": torch.neg,
    "negative": torch.negative,
    "neg, method": torch.Tensor.neg,
    "negative, method": torch.Tensor.negative,
    "neg, operator": torch.Tensor.__neg__,
}
CASES["mul, features first"] = Case(
    lambda: Weighted(torch.mul, (3, 1)), (3, 2), own_batch=True, batch_dim=1
)
for _name, _f in ARITHMETIC.items():
    CASES[f"{_name} of an input"] = Case(
        lambda f=_f: Weighted(lambda x, w: f(x, w), (4,)), (2, 3, 4), vmap=False, variant=True
    )
    CASES[f"{_name} of a constant"] = Case(
        lambda f=_f: Weighted(lambda x, w: F.linear(x, f(w, C.to(w.dtype))), (3, 4)),
        (2, 4),
        variant=True,
    )
for _name, _f in DIVISION.items():
    CASES[_name] = Case(
        lambda f=_f: Weighted(lambda x, w: F.linear(x, f(w, C.to(w.dtype) + 4)), (3, 4)),
        (2, 4),
        variant=True,
    )
for _name, _f in NEGATION.items():
    CASES[_name] = Case(
        lambda f=_f: Weighted(lambda x, w: F.linear(x, f(w)), (3, 4)), (2, 4), variant=True
    )
CASES["add of time and features"] = Case(
    lambda: Weighted(lambda x, w: x + w, (1, 3, 4)), (2, 3, 4), vmap=False, own_batch=True
)

T = torch.Tensor
ARRANGEMENTS = {
    "reshape": lambda w: torch.reshape(w, (4, 3, 1)),
    "reshape, method": lambda w: w.reshape(4, 1, 3),
    "reshape_as": lambda w: w.reshape_as(torch.empty(4, 3, 1)),
    "view": lambda w: w.view(1, 4, 3),
    "view_as": lambda w: w.view_as(torch.empty(1, 4, 3)),
    "transpose": lambda w: torch.transpose(w, 0, 1),
    "transpose, method": lambda w: w.transpose(0, 1),
    "swapaxes": lambda w: torch.swapaxes(w, 0, 1),
    "swapaxes, method": lambda w: w.swapaxes(0, 1),
    "permute": lambda w: torch.permute(w, (1, 0)),
    "permute, method": lambda w: w.permute(1, 0),
    "t": lambda w: torch.t(w),
    "t, method": lambda w: w.t(),
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "movedim": lambda w: torch.movedim(w, 0, 1),
    "movedim, method": lambda w: w.movedim(0, 1),
    "chunk": lambda w: torch.chunk(w, 2)[1],
    "chunk, method": lambda w: w.chunk(2, dim=1)[1],
    "split": lambda w: torch.split(w, 3)[1],
    "split, method": lambda w: w.split([1, 2], dim=1)[1],
    "tensor_split": lambda w: torch.tensor_split(w, 3)[2],
    "tensor_split, method": lambda w: w.tensor_split(2, dim=1)[0],
    "unbind": lambda w: torch.unbind(w)[2],
    "unbind, method": lambda w: w.unbind(1)[1],
    "narrow": lambda w: torch.narrow(w, 0, 1, 2),
    "narrow, method": lambda w: w.narrow(1, 0, 2),
    "select": lambda w: torch.select(w, 0, 2),
    "select, method": lambda w: w.select(1, 1),
    "index": lambda w: w[1:, 2],
    "unsqueeze": lambda w: torch.unsqueeze(w, 1),
    "unsqueeze, method": lambda w: w.unsqueeze(2),
    "squeeze": lambda w: torch.squeeze(w.unsqueeze(0)),
    "squeeze, method": lambda w: w[:1].squeeze(0),
    "expand": lambda w: w.expand(2, 4, 3),
    "expand_as": lambda w: w[:, :1].expand_as(torch.empty(4, 5)),
    "flatten": lambda w: torch.flatten(w[:1]),
    "flatten, method": lambda w: w[:, :1].flatten(),
    "flatten, all": lambda w: w.flatten(),
    "index_select": lambda w: torch.index_select(w, 0, torch.tensor([2, 0])),
    "index_select, method": lambda w: w.index_select(1, torch.tensor([1, 0])),
    "index, by a tensor": lambda w: w[torch.tensor([3, 1])],
    "unflatten": lambda w: torch.unflatten(w, 1, (1, 3)),
    "unflatten, method": lambda w: w.unflatten(0, (4, 1)),
    "clone": lambda w: torch.clone(w).t(),
    "clone, method": lambda w: w.clone(),
    "contiguous": lambda w: w.t().contiguous(),
    "to": lambda w: w.to(torch.float64),
    "float": lambda w: w.float().to(torch.float64),
    "double": lambda w: w.double(),
    "type_as": lambda w: w.type_as(torch.empty(0, dtype=torch.float64)),
}
LOST = {
    "unflatten, split": lambda w: w.unflatten(0, (2, 2)),
    "index, by two tensors": lambda w: w[torch.tensor([[3, 1]]), torch.tensor([[1, 0], [2, 2]])],
}
for _lost, _table in enumerate((ARRANGEMENTS, LOST)):
    for _name, _f in _table.items():
        CASES[_name] = Case(
            lambda f=_f: Weighted(_outer(f), (4, 3)),
            (2, 1),
            lost=bool(_lost),
            vmap=False,
            variant=True,
        )


def _outer(arrange):
    """Multiplies each example, one number, by the arranged weight."""

    def function(x, weight):
        arranged = arrange(weight)
        ones = [1] * arranged.dim()
        return x.view(-1, *ones).expand(-1, *arranged.shape) * arranged

    return function
