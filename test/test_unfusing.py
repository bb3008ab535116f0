"""Fused experts become linear layers: same outputs, complete slices, names as in the checkpoint."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import WeightRenaming, rename_source_key

from auto_round.modeling.fused_moe.experts import Slice, StackedExperts, UnfusedExperts
from auto_round.modeling.fused_moe.names import expert_names
from auto_round.modeling.fused_moe.replace_modules import (
    BUILTIN_MODULES,
    apply_replacements,
    gather,
    register_replacement,
    release,
    scatter,
)
from auto_round.modeling.fused_moe.structure import expert_counts, unfuse

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LOCAL = {"num_local_experts": 4}
TYPES = {
    "mixtral": LOCAL,
    "phimoe": LOCAL,
    "granitemoe": LOCAL,
    "gpt_oss": {**LOCAL, "layer_types": ["full_attention"] * 2},
    "qwen3_moe": {"num_experts": 4},
    "qwen3_5_moe_text": {
        "num_experts": 4,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["full_attention"] * 2,
    },
    "deepseek_v2": {**LATENT, **ROUTED, "first_k_dense_replace": 1},
    "deepseek_v3": {**LATENT, **ROUTED, "first_k_dense_replace": 1},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2},
    "nemotron_h": {"layers_block_type": ["moe", "attention"], "moe_shared_expert_intermediate_size": 24, **ROUTED},
    "llama4_text": {**LOCAL, "intermediate_size_mlp": 48, "no_rope_layers": [1, 1]},
    "jetmoe": {**LOCAL, "kv_channels": 16},
    "longcat_flash": {**LATENT, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "num_layers": 2,
                      "expert_ffn_hidden_size": 24, "ffn_hidden_size": 48},
    "lfm2_moe": {"num_experts": 4, "num_dense_layers": 1, "layer_types": ["full_attention", "conv"]},
    "dbrx": {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64,
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
             "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}},
}  # fmt: skip


def tiny_config(model_type):
    sizes = {} if model_type == "dbrx" else SIZES
    config = AutoConfig.for_model(model_type, **{**sizes, "vocab_size": 96, **TYPES[model_type]})
    config._experts_implementation = "eager"
    return config


def tiny_model(model_type):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
    fill(model)
    return model


def fill(module):
    """Transformers leaves some fused parameters as memory held them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logits(model):
    ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        return model(input_ids=ids).logits


def assert_close(after, before):
    assert (after - before).norm() <= 1e-5 * before.norm()


def assert_covered_once(replaced):
    """The slices put together are the fused parameters, and no two of them overlap."""
    fused = {}
    for name, part in replaced.origin.items():
        source = replaced.original.get_parameter(part.parameter)
        target = fused.setdefault(part.parameter, torch.full_like(source, float("nan")))
        assert part.view(target).isnan().all(), f"{name} overlaps another slice"
        part.put(target, replaced.new.get_parameter(name))
        assert torch.equal(part.take(source), replaced.new.get_parameter(name))
    for name, tensor in fused.items():
        assert torch.equal(tensor, replaced.original.get_parameter(name))


@pytest.mark.parametrize("model_type", TYPES)
def test_same_logits_and_complete_slices(model_type):
    model = tiny_model(model_type)
    before = logits(model)
    done = apply_replacements(model)
    assert done and apply_replacements(model) == {}
    for name, replaced in done.items():
        assert model.get_submodule(name) is replaced.new
        assert_covered_once(replaced)
    stacks = [n for n, p in model.named_parameters() if p.dim() == 3 and "conv" not in n]
    assert not stacks and torch.isfinite(before).all()
    assert_close(logits(model), before)


@pytest.mark.parametrize("model_type", ["mixtral", "phimoe", "qwen3_moe", "deepseek_v3", "longcat_flash", "nemotron_h"])
def test_names_and_weights_are_the_checkpoints(model_type, tmp_path):
    from transformers.conversion_mapping import get_model_conversion_mapping

    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    layers = {f"{path}.{key}" for path, r in apply_replacements(model).items() for key in r.origin}
    state = model.state_dict()
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    found = set()
    for key, tensor in saved.items():
        name, _ = rename_source_key(key, renamings, [], model.base_model_prefix, state)
        assert torch.equal(state[name], tensor)
        found.add(name)
    assert layers <= found


