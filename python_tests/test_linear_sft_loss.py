# SPDX-License-Identifier: Apache-2.0
"""linear_sft_loss: the loss and gradients of sft_loss, without the logits as a whole."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, NARROW, ROW_ERROR, same_bits
from test_errors import check_message
from test_sft_loss import OPTIONS, eager, error
from torch.utils._python_dispatch import TorchDispatchMode

from r2dllm_ext import reference


def inputs(rows, width, vocab, dtype, device="cpu", *, seed=0, ignored=0.4):
    """Hidden states, head, bias, targets of which half are the argmax, weights."""
    g = torch.Generator().manual_seed(seed)
    shape = rows if isinstance(rows, tuple) else (rows,)
    hidden = torch.randn(*shape, width, generator=g).to(dtype)
    head = (torch.randn(vocab, width, generator=g) / width**0.5 * 3).to(dtype)
    bias = torch.randn(vocab, generator=g).to(dtype)
    targets = torch.randint(vocab, shape, generator=g)
    logits = hidden.double() @ head.double().T + bias.double()
    sure = torch.rand(shape, generator=g) < 0.5
    targets = torch.where(sure, logits.argmax(-1), targets)
    targets[torch.rand(shape, generator=g) < ignored] = -100
    weight = torch.rand(shape, generator=g) * 2
    return [t.to(device) for t in (hidden, head, bias, targets, weight)]


def differentiated(loss, hidden, head, targets, weight=None, *, bias=None, **options):
    """Loss and the gradients of hidden states, head and bias (if there is one)."""
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, head, bias) if t is not None]
    if bias is not None:
        options["bias"] = leaves[2]
    value = loss(*leaves[:2], targets, weight, **options)
    return value.detach(), *torch.autograd.grad(value, leaves)


def eager_linear(hidden, head, targets, weight=None, *, bias=None, **options):
    return eager(F.linear(hidden, head, bias), targets, weight, **options)


def absolute_sums(
    hidden,
    head,
    targets,
    weight=None,
    *,
    bias=None,
    normalizer=None,
    entropy_weight=0.0,
    entropy_temperature=1.0,
    entropy_gate="correct",
):
    """What loss and gradients add up, all of it taken as positive: an error relative to a term is
    one relative to these sums, however much of them cancels."""
    keep = targets.flatten() != -100
    h, head, t = hidden.flatten(0, -2).double()[keep], head.double(), targets.flatten()[keep]
    z = h @ head.T + (0 if bias is None else bias.double())
    each = torch.ones_like(t) if weight is None else weight.flatten()[keep]
    scaled_by = each.double()[:, None] / (normalizer or len(t))
    d_logits = scaled_by * (z.softmax(-1) - F.one_hot(t, len(head))).abs()
    log_q = (z / entropy_temperature).log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1, keepdim=True)
    gate = (torch.ones_like(t) if entropy_gate == "all" else z.argmax(-1) == t).double()[:, None]
    share = abs(entropy_weight) * gate / gate.sum().clamp_min(1)
    d_logits = d_logits + share / entropy_temperature * log_q.exp() * (1 + entropy - log_q)
    nll = -z.log_softmax(-1).gather(1, t[:, None])
    loss = (scaled_by * (1 + nll) + share * (1 + 2 * math.log(len(head)))).sum()
    sums = [loss, d_logits @ head.abs(), d_logits.T @ h.abs()]
    return [s.max().item() for s in (sums if bias is None else [*sums, d_logits.sum(0)])]


def order_errors(hidden, head, bias=0.0, temperature=1.0) -> list[float]:
    """How far float32 results may be apart, relative to `absolute_sums`, where torch adds up in
    another order: a sum of n terms is within n * u of its terms taken as positive.

    A logit has a term more than `hidden`. Logits that are off by `shift` move a probability by
    2 * shift of itself, and what becomes of an entropy by twice that, over the temperature. The row
    kernels add their own error, and the products sums over ids or rows.
    """
    u = torch.finfo(torch.float32).eps / 2
    rows, vocab = hidden.flatten(0, -2), len(head)
    largest = (rows.abs() @ head.abs().T + abs(bias)).max().item()
    shift = (head.shape[1] + 1) * u * largest
    each = ROW_ERROR[torch.float32] + 4 * shift / min(temperature, 1)
    return [2 * (each + terms * u) for terms in (0, vocab, len(rows), len(rows))]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (7, 5, 33), ((2, 9), 16, 130), (40, 8, 4100)], ids=str
)
def test_loss_and_gradients(r2, device, shape, name):
    for dtype in DTYPES[device]:
        hidden, head, bias, targets, weight = inputs(*shape, dtype, device)
        targets.flatten()[0] = 0
        for options in ({}, {"weight": weight, "bias": bias}):
            options = options | OPTIONS[name]
            got = differentiated(r2.linear_sft_loss, hidden, head, targets, chunk_rows=3, **options)
            plain = differentiated(eager_linear, hidden, head, targets, **options)
            wide = {"bias": bias.double()} if "bias" in options else {}
            want = differentiated(
                reference.linear_sft_loss,
                hidden.double(),
                head.double(),
                targets,
                **(options | wide),
            )
            assert [t.dtype for t in got[1:]] == [dtype] * (len(got) - 1)
            # Of the row kernels; in 16 bits d logits are rounded, and what becomes of them.
            few = ROW_ERROR[dtype] + (torch.finfo(dtype).eps if dtype in NARROW else 0)
            sizes = absolute_sums(hidden, head, targets, **options)
            for ours, theirs, exact, size in zip(got, plain, want, sizes, strict=True):
                # An argmax that rounding moves is another gate, for eager torch just as well.
                moved = name == "correct" and dtype in NARROW
                allowed = 0.2 if moved else few * size
                assert error(ours, exact) <= 2 * error(theirs, exact) + allowed


@pytest.mark.parametrize("name", ["plain", "correct", "all"])
def test_chunks_do_not_show(r2, device, name):
    hidden, head, bias, targets, weight = inputs(23, 8, 300, torch.float32, device)
    options = {"bias": bias, **OPTIONS[name]}
    want = differentiated(r2.linear_sft_loss, hidden, head, targets, weight, **options)
    sizes = absolute_sums(hidden, head, targets, weight, **options)
    few = order_errors(hidden, head, bias, options.get("entropy_temperature", 1.0))
    for chunk_rows in (1, 2, 5, 1000):
        got = differentiated(
            r2.linear_sft_loss, hidden, head, targets, weight, chunk_rows=chunk_rows, **options
        )
        for a, b, size, relative in zip(got, want, sizes, few, strict=True):
            assert error(a, b) <= relative * size


def test_rows_without_a_target_are_not_computed(r2, device):
    """Not even when they hold NaN; nor are rows that the caller leaves out."""
    for dtype in DTYPES[device]:
        hidden, head, _, targets, weight = inputs(20, 8, 50, dtype, device)
        want = differentiated(r2.linear_sft_loss, hidden, head, targets, weight)
        spoilt = hidden.clone()
        spoilt[targets == -100] = torch.nan
        index = (targets != -100).nonzero().squeeze(1)
        count = len(index)
        for options in ({}, {"rows": index}, {"max_rows": count}):
            got = differentiated(r2.linear_sft_loss, spoilt, head, targets, weight, **options)
            assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
            assert not got[1][targets == -100].any()
        got = differentiated(r2.linear_sft_loss, hidden, head, targets, weight, max_rows=count + 3)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        half = targets.clone()
        half[index[: count // 2]] = -100
        left = {"rows": index[count // 2 :]}
        got = differentiated(r2.linear_sft_loss, hidden, head, targets, weight, **left)
        want = differentiated(r2.linear_sft_loss, hidden, head, half, weight)
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("gate", ["correct", "all"])
def test_no_rows(r2, device, gate):
    for rows in (0, 4):
        hidden, head, bias, targets, _ = inputs(rows, 3, 5, torch.float32, device)
        targets.fill_(-100)
        for options in ({}, {"max_rows": 0}, {"rows": targets[:0]}):
            got = differentiated(
                r2.linear_sft_loss,
                hidden,
                head,
                targets,
                bias=bias,
                normalizer=0.5,
                entropy_weight=1.0,
                entropy_gate=gate,
                **options,
            )
            assert not any(t.any() for t in got)
            assert [t.shape for t in got[1:]] == [hidden.shape, head.shape, bias.shape]


def test_what_needs_no_gradient_gets_none(r2, device):
    """A frozen head, as with LoRA; the gradients of the rest stay the same."""
    hidden, head, bias, targets, weight = inputs(9, 6, 40, torch.float32, device)
    for options in (OPTIONS["plain"], OPTIONS["correct"]):
        want = differentiated(
            r2.linear_sft_loss, hidden, head, targets, weight, bias=bias, **options
        )
        for needed in ((True, False, False), (False, True, False), (False, False, True)):
            leaves = [
                t.clone().requires_grad_(n)
                for t, n in zip((hidden, head, bias), needed, strict=True)
            ]
            r2.linear_sft_loss(*leaves[:2], targets, weight, bias=leaves[2], **options).backward()
            for leaf, n, grad in zip(leaves, needed, want[1:], strict=True):
                assert same_bits(leaf.grad, grad) if n else leaf.grad is None
    assert r2.linear_sft_loss(hidden, head, targets).grad_fn is None
    with torch.no_grad():
        assert r2.linear_sft_loss(hidden.requires_grad_(), head, targets).grad_fn is None


def test_head_gradient_is_added_up_in_float32(r2, device):
    """A thousand chunks that each add less than the last place of a bfloat16 sum."""
    rows = 1024
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16, device=device)
    head = torch.zeros(2, 1, dtype=torch.bfloat16, device=device).requires_grad_()
    targets = torch.zeros(rows, dtype=torch.int64, device=device)
    r2.linear_sft_loss(hidden, head, targets, chunk_rows=1).backward()
    assert head.grad.flatten().tolist() == [-0.5, 0.5]


def test_backward_makes_nothing_as_large_as_the_head(r2, device):
    """The gradients were computed with the loss; autograd adds no zeros for its other outputs."""
    hidden, head, _, targets, _ = inputs(9, 6, 40, torch.float32, device)
    loss = r2.linear_sft_loss(hidden.requires_grad_(), head.requires_grad_(), targets)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and function != torch.ops.aten.mul_.Tensor:
                made.append((str(function), result.numel()))
            return result

    with Watch():
        torch.autograd.grad(loss, (hidden, head))
    assert all(size < head.numel() for _, size in made), made


def test_upstream_gradient(r2, device):
    """A factor on the loss is a factor on the gradients; a power of two moves no rounding."""
    hidden, head, bias, targets, weight = inputs(9, 6, 40, torch.float32, device)
    for options in (OPTIONS["plain"], OPTIONS["correct"]):

        def scaled(*args, options=options, **kwargs):
            return r2.linear_sft_loss(*args, **kwargs, **options) * 0.25

        want = differentiated(r2.linear_sft_loss, hidden, head, targets, weight, **options)
        got = differentiated(scaled, hidden, head, targets, weight)
        assert all(same_bits(a, b * 0.25) for a, b in zip(got, want, strict=True))


def test_gradcheck(r2):
    hidden, head, bias, targets, weight = inputs(5, 3, 7, torch.float64)
    leaves = [t.requires_grad_() for t in (hidden, head, bias)]
    for options in OPTIONS.values():

        def loss(hidden, head, bias, options=options):
            return r2.linear_sft_loss(
                hidden, head, targets, weight, bias=bias, chunk_rows=2, **options
            )

        assert torch.autograd.gradcheck(loss, leaves)


def test_second_backward(r2, device):
    """The first one uses the gradients up; they are computed again."""
    hidden, head, _, targets, _ = inputs(5, 3, 7, torch.float32, device)
    leaves = [t.requires_grad_() for t in (hidden, head)]
    loss = r2.linear_sft_loss(*leaves, targets)
    first = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
    second = torch.autograd.grad(2 * loss, leaves)
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_raises(r2, device):
    hidden, head, _, targets, _ = inputs(5, 3, 7, torch.float32, device)
    leaf = hidden.requires_grad_()
    for options in (OPTIONS["plain"], OPTIONS["correct"]):
        with pytest.raises(RuntimeError, match="linear_sft_loss: .* double backward"):
            loss = r2.linear_sft_loss(leaf, head, targets, **options)
            torch.autograd.grad(loss, leaf, create_graph=True)


def test_opcheck(r2, device):
    op, backward = torch.ops.r2dllm.linear_sft_loss, torch.ops.r2dllm.linear_sft_loss_backward
    hidden, head, bias, targets, weight = inputs(7, 3, 9, torch.float32, device)
    for weighted, gate in ((0.0, 0), (0.5, 0), (0.5, 1)):
        for needs in ([True, True, True], [True, False, False]):
            leaves = [
                t.clone().requires_grad_(n)
                for t, n in zip((hidden, head, bias), needs, strict=True)
            ]
            args = (
                *leaves[:2],
                targets,
                weight,
                leaves[2],
                None,
                None,
                None,
                2,
                torch.float32,
                weighted,
                1.0,
                gate,
                -100,
                needs,
            )
            torch.library.opcheck(op.default, args)
    d_nll = torch.rand(7, device=device)
    args = (hidden, head, targets, bias, d_nll, d_nll, None, 7, None, torch.float32, 1.0, -100)
    torch.library.opcheck(backward.default, (*args, [True, True, True]))


@pytest.mark.parametrize("name", ["plain", "correct"])
def test_in_a_graph(r2, device, name):
    torch._dynamo.reset()

    def step(hidden, head, targets, weight, **options):
        return r2.linear_sft_loss(hidden * 2, head, targets, weight, chunk_rows=4, **options)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (6, 11):
        hidden, head, _, targets, weight = inputs(rows, 5, 33, torch.float32, device, seed=rows)
        want = differentiated(step, hidden, head, targets, weight, **OPTIONS[name])
        got = differentiated(compiled, hidden, head, targets, weight, **OPTIONS[name])
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    torch._dynamo.reset()


def test_autocast(r2, device):
    """Products in bfloat16, gradients in the dtype of the parameters; rounded, they are those of
    bfloat16 parameters to the bit."""
    hidden, head, bias, targets, weight = inputs(9, 16, 40, torch.float32, device)
    narrow = [t.bfloat16() for t in (hidden, head, bias)]
    want = differentiated(r2.linear_sft_loss, *narrow[:2], targets, weight, bias=narrow[2])
    with torch.autocast(device, dtype=torch.bfloat16):
        got = differentiated(r2.linear_sft_loss, hidden, head, targets, weight, bias=bias)
    assert same_bits(got[0], want[0])
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        assert ours.dtype == torch.float32
        assert same_bits(ours.bfloat16(), theirs)


def test_bits_do_not_depend_on_threads(r2, threads):
    """Of the row kernels; the products are torch's."""
    hidden, head, _, targets, weight = inputs(9, 4, 5000, torch.float32)
    losses = []
    for count in (1, 3):
        threads(count)
        losses.append(r2.linear_sft_loss(hidden, head, targets, weight))
    size = absolute_sums(hidden, head, targets, weight)[0]
    assert error(*losses) <= order_errors(hidden, head)[0] * size


