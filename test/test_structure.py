"""Structure, not names: a model whose modules, classes and type are renamed at random is understood the same way."""

from __future__ import annotations

import copy
import hashlib
import random
import string
from typing import Any

import pytest
import torch
import transformers
from tiny import tiny, token_ids
from torch import nn

from auto_round import AutoRound
from auto_round.doctor.tiny import build, levels, text_batch, tiny_config

DENSE = ["llama", "gpt2", "falcon", "gptj", "phi3", "gemma3n_text"]
EXPERTS = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text", "jetmoe", "dbrx", "afmoe"]
HYBRIDS = ["falcon_h1", "qwen3_next", "jamba", "nemotron_h", "kimi_linear", "rwkv"]
OTHERS = ["t5:Seq2SeqLM", "bart:Seq2SeqLM", "llava:ImageTextToText", "gemma3:ImageTextToText"]
OTHERS += ["qwen3_vl_moe:ImageTextToText", "switch_transformers:Seq2SeqLM"]


class Renamer:
    """Gives the modules of a model random names, in place; its code goes on to find them under the old ones."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        self._classes: dict[type, type] = {}
        self._used: set[str] = set()

    def word(self) -> str:
        while (word := "".join(self._random.choices(string.ascii_lowercase, k=7))) in self._used:
            pass
        self._used.add(word)
        return word

    def rename(self, model: nn.Module) -> None:
        before = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        for module in list(model.modules()):
            self._rename_children(module)
        after = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        new = dict(zip(before, after, strict=True))
        tied = model.all_tied_weights_keys
        model.all_tied_weights_keys = {new[one]: new[other] for one, other in tied.items()}
        for level in levels(model.config):
            model_type = self.word()
            level.__class__ = type(self.word(), (type(level),), {"model_type": model_type})
            level.model_type = model_type

    def _rename_children(self, module: nn.Module) -> None:
        module.__class__ = self._class_for(type(module))
        # Keys of a container are places; and what Transformers' experts interface calls its activation is no choice.
        if isinstance(module, nn.ModuleDict) or hasattr(module, "is_transposed"):
            return
        aliases = type(module).aliases
        for name in [name for name in module._modules if not name.isdigit()]:
            aliases.setdefault(name, self.word())
        module._modules = {aliases.get(name, name): child for name, child in module._modules.items()}

    def _class_for(self, old: type) -> type:
        """A subclass with a name of its own, the same for all modules of a class."""
        if old not in self._classes:
            self._classes[old] = type(self.word(), (old,), {"__getattr__": find, "aliases": {}})
        return self._classes[old]


def find(module: nn.Module, name: str) -> Any:
    """What `module.old_name` gives."""
    cls = next(cls for cls in type(module).__mro__ if "aliases" in vars(cls))
    return super(cls, module).__getattr__(cls.aliases.get(name, name))


def understood(model: nn.Module) -> tuple[list[Any], Any]:
    """(for each stack and block its layers as (digest of the weight, decision, reason), the run)."""
    run = AutoRound(model, None, scheme="W4A16", group_size=32, iters=0, disable_opt_rtn=True, show_progress=False)
    digests = {name: digest(run.model.get_submodule(name).weight) for name in run.plan.layers}
    layers = [
        [
            [(digests[n], p.is_quantized, p.reason) for n, p in run.plan.layers.items() if p.info.block == b]
            for b in stack
        ]
        for stack in run.plan.blocks
    ]
    return layers, run


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("spec", [*DENSE, *EXPERTS, *HYBRIDS, *OTHERS])
def test_the_same_weights_under_random_names(spec):
    model_type, _, task = spec.partition(":")
    original = tiny(model_type, task or "CausalLM")
    renamed = copy.deepcopy(original)
    Renamer(seed=1).rename(renamed)
    check_renamed(original, renamed)

    expected, run = understood(original)
    found, other = understood(renamed)
    assert found == expected
    assert sum(map(len, expected)) >= 2 and sum(decision for s in expected for b in s for _, decision, _ in b) >= 4
    assert len(other.streamed.replaced) == len(run.streamed.replaced)
    mine, theirs = run.observe_original(), other.observe_original()
    assert torch.equal(mine.logits, theirs.logits) and theirs.replacement_error < 2e-2
    assert len(mine.places) == len(theirs.places)


def check_renamed(original: nn.Module, renamed: nn.Module) -> None:
    """No name is left, and the model computes what it did."""
    words = {part for name, _ in original.named_modules() for part in name.split(".") if not part.isdigit()}
    left = words & {part for name, _ in renamed.named_modules() for part in name.split(".")}
    assert all(name == "act_fn" or name.startswith("expert_") for name in left - {""})
    assert not {type(m).__name__ for m in original.modules()} & {type(m).__name__ for m in renamed.modules()}
    assert original.config.model_type != renamed.config.model_type
    batch = text_batch(original)
    with torch.no_grad():
        assert torch.equal(original(**batch).logits, renamed(**batch).logits)


MANY = 32  # experts: as many as rows that a kernel reads, so that a router's shape says nothing


@pytest.mark.parametrize(
    ("spec", "router"),
    [
        ("phimoe", "mlp.router"),
        ("afmoe", "mlp.router.gate"),
        ("llama4_text", "feed_forward.router"),
        ("jetmoe", "mlp.router.layer"),
        ("longcat_flash", "mlp.router.classifier"),
        ("hunyuan_v1_moe", "mlp.gate.wg"),
        ("dbrx", "ffn.router.layer"),
        ("switch_transformers:Seq2SeqLM", "layer.1.mlp.router.classifier"),
        ("nllb-moe:Seq2SeqLM", "ffn.router.classifier"),
    ],
)
def test_routers_are_kept_for_what_they_do(spec, router):
    model_type, _, task = spec.partition(":")
    config = tiny_config(transformers.CONFIG_MAPPING[model_type]())
    for level in levels(config):
        for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"):
            if getattr(level, key, None):
                setattr(level, key, MANY)
    model = build(config, getattr(transformers, f"AutoModelFor{task or 'CausalLM'}"))
    _, run = understood(model)
    routers = [plan for name, plan in run.plan.layers.items() if name.endswith(router)]
    assert routers and all(plan.info.out_features % MANY == 0 for plan in routers)
    assert not any(plan.is_quantized for plan in routers)
    assert all("router" in plan.reason for plan in routers)


def test_blocks_outside_any_list_can_be_named(tmp_path):
    from broken_models import CONFIGS

    from auto_round.doctor.tiny import tiny_model

    tiny_model(CONFIGS["HiddenBlocks"]()).save_pretrained(tmp_path / "m")
    run = AutoRound(
        str(tmp_path / "m"),
        scheme="W4A16G32",
        to_quant_block_names=[["block_a", "block_b"]],
        dataset=token_ids(),
        nsamples=8,
        seqlen=32,
        iters=2,
        device_map="cpu",
        show_progress=False,
    )
    run.calib()
    run._quantize_blocks()
    assert run.native.blocks == ("block_a", "block_b")
    assert [block["name"] for block in run.block_log] == ["block_a", "block_b"]
