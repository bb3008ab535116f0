"""Calibration samples of images, audio and text: made by a model's processor, run by tiny random models, quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_tiny, tiny, tiny_tokenizer

from auto_round import AutoRound
from auto_round.calibration import feed_mllm, processors
from auto_round.calibration.feed_mllm import build_multimodal, is_multimodal_dataset, load_processor
from auto_round.calibration.hub import CalibrationDataError, MissingExtraError
from auto_round.calibration.native import run_logits

Image = pytest.importorskip("PIL.Image")

LLAVA_TOKENS = 16  # of an image of 32 x 32 in patches of 8
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE"
    "{% elif c['type'] == 'audio' %}AUDIO{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
)
STRINGS = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + ' ' }}{% endfor %}"


def picture(seed: int = 0, width: int = 48, height: int = 40) -> Any:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def chat(image: Any, text: str = "What is it?", answer: str = "A fox.") -> dict[str, Any]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return {"messages": [{"role": "user", "content": content}, reply]}


def llava_processor(template: str | None = TEMPLATE) -> Any:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template and template.replace("IMAGE", "<image>"),
    )


class TilesProcessor:
    """Like that of Qwen 2 VL without videos: an image gives a token for 2 x 2 patches of 8 x 8."""

    image_token = "<|image_pad|>"
    chat_template = TEMPLATE.replace("IMAGE", f"<|vision_start|>{image_token}<|vision_end|>")

    def __init__(self):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer = tiny_tokenizer()
        tokens = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
        self.tokenizer.add_special_tokens({"additional_special_tokens": tokens})
        size = {"shortest_edge": 16 * 16, "longest_edge": 96 * 96}
        self.images = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, size=size)

    def apply_chat_template(self, messages: list, chat_template: str | None = None, **options: Any) -> dict:
        assert options.pop("return_tensors") == "pt" and not options.pop("add_generation_prompt")
        assert options == {"tokenize": True, "return_dict": True}
        text = self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, tokenize=False)
        images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        made = dict(self.images(images, return_tensors="pt")) if images else {}
        for grid in made.get("image_grid_thw", ()):
            text = text.replace(self.image_token, "<|video_pad|>" * (int(grid.prod()) // 4), 1)
        output = dict(self.tokenizer(text.replace("<|video_pad|>", self.image_token), return_tensors="pt"))
        output.pop("token_type_ids", None)
        kinds = (output["input_ids"] == self.tokenizer.convert_tokens_to_ids(self.image_token)).long()
        return {**output, **made, "mm_token_type_ids": kinds, "sizes_in_words": ["48 x 40"]}


def tiny_llava(processor: Any) -> Any:
    model = tiny("llava", "ImageTextToText")
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    return model


def tiny_qwen(processor: Any) -> Any:
    model = tiny("qwen2_5_vl", "ImageTextToText")
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    for key, token in names.items():
        setattr(model.config, key, processor.tokenizer.convert_tokens_to_ids(token))
    return model


def make(dataset: Any, processor: Any, **options: Any) -> Any:
    return build_multimodal(dataset, processor, **{"seqlen": 128, "nsamples": 4, "seed": 0, **options})


@pytest.fixture
def llava_file(tmp_path) -> Path:
    """Six records in LLaVA's layout with images beside the file."""
    records = []
    for index in range(6):
        picture(index).save(tmp_path / f"{index}.png")
        turns = [{"from": "human", "value": f"<image>\nWhat is it {'now ' * index}?"}, {"from": "gpt", "value": "Fox."}]
        records.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    file = tmp_path / "data.json"
    file.write_text(json.dumps(records))
    return file


def test_llava_file(llava_file):
    processor = llava_processor()
    data = make(str(llava_file), processor, holdout=2)
    model = tiny_llava(processor)
    assert len(data.samples) == 4 and len(data.held_out) == 2 and not data.notes
    texts = [processor.tokenizer.decode(s["input_ids"][0]) for s in (*data.samples, *data.held_out)]
    assert len(set(texts)) == 6
    for sample in data.samples:
        assert sample.keys() == {"input_ids", "attention_mask", "pixel_values"}
        assert (sample["input_ids"] == model.config.image_token_id).sum() == LLAVA_TOKENS
        assert torch.isfinite(run_logits(model, sample, "cpu")).all()
    assert data.tokens == sum(s["input_ids"].numel() for s in data.samples)
    assert all(text.startswith("user:<image>") and text.endswith("assistant:Fox. ") for text in texts)
    assert len({sample["input_ids"].shape for sample in data.samples}) > 1