# ---- 16 bits and the upstream factor -----------------------------------------------------------


def scaled(loss, scale, hidden, head, bias, *args, autocast=None, **options):
    """Gradients of scale * loss, multiplied as a gradient scaler does, and divided in float64."""
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, head, bias)]
    with torch.autocast(hidden.device.type, dtype=autocast, enabled=autocast is not None):
        value = loss(*leaves[:2], *args, bias=leaves[2], **options)
    return [g.double() / scale for g in torch.autograd.grad(value * scale, leaves)]


SCALED = {
    # dtypes of the parameters and of autocast, options
    "float16": (torch.float16, None, {}),
    "bfloat16": (torch.bfloat16, None, {}),
    "chunks": (torch.float16, None, {"chunk_rows": 3}),
    "weight": (torch.float16, None, {"weight": True}),
    "accumulation": (torch.float16, None, {"normalizer": 512.0}),
    "autocast": (torch.float32, torch.float16, {}),
    "autocast, chunks, weight": (torch.float32, torch.float16, {"chunk_rows": 3, "weight": True}),
    "float16 in bfloat16": (torch.float16, torch.bfloat16, {}),
    "bfloat16 in float16": (torch.bfloat16, torch.float16, {"normalizer": 512.0}),
    "entropy": (torch.float16, None, OPTIONS["all"]),
    "gate": (torch.float16, None, OPTIONS["correct"]),
}


