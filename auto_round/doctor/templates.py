"""The texts of scaffolded files: each valid Python with the facts of one model filled in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 120


def literal(value: Any, indent: int = 0, used: int = 0) -> str:
    """A value as Python source, laid out as formatters do. used: characters that stand before it on its line."""
    if isinstance(value, (Mapping, list, tuple)):
        return _container(value, indent, used)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


def _container(value: Any, indent: int, used: int) -> str:
    opening, closing = (
        ("{", "}") if isinstance(value, Mapping) else ("[", "]") if isinstance(value, list) else ("(", ")")
    )
    if isinstance(value, Mapping):
        items = [(f"{literal(key)}: ", item) for key, item in value.items()]
    else:
        items = [("", item) for item in value]
    line = ", ".join(key + literal(item, 0, -(10**9)) for key, item in items)
    line += "," if isinstance(value, tuple) and len(items) == 1 else ""
    if indent + used + len(line) + 2 <= WIDTH:
        return f"{opening}{line}{closing}"
    pad = " " * (indent + 4)
    rows = "".join(f"{pad}{key}{literal(item, indent + 4, len(key) + 1)},\n" for key, item in items)
    return f"{opening}\n{rows}{' ' * indent}{closing}"


# ---- the paired test ----------------------------------------------------------------------------------------------


def test_file(
    title: str, name: str, imports: Mapping[str, set[str]], setup: str, model: str, arguments: Sequence[str]
) -> str:
    """`test/models/test_<model_type>.py`: the tiny random model through the contract. imports: module → names."""
    given = ["model", "tmp_path", "device", *arguments]
    line = f"    check_model({', '.join(given)})"
    if len(line) > WIDTH:
        line = "    check_model(\n" + "".join(f"        {part},\n" for part in given) + "    )"
    lines = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())]
    ours = [text for text in lines if text.startswith("from auto_round")]
    head = "\n".join(text for text in lines if text not in ours) + ("\n\n" + "\n".join(ours) if ours else "")
    setup = f"{setup}\n\n" if setup else ""
    body = f"def test_{name}(tmp_path, device):\n    model = {model}\n{line}\n"
    return f'"""{title}"""\n\n{head}\n\n{setup}\n{body}'


# ---- handlers -----------------------------------------------------------------------------------------------------


def header(model_type: str, what: str) -> str:
    return (
        f'"""Scaffold for {model_type}: {what}.\n\n'
        "Importing this file before quantizing applies it. Once it works, move the entry into auto_round and delete\n"
        'the file.\n"""\n\n'
    )


def block_handler(model_type: str, stacks: Sequence[Sequence[str]]) -> str:
    """An entry of SPECIAL_MULTIMODAL_BLOCK."""
    listing = literal([list(stack) for stack in stacks], used=9) if stacks else '[["model.layers.0", "model.layers.1"]]'
    todo = "" if stacks else "    # Replace these names by those of the model's blocks (see its module tree).\n"
    return (
        "from torch import nn\n\n"
        "from auto_round.special_model_handler import SPECIAL_MULTIMODAL_BLOCK\n\n"
        f"STACKS = {listing}\n\n\n"
        "def blocks(model: nn.Module, quant_vision: bool = False) -> list[list[str]]:\n"
        '    """The blocks in the order in which they run, stack by stack; `quant_vision` asks for towers, too."""\n'
        f"{todo}"
        "    # The names above are those of a tiny clone: the real model has more blocks of the same kind.\n"
        "    present = {name for name, _ in model.named_modules()}\n"
        "    return [[name for name in stack if name in present] for stack in STACKS]\n\n\n"
        f"SPECIAL_MULTIMODAL_BLOCK[{literal(model_type)}] = blocks\n"
    )


def layer_types(classes: Sequence[Sequence[str]]) -> str:
    """Class names added to INNER_SUPPORTED_LAYER_TYPES."""
    names = literal(tuple(name for _, name in classes) or ("TheLayerClass",))
    origins = "".join(f"# {name} is defined in {module}\n" for module, name in classes)
    return (
        "from auto_round.utils import common\n\n"
        f"{origins}"
        "# A layer of such a type has `weight` [out, in], perhaps `bias` [out], and computes x @ weight.T + bias.\n"
        f"NAMES = {names}\n\n"
        "common.INNER_SUPPORTED_LAYER_TYPES = (*common.INNER_SUPPORTED_LAYER_TYPES, *NAMES)\n"
    )


