"""Formats (pure), and the checkpoint writer (disk)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from auto_round.data_type.base import QuantizedTensor
from auto_round.formats import FORMATS, format_name, make_format
from auto_round.formats.auto_round import block_prefixes
from auto_round.formats.base import TensorShape
from auto_round.formats.writer import INDEX, CheckpointWriter, copy_side_files, parse_size, write_config
from auto_round.plan import LayerInfo, LayerPlan, ModelPlan, PlanError, make_plan
from auto_round.schemes import QuantizationScheme, TensorSpec, parse_scheme

BLOCKS = [["model.layers.0", "model.layers.1"]]
OUT, IN = 64, 96


def layers(**changes) -> list[LayerInfo]:
    names = [(f"{block}.{part}", block) for block in BLOCKS[0] for part in ("q_proj", "down_proj")]
    return [LayerInfo(name, OUT, IN, block, **changes) for name, block in [*names, ("lm_head", None)]]


def plan_for(scheme: str | dict = "W4A16", lm_head: bool = False, config: dict | None = None, **changes) -> ModelPlan:
    parsed = parse_scheme(scheme) if isinstance(scheme, str) else parse_scheme("W4A16", **scheme)
    return make_plan(layers(**changes), BLOCKS, parsed, config, lm_head="lm_head", quant_lm_head=lm_head)


def random_tensor(layer: LayerPlan, seed: int = 0) -> QuantizedTensor:
    """Random codes, and scales and zero points from the whole range (zero points from 1 in symmetric plans)."""
    generator = torch.Generator().manual_seed(seed)
    spec: TensorSpec = layer.scheme.weight
    rows, columns = layer.info.out_features, layer.info.in_features
    groups = columns // spec.group_size if spec.group_size > 0 else 1
    shape = (1, 1) if spec.group_size == 0 else (rows, groups)
    codes = torch.randint(0, 1 << spec.bits, (rows, columns), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 1 << spec.bits, shape, dtype=torch.uint8, generator=generator)
    scale = torch.randn(shape, generator=generator).half()
    return QuantizedTensor(codes, scale if spec.sym else scale.abs(), None if spec.sym else zeros, spec)


PLANS = {
    f"w{bits}-{'sym' if sym else 'asym'}-g{group_size}": {"bits": bits, "sym": sym, "group_size": group_size}
    for bits in range(2, 9)
    for sym in (True, False)
    for group_size in (-1, 0, 32)
}


@pytest.mark.parametrize("fields", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "mlx"])  # it rounds scales: test_mlx.py
def test_pack_matches_layout_and_unpacks_to_itself(name: str, fields: dict) -> None:
    plan = plan_for(fields, lm_head=True)
    try:
        bound = make_format(name, plan)
    except PlanError:
        assert name not in ("auto_round", "fake"), "these two hold every plan"
        return
    for layer in plan.quantized().values():
        tensor = random_tensor(layer)
        packed = bound.pack(tensor, layer.info)
        layout = bound.layout(layer)
        assert {k: TensorShape(tuple(v.shape), v.dtype) for k, v in packed.items()} == layout
        assert all(v.is_contiguous() for v in packed.values())
        back = bound.unpack(packed, layer)
        if name == "fake":
            assert back is None
            continue
        rows = tensor.per_row()
        assert torch.equal(back.codes, rows.codes) and torch.equal(back.scale, rows.scale)
        assert (back.zero_point is None) == (rows.zero_point is None)
        assert back.zero_point is None or torch.equal(back.zero_point, rows.zero_point)
        assert torch.equal(back.dequantize(), tensor.dequantize())


def test_packing_follows_the_plan() -> None:
    def packing(*args, **kwargs) -> str:
        return make_format("auto_round", plan_for(*args, **kwargs)).config({})["packing_format"]

    assert packing("W3A16") == "auto_round:auto_gptq"
    assert packing({"sym": False}) == "auto_round:auto_awq"
    assert packing({"sym": False, "bits": 3}) == "auto_round"
    assert packing({"sym": False}, config={"q_proj": {"bits": 8}}) == "auto_round"
    assert packing("W4A16", config={"q_proj": {"sym": False}}) == "auto_round"
    assert packing("W4A16", config={"q_proj": {"bits": 8}}) == "auto_round:auto_gptq"


def test_refusals_name_the_reason() -> None:
    with pytest.raises(PlanError, match=r"4-bit layers only.*q_proj has 3 bits"):
        make_format("auto_round:auto_awq", plan_for("W3A16"))
    with pytest.raises(PlanError, match=r"cannot hold the zero point 0.*q_proj"):
        make_format("auto_round:auto_gptq", plan_for({"sym": False}))
    with pytest.raises(PlanError, match="quantizes no layer"):
        make_format("auto_round", plan_for("BF16"))
    with pytest.raises(PlanError, match=r"did you mean 'auto_round'\?; known: .*fake"):
        make_format("autoround", plan_for())


@pytest.mark.parametrize("spelling", ["Auto_Round:AWQ", "auto-round:auto_awq", " AUTO_ROUND:AUTO_AWQ"])
def test_names_have_spellings(spelling: str) -> None:
    assert format_name(spelling) == "auto_round:auto_awq"


def test_config_of_one_scheme() -> None:
    config = make_format("auto_round", plan_for({"group_size": 32})).config({"iters": 7, "seqlen": None, "bits": 99})
    assert config.pop("autoround_version")
    assert config == {
        "bits": 4,
        "data_type": "int",
        "group_size": 32,
        "sym": True,
        "iters": 7,
        "block_name_to_quantize": "model.layers",
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
    }


def test_extra_config_has_only_what_differs() -> None:
    rules = {"layers.0.q_proj": {"bits": 8}, "layers.1.down_proj": {"bits": 16}, "layers.1.q_proj": {"sym": False}}
    plan = plan_for({"group_size": 32}, lm_head=True, config=rules)
    config = make_format("auto_round", plan).config({})
    assert config["extra_config"] == {
        "model.layers.0.q_proj": {"bits": 8},
        "model.layers.1.q_proj": {"sym": False},
        "model.layers.1.down_proj": {"bits": 16, "data_type": "float"},
        "lm_head": {"bits": 4, "data_type": "int", "group_size": 32, "sym": True},
    }
    assert config["group_size"] == 32 and "null" not in json.dumps(config)


def test_config_writes_one_scale_per_tensor_as_one_per_row() -> None:
    config = make_format("auto_round", plan_for({"group_size": 0})).config({})
    assert config["group_size"] == -1 and "extra_config" not in config


def test_top_level_is_a_scheme_that_is_used() -> None:
    rules = {"q_proj": {"bits": 8, "data_type": "int"}}
    config = make_format("auto_round", plan_for("BF16", config=rules)).config({})
    assert config["bits"] == 8
    assert config["extra_config"]["model.layers.0.down_proj"] == {"bits": 16, "data_type": "float"}


def test_block_prefixes() -> None:
    assert block_prefixes([["m.layers.0", "m.layers.1"], ["v.blocks.0"]]) == ["m.layers", "v.blocks.0"]
    assert block_prefixes([["encoder", "decoder"]]) == ["encoder", "decoder"]
    assert block_prefixes([["m.layers.1", "m.layers.10"]]) == ["m.layers"]


def test_kept_layer_that_shares_a_prefix_is_listed() -> None:
    infos = [LayerInfo("h.0.a", 64, 64, "h.0"), LayerInfo("h.1.a", 64, 64, "h.1"), LayerInfo("head", 64, 64, None)]
    plan = make_plan(infos, [["h.0", "h.1"]], QuantizationScheme(group_size=32))
    config = make_format("auto_round", plan).config({})
    assert config["block_name_to_quantize"] == "h"
    assert config["extra_config"] == {"head": {"bits": 16, "data_type": "float"}}


def test_fake_keeps_dtype_and_orientation() -> None:
    plan = plan_for(transposed=True, dtype=torch.float16)
    layer = next(iter(plan.quantized().values()))
    tensor = random_tensor(layer)
    weight = make_format("fake", plan).pack(tensor, layer.info)["weight"]
    assert weight.shape == (IN, OUT) and torch.equal(weight.t(), tensor.dequantize(torch.float16))
    assert make_format("fake", plan).config({"iters": 1}) is None


# The writer.

TENSORS = {
    "a.bf16": torch.randn(3, 5).bfloat16(),
    "b.empty": torch.zeros(0, 4),
    "c.scalar": torch.tensor(3),
    "d.fp8": torch.randn(7).to(torch.float8_e4m3fn),
    "e.strided": torch.randn(9, 4).t(),
    "f.bool": torch.tensor([True, False, True]),
    "g.half": torch.randn(11).half(),
}


def shapes(tensors: dict[str, torch.Tensor]) -> list[tuple[str, TensorShape]]:
    return [(name, TensorShape(tuple(tensor.shape), tensor.dtype)) for name, tensor in tensors.items()]


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


@pytest.mark.parametrize("size", ["5GB", 80])
@pytest.mark.parametrize("backwards", [False, True])
def test_written_checkpoint_reads_back(tmp_path: Path, size: int | str, backwards: bool) -> None:
    order = list(TENSORS)[:: -1 if backwards else 1]
    with CheckpointWriter(tmp_path, shapes(TENSORS), size) as writer:
        for name in order:
            writer.write(name, TENSORS[name])
    found = read_all(tmp_path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].float(), tensor.float())
    files = {path.name for path in tmp_path.iterdir()}
    if size == "5GB":
        assert files == {"model.safetensors"}
        return
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in TENSORS.values())
    assert set(index["weight_map"].values()) | {INDEX} == files and index["weight_map"].keys() == TENSORS.keys()


def test_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="listed twice"):
        CheckpointWriter(tmp_path, [*shapes(TENSORS), *shapes(TENSORS)])
    writer = CheckpointWriter(tmp_path, shapes(TENSORS))
    writer.write("a.bf16", TENSORS["a.bf16"])
    with pytest.raises(ValueError, match="second time"):
        writer.write("a.bf16", TENSORS["a.bf16"])
    with pytest.raises(ValueError, match="not announced"):
        writer.write("z", TENSORS["a.bf16"])
    with pytest.raises(ValueError, match=r"float32\[11\], announced as float16\[11\]"):
        writer.write("g.half", TENSORS["g.half"].float())
    with pytest.raises(ValueError, match=r"int64\[1\], announced as int64\[\]"):
        writer.write("c.scalar", TENSORS["c.scalar"][None])
    with pytest.raises(ValueError, match=r"6 tensor\(s\) were never written: b.empty, c.scalar"):
        writer.close()
    assert not (tmp_path / "model.safetensors").exists()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_interrupted_run_leaves_the_old_export(tmp_path: Path) -> None:
    old = {"x": torch.ones(4)}
    with CheckpointWriter(tmp_path, shapes(old)) as writer:
        writer.write("x", old["x"])
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path, shapes(TENSORS)) as writer:
        writer.write("c.scalar", TENSORS["c.scalar"])
        raise KeyboardInterrupt
    assert torch.equal(read_all(tmp_path)["x"], old["x"])


def test_new_export_removes_the_old_ones_files(tmp_path: Path) -> None:
    for size in (80, "5GB", 80):
        with CheckpointWriter(tmp_path, shapes(TENSORS), size) as writer:
            for name, tensor in TENSORS.items():
                writer.write(name, tensor)
        assert (tmp_path / INDEX).exists() == (size == 80)
        assert (tmp_path / "model.safetensors").exists() == (size != 80)
        assert read_all(tmp_path).keys() == TENSORS.keys()


def test_full_disk_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(OSError, match=r"needs [\d,]+ bytes .* 100 free: .*model.safetensors"):
        CheckpointWriter(tmp_path, shapes(TENSORS))
    assert list(tmp_path.iterdir()) == []


def test_sizes() -> None:
    assert (parse_size("5GB"), parse_size("512 mb"), parse_size("1GiB"), parse_size(7)) == (
        5 * 10**9,
        512 * 10**6,
        2**30,
        7,
    )
    for wrong in ("5 apples", "", "0", "-1"):
        with pytest.raises(ValueError, match="max_shard_size"):
            parse_size(wrong)


def test_side_files(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "source" / "out"
    kept = ["tokenizer.json", "modeling_x.py", "sub/config.json", "sub/deeper/merges.txt", "LICENSE"]
    dropped = ["config.json", "model.safetensors", "model.safetensors.index.json", "sub/x.bin", "old.pth"]
    dropped += [".git/config", ".cache/x.json", "__pycache__/a.py", "hf_quant_config.json", "quantization_config.json"]
    for name in [*kept, *dropped, "out/earlier.json"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    blob = tmp_path / "blob"
    blob.write_text("vocabulary")
    (source / "vocab.txt").symlink_to(blob)
    assert sorted(copy_side_files(source, out)) == sorted([*kept, "vocab.txt"])
    assert (out / "sub/deeper/merges.txt").read_text() == "sub/deeper/merges.txt"
    assert (out / "vocab.txt").read_text() == "vocabulary" and not (out / "vocab.txt").is_symlink()
    with pytest.raises(ValueError, match="source model's folder"):
        copy_side_files(source, source)


def test_config_keeps_the_source_and_its_order(tmp_path: Path) -> None:
    source = {"z": 1, "quantization_config": {"old": 1}, "text_config": {"b": 2, "quantization_config": {}}, "a": "é"}
    write_config(source, {"bits": 4}, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert list(written) == ["z", "text_config", "a", "quantization_config"]
    assert written == {"z": 1, "text_config": {"b": 2}, "a": "é", "quantization_config": {"bits": 4}}
    assert json.loads((tmp_path / "quantization_config.json").read_text()) == {"bits": 4}
    assert "quantization_config" in source
    write_config(source, None, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert not (tmp_path / "quantization_config.json").exists()
