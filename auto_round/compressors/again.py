"""Another format from the work folder of a finished run, without tuning again."""

from __future__ import annotations

import contextlib
from pathlib import Path

from auto_round.compressors.base import Compressor
from auto_round.compressors.request import Request, Source
from auto_round.compressors.saving import prepare_output, save
from auto_round.formats import make_format
from auto_round.schemes import QuantizationScheme, parse_scheme
from auto_round.settings import TuneSettings
from auto_round.store import Store, StoreError
from auto_round.utils.model import load_streamed, load_tokenizer


def export_work(
    work_dir: str | Path,
    format: str,
    output_dir: str | Path,
    model: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write a finished run's work folder in another format, without tuning again.

    Args:
        work_dir: the run's work folder (`report.json` names it as `work_folder`).
        model: the source model's folder, where it has moved since.

    Raises:
        StoreError: no work folder, one of an unfinished run, or of another source model.
    """
    with contextlib.closing(Store.open_existing(Path(work_dir))) as store:
        return _export(store, format, output_dir, model, trust_remote_code)


def _export(
    store: Store, format: str, output_dir: str | Path, model: str | Path | None, trust_remote_code: bool
) -> Path:
    facts, work_dir = store.facts, store.folder
    source = Path(model or facts["source_dir"] or "")
    if not facts["source_dir"] and model is None:
        raise StoreError(f"{work_dir} was made from a model object: name the model's folder with model= (--model)")
    streamed = load_streamed(source, trust_remote_code)
    if streamed.checkpoint.fingerprint() != facts["source"]:
        raise StoreError(f"{source} is not the model that {work_dir} was made from (its weights differ)")
    settings = {k: v for k, v in facts["settings"].items() if k in TuneSettings.__dataclass_fields__}
    request = Request(
        parse_scheme("BF16"),  # what the run did not quantize stays
        TuneSettings(**settings),
        layer_config={name: QuantizationScheme.from_dict(scheme) for name, scheme in facts["layers"].items()},
        blocks=facts["blocks"],
        trust_remote_code=trust_remote_code,
    )
    tokenizer = load_tokenizer(source, trust_remote_code)
    run = Compressor(Source(streamed, tokenizer, directory=source), request, store=store)
    run.scheme = QuantizationScheme.from_dict(facts["scheme"])
    missing = [part for part in run.plan.parts if not store.has(part)]
    if missing:
        raise StoreError(f"{work_dir} is not finished ({missing[0]} is missing): run the same command again first")
    fmt = make_format(format, run.plan)
    final = Path(output_dir).expanduser().resolve()
    prepare_output(final, source)
    return save(run, store, fmt, final)
