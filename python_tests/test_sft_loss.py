# SPDX-License-Identifier: Apache-2.0
"""row_stats and sft_loss: values and gradients against float64, memory, autograd's contract."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, ROW_ERROR, laid_out, roundings, same_bits
from test_errors import check_message, stretched

from r2dllm_ext import reference

SHAPES = [(1, 1), (1, 2), (3, 7), (5, 127), (2, 128), (4, 4099), (1, 8193), (2, 3, 65)]


def inputs(shape, dtype, device="cpu", *, seed=0, spread=3.0, ignored=0.4):
    """Logits, targets of which some are ignored and half of the others are the argmax, weights."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=g) * spread).to(dtype)
    rows = shape[:-1]
    targets = torch.randint(shape[-1], rows, generator=g)
    sure = torch.rand(rows, generator=g)
    targets = torch.where(sure < 0.5, logits.argmax(-1), targets)
    targets[torch.rand(rows, generator=g) < ignored] = -100
    if targets.numel() and ignored < 1:
        targets.flatten()[0] = int(logits.flatten(0, -2)[0].argmax())
    weight = torch.rand(rows, generator=g) * 2
    return logits.to(device), targets.to(device), weight.to(device)


def eager(
    logits,
    targets,
    weight=None,
    *,
    normalizer=None,
    entropy_weight=0.0,
    entropy_temperature=1.0,
    entropy_gate="correct",
):
    """What one writes without this package, in the dtype of the logits."""
    z, t = logits.flatten(0, -2), targets.flatten()
    nll = F.cross_entropy(z, t, reduction="none")
    if weight is not None:
        nll = nll * weight.flatten()
    keep = t != -100
    loss = nll[keep].sum() / (keep.sum() if normalizer is None else normalizer)
    if entropy_weight:
        log_q = (z / entropy_temperature).log_softmax(-1)
        entropy = -(log_q.exp() * log_q).sum(-1)
        gate = keep if entropy_gate == "all" else keep & (z.argmax(-1) == t)
        if gate.any():
            loss = loss + entropy_weight * entropy[gate].mean()
    return loss


def differentiated(loss, logits, *args, **options):
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf, *args, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def error(got, want) -> float:
    return (got.double() - want.double()).abs().max().item() if got.numel() else 0.0


def check_against_float64(got, plain, want, dtype) -> None:
    """Loss and gradient: at most twice the error of eager torch in the same dtype."""
    for ours, theirs, exact in zip(got, plain, want, strict=True):
        scale = max(exact.abs().max().item(), 1e-3) if exact.numel() else 1.0
        assert error(ours, exact) <= 2 * error(theirs, exact) + ROW_ERROR[dtype] * scale


