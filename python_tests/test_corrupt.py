# SPDX-License-Identifier: Apache-2.0
"""`corrupt`: which cells are masked, learned and how much they weigh; its random numbers."""

import pytest
import torch
from cases import RANDOM123
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r2dllm_ext import corrupt, reference
from r2dllm_ext.philox import Draw, philox4x32, uniform

MASK, IGNORED = 99, -100
words = st.integers(0, 2**32 - 1)


def sequences(lengths, *, before=2, total=20, device="cpu"):
    """[B, total] tokens, distinct in a row, and answers of these lengths after `before` cells."""
    tokens = torch.arange(1, total + 1).repeat(len(lengths), 1)
    cell = torch.arange(total)
    answers = torch.stack([(cell >= before) & (cell < before + n) for n in lengths])
    return tokens.to(device), answers.to(device)


def run(tokens, answers, **options):
    defaults = {
        "mask_id": MASK,
        "block_length": 4,
        "mode": "block",
        "ratio": 0.5,
        "seed": 3,
        "complementary": True,
    }
    return corrupt(tokens, answers, **(defaults | options))


def for_mode(mode, commit):
    """The options of a mode; every other cell is serial."""
    return {
        "mode": mode,
        "commit_step": commit if mode == "trajectory" else None,
        "serial": commit % 2 == 0 if mode == "frontier" else None,
    }


MODES = ["block", "iid", "trajectory", "frontier"]


# ---- random numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("counter, key, expected", RANDOM123)
def test_philox(device, counter, key, expected):
    got = philox4x32(tuple(torch.tensor([word], device=device) for word in counter), key)
    assert " ".join(f"{int(word):08x}" for word in got) == expected


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    row=words,
    step=words,
    position=words,
    draw=st.sampled_from(Draw),
)
def test_numbers_are_those_of_the_decoder(seed, row, step, position, draw):
    got = uniform(seed, torch.tensor([row]), step, torch.tensor([position]), draw)
    assert got.item() == reference.uniform(seed, row, step, position, int(draw))


# ---- what is masked --------------------------------------------------------------------------


