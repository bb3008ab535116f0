"""Worked exercises in elementary mathematics, generated from a seed.

No package carries worked mathematics under a licence that suits an asset, so this part of the calibration text is
produced here: every solution is computed, shown step by step, and worded in several ways, so that digits, operators
and the language of reasoning all occur in varied contexts. The output is dedicated to the public domain (CC0-1.0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from random import Random

NAMES = ("Amara", "Bruno", "Chiara", "Dmitri", "Elif", "Farid", "Greta", "Hiro", "Ines", "Jonas", "Kofi", "Lena",
         "Mateo", "Nadia", "Oskar", "Priya", "Quentin", "Rosa", "Samir", "Tove", "Ulla", "Viktor", "Wanda",
         "Yuki")  # fmt: skip
GOODS = ("a bicycle", "a winter coat", "a desk lamp", "a set of saucepans", "a rucksack", "a pair of boots",
         "an armchair", "a record player", "a drill", "a tent")  # fmt: skip


def signed(value: int, symbol: str = "") -> str:
    """A term with its sign spelled out, for the middle of a sum: '+ 3x', '- 5'."""
    size = "" if symbol and abs(value) == 1 else str(abs(value))
    return f"{'-' if value < 0 else '+'} {size}{symbol}"


def polynomial(coefficients: list[int]) -> str:
    """A polynomial in x, highest power first, without zero terms."""
    degree = len(coefficients) - 1
    terms = [(c, degree - i) for i, c in enumerate(coefficients) if c]
    if not terms:
        return "0"
    symbols = [("" if p == 0 else "x" if p == 1 else f"x^{p}") for _, p in terms]
    text = " ".join(signed(c, s) for (c, _), s in zip(terms, symbols, strict=True))
    return text[2:] if text.startswith("+") else "-" + text[2:]


def multiplication(rng: Random) -> str:
    """Partial products of two integers."""
    a, b = rng.randint(23, 987), rng.randint(12, 98)
    tens, ones = divmod(b, 10)
    ask = rng.choice((f"Compute {a} × {b} by hand.", f"What is the product of {a} and {b}?", f"Work out {a} * {b}."))
    rows = [f"Split {b} into {tens * 10} and {ones}."]
    rows += [f"{a} × {part} = {a * part}" for part in (tens * 10, ones)]
    check = f"A quick estimate, {round(a, -1)} × {round(b, -1)} = {round(a, -1) * round(b, -1)}, has the right size."
    tail = rng.choice((check, f"The last digit is right, since {a % 10} × {b % 10} ends in {a * b % 10}."))
    return "\n".join([ask, *rows, f"Adding the two rows: {a * tens * 10} + {a * ones} = {a * b}.", tail])


def division(rng: Random) -> str:
    """Long division with a remainder."""
    divisor, quotient = rng.randint(3, 29), rng.randint(105, 4999)
    dividend = divisor * quotient + rng.randrange(divisor)
    lines = [rng.choice((f"Divide {dividend} by {divisor}.", f"How many times does {divisor} go into {dividend}?"))]
    rest = 0
    for digit in str(dividend):
        rest = rest * 10 + int(digit)
        if rest >= divisor or len(lines) > 1:
            step, left = divmod(rest, divisor)
            lines.append(f"{rest} ÷ {divisor} = {step}, remainder {left}; write {step}.")
        rest %= divisor
    lines.append(
        f"So {dividend} = {divisor} × {quotient} + {rest}: the quotient is {quotient} and the remainder {rest}."
    )
    return "\n".join(lines)


def linear_equation(rng: Random) -> str:
    """a x + b = c x + d with an integer solution."""
    x, a, c, b = rng.randint(-12, 15), rng.randint(5, 12), rng.randint(-3, 3), rng.randint(-30, 30)
    d = (a - c) * x + b
    left, right = polynomial([a, b]), polynomial([c, d])
    ask = rng.choice((f"Solve {left} = {right} for x.", f"Find x such that {left} = {right}."))
    return "\n".join([
        ask,
        f"Bring the terms in x to the left: {a - c}x {signed(b)} = {d}.",
        f"Move the constant: {a - c}x = {d - b}.",
        f"Divide by {a - c}: x = {x}.",
        f"Check: the left side is {a * x + b} and the right side is {c * x + d}, as it should be.",
    ])  # fmt: skip


def quadratic(rng: Random) -> str:
    """A monic quadratic with integer roots, by factoring or by the formula."""
    p, q = rng.randint(-11, 11), rng.randint(-11, 11)
    b, c = -(p + q), p * q
    disc = b * b - 4 * c
    lines = [f"Find the real roots of {polynomial([1, b, c])} = 0."]
    if rng.random() < 0.5:
        lines.append(f"Two numbers with sum {p + q} and product {c} are {p} and {q},")
        lines.append(f"therefore the left side factors as (x {signed(-p)})(x {signed(-q)}).")
    else:
        lines.append(f"The discriminant is ({b})^2 - 4·({c}) = {b * b} {signed(-4 * c)} = {disc},")
        lines.append(f"whose square root is {math.isqrt(disc)}.")
        lines.append(f"Hence x = ({-b} ± {math.isqrt(disc)}) / 2.")
    answer = f"x = {p} is a double root." if p == q else f"The solutions are x = {min(p, q)} and x = {max(p, q)}."
    return "\n".join([*lines, answer])


def linear_system(rng: Random) -> str:
    """Two equations in two unknowns, by elimination."""
    x, y = rng.randint(-9, 9), rng.randint(-9, 9)
    a, b = rng.randint(2, 7), rng.randint(2, 7)
    c, d = rng.randint(2, 7), -rng.randint(2, 7)
    e, f = a * x + b * y, c * x + d * y
    return "\n".join([
        f"{rng.choice(('Solve the system', 'Find x and y from'))} "
        f"(1) {a}x {signed(b)}y = {e}, (2) {c}x {signed(d)}y = {f}.",
        f"Multiply (1) by {-d} and (2) by {b}, so that the terms in y cancel when we add:",
        f"  {-d * a}x + {b * c}x = {-d * e} {signed(b * f)}, that is {-d * a + b * c}x = {-d * e + b * f}.",
        f"Thus x = {x}. Putting this into (1): {b}y = {e} {signed(-a * x)} = {e - a * x}, and y = {y}.",
    ])  # fmt: skip


def euclid(rng: Random) -> str:
    """Greatest common divisor by repeated division."""
    g = rng.randint(2, 40)
    a, b = sorted((g * rng.randint(20, 90), g * rng.randint(5, 60)), reverse=True)
    lines = [f"Use Euclid's algorithm to find gcd({a}, {b})."]
    m, n = a, b
    while n:
        lines.append(f"{m} = {m // n} · {n} + {m % n}")
        m, n = n, m % n
    lines.append(f"The last divisor is {m}, so gcd({a}, {b}) = {m} and lcm({a}, {b}) = {a} · {b} / {m} = {a * b // m}.")
    return "\n".join(lines)


def fractions(rng: Random) -> str:
    """Sum of two fractions over a common denominator."""
    a, b = Fraction(rng.randint(1, 11), rng.randint(2, 12)), Fraction(rng.randint(1, 11), rng.randint(2, 12))
    common = math.lcm(a.denominator, b.denominator)
    p, q = int(a * common), int(b * common)
    lines = [rng.choice((f"Add {a} and {b}.", f"Simplify {a} + {b}.", f"What is {a} + {b} as a single fraction?"))]
    lines.append(f"The least common multiple of {a.denominator} and {b.denominator} is {common}.")
    lines.append(f"{a} = {p}/{common} and {b} = {q}/{common}, so the sum is {p + q}/{common}.")
    total = a + b
    lines.append(f"In lowest terms that is {total}, about {float(total):.4f}.")
    return "\n".join(lines)


def discount(rng: Random) -> str:
    """Percentages up and down."""
    who, what = rng.choice(NAMES), rng.choice(GOODS)
    price, cut, tax = rng.randint(4, 60) * 10, rng.randint(1, 8) * 5, rng.choice((7, 10, 19, 20, 21))
    reduced, factor = price * (100 - cut) / 100, 1 + tax / 100
    return "\n".join([
        f"{who} wants to buy {what} marked at {price} euros before tax. "
        f"The shop takes {cut}% off, then adds {tax}% tax.",
        f"After the discount the price is {price} × (1 - {cut / 100:.2f}) = {reduced:.2f} euros.",
        f"The tax is {reduced:.2f} × {tax / 100:.2f} = {reduced * tax / 100:.2f}, "
        f"which makes {reduced * factor:.2f} euros in all.",
        f"Does the order matter? No: both steps multiply the price, and {(100 - cut) / 100:.2f} × {factor:.2f} "
        f"= {factor:.2f} × {(100 - cut) / 100:.2f}.",
    ])  # fmt: skip


def meeting(rng: Random) -> str:
    """Two travellers moving towards each other."""
    one, two = rng.sample(NAMES, 2)
    u, v, hours = rng.randint(8, 60), rng.randint(8, 60), rng.randint(2, 6)
    distance = (u + v) * hours
    return "\n".join([
        f"{one} and {two} live {distance} km apart and set out towards each other at the same time. "
        f"{one} travels at {u} km/h, {two} at {v} km/h. When and where do they meet?",
        f"The gap closes at {u} + {v} = {u + v} km every hour, "
        f"so they meet after {distance} / {u + v} = {hours} hours.",
        f"By then {one} has covered {u} · {hours} = {u * hours} km and {two} {v} · {hours} = {v * hours} km; "
        f"indeed {u * hours} + {v * hours} = {distance}.",
    ])  # fmt: skip


def modular_power(rng: Random) -> str:
    """Square and multiply."""
    exponent, modulus = rng.randint(17, 120), rng.choice((7, 11, 13, 17, 19, 23, 29, 31, 97, 101))
    base = rng.randint(2, modulus - 2)
    lines = [
        f"Find the remainder of {base}^{exponent} on division by {modulus}.",
        f"In binary, {exponent} = {exponent:b}.",
    ]
    power, result, value = 1, 1, base % modulus
    while power <= exponent:
        used = bool(exponent & power)
        result = result * value % modulus if used else result
        note = f", used: the product so far is {result}" if used else ""
        lines.append(f"{base}^{power} ≡ {value} (mod {modulus}){note}")
        power, value = 2 * power, value * value % modulus
    return "\n".join([*lines, f"The remainder is {result}."])


def factorisation(rng: Random) -> str:
    """Prime factors and the number of divisors."""
    n = rng.randint(300, 9999)
    lines, rest, p, factors = [f"Write {n} as a product of primes and count its divisors."], n, 2, {}
    while p * p <= rest:
        while rest % p == 0:
            lines.append(f"{rest} is divisible by {p}: {rest} = {p} · {rest // p}")
            factors[p] = factors.get(p, 0) + 1
            rest //= p
        p += 1
    if rest > 1:
        factors[rest] = factors.get(rest, 0) + 1
        lines.append(f"{rest} is prime, because no prime up to {math.isqrt(rest)} divides it.")
    product = " · ".join(f"{q}^{k}" if k > 1 else str(q) for q, k in sorted(factors.items()))
    count = math.prod(k + 1 for k in factors.values())
    ways = " · ".join(f"({k} + 1)" for k in factors.values())
    return "\n".join([*lines, f"So {n} = {product}, and it has {ways} = {count} divisors."])


def series(rng: Random) -> str:
    """Sums of arithmetic and geometric progressions."""
    if rng.random() < 0.5:
        a, d, n = rng.randint(1, 20), rng.randint(2, 9), rng.randint(10, 60)
        last = a + (n - 1) * d
        return (
            f"Sum the first {n} terms of {a}, {a + d}, {a + 2 * d}, ...\n"
            f"The common difference is {d}, so the last term is {a} + {n - 1} · {d} = {last}.\n"
            f"Pairing first with last, the sum is {n} · ({a} + {last}) / 2 = {n * (a + last) // 2}."
        )
    a, r, n = rng.randint(1, 6), rng.randint(2, 4), rng.randint(5, 9)
    return (
        f"Evaluate the geometric sum {a} + {a * r} + {a * r * r} + ... with {n} terms.\n"
        f"Multiplying S by {r} shifts every term one place, so {r}S - S = {a} · {r}^{n} - {a}.\n"
        f"Since {r}^{n} = {r**n}, we get S = ({a * r**n} - {a}) / {r - 1} = {(a * r**n - a) // (r - 1)}."
    )


def calculus(rng: Random) -> str:
    """Derivative, critical points and a definite integral of a cubic."""
    p, q = sorted(rng.sample(range(-4, 6), 2))
    cubic = [2, -3 * (p + q), 6 * p * q, rng.randint(-9, 9)]
    slope = [6, -6 * (p + q), 6 * p * q]

    def value(x: int) -> int:
        return sum(c * x**k for c, k in zip(cubic, (3, 2, 1, 0), strict=True))

    return "\n".join([
        f"Study f(x) = {polynomial(cubic)}.",
        f"Differentiating term by term, f'(x) = {polynomial(slope)} = 6(x {signed(-p)})(x {signed(-q)}).",
        f"The derivative vanishes at x = {p} and x = {q}; it is positive outside the interval and negative inside.",
        f"Hence f rises up to a local maximum f({p}) = {value(p)}, falls to a local minimum f({q}) = {value(q)}, "
        "then rises again.",
        f"The integral of f' from {p} to {q} is f({q}) - f({p}) = {value(q) - value(p)}, "
        "which is negative, as expected.",
    ])  # fmt: skip


def dice(rng: Random) -> str:
    """Counting outcomes of two dice."""
    total = rng.randint(4, 10)
    pairs = [(i, total - i) for i in range(1, 7) if 1 <= total - i <= 6]
    chance = Fraction(len(pairs), 36)
    return (
        f"Two fair dice are thrown. What is the probability that the sum is {total}?\n"
        f"The favourable outcomes are {', '.join(map(str, pairs))}: {len(pairs)} of the 36 equally likely pairs.\n"
        f"So the probability is {len(pairs)}/36 = {chance}, roughly {float(chance):.1%}.\n"
        f"The chance of seeing this sum at least once in {total} throws is 1 - (1 - {chance})^{total} ≈ "
        f"{1 - (1 - float(chance)) ** total:.3f}."
    )


def committee(rng: Random) -> str:
    """Binomial coefficients."""
    women, men, k = rng.randint(4, 9), rng.randint(4, 9), rng.randint(3, 5)
    everyone, only_men = math.comb(women + men, k), math.comb(men, k)
    return (
        f"A club has {women} women and {men} men. How many committees of {k} contain at least one woman?\n"
        f"Without the condition there are C({women + men}, {k}) = {everyone} committees.\n"
        f"C({men}, {k}) = {only_men} of them consist of men only, and these are exactly the ones to exclude.\n"
        f"Answer: {everyone} - {only_men} = {everyone - only_men}."
    )


def statistics(rng: Random) -> str:
    """Mean, median and standard deviation of a small sample."""
    data = [rng.randint(2, 40) for _ in range(rng.choice((6, 8, 10)))]
    n, ordered = len(data), sorted(data)
    mean = sum(data) / n
    squares = sum((x - mean) ** 2 for x in data)
    middle = (ordered[n // 2 - 1] + ordered[n // 2]) / 2
    return (
        f"{rng.choice(NAMES)} measured {', '.join(map(str, data))}. Describe the sample.\n"
        f"The sum is {sum(data)}, so the mean is {sum(data)}/{n} = {mean:.3f}.\n"
        f"In order: {', '.join(map(str, ordered))}. The two middle values are {ordered[n // 2 - 1]} and "
        f"{ordered[n // 2]}, which gives a median of {middle:g}.\n"
        f"The squared deviations add up to {squares:.3f}; dividing by {n} - 1 = {n - 1} gives a variance of "
        f"{squares / (n - 1):.3f} and a standard deviation of {math.sqrt(squares / (n - 1)):.3f}."
    )


def bases(rng: Random) -> str:
    """Conversion between number bases."""
    n, base = rng.randint(50, 4000), rng.choice((2, 3, 5, 8, 16))
    lines, rest, digits = [f"Convert {n} to base {base}."], n, ""
    while rest:
        digit = "0123456789abcdef"[rest % base]
        note = f" (digit {digit})" if rest % base > 9 else ""
        lines.append(f"{rest} = {base} · {rest // base} + {rest % base}{note}")
        digits, rest = digit + digits, rest // base
    lines.append(f"Reading the remainders upwards, {n} in base {base} is {digits}.")
    return "\n".join(lines)


def interest(rng: Random) -> str:
    """A table of compound interest."""
    who, start, years = rng.choice(NAMES), rng.randint(2, 90) * 100, rng.randint(3, 6)
    rate = rng.choice((1.5, 2.0, 2.5, 3.0, 4.0, 5.0))
    lines = [f"{who} saves {start} euros at {rate}% interest a year. How much is there after {years} years?"]
    balance = float(start)
    for year in range(1, years + 1):
        lines.append(f"Year {year}: {balance:.2f} × {1 + rate / 100:.3f} = {balance * (1 + rate / 100):.2f}")
        balance *= 1 + rate / 100
    doubling = math.log(2) / math.log(1 + rate / 100)
    lines.append(f"The formula {start} · {1 + rate / 100:.3f}^{years} gives the same {balance:.2f} euros.")
    return "\n".join([*lines, f"At this rate the money would double in about {doubling:.1f} years."])


def matrices(rng: Random) -> str:
    """Product and determinant of 2 × 2 matrices."""
    a, b, c, d, e, f, g, h = (rng.randint(-6, 9) for _ in range(8))
    product = [[a * e + b * g, a * f + b * h], [c * e + d * g, c * f + d * h]]
    det_a, det_b = a * d - b * c, e * h - f * g
    return "\n".join([
        f"Let A = [[{a}, {b}], [{c}, {d}]] and B = [[{e}, {f}], [{g}, {h}]]. Compute AB, and verify that "
        "det(AB) = det(A) det(B).",
        f"First row: {a}·({e}) {signed(b)}·({g}) = {product[0][0]} and {a}·({f}) {signed(b)}·({h}) = {product[0][1]}.",
        f"Second row: {c}·({e}) {signed(d)}·({g}) = {product[1][0]} and {c}·({f}) {signed(d)}·({h}) = {product[1][1]}.",
        f"So AB = {product}, det(A) = {det_a}, det(B) = {det_b}, and det(AB) = "
        f"{product[0][0] * product[1][1] - product[0][1] * product[1][0]} = {det_a} · ({det_b}).",
    ])  # fmt: skip


def triangle(rng: Random) -> str:
    """A right triangle from a Pythagorean triple."""
    m, n, k = rng.randint(3, 7), rng.randint(1, 2), rng.randint(1, 4)
    short, tall = sorted((k * (m * m - n * n), k * 2 * m * n))
    ladder = k * (m * m + n * n)
    angle = math.degrees(math.acos(short / ladder))
    return (
        f"A ladder {ladder} dm long leans against a wall with its foot {short} dm from it. How high does it reach?\n"
        "Wall, ground and ladder form a right triangle, so "
        f"h^2 = {ladder}^2 - {short}^2 = {ladder**2} - {short**2} = {tall**2}.\n"
        f"The height is {tall} dm. The angle at the ground satisfies cos θ = {short}/{ladder}, so θ ≈ {angle:.1f} "
        f"degrees, and the area under the ladder is {short * tall / 2:g} dm^2."
    )


TOPICS: dict[str, tuple[Callable[[Random], str], ...]] = {
    "Arithmetic by hand": (multiplication, division, fractions, discount, bases),
    "Equations": (linear_equation, quadratic, linear_system, meeting, linear_equation),
    "Numbers and divisibility": (euclid, factorisation, modular_power, bases, division),
    "Everyday calculation": (discount, meeting, interest, multiplication, statistics),
    "Counting, chance and data": (dice, committee, statistics, series, fractions),
    "Functions, matrices and geometry": (calculus, matrices, triangle, series, quadratic),
}


def worksheets(count: int, seed: int) -> list[str]:
    """`count` worksheets of worked exercises, each on one topic, alternating two layouts."""
    rng = Random(seed)
    sheets = []
    for number in range(count):
        topic = list(TOPICS)[number % len(TOPICS)]
        makers = [maker for maker in TOPICS[topic] for _ in range(rng.choice((1, 2, 2)))]
        rng.shuffle(makers)
        numbered = rng.random() < 0.5
        parts = [f"# {topic}" if numbered else f"{topic}: problems with solutions"]
        for position, maker in enumerate(makers, 1):
            question, answer = maker(rng).split("\n", 1)
            plain, marked = f"Q: {question}\nA: {answer}", f"**Problem {position}.** {question}\n\n{answer}"
            parts.append(marked if numbered else plain)
        sheets.append("\n\n".join(parts))
    return sheets