OPTIONS = {
    "plain": {},
    "number": {"normalizer": 7.5},
    "correct": {"entropy_weight": 0.7},
    "all": {"entropy_weight": 2.0, "entropy_temperature": 0.5, "entropy_gate": "all"},
    "hot": {"entropy_weight": -0.3, "entropy_temperature": 3.0, "entropy_gate": "all"},
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradient(r2, device, shape, name):
    for dtype in DTYPES[device]:
        logits, targets, weight = inputs(shape, dtype, device)
        for w in (None, weight):
            got = differentiated(r2.sft_loss, logits, targets, w, **OPTIONS[name])
            plain = differentiated(eager, logits, targets, w, **OPTIONS[name])
            wide = logits.double()
            want = differentiated(reference.sft_loss, wide, targets, w, **OPTIONS[name])
            assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert got[1].dtype == dtype and got[1].shape == shape
            check_against_float64(got, plain, want, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_row_stats(r2, device, shape, temperature):
    for dtype in DTYPES[device]:
        logits, targets, _ = inputs(shape, dtype, device)
        got = r2.row_stats(logits, targets, temperature=temperature)
        want = reference.row_stats(logits, targets, temperature=temperature)
        # The error of a logarithm, then of the value's own rounding; the entropy is log(mass) less
        # moment / mass, a mean of up to log(V) with twice the error.
        few, nats = ROW_ERROR[dtype], math.log(shape[-1])
        assert error(got.nll, want[0]) <= few * (1 + want[0].max().item() / 24)
        assert error(got.entropy, want[1]) <= few * (1 + 2 * nats)
        assert error(got.confidence, want[2]) <= ROW_ERROR[torch.float32]
        assert torch.equal(got.prediction, want[3])
        assert got.nll.dtype == got.entropy.dtype and got.confidence.dtype == torch.float32


def test_row_stats_take_a_gradient_per_row(r2, device):
    """Any function of nll and entropy, and either of them alone."""
    logits, targets, weight = inputs((6, 130), torch.float32, device)
    uses = (
        lambda nll, h: (nll.exp() * weight).sum() + (nll * h * h).sum(),
        lambda nll, h: (nll * weight).sum(),
        lambda nll, h: (h * weight).sum(),
    )
    for use in uses:

        def total(z, module, use=use):
            return use(*module.row_stats(z, targets, temperature=0.7)[:2])

        got = differentiated(total, logits, r2)
        want = differentiated(total, logits.double(), reference)
        # nll * h * h and exp(nll) * weight: the errors of up to three factors, and of the gradient.
        assert error(got[1], want[1]) <= 4 * ROW_ERROR[torch.float32] * want[1].abs().max().item()


@pytest.mark.parametrize("layout", ["padded", "offset", "transposed"])
def test_layouts(r2, device, layout):
    """Any strides of the rows, any alignment: the same bits."""
    for dtype in DTYPES[device]:
        logits, targets, weight = inputs((3, 5, 203), dtype, device)
        options = OPTIONS["all"]
        want = differentiated(r2.sft_loss, logits, targets, weight, **options)
        view = laid_out(logits, layout).requires_grad_()
        other = [
            laid_out(t, "padded").transpose(0, 1).contiguous().transpose(0, 1)
            for t in (targets, weight)
        ]
        loss = r2.sft_loss(view, *other, **options)
        assert same_bits(loss.detach(), want[0])
        assert same_bits(torch.autograd.grad(loss, view)[0], want[1])


def test_ignored_rows_are_not_read(r2, device):
    for dtype in DTYPES[device]:
        logits, targets, weight = inputs((6, 5000), dtype, device)
        assert (targets == -100).any() and (targets != -100).any()
        clean = differentiated(r2.sft_loss, logits, targets, weight, **OPTIONS["correct"])
        spoilt = logits.clone()
        spoilt[targets == -100] = torch.nan
        got = differentiated(r2.sft_loss, spoilt, targets, weight, **OPTIONS["correct"])
        assert same_bits(got[0], clean[0]) and same_bits(got[1], clean[1])
        assert not got[1][targets == -100].any()
        stats = r2.row_stats(spoilt, targets)
        assert [t[targets == -100].unique().tolist() for t in stats] == [[0], [0], [0], [-1]]


def test_another_ignore_index(r2):
    """Also one that would be an id."""
    logits, targets, _ = inputs((6, 40), torch.float32)
    renamed = torch.where(targets == -100, 3, torch.where(targets == 3, 4, targets))
    for ignore, t in ((3, renamed), (-1, targets.clamp_min(-1))):
        ours = differentiated(r2.sft_loss, logits, t, ignore_index=ignore)
        want = differentiated(r2.sft_loss, logits, torch.where(t == ignore, -100, t))
        assert same_bits(ours[0], want[0]) and same_bits(ours[1], want[1])


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (2, 0, 5), (4, 5)], ids=str)
def test_no_rows(r2, device, shape):
    """Loss 0 and gradient 0, whatever the normalizer and the logits."""
    logits = torch.full(shape, torch.nan, device=device)
    targets = torch.full(shape[:-1], -100, device=device)
    for normalizer in (None, 3.0, torch.tensor(0.0, device=device)):
        loss, grad = differentiated(
            r2.sft_loss, logits, targets, normalizer=normalizer, entropy_weight=1.0
        )
        assert loss.item() == 0 and grad.shape == shape and not grad.any()


