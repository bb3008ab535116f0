import pytest

from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme, SchemeError, parse_scheme


@pytest.mark.parametrize("bits", range(2, 9))
def test_presets_by_any_case(bits):
    assert parse_scheme(f"w{bits}a16") == PRESET_SCHEMES[f"W{bits}A16"]
    assert parse_scheme(f"W{bits}A16G32").group_size == 32


def test_reads_like_a_mapping():
    scheme = parse_scheme("W4A16", group_size=64)
    assert scheme["group_size"] == scheme.get("group_size") == 64
    assert scheme.get("super_bits", 7) == 7
    assert dict(scheme)["bits"] == 4
    assert QuantizationScheme.from_dict({**scheme.to_dict(), "stray": 1}) == scheme


def test_mapping_with_a_base_scheme():
    assert parse_scheme({"scheme": "W8A16", "group_size": 32}).bits == 8
    assert parse_scheme({"bits": 3}, base=parse_scheme("W4A16G64")).group_size == 64


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: parse_scheme("W4A61"), "did you mean 'W4A16'"),
        (lambda: parse_scheme({"bitz": 4}), "did you mean 'bits'"),
        (lambda: parse_scheme("W4A16", bits=9), "bits=9"),
        (lambda: parse_scheme("W4A16", group_size=-2), "group_size=-2"),
        (lambda: parse_scheme("W4A16", data_type="mx_fp"), "mx_fp"),
        (lambda: parse_scheme("W4A16", act_bits=8), "act_bits=8"),
        (lambda: parse_scheme(4), "int"),
    ],
)
def test_errors_say_what_is_wrong(make, words):
    with pytest.raises(SchemeError, match=words):
        make()
