"""A written folder as a model again, through Transformers: the way on which results are verified and evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from auto_round.inference.checks import METHODS, check_config, loadable_config, stored_entries
from auto_round.modeling.checkpoint import Checkpoint
from auto_round.modeling.reading import reading
from auto_round.special_model_handler import _handle_special_model
from auto_round.utils.model import model_class, only_gguf, read_config


def load_model(directory: str | Path, trust_remote_code: bool = False, **options: Any) -> nn.Module:
    """A model from a folder through Transformers, of the class that generates text, in the dtype it is stored in.

    A folder that holds nothing but a GGUF file is read from that, dequantized to float32. Packed GPTQ and AWQ
    checkpoints, also those that keep their settings in a file of their own, load with this package's layers.

    Raises:
        ValueError: a `quantization_config` that is not understood.
    """
    from transformers import AutoConfig, AutoRoundConfig

    directory = Path(directory)
    if source := only_gguf(directory):
        with reading(directory / source["gguf_file"], keep=(ImportError,)):
            config = AutoConfig.from_pretrained(directory, **source)
            model = model_class(config).from_pretrained(directory, **{"dtype": None, **source, **options})
        return _handle_special_model(model.eval())
    config = read_config(directory, trust_remote_code)
    # Headers that lie, pickles, and shards elsewhere are refused before anything is read.
    stored_entries(directory) or Checkpoint(directory)
    options = {"dtype": "auto", "trust_remote_code": trust_remote_code, "use_safetensors": True, **options}
    stored = loadable_config(directory)
    if stored is not None and stored.get("quant_method") in METHODS:
        with reading(f"{directory}: quantization_config of config.json"):
            check_config(stored)
        if stored["quant_method"] in ("gptq", "awq"):  # for which Transformers would ask for other packages
            config.quantization_config = stored
            options = {"config": config, "quantization_config": AutoRoundConfig(), **options}
    with reading(f"the model in {directory}", keep=(ImportError,)):
        model = model_class(config).from_pretrained(directory, **options)
    return _handle_special_model(model.eval())
