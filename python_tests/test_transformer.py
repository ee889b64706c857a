# SPDX-License-Identifier: Apache-2.0
"""The transformer against itself and against formulas: caches, masks, head positions, devices."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from r2dllm_ext.models import ModelConfig, Transformer
from r2dllm_ext.models.transformer import RMSNorm, _attend, _rotate

B, T, START, END = 2, 24, 8, 16
# Two orders of the same sums in float64: a forward's few thousand roundings are 1e-12 of what they
# add up, on any machine, and a cell that sees one key too many or too few moves by 1e-4 and more
# (`test_logits_cover_embedding_rows_and_depend_on_every_token`).
CLOSE = {"rtol": 1e-9, "atol": 1e-9}

CONFIGS = {
    "llada": ModelConfig("llada", 50, width=32, layers=3, heads=4, mlp_width=48, embedding_size=56),
    "llada-gqa": ModelConfig("llada", 50, width=48, layers=2, heads=6, kv_heads=2, mlp_width=48),
    "dream": ModelConfig(
        "dream",
        50,
        width=32,
        layers=3,
        heads=4,
        kv_heads=2,
        mlp_width=48,
        qkv_bias=True,
        rope_theta=1e6,
        norm_eps=1e-6,
    ),
    "tied": ModelConfig("dream", 50, width=32, layers=1, heads=4, mlp_width=48, tied_head=True),
}


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    """Float64, weights large enough that attention is far from uniform, biases that are not 0."""
    model = Transformer(config).init_weights(seed, std=0.3).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * 0.3 + (0.0 if name.endswith("bias") else 1.0))
    return model


@pytest.fixture(params=CONFIGS)
def model(request) -> Transformer:
    return build(CONFIGS[request.param])


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 50, (B, T), generator=torch.Generator().manual_seed(1))


def cut(pairs, end):
    """Both families keep time in the last dimension but one."""
    return [tuple(t.narrow(t.dim() - 2, 0, end) for t in pair) for pair in pairs]


def test_logits_cover_embedding_rows_and_depend_on_every_token(model, ids):
    logits = model(ids).logits
    assert logits.shape == (B, T, model.config.embedding_size)
    for place in (0, T - 1):
        other = ids.clone()
        other[:, place] = (other[:, place] + 1) % 50
        changed = (model(other).logits - logits).abs().amax(-1) > 1e-4
        assert changed.all(), "attention is bidirectional: every position sees the change"


def test_cache_layout_follows_the_family(model, ids):
    config = model.config
    key, value = model(ids, use_cache=True).past_key_values[0]
    wanted = {
        "llada": (B, config.kv_heads, T, config.head_dim),
        "dream": (B, T, config.kv_heads * config.head_dim),
    }
    assert key.shape == value.shape == wanted[config.family]
    assert model(ids).past_key_values is None


def test_keys_are_cached_before_the_rotary_embedding(model):
    same = torch.full((1, T), 7)
    key, _ = model(same, use_cache=True).past_key_values[0]
    time = key.dim() - 2
    first = key.narrow(time, 0, 1).expand_as(key)
    torch.testing.assert_close(key, first, **CLOSE)


def test_prefix_cache_equals_full_pass_and_keeps_the_past(model, ids):
    full = model(ids, use_cache=True)
    past = cut(full.past_key_values, START)
    before = [tuple(t.clone() for t in pair) for pair in past]
    out = model(ids[:, START:], past_key_values=past, use_cache=True)
    torch.testing.assert_close(out.logits, full.logits[:, START:], **CLOSE)
    for layer, pair in enumerate(past):
        for side in (0, 1):
            assert torch.equal(pair[side], before[layer][side])
            torch.testing.assert_close(
                out.past_key_values[layer][side], full.past_key_values[layer][side], **CLOSE
            )


def block_mask(start=START, end=END):
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[:, start:end] = True
    return mask


@pytest.mark.parametrize("replace", [(START, END), block_mask()], ids=["range", "mask"])
def test_dual_cache_after_an_unchanged_pass_equals_it(model, ids, replace):
    full = model(ids, use_cache=True)
    out = model(
        ids[:, START:END],
        past_key_values=full.past_key_values,
        use_cache=True,
        replace_position=replace,
        dual_cache=True,
    )
    torch.testing.assert_close(out.logits, full.logits[:, START:END], **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("replace", [(START, END), block_mask()], ids=["range", "mask"])
def test_dual_cache_overwrites_the_block(name, replace, ids):
    # With one layer the pairs outside the block do not depend on it, so nothing is stale and the
    # step must equal a full pass over the new ids.
    model = build(dataclasses.replace(CONFIGS[name], layers=1))
    past = model(ids, use_cache=True).past_key_values
    new = ids.clone()
    new[:, START:END] = (new[:, START:END] + 5) % 50
    wanted = model(new, use_cache=True)
    out = model(new[:, START:END], past_key_values=past, use_cache=True, replace_position=replace)
    torch.testing.assert_close(out.logits, wanted.logits[:, START:END], **CLOSE)
    for got, want in zip(out.past_key_values[0], wanted.past_key_values[0], strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_dual_cache_rows_may_work_on_different_blocks(model, ids):
    full = model(ids, use_cache=True)
    mask = block_mask()
    mask[1] = mask[1].roll(START)
    rows = torch.stack([ids[0, START:END], ids[1, END : END + START]])
    out = model(rows, past_key_values=full.past_key_values, replace_position=mask)
    wanted = torch.stack([full.logits[0, START:END], full.logits[1, END : END + START]])
    torch.testing.assert_close(out.logits, wanted, **CLOSE)


def test_left_padded_row_equals_the_unpadded_one(model, ids):
    pad = 5
    padded = torch.cat((torch.zeros(B, pad, dtype=torch.int64), ids), dim=1)
    mask = torch.ones(B, pad + T, dtype=torch.bool)
    mask[:, :pad] = False
    plain = model(ids, use_cache=True)
    full = model(padded, attention_mask=mask, use_cache=True)
    # The rotation by 5 positions more is another entry of the tables: float32, of up to 29 radians,
    # so 2^-20 off; a score takes width * 2^-20 of it, three layers 1e-4.
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(full.logits[:, pad:], plain.logits, **close)
    past = cut(full.past_key_values, pad + START)
    tail = model(ids[:, START:], past_key_values=past, attention_mask=mask.long())
    torch.testing.assert_close(tail.logits, plain.logits[:, START:], **close)


def test_a_row_of_padding_alone_stays_finite_and_apart(model, ids):
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0] = False
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1], model(ids).logits[1], **CLOSE)


@pytest.mark.parametrize(
    "positions",
    [
        slice(START, END),
        slice(-3, None),
        (START, END),
        torch.tensor([3, 1, 20]),
        torch.tensor([[3, 1], [0, T - 1]]),
    ],
    ids=["slice", "open slice", "range", "indices", "indices per row"],
)
def test_logits_positions_pick_rows_of_the_full_logits(model, ids, positions):
    full = model(ids).logits
    if isinstance(positions, tuple):
        wanted = full[:, positions[0] : positions[1]]
    elif isinstance(positions, torch.Tensor) and positions.dim() == 2:
        wanted = full[torch.arange(B)[:, None], positions]
    else:
        wanted = full[:, positions]
    torch.testing.assert_close(model(ids, logits_positions=positions).logits, wanted, **CLOSE)


def test_grouped_queries_equal_repeated_key_heads(ids):
    grouped = build(CONFIGS["llada-gqa"])
    config = grouped.config
    plain = Transformer(dataclasses.replace(config, kv_heads=config.heads)).double()
    plain.requires_grad_(False)
    state = grouped.state_dict()
    for name, weight in state.items():
        if "k_proj" in name or "v_proj" in name:
            heads = weight.unflatten(0, (config.kv_heads, config.head_dim))
            state[name] = heads.repeat_interleave(config.heads // config.kv_heads, 0).flatten(0, 1)
    plain.load_state_dict(state)
    torch.testing.assert_close(grouped(ids).logits, plain(ids).logits, **CLOSE)


def test_tied_head_is_the_embedding(ids):
    model = build(CONFIGS["tied"])
    assert model.lm_head_weight is model.embed.weight
    hidden, _ = model.hidden_states(ids)
    torch.testing.assert_close(model(ids).logits, hidden @ model.embed.weight.T, **CLOSE)


def test_a_float64_model_computes_in_float64():
    """Rounded to float32 anywhere, the numbers are 1e-8 and more off."""
    x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(RMSNorm(8, 1e-5).double()(x), wanted, **CLOSE)
    cos, sin = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1))
    a, b = x.chunk(2, -1)
    wanted = torch.cat(
        (a * cos.double() - b * sin.double(), b * cos.double() + a * sin.double()), -1
    )
    torch.testing.assert_close(_rotate(x, cos, sin), wanted, **CLOSE)


def test_norm_casts_back_before_the_weight():
    norm = RMSNorm(8, 1e-5)
    norm.weight.data = torch.linspace(0.5, 2, 8)
    norm, x = norm.bfloat16(), torch.randn(4, 8).bfloat16()
    wide = x.float()
    unit = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), norm.weight * unit.bfloat16())


def test_rotary_tables_stay_float32_and_grow(ids):
    config = dataclasses.replace(CONFIGS["llada"], max_length=4)
    short, long = build(config), build(CONFIGS["llada"])
    assert short.rotary.cos.shape[0] == 4
    assert torch.equal(short(ids).logits, long(ids).logits)
    assert short.rotary.cos.shape[0] >= T
    narrow = short.to(torch.bfloat16)
    assert narrow.dtype == torch.bfloat16 and narrow.rotary.cos.dtype == torch.float32
    assert torch.equal(narrow.rotary.cos[:T], long.rotary.cos[:T])
    assert not any("rotary" in name for name in narrow.state_dict())


class DoubledResults(TorchFunctionMode):
    """A caller's mode under which no function returns what it should."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return (
            result * 2
            if isinstance(result, torch.Tensor) and result.is_floating_point()
            else result
        )


