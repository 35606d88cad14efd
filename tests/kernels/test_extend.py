"""``extend``: prefill and chunked prefill over an FP8 prefix, judged against float32 over the dequantised cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.kernels import extend as module
from fp8kv.kernels.arguments import KernelArgumentError
from fp8kv.kernels.extend import extend, reference_extend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN_CODE = 0xFF  # in E4M3FN and E5M2; two of them in BF16 and FP16
# what rounding probabilities, and BF16 outputs, to their formats costs; with some room
FLOAT32_LIMIT, BFLOAT16_LIMIT = 3e-4, 2.5e-3
UNQUANTISED_LIMITS = {torch.float16: 3e-4, torch.bfloat16: 2.5e-3}
NEW_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Problem:
    """Sequences as (prefix, new tokens), and how they are stored."""

    sequences: tuple[tuple[int, int], ...]
    q_heads: int = 6
    kv_heads: int = 2
    k_dim: int = 64
    v_dim: int = 64
    page_size: int = 4
    new: str = "bf16"
    query_type: torch.dtype = torch.bfloat16
    code_type: torch.dtype = torch.float8_e4m3fn
    per_head: bool = False
    hnd: bool = False
    padding: int = 0
    options: dict = field(default_factory=dict)


def build(problem: Problem, seed: int = 0) -> tuple[tuple, dict]:
    """Return positional and keyword arguments; stale bytes are NaN, unused page numbers absurd."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE)

    heads, page_size = problem.kv_heads, problem.page_size
    unit = torch.arange(heads if problem.per_head else 1, device=DEVICE) + 1.0
    k_scale, v_scale = 0.013 * unit, 0.021 * unit.flip(0).contiguous()
    lengths = [p + (n if problem.new == "cache" else 0) for p, n in problem.sequences]
    counts = [-(-length // page_size) for length in lengths]
    pages = sum(counts) + 3
    order = torch.randperm(pages, generator=generator, device=DEVICE).int()
    garbage = torch.tensor([-1, 2**31 - 1], dtype=torch.int32, device=DEVICE)
    table = garbage.repeat(len(lengths), max([*counts, 1]))
    quantised, itemsize = problem.code_type.itemsize == 1, problem.code_type.itemsize
    largest = torch.finfo(problem.code_type).max
    caches = []
    for dim, scale in ((problem.k_dim, k_scale), (problem.v_dim, v_scale)):
        cache = torch.full(
            (pages, page_size, heads, dim * itemsize), NAN_CODE, dtype=torch.uint8, device=DEVICE
        )
        for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            own = order[sum(counts[:b]) : sum(counts[: b + 1])]
            table[b, :count] = own
            tokens = torch.full((count * page_size, *cache.shape[2:]), NAN_CODE, dtype=torch.uint8)
            tokens = tokens.to(DEVICE)
            stored = normal(length, heads, dim)
            if quantised:
                stored = (stored / scale[:, None]).clamp(-largest, largest)
            tokens[:length] = stored.to(problem.code_type).view(torch.uint8)
            cache[own.long()] = tokens.view(count, page_size, *cache.shape[2:])
        if problem.hnd:
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        caches.append(cache.view(problem.code_type))
    total = sum(n for _, n in problem.sequences) + problem.padding
    query = normal(total, problem.q_heads, problem.k_dim).to(problem.query_type)
    key, value = normal(total, heads, problem.k_dim), normal(total, heads, problem.v_dim)
    if problem.new == "cache":
        key = value = None
    elif problem.new == "codes":
        key = (key / k_scale[:, None]).clamp(-largest, largest).to(problem.code_type)
        value = (value / v_scale[:, None]).clamp(-largest, largest).to(problem.code_type)
    else:
        key, value = key.to(NEW_TYPES[problem.new]), value.to(NEW_TYPES[problem.new])
    starts = [sum(n for _, n in problem.sequences[:b]) for b in range(len(lengths) + 1)]
    arguments = (
        query, key, value, *caches, table,
        torch.tensor([p for p, _ in problem.sequences], dtype=torch.int32, device=DEVICE),
        torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        k_scale, v_scale,
    )  # fmt: skip
    keywords = {
        "sm_scale": problem.k_dim**-0.5,
        "max_new_tokens": max(n for _, n in problem.sequences),
        "max_prefix_len": max(p for p, _ in problem.sequences),
    }
    options = dict(problem.options)
    if options.pop("sinks", False):
        options["sinks"] = normal(problem.q_heads) * 3
    return arguments, keywords | options


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    norm = expected.float().norm().item()
    return (found.float() - expected.float()).norm().item() / max(norm, 1e-30)


def check(problem: Problem, limit: float = FLOAT32_LIMIT, **output) -> None:
    """Compare outputs and log-sum-exps with the reference's."""
    arguments, keywords = build(problem)
    output = output or {"out_dtype": torch.float32}
    rows = arguments[0].shape[:2]
    lse = torch.full(rows, 7.0, device=DEVICE)
    expected_lse = lse.clone()
    found = extend(*arguments, **keywords, **output, lse=lse)
    expected = reference_extend(*arguments, **keywords, out_dtype=torch.float32, lse=expected_lse)
    tokens = sum(n for _, n in problem.sequences)
    assert torch.isfinite(found[:tokens].float()).all()
    assert relative_error(found[:tokens], expected[:tokens]) <= limit
    torch.testing.assert_close(lse, expected_lse, atol=1e-4, rtol=1e-5)


@pytest.fixture
def portable(monkeypatch) -> None:
    """Let the launcher choose the portable kernel, as it does without a Hopper GPU."""
    monkeypatch.setattr(module.hopper, "fits", lambda arguments: False)


def run(arguments: tuple, keywords: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the float32 output and the log-sum-exps."""
    lse = torch.full(arguments[0].shape[:2], 7.0, device=DEVICE)
    return extend(*arguments, **keywords, out_dtype=torch.float32, lse=lse), lse


RAGGED = ((0, 5), (33, 1), (3, 0), (64, 9), (15, 4), (0, 0), (16, 3), (17, 1))
FORMS = {
    "bf16": {},
    "fp16": {"new": "fp16", "query_type": torch.float16},
    "codes": {"new": "codes"},
    "in the cache": {"new": "cache"},
    "scale per head": {"per_head": True},
    "scale per head, in the cache": {"per_head": True, "new": "cache", "hnd": True},
    "HND": {"hnd": True, "page_size": 16},
    "page of one token": {"page_size": 1},
    "large page": {"page_size": 64},
    "E4M3FNUZ": {"code_type": torch.float8_e4m3fnuz, "new": "codes"},
    "E5M2": {"code_type": torch.float8_e5m2, "new": "codes"},
    "window": {"options": {"window": 6}},
    "window of one": {"options": {"window": 1}},
    "soft cap": {"options": {"soft_cap": 2.0}},
    "sinks": {"options": {"sinks": True}},
    "all": {"per_head": True, "options": {"sinks": True, "window": 20, "soft_cap": 5.0}},
    "not causal": {"options": {"causal": False}},
    "many heads": {"q_heads": 40, "kv_heads": 2},
    "192 and 128": {"k_dim": 192, "v_dim": 128, "q_heads": 2, "kv_heads": 2},
    "96 and 64": {"k_dim": 96, "v_dim": 64},
    "256": {"k_dim": 256, "v_dim": 256},
}
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
UNQUANTISED = {
    "in the cache": {"new": "cache", "hnd": True},
    "beside the cache": {"new": "bf16" if DEVICE == "cuda" else "fp16"},
    "all": {"new": "cache", "options": {"sinks": True, "window": 20, "soft_cap": 5.0}},
    "192 and 128": {"new": "cache", "k_dim": 192, "v_dim": 128, "q_heads": 2, "kv_heads": 2},
}


# each form is compiled by itself, which takes seconds on a GPU: there the large problems cover the rest
ON_A_GPU = ["scale per head, in the cache", "codes", "E5M2", "window of one", "all", "not causal"]


@pytest.mark.parametrize("form", ON_A_GPU if DEVICE == "cuda" else FORMS)
def test_every_form_equals_the_reference(form):
    check(Problem(RAGGED, **FORMS[form]))


@pytest.mark.parametrize("form", UNQUANTISED)
def test_an_unquantised_cache_is_read_as_it_is_and_no_value_is_scaled(form):
    problem = Problem(RAGGED, code_type=HALF, query_type=HALF, **UNQUANTISED[form])
    check(problem, UNQUANTISED_LIMITS[HALF])


@pytest.mark.parametrize("form", ["bf16", "E4M3FNUZ", "96 and 64"])
def test_the_portable_kernel_equals_the_reference(form, portable):
    check(Problem(RAGGED, **FORMS[form]))


def test_codes_taken_apart_as_bits(monkeypatch, portable):
    """For GPUs on which Triton does not know E4M3."""
    monkeypatch.setattr(module.extend_portable, "_format", lambda arguments: "e4m3fn bits")
    check(Problem(RAGGED, new="codes"))


def test_without_a_cache():
    arguments, keywords = build(Problem(((0, 70), (0, 1), (0, 33))))
    bare = (*arguments[:3], None, None, None, *arguments[6:])
    found, _ = run(bare, keywords)
    expected = reference_extend(*bare, **keywords, out_dtype=torch.float32)
    assert relative_error(found, expected) <= FLOAT32_LIMIT
    # a cache that no sequence uses makes no difference
    assert torch.equal(run(arguments, keywords)[0], found)


@pytest.mark.parametrize("new", [0, 1, 3, 4, 5, 63, 64, 65])
def test_lengths_around_pages_and_tiles(new):
    sequences = tuple((prefix, new) for prefix in (0, 1, 3, 4, 5, 63, 64, 65))
    check(Problem((*sequences, (2, 2)), q_heads=6, kv_heads=2))


def test_rows_behind_the_last_sequence_are_left_alone():
    arguments, keywords = build(Problem(((9, 5), (0, 3)), padding=4))
    out = torch.full(arguments[0].shape, 3.0, device=DEVICE)
    lse = torch.full(out.shape[:2], 3.0, device=DEVICE)
    result = extend(*arguments, **keywords, out=out, lse=lse)
    assert result is out
    assert (out[8:] == 3.0).all()
    assert (lse[8:] == 3.0).all()
    assert (out[:8] != 3.0).any()


def test_the_callers_tensors_are_read_only():
    arguments, keywords = build(Problem(RAGGED))
    before = [tensor.clone() for tensor in arguments]
    run(arguments, keywords)
    for tensor, copy in zip(arguments, before, strict=True):
        if tensor.element_size() == 1:
            tensor, copy = tensor.view(torch.uint8), copy.view(torch.uint8)
        assert torch.equal(tensor, copy)


def test_views_of_a_joint_projection():
    """Query, key and value as slices of one tensor, the output as a slice of a wider one."""
    arguments, keywords = build(Problem(((7, 5), (0, 9))))
    query, key, value = torch.cat(arguments[:3], dim=1).split([6, 2, 2], dim=1)
    wide = torch.zeros(14, 6, 128, device=DEVICE)
    lse = torch.zeros(14, 6, device=DEVICE)
    found = extend(query, key, value, *arguments[3:], **keywords, out=wide[..., 64:], lse=lse)
    assert torch.equal(found, run(arguments, keywords)[0])
    assert (wide[..., :64] == 0).all()


def test_where_the_new_tokens_lie_makes_no_difference():
    """The same codes, once beside the cache and once in it."""
    arguments, keywords = build(Problem(((13, 6),), new="cache"))
    _, _, _, k_cache, v_cache, table, *_ = arguments
    slots = torch.arange(13, 19, device=DEVICE)
    pages, offsets = table[0][slots // 4].long(), slots % 4
    beside = (arguments[0], k_cache[pages, offsets], v_cache[pages, offsets], *arguments[3:])
    assert relative_error(run(beside, keywords)[0], run(arguments, keywords)[0]) <= 2e-4


@pytest.mark.parametrize("exponent", [-90, 90])
def test_queries_of_any_magnitude_lose_nothing(exponent):
    """BF16 reaches far beyond FP16; a power of two taken from the scale and given to the queries changes no bit."""
    arguments, keywords = build(Problem(((20, 6),)))
    expected, _ = run(arguments, keywords)
    query = (arguments[0].float() * 2.0**exponent).bfloat16()
    keywords["sm_scale"] *= 2.0**-exponent
    assert torch.equal(run((query, *arguments[1:]), keywords)[0], expected)


def test_a_window_leaves_out_what_lies_before_it():
    """NaN codes in front of every window: none of them may be used."""
    arguments, keywords = build(Problem(((300, 3),), options={"window": 1}))
    keywords["window"] = 8
    expected, _ = run(arguments, keywords)
    for cache in arguments[3:5]:
        cache.view(torch.uint8)[arguments[5][0, :60].long()] = NAN_CODE
    assert torch.equal(run(arguments, keywords)[0], expected)


def test_a_window_over_several_tiles():
    check(Problem(((300, 40), (0, 250)), options={"window": 150}))


def test_no_sequences():
    arguments, keywords = build(Problem(((4, 2),)))
    query = arguments[0][:0]
    none = (query, arguments[1][:0], arguments[2][:0], *arguments[3:5], arguments[5][:0])
    lengths = (arguments[6][:0], arguments[7][:1], *arguments[8:])
    assert extend(*none, *lengths, **keywords).shape == (0, 6, 64)


WRONG = {
    "query": lambda a, k: (a | {"query": a["query"].float()}, k),
    "key": lambda a, k: (a | {"key": a["key"][..., :32]}, k),
    "value": lambda a, k: (a | {"value": None}, k),
    "dtype of value": lambda a, k: (a | {"value": a["value"].half()}, k),
    "k_cache": lambda a, k: (a | {"k_cache": a["k_cache"].float()}, k),
    "v_cache": lambda a, k: (a | {"v_cache": a["v_cache"][:, :3]}, k),
    "page_size": lambda a, k: (
        a | {name: a[name][:, :3] for name in ("k_cache", "v_cache")}, k,
    ),
    "page_table": lambda a, k: (a | {"page_table": a["page_table"].long()}, k),
    "k_cache, v_cache and page_table": lambda a, k: (a | {"page_table": None}, k),
    "prefix_lens": lambda a, k: (a | {"prefix_lens": a["prefix_lens"].long()}, k),
    "cu_seqlens": lambda a, k: (a | {"cu_seqlens": a["cu_seqlens"][1:]}, k),
    "k_scale": lambda a, k: (a | {"k_scale": 0.5}, k),
    "v_scale": lambda a, k: (a | {"v_scale": torch.ones(3, device=DEVICE)}, k),
    "the stride of k_scale": lambda a, k: (a | {"k_scale": torch.ones(4, device=DEVICE)[::2]}, k),
    "number of query heads": lambda a, k: (a | {"query": a["query"][:, :5]}, k),
    "sm_scale": lambda a, k: (a, k | {"sm_scale": -1.0}),
    "window": lambda a, k: (a, k | {"window": 0}),
    "window is 4": lambda a, k: (a, k | {"window": 4, "causal": False}),
    "soft_cap": lambda a, k: (a, k | {"soft_cap": 0.0}),
    "sinks": lambda a, k: (a, k | {"sinks": torch.zeros(2, device=DEVICE)}),
    "out": lambda a, k: (a, k | {"out": torch.zeros(2, 6, 64, device=DEVICE)}),
    "lse": lambda a, k: (a, k | {"lse": torch.zeros(7, device=DEVICE)}),
    "max_prefix_len": lambda a, k: (
        a | {"k_cache": None, "v_cache": None, "page_table": None}, k,
    ),
    "last stride of query": lambda a, k: (
        a | {"query": a["query"].transpose(1, 2).contiguous().transpose(1, 2)}, k,
    ),
}  # fmt: skip
NAMES = (
    "query", "key", "value", "k_cache", "v_cache", "page_table", "prefix_lens", "cu_seqlens", "k_scale",
    "v_scale",
)  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    arguments, keywords = build(Problem(((9, 5), (2, 2))))
    named, keywords = WRONG[name](dict(zip(NAMES, arguments, strict=True)), keywords)
    with pytest.raises(KernelArgumentError, match=name):
        extend(**named, **keywords)


# what is compiled in is drawn from few, all else from many
DRAWN = ["bf16", "scale per head, in the cache", "codes", "window of one"]


@settings(
    max_examples=100 if DEVICE == "cuda" else 15, deadline=None, database=None, derandomize=True
)
@given(
    form=st.sampled_from(DRAWN),
    sequences=st.lists(
        st.tuples(st.integers(0, 90), st.integers(0, 40)), min_size=1, max_size=4
    ).filter(lambda found: any(new for _, new in found)),
    window=st.integers(1, 60),
)
def test_any_lengths(form, sequences, window):
    problem = Problem(tuple(sequences), **FORMS[form])
    if problem.options:
        problem = replace(problem, options={"window": window})
    check(problem)


LARGE = Problem(
    ((0, 700), (1023, 1), (700, 150), (64, 0), (1024, 17), (128, 129), (4097, 65)),
    q_heads=48, kv_heads=8, k_dim=128, v_dim=128, page_size=16,
)  # fmt: skip
LARGE_FORMS = {
    "bf16": {},
    "without a prefix": {"sequences": ((0, 700), (0, 1), (0, 129))},
    "in the cache": {"new": "cache"},
    "all": {"per_head": True, "hnd": True, "options": {"sinks": True, "window": 500, "soft_cap": 20.0}},
    "192 and 128": {"k_dim": 192, "v_dim": 128, "q_heads": 16, "kv_heads": 16},
    "192 and 128, in the cache": {
        "k_dim": 192, "v_dim": 128, "q_heads": 16, "kv_heads": 16, "new": "cache",
    },
    "256": {"k_dim": 256, "v_dim": 256, "q_heads": 16, "kv_heads": 4},
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("form", LARGE_FORMS)
def test_large_problems(form):
    check(replace(LARGE, **LARGE_FORMS[form]))


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["bf16", "in the cache", "192 and 128"])
def test_large_problems_with_the_portable_kernel(form, portable):
    check(replace(LARGE, **LARGE_FORMS[form]))


@pytest.mark.gpu
@pytest.mark.parametrize("new", ["cache", "bf16"])
def test_large_problems_over_an_unquantised_cache(new):
    problem = replace(LARGE, new=new, code_type=torch.bfloat16)
    check(problem, UNQUANTISED_LIMITS[torch.bfloat16])
    check(problem, 4e-3, out_dtype=torch.bfloat16)


WIDTHS = [
    (16, 16), (32, 16), (64, 16), (96, 16), (16, 32), (64, 32), (96, 32), (128, 32), (48, 48), (128, 48),
    (32, 64), (128, 64), (256, 64), (64, 96), (192, 96), (96, 128), (256, 128), (128, 256),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("k_dim", "v_dim"), WIDTHS)
def test_keys_and_values_of_any_widths(k_dim, v_dim):
    dims = {"k_dim": k_dim, "v_dim": v_dim, "page_size": 16}
    check(Problem((*RAGGED, (290, 7)), new="cache", **dims))
    check(Problem(((0, 70), (0, 1), (0, 200)), q_heads=4, kv_heads=4, **dims))
    unquantised = Problem((*RAGGED, (290, 7)), new="cache", code_type=torch.bfloat16, **dims)
    check(unquantised, UNQUANTISED_LIMITS[torch.bfloat16])


@pytest.mark.gpu
def test_rounding_of_the_output():
    check(LARGE, BFLOAT16_LIMIT, out_dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("prefix", [1024, 8192, 65536])
@pytest.mark.parametrize("height", [8.0, 10.0])
def test_an_attention_sink_costs_nothing(prefix, height):
    """One key some logits above the rest takes much of the weight; the small weights still count."""
    problem = replace(LARGE, sequences=((prefix, 40),), q_heads=12, kv_heads=2)
    arguments, keywords = build(problem)
    query, key, _, k_cache, v_cache, table, _, _, k_scale, _ = arguments
    query[:, :, 0] = 32.0
    key[:, :, 0] = 0.0
    k_cache.view(torch.uint8)[..., 0] = 0
    first = table[0, 0].long()
    high = (height * 128**0.5 / 32.0 / k_scale).to(k_cache.dtype).view(torch.uint8)
    for cache in (k_cache, v_cache):
        cache.view(torch.uint8)[first, 0] = 0
    k_cache.view(torch.uint8)[first, 0, :, 0] = high
    expected = reference_extend(*arguments, **keywords, out_dtype=torch.float32)
    assert relative_error(run(arguments, keywords)[0], expected) <= FLOAT32_LIMIT


@pytest.mark.gpu
def test_a_prefix_of_196608_tokens():
    check(replace(LARGE, sequences=((196608, 3), (5, 2)), q_heads=12, kv_heads=2))


@pytest.mark.gpu
def test_a_batch_of_256():
    sequences = tuple((7 * b % 190, b % 5) for b in range(256))
    check(replace(LARGE, sequences=sequences, q_heads=12, kv_heads=2, new="cache"))


@pytest.mark.gpu
def test_pages_behind_two_gibibytes():
    """A token of the last page starts beyond what 32 bits can count."""
    arguments, keywords = build(replace(LARGE, sequences=((40, 20),)))
    expected, _ = run(arguments, keywords)
    caches = []
    for small in arguments[3:5]:
        pages = 2**31 // small[0].numel() + 8
        large = torch.empty((pages, *small.shape[1:]), dtype=torch.uint8, device=DEVICE)
        large[-small.shape[0] :] = small.view(torch.uint8)
        caches.append(large.view(small.dtype))
    table = arguments[5].clone()
    table[0, :3] += caches[0].shape[0] - arguments[3].shape[0]
    moved = (*arguments[:3], *caches, table, *arguments[6:])
    assert torch.equal(run(moved, keywords)[0], expected)


@pytest.mark.gpu
def test_a_captured_call_follows_lengths_pages_and_scales():
    """At most 128 new tokens of three sequences; between replays everything on the device changes."""
    drawn = [
        ((300, 40), (20, 60), (64, 28)),
        ((10, 1), (300, 60), (7, 33)),
        ((0, 0), (1, 3), (299, 9)),
    ]
    built = [
        build(replace(LARGE, sequences=one, padding=128 - sum(new for _, new in one)), seed)[0]
        for seed, one in enumerate(drawn)
    ]
    keywords = build(LARGE)[1] | {"max_new_tokens": 128, "max_prefix_len": 300}
    static = []
    for same in zip(*built, strict=True):
        shape = [max(lengths) for lengths in zip(*(t.shape for t in same), strict=True)]
        size = same[0].element_size() * math.prod(shape)
        raw = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
        static.append(raw.view(same[0].dtype).view(shape))
    out = torch.empty(128, 48, 128, device=DEVICE)
    lse = torch.empty(128, 48, device=DEVICE)
    extend(*static, **keywords, out=out, lse=lse)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        extend(*static, **keywords, out=out, lse=lse)
    for factor, arguments in zip((1.0, 1.7, 0.6), built, strict=True):
        scaled = (*arguments[:8], arguments[8] * factor, arguments[9] / factor)
        for place, source in zip(static, scaled, strict=True):
            if source.element_size() == 1:
                place, source = place.view(torch.uint8), source.view(torch.uint8)
            place[tuple(slice(0, length) for length in source.shape)] = source
        graph.replay()
        expected_lse = torch.empty_like(lse)
        expected = reference_extend(*scaled, **keywords, out_dtype=torch.float32, lse=expected_lse)
        tokens = int(scaled[7][-1])
        assert relative_error(out[:tokens], expected[:tokens]) <= FLOAT32_LIMIT
        torch.testing.assert_close(lse[:tokens], expected_lse[:tokens], atol=1e-4, rtol=1e-5)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    arguments, keywords = build(LARGE)
    run(arguments, keywords)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = run(arguments, keywords)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(out.sum().item())


@pytest.mark.gpu
def test_the_kernel_of_hopper_is_chosen_where_it_can_run(monkeypatch):
    arguments, keywords = build(LARGE)
    taken = []
    monkeypatch.setattr(module.hopper, "launch", taken.append)
    monkeypatch.setattr(module.extend_portable, "launch", lambda arguments: None)
    extend(*arguments, **keywords)
    assert len(taken) == (1 if torch.cuda.get_device_capability()[0] == 9 else 0)