def test_follows_seed_and_pixels(llava_file):
    processor = llava_processor()
    one, again, other = (make(str(llava_file), processor, seed=seed) for seed in (1, 1, 2))
    assert one.sha256 == again.sha256 != other.sha256
    records = [chat(picture(i)) for i in range(3)]
    before = make(records, processor, nsamples=3).sha256
    records[1] = chat(picture(9))
    assert make(records, processor, nsamples=3).sha256 != before  # the same text, another image


def test_sizes_differ():
    processor = TilesProcessor()
    model = tiny_qwen(processor)
    records = [chat(picture(i, 32 + 16 * i, 32)) for i in range(4)]
    data = make(records, processor)
    assert len({sample["pixel_values"].shape for sample in data.samples}) == 4
    for sample in data.samples:
        assert sample.keys() >= {"pixel_values", "image_grid_thw", "mm_token_type_ids"} and len(sample) == 5
        assert torch.isfinite(run_logits(model, sample, "cpu")).all()


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_audio(template):
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|AUDIO|>"]})
    features = WhisperFeatureExtractor(feature_size=128, sampling_rate=12800, hop_length=100, chunk_length=1)
    processor = Qwen2AudioProcessor(features, tokenizer)
    processor.chat_template = template and template.replace("AUDIO", "<|AUDIO|>")
    model = tiny("qwen2_audio", "Seq2SeqLM")
    model.config.audio_token_id = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    noise = np.random.default_rng(0).normal(size=(3, 12800)).astype(np.float32)
    records = [{"audio": sound[: 4000 * (i + 1)], "text": "What is said?"} for i, sound in enumerate(noise)]
    data = make(records, processor)
    assert len(data.samples) == 3 and len({s["input_ids"].shape for s in data.samples}) == 3
    for sample in data.samples:
        assert sample.keys() == {"input_ids", "attention_mask", "input_features", "feature_attention_mask"}
        assert torch.isfinite(run_logits(model, sample, "cpu")).all()


@pytest.mark.parametrize(
    "record",
    [
        {"image": 0, "text": "What is it?"},
        {"images": [0], "text": "<image>What is it?"},
        {"images": [0], "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hm"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 0}}]}]},
        {"image": 0, "messages": [{"role": "user", "content": "Look: <image>"}, {"role": "assistant", "content": "y"}]},
    ],
)
@pytest.mark.parametrize("form", ["picture", "path", "bytes", "array"])
def test_layouts(record, form, tmp_path):
    path = tmp_path / "a.png"
    picture().save(path)
    forms = {"picture": picture(), "path": "a.png", "array": np.asarray(picture())}
    forms["bytes"] = {"bytes": path.read_bytes(), "path": None}
    text = {"image": forms[form], "images": [forms[form]]}
    record = {key: text.get(key, value) for key, value in record.items()}
    if "image_url" in str(record):
        record["messages"][0]["content"][0]["image_url"]["url"] = forms[form]
    data = make([record], llava_processor(), nsamples=1, extra_data_dir=f"image={tmp_path}")
    expected = make([chat(picture())], llava_processor(), nsamples=1)
    assert torch.equal(data.samples[0]["pixel_values"], expected.samples[0]["pixel_values"])


@pytest.mark.parametrize(
    "template, tokenizers, given, text",
    [
        (None, None, None, "<image>What is it?\nA fox."),
        (None, STRINGS, None, "user:<image>What is it? assistant:A fox. "),
        (TEMPLATE, None, "{{ bos_token }}" + TEMPLATE, "<bos>user:<image>What is it? assistant:A fox. "),
        (TEMPLATE, None, STRINGS, "user:<image>What is it? assistant:A fox. "),
        ("{{ messages[0]['content'][0]['type'] == 'image' and 'IMAGE' }}{{ 'B: ' + messages[1]['content'] }}",
         None, None, "<image>B: A fox."),
    ],
)  # fmt: skip
def test_templates(template, tokenizers, given, text, tmp_path):
    processor = llava_processor(template)
    processor.tokenizer.chat_template = tokenizers
    file = tmp_path / "template.jinja"
    file.write_text((given or "").replace("IMAGE", "<image>"))
    data = make([chat(picture())], processor, nsamples=1, template=file if given else None)
    tokens = processor.tokenizer.decode(data.samples[0]["input_ids"][0])
    assert tokens == text.replace("<image>", "<image>" * LLAVA_TOKENS)


