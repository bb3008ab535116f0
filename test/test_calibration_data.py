"""Calibration samples: what goes into the packed stream, where documents come from, and what is refused."""

import json
import random
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from auto_round.calibration import hub
from auto_round.calibration.data import (
    CalibrationDataError,
    CalibrationFileNotFoundError,
    MissingExtraError,
    _shares,
    build_calibration,
)
from auto_round.calibration.grammar import parse_sources

BOS, EOS = 256, 257
CHAT = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
)


def make_tokenizer(bos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte: what a sample holds can be read back as text."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"<s>": BOS, "</s>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=8)
    if chat:
        fast.chat_template = CHAT
    return fast


TOKENIZER = make_tokenizer()


def build(dataset, tokenizer=TOKENIZER, **options):
    return build_calibration(dataset, tokenizer, **{"seqlen": 8, "nsamples": 4, **options})


def stream(samples) -> list[int]:
    return [i for sample in samples for i in sample["input_ids"][0].tolist()]


def text_of(data, tokenizer=TOKENIZER) -> str:
    return tokenizer.decode(stream(data.samples))


# ---- packing ----


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="ab c\né", max_size=20), min_size=1, max_size=12),
    seqlen=st.integers(1, 16),
    seed=st.integers(0, 5),
)
def test_packing_loses_no_token(texts, seqlen, seed):
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    expected = []
    for index in order:
        if texts[index].strip():
            expected += [*TOKENIZER(texts[index])["input_ids"], EOS]
    if not expected:
        with pytest.raises(CalibrationDataError, match="no text"):
            build(texts, seqlen=seqlen, nsamples=10_000, seed=seed)
        return
    data = build(texts, seqlen=seqlen, nsamples=10_000, seed=seed)
    found = stream(data.samples)
    assert found == expected[: len(found)]
    length = min(seqlen, len(expected))
    assert len(expected) - len(found) < length
    assert {tuple(s["input_ids"].shape) for s in data.samples} == {(1, length)}
    assert data.tokens == len(found)


def test_same_seed_same_samples():
    texts = [f"document number {i}" for i in range(30)]
    first, again, other = build(texts, seed=1), build(texts, seed=1), build(texts, seed=2)
    assert first.sha256 == again.sha256 != other.sha256
    assert first.notes == () and len(first.samples) == 4
    assert first.source == "list of 30 strings"


def test_special_tokens_per_document():
    data = build(["abc", "abc"], make_tokenizer(bos=True), seqlen=10, nsamples=1)
    one = [BOS, *TOKENIZER("abc")["input_ids"], EOS]
    assert stream(data.samples) == one * 2


def test_too_little_text_shrinks_the_sample():
    data = build(["abc"], seqlen=100, holdout=1)
    assert data.tokens == 4 and data.samples[0]["input_ids"].shape == (1, 4)
    assert "instead of 100" in data.notes[0] and "nothing left to keep back" in data.notes[1]


def test_fewer_samples_are_noted():
    assert build(["x" * 40]).notes == ()
    assert build(["x" * 20]).notes == ("2 samples of 8 tokens could be made of the data; 4 were asked for",)


def test_every_kind_is_drawn():
    records = [{"text": "a" * 7, "kind": "common"}] * 50 + [{"text": "b" * 7, "kind": "rare"}] * 2
    assert sorted(set(text_of(build(records)).replace("</s>", ""))) == ["a", "b"]
    assert text_of(build(records)).count("b" * 7) == 2


def test_held_out_documents_are_others():
    texts = [chr(ord("a") + i) * 11 for i in range(20)]
    data = build(texts, nsamples=4, holdout=3)
    used, held = set(stream(data.samples)) - {EOS}, set(stream(data.held_out)) - {EOS}
    assert len(data.held_out) == 3 and data.notes == () and not used & held
    assert data.sha256 == build(texts, nsamples=4).sha256
    short = build(texts[:4], nsamples=4, holdout=3)  # a single document is left
    assert len(short.held_out) == 1 and "1 samples could be kept back" in short.notes[0]
    none = build(texts[:2], nsamples=2, holdout=1)
    assert none.held_out == none.samples[-1:] and "nothing left" in none.notes[-1]


# ---- files ----


def test_jsonl(tmp_path):
    path = tmp_path / "d.jsonl"
    lines = [json.dumps({"text": "été", "kind": "fr"}), "", json.dumps("plain"), json.dumps({"text": "b"})]
    path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    for dataset in (str(path), path):
        data = build(dataset, seqlen=1, nsamples=100)
        assert sorted(text_of(data).split("</s>")) == ["", "b", "plain", "été"]
        assert data.source == str(path)


