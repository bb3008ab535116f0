"""Engine profiles: what vLLM, SGLang, Transformers, llama.cpp and mlx-lm load, and which layers they run as one.

All of it is data about other programs, so that a plan can be checked, repaired or given a format before any work.
`fused_groups` says which layers must share a scheme, `merged_groups` which of them become one matrix.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from auto_round.formats import make_format
from auto_round.formats.packing import AUTO_AWQ, AUTO_GPTQ, PACKINGS
from auto_round.plan import LayerPlan, ModelPlan, PlanError
from auto_round.schemes import GGUF_TYPES, GroupSize, QuantizationScheme

Groups = Callable[[Iterable[str]], list[list[str]]]

# vLLM 0.32, `packed_modules_mapping` of vllm/model_executor/models/*.py, with the number of models that have a row.
# SGLang's models have the same ones (python/sglang/srt/models).
MERGED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),  # 113, as qkv_proj
    ("query", "key", "value"),  # 3
    ("wq", "wk", "wv"),  # 2
    ("gate_proj", "up_proj"),  # 97, as gate_up_proj or merged_linear
    ("w1", "w3"),  # 2, and all that name experts so
    ("c_fc_0", "c_fc_1"),  # EXAONE
    ("in_proj_qkv", "in_proj_z"),  # 2: linear attention of Qwen3.5
    ("in_proj_b", "in_proj_a"),  # 2
    ("q_a_proj", "kv_a_proj_with_mqa"),  # 2: latent attention of DeepSeek
)
_PARTNERS = {part: parts for parts in MERGED for part in parts}
_EXPERT = re.compile(r"^((?:.*\.)?\w*experts)\.(?:\w*_)?\d+\.(.+)$")


def merged_groups(names: Iterable[str]) -> list[list[str]]:
    """Layers of one module that engines join to one matrix, as lists of two names or more, in the order given."""
    return _groups(names, _merged_key)


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """Layers that vLLM and SGLang run as one and that must share a scheme: the merged ones, and a module's experts."""
    return _groups(names, lambda name: expert[1] if (expert := _EXPERT.match(name)) else _merged_key(name))


def expert_roles(names: Iterable[str]) -> list[list[str]]:
    """Layers of one role in the experts of a module, which llama.cpp and mlx-lm stack to one tensor."""
    return _groups(names, lambda name: (expert[1], expert[2]) if (expert := _EXPERT.match(name)) else None)


def _no_groups(names: Iterable[str]) -> list[list[str]]:
    return []


def _merged_key(name: str) -> tuple[str, tuple[str, ...]] | None:
    module, _, last = name.rpartition(".")
    return (module, _PARTNERS[last]) if last in _PARTNERS else None


def _groups(names: Iterable[str], key: Callable[[str], object]) -> list[list[str]]:
    """Names of equal key together; those without a key or without company are left out."""
    found: dict[object, list[str]] = {}
    for name in names:
        if (of := key(name)) is not None:
            found.setdefault(of, []).append(name)
    return [group for group in found.values() if len(group) > 1]


@dataclass(frozen=True)
class Loads:
    """Layers that an engine reads from a format. sym: None for both; groups: None for any size; act: input bits."""

    format: str
    family: str
    bits: tuple[int, ...]
    sym: bool | None = True
    groups: tuple[GroupSize, ...] | None = None
    act: tuple[int | None, ...] = (None,)

    def misfits(self, scheme: QuantizationScheme) -> list[str]:
        """What a scheme would have to change to fit, in words; the number family first, as that says most."""
        act = None if scheme.act is None else scheme.act.bits
        found = []
        if scheme.data_type != self.family:
            found.append(f"data_type {self.family!r}")
        if scheme.bits not in self.bits:
            found.append(f"{_or(self.bits)} bits")
        if self.sym is not None and scheme.sym != self.sym:
            found.append("sym=True" if self.sym else "sym=False")
        if self.groups is not None and scheme.group_size not in self.groups:
            found.append(f"a group size of {_or(self.groups)}")
        if act not in self.act:
            found.append(f"inputs of {_or(width or 16 for width in self.act)} bits")
        return found


