"""Fused modules compute what the model's own do, and are given back as they were found.

Without a GPU the kernels run in Triton's interpreter, on float32, whose arithmetic is right there.
"""

import weakref
from contextlib import ExitStack

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.modeling.load import load_model
from fp8kv.runtime.fused_modules import Fused, fuse_modules

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = torch.arange(3, 40, device=DEVICE)[None]

# norms, groups of projections, MLPs
FUSED = {
    "llama": Fused(5, 2, 2),
    "qwen2": Fused(5, 2, 2),
    "qwen3": Fused(9, 2, 2),
    "gemma3_text": Fused(13, 2, 0),
    "minimax_m2": Fused(9, 2, 0),
    "gpt_oss": Fused(5, 2, 0),
    "mimo_v2_flash": Fused(5, 2, 1),
    "deepseek_v2": Fused(9, 2, 2),
    "deepseek_v3": Fused(9, 2, 2),
    "minicpm3": Fused(9, 2, 2),
}


@pytest.fixture(scope="module")
def model_of(tiny_checkpoint):
    """Give a tiny model in float32."""
    loaded = {}

    def get(model_type):
        if model_type not in loaded:
            checkpoint = open_checkpoint(tiny_checkpoint(model_type))
            loaded[model_type] = load_model(checkpoint, dtype=torch.float32, device=DEVICE)
        return loaded[model_type]

    return get


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def overridden(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("model_type", FUSED)
def test_a_fused_model_gives_the_same_logits(model_of, model_type):
    model = model_of(model_type)
    expected, before = logits(model), overridden(model)
    parameters = {name: one.clone() for name, one in model.named_parameters()}
    with ExitStack() as stack:
        assert fuse_modules(model, stack) == FUSED[model_type]
        found = logits(model)
        assert len(overridden(model)) > len(before)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, parameters[name])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert overridden(model) == before
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_projections_share_one_weight_while_they_are_fused(model_of):
    attention = model_of("qwen2").model.layers[0].self_attn
    names = ("q_proj", "k_proj", "v_proj")

    def owners():
        return {getattr(attention, name).weight.untyped_storage().data_ptr() for name in names}

    with ExitStack() as stack:
        fuse_modules(model_of("qwen2"), stack)
        assert len(owners()) == 1
    assert len(owners()) == 3


def test_a_projection_of_another_input_is_computed_for_itself(model_of):
    model = model_of("llama")
    attention = model.model.layers[0].self_attn
    one, other = torch.randn(2, 1, 3, 32, device=DEVICE)
    expected = [attention.q_proj(one), attention.k_proj(other), attention.v_proj(one)]
    with ExitStack() as stack:
        fuse_modules(model, stack)
        found = [attention.q_proj(one), attention.k_proj(other), attention.v_proj(one)]
        again = attention.v_proj(one)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(again, expected[2])


def test_fused_projections_hold_no_activations_between_passes(model_of):
    model = model_of("deepseek_v3")
    attention = model.model.layers[0].self_attn
    with ExitStack() as stack:
        fuse_modules(model, stack)
        x = torch.randn(1, 3, 32, device=DEVICE)
        alive = weakref.ref(x)
        attention.q_a_proj(x)
        attention.kv_a_proj_with_mqa(x)
        del x
        assert alive() is None


class PlainRMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2.0, dim, device=DEVICE))
        self.eps = eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class SumRMSNorm(PlainRMSNorm):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + self.eps))


class UntoldEpsilonRMSNorm(PlainRMSNorm):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class GatedRMSNorm(PlainRMSNorm):
    def forward(self, x, gate):
        return super().forward(x) * gate


class PlainMLP(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 24), nn.Linear(8, 24)
        self.down_proj = nn.Linear(24, 8)
        self.act_fn = act or nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LimitedMLP(PlainMLP):
    def forward(self, x):
        up = self.up_proj(x).clamp(-1, 1)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)


@pytest.mark.parametrize(
    ("make", "fused"),
    [
        (lambda: PlainRMSNorm(16), Fused(1, 0, 0)),
        (lambda: SumRMSNorm(16), Fused(0, 0, 0)),
        (lambda: UntoldEpsilonRMSNorm(16), Fused(0, 0, 0)),
        (lambda: GatedRMSNorm(16), Fused(0, 0, 0)),
        (lambda: PlainMLP(), Fused(0, 0, 1)),
        (lambda: PlainMLP(nn.GELU()), Fused(0, 0, 0)),
        (lambda: LimitedMLP(), Fused(0, 0, 0)),
    ],
)
def test_only_what_computes_the_same_is_fused(make, fused):
    module = make().to(DEVICE)
    with ExitStack() as stack:
        assert fuse_modules(nn.ModuleList([module]), stack) == fused
        if not any(fused):
            assert not any("forward" in vars(part) for part in module.modules())


class PlainAttention(nn.Module):
    def __init__(self, *, widths=(8, 8), bias=True):
        super().__init__()
        self.q_proj = nn.Linear(8, 16)
        self.k_proj, self.v_proj = (nn.Linear(width, 4) for width in widths)
        if not bias:
            self.v_proj.bias = None


def test_a_projection_with_a_forward_of_its_own_is_left_alone():
    module = PlainAttention().to(DEVICE)
    own = module.k_proj.forward
    module.k_proj.forward = own
    with ExitStack() as stack:
        assert fuse_modules(module, stack) == Fused(0, 0, 0)
        assert module.k_proj.forward is own
        del module.k_proj.forward
        assert fuse_modules(module, stack) == Fused(0, 1, 0)


@pytest.mark.parametrize("options", [{"widths": (8, 6)}, {"bias": False}])
def test_projections_that_make_no_single_product_are_left_alone(options):
    with ExitStack() as stack:
        assert fuse_modules(PlainAttention(**options).to(DEVICE), stack) == Fused(0, 0, 0)


def test_a_norm_of_another_dtype_or_of_strided_rows_is_computed_as_ever():
    norm = PlainRMSNorm(16)
    norm.to(DEVICE)
    x = torch.randn(1, 16, 5, device=DEVICE).transpose(1, 2)
    wide = x.double().contiguous()
    expected = norm(x), norm(wide)
    with ExitStack() as stack:
        fuse_modules(nn.ModuleList([norm]), stack)
        found = norm(x), norm(wide)
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "deepseek_v3"])
def test_in_bfloat16_results_differ_by_rounding(tiny_checkpoint, model_type):
    checkpoint = open_checkpoint(tiny_checkpoint(model_type))
    model = load_model(checkpoint, dtype=torch.bfloat16, device="cuda")
    exact = logits(load_model(checkpoint, dtype=torch.float32, device="cuda"))
    unfused = (logits(model).float() - exact).norm()
    with ExitStack() as stack:
        assert fuse_modules(model, stack) == FUSED[model_type]
        fused = (logits(model).float() - exact).norm()
    assert fused < 1.5 * unfused
