"""What a verification found, and the error of one that failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


class VerificationError(RuntimeError):
    """A written folder is not what was quantized; names what failed."""


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


@dataclass
class Verification:
    """The checks made, and how far the artifact's output is from the original's."""

    checks: list[Check] = field(default_factory=list)
    kl: float | None = None
    top1: float | None = None

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def add(self, name: str, problem: str | None, detail: str) -> None:
        self.checks.append(Check(name, problem is None, problem or detail))

    def raise_if_failed(self, folder: Path) -> None:
        for check in self.checks:
            if not check.passed:
                raise VerificationError(f"{folder} failed the check '{check.name}': {check.detail}")
