"""Text that the model writes itself, mixes of data sets by weight, and what the report says of the text."""

import json
from pathlib import Path

import pytest
import torch
from tiny import random_model, save_tiny, tiny_llama, tiny_tokenizer

from auto_round import AutoRound
from auto_round.budget import DoesNotFitError
from auto_round.calibration import self_text
from auto_round.calibration.coverage import coverage, scripts
from auto_round.calibration.data import CalibrationData, CalibrationDataError, _shares, build_calibration
from auto_round.calibration.grammar import parse_sources
from auto_round.calibration.self_text import SelfText, enough
from auto_round.compressors import topup
from auto_round.compressors.topup import choose
from auto_round.report import text_words

EOS = 1
CHAT = (
    "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant:<think>{% endif %}"
)
FAST = {"scheme": "W4A16", "group_size": 32, "iters": 1, "nsamples": 4, "seqlen": 16, "show_progress": False}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(self_text, "MOST_ROWS", 4)


def writer(seed: int = 0, chat: bool = False, seqlen: int = 24, **changes) -> SelfText:
    tokenizer = tiny_tokenizer()
    if chat:
        tokenizer.chat_template = CHAT
    return SelfText(tiny_llama(**changes), tokenizer, seqlen, seed, chat)


# ---- what is written ----


def test_the_same_seed_writes_the_same_text_and_another_does_not():
    one = writer().batch(0)
    state = torch.random.get_rng_state()
    assert writer().batch(0) == one
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's randomness is touched
    assert writer().batch(1) != one and writer(seed=1).batch(0) != one
    assert len(one) == 4 and all(0 < len(document) <= 24 for document in one)