def test_jsonl_bad_line_is_named(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n' + '{"text": "b"}\n' * 50)
    with pytest.raises(CalibrationDataError, match=r"d\.jsonl line 3 is not valid JSON"):
        build(path, nsamples=1, seqlen=2)


def test_large_jsonl_is_not_parsed_whole(tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i:07}", "kind": str(i % 3)}) + "\n" for i in range(300)))
    small = build(path)
    parsed = []
    monkeypatch.setattr(hub, "_CHECKED_BYTES", 0)
    original = hub._parse_line
    monkeypatch.setattr(hub, "_parse_line", lambda raw, where: parsed.append(where) or original(raw, where))
    large = build(path)
    assert len(parsed) == 4 and large.sha256 == small.sha256


@pytest.mark.parametrize("content", [["aa", "bb"], [{"text": "aa"}, {"text": "bb"}], {"text": ["aa", "bb"]}])
def test_json(tmp_path, content):
    path = tmp_path / "d.json"
    path.write_text(json.dumps(content))
    assert sorted(text_of(build(path, seqlen=1, nsamples=9)).split("</s>")) == ["", "aa", "bb"]


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("a\nb\n\n\n  \nc\n", ["a\nb", "c"]),
        ("a\n\nb\n\n<|doc|>\n\nc\n<|doc|>\n", ["a\n\nb", "c"]),
        ("a\r\n\r\nb", ["a", "b"]),
    ],
)
def test_txt(tmp_path, content, documents):
    path = tmp_path / "d.txt"
    path.write_bytes(content.encode())
    assert sorted(text_of(build(path, seqlen=1, nsamples=99)).split("</s>")) == sorted(["", *documents])


def test_unreadable_files(tmp_path):
    with pytest.raises(CalibrationFileNotFoundError, match=r"missing\.jsonl does not exist"):
        build(str(tmp_path / "missing.jsonl"))
    (tmp_path / "d.json").write_text('[\n{"text": "a"},\n]')
    with pytest.raises(CalibrationDataError, match=r"d\.json line 3 is not valid JSON"):
        build(tmp_path / "d.json")
    (tmp_path / "d.csv").write_text("text")
    with pytest.raises(CalibrationDataError, match=r"'\.csv'"):
        build(tmp_path / "d.csv")
    (tmp_path / "d.txt").write_bytes(b"a\xff")
    with pytest.raises(CalibrationDataError, match="not UTF-8"):
        build(tmp_path / "d.txt")
    for name, content in {"e.jsonl": "", "e.txt": "\n \n", "e.json": "[]"}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(CalibrationDataError, match="holds no text"):
            build(tmp_path / name)
    (tmp_path / "n.jsonl").write_text('{"body": "a"}')
    with pytest.raises(CalibrationDataError, match=r'n\.jsonl line 1 has no "text" field; it has body'):
        build(tmp_path / "n.jsonl")


def test_builtin_text():
    if not hub.BUILTIN_FILE.is_file():
        pytest.skip("the built-in text is not there yet")
    data = build(None, seqlen=64, nsamples=8, holdout=2)
    assert data.source == "built-in text" and len(data.samples) == 8 and data.notes == ()


def test_missing_builtin_text(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "BUILTIN_FILE", tmp_path / "calibration.jsonl")
    with pytest.raises(CalibrationFileNotFoundError, match="built-in"):
        build(None)


# ---- the option grammar ----


def test_parse_sources(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}')
    text = f'pile-10k:split=a+b:num=3:concat,{path}:apply_chat_template:system_prompt="be, brief: yes"'
    first, second = parse_sources(text)
    assert (first.splits, first.num, first.concat, first.apply_chat_template) == (("a", "b"), 3, True, None)
    assert first.label == "hub NeelNanda/pile-10k"
    assert second.is_file and second.apply_chat_template and second.system_prompt == "be, brief: yes"
    (odd := tmp_path / "a,b:c.txt").write_text("a")
    assert parse_sources(str(odd))[0].name == str(odd)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pile-10k:nums=3", "did you mean 'num'"),
        ("pile-10k:zzz", "known are"),
        ("pile-10k:num=0", "above 0"),
        ("pile-10k:concat=maybe", "true or false"),
        ('pile-10k:system_prompt="x', "never closes"),
        ("pile-10k,,mbpp", "empty name"),
        ("web", "write it in full"),
        ("Once upon a time.", "list of strings"),
    ],
)
def test_malformed_names(text, words):
    with pytest.raises(CalibrationDataError, match=words):
        build(text)


def test_known_names_are_found_by_a_part():
    assert hub.find_hub_dataset("MBPP").repo == "google-research-datasets/mbpp"
    assert hub.find_hub_dataset("swift/pile-val-backup").splits == ("validation",)
    assert hub.find_hub_dataset("someone/web").repo == "someone/web"