def in_inference_mode(model, ids):
    with torch.inference_mode():
        model(ids)


def with_fake_tensors(model, ids):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(ids))


def under_a_default_device(model, ids):
    with torch.device("meta"):
        model(ids)


def under_a_default_dtype(model, ids):
    torch.set_default_dtype(torch.float64)
    try:
        model(ids)
    finally:
        torch.set_default_dtype(torch.float32)


def under_autocast(model, ids):
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)


def under_a_function_mode(model, ids):
    with DoubledResults():
        model.rotary(ids.shape[1], ids.device)


def inside_a_transform(model, ids):
    def loss(weight):
        return torch.func.functional_call(model, {"norm.weight": weight}, ids).logits.sum()

    torch.func.grad(loss)(model.norm.weight.detach())


def inside_a_map(model, ids):
    torch.func.vmap(lambda row: model(row[None]).logits)(ids)


@pytest.mark.parametrize(
    "call",
    [
        in_inference_mode,
        with_fake_tensors,
        under_a_default_device,
        under_a_default_dtype,
        under_autocast,
        under_a_function_mode,
        inside_a_transform,
        inside_a_map,
    ],
)
def test_tables_that_grow_under_a_mode_outlive_it(call, ids):
    """What a module keeps is built outside the modes of the call that needs it first."""
    wanted = build(CONFIGS["llada"])(ids).logits
    model = build(dataclasses.replace(CONFIGS["llada"], max_length=4)).requires_grad_()
    call(model, ids)
    # Fake tables are made anew for each call; all others are the ones that are kept.
    assert model.rotary.cos.shape[0] == (4 if call is with_fake_tensors else 32)
    logits = model(ids).logits
    assert torch.equal(logits, wanted)
    logits.sum().backward()
    assert model.embed.weight.grad.isfinite().all()


