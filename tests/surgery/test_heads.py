"""Attention of another number of heads."""

import ast
import copy
import pickle
from types import CodeType

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from netfission.surgery import heads as code_of_heads
from netfission.surgery.coupling import find_coupling, kept_indices
from netfission.surgery.heads import FewerHeads, heads_of, runs_directly, set_heads
from netfission.surgery.narrowing import fit, narrowed

WIDTH, HEADS, BATCH, TOKENS = 12, 3, 2, 5
LEFT = torch.tensor([True, False, True])  # the heads that stay


def without_head(attention: nn.Module, features: Tensor) -> nn.Module:
    """Return an attention without its second head; the given one ignores that head from now on."""
    (group,) = (group for group in find_coupling(attention, features).groups if group.units == HEADS)
    narrow = narrowed(attention, kept_indices([group], [LEFT]))
    (projection,) = (part for part in group.slices if part.dim == 1 and "proj" in part.tensor)
    with torch.no_grad():
        attention.get_parameter(projection.tensor)[:, ~projection.keep(LEFT)] = 0
    return narrow


class SelfAttention(nn.Module):
    """An `nn.MultiheadAttention` with masks, as a stage."""

    def __init__(self, *, bias: bool = True, batch_first: bool = True) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=batch_first)
        self.masks: dict[str, Tensor | bool] = {}

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the output of the attention."""
        output: Tensor = self.inner(tokens, tokens, tokens, **self.masks)[0]
        return output


BOOLEAN = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
MASKS: dict[str, dict[str, Tensor | bool]] = {
    "none": {},
    "no weights": {"need_weights": False},
    "boolean": {"attn_mask": BOOLEAN},
    "boolean and causal": {"attn_mask": BOOLEAN, "is_causal": True, "need_weights": False},
    "float": {"attn_mask": torch.arange(25.0).view(5, 5), "need_weights": False},
    "of each image": {"attn_mask": torch.arange(50.0).view(2, 1, 5, 5)},
    "keys": {"key_padding_mask": PADDING},
    "both": {"key_padding_mask": PADDING, "attn_mask": BOOLEAN, "need_weights": False},
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_torch_attention_with_fewer_heads_is_the_whole_one_that_ignores_the_others(
    masks: dict[str, Tensor | bool],
) -> None:
    attention = SelfAttention().eval()
    tokens = torch.randn(BATCH, TOKENS, WIDTH)
    narrow = without_head(attention, tokens)
    assert type(narrow.inner) is FewerHeads and narrow.inner.num_heads == 2
    for module, heads in ((attention, HEADS), (narrow, 2)):
        module.masks = dict(masks)
        mask = masks.get("attn_mask")
        if isinstance(mask, Tensor) and mask.ndim == 4:  # a mask for each image and head
            module.masks["attn_mask"] = mask.expand(-1, heads, -1, -1).flatten(0, 1)
    assert torch.allclose(narrow(tokens), attention(tokens), atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_torch_attention_of_any_layout(bias: bool, batch_first: bool) -> None:
    attention = SelfAttention(bias=bias, batch_first=batch_first).eval()
    tokens = torch.randn(BATCH, TOKENS, WIDTH)
    narrow = without_head(attention, tokens)
    assert torch.allclose(narrow(tokens), attention(tokens), atol=1e-6)
    assert torch.allclose(narrow(tokens[0]), attention(tokens[0]), atol=1e-6)  # without a batch
    for average in (False, True):
        heads, all_heads = (
            module.inner(tokens, tokens, tokens, average_attn_weights=average)[1]
            for module in (narrow, attention)
        )
        if average:
            assert heads.shape == all_heads.shape
        else:
            assert torch.allclose(heads, all_heads[:, LEFT], atol=1e-6)


def test_torch_attention_with_dropout_is_random_in_train_mode_only() -> None:
    attention = SelfAttention()
    narrow = without_head(attention.eval(), torch.randn(BATCH, TOKENS, WIDTH))
    narrow.inner.dropout = 0.5
    tokens = torch.randn(BATCH, TOKENS, WIDTH)
    for need_weights in (False, True):
        narrow.masks = {"need_weights": need_weights}
        assert torch.equal(narrow.eval()(tokens), narrow(tokens))
        assert not torch.equal(narrow.train()(tokens), narrow(tokens))


def test_torch_attention_with_fewer_heads_is_copied_pickled_and_loaded() -> None:
    attention = SelfAttention().eval()
    tokens = torch.randn(BATCH, TOKENS, WIDTH)
    narrow = without_head(attention, tokens)
    loaded = SelfAttention().eval()
    fit(loaded, {name: tensor.shape for name, tensor in narrow.state_dict().items()})
    loaded.load_state_dict(narrow.state_dict())
    for module in (copy.deepcopy(narrow), pickle.loads(pickle.dumps(narrow)), loaded):
        assert torch.equal(module(tokens), narrow(tokens))


def test_an_encoder_layer_with_fewer_heads_runs_without_its_fused_operation() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True).eval()
    tokens = torch.randn(BATCH, TOKENS, WIDTH)
    narrow = without_head(layer, tokens)
    with torch.no_grad():  # the fused operation runs without gradients only
        assert torch.allclose(narrow(tokens), layer(tokens), atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{"kdim": 4, "vdim": 4}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str
)
def test_torch_attention_of_another_structure_stays_whole(settings: dict[str, int | bool]) -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **settings)  # type: ignore[arg-type]

        def forward(self, tokens: Tensor) -> Tensor:
            keys = tokens[..., : self.inner.kdim]
            output: Tensor = self.inner(tokens, keys, keys)[0]
            return output

    coupling = find_coupling(Stage().eval(), torch.randn(BATCH, TOKENS, WIDTH))
    assert not coupling.groups
    assert "several input projections" in coupling.undivided["inner.out_proj.weight"]


@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
@pytest.mark.parametrize("shift", [0, 1])
def test_a_function_that_takes_the_width_of_a_head_from_its_input_is_changed(
    kind: type[nn.Module], shift: int
) -> None:
    attention = kind(WIDTH, [2, 2], [shift, shift], HEADS).eval()
    features = torch.randn(BATCH, 4, 4, WIDTH)
    narrow = without_head(attention, features)
    assert heads_of(narrow) == 2
    assert torch.allclose(narrow(features), attention(features), atol=1e-6)
    again = pickle.loads(pickle.dumps(copy.deepcopy(narrow)))
    assert torch.equal(again(features), narrow(features))
    assert type(attention) is kind  # the class itself is as before


def test_code_that_reads_no_width_keeps_its_class() -> None:
    class Plain(nn.Module):
        num_heads = 2

        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 2

        def forward(self, tokens: Tensor) -> Tensor:
            return tokens.unflatten(-1, (self.num_heads, -1)).flatten(-2)

    module = Plain()
    set_heads(module, 1)
    assert type(module) is Plain and module.num_heads == 1


def test_a_layer_of_an_attention_is_told_from_an_mlp_beside_it() -> None:
    attention = nn.ModuleDict(
        {"qkv": nn.Linear(2, 6), "bias": nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))}
    )
    assert runs_directly(attention, "qkv") and not runs_directly(attention, "bias")


class Annotated(nn.Module):
    """An attention whose signature is code besides: from Python 3.14 annotations are, too."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, scale=lambda width: width**-0.5, *, drop=lambda weights: weights) -> Tensor:
        """Attend."""
        b, n, c = x.shape
        queries, keys, values = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = drop((queries @ keys.mT * scale(c // self.num_heads)).softmax(-1))
        return self.proj((weights @ values).transpose(1, 2).reshape(b, n, c))


def test_attention_whose_signature_is_code_is_changed() -> None:
    attention, tokens = Annotated().eval(), torch.randn(BATCH, TOKENS, WIDTH)
    narrow = without_head(attention, tokens)
    assert narrow.num_heads == 2
    assert torch.allclose(narrow(tokens), attention(tokens), atol=1e-6)
    (code,) = _code_of_signature("def f(x: int = (lambda: 1)(), *, y=lambda: 2) -> int:\n    return x")
    assert code.co_name == "f"


def _code_of_signature(source: str) -> list[CodeType]:
    tree = ast.parse(source)
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    code_of_heads._leave_out_signature(definition)
    constants = compile(tree, "<test>", "exec").co_consts
    return [constant for constant in constants if isinstance(constant, CodeType)]