def test_mixed_files_share_the_samples(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n\n".join([name * 7] * 20))
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    data = build(f"{a},{b}", nsamples=5)
    assert text_of(data).count("a") == 21 and text_of(data).count("b") == 14
    data = build(f"{a}:num=1,{b}", nsamples=5)
    assert text_of(data).count("a") == 7 and text_of(data).count("b") == 28
    assert data.source == f"{a} + {b}" and data.notes == ()
    assert build(f"{a}:num=2", nsamples=5).notes == ("num= limits the samples to 2; 5 were asked for",)
    with pytest.raises(CalibrationDataError, match="split= does not apply"):
        build(f"{a}:split=train")


def test_short_sources_are_pooled(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 5)
    data = build(f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}", seqlen=10, nsamples=2)
    assert [s["input_ids"].shape[1] for s in data.samples] == [10] and text_of(data).startswith("aaaaa</s>bbbb")


@given(total=st.integers(0, 200), wishes=st.lists(st.none() | st.integers(1, 100), min_size=1, max_size=6))
def test_shares(total, wishes):
    shares = _shares(total, wishes)
    assert min(shares) >= 0 and sum(shares) <= total
    if None in wishes or sum(wishes) >= total:
        assert sum(shares) == total
    if sum(wish or 0 for wish in wishes) <= total:
        assert all(wish is None or share == wish for share, wish in zip(shares, wishes, strict=True))


# ---- chat templates ----


def test_chat_template():
    tokenizer = make_tokenizer(bos=True, chat=True)
    records = [
        {"messages": [{"role": "user", "content": "q"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "response": "a", "text": "unused"},
        {"text": "t"},
        {"messages": [{"role": "system", "content": "own"}]},
    ]
    options = {"tokenizer": tokenizer, "seqlen": 1, "nsamples": 999, "apply_chat_template": True}
    rendered = sorted(text_of(build([record], system_prompt="S", **options), tokenizer) for record in records)
    assert rendered == sorted(
        [
            "[system]S[user]q",
            "[system]S[user]q[assistant]a",
            "[system]S[user]q[assistant]a",
            "[system]S[user]t",
            "[system]own",
        ]
    )
    assert text_of(build(["t"], **options), tokenizer) == "[user]t"
    with pytest.raises(CalibrationDataError, match=r"record 1: .*no tools"):
        build([{"messages": [{"role": "tool", "content": "x"}]}], **options)
    with pytest.raises(CalibrationDataError, match='without "role"'):
        build([{"messages": ["x"]}], **options)


def test_chat_template_of_one_source(tmp_path):
    path, tokenizer = tmp_path / "d.jsonl", make_tokenizer(chat=True)
    path.write_text('{"text": "t"}')
    data = build(f'{path}:apply_chat_template:system_prompt="a, b: c"', tokenizer, seqlen=1, nsamples=99)
    assert text_of(data) == "[system]a, b: c[user]t"


def test_chat_template_misuse():
    conversation = [{"messages": [{"role": "user", "content": "q"}]}]
    with pytest.raises(CalibrationDataError, match="ask for apply_chat_template"):
        build(conversation)
    with pytest.raises(CalibrationDataError, match="no chat template"):
        build(conversation, apply_chat_template=True)
    with pytest.raises(CalibrationDataError, match="system_prompt has no effect"):
        build(["a"], system_prompt="S")


# ---- the hub ----


def test_missing_datasets_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"auto-round\[datasets\]"):
        build("NeelNanda/pile-10k")


class FakeStream(list):
    def shuffle(self, seed, buffer_size):
        return FakeStream(random.Random(seed).sample(self, len(self)))


def fake_datasets(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_hub_data_set(monkeypatch):
    calls = []

    def load(repo, config, *, split, streaming):
        calls.append((repo, config, split, streaming))
        return FakeStream([{"content": f"{split}{i}"} for i in range(3)])

    fake_datasets(monkeypatch, load)
    data = build("Ultra-FineWeb:split=en+zh", seqlen=1, nsamples=99)
    assert calls == [("openbmb/Ultra-FineWeb", None, split, True) for split in ("en", "zh")]
    assert data.source == "hub openbmb/Ultra-FineWeb"
    documents = text_of(data).split("</s>")[:-1]
    assert len(documents) == 6 and [d[:2] for d in documents] == ["en", "zh"] * 3
    with pytest.raises(CalibrationDataError, match="has no field 'text'; it has content"):
        build("mbpp")


def test_unreachable_hub(monkeypatch):
    def load(*_, **__):
        raise ConnectionError("no route to host")

    fake_datasets(monkeypatch, load)
    with pytest.raises(CalibrationDataError, match=r"no route to host.*built-in text, or give a local \.json"):
        build("NeelNanda/pile-10k")


def test_local_folder_through_datasets(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"doc{i}"}) + "\n" for i in range(4)))
    data = build(str(tmp_path), seqlen=1, nsamples=99)
    assert sorted(text_of(data).split("</s>")) == ["", "doc0", "doc1", "doc2", "doc3"]