def test_fake_models_stay_fake_and_leave_no_trace(ids):
    config = dataclasses.replace(CONFIGS["llada"], max_length=4)
    solid = build(config)
    with FakeTensorMode() as mode:  # one that refuses to be mixed with real tensors
        fake_ids = mode.from_tensor(ids)
        assert isinstance(Transformer(config)(fake_ids).logits, FakeTensor)
        fakes = {name: mode.from_tensor(weight) for name, weight in solid.named_parameters()}
        out = torch.func.functional_call(solid, fakes, fake_ids)
        assert isinstance(out.logits, FakeTensor)
    assert torch.equal(solid(ids).logits, build(CONFIGS["llada"])(ids).logits)


def test_a_model_built_and_moved_under_inference_mode_has_plain_tables():
    with torch.inference_mode():
        model = Transformer(CONFIGS["llada"]).to("meta").to_empty(device="cpu")
    assert not model.rotary.cos.is_inference()
    assert torch.equal(model.rotary.cos, build(CONFIGS["llada"]).rotary.cos)


def test_rotation_in_the_precision_of_the_published_class(model, ids):
    """LLaDA rotates in float32 and rounds once; Dream in the dtype of the weights."""
    model = model.bfloat16()
    step = model._step(ids, None, None, None)
    dtype = torch.bfloat16 if model.config.family == "dream" else torch.float32
    x = torch.randn(B, 3, T, model.config.head_dim, generator=torch.Generator().manual_seed(2))
    x = x.bfloat16()
    cos, sin = (table[:T].repeat(1, 2).to(dtype) for table in model.rotary(T, ids.device))
    a, b = x.chunk(2, -1)
    want = (x * cos + torch.cat((-b, a), -1) * sin).bfloat16()
    for rope in (step.query_rope, step.key_rope):
        assert torch.equal(_rotate(x, *rope), want)