@pytest.mark.parametrize("scale", [1.0, 2.0**10, 2.0**16])
@pytest.mark.parametrize("name", SCALED)
def test_a_loss_scale_comes_before_the_rounding(r2, device, name, scale):
    """d logits of 65,536 ids over some thousand rows are 1e-8 and less: float16 has none of it.

    The error against float64 is at most twice that of eager torch, with nothing allowed beside.
    """
    dtype, autocast, options = SCALED[name]
    hidden, head, bias, targets, weight = inputs(24, 8, 65536, torch.float32, device)
    parameters = [(t * 0.25).to(dtype) for t in (hidden, head, bias)]
    options = {"normalizer": 4096.0} | options
    options |= {"weight": weight} if "weight" in options else {}
    plain = {k: v for k, v in options.items() if k != "chunk_rows"}
    got = scaled(r2.linear_sft_loss, scale, *parameters, targets, autocast=autocast, **options)
    # The loss itself is float16 in eager torch, and so are its factors: 2^16 would be infinite.
    most = min(scale, 2.0**12)
    eagerly = scaled(eager_linear, most, *parameters, targets, autocast=autocast, **plain)
    wide = (t.double() for t in parameters)
    want = scaled(reference.linear_sft_loss, 1.0, *wide, targets, **plain)
    for ours, theirs, exact in zip(got, eagerly, want, strict=True):
        assert error(ours, exact) <= 2 * error(theirs, exact)
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm()
        assert ours.count_nonzero() > 0.99 * theirs.count_nonzero()
        if scale > 1:
            assert ours.count_nonzero() > 0.99 * exact.count_nonzero()