# ---- samples given as token ids ----


def loader(items, **options):
    return torch.utils.data.DataLoader(items, **options)


IDS = torch.arange(24).view(4, 6)


@pytest.mark.parametrize(
    "dataset",
    [
        IDS.tolist(),
        IDS,
        list(IDS),
        tuple(IDS.split(1)),
        IDS.numpy(),
        {"input_ids": IDS},
        [{"input_ids": row} for row in IDS.int()],
        loader(IDS, batch_size=3),
        loader(torch.utils.data.TensorDataset(IDS, IDS), batch_size=2),
        loader([{"input_ids": row} for row in IDS], batch_size=2),
    ],
    ids=[
        "lists",
        "tensor",
        "rows",
        "batches of one",
        "array",
        "dict",
        "dicts",
        "loader",
        "tuple loader",
        "dict loader",
    ],
)
def test_given_samples_are_taken_as_they_are(dataset):
    data = build(dataset)
    assert [s["input_ids"].tolist() for s in data.samples] == [[row] for row in IDS.tolist()]
    assert all(s["input_ids"].dtype == torch.int64 for s in data.samples)
    assert data.sha256 == build(IDS).sha256 and data.notes == () and data.tokens == 24


def test_given_samples_are_cut_counted_and_held_out():
    data = build(IDS, seqlen=4, nsamples=3, holdout=1)
    assert [s["input_ids"].shape[1] for s in data.samples] == [4] * 3
    assert stream(data.held_out) == IDS[3, :4].tolist()
    assert data.notes == ("4 samples were longer than 4 tokens and were cut to them",)
    assert build(IDS, nsamples=9).notes == ("4 samples were given; 9 were asked for",)


def test_dict_samples_keep_their_tensors():
    sample = {
        "input_ids": IDS[:1],
        "attention_mask": torch.ones(1, 6),
        "mask4d": torch.ones(1, 1, 6, 6),
        "position_ids": torch.ones(3, 1, 6),
        "pixel_values": torch.ones(10, 5),
        "labels": None,
    }
    (same,) = build([sample]).samples
    assert same.keys() == sample.keys() - {"labels"} and same["pixel_values"] is sample["pixel_values"]
    (cut,) = build([sample], seqlen=4).samples
    shapes = {key: tuple(value.shape) for key, value in cut.items()}
    assert shapes == {
        "input_ids": (1, 4),
        "attention_mask": (1, 4),
        "mask4d": (1, 1, 4, 4),
        "position_ids": (3, 1, 4),
        "pixel_values": (10, 5),
    }
    two = build({"input_ids": IDS[:2], "pixel_values": torch.rand(2, 3), "scale": torch.tensor(1.0)}).samples
    assert [tuple(s["pixel_values"].shape) for s in two] == [(1, 3)] * 2


def test_a_loader_is_read_no_further_than_needed():
    seen = []

    def batches():
        for row in IDS:
            seen.append(row)
            yield row

    build(batches(), nsamples=2)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ([], "empty"),
        (iter(()), "empty"),
        ([1, 2, 3], "shape"),
        ([[1, 2], ["a"]], "cannot be made a tensor"),
        ([[0.5]], "give integers"),
        ([[]], "give integers"),
        ([[1, 300]], "token id 300, outside the tokenizer's vocabulary of 258"),
        ([[-1]], "token id -1"),
        ([{"input_ids": [[1]]}, {}], "is empty"),
        ({"input_ids": IDS, "pixel_values": torch.ones(3, 2)}, "batch_size=1"),
        (["a", 3], "record 2 holds a int"),
        (3, "cannot be a int"),
    ],
)
def test_unusable_samples(dataset, words):
    with pytest.raises(CalibrationDataError, match=words):
        build(dataset)


def test_arguments():
    assert build([[1, 300]], None).tokens == 2  # without a tokenizer, its vocabulary is not known
    with pytest.raises(CalibrationDataError, match="needs a tokenizer"):
        build(["text"], None)
    for name, value in {"seqlen": 0, "nsamples": 0, "holdout": -1}.items():
        with pytest.raises(CalibrationDataError, match=f"{name} must be at least"):
            build(["text"], **{name: value})