def test_rows_without_a_softmax(r2, device):
    """They make the loss NaN; with row_stats the gradients of the others are what they were."""

    def summed(z, targets):
        return r2.row_stats(z, targets).nll.sum()

    for bad in (torch.nan, torch.inf):
        logits, targets, _ = inputs((4, 4200), torch.float32, device, ignored=0)
        clean = differentiated(summed, logits, targets)[1]
        logits[1, 4150] = bad
        assert r2.sft_loss(logits, targets).isnan()
        stats = r2.row_stats(logits, targets)
        assert all(t[1].isnan() for t in stats[:3]) and stats.prediction[1] == -1
        grad = differentiated(summed, logits, targets)[1]
        assert grad[1].isnan().all()
        others = torch.tensor([0, 2, 3])
        assert same_bits(grad[others], clean[others])
    assert r2.sft_loss(torch.full((1, 9), -torch.inf, device=device), targets[:1] * 0).isnan()


def test_minus_infinity(r2, device):
    """As a logit: probability 0 and gradient 0; as the target's: an infinite loss, gradient -1."""
    for dtype in DTYPES[device]:
        logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]], dtype=dtype, device=device)
        target = torch.tensor([2], device=device)
        loss, grad = differentiated(
            r2.sft_loss, logits, target, entropy_weight=1.0, entropy_gate="all"
        )
        assert loss.item() == pytest.approx(2 * 0.6931472)
        assert grad.tolist() == [[0.5, 0.0, -0.5, 0.0]]
        loss, grad = differentiated(r2.sft_loss, logits, target * 0 + 1)
        assert loss.item() == torch.inf and grad.tolist() == [[0.5, -1.0, 0.5, 0.0]]


@pytest.mark.parametrize("top", [1e4, 9e5, -3e6, 1e30])
def test_huge_logits(r2, device, top):
    """Beyond the range of float32 exponents; only differences count."""
    logits = torch.tensor([[top, top, -3e38, top]], device=device)
    options = {"entropy_weight": 1.0, "entropy_gate": "all"}
    loss, grad = differentiated(r2.sft_loss, logits, torch.tensor([3], device=device), **options)
    assert loss.item() == pytest.approx(2 * 1.0986123)
    assert grad.tolist()[0] == pytest.approx([1 / 3, 1 / 3, 0, -2 / 3], abs=1e-6)


def test_a_sure_target_keeps_its_digits(r2, device):
    """p - 1 is not the difference of two rounded numbers."""
    logits = torch.tensor([[0.0, 15.0, -3.0]], device=device)
    target = torch.tensor([1], device=device)
    _, grad = differentiated(r2.sft_loss, logits, target)
    _, want = differentiated(reference.sft_loss, logits.double(), target)
    assert error(grad / want, torch.ones_like(want)) < 0.3  # of 3e-7, which 1 + 3e-7 cannot hold
    alone = torch.zeros(1, 1, device=device)
    loss, grad = differentiated(r2.sft_loss, alone, target * 0)
    assert loss.item() == 0 and grad.item() == 0


def test_facts_about_the_entropy(r2, device):
    """No gradient at the uniform and at the one-hot distribution; descent sharpens the top."""

    def entropy(z):
        return r2.row_stats(z, torch.zeros(1, dtype=torch.int64, device=device)).entropy.sum()

    uniform = torch.zeros(1, 1024, device=device)
    assert entropy(uniform).item() == pytest.approx(6.9314718)
    assert not differentiated(entropy, uniform)[1].any()
    one_hot = torch.full((1, 1024), -torch.inf, device=device)
    one_hot[0, 5] = 2.0
    value, grad = differentiated(entropy, one_hot)
    assert value < 1e-25 and grad.abs().max() < 1e-25
    logits, *_ = inputs((1, 1000), torch.float32, device)
    grad = differentiated(entropy, logits)[1]
    assert grad[0, logits.argmax()] < 0 and abs(grad.sum().item()) < 1e-5


