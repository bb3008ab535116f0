"""Every format, opened by its real client: it loads, its logits are those of the dequantized weights, and so is the
text it writes. Heavy clients run where `tools/clients.sh` made their environments; see docs/formats.md for the figures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import ask, interpreter, last_error
from matrix import CASES, CLIENTS, Row, is_same
from workshop import Workshop, relative_error

from auto_round.cli.demo import DEMO_MODEL

pytestmark = pytest.mark.client


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """On the model that ships with the package, unless CLIENTS_MODEL names another one."""
    model = Path(os.environ.get("CLIENTS_MODEL", DEMO_MODEL))
    return Workshop(model, tmp_path_factory.mktemp("clients"))


def cases() -> Iterator[Any]:
    """The first case of each format and client runs with all tests, the others only with `-m client`."""
    seen: set[tuple[str, str]] = set()
    for row, client in CASES:
        key = (row.format.partition(":")[0], client)
        marks = [pytest.mark.thorough] if key in seen else []
        seen.add(key)
        yield pytest.param(row, client, id=f"{row.name}-{client}", marks=marks)


@pytest.mark.parametrize(("row", "client"), cases())
def test_client_computes_the_dequantized_model(row: Row, client: str, workshop: Workshop, tmp_path: Path) -> None:
    if interpreter(CLIENTS[client]) is None:
        pytest.skip(f"no environment: tools/clients.sh {CLIENTS[client].environment}")
    reference = workshop.reference(row.scheme, row.rounds_inputs)
    answer = ask(CLIENTS[client], workshop.artifact(row), reference.prompts, tmp_path)
    error, same_text = relative_error(answer.scores, reference.scores), answer.tokens == reference.tokens
    assert is_same(row, client, error, same_text, reference.noise), (
        f"logits {error:.2%} away (bfloat16 alone: {reference.noise:.2%}), {'the same' if same_text else 'other'} text"
    )


def test_log_probabilities_are_logits() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 40))
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert relative_error(log_probabilities, logits) < 1e-12
    assert relative_error(logits * 1.02, logits) == pytest.approx(0.02)


def test_the_cause_is_found_among_what_an_engine_prints() -> None:
    output = (
        'Traceback\n[rank0]:   File "x.py", line 1\n[rank0]: ValueError: bits=3 unknown\nINFO shutting down: done\n'
    )
    assert last_error(output) == "[rank0]: ValueError: bits=3 unknown INFO shutting down: done"
    assert last_error("some\nlines") == "some lines"
