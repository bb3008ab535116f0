"""Quantized checkpoints read as float models: against Transformers, compressed-tensors, and plain arithmetic."""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import VOCABULARY, random_model, tiny_llama
from transformers import AutoModelForCausalLM

from auto_round.modeling import sources
from auto_round.modeling.checkpoint import Checkpoint, CheckpointError, DequantizedCheckpoint
from auto_round.modeling.sources import open_checkpoint
from auto_round.modeling.streaming import StreamedModel

FP8 = torch.float8_e4m3fn
BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def folder_of(path, tensors, config=None):
    """A model folder of these tensors; `config` is a model's configuration."""
    path.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def fp8_blocks(weight, rows=128, columns=128):
    """Codes and scales of [..., out, in] in blocks, one block at a time."""
    *lead, height, width = weight.shape
    scale = torch.empty(*lead, math.ceil(height / rows), math.ceil(width / columns))
    codes = torch.empty(weight.shape, dtype=FP8)
    for i in range(scale.shape[-2]):
        for j in range(scale.shape[-1]):
            part = (..., slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scale[..., i, j] = weight[part].abs().amax((-1, -2)) / 448
            codes[part] = (weight[part] / scale[..., i, j, None, None]).to(FP8)
    return codes, scale


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n}


def save_quantized(path, model, quantization, encode):
    """The model with each linear layer's weight replaced by `encode(weight)`: suffix → tensor."""
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    for name, module in linears(model).items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in encode(module.weight.detach()).items()}
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": "bfloat16",
        "quantization_config": quantization,
    }
    return folder_of(path, tensors, config)


def accounted(checkpoint):
    """Every stored tensor is shown or dropped, with a reason, and not both."""
    stored = set(checkpoint.source.names())
    assert stored == (stored & set(checkpoint.names())) | set(checkpoint.dropped)
    assert not set(checkpoint.dropped) & set(checkpoint.names()) and all(checkpoint.dropped.values())
    for name, entry in checkpoint.entries.items():
        tensor = checkpoint.read_one(name)
        assert (tuple(tensor.shape), tensor.dtype, tensor.nbytes) == (entry.shape, entry.dtype, entry.nbytes)
        assert tensor.is_contiguous()
    assert checkpoint.nbytes == sum(entry.nbytes for entry in checkpoint.entries.values())
    return checkpoint


def transformers_agrees(folder, quantization, **load):
    """The float model that is read is the one that Transformers dequantizes, bit for bit; returns both."""
    checkpoint = accounted(open_checkpoint(folder, quantization))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **load).eval()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    plain = folder_of(folder.with_name("float"), checkpoint.read(checkpoint.names()), config)
    mine, report = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, left over or of another shape
    want, got = theirs.state_dict(), mine.state_dict()
    assert want.keys() == got.keys()
    for name in want:
        assert torch.equal(got[name], want[name].to(got[name].dtype)), name
    return checkpoint, theirs


# ---- against Transformers -------------------------------------------------------------------------------------------


def test_fp8_blocks_as_transformers(tmp_path):
    def encode(weight):
        codes, scale = fp8_blocks(weight)
        return {"weight": codes, "weight_scale_inv": scale}

    model = tiny_llama(hidden_size=128, intermediate_size=256)
    folder = save_quantized(tmp_path / "m", model, BLOCK, encode)
    checkpoint, _ = transformers_agrees(folder, BLOCK)
    name = "model.layers.0.mlp.down_proj.weight"
    error = (checkpoint.read_one(name).float() - model.state_dict()[name]).norm() / model.state_dict()[name].norm()
    assert 0 < error < 0.04
    assert checkpoint.dropped[f"{name}_scale_inv"] == f"scale of {name}, dequantized"
    norm = "model.norm.weight"
    assert torch.equal(checkpoint.read_one(norm), Checkpoint(folder).read_one(norm))
    assert checkpoint.fingerprint() != Checkpoint(folder).fingerprint()
    assert checkpoint.fingerprint() != open_checkpoint(folder, BLOCK, torch.float32).fingerprint()
    assert open_checkpoint(folder, BLOCK, torch.float32).read_one(name).dtype == torch.float32


