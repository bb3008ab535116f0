"""Benchmark tasks through lm-eval (the extra `[eval]`), reduced to one number per task and metric."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MissingEvalExtraError(ValueError):
    """lm-eval is needed and not installed."""


class UnknownTaskError(ValueError):
    """A task that lm-eval does not have."""


def run_tasks(
    model_dir: str | Path,
    tasks: list[str],
    batch_size: int | str = "auto",
    limit: float | None = None,
    num_fewshot: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, dict[str, float]]:
    """Run lm-eval tasks on a model folder and return {task: {metric: value}}.

    Args:
        batch_size: a number, or "auto" to let lm-eval find the largest that fits.
        limit: items per task, or a share of them when below 1.

    Raises:
        MissingEvalExtraError: lm-eval is not installed.
        UnknownTaskError: no task was given, or lm-eval does not know one of them.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingEvalExtraError(
            'Benchmark tasks need lm-eval: pip install "auto-round[eval]"; perplexity and KL divergence need nothing.'
        ) from error
    if not tasks:
        raise UnknownTaskError("No task was given; name at least one, for example lambada_openai.")
    manager = TaskManager()
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UnknownTaskError(f"lm-eval has no task {', '.join(unknown)}; `lm_eval --tasks list` shows those it has.")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model_dir), "dtype": "auto", "trust_remote_code": trust_remote_code},
        tasks=manager.match_tasks(tasks),  # patterns like mmlu_* become names
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        device=device,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    if found is None:  # under a distributed launch, only the first rank has the results
        return {}
    return {task: _compact(metrics) for task, metrics in found["results"].items()}


def _compact(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers only, without standard errors; the filter is named only where it is not the default one."""
    compact = {}
    for key, value in metrics.items():
        metric, _, chosen = key.partition(",")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and not metric.endswith("_stderr") and metric not in ("alias", "sample_len"):
            compact[metric if chosen in ("", "none") else key] = float(value)
    return compact