def test_the_gate_takes_the_lowest_of_tied_ids(r2, device):
    logits = torch.zeros(2, 4, device=device)
    targets = torch.tensor([0, 1], device=device)  # the argmax of both rows is 0
    logits[1, 3] = -1.0
    options = {"entropy_weight": 1.0, "normalizer": 1e30}
    gated = r2.sft_loss(logits, targets, **options)
    assert gated.item() == pytest.approx(1.3862944)
    both = r2.sft_loss(logits, targets, entropy_gate="all", **options)
    assert both.item() < gated.item()


def test_parts_of_a_batch_add_up(r2, device):
    """One normalizer for all parts, a number or a tensor: the gradient of the whole."""
    logits, targets, weight = inputs((12, 300), torch.float32, device)
    whole = differentiated(r2.sft_loss, logits, targets, weight)
    count = (targets != -100).sum()
    for normalizer in (count, count.float(), count.item(), float(count)):
        parts = [
            differentiated(r2.sft_loss, logits[p], targets[p], weight[p], normalizer=normalizer)
            for p in (slice(0, 5), slice(5, 12))
        ]
        assert torch.equal(torch.cat([grad for _, grad in parts]), whole[1])
        assert sum(loss.item() for loss, _ in parts) == pytest.approx(
            whole[0].item(), rel=roundings(2)
        )


def test_bits_do_not_depend_on_threads_or_batch(r2, threads):
    logits, targets, weight = inputs((37, 9001), torch.float32)
    options = OPTIONS["correct"] | {"normalizer": 10.0}
    threads(1)
    want = differentiated(r2.sft_loss, logits, targets, weight, **options)
    for count in (2, 3, 7):
        threads(count)
        got = differentiated(r2.sft_loss, logits, targets, weight, **options)
        assert same_bits(got[0], want[0]) and same_bits(got[1], want[1])
    stats = r2.row_stats(logits, targets)
    alone = r2.row_stats(logits[9:10], targets[9:10])
    assert all(same_bits(a[0], b[9]) for a, b in zip(alone, stats, strict=True))


@pytest.mark.parametrize("op", ["row_stats", "sft_loss"])
def test_forward_mode_raises(r2, device, op):
    """A derivative that is not there is neither None nor 0."""
    logits, targets, _ = inputs((4, 33), torch.float32, device)

    def loss(z):
        result = getattr(r2, op)(z, targets)
        return result if op == "sft_loss" else result.nll.sum()

    words = f"{op}: logits takes no tangent of forward-mode"
    with pytest.raises(NotImplementedError, match=words):
        torch.func.jvp(loss, (logits,), (logits,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=words):
        loss(torch.autograd.forward_ad.make_dual(logits, logits))


# ---- in place --------------------------------------------------------------------------------


def computed(leaf):
    """Logits as a model computes them: no leaf, and not needed by their own backward."""
    return leaf * 1.0


def test_inplace_backward(r2, device):
    """The same bits, in the memory of the logits and nowhere else."""
    for dtype in DTYPES[device]:
        logits, targets, weight = inputs((3, 5, 203), dtype, device)
        want = differentiated(r2.sft_loss, logits, targets, weight, **OPTIONS["all"])
        leaf = laid_out(logits, "contiguous").requires_grad_()
        own = computed(leaf)
        version, address = own._version, own.data_ptr()
        loss = r2.sft_loss(own, targets, weight, inplace_backward=True, **OPTIONS["all"])
        grad = torch.autograd.grad(loss, own)[0]
        assert grad.data_ptr() == address and own._version > version
        assert same_bits(grad, want[1]) and same_bits(own.detach(), want[1])

        buffer = computed(torch.zeros(5, 5, 210, dtype=dtype, device=device).requires_grad_())
        view = buffer[1:4, :, 3:206]
        with torch.no_grad():
            view.copy_(logits)
        loss = r2.sft_loss(view, targets, weight, inplace_backward=True, **OPTIONS["all"])
        assert same_bits(torch.autograd.grad(loss, view)[0], want[1])
        assert not buffer[0].any() and not buffer[..., :3].any() and not buffer[..., 206:].any()


def test_inplace_backward_through_a_model(r2, device):
    logits, targets, _ = inputs((4, 33), torch.float32, device)
    grads = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        r2.sft_loss(leaf * 2.0, targets, inplace_backward=inplace).backward()
        grads.append(leaf.grad)
    assert same_bits(*grads)


def test_misuse_of_inplace_backward(r2, device):
    logits, targets, _ = inputs((4, 33), torch.float32, device)
    leaf = logits.clone().requires_grad_()
    for bad in (leaf, leaf[:, :]):
        with pytest.raises(ValueError, match="sft_loss: inplace_backward .* leaf"):
            r2.sft_loss(bad, targets, inplace_backward=True)
    assert r2.sft_loss(logits, targets, inplace_backward=True) > 0  # needs no gradient: no leaf
    with pytest.raises(ValueError, match="sft_loss: logits .* share memory"):
        r2.sft_loss(computed(leaf)[:1].expand(4, 33), targets, inplace_backward=True)

    loss = r2.sft_loss(computed(leaf), targets, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="overwritten by an earlier backward"):
        loss.backward()

    own = computed(leaf)
    loss = r2.sft_loss(own, targets, inplace_backward=True)
    with torch.no_grad():
        own.mul_(2)
    with pytest.raises(RuntimeError, match="modified since"):
        loss.backward()

    loss = r2.sft_loss(leaf.tanh(), targets, inplace_backward=True)  # tanh needs its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

    loss = r2.sft_loss(computed(leaf), targets, inplace_backward=True)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, leaf, create_graph=True)


