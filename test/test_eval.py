"""Perplexity, divergence and tasks: the figures against plain computations, and the refusals."""

import math
import sys
import types

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from auto_round.eval import perplexity as perplexity_module
from auto_round.eval.divergence import EvalResult, compare, divergence
from auto_round.eval.harness import MissingEvalExtraError, UnknownTaskError, run_tasks
from auto_round.eval.perplexity import (
    HELDOUT_FILE,
    EvaluationError,
    EvaluationFileNotFoundError,
    exp_mean,
    perplexity,
    read_windows,
)

WORDS = [f"w{i}" for i in range(60)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def make_model(seed: int, vocab: int = 62, context: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=context,
        initializer_range=0.5,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


TOKENIZER = make_tokenizer()
WINDOWS = torch.randint(0, 62, (5, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def all_log_probs(model) -> torch.Tensor:
    return model(input_ids=WINDOWS).logits[:, :-1].double().log_softmax(-1)


# ---- windows ----


def write(path, documents: list[str]):
    path.write_text("\n\n<|doc|>\n\n".join(documents), encoding="utf-8")
    return path


def test_windows_are_evenly_spread(tmp_path):
    path = write(tmp_path / "t.txt", [" ".join(WORDS[:9])] * 32)  # 10 tokens a document, 320 in all
    ids = (TOKENIZER(" ".join(WORDS[:9]))["input_ids"] + [1]) * 32
    windows = read_windows(TOKENIZER, path, seqlen=16, windows=5)
    assert windows.shape == (5, 16) and windows.dtype == torch.int64
    assert windows.tolist() == [ids[start * 16 :][:16] for start in (0, 4, 8, 12, 16)]
    assert read_windows(TOKENIZER, path, seqlen=16, windows=500).flatten().tolist() == ids


def test_short_texts(tmp_path):
    path = write(tmp_path / "t.txt", [" ".join(WORDS[:20])])
    assert read_windows(TOKENIZER, path).shape == (1, 21)
    with pytest.raises(EvaluationError, match="gives 6 tokens; give at least 16"):
        read_windows(TOKENIZER, write(tmp_path / "s.txt", [" ".join(WORDS[:5])]))
    with pytest.raises(EvaluationFileNotFoundError, match="does not exist"):
        read_windows(TOKENIZER, tmp_path / "missing.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff" * 99)
    with pytest.raises(EvaluationError, match="not UTF-8"):
        read_windows(TOKENIZER, tmp_path / "b.txt")


def test_builtin_text():
    if not HELDOUT_FILE.is_file():
        pytest.skip("the held-out text is not there yet")
    assert read_windows(TOKENIZER, None, seqlen=32, windows=4).shape == (4, 32)


# ---- figures ----


@pytest.mark.parametrize("elements", [2**24, 500])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_figures_equal_a_plain_computation(batch_size, elements, monkeypatch):
    monkeypatch.setattr(perplexity_module, "_CHUNK_ELEMENTS", elements)
    model, reference = make_model(0), make_model(1)
    p, r = all_log_probs(model), all_log_probs(reference)
    nll = -p.gather(-1, WINDOWS[:, 1:, None]).mean()
    assert perplexity(model, WINDOWS, batch_size) == pytest.approx(float(nll.exp()), rel=1e-5)
    found = divergence(model, reference, WINDOWS, batch_size)
    assert found.tokens == 5 * 23
    assert found.kl == pytest.approx(float((r.exp() * (r - p)).sum(-1).mean()), rel=1e-5)
    assert found.top1 == pytest.approx(float((r.argmax(-1) == p.argmax(-1)).double().mean()))


def test_a_model_does_not_diverge_from_itself():
    model = make_model(0)
    same = divergence(model, model, WINDOWS)
    assert same.kl == 0 and same.top1 == 1
    near, far = make_model(0), make_model(0)
    with torch.no_grad():
        near.lm_head.weight.mul_(1.01)
        far.lm_head.weight.mul_(1.2)
    assert 0 < divergence(near, model, WINDOWS).kl < divergence(far, model, WINDOWS).kl


def test_the_mode_of_the_model_is_restored():
    model = make_model(0).train()
    model.lm_head.eval()
    perplexity(model, WINDOWS)
    assert model.training and model.model.training and not model.lm_head.training


def test_unusable_models_and_windows():
    model = make_model(0)
    broken = make_model(0)
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = math.nan
    with pytest.raises(EvaluationError, match="not finite"):
        perplexity(broken, WINDOWS)
    with pytest.raises(EvaluationError, match="original model gives logits that are not finite"):
        divergence(model, broken, WINDOWS)
    with pytest.raises(EvaluationError, match="one knows 62 tokens, the other 70"):
        divergence(model, make_model(0, vocab=70), WINDOWS)
    with pytest.raises(EvaluationError, match=r"\[n, L\]"):
        perplexity(model, WINDOWS[:, :1])
    with pytest.raises(EvaluationError, match="batch_size"):
        perplexity(model, WINDOWS, 0)
    assert exp_mean(1e9, 1) == math.inf


# ---- folders ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("quantized", "original")):
        make_model(seed).save_pretrained(root / name)
        TOKENIZER.save_pretrained(root / name)
    write(root / "t.txt", [" ".join(WORDS[i:] + WORDS[:i]) for i in range(8)])
    return root


def test_compare(folders):
    quantized, original, text = folders / "quantized", folders / "original", folders / "t.txt"
    result = compare(quantized, original, text, windows=4)
    windows = read_windows(TOKENIZER, text, 64, 4)  # the models' context is 64
    assert (result.seqlen, result.tokens) == (64, 4 * 63)
    assert result.perplexity == pytest.approx(perplexity(make_model(0), windows))
    assert result.reference_perplexity == pytest.approx(perplexity(make_model(1), windows))
    found = divergence(make_model(0), make_model(1), windows)
    assert (result.kl, result.top1) == (pytest.approx(found.kl), found.top1)
    alone = compare(str(quantized), text=text, windows=4)
    assert alone.perplexity == pytest.approx(result.perplexity)
    assert alone.against is None and alone.kl is None and alone.reference_perplexity is None
    labels = [label for label, _ in result.rows()]
    assert "KL divergence (nats per token)" in labels and "original" in labels
    assert {label for label, _ in alone.rows()} == {"model", "perplexity", "predicted tokens", "seconds"}


def test_compare_names_what_is_missing(folders, tmp_path):
    with pytest.raises(EvaluationFileNotFoundError, match=r"model folder .*nowhere does not exist"):
        compare(folders / "nowhere")
    with pytest.raises(EvaluationError, match=r"model in .* cannot be loaded"):
        compare(tmp_path)


def test_rows_name_the_tasks():
    tasks = {"piqa": {"acc": 0.5}}
    result = EvalResult("q", "o", 2.0, 100, 512, 1.0, 1.5, 0.01, 0.975, tasks)
    assert ("piqa acc", "0.5000") in result.rows() and ("top-1 agreement", "97.50%") in result.rows()


# ---- lm-eval ----


def fake_lm_eval(monkeypatch) -> list[dict]:
    calls: list[dict] = []

    class TaskManager:
        def match_tasks(self, names):
            return sorted(name for name in names if name in ("piqa", "gsm8k"))

    def simple_evaluate(**options):
        calls.append(options)
        metrics = {
            "alias": "piqa",
            "sample_len": 10,
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "exact_match,strict": 1,
            "f1_stderr,none": "N/A",
        }
        return {"results": dict.fromkeys(options["tasks"], metrics)}

    lm_eval = types.ModuleType("lm_eval")
    lm_eval.simple_evaluate = simple_evaluate
    lm_eval.tasks = types.ModuleType("lm_eval.tasks")
    lm_eval.tasks.TaskManager = TaskManager
    monkeypatch.setitem(sys.modules, "lm_eval", lm_eval)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", lm_eval.tasks)
    return calls


def test_run_tasks(monkeypatch):
    calls = fake_lm_eval(monkeypatch)
    found = run_tasks("folder", ["piqa"], batch_size=2, limit=10, num_fewshot=5)
    assert found == {"piqa": {"acc": 0.5, "exact_match,strict": 1.0}}
    (call,) = calls
    assert call["model_args"] == {"pretrained": "folder", "dtype": "auto", "trust_remote_code": False}
    assert (call["batch_size"], call["limit"], call["num_fewshot"], call["device"]) == (2, 10, 5, "cpu")
    with pytest.raises(UnknownTaskError, match="no task nonsense;"):
        run_tasks("folder", ["piqa", "nonsense"])
    with pytest.raises(UnknownTaskError, match="No task was given"):
        run_tasks("folder", [])


def test_compare_runs_tasks(monkeypatch, folders):
    fake_lm_eval(monkeypatch)
    result = compare(folders / "quantized", text=folders / "t.txt", windows=1, tasks=["piqa"])
    assert result.tasks["piqa"]["acc"] == 0.5


def test_missing_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingEvalExtraError, match=r"auto-round\[eval\]"):
        run_tasks("folder", ["piqa"])