@pytest.mark.parametrize("dtype", NARROW)
def test_a_large_factor_and_a_small_one_cancel(r2, device, dtype):
    """d loss / d logits alone is beyond float16; what autograd is asked for is not."""
    hidden, head, bias, targets, _ = inputs(24, 8, 200, dtype, device)
    call = (hidden, head, bias, targets)
    want = scaled(r2.linear_sft_loss, 1.0, *call, normalizer=8.0)
    got = scaled(r2.linear_sft_loss, 2.0**-20, *call, normalizer=2.0**-17)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a * 2.0**-20, b)


@pytest.mark.parametrize("name", ["hidden", "lm_head_weight", "bias"])
def test_forward_mode_raises(r2, device, name):
    """A derivative that is not there is neither None nor 0."""
    hidden, head, bias, targets, _ = inputs(5, 3, 7, torch.float32, device)
    tensors = {"hidden": hidden, "lm_head_weight": head, "bias": bias}

    def loss(t):
        return r2.linear_sft_loss(**(tensors | {name: t}), targets=targets)

    words = f"linear_sft_loss: {name} takes no tangent of forward-mode"
    with pytest.raises(NotImplementedError, match=words):
        torch.func.jvp(loss, (tensors[name],), (tensors[name],))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=words):
        loss(torch.autograd.forward_ad.make_dual(tensors[name], tensors[name]))