# ---- autograd, compiler, autocast ------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(r2, name):
    logits, targets, weight = inputs((5, 9), torch.float64, spread=1.0)
    leaf = logits.requires_grad_()
    # Central differences must not tip the gate.
    assert (logits.topk(2).values.diff().abs() > 1e-3).all()

    def loss(z):
        return r2.sft_loss(z, targets, weight, **OPTIONS[name])

    assert torch.autograd.gradcheck(loss, leaf)
    assert torch.autograd.gradcheck(lambda z: r2.row_stats(z, targets, temperature=0.6)[:2], leaf)


def test_double_backward_raises(r2, device):
    logits, targets, _ = inputs((3, 7), torch.float32, device)
    leaf = logits.requires_grad_()
    for loss in (r2.sft_loss(leaf, targets), r2.row_stats(leaf, targets).nll.sum()):
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="has no derivative"):
            grad.sum().backward()


def test_nothing_is_kept_without_grad(r2, device):
    logits, targets, weight = inputs((3, 7), torch.float32, device)
    assert r2.sft_loss(logits, targets, weight).grad_fn is None
    with torch.inference_mode():
        assert r2.sft_loss(logits, targets, weight, inplace_backward=True) > 0
    leaf = logits.requires_grad_()
    stats = r2.row_stats(leaf, targets)
    assert [t.requires_grad for t in stats] == [True, True, False, False]


@pytest.mark.parametrize("shape", [(4, 33), (2, 3, 17), (0, 5)], ids=str)
def test_opcheck(r2, device, shape):
    ops = torch.ops.r2dllm
    check = torch.library.opcheck
    for dtype in DTYPES[device]:
        logits, targets, weight = inputs(shape, dtype, device, ignored=0.0)
        leaf = logits.clone().requires_grad_()
        count = torch.tensor(3.0, device=device)
        check(ops.sft_loss.default, (leaf, targets, weight, count, 0.5, 0.7, 1))
        check(ops.sft_loss.default, (logits, targets))
        check(ops.row_stats.default, (leaf, targets, 0.5))
        nll, entropy, _, prediction, state = ops.row_stats(logits, targets)
        check(ops.row_stats_backward.default, (logits, targets, state, nll, entropy))
        check(ops.row_stats_backward_.default, (logits.clone(), targets, state, nll))
        part = logits[..., 3:9]
        check(ops.row_stats_backward.default, (part, targets, state, nll, None, 1.0, -100, 3))
        check(ops.sft_reduce.default, (nll, entropy, prediction, targets, weight, count, 0.5))