def test_block_mode(device):
    """Clean before the active block, all masked behind it, the two views share the block."""
    tokens, answers = sequences([18, 16, 10, 3], device=device)
    seen = set()
    for step in range(30):
        views, targets, weights = run(tokens, answers, step=step)
        assert views.shape == targets.shape == weights.shape == (2, 4, 20)
        assert (views.dtype, targets.dtype, weights.dtype) == (
            torch.int64,
            torch.int64,
            torch.float32,
        )
        learned = targets != IGNORED
        assert not (learned[0] & learned[1]).any()
        for b, n in enumerate((18, 16, 10, 3)):
            block = (learned[0, b] | learned[1, b]).nonzero().flatten().tolist()
            begin = block[0]
            end = min(begin + 4, 2 + n)
            assert (begin - 2) % 4 == 0 and block == list(range(begin, end))
            seen.add((b, (begin - 2) // 4))
            for view, target, cells in zip(views[:, b], targets[:, b], learned[:, b], strict=True):
                assert torch.equal(view[:begin], tokens[b, :begin])
                assert (view[end : 2 + n] == MASK).all()
                assert torch.equal(view[2 + n :], tokens[b, 2 + n :])
                assert torch.equal(view == MASK, cells | ((view == MASK) & behind(end, device)))
                assert torch.equal(target[cells], tokens[b, cells])
        assert torch.equal(weights, torch.where(learned, 2.0, 0.0))
    assert {block for row, block in seen if row == 0} == {0, 1, 2, 3, 4}
    assert {block for row, block in seen if row == 3} == {0}


def behind(end, device):
    return torch.arange(20, device=device) >= end


def test_iid_mode(device):
    tokens, answers = sequences([18, 5], device=device)
    views, targets, _ = run(tokens, answers, mode="iid")
    learned = targets != IGNORED
    assert torch.equal(learned, views == MASK)
    assert torch.equal(learned[0] ^ learned[1], answers)
    assert torch.equal(views[~learned], tokens.expand_as(views)[~learned])


def test_trajectory_mode_gives_states_of_the_decode(device):
    tokens, answers = sequences([8], before=1, total=9, device=device)
    commit = torch.tensor([[-1, 0, 2, 1, 2, 5, 3, -1, 4]], device=device)
    expected = {  # ratio -> masked cells of either block: the latest, by whole steps
        0.0: ([], []),
        0.25: ([2, 4], [7]),
        0.5: ([2, 4], [5, 7]),
        0.75: ([2, 3, 4], [5, 7, 8]),
        1.0: ([1, 2, 3, 4], [5, 6, 7, 8]),
    }
    seen = set()
    for ratio, blocks in expected.items():
        for step in range(8):
            options = {"mode": "trajectory", "commit_step": commit, "ratio": ratio, "step": step}
            views, targets, weights = run(tokens, answers, **options)
            first, second = ((t != IGNORED)[0].nonzero().flatten().tolist() for t in targets)
            block = 0 if min(first + second) < 5 else 1
            seen.add(block)
            cells = list(range(1 + 4 * block, 5 + 4 * block))
            assert first == blocks[block] and sorted(first + second) == cells
            hidden = (views[0, 0] == MASK).nonzero().flatten().tolist()
            assert hidden == first + list(range(5 + 4 * block, 9))
            share = len(first) / 4
            for view, part in ((0, share), (1, 1 - share)):
                weight = weights[view, 0][weights[view, 0] > 0]
                assert torch.equal(weight, torch.full_like(weight, 1 / part if part else 0))
    assert seen == {0, 1}


def test_frontier_mode_hides_serial_cells_from_one_on():
    tokens, answers = sequences([18] * 3000)
    serial = torch.zeros_like(answers)
    serial[:, 2:20:3] = True
    options = {"mode": "frontier", "serial": serial, "block_length": 9, "ratio": 0.6}
    views, targets, _ = run(tokens, answers, **options)
    learned = targets[0] != IGNORED
    begins = (views[0] == MASK).sum(1) - learned.sum(1)
    assert set(begins.tolist()) == {0, 9}  # hidden behind the active block, and not learned
    own = torch.where((begins == 9)[:, None], learned[:, 2:11], learned[:, 11:20])
    serials = own[:, ::3].int()
    assert (serials.diff(dim=1) >= 0).all()  # once one is hidden, so are all behind it
    # The front lies evenly in the block: a cell at place i is behind it with (i + 1) / 9.
    assert serials.double().mean(0).tolist() == pytest.approx([1 / 9, 4 / 9, 7 / 9], abs=0.04)
    others = own.double().mean(0)[[1, 2, 4, 5, 7, 8]]
    assert others.tolist() == pytest.approx([0.36] * 6, abs=0.04)  # the ratio squared


class Largest(TorchDispatchMode):
    """Notes the most bytes of a tensor made inside."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("length", [40, 4000])
@pytest.mark.parametrize("block_length", [1, 32, 4000, 10**6, 2**63 - 1])
@pytest.mark.parametrize("mode", MODES)
def test_memory_grows_with_the_tokens_alone(mode, block_length, length):
    tokens, answers = sequences([length - 2] * 3, total=length)
    commit = torch.randint(0, 9, tokens.shape, generator=torch.Generator().manual_seed(0))
    options = for_mode(mode, commit)
    with Largest() as largest:
        got = run(tokens, answers, block_length=block_length, **options)
    assert largest.bytes <= 2 * 8 * 3 * length  # two views of int64
    expected = run(tokens, answers, block_length=min(block_length, length), **options)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_blocks_are_drawn_evenly_and_cells_with_the_ratio():
    tokens, answers = sequences([12] * 4000, total=14)
    views, targets, _ = run(tokens, answers, ratio=0.3, complementary=False)
    learned = targets[0] != IGNORED
    assert learned.sum() / (4 * 4000) == pytest.approx(0.3, abs=4 * (0.21 / 16000) ** 0.5)
    begins = (views[0] == MASK).sum(1) - learned.sum(1)  # masked behind the active block
    counts = torch.bincount(begins // 4, minlength=3).double() / 4000
    assert counts.tolist() == pytest.approx([1 / 3] * 3, abs=0.03)


def test_each_row_draws_its_ratio_within_bounds():
    tokens, answers = sequences([18] * 2000)
    _, targets, weights = run(tokens, answers, mode="iid", ratio=(0.2, 0.6), complementary=False)
    ratio = 1 / weights[0].amax(1)[(targets[0] != IGNORED).any(1)]
    assert 0.2 <= ratio.min() < 0.22 and 0.58 < ratio.max() <= 0.6
    assert ratio.mean() == pytest.approx(0.4, abs=0.02)


# ---- weights ---------------------------------------------------------------------------------


def test_elbo_weights_are_unbiased():
    """The expected weight of any cell of an active block is 1, in either view."""
    tokens, answers = sequences([4] * 20000, total=6)
    weights = run(tokens, answers, ratio=(0.1, 0.9)).weights
    assert weights[:, :, 2:].double().mean((1, 2)).tolist() == pytest.approx([1, 1], abs=0.02)


def test_weightings():
    tokens, answers = sequences([18, 12])
    ratio = torch.tensor([0.25, 0.75])
    by_name = {
        name: run(tokens, answers, ratio=ratio, weighting=name, mode="iid")
        for name in ("elbo", "mean", "flat")
    }
    learned = by_name["flat"].targets != IGNORED
    for view, shares in enumerate(((0.25, 0.75), (0.75, 0.25))):
        for b, share in enumerate(shares):
            cells = learned[view, b]
            n = cells.sum()
            assert n > 0
            for name, weight in (("elbo", 1 / share), ("mean", 1 / n), ("flat", 1.0)):
                got = by_name[name].weights[view, b]
                assert got[cells].tolist() == pytest.approx([float(weight)] * int(n))
                assert (got[~cells] == 0).all()


@pytest.mark.parametrize("weighting", ["elbo", "mean", "flat"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_an_empty_view_weighs_nothing(mode, weighting, ratio):
    tokens, answers = sequences([6, 0])
    # No cell is serial: at ratio 1 a frontier hides the whole block then.
    options = {"weighting": weighting, "ratio": ratio}
    options |= for_mode(mode, torch.ones_like(tokens) if mode == "frontier" else tokens * 0)
    views, targets, weights = run(tokens, answers, **options)
    full, empty = (0, 1) if ratio else (1, 0)
    assert weights.isfinite().all()
    assert (weights[empty] == 0).all() and (targets[empty] == IGNORED).all()
    assert (targets[full, 0] != IGNORED).any() and (weights[full, 0] > 0).any()
    assert (weights[:, 1] == 0).all() and torch.equal(views[:, 1], tokens[1].expand(2, -1))


def test_no_rows():
    views, targets, weights = run(*(x[:0] for x in sequences([4])))
    assert views.shape == targets.shape == weights.shape == (2, 0, 20)


# ---- what a row depends on -------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_row_depends_on_itself_alone(mode):
    tokens, answers = sequences([18, 9, 14])
    commit = torch.randint(-1, 9, tokens.shape, generator=torch.Generator().manual_seed(0))
    options = {"ratio": (0.1, 0.9), "row": torch.tensor([70, 5, 11]), "step": 8}
    options |= for_mode(mode, commit)
    together = run(tokens, answers, **options)
    shift = 5  # padded on the left
    for b in range(3):
        padded = torch.nn.functional.pad(tokens[b : b + 1], (shift, 0))
        own = {"row": options["row"][b : b + 1]}
        for name in ("commit_step", "serial"):
            if options[name] is not None:
                own[name] = torch.nn.functional.pad(options[name][b : b + 1], (shift, 0))
        mask = torch.nn.functional.pad(answers[b : b + 1], (shift, 0))
        alone = run(padded, mask, **(options | own))
        for one, all_rows in zip(alone, together, strict=True):
            assert torch.equal(one[:, 0, shift:], all_rows[:, b])


def test_the_front_of_a_long_block_hangs_on_no_padding():
    """A block longer than its answer: the row alone, and padded by other lengths."""
    for seed in range(8):
        rows = []
        for pad in (0, 3, 40):
            tokens = torch.tensor([[1] * pad + list(range(1, 9))])
            answers = torch.arange(pad + 8)[None] >= pad
            options = {"mode": "frontier", "serial": answers, "block_length": 64, "seed": seed}
            rows.append(run(tokens, answers, **options)[0][0, 0, pad:].tolist())
        assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize("change", [{"seed": 4}, {"step": 1}, {"row": torch.arange(1, 41)}])
def test_other_numbers_for_another_seed_step_or_row(change):
    tokens, answers = sequences([18] * 40)
    assert not torch.equal(run(tokens, answers).views, run(tokens, answers, **change).views)


def test_the_complement_changes_nothing_about_the_first_view():
    tokens, answers = sequences([18, 9])
    for one, two in zip(
        run(tokens, answers, complementary=False), run(tokens, answers), strict=True
    ):
        assert one.shape[0] == 1 and torch.equal(one[0], two[0])


def test_no_host_synchronisation(cuda):
    tokens, answers = sequences([18, 9], device=cuda)
    commit = torch.zeros_like(tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for mode in MODES:
            run(tokens, answers, ratio=(0.1, 0.9), **for_mode(mode, commit))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_devices_agree(cuda):
    options = {"ratio": (0.0, 1.0), "mode": "block"}
    on_cpu = run(*sequences([18, 9]), **options)
    on_cuda = run(*sequences([18, 9], device=cuda), **options)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu, on_cuda, strict=True))


# ---- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"tokens": [[1]]}, TypeError, "tokens takes a torch.Tensor, got list"),
        (
            {"tokens": torch.zeros(3)},
            TypeError,
            "tokens takes dtype torch.int64, got",
        ),
        ({"tokens": torch.arange(3)}, ValueError, "tokens takes shape [B, T], got [3]"),
        (
            {"answers": torch.zeros(1, 19, dtype=torch.bool)},
            ValueError,
            "answer_mask takes shape [B, T] = [1, 20]",
        ),
        (
            {"answers": torch.zeros(1, 20)},
            TypeError,
            "answer_mask takes dtype torch.bool",
        ),
        ({"mode": "blocks"}, ValueError, "mode takes one of"),
        ({"weighting": None}, ValueError, "weighting takes one of"),
        ({"mask_id": -1}, ValueError, "mask_id takes an integer >= 0, got -1"),
        ({"mask_id": True}, TypeError, "mask_id takes an integer >= 0, got True"),
        ({"block_length": 0}, ValueError, "block_length takes an integer >= 1, got 0"),
        ({"seed": 0.5}, TypeError, "seed takes an integer, got 0.5"),
        ({"ratio": 1.5}, ValueError, "ratio takes a number in [0, 1]"),
        ({"ratio": float("nan")}, ValueError, "ratio takes a number in [0, 1]"),
        ({"ratio": (0.6, 0.4)}, ValueError, "ratio takes a number in [0, 1]"),
        ({"ratio": (0.6,)}, TypeError, "ratio takes a number in [0, 1]"),
        ({"ratio": "half"}, TypeError, "ratio takes a number in [0, 1]"),
        ({"ratio": torch.tensor([2.0])}, ValueError, "ratio takes numbers in [0, 1]"),
        ({"ratio": torch.tensor([0.5, 0.5])}, ValueError, "ratio takes shape [B] = [1]"),
        ({"row": torch.zeros(2, dtype=torch.int64)}, ValueError, "row takes shape [B] = [1]"),
        ({"mode": "frontier"}, ValueError, "serial belongs to mode 'frontier' and only there, got"),
        (
            {"serial": torch.zeros(1, 20, dtype=torch.bool)},
            ValueError,
            "serial belongs to mode 'frontier' and only there, got one with 'block'",
        ),
        ({"mode": "trajectory"}, ValueError, "commit_step belongs to mode 'trajectory'"),
        (
            {"commit_step": torch.zeros(1, 20, dtype=torch.int64)},
            ValueError,
            "commit_step belongs to mode 'trajectory' and only there, got one with 'block'",
        ),
    ],
)
def test_errors(change, error, message):
    tokens, answers = sequences([18])
    tokens, answers = change.pop("tokens", tokens), change.pop("answers", answers)
    with pytest.raises(error) as raised:
        run(tokens, answers, **change)
    assert str(raised.value).startswith("corrupt: ") and message in str(raised.value)