def test_streams_like_a_float_model(tmp_path):
    quantization = {"quant_method": "fp8", "weight_block_size": [32, 48]}

    def encode(weight):
        codes, scale = fp8_blocks(weight, 32, 48)
        return {"weight": codes, "weight_scale_inv": scale.to(torch.bfloat16)}

    model = tiny_llama(hidden_size=96, intermediate_size=192, num_key_value_heads=4)
    folder = save_quantized(tmp_path / "m", model, quantization, encode)
    checkpoint, theirs = transformers_agrees(folder, quantization)
    with init_empty_weights(include_buffers=False):
        empty = AutoModelForCausalLM.from_config(theirs.config, dtype=torch.bfloat16).eval()
    streamed = StreamedModel(empty, checkpoint)
    streamed.set_blocks(("model.layers.0", "model.layers.1"))
    batch = torch.randint(0, VOCABULARY, (2, 9))
    with torch.no_grad(), streamed.streaming() as running:
        assert torch.equal(running(batch).logits, theirs(batch).logits)


def test_fp8_per_tensor_as_transformers(tmp_path):
    quantization = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}

    def encode(weight):
        codes, scale = fp8_blocks(weight, *weight.shape)
        return {"weight": codes, "weight_scale_inv": scale[0, 0], "activation_scale": torch.tensor(0.5)}

    folder = save_quantized(tmp_path / "m", tiny_llama(), quantization, encode)
    checkpoint, _ = transformers_agrees(folder, quantization)
    assert "activation" in checkpoint.dropped["model.layers.0.mlp.up_proj.activation_scale"]


def test_fp8_experts_as_transformers(tmp_path):
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = random_model(config)
    skipped = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["gate", "lm_head"]}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "gate_up_proj" in name or name.endswith("experts.down_proj"):
            stem, _, kind = name.rpartition(".")
            parts = zip(("gate_proj", "up_proj"), tensor.chunk(2, 1), strict=True)
            for part, weights in parts if kind == "gate_up_proj" else ((kind, tensor),):
                for index, weight in enumerate(weights):
                    stored = f"{stem}.{index}.{part}.weight"
                    tensors[stored], tensors[f"{stored}_scale_inv"] = fp8_blocks(weight)
        elif "_proj.weight" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = fp8_blocks(tensor)
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    stored = config.to_dict() | {"architectures": ["Qwen3MoeForCausalLM"], "quantization_config": skipped}
    transformers_agrees(folder_of(tmp_path / "m", tensors, stored), skipped)


@pytest.mark.parametrize("kind", ["fp8", "ue8m0", "fp4"])
def test_fused_experts_as_transformers(tmp_path, kind):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, scale = fp8_blocks(torch.randn(3, 256, 384, generator=torch.Generator().manual_seed(0)))
    if kind == "ue8m0":
        scale = scale.log2().ceil().exp2().to(torch.float8_e8m0fnu)
    if kind == "fp4":
        codes = torch.randint(-128, 128, (3, 256, 192), dtype=torch.int8)
        scale = torch.randint(110, 135, (3, 256, 12), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    folder = folder_of(tmp_path / "m", {name: codes, f"{name}_scale_inv": scale})
    checkpoint = accounted(open_checkpoint(folder, BLOCK | {"scale_fmt": "ue8m0"}))
    want = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)
    assert torch.equal(checkpoint.read_one(name), want)