@dataclass(frozen=True)
class EngineProfile:
    """What one engine loads, in the order of preference, and which layers it runs as one (`groups`).

    packings: those of the integers of `auto_round` that it knows; plain: formats that hold an ordinary checkpoint.
    """

    name: str
    title: str
    loads: tuple[Loads, ...]
    groups: Groups
    packings: tuple[str, ...] = ()
    plain: tuple[str, ...] = ("fake",)

    def choose_format(self, scheme: QuantizationScheme) -> str:
        """The name of a format that the engine loads for this scheme.

        Raises:
            PlanError: there is none; the message says what the engine would load.
        """
        row = next((row for row in self.loads if not row.misfits(scheme)), None)
        if row is None:
            raise PlanError(f"{self.title} does not load {_described(scheme)}: {self._remedy(scheme)}")
        return _gguf_file(scheme) if row.format == "gguf" else row.format

    def _remedy(self, scheme: QuantizationScheme) -> str:
        if all(row.format == "gguf" for row in self.loads):
            return f"it loads GGUF only; use the scheme GGUF:{_GGUF_OF_WIDTH.get(scheme.bits, 'Q8_0')}"
        nearest = min((row.misfits(scheme) for row in self.loads), key=len)
        return f"it would with {', '.join(nearest)}"

    def problems(self, plan: ModelPlan, format_name: str) -> list[str]:
        """What the engine could not load of this plan in this format, and what to do; empty if it loads all."""
        try:
            written = make_format(format_name, plan)
        except PlanError as error:
            return [str(error)]
        if format_name in self.plain:
            return []
        packing = getattr(written, "packing", None)
        if self.packings and packing in set(PACKINGS) - set(self.packings) and _base(format_name) == "auto_round":
            return [
                f"{self.title} does not read the packing {packing} that this plan gets in {format_name}: use "
                f"{self._other_format(plan, format_name)}"
            ]
        found = []
        for scheme, names in _by_scheme(written.plan.quantized().values()).items():
            if any(_base(row.format) == _base(format_name) and not row.misfits(scheme) for row in self.loads):
                continue
            found.append(
                f"{self.title} does not load {_described(scheme)} from {format_name} ({_listed(names)}): use "
                f"{self._other_format(plan, format_name)}"
            )
        return found + _group_problems(plan, self)

    def _other_format(self, plan: ModelPlan, format_name: str) -> str:
        """Formats from which it would load every layer, or a change of scheme."""
        schemes = list(_by_scheme(plan.quantized().values()))
        names = dict.fromkeys(row.format for row in self.loads if _base(row.format) != _base(format_name))
        fits = [
            name
            for name in names
            if all(any(row.format == name and not row.misfits(scheme) for row in self.loads) for scheme in schemes)
        ]
        if fits:
            return f"the format {_or(_gguf_file(schemes[0]) if name == 'gguf' else name for name in fits)}"
        unfit = next((s for s in schemes if all(row.misfits(s) for row in self.loads)), schemes[0])
        return f"another scheme ({self._remedy(unfit)})"

    def repair(self, plan: ModelPlan) -> tuple[ModelPlan, list[str]]:
        """A plan in which layers that the engine runs as one share a scheme, and what was changed.

        They get the most precise scheme among them, with a group size that divides the inputs of all. Where one is
        kept, by a rule or because nothing fits it, all are.
        """
        layers = dict(plan.layers)
        notes: dict[tuple[str, str], list[str]] = {}
        for names in self.groups(plan.layers):
            members = [plan.layers[name] for name in names]
            if _agree(members):
                continue
            shared, why = _shared_scheme(members)
            note = f"{self.title} runs {_roles(names)} as one, so {why}"
            notes.setdefault((_roles(names), note), []).append(_module(names))
            for member in members:
                if member.scheme != shared:
                    reason = f"{member.reason}; {self.title} runs it as one with {_other(names, member.name)}, so {why}"
                    layers[member.name] = dataclasses.replace(member, scheme=shared, reason=reason)
        messages = [f"{note} (in {_listed(modules)})" for (_, note), modules in notes.items()]
        return dataclasses.replace(plan, layers=layers), messages


