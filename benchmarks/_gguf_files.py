"""The weights of a GGUF file under the names that the original checkpoint gives them.

The gguf package reads and dequantizes; what is done here is llama.cpp's naming, its stacked experts, and its order of
the rows of Llama's queries and keys, taken back.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from _checkpoints import EXPERT, original_shapes

WEIGHT = ".weight"
HEADS = {".q_proj.": "attention.head_count", ".k_proj.": "attention.head_count_kv"}


def gguf_tensors(file: Path, original: Path) -> dict[str, torch.Tensor]:
    """fp32 tensors of a GGUF file, one for each tensor of the checkpoint in ``original``.

    Raises:
        ValueError: the file lacks one of them.
    """
    reader = gguf.GGUFReader(file)
    family = reader.fields["general.architecture"].contents()
    numbers = {key: reader.fields[f"{family}.{key}"].contents() for key in ("block_count", *HEADS.values())}
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, numbers["block_count"])
    stored = {tensor.name: tensor for tensor in reader.tensors}
    dense = {}
    for name, shape in original_shapes(original):
        match = EXPERT.fullmatch(name.removesuffix(WEIGHT))
        asked = f"{match[1]}.{match[3]}_proj{WEIGHT}" if match else name
        found = stored.get(names.get_name(asked, try_suffixes=(WEIGHT, ".bias")) or "")
        if found is None:
            raise ValueError(f"{file.name} holds nothing for {name}")
        value = torch.from_numpy(gguf.dequantize(found.data, found.tensor_type).copy()).float()
        value = (value[int(match[2])] if match else value).reshape(shape)
        heads = next((numbers[key] for part, key in HEADS.items() if family == "llama" and part in name), None)
        dense[name] = value if heads is None else halves_first(value, heads)
    return dense


def halves_first(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows whose rotated pairs are neighbours, in the order of Transformers: first halves, then second halves."""
    return value.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(value.shape)
