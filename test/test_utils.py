"""Helpers that people import: lazy imports, layer types, model questions, replacements."""

import pytest
import torch
from tiny import save_tiny, tiny_llama, tiny_tokenizer
from torch import nn

from auto_round.modeling.fused_moe.replace_modules import apply_replacements, register_replacement
from auto_round.plan import PlanError
from auto_round.utils import LazyImport, get_block_names, is_mllm_model, model_infer
from auto_round.utils.common import all_finite, is_supported_layer, walk, walk_parameters
from auto_round.utils.model import find_layers, get_lm_head_name, select_blocks


def test_lazy_import_of_a_module_an_attribute_and_a_call():
    assert LazyImport("json").dumps([1]) == "[1]"
    assert LazyImport("json.dumps")([1]) == "[1]"
    assert LazyImport("os.path").sep
    with pytest.raises(ModuleNotFoundError):
        LazyImport("no_such_module_here").anything  # noqa: B018


def test_subclasses_of_linear_count():
    class Own(nn.Linear):
        pass

    assert is_supported_layer(Own(4, 4))
    assert not is_supported_layer(nn.LayerNorm(4))


def test_walks_see_what_pytorch_sees_in_its_order():
    model = tiny_llama()
    model.again = model.model.layers[1]  # held twice, and listed under the first name
    model.model.layers[0].nothing = None
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    model.register_module("absent", None)
    assert list(walk(model)) == list(model.named_modules())
    block = model.model.layers[0]
    assert list(walk(block, "a.b")) == list(block.named_modules(prefix="a.b"))
    pairs = zip(walk_parameters(model, "x"), model.named_parameters(prefix="x"), strict=True)
    assert all(mine[0] == theirs[0] and mine[1] is theirs[1] for mine, theirs in pairs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_one_value_that_is_not_finite_is_seen(dtype):
    assert all_finite(torch.ones(3, 1000).to(dtype)) and all_finite(torch.ones(0).to(dtype))
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 1234, 2999):
            tensor = torch.ones(3000)
            tensor[place] = value
            assert not all_finite(tensor.to(dtype)) and not all_finite(tensor.to(dtype).view(3, 1000).t())


def test_integers_are_finite():
    assert all_finite(torch.tensor([1, 2]))


def test_blocks_can_be_chosen():
    stacks = [["layers.0", "layers.1", "layers.10"]]
    assert select_blocks(stacks, "layers.1") == [["layers.1"]]
    assert select_blocks(stacks, [["layers.0"]]) == [["layers.0"]]
    assert select_blocks(stacks, ["layers.0", "layers.10"]) == [["layers.0"], ["layers.10"]]
    with pytest.raises(PlanError, match=r"layers\.7"):
        select_blocks(stacks, "layers.7")


def test_a_model_without_blocks_says_what_to_do():
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(PlanError, match=r"No quantizable layers found.*to_quant_block_names"):
        find_layers(model, get_block_names(model))


def test_uncovered_block_weights_are_an_error():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Parameter(torch.randn(256, 128))
            self.small = nn.Linear(32, 32)

        def forward(self, x):
            return self.small(x @ self.gate_up)

    model = nn.Module()
    model.layers = nn.ModuleList([Experts()])
    with pytest.raises(PlanError, match=r"layers\.0\.gate_up.*unfuser"):
        find_layers(model, get_block_names(model))


def test_asking_a_model(tmp_path):
    model = tiny_llama()
    assert get_block_names(model) == [["model.layers.0", "model.layers.1"]]
    assert get_lm_head_name(model) == "lm_head"
    assert not is_mllm_model(model)
    assert not is_mllm_model(save_tiny(model, tmp_path / "m"))
    assert isinstance(model_infer(model, tiny_tokenizer(), "the quick", max_new_tokens=3), str)


def test_replacements_are_registered_once_and_applied():
    class Fused(nn.Module):
        pass

    name = "FusedForTestOnly"
    Fused.__name__ = name

    @register_replacement(name)
    def replace(module, path, model):
        return nn.ModuleList([nn.Linear(2, 2)])

    with pytest.raises(ValueError, match="registered already"):
        register_replacement(name)(lambda module, path, model: module)
    model = nn.Module()
    model.inner = Fused()
    replaced = apply_replacements(model)
    assert list(replaced) == ["inner"]
    assert replaced["inner"].original is not model.inner is replaced["inner"].new
    assert isinstance(model.inner, nn.ModuleList)