def test_names_of_fused_and_per_expert_checkpoints():
    mixtral, gpt_oss = tiny_model("mixtral"), tiny_model("gpt_oss")
    path = "model.layers.0.mlp.experts"
    assert expert_names(mixtral, path) == {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
    assert expert_names(gpt_oss, path) == {}
    apply_replacements(gpt_oss)
    assert [name for name, _ in gpt_oss.get_submodule(f"{path}.3").named_children()] == [
        "gate_proj", "up_proj", "down_proj"
    ]  # fmt: skip


class Interface(nn.Module):
    """An experts module of Transformers' interface, in any of its layouts."""

    def __init__(self, transposed, interleaved, bias, gate, norm, experts=3, hidden=16, inner=8):
        super().__init__()
        self.is_transposed, self.is_concatenated = transposed, not interleaved
        self.has_bias, self.has_gate, self.has_post_expert_norm = bias, gate, norm
        self.num_experts, self.act_fn, self.limit = experts, nn.SiLU(), 0.5
        self.up = "gate_up_proj" if gate else "up_proj"
        for name, rows, columns in ((self.up, inner * (1 + gate), hidden), ("down_proj", hidden, inner)):
            shape = (experts, columns, rows) if transposed else (experts, rows, columns)
            setattr(self, name, nn.Parameter(torch.randn(shape)))
            if bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(experts, rows)))
        if norm:
            self.post_expert_norm = nn.LayerNorm(hidden)

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1) if self.is_concatenated else (gate_up[..., ::2], gate_up[..., 1::2])
        return self._clamped(gate) * (up + 1)

    def _clamped(self, gate):
        return self.act_fn(gate).clamp(max=self.limit)

    def _project(self, name, expert, state):
        weight = getattr(self, name)[expert]
        state = state @ (weight if self.is_transposed else weight.T)
        return state + getattr(self, f"{name}_bias")[expert] if self.has_bias else state

    def forward(self, hidden_states, router_indices, routing_weights):
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = (router_indices == expert).nonzero(as_tuple=True)
            state = self._project(self.up, expert, hidden_states[token])
            state = self._apply_gate(state) if self.has_gate else self.act_fn(state)
            state = self._project("down_proj", expert, state)
            state = self.post_expert_norm(state) if self.has_post_expert_norm else state
            output.index_add_(0, token, state * routing_weights[token, slot, None])
        return output


class Holder(nn.Module):
    def __init__(self, *children, config=None):
        super().__init__()
        self.blocks = nn.ModuleList(children)
        self.config = config


class Config:
    def __init__(self, **values):
        self.__dict__.update(values)