@pytest.mark.parametrize("bounds", [(0, 20001), (0, 1, 4097, 20001), (0, 130, 19999, 20001)])
def test_gradient_of_some_columns(r2, device, bounds):
    """With first_id the same bits as in the whole row, wherever the target lies."""
    ops = torch.ops.r2dllm
    for dtype in DTYPES[device]:
        logits, targets, _ = inputs((9, 20001), dtype, device, ignored=0.3)
        nll, entropy, _, _, state = ops.row_stats(logits, targets, 0.7)
        whole = ops.row_stats_backward(logits, targets, state, nll, entropy, 0.7)
        for first, end in zip(bounds, bounds[1:], strict=False):
            part = logits[:, first:end]
            got = ops.row_stats_backward(part, targets, state, nll, entropy, 0.7, -100, first)
            assert torch.equal(got, whole[:, first:end])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_in_a_graph(r2, device, backend):
    """One graph for forward and backward, any number of rows, in place or not."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()

    def step(x, targets, weight, inplace):
        logits = x * 2.0 + 0.5
        return r2.sft_loss(
            logits, targets, weight, entropy_weight=0.5, normalizer=4.0, inplace_backward=inplace
        )

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for rows in (4, 9) if backend == "aot_eager" else (4,):
        logits, targets, weight = inputs((rows, 33), torch.float32, device, seed=rows)
        for inplace in (False, True):
            want = differentiated(step, logits, targets, weight, inplace)
            got = differentiated(compiled, logits, targets, weight, inplace)
            assert same_bits(got[0], want[0]) and same_bits(got[1], want[1])
    torch._dynamo.reset()


def test_autocast(r2, device):
    """Logits in the dtype of autocast, a loss in float32, a gradient through both."""
    _, targets, _ = inputs((6, 40), torch.float32, device)
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 16, generator=g).to(device).requires_grad_()
    head = torch.randn(40, 16, generator=g).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = F.linear(hidden, head)
        loss = r2.sft_loss(logits, targets)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert hidden.grad.dtype == torch.float32
    d_logits = differentiated(reference.sft_loss, logits.double(), targets)[1]
    wide = head.bfloat16().double()
    # The kernel's error, two roundings to 16 bits (of d logits and of the product) and the float32
    # sum of 40 products, all relative to these taken as positive.
    few = ROW_ERROR[torch.bfloat16] + torch.finfo(torch.bfloat16).eps + 40 * 2.0**-24
    size = d_logits.abs() @ wide.abs()
    assert ((hidden.grad.double() - d_logits @ wide).abs() <= few * size).all()


# ---- errors ----------------------------------------------------------------------------------

N, V = 4, 7
WRONG = {
    # what is wrong: (changed arguments, exception, words of the message)
    "logits 1-D": ({"logits": lambda t: t[0]}, ValueError, "logits [N, V]"),
    "logits int": ({"logits": lambda t: t.int()}, TypeError, "logits dtype Int"),
    "logits V = 0": ({"logits": lambda t: t[:, :0]}, ValueError, "logits V"),
    "logits stride": ({"logits": stretched}, ValueError, "logits stride 1 14 2"),
    "logits list": ({"logits": lambda t: t.tolist()}, TypeError, "logits Tensor list"),
    "targets int32": ({"targets": lambda t: t.int()}, TypeError, "targets Long Int"),
    "targets shape": ({"targets": lambda t: t[:3]}, ValueError, "targets [4] [3]"),
    "targets 2-D": ({"targets": lambda t: t[:, None]}, ValueError, "targets [4] [4, 1]"),
    "targets None": ({"targets": lambda t: None}, TypeError, "targets Tensor None"),
    "targets device": ({"targets": lambda t: t.to("meta")}, ValueError, "targets device meta"),
}
WRONG_LOSS = {
    "weight dtype": ({"weight": lambda t: t.double()}, TypeError, "weight Float Double"),
    "weight shape": ({"weight": lambda t: t[:1]}, ValueError, "weight [4] [1]"),
    "weight grad": ({"weight": lambda t: t.requires_grad_()}, ValueError, "weight detach"),
    "weight device": ({"weight": lambda t: t.to("meta")}, ValueError, "weight device meta"),
    "normalizer 0": ({"normalizer": 0}, ValueError, "normalizer > 0"),
    "normalizer -1": ({"normalizer": -1.0}, ValueError, "normalizer -1.0"),
    "normalizer nan": ({"normalizer": float("nan")}, ValueError, "normalizer nan"),
    "normalizer text": ({"normalizer": "sum"}, TypeError, "normalizer number sum"),
    "normalizer shape": ({"normalizer": torch.ones(1)}, ValueError, "normalizer [] [1]"),
    "normalizer bool": ({"normalizer": torch.tensor(True)}, TypeError, "normalizer Bool"),
    "normalizer grad": (
        {"normalizer": torch.tensor(1.0, requires_grad=True)},
        ValueError,
        "normalizer detach",
    ),
    "normalizer device": (
        {"normalizer": torch.ones((), device="meta")},
        ValueError,
        "normalizer device meta",
    ),
    "entropy weight": ({"entropy_weight": float("inf")}, ValueError, "entropy_weight inf"),
    "temperature 0": ({"entropy_temperature": 0.0}, ValueError, "entropy_temperature 0"),
    "temperature nan": (
        {"entropy_temperature": float("nan")},
        ValueError,
        "entropy_temperature nan",
    ),
    "gate": ({"entropy_gate": "wrong"}, ValueError, "entropy_gate correct all wrong"),
}


def call(function, changes, device):
    arguments = {
        "logits": torch.randn(N, V, generator=torch.Generator().manual_seed(0)).to(device),
        "targets": torch.tensor([1, -100, 6, 0], device=device),
        "weight": torch.ones(N, device=device),
    }
    for name, change in changes.items():
        change = change(arguments[name]) if callable(change) else change
        if isinstance(change, torch.Tensor) and change.device.type == "cpu":
            change = change.detach().to(device).requires_grad_(change.requires_grad)
        arguments[name] = change
    if function.__name__ == "row_stats":
        del arguments["weight"]
    return function(**arguments)


@pytest.mark.parametrize("op", ["row_stats", "sft_loss"])
@pytest.mark.parametrize("what", WRONG)
def test_errors(r2, device, op, what):
    changes, exception, words = WRONG[what]
    with pytest.raises(exception) as raised:
        call(getattr(r2, op), changes, device)
    check_message(raised, op, words)


@pytest.mark.parametrize("what", WRONG_LOSS)
def test_errors_of_the_loss(r2, device, what):
    changes, exception, words = WRONG_LOSS[what]
    with pytest.raises(exception) as raised:
        call(r2.sft_loss, changes, device)
    check_message(raised, "sft_loss", words)


@pytest.mark.parametrize("op", ["row_stats", "sft_loss"])
@pytest.mark.parametrize("target", [-1, V, -101, 2**62])
def test_a_target_that_is_no_id(r2, op, target):
    with pytest.raises(ValueError) as raised:
        call(getattr(r2, op), {"targets": torch.tensor([1, target, -100, 0])}, "cpu")
    check_message(raised, op, f"targets V = 7 -100 {target} row 1")


def test_a_target_that_is_no_id_on_cuda(r2, cuda):
    """Without a synchronisation nobody can raise: the loss is NaN."""
    for target in (-1, V, 2**62):
        wrong = {"targets": torch.tensor([1, target, -100, 0])}
        assert call(r2.sft_loss, wrong, cuda).isnan()
        assert call(r2.row_stats, wrong, cuda).nll.isnan().tolist() == [False, True, False, False]


def test_no_synchronisation_on_cuda(r2, cuda):
    logits, targets, weight = inputs((8, 500), torch.bfloat16, cuda)
    leaf = logits.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = r2.sft_loss(leaf * 1.0, targets, weight, normalizer=3.0, inplace_backward=True)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert leaf.grad.isfinite().all()