def warnings_for_mixed(plan: ModelPlan) -> list[str]:
    """What vLLM and SGLang refuse in a plan with several schemes, whatever the format."""
    return [f"{problem}, or let --for vllm do it" for problem in _group_problems(plan, ENGINES["vllm"])]


def _group_problems(plan: ModelPlan, profile: EngineProfile) -> list[str]:
    found: dict[str, list[str]] = {}
    for names in profile.groups(plan.layers):
        members = [plan.layers[name] for name in names]
        if not _agree(members):
            parts = {_described(m.scheme): _roles([m.name]) for m in reversed(members)}
            schemes = "; ".join(f"{role}: {scheme}" for scheme, role in reversed(parts.items()))
            found.setdefault(f"{_roles(names)} as one, and the plan has {schemes}", []).append(_module(names))
    return [
        f"{profile.title} runs {what} (in {_listed(modules)}): give them one scheme with layer_config, or keep them all"
        for what, modules in found.items()
    ]


def _agree(members: list[LayerPlan]) -> bool:
    return len({member.scheme if member.is_quantized else None for member in members}) == 1


def _shared_scheme(members: list[LayerPlan]) -> tuple[QuantizationScheme, str]:
    """The scheme for layers that run as one, and what happens to them, in words."""
    kept = next((member for member in members if not member.is_quantized), None)
    if kept is not None:
        return kept.scheme, f"all are kept, as {kept.name} is ({kept.reason})"
    best = min(members, key=lambda member: (-member.scheme.bits, _width(member), member.scheme.sym)).scheme
    differ = {member.scheme.group_size for member in members} != {best.group_size}
    if differ and isinstance(best.group_size, int) and best.group_size:
        # Scales per row count as groups of a row: layers that run as one may have different numbers of inputs.
        best = dataclasses.replace(best, group_size=math.gcd(*(_width(member) for member in members)))
    return best, f"all get {_described(best)}"


def _width(member: LayerPlan) -> int:
    """Inputs that share a scale, within a row."""
    size = member.scheme.group_size
    if isinstance(size, tuple):
        return size[1]
    return size if size > 0 else member.info.in_features


def _by_scheme(layers: Iterable[LayerPlan]) -> dict[QuantizationScheme, list[str]]:
    found: dict[QuantizationScheme, list[str]] = {}
    for layer in layers:
        found.setdefault(layer.scheme, []).append(layer.name)
    return found


def _described(scheme: QuantizationScheme) -> str:
    """`4-bit int, sym, groups of 128`."""
    if not scheme.is_quantized:
        return "16 bits"
    size = scheme.group_size
    whole = {-1: "a scale per row", 0: "one scale"}
    groups = whole.get(size, f"groups of {size}") if isinstance(size, int) else f"blocks of {size[0]}×{size[1]}"
    inputs = "" if scheme.act is None else f", {scheme.act.bits}-bit inputs"
    return f"{scheme.bits}-bit {scheme.data_type}, {'sym' if scheme.sym else 'asym'}, {groups}{inputs}"


def _or(values: Iterable[object]) -> str:
    *first, last = [str(value) for value in values]
    return f"{', '.join(first)} or {last}" if first else last