def routing(tokens=7, slots=2, experts=3, hidden=16):
    """Tokens, chosen experts (some of them the sentinel, which stands for none) and weights."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(tokens, experts + 1, generator=generator)
    weights, index = scores.topk(slots)
    return torch.randn(tokens, hidden, generator=generator), index, weights


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("gate", "norm"), [(True, False), (False, False), (True, True)])
def test_every_layout_of_the_interface(transposed, interleaved, bias, gate, norm):
    fused = Interface(transposed, interleaved, bias, gate, norm)
    holder = Holder(fused)
    inputs = routing()
    done = apply_replacements(holder)
    new = holder.blocks[0]
    assert isinstance(new, UnfusedExperts) and done["blocks.0"].original is fused
    assert_covered_once(done["blocks.0"])
    expected = fused(*inputs)
    torch.testing.assert_close(new(*inputs), expected)
    by_name = {"router_indices": inputs[1], "routing_weights": inputs[2]}
    torch.testing.assert_close(new(inputs[0], **by_name), expected)
    assert new(inputs[0].bfloat16().float(), *inputs[1:]).dtype == torch.float32
    if norm:
        assert new.post_expert_norm is fused.post_expert_norm


def test_a_single_expert_is_taken_apart_as_well():
    fused = Interface(False, False, True, True, False, experts=1)
    holder = Holder(fused)
    inputs = routing(experts=1, slots=1)
    apply_replacements(holder)
    assert list(dict(holder.blocks[0].named_children())) == ["act_fn", "0"]
    torch.testing.assert_close(holder.blocks[0](*inputs), fused(*inputs))


def test_layers_are_called_and_gradients_reach_each_weight():
    fused = Interface(False, False, False, True, False)
    holder = Holder(fused)
    apply_replacements(holder)
    new = holder.blocks[0]
    called = []
    for expert in range(3):
        layer = new.get_submodule(f"{expert}.down_proj")
        layer.register_forward_hook(lambda module, args, output, expert=expert: called.append(expert))
    new(*routing()).square().sum().backward()
    assert called == [0, 1, 2]
    assert all(parameter.grad.abs().sum() > 0 for parameter in new.parameters())
    apart = copy.deepcopy(new)
    torch.testing.assert_close(apart(*routing()), new(*routing()))


class Opaque(nn.Module):
    """Experts of a kind nobody has seen: their forward does as it likes."""

    def __init__(self, experts=3, hidden=16, inner=8):
        super().__init__()
        self.first = nn.Parameter(torch.randn(experts, hidden, inner))
        self.second = nn.Parameter(torch.randn(experts, inner, hidden))
        self.scale = nn.Parameter(torch.rand(experts))
        self.router = nn.Linear(hidden, experts)

    def forward(self, x):
        every = torch.einsum("th,ehi->tei", x, self.first).tanh()
        mixed = torch.einsum("tei,eih->teh", every, self.second) * self.scale[:, None]
        one = x @ self.first[torch.tensor(1)] @ self.second[1]
        again = torch.bmm(x.expand(3, *x.shape), self.first).sum() * self.second.float().mean()
        last = torch.stack([x @ matrix for matrix in self.first]).sum()
        return (mixed * self.router(x).softmax(-1)[..., None]).sum(1) + one + again + last + self.first.shape[0]


def test_unknown_forward_runs_on_stacked_layers():
    fused = Opaque()
    holder = Holder(fused, config=Config(n_experts=3, hidden_size=16))
    done = apply_replacements(holder)
    new = holder.blocks[0]
    assert isinstance(new, StackedExperts) and isinstance(new, Opaque)
    assert {part.transposed for part in new.origin.values()} == {True}
    assert new.get_submodule("2.first").weight.shape == (8, 16) and new.scale is fused.scale
    assert_covered_once(done["blocks.0"])
    x = torch.randn(5, 16)
    torch.testing.assert_close(new(x), fused(x))
    new(x).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in new.parameters())
    with torch.no_grad():
        new.get_submodule("1.first").weight.zero_()
    assert not torch.allclose(new(x), fused(x))
    torch.testing.assert_close(copy.deepcopy(new)(x), new(x))


def test_no_experts_no_change():
    class Gates(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 16, 16))  # per head: as many as nothing in the configuration

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 16, 16))

    model = Holder(Gates(), nn.Conv1d(16, 16, 16), config=Config(n_experts=3, num_experts_per_tok=4))
    model.positions = Table()  # as many as there are experts, but in no block
    assert apply_replacements(model) == {}
    assert expert_counts({"moe": {"num_experts": [4, 8], "top_k_experts": 2}, 3: "x", "expert_size": 7}) == {4, 8}


@pytest.mark.parametrize("model_type", ["mixtral", "llama4_text", "longcat_flash", "jetmoe", "dbrx"])
def test_renamed_classes_give_the_same_layers(model_type):
    expected = tiny_model(model_type)
    model = copy.deepcopy(expected)
    before = logits(model)
    for index, module in enumerate(model.modules()):
        if type(module).__module__.startswith("transformers.models") and index:
            module.__class__ = type(f"X{index}", (type(module),), {})
    shapes = {}
    for each in (expected, model):
        done = apply_replacements(each)
        weights = ((p, k, r.new.get_parameter(k).shape) for p, r in done.items() for k in r.origin)
        shapes[each is model] = {f"{path}.{key}": shape for path, key, shape in weights}
    assert shapes[True] == shapes[False]
    assert_close(logits(model), before)


@pytest.mark.parametrize("model_type", TYPES)
def test_meta_models_take_their_weights_later(model_type):
    whole = tiny_model(model_type)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_config(model_type))
    reference, done = apply_replacements(whole), apply_replacements(empty)
    assert list(done) == list(reference)
    assert all(parameter.device.type == "meta" for parameter in empty.parameters())
    path = list(done)[-1]
    replaced, source = done[path], reference[path]
    assert replaced.origin == source.origin
    replaced.new.load_state_dict(source.new.state_dict(), assign=True)
    gather(replaced.original, replaced.new)
    for name, parameter in source.original.named_parameters():
        assert torch.equal(replaced.original.get_parameter(name), parameter)


def test_scatter_and_release():
    holder = Holder(Interface(True, True, True, True, False))
    replaced = apply_replacements(holder)["blocks.0"]
    fill(replaced.original)
    scatter(replaced.original, replaced.new)
    assert_covered_once(replaced)
    expected = replaced.original(*routing())
    release(replaced.original, replaced.new)
    assert all(parameter.device.type == "meta" for parameter in replaced.original.parameters())
    gather(replaced.original, replaced.new)
    torch.testing.assert_close(replaced.original(*routing()), expected)


def test_shared_modules_and_tied_parameters_stay_shared():
    one, two = Interface(False, False, False, True, False), Interface(False, False, False, True, False)
    two.down_proj = one.down_proj
    holder = Holder(one, one, two)
    done = apply_replacements(holder)
    assert list(done) == ["blocks.0", "blocks.1", "blocks.2"]
    assert holder.blocks[0] is holder.blocks[1]
    first, second = holder.blocks[0].get_submodule("1"), holder.blocks[2].get_submodule("1")
    assert first.down_proj.weight is second.down_proj.weight
    assert first.gate_proj.weight is not second.gate_proj.weight


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_copied_experts_share_nothing_that_changes(device):
    with torch.device(device):
        fused = Interface(False, False, True, True, False)
    new = unfuse(fused, "blocks.0", Holder(fused))
    first, second = (new.get_submodule(f"{index}.down_proj") for index in (0, 1))
    assert first.weight is not second.weight and first.weight.shape == second.weight.shape
    first.register_forward_pre_hook(lambda module, args: None)
    first.register_buffer("scale", torch.ones(1), persistent=False)
    first.weight = nn.Parameter(torch.zeros(2, 2))
    assert not second._forward_pre_hooks and not hasattr(second, "scale")
    assert not second._non_persistent_buffers_set
    assert second.weight.shape != (2, 2)


def test_slices_of_stacked_rows():
    fused = torch.arange(24.0).view(6, 4)  # three experts of two rows
    part = Slice("w", 2, rows=2, transposed=True)
    assert torch.equal(part.take(fused), fused[4:].T)
    part.put(fused, torch.zeros(4, 2))
    assert fused[4:].abs().sum() == 0 and fused[:4].min() == 0 and fused[3, 3] == 15


def test_registered_once_and_only_for_their_model_type():
    @register_replacement("NobodyNamesAClassLikeThis")
    def replace(module, name, model):
        return nn.Identity()

    with pytest.raises(ValueError, match="registered already"):
        register_replacement("NobodyNamesAClassLikeThis")(lambda module, name, model: module)
    for model_type in ("llama4", "deepseek_v2", "qwen3_5_moe", "qwen3_5_moe_text", "step3p5", "qwen3_omni_moe"):
        assert callable(BUILTIN_MODULES[model_type].replace)


def test_step3p5_linears_of_all_experts():
    class MoELinear(nn.Module):
        def __init__(self, experts, columns, rows):
            super().__init__()
            self.in_features, self.out_features = columns, rows
            self.weight = nn.Parameter(torch.randn(experts, rows, columns))

        def forward(self, x, expert):
            return nn.functional.linear(x.float(), self.weight[expert].float())

    holder = Holder(MoELinear(3, 16, 8), config=Config(model_type="step3p5", moe_num_experts=3, to_dict=dict))
    x = torch.randn(4, 16)
    expected = holder.blocks[0](x, torch.tensor(2))
    apply_replacements(holder)
    assert isinstance(holder.blocks[0].get_submodule("2"), nn.Linear)
    torch.testing.assert_close(holder.blocks[0](x, torch.tensor(2)), expected)