# ---- errors ----------------------------------------------------------------------------------

N, H, V = 4, 3, 7
WRONG = {
    # what is wrong: (changed arguments, exception, words of the message)
    "hidden 1-D": ({"hidden": lambda t: t[0]}, ValueError, "hidden [N, H] [3]"),
    "hidden int": ({"hidden": lambda t: t.int()}, TypeError, "hidden dtype int32"),
    "hidden list": ({"hidden": lambda t: t.tolist()}, TypeError, "hidden Tensor list"),
    "head width": ({"lm_head_weight": lambda t: t[:, :2]}, ValueError, "lm_head_weight H [7, 2]"),
    "head empty": ({"lm_head_weight": lambda t: t[:0]}, ValueError, "lm_head_weight [0, 3]"),
    "head dtype": (
        {"lm_head_weight": lambda t: t.bfloat16()},
        TypeError,
        "lm_head_weight float32 bfloat16",
    ),
    "head device": (
        {"lm_head_weight": lambda t: t.to("meta")},
        ValueError,
        "lm_head_weight device meta",
    ),
    "bias shape": ({"bias": torch.ones(6)}, ValueError, "bias [V = 7] [6]"),
    "bias dtype": ({"bias": torch.ones(7).half()}, TypeError, "bias float32 float16"),
    "targets int32": ({"targets": lambda t: t.int()}, TypeError, "targets int64 int32"),
    "targets shape": ({"targets": lambda t: t[:3]}, ValueError, "targets [N] [3]"),
    "weight dtype": ({"weight": lambda t: t.double()}, TypeError, "weight Float Double"),
    "weight shape": ({"weight": lambda t: t[:1]}, ValueError, "weight [4] [1]"),
    "weight grad": ({"weight": lambda t: t.requires_grad_()}, ValueError, "weight detach"),
    "normalizer": ({"normalizer": -1}, ValueError, "normalizer -1"),
    "gate": ({"entropy_gate": "none"}, ValueError, "entropy_gate none"),
    "temperature": ({"entropy_temperature": 0.0}, ValueError, "entropy_temperature 0"),
    "entropy weight": ({"entropy_weight": float("nan")}, ValueError, "entropy_weight nan"),
    "chunk_rows": ({"chunk_rows": 0}, ValueError, "chunk_rows >= 1 0"),
    "max_rows": ({"max_rows": -1}, ValueError, "max_rows >= 0 -1"),
    "rows and max_rows": (
        {"rows": torch.arange(4), "max_rows": 4},
        ValueError,
        "max_rows rows 4",
    ),
    "rows dtype": ({"rows": torch.arange(4).int()}, ValueError, "rows int64 int32"),
    "rows 2-D": ({"rows": torch.zeros(1, 1).long()}, ValueError, "rows [R] [1, 1]"),
}


