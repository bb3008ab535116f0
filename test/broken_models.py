"""Small models that the quantizer cannot take as they are, each for one reason, registered with Transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

WIDTH, EXPERTS, INNER = 128, 4, 64


class Matrix(nn.Module):
    """A linear layer of a type of its own."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Mlp(nn.Module):
    """The healthy middle of a block."""

    def __init__(self, linear: Any = None):
        super().__init__()
        make = linear or (lambda a, b: nn.Linear(a, b, bias=False))
        self.up, self.down = make(WIDTH, 2 * WIDTH), make(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class Mixture(nn.Module):
    """All experts' matrices in one parameter of two dimensions each, under names that say nothing."""

    def __init__(self):
        super().__init__()
        self.choose = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.first = nn.Parameter(torch.empty(EXPERTS * INNER, WIDTH))
        self.second = nn.Parameter(torch.empty(EXPERTS * WIDTH, INNER))

    def forward(self, x: Tensor) -> Tensor:
        share = self.choose(x).softmax(-1)
        first, second = self.first.view(EXPERTS, INNER, WIDTH), self.second.view(EXPERTS, WIDTH, INNER)
        return sum(share[..., e, None] * F.linear(F.silu(F.linear(x, first[e])), second[e]) for e in range(EXPERTS))


class Remembering(Mlp):
    """Adds what it saw in the call before."""

    def __init__(self):
        super().__init__()
        self.memory = None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        last, self.memory = self.memory, x.mean(dim=(0, 1))
        return x if last is None else x + 5 * last


class Block(nn.Module):
    def __init__(self, middle: nn.Module):
        super().__init__()
        self.norm, self.middle = nn.LayerNorm(WIDTH), middle

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.middle(self.norm(hidden_states))


class Stub(PreTrainedModel):
    """Embedding, blocks, head; `blocks()` gives the blocks in order."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, WIDTH)
        self.fill(config)
        self.head = nn.Linear(WIDTH, config.vocab_size, bias=False)
        self.post_init()

    def fill(self, config: PreTrainedConfig) -> None:
        self.layers = nn.ModuleList(Block(self.middle()) for _ in range(config.num_hidden_layers))

    def middle(self) -> nn.Module:
        return Mlp()

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        hidden = self.embed(input_ids)
        for block in self.blocks():
            hidden = block(hidden)
        return CausalLMOutput(logits=self.head(hidden))

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.05)


class UnknownLinear(Stub):
    def middle(self) -> nn.Module:
        return Mlp(Matrix)


class HiddenBlocks(Stub):
    def fill(self, config: PreTrainedConfig) -> None:
        self.block_a, self.block_b = Block(Mlp()), Block(Mlp())

    def blocks(self) -> list[nn.Module]:
        return [self.block_a, self.block_b]


class OpaqueMixture(Stub):
    def middle(self) -> nn.Module:
        return Mixture()


class Stateful(Stub):
    def middle(self) -> nn.Module:
        return Remembering()


class Lookup:
    """Knows the batches that the model was called with."""

    def __init__(self):
        self.scales: dict[int, float] = {}


class LookingUp(Block):
    def forward(self, hidden_states: Tensor, shift: Tensor, lookup: Lookup) -> Tensor:
        return super().forward(hidden_states) * lookup.scales[hidden_states.shape[0]] + shift


class WrongKey(Stub):
    """Its blocks can be called with as many rows as a forward had, and no others."""

    def fill(self, config: PreTrainedConfig) -> None:
        self.layers = nn.ModuleList(LookingUp(Mlp()) for _ in range(config.num_hidden_layers))
        self.__dict__["lookup"] = Lookup()

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        hidden, rows = self.embed(input_ids), input_ids.shape[0]
        self.lookup.scales[rows] = 1.0
        for block in self.layers:
            hidden = block(hidden, shift=input_ids[..., None] * 1e-3, lookup=self.lookup)
        return CausalLMOutput(logits=self.head(hidden))


class PlainList(Stub):
    def fill(self, config: PreTrainedConfig) -> None:
        self.layers = [Block(Mlp()) for _ in range(config.num_hidden_layers)]


class NoText(Stub):
    def forward(self, spectrum: Tensor, weights_of_frames: Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(spectrum * weights_of_frames))


class Nan(Stub):
    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=super().forward(input_ids).logits * float("nan"))


MODELS = (Stub, UnknownLinear, HiddenBlocks, OpaqueMixture, Stateful, WrongKey, PlainList, NoText, Nan)
CONFIGS: dict[str, type[PreTrainedConfig]] = {}

for _model in MODELS:
    _name = f"broken_{_model.__name__.lower()}"
    _config = type(
        f"{_model.__name__}Config",
        (PreTrainedConfig,),
        {
            "model_type": _name,
            "__module__": __name__,
            "__annotations__": {"vocab_size": int, "hidden_size": int, "num_hidden_layers": int, "num_experts": int},
            "vocab_size": 320,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_experts": EXPERTS,
        },
    )
    _model.config_class = CONFIGS[_model.__name__] = _config
    globals()[_config.__name__] = _config
    AutoConfig.register(_name, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