def forward_handler(model_type: str, parameters: Sequence[str], state: Mapping[str, Sequence[str]]) -> str:
    """An entry of FORWARDS with the signature of the model's forward. state: class → attributes that calls change."""
    own = [name for name in parameters if name != "self"]
    signature = "".join(f"    {name}: Any = None,\n" for name in own)
    given = "".join(f'        "{name}": {name},\n' for name in own)
    return (
        "from collections.abc import Callable\nfrom typing import Any\n\nfrom torch import nn\n\n"
        "from auto_round.special_model_handler import FORWARDS\n\n"
        f"{_forgetting(state) if state else ''}"
        f"\ndef forward(\n    model: nn.Module,\n{signature}    original: Callable[..., Any] | None = None,\n"
        "    **kwargs: Any,\n) -> Any:\n"
        '    """Stands in for the model\'s forward while it is calibrated: give `original` what it needs."""\n'
        f"{'    forget_before_calls(model)' + chr(10) if state else ''}"
        f"    given = {{\n{given}    }}\n"
        "    given = {name: value for name, value in given.items() if value is not None}\n"
        "    return original(**given, **kwargs)\n\n\n"
        f"FORWARDS[{literal(model_type)}] = forward\n"
    )


def _forgetting(state: Mapping[str, Sequence[str]]) -> str:
    names = {name: tuple(attributes) for name, attributes in state.items()}
    return (
        "# Class of a module -> attributes that its calls change: what one call leaves, the next must not see.\n"
        f"STATE = {literal(names, used=8)}\n\n\n"
        "def forget_before_calls(model: nn.Module) -> None:\n"
        '    """Let every such module start each call afresh; None stands for what an attribute holds at first."""\n'
        "    for module in model.modules():\n"
        '        if type(module).__name__ in STATE and not module.__dict__.get("_forgets"):\n'
        "            module.register_forward_pre_hook(_forget)\n"
        '            module.__dict__["_forgets"] = True\n\n\n'
        "def _forget(module: nn.Module, arguments: tuple) -> None:\n"
        "    for name in STATE[type(module).__name__]:\n"
        "        setattr(module, name, None)\n\n"
    )


def shared_keys(class_name: str, keys: Sequence[str]) -> str:
    """A row of SPECIAL_SHARED_CACHE_KEYS."""
    listing = literal(tuple(keys) or ("the_argument",))
    return (
        "from auto_round.special_model_handler import SPECIAL_SHARED_CACHE_KEYS\n\n"
        "# Arguments of the blocks that all samples share though they look like each sample's own: keep only those.\n"
        f"SPECIAL_SHARED_CACHE_KEYS[{literal(class_name)}] = {listing}\n"
    )


# ---- the unfuser --------------------------------------------------------------------------------------------------


def unfuser(model_type: str, modules: Sequence[Mapping[str, Any]]) -> str:
    """`auto_round/modeling/fused_moe/<model_type>.py`: each fused class as layers, its own forward kept."""
    parts = [_replacement(entry, f"replace_{number}" if number else "replace") for number, entry in enumerate(modules)]
    return (
        f'"""{model_type}: fused parameters as linear layers.\n\n'
        "Scaffolded: shapes are those of a tiny clone. The module's own forward runs on parameters put together\n"
        "from the layers, so the result is right whatever it computes. What has to be checked is the orientation, and\n"
        'which rows belong to which layer (see `Layout`).\n"""\n\n'
        "from __future__ import annotations\n\n"
        "from torch import nn\n\n"
        "from auto_round.modeling.fused_moe.experts import Layout, StackedExperts\n"
        "from auto_round.modeling.fused_moe.replace_modules import register_replacement\n" + "".join(parts)
    )


def _replacement(entry: Mapping[str, Any], function: str) -> str:
    layouts = "".join(f"        {_layout(name, guess)},\n" for name, guess in entry["parameters"].items())
    facts = "".join(f"    {name} {guess['shape']}: {_words(guess)}\n" for name, guess in entry["parameters"].items())
    return (
        f"\n\n@register_replacement({literal(entry['class'])})\n"
        f"def {function}(module: nn.Module, name: str, model: nn.Module) -> nn.Module:\n"
        f'    """{entry["class"]}.forward{entry["forward"]}, with layers in the place of these parameters:\n\n'
        f"{facts}"
        '    """\n'
        f"{_counts(entry)}"
        f"    layouts = [\n{layouts}    ]\n"
        "    return StackedExperts.from_fused(module, layouts)\n"
    )


def _layout(name: str, guess: Mapping[str, Any]) -> str:
    turned = ", transposed=True" if guess["transposed"] else ""
    rows = f", rows=module.{name}.shape[0] // experts" if guess["rows"] is not None else ""
    return f"Layout({literal(name)}, ({literal(name)},){turned}{rows})"


def _counts(entry: Mapping[str, Any]) -> str:
    """The number of experts, where parameters of two dimensions have to be divided by it."""
    flat = [guess for guess in entry["parameters"].values() if guess["rows"] is not None]
    if not flat:
        return ""
    count = flat[0]["experts"] or 1
    return f"    experts = {count}  # of the tiny clone: read the number from `module` or `model.config`\n"


def _words(guess: Mapping[str, Any]) -> str:
    order = "[in, out]" if guess["transposed"] else "[out, in]"
    if guess["rows"] is not None and guess["experts"]:
        return f"{guess['experts']} experts of {guess['rows']} rows each, {order} by its shape"
    return f"{guess['experts']} matrices, {order} by their shape" if guess["experts"] else f"one matrix, {order}"
