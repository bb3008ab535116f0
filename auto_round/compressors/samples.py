"""What a run reads: calibration samples, and the few held-out ones on which original and result are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round.calibration.data import OwnText, build_calibration
from auto_round.calibration.feed import complete_sample, vocabulary_size
from auto_round.calibration.feed_mllm import build_multimodal, is_multimodal_dataset, load_processor
from auto_round.settings import CalibSettings

CHECK_SAMPLES = 4
CHECK_TOKENS = 512
CHECK_LOGIT_BYTES = 128 << 20
"""Bounds of the check batch: tokens, and bytes of its logits (a vocabulary can be large)."""


def read_samples(
    wanted: CalibSettings,
    model: nn.Module,
    tokenizer: Any,
    processor: Any,
    source_dir: Path | None,
    *,
    nsamples: int,
    seed: int,
    trust_remote_code: bool,
    own_text: OwnText | None = None,
) -> Any:
    """Text, or text with images and audio: `nsamples` samples, and `CHECK_SAMPLES` held out.

    own_text: writes the text of the data set "self".
    """
    seqlen = longest_sample(wanted.seqlen, model, tokenizer)
    common = {"seqlen": seqlen, "nsamples": nsamples, "seed": seed, "holdout": CHECK_SAMPLES}
    if not is_multimodal_dataset(wanted.dataset):
        template = wanted.apply_chat_template
        return build_calibration(wanted.dataset, tokenizer, apply_chat_template=template, own_text=own_text, **common)
    if processor is None and source_dir is not None:
        processor = load_processor(source_dir, trust_remote_code)
    extra = {"extra_data_dir": wanted.extra_data_dir, "template": wanted.template}
    return build_multimodal(wanted.dataset, processor, **common, **extra)


def longest_sample(seqlen: int, model: nn.Module, tokenizer: Any) -> int:
    """Tokens of a sample: what was asked for, as far as model and tokenizer go."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    return min([seqlen, *(limit for limit in limits if limit and limit > 0)])


def check_batch(model: nn.Module, data: Any) -> dict[str, torch.Tensor]:
    """A few held-out samples, cut to one length, so small that their logits fit in memory."""
    tokens = max(CHECK_SAMPLES * 16, min(CHECK_TOKENS, CHECK_LOGIT_BYTES // (4 * vocabulary_size(model))))
    samples = data.held_out or data.samples[:CHECK_SAMPLES]
    if any(set(sample) - {"input_ids", "attention_mask"} for sample in samples):
        return complete_sample(model, samples[0])  # images and the like: samples cannot be cut
    length = min(tokens // CHECK_SAMPLES, *(sample["input_ids"].shape[1] for sample in samples))
    ids = torch.cat([sample["input_ids"][:, :length] for sample in samples])
    return complete_sample(model, {"input_ids": ids})