def call(r2, changes, device):
    arguments = {
        "hidden": torch.randn(N, H, generator=torch.Generator().manual_seed(0)).to(device),
        "lm_head_weight": torch.ones(V, H, device=device),
        "targets": torch.tensor([1, -100, 6, 0], device=device),
        "weight": torch.ones(N, device=device),
    }
    for name, change in changes.items():
        change = change(arguments[name]) if callable(change) else change
        if isinstance(change, torch.Tensor) and change.device.type == "cpu":
            change = change.detach().to(device).requires_grad_(change.requires_grad)
        arguments[name] = change
    return r2.linear_sft_loss(**arguments)


@pytest.mark.parametrize("what", WRONG)
def test_errors(r2, device, what):
    changes, exception, words = WRONG[what]
    with pytest.raises(exception) as raised:
        call(r2, changes, device)
    check_message(raised, "linear_sft_loss", words)


WRONG_VALUES = {
    "target -1": ({"targets": torch.tensor([1, -1, -100, 0])}, "targets V = 7 -100 -1"),
    "target V": ({"targets": torch.tensor([1, V, -100, 0])}, "targets V = 7 -100 7"),
    "too many rows": ({"max_rows": 2}, "max_rows number of rows with a target 2"),
    "row N": ({"rows": torch.tensor([0, 4])}, "rows [0, 4) 0 .. 4"),
    "row -1": ({"rows": torch.tensor([0, -1])}, "rows [0, 4) -1 .. 0"),
    "row twice": ({"rows": torch.tensor([0, 0])}, "rows distinct twice"),
}


@pytest.mark.parametrize("what", WRONG_VALUES)
def test_wrong_values(r2, what):
    changes, words = WRONG_VALUES[what]
    with pytest.raises(ValueError) as raised:
        call(r2, changes, "cpu")
    check_message(raised, "linear_sft_loss", words)


@pytest.mark.parametrize("what", ["target -1", "target V", "too many rows"])
def test_wrong_values_on_cuda(r2, cuda, what):
    """Without a synchronisation nobody can raise: the loss is NaN."""
    assert call(r2, WRONG_VALUES[what][0], cuda).isnan()


@pytest.mark.parametrize("options", [{"rows": True}, {"max_rows": 15}, {"entropy": 1.0}, {}])
def test_the_host_reads_no_tensor(r2, options):
    """The path of a device, on meta tensors, which have no values to read."""
    module = importlib.import_module("r2dllm_ext.ops.linear_sft_loss")
    entropy, known = options.get("entropy", 0.0), bool(options)
    with torch.device("meta"):
        hidden, head, weight = torch.empty(20, 8), torch.empty(50, 8), torch.empty(20)
        targets, rows = torch.empty(20, dtype=torch.int64), torch.empty(15, dtype=torch.int64)
    rows = rows if "rows" in options else None
    which = (rows, 15 if known and rows is None else None, 4, hidden.dtype)  # 4 rows a chunk
    needs = [True, True, False]

    def both():
        _, d_nll, d_entropy, *gradients = module._linear_sft_loss._init_fn(
            hidden, head, targets, weight, None, None, *which, entropy, 1.0, 0, -100, needs
        )
        again = module._linear_sft_loss_backward._init_fn(
            hidden, head, targets, None, d_nll, d_entropy, *which, 1.0, -100, needs
        )
        return again if entropy else gradients

    if known:
        assert [list(g.shape) for g in both()] == [[20, 8], [50, 8], [0]]
    else:
        with pytest.raises(NotImplementedError, match="nonzero"):
            both()


def test_no_synchronisation_on_cuda(r2, cuda):
    hidden, head, _, targets, weight = inputs(20, 8, 50, torch.bfloat16, cuda)
    index = (targets != -100).nonzero().squeeze(1)
    leaf, correct = hidden.requires_grad_(), dict(OPTIONS["correct"], normalizer=3.0)
    for options in ({"rows": index}, {"max_rows": 20}, {"max_rows": 20, **correct}):
        torch.cuda.set_sync_debug_mode("error")
        try:
            options = {"normalizer": 3.0, **options}
            loss = r2.linear_sft_loss(leaf, head, targets, weight, **options)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert loss.isfinite() and leaf.grad.isfinite().all()
