"""The best choice of one option per item within a budget, exactly (the multiple-choice knapsack problem).

A price per unit of cost, found by bisection, gives a choice within the budget and a bound on what any choice can save.
Whatever cannot beat that choice by the bound is left out, and dynamic programming over the rest is exact: it keeps the
states of which no other is both cheaper and better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BISECTIONS = 100
SLACK = 1e-9  # relative: sums of floats in another order must not cut off the best choice

Table = Sequence[Sequence[float]]


class BudgetError(ValueError):
    """No choice is as small as the budget."""


@dataclass(frozen=True)
class _States:
    """Partial choices, ever dearer and ever better. parents: index of the state before; options: what was added."""

    costs: np.ndarray
    losses: np.ndarray
    parents: np.ndarray
    options: np.ndarray


def solve(costs: Sequence[Sequence[int]], losses: Table, budget: int) -> list[int]:
    """For each item the index of its option, so that the sum of losses is least with costs of at most `budget`.

    Args:
        costs: whole numbers, at least 0; losses: finite. Both [item][option], with the same number of options.

    Raises:
        BudgetError: even the cheapest options cost more than the budget.
    """
    dear = [np.asarray(row, dtype=np.int64) for row in costs]
    bad = [np.asarray(row, dtype=np.float64) for row in losses]
    cheapest = sum(int(row.min()) for row in dear)
    if cheapest > budget:
        raise BudgetError(f"the cheapest choice costs {cheapest}, the budget is {budget}")
    price, found = _priced(dear, bad, budget)
    top = sum(row[choice] for row, choice in zip(bad, found, strict=True))
    return _program(dear, bad, budget, price, top)


def _choices(costs: list[np.ndarray], losses: list[np.ndarray], price: float) -> list[int]:
    """Each item's best option where a unit of cost has a price; the cheaper of equal ones."""
    found = []
    for cost, loss in zip(costs, losses, strict=True):
        total = loss + price * cost
        best = np.flatnonzero(total <= total.min())
        found.append(int(best[cost[best].argmin()]))
    return found


def _priced(costs: list[np.ndarray], losses: list[np.ndarray], budget: int) -> tuple[float, list[int]]:
    """The lowest price (to a hair) at which the best options keep to the budget, and these options."""

    def cost_of(choice: list[int]) -> int:
        return sum(int(row[one]) for row, one in zip(costs, choice, strict=True))

    low, high = 0.0, 1.0
    if cost_of(found := _choices(costs, losses, low)) <= budget:
        return low, found
    cheapest = [int(np.lexsort((loss, cost))[0]) for cost, loss in zip(costs, losses, strict=True)]
    while cost_of(found := _choices(costs, losses, high)) > budget:
        low, high = high, 4 * high
        if high > 1e300:
            return low, cheapest
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if cost_of(tried := _choices(costs, losses, middle)) <= budget:
            high, found = middle, tried
        else:
            low = middle
    return high, found


def _program(costs: list[np.ndarray], losses: list[np.ndarray], budget: int, price: float, top: float) -> list[int]:
    """Dynamic programming over items. top: the loss of a choice that is known; `price` gives the bound."""
    least = np.array([float((loss + price * cost).min()) for cost, loss in zip(costs, losses, strict=True)])
    rest_least = np.append(np.cumsum(least[::-1])[::-1], 0.0)[1:]
    rest_cost = np.append(np.cumsum([int(cost.min()) for cost in reversed(costs)])[::-1], 0)[1:]
    limit = top + SLACK * max(1e-300, *(float(np.abs(loss).sum()) for loss in losses), abs(top))
    states = [_States(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int32), np.zeros(1, np.int32))]
    for item, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
        grown = _grow(states[-1], cost, loss)
        bound = grown.losses + price * (grown.costs - float(budget)) + rest_least[item]
        keep = (bound <= limit) & (grown.costs + rest_cost[item] <= budget)
        states.append(_undominated(_take(grown, keep)))
    return _trace(states)


def _grow(states: _States, cost: np.ndarray, loss: np.ndarray) -> _States:
    """Every state with every option added."""
    count, options = len(states.costs), len(cost)
    return _States(
        (states.costs[:, None] + cost).ravel(),
        (states.losses[:, None] + loss).ravel(),
        np.repeat(np.arange(count, dtype=np.int32), options),
        np.tile(np.arange(options, dtype=np.int32), count),
    )


def _take(states: _States, which: np.ndarray) -> _States:
    return _States(states.costs[which], states.losses[which], states.parents[which], states.options[which])


def _undominated(states: _States) -> _States:
    """States of which no other is as cheap and as good."""
    ordered = _take(states, np.lexsort((states.losses, states.costs)))
    lowest = np.minimum.accumulate(ordered.losses)
    keep = np.append(True, ordered.losses[1:] < lowest[:-1]) if len(ordered.losses) else np.zeros(0, bool)
    return _take(ordered, keep)


def _trace(states: list[_States]) -> list[int]:
    """The options that led to the best of the last states, which is the dearest."""
    index, found = len(states[-1].costs) - 1, []
    for step in reversed(states[1:]):
        found.append(int(step.options[index]))
        index = int(step.parents[index])
    return found[::-1]