def test_unreadable_images(llava_file):
    processor = llava_processor()
    llava_file.with_name("1.png").write_bytes(b"not an image")
    llava_file.with_name("2.png").unlink()
    data = make(str(llava_file), processor, nsamples=6)
    assert len(data.samples) == 4
    assert any(note.startswith("2 records were left out, since their image") for note in data.notes)
    assert "4 samples could be made of the data; 6 were asked for" in data.notes
    for index in range(6):
        llava_file.with_name(f"{index}.png").unlink(missing_ok=True)
    with pytest.raises(CalibrationDataError, match=r"6 records .* cannot be read .*extra_data_dir"):
        make(str(llava_file), processor)


def test_long_samples():
    processor, long = llava_processor(), "why " * 30
    front = chat(picture(), long)
    behind = {"image": picture(), "messages": [{"role": "user", "content": f"{long}<image>"}]}
    data = make([front, behind], processor, seqlen=40, nsamples=2)
    (sample,) = data.samples
    assert sample["input_ids"].shape == sample["attention_mask"].shape == (1, 40)
    assert (sample["input_ids"] == processor.image_token_id).sum() == LLAVA_TOKENS
    assert any("1 samples were longer than 40" in note for note in data.notes)
    assert any("1 records were left out, since they need more than 40" in note for note in data.notes)
    with pytest.raises(CalibrationDataError, match="raise seqlen"):
        make([behind], processor, seqlen=40)

    sample = make([chat(picture(), long)], TilesProcessor(), seqlen=40, nsamples=1).samples[0]
    assert sample["mm_token_type_ids"].shape == (1, 40) and len(sample["pixel_values"]) == 24
    ready = make([sample], None, seqlen=30, nsamples=1)  # without a processor: by mm_token_type_ids
    assert ready.samples[0]["input_ids"].shape == (1, 30)


def test_ready_samples_keep_their_order():
    processor = llava_processor()
    made = make([chat(picture(i), answer="A fox. " * i) for i in range(4)], processor).samples
    data = make(made, None, nsamples=3, holdout=1)
    assert all(a is b[key] for s, b in zip(data.samples, made, strict=False) for key, a in s.items())
    assert torch.equal(data.held_out[0]["input_ids"], made[3]["input_ids"])
    with pytest.raises(CalibrationDataError, match="and none was given"):
        make([chat(picture())], None)


def test_tensors_of():
    """What is no tensor is left out, and so are labels, unless they are all the text that there is."""
    ids, sound = [[1, 2]], torch.ones(1, 2, 3)
    assert processors.tensors_of({"input_ids": ids, "labels": ids, "names": ["a"]}).keys() == {"input_ids"}
    assert "decoder_input_ids" in processors.tensors_of({"input_features": sound, "labels": ids})


def test_text_alone_is_left_out():
    """A model passes text beside its towers, and samples go through a model side by side."""
    records = [{"text": "Hello."}, chat(picture()), {"messages": [{"role": "user", "content": "Hello?"}]}]
    data = make(records, TilesProcessor())
    assert len(data.samples) == 1 and "pixel_values" in data.samples[0]
    assert any(note.startswith("2 records were left out, since they hold text alone") for note in data.notes)


