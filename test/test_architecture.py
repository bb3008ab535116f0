"""The shape of the house, read from the source: imports run one way, tables resolve, importing changes nothing."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "auto_round"
RUN = ("run", "compressor")  # what a compressor is called, also as an attribute


def modules() -> dict[str, ast.Module]:
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = ("auto_round", *file.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def top_level_imports(tree: ast.Module) -> set[str]:
    """Modules of the package that are imported when this one is (not those inside functions or for type checking)."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("auto_round"):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("auto_round")}
    return names


def test_no_import_cycles():
    trees = modules()
    edges = {name: top_level_imports(tree) & trees.keys() - {name} for name, tree in trees.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in edges[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_no_star_imports_and_no_exit_in_the_library():
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert all(alias.name != "*" for alias in node.names), name
            if isinstance(node, ast.Attribute) and node.attr == "exit" and not name.startswith("auto_round.cli"):
                assert name == "auto_round.__main__" or getattr(node.value, "id", "") != "sys", name


def test_only_two_places_compare_model_types():
    """Quirks of a model live in special_model_handler.py and modeling/, nowhere else."""
    allowed = ("auto_round.special_model_handler", "auto_round.modeling")
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare) and not name.startswith(allowed):
                assert "model_type ==" not in ast.unparse(node), f"{name}: {ast.unparse(node)}"


def test_nobody_reaches_into_a_run():
    """What a compressor keeps to itself may change; other modules are given what they need, or ask for it."""
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", getattr(node.value, "attr", "")) in RUN:
                assert not node.attr.startswith("_"), f"{name}: {ast.unparse(node)}"


def test_tables_resolve():
    from auto_round.algorithms import ALGORITHMS
    from auto_round.data_type import DATA_TYPES
    from auto_round.formats import FORMATS

    for target in (*ALGORITHMS.values(), *DATA_TYPES.values()):
        importlib.import_module(target)
    for target in FORMATS.values():
        module, attribute = target.split(":")
        assert hasattr(importlib.import_module(module), attribute)


def test_importing_loads_and_changes_nothing():
    code = "import sys, auto_round; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_outsiders_import():
    import auto_round.utils as utils
    from auto_round.inference.convert_model import convert_hf_model, infer_target_device, post_init
    from auto_round.modeling.fused_moe.replace_modules import BUILTIN_MODULES, register_replacement
    from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme
    from auto_round.special_model_handler import (
        SPECIAL_MULTIMODAL_BLOCK,
        SPECIAL_SHARED_CACHE_KEYS,
        SUPPORT_ONLY_TEXT_MODELS,
        _handle_special_model,
        mllms_with_limited_bs,
    )

    assert callable(convert_hf_model) and callable(infer_target_device) and callable(post_init)
    assert callable(register_replacement) and callable(_handle_special_model)
    assert isinstance(BUILTIN_MODULES, dict) and isinstance(SPECIAL_MULTIMODAL_BLOCK, dict)
    assert isinstance(SPECIAL_SHARED_CACHE_KEYS, dict) and isinstance(SUPPORT_ONLY_TEXT_MODELS, list)
    assert isinstance(mllms_with_limited_bs, tuple) and isinstance(PRESET_SCHEMES["W4A16"], QuantizationScheme)
    for name in utils.__all__:
        assert getattr(utils, name) is not None