def test_meta_device_and_materialisation(model, ids):
    with torch.device("meta"):
        hollow = Transformer(model.config)
    assert hollow(ids.to("meta")).logits.shape == (B, T, model.config.embedding_size)
    solid = hollow.to_empty(device="cpu").double()
    solid.load_state_dict(model.state_dict())
    assert torch.equal(solid(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("name", "replace"),
    [("llada-gqa", (START, END)), ("dream", block_mask())],
    ids=["llada-range", "dream-mask"],
)
def test_compiles_to_one_graph(name, replace, ids):
    model = build(dataclasses.replace(CONFIGS[name], layers=1))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    full = model(ids, use_cache=True)
    torch.testing.assert_close(compiled(ids, use_cache=True).logits, full.logits, **CLOSE)
    block = compiled(
        ids[:, START:END], past_key_values=full.past_key_values, replace_position=replace
    )
    torch.testing.assert_close(block.logits, full.logits[:, START:END], **CLOSE)


def test_bfloat16_cpu_training_attention_equals_the_fused_one():
    q, k, v = (torch.randn(2, 3, 16, 8).bfloat16().requires_grad_() for _ in range(3))
    mask = torch.ones(2, 1, 1, 16, dtype=torch.bool)
    mask[0, ..., :5] = False
    wanted = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    # Scores below 8, rounded to bfloat16 (2^-9), move a share by 1/64 of it; sums add as much.
    torch.testing.assert_close(_attend(q, k, v, mask).float(), wanted, rtol=0.05, atol=0.05)


def test_same_seed_same_weights():
    first, again, other = (Transformer(CONFIGS["llada"]).init_weights(s) for s in (3, 3, 4))
    assert torch.equal(first.embed.weight, again.embed.weight)
    assert not torch.equal(first.embed.weight, other.embed.weight)


def test_bad_calls_name_the_argument(ids):
    model = build(CONFIGS["llada"])
    past = model(ids, use_cache=True).past_key_values
    block = ids[:, START:END]
    with pytest.raises(ValueError, match=r"input_ids takes .*, got torch.float32 \[2, 24\]"):
        model(ids.float())
    with pytest.raises(ValueError, match=r"input_ids takes int64 \[B, T\]"):
        model(ids[0])
    with pytest.raises(ValueError, match=r"attention_mask takes .*\[2, 24\], got \[2, 23\]"):
        model(ids, attention_mask=torch.ones(2, 23))
    with pytest.raises(ValueError, match=r"past_key_values takes 3 layers, got 2"):
        model(block, past_key_values=past[:2])
    with pytest.raises(ValueError, match=r"replace_position takes 8 positions .*, got \(8, 17\)"):
        model(block, past_key_values=past, replace_position=(8, 17))
    with pytest.raises(ValueError, match=r"within the 24 of .*, got \(20, 28\)"):
        model(block, past_key_values=past, replace_position=(20, 28))
    with pytest.raises(ValueError, match=r"takes bool \[B, T_past\] = \[2, 24\]"):
        model(block, past_key_values=past, replace_position=torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"takes exactly 8 true positions a row .* got \[9, 9\]"):
        model(block, past_key_values=past, replace_position=block_mask(START, END + 1))
    with pytest.raises(ValueError, match=r"replace_position takes past_key_values beside it"):
        model(block, replace_position=(START, END))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "gpt"}, "family takes 'llada' or 'dream', got 'gpt'"),
        ({"layers": 0}, "layers takes an int in .*, got 0"),
        ({"heads": 3}, r"width takes an even multiple of heads \(3\), got 32"),
        ({"kv_heads": 3}, r"heads takes a multiple of kv_heads \(3\), got 4"),
        ({"embedding_size": 49}, r"embedding_size takes at least vocab_size \(50\), got 49"),
        ({"eos_id": (1, 50)}, r"eos_id takes an id of the vocabulary \[0, 50\) or several"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling takes a RopeScaling or None, got {"),
    ],
)
def test_config_names_the_bad_field(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIGS["llada"], **change)


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, CLOSE), (torch.float32, {"rtol": 1e-3, "atol": 1e-3})]
)
def test_cuda_equals_cpu_without_synchronising(cuda, model, ids, dtype, close):
    model = model.to(dtype)
    wanted = model(ids).logits
    model, ids, mask = model.to(cuda), ids.to(cuda), block_mask().to(cuda)
    full = model(ids, use_cache=True)
    torch.testing.assert_close(full.logits.cpu(), wanted, **close)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = model(ids[:, START:END], past_key_values=full.past_key_values, replace_position=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.logits, full.logits[:, START:END], **close)