def test_mxfp4_as_transformers(tmp_path):
    from transformers import GptOssConfig

    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    generator = torch.Generator().manual_seed(0)
    model = random_model(config)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, width, height = tensor.shape  # Transformers' orientation is [experts, in, out]
            shape = (experts, height, width // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            tensors[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8, generator=generator)
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    quantization = {"quant_method": "mxfp4"}
    stored = config.to_dict() | {"architectures": ["GptOssForCausalLM"], "quantization_config": quantization}
    folder = folder_of(tmp_path / "m", tensors, stored)
    checkpoint, _ = transformers_agrees(folder, quantization)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert checkpoint.entries[name].shape == (4, 64, 192) and checkpoint.entries[name].dtype == torch.bfloat16
    assert checkpoint.dropped[f"{name}_blocks"] == f"codes of {name}, dequantized"


# ---- against compressed-tensors -------------------------------------------------------------------------------------

INT = {"type": "int", "dynamic": False}
FLOAT = {"type": "float", "symmetric": True, "dynamic": False}
COMPRESSED = {
    "W4 groups": ("pack-quantized", INT | {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32}),
    "W4 groups asym": (
        "pack-quantized",
        INT | {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32},
    ),
    "W3 groups": ("pack-quantized", INT | {"num_bits": 3, "symmetric": True, "strategy": "group", "group_size": 32}),
    "W8 channel": ("pack-quantized", INT | {"num_bits": 8, "symmetric": True, "strategy": "channel"}),
    "W8 channel asym": ("pack-quantized", INT | {"num_bits": 8, "symmetric": False, "strategy": "channel"}),
    "int8 channel": ("int-quantized", INT | {"num_bits": 8, "symmetric": True, "strategy": "channel"}),
    "int8 asym": ("naive-quantized", INT | {"num_bits": 8, "symmetric": False, "strategy": "channel"}),
    "fp8 tensor": ("float-quantized", FLOAT | {"num_bits": 8, "strategy": "tensor"}),
    "fp8 channel": ("float-quantized", FLOAT | {"num_bits": 8, "strategy": "channel"}),
    "fp8 block": ("float-quantized", FLOAT | {"num_bits": 8, "strategy": "block", "block_structure": [64, 48]}),
    "mxfp8": ("mxfp8-quantized", FLOAT | {"num_bits": 8, "strategy": "group", "group_size": 32}),
    "mxfp4": ("mxfp4-pack-quantized", FLOAT | {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "nvfp4": ("nvfp4-pack-quantized", FLOAT | {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}),
}


def compressed_qparams(weight, args, form):
    """Scales (and zero points) of a scheme by min and max, in the shapes that compressed-tensors wants."""
    height, width = weight.shape
    columns = {"channel": width, "tensor": width, "block": 48}.get(args["strategy"], args.get("group_size"))
    rows = {"tensor": height, "block": 64}.get(args["strategy"], 1)
    padded = torch.nn.functional.pad(weight, (0, -width % columns, 0, -height % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, -1, columns).transpose(1, 2).flatten(2)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    top = {"int": 2 ** (args["num_bits"] - 1) - 1, "float": 448 if args["num_bits"] == 8 else 6}[args["type"]]
    scale = torch.maximum(high, -low) / top
    params = {"weight_scale": scale.reshape(1) if args["strategy"] == "tensor" else scale}
    if not args.get("symmetric", True):
        params["weight_scale"] = (high - low) / (2 ** args["num_bits"] - 1)
        zero = (-(2 ** (args["num_bits"] - 1)) - low / params["weight_scale"]).round()
        params["weight_zero_point"] = zero.to(torch.int8)
    if form.startswith("mx"):
        params["weight_scale"] = scale.log2().ceil().exp2()
    if form.startswith("nvfp4"):
        params["weight_global_scale"] = (448 / scale.max()).reshape(1)
        rounded = (scale * params["weight_global_scale"]).to(FP8).float()
        params["weight_scale"] = rounded
    return params


def compressed_config(form, args, **group):
    groups = {"group_0": {"targets": ["Linear"], "weights": args, "format": form, **group}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors(tmp_path, kind):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    form, args = COMPRESSED[kind]
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(form)
    width = 104 if args["strategy"] in ("channel", "tensor", "block") else 96
    weight = torch.randn(72, width, generator=torch.Generator().manual_seed(1)) * 0.1
    params = compressed_qparams(weight, args, form)
    state = compressor.compress({"weight": weight, **params}, scheme)
    want = compressor.decompress(state, scheme)["weight"]
    extra = {"input_scale": torch.ones(1), "input_global_scale": torch.ones(1)}
    tensors = {f"model.layers.0.self_attn.q_proj.{suffix}": tensor for suffix, tensor in {**state, **extra}.items()}
    tensors |= {"model.layers.0.self_attn.k_scale": torch.ones(1), "model.norm.weight": torch.ones(96)}
    folder = folder_of(tmp_path / "m", tensors)
    checkpoint = accounted(open_checkpoint(folder, compressed_config(form, args), torch.float32))
    assert set(checkpoint.names()) == {"model.layers.0.self_attn.q_proj.weight", "model.norm.weight"}
    assert "cache" in checkpoint.dropped["model.layers.0.self_attn.k_scale"]
    got = checkpoint.read_one("model.layers.0.self_attn.q_proj.weight")
    # The library computes FP4 in bfloat16 and the others in the scales' dtype, float32 here.
    tolerance = {"rtol": 2**-7, "atol": 1e-6} if "fp4" in kind else {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(got, want.float(), **tolerance)
    assert (got - weight).norm() / weight.norm() < (0.02 if args["num_bits"] == 8 and "int" in args["type"] else 0.35)


def test_compressed_tensors_as_transformers(tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from transformers import CompressedTensorsConfig

    form, args = COMPRESSED["W4 groups"]
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(form)

    def encode(weight):
        return compressor.compress({"weight": weight, **compressed_qparams(weight, args, form)}, scheme)

    quantization = compressed_config(form, args) | {"quantization_status": "compressed"}
    folder = save_quantized(tmp_path / "m", tiny_llama(), quantization, encode)
    transformers_agrees(folder, quantization, quantization_config=CompressedTensorsConfig(dequantize=True))


def test_compressed_column_groups(tmp_path):
    """`weight_g_idx` names each input's group; -1 says that it was never set."""
    codes = torch.randint(0, 16, (8, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(8, 2) + 0.5
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)) % 2
    form, args = COMPRESSED["W4 groups"]
    for index, groups in ((order, order), (torch.full((64,), -1), torch.arange(64) // 32)):
        tensors = {
            "l.weight_packed": sources_pack(codes, 4),
            "l.weight_scale": scale,
            "l.weight_shape": torch.tensor([8, 64]),
            "l.weight_g_idx": index.int(),
        }
        checkpoint = open_checkpoint(folder_of(tmp_path / "m", tensors), compressed_config(form, args), torch.float32)
        assert torch.equal(accounted(checkpoint).read_one("l.weight"), (codes.float() - 8) * scale[:, groups])


def sources_pack(codes, bits):
    """Row by row through Python's integers."""
    rows = []
    for row in codes.tolist():
        stream = sum(code << (bits * index) for index, code in enumerate(row))
        words = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(math.ceil(len(row) * bits / 32))]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def test_compressed_groups_by_name(tmp_path):
    """The most specific target decides: the name, then a pattern, then the class."""
    form, args = COMPRESSED["W4 groups"]
    quantization = compressed_config(form, args)
    quantization["config_groups"] |= {
        "group_1": {"targets": ["re:.*mlp.*"], "weights": args | {"group_size": 16}},
        "group_2": {"targets": ["a.mlp.down"], "weights": args | {"group_size": 64}},
    }
    tensors = {}
    for layer, groups in {"a.attn.q": 2, "a.mlp.up": 4, "a.mlp.down": 1}.items():
        tensors |= {
            f"{layer}.weight_packed": sources_pack(torch.full((4, 64), 9), 4),
            f"{layer}.weight_scale": torch.ones(4, groups),
            f"{layer}.weight_shape": torch.tensor([4, 64]),
        }
    checkpoint = open_checkpoint(folder_of(tmp_path / "m", tensors), quantization)
    assert all(tensor.eq(1).all() for tensor in accounted(checkpoint).read(checkpoint.names()).values())


# ---- other stores of FP8 and FP4 ------------------------------------------------------------------------------------


def test_fbgemm(tmp_path):
    generator = torch.Generator().manual_seed(0)
    linear, scale = torch.randn(40, 24, generator=generator).to(FP8), torch.rand(40, 1, generator=generator)
    up, up_scale = torch.randn(2, 24, 48, generator=generator).to(FP8), torch.rand(2, 1, 48, generator=generator)
    down, down_scale = torch.randn(2, 24, 24, generator=generator).to(FP8), torch.rand(2, 24, 1, generator=generator)
    tensors = {"q.weight": linear, "q.weight_scale": scale, "q.input_scale_ub": torch.ones(1)}
    tensors |= {"experts.gate_up_proj": up, "experts.gate_up_proj_scale": up_scale}
    tensors |= {"experts.down_proj": down, "experts.down_proj_scale": down_scale}
    folder = folder_of(tmp_path / "m", tensors)
    read = accounted(open_checkpoint(folder, {"quant_method": "fbgemm_fp8"}, torch.float32)).read_one
    assert torch.equal(read("q.weight"), linear.float() * scale)
    assert torch.equal(read("experts.gate_up_proj"), up.float() * up_scale)
    assert torch.equal(read("experts.down_proj"), down.float() * down_scale.transpose(1, 2))  # by output, the last


def test_modelopt(tmp_path):
    codes = torch.randint(0, 256, (6, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scale, second = torch.rand(6, 2).to(FP8), torch.tensor(0.25)
    fp8 = torch.randn(6, 32).to(FP8)
    tensors = {"a.weight": codes, "a.weight_scale": scale, "a.weight_scale_2": second, "a.input_scale": torch.ones(())}
    tensors |= {"b.weight": fp8, "b.weight_scale": torch.tensor(0.5), "k_proj.k_scale": torch.ones(())}
    folder = folder_of(tmp_path / "m", tensors)
    checkpoint = accounted(open_checkpoint(folder, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, torch.float32))
    values = torch.tensor([[e2m1(byte & 15), e2m1(byte >> 4)] for byte in codes.flatten().tolist()]).view(6, 32)
    assert torch.equal(checkpoint.read_one("a.weight"), values * scale.float().repeat_interleave(16, 1) * second)
    assert torch.equal(checkpoint.read_one("b.weight"), fp8.float() * 0.5)
    assert set(checkpoint.names()) == {"a.weight", "b.weight"}
    with pytest.raises(CheckpointError, match="W4A8_AWQ is not understood"):
        open_checkpoint(folder, {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"})


@pytest.mark.parametrize(
    ("shape", "scale"),
    [
        *[((8, 6), scale) for scale in ((), (1,), (8,), (8, 1))],
        *[((2, 8, 6), scale) for scale in ((1,), (2,), (2, 1), (2, 1, 1), (2, 8, 1), (2, 1, 6), (2, 2, 1))],
    ],
)
def test_scales_of_tensor_row_and_expert(tmp_path, shape, scale):
    codes, factor = torch.randn(shape).to(FP8), torch.rand(scale) + 0.5
    folder = folder_of(tmp_path / "m", {"x.weight": codes, "x.weight_scale": factor})
    got = open_checkpoint(folder, {"quant_method": "fp8"}, torch.float32).read_one("x.weight")
    if scale == (2, 2, 1):  # the halves of a fused gate and up
        factor = factor.repeat_interleave(4, 1)
    elif scale in ((8,), (2,), (2, 1)):
        factor = factor.view(-1, *[1] * (len(shape) - 1))
    assert torch.equal(got, codes.float() * factor)


# ---- arithmetic, by the specifications' definitions -----------------------------------------------------------------


def e2m1(nibble):
    sign, exponent, mantissa = (-1) ** (nibble >> 3), (nibble >> 1) & 3, nibble & 1
    return sign * (mantissa / 2 if exponent == 0 else 2 ** (exponent - 1) * (1 + mantissa / 2))


def e4m3(byte):
    sign, exponent, mantissa = (-1) ** (byte >> 7), (byte >> 3) & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else 2 ** (exponent - 7) * (1 + mantissa / 8))


def test_every_code():
    every = torch.arange(256, dtype=torch.uint8)
    assert sources.unpack_e2m1(every[:, None]).tolist() == [[e2m1(b & 15), e2m1(b >> 4)] for b in range(256)]
    scales = sources.scale_to_float(every)
    assert scales[:255].tolist() == [math.ldexp(1.0, b - 127) for b in range(255)] and scales[255].isnan()
    values = every.view(FP8).float().tolist()
    assert all(v == e4m3(b) or (math.isnan(v) and b & 127 == 127) for b, v in enumerate(values))


@settings(max_examples=60, deadline=None)
@given(
    lead=st.sampled_from([(), (1,), (3,)]),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    block=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    chunk=st.sampled_from([1, 50, 1 << 18]),
    seed=st.integers(0, 999),
)
def test_ragged_blocks(tmp_path_factory, lead, sizes, block, chunk, seed):
    """Encode, then decode: each element by its own block's scale, whatever the sizes and however it is cut up.

    Transformers 5.23 is no reference here: it takes the block size from the shapes, so it refuses 576 rows in blocks of
    128 and reads 192 as two blocks of 96.
    """
    weight = torch.randn(*lead, *sizes, generator=torch.Generator().manual_seed(seed))
    codes, scale = fp8_blocks(weight, *block)
    folder = folder_of(tmp_path_factory.mktemp("m"), {"x.weight": codes, "x.weight_scale_inv": scale})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_CHUNK", chunk)
        quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
        got = open_checkpoint(folder, quantization, torch.float32).read_one("x.weight")
    for index in range(got.numel()):
        *outer, i, j = (int(part) for part in torch.unravel_index(torch.tensor(index), got.shape))
        value = codes[(*outer, i, j)].float() * scale[(*outer, i // block[0], j // block[1])]
        assert got[(*outer, i, j)] == value
    assert ((got - weight).abs() <= weight.abs() / 16 + weight.abs().max() * 2**-9).all()


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 5), seed=st.integers(0, 999), data=st.data())
def test_mxfp4_round_trip(tmp_path_factory, rows, groups, seed, data):
    """Values that E2M1 · E8M0 can hold survive exactly; the fused parameter is transposed."""
    generator = torch.Generator().manual_seed(seed)
    nibbles = torch.randint(0, 16, (2, rows, groups, 32), generator=generator, dtype=torch.uint8)
    low, high = data.draw(st.sampled_from([(120, 130), (1, 10), (240, 252)]))
    scales = torch.randint(low, high, (2, rows, groups), generator=generator, dtype=torch.uint8)
    table = torch.tensor([e2m1(nibble) for nibble in range(16)], dtype=torch.float64)
    want = (table[nibbles.long()] * (2.0 ** (scales.double() - 127))[..., None]).flatten(2).transpose(1, 2)
    tensors = {"e.down_proj_blocks": nibbles[..., 0::2] | nibbles[..., 1::2] << 4, "e.down_proj_scales": scales}
    folder = folder_of(tmp_path_factory.mktemp("m"), tensors)
    got = open_checkpoint(folder, {"quant_method": "mxfp4"}, torch.float32).read_one("e.down_proj")
    assert got.shape == (2, groups * 32, rows) and torch.equal(got.double(), want)


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 8), rows=st.integers(1, 40), columns=st.integers(1, 70), seed=st.integers(0, 999))
def test_packed_ints_round_trip(tmp_path_factory, bits, rows, columns, seed):
    """Any width, also where codes straddle words and rows end within one; zero points run along the outputs."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    zero = torch.randint(0, 1 << bits, (rows, 1), generator=generator)
    scale = torch.rand(rows, 1, generator=generator)
    tensors = {
        "l.weight_packed": sources_pack(codes, bits),
        "l.weight_scale": scale,
        "l.weight_zero_point": sources_pack(zero.t(), bits).t(),
        "l.weight_shape": torch.tensor([rows, columns]),
    }
    args = INT | {"num_bits": bits, "symmetric": False, "strategy": "channel"}
    folder = folder_of(tmp_path_factory.mktemp("m"), tensors)
    got = open_checkpoint(folder, compressed_config("pack-quantized", args), torch.float32).read_one("l.weight")
    assert torch.equal(got, (codes - zero).float() * scale)


# ---- reading little, and errors -------------------------------------------------------------------------------------


def small(path, **changes):
    codes, scale = fp8_blocks(torch.randn(200, 96))
    tensors = {"a.weight": codes, "a.weight_scale_inv": scale, "b.weight": torch.randn(4, 4)} | changes
    return folder_of(path / "m", {name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(small(tmp_path), BLOCK)
    read, seen = Checkpoint.read, []
    monkeypatch.setattr(
        checkpoint.source, "read", lambda names: (seen.extend(names := [*names]), read(source, names))[1]
    )
    source = checkpoint.source
    assert isinstance(checkpoint, DequantizedCheckpoint) and "a.weight_scale_inv" not in checkpoint
    assert checkpoint.read([]) == {} and seen == []
    checkpoint.read_one("b.weight")
    assert seen == ["b.weight"]
    assert list(checkpoint.read(["a.weight", "b.weight"])) == ["a.weight", "b.weight"]
    assert sorted(seen[1:]) == ["a.weight", "a.weight_scale_inv", "b.weight"]


def test_unquantized_is_plain(tmp_path):
    folder = folder_of(tmp_path / "m", {"b.weight": torch.randn(4, 4)})
    assert type(open_checkpoint(folder, None)) is Checkpoint and type(open_checkpoint(folder, {})) is Checkpoint
    assert open_checkpoint(folder, BLOCK).dropped == {}  # a config that says more than is stored


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a.weight_scale_inv": None}, r"'a.weight' is stored as float8_e4m3fn without its scale"),
        ({"a.weight_scale_inv": torch.ones(1, 1)}, r"'a.weight_scale_inv' of shape \(1, 1\) .* 'a.weight' of shape"),
        ({"a.weight_scale_inv": torch.ones(1, 2)}, r"'a.weight_scale_inv' of shape \(1, 2\) .* blocks of 128 x 128"),
        ({"c.weight_scale_inv": torch.ones(1)}, r"'c.weight_scale_inv' has no 'c.weight' to scale"),
        ({"a.weight_scale_2": torch.ones(1)}, r"'a.weight_scale_2' is not understood beside 'a.weight'"),
    ],
)
def test_scale_errors(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(small(tmp_path, **changes), BLOCK)


def test_scales_that_are_not_finite(tmp_path):
    checkpoint = open_checkpoint(small(tmp_path, **{"a.weight_scale_inv": torch.tensor([[1.0], [math.nan]])}), BLOCK)
    with pytest.raises(CheckpointError, match=r"'a.weight_scale_inv' holds scales that are not finite"):
        checkpoint.read_one("a.weight")


def test_scale_beside_floats_is_dropped(tmp_path):
    checkpoint = open_checkpoint(small(tmp_path, **{"b.weight_scale": torch.ones(1)}), BLOCK)
    assert accounted(checkpoint).dropped["b.weight_scale"] == "scale of b.weight, which is stored as floats"


def test_scales_without_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"'a.weight' has a scale, but config.json has no quantization_config"):
        open_checkpoint(small(tmp_path), None)


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        ({"quant_method": "gptq", "bits": 4}, 4),
        ({"quant_method": "awq", "bits": 4}, 4),
        ({"quant_method": "auto-round", "bits": 2}, 2),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
    ],
)
def test_low_bit_is_refused(tmp_path, config, bits):
    with pytest.raises(CheckpointError, match=f"already to {bits} bits .*lose quality twice: give the original"):
        open_checkpoint(small(tmp_path), config)


def test_unknown_methods(tmp_path):
    with pytest.raises(CheckpointError, match=r"'quanto', which is not understood \(fp8, .*mxfp4.*compressed-tensors"):
        open_checkpoint(small(tmp_path), {"quant_method": "quanto"})
    form, args = COMPRESSED["fp8 block"]
    with pytest.raises(CheckpointError, match="rotated or made sparse"):
        open_checkpoint(small(tmp_path), compressed_config(form, args) | {"transform_config": {"config_groups": {}}})
    with pytest.raises(CheckpointError, match="nvfp4-e5m3-pack-quantized is not understood"):
        open_checkpoint(small(tmp_path), compressed_config("nvfp4-e5m3-pack-quantized", args))
    with pytest.raises(CheckpointError, match="'a' is quantized, but by no group"):
        open_checkpoint(small(tmp_path), {"quant_method": "compressed-tensors", "config_groups": {}})
    with pytest.raises(CheckpointError, match=r"quantization_config of .* \(KeyError: 'block_structure'\)"):
        open_checkpoint(small(tmp_path), compressed_config(form, {"strategy": "block"}))


def test_packed_errors(tmp_path):
    form, args = COMPRESSED["W4 groups"]
    tensors = {"l.weight_packed": torch.zeros(4, 8, dtype=torch.int32), "l.weight_scale": torch.ones(4, 2)}
    with pytest.raises(CheckpointError, match=r"'l.weight_packed' has no l.weight_shape"):
        open_checkpoint(folder_of(tmp_path / "m", tensors), compressed_config(form, args))
    tensors["l.weight_shape"] = torch.tensor([4, 60])
    with pytest.raises(CheckpointError, match=r"'l.weight_packed' of shape \(4, 9\) does not hold \(4, 60\) of 4 bits"):
        wrong = tensors | {"l.weight_packed": torch.zeros(4, 9, dtype=torch.int32)}
        open_checkpoint(folder_of(tmp_path / "m", wrong), compressed_config(form, args))
    with pytest.raises(CheckpointError, match=r"'l.weight' is stored twice"):
        open_checkpoint(
            folder_of(tmp_path / "m", tensors | {"l.weight": torch.ones(4, 60)}), compressed_config(form, args)
        )
    tensors["l.weight_zero_point"] = torch.zeros(3, 5, dtype=torch.int32)
    checkpoint = open_checkpoint(folder_of(tmp_path / "m", tensors), compressed_config(form, args))
    with pytest.raises(CheckpointError, match=r"'l.weight_zero_point' does not fit the scales of 'l.weight'"):
        checkpoint.read_one("l.weight")
    blocks = {"e.down_proj_blocks": torch.zeros(2, 4, 3, 16, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=r"'e.down_proj_scales' is missing, the scale of 'e.down_proj_blocks'"):
        open_checkpoint(folder_of(tmp_path / "m", blocks), {"quant_method": "mxfp4"})
    blocks["e.down_proj_scales"] = torch.zeros(2, 4, 2, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"'e.down_proj_scales' of shape \(2, 4, 2\) does not scale"):
        open_checkpoint(folder_of(tmp_path / "m", blocks), {"quant_method": "mxfp4"})


# ---- a whole run on a stored-quantized source -----------------------------------------------------------------------


def test_an_fp8_model_is_quantized_from_its_float_values(tmp_path):
    """DeepSeek-style FP8 blocks: read as floats, quantized, written; every stored tensor has its fate."""
    from tiny import save_tiny, token_ids

    from auto_round import AutoRound
    from auto_round.inference.load import load_model

    source = save_tiny(tiny_llama(torch.bfloat16, hidden_size=128, intermediate_size=256), tmp_path / "m")
    fp8 = {}
    with safe_open(source / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, weight in tensors.items():
        if weight.dim() < 2 or "layers" not in name:
            fp8[name] = weight
            continue
        blocks = weight.float().unflatten(0, (-1, min(128, len(weight)))).unflatten(-1, (-1, 128))
        scale = blocks.abs().amax((1, 3)) / 448
        fp8[name] = (blocks / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
        fp8[f"{name}_scale_inv"] = scale
    save_file(fp8, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps(config))

    run = AutoRound(
        str(source), scheme="W4A16G32", dataset=token_ids(), nsamples=8, seqlen=32, iters=2, show_progress=False
    )
    _, out = run.quantize_and_save(tmp_path / "out")
    assert run.report["ledger"]["quantized"] == run.report["ledger"]["dropped"] == 14
    assert run.report["quantized_layers"] == [14, 14]
    assert json.loads((Path(out) / "config.json").read_text())["quantization_config"]["quant_method"] == "auto-round"
    assert torch.isfinite(load_model(out)(token_ids(1)[0]).logits).all()
    assert run.report["kl"] < 0.05