def test_image_without_place_is_no_sample():
    processor = llava_processor("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    with pytest.raises(CalibrationDataError, match="the processor cannot use them"):
        make([chat(picture())], processor)


@pytest.mark.parametrize(
    "dataset, message",
    [
        ([], "no records"),
        ([{"messages": [], "image": "a.png"}], "empty conversation"),
        ([{"messages": [{"role": "user"}], "image": "a.png"}], '"role" and "content"'),
        ([{"messages": [{"role": "user", "content": [1]}], "image": "a.png"}], "neither text nor a list"),
        (iter([]), "come in a list"),
    ],
)
def test_malformed(dataset, message):
    with pytest.raises(CalibrationDataError, match=message):
        make(dataset, llava_processor())
    with pytest.raises(CalibrationDataError, match="extra_data_dir"):
        make([chat("a.png")], llava_processor(), extra_data_dir="image=/nowhere/at/all")


def test_hub_names(llava_file, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repo, name, repo_type):
        asked.append((repo, name, repo_type))
        return str(llava_file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    data = make("liuhaotian/llava_conv_58k:num=3", llava_processor(), extra_data_dir=llava_file.parent)
    assert len(data.samples) == 3 and asked == [(feed_mllm.LLAVA_REPO, "conversation_58k.json", "dataset")]
    monkeypatch.setattr(feed_mllm, "LLAVA_IMAGES", "http://127.0.0.1:9/")
    with pytest.raises(CalibrationDataError, match="cannot be read"):
        make("liuhaotian/llava", llava_processor())
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: 1 / 0)
    with pytest.raises(CalibrationDataError, match=r"llava_instruct_80k\.json as `dataset`.*extra_data_dir"):
        make("liuhaotian/llava_instruct_80k", llava_processor())


def test_is_multimodal(llava_file, tmp_path):
    ids = torch.ones(1, 4, dtype=torch.long)
    for dataset in (None, ["a text"], [{"text": "a", "image_id": 3}], [ids], ids, [{"input_ids": ids}], "pile-10k"):
        assert not is_multimodal_dataset(dataset), dataset
    ready = {"input_ids": ids, "pixel_values": ids}
    for dataset in ([chat(picture())], [{"image": "a.png", "text": ""}], [{"text": "a", "audio": np.ones(3)}], [ready]):
        assert is_multimodal_dataset(dataset), dataset
    assert is_multimodal_dataset(ready) and is_multimodal_dataset(llava_file) and is_multimodal_dataset(str(llava_file))
    assert is_multimodal_dataset("liuhaotian/llava_instruct_150k:num=8,pile-10k")
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": 'say "image": "a"', "image": None, "tool": {"image": {"type": "string"}}}))
    assert not is_multimodal_dataset(file)
    assert not is_multimodal_dataset(iter([ready]))


def test_load_processor(tmp_path, monkeypatch):
    save_tiny(tiny_llava(llava_processor()), tmp_path / "model")
    assert load_processor(tmp_path / "model") is None
    llava_processor().save_pretrained(tmp_path / "model")
    processor = load_processor(tmp_path / "model")
    data, same = (make([chat(picture())], p, nsamples=1) for p in (processor, llava_processor()))
    assert data.sha256 == same.sha256

    def fail(*_, **__):
        raise AttributeError("type object 'VIDEO_PROCESSOR_MAPPING' has no attribute '_extra_content'")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", fail)
    monkeypatch.setattr(processors.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r'torchvision.*pip install "auto-round\[vision\]"'):
        load_processor(tmp_path / "model")
    monkeypatch.setattr(processors.importlib.util, "find_spec", lambda _: object())
    with pytest.raises(CalibrationDataError, match="cannot be loaded"):
        load_processor(tmp_path / "model")


def test_missing_library(monkeypatch, tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF")

    def load_audio(*_, **__):
        raise ImportError("load_audio requires the soundfile library")

    monkeypatch.setattr("transformers.audio_utils.load_audio", load_audio)
    with pytest.raises(MissingExtraError, match=r'pip install "auto-round\[audio\]"'):
        make([{"audio": "a.wav", "text": "?"}], llava_processor(), extra_data_dir=tmp_path)


@pytest.mark.parametrize("kind", ["llava", "qwen"])
def test_quantize_on_images(tmp_path, kind):
    """Images reach the blocks: what they give there follows the pixels. Samples differ in length and in images."""
    processor = llava_processor() if kind == "llava" else TilesProcessor()
    model = tiny_llava(processor) if kind == "llava" else tiny_qwen(processor)
    source = save_tiny(model, tmp_path / "source", tokenizer=False)
    records = [chat(picture(i, 32 + 16 * (i % 3), 32), answer="A fox. " * (i % 3)) for i in range(6)]
    samples = list(make(records, processor, nsamples=6).samples)
    options = {"group_size": 32, "nsamples": 4, "seqlen": 128, "batch_size": 2, "amp": False, "show_progress": False}
    outputs = []
    for blank in (False, True):
        given = [{**s, "pixel_values": torch.zeros_like(s["pixel_values"])} for s in samples] if blank else samples
        run = AutoRound(str(source), scheme="W4A16", dataset=given, iters=2, device_map="cpu", **options)
        run.calib()
        outputs.append(run.native.outputs["model.language_model.layers.1", 0])
    assert not torch.allclose(*outputs)
    run._quantize_blocks()
    assert len(run.block_log) == 2

    run = AutoRound(str(source), scheme="W4A16", dataset=samples, iters=2, device_map="cpu", **options)
    _, folder = run.quantize_and_save(tmp_path / "out")
    assert run.report["checks"] and all(check["passed"] for check in run.report["checks"]), run.report["checks"]
    assert (Path(folder) / "config.json").is_file()
    assert "pixel_values" in run.native.batch
    assert len(run.plan.quantized()) == 2 * 7