def test_text_follows_the_models_distribution():
    """A model that gives three tokens equal chances, whatever comes before: all three are written about as often."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    bias = torch.full((320,), -1e4)
    bias[[40, 41, 42]] = 0.0
    model.lm_head.bias = torch.nn.Parameter(bias)
    made = SelfText(model, tiny_tokenizer(), 64, 0, False).batch(0)
    tokens = [token for document in made for token in document[self_text.SEED_TOKENS :]]
    counts = [tokens.count(one) for one in (40, 41, 42)]
    assert sum(counts) == len(tokens) > 200
    assert min(counts) > 0.2 * sum(counts)


def test_tokens_with_a_meaning_beside_text_are_never_written():
    made = writer(pad_token_id=50, image_token_id=51)
    with torch.no_grad():
        made.model.lm_head.weight[[50, 51]] *= 50
    tokens = {token for number in range(3) for document in made.batch(number) for token in document[4:]}
    assert tokens and not tokens & {0, 50, 51}


def test_a_text_that_the_model_ends_is_ended():
    made = writer()
    with torch.no_grad():
        made.model.lm_head.weight[EOS] *= 30
    batches = [made.batch(number) for number in range(3)]
    ended = [document for batch in batches for document in batch if document[-1] == EOS]
    assert ended and any(len(document) < 24 for document in ended)
    assert all(EOS not in document[:-1] for batch in batches for document in batch)


def test_the_beginning_is_the_tokenizers_own_where_it_has_one():
    from tokenizers import processors

    made = writer()
    made.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 0)])
    assert all(document[0] == 0 for document in made.batch(0))
    seeds = [document[: self_text.SEED_TOKENS] for document in writer().batch(0)]
    assert all(seed[0] != 0 for seed in seeds) and len({tuple(seed) for seed in seeds}) > 1


def test_with_a_chat_template_both_roles_are_played():
    made = writer(chat=True, seqlen=200, max_position_embeddings=256)
    documents = [made.tokenizer.decode(document) for document in made.batch(0)]
    assert documents
    for text in documents:
        user, _, answer = text.partition("<eos>")
        assert user.startswith("<bos>user: ") and len(user) > len("<bos>user: ")
        assert answer.startswith("<bos>assistant:<think>") and len(answer) > len("<bos>assistant:<think>")


def test_a_template_without_the_users_words_is_refused():
    made = writer(chat=True)
    made.tokenizer.chat_template = "{{ 'nothing' }}"
    with pytest.raises(CalibrationDataError, match="apply_chat_template=false"):
        made.batch(0)


def test_a_model_that_writes_nothing_ends():
    with pytest.raises(CalibrationDataError, match="after 1 tokens on average"):
        enough(iter([[[5]]] * 10_000), 64, 16)


# ---- in a run ----


def test_a_run_keeps_its_text_and_a_restart_reads_it(tmp_path, monkeypatch):
    folder = save_tiny(tiny_llama(torch.bfloat16), tmp_path / "tiny")
    run = AutoRound(str(folder), dataset="self", **FAST)
    _, out = run.quantize_and_save(str(tmp_path / "out"), format="auto_round")
    report = json.loads((Path(out) / "report.json").read_text())
    assert report["data"]["source"] == "the model's own text"
    work = Path(out + ".work")
    assert list(work.glob("self-*.safetensors"))
    assert all(p.device.type == "meta" for p in run.model.model.layers.parameters())  # given back
    monkeypatch.setattr(SelfText, "batch", lambda self, number: pytest.fail("written again"))
    again = AutoRound(str(folder), dataset="self", **FAST)
    again.quantize_and_save(str(tmp_path / "out"), format="auto_round")
    assert again.data.sha256 == run.data.sha256 == report["data"]["sha256"]
    assert all(entry["resumed"] for entry in again.block_log)


def test_a_damaged_text_is_written_again(tmp_path):
    folder = save_tiny(tiny_llama(), tmp_path / "tiny")
    run = AutoRound(str(folder), dataset="self", **FAST)
    run.load_data(tmp_path / "work")
    files = sorted((tmp_path / "work").glob("self-*.safetensors"))
    kept = files[0].read_bytes()
    files[0].write_bytes(kept[: len(kept) // 2])
    again = AutoRound(str(folder), dataset="self", **FAST)
    again.load_data(tmp_path / "work")
    assert again.data.sha256 == run.data.sha256 and files[0].read_bytes() == kept


def test_another_model_or_seed_writes_its_own_text(tmp_path):
    found = set()
    for number, seed in ((0, 1), (0, 2), (1, 1)):
        folder = save_tiny(tiny_llama(seed=number), tmp_path / f"tiny{number}")
        run = AutoRound(str(folder), dataset="self", seed=seed, **FAST)
        run.load_data(tmp_path / "work")
        found.add(run.data.sha256)
    assert len(found) == 3


def test_a_model_that_does_not_fit_is_refused_with_the_way_out(tmp_path, monkeypatch):
    folder = save_tiny(tiny_llama(), tmp_path / "tiny")
    run = AutoRound(str(folder), dataset="self", max_memory="1MB", **FAST)
    monkeypatch.setattr(SelfText, "batch", lambda self, number: pytest.fail("tried"))
    with pytest.raises(DoesNotFitError, match=r'as a whole.*dataset="text.jsonl"'):
        run.load_data()


def test_a_model_object_writes_too():
    run = AutoRound(tiny_llama(), tokenizer=tiny_tokenizer(), dataset="self:0.5,builtin:0.5", **FAST)
    run.load_data()
    assert run.data.source == "the model's own text + built-in text" and len(run.data.samples) == 4
    assert not any(p.device.type == "meta" for p in run.model.parameters())


def test_a_run_uses_the_chat_template_unless_told_otherwise(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    model, options = tiny_llama(), {**FAST, "seqlen": 200, "nsamples": 1}
    begins = []
    for dataset in ("self", "self:apply_chat_template=false"):
        run = AutoRound(model, tokenizer=tokenizer, dataset=dataset, **options)
        run.load_data()
        begins.append(tokenizer.decode(run.data.samples[0]["input_ids"][0]).startswith("<bos>user: "))
    assert begins == [True, False]


def test_without_a_model_there_is_no_own_text():
    with pytest.raises(CalibrationDataError, match="no model here"):
        build_calibration("self", tiny_tokenizer(), seqlen=8, nsamples=1)


def test_a_template_that_is_not_there_cannot_be_asked_for():
    run = AutoRound(tiny_llama(), tokenizer=tiny_tokenizer(), dataset="self:apply_chat_template", **FAST)
    with pytest.raises(CalibrationDataError, match="chat template"):
        run.load_data()


# ---- mixes ----


@pytest.mark.parametrize(
    ("total", "wishes", "weights", "expected"),
    [
        (128, [None, None], [0.5, 0.5], [64, 64]),
        (10, [None, None], [3, 1], [8, 2]),
        (10, [None, None, None], [None, None, None], [4, 3, 3]),
        (10, [4, None, None], [None, 2, 1], [4, 4, 2]),
        (1, [None, None], [0.1, 0.9], [0, 1]),
        (7, [2, 3], [None, None], [2, 3]),
    ],
)
def test_shares_by_weight(total, wishes, weights, expected):
    assert _shares(total, wishes, weights) == expected


def test_weights_are_parsed():
    one, two, three = parse_sources("self:0.25,builtin:weight=2:apply_chat_template,builtin")
    assert (one.weight, two.weight, three.weight) == (0.25, 2.0, None)
    assert one.is_self and not two.is_self and two.apply_chat_template


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("builtin:0", "above 0"),
        ("builtin:weight=x", "above 0"),
        ("builtin:0.5:num=3", "give one"),
        ("self:split=a", "split="),
    ],
)
def test_wrong_weights_are_refused(text, said):
    with pytest.raises(CalibrationDataError, match=said):
        parse_sources(text)


def test_a_mix_takes_its_shares_of_each(tmp_path):
    for name, letter in (("a", "a"), ("b", "b")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": letter * 4000}))
    tokenizer = tiny_tokenizer()
    data = build_calibration(f"{tmp_path}/a.jsonl:3,{tmp_path}/b.jsonl:1", tokenizer, seqlen=8, nsamples=8)
    texts = [tokenizer.decode(sample["input_ids"][0]) for sample in data.samples]
    assert [set(text) for text in texts] == [{"a"}] * 6 + [{"b"}] * 2
    assert data.documents == 2


# ---- what the text covers ----


def test_scripts_are_told_by_letters():
    assert scripts(["abc абв", "漢字漢 123 …"]) == {"Latin": 0.3333, "Cyrillic": 0.3333, "Han": 0.3333}
    assert scripts(["12 !"]) == {}


def test_the_summary_says_it_in_a_line():
    data = {"tokens": 64, "documents": 2, "vocabulary_seen": 0.25, "scripts": {"Latin": 0.9, "Han": 0.1}}
    assert text_words(data) == "64 tokens of 2 documents, 25% of the vocabulary; Latin 90%, Han 10%"
    assert text_words({"tokens": 64}) == "64 tokens"


def test_coverage_counts_tokens_once():
    ids = torch.tensor([[3, 4, 3, 4]])
    found = coverage(CalibrationData(({"input_ids": ids},), "x", 4, "", (), documents=2), None, 8)
    assert found == {"documents": 2, "vocabulary_seen": 0.25, "scripts": {}}


def test_the_report_says_what_the_text_covers(tmp_path):
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_experts=4, num_experts_per_tok=1, vocab_size=320,
    )  # fmt: skip
    folder = save_tiny(random_model(config), tmp_path / "moe")
    run = AutoRound(str(folder), dataset="builtin", **FAST)
    _, out = run.quantize_and_save(str(tmp_path / "out"), format="auto_round")
    data = json.loads((Path(out) / "report.json").read_text())["data"]
    assert 0 < data["vocabulary_seen"] <= 1 and data["documents"] >= 1
    assert sum(data["scripts"].values()) == pytest.approx(1, abs=0.05)
    experts = data["tokens_of_experts"]
    assert experts["experts"] == 8 and 0 <= experts["least"] <= experts["median"] and experts["below_floor"] > 0
    assert "vocabulary_seen" in (Path(out) / "report.html").read_text()


# ---- experts that few tokens reach ----


def moe(folder: Path) -> Path:
    """Four experts; the last one is chosen for one token of the vocabulary alone."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_experts=4, num_experts_per_tok=1, vocab_size=320,
    )  # fmt: skip
    model = random_model(config, torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :2] = torch.tensor([0.0, 0.2])  # these channels say whether it is the token
        model.model.embed_tokens.weight[RARE, :2] = torch.tensor([0.2, 0.0])
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = 0.0
            layer.mlp.gate.weight[:, :2] = 0.0
            layer.mlp.gate.weight[3, :2] = torch.tensor([9.0, -9.0])
            layer.self_attn.o_proj.weight[:2] = 0.0
            layer.mlp.experts.down_proj[:, :2] = 0.0
    return save_tiny(model, folder)