def _listed(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _roles(names: Iterable[str]) -> str:
    """The last components: `q_proj, k_proj, v_proj`; experts are named as such."""
    return ", ".join(dict.fromkeys(_EXPERT.sub(r"experts.*.\2", name).rpartition(".")[2] for name in names))


def _module(names: list[str]) -> str:
    expert = _EXPERT.match(names[0])
    return expert[1] if expert else names[0].rpartition(".")[0]


def _other(names: list[str], name: str) -> str:
    return next(other for other in names if other != name).rpartition(".")[2]


def _base(format_name: str) -> str:
    return format_name.partition(":")[0]


def engine(name: str) -> EngineProfile:
    """The profile of an engine, by any spelling of its name.

    Raises:
        PlanError: an unknown engine; the message lists the known ones and the nearest.
    """
    wanted = name.strip().lower().replace("_", "-")
    wanted = _ALIASES.get(wanted, wanted)
    if wanted not in ENGINES:
        close = difflib.get_close_matches(wanted, ENGINES, n=1, cutoff=0.5)
        nearest = f"; did you mean {close[0]!r}?" if close else ""
        raise PlanError(f"unknown engine {name!r}{nearest}; known: {', '.join(ENGINES)}")
    return ENGINES[wanted]


# ---- the engines -------------------------------------------------------------------------------------------------

_GROUPS = (128, 64, 32, -1)  # vLLM: marlin_utils.py, MARLIN_SUPPORTED_GROUP_SIZES; SGLang has the same list
_ROWS = (-1, 0)  # one scale per output row; one per tensor is stored so
_BLOCK = ((128, 128),)
_ALL = (2, 3, 4, 5, 6, 7, 8)

# vLLM 0.32 (vllm/model_executor/layers/quantization): inc/inc.py (packings), inc/schemes/inc_wna16_scheme.py and
# auto_gptq.py, auto_awq.py (TYPE_MAP), compressed_tensors/schemes. Marlin, and the CPU kernels at 4 bits, read the
# first rows. Other widths need CUDA and the package humming; float families need a GPU of their kind.
_VLLM = (
    Loads("auto_round", "int", (4, 8), True, _GROUPS),
    Loads("auto_round:auto_awq", "int", (4,), None, _GROUPS),
    Loads("auto_round", "int", (2, 3, 5, 6, 7)),
    Loads("llm_compressor", "int", (4, 8), True, _GROUPS),
    Loads("llm_compressor", "int", (4,), False, _GROUPS),
    Loads("llm_compressor", "int", (2, 3, 5, 6, 7, 8), None),
    Loads("llm_compressor", "int", (8,), True, _ROWS, (8,)),
    Loads("llm_compressor", "fp", (8,), act=(8, None)),
    Loads("llm_compressor", "mx_fp", (4,), act=(4, 8, None)),
    Loads("llm_compressor", "mx_fp", (8,), act=(8, None)),
    Loads("llm_compressor", "nv_fp", (4,), act=(4, None)),
    Loads("auto_gptq", "int", (4, 8), True, _GROUPS),
    Loads("auto_awq", "int", (4,), None, _GROUPS),
    # inc.py: float8 in blocks and the MX families, but neither NVFP4 nor float8 with fixed input scales.
    Loads("auto_round", "fp", (8,), True, _BLOCK, (8,)),
    Loads("auto_round", "mx_fp", (4,), act=(4,)),
    Loads("auto_round", "mx_fp", (8,), act=(8,)),
    Loads("fp8", "fp", (8,), True, _BLOCK, (8,)),
)
# SGLang at 5f62d4e (python/sglang/srt/layers/quantization): auto_round/auto_round.py and routing.py,
# compressed_tensors/__init__.py (WNA16: 4 and 8 bits, symmetric) and compressed_tensors/schemes. Read, not run.
_SGLANG = (
    Loads("auto_round", "int", (4, 8), True, _GROUPS),
    Loads("auto_round:auto_awq", "int", (4,), None, _GROUPS),
    Loads("auto_round", "int", (2, 3), True, _GROUPS),
    Loads("llm_compressor", "int", (4, 8), True, _GROUPS),
    Loads("llm_compressor", "int", (8,), True, _ROWS, (8,)),
    Loads("llm_compressor", "fp", (8,), act=(8, None)),
    Loads("llm_compressor", "mx_fp", (4,), act=(4, None)),
    Loads("llm_compressor", "mx_fp", (8,), act=(8,)),
    Loads("llm_compressor", "nv_fp", (4,), act=(4, None)),
    Loads("auto_gptq", "int", (2, 3, 4, 8), True, _GROUPS),
    Loads("auto_awq", "int", (4,), None, _GROUPS),
    Loads("fp8", "fp", (8,), True, _BLOCK, (8,)),
)
# Transformers 5.23 with this package for `auto_round`, `auto_gptq` and `auto_awq` (AutoRoundConfig), and with
# compressed-tensors 0.20 for `llm_compressor`; what it dequantizes on loading counts as loaded.
_TRANSFORMERS = (
    Loads("auto_round", "int", _ALL, None),
    Loads("auto_round", "mx_int", (4,), act=(4,)),
    Loads("llm_compressor", "int", (8,), True, _ROWS, (8,)),
    Loads("llm_compressor", "fp", (8,), act=(8, None)),
    Loads("llm_compressor", "mx_fp", (4, 8), act=(4, 8, None)),
    Loads("llm_compressor", "nv_fp", (4,), act=(4, None)),
    Loads("llm_compressor", "int", _ALL, None),
    Loads("auto_round", "int", (8,), True, _ROWS, (8,)),
    Loads("auto_round", "fp", (8,), act=(8, None)),
    Loads("auto_round", "mx_fp", (4, 8), act=(4, 8, None)),
    Loads("auto_round", "nv_fp", (4,), act=(4, None)),
    Loads("auto_gptq", "int", (2, 3, 4, 8), None),
    Loads("auto_awq", "int", (4,), None),
    Loads("fp8", "fp", (8,), True, _BLOCK, (8,)),
)
# llama.cpp: its tensor types (ggml-common.h); Transformers opens the same files and dequantizes them.
_GGUF = (
    Loads("gguf", "int", (4, 5, 8), True, (32,)),
    Loads("gguf", "int_asym_float_zp", (4, 5), False),
    Loads("gguf", "int_sym_dq", (3, 6)),
    Loads("gguf", "int_asym_dq", (2, 4, 5), False),
)
# mlx-lm 0.32.2: see formats/mlx.py, which checks each layer; a row of 32, 64 or 128 inputs can have one scale.
_MLX = (
    Loads("mlx", "int", (2, 3, 4, 5, 6), None, _GROUPS),
    Loads("mlx", "int", (8,), None, _GROUPS),
)

ENGINES: Mapping[str, EngineProfile] = {
    profile.name: profile
    for profile in (
        EngineProfile("vllm", "vLLM", _VLLM, fused_groups, (AUTO_GPTQ, AUTO_AWQ)),
        EngineProfile("sglang", "SGLang", _SGLANG, fused_groups, (AUTO_GPTQ, AUTO_AWQ)),
        EngineProfile("transformers", "Transformers", (*_TRANSFORMERS, *_GGUF), _no_groups, tuple(PACKINGS)),
        EngineProfile("llama.cpp", "llama.cpp", _GGUF, expert_roles, plain=()),
        EngineProfile("mlx", "mlx-lm", _MLX, expert_roles),
    )
}
_ALIASES = {
    "llamacpp": "llama.cpp",
    "llama-cpp": "llama.cpp",
    "ollama": "llama.cpp",
    "mlx-lm": "mlx",
    "hf": "transformers",
}

_FILES = {"Q2_K": "q2_k_s", **{f"Q{bits}_K": f"q{bits}_k_m" for bits in (3, 4, 5)}}  # the usual file of a tensor type
_GGUF_OF_WIDTH = {2: "Q2_K_S", 3: "Q3_K_M", 4: "Q4_K_M", 5: "Q5_K_M", 6: "Q6_K"}


def _gguf_file(scheme: QuantizationScheme) -> str:
    """The `gguf:*` format whose layers mostly have this scheme's tensor type."""
    kind = next(name for name, known in GGUF_TYPES.items() if known.weight == scheme.weight)
    return f"gguf:{_FILES.get(kind, kind.lower())}"
