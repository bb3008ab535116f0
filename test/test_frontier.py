"""The benchmark of the frontier: its decoders against the package's own numbers, its cases and its table.

The benchmark shares no code with the quantizers that it judges, so what both say about the same format has to agree.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import frontier
from _checkpoints import RoundingModel, decode_compressed, from_tensors, load_original, round_mx, round_nv, weight_of
from _frontier_report import figure, table
from quality import keep_result

from auto_round.data_type import mxfp, nvfp
from auto_round.schemes import TensorSpec

SETTINGS = {"nsamples": 128, "seqlen": 512, "threads": 1}


def awkward_inputs(columns: int) -> torch.Tensor:
    """Random values, values on ties between two codes, and groups of zeros."""
    x = torch.randn(6, columns, generator=torch.Generator().manual_seed(0)) * 3
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    x[1] = ties.repeat(columns // 8)
    x[2] = -x[1]
    x[3] = 0
    x[4, 0] = 7 / 8 * 64
    return x


def test_inputs_are_rounded_to_mxfp4_as_the_package_does_it() -> None:
    x = awkward_inputs(64)
    spec = TensorSpec(bits=4, sym=True, data_type="mx_fp", group_size=32)
    assert torch.equal(round_mx(x), mxfp.quantize_input(x, spec, None))


def test_inputs_are_rounded_to_nvfp4_as_the_package_does_it() -> None:
    x = awkward_inputs(64)
    spec = TensorSpec(bits=4, sym=True, data_type="nv_fp", group_size=16)
    overall = nvfp.input_scale(x.abs().max(), spec)
    assert torch.allclose(round_nv(x, overall), nvfp.quantize_input(x, spec, overall), rtol=1e-6)


def test_integers_of_compressed_tensors_fill_each_word_from_its_lowest_bits() -> None:
    codes = torch.arange(16).reshape(1, 16) % 8
    words = torch.zeros(1, 2, dtype=torch.int64)
    for column in range(16):
        words[0, column // 10] += int(codes[0, column]) << (3 * (column % 10))  # ten codes of three bits a word
    tensors = {
        "a.weight_packed": words.to(torch.int32),
        "a.weight_shape": torch.tensor([1, 16]),
        "a.weight_scale": torch.tensor([[0.5, 2.0]]),
    }
    expected = (codes - 4).float() * torch.tensor([0.5, 2.0]).repeat_interleave(8)
    assert torch.equal(decode_compressed(tensors, "a", 3), expected)


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2)).save_pretrained(
        tmp_path
    )
    return tmp_path


def test_an_expert_of_the_checkpoint_is_found_in_the_model_and_rounds_its_inputs(mixture: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(mixture / "model.safetensors")
    model = from_tensors(dict(tensors), mixture)
    name = "model.layers.0.mlp.experts.2"
    for kind in ("gate_proj", "up_proj", "down_proj"):
        assert torch.equal(weight_of(model, f"{name}.{kind}"), tensors[f"{name}.{kind}.weight"])
    seen: list[torch.Size] = []

    def rounding(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return torch.zeros_like(x)

    ids = torch.arange(32)[None]
    asked = RoundingModel(model, {weight_of(model, f"{name}.{k}_proj").data_ptr(): rounding for k in ("gate", "down")})
    with torch.inference_mode():
        changed, plain = asked(input_ids=ids).logits, model(input_ids=ids).logits
    assert [shape[-1] for shape in seen] == [64, 32]
    assert not torch.equal(changed, plain)


def test_a_tensor_that_was_not_saved_is_named(mixture: Path) -> None:
    tensors = {k: v for k, v in load_original(mixture).state_dict().items() if "norm" not in k}
    with pytest.raises(ValueError, match=r"not saved: .*model\.norm\.weight"):
        from_tensors(tensors, mixture)


def record(tag: str, recipe: str, seed: int, kl: float, seconds: float) -> dict[str, object]:
    case = {"model": "small", "tag": tag, "row": "W4g128", "recipe": recipe, "seed": seed, **SETTINGS}
    cost = {"cpu_s": seconds, "tree_cpu_s": seconds, "wall_s": seconds, "peak_rss_mb": 100.0, "child_peak_rss_mb": 0.0}
    return {**case, **cost, "kl": kl, "ppl": 30.0, "top1": 0.9, "ok": True}


def test_the_table_gives_spreads_over_seeds_and_ratios_of_means() -> None:
    records = [record("auto-round", "default", 42, 0.002, 200.0), record("auto-round", "default", 43, 0.004, 200.0)]
    lines = table([*records, record("ours", "light", 42, 0.0015, 50.0)], "auto-round/default").splitlines()
    assert (
        "| small | W4g128 | auto-round | default | 2 | 0.00300 ± 0.00141 | 30.000 | 200 | 100 | 1.00 | 1.00 |" in lines
    )
    assert "| small | W4g128 | ours | light | 1 | 0.00150 | 30.000 | 50 | 100 | 0.50 | 0.25 |" in lines


def test_a_picture_has_a_panel_for_each_row_and_model(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure([record("ours", "light", 42, 0.0015, 50.0)], tmp_path / "a.svg")
    assert "</svg>" in (tmp_path / "a.svg").read_text()


def test_only_what_is_missing_is_measured_and_only_what_an_implementation_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = argparse.Namespace(
        model=[frontier.Subject("small", tmp_path, tmp_path, tmp_path)],
        quantizer=["ours=a", "gptqmodel=b"], path=[], ggml=None, rows=["W4g128", "Q4_K_M"],
        recipes=["light", "gptq"], seeds=[42], force=False, results=tmp_path / "r.jsonl", work=tmp_path, **SETTINGS,
    )  # fmt: skip
    keep_result(options.results, record("ours", "light", 42, 0.1, 1.0))
    measured = []

    def measure(case: dict[str, object], *_: object) -> dict[str, object]:
        measured.append((case["tag"], case["row"], case["recipe"]))
        return record(str(case["tag"]), str(case["recipe"]), 42, 0.1, 1.0) | case

    monkeypatch.setattr(frontier, "measure", measure)
    assert frontier.drive(options) == 0
    assert measured == [("ours", "Q4_K_M", "light"), ("gptqmodel", "W4g128", "gptq")]
    measured.clear()
    frontier.drive(options)
    assert not measured


def test_a_gguf_file_is_read_under_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    import gguf
    from _gguf_files import gguf_tensors
    from safetensors.torch import save_file

    heads = 2
    query = torch.arange(8.0)[:, None].expand(8, 32).contiguous()
    stacked = torch.arange(2.0)[:, None, None].expand(2, 4, 32)
    shapes = {"model.layers.0.self_attn.q_proj.weight": query}
    shapes |= {f"model.layers.0.mlp.experts.{index}.up_proj.weight": stacked[index].clone() for index in range(2)}
    save_file(shapes, tmp_path / "model.safetensors")
    file = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    neighbours = query[[0, 2, 1, 3, 4, 6, 5, 7]]  # in each head of four rows: first, third, second, fourth
    writer.add_tensor("blk.0.attn_q.weight", neighbours.numpy())
    writer.add_tensor("blk.0.ffn_up_exps.weight", stacked.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = gguf_tensors(file, tmp_path)
    assert found.keys() == shapes.keys()
    assert all(torch.equal(found[name], value) for name, value in shapes.items())