RARE = 77


def test_choosing_keeps_most_and_takes_those_that_serve():
    counts = torch.zeros(16, 2, dtype=torch.int64)
    counts[:, 0] = 100
    counts[13, 1], counts[9, 1] = 50, 20
    assert choose(counts, 8, 64) == [0, 1, 2, 3, 4, 5, 9, 13]
    assert choose(torch.full((16, 2), 100), 8, 64) == list(range(8))
    counts[9, 1] = 64
    assert choose(counts, 8, 64) == [0, 1, 2, 3, 4, 5, 6, 9]  # one is enough, then the next


def test_samples_that_reach_rare_experts_are_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(topup, "FLOOR", 8)
    ids = torch.randint(80, 250, (16, 16), generator=torch.Generator().manual_seed(0))
    ids[13, :] = RARE
    samples = [row.unsqueeze(0) for row in ids]
    options = {**FAST, "nsamples": 8, "seqlen": 16, "dataset": samples, "amp": False}
    folder = moe(tmp_path / "moe")
    plain = AutoRound(str(folder), **options)
    plain.run(tmp_path / "plain")
    run = AutoRound(str(folder), expert_topup=1, **options)
    store = run.run(tmp_path / "work")
    assert len(run.data.samples) == 8
    assert any((sample["input_ids"] == RARE).all() for sample in run.data.samples)
    least = [one.block_log[1]["experts"]["least"] for one in (plain, run)]
    assert least[0] == 0 and least[1] >= 16
    assert any("chosen of 16" in note for note in run.data.notes)
    store.close()
    again = AutoRound(str(folder), expert_topup=1, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topup, "_tokens_of_experts", lambda run: pytest.fail("counted again"))
        again.run(tmp_path / "work").close()
    assert all(entry["resumed"] for entry in again.block_log)


def test_topup_changes_nothing_without_experts():
    run = AutoRound(tiny_llama(), tokenizer=tiny_tokenizer(), expert_topup=3, **FAST)
    run.load_data()
    assert len(run.data.samples) == 4
