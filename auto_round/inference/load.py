"""A written folder as a model again, through Transformers: the way on which results are verified and evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from auto_round.inference.checks import METHODS, check_config, loadable_config
from auto_round.special_model_handler import _handle_special_model
from auto_round.utils.model import model_class, only_gguf


def load_model(directory: str | Path, trust_remote_code: bool = False, **options: Any) -> nn.Module:
    """A model from a folder through Transformers, of the class that generates text, in the dtype it is stored in.

    A folder that holds nothing but a GGUF file is read from that, dequantized to float32. Packed GPTQ and AWQ
    checkpoints, also those that keep their settings in a file of their own, load with this package's layers.

    Raises:
        ValueError: a `quantization_config` that is not understood.
    """
    from transformers import AutoConfig, AutoRoundConfig

    source = only_gguf(directory)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code, **source)
    options = {"dtype": None if source else "auto", "trust_remote_code": trust_remote_code, **source, **options}
    stored = None if source else loadable_config(Path(directory))
    if stored is not None and stored.get("quant_method") in METHODS:
        check_config(stored)
        if stored["quant_method"] in ("gptq", "awq"):  # for which Transformers would ask for other packages
            config.quantization_config = stored
            options = {"config": config, "quantization_config": AutoRoundConfig(), **options}
    return _handle_special_model(model_class(config).from_pretrained(directory, **options).eval())
